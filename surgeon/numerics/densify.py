"""Joining the experts of a mixture to one feed-forward network.

Letters: E experts of I neurons, H input and G output features, O rows of the input matrix (I, or 2 I with [gate | up]).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from surgeon.numerics.errors import NumericsError, require_finite
from surgeon.numerics.lowrank import truncated_svd


def weighted_sum(stack: Tensor, weights: Tensor) -> Tensor:
    """``sum_e a_e W_e``, stack [E, ...] and a [E] -> [...], accumulated in float64."""
    flat = stack.detach().reshape(stack.shape[0], -1)
    return (weights.to(flat.device, torch.float64) @ flat.double()).reshape(stack.shape[1:]).to(stack.dtype)


def sum_of_truncations(stack: Tensor, weights: Tensor, rank: int) -> Tensor:
    """``sum_e a_e [W_e]_r``: the experts' best approximations of rank r (OneS, "SVD knowledge gathering"), [E, m, n] -> [m, n].

    Raises:
        NumericsError: a rank outside 1 to min(m, n).
    """
    total = torch.zeros(stack.shape[1:], dtype=torch.float64, device=stack.device)
    for matrix, weight in zip(stack.detach(), weights.tolist(), strict=True):
        factors = truncated_svd(matrix.double(), rank)
        total += weight * (factors.left.double() @ factors.right.double())
    return total.to(stack.dtype)


def largest_neurons(w_in: Tensor, w_out: Tensor, count: int) -> Tensor:
    """The ``count`` neurons of largest norm of each expert (OneS, "top knowledge gathering").

    The norm is over all weights of a neuron: its input rows and its output column.

    Args:
        w_in: [E, O, H].
        w_out: [E, G, I].
        count: at most I.

    Returns:
        [E, count], each row ascending.
    """
    experts, _, width = w_out.shape
    if not 1 <= count <= width:
        raise NumericsError(f"largest_neurons: {count} of {width} neurons asked")
    square = w_in.detach().double().square().sum(2).reshape(experts, -1, width).sum(1)
    square = square + w_out.detach().double().square().sum(1)
    return square.topk(count, dim=1).indices.sort(1).values


def learn_weights(
    output: Callable[[Tensor, Tensor], Tensor],
    inputs: Tensor,
    targets: Tensor,
    start: Tensor,
    *,
    steps: int = 200,
    batch: int = 256,
    rate: float = 0.05,
    seed: int = 0,
) -> Tensor:
    """Weights a >= 0 with sum 1 that bring a merged network near to the mixture, by Adam on their logits.

    Args:
        output: (a [E], x [t, H]) -> y [t, G], differentiable in a.
        inputs: x, [T, H].
        targets: the mixture's output, [T, G].
        start: first weights, [E], all positive.
        steps: of the optimiser.
        batch: tokens per step.
        rate: first learning rate, falling linearly to zero.
        seed: of the batches.

    Returns:
        [E] in float64: the weights of least error over all tokens among the start and those at every tenth of the way.
    """
    require_finite(inputs=inputs, targets=targets)
    generator = torch.Generator().manual_seed(seed)

    def whole(weights: Tensor) -> float:
        with torch.no_grad():
            return float((output(weights, inputs) - targets).double().square().mean())

    with torch.enable_grad():
        logits = start.detach().to(inputs.dtype).clamp_min(1e-6).log().requires_grad_()
        optimiser = torch.optim.Adam([logits], lr=rate)
        best, kept = whole(start.to(inputs.dtype)), start.detach().double()
        for step in range(steps):
            optimiser.param_groups[0]["lr"] = rate * (1 - step / steps)
            rows = torch.randint(inputs.shape[0], (min(batch, inputs.shape[0]),), generator=generator).to(inputs.device)
            loss = (output(logits.softmax(0), inputs[rows]) - targets[rows]).square().mean()
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # of torch
            optimiser.step()
            if (step + 1) % max(steps // 10, 1) == 0:
                weights = logits.detach().softmax(0)
                error = whole(weights)
                if error < best:
                    best, kept = error, weights.double()
    return kept / kept.sum()
