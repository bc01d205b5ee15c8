"""Sharing out bits: which bits for each weight cost the model least together, by what ``sensitivity.py`` estimates."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from surgeon.contract import Statistics
from surgeon.graph import Graph
from surgeon.numerics import QuantizedTensor
from surgeon.sensitivity import Changed, Metric, Part, choose, matrix_of, most_tokens, names_of, stated, weigh

Rounded = Callable[[Tensor, int], QuantizedTensor]
"""Quantizes a weight [..., out, in] to a number of bits."""


def choices_of(bits: float | None, of: Sequence[int] | None) -> list[int]:
    """The numbers of bits that a weight can have, from the least on.

    Args:
        bits: how many weights are to have on average.
        of: the numbers, None for 2, 4 and 8.

    Raises:
        ValueError: one of them is there twice, or no choice has that average.
    """
    choices = sorted(set(of or (2, 4, 8)))
    if of is not None and len(choices) < len(of):
        raise ValueError(f"of: {list(of)} names one number of bits twice")
    asked = f"from {choices[0]} to {choices[-1]} bits, on average over all weights, can be had of {choices}"
    if bits is None:
        raise ValueError(f"scheme mixed needs bits: {asked}")
    if not choices[0] <= bits <= choices[-1]:
        raise ValueError(f"bits: {bits:g} is out of reach: {asked}")
    return choices


@dataclass(frozen=True)
class Share:
    """What one site is given.

    Attributes:
        bits: bits per weight.
        codes: numbers that are stored at so many bits, with those that fill the last group of a row; 0 where another site's
            codes are read.
        errors: what each number of bits costs, for all that read the weight, to four digits; None where the data say
            nothing of it.
    """

    bits: int
    codes: int
    errors: dict[int, float] | None


def share_out(
    graph: Graph,
    sites: Mapping[str, Part],
    statistics: Statistics,
    rounded: Rounded,
    *,
    choices: Sequence[int],
    average: float,
    metric: Metric,
) -> tuple[dict[str, Share], list[str]]:
    """Bits for every site, of least cost together among those that take no more bytes than ``average`` bits for all would.

    Sites that read one weight get the same.  A weight that data never reached, or that outputs do not depend on, has the
    most bits that are not above the average.

    Args:
        graph: the graph.
        sites: parts by site name; their weights are floating.
        statistics: of :func:`squares_of`, under the same names.
        rounded: the rounding whose errors are measured.
        choices: bits to choose from, from the least on.
        average: bits per stored code, over all weights; between the least and the most of the choices.
        metric: what an error is measured by.

    Returns:
        What each site is given, and notes on those that the data say nothing of.

    Raises:
        PlanError: a weight, or what the data make of it, is not finite.
    """
    tokens = most_tokens(sites, statistics) if metric == "model" else 1
    stored: dict[str, int] = {}

    def changed(name: str, number: int) -> Changed:
        part = sites[name]
        codes = [rounded(matrix_of(graph, part, each), choices[number]) for each in names_of(part)]
        stored[name] = sum(each.packed.numel() * 8 // choices[number] for each in codes)
        size = sum(t.numel() * t.element_size() for each in codes for t in each.tensors if t is not None)
        return Changed([each.dequantize() for each in codes], size)

    weights = weigh(graph, sites, statistics, changed, [f"in {bits} bits" for bits in choices], metric)
    # bytes of scales and zero points are the same for every choice
    codes = [stored[each.readers[0]] for each in weights]
    beside = sum(each.sizes[0] - count * choices[0] // 8 for each, count in zip(weights, codes, strict=True))
    budget = beside + math.floor(sum(codes) * average / 8 + 1e-6)
    usual = max(number for number, bits in enumerate(choices) if bits <= average)
    taken = choose(weights, budget, [usual] * len(weights))
    shares = {}
    for entry, choice, count in zip(weights, taken, codes, strict=True):
        errors = stated(choices, entry, tokens)
        for number, name in enumerate(entry.readers):
            shares[name] = Share(choices[choice], 0 if number else count, errors)
    unknown = (name for each in weights if not each.known for name in each.readers)
    notes = [f"{name}: calibration data say nothing of it; {choices[usual]} bits" for name in unknown]
    return shares, notes
