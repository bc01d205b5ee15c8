"""Make the key/value groups of attention experts that are routed to token by token.

Paper:
    LLaMA-MoE v2 (Qu et al. 2024, arXiv:2411.15708), attention MoE: one expert per key/value head.
Formula:
    Group g holds key/value head g, the query heads that read it, and their columns O_g of the output projection:
    ``y = sum_{g shared} O_g a_g(x) + sum_{g chosen} w_g O_g a_g(x) + b``, a_g the heads' results, joined.  Routing is by
    the token that asks: keys and values are those of all tokens, so a chosen group sees the whole context.
    router ``linear`` (ridge regression) or ``mlp`` (one hidden layer) predicts ``|O_g a_g(x)|_2`` from x.
    shared: the groups of largest mean ``|O_g a_g|_2``.
    select ``top_k``, ``dynamic_k`` and ``threshold``, as ``moefy_ffn``, over the R routed groups.
    scaling ``sum``: w = 1, preserves what each group contributes, and the attention where all are chosen.
    ``expectation``: w = R / (number chosen), preserves the expected output if groups were chosen by lot.  ``softmax``:
    w = R softmax(r over the chosen), the same for equal scores, and lets gradients reach the router.  ``least_squares``:
    one w per layer, least squared error of the output on calibration data.
Shapes:
    x [T, H]; a [T, G c], c = (query heads / G) times the size of a value head; O [H, G c]; router [R, H].
Units:
    The router's prediction has the units of the attention's output.
Reads:
    The attention's input and what its output projection reads, on the already-changed model.
Changes:
    A router is added; the results of groups that are not chosen are multiplied by 0 before the output projection.
    Projections and products are still computed for all groups: what is saved is left to a kernel that reads the mask.
Errors:
    PlanError where top_k and shared do not fit the groups, there is one group only, a projection was not recognised or
    is packed, or calibration data never reaches the attention.
Example:
    ``- moefy_attention: {top_k: 1, shared: 1}`` or ``- moefy_attention: {select: dynamic_k, threshold: 0.3}``
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, fx

from surgeon.contract import Decision, Observer, Pass, Plan, Seed, Statistics
from surgeon.errors import PlanError
from surgeon.graph import Graph
from surgeon.mixtures import rows
from surgeon.numerics import NumericsError, output_factor, train_linear_router, train_mlp_router
from surgeon.rewrite import Editor
from surgeon.routers import Choice, Router
from surgeon.samples import Sample
from surgeon.structure import Attention, Linear, Selection, Site, Structure

aten = torch.ops.aten


class RouteGroups(Decision):
    """How one attention is routed.

    Attributes:
        site: ``blocks.I.attention``.
        groups: number of key/value groups.
        shared: groups that every token uses, ascending.
        top_k: routed groups that a token uses at most.
        norms: mean norm of each group's contribution on calibration data.
    """

    groups: Annotated[int, Field(ge=2)]
    shared: tuple[int, ...] = ()
    top_k: Annotated[int, Field(ge=1)]
    norms: tuple[float, ...] = ()

    def routed(self) -> list[int]:
        """The other groups, ascending."""
        return [group for group in range(self.groups) if group not in self.shared]


class MoefyAttentionPlan(Plan[RouteGroups]):
    """Shared and routed groups of every selected attention."""


class MoefyAttention(Pass[MoefyAttentionPlan]):
    """Route tokens to a few key/value groups of attention."""

    name = "moefy_attention"
    scope: ClassVar[Literal["model", "block"]] = "block"
    plan_type = MoefyAttentionPlan
    apply_reads_statistics = True

    top_k: Annotated[int, Field(ge=1)] | None = None
    """Routed groups that each token uses; with select dynamic_k or threshold the most it may use, all by default."""
    shared: Annotated[int, Field(ge=0)] = 0
    """Groups that every token uses: those that contribute most."""
    router: Literal["linear", "mlp"] = "linear"
    """How the norm of each group's contribution is predicted."""
    select: Literal["top_k", "dynamic_k", "threshold"] = "top_k"
    """Which groups run: the top_k largest, or those whose prediction reaches a share of the largest, or of the sum."""
    threshold: Annotated[float, Field(ge=0, le=1)] | None = None
    """The share for select dynamic_k or threshold; 0 runs every group."""
    scaling: Literal["sum", "expectation", "softmax", "least_squares"] = "sum"
    """Weights of the chosen groups, by what they preserve: contributions, the expected output (two ways), least error."""
    router_width: Annotated[int, Field(ge=1)] = 128
    """Hidden width of an mlp router."""
    router_steps: Annotated[int, Field(ge=1)] = 600
    """Training steps of an mlp router."""
    tokens: Annotated[int, Field(ge=32)] = 8192
    """Calibration tokens that are kept to fit the router."""
    seed: Seed = 0
    """Seed of the sample and of router training."""

    @model_validator(mode="after")
    def _fields_fit(self) -> MoefyAttention:
        if self.select == "top_k":
            if self.top_k is None:
                raise ValueError("select top_k needs top_k")
            if self.threshold is not None:
                raise ValueError("threshold is for select dynamic_k or threshold; select is top_k")
        elif self.threshold is None:
            raise ValueError(f"select {self.select} needs threshold")
        return self

    def observers(self, structure: Structure) -> Mapping[str, Observer]:
        """Tokens of the attention's input and of what its output projection reads."""
        found: dict[str, Observer] = {}
        for site in structure.attentions():
            query, output = site.part.q, site.part.o
            if query is not None and output is not None:
                found[site.name] = Sample(query.input, output.input, limit=self.tokens, seed=self.seed)
        return found

    def plan(self, graph: Graph, structure: Structure, statistics: Statistics) -> MoefyAttentionPlan:
        """Choose the shared groups of every selected attention."""
        decisions = []
        for site in structure.attentions():
            _, output = _projections(graph, site)
            groups = site.part.kv_heads
            if groups < 2:
                raise PlanError(f"{site.name}: it has one key/value group, so there is nothing to route between")
            routed = groups - self.shared
            if routed < 1 or (self.top_k or 1) > routed:
                raise PlanError(
                    f"{site.name}: top_k {self.top_k or 1} and shared {self.shared} asked, it has {groups} key/value groups"
                )
            norms = _contributions(graph, output, groups, graph.placed(_sampled(statistics, site.name)[1])).mean(0)
            shared = norms.topk(self.shared).indices.sort().values
            decisions.append(
                RouteGroups(
                    site=site.name,
                    groups=groups,
                    shared=tuple(shared.tolist()),
                    top_k=self.top_k or routed,
                    norms=tuple(norms.tolist()),
                )
            )
        return MoefyAttentionPlan(decisions=tuple(decisions))

    def check(self, graph: Graph, structure: Structure, plan: MoefyAttentionPlan) -> None:
        """Attentions exist, with that many groups."""
        sites = {site.name: site for site in structure.select(Selection()).attentions()}
        for decision in plan.decisions:
            if decision.site not in sites:
                raise PlanError(f"the plan routes {decision.site}, which is not an attention of this model")
            site = sites[decision.site]
            _projections(graph, site)
            if decision.groups != site.part.kv_heads:
                raise PlanError(
                    f"{decision.site}: the plan has {decision.groups} groups, it has {site.part.kv_heads} key/value groups"
                )
            shared = set(decision.shared)
            fits = len(shared) == len(decision.shared) and shared <= set(range(decision.groups))
            if not fits or decision.top_k > decision.groups - len(shared):
                raise PlanError(
                    f"{decision.site}: shared {list(decision.shared)} and top_k {decision.top_k} do not fit "
                    f"{decision.groups} groups"
                )

    def apply(self, editor: Editor, structure: Structure, plan: MoefyAttentionPlan, statistics: Statistics) -> None:
        """Add a router and a mask to every attention."""
        sites = {site.name: site for site in structure.select(Selection()).attentions()}
        for decision in plan.decisions:
            query, output = _projections(editor.graph, sites[decision.site])
            x, results = editor.graph.placed(_sampled(statistics, decision.site))
            try:
                router = self._router(editor.graph, output, decision, x, results)
                choice = self._choice(editor.graph, output, decision, router, x, results)
            except NumericsError as error:
                raise PlanError(f"{decision.site}: {error}") from error
            _mask(editor, query, output, decision, router, choice)

    def _router(self, graph: Graph, output: Linear, decision: RouteGroups, x: Tensor, results: Tensor) -> Router:
        targets = _contributions(graph, output, decision.groups, results)[:, decision.routed()]
        if self.router == "linear":
            weight, bias = train_linear_router(x, targets)
            return Router({"weight": weight.to(x.dtype), "bias": bias.to(x.dtype)})
        trained = train_mlp_router(x, targets, width=self.router_width, steps=self.router_steps, seed=self.seed)
        keys = ("hidden.weight", "hidden.bias", "weight", "bias")
        return Router({key: tensor.to(x.dtype) for key, tensor in zip(keys, trained, strict=True)})

    def _choice(
        self, graph: Graph, output: Linear, decision: RouteGroups, router: Router, x: Tensor, results: Tensor
    ) -> Choice:
        routed = decision.routed()
        threshold = self.threshold or 0.0
        if self.scaling in ("expectation", "softmax"):
            weighting: Literal["count", "softmax"] = "count" if self.scaling == "expectation" else "softmax"
            return Choice(self.select, decision.top_k, threshold, weighting, float(len(routed)))
        choice = Choice(self.select, decision.top_k, threshold)
        if self.scaling == "sum":
            return choice
        index, weight = choice.choose(router.scores(x))
        runs = torch.zeros(x.shape[0], len(routed), dtype=x.dtype, device=x.device).scatter(1, index, weight)
        parts = results.reshape(x.shape[0], decision.groups, -1)[:, routed]
        matrix = graph.placed(rows(graph, output)).reshape(-1, decision.groups, parts.shape[2])[:, routed].flatten(1)
        found = (parts * runs[:, :, None]).flatten(1) @ matrix.T
        wanted = parts.flatten(1) @ matrix.T
        return replace(choice, factor=output_factor(found, wanted, "least_squares"))

    def exact(self, plan: MoefyAttentionPlan) -> bool:
        """With every group chosen nothing is masked."""
        all_run = self.select == "top_k" or self.threshold == 0.0
        whole = all(decision.top_k == len(decision.routed()) for decision in plan.decisions)
        return all_run and whole and self.scaling != "softmax"

    def parameter_delta(self, graph: Graph, structure: Structure, plan: MoefyAttentionPlan) -> int:
        """The routers."""
        sites = {site.name: site for site in structure.select(Selection()).attentions()}
        delta = 0
        for decision in plan.decisions:
            inputs, routed = _projections(graph, sites[decision.site])[0].in_features, len(decision.routed())
            if self.router == "mlp":
                delta += self.router_width * (inputs + 1) + routed * (self.router_width + 1)
            else:
                delta += routed * (inputs + 1)
        return delta

    def summary(self, plan: MoefyAttentionPlan) -> str:
        """Number of attentions and their groups."""
        shapes = sorted({(d.top_k, len(d.routed()), len(d.shared)) for d in plan.decisions})
        listing = ", ".join(f"at most {k} of {r} groups" + (f" beside {s} shared" if s else "") for k, r, s in shapes)
        return f"{len(plan.decisions)} attentions routed: {listing}"


def _projections(graph: Graph, site: Site[Attention]) -> tuple[Linear, Linear]:
    """Query and output projection.

    Raises:
        PlanError: one of them is not known, or is packed, factored, joined with another or cut unevenly.
    """
    query, output = site.part.q, site.part.o
    if query is None or output is None:
        missing = "query" if query is None else "output"
        raise PlanError(f"{site.name}: its {missing} projection was not recognised, so its groups cannot be routed")
    if not graph.tensor(output.weight).is_floating_point():
        raise PlanError(f"{site.name}: its output projection is quantized already; put moefy_attention before quantize")
    if output.factors:
        raise PlanError(f"{site.name}: its output projection was factored already; put moefy_attention before low_rank")
    if output.columns is not None:
        raise PlanError(f"{site.name}: its output projection {output.weight} is one matrix with that of another part beside it")
    if output.in_features % site.part.kv_heads:
        raise PlanError(
            f"{site.name}: its output projection reads {output.in_features} features, "
            f"which {site.part.kv_heads} key/value groups do not divide"
        )
    source, result = query.input.meta["val"].shape[:-1], output.input.meta["val"].shape[:-1]
    if list(map(str, source)) != list(map(str, result)):
        raise PlanError(
            f"{site.name}: its queries are made from positions {_positions(source)}, its results are at {_positions(result)}"
        )
    return query, output


def _positions(sizes: torch.Size) -> str:
    return f"[{', '.join(str(size) if isinstance(size, int) else '*' for size in sizes)}]"  # * is dynamic


def _sampled(statistics: Statistics, site: str) -> list[Tensor]:
    sample = statistics[site]
    assert isinstance(sample, Sample)
    if sample.tokens == 0:
        raise PlanError(f"{site}: calibration data never reached it (no unmasked token), so there is nothing to go by")
    return sample.values()


def _contributions(graph: Graph, output: Linear, groups: int, results: Tensor) -> Tensor:
    """``|O_g a_g|`` of every token and group, results [T, G c] -> [T, G]."""
    parts = results.chunk(groups, dim=1)
    columns = graph.placed(rows(graph, output)).chunk(groups, dim=1)
    return torch.stack([(part @ column.T).norm(dim=1) for part, column in zip(parts, columns, strict=True)], dim=1)


def _mask(
    editor: Editor, query: Linear, output: Linear, decision: RouteGroups, router: Router, choice: Choice
) -> None:
    routed = decision.routed()
    name = output.weight.rpartition(".")[0] or output.weight
    with editor.before(output.node):
        x = editor.call(aten.reshape.default, editor.current(query.input), [-1, query.in_features])
        scores = router.add(editor, f"{name}.router", x)
        index, weight = choice.add(editor, scores)
        runs = editor.call(aten.scatter.src, editor.call(aten.zeros_like.default, scores), 1, index, weight)
        if decision.shared:
            runs = _with_shared(editor, runs, decision, routed)
        results = editor.current(output.input)
        parts = editor.call(aten.reshape.default, results, [-1, decision.groups, output.in_features // decision.groups])
        masked = editor.call(aten.mul.Tensor, parts, editor.call(aten.unsqueeze.default, runs, -1))
        whole = editor.call(aten.reshape.default, masked, editor.sizes(output.input))
    editor.redirect(output.node, results, whole)


def _with_shared(editor: Editor, runs: fx.Node, decision: RouteGroups, routed: list[int]) -> fx.Node:
    """Weights [T, R] of the routed groups -> [T, G], 1 for shared ones, in the order of the groups."""
    ones = editor.call(aten.slice.Tensor, editor.call(aten.ones_like.default, runs), 1, 0, 1)
    columns = []
    for group in range(decision.groups):
        if group in decision.shared:
            columns.append(ones)
        else:
            position = routed.index(group)
            columns.append(editor.call(aten.slice.Tensor, runs, 1, position, position + 1))
    return editor.call(aten.cat.default, columns, 1)
