"""Sharing out bits: what rounding each weight costs, and which bits for each cost least together.

A weight W that is stored as Q costs, where x is what it is multiplied with and y = W x what comes out of it,

- to the ``model``: what the next-token loss L rises by, in nats per token: ``1/2 sum_ij (W - Q)_ij^2 C_j G_i / T`` over T, with
  ``C_j = sum_t x_tj^2`` and ``G_i = sum_t (dL/dy_ti)^2``.  That is ``1/2 tr((W - Q)^T H (W - Q))`` of HAWQ-V2 (Dong et al.
  2020, arXiv:1911.03852) with the Fisher information for the Hessian, and for that the diagonals of its Kronecker factors
  (Martens and Grosse 2015, arXiv:1503.05671).  They take 8 (in + out) bytes for each linear, where whole second moments of all
  layers at once would not fit into memory; errors of rounding are about independent of each other, so that what is left
  out about cancels.  Of models without such a loss L is a random direction of their outputs (``gradients.py``), and the error
  half of the share of the outputs' energy that is lost.
- to its ``site``: the share of its own output's energy that is lost, ``sum_ij (W - Q)_ij^2 C_j / sum_t |y_t|^2``, for which the
  model is run forward only.

A mixture is run with its experts rounded, on a sample of its tokens: its error counts how often each expert is chosen and
with what weight, as PMQ's does (Huang et al. 2024, arXiv:2410.06270).  All rows of an embedding count alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, fx

from surgeon.accounting import Key, memory
from surgeon.contract import Observer, Seed, Statistics
from surgeon.errors import PlanError
from surgeon.expert_stack import ExpertStack
from surgeon.graph import Graph
from surgeon.numerics import NumericsError, QuantizedTensor, cheapest_choices
from surgeon.samples import GradientSample, Sample
from surgeon.structure import Embedding, Linear, MoE, Site

Metric = Literal["model", "site"]
Part = Linear | Embedding | MoE
Rounded = Callable[[Tensor, int], QuantizedTensor]
"""Quantizes a weight [..., out, in] to a number of bits."""

TOKENS = 2048
"""Tokens on which each mixture is run with its experts rounded."""


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


class Squares(Observer):
    """Sums of squares over tokens of what goes into a product and of what comes out.

    Attributes:
        inputs: ``sum_t x_tj^2``, [in] in float64; of a table, which multiplies nothing, that of its output.
        energy: ``sum_t |y_t|^2``.
        gradients: ``sum_t (dL/dy_ti)^2``, [out] in float64; None where no derivatives were seen.
        tokens: number of tokens.
    """

    def __init__(self, *nodes: fx.Node) -> None:
        self.nodes = nodes
        self.inputs: Tensor | None = None
        self.energy = 0.0
        self.gradients: Tensor | None = None
        self.tokens = 0

    def update(self, *values: Tensor) -> None:
        """Add [tokens, in], [tokens, out] and, where there is a loss, the derivative [tokens, out]."""
        y = values[len(self.nodes) - 1]
        squares = values[0].double().square().sum(0)
        self.inputs = squares if self.inputs is None else self.inputs + squares
        self.energy += float(y.double().square().sum())
        if len(values) > len(self.nodes):
            found = values[-1].double().square().sum(0)
            self.gradients = found if self.gradients is None else self.gradients + found
        self.tokens += y.shape[0]

    def merge(self, other: Observer) -> None:
        """Add another shard."""
        assert isinstance(other, Squares)
        if other.inputs is not None:
            self.inputs = other.inputs if self.inputs is None else self.inputs + other.inputs
        if other.gradients is not None:
            self.gradients = other.gradients if self.gradients is None else self.gradients + other.gradients
        self.energy += other.energy
        self.tokens += other.tokens


class SquaresAndGradients(Squares):
    """The same, and of the derivative by what comes out."""

    gradient: ClassVar[bool] = True
    directed: ClassVar[bool] = True


class Routed(GradientSample):
    """A sample of what goes into a mixture and comes out of it, with the derivative."""

    directed: ClassVar[bool] = True


def squares_of(
    sites: Iterable[Site[Linear] | Site[Embedding] | Site[MoE]], metric: Metric, seed: Seed
) -> dict[str, Observer]:
    """What :func:`share_out` reads of each site, by its name."""
    squares, sample = (Squares, Sample) if metric == "site" else (SquaresAndGradients, Routed)
    found: dict[str, Observer] = {}
    for site in sites:
        part = site.part
        if isinstance(part, Linear):
            found[site.name] = squares(part.input, part.node)
        elif isinstance(part, Embedding):
            found[site.name] = squares(part.node)
        else:
            found[site.name] = sample(*part.routed, part.node, limit=TOKENS, seed=seed)
    return found


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


@dataclass
class _Weight:
    """One weight and all that read it."""

    readers: list[str] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)
    codes: int = 0
    known: bool = False


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
    weights: dict[tuple[Key, ...], _Weight] = {}
    tokens = max((int(getattr(statistics[name], "tokens", 0)) for name in sites), default=0)
    for name, part in sites.items():
        names = (part.w_in, part.w_out) if isinstance(part, MoE) else (part.weight,)
        entry = weights.setdefault(tuple(memory(graph.tensor(each)) for each in names), _Weight())
        costs = []
        for bits in choices:
            try:
                codes = [rounded(_matrix(graph, part, each), bits) for each in names]
            except NumericsError as error:
                raise PlanError(f"{name}: {error}") from error
            costs.append(_error(graph, part, statistics[name], codes, metric))
            if not math.isfinite(costs[-1]):
                raise PlanError(
                    f"{name}: in {bits} bits it would cost {costs[-1]}: values or derivatives around it are not finite on the "
                    "calibration data; leave it out by names, or take other data"
                )
            if not entry.readers:
                entry.bytes.append(sum(t.numel() * t.element_size() for each in codes for t in each.tensors if t is not None))
                entry.codes = sum(each.packed.numel() * 8 // bits for each in codes)
            del codes
        entry.known = entry.known or costs[0] > 0
        entry.errors = [a + b for a, b in zip(entry.errors or [0.0] * len(costs), costs, strict=True)]
        entry.readers.append(name)

    # bytes of scales and zero points are the same for every choice
    beside = sum(each.bytes[0] - each.codes * choices[0] // 8 for each in weights.values())
    budget = beside + math.floor(sum(each.codes for each in weights.values()) * average / 8 + 1e-6)
    usual = max(number for number, bits in enumerate(choices) if bits <= average)
    free = [each for each in weights.values() if each.known]
    rest = [each for each in weights.values() if not each.known]
    taken = cheapest_choices(
        [each.errors for each in free],
        [each.bytes for each in free],
        budget - sum(each.bytes[usual] for each in rest),
    )
    shares = {}
    for entry, choice in [*zip(free, taken, strict=True), *((entry, usual) for entry in rest)]:
        scale = 1 / max(tokens, 1) if metric == "model" else 1.0
        errors = {bits: float(f"{error * scale:.4g}") for bits, error in zip(choices, entry.errors, strict=True)}
        for number, name in enumerate(entry.readers):
            shares[name] = Share(choices[choice], 0 if number else entry.codes, errors if entry.known else None)
    notes = [f"{name}: calibration data say nothing of it; {choices[usual]} bits" for each in rest for name in each.readers]
    return shares, notes


def _matrix(graph: Graph, part: Part, name: str) -> Tensor:
    weight = graph.placed(graph.tensor(name).detach())
    return weight.transpose(-1, -2) if isinstance(part, Linear) and part.transposed else weight


def _error(
    graph: Graph, part: Part, observer: Observer, codes: Sequence[QuantizedTensor], metric: Metric
) -> float:
    """What a site's output loses, summed over tokens (``model``), or as a share of its energy (``site``)."""
    if isinstance(part, MoE):
        assert isinstance(observer, Sample)
        return _mixture_error(graph, part, observer, codes, metric)
    assert isinstance(observer, Squares)
    if observer.inputs is None or observer.tokens == 0:
        return 0.0
    seen = observer.placed(graph)
    assert seen.inputs is not None
    lost = (_matrix(graph, part, part.weight).double() - codes[0].dequantize().double()).square()
    if isinstance(part, Embedding):  # each row as often as any other
        squares = lost.mean(0) * observer.tokens
    else:
        squares = lost @ seen.inputs
    return _cost(squares, observer.energy, seen.gradients, observer.tokens, metric)


def _mixture_error(
    graph: Graph, part: MoE, sample: Sample, codes: Sequence[QuantizedTensor], metric: Metric
) -> float:
    """The same of a mixture that is run with rounded experts on a sample of its tokens."""
    if sample.tokens == 0:
        return 0.0
    x, index, weight, y, *rest = graph.placed(sample.values())
    stack = graph.placed(ExpertStack.of(graph, part))
    with torch.no_grad():
        matrices = (each.dequantize() for each in codes)
        found = torch.ops.surgeon.moe.default(x, index, weight, *matrices, stack.b_in, stack.b_out, stack.activation)
    scale = sample.tokens / y.shape[0]
    squares = (found.double() - y.double()).square().sum(0) * scale
    gradients = rest[0].double().square().sum(0) * scale if rest else None
    return _cost(squares, float(y.double().square().sum()) * scale, gradients, sample.tokens, metric)


def _cost(squares: Tensor, energy: float, gradients: Tensor | None, tokens: int, metric: Metric) -> float:
    """What squared errors of a site's outputs, [out], summed over its tokens, cost."""
    if metric == "site":
        return float(squares.sum()) / energy if energy != 0 else 0.0
    assert gradients is not None
    return float(squares @ gradients) / (2 * tokens)
