"""Choosing zeros and making up for them, against SparseGPT's definition written down plainly."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from surgeon.numerics import NumericsError, Zeros, least, sparsify_compensated
from tests.numerics.test_compensation import DAMP, inputs, matrix

TWO_OF_FOUR = Zeros.semi_structured(2, 4)
ALL = [Zeros(0.5), Zeros(0.3), TWO_OF_FOUR, Zeros.semi_structured(4, 8), Zeros.semi_structured(3, 5)]


def one_after_the_other(weight: Tensor, moment: Tensor, zeros: Zeros) -> Tensor:
    """Optimal brain surgery: a column's zeros are set, and all columns behind it move to the best place.

    The inverse over the columns that are left is made anew each time, by no update formula.
    """
    count = weight.shape[1]
    damped = moment + DAMP * moment.diagonal().mean() * torch.eye(count, dtype=torch.float64)
    inverses = [torch.linalg.inv(damped[column:, column:]) for column in range(count)]
    left, goes = weight.clone(), torch.zeros_like(weight, dtype=torch.bool)
    run = zeros.of or 128
    for column in range(count):
        if column % run == 0:
            some = range(column, min(column + run, count))
            price = torch.stack([left[:, j] ** 2 / inverses[j][0, 0] for j in some], 1)
            rows = price if zeros.of else price.reshape(1, -1)
            number = zeros.of - zeros.kept if zeros.of and zeros.kept else round(zeros.share * price.numel())
            order = rows.argsort(1)[:, :number]
            goes[:, some] = torch.zeros_like(rows, dtype=torch.bool).scatter(1, order, True).reshape(price.shape)
        lost = torch.where(goes[:, column], left[:, column], 0.0)
        left[:, column:] -= (lost / inverses[column][0, 0])[:, None] * inverses[column][0]
        left[:, column] = torch.where(goes[:, column], 0.0, left[:, column])
    return left


@pytest.mark.parametrize("zeros", ALL)
def test_it_is_optimal_brain_surgery(zeros: Zeros) -> None:
    weight, x = matrix(10, 160), inputs(400, 160)
    found = sparsify_compensated(weight, x.T @ x, zeros, damp=DAMP)
    stored = weight.T.contiguous()  # the other way round in memory, and nothing writes there
    torch.testing.assert_close(sparsify_compensated(stored.T, x.T @ x, zeros, damp=DAMP), found)
    assert torch.equal(stored, weight.T)
    torch.testing.assert_close(found, one_after_the_other(weight, x.T @ x, zeros))
    assert int((found == 0).sum()) == zeros.reached(weight)


@pytest.mark.parametrize(
    ("zeros", "dtype"), [*((zeros, torch.float32) for zeros in ALL), (TWO_OF_FOUR, torch.bfloat16)]
)
def test_inputs_that_do_not_depend_on_each_other_leave_magnitudes(zeros: Zeros, dtype: torch.dtype) -> None:
    weight = matrix(9, 120).to(dtype)
    found = sparsify_compensated(weight, 3 * torch.eye(120), zeros)
    assert torch.equal(found, weight.masked_fill(least(weight.abs().float(), weight, zeros), 0))


@pytest.mark.parametrize("zeros", [*ALL, Zeros(0.3, rows=True)])
def test_the_lowest_among_those_that_compete_go(zeros: Zeros) -> None:
    weight, score = matrix(7, 80), matrix(7, 80, seed=2).abs()
    goes = least(score, weight, zeros)
    for own, ranks in zip(zeros.runs(goes), zeros.runs(score), strict=True):
        assert int(own.sum()) == zeros.number(len(own))
        assert float(ranks[own].max()) < float(ranks[~own].min())
    assert int(goes.sum()) == zeros.reached(weight)
    assert zeros.reached(weight) == pytest.approx(zeros.share * weight.numel(), abs=7)


def test_shares_are_what_they_are_in_decimals_and_among_equals_the_first_go() -> None:
    weight = torch.ones(1, 10)
    assert int(0.29 * 100) == 28  # what a binary 0.29 would give
    assert Zeros(0.29).number(100) == 29
    assert least(weight, weight, Zeros(0.3)).tolist() == [[True] * 3 + [False] * 7]
    assert not bool(least(weight, weight, Zeros(0.0)).any())


@pytest.mark.parametrize("zeros", ALL)
def test_what_is_sparse_enough_comes_back_to_the_last_bit(zeros: Zeros) -> None:
    weight, x = matrix(3, 12, 160).float(), torch.stack([inputs(300, 160, seed) for seed in range(3)])
    moments = x.transpose(1, 2) @ x
    once = sparsify_compensated(weight, moments, zeros)
    assert torch.equal(sparsify_compensated(once, moments.flip(0), zeros), once)  # on other inputs too
    assert torch.equal(sparsify_compensated(weight, moments, Zeros(0.0)), weight)
    uneven = once.clone()
    uneven[:, :, :40] = 0  # more zeros than asked, and not in all runs alike
    assert torch.equal(sparsify_compensated(uneven, moments, Zeros(0.25)), uneven)


def test_zeros_that_there_are_stay_and_count() -> None:
    weight, x = matrix(12, 300), inputs(500, 300)
    weight[:, :100] = 0
    for zeros in (Zeros(0.5), TWO_OF_FOUR):
        found = sparsify_compensated(weight, x.T @ x, zeros)
        assert not bool(found[:, :100].any())
        assert int((found == 0).sum()) == zeros.reached(weight)
    assert Zeros(0.5).reached(weight) == 1800
    assert TWO_OF_FOUR.reached(weight) == 12 * (100 + 100)
    share = [(sparsify_compensated(weight, x.T @ x, Zeros(0.5))[:, part] == 0).double().mean() for part in
             (slice(100, 128), slice(128, 256), slice(256, 300))]  # fmt: skip
    assert share == pytest.approx([0.25] * 3, abs=2e-3)  # of what was left, the same in every run


def test_outputs_lose_less_than_by_setting_to_zero_alone() -> None:
    weight, cause = matrix(48, 100), matrix(40, 100, seed=3)
    x, fresh = (inputs(1000, 40)[rows] @ cause for rows in (slice(500), slice(500, None)))
    for zeros in (Zeros(0.5), TWO_OF_FOUR):
        found = sparsify_compensated(weight, x.T @ x, zeros)
        wanda = weight.masked_fill(least(weight.abs() * x.norm(dim=0), weight, zeros), 0)
        lost = [float(((w - weight) @ fresh.T).norm()) for w in (found, wanda)]
        assert lost[0] < 0.6 * lost[1]


def test_equal_inputs_make_up_for_each_other() -> None:
    """Of two inputs that are always equal only the sum of the weights counts: where the first goes, the second takes it."""
    moment = torch.eye(16, dtype=torch.float64)
    moment[3, 9] = moment[9, 3] = 1
    weight = matrix(50, 16).abs() + 1
    weight[:, 3] = 0.1
    found = sparsify_compensated(weight, moment, Zeros(1 / 16), damp=1e-9)
    assert not bool(found[:, 3].any())
    torch.testing.assert_close(found[:, 9], weight[:, 3] + weight[:, 9])


def test_inputs_that_are_always_zero_cost_nothing() -> None:
    x = inputs(300, 32)
    x[:, 5] = 0
    weight = matrix(10, 32)
    weight[:, 5] = 100
    found = sparsify_compensated(weight, x.T @ x, Zeros(1 / 32))
    assert torch.equal(found, weight.index_fill(1, torch.tensor([5]), 0))
    never = sparsify_compensated(weight, torch.zeros(32, 32), Zeros(0.5))
    assert torch.equal(never, weight.masked_fill(least(weight.abs(), weight, Zeros(0.5)), 0))


@pytest.mark.parametrize("zeros", ALL[:3])
def test_matrices_side_by_side_are_as_each_alone(zeros: Zeros) -> None:
    weight = matrix(2, 2, 12, 24).float()
    rows = torch.stack([inputs(50, 24, seed) for seed in range(4)]).reshape(2, 2, 50, 24)
    moments = rows.transpose(-1, -2) @ rows
    found = sparsify_compensated(weight, moments, zeros)
    for row in range(2):
        for column in range(2):
            alone = sparsify_compensated(weight[row, column], moments[row, column], zeros)
            torch.testing.assert_close(found[row, column], alone)


def test_what_does_not_fit_is_refused() -> None:
    weight, eye = matrix(4, 10), torch.eye(10)
    with pytest.raises(NumericsError, match="rows of 10 weights are no whole number of groups of 4"):
        sparsify_compensated(weight, eye, TWO_OF_FOUR)
    with pytest.raises(NumericsError, match="rows of 10 weights are no whole number of groups of 4"):
        least(weight.abs(), weight, TWO_OF_FOUR)
    with pytest.raises(NumericsError, match=r"second_moment has shape \[7, 7\]"):
        sparsify_compensated(weight, torch.eye(7), Zeros(0.5))
    with pytest.raises(NumericsError, match="damp = 0, needed above 0"):
        sparsify_compensated(weight, eye, Zeros(0.5), damp=0)
    with pytest.raises(NumericsError, match="no Cholesky factor"):
        sparsify_compensated(weight, 1.5 * eye - 1, Zeros(0.5))
    with pytest.raises(NumericsError, match="score"):
        least(weight.abs() * float("nan"), weight, Zeros(0.5))
