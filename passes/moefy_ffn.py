"""Turn a dense feed-forward network into a mixture of experts by splitting its neurons.

Paper:
    MoEfication (Zhang et al. 2021, arXiv:2110.01786): splits ``kmeans`` and ``coactivation``, router ``similarity``.
    LLaMA-MoE (Zhu et al. 2024, arXiv:2406.16554): gated FFNs, splits ``random`` and ``importance``, softmax weights.
    LLaMA-MoE v2 (Qu et al. 2024, arXiv:2411.15708): shared experts.  D2DMoE (Szatkowski et al. 2024, arXiv:2310.04361):
    routers that predict the norm of an expert's output, ``dynamic_k``.  FactorLLM (Zhao et al. 2024, arXiv:2408.11855): equal
    parts and a router fitted to what the dense FFN does (their training of both afterwards is not part of this pass).
Formula:
    The I neurons are cut into E parts of I/E; ``shared`` of the parts are dense, the other R are routed experts:
    ``y = shared(x) + sum_{e chosen} w_e E_e(x) + b``.
    split ``kmeans``: balanced k-means on L2-normalised input rows (gate rows where the FFN is gated).
    ``coactivation``: balanced partition of the graph with ``A_ij = cos over tokens (|h_i|, |h_j|)``.
    ``importance``: tokens are clustered into R clusters by the FFN's input; expert c takes the neurons of largest
    ``v_ci = mean over tokens of c of |h_i dL/dh_i|`` (``|h_i|`` where the model has no loss), each neuron once so that
    the sum is greatest, or with ``overlap`` whatever the others take.  ``random``: shuffled.
    shared neurons: those that most clusters (``importance``) or most tokens count among their I/E most important ones.
    router ``centroid``: ``r_e = <x, c_e>``, c_e the mean normalised row of expert e (for ``importance`` the nearest of
    the clusters' centroids, ``<x, c_e> - |c_e|^2 / 2``).  ``similarity``: ``r_e = -|x / |x| - c_e|^2``.
    ``linear`` (ridge regression) and ``mlp`` (one hidden layer, relu, mean squared error) predict the target: ``mass``,
    ``sum_{i in e} |h_i|``, or ``norm``, ``|E_e(x)|_2``.
    select ``top_k``: the k largest.  ``dynamic_k``: those with ``r_e >= threshold max_j r_j`` (the paper's tau is
    1 - threshold).  ``threshold``: those with ``r_e >= threshold sum_j r_j``; the largest always; at most ``top_k``.
    scaling ``sum``: w = 1, preserves what each neuron contributes, and the dense FFN where all run.
    ``expectation``: w = R / (number that run), preserves the expected output if experts were chosen by lot.
    ``softmax``: w = R softmax(r over the chosen), the same for equal scores, and lets gradients reach the router: for
    training afterwards, since predictions as large as these make one expert weigh nearly all.
    ``norm``: one w per layer, preserves the root mean square of the routed output on calibration data.
    ``least_squares``: one w per layer, least squared error there (preserves the part that lies along the output).
    ``mean_output``: w = 1, an expert that does not run is replaced by its mean output over the calibration tokens that
    skipped it: preserves the mean output there, and the dense FFN where all run.
Shapes:
    up (and gate) [I, H], down [G, I] -> w_in [R, I/E or 2 I/E, H], w_out [R, G, I/E], router [R, H].
Units:
    mass has the units of the intermediate activation h, norm those of the output, importance those of the loss.
Reads:
    The FFN's input, and for ``mass`` with ``linear`` its intermediate activation, on the already-changed model; for
    ``importance`` also the derivative of the loss at its output, on the model before the pass.
Changes:
    The FFN becomes a router, a selection and one ``surgeon::moe`` (and a dense FFN for shared neurons); the down bias
    stays outside.  Experts that are not chosen have weight exactly 0.
Errors:
    PlanError where experts do not divide the width, top_k exceeds the routed experts, the activation was not recognised,
    the weights are packed or factored, or calibration data never reaches the FFN.
Example:
    ``- moefy_ffn: {experts: 8, top_k: 2, blocks: "4:"}`` or
    ``- moefy_ffn: {experts: 16, router: mlp, target: norm, select: dynamic_k, threshold: 0.4}``
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from surgeon import splits
from surgeon.contract import Decision, Observer, Pass, Plan, Seed, Statistics, placed
from surgeon.errors import PlanError
from surgeon.expert_routers import fitted, from_sums, towards_clusters, towards_rows
from surgeon.graph import Graph
from surgeon.mixtures import Neurons, freed_parameters, refuse_ffn, replace_by_experts
from surgeon.moments import AbsoluteRegression
from surgeon.numerics import NumericsError, output_factor
from surgeon.rewrite import Editor
from surgeon.routers import Choice, Router
from surgeon.samples import GradientSample, Sample
from surgeon.structure import FFN, Selection, Site, Structure

_EXACT_SCALING = ("sum", "expectation", "norm", "least_squares", "mean_output")


class SplitFFN(Decision):
    """How one FFN is split.

    Attributes:
        site: ``blocks.I.ffn``.
        experts: neurons of each routed expert, all of one size.
        top_k: experts that a token uses at most.
        shared: neurons that stay dense.
    """

    experts: tuple[tuple[int, ...], ...]
    top_k: Annotated[int, Field(ge=1)]
    shared: tuple[int, ...] = ()

    def partitions(self, width: int) -> bool:
        """Whether every neuron is in exactly one place."""
        placed = [neuron for part in (*self.experts, self.shared) for neuron in part]
        return sorted(placed) == list(range(width))


class MoefyFFNPlan(Plan[SplitFFN]):
    """The split of every selected FFN."""


class MoefyFFN(Pass[MoefyFFNPlan]):
    """Split dense FFNs into experts of which each token uses a few."""

    name = "moefy_ffn"
    scope: ClassVar[Literal["model", "block"]] = "block"
    plan_type = MoefyFFNPlan
    apply_reads_statistics = True
    heals = False

    experts: Annotated[int, Field(ge=2)]
    """Number of parts; must divide the FFN's width. The shared ones are among them."""
    top_k: Annotated[int, Field(ge=1)] | None = None
    """Routed experts that each token uses; with select dynamic_k or threshold the most it may use, all by default."""
    shared: Annotated[int, Field(ge=0)] = 0
    """How many of the parts stay dense, made of the neurons that most experts want."""
    split: Literal["kmeans", "coactivation", "importance", "random"] = "kmeans"
    """How neurons are grouped: by their input rows, by being active together, by importance for clusters of data, by lot."""
    overlap: bool = False
    """With split importance: experts may take the same neuron. Neurons that none takes are lost."""
    importance: Literal["gradient", "activation"] | None = None
    """Importance of a neuron: |h dL/dh| or |h|; by default the first for models that predict next tokens."""
    router: Literal["linear", "mlp", "centroid", "similarity"] = "linear"
    """linear, mlp: predict the target, fitted on calibration data; centroid, similarity: nearness to the centres."""
    target: Literal["mass", "norm"] = "mass"
    """What linear and mlp routers predict of an expert: its sum of |h|, or the norm of its output."""
    select: Literal["top_k", "dynamic_k", "threshold"] = "top_k"
    """Which experts run: the top_k largest, or those whose prediction reaches a share of the largest, or of the sum."""
    threshold: Annotated[float, Field(ge=0, le=1)] | None = None
    """The share for select dynamic_k or threshold; 0 runs every expert."""
    scaling: Literal["sum", "expectation", "softmax", "norm", "least_squares", "mean_output"] = "sum"
    """Weights of the chosen experts, by what they preserve: each neuron's contribution, the expected output (two ways),
    the output's size, least error, or the mean output."""
    router_width: Annotated[int, Field(ge=1)] = 128
    """Hidden width of an mlp router."""
    router_steps: Annotated[int, Field(ge=1)] = 600
    """Training steps of an mlp router."""
    tokens: Annotated[int, Field(ge=32)] = 8192
    """Calibration tokens that are kept where sums over all of them are not enough."""
    seed: Seed = 0
    """Seed of clusterings, samples and router training."""

    @model_validator(mode="after")
    def _fields_fit(self) -> MoefyFFN:
        routed = self.experts - self.shared
        if routed < 2:
            raise ValueError(f"shared {self.shared} of experts {self.experts} leaves fewer than 2 to route to")
        if self.top_k is not None and self.top_k > routed:
            kind = "routed experts" if self.shared else "experts"
            raise ValueError(f"top_k {self.top_k} exceeds {kind} {routed}")
        if self.select == "top_k":
            if self.top_k is None:
                raise ValueError("select top_k needs top_k")
            if self.threshold is not None:
                raise ValueError("threshold is for select dynamic_k or threshold; select is top_k")
        elif self.threshold is None:
            raise ValueError(f"select {self.select} needs threshold")
        elif self.router not in ("linear", "mlp"):
            raise ValueError(f"select {self.select} compares predictions: router linear or mlp, not {self.router}")
        if self.split != "importance" and (self.overlap or self.importance is not None):
            raise ValueError(f"overlap and importance are for split importance; split is {self.split}")
        if self.overlap and self.scaling in ("expectation", "softmax", "mean_output"):
            raise ValueError(f"scaling {self.scaling} needs experts that share no neuron; overlap has sum, norm, least_squares")
        return self

    # -- observing ----------------------------------------------------------------------------------------------

    def observers(self, structure: Structure) -> Mapping[str, Observer]:
        """Sums for a linear router towards mass, and tokens for everything that is not a sum."""
        found: dict[str, Observer] = {}
        kept = (
            self.split == "coactivation"
            or (self.shared > 0 and self.split == "kmeans")
            or self.router == "mlp"
            or (self.router == "linear" and self.target == "norm")
            or self.scaling in ("norm", "least_squares", "mean_output")
        )
        for site in structure.ffns():
            if self.router == "linear" and self.target == "mass":
                found[f"{site.name}.sums"] = AbsoluteRegression(site.part.input, site.part.hidden)
            if kept:
                found[f"{site.name}.sample"] = Sample(site.part.input, limit=self.tokens, seed=self.seed)
            if self.split == "importance" and self.importance == "activation":
                found[f"{site.name}.clusters"] = Sample(site.part.input, limit=self.tokens, seed=self.seed)
            elif self.split == "importance":
                nodes = (site.part.input, site.part.down.node)
                found[f"{site.name}.clusters"] = GradientSample(*nodes, limit=self.tokens, seed=self.seed)
        return found

    # -- planning -----------------------------------------------------------------------------------------------

    def plan(self, graph: Graph, structure: Structure, statistics: Statistics) -> MoefyFFNPlan:
        """Cut the neurons of every selected FFN."""
        decisions = []
        for site in structure.ffns():
            self._refuse(graph, site)
            _refuse_unreached(site, statistics)
            try:
                experts, shared = self._split(graph, site, statistics)
            except NumericsError as error:
                raise PlanError(f"{site.name}: {error}") from error
            decisions.append(
                SplitFFN(
                    site=site.name,
                    experts=tuple(map(tuple, experts.tolist())),
                    top_k=self.top_k or self.experts - self.shared,
                    shared=tuple(shared.tolist()),
                )
            )
        return MoefyFFNPlan(decisions=tuple(decisions))

    def _refuse(self, graph: Graph, site: Site[FFN]) -> None:
        refuse_ffn(self.name, graph, site.name, site.part)
        width = site.part.width
        if width % self.experts:
            raise PlanError(
                f"{site.name}: {self.experts} experts do not divide its width {width}; "
                f"these do: {', '.join(map(str, _divisors(width)))}"
            )

    def _split(self, graph: Graph, site: Site[FFN], statistics: Statistics) -> tuple[Tensor, Tensor]:
        """Neurons of the routed experts [R, m] and of the shared ones [shared m]."""
        neurons, width = graph.placed(Neurons.of(graph, site.part)), site.part.width
        statistics = placed(graph, statistics)
        size, routed = width // self.experts, self.experts - self.shared
        if self.split == "random":
            parts = splits.split_random(width, self.experts, self.seed)
            return parts[self.shared :], parts[: self.shared].flatten().sort().values
        if self.split == "importance":
            importance = self._importance(neurons, site, statistics)
            shared = splits.widely_important(importance, size, self.shared * size).cpu()
            left = splits.without(width, shared)
            return left[splits.split_importance(importance[:, left], size, overlap=self.overlap).cpu()], shared
        shared = torch.empty(0, dtype=torch.int64)
        hidden = None
        if f"{site.name}.sample" in statistics:
            hidden = neurons.hidden(_sampled(statistics, site.name)[0])
            shared = splits.widely_active(hidden, size, self.shared * size).cpu()
        left = splits.without(width, shared)
        if self.split == "kmeans":
            return left[splits.split_kmeans(neurons.keys[left], routed, self.seed).cpu()], shared
        assert hidden is not None
        return left[splits.split_coactivation(hidden[:, left], routed, self.seed).cpu()], shared

    def _importance(self, neurons: Neurons, site: Site[FFN], statistics: Statistics) -> Tensor:
        """[R, I]."""
        observer = statistics[f"{site.name}.clusters"]
        x, *rest = _sampled(statistics, site.name, "clusters")
        gradient = rest[-1] if isinstance(observer, GradientSample) and observer.has_gradient else None
        if self.importance == "gradient" and gradient is None:
            raise PlanError(
                f"{site.name}: importance gradient needs a loss, and this model predicts no next token; use activation"
            )
        routed = self.experts - self.shared
        return splits.importance_by_cluster(x, neurons.hidden(x), neurons.down, gradient, routed, self.seed)

    def check(self, graph: Graph, structure: Structure, plan: MoefyFFNPlan) -> None:
        """FFNs exist, and every neuron is in exactly one place (with overlap: experts name existing neurons once)."""
        sites = {site.name: site.part for site in structure.select(Selection()).ffns()}
        for decision in plan.decisions:
            if decision.site not in sites:
                raise PlanError(f"the plan splits {decision.site}, which is not an FFN of this model")
            ffn = sites[decision.site]
            refuse_ffn(self.name, graph, decision.site, ffn)
            sizes = {len(expert) for expert in decision.experts}
            named = [neuron for part in (*decision.experts, decision.shared) for neuron in part]
            twice = any(len(set(part)) < len(part) for part in (*decision.experts, decision.shared))
            outside = any(not 0 <= neuron < ffn.width for neuron in named)
            if len(sizes) != 1 or twice or outside or not (self.overlap or decision.partitions(ffn.width)):
                raise PlanError(
                    f"{decision.site}: its {ffn.width} neurons must be in exactly one expert each, "
                    f"and experts of one size; the plan has sizes {sorted(sizes)} and {len(named)} neurons"
                )
            if decision.top_k > len(decision.experts):
                raise PlanError(f"{decision.site}: top_k {decision.top_k} exceeds its {len(decision.experts)} experts")

    # -- applying -----------------------------------------------------------------------------------------------

    def apply(self, editor: Editor, structure: Structure, plan: MoefyFFNPlan, statistics: Statistics) -> None:
        """Replace each FFN by a router and a mixture."""
        sites = {site.name: site for site in structure.select(Selection()).ffns()}
        statistics = placed(editor.graph, statistics)
        for decision in plan.decisions:
            site = sites[decision.site]
            _refuse_unreached(site, statistics)
            neurons = editor.graph.placed(Neurons.of(editor.graph, site.part))
            experts = torch.tensor(decision.experts)
            try:
                router = self._router(neurons, experts, decision.site, statistics)
                choice, means = self._choice(neurons, experts, decision, router, statistics)
            except NumericsError as error:
                raise PlanError(f"{decision.site}: {error}") from error
            shared = torch.tensor(decision.shared, dtype=torch.int64)
            replace_by_experts(editor, site.part, neurons, experts, shared, router, choice, means)

    def rehearse(self, editor: Editor, structure: Structure, plan: MoefyFFNPlan | None) -> None:
        """Routers and mixtures of the same sizes; neurons in their order where the plan is not made yet."""
        if plan is None:
            plan = MoefyFFNPlan(decisions=tuple(self._in_order(editor.graph, site) for site in structure.ffns()))
        self.check(editor.graph, structure, plan)
        sites = {site.name: site.part for site in structure.select(Selection()).ffns()}
        for decision in plan.decisions:
            ffn = sites[decision.site]
            neurons, experts = Neurons.of(editor.graph, ffn).hollow, torch.tensor(decision.experts)
            router = self._hollow_router(ffn.up.in_features, len(experts), neurons.up.dtype)
            weighting, factor = self._weighting(len(experts))
            if self.scaling in ("norm", "least_squares"):
                factor *= 2.0  # it comes from data: any but 1, by which nothing is multiplied
            choice = Choice(self.select, decision.top_k, self.threshold or 0.0, weighting, factor)
            means = neurons.up.new_empty(len(experts), ffn.down.out_features) if self.scaling == "mean_output" else None
            shared = torch.tensor(decision.shared, dtype=torch.int64)
            replace_by_experts(editor, ffn, neurons, experts, shared, router, choice, means)

    def _in_order(self, graph: Graph, site: Site[FFN]) -> SplitFFN:
        self._refuse(graph, site)
        parts = torch.arange(site.part.width).reshape(self.experts, -1)
        shared, routed = parts[: self.shared].flatten(), parts[self.shared :]
        return SplitFFN(
            site=site.name,
            experts=tuple(map(tuple, routed.tolist())),
            top_k=self.top_k or len(routed),
            shared=tuple(shared.tolist()),
        )

    def _hollow_router(self, inputs: int, experts: int, dtype: torch.dtype | None = None) -> Router:
        """A router of the form of those that are made, without numbers."""
        hidden = self.router_width if self.router == "mlp" else None
        bias = self.router != "centroid" or self.split == "importance"
        return Router.hollow(inputs, experts, hidden, bias=bias, unit=self.router == "similarity", dtype=dtype)

    def _weighting(self, routed: int) -> tuple[Literal["one", "count", "softmax"], float]:
        """How chosen experts are weighed, and the factor where it is not fitted to data."""
        if self.scaling in ("expectation", "softmax"):
            return "count" if self.scaling == "expectation" else "softmax", float(routed)
        return "one", 1.0

    def _router(self, neurons: Neurons, experts: Tensor, site: str, statistics: Statistics) -> Router:
        dtype = neurons.up.dtype
        if self.router == "centroid" and self.split == "importance":
            x = _sampled(statistics, site, "clusters")[0]
            return towards_clusters(splits.token_clusters(x, experts.shape[0], self.seed), dtype)
        if self.router in ("centroid", "similarity"):
            return towards_rows(neurons.keys, experts, self.router)
        if self.router == "linear" and self.target == "mass":
            sums = statistics[f"{site}.sums"]
            assert isinstance(sums, AbsoluteRegression)
            return from_sums(sums, experts, dtype)
        x = _sampled(statistics, site)[0]
        predicted = neurons.masses if self.target == "mass" else neurons.norms
        hidden = self.router_width if self.router == "mlp" else None
        targets = predicted(neurons.hidden(x), experts)
        return fitted(x, targets, hidden, steps=self.router_steps, seed=self.seed, dtype=dtype)

    def _choice(
        self, neurons: Neurons, experts: Tensor, decision: SplitFFN, router: Router, statistics: Statistics
    ) -> tuple[Choice, Tensor | None]:
        """How experts are chosen and weighed, and for ``mean_output`` the means [R, G] that replace them."""
        routed = experts.shape[0]
        weighting, factor = self._weighting(routed)
        choice = Choice(self.select, decision.top_k, self.threshold or 0.0, weighting, factor)
        if self.scaling not in ("norm", "least_squares", "mean_output"):
            return choice, None
        x = _sampled(statistics, decision.site)[0]
        index, weight = choice.choose(router.scores(x))
        runs = torch.zeros(x.shape[0], routed, dtype=x.dtype, device=x.device).scatter(1, index, weight)
        hidden = neurons.hidden(x)
        if self.scaling == "mean_output":
            return choice, neurons.means_when_skipped(hidden, experts, runs)
        routed_neurons = splits.without(hidden.shape[1], torch.tensor(decision.shared, dtype=torch.int64))
        wanted = hidden[:, routed_neurons] @ neurons.down[:, routed_neurons].T
        preserve: Literal["norm", "least_squares"] = "norm" if self.scaling == "norm" else "least_squares"
        factor = output_factor(neurons.mixed(hidden, experts, runs), wanted, preserve)
        return replace(choice, factor=factor), None

    # -- accounting ---------------------------------------------------------------------------------------------

    def exact(self, plan: MoefyFFNPlan) -> bool:
        """With every expert active the mixture is the dense FFN (where no neuron is lost or doubled)."""
        all_run = self.select == "top_k" or self.threshold == 0.0
        return (
            all_run
            and not self.overlap
            and self.scaling in _EXACT_SCALING
            and all(decision.top_k == len(decision.experts) for decision in plan.decisions)
        )

    def parameter_delta(self, graph: Graph, structure: Structure, plan: MoefyFFNPlan) -> int:
        """The routers come on top; the neurons only move (or are doubled or lost, with overlap)."""
        sites = {site.name: site.part for site in structure.select(Selection()).ffns()}
        delta = 0
        for decision in plan.decisions:
            ffn = sites[decision.site]
            inputs, outputs, count = ffn.up.in_features, ffn.down.out_features, len(decision.experts)
            matrices = 2 if ffn.gate is not None else 1
            biases = sum(part.bias is not None for part in (ffn.gate, ffn.up) if part is not None)
            routed = sum(map(len, decision.experts))
            delta += routed * (matrices * inputs + outputs + (matrices if biases else 0))
            delta += len(decision.shared) * (matrices * inputs + outputs + biases)
            delta += self._hollow_router(inputs, count).numel()
            averaged = self.scaling == "mean_output"
            delta += (count + 1) * outputs if averaged else 0
        split = [sites[decision.site] for decision in plan.decisions]
        return delta - freed_parameters(graph, split, keep_down_bias=self.scaling != "mean_output")

    def summary(self, plan: MoefyFFNPlan) -> str:
        """Number of FFNs and the shape of the mixtures."""
        how = "top" if self.select == "top_k" else "at most"
        shapes = sorted({(d.top_k, len(d.experts), len(d.shared)) for d in plan.decisions})
        listing = ", ".join(
            f"{how}{'-' if how == 'top' else ' '}{k} of {e} experts" + (f" beside {s} shared neurons" if s else "")
            for k, e, s in shapes
        )
        return f"{len(plan.decisions)} FFNs split: {listing}"


def _refuse_unreached(site: Site[FFN], statistics: Statistics) -> None:
    for key, observer in statistics.items():
        if key.startswith(f"{site.name}.") and getattr(observer, "tokens", 1) == 0:
            raise PlanError(f"{site.name}: calibration data never reached it (no unmasked token), so there is nothing to go by")


def _sampled(statistics: Statistics, site: str, kind: str = "sample") -> list[Tensor]:
    observer = statistics[f"{site}.{kind}"]
    assert isinstance(observer, Sample)
    return observer.values()


def _divisors(number: int) -> Iterator[int]:
    return (d for d in range(2, number + 1) if number % d == 0 and d <= 256)
