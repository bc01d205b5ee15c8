"""Graphs that outlive the process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import surgeon
from surgeon.accounting import memory
from surgeon.caches import has_caches
from surgeon.discovery import discover
from surgeon.errors import LowerError, RecipeError, TraceError
from surgeon.graph import Graph
from surgeon.graph_file import NODES, WEIGHTS, load_graph, save_graph
from surgeon.tracing import trace
from tests.conftest import MODELS
from tests.family_table import SECTIONS

CALIBRATION = {"text": str(MODELS / "calibration.txt"), "samples": 16, "length": 48}


@pytest.fixture(scope="module")
def cut() -> Graph:
    """A mixture with caches and one table as embedding and head, without some experts, a layer's experts in 4 bits."""
    steps = [{"drop_experts": {"keep": 4}}, {"quantize": {"scheme": "int4", "names": "blocks.1.moe"}}]
    built = surgeon.compile(MODELS / "tiny-mixtral", steps, calibration=CALIBRATION, backend=None, progress=False)
    assert built.graph is not None
    return built.graph


def test_a_graph_is_read_as_it_was_written(cut: Graph, tmp_path: Path) -> None:
    assert has_caches(cut.inputs)
    folder = save_graph(cut, tmp_path / "graph")
    again = load_graph(folder)
    assert again.fingerprint(weights=True) == cut.fingerprint(weights=True)
    assert (again.inputs, again.outputs, again.dims, again.source) == (cut.inputs, cut.outputs, cut.dims, cut.source)
    assert {name: type(tensor) for name, tensor in again.parameters().items()} == {
        name: type(tensor) for name, tensor in cut.parameters().items()
    }
    assert again.parameter_count() == cut.parameter_count()
    assert again.nbytes() == cut.nbytes()
    blocks = [[(block.kind, block.weights) for block in discover(graph).blocks] for graph in (cut, again)]
    assert blocks[0] == blocks[1]
    given = {"input_ids": (ids := torch.arange(20).reshape(2, 10)), "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        assert torch.equal(again(**given)["logits"], cut(**given)["logits"])


def test_tied_weights_stay_one(cut: Graph, tmp_path: Path) -> None:
    def tied(graph: Graph) -> set[frozenset[str]]:
        groups: dict[object, set[str]] = {}
        for name, tensor in graph.parameters().items():
            groups.setdefault(memory(tensor), set()).add(name)
        return {frozenset(names) for names in groups.values() if len(names) > 1}

    graph = SECTIONS["One stream"]["gpt2"]("gpt2").graph
    for number, one in enumerate((graph, cut)):
        assert tied(load_graph(save_graph(one, tmp_path / str(number)))) == tied(one)
    size = (tmp_path / "0" / WEIGHTS).stat().st_size
    assert size < graph.nbytes() + 20_000  # names and example inputs beside the weights


def test_one_goes_on_with_it(cut: Graph, tmp_path: Path) -> None:
    save_graph(cut, tmp_path / "graph")
    steps = [{"drop_blocks": {"count": 1}}, {"quantize": {"scheme": "int8", "blocks": [0]}}]
    here, later = (
        surgeon.compile(graph, steps, calibration=CALIBRATION, output=tmp_path / name, progress=False)
        for graph, name in ((cut, "here"), (surgeon.load_graph(tmp_path / "graph"), "later"))
    )
    assert here.plan == later.plan
    ids = torch.arange(12).reshape(2, 6)
    assert torch.equal(here.generate(ids, max_new_tokens=6), later.generate(ids, max_new_tokens=6))


@pytest.mark.parametrize(
    ("section", "name"),
    [
        ("One stream", "gemma3"),
        ("Mixtures of experts", "deepseek_v3"),
        ("Several streams, hybrids, pyramids", "t5"),
        ("Several streams, hybrids, pyramids", "mamba"),
        ("Several streams, hybrids, pyramids", "swin"),
        ("Written by hand: mixtures of experts", "where_loop"),
    ],
)
def test_other_graphs_are_read_with_their_sizes(section: str, name: str, tmp_path: Path) -> None:
    case = SECTIONS[section][name](name)
    again = load_graph(save_graph(case.graph, tmp_path / "graph"))
    assert again.fingerprint(weights=True) == case.graph.fingerprint(weights=True)
    kinds = [[(block.kind, [region.kind for region in block.regions]) for block in s.blocks] for s in (
        case.structure, discover(again)
    )]  # fmt: skip
    assert kinds[0] == kinds[1]

    def fixed(graph: Graph) -> list[list[int | None]]:
        values = [node.meta["val"] for node in graph.module.graph.nodes if node.op != "output"]
        return [[size if isinstance(size, int) else None for size in getattr(value, "shape", ())] for value in values]

    assert fixed(again) == fixed(case.graph)


def test_what_cannot_be_saved_or_is_there_is_refused(cut: Graph, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("keep")
    with pytest.raises(RecipeError, match="exists already"):
        save_graph(cut, tmp_path / "other")
    with pytest.raises(RecipeError, match="not an output of surgeon"):
        save_graph(cut, tmp_path / "other", force=True)
    save_graph(cut, tmp_path / "graph")
    with pytest.raises(RecipeError, match="exists already"):
        save_graph(cut, tmp_path / "graph")
    save_graph(cut, tmp_path / "graph", force=True)
    with pytest.raises(TraceError, match="fake weights"):
        save_graph(trace(MODELS / "tiny-llama", weights="fake"), tmp_path / "fake")
    assert not (tmp_path / "fake").exists()


def test_a_folder_with_a_graph_is_no_artefact(cut: Graph, tmp_path: Path) -> None:
    save_graph(cut, tmp_path / "graph")
    with pytest.raises(LowerError, match="surgeon.load_graph"):
        surgeon.load(tmp_path / "graph")
    with pytest.raises(TraceError, match="not a saved graph"):
        load_graph(tmp_path)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda d: d.update(format=2), "format 2, this version reads 1"),
        (lambda d: d["nodes"].pop(), "cannot be read"),
        (lambda d: d["tensors"].pop(next(iter(d["tensors"]))), "cannot be read"),
        (lambda d: _call(d).update(target="nowhere::nothing.default"), "nowhere::nothing.default, which is not registered"),
        (lambda d: _call(d).update(target="torch:load"), "torch:load, which is no function on sizes"),
        (lambda d: _call(d).update(target="os:system"), "os:system, which is no function on sizes"),
        (lambda d: _call(d).update(target="_operator:__class__"), "no function on sizes"),
        (lambda d: _linear(d)["args"]["tuple"].reverse(), "cannot be read"),
        (lambda d: d["nodes"][0].update(name="other"), "cannot be read"),
        (lambda d: d.update(fingerprint="0" * 64), "was changed"),
    ],
)  # fmt: skip
def test_an_edited_file_is_refused(cut: Graph, tmp_path: Path, edit: object, said: str) -> None:
    save_graph(cut, tmp_path / "graph")
    path = tmp_path / "graph" / NODES
    data = json.loads(path.read_text(encoding="utf-8"))
    edit(data)  # type: ignore[operator]  # a function
    path.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(TraceError, match=said):
        load_graph(tmp_path / "graph")


def test_half_a_file_is_refused(cut: Graph, tmp_path: Path) -> None:
    save_graph(cut, tmp_path / "graph")
    weights = tmp_path / "graph" / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(TraceError, match="cannot be read"):
        load_graph(tmp_path / "graph")


def _call(data: dict[str, list[dict[str, str]]]) -> dict[str, str]:
    return next(node for node in data["nodes"] if node["op"] == "call_function")


def _linear(data: dict[str, list[dict[str, dict[str, list[object]]]]]) -> dict[str, dict[str, list[object]]]:
    return next(node for node in data["nodes"] if node["target"] == "aten::linear.default")  # type: ignore[comparison-overlap]
