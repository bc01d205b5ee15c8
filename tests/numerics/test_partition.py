"""Partitions against planted ones, networkx's own cut and its Kernighan-Lin."""

from __future__ import annotations

import networkx as nx
import numpy as np
import pytest
import torch

from surgeon.numerics import NumericsError, coactivation_graph, inside_weight, partition_graph


def groups_active_together(groups: int, size: int, tokens: int = 400) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations [T, groups size] in shuffled order, and the group of each neuron."""
    generator = torch.Generator().manual_seed(0)
    on = torch.rand(tokens, groups, generator=generator) < 0.3
    label = torch.arange(groups).repeat_interleave(size)[torch.randperm(groups * size, generator=generator)]
    noise = torch.rand(tokens, groups * size, generator=generator)
    return on[:, label] * (0.5 + noise) + 0.1 * noise, label


def test_edges_are_cosines_of_the_activations() -> None:
    activations, _ = groups_active_together(3, 4)
    graph = coactivation_graph(-activations, neighbours=12)
    unit = activations.numpy() / np.linalg.norm(activations.numpy(), axis=0)
    for i, j, weight in graph.edges(data="weight"):
        assert weight == pytest.approx(float(unit[:, i] @ unit[:, j]), rel=1e-5)
    assert graph.number_of_edges() == 12 * 11 // 2


def test_every_node_keeps_its_heaviest_edges() -> None:
    activations, _ = groups_active_together(4, 8)
    full, sparse = (coactivation_graph(activations, neighbours=n) for n in (32, 3))
    for node in full:
        heaviest = sorted(full[node], key=lambda other: -full[node][other]["weight"])[:3]
        assert set(heaviest) <= set(sparse[node])


@pytest.mark.parametrize(("groups", "size"), [(2, 20), (4, 16), (8, 12)])
def test_planted_groups_are_found(groups: int, size: int) -> None:
    activations, label = groups_active_together(groups, size)
    found = partition_graph(coactivation_graph(activations, neighbours=size), groups)
    pairs = torch.stack([label, found], dim=1).unique(dim=0)
    assert pairs.shape[0] == groups


def test_inside_weight_is_what_is_not_cut() -> None:
    graph = nx.gnm_random_graph(40, 300, seed=1)
    rng = np.random.default_rng(0)
    for _, _, data in graph.edges(data=True):
        data["weight"] = float(rng.random())
    labels = partition_graph(graph, 2)
    cut = nx.cut_size(graph, (labels == 0).nonzero().flatten().tolist(), weight="weight")
    total = sum(w for _, _, w in graph.edges(data="weight"))
    assert inside_weight(graph, labels) + cut == pytest.approx(total)
    assert int((labels == 0).sum()) == 20
    reference = min(
        nx.cut_size(graph, nx.community.kernighan_lin_bisection(graph, weight="weight", seed=seed)[0], weight="weight")
        for seed in range(5)
    )
    assert cut <= 1.03 * reference


def test_more_weight_is_inside_than_by_lot() -> None:
    activations, _ = groups_active_together(6, 10)
    noisy = activations + 0.4 * torch.rand(activations.shape, generator=torch.Generator().manual_seed(1))
    graph = coactivation_graph(noisy, neighbours=20)
    found = inside_weight(graph, partition_graph(graph, 6))
    by_lot = [torch.arange(60)[torch.randperm(60, generator=torch.Generator().manual_seed(s))] % 6 for s in range(5)]
    assert found > 1.5 * max(inside_weight(graph, labels) for labels in by_lot)


def test_same_seed_same_parts() -> None:
    activations, _ = groups_active_together(5, 6)
    graph = coactivation_graph(activations)
    assert torch.equal(partition_graph(graph, 5, seed=3), partition_graph(graph, 5, seed=3))


def test_refusals() -> None:
    with pytest.raises(NumericsError, match="10 nodes cannot be cut into 3 parts"):
        partition_graph(nx.complete_graph(10), 3)
    with pytest.raises(NumericsError, match="needed"):
        coactivation_graph(torch.ones(3))
    with pytest.raises(NumericsError, match="NaN"):
        coactivation_graph(torch.full((3, 2), float("nan")))
