"""Residual sublayers: additions ``y = x + f(x)``.

1. The terms of a sum are the leaves of its tree of additions; additions in between have no other reader.
2. A sum is residual when one term is a tensor x (perhaps reshaped, or scaled by constants) that every other term is computed
   from, and something on the way from x reads a weight matrix or mixes positions.  x is the *entry*, y the *exit*.
3. Where sublayers nest, the outer one counts, unless layers stand in it: two sublayers, one behind the other, that each mix
   positions with weights.  Then it is a skip around a stack, and the inner ones count.
4. A sum of x and the end of another sublayer that something else reads too is no sublayer: the hidden state goes on past the
   sum, and x is context that enters several layers, such as position codes.  Nor is a sum of learned codes and what a
   sublayer that starts elsewhere ends in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod

from torch import fx

from surgeon.discovery import operators
from surgeon.discovery.flow import Flow

Term = tuple[fx.Node, ...]
"""One term of a sum: a node, or the factors of a product that the sum computes itself."""

_PARTS: dict[str, tuple[tuple[int, ...], ...]] = {
    operators.ADD: ((0,), (1,)),
    "aten::sub": ((0,), (1,)),
    "aten::addcmul": ((0,), (1, 2)),  # x + a b
    "aten::addcdiv": ((0,), (1, 2)),
    "aten::lerp": ((0,), (1, 2)),  # x + w (y - x)
}
"""Sums, and which of their arguments make up each term."""


@dataclass(frozen=True)
class Residual:
    """One residual sublayer; ``path`` are the nodes from ``entry`` (without it) to ``exit`` (with it)."""

    entry: fx.Node
    exit: fx.Node
    path: frozenset[fx.Node]


def find_residuals(flow: Flow, mixes: Callable[[Residual], bool]) -> list[Residual]:
    """The residual sublayers of a graph, none inside another, by the position of their exits.

    Args:
        flow: the graph's data flow.
        mixes: whether a sublayer mixes positions; asked only where sublayers nest.
    """
    found: list[Residual] = []
    inner: set[fx.Node] = set()
    for node in reversed(flow.nodes):
        if node not in inner and is_sum(flow, node):
            entry, tree = _entry(flow, node)
            if entry is None:
                continue
            path = frozenset(flow.between(entry, node))
            if not works(flow, path):
                continue
            found.append(Residual(entry, node, path))
            inner |= tree
    kept = _outermost(flow, found, mixes)
    return sorted(kept, key=lambda residual: flow.index[residual.exit])


def is_sum(flow: Flow, node: fx.Node) -> bool:
    """Whether a node adds two activations (one of them may be a learned start, such as latents)."""
    if operators.kind(node) not in _PARTS:
        return False
    return len(flow.inputs(node)) > 1 and not all(n in flow.constant for n in flow.inputs(node))


def works(flow: Flow, path: Iterable[fx.Node]) -> bool:
    """Whether something among nodes reads a weight matrix or mixes positions: more than element-wise work, norms, movement."""
    return any(_works(flow, node) for node in path)


# -- Cases 1 and 2 ------------------------------------------------------------------------------------------------


def _entry(flow: Flow, node: fx.Node) -> tuple[fx.Node | None, set[fx.Node]]:
    """The entry of the sublayer that ends in a sum, and the other additions of its tree."""
    terms, tree = _terms(flow, node)
    entry = _shared(flow, node, terms)
    if entry is None and tree:
        entry, tree = _shared(flow, node, _own_terms(flow, node)), set()
    return entry, tree


def _own_terms(flow: Flow, node: fx.Node) -> list[Term]:
    terms = []
    for positions in _PARTS[operators.kind(node)]:
        parts = [node.args[p] for p in positions if p < len(node.args)]
        term = tuple(n for n in parts if isinstance(n, fx.Node) and n in flow)
        if term:
            terms.append(term)
    return terms


def _terms(flow: Flow, node: fx.Node) -> tuple[list[Term], set[fx.Node]]:
    """Leaves of the tree of additions below a sum, and the additions inside of it."""
    leaves: list[Term] = []
    tree: set[fx.Node] = set()
    stack = _own_terms(flow, node)
    while stack:
        term = stack.pop()
        below = term[0] if len(term) == 1 else None
        while below is not None and len(below.users) == 1 and operators.is_reshape(below):
            sources = flow.inputs(below)
            below = sources[0] if len(sources) == 1 else None
        if below is not None and len(below.users) == 1 and operators.kind(below) == operators.ADD and is_sum(flow, below):
            tree.add(below)
            stack.extend(_own_terms(flow, below))
        else:
            leaves.append(term)
    return leaves, tree


def _shared(flow: Flow, node: fx.Node, terms: list[Term]) -> fx.Node | None:
    """The tensor that is one term and that all the other terms are computed from."""
    if len(terms) < 2:
        return None
    elements = prod(operators.shape(node))
    for term in sorted((t for t in terms if len(t) == 1), key=lambda t: flow.index[t[0]]):
        others = [other for other in terms if other is not term and not all(n in flow.constant for n in other)]
        if not others:
            continue
        for entry in _origins(flow, term[0]):
            if all(any(flow.depends(n, entry) for n in other) for other in others):
                started = entry not in flow.constant or flow.weights.get(entry)
                return entry if started and prod(operators.shape(entry)) == elements else None
    return None


def _origins(flow: Flow, term: fx.Node) -> list[fx.Node]:
    """The term, and what it is apart from reshapes, casts and multiplication by constants, nearest first."""
    found = [term]
    while operators.is_reshape(found[-1]) or operators.kind(found[-1]) in ("aten::mul", "aten::div"):
        sources = [n for n in flow.inputs(found[-1]) if n not in flow.constant]
        if len(sources) != 1:
            break
        found.append(sources[0])
    return found


def _works(flow: Flow, node: fx.Node) -> bool:
    if reads_weights(flow, node):
        return True
    name = operators.kind(node)
    if operators.is_pointwise(node) or operators.is_movement(node) or name in operators.NORMS | operators.REDUCTIONS:
        return False
    return node.op == "call_function" and name not in (operators.CONCATENATE, operators.FAKE_QUANTIZE, *operators.PADDINGS)


def reads_weights(flow: Flow, node: fx.Node) -> bool:
    """Whether a product, a convolution or experts read a stored matrix."""
    if operators.kind(node) not in operators.PRODUCTS | operators.CONVOLUTIONS | {operators.MOE}:
        return False
    return any(n in flow.constant and len(operators.shape(n)) > 1 and flow.weights.get(n) for n in node.all_input_nodes)


# -- Cases 3 and 4 -------------------------------------------------------------------------------------------------


def _outermost(flow: Flow, residuals: list[Residual], mixes: Callable[[Residual], bool]) -> list[Residual]:
    kept: list[Residual] = []
    for outer in sorted(residuals, key=lambda residual: len(residual.path)):
        ending = sorted((r for r in kept if r.exit in outer.path), key=lambda r: flow.index[r.exit])
        if ending and (_goes_on(flow, outer, ending) or _comes_in(flow, outer, ending)):
            continue
        inside = [r for r in ending if r.entry in outer.path or r.entry is outer.entry]
        if len(inside) > 1 and _is_stack(flow, inside, mixes):
            continue
        kept = [residual for residual in kept if residual not in inside] if inside else kept
        kept.append(outer)
    return kept


def _comes_in(flow: Flow, outer: Residual, ending: list[Residual]) -> bool:
    """Case 4 for learned codes: a sublayer that starts elsewhere ends inside of the sum."""
    return outer.entry in flow.constant and not all(flow.depends(r.entry, outer.entry) for r in ending)


def _goes_on(flow: Flow, outer: Residual, ending: list[Residual]) -> bool:
    """Case 4, with the sublayers that end inside of a sum, in order."""
    for term in flow.inputs(outer.exit):
        end = next((r.exit for r in reversed(ending) if flow.depends(term, r.exit)), None)
        if end is None:
            continue
        way = flow.between(end, term) | {end}
        if not works(flow, way - {end}) and any(u not in way and u is not outer.exit for node in way for u in node.users):
            return True
    return False


def _is_stack(flow: Flow, inside: list[Residual], mixes: Callable[[Residual], bool]) -> bool:
    first: Residual | None = None
    for residual in sorted(inside, key=lambda r: flow.index[r.exit]):
        if not any(reads_weights(flow, node) for node in residual.path):
            continue
        if first is not None and not flow.depends(residual.entry, first.exit):
            continue
        if mixes(residual):
            if first is not None:
                return True
            first = residual
    return False
