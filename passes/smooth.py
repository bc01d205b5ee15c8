"""Scale activations down and the weights behind them up, feature by feature, so that rounding loses less.

Paper:
    SmoothQuant (Xiao et al. 2022, arXiv:2211.10438), for weights and activations of 8 bits; AWQ (Lin et al. 2023,
    arXiv:2306.00978), for low-bit weights alone.
Formula:
    ``W x = (W diag(s)) (x / s)``, ``s_j = max_t |x_tj|^a / max_i |W_ij|^(1-a)``, over ``sqrt(max(s) min(s))``, and rounded to
    powers of two where weights have 16 bits, so that no digit of them is lost.  ``alpha: search`` takes, for every input, the
    a (or none) of least ``||Q(W diag(s)) Q(x / s) - W x||^2``, Q being the rounding of ``quantize: {scheme: int8_dynamic}``.
    ``method: awq``: ``s_j = (mean_t |x_tj|)^a``, likewise centred and rounded, and the a of least
    ``||Q(W diag(s)) (x / s) - W x||^2``, Q being rounding to the nearest in groups.
Shapes:
    x: [tokens, in]; W: [out, in]; s: [in], one for all linears that read x.
Units:
    alpha: the exponent a, the share of the range that moves into the weights; tokens: rows of the input.
Reads:
    Each selected linear's input: its extremes (padding too, which takes part in the range at run time), and ``tokens`` rows.
    Experts of mixtures stay as they are.
Changes:
    The columns of the linears' weights are multiplied by s.  The input is divided by it where it is computed: in the weight of
    the norm or of the linear in front, where nothing else reads that; with ``insert: true`` elsewhere by one multiplication.
Errors:
    PlanError for quantized weights, and for weights or inputs (padding too) that are not finite.
Example:
    ``- smooth: {alpha: search}``, before quantize with scheme int8_dynamic; ``- smooth: {method: awq, bits: 4, group: 128}``,
    before quantize with that scheme and group
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, fx

from surgeon.contract import Decision, Observer, Pass, Plan, Seed, Statistics
from surgeon.discovery import operators
from surgeon.errors import PlanError
from surgeon.graph import Graph
from surgeon.mixtures import rows
from surgeon.numerics import NumericsError, fake_quantize_dynamic, fitting_group, quantize_groupwise, require_finite
from surgeon.observe import Extremes
from surgeon.rescaling import Factor, Readers, divisible, multiplied
from surgeon.rewrite import Editor
from surgeon.samples import Sample
from surgeon.structure import Linear, Site, Structure

_EXPONENTS = (0.4, 0.55, 0.7, 0.85, 0.95)
"""Exponents that a search tries, beside none."""
_AWQ_EXPONENTS = tuple(tenths / 10 for tenths in range(1, 11))
"""The same for AWQ, which tries twice as many: the loss is flat between."""
_FARTHEST = 2.0**8
"""Largest factor between a feature and the middle of all."""


class SmoothInput(Decision):
    """One value whose readers are smoothed.

    Attributes:
        site: the first linear that reads it.
        readers: all selected linears that read it.
        alpha: exponent of the activations' magnitudes; 0 leaves them as they are.
        folded: the division is made by weights in front; otherwise by a multiplication.
    """

    readers: tuple[str, ...]
    alpha: Annotated[float, Field(ge=0, le=1)]
    folded: bool


class SmoothPlan(Plan[SmoothInput]):
    """The values that are divided."""


class Smooth(Pass[SmoothPlan]):
    """Scale activations down and weights up (SmoothQuant, AWQ), without changing the outputs, before they are quantized."""

    name = "smooth"
    scope: ClassVar[Literal["model", "block"]] = "block"
    plan_type = SmoothPlan
    apply_reads_statistics = True
    heals = False

    method: Literal["smoothquant", "awq"] = "smoothquant"
    """smoothquant: before int8_dynamic; awq: before low-bit weights with the nearest codes (gptq gains nothing by it)."""
    alpha: Annotated[float, Field(gt=0, le=1)] | Literal["search"] = "search"
    """Share of the range that moves into the weights: one number for all, or for every input what loses least."""
    insert: bool = True
    """Where the division cannot be made in weights in front, multiply: a norm whose output is the residual stream too, or an
    activation function. False leaves those alone: a checkpoint (backend huggingface) has no place for one more tensor."""
    tokens: Annotated[int, Field(ge=16)] = 256
    """For search and awq: tokens on which the roundings are compared."""
    seed: Seed = 0
    """Seed of their sample."""
    bits: Literal[2, 4, 8] | None = None
    """For awq: bits of the weights that quantize will store; 4 by default."""
    group: Annotated[int, Field(ge=16, multiple_of=16)] | None = None
    """For awq: inputs per scale there; 32 by default."""
    symmetric: bool | None = None
    """For awq: whether zero points are fixed there; True by default."""

    @model_validator(mode="after")
    def _for_awq(self) -> Smooth:
        for field in ("bits", "group", "symmetric"):
            if getattr(self, field) is not None and self.method != "awq":
                raise ValueError(f"{field} is for method awq; method is {self.method}")
        return self

    def observers(self, structure: Structure) -> Mapping[str, Observer]:
        """Extremes, and where the exponent is searched tokens, of every value that selected linears read."""
        found: dict[str, Observer] = {}
        for source in _by_input(self.linears(structure)):
            found[source.name] = Extremes(source)
            if self.alpha == "search" or self.method == "awq":
                found[f"{source.name}.sample"] = Sample(source, limit=self.tokens, seed=self.seed)
        return found

    def plan(self, graph: Graph, structure: Structure, statistics: Statistics) -> SmoothPlan:
        """Choose the exponent for each value and where the division is made."""
        readers = Readers(graph)
        decisions, notes = [], []
        for source, sites in _by_input(self.linears(structure)).items():
            for site in sites:
                if not graph.tensor(site.part.weight).is_floating_point():
                    raise PlanError(f"{site.name}: its weight is quantized already; put smooth before quantize")
            names = ", ".join(site.name for site in sites)
            if not all(readers.only(_weight_node(site)) for site in sites):
                notes.append(f"{names}: something else reads the weight too; left alone")
                continue
            folded = _foldable(source, structure, readers) is not None
            if not folded and not self.insert:
                notes.append(f"{names}: no weight in front divides their input alone; left alone (insert: true multiplies)")
                continue
            if _extremes(statistics, source).tokens == 0:
                notes.append(f"{names}: calibration data never reached it (no unmasked token); left alone")
                continue
            _refuse_not_finite(graph, sites, _extremes(statistics, source).peak)
            alpha = self._exponent(graph, source, sites, statistics)
            if alpha == 0:
                notes.append(f"{names}: no exponent loses less than none; left alone")
                continue
            readers_of = tuple(site.name for site in sites)
            decisions.append(SmoothInput(site=readers_of[0], readers=readers_of, alpha=alpha, folded=folded))
        return SmoothPlan(decisions=tuple(decisions), notes=tuple(notes))

    def _exponent(
        self, graph: Graph, source: fx.Node, sites: Sequence[Site[Linear]], statistics: Statistics
    ) -> float:
        if isinstance(self.alpha, float):
            return self.alpha
        x = graph.placed(_sample(statistics, source).values()[0]).float()
        weights = [graph.placed(rows(graph, site.part)).float() for site in sites]
        lost = self._lost_by_weights if self.method == "awq" else self._lost_by_both
        exponents = _AWQ_EXPONENTS if self.method == "awq" else _EXPONENTS
        errors = lost(graph, source, sites, statistics, (0.0, *exponents), x, weights)
        return min(errors, key=errors.__getitem__)

    def _lost_by_both(
        self, graph: Graph, source: fx.Node, sites: Sequence[Site[Linear]], statistics: Statistics,
        exponents: Sequence[float], x: Tensor, weights: list[Tensor],
    ) -> dict[float, float]:  # fmt: skip
        """Squared error for each exponent, scales being those of one half of the data and the range that of the other."""
        peaks, largest = graph.placed((_extremes(statistics, source).peaks, _largest(graph, sites)))
        wanted, halves = [x @ weight.T for weight in weights], _in_halves(graph, sites)
        found = dict.fromkeys(exponents, 0.0)
        for alpha in exponents:
            for mine, other in ((0, 1), (1, 0)):
                scale = _scale(alpha, peaks[mine], largest, halves) if alpha else torch.ones_like(largest, dtype=x.dtype)
                # two rows at the end give the rounding the range that it will have, which padding widens too
                reach = peaks[other].float() / scale
                rounded = fake_quantize_dynamic(torch.cat([x / scale, reach[None], -reach[None]]))[:-2]
                for weight, want in zip(weights, wanted, strict=True):
                    found[alpha] += float((rounded @ _rounded(weight * scale).T - want).double().square().sum())
        return found

    def _lost_by_weights(
        self, graph: Graph, source: fx.Node, sites: Sequence[Site[Linear]], statistics: Statistics,
        exponents: Sequence[float], x: Tensor, weights: list[Tensor],
    ) -> dict[float, float]:  # fmt: skip
        """Squared error of the outputs for each exponent, with weights in low bits."""
        magnitude, halves = graph.placed(_magnitude(statistics, source)), _in_halves(graph, sites)
        found = dict.fromkeys(exponents, 0.0)
        for alpha in exponents:
            scale = _scale(alpha, magnitude, None, halves) if alpha else torch.ones_like(magnitude, dtype=x.dtype)
            for weight in weights:
                bits, group = self.bits or 4, fitting_group(self.group or 32, weight.shape[1])
                codes = quantize_groupwise(weight * scale, bits=bits, group=group, symmetric=self.symmetric is not False)
                error = x @ (codes.dequantize() / scale - weight).T
                found[alpha] += float(error.double().square().sum())
        return found

    def _scale_of(
        self, graph: Graph, source: fx.Node, sites: Sequence[Site[Linear]], statistics: Statistics, alpha: float
    ) -> Tensor:
        """The factors s [in] of one value."""
        halves = _in_halves(graph, sites)
        if self.method == "awq":
            return _scale(alpha, _magnitude(statistics, source), None, halves)
        return _scale(alpha, _extremes(statistics, source).peak, _largest(graph, sites), halves)

    def check(self, graph: Graph, structure: Structure, plan: SmoothPlan) -> None:
        """Linears exist, read one value, and it can be divided as the plan says."""
        readers = Readers(graph)
        sites = {site.name: site for site in structure.linears}
        for decision in plan.decisions:
            missing = [name for name in decision.readers if name not in sites]
            if missing:
                raise PlanError(f"the plan smooths {', '.join(missing)}, which this model does not have")
            if decision.site not in decision.readers:
                raise PlanError(f"{decision.site}: the plan's readers do not name it")
            chosen = [sites[name] for name in decision.readers]
            if len({site.part.input for site in chosen}) > 1:
                raise PlanError(f"{decision.site}: {', '.join(decision.readers)} do not read the same value")
            if not all(readers.only(_weight_node(site)) for site in chosen):
                raise PlanError(f"{decision.site}: something else reads the weights of {', '.join(decision.readers)} too")
            if decision.folded and _foldable(chosen[0].part.input, structure, readers) is None:
                raise PlanError(f"{decision.site}: no weight in front divides its input alone; the plan says folded: true")

    def apply(self, editor: Editor, structure: Structure, plan: SmoothPlan, statistics: Statistics) -> None:
        """Multiply the columns, divide the input."""
        by_name = {site.name: site for site in structure.linears}
        readers = Readers(editor.graph)
        for decision in plan.decisions:
            sites = [by_name[name] for name in decision.readers]
            source = sites[0].part.input
            _refuse_not_finite(editor.graph, sites, _extremes(statistics, source).peak)
            scale = self._scale_of(editor.graph, source, sites, statistics, decision.alpha)
            factors = _foldable(source, structure, readers) if decision.folded else None
            # linears that are not selected read the divided value too where that is folded
            for site in sites if factors is None else _readers_of(source, structure):
                weight = editor.tensor(site.part.weight).detach()
                columns = scale[:, None] if site.part.transposed else scale
                editor.set_tensor(site.part.weight, weight * columns.to(weight.dtype))
            if factors is not None:
                for factor in factors:
                    factor.divide(editor, scale)
                continue
            with editor.before(sites[0].part.node):
                value = multiplied(editor, editor.current(source), f"{sites[0].part.weight}_smoothing", 1 / scale)
            for site in sites:
                editor.redirect(site.part.node, source, value)

    def exact(self, plan: SmoothPlan) -> bool:
        """Nothing changes but the order of multiplications."""
        return True

    def parameter_delta(self, graph: Graph, structure: Structure, plan: SmoothPlan) -> int:
        """One number for each feature that is multiplied."""
        features = {site.name: site.part.in_features for site in structure.linears}
        return sum(features[decision.site] for decision in plan.decisions if not decision.folded)

    def summary(self, plan: SmoothPlan) -> str:
        """How many inputs, and how they are divided."""
        folded = sum(decision.folded for decision in plan.decisions)
        return f"{len(plan.decisions)} inputs smoothed, {folded} of them by weights in front"


def _by_input(sites: Iterator[Site[Linear]]) -> dict[fx.Node, list[Site[Linear]]]:
    """Linears by the value that they read."""
    found: dict[fx.Node, list[Site[Linear]]] = {}
    for site in sites:
        found.setdefault(site.part.input, []).append(site)
    return found


def _weight_node(site: Site[Linear]) -> fx.Node | None:
    """The node that reads the weight for this linear alone, as it is stored or with its dimensions exchanged."""
    for node in site.part.node.all_input_nodes:
        while operators.is_reshape(node) and len(node.users) == 1 and len(node.all_input_nodes) == 1:
            node = node.all_input_nodes[0]
        if node.op == "get_attr" and node.target == site.part.weight:
            return node
    return None


def _extremes(statistics: Statistics, source: fx.Node) -> Extremes:
    found = statistics[source.name]
    assert isinstance(found, Extremes)
    return found


def _sample(statistics: Statistics, source: fx.Node) -> Sample:
    found = statistics[f"{source.name}.sample"]
    assert isinstance(found, Sample)
    return found


def _magnitude(statistics: Statistics, source: fx.Node) -> Tensor:
    """Mean magnitude of each feature over the sampled tokens, [in] float64."""
    return _sample(statistics, source).values()[0].double().abs().mean(0)


def _refuse_not_finite(graph: Graph, sites: Sequence[Site[Linear]], peak: Tensor) -> None:
    """Refuse a range that is no number: scales made of it would be none, or 1 without a word."""
    for site in sites:
        try:
            require_finite(weight=graph.tensor(site.part.weight).detach())
        except NumericsError as error:
            raise PlanError(f"{site.name}: {error}") from error
    bad = int((~peak.isfinite()).sum())
    if bad:
        raise PlanError(
            f"{', '.join(site.name for site in sites)}: on calibration data {bad} of {peak.numel()} features of the input "
            "become NaN or infinite (padding counts, as it does at run time); all must be finite: look at the data, or try "
            "dtype float32"
        )


def _rounded(weight: Tensor) -> Tensor:
    """A weight as ``int8_dynamic`` stores it."""
    return quantize_groupwise(weight, bits=8, group=weight.shape[1], symmetric=True).dequantize()


def _largest(graph: Graph, sites: Sequence[Site[Linear]]) -> Tensor:
    """Largest magnitude of each column over the weights of all linears, [in] float64."""
    return torch.stack([rows(graph, site.part).abs().amax(0).double() for site in sites]).amax(0)


def _in_halves(graph: Graph, sites: Sequence[Site[Linear]]) -> bool:
    """Whether weights have 16 bits."""
    return graph.tensor(sites[0].part.weight).dtype.itemsize < torch.float32.itemsize


def _scale(alpha: float, size: Tensor, largest: Tensor | None, halves: bool) -> Tensor:
    """The factors s [in], ``size^alpha`` over ``largest^(1 - alpha)`` where that is given; 1 where one of them is zero.

    Args:
        alpha: the exponent.
        size: of the features: their peaks or mean magnitudes.
        largest: of the weights of each column.
        halves: weights have 16 bits.
    """
    alive = (size > 0) if largest is None else (size > 0) & (largest > 0)
    if not bool(alive.any()):
        return torch.ones(len(size), device=size.device)
    exponent = alpha * size.log2()
    if largest is not None:
        exponent = exponent - (1 - alpha) * largest.log2()
    middle = (exponent[alive].max() + exponent[alive].min()) / 2
    limit = math.log2(_FARTHEST)
    powers = (exponent - middle).clamp(-limit, limit)
    return torch.where(alive, torch.exp2(powers.round() if halves else powers), 1.0).float()


def _readers_of(source: fx.Node, structure: Structure) -> list[Site[Linear]]:
    """All linears that read a value, selected or not."""
    return [site for site in structure.linears if site.part.input is source]


def _foldable(source: fx.Node, structure: Structure, readers: Readers) -> list[Factor] | None:
    """The tensors in front by which a value is divided, where linears alone read it; None where there are none.

    All that changes lies in one block: the sweep has computed what is in front of it.
    """
    every = _readers_of(source, structure)
    blocks = {site.block for site in every}
    if len(blocks) > 1 or not all(readers.only(_weight_node(site)) for site in every):
        return None
    (block,) = blocks
    within = None if block is None else frozenset(structure.blocks[block].nodes)
    return divisible(source, {site.part.node for site in every}, readers, within)
