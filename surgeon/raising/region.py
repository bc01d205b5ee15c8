"""A part of a graph as a function: from the values at a cut, and other weights, to the value of its exit."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from surgeon.discovery import operators
from surgeon.discovery.flow import Flow

_OF_DATA = "known_only_from_data"


class Region:
    """The nodes between a cut and an exit, to be run on any values of the cut and any weights.

    Attributes:
        exit: its last node.
        cut: nodes whose values are given.
        program: the nodes to run, in order, sizes and weights among them.
        names: names of the floating-point tensors that it reads, in the order in which they are read.
        complete: whether the exit follows from the cut and stored tensors alone, and from all of the cut.
        way: nodes of one path that leads past the cut, from an input of the graph to the exit; none where there is no such.
    """

    def __init__(self, flow: Flow, exit: fx.Node, cut: Collection[fx.Node], reach: int | None = None) -> None:
        """Walk back from the exit; gives up (``complete`` is false) at an input of the graph.

        Args:
            flow: data flow.
            exit: last node.
            cut: nodes to stop at.
            reach: give up also at activations before this position of the graph.
        """
        self.flow = flow
        self.exit = exit
        self.cut = tuple(cut)
        self.complete = False
        self.way: frozenset[fx.Node] = frozenset()
        reader: dict[fx.Node, fx.Node | None] = {exit: None}
        used: set[fx.Node] = set()
        stack = [exit]
        while stack:
            node = stack.pop()
            if node in self.cut:
                used.add(node)
                continue
            early = reach is not None and flow.index[node] < reach and node not in flow.constant
            if (node.op == "placeholder" or early) and isinstance(operators.value(node), Tensor):
                self.way = _path(node, reader)
                return
            if not is_size(node):
                for source in node.all_input_nodes:
                    if source not in reader:
                        reader[source] = node
                        stack.append(source)
        if len(used) < len(self.cut):
            return
        self.complete = True
        self.program = flow.ordered(node for node in reader if node not in used)
        reads = [node for node in self.program if node.op == "get_attr" and operators.is_float(node)]
        self.names = tuple(dict.fromkeys(str(node.target) for node in reads))

    def run(self, given: Mapping[fx.Node, Tensor], tensors: Mapping[str, Tensor]) -> Tensor:
        """The exit's value.

        Args:
            given: one value per node of the cut, of the traced sizes.
            tensors: values for stored tensors; those not named here have their own.

        Raises:
            RuntimeError: an operator does not accept these values.
        """
        values: dict[fx.Node, Any] = dict(given)
        with torch.no_grad():
            for node in self.program:
                values[node] = self._value(node, values, tensors)
        result: Tensor = values[self.exit]
        return result

    def _value(self, node: fx.Node, values: Mapping[fx.Node, Any], tensors: Mapping[str, Tensor]) -> Any:
        if is_size(node):
            found = node.meta["val"]
            return found if isinstance(found, int | float | bool) else operators.hint(found)
        if node.op == "get_attr":
            name = str(node.target)
            return tensors[name] if name in tensors else self.flow.graph.tensor(name).detach()
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        return node.target(*args, **kwargs)  # type: ignore[operator]  # a call_function target

    def signature(self) -> tuple[Any, ...]:
        """What the region computes, apart from which weights of these shapes: equal signatures, equal functions."""
        place: dict[fx.Node, Any] = {node: f"cut{number}" for number, node in enumerate(self.cut)}
        rows: list[Any] = [(self.flow.index[node] < 0, _type(node)) for node in self.cut]
        for number, node in enumerate(self.program):
            place[node] = f"%{number}"
            if is_size(node):
                found = node.meta["val"]
                rows.append(str(found if isinstance(found, int | float | bool) else found.node.expr))
                continue
            if node.op == "get_attr":
                name = str(node.target)
                rows.append(("read", self.names.index(name) if name in self.names else name, _type(node)))
                continue
            args = fx.node.map_arg((node.args, node.kwargs), place.__getitem__)
            rows.append((str(node.target), repr(args)))
        return (*rows, place[self.exit])


def _path(node: fx.Node, reader: Mapping[fx.Node, fx.Node | None]) -> frozenset[fx.Node]:
    """A node, what reads it, and so on up to the last reader."""
    found = [node]
    while (following := reader[found[-1]]) is not None:
        found.append(following)
    return frozenset(found)


def is_size(node: fx.Node) -> bool:
    """Whether a node's value is a number that is known without running the graph."""
    value = node.meta.get("val")
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        return not _of_data(node)
    return isinstance(value, int | float | bool)


def is_sized(node: fx.Node) -> bool:
    """Whether a node's value is a tensor whose shape does not depend on data."""
    return isinstance(node.meta.get("val"), Tensor) and not _of_data(node)


def _of_data(node: fx.Node) -> bool:
    """Whether the node's value, a number or a tensor's shape, is known only from data."""
    value = node.meta["val"]
    known = node.meta.get(_OF_DATA)  # looks through expressions, and is asked for again and again
    if known is None or known[0] is not value:
        known = node.meta[_OF_DATA] = (value, bool(free_unbacked_symbols(value)))
    found: bool = known[1]
    return found


def _type(node: fx.Node) -> tuple[Any, ...]:
    value = operators.value(node)
    return tuple(str(size) for size in value.shape), str(value.dtype)
