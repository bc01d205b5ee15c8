"""``surgeon.compile`` as people call it."""

from __future__ import annotations

import errno
import inspect
import io
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import transformers
from rich.console import Console
from safetensors.torch import load_file

import surgeon
from surgeon import building, lowering, pipeline
from surgeon.backends._onnx_artifact import OnnxRuntimeArtifact
from surgeon.backends.onnxruntime import OnnxRuntime
from surgeon.data import load_data
from surgeon.errors import LowerError, ObserveError, PlanError, RecipeError, SurgeonError, TraceError, VerifyError
from surgeon.output import check_writable, staged, write_file
from surgeon.passes.drop_blocks import DropBlocks
from surgeon.progress import Progress
from surgeon.recipe import load_recipe
from surgeon.source import LoadedSource
from surgeon.terminal import render_terminal
from tests.conftest import MODELS, Patient, Trained
from tests.models import tiny

CALIBRATION = {"text": str(MODELS / "calibration.txt"), "samples": 8, "length": 48}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory, shallow_llama: Path) -> surgeon.Compiled:
    return surgeon.compile(
        shallow_llama,
        [DropBlocks(count=1), {"quantize": {"scheme": "int8"}}],
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
    assert not list(compiled.folder.parent.glob(".*"))


def test_save_and_load(compiled: surgeon.Compiled, tmp_path: Path) -> None:
    saved = compiled.save(tmp_path / "copy")
    loaded = surgeon.load(saved)
    assert torch.equal(loaded(**batch())["logits"], compiled(**batch())["logits"])
    with pytest.raises(RecipeError, match="exists already"):
        compiled.save(tmp_path / "copy")
    (saved / "model.onnx").write_bytes(b"short")
    with pytest.raises(LowerError, match="model.onnx is damaged: bytes is 5, recorded"):
        surgeon.load(saved)
    with pytest.raises(LowerError, match="no artefact here"):
        surgeon.load(tmp_path)
    with pytest.raises(LowerError, match=r"plan\.json: a file, needed the folder that a build wrote"):
        surgeon.load(saved / "plan.json")


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("surgeon.json", "{", "surgeon.json: cannot be read"),
        ("surgeon.json", "[]", "not the manifest of an artefact; it lacks backend, files, inputs, options, outputs"),
        ("surgeon.json", '{"backend": "onnxruntime"}', "it lacks files, inputs, options, outputs"),
        ("report.json", '{"speed": 1}', "report.json: cannot be read"),
        ("report.json", None, "no artefact here .report.json is missing"),
    ],
)
def test_a_folder_that_is_no_whole_artefact_is_refused(
    compiled: surgeon.Compiled, tmp_path: Path, file: str, content: str | None, words: str
) -> None:
    saved = compiled.save(tmp_path / "copy")
    if content is None:
        (saved / file).unlink()
    else:
        (saved / file).write_text(content)
    with pytest.raises(LowerError, match=words):
        surgeon.load(saved)


def test_a_manifest_names_files_of_its_folder_only(compiled: surgeon.Compiled, tmp_path: Path) -> None:
    saved = compiled.save(tmp_path / "copy")
    (saved / "model.onnx").rename(tmp_path / "model.onnx")
    manifest = (saved / "surgeon.json").read_text()
    (saved / "surgeon.json").write_text(manifest.replace('"model.onnx"', '"../model.onnx"'))
    with pytest.raises(LowerError, match=r"names \.\./model.onnx, which is not in this folder"):
        surgeon.load(saved)


def test_an_output_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    """Two builds into one folder: without force the second does not replace what the first wrote."""
    target, first = tmp_path / "out", tmp_path / "first"
    first.mkdir()
    (first / "surgeon.json").write_text("first")
    with pytest.raises(RecipeError, match="exists already"), staged(target):
        first.rename(target)
    assert (target / "surgeon.json").read_text() == "first"
    with staged(target, force=True) as folder:
        (folder / "surgeon.json").write_text("second")
    assert (target / "surgeon.json").read_text() == "second"
    assert not list(tmp_path.glob(".*"))


def test_errors_name_the_folder_that_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the hidden one beside it in which a build writes, whoever says it and however deep."""
    target = tmp_path / "out"

    def write(folder: Path) -> None:
        try:
            (folder / "missing" / "file").write_text("")
        except OSError as error:
            raise LowerError(f"{folder}: bad") from error

    with pytest.raises(LowerError, match=f"^{target}: bad") as raised, staged(target) as folder:
        write(folder)
    cause = raised.value.__cause__
    assert isinstance(cause, OSError)
    assert cause.filename == str(target / "missing" / "file")

    def fails(self: OnnxRuntimeArtifact, inputs: object) -> dict[str, torch.Tensor]:
        raise LowerError(f"{self.path}: the runtime failed")

    monkeypatch.setattr(OnnxRuntimeArtifact, "run", fails)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LowerError, match="^out/model.onnx: the runtime failed"):  # as it was named
        surgeon.compile(tiny("llama")[0], [], output="out", progress=False)

    def broken(self: Path, *args: object, **kwargs: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(self))

    monkeypatch.setattr(Path, "open", broken)
    with pytest.raises(OSError, match="Input/output") as unwritten:
        write_file(tmp_path / "plan.json", "{}")
    assert unwritten.value.filename == str(tmp_path / "plan.json")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(RecipeError, match="cannot be written to"):
        check_writable(tmp_path / "plan.json")


def test_a_saved_plan_repeats_and_can_be_edited(compiled: surgeon.Compiled, shallow_llama: Path, tmp_path: Path) -> None:
    assert compiled.plan is not None
    path = tmp_path / "plan.json"
    compiled.plan.write(path)
    steps = [{"drop_blocks": {"count": 1}}, {"quantize": {"scheme": "int8"}}]
    again = surgeon.compile(shallow_llama, steps, plan=path, backend=None, progress=False)
    assert compiled.graph is not None
    assert torch.equal(again(**batch())["logits"], compiled.graph(**batch())["logits"])
    data = json.loads(path.read_text())
    data["passes"][0]["plan"]["decisions"][0]["site"] = "blocks.0"
    data["passes"] = data["passes"][:1]
    path.write_text(json.dumps(data))
    source = surgeon.trace(shallow_llama)
    edited = surgeon.compile(source, steps[:1], plan=path, backend=None, progress=False)
    assert edited.report.passes[0].removed_blocks == [0]
    with pytest.raises(PlanError, match="made for another model"):
        surgeon.compile(MODELS / "tiny-mixtral", steps[:1], plan=path, backend=None, progress=False)
    with pytest.raises(PlanError, match="made with other options"):
        surgeon.compile(source, [{"drop_blocks": {"count": 2}}], plan=path, backend=None, progress=False)
    decisions = data["passes"][0]["plan"]["decisions"]
    decisions.append(decisions[0])
    path.write_text(json.dumps(data))
    with pytest.raises(PlanError, match=r"passes\.0 \(drop_blocks\): .*blocks\.0 decided more than once"):
        surgeon.compile(source, steps[:1], plan=path, backend=None, progress=False)
    decisions.pop()
    decisions[0]["site"] = "blocks.17"
    path.write_text(json.dumps(data))
    with pytest.raises(PlanError, match="passes.0 .drop_blocks.*blocks.17"):
        surgeon.compile(source, steps[:1], plan=path, backend=None, progress=False)


def test_outputs_that_become_nan_are_refused() -> None:
    whole, spoilt = {"logits": torch.tensor([1.0, -torch.inf])}, {"logits": torch.tensor([torch.nan, -torch.inf])}
    pipeline.check_finite(DropBlocks(count=1), [whole], [whole])  # what was infinite may stay so
    with pytest.raises(VerifyError, match=r"drop_blocks: 1 of 2 numbers of output 'logits' are NaN or infinite"):
        pipeline.check_finite(DropBlocks(count=1), [whole], [spoilt])


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
        (lambda a: a.update(passes=[{"drop_blocks": {"count": 3}}]), PlanError, "at least one block must remain"),
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
    change: Callable[[dict[str, Any]], None], error: type[Exception], message: str, shallow_llama: Path, tmp_path: Path
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
        surgeon.compile(shallow_llama, steps, progress=False, **arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("passes", "given", "error", "message"),
    [
        ({"expose_routing": {"replay": True}}, {}, RecipeError, "passes: found a mapping of expose_routing, needed a list"),
        (None, {}, RecipeError, "passes: found NoneType, needed a list of passes"),
        ([], {"calibration": 3}, RecipeError, "calibration: found int, needed a text file"),
        ([], {"calibration": {"input_ids": torch.ones(2, 3)}}, RecipeError, r"one mapping of tensors \(input_ids\), needed"),
        ([], {"plan": {"passes": []}}, PlanError, "plan: found dict, needed the path of a plan file"),
        ([], {"dtype": torch.int8}, TraceError, r"unknown dtype torch\.int8: known: bfloat16, float16"),
    ],
)
def test_arguments_of_the_wrong_kind(
    passes: Any, given: dict[str, Any], error: type[Exception], message: str, shallow_llama: Path
) -> None:
    with pytest.raises(error, match=message):
        surgeon.compile(shallow_llama, passes, progress=False, **given)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda b: [{k: v.numpy() for k, v in b.items()}], "batch 0: input 'input_ids' must be a torch.Tensor, found ndarray"),
        (lambda b: [b, b | {"labels": b["input_ids"]}], "batch 1: the graph's inputs are .* unknown: labels"),
        (lambda b: [b, b | {"input_ids": b["input_ids"] + 1023}], r"batch 1: input_ids holds \d+, .* rows 0 to 1023"),
        (lambda b: [b | {"input_ids": -b["input_ids"]}], r"batch 0: input_ids holds -\d+, and the model's table has rows 0"),
        (lambda b: [b | {"attention_mask": 0 * b["attention_mask"]}], "batch 0: its attention_mask is 0 everywhere"),
        (lambda b: [b, {k: v[:0] for k, v in b.items()}], r"batch 1: input_ids \[0, 9\] holds nothing"),
        (lambda b: [b | {"input_ids": b["input_ids"].float()}], r"fails on calibration data of input_ids .* torch\.float32"),
        (lambda b: {**CALIBRATION, "length": 1}, "does not cut rows to length 1, they have up to"),
    ],
)
def test_calibration_that_the_model_cannot_take(
    broken: Callable[[dict[str, torch.Tensor]], Any], message: str, tiny_llama: Trained
) -> None:
    given, _ = building._calibration(broken(batch()))
    with pytest.raises(ObserveError, match=message):
        pipeline._reference(tiny_llama.graph, load_data(given, tiny_llama.graph))


def test_inputs_of_the_wrong_kind_are_named_in_calls(compiled: surgeon.Compiled) -> None:
    ids, mask = batch().values()
    assert compiled.graph is not None
    calls: list[tuple[Any, type[SurgeonError]]] = [(compiled, LowerError), (compiled.graph, TraceError)]
    for call, error in calls:
        with pytest.raises(error, match=r"input 'input_ids' must have shape \['batch', 'sequence'\], found \[9\]"):
            call(input_ids=ids[0], attention_mask=mask[0])
        with pytest.raises(error, match=r"input 'input_ids' must be a torch\.Tensor, found list"):
            call(input_ids=ids.tolist(), attention_mask=mask)


def test_text_for_a_model_of_images_is_refused_as_that(patient: Callable[[str], Patient]) -> None:
    given, _ = building._calibration(CALIBRATION)
    with pytest.raises(ObserveError, match="text cannot feed this model: its inputs are pixel_values; give calibration as"):
        load_data(given, patient("vit").graph)


def test_dimensions_that_do_not_vary(shallow_llama: Path, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"inputs": batch(2, 9), "backend": None, "progress": False}
    dynamic: dict[str, dict[int, str]] = {"input_ids": {0: "rows"}, "attention_mask": {0: "rows"}}
    compiled = surgeon.compile(shallow_llama, [], dynamic=dynamic, **arguments)
    assert compiled.graph is not None
    assert [port.shape for port in compiled.graph.inputs] == [("rows", 9)] * 2
    with pytest.raises(TraceError, match=r"'input_ids' must have the shape \['rows', 9\] .*found \[2, 10\]"):
        compiled(**batch(2, 10))
    recipe = tmp_path / "recipe.yaml"
    dims = {"input_ids": ["rows", None], "attention_mask": ["rows", None]}
    model = {"path": str(shallow_llama), "task": "forward", "dynamic": dims}
    recipe.write_text(json.dumps({"model": model, "passes": [], "backend": None}))
    graph = building.compile_recipe(load_recipe(recipe), progress=False).graph
    assert graph is not None
    assert [port.shape for port in graph.inputs] == [("rows", 7)] * 2


def test_types_that_the_backend_does_not_take_are_refused_before_any_pass_works(shallow_llama: Path) -> None:
    steps = [{"drop_blocks": {"count": 3}}]  # which the pass would refuse
    with pytest.raises(LowerError, match=r"bfloat16 has no kernels .* dtype=\"float32\" from Python"):
        surgeon.compile(shallow_llama, steps, calibration=CALIBRATION, dtype="bfloat16", progress=False)


def test_an_artefact_that_is_too_far_is_built_with_less_rounding(
    monkeypatch: pytest.MonkeyPatch, shallow_llama: Path, tmp_path: Path
) -> None:
    """Unless the user chose how much: then the error says what brings it nearer."""
    monkeypatch.setattr(OnnxRuntime, "low_bit_tolerance", 1e-4)
    recipe = {"model": {"path": str(shallow_llama)}, "passes": [{"quantize": {"scheme": "int4"}}]}
    path, output = tmp_path / "recipe.yaml", tmp_path / "out"
    path.write_text(json.dumps({**recipe, "backend": {"onnxruntime": {"threads": 1}}, "output": str(output)}))
    compiled = building.compile_recipe(load_recipe(path), progress=False)
    (warning,) = [text for text in compiled.report.warnings if "accuracy_level" in text]
    assert re.search(r"differs by .*, at most 1e-04 is accepted.*; accuracy_level: 4 rounds .*, and was taken", warning)
    assert compiled.artifact is not None
    assert compiled.artifact.options["accuracy_level"] == 0
    assert max(max(each.relative_error.values()) for each in compiled.report.comparisons) < 1e-4
    assert load_recipe(output / "recipe.yaml").backend == OnnxRuntime(accuracy_level=0, threads=1)
    assert sorted(each.name for each in output.iterdir() if each.suffix == ".onnx") == ["model.onnx"]
    path.write_text(json.dumps({**recipe, "backend": {"onnxruntime": {"accuracy_level": 4}}, "output": str(tmp_path / "b")}))
    with pytest.raises(VerifyError, match=r"at most 1e-04 is accepted.*; accuracy_level: 4 rounds .* model's type\n"):
        building.compile_recipe(load_recipe(path), progress=False)
    assert not (tmp_path / "b").exists()


def test_dynamic_quantization_of_a_model_with_caches(shallow_llama: Path) -> None:
    steps = [{"quantize": {"scheme": "int8_dynamic"}}]
    compiled = surgeon.compile(shallow_llama, steps, backend=None, progress=False)
    assert compiled.graph is not None
    assert any("+" in str(size) for port in compiled.graph.inputs for size in port.shape)  # past + sequence
    assert OnnxRuntime().accepted_error(compiled.graph) == OnnxRuntime.dynamic_tolerance  # it moves by less than that


def test_an_output_that_cannot_be_made_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RecipeError, match=r"would lie in .*file, which is a file; name another directory"):
        surgeon.compile("no-such-model", [], output=tmp_path / "file" / "out", progress=False)
    if Path("/proc").is_dir():  # where the administrator cannot make a folder either
        with pytest.raises(RecipeError, match="/proc cannot be written to"):
            surgeon.compile("no-such-model", [], output="/proc/out", progress=False)


def test_an_existing_output_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(RecipeError, match="exists already"):
        surgeon.compile("no-such-model", [], output=tmp_path / "out", progress=False)
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(RecipeError, match="not an output of surgeon"):
        surgeon.compile("no-such-model", [], output=tmp_path / "out", force=True, progress=False)


# -- the interface, as the documentation gives it ---------------------------------------------------------------------


def test_the_signature_is_what_is_documented() -> None:
    parameters = inspect.signature(surgeon.compile).parameters
    assert list(parameters)[:7] == ["model", "passes", "inputs", "calibration", "backend", "output", "verify"]
    assert [parameters[name].default for name in ("inputs", "calibration", "backend", "output", "verify")] == [
        None, None, "onnxruntime", None, None
    ]  # fmt: skip
    assert all(parameters[name].kind is inspect.Parameter.KEYWORD_ONLY for name in list(parameters)[2:])
    assert list(inspect.signature(surgeon.trace).parameters)[:2] == ["model", "inputs"]
    for function, first in ((surgeon.discover, "graph"), (surgeon.load, "folder"), (surgeon.Compiled.save, "folder")):
        assert first in inspect.signature(function).parameters


def test_a_recipe_path_stands_for_its_passes_data_and_limits(shallow_llama: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: elsewhere\ncalibration: {{text: {MODELS / 'calibration.txt'}, samples: 8, length: 48}}\n"
        "passes:\n  - drop_blocks: {count: 1}\nverify: {max_kl: 0.0}\n"
    )
    with pytest.raises(VerifyError, match="max_kl"):
        surgeon.compile(shallow_llama, recipe, backend=None, progress=False)


def test_calibration_text_needs_a_tokenizer_of_somewhere(tiny_llama: Trained) -> None:
    """A module has no checkpoint beside it: the tokenizer is given with the text, as an object or a path."""
    graph = tiny_llama.graph.with_source(path=None)
    text, none = building._calibration(MODELS / "calibration.txt")
    assert none is None
    with pytest.raises(ObserveError, match="needs a tokenizer"):
        load_data(text, graph, none)
    for given in (MODELS / "tiny-llama", transformers.AutoTokenizer.from_pretrained(MODELS / "tiny-llama")):
        spec, tokenizer = building._calibration({**CALIBRATION, "samples": 32, "length": 128, "tokenizer": given})
        batches = load_data(spec, graph, tokenizer).calibration
        assert len(batches) == len(tiny_llama.data.calibration)
        for found, wanted in zip(batches, tiny_llama.data.calibration, strict=True):
            assert torch.equal(found["input_ids"], wanted["input_ids"])


def test_the_artefact_is_compared_on_shapes_of_its_own(compiled: surgeon.Compiled) -> None:
    assert compiled.graph is not None
    example = {name: list(value.shape) for name, value in compiled.graph.example.items()}
    shapes = [comparison.shapes for comparison in compiled.report.comparisons]
    assert len(shapes) == 6  # three, and each again behind a cache
    assert len({str(shape) for shape in shapes}) == 6
    assert example not in shapes


@pytest.mark.parametrize(
    ("scheme", "level", "tolerance"), [("int8", 4, 2e-2), ("int4", 0, 1e-5)]
)
def test_low_bit_artefacts_equal_the_graph_and_weigh_their_bits(
    scheme: str, level: int, tolerance: float, shallow_llama: Path, tmp_path: Path
) -> None:
    """At level 0 activations stay float (1e-6 measured), at level 4 they are rounded to 8 bits (about 1e-2)."""
    result = surgeon.compile(
        shallow_llama,
        [{"quantize": {"scheme": scheme, "group": 32, "embeddings": True}}],
        backend={"onnxruntime": {"accuracy_level": level, "threads": 1}},
        output=tmp_path / "out",
        progress=False,
    )
    assert result.graph is not None
    assert result.artifact is not None
    assert result.artifact.options["threads"] == 1
    for rows, length in ((1, 5), (3, 17)):
        expected = result.graph(**batch(rows, length))["logits"]
        found = surgeon.load(tmp_path / "out")(**batch(rows, length))["logits"]
        assert (found - expected).norm() / expected.norm() < tolerance
    # bits x weights of all matrices and a float32 scale per 32 weights, and the vectors, which stay float32
    bits = int(scheme.removeprefix("int"))
    weights = load_file(shallow_llama / "model.safetensors").values()
    matrices = sum(w.numel() for w in weights if w.dim() == 2)
    vectors = sum(w.numel() for w in weights if w.dim() == 1)
    wanted = matrices * bits / 8 + matrices / 32 * 4 + vectors * 4
    size = (tmp_path / "out" / "model.onnx").stat().st_size
    assert size == result.report.bytes[1]
    assert wanted <= size - graph_bytes(tmp_path / "out" / "model.onnx")
    assert result.artifact.details["weight_bytes"] <= wanted * 1.03
    assert list(result.artifact.details["quantization"]) != []


def graph_bytes(path: Path) -> int:
    """What a model file holds beside its weights: nodes, names and shapes."""
    model = onnx.load(path)
    for initializer in model.graph.initializer:
        initializer.ClearField("raw_data")
    return len(model.SerializeToString())


def test_everything_that_takes_long_is_under_a_bar(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whatever runs the model, searches it or writes files does so while the user is told what is going on."""
    active: list[str] = []
    told: set[str] = set()

    class Recorder(Progress):
        @contextmanager
        def step(self, description: str) -> Iterator[None]:
            active.append(description)
            yield
            active.remove(description)

    def watch(owner: Any, attribute: str) -> None:
        original = getattr(owner, attribute)

        def watched(*args: Any, **kwargs: Any) -> Any:
            assert active, f"{attribute} runs without a word"
            told.add(attribute)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, attribute, watched)

    monkeypatch.setattr(pipeline, "Progress", Recorder)
    for attribute in ("load_source", "trace_source", "discover", "load_data", "inspection", "run_pass"):
        watch(pipeline, attribute)
    watch(lowering, "compare_artifact")
    for attribute in ("evaluate_section", "write_outputs"):
        watch(pipeline, attribute)
    watch(pipeline.Graph, "__call__")
    module, inputs = tiny("bert")
    surgeon.compile(
        module,
        [{"drop_blocks": {"count": 1}}, {"quantize": {"scheme": "int8"}}],
        inputs=inputs,
        calibration=[inputs, inputs],
        evaluate={"latency": [1], "length": 8},
        output=tmp_path / "out",
    )
    assert len(told) == 10
    assert not active


def test_a_text_to_evaluate_that_the_model_cannot_read_is_refused_before_anything_is_built(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pipeline, "operate", None)  # no pass runs

    def refused(name: str, length: int) -> str:
        module, inputs = tiny(name)
        inputs.pop("token_type_ids", None)
        arguments: dict[str, Any] = {"inputs": inputs, "progress": False}
        if name == "bert":
            arguments["calibration"] = {**CALIBRATION, "tokenizer": str(MODELS / "tiny-llama")}
        section = {"text": CALIBRATION["text"], "unit": "window", "length": length}
        with pytest.raises(ObserveError) as error:
            surgeon.compile(module, [{"drop_blocks": {"count": 1}}], evaluate=section, **arguments)
        return str(error.value)

    said = refused("vit", 8)
    assert said == "evaluate.text: this model takes no text, its inputs are pixel_values; leave text out"
    longer = tiny("bert")[0].config.max_position_embeddings + 1
    said = refused("bert", longer)
    assert said.startswith(f"evaluate.text: the model fails on a row of {longer} tokens: ")
    assert said.endswith("give a smaller evaluate.length")


def test_warnings_name_the_folder_that_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: OnnxRuntimeArtifact, inputs: object) -> Callable[[], object]:
        raise LowerError(f"{self.path}: the runtime failed")

    monkeypatch.setattr(OnnxRuntimeArtifact, "stepping", fails)
    module, inputs = tiny("bert")
    section = {"latency": [1], "length": 8, "threads": 1}
    compiled = surgeon.compile(module, [], inputs=inputs, evaluate=section, output=tmp_path / "out", progress=False)
    (line,) = [line for line in compiled.report.warnings if line.startswith("not timed")]
    assert f"{tmp_path / 'out'}/model.onnx" in line
    assert "building" not in line


def test_an_evaluation_without_an_artefact_is_said_to_be_left_out() -> None:
    module, inputs = tiny("bert")
    compiled = surgeon.compile(module, [], inputs=inputs, evaluate={"latency": [1]}, backend=None, progress=False)
    assert any(line.startswith("evaluate: nothing was measured") for line in compiled.report.warnings)
    assert not surgeon.compile(module, [], inputs=inputs, backend=None, progress=False).report.warnings


def test_a_language_model_is_evaluated_as_one_whatever_passes_did(
    shallow_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[str] = []

    def logged(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **inputs: Any) -> Any:
            log.append(name)
            return run(*given, **inputs)

        return call

    monkeypatch.setattr(LoadedSource, "outputs", logged("outputs", LoadedSource.outputs))
    monkeypatch.setattr(OnnxRuntimeArtifact, "run_on_host", logged("run_on_host", OnnxRuntimeArtifact.run_on_host))
    compiled = surgeon.compile(
        shallow_llama, [{"quantize": {"scheme": "int8_dynamic"}}], calibration=CALIBRATION,
        evaluate={"text": CALIBRATION["text"], "unit": "window", "length": 256}, progress=False,
    )  # fmt: skip
    names = {name for name in compiled.report.quality if not name.startswith("artifact_")}
    assert "kl" in names
    assert {f"artifact_{name}" for name in names} <= set(compiled.report.quality)
    assert log[-6:] == ["outputs", "run_on_host"] * 3  # the outputs of one batch at a time are in memory
    printed = io.StringIO()
    render_terminal(compiled.report, Console(width=80, file=printed))
    assert re.search(r" graph, held-back data +artefact, evaluation text\n", printed.getvalue())
