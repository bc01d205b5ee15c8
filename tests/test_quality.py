"""On trained models every data-driven choice must beat random ones at the same budget, on text it has not seen."""

from __future__ import annotations

import json
import statistics
from typing import Any

import pytest
import torch

from surgeon.accounting import parameter_count
from surgeon.passes.drop_blocks import DropBlock, DropBlocksPlan
from surgeon.passes.drop_experts import DropExpertsPlan, KeepExperts
from surgeon.passes.merge_experts import MergeExpertsPlan, MergeGroups
from tests.conftest import MODELS, Trained

RANDOM = 5


def generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(RANDOM)]


def compare(subject: Trained, step: dict[str, Any], random_plans: list[Any]) -> tuple[float, float]:
    """Held-out loss of the pass's own choice, and the mean over random plans."""
    assert subject.held_out is not None
    chosen = subject.operate(step).loss(subject.held_out)
    return chosen, statistics.mean(subject.operate(step, plan).loss(subject.held_out) for plan in random_plans)


def test_trained_models_are_trained(tiny_llama: Trained, tiny_mixtral: Trained, tiny_upcycled: Trained) -> None:
    models = ((tiny_llama, "tiny-llama"), (tiny_mixtral, "tiny-mixtral"), (tiny_upcycled, "tiny-upcycled"))
    for model, name in models:
        assert model.held_out is not None
        loss = model.loss(model.held_out)
        assert loss < 3.0  # ln(1024) = 6.93 nats is knowing nothing
        log = [json.loads(line) for line in (MODELS / name / "training_log.jsonl").read_text().splitlines()]
        assert log[-1]["heldout_loss"] == pytest.approx(loss, abs=0.35)  # shorter windows of the same text
        assert log[-1]["heldout_loss"] < log[0]["heldout_loss"] - (0.5 if name == "tiny-upcycled" else 1)
        assert 1e6 < parameter_count(model.graph) < 5e6
    assert {site.part.experts for site in tiny_mixtral.structure.moes()} == {8}


def test_dropping_similar_blocks_beats_random_blocks(tiny_llama: Trained) -> None:
    blocks = len(tiny_llama.structure.blocks)
    plans = [
        DropBlocksPlan(decisions=tuple(DropBlock(site=f"blocks.{i}") for i in torch.randperm(blocks, generator=g)[:2]))
        for g in generators()
    ]
    chosen, random = compare(tiny_llama, {"drop_blocks": {"count": 2}}, plans)
    assert chosen < random


def test_dropping_rare_experts_beats_random_experts(tiny_mixtral: Trained) -> None:
    sites = [site.name for site in tiny_mixtral.structure.moes()]
    plans = [
        DropExpertsPlan(
            decisions=tuple(
                KeepExperts(site=site, keep=tuple(sorted(torch.randperm(8, generator=g)[:5].tolist()))) for site in sites
            )
        )
        for g in generators()
    ]
    chosen, random = compare(tiny_mixtral, {"drop_experts": {"keep": 5}}, plans)
    assert chosen < random


def random_groups(site: str, groups: int, generator: torch.Generator) -> MergeGroups:
    order = torch.randperm(8, generator=generator).tolist()
    members: list[list[int]] = [[expert] for expert in order[:groups]]
    for expert in order[groups:]:
        members[int(torch.randint(groups, (1,), generator=generator))].append(expert)
    return MergeGroups(
        site=site,
        groups=tuple(map(tuple, members)),
        weights=tuple((1.0 / len(group),) * len(group) for group in members),
    )


def test_merging_alike_experts_beats_random_groups(tiny_mixtral: Trained) -> None:
    sites = [site.name for site in tiny_mixtral.structure.moes()]
    plans = [
        MergeExpertsPlan(decisions=tuple(random_groups(site, 5, g) for site in sites)) for g in generators()
    ]
    chosen, random = compare(tiny_mixtral, {"merge_experts": {"groups": 5}}, plans)
    assert chosen < random


@pytest.mark.parametrize("ratio", [0.5, 0.7])
def test_whitened_factors_beat_plain_ones(tiny_llama: Trained, ratio: float) -> None:
    assert tiny_llama.held_out is not None
    losses = [
        tiny_llama.operate({"low_rank": {"ratio": ratio, "method": method}}).loss(tiny_llama.held_out)
        for method in ("whitened", "svd")
    ]
    assert losses[0] < losses[1]


def test_trained_routers_beat_centroids(tiny_llama: Trained) -> None:
    assert tiny_llama.held_out is not None
    losses = [
        tiny_llama.operate({"moefy_ffn": {"experts": 8, "top_k": 4, "router": router}}).loss(tiny_llama.held_out)
        for router in ("linear", "centroid")
    ]
    assert losses[0] < losses[1]
