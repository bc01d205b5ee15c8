"""The TensorRT backend: real engines, built on the CPU by TensorRT for RTX; what it refuses, by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

import surgeon
from surgeon.backends import _trt_dialect as dialect
from surgeon.backends.tensorrt import TensorRT
from surgeon.errors import LowerError, RecipeError
from surgeon.registry import make_backend
from tests.models import tiny

pytest.importorskip("tensorrt_rtx", reason="pip install 'surgeon[tensorrt-rtx]'")
INT4 = {"quantize": {"scheme": "int4", "group": 16}}


def compiled(name: str, passes: list[dict[str, Any]], **backend: Any) -> surgeon.Compiled:
    module, inputs = tiny(name)
    options = {"flavour": "rtx", **backend}
    return surgeon.compile(module, passes, inputs=inputs, backend={"tensorrt": options}, progress=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "passes"),
    [
        ("bert", []),
        ("llama", [INT4]),
        ("mixtral", []),
        ("gpt2", [{"moefy_ffn": {"experts": 4, "top_k": 2, "router": "centroid"}}]),
    ],
    ids=["bert", "int4", "experts", "moefied"],
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


def test_experts_are_gathered_for_few_tokens() -> None:
    module, inputs = tiny("mixtral")
    graph = surgeon.trace(module, inputs)
    one = {"batch": [1, 1, 1], "sequence": [1, 1, 1]}
    assert TensorRT.model_validate({"shapes": one})._experts(graph) == "gathered"
    assert TensorRT()._experts(graph) == "dense"


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


def test_wrong_options_are_refused() -> None:
    with pytest.raises(RecipeError, match="smallest, most frequent, largest"):
        make_backend({"tensorrt": {"shapes": {"batch": [4, 2, 8]}}})
    with pytest.raises(RecipeError, match="rtx"):
        make_backend({"tensorrt": {"flavour": "tensort"}})
