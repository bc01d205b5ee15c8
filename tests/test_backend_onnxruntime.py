"""The ONNX Runtime backend: every operator against torch, tiny models end to end, files, refusals, errors."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, fx, nn

import surgeon.ops  # noqa: F401  # registers torch.ops.surgeon
from surgeon.activations import ACTIVATIONS
from surgeon.backends.onnxruntime import OnnxRuntime, OnnxRuntimeArtifact
from surgeon.errors import LowerError
from surgeon.graph import Dim, Graph, Port
from surgeon.numerics.quantization import QuantizedTensor, quantize_groupwise

pytest.importorskip("onnxruntime")


def graph_of(module: nn.Module, inputs: dict[str, Tensor], dynamic: dict[str, dict[int, str]]) -> Graph:
    """A graph made by hand (no tracing, no folding), so that a test depends on the backend alone."""
    shapes = {name: dict.fromkeys(dynamic.get(name, {}), torch.export.Dim.DYNAMIC) for name in inputs}
    with torch.no_grad(), warnings.catch_warnings():
        # torch copies its own deprecated tree leaves while it decomposes
        warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
        program = torch.export.export(module.eval(), (), inputs, dynamic_shapes=shapes, strict=False)
        bare = program.run_decompositions({}).module(check_guards=False)
    assert isinstance(bare, fx.GraphModule)
    for node in list(bare.graph.nodes):
        if node.op == "call_module":
            bare.graph.erase_node(node)
    bare.graph.set_codegen(fx.graph.CodeGen())
    flat = fx.GraphModule(bare, bare.graph)
    ports = [
        Port(name, value.dtype, tuple(dynamic.get(name, {}).get(axis, size) for axis, size in enumerate(value.shape)))
        for name, value in inputs.items()
    ]
    results = flat(*inputs.values())
    outputs = [Port(f"y{n}", value.dtype, ("?",) * value.dim()) for n, value in enumerate(results)]
    names = {label for axes in dynamic.values() for label in axes.values()}
    return Graph(flat, ports, outputs, {label: Dim(label) for label in names}, inputs)


def error(found: Tensor, wanted: Tensor) -> float:
    """Largest difference relative to the largest value wanted."""
    assert found.shape == wanted.shape
    assert found.dtype == wanted.dtype
    reference = wanted.detach().double()
    return float((found.double() - reference).abs().max() / reference.abs().max().clamp(min=1e-30))


def lowered(graph: Graph, folder: Path, **options: Any) -> Any:
    return OnnxRuntime(threads=1, **options).lower(graph, folder)


def operators(artifact: Any) -> dict[str, int]:
    found: dict[str, int] = artifact.details["operators"]
    return found


class Dequantized(nn.Module):
    """Holds a weight as codes."""

    def __init__(self, codes: QuantizedTensor) -> None:
        super().__init__()
        self.register_buffer("packed", codes.packed)
        self.register_buffer("zero", codes.zero_point)
        self.scale = nn.Parameter(codes.scale)
        self.rest = (codes.bits, codes.group, codes.in_features)

    def forward(self) -> Tensor:
        weight: Tensor = torch.ops.surgeon.dequantize(self.packed, self.scale, self.zero, *self.rest)
        return weight


class LowBitLinear(nn.Module):
    def __init__(self, codes: QuantizedTensor, bias: bool = True, dynamic: bool = False) -> None:
        super().__init__()
        self.weight = Dequantized(codes)
        self.bias = nn.Parameter(torch.randn(codes.packed.shape[0])) if bias else None
        self.dynamic = dynamic

    def forward(self, x: Tensor) -> tuple[Tensor]:
        if self.dynamic:
            x = torch.ops.surgeon.fake_quantize_dynamic(x)
        return (nn.functional.linear(x, self.weight(), self.bias),)


X = {"x": {0: "batch", 1: "sequence"}}
"""Dynamic dimensions of an input x [batch, sequence, features]."""


@pytest.mark.parametrize(
    ("bits", "group", "columns"),
    [(4, 16, 96), (4, 32, 77), (4, 128, 130), (4, 48, 100), (4, -1, 51), (4, 512, 520), (2, 32, 64)],
)
def test_low_bit_linear_keeps_activations_at_level_0(tmp_path: Path, bits: int, group: int, columns: int) -> None:
    torch.manual_seed(0)
    symmetric = columns % 2 == 1
    codes = quantize_groupwise(torch.randn(23, columns), bits=bits, group=group, symmetric=symmetric)
    graph = graph_of(LowBitLinear(codes), {"x": torch.randn(2, 3, columns)}, X)
    artifact = lowered(graph, tmp_path, accuracy_level=0)
    assert operators(artifact)["com.microsoft.MatMulNBits"] == 1
    for batch, sequence in ((1, 1), (5, 7)):
        x = torch.randn(batch, sequence, columns)
        assert error(artifact.run({"x": x})["y0"], graph(x=x)["y0"]) < 1e-5


@pytest.mark.parametrize(
    ("bits", "group", "symmetric"),
    [(8, 32, True), (8, 64, False), (8, -1, True), (8, 48, False), (4, 32, True), (2, 64, False)],
)
def test_low_bit_linear_at_level_4_rounds_activations_to_8_bits(tmp_path: Path, bits: int, group: int, symmetric: bool) -> None:
    torch.manual_seed(0)
    codes = quantize_groupwise(torch.randn(40, 200), bits=bits, group=group, symmetric=symmetric)
    graph = graph_of(LowBitLinear(codes, bias=False), {"x": torch.randn(2, 3, 200)}, X)
    artifact = lowered(graph, tmp_path)
    x = torch.randn(3, 9, 200)
    assert error(artifact.run({"x": x})["y0"], graph(x=x)["y0"]) < 2e-2


def test_groups_that_no_kernel_takes_are_unpacked_in_the_graph(tmp_path: Path) -> None:
    torch.manual_seed(0)
    codes = quantize_groupwise(torch.randn(300, 400), bits=4, group=40, symmetric=False)
    graph = graph_of(LowBitLinear(codes), {"x": torch.randn(2, 3, 400)}, X)
    artifact = lowered(graph, tmp_path)
    assert "com.microsoft.MatMulNBits" not in operators(artifact)
    assert artifact.details["quantization"][0]["operator"] == "unpacked"
    x = torch.randn(3, 9, 400)
    assert error(artifact.run({"x": x})["y0"], graph(x=x)["y0"]) < 1e-5
    held = sum(t.nbytes for t in graph.parameters().values())
    assert artifact.details["weight_bytes"] < held + 400  # the codes, not the floats, which are eight times as many bytes


@pytest.mark.parametrize(("rows", "columns", "symmetric"), [(33, 65, False), (64, 384, True), (17, 1, True)])
def test_dynamic_linear_equals_the_graph_exactly_up_to_float_sums(
    tmp_path: Path, rows: int, columns: int, symmetric: bool
) -> None:
    torch.manual_seed(0)
    codes = quantize_groupwise(torch.randn(rows, columns), bits=8, group=-1, symmetric=symmetric)
    graph = graph_of(LowBitLinear(codes, dynamic=True), {"x": torch.randn(2, 3, columns)}, X)
    artifact = lowered(graph, tmp_path)
    assert operators(artifact)["MatMulInteger"] == 1
    for x in (
        torch.randn(4, 5, columns),
        torch.rand(1, 6, columns) + 2,
        -torch.rand(2, 1, columns),
        torch.zeros(1, 2, columns),
    ):
        assert error(artifact.run({"x": x})["y0"], graph(x=x)["y0"]) < 1e-6


class ThreeReaders(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(
            LowBitLinear(quantize_groupwise(torch.randn(8, 24), bits=8, group=-1, symmetric=True), dynamic=True)
            for _ in range(3)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(part(x)[0] for part in self.parts)


def test_one_value_is_quantized_once_and_the_runtime_fuses_the_rest(tmp_path: Path) -> None:
    import onnxruntime

    torch.manual_seed(0)
    graph = graph_of(ThreeReaders(), {"x": torch.randn(2, 3, 24)}, X)
    artifact = lowered(graph, tmp_path)
    assert operators(artifact)["DynamicQuantizeLinear"] == 1
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "fused.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(artifact.path, options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(tmp_path / "fused.onnx").graph.node]
    assert kinds.count("MatMulIntegerToFloat") == 3
    assert "Cast" not in kinds
    x = torch.randn(1, 9, 24)
    wanted = graph(x=x)
    assert all(error(value, wanted[name]) < 1e-6 for name, value in artifact.run({"x": x}).items())


class Rounded(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (torch.ops.surgeon.fake_quantize_dynamic(x) * 2.0,)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_eight_bit_floats_stay_in_the_file(tmp_path: Path, name: str) -> None:
    from surgeon.building import compile
    from tests.models import inputs_for, tiny

    module, inputs = tiny(name, layers=1)
    graph = compile(
        module, [{"quantize": {"scheme": "fp8", "embeddings": True}}], inputs=inputs, backend=None, progress=False
    ).graph
    assert graph is not None
    artifact = lowered(graph, tmp_path)
    model = onnx.load(artifact.path)
    onnx.checker.check_model(model)
    floats = [t for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT8E4M3FN]
    assert len(floats) == sum(kind["weights"] for kind in artifact.details["quantization"]) > 0
    inputs = inputs_for(name, 3, 11, padded=True)
    with torch.no_grad():
        wanted = graph(**inputs)
    assert error(artifact.run(inputs)["logits"], wanted["logits"]) < 1e-5


def test_a_lonely_dynamic_quantization(tmp_path: Path) -> None:
    graph = graph_of(Rounded(), {"x": torch.randn(2, 3, 4)}, X)
    artifact = lowered(graph, tmp_path)
    assert {"DynamicQuantizeLinear", "DequantizeLinear"} <= set(operators(artifact))
    x = torch.randn(5, 6, 4)
    assert error(artifact.run({"x": x})["y0"], graph(x=x)["y0"]) < 1e-6


class Table(nn.Module):
    """An embedding, with a tied head where asked."""

    def __init__(self, codes: QuantizedTensor, tied: bool) -> None:
        super().__init__()
        self.table = Dequantized(codes)
        self.tied = tied

    def forward(self, ids: Tensor) -> tuple[Tensor]:
        rows = nn.functional.embedding(ids, self.table())
        return (nn.functional.linear(torch.tanh(rows), self.table()) if self.tied else rows,)


@pytest.mark.parametrize(
    ("bits", "group", "columns", "symmetric", "tied"),
    [
        (4, 32, 96, True, False),
        (4, 16, 48, False, False),
        (8, 32, 64, False, False),
        (8, -1, 72, True, False),
        (4, 32, 90, False, False),
        (2, 16, 32, False, False),
        (4, 32, 96, False, True),
        (8, 32, 64, True, True),
    ],
)
def test_low_bit_embedding(tmp_path: Path, bits: int, group: int, columns: int, symmetric: bool, tied: bool) -> None:
    torch.manual_seed(0)
    codes = quantize_groupwise(torch.randn(501, columns), bits=bits, group=group, symmetric=symmetric)
    ids = torch.randint(0, 501, (2, 3))
    graph = graph_of(Table(codes, tied), {"ids": ids}, {"ids": {0: "batch", 1: "sequence"}})
    artifact = lowered(graph, tmp_path, accuracy_level=0 if bits == 4 else 4)
    ids = torch.randint(0, 501, (4, 9))
    tolerance = 1e-5 if bits == 4 or not tied else 2e-2
    assert error(artifact.run({"ids": ids})["y0"], graph(ids=ids)["y0"]) < tolerance
    # the codes once; a tied table may keep its zero points both packed (for one kernel) and in bytes (for unpacking)
    zeros = 0 if codes.zero_point is None else codes.zero_point.numel() * (2 if tied else 1)
    assert artifact.details["weight_bytes"] <= codes.packed.nbytes + codes.scale.nbytes + zeros + 400


class Experts(nn.Module):
    """Router (softmax, top-k, renormalised) and experts."""

    def __init__(
        self,
        activation: str,
        gated: bool,
        *,
        experts: int = 5,
        k: int = 2,
        width: int = 32,
        inner: int = 48,
        bias: bool = True,
        weights: str = "softmax",
        bits: int | None = None,
        group: int = 16,
        symmetric: bool = True,
    ) -> None:
        super().__init__()
        rows = 2 * inner if gated else inner
        self.router = nn.Linear(width, experts)
        w_in, w_out = torch.randn(experts, rows, width) * 0.3, torch.randn(experts, width, inner) * 0.3
        self.w_in, self.w_out = (
            (Held(w_in), Held(w_out))
            if bits is None
            else tuple(Dequantized(quantize_groupwise(w, bits=bits, group=group, symmetric=symmetric)) for w in (w_in, w_out))
        )
        self.b_in = nn.Parameter(torch.randn(experts, rows) * 0.2) if bias else None
        self.b_out = nn.Parameter(torch.randn(experts, width) * 0.2) if bias else None
        self.k, self.weights, self.activation = k, weights, activation

    def forward(self, x: Tensor) -> tuple[Tensor]:
        flat = x.reshape(-1, x.shape[-1])
        logits = self.router(flat)
        match self.weights:
            case "softmax":
                weight, index = logits.softmax(-1).topk(self.k, -1)
                weight = weight / weight.sum(-1, keepdim=True)
            case "sigmoid":
                weight, index = logits.sigmoid().topk(self.k, -1)
                weight = weight * 2.5
            case "ones":
                _, index = logits.topk(self.k, -1)
                weight = torch.ones_like(index, dtype=x.dtype)
            case "signed":
                weight, index = logits.topk(self.k, -1)
            case _:
                raise ValueError(self.weights)
        y = torch.ops.surgeon.moe(flat, index, weight, self.w_in(), self.w_out(), self.b_in, self.b_out, self.activation)
        return (y.reshape(x.shape),)


class Held(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self) -> Tensor:
        return self.weight


def check_experts(tmp_path: Path, module: nn.Module, operator: str | None, tolerance: float, **options: Any) -> Any:
    graph = graph_of(module, {"x": torch.randn(2, 3, 32)}, X)
    artifact = lowered(graph, tmp_path, **options)
    fused = {name for name in operators(artifact) if name.endswith("MoE")}
    assert fused == ({operator} if operator else set())
    for batch, sequence in ((1, 1), (3, 13), (7, 2)):
        x = torch.randn(batch, sequence, 32)
        assert error(artifact.run({"x": x})["y0"], graph(x=x)["y0"]) < tolerance
    return artifact


@pytest.mark.parametrize(
    ("activation", "gated"),
    [
        ("relu", False), ("silu", False), ("gelu", False), ("gelu_tanh", False), ("identity", False),
        ("quick_gelu", False), ("silu", True), ("quick_gelu", True), ("gelu", True), ("silu(cap=1)", False),
        ("quick_gelu(gate_max=0.5,up_limit=0.5,offset=1)", True), ("swish(alpha=1.3)", True),
        ("silu(cap=0.5,up_limit=0.5)", True), ("silu(gate_max=0.5)", True),
    ],
)  # fmt: skip
def test_experts_equal_torch_for_every_activation(tmp_path: Path, activation: str, gated: bool) -> None:
    torch.manual_seed(0)
    swiglu = ("silu", "quick_gelu", "swish(alpha=1.3)", "quick_gelu(gate_max=0.5,up_limit=0.5,offset=1)")
    kernel = activation in (swiglu if gated else ("relu", "silu", "gelu_tanh", "identity"))
    check_experts(tmp_path, Experts(activation, gated), "com.microsoft.MoE" if kernel else None, 2e-6)


class Activations(nn.Module):
    """One mixture per known activation."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Experts(name, False, experts=2, k=1) for name in ACTIVATIONS)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(experts(x)[0] for experts in self.experts)


def test_every_known_activation_has_a_lowering(tmp_path: Path) -> None:
    torch.manual_seed(0)
    graph = graph_of(Activations(), {"x": torch.randn(2, 3, 32)}, X)
    x = torch.randn(1, 5, 32)
    found, wanted = lowered(graph, tmp_path).run({"x": x}), graph(x=x)
    for name, key in zip(ACTIVATIONS, wanted, strict=True):
        assert error(found[key], wanted[key]) < 2e-6, name


@pytest.mark.parametrize(("weights", "k"), [("softmax", 1), ("softmax", 5), ("sigmoid", 3), ("ones", 2), ("signed", 3)])
def test_routing_weights_of_any_kind(tmp_path: Path, weights: str, k: int) -> None:
    torch.manual_seed(0)
    module = Experts("silu", True, k=k, weights=weights, bias=False)
    check_experts(tmp_path, module, None if weights == "signed" else "com.microsoft.MoE", 5e-6)


def test_rows_whose_weights_are_all_zero_give_zero(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Experts("silu", True, weights="sigmoid", bias=False)
    with torch.no_grad():
        module.router.bias.fill_(-1e4)  # sigmoid underflows to exactly 0
    artifact = lowered(graph_of(module, {"x": torch.randn(2, 3, 32)}, X), tmp_path)
    assert operators(artifact)["com.microsoft.MoE"] == 1
    assert torch.equal(artifact.run({"x": torch.randn(1, 4, 32)})["y0"], torch.zeros(1, 4, 32))


@pytest.mark.parametrize(
    ("activation", "gated", "bits", "group", "symmetric"),
    [
        ("silu", True, 4, 16, True),
        ("silu", True, 4, 16, False),
        ("gelu_tanh", False, 8, 16, False),
        ("silu", True, 8, -1, False),
        ("gelu", False, 4, 16, False),
        ("gelu", True, 8, -1, True),
    ],
)
def test_low_bit_experts(tmp_path: Path, activation: str, gated: bool, bits: int, group: int, symmetric: bool) -> None:
    torch.manual_seed(0)
    module = Experts(activation, gated, bits=bits, group=group, symmetric=symmetric)
    operator = None if activation == "gelu" else "com.microsoft.QMoE"
    options = {"accuracy_level": 0 if bits == 4 else 4}
    artifact = check_experts(tmp_path, module, operator, 1e-5 if bits == 4 else 3e-2, **options)
    if group == 16:  # a scale per row would be repeated for every block
        held = sum(t.nbytes for t in (*module.parameters(), *module.buffers()))
        assert artifact.details["weight_bytes"] < held + 1000


class Chain(nn.Module):
    """Mixtures between other operators, where an earlier runtime was reported to go wrong."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList([nn.Linear(32, 32), Experts("silu", True)]) for _ in range(depth))

    def forward(self, x: Tensor) -> tuple[Tensor]:
        for linear, experts in self.layers:  # type: ignore[misc]  # a ModuleList of two
            x = x + experts(linear(x * 0.5))[0]
        return (x,)


def test_experts_can_be_sorted_on_request(tmp_path: Path) -> None:
    torch.manual_seed(0)
    check_experts(tmp_path, Experts("silu", True), None, 2e-6, experts="sorted")


@pytest.mark.parametrize("depth", [1, 3])
def test_mixtures_between_other_operators(tmp_path: Path, depth: int) -> None:
    torch.manual_seed(0)
    graph = graph_of(Chain(depth), {"x": torch.randn(2, 3, 32)}, X)
    artifact = lowered(graph, tmp_path)
    assert operators(artifact)["com.microsoft.MoE"] == depth
    for tokens in (1, 7, 40):
        x = torch.randn(1, tokens, 32)
        assert error(artifact.run({"x": x})["y0"], graph(x=x)["y0"]) < 2e-6


class Repeated(nn.Module):
    """An expert named twice in a row counts twice: no kernel that selects can do that."""

    def __init__(self) -> None:
        super().__init__()
        self.w_in, self.w_out = nn.Parameter(torch.randn(3, 16, 32)), nn.Parameter(torch.randn(3, 32, 16))

    def forward(self, x: Tensor, index: Tensor) -> tuple[Tensor]:
        weight = torch.softmax(x[:, :2], -1)
        return (torch.ops.surgeon.moe(x, index, weight, self.w_in, self.w_out, None, None, "relu"),)


def test_an_index_of_unknown_origin_may_repeat_experts(tmp_path: Path) -> None:
    torch.manual_seed(0)
    inputs = {"x": torch.randn(4, 32), "index": torch.tensor([[0, 0], [1, 2], [2, 2], [1, 0]])}
    graph = graph_of(Repeated(), inputs, {"x": {0: "tokens"}, "index": {0: "tokens"}})
    artifact = lowered(graph, tmp_path)
    assert "com.microsoft.MoE" not in operators(artifact)
    other = {"x": torch.randn(6, 32), "index": torch.tensor([[1, 1]] * 6)}  # experts without a token too
    assert error(artifact.run(other)["y0"], graph(**other)["y0"]) < 2e-6


def test_dynamic_8_bit_experts(tmp_path: Path) -> None:
    torch.manual_seed(0)
    inner = Experts("gelu", False, bits=8, group=-1)

    class Dynamic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> tuple[Tensor]:
            m, flat = self.inner, x.reshape(-1, 32)
            weight, index = m.router(flat).softmax(-1).topk(2, -1)
            x8 = torch.ops.surgeon.fake_quantize_dynamic(flat)
            y = torch.ops.surgeon.moe(x8, index, weight, m.w_in(), m.w_out(), m.b_in, m.b_out, "gelu")
            return (y.reshape(x.shape),)

    artifact = check_experts(tmp_path, Dynamic(), None, 2e-2)
    assert operators(artifact)["MatMulInteger"] == 5
    assert operators(artifact)["com.microsoft.MatMulNBits"] == 5


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2", "bert", "vit"])
def test_tiny_models_end_to_end(tmp_path: Path, name: str) -> None:
    from surgeon.tracing import trace
    from tests.models import inputs_for, tiny

    module, example = tiny(name, layers=2)
    graph = trace(module, example)
    before = graph.fingerprint(weights=True)
    artifact = lowered(graph, tmp_path)
    assert graph.fingerprint(weights=True) == before
    for batch, sequence in ((1, 5), (3, 11)):
        inputs = inputs_for(name, batch, sequence, padded=True)
        with torch.no_grad():
            wanted = graph(**inputs)
        found = artifact.run(inputs)
        assert list(found) == [port.name for port in graph.outputs]
        for key, value in wanted.items():
            assert error(found[key], value) < 1e-5
    assert artifact.details["weight_bytes"] < 1.005 * graph.nbytes() + 1000  # every weight once
    assert artifact.nbytes < artifact.details["weight_bytes"] + 50_000
    model = onnx.load(artifact.path)
    onnx.checker.check_model(model)
    dims = [[d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim] for i in model.graph.input]
    assert dims == [list(port.shape) for port in graph.inputs]
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(3000, 64)
        self.head = nn.Linear(64, 3000, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> tuple[Tensor]:
        return (self.head(self.table(ids)),)


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, 3000, (2, 5))
    graph = graph_of(Tied(), {"ids": ids}, {"ids": {0: "batch", 1: "sequence"}})
    artifact = lowered(graph, tmp_path)
    assert artifact.nbytes < 3000 * 64 * 4 * 1.01
    assert error(artifact.run({"ids": ids})["y0"], graph(ids=ids)["y0"]) < 1e-6


def test_large_models_keep_their_weights_beside_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from surgeon.backends import _onnx_file

    monkeypatch.setattr(_onnx_file, "SINGLE_FILE_LIMIT", 100_000)
    ids = torch.randint(0, 3000, (2, 5))
    graph = graph_of(Tied(), {"ids": ids}, {"ids": {0: "batch", 1: "sequence"}})
    artifact = lowered(graph, tmp_path)
    assert [file.path for file in artifact.files] == ["model.onnx", "model.onnx.data"]
    moved = tmp_path.with_name("moved")
    tmp_path.rename(moved)
    artifact.folder = moved
    assert error(artifact.run({"ids": ids})["y0"], graph(ids=ids)["y0"]) < 1e-6


def manifest_of(artifact: Any) -> dict[str, Any]:
    """As the pipeline writes it."""

    def port(p: Port) -> dict[str, Any]:
        return {"name": p.name, "dtype": str(p.dtype).removeprefix("torch."), "shape": list(p.shape)}

    manifest = {
        "options": artifact.options,
        "files": [{"path": f.path, "bytes": f.bytes, "sha256": f.sha256} for f in artifact.files],
        "inputs": [port(p) for p in artifact.inputs],
        "outputs": [port(p) for p in artifact.outputs],
        "details": artifact.details,
    }
    loaded: dict[str, Any] = json.loads(json.dumps(manifest))
    return loaded


@pytest.fixture
def rounded(tmp_path: Path) -> tuple[Graph, Any]:
    codes = quantize_groupwise(torch.randn(8, 64), bits=4, group=32, symmetric=True)
    graph = graph_of(LowBitLinear(codes), {"x": torch.randn(2, 3, 64)}, X)
    return graph, lowered(graph, tmp_path, accuracy_level=0)


def test_load_gives_the_same_artefact(tmp_path: Path, rounded: tuple[Graph, Any]) -> None:
    _, artifact = rounded
    again = OnnxRuntime.load(tmp_path, manifest_of(artifact))
    assert again == artifact
    x = torch.randn(4, 1, 64)
    assert torch.equal(again.run({"x": x})["y0"], artifact.run({"x": x})["y0"])


def test_load_refuses_damaged_and_missing_files(tmp_path: Path, rounded: tuple[Graph, Any]) -> None:
    manifest = manifest_of(rounded[1])
    path = tmp_path / "model.onnx"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(LowerError, match="damaged: sha256"):
        OnnxRuntime.load(tmp_path, manifest)
    path.write_bytes(content[:-7])
    with pytest.raises(LowerError, match="damaged: bytes"):
        OnnxRuntime.load(tmp_path, manifest)
    path.unlink()
    with pytest.raises(LowerError, match="missing"):
        OnnxRuntime.load(tmp_path, manifest)


def test_a_plain_session_in_another_process_runs_the_file(tmp_path: Path, rounded: tuple[Graph, Any]) -> None:
    graph, artifact = rounded
    script = (
        "import sys, json, numpy, onnxruntime\n"
        "session = onnxruntime.InferenceSession(sys.argv[1], providers=['CPUExecutionProvider'])\n"
        "x = numpy.load(sys.argv[2])\n"
        "numpy.save(sys.argv[3], session.run(['y0'], {'x': x})[0])\n"
        "imported = [name in sys.modules for name in ('torch', 'surgeon')]\n"
        "print(json.dumps([session.get_modelmeta().custom_metadata_map, *imported]))\n"
    )
    import numpy

    x = torch.randn(3, 4, 64)
    numpy.save(tmp_path / "x.npy", x.numpy())
    paths = [str(artifact.path), str(tmp_path / "x.npy"), str(tmp_path / "y.npy")]
    done = subprocess.run(
        [sys.executable, "-I", "-c", script, *paths], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    recorded, *imported = json.loads(done.stdout)
    assert imported == [False, False]
    assert error(torch.from_numpy(numpy.load(tmp_path / "y.npy")), graph(x=x)["y0"]) < 1e-5
    assert json.loads(recorded["surgeon.inputs"]) == ["x"]
    assert json.loads(recorded["surgeon.outputs"]) == ["y0"]
    assert json.loads(recorded["surgeon.quantization"]) == [
        {
            "operator": "MatMulNBits",
            "bits": 4,
            "group": 32,
            "block": 32,
            "symmetric": True,
            "weights": 1,
            "parameters": 512,
        }
    ]


def test_wrong_inputs_are_named(rounded: tuple[Graph, Any]) -> None:
    _, artifact = rounded
    x = torch.randn(2, 3, 64)
    for inputs, message in (
        ({}, "missing: x"),
        ({"x": x, "z": x}, "unknown: z"),
        ({"x": x.double()}, "must be torch.float32, found torch.float64"),
        ({"x": x[0]}, "must have shape"),
        ({"x": x[..., :5]}, "must have shape"),
    ):
        with pytest.raises(LowerError, match=message):
            artifact.run(inputs)


def test_threads_are_set_for_a_while_and_put_back(rounded: tuple[Graph, Any]) -> None:
    _, artifact = rounded
    first = artifact.session()
    with artifact.threads(2):
        assert artifact.session() is not first
        assert artifact.session().get_session_options().intra_op_num_threads == 2
    assert artifact.session() is first
    with pytest.raises(LowerError, match="at least 1"), artifact.threads(0):
        pass


class Odd(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (torch.special.bessel_j0(x),)


def test_operators_without_translation_are_refused_by_name(tmp_path: Path) -> None:
    graph = graph_of(Odd(), {"x": torch.randn(2, 3)}, {"x": {0: "batch"}})
    refusals = OnnxRuntime().refuses(graph)
    assert [refusal.reason for refusal in refusals] == [
        "operator aten.special_bessel_j0.default has no ONNX translation at opset 23"
    ]
    with pytest.raises(LowerError, match="special_bessel_j0"):
        OnnxRuntime().lower(graph, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_bfloat16_is_refused_on_the_cpu() -> None:
    graph = graph_of(
        nn.Sequential(nn.Linear(4, 4)).to(torch.bfloat16), {"input": torch.randn(2, 4).bfloat16()}, {"input": {0: "b"}}
    )
    assert any("bfloat16 has no kernels" in refusal.reason for refusal in OnnxRuntime().refuses(graph))
    assert OnnxRuntime(provider="cuda").refuses(graph) == []
    assert OnnxRuntime().refuses_source(graph) == OnnxRuntime().refuses(graph)
    assert OnnxRuntime(provider="cuda").refuses_source(graph) == []


@pytest.mark.parametrize(
    ("dtype", "accepted"), [(torch.float32, 1e-3), (torch.float64, 1e-3), (torch.float16, 1e-2), (torch.bfloat16, 5e-2)]
)
def test_types_of_16_bits_are_held_to_their_own_rounding(dtype: torch.dtype, accepted: float) -> None:
    graph = graph_of(nn.Sequential(nn.Linear(4, 4)).to(dtype), {"input": torch.randn(2, 4, dtype=dtype)}, {"input": {0: "b"}})
    assert OnnxRuntime().accepted_error(graph) == accepted


def test_what_brings_a_low_bit_artefact_nearer() -> None:
    codes = quantize_groupwise(torch.randn(8, 64), bits=4, group=32, symmetric=True)
    graph = graph_of(LowBitLinear(codes), {"x": torch.randn(2, 3, 64)}, X)
    nearer, advice = OnnxRuntime(threads=1).nearer(graph)
    assert nearer == OnnxRuntime(accuracy_level=0, threads=1)
    assert "accuracy_level: 0 keeps" in advice
    assert OnnxRuntime(accuracy_level=4).nearer(graph) == (None, advice)
    assert OnnxRuntime(accuracy_level=0).nearer(graph) == (None, "")
    assert OnnxRuntime().nearer(graph_of(Rounded(), {"x": torch.randn(2, 3, 4)}, X)) == (None, "")


def test_a_provider_that_is_not_there_says_how_to_get_it(tmp_path: Path) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has the CUDA provider")
    graph = graph_of(Rounded(), {"x": torch.randn(2, 3, 4)}, X)
    with pytest.raises(LowerError, match=r"pip install 'surgeon\[cuda\]'"):
        OnnxRuntime(provider="cuda").lower(graph, tmp_path)


def test_a_provider_that_does_not_start_is_no_cpu_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    artifact = lowered(graph_of(Rounded(), {"x": torch.randn(2, 3, 4)}, X), tmp_path)
    artifact.options["provider"] = "cuda"
    everything = ["CUDAExecutionProvider", "CPUExecutionProvider"]  # as a build for CUDA says where CUDA is not installed
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: everything)
    with pytest.warns(UserWarning, match="CUDAExecutionProvider"), pytest.raises(LowerError, match="would run on CPU"):
        artifact.run({"x": torch.randn(2, 3, 4)})


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"provider": "tensorrt", "experts": "sorted", "genai": True}, ["experts", "genai"]),
        ({"provider": "tensorrt", "shapes": {"bacth": (1, 2, 3)}}, ["shapes"]),
        ({"shapes": {"batch": (1, 2, 3)}, "ep_context": True}, ["shapes", "ep_context"]),
        ({"provider": "tensorrt", "shapes": {"batch": (1, 2, 3)}, "ep_context": True}, []),
    ],
)
def test_options_of_another_provider_are_refused(options: dict[str, Any], named: list[str]) -> None:
    graph = graph_of(nn.Sequential(nn.Linear(4, 4)), {"input": torch.randn(2, 4)}, {"input": {0: "batch"}})
    assert [refusal.node for refusal in OnnxRuntime(**options).refuses(graph)] == named


def test_the_tensorrt_provider_gets_standard_operators_and_profiles(tmp_path: Path) -> None:
    from surgeon.backends import _onnx_tensorrt as tensorrt
    from surgeon.tracing import trace
    from tests.models import inputs_for, tiny

    graph = trace(*tiny("mixtral", layers=1))
    model, details = tensorrt.write(graph, {"batch": (1, 4, 16)}, tmp_path / "model.onnx")
    assert set(model.opset_imports) == {""}
    ((_, options), _) = tensorrt.providers(details)
    assert options["trt_profile_min_shapes"] == "input_ids:1x1,attention_mask:1x1"
    assert options["trt_profile_opt_shapes"] == "input_ids:4x128,attention_mask:4x128"
    artifact = OnnxRuntimeArtifact(tmp_path, "onnxruntime", {}, (), graph.inputs, graph.outputs)
    inputs = inputs_for("mixtral", 3, 11, padded=True)
    with torch.no_grad():
        wanted = graph(**inputs)
    assert error(artifact.run(inputs)["logits"], wanted["logits"]) < 1e-5


def test_importing_the_backend_loads_no_runtime() -> None:
    script = "import sys, surgeon.backends.onnxruntime; print({'onnxruntime', 'onnxscript'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("opset", [18, 23])
def test_every_opset_computes_the_same(tmp_path: Path, opset: int) -> None:
    from surgeon.tracing import trace
    from tests.models import inputs_for, tiny

    graph = trace(*tiny("llama", layers=1))
    artifact = lowered(graph, tmp_path, opset=opset)
    assert artifact.details["opset"][""] == opset
    inputs = inputs_for("llama", 3, 11, padded=True)
    with torch.no_grad():
        wanted = graph(**inputs)
    assert error(artifact.run(inputs)["logits"], wanted["logits"]) < 1e-5


def test_what_brings_low_bit_experts_nearer(patient: Any) -> None:
    graph = patient("mixtral").operate({"quantize": {"scheme": "int8", "group": 16, "names": "*.moe"}}).graph
    first, _ = OnnxRuntime().nearer(graph)
    assert first == OnnxRuntime(accuracy_level=0)
    assert first is not None
    second, advice = first.nearer(graph)
    assert second == OnnxRuntime(accuracy_level=0, experts="sorted")
    assert "experts: sorted keeps" in advice
    assert second is not None
    assert second.nearer(graph) == (None, "")
    assert OnnxRuntime(accuracy_level=0, experts="fused").nearer(graph) == (None, advice)
