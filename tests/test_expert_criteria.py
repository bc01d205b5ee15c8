"""Criteria of ``drop_experts``: their scores against a second implementation, and what they are worth on trained weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from surgeon.errors import SurgeonError
from surgeon.observe import observe
from surgeon.registry import make_pass
from surgeon.samples import Sample
from tests.conftest import Trained

CRITERIA = ("frequency", "gate_mass", "activation_norm", "reap")


def seen(model: Trained) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Every calibration token's input, experts and weights, by site."""
    samples = {
        site.name: Sample(site.part.input, site.part.index, site.part.weight, limit=1 << 20)
        for site in model.structure.moes()
    }
    observe(model.graph, model.data.calibration, samples)
    return {name: tuple(v.numpy() for v in sample.values()) for name, sample in samples.items()}  # type: ignore[misc]


def test_scores_equal_those_of_numpy(tiny_mixtral: Trained) -> None:
    tokens = seen(tiny_mixtral)
    step = {"keep": 5, "tokens": 1 << 20}
    plans = {name: tiny_mixtral.operate({"drop_experts": {**step, "criterion": name}}).plan for name in CRITERIA}
    for number, site in enumerate(tiny_mixtral.structure.moes()):
        x, index, weight = tokens[site.name]
        stored = [tiny_mixtral.graph.tensor(name) for name in (site.part.w_in, site.part.w_out)]
        w_in, w_out = (tensor.detach().numpy().astype(np.float64) for tensor in stored)
        wanted = {name: np.zeros(8) for name in CRITERIA}
        for expert in range(8):
            rows, places = np.nonzero(index == expert)
            gate, up = np.split(x[rows].astype(np.float64) @ w_in[expert].T, 2, axis=1)
            norm = np.linalg.norm((gate / (1 + np.exp(-gate)) * up) @ w_out[expert].T, axis=1)
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


@pytest.mark.slow
@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_beats_the_lot(tiny_mixtral: Trained, criterion: str) -> None:
    batch = tiny_mixtral.held_out
    assert batch is not None

    def loss(**options: str | int) -> float:
        return tiny_mixtral.operate({"drop_experts": {"keep": 5, **options}}).loss(batch)

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
