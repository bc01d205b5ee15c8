"""One expert in the place of a group of experts.

Letters in shapes: n experts of I neurons, O rows of the input matrix (I, or 2 I with [gate | up]), H input and G output
width, T tokens, k experts per token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from surgeon.expert_stack import ExpertStack
from surgeon.numerics import (
    best_assignment,
    correlations,
    joint_svd,
    output_correction,
    zip_neurons,
)
from surgeon.ops import moe

RIDGE = 1e-2
"""Penalty of a refit, relative to the activations' mean square."""
_CHUNK = 1 << 23
"""Most numbers of inputs, or of outputs, of pairs of a token and an expert held at once: 32 MB in float32."""
_TIE = 1e-3
"""Weight of the weights' cosine beside the activations' correlation: it decides between neurons that no token tells apart."""


@dataclass(frozen=True)
class Routed:
    """Tokens of calibration data as a mixture sees them.

    Attributes:
        x: [T, H].
        index: chosen experts, [T, k].
        weight: their weights, [T, k].
    """

    x: Tensor
    index: Tensor
    weight: Tensor


@dataclass(frozen=True)
class Merger:
    """How a group becomes one expert.

    Attributes:
        combination: ``mean`` (weighted), ``zip`` or ``svd``.
        align: match the neurons of each expert with the dominant one's first.
        by: what neurons are compared by.
        tokens: what they are compared on, where that is activations, and what the refit sees.
        rank: of the joint factor; by default the largest that one expert's matrix can have.
        refit: fit the output matrix afterwards.
    """

    combination: Literal["mean", "zip", "svd"] = "mean"
    align: bool = True
    by: Literal["weights", "activations"] = "weights"
    tokens: Routed | None = None
    rank: int | None = None
    refit: bool = False

    def merge(self, stack: ExpertStack, group: Sequence[int], weights: Sequence[float]) -> ExpertStack:
        """The merged expert, a stack of one, in the stack's own type.

        Args:
            stack: all experts.
            group: the experts that are merged, the dominant one first.
            weights: their shares, adding up to 1.
        """
        if len(group) == 1:
            return stack.one(group[0])
        merged = self._zipped(stack, group, weights) if self.combination == "zip" else self._joined(stack, group, weights)
        if self.refit:
            assert self.tokens is not None
            merged = _refitted(stack, group, merged, self.tokens)
        return merged.to(stack.w_in.dtype)

    def _joined(self, stack: ExpertStack, group: Sequence[int], weights: Sequence[float]) -> ExpertStack:
        """Weighted means of aligned experts, or their joint factor."""
        shares = torch.tensor(weights, dtype=torch.float64).to(stack.w_in.device)
        orders = self.orders(stack, group)

        def gathered(tensor: Tensor, part: int) -> Iterator[Tensor]:  # the rows of one part, neurons in order
            for expert, order in zip(group, orders, strict=True):
                yield tensor[expert][order + part * stack.width]

        def columns() -> Iterator[Tensor]:
            for expert, order in zip(group, orders, strict=True):
                yield stack.w_out[expert][:, order]

        def matrix(each: Iterator[Tensor]) -> Tensor:
            if self.combination == "mean":
                return _mean(each, shares, stack.dtype)
            every = torch.stack(list(each))
            joint = joint_svd(every, shares, self.rank or min(every.shape[1:]))
            return joint.to(stack.dtype)

        parts = range(stack.parts)
        w_in = torch.cat([matrix(gathered(stack.w_in, part)) for part in parts])
        b_in = None
        if stack.b_in is not None:
            b_in = torch.cat([_mean(gathered(stack.b_in, part), shares, stack.dtype) for part in parts])[None]
        return ExpertStack(w_in[None], matrix(columns())[None], b_in, _bias(stack, group, shares), stack.activation)

    def _zipped(self, stack: ExpertStack, group: Sequence[int], weights: Sequence[float]) -> ExpertStack:
        """Every neuron joins the dominant expert's neuron that is most like it."""
        shares = torch.tensor(weights, dtype=torch.float64).to(stack.w_in.device)

        def members() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
            for expert in group:
                homes = torch.arange(stack.width, device=stack.w_in.device)
                if expert != group[0]:
                    homes = self._similarity(stack, group[0], expert).argmax(0)
                yield homes, stack.inputs(expert), stack.outputs(expert)

        rows, columns = zip_neurons(members(), shares)
        width = stack.w_in.shape[2]
        w_in = torch.cat([rows[:, part * width : (part + 1) * width] for part in range(stack.parts)])
        b_in = None if stack.b_in is None else rows[:, stack.parts * width :].T.reshape(1, -1)
        return ExpertStack(w_in[None], columns.T[None], b_in, _bias(stack, group, shares), stack.activation)

    def orders(self, stack: ExpertStack, group: Sequence[int]) -> list[Tensor]:
        """The order [I] of each expert's neurons in which they match the dominant one's."""
        own = torch.arange(stack.width, device=stack.w_in.device)
        return [own, *(self._order(stack, group[0], other) if self.align else own for other in group[1:])]

    def _order(self, stack: ExpertStack, reference: int, other: int) -> Tensor:
        if self.by == "weights":
            return best_assignment(stack.products(reference, other))
        return best_assignment(self._similarity(stack, reference, other))

    def _similarity(self, stack: ExpertStack, reference: int, other: int) -> Tensor:
        """How alike every neuron of one expert is to every one of another, [I, I]."""
        if self.by == "weights":
            return stack.cosines(reference, other)
        assert self.tokens is not None
        first, second = (stack.hidden(expert, self.tokens.x) for expert in (reference, other))
        return correlations(first, second) + _TIE * stack.cosines(reference, other)


def _mean(each: Iterable[Tensor], shares: Tensor, dtype: torch.dtype) -> Tensor:
    """Weighted sum, one of them in memory at a time."""
    pairs = zip(shares.tolist(), each, strict=True)
    share, first = next(pairs)
    total: Tensor = share * first.to(dtype)
    for share, other in pairs:
        total.add_(other.to(dtype), alpha=share)
    return total


def _bias(stack: ExpertStack, group: Sequence[int], shares: Tensor) -> Tensor | None:
    """The group's output bias [1, G], which no order of neurons concerns."""
    return None if stack.b_out is None else (shares.to(stack.dtype) @ stack.b_out[list(group)].to(stack.dtype))[None]


def group_outputs(
    stack: ExpertStack, group: Sequence[int], tokens: Routed, limit: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """What a group's experts gave together on tokens routed to them.

    Args:
        stack: all experts.
        group: the experts that count.
        tokens: calibration tokens.
        limit: most tokens that are used, at equal distances.

    Returns:
        x_t [T, H], ``sum_{e in group} w_te E_e(x_t)`` [T, G], and ``s_t``, the sum of the group's weights, [T, 1].
    """
    member = torch.zeros(stack.experts, dtype=torch.bool)
    member[list(group)] = True
    weight = tokens.weight * member.to(tokens.index.device)[tokens.index]
    routed = (weight != 0).any(1).nonzero().flatten()
    if limit is not None and len(routed) > limit:
        routed = routed[torch.linspace(0, len(routed) - 1, limit).long()]
    x, index, weight = tokens.x[routed].to(stack.w_in.dtype), tokens.index[routed], weight[routed]
    token, place = (weight != 0).nonzero(as_tuple=True)  # one row for each pair: k rows per token would be mostly zeros
    wanted = x.new_zeros(len(x), stack.w_out.shape[1], dtype=stack.dtype)
    step = max(1, _CHUNK // max(x.shape[1], stack.w_out.shape[1]))
    for start in range(0, len(token), step):
        rows, places = token[start : start + step], place[start : start + step]
        pairs = x[rows], index[rows, places][:, None], weight[rows, places][:, None]
        each = moe(*pairs, stack.w_in, stack.w_out, stack.b_in, stack.b_out, stack.activation)
        wanted.index_add_(0, rows, each.to(stack.dtype))
    return x, wanted, weight.to(stack.dtype).sum(1, keepdim=True)


def _refitted(stack: ExpertStack, group: Sequence[int], merged: ExpertStack, tokens: Routed) -> ExpertStack:
    """The output matrix (and bias) that gives what the group's experts gave together on tokens routed to them.

    Least squares of ``sum_{e in group} w_te E_e(x_t)`` on ``s_t h(x_t)``, s_t = sum of the group's weights at t.
    """
    x, wanted, factor = group_outputs(stack, group, tokens)
    if not len(x):
        return merged
    hidden = factor * merged.hidden(0, x)
    found = hidden @ merged.w_out[0].T
    if merged.b_out is not None:
        hidden = torch.cat([hidden, factor], dim=1)
        found = found + factor * merged.b_out[0]
    change = output_correction(hidden, wanted - found, RIDGE).to(stack.dtype)
    width = stack.width
    b_out = None if merged.b_out is None else merged.b_out + change[:, width]
    return ExpertStack(merged.w_in, merged.w_out + change[:, :width], merged.b_in, b_out, merged.activation)
