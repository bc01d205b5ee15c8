"""Grouping experts: by leaders, by linkage, by k-means, at random; and how many groups each layer gets.

All but the last start from a Gram matrix G [E, E], ``G_ij = <f_i, f_j>`` of one feature vector f per expert: cosines,
Euclidean distances and an isometric embedding follow from it, however long the features are.  Every function returns
labels [E] in 0 .. g-1 in which each of the g groups occurs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from scipy.cluster.hierarchy import cut_tree, linkage
from scipy.spatial.distance import squareform
from torch import Tensor

from surgeon.numerics.clustering import kmeans
from surgeon.numerics.errors import NumericsError, require_finite

SAME = 1e-7
"""Two experts whose features have a cosine similarity above 1 - SAME are copies of each other."""


def cosines(gram: Tensor) -> Tensor:
    """``cos(f_i, f_j)``, [E, E] in [-1, 1]; 0 for a feature that is zero."""
    norm = gram.diagonal().clamp_min(torch.finfo(gram.dtype).tiny).sqrt()
    return gram / torch.outer(norm, norm)


def distances(gram: Tensor) -> Tensor:
    """``|f_i - f_j|``, [E, E]."""
    norm = gram.diagonal()
    square = norm[:, None] + norm - 2 * gram
    # what stands below rounding is zero, or copies would lie at a distance that only rounding gives
    square = torch.where(square > 1e-12 * (norm[:, None] + norm), square, torch.zeros_like(square))
    return square.clamp_min(0).sqrt()


def embedding(gram: Tensor) -> Tensor:
    """Points [E, E] whose inner products are G: ``V L^1/2`` of ``G = V L V^T``."""
    values, vectors = torch.linalg.eigh((gram + gram.T) / 2)
    points: Tensor = vectors * values.clamp_min(0).sqrt()
    return points


def group_by_leaders(gram: Tensor, counts: Tensor, groups: int) -> Tensor:
    """The most chosen experts lead, every other one joins the leader of largest cosine similarity (M-SMoE).

    An expert whose features are those of a leader waits until nothing else is left: two copies are chosen equally often,
    both would lead, and an expert unlike either would have to be merged in the second one's place.

    Args:
        gram: [E, E].
        counts: how often each expert is chosen, [E].
        groups: g.
    """
    _check(gram, groups)
    similarity = cosines(gram)
    chosen: list[int] = []
    copies: list[int] = []
    for expert in torch.argsort(counts, descending=True, stable=True).tolist():
        is_copy = bool(chosen) and float(similarity[expert, chosen].max()) > 1.0 - SAME
        (copies if is_copy else chosen).append(expert)
    leaders = torch.tensor((chosen + copies)[:groups]).sort().values
    labels = similarity[:, leaders].argmax(dim=1)
    labels[leaders] = torch.arange(groups)
    return labels


def group_by_linkage(gram: Tensor, groups: int, counts: Tensor | None = None) -> Tensor:
    """Agglomerative clustering with average linkage of Euclidean distances (HC-SMoE).

    The two clusters A, B of least ``1/(|A| |B|) sum_{a, b} |f_a - f_b|`` are joined until g are left.  With counts a pair is
    as far apart as joining it costs in :func:`group_by_ward`: ``(c_a c_b / (c_a + c_b))^1/2 |f_a - f_b|``.

    Args:
        gram: [E, E].
        groups: g.
        counts: c, [E], as in :func:`group_by_ward`; None: all alike, as published.
    """
    _check(gram, groups)
    experts = gram.shape[0]
    if experts == 1:
        return torch.zeros(1, dtype=torch.int64)
    apart = distances(gram)
    if counts is not None:
        apart = apart * _harmonic(_shares(counts)).sqrt()
    tree = linkage(squareform(apart.numpy(), checks=False), method="average")
    return torch.from_numpy(cut_tree(tree, n_clusters=groups)[:, 0]).long()


def group_by_ward(gram: Tensor, counts: Tensor, groups: int) -> Tensor:
    """Ward's linkage in which an expert weighs as much as it is chosen: the least rise of ``sum_e c_e |f_e - mean|^2``.

    Joining clusters A, B of weight c_A, c_B costs ``c_A c_B / (c_A + c_B) |mean_A - mean_B|^2``, the means weighted too;
    the cheapest are joined until g are left.  Where f_e are outputs over tokens that is the error which weighted means of
    experts would make on these tokens, were outputs linear in the weights.  Costs are updated by the formula of Lance and
    Williams (1967) for Ward's method.

    Args:
        gram: [E, E].
        counts: c, [E]; an expert that is never chosen weighs a millionth, so that it still joins what it is like.
        groups: g.
    """
    _check(gram, groups)
    experts = gram.shape[0]
    weight = _shares(counts)
    cost = distances(gram).square() * _harmonic(weight)
    cost.fill_diagonal_(torch.inf)
    labels = torch.arange(experts)
    for _ in range(experts - groups):
        i, j = sorted(divmod(int(cost.argmin()), experts))
        left = cost[i].isfinite() & cost[j].isfinite()
        i_k, j_k = weight[i] + weight[left], weight[j] + weight[left]
        joined = i_k * cost[i, left] + j_k * cost[j, left] - weight[left] * cost[i, j]
        cost[i, left] = cost[left, i] = joined / (weight[i] + j_k)
        cost[j], cost[:, j] = torch.inf, torch.inf
        weight[i] += weight[j]
        labels[labels == j] = i
    found: Tensor = torch.unique(labels, return_inverse=True)[1]
    return found


def group_by_kmeans(
    gram: Tensor, groups: int, counts: Tensor | None = None, *, restarts: int = 10, seed: int = 0
) -> Tensor:
    """k-means of the features over some restarts: least ``sum_e c_e |f_e - mean of its group|^2``, the mean weighted too.

    Args:
        gram: [E, E].
        groups: g.
        counts: c, [E], as in :func:`group_by_ward`; None: all alike (Sub-MoE; the variant that HC-SMoE compares with).
        restarts: seedings tried.
        seed: of the seedings.
    """
    _check(gram, groups)
    weights = None if counts is None else _shares(counts)
    return kmeans(embedding(gram), groups, weights=weights, restarts=restarts, seed=seed).labels


def group_at_random(experts: int, groups: int, generator: torch.Generator) -> Tensor:
    """A lot: g experts of a random order found the groups, the others join one each."""
    if not 1 <= groups <= experts:
        raise NumericsError(f"grouping: {groups} groups of {experts} experts asked")
    order = torch.randperm(experts, generator=generator)
    labels = torch.empty(experts, dtype=torch.int64)
    labels[order[:groups]] = torch.arange(groups)
    labels[order[groups:]] = torch.randint(groups, (experts - groups,), generator=generator)
    return labels


def groups_per_layer(counts: Sequence[Tensor], total: int, least: Sequence[int]) -> list[int]:
    """How many experts each layer keeps when all layers share one budget (M-SMoE).

    ``f_le = c_le / sum_e c_le``; the ``least_l`` most chosen experts of each layer are kept whatever their f, and the
    others in the order of f over all layers until ``total`` are kept.  M-SMoE has least = 1.

    Args:
        counts: c of every layer, [E_l] each.
        total: experts kept in all layers together.
        least: at least so many in each layer.

    Raises:
        NumericsError: the total cannot be reached.
    """
    if not sum(least) <= total <= sum(layer.numel() for layer in counts):
        raise NumericsError(
            f"grouping: {total} experts asked over all layers, which hold {sum(layer.numel() for layer in counts)} "
            f"and need {sum(least)} at least"
        )
    shares = []
    for layer, needed in zip(counts, least, strict=True):
        share = layer.double() / layer.double().sum().clamp_min(1)
        share[torch.argsort(share, descending=True, stable=True)[:needed]] = 2.0  # above any share
        shares.append(share)
    owner = torch.cat([torch.full((layer.numel(),), number) for number, layer in enumerate(counts)])
    kept = torch.argsort(torch.cat(shares), descending=True, stable=True)[:total]
    found: list[int] = torch.bincount(owner[kept], minlength=len(counts)).tolist()
    return found


def _shares(counts: Tensor) -> Tensor:
    """How much an expert weighs [E]; one that is never chosen a millionth, so that it still joins what it is like."""
    return counts.double() / counts.double().sum().clamp_min(1) + 1e-6


def _harmonic(weight: Tensor) -> Tensor:
    """``c_i c_j / (c_i + c_j)``, [E] -> [E, E]."""
    return torch.outer(weight, weight) / (weight[:, None] + weight)


def _check(gram: Tensor, groups: int) -> None:
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or not 1 <= groups <= gram.shape[0]:
        raise NumericsError(f"grouping: {groups} groups asked of a Gram matrix {list(gram.shape)}")
    require_finite(gram=gram)
