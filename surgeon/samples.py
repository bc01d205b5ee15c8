"""Observers that keep some of the tokens themselves, for what no sum over tokens can give: clusters, trained routers."""

from __future__ import annotations

import zlib
from typing import ClassVar

import torch
from torch import Tensor, fx

from surgeon.contract import Observer


def lot(seed: int, site: str) -> torch.Generator:
    """A generator for one site: a pass that plans block by block would draw the same numbers in each with one seed."""
    return torch.Generator().manual_seed(seed ^ zlib.crc32(site.encode()))


class Sample(Observer):
    """A uniform sample of tokens without replacement: the values of some nodes at the same tokens.

    Every token draws a random number and the ``limit`` smallest stay, so that samples of two shards merge into a sample
    of both.  Memory: 2 limit (sum of the widths) numbers at most while observing, half of that afterwards.

    Attributes:
        nodes: the nodes that are sampled.
        limit: most tokens to keep.
        tokens: tokens seen.
    """

    def __init__(self, *nodes: fx.Node, limit: int, seed: int = 0) -> None:
        self.nodes = nodes
        self.limit = limit
        self.tokens = 0
        self._generator = torch.Generator().manual_seed(seed)
        self._drawn = torch.empty(0, dtype=torch.float64)
        self._rows: list[Tensor] = []

    def update(self, *values: Tensor) -> None:
        """Add [tokens, width] of every node."""
        self.tokens += values[0].shape[0]
        self._add(torch.rand(values[0].shape[0], generator=self._generator, dtype=torch.float64), list(values))

    def merge(self, other: Observer) -> None:
        """Add another shard (of another seed, or equal numbers would be drawn)."""
        assert isinstance(other, Sample)
        self.tokens += other.tokens
        if other._rows:
            self._add(other._drawn, other._rows)

    def values(self) -> list[Tensor]:
        """The sampled tokens, [n, width] for every node, in the order in which they were seen."""
        self._shrink(self.limit)
        return self._rows

    def _add(self, drawn: Tensor, values: list[Tensor]) -> None:
        self._drawn = torch.cat([self._drawn, drawn])
        self._rows = [torch.cat(pair) for pair in zip(self._rows, values, strict=True)] if self._rows else values
        if self._drawn.numel() > 2 * self.limit:
            self._shrink(self.limit)

    def _shrink(self, limit: int) -> None:
        if self._drawn.numel() > limit:
            kept = self._drawn.topk(limit, largest=False).indices.sort().values
            self._drawn = self._drawn[kept]
            self._rows = [rows[kept.to(rows.device)] for rows in self._rows]


class GradientSample(Sample):
    """A sample that also keeps the derivative of the loss with respect to the last node.

    It is taken once, on the model as it is before the pass (see ``surgeon.gradients``).

    Attributes:
        has_gradient: the model had a loss; otherwise ``values`` ends without a derivative.
    """

    gradient: ClassVar[bool] = True

    def __init__(self, *nodes: fx.Node, limit: int, seed: int = 0) -> None:
        super().__init__(*nodes, limit=limit, seed=seed)
        self.has_gradient = False

    def update(self, *values: Tensor) -> None:
        """Add [tokens, width] of every node, and the derivative [tokens, width of the last one] where there is one."""
        self.has_gradient = len(values) == len(self.nodes) + 1
        super().update(*values)

    def merge(self, other: Observer) -> None:
        """Add another shard."""
        assert isinstance(other, GradientSample)
        self.has_gradient = self.has_gradient or other.has_gradient
        super().merge(other)
