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


def neuron_stand_ins(stack: ExpertStack, x: Tensor, index: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """How a neuron that always runs best stands in for what it gives as part of a routed expert.

    With w_t the weight of the neuron's expert at token t, 0 where the expert does not run, the neuron gives w_t h(x_t) d;
    ``f h(x_t) d`` is nearest to it in the mean square with ``f = sum_t w_t h_t^2 / sum_t h_t^2``.

    Args:
        stack: the experts, each of I neurons.
        x: [T, H].
        index: [T, k] chosen experts.
        weight: [T, k] their weights.

    Returns:
        f and ``f (mean_t h^2)^1/2 ||d||``, each [E, I] float64.
    """
    runs = torch.zeros(x.shape[0], stack.experts, dtype=torch.float64).scatter_add(1, index, weight.double())
    factors, sizes = [], []
    for expert in range(stack.experts):
        square = stack.hidden(expert, x).double().square()
        total = square.sum(0)
        factors.append(runs[:, expert] @ square / total.clamp_min(torch.finfo(torch.float64).tiny))
        sizes.append(factors[-1] * (total / max(x.shape[0], 1)).sqrt() * stack.outputs(expert).double().norm(dim=1))
    return torch.stack(factors), torch.stack(sizes)


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
