"""Matrix products of rows that are sorted by expert; letters in shapes as in :mod:`surgeon.ops.mixture`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from surgeon.errors import RewriteError


class Groups(NamedTuple):
    """The S token-expert pairs that are computed (all T k, or those of non-zero weight), sorted by expert.

    Attributes:
        order: [S] position of each sorted pair in the row-major flattening of ``index``.
        token: [S] token of each sorted pair.
        expert: [S] expert of each sorted pair, ascending.
        ends: [E] end of each expert's slice.
        bounds: the same as Python (expert, start, end) for experts that have tokens; None where the device's grouped
            kernel reads ``ends`` itself, which spares a synchronisation.
    """

    order: Tensor
    token: Tensor
    expert: Tensor
    ends: Tensor
    bounds: list[tuple[int, int, int]] | None


def has_grouped_kernel(x: Tensor, *widths: int) -> bool:
    """Whether one fused grouped matmul exists for tensors like x, whose matrices have these ``widths`` of rows and columns.

    On the CPU ``torch._grouped_mm`` exists but is itself a loop over the experts (measured no faster than ours at T = 1
    to 2048), and on CUDA only bfloat16 has a kernel; other types would synchronise and loop inside.  The kernel wants
    rows that start at multiples of 16 bytes.
    """
    if x.device.type != "cuda" or x.dtype != torch.bfloat16 or not hasattr(torch, "_grouped_mm"):
        return False
    return torch.cuda.get_device_capability(x.device) >= (8, 0) and all(width % 8 == 0 for width in widths)


def sort_by_expert(index: Tensor, experts: int, on_device: bool, weight: Tensor | None = None) -> Groups:
    """Sort the pairs of ``index`` [T, k] by expert, stably, so that results do not depend on the sort's whims.

    With ``weight`` [T, k] pairs of weight 0 are left out (not on the device, which would have to wait for their number).
    """
    k = index.shape[1]
    flat = index.reshape(-1)
    if on_device:
        # a device sorts some bits at a time, and most of those of an int64 say nothing here
        key = torch.uint8 if experts <= 256 else torch.int16 if experts <= 2**15 else flat.dtype
        keys, order = flat.to(key).sort(stable=True)
        expert = keys.to(flat.dtype)
        ends = torch.searchsorted(expert, torch.arange(experts, device=index.device), right=True)
        return Groups(order, order.div(max(k, 1), rounding_mode="floor"), expert, ends.to(torch.int32), None)
    if flat.numel():
        low, high = (int(bound) for bound in flat.aminmax())
        if low < 0 or high >= experts:
            raise RewriteError(
                f"surgeon::moe: index holds experts {low} to {high}, the weights hold {experts} (0 to {experts - 1})"
            )
    if weight is not None:
        flat = torch.where(weight.reshape(-1) == 0, experts, flat)  # behind all experts
    expert, order = flat.sort(stable=True)
    ends = torch.searchsorted(expert, torch.arange(experts, device=index.device), right=True)
    stops: list[int] = ends.tolist()
    expert, order = (part[: stops[-1] if stops else 0] for part in (expert, order))
    token = order.div(max(k, 1), rounding_mode="floor")
    starts = [0, *stops[:-1]]
    bounds = [(e, start, stop) for e, (start, stop) in enumerate(zip(starts, stops, strict=True)) if stop > start]
    return Groups(order, token, expert, ends, bounds)


def grouped_linear(rows: Tensor, weight: Tensor, bias: Tensor | None, groups: Groups) -> Tensor:
    """Apply each expert's linear map to its rows: rows [S, A], weight [E, B, A], bias [E, B]? -> [S, B]."""
    if groups.bounds is None:
        out: Tensor = torch._grouped_mm(rows, weight.transpose(1, 2), offs=groups.ends)
        return out if bias is None else out + bias[groups.expert]
    out = rows.new_empty(rows.shape[0], weight.shape[1])
    for e, start, stop in groups.bounds:
        if bias is None:
            torch.mm(rows[start:stop], weight[e].t(), out=out[start:stop])
        else:
            torch.addmm(bias[e], rows[start:stop], weight[e].t(), out=out[start:stop])
    return out


def grouped_outer(left: Tensor, right: Tensor, experts: int, groups: Groups) -> Tensor:
    """Sum of left_s right_s^T over each expert's rows: left [S, B], right [S, A] -> [E, B, A], zero for idle ones."""
    if groups.bounds is None:
        out: Tensor = torch._grouped_mm(left.t(), right, offs=groups.ends)
        return out
    out = left.new_zeros(experts, left.shape[1], right.shape[1])
    for e, start, stop in groups.bounds:
        torch.mm(left[start:stop].t(), right[start:stop], out=out[e])
    return out


def grouped_sum(rows: Tensor, experts: int, groups: Groups) -> Tensor:
    """Sum of each expert's rows [S, B] -> [E, B], accumulated in at least float32."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    total = torch.zeros(experts, rows.shape[1], dtype=wide, device=rows.device)
    return total.index_add_(0, groups.expert, rows.to(wide)).to(rows.dtype)


def unsort(rows: Tensor, groups: Groups, tokens: int, k: int) -> Tensor:
    """Rows [S, B] in sorted order -> [T, k, B] in the order of ``index``, zero for pairs that were left out."""
    every = tokens * k
    out = (rows.new_empty if rows.shape[0] == every else rows.new_zeros)(every, rows.shape[1])
    out[groups.order] = rows
    return out.view(tokens, k, rows.shape[1])
