"""Codes of the weights of a mixture, each expert fitted to what it reads.

Letters in shapes: T tokens, k experts per token, E experts, H input and G output width, I neurons, O rows of ``w_in``.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from surgeon.expert_moments import moments_of_some
from surgeon.expert_stack import ExpertStack
from surgeon.numerics import Levels, QuantizedTensor, quantize_compensated


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
    inputs: list[QuantizedTensor] = []
    outputs: list[QuantizedTensor] = []
    for part, read, made in moments_of_some(stack, x, index, weight):
        for found, matrix, moments, group in (
            (inputs, stack.w_in[part], read, groups[0]),
            (outputs, stack.w_out[part], made, groups[1]),
        ):
            found.append(
                quantize_compensated(matrix, moments, levels=levels, group=group, damp=damp, shrink=shrink)
            )
    return QuantizedTensor.joined(inputs), QuantizedTensor.joined(outputs)
