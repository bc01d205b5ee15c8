"""Turn a dense feed-forward network into a mixture of experts by splitting its neurons.

Paper:
    MoEfication (Zhang et al. 2021, arXiv:2110.01786): balanced k-means on the rows of the input matrix; LLaMA-MoE
    (Zhu et al. 2024, arXiv:2406.16554) for gated FFNs.
Formula:
    The I neurons are split into E sets of I/E by balanced k-means on their L2-normalised input rows (gate rows where
    the FFN is gated).  ``y = sum_{e in top-k(r(x))} E_e(x) + b``: chosen experts are summed without weights, so that
    k = E is the dense FFN exactly.
    router ``centroid``: ``r_e(x) = <x, c_e>``, c_e = mean normalised row of set e.
    router ``linear``: ridge regression of the captured activation mass ``s_e(x) = sum_{i in e} |h_i(x)|`` on x.
Shapes:
    up (and gate) [I, H], down [H, I] -> w_in [E, I/E or 2 I/E, H], w_out [E, H, I/E], router [E, H].
Units:
    s_e has the units of the intermediate activation h.
Reads:
    With router ``linear``: the FFN's input and intermediate activation, on the already-changed model.
Changes:
    The FFN becomes a router, top-k and one ``surgeon::moe``; the down bias stays outside.
Errors:
    PlanError where experts do not divide the width, top_k exceeds experts, the activation was not recognised, or the
    weights are packed.
Example:
    ``- moefy_ffn: {experts: 8, top_k: 2, blocks: "4:"}``
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

import surgeon.ops  # noqa: F401  # registers torch.ops.surgeon
from surgeon.accounting import freed_parameter_count
from surgeon.contract import Decision, Observer, Pass, Plan, Statistics
from surgeon.errors import PlanError
from surgeon.graph import Graph
from surgeon.numerics import balanced_kmeans, centroid_router, members, ridge_regression
from surgeon.observe import AbsoluteRegression
from surgeon.rewrite import Editor
from surgeon.structure import FFN, Linear, Selection, Structure

aten = torch.ops.aten


class SplitFFN(Decision):
    """How one FFN is split.

    Attributes:
        site: ``blocks.I.ffn``.
        experts: neurons of each expert, all of one size.
        top_k: experts per token.
    """

    experts: tuple[tuple[int, ...], ...]
    top_k: Annotated[int, Field(ge=1)]


class MoefyFFNPlan(Plan[SplitFFN]):
    """The split of every selected FFN."""


class MoefyFFN(Pass[MoefyFFNPlan]):
    """Split dense FFNs into experts of which each token uses a few."""

    name = "moefy_ffn"
    scope: ClassVar[Literal["model", "block"]] = "block"
    plan_type = MoefyFFNPlan
    apply_reads_statistics = True

    experts: Annotated[int, Field(ge=2)]
    """Number of experts; must divide the FFN's width."""
    top_k: Annotated[int, Field(ge=1)]
    """Experts that each token uses."""
    split: Literal["kmeans"] = "kmeans"
    """How neurons are grouped: balanced k-means on their normalised input rows."""
    router: Literal["linear", "centroid"] = "linear"
    """linear: regression of each expert's activation mass on calibration data; centroid: the cluster centres, no data."""
    seed: int = 0
    """Seed of the k-means initialisation."""

    @model_validator(mode="after")
    def _top_k_fits(self) -> MoefyFFN:
        if self.top_k > self.experts:
            raise ValueError(f"top_k {self.top_k} exceeds experts {self.experts}")
        return self

    def observers(self, structure: Structure) -> Mapping[str, Observer]:
        """Moments of input and activation magnitude."""
        if self.router != "linear":
            return {}
        return {site.name: AbsoluteRegression(site.part.input, site.part.hidden) for site in structure.ffns()}

    def plan(self, graph: Graph, structure: Structure, statistics: Statistics) -> MoefyFFNPlan:
        """Cluster the neurons of every selected FFN."""
        decisions = []
        for site in structure.ffns():
            ffn = site.part
            _refuse(graph, site.name, ffn)
            if ffn.width % self.experts:
                raise PlanError(
                    f"{site.name}: {self.experts} experts do not divide its width {ffn.width}; "
                    f"these do: {', '.join(map(str, _divisors(ffn.width)))}"
                )
            rows = torch.nn.functional.normalize(_rows(graph, ffn.gate or ffn.up).float(), dim=1)
            clustering = balanced_kmeans(rows, self.experts, seed=self.seed)
            sets = members(clustering.labels, self.experts).tolist()
            decisions.append(SplitFFN(site=site.name, experts=tuple(map(tuple, sets)), top_k=self.top_k))
        return MoefyFFNPlan(decisions=tuple(decisions))

    def check(self, graph: Graph, structure: Structure, plan: MoefyFFNPlan) -> None:
        """FFNs exist, and every neuron is in exactly one expert."""
        sites = {site.name: site.part for site in structure.select(Selection()).ffns()}
        for decision in plan.decisions:
            if decision.site not in sites:
                raise PlanError(f"the plan splits {decision.site}, which is not an FFN of this model")
            ffn = sites[decision.site]
            _refuse(graph, decision.site, ffn)
            sizes = {len(expert) for expert in decision.experts}
            neurons = sorted(neuron for expert in decision.experts for neuron in expert)
            if len(sizes) != 1 or neurons != list(range(ffn.width)):
                raise PlanError(
                    f"{decision.site}: its {ffn.width} neurons must be in exactly one expert each, "
                    f"and experts of one size; the plan has sizes {sorted(sizes)} and {len(neurons)} neurons"
                )
            if decision.top_k > len(decision.experts):
                raise PlanError(f"{decision.site}: top_k {decision.top_k} exceeds its {len(decision.experts)} experts")

    def apply(self, editor: Editor, structure: Structure, plan: MoefyFFNPlan, statistics: Statistics) -> None:
        """Replace each FFN by a router and a mixture."""
        sites = {site.name: site.part for site in structure.select(Selection()).ffns()}
        for decision in plan.decisions:
            ffn = sites[decision.site]
            router, router_bias = self._router(editor.graph, ffn, decision, statistics)
            _replace(editor, ffn, decision, router, router_bias)

    def _router(
        self, graph: Graph, ffn: FFN, decision: SplitFFN, statistics: Statistics
    ) -> tuple[Tensor, Tensor | None]:
        """Weight [E, H] and bias [E] of the router's linear."""
        order, count = torch.tensor(decision.experts).flatten(), len(decision.experts)
        labels = torch.empty_like(order)
        labels[order] = torch.arange(count).repeat_interleave(ffn.width // count)
        rows = _rows(graph, ffn.gate or ffn.up)
        if self.router == "centroid":
            return centroid_router(torch.nn.functional.normalize(rows.float(), dim=1), labels, count).to(rows.dtype), None
        observer = statistics[decision.site]
        assert isinstance(observer, AbsoluteRegression)
        assert observer.second_moment is not None
        assert observer.cross_moment is not None
        mass = observer.cross_moment.new_zeros(observer.cross_moment.shape[0], count)
        mass.index_add_(1, labels, observer.cross_moment)
        solution = ridge_regression(observer.second_moment, mass).to(rows.dtype)
        return solution[:-1].T.contiguous(), solution[-1].contiguous()

    def exact(self, plan: MoefyFFNPlan) -> bool:
        """With every expert active the mixture is the dense FFN."""
        return all(decision.top_k == len(decision.experts) for decision in plan.decisions)

    def parameter_delta(self, graph: Graph, structure: Structure, plan: MoefyFFNPlan) -> int:
        """The routers come on top; the neurons only move."""
        sites = {site.name: site.part for site in structure.select(Selection()).ffns()}
        bias = 1 if self.router == "linear" else 0
        delta = 0
        for decision in plan.decisions:
            ffn = sites[decision.site]
            linears = [part for part in (ffn.gate, ffn.up, ffn.down) if part is not None]
            names = {part.weight for part in linears} | {part.bias for part in linears[:-1] if part.bias is not None}
            moved = sum(
                part.in_features * part.out_features + (part.out_features if part.bias and part is not ffn.down else 0)
                for part in linears
            )
            freed = freed_parameter_count(graph, [part.node for part in linears], names)
            delta += len(decision.experts) * (ffn.up.in_features + bias) + moved - freed
        return delta

    def summary(self, plan: MoefyFFNPlan) -> str:
        """Number of FFNs and the shape of the mixtures."""
        shapes = sorted({(d.top_k, len(d.experts)) for d in plan.decisions})
        return f"{len(plan.decisions)} FFNs split: " + ", ".join(f"top-{k} of {e} experts" for k, e in shapes)


def _refuse(graph: Graph, site: str, ffn: FFN) -> None:
    for part in (ffn.gate, ffn.up, ffn.down):
        if part is not None and not graph.tensor(part.weight).is_floating_point():
            raise PlanError(f"{site}: its weights are quantized already; put moefy_ffn before quantize")
    if ffn.activation is None:
        raise PlanError(f"{site}: its activation function was not recognised, so its neurons cannot be split")


def _rows(graph: Graph, linear: Linear) -> Tensor:
    """Weight of a linear as [out, in], only the rows that belong to it."""
    weight = graph.tensor(linear.weight).detach()
    weight = weight.T if linear.transposed else weight
    return weight if linear.rows is None else weight[linear.rows[0] : linear.rows[1]]


def _biases(graph: Graph, linear: Linear) -> Tensor | None:
    if linear.bias is None:
        return None
    bias = graph.tensor(linear.bias).detach()
    return bias if linear.rows is None else bias[linear.rows[0] : linear.rows[1]]


def _replace(editor: Editor, ffn: FFN, decision: SplitFFN, router: Tensor, router_bias: Tensor | None) -> None:
    graph, count = editor.graph, len(decision.experts)
    size = ffn.width // count
    order = torch.tensor(decision.experts).flatten()
    inputs = [part for part in (ffn.gate, ffn.up) if part is not None]
    stacked = [_rows(graph, part)[order].reshape(count, size, -1) for part in inputs]
    w_in = torch.cat(stacked, dim=1)
    w_out = _rows(graph, ffn.down)[:, order].reshape(-1, count, size).transpose(0, 1).contiguous()
    biases = [_biases(graph, part) for part in inputs]
    b_in = None
    if any(bias is not None for bias in biases):
        filled = [bias if bias is not None else w_in.new_zeros(ffn.width) for bias in biases]
        b_in = torch.cat([bias[order].reshape(count, size) for bias in filled], dim=1)
    name = ffn.up.weight.rpartition(".")[0] or ffn.up.weight
    with editor.before(ffn.down.node):
        x = editor.current(ffn.input)
        flat = editor.call(aten.reshape.default, x, [-1, ffn.up.in_features])
        router_args = [editor.add_tensor(f"{name}.router.weight", router)]
        if router_bias is not None:
            router_args.append(editor.add_tensor(f"{name}.router.bias", router_bias))
        logits = editor.call(aten.linear.default, flat, *router_args)
        top = editor.call(aten.topk.default, logits, decision.top_k)
        values = editor.call(operator.getitem, top, 0)
        index = editor.call(operator.getitem, top, 1)
        weight = editor.call(aten.ones_like.default, values)
        mixed = editor.call(
            torch.ops.surgeon.moe.default,
            flat,
            index,
            weight,
            editor.add_tensor(f"{name}.experts.w_in", w_in),
            editor.add_tensor(f"{name}.experts.w_out", w_out),
            None if b_in is None else editor.add_tensor(f"{name}.experts.b_in", b_in),
            None,
            ffn.activation,
        )
        out = editor.call(aten.reshape.default, mixed, editor.sizes(ffn.down.node))
        if ffn.down.bias is not None:
            out = editor.call(aten.add.Tensor, out, editor.read(ffn.down.bias))
    editor.replace(ffn.down.node, out)


def _divisors(number: int) -> Iterator[int]:
    return (d for d in range(2, number + 1) if number % d == 0 and d <= 256)
