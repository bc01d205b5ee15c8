"""Normalisations over the channels of a residual stream, proved operator by operator: what may be rotated needs no less.

1. ``layer_norm(x, [H], weight, bias, eps)``, ``rms_norm(x, [H], weight, eps)``
2. ``x * rsqrt(mean(x^2) + eps)``, ``x / sqrt(mean(x^2) + eps)``, the power -1/2 in place of both
3. Case 2 of ``x - mean(x)``, which is a layer norm

A gain and an offset behind a norm of case 2 or 3 are nodes of their own; one of case 1 has them as operands.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from surgeon.discovery import operators

LAYER_NORM, RMS_NORM = "aten::layer_norm", "aten::rms_norm"


@dataclass(frozen=True)
class Norm:
    """One normalisation over the last dimension.

    Attributes:
        node: what gives the normalised value.
        input: what is normalised.
        centred: the mean is subtracted first.
        inside: nodes in between, which nothing else reads.
        gain, offset: operands of ``node``, where it takes some.
    """

    node: fx.Node
    input: fx.Node
    centred: bool
    inside: frozenset[fx.Node] = frozenset()
    gain: fx.Node | None = None
    offset: fx.Node | None = None


def find_norms(nodes: fx.Graph) -> list[Norm]:
    """Every normalisation of a graph over one last dimension, in order."""
    return [norm for node in nodes.nodes if (norm := _norm(node)) is not None]


def _norm(node: fx.Node) -> Norm | None:
    kind = operators.kind(node)
    if kind in (LAYER_NORM, RMS_NORM):  # Case 1
        x, sizes = node.args[:2]
        if not isinstance(x, fx.Node) or not isinstance(sizes, list | tuple) or len(sizes) != 1:
            return None
        centred = kind == LAYER_NORM
        gain = operators.argument(node, 2, "weight")
        offset = operators.argument(node, 3, "bias") if centred else None
        return Norm(node, x, centred, gain=gain, offset=offset)
    if kind not in ("aten::mul", "aten::div") or len(node.all_input_nodes) != 2:
        return None
    operands: Any = node.args[:2]
    for x, factor in (operands, operands[::-1]) if kind == "aten::mul" else (operands,):
        inside: list[fx.Node] = []
        squared = _root(factor, inside, inverse=kind == "aten::mul")
        if squared is None or _uncast(squared) is not _uncast(x):
            continue
        if squared is not x and operators.kind(squared) in operators.CASTS:
            inside.append(squared)
        norm = _centred(node, x, inside) or Norm(node, x, False, frozenset(inside))
        if all(user in norm.inside or user is node for part in norm.inside for user in part.users):
            return norm
    return None


def _centred(node: fx.Node, x: fx.Node, inside: list[fx.Node]) -> Norm | None:
    """Case 3."""
    source = x.args[0] if operators.kind(x) == "aten::sub" and x.kwargs.get("alpha", 1) == 1 else None
    mean = x.args[1] if isinstance(source, fx.Node) else None
    if not isinstance(mean, fx.Node) or not isinstance(source, fx.Node) or _averaged(mean) is not source:
        return None
    return Norm(node, source, True, frozenset([*inside, x, mean]))


def _root(node: Any, inside: list[fx.Node], *, inverse: bool) -> fx.Node | None:
    """The y of ``(mean(y^2) + eps)^(1/2)`` or, inverse, of ``(...)^(-1/2)``; collects the nodes on the way."""
    if not isinstance(node, fx.Node):
        return None
    inside.append(node)
    kind, power = operators.kind(node), node.args[1] if len(node.args) > 1 else None
    if kind in operators.CASTS:
        return _root(node.args[0], inside, inverse=inverse)
    if inverse and kind == "aten::reciprocal":
        return _root(node.args[0], inside, inverse=False)
    if (kind, power) not in (("aten::rsqrt" if inverse else "aten::sqrt", None), ("aten::pow", -0.5 if inverse else 0.5)):
        return None
    mean = node.args[0]
    if isinstance(mean, fx.Node) and operators.kind(mean) == operators.ADD and isinstance(mean.args[1], int | float):
        inside.append(mean)
        mean = mean.args[0]
    square = _averaged(mean) if isinstance(mean, fx.Node) else None
    if square is None or not isinstance(mean, fx.Node):
        return None
    inside += [mean, square]
    y = square.args[0]
    twice = operators.kind(square) == "aten::mul" and square.args[1] is y
    if not isinstance(y, fx.Node) or not (twice or (operators.kind(square) == "aten::pow" and square.args[1] == 2)):
        return None
    return y


def _averaged(node: fx.Node) -> fx.Node | None:
    """The y of ``mean(y)`` over its last dimension, which stays with size 1."""
    if operators.kind(node) != "aten::mean" or len(node.args) < 2:
        return None
    y, dims = node.args[:2]
    if not isinstance(y, fx.Node) or not isinstance(dims, list | tuple) or not operators.argument(node, 2, "keepdim", False):
        return None
    rank = len(operators.shape(y))
    return y if [int(dim) % rank for dim in dims] == [rank - 1] else None  # type: ignore[arg-type]  # numbers


def _uncast(node: Any) -> Any:
    while isinstance(node, fx.Node) and operators.kind(node) in operators.CASTS:
        node = node.args[0]
    return node
