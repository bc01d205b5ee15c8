"""Turn a dense feed-forward network into a mixture of copies of itself, or of the FFNs of several checkpoints.

Paper:
    Sparse Upcycling (Komatsuzaki et al. 2022, arXiv:2212.05055); Upcycling Large Language Models into Mixture of Experts
    (He et al. 2024, arXiv:2410.07524): virtual groups and their scales; Drop-Upcycling (Nakamura et al. 2025,
    arXiv:2502.19261) and Qwen1.5-MoE: partial re-initialisation; Branch-Train-MiX (Sukhbaatar et al. 2024,
    arXiv:2403.07816): experts of several checkpoints, everything else averaged, as in UpIT (Hui et al. 2024,
    arXiv:2410.01610); Skywork-MoE (Wei et al. 2024, arXiv:2406.06563): copies; mergekit-moe: routers from hidden states.
Formula:
    E copies of the FFN, each cut into G shards of I/G neurons: N = E G experts, expert i is shard i mod G of copy i // G.
    Router rows of the shards of one copy are equal, so a token's T experts are T/G whole copies.
    ``y = sum_{i in top-T(r)} w_i E_i(x) + b``; gate ``topk_softmax``: ``w = s softmax(r over the chosen)``;
    ``softmax_topk``: ``p = softmax(r)``, ``w_i = s p_i / sum of the chosen p`` (scaling ``parity``) or ``s p_i``
    (``published``).
    scaling ``parity``: ``s = G``, on the down projection only: the weights of the chosen sum to s, so y is the dense
    FFN exactly.  ``published``: ``s = G`` (topk_softmax) or ``s = E G^2 / T`` (softmax_topk), spread over the matrices
    as ``s^(1/3)`` each where gated and ``s^(1/2)`` otherwise: exact for relu without biases and p uniform, else near.
    ``noise``: ``W + noise std(W) n``, n normal.  ``reinitialise``: that share of every copy's neurons is drawn anew from
    N(mean, std) of the weights they had.
    router ``random``: rows N(0, router_std).  ``clusters``: unit centroids of balanced k-means on the FFN's inputs.
    ``texts``: row e is the mean over its positive texts of the mean input over the text, less that of its negative
    ones, divided by its norm.
Shapes:
    up (and gate) [I, H], down [G, I] -> w_in [N, I/G or 2 I/G, H], w_out [N, G, I/G], router [N, H].
Units:
    noise is relative to each matrix's standard deviation; reinitialise is a share of neurons.
Reads:
    The FFN's input on calibration data (router ``clusters``) or on the given texts (``texts``); the checkpoints.
Changes:
    The FFN becomes a router, top-k and one ``surgeon::moe``; the down bias stays outside.  With ``checkpoints`` every
    other weight becomes the mean over the model and the checkpoints.
Errors:
    PlanError where granularity does not divide the width, top_k exceeds the experts or is no multiple of granularity,
    a checkpoint has another shape, the activation was not recognised, or calibration data never reaches the FFN.
Example:
    ``- upcycle_ffn: {experts: 8, top_k: 2}`` or
    ``- upcycle_ffn: {experts: 64, granularity: 8, top_k: 8, reinitialise: 0.5}`` or
    ``- upcycle_ffn: {checkpoints: [code-model, law-model], top_k: 2, router: clusters}``
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from surgeon import splits
from surgeon.companions import average, companions
from surgeon.contract import Decision, Observer, Pass, Plan, Seed, Statistics
from surgeon.data import collate, tokenizer_for
from surgeon.errors import PlanError
from surgeon.graph import Graph
from surgeon.mixtures import Experts, Neurons, add_mixture, ffn_name, flattened, freed_parameters, put_in_place, refuse_ffn
from surgeon.numerics import NumericsError, output_scale, perturbed, redrawn, virtual_group_rows, weight_scale
from surgeon.observe import MeanValue, observe
from surgeon.rewrite import Editor
from surgeon.routers import Choice, Router
from surgeon.samples import Sample
from surgeon.structure import FFN, Selection, Structure

aten = torch.ops.aten


class Texts(BaseModel):
    """What one expert is for."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    positive: tuple[str, ...]
    """Texts that this expert shall see."""
    negative: tuple[str, ...] = ()
    """Texts that it shall not see."""


class UpcycleOne(Decision):
    """How one FFN is upcycled.

    Attributes:
        site: ``blocks.I.ffn``.
        experts: N.
        granularity: G, shards of each copy.
        top_k: T.
        scale: s.
    """

    experts: Annotated[int, Field(ge=2)]
    granularity: Annotated[int, Field(ge=1)]
    top_k: Annotated[int, Field(ge=1)]
    scale: float


class UpcycleFFNPlan(Plan[UpcycleOne]):
    """The mixtures that are made."""


class UpcycleFFN(Pass[UpcycleFFNPlan]):
    """Make mixtures of experts from copies of dense FFNs, or from several checkpoints of one shape."""

    name = "upcycle_ffn"
    plan_type = UpcycleFFNPlan
    apply_reads_statistics = True
    heals = False

    experts: Annotated[int, Field(ge=2)] | None = None
    """Number of experts; with checkpoints they decide: granularity times one more than there are checkpoints."""
    top_k: Annotated[int, Field(ge=1)]
    """Experts that each token uses; a multiple of granularity."""
    granularity: Annotated[int, Field(ge=1)] = 1
    """Shards that every copy is cut into (virtual groups); divides the experts and the FFN's width."""
    gate: Literal["topk_softmax", "softmax_topk"] = "topk_softmax"
    """Softmax over the chosen experts' scores, or over all before the choice."""
    scaling: Literal["parity", "published"] = "parity"
    """parity: the mixture starts as the dense FFN, exactly; published: the paper's scales on all matrices."""
    noise: Annotated[float, Field(ge=0)] = 0.0
    """Standard deviation of noise on every copy but the first, relative to that of each matrix."""
    reinitialise: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the neurons of every copy but the first that are drawn anew."""
    checkpoints: tuple[Path, ...] = ()
    """Checkpoints of the model's own shape: each gives a copy, the model itself the first; the rest is averaged."""
    router: Literal["random", "clusters", "texts"] = "random"
    """How router rows start: at random, as centroids of calibration inputs, or as hidden states of given texts."""
    router_std: Annotated[float, Field(gt=0)] = 0.02
    """Standard deviation of random router rows."""
    texts: tuple[Texts, ...] = ()
    """For router texts: the texts of each copy."""
    tokens: Annotated[int, Field(ge=32)] = 8192
    """Calibration tokens that are kept for router clusters."""
    seed: Seed = 0
    """Seed of routers, noise, re-initialisation and clustering."""

    @model_validator(mode="after")
    def _fields_fit(self) -> UpcycleFFN:
        if self.checkpoints and self.experts is not None and self.experts != self._copies() * self.granularity:
            raise ValueError(
                f"{len(self.checkpoints)} checkpoints and the model at granularity {self.granularity} make "
                f"{self._copies() * self.granularity} experts, not {self.experts}"
            )
        if not self.checkpoints and self.experts is None:
            raise ValueError("give experts or checkpoints")
        if self.experts is not None and self.experts % self.granularity:
            raise ValueError(f"experts {self.experts} is no multiple of granularity {self.granularity}")
        if self.top_k > self._copies() * self.granularity:
            raise ValueError(f"top_k {self.top_k} exceeds experts {self._copies() * self.granularity}")
        if self.top_k % self.granularity:
            raise ValueError(f"top_k {self.top_k} is no multiple of granularity {self.granularity}: copies would be torn")
        if (self.router == "texts") != bool(self.texts):
            raise ValueError("router texts needs texts, one entry per copy, and they are for it alone")
        if self.texts and len(self.texts) != self._copies():
            raise ValueError(f"texts has {len(self.texts)} entries, one for each of {self._copies()} copies is needed")
        return self

    def _copies(self) -> int:
        return 1 + len(self.checkpoints) if self.experts is None or self.checkpoints else self.experts // self.granularity

    def observers(self, structure: Structure) -> Mapping[str, Observer]:
        """The FFN's inputs, for router clusters."""
        if self.router != "clusters":
            return {}
        return {s.name: Sample(s.part.input, limit=self.tokens, seed=self.seed) for s in structure.ffns()}

    def plan(self, graph: Graph, structure: Structure, statistics: Statistics) -> UpcycleFFNPlan:
        """One mixture for every selected FFN."""
        plan = self._listed(graph, structure)
        for decision in plan.decisions:
            if getattr(statistics.get(decision.site), "tokens", 1) == 0:
                raise PlanError(f"{decision.site}: calibration data never reached it (no unmasked token)")
        companions(graph, structure, self.checkpoints)  # refuses what does not fit
        return plan

    def _listed(self, graph: Graph, structure: Structure) -> UpcycleFFNPlan:
        """The plan, before data and checkpoints are looked at."""
        decisions, copies = [], self._copies()
        sites = list(structure.ffns())
        if not sites:
            raise PlanError("the selected blocks hold no feed-forward network to upcycle")
        for site in sites:
            refuse_ffn(self.name, graph, site.name, site.part)
            if site.part.width % self.granularity:
                raise PlanError(f"{site.name}: granularity {self.granularity} does not divide its width {site.part.width}")
            normalised = self.gate == "topk_softmax" or self.scaling == "parity"
            scale = output_scale(copies, self.granularity, self.top_k, normalised=normalised)
            decisions.append(
                UpcycleOne(
                    site=site.name,
                    experts=copies * self.granularity,
                    granularity=self.granularity,
                    top_k=self.top_k,
                    scale=scale,
                )
            )
        return UpcycleFFNPlan(decisions=tuple(decisions))

    def check(self, graph: Graph, structure: Structure, plan: UpcycleFFNPlan) -> None:
        """FFNs exist, and the numbers divide."""
        sites = {site.name: site.part for site in structure.select(Selection()).ffns()}
        for d in plan.decisions:
            if d.site not in sites:
                raise PlanError(f"the plan upcycles {d.site}, which is not an FFN of this model")
            refuse_ffn(self.name, graph, d.site, sites[d.site])
            if sites[d.site].width % d.granularity:
                raise PlanError(f"{d.site}: granularity {d.granularity} does not divide its width {sites[d.site].width}")
            if d.experts % d.granularity or d.top_k % d.granularity or d.top_k > d.experts:
                raise PlanError(
                    f"{d.site}: top_k {d.top_k} and experts {d.experts} must be multiples of granularity {d.granularity}, "
                    "and top_k at most experts"
                )
            made = self._copies() * d.granularity
            if self.checkpoints and d.experts != made:
                raise PlanError(f"{d.site}: {self._copies()} models make {made} experts, not {d.experts}")

    def apply(self, editor: Editor, structure: Structure, plan: UpcycleFFNPlan, statistics: Statistics) -> None:
        """Build the experts, average the rest, replace each FFN."""
        sites = {site.name: site.part for site in structure.select(Selection()).ffns()}
        others = companions(editor.graph, structure, self.checkpoints)
        rows = self._text_rows(editor.graph, {d.site: sites[d.site] for d in plan.decisions})
        generator = torch.Generator().manual_seed(self.seed)
        made = {}
        for decision in plan.decisions:
            sources = [editor.graph, *(other.graph for other in others)]
            ffns = [sites[decision.site], *(other.ffns[decision.site] for other in others)]
            neurons = [Neurons.of(graph, ffn) for graph, ffn in zip(sources, ffns, strict=True)]
            if not others:
                neurons = neurons * (decision.experts // decision.granularity)
            made[decision.site] = self._experts(neurons, decision, generator)
        if others:
            average(editor, others)
        for decision in plan.decisions:
            try:
                router = self._router(sites[decision.site], decision, rows, statistics, generator)
            except NumericsError as error:
                raise PlanError(f"{decision.site}: {error}") from error
            self._replace(editor, sites[decision.site], decision, made[decision.site], router)

    def rehearse(self, editor: Editor, structure: Structure, plan: UpcycleFFNPlan | None) -> None:
        """Routers and mixtures of the same sizes."""
        if plan is None:
            plan = self._listed(editor.graph, structure)
        self.check(editor.graph, structure, plan)
        sites = {site.name: site.part for site in structure.select(Selection()).ffns()}
        for decision in plan.decisions:
            ffn = sites[decision.site]
            copies = [Neurons.of(editor.graph, ffn).hollow] * (decision.experts // decision.granularity)
            dtype = ffn.input.meta["val"].dtype
            router = Router.hollow(ffn.up.in_features, decision.experts, bias=False, dtype=dtype)
            self._replace(editor, ffn, decision, self._experts(copies, decision, None), router)

    def _experts(self, copies: list[Neurons], decision: UpcycleOne, generator: torch.Generator | None) -> Experts:
        """The stacked shards of all copies; without a generator they are alike."""
        shards = torch.arange(copies[0].up.shape[0]).reshape(decision.granularity, -1)
        if self.checkpoints:
            generator = None
        each = [
            (neurons if generator is None or number == 0 else self._changed(neurons, generator)).experts(shards)
            for number, neurons in enumerate(copies)
        ]
        spread = weight_scale(decision.scale, gated=copies[0].gate is not None)
        inner, outer = (spread, spread) if self.scaling == "published" else (1.0, decision.scale)
        return Experts(
            w_in=torch.cat([part.w_in for part in each]) * inner,
            w_out=torch.cat([part.w_out for part in each]) * outer,
            b_in=None if each[0].b_in is None else torch.cat([p.b_in for p in each if p.b_in is not None]) * inner,
            b_out=None,
        )

    def _changed(self, neurons: Neurons, generator: torch.Generator) -> Neurons:
        """A copy told apart by noise and by neurons that are drawn anew, the same neurons in every matrix."""
        width = neurons.up.shape[0]
        chosen = torch.randperm(width, generator=generator)[: int(self.reinitialise * width)]

        def changed(matrix: Tensor) -> Tensor:
            matrix = redrawn(matrix, chosen, generator)
            return perturbed(matrix, self.noise, generator) if self.noise else matrix

        return Neurons(
            gate=None if neurons.gate is None else changed(neurons.gate),
            up=changed(neurons.up),
            down=changed(neurons.down.T).T,
            gate_bias=neurons.gate_bias,
            up_bias=neurons.up_bias,
            down_bias=neurons.down_bias,
            activation=neurons.activation,
        )

    def _router(
        self, ffn: FFN, decision: UpcycleOne, rows: Mapping[str, Tensor], statistics: Statistics, generator: torch.Generator
    ) -> Router:
        copies = decision.experts // decision.granularity
        if self.router == "random":
            row = torch.randn(copies, ffn.up.in_features, generator=generator) * self.router_std
        elif self.router == "clusters":
            sample = statistics[decision.site]
            assert isinstance(sample, Sample)
            row = torch.nn.functional.normalize(splits.token_clusters(sample.values()[0], copies, self.seed), dim=1)
        else:
            row = rows[decision.site]
        dtype = ffn.input.meta["val"].dtype
        return Router({"weight": virtual_group_rows(row, decision.granularity).to(dtype)})

    def _text_rows(self, graph: Graph, ffns: Mapping[str, FFN]) -> dict[str, Tensor]:
        """For router texts: by site, the unit row of every copy, [E, H]."""
        if self.router != "texts":
            return {}
        tokenizer = tokenizer_for(graph)
        wanted = {port.name for port in graph.inputs}

        def mean(texts: tuple[str, ...]) -> dict[str, Tensor]:
            total: dict[str, Tensor] = {}
            for text in texts:
                encoded = tokenizer(text)
                batch = collate([{key: encoded[key] for key in encoded if key in wanted}], graph, tokenizer)
                observers = {site: MeanValue(ffn.input) for site, ffn in ffns.items()}
                observe(graph, [batch], observers)
                for site, observer in observers.items():
                    total[site] = total.get(site, 0) + observer.mean / len(texts)
            return total

        found: dict[str, list[Tensor]] = {site: [] for site in ffns}
        for entry in self.texts:
            positive, negative = mean(entry.positive), mean(entry.negative)
            for site in ffns:
                found[site].append(positive[site] - negative[site] if negative else positive[site])
        return {site: torch.nn.functional.normalize(torch.stack(each), dim=1) for site, each in found.items()}

    def _replace(self, editor: Editor, ffn: FFN, decision: UpcycleOne, experts: Experts, router: Router) -> None:
        name = ffn_name(ffn)
        assert ffn.activation is not None
        with editor.before(ffn.down.node):
            flat = flattened(editor, ffn)
            scores = router.add(editor, f"{name}.router", flat)
            if self.gate == "softmax_topk":
                scores = editor.call(aten.softmax.int, scores, -1)
                weighting: Any = "share" if self.scaling == "parity" else "score"
            else:
                weighting = "softmax"
            index, weight = Choice("top_k", decision.top_k, weighting=weighting).add(editor, scores)
            mixed = add_mixture(editor, name, flat, index, weight, experts, ffn.activation)
            put_in_place(editor, ffn, [mixed], ffn.down.bias)

    def exact(self, plan: UpcycleFFNPlan) -> bool:
        """Copies that are alike, weighed so that they sum to one copy."""
        alike = not (self.checkpoints or self.noise or self.reinitialise)
        return alike and (
            self.scaling == "parity" or (self.gate == "topk_softmax" and all(d.granularity == 1 for d in plan.decisions))
        )

    def parameter_delta(self, graph: Graph, structure: Structure, plan: UpcycleFFNPlan) -> int:
        """E copies and the router, less the FFN."""
        sites = {site.name: site.part for site in structure.select(Selection()).ffns()}
        delta = 0
        for decision in plan.decisions:
            ffn, copies = sites[decision.site], decision.experts // decision.granularity
            matrices = 2 if ffn.gate is not None else 1
            biased = any(part.bias for part in (ffn.gate, ffn.up) if part is not None)
            per_neuron = matrices * (ffn.up.in_features + biased) + ffn.down.out_features
            delta += copies * ffn.width * per_neuron + decision.experts * ffn.up.in_features
        return delta - freed_parameters(graph, [sites[d.site] for d in plan.decisions], keep_down_bias=True)

    def summary(self, plan: UpcycleFFNPlan) -> str:
        """Number of FFNs and the shape of the mixtures."""
        shapes = sorted({(d.top_k, d.experts, d.granularity) for d in plan.decisions})
        listing = ", ".join(f"top-{k} of {e} experts" + (f", {g} to a copy" if g > 1 else "") for k, e, g in shapes)
        return f"{len(plan.decisions)} FFNs upcycled: {listing}"


