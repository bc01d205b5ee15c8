"""A Triton kernel of packages for CUDA: products of more than a few rows with low-bit matrices, one or one for each expert.

Unpacking the matrices first would write and read each of them once more, in four times the bytes of 4-bit codes.  Here every
program unpacks what it multiplies in registers, on the way to the tensor cores, which take the left factor from there: so the
matrix is that, and x comes from shared memory.

Letters in shapes: S rows, E experts, N output width, K input width, I = N / 2 inner width of a gated network.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from surgeon.backends._cuda_codes import TILE, columns_at_once, compiles, four_weights, weight_of, wrapped
from surgeon.backends._cuda_gates import UNLIMITED, gated


class Form(NamedTuple):
    """Rows of the matrix and rows of x that one program takes, and how it is compiled."""

    block_n: int
    block_m: int
    warps: int
    stages: int

    @classmethod
    def of(cls, device: torch.device, many: bool) -> Form:
        """What was fastest on an H200 for about 64 rows of each matrix, and for 512; the first is small enough for any card."""
        if not has_large_blocks(device):
            return cls(128, 64, 8, 2)
        return cls(128, 256, 8, 3) if many else cls(128, 64, 8, 4)


def has_large_blocks(device: torch.device) -> bool:
    """Whether a multiprocessor has room for a large block and multiplies from registers: those of Hopper."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


@triton.jit
def _block(
    x, weight, scale, zero, bias, out, expert, first, last, at_line, count, rows_out, width, groups,
    BITS: tl.constexpr, UNIT: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, TILE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr, FOURS: tl.constexpr, GATED: tl.constexpr,
    BIASED: tl.constexpr, BASE: tl.constexpr, ALPHA: tl.constexpr, GATE_MAX: tl.constexpr, CAP: tl.constexpr,
    SCALE: tl.constexpr, SHIFT: tl.constexpr, UP_LIMIT: tl.constexpr, OFFSET: tl.constexpr, NONE: tl.constexpr,
):  # fmt: skip
    """Block ``at_line`` of BLOCK_N rows of the matrix of one expert times BLOCK_M rows of x from ``first`` on.

    With GATED they are rows of its first half and those as far into its second one, in turns of eight: a thread holds both.
    """
    within = tl.arange(0, BLOCK_N)
    if GATED:
        half: tl.constexpr = BLOCK_N // 2
        column = at_line * half + within // 16 * 8 + within % 8
        inside = column < rows_out // 2
        line = column + within // 8 % 2 * (rows_out // 2)
    else:
        line = at_line * BLOCK_N + within
        inside = line < rows_out
    if not EVEN:
        line = tl.where(inside, line, 0)
    row = first + tl.arange(0, BLOCK_M)
    unit = tl.arange(0, BLOCK_K // UNIT)
    offset = expert.to(tl.int64) * rows_out
    tile = (offset + line // TILE * TILE) * groups + line % TILE
    codes = weight + tile[:, None] * (GROUP // UNIT) + unit[None, :]
    depth: tl.constexpr = BLOCK_K if UNIT == 4 else BLOCK_K // UNIT
    at = x + tl.minimum(row, count - 1).to(tl.int64)[None, :] * width + tl.arange(0, depth)[:, None]
    dtype: tl.constexpr = x.dtype.element_ty
    total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for step in range(width // BLOCK_K):
        group = step // (GROUP // BLOCK_K)
        packed = tl.load(codes + group * (TILE * (GROUP // UNIT)) + step % (GROUP // BLOCK_K) * (BLOCK_K // UNIT))
        size = tl.load(scale + tile + group * TILE)
        if ZERO:
            middle = tl.load(zero + tile + group * TILE).to(tl.float32)
        else:
            middle = tl.full((BLOCK_N,), 2.0 ** (BITS - 1), tl.float32)
        right = at + step * BLOCK_K
        if UNIT == 4:  # one product of all columns; what is joined stays in the registers in which it is
            if FOURS:
                a, b, c, d = four_weights(packed, size, middle, ZERO, dtype)
            else:
                a, b = weight_of(packed, size, middle, 0, BITS, dtype), weight_of(packed, size, middle, 1, BITS, dtype)
                c, d = weight_of(packed, size, middle, 2, BITS, dtype), weight_of(packed, size, middle, 3, BITS, dtype)
            joined = tl.join(tl.join(a, c), tl.join(b, d))
            left = tl.reshape(tl.permute(joined, (0, 2, 3, 1)), (BLOCK_N, BLOCK_K))
            total = tl.dot(left, tl.load(right), total)
        else:
            for j in tl.static_range(UNIT):
                left = weight_of(packed, size, middle, j, BITS, dtype)
                total = tl.dot(left, tl.load(right + j * (BLOCK_K // UNIT)), total)
    if BIASED:
        total += tl.load(bias + offset + line, mask=inside, other=0.0).to(tl.float32)[:, None]
    if GATED:
        g, u = tl.split(tl.permute(tl.reshape(total, (BLOCK_N // 16, 2, 8, BLOCK_M)), (0, 2, 3, 1)))
        total = tl.reshape(gated(g, u, BASE, ALPHA, GATE_MAX, CAP, SCALE, SHIFT, UP_LIMIT, OFFSET, NONE), (half, BLOCK_M))
        place = at_line * half + tl.arange(0, half)
        inner = rows_out // 2
    else:
        place = at_line * BLOCK_N + within
        inner = rows_out
    target = out + row.to(tl.int64)[None, :] * inner + place[:, None]
    tl.store(target, total.to(out.dtype.element_ty), mask=(row < last)[None, :] & (place < inner)[:, None])


@triton.jit
def _many_rows_kernel(
    x, ends, weight, scale, zero, bias, out, count, rows_out, width, groups, blocks_n,
    EXPERTS: tl.constexpr, SLOTS: tl.constexpr, BITS: tl.constexpr, UNIT: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr,
    TILE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
    FOURS: tl.constexpr, GATED: tl.constexpr, BIASED: tl.constexpr, BASE: tl.constexpr, ALPHA: tl.constexpr,
    GATE_MAX: tl.constexpr, CAP: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr, UP_LIMIT: tl.constexpr,
    OFFSET: tl.constexpr, NONE: tl.constexpr,
):  # fmt: skip
    """One program: one block of the product of one expert.

    Programs are dealt to the experts in their order, as many as each has blocks; those of one expert that read the same rows of
    its matrix follow each other.  An expert's last rows of x are seldom a whole block, and take half or a quarter of one if
    they fit.
    """
    slot = tl.arange(0, SLOTS)
    stop = tl.load(ends + slot, mask=slot < EXPERTS, other=0)
    start = tl.load(ends + slot - 1, mask=(slot > 0) & (slot < EXPERTS), other=0)
    blocks = tl.where(slot < EXPERTS, tl.cdiv(stop - start, BLOCK_M) * blocks_n, 0)
    behind = tl.cumsum(blocks, 0)
    expert = tl.sum((behind <= tl.program_id(0)).to(tl.int32))
    if expert < EXPERTS:
        mine = slot == expert
        first, last = tl.sum(tl.where(mine, start, 0)), tl.sum(tl.where(mine, stop, 0))
        place = tl.program_id(0) - tl.sum(tl.where(mine, behind - blocks, 0))
        blocks_m = tl.cdiv(last - first, BLOCK_M)
        first += place % blocks_m * BLOCK_M
        if last - first > BLOCK_M // 2:
            _block(
                x, weight, scale, zero, bias, out, expert, first, last, place // blocks_m, count, rows_out, width, groups,
                BITS, UNIT, GROUP, ZERO, TILE, BLOCK_M, BLOCK_N, BLOCK_K, EVEN, FOURS, GATED, BIASED, BASE, ALPHA, GATE_MAX,
                CAP, SCALE, SHIFT, UP_LIMIT, OFFSET, NONE,
            )  # fmt: skip
        elif last - first > BLOCK_M // 4:
            _block(
                x, weight, scale, zero, bias, out, expert, first, last, place // blocks_m, count, rows_out, width, groups,
                BITS, UNIT, GROUP, ZERO, TILE, BLOCK_M // 2, BLOCK_N, BLOCK_K, EVEN, FOURS, GATED, BIASED, BASE, ALPHA,
                GATE_MAX, CAP, SCALE, SHIFT, UP_LIMIT, OFFSET, NONE,
            )  # fmt: skip
        else:
            _block(
                x, weight, scale, zero, bias, out, expert, first, last, place // blocks_m, count, rows_out, width, groups,
                BITS, UNIT, GROUP, ZERO, TILE, BLOCK_M // 4, BLOCK_N, BLOCK_K, EVEN, FOURS, GATED, BIASED, BASE, ALPHA,
                GATE_MAX, CAP, SCALE, SHIFT, UP_LIMIT, OFFSET, NONE,
            )  # fmt: skip


@triton_op("surgeon::many_rows", mutates_args={})
def many_rows(
    x: Tensor,
    ends: Tensor | None,
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group: int,
    many: bool,
) -> Tensor:
    """Product of each row with the matrix of its expert, over codes in tiles.

    Args:
        x: [S, K], float16 or bfloat16, sorted by expert.
        ends: [E] int32, one behind the last row of each expert; None for one matrix.
        weight: tiles [E, N / TILE, K / group, TILE, group bits / 8] of codes (``_aot_tiles``), of 4 bits also as int16.
        scale: [E, N / TILE, K / group, TILE] of the type of x.
        zero: zero points of codes, shaped as the scale, or None for 2^(bits - 1).
        bias: [E, N] or None.
        bits: 2, 4 or 8.
        group: codes per scale, as ``_cuda_rows.takes_codes`` takes them.
        many: whether each matrix is expected to have more than about a hundred rows.

    Returns:
        [S, N] of the type of x; each weight is rounded to that type, sums are float32.  Rows behind the last end are undefined.
    """
    return _launch(x, ends, weight, scale, zero, bias, bits, group, many, None)


@triton_op("surgeon::many_rows_gated", mutates_args={})
def many_rows_gated(
    x: Tensor,
    ends: Tensor | None,
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group: int,
    many: bool,
    base: int,
    constants: list[float],
) -> Tensor:
    """The hidden state of gated networks: what a gate makes of the halves of :func:`many_rows`, before they are rounded.

    Args:
        x: as there.
        ends: as there.
        weight: as there, rows [gate | up].
        scale: as there.
        zero: as there.
        bias: as there.
        bits: as there.
        group: as there.
        many: as there.
        base: from ``_cuda_gates.gate_of``.
        constants: likewise.

    Returns:
        [S, I] of the type of x.
    """
    return _launch(x, ends, weight, scale, zero, bias, bits, group, many, (int(base), *(float(c) for c in constants)))


def _launch(
    x: Tensor, ends: Tensor | None, weight: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, bits: int,
    group: int, many: bool, gate: tuple[Any, ...] | None,
) -> Tensor:  # fmt: skip
    experts, tiles, groups, _ = (int(size) for size in scale.shape)
    count, width, rows_out = x.shape[0], int(x.shape[1]), tiles * TILE
    unit = 8 * weight.element_size() // bits
    form = Form.of(x.device, many)
    if ends is None:
        ends = torch.full((1,), 0, dtype=torch.int32, device=x.device) + count
    columns, block_n = (rows_out, form.block_n) if gate is None else (rows_out // 2, form.block_n // 2)
    out = x.new_empty((count, columns))
    blocks_n = -(-columns // block_n)
    base, alpha, gate_max, cap, factor, shift, up_limit, offset = gate or (0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0)
    wrapped(_many_rows_kernel)[((count // form.block_m + experts) * blocks_n,)](
        x, ends, weight, scale, weight if zero is None else zero, weight if bias is None else bias, out, count, rows_out, width,
        groups, blocks_n, EXPERTS=experts, SLOTS=triton.next_power_of_2(experts), BITS=bits, UNIT=unit, GROUP=group,
        ZERO=zero is not None, TILE=TILE, BLOCK_M=form.block_m, BLOCK_N=form.block_n, BLOCK_K=columns_at_once(group),
        EVEN=columns % block_n == 0, FOURS=unit == 4 and bits == 4 and compiles(), GATED=gate is not None,
        BIASED=bias is not None, BASE=base, ALPHA=alpha, GATE_MAX=gate_max, CAP=cap, SCALE=factor, SHIFT=shift,
        UP_LIMIT=up_limit, OFFSET=offset, NONE=UNLIMITED, num_warps=form.warps, num_stages=form.stages,
    )  # fmt: skip
    return out
