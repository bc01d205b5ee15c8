"""Compensated rounding against the definition of optimal brain surgery, written down plainly."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from surgeon.numerics import (
    SEARCH,
    WHOLE_RANGE,
    Levels,
    NumericsError,
    QuantizedTensor,
    quantize_compensated,
    quantize_float8,
    quantize_groupwise,
)

DAMP = 0.01


def inputs(tokens: int, features: int, seed: int = 0) -> Tensor:
    """Correlated inputs [tokens, features] of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(features, features, generator=generator, dtype=torch.float64)
    size = torch.linspace(0.1, 3, features, dtype=torch.float64)[torch.randperm(features, generator=generator)]
    return torch.randn(tokens, features, generator=generator, dtype=torch.float64) @ (mixing * size)


def matrix(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def lost(codes: QuantizedTensor, weight: Tensor, x: Tensor) -> float:
    """Relative error of the outputs."""
    return float(((codes.dequantize() - weight) @ x.T).norm() / (weight @ x.T).norm())


def one_after_the_other(weight: Tensor, moment: Tensor, codes: QuantizedTensor, levels: Levels) -> Tensor:
    """Optimal brain surgery with the scales of ``codes``: round one column, move all that are left to the best place.

    The inverse over the columns that are left is made anew each time, by no update formula.
    """
    damped = moment + DAMP * moment.diagonal().mean() * torch.eye(len(moment), dtype=torch.float64)
    order = moment.diagonal().argsort(descending=True, stable=True).tolist()
    left, out = weight.clone(), torch.zeros_like(weight)
    for position, column in enumerate(order):
        group = column // codes.group
        scale = codes.scale[:, group]
        zero = None if codes.zero_point is None else codes.zero_point[:, group].double()
        out[:, column] = levels.value(levels.nearest(left[:, column], scale, zero), scale, zero)
        rest = order[position + 1 :]
        if rest:
            here = order[position:]
            inverse = torch.linalg.inv(damped[here][:, here])
            error = (left[:, column] - out[:, column]) / inverse[0, 0]
            left[:, rest] -= error[:, None] * inverse[0, 1:]
    return out


@pytest.mark.parametrize(("symmetric", "group", "bits"), [(True, 8, 4), (False, 8, 4), (True, -1, 8), (False, 16, 2)])
def test_it_is_optimal_brain_surgery(symmetric: bool, group: int, bits: int) -> None:
    weight, x = matrix(12, 40), inputs(200, 40)
    levels = Levels(bits, symmetric)
    codes = quantize_compensated(weight, x.T @ x, levels=levels, group=group, damp=DAMP)
    torch.testing.assert_close(codes.dequantize(), one_after_the_other(weight, x.T @ x, codes, levels))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("shrink", [SEARCH, WHOLE_RANGE])
def test_inputs_that_do_not_depend_on_each_other_leave_rounding_to_the_nearest(
    symmetric: bool, shrink: tuple[float, ...]
) -> None:
    weight = matrix(20, 72)
    eye = torch.eye(72, dtype=torch.float64)
    codes = quantize_compensated(weight, eye, levels=Levels(4, symmetric), group=16, shrink=shrink)
    nearest = quantize_groupwise(weight, bits=4, group=16, symmetric=symmetric, shrink=shrink)
    assert torch.equal(codes.packed, nearest.packed)
    assert torch.equal(codes.scale, nearest.scale)
    assert symmetric or torch.equal(codes.zero_point, nearest.zero_point)


@pytest.mark.parametrize("levels", [Levels(4), Levels(4, symmetric=False), Levels(8), Levels(8, float8=True)])
def test_outputs_lose_less_than_by_rounding_to_the_nearest(levels: Levels) -> None:
    weight, x = matrix(48, 100), inputs(1000, 100)
    codes = quantize_compensated(weight, x.T @ x, levels=levels, group=32)
    if levels.float8:
        nearest = quantize_float8(weight, group=32)
    else:
        nearest = quantize_groupwise(weight, bits=levels.bits, group=32, symmetric=levels.symmetric, shrink=SEARCH)
    assert codes.packed.shape == nearest.packed.shape
    assert codes.dequantize().shape == weight.shape
    fresh = inputs(1000, 100)
    assert lost(codes, weight, fresh) < 0.8 * lost(nearest, weight, fresh)


def test_equal_inputs_make_up_for_each_other() -> None:
    """Of two inputs that are always equal only the sum of the weights counts: the second takes what the first rounds off."""
    moment = torch.eye(16, dtype=torch.float64)
    moment[3, 9] = moment[9, 3] = 1
    weight = matrix(200, 16)
    weight[:, [3, 9]] *= 0.3  # far from the ends of the range
    codes = quantize_compensated(weight, moment, levels=Levels(4), group=16, damp=1e-9)
    step = codes.scale[:, 0].abs()

    def error_of_the_sum(found: Tensor) -> Tensor:
        return (found - weight)[:, [3, 9]].sum(1).abs() / step

    assert float(error_of_the_sum(codes.dequantize()).max()) <= 0.5 + 1e-5
    nearest = Levels(4).value(Levels(4).nearest(weight, codes.scale, None), codes.scale, None)
    assert float(error_of_the_sum(nearest).max()) > 0.8


def test_inputs_that_are_always_zero_are_rounded_to_the_nearest_and_change_nothing() -> None:
    x = inputs(300, 32)
    x[:, 5] = 0
    weight = matrix(10, 32)
    codes = quantize_compensated(weight, x.T @ x, levels=Levels(4), group=16, shrink=WHOLE_RANGE)
    step = codes.scale[:, 0].abs()
    assert bool(((codes.dequantize()[:, 5] - weight[:, 5]).abs() <= step).all())
    alive = [column for column in range(16) if column != 5]
    silent = x.clone()
    silent[:, 5] = 1e-12
    again = quantize_compensated(weight, silent.T @ silent, levels=Levels(4), group=16, shrink=WHOLE_RANGE)
    torch.testing.assert_close(codes.dequantize()[:, alive], again.dequantize()[:, alive])
    never = quantize_compensated(weight, torch.zeros(32, 32), levels=Levels(4), group=16, shrink=WHOLE_RANGE)
    assert torch.equal(never.packed, quantize_groupwise(weight, bits=4, group=16, symmetric=True).packed)


@pytest.mark.parametrize(
    "levels", [Levels(4), Levels(4, symmetric=False), Levels(2, symmetric=False), Levels(8), Levels(8, float8=True)]
)
def test_zeros_stay_zeros_and_the_others_make_up_for_them(levels: Levels) -> None:
    weight, x = matrix(20, 70), inputs(400, 70)
    weight[torch.rand(weight.shape, generator=torch.Generator().manual_seed(5)) < 0.5] = 0
    found = quantize_compensated(weight, x.T @ x, levels=levels, group=32).dequantize()
    assert not bool(found[weight == 0].any())
    assert int((found != 0).sum()) > 0.2 * found.numel()
    if levels.float8:
        nearest = quantize_float8(weight, group=32)
    else:
        nearest = quantize_groupwise(weight, bits=levels.bits, group=32, symmetric=levels.symmetric, shrink=SEARCH)
    assert not bool(nearest.dequantize()[weight == 0].any())
    lost = [float(((each - weight) @ x.T).norm()) for each in (found, nearest.dequantize())]
    assert lost[0] < lost[1]


@pytest.mark.parametrize("levels", [Levels(4, symmetric=False), Levels(8, float8=True)])
def test_matrices_side_by_side_are_as_each_alone(levels: Levels) -> None:
    weight = matrix(2, 2, 12, 24).float()
    rows = torch.stack([inputs(50, 24, seed) for seed in range(4)]).reshape(2, 2, 50, 24)
    moments = rows.transpose(-1, -2) @ rows
    codes = quantize_compensated(weight, moments, levels=levels, group=8)
    for row in range(2):
        for column in range(2):
            alone = quantize_compensated(weight[row, column], moments[row, column], levels=levels, group=8)
            torch.testing.assert_close(codes.dequantize()[row, column], alone.dequantize())


def test_few_tokens_and_halves_work() -> None:
    weight, x = matrix(8, 64).bfloat16(), inputs(3, 64)
    codes = quantize_compensated(weight, x.T @ x, levels=Levels(4), group=32)
    assert codes.scale.dtype == torch.bfloat16
    value = codes.dequantize()
    assert bool(torch.isfinite(value).all())
    assert float((value - weight).abs().max()) < 1.5 * float(weight.abs().max())


def test_what_does_not_fit_is_refused() -> None:
    weight, eye = matrix(4, 8), torch.eye(8)
    with pytest.raises(NumericsError, match=r"second_moment has shape \[7, 7\]"):
        quantize_compensated(weight, torch.eye(7), levels=Levels(4), group=8)
    with pytest.raises(NumericsError, match="damp = 0, needed above 0"):
        quantize_compensated(weight, eye, levels=Levels(4), group=8, damp=0)
    with pytest.raises(NumericsError, match="group = 3, needed -1 or a positive multiple of 2"):
        quantize_compensated(weight, eye, levels=Levels(4), group=3)
    with pytest.raises(NumericsError, match="second_moment"):
        quantize_compensated(weight, eye * float("nan"), levels=Levels(4), group=8)
    with pytest.raises(NumericsError, match="no Cholesky factor"):
        quantize_compensated(weight, torch.ones(8, 8) * -1 + 1.5 * eye, levels=Levels(4), group=8)
    with pytest.raises(NumericsError, match="floating"):
        quantize_compensated(weight.int(), eye, levels=Levels(4), group=8)
