"""Timing with a clock that the test moves, so that every number is known."""

from __future__ import annotations

import pytest
import torch

from surgeon.errors import RecipeError
from surgeon.latency import Timing, compare, measure, pinned_threads


class Clock:
    """Moves only when a function takes time."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def __call__(self) -> float:
        return self.now

    def taking(self, name: str, *times: float) -> object:
        left = list(times)

        def run() -> None:
            self.calls.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return run


def test_summary_of_known_times() -> None:
    timing = Timing.of([0.001 * n for n in range(1, 12)])  # 1 .. 11 ms
    assert timing.median_ms == pytest.approx(6.0)
    assert timing.min_ms == pytest.approx(1.0)
    assert timing.p90_ms == pytest.approx(10.0)  # the tenth of eleven: nine steps of ten
    assert timing.runs == 11
    assert Timing.of([0.5]) == Timing(500.0, 500.0, 500.0, 1)


def test_candidates_take_turns_and_warm_up_does_not_count() -> None:
    clock = Clock()
    slow_start = clock.taking("a", 9.0, 0.25)
    timings = compare({"a": slow_start, "b": clock.taking("b", 0.5)}, warmup=1, seconds=1.5, minimum=2, clock=clock)
    assert clock.calls == ["a", "b"] * (1 + 4)  # 4 rounds of 0.75 s reach 2 x 1.5 s
    assert timings["a"] == Timing(250.0, 250.0, 250.0, 4)
    assert timings["b"] == Timing(500.0, 500.0, 500.0, 4)


def test_the_minimum_holds_where_one_run_takes_longer_than_the_budget() -> None:
    clock = Clock()
    assert measure(clock.taking("a", 4.0), warmup=0, seconds=1.0, minimum=3, clock=clock).runs == 3


def test_nonsense_is_refused() -> None:
    with pytest.raises(RecipeError, match="no function"):
        compare({})
    with pytest.raises(RecipeError, match="minimum must be at least 1"):
        measure(lambda: None, minimum=0)
    with pytest.raises(RecipeError, match="at least 1, found 0"), pinned_threads(0):
        pass


def test_threads_are_restored_after_an_error() -> None:
    before = torch.get_num_threads()
    seen = []

    def fail() -> None:
        with pinned_threads(before + 1) as count:
            seen.extend([count, torch.get_num_threads()])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert seen == [before + 1, before + 1]
    assert torch.get_num_threads() == before
    with pinned_threads(None) as count:
        assert count == before
