"""Cutting the neurons of a feed-forward network into experts.

Letters: T tokens, I neurons, E experts of m neurons.
"""

from __future__ import annotations

import torch
from torch import Tensor

from surgeon.numerics import (
    balanced_kmeans,
    cluster_importance,
    coactivation_graph,
    members,
    partition_graph,
    shared_neurons,
    split_disjoint,
    split_overlapping,
)

_CLUSTERED = 4096  # tokens at most that are clustered


def split_random(neurons: int, experts: int, seed: int) -> Tensor:
    """Shuffled neurons in equal parts, [E, m]."""
    order = torch.randperm(neurons, generator=torch.Generator().manual_seed(seed))
    return order.reshape(experts, -1).sort(1).values


def split_kmeans(keys: Tensor, experts: int, seed: int) -> Tensor:
    """Balanced k-means on L2-normalised input rows [I, H] -> [E, m]."""
    rows = torch.nn.functional.normalize(keys.float(), dim=1)
    return members(balanced_kmeans(rows, experts, seed=seed).labels, experts)


def split_coactivation(hidden: Tensor, experts: int, seed: int) -> Tensor:
    """Balanced partition of the graph of neurons that are active together, hidden [T, I] -> [E, m]."""
    labels = partition_graph(coactivation_graph(hidden), experts, seed=seed)
    return members(labels, experts)


def split_importance(importance: Tensor, size: int, *, overlap: bool) -> Tensor:
    """Each expert takes the neurons that matter to its cluster of tokens, importance [E, I] -> [E, m]."""
    return split_overlapping(importance, size) if overlap else split_disjoint(importance, size)


def token_clusters(x: Tensor, clusters: int, seed: int) -> Tensor:
    """Centroids [E, D] of balanced k-means on at most 4096 inputs x [T, D], evenly spaced."""
    count = min(x.shape[0], _CLUSTERED) // clusters * clusters
    chosen = torch.linspace(0, x.shape[0] - 1, count).round().long().to(x.device)
    return balanced_kmeans(x[chosen].float(), clusters, seed=seed).centroids


def nearest(x: Tensor, centroids: Tensor) -> Tensor:
    """Number of the centroid nearest to each row, [T, D] and [E, D] -> [T]."""
    return (x.float() @ centroids.T - centroids.square().sum(1) / 2).argmax(1)


def importance_by_cluster(
    x: Tensor, hidden: Tensor, down: Tensor, gradient: Tensor | None, clusters: int, seed: int
) -> Tensor:
    """How much every neuron matters to every cluster of tokens.

    ``v_ci = mean over tokens t of c of |h_ti dL/dh_ti|`` with ``dL/dh = down^T dL/dy``; without a loss of ``|h_ti|``.

    Args:
        x: inputs of the FFN, [T, H].
        hidden: h, [T, I].
        down: [G, I].
        gradient: dL/dy, [T, G], or None.
        clusters: E.
        seed: of the clustering.

    Returns:
        [E, I] in float64.
    """
    labels = nearest(x, token_clusters(x, clusters, seed))
    weight = hidden.abs() if gradient is None else (hidden * (gradient @ down)).abs()
    return cluster_importance(weight, labels, clusters)


def widely_active(hidden: Tensor, size: int, count: int) -> Tensor:
    """The ``count`` neurons that are among the ``size`` most active ones for most tokens, hidden [T, I] -> [count]."""
    named = hidden.abs().topk(size, dim=1).indices
    votes = torch.bincount(named.flatten(), minlength=hidden.shape[1])
    return votes.argsort(descending=True, stable=True)[:count].sort().values


def widely_important(importance: Tensor, size: int, count: int) -> Tensor:
    """The ``count`` neurons that most experts want, importance [E, I] -> [count]."""
    return shared_neurons(importance, size, count)


def without(width: int, neurons: Tensor) -> Tensor:
    """The other neurons of ``width``, ascending."""
    left = torch.ones(width, dtype=torch.bool)
    left[neurons] = False
    return left.nonzero().flatten()
