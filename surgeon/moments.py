"""Observers that sum products of values over tokens, in float64: all that least squares need to know of the data."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, fx

from surgeon.accounting import Key, memory
from surgeon.contract import Observer, Statistics
from surgeon.graph import Graph
from surgeon.structure import Linear


class SecondMoment(Observer):
    """``C = sum_t x_t x_t^T`` in float64, D x D: 8 D^2 bytes.

    Attributes:
        matrix: C, [D, D].
        tokens: number of tokens.
    """

    def __init__(self, node: fx.Node) -> None:
        self.nodes = (node,)
        self.matrix: Tensor | None = None
        self.tokens = 0

    def update(self, *values: Tensor) -> None:
        """Add [tokens, D]."""
        (x,) = values
        x = x.double()
        if self.matrix is None:
            self.matrix = x.new_zeros(x.shape[-1], x.shape[-1])
        self.matrix.addmm_(x.T, x)
        self.tokens += x.shape[0]

    def merge(self, other: Observer) -> None:
        """Add another shard."""
        assert isinstance(other, SecondMoment)
        if other.matrix is not None:
            self.matrix = other.matrix.clone() if self.matrix is None else self.matrix + other.matrix
        self.tokens += other.tokens


class Energy(Observer):
    """The diagonal of ``sum_t x_t x_t^T`` alone, in float64: 8 D bytes.

    Attributes:
        diagonal: ``sum_t x_tj^2``, [D].
        tokens: number of tokens.
    """

    def __init__(self, node: fx.Node) -> None:
        self.nodes = (node,)
        self.diagonal: Tensor | None = None
        self.tokens = 0

    def update(self, *values: Tensor) -> None:
        """Add [tokens, D]."""
        (x,) = values
        found = x.double().square().sum(0)
        self.diagonal = found if self.diagonal is None else self.diagonal + found
        self.tokens += x.shape[0]

    def merge(self, other: Observer) -> None:
        """Add another shard."""
        assert isinstance(other, Energy)
        if other.diagonal is not None:
            self.diagonal = other.diagonal if self.diagonal is None else self.diagonal + other.diagonal
        self.tokens += other.tokens


def totals(graph: Graph, linears: Iterable[Linear], statistics: Statistics) -> dict[Key, Tensor]:
    """Second moments (or their diagonals) of all that each weight is multiplied with, by the weight's memory.

    Args:
        graph: the graph.
        linears: the linears; those that read one weight add up.
        statistics: :class:`SecondMoment` or :class:`Energy` of each linear's input by its name, which have seen tokens.
    """
    found: dict[Key, Tensor] = {}
    for part in linears:
        observer = statistics[part.input.name]
        assert isinstance(observer, SecondMoment | Energy)
        sums = observer.matrix if isinstance(observer, SecondMoment) else observer.diagonal
        assert sums is not None
        key = memory(graph.tensor(part.weight))
        found[key] = found[key] + sums if key in found else sums
    return found


class HalvedMoments(Observer):
    """``sum_t x_t x_t^T`` and ``sum_t x_t`` in float64, of either half of every batch, to hold one against the other.

    Memory: 16 D^2 bytes.

    Attributes:
        matrices: of the first and the second half, [2, D, D]; None before anything was seen.
        totals: likewise, [2, D].
        counts: tokens of either half.
    """

    def __init__(self, node: fx.Node) -> None:
        self.nodes = (node,)
        self.matrices: Tensor | None = None
        self.totals: Tensor | None = None
        self.counts = [0, 0]

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return sum(self.counts)

    def update(self, *values: Tensor) -> None:
        """Add [tokens, D]; tokens next to each other, of one sequence, are of the same half."""
        x = values[0].double()
        if self.matrices is None or self.totals is None:
            self.matrices = x.new_zeros(2, x.shape[-1], x.shape[-1])
            self.totals = x.new_zeros(2, x.shape[-1])
        for half, rows in enumerate(x.tensor_split(2)):
            self.matrices[half].addmm_(rows.T, rows)
            self.totals[half] += rows.sum(0)
            self.counts[half] += rows.shape[0]

    def merge(self, other: Observer) -> None:
        """Add another shard."""
        assert isinstance(other, HalvedMoments)
        if other.matrices is not None and other.totals is not None:
            mine = self.matrices is not None and self.totals is not None
            self.matrices = self.matrices + other.matrices if mine else other.matrices.clone()  # type: ignore[operator]  # mine
            self.totals = self.totals + other.totals if mine else other.totals.clone()  # type: ignore[operator]  # mine
        self.counts = [a + b for a, b in zip(self.counts, other.counts, strict=True)]

    def second(self, about_mean: bool, half: int | None = None) -> Tensor:
        """``sum x x^T`` of one half or of all, [D, D]; ``sum (x - mean) (x - mean)^T`` about the mean."""
        assert self.matrices is not None
        matrix = self.matrices.sum(0) if half is None else self.matrices[half]
        if not about_mean:
            return matrix
        assert self.totals is not None
        total = self.totals.sum(0) if half is None else self.totals[half]
        centred = matrix - torch.outer(total, total) / max(self.tokens if half is None else self.counts[half], 1)
        rounding = 1e-12 * matrix.diagonal().mean()  # of a constant x nothing else is left, of either sign
        return centred + rounding * torch.eye(len(total), dtype=matrix.dtype, device=matrix.device)

    @property
    def mean(self) -> Tensor:
        """The mean, [D]."""
        assert self.totals is not None
        return self.totals.sum(0) / max(self.tokens, 1)


class AbsoluteRegression(Observer):
    """Sums for regressing the magnitudes |h| of one value on another value x with a constant column appended.

    Magnitudes of groups of neurons are sums of columns, so the targets of any split follow from these sums.
    Memory: 8 ((D+1)^2 + (D+1) F) bytes.

    Attributes:
        second_moment: sum of [x 1][x 1]^T, [D+1, D+1].
        cross_moment: sum of [x 1]|h|^T, [D+1, F].
        tokens: number of tokens.
    """

    def __init__(self, inputs: fx.Node, targets: fx.Node) -> None:
        self.nodes = (inputs, targets)
        self.second_moment: Tensor | None = None
        self.cross_moment: Tensor | None = None
        self.tokens = 0

    def update(self, *values: Tensor) -> None:
        """Add x [tokens, D] and h [tokens, F]."""
        x, h = (value.double() for value in values)
        x = torch.cat([x, x.new_ones(x.shape[0], 1)], dim=1)
        second, cross = x.T @ x, x.T @ h.abs()
        self.second_moment = second if self.second_moment is None else self.second_moment.add_(second)
        self.cross_moment = cross if self.cross_moment is None else self.cross_moment.add_(cross)
        self.tokens += x.shape[0]

    def merge(self, other: Observer) -> None:
        """Add another shard."""
        assert isinstance(other, AbsoluteRegression)
        if other.second_moment is not None and other.cross_moment is not None:
            mine = self.second_moment is not None and self.cross_moment is not None
            self.second_moment = (
                self.second_moment + other.second_moment if mine else other.second_moment.clone()  # type: ignore[operator]  # mine
            )
            self.cross_moment = (
                self.cross_moment + other.cross_moment if mine else other.cross_moment.clone()  # type: ignore[operator]  # mine
            )
        self.tokens += other.tokens
