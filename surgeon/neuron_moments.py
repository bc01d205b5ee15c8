"""What neurons do over tokens, as sums: second moments of their activations, of dense networks and of every expert apart."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, fx

from surgeon.contract import Observer
from surgeon.ops.grouped import grouped_linear, sort_by_expert
from surgeon.ops.mixture import inner_activation


class NeuronMoments(Observer):
    """Sums over tokens of one network's activations h, with a constant 1 appended: [h 1].  Memory: 8 (I + 1)^2 bytes.

    Attributes:
        moment: ``sum_t [h 1] [h 1]^T``, [1, I + 1, I + 1] float64.
        absolute: ``sum_t |h|``, [1, I] float64.
        seen: tokens, [1].
    """

    def __init__(self, hidden: fx.Node, width: int) -> None:
        self.nodes = (hidden,)
        self._begin(1, width)

    def _begin(self, networks: int, width: int) -> None:
        self.moment = torch.zeros(networks, width + 1, width + 1, dtype=torch.float64)
        self.absolute = torch.zeros(networks, width, dtype=torch.float64)
        self.seen = torch.zeros(networks, dtype=torch.float64)
        self.tokens = 0

    def update(self, *values: Tensor) -> None:
        """Add h [tokens, I]."""
        self._add(0, values[0].double(), None)
        self.tokens += values[0].shape[0]

    def _add(self, network: int, hidden: Tensor, weight: Tensor | None) -> None:
        """Add h [n, I] of one network, each row times its weight."""
        rows = torch.cat([hidden, hidden.new_ones(hidden.shape[0], 1)], dim=1)
        if weight is not None:
            rows = rows * weight[:, None]
        self.moment = self.moment.to(rows.device)
        self.moment[network].addmm_(rows.T, rows)
        self.absolute[network] += hidden.abs().sum(0).to(self.absolute.device)
        self.seen[network] += hidden.shape[0]

    def merge(self, other: Observer) -> None:
        """Add another shard."""
        assert isinstance(other, NeuronMoments)
        self.moment = self.moment + other.moment.to(self.moment.device)
        self.absolute = self.absolute + other.absolute
        self.seen = self.seen + other.seen
        self.tokens += other.tokens


class ExpertMoments(NeuronMoments):
    """The same of every expert of a mixture, over the tokens that it runs for: w_t [h 1], w_t the weight of its output there.

    So ``W moment W^T`` is what the expert adds to the mixture's output, and a token that hardly counts hardly counts here.
    The experts' first matrices are read as they are in the graph, so that nothing but sums is kept.
    Memory: 8 E (I + 1)^2 bytes.

    Attributes:
        moment: [E, I + 1, I + 1].
        absolute: [E, I], without the weights.
        seen: tokens of every expert, [E].
    """

    whole: ClassVar[bool] = True

    def __init__(self, node: fx.Node, experts: int, width: int, activation: str) -> None:
        x, index, weight, w_in = node.args[:4]
        b_in = node.args[5] if len(node.args) > 5 else node.kwargs.get("b_in")
        self.nodes = tuple(n for n in (x, index, weight, w_in, b_in) if isinstance(n, fx.Node))
        self.activation = activation
        self._begin(experts, width)

    def update(self, *values: Tensor) -> None:
        """Add x [T, H], index and weight [T, k], the experts' w_in [E, O, H] and b_in [E, O], and the rows that count."""
        rows = values[-1]
        x, index, weight = (value[rows.to(value.device)] for value in values[:3])
        w_in, b_in = values[3], values[4] if len(values) > 5 else None
        experts, width = self.absolute.shape
        groups = sort_by_expert(index, experts, False, weight)
        assert groups.bounds is not None
        hidden = inner_activation(grouped_linear(x[groups.token].to(w_in.dtype), w_in, b_in, groups), width, self.activation)
        factor = weight.reshape(-1)[groups.order].double()
        for expert, start, stop in groups.bounds:  # no batched product adds up rows of unequal numbers on the CPU
            self._add(expert, hidden[start:stop].double(), factor[start:stop])
        self.tokens += x.shape[0]
