"""Counting: weights, active weights and bytes of a graph.

Definitions, so that two numbers of two tools can be compared:

* *Parameters* are the scalar weights that the graph reads: every ``torch.nn.Parameter``, a tensor read under several
  names (tied) once, and packed low-bit weights as the number of weights they stand for.  Scales and zero points of
  low-bit weights are not weights, and neither are buffers (tables, masks, running statistics).
* *Active parameters* are those that one token uses: of a mixture's E experts, k take part.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

import surgeon.ops  # noqa: F401  # registers torch.ops.surgeon
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


def stored_reads(graph: Graph) -> dict[Key, list[fx.Node]]:
    """The ``get_attr`` nodes of a graph by the memory that they read; tied tensors are together."""
    found: dict[Key, list[fx.Node]] = {}
    for node in graph.module.graph.find_nodes(op="get_attr"):
        found.setdefault(memory(graph.tensor(str(node.target))), []).append(node)
    return found


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
        total, k = (int(operand(node, position).meta["val"].shape[axis]) for position, axis in ((3, 0), (1, 1)))
        keys = {
            memory(graph.tensor(str(source.target)))
            for position in _EXPERTS
            if isinstance(value := operand(node, position), fx.Node)
            for source in _sources(value)
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


def operand(node: fx.Node, position: int) -> Any:
    """Argument of an operator by its position in the schema, however it was passed; None where it was left out."""
    if position < len(node.args):
        return node.args[position]
    return node.kwargs.get(operator_of(node)._schema.arguments[position].name)


def _packing(node: fx.Node) -> tuple[tuple[int, ...], int, int] | None:
    """Shape of the packed operand, bits and in_features of the ``dequantize`` that reads ``node`` as codes.

    Codes may be sliced or gathered on the way (only the rows that an embedding looks up are unpacked).
    """
    for reader, position in _readers(node):
        if reader.target is _DEQUANTIZE and position == 0:
            packed = reader.args[0]
            assert isinstance(packed, fx.Node)  # the schema says Tensor
            shape = tuple(int(size) if isinstance(size, int) else -1 for size in packed.meta["val"].shape)
            return shape, int(operand(reader, 3)), int(operand(reader, 5))
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
        if not is_operator(user):  # the graph's output
            yield user, 0
            continue
        for position in range(len(operator_of(user)._schema.arguments)):
            value = operand(user, position)
            if value is node:
                if position == 0 and operator_of(user).overloadpacket in _SELECTING:
                    yield from _readers(user)
                else:
                    yield user, position
            elif isinstance(value, list | tuple) and node in value:
                yield user, position


def is_operator(node: fx.Node) -> bool:
    """Whether a node calls an operator; the graph's inputs, outputs and weights do not."""
    return isinstance(node.target, torch._ops.OpOverload)


def operator_of(node: fx.Node) -> torch._ops.OpOverload[..., Any]:
    """The operator that a node calls."""
    assert isinstance(node.target, torch._ops.OpOverload)  # a canonical graph calls nothing else
    return node.target


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
