"""Balanced transportation: N points to C clusters of equal capacity at least total cost, exactly.

Method.  For any prices p, giving every point to ``argmin_c cost[c, n] + p[c]`` is optimal *for the cluster sizes it
happens to produce* (linear-programming duality).  So:

1. ascend the dual one price at a time: with the others fixed, the best ``p[c]`` is an order statistic of the margins
   (Bertsekas, "Auction algorithms", 1992, calls this relaxation).  After a few sweeps the sizes are nearly equal.
2. move the few points that are left over along shortest augmenting paths in the graph whose nodes are the C clusters
   and whose edge u -> v weighs ``min_{n in u} cost[v, n] - cost[u, n]`` (successive shortest paths; Ahuja, Magnanti,
   Orlin, "Network Flows", 1993, section 9.7).  Each augmentation keeps the assignment optimal for its sizes.

The result is optimal whatever the prices are; good prices only make step 2 short.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

Floats = NDArray[np.float64]
Labels = NDArray[np.int64]

_SWEEPS = 100


def solve_transport(cost: Floats, capacity: int, prices: Floats | None = None) -> tuple[Labels, Floats]:
    """Assign N points to C clusters of exactly ``capacity`` points each at least total cost.

    Args:
        cost: [C, N], finite, N = C * capacity.
        capacity: points per cluster.
        prices: [C] to start from, e.g. those of a similar problem; changes the time it takes, not the cost reached.

    Returns:
        labels [N] and the prices [C] of the clusters.
    """
    clusters, points = cost.shape
    prices = np.zeros(clusters) if prices is None else prices.copy()
    if clusters == 1:
        return np.zeros(points, dtype=np.int64), prices
    if capacity == 1:  # the classical assignment problem
        _, assigned = linear_sum_assignment(cost.T)
        labels = np.asarray(assigned, dtype=np.int64)
        return labels, prices
    labels = _ascend(cost, capacity, prices)
    _augment(cost, capacity, labels)
    return labels, prices


def _ascend(cost: Floats, capacity: int, prices: Floats) -> Labels:
    """Gauss-Seidel ascent of the dual; changes ``prices`` in place and returns the labels that they induce."""
    clusters, points = cost.shape
    priced = cost + prices[:, None]
    order, value = _two_cheapest(priced)
    # A sweep costs about C N steps, an augmentation about C^2 + N, and those are slower ones.
    worth = clusters * points // (4 * (clusters**2 + points))
    fewest = points + worth
    best_prices = prices.copy()
    best_labels: Labels = order[0].copy()
    for _ in range(_SWEEPS):
        excess = int(np.maximum(np.bincount(order[0], minlength=clusters) - capacity, 0).sum())
        gained = fewest - excess  # negative where the ascent, of a piecewise linear dual, stalls at a kink
        if gained > 0:
            fewest, best_prices, best_labels = excess, prices.copy(), order[0].copy()
        if gained <= worth or excess == 0:
            break
        for c in range(clusters):
            # Point n prefers c exactly when prices[c] < margin[n], so the price is an order statistic of the margins.
            margin = np.where(order[0] == c, value[1], value[0]) - cost[c]
            split = np.partition(margin, [points - capacity - 1, points - capacity])
            prices[c] = 0.5 * (split[points - capacity - 1] + split[points - capacity])
            priced[c] = cost[c] + prices[c]
            touched = np.flatnonzero((order == c).any(0) | (priced[c] < value[1]))
            order[:, touched], value[:, touched] = _two_cheapest(priced[:, touched])
    prices[:] = best_prices
    return best_labels


def _two_cheapest(priced: Floats) -> tuple[Labels, Floats]:
    """Rows [2, N] of the two cheapest clusters of each point, and what they cost."""
    order = np.argpartition(priced, 1, axis=0)[:2]
    value = np.take_along_axis(priced, order, 0)
    swap = (value[1] < value[0]) | ((value[1] == value[0]) & (order[1] < order[0]))
    order[:, swap], value[:, swap] = order[::-1, swap], value[::-1, swap]
    return order, value


def _augment(cost: Floats, capacity: int, labels: Labels) -> None:
    """Move points along shortest paths until every cluster holds ``capacity``; changes ``labels`` in place."""
    clusters = cost.shape[0]
    size = np.bincount(labels, minlength=clusters)
    if (size == capacity).all():
        return
    # Paths are sums of at most 2C costs; differences below this are rounding and must not make a cycle.
    tolerance = 1e-13 * clusters * float(np.abs(cost).max())
    by_point = np.ascontiguousarray(cost.T)  # [N, C]: what follows reads a few points, all clusters of each
    steps = np.full((clusters, clusters), np.inf)
    for c in range(clusters):
        steps[c] = _cheapest_steps(by_point, labels, c)
    columns = np.arange(clusters)
    while True:
        over = size > capacity
        if not over.any():
            return
        distance = np.where(over, 0.0, np.inf)
        parent = np.full(clusters, -1)
        for _ in range(clusters):  # Bellman-Ford: edges may be negative, cycles are not
            through = distance[:, None] + steps
            previous = through.argmin(0)
            reached = through[previous, columns]
            shorter = reached < distance - tolerance
            if not shorter.any():
                break
            distance[shorter] = reached[shorter]
            parent[shorter] = previous[shorter]
        path = [int(np.where(size < capacity, distance, np.inf).argmin())]
        while parent[path[-1]] >= 0:
            path.append(int(parent[path[-1]]))
        path.reverse()
        # Equal points move together, so that ties cost one augmentation and not one each.
        movers = []
        for u, v in pairwise(path):
            inside = np.flatnonzero(labels == u)
            movers.append(inside[by_point[inside, v] - by_point[inside, u] == steps[u, v]])
        amount = min(size[path[0]] - capacity, capacity - size[path[-1]], *(len(mover) for mover in movers))
        for mover, v in zip(movers, path[1:], strict=True):
            labels[mover[:amount]] = v
        size[path[0]] -= amount
        size[path[-1]] += amount
        for c in path:
            steps[c] = _cheapest_steps(by_point, labels, c)


def _cheapest_steps(by_point: Floats, labels: Labels, c: int) -> Floats:
    """For cluster ``c``, the least cost [C] of moving one of its points to each other cluster; inf when it is empty."""
    moved = by_point[labels == c]
    if not len(moved):
        return np.full(by_point.shape[1], np.inf)
    cheapest: Floats = (moved - moved[:, c, None]).min(0)
    return cheapest
