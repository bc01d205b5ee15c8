"""Sharing out ranks: which rank each linear is factored to, or none, for as many parameters as were asked for in all."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from surgeon.contract import Statistics
from surgeon.errors import PlanError
from surgeon.graph import Graph
from surgeon.numerics import NumericsError, rank_for_ratio, rank_losses, saves
from surgeon.sensitivity import Squares, Weight, choose, matrix_of, most_tokens, stated
from surgeon.structure import Linear

_CHOICES = 32
"""About as many ranks of each linear are weighed against each other."""


@dataclass(frozen=True)
class Share:
    """What one linear is given.

    Attributes:
        rank: of its two factors; None leaves it whole.
        errors: what each rank costs, in nats per token to four digits (of models without a next-token loss, as a share of
            the outputs' energy); None where the data say nothing of it.
    """

    rank: int | None
    errors: dict[int, float] | None


def by_loss(
    graph: Graph, sites: Mapping[str, Linear], statistics: Statistics, *, ratio: float, multiple: int, spread: float
) -> tuple[dict[str, Share], list[str]]:
    """Ranks that raise the loss least together, by the estimate of ``sensitivity.py``.

    Args:
        graph: the graph.
        sites: linears by site name, their weights floating and read by nothing else.
        statistics: of ``squares_of(metric="model")``, under the same names.
        ratio: parameters that all of them keep together, at most.
        multiple: ranks are multiples of it.
        spread: the least that a factored linear keeps is so far below the ratio.

    Returns:
        What each linear is given, and notes on those that the data say nothing of: they get what the ratio makes of them.

    Raises:
        PlanError: a weight, or what the data make of it, is not finite, or no ranks are as small as the ratio.
    """
    tokens = most_tokens(sites, statistics)
    weights, ranks, usual = [], [], []
    for name, part in sites.items():
        size = part.out_features * part.in_features
        few = ranks_of(part, ratio, multiple, spread)
        costs = _errors(graph, name, part, statistics[name])
        sizes = [rank * (part.out_features + part.in_features) for rank in few] + [size]
        known = costs is not None and costs[0] > 0
        weights.append(Weight([name], [costs[rank] for rank in few] + [0.0] if costs else [0.0] * len(sizes), sizes, known))
        ranks.append(few)
        usual.append(max((number for number, rank in enumerate(few) if sizes[number] <= ratio * size), default=len(few)))
    try:
        taken = choose(weights, math.floor(ratio * sum(each.sizes[-1] for each in weights) + 1e-6), usual)
    except NumericsError as error:
        raise PlanError(f"low_rank: ratio {ratio:g} is below what multiples of {multiple} allow: {error}") from error
    shares, notes = {}, []
    for entry, few, choice in zip(weights, ranks, taken, strict=True):
        (name,) = entry.readers
        shares[name] = Share(few[choice] if choice < len(few) else None, stated(few, entry, tokens))
        if not entry.known and few:
            notes.append(f"{name}: calibration data say nothing of it; it keeps the share {ratio:g}")
    return shares, notes


def ranks_of(part: Linear, ratio: float, multiple: int, spread: float) -> list[int]:
    """Ranks that a linear may be factored to: multiples that make it smaller, that of the ratio among them, from the least."""
    full = min(part.out_features, part.in_features)
    step = multiple * max(1, full // (_CHOICES * multiple))
    asked = rank_for_ratio(part.out_features, part.in_features, ratio) // multiple * multiple
    least = (ratio - spread) * part.out_features * part.in_features / (part.out_features + part.in_features)
    found = {rank for rank in range(step, full, step) if rank >= least} | {asked}
    return sorted(rank for rank in found if rank and saves(part.out_features, part.in_features, rank))


def _errors(graph: Graph, name: str, part: Linear, observer: object) -> Sequence[float] | None:
    """What each rank from 0 on costs, summed over tokens; None where the data say nothing of it."""
    assert isinstance(observer, Squares)
    if observer.inputs is None or observer.gradients is None:
        return None
    seen = observer.placed(graph)
    assert seen.inputs is not None
    assert seen.gradients is not None
    try:
        losses = rank_losses(matrix_of(graph, part, part.weight), seen.inputs, seen.gradients)
    except NumericsError as error:
        raise PlanError(f"{name}: {error}") from error
    found: list[float] = (losses / (2 * observer.tokens)).tolist()
    return found
