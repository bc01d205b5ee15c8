"""Triton kernels of packages for CUDA: attention with a cache.

They are compiled into the package (``torch.library.triton_op``); nothing of Triton or of ours is needed to run it.

Decoding is bound by reading caches once.  torch's fused attention with a mask wants keys and values repeated for every query
head, which reads the cache several times, and a cache that grows is copied at every step.

Letters in shapes: B batch, H key and value heads, G query heads of each, Q queries, T keys, N new ones, D head size, W value
size, P parts of a sum.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from surgeon.backends._cuda_codes import wrapped

_PARTS = 16
"""Largest number of parts into which the keys are cut where the queries are few: a batch of 1 must fill the GPU too."""

_PROGRAMS = 512
"""Programs that fill a large GPU: so many that each of its about 130 multiprocessors has some in reserve."""

_NOTHING = tl.constexpr(-1.0e30)
"""Largest score of no key at all; finite, so that differences of two such are numbers."""


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
    q, k, v, k_new, v_new, mask, first, last, solid, start, out, peak_out, total_out, k_out, v_out, queries, keys, past, heads,
    q_b, q_h, q_q, k_b, k_h, k_t, v_b, v_h, v_t, kn_b, kn_h, kn_t, vn_b, vn_h, vn_t, m_b, m_h, m_q, m_t,
    G: tl.constexpr, D: tl.constexpr, W: tl.constexpr, D_PAD: tl.constexpr, W_PAD: tl.constexpr,
    SCALE: tl.constexpr, MASK: tl.constexpr, BOUNDS: tl.constexpr, STARTED: tl.constexpr, WHOLE: tl.constexpr,
    APPEND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M of the Q G rows of one key head, over one part of the keys; softmax in base 2.

    With APPEND the first ``past`` keys are in ``k`` and the others in ``k_new`` (which the last part takes), and all are
    written to ``k_out`` (values likewise).  With STARTED only those before the queries and theirs are used.
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
    if STARTED:
        past = tl.minimum(tl.load(start).to(tl.int32) + queries, past)
    parts = tl.num_programs(2)
    length = tl.cdiv(tl.cdiv(past, BLOCK_T), parts) * BLOCK_T
    begin, stop = part * length, tl.minimum(past, (part + 1) * length)
    if APPEND:
        k_out += (batch * heads + head) * keys * D + size[:, None]
        v_out += (batch * heads + head) * keys * W + value_size[None, :]
    low, high = rows, rows
    if BOUNDS:  # no query of this program sees a key outside
        low = tl.load(first + batch * queries + query)
        high = tl.load(last + batch * queries + query)
        begin, stop = tl.min(low) // BLOCK_T * BLOCK_T, tl.max(high)
        if tl.min(tl.load(solid + batch * queries + query).to(tl.int32)) == 1:  # each sees all that lies between
            middle = tl.minimum(tl.cdiv(tl.max(low), BLOCK_T) * BLOCK_T, stop)
            end = tl.maximum(tl.min(high) // BLOCK_T * BLOCK_T, middle)
            peak, total, mixed = _keys_and_values(
                asked, peak, total, mixed, k, v, k, v, mask, low, high, begin, middle, k_t, v_t, m_t, inside, wide,
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
            stop = begin  # nothing is left for the general form
    if MASK == 0:
        low, high = tl.zeros((BLOCK_M,), dtype=tl.int32), tl.zeros((BLOCK_M,), dtype=tl.int32) + keys
    peak, total, mixed = _keys_and_values(
        asked, peak, total, mixed, k, v, k_out, v_out, mask, low, high, begin, stop, k_t, v_t, m_t, inside, wide,
        D, W, APPEND, SCALE, MASK + 1, BLOCK_T,
    )  # fmt: skip
    if APPEND:
        if part == parts - 1:
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
def attend_in_parts(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, start: Tensor | None, scale: float
) -> Tensor:
    """Attention of few queries, in parts of the keys that are joined.

    Args:
        q: [B, H G, Q, D], Q G of at most 16.
        k: [B, H, T, D].
        v: [B, H, T, W].
        mask: None, or broadcasts to [B, H G, Q, T]: True where a key is seen, or a float that is added.
        start: [1], how many keys come before those of the queries; what lies behind both is not read.  None for T - Q.
        scale: factor of the scores.

    Returns:
        [B, Q, H G, W] of the type of q; zeros for a query that sees nothing.
    """
    sums = _sums(q, k, v)
    _launch(
        q, k, v, mask, None, None, None, *sums, scale, sums[0].shape[0], block_m=16, block_t=32, warps=4, stages=4, start=start
    )
    return _joined(*sums, q)


@triton_op("surgeon::attend_appending", mutates_args={})
def attend_appending(
    q: Tensor, k: Tensor, v: Tensor, k_new: Tensor, v_new: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
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
        What :func:`attend_in_parts` gives; keys [B, H, T + N, D] and values [B, H, T + N, W].
    """
    sums = _sums(q, k, v)
    keys = k.shape[2] + k_new.shape[2]
    k_out, v_out = (old.new_empty((old.shape[0], old.shape[1], keys, old.shape[3])) for old in (k, v))
    _launch(
        q, k, v, mask, None, None, None, *sums, scale, sums[0].shape[0], block_m=16, block_t=32, warps=4, stages=4,
        appended=(k_new, v_new, k_out, v_out),
    )  # fmt: skip
    return _joined(*sums, q), k_out, v_out


@triton.jit
def _append_kernel(
    k, v, k_new, v_new, start, count, room, heads, k_b, k_h, k_t, v_b, v_h, v_t, kn_b, kn_h, kn_t, vn_b, vn_h, vn_t,
    D: tl.constexpr, W: tl.constexpr, D_PAD: tl.constexpr, W_PAD: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_T of the new rows of one head."""
    row = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    size, value_size = tl.arange(0, D_PAD), tl.arange(0, W_PAD)
    past = tl.load(start)
    kept = (row < count) & (past + row < room)
    key_lines, value_lines = kept[:, None] & (size < D)[None, :], kept[:, None] & (value_size < W)[None, :]
    key = tl.load(k_new + batch * kn_b + head * kn_h + row[:, None] * kn_t + size[None, :], mask=key_lines)
    value = tl.load(v_new + batch * vn_b + head * vn_h + row[:, None] * vn_t + value_size[None, :], mask=value_lines)
    tl.store(k + batch * k_b + head * k_h + (past + row)[:, None] * k_t + size[None, :], key, mask=key_lines)
    tl.store(v + batch * v_b + head * v_h + (past + row)[:, None] * v_t + value_size[None, :], value, mask=value_lines)


def append_in_place(k: Tensor, v: Tensor, k_new: Tensor, v_new: Tensor, start: Tensor, room: int) -> None:
    """Write new keys and values behind the first ``start`` of buffers with room, in one kernel.

    It is no part of the attention's kernel, of which a package holds two: branches of a condition write nothing.  And it is
    no ``triton_op``: torch leaves one that writes to be called by its name, which a package then needs surgeon for.

    Args:
        k: [B, H, at least past + N, D].
        v: [B, H, at least past + N, W].
        k_new: [B, H, N, D].
        v_new: [B, H, N, W].
        start: [1], positions that stay: a number on the device, so that a launch that is captured holds for any.
        room: positions behind which nothing is written.
    """
    batch, heads, count, size = k_new.shape
    value_size = v_new.shape[3]
    block_t = 16
    wrapped(_append_kernel)[(triton.cdiv(count, block_t), batch * heads)](
        k, v, k_new, v_new, start, count, room, heads,
        *(tensor.stride(axis) for tensor in (k, v, k_new, v_new) for axis in range(3)),
        D=int(size), W=int(value_size), D_PAD=_padded(int(size)), W_PAD=_padded(int(value_size)), BLOCK_T=block_t, num_warps=4,
    )  # fmt: skip


def _sums(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Room for weighted sums of values [P, B, Q, H G, W], largest scores in base 2 and sums of weights [P, B, Q, H G]."""
    wanted = _PROGRAMS // (k.shape[0] * k.shape[1])
    parts = torch.sym_max(1, torch.sym_min(_PARTS, wanted))  # type: ignore[no-untyped-call]
    shape = (parts, q.shape[0], q.shape[2], q.shape[1])
    mixed = q.new_empty((*shape, v.shape[3]), dtype=torch.float32)
    return mixed, q.new_empty(shape, dtype=torch.float32), q.new_empty(shape, dtype=torch.float32)


@triton.jit
def _join_kernel(mixed, peak, total, out, parts, W: tl.constexpr, W_PAD: tl.constexpr, P_PAD: tl.constexpr):
    """One program: the parts of one query of one head."""
    line = tl.program_id(0).to(tl.int64)
    part, size = tl.arange(0, P_PAD), tl.arange(0, W_PAD)
    there = part < parts
    at = part.to(tl.int64) * tl.num_programs(0) + line
    peaks = tl.load(peak + at, mask=there, other=_NOTHING)
    factor = tl.exp2(peaks - tl.max(peaks, 0))
    weight = tl.sum(tl.load(total + at, mask=there, other=0.0) * factor, 0)
    values = tl.load(mixed + at[:, None] * W + size[None, :], mask=there[:, None] & (size < W)[None, :], other=0.0)
    value = tl.sum(values * factor[:, None], 0) / tl.where(weight == 0.0, 1.0, weight)
    tl.store(out + line * W + size, value.to(out.dtype.element_ty), mask=size < W)


def _joined(mixed: Tensor, peak: Tensor, total: Tensor, q: Tensor) -> Tensor:
    """The attention that the parts of :func:`_sums` make: [B, Q, H G, W] of the type of q."""
    parts, batch, queries, heads, size = mixed.shape
    out = q.new_empty((batch, queries, heads, size))
    wrapped(_join_kernel)[(batch * queries * heads,)](
        mixed, peak, total, out, parts, W=int(size), W_PAD=_padded(int(size)), P_PAD=_PARTS, num_warps=4
    )
    return out


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
    _launch(q, k, v, mask, first, last, solid, out, out, out, scale, None, block_m=128, block_t=64, warps=8, stages=3)
    return out


def _launch(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, first: Tensor | None, last: Tensor | None, solid: Tensor | None,
    out: Tensor, peak: Tensor, total: Tensor, scale: float, parts: int | None, block_m: int, block_t: int, warps: int,
    stages: int, appended: tuple[Tensor, Tensor, Tensor, Tensor] | None = None, start: Tensor | None = None,
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
    grid = (triton.cdiv(queries * members, block_m), batch * heads, 1 if parts is None else parts)
    wrapped(_attention_kernel)[grid](
        q, k, v, k_new, v_new, q if mask is None else mask, q if first is None else first, q if last is None else last,
        q if solid is None else solid, q if start is None else start, out, peak, total, k_out, v_out, queries, keys, past,
        heads,
        *(tensor.stride(axis) for tensor in (q, k, v, k_new, v_new) for axis in range(3)), *m,
        G=members, D=int(size), W=int(value_size), D_PAD=_padded(int(size)), W_PAD=_padded(int(value_size)),
        SCALE=float(scale), MASK=kind, BOUNDS=first is not None, STARTED=start is not None, WHOLE=parts is None,
        APPEND=appended is not None, BLOCK_M=block_m, BLOCK_T=block_t,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip


def _padded(size: int) -> int:
    return max(16, 1 << math.ceil(math.log2(size)))
