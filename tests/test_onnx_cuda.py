"""What is lowered for CUDA, checked without a GPU: every node has a kernel there, and the numbers are the graph's.

``cuda_kernels.json`` lists the kernels that the CUDA provider of one version registers, with their types.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto

import surgeon
from surgeon.backends import _onnx_artifact as runtime
from surgeon.backends import _onnx_cuda, _onnx_lowering, _onnx_routing, _onnx_shared
from surgeon.backends.onnxruntime import OnnxRuntime
from surgeon.graph import Graph

onnxruntime = pytest.importorskip("onnxruntime")

KERNELS: dict[str, list[dict[str, str]]] = json.loads((Path(__file__).parent / "cuda_kernels.json").read_text())["kernels"]
INT4 = {"quantize": {"scheme": "int4", "group": 64}}
MERGE = {"merge_experts": {"groups": 4, "align": False}}
SIZES = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4} | {
    "num_key_value_heads": 2, "vocab_size": 96, "max_position_embeddings": 256, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lowering needs no GPU; only the check for the provider does."""
    monkeypatch.setattr(runtime, "runtime", lambda provider: onnxruntime)


def graph_of(kind: str, dtype: torch.dtype, *passes: dict[str, Any]) -> Graph:
    import transformers

    torch.manual_seed(0)
    if kind == "mixtral":
        module: Any = transformers.MixtralForCausalLM(
            transformers.MixtralConfig(**SIZES, num_local_experts=8, num_experts_per_tok=2)
        )
    else:
        module = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    ids = torch.randint(0, 96, (2, 8), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    found = surgeon.compile(
        module.to(dtype).eval(), list(passes), calibration=[batch], backend=None, task="text-generation", progress=False
    )
    assert found.graph is not None
    return found.graph


def lowered(graph: Graph, folder: Path) -> tuple[onnx.ModelProto, dict[str, Any]]:
    artifact = OnnxRuntime(provider="cuda", accuracy_level=0).lower(graph, folder)
    return onnx.load(folder / "model.onnx"), artifact.details


def types_of(model: onnx.ModelProto) -> dict[str, str]:
    """Element types of all values, inside of branches too."""
    found: dict[str, int] = {}

    def collect(graph: onnx.GraphProto) -> None:
        for value in (*graph.input, *graph.output, *graph.value_info):
            found[value.name] = value.type.tensor_type.elem_type
        for tensor in graph.initializer:
            found[tensor.name] = tensor.data_type
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.type == onnx.AttributeProto.GRAPH:
                    collect(attribute.g)

    collect(model.graph)
    return {name: TensorProto.DataType.Name(kind).lower() for name, kind in found.items()}


def without_kernel(model: onnx.ModelProto) -> list[str]:
    """Nodes whose input types no registered kernel takes."""
    types, missing = types_of(model), []

    def check(graph: onnx.GraphProto) -> None:
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.type == onnx.AttributeProto.GRAPH:
                    check(attribute.g)
            name = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
            given = {types[value] for value in node.input if value and value in types}
            if not any(_takes(kernel, node, types) for kernel in KERNELS.get(name, [])):
                missing.append(f"{name}({', '.join(sorted(given))})")

    check(model.graph)
    return missing


def _takes(kernel: dict[str, str], node: onnx.NodeProto, types: dict[str, str]) -> bool:
    """Whether a kernel takes the inputs of a node: by the schema's names of types, or the first input's as T."""
    if node.domain == "":
        schema = onnx.defs.get_schema(node.op_type, 23)
        names = [each.type_str for each in schema.inputs]
        names += names[-1:] * (len(node.input) - len(names)) if names else []
    else:
        names = ["T1" if "T1" in kernel and "T" not in kernel else "T"]
    for name, value in zip(names, node.input, strict=False):
        if value and value in types and name in kernel and types[value] not in kernel[name].split():
            return False
    return True


@pytest.mark.parametrize(
    ("kind", "dtype", "passes", "kernel"),
    [
        ("mixtral", torch.bfloat16, (), "com.microsoft.MoE"),
        ("mixtral", torch.bfloat16, (INT4,), "com.microsoft.QMoE"),
        ("mixtral", torch.bfloat16, (MERGE,), "com.microsoft.MoE"),
        ("mixtral", torch.float32, (), "com.microsoft.MoE"),
        ("llama", torch.float16, (), "com.microsoft.GroupQueryAttention"),
    ],
)
def test_every_node_has_a_kernel(
    kind: str, dtype: torch.dtype, passes: tuple[dict[str, Any], ...], kernel: str, tmp_path: Path
) -> None:
    model, details = lowered(graph_of(kind, dtype, *passes), tmp_path)
    assert without_kernel(model) == []
    assert details["operators"][kernel] == 2
    flash = details["operators"].get("com.microsoft.GroupQueryAttention", 0)
    assert flash == (0 if dtype == torch.float32 else 2)
    assert "NonZero" not in details["operators"]  # no tokens sorted by expert


def test_a_missing_kernel_is_seen() -> None:
    value = onnx.helper.make_tensor_value_info("x", TensorProto.BFLOAT16, [2])
    node = onnx.helper.make_node("Clip", ["x"], ["y"])
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "g", [value], []))
    assert without_kernel(model) == ["Clip(bfloat16)"]


@pytest.mark.parametrize("passes", [(), (MERGE,)])
def test_numbers(passes: tuple[dict[str, Any], ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, which the CPU computes: both branches of attention, experts behind logits, duplicates among them."""
    monkeypatch.setattr(_onnx_cuda, "FLASH", (*_onnx_cuda.FLASH, 1))
    graph = graph_of("mixtral", torch.float32, *passes)
    model, details = lowered(graph, tmp_path)
    assert details["operators"]["com.microsoft.GroupQueryAttention"] == 2
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(1)
    for rows, new, past, padded in ((1, 5, 0, 0), (2, 5, 0, 0), (2, 1, 6, 0), (1, 3, 6, 0), (2, 3, 6, 0), (2, 4, 3, 2)):
        inputs = []
        for port in graph.inputs:
            sizes = {"batch": rows, "sequence": new, "past": past, "past + sequence": past + new}
            shape = [sizes[size] if isinstance(size, str) else size for size in port.shape]
            if port.dtype == torch.int64:
                value = torch.randint(0, 96, shape, generator=generator)
            else:
                value = torch.randn(shape, generator=generator)
            if port.name == "attention_mask":
                value = torch.ones(shape, dtype=port.dtype)
                value[:1, :padded] = 0
            if port.name == "position_ids":
                value = torch.arange(past, past + new).expand(rows, -1).contiguous()
            inputs.append(value)
        with torch.no_grad():
            wanted = graph.module(*inputs)
        names = [port.name for port in graph.inputs]
        found = session.run(None, {name: value.numpy() for name, value in zip(names, inputs, strict=True)})
        for value, reference in zip(found, wanted, strict=True):
            assert np.abs(value - reference.numpy()).max() < 2e-5 * max(1.0, float(reference.abs().max()))


def test_selected_logits() -> None:
    """The routing of Mixtral is the kernel's own; its merged experts' is not, since an index stands between."""
    graph = graph_of("mixtral", torch.bfloat16)
    moe = next(node for node in graph.module.graph.nodes if node.target == _onnx_lowering.MOE)
    logits = _onnx_routing.selected_logits(*moe.args[1:3])
    assert logits is not None
    assert tuple(logits.meta["val"].shape)[1:] == (8,)
    assert _onnx_routing.selected_logits(moe.args[1], logits) is None


def test_only_a_causal_mask_takes_the_flash_kernel() -> None:
    """A window hides more than the kernel does, however wide it is."""
    import transformers

    def mask(window: int | None) -> tuple[Graph, Any]:
        torch.manual_seed(0)
        config = transformers.MistralConfig(**{**SIZES, "num_hidden_layers": 1}, sliding_window=window)
        module = transformers.MistralForCausalLM(config).eval()
        ids = torch.randint(0, 96, (2, 8))
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        found = surgeon.compile(module, [], calibration=[batch], backend=None, task="text-generation", progress=False).graph
        assert found is not None
        return found, next(n for n in found.module.graph.nodes if n.target is _onnx_cuda.ATTENTION).args[3]

    assert _onnx_shared.is_causal_unpadded(*mask(None))
    assert not _onnx_shared.is_causal_unpadded(*mask(64))
