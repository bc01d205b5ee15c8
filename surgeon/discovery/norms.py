"""Normalisations, as one operator or spelled out.

layer_norm(x, ...), rms_norm(x, ...)
(x - mean) * rsqrt(var + e),  x / sqrt(mean(x^2) + e),  x / ||x|| ...: a product of x with the inverse of a root of a
reduction of x
"""

from __future__ import annotations

from torch import fx

from surgeon.discovery import operators
from surgeon.discovery.flow import Flow

_ROOTS = frozenset({"aten::rsqrt", "aten::sqrt", "aten::pow"})
_ROOTED = frozenset({"aten::std", "aten::linalg_vector_norm", "aten::norm"})


def is_normalisation(flow: Flow, node: fx.Node) -> bool:
    """Whether a node normalises."""
    return normalised(flow, node) is not None


def normalised(flow: Flow, node: fx.Node) -> fx.Node | None:
    """What a node normalises, None where it does not normalise."""
    name = operators.kind(node)
    inputs = flow.inputs(node)
    if name in operators.NORMS:
        return inputs[0] if inputs else None
    if name not in ("aten::mul", "aten::div") or len(inputs) != 2:
        return None
    for factor, x in (inputs, inputs[::-1]):
        if _is_inverse_root(flow, factor):
            return x
    return None


def _is_inverse_root(flow: Flow, node: fx.Node) -> bool:
    """Whether a node is computed, by operators of one operand, from a reduction with a root on the way."""
    seen: list[str] = []
    while len(seen) < 8:
        seen.append(operators.kind(node))
        if seen[-1] in operators.REDUCTIONS:
            return seen[-1] in _ROOTED or any(kind in _ROOTS for kind in seen)
        sources = flow.inputs(node)
        if len(sources) != 1:
            return False
        (node,) = sources
    return False


def is_affine(node: fx.Node) -> bool:
    """Whether a node can be the gain or the offset behind a normalisation."""
    return operators.is_reshape(node) or operators.kind(node) in ("aten::mul", operators.ADD)
