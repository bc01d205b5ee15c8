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

_PROGRAMS = 512
"""Programs that keep the memory of a large GPU busy: a few for each of its about 130 multiprocessors."""

_PARTS = 16
"""Parts into which the keys are cut where the queries are few: a batch of 1 must fill the GPU too."""

_NOTHING = tl.constexpr(-1.0e30)
"""Largest score of no key at all; finite, so that differences of two such are numbers."""


# -- rows through the matrices of their experts -----------------------------------------------------------------------


@triton.jit
def _few_rows_kernel(
    x, index, weight, scale, zero, out, pairs, rows_out, width, row_bytes, groups,
    DIVISOR: tl.constexpr, PAIRED: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr,
    PARTS: tl.constexpr, ALL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: the rows of one expert times BLOCK_N rows of its matrix, over one part of the columns."""
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    expert = tl.program_id(1).to(tl.int64)
    part = tl.program_id(2)
    per_byte: tl.constexpr = 1 if BITS == 0 else 8 // BITS
    dtype = x.dtype.element_ty
    every = tl.arange(0, ALL)
    if PAIRED:
        mine = tl.load(index + every, mask=every < pairs, other=-1) == expert
    else:
        mine = every < pairs
    count = tl.sum(mine.to(tl.int32))
    place = tl.cumsum(mine.to(tl.int32), 0) - 1
    inside = columns < rows_out
    blocks = tl.cdiv(width, BLOCK_K)
    steps = tl.cdiv(blocks, PARTS)
    start = part * steps
    stop = tl.minimum(blocks, start + steps)
    line = expert * rows_out + columns
    for first in range(0, count, BLOCK_M):
        slot = first + tl.arange(0, BLOCK_M)
        pair = tl.sum(tl.where(mine[None, :] & (place[None, :] == slot[:, None]), every[None, :], 0), 1)
        valid = slot < count
        row = x + (pair // DIVISOR)[:, None] * width
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for step in range(start, stop):
            if BITS == 0:
                depth = step * BLOCK_K + tl.arange(0, BLOCK_K)
                left = tl.load(row + depth[None, :], mask=valid[:, None] & (depth < width)[None, :], other=0.0)
                right = tl.load(
                    weight + line[None, :] * width + depth[:, None],
                    mask=inside[None, :] & (depth < width)[:, None], other=0.0,
                )  # fmt: skip
                total = tl.dot(left, right, total, input_precision=PRECISION)
            else:
                depth = step * (BLOCK_K // per_byte) + tl.arange(0, BLOCK_K // per_byte)
                packed = tl.load(weight + line[None, :] * row_bytes + depth[:, None], mask=inside[None, :], other=0)
                group = line * groups + step // (GROUP // BLOCK_K)
                size = tl.load(scale + group, mask=inside, other=0.0).to(tl.float32)
                if ZERO:
                    middle = tl.load(zero + group, mask=inside, other=0).to(tl.float32)
                else:
                    middle = tl.full((BLOCK_N,), 2.0 ** (BITS - 1), tl.float32)
                product = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
                for j in tl.static_range(per_byte):
                    codes = (packed.to(tl.uint16) >> (BITS * j)) & (2**BITS - 1)
                    if dtype == tl.bfloat16 and BITS < 8:  # the bits of 128 + code: no conversion from integers
                        values = (codes | 0x4300).to(tl.bfloat16, bitcast=True) - (middle + 128.0).to(tl.bfloat16)[None, :]
                    elif dtype == tl.float16:  # the bits of 1024 + code
                        values = (codes | 0x6400).to(tl.float16, bitcast=True) - (middle + 1024.0).to(tl.float16)[None, :]
                    else:
                        values = (codes.to(tl.float32) - middle[None, :]).to(dtype)
                    left = tl.load(row + j * row_bytes + depth[None, :], mask=valid[:, None], other=0.0)
                    product = tl.dot(left, values, product, input_precision=PRECISION)
                total += product * size[None, :]
        target = out + (part.to(tl.int64) * pairs + pair.to(tl.int64)[:, None]) * rows_out + columns[None, :]
        tl.store(target, total, mask=valid[:, None] & inside[None, :])


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

    Args:
        x: [R, K].
        index: [R divisor] expert of each pair, at most :data:`PAIRS`; None for one matrix and S = R.
        weight: [E, N, K] of the type of x, or packed codes [E, N, K / group, group bits / 8].
        scale: [E, N, K / group] of codes; None with ``bits`` 0.
        zero: [E, N, K / group] zero points of codes, or None for 2^(bits - 1).
        bits: 0 (no codes), 2, 4 or 8.
        group: codes per scale, a multiple of 16 per byte's codes.
        divisor: pair s belongs to row s // divisor.
        active: how many experts are expected to have rows: what sizes the parts.

    Returns:
        [P, S, N] float32; rows of experts outside 0 .. E-1 are undefined.
    """
    experts, rows_out = weight.shape[:2]
    width = x.shape[1]
    pairs = x.shape[0] * divisor
    block_n = 64
    block_k = 256 // x.element_size() if bits == 0 else min(group, 128)
    blocks = -(-int(rows_out) // block_n) * min(active, int(experts))
    parts = 1
    while parts < 8 and blocks * parts < _PROGRAMS and int(width) >= 8 * parts * block_k:
        parts *= 2
    out = x.new_empty((parts, pairs, rows_out), dtype=torch.float32)
    per_byte = 1 if bits == 0 else 8 // bits
    if per_byte > 1:  # columns in the order in which a byte's positions hold them: all first ones, all second ones, ...
        x = x.reshape(-1, width // per_byte, per_byte).transpose(1, 2).contiguous()
    grid = (-(-int(rows_out) // block_n), int(experts), parts)
    wrap_triton(_few_rows_kernel)[grid](
        x, weight if index is None else index, weight, weight if scale is None else scale, weight if zero is None else zero,
        out, pairs, rows_out, width, width // per_byte, max(width // max(group, 1), 1),
        DIVISOR=divisor, PAIRED=index is not None, BITS=bits, GROUP=max(group, 1), ZERO=zero is not None, PARTS=parts,
        ALL=PAIRS, BLOCK_M=16, BLOCK_N=block_n, BLOCK_K=block_k, PRECISION="ieee", num_warps=4, num_stages=4,
    )  # fmt: skip
    return out


def takes_codes(bits: int, group: int, width: int) -> bool:
    """Whether :func:`few_rows` reads such codes: whole groups, and at least 16 codes of each position in a byte."""
    step = min(group, 128)
    return bits in (2, 4, 8) and width % group == 0 and group % step == 0 and step & (step - 1) == 0 and step * bits >= 128


# -- attention --------------------------------------------------------------------------------------------------------


@triton.jit
def _attention_kernel(
    q, k, v, mask, first, last, out, peak_out, total_out, scale, queries, keys, heads,
    q_b, q_h, q_q, k_b, k_h, k_t, v_b, v_h, v_t, m_b, m_h, m_q, m_t,
    G: tl.constexpr, D: tl.constexpr, W: tl.constexpr, D_PAD: tl.constexpr, W_PAD: tl.constexpr,
    MASK: tl.constexpr, BOUNDS: tl.constexpr, PARTS: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M of the Q G rows of one key head, over one part of the keys; softmax in base 2."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    part = tl.program_id(2)
    query, member = rows // G, rows % G
    valid = rows < queries * G
    size, value_size = tl.arange(0, D_PAD), tl.arange(0, W_PAD)
    at = batch * q_b + (head * G + member)[:, None] * q_h + query[:, None] * q_q + size[None, :]
    asked = tl.load(q + at, mask=valid[:, None] & (size < D)[None, :], other=0.0)
    length = tl.cdiv(tl.cdiv(keys, BLOCK_T), PARTS) * BLOCK_T
    start, stop = part * length, tl.minimum(keys, (part + 1) * length)
    if BOUNDS:  # no query of this program sees a key outside
        low = tl.min(tl.load(first + batch * queries + query, mask=valid, other=2147483647))
        start = tl.maximum(start, low // BLOCK_T * BLOCK_T)
        stop = tl.minimum(stop, tl.max(tl.load(last + batch * queries + query, mask=valid, other=0)))
    peak = tl.full((BLOCK_M,), _NOTHING, tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    mixed = tl.zeros((BLOCK_M, W_PAD), dtype=tl.float32)
    for t in range(start, stop, BLOCK_T):
        place = t + tl.arange(0, BLOCK_T)
        there = place < stop
        key = tl.load(
            k + batch * k_b + head * k_h + place[None, :] * k_t + size[:, None],
            mask=there[None, :] & (size < D)[:, None], other=0.0,
        )  # fmt: skip
        score = tl.dot(asked, key) * (scale * 1.4426950408889634)
        if MASK > 0:
            spot = mask + batch * m_b + (head * G + member)[:, None] * m_h + query[:, None] * m_q + place[None, :] * m_t
            if MASK == 1:
                seen = tl.load(spot, mask=valid[:, None] & there[None, :], other=0)
                score = tl.where(seen != 0, score, float("-inf"))
            else:
                added = tl.load(spot, mask=valid[:, None] & there[None, :], other=0.0).to(tl.float32)
                score += added * 1.4426950408889634
        score = tl.where(there[None, :], score, float("-inf"))
        above = tl.maximum(peak, tl.max(score, 1))
        share = tl.exp2(score - above[:, None])
        fade = tl.exp2(peak - above)
        total = total * fade + tl.sum(share, 1)
        value = tl.load(
            v + batch * v_b + head * v_h + place[:, None] * v_t + value_size[None, :],
            mask=there[:, None] & (value_size < W)[None, :], other=0.0,
        )  # fmt: skip
        mixed = mixed * fade[:, None] + tl.dot(share.to(value.dtype), value)
        peak = above
    wide = (value_size < W)[None, :]
    if WHOLE:  # [B, Q, H G, W]
        mixed = mixed / tl.where(total == 0.0, 1.0, total)[:, None]
        line = (batch * queries + query) * (heads * G) + head * G + member
        tl.store(out + line[:, None] * W + value_size[None, :], mixed.to(out.dtype.element_ty), mask=valid[:, None] & wide)
    else:  # [P, B, Q, H G, W]
        line = ((part * (tl.num_programs(1) // heads) + batch) * queries + query) * (heads * G) + head * G + member
        tl.store(out + line[:, None] * W + value_size[None, :], mixed, mask=valid[:, None] & wide)
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
    shape = (_PARTS, q.shape[0], q.shape[2], q.shape[1])
    mixed = q.new_empty((*shape, v.shape[3]), dtype=torch.float32)
    peak, total = q.new_empty(shape, dtype=torch.float32), q.new_empty(shape, dtype=torch.float32)
    _launch(q, k, v, mask, None, None, mixed, peak, total, scale, _PARTS, block_m=16, warps=4, stages=3)
    return mixed, peak, total


@triton_op("surgeon::attend_whole", mutates_args={})
def attend_whole(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, first: Tensor | None, last: Tensor | None, scale: float
) -> Tensor:
    """Attention of many queries.

    Args:
        q: as in :func:`attend_in_parts`, of any number.
        k: as there.
        v: as there.
        mask: as there.
        first: [B, Q] int32, first key that a query sees, or None; what lies outside the bounds is not computed.
        last: [B, Q] int32, one behind the last.
        scale: as there.

    Returns:
        [B, Q, H G, W] of the type of q; zeros for a query that sees nothing.
    """
    out = q.new_empty((q.shape[0], q.shape[2], q.shape[1], v.shape[3]))
    _launch(q, k, v, mask, first, last, out, out, out, scale, 1, block_m=128, warps=8, stages=2)
    return out


def _launch(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, first: Tensor | None, last: Tensor | None, out: Tensor,
    peak: Tensor, total: Tensor, scale: float, parts: int, block_m: int, warps: int, stages: int,
) -> None:  # fmt: skip
    heads = k.shape[1]
    members = int(q.shape[1]) // int(heads)
    batch, _, queries, size = q.shape
    value_size = v.shape[3]
    kind = 0 if mask is None else 1 if mask.dtype == torch.bool else 2
    if mask is not None:
        mask = mask.expand(batch, q.shape[1], queries, k.shape[2])
    m = (0, 0, 0, 0) if mask is None else (mask.stride(0), mask.stride(1), mask.stride(2), mask.stride(3))
    grid = (triton.cdiv(queries * members, block_m), batch * heads, parts)
    wrap_triton(_attention_kernel)[grid](
        q, k, v, q if mask is None else mask, q if first is None else first, q if last is None else last, out, peak, total,
        scale, queries, k.shape[2], heads,
        q.stride(0), q.stride(1), q.stride(2), k.stride(0), k.stride(1), k.stride(2), v.stride(0), v.stride(1), v.stride(2),
        *m,
        G=members, D=int(size), W=int(value_size), D_PAD=_padded(int(size)), W_PAD=_padded(int(value_size)),
        MASK=kind, BOUNDS=first is not None, PARTS=parts, WHOLE=parts == 1, BLOCK_M=block_m, BLOCK_T=64,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip


def _padded(size: int) -> int:
    return max(16, 1 << math.ceil(math.log2(size)))


def joined(mixed: Tensor, peak: Tensor, total: Tensor) -> Tensor:
    """The attention that parts of :func:`attend_in_parts` sum to: [B, Q, H G, W] float32."""
    factor = torch.exp2(peak - peak.amax(0))
    weight = (total * factor).sum(0)
    return (mixed * factor.unsqueeze(-1)).sum(0) / torch.where(weight == 0, 1.0, weight).unsqueeze(-1)
