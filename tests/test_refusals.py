"""What backends refuse: before the passes work where that is known, and in one line for all layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import surgeon
from surgeon.contract import Refusal
from surgeon.errors import LowerError
from surgeon.graph import Graph
from surgeon.passes.quantize import Quantize
from surgeon.pipeline import operate
from surgeon.plans import PlannedPass, SavedPlan
from surgeon.progress import Progress
from surgeon.refusals import compact, foreseen, grouped, listed
from surgeon.registry import make_backend, make_pass
from tests.conftest import MODELS, Patient, Trained

ALL = "attention.q, attention.k, attention.v, attention.o, moe.w_in, moe.w_out of blocks 0-3"
MIXED = {"scheme": "mixed", "algorithm": "gptq"}


def asked(backend: Any, graph: Graph, steps: list[dict[str, Any]]) -> list[str]:
    """What the backend will refuse, as a message has it."""
    rehearsed, refusals = foreseen(make_backend(backend), graph, [make_pass(step) for step in steps])
    return listed(refusals, rehearsed)


def quantize(**fields: Any) -> dict[str, Any]:
    """A step that reads data."""
    return {"quantize": {"algorithm": "gptq", **fields}}


def test_places_are_said_in_short() -> None:
    sites = [f"blocks.{block}.{part}" for block in range(32) for part in ("attention.q", "ffn.up")]
    assert compact(sites) == "attention.q, ffn.up of blocks 0-31"
    assert compact(["head", "blocks.0.moe", "blocks.2.moe", "blocks.3.moe"]) == "moe of blocks 0, 2-3; head"
    assert compact(["blocks.7.ffn.up"]) == "blocks.7.ffn.up"
    assert compact(["blocks.7.ffn.up", "blocks.7.ffn.down"]) == "ffn.up, ffn.down of block 7"
    assert compact([f"t{number}" for number in range(11)]) == "t0, t1, t2, t3, t4, t5, t6, t7 and 3 more"


def test_reasons_that_differ_in_the_layer_they_name_are_one(tiny_llama: Trained) -> None:
    names = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(6)]
    refusals = [Refusal(name, f"{name} is odd") for name in names] + [Refusal("device", "none is here")]
    found = grouped(refusals, tiny_llama.graph)
    assert found == [("ffn.up of blocks 0-5", "model.layers.*.mlp.up_proj.weight is odd"), ("device", "none is here")]


@pytest.mark.parametrize(
    ("backend", "steps", "lines"),
    [
        ("tensorrt", [quantize(scheme="int2")], [f"{ALL}: 2 bits; TensorRT has 4 and 8"]),
        # sizes may be others behind a pass that changes them, bits and zero points are not
        ("tensorrt", [{"drop_experts": {"keep": 4}}, quantize(scheme="int8")], []),
        (
            "tensorrt",
            [{"drop_experts": {"keep": 4}}, quantize(scheme="int4", symmetric=False)],
            [f"{ALL}: zero points: TensorRT's low-bit weights are symmetric (symmetric: true)"],
        ),
        ("tensorrt", [quantize(scheme="int4")], []),
        # some weight has fewer than 3 bits; none needs to have fewer than 4 where 5 is the average
        ("tensorrt", [{"quantize": {**MIXED, "bits": 3}}], ["moe.w_in, moe.w_out of block 0: 2 bits; TensorRT has 4 and 8"]),
        ("tensorrt", [{"quantize": {**MIXED, "bits": 5}}], []),
        (
            {"onnxruntime": {"shapes": {"batch": [1, 2, 4]}}},
            [quantize(scheme="int4")],
            ["shapes: has no meaning with provider: cpu"],
        ),
        # a mixture may go
        (
            {"aotinductor": {"experts": "grouped"}},
            [quantize(scheme="int8")],
            ["experts: torch has no grouped matrix multiplication to compile for the CPU; use auto"],
        ),
        ({"aotinductor": {"experts": "grouped"}}, [{"densify_moe": {}}, quantize(scheme="int8")], []),
        ("onnxruntime", [quantize(scheme="int2")], []),
        ("huggingface", [quantize(scheme="int4"), {"sparsify": {"pattern": "2:4", "names": "head"}}], []),
    ],
)
def test_what_is_known_before_the_passes(
    backend: Any, steps: list[dict[str, Any]], lines: list[str], tiny_mixtral: Trained
) -> None:
    before = tiny_mixtral.graph.fingerprint()
    assert asked(backend, tiny_mixtral.graph, steps) == lines
    assert tiny_mixtral.graph.fingerprint() == before


@pytest.mark.parametrize("step", [{"scheme": "int8"}, {"scheme": "int2", "symmetric": False}, {"scheme": "fp8"},
                                  {"scheme": "int8_dynamic", "embeddings": True}])  # fmt: skip
def test_a_rehearsal_leaves_what_the_pass_leaves(step: dict[str, Any], tiny_llama: Trained) -> None:
    """Operators, shapes and types are the same, so every backend says the same."""
    made = make_pass({"quantize": step})
    rehearsed, _ = foreseen(make_backend("tensorrt"), tiny_llama.graph, [made])
    graph, *_ = operate(made, tiny_llama.graph, tiny_llama.structure, tiny_llama.data, None, Progress(False))
    assert rehearsed.fingerprint() == graph.fingerprint()
    held = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in rehearsed.parameters().values()}
    own = {tensor.untyped_storage()._cdata for tensor in tiny_llama.graph.parameters().values()}
    assert sum(size for key, size in held.items() if key not in own) < 4096


def test_factors_are_rehearsed(tiny_llama: Trained) -> None:
    made = make_pass({"low_rank": {"ratio": 0.6, "method": "svd"}})
    rehearsed, refusals = foreseen(make_backend("huggingface"), tiny_llama.graph, [made])
    graph, *_ = operate(made, tiny_llama.graph, tiny_llama.structure, tiny_llama.data, None, Progress(False))
    assert rehearsed.fingerprint() == graph.fingerprint()
    assert refusals == make_backend("huggingface").refuses(graph)
    lines = listed(refusals, rehearsed)
    assert len(refusals) == 2 * 7 * 6
    assert len(lines) == 7
    assert lines[0].startswith("ffn.down.1, ffn.down.0 of blocks 0-5: it stands for a part of model.layers.*.mlp.down_proj")


MIXTURES: list[dict[str, Any]] = [
    {"moefy_ffn": {"experts": 4, "top_k": 2, "shared": 1}},
    {"moefy_ffn": {"experts": 4, "top_k": 2, "router": "centroid", "scaling": "expectation"}},
    {"moefy_ffn": {"experts": 4, "top_k": 2, "router": "similarity", "scaling": "softmax", "blocks": 0}},
    {
        "moefy_ffn": {
            "experts": 4, "router": "mlp", "router_width": 8, "router_steps": 2, "select": "dynamic_k", "threshold": 0.4,
            "split": "random", "scaling": "mean_output",
        }
    },
    {"moefy_ffn": {"experts": 4, "top_k": 1, "shared": 1, "split": "importance", "overlap": True, "router": "centroid"}},
    {"upcycle_ffn": {"experts": 4, "top_k": 2}},
    {"upcycle_ffn": {"experts": 8, "granularity": 2, "top_k": 4, "gate": "softmax_topk", "scaling": "published", "noise": 0.1}},
]  # fmt: skip


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("step", MIXTURES)
def test_mixtures_are_rehearsed(step: dict[str, Any], name: str, patient: Callable[[str], Patient]) -> None:
    """On no data: operators, shapes and types are those of the mixtures that are made, with biases and without."""
    subject, made = patient(name), make_pass(step)
    rehearsed, _ = foreseen(make_backend("onnxruntime"), subject.graph, [made])
    graph = subject.operate(made).graph
    assert rehearsed.fingerprint() == graph.fingerprint()
    for backend in ("huggingface", "gguf", {"aotinductor": {"experts": "grouped"}}):
        assert make_backend(backend).refuses(rehearsed) == make_backend(backend).refuses(graph)
    held = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in rehearsed.parameters().values()}
    own = {tensor.untyped_storage()._cdata for tensor in subject.graph.parameters().values()}
    assert sum(size for key, size in held.items() if key not in own) < 4096


def test_a_factor_that_comes_from_data_is_some_number(patient: Callable[[str], Patient]) -> None:
    subject, made = patient("llama"), make_pass({"moefy_ffn": {"experts": 4, "top_k": 2, "scaling": "norm"}})
    rehearsed, _ = foreseen(make_backend("onnxruntime"), subject.graph, [made])
    graph = subject.operate(made).graph
    targets = [[str(node.target) for node in each.module.graph.nodes] for each in (rehearsed, graph)]
    assert targets[0] == targets[1]


@pytest.mark.parametrize("step", [{"moefy_ffn": {"experts": 4, "top_k": 2}}, {"upcycle_ffn": {"experts": 4, "top_k": 2}}])
def test_backends_that_refuse_a_mixture_say_so_before_it_is_made(step: dict[str, Any], tiny_llama: Trained) -> None:
    lines = asked({"aotinductor": {"experts": "grouped"}}, tiny_llama.graph, [step])
    assert lines == ["experts: torch has no grouped matrix multiplication to compile for the CPU; use auto"]
    assert asked("aotinductor", tiny_llama.graph, [step]) == []
    # behind it nothing is known of experts that may go
    assert asked({"aotinductor": {"experts": "grouped"}}, tiny_llama.graph, [step, {"densify_moe": {}}]) == []


def test_what_a_format_cannot_say_of_a_mixture_is_known_before_it_is_made(tiny_llama: Trained) -> None:
    (line,) = asked("huggingface", tiny_llama.graph, [{"moefy_ffn": {"experts": 4, "top_k": 2}}])
    assert line.startswith("moe.w_in of blocks 0-5: ")
    assert "its router has a bias per expert" in line
    assert asked("huggingface", tiny_llama.graph, [{"upcycle_ffn": {"experts": 4, "top_k": 2}}]) == []


@pytest.mark.parametrize("step", [{"moefy_ffn": {"experts": 4, "top_k": 2}}, {"upcycle_ffn": {"experts": 4, "top_k": 2}}])
def test_passes_behind_a_mixture_are_rehearsed_on_it(step: dict[str, Any], tiny_llama: Trained) -> None:
    first, *_ = asked("tensorrt", tiny_llama.graph, [step, quantize(scheme="int2", blocks=":")])
    assert first.startswith(f"{ALL.removesuffix('3')}5: 2 bits")


def test_a_plan_that_was_made_is_rehearsed(patient: Callable[[str], Patient]) -> None:
    """Its numbers of experts count, not the fields'."""
    subject, step = patient("llama"), make_pass({"upcycle_ffn": {"experts": 4, "top_k": 2}})
    plan = subject.operate(step).plan
    edited = plan.model_copy(update={"decisions": (plan.decisions[0].model_copy(update={"experts": 6, "top_k": 3}),)})
    rehearsed, _ = foreseen(make_backend("onnxruntime"), subject.graph, [step], [edited])
    assert rehearsed.fingerprint() == subject.operate(step, edited).graph.fingerprint()


def test_a_build_is_refused_before_its_passes_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    worked: list[str] = []
    monkeypatch.setattr(Quantize, "observers", lambda self, structure: worked.append("observers") or {})
    calibration = {"text": str(MODELS / "calibration.txt"), "samples": 4, "length": 32}
    options: dict[str, Any] = {"calibration": calibration, "output": tmp_path / "out", "progress": False}
    with pytest.raises(LowerError) as refused:
        surgeon.compile(MODELS / "tiny-mixtral", [quantize(scheme="int2")], backend="tensorrt", **options)
    assert str(refused.value) == f"backend tensorrt refuses this model:\n  {ALL}: 2 bits; TensorRT has 4 and 8"
    assert worked == []
    assert list(tmp_path.iterdir()) == []


def test_a_plan_that_was_edited_is_asked_about(tiny_llama: Trained) -> None:
    step = make_pass({"quantize": {"scheme": "int8_dynamic"}})
    *_, plan, _ = operate(step, tiny_llama.graph, tiny_llama.structure, tiny_llama.data, None, Progress(False))
    first = plan.decisions[0].model_copy(update={"bits": 2, "dynamic": False})
    edited = plan.model_copy(update={"decisions": (first,)})
    saved = SavedPlan(
        surgeon="", model="", graph=tiny_llama.graph.fingerprint(),
        passes=(PlannedPass(name=step.name, fields=step.model_dump(mode="json"), plan=edited.model_dump(mode="json")),),
    )  # fmt: skip
    backend = make_backend("tensorrt")
    rehearsed, refusals = foreseen(backend, tiny_llama.graph, [step], saved.matched(tiny_llama.graph, [step]))
    assert listed(refusals, rehearsed)[0].endswith("2 bits; TensorRT has 4 and 8")
    assert len(refusals) == 1


def test_a_pass_that_cannot_be_rehearsed_speaks_for_itself(tiny_llama: Trained) -> None:
    twice = [quantize(scheme="int4"), quantize(scheme="int4")]  # refused by the second pass, with the site's name
    assert asked("onnxruntime", tiny_llama.graph, twice) == []
