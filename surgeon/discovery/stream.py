"""Residual streams: chains of residual sublayers, one behind the other.

1. The sublayer before a sublayer is the last one that its entry is computed from.  Every other one that the entry is
   computed from must be in front of that (a skip within the stream); where none is the last, streams join, and a new one
   starts.
2. What stands between the two, the *gap* (norms, reshapes, a change of resolution), may read context: tensors with fewer
   elements (masks, conditioning) in element-wise work.  Where it reads another tensor of full size, such as the embeddings of
   tokens among which image features are put, a new stream starts.
3. Where several sublayers follow one, the chain goes on with one that has no weights in the gap, the longest of these, and
   the others start streams of their own.

The *cuts* of a stream are the tensors that every path along it passes through.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import networkx
from torch import fx

from surgeon.discovery import operators
from surgeon.discovery.flow import Flow
from surgeon.discovery.residuals import Residual, is_sum, works
from surgeon.errors import DiscoverError

_SINKS = 8
"""Largest number of outputs that a stream is followed to."""


@dataclass(frozen=True)
class Span:
    """What lies between two consecutive cuts.

    Attributes:
        entry: first cut.
        exit: second cut.
        path: nodes on paths from entry (without it) to exit (with it).
        residual: exit = entry + f(entry).
    """

    entry: fx.Node
    exit: fx.Node
    path: frozenset[fx.Node]
    residual: bool = False


@dataclass(frozen=True)
class Chain:
    """One stream: its sublayers, and the gaps between them and behind the last one."""

    spans: tuple[Span, ...]

    @property
    def cuts(self) -> tuple[fx.Node, ...]:
        """Every cut in order, from the entry of the first sublayer on."""
        return (self.spans[0].entry, *(span.exit for span in self.spans))

    @property
    def exit(self) -> fx.Node:
        """Exit of the last sublayer."""
        return [span.exit for span in self.spans if span.residual][-1]


def find_chains(flow: Flow, residuals: list[Residual]) -> list[Chain]:
    """The streams, in the order in which their first sublayers are computed.

    Args:
        flow: the graph's data flow.
        residuals: the residual sublayers, by the position of their exits.

    Raises:
        DiscoverError: there is no residual sublayer; says how far the best part came.
    """
    if not residuals:
        raise DiscoverError(_nearest(flow))
    followers: dict[fx.Node, list[Residual]] = {}
    starts: list[Residual] = []
    by_exit = {residual.exit: residual for residual in residuals}
    exits = sum(1 << flow.index[exit] for exit in by_exit)
    for residual in residuals:
        before = _before(flow, residual.entry, exits)
        if before is None or _joins(flow, before, residual.entry):
            starts.append(residual)
        else:
            followers.setdefault(before, []).append(residual)
    length: dict[fx.Node, int] = {}
    for residual in reversed(residuals):
        length[residual.exit] = 1 + max((length[f.exit] for f in followers.get(residual.exit, ())), default=0)
    chains: list[Chain] = []
    while starts:  # Case 3
        members = [starts.pop(0)]
        while behind := followers.get(members[-1].exit):
            exit = members[-1].exit
            following = max(behind, key=lambda r: (not works(flow, flow.between(exit, r.entry) - {exit}), length[r.exit]))
            starts.extend(r for r in behind if r is not following)
            members.append(following)
        chains.append(_chain(flow, members))
    return sorted(chains, key=lambda chain: flow.index[chain.spans[0].exit])


def _before(flow: Flow, entry: fx.Node, exits: int) -> fx.Node | None:
    """Case 1."""
    found = flow.ancestors(entry) & exits
    if not found:
        return None
    last = flow.nodes[found.bit_length() - 1]
    return None if found & ~flow.ancestors(last) else last


def _joins(flow: Flow, before: fx.Node, entry: fx.Node) -> bool:
    """Case 2: whether the gap reads a tensor of full size from elsewhere."""
    if before is entry:
        return False
    gap = flow.between(before, entry)
    for node in gap:
        for source in flow.inputs(node):
            if source in gap or source is before or not _is_new(flow, before, source):
                continue
            smaller = prod(operators.shape(source)) < prod(operators.shape(node))
            if not (smaller and operators.is_pointwise(node)):
                return True
    return False


def _is_new(flow: Flow, before: fx.Node, source: fx.Node) -> bool:
    """Whether a tensor holds anything but constants and what ``before`` is computed from, scaled or normalised."""
    stack, seen = [source], set()
    while stack:
        node = stack.pop()
        if node in seen or node in flow.constant or flow.depends(before, node):
            continue
        if not flow.inputs(node) or works(flow, [node]):
            return True
        seen.add(node)
        stack.extend(flow.inputs(node))
    return False


def _chain(flow: Flow, members: list[Residual]) -> Chain:
    spans: list[Span] = []
    for residual in members:
        if spans and spans[-1].exit is not residual.entry:
            spans.extend(trace_cuts(flow, spans[-1].exit, residual.entry))
        spans.append(Span(residual.entry, residual.exit, residual.path, True))
    return Chain((*spans, *_tail(flow, spans[-1].exit)))


def _tail(flow: Flow, exit: fx.Node) -> tuple[Span, ...]:
    """The longest chain of cuts from the last sublayer to an output."""
    sinks = [node for node in flow.outputs if node in flow and node is not exit and flow.depends(node, exit)]
    sinks = sorted(sinks, key=flow.index.__getitem__)[-_SINKS:]
    return max((trace_cuts(flow, exit, sink) for sink in sinks), key=len, default=())


def trace_cuts(flow: Flow, source: fx.Node, sink: fx.Node) -> tuple[Span, ...]:
    """What lies between consecutive cuts on the way from one tensor to another: dominators of the second."""
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
    pairs = zip(cuts, cuts[1:], strict=False)
    return tuple(Span(a, b, frozenset(flow.between(a, b))) for a, b in pairs)


# -- the error ----------------------------------------------------------------------------------------------------


def _nearest(flow: Flow) -> str:
    """Why there is no stream: how far the longest chain of cuts came."""
    best: tuple[Span, ...] = ()
    for sink in [node for node in flow.outputs if node in flow]:
        for source in flow.sources():
            if flow.depends(sink, source) and source is not sink and source not in flow.constant:
                best = max(best, trace_cuts(flow, source, sink), key=len)
    if not best:
        return (
            "no residual stream: no floating-point output depends on a floating-point tensor; found outputs "
            f"{', '.join(node.name for node in flow.outputs) or '(none)'}; needed an output that is computed from the inputs"
        )
    additions = sum(is_sum(flow, node) for node in flow.nodes)
    busy = [span for span in best if len(span.path) > 1] or list(best)
    nearest = max(busy, key=lambda span: (operators.kind(span.exit) == operators.ADD, len(span.path)))
    return (
        f"no residual stream: the longest chain of tensors that every path passes through runs from {best[0].entry.name} to "
        f"{best[-1].exit.name} ({len(best) + 1} tensors), and no part of it is of the form y = x + f(x). "
        f"Nearest: the part from {nearest.entry.name} to {nearest.exit.name} ({len(nearest.path)} nodes), but "
        f"{_broke(flow, nearest)}. The graph has {additions} additions of computed tensors."
    )


def _broke(flow: Flow, span: Span) -> str:
    if not is_sum(flow, span.exit):
        return f"it ends in {span.exit.name} = {operators.kind(span.exit)}, needed an addition"
    names = ", ".join(node.name for node in flow.inputs(span.exit))
    if span.entry not in flow.inputs(span.exit):
        return f"the terms of the addition {span.exit.name} are {names}, needed {span.entry.name} among them"
    return f"nothing between {span.entry.name} and {span.exit.name} reads a weight matrix or mixes positions"
