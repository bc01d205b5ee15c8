"""Codes of the weights of a mixture, each expert fitted to what it reads.

Letters in shapes: T tokens, k experts per token, E experts, H input and G output width, I neurons, O rows of ``w_in``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from surgeon.expert_outputs import dense_weights
from surgeon.expert_stack import ExpertStack
from surgeon.numerics import Levels, QuantizedTensor, quantize_compensated

_AT_ONCE = 1 << 27
"""Most numbers of weights and moments that are worked on at once, 1 GB in float64."""


def quantize_experts(
    stack: ExpertStack,
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    *,
    levels: Levels,
    groups: tuple[int, int],
    damp: float,
    shrink: Sequence[float],
) -> tuple[QuantizedTensor, QuantizedTensor]:
    """Quantize w_in [E, O, H] and w_out [E, G, I], each expert fitted to the tokens that are routed to it.

    A token counts as much as the square of its weight, as in the squared error of the mixture's output.

    Args:
        stack: the experts.
        x: [T, H].
        index: [T, k].
        weight: [T, k].
        levels: what codes stand for.
        groups: inputs per scale of w_in and of w_out, -1 for one scale per row.
        damp: as :func:`surgeon.numerics.quantize_compensated` takes it, and so is ``shrink``.
        shrink: factors of the range that are tried.

    Returns:
        Codes of w_in and of w_out.
    """
    runs = dense_weights(index, weight, stack.experts)
    inputs: list[QuantizedTensor] = []
    outputs: list[QuantizedTensor] = []
    for few in _portions(stack):
        read, made = zip(*(_moments(stack, expert, x, runs[:, expert]) for expert in few), strict=True)
        part = slice(few.start, few.stop)
        for found, matrix, moments, group in (
            (inputs, stack.w_in[part], read, groups[0]),
            (outputs, stack.w_out[part], made, groups[1]),
        ):
            found.append(
                quantize_compensated(
                    matrix, torch.stack(moments), levels=levels, group=group, damp=damp, shrink=shrink
                )
            )
    return QuantizedTensor.joined(inputs), QuantizedTensor.joined(outputs)


def _portions(stack: ExpertStack) -> Iterator[range]:
    """Experts, as many at once as memory allows and one at least."""
    (rows, width), (features, inner) = stack.w_in.shape[1:], stack.w_out.shape[1:]
    each = 2 * (width * width + inner * inner) + rows * width + features * inner
    step = max(1, _AT_ONCE // each)
    for start in range(0, stack.experts, step):
        yield range(start, min(start + step, stack.experts))


def _moments(stack: ExpertStack, expert: int, x: Tensor, runs: Tensor) -> tuple[Tensor, Tensor]:
    """``sum_t p_t^2 x_t x_t^T`` [H, H] and ``sum_t p_t^2 h_t h_t^T`` [I, I] over the tokens of one expert, float64."""
    chosen = runs.nonzero().squeeze(1)
    rows, share = x[chosen], runs[chosen, None]
    read, made = rows.double() * share, stack.hidden(expert, rows).double() * share
    return read.T @ read, made.T @ made
