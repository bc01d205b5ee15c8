"""Rule 16 of :mod:`surgeon.canonical`: a weight that is computed becomes one.

    y = linear(x, f(v, g)),  v and g stored   ->   y = linear(x, w),  w = f(v, g)

Reparametrised weights are stored as something else than what a layer multiplies with: a direction and a length
(``weight_norm``, Salimans & Kingma 2016, arXiv:1602.07868), a matrix and its largest singular value (``spectral_norm``), a
matrix and a mask (``torch.nn.utils.prune``), a matrix and an adapter ``W + s B A`` (LoRA, arXiv:2106.09685), or whatever a
forward makes of its parameters.  No pass could take rows of such a layer; after training it is a layer like any other.

Only what arithmetic enters is computed: of views, casts and concatenations of stored tensors discovery knows which rows are
whose, and codes under ``surgeon::dequantize`` are a form of weights that passes and backends know.  Convolutions over several
positions stay as they are spelled, since no pass takes their weights apart, and a checkpoint for the model's class needs the
tensors that this class has.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, fx

import surgeon.ops  # noqa: F401  # registers torch.ops.surgeon
from surgeon.canonical_facts import is_random, is_static

_READERS = ("aten::linear", "aten::embedding")
_ARRANGING = (
    "aten::_to_copy",
    "aten::cat",
    "aten::clone",
    "aten::contiguous",
    "aten::flip",
    "aten::index",
    "aten::index_select",
    "aten::repeat",
    "aten::reshape",
    "aten::roll",
    "aten::stack",
)
"""Operators that put elements elsewhere and are no views."""


def computed_weights(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """Nodes that layers read as weight or bias and that are computed from stored tensors with arithmetic.

    Args:
        graph: canonical but for this rule.

    Returns:
        For each of them, in order, the nodes that it is computed by, stored tensors included, in order.
    """
    stored: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "get_attr" or (node.op == "call_function" and _is_computed(node, stored)):
            stored.add(node)
    found = {}
    for node in graph.nodes:
        if node.op == "call_function" and node in stored and any(_reads_weight(user, node) for user in node.users):
            above = _above(node)
            if any(not _arranges(source) for source in above) and any(source.op == "get_attr" for source in above):
                found[node] = [source for source in graph.nodes if source in above]
    return found


def evaluate(node: fx.Node, above: list[fx.Node], tensors: Mapping[fx.Node, Tensor]) -> Tensor:
    """The value of a node that :func:`computed_weights` found.

    Args:
        node: that node.
        above: what it is computed by.
        tensors: the stored tensors among those.
    """
    values: dict[fx.Node, Any] = dict(tensors)
    with torch.no_grad():
        for source in above:
            if source.op != "get_attr":
                args, kwargs = fx.node.map_arg((source.args, source.kwargs), values.__getitem__)
                values[source] = source.target(*args, **kwargs)  # type: ignore[operator]  # an operator of torch
    result = values[node]
    assert isinstance(result, Tensor)
    return result.contiguous()


def name_of(above: list[fx.Node], reader: str) -> str:
    """What the weight is called: as its layer's would be, next to the stored tensors that it is computed from.

    Args:
        above: what it is computed by.
        reader: ``weight`` or ``bias``.
    """
    names = [str(source.target) for source in above if source.op == "get_attr"]
    owners = [name.split(".")[:-1] for name in names]
    owner = [parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, zip(*owners, strict=False))]
    if "parametrizations" in owner:  # torch.nn.utils.parametrize keeps the stored tensors below the layer
        owner = owner[: owner.index("parametrizations")]
    return ".".join([*owner, reader])


def reader_of(node: fx.Node) -> str:
    """``weight`` or ``bias``: what the layers read it as."""
    return "weight" if any(_argument(user, 1, "weight") is node or _embeds(user, node) for user in node.users) else "bias"


def _is_computed(node: fx.Node, stored: set[fx.Node]) -> bool:
    value = node.meta.get("val")
    if isinstance(value, tuple | list):  # several results, one of which is taken next
        whole = all(isinstance(item, Tensor) and is_static(item) for item in value)
    else:
        whole = isinstance(value, Tensor) and is_static(value)
    known = node.target is torch.ops.surgeon.dequantize.default
    return whole and not known and not is_random(node.target) and all(source in stored for source in node.all_input_nodes)


def _reads_weight(user: fx.Node, node: fx.Node) -> bool:
    if not isinstance(user.target, torch._ops.OpOverload) or user.target._schema.name not in _READERS:
        return False
    return _embeds(user, node) or node in (_argument(user, 1, "weight"), _argument(user, 2, "bias"))


def _embeds(user: fx.Node, node: fx.Node) -> bool:
    """Whether it is a table that tokens are looked up in, which comes first among the arguments."""
    target = user.target
    if not isinstance(target, torch._ops.OpOverload) or target._schema.name != "aten::embedding":
        return False
    return _argument(user, 0, "weight") is node


def _argument(user: fx.Node, position: int, name: str) -> object:
    target = user.target
    if not isinstance(target, torch._ops.OpOverload) or (target._schema.name == "aten::embedding" and position):
        return None
    return user.args[position] if len(user.args) > position else user.kwargs.get(name)


def _arranges(node: fx.Node) -> bool:
    """Whether a node computes nothing."""
    if node.op == "get_attr" or node.target is operator.getitem:
        return True
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    return target.is_view or target._schema.name in _ARRANGING or not node.all_input_nodes


def _above(node: fx.Node) -> set[fx.Node]:
    found: set[fx.Node] = set()
    pending = [node]
    while pending:
        source = pending.pop()
        if source not in found:
            found.add(source)
            pending.extend(source.all_input_nodes)
    return found
