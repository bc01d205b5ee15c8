"""Reading feed-forward networks and mixtures of experts of a block."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, fx

from surgeon.backends._gguf_attention import behind, in_front
from surgeon.backends._gguf_parts import FeedForward, Matrix, Mixture, Weights, times
from surgeon.backends._gguf_probe import Evaluation
from surgeon.backends._gguf_weights import matrix, stack
from surgeon.discovery.flow import Flow
from surgeon.gates import gate
from surgeon.graph import Graph
from surgeon.structure import FFN, MoE, Region


def read_ffn(graph: Graph, flow: Flow, run: Evaluation, region: Region, site: str, noise: Tensor) -> FeedForward:
    """The feed-forward network of a region.

    Raises:
        ValueError: it is none that is known; says what was found.
    """
    if len(region.ffn) != 1:
        raise ValueError(f"it holds {len(region.ffn)} feed-forward networks, needed one")
    part = region.ffn[0]
    pre = in_front(flow, run, region.entry, part.input, noise)
    post, factor = behind(run, region, part.down.node, noise)
    found = _dense(graph, flow, part, site)
    return replace(found, down=times(found.down, factor), pre=pre, post=post)


def _dense(graph: Graph, flow: Flow, part: FFN, site: str) -> FeedForward:
    if part.activation is None or part.scaled or part.normed:
        what = "its activation was not recognised" if part.activation is None else "its neurons are scaled or normalised"
        raise ValueError(f"{what}, and the formats know gates and activations alone")
    return FeedForward(
        site,
        up=matrix(graph, flow, part.up, f"{site}.up"),
        down=matrix(graph, flow, part.down, f"{site}.down"),
        gate=None if part.gate is None else matrix(graph, flow, part.gate, f"{site}.gate"),
        activation=part.activation,
        width=part.width,
    )


def read_mixture(
    graph: Graph, flow: Flow, run: Evaluation, region: Region, site: str, noise: Tensor, *, repeat: bool
) -> Mixture:
    """The mixture of experts of a region, in the terms of those that are written.

    A softmax over the chosen scores, or over all of them, times s: s goes into the down matrices.  Weights that are s for every
    chosen expert are the first for one expert a token, and for all of them where the router is zeros: 1/E each, times s E.

    Raises:
        ValueError: it is none that is known; says what was found.
    """
    if len(region.moe) != 1 or region.ffn:
        raise ValueError(f"it holds {len(region.moe)} mixtures and {len(region.ffn)} further networks, needed one mixture")
    part = region.moe[0]
    if problem := _unknown(part):
        raise ValueError(problem)
    pre = in_front(flow, run, region.entry, part.input, noise)
    w_in, w_out = (node for node in part.node.args[3:5])
    assert isinstance(w_in, fx.Node)
    assert isinstance(w_out, fx.Node)
    merged = _merged(graph, part)
    if merged is not None and not repeat:
        raise ValueError(
            f"{len(merged)} choices of its router share {part.experts} merged experts, the format has one expert per choice: "
            "merged_experts: repeat writes copies of them"
        )
    stacked = stack(graph, flow, w_in, f"{site}.w_in ({part.w_in})", merged)
    down = stack(graph, flow, w_out, f"{site}.w_out ({part.w_out})", merged)
    post, residual = behind(run, region, part.node, noise) if not part.shared else (None, 1.0)
    rows = torch.arange(part.width)
    router, factor, weights = _router(graph, flow, part, site)
    shared, shared_gate = _shared(graph, flow, part, site)
    return Mixture(
        site,
        router=router,
        up=_part(stacked, rows + part.width) if part.gated else stacked,
        down=replace(down, factor=down.factor * factor * residual),
        gate=_part(stacked, rows) if part.gated else None,
        activation=part.activation,
        width=part.width,
        experts=router.shape[0],
        top_k=part.top_k,
        weights=weights,
        shared=shared,
        shared_gate=shared_gate,
        pre=pre,
        post=post,
    )


def _part(whole: Matrix, rows: Tensor) -> Matrix:
    return replace(whole, rows=rows, shape=(whole.shape[0], len(rows), whole.shape[2]))


def _unknown(part: MoE) -> str | None:
    """What the formats do not know of a mixture."""
    wrong = {
        "a router that was not recognised": part.router is None,
        "experts with biases": part.b_in is not None or part.b_out is not None,
        "a correction that only selects": part.selection_bias is not None,
        "experts in groups": part.groups > 1,
        "experts that take a limited number of tokens": part.capacity is not None,
        "chosen experts that are skipped": part.masked,
        "weights on the experts' inputs": part.input_scaled,
        "a factor per expert": part.expert_scale is not None,
        "several shared experts": len(part.shared) > 1,
        "a shared expert's gate without a shared expert": part.shared_gate is not None and not part.shared,
    }
    found = [what for what, there in wrong.items() if there]
    return f"it has {' and '.join(found)}, which the formats written here do not say" if found else None


def _merged(graph: Graph, part: MoE) -> Tensor | None:
    """The expert of each choice, where experts were merged under a router with a score for each former one."""
    index = part.node.args[1]
    if isinstance(index, fx.Node) and index.target is torch.ops.aten.index.Tensor:
        held = index.args[0]
        if isinstance(held, fx.Node) and held.op == "get_attr":
            return graph.tensor(str(held.target)).detach()
    return None


def _router(graph: Graph, flow: Flow, part: MoE, site: str) -> tuple[Matrix, float, Weights]:
    """The router [experts, H], what the down matrices are multiplied with, and which softmax weighs experts."""
    assert part.router is not None
    router = matrix(graph, flow, part.router, f"{site}.router")
    if router.bias is not None:
        if float(router.bias.float().std(unbiased=False)) > 1e-6 * (1 + float(router.bias.abs().max())):
            advice = "moefy_ffn: {router: centroid} makes none"
            raise ValueError(f"its router has a bias, and the formats written here have none; {advice}")
        router = replace(router, bias=None)  # equal for all experts: it cancels
    choices = router.shape[0]
    if part.scoring == "uniform" and part.top_k == choices and not part.normalised:
        zeros = torch.zeros(router.shape)
        return Matrix(router.label, router.shape, lambda: zeros), part.scale * choices, "softmax"
    if part.scoring == "uniform" and part.top_k == 1:
        return router, part.scale, "softmax"
    if part.scoring == "topk_softmax" or (part.scoring == "softmax" and part.normalised):
        return router, part.scale, "softmax"
    if part.scoring == "softmax":
        return router, part.scale, "softmax_all"
    how = f"{part.scale:g} each" if part.scoring == "uniform" else f"{part.scoring} of the scores"
    raise ValueError(
        f"the {part.top_k} of {part.experts} chosen experts are added with weights {how}, and the formats written here weigh "
        "them with a softmax of the scores: the same only for one chosen expert, or all"
    )


def _shared(graph: Graph, flow: Flow, part: MoE, site: str) -> tuple[FeedForward | None, Matrix | None]:
    if not part.shared:
        return None, None
    ffn = _dense(graph, flow, part.shared[0], f"{site}.shared")
    scale = None if part.shared_gate is None else matrix(graph, flow, part.shared_gate, f"{site}.shared_gate")
    return ffn, scale


# -- computing what was read ----------------------------------------------------------------------------------------


def apply(part: FeedForward | Mixture, x: Tensor) -> Tensor:
    """What the sublayer makes of hidden states [rows, length, H], in float32."""
    normed = x if part.pre is None else part.pre.apply(x)
    found = _mixed(part, normed) if isinstance(part, Mixture) else _through(part, normed)
    return x + (found if part.post is None else part.post.apply(found))


def _through(part: FeedForward, x: Tensor) -> Tensor:
    up = part.up.apply(x)
    hidden = gate(part.activation).alone(up) if part.gate is None else gate(part.activation).joined(part.gate.apply(x), up)
    return part.down.apply(hidden)


def _mixed(part: Mixture, x: Tensor) -> Tensor:
    tokens = x.reshape(-1, x.shape[-1])
    scores = part.router.apply(tokens)
    chosen, index = scores.topk(part.top_k, -1)
    weight = chosen.softmax(-1) if part.weights == "softmax" else scores.softmax(-1).gather(-1, index)
    stacks = [None if m is None else m.dense().float() for m in (part.gate, part.up, part.down)]
    assert stacks[1] is not None
    assert stacks[2] is not None
    w_in = stacks[1] if stacks[0] is None else torch.cat([stacks[0], stacks[1]], 1)
    found: Tensor = torch.ops.surgeon.moe(tokens, index, weight, w_in, stacks[2], None, None, part.activation)
    if part.shared is not None:
        beside = _through(part.shared, tokens)
        found = found + (beside if part.shared_gate is None else part.shared_gate.apply(tokens).sigmoid() * beside)
    return found.reshape(x.shape)


