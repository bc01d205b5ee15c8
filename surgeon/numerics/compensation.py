"""Quantization in which the weights that are not rounded yet make up for the error of those that are (GPTQ)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]  # public, but its stub does not re-export it

from surgeon.numerics.errors import NumericsError, require_finite
from surgeon.numerics.quantization import FLOAT8, SEARCH, Levels, QuantizedTensor, check_weight, working_type

_BLOCK = 64
"""Columns whose errors are gathered before the columns behind them are changed, by one matrix product."""


def quantize_compensated(
    weight: Tensor,
    second_moment: Tensor,
    *,
    levels: Levels,
    group: int,
    damp: float = 0.01,
    shrink: Sequence[float] = SEARCH,
) -> QuantizedTensor:
    """Codes Q that bring ``||(W - Q) X||`` near its least, one input column after the other.

    GPTQ (Frantar et al. 2022, arXiv:2210.17323): with C = sum_t x_t x_t^T + damp mean(diag C) I and U the upper Cholesky
    factor of C^-1 = U^T U, column j is rounded, and its error over U_jj times U_j,j+1: is taken from the columns behind
    it.  Columns go from the largest diagonal entry of C to the smallest, so that those that matter most are rounded while
    many are left to make up for them.  Scales are fixed before, so that groups stay runs of neighbouring columns whatever
    the order: those of least squared error, weighted by the diagonal of C.
    A column whose input was always zero is rounded to the nearest and changes no other.
    Weights that are exactly 0 stay 0, and what the columns before asked of them is made up for by those behind: a weight that
    was made sparse keeps its pattern.

    Batches of matrices, such as experts, are quantized side by side.  Memory: 4 out in + 16 in^2 bytes each.

    Args:
        weight: [..., out, in], floating.
        second_moment: C, [..., in, in] with the same leading dimensions; may be singular, of any scale.
        levels: what codes stand for.
        group: inputs per scale; -1 for one scale per row.
        damp: what is added to the diagonal of C, over its mean; above 0.
        shrink: factors of a group's range that are tried for its scale.

    Returns:
        The codes, in the form of :func:`quantize_groupwise` or :func:`quantize_float8`.

    Raises:
        NumericsError: a shape, the group or damp is not possible, an entry is not finite, or C has negative eigenvalues.
    """
    where = "quantize_compensated"
    check_weight(where, weight)
    in_features = weight.shape[-1]
    group = levels.group(where, group, in_features)
    moments = second_moment.detach().double().reshape(-1, *second_moment.shape[-2:]).clone()
    if second_moment.shape != (*weight.shape[:-2], in_features, in_features):
        raise NumericsError(
            f"{where}: second_moment has shape {list(second_moment.shape)}, needed [..., {in_features}, {in_features}] with "
            f"the leading dimensions of a weight {list(weight.shape)}"
        )
    if not damp > 0:
        raise NumericsError(f"{where}: damp = {damp}, needed above 0")
    require_finite(second_moment=moments)
    work = weight.detach().to(working_type(weight.dtype)).reshape(-1, *weight.shape[-2:])
    codes = QuantizedTensor.empty(weight, levels, group)

    importance = moments.diagonal(dim1=-2, dim2=-1)
    scale, zero = _scales(work, importance.to(work.dtype), levels, group, weight.dtype, shrink)
    order = importance.argsort(dim=-1, descending=True, stable=True)
    factor = inverse_factor("quantize_compensated", moments, order, damp).to(work.dtype)
    found = _sweep(work, factor, order, levels, group, scale.to(work.dtype), zero)

    columns = codes.packed.shape[-2] * group
    if columns > in_features:  # the last group is filled up with what stands for 0
        fill = 0.0 if levels.float8 else 2 ** (levels.bits - 1)
        tail = found.new_full((*found.shape[:-1], columns - in_features), fill)
        if zero is not None:
            tail[:] = zero[..., -1:]
        found = torch.cat([found, tail], -1)
    codes.packed.copy_(levels.pack(found.reshape(*codes.scale.shape, group)))
    codes.scale.copy_(scale.reshape(codes.scale.shape))
    if codes.zero_point is not None and zero is not None:
        codes.zero_point.copy_(zero.reshape(codes.zero_point.shape))
    return codes


def _scales(
    weight: Tensor, importance: Tensor, levels: Levels, group: int, dtype: torch.dtype, shrink: Sequence[float]
) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points [B, out, groups] of weights [B, out, in], importance [B, in]."""
    missing = -weight.shape[-1] % group
    count = (weight.shape[-1] + missing) // group
    blocks = torch.nn.functional.pad(weight, (0, missing)).reshape(*weight.shape[:-1], count, group)
    share = torch.nn.functional.pad(importance, (0, missing)).reshape(-1, 1, count, group)
    # a group that only dead columns make up counts all of them alike
    share = torch.where(share.sum(-1, keepdim=True) > 0, share, 1.0)
    return levels.fit(blocks, dtype, importance=share, shrink=shrink)


def inverse_factor(where: str, moments: Tensor, order: Tensor | None, damp: float) -> Tensor:
    """Upper Cholesky factors U of (C + damping)^-1, columns whose input was always zero apart from all others.

    Args:
        where: who asks, for the error.
        moments: C, [B, in, in] in float64, whose diagonal is damped in place.
        order: [B, in], in which rows and columns are taken; None: as they are.
        damp: what is added to the diagonal of C, over its mean.

    Returns:
        [B, in, in], rows and columns in that order.

    Raises:
        NumericsError: C has negative eigenvalues.
    """
    diagonal = moments.diagonal(dim1=-2, dim2=-1)
    dead = diagonal <= 0
    alive = (~dead).sum(-1, keepdim=True).clamp_min(1)
    mean = diagonal.clamp_min(0).sum(-1, keepdim=True) / alive
    diagonal.copy_(torch.where(dead, torch.ones_like(diagonal), diagonal + damp * mean))
    ordered = moments
    if order is not None:
        rows = order.unsqueeze(-1).expand_as(moments)
        ordered = moments.gather(-2, rows).gather(-1, rows.transpose(-1, -2))
    try:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(ordered))
        upper: Tensor = torch.linalg.cholesky(inverse, upper=True)
    except LinAlgError as error:
        raise NumericsError(
            f"{where}: the second moment has no Cholesky factor ({error}); a sum of x x^T has one, so either it "
            "holds negative eigenvalues or damp is too small"
        ) from error
    return upper


def _sweep(
    weight: Tensor, factor: Tensor, order: Tensor, levels: Levels, group: int, scale: Tensor, zero: Tensor | None
) -> Tensor:
    """Codes [B, out, in] of weights [B, out, in]; columns are taken in ``order`` [B, in]."""
    # Columns come first, so that each is one run of memory: [B, in, out].
    index = order.unsqueeze(-1)
    left = weight.transpose(-1, -2).gather(-2, index.expand(-1, -1, weight.shape[-2]))
    steps, zeros = (
        None if t is None else t.transpose(-1, -2).gather(-2, (index // group).expand(-1, -1, t.shape[-2]))
        for t in (scale, zero)
    )
    assert steps is not None
    gone = left == 0
    found = torch.empty_like(left, dtype=FLOAT8 if levels.float8 else None)
    count = left.shape[1]
    for start in range(0, count, _BLOCK):
        stop = min(start + _BLOCK, count)
        errors = torch.empty_like(left[:, start:stop])
        for column in range(start, stop):
            value, step = left[:, column], steps[:, column]
            point = None if zeros is None else zeros[:, column]
            codes = levels.nearest(value.masked_fill(gone[:, column], 0), step, point)
            found[:, column] = codes
            error = (value - levels.value(codes, step, point)) / factor[:, column, column, None]
            errors[:, column - start] = error
            left[:, column + 1 : stop].baddbmm_(factor[:, column, column + 1 : stop, None], error.unsqueeze(1), alpha=-1)
        left[:, stop:].baddbmm_(factor[:, start:stop, stop:].transpose(-1, -2), errors, alpha=-1)
    # gather knows no 8-bit floats
    back = order.argsort(-1).unsqueeze(-1).expand_as(found)
    plain = found.view(torch.uint8).gather(1, back).view(found.dtype) if levels.float8 else found.gather(1, back)
    return plain.transpose(-1, -2)
