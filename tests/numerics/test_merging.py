"""Grouping experts and merging them, against other implementations and identities."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.cluster import AgglomerativeClustering, KMeans

from surgeon.numerics import (
    NumericsError,
    correlations,
    group_at_random,
    group_by_kmeans,
    group_by_leaders,
    group_by_linkage,
    group_by_ward,
    groups_per_layer,
    joint_svd,
    kmeans,
    output_correction,
    zip_neurons,
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def same_partition(first: torch.Tensor, second: np.ndarray) -> bool:
    together = first[:, None] == first
    return np.array_equal(together.numpy(), second[:, None] == second)


@pytest.mark.parametrize("groups", [1, 3, 8, 20])
def test_linkage_is_that_of_scikit_learn(groups: int) -> None:
    points = normal(20, 7)
    labels = group_by_linkage(points @ points.T, groups)
    assert sorted(set(labels.tolist())) == list(range(groups))
    other = AgglomerativeClustering(n_clusters=groups, linkage="average").fit_predict(points.numpy())
    assert same_partition(labels, other)


@pytest.mark.parametrize("groups", [1, 3, 8, 20])
def test_ward_is_that_of_scikit_learn_where_experts_weigh_the_same(groups: int) -> None:
    points = normal(20, 7)
    labels = group_by_ward(points @ points.T, torch.full((20,), 1e6), groups)
    assert sorted(set(labels.tolist())) == list(range(groups))
    other = AgglomerativeClustering(n_clusters=groups, linkage="ward").fit_predict(points.numpy())
    assert same_partition(labels, other)


def test_an_expert_of_twice_the_weight_is_two_experts_to_ward() -> None:
    points, counts = normal(9, 5), torch.tensor([2.0, 1, 1, 2, 1, 2, 1, 1, 2]) * 1e6
    twice = torch.arange(9).repeat_interleave((counts / 1e6).long())
    whole = group_by_ward(points[twice] @ points[twice].T, torch.full((13,), 1e6), 4)
    assert same_partition(group_by_ward(points @ points.T, counts, 4)[twice], whole.numpy())


def test_linkage_of_experts_that_weigh_differently_is_that_of_scikit_learn_on_what_joining_costs() -> None:
    points, counts = normal(9, 4, seed=2), torch.logspace(0, 4, 9, dtype=torch.float64)
    share = counts / counts.sum() + 1e-6
    apart = torch.cdist(points, points) * (share[:, None] * share / (share[:, None] + share)).sqrt()
    differs = 0
    for groups in range(2, 9):
        found = group_by_linkage(points @ points.T, groups, counts)
        other = AgglomerativeClustering(n_clusters=groups, linkage="average", metric="precomputed")
        assert same_partition(found, other.fit_predict(apart.numpy()))
        unweighted = group_by_linkage(points @ points.T, groups)
        differs += not same_partition(found, unweighted.numpy())
        assert torch.equal(group_by_linkage(points @ points.T, groups, torch.ones(9)), unweighted)
    assert differs


def test_kmeans_is_as_good_as_that_of_scikit_learn() -> None:
    points = normal(60, 5) + 4 * normal(6, 5, seed=1).repeat_interleave(10, 0)
    found = kmeans(points, 6, restarts=10)
    other = KMeans(6, n_init=10, random_state=0).fit(points.numpy())
    assert found.inertia <= other.inertia_ * (1 + 1e-9)
    assert same_partition(found.labels, other.labels_)
    assert same_partition(group_by_kmeans(points @ points.T, 6), other.labels_)


def test_weighted_kmeans_is_that_of_scikit_learn() -> None:
    """Clusters that overlap, and weights that differ a hundredfold: other clusters than without them."""
    points, weights = normal(40, 2), torch.logspace(-1, 1, 40, dtype=torch.float64)
    found = kmeans(points, 5, weights=weights, restarts=30)
    other = KMeans(5, n_init=30, random_state=0).fit(points.numpy(), sample_weight=weights.numpy())
    assert found.inertia <= other.inertia_ * (1 + 1e-9)
    assert not same_partition(found.labels, kmeans(points, 5, restarts=30).labels.numpy())
    for cluster in range(5):
        own = found.labels == cluster
        mean = (weights[own, None] * points[own]).sum(0) / weights[own].sum()
        torch.testing.assert_close(found.centroids[cluster], mean)
    assert same_partition(group_by_kmeans(points @ points.T, 5, weights, restarts=30), found.labels.numpy())
    for wrong in (torch.ones(39), torch.zeros(40)):
        with pytest.raises(NumericsError, match="needed \\[N\\] above 0"):
            kmeans(points, 5, weights=wrong)


@pytest.mark.parametrize("clusters", [5, 7, 9])
def test_no_cluster_is_empty_even_among_copies(clusters: int) -> None:
    points = normal(3, 4).repeat(3, 1)
    found = kmeans(points, clusters, seed=3)
    assert len(set(found.labels.tolist())) == clusters
    assert found.inertia == pytest.approx(0, abs=1e-20)
    assert len(set(group_by_linkage(points @ points.T, clusters).tolist())) == clusters
    assert len(set(group_by_leaders(points @ points.T, torch.ones(9), clusters).tolist())) == clusters


@pytest.mark.parametrize(
    "group",
    [
        group_by_linkage,
        group_by_kmeans,
        lambda g, k: group_by_leaders(g, torch.arange(6.0), k),
        lambda g, k: group_by_ward(g, torch.arange(6.0), k),
    ],
)
def test_copies_find_each_other(group: object) -> None:
    points = normal(3, 50)[[0, 1, 2, 2, 0, 1]]
    labels = group(points @ points.T, 3)  # type: ignore[operator]  # one of four functions
    assert labels[0] == labels[4]
    assert labels[1] == labels[5]
    assert labels[2] == labels[3]


def test_a_lot_fills_every_group() -> None:
    for seed in range(20):
        labels = group_at_random(9, 4, torch.Generator().manual_seed(seed))
        assert set(labels.tolist()) == {0, 1, 2, 3}
    with pytest.raises(NumericsError, match="10 groups of 9"):
        group_at_random(9, 10, torch.Generator())


def test_a_shared_budget_goes_where_experts_are_used() -> None:
    counts = [torch.tensor([97.0, 1, 1, 1]), torch.tensor([25.0, 25, 25, 25]), torch.tensor([40.0, 40, 20, 0])]
    assert groups_per_layer(counts, 6, [1, 1, 1]) == [1, 3, 2]
    assert groups_per_layer(counts, 7, [2, 1, 1]) == [2, 3, 2]
    with pytest.raises(NumericsError, match="need 6 at least"):
        groups_per_layer(counts, 5, [2, 2, 2])


@pytest.mark.parametrize(("rows", "columns"), [(12, 5), (5, 12), (40, 6)])
def test_the_joint_factor_is_the_published_formula(rows: int, columns: int) -> None:
    stack, weights = normal(3, rows, columns), torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    for rank in (2, min(rows, columns), rows):
        u, s, vt = np.linalg.svd(np.concatenate(list(stack.numpy()), axis=1), full_matrices=False)
        parts = np.split(vt[:rank], 3, axis=1)
        wanted = (u[:, :rank] * s[:rank]) @ sum(a * part for a, part in zip(weights.numpy(), parts, strict=True))
        np.testing.assert_allclose(joint_svd(stack, weights, rank).numpy(), wanted, atol=1e-8)
    copies = stack[:1].repeat(3, 1, 1)
    np.testing.assert_allclose(joint_svd(copies, weights, min(rows, columns)).numpy(), stack[0].numpy(), atol=1e-7)


def test_zipped_neurons_are_those_of_the_two_matrices() -> None:
    """Against ZipIt's merge matrix M and unmerge matrix U, written out."""
    inputs, outputs = normal(3, 6, 4), normal(3, 6, 5, seed=1)
    homes = torch.stack([torch.arange(6), torch.tensor([0, 0, 2, 2, 2, 5]), torch.tensor([5, 4, 3, 2, 1, 0])])
    weights = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    member = torch.nn.functional.one_hot(homes, 6).double() * weights[:, None, None]  # [n, i, j]
    merge = member / member.sum((0, 1))
    wanted = torch.einsum("nij,nif->jf", merge, inputs), torch.einsum("nij,nig->jg", member, outputs)
    found = zip_neurons(zip(homes, inputs, outputs, strict=True), weights)
    for mine, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, other)
    alone = zip_neurons(zip(homes, inputs, outputs, strict=True), torch.tensor([0.0, 1.0, 0.0]))
    torch.testing.assert_close(alone[0][1], inputs[0, 1])
    assert not alone[1][1].any()


def test_correlations_are_those_of_numpy() -> None:
    first, second = normal(50, 4), normal(50, 4, seed=1)
    wanted = np.corrcoef(first.numpy().T, second.numpy().T)[:4, 4:]
    np.testing.assert_allclose(correlations(first, second).numpy(), wanted, atol=1e-12)
    first[:, 2] = 3.0
    assert not correlations(first, second)[2].abs().max() > 1e-6


def test_a_correction_is_least_squares_and_leaves_what_is_right() -> None:
    hidden, matrix = normal(200, 6), normal(3, 6, seed=1)
    np.testing.assert_allclose(output_correction(hidden, hidden @ matrix.T, 1e-9).numpy(), matrix.numpy(), atol=1e-6)
    assert not output_correction(hidden, torch.zeros(200, 3), 1e-2).any()
    assert not output_correction(torch.zeros(5, 6), normal(5, 3), 1e-2).any()
    few = output_correction(hidden[:2], hidden[:2] @ matrix.T, 1e-2)  # fewer tokens than neurons: the least change
    assert few.norm() < matrix.norm()
    ridge = 1e-2 * float((hidden**2).sum(0).mean())
    wanted = np.linalg.solve(hidden.T.numpy() @ hidden.numpy() + ridge * np.eye(6), hidden.T.numpy() @ hidden.numpy())
    np.testing.assert_allclose(output_correction(hidden, hidden, 1e-2).numpy(), wanted.T, atol=1e-12)
