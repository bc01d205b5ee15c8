"""One choice for each part under a budget: the best one, against all that there are."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from surgeon.numerics import NumericsError, cheapest_choices


@pytest.mark.parametrize("seed", range(12))
def test_it_is_as_cheap_as_the_best_of_all(seed: int) -> None:
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 5, 6)
    sizes = [rng.integers(0, 60, count).tolist() for count in counts]
    costs = [rng.normal(size=count).tolist() for count in counts]
    least, most = (sum(end(part) for part in sizes) for end in (min, max))
    budget = int(rng.integers(least, most + 1))

    def total(values: list[list[float]], taken: tuple[int, ...] | list[int]) -> float:
        return sum(part[choice] for part, choice in zip(values, taken, strict=True))

    found = cheapest_choices(costs, sizes, budget)
    allowed = (each for each in itertools.product(*map(range, counts)) if total(sizes, each) <= budget)
    assert total(sizes, found) <= budget
    assert total(costs, found) == pytest.approx(min(total(costs, each) for each in allowed), abs=1e-5)


def test_equal_parts_with_falling_gains_take_the_same() -> None:
    """Where each further bit gains less than the one before, a budget for one choice everywhere is spent on that."""
    for choice in range(3):
        assert cheapest_choices([[1.0, 0.1, 0.01]] * 9, [[2, 4, 8]] * 9, 9 * [2, 4, 8][choice]) == [choice] * 9


def test_great_sizes_and_tiny_costs_lose_nothing() -> None:
    """Bytes of large models are beyond what the solver tells apart, and errors below what it takes for zero."""
    sizes = [[2 * 10**12 + part, 4 * 10**12 + part] for part in range(3)]
    costs = [[3e-13, 1e-13], [5e-13, 1e-13], [4e-13, 1e-13]]
    assert cheapest_choices(costs, sizes, 8 * 10**12 + 3) == [0, 1, 0]
    assert cheapest_choices(costs, sizes, 8 * 10**12 + 2) == [0, 0, 0]
    assert cheapest_choices([], [], 0) == []


@pytest.mark.parametrize(
    ("costs", "sizes", "message"),
    [
        ([[1.0, 0.0]], [[4, 8]], "the smallest choices take 4 together, the budget is 3"),
        ([[1.0]], [[1, 2]], "as many of both"),
        ([[]], [[]], "one at least"),
        ([[float("nan")]], [[1]], "finite costs"),
        ([[1.0]], [[-1]], "sizes of at least 0"),
    ],
)
def test_refusals(costs: list[list[float]], sizes: list[list[int]], message: str) -> None:
    with pytest.raises(NumericsError, match=message):
        cheapest_choices(costs, sizes, 3)
