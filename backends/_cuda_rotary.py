"""Triton kernels of packages for CUDA: rotary embedding.

Letters in shapes: B batch, N query heads, H key and value heads, S new positions, D head size, W value size, R numbers of a
head that are turned.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from surgeon.backends._cuda_codes import wrapped

_POSITIONS = 8
"""New positions of a program: as many heads of 128 halves as four warps load at once."""


@triton.jit
def _cos_sin_kernel(x, cosines, sines, count, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    angle = tl.load(x + place, mask=place < count, other=0.0)
    tl.store(cosines + place, tl.cos(angle), mask=place < count)
    tl.store(sines + place, tl.sin(angle), mask=place < count)


@triton_op("surgeon::cos_sin", mutates_args={})
def cos_sin(x: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines.

    Args:
        x: contiguous float32, radians.

    Returns:
        Two tensors like x.
    """
    cosines, sines = torch.empty_like(x), torch.empty_like(x)
    count = x.numel()
    wrapped(_cos_sin_kernel)[(triton.cdiv(count, 256),)](x, cosines, sines, count, BLOCK=256, num_warps=4)
    return cosines, sines


@triton.jit
def _turned(x, cosines, sines, size, lines, R: tl.constexpr):
    """Turn: x cos + concat(-x[R/2:], x[:R/2]) sin in float32 [positions, D], what lies behind the first R as it is."""
    turns = lines & (size < R)[None, :]
    first = size < R // 2
    value = tl.load(x + size[None, :], mask=lines, other=0.0).to(tl.float32)
    other = tl.load(x + tl.where(first, size + R // 2, size - R // 2)[None, :], mask=turns, other=0.0).to(tl.float32)
    cosine = tl.load(cosines + size[None, :], mask=turns, other=1.0).to(tl.float32)
    sine = tl.load(sines + size[None, :], mask=turns, other=0.0).to(tl.float32)
    return value * cosine + tl.where(first[None, :], -other, other) * sine


@triton.jit
def _turn_kernel(
    q, k, v, cosines, sines, q_out, k_out, v_out, start, count, room, heads,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, c_b, c_s, s_b, s_s, qo_b, qo_h, qo_s, ko_b, ko_h, ko_s, vo_b, vo_h, vo_s,
    N: tl.constexpr, D: tl.constexpr, W: tl.constexpr, R: tl.constexpr, D_PAD: tl.constexpr, W_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK new positions of one query head, or of one key head and its value head."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    batch = (tl.program_id(1) // (N + heads)).to(tl.int64)
    head = (tl.program_id(1) % (N + heads)).to(tl.int64)
    size = tl.arange(0, D_PAD)
    there = row < count
    lines = there[:, None] & (size < D)[None, :]
    cosines += batch * c_b + row[:, None] * c_s
    sines += batch * s_b + row[:, None] * s_s
    if head < N:
        value = _turned(q + batch * q_b + head * q_h + row[:, None] * q_s, cosines, sines, size, lines, R)
        target = q_out + batch * qo_b + head * qo_h + row[:, None] * qo_s
        tl.store(target + size[None, :], value.to(q_out.dtype.element_ty), mask=lines)
    else:
        head -= N
        place = tl.load(start) + row
        kept = there & (place < room)
        value = _turned(k + batch * k_b + head * k_h + row[:, None] * k_s, cosines, sines, size, lines, R)
        target = k_out + batch * ko_b + head * ko_h + place[:, None] * ko_s
        tl.store(target + size[None, :], value.to(k_out.dtype.element_ty), mask=kept[:, None] & (size < D)[None, :])
        value_size = tl.arange(0, W_PAD)
        wide = kept[:, None] & (value_size < W)[None, :]
        passed = tl.load(v + batch * v_b + head * v_h + row[:, None] * v_s + value_size[None, :], mask=wide)
        tl.store(v_out + batch * vo_b + head * vo_h + place[:, None] * vo_s + value_size[None, :], passed, mask=wide)


def turn_and_append(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, k_out: Tensor, v_out: Tensor, start: Tensor, room: int
) -> Tensor:
    """Turn queries, and write turned keys and values behind the first ``start`` of buffers with room, in one kernel.

    Computed in float32 and rounded once.  It is no ``triton_op`` for the reason that ``_cuda_attention.append_in_place`` is
    none.

    Args:
        q: [B, N, S, D].
        k: [B, H, S, D].
        v: [B, H, S, W], of the type of its buffer.
        cos: [B, 1, S, R], R even and at most D; what lies behind the first R numbers of a head is not turned.
        sin: likewise.
        k_out: [B, H, at least past + S, D].
        v_out: [B, H, at least past + S, W].
        start: [1], positions that stay: a number on the device, so that a launch that is captured holds for any.
        room: positions behind which nothing is written.

    Returns:
        Queries [B, N, S, D] of the type of the buffer of keys.
    """
    batch, members, count, size = q.shape
    heads, value_size = k.shape[1], v.shape[3]
    q_out = k_out.new_empty((batch, members, count, size))
    wrapped(_turn_kernel)[(triton.cdiv(count, _POSITIONS), batch * (members + heads))](
        q, k, v, cos, sin, q_out, k_out, v_out, start, count, room, heads,
        *(tensor.stride(axis) for tensor in (q, k, v) for axis in range(3)),
        *(tensor.stride(axis) for tensor in (cos, sin) for axis in (0, 2)),
        *(tensor.stride(axis) for tensor in (q_out, k_out, v_out) for axis in range(3)),
        N=int(members), D=int(size), W=int(value_size), R=int(cos.shape[3]), D_PAD=triton.next_power_of_2(int(size)),
        W_PAD=triton.next_power_of_2(int(value_size)), BLOCK=_POSITIONS, num_warps=4,
    )  # fmt: skip
    return q_out
