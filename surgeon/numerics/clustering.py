"""k-means, and balanced k-means with clusters of exactly equal size."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from surgeon.numerics.errors import NumericsError, require_finite
from surgeon.numerics.transport import Floats, solve_transport

_ROWS_AT_A_TIME = 1024

# Lloyd's steps (0) first; when they stop, steps that count a point's share in its own centroid, ever more cautiously.
_DETACHMENT = (0.0, 1.0, 0.5, 0.25, 0.125, 0.0625)


@dataclass(frozen=True)
class Clustering:
    """A partition of N points into C clusters.

    Attributes:
        labels: [N] int64, the cluster of each point.
        centroids: [C, D], the mean of each cluster.
        inertia: sum over points of the squared distance to their centroid.
    """

    labels: Tensor
    centroids: Tensor
    inertia: float


def balanced_kmeans(
    points: Tensor, clusters: int, *, iterations: int = 100, restarts: int = 1, seed: int = 0
) -> Clustering:
    """Partition points into clusters of exactly N / C points with small squared distance to the centroids.

    Lloyd's iteration in which the assignment step is a balanced transportation problem solved to optimality.  In many
    dimensions that stops early, because a point pulls its own centroid towards itself.  With S_c the sum of cluster c,
    swapping i of a with j of b lowers capacity * inertia by
    2 [x_i.(S_b - S_a) + |x_i|^2] + 2 [x_j.(S_a - S_b) + |x_j|^2] - 4 x_i.x_j; without its last term, which is small
    where points are many and wide, that is a transportation cost again: Lloyd's plus 2 |x|^2 / capacity for staying.
    Such steps (the balanced form of Hartigan's rule; Telgarsky and Vattani, 2010) follow, in full or in part, and a
    step is taken only if it lowers the inertia.

    Seeding is greedy k-means++ (Arthur and Vassilvitskii, 2007).  The same seed gives the same result; the draws are
    made on the CPU whatever the device of the points.

    Args:
        points: [N, D], any floating dtype and device; worked on in float32, or float64 when given in float64.
        clusters: C; must divide N.
        iterations: most steps of each restart; it stops sooner when none lowers the inertia.
        restarts: seedings tried; the partition of least inertia is returned.
        seed: of the seedings.

    Returns:
        Labels and centroids on the device of the points.

    Raises:
        NumericsError: C does not divide N, or the points are not finite or not a matrix.
    """
    if points.ndim != 2:
        raise NumericsError(f"balanced_kmeans: points must be [N, D], got shape {list(points.shape)}")
    capacity = _capacity(points.shape[0], clusters)
    if iterations < 1 or restarts < 1:
        raise NumericsError(f"balanced_kmeans: iterations={iterations} and restarts={restarts} must be at least 1")
    require_finite(points=points)
    dtype = torch.float64 if points.dtype == torch.float64 else torch.float32
    mean = points.detach().mean(0, dtype=torch.float64).to(dtype)
    # Distances are taken as |c|^2 - 2 x.c; centred points keep that difference from cancelling.
    centred = points.detach().to(dtype) - mean
    generator = torch.Generator().manual_seed(seed)
    best = min(
        (
            _descend(centred, _seed_centroids(centred, clusters, generator), capacity, iterations)
            for _ in range(restarts)
        ),
        key=lambda clustering: clustering.inertia,
    )
    return Clustering(best.labels, best.centroids + mean, best.inertia)


def kmeans(
    points: Tensor,
    clusters: int,
    *,
    weights: Tensor | None = None,
    iterations: int = 100,
    restarts: int = 1,
    seed: int = 0,
) -> Clustering:
    """Partition points into clusters of any size, none empty: Lloyd's iteration from greedy k-means++ seeds.

    A cluster that loses all its points takes the point that is farthest from its centroid.  The same seed gives the same
    result.

    Args:
        points: [N, D], worked on in float64.
        clusters: C, at most N.
        weights: how much each point counts in centroids and inertia, [N] above 0; None: all alike.
        iterations: most steps of each restart.
        restarts: seedings tried; the partition of least inertia is returned.
        seed: of the seedings.

    Raises:
        NumericsError: more clusters than points, points that are not finite or no matrix, or weights that do not fit.
    """
    if points.ndim != 2 or not 1 <= clusters <= points.shape[0]:
        raise NumericsError(f"kmeans: {clusters} clusters of points {list(points.shape)}, needed [N, D] with N at least that")
    mass = points.new_ones(points.shape[0], dtype=torch.float64) if weights is None else weights.double()
    if mass.shape != points.shape[:1] or not bool((mass > 0).all()):
        raise NumericsError(f"kmeans: weights {list(mass.shape)} of points {list(points.shape)}, needed [N] above 0")
    require_finite(points=points, weights=mass)
    mean = points.detach().double().mean(0)
    centred = points.detach().double() - mean
    generator = torch.Generator().manual_seed(seed)
    best = min(
        (_lloyd(centred, mass, _seed_centroids(centred, clusters, generator, mass), iterations) for _ in range(restarts)),
        key=lambda clustering: clustering.inertia,
    )
    return Clustering(best.labels, best.centroids + mean, best.inertia)


def _lloyd(points: Tensor, mass: Tensor, centroids: Tensor, iterations: int) -> Clustering:
    clusters = centroids.shape[0]
    labels = torch.full((points.shape[0],), -1, device=points.device)
    for _ in range(iterations):
        distances = torch.cdist(points, centroids)
        assigned = distances.argmin(1)
        sizes = torch.bincount(assigned, minlength=clusters)
        for empty in (sizes == 0).nonzero().flatten().tolist():
            own = distances.gather(1, assigned[:, None])[:, 0]
            own[sizes[assigned] < 2] = -1.0  # the last point of a cluster stays
            moved = int(own.argmax())
            sizes[assigned[moved]] -= 1
            assigned[moved] = empty
            distances[moved, empty] = 0.0
            sizes[empty] = 1
        if torch.equal(assigned, labels):
            break
        labels = assigned
        share = torch.nn.functional.one_hot(labels, clusters).to(points.dtype) * mass[:, None]
        centroids = share.T @ points / share.sum(0)[:, None]
    moved_by = (points - centroids[labels]).square().sum(1)
    return Clustering(labels, centroids, float(mass @ moved_by))


def balanced_assignment(cost: Tensor, capacity: int) -> Tensor:
    """Give every point a cluster so that each cluster gets ``capacity`` points and the total cost is least (exact).

    Args:
        cost: [N, C], cost of putting point n into cluster c.
        capacity: points per cluster; N = C * capacity.

    Returns:
        labels [N] int64 on the device of ``cost``.

    Raises:
        NumericsError: N is not C * capacity, or a cost is not finite.
    """
    if cost.ndim != 2 or cost.shape[0] == 0 or cost.shape[0] != cost.shape[1] * capacity:
        raise NumericsError(
            f"balanced_assignment: cost has shape {list(cost.shape)}, needs [N, C] with N = C * capacity and "
            f"capacity = {capacity}"
        )
    require_finite(cost=cost)
    labels, _ = solve_transport(_to_numpy(cost.T), capacity)
    return torch.from_numpy(labels).to(cost.device)


def members(labels: Tensor, clusters: int) -> Tensor:
    """List the points of each cluster of a balanced partition.

    Args:
        labels: [N] integers in [0, C).
        clusters: C.

    Returns:
        [C, N / C] int64, each row sorted.

    Raises:
        NumericsError: the clusters are not of equal size, or a label is out of range.
    """
    capacity = _capacity(labels.numel(), clusters)
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= clusters:
        raise NumericsError(f"members: labels span [{low}, {high}], needed within [0, {clusters - 1}]")
    sizes = torch.bincount(labels, minlength=clusters)
    if bool((sizes != capacity).any()):
        raise NumericsError(f"members: cluster sizes are {sizes.tolist()}, every one must be {capacity}")
    return labels.argsort(stable=True).reshape(clusters, capacity)


def _capacity(points: int, clusters: int) -> int:
    if clusters < 1 or points < 1 or points % clusters:
        divisors = [d for d in range(1, min(points, 256) + 1) if points % d == 0]
        raise NumericsError(
            f"{points} points cannot be split into {clusters} clusters of equal size; "
            f"counts up to 256 that divide {points}: {', '.join(map(str, divisors)) or 'none'}"
        )
    return points // clusters


def _seed_centroids(
    points: Tensor, clusters: int, generator: torch.Generator, mass: Tensor | None = None
) -> Tensor:
    """Greedy k-means++ [C, D]: of a few candidates drawn by squared distance times mass [N], the one of least inertia."""
    trials = 2 + int(math.log(clusters))
    norms = points.square().sum(1)
    nearest = torch.full_like(norms, math.inf)
    mass = torch.ones_like(norms) if mass is None else mass
    weights = mass.double().cpu()
    chosen = []
    for _ in range(clusters):
        drawn = torch.rand(trials, dtype=torch.float64, generator=generator) * weights.sum()
        candidates = torch.searchsorted(weights.cumsum(0), drawn, right=True).clamp_(max=points.shape[0] - 1)
        candidates = candidates.to(points.device)
        distances = norms + norms[candidates, None] - 2 * points[candidates] @ points.T  # [trials, N]
        distances = torch.minimum(distances.clamp_(min=0), nearest)
        winner = int((distances * mass).sum(1, dtype=torch.float64).argmin())
        nearest = distances[winner]
        chosen.append(candidates[winner])
        weights = (nearest * mass).double().cpu()
        if float(weights.sum()) == 0:  # fewer distinct points than clusters: every further seed is as good as another
            weights = torch.ones_like(weights)
    return points[torch.stack(chosen)]


def _descend(points: Tensor, centroids: Tensor, capacity: int, iterations: int) -> Clustering:
    """Improve centroids [C, D] of centred points [N, D] until neither kind of step lowers the inertia."""
    clusters = centroids.shape[0]
    every = torch.arange(points.shape[0], device=points.device)
    squares = points.square().sum(1)
    labels = torch.zeros_like(every)
    spread = -math.inf  # inertia = sum |x|^2 - capacity * spread
    prices: Floats | None = None
    step = 0
    for _ in range(iterations):
        cost = centroids.square().sum(1, keepdim=True) - 2 * centroids @ points.T  # [C, N], less |x|^2 of each point
        cost[labels, every] += _DETACHMENT[step] * 2 / capacity * squares
        assigned, prices = solve_transport(_to_numpy(cost), capacity, prices)
        proposed = torch.from_numpy(assigned).to(points.device)
        means = _means(points, proposed, clusters, capacity)
        proposed_spread = float(means.double().square().sum())
        if proposed_spread > spread:
            labels, centroids, spread = proposed, means, proposed_spread
            continue
        step += 1
        if step == len(_DETACHMENT):
            break
    return Clustering(labels, centroids, _inertia(points, labels, centroids))


def _means(points: Tensor, labels: Tensor, clusters: int, capacity: int) -> Tensor:
    # A product with the one-hot matrix, not index_add: that is not deterministic on every device.
    one_hot = torch.nn.functional.one_hot(labels, clusters).to(points.dtype)
    return one_hot.T @ points / capacity


def _inertia(points: Tensor, labels: Tensor, centroids: Tensor) -> float:
    total = 0.0
    for start in range(0, points.shape[0], _ROWS_AT_A_TIME):  # in blocks: float64 of all points would double the memory
        rows = slice(start, start + _ROWS_AT_A_TIME)
        total += float((points[rows].double() - centroids[labels[rows]].double()).square().sum())
    return total


def _to_numpy(cost: Tensor) -> Floats:
    array: Floats = np.ascontiguousarray(cost.detach().cpu().double().numpy())
    return array
