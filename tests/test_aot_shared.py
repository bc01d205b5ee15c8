"""Caches that a package of AOTInductor writes in place."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import surgeon
from surgeon.backends import _aot_shared as shared
from surgeon.backends._aot_lowering import Decomposed, low_bit_kernels
from surgeon.caches import PAST, PRESENT, complete, continued, room
from surgeon.candidates import ArtifactCandidate, Case, inputs_for
from surgeon.errors import LowerError
from surgeon.graph import Graph
from surgeon.registry import make_backend
from tests.alone import ALONE
from tests.causal import causal
from tests.conditional import conditional
from tests.conftest import MODELS
from tests.models import tiny
from tests.test_generation import assert_same, plain_batch, source

CPU = torch.device("cpu")
PROGRAM = ALONE + """
ids, caches, expected = torch.load(sys.argv[2], weights_only=True)
errors = []
for start, end in ((0, 5), (5, 6), (6, 9)):
    positions, mask = torch.arange(start, end).expand(len(ids), -1).contiguous(), torch.ones(len(ids), end, dtype=torch.long)
    (found,) = package(ids[:, start:end].contiguous(), mask, positions, *caches)
    errors.append(float((found - expected[:, start:end]).abs().max()))
refused = 0
for length, capacity in ((9, 8), (5, 30)):  # buffers without room, and a mask that does not cover the tokens
    mask, short = torch.ones(len(ids), length, dtype=torch.long), [cache[:, :, :capacity].contiguous() for cache in caches]
    try:
        package(ids, mask, torch.arange(9).expand(len(ids), -1).contiguous(), *short)
    except RuntimeError as error:
        refused += "Expected" in str(error)
print(json.dumps([max(errors) / float(expected.abs().max()), refused]))
"""


def buffers(graph: Graph, call: dict[str, Tensor], more: int) -> dict[str, Tensor]:
    """A call whose pasts are buffers with room for the new positions and ``more``, 7 where nothing is held."""
    total = call["attention_mask"].shape[1]
    found = dict(call)
    for port in graph.inputs:
        if port.role == PAST:
            axis = port.shape.index(PAST)
            past = call[port.name]
            found[port.name] = shared.grown(past, axis, total + more, CPU)
            found[port.name].narrow(axis, past.shape[axis], total + more - past.shape[axis]).fill_(7.0)
    return found


def behind_a_past(graph: Graph) -> dict[str, Tensor]:
    """Several rows of several new tokens behind several old ones."""
    call = continued(graph, plain_batch(graph))
    assert call is not None
    return complete(graph.inputs, call)


@pytest.mark.parametrize("name", ["gemma2", "bloom", "gemma3n", "llama4", "deepseek_v3"])
def test_families_write_what_they_returned(name: str) -> None:
    """Spelt for a package, in torch: windows, chunks, ALiBi, latent caches, caches that several layers read."""
    graph = surgeon.trace(causal(name, layers=4 if name == "gemma3n" else 2), task="text-generation")
    assert shared.refusals(graph) == []
    call = behind_a_past(graph)
    given = buffers(graph, call, 3)
    lowered = low_bit_kernels(graph, "cpu", convert=True).graph
    shared.write_in_place(lowered)
    with torch.no_grad():
        expected = graph(**call)
        logits, *others = Decomposed(lowered, "auto")(*(given[port.name] for port in graph.inputs))
    assert not [value for value in others if isinstance(value, Tensor)]
    assert float((logits - expected["logits"]).norm() / expected["logits"].norm()) < 1e-5
    total = call["attention_mask"].shape[1]
    presents = [expected[port.name] for port in graph.outputs if port.role == PRESENT]
    for port, present in zip([port for port in graph.inputs if port.role == PAST], presents, strict=True):
        axis = port.shape.index(PAST)
        torch.testing.assert_close(given[port.name].narrow(axis, 0, total), present, atol=1e-5, rtol=1e-5)
        assert bool((given[port.name].narrow(axis, total, 3) == 7.0).all())


@pytest.mark.parametrize(
    ("name", "reason"), [("bert", "traced without caches"), ("t5", "an encoder-decoder: only decoders alone")]
)
def test_models_without_such_caches_are_refused(name: str, reason: str) -> None:
    if name == "bert":
        module, inputs = tiny(name)
        graph = surgeon.trace(module, inputs)
    else:
        graph = surgeon.trace(conditional(name), task="text-generation")
    (refusal,) = make_backend({"aotinductor": {"caches": "shared"}}).refuses(graph)
    assert refusal.node == "caches"
    assert reason in refusal.reason
    assert make_backend("aotinductor").refuses(graph) == []


def test_caches_that_do_not_grow_at_their_end_are_refused() -> None:
    graph = surgeon.trace(tiny("llama", layers=1)[0], task="text-generation").clone()
    nodes = graph.module.graph
    first, second, *_ = [node for node in nodes.nodes if node.op == "placeholder" and "past" in node.name]
    (grown,) = [user for user in first.users if user.target is torch.ops.aten.cat.default]
    grown.args = ([*grown.args[0]][::-1], *grown.args[1:])  # type: ignore[misc]  # in front
    with nodes.inserting_before(nodes.output_node()):
        nodes.call_function(torch.ops.aten.neg.default, (second,))
    reasons = {refusal.node: refusal.reason for refusal in shared.refusals(graph)}
    assert set(reasons) == {"past_key_values.0.key", "past_key_values.0.value"}
    assert "not the cache with new positions behind it" in reasons["past_key_values.0.key"]
    assert "read by neg" in reasons["past_key_values.0.value"]


def test_what_is_handed_in_is_refused_where_it_cannot_be_written() -> None:
    graph = surgeon.trace(tiny("llama", layers=1)[0], task="text-generation")
    call, known = behind_a_past(graph), shared.Buffers("here", graph.inputs)
    given = buffers(graph, call, 3)
    assert known.fit(given)
    assert not known.fit(call)
    name = "past_key_values.0.key"
    total, past = call["attention_mask"].shape[1], call[name].shape[2]

    def refused(reason: str, **changes: Tensor) -> None:
        inputs = {**given, **changes}
        assert not known.fit(inputs) or inputs[name].shape[2] >= total
        with pytest.raises(LowerError, match=reason):
            known.given(inputs, known.as_pasts(inputs), CPU)

    refused(f"{total - 1} positions; attention_mask covers {total}.*past of {past}, or.*at least {total}",
            **{name: given[name][:, :, : total - 1].contiguous()})  # fmt: skip
    refused("with gaps between its numbers", **{name: given[name].transpose(2, 3).contiguous().transpose(2, 3)})
    refused("for one number of positions", **{name: given[name].repeat(1, 1, 2, 1)})
    refused("for one number of positions", **{name: call[name]})
    with pytest.raises(LowerError, match="contiguous tensor on meta; found one on cpu"):
        known.given(given, known.as_pasts(given), torch.device("meta"))
    exact = known.given(call, known.as_pasts(call), CPU)
    assert {tuple(value.shape[2:3]) for value in exact.values()} == {(total,)}


def test_buffers_for_cuda_must_begin_where_the_package_reads_them_in_place() -> None:
    whole = torch.zeros(65)
    with pytest.raises(LowerError, match="that does not begin at a multiple of 16 bytes"):
        shared._check_place("here", "x", _OnCuda(whole[1:]), torch.device("cuda", 0))  # type: ignore[arg-type]
    shared._check_place("here", "x", _OnCuda(whole[:64]), torch.device("cuda", 0))  # type: ignore[arg-type]


class _OnCuda:
    """A tensor that says it is on a device that is not here."""

    device = torch.device("cuda", 0)

    def __init__(self, tensor: Tensor) -> None:
        self.is_contiguous, self.data_ptr = tensor.is_contiguous, tensor.data_ptr


def test_buffers_grow_by_half() -> None:
    sizes, held = [], 0
    for length in range(1, 1000):
        if length > held:
            held = room(length, held)
            sizes.append(held)
    assert sizes == [128, 192, 288, 432, 648, 972, 1458]
    assert room(5000, 128) == 5000


# -- packages -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(shallow_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(shallow_llama, tmp_path_factory.mktemp("shared"))


def built(model: Path, folder: Path) -> Path:
    target = folder / model.name
    surgeon.compile(model, [], backend={"aotinductor": {"caches": "shared"}}, output=target, progress=False)
    return target


@pytest.mark.slow
def test_a_package_generates_what_the_library_does(llama: Path, shallow_llama: Path) -> None:
    model = surgeon.load(llama)
    assert_same(model, source(shallow_llama), room(0, 0) + 20)  # the buffers are outgrown
    operators = model.artifact.details["operators"]  # type: ignore[union-attr]
    assert operators["slice_scatter"] == 6  # the places that are written: three layers, keys and values


@pytest.mark.slow
def test_a_package_of_a_mixture_generates_what_the_library_does(tmp_path: Path) -> None:
    assert_same(surgeon.load(built(MODELS / "tiny-mixtral", tmp_path)), source("tiny-mixtral"))


@pytest.mark.slow
def test_the_callers_memory_is_the_present(llama: Path, shallow_llama: Path) -> None:
    model = surgeon.load(llama)
    graph = surgeon.trace(shallow_llama, task="text-generation")
    call = behind_a_past(graph)
    given, total = buffers(graph, call, 5), call["attention_mask"].shape[1]
    with torch.no_grad():
        expected = graph(**call)
    wanted = ["logits", *(port.name for port in graph.outputs if port.role == PRESENT)]
    pasts = [port.name for port in graph.inputs if port.role == PAST]
    kept = {name: call[name].clone() for name in pasts}
    without = {name: value for name, value in given.items() if name != "position_ids"}
    for inputs in (given, without, call):
        found = model(**inputs)
        assert list(found) == wanted
        assert float((found["logits"] - expected["logits"]).abs().max()) < 1e-4 * float(expected["logits"].abs().max())
        for past, present in zip(pasts, wanted[1:], strict=True):
            torch.testing.assert_close(found[present][:, :, :total], expected[present], atol=1e-5, rtol=1e-4)
            if inputs is not call:
                assert found[present].data_ptr() == given[past].data_ptr()
                assert bool((given[past][:, :, total:] == 7.0).all())
    assert all(torch.equal(call[name], value) for name, value in kept.items())  # pasts without room are left alone
    short = {name: value[:, :, : total - 1].contiguous() if name in pasts else value for name, value in given.items()}
    with pytest.raises(LowerError, match="or a buffer with room for at least"):
        model(**short)
    assert list(model(input_ids=call["input_ids"], attention_mask=torch.ones_like(call["input_ids"]))) == ["logits"]


@pytest.mark.slow
def test_a_process_without_surgeon_runs_a_package(llama: Path, shallow_llama: Path, tmp_path: Path) -> None:
    graph = surgeon.trace(shallow_llama, task="text-generation")
    ids = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = graph(**complete(graph.inputs, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}))["logits"]
    caches: list[Any] = [torch.full((2, p.shape[1], 30, p.shape[3]), 7.0) for p in graph.inputs if p.role == PAST]  # type: ignore[arg-type]
    torch.save((ids, caches, expected), tmp_path / "inputs.pt")
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(llama / "model.pt2"), str(tmp_path / "inputs.pt")],
        capture_output=True, text=True, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    difference, refused = json.loads(run.stdout.splitlines()[-1])
    assert difference < 1e-4
    assert refused == 2


@pytest.mark.slow
def test_bench_times_a_step_as_a_generation_takes_it(llama: Path) -> None:
    candidate = ArtifactCandidate.open(llama, "shared")
    case = Case("decode", 2, 40)
    given: list[list[int]] = []
    run = type(candidate.artifact).run

    def spy(artifact: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        pasts = [value for name, value in inputs.items() if name.startswith("past_key_values")]
        assert all(value.shape[2] > 41 for value in pasts)  # buffers with room
        given.append([value.data_ptr() for value in pasts])
        return run(artifact, inputs)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(type(candidate.artifact), "run", spy)
        step: Any = candidate.prepare(case)
        first, second = step(), step()
    assert given[0] == given[1]  # the same ones, written in place
    assert torch.equal(first, second)
    assert torch.equal(first, candidate.artifact.run(inputs_for(candidate.artifact.inputs, case, candidate.values))["logits"])
