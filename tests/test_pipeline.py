"""``surgeon.compile`` as people call it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import surgeon
from surgeon.errors import LowerError, ObserveError, PlanError, RecipeError, SurgeonError, VerifyError
from tests.conftest import MODELS
from tests.models import tiny

CALIBRATION = {"text": str(MODELS / "calibration.txt"), "samples": 8, "length": 48}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> surgeon.Compiled:
    return surgeon.compile(
        MODELS / "tiny-llama",
        [{"drop_blocks": {"count": 1}}, {"quantize": {"scheme": "int8"}}],
        calibration=CALIBRATION,
        output=tmp_path_factory.mktemp("build") / "artefact",
        progress=False,
    )


def batch(rows: int = 2, length: int = 9) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 1000, (rows, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def test_the_result_is_called_like_the_model(compiled: surgeon.Compiled) -> None:
    found = compiled(**batch())
    assert list(found) == ["logits"]
    assert compiled.graph is not None
    expected = compiled.graph(**batch())["logits"]
    assert found["logits"].shape == (2, 9, 1024)
    assert (found["logits"] - expected).norm() / expected.norm() < 5e-2


def test_the_folder_holds_everything(compiled: surgeon.Compiled) -> None:
    assert compiled.folder is not None
    names = {path.name for path in compiled.folder.iterdir()}
    assert {"model.onnx", "surgeon.json", "plan.json", "report.json", "report.html"} <= names
    report = json.loads((compiled.folder / "report.json").read_text())
    assert [step["name"] for step in report["passes"]] == ["drop_blocks", "quantize"]
    assert report["passes"][0]["removed_blocks"] == [int(report["passes"][0]["plan"]["decisions"][0]["site"][7:])]
    assert len(report["comparisons"]) == 6  # several shapes, none of them the example's, and each behind a cache
    assert not list(compiled.folder.parent.glob(".*"))


def test_save_and_load(compiled: surgeon.Compiled, tmp_path: Path) -> None:
    saved = compiled.save(tmp_path / "copy")
    loaded = surgeon.load(saved)
    assert torch.equal(loaded(**batch())["logits"], compiled(**batch())["logits"])
    with pytest.raises(RecipeError, match="exists already"):
        compiled.save(tmp_path / "copy")
    (saved / "model.onnx").write_bytes(b"short")
    with pytest.raises(LowerError, match="recorded; build it again"):
        surgeon.load(saved)
    with pytest.raises(LowerError, match="no artefact here"):
        surgeon.load(tmp_path)


def test_a_saved_plan_repeats_and_can_be_edited(compiled: surgeon.Compiled, tmp_path: Path) -> None:
    assert compiled.plan is not None
    path = tmp_path / "plan.json"
    compiled.plan.write(path)
    steps = [{"drop_blocks": {"count": 1}}, {"quantize": {"scheme": "int8"}}]
    again = surgeon.compile(MODELS / "tiny-llama", steps, plan=path, backend=None, progress=False)
    assert compiled.graph is not None
    assert torch.equal(again(**batch())["logits"], compiled.graph(**batch())["logits"])
    data = json.loads(path.read_text())
    data["passes"][0]["plan"]["decisions"][0]["site"] = "blocks.0"
    data["passes"] = data["passes"][:1]
    path.write_text(json.dumps(data))
    edited = surgeon.compile(MODELS / "tiny-llama", steps[:1], plan=path, backend=None, progress=False)
    assert edited.report.passes[0].removed_blocks == [0]
    with pytest.raises(PlanError, match="made for another model"):
        surgeon.compile(MODELS / "tiny-mixtral", steps[:1], plan=path, backend=None, progress=False)
    with pytest.raises(PlanError, match="made with other options"):
        surgeon.compile(MODELS / "tiny-llama", [{"drop_blocks": {"count": 2}}], plan=path, backend=None, progress=False)
    data["passes"][0]["plan"]["decisions"][0]["site"] = "blocks.17"
    path.write_text(json.dumps(data))
    with pytest.raises(PlanError, match="passes.0 .drop_blocks.*blocks.17"):
        surgeon.compile(MODELS / "tiny-llama", steps[:1], plan=path, backend=None, progress=False)


def test_without_a_backend_the_graph_is_differentiable() -> None:
    module, inputs = tiny("bert")
    result = surgeon.compile(
        module, [{"moefy_ffn": {"experts": 4, "top_k": 2}}], calibration=[inputs, inputs], backend=None, progress=False
    )
    result(**inputs)["last_hidden_state"].square().sum().backward()
    assert result.graph is not None
    moved = [name for name, tensor in result.graph.parameters().items() if "experts" in name]
    assert moved
    for name in moved:
        gradient = result.graph.tensor(name).grad
        assert gradient is not None
        assert bool(gradient.abs().sum() > 0)
    with pytest.raises(LowerError, match="no artefact to save"):
        result.save("nowhere")


def test_exact_plans_are_checked_and_reported() -> None:
    module, inputs = tiny("gpt2")
    result = surgeon.compile(
        module, [{"moefy_ffn": {"experts": 4, "top_k": 4, "router": "centroid"}}], inputs=inputs, backend=None, progress=False
    )
    step = result.report.passes[0]
    assert step.exact
    assert step.observed_tokens == 0
    assert step.divergence["exact_error"] < 1e-5


def test_a_module_of_no_library_needs_only_inputs() -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.after = torch.nn.LayerNorm(32), torch.nn.LayerNorm(32)
            self.mix, self.out = torch.nn.Linear(32, 96), torch.nn.Linear(32, 32)
            self.wide, self.narrow = torch.nn.Linear(32, 64), torch.nn.Linear(64, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = self.mix(self.before(x)).chunk(3, dim=-1)
            x = x + self.out(torch.nn.functional.scaled_dot_product_attention(q, k, v))
            return x + self.narrow(torch.nn.functional.silu(self.wide(self.after(x))))

    class Stack(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList(Layer() for _ in range(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    torch.manual_seed(0)
    module = Stack().eval()
    batches = [{"x": torch.randn(2, 5, 32)} for _ in range(3)]
    result = surgeon.compile(
        module,
        [{"drop_blocks": {"count": 1}}, {"low_rank": {"ratio": 0.5}}],
        inputs=batches[0],
        calibration=batches,
        progress=False,
    )
    (name,) = result(**batches[0])
    assert result(**batches[0])[name].shape == (2, 5, 32)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda a: a.update(passes=[{"drop_block": {"count": 1}}]), SurgeonError, "drop_blocks"),
        (lambda a: a.update(passes=[{"drop_blocks": {"cuont": 1}}]), RecipeError, "count"),
        (lambda a: a.update(passes=[{"drop_blocks": {"count": "many"}}]), RecipeError, "count"),
        (lambda a: a.update(passes=[{"drop_blocks": {"count": 6}}]), PlanError, "at least one block must remain"),
        (lambda a: a.update(calibration=None), RecipeError, "calibration"),
        (lambda a: a.update(calibration=[]), ObserveError, "calibration is empty"),
        (lambda a: a.update(calibration="no-such-file.txt"), ObserveError, "no such file"),
        (lambda a: a.update(verify={"max_kl": 0.0}), VerifyError, "max_kl"),
        (lambda a: a.update(verify={"max_lk": 0.1}), RecipeError, "max_kl"),
        (lambda a: a.update(backend="onnx"), SurgeonError, "onnxruntime"),
        (lambda a: a.update(backend=None, output="x"), RecipeError, "nothing to write"),
    ],
)
def test_errors_say_what_and_leave_nothing(
    change: Callable[[dict[str, Any]], None], error: type[Exception], message: str, tmp_path: Path
) -> None:
    arguments: dict[str, Any] = {
        "passes": [{"drop_blocks": {"count": 1}}],
        "calibration": CALIBRATION,
        "output": tmp_path / "out",
        "backend": "onnxruntime",
    }
    change(arguments)
    steps = arguments.pop("passes")
    with pytest.raises(error, match=message):
        surgeon.compile(MODELS / "tiny-llama", steps, progress=False, **arguments)
    assert not list(tmp_path.iterdir())


def test_an_existing_output_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(RecipeError, match="exists already"):
        surgeon.compile("no-such-model", [], output=tmp_path / "out", progress=False)
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(RecipeError, match="not an output of surgeon"):
        surgeon.compile("no-such-model", [], output=tmp_path / "out", force=True, progress=False)
