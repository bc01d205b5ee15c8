"""What calibration data says of the channels of a residual stream, as its norms see them."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from surgeon.channel_norms import Norm
from surgeon.contract import Observer


class ChannelMoments(Observer):
    """Sums over tokens of n = x / rms(x), or (x - mean(x)) / std(x), of one norm.

    Memory: 8 H^2 bytes with ``second``, 16 H without.

    Attributes:
        moment: ``sum_t n_t n_t^T``, [H, H] in float64; None without ``second``.
        energy: ``sum_t n_t^2``, [H] in float64.
        absolute: ``sum_t |o_t|`` of the norm's output with its gain and offset, [H] in float64.
        tokens: number of tokens.
    """

    def __init__(self, norm: Norm, output: fx.Node, *, second: bool) -> None:
        self.nodes = (norm.input, output)
        self.centred = norm.centred
        width = int(norm.input.meta["val"].shape[-1])
        self.moment = torch.zeros(width, width, dtype=torch.float64) if second else None
        self.energy = torch.zeros(width, dtype=torch.float64)
        self.absolute = torch.zeros(width, dtype=torch.float64)
        self.tokens = 0

    def update(self, *values: Tensor) -> None:
        """Add [tokens, H] twice."""
        x, output = (value.double() for value in values)
        if self.centred:
            x = x - x.mean(-1, keepdim=True)
        n = torch.nn.functional.normalize(x, dim=-1) * x.shape[-1] ** 0.5
        if self.moment is not None:
            self.moment += (n.T @ n).cpu()
        self.energy += n.square().sum(0).cpu()
        self.absolute += output.abs().sum(0).cpu()
        self.tokens += x.shape[0]

    def merge(self, other: Observer) -> None:
        """Add another shard."""
        assert isinstance(other, ChannelMoments)
        if self.moment is not None and other.moment is not None:
            self.moment = self.moment + other.moment
        self.energy = self.energy + other.energy
        self.absolute = self.absolute + other.absolute
        self.tokens += other.tokens
