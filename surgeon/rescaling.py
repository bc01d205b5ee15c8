"""Dividing a value by a vector without an operation more: by scaling the weights that it is computed with.

``norm(h) * w`` over s is ``norm(h) * (w / s)``, and ``act(g) * (U h + b)`` over s is ``act(g) * (diag(1/s) U h + b/s)``.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from surgeon.accounting import stored_reads
from surgeon.discovery import operators
from surgeon.graph import Graph
from surgeon.rewrite import Editor


@dataclass(frozen=True)
class Factor:
    """A stored tensor t that takes a part in a value: (t + offset) is to be divided.

    Attributes:
        name: the name it is read under.
        axis: its dimension that holds the features.
        offset: what the graph adds to it.
    """

    name: str
    axis: int = 0
    offset: float = 0.0

    def divide(self, editor: Editor, scale: Tensor) -> None:
        """Divide by scale [features]."""
        tensor = editor.tensor(self.name).detach()
        shape = [1] * tensor.ndim
        shape[self.axis] = -1
        divided = (tensor.double() + self.offset) / scale.double().reshape(shape) - self.offset
        editor.set_tensor(self.name, divided.to(tensor.dtype))


class Readers:
    """Which stored tensors of a graph one node alone reads, as they are when this is made."""

    def __init__(self, graph: Graph) -> None:
        self._alone = frozenset(
            name
            for nodes in stored_reads(graph).values()
            if sum(len(node.users) for node in nodes) == 1
            for name in (str(node.target) for node in nodes)
            if graph.tensor(name).is_floating_point()
        )

    def only(self, node: fx.Node | None) -> bool:
        """Whether a node stands for a stored floating-point tensor that one node alone reads."""
        return node is not None and node.op == "get_attr" and node.target in self._alone


def divisible(
    node: fx.Node, allowed: Collection[fx.Node], readers: Readers, within: Collection[fx.Node] | None = None
) -> list[Factor] | None:
    """The tensors to divide so that the value of a node [..., features] is divided feature by feature.

    Args:
        node: of the value.
        allowed: nodes that may read it.
        readers: of the graph.
        within: nodes that may be concerned; all by default.

    Returns:
        None where it cannot be done: something else reads it too, or it is not computed with weights in a way that scales.
    """
    if not set(node.users) <= set(allowed) or (within is not None and node not in within):
        return None
    if len(node.args) > 1 and node.args[0] is node.args[1]:  # a square or a double: what divides one operand divides both
        return None
    name = operators.kind(node)
    if name == "aten::mul":
        return _product(node, readers, within)
    if name in ("aten::add", "aten::sub"):
        return _sum(node, readers, within)
    if name == "aten::linear":
        return _linear(node, readers)
    if name == "aten::layer_norm":
        sizes, weight, bias = (operators.argument(node, i, key) for i, key in enumerate(_NORM, start=1))
        return _tensors([weight, bias], readers) if isinstance(weight, fx.Node) and len(sizes) == 1 else None
    if name == "aten::relu" or name in operators.CASTS or _keeps_features(node):
        source = node.args[0]
        return divisible(source, [node], readers, within) if isinstance(source, fx.Node) else None
    return None


_NORM = ("normalized_shape", "weight", "bias")


def _product(node: fx.Node, readers: Readers, within: Collection[fx.Node] | None) -> list[Factor] | None:
    """One factor of a product; one that is stored before one that is computed."""
    factors = [source for source in node.args[:2] if isinstance(source, fx.Node)]
    for factor in sorted(factors, key=lambda source: source.op != "get_attr"):
        found = _operand(factor, node, readers, within)
        if found is not None:
            return found
    return None


def _sum(node: fx.Node, readers: Readers, within: Collection[fx.Node] | None) -> list[Factor] | None:
    """Every term of a sum; of a stored vector and a number the vector."""
    first, second = node.args[:2]
    if node.kwargs.get("alpha", 1) != 1 or not isinstance(first, fx.Node):
        return None
    if isinstance(second, int | float):
        if not readers.only(first) or len(operators.shape(first)) != 1:
            return None
        if first.meta["val"].dtype.itemsize < 4:  # w + 1 over a power of two, less 1, loses digits of w that 16 bits lack
            return None
        return [Factor(str(first.target), 0, second if operators.kind(node) == "aten::add" else -second)]
    if not isinstance(second, fx.Node):
        return None
    terms = [_operand(source, node, readers, within) for source in (first, second)]
    return None if any(term is None for term in terms) else [factor for term in terms for factor in term or ()]


def _operand(
    source: fx.Node, node: fx.Node, readers: Readers, within: Collection[fx.Node] | None
) -> list[Factor] | None:
    if operators.shape(source)[-1:] != operators.shape(node)[-1:]:
        return None
    if source.op == "get_attr":
        single = operators.shape(source)[:-1]
        return [Factor(str(source.target), len(single))] if readers.only(source) and set(single) <= {1} else None
    return divisible(source, [node], readers, within)


def _linear(node: fx.Node, readers: Readers) -> list[Factor] | None:
    weight, bias = node.args[1], operators.argument(node, 2, "bias")
    return _tensors([weight, bias], readers) if isinstance(weight, fx.Node) else None


def _tensors(nodes: list[fx.Node | None], readers: Readers) -> list[Factor] | None:
    """Weight and bias, the output features of which are their first dimension."""
    given = [node for node in nodes if node is not None]
    return [Factor(str(node.target)) for node in given] if all(map(readers.only, given)) else None


def _keeps_features(node: fx.Node) -> bool:
    """Whether a node only splits or joins the dimensions in front of the features."""
    if operators.kind(node) not in ("aten::reshape", "aten::view", "aten::_unsafe_view", "aten::clone", "aten::contiguous"):
        return False
    source = node.args[0]
    return isinstance(source, fx.Node) and operators.shape(source)[-1:] == operators.shape(node)[-1:]


def multiplied(editor: Editor, node: fx.Node, name: str, factor: Tensor) -> fx.Node:
    """Multiply a value by a stored vector [features], at the insertion point."""
    dtype = node.meta["val"].dtype
    return editor.call(torch.ops.aten.mul.Tensor, node, editor.add_tensor(name, factor.to(dtype)))
