"""Balanced k-means against planted partitions, linear assignment and scikit-learn."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans

from surgeon.numerics import NumericsError, balanced_assignment, balanced_kmeans, members


def exact_cost(cost: torch.Tensor, capacity: int) -> float:
    """Least balanced cost by the assignment problem with every cluster repeated ``capacity`` times."""
    repeated = np.repeat(cost.double().numpy(), capacity, axis=1)
    return float(repeated[linear_sum_assignment(repeated)].sum())


def total(cost: torch.Tensor, labels: torch.Tensor) -> float:
    return float(cost.double().gather(1, labels[:, None]).sum())


def inertia(points: torch.Tensor, labels: torch.Tensor, clusters: int) -> float:
    x = points.double()
    return sum(float((x[labels == c] - x[labels == c].mean(0)).square().sum()) for c in range(clusters))


@pytest.mark.parametrize(
    ("points", "clusters"), [(12, 12), (12, 1), (64, 2), (90, 30), (240, 8), (384, 96), (768, 16), (1024, 64)]
)
def test_assignment_is_optimal(points: int, clusters: int) -> None:
    generator = torch.Generator().manual_seed(points + clusters)
    capacity = points // clusters
    # Uniform noise, plus a cluster that everyone wants and one that nobody wants.
    cost = torch.rand(points, clusters, generator=generator, dtype=torch.float64)
    cost[:, 0] -= 5
    cost[:, -1] += 5
    labels = balanced_assignment(cost, capacity)
    assert torch.bincount(labels, minlength=clusters).tolist() == [capacity] * clusters
    assert total(cost, labels) == pytest.approx(exact_cost(cost, capacity), rel=1e-12)


@pytest.mark.parametrize("levels", [1, 2, 5])
def test_assignment_is_optimal_among_ties(levels: int) -> None:
    generator = torch.Generator().manual_seed(levels)
    cost = torch.randint(0, levels, (480, 12), generator=generator).float()
    labels = balanced_assignment(cost, 40)
    assert torch.bincount(labels).tolist() == [40] * 12
    assert total(cost, labels) == exact_cost(cost, 40)


def test_assignment_of_distances_at_the_size_of_a_layer() -> None:
    generator = torch.Generator().manual_seed(3)
    points = torch.nn.functional.normalize(torch.randn(1536, 64, generator=generator))
    cost = torch.cdist(points, points[:32]).square()
    labels = balanced_assignment(cost, 48)
    assert total(cost, labels) == pytest.approx(exact_cost(cost, 48), rel=1e-10)


def planted(clusters: int, size: int, width: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(clusters, width, generator=generator) * 10
    truth = torch.arange(clusters).repeat_interleave(size)[torch.randperm(clusters * size, generator=generator)]
    return centres[truth] + 0.1 * torch.randn(clusters * size, width, generator=generator), truth


@pytest.mark.parametrize(("clusters", "size"), [(2, 50), (8, 16), (24, 32)])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_planted_clusters_are_recovered(clusters: int, size: int, offset: float) -> None:
    points, truth = planted(clusters, size, 16, seed=clusters)
    result = balanced_kmeans(points + offset, clusters, restarts=4)
    groups = {frozenset(row.tolist()) for row in members(result.labels, clusters)}
    assert groups == {frozenset(torch.nonzero(truth == c).flatten().tolist()) for c in range(clusters)}
    assert result.inertia == pytest.approx(inertia(points + offset, result.labels, clusters), rel=1e-3)


def test_sizes_centroids_and_inertia_agree_with_their_definitions() -> None:
    points = torch.randn(360, 24, generator=torch.Generator().manual_seed(0))
    result = balanced_kmeans(points, 12)
    groups = members(result.labels, 12)
    assert groups.shape == (12, 30)
    assert sorted(groups.flatten().tolist()) == list(range(360))
    assert (groups.diff(dim=1) > 0).all()
    torch.testing.assert_close(result.centroids, points[groups].mean(1))
    assert result.inertia == pytest.approx(inertia(points, result.labels, 12), rel=1e-6)


def test_inertia_never_rises_with_iterations_or_restarts() -> None:
    points = torch.randn(480, 20, generator=torch.Generator().manual_seed(1)).double()
    by_iteration = [balanced_kmeans(points, 16, iterations=n).inertia for n in range(1, 12)]
    assert all(after <= before * (1 + 1e-12) for before, after in pairwise(by_iteration))
    assert by_iteration[-1] < by_iteration[0]
    by_restart = [balanced_kmeans(points, 16, restarts=n).inertia for n in range(1, 5)]
    assert by_restart == sorted(by_restart, reverse=True)


def test_a_fixed_point_of_lloyd_is_reached() -> None:
    points = torch.randn(512, 32, generator=torch.Generator().manual_seed(2)).double()
    result = balanced_kmeans(points, 8, iterations=500)
    cost = torch.cdist(points, result.centroids).square()
    assert result.inertia == pytest.approx(exact_cost(cost, 64), rel=1e-9)


@pytest.mark.parametrize("clusters", [4, 10])
def test_no_worse_than_unconstrained_centroids_rounded_to_equal_sizes(clusters: int) -> None:
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        points = torch.randn(320, 64, generator=generator) * torch.logspace(0, -1, 64)
        free = KMeans(clusters, n_init=4, random_state=0).fit(points.numpy())
        cost = torch.cdist(points, torch.from_numpy(free.cluster_centers_)).square()
        rounded = balanced_assignment(cost, 320 // clusters)
        assert balanced_kmeans(points, clusters, restarts=4).inertia < inertia(points, rounded, clusters)


def test_hardly_a_pair_of_points_would_rather_swap() -> None:
    points = torch.randn(240, 48, generator=torch.Generator().manual_seed(4)).double()
    result = balanced_kmeans(points, 8, iterations=500)
    labels = result.labels
    sums = torch.zeros(8, 48).double().index_add_(0, labels, points)
    along = points @ sums.T  # x_i . S_c
    own = along.gather(1, labels[:, None])
    move = along[:, labels] - own  # gain of i going to the cluster of j
    gain = 2 * (move + move.T) + 2 * torch.cdist(points, points).square()
    gain[labels[:, None] == labels] = 0
    # The steps leave out -4 x_i.x_j of the gain, so a few swaps may be left, of little worth.
    assert int((gain > 0).sum()) <= 8
    assert float(gain.max()) / 30 < 5e-4 * result.inertia


def test_same_seed_same_result_and_input_is_left_alone() -> None:
    points = torch.randn(256, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float32)
    before = points.clone()
    first, again = (balanced_kmeans(points.requires_grad_(), 8, seed=7) for _ in range(2))
    assert torch.equal(first.labels, again.labels)
    assert torch.equal(first.centroids, again.centroids)
    assert not first.centroids.requires_grad
    assert first.labels.dtype == torch.int64
    assert torch.equal(points.detach(), before)
    assert not torch.equal(first.labels, balanced_kmeans(points, 8, seed=8).labels)


def test_fewer_distinct_points_than_clusters() -> None:
    points = torch.eye(3).repeat(40, 1)
    result = balanced_kmeans(points, 6)
    assert torch.bincount(result.labels).tolist() == [20] * 6
    assert result.inertia == pytest.approx(0, abs=1e-9)


def test_half_precision_points_are_clustered_as_their_float32_values() -> None:
    points = torch.randn(128, 8, generator=torch.Generator().manual_seed(6)).bfloat16()
    half, full = balanced_kmeans(points, 4), balanced_kmeans(points.float(), 4)
    assert torch.equal(half.labels, full.labels)
    assert half.centroids.dtype == torch.float32


def test_what_cannot_be_clustered_is_refused() -> None:
    with pytest.raises(NumericsError, match=r"10 points cannot be split into 4 clusters.*divide 10: 1, 2, 5, 10"):
        balanced_kmeans(torch.zeros(10, 2), 4)
    with pytest.raises(NumericsError, match="1 of 8 entries are NaN"):
        balanced_kmeans(torch.tensor([[0.0, 1], [2, 3], [4, float("nan")], [6, 7]]), 2)
    with pytest.raises(NumericsError, match=r"points must be \[N, D\]"):
        balanced_kmeans(torch.zeros(8), 2)
    with pytest.raises(NumericsError, match="iterations=0"):
        balanced_kmeans(torch.zeros(8, 1), 2, iterations=0)
    with pytest.raises(NumericsError, match="capacity = 3"):
        balanced_assignment(torch.zeros(8, 2), 3)
    with pytest.raises(NumericsError, match="infinite"):
        balanced_assignment(torch.full((8, 2), float("inf")), 4)
    with pytest.raises(NumericsError, match=r"sizes are \[3, 1\]"):
        members(torch.tensor([0, 0, 0, 1]), 2)
    with pytest.raises(NumericsError, match=r"span \[0, 2\]"):
        members(torch.tensor([0, 0, 2, 2]), 2)
