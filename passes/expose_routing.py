"""Give out how tokens are routed, and optionally take it as an input instead.

Paper:
    Recorded routing replayed in another engine or another step, as reinforcement learning on mixtures of experts needs it:
    Rollout Routing Replay (Ma et al. 2025, arXiv:2510.11370) and PR2 (Dong et al. 2026, arXiv:2606.00395).
Formula:
    Outputs ``SITE.experts`` and ``SITE.weights``: what the mixture is given, ``y_t = sum_j weight[t, j] E_experts[t, j](x_t)``.
    ``replay``: with inputs e' and w', named ``replay.SITE.experts`` and ``replay.SITE.weights``,
    ``e = where(e' >= 0, e', e_router)`` and likewise w, so that what was recorded comes out exactly, and a token with -1 is
    routed by the model.
Shapes:
    experts int64 and weights, [tokens, k] in the leading dimensions of the hidden state, as a rule [batch, sequence, k].
Units:
    experts counts from 0; weights are the factors of the experts' outputs.
Reads:
    Nothing.
Changes:
    Outputs, and with ``replay`` inputs, are added; they may be left out of a call.  No weight and no other output changes.
    With ``replay`` the experts are chosen by an input, so that backends cannot use kernels that choose them themselves.
Errors:
    PlanError where a name is taken, where the weights scale the experts' inputs, or with ``replay`` where the number of
    tokens does not follow from the inputs.
Example:
    ``- expose_routing: {replay: true, blocks: "4:"}``; as the last pass that changes the mixtures.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import fx

from surgeon.contract import Decision, Pass, Plan, Statistics
from surgeon.errors import PlanError
from surgeon.graph import Graph
from surgeon.rewrite import Editor
from surgeon.routes import OWN, RECORDED, REPLAYED, recorded_names, replayed_names
from surgeon.structure import MoE, Selection, Site, Structure

aten = torch.ops.aten


class ExposedSite(Decision):
    """One mixture whose routing is given out.

    Attributes:
        site: ``blocks.I.moe``.
        replay: and taken as an input.
    """

    replay: bool = False


class ExposeRoutingPlan(Plan[ExposedSite]):
    """The mixtures whose routing is given out."""


class ExposeRouting(Pass[ExposeRoutingPlan]):
    """Return the routing decisions of mixtures, and replay them."""

    name = "expose_routing"
    plan_type = ExposeRoutingPlan

    replay: bool = False
    """Take decisions as inputs too; a call that leaves them out is routed by the model."""

    def plan(self, graph: Graph, structure: Structure, statistics: Statistics) -> ExposeRoutingPlan:
        """Every selected mixture."""
        decisions = [ExposedSite(site=site.name, replay=self.replay) for site in structure.moes()]
        if not decisions:
            raise PlanError("no mixture of experts is selected on this model")
        plan = ExposeRoutingPlan(decisions=tuple(decisions))
        self.check(graph, structure, plan)
        return plan

    def check(self, graph: Graph, structure: Structure, plan: ExposeRoutingPlan) -> None:
        """Mixtures exist, and their ports have names and sizes."""
        sites = {site.name: site for site in structure.select(Selection()).moes()}
        taken = {port.name for port in (*graph.inputs, *graph.outputs)}
        for decision in plan.decisions:
            if decision.site not in sites:
                raise PlanError(f"the plan names {decision.site}, which is not a mixture of this model")
            site = sites[decision.site]
            found = sorted(taken & {*recorded_names(site.name), *replayed_names(site.name)})
            if found:
                raise PlanError(f"{site.name}: the model has a port {', '.join(found)} already; its routing was exposed before")
            if site.part.input_scaled:
                raise PlanError(f"{site.name}: its weights scale the experts' inputs, which is not replayed; leave it out")
            if decision.replay and "?" in _dimensions(graph, structure, site):
                raise PlanError(
                    f"{site.name}: the number of its tokens does not follow from the model's inputs; use replay: false"
                )

    def apply(self, editor: Editor, structure: Structure, plan: ExposeRoutingPlan, statistics: Statistics) -> None:
        """Add the ports."""
        sites = {site.name: site for site in structure.select(Selection()).moes()}
        for decision in plan.decisions:
            site = sites[decision.site]
            moe = site.part
            shape = _dimensions(editor.graph, structure, site)
            values = [editor.current(node) for node in (moe.index, moe.weight)]
            if decision.replay:
                values = _replayed(editor, site.name, moe, shape, values)
            like = _tokens_like(structure, site)
            with editor.after(moe.node):
                if like is not None:
                    lead = editor.sizes(like)[:-1]
                    values = [editor.call(aten.reshape.default, value, [*lead, -1]) for value in values]  # k may change
            for name, value in zip(recorded_names(site.name), values, strict=True):
                editor.add_output(name, value, RECORDED)

    def exact(self, plan: ExposeRoutingPlan) -> bool:
        """The other outputs stay as they are."""
        return True

    def parameter_delta(self, graph: Graph, structure: Structure, plan: ExposeRoutingPlan) -> int:
        """No weight changes."""
        return 0

    def summary(self, plan: ExposeRoutingPlan) -> str:
        """Number of mixtures, and whether they replay."""
        replays = sum(decision.replay for decision in plan.decisions)
        return f"routing of {len(plan.decisions)} mixtures given out" + (f", of {replays} taken" if replays else "")


def _replayed(
    editor: Editor, site: str, moe: MoE, shape: tuple[int | str, ...], own: list[fx.Node]
) -> list[fx.Node]:
    """Experts and weights [T, k] from inputs, where these say any."""
    names = replayed_names(site)
    dtypes = [value.meta["val"].dtype for value in own]
    inputs = [
        editor.add_input(name, dtype, shape, REPLAYED, fill)
        for name, dtype, fill in zip(names, dtypes, (OWN, 0.0), strict=True)
    ]
    with editor.before(moe.node):
        flat = [editor.call(aten.reshape.default, value, [-1, moe.top_k]) for value in inputs]
        given = editor.call(aten.ge.Scalar, flat[0], 0)
        chosen = [editor.call(aten.where.self, given, new, old) for new, old in zip(flat, own, strict=True)]
    for old, new in zip(own, chosen, strict=True):
        editor.redirect(moe.node, old, new)
    return chosen


def _tokens_like(structure: Structure, site: Site[MoE]) -> fx.Node | None:
    """The hidden state whose leading dimensions are the mixture's tokens, None where they are not."""
    assert site.block is not None
    entry = structure.blocks[site.block].entry
    tokens: Any = prod(entry.meta["val"].shape[:-1])
    count = site.part.index.meta["val"].shape[0]
    return entry if _expression(tokens) == _expression(count) else None


def _expression(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size


def _dimensions(graph: Graph, structure: Structure, site: Site[MoE]) -> tuple[int | str, ...]:
    """Shape of the mixture's ports."""
    like = _tokens_like(structure, site)
    leading = site.part.index.meta["val"] if like is None else like.meta["val"]
    return (*Editor(graph).dimensions(leading)[:-1], site.part.top_k)
