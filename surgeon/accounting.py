"""Counting: weights, active weights, bytes and floating-point operations of a graph.

Definitions, so that two numbers of two tools can be compared:

* *Parameters* are the scalar weights that the graph reads: every ``torch.nn.Parameter``, a tensor read under several
  names (tied) once, and packed low-bit weights as the number of weights they stand for.  Scales and zero points of
  low-bit weights are not weights, and neither are buffers (tables, masks, running statistics).
* *Active parameters* are those that one token uses: of a mixture's E experts, k take part.
* *FLOPs* are 2 x multiply-accumulates of the matrix products and convolutions.  Element-wise work, norms, softmax,
  table look-ups and the unpacking of low-bit weights are not counted.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import sympy  # type: ignore[import-untyped]  # ships no types
import torch
from torch import Tensor, fx

import surgeon.ops  # noqa: F401  # registers torch.ops.surgeon
from surgeon.errors import DiscoverError, RecipeError, nearest
from surgeon.graph import Graph
from surgeon.structure import Linear

_DEQUANTIZE = torch.ops.surgeon.dequantize.default
_MOE = torch.ops.surgeon.moe.default
_SCALES = (1, 2)  # positions of scale and zero_point in dequantize's arguments
_EXPERTS = (3, 4, 5, 6)  # positions of w_in, w_out, b_in, b_out in moe's arguments

Key = tuple[int, int, int]
"""Identity of a tensor's memory: storage, offset, elements.  Tied tensors share it; parts of one storage do not."""
Share = tuple[int, int]
"""Experts that one token selects, and experts that there are."""


class Weight(NamedTuple):
    """One weight tensor that a graph reads.

    Attributes:
        name: the first name it is read under.
        parameters: number of scalar weights it stands for, 0 for scales, zero points and buffers.
        bytes: bytes of the tensor as it is stored.
        bits: bits per weight as stored (of a packed tensor: of one code).
    """

    name: str
    parameters: int
    bytes: int
    bits: int


# -- parameters and bytes -----------------------------------------------------------------------------------------


def weights(graph: Graph, nodes: Iterable[fx.Node] | None = None) -> dict[Key, Weight]:
    """The tensors that some nodes read, tied ones once.

    Args:
        graph: the graph.
        nodes: nodes whose tensors are wanted (``get_attr`` nodes among them or among their inputs); all by default.

    Returns:
        Tensors by memory, in graph order.
    """
    found: dict[Key, Weight] = {}
    for node in _reads(graph, nodes):
        tensor = graph.tensor(str(node.target))
        packing = _packing(node)
        if packing is not None:
            # packed[..., out, groups, bytes] stands for [..., out, in_features]
            shape, bits, in_features = packing
            count = tensor.numel() // math.prod(shape[-2:]) * in_features
        else:
            bits = tensor.element_size() * 8
            count = tensor.numel() if isinstance(tensor, torch.nn.Parameter) and not _is_scale(node) else 0
        key = memory(tensor)
        if key not in found or found[key].parameters < count:
            name = found[key].name if key in found else str(node.target)
            found[key] = Weight(name, count, tensor.numel() * tensor.element_size(), bits)
    return found


def memory(tensor: Tensor) -> Key:
    """Identity of the memory that a tensor occupies; equal for tied tensors, also where one is the other transposed."""
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset()), tensor.numel()


def parameter_count(graph: Graph) -> int:
    """Number of scalar weights that the graph reads, as the module's docstring defines it."""
    return sum(weight.parameters for weight in weights(graph).values())


def weight_bytes(graph: Graph) -> int:
    """Bytes of every tensor that the graph reads, as stored: packed weights, scales and buffers included, tied once."""
    return sum(weight.bytes for weight in weights(graph).values())


def active_parameter_count(
    graph: Graph, nodes: Iterable[fx.Node] | None = None, shares: Mapping[Key, Share] | None = None
) -> int:
    """Number of weights that take part in one token.

    Of the expert tensors of ``surgeon::moe`` with E experts of which k are selected, the share k / E counts; experts
    that several mixtures read add up, to E at most.  Everything else counts in full.

    Args:
        graph: the graph.
        nodes: count the weights that these nodes read; all by default.
        shares: :func:`expert_shares` of the graph, for who counts many parts of one graph.
    """
    shares = expert_shares(graph) if shares is None else shares
    count = 0
    for key, weight in weights(graph, nodes).items():
        selected, experts = shares.get(key, (1, 1))
        count += weight.parameters * min(selected, experts) // experts
    return count


def expert_shares(graph: Graph) -> dict[Key, Share]:
    """For the memory of every tensor of experts, how many are selected (by all mixtures that read it) of how many."""
    selected: Counter[Key] = Counter()
    experts: dict[Key, int] = {}
    for node in graph.module.graph.find_nodes(op="call_function", target=_MOE):
        total, k = (int(_operand(node, position).meta["val"].shape[axis]) for position, axis in ((3, 0), (1, 1)))
        keys = {
            memory(graph.tensor(str(source.target)))
            for position in _EXPERTS
            if isinstance(operand := _operand(node, position), fx.Node)
            for source in _sources(operand)
        }
        for key in keys:
            selected[key] += k
            experts[key] = total
    return {key: (selected[key], total) for key, total in experts.items()}


def _reads(graph: Graph, nodes: Iterable[fx.Node] | None) -> list[fx.Node]:
    """``get_attr`` nodes among ``nodes`` and among their inputs."""
    if nodes is None:
        return list(graph.module.graph.find_nodes(op="get_attr"))
    found: dict[fx.Node, None] = {}
    for node in nodes:
        for candidate in (node, *node.all_input_nodes):
            if candidate.op == "get_attr":
                found.setdefault(candidate)
    return list(found)


def _sources(node: fx.Node) -> set[fx.Node]:
    """``get_attr`` nodes that ``node`` is computed from."""
    seen, stack = {node}, [node]
    while stack:
        for source in stack.pop().all_input_nodes:
            if source not in seen:
                seen.add(source)
                stack.append(source)
    return {source for source in seen if source.op == "get_attr"}


def _operand(node: fx.Node, position: int) -> Any:
    """Argument of an operator by its position in the schema, however it was passed; None where it was left out."""
    if position < len(node.args):
        return node.args[position]
    return node.kwargs.get(_operator(node)._schema.arguments[position].name)


def _packing(node: fx.Node) -> tuple[tuple[int, ...], int, int] | None:
    """Shape of the packed operand, bits and in_features of the ``dequantize`` that reads ``node`` as codes.

    Codes may be sliced or gathered on the way (only the rows that an embedding looks up are unpacked).
    """
    for reader, position in _readers(node):
        if reader.target is _DEQUANTIZE and position == 0:
            packed = reader.args[0]
            assert isinstance(packed, fx.Node)  # the schema says Tensor
            shape = tuple(int(size) if isinstance(size, int) else -1 for size in packed.meta["val"].shape)
            return shape, int(_operand(reader, 3)), int(_operand(reader, 5))
    return None


def _is_scale(node: fx.Node) -> bool:
    """Whether a tensor is read as scales or zero points only."""
    readers = list(_readers(node))
    return bool(readers) and all(r.target is _DEQUANTIZE and position in _SCALES for r, position in readers)


_SELECTING = {
    getattr(torch.ops.aten, name)
    for name in ("embedding", "index_select", "index", "slice", "select", "reshape", "view", "expand", "alias", "clone")
}


def _readers(node: fx.Node) -> Iterator[tuple[fx.Node, int]]:
    """Nodes that read ``node``'s elements, and at which argument, seen through operators that select or reshape."""
    for user in node.users:
        if not _is_operator(user):  # the graph's output
            yield user, 0
            continue
        for position in range(len(_operator(user)._schema.arguments)):
            operand = _operand(user, position)
            if operand is node:
                if position == 0 and _operator(user).overloadpacket in _SELECTING:
                    yield from _readers(user)
                else:
                    yield user, position
            elif isinstance(operand, list | tuple) and node in operand:
                yield user, position


def _is_operator(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload)


def _operator(node: fx.Node) -> torch._ops.OpOverload[..., Any]:
    assert isinstance(node.target, torch._ops.OpOverload)  # a canonical graph calls nothing else
    return node.target


# -- floating-point operations ------------------------------------------------------------------------------------


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
        if _operator(node).overloadpacket in _PRODUCTS_WITH_WEIGHTS:
            spent[math.prod(size.of(node)[:-1])] += count
    return max(1, spent.most_common(1)[0][0]) if spent else 1


def flops_by_node(graph: Graph, nodes: Iterable[fx.Node], sizes: Mapping[str, int] | None = None) -> dict[fx.Node, int]:
    """FLOPs of each node that has any; arguments as in :func:`flops`."""
    size = _Sizes(graph, sizes)
    counted = {node: _node_flops(node, size) for node in nodes if node.op == "call_function" and _is_operator(node)}
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
    packet = _operator(node).overloadpacket
    if packet in _LINEAR:
        return 2 * math.prod(size.of(node)) * size.of(_operand(node, 0))[-1]
    if packet in _PRODUCTS or packet in _ADDED_PRODUCTS:
        left = size.of(_operand(node, 1 if packet in _ADDED_PRODUCTS else 0))
        batch = left[0] if packet is _aten.addbmm else 1  # the one product that sums over its batch
        return 2 * math.prod(size.of(node)) * left[-1] * batch
    if packet in _TRANSPOSED or (packet is _aten.convolution and _operand(node, 6)):
        return 2 * math.prod(size.of(_operand(node, 0))) * math.prod(size.of(_operand(node, 1))[1:])
    if packet in _CONVOLUTIONS:
        return 2 * math.prod(size.of(node)) * math.prod(size.of(_operand(node, 1))[1:])
    if packet in (_aten.scaled_dot_product_attention, torch.ops.surgeon.attention):
        query, key, value = (size.of(_operand(node, position)) for position in range(3))
        return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])
    if packet is torch.ops.surgeon.moe:
        tokens, k = size.of(_operand(node, 1))
        return 2 * tokens * k * sum(math.prod(size.of(_operand(node, position))[1:]) for position in (3, 4))
    if packet is _aten.einsum:
        from torch.utils.flop_counter import FlopCounterMode  # brings Triton, which takes long

        with FlopCounterMode(display=False) as counter:
            torch.einsum(_operand(node, 0), *(torch.empty(size.of(x), device="meta") for x in _operand(node, 1)))
        return int(counter.get_total_flops())
    return 0


# -- what a rewrite frees -----------------------------------------------------------------------------------------


def nodes_of(linears: Iterable[Linear]) -> set[fx.Node]:
    """The nodes that some linears consist of, from their inputs (excluded) on, without what other nodes read too.

    A linear can be several nodes: a transposition of the weight, the product, the bias added behind it.
    """
    found: set[fx.Node] = set()
    ends = set()
    for linear in linears:
        ends.add(linear.node)
        stack = [linear.node]
        while stack:
            node = stack.pop()
            if node is not linear.input and node not in found and node.op == "call_function":
                found.add(node)
                stack.extend(node.all_input_nodes)
    while shared := {n for n in found - ends if any(user not in found for user in n.users)}:
        found -= shared
    return found


def freed_parameter_count(graph: Graph, readers: Collection[fx.Node], names: Collection[str] | None = None) -> int:
    """Number of weights that nothing reads any more once ``readers`` are gone.

    Args:
        graph: the graph before.
        readers: nodes that a rewrite removes (``get_attr`` nodes need not be among them).
        names: only these tensors are meant, by the name they are read under; all that ``readers`` read by default.
    """
    gone = set(readers)
    kept = weights(graph, [node for node in graph.module.graph.nodes if node.op != "get_attr" and node not in gone])
    read = weights(graph, readers)
    wanted = None if names is None else {memory(graph.tensor(name)) for name in names}
    return sum(weight.parameters for key, weight in read.items() if key not in kept and (wanted is None or key in wanted))
