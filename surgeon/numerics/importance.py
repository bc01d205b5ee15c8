"""Choosing the neurons of experts from how important every neuron is for every cluster of data."""

from __future__ import annotations

import torch
from torch import Tensor

from surgeon.numerics.clustering import balanced_assignment
from surgeon.numerics.errors import NumericsError, require_finite


def cluster_importance(importance: Tensor, labels: Tensor, clusters: int) -> Tensor:
    """Average the importance of neurons over the tokens of each cluster: v_c = mean of |h dL/dh| (or |h|) over c.

    Args:
        importance: [T, I], at least 0.
        labels: [T], cluster of each token.
        clusters: C.

    Returns:
        [C, I] in float64; a cluster without tokens has zeros.
    """
    one_hot = torch.nn.functional.one_hot(labels, clusters).double()
    return one_hot.T @ importance.double() / one_hot.sum(0).clamp_min(1)[:, None]


def split_disjoint(importance: Tensor, size: int) -> Tensor:
    """Give each of C experts ``size`` neurons of its own so that the importance kept is greatest (exact transport).

    LLaMA-MoE takes neurons greedily; this maximises the same sum.

    Args:
        importance: v, [C, I] with I = C size.
        size: m.

    Returns:
        [C, m] neurons, each row ascending; every neuron in exactly one row.

    Raises:
        NumericsError: I is not C m.
    """
    _check(importance, size)
    clusters, neurons = importance.shape
    if neurons != clusters * size:
        raise NumericsError(f"split_disjoint: {clusters} experts of {size} need {clusters * size} neurons, got {neurons}")
    labels = balanced_assignment(-importance.T, size)
    return labels.argsort(stable=True).reshape(clusters, size)


def split_overlapping(importance: Tensor, size: int) -> Tensor:
    """Give each expert the ``size`` neurons that matter most to its cluster, whoever else takes them (SharingInner).

    Args:
        importance: v, [C, I].
        size: m.

    Returns:
        [C, m] neurons, each row ascending.
    """
    _check(importance, size)
    return importance.topk(size, dim=1).indices.sort(1).values


def shared_neurons(importance: Tensor, size: int, count: int) -> Tensor:
    """Find the neurons that most experts want (SharingInter, the residual block of LLaMA-MoE v2).

    Again and again: each expert names its ``size`` most important neurons among those left; neurons named by most
    experts go to the shared block, those named equally often by their total importance.  One round takes the neurons
    that the largest number of experts named.

    Args:
        importance: v, [C, I].
        size: m, neurons of one expert.
        count: neurons of the shared block, at most I.

    Returns:
        [count] neurons, ascending.
    """
    _check(importance, size)
    _, neurons = importance.shape
    if not 0 <= count <= neurons:
        raise NumericsError(f"shared_neurons: {count} of {neurons} neurons asked")
    left = torch.ones(neurons, dtype=torch.bool, device=importance.device)
    total = importance.sum(0)
    chosen: list[Tensor] = []
    missing = count
    while missing > 0:
        masked = importance.masked_fill(~left, -torch.inf)
        named = masked.topk(min(size, int(left.sum())), dim=1).indices
        votes = torch.bincount(named.flatten(), minlength=neurons)
        most = (votes == votes.max()).nonzero().flatten()
        take = most[total[most].argsort(descending=True, stable=True)[:missing]]
        chosen.append(take)
        left[take] = False
        missing -= take.numel()
    return torch.cat(chosen).sort().values if chosen else torch.empty(0, dtype=torch.int64)


def _check(importance: Tensor, size: int) -> None:
    if importance.ndim != 2 or not 1 <= size <= importance.shape[1]:
        raise NumericsError(
            f"importance {list(importance.shape)} and experts of {size} neurons, needed [C, I] and 1 to I"
        )
    require_finite(importance=importance)
