"""Remove the experts of a mixture that are chosen least.

Paper:
    SEER-MoE (Muzio et al. 2024, arXiv:2404.05089), hard counting; Unified MoE Compression (He et al. 2024,
    arXiv:2406.02500), Expert Drop.
Formula:
    ``c_e = sum_t 1[e in top-k(t)]`` over calibration tokens; in each layer the experts of smallest c_e go.
Shapes:
    w_in [E, O, H], w_out [E, H, I], router [E, H] -> the same with E' experts.
Units:
    c_e counts tokens.
Reads:
    The routing decisions of every selected mixture.
Changes:
    Expert tensors, router rows and per-expert corrections are sliced; top-k stays.
Errors:
    PlanError where fewer than top-k experts would remain, where the router was not recognised, or on packed weights.
Example:
    ``- drop_experts: {keep: 6}`` or ``- drop_experts: {ratio: 0.25}``
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, fx

from surgeon.contract import Decision, Observer, Pass, Plan, Statistics
from surgeon.errors import PlanError
from surgeon.graph import Graph
from surgeon.observe import Routing
from surgeon.rewrite import Editor
from surgeon.structure import MoE, Selection, Site, Structure


class KeepExperts(Decision):
    """The experts of one mixture that stay.

    Attributes:
        site: ``blocks.I.moe``.
        keep: their indices, ascending.
        scores: c_e of every expert, share of all choices.
    """

    keep: tuple[int, ...]
    scores: tuple[float, ...] = ()


class DropExpertsPlan(Plan[KeepExperts]):
    """Which experts stay in each mixture."""


class DropExperts(Pass[DropExpertsPlan]):
    """Remove the least used experts and their router rows."""

    name = "drop_experts"
    plan_type = DropExpertsPlan

    keep: Annotated[int, Field(ge=1)] | None = None
    """Experts to keep in each mixture; give this or ratio."""
    ratio: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of the experts to remove from each mixture, rounded down; give this or keep."""
    criterion: Literal["frequency"] = "frequency"
    """How experts are ranked: how often they are chosen on calibration data."""

    @model_validator(mode="after")
    def _one_budget(self) -> DropExperts:
        if (self.keep is None) == (self.ratio is None):
            raise ValueError("give either keep or ratio")
        return self

    def observers(self, structure: Structure) -> Mapping[str, Observer]:
        """Routing counts of every selected mixture."""
        return {s.name: Routing(s.part.index, s.part.weight, None, s.part.experts) for s in structure.moes()}

    def plan(self, graph: Graph, structure: Structure, statistics: Statistics) -> DropExpertsPlan:
        """Keep the most chosen experts of each mixture."""
        decisions, notes = [], []
        for site in structure.moes():
            moe = site.part
            refuse_opaque(graph, site)
            keep = self.keep if self.keep is not None else moe.experts - int((self.ratio or 0.0) * moe.experts)
            if keep > moe.experts:
                raise PlanError(f"{site.name}: keep {keep} asked, the mixture has {moe.experts} experts")
            if keep < moe.top_k:
                raise PlanError(f"{site.name}: {keep} experts would remain, the router chooses {moe.top_k} per token")
            if keep == moe.experts:
                notes.append(f"{site.name}: all {keep} experts stay")
                continue
            observer = statistics[site.name]
            assert isinstance(observer, Routing)
            order = torch.argsort(observer.counts, descending=True, stable=True)
            share = observer.counts / observer.counts.sum().clamp_min(1.0)
            decisions.append(
                KeepExperts(site=site.name, keep=tuple(sorted(order[:keep].tolist())), scores=tuple(share.tolist()))
            )
        if not decisions and not notes:
            raise PlanError("no mixture of experts is selected on this model")
        return DropExpertsPlan(decisions=tuple(decisions), notes=tuple(notes))

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
            if len(decision.keep) < moe.top_k:
                raise PlanError(f"{decision.site}: {len(decision.keep)} experts would remain, the router chooses {moe.top_k}")

    def apply(self, editor: Editor, structure: Structure, plan: DropExpertsPlan, statistics: Statistics) -> None:
        """Slice experts, router and corrections."""
        sites = {site.name: site.part for site in structure.select(Selection()).moes()}
        for decision in plan.decisions:
            slice_experts(editor, sites[decision.site], torch.tensor(decision.keep))

    def exact(self, plan: DropExpertsPlan) -> bool:
        """Removing experts changes the model, unless none is removed."""
        return not plan.decisions

    def parameter_delta(self, graph: Graph, structure: Structure, plan: DropExpertsPlan) -> int:
        """The removed experts' share of every sliced tensor."""
        sites = {site.name: site.part for site in structure.select(Selection()).moes()}
        delta = 0
        for decision in plan.decisions:
            moe = sites[decision.site]
            for name, _ in sliced_tensors(graph, moe):
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


def sliced_tensors(graph: Graph, moe: MoE) -> list[tuple[str, int]]:
    """Names and expert dimensions of all tensors with one entry per expert: experts, router, corrections of its scores."""
    assert moe.router is not None
    assert moe.logits is not None
    found = [(name, 0) for name in (moe.w_in, moe.w_out, moe.b_in, moe.b_out) if name is not None]
    found.append((moe.router.weight, 1 if moe.router.transposed else 0))
    if moe.router.bias is not None:
        found.append((moe.router.bias, 0))
    known = {name for name, _ in found}
    for node in _selection_nodes(moe):
        for source in node.all_input_nodes:
            if source.op == "get_attr" and str(source.target) not in known:
                shape = list(graph.tensor(str(source.target)).shape)
                if shape.count(moe.experts) == 1:
                    known.add(str(source.target))
                    found.append((str(source.target), shape.index(moe.experts)))
    return found


def slice_experts(editor: Editor, moe: MoE, keep: Tensor) -> None:
    """Keep only some experts of a mixture."""
    for name, axis in sliced_tensors(editor.graph, moe):
        editor.set_tensor(name, editor.tensor(name).detach().index_select(axis, keep))


def _selection_nodes(moe: MoE) -> set[fx.Node]:
    """Nodes between the router's scores and the choice."""
    after: set[fx.Node] = set()
    frontier = [moe.logits] if moe.logits is not None else []
    while frontier:
        for user in frontier.pop().users:
            if user not in after and user is not moe.node:
                after.add(user)
                frontier.append(user)
    before: set[fx.Node] = set()
    frontier = [moe.index, moe.weight]
    while frontier:
        node = frontier.pop()
        if node in after and node not in before:
            before.add(node)
            frontier.extend(node.all_input_nodes)
    return before
