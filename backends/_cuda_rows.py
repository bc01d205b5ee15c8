"""Triton kernels of packages for CUDA: experts and low-bit linears for few rows.

They are compiled into the package (``torch.library.triton_op``); nothing of Triton or of ours is needed to run it.

Decoding one or a few tokens is bound by reading weights once.  torch's grouped matrix multiplication is made for many rows,
and torch has no low-bit form of it.

Letters in shapes: R rows, S = R times ``divisor`` row-expert pairs, E experts, N output width, K input width, P parts of a
sum, I = N / 2 inner width of a gated network.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from surgeon.backends._cuda_codes import (
    TILE,
    by_position,
    code_of,
    columns_at_once,
    compiles,
    four_codes,
    four_weights,
    weight_of,
    wrapped,
)
from surgeon.backends._cuda_gates import UNLIMITED, gated

PAIRS = 128
"""Largest number of row-expert pairs of :func:`few_rows`, which every program of its kernel reads."""

_PROGRAMS = 256
"""Programs that keep the memory of a large GPU busy, two for each of its about 130 multiprocessors; over codes half more."""

@triton.jit
def _few_rows_kernel(
    x, index, weight, scale, zero, bias, out, pairs, rows_out, width, row_units, row_step, group_step, groups, scale_row,
    scale_group,
    DIVISOR: tl.constexpr, PAIRED: tl.constexpr, EXPERTS: tl.constexpr, BITS: tl.constexpr, UNIT: tl.constexpr,
    GROUP: tl.constexpr, ZERO: tl.constexpr, PARTS: tl.constexpr, ALL: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, FOURS: tl.constexpr,
    GATED: tl.constexpr, BIASED: tl.constexpr, BASE: tl.constexpr, ALPHA: tl.constexpr, GATE_MAX: tl.constexpr,
    CAP: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr, UP_LIMIT: tl.constexpr, OFFSET: tl.constexpr,
    NONE: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N rows of the matrix of one expert times the rows of x that it has, over one part of the columns.

    The matrix is the left factor, as tensor cores want the larger one: its codes go from memory to their registers.  With
    GATED half of the rows are of its first half and the others as far into its second one, and their gate is written.
    """
    within = tl.arange(0, BLOCK_N)
    if GATED:
        half: tl.constexpr = BLOCK_N // 2
        columns = tl.program_id(0) * half + within % half
        inside = columns < rows_out // 2
        lines = tl.where(inside, within // half * (rows_out // 2) + columns, 0)
    else:
        columns = tl.program_id(0) * BLOCK_N + within
        inside = columns < rows_out
    expert = tl.program_id(1).to(tl.int64)
    part = tl.program_id(2)
    dtype: tl.constexpr = x.dtype.element_ty
    every = tl.arange(0, ALL)
    if PAIRED:
        chosen = tl.load(index + every, mask=every < pairs, other=-1)
        if tl.num_programs(1) < EXPERTS:  # fewer pairs than experts: one program for each pair, the first of its expert
            own = tl.program_id(1)
            expert = tl.sum(tl.where(every == own, chosen, 0), 0)
            mine = (chosen == expert) & (tl.min(tl.where(chosen == expert, every, ALL), 0) == own)
            mine = mine & (expert >= 0) & (expert < EXPERTS)
        else:
            mine = chosen == expert
    else:
        mine = every < pairs
    count = tl.sum(mine.to(tl.int32))
    place = tl.cumsum(mine.to(tl.int32), 0) - 1
    steps = tl.cdiv(tl.cdiv(width, BLOCK_K), PARTS)
    start = part * steps
    stop = tl.minimum(tl.cdiv(width, BLOCK_K), start + steps)
    unit = tl.arange(0, BLOCK_K // UNIT)
    if GATED:  # a tile of codes holds BLOCK_N rows
        line = expert * rows_out + lines // BLOCK_N * BLOCK_N
        matrix = weight + (line * row_units + lines % BLOCK_N * row_step)[:, None] + unit[None, :]
        place_of_scale = line * groups + lines % BLOCK_N * scale_row
    else:
        line = expert * rows_out + tl.program_id(0) * BLOCK_N
        matrix = weight + line * row_units + within[:, None] * row_step + unit[None, :]
        place_of_scale = line * groups + within * scale_row
    scales, zeros = scale + place_of_scale, zero + place_of_scale
    for first in range(0, count, BLOCK_M):
        slot = first + tl.arange(0, BLOCK_M)
        pair = tl.sum(tl.where(mine[None, :] & (place[None, :] == slot[:, None]), every[None, :], 0), 1)
        valid = slot < count
        row = x + (pair // DIVISOR)[None, :] * width + unit[:, None]
        total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
        for step in range(start, stop):
            at = row + step * BLOCK_K
            if BITS == 0 and EVEN:
                left = tl.load(matrix + step * BLOCK_K)
                total = tl.dot(left, tl.load(at, mask=valid[None, :], other=0.0), total, input_precision=PRECISION)
            elif BITS == 0:
                depth = step * BLOCK_K + unit < width
                left = tl.load(matrix + step * BLOCK_K, mask=inside[:, None] & depth[None, :], other=0.0)
                right = tl.load(at, mask=valid[None, :] & depth[:, None], other=0.0)
                total = tl.dot(left, right, total, input_precision=PRECISION)
            else:
                group = step // (GROUP // BLOCK_K)
                codes = matrix + group * group_step + step % (GROUP // BLOCK_K) * (BLOCK_K // UNIT)
                if EVEN:
                    packed = tl.load(codes)
                    size = tl.load(scales + group * scale_group).to(tl.float32)
                else:
                    packed = tl.load(codes, mask=inside[:, None], other=0)
                    size = tl.load(scales + group * scale_group, mask=inside, other=0.0).to(tl.float32)
                if ZERO:
                    middle = tl.load(zeros + group * scale_group, mask=inside, other=0).to(tl.float32)
                else:
                    middle = tl.full((BLOCK_N,), 2.0 ** (BITS - 1), tl.float32)
                product = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
                if FOURS:
                    a, b, c, d = four_codes(packed, middle, ZERO, dtype)
                    product = tl.dot(a, tl.load(at, mask=valid[None, :], other=0.0), product)
                    product = tl.dot(b, tl.load(at + BLOCK_K // UNIT, mask=valid[None, :], other=0.0), product)
                    product = tl.dot(c, tl.load(at + 2 * (BLOCK_K // UNIT), mask=valid[None, :], other=0.0), product)
                    product = tl.dot(d, tl.load(at + 3 * (BLOCK_K // UNIT), mask=valid[None, :], other=0.0), product)
                for j in tl.static_range(0 if FOURS else UNIT):
                    left = code_of(packed, middle, j, BITS, dtype)
                    right = tl.load(at + j * (BLOCK_K // UNIT), mask=valid[None, :], other=0.0)
                    product = tl.dot(left, right, product, input_precision=PRECISION)
                total += product * size[:, None]
        if GATED:
            if BIASED:
                added = tl.load(bias + expert * rows_out + lines, mask=inside, other=0.0)
                total += added.to(tl.float32)[:, None]
            g, u = tl.split(tl.permute(tl.reshape(total, (2, half, BLOCK_M)), (1, 2, 0)))
            hidden = gated(g, u, BASE, ALPHA, GATE_MAX, CAP, SCALE, SHIFT, UP_LIMIT, OFFSET, NONE)
            column = tl.program_id(0) * half + tl.arange(0, half)
            target = out + pair.to(tl.int64)[None, :] * (rows_out // 2) + column[:, None]
            tl.store(target, hidden.to(out.dtype.element_ty), mask=valid[None, :] & (column < rows_out // 2)[:, None])
        else:
            target = out + (part.to(tl.int64) * pairs + pair.to(tl.int64)[None, :]) * rows_out + columns[:, None]
            tl.store(target, total, mask=valid[None, :] & inside[:, None])


@triton_op("surgeon::few_rows", mutates_args={})
def few_rows(
    x: Tensor,
    index: Tensor | None,
    weight: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    bits: int,
    group: int,
    divisor: int,
    active: int,
) -> Tensor:
    """Product of each row with the matrix of its expert, in parts that sum to it.

    Codes may lie in tiles of :data:`TILE` rows (``_aot_tiles``), in the order in which tensor cores want them: a program then
    reads memory from one end to the other, and x as it is.

    Args:
        x: [R, K].
        index: [R divisor] expert of each pair, at most :data:`PAIRS`; None for one matrix and S = R.
        weight: [E, N, K] of the type of x; packed codes [E, N, K / group, group bits / 8]; or tiles
            [E, N / TILE, K / group, TILE, group bits / 8] of them, of 4 bits also as int16, four codes each.
        scale: [E, N, K / group] or [E, N / TILE, K / group, TILE] of codes; None with ``bits`` 0.
        zero: zero points of codes, shaped as the scale, or None for 2^(bits - 1).
        bits: 0 (no codes), 2, 4 or 8.
        group: codes per scale, a multiple of 16 per byte's codes.
        divisor: pair s belongs to row s // divisor.
        active: how many experts are expected to have rows: what sizes the parts.

    Returns:
        [P, S, N] float32; rows of experts outside 0 .. E-1 are undefined.
    """
    rows_out = _rows_of(weight)
    parts = parts_of(rows_out, int(x.shape[1]), int(weight.shape[0]), active, bits, group, x.element_size())
    out = x.new_empty((parts, x.shape[0] * divisor, rows_out), dtype=torch.float32)
    _launch(x, index, weight, scale, zero, None, bits, group, divisor, parts, out, None)
    return out


@triton_op("surgeon::few_rows_gated", mutates_args={})
def few_rows_gated(
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group: int,
    divisor: int,
    base: int,
    constants: list[float],
) -> Tensor:
    """The hidden state of gated networks: what :func:`few_rows` gives, in one part, and what the gate makes of its halves.

    Args:
        x: as there.
        index: as there.
        weight: as there, rows [gate | up].
        scale: as there.
        zero: as there.
        bias: [E, N] or None.
        bits: as there.
        group: as there.
        divisor: as there.
        base: from ``_cuda_gates.gate_of``.
        constants: likewise.

    Returns:
        [S, I] of the type of x, rounded once; rows of experts outside 0 .. E-1 are undefined.
    """
    out = x.new_empty((x.shape[0] * divisor, _rows_of(weight) // 2))
    _launch(x, index, weight, scale, zero, bias, bits, group, divisor, 1, out, (int(base), *(float(c) for c in constants)))
    return out


def parts_of(rows_out: int, width: int, experts: int, active: int, bits: int, group: int, bytes_of: int) -> int:
    """Parts of the columns that :func:`few_rows` takes at a time: as few as keep the memory busy.

    Args:
        rows_out: N.
        width: K.
        experts: E.
        active: how many experts are expected to have rows.
        bits: as there.
        group: as there.
        bytes_of: bytes of a number of x.
    """
    wanted = _PROGRAMS if bits == 0 else 3 * _PROGRAMS // 2
    blocks, parts = -(-rows_out // TILE) * min(active, experts), 1
    while parts < 8 and blocks * parts < wanted and width >= 4 * parts * _block_k(bits, group, bytes_of):
        parts *= 2
    return parts


def _block_k(bits: int, group: int, bytes_of: int) -> int:
    return 256 // bytes_of if bits == 0 else columns_at_once(group)


def _rows_of(weight: Tensor) -> int:
    """N of matrices or tiles of codes."""
    return int(weight.shape[1]) * (TILE if weight.dim() == 5 else 1)


def _launch(
    x: Tensor, index: Tensor | None, weight: Tensor, scale: Tensor | None, zero: Tensor | None, bias: Tensor | None, bits: int,
    group: int, divisor: int, parts: int, out: Tensor, gate: tuple[Any, ...] | None,
) -> None:  # fmt: skip
    tiled, rows_out = weight.dim() == 5, _rows_of(weight)
    experts, width = int(weight.shape[0]), int(x.shape[1])
    pairs = x.shape[0] * divisor
    unit = 1 if bits == 0 else 8 * weight.element_size() // bits
    block_k = _block_k(bits, group, x.element_size())
    if unit > 1 and not tiled:
        x = by_position(x, unit, block_k)
    groups, units = (1, width) if bits == 0 else (width // group, width // unit)
    row_step, group_step, scale_row, scale_group = units, group // unit, groups, 1
    if tiled:
        row_step, group_step, scale_row, scale_group = group // unit, TILE * (group // unit), 1, TILE
    halves = x.element_size() == 2
    base, alpha, gate_max, cap, factor, shift, up_limit, offset = gate or (0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0)
    columns, block_n = (rows_out, TILE) if gate is None else (rows_out // 2, TILE // 2)
    # programs of experts without rows end at once, and are not felt among eight; of a hundred experts most would be such
    matrices = experts if index is None else torch.sym_min(experts, pairs)  # type: ignore[no-untyped-call]
    wrapped(_few_rows_kernel)[(-(-columns // block_n), matrices, parts)](
        x, weight if index is None else index, weight, weight if scale is None else scale, weight if zero is None else zero,
        weight if bias is None else bias, out, pairs, rows_out, width, units, row_step, group_step, groups, scale_row,
        scale_group,
        DIVISOR=divisor, PAIRED=index is not None, EXPERTS=experts, BITS=bits, UNIT=unit, GROUP=max(group, 1),
        ZERO=zero is not None, PARTS=parts, ALL=PAIRS, BLOCK_M=8 if bits and index is not None and halves else 16,
        BLOCK_N=TILE, BLOCK_K=block_k, EVEN=columns % block_n == 0 and width % block_k == 0, PRECISION="ieee",
        FOURS=unit == 4 and bits == 4 and halves and compiles(), GATED=gate is not None, BIASED=bias is not None, BASE=base,
        ALPHA=alpha, GATE_MAX=gate_max, CAP=cap, SCALE=factor, SHIFT=shift, UP_LIMIT=up_limit, OFFSET=offset, NONE=UNLIMITED,
        num_warps=4, num_stages=4,
    )  # fmt: skip


@triton.jit
def _unpack_kernel(
    weight, scale, zero, out, groups, rows_out, BITS: tl.constexpr, UNIT: tl.constexpr, GROUP: tl.constexpr,
    ZERO: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, FOURS: tl.constexpr,
):  # fmt: skip
    """One program: one group of columns of one tile of rows."""
    tile, group = (tl.program_id(0) // groups).to(tl.int64), tl.program_id(0) % groups
    within, unit = tl.arange(0, ROWS), tl.arange(0, GROUP // UNIT)
    dtype: tl.constexpr = out.dtype.element_ty
    at = (tile * groups + group) * ROWS + within
    packed = tl.load(weight + at[:, None] * (GROUP // UNIT) + unit[None, :])
    size = tl.load(scale + at)
    if ZERO:
        middle = tl.load(zero + at).to(tl.float32)
    else:
        middle = tl.full((ROWS,), 2.0 ** (BITS - 1), tl.float32)
    pieces: tl.constexpr = BLOCK_K // UNIT
    first = unit // pieces * BLOCK_K + unit % pieces
    line = out + (((tile * ROWS + within) * groups + group) * GROUP)[:, None] + first[None, :]
    if FOURS:
        a, b, c, d = four_weights(packed, size, middle, ZERO, dtype)
        tl.store(line, a)
        tl.store(line + pieces, b)
        tl.store(line + 2 * pieces, c)
        tl.store(line + 3 * pieces, d)
    for j in tl.static_range(0 if FOURS else UNIT):
        tl.store(line + j * pieces, weight_of(packed, size, middle, j, BITS, dtype))


@triton_op("surgeon::unpack_tiles", mutates_args={})
def unpack_tiles(weight: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group: int) -> Tensor:
    """Matrices that tiles of codes stand for.

    Args:
        weight: as in :func:`few_rows`, tiles.
        scale: as there.
        zero: as there.
        bits: 2, 4 or 8.
        group: codes per scale.

    Returns:
        [E, N, K] of the type of the scale.
    """
    experts, tiles, groups, rows = (int(size) for size in scale.shape)
    unit = 8 * weight.element_size() // bits
    out = scale.new_empty((experts, tiles * rows, groups * group))
    wrapped(_unpack_kernel)[(experts * tiles * groups,)](
        weight, scale, weight if zero is None else zero, out, groups, tiles * rows, BITS=bits, UNIT=unit, GROUP=group,
        ZERO=zero is not None, ROWS=rows, BLOCK_K=columns_at_once(group),
        FOURS=unit == 4 and bits == 4 and scale.element_size() == 2 and compiles(),
        num_warps=4,
    )  # fmt: skip
    return out


def takes_codes(bits: int, group: int, width: int) -> bool:
    """Whether :func:`few_rows` reads such codes: whole groups, and at least 16 codes of each position in a byte."""
    step = columns_at_once(group)
    return bits in (2, 4, 8) and width % group == 0 and group % step == 0 and step & (step - 1) == 0 and step * bits >= 128
