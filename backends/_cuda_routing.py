"""Triton kernel of packages for CUDA: which experts a token gets, and with what weights.

A router's product is small, and so is everything behind it; spelt in ATen it is several kernels that each take longer to start
than to run.  Here one program does all of it for one token.

Letters in shapes: T tokens, E experts, k experts per token, H input width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from surgeon.backends._cuda_codes import wrapped

TOKENS = 128
"""Largest number of tokens of :func:`route_rows`, each of which reads the router's weight: one wave of programs at most."""

NUMBERS = 1 << 16
"""Largest number of weights of its router: one program reads them all, as fast as one multiprocessor does (on an H200 3.8 us
for 2^15 and 21.3 for 2^18, where a product of its own and the rest in a kernel take 7.5 and 11)."""

_NUMBERS_AT_A_TIME = 1 << 14
"""Products that one program holds in registers, at most: 32 in each thread."""


@triton.jit
def _held(x, KIND: tl.constexpr):
    """Float32 rounded to what the graph holds it in: 0 float32, 1 float16, 2 bfloat16."""
    if KIND == 1:
        x = x.to(tl.float16).to(tl.float32)
    if KIND == 2:
        x = x.to(tl.bfloat16).to(tl.float32)
    return x


@triton.jit
def _scored(x, there, SCORING: tl.constexpr):
    """A vector as it is (0), its softmax (1) or its sigmoid (2); other entries than those ``there`` are no part of it."""
    if SCORING == 1:
        x = tl.where(there, x, float("-inf"))
        x = tl.exp(x - tl.max(x, 0))
        x = x / tl.sum(x, 0)
    if SCORING == 2:
        x = 1.0 / (1.0 + tl.exp(-x))
    return x


@triton.jit
def _routing_kernel(
    x, router, bias, correction, weight_out, index_out, x_row, E: tl.constexpr, E_PAD: tl.constexpr, H: tl.constexpr,
    BLOCK: tl.constexpr, PRODUCT: tl.constexpr, BIASED: tl.constexpr, CORRECTED: tl.constexpr, K: tl.constexpr,
    K_PAD: tl.constexpr, SCORING: tl.constexpr, WEIGHING: tl.constexpr, SOURCE: tl.constexpr, NORMALISED: tl.constexpr,
    EPSILON: tl.constexpr, SCALE: tl.constexpr, Z_KIND: tl.constexpr, S_KIND: tl.constexpr, C_KIND: tl.constexpr,
    P_KIND: tl.constexpr, N_KIND: tl.constexpr, M_KIND: tl.constexpr,
):  # fmt: skip
    """One program: one token; letters as in :func:`route_rows`."""
    row = tl.program_id(0).to(tl.int64)
    expert, slot = tl.arange(0, E_PAD), tl.arange(0, K_PAD)
    there = expert < E
    if PRODUCT:
        products = tl.zeros((E_PAD, BLOCK), dtype=tl.float32)
        for start in range(0, H, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < H
            left = tl.load(router + expert[:, None] * H + column[None, :], mask=there[:, None] & inside[None, :], other=0.0)
            right = tl.load(x + row * x_row + column, mask=inside, other=0.0)
            products += left.to(tl.float32) * right.to(tl.float32)[None, :]
        z = tl.sum(products, 1)
        if BIASED:
            z += tl.load(bias + expert, mask=there, other=0.0).to(tl.float32)
    else:
        z = tl.load(x + row * x_row + expert, mask=there, other=0.0).to(tl.float32)
    z = _held(z, Z_KIND)
    s = _held(_scored(z, there, SCORING), S_KIND)
    c = s
    if CORRECTED:
        c = _held(s + tl.load(correction + expert, mask=there, other=0.0).to(tl.float32), C_KIND)
    source = c
    if SOURCE == 0:
        source = z
    if SOURCE == 1:
        source = s
    order = tl.where(c != c, float("inf"), c)  # what is no number is the largest, as torch has it
    free = there
    chosen = tl.zeros((K_PAD,), dtype=tl.int32)
    p = tl.zeros((K_PAD,), dtype=tl.float32)
    for j in tl.static_range(K):
        best = tl.max(tl.where(free, order, float("-inf")), 0)
        first = tl.min(tl.where(free & (order == best), expert, E_PAD), 0)
        chosen = tl.where(slot == j, first, chosen)
        p = tl.where(slot == j, tl.sum(tl.where(expert == first, source, 0.0), 0), p)
        free = free & (expert != first)
    p = _held(_scored(p, slot < K, WEIGHING), P_KIND)
    if NORMALISED:
        total = _held(tl.sum(tl.where(slot < K, p, 0.0), 0), N_KIND)
        if EPSILON != 0.0:
            total = _held(total + EPSILON, N_KIND)
        p = _held(p / total, N_KIND)
    p = _held(p * SCALE, M_KIND)
    tl.store(weight_out + row * K + slot, p.to(weight_out.dtype.element_ty), mask=slot < K)
    tl.store(index_out + row * K + slot, chosen.to(tl.int64), mask=slot < K)


@triton_op("surgeon::route_rows", mutates_args={})
def route_rows(
    x: Tensor, router: Tensor, bias: Tensor | None, correction: Tensor | None, k: int, scoring: int, weighing: int,
    source: int, normalised: bool, epsilon: float, scale: float, kinds: list[int], dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The k experts of each token and their weights, from the router's input.

    With z = x router^T + bias, s = f(z) and c = s + correction, the experts are those of the k largest c, the first of equal
    ones; with p = g of the chosen z, s or c, their weights are scale p, or scale p / (sum of p + epsilon).

    Args:
        x: [T, H], T of at most :data:`TOKENS`.
        router: [E, H], of at most :data:`NUMBERS` numbers, of the type of x; products are summed in float32.
        bias: [E] or None.
        correction: [E] or None.
        k: 1 to E.
        scoring: f: 0 nothing, 1 softmax, 2 sigmoid.
        weighing: g, over the chosen, likewise.
        source: what g reads: 0 z, 1 s, 2 c.
        normalised: whether weights are divided by their sum.
        epsilon: added to that sum.
        scale: factor of the weights.
        kinds: types to which z, s, c, p, the quotient (and the sum) and the product with the scale are rounded: 0 float32, 1
            float16, 2 bfloat16.
        dtype: of the weights.

    Returns:
        Weights [T, k] of ``dtype`` and experts [T, k] int64, largest c first.
    """
    return _routed(x, router, bias, correction, k, scoring, weighing, source, normalised, epsilon, scale, kinds, dtype)


@triton_op("surgeon::route_logits", mutates_args={})
def route_logits(
    z: Tensor, correction: Tensor | None, k: int, scoring: int, weighing: int, source: int, normalised: bool, epsilon: float,
    scale: float, kinds: list[int], dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """:func:`route_rows` from the router's output z [T, E], whose rows are dense; T is any number, other arguments as there."""
    return _routed(z, None, None, correction, k, scoring, weighing, source, normalised, epsilon, scale, kinds, dtype)


def _routed(
    x: Tensor, router: Tensor | None, bias: Tensor | None, correction: Tensor | None, k: int, scoring: int, weighing: int,
    source: int, normalised: bool, epsilon: float, scale: float, kinds: list[int], dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    width = int(x.shape[1])
    experts = width if router is None else int(router.shape[0])
    padded = triton.next_power_of_2(experts)
    weight = x.new_empty((x.shape[0], k), dtype=dtype)
    index = x.new_empty((x.shape[0], k), dtype=torch.int64)
    z_kind, s_kind, c_kind, p_kind, n_kind, m_kind = (int(kind) for kind in kinds)
    wrapped(_routing_kernel)[(x.shape[0],)](
        x, x if router is None else router, x if bias is None else bias, x if correction is None else correction, weight,
        index, x.stride(0), E=experts, E_PAD=padded, H=width,
        BLOCK=min(triton.next_power_of_2(width), max(32, _NUMBERS_AT_A_TIME // padded)), PRODUCT=router is not None,
        BIASED=bias is not None, CORRECTED=correction is not None, K=k, K_PAD=triton.next_power_of_2(k), SCORING=scoring,
        WEIGHING=weighing, SOURCE=source, NORMALISED=normalised, EPSILON=float(epsilon), SCALE=float(scale), Z_KIND=z_kind,
        S_KIND=s_kind, C_KIND=c_kind, P_KIND=p_kind, N_KIND=n_kind, M_KIND=m_kind, num_warps=1 if router is None else 16,
    )  # fmt: skip
    return weight, index
