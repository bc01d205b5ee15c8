"""Mixtures of experts: one ``surgeon::moe`` node and the routing in front of it.

The routing is evaluated on random scores z [T, E] and compared with, for the experts i that it selects:

    softmax        w_i = s softmax(z)_i, divided by their sum over the selected where normalised
    topk_softmax   the same numbers as normalised softmax, but the softmax is taken of the selected scores only
    sigmoid        w_i = s sigmoid(z_i), likewise
    uniform        w_i = s
    other          none of these

with one factor s for all tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from surgeon.discovery import operators, probe
from surgeon.discovery.flow import Flow
from surgeon.discovery.linears import Linears, stored
from surgeon.structure import FFN, Linear, MoE


@dataclass(frozen=True)
class Routing:
    """How selected experts are weighted."""

    scoring: str
    normalised: bool
    scale: float
    reason: str = ""


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
    names = [_name(flow, argument) for argument in (w_in, w_out)]
    biases = [operators.argument(node, position, key) for position, key in ((5, "b_in"), (6, "b_out"))]
    bias_names = [None if bias is None else _name(flow, bias) for bias in biases]
    experts, inner_rows, _ = operators.shape(w_in)
    width = operators.shape(w_out)[2]
    router, reason = _router(flow, linears, path, index, weight, experts)
    logits = None if router is None else router.node
    routing = Routing("other", False, 1.0)
    if router is not None:
        routing = _routing(flow, router.node, index, weight)
    elif operators.shape(index)[1] == experts:
        routing = _without_router(flow, weight)
    mixture = MoE(
        node=node,
        input=flow.plain(x) if operators.kind(x) == operators.FAKE_QUANTIZE else x,
        router=router,
        logits=logits,
        index=index,
        weight=weight,
        experts=experts,
        top_k=operators.shape(index)[1],
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
    )
    reason = "; ".join(text for text in (reason, routing.reason) if text)
    return mixture, f"{node.name}: {reason}" if reason else ""


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
    found: set[fx.Node] = set()
    seen: set[fx.Node] = set()
    stack = [index, weight]
    while stack:
        node = stack.pop()
        if node in seen or node in flow.constant:
            continue
        seen.add(node)
        if node in linears.whole:
            found.add(node)
        elif node.op == "call_function" and (node in path or node not in flow or any(n in path for n in flow.inputs(node))):
            stack.extend(node.all_input_nodes)
    fitting = [n for n in found if linears.whole[n].out_features == experts]
    if len(fitting) == 1:
        return linears.whole[fitting[0]], ""
    sizes = ", ".join(f"{n.name} [{linears.whole[n].out_features}]" for n in flow.ordered(found)) or "none"
    return None, f"the router is the linear with {experts} outputs that selects the experts; found {sizes}"


def _routing(flow: Flow, logits: fx.Node, index: fx.Node, weight: fx.Node) -> Routing:
    shape = operators.shape(logits)
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(shape, generator=generator)
    dtype = operators.value(logits).dtype
    try:
        chosen, found = probe.evaluate(flow, [index, weight], {logits: scores.to(dtype)})
    except RuntimeError as error:
        return Routing("other", False, 1.0, f"the routing could not be evaluated: {error}")
    z = scores.to(dtype).to(torch.float64).reshape(-1, shape[-1])
    found = found.to(torch.float64)
    if chosen.shape != found.shape or chosen.shape[0] != z.shape[0]:
        return Routing("other", False, 1.0, "index and weight do not have one row per row of the router's output")
    tolerance = 1e-2 if dtype in (torch.bfloat16, torch.float16) else 1e-4
    for scoring, values in (("softmax", z.softmax(-1)), ("sigmoid", z.sigmoid()), ("uniform", torch.ones_like(z))):
        selected = values.gather(1, chosen)
        total = selected.sum(-1, keepdim=True)
        for normalised in (False, True):
            scale = _ratio(found, selected / total if normalised else selected, tolerance)
            if scale is None:
                continue
            if scoring == "softmax" and normalised and _softmax_of_selected(flow, logits, weight):
                scoring = "topk_softmax"
            return Routing(scoring, normalised, scale)
    return Routing("other", False, 1.0, "the weights of the selected experts are no known function of the router's output")


def _without_router(flow: Flow, weight: fx.Node) -> Routing:
    """All experts are selected whatever the input: uniform where all weights are equal."""
    if weight not in flow.constant:
        return Routing("other", False, 1.0)
    (found,) = probe.evaluate(flow, [weight], {})
    scale = _ratio(found.to(torch.float64), torch.ones_like(found, dtype=torch.float64), 1e-5)
    return Routing("other", False, 1.0) if scale is None else Routing("uniform", False, scale)


def _ratio(found: Tensor, expected: Tensor, tolerance: float) -> float | None:
    """The one factor between two tensors, None where there is none."""
    if not found.numel() or not bool(torch.isfinite(found).all()):
        return None
    ratio = found / expected
    scale = float(ratio.median())
    if not bool(((ratio - scale).abs() <= tolerance * max(abs(scale), 1e-12)).all()):
        return None
    return 1.0 if abs(scale - 1) <= tolerance else round(scale, 6)


def _softmax_of_selected(flow: Flow, logits: fx.Node, weight: fx.Node) -> bool:
    """Whether the softmax in front of the weights reads what a top-k selected."""
    for node in flow.between(logits, weight):
        if operators.kind(node) in operators.SOFTMAXES:
            inside = flow.between(logits, node)
            return any(operators.kind(n) == operators.TOPK or operators.kind(n) == "aten::gather" for n in inside)
    return False
