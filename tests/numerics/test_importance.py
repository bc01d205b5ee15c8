"""Splits by importance against plain NumPy and exhaustive restatements."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from surgeon.numerics import NumericsError, cluster_importance, shared_neurons, split_disjoint, split_overlapping


def importance(clusters: int, neurons: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(clusters, neurons, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_means_over_clusters() -> None:
    generator = torch.Generator().manual_seed(0)
    values, labels = torch.rand(50, 7, generator=generator), torch.randint(0, 3, (50,), generator=generator)
    found = cluster_importance(values, labels, 4).numpy()
    for c in range(3):
        np.testing.assert_allclose(found[c], values.numpy()[labels.numpy() == c].mean(0), rtol=1e-6)
    assert not found[3].any()


def greedy(v: np.ndarray, size: int) -> float:
    """LLaMA-MoE's disjoint split: the greatest importance that is left, while its expert has room."""
    room, free, total = [size] * v.shape[0], set(range(v.shape[1])), 0.0
    for position in np.argsort(-v, axis=None):
        c, i = np.unravel_index(position, v.shape)
        if room[c] and i in free:
            room[c] -= 1
            free.remove(i)
            total += v[c, i]
    return total


@pytest.mark.parametrize("seed", range(4))
def test_disjoint_split_keeps_at_least_what_greedy_keeps(seed: int) -> None:
    v = importance(4, 24, seed)
    parts = split_disjoint(v, 6)
    assert sorted(parts.flatten().tolist()) == list(range(24))
    assert float(v.gather(1, parts).sum()) >= greedy(v.numpy(), 6) - 1e-12


def test_overlapping_split_takes_the_largest() -> None:
    v = importance(3, 20)
    for row, found in zip(v.numpy(), split_overlapping(v, 7).tolist(), strict=True):
        assert found == sorted(np.argsort(-row)[:7].tolist())


def inter(v: np.ndarray, size: int, count: int) -> list[int]:
    """SharingInter in plain Python: name, vote, take those with most votes, again."""
    left, shared = set(range(v.shape[1])), []
    while len(shared) < count:
        votes = dict.fromkeys(left, 0)
        for row in v:
            for neuron in sorted(left, key=lambda i: -row[i])[:size]:
                votes[neuron] += 1
        most = [i for i in left if votes[i] == max(votes.values())]
        for neuron in sorted(most, key=lambda i: -v[:, i].sum())[: count - len(shared)]:
            shared.append(neuron)
            left.remove(neuron)
    return sorted(shared)


@pytest.mark.parametrize(("size", "count"), [(5, 0), (5, 5), (8, 16), (3, 30)])
def test_shared_neurons_are_those_of_the_paper(size: int, count: int) -> None:
    v = importance(6, 30)
    assert shared_neurons(v, size, count).tolist() == inter(v.numpy(), size, count)


def test_refusals() -> None:
    with pytest.raises(NumericsError, match="need 20 neurons, got 24"):
        split_disjoint(importance(4, 24), 5)
    with pytest.raises(NumericsError, match="31 of 30"):
        shared_neurons(importance(2, 30), 3, 31)
    with pytest.raises(NumericsError, match="experts of 31"):
        split_overlapping(importance(2, 30), 31)
