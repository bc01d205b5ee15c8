"""Remove the experts of a mixture that matter least.

Paper:
    SEER-MoE (Muzio et al. 2024, arXiv:2404.05089), hard and soft counting, global budget; Unified MoE Compression (He et
    al. 2024, arXiv:2406.02500), Expert Drop; REAP (Lasby et al. 2025, arXiv:2510.13999), router-weighted expert
    activation, and the mean activation norm that it compares with; Not All Experts are Equal (Lu et al. 2024,
    arXiv:2402.14800), the set of experts of least reconstruction loss; MoE-I2 (Yang et al. 2024, arXiv:2411.01016),
    unequal numbers per layer.
Formula:
    Over calibration tokens t, with the chosen experts T(t), their weights w_e(t) and outputs E_e(x_t):
    ``frequency``: ``s_e = sum_t 1[e in T(t)]``, as a share of all choices.
    ``soft_frequency``: ``s_e = sum_t p_e(t)``, p the router's scores of all experts, chosen or not, likewise a share.
    ``gate_mass``: ``s_e = sum_t w_e(t)``, as a share of the sum over all experts.
    ``activation_norm``: ``s_e = mean over t with e in T(t) of ||E_e(x_t)||``.
    ``reap``: ``s_e = mean over t with e in T(t) of g_e(t) ||E_e(x_t)||``, g_e = w_e / sum of w over T(t).
    ``random``: by lot, a baseline.
    In each layer the experts of smallest s_e go, equally many of each group where the router selects groups first; an
    expert that no token chose has s_e = 0.
    ``reconstruction``: the set C that stays has the least ``L(C) = sum_t ||F(x_t) - F(x_t; C)||^2 / sum_t ||F(x_t)||^2``,
    F(x; C) the mixture whose router scores the others minus infinity: the best of all sets where these are few, the best
    that a beam search finds where they are many (one expert at a time).  s_e is then the loss without e alone.
    ``budget: global``: all layers together lose as many experts, so that the sum of the lost s_e (of the layers' L for
    ``reconstruction``) is least.  frequency, soft_frequency and gate_mass are then taken per token.
Shapes:
    w_in [E, O, H], w_out [E, H, I], router [E, H] -> the same with E' experts.
Units:
    Shares for ``frequency``, ``soft_frequency``, ``gate_mass`` and ``reconstruction``; units of the hidden state for
    ``activation_norm`` and ``reap``.
Reads:
    The routing decisions of every selected mixture (its scores for ``soft_frequency``); for ``activation_norm``, ``reap``
    and ``reconstruction`` also its input, at a sample of the tokens; nothing for ``random``.
Changes:
    Expert tensors, router rows and per-expert corrections are sliced; top-k stays.
Errors:
    PlanError where fewer than top-k experts would remain, where groups would not stay equal, where keep lists more or fewer
    numbers than there are mixtures, where the router was not recognised or its choice cannot be computed again without some
    experts, or on packed weights.
Example:
    ``- drop_experts: {keep: 6}``, ``- drop_experts: {keep: [6, 8, 4, 6]}`` or
    ``- drop_experts: {ratio: 0.25, criterion: reconstruction, budget: global}``
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from surgeon.contract import Decision, Observer, Pass, Plan, Seed, Statistics
from surgeon.discovery.routing import SCORES
from surgeon.errors import PlanError
from surgeon.expert_budget import fewest, refuse_budget, share_out
from surgeon.expert_outputs import expert_output_norms, mean_by_expert
from surgeon.graph import Graph
from surgeon.observe import Routing
from surgeon.reconstruction import Reconstruction, best_sets
from surgeon.rerouting import refuses_rerouting, scoring_of
from surgeon.resizing import expert_operands, expert_tensors, keep_experts
from surgeon.rewrite import Editor
from surgeon.samples import Sample
from surgeon.score_mass import ScoreMass
from surgeon.structure import MoE, Selection, Site, Structure


class KeepExperts(Decision):
    """The experts of one mixture that stay.

    Attributes:
        site: ``blocks.I.moe``.
        keep: their indices, ascending.
        scores: s_e of every expert.
        loss: L(C), where the criterion is reconstruction.
    """

    keep: tuple[int, ...]
    scores: tuple[float, ...] = ()
    loss: float | None = None


class DropExpertsPlan(Plan[KeepExperts]):
    """Which experts stay in each mixture."""


class DropExperts(Pass[DropExpertsPlan]):
    """Remove the experts that matter least, and their router rows."""

    name = "drop_experts"
    plan_type = DropExpertsPlan

    keep: Annotated[int, Field(ge=1)] | Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)] | None = None
    """Experts to keep in each mixture (with budget global: on average), one number or one for each selected mixture in turn;
    give this or ratio."""
    ratio: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of the experts to remove from each mixture (with budget global: from all), rounded down; give this or keep."""
    criterion: Literal[
        "frequency", "soft_frequency", "gate_mass", "activation_norm", "reap", "reconstruction", "random"
    ] = "frequency"
    """How experts are ranked on calibration data: how often they are chosen, by the scores that the router gives them, by
    how much weight, by the norm of what they give, by that norm times their weight (reap), by what the mixture's output
    loses without them, or by lot."""
    budget: Literal["layer", "global"] = "layer"
    """Whether every mixture loses equally many, or those lose more that miss them less; each keeps what its router needs."""
    tokens: Annotated[int, Field(ge=1)] = 8192
    """Most tokens of calibration data at which activation_norm, reap and reconstruction run the experts; drawn at random
    beyond that. reconstruction uses fewer where there are more than 64 experts."""
    exhaustive: Annotated[int, Field(ge=1)] = 2000
    """With criterion reconstruction: as many sets of one size are compared one by one; beyond that they are searched."""
    beam: Annotated[int, Field(ge=1)] = 1
    """Sets that the search goes on with after each expert: 1 is greedy, more search wider in as many times the seconds."""
    seed: Seed = 0
    """Seed of random, and of the sample of tokens."""

    @model_validator(mode="after")
    def _one_budget(self) -> DropExperts:
        if (self.keep is None) == (self.ratio is None):
            raise ValueError("give either keep or ratio")
        if self.budget == "global" and isinstance(self.keep, list):
            raise ValueError("keep: a number for each mixture leaves nothing to budget: global")
        return self

    # -- observing ----------------------------------------------------------------------------------------------

    def observers(self, structure: Structure) -> Mapping[str, Observer]:
        """Routing counts of every selected mixture, its scores, or tokens with their routing."""
        return {site.name: o for site in structure.moes() if (o := self._observer(site.part)) is not None}

    def _observer(self, moe: MoE) -> Observer | None:
        """What to measure at one mixture; nothing where planning will refuse it."""
        if self.criterion == "random" or moe.router is None or moe.router.out_features != moe.experts:
            return None
        if self.criterion in ("frequency", "gate_mass"):
            return Routing(moe.index, moe.weight, None, moe.experts)
        if self.criterion == "soft_frequency":
            name = scoring_of(moe)
            return None if name is None or moe.logits is None else ScoreMass(moe.logits, SCORES[name], moe.experts)
        nodes = [moe.input, moe.index, moe.weight]
        if self.criterion == "reconstruction":
            if moe.logits is None:
                return None
            nodes.append(moe.logits)
        return Sample(*nodes, limit=self.tokens, seed=self.seed)

    # -- planning -----------------------------------------------------------------------------------------------

    def plan(self, graph: Graph, structure: Structure, statistics: Statistics) -> DropExpertsPlan:
        """Keep the experts of highest score in each mixture, or the set of least loss."""
        sites = list(structure.moes())
        if not sites:
            raise PlanError("no mixture of experts is selected on this model")
        lot = torch.Generator().manual_seed(self.seed)
        least = self._least(graph, sites)
        rankings = [
            self._ranking(graph, site, statistics.get(site.name), lot, keep) if keep < site.part.experts else None
            for site, keep in zip(sites, least, strict=True)
        ]
        keeps = least if self.budget == "layer" else self._shared_out(sites, rankings)
        decisions, notes = [], []
        for site, ranking, keep in zip(sites, rankings, keeps, strict=True):
            if ranking is None or keep == site.part.experts:
                notes.append(f"{site.name}: all {site.part.experts} experts stay")
            else:
                decisions.append(ranking.decision(site.name, keep))
        return DropExpertsPlan(decisions=tuple(decisions), notes=tuple(notes))

    def _least(self, graph: Graph, sites: list[Site[MoE]]) -> list[int]:
        """The smallest number of experts that each mixture may be left with."""
        found = []
        for site, keep in zip(sites, self._keeps(sites), strict=True):
            moe = site.part
            refuse_opaque(graph, site)
            reason = refuses_rerouting(moe) if self.criterion == "reconstruction" else None
            if self.criterion == "soft_frequency" and scoring_of(moe) is None:
                reason = f"its routing ({moe.scoring}) gives no score to every expert"
            if reason is not None:
                raise PlanError(f"{site.name}: criterion {self.criterion} is not possible: {reason}; choose another criterion")
            if self.budget == "global":
                found.append(fewest(moe))
                continue
            if keep > moe.experts:
                raise PlanError(f"{site.name}: keep {keep} asked, the mixture has {moe.experts} experts")
            found.append(keep)
            refuse_budget(site.name, moe, keep)
        return found

    def _keeps(self, sites: list[Site[MoE]]) -> list[int]:
        """How many experts each mixture is asked to keep."""
        if self.keep is None:
            return [site.part.experts - int((self.ratio or 0.0) * site.part.experts) for site in sites]
        if not isinstance(self.keep, list):
            return [self.keep] * len(sites)
        if len(self.keep) != len(sites):
            names = ", ".join(site.name for site in sites)
            raise PlanError(
                f"keep: found {len(self.keep)} numbers, needed one for each of {len(sites)} selected mixtures ({names})"
            )
        return self.keep

    def _shared_out(self, sites: list[Site[MoE]], rankings: list[Ranking | None]) -> list[int]:
        """How many experts each mixture keeps of a budget over all of them."""
        every = [site.part.experts for site in sites]
        lost = int((self.ratio or 0.0) * sum(every)) if self.keep is None else sum(every) - sum(self._keeps(sites))
        floor = [fewest(site.part) for site in sites]
        remain = sum(every) - lost
        if not sum(floor) <= remain <= sum(every):
            needed = ", ".join(f"{site.name} {count}" for site, count in zip(sites, floor, strict=True))
            raise PlanError(
                f"budget global: {remain} of {sum(every)} experts would remain, "
                f"the routers need at least {sum(floor)}: {needed}"
            )
        costs = [{0: 0.0} if ranking is None else ranking.costs for ranking in rankings]
        return [count - gone for count, gone in zip(every, share_out(costs, lost), strict=True)]

    def _ranking(
        self, graph: Graph, site: Site[MoE], observer: Observer | None, lot: torch.Generator, least: int
    ) -> Ranking:
        """Which experts a mixture would keep, down to ``least`` of them."""
        moe = site.part
        if observer is None:
            return Ranking.by_score(moe, torch.rand(moe.experts, generator=lot, dtype=torch.float64), least)
        if getattr(observer, "tokens", 0) == 0:
            raise PlanError(f"{site.name}: calibration data never reached it (no unmasked token)")
        if isinstance(observer, Routing | ScoreMass):
            seen = observer.counts if isinstance(observer, Routing) and self.criterion == "frequency" else observer.mass
            total = seen.sum() if self.budget == "layer" else observer.tokens
            return Ranking.by_score(moe, seen / total, least)
        assert isinstance(observer, Sample)
        x, index, weight, *logits = graph.placed(observer.values())
        operands = graph.placed(expert_operands(graph, moe))
        if self.criterion == "reconstruction":
            bias = None if moe.selection_bias is None else graph.placed(graph.tensor(moe.selection_bias).detach().flatten())
            found = Reconstruction.of(moe, x, logits[0], bias, operands)
            if not found.repeats(index, weight):
                raise PlanError(
                    f"{site.name}: criterion reconstruction is not possible: the router's choices on calibration data are not "
                    f"those of its description ({moe.scoring}, top {moe.top_k}); choose another criterion"
                )
            return Ranking.by_loss(found, best_sets(found, least, self.exhaustive, self.beam))
        norms = expert_output_norms(x, index, operands, moe.activation)
        if self.criterion == "reap":
            norms = norms * (weight / weight.sum(-1, keepdim=True)).double()
        return Ranking.by_score(moe, mean_by_expert(norms, index, moe.experts).cpu(), least)

    # -- applying -----------------------------------------------------------------------------------------------

    def check(self, graph: Graph, structure: Structure, plan: DropExpertsPlan) -> None:
        """Mixtures and experts exist, and enough stay."""
        sites = {site.name: site for site in structure.select(Selection()).moes()}
        for decision in plan.decisions:
            if decision.site not in sites:
                raise PlanError(f"the plan names {decision.site}, which is not a mixture of this model")
            moe = sites[decision.site].part
            refuse_opaque(graph, sites[decision.site])
            if sorted(set(decision.keep) & set(range(moe.experts))) != list(decision.keep):
                raise PlanError(
                    f"{decision.site}: keep {list(decision.keep)} must be ascending experts of 0 to {moe.experts - 1}"
                )
            refuse_budget(decision.site, moe, len(decision.keep))
            kept = torch.tensor(decision.keep) // (moe.experts // moe.groups)
            if len(set(torch.bincount(kept, minlength=moe.groups).tolist())) > 1:
                raise PlanError(f"{decision.site}: its router has {moe.groups} groups; keep equally many experts of each")

    def apply(self, editor: Editor, structure: Structure, plan: DropExpertsPlan, statistics: Statistics) -> None:
        """Slice experts, router and corrections."""
        sites = {site.name: site.part for site in structure.select(Selection()).moes()}
        for decision in plan.decisions:
            keep_experts(editor, sites[decision.site], torch.tensor(decision.keep))

    def exact(self, plan: DropExpertsPlan) -> bool:
        """Removing experts changes the model, unless none is removed."""
        return not plan.decisions

    def parameter_delta(self, graph: Graph, structure: Structure, plan: DropExpertsPlan) -> int:
        """The removed experts' share of every sliced tensor."""
        sites = {site.name: site.part for site in structure.select(Selection()).moes()}
        delta = 0
        for decision in plan.decisions:
            moe = sites[decision.site]
            for name, _ in expert_tensors(graph, moe):
                tensor = graph.tensor(name)
                if isinstance(tensor, torch.nn.Parameter):
                    delta -= tensor.numel() // moe.experts * (moe.experts - len(decision.keep))
        return delta

    def summary(self, plan: DropExpertsPlan) -> str:
        """How many experts went."""
        gone = sum(len(d.scores) - len(d.keep) for d in plan.decisions if d.scores)
        return f"{gone} experts removed from {len(plan.decisions)} mixtures"


@dataclass(frozen=True)
class Ranking:
    """Which experts one mixture keeps, for every number of them that its router allows.

    Attributes:
        scores: s_e of every expert, [E].
        sets: the experts that stay, by their number.
        costs: what is lost, by the number of experts lost.
        losses: L(C) by the number of experts that stay, where it was computed.
    """

    scores: Tensor
    sets: Mapping[int, tuple[int, ...]]
    costs: Mapping[int, float]
    losses: Mapping[int, float] = field(default_factory=dict)

    @classmethod
    def by_score(cls, moe: MoE, scores: Tensor, least: int) -> Ranking:
        """The experts of highest score, equally many of each group."""
        members = moe.experts // moe.groups
        order = torch.argsort(scores.reshape(moe.groups, members), dim=1, descending=True, stable=True)
        order = order + members * torch.arange(moe.groups)[:, None]
        sets = {k: tuple(sorted(order[:, : k // moe.groups].flatten().tolist())) for k in _sizes(moe, least)}
        total = float(scores.sum())
        return cls(scores, sets, {moe.experts - k: total - float(scores[list(kept)].sum()) for k, kept in sets.items()})

    @classmethod
    def by_loss(cls, found: Reconstruction, best: Mapping[int, frozenset[int]]) -> Ranking:
        """The sets of least loss."""
        moe = found.moe
        everyone = frozenset(range(moe.experts))
        alone = found.loss([everyone - {expert} for expert in range(moe.experts)])
        losses = {size: found.loss([kept])[0] for size, kept in best.items()}
        sets = {size: tuple(sorted(kept)) for size, kept in best.items()}
        return cls(torch.tensor(alone), sets, {moe.experts - size: loss for size, loss in losses.items()}, losses)

    def decision(self, site: str, keep: int) -> KeepExperts:
        """What the plan says."""
        scores = tuple(self.scores.tolist())
        return KeepExperts(site=site, keep=self.sets[keep], scores=scores, loss=self.losses.get(keep))


def _sizes(moe: MoE, least: int) -> list[int]:
    """Numbers of experts from ``least`` to all that groups of equal size allow."""
    return list(range(least, moe.experts + 1, moe.groups))


def refuse_opaque(graph: Graph, site: Site[MoE]) -> None:
    """Refuse mixtures whose experts cannot be sliced.

    Raises:
        PlanError: names the site and the reason.
    """
    moe = site.part
    if not graph.tensor(moe.w_in).is_floating_point():
        raise PlanError(f"{site.name}: its experts are quantized already; put drop_experts before quantize")
    if moe.router is None or moe.logits is None:
        raise PlanError(f"{site.name}: its router was not recognised, so its experts cannot be told apart")
    if moe.router.out_features != moe.experts:
        raise PlanError(
            f"{site.name}: the router scores {moe.router.out_features} choices for {moe.experts} experts "
            "(experts were merged); drop experts before merging"
        )
