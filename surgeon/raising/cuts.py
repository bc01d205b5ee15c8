"""Where a mixture of experts may be cut out of a graph: its exit, its input, and what its router hands over.

Nothing here looks at how tokens are dispatched.  A cut is a set of nodes; whether the mixture follows from them alone is a
question of reachability, and whether it is the operator's function of them is decided by evaluation (``match``).

    index and weight   experts [T, k] and their weights [T, k]
    index              the same without weights
    mask and weight    one-hot rows [T, k, E], some of them blanked (dropped tokens), and weights [T, k]
    choice and weight  tokens that each expert chose [E, c] and their weights [E, c]
    dense              a weight for every expert [T, E]
    bound              the same, of which those count that reach a bound [T, 1]
    slots              weights [T, E, C] of the one token in each of an expert's C places, with or without the same as ones
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import networkx
import torch
from torch import Tensor, fx

from surgeon.discovery import operators
from surgeon.discovery.flow import Flow
from surgeon.raising.region import is_size, is_sized

REACH = 120
"""How many nodes before the experts' input the router may start."""

_DISPATCH = operators.LOOKUPS | operators.REPETITIONS | operators.RESHAPES | operators.CASTS | {
    "aten::gather",
    "aten::mul",
    "aten::stack",
    "aten::cat",
    "aten::index_put",
    "aten::masked_select",
    "getitem",
    *operators.NARROWINGS,
}
"""What may stand between the experts' input and an expert."""

_SELECTIONS = frozenset({operators.TOPK, *(f"aten::{name}" for name in "max min argmax argmin sort argsort".split())})
"""Operators whose integers are positions along a dimension of what they read."""

_SPLITS = frozenset(f"aten::{name}" for name in "split split_with_sizes chunk tensor_split unsafe_split unsafe_chunk".split())


@dataclass(frozen=True)
class Routing:
    """What the router hands over.

    Attributes:
        kind: ``index``, ``mask``, ``choice``, ``dense``, ``bound`` or ``slots``.
        source: experts, mask, tokens, dense weights, or weights of places.
        weight: node of the weights (of ``slots``: of the ones; of ``bound``: of the bound), or None.
        k: experts per token; E where every expert has a weight.
    """

    kind: str
    source: fx.Node
    weight: fx.Node | None
    k: int

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """The nodes of the cut."""
        return (self.source,) if self.weight is None else (self.source, self.weight)


def followers(flow: Flow) -> dict[fx.Node, fx.Node]:
    """For every node that the output depends on, the next node that all its paths to the output pass through."""
    (output,) = (node for node in flow.nodes if node.op == "output")
    backwards: networkx.DiGraph = networkx.DiGraph()
    backwards.add_node(output)
    for node in flow.nodes:
        if not is_size(node):
            backwards.add_edges_from((node, source) for source in node.all_input_nodes if not is_size(source))
    return {node: last for node, last in networkx.immediate_dominators(backwards, output).items() if last is not node}


def exits(flow: Flow, follower: dict[fx.Node, fx.Node], seed: fx.Node) -> Iterator[fx.Node]:
    """Nodes that everything computed from a weight passes through: where its mixture may end, first ones first."""
    node = seed
    while node in follower:
        node = follower[node]
        if node in flow and node not in flow.constant and is_sized(node):
            yield node


def first_reader(flow: Flow, seed: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The first operator that combines a weight with activations, and the activation it reads."""
    stack, seen = [seed], {seed}
    best: tuple[fx.Node, fx.Node] | None = None
    while stack:
        node = stack.pop()
        for user in node.users:
            if user in seen or user not in flow.index or user.op == "output":
                continue
            seen.add(user)
            active = [n for n in flow.inputs(user) if n not in flow.constant and n not in seen]
            if active:
                if best is None or flow.index[user] < flow.index[best[0]]:
                    best = (user, active[0])
            else:
                stack.append(user)
    return best


def parts(node: fx.Node) -> tuple[int, ...] | None:
    """The shape [E, A, B] of a matrix of which equal parts are read, below each other or side by side."""
    rows, columns = operators.shape(node)
    for dim in (0, 1):
        size = operators.shape(node)[dim]
        lengths: set[int] = set()
        for user in node.users:
            name = operators.kind(user)
            if name in _SPLITS and operators.argument(user, 2, "dim", 0) % 2 == dim:
                lengths.update(value.shape[dim] for value in user.meta["val"])
            elif name == "aten::slice" and operators.argument(user, 1, "dim", 0) % 2 == dim:
                lengths.add(operators.shape(user)[dim])
            else:
                lengths.add(0)
        (length, *others) = lengths
        if not others and 0 < length < size and size % length == 0:
            return (size // length, length, columns) if dim == 0 else (size // length, rows, length)
    return None


def inputs(flow: Flow, operand: fx.Node) -> list[fx.Node]:
    """Tensors that an expert's operand may be dispatched from, nearest first: same features, sizes known.

    Of an operand of columns, [..., features, 1], the features are the dimension in front.
    """
    sizes = operators.shape(operand) if is_sized(operand) else tuple(operators.value(operand).shape)
    wide = {str(size) for size in (sizes[-2:-1] if len(sizes) > 1 and str(sizes[-1]) == "1" else sizes[-1:])}
    found: list[fx.Node] = []
    stack, seen = [operand], {operand}
    while stack:
        node = stack.pop()
        if is_sized(node) and node not in flow.constant and len(operators.shape(node)) > 1:
            if str(operators.shape(node)[-1]) in wide or operators.kind(operand) not in _DISPATCH:
                found.append(node)
        if operators.kind(node) in _DISPATCH or _is_dispatch(flow, node):
            for source in flow.inputs(node):
                if source not in seen and source not in flow.constant:
                    seen.add(source)
                    stack.append(source)
    return sorted(found, key=lambda node: -flow.index[node])


def _is_dispatch(flow: Flow, node: fx.Node) -> bool:
    """Whether rows may be taken by a product with ones and zeros: a product of activations."""
    factors = flow.inputs(node)
    return operators.kind(node) in operators.PRODUCTS and len(factors) > 1 and not any(n in flow.constant for n in factors)


def is_dispatched(flow: Flow, node: fx.Node) -> bool:
    """Whether a node's rows may have been taken from another one's, or repeat them."""
    while operators.is_reshape(node) and flow.inputs(node):
        node = flow.inputs(node)[0]
    return operators.kind(node) in operators.LOOKUPS | operators.REPETITIONS | {"aten::gather"} or _is_dispatch(flow, node)


def routings(flow: Flow, exit: fx.Node, x: fx.Node, tokens: int, experts: set[int]) -> Iterator[Routing]:
    """Candidates for what the router hands over: pairs with an index first, then masks, then dense weights.

    Args:
        flow: data flow.
        exit: where the mixture ends.
        x: its input.
        tokens: T.
        experts: numbers of experts that the weights allow.
    """
    behind = _behind(flow, exit, x)
    index: list[tuple[fx.Node, int]] = []
    masks: list[tuple[fx.Node, int]] = []
    weights: dict[int, list[fx.Node]] = {}
    dense: list[fx.Node] = []
    for node in behind:
        shape = operators.shape(node)
        value = node.meta["val"]
        count = _numel(shape)
        if not shape or count % tokens or count == 0:
            continue
        share = count // tokens
        if value.is_floating_point():
            if share <= 64 and (shape[-1] == 1 or _trails(shape, share) or (share == 1 and len(shape) == 1)):
                weights.setdefault(share, []).append(node)
            if shape[-1] in experts and share == shape[-1]:
                dense.append(node)
        else:
            if value.dtype in (torch.int64, torch.int32) and share <= 64 and (_trails(shape, share) or share == 1):
                index.append((node, share))
            if shape[-1] in experts and share % shape[-1] == 0 and share // shape[-1] <= 64:
                masks.append((node, share // shape[-1]))
    for node, k in index:  # the first index is the selection itself
        for weight in reversed(weights.get(k, [])):  # the last weights are the final ones
            yield Routing("index", node, weight, k)
    for node, k in reversed(masks):
        for weight in reversed(weights.get(k, [])):
            yield Routing("mask", node, weight, k)
    for node, weight in _choices(behind, experts):
        yield Routing("choice", node, weight, operators.shape(node)[0])
    yield from _slots(behind, tokens, experts)
    compared = {source for node in flow.nodes[flow.index[x] : flow.index[exit]] for source in _compared(node)}
    for node in reversed(dense):
        for bound in weights.get(1, []):
            if bound in compared:
                yield Routing("bound", node, bound, operators.shape(node)[-1])
        yield Routing("dense", node, None, operators.shape(node)[-1])
    for node, k in index:
        yield Routing("index", node, None, k)


def _trails(shape: tuple[int, ...], share: int) -> bool:
    """Whether the last dimensions of a shape, one or several, have that many elements."""
    return any(_numel(shape[position:]) == share for position in range(1, len(shape)))


def _compared(node: fx.Node) -> list[fx.Node]:
    """The tensors that a node compares."""
    return list(node.all_input_nodes) if operators.kind(node) in operators.COMPARISONS else []


def _slots(behind: list[fx.Node], tokens: int, experts: set[int]) -> Iterator[Routing]:
    """Weights [..., S, E, C] of places, alone and together with a tensor of the same shape."""
    shaped = [node for node in behind if len(operators.shape(node)) > 2 and operators.shape(node)[-2] in experts]
    shaped = [node for node in shaped if _numel(operators.shape(node)[:-2]) == tokens and operators.shape(node)[-1] > 1]
    for node in reversed(shaped):
        if operators.is_float(node):
            count = operators.shape(node)[-2]
            yield Routing("slots", node, None, count)
            for other in reversed(shaped):
                if other is not node and operators.shape(other) == operators.shape(node):
                    yield Routing("slots", node, other, count)


def _numel(shape: tuple[int, ...]) -> int:
    result = 1
    for size in shape:
        result *= size
    return result


def _choices(behind: list[fx.Node], experts: set[int]) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Pairs of integers and numbers [E, c]."""
    shaped = [node for node in behind if len(operators.shape(node)) == 2 and operators.shape(node)[0] in experts]
    for node in shaped:
        if operators.value(node).dtype == torch.int64:
            for weight in reversed(shaped):
                if operators.is_float(weight) and operators.shape(weight) == operators.shape(node):
                    yield node, weight


def _behind(flow: Flow, exit: fx.Node, x: fx.Node) -> list[fx.Node]:
    """Computed tensors that the exit follows from without passing through x, in order."""
    start = flow.index[x] - REACH
    seen: set[fx.Node] = set()
    stack = [exit]
    while stack:
        for source in stack.pop().all_input_nodes:
            known = source in seen or source is x or source in flow.constant or source.op != "call_function"
            if not known and flow.index[source] > start and not is_size(source):
                seen.add(source)
                stack.append(source)
    return [node for node in flow.ordered(seen) if is_sized(node)]


def bases(flow: Flow, exit: fx.Node, routing: Routing) -> list[fx.Node]:
    """Terms of the sum that a mixture ends in that do not depend on its routing: a shared expert, a first hidden state."""
    found: list[fx.Node] = []
    stack, seen = [exit], {exit}
    while stack:
        for term in _terms(stack.pop()):
            if term in seen:
                continue
            seen.add(term)
            if any(flow.leads_to(node, term) for node in routing.nodes):
                stack.append(term)
            elif term not in flow.constant and operators.is_float(term) and is_sized(term):
                if not _is_blank(term):
                    found.append(term)
    return found


def terms(flow: Flow, exit: fx.Node) -> set[fx.Node]:
    """The terms of the sum that ends in a node, those of terms included: :func:`bases` of any routing are among them."""
    found: set[fx.Node] = set()
    stack = [exit]
    while stack:
        for term in _terms(stack.pop()):
            if term not in found and term not in flow.constant:
                found.add(term)
                stack.append(term)
    return found


def _terms(node: fx.Node) -> list[fx.Node]:
    """The terms of a sum, or what one is added to at some places, or what is only reshaped."""
    name = operators.kind(node)
    if name == operators.ADD:
        return [n for n in node.args[:2] if isinstance(n, fx.Node)]
    if name in ("aten::index_add", "aten::index_put", "aten::scatter_add", "aten::scatter", "aten::slice_scatter"):
        return [n for n in node.args[:1] if isinstance(n, fx.Node)]
    if operators.is_reshape(node) and node.args and isinstance(node.args[0], fx.Node):
        return [node.args[0]]
    return []


def _places(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Ones and zeros [..., S, E, C]: in most of an expert's places one token, and no token twice at one expert."""
    *groups, rows, experts, size = shape
    found = torch.zeros(_numel(tuple(groups)), rows, experts, size, dtype=torch.float64)
    for group in found:
        for expert in range(experts):
            tokens = torch.randperm(rows, generator=generator)[:size]
            held = torch.rand(len(tokens), generator=generator) < 0.8
            group[tokens[held], expert, torch.arange(len(tokens))[held]] = 1.0
    return found.reshape(shape)


def is_bounded(node: fx.Node, experts: int) -> bool:
    """Whether the graph shows that a node's integers are below a number of experts."""
    while operators.is_movement(node):
        sources = [source for source in node.all_input_nodes if not is_size(source)]
        if not sources:
            return False
        node = sources[0]
    name = operators.kind(node)
    if name == "aten::remainder":
        return isinstance(node.args[1], int) and 0 < node.args[1] <= experts
    source = node.args[0] if name in _SELECTIONS else None
    dim = operators.argument(node, 2 if name == operators.TOPK else 1, "dim", -1) if name in _SELECTIONS else None
    if not isinstance(source, fx.Node) or not isinstance(dim, int) or not operators.shape(source):
        return False
    return operators.shape(source)[dim] <= experts


def _is_blank(node: fx.Node) -> bool:
    return operators.kind(node) in ("aten::full", "aten::zeros", "aten::empty")


def sample(
    routing: Routing, tokens: int, experts: int, generator: torch.Generator, *, crowded: bool = False
) -> tuple[dict[fx.Node, Tensor], Tensor, Tensor]:
    """Random routing: values of the cut, and what they mean as index [T, k] and weight [T, k].

    Experts are distinct in a row and weights positive, as routers make them.  ``crowded`` sends every token to the same
    experts, where tokens beyond an expert's capacity would be missed.
    """

    def weights(*shape: int) -> Tensor:
        return 0.2 + 0.8 * torch.rand(*shape, generator=generator, dtype=torch.float64)

    index = torch.rand(tokens, experts, generator=generator).argsort(1)[:, : routing.k]
    if crowded:
        index = index[:1].expand(tokens, -1)
    weight = weights(tokens, routing.k)
    values: dict[fx.Node, Tensor] = {}
    source = routing.source
    dtype, shape = operators.value(source).dtype, operators.shape(source)
    if routing.kind == "choice":
        chosen = torch.rand(experts, tokens, generator=generator).argsort(1)[:, : shape[1]]
        share = weights(*shape)
        values[source] = chosen.to(dtype)
        weight = torch.zeros(experts, tokens, dtype=torch.float64).scatter(1, chosen, share).T
        index = torch.arange(experts).expand(tokens, experts)
        assert routing.weight is not None
        return {**values, routing.weight: share.to(operators.value(routing.weight).dtype)}, index, weight
    if routing.kind == "slots":
        places = _places(shape, generator)
        share = places * weights(*shape)
        values[source] = share.to(dtype)
        if routing.weight is not None:
            values[routing.weight] = places.to(operators.value(routing.weight).dtype)
        return values, torch.arange(experts).expand(tokens, experts), share.sum(-1).reshape(tokens, experts)
    if routing.kind == "bound":  # equal to one of the weights, as the least of those that were selected is
        weight = weight.to(dtype)
        least = weight.gather(1, index[:, :1])
        assert routing.weight is not None
        values = {source: weight.reshape(shape), routing.weight: least.reshape(operators.shape(routing.weight)).to(dtype)}
        return values, torch.arange(experts).expand(tokens, experts), weight.masked_fill(weight < least, 0.0).double()
    if routing.kind == "dense":
        index = torch.arange(experts).expand(tokens, experts)
        values[source] = weight.to(dtype).reshape(shape)
    elif routing.kind == "mask":
        blank = torch.rand(tokens, routing.k, generator=generator) < 0.25
        mask = torch.nn.functional.one_hot(index, experts).masked_fill(blank[..., None], 0)
        values[source] = mask.to(dtype).reshape(shape)
    else:
        values[source] = index.to(dtype).reshape(shape)
    if routing.weight is not None:
        values[routing.weight] = weight.to(operators.value(routing.weight).dtype).reshape(operators.shape(routing.weight))
    if routing.kind == "mask":
        weight = weight.masked_fill(blank, 0.0)
    if routing.kind == "index" and routing.weight is None:
        weight = torch.ones_like(weight)
    return values, index, weight
