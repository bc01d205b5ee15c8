"""``merge_experts``: exact where experts are copies, the published decisions on the same statistics, refusals by site."""

from __future__ import annotations

import itertools
import statistics
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from scipy.cluster.hierarchy import fcluster, linkage
from torch import Tensor

from surgeon.data import load_data
from surgeon.discovery import discover
from surgeon.errors import PlanError, SurgeonError
from surgeon.expert_merging import Merger, Routed
from surgeon.expert_search import Loss, Search
from surgeon.expert_stack import ExpertStack
from surgeon.observe import observe
from surgeon.registry import make_pass
from surgeon.rewrite import Editor
from surgeon.structure import MoE
from surgeon.verify import relative_error
from tests.conftest import Patient, Trained
from tests.families_moe import FAMILIES
from tests.test_moe_families import inputs, patient

NAMES = ("mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss", "granitemoe", "switch")
GROUPINGS = [
    {"grouping": grouping, "clustering": clustering}
    for grouping in ("router_logits", "outputs", "token_outputs", "output_cosines", "weights")
    for clustering in ("dominant", "hierarchical", "ward", "kmeans")
]
COMBINATIONS = ("frequency", "mean", "search", "zip", "svd")

_COPIES: dict[str, Patient] = {}


def copies(name: str) -> Patient:
    """The model with experts e and e + E/2 the same: neurons of the second permuted, router rows and corrections equal."""
    if name not in _COPIES:
        graph = patient(name).graph.clone()
        editor = Editor(graph)
        generator = torch.Generator().manual_seed(0)
        for site in discover(graph).moes():
            part = site.part
            half = part.experts // 2
            order = torch.randperm(part.width, generator=generator)
            both = torch.cat([order, part.width + order]) if part.gated else order

            def copy(tensor: str, places: Tensor | None, axis: int, half: int = half) -> None:
                values = editor.tensor(tensor).detach().clone()
                values[half:] = values[:half] if places is None else values[:half].index_select(axis, places)
                editor.set_tensor(tensor, values)

            copy(part.w_in, both, 1)
            copy(part.w_out, order, 2)
            for bias, places in ((part.b_in, both), (part.b_out, None)):
                if bias is not None:
                    copy(bias, places, 1)
            assert part.router is not None
            for tensor in (part.router.weight, part.router.bias, part.selection_bias):
                if tensor is not None:
                    copy(tensor, None, 0)
        editor.finish()
        batches = [inputs(name), inputs(name, 3), inputs(name, 8, 9)]
        _COPIES[name] = Patient(graph, discover(graph), load_data(batches, graph))
    return _COPIES[name]


def check_lossless(name: str, options: dict[str, Any]) -> None:
    subject = copies(name)
    site = next(iter(subject.structure.moes()))
    half = site.part.experts // 2
    merged = subject.operate({"merge_experts": {"groups": half, **options}})
    for decision in merged.plan.decisions:
        assert sorted(tuple(sorted(group)) for group in decision.groups) == [(e, e + half) for e in range(half)], options
    batch = inputs(name, 4, 7)
    with torch.no_grad():
        expected, found = subject.graph(**batch), merged.graph(**batch)
    worst = max(relative_error(found[key], expected[key]) for key in expected)
    assert worst < 1e-5, (options, worst)


@pytest.mark.parametrize("name", NAMES)
def test_every_grouping_finds_copies_and_merging_them_is_lossless(name: str) -> None:
    assert {"mixtral", "deepseek_v3"} < set(FAMILIES)
    for options in GROUPINGS:
        check_lossless(name, options)


@pytest.mark.parametrize("name", NAMES)
def test_every_combination_of_copies_is_lossless(name: str) -> None:
    for combination, refit, by in itertools.product(COMBINATIONS, (False, True), ("weights", "activations")):
        check_lossless(name, {"grouping": "outputs", "combination": combination, "refit": refit, "align_by": by})


def test_a_refit_without_alignment_brings_the_model_nearer() -> None:
    subject = copies("mixtral")
    batch = subject.data.calibration[0]
    with torch.no_grad():
        expected = subject.graph(**batch)["logits"]
    error = {}
    for refit in (False, True):
        step = {"merge_experts": {"groups": 2, "grouping": "outputs", "align": False, "refit": refit}}
        with torch.no_grad():
            error[refit] = relative_error(subject.operate(step).graph(**batch)["logits"], expected)
    assert 1e-4 < error[True] < 0.7 * error[False]


# -- the reference implementations' decisions -------------------------------------------------------------------------


def seen(model: Trained) -> dict[str, dict[str, np.ndarray]]:
    """Every calibration token's input, experts, weights and router scores, by site."""
    names = ("x", "index", "weight", "logits")
    return {
        site: dict(zip(names, (value.double().numpy() for value in values), strict=True))
        for site, values in model.routed_tokens().items()
    }


def counts_of(tokens: dict[str, np.ndarray]) -> np.ndarray:
    return np.bincount(tokens["index"].astype(int).ravel(), minlength=8)


def expert_outputs(model: Trained, part: MoE, x: np.ndarray) -> np.ndarray:
    """Outputs of all experts for all tokens, [E, T, G]."""
    w_in, w_out = (model.graph.tensor(name).detach().double().numpy() for name in (part.w_in, part.w_out))
    outputs = []
    for first, second in zip(w_in, w_out, strict=True):
        gate, up = np.split(x @ first.T, 2, axis=1)
        outputs.append((gate / (1 + np.exp(-gate)) * up) @ second.T)
    return np.stack(outputs)


def partition(groups: Any) -> set[tuple[int, ...]]:
    return {tuple(sorted(int(e) for e in group)) for group in groups}


def dominant_partition(features: np.ndarray, counts: np.ndarray, groups: int) -> set[tuple[int, ...]]:
    """M-SMoE: the most used experts lead, the others join by cosine similarity of their features [E, F]."""
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    leaders = np.argsort(-counts, kind="stable")[:groups]
    members: dict[int, list[int]] = {int(leader): [int(leader)] for leader in leaders}
    for expert in set(range(len(counts))) - set(members):
        members[int(leaders[np.argmax(unit[leaders] @ unit[expert])])].append(expert)
    return partition(members.values())


@pytest.mark.parametrize("groups", [2, 4, 6])
def test_groups_are_those_of_the_reference_arithmetic(tiny_mixtral: Trained, groups: int) -> None:
    tokens = seen(tiny_mixtral)
    every = {"groups": groups, "tokens": 1 << 20}
    plans = {
        (grouping, clustering): tiny_mixtral.operate(
            {"merge_experts": {**every, "grouping": grouping, "clustering": clustering, "align": False, **published}}
        ).plan
        for grouping in ("router_logits", "outputs", "token_outputs", "output_cosines", "weights")
        for clustering, published in (("dominant", {}), ("hierarchical", {"weighted": False}))
    }
    for number, site in enumerate(tiny_mixtral.structure.moes()):
        data, part = tokens[site.name], site.part
        counts = counts_of(data)
        stored = [tiny_mixtral.graph.tensor(name).detach().double().flatten(1).numpy() for name in (part.w_in, part.w_out)]
        outputs = expert_outputs(tiny_mixtral, part, data["x"])
        features = {
            "router_logits": data["logits"].T,
            "outputs": outputs.mean(1),
            "token_outputs": outputs.reshape(8, -1),
            "output_cosines": (outputs / np.linalg.norm(outputs, axis=2, keepdims=True)).reshape(8, -1),
            "weights": np.concatenate(stored, axis=1),
        }
        for grouping, values in features.items():
            clusters = fcluster(linkage(values, "average", "euclidean"), groups, "maxclust")
            wanted = {
                "dominant": dominant_partition(values, counts, groups),
                "hierarchical": partition(np.flatnonzero(clusters == label) for label in set(clusters)),
            }
            for clustering, expected in wanted.items():
                decision = plans[grouping, clustering].decisions[number]
                assert decision.site == site.name
                assert partition(decision.groups) == expected, (grouping, clustering)
                for group, weights in zip(decision.groups, decision.weights, strict=True):
                    assert counts[group[0]] == counts[list(group)].max()
                    used = counts[list(group)] if counts[list(group)].any() else np.ones(len(group))
                    np.testing.assert_allclose(weights, used / used.sum())


def test_a_global_budget_is_that_of_the_reference(tiny_mixtral: Trained) -> None:
    """M-SMoE: the most used of every layer (here the two that a token needs) first, then the largest shares of all."""
    shares = np.stack([counts_of(data) / counts_of(data).sum() for data in seen(tiny_mixtral).values()])
    for layer in shares:
        layer[np.argsort(-layer)[:2]] = 1.0
    kept = np.zeros(shares.shape, bool)
    kept.ravel()[np.argsort(-shares.ravel())[: 4 * len(shares)]] = True
    plan = tiny_mixtral.operate({"merge_experts": {"groups": 4, "budget": "global", "tokens": 1 << 20}}).plan
    numbers = {decision.site: len(decision.groups) for decision in plan.decisions}
    assert len(set(numbers.values())) > 1
    for site, layer in zip(tiny_mixtral.structure.moes(), kept, strict=True):
        assert numbers.get(site.name, 8) == layer.sum()


def test_merged_weights_are_the_published_means(tiny_mixtral: Trained) -> None:
    """Frequency-weighted means, one expert for one neuron order each, from the tensors themselves."""
    merged = tiny_mixtral.operate({"merge_experts": {"groups": 4, "align": False}})
    decision = merged.plan.decisions[0]
    part = next(iter(tiny_mixtral.structure.moes())).part
    before, after = (model.graph.tensor(part.w_out).detach().double() for model in (tiny_mixtral, merged))
    for number, (group, weights) in enumerate(zip(decision.groups, decision.weights, strict=True)):
        wanted = sum(weight * before[expert] for expert, weight in zip(group, weights, strict=True))
        torch.testing.assert_close(after[number], wanted, rtol=1e-5, atol=1e-7)


def test_a_refit_is_least_squares_on_what_the_group_gave() -> None:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    stack = ExpertStack(normal(3, 10, 7), normal(3, 6, 5), normal(3, 10), normal(3, 6), "silu")
    index = torch.stack([torch.randperm(3, generator=generator)[:2] for _ in range(400)])
    routed = Routed(normal(400, 7), index, torch.rand(400, 2, generator=generator, dtype=torch.float64))
    plain = Merger(align=False).merge(stack, (0, 2), (0.5, 0.5))
    found = Merger(align=False, tokens=routed, refit=True).merge(stack, (0, 2), (0.5, 0.5))
    assert torch.equal(found.w_in, plain.w_in)
    share = torch.zeros(400, 3, dtype=torch.float64).scatter_add_(1, index, routed.weight)[:, [0, 2]]
    wanted = sum(
        share[:, place, None] * (stack.hidden(e, routed.x) @ stack.w_out[e].T + stack.b_out[e])  # type: ignore[index]  # given
        for place, e in enumerate((0, 2))
    )
    features = share.sum(1, keepdim=True) * torch.cat([plain.hidden(0, routed.x), torch.ones(400, 1)], dim=1)
    assert plain.b_out is not None
    assert found.b_out is not None
    before, after = (torch.cat([e.w_out[0], e.b_out[0][:, None]], dim=1) for e in (plain, found))  # type: ignore[index]
    ridge = 1e-2 * float(features.square().sum(0).mean())
    # the gradient of the penalised squares at the answer
    gradient = (features @ after.T - wanted).T @ features + ridge * (after - before)
    assert gradient.abs().max() < 1e-8 * wanted.norm() * features.norm()
    assert (features @ after.T - wanted).norm() < (features @ before.T - wanted).norm()


# -- options ----------------------------------------------------------------------------------------------------------


def test_layers_may_keep_different_numbers(tiny_mixtral: Trained) -> None:
    merged = tiny_mixtral.operate({"merge_experts": {"groups": [3, 8, 5, 2], "grouping": "weights"}})
    assert [site.part.experts for site in merged.structure.moes()] == [3, 8, 5, 2]
    assert merged.plan.notes[0] == "blocks.1.moe: all 8 experts stay"
    with pytest.raises(PlanError, match=r"groups has 2 numbers for 4 mixtures \(blocks.0.moe"):
        tiny_mixtral.operate({"merge_experts": {"groups": [3, 4]}})


def test_a_lot_needs_no_data_and_follows_its_seed(tiny_mixtral: Trained) -> None:
    def groups(seed: int) -> list[Any]:
        step = make_pass({"merge_experts": {"groups": 4, "grouping": "random", "combination": "mean", "seed": seed}})
        assert step.observers(tiny_mixtral.structure) == {}
        return [decision.groups for decision in step.plan(tiny_mixtral.graph, tiny_mixtral.structure, {}).decisions]

    assert groups(0) == groups(0) != groups(1)


@pytest.mark.parametrize("options", [{}, {"combination": "zip", "align_by": "activations", "refit": True}])
def test_a_saved_plan_gives_the_same_model(tiny_mixtral: Trained, options: dict[str, Any]) -> None:
    step = {"merge_experts": {"groups": 4, **options}}
    first = tiny_mixtral.operate(step)
    again = tiny_mixtral.operate(step, first.plan)
    assert again.graph.fingerprint(weights=True) == first.graph.fingerprint(weights=True)
    assert make_pass(step).apply_reads_statistics == bool(options)


@pytest.mark.parametrize("share", [float("nan"), 3.0])
def test_edited_shares_are_checked(tiny_mixtral: Trained, share: float) -> None:
    step = {"merge_experts": {"groups": 4, "grouping": "random"}}
    plan = tiny_mixtral.operate(step).plan
    first = plan.decisions[0].model_copy(update={"weights": tuple((share,) * len(g) for g in plan.decisions[0].groups)})
    with pytest.raises(PlanError, match=r"blocks\.0\.moe: each group needs one weight per expert, adding up to 1"):
        tiny_mixtral.operate(step, plan.model_copy(update={"decisions": (first, *plan.decisions[1:])}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": 4, "grouping": "logits"}, "known: output_cosines, outputs, random, router_logits, token_outputs, weights"),
        ({"groups": 4, "clustering": "hirarchical"}, "known: dominant, hierarchical, kmeans, ward"),
        ({"groups": 4, "combination": "average"}, "known: frequency, mean, search, svd, zip"),
        ({"groups": 4, "align_by": "norm"}, "known: activations, weights"),
        ({"groups": 4, "rank": 3}, "rank is for combination svd"),
        ({"groups": 4, "population": 8, "generations": 3}, "generations and population: for combination search"),
        ({"groups": [4, 4], "budget": "global"}, "leaves nothing to budget"),
        ({"groups": 4, "grouping": "random", "clustering": "kmeans"}, "grouping is random"),
        ({"groups": 4, "weighted": False}, "weighted is for clustering hierarchical and kmeans; clustering is dominant"),
        ({"groups": 4, "ratio": 0.5}, "either groups or ratio"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SurgeonError, match=message):
        make_pass({"merge_experts": options})


@pytest.mark.parametrize("options", [{}, {"grouping": "outputs"}, {"grouping": "random"}])
def test_what_the_model_cannot_do_is_refused_by_site(options: dict[str, Any]) -> None:
    subject = patient("mixtral")
    with pytest.raises(PlanError, match=r"blocks\.0\.moe: 1 experts would remain, the router chooses 2 per token"):
        subject.operate({"merge_experts": {"groups": 1, **options}})
    with pytest.raises(PlanError, match=r"blocks\.0\.moe: 5 groups asked, the mixture has 4 experts"):
        subject.operate({"merge_experts": {"groups": 5, **options}})
    masked = {"input_ids": torch.full((1, 5), 3), "attention_mask": torch.zeros(1, 5, dtype=torch.int64)}
    step = make_pass({"merge_experts": {"groups": 3, **options}})
    observers = step.observers(subject.structure)
    observe(subject.graph, [masked], observers)
    with pytest.raises(PlanError, match=r"blocks\.0\.moe: calibration data never reached it"):
        step.plan(subject.graph, subject.structure, observers)


def test_merged_experts_are_merged_again_but_not_by_the_router(tiny_mixtral: Trained) -> None:
    step = {"groups": 4, "grouping": "weights", "combination": "mean", "align": False}
    once = tiny_mixtral.operate({"merge_experts": step})
    first = once.plan.decisions[0].groups
    with pytest.raises(PlanError, match=r"blocks\.0\.moe: its router was not recognised, or its experts were merged before"):
        once.operate({"merge_experts": {"groups": 2}})
    twice = once.operate({"merge_experts": {**step, "groups": 2}})
    part = next(iter(tiny_mixtral.structure.moes())).part
    tensor = tiny_mixtral.graph.tensor(part.w_in)
    for number, group in enumerate(twice.plan.decisions[0].groups):  # a mean of means
        wanted = torch.stack([tensor[list(first[member])].mean(0) for member in group]).mean(0)
        torch.testing.assert_close(twice.graph.tensor(part.w_in)[number], wanted, rtol=1e-5, atol=1e-6)
    assert [site.part.experts for site in twice.structure.moes()] == [2, 2, 2, 2]


def test_experts_that_data_never_chose_are_named(tiny_mixtral: Trained) -> None:
    rows = {key: value[:1, :3] for key, value in tiny_mixtral.data.calibration[0].items()}
    subject = Patient(tiny_mixtral.graph, tiny_mixtral.structure, load_data([rows], tiny_mixtral.graph))
    notes = subject.operate({"merge_experts": {"groups": 4}}).plan.notes
    assert any("never chose" in note and note.startswith("blocks.0.moe") for note in notes)


# -- search -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "switch"])  # gated; gated with biases and constants; plain
def test_searched_shares_lose_no_more_than_those_it_starts_from(name: str) -> None:
    """L(a) restated in NumPy: what the group's experts gave together, and what one expert with mean weights gives."""
    subject = patient(name)
    site = next(iter(subject.structure.moes()))
    step = make_pass({"merge_experts": {"groups": 2, "grouping": "weights", "combination": "search"}})
    observers = step.observers(subject.structure)
    observe(subject.graph, subject.data.calibration, observers)
    decision = step.plan(subject.graph, subject.structure, observers).decisions[0]
    start = make_pass({"merge_experts": {"groups": 2, "grouping": "weights"}})
    from_use = start.plan(subject.graph, subject.structure, observers).decisions[0]
    assert decision.groups == from_use.groups

    sample = observers[f"{site.name}.sample"]
    x, index, weight = (value.double() for value in sample.values())  # type: ignore[attr-defined]
    stack = ExpertStack.of(subject.graph, site.part).to(torch.float64)

    def output(expert: ExpertStack) -> Tensor:
        found = expert.hidden(0, x) @ expert.w_out[0].T
        return found if expert.b_out is None else found + expert.b_out[0]

    def loss(group: tuple[int, ...], shares: tuple[float, ...]) -> float:
        per_expert = {e: np.where(index.numpy() == e, weight.numpy(), 0).sum(1) for e in group}
        wanted = sum(per_expert[e][:, None] * output(stack.one(e)).numpy() for e in group)
        given = output(Merger("mean").merge(stack, group, shares)).numpy()
        return float(np.square(wanted - sum(per_expert.values())[:, None] * given).sum())

    better = 0
    for group, shares, used in zip(decision.groups, decision.weights, from_use.weights, strict=True):
        assert sum(shares) == pytest.approx(1.0)
        assert min(shares) >= 0
        starts = [used, tuple(1 / len(group) for _ in group), *(tuple(float(e == f) for f in group) for e in group)]
        least = min(loss(group, start) for start in starts)
        assert loss(group, shares) <= least * (1 + 1e-5)
        better += loss(group, shares) < least * (1 - 1e-5)
    assert better


def test_a_search_follows_its_seed_and_gets_better_with_generations(tiny_upcycled: Trained) -> None:
    def found(**options: Any) -> list[Any]:
        step = {"groups": 8, "combination": "search", **options}
        return [decision.weights for decision in tiny_upcycled.operate({"merge_experts": step}).plan.decisions]

    assert found() == found() != found(seed=1)
    stack, tokens, group = _largest_group(tiny_upcycled)
    loss = Loss.of(Merger(), stack, group, tokens)
    assert loss is not None
    start = tuple(1 / len(group) for _ in group)
    losses = []
    for generations in (1, 4, 16, 64):
        shares = Search(generations=generations).shares(Merger(), stack, group, start, tokens)
        losses.append(float(loss(torch.tensor([shares]))))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]


def _largest_group(subject: Trained) -> tuple[ExpertStack, Routed, tuple[int, ...]]:
    step = make_pass({"merge_experts": {"groups": 4, "combination": "search", "generations": 1}})
    observers = step.observers(subject.structure)
    observe(subject.graph, subject.data.calibration, observers)
    decision = step.plan(subject.graph, subject.structure, observers).decisions[0]
    site = next(site for site in subject.structure.moes() if site.name == decision.site)
    sample = observers[f"{site.name}.sample"]
    return ExpertStack.of(subject.graph, site.part), Routed(*sample.values()), max(decision.groups, key=len)  # type: ignore[attr-defined]


def test_searched_shares_beat_shares_by_use_on_text_that_was_not_seen(tiny_upcycled: Trained) -> None:
    batch = tiny_upcycled.held_out
    assert batch is not None
    losses = {
        combination: tiny_upcycled.operate({"merge_experts": {"groups": 4, "combination": combination}}).loss(batch)
        for combination in ("search", "frequency", "mean")
    }
    assert losses["search"] < min(losses["frequency"], losses["mean"])


# -- what it is worth -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "lot"),
    [
        ({}, {}),
        ({"grouping": "outputs", "clustering": "hierarchical", "weighted": False, "align": False}, {"align": False}),
        (
            {"grouping": "output_cosines", "clustering": "kmeans", "weighted": False, "combination": "svd", "align": False},
            {"combination": "svd", "align": False},
        ),
    ],
    ids=["M-SMoE", "HC-SMoE", "Sub-MoE"],
)
def test_published_forms_beat_the_lot_where_experts_have_one_origin(
    tiny_upcycled: Trained, options: dict[str, Any], lot: dict[str, Any]
) -> None:
    batch = tiny_upcycled.held_out
    assert batch is not None
    chosen = tiny_upcycled.operate({"merge_experts": {"groups": 8, **options}}).loss(batch)
    random = [
        tiny_upcycled.operate({"merge_experts": {"groups": 8, "grouping": "random", "seed": seed, **lot}}).loss(batch)
        for seed in range(3)
    ]
    assert chosen < statistics.mean(random) - 0.1


@pytest.mark.slow
@pytest.mark.timeout(1500)  # about a hundred merged models
def test_every_method_beats_the_lot(tiny_mixtral: Trained) -> None:
    """Random groups and plain means; the best groupings also beat random groups that are combined as they are."""
    batch = tiny_mixtral.held_out
    assert batch is not None

    @cache
    def loss(**options: Any) -> float:
        return tiny_mixtral.operate({"merge_experts": {"groups": 4, **options}}).loss(batch)

    def chance(**options: Any) -> float:
        return statistics.mean(loss(grouping="random", seed=seed, **options) for seed in range(6))

    plain = chance(combination="mean", align=False)
    for options, combination in itertools.product(GROUPINGS, COMBINATIONS):
        assert loss(**options, combination=combination) < plain, (options, combination)
    for combination, refit in itertools.product(COMBINATIONS, (False, True)):
        same = {"combination": combination, "refit": refit}
        expected = chance(**same)
        for grouping in ("router_logits", "outputs", "token_outputs", "output_cosines", "weights"):
            assert loss(grouping=grouping, **same) < expected, (grouping, same)
        for clustering in ("hierarchical", "kmeans"):
            assert loss(grouping="outputs", clustering=clustering, **same) < expected, (clustering, same)
