"""Shares of experts in their group's mean, found by an evolutionary search on what the group gave.

With shares a, one expert stands for a group: ``W(a) = sum_e a_e W_e``, neurons aligned.  It loses

    L(a) = sum_t |sum_{e in group} w_te E_e(x_t) - s_t E_a(x_t)|^2,    s_t = sum_{e in group} w_te

on the tokens t that were routed to the group.  The search is the second phase of EEP (Liu et al. 2024, arXiv:2407.00945), with
its rates: parents are crossed and their shares moved by normal steps, without gradients.  It starts from the shares by use,
equal ones, and each expert alone, among which EEP's first phase, pruning, chooses.  There the whole model's score on a task is
what counts; here it is what one mixture gives, so that mixtures are searched apart and no labels are needed.  Shares stay
positive and add up to 1.

Letters in shapes: n experts of I neurons in a group, O rows of the input matrix, H input and G output width, T tokens,
P candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from surgeon.expert_merging import Merger, Routed, group_outputs
from surgeon.expert_stack import ExpertStack
from surgeon.ops.mixture import inner_activation

TOKENS = 256
"""Most tokens of a group that candidates are compared on: a handful of shares needs no more."""
CROSSOVER, MUTATION, STEP = 0.3, 0.25, 0.065
"""EEP's rates: of shares taken from a second parent, of shares that move, and the standard deviation of a move."""
_CHUNK = 1 << 23
"""Most numbers of activations or merged weights held at once: 32 MB in float32."""


@dataclass(frozen=True)
class Search:
    """An evolutionary search.

    Attributes:
        population: candidates that survive a generation, and that it makes.
        generations: how many there are.
        seed: of all draws.
    """

    population: int = 8
    generations: int = 12
    seed: int = 0

    def shares(
        self, merger: Merger, stack: ExpertStack, group: Sequence[int], start: Sequence[float], tokens: Routed
    ) -> tuple[float, ...]:
        """The best shares found, whose loss is at most that of ``start``.

        Args:
            merger: aligns the neurons.
            stack: all experts.
            group: the experts that are merged, the dominant one first.
            start: shares to start from, adding up to 1.
            tokens: calibration tokens with their routing.
        """
        loss = Loss.of(merger, stack, group, tokens) if len(group) > 1 else None
        if loss is None:
            return tuple(start)
        generator = torch.Generator().manual_seed(self.seed)
        found = torch.cat([torch.tensor([start]), torch.full((1, len(group)), 1 / len(group)), torch.eye(len(group))])
        losses = loss(found)
        for _ in range(self.generations):
            # Stable: of candidates that lose the same, the earliest stays, so that copies keep the shares by use.
            kept = losses.sort(stable=True).indices[: self.population]
            found, losses = found[kept], losses[kept]
            children = self._children(found, generator)
            found, losses = torch.cat([found, children]), torch.cat([losses, loss(children)])
        best = found[losses.argmin()].double()
        return tuple((best / best.sum()).tolist())

    def _children(self, parents: Tensor, generator: torch.Generator) -> Tensor:
        """As many candidates as make a population, [P, n]."""
        shape = (self.population, parents.shape[1])
        first, second = (parents[torch.randint(len(parents), shape[:1], generator=generator)] for _ in range(2))
        crossed = torch.where(torch.rand(shape, generator=generator) < CROSSOVER, second, first)
        moves = torch.rand(shape, generator=generator) < MUTATION
        moved = (crossed + STEP * moves * torch.randn(shape, generator=generator)).clamp(min=0)
        total = moved.sum(1, keepdim=True)
        return torch.where(total > 0, moved / total.clamp(min=1e-12), first)


@dataclass(frozen=True)
class Loss:
    """L of many shares at once.

    Attributes:
        activation: as ``surgeon::moe`` takes it.
        pre: what every expert's input matrix gives, [n, T, O].
        w_out: every expert's output matrix, [n, G, I].
        b_out: [n, G] or None.
        wanted: what the group gave, [T, G].
        factor: the group's weight, [T, 1].
    """

    activation: str
    pre: Tensor
    w_out: Tensor
    b_out: Tensor | None
    wanted: Tensor
    factor: Tensor

    @classmethod
    def of(cls, merger: Merger, stack: ExpertStack, group: Sequence[int], tokens: Routed) -> Loss | None:
        """On at most ``TOKENS`` tokens that were routed to the group; None where there is none."""
        x, wanted, factor = group_outputs(stack, group, tokens, TOKENS)
        if not len(x):
            return None
        members, orders = list(group), torch.stack(merger.orders(stack, group))
        place = torch.arange(len(group))[:, None]
        rows = stack.rows(orders)
        pre = torch.einsum("th,noh->nto", x.to(stack.dtype), stack.w_in[members][place, rows].to(stack.dtype))
        if stack.b_in is not None:
            pre = pre + stack.b_in[members][place, rows].to(stack.dtype)[:, None]
        w_out = stack.w_out[members].transpose(1, 2)[place, orders].transpose(1, 2).to(stack.dtype)
        b_out = None if stack.b_out is None else stack.b_out[members].to(stack.dtype)
        return cls(stack.activation, pre, w_out, b_out, wanted, factor)

    def __call__(self, shares: Tensor) -> Tensor:
        """Losses [P] of shares [P, n], both on the CPU."""
        largest = max(self.pre[0].numel(), self.w_out[0].numel(), self.wanted.numel())
        return torch.cat([self._some(some.to(self.pre)) for some in torch.split(shares, max(1, _CHUNK // largest))]).cpu()

    def _some(self, shares: Tensor) -> Tensor:
        pre = torch.einsum("pn,nto->pto", shares, self.pre)
        hidden = inner_activation(pre, self.w_out.shape[2], self.activation)
        output = hidden @ torch.einsum("pn,ngi->pig", shares, self.w_out)
        if self.b_out is not None:
            output = output + (shares @ self.b_out)[:, None]
        return (self.wanted - self.factor * output).square().flatten(1).sum(1)
