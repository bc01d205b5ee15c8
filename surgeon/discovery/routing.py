"""How a router selects and weights experts, told by running it on random scores z [T, E].

Selection.  The k experts of largest s_i + b_i, s the score and b a correction that only selects; possibly only among the
experts of the best groups, whose worth is the largest or the sum of the two largest of their members' s_i + b_i.

Weight of a selected expert i, with one factor c for all tokens:

    softmax        w_i = c softmax(z)_i, divided by their sum over the selected where normalised
    topk_softmax   the same numbers as normalised softmax, but the softmax is taken of the selected scores only
    sigmoid, relu, softplus, sqrt_softplus, linear    w_i = c f(z_i), likewise
    uniform        w_i = c
    sparsemixer    a softmax of the largest over those that come near it, then the same for the second without the first
    expert_choice  softmax, where each expert takes the tokens of its largest scores
    other          none of these

All of these may be masked: some of the selected weigh 0, and where normalised the sum is that of the rest.

The scores may pass a function of single scores first (a soft cap, a temperature): z is then what it makes of them.  Each
expert may have a factor of its own behind all that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from surgeon.discovery import operators, probe
from surgeon.discovery.flow import Flow

_ROUNDS = 4
_NEAR = 1e-2
"""Spread of scores around 1 that are nearly equal."""

SCORES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda z: z.softmax(-1),
    "sigmoid": torch.sigmoid,
    "uniform": torch.ones_like,
    "relu": torch.relu,
    "softplus": F.softplus,
    "sqrt_softplus": lambda z: F.softplus(z).sqrt(),
    "linear": lambda z: z,
}
"""Score functions by name."""


@dataclass(frozen=True)
class Routing:
    """How experts are selected and weighted; fields as in :class:`surgeon.structure.MoE`."""

    scoring: str
    normalised: bool
    scale: float
    selection_bias: str | None = None
    groups: int = 1
    top_groups: int = 1
    group_worth: int = 1
    capacity: int | None = None
    masked: bool = False
    expert_scale: str | None = None
    logits: fx.Node | None = None
    reason: str = ""


@dataclass(frozen=True)
class _Runs:
    """What the router did: scores z [N, E], experts [N, k], weights [N, k]; random corrections by name.

    ``near``: weights [n, k] of scores that are nearly equal, where a router mixes those that come near the best.
    """

    z: Tensor
    chosen: Tensor
    found: Tensor
    corrections: Mapping[str, Tensor]
    rows: int
    near: Tensor


def recognise_routing(flow: Flow, logits: fx.Node, index: fx.Node, weight: fx.Node) -> Routing:
    """Describe the routing between the router's output and the experts.

    Args:
        flow: data flow.
        logits: the router's output, [..., E].
        index: selected experts [T, k].
        weight: their weights [T, k].
    """
    tolerance = 1e-2 if operators.value(logits).dtype in (torch.bfloat16, torch.float16) else 1e-4
    found: list[tuple[Routing, _Runs]] = []
    for node in _scores(flow, logits, weight):
        runs = _run(flow, node, index, weight)
        if isinstance(runs, str):
            if not found:
                return Routing("other", False, 1.0, reason=runs)
            break
        found.append((replace(_weighting(flow, node, weight, runs, tolerance), logits=node), runs))
        if found[-1][0].scoring != "other":
            break
    routing, runs = found[-1] if found[-1][0].scoring != "other" else found[0]
    if routing.scoring not in ("other", "sparsemixer", "expert_choice"):
        routing = _selecting(routing, runs)
    return replace(routing, capacity=_capacity(flow, logits, weight))


def scores_experts(flow: Flow, logits: fx.Node, index: fx.Node, weight: fx.Node) -> bool:
    """Whether the router's outputs are scores of one expert each: in another order, they select the experts in that order."""
    shape, dtype = operators.shape(logits), operators.value(logits).dtype
    generator = torch.Generator().manual_seed(1)
    order = torch.randperm(shape[-1], generator=generator)
    z = torch.randn(shape, generator=generator).to(dtype)
    vectors = {
        node: torch.rand(operators.shape(node), generator=generator).to(operators.value(node).dtype)
        for node in _corrections(flow, logits, (index, weight), shape[-1])
    }
    tables = []
    for numbers in (torch.arange(shape[-1]), order):
        moved = {node: vector.flatten()[numbers].reshape(vector.shape) for node, vector in vectors.items()}
        try:
            chosen, found = probe.evaluate(flow, [index, weight], {logits: z[..., numbers], **moved})
            blank = torch.zeros(chosen.shape[0], shape[-1], dtype=torch.float64)
            tables.append(blank.scatter_add(1, numbers[chosen], found.to(torch.float64)))
        except (RuntimeError, IndexError):
            return False
    plain, shuffled = tables
    return torch.allclose(plain, shuffled, rtol=1e-3, atol=1e-6)


def _scores(flow: Flow, logits: fx.Node, weight: fx.Node) -> list[fx.Node]:
    """The router's output, and what a function of single scores (a soft cap, a temperature) makes of it."""
    found = [logits]
    on_the_way = set(paths(flow, logits, [weight]))
    while True:
        users = [user for user in found[-1].users if user in on_the_way]
        one = len(users) == 1 and operators.shape(users[0]) == operators.shape(logits) and len(flow.active(users[0])) == 1
        if not one or not (operators.is_pointwise(users[0]) or operators.kind(users[0]) in operators.CASTS):
            return found
        found.append(users[0])


def without_router(flow: Flow, weight: fx.Node) -> Routing:
    """All experts are selected whatever the input: uniform where all weights are equal."""
    if weight not in flow.constant:
        return Routing("other", False, 1.0)
    (found,) = probe.evaluate(flow, [weight], {})
    scale = _ratio(found.to(torch.float64), torch.ones_like(found, dtype=torch.float64), 1e-5)
    return Routing("other", False, 1.0) if scale is None else Routing("uniform", False, scale)


def _run(flow: Flow, logits: fx.Node, index: fx.Node, weight: fx.Node) -> _Runs | str:
    shape, dtype = operators.shape(logits), operators.value(logits).dtype
    experts = shape[-1]
    generator = torch.Generator().manual_seed(0)
    corrections = {
        node: (0.3 * torch.rand(operators.shape(node), generator=generator)).to(operators.value(node).dtype)
        for node in _corrections(flow, logits, (index, weight), experts)
    }
    scores, chosen, found = [], [], []
    for number in range(_ROUNDS + 1):
        z = torch.randn(shape, generator=generator)
        z = (z if number < _ROUNDS else 1 + _NEAR * z).to(dtype)
        try:
            one, two = probe.evaluate(flow, [index, weight], {logits: z, **corrections})
        except RuntimeError as error:
            return f"the routing could not be evaluated: {str(error).splitlines()[0]}"
        rows = z.to(torch.float64).reshape(-1, experts)
        if one.shape != two.shape or one.shape[0] != rows.shape[0]:
            return "index and weight do not have one row per row of the router's output"
        if number == _ROUNDS:
            near = two.to(torch.float64)
            continue
        scores.append(rows)
        chosen.append(one)
        found.append(two.to(torch.float64))
    named = {str(node.target): value.to(torch.float64).flatten() for node, value in corrections.items()}
    return _Runs(torch.cat(scores), torch.cat(chosen), torch.cat(found), named, scores[0].shape[0], near)


def _corrections(flow: Flow, logits: fx.Node, ends: Sequence[fx.Node], experts: int) -> list[fx.Node]:
    """Stored vectors [E] that are read between the router's output and the choice."""
    return [
        source
        for node in paths(flow, logits, ends)
        for source in _stored(node, flow)
        if operators.is_float(source) and [size for size in operators.shape(source) if size > 1] == [experts]
    ]


def _stored(node: fx.Node, flow: Flow) -> list[fx.Node]:
    """Tensors that a node reads, directly or through what is computed from them alone."""
    found, stack = [], [source for source in node.all_input_nodes if source in flow.constant]
    while stack:
        source = stack.pop()
        if source.op == "get_attr":
            found.append(source)
        else:
            stack.extend(source.all_input_nodes)
    return found


def paths(flow: Flow, start: fx.Node, ends: Sequence[fx.Node]) -> list[fx.Node]:
    """Nodes on paths from ``start`` (without it) to ``ends`` (with them), integers included, in order."""
    before: set[fx.Node] = set()
    stack = list(ends)
    first = flow.index[start]
    while stack:
        node = stack.pop()
        if node not in before and flow.index[node] > first:
            before.add(node)
            stack.extend(node.all_input_nodes)
    after = {start}
    for node in flow.ordered(before):
        if any(source in after for source in node.all_input_nodes):
            after.add(node)
    return [node for node in flow.ordered(after) if node is not start]


# -- weights ----------------------------------------------------------------------------------------------------------


def _weighting(flow: Flow, logits: fx.Node, weight: fx.Node, runs: _Runs, tolerance: float) -> Routing:
    known = _known(flow, logits, weight, runs, tolerance)
    if known is not None:
        return known
    taken = runs.found.ne(0)
    for slack in _thresholds(flow, logits, weight):
        chosen, expected = _sparsemixer(runs.z, slack)
        if chosen.shape == runs.chosen.shape and torch.equal(chosen, runs.chosen):
            for masked in (False, True):
                scale = _ratio(runs.found, expected * taken if masked else expected, tolerance)
                if scale is not None:
                    return Routing("sparsemixer", False, scale, masked=masked)
    if _is_expert_choice(runs, tolerance):
        return Routing("expert_choice", False, 1.0)
    some = taken.any(-1) & ~taken.all(-1)
    if bool(some.any()):  # the others are masked: what would be a factor of the rest?
        known = _known(flow, logits, weight, runs, tolerance, taken)
        if known is not None:
            return replace(known, masked=True)
    reason = "the weights of the selected experts are no known function of the router's output"
    return Routing("other", False, 1.0, reason=reason)


def _known(
    flow: Flow, logits: fx.Node, weight: fx.Node, runs: _Runs, tolerance: float, taken: Tensor | None = None
) -> Routing | None:
    """The score function, with or without division by the sum, that gives the weights (where ``taken``, zero elsewhere)."""
    for scoring, function in SCORES.items():
        selected = function(runs.z).gather(1, runs.chosen)
        if taken is not None:
            selected = selected * taken
        total = selected.sum(-1, keepdim=True)
        for normalised in (False, True):
            expected = selected / total if normalised else selected
            for name, factor in [(None, None), *runs.corrections.items()]:
                scale = _ratio(runs.found, expected if factor is None else expected * factor[runs.chosen], tolerance)
                if scale is None:
                    continue
                if scoring == "uniform" and factor is None and not _alike(runs.near, normalised, tolerance):
                    continue
                if scoring == "softmax" and normalised and _softmax_of_selected(flow, logits, weight):
                    scoring = "topk_softmax"
                return Routing(scoring, normalised, scale, expert_scale=name)
    return None


def _alike(found: Tensor, normalised: bool, tolerance: float) -> bool:
    """Whether all weights [n, k] that are not 0 are equal, or all of a token's share one sum."""
    taken = found.ne(0).to(found.dtype)
    expected = taken / taken.sum(-1, keepdim=True) if normalised else taken
    return not bool(taken.any()) or _ratio(found, expected, tolerance) is not None


def _ratio(found: Tensor, expected: Tensor, tolerance: float) -> float | None:
    """The one factor between two tensors, None where there is none; entries that are zero in both count as equal.

    Rows that are zero in ``found`` only are tokens that were dropped.
    """
    if not found.numel() or not bool(torch.isfinite(found).all()):
        return None
    kept = found.ne(0).any(-1, keepdim=True).expand_as(found) & (found.ne(0) | expected.ne(0))
    if not bool(kept.any()):
        return None
    ratio = found[kept] / expected[kept]
    if not bool(torch.isfinite(ratio).all()):
        return None
    scale = float(ratio.median())
    if not bool(((ratio - scale).abs() <= tolerance * max(abs(scale), 1e-12)).all()):
        return None
    return 1.0 if abs(scale - 1) <= tolerance else float(f"{scale:.5g}")  # what the tolerance leaves


def _softmax_of_selected(flow: Flow, logits: fx.Node, weight: fx.Node) -> bool:
    """Whether the softmax in front of the weights reads what a top-k selected."""
    for node in flow.between(logits, weight):
        if operators.kind(node) in operators.SOFTMAXES:
            inside = flow.between(logits, node)
            return any(operators.kind(n) == operators.TOPK or operators.kind(n) == "aten::gather" for n in inside)
    return False


def _thresholds(flow: Flow, logits: fx.Node, weight: fx.Node) -> list[float]:
    """Constants that something is compared with on the way."""
    compared = [n for n in paths(flow, logits, [weight]) if operators.kind(n) in ("aten::gt", "aten::ge")]
    return list(dict.fromkeys(float(n.args[1]) for n in compared if isinstance(n.args[1], int | float)))


def _sparsemixer(z: Tensor, slack: float) -> tuple[Tensor, Tensor]:
    """Experts [N, 2] and weights [N, 2] of Liu et al. 2024 (arXiv:2409.12136), outside of training."""
    chosen, weights, left = [], [], z
    for _ in range(2):
        best, first = left.max(-1, keepdim=True)
        far = (best - z) / z.abs().clamp(min=best) > slack
        weights.append(left.masked_fill(far, -torch.inf).softmax(-1).gather(1, first))
        chosen.append(first)
        left = z.scatter(1, first, -torch.inf)
    return torch.cat(chosen, 1), torch.cat(weights, 1)


def _is_expert_choice(runs: _Runs, tolerance: float) -> bool:
    """Whether every expert takes equally many tokens, those of its largest softmax scores, with these as weights."""
    experts = runs.z.shape[1]
    if runs.chosen.shape[1] != experts:
        return False
    for rows in range(0, runs.z.shape[0], runs.rows):
        piece = slice(rows, rows + runs.rows)
        dense = torch.zeros_like(runs.z[piece]).scatter(1, runs.chosen[piece], runs.found[piece])
        taken = dense.ne(0).sum(0)
        count = int(taken[0])
        if not bool((taken == count).all()) or not 0 < count < runs.rows:
            return False
        scores = runs.z[piece].softmax(-1)
        best = scores.topk(count, dim=0).indices
        expected = torch.zeros_like(scores).scatter(0, best, scores.gather(0, best))
        if not torch.allclose(dense, expected, rtol=tolerance, atol=1e-8):
            return False
    return True


# -- selection --------------------------------------------------------------------------------------------------------


def _selecting(routing: Routing, runs: _Runs) -> Routing:
    """Add the correction of the selection and the groups."""
    experts, k = runs.z.shape[1], runs.chosen.shape[1]
    if k == experts:
        return routing
    kept = runs.found.ne(0).all(-1)  # what weighs 0 may be no choice: a token that was dropped, a number of no expert
    kept = kept if bool(kept.any()) else runs.found.ne(0).any(-1)
    if not bool(kept.any()):
        return routing
    wanted = runs.chosen[kept].sort(-1).values
    base = routing.scoring.removeprefix("topk_") if routing.scoring != "uniform" else "linear"
    known = [base, *(name for name in SCORES if name not in (base, "uniform", "relu"))]
    divisors = [g for g in range(2, experts + 1) if experts % g == 0]
    for name in known:
        scores = SCORES[name](runs.z[kept])
        for correction, value in [(None, torch.zeros(experts, dtype=torch.float64)), *runs.corrections.items()]:
            total = scores + value
            if torch.equal(total.topk(k).indices.sort(-1).values, wanted):
                return replace(routing, selection_bias=correction)
            for groups in divisors:
                members = total.reshape(-1, groups, experts // groups)
                sizes = (1, 2) if experts // groups > 1 else (1,)
                worths = {size: members.topk(size, dim=-1).values.sum(-1) for size in sizes}
                for top in range(1, groups):
                    if top * (experts // groups) < k:
                        continue
                    for size, worth in worths.items():
                        best = torch.zeros_like(worth).scatter(1, worth.topk(top).indices, 1.0)
                        inside = best.repeat_interleave(experts // groups, dim=1).bool()
                        if torch.equal(total.masked_fill(~inside, -torch.inf).topk(k).indices.sort(-1).values, wanted):
                            grouped = replace(routing, groups=groups, top_groups=top, group_worth=size)
                            return replace(grouped, selection_bias=correction)
    reason = "which experts are selected is no known function of the router's output"
    return replace(routing, reason=reason)


def _capacity(flow: Flow, logits: fx.Node, weight: fx.Node) -> int | None:
    """How many tokens an expert takes: what a running count of its tokens is compared with."""
    way = paths(flow, logits, [weight])
    counted = {node: 0.0 for node in way if operators.kind(node) == "aten::cumsum"}
    for node in way:
        shifts = [counted[source] for source in node.all_input_nodes if source in counted]
        if not shifts:
            continue
        name = operators.kind(node)
        number = node.args[1] if len(node.args) > 1 else None
        if isinstance(number, fx.Node):
            number = number.meta["val"] if not isinstance(number.meta.get("val"), Tensor) else None
        limit = None if number is None else float(operators.hint(number) if not isinstance(number, float) else number)
        if name in ("aten::le", "aten::lt") and limit is not None and limit.is_integer():  # others are sums of shares
            return int(limit - shifts[0]) - (name == "aten::lt")
        if name not in ("aten::le", "aten::lt"):
            moved = {"aten::sub": -1.0, operators.ADD: 1.0}.get(name, 0.0)
            counted[node] = shifts[0] + (moved * limit if limit is not None else 0.0)
    return None
