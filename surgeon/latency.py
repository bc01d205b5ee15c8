"""Measuring how long something takes, so that two measurements can be compared.

The median over many runs is reported, with the minimum beside it: on a shared machine the minimum says what the
hardware can do and the distance between the two says how busy it was.  Candidates are run in turn, A B A B, never one
after the other, so that whatever drifts (clock frequency, neighbours, caches) hits all of them alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from surgeon.errors import RecipeError

Clock = Callable[[], float]
"""Seconds since some fixed moment."""


@dataclass(frozen=True)
class Timing:
    """Times of repeated runs of one function, in milliseconds.

    Attributes:
        median_ms: median.
        min_ms: fastest run.
        p90_ms: nine of ten runs were at least as fast (inclusive percentile, linear between runs).
        runs: number of runs measured, without the warm-up.
    """

    median_ms: float
    min_ms: float
    p90_ms: float
    runs: int

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        """Summarise the times of single runs.

        Args:
            seconds: at least one time in seconds.
        """
        ms = [1e3 * second for second in seconds]
        p90 = statistics.quantiles(ms, n=10, method="inclusive")[-1] if len(ms) > 1 else ms[0]
        return cls(statistics.median(ms), min(ms), p90, len(ms))


def measure(
    function: Callable[[], object],
    *,
    warmup: int = 3,
    seconds: float = 2.0,
    minimum: int = 5,
    clock: Clock = time.perf_counter,
) -> Timing:
    """Time one function.

    Args:
        function: what to run; must return only when its work is done (synchronise a device inside).
        warmup: runs before the first that counts.
        seconds: time to spend on runs that count.
        minimum: fewest runs that count, however long they take.
        clock: source of time in seconds.

    Returns:
        Its timing.
    """
    return compare({"": function}, warmup=warmup, seconds=seconds, minimum=minimum, clock=clock)[""]


def compare(
    functions: Mapping[str, Callable[[], object]],
    *,
    warmup: int = 3,
    seconds: float = 2.0,
    minimum: int = 5,
    clock: Clock = time.perf_counter,
) -> dict[str, Timing]:
    """Time several functions in turn, A B A B; see :func:`rounds`.

    Returns:
        Timings by name, in the order given.
    """
    times = rounds(functions, warmup=warmup, seconds=seconds, minimum=minimum, clock=clock)
    return {name: Timing.of(values) for name, values in times.items()}


def rounds(
    functions: Mapping[str, Callable[[], object]],
    *,
    warmup: int = 3,
    seconds: float = 2.0,
    minimum: int = 5,
    clock: Clock = time.perf_counter,
) -> dict[str, list[float]]:
    """Run several functions in turn, A B A B.

    All run equally often: at least ``minimum`` times, and until together they spent ``seconds`` times their number.

    Args:
        functions: what to run, by name; as in :func:`measure`.
        warmup: rounds before the first that counts.
        seconds: time to spend per function.
        minimum: fewest rounds that count.
        clock: source of time in seconds.

    Returns:
        By name, in the order given: the time of every round in seconds, those of one round at one place in all lists.

    Raises:
        RecipeError: there is nothing to run, or no run would count.
    """
    if not functions:
        raise RecipeError("latency: there is no function to measure")
    if minimum < 1 or warmup < 0:
        raise RecipeError(f"latency: minimum must be at least 1 and warmup at least 0, found {minimum} and {warmup}")
    for _ in range(warmup):
        for function in functions.values():
            function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    spent, done = 0.0, 0
    while done < minimum or spent < seconds * len(functions):
        for name, function in functions.items():
            start = clock()
            function()
            elapsed = clock() - start
            times[name].append(elapsed)
            spent += elapsed
        done += 1
    return times


def paired_ratio(base: list[float], other: list[float]) -> float:
    """How many times faster ``other`` is: median over rounds of the ratio of two times of one round."""
    return statistics.median(a / b for a, b in zip(base, other, strict=True))


@contextmanager
def pinned_threads(count: int | None) -> Iterator[int]:
    """Let torch compute on ``count`` threads within the context, and on as many as before after it.

    Args:
        count: number of intra-operator threads; None leaves it as it is.

    Yields:
        The number of threads in use.

    Raises:
        RecipeError: ``count`` is not positive.
    """
    if count is not None and count < 1:
        raise RecipeError(f"latency: the number of threads must be at least 1, found {count}")
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
