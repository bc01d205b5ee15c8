"""Going on from a graph: pruned, fine-tuned, then quantized and lowered."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import surgeon
from surgeon.compiled import Compiled
from surgeon.continued import source_of
from surgeon.data import load_data
from surgeon.errors import RecipeError
from surgeon.graph import Graph
from surgeon.observe import Batch
from surgeon.recipe import Calibration
from surgeon.tracing import trace
from tests.conftest import MODELS
from tests.models import tiny

LLAMA, TEXT = MODELS / "tiny-llama", MODELS / "calibration.txt"
CALIBRATION = {"text": str(TEXT), "samples": 48, "length": 64}


def _loss(compiled: Compiled, batch: Batch) -> Tensor:
    logits = compiled(**batch)["logits"][:, :-1].flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, batch["input_ids"][:, 1:].flatten())


@cache
def _graph() -> Graph:
    return trace(LLAMA)


@cache
def _recovered() -> tuple[Compiled, float, float]:
    """A model without a quarter of its neurons, fine-tuned; its loss on text that neither saw, before and after."""
    pruned = surgeon.compile(
        LLAMA, [{"drop_neurons": {"ratio": 0.5, "criterion": "random", "refit": False}}], calibration=CALIBRATION,
        backend=None, progress=False,
    )  # fmt: skip
    data = load_data(Calibration(text=TEXT, samples=48, length=64), _graph())
    full = [batch for batch in data.calibration if batch["attention_mask"].all()]
    *training, held_back = full
    with torch.no_grad():
        before = float(_loss(pruned, held_back))
    assert pruned.graph is not None
    optimizer = torch.optim.AdamW(pruned.graph.module.parameters(), lr=1e-3)
    for batch in training * 2:
        optimizer.zero_grad()
        _loss(pruned, batch).backward()
        optimizer.step()
    with torch.no_grad():
        return pruned, before, float(_loss(pruned, held_back))


def test_a_fine_tuned_graph_is_quantized_and_lowered(tmp_path: Path) -> None:
    pruned, before, after = _recovered()
    assert after < before - 0.1
    graph = pruned.graph
    assert graph is not None
    fingerprint = graph.fingerprint(weights=True)
    lines = tmp_path / "lines.txt"
    lines.write_text("\n".join(TEXT.read_text(encoding="utf-8").splitlines()[:40]), encoding="utf-8")
    built = surgeon.compile(
        pruned, [{"quantize": {"scheme": "int8"}}], calibration=CALIBRATION, output=tmp_path / "out",
        evaluate={"latency": [1], "length": 16, "text": str(lines), "unit": "line"}, progress=False,
    )  # fmt: skip
    assert graph.fingerprint(weights=True) == fingerprint  # what was handed over stays as it is
    # compared with the fine-tuned graph, of which 8 bits lose next to nothing; the source model is far from it
    assert built.report.quality["kl"] < 1e-3
    assert built.report.quality["artifact_kl"] < 1e-3
    assert [(row.phase, row.batch) for row in built.report.latency] == [("prefill", 1)]
    assert any("decodes without caches" in warning for warning in built.report.warnings)
    ids = torch.arange(24).reshape(2, 12)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        error = (built(**given)["logits"] - graph(**given)["logits"]).norm() / graph(**given)["logits"].norm()
    assert error < 0.02
    assert built.generate(ids, max_new_tokens=4, eos_token_id=()).shape == (2, 16)


def test_its_plan_repeats_on_it_alone() -> None:
    pruned, _, _ = _recovered()
    steps: list[dict[str, Any]] = [{"drop_blocks": {"count": 1}}]
    first = surgeon.compile(pruned.graph, steps, calibration=CALIBRATION, backend=None, progress=False)
    again = surgeon.compile(pruned.graph, steps, plan=first.plan, backend=None, progress=False)
    assert first.graph is not None
    assert again.graph is not None
    assert first.graph.fingerprint(weights=True) == again.graph.fingerprint(weights=True)
    with pytest.raises(surgeon.SurgeonError, match="made for another model"):
        surgeon.compile(LLAMA, steps, plan=first.plan, backend=None, progress=False)


def test_a_fine_tuned_graph_becomes_a_checkpoint(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    pruned, _, _ = _recovered()
    built = surgeon.compile(
        pruned, [{"drop_blocks": {"count": 1}}], calibration=CALIBRATION, backend="huggingface", output=tmp_path / "out",
        progress=False,
    )  # fmt: skip
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert built.graph is not None
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        wanted = built.graph(input_ids=ids, attention_mask=torch.ones_like(ids))["logits"]
        assert torch.allclose(loaded(ids).logits, wanted, atol=1e-4)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"dtype": "bfloat16", "task": "forward"}, "task, dtype: a graph was traced before"),
        ({"inputs": {"input_ids": torch.zeros(1, 4)}}, "inputs: a graph"),
        ({"trust_remote_code": True}, "trust_remote_code: a graph"),
    ],
)
def test_what_says_how_to_trace_comes_too_late(given: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        surgeon.compile(_graph(), [], backend=None, progress=False, **given)


def test_an_opened_artefact_has_no_graph(tmp_path: Path) -> None:
    module, inputs = tiny("gpt2", layers=1)
    surgeon.compile(module, [], inputs=inputs, output=tmp_path / "out", progress=False)
    with pytest.raises(RecipeError, match="holds no graph to operate on"):
        surgeon.compile(surgeon.load(tmp_path / "out"), [], backend=None, progress=False)


def test_a_graph_is_timed_where_an_artefact_runs() -> None:
    """A copy over other weights, of which the graph itself notices nothing; ``meta`` stands for a device."""
    graph = _graph()
    module = source_of(graph).module
    names = graph.parameters()
    copied = copy.deepcopy(module, {id(tensor): tensor.detach().to("meta") for tensor in names.values()})
    ids = torch.zeros(2, 8, dtype=torch.int64, device="meta")
    found = copied(input_ids=ids, attention_mask=torch.ones_like(ids))
    assert found["logits"].device.type == "meta"
    assert {tensor.device.type for tensor in graph.parameters().values()} == {"cpu"}
    assert {str(node.kwargs["device"]) for node in graph.module.graph.nodes if "device" in node.kwargs} <= {"cpu"}
