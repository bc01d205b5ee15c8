"""Mixtures of experts: one ``surgeon::moe`` node, the routing in front of it, and the shared experts beside it.

Two forms of the node are one mixture: weights on the experts' outputs, and weights on their inputs (``input_scaled``), where
every pair of a token and an expert is a row of its own:

    moe(x, index, weight)        sum over j of moe(weight_j x, index_j, 1)

Where experts were merged, the router still chooses among as many as it did, and a table of the choices' experts stands in
front of the node: ``index = table[choice]``.  Its routing is told by the choices.  So it is where a router knows a few choices
more than there are experts, such as none of them: a token that takes one weighs 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from surgeon.discovery import operators
from surgeon.discovery.flow import Flow
from surgeon.discovery.linears import Linears, stored
from surgeon.discovery.routing import Routing, recognise_routing, scores_experts, without_router
from surgeon.structure import FFN, Linear, MoE


def find_mixtures(
    flow: Flow, linears: Linears, path: frozenset[fx.Node], shared: tuple[FFN, ...]
) -> tuple[list[MoE], list[str]]:
    """Mixtures of a region, with ``shared`` as the FFNs beside the first of them, and what was not understood."""
    found: list[MoE] = []
    reasons: list[str] = []
    for node in flow.ordered(path):
        if operators.kind(node) == operators.MOE:
            mixture, reason = _mixture(flow, linears, path, node, () if found else shared)
            found.append(mixture)
            reasons.extend([reason] if reason else [])
    return found, reasons


def _mixture(
    flow: Flow, linears: Linears, path: frozenset[fx.Node], node: fx.Node, shared: tuple[FFN, ...]
) -> tuple[MoE, str]:
    x, index, weight, w_in, w_out = (_node(argument) for argument in node.args[:5])
    choice, choices = _choices(index)
    scaled = _scaled_inputs(flow, x, choice)
    if scaled is not None:
        x, choice, weight = scaled
        index = choice if choices is None else index
    names = [_name(flow, argument) for argument in (w_in, w_out)]
    biases = [operators.argument(node, position, key) for position, key in ((5, "b_in"), (6, "b_out"))]
    bias_names = [None if bias is None else _name(flow, bias) for bias in biases]
    experts, inner_rows, _ = operators.shape(w_in)
    width = operators.shape(w_out)[2]
    router, reason = _router(flow, linears, path, choice, weight, choices or experts)
    routing = Routing("other", False, 1.0)
    if router is not None:
        routing = recognise_routing(flow, router.node, choice, weight)
        if routing.scoring == "other" and not scores_experts(flow, router.node, choice, weight):
            reason = f"{router.node.name} has as many outputs as there are experts, but they are not scores of one each"
            router = None
    elif operators.shape(choice)[1] == (choices or experts):
        routing = without_router(flow, weight)
    else:
        larger = _more_choices(flow, linears, path, choice, weight, choices or experts)
        told = None if larger is None else recognise_routing(flow, larger.node, choice, weight)
        if told is not None and told.scoring != "other" and not told.reason:
            router, routing, reason = larger, told, ""
    mixture = MoE(
        node=node,
        input=flow.plain(x) if operators.kind(x) == operators.FAKE_QUANTIZE else x,
        router=router,
        logits=None if router is None else routing.logits or router.node,
        index=index,
        weight=weight,
        experts=experts,
        top_k=operators.shape(choice)[1],
        scoring=routing.scoring,
        normalised=routing.normalised,
        width=width,
        gated=inner_rows == 2 * width,
        activation=str(operators.argument(node, 7, "activation")),
        w_in=names[0],
        w_out=names[1],
        b_in=bias_names[0],
        b_out=bias_names[1],
        # a router with a hidden layer looks like an FFN beside the experts
        shared=tuple(ffn for ffn in shared if router is None or ffn.down.node is not router.node),
        scale=routing.scale,
        shared_gate=_shared_gate(flow, linears, path, shared),
        selection_bias=routing.selection_bias,
        groups=routing.groups,
        top_groups=routing.top_groups,
        group_worth=routing.group_worth,
        capacity=routing.capacity,
        masked=routing.masked,
        expert_scale=routing.expert_scale,
        input_scaled=scaled is not None,
    )
    reason = "; ".join(text for text in (reason, routing.reason) if text)
    return mixture, f"{node.name}: {reason}" if reason else ""


def _choices(index: fx.Node) -> tuple[fx.Node, int | None]:
    """What the router chose, and of how many, where a table says which expert stands for each choice; else the index, None."""
    if operators.kind(index) != "aten::index":
        return index, None
    table, chosen = index.args[0], index.args[1]
    if not isinstance(table, fx.Node) or table.op != "get_attr" or len(operators.shape(table)) != 1:
        return index, None
    if not isinstance(chosen, list | tuple) or len(chosen) != 1 or not isinstance(chosen[0], fx.Node):
        return index, None
    return _node(chosen[0]), operators.shape(table)[0]


def _node(argument: Any) -> fx.Node:
    assert isinstance(argument, fx.Node)
    return argument


def _name(flow: Flow, node: Any) -> str:
    found = stored(node, flow)
    if found is not None:
        return found.name
    names = flow.weights.get(node, ())
    return names[0] if names else str(node)


def _router(
    flow: Flow, linears: Linears, path: frozenset[fx.Node], index: fx.Node, weight: fx.Node, experts: int
) -> tuple[Linear | None, str]:
    """The one linear with a row per expert that the selection is computed from."""
    found = _behind(flow, linears, path, (index, weight))
    fitting = [n for n in found if linears.whole[n].out_features == experts]
    if len(fitting) == 1:
        return linears.whole[fitting[0]], ""
    sizes = ", ".join(f"{n.name} [{linears.whole[n].out_features}]" for n in flow.ordered(found)) or "none"
    return None, f"the router is the linear with {experts} outputs that selects the experts; found {sizes}"


def _more_choices(
    flow: Flow, linears: Linears, path: frozenset[fx.Node], index: fx.Node, weight: fx.Node, experts: int
) -> Linear | None:
    """The linear that knows a choice or a few beyond the experts, such as none of them, and that the selection follows from."""
    found = _behind(flow, linears, path, (index, weight))
    fitting = [n for n in found if experts < linears.whole[n].out_features < 2 * experts]
    return linears.whole[fitting[0]] if len(fitting) == 1 else None


def _behind(flow: Flow, linears: Linears, path: frozenset[fx.Node], ends: Sequence[fx.Node]) -> set[fx.Node]:
    """The nearest linears that nodes are computed from."""
    found: set[fx.Node] = set()
    seen: set[fx.Node] = set()
    stack = list(ends)
    while stack:
        node = stack.pop()
        if node in seen or node in flow.constant:
            continue
        seen.add(node)
        if node in linears.whole:
            found.add(node)
        elif node.op == "call_function" and (node in path or node not in flow or any(n in path for n in flow.inputs(node))):
            stack.extend(node.all_input_nodes)
    return found


def _scaled_inputs(flow: Flow, x: fx.Node, index: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """Input, index and weight of a mixture whose rows are pairs of a token and an expert, scaled by the weight."""
    pairs = flow.plain(index)
    product = flow.plain(x)
    if operators.shape(index)[-1] != 1 or operators.kind(product) != "aten::mul" or len(operators.shape(product)) != 3:
        return None
    factors = [n for n in product.all_input_nodes if operators.kind(n) == "aten::unsqueeze"]
    if len(factors) != 2 or operators.shape(pairs)[-1] != operators.shape(product)[1]:
        return None
    inputs = [_node(n.args[0]) for n in factors if operators.shape(n)[1] == 1]
    weights = [_node(n.args[0]) for n in factors if operators.shape(n)[2] == 1]
    rows = index if operators.kind(index) != "aten::reshape" else _node(index.args[0])
    return (inputs[0], rows, weights[-1]) if inputs and weights else None


def _shared_gate(flow: Flow, linears: Linears, path: frozenset[fx.Node], shared: tuple[FFN, ...]) -> Linear | None:
    """The linear with one output whose value multiplies a shared expert's."""
    for ffn in shared:
        for node in flow.ordered(path):
            if operators.kind(node) != "aten::mul" or not flow.depends(node, ffn.down.node):
                continue
            for factor in flow.inputs(node):
                if flow.depends(factor, ffn.down.node):
                    continue
                source = flow.strip(factor, lambda n: n not in linears.whole and n in path)
                linear = linears.whole.get(source)
                if linear is not None and linear.out_features == 1:
                    return linear
    return None
