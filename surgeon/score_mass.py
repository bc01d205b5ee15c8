"""An observer of a router's scores over all experts, chosen or not."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx

from surgeon.contract import Observer


class ScoreMass(Observer):
    """``sum_t s(z_t)`` of a router's output z_t [E].

    Attributes:
        mass: the sum, [E] float64.
        tokens: number of tokens.
    """

    def __init__(self, logits: fx.Node, function: Callable[[Tensor], Tensor], experts: int) -> None:
        self.nodes = (logits,)
        self.function = function
        self.mass = torch.zeros(experts, dtype=torch.float64)
        self.tokens = 0

    def update(self, *values: Tensor) -> None:
        """Add [tokens, E]."""
        self.mass += self.function(values[0].double()).sum(0).cpu()
        self.tokens += values[0].shape[0]

    def merge(self, other: Observer) -> None:
        """Add another shard."""
        assert isinstance(other, ScoreMass)
        self.mass = self.mass + other.mass
        self.tokens += other.tokens
