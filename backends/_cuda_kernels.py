"""Triton kernels of packages for CUDA: experts and low-bit linears for few rows, and attention with a cache.

They are compiled into the package (``torch.library.triton_op``); nothing of Triton or of ours is needed to run it.

Decoding one or a few tokens is bound by reading weights and caches once.  torch's grouped matrix multiplication is made for
many rows, and torch has no low-bit form of it; its fused attention with a mask wants keys and values repeated for every
query head, which reads the cache several times.

Letters in shapes: R rows, S = R times ``divisor`` row-expert pairs, E experts, N output width, K input width, P parts of a
sum; for attention B batch, H key and value heads, G query heads of each, Q queries, T keys, D head size, W value size.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

PAIRS = 128
"""Largest number of row-expert pairs of :func:`few_rows`, which every program of its kernel reads."""

TILE = 64
"""Rows of a matrix that one program takes: as many as a group of warps multiplies at a time."""

_PROGRAMS = 256
"""Programs that keep the memory of a large GPU busy, two for each of its about 130 multiprocessors; over codes half more."""

_PARTS = 16
"""Parts into which the keys are cut where the queries are few: a batch of 1 must fill the GPU too."""

_NOTHING = tl.constexpr(-1.0e30)
"""Largest score of no key at all; finite, so that differences of two such are numbers."""


_NIBBLES = (
    "{ .reg .b32 a, b, c, d, one, less; mov.b32 one, ONE; mov.b32 less, LESS; "
    "shr.u32 b, $4, 4; shr.u32 c, $4, 8; shr.u32 d, $4, 12; "
    "lop3.b32 a, $4, 0x000f000f, BASE, 0xea; lop3.b32 b, b, 0x000f000f, BASE, 0xea; "
    "lop3.b32 c, c, 0x000f000f, BASE, 0xea; lop3.b32 d, d, 0x000f000f, BASE, 0xea; "
    "fma.rn.TYPE $0, a, one, less; fma.rn.TYPE $1, b, one, less; "
    "fma.rn.TYPE $2, c, one, less; fma.rn.TYPE $3, d, one, less; "
    "}"
)
"""Two units of four codes to their first, second, ... codes less 8: each is put below the exponent of BASE, which makes it
BASE + code.  Both units stay in their halves of a register, where a matrix multiplication wants neighbours of a row."""


def _nibbles(name: str, base: str, one: str, less: str) -> tl.constexpr:
    return tl.constexpr(_NIBBLES.replace("TYPE", name).replace("BASE", base).replace("ONE", one).replace("LESS", less))


_NIBBLES_BFLOAT16 = _nibbles("bf16x2", "0x43004300", "0x3f803f80", "0xc308c308")  # 128, 1, -136
_NIBBLES_FLOAT16 = _nibbles("f16x2", "0x64006400", "0x3c003c00", "0xe408e408")  # 1024, 1, -1032


# -- rows through the matrices of their experts -----------------------------------------------------------------------


@triton.jit
def _code(packed, middle, j: tl.constexpr, BITS: tl.constexpr, dtype: tl.constexpr):
    """Code j of each unit less the middle of its row: [rows, units] of ``dtype``."""
    codes = (packed.to(tl.uint16) >> (BITS * j)) & (2**BITS - 1)
    if dtype == tl.bfloat16 and BITS < 8:  # the bits of 128 + code: no conversion from integers
        values = (codes | 0x4300).to(tl.bfloat16, bitcast=True) - (middle + 128.0).to(tl.bfloat16)[:, None]
    elif dtype == tl.float16:  # the bits of 1024 + code
        values = (codes | 0x6400).to(tl.float16, bitcast=True) - (middle + 1024.0).to(tl.float16)[:, None]
    else:
        values = (codes.to(tl.float32) - middle[:, None]).to(dtype)
    return values


@triton.jit
def _four_codes(packed, dtype: tl.constexpr):
    """The four codes of each unit less 8, two units an instruction: one by one their arithmetic takes longer than reading."""
    if dtype == tl.bfloat16:
        a, b, c, d = tl.inline_asm_elementwise(
            _NIBBLES_BFLOAT16, "=r,=r,=r,=r,r", [packed], (tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), True, 2
        )
    else:
        a, b, c, d = tl.inline_asm_elementwise(
            _NIBBLES_FLOAT16, "=r,=r,=r,=r,r", [packed], (tl.float16, tl.float16, tl.float16, tl.float16), True, 2
        )
    return a, b, c, d


@triton.jit
def _few_rows_kernel(
    x, index, weight, scale, zero, out, pairs, rows_out, width, row_units, row_step, group_step, groups, scale_row, scale_group,
    DIVISOR: tl.constexpr, PAIRED: tl.constexpr, BITS: tl.constexpr, UNIT: tl.constexpr, GROUP: tl.constexpr,
    ZERO: tl.constexpr, PARTS: tl.constexpr, ALL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, FOURS: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N rows of the matrix of one expert times the rows of x that it has, over one part of the columns.

    The matrix is the left factor, as tensor cores want the larger one: its codes go from memory to their registers.
    """
    within = tl.arange(0, BLOCK_N)
    columns = tl.program_id(0) * BLOCK_N + within
    expert = tl.program_id(1).to(tl.int64)
    part = tl.program_id(2)
    dtype: tl.constexpr = x.dtype.element_ty
    every = tl.arange(0, ALL)
    if PAIRED:
        mine = tl.load(index + every, mask=every < pairs, other=-1) == expert
    else:
        mine = every < pairs
    count = tl.sum(mine.to(tl.int32))
    place = tl.cumsum(mine.to(tl.int32), 0) - 1
    inside = columns < rows_out
    steps = tl.cdiv(tl.cdiv(width, BLOCK_K), PARTS)
    start = part * steps
    stop = tl.minimum(tl.cdiv(width, BLOCK_K), start + steps)
    line = expert * rows_out + tl.program_id(0) * BLOCK_N
    unit = tl.arange(0, BLOCK_K // UNIT)
    matrix = weight + line * row_units + within[:, None] * row_step + unit[None, :]
    scales, zeros = scale + line * groups + within * scale_row, zero + line * groups + within * scale_row
    for first in range(0, count, BLOCK_M):
        slot = first + tl.arange(0, BLOCK_M)
        pair = tl.sum(tl.where(mine[None, :] & (place[None, :] == slot[:, None]), every[None, :], 0), 1)
        valid = slot < count
        row = x + (pair // DIVISOR)[None, :] * width + unit[:, None]
        total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
        for step in range(start, stop):
            at = row + step * (BLOCK_K // UNIT)
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
                    a, b, c, d = _four_codes(packed, dtype)
                    if ZERO:  # small whole numbers: exact
                        further = (middle - 8.0).to(dtype)[:, None]
                        a, b, c, d = a - further, b - further, c - further, d - further
                    product = tl.dot(a, tl.load(at, mask=valid[None, :], other=0.0), product)
                    product = tl.dot(b, tl.load(at + row_units, mask=valid[None, :], other=0.0), product)
                    product = tl.dot(c, tl.load(at + 2 * row_units, mask=valid[None, :], other=0.0), product)
                    product = tl.dot(d, tl.load(at + 3 * row_units, mask=valid[None, :], other=0.0), product)
                for j in tl.static_range(0 if FOURS else UNIT):
                    left = _code(packed, middle, j, BITS, dtype)
                    right = tl.load(at + j * row_units, mask=valid[None, :], other=0.0)
                    product = tl.dot(left, right, product, input_precision=PRECISION)
                total += product * size[:, None]
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

    Codes may lie in tiles of :data:`TILE` rows (``_aot_tiles``): a program then reads memory from one end to the other.

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
    tiled = weight.dim() == 5
    experts = int(weight.shape[0])
    rows_out = int(weight.shape[1]) * (TILE if tiled else 1)
    width = int(x.shape[1])
    pairs = x.shape[0] * divisor
    unit = 1 if bits == 0 else 8 * weight.element_size() // bits
    block_k = 256 // x.element_size() if bits == 0 else min(group, 128)
    wanted = _PROGRAMS if bits == 0 else 3 * _PROGRAMS // 2
    blocks, parts = -(-rows_out // TILE) * min(active, experts), 1
    while parts < 8 and blocks * parts < wanted and width >= 4 * parts * block_k:
        parts *= 2
    out = x.new_empty((parts, pairs, rows_out), dtype=torch.float32)
    if unit > 1:  # columns in the order in which a unit holds them: all first ones, all second ones, ...
        x = x.reshape(-1, width // unit, unit).transpose(1, 2).contiguous()
    groups, units = (1, width) if bits == 0 else (width // group, width // unit)
    row_step, group_step, scale_row, scale_group = units, group // unit, groups, 1
    if tiled:
        row_step, group_step, scale_row, scale_group = group // unit, TILE * (group // unit), 1, TILE
    halves = x.element_size() == 2
    wrap_triton(_few_rows_kernel)[(-(-rows_out // TILE), experts, parts)](
        x, weight if index is None else index, weight, weight if scale is None else scale, weight if zero is None else zero,
        out, pairs, rows_out, width, units, row_step, group_step, groups, scale_row, scale_group,
        DIVISOR=divisor, PAIRED=index is not None, BITS=bits, UNIT=unit, GROUP=max(group, 1), ZERO=zero is not None,
        PARTS=parts, ALL=PAIRS, BLOCK_M=8 if bits and index is not None and halves else 16, BLOCK_N=TILE, BLOCK_K=block_k,
        EVEN=rows_out % TILE == 0 and width % block_k == 0, PRECISION="ieee",
        FOURS=unit == 4 and bits == 4 and halves and compiles(), num_warps=4, num_stages=4,
    )  # fmt: skip
    return out


@triton.jit
def _unpack_kernel(
    weight, scale, zero, out, groups, rows_out, BITS: tl.constexpr, UNIT: tl.constexpr, GROUP: tl.constexpr,
    ZERO: tl.constexpr, ROWS: tl.constexpr, FOURS: tl.constexpr,
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
    line = out + ((tile * ROWS + within) * groups + group)[:, None] * GROUP
    if FOURS:
        a, b, c, d = _four_codes(packed, dtype)
        if ZERO:
            further = (middle - 8.0).to(dtype)[:, None]
            a, b, c, d = a - further, b - further, c - further, d - further
        values = tl.join(tl.join(a, c), tl.join(b, d)).reshape(ROWS, GROUP)
        tl.store(line + tl.arange(0, GROUP)[None, :], values * size[:, None])
    for j in tl.static_range(0 if FOURS else UNIT):
        tl.store(line + unit[None, :] * UNIT + j, _code(packed, middle, j, BITS, dtype) * size[:, None])


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
    wrap_triton(_unpack_kernel)[(experts * tiles * groups,)](
        weight, scale, weight if zero is None else zero, out, groups, tiles * rows, BITS=bits, UNIT=unit, GROUP=group,
        ZERO=zero is not None, ROWS=rows, FOURS=unit == 4 and bits == 4 and scale.element_size() == 2 and compiles(),
        num_warps=4,
    )  # fmt: skip
    return out


def compiles() -> bool:
    """Whether kernels are compiled; Triton's interpreter has no assembler."""
    return isinstance(_few_rows_kernel, triton.JITFunction)


def takes_codes(bits: int, group: int, width: int) -> bool:
    """Whether :func:`few_rows` reads such codes: whole groups, and at least 16 codes of each position in a byte."""
    step = min(group, 128)
    return bits in (2, 4, 8) and width % group == 0 and group % step == 0 and step & (step - 1) == 0 and step * bits >= 128


# -- attention --------------------------------------------------------------------------------------------------------


@triton.jit
def _keys_and_values(
    asked, peak, total, mixed, k, v, k_out, v_out, mask, low, high, start, stop, k_t, v_t, m_t, inside, wide,
    D: tl.constexpr, W: tl.constexpr, COPY: tl.constexpr, SCALE: tl.constexpr, SEEN: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Take keys start .. stop into the softmax so far, and with COPY write them and their values out.

    SEEN: 0 all of them, 1 those from low to high of each row, 2 what a boolean mask says, 3 what is added to the scores.
    """
    for t in range(start, stop, BLOCK_T):
        place = t + tl.arange(0, BLOCK_T)
        if SEEN == 0:  # whole blocks: nothing to leave out
            key = tl.load(k + place[None, :] * k_t, mask=inside[:, None], other=0.0)
            value = tl.load(v + place[:, None] * v_t, mask=wide[None, :], other=0.0)
        else:
            key = tl.load(k + place[None, :] * k_t, mask=inside[:, None] & (place < stop)[None, :], other=0.0)
            value = tl.load(v + place[:, None] * v_t, mask=wide[None, :] & (place < stop)[:, None], other=0.0)
        if COPY:
            tl.store(k_out + place[None, :] * D, key, mask=inside[:, None] & (place < stop)[None, :])
            tl.store(v_out + place[:, None] * W, value, mask=wide[None, :] & (place < stop)[:, None])
        score = tl.dot(asked, key) * (SCALE * 1.4426950408889634)
        if SEEN == 1:
            seen = (place[None, :] >= low[:, None]) & (place[None, :] < high[:, None]) & (place < stop)[None, :]
            score = tl.where(seen, score, float("-inf"))
        if SEEN == 2:
            seen = tl.load(mask + place[None, :] * m_t, mask=(place < stop)[None, :], other=0)
            score = tl.where(seen != 0, score, float("-inf"))
        if SEEN == 3:
            added = tl.load(mask + place[None, :] * m_t, mask=(place < stop)[None, :], other=float("-inf"))
            score += added.to(tl.float32) * 1.4426950408889634
        above = tl.maximum(peak, tl.max(score, 1))
        share = tl.exp2(score - above[:, None])
        fade = tl.exp2(peak - above)
        total = total * fade + tl.sum(share, 1)
        mixed = mixed * fade[:, None] + tl.dot(share.to(value.dtype), value)
        peak = above
    return peak, total, mixed


@triton.jit
def _attention_kernel(
    q, k, v, k_new, v_new, mask, first, last, solid, out, peak_out, total_out, k_out, v_out, queries, keys, past, heads,
    q_b, q_h, q_q, k_b, k_h, k_t, v_b, v_h, v_t, kn_b, kn_h, kn_t, vn_b, vn_h, vn_t, m_b, m_h, m_q, m_t,
    G: tl.constexpr, D: tl.constexpr, W: tl.constexpr, D_PAD: tl.constexpr, W_PAD: tl.constexpr,
    SCALE: tl.constexpr, MASK: tl.constexpr, BOUNDS: tl.constexpr, PARTS: tl.constexpr, WHOLE: tl.constexpr,
    APPEND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M of the Q G rows of one key head, over one part of the keys; softmax in base 2.

    With APPEND the first ``past`` keys are in ``k`` and the others in ``k_new`` (which the last part takes), and all are
    written to ``k_out`` (values likewise).
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    part = tl.program_id(2)
    valid = rows < queries * G
    query, member = tl.where(valid, rows // G, 0), rows % G  # rows behind the last repeat the first, and are not stored
    size, value_size = tl.arange(0, D_PAD), tl.arange(0, W_PAD)
    inside, wide = size < D, value_size < W
    at = batch * q_b + (head * G + member)[:, None] * q_h + query[:, None] * q_q + size[None, :]
    asked = tl.load(q + at, mask=inside[None, :], other=0.0)
    k += batch * k_b + head * k_h + size[:, None]
    v += batch * v_b + head * v_h + value_size[None, :]
    mask += batch * m_b + (head * G + member)[:, None] * m_h + query[:, None] * m_q
    peak = tl.full((BLOCK_M,), _NOTHING, tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    mixed = tl.zeros((BLOCK_M, W_PAD), dtype=tl.float32)
    length = tl.cdiv(tl.cdiv(past, BLOCK_T), PARTS) * BLOCK_T
    start, stop = part * length, tl.minimum(past, (part + 1) * length)
    if APPEND:
        k_out += (batch * heads + head) * keys * D + size[:, None]
        v_out += (batch * heads + head) * keys * W + value_size[None, :]
    low, high = rows, rows
    if BOUNDS:  # no query of this program sees a key outside
        low = tl.load(first + batch * queries + query)
        high = tl.load(last + batch * queries + query)
        start, stop = tl.min(low) // BLOCK_T * BLOCK_T, tl.max(high)
        if tl.min(tl.load(solid + batch * queries + query).to(tl.int32)) == 1:  # each sees all that lies between
            middle = tl.minimum(tl.cdiv(tl.max(low), BLOCK_T) * BLOCK_T, stop)
            end = tl.maximum(tl.min(high) // BLOCK_T * BLOCK_T, middle)
            peak, total, mixed = _keys_and_values(
                asked, peak, total, mixed, k, v, k, v, mask, low, high, start, middle, k_t, v_t, m_t, inside, wide,
                D, W, False, SCALE, 1, BLOCK_T,
            )
            peak, total, mixed = _keys_and_values(
                asked, peak, total, mixed, k, v, k, v, mask, low, high, middle, end, k_t, v_t, m_t, inside, wide,
                D, W, False, SCALE, 0, BLOCK_T,
            )
            peak, total, mixed = _keys_and_values(
                asked, peak, total, mixed, k, v, k, v, mask, low, high, end, stop, k_t, v_t, m_t, inside, wide,
                D, W, False, SCALE, 1, BLOCK_T,
            )
            stop = start  # nothing is left for the general form
    if MASK == 0:
        low, high = tl.zeros((BLOCK_M,), dtype=tl.int32), tl.zeros((BLOCK_M,), dtype=tl.int32) + keys
    peak, total, mixed = _keys_and_values(
        asked, peak, total, mixed, k, v, k_out, v_out, mask, low, high, start, stop, k_t, v_t, m_t, inside, wide,
        D, W, APPEND, SCALE, MASK + 1, BLOCK_T,
    )  # fmt: skip
    if APPEND:
        if part == PARTS - 1:
            k_more = k_new + batch * kn_b + head * kn_h + size[:, None] - past * kn_t
            v_more = v_new + batch * vn_b + head * vn_h + value_size[None, :] - past * vn_t
            peak, total, mixed = _keys_and_values(
                asked, peak, total, mixed, k_more, v_more, k_out, v_out, mask, low, high, past, keys, kn_t, vn_t, m_t, inside,
                wide, D, W, True, SCALE, MASK + 1, BLOCK_T,
            )  # fmt: skip
    lines = valid[:, None] & wide[None, :]
    if WHOLE:  # [B, Q, H G, W]
        mixed = mixed / tl.where(total == 0.0, 1.0, total)[:, None]
        line = (batch * queries + query) * (heads * G) + head * G + member
        tl.store(out + line[:, None] * W + value_size[None, :], mixed.to(out.dtype.element_ty), mask=lines)
    else:  # [P, B, Q, H G, W]
        line = ((part * (tl.num_programs(1) // heads) + batch) * queries + query) * (heads * G) + head * G + member
        tl.store(out + line[:, None] * W + value_size[None, :], mixed, mask=lines)
        tl.store(peak_out + line, peak, mask=valid)
        tl.store(total_out + line, total, mask=valid)


@triton_op("surgeon::attend_in_parts", mutates_args={})
def attend_in_parts(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of few queries: the sums over each part of the keys, for :func:`joined`.

    Args:
        q: [B, H G, Q, D], Q G of at most 16.
        k: [B, H, T, D].
        v: [B, H, T, W].
        mask: None, or broadcasts to [B, H G, Q, T]: True where a key is seen, or a float that is added.
        scale: factor of the scores.

    Returns:
        Weighted sums of values [P, B, Q, H G, W], largest scores in base 2 and sums of weights [P, B, Q, H G], float32.
    """
    mixed, peak, total = _sums(q, v)
    _launch(q, k, v, mask, None, None, None, mixed, peak, total, scale, _PARTS, block_m=16, block_t=32, warps=4, stages=4)
    return mixed, peak, total


@triton_op("surgeon::attend_appending", mutates_args={})
def attend_appending(
    q: Tensor, k: Tensor, v: Tensor, k_new: Tensor, v_new: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """:func:`attend_in_parts` over cached keys and values and new ones behind them, which it also writes behind the others.

    A cache that grows is copied at every step: here where its keys and values are read anyway.

    Args:
        q: as in :func:`attend_in_parts`.
        k: [B, H, T, D], cached.
        v: [B, H, T, W].
        k_new: [B, H, N, D], N of at least 1.
        v_new: [B, H, N, W].
        mask: as there, over T + N keys.
        scale: as there.

    Returns:
        The three of :func:`attend_in_parts`; keys [B, H, T + N, D] and values [B, H, T + N, W].
    """
    mixed, peak, total = _sums(q, v)
    keys = k.shape[2] + k_new.shape[2]
    k_out, v_out = (old.new_empty((old.shape[0], old.shape[1], keys, old.shape[3])) for old in (k, v))
    _launch(
        q, k, v, mask, None, None, None, mixed, peak, total, scale, _PARTS, block_m=16, block_t=32, warps=4, stages=4,
        appended=(k_new, v_new, k_out, v_out),
    )  # fmt: skip
    return mixed, peak, total, k_out, v_out


def _sums(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the sums of each part."""
    shape = (_PARTS, q.shape[0], q.shape[2], q.shape[1])
    mixed = q.new_empty((*shape, v.shape[3]), dtype=torch.float32)
    return mixed, q.new_empty(shape, dtype=torch.float32), q.new_empty(shape, dtype=torch.float32)


@triton_op("surgeon::attend_whole", mutates_args={})
def attend_whole(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, first: Tensor | None, last: Tensor | None, solid: Tensor | None,
    scale: float,
) -> Tensor:  # fmt: skip
    """Attention of many queries.

    Args:
        q: as in :func:`attend_in_parts`, of any number.
        k: as there.
        v: as there.
        mask: as there.
        first: [B, Q] int32, first key that a query sees, or None; what lies outside the bounds is not computed.
        last: [B, Q] int32, one behind the last.
        solid: [B, Q] booleans, whether the query sees every key between its bounds: the mask is then not read (a float
            one would have to be 0 there).
        scale: as there.

    Returns:
        [B, Q, H G, W] of the type of q; zeros for a query that sees nothing.
    """
    out = q.new_empty((q.shape[0], q.shape[2], q.shape[1], v.shape[3]))
    _launch(q, k, v, mask, first, last, solid, out, out, out, scale, 1, block_m=128, block_t=64, warps=8, stages=3)
    return out


def _launch(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, first: Tensor | None, last: Tensor | None, solid: Tensor | None,
    out: Tensor, peak: Tensor, total: Tensor, scale: float, parts: int, block_m: int, block_t: int, warps: int,
    stages: int, appended: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
) -> None:  # fmt: skip
    heads = k.shape[1]
    members = int(q.shape[1]) // int(heads)
    batch, _, queries, size = q.shape
    value_size = v.shape[3]
    kind = 0 if mask is None else 1 if mask.dtype == torch.bool else 2
    k_new, v_new, k_out, v_out = appended or (k, v, k, v)
    past = k.shape[2]
    keys = past if appended is None else k_out.shape[2]
    if mask is not None:
        mask = mask.expand(batch, q.shape[1], queries, keys)
    m = (0, 0, 0, 0) if mask is None else (mask.stride(0), mask.stride(1), mask.stride(2), mask.stride(3))
    grid = (triton.cdiv(queries * members, block_m), batch * heads, parts)
    wrap_triton(_attention_kernel)[grid](
        q, k, v, k_new, v_new, q if mask is None else mask, q if first is None else first, q if last is None else last,
        q if solid is None else solid, out, peak, total, k_out, v_out, queries, keys, past, heads,
        *(tensor.stride(axis) for tensor in (q, k, v, k_new, v_new) for axis in range(3)), *m,
        G=members, D=int(size), W=int(value_size), D_PAD=_padded(int(size)), W_PAD=_padded(int(value_size)),
        SCALE=float(scale), MASK=kind, BOUNDS=first is not None, PARTS=parts, WHOLE=parts == 1,
        APPEND=appended is not None, BLOCK_M=block_m, BLOCK_T=block_t,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip


def _padded(size: int) -> int:
    return max(16, 1 << math.ceil(math.log2(size)))


def joined(mixed: Tensor, peak: Tensor, total: Tensor) -> Tensor:
    """The attention that parts of :func:`attend_in_parts` sum to: [B, Q, H G, W] float32."""
    factor = torch.exp2(peak - peak.amax(0))
    weight = (total * factor).sum(0)
    return (mixed * factor.unsqueeze(-1)).sum(0) / torch.where(weight == 0, 1.0, weight).unsqueeze(-1)
