"""What an artefact on another device returns, and what runs beside it: there is no GPU here, so ``meta`` stands for one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import surgeon
from surgeon.bench import Case, EagerCandidate
from surgeon.contract import Artifact
from surgeon.generation import GraphDecoder, generate
from surgeon.graph import Graph
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
    away.stepping(graph.example)()
    assert away.given == {"meta"}
    candidate = EagerCandidate(load_source(tiny("llama")[0]), graph.inputs, {}, device=away.device)
    assert {tensor.device.type for tensor in candidate.module.parameters()} == {"meta"}
    assert {tensor.device.type for tensor in candidate._inputs(Case("prefill", 1, 8)).values()} == {"meta"}


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
