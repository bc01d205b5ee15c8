"""Gates of feed-forward networks in Triton, for kernels of packages for CUDA."""

from __future__ import annotations

import triton
import triton.language as tl

from surgeon.gates import gate as lookup

UNLIMITED = 3.0e38
"""Stands for no limit where a kernel takes one; compiled programs write infinity in a way that they cannot read."""

_BASES = {"identity": 0, "relu": 1, "relu2": 2, "swish": 3, "sigmoid": 4, "gelu": 5, "gelu_tanh": 6}
"""Numbers of activations; ``swish`` with a factor of 1 is ``silu``, with one of 1.702 ``quick_gelu``."""


@triton.jit
def _active(g, BASE: tl.constexpr, ALPHA: tl.constexpr):
    """An activation of :data:`_BASES`, element by element in float32."""
    if BASE == 1:
        g = tl.maximum(g, 0.0)
    if BASE == 2:
        g = tl.maximum(g, 0.0) * tl.maximum(g, 0.0)
    if BASE == 3:
        g = g / (1.0 + tl.exp(-ALPHA * g))
    if BASE == 4:
        g = 1.0 / (1.0 + tl.exp(-g))
    if BASE == 5:
        g = 0.5 * g * (1.0 + tl.erf(g * 0.7071067811865476))
    if BASE == 6:  # tanh u = 1 - 2 / (exp(2 u) + 1)
        twice = 1.5957691216057308 * (g + 0.044715 * g * g * g)
        g = g * (1.0 - 1.0 / (tl.exp(tl.minimum(twice, 80.0)) + 1.0))  # from 17 on nothing of the quotient is left
    return g


@triton.jit
def gated(
    g, u, BASE: tl.constexpr, ALPHA: tl.constexpr, GATE_MAX: tl.constexpr, CAP: tl.constexpr, SCALE: tl.constexpr,
    SHIFT: tl.constexpr, UP_LIMIT: tl.constexpr, OFFSET: tl.constexpr, NONE: tl.constexpr,
):  # fmt: skip
    """h(g, u) of :class:`surgeon.gates.Gate`; NONE stands for no limit."""
    if GATE_MAX < NONE:
        g = tl.minimum(g, GATE_MAX)
    value = _active(g, BASE, ALPHA)
    if CAP < NONE:
        value = tl.minimum(value, CAP)
    if UP_LIMIT < NONE:
        u = tl.minimum(tl.maximum(u, -UP_LIMIT), UP_LIMIT)
    return (value * SCALE + SHIFT) * (u + OFFSET)


def gate_of(activation: str) -> tuple[int, list[float]] | None:
    """What ``_cuda_rows.few_rows_gated`` takes for a gate by its name; None for one that it does not know."""
    gate = lookup(activation)
    swishes = {"silu": 1.0, "quick_gelu": 1.702, "swish": gate.alpha or 1.0}
    base = _BASES.get("swish" if gate.base in swishes else gate.base)
    if base is None:
        return None
    limits = [UNLIMITED if limit is None else limit for limit in (gate.gate_max, gate.cap, gate.up_limit)]
    scale = 1.0 if gate.scale is None else gate.scale
    return base, [swishes.get(gate.base, 1.0), limits[0], limits[1], scale, gate.shift, limits[2], gate.offset]
