"""What each expert of a mixture reads: sums over the tokens that are routed to it.

A token counts as much as the square of its weight, as in the squared error of the mixture's output.
Letters in shapes: T tokens, k experts per token, E experts, H input width, I neurons.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from surgeon.expert_outputs import dense_weights
from surgeon.expert_stack import ExpertStack

_AT_ONCE = 1 << 27
"""Most numbers of weights and moments that are worked on at once, 1 GB in float64."""


def moments_of_some(
    stack: ExpertStack, x: Tensor, index: Tensor, weight: Tensor
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """``sum_t p_t^2 x_t x_t^T`` and ``sum_t p_t^2 h_t h_t^T``, for as many experts at once as memory allows, one at least.

    Args:
        stack: the experts.
        x: [T, H].
        index: [T, k].
        weight: [T, k].

    Yields:
        Which experts, and what they read, [e, H, H], and what their output matrices read, [e, I, I], in float64.
    """
    runs = dense_weights(index, weight, stack.experts)
    (rows, width), (features, inner) = stack.w_in.shape[1:], stack.w_out.shape[1:]
    each = 2 * (width * width + inner * inner) + rows * width + features * inner
    step = max(1, _AT_ONCE // each)
    for start in range(0, stack.experts, step):
        part = slice(start, min(start + step, stack.experts))
        pairs = [_read(stack, expert, x, runs[:, expert]) for expert in range(part.start, part.stop)]
        read, made = (torch.stack([own.T @ own for own in side]) for side in zip(*pairs, strict=True))
        yield part, read, made


def energies(stack: ExpertStack, x: Tensor, index: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The diagonals of :func:`moments_of_some` for all experts, [E, H] and [E, I]."""
    runs = dense_weights(index, weight, stack.experts)
    sums = [
        [own.square().sum(0) for own in _read(stack, expert, x, runs[:, expert])] for expert in range(stack.experts)
    ]
    read, made = (torch.stack(side) for side in zip(*sums, strict=True))
    return read, made


def _read(stack: ExpertStack, expert: int, x: Tensor, runs: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs [t, H] and neurons [t, I] of one expert on its own t tokens, times their weights, in float64."""
    chosen = runs.nonzero().squeeze(1)
    rows, share = x[chosen], runs[chosen, None]
    return rows.double() * share, stack.hidden(expert, rows).double() * share
