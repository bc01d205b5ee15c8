"""Remove the experts of a mixture that matter least.

Paper:
    SEER-MoE (Muzio et al. 2024, arXiv:2404.05089), hard counting; Unified MoE Compression (He et al. 2024,
    arXiv:2406.02500), Expert Drop; REAP (Lasby et al. 2025, arXiv:2510.13999), router-weighted expert activation, and the
    mean activation norm that it compares with.
Formula:
    Over calibration tokens t, with the chosen experts T(t), their weights w_e(t) and outputs E_e(x_t):
    ``frequency``: ``s_e = sum_t 1[e in T(t)]``, as a share of all choices.
    ``gate_mass``: ``s_e = sum_t w_e(t)``, as a share of the sum over all experts.
    ``activation_norm``: ``s_e = mean over t with e in T(t) of ||E_e(x_t)||``.
    ``reap``: ``s_e = mean over t with e in T(t) of g_e(t) ||E_e(x_t)||``, g_e = w_e / sum of w over T(t).
    ``random``: by lot, a baseline.
    In each layer the experts of smallest s_e go, equally many of each group where the router selects groups first; an
    expert that no token chose has s_e = 0.
Shapes:
    w_in [E, O, H], w_out [E, H, I], router [E, H] -> the same with E' experts.
Units:
    Shares for ``frequency`` and ``gate_mass``; units of the hidden state for ``activation_norm`` and ``reap``.
Reads:
    The routing decisions of every selected mixture; for ``activation_norm`` and ``reap`` also its input, at a sample of
    the tokens; nothing for ``random``.
Changes:
    Expert tensors, router rows and per-expert corrections are sliced; top-k stays.
Errors:
    PlanError where fewer than top-k experts would remain, where groups would not stay equal, where the router was not
    recognised, or on packed weights.
Example:
    ``- drop_experts: {keep: 6}`` or ``- drop_experts: {ratio: 0.25, criterion: reap}``
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from surgeon.contract import Decision, Observer, Pass, Plan, Statistics
from surgeon.errors import PlanError
from surgeon.expert_outputs import expert_output_norms, mean_by_expert
from surgeon.graph import Graph
from surgeon.observe import Routing
from surgeon.resizing import expert_operands, expert_tensors, keep_experts
from surgeon.rewrite import Editor
from surgeon.samples import Sample
from surgeon.structure import MoE, Selection, Site, Structure


class KeepExperts(Decision):
    """The experts of one mixture that stay.

    Attributes:
        site: ``blocks.I.moe``.
        keep: their indices, ascending.
        scores: s_e of every expert.
    """

    keep: tuple[int, ...]
    scores: tuple[float, ...] = ()


class DropExpertsPlan(Plan[KeepExperts]):
    """Which experts stay in each mixture."""


class DropExperts(Pass[DropExpertsPlan]):
    """Remove the experts that matter least, and their router rows."""

    name = "drop_experts"
    plan_type = DropExpertsPlan

    keep: Annotated[int, Field(ge=1)] | None = None
    """Experts to keep in each mixture; give this or ratio."""
    ratio: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of the experts to remove from each mixture, rounded down; give this or keep."""
    criterion: Literal["frequency", "gate_mass", "activation_norm", "reap", "random"] = "frequency"
    """How experts are ranked on calibration data: how often they are chosen, by how much weight, by the norm of what they
    give, by that norm times their weight (reap), or by lot."""
    tokens: Annotated[int, Field(ge=1)] = 8192
    """Most tokens of calibration data at which activation_norm and reap run the experts; drawn at random beyond that."""
    seed: int = 0
    """Seed of random, and of the sample of tokens."""

    @model_validator(mode="after")
    def _one_budget(self) -> DropExperts:
        if (self.keep is None) == (self.ratio is None):
            raise ValueError("give either keep or ratio")
        return self

    def observers(self, structure: Structure) -> Mapping[str, Observer]:
        """Routing counts of every selected mixture, or tokens with their routing."""
        if self.criterion == "random":
            return {}
        if self.criterion in ("frequency", "gate_mass"):
            return {s.name: Routing(s.part.index, s.part.weight, None, s.part.experts) for s in structure.moes()}
        return {
            s.name: Sample(s.part.node.args[0], s.part.index, s.part.weight, limit=self.tokens, seed=self.seed)  # type: ignore[arg-type]  # x is a node
            for s in structure.moes()
        }

    def plan(self, graph: Graph, structure: Structure, statistics: Statistics) -> DropExpertsPlan:
        """Keep the experts of highest score in each mixture."""
        decisions, notes = [], []
        lot = torch.Generator().manual_seed(self.seed)
        for site in structure.moes():
            moe = site.part
            refuse_opaque(graph, site)
            keep = self.keep if self.keep is not None else moe.experts - int((self.ratio or 0.0) * moe.experts)
            if keep > moe.experts:
                raise PlanError(f"{site.name}: keep {keep} asked, the mixture has {moe.experts} experts")
            _refuse_budget(site.name, moe, keep)
            if keep == moe.experts:
                notes.append(f"{site.name}: all {keep} experts stay")
                continue
            if self.criterion == "random":
                scores = torch.rand(moe.experts, generator=lot, dtype=torch.float64)
            else:
                scores = self._scores(graph, site, statistics[site.name])
            decisions.append(KeepExperts(site=site.name, keep=_best(moe, scores, keep), scores=tuple(scores.tolist())))
        if not decisions and not notes:
            raise PlanError("no mixture of experts is selected on this model")
        return DropExpertsPlan(decisions=tuple(decisions), notes=tuple(notes))

    def _scores(self, graph: Graph, site: Site[MoE], observer: Observer) -> Tensor:
        """s_e of every expert, [E]."""
        moe = site.part
        if isinstance(observer, Routing):
            seen = observer.counts if self.criterion == "frequency" else observer.mass
            if observer.tokens == 0:
                raise PlanError(f"{site.name}: calibration data never reached it (no unmasked token)")
            return seen / seen.sum()
        assert isinstance(observer, Sample)
        if observer.tokens == 0:
            raise PlanError(f"{site.name}: calibration data never reached it (no unmasked token)")
        x, index, weight = observer.values()
        norms = expert_output_norms(x, index, expert_operands(graph, moe), moe.activation)
        if self.criterion == "reap":
            norms = norms * (weight / weight.sum(-1, keepdim=True)).double()
        return mean_by_expert(norms, index, moe.experts)

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
            _refuse_budget(decision.site, moe, len(decision.keep))
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


def _chosen_per_token(moe: MoE) -> int:
    """Experts that must remain: k, or one where a token is routed to every expert anyway."""
    return 1 if moe.top_k == moe.experts else moe.top_k


def _refuse_budget(site: str, moe: MoE, keep: int) -> None:
    """Refuse a number of experts that the router cannot choose from.

    Raises:
        PlanError: names the site and the numbers.
    """
    if keep < _chosen_per_token(moe):
        raise PlanError(f"{site}: {keep} experts would remain, the router chooses {moe.top_k} per token")
    if keep % moe.groups:
        raise PlanError(
            f"{site}: its router has {moe.groups} groups of equal size, {keep} experts cannot be; "
            f"keep a multiple of {moe.groups}"
        )
    members = keep // moe.groups
    if moe.groups > 1 and keep < moe.experts and members < 2:
        raise PlanError(f"{site}: {members} experts would remain in each of {moe.groups} groups, needed 2 to rank groups by")
    if moe.groups > 1 and members * moe.top_groups < moe.top_k:
        raise PlanError(
            f"{site}: {moe.top_groups} groups of {members} experts would remain to choose from, "
            f"the router chooses {moe.top_k} per token"
        )


def _best(moe: MoE, scores: Tensor, keep: int) -> tuple[int, ...]:
    """The experts of highest score, equally many of each group."""
    members = moe.experts // moe.groups
    order = torch.argsort(scores.reshape(moe.groups, members), dim=1, descending=True, stable=True)
    chosen = order[:, : keep // moe.groups] + members * torch.arange(moe.groups)[:, None]
    return tuple(sorted(chosen.flatten().tolist()))
