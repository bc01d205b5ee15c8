"""Which elements of an operator's operands are needed for which elements of its result.

Labels: one integer per element of a value, dimensions along which it does not vary having size 1: a number (of a head, say),
SHARED where several numbers need the element, or somebody who is not asked, and UNUSED where nobody does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from surgeon.discovery import operators
from surgeon.graph import Graph

SHARED, UNUSED = -1, -2
SPLITS = frozenset({"aten::split", "aten::split_with_sizes", "aten::unbind"})
MADE = frozenset(f"aten::{name}" for name in "new_full new_zeros new_ones new_empty".split())
FILLED = MADE | {f"aten::{name}" for name in "full zeros ones empty".split()}
"""Tensors with the same number everywhere, whose sizes are arguments."""

_LIKE = frozenset(f"aten::{name}_like" for name in "full zeros ones empty".split())
_EXTREMES = frozenset({"aten::max", "aten::min"})
_MOVES = frozenset(
    f"aten::{name}"
    for name in "reshape view _unsafe_view unsqueeze squeeze clone contiguous alias detach expand repeat "
    "repeat_interleave slice select roll flip".split()
)


class Needs:
    """What one operator needs.

    Attributes:
        graph: the graph.
        labels: of its operands, by operand.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.labels: dict[fx.Node, Tensor] = {}

    def add(self, value: object, labels: Tensor) -> None:
        """Say what is needed of an operand; nothing for what is no tensor."""
        if isinstance(value, fx.Node) and isinstance(value.meta.get("val"), Tensor | list | tuple):
            known = self.labels.get(value)
            self.labels[value] = compact(labels if known is None else both(known, labels))

    def whole(self, value: fx.Node) -> None:
        """Say that all of an operand is needed."""
        self.add(value, same(value, SHARED))


def needs(graph: Graph, node: fx.Node, labels: Tensor) -> Mapping[fx.Node, Tensor] | None:
    """Labels of a node's operands.

    Args:
        graph: the graph.
        node: a call.
        labels: of its result; of what it splits for a split.

    Returns:
        Labels by operand; None where it is not known which elements of its result need which of its operands.
    """
    found = Needs(graph)
    rule = _rule(node)
    if rule is None or not rule(found, node, labels):
        return None
    return found.labels


Rule = Callable[[Needs, fx.Node, Tensor], bool]
"""Adds what a node needs; False where it is not known."""


def _rule(node: fx.Node) -> Rule | None:
    kind, source = operators.kind(node), node.args[0] if node.args else None
    one = isinstance(node.meta.get("val"), Tensor)
    if kind == operators.GETITEM:
        by = operators.kind(source) if isinstance(source, fx.Node) else ""
        return _piece if by in SPLITS else _alike if by in _EXTREMES else None
    if kind in _RULES and (one or kind in SPLITS):
        return _RULES[kind]
    if kind in _MOVES or is_fixed_index(node):
        return _moved
    if kind in operators.CASTS or kind in _LIKE or operators.is_pointwise(node):
        return _alike
    if kind in _EXTREMES or (kind in operators.REDUCTIONS and one):
        return _reduced
    return _filled if kind in FILLED else None


# -- labels -------------------------------------------------------------------------------------------------------


def compact(labels: Tensor) -> Tensor:
    """The same labels, dimensions in which they do not vary having size 1."""
    for axis, size in enumerate(labels.shape):
        if size > 1 and bool((labels == labels.narrow(axis, 0, 1)).all()):
            labels = labels.narrow(axis, 0, 1)
    return labels


def absorbed(labels: Tensor) -> Tensor:
    """The same labels, those of nobody's elements being that of the others where these do not vary along a dimension."""
    for axis, size in enumerate(labels.shape):
        if size > 1 and bool((labels == UNUSED).any()):
            joined = _over(labels, [axis])
            if bool(((labels == joined) | (labels == UNUSED)).all()):
                labels = joined
    return labels


def _over(labels: Tensor, axes: Iterable[int]) -> Tensor:
    """Labels of elements that everything along some dimensions is computed from."""
    for axis in axes:
        if labels.shape[axis] > 1:
            high = labels.amax(axis, keepdim=True)
            low = labels.masked_fill(labels == UNUSED, torch.iinfo(labels.dtype).max).amin(axis, keepdim=True)
            labels = torch.where((low == high) | (high == UNUSED), high, SHARED)
    return labels


def both(a: Tensor, b: Tensor) -> Tensor:
    """Labels of elements with two readers."""
    return torch.where(a == UNUSED, b, torch.where((b == UNUSED) | (a == b), a, SHARED))


def _broadcast_back(labels: Tensor, shape: Sequence[int]) -> Tensor:
    """Labels of an operand of that shape, whose elements are repeated to make a result with ``labels``."""
    ahead = labels.dim() - len(shape)
    labels = _over(labels, range(ahead)).reshape(labels.shape[ahead:])
    return _over(labels, [axis for axis, size in enumerate(shape) if size == 1])


def _moved_back(labels: Tensor, index: Tensor, count: int) -> Tensor:
    """Labels [count] of elements that are moved to, or repeated at, the places whose numbers ``index`` has."""
    flat, places = labels.expand(index.shape).flatten(), index.flatten()
    used = flat != UNUSED
    flat, places = flat[used], places[used]
    high = torch.full((count,), UNUSED).scatter_reduce(0, places, flat, "amax")
    low = torch.full((count,), torch.iinfo(torch.int64).max).scatter_reduce(0, places, flat, "amin")
    return torch.where((low == high) | (high == UNUSED), high, SHARED)


def named(node: fx.Node, name: str) -> Any:
    """An argument of a call by its name in the schema, None where there is none."""
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]  # an operator
    return operators.argument(node, names.index(name), name) if name in names else None


def is_fixed_index(node: fx.Node) -> bool:
    """Whether a node selects by stored places, ``x[:, [-1]]``."""
    places: Any = node.args[1] if operators.kind(node) == operators.INDEX else None
    return places is not None and all(place is None or place.op == "get_attr" for place in places)


def cut(node: fx.Node) -> tuple[int, list[int]]:
    """The dimension along which a split cuts, and the sizes of the pieces."""
    unbound = operators.kind(node) == "aten::unbind"
    axis = int(operators.argument(node, 1 if unbound else 2, "dim", 0)) % len(operators.shape(node.all_input_nodes[0]))
    return axis, [1 if unbound else operators.hint(value.shape[axis]) for value in node.meta["val"]]


def tensors(node: fx.Node) -> list[fx.Node]:
    """Operands that are tensors."""
    return [value for value in node.all_input_nodes if isinstance(value.meta.get("val"), Tensor)]


def shape_of(value: fx.Node) -> tuple[int, ...]:
    """Shape of a value; that of its input for a split."""
    return operators.shape(value.all_input_nodes[0] if operators.kind(value) in SPLITS else value)


def same(value: fx.Node, label: int) -> Tensor:
    """One label for all elements of a value."""
    return torch.full([1] * len(shape_of(value)), label)


# -- rules --------------------------------------------------------------------------------------------------------


def _alike(found: Needs, node: fx.Node, labels: Tensor) -> bool:
    for value in node.all_input_nodes:
        if isinstance(value.meta.get("val"), Tensor | list | tuple):
            found.add(value, _broadcast_back(labels, shape_of(value)))
    return True


def _filled(found: Needs, node: fx.Node, labels: Tensor) -> bool:
    for value in tensors(node):  # whose type it has
        found.add(value, same(value, UNUSED))
    return True


def _piece(found: Needs, node: fx.Node, labels: Tensor) -> bool:
    split: Any = node.args[0]
    number: Any = node.args[1]
    axis, widths = cut(split)
    if operators.kind(split) == "aten::unbind":
        labels = labels.unsqueeze(axis)
    shape = [*labels.shape]
    shape[axis] = sum(widths)
    whole = torch.full(shape, UNUSED)
    place = whole.narrow(axis, sum(widths[:number]), widths[number])
    place.copy_(labels.expand(place.shape))
    found.add(split, whole)
    return True


def _moved(found: Needs, node: fx.Node, labels: Tensor) -> bool:
    source = node.args[0]
    others = [value for value in tensors(node) if value is not source]
    if not isinstance(source, fx.Node) or any(value.op != "get_attr" for value in others):
        return False

    def number(argument: fx.Node) -> Any:  # a size as it was traced, or stored places
        return found.graph.tensor(str(argument.target)) if argument.op == "get_attr" else operators.hint(argument.meta["val"])

    for value in others:
        found.whole(value)
    shape = operators.shape(source)
    count = math.prod(shape)
    args, kwargs = fx.node.map_arg((node.args[1:], dict(node.kwargs)), number)
    places = node.target(torch.arange(count).reshape(shape), *args, **kwargs)  # type: ignore[operator]  # an operator
    found.add(source, _moved_back(labels, places, count).reshape(shape))
    return True


def _reduced(found: Needs, node: fx.Node, labels: Tensor) -> bool:
    sources = tensors(node)
    if len(sources) != 1:
        return False
    rank = len(operators.shape(sources[0]))
    dims = named(node, "dim")
    if not isinstance(dims, list | tuple):
        dims = [dims] if isinstance(dims, int) else []
    axes = sorted(int(axis) % rank for axis in dims) or list(range(rank))
    if not named(node, "keepdim"):
        for axis in axes:
            labels = labels.unsqueeze(axis)
    found.add(sources[0], labels)
    return True


def _order(found: Needs, node: fx.Node, labels: Tensor) -> bool:
    args: Any = node.args
    rank = labels.dim()
    order = list(range(rank))
    if operators.kind(node) == "aten::permute":
        order = [axis % rank for axis in args[1]]
    elif rank > 1:
        first, second = (0, 1) if operators.kind(node) == "aten::t" else (axis % rank for axis in args[1:3])
        order[first], order[second] = second, first
    back = [order.index(axis) for axis in range(rank)]
    found.add(node.args[0], labels.permute(back))
    return True


def _linear(found: Needs, node: fx.Node, labels: Tensor) -> bool:
    x, weight, *bias = node.args
    rows = _over(labels, range(labels.dim() - 1)).reshape(-1)
    found.add(x, _over(labels, [labels.dim() - 1]))
    found.add(weight, rows[:, None])
    found.add(bias[0] if bias else node.kwargs.get("bias"), rows)
    return True


def _matmul(found: Needs, node: fx.Node, labels: Tensor) -> bool:
    added = operators.kind(node) in ("aten::addmm", "aten::baddbmm")
    a, b = node.args[added : added + 2]
    assert isinstance(a, fx.Node)
    assert isinstance(b, fx.Node)
    shapes = [operators.shape(value) for value in (a, b)]
    if min(map(len, shapes)) < 2:
        return False
    for value, shape, axis in ((a, shapes[0], -1), (b, shapes[1], -2)):
        found.add(value, _broadcast_back(_over(labels, [labels.dim() + axis]), shape))
    if added and isinstance(node.args[0], fx.Node):
        found.add(node.args[0], _broadcast_back(labels, operators.shape(node.args[0])))
    return True


def _einsum(found: Needs, node: fx.Node, labels: Tensor) -> bool:
    values: Any = node.args[1]
    inputs, _, output = str(node.args[0]).replace(" ", "").partition("->")
    terms = inputs.split(",")
    plain = output and "." not in inputs and all(len(set(term)) == len(term) for term in (*terms, output))
    if not plain:
        return False
    for value, term in zip(values, terms, strict=True):
        own = _over(labels, [axis for axis, letter in enumerate(output) if letter not in term])
        shared = [letter for letter in output if letter in term]
        own = own.reshape([own.shape[output.index(letter)] for letter in shared])
        own = own.permute([shared.index(letter) for letter in term if letter in shared])
        for axis, letter in enumerate(term):
            if letter not in output:
                own = own.unsqueeze(axis)
        found.add(value, _over(own, [axis for axis, size in enumerate(operators.shape(value)) if size == 1]))
    return True


def _softmax(found: Needs, node: fx.Node, labels: Tensor) -> bool:
    axis: Any = node.args[1]
    found.add(node.args[0], _over(labels, [axis % labels.dim()]))
    return True


def _norm(found: Needs, node: fx.Node, labels: Tensor) -> bool:
    x, shape, *scales = node.args
    count = len(shape)  # type: ignore[arg-type]  # normalized_shape
    found.add(x, _over(labels, range(labels.dim() - count, labels.dim())))
    for scale in (*scales[:2], node.kwargs.get("weight"), node.kwargs.get("bias")):
        if isinstance(scale, fx.Node):
            found.add(scale, _broadcast_back(labels, operators.shape(scale)))
    return True


def _embedding(found: Needs, node: fx.Node, labels: Tensor) -> bool:
    table, numbers = node.args[:2]
    found.add(table, _over(labels, range(labels.dim() - 1)).reshape(1, -1))
    assert isinstance(numbers, fx.Node)
    found.whole(numbers)
    return True


def _concatenate(found: Needs, node: fx.Node, labels: Tensor) -> bool:
    axis = int(operators.argument(node, 1, "dim", 0)) % labels.dim()
    start = 0
    values: Any = node.args[0]
    for value in values:
        if len(operators.shape(value)) < labels.dim():  # one of no elements, [0], goes with everything
            found.add(value, same(value, UNUSED))
            continue
        width = operators.shape(value)[axis]
        found.add(value, labels if labels.shape[axis] == 1 else labels.narrow(axis, start, width))
        start += width
    return True


def _stack(found: Needs, node: fx.Node, labels: Tensor) -> bool:
    axis = int(operators.argument(node, 1, "dim", 0)) % labels.dim()
    values: Any = node.args[0]
    for number, value in enumerate(values):
        found.add(value, labels.select(axis, number if labels.shape[axis] > 1 else 0))
    return True


def _gather(found: Needs, node: fx.Node, labels: Tensor) -> bool:
    source, axis, places = node.args[:3]
    assert isinstance(source, fx.Node)
    assert isinstance(axis, int)
    shape = operators.shape(source)
    axis %= len(shape)
    if any(have != size for i, (have, size) in enumerate(zip(shape, operators.shape(node), strict=True)) if i != axis):
        return False
    found.add(places, labels)
    found.add(source, _over(labels, [axis]))
    return True


def _scatter(found: Needs, node: fx.Node, labels: Tensor) -> bool:
    base, source = node.args[:2]
    assert isinstance(source, fx.Node)
    axis = int(operators.argument(node, 2, "dim", 0)) % labels.dim()
    found.add(base, labels)
    if labels.shape[axis] > 1:
        numbers = [operators.argument(node, place, name) for place, name in ((3, "start"), (4, "end"), (5, "step"))]
        if any(isinstance(number, fx.Node) for number in numbers):
            return False
        labels = labels.index_select(axis, torch.arange(labels.shape[axis])[slice(*numbers)])
    found.add(source, labels)
    return True


def _split(found: Needs, node: fx.Node, labels: Tensor) -> bool:
    found.add(node.args[0], labels)
    return True


def _attention(found: Needs, node: fx.Node, labels: Tensor) -> bool:
    q, k, v, *others = node.args
    shapes = [operators.shape(value) for value in (q, k, v)]  # type: ignore[arg-type]  # tensors
    rank = labels.dim()
    by_query = _over(labels, [rank - 1])
    found.add(q, _broadcast_back(by_query, shapes[0]))
    for value, shape, own in ((k, shapes[1], _over(by_query, [rank - 2])), (v, shapes[2], _over(labels, [rank - 2]))):
        if rank > 3 and shape[-3] != shapes[0][-3] and shape[-3] > 1:
            members = shapes[0][-3] // shape[-3]
            spread = own.expand(*own.shape[:-3], shapes[0][-3], *own.shape[-2:])
            apart = spread.reshape(*own.shape[:-3], shape[-3], members, *own.shape[-2:])
            own = _over(apart, [rank - 2]).squeeze(rank - 2)
        found.add(value, _broadcast_back(own, shape))
    mask = others[0] if others else node.kwargs.get("attn_mask")
    if isinstance(mask, fx.Node):
        found.add(mask, _broadcast_back(by_query, operators.shape(mask)))
    return True


_RULES: Mapping[str, Rule] = {
    **dict.fromkeys(("aten::permute", "aten::transpose", "aten::t"), _order),
    **dict.fromkeys(SPLITS, _split),
    **dict.fromkeys(operators.SOFTMAXES, _softmax),
    **dict.fromkeys(("aten::matmul", "aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm"), _matmul),
    **dict.fromkeys(("aten::scaled_dot_product_attention", "surgeon::attention"), _attention),
    **dict.fromkeys(("aten::layer_norm", "aten::rms_norm"), _norm),
    "aten::linear": _linear,
    "aten::einsum": _einsum,
    "aten::embedding": _embedding,
    "aten::cat": _concatenate,
    "aten::stack": _stack,
    "aten::gather": _gather,
    "aten::slice_scatter": _scatter,
}
