"""What can be proven about routing from the graph: weights that are never negative, indices that are distinct in a row.

The fused expert kernels take logarithms and select the k largest, so they are used only where both are certain.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from surgeon.graph import Graph

aten = torch.ops.aten

_POSITIVE = frozenset(
    "softmax _softmax sigmoid exp relu abs sqrt rsqrt softplus hardsigmoid ones ones_like zeros zeros_like new_ones "
    "new_zeros".split()
)
"""Operators whose result is never negative, whatever they read."""

_KEEPS = frozenset(
    "reshape view _unsafe_view expand expand_as view_as unsqueeze squeeze permute transpose t slice select split "
    "split_with_sizes flatten unflatten _to_copy to clone contiguous alias detach gather index_select index topk sort "
    "sum mean amax amin cumsum".split()
)
"""Operators whose result is never negative where their first argument is not."""

_JOINS = {"mul": 2, "div": 2, "add": 2, "maximum": 2, "minimum": 2}
"""Operators of two arguments whose result is never negative where neither argument is."""


def never_negative(graph: Graph, value: Any) -> bool:
    """Whether no entry of a node's value can be negative, by its ancestors; False where that is not certain."""
    memo: dict[fx.Node, bool] = {}

    def holds(value: Any) -> bool:
        if isinstance(value, int | float):
            return value >= 0
        if isinstance(value, list | tuple):
            return all(holds(item) for item in value)
        if not isinstance(value, fx.Node):
            return False
        if value not in memo:
            memo[value] = False  # a cycle cannot occur; this only guards the recursion
            memo[value] = rule(value)
        return memo[value]

    def rule(node: fx.Node) -> bool:
        if node.op == "get_attr":
            return bool((graph.tensor(str(node.target)) >= 0).all())
        name = _name(node)
        args = node.args
        if name in _POSITIVE:
            return True
        if name == "getitem":
            return holds(args[0])
        if name in _KEEPS:
            return holds(args[0])
        if name in _JOINS:
            if node.kwargs.get("alpha", 1) != 1:
                return False
            return (holds(args[0]) and holds(args[1])) or (name == "mul" and args[0] is args[1])
        if name in ("full", "full_like", "new_full", "fill"):
            return holds(args[-1])
        if name in ("clamp", "clamp_min", "hardtanh"):
            low = args[1] if len(args) > 1 else node.kwargs.get("min")
            return (isinstance(low, int | float) and low >= 0) or holds(args[0])
        if name == "where":
            return holds(args[1]) and holds(args[2])
        if name == "masked_fill":
            return holds(args[0]) and holds(args[2])
        if name in ("cat", "stack"):
            return holds(args[0])
        if name == "scatter":
            return holds(args[0]) and holds(args[3])
        if name == "pow":
            exponent = args[1]
            return holds(args[0]) or (isinstance(exponent, int) and exponent % 2 == 0)
        return False

    return holds(value)


_COMPARES = frozenset(
    "ge gt le lt eq ne logical_and logical_or logical_not bitwise_and bitwise_or bitwise_not where masked_fill".split()
)
"""Operators by which routing leaves experts out after they were selected."""

_SELECTS = frozenset("topk sort gather index_select index".split())
"""Operators that select experts; what lies before them is no reason to leave a selected one out."""


def may_be_zero(weight: Any) -> bool:
    """Whether the weights of selected experts are masked: some pairs weigh exactly 0 and need not be computed."""
    seen: set[fx.Node] = set()
    stack = [weight]
    while stack:
        node = stack.pop()
        if not isinstance(node, fx.Node) or node in seen or node.op != "call_function":
            continue
        seen.add(node)
        name = _name(node)
        if name in _COMPARES:
            return True
        if name not in _SELECTS:
            stack.extend(node.all_input_nodes)
    return False


def distinct_in_row(value: Any, k: int) -> bool:
    """Whether the k entries of each row of an index [T, k] are certainly different: they come from one top-k of k."""
    node = value
    while isinstance(node, fx.Node):
        name = _name(node)
        if name == "getitem":
            source, position = node.args
            if not isinstance(source, fx.Node) or position != 1 or _name(source) not in ("topk", "sort"):
                return False
            dim = (source.args[2] if _name(source) == "topk" else source.args[1]) if _has_dim(source) else -1
            # T rows of k stay rows of k through reshapes, which is all that is walked through below
            shape = source.args[0].meta["val"].shape  # type: ignore[union-attr]  # a node, by the operator's schema
            width = source.args[1] if _name(source) == "topk" else shape[-1]
            return bool(dim in (-1, len(shape) - 1) and width == k)
        if name not in ("reshape", "view", "_to_copy", "to", "clone", "contiguous", "alias", "detach"):
            return False
        shape = node.meta["val"].shape
        if not isinstance(shape[-1], int) or shape[-1] != k:
            return False
        node = node.args[0]
    return False


def selected_logits(index: Any, weight: Any) -> fx.Node | None:
    """The logits [T, E] of which ``weight`` is the softmax over the k largest, and ``index`` which these are, or None.

    ``p = softmax(z); w, i = topk(p, k); w / sum(w)``, where z may be widened to float32 for it, and the weight cast.
    """
    while _name_of(weight) == "_to_copy":
        weight = weight.args[0]
    if _name_of(weight) != "div" or _name_of(index) != "getitem":
        return None
    value, total = weight.args[:2]
    top, which = index.args
    if which != 1 or _name_of(top) != "topk" or _name_of(value) != "getitem" or value.args != (top, 0):
        return None
    if _name_of(total) != "sum" or total.args[0] is not value or total.args[1:] != ([-1], True):
        return None
    scores, _, *rest = top.args
    if any(given != wanted for given, wanted in zip(rest, (-1, True), strict=False)) or top.kwargs:
        return None
    if _name_of(scores) != "softmax" or scores.args[1] not in (-1, scores.meta["val"].dim() - 1):
        return None
    logits = scores.args[0]
    if _name_of(logits) == "_to_copy" and logits.meta["val"].dtype == torch.float32:
        logits = logits.args[0]
    return logits if logits.meta["val"].dim() == 2 else None


def _name_of(value: Any) -> str:
    return _name(value) if isinstance(value, fx.Node) else ""


def _has_dim(node: fx.Node) -> bool:
    return len(node.args) > (2 if _name(node) == "topk" else 1)


def _name(node: fx.Node) -> str:
    """Operator name without overload, e.g. ``mul``; plain functions by their own name."""
    if node.op != "call_function":
        return node.op
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.partition("::")[2]
    return getattr(target, "__name__", str(target))
