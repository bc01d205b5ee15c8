"""Merge experts of a mixture that are alike.

Paper:
    M-SMoE, "Merge, Then Compress" (Li et al. 2023, arXiv:2310.01334): leaders by frequency, router logits, alignment.
    HC-SMoE (Chen et al. 2024, arXiv:2410.08589): hierarchical clustering of mean outputs; dominant neurons fixed in zip.
    Sub-MoE (Li et al. 2025, arXiv:2506.23266): k-means by the cosine of outputs, joint singular vectors.  ZipIt (Stoica et
    al. 2023, arXiv:2305.03053).  MEO (He et al. 2023, arXiv:2310.09832): plain sums of experts.  MergeMoE (Miao et al. 2025,
    arXiv:2510.14436): least squares on outputs.  EEP (Liu et al. 2024, arXiv:2407.00945): shares found by an evolutionary
    search, there on a task and over all mixtures at once, here on what each group gave.
Formula:
    Features f_e of the experts: ``router_logits``: the column of router scores of e over calibration tokens; ``outputs``:
    ``mean_t E_e(x_t)`` over all tokens, whether routed to e or not; ``token_outputs``: ``E_e(x_t)`` of all tokens side by
    side; ``output_cosines``: the same, each divided by its norm, so that ``<f_i, f_j> = mean_t cos(E_i(x_t), E_j(x_t))``;
    ``weights``: all of e's weights, its neurons aligned with those of expert 0; ``random``: by lot.
    Groups: ``dominant``: the g most chosen experts lead (a copy of one only where nothing else is left), every other e
    joins the leader of largest ``cos(f_e, f_d)``.  ``ward``: the two clusters are joined, until g are left, whose union
    raises ``sum_e c_e |f_e - mean f of its group|^2`` least, means weighted by c_e, how often e is chosen.  ``kmeans``: the
    same sum by Lloyd's iteration.  ``hierarchical``: the two of least mean ``(c_i c_j / (c_i + c_j))^1/2 |f_i - f_j|``, which
    is what joining two experts costs in ward.
    HC-SMoE and Sub-MoE have c_e = 1, ``weighted: false``, and align no neurons: experts that grew out of one network have
    them in one order.  Their forms are ``{grouping: outputs, clustering: hierarchical, weighted: false, align: false}`` and
    ``{grouping: output_cosines, clustering: kmeans, weighted: false, combination: svd, align: false}``.
    With c_e = 1 it is not known how often an expert is chosen.  On the models of benchmarks/results/moe.md such groups beat
    those by lot where experts have a common origin and are evenly used (tiny-upcycled), and not where they are strangers
    and unevenly used (tiny-mixtral): there they join two in use all the time.  Weighted ones beat a lot on both.
    With ``budget: global`` every layer's k most chosen experts count first, then experts of all layers by
    ``c_e / sum c`` until the budget is reached; so many groups the layer gets.
    Alignment with the group's most chosen expert d: the permutation p of neurons that maximises
    ``sum_i <row_i(d), row_p(i)(e)>`` over all weights of a neuron, or ``sum_i corr(h_i(d), h_p(i)(e))`` over tokens.
    Combination, with a_e = c_e / sum c over the group (equal where all are 0):
    ``frequency``: ``W = sum_e a_e W_e``.  ``mean``: the same with ``a_e = 1 / n``.  ``search``: the same with the a_e that an
    evolutionary search finds to lose least of ``sum_{e in group} w_te E_e(x_t)`` (:mod:`surgeon.expert_search`).
    ``zip``: every neuron joins the neuron of d that it is most like; input rows are averaged with a_e, output columns
    summed with a_e.  ``svd``: ``[W_1 .. W_n] = U S V^T``, ``W = U_r S_r (sum_e a_e V_e,r)^T``, for gate, up and down
    apart; r by default the smaller side of W.
    ``refit``: then ``W_out`` is corrected by the least squares of ``sum_{e in group} w_te E_e(x_t)`` on ``s_t h(x_t)``,
    s_t = sum of the group's weights, with a penalty on the correction.
    The router is unchanged, and with it groups that it selects first, corrections and scales; its choices are mapped to
    the merged experts, and one that is chosen twice counts with both weights.
Shapes:
    w_in [E, O, H] -> [g, O, H]; w_out [E, H, I] -> [g, H, I]; map [E] int64.
Units:
    c_e counts tokens.
Reads:
    Routing decisions of every selected mixture; router scores for ``router_logits``; a sample of the tokens with their
    routing for ``outputs``, ``token_outputs``, ``output_cosines``, ``search``, ``align_by: activations`` and ``refit``.
Changes:
    Expert tensors shrink to g; the index that reaches the mixture passes through the map.
Errors:
    PlanError for more groups than experts or fewer than a token is routed to, routers that were not recognised or whose
    experts were merged before where their scores are compared, packed weights, and calibration data that reaches no
    token of a mixture.
Example:
    ``- merge_experts: {groups: 4}`` or ``- merge_experts: {ratio: 0.5, grouping: outputs, combination: zip, refit: true}``
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, fx

from surgeon.contract import Decision, Observer, Pass, Plan, Seed, Statistics
from surgeon.errors import PlanError
from surgeon.expert_budget import needed
from surgeon.expert_merging import Merger, Routed
from surgeon.expert_search import Search
from surgeon.expert_stack import ExpertStack
from surgeon.graph import Graph
from surgeon.numerics import (
    group_at_random,
    group_by_kmeans,
    group_by_leaders,
    group_by_linkage,
    group_by_ward,
    groups_per_layer,
)
from surgeon.observe import Routing
from surgeon.rewrite import Editor
from surgeon.samples import Sample
from surgeon.structure import MoE, Selection, Site, Structure


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
    """Merge groups of experts that are alike into one expert each."""

    name = "merge_experts"
    plan_type = MergeExpertsPlan

    groups: Annotated[int, Field(ge=1)] | Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)] | None = None
    """Experts that remain in each mixture, one number or one for each selected mixture in turn; give this or ratio."""
    ratio: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of the experts to merge away, rounded down; give this or groups."""
    budget: Literal["layer", "global"] = "layer"
    """Whether every mixture keeps that many, or all together keep that many on average: more where many are in use."""
    grouping: Literal["router_logits", "outputs", "token_outputs", "output_cosines", "weights", "random"] = "router_logits"
    """What makes experts alike: their router scores over tokens, their mean outputs, their outputs token by token, the
    directions of these alone, their weights, or nothing (a lot)."""
    clustering: Literal["dominant", "hierarchical", "ward", "kmeans"] | None = None
    """How groups are found: around the most chosen experts, by average linkage, by Ward's linkage, or by k-means; by default
    dominant for router_logits, hierarchical for weights, ward for all outputs."""
    weighted: bool = True
    """For hierarchical, kmeans: experts count as often as they are chosen, as in ward; false: all alike, as published."""
    combination: Literal["frequency", "mean", "search", "zip", "svd"] = "frequency"
    """How a group becomes one expert: mean weighted by how often each is chosen, plain mean, mean with weights that a search
    finds, neuron by neuron, or by the singular vectors that the group shares."""
    align: bool = True
    """Permute the neurons of each expert to match its group's dominant one before averaging; zip matches them by itself."""
    align_by: Literal["weights", "activations"] = "weights"
    """What neurons are compared by, in align and zip: their weights, or what they do on calibration data."""
    refit: bool = False
    """Fit the down projection of each merged expert to what its group gave on calibration data."""
    rank: Annotated[int, Field(ge=1)] | None = None
    """For svd: singular vectors kept; by default as many as the smaller side of the matrix."""
    population: Annotated[int, Field(ge=2)] = 8
    """For search: candidates that survive a generation, and that it makes."""
    generations: Annotated[int, Field(ge=1)] = 12
    """For search: how often candidates are crossed, moved and compared."""
    tokens: Annotated[int, Field(ge=32)] = 4096
    """Calibration tokens that are kept for outputs, search, align_by: activations and refit; drawn at random beyond that."""
    seed: Seed = 0
    """Seed of random, of kmeans, of search and of the sample of tokens."""

    @model_validator(mode="after")
    def _fields_fit(self) -> MergeExperts:
        if (self.groups is None) == (self.ratio is None):
            raise ValueError("give either groups or ratio")
        if self.budget == "global" and isinstance(self.groups, list):
            raise ValueError("groups: a number for each mixture leaves nothing to budget: global")
        if self.clustering is not None and self.grouping == "random":
            raise ValueError("clustering is for experts that are compared; grouping is random")
        if not self.weighted and self._clustering not in ("hierarchical", "kmeans"):
            raise ValueError(f"weighted is for clustering hierarchical and kmeans; clustering is {self._clustering}")
        if self.rank is not None and self.combination != "svd":
            raise ValueError(f"rank is for combination svd; combination is {self.combination}")
        given = sorted({"population", "generations"} & self.model_fields_set)
        if given and self.combination != "search":
            raise ValueError(f"{' and '.join(given)}: for combination search; combination is {self.combination}")
        return self

    @property
    def apply_reads_statistics(self) -> bool:  # type: ignore[override]  # of one pass, where the class has it for all
        """Neurons compared on tokens, and refits, need the tokens again."""
        return self.refit or self._compares_activations

    @property
    def _clustering(self) -> str:
        return self.clustering or {"router_logits": "dominant", "weights": "hierarchical"}.get(self.grouping, "ward")

    @property
    def _compares_activations(self) -> bool:
        return self.align_by == "activations" and (self.align or self.combination == "zip")

    def observers(self, structure: Structure) -> Mapping[str, Observer]:
        """Routing decisions of every selected mixture, with what the experts are compared by."""
        found: dict[str, Observer] = {}
        for site in structure.moes():
            moe = site.part
            logits = moe.logits if self.grouping == "router_logits" and _scores_experts(moe) else None
            if self.grouping != "random" or self.combination != "mean" or self.budget == "global":
                found[f"{site.name}.routing"] = Routing(moe.index, moe.weight, logits, moe.experts)
            compared = self.grouping in ("outputs", "token_outputs", "output_cosines") or self.combination == "search"
            if compared or self.apply_reads_statistics:
                found[f"{site.name}.sample"] = Sample(*moe.routed, limit=self.tokens, seed=self.seed)
        return found

    def plan(self, graph: Graph, structure: Structure, statistics: Statistics) -> MergeExpertsPlan:
        """Group the experts of each selected mixture."""
        sites = list(structure.moes())
        for site in sites:
            self._refuse(graph, site)
            if any(getattr(statistics.get(f"{site.name}.{kind}"), "tokens", 1) == 0 for kind in ("routing", "sample")):
                raise PlanError(f"{site.name}: calibration data never reached it (no unmasked token)")
        decisions, notes = [], []
        lot = torch.Generator().manual_seed(self.seed)
        for site, groups in zip(sites, self._budgets(sites, statistics), strict=True):
            experts = site.part.experts
            if groups == experts:
                notes.append(f"{site.name}: all {groups} experts stay")
                continue
            counts = _counts(statistics, site)
            labels = group_at_random(experts, groups, lot)
            if self.grouping != "random":
                labels = self._labels(graph, site, statistics, groups)
            idle = int((counts == 0).sum())
            if idle and self.combination != "mean":
                notes.append(f"{site.name}: calibration data never chose {idle} of its {experts} experts; they weigh nothing")
            decision = self._decision(site.name, labels, counts)
            decisions.append(self._searched(graph, site, decision, statistics) if self.combination == "search" else decision)
        if not decisions and not notes:
            raise PlanError("no mixture of experts is selected on this model")
        return MergeExpertsPlan(decisions=tuple(decisions), notes=tuple(notes))

    def _budgets(self, sites: Sequence[Site[MoE]], statistics: Statistics) -> list[int]:
        """Groups of every mixture."""
        if isinstance(self.groups, list):
            if len(self.groups) != len(sites):
                names = ", ".join(site.name for site in sites)
                raise PlanError(f"merge_experts: groups has {len(self.groups)} numbers for {len(sites)} mixtures ({names})")
            wanted = list(self.groups)
        elif self.groups is not None:
            wanted = [self.groups] * len(sites)
        else:
            wanted = [site.part.experts - int((self.ratio or 0.0) * site.part.experts) for site in sites]
        for site, groups in zip(sites, wanted, strict=True):
            _refuse_budget(site.name, site.part, groups)
        if self.budget == "layer":
            return wanted
        counts = [_counts(statistics, site) for site in sites]
        return groups_per_layer(counts, sum(wanted), [needed(site.part) for site in sites])

    def _labels(self, graph: Graph, site: Site[MoE], statistics: Statistics, groups: int) -> Tensor:
        """Group of every expert, [E]."""
        gram = self._gram(graph, site, statistics)
        if self._clustering == "dominant":
            return group_by_leaders(gram, _counts(statistics, site), groups)
        if self._clustering == "ward":
            return group_by_ward(gram, _counts(statistics, site), groups)
        counts = _counts(statistics, site) if self.weighted else None
        if self._clustering == "hierarchical":
            return group_by_linkage(gram, groups, counts)
        return group_by_kmeans(gram, groups, counts, seed=self.seed)

    def _gram(self, graph: Graph, site: Site[MoE], statistics: Statistics) -> Tensor:
        """Inner products of the experts' features, [E, E] in float64."""
        if self.grouping == "router_logits":
            observer = statistics[f"{site.name}.routing"]
            assert isinstance(observer, Routing)
            return observer.gram
        stack = graph.placed(ExpertStack.of(graph, site.part))
        if self.grouping == "weights":
            return stack.weight_gram(stack.aligned() if self.align else None).cpu()
        x = graph.placed(_routed(statistics, site.name).x)
        if self.grouping in ("token_outputs", "output_cosines"):
            return stack.output_gram(x, directions=self.grouping == "output_cosines").cpu()
        outputs = stack.mean_outputs(x).cpu()
        return outputs @ outputs.T

    def _decision(self, site: str, labels: Tensor, counts: Tensor) -> MergeGroups:
        """Groups with their most chosen expert first, in the order of these."""
        groups = []
        for number in range(int(labels.max()) + 1):
            own = (labels == number).nonzero().flatten()
            dominant = int(own[counts[own].argmax()])
            groups.append((dominant, *(expert for expert in own.tolist() if expert != dominant)))
        groups.sort()
        return MergeGroups(site=site, groups=tuple(groups), weights=tuple(self._weights(group, counts) for group in groups))

    def _weights(self, group: Sequence[int], counts: Tensor) -> tuple[float, ...]:
        used = counts[list(group)]
        if self.combination == "mean" or float(used.sum()) == 0:
            used = torch.ones_like(used)
        return tuple((used / used.sum()).tolist())

    def _searched(self, graph: Graph, site: Site[MoE], decision: MergeGroups, statistics: Statistics) -> MergeGroups:
        """The decision with the shares that a search finds."""
        search, merger = Search(self.population, self.generations, self.seed), graph.placed(self._merger(statistics, site.name))
        stack, tokens = graph.placed((ExpertStack.of(graph, site.part), _routed(statistics, site.name)))
        pairs = zip(decision.groups, decision.weights, strict=True)
        weights = tuple(search.shares(merger, stack, group, start, tokens) for group, start in pairs)
        return decision.model_copy(update={"weights": weights})

    def check(self, graph: Graph, structure: Structure, plan: MergeExpertsPlan) -> None:
        """Every expert is in exactly one group, and weights add up."""
        sites = {site.name: site for site in structure.select(Selection()).moes()}
        for decision in plan.decisions:
            if decision.site not in sites:
                raise PlanError(f"the plan names {decision.site}, which is not a mixture of this model")
            site = sites[decision.site]
            self._refuse(graph, site)
            experts = sorted(expert for group in decision.groups for expert in group)
            if experts != list(range(site.part.experts)):
                raise PlanError(
                    f"{decision.site}: groups {decision.groups} must hold each of the "
                    f"{site.part.experts} experts exactly once"
                )
            shapes = [len(group) for group in decision.groups], [len(weights) for weights in decision.weights]
            if shapes[0] != shapes[1] or not all(abs(sum(weights) - 1.0) <= 1e-6 for weights in decision.weights):
                raise PlanError(f"{decision.site}: each group needs one weight per expert, adding up to 1")

    def apply(self, editor: Editor, structure: Structure, plan: MergeExpertsPlan, statistics: Statistics) -> None:
        """Merge the groups and map the router's choices to them."""
        sites = {site.name: site.part for site in structure.select(Selection()).moes()}
        for decision in plan.decisions:
            moe = sites[decision.site]
            for name, tensor in self._merged(editor.graph, moe, decision, statistics).items():
                editor.set_tensor(name, tensor)
            table = torch.empty(moe.experts, dtype=torch.int64)
            for number, group in enumerate(decision.groups):
                table[list(group)] = number
            with editor.before(moe.node):
                chosen = moe.node.args[1]  # not moe.index: pairs of token and expert may be rows of their own
                assert isinstance(chosen, fx.Node)
                read = editor.add_tensor(f"{moe.w_in}_group", table)
                index = editor.call(torch.ops.aten.index.Tensor, read, [chosen])
            moe.node.replace_input_with(chosen, index)

    def _merged(self, graph: Graph, moe: MoE, decision: MergeGroups, statistics: Statistics) -> dict[str, Tensor]:
        """The merged experts' tensors by name, one group in memory beside the result."""
        stack, merger = graph.placed((ExpertStack.of(graph, moe), self._merger(statistics, decision.site)))
        names = {"w_in": moe.w_in, "w_out": moe.w_out, "b_in": moe.b_in, "b_out": moe.b_out}
        merged = {
            part: graph.tensor(name).new_empty(len(decision.groups), *graph.tensor(name).shape[1:])
            for part, name in names.items()
            if name is not None
        }
        for number, (group, weights) in enumerate(zip(decision.groups, decision.weights, strict=True)):
            expert = merger.merge(stack, group, weights)
            for part, tensor in merged.items():
                tensor[number] = getattr(expert, part)[0]
        return {name: merged[part] for part, name in names.items() if name is not None}

    def _merger(self, statistics: Statistics, site: str) -> Merger:
        """How the groups of a mixture become one expert each."""
        tokens = _routed(statistics, site) if self.apply_reads_statistics else None
        combination = self.combination if self.combination in ("zip", "svd") else "mean"
        return Merger(combination, self.align, self.align_by, tokens, self.rank, self.refit)

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

    def _refuse(self, graph: Graph, site: Site[MoE]) -> None:
        moe = site.part
        if not graph.tensor(moe.w_in).is_floating_point():
            raise PlanError(f"{site.name}: its experts are quantized already; put merge_experts before quantize")
        if self.grouping == "router_logits" and not _scores_experts(moe):
            raise PlanError(
                f"{site.name}: its router was not recognised, or its experts were merged before, so that it scores other "
                "experts than there are; group by outputs or weights"
            )


def _scores_experts(moe: MoE) -> bool:
    """Whether the router has a score for each expert, not for choices that share one."""
    return moe.logits is not None and moe.router is not None and moe.router.out_features == moe.experts


def _refuse_budget(site: str, moe: MoE, groups: int) -> None:
    if groups > moe.experts:
        raise PlanError(f"{site}: {groups} groups asked, the mixture has {moe.experts} experts")
    if groups < needed(moe):
        raise PlanError(
            f"{site}: {groups} experts would remain, the router chooses {moe.top_k} per token; "
            f"ask for {needed(moe)} at least, or densify_moe"
        )


def _counts(statistics: Statistics, site: Site[MoE]) -> Tensor:
    """How often each expert is chosen, [E]; zeros where nothing asks for it."""
    observer = statistics.get(f"{site.name}.routing")
    if observer is None:
        return torch.zeros(site.part.experts, dtype=torch.float64)
    assert isinstance(observer, Routing)
    return observer.counts


def _routed(statistics: Statistics, site: str) -> Routed:
    sample = statistics[f"{site}.sample"]
    assert isinstance(sample, Sample)
    return Routed(*sample.values())
