"""What a recognised router chooses where some of its experts are missing, for many sets of experts at once.

The arithmetic is that of :mod:`surgeon.discovery.routing`, which was found by comparing it with the router itself; a missing
expert's score is minus infinity, so that a softmax is one over the others, as in a model built without it.

Letters in shapes: S sets of experts, T tokens, E experts, k experts per token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from surgeon.discovery.routing import SCORES
from surgeon.structure import MoE

_ALIASES = {"topk_softmax": "softmax"}
"""Scorings whose selected and normalised weights equal those of another one."""


def scoring_of(moe: MoE) -> str | None:
    """Name of the function that makes scores of the router's output one by one or by a softmax, None where it is none."""
    name = _ALIASES.get(moe.scoring, moe.scoring)
    return name if name in SCORES else None


def refuses_rerouting(moe: MoE) -> str | None:
    """Why the choice without some experts cannot be computed from what is known of the router, or None."""
    if moe.router is None or moe.logits is None:
        return "its router was not recognised"
    if scoring_of(moe) is None:
        return f"its routing ({moe.scoring}) is no selection of the largest scores"
    if moe.expert_scale is not None:
        return "its experts' weights have factors of their own"
    if moe.input_scaled:
        return "its weights scale the experts' inputs, so that its output is no weighted sum of theirs"
    return None


def reroute(moe: MoE, logits: Tensor, bias: Tensor | None, present: Tensor) -> tuple[Tensor, Tensor]:
    """Experts and weights where only some experts are present.

    Args:
        moe: a mixture for which :func:`refuses_rerouting` is None.
        logits: output of the router, [T, E].
        bias: correction of the selection, [E], or None.
        present: [S, E] booleans; at least one expert per set, equally many of each group.

    Returns:
        index [S, T, k'] and weight [S, T, k'], k' = min(k, experts that are present).
    """
    name = scoring_of(moe)
    assert name is not None
    count = int(present.sum(1).min())
    k = min(moe.top_k, count)
    missing = ~present[:, None, :]
    masked = logits.double()[None].masked_fill(missing, -torch.inf)
    scores = SCORES[name](masked)
    choice = (scores if bias is None else scores + bias.double()).masked_fill(missing, -torch.inf)
    if name == "uniform":
        choice = masked
    if moe.groups > 1 and k < count:
        members = choice.reshape(*choice.shape[:-1], moe.groups, -1)
        worth = members.topk(moe.group_worth, dim=-1).values.sum(-1)
        best = torch.zeros_like(worth, dtype=torch.bool).scatter(-1, worth.topk(moe.top_groups, dim=-1).indices, True)
        choice = members.masked_fill(~best[..., None], -torch.inf).flatten(-2)
    index = choice.topk(k, dim=-1).indices
    weight = scores.gather(-1, index)
    if moe.normalised:
        weight = weight / weight.sum(-1, keepdim=True).clamp_min(1e-20)
    return index, weight * moe.scale
