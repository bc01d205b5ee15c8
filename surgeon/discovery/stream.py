"""The residual stream: the chain of dominators with the most residual additions.

A tensor *dominates* the output when every path from the source to the output passes through it; the dominators form a
chain, the cuts.  Between two consecutive cuts a and b lies a residual sublayer when b is a sum that holds a itself as one
of its terms, b = a + f(a).  Of all pairs of a source and an output, the stream is the chain with most of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import networkx
from torch import fx

from surgeon.discovery import operators
from surgeon.discovery.flow import Flow
from surgeon.errors import DiscoverError


@dataclass(frozen=True)
class Span:
    """What lies between two consecutive cuts.

    Attributes:
        entry: first cut.
        exit: second cut.
        path: nodes on paths from entry (without it) to exit (with it).
        residual: exit = entry + f(entry).
        broke: why it is no residual sublayer, with the node.
    """

    entry: fx.Node
    exit: fx.Node
    path: frozenset[fx.Node]
    residual: bool
    broke: str = ""


@dataclass(frozen=True)
class Chain:
    """A chain of cuts from a source to an output."""

    source: fx.Node
    sink: fx.Node
    spans: tuple[Span, ...]

    @property
    def residuals(self) -> int:
        """Number of residual sublayers."""
        return sum(span.residual for span in self.spans)


def find_stream(flow: Flow) -> Chain:
    """The chain with the most residual sublayers.

    An addition whose one operand is computed from the other is the only kind of node that can end a residual sublayer, so
    the number of those between a source and an output bounds what the pair can have, and most pairs need not be tried.

    Raises:
        DiscoverError: no chain has a residual sublayer; says how far the best one came.
    """
    additions = [node for node in flow.nodes if _is_residual_addition(flow, node)]
    sinks = [node for node in flow.outputs if node in flow]
    before = [sum(flow.depends(sink, a) << i for i, a in enumerate(additions)) for sink in sinks]
    pairs = []
    for source in flow.sources():
        after = sum(flow.depends(a, source) << i for i, a in enumerate(additions))
        for rank, sink in enumerate(sinks):
            if flow.depends(sink, source):
                bound = (after & before[rank]).bit_count()
                pairs.append((-bound, rank, flow.index[source], source, sink))
    best: Chain | None = None
    for bound, _, _, source, sink in sorted(pairs, key=lambda pair: pair[:3]):
        if best is not None and best.residuals and best.residuals >= -bound:
            break
        chain = trace_chain(flow, source, sink)
        if best is None or chain.residuals > best.residuals:
            best = chain
        elif not best.residuals and len(chain.spans) > len(best.spans):  # for the error
            best = chain
    if best is None:
        raise DiscoverError(
            "no residual stream: no floating-point output depends on a floating-point tensor; found outputs "
            f"{', '.join(node.name for node in flow.outputs) or '(none)'}; needed an output that is computed from the inputs"
        )
    if not best.residuals:
        raise DiscoverError(_nearest(best, len(additions)))
    return best


def trace_chain(flow: Flow, source: fx.Node, sink: fx.Node) -> Chain:
    """The cuts between a source and an output."""
    inside = flow.between(source, sink)
    paths: networkx.DiGraph = networkx.DiGraph()
    paths.add_node(source)
    for node in inside:
        paths.add_edges_from((i, node) for i in flow.inputs(node) if i in inside or i is source)
    dominators = networkx.immediate_dominators(paths, source)
    cuts = [sink]
    while cuts[-1] is not source:
        cuts.append(dominators[cuts[-1]])
    cuts.reverse()
    return Chain(source, sink, tuple(_span(flow, a, b) for a, b in zip(cuts, cuts[1:], strict=False)))


def _span(flow: Flow, entry: fx.Node, exit: fx.Node) -> Span:
    path = frozenset(flow.between(entry, exit))
    broke = _why_not_residual(flow, entry, exit, path)
    return Span(entry, exit, path, not broke, broke)


def _why_not_residual(flow: Flow, entry: fx.Node, exit: fx.Node, path: frozenset[fx.Node]) -> str:
    if operators.kind(exit) != operators.ADD:
        return f"it ends in {exit.name} = {operators.kind(exit)}, needed an addition"
    terms = _terms(flow, exit, entry)
    if entry not in {_unscaled(flow, term, entry) for term in terms}:
        names = ", ".join(term.name for term in terms)
        return f"the terms of the addition {exit.name} are {names}, needed {entry.name} among them"
    if len(terms) < 2 or not any(_works(flow, node) for node in path):
        return f"nothing between {entry.name} and {exit.name} reads a weight matrix or mixes positions"
    return ""


def _terms(flow: Flow, addition: fx.Node, entry: fx.Node) -> list[fx.Node]:
    """Leaves of the tree of additions that ends in ``addition``; the tree does not reach past ``entry``."""
    leaves: list[fx.Node] = []
    stack = [addition]
    while stack:
        node = stack.pop()
        inner = flow.strip(node, lambda n: n is not entry and operators.is_reshape(n))
        if inner is not entry and operators.kind(inner) == operators.ADD and (inner is addition or len(inner.users) == 1):
            stack.extend(flow.inputs(inner))
        else:
            leaves.append(node)
    return leaves


def _unscaled(flow: Flow, term: fx.Node, entry: fx.Node) -> fx.Node:
    """A term without reshapes, casts and multiplication by constants, but not past ``entry``."""

    def through(node: fx.Node) -> bool:
        if node is entry:
            return False
        return operators.is_reshape(node) or operators.kind(node) in ("aten::mul", "aten::div")

    return flow.strip(term, through)


def _works(flow: Flow, node: fx.Node) -> bool:
    """Whether a node does more than element-wise work, movement or normalisation."""
    if any(
        n in flow.constant and len(operators.shape(n)) > 1 and n in flow.weights and flow.weights[n]
        for n in node.all_input_nodes
    ):
        return operators.kind(node) in operators.PRODUCTS | operators.CONVOLUTIONS | {operators.MOE}
    name = operators.kind(node)
    if operators.is_pointwise(node) or operators.is_movement(node) or name in operators.NORMS | operators.REDUCTIONS:
        return False
    return node.op == "call_function" and name not in (operators.CONCATENATE, operators.FAKE_QUANTIZE)


def _is_residual_addition(flow: Flow, node: fx.Node) -> bool:
    return operators.kind(node) == operators.ADD and len(flow.inputs(node)) == 2


def _nearest(chain: Chain, additions: int) -> str:
    busy = [span for span in chain.spans if len(span.path) > 1] or list(chain.spans)
    nearest = max(busy, key=lambda span: (operators.kind(span.exit) == operators.ADD, len(span.path)))
    return (
        f"no residual stream: the longest chain of tensors that every path passes through runs from {chain.source.name} to "
        f"{chain.sink.name} ({len(chain.spans) + 1} tensors), and no part of it is of the form y = x + f(x). "
        f"Nearest: the part from {nearest.entry.name} to {nearest.exit.name} ({len(nearest.path)} nodes), but {nearest.broke}. "
        f"The graph has {additions} additions of computed tensors."
    )
