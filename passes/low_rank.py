"""Factor linear layers into two thin ones.

Paper:
    SVD-LLM (Wang et al. 2024, arXiv:2403.07378) and SVD-LLM V2 (arXiv:2503.12340) for ``whitened``; truncated SVD
    (Eckart and Young 1936) for ``svd``.
Formula:
    ``svd``: ``W_r = U_r S_r V_r^T``, the best rank-r approximation of W.
    ``whitened``: with ``C = sum_t x_t x_t^T = Q L Q^T``: ``U S V^T = svd(W Q L^(1/2))``,
    ``W_r = U_r S_r V_r^T L^(-1/2) Q^T``, the best rank-r approximation of ``W X``:
    ``||(W - W_r) X||_F = sqrt(sum_{i>r} S_i^2)``.
    ``ratio`` is the share of the matrix's parameters kept: ``r = floor(ratio m n / (m + n))``; 1.0 is full rank.
    ``allocation: loss``: ranks, or none, of which the loss is estimated to rise least, by integer programming; rank r of a
    linear costs ``1/2 sum_ij (W - W_r)_ij^2 C_jj G_i``, G_i the sum of the squared derivatives by output i
    (``surgeon/sensitivity.py``).
Shapes:
    W: [out, in]; C: [in, in]; factors [out, r] and [r, in].
Units:
    ratio: parameters kept / parameters before.
Reads:
    The input of each factored linear (``whitened`` only), on the already-changed model, block by block. Before that,
    ``allocation: loss`` runs the model forward and backward, with 8 (in + out) bytes for each linear.
Changes:
    ``y = W x + b`` becomes ``y = L (R x) + b``.
Errors:
    PlanError for a rank above min(out, in), for already quantized weights, and where nothing is selected. Under an allocation,
    the plan's notes say which linears stay whole.
Example:
    ``- low_rank: {ratio: 0.6, allocation: loss}`` or ``- low_rank: {rank: 64, method: svd, names: "*.ffn.*"}``
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from surgeon.accounting import freed_parameter_count, memory, nodes_of, stored_reads
from surgeon.contract import LEFT, Decision, Observer, Pass, Plan, Statistics
from surgeon.errors import PlanError
from surgeon.graph import Graph
from surgeon.moments import SecondMoment
from surgeon.numerics import LowRank as Factors
from surgeon.numerics import rank_for_ratio, saves, truncated_svd, whitened_svd
from surgeon.rank_budget import by_loss
from surgeon.rewrite import Editor
from surgeon.sensitivity import squares_of
from surgeon.structure import Linear, Site, Structure


class FactorLinear(Decision):
    """One linear that is factored.

    Attributes:
        site: name of the linear.
        rank: rank r of the two factors.
        full_rank: min(out, in), at which nothing is lost.
        errors: of ``allocation: loss``: what each rank was estimated to raise the loss by, in nats per token (of models without
            a next-token loss, to lose of the outputs), for who edits the plan.
    """

    rank: Annotated[int, Field(ge=1)]
    full_rank: int
    errors: dict[int, float] | None = None


class LowRankPlan(Plan[FactorLinear]):
    """The linears that are factored, with their ranks."""


class LowRank(Pass[LowRankPlan]):
    """Factor linears into two thin ones by (activation-whitened) SVD."""

    name = "low_rank"
    scope: ClassVar[Literal["model", "block"]] = "block"
    plan_type = LowRankPlan
    apply_reads_statistics = True
    heals = False

    rank: Annotated[int, Field(ge=1)] | None = None
    """Rank of the factors; give this or ratio."""
    ratio: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of each matrix's parameters to keep; 1.0 is full rank, kept as two factors; give this or rank."""
    method: Literal["whitened", "svd"] = "whitened"
    """whitened minimises the error of the layer's output on calibration data; svd that of the weight, without data."""
    allocation: Literal["uniform", "loss"] = "uniform"
    """Where the parameters go. uniform: each linear keeps the same share; loss: all of them together keep ratio, each with a
    rank of its own or whole, so that the loss is estimated to rise least."""
    spread: Annotated[float, Field(gt=0, le=1)] | None = None
    """For allocation: loss: how far below ratio the share that one linear keeps may be, since estimates are the less to be
    trusted the more goes; 0.3 by default."""
    multiple: Annotated[int, Field(ge=1)] = 1
    """Ranks are multiples of this, for kernels that want so: 8 for tensor cores, the group of a quantize behind it."""

    @model_validator(mode="after")
    def _one_budget(self) -> LowRank:
        if (self.rank is None) == (self.ratio is None):
            raise ValueError("give either rank or ratio")
        if self.rank is not None and self.rank % self.multiple:
            raise ValueError(f"rank {self.rank} is no multiple of {self.multiple}")
        if self.spread is not None and self.allocation == "uniform":
            raise ValueError("spread is for allocation: loss; allocation is uniform")
        if self.allocation != "uniform":
            if self.ratio is None or self.ratio == 1:
                raise ValueError("allocation: loss shares out a ratio below 1; give that, and no rank")
            if self.method != "whitened":
                raise ValueError("allocation: loss reads data, method: svd none; use method: whitened")
        return self

    def observers(self, structure: Structure) -> Mapping[str, Observer]:
        """Second moments of the inputs, shared by linears that read the same value."""
        if self.method == "svd":
            return {}
        return {site.part.input.name: SecondMoment(site.part.input) for site in self._sites(structure)}

    def survey(self, structure: Structure) -> Mapping[str, Observer]:
        """For an allocation: sums of squares around each linear, with derivatives."""
        return squares_of(self._sites(structure), "model") if self.allocation == "loss" else {}

    def plan_whole(self, graph: Graph, structure: Structure, statistics: Statistics) -> LowRankPlan:
        """Share the ranks out."""
        assert self.ratio is not None
        reads = stored_reads(graph)
        sites, notes = {}, []
        for site in self._sites(structure):
            self._refuse_quantized(graph, site)
            if len(reads[memory(graph.tensor(site.part.weight))]) > 1:
                notes.append(f"{site.name}: {LEFT}: its weight is read elsewhere too, so that factors would come on top of it")
            else:
                sites[site.name] = site.part
        spread = 0.3 if self.spread is None else self.spread
        shares, unknown = by_loss(graph, sites, statistics, ratio=self.ratio, multiple=self.multiple, spread=spread)
        full = {name: min(part.out_features, part.in_features) for name, part in sites.items()}
        decisions = tuple(
            FactorLinear(site=name, rank=share.rank, full_rank=full[name], errors=share.errors)
            for name, share in shares.items()
            if share.rank is not None
        )
        whole = [name for name, share in shares.items() if share.rank is None]
        if whole:
            notes.append(f"{len(whole)} linears stay whole, since ranks of the others cost less: {', '.join(whole)}")
        return LowRankPlan(decisions=decisions, notes=(*notes, *unknown))

    def plan(self, graph: Graph, structure: Structure, statistics: Statistics) -> LowRankPlan:
        """Choose ranks; linears that two factors would not make smaller are left alone."""
        decisions, notes = [], []
        for site in self._sites(structure):
            out, inner = site.part.out_features, site.part.in_features
            full = min(out, inner)
            self._refuse_quantized(graph, site)
            if self.rank is not None and self.rank > full:
                raise PlanError(f"{site.name}: rank {self.rank} asked, [{out}, {inner}] has rank {full} at most")
            rank = self.rank if self.rank is not None else rank_for_ratio(out, inner, self.ratio or 1.0)
            if self.ratio != 1.0:
                rank -= rank % self.multiple
            if rank == 0:
                notes.append(f"{site.name} [{out}, {inner}]: the ratio leaves it no rank of {self.multiple}; left alone")
                continue
            if not saves(out, inner, rank) and self.ratio != 1.0:
                notes.append(f"{site.name} [{out}, {inner}]: two factors of rank {rank} would not be smaller; left alone")
                continue
            decisions.append(FactorLinear(site=site.name, rank=rank, full_rank=full))
        return LowRankPlan(decisions=tuple(decisions), notes=tuple(notes))

    def _refuse_quantized(self, graph: Graph, site: Site[Linear]) -> None:
        if not graph.tensor(site.part.weight).is_floating_point():
            raise PlanError(f"{site.name}: its weight is quantized already; put low_rank before quantize")

    def check(self, graph: Graph, structure: Structure, plan: LowRankPlan) -> None:
        """Every linear exists and has the rank."""
        sites = {site.name: site for site in structure.linears}
        for decision in plan.decisions:
            if decision.site not in sites:
                raise PlanError(f"the plan factors {decision.site}, which this model does not have")
            part = sites[decision.site].part
            full = min(part.out_features, part.in_features)
            if decision.rank > full or decision.full_rank != full:
                raise PlanError(
                    f"{decision.site}: the plan says rank {decision.rank} of {decision.full_rank}, "
                    f"[{part.out_features}, {part.in_features}] has rank {full} at most"
                )

    def apply(self, editor: Editor, structure: Structure, plan: LowRankPlan, statistics: Statistics) -> None:
        """Replace each chosen linear by two."""
        for site, rank in _ranks(structure, plan):
            weight = editor.tensor(site.part.weight).detach()
            matrix = weight.T if site.part.transposed else weight
            factors = self._decompose(editor.graph.placed(matrix), rank, site.part, statistics)
            left, right = (factor.to(weight.dtype).contiguous() for factor in (factors.left, factors.right))
            _factor(editor, site.part, left, right)

    def rehearse(self, editor: Editor, structure: Structure, plan: LowRankPlan | None) -> None:
        """Two factors of the same ranks, without their numbers."""
        if plan is None:
            plan = self.plan(editor.graph, structure, {})
            if self.allocation != "uniform":  # some stay whole: that one will not is all that is certain
                plan = plan.model_copy(update={"decisions": plan.decisions[:1]})
        self.check(editor.graph, structure, plan)
        for site, rank in _ranks(structure, plan):
            part, dtype = site.part, editor.tensor(site.part.weight).dtype
            shapes = ((part.out_features, rank), (rank, part.in_features))
            _factor(editor, part, *(torch.empty(shape, dtype=dtype, device="meta") for shape in shapes))

    def _decompose(self, matrix: Tensor, rank: int, part: Linear, statistics: Statistics) -> Factors:
        if self.method == "svd":
            return truncated_svd(matrix, rank)
        observer = statistics[part.input.name]
        assert isinstance(observer, SecondMoment)
        assert observer.matrix is not None
        return whitened_svd(matrix, observer.matrix.to(matrix.device), rank)

    def exact(self, plan: LowRankPlan) -> bool:
        """Full rank everywhere loses nothing."""
        return all(decision.rank == decision.full_rank for decision in plan.decisions)

    def parameter_delta(self, graph: Graph, structure: Structure, plan: LowRankPlan) -> int:
        """R (out + in) for each factored linear, less the matrices that nothing else reads."""
        ranks = {decision.site: decision.rank for decision in plan.decisions}
        parts = {site.name: site.part for site in structure.linears if site.name in ranks}
        added = sum(ranks[name] * (part.out_features + part.in_features) for name, part in parts.items())
        names = {part.weight for part in parts.values()}
        return added - freed_parameter_count(graph, nodes_of(parts.values()), names)

    def summary(self, plan: LowRankPlan) -> str:
        """How many linears, and their ranks."""
        ranks = sorted({decision.rank for decision in plan.decisions})
        span = f"rank {ranks[0]}" + (f" to {ranks[-1]}" if len(ranks) > 1 else "") if ranks else ""
        return f"{len(plan.decisions)} linears factored{', ' + span if span else ''} ({self.method})"

    def _sites(self, structure: Structure) -> Iterator[Site[Linear]]:
        """Linears inside the blocks except routers; with ``names:`` whatever matches."""
        return (site for site in self.linears(structure) if self.names is not None or site.block is not None)


def _ranks(structure: Structure, plan: LowRankPlan) -> Iterator[tuple[Site[Linear], int]]:
    """The linears of a plan with their ranks, in graph order."""
    ranks = {decision.site: decision.rank for decision in plan.decisions}
    return ((site, ranks[site.name]) for site in structure.linears if site.name in ranks)


def _factor(editor: Editor, part: Linear, left: Tensor, right: Tensor) -> None:
    """Replace a linear by two, of weights right [r, in] and left [out, r]."""
    with editor.before(part.node):
        first = editor.add_tensor(f"{part.weight}_right", right)
        inner = editor.call(torch.ops.aten.linear.default, editor.current(part.input), first)
        second = editor.add_tensor(f"{part.weight}_left", left)
        bias = (editor.read(part.bias),) if part.bias is not None else ()
        outer = editor.call(torch.ops.aten.linear.default, inner, second, *bias)
    editor.replace(part.node, outer)
