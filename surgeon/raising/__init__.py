"""Mixtures of experts in any spelling, raised to one ``surgeon::moe`` node each (attention over caches: ``attention``).

A model may loop over its experts, compute all of them, gather each token's weights or sort tokens by expert; it may store
one tensor for all experts or one each.  From the expert weights, and not from the router, this package looks for

1. the *exit*: a node that everything computed from them passes through (post-dominators, ``cuts``);
2. the *cut*: the experts' input and what the router hands over, such that the exit follows from these alone;
3. the *roles* of the weights and the activation (``weights``, ``match``), found by running the region.

A region is replaced only where it equals the operator on random inputs, weights and routings; a proof counts for every
region of the same signature.  Otherwise it stays as it was and the reason is kept.  Routing stays in front of the node as
it was spelled.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from torch import fx

from surgeon.discovery import operators
from surgeon.discovery.flow import Flow
from surgeon.graph import Graph
from surgeon.raising import cuts
from surgeon.raising.attention import raise_attention
from surgeon.raising.match import Mixture, Trial, transfer
from surgeon.raising.region import Region, is_sized
from surgeon.raising.replace import insert, settle_layout
from surgeon.rewrite import Editor

__all__ = ["raise_attention", "raise_mixtures"]

SKIP = 3
"""How many of a group of weights may come before the experts': gate and up of a shared expert."""

PATIENCE = 25
"""Exits without a cut after which a weight is taken to belong to no experts."""

PATIENCE_ONE_EACH = 10
"""The same where every expert has a weight of its own: weights follow an expert's last product, and dense models, all of
whose projections are such candidates, are left soon."""

KEPT = 64
"""Cuts that are remembered: every step of a loop over experts is an exit, only the last ones matter."""


def raise_mixtures(graph: Graph, *, adopt: bool = False) -> tuple[Graph, dict[str, str]]:
    """Replace every mixture of experts that can be proven to be one.

    Args:
        graph: a canonical graph, edited in place.
        adopt: let the source's own parameters become views of stacked ones, so that no weight is held twice; for
            sources that nobody else holds.

    Returns:
        The graph, and why weights that look like those of experts were left alone, by name.
    """
    editor = Editor(graph)
    flow = Flow(graph)
    found, reasons = find_mixtures(flow)
    for mixture in found:
        insert(editor, flow, mixture, adopt=adopt)
    settle_layout(editor, adopt=adopt)
    return editor.finish(), reasons


def find_mixtures(flow: Flow) -> tuple[list[Mixture], dict[str, str]]:
    """Every mixture of a graph that is not one node yet, in graph order, and why others are none."""
    seeds = list(_seeds(flow))
    if not seeds:
        return [], {}
    follower = cuts.followers(flow)
    proofs: dict[Any, Mixture | str] = {}
    counts: dict[Any, set[int]] = {}
    found: list[Mixture] = []
    reasons: dict[str, str] = {}
    taken: set[str] = set()
    for reads, experts in seeds:
        ends: set[fx.Node] = set()
        while reads and not any(str(node.target) in taken for node in reads):
            names = tuple(str(node.target) for node in reads)
            result: Mixture | str = ""
            for read in reads[:SKIP]:
                result = _search(flow, follower, read, names, experts, proofs, counts, ends)
                if isinstance(result, Mixture):
                    break
            if not isinstance(result, Mixture):
                if result and (len(names) == 1 or len(names) > 3):  # two or three are gate and up, or query, key and value
                    reasons.update(dict.fromkeys(names, result))
                break
            found.append(result)
            ends.update(result.region.program)
            taken.update(result.region.names)
            reads = [node for node in reads if str(node.target) not in taken]
            experts = _counts(len(reads))
            if len(reads) < result.roles.second.stack.shape[0]:  # a shared expert; as many are a second mixture beside it
                break
    found.sort(key=lambda mixture: flow.index[mixture.region.exit])
    inside = {node for mixture in found for node in mixture.region.program}
    exits = {mixture.region.exit for mixture in found}
    for mixture in list(found):
        outside = _read_outside(flow, mixture.region, inside, exits)
        if outside is not None:
            found.remove(mixture)
            taken.difference_update(mixture.region.names)
            reasons.update(dict.fromkeys(mixture.region.names, f"they are read by {outside.name} too, outside of the mixture"))
    return found, {name: reason for name, reason in reasons.items() if name not in taken}


def _read_outside(
    flow: Flow, region: Region, inside: Collection[fx.Node], exits: Collection[fx.Node]
) -> fx.Node | None:
    """What reads a region's weights, or what is computed from them up to an exit, beside the nodes that are replaced.

    The weights would be held twice.
    """
    stack = [node for name in region.names for node in flow.readers[name]]
    seen = set(exits)
    while stack:
        for user in stack.pop().users:
            if user in seen:
                continue
            seen.add(user)
            if user not in flow.constant and user not in inside:
                return user
            stack.append(user)
    return None


def _search(
    flow: Flow,
    follower: dict[fx.Node, fx.Node],
    read: fx.Node,
    names: tuple[str, ...],
    experts: set[int],
    proofs: dict[Any, Mixture | str],
    counts: dict[Any, set[int]],
    ends: Collection[fx.Node],
) -> Mixture | str:
    reader = cuts.first_reader(flow, read)
    if reader is None:
        return ""
    reason = ""
    best: Mixture | None = None
    for x in cuts.inputs(flow, reader[1]):
        if best is not None and not cuts.is_dispatched(flow, best.x):
            break
        trials, unfit = _trials(flow, follower, read, x, names, experts, counts, ends)
        reason = reason or unfit
        for trial in reversed(trials):  # as much as possible, so last exits first
            key = (trial.routing.kind, trial.routing.k, len(trial.bases), trial.region.signature())
            if key not in proofs:
                proofs[key] = trial.solve()
            known = proofs[key]
            if isinstance(known, Mixture) and known.beyond == "something":
                count = known.roles.second.stack.shape[0]
                if not cuts.is_bounded(trial.routing.source, count):
                    known = f"{trial.routing.source.name} may be {count} or more, which selects something too"
            if isinstance(known, Mixture) and trial.routing.kind == "slots" and not trial.holds_one_each():
                known = f"{trial.routing.source.name} holds several tokens in one place, or not those that are dispatched"
            if isinstance(known, Mixture):
                if best is None or flow.index[trial.region.exit] > flow.index[best.region.exit]:
                    best = transfer(known, trial)
                break
            reason = reason or known
    if best is not None:
        return best
    return reason or "no input and no routing were found that its experts follow from alone"


def _trials(
    flow: Flow,
    follower: dict[fx.Node, fx.Node],
    read: fx.Node,
    x: fx.Node,
    names: tuple[str, ...],
    experts: set[int],
    counts: dict[Any, set[int]],
    ends: Collection[fx.Node],
) -> tuple[list[Trial], str]:
    """Exits outside of ``ends`` with the cuts that they follow from and weights that fit, and why none was found.

    What a node follows from only grows along the exits, and so do its weights: the first exit behind others whose weights
    fit no experts any more, because it reads into the next layer, is the last one that is looked at.
    """
    tokens = _count(x) // operators.shape(x)[-1]
    found: list[Trial] = []
    unfit = ""
    waiting = PATIENCE if len(names) == 1 else PATIENCE_ONE_EACH
    computed = {read}  # from the experts' weights: a routing among it is one of a later layer
    position = flow.index[read] + 1
    for exit in cuts.exits(flow, follower, read):
        if exit in ends:
            break
        shape = operators.shape(exit)
        if not flow.depends(exit, x) or not shape or _count(exit) != tokens * shape[-1]:
            continue
        for node in flow.nodes[position : flow.index[exit] + 1]:
            if any(source in computed for source in node.all_input_nodes):
                computed.add(node)
        position = flow.index[exit] + 1
        trials = []
        terms = cuts.terms(flow, exit)
        ways: list[frozenset[fx.Node]] = []  # paths from the graph's inputs to the exit: a cut has a node on each of them
        for routing in cuts.routings(flow, exit, x, tokens, experts):
            if any(node in computed for node in routing.nodes):
                continue
            if any(way.isdisjoint(routing.nodes) and way.isdisjoint(terms) for way in ways):
                continue
            bases = tuple(cuts.bases(flow, exit, routing))
            cut = (x, *routing.nodes, *bases)
            if any(way.isdisjoint(cut) for way in ways):
                continue
            region = Region(flow, exit, cut, flow.index[x] - cuts.REACH)
            if region.way:
                ways.append(region.way)
            least = 1 if routing.kind in ("dense", "bound") else (len(names) + 1) // 2
            if region.complete and len(set(names) & set(region.names)) >= least:
                trial = Trial(region, x, routing, bases)
                if trial.fits(counts):
                    trials.append(trial)
                else:
                    unfit = unfit or trial.misfit()
        if not trials:
            waiting -= 1
            if found or waiting == 0:
                break
        found = [*found[-KEPT:], *reversed(trials)]
    return found, "" if found else unfit


def _seeds(flow: Flow) -> Iterator[tuple[list[fx.Node], set[int]]]:
    """Weights that may belong to the experts of one mixture, and possible numbers of experts.

    Case 1: one tensor [E, A, B], or a matrix that is only read as one.
    Case 2: several matrices of one shape that multiply the same tensor, or rows gathered from it.
    Case 3: a table [E, A] whose rows are selected: every expert is one neuron.
    """
    siblings: dict[tuple[fx.Node, tuple[int, ...]], list[fx.Node]] = {}
    for nodes in flow.readers.values():
        node = nodes[0]
        if not operators.is_float(node) or all(operators.kind(user) == operators.MOE for user in node.users):
            continue
        shapes = {operators.shape(node), *(operators.shape(user) for user in node.users if user in flow.constant)}
        apart = cuts.parts(node) if len(operators.shape(node)) == 2 and len(flow.readers[str(node.target)]) == 1 else None
        shapes |= set() if apart is None else {apart}
        deep = {shape[0] for shape in shapes if len(shape) == 3 and shape[0] > 1 and min(shape) > 1}
        if len(operators.shape(node)) == 2 and any(flow.retrieves(user) for user in node.users):  # Case 3
            yield [node], {operators.shape(node)[0]}
            continue
        reader = cuts.first_reader(flow, node) if deep or len(operators.shape(node)) == 2 else None
        if reader is None or operators.kind(reader[0]) in operators.CONVOLUTIONS:
            continue
        if deep and operators.kind(reader[0]) not in ("aten::add", "aten::mul", "aten::sub"):  # Case 1
            yield [node], deep
        elif len(operators.shape(node)) == 2 and operators.kind(reader[0]) in operators.PRODUCTS:  # Case 2
            source = _source(flow, reader[1])
            siblings.setdefault((source, operators.shape(node)), []).append(node)
    for group in siblings.values():
        if len(group) > 1:
            yield group, _counts(len(group))


def _counts(siblings: int) -> set[int]:
    """Numbers of experts that so many weights of one shape may belong to.

    A shared expert may read the same tensor, gate and up may be alike, and several mixtures may stand side by side.
    """
    counts = {siblings - shared for shared in (0, 1, 2)}
    beside = {siblings // mixtures for mixtures in range(2, siblings) if siblings % mixtures == 0}
    return {n for n in counts | {n // 2 for n in counts} | beside if n > 1}


def _source(flow: Flow, node: fx.Node) -> fx.Node:
    """The tensor whose rows a product reads."""
    while not is_sized(node) or operators.is_reshape(node) or operators.kind(node) in operators.REPETITIONS:
        sources = flow.inputs(node)
        if len(sources) != 1 or not (operators.is_movement(node) or operators.kind(node) in operators.LOOKUPS):
            return node
        node = sources[0]
    return node


def _count(node: fx.Node) -> int:
    result = 1
    for size in operators.shape(node):
        result *= size
    return result
