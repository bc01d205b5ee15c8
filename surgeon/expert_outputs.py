"""What single experts of a mixture give, over many tokens at once.

Letters in shapes: T tokens, k experts per token, E experts, H input width, G output width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from surgeon.expert_stack import ExpertStack
from surgeon.ops import moe

_CHUNK = 1 << 22
"""Most numbers of expert outputs held at once, 16 MB in float32."""


def expert_output_norms(
    x: Tensor, index: Tensor, experts: tuple[Tensor, Tensor, Tensor | None, Tensor | None], activation: str
) -> Tensor:
    """Euclidean norm ``||E_e(x_t)||`` of every chosen expert's own output, without its weight.

    Each pair of a token and an expert is handed to the grouped operator as a token of its own, so that no loop runs over
    tokens or experts here.

    Args:
        x: [T, H].
        index: [T, k] chosen experts.
        experts: w_in [E, O, H], w_out [E, G, I], b_in [E, O] or None, b_out [E, G] or None.
        activation: as ``surgeon::moe`` takes it.

    Returns:
        [T, k] float64.
    """
    k, width = index.shape[1], experts[1].shape[1]
    step = max(1, _CHUNK // (k * width))
    parts = []
    for start in range(0, x.shape[0], step):
        chosen = index[start : start + step].reshape(-1, 1)
        rows = x[start : start + step].to(experts[0].dtype).repeat_interleave(k, dim=0)
        out = moe(rows, chosen, rows.new_ones(chosen.shape), *experts, activation)
        parts.append(out.double().norm(dim=-1).reshape(-1, k))
    return torch.cat(parts) if parts else x.new_zeros(0, k, dtype=torch.float64)


def neuron_contributions(stack: ExpertStack, x: Tensor, runs: Tensor) -> Tensor:
    """How much each neuron gives where it always runs, with the factor of :func:`stand_in`: ``f (mean_t h^2)^1/2 ||d||``.

    Args:
        stack: the experts, each of I neurons h with output columns d.
        x: [T, H].
        runs: [T, E] weight of every expert, as of :func:`dense_weights`.

    Returns:
        [E, I] float64.
    """
    rows = []
    for expert in range(stack.experts):
        hidden = stack.hidden(expert, x).double()
        size = hidden.square().mean(0).sqrt() * stack.outputs(expert).double().norm(dim=1)
        rows.append(stand_in(hidden, runs[:, expert]) * size)
    return torch.stack(rows)


def stand_in(hidden: Tensor, runs: Tensor) -> Tensor:
    """Factor with which a neuron that always runs best stands in for what it gives as part of a routed expert.

    The neuron gives ``w_t h(x_t) d`` there; ``f h(x_t) d`` is nearest to it in the mean square with
    ``f = sum_t w_t h_t^2 / sum_t h_t^2``.

    Args:
        hidden: h of neurons of one expert, [T, n].
        runs: w, [T], 0 where the expert does not run.

    Returns:
        f, [n] float64.
    """
    square = hidden.double().square()
    factor: Tensor = runs @ square / square.sum(0).clamp_min(torch.finfo(torch.float64).tiny)
    return factor


def dense_weights(index: Tensor, weight: Tensor, experts: int) -> Tensor:
    """Weights [T, k] of the chosen experts [T, k] as those of all experts, 0 where one does not run; [T, E] float64."""
    return torch.zeros(index.shape[0], experts, dtype=torch.float64, device=index.device).scatter_add(1, index, weight.double())


def mean_by_expert(values: Tensor, index: Tensor, experts: int) -> Tensor:
    """Mean of the values of each expert's pairs; 0 for an expert that no token chose.

    Args:
        values: [T, k].
        index: [T, k] the expert of each value.
        experts: E.

    Returns:
        [E] float64.
    """
    flat = index.flatten()
    total = torch.bincount(flat, weights=values.flatten().double(), minlength=experts)
    return total / torch.bincount(flat, minlength=experts).clamp_min(1)
