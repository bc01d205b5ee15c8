"""Turn a mixture of experts into one dense feed-forward network.

Paper:
    One Student Knows All Experts Know (Xue et al. 2022, arXiv:2201.10890), OneS: gathering by ``sum``, ``mean``,
    ``top_columns`` and ``svd`` (their distillation afterwards is training and not part of this pass).
    ExFusion: learned fusion weights.
Formula:
    With c the mean over tokens of the sum of a token's routing weights, and a_e the weight of expert e, sum a_e = 1:
    1/E (``weights: uniform``) or its share of all routing weight (``mass``):
    ``sum``: all experts side by side, ``y = c sum_e a_e E_e(x)``, E times as wide.
    ``top_columns`` with ``columns: norm``: the width/E neurons of largest norm of each expert, side by side,
    ``y = c sum_e E a_e [E_e](x)``: at uniform weights they are as they were, the published form.
    ``columns: contribution`` takes neurons of any expert, those that stand in best for what they give in the mixture:
    with w_t the weight of the neuron's expert at token t (0 where it does not run), neuron n gives w_t h_n(x_t) d_n there
    and ``f h_n d_n`` in the dense network, nearest with ``f = sum w h^2 / sum h^2``; the largest ``f ||h_n|| ||d_n||`` stay.
    ``mean``: one expert of the weights ``sum_e a_e W_e``.  ``svd``: of ``sum_e a_e [W_e]_r``, [.]_r the best
    approximation of rank r = ``rank`` (the paper's is the full rank over E, which loses more than distillation brings back
    where there is none).  ``learned``: as mean, with the a_e that minimise the squared error of y on
    calibration tokens.
    ``align``: neurons of each expert are first permuted to match those of the heaviest (assignment on all weights).
    ``refit``: the down projection is then corrected by the least squares of the mixture's output on h, with a penalty on
    the correction; it stays as it is where nothing was lost.  OneS distils instead, which is training: of experts that
    were not copies of one network, ``refit: false`` leaves little with any method, and uniform means may be worse than
    one expert by lot (benchmarks/results/moe.md).
Shapes:
    w_in [E, O, H], w_out [E, G, I] -> up (and gate) [I', H], down [G, I'] with I' = E I for sum, ``width`` (by default
    I) for top_columns, else I.
Units:
    a_e are shares; width and rank are numbers of neurons and of directions.
Reads:
    The routing decisions; for ``learned``, ``refit`` and ``columns: contribution`` also the mixture's input and output.
Changes:
    Router and experts become a dense FFN; shared experts beside them stay.
Errors:
    PlanError where calibration data never reaches the mixture, weights are packed, the width is more than all experts
    have (or no multiple of their number with ``columns: norm``), or the model has no mixture.
Example:
    ``- densify_moe: {method: mean}`` or ``- densify_moe: {method: top_columns, width: 512}``
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from surgeon.accounting import freed_parameter_count
from surgeon.contract import Decision, Observer, Pass, Plan, Seed, Statistics
from surgeon.errors import PlanError
from surgeon.expert_merging import RIDGE
from surgeon.expert_outputs import dense_weights, neuron_contributions, stand_in
from surgeon.expert_stack import ExpertStack
from surgeon.graph import Graph
from surgeon.mixtures import Neurons, add_ffn, only_for
from surgeon.numerics import (
    NumericsError,
    largest_neurons,
    learn_weights,
    output_correction,
    sum_of_truncations,
    weighted_sum,
)
from surgeon.observe import Routing
from surgeon.rewrite import Editor
from surgeon.samples import Sample
from surgeon.structure import MoE, Selection, Site, Structure


class DensifyOne(Decision):
    """How one mixture becomes dense.

    Attributes:
        site: ``blocks.I.moe``.
        weights: a_e of every expert.
        scale: c.
        width: neurons of the dense FFN.
        identical: all experts are equal and every token's weights sum to c, so that nothing is lost.
        neurons: for top_columns, those of each expert that stay.
    """

    weights: tuple[float, ...]
    scale: float
    width: Annotated[int, Field(ge=1)]
    identical: bool = False
    neurons: tuple[tuple[int, ...], ...] = ()


class DensifyMoEPlan(Plan[DensifyOne]):
    """The dense FFNs that are made."""


class DensifyMoE(Pass[DensifyMoEPlan]):
    """Join the experts of each mixture to one dense FFN."""

    name = "densify_moe"
    plan_type = DensifyMoEPlan
    apply_reads_statistics = True

    method: Literal["mean", "sum", "top_columns", "svd", "learned"] = "mean"
    """How experts are joined: averaged, side by side, their largest neurons, low-rank parts, or with fitted weights."""
    weights: Literal["mass", "uniform"] | None = None
    """Weight of each expert: its share of the routing weight on calibration data, or equal; by default equal for
    columns norm, mass otherwise. learned starts from it."""
    align: bool = True
    """Match the experts' neurons before averaging them."""
    refit: bool = True
    """Fit the down projection to the mixture's output on calibration data; false: the published forms, before training."""
    width: Annotated[int, Field(ge=1)] | None = None
    """For top_columns: neurons of the dense FFN; by default as many as one expert has."""
    columns: Literal["contribution", "norm"] | None = None
    """For top_columns: the neurons of any expert that give most on calibration data (the default), or the published form,
    equally many of each expert, those of largest norm."""
    rank: Annotated[int, Field(ge=1)] | None = None
    """For svd: rank kept of each expert; by default half of the full rank."""
    steps: Annotated[int, Field(ge=1)] = 200
    """For learned: optimisation steps."""
    tokens: Annotated[int, Field(ge=32)] = 8192
    """Calibration tokens that are kept for learned and refit."""
    seed: Seed = 0
    """Seed of the sample and of the optimisation's batches."""

    @model_validator(mode="after")
    def _fields_fit(self) -> DensifyMoE:
        for field, method in (("width", "top_columns"), ("columns", "top_columns"), ("rank", "svd")):
            if getattr(self, field) is not None and self.method != method:
                raise ValueError(f"{field} is for method {method}; method is {self.method}")
        if self.weights is not None and self._by_contribution:
            raise ValueError("weights is not for columns contribution, which weighs each neuron; columns norm takes it")
        return self

    @property
    def _by_contribution(self) -> bool:
        return self.method == "top_columns" and self.columns != "norm"

    def observers(self, structure: Structure) -> Mapping[str, Observer]:
        """Routing, and tokens of input and output where something is fitted."""
        found: dict[str, Observer] = {}
        for site in structure.moes():
            moe = site.part
            found[f"{site.name}.routing"] = Routing(moe.index, moe.weight, None, moe.experts)
            if self.refit or self.method == "learned" or self._by_contribution:
                nodes = (moe.input, moe.node, moe.index, moe.weight)
                found[f"{site.name}.sample"] = Sample(*nodes, limit=self.tokens, seed=self.seed)
        return found

    def plan(self, graph: Graph, structure: Structure, statistics: Statistics) -> DensifyMoEPlan:
        """Weights, scale and width of every selected mixture."""
        decisions = []
        for site in structure.moes():
            _refuse(graph, site)
            routing = statistics[f"{site.name}.routing"]
            assert isinstance(routing, Routing)
            if routing.tokens == 0:
                raise PlanError(f"{site.name}: calibration data never reached it (no unmasked token)")
            width = self._width(site)
            scale = float(routing.mass.sum()) / routing.tokens
            share = torch.full_like(routing.mass, 1 / site.part.experts)
            by_mass = self.weights == "mass" or (self.weights is None and self.columns != "norm")
            if by_mass and scale > 0:
                share = routing.mass / routing.mass.sum()
            if self.method == "learned":
                share = self._learned(graph, site, share, scale, statistics)
            decisions.append(
                DensifyOne(
                    site=site.name,
                    weights=tuple(share.tolist()),
                    scale=scale,
                    width=width,
                    identical=_identical(graph, site.part),
                    neurons=self._neurons(graph, site, width, statistics),
                )
            )
        if not decisions:
            raise PlanError("this model has no mixture of experts at the selected blocks")
        return DensifyMoEPlan(decisions=tuple(decisions))

    def _width(self, site: Site[MoE]) -> int:
        moe = site.part
        if self.method == "sum":
            return moe.experts * moe.width
        if self.method == "svd" and self._rank(moe) > min(moe.width, _features(moe)):
            raise PlanError(
                f"{site.name}: rank {self.rank} asked, its experts have rank {min(moe.width, _features(moe))} at most"
            )
        if self.method != "top_columns":
            return moe.width
        width, most = self.width or moe.width, moe.experts * moe.width
        if width > most or (width % moe.experts and not self._by_contribution):
            multiple = "" if self._by_contribution else f"a multiple of its {moe.experts} experts, and "
            raise PlanError(f"{site.name}: width {width} must be {multiple}{most} at most")
        return width

    def _neurons(
        self, graph: Graph, site: Site[MoE], width: int, statistics: Statistics
    ) -> tuple[tuple[int, ...], ...]:
        """The neurons of every expert that top_columns keeps, ascending."""
        if self.method != "top_columns":
            return ()
        stack = graph.placed(ExpertStack.of(graph, site.part))
        if self._by_contribution:
            x, _, index, weight = graph.placed(_sampled(statistics, site.name))
            given = neuron_contributions(stack, x, dense_weights(index, weight, stack.experts))
            kept = torch.zeros(given.numel(), dtype=torch.bool)
            kept[given.flatten().topk(width).indices.cpu()] = True
            return tuple(tuple(own.nonzero().flatten().tolist()) for own in kept.reshape(stack.experts, -1))
        chosen = largest_neurons(stack.w_in, stack.w_out, width // stack.experts)
        return tuple(map(tuple, chosen.tolist()))

    def _rank(self, moe: MoE) -> int:
        return self.rank or max(1, min(moe.width, _features(moe)) // 2)

    def _learned(
        self, graph: Graph, site: Site[MoE], share: Tensor, scale: float, statistics: Statistics
    ) -> Tensor:
        experts = self._ordered(graph.placed(ExpertStack.of(graph, site.part)), share)
        x, y, *_ = graph.placed(_sampled(statistics, site.name))

        def output(weights: Tensor, rows: Tensor) -> Tensor:
            w_in, w_out, b_in, b_out = (
                None if t is None else torch.einsum("e,e...->...", weights, t)
                for t in (experts.w_in, experts.w_out, experts.b_in, experts.b_out)
            )
            assert w_in is not None
            assert w_out is not None
            dense = _neurons(site.part, w_in, w_out, b_in, b_out)
            out = dense.hidden(rows) @ dense.down.T
            return scale * (out if dense.down_bias is None else out + dense.down_bias)

        try:
            return learn_weights(output, x, y, graph.placed(share), steps=self.steps, seed=self.seed).cpu()
        except NumericsError as error:
            raise PlanError(f"{site.name}: {error}") from error

    def check(self, graph: Graph, structure: Structure, plan: DensifyMoEPlan) -> None:
        """Mixtures exist and have that many experts."""
        sites = {site.name: site for site in structure.select(Selection()).moes()}
        for decision in plan.decisions:
            if decision.site not in sites:
                raise PlanError(f"the plan densifies {decision.site}, which is not a mixture of this model")
            site = sites[decision.site]
            _refuse(graph, site)
            if len(decision.weights) != site.part.experts:
                raise PlanError(
                    f"{decision.site}: the plan weighs {len(decision.weights)} experts, it has {site.part.experts}"
                )
            if not abs(sum(decision.weights) - 1) < 1e-3:
                raise PlanError(f"{decision.site}: the experts' weights add up to {sum(decision.weights):.4g}, needed 1")
            if not math.isfinite(decision.scale):
                raise PlanError(f"{decision.site}: the plan says scale {decision.scale}, needed a finite number")
            if decision.width != self._width(site):
                raise PlanError(f"{decision.site}: the plan says width {decision.width}, {self._width(site)} is needed")
            if self.method == "top_columns":
                _check_neurons(site, decision)

    def apply(self, editor: Editor, structure: Structure, plan: DensifyMoEPlan, statistics: Statistics) -> None:
        """Replace each mixture."""
        sites = {site.name: site.part for site in structure.select(Selection()).moes()}
        for decision in plan.decisions:
            moe = sites[decision.site]
            dense = self._dense(editor.graph, moe, decision, statistics)
            if self.refit and not self._lossless(decision):
                dense = _refitted(dense, *editor.graph.placed(_sampled(statistics, decision.site)[:2]))
            with editor.before(moe.node):
                out = add_ffn(editor, f"{_prefix(moe)}.dense", editor.current(moe.input), dense)
            editor.replace(moe.node, out)

    def _dense(self, graph: Graph, moe: MoE, decision: DensifyOne, statistics: Statistics) -> Neurons:
        weights = torch.tensor(decision.weights, dtype=torch.float64)
        if self.method in ("sum", "top_columns"):
            return self._side_by_side(graph, moe, decision, weights, statistics)
        experts = self._ordered(graph.placed(ExpertStack.of(graph, moe)), weights)
        if self.method == "svd":
            rank = self._rank(moe)
            halves = experts.w_in.chunk(2, dim=1) if moe.gated else (experts.w_in,)
            w_in = torch.cat([sum_of_truncations(half, weights, rank) for half in halves])
            w_out = sum_of_truncations(experts.w_out, weights, rank)
        else:
            w_in, w_out = weighted_sum(experts.w_in, weights), weighted_sum(experts.w_out, weights)
        b_in = None if experts.b_in is None else weighted_sum(experts.b_in, weights)
        b_out = None if experts.b_out is None else weighted_sum(experts.b_out, weights) * decision.scale
        return _neurons(moe, w_in, w_out * decision.scale, b_in, b_out)

    def _ordered(self, stack: ExpertStack, weights: Tensor) -> ExpertStack:
        return stack.in_order(stack.aligned(int(weights.argmax()))) if self.align else stack

    def _side_by_side(
        self, graph: Graph, moe: MoE, decision: DensifyOne, weights: Tensor, statistics: Statistics
    ) -> Neurons:
        """Neurons of all experts in one row, each column times what brings it nearest to what it gave."""
        stack = graph.placed(ExpertStack.of(graph, moe))
        weights = weights.to(stack.w_in.device)
        neurons = decision.neurons or (tuple(range(stack.width)),) * stack.experts
        expert = torch.repeat_interleave(torch.tensor([len(own) for own in neurons]))
        chosen = torch.tensor([neuron for own in neurons for neuron in own])
        columns = stack.w_out.transpose(1, 2)[expert, chosen]
        owner, inner = expert.repeat(stack.parts), stack.rows(chosen)
        w_in = stack.w_in[owner, inner]
        b_in = None if stack.b_in is None else stack.b_in[owner, inner]
        factor = weights[expert] * decision.scale * (stack.experts if self.method == "top_columns" else 1)
        if self._by_contribution:
            x, _, index, weight = graph.placed(_sampled(statistics, decision.site))
            hidden = torch.split(_neurons(moe, w_in, columns.T, b_in, None).hidden(x), [len(own) for own in neurons], dim=1)
            runs = dense_weights(index, weight, stack.experts)
            factor = torch.cat([stand_in(part, runs[:, number]) for number, part in enumerate(hidden)])
        columns = columns * factor.to(columns.dtype)[:, None]
        b_out = None if stack.b_out is None else weighted_sum(stack.b_out, weights) * decision.scale
        return _neurons(moe, w_in, columns.T, b_in, b_out)

    def exact(self, plan: DensifyMoEPlan) -> bool:
        """Identical experts lose nothing where whole experts are joined."""
        return all(map(self._lossless, plan.decisions))

    def _lossless(self, decision: DensifyOne) -> bool:
        return decision.identical and self.method in ("mean", "sum", "learned")

    def parameter_delta(self, graph: Graph, structure: Structure, plan: DensifyMoEPlan) -> int:
        """The dense FFN's weights, less those of experts and router."""
        sites = {site.name: site.part for site in structure.select(Selection()).moes()}
        delta = 0
        for decision in plan.decisions:
            moe = sites[decision.site]
            (_, _, inputs), (_, outputs, _) = graph.tensor(moe.w_in).shape, graph.tensor(moe.w_out).shape
            matrices = 2 if moe.gated else 1
            delta += decision.width * (matrices * (inputs + (moe.b_in is not None)) + outputs)
            delta += outputs if moe.b_out is not None else 0
            delta -= freed_parameter_count(graph, only_for(moe.node, moe.input))
        return delta

    def summary(self, plan: DensifyMoEPlan) -> str:
        """How many mixtures, and the widths."""
        widths = sorted({decision.width for decision in plan.decisions})
        return f"{len(plan.decisions)} mixtures made dense, width {', '.join(map(str, widths))} ({self.method})"


def _refuse(graph: Graph, site: Site[MoE]) -> None:
    moe = site.part
    for name in (moe.w_in, moe.w_out):
        if not graph.tensor(name).is_floating_point():
            raise PlanError(f"{site.name}: its experts are quantized already; put densify_moe before quantize")


def _check_neurons(site: Site[MoE], decision: DensifyOne) -> None:
    """Raise where the plan's neurons are not ``width`` different ones of the experts."""
    moe, chosen = site.part, decision.neurons
    if len(chosen) != moe.experts or sum(map(len, chosen)) != decision.width:
        raise PlanError(
            f"{site.name}: the plan keeps {sum(map(len, chosen))} neurons of {len(chosen)} experts; "
            f"{decision.width} of {moe.experts} are needed"
        )
    for expert, own in enumerate(chosen):
        if len(set(own)) != len(own) or not set(own) <= set(range(moe.width)):
            raise PlanError(f"{site.name}: the plan's neurons of expert {expert} must be different ones below {moe.width}")


def _features(moe: MoE) -> int:
    features: int = moe.input.meta["val"].shape[-1]
    return features


def _prefix(moe: MoE) -> str:
    return moe.w_in.rpartition(".")[0].removesuffix(".experts") or moe.w_in


def _sampled(statistics: Statistics, site: str) -> list[Tensor]:
    sample = statistics[f"{site}.sample"]
    assert isinstance(sample, Sample)
    return sample.values()


def _refitted(dense: Neurons, x: Tensor, y: Tensor) -> Neurons:
    """The FFN with the down projection (and bias) that gives y [T, G] on x [T, H]."""
    hidden, down, bias = dense.hidden(x), dense.down, dense.down_bias
    lost = y - hidden @ down.T
    if bias is None:
        return replace(dense, down=down + output_correction(hidden, lost, RIDGE).to(down.dtype))
    change = output_correction(torch.cat([hidden, torch.ones_like(hidden[:, :1])], 1), lost - bias, RIDGE).to(down.dtype)
    return replace(dense, down=down + change[:, :-1], down_bias=bias + change[:, -1])


def _identical(graph: Graph, moe: MoE) -> bool:
    """Whether all experts are equal and the weights of every token have one sum."""
    tensors = [graph.tensor(name) for name in (moe.w_in, moe.w_out, moe.b_in, moe.b_out) if name is not None]
    constant = moe.expert_scale is None and (moe.normalised or moe.scoring in ("topk_softmax", "uniform"))
    return constant and all(bool((tensor == tensor[:1]).all()) for tensor in tensors)


def _neurons(moe: MoE, w_in: Tensor, w_out: Tensor, b_in: Tensor | None, b_out: Tensor | None) -> Neurons:
    """One expert's tensors (w_in [O, H], w_out [G, I]) as an FFN."""
    if not moe.gated:
        return Neurons(None, w_in, w_out, None, b_in, b_out, moe.activation)
    gate, up = w_in.chunk(2)
    gate_bias, up_bias = (None, None) if b_in is None else b_in.chunk(2)
    return Neurons(gate, up, w_out, gate_bias, up_bias, b_out, moe.activation)
