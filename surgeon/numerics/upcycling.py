"""Scales that let a mixture of copies start as the dense network it was made from, and ways to tell copies apart.

Letters: E copies of an FFN, each cut into G shards, N = E G experts of which a token uses T.
"""

from __future__ import annotations

import torch
from torch import Tensor


def output_scale(copies: int, shards: int, top_k: int, *, normalised: bool) -> float:
    """Factor s of a virtual group's output (He et al., 2024, arXiv:2410.07524).

    The T / G chosen copies are whole, each of its shards with the copy's weight.  Where the T weights sum to one
    (softmax after the choice, or chosen shares of one before it), the sum over shards is FFN / G, so ``s = G``.  With the
    softmax over all N experts and nothing after it the weights sum to T / N if all are alike, so ``s = E G^2 / T``.

    Args:
        copies: E.
        shards: G.
        top_k: T.
        normalised: whether the weights of the chosen experts sum to one.
    """
    return float(shards) if normalised else copies * shards**2 / top_k


def weight_scale(scale: float, *, gated: bool) -> float:
    """The published way to put a scale s on every matrix of the FFN: ``s^(1/3)`` where gated, ``s^(1/2)`` otherwise.

    Exact for FFNs without biases whose activation is positively homogeneous of degree 1 (relu), and for relu squared with
    ``s^(1/3)``; not for silu or gelu.
    """
    return float(scale ** (1 / 3 if gated else 1 / 2))


def virtual_group_rows(rows: Tensor, shards: int) -> Tensor:
    """Router rows [E, H] of the copies -> [E G, H]: expert i is shard i mod G of copy i // G, and all shards of a copy
    share its row, so that they are chosen together.
    """
    return rows.repeat_interleave(shards, dim=0)


def perturbed(weight: Tensor, relative: float, generator: torch.Generator) -> Tensor:
    """Add noise of ``relative`` times the weight's own standard deviation."""
    noise = torch.randn(weight.shape, generator=generator, dtype=torch.float32).to(weight)
    return weight + noise * (relative * weight.float().std().to(weight))


def redrawn(neurons: Tensor, chosen: Tensor, generator: torch.Generator) -> Tensor:
    """Draw the weights of some neurons anew from the normal distribution of the chosen ones (drop-upcycling).

    Nakamura et al., 2025: the same neurons in every matrix of the FFN, with the mean and standard deviation that the
    chosen weights had.

    Args:
        neurons: one matrix with a row per neuron, [I, D].
        chosen: [n] neurons.
        generator: of the new weights.

    Returns:
        [I, D].
    """
    if chosen.numel() == 0:
        return neurons
    old = neurons[chosen].float()
    spread = old.std() if old.numel() > 1 else old.new_zeros(())
    result = neurons.clone()
    result[chosen] = (torch.randn(old.shape, generator=generator).to(old) * spread + old.mean()).to(neurons)
    return result
