"""Ranks shared out by what they cost: the estimate, the best choice there is, and what it is worth on trained models."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from surgeon.accounting import parameter_count
from surgeon.errors import RecipeError
from surgeon.numerics import NumericsError, rank_losses, whitened_svd
from surgeon.passes.low_rank import LowRankPlan
from surgeon.registry import make_pass
from tests.conftest import Patient, Trained

MakePatient = Callable[[str], Patient]


def shared(ratio: float, **fields: Any) -> dict[str, Any]:
    return {"low_rank": {"ratio": ratio, "allocation": "loss", **fields}}


def kept(plan: LowRankPlan, subject: Patient) -> float:
    """Share of the parameters of all linears of the blocks, the routers' apart, that factors and whole ones have."""
    parts = {s.name: s.part for s in subject.structure.linears if s.block is not None and not s.name.endswith(".router")}
    ranks = {decision.site: decision.rank for decision in plan.decisions}
    left = sum(
        ranks[name] * (part.out_features + part.in_features) if name in ranks else part.out_features * part.in_features
        for name, part in parts.items()
    )
    return left / sum(part.out_features * part.in_features for part in parts.values())


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_losses_of_all_ranks_are_those_of_the_factors(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator)
    inputs, outputs = torch.rand(shape[1], generator=generator) + 0.1, torch.rand(shape[0], generator=generator)
    found = rank_losses(weight, inputs, outputs)
    assert found.shape == (13,)
    assert found[-1] == 0
    for rank in (1, 5, 11, 12):
        factors = whitened_svd(weight, torch.diag(inputs), rank)
        lost = (weight - factors.left @ factors.right).double().square()
        torch.testing.assert_close(found[rank], outputs.double() @ lost @ inputs.double(), rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(found[0], outputs.double() @ weight.double().square() @ inputs.double())
    with pytest.raises(NumericsError, match="needed as many as a weight"):
        rank_losses(weight, outputs, inputs)


def test_no_other_ranks_of_as_many_parameters_cost_less(patient: MakePatient) -> None:
    """All ways to factor four linears, by the errors that the plan states."""
    subject = patient("llama")
    plan = subject.operate(shared(0.7, multiple=8, names=["blocks.0.attention.*"])).plan
    linears = {s.name: s.part for s in subject.structure.linears if s.name.startswith("blocks.0.attention.")}
    # Where a linear stays whole the plan does not list its errors; a second plan with other bounds does not change them.
    known = {each.site: each.errors for each in plan.decisions}
    assert known
    sizes = {name: part.out_features * part.in_features for name, part in linears.items()}
    budget = 0.7 * sum(sizes.values()) - sum(size for name, size in sizes.items() if name not in known)
    each_rank = {name: part.out_features + part.in_features for name, part in linears.items()}
    ways = [
        [*((rank, error, rank * each_rank[name]) for rank, error in errors.items()), (None, 0.0, sizes[name])]
        for name, errors in known.items()
    ]
    least = min(sum(e for _, e, _ in way) for way in itertools.product(*ways) if sum(size for *_, size in way) <= budget)
    found = sum(each.errors[each.rank] for each in plan.decisions)
    assert found <= least * (1 + 1e-3)


def test_parameters_hold_the_ratio_and_plans_repeat(patient: MakePatient) -> None:
    subject = patient("mixtral")
    for ratio in (0.5, 0.8):
        step = shared(ratio, multiple=4)
        factored = subject.checked(step)
        ranks = {decision.rank for decision in factored.plan.decisions}
        assert len(ranks) > 1
        assert all(rank % 4 == 0 for rank in ranks)
        assert ratio - 0.03 < kept(factored.plan, subject) <= ratio
        assert parameter_count(factored.graph) < parameter_count(subject.graph)
        again = subject.operate(step, factored.plan)
        assert again.graph.fingerprint(weights=True) == factored.graph.fingerprint(weights=True)
    assert any("linears stay whole, since ranks of the others cost less" in note for note in factored.plan.notes)


def test_a_uniform_ratio_keeps_multiples(patient: MakePatient) -> None:
    subject = patient("llama")
    plain, eighths = (subject.operate({"low_rank": {"ratio": 0.7, "multiple": m}}).plan for m in (1, 8))
    assert {d.site: d.rank // 8 * 8 for d in plain.decisions} == {d.site: d.rank for d in eighths.decisions}
    none = subject.operate({"low_rank": {"ratio": 0.7, "multiple": 64}}).plan
    assert not none.decisions
    assert all("the ratio leaves it no rank of 64; left alone" in note for note in none.notes)


@pytest.mark.parametrize(("name", "bound"), [("tiny_llama", 0.5), ("tiny_mixtral", 0.5)])
def test_ranks_by_loss_beat_one_ratio_for_all(name: str, bound: float, request: pytest.FixtureRequest) -> None:
    """benchmarks/results/low_rank.md has the figures."""
    subject: Trained = request.getfixturevalue(name)
    assert subject.held_out is not None
    dense = subject.loss(subject.held_out)
    rises = []
    for step in (shared(0.6), {"low_rank": {"ratio": 0.6}}):
        factored = subject.operate(step)
        assert kept(factored.plan, subject) <= 0.6
        rises.append(factored.loss(subject.held_out) - dense)
    assert rises[0] < bound * rises[1]


def test_refusals() -> None:
    for fields, reason in (
        ({"rank": 8, "allocation": "loss"}, "shares out a ratio below 1"),
        ({"ratio": 1.0, "allocation": "loss"}, "shares out a ratio below 1"),
        ({"ratio": 0.5, "allocation": "loss", "method": "svd"}, "reads data, method: svd none"),
        ({"ratio": 0.5, "spread": 0.1}, "spread is for allocation: loss"),
        ({"rank": 12, "multiple": 8}, "rank 12 is no multiple of 8"),
        ({"ratio": 0.5, "allocation": "owl"}, "known: loss, uniform"),
    ):
        with pytest.raises(RecipeError, match=reason):
            make_pass({"low_rank": fields})
