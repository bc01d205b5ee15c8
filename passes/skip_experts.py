"""Skip experts at run time: those that weigh little beside a token's best one, and those beyond the n best.

Paper:
    Not All Experts are Equal (Lu et al. 2024, arXiv:2402.14800), dynamic skipping; MC-MoE (Huang et al. 2024,
    arXiv:2410.06270), online pruning with protected tokens; SEER-MoE (Muzio et al. 2024, arXiv:2404.05089), fewer experts
    per token.
Formula:
    With the weights w_1 >= w_2 >= ... of a token's experts, expert j > 1 is skipped where ``w_j < beta w_1``.
    ``beta: median``: beta of a layer is the median over calibration tokens of w_j / w_1, j > 1 (just below it, where it is
    one of these values).  ``fraction``: beta is such that this share of the layer's pairs of a token and an expert is
    skipped on calibration data.
    Where the router divides the weights by their sum, the others take over: ``w_i <- w_i sum_j w_j / sum of w over those
    that run``.  Elsewhere they stay.
    ``protect``: no expert is skipped for tokens of significance ``I_t >= tau``, tau so that this share of a layer's
    calibration tokens is protected.  ``protect_by: norm``: ``I_t = |x_t|_1``, x_t the mixture's input.  ``attention``:
    ``I_t = |x_t|_1 mean_s A_st``, the paper's, A the weights of the attention in front of the mixture in its block, mean
    over heads and over the tokens s that see t.  (In its code the sum runs over keys instead of queries, so that the factor
    is one of position only.)  A token that is generated alone is seen by itself only.
    ``top_k: n``: the router's own selection takes n instead of k.
Shapes:
    weight [T, k] -> [T, k] with zeros; with ``top_k`` index and weight [T, k] -> [T, n].
Units:
    beta is a ratio; tau has the units of the hidden state.
Reads:
    The weights, and for ``protect`` the inputs, of every selected mixture, and by attention its queries, keys and mask;
    nothing where beta is a number and nothing is protected.
Changes:
    Weights of skipped experts become exactly 0, which every implementation may leave out and ONNX Runtime's does; no
    weight of the model.  ``protect_by: attention`` computes the weights of that attention a second time, [B, heads, T, T].
Errors:
    PlanError where more than all but the best experts would be skipped, where the weights scale the experts' inputs, where
    the router's selection is not one top-k that could take fewer, where calibration data never reaches the mixture, or,
    for ``protect_by: attention``, where no fused attention over the same tokens stands in front of it.
Example:
    ``- skip_experts: {beta: median}`` or ``- skip_experts: {fraction: 0.3, protect: 0.02, blocks: "4:"}``
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, fx

from surgeon.contract import Decision, Observer, Pass, Plan, Seed, Statistics
from surgeon.errors import PlanError
from surgeon.graph import Graph
from surgeon.resizing import choose_fewer, selecting_top_k
from surgeon.rewrite import Editor
from surgeon.samples import Sample
from surgeon.structure import MoE, Selection, Site, Structure
from surgeon.token_significance import Scores, scores_before

aten = torch.ops.aten


class SkipAtSite(Decision):
    """When one mixture skips experts.

    Attributes:
        site: ``blocks.I.moe``.
        beta: an expert that weighs less than this share of the best one is skipped; None where none is.
        protect_above: sum of magnitudes from which on a token skips none; None where no token is protected.
        top_k: experts that the router selects, None for as many as before.
        skipped: share of the pairs of a token and an expert that beta skipped on calibration data.
    """

    beta: Annotated[float, Field(ge=0, le=1)] | None = None
    protect_above: float | None = None
    top_k: Annotated[int, Field(ge=1)] | None = None
    skipped: float | None = None


class SkipExpertsPlan(Plan[SkipAtSite]):
    """When every mixture skips experts."""


class Ratios(Sample):
    """A sample of tokens: the weights of their experts in descending order [T, k], and the size of the input [T, 1]."""

    def update(self, *values: Tensor) -> None:
        """Add weight [tokens, k] and x [tokens, H]."""
        ordered = values[0].double().abs().sort(dim=-1, descending=True).values
        super().update(ordered, values[1].double().abs().sum(-1, keepdim=True))


class Significance(Ratios):
    """The same, the size of the input times the attention that a token is paid."""

    whole: ClassVar[bool] = True

    def __init__(self, *nodes: fx.Node, scores: Scores, limit: int, seed: int) -> None:
        super().__init__(*nodes, *scores.nodes, limit=limit, seed=seed)
        self._scores = scores

    def update(self, *values: Tensor) -> None:
        """Add weight [tokens, k], x [tokens, H], queries, keys and mask, and the rows that are no padding."""
        weight, x, *parts, rows = values
        size = x.double().abs().sum(-1, keepdim=True) * self._scores.paid(*parts).double()
        super().update(weight[rows], size[rows])


class SkipExperts(Pass[SkipExpertsPlan]):
    """Skip experts that weigh little beside a token's best one."""

    name = "skip_experts"
    plan_type = SkipExpertsPlan

    beta: Annotated[float, Field(ge=0, le=1)] | Literal["median"] | None = None
    """Experts that weigh less than this share of the token's best one are skipped; median: the median of these shares in
    each layer, on calibration data. 0 skips none."""
    fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of each layer's pairs of a token and an expert to skip, from which beta follows on calibration data."""
    protect: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the tokens, those of largest significance, that skip no expert."""
    protect_by: Literal["norm", "attention"] = "norm"
    """Significance of a token: the size of the mixture's input, or that times the attention that the others pay to it."""
    top_k: Annotated[int, Field(ge=1)] | None = None
    """Most experts per token; routers that select fewer stay as they are."""
    tokens: Annotated[int, Field(ge=1)] = 65536
    """Most tokens of calibration data that are kept; drawn at random beyond that."""
    seed: Seed = 0
    """Seed of the sample of tokens."""

    @model_validator(mode="after")
    def _fields_fit(self) -> SkipExperts:
        if self.beta is not None and self.fraction is not None:
            raise ValueError("give either beta or fraction")
        if self.beta is None and self.fraction is None and self.top_k is None:
            raise ValueError("give beta, fraction or top_k")
        if self.protect and self.beta is None and self.fraction is None:
            raise ValueError("protect is for beta or fraction: top_k selects as many experts for every token")
        if self.protect_by == "attention" and not self.protect:
            raise ValueError("protect_by is for protect, the share of tokens that skip no expert")
        return self

    @property
    def _skips(self) -> bool:
        return self.beta is not None or self.fraction is not None

    @property
    def _calibrated(self) -> bool:
        return self._skips and (not isinstance(self.beta, float | int) or self.protect > 0)

    # -- planning -----------------------------------------------------------------------------------------------

    def observers(self, structure: Structure) -> Mapping[str, Observer]:
        """Weights and inputs of mixtures that select several experts."""
        if not self._calibrated:
            return {}
        found: dict[str, Observer] = {}
        for site in structure.moes():
            if self._left(site.part) < 2 or site.part.input_scaled:
                continue
            nodes = (site.part.weight, site.part.input)
            scores = scores_before(structure, site) if self.protect_by == "attention" else None
            if isinstance(scores, Scores):
                found[site.name] = Significance(*nodes, scores=scores, limit=self.tokens, seed=self.seed)
            elif scores is None:
                found[site.name] = Ratios(*nodes, limit=self.tokens, seed=self.seed)
        return found

    def plan(self, graph: Graph, structure: Structure, statistics: Statistics) -> SkipExpertsPlan:
        """Find the threshold of every selected mixture."""
        decisions, notes = [], []
        sites = list(structure.moes())
        for site in sites:
            moe = site.part
            left = self._left(moe)
            reduces = left < moe.top_k
            skips = self._skips and left > 1
            if reduces:
                _refuse_fewer(site)
            if skips:
                self._refuse_skipping(structure, site)
            if not reduces and not skips:
                what = "nothing to skip" if self._skips else f"at most {self.top_k} asked"
                notes.append(f"{site.name}: its router selects {moe.top_k} per token, {what}")
                continue
            found: dict[str, Any] = self._thresholds(site, statistics.get(site.name), left) if skips else {}
            decisions.append(SkipAtSite(site=site.name, top_k=left if reduces else None, **found))
        if not sites:
            raise PlanError("no mixture of experts is selected on this model")
        return SkipExpertsPlan(decisions=tuple(decisions), notes=tuple(notes))

    def _left(self, moe: MoE) -> int:
        """Experts that the router selects afterwards."""
        return moe.top_k if self.top_k is None else min(self.top_k, moe.top_k)

    def _thresholds(self, site: Site[MoE], observer: Observer | None, left: int) -> dict[str, float | None]:
        """beta, protect_above and the share that is skipped."""
        if observer is None:
            assert isinstance(self.beta, float | int)
            return {"beta": float(self.beta)}
        assert isinstance(observer, Ratios)
        ordered, size = observer.values() if observer.tokens else (torch.zeros(0, left), torch.zeros(0, 1))
        ordered = ordered[:, :left]
        used = ordered[:, 0] > 0  # tokens that no expert took have nothing to skip
        if not bool(used.any()):
            raise PlanError(f"{site.name}: calibration data never reached it (no unmasked token that an expert took)")
        ordered, size = ordered[used], size[used, 0]
        tau = _largest(size, self.protect)
        ratios = ordered[:, 1:] / ordered[:, :1]
        runs = int(ordered.ne(0).sum())
        free = ratios if tau is None else ratios[size < tau]
        candidates = free[free > 0].sort().values  # a weight of 0 is skipped already
        if self.beta == "median":
            positive = ratios[ratios > 0].sort().values
            beta = _between(positive, positive.numel() // 2)
        elif self.fraction is not None:
            wanted = round(self.fraction * runs)
            if wanted > candidates.numel():
                raise PlanError(
                    f"{site.name}: {self.fraction:.1%} of its pairs of a token and an expert asked, at most "
                    f"{candidates.numel() / runs:.1%} can be skipped: each token keeps its best expert, and protected ones all"
                )
            beta = _between(candidates, wanted)
        else:
            assert isinstance(self.beta, float | int)
            beta = float(self.beta)
        return {"beta": beta, "protect_above": tau, "skipped": int((candidates < beta).sum()) / runs}

    def _refuse_skipping(self, structure: Structure, site: Site[MoE]) -> None:
        if site.part.input_scaled:
            raise PlanError(
                f"{site.name}: its weights scale the experts' inputs, and an expert of weight 0 is not the same as none; "
                "it cannot skip by weight"
            )
        if self.protect_by == "attention" and isinstance(reason := scores_before(structure, site), str):
            raise PlanError(f"{site.name}: protect_by attention is not possible: {reason}; use norm")

    # -- applying -----------------------------------------------------------------------------------------------

    def check(self, graph: Graph, structure: Structure, plan: SkipExpertsPlan) -> None:
        """Mixtures exist and can do what the plan says."""
        sites = {site.name: site for site in structure.select(Selection()).moes()}
        for decision in plan.decisions:
            if decision.site not in sites:
                raise PlanError(f"the plan names {decision.site}, which is not a mixture of this model")
            site = sites[decision.site]
            if decision.top_k is not None:
                _refuse_fewer(site)
                if decision.top_k > site.part.top_k:
                    raise PlanError(f"{site.name}: top_k {decision.top_k} asked, its router selects {site.part.top_k}")
            if decision.beta is not None:
                self._refuse_skipping(structure, site)

    def apply(self, editor: Editor, structure: Structure, plan: SkipExpertsPlan, statistics: Statistics) -> None:
        """Reduce selections and mask weights."""
        sites = {site.name: site for site in structure.select(Selection()).moes()}
        for decision in plan.decisions:
            moe = sites[decision.site].part
            if decision.top_k is not None:
                choose_fewer(editor, moe, decision.top_k)
            if decision.beta is not None:
                scores = scores_before(structure, sites[decision.site]) if self.protect_by == "attention" else None
                assert not isinstance(scores, str)  # refused
                with editor.before(moe.node):
                    masked = _masked(editor, moe, decision.beta, decision.protect_above, scores)
                editor.redirect(moe.node, moe.weight, masked)

    def exact(self, plan: SkipExpertsPlan) -> bool:
        """Only where nothing is skipped."""
        return all(decision.top_k is None and not decision.beta for decision in plan.decisions)

    def parameter_delta(self, graph: Graph, structure: Structure, plan: SkipExpertsPlan) -> int:
        """All weights stay."""
        return 0

    def summary(self, plan: SkipExpertsPlan) -> str:
        """How many mixtures skip, and how much."""
        shares = [decision.skipped for decision in plan.decisions if decision.skipped is not None]
        seen = f", {sum(shares) / len(shares):.1%} of pairs skipped on calibration data" if shares else ""
        fewer = sorted({decision.top_k for decision in plan.decisions if decision.top_k is not None})
        chosen = f", at most {' or '.join(map(str, fewer))} experts per token" if fewer else ""
        return f"{len(plan.decisions)} mixtures skip experts{chosen}{seen}"


def _refuse_fewer(site: Site[MoE]) -> None:
    if selecting_top_k(site.part) is None:
        raise PlanError(
            f"{site.name}: top_k is not possible: its router ({site.part.scoring}) does not select by one top-k of its "
            f"{site.part.experts} experts"
        )


def _masked(editor: Editor, moe: MoE, beta: float, tau: float | None, scores: Scores | None) -> fx.Node:
    """The weights [T, k] with zeros for what is skipped, at the insertion point."""
    weight = editor.current(moe.weight)
    size = editor.call(aten.abs.default, weight)
    largest = editor.call(aten.amax.default, size, [-1], True)
    skipped = editor.call(aten.lt.Tensor, size, editor.call(aten.mul.Scalar, largest, beta))
    if tau is not None:
        x = editor.call(aten.abs.default, editor.current(moe.input))
        significance = editor.call(aten.sum.dim_IntList, x, [-1], True)
        if scores is not None:
            significance = editor.call(aten.mul.Tensor, significance, scores.add(editor))
        small = editor.call(aten.lt.Scalar, significance, tau)
        skipped = editor.call(aten.logical_and.default, skipped, small)
    kept = editor.call(aten.masked_fill.Scalar, weight, skipped, 0.0)
    if not moe.normalised:
        return kept
    before, after = (editor.call(aten.sum.dim_IntList, part, [-1], True) for part in (weight, kept))
    # a token that no expert took has weights of 0 only
    safe = editor.call(aten.clamp_min.default, after, torch.finfo(weight.meta["val"].dtype).tiny)
    return editor.call(aten.mul.Tensor, kept, editor.call(aten.div.Tensor, before, safe))


def _largest(size: Tensor, share: float) -> float | None:
    """A value that this share of [T] is not below, None where no token is to be."""
    count = round(share * size.numel())
    return None if count == 0 else _between(size.sort().values, size.numel() - count)


def _between(ordered: Tensor, count: int) -> float:
    """A number that ``count`` of the ascending values are below (fewer where values are equal), and not one of them.

    A threshold on a value that was seen would be decided by rounding, where that token is seen again by a runtime.
    """
    if count == 0:
        return 0.0
    if count == ordered.numel():
        return max(1.0, float(ordered[-1]))
    return float((ordered[count - 1] + ordered[count]) / 2)
