"""What changing a weight costs the model: estimated for one weight at a time, so that a budget can be shared out among them.

A weight W that becomes W' costs, where x is what it is multiplied with and y = W x what comes out of it,

- to the ``model``: what the next-token loss L rises by, in nats per token: ``1/2 sum_ij (W - W')_ij^2 C_j G_i / T`` over T,
  with ``C_j = sum_t x_tj^2`` and ``G_i = sum_t (dL/dy_ti)^2``.  That is ``1/2 tr((W - W')^T H (W - W'))`` of HAWQ-V2 (Dong et
  al. 2020, arXiv:1911.03852) with the Fisher information for the Hessian, and for that the diagonals of its Kronecker factors
  (Martens and Grosse 2015, arXiv:1503.05671).  They take 8 (in + out) bytes for each linear, where whole second moments of all
  layers at once would not fit into memory; errors of rounding, or of small weights that go, are about independent of each
  other, so that what is left out about cancels.  Of models without such a loss L is a random direction of their outputs
  (``gradients.py``), and the error half of the share of the outputs' energy that is lost.
- to its ``site``: the share of its own output's energy that is lost, ``sum_ij (W - W')_ij^2 C_j / sum_t |y_t|^2``, for which
  the model is run forward only.

A mixture is run with its experts changed, on a sample of its tokens: its error counts how often each expert is chosen and
with what weight, as PMQ's does (Huang et al. 2024, arXiv:2410.06270).  All rows of an embedding count alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, TypeVar

import torch
from torch import Tensor, fx

from surgeon.accounting import Key, memory
from surgeon.contract import Observer, Seed, Statistics
from surgeon.errors import PlanError
from surgeon.expert_stack import ExpertStack
from surgeon.graph import Graph
from surgeon.numerics import NumericsError, cheapest_choices
from surgeon.samples import GradientSample, Sample
from surgeon.structure import Embedding, Linear, MoE, Site

Metric = Literal["model", "site"]
Part = Linear | Embedding | MoE
Choice = TypeVar("Choice")

TOKENS = 2048
"""Tokens on which each mixture is run with its experts changed."""


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
    sites: Iterable[Site[Linear] | Site[Embedding] | Site[MoE]], metric: Metric, seed: Seed = 0
) -> dict[str, Observer]:
    """What :func:`weigh` reads of each site, by its name."""
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
class Changed:
    """The weights of a site as one choice makes them.

    Attributes:
        matrices: [..., out, in]; of a mixture those of w_in and w_out.
        size: what they take of the budget.
    """

    matrices: Sequence[Tensor]
    size: int


@dataclass
class Weight:
    """One weight and all that read it.

    Attributes:
        readers: names of sites.
        errors: what each choice costs, summed over readers and, for the ``model``, tokens.
        sizes: what each choice takes of the budget.
        known: whether the data say anything of it.
    """

    readers: list[str] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    known: bool = False


def stated(choices: Iterable[Choice], weight: Weight, tokens: int) -> dict[Choice, float] | None:
    """What choices cost for each of so many tokens, to four digits, as plans say it; None where the data say nothing.

    The last choices may be left out.
    """
    if not weight.known:
        return None
    return {choice: float(f"{error / max(tokens, 1):.4g}") for choice, error in zip(choices, weight.errors, strict=False)}


def most_tokens(sites: Iterable[str], statistics: Statistics) -> int:
    """How many tokens were seen at the site that saw the most."""
    return max((int(getattr(statistics[name], "tokens", 0)) for name in sites), default=0)


def weigh(
    graph: Graph,
    sites: Mapping[str, Part],
    statistics: Statistics,
    changed: Callable[[str, int], Changed],
    choices: Sequence[str],
    metric: Metric,
) -> list[Weight]:
    """What each choice costs for each weight.

    Args:
        graph: the graph.
        sites: parts by site name; their weights are floating.
        statistics: of :func:`squares_of`, under the same names.
        changed: makes a site's weights as the choice of a number has them.
        choices: what each choice is called in errors, such as ``in 4 bits``; one that costs least and takes most is among them.
        metric: what an error is measured by.

    Raises:
        PlanError: a weight, or what the data make of it, is not finite.
    """
    weights: dict[tuple[Key, ...], Weight] = {}
    for name, part in sites.items():
        entry = weights.setdefault(tuple(memory(graph.tensor(each)) for each in names_of(part)), Weight())
        costs = []
        for number, choice in enumerate(choices):
            try:
                made = changed(name, number)
            except NumericsError as error:
                raise PlanError(f"{name}: {error}") from error
            costs.append(_error(graph, part, statistics[name], made.matrices, metric))
            if not math.isfinite(costs[-1]):
                raise PlanError(
                    f"{name}: {choice} it would cost {costs[-1]}: values or derivatives around it are not finite on the "
                    "calibration data; leave it out by names, or take other data"
                )
            if not entry.readers:
                entry.sizes.append(made.size)
            del made
        entry.known = entry.known or max(costs) > 0
        entry.errors = [a + b for a, b in zip(entry.errors or [0.0] * len(costs), costs, strict=True)]
        entry.readers.append(name)
    return list(weights.values())


def choose(weights: Sequence[Weight], budget: int, usual: Sequence[int]) -> list[int]:
    """The choice of each weight, of least cost together under a budget; its usual one where the data say nothing of it."""
    free = [each for each in weights if each.known]
    left = budget - sum(each.sizes[choice] for each, choice in zip(weights, usual, strict=True) if not each.known)
    taken = iter(cheapest_choices([each.errors for each in free], [each.sizes for each in free], left))
    return [next(taken) if each.known else choice for each, choice in zip(weights, usual, strict=True)]


def names_of(part: Part) -> tuple[str, ...]:
    """Names of the weights of a site."""
    return (part.w_in, part.w_out) if isinstance(part, MoE) else (part.weight,)


def matrix_of(graph: Graph, part: Part, name: str) -> Tensor:
    """A weight of a site, [..., out, in], where what is computed with it is."""
    weight = graph.placed(graph.tensor(name).detach())
    return weight.transpose(-1, -2) if isinstance(part, Linear) and part.transposed else weight


def _error(
    graph: Graph, part: Part, observer: Observer, matrices: Sequence[Tensor], metric: Metric
) -> float:
    """What a site's output loses, summed over tokens (``model``), or as a share of its energy (``site``)."""
    if isinstance(part, MoE):
        assert isinstance(observer, Sample)
        return _mixture_error(graph, part, observer, matrices, metric)
    assert isinstance(observer, Squares)
    if observer.inputs is None or observer.tokens == 0:
        return 0.0
    seen = observer.placed(graph)
    assert seen.inputs is not None
    lost = (matrix_of(graph, part, part.weight).double() - matrices[0].double()).square()
    if isinstance(part, Embedding):  # each row as often as any other
        squares = lost.mean(0) * observer.tokens
    else:
        squares = lost @ seen.inputs
    return _cost(squares, observer.energy, seen.gradients, observer.tokens, metric)


def _mixture_error(
    graph: Graph, part: MoE, sample: Sample, matrices: Sequence[Tensor], metric: Metric
) -> float:
    """The same of a mixture that is run with other experts on a sample of its tokens."""
    if sample.tokens == 0:
        return 0.0
    x, index, weight, y, *rest = graph.placed(sample.values())
    stack = graph.placed(ExpertStack.of(graph, part))
    with torch.no_grad():
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
