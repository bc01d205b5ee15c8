"""How many experts each mixture keeps: what its router needs, and how a budget over all mixtures is shared out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from surgeon.errors import PlanError
from surgeon.structure import MoE


def needed(moe: MoE) -> int:
    """Experts that a router chooses from at least: k, or one where a token is routed to every expert anyway."""
    return 1 if moe.top_k == moe.experts else moe.top_k


def refuse_budget(site: str, moe: MoE, keep: int) -> None:
    """Refuse a number of experts that the router cannot choose from.

    Raises:
        PlanError: names the site and the numbers.
    """
    if keep < needed(moe):
        raise PlanError(f"{site}: {keep} experts would remain, the router chooses {moe.top_k} per token")
    if keep % moe.groups:
        raise PlanError(
            f"{site}: its router has {moe.groups} groups of equal size, {keep} experts cannot be; "
            f"keep a multiple of {moe.groups}"
        )
    members = keep // moe.groups
    if moe.groups > 1 and keep < moe.experts and members < 2:
        raise PlanError(f"{site}: {members} experts would remain in each of {moe.groups} groups, needed 2 to rank groups by")
    if moe.groups > 1 and members * moe.top_groups < moe.top_k:
        raise PlanError(
            f"{site}: {moe.top_groups} groups of {members} experts would remain to choose from, "
            f"the router chooses {moe.top_k} per token"
        )


def fewest(moe: MoE) -> int:
    """The smallest number of experts that :func:`refuse_budget` lets pass."""
    for keep in range(moe.groups, moe.experts, moe.groups):
        try:
            refuse_budget("", moe, keep)
        except PlanError:
            continue
        return keep
    return moe.experts


def share_out(costs: Sequence[Mapping[int, float]], total: int) -> list[int]:
    """How many experts each mixture loses so that together they lose as many as possible up to ``total``, at least cost.

    Dynamic programming over mixtures; costs that grow with every further expert by more than with the last one give what
    sorting all experts together would.

    Args:
        costs: cost by number of experts lost, one mapping per mixture; 0 is among the keys.
        total: most experts to lose.

    Returns:
        One of the keys of each mapping.
    """
    least = np.full(total + 1, np.inf)  # cost of losing exactly that many in the mixtures so far
    least[0] = 0.0
    choices = []
    for options in costs:
        after, choice = np.full(total + 1, np.inf), np.zeros(total + 1, dtype=np.int64)
        for lost, cost in sorted(options.items()):
            if lost > total:
                continue
            candidate = np.full(total + 1, np.inf)
            candidate[lost:] = least[: total + 1 - lost] + cost
            better = candidate < after
            after[better], choice[better] = candidate[better], lost
        least = after
        choices.append(choice)
    left = int(np.flatnonzero(np.isfinite(least))[-1])
    lost_by_mixture = []
    for choice in reversed(choices):
        lost_by_mixture.append(int(choice[left]))
        left -= lost_by_mixture[-1]
    return lost_by_mixture[::-1]
