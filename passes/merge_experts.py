"""Merge experts that the router treats alike.

Paper:
    M-SMoE, "Merge, Then Compress" (Li et al. 2023, arXiv:2310.01334).
Formula:
    Dominant experts: the g most chosen ones of each layer (copies of a dominant one only where nothing else is left).
    Every other expert e joins the dominant d with the largest
    ``cos(l_e, l_d)``, l_e = the column of router scores of e over calibration tokens.  Neurons of e are permuted to
    maximise ``sum_i <row_i(d), row_i(e)>`` (assignment over all matrices of the neuron), then
    ``W = sum_e c_e W_e / sum_e c_e`` over the group, c_e = how often e is chosen (equal weights where all are 0).
    The router is unchanged; its choices are mapped to groups, and an expert chosen twice counts with both weights.
Shapes:
    w_in [E, O, H] -> [g, O, H]; w_out [E, H, I] -> [g, H, I]; map [E] int64.
Units:
    c_e counts tokens.
Reads:
    Routing decisions and router scores of every selected mixture.
Changes:
    Expert tensors shrink to g; the index that reaches the mixture passes through the map.
Errors:
    PlanError for more groups than experts, unrecognised routers, packed weights.
Example:
    ``- merge_experts: {groups: 4}``
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
from surgeon.numerics import align_neurons
from surgeon.observe import Routing
from surgeon.rewrite import Editor
from surgeon.structure import MoE, Selection, Structure

SAME = 1e-7
"""Two experts whose score columns have a cosine similarity above 1 - SAME are copies of each other."""


class MergeGroups(Decision):
    """How the experts of one mixture are grouped.

    Attributes:
        site: ``blocks.I.moe``.
        groups: experts of each group, the dominant one first.
        weights: share of each expert in its group's mean, in the same layout.
    """

    groups: tuple[tuple[int, ...], ...]
    weights: tuple[tuple[float, ...], ...]


class MergeExpertsPlan(Plan[MergeGroups]):
    """The groups of every mixture."""


class MergeExperts(Pass[MergeExpertsPlan]):
    """Merge groups of experts into their frequency-weighted mean."""

    name = "merge_experts"
    plan_type = MergeExpertsPlan

    groups: Annotated[int, Field(ge=1)] | None = None
    """Experts that remain in each mixture; give this or ratio."""
    ratio: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of the experts to merge away, rounded down; give this or groups."""
    grouping: Literal["router_logits"] = "router_logits"
    """How experts are grouped: by cosine similarity of their router scores over tokens."""
    align: bool = True
    """Permute the neurons of each expert to match its group's dominant one before averaging."""

    @model_validator(mode="after")
    def _one_budget(self) -> MergeExperts:
        if (self.groups is None) == (self.ratio is None):
            raise ValueError("give either groups or ratio")
        return self

    def observers(self, structure: Structure) -> Mapping[str, Observer]:
        """Choices and scores of every selected mixture."""
        return {
            site.name: Routing(site.part.index, site.part.weight, site.part.logits, site.part.experts)
            for site in structure.moes()
            if site.part.logits is not None
        }

    def plan(self, graph: Graph, structure: Structure, statistics: Statistics) -> MergeExpertsPlan:
        """Group the experts of each mixture around its most chosen ones."""
        decisions, notes = [], []
        for site in structure.moes():
            moe = site.part
            _refuse(graph, site.name, moe)
            count = self.groups if self.groups is not None else moe.experts - int((self.ratio or 0.0) * moe.experts)
            if count > moe.experts:
                raise PlanError(f"{site.name}: {count} groups asked, the mixture has {moe.experts} experts")
            if count == moe.experts:
                notes.append(f"{site.name}: already has {count} experts")
                continue
            observer = statistics[site.name]
            assert isinstance(observer, Routing)
            decisions.append(_group(site.name, observer.counts, observer.similarity(), count))
        if not decisions and not notes:
            raise PlanError("no mixture of experts is selected on this model")
        return MergeExpertsPlan(decisions=tuple(decisions), notes=tuple(notes))

    def check(self, graph: Graph, structure: Structure, plan: MergeExpertsPlan) -> None:
        """Every expert is in exactly one group, and weights add up."""
        sites = {site.name: site.part for site in structure.select(Selection()).moes()}
        for decision in plan.decisions:
            if decision.site not in sites:
                raise PlanError(f"the plan names {decision.site}, which is not a mixture of this model")
            _refuse(graph, decision.site, sites[decision.site])
            experts = sorted(expert for group in decision.groups for expert in group)
            if experts != list(range(sites[decision.site].experts)):
                raise PlanError(
                    f"{decision.site}: groups {decision.groups} must hold each of the "
                    f"{sites[decision.site].experts} experts exactly once"
                )
            shapes = [len(group) for group in decision.groups], [len(weights) for weights in decision.weights]
            if shapes[0] != shapes[1] or any(abs(sum(weights) - 1.0) > 1e-6 for weights in decision.weights):
                raise PlanError(f"{decision.site}: each group needs one weight per expert, adding up to 1")

    def apply(self, editor: Editor, structure: Structure, plan: MergeExpertsPlan, statistics: Statistics) -> None:
        """Average the groups and map the router's choices to them."""
        sites = {site.name: site.part for site in structure.select(Selection()).moes()}
        for decision in plan.decisions:
            moe = sites[decision.site]
            names = [name for name in (moe.w_in, moe.w_out, moe.b_in, moe.b_out) if name is not None]
            merged = self._merge({name: editor.tensor(name).detach() for name in names}, moe, decision)
            table = torch.empty(moe.experts, dtype=torch.int64)
            for number, group in enumerate(decision.groups):
                table[list(group)] = number
            for name, tensor in merged.items():
                editor.set_tensor(name, tensor)
            with editor.before(moe.node):
                chosen = moe.node.args[1]  # not moe.index: pairs of token and expert may be rows of their own
                assert isinstance(chosen, fx.Node)
                read = editor.add_tensor(f"{moe.w_in}_group", table)
                index = editor.call(torch.ops.aten.index.Tensor, read, [chosen])
            moe.node.replace_input_with(chosen, index)

    def _merge(self, tensors: dict[str, Tensor], moe: MoE, decision: MergeGroups) -> dict[str, Tensor]:
        """Weighted means per group, one expert in memory beside the result."""
        merged = {name: tensor.new_empty(len(decision.groups), *tensor.shape[1:]) for name, tensor in tensors.items()}
        for number, (group, weights) in enumerate(zip(decision.groups, decision.weights, strict=True)):
            reference = _neurons(tensors, moe, group[0])
            total = {name: torch.zeros_like(tensor[0], dtype=torch.float32) for name, tensor in tensors.items()}
            for expert, weight in zip(group, weights, strict=True):
                order = None
                if self.align and expert != group[0]:
                    order = align_neurons(reference, _neurons(tensors, moe, expert))
                for name, tensor in tensors.items():
                    total[name] += weight * _permuted(tensor[expert], name, moe, order).float()
            for name in tensors:
                merged[name][number] = total[name].to(merged[name].dtype)
        return merged

    def exact(self, plan: MergeExpertsPlan) -> bool:
        """Merging changes the model unless the experts were equal, which the plan does not know."""
        return not plan.decisions

    def parameter_delta(self, graph: Graph, structure: Structure, plan: MergeExpertsPlan) -> int:
        """The merged experts' tensors; the router stays."""
        sites = {site.name: site.part for site in structure.select(Selection()).moes()}
        delta = 0
        for decision in plan.decisions:
            moe = sites[decision.site]
            for name in (moe.w_in, moe.w_out, moe.b_in, moe.b_out):
                if name is not None:
                    delta -= graph.tensor(name).numel() // moe.experts * (moe.experts - len(decision.groups))
        return delta

    def summary(self, plan: MergeExpertsPlan) -> str:
        """Experts before and after."""
        before = sum(len(group) for decision in plan.decisions for group in decision.groups)
        after = sum(len(decision.groups) for decision in plan.decisions)
        return f"{before} experts merged into {after} in {len(plan.decisions)} mixtures"


def _refuse(graph: Graph, site: str, moe: MoE) -> None:
    if not graph.tensor(moe.w_in).is_floating_point():
        raise PlanError(f"{site}: its experts are quantized already; put merge_experts before quantize")
    if moe.logits is None or moe.router is None:
        raise PlanError(f"{site}: its router was not recognised, so its experts cannot be compared")
    if moe.router.out_features != moe.experts:
        raise PlanError(f"{site}: its experts were merged already ({moe.router.out_features} choices, {moe.experts} experts)")


def _group(site: str, counts: Tensor, similarity: Tensor, groups: int) -> MergeGroups:
    """Most chosen experts lead; the others join the leader whose scores are most like theirs."""
    leaders = _leaders(counts, similarity, groups)
    home = similarity[:, leaders].argmax(dim=1)
    home[leaders] = torch.arange(groups)
    members = tuple(
        (leader, *(e for e in (home == number).nonzero().flatten().tolist() if e != leader))
        for number, leader in enumerate(leaders.tolist())
    )
    weights = []
    for group in members:
        used = counts[list(group)]
        share = used / used.sum() if float(used.sum()) > 0 else torch.full_like(used, 1.0 / len(group))
        weights.append(tuple(share.tolist()))
    return MergeGroups(site=site, groups=members, weights=tuple(weights))


def _leaders(counts: Tensor, similarity: Tensor, groups: int) -> Tensor:
    """The most chosen experts, ascending; one that scores exactly as a leader does waits until nothing else is left.

    Two copies of one expert are chosen equally often: without this both would lead, and an expert unlike either would
    have to be merged in the second one's place.
    """
    chosen: list[int] = []
    copies: list[int] = []
    for expert in torch.argsort(counts, descending=True, stable=True).tolist():
        is_copy = bool(chosen) and float(similarity[expert, chosen].max()) > 1.0 - SAME
        (copies if is_copy else chosen).append(expert)
    return torch.tensor((chosen + copies)[:groups]).sort().values


def _neurons(tensors: dict[str, Tensor], moe: MoE, expert: int) -> Tensor:
    """All weights of each neuron of one expert, [I, features]: input rows (gate and up), input biases, output column."""
    rows = tensors[moe.w_in][expert].float()
    parts = list(rows.chunk(2)) if moe.gated else [rows]
    parts.append(tensors[moe.w_out][expert].float().T)
    if moe.b_in is not None:
        bias = tensors[moe.b_in][expert].float()[:, None]
        parts += list(bias.chunk(2)) if moe.gated else [bias]
    return torch.cat(parts, dim=1)


def _permuted(tensor: Tensor, name: str, moe: MoE, order: Tensor | None) -> Tensor:
    """One expert's tensor with its neurons in another order."""
    if order is None or name == moe.b_out:
        return tensor
    if name == moe.w_out:
        return tensor[:, order]
    return torch.cat([half[order] for half in tensor.chunk(2)]) if moe.gated else tensor[order]
