"""The TensorRT backend: real engines, built on the CPU by TensorRT for RTX; what it refuses, by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
import torch

import surgeon
from surgeon.backends import _trt_dialect as dialect
from surgeon.backends._trt_cache import Entry
from surgeon.backends.tensorrt import TensorRT, sparse_linears
from surgeon.caches import PAST, PRESENT, SUM
from surgeon.contract import ArtifactFile
from surgeon.errors import LowerError, RecipeError
from surgeon.registry import make_backend
from surgeon.verify import relative_error
from tests.conftest import Patient
from tests.models import tiny

pytest.importorskip("tensorrt_rtx", reason="pip install 'surgeon[tensorrt-rtx]'")
MODELS = Path(__file__).parent.parent / "examples" / "models"
INT4 = {"quantize": {"scheme": "int4", "group": 16}}


def compiled(name: str, passes: list[dict[str, Any]], **backend: Any) -> surgeon.Compiled:
    module, inputs = tiny(name)
    options = {"flavour": "rtx", **backend}
    return surgeon.compile(module, passes, inputs=inputs, backend={"tensorrt": options}, progress=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "passes"),
    [
        ("llama", [INT4]),
        ("gpt2", [{"moefy_ffn": {"experts": 4, "top_k": 2, "router": "centroid"}}]),
    ],
    ids=["int4", "moefied"],
)
def test_engines_are_built_and_saved(name: str, passes: list[dict[str, Any]], tmp_path: Path) -> None:
    result = compiled(name, passes, compute_capability=[8.9, 12.0])
    artifact = result.artifact
    assert artifact is not None
    assert artifact.nbytes > 10_000
    assert artifact.details["compute_capability"] == ["8.9", "12.0"]
    assert artifact.details["onnx_relative_error"] < (2e-2 if passes == [INT4] else 1e-5)
    result.save(tmp_path / "engine")
    if torch.cuda.is_available():
        return
    assert "NVIDIA GPU" in result.report.warnings[-1]
    loaded = surgeon.load(tmp_path / "engine")
    with pytest.raises(LowerError, match="NVIDIA GPU"):
        loaded(**tiny(name)[1])
    manifest = json.loads((tmp_path / "engine" / "surgeon.json").read_text())
    manifest["details"]["version"] = "0.1"
    (tmp_path / "engine" / "surgeon.json").write_text(json.dumps(manifest))
    with pytest.raises(LowerError, match=r"built by tensorrt_rtx 0\.1"):
        surgeon.load(tmp_path / "engine")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny-llama", "tiny-mixtral"])
def test_engines_of_trained_decoders_hold_their_caches(name: str, shallow_llama: Path) -> None:
    shapes = {"batch": [1, 1, 4], "sequence": [1, 1, 64], "past": [0, 64, 128]}
    options = {"flavour": "rtx", "shapes": shapes, "compute_capability": [8.0, 8.9, 12.0]}
    model = shallow_llama if name == "tiny-llama" else MODELS / name
    result = surgeon.compile(model, [], task="text-generation", backend={"tensorrt": options}, progress=False)
    artifact = result.artifact
    assert artifact is not None
    assert artifact.details["compute_capability"] == ["8.0", "8.9", "12.0"]
    assert artifact.details["onnx_relative_error"] < 1e-4
    assert artifact.details["profile"][f"past{SUM}sequence"] == [1, 65, 192]
    pasts = [port for port in artifact.inputs if port.role == PAST]
    presents = [port for port in artifact.outputs if port.role == PRESENT]
    assert len(pasts) == len(presents) > 0
    assert artifact.details["experts"] == {"tiny-llama": None, "tiny-mixtral": "gathered"}[name]


@pytest.mark.slow
@pytest.mark.minilm
def test_an_engine_of_a_pretrained_encoder_in_half_precision() -> None:
    from tests.models import minilm_path

    backend = {"tensorrt": {"flavour": "rtx"}}
    result = surgeon.compile(minilm_path(), [], dtype="float16", backend=backend, progress=False)
    assert result.artifact is not None
    assert result.graph is not None
    assert result.artifact.nbytes < 1.2 * sum(2 * parameter.numel() for parameter in result.graph.module.parameters())
    (result.artifact.path).write_bytes(result.artifact.path.read_bytes()[:-1])
    with pytest.raises(LowerError, match="damaged"):
        ArtifactFile.recorded(result.artifact.folder, [asdict(file) for file in result.artifact.files])


@pytest.mark.slow
def test_an_engine_of_eight_bit_floats_holds_bytes(tmp_path: Path) -> None:
    full, small = (compiled("llama", passes).artifact for passes in ([], [{"quantize": {"scheme": "fp8"}}]))
    assert full is not None
    assert small is not None
    assert small.details["onnx_relative_error"] < 1e-5
    assert small.nbytes < full.nbytes


def test_weights_for_sparse_tensor_cores_are_found(patient: Callable[[str], Patient]) -> None:
    for name, sites in (("llama", 7), ("gpt2", 4)):  # gpt2 stores weights the other way round
        fields = {"criterion": "magnitude", "blocks": 1}
        graph = patient(name).operate({"sparsify": {**fields, "pattern": "2:4"}}).graph
        found = sparse_linears(graph)
        assert len(found) == sites
        for weight in found:
            assert float((graph.tensor(weight) == 0).double().mean()) == 0.5
        assert not sparse_linears(patient(name).operate({"sparsify": {**fields, "sparsity": 0.5}}).graph)


@pytest.mark.slow
def test_sparse_engines_are_built() -> None:
    """TensorRT for RTX takes the flag and, as of 1.7, writes the same bytes with it as without."""
    step = {"sparsify": {"pattern": "2:4", "criterion": "magnitude"}}
    artifacts = [compiled("llama", [step], sparse_weights=flag).artifact for flag in (None, False)]
    assert [artifact.details["sparse_weights"] for artifact in artifacts if artifact is not None] == [21, 0]


def test_eight_bit_floats_are_constants_of_their_type(tmp_path: Path) -> None:
    module, inputs = tiny("mixtral")
    graph = surgeon.compile(module, [{"quantize": {"scheme": "fp8"}}], inputs=inputs, backend=None, progress=False).graph
    assert graph is not None
    dialect.write(graph, "dense", tmp_path / "model.onnx")
    model = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(model)
    codes = {tensor.name: tensor for tensor in model.graph.initializer}
    read = [node for node in model.graph.node if node.op_type == "DequantizeLinear"]
    assert read
    assert {codes[node.input[0]].data_type for node in read} == {onnx.TensorProto.FLOAT8E4M3FN}


def test_low_bit_weights_stay_low_bit_in_standard_operators(tmp_path: Path) -> None:
    module, inputs = tiny("mixtral")
    graph = surgeon.compile(module, [INT4], inputs=inputs, backend=None, progress=False).graph
    assert graph is not None
    dialect.write(graph, "dense", tmp_path / "model.onnx")
    model = onnx.load(tmp_path / "model.onnx")
    assert {node.domain for node in model.graph.node} <= {""}
    onnx.checker.check_model(model)
    blocked = [node for node in model.graph.node if node.op_type == "DequantizeLinear"]
    marks = [n for n in graph.module.graph.nodes if n.target is torch.ops.surgeon.dequantize.default]
    assert len(blocked) == len(marks) > 0
    codes = {tensor.name: tensor for tensor in model.graph.initializer}
    assert all(codes[node.input[0]].data_type == onnx.TensorProto.INT4 for node in blocked)


@pytest.mark.parametrize("form", ["gathered", "dense"])
def test_both_spellings_of_experts_equal_the_graph(form: Any, tmp_path: Path) -> None:
    from surgeon.backends.tensorrt import _check_onnx

    module, inputs = tiny("mixtral")
    graph = surgeon.trace(module, inputs)
    dialect.write(graph, form, tmp_path / "model.onnx")
    error = _check_onnx(graph, tmp_path / "model.onnx", 1e-5)
    assert error is not None
    assert error < 1e-5


@pytest.mark.parametrize("form", ["gathered", "dense"])
@pytest.mark.parametrize("fields", [{"scheme": "fp8"}, {"scheme": "int8", "group": 80}])
def test_experts_of_one_scale_per_row_equal_the_graph(fields: dict[str, Any], form: Any, tmp_path: Path) -> None:
    """Stacks have scales along two axes, [E, out]; rows of 48 and 64 inputs do not fill groups of 80."""
    import onnxruntime

    module, inputs = tiny("mixtral")
    graph = surgeon.compile(module, [{"quantize": fields}], inputs=inputs, backend=None, progress=False).graph
    assert graph is not None
    dialect.write(graph, form, tmp_path / "model.onnx")
    options = onnxruntime.SessionOptions()  # its optimiser would round the activations that meet 8-bit weights
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", options)
    read = {port.name for port in session.get_inputs()}
    (got,) = session.run(["logits"], {name: value.numpy() for name, value in inputs.items() if name in read})
    with torch.no_grad():
        assert relative_error(torch.from_numpy(got), graph(**inputs)["logits"]) < 1e-5


def test_experts_are_gathered_for_few_tokens() -> None:
    module, inputs = tiny("mixtral")
    graph = surgeon.trace(module, inputs)
    assert dialect.spelling(graph, {"batch": (1, 1, 1), "sequence": (1, 1, 1)}) == "gathered"
    assert dialect.spelling(graph, {"batch": (1, 1, 1), "sequence": (1, 128, 512)}) == "dense"


@pytest.mark.parametrize(
    ("passes", "options", "words"),
    [
        ([{"quantize": {"scheme": "int8_dynamic"}}], {}, "int8_dynamic"),
        ([{"quantize": {"scheme": "int4", "group": 16, "symmetric": False}}], {}, "symmetric"),
        ([{"quantize": {"scheme": "int8", "group": 16}}], {}, "one scale per row"),
        ([], {"shapes": {"bacth": [1, 2, 3]}}, "no dimension 'bacth'"),
        ([], {"compute_capability": [3.0]}, "not offered"),
        ([], {"flavour": "tensorrt", "compute_capability": [8.9]}, "tensorrt"),
    ],
)
def test_refusals_name_the_reason(passes: list[dict[str, Any]], options: dict[str, Any], words: str) -> None:
    with pytest.raises(LowerError, match=words):
        compiled("bert", passes, **options)


def test_groups_that_do_not_divide_a_width_name_those_that_do() -> None:
    module, inputs = tiny("llama")  # its networks are 112 wide
    int4 = {"quantize": {"scheme": "int4", "group": 32, "names": "*.0.ffn.down"}}

    def reasons(*passes: Any) -> list[str]:
        graph = surgeon.compile(
            module, [*passes, int4], inputs=inputs, calibration=[inputs, inputs], backend=None, progress=False
        ).graph
        assert graph is not None
        return [refusal.reason for refusal in dialect.refusals(graph)]

    remedy = "Where drop_neurons left so many, multiple: 32 makes widths that they divide"
    assert reasons() == [f"groups of 32 do not divide 112 columns; these do: 16 (group of quantize). {remedy}"]
    assert reasons({"drop_neurons": {"keep": 88}}) == [
        f"groups of 32 do not divide 88 columns; no usual group of quantize does. {remedy}"
    ]
    assert reasons({"drop_neurons": {"ratio": 0.25, "multiple": 32}}) == []


def test_wrong_options_are_refused() -> None:
    with pytest.raises(RecipeError, match="smallest, most frequent, largest"):
        make_backend({"tensorrt": {"shapes": {"batch": [4, 2, 8]}}})
    with pytest.raises(RecipeError, match="rtx"):
        make_backend({"tensorrt": {"flavour": "tensort"}})


def test_a_cache_entry_is_whole_or_absent(tmp_path: Path) -> None:
    entry = Entry(tmp_path / "not there yet", "timings", "11.4", "NVIDIA H100 80GB HBM3")
    assert entry.read() == b""
    assert not entry.write(lambda: None)
    assert entry.write(lambda: b"one")
    assert [path.name for path in entry.path.parent.iterdir()] == ["timings-11.4-NVIDIA_H100_80GB_HBM3.bin"]
    again = Entry(tmp_path / "not there yet", "timings", "11.4", "NVIDIA H100 80GB HBM3")
    assert again.read() == b"one"
    assert not again.write(lambda: b"two")  # as many bytes: nothing was added
    assert again.write(lambda: b"three")
    assert entry.read() == b"three"
    (tmp_path / "file").write_text("")
    assert not Entry(tmp_path / "file", "kernels").write(lambda: b"one")  # a cache that cannot be kept stops nothing
    assert {path.name for path in tmp_path.iterdir()} == {"not there yet", "file"}


def test_the_cache_is_in_the_users_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert Entry(None, "a").path == tmp_path / "surgeon" / "tensorrt" / "a.bin"


class FakeCache:
    """A timing cache: the bytes it was made of, and more after a build."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    def serialize(self) -> bytes:
        return self.content + b" and more"


class FakeConfig:
    """A builder's configuration that takes no cache of another driver."""

    held: FakeCache | None = None

    def create_timing_cache(self, content: bytes) -> FakeCache:
        return FakeCache(content)

    def set_timing_cache(self, cache: FakeCache, _: bool) -> bool:
        if cache.content == b"another driver":
            return False
        self.held = cache
        return True


@pytest.mark.parametrize(("kept", "used"), [(b"", b""), (b"timings", b"timings"), (b"another driver", b"")])
def test_a_build_starts_from_the_timings_of_earlier_ones(
    kept: bytes, used: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    Entry(tmp_path, "timings", "11.4", "a card").write(lambda: kept)
    config = FakeConfig()
    entry = TensorRT(cache=tmp_path)._timings(SimpleNamespace(__version__="11.4"), config)
    assert config.held is not None
    assert config.held.content == used
    assert entry.write(config.held.serialize)
    assert entry.path.read_bytes() == used + b" and more"
