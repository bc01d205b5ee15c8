"""Weights of a graph as matrices to be written: floats as they are, low-bit weights as their codes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, fx

import surgeon.ops  # noqa: F401  # registers torch.ops.surgeon
from surgeon.backends._gguf_parts import Matrix
from surgeon.discovery.flow import Flow
from surgeon.discovery.linears import stored
from surgeon.graph import Graph
from surgeon.numerics import QuantizedTensor
from surgeon.resizing import constant_value
from surgeon.structure import Embedding, Linear

_DEQUANTIZE = torch.ops.surgeon.dequantize.default


def matrix(graph: Graph, flow: Flow, linear: Linear, label: str) -> Matrix:
    """The weight of a linear [out, in] with its bias, the part that it means.

    Raises:
        ValueError: it is stored in a form that is not read here.
    """
    found = whole(graph, flow, linear, label)
    rows = None
    if linear.rows is not None:
        rows = torch.arange(*linear.rows)
    elif linear.index is not None:
        rows = torch.tensor(linear.index)
    columns = None if linear.columns is None else torch.arange(*linear.columns)
    bias = found.bias if found.bias is None or rows is None else found.bias[rows]
    shape = (found.shape[0] if rows is None else len(rows), found.shape[1] if columns is None else len(columns))
    return replace(found, shape=shape, rows=rows, columns=columns, bias=bias)


def whole(graph: Graph, flow: Flow, linear: Linear, label: str) -> Matrix:
    """The weight of a linear with all its rows, and its whole bias."""
    found = _weight(graph, flow, _operand(flow, linear), f"{label} ({linear.weight})", transposed=linear.transposed)
    bias = None if linear.bias is None else graph.tensor(linear.bias).detach().reshape(-1)
    return replace(found, bias=bias)


def table(graph: Graph, flow: Flow, part: Embedding, label: str) -> Matrix:
    """A look-up table [rows, width]."""
    for node in part.node.all_input_nodes:
        if node in flow.constant and (held := stored(node, flow)) is not None and held.name == part.weight:
            return _weight(graph, flow, node, f"{label} ({part.weight})")
    return Matrix(f"{label} ({part.weight})", (part.rows, part.width), lambda: graph.tensor(part.weight).detach())


def stack(graph: Graph, flow: Flow, node: fx.Node, label: str, picked: Tensor | None) -> Matrix:
    """Weights of experts [experts, out, in], or one of them for each that is picked."""
    found = _weight(graph, flow, node, label)
    return found if picked is None else replace(found, shape=(len(picked), *found.shape[1:]), picked=picked)


def _operand(flow: Flow, linear: Linear) -> fx.Node:
    """The operand that the weight is read by.

    Raises:
        ValueError: the linear was factored, or reads its weight in another way.
    """
    if linear.factors:
        raise ValueError(f"{linear.weight} is half of a factored matrix, and formats have one matrix: leave out low_rank here")
    nodes = [linear.node]
    while nodes:
        here = nodes.pop(0)
        for node in here.all_input_nodes:
            if node in flow.constant:
                held = stored(node, flow)
                if held is not None and held.name == linear.weight:
                    return node
            elif node is not linear.input and len(nodes) < 4 and node in flow:
                nodes.append(node)
    raise ValueError(f"the weight {linear.weight} is read in a way that is not known")


def _weight(graph: Graph, flow: Flow, node: fx.Node, label: str, *, transposed: bool = False) -> Matrix:
    """A constant operand as a matrix; its codes where ``surgeon::dequantize`` is behind it."""
    inner = node
    while inner.op == "call_function" and inner.target is not _DEQUANTIZE and isinstance(inner.args[0], fx.Node):
        inner = inner.args[0]
    if inner.target is _DEQUANTIZE:
        if transposed:
            raise ValueError(f"{label}: its codes lie in columns, [in, out], and blocks of the format lie in rows")
        return Matrix(label, _shape(inner), _maker(graph, inner), _codes(graph, inner))
    held = stored(node, flow)
    make = _maker(graph, node)
    # A linear says of the stored tensor whether it is [in, out]; an operand that is the transposed one is [out, in] again.
    if transposed != (held is not None and held.swapped):
        return Matrix(label, (*_shape(node)[:-2], _shape(node)[-1], _shape(node)[-2]), lambda: make().mT)
    return Matrix(label, _shape(node), make)


def _shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(int(size) for size in node.meta["val"].shape)


def _codes(graph: Graph, node: fx.Node) -> QuantizedTensor:
    packed, scale, zero, bits, group, in_features = cast("tuple[Any, ...]", node.args)
    tensors = [None if n is None else _maker(graph, n)() for n in (packed, scale, zero)]
    assert tensors[0] is not None
    assert tensors[1] is not None
    return QuantizedTensor(tensors[0], tensors[1], tensors[2], bits, group, in_features)


def _maker(graph: Graph, node: fx.Node) -> Callable[[], Tensor]:
    """Computes what a constant node is, from stored tensors."""

    def make() -> Tensor:
        value = constant_value(graph, node)
        assert value is not None
        return value

    return make
