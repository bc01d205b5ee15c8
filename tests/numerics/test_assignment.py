"""Neuron alignment against the permutation that was applied, and against all permutations."""

from itertools import permutations

import pytest
import torch

from surgeon.numerics import NumericsError, best_assignment


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_permutation_is_recovered_exactly(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(200, 48, generator=generator).to(dtype)
    shuffle = torch.randperm(200, generator=generator)
    order = best_assignment(reference @ reference[shuffle].T)
    assert torch.equal(reference[shuffle][order], reference)
    assert torch.equal(order, shuffle.argsort())


def test_a_permutation_is_recovered_under_noise() -> None:
    generator = torch.Generator().manual_seed(1)
    reference = torch.randn(128, 96, generator=generator)
    shuffle = torch.randperm(128, generator=generator)
    noisy = reference[shuffle] + 0.3 * torch.randn(128, 96, generator=generator)
    assert torch.equal(best_assignment(reference @ noisy.T), shuffle.argsort())


def test_best_of_all_permutations_and_closest_in_frobenius_norm() -> None:
    generator = torch.Generator().manual_seed(2)
    reference, other = torch.randn(2, 6, 4, generator=generator, dtype=torch.float64)
    order = best_assignment(reference @ other.T)
    every = [list(p) for p in permutations(range(6))]
    assert (reference * other[order]).sum() == max((reference * other[p]).sum() for p in every)
    assert (reference - other[order]).norm() == min((reference - other[p]).norm() for p in every)


def test_what_cannot_be_aligned_is_refused() -> None:
    with pytest.raises(NumericsError, match=r"square matrix, got \[4, 3\]"):
        best_assignment(torch.zeros(4, 3))
    with pytest.raises(NumericsError, match="similarity: 16 of 16"):
        best_assignment(torch.full((4, 4), float("nan")))
