"""Floating-point operations of a graph: 2 x multiply-accumulates of the matrix products and convolutions.

Element-wise work, norms, softmax, table look-ups and the unpacking of low-bit weights are not counted.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import sympy  # type: ignore[import-untyped]  # ships no types
import torch
from torch import fx

import surgeon.ops  # noqa: F401  # registers torch.ops.surgeon
from surgeon.accounting import is_operator, operand, operator_of
from surgeon.errors import DiscoverError, RecipeError, nearest
from surgeon.graph import Graph


def flops(graph: Graph, nodes: Collection[fx.Node] | None = None, sizes: Mapping[str, int] | None = None) -> int:
    """FLOPs of one forward run of some nodes.

    ============================================  ==============================================================
    linear, mm, addmm, bmm, baddbmm, matmul       2 x elements of the result x length of the contracted dimension
    convolution                                   2 x elements of the result x weights per output channel
    (transposed convolution)                      2 x elements of the input x weights per input channel
    scaled_dot_product_attention                  2 x L x S x (D + Dv) for each batch and query head, masked or not
    surgeon::attention                            likewise
    surgeon::moe                                  2 x T x k x (O H + G I)
    einsum                                        as ``torch.utils.flop_counter`` counts it
    ============================================  ==============================================================

    Args:
        graph: the graph; shapes come from its fake tensors.
        nodes: which nodes to count, all by default.
        sizes: sizes of dynamic dimensions by name, such as ``{"batch": 1, "sequence": 128}``; dimensions that are not
            named have the size of the graph's example.

    Raises:
        RecipeError: ``sizes`` names a dimension that the graph does not have.
        DiscoverError: a shape depends on data.
    """
    chosen = graph.module.graph.nodes if nodes is None else nodes
    return sum(flops_by_node(graph, chosen, sizes).values())


def flops_per_token(
    graph: Graph,
    nodes: Collection[fx.Node] | None = None,
    sizes: Mapping[str, int] | None = None,
    tokens: int | None = None,
) -> int:
    """:func:`flops` divided by the number of tokens, rounded.

    The scores and values of attention make this depend on the sequence length in ``sizes``: 2 x S x (D + Dv) x heads
    per token and attention, to which a causal mask makes no difference here.

    Args:
        graph: the graph.
        nodes: which nodes to count, all by default; the number of tokens is the whole graph's all the same.
        sizes: as in :func:`flops`.
        tokens: number of tokens, :func:`token_count` by default.
    """
    return round(flops(graph, nodes, sizes) / (tokens or token_count(graph, sizes)))


def token_count(graph: Graph, sizes: Mapping[str, int] | None = None) -> int:
    """Number of tokens of one forward run: batch x sequence, also where the inputs are not token ids.

    A product with a weight acts on some number of positions (elements of the result / output features; rows of x for
    ``surgeon::moe``).  The number of positions on which most FLOPs are spent is the number of tokens: patches and class
    token for an image model, whatever heads and poolers see fewer positions.

    Args:
        graph: the graph.
        sizes: as in :func:`flops`.

    Returns:
        At least 1.
    """
    size = _Sizes(graph, sizes)
    spent: Counter[int] = Counter()
    for node, count in flops_by_node(graph, graph.module.graph.nodes, sizes).items():
        if operator_of(node).overloadpacket in _PRODUCTS_WITH_WEIGHTS:
            spent[math.prod(size.of(node)[:-1])] += count
    return max(1, spent.most_common(1)[0][0]) if spent else 1


def flops_by_node(graph: Graph, nodes: Iterable[fx.Node], sizes: Mapping[str, int] | None = None) -> dict[fx.Node, int]:
    """FLOPs of each node that has any; arguments as in :func:`flops`."""
    size = _Sizes(graph, sizes)
    counted = {node: _node_flops(node, size) for node in nodes if node.op == "call_function" and is_operator(node)}
    return {node: count for node, count in counted.items() if count}


class _Sizes:
    """Turns the symbolic sizes of fake tensors into numbers."""

    def __init__(self, graph: Graph, sizes: Mapping[str, int] | None) -> None:
        for name in sizes or {}:
            if name not in graph.dims:
                raise RecipeError(f"sizes: the graph has no dimension {name!r}; {nearest(name, graph.dims)}")
        self._symbols: dict[sympy.Symbol, sympy.Integer] = {}
        placeholders = graph.module.graph.find_nodes(op="placeholder")
        for node, port in zip(placeholders, graph.inputs, strict=True):
            shapes = zip(node.meta["val"].shape, port.shape, graph.example[port.name].shape, strict=True)
            for value, dim, example in shapes:
                if not isinstance(value, int) and value.node.expr.is_Symbol:
                    self._symbols[value.node.expr] = sympy.Integer((sizes or {}).get(str(dim), int(example)))

    def of(self, node: Any) -> tuple[int, ...]:
        """Shape of the tensor that ``node`` computes."""
        return tuple(self._number(size, node) for size in node.meta["val"].shape)

    def _number(self, value: int | torch.SymInt, node: fx.Node) -> int:
        if isinstance(value, int):
            return value
        number = value.node.expr.xreplace(self._symbols)
        if not number.is_number:
            raise DiscoverError(f"{node.name}: the size {value} depends on data, so its operations cannot be counted")
        return int(number)


_aten = torch.ops.aten
_LINEAR = {_aten.linear}
_PRODUCTS = {_aten.mm, _aten.bmm, _aten.matmul, _aten.mv, _aten.dot, _aten.inner}
_ADDED_PRODUCTS = {_aten.addmm, _aten.baddbmm, _aten.addmv, _aten.addbmm}
_CONVOLUTIONS = {_aten.conv1d, _aten.conv2d, _aten.conv3d, _aten.convolution}
_TRANSPOSED = {_aten.conv_transpose1d, _aten.conv_transpose2d, _aten.conv_transpose3d}
_PRODUCTS_WITH_WEIGHTS = {_aten.linear, _aten.mm, _aten.addmm, torch.ops.surgeon.moe}


def _node_flops(node: fx.Node, size: _Sizes) -> int:
    packet = operator_of(node).overloadpacket
    if packet in _LINEAR:
        return 2 * math.prod(size.of(node)) * size.of(operand(node, 0))[-1]
    if packet in _PRODUCTS or packet in _ADDED_PRODUCTS:
        left = size.of(operand(node, 1 if packet in _ADDED_PRODUCTS else 0))
        batch = left[0] if packet is _aten.addbmm else 1  # the one product that sums over its batch
        return 2 * math.prod(size.of(node)) * left[-1] * batch
    if packet in _TRANSPOSED or (packet is _aten.convolution and operand(node, 6)):
        return 2 * math.prod(size.of(operand(node, 0))) * math.prod(size.of(operand(node, 1))[1:])
    if packet in _CONVOLUTIONS:
        return 2 * math.prod(size.of(node)) * math.prod(size.of(operand(node, 1))[1:])
    if packet in (_aten.scaled_dot_product_attention, torch.ops.surgeon.attention):
        query, key, value = (size.of(operand(node, position)) for position in range(3))
        return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])
    if packet is torch.ops.surgeon.moe:
        tokens, k = size.of(operand(node, 1))
        return 2 * tokens * k * sum(math.prod(size.of(operand(node, position))[1:]) for position in (3, 4))
    if packet is _aten.einsum:
        from torch.utils.flop_counter import FlopCounterMode  # brings Triton, which takes long

        with FlopCounterMode(display=False) as counter:
            torch.einsum(operand(node, 0), *(torch.empty(size.of(x), device="meta") for x in operand(node, 1)))
        return int(counter.get_total_flops())
    return 0
