"""``expose_routing``: what is recorded is how tokens were routed, and replaying it is exact."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import surgeon
from surgeon.backends._hf_checkpoint import plan as checkpoint_plan
from surgeon.data import load_data
from surgeon.errors import PlanError, TraceError
from surgeon.graph import Graph
from surgeon.observe import observe
from surgeon.registry import make_pass
from surgeon.routes import RECORDED, REPLAYED, replay
from surgeon.samples import Sample
from surgeon.verify import check_parameters, check_structure, relative_error
from tests.conftest import MODELS, Patient, Trained
from tests.families_moe import library
from tests.test_expert_families import ROUTERS
from tests.test_moe_families import inputs, traced


def patient(name: str) -> Patient:
    _, graph, structure = traced(name)
    return Patient(graph, structure, load_data([inputs(name), inputs(name, 3, 9)], graph))


def run(graph: Graph, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    with torch.no_grad():
        return graph(**batch)


def routes(graph: Graph, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {port.name: outputs[port.name] for port in graph.outputs if port.role == RECORDED}


@pytest.mark.parametrize("name", [*ROUTERS, "phimoe", "expert_choice", "relu_routed"])
def test_recorded_routes_are_those_that_were_taken_and_replay_exactly(name: str) -> None:
    subject = patient(name)
    exposed = subject.operate({"expose_routing": {"replay": True}})
    batch = inputs(name, 3, 9)
    plain = run(subject.graph, batch)
    found = run(exposed.graph, batch)
    assert all(torch.equal(found[key], value) for key, value in plain.items())
    recorded = routes(exposed.graph, found)
    for site in subject.structure.moes():
        sample = Sample(site.part.index, site.part.weight, limit=1 << 20)
        observe(subject.graph, [batch], {"": sample})
        for kind, value in zip(("experts", "weights"), sample.values(), strict=True):
            assert recorded[f"{site.name}.{kind}"].shape == (3, 9, site.part.top_k)
            assert torch.equal(recorded[f"{site.name}.{kind}"].flatten(0, 1), value)
    again = run(exposed.graph, batch | replay(recorded))
    assert all(torch.equal(again[key], value) for key, value in found.items())
    # the router is found as before, and so is what it decides by
    for was, now in zip(subject.structure.moes(), exposed.structure.moes(), strict=True):
        fields = ("scoring", "normalised", "groups", "selection_bias", "experts", "top_k", "capacity")
        assert [getattr(now.part, key) for key in fields] == [getattr(was.part, key) for key in fields]


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_replayed_routes_take_the_routers_place(name: str) -> None:
    """Another routing than the router's gives what the mixture gives with it; tokens of -1 keep their own."""
    subject = patient(name).operate({"expose_routing": {"replay": True}})
    batch = inputs(name, 3, 9)
    found = run(subject.graph, batch)
    recorded = routes(subject.graph, found)
    other = {key: value.flip(1) if key.endswith("experts") else value for key, value in recorded.items()}
    replayed = run(subject.graph, batch | replay(other))
    assert all(torch.equal(routes(subject.graph, replayed)[key], value) for key, value in other.items())
    assert relative_error(replayed["logits"], found["logits"]) > 1e-2
    for key in other:
        if key.endswith("experts"):
            other[key] = other[key].clone()
            other[key][1] = -1
    partly = run(subject.graph, batch | replay(other))
    assert torch.equal(partly["logits"][1], found["logits"][1])
    assert torch.equal(partly["logits"][0], replayed["logits"][0])


def test_half_a_decision_is_refused() -> None:
    subject = patient("mixtral").operate({"expose_routing": {"replay": True, "blocks": 1}})
    batch = inputs("mixtral")
    recorded = routes(subject.graph, run(subject.graph, batch))
    assert set(recorded) == {"blocks.1.moe.experts", "blocks.1.moe.weights"}
    with pytest.raises(TraceError, match=r"'replay\.blocks\.1\.moe\.experts' is given without 'replay\.blocks"):
        subject.graph(**batch, **{"replay.blocks.1.moe.experts": recorded["blocks.1.moe.experts"]})


def test_recording_alone_adds_no_input_and_keeps_the_kernel(tmp_path: Path) -> None:
    compiled = surgeon.compile(library("mixtral"), ["expose_routing"], inputs=inputs("mixtral"), progress=False)
    assert compiled.graph is not None
    assert compiled.artifact is not None
    assert all(port.role != REPLAYED for port in compiled.graph.inputs)
    assert compiled.artifact.details["operators"].get("com.microsoft.MoE") == 2
    found, wanted = compiled(**inputs("mixtral", 3, 9)), run(compiled.graph, inputs("mixtral", 3, 9))
    assert set(found) == {"logits", *(f"blocks.{i}.moe.{kind}" for i in (0, 1) for kind in ("experts", "weights"))}
    assert all(relative_error(found[key], value) < 1e-5 for key, value in wanted.items())


@pytest.mark.slow
def test_the_artefact_records_and_replays(tmp_path: Path) -> None:
    steps = [{"skip_experts": {"beta": 0.8}}, {"expose_routing": {"replay": True}}]
    given = inputs("deepseek_v3")
    built = surgeon.compile(library("deepseek_v3"), steps, inputs=given, output=tmp_path / "out", progress=False)
    again = surgeon.load(tmp_path / "out")
    assert built.graph is not None
    assert again.artifact is not None
    batch = inputs("deepseek_v3", 3, 9)
    found = again(**batch)
    assert relative_error(found["logits"], run(built.graph, batch)["logits"]) < 1e-5
    assert found["blocks.1.moe.experts"].dtype == torch.int64
    recorded = {port.name: found[port.name] for port in again.artifact.outputs if port.role == RECORDED}
    assert (recorded["blocks.1.moe.weights"] == 0).any()
    replayed = again(**batch, **replay(recorded))
    assert all(torch.equal(replayed[key], value) for key, value in found.items())
    flipped = {key: value.flip(1) if key.endswith("experts") else value for key, value in recorded.items()}
    wanted = run(built.graph, batch | replay(flipped))
    assert relative_error(again(**batch, **replay(flipped))["logits"], wanted["logits"]) < 1e-5


@pytest.mark.slow
def test_a_model_that_generates_records_and_replays(tmp_path: Path) -> None:
    built = surgeon.compile(MODELS / "tiny-mixtral", [{"expose_routing": {"replay": True}}], progress=False)
    assert built.graph is not None
    ids = torch.arange(20, 32).reshape(1, 12)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    untouched = surgeon.compile(MODELS / "tiny-mixtral", [], progress=False)
    assert torch.equal(built.generate(ids, max_new_tokens=5), untouched.generate(ids, max_new_tokens=5))
    found = built(**batch)
    recorded = {port.name: found[port.name] for port in built.graph.outputs if port.role == RECORDED}
    assert len(recorded) == 8
    assert torch.equal(built(**batch, **replay(recorded))["logits"], found["logits"])


def test_what_cannot_be_exposed_is_refused_by_site(tiny_mixtral: Trained) -> None:
    with pytest.raises(PlanError, match=r"blocks\.0\.moe: its weights scale the experts' inputs"):
        patient("scaled_inputs").operate("expose_routing")  # type: ignore[arg-type]  # a name is a step too
    once = patient("mixtral").operate("expose_routing")  # type: ignore[arg-type]  # a name is a step too
    with pytest.raises(PlanError, match=r"blocks\.0\.moe: the model has a port blocks\.0\.moe\.experts.*exposed before"):
        once.operate("expose_routing")  # type: ignore[arg-type]  # a name is a step too
    exposed = tiny_mixtral.operate("expose_routing")  # type: ignore[arg-type]  # a name is a step too
    refusals = checkpoint_plan(exposed.graph, architecture="auto", repeat_merged=False)
    assert isinstance(refusals, list)
    assert "blocks.0.moe.experts" in str(refusals)


@pytest.mark.parametrize("replayed", [False, True])
def test_a_dropped_block_takes_its_ports_along(replayed: bool) -> None:
    """Dropping after exposing is exposing after dropping: ports, numbers and values."""
    subject, batch = patient("mixtral"), inputs("mixtral", 3, 9)
    expose, drop = {"expose_routing": {"replay": replayed}}, {"drop_blocks": {"count": 1}}
    step = make_pass(drop)
    plan = step.plan_type.model_validate({"decisions": [{"site": "blocks.0"}]})
    first = subject.operate(step, plan).operate(expose)
    exposed = subject.operate(expose)
    then = exposed.operate(step, plan)
    check_structure(step, exposed.structure, then.structure)
    check_parameters(step, then.plan, exposed.graph, exposed.structure, then.graph)
    assert then.graph.inputs == first.graph.inputs
    assert then.graph.outputs == first.graph.outputs
    assert set(then.graph.example) == {port.name for port in then.graph.inputs}
    wanted, found = run(first.graph, batch), run(then.graph, batch)
    assert all(torch.equal(found[key], value) for key, value in wanted.items())
    if replayed:
        recorded = routes(then.graph, found)
        other = {key: value.flip(1) for key, value in recorded.items()}
        assert relative_error(run(then.graph, batch | replay(other))["logits"], found["logits"]) > 1e-2
        assert torch.equal(run(then.graph, batch | replay(recorded))["logits"], found["logits"])


def test_a_mixture_made_dense_takes_its_ports_along() -> None:
    subject = patient("mixtral").operate({"expose_routing": {"replay": True}})
    dense = subject.operate({"densify_moe": {"blocks": 0}})
    names = {port.name for port in (*dense.graph.inputs, *dense.graph.outputs) if port.role in (RECORDED, REPLAYED)}
    assert names == {f"{start}blocks.1.moe.{kind}" for start in ("", "replay.") for kind in ("experts", "weights")}
    assert relative_error(run(dense.graph, inputs("mixtral"))["logits"], run(subject.graph, inputs("mixtral"))["logits"]) > 0


def test_fewer_experts_per_token_are_what_is_recorded(tiny_mixtral: Trained) -> None:
    built = surgeon.compile(
        tiny_mixtral.graph, ["expose_routing", {"skip_experts": {"top_k": 1}}], backend=None, progress=False
    )
    assert built.graph is not None
    ids = torch.arange(5, 17).reshape(2, 6)
    outputs = built(input_ids=ids, attention_mask=torch.ones_like(ids))
    recorded = [port for port in built.graph.outputs if port.role == RECORDED]
    assert len(recorded) == 8
    for port in recorded:
        assert port.shape == ("batch", "sequence", 1)
        assert outputs[port.name].shape == (2, 6, 1)
