"""Criteria of ``drop_experts``: their scores against a second implementation, and what they are worth on trained weights."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from surgeon.errors import PlanError, SurgeonError
from surgeon.expert_budget import share_out
from surgeon.registry import make_pass
from surgeon.structure import MoE
from tests.conftest import Trained

CRITERIA = ("frequency", "soft_frequency", "gate_mass", "activation_norm", "reap")


def seen(model: Trained) -> dict[str, tuple[np.ndarray, ...]]:
    """Every calibration token's input, experts, weights and scores, by site."""
    return {name: tuple(value.numpy() for value in values) for name, values in model.routed_tokens().items()}


def softmax(z: np.ndarray) -> np.ndarray:
    shifted = np.exp(z - z.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def every_output(model: Trained, part: MoE, x: np.ndarray) -> np.ndarray:
    """Every expert on every token, [T, E, H]."""
    w_in, w_out = (model.graph.tensor(name).detach().numpy().astype(np.float64) for name in (part.w_in, part.w_out))
    gate, up = np.split(np.einsum("th,eoh->teo", x.astype(np.float64), w_in), 2, axis=2)
    return np.einsum("tei,ehi->teh", gate / (1 + np.exp(-gate)) * up, w_out)


def test_scores_equal_those_of_numpy(tiny_mixtral: Trained) -> None:
    tokens = seen(tiny_mixtral)
    step = {"keep": 5, "tokens": 1 << 20}
    plans = {name: tiny_mixtral.operate({"drop_experts": {**step, "criterion": name}}).plan for name in CRITERIA}
    for number, site in enumerate(tiny_mixtral.structure.moes()):
        x, index, weight, scores = tokens[site.name]
        norms = np.linalg.norm(every_output(tiny_mixtral, site.part, x), axis=2)
        wanted = {name: np.zeros(8) for name in CRITERIA}
        wanted["soft_frequency"] = softmax(scores.astype(np.float64)).mean(0)
        for expert in range(8):
            rows, places = np.nonzero(index == expert)
            norm = norms[rows, expert]
            share = weight[rows, places] / weight[rows].sum(1)
            wanted["frequency"][expert] = len(rows) / index.size
            wanted["gate_mass"][expert] = weight[rows, places].sum() / weight.sum()
            wanted["activation_norm"][expert] = norm.mean() if len(rows) else 0.0
            wanted["reap"][expert] = (share * norm).mean() if len(rows) else 0.0
        for name in CRITERIA:
            decision = plans[name].decisions[number]
            assert decision.site == site.name
            np.testing.assert_allclose(decision.scores, wanted[name], rtol=1e-4)
            assert list(decision.keep) == sorted(np.argsort(-wanted[name])[:5].tolist())


def test_the_set_of_least_loss_is_that_of_numpy(tiny_mixtral: Trained) -> None:
    """Not All Experts are Equal, restated: dropped logits are minus infinity, the rest is normalised again."""
    kept = {exhaustive: tiny_mixtral.operate(reconstruction(exhaustive=exhaustive, beam=8)).plan for exhaustive in (100, 1)}
    tokens = seen(tiny_mixtral)
    for number, site in enumerate(tiny_mixtral.structure.moes()):
        x, _, _, scores = tokens[site.name]
        outputs = every_output(tiny_mixtral, site.part, x)

        def mixed(keep: tuple[int, ...], z: np.ndarray = scores, outputs: np.ndarray = outputs) -> np.ndarray:
            masked = np.full(z.shape, -np.inf)
            masked[:, keep] = z[:, keep]
            best = np.argsort(-masked, axis=1)[:, :2]
            weight = softmax(np.take_along_axis(masked, best, 1))
            return (np.take_along_axis(outputs, best[..., None], 1) * weight[..., None]).sum(1)

        whole = mixed(tuple(range(8)))
        losses = {keep: ((mixed(keep) - whole) ** 2).sum() / (whole**2).sum() for keep in itertools.combinations(range(8), 5)}
        wanted = min(losses, key=losses.__getitem__)
        decision = kept[100].decisions[number]
        assert decision.keep == wanted
        assert decision.loss == pytest.approx(losses[wanted], rel=1e-4)
        alone = [((mixed(tuple(e for e in range(8) if e != gone)) - whole) ** 2).sum() / (whole**2).sum() for gone in range(8)]
        np.testing.assert_allclose(decision.scores, alone, rtol=1e-4, atol=1e-12)
        searched = kept[1].decisions[number]
        assert searched.loss == pytest.approx(losses[searched.keep], rel=1e-4)
        assert searched.loss <= sorted(losses.values())[2]  # of 56 sets


def reconstruction(**options: Any) -> dict[str, Any]:
    return {"drop_experts": {"keep": 5, "criterion": "reconstruction", "tokens": 1 << 20, **options}}


@pytest.mark.parametrize("criterion", [*CRITERIA, "reconstruction"])
def test_a_global_budget_is_one_sort_of_all_experts(tiny_mixtral: Trained, criterion: str) -> None:
    plan = tiny_mixtral.operate({"drop_experts": {"keep": 4, "budget": "global", "criterion": criterion}}).plan
    sites = [site.name for site in tiny_mixtral.structure.moes()]
    assert sum(len(decision.keep) for decision in plan.decisions) + 8 * len(plan.notes) == 4 * len(sites)
    assert all(len(decision.keep) >= 2 for decision in plan.decisions)
    if criterion == "reconstruction":  # equal numbers are one way to share out
        equal = tiny_mixtral.operate({"drop_experts": {"keep": 4, "criterion": criterion}}).plan
        assert sum(d.loss for d in plan.decisions) <= sum(d.loss for d in equal.decisions)
        return
    lost = [score for d in plan.decisions for e, score in enumerate(d.scores) if e not in d.keep]
    kept = [d.scores[e] for d in plan.decisions if len(d.keep) > 2 for e in d.keep]
    assert max(lost) <= min(kept)


def test_layers_may_keep_different_numbers(tiny_mixtral: Trained) -> None:
    """Each mixture keeps the first of the same order, as one number for all of them says."""
    dropped = tiny_mixtral.operate({"drop_experts": {"keep": [3, 8, 5, 2]}})
    assert [site.part.experts for site in dropped.structure.moes()] == [3, 8, 5, 2]
    assert dropped.plan.notes == ("blocks.1.moe: all 8 experts stay",)
    kept = {decision.site: decision.keep for decision in dropped.plan.decisions}
    for number, keep in ((0, 3), (2, 5), (3, 2)):
        equal = tiny_mixtral.operate({"drop_experts": {"keep": keep, "blocks": number}}).plan
        assert kept[f"blocks.{number}.moe"] == equal.decisions[0].keep
    selected = tiny_mixtral.operate({"drop_experts": {"keep": [4, 6], "blocks": "::2"}})
    assert [site.part.experts for site in selected.structure.moes()] == [4, 8, 6, 8]


def test_a_list_that_does_not_fit_is_refused(tiny_mixtral: Trained) -> None:
    for keep, message in (
        ([3, 4], r"keep: found 2 numbers, needed one for each of 4 selected mixtures \(blocks.0.moe"),
        ([8, 8, 9, 8], r"blocks\.2\.moe: keep 9 asked, the mixture has 8 experts"),
        ([8, 1, 8, 8], r"blocks\.1\.moe: 1 experts would remain, the router chooses 2"),
    ):
        with pytest.raises(PlanError, match=message):
            tiny_mixtral.operate({"drop_experts": {"keep": keep}})
    with pytest.raises(SurgeonError, match="a number for each mixture leaves nothing to budget: global"):
        make_pass({"drop_experts": {"keep": [4, 4, 4, 4], "budget": "global"}})


def test_what_a_global_budget_cannot_do_is_refused_by_site(tiny_mixtral: Trained) -> None:
    with pytest.raises(PlanError, match="4 of 32 experts would remain, the routers need at least 8"):
        tiny_mixtral.operate({"drop_experts": {"keep": 1, "budget": "global"}})
    with pytest.raises(PlanError, match=r"blocks\.0\.moe 2, blocks\.1\.moe 2"):
        tiny_mixtral.operate({"drop_experts": {"ratio": 0.9, "budget": "global"}})


def test_budgets_are_shared_out_at_least_cost() -> None:
    curves = [{0: 0.0, 1: 5.0, 2: 6.0}, {0: 0.0, 1: 2.0, 2: 9.0}, {0: 0.0, 2: 1.0}]
    for total in range(7):
        fitting = [p for p in itertools.product(*curves) if sum(p) <= total]
        most = max(sum(p) for p in fitting)
        wanted = min(sum(c[n] for c, n in zip(curves, p, strict=True)) for p in fitting if sum(p) == most)
        found = share_out(curves, total)
        assert sum(found) == most
        assert sum(curve[lost] for curve, lost in zip(curves, found, strict=True)) == wanted


@pytest.mark.slow
@pytest.mark.parametrize("budget", ["layer", "global"])
@pytest.mark.parametrize("criterion", [*CRITERIA, "reconstruction"])
def test_every_criterion_beats_the_lot(tiny_mixtral: Trained, criterion: str, budget: str) -> None:
    batch = tiny_mixtral.held_out
    assert batch is not None

    def loss(**options: str | int) -> float:
        return tiny_mixtral.operate({"drop_experts": {"keep": 5, "budget": budget, **options}}).loss(batch)

    assert loss(criterion=criterion) < sum(loss(criterion="random", seed=seed) for seed in range(5)) / 5


def test_the_lot_needs_no_data_and_follows_its_seed(tiny_mixtral: Trained) -> None:
    def keeps(seed: int) -> list[tuple[int, ...]]:
        step = make_pass({"drop_experts": {"keep": 5, "criterion": "random", "seed": seed}})
        assert step.observers(tiny_mixtral.structure) == {}
        plan = step.plan(tiny_mixtral.graph, tiny_mixtral.structure, {})
        return [decision.keep for decision in plan.decisions]

    assert keeps(0) == keeps(0) != keeps(1)
    assert len(set(keeps(0))) > 1


def test_an_unknown_criterion_lists_the_known() -> None:
    with pytest.raises(SurgeonError, match="activation_norm.*reap"):
        make_pass({"drop_experts": {"keep": 5, "criterion": "norm"}})


def test_a_sample_of_tokens_ranks_by_fewer(tiny_mixtral: Trained) -> None:
    few = tiny_mixtral.operate({"drop_experts": {"keep": 5, "criterion": "reap", "tokens": 64}}).plan
    many = tiny_mixtral.operate({"drop_experts": {"keep": 5, "criterion": "reap"}}).plan
    assert few.decisions[0].scores != many.decisions[0].scores
    assert torch.tensor(few.decisions[0].scores).isfinite().all()
