"""What an artefact on another device returns, and what runs beside it: there is no GPU here, so ``meta`` stands for one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import surgeon
from surgeon import final_check
from surgeon.bench import bench
from surgeon.candidates import ArtifactCandidate, Case, EagerCandidate, on_device
from surgeon.contract import Artifact
from surgeon.generation import GraphDecoder, generate
from surgeon.graph import Graph
from surgeon.recipe import Evaluate
from surgeon.report import Report
from surgeon.sampling import Sampling, Settings
from surgeon.source import load_source
from surgeon.verify import compare_artifact
from tests.models import tiny


class OnDevice:
    """A tensor that has to be copied to the host before anything is computed with it."""

    def __init__(self, value: Tensor) -> None:
        self.value = value

    def cpu(self) -> Tensor:
        return self.value


class Away(Artifact):
    """Runs a graph, and returns what is on another device."""

    def __init__(self, graph: Graph) -> None:
        super().__init__(Path(), "away", {}, (), graph.inputs, graph.outputs)
        self.graph = graph
        self.given: set[str] = set()

    @property
    def device(self) -> torch.device:
        return torch.device("meta")

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
        self.given |= {value.device.type for value in inputs.values()}
        if self.given == {"meta"}:
            return {}
        with torch.no_grad():
            return {name: OnDevice(value) for name, value in self.graph(**inputs).items()}

    @contextmanager
    def threads(self, count: int) -> Iterator[None]:
        yield


@pytest.fixture(scope="module")
def graph() -> Graph:
    return surgeon.trace(tiny("llama")[0], task="text-generation")


def test_an_artefact_is_compared_on_the_host(graph: Graph) -> None:
    ids = graph.example["input_ids"]
    found = compare_artifact(Away(graph), graph, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}], 1e-6)
    assert len(found) == 2  # without a past and behind one
    assert all(error == 0 for each in found for error in each["relative_error"].values())


def test_steps_are_timed_on_inputs_where_the_artefact_runs(graph: Graph) -> None:
    away = Away(graph)
    other = ArtifactCandidate("away", away, {})
    other.prepare(Case("decode", 2, 8))()
    assert away.given == {"meta"}
    source = load_source(tiny("llama")[0])
    candidate = EagerCandidate.beside(source, other)
    assert {tensor.device.type for tensor in candidate.module.parameters()} == {"meta"}
    assert {tensor.device.type for tensor in candidate._inputs(Case("prefill", 1, 8)).values()} == {"meta"}
    assert {tensor.device.type for tensor in source.module.parameters()} == {"cpu"}


def test_a_model_is_copied_to_a_device_with_its_ties() -> None:
    module = tiny("llama")[0]
    module.lm_head.weight = module.model.embed_tokens.weight  # type: ignore[union-attr,assignment]  # of the library's model
    weights = {name: weight.clone() for name, weight in module.named_parameters()}
    assert on_device(module, torch.device("cpu")) is module
    away: Any = on_device(module, torch.device("meta"))
    assert away.lm_head.weight is away.model.embed_tokens.weight
    assert {tensor.device.type for tensor in (*away.parameters(), *away.buffers())} == {"meta"}
    assert [name for name, _ in away.named_parameters()] == list(weights)
    assert all(torch.equal(weight, weights[name]) for name, weight in module.named_parameters())
    assert {tensor.device.type for tensor in module.buffers()} == {"cpu"}


def test_a_device_is_waited_for_after_every_run(monkeypatch: pytest.MonkeyPatch) -> None:
    card, log = torch.device("cuda", 3), list[str]()

    class OnCard(Away):
        @property
        def device(self) -> torch.device:
            return card

        def stepping(self, inputs: Mapping[str, Tensor]) -> Any:
            log.append("placed")
            return lambda: log.append("run")

    module = torch.nn.Linear(4, 4)
    source = load_source(module, {"input": torch.zeros(2, 4)})
    graph = surgeon.trace(module, {"input": torch.zeros(2, 4)})
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append(f"waited for {device}"))
    other = ArtifactCandidate("card", OnCard(graph), {})
    eager = EagerCandidate.beside(source, other)
    assert eager.device == card
    eager.module = module  # type: ignore[misc]  # there is no card to copy it to
    monkeypatch.setattr(eager, "_inputs", lambda case: {"input": torch.zeros(2, 4)})
    for candidate, expected in ((other, ["placed", *["run", "waited for cuda:3"] * 2]), (eager, ["waited for cuda:3"] * 2)):
        log.clear()
        run = candidate.prepare(Case("forward", 2, 4))
        run()
        run()
        assert log == expected


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> Report:
    """Of a build that has nothing but its timing ahead, which is short."""
    monkeypatch.setattr(final_check, "bench", partial(bench, seconds=0.0))
    return Report(surgeon="0", bytes=(1, 1), parameters=(1, 1), active_parameters=(1, 1))


def test_a_build_times_both_sides_where_the_artefact_runs(report: Report) -> None:
    module, inputs = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout()), {"input": torch.zeros(2, 5, 4)}
    graph = surgeon.trace(module, inputs, dynamic={"input": {0: "batch", 1: "sequence"}})
    away, seen = Away(graph), set()

    def see(called: torch.nn.Module, given: tuple[Tensor]) -> None:
        weights = {tensor.device.type for tensor in called.parameters()}
        seen.add((given[0].device.type, *weights, *given[0].shape, called.training))

    module[0].register_forward_pre_hook(see)
    section = Evaluate(latency=(1, 3), length=7, threads=1)
    final_check.evaluate_section(section, load_source(module, inputs), graph, away, report, None)
    assert away.given == {"meta"}
    assert seen == {("meta", "meta", 1, 7, 4, False), ("meta", "meta", 3, 7, 4, False)}
    assert [(row.phase, row.batch, row.length, row.threads, row.device) for row in report.latency] == [
        ("forward", 1, 7, 1, "meta"), ("forward", 3, 7, 1, "meta"),
    ]  # fmt: skip
    assert report.warnings == []
    assert {tensor.device.type for tensor in module.parameters()} == {"cpu"}
    assert module.training


def test_a_build_times_prefill_and_decode_apart_and_warns_of_what_it_cannot_time(
    graph: Graph, report: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Away, "device", torch.device("cpu"))
    short = graph.with_source(generation={"table_length": 9})
    section = Evaluate(latency=(2,), length=8, threads=1)
    source = load_source(tiny("llama")[0])
    final_check.evaluate_section(section, source, short, Away(short), report, None)
    assert [row.title for row in report.latency] == ["prefill, batch 2, length 8", "decode, batch 2, behind 8"]
    assert report.warnings == []
    report.latency.clear()
    longer = section.model_copy(update={"length": 9})
    final_check.evaluate_section(longer, source, short, Away(short), report, None)
    assert [row.phase for row in report.latency] == ["prefill"]
    problem = "this case needs 10 positions, and the model's table of positions holds 9: give a shorter sequence"
    assert report.warnings == [f"not timed: decode, batch 2, behind 9: eager torch and the artefact: {problem}"]


@pytest.mark.parametrize("ends", [(), (7,)])
def test_a_text_is_made_where_the_artefact_runs_and_returned_where_it_came_from(graph: Graph, ends: tuple[int, ...]) -> None:
    moves: list[str] = []

    class Watched(Tensor):
        """Tells where it is moved."""

        def to(self, *target: Any, **_: Any) -> Tensor:  # type: ignore[override]
            moves.append(str(target[0]))
            return self.as_subclass(Tensor)

    class Decoder(GraphDecoder):
        def __call__(self, inputs: Mapping[str, Any]) -> Tensor:
            assert moves == ["cpu:7"]  # the prompt, before all else
            return super().__call__(inputs)

    settings, greedy = Settings(ends, 0), Sampling()
    prompt = torch.tensor([[3, 5, 9]])

    def text(decoder: GraphDecoder, ids: Tensor) -> Tensor:
        return generate(decoder, graph.inputs, {"input_ids": ids}, max_new_tokens=5, sampling=greedy, settings=settings)

    def run(inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return graph(**inputs)

    there = Decoder(run, graph.inputs, graph.outputs, torch.device("cpu", 7))
    assert torch.equal(text(there, prompt.as_subclass(Watched)), text(GraphDecoder(run, graph.inputs, graph.outputs), prompt))
