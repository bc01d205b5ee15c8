"""Quantization that is fitted to calibration data: what it gains on trained models, and where it does not apply."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import surgeon
from surgeon.accounting import parameter_count
from surgeon.errors import PlanError, RecipeError
from surgeon.numerics import SEARCH
from surgeon.passes import quantize
from surgeon.passes.quantize import QuantizePlan
from surgeon.plans import SavedPlan
from tests.conftest import MODELS, Patient, Trained

MakePatient = Callable[[str], Patient]
CALIBRATION = {"text": MODELS / "calibration.txt", "samples": 32, "length": 128}


def divergence(subject: Trained, fields: dict[str, Any]) -> float:
    """Mean Kullback-Leibler divergence from the model itself on held-out text, nats per token."""
    assert subject.held_out is not None
    quantized = subject.operate({"quantize": {"scheme": "int4", **fields}})
    assert parameter_count(quantized.graph) == parameter_count(subject.graph)
    with torch.no_grad():
        before, after = (
            graph(**subject.held_out)["logits"].log_softmax(-1) for graph in (subject.graph, quantized.graph)
        )
    return float((before.exp() * (before - after)).sum(-1).mean())


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_mixtral", "tiny_upcycled"])
@pytest.mark.parametrize("fields", [{"group": 32}, {"group": 128}, {"group": 32, "symmetric": False}])
def test_it_loses_much_less_than_rounding_to_the_nearest(
    name: str, fields: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    """benchmarks/results/quantize.md has the figures: 0.6 to 0.7 of the divergence, and at most that of llm-compressor."""
    subject = request.getfixturevalue(name)
    nearest, fitted = (divergence(subject, {**fields, "algorithm": algorithm}) for algorithm in ("nearest", "gptq"))
    assert fitted < 0.85 * nearest


def test_searched_scales_help_where_groups_are_long(tiny_llama: Trained) -> None:
    covered, searched = (divergence(tiny_llama, {"group": 128, "scales": scales}) for scales in ("range", "search"))
    assert searched < covered


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_mixtral", "tiny_upcycled"])
def test_two_bits_are_searched_further_down(
    name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two fifths of the divergence go, and a tenth of what is left by factors below 0.75."""
    subject, fields = request.getfixturevalue(name), {"scheme": "int2", "group": 128, "symmetric": False}
    covered, searched = (divergence(subject, {**fields, "scales": scales}) for scales in ("range", "search"))
    assert searched < 0.7 * covered
    monkeypatch.setattr(quantize, "WIDE_SEARCH", SEARCH)
    assert searched < 0.95 * divergence(subject, {**fields, "scales": "search"})


def test_every_scheme_takes_it(tiny_mixtral: Trained) -> None:
    assert tiny_mixtral.held_out is not None
    batch = tiny_mixtral.held_out
    with torch.no_grad():
        want = tiny_mixtral.graph(**batch)["logits"]
    for scheme, bound in (("int8", 0.01), ("fp8", 0.1), ("int8_dynamic", 0.3)):
        step = {"scheme": scheme, "algorithm": "gptq"}
        fitted = tiny_mixtral.operate({"quantize": step})
        assert all(decision.compensated for decision in fitted.plan.decisions)
        with torch.no_grad():
            error = float((fitted.graph(**batch)["logits"] - want).norm() / want.norm())
        assert error < bound, scheme


def test_a_saved_plan_gives_the_same_codes(patient: MakePatient) -> None:
    subject = patient("mixtral")
    step = {"quantize": {"scheme": "int4", "algorithm": "gptq", "group": 16}}
    first = subject.operate(step)
    text = first.plan.model_dump_json()
    second = subject.operate(step, QuantizePlan.model_validate_json(text))
    assert first.graph.fingerprint(weights=True) == second.graph.fingerprint(weights=True)
    some = first.plan.decisions[0].model_copy(update={"compensated": False})
    edited = first.plan.model_copy(update={"decisions": (some, *first.plan.decisions[1:])})
    third = subject.operate(step, edited)
    assert third.graph.fingerprint(weights=True) != first.graph.fingerprint(weights=True)
    with pytest.raises(PlanError, match=f"{some.site}.* with algorithm gptq"):
        subject.operate({"quantize": {"scheme": "int4", "group": 16}}, first.plan)


def test_routers_and_tied_tables_stay_as_with_rounding_to_the_nearest(tiny_mixtral: Trained) -> None:
    nearest, fitted = (
        tiny_mixtral.operate({"quantize": {"scheme": "int4", "algorithm": algorithm, "embeddings": True}}).plan
        for algorithm in ("nearest", "gptq")
    )
    assert {decision.site for decision in fitted.decisions} == {decision.site for decision in nearest.decisions}
    tables = [decision for decision in fitted.decisions if decision.site.startswith("embedding")]
    assert tables
    assert not any(decision.compensated for decision in tables)
    assert set(fitted.notes) == set(nearest.notes)


def test_weights_that_several_blocks_share_are_left_with_the_reason() -> None:
    torch.manual_seed(0)
    config = transformers.AlbertConfig(
        vocab_size=64, embedding_size=32, hidden_size=32, num_attention_heads=4, intermediate_size=64, num_hidden_layers=3
    )
    module = transformers.AlbertModel(config).eval()
    ids = torch.arange(24).reshape(2, 12)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    step = {"scheme": "int8", "algorithm": "gptq"}
    compiled = surgeon.compile(
        module, [{"quantize": step}], inputs=inputs, calibration=[inputs], backend=None, progress=False
    )
    notes = compiled.report.passes[0].notes
    assert "blocks.1.ffn.up: other blocks read its weight too" in "\n".join(notes)
    plan = compiled.report.passes[0].plan
    assert not any(decision["site"].startswith("blocks.") for decision in plan["decisions"])
    nearest = surgeon.compile(
        module, [{"quantize": {"scheme": "int8"}}], inputs=inputs, backend=None, progress=False
    ).report.passes[0]
    assert any(decision["site"] == "blocks.1.ffn.up" for decision in nearest.plan["decisions"])


def test_fixed_tables_stay_unless_they_are_named() -> None:
    """GPT-J looks the angles of its rotation up in a buffer, which is no weight."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64, "rotary_dim": 4}
    module = transformers.GPTJForCausalLM(transformers.GPTJConfig(**sizes, bos_token_id=0, eos_token_id=0)).eval()
    ids = torch.arange(24).reshape(2, 12)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    step = {"scheme": "int8", "embeddings": True}
    compiled = surgeon.compile(module, [{"quantize": step}], inputs=inputs, backend=None, progress=False)
    (report,) = compiled.report.passes
    assert report.parameters[0] == report.parameters[1]
    (table,) = (site.name for site in compiled.structure.embeddings if "embed_positions" in site.part.weight)
    assert f"{table}: transformer.rotary_emb.embed_positions is a fixed table" in "\n".join(report.notes)
    assert table not in {decision["site"] for decision in report.plan["decisions"]}
    named = surgeon.compile(
        module, [{"quantize": {**step, "names": table}}], inputs=inputs, backend=None, progress=False
    ).report.passes[0]
    assert [decision["site"] for decision in named.plan["decisions"]] == [table]
    assert named.parameters[1] - named.parameters[0] == 64 * 4


@pytest.mark.parametrize("algorithm", ["nearest", "gptq"])
def test_groups_longer_than_rows_are_not_filled_up(algorithm: str, patient: MakePatient) -> None:
    """Rows of 64 and 48 inputs: groups of 512 would be 8 times as large as the weights."""
    sizes, outputs = [], []
    for group in (64, 512):
        subject = patient("mixtral")
        step = {"quantize": {"scheme": "int4", "algorithm": algorithm, "group": group}}
        quantized = subject.operate(step).graph
        sizes.append(quantized.nbytes())
        with torch.no_grad():
            outputs.append(quantized(**subject.data.held_back[0])["logits"])
    assert sizes[0] == sizes[1]
    assert torch.equal(outputs[0], outputs[1])


class Residual(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(25, 13), torch.nn.Linear(13, 25)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        change: torch.Tensor = self.down(self.up(input).relu())
        return input + change


def test_one_scale_per_row_takes_rows_of_any_length() -> None:
    """A plan may say so of 4 bits, of which two make a byte."""
    torch.manual_seed(0)
    module = Residual().eval()
    inputs = {"input": torch.randn(4, 25)}

    def built(plan: SavedPlan | None) -> surgeon.Compiled:
        return surgeon.compile(
            module, [{"quantize": {"scheme": "int4"}}], inputs=inputs, plan=plan, backend=None, progress=False
        )

    plan = built(None).plan
    assert plan is not None
    (step,) = plan.passes
    rows = [{**decision, "group": -1} for decision in step.plan["decisions"]]
    edited = plan.model_copy(update={"passes": (step.model_copy(update={"plan": {**step.plan, "decisions": rows}}),)})
    with torch.no_grad():
        want, got = module(**inputs), next(iter(built(edited)(**inputs).values()))
    assert float((got - want).norm() / want.norm()) < 0.3


def test_sites_that_no_token_reaches_are_rounded_to_the_nearest(patient: MakePatient) -> None:
    subject = patient("mixtral")
    batch = dict(subject.data.calibration[0])
    batch["attention_mask"] = torch.zeros_like(batch["input_ids"])
    masked = Patient(subject.graph, subject.structure, surgeon.data.Data((batch,), subject.data.held_back, False))
    fields = {"scheme": "int4", "group": 16, "scales": "range"}
    fitted = masked.operate({"quantize": {**fields, "algorithm": "gptq"}})
    assert not any(decision.compensated for decision in fitted.plan.decisions)
    assert "blocks.0.moe: calibration data never reached it" in "\n".join(fitted.plan.notes)
    nearest = subject.operate({"quantize": fields})
    assert fitted.graph.fingerprint(weights=True) == nearest.graph.fingerprint(weights=True)


def test_refusals(patient: MakePatient) -> None:
    subject = patient("llama")
    for field, value in (("damp", 0.1), ("tokens", 64), ("seed", 1)):
        with pytest.raises(RecipeError, match=f"{field} is for algorithm gptq; algorithm is nearest"):
            subject.operate({"quantize": {"scheme": "int4", field: value}})
    with pytest.raises(RecipeError, match="leave out scales: search"):
        subject.operate({"quantize": {"scheme": "fp8", "scales": "search"}})
    with pytest.raises(RecipeError, match="quantize.algorithm: found \"awq\"; known: gptq, nearest"):
        subject.operate({"quantize": {"scheme": "int4", "algorithm": "awq"}})
    empty = Patient(subject.graph, subject.structure, surgeon.data.Data((), subject.data.held_back, False))
    with pytest.raises(RecipeError, match="observes the model on calibration data and none was given"):
        empty.operate({"quantize": {"scheme": "int4", "algorithm": "gptq"}})


def test_the_artefact_computes_it(tmp_path: Path) -> None:
    compiled = surgeon.compile(
        MODELS / "tiny-upcycled",
        [{"quantize": {"scheme": "int4", "algorithm": "gptq"}}],
        calibration=CALIBRATION,
        dtype="float32",
        output=tmp_path / "out",
        progress=False,
    )
    assert compiled.artifact is not None
    assert {"matmul_nbits", "fused_quantized_experts"} <= set(compiled.artifact.details["fused"])
    assert max(error for each in compiled.report.comparisons for error in each.relative_error.values()) < 5e-2
