"""Sharing out zeros: how many of each weight's numbers go, so that as many go of all of them as were asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from surgeon.contract import Statistics
from surgeon.expert_moments import energies
from surgeon.expert_stack import ExpertStack
from surgeon.graph import Graph
from surgeon.numerics import Zeros
from surgeon.samples import Sample
from surgeon.sensitivity import Changed, Part, Squares, choose, matrix_of, most_tokens, names_of, stated, weigh
from surgeon.structure import MoE

Sparse = Callable[[Tensor, Tensor, Zeros], Tensor]
"""A weight [..., out, in] with zeros, by the sums of squares [..., in] of what it is multiplied with."""

_STEP = 0.05
"""Shares of zeros that a weight can have lie so far apart."""
_OUTLIER = 5.0
"""How many times the mean of its block a score is an outlier's: M of OWL, whose authors tried 3 to 10 and took 5."""


@dataclass(frozen=True)
class Share:
    """What one site is given.

    Attributes:
        sparsity: share of its weights that go.
        errors: what each share costs, in nats per token to four digits; None where nobody asked or data say nothing of it.
    """

    sparsity: float
    errors: dict[float, float] | None = None


def shares_about(average: float, spread: float) -> list[float]:
    """The shares of zeros that a weight can have: the average, and others at most ``spread`` from it, from the least on."""
    steps = int(spread / _STEP + 1e-9)
    around = {round(average + number * _STEP, 6) for number in range(-steps, steps + 1)}
    return sorted(share for share in {*around, average} if 0 <= share < 1)


def by_loss(
    graph: Graph,
    sites: Mapping[str, Part],
    statistics: Statistics,
    sparse: Sparse,
    zeros: Callable[[float], Zeros],
    *,
    average: float,
    spread: float,
) -> tuple[dict[str, Share], list[str]]:
    """Shares of zeros that raise the loss least together, by the estimate of ``sensitivity.py``.

    Args:
        graph: the graph.
        sites: parts by site name; their weights are floating.
        statistics: of ``squares_of(metric="model")``, under the same names.
        sparse: makes the zeros whose cost is estimated.
        zeros: what a share means for one matrix.
        average: share of all weights that goes, or a little less.
        spread: the most by which one weight's share differs from it.

    Returns:
        What each site is given, and notes on those that the data say nothing of: they get the average.

    Raises:
        PlanError: a weight, or what the data make of it, is not finite.
    """
    shares = shares_about(average, spread)
    usual = shares.index(average)
    tokens = most_tokens(sites, statistics)
    sums: dict[str, Sequence[Tensor]] = {}  # of the site at hand

    def changed(name: str, number: int) -> Changed:
        part, asked = sites[name], zeros(shares[number])
        if name not in sums:
            sums.clear()
            sums[name] = _sums(graph, part, statistics[name])
        matrices = [matrix_of(graph, part, each) for each in names_of(part)]
        made = [sparse(matrix, own, asked) for matrix, own in zip(matrices, sums[name], strict=True)]
        # what stays, as if rows could be cut anywhere: where one share's rows are cut down and another's are not, two
        # shares about the average would not be allowed together
        stays = math.floor((1 - shares[number]) * sum(matrix.numel() for matrix in matrices) + 1e-6)
        return Changed(made, min(stays, sum(int(torch.count_nonzero(matrix)) for matrix in matrices)))

    weights = weigh(graph, sites, statistics, changed, [f"with {100 * share:.0f} % zeros" for share in shares], "model")
    taken = choose(weights, sum(each.sizes[usual] for each in weights), [usual] * len(weights))
    found: dict[str, Share] = {}
    for entry, choice in zip(weights, taken, strict=True):
        errors = stated(shares, entry, tokens)
        found |= {name: Share(shares[choice], errors) for name in entry.readers}
    unknown = (name for each in weights if not each.known for name in each.readers)
    return found, [f"{name}: calibration data say nothing of it; the share {average:g} goes" for name in unknown]


def by_outliers(
    graph: Graph, sites: Mapping[str, Part], blocks: Mapping[str, str], statistics: Statistics, *, average: float, spread: float
) -> dict[str, Share]:
    """Fewer zeros in blocks with more outliers: OWL (Yin et al. 2024, arXiv:2310.05175).

    The score of a weight is ``|w_ij| sqrt(sum_t x_tj^2)``.  With D_b the share of a block's scores that are above 5 times their
    mean, and D'_b = 2 spread (D_b - min D) / (max D - min D), a block keeps ``D'_b - mean D' + 1 - average`` of its weights.
    Weights count, so that the average is held where blocks differ in size; in blocks of one size that is OWL's own mean.

    Args:
        graph: the graph.
        sites: parts by site name.
        blocks: the block of each site.
        statistics: of ``squares_of``, under the names of the sites.
        average: share of all weights that goes.
        spread: lambda: shares of two blocks differ by at most twice as much.
    """
    scores: dict[str, list[Tensor]] = {}
    for name, part in sites.items():
        for each, own in zip(names_of(part), _sums(graph, part, statistics[name]), strict=True):
            weight = matrix_of(graph, part, each)
            scores.setdefault(blocks[name], []).append((weight.abs() * own.sqrt().unsqueeze(-2).to(weight.dtype)).flatten())
    outliers, sizes = [], []
    for parts in scores.values():
        sizes.append(sum(part.numel() for part in parts))
        limit = _OUTLIER * sum(float(part.double().sum()) for part in parts) / sizes[-1]
        outliers.append(sum(int((part > limit).sum()) for part in parts) / sizes[-1])
    found, count = torch.tensor(outliers, dtype=torch.float64), torch.tensor(sizes, dtype=torch.float64)
    width = float(found.max() - found.min())
    above = 2 * spread * (found - found.min()) / width if width > 0 else torch.zeros_like(found)
    goes = (average + (above * count).sum() / count.sum() - above).clamp(0, 1 - 1e-6)
    by_block = dict(zip(scores, (round(float(share), 6) for share in goes), strict=True))
    return {name: Share(by_block[blocks[name]]) for name in sites}


def _sums(graph: Graph, part: Part, observer: object) -> Sequence[Tensor]:
    """Sums of squares of what each weight of a site is multiplied with, [..., in]."""
    if isinstance(part, MoE):
        assert isinstance(observer, Sample)
        stack = graph.placed(ExpertStack.of(graph, part))
        if observer.tokens == 0:
            return [stack.w_in.new_zeros(stack.w_in.shape[::2]), stack.w_out.new_zeros(stack.w_out.shape[::2])]
        x, index, weight, *_ = graph.placed(observer.values())
        return energies(stack, x, index, weight)
    assert isinstance(observer, Squares)
    placed = observer.placed(graph)
    if placed.inputs is None:
        return [torch.zeros(matrix_of(graph, part, names_of(part)[0]).shape[-1])]
    return [placed.inputs]
