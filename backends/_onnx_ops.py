"""What the rewritten graph calls: functions that trace to ONNX operators.

A lowered node's target is one of these plain Python functions.  ``torch.export`` runs through them, so each is written
as ATen plus, where ONNX has an operator that ATen has not, ``torch.onnx.ops.symbolic``, which becomes one ONNX node.
The symbolic ones compute nothing in torch.

Letters in shapes: N outputs, K inputs, T tokens, E experts, H width, I inner width, O rows of an expert's first matrix.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.onnx import ops as onnx_ops

from surgeon.gates import gate as lookup
from surgeon.numerics.quantization import FLOAT8, dequantize

Linear = tuple[Any, ...]
"""A linear map as arguments of a node: ``("float", w[K, N], b?)``, ``("nbits", packed, scale, zero_point?, b?, bits,
block, columns, level)`` or ``("integer", w int8 [K, N], scale[N], zero_point int8 [N]?, b?)``."""


def spread_to_scores(mask: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """A mask [..., S or 1, T or 1] as [..., S, T], of queries [..., S, D] over keys [..., T, D]."""
    return mask.expand(*mask.shape[:-2], q.shape[-2], k.shape[-2])


def transposed_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """X [..., K] times weight [K, N] plus bias [N]."""
    y = torch.matmul(x, weight)
    return y if bias is None else y + bias


def matmul_nbits(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    bits: int,
    block: int,
    columns: int,
    level: int,
) -> Tensor:
    """``com.microsoft.MatMulNBits``: x [..., K] times the transpose of a blockwise low-bit weight [N, K].

    Args:
        x: [..., K].
        packed: uint8 [N, blocks, block * bits / 8].
        scale: [N, blocks].
        zero_point: uint8 [N, ceil(blocks * bits / 8)], packed as the weight, or None for 2 ** (bits - 1).
        bias: [N] or None.
        bits: 2, 4 or 8.
        block: a power of two, at least 16.
        columns: K.
        level: accuracy level; 4 quantizes the activations to int8 blockwise.
    """
    rows = packed.shape[0]
    return onnx_ops.symbolic(
        "com.microsoft::MatMulNBits",
        (x, packed, scale, zero_point, None, bias),
        {"K": columns, "N": rows, "bits": bits, "block_size": block, "accuracy_level": level},
        dtype=x.dtype,
        shape=(*x.shape[:-1], rows),
        version=1,
    )


def dynamic_quantize(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``DynamicQuantizeLinear``: x -> codes uint8 of its shape, scale float32 [], zero point uint8 []."""
    codes, scale, zero = onnx_ops.symbolic_multi_out(
        "DynamicQuantizeLinear",
        (x.to(torch.float32),),
        dtypes=(torch.uint8, torch.float32, torch.uint8),
        shapes=(x.shape, (), ()),
        version=11,
    )
    return codes, scale, zero


def dequantize_codes(codes: Tensor, scale: Tensor, zero: Tensor, dtype: torch.dtype) -> Tensor:
    """``DequantizeLinear``: undo :func:`dynamic_quantize`."""
    x = onnx_ops.symbolic("DequantizeLinear", (codes, scale, zero), dtype=torch.float32, shape=codes.shape, version=13)
    return x.to(dtype)


def matmul_integer(
    quantized: tuple[Tensor, Tensor, Tensor],
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """``MatMulInteger`` and its scaling, in the standard spelling that ONNX Runtime fuses into one kernel.

    Args:
        quantized: codes uint8 [..., K], scale [] and zero point [] of the activations.
        weight: int8 [K, N].
        weight_scale: [N].
        weight_zero: int8 [N] or None for 0.
        bias: [N] or None.
        dtype: of the result.

    Returns:
        [..., N].
    """
    codes, scale, zero = quantized
    total = onnx_ops.symbolic(
        "MatMulInteger",
        (codes, weight, zero, weight_zero),
        dtype=torch.int32,
        shape=(*codes.shape[:-1], weight.shape[1]),
        version=10,
    )
    y = total.to(torch.float32) * (scale * weight_scale.to(torch.float32))
    return (y if bias is None else y + bias).to(dtype)


def _expert(x: Tensor, quantized: tuple[Tensor, Tensor, Tensor] | None, how: Linear, dtype: torch.dtype) -> Tensor:
    """Apply one expert's linear map to x [rows, K] or, where it is of the integer kind, to the codes of x."""
    kind, *rest = how
    if kind == "integer":
        assert quantized is not None
        weight, scale, zero, bias = rest
        return matmul_integer(quantized, weight, scale, zero, bias, dtype)
    if kind == "nbits":
        packed, scale, zero, bias, bits, block, columns, level = rest
        return matmul_nbits(x, packed, scale, zero, bias, bits, block, columns, level)
    weight, bias = rest
    return transposed_linear(x, weight, bias)


def unpack(packed: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, group: int, columns: int) -> Tensor:
    """``surgeon::dequantize`` in standard operators.

    The shift is ONNX's own, since torch.onnx takes a shift of uint8 through int8, which makes an invalid model.  The
    arguments are those of the operator; returns [..., out, columns] in the dtype of ``scale``.
    """
    if packed.dtype == FLOAT8:
        return dequantize(packed, scale, zero_point, bits, group, columns)
    codes = packed
    if bits < 8:
        mask = torch.full((), 2**bits - 1, dtype=torch.uint8)
        lanes = []
        for shift in range(0, 8, bits):
            places = torch.full((), shift, dtype=torch.uint8)
            moved = onnx_ops.symbolic(
                "BitShift", (packed, places), {"direction": "RIGHT"}, dtype=torch.uint8, shape=packed.shape, version=11
            )
            lanes.append(torch.bitwise_and(moved, mask))
        codes = torch.stack(lanes, -1).flatten(-2)
    zero = 2 ** (bits - 1) if zero_point is None else zero_point.to(scale.dtype).unsqueeze(-1)
    values = (codes.to(scale.dtype) - zero) * scale.unsqueeze(-1)
    return values.flatten(-2)[..., :columns]


def gather_block_quantized(
    packed: Tensor, index: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, block: int
) -> Tensor:
    """``com.microsoft.GatherBlockQuantized``: rows of a low-bit table, dequantized as they are read.

    Args:
        packed: uint8 [V, K * bits / 8].
        index: integers [...].
        scale: [V, K / block].
        zero_point: uint8 [V, ceil(K / block * bits / 8)], packed, or None.
        bits: 4 or 8.
        block: a power of two, at least 16, that divides K.

    Returns:
        [..., K] in the dtype of ``scale``.
    """
    return onnx_ops.symbolic(
        "com.microsoft::GatherBlockQuantized",
        (packed, index, scale, zero_point),
        {"bits": bits, "block_size": block, "gather_axis": 0, "quantize_axis": 1},
        dtype=scale.dtype,
        shape=(*index.shape, packed.shape[1] * 8 // bits),
        version=1,
    )


def gather_dequantize(
    packed: Tensor,
    index: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bits: int,
    group: int,
    columns: int,
) -> Tensor:
    """Rows of a low-bit table in plain ATen, for layouts that no fused operator takes: gather first, then unpack."""
    zero = None if zero_point is None else zero_point[index]
    return unpack(packed[index], scale[index], zero, bits, group, columns)


def routed_logits(index: Tensor, weight: Tensor, experts: int) -> Tensor:
    """Logits [T, E] whose renormalised top-k softmax is weight / sum(weight) at index: log(weight), -inf elsewhere.

    A weight of exactly zero is given the smallest normal number instead, so that a row of zeros stays finite (and is
    multiplied by its sum, zero, afterwards).
    """
    wide = weight.to(torch.float32)
    # the least float32 above which log is accurate; softmax turns it back into something below 1e-37
    logs = wide.clamp(min=torch.finfo(torch.float32).tiny).log()
    empty = torch.full((index.shape[0], experts), -torch.inf, dtype=torch.float32)
    return empty.scatter(1, index, logs)


def fused_experts(
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    attributes: tuple[tuple[str, Any], ...],
) -> Tensor:
    """``com.microsoft.MoE`` with given routing weights (distinct experts per row, no negative weight).

    The kernel takes logits, applies softmax, selects the k largest and renormalises; so it is given log(weight), and
    the sum that normalisation divides by is multiplied back: y = sum(w) * sum_j softmax(log w)_j f_j(x).

    Args:
        x: float32 [T, H].
        index: [T, k].
        weight: [T, k].
        w_in: [E, O, H], gate and up rows interleaved where gated.
        b_in: [E, O] or None, likewise.
        w_out: [E, H, I].
        b_out: [E, H] or None.
        attributes: of the node.
    """
    y = onnx_ops.symbolic(
        "com.microsoft::MoE",
        (x, routed_logits(index, weight, w_in.shape[0]), w_in, b_in, w_out, b_out),
        {"k": index.shape[1], "normalize_routing_weights": 1, **dict(attributes)},
        dtype=x.dtype,
        shape=x.shape,
        version=1,
    )
    return y * weight.sum(1, keepdim=True).to(x.dtype)


def fused_quantized_experts(
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    first: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    second: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    attributes: tuple[tuple[str, Any], ...],
) -> Tensor:
    """``com.microsoft.QMoE``: selection from one input, mixing weights (any sign) from another.

    Args:
        x: [T, H].
        index: [T, k], distinct in a row.
        weight: [T, k].
        first: packed uint8 [E, O, H * bits / 8], scale [E, O, H / block], packed zero point or None, bias or None; gate
            and up rows interleaved where gated.
        second: the same of w_out [E, H, I].
        attributes: of the node.
    """
    packed_in, scale_in, zero_in, b_in = first
    packed_out, scale_out, zero_out, b_out = second
    experts = packed_in.shape[0]
    blank = torch.zeros((index.shape[0], experts), dtype=x.dtype)
    chosen = blank.scatter(1, index, torch.ones_like(weight, dtype=x.dtype))
    mixing = blank.scatter(1, index, weight.to(x.dtype))
    gap = (None, None, None)  # a third matrix, which the fused gate does not have
    return onnx_ops.symbolic(
        "com.microsoft::QMoE",
        (x, chosen, packed_in, scale_in, b_in, packed_out, scale_out, b_out, *gap, zero_in, zero_out, None, mixing),
        {"k": index.shape[1], "normalize_routing_weights": 0, **dict(attributes)},
        dtype=x.dtype,
        shape=x.shape,
        version=1,
    )


def sorted_experts(
    x: Tensor,
    quantized: tuple[Tensor, Tensor, Tensor] | None,
    index: Tensor,
    weight: Tensor,
    experts_in: list[Linear],
    experts_out: list[Linear],
    inner: int,
    activation: str,
    skips: bool = False,
) -> Tensor:
    """A sparse mixture in standard operators, for what the fused kernels do not compute.

    The S = T k pairs are sorted by expert with one NonZero (row-major over [E, S], so sorted by expert, then by pair),
    their rows gathered, split into one ragged piece per expert, sent through that expert and gathered back.  Exact for
    any index and weight; no token is multiplied with an expert it was not sent to.

    Args:
        x: [T, H].
        quantized: codes uint8 [T, H], scale and zero point of x, where experts_in is of the integer kind.
        index: [T, k].
        weight: [T, k].
        experts_in: one linear map H -> O per expert.
        experts_out: one linear map I -> G per expert.
        inner: I; O = 2 I means gated, rows [gate | up].
        activation: name of the activation.
        skips: pairs of weight 0 are sent to one more expert, whose output is zero without computing anything.

    Returns:
        [T, G].
    """
    experts = len(experts_in) + skips
    tokens, k = index.shape
    if skips:
        index = torch.where(weight == 0, torch.full((), len(experts_in), dtype=index.dtype), index)
    flat = index.reshape(1, -1)
    member = flat == torch.arange(experts, dtype=index.dtype).unsqueeze(1)  # [E, S]
    order = onnx_ops.symbolic("NonZero", (member,), dtype=torch.int64, shape=(2, tokens * k), version=13)[1]
    counts = member.to(torch.int64).sum(1)  # [E]
    back = torch.zeros_like(order).scatter(0, order, torch.arange(tokens * k))  # the inverse permutation
    token = order.div(k, rounding_mode="floor")
    source = x if quantized is None else quantized[0]
    entry = lookup(activation)
    # Sizes that only the data knows; the exporter needs them as symbols, the runtime reads ``counts`` itself.
    sizes: list[Any] = counts.tolist()
    for size in sizes:
        torch._check(size >= 0)  # type: ignore[no-untyped-call]  # of torch
    pieces = onnx_ops.symbolic_multi_out(
        "Split",
        (source[token], counts),
        {"axis": 0},
        dtypes=(source.dtype,) * experts,
        shapes=[(size, source.shape[1]) for size in sizes],
        version=18,
    )
    results = []
    for piece, how_in, how_out in zip(pieces, experts_in, experts_out, strict=False):  # the one that skips is left over
        codes = None if quantized is None else (piece, quantized[1], quantized[2])
        pre = _expert(piece, codes, how_in, x.dtype)
        if pre.shape[1] == inner:
            hidden = entry.alone(pre)
        else:
            hidden = entry.joined(pre[:, :inner], pre[:, inner:])
        results.append(_expert(hidden, None, how_out, x.dtype))
    if skips:
        results.append(torch.zeros((pieces[-1].shape[0], results[0].shape[1]), dtype=x.dtype))
    each = torch.cat(results)[back].reshape(tokens, k, -1)
    return (each * weight.to(x.dtype).unsqueeze(-1)).sum(1)
