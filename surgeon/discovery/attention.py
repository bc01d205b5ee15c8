"""Softmax attention: a core (:mod:`surgeon.discovery.cores`) and the projections around it.

Projections are found by walking back from query, key and value to the nearest linears: rotary arithmetic, norms and
movement lie in between.  A linear that feeds another one found this way (a latent that is expanded) is not counted.

Cores that share one output projection are one attention where they are its heads (a loop over slices of common projections,
or heads with projections of their own), or where they share query and key and mix parts of the values.

Keys that are not computed from where the region starts are those of another stream (*cross*), unless the region starts with
fewer positions of the tensor that they are computed from: queries are pooled then.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from torch import fx

from surgeon.discovery import operators
from surgeon.discovery.cores import Core, find_cores, product
from surgeon.discovery.flow import Flow
from surgeon.discovery.linears import Linears
from surgeon.discovery.norms import is_affine, normalised
from surgeon.discovery.residuals import reads_weights
from surgeon.structure import Attention, Linear


def find_attentions(
    flow: Flow, linears: Linears, path: frozenset[fx.Node], entry: fx.Node
) -> tuple[list[Attention], list[str]]:
    """Attentions of a region.

    Args:
        flow: the graph's data flow.
        linears: its linears.
        path: nodes on paths through the region.
        entry: the cut where it starts.

    Returns:
        The attentions in graph order, and for each projection that was not found the reason.
    """
    groups: dict[object, list[tuple[Attention, Core]]] = {}
    reasons: list[str] = []
    for core in find_cores(flow, linears, path):
        attention, missing = _attention(flow, linears, path, entry, core)
        same = (attention.o.node, attention.cross, attention.head_dim) if attention.o is not None else core.node
        groups.setdefault(same, []).append((attention, core))
        reasons.extend(missing)
    found: list[Attention] = []
    for group in groups.values():
        parts = [attention for attention, _ in group]
        if len(parts) == 1:
            found.append(replace(parts[0], o=_own(flow, linears, parts[0])))
        elif len({(core.q, core.k) for _, core in group}) == 1:
            found.append(replace(parts[0], node=parts[-1].node, v=_union(linears, [part.v for part in parts])))
        elif _are_heads(flow, parts):
            found.append(_joined(linears, parts))
        else:
            found.extend(parts)
    return found, reasons


def _attention(
    flow: Flow, linears: Linears, path: frozenset[fx.Node], entry: fx.Node, core: Core
) -> tuple[Attention, list[str]]:
    reasons: list[str] = []
    projections: list[Linear | None] = []
    heads: list[int | None] = []
    for role, argument in (("query", core.q), ("key", core.k), ("value", core.v)):
        linear, exact, reason = _projection(flow, linears, entry, argument)
        projections.append(linear)
        divides = linear is not None and exact and linear.out_features % core.head_dim == 0
        heads.append(linear.out_features // core.head_dim if linear is not None and divides else None)
        if linear is None:
            reasons.append(f"{role} of {core.node.name}: {reason}")
    q, k, v = projections
    outputs = _following(flow, linears, path, core.node)
    o = linears.whole[outputs[0]] if len(outputs) == 1 else None
    if o is None:
        reasons.append(
            f"output of {core.node.name}: {len(outputs)} linears follow it in the region, needed exactly one"
        )
    if None in (q, k, v, o):
        reasons.extend(_stacks(flow, path, core))
    if o is not None:
        reasons.extend(_routed_heads(flow, entry, core, o))
    queries = heads[0] or core.heads
    keys = heads[1] or (queries if operators.kind(core.node) == "aten::einsum" else min(queries, _leading(flow, core.k)))
    cross = not flow.depends(core.k, entry) and flow.depends(core.q, entry)
    cross = cross and not _is_pooled(flow, entry, k.input if k is not None else core.k)
    return Attention(core.node, q, k, v, o, queries, min(queries, keys), core.head_dim, core.causal, cross), reasons


def _is_pooled(flow: Flow, entry: fx.Node, keys: fx.Node) -> bool:
    """Whether a region starts with a pooling of the stream, without weights, that its keys are computed from as a whole."""

    def keeps(node: fx.Node) -> bool:
        return operators.is_reshape(node) or (is_affine(node) and normalised(flow, node) is None)

    source = flow.strip(keys, keeps)
    while (inner := normalised(flow, source)) is not None:
        source = flow.strip(inner, keeps)
    if source in flow.constant or not flow.depends(entry, source):
        return False
    between = flow.between(source, entry)
    averaged = any(not operators.is_movement(node) for node in between)  # a token alone may come from another stream
    return averaged and not any(reads_weights(flow, node) for node in between)


def _own(flow: Flow, linears: Linears, attention: Attention) -> Linear | None:
    """The output projection, cut down to the columns of the attention where it reads other work beside it."""
    sections = [] if attention.o is None else linears.sections(attention.o)
    own = [part for value, part in sections if flow.depends(value, attention.node)]
    return own[0] if len(own) == 1 < len(sections) else attention.o


def _leading(flow: Flow, argument: fx.Node) -> int:
    """Heads as the size of the dimension in front of positions and features, without repetitions; 1 where there is none."""
    sizes = operators.shape(argument)
    heads = math.prod(sizes[1:-2]) if len(sizes) > 3 else 1
    node = argument
    while operators.is_movement(node) and len(sources := flow.inputs(node)) == 1:
        if operators.kind(node) in operators.REPETITIONS:
            times = math.prod(operators.shape(node)) // max(1, math.prod(operators.shape(sources[0])))
            heads = heads // times if times and heads % times == 0 else heads
        node = sources[0]
    return heads


def _are_heads(flow: Flow, parts: Sequence[Attention]) -> bool:
    """Whether attentions with one output projection are its heads: side by side, one head each, of the same shape."""
    if len(parts) < 2 or any(part.heads != 1 for part in parts):
        return False
    if any(flow.depends(one.node, other.node) for one in parts for other in parts if one is not other):
        return False
    return len({operators.shape(part.node) for part in parts}) == 1


def _joined(linears: Linears, parts: Sequence[Attention]) -> Attention:
    """One attention whose heads are ``parts``."""
    first = parts[0]
    q, k, v = (_union(linears, [getattr(part, key) for part in parts]) for key in ("q", "k", "v"))
    keys = len(parts) if k is None else k.out_features // first.head_dim
    apart = tuple(parts) if None in (q, k, v) else ()
    return replace(first, node=parts[-1].node, q=q, k=k, v=v, heads=len(parts), kv_heads=keys, parts=apart)


def _union(linears: Linears, parts: Sequence[Linear | None]) -> Linear | None:
    """The parts of one linear as one; None where one is missing or they belong to several linears."""
    found = [linear for linear in parts if linear is not None]
    if len(found) < len(parts) or len({linear.node for linear in found}) != 1:
        return None
    numbers = sorted({number for linear in found for number in linears.numbers(linear)})
    return linears.take(linears.whole[found[0].node], tuple(numbers))


def _routed_heads(flow: Flow, entry: fx.Node, core: Core, o: Linear) -> list[str]:
    """Whether heads are weighted by what was selected among them for each token: plain attention computes something else."""
    for node in flow.ordered(flow.between(core.node, o.node)):
        if operators.kind(node) not in ("aten::mul", "aten::where", "aten::masked_fill", *operators.PRODUCTS):
            continue
        for factor in flow.active(node):
            if factor not in flow or not flow.depends(factor, core.node):
                selection = _selection(flow, entry, factor)
                if selection is not None:
                    return [
                        f"heads of {core.node.name} are routed, which no rule describes further: "
                        f"{node.name} weights them by what {selection.name} selects for each token"
                    ]
    return []


def _selection(flow: Flow, entry: fx.Node, node: fx.Node) -> fx.Node | None:
    """What a tensor was selected by inside of the region, integers and conditions included."""
    stack, seen = [node], {entry}
    while stack:
        source = stack.pop()
        if source in seen or source.op != "call_function" or flow.index[source] < flow.index[entry]:
            continue
        seen.add(source)
        if operators.kind(source) in operators.SELECTIONS:
            return source
        stack.extend(flow.active(source))
    return None


def _stacks(flow: Flow, path: frozenset[fx.Node], core: Core) -> list[str]:
    """Stacks of matrices that are read around a core whose projections were not found: those of experts, perhaps."""
    near = [n for n in flow.ordered(path) if flow.depends(core.node, n) or flow.depends(n, core.node)]
    stack = [source for n in near for source in n.all_input_nodes]
    read: dict[str, fx.Node] = {}
    while stack:
        source = stack.pop()
        if source.op == "get_attr" and len(operators.shape(source)) > 2:
            read.setdefault(str(source.target), source)
        elif operators.kind(source) in operators.LOOKUPS or source in flow.constant:
            stack.extend(source.all_input_nodes)
    if not read:
        return []
    names = ", ".join(f"{name} {list(operators.shape(node))}" for name, node in sorted(read.items())[:4])
    return [f"projections of {core.node.name} may be selected among those of experts, which no rule takes apart: {names}"]


def _projection(
    flow: Flow, linears: Linears, entry: fx.Node, argument: fx.Node
) -> tuple[Linear | None, bool, str]:
    """The linear that a query, key or value comes from; whether all of it does; why none was found.

    Not all of it does where features stand beside its own in every head: of another linear that lies before it (a rotary key
    shared by all heads), or of positions from outside the region.
    """
    inside = flow.depends(argument, entry)
    found: set[fx.Node] = set()
    learned: set[fx.Node] = set()
    seen: set[fx.Node] = set()
    stack = [argument]
    blocked: fx.Node | None = None
    beside = False
    while stack:
        node = stack.pop()
        if node in seen or node is entry or (inside and not flow.depends(node, entry)):
            continue
        seen.add(node)
        if node in linears.whole:
            found.add(node)
        elif node in linears.learned:
            learned.add(node)
        elif product(flow, node) is not None or operators.kind(node) in operators.SOFTMAXES | operators.ATTENTIONS:
            blocked = node
        elif operators.kind(node) in operators.LOOKUPS and not flow.inputs(node):
            blocked = node
        else:
            beside = beside or _joins_features(flow, entry if inside else None, node)
            stack.extend(flow.inputs(node))
    if not found and len(learned) == 1:
        found = {linears.adopt(node).node for node in learned}
    last = [n for n in found if not any(other is not n and flow.depends(other, n) for other in found)]
    if len(last) == 1:
        linear = linears.whole[last[0]]
        if len(found) > 1 or beside:
            return linear, False, ""
        return linears.part(linear, argument), True, ""
    if last:
        names = ", ".join(sorted(n.name for n in last))
        return None, False, f"it is computed from {len(last)} linears ({names}), needed one"
    between = f"no linear lies between {entry.name} and {argument.name}"
    return None, False, between + (f"; {blocked.name} blocks" if blocked else "")


def _joins_features(flow: Flow, entry: fx.Node | None, node: fx.Node) -> bool:
    """Whether constant features, or such from outside of a region, are put behind others; further positions do not count.

    Args:
        flow: the graph's data flow.
        entry: of the region, None for what comes from outside of it.
        node: any.
    """
    if operators.kind(node) != operators.CONCATENATE:
        return False
    if operators.argument(node, 1, "dim", 0) not in (-1, len(operators.shape(node)) - 1):
        return False
    outer = entry is not None and not all(flow.depends(part, entry) for part in flow.inputs(node))
    return outer or any(part in flow.constant for part in node.all_input_nodes)


def _following(flow: Flow, linears: Linears, path: frozenset[fx.Node], node: fx.Node) -> list[fx.Node]:
    """The first linears that read a node, nothing but other linears stopping the search."""
    found: list[fx.Node] = []
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        here = stack.pop()
        for user in here.users:
            if user in seen or user not in path:
                continue
            seen.add(user)
            if user in linears.whole:
                found.append(user)
            else:
                stack.append(user)
    return found
