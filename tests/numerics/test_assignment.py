"""Neuron alignment against the permutation that was applied, and against all permutations."""

from itertools import permutations

import pytest
import torch

from surgeon.numerics import NumericsError, align_neurons


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_permutation_is_recovered_exactly(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(200, 48, generator=generator).to(dtype)
    shuffle = torch.randperm(200, generator=generator)
    order = align_neurons(reference, reference[shuffle])
    assert torch.equal(reference[shuffle][order], reference)
    assert torch.equal(order, shuffle.argsort())


def test_a_permutation_is_recovered_under_noise() -> None:
    generator = torch.Generator().manual_seed(1)
    reference = torch.randn(128, 96, generator=generator)
    shuffle = torch.randperm(128, generator=generator)
    noisy = reference[shuffle] + 0.3 * torch.randn(128, 96, generator=generator)
    assert torch.equal(align_neurons(reference, noisy), shuffle.argsort())


def test_best_of_all_permutations_and_closest_in_frobenius_norm() -> None:
    generator = torch.Generator().manual_seed(2)
    reference, other = torch.randn(2, 6, 4, generator=generator, dtype=torch.float64)
    order = align_neurons(reference, other)
    every = [list(p) for p in permutations(range(6))]
    assert (reference * other[order]).sum() == max((reference * other[p]).sum() for p in every)
    assert (reference - other[order]).norm() == min((reference - other[p]).norm() for p in every)


def test_what_cannot_be_aligned_is_refused() -> None:
    with pytest.raises(NumericsError, match=r"\[4, 2\] and \[4, 3\]"):
        align_neurons(torch.zeros(4, 2), torch.zeros(4, 3))
    with pytest.raises(NumericsError, match="other: 8 of 8"):
        align_neurons(torch.zeros(4, 2), torch.full((4, 2), float("nan")))
