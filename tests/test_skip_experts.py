"""``skip_experts``: its thresholds against NumPy, what it leaves as it is, what it is worth, and that artefacts skip too."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor

from surgeon.backends._hf_checkpoint import plan as checkpoint_plan
from surgeon.backends._trt_dialect import write
from surgeon.backends.aotinductor import AotInductor
from surgeon.backends.onnxruntime import OnnxRuntime
from surgeon.contract import Artifact
from surgeon.data import load_data
from surgeon.discovery import discover
from surgeon.errors import PlanError, RecipeError
from surgeon.graph import Graph
from surgeon.observe import observe
from surgeon.registry import make_pass
from surgeon.rewrite import Editor
from surgeon.samples import Sample
from surgeon.token_significance import Scores, scores_before
from surgeon.verify import relative_error
from tests.conftest import Patient, Trained
from tests.families_moe import FAMILIES, library, with_experts
from tests.test_expert_families import ROUTERS, difference
from tests.test_moe_families import inputs, traced

aten = torch.ops.aten


def patient(name: str) -> Patient:
    _, graph, structure = traced(name)
    return Patient(graph, structure, load_data([inputs(name), inputs(name, 3, 9), inputs(name, 2)], graph))


def routed(subject: Patient, site: int = 0) -> list[np.ndarray]:
    """Index, weight and input of every calibration token."""
    part = list(subject.structure.moes())[site].part
    sample = Sample(part.index, part.weight, part.input, limit=1 << 20)
    observe(subject.graph, subject.data.calibration, {"": sample})
    return [value.numpy() for value in sample.values()]


@pytest.mark.parametrize("name", [*ROUTERS, "phimoe", "expert_choice", "relu_routed"])
def test_a_threshold_of_zero_changes_nothing(name: str) -> None:
    subject = patient(name)
    result = subject.operate({"skip_experts": {"beta": 0.0}})
    assert make_pass({"skip_experts": {"beta": 0.0}}).exact(result.plan)
    assert difference(result.graph, subject.graph, [inputs(name), inputs(name, 3, 9)]) < 1e-6
    if name == "switch":  # one expert per token: nothing to skip, which is said
        assert not result.plan.decisions
        assert "selects 1 per token, nothing to skip" in result.plan.notes[0]


@pytest.mark.parametrize("name", ROUTERS)
def test_as_many_experts_as_before_change_nothing(name: str) -> None:
    subject = patient(name)
    result = subject.operate({"skip_experts": {"top_k": next(subject.structure.moes()).part.top_k}})
    assert not result.plan.decisions
    assert result.graph.fingerprint() == subject.graph.fingerprint()


@pytest.mark.parametrize("name", [name for name in ROUTERS if name != "switch"])
def test_fewer_experts_are_the_model_built_with_fewer(name: str) -> None:
    """Selection, correction, groups and normalisation are the router's own."""
    module, _, _ = traced(name)
    family = FAMILIES[name]
    import transformers

    small = library(name)
    config = small.config
    config.num_experts_per_tok = 1
    reference = with_experts(type(small)(config), module, tuple(range(8))).eval()
    assert isinstance(config, getattr(transformers, family.config))
    subject = patient(name)
    result = subject.operate({"skip_experts": {"top_k": 1}})
    for batch in (inputs(name), inputs(name, 3, 9)):
        with torch.no_grad():
            assert relative_error(result.graph(**batch)["logits"], reference(**batch).logits) < 1e-5
    for site in result.structure.moes():
        before = next(s for s in subject.structure.moes() if s.name == site.name).part
        assert (site.part.top_k, site.part.groups, site.part.scale) == (1, before.groups, before.scale)


@pytest.mark.parametrize("name", [name for name in ROUTERS if name != "switch"])
def test_skipping_is_that_of_numpy(name: str) -> None:
    subject = patient(name)
    before = [site.part for site in subject.structure.moes()]
    result = subject.operate({"skip_experts": {"beta": "median"}})
    index, weight, _ = routed(subject)
    ratio = np.sort(weight, axis=1)[:, :-1] / weight.max(1, keepdims=True)
    beta = result.plan.decisions[0].beta
    median = np.median(ratio)
    assert np.max(ratio[ratio < median]) < beta <= median * (1 + 1e-6)
    found_index, found, _ = routed(result)
    runs = np.concatenate([np.ones_like(ratio, dtype=bool), ratio >= median], axis=1)
    runs = np.take_along_axis(runs, np.argsort(np.argsort(-weight, axis=1), axis=1), axis=1)
    wanted = weight * runs
    if before[0].normalised:
        wanted *= weight.sum(1, keepdims=True) / wanted.sum(1, keepdims=True)
    np.testing.assert_array_equal(found_index, index)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-8)
    assert 0.15 < 1 - runs.mean() < 0.35  # half of all but the best of two
    assert result.plan.decisions[0].skipped == pytest.approx(1 - runs.mean(), abs=0.02)
    # the router is still known for what it is
    for was, site in zip(before, result.structure.moes(), strict=True):
        now = site.part
        fields = ("scoring", "normalised", "groups", "selection_bias", "top_k")
        assert [getattr(now, key) for key in fields] == [getattr(was, key) for key in fields]
        assert now.masked
        assert not was.masked


def test_a_fraction_is_met_and_protected_tokens_skip_nothing(tiny_mixtral: Trained) -> None:
    result = tiny_mixtral.operate({"skip_experts": {"fraction": 0.3, "protect": 0.1}})
    for number, decision in enumerate(result.plan.decisions):
        assert decision.skipped == pytest.approx(0.3, abs=1e-3)
        _, weight, x = routed(result, number)
        # later mixtures see what the earlier ones have changed
        assert (weight == 0).mean() == pytest.approx(0.3, abs=1e-3 if number == 0 else 0.05)
        large = np.abs(x).sum(1) >= decision.protect_above * (1 + 1e-5)
        assert large.mean() == pytest.approx(0.1, abs=0.01 if number == 0 else 0.05)
        assert (weight[large] != 0).all()


def padded(name: str) -> dict[str, Tensor]:
    """Three rows of nine tokens: whole, padded in front, padded behind."""
    batch = inputs(name, 3, 9)
    batch["attention_mask"][1, :3] = 0
    batch["attention_mask"][2, 6:] = 0
    return batch


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_protection_by_attention_is_that_of_numpy(name: str) -> None:
    """MC-MoE's significance, from the attention weights that the source model gives out itself."""
    module, graph, structure = traced(name)
    batch = padded(name)
    subject = Patient(graph, structure, load_data([batch], graph))
    step = make_pass({"skip_experts": {"beta": 0.9, "protect": 0.3, "protect_by": "attention"}})
    result = subject.operate(step)
    _, _, x = routed(subject)
    eager = copy.deepcopy(module)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = eager(**batch, output_attentions=True).attentions
    site = next(structure.moes())
    assert site.block is not None
    weights = attentions[site.block].mean(1).double().numpy()  # [B, queries, keys]
    real = batch["attention_mask"].bool().numpy()
    significance = []
    for row in range(3):
        for token in np.flatnonzero(real[row]):
            asking = [s for s in np.flatnonzero(real[row]) if s >= token]
            significance.append(np.mean([weights[row, s, token] for s in asking]))
    wanted = np.abs(x).sum(1) * np.array(significance)
    tau = result.plan.decisions[0].protect_above
    assert (wanted >= tau).sum() == round(0.3 * len(wanted))
    ordered = np.sort(wanted)
    count = len(wanted) - round(0.3 * len(wanted))
    assert tau == pytest.approx((ordered[count - 1] + ordered[count]) / 2, rel=1e-4)
    # and in the graph: protected tokens skip nothing, of the others those that weigh little do
    _, was, _ = routed(subject)
    _, now, _ = routed(result)
    small = np.sort(was, 1)[:, 0] < 0.9 * was.max(1)
    np.testing.assert_array_equal((now == 0).any(1), small & (wanted < tau))
    assert (small & (wanted >= tau)).any()


def test_a_token_that_is_generated_alone_is_seen_by_itself(tiny_mixtral: Trained) -> None:
    """The last tokens behind caches of the others: the weights are those of the whole, as far as tokens that come later go."""
    scores = scores_before(tiny_mixtral.structure, next(tiny_mixtral.structure.moes()))
    assert isinstance(scores, Scores)
    generator = torch.Generator().manual_seed(0)
    shapes = [list(node.meta["val"].shape) for node in scores.nodes[:2]]
    q = torch.randn(2, shapes[0][1], 7, shapes[0][3], generator=generator)
    k = torch.randn(2, shapes[1][1], 7, shapes[1][3], generator=generator)
    mask = [torch.ones(7, 7, dtype=torch.bool).tril()[None, None]] if scores.mask is not None else []
    whole = scores.paid(q, k, *mask).reshape(2, 7)
    repeated = k.repeat_interleave(shapes[0][1] // shapes[1][1], 1)
    weights = (scores.scale * q @ repeated.mT).masked_fill(~torch.ones(7, 7).tril().bool(), -torch.inf).softmax(-1).mean(1)
    behind = torch.arange(7, 0, -1)
    torch.testing.assert_close(whole, weights.sum(1) / behind)
    last = scores.paid(q[:, :, 6:], k, *(m[:, :, 6:] for m in mask))
    torch.testing.assert_close(last.flatten(), weights[:, 6, 6])


def test_attention_that_cannot_be_read_is_refused_by_site() -> None:
    step = {"skip_experts": {"fraction": 0.2, "protect": 0.1, "protect_by": "attention"}}
    with pytest.raises(PlanError, match=r"blocks\.0\.moe: protect_by attention is not possible: .*spelled out.*use norm"):
        patient("gpt_oss").operate(step)
    with pytest.raises(PlanError, match=r"blocks\.0\.moe: .*its block has no attention in front of it"):
        patient("relu_routed").operate(step)


def by_lot(subject: Trained, shares: list[float], seed: int) -> Patient:
    """The model that skips the second of two experts at tokens that a hash of the input picks."""
    graph = subject.graph.clone()
    editor = Editor(graph)
    for site, share in zip(discover(graph).moes(), shares, strict=True):
        node, x, weight = site.part.node, site.part.input, site.part.weight
        with editor.before(node):
            noise = editor.call(aten.mul.Scalar, editor.call(aten.slice.Tensor, x, 1, seed, seed + 1), 1e4)
            noise = editor.call(aten.sub.Tensor, noise, editor.call(aten.floor.default, noise))
            picked = editor.call(aten.lt.Scalar, noise, 2 * share)
            best = editor.call(aten.amax.default, weight, [-1], True)
            smaller = editor.call(aten.lt.Tensor, weight, best)
            skipped = editor.call(aten.logical_and.default, picked, smaller)
            kept = editor.call(aten.masked_fill.Scalar, weight, skipped, 0.0)
            shared = editor.call(aten.div.Tensor, kept, editor.call(aten.sum.dim_IntList, kept, [-1], True))
        editor.redirect(node, weight, shared)
    editor.finish()
    return Patient(graph, discover(graph), subject.data)


def skipped_shares(subject: Patient, batch: dict[str, Tensor]) -> list[float]:
    weights = {s.name: Sample(s.part.weight, limit=1 << 20) for s in subject.structure.moes()}
    observe(subject.graph, [batch], weights)
    return [float(sample.values()[0].eq(0).double().mean()) for sample in weights.values()]


@pytest.mark.parametrize("fraction", [0.1, 0.3])
def test_skipping_by_ratio_beats_skipping_by_lot(tiny_mixtral: Trained, fraction: float) -> None:
    batch = tiny_mixtral.held_out
    assert batch is not None
    skipped = tiny_mixtral.operate({"skip_experts": {"fraction": fraction}})
    shares = skipped_shares(skipped, batch)
    assert shares == pytest.approx([fraction] * len(shares), abs=0.05)
    lots = [by_lot(tiny_mixtral, shares, seed) for seed in range(3)]
    assert skipped_shares(lots[0], batch) == pytest.approx(shares, abs=0.02)
    chance = [lot.loss(batch) for lot in lots]
    untouched = tiny_mixtral.loss(batch)
    assert skipped.loss(batch) - untouched < 0.5 * (min(chance) - untouched)


def check(artifact: Artifact, graph: Graph, batches: list[dict[str, Tensor]]) -> None:
    for batch in batches:
        with torch.no_grad():
            wanted = graph(**batch)
        for key, value in artifact.run(batch).items():
            assert relative_error(value, wanted[key]) < 1e-5


@pytest.mark.parametrize(("name", "by"), [("mixtral", "norm"), ("mixtral", "attention"), ("deepseek_v3", "attention")])
def test_the_onnx_artefact_skips(name: str, by: str, tmp_path: Path) -> None:
    result = patient(name).operate({"skip_experts": {"beta": "median", "protect": 0.1, "protect_by": by}})
    batches = [inputs(name), inputs(name, 3, 9), padded(name)]
    check(OnnxRuntime().lower(result.graph, tmp_path), result.graph, batches)
    model = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    pieces = [len(node.output) for node in model.graph.node if node.op_type == "Split" and len(node.output) > 3]
    assert pieces == [site.part.experts + 1 for site in result.structure.moes()]  # one piece that nobody computes


@pytest.mark.slow
def test_a_package_and_an_engines_source_keep_the_thresholds(tmp_path: Path) -> None:
    result = patient("mixtral").operate({"skip_experts": {"beta": "median"}})
    batches = [inputs("mixtral"), inputs("mixtral", 3, 9)]
    (tmp_path / "package").mkdir()
    check(AotInductor().lower(result.graph, tmp_path / "package"), result.graph, batches)
    write(result.graph, "dense", tmp_path / "model.onnx")
    import onnxruntime

    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for batch in batches:
        (found,) = session.run(["logits"], {key: value.numpy() for key, value in batch.items()})
        with torch.no_grad():
            assert relative_error(torch.from_numpy(found), result.graph(**batch)["logits"]) < 1e-5


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("mixtral", {"fraction": 0.6}, r"blocks\.0\.moe: 60\.0% of its pairs.*at most 50\.0%"),
        ("mixtral", {"fraction": 0.45, "protect": 0.5}, r"blocks\.0\.moe: 45\.0%"),
        ("phimoe", {"top_k": 1}, r"blocks\.0\.moe: top_k is not possible: its router \(sparsemixer\)"),
    ],
)
def test_what_cannot_be_skipped_is_refused_by_site(name: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        patient(name).operate({"skip_experts": fields})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "give beta, fraction or top_k"),
        ({"beta": 0.1, "fraction": 0.2}, "either beta or fraction"),
        ({"top_k": 1, "protect": 0.1}, "protect is for"),
        ({"beta": 0.1, "protect_by": "attention"}, "protect_by is for protect"),
    ],
)
def test_fields_that_contradict(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make_pass({"skip_experts": fields})


def test_a_checkpoint_cannot_say_it(tiny_mixtral: Trained) -> None:
    graph = tiny_mixtral.operate({"skip_experts": {"beta": 0.5}}).graph
    refusals = checkpoint_plan(graph, architecture="auto", repeat_merged=False)
    assert isinstance(refusals, list)
    assert [refusal.node for refusal in refusals] == [site.name for site in tiny_mixtral.structure.moes()]
    assert "skips chosen experts at run time" in refusals[0].reason


def test_unreached_mixtures_are_refused_by_site(tiny_mixtral: Trained) -> None:
    blank = {key: torch.zeros_like(value) for key, value in tiny_mixtral.data.calibration[0].items()}
    subject = Patient(tiny_mixtral.graph, tiny_mixtral.structure, load_data([blank, blank], tiny_mixtral.graph))
    with pytest.raises(PlanError, match=r"blocks\.0\.moe: calibration data never reached it"):
        subject.operate({"skip_experts": {"beta": "median"}})
