"""Residual sublayers: additions ``y = x + f(x)``.

1. The terms of a sum are the leaves of its tree of additions; additions in between have no other reader.
2. A sum is residual when one term is a tensor x (perhaps reshaped, or scaled and shifted by constants) that every other term
   is computed from, and something on the way from x reads a weight matrix or mixes positions.  x is the *entry*, y the *exit*.
   x may be several streams [batch, positions, streams, features] that a small matrix mixes position by position,
   ``y = M x + b f(x)`` (hyper-connections); M is constant or computed from the position alone, or it is the identity.
   So is a sum of two products k x + t f(x) with k + t = 1, whatever k is computed from (highway and recurrent gates); that
   the two add up to 1 is measured.
   Where a part of the positions alone goes through f, x with the rows x[i] + f at i is the sum of x and f put at i.
   Where x is joined with other positions, of which nothing is kept, cat(x, z) + f cut down to x's place is the sum of x and
   a part of f; z, such as a message computed from x, belongs to f.
3. Where sublayers nest, the outer one counts, unless layers stand in it: two sublayers, one behind the other on a stream of
   their own, that each mix positions with weights.  Then it is a skip around a stack, and the inner ones count.
4. A sum with a term that is the end of another sublayer with weights, with nothing but norms or scales behind it, is no
   sublayer: the hidden state goes on there, and x is added to it, such as position codes that enter every layer, or a skip.
   Neither is one into which another sublayer leads that starts elsewhere: then x is context, and the hidden state passes by.
   Nor is a sum of learned codes and what a sublayer that starts elsewhere ends in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod

import torch
from torch import fx

from surgeon.discovery import operators, probe
from surgeon.discovery.cores import product
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
    """One residual sublayer.

    Attributes:
        entry: x.
        exit: y.
        path: nodes from ``entry`` (without it) to ``exit`` (with it).
        terms: the terms of the sum beside x.
    """

    entry: fx.Node
    exit: fx.Node
    path: frozenset[fx.Node]
    terms: tuple[fx.Node, ...]


def find_residuals(flow: Flow, mixes: Callable[[Residual], bool]) -> list[Residual]:
    """The residual sublayers of a graph, none inside another, by the position of their exits.

    Args:
        flow: the graph's data flow.
        mixes: whether a sublayer mixes positions; asked only where sublayers nest.
    """
    found: list[Residual] = []
    for node in flow.nodes:
        residual: Residual | None
        if is_sum(flow, node):
            residual = _residual(flow, node)
        else:
            residual = _kept(flow, node)
        if residual is not None and works(flow, residual.path):
            found.append(residual)
    kept = _outermost(flow, found, mixes)
    return sorted(kept, key=lambda residual: flow.index[residual.exit])


def is_sum(flow: Flow, node: fx.Node) -> bool:
    """Whether a node adds two activations (one of them may be a learned start, such as latents)."""
    if operators.kind(node) not in _PARTS and len(_placed(flow, node)) < 2:
        return False
    return len(flow.inputs(node)) > 1 and not all(n in flow.constant for n in flow.inputs(node))


def works(flow: Flow, path: Iterable[fx.Node]) -> bool:
    """Whether something among nodes reads a weight matrix or mixes positions: more than element-wise work, norms, movement."""
    return any(_works(flow, node) for node in path)


# -- Cases 1 and 2 ------------------------------------------------------------------------------------------------


def _residual(flow: Flow, node: fx.Node) -> Residual | None:
    """The sublayer that ends in a sum: of the whole tree of additions, or of the terms of the sum itself."""
    own = _own_terms(flow, node)
    leaves = _leaves(flow, own)
    for terms in (leaves, own) if len(leaves) > len(own) else (own,):
        found = _shared(flow, node, terms)
        if found is not None:
            entry, others = found
            return Residual(entry, node, frozenset(flow.between(entry, node)), tuple(n for term in others for n in term))
    return None


def _kept(flow: Flow, node: fx.Node) -> Residual | None:
    """The sublayer that ends in a slice, of which the rest of the sum is read by nothing."""
    total = node.args[0] if operators.kind(node) == "aten::slice" else None
    if not isinstance(total, fx.Node) or len(total.users) != 1 or not is_sum(flow, total):
        return None
    whole = _residual(flow, total)
    parts = whole.entry.args[0] if whole is not None and operators.kind(whole.entry) == operators.CONCATENATE else None
    if whole is None or not isinstance(parts, list | tuple):
        return None
    rank = len(operators.shape(total))
    dim = int(operators.argument(node, 1, "dim", 0)) % rank
    if int(operators.argument(whole.entry, 1, "dim", 0)) % rank != dim or not operators.same_shape(whole.entry, total):
        return None
    first = operators.argument(node, 2, "start")
    start = operators.hint(operators.value(first) if isinstance(first, fx.Node) else first or 0)
    for part in parts:
        assert isinstance(part, fx.Node)
        if not start and operators.same_shape(part, node):
            started = part in flow and part not in flow.constant and all(flow.depends(term, part) for term in whole.terms)
            return Residual(part, node, frozenset(flow.between(part, node)), whole.terms) if started else None
        start -= operators.shape(part)[dim]
    return None


def _own_terms(flow: Flow, node: fx.Node) -> list[Term]:
    terms: list[Term] = _placed(flow, node)
    if terms:
        return terms
    for positions in _PARTS[operators.kind(node)]:
        parts = [node.args[p] for p in positions if p < len(node.args)]
        term = tuple(n for n in parts if isinstance(n, fx.Node) and n in flow)
        if term:
            terms.append(term)
    return terms


def _placed(flow: Flow, node: fx.Node) -> list[Term]:
    """The terms of a tensor x in which the rows x[i] were replaced by x[i] + f: x and f; none for any other node."""
    if operators.kind(node) != operators.PUT or operators.argument(node, 3, "accumulate", False):
        return []
    x, places, rows = node.args[:3]
    if not isinstance(x, fx.Node) or not isinstance(rows, fx.Node) or operators.kind(rows) != operators.ADD or x not in flow:
        return []
    terms = _own_terms(flow, rows)
    taken = [term for term in terms if len(term) == 1 and operators.kind(term[0]) == operators.INDEX]
    if not any(term[0].args[:2] == (x, places) for term in taken):
        return []
    return [(x,), *(term for term in terms if term not in taken or term[0].args[:2] != (x, places))]


def _leaves(flow: Flow, terms: list[Term]) -> list[Term]:
    """The terms with those that are additions of their own, and read by nothing else, taken apart."""
    leaves: list[Term] = []
    stack = list(terms)
    while stack:
        term = stack.pop()
        below = term[0] if len(term) == 1 else None
        while below is not None and len(below.users) == 1 and operators.is_reshape(below):
            sources = flow.inputs(below)
            below = sources[0] if len(sources) == 1 else None
        if below is not None and is_sum(flow, below) and _is_inner(flow, below):
            stack.extend(_own_terms(flow, below))
        else:
            leaves.append(term)
    return leaves


def _is_inner(flow: Flow, node: fx.Node) -> bool:
    """Whether an addition is read by one other only; one of rows at their places by that which replaces other rows of it."""
    if operators.kind(node) == operators.ADD:
        return len(node.users) == 1
    put = [user for user in node.users if operators.kind(user) == operators.PUT]
    rows = [user for user in node.users if operators.kind(user) == operators.INDEX and len(user.users) == 1]
    return len(put) == 1 and len(put) + len(rows) == len(node.users) and bool(_placed(flow, put[0])) and len(rows) == 1


def _shared(flow: Flow, node: fx.Node, terms: list[Term]) -> tuple[fx.Node, list[Term]] | None:
    """The tensor that is one term and that all the other terms are computed from, and these."""
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
                return (entry, others) if started and prod(operators.shape(entry)) == elements else None
    return _blended(flow, elements, terms)


def _blended(flow: Flow, elements: int, terms: list[Term]) -> tuple[fx.Node, list[Term]] | None:
    """``k x + t f`` with ``k + t = 1`` and f computed from x: the tensor x, and the other term."""
    if len(terms) != 2 or any(len(term) != 1 for term in terms):
        return None
    products = [[n for n in flow.inputs(term[0]) if n not in flow.constant] for term in terms]
    if any(operators.kind(term[0]) != "aten::mul" or len(p) != 2 for term, p in zip(terms, products, strict=True)):
        return None
    for own, other, term in ((products[0], products[1], terms[1]), (products[1], products[0], terms[0])):
        for x, kept in (own, own[::-1]):
            for f, taken in (other, other[::-1]):
                if prod(operators.shape(x)) == elements and flow.depends(f, x) and _add_up_to_one(flow, kept, taken):
                    return x, [term]
    return None


def _add_up_to_one(flow: Flow, kept: fx.Node, taken: fx.Node) -> bool:
    """Whether two tensors are functions of one, element by element, that add up to 1."""
    root = next((node for node in _unary(flow, kept) if node in _unary(flow, taken)), None)
    if root is None:
        return False
    x = torch.randn(64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    try:
        total = probe.elementwise(flow, kept, {root: x}) + probe.elementwise(flow, taken, {root: x})
    except RuntimeError:  # a learned vector in between: its size is not the probe's
        return False
    return bool(torch.allclose(total, torch.ones_like(x), rtol=0, atol=1e-6))


def _unary(flow: Flow, node: fx.Node) -> list[fx.Node]:
    """The node, and what it is a function of element by element, nearest first."""
    found = [node]
    while operators.is_pointwise(found[-1]) or operators.is_reshape(found[-1]):
        sources = [n for n in flow.inputs(found[-1]) if n not in flow.constant]
        if len(sources) != 1:
            break
        found.append(sources[0])
    return found


def _origins(flow: Flow, term: fx.Node) -> list[fx.Node]:
    """The term, and what it is apart from reshapes, casts, scales and shifts by constants and mixed streams, nearest first."""
    affine = ("aten::mul", "aten::div", operators.ADD, "aten::sub")
    found = [term]
    while True:
        mixed = mixed_streams(flow, found[-1])
        if mixed is not None:
            found.append(mixed)
            continue
        if not operators.is_reshape(found[-1]) and operators.kind(found[-1]) not in affine:
            return found
        sources = [n for n in flow.inputs(found[-1]) if n not in flow.constant]
        if len(sources) != 1:
            return found
        found.append(sources[0])


def mixed_streams(flow: Flow, node: fx.Node) -> fx.Node | None:
    """The x [..., streams, features] of ``M x`` with M [..., streams, streams], which no two positions meet in."""
    if operators.kind(node) != "aten::matmul":
        return None
    matrix, x = node.args[:2]
    if not isinstance(matrix, fx.Node) or not isinstance(x, fx.Node):
        return None
    shape, size = operators.shape(x), operators.shape(matrix)
    if len(shape) < 4 or not operators.same_shape(node, x) or size[-2:] != shape[-2:-1] * 2 or x in flow.constant:
        return None
    if matrix in flow.constant:
        return x
    alone = flow.depends(matrix, x) and size[:-2] == shape[:-2]
    return x if alone and not any(product(flow, n) for n in flow.between(x, matrix)) else None


def writes_streams(flow: Flow, node: fx.Node, x: fx.Node) -> bool:
    """Whether a node is ``b f`` with b [..., streams, 1] and f [..., 1, features], for x [..., streams, features]."""
    size, factors = operators.shape(x)[-2:], flow.inputs(node)
    if operators.kind(node) != "aten::mul" or len(factors) != 2 or not operators.same_shape(node, x) or 1 in size:
        return False
    outer = {operators.shape(factor)[-2:] for factor in factors} == {(size[0], 1), (1, size[1])}
    return outer and len(operators.shape(x)) > 3 and all(flow.depends(factor, x) for factor in factors)


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
    for outer in residuals:  # in graph order, so that all that end inside of one are known before it
        ending = sorted((r for r in kept if r.exit in outer.path), key=lambda r: flow.index[r.exit])
        weighted = [r for r in ending if any(reads_weights(flow, node) for node in r.path)]
        if (weighted and _goes_on(flow, outer, weighted)) or _comes_in(flow, outer, ending):
            continue
        inside = [r for r in ending if r.entry in outer.path or r.entry is outer.entry]
        if len(inside) > 1 and is_sum(flow, outer.exit) and _is_stack(flow, inside, mixes):
            continue
        kept = [residual for residual in kept if residual not in inside] if inside else kept
        kept.append(outer)
    return kept


def _comes_in(flow: Flow, outer: Residual, ending: list[Residual]) -> bool:
    """Case 4 for learned codes: a sublayer that starts elsewhere ends inside of the sum."""
    return outer.entry in flow.constant and not all(flow.depends(r.entry, outer.entry) for r in ending)


def _goes_on(flow: Flow, outer: Residual, ending: list[Residual]) -> bool:
    """Case 4, with the sublayers that end inside of a sum, in order."""
    if any(r.entry is not outer.entry and r.entry not in outer.path for r in ending):
        return True
    for term in outer.terms:
        end = next((r.exit for r in reversed(ending) if flow.depends(term, r.exit)), None)
        if end is not None and not works(flow, flow.between(end, term) - {end}):
            return True
    return False


def _is_stack(flow: Flow, inside: list[Residual], mixes: Callable[[Residual], bool]) -> bool:
    """Whether two sublayers that mix positions follow each other on one stream: nothing works between an end and a start.

    Those that do not, such as convolutions with a shortcut around the keys and behind the output of one attention, are parts
    of one layer.
    """
    mixing: dict[fx.Node, bool] = {}
    for residual in sorted(inside, key=lambda r: flow.index[r.exit]):
        if not any(reads_weights(flow, node) for node in residual.path):
            continue
        before = [exit for exit in mixing if flow.depends(residual.entry, exit)]
        last = max(before, key=flow.index.__getitem__, default=None)
        follows = last is not None and not works(flow, flow.between(last, residual.entry) - {last})
        mixed = mixes(residual)
        if mixed and last is not None and follows and mixing[last]:
            return True
        mixing[residual.exit] = mixed or (last is not None and follows and mixing[last])
    return False
