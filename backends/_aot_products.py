"""How a package for CUDA multiplies with experts and with low-bit weights.

Few rows (decoding) go through the kernels of ``_cuda_rows``, which read each weight once.  More rows over codes go through
those of ``_cuda_many``; so many that unpacking the codes is a small part, and rows over other weights, through torch's matrix
multiplications, grouped by expert.  The package holds them all and decides at run time, by sizes alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from surgeon.backends._aot_cuda import either
from surgeon.backends._aot_tiles import TiledTensor
from surgeon.numerics.quantization import QuantizedTensor, dequantize
from surgeon.ops import moe_dense, moe_grouped, moe_sorted
from surgeon.ops.grouped import Groups, has_grouped_kernel
from surgeon.ops.mixture import inner_activation

SMALL_BLOCKS = 96
"""Largest number of rows of each expert, on the average, for which small blocks of them are the faster ones (on an H200, at
Mixtral's sizes: 0.54 of the time of large ones at 64 rows)."""

LARGE_BLOCKS = 768
"""The same for multiplying with codes and not with what they stand for: unpacked first, experts of 512 rows took 1.13 times as
long there, of 4096 and more they take less."""

LINEAR_ROWS = 256
"""The same for one matrix, which takes less unpacking and has a faster product."""


def _parts(weight: Tensor | QuantizedTensor) -> tuple[list[Tensor | None], tuple[int, int]]:
    """Tensors of a weight (itself, or codes, scales and zero points), and bits and group (0 and 1 for none)."""
    if isinstance(weight, QuantizedTensor):
        return [weight.packed, weight.scale, weight.zero_point], (weight.bits, weight.group)
    return [weight.contiguous(), None, None], (0, 1)


def _whole(parts: tuple[Any, ...], like: Tensor | QuantizedTensor) -> Tensor:
    """The weight of which these are the tensors, in the form of ``like``: [E, N, K], or [N, K] where there is one."""
    from surgeon.backends._cuda_rows import unpack_tiles

    if isinstance(like, TiledTensor):
        alone = parts[1].dim() == 3
        stacks = [part.unsqueeze(0) if alone and part is not None else part for part in parts]
        whole: Tensor = unpack_tiles(*stacks, like.bits, like.group)
        return whole[0] if alone else whole
    if isinstance(like, QuantizedTensor):
        packed, scale, zero = parts
        return dequantize(packed, scale, zero, like.bits, like.group, like.in_features)
    weight: Tensor = parts[0]
    return weight


def _multiplied(x: Tensor, weight: Tensor | QuantizedTensor) -> bool:
    """Whether many rows like x are multiplied with the codes of a weight; otherwise it is unpacked for them."""
    return isinstance(weight, TiledTensor) and x.element_size() == 2 and weight.scale.dtype == x.dtype


def _rows(weight: Tensor | QuantizedTensor) -> int:
    """N of a weight [..., N, K]."""
    if isinstance(weight, TiledTensor):
        return int(weight.scale.shape[-3] * weight.scale.shape[-1])
    return int(weight.scale.shape[-2] if isinstance(weight, QuantizedTensor) else weight.shape[-2])


def linear(x: Tensor, weight: QuantizedTensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` over a packed weight: x [..., K], weight [N, K] -> [..., N]."""
    from surgeon.backends._cuda_many import many_rows
    from surgeon.backends._cuda_rows import PAIRS, few_rows

    tensors, form = _parts(weight)

    def few(rows: Tensor, added: Tensor | None, *parts: Tensor | None) -> Tensor:
        out: Tensor = few_rows(rows, None, *_stacked(parts), *form, 1, 1).sum(0)
        return (out if added is None else out + added).to(rows.dtype)

    def several(rows: Tensor, added: Tensor | None, *parts: Tensor | None) -> Tensor:
        out: Tensor = many_rows(rows, None, *_stacked((*parts, added)), *form, False)
        return out

    def many(rows: Tensor, added: Tensor | None, *parts: Tensor | None) -> Tensor:
        return F.linear(rows, _whole(parts, weight), added)

    def more(*operands: Any) -> Tensor:
        below = operands[0].shape[0] <= LINEAR_ROWS if _multiplied(operands[0], weight) else False
        out: Tensor = either(below, several, many, list(operands))
        return out

    rows = x.reshape(-1, weight.in_features).contiguous()
    out: Tensor = either(rows.shape[0] <= PAIRS, few, more, [rows, bias, *tensors])
    return out.reshape(*x.shape[:-1], out.shape[-1])


def _stacked(parts: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    """Tensors of one weight as those of a stack of one."""
    return [None if part is None else part.unsqueeze(0) for part in parts]


def experts(
    used: Counter[str],
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    w_in: Tensor | QuantizedTensor,
    w_out: Tensor | QuantizedTensor,
    b_in: Tensor | None = None,
    b_out: Tensor | None = None,
    activation: str = "identity",
) -> Tensor:
    """``surgeon::moe``; its weights may be packed.  ``used`` counts the forms."""
    from surgeon.backends._cuda_gates import gate_of
    from surgeon.backends._cuda_many import has_large_blocks, many_rows, many_rows_gated
    from surgeon.backends._cuda_rows import PAIRS, few_rows, few_rows_gated, parts_of

    (first, form_in), (second, form_out) = _parts(w_in), _parts(w_out)
    inner = int(w_out.in_features if isinstance(w_out, QuantizedTensor) else w_out.shape[2])
    rows_in, rows_out = _rows(w_in), _rows(w_out)
    stack: Any = first[0]
    count, k = int(stack.shape[0]), int(index.shape[1])
    grouped = has_grouped_kernel(x, x.shape[1], inner, rows_in, rows_out)
    gate = gate_of(activation) if rows_in == 2 * inner else None
    whole = parts_of(rows_in, int(x.shape[1]), count, k, *form_in, x.element_size()) == 1
    coded = _multiplied(x, w_in) and _multiplied(x, w_out)
    used["experts few rows"] += 1
    if coded:
        used["experts over codes"] += 1
    if grouped or not coded:
        used["experts grouped" if grouped else "experts dense"] += 1

    def few(rows: Tensor, chosen: Tensor, share: Tensor, bias_in: Any, bias_out: Any, *parts: Tensor | None) -> Tensor:
        flat = chosen.reshape(-1)
        if gate is not None and whole:  # what comes in parts is gated behind their sum
            hidden = few_rows_gated(rows, flat, *parts[:3], bias_in, *form_in, k, *gate)
        else:
            pre = few_rows(rows, flat, *parts[:3], *form_in, k, k).sum(0)
            if bias_in is not None:
                pre = pre + bias_in[flat]
            hidden = inner_activation(pre, inner, activation).to(rows.dtype)
        each: Tensor = few_rows(hidden, flat, *parts[3:], *form_out, 1, k).sum(0)
        if bias_out is not None:
            each = each + bias_out[flat]
        return (each.reshape(-1, k, rows_out) * share.unsqueeze(-1)).sum(1).to(rows.dtype)

    def over_codes(large: bool) -> Callable[..., Tensor]:
        def branch(rows: Tensor, chosen: Tensor, share: Tensor, bias_in: Any, bias_out: Any, *parts: Tensor | None) -> Tensor:
            def hidden(rows: Tensor, groups: Groups) -> Tensor:
                operands = (rows, groups.ends, *parts[:3], bias_in, *form_in, large)
                if gate is not None:
                    gated: Tensor = many_rows_gated(*operands, *gate)
                    return gated
                return inner_activation(many_rows(*operands), inner, activation)

            def each(rows: Tensor, groups: Groups) -> Tensor:
                out: Tensor = many_rows(rows, groups.ends, *parts[3:], bias_out, *form_out, large)
                return out

            return moe_sorted(rows, chosen, share, count, hidden, each)

        return branch

    def many(rows: Tensor, chosen: Tensor, share: Tensor, bias_in: Any, bias_out: Any, *parts: Tensor | None) -> Tensor:
        form = moe_grouped if grouped else moe_dense
        return form(rows, chosen, share, _whole(parts[:3], w_in), _whole(parts[3:], w_out), bias_in, bias_out, activation)

    def larger(*operands: Any) -> Tensor:
        below = operands[1].shape[0] * k <= LARGE_BLOCKS * count if has_large_blocks(x.device) else False
        # without a grouped product every row would go through every expert
        out: Tensor = either(below if grouped else True, over_codes(True), many, list(operands))
        return out

    def more(*operands: Any) -> Tensor:
        if not coded:
            return many(*operands)
        out: Tensor = either(operands[1].shape[0] * k <= SMALL_BLOCKS * count, over_codes(False), larger, list(operands))
        return out

    operands = [x.contiguous(), index.contiguous(), weight, b_in, b_out, *first, *second]
    result: Tensor = either(index.shape[0] * k <= PAIRS, few, more, operands)
    return result
