"""Caches that the runtime writes in place (GroupQueryAttention), and fusions of the ONNX file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

import surgeon
from surgeon.backends import _onnx_fuse as fuse
from surgeon.caches import PAST, PRESENT, complete, continued, room
from surgeon.errors import LowerError, RecipeError
from tests.causal import FAMILIES, causal, padded_prompts
from tests.conditional import conditional
from tests.conftest import MODELS
from tests.models import tiny
from tests.test_generation import assert_same, plain_batch

SHARED = {"onnxruntime": {"caches": "shared"}}
KERNEL = "com.microsoft.GroupQueryAttention"


def compiled(module: nn.Module, steps: Any = (), **options: Any) -> surgeon.Compiled:
    backend = {"onnxruntime": {"caches": "shared", **options}}
    return surgeon.compile(module, list(steps), task="text-generation", backend=backend, progress=False)


def details(model: surgeon.Compiled) -> dict[str, Any]:
    assert model.artifact is not None
    return model.artifact.details


@pytest.mark.parametrize("name", ["qwen3", "gemma3", "gpt_neox", "gpt2", "mistral", "opt"])
def test_families_generate_what_the_library_does(name: str) -> None:
    """Normed heads, windows, part of a head turned, learned positions: what is no table stays outside of the kernel."""
    module = causal(name, layers=2)
    model = compiled(module)
    assert details(model)["operators"][KERNEL] == 2
    assert_same(model, module)


@pytest.fixture(scope="module")
def llama() -> tuple[nn.Module, surgeon.Compiled]:
    """A tiny model and what was built from it."""
    module, _ = tiny("llama")
    return module, compiled(module)


def test_rotary_and_packed_projections_become_the_kernels_own(llama: tuple[nn.Module, surgeon.Compiled]) -> None:
    module, model = llama
    counts = details(model)["operators"]
    assert counts[KERNEL] == 3
    assert not {"RotaryEmbedding", "Split", "Cos"} & set(counts)
    assert counts["MatMul"] == 3 * 5 + 1  # q, k and v are one matrix; o, gate, up, down; the head
    assert_same(model, module)


DROP = {"drop_blocks": {"count": 1}}
TEXT: dict[str, Any] = {"text": MODELS / "calibration.txt", "samples": 2, "length": 64}


@pytest.mark.parametrize("steps", [[], [DROP, {"quantize": {"scheme": "int4"}}]], ids=["float", "int4"])
def test_the_trained_llama_outgrows_its_buffers(tmp_path: Path, steps: list[Any]) -> None:
    exact = {"accuracy_level": 0}  # activations that are rounded to 8 bits turn the smallest difference into other tokens
    both = [
        surgeon.compile(
            MODELS / "tiny-llama", steps, backend={"onnxruntime": options}, output=tmp_path / options["caches"],
            progress=False, **({"calibration": TEXT} if steps else {}),
        )
        for options in ({"caches": "shared", **exact}, {"caches": "appended", **exact})
    ]
    new = room(0, 0) + 30
    for batch in (1, 3):
        ids, mask = padded_prompts(batch)
        found, expected = (model.generate(ids, mask, max_new_tokens=new, eos_token_id=()) for model in both)
        assert torch.equal(found, expected)
        assert len(set(found[0].tolist())) > 8
    again = surgeon.load(tmp_path / "shared")
    assert torch.equal(again.generate(ids, mask, max_new_tokens=new, eos_token_id=()), expected)


def test_caches_that_a_caller_hands_in_are_read_and_come_back_longer(llama: tuple[nn.Module, surgeon.Compiled]) -> None:
    _, model = llama
    graph = model.graph  # no pass has changed it
    assert graph is not None
    call = continued(graph, plain_batch(graph))
    assert call is not None
    call = complete(graph.inputs, call)
    rows, new = call["input_ids"].shape
    past = call["past_key_values.0.key"].shape[2]
    assert min(rows, new) > 1  # row by row, since the kernel continues a batch by one token
    assert past > 0
    with torch.no_grad():
        expected = graph(**call)
    found = model(**call)
    assert list(found) == ["logits", *(port.name for port in graph.outputs if port.role == PRESENT)]
    for name, value in found.items():
        assert value.shape == expected[name].shape
        assert float((value - expected[name]).abs().max()) < 1e-4 * float(expected[name].abs().max())


def test_a_buffer_may_be_longer_than_the_past(llama: tuple[nn.Module, surgeon.Compiled]) -> None:
    """What another program does with the file: one buffer bound as past and as present, of any length."""
    import onnxruntime

    module, model = llama
    assert model.artifact is not None
    session = onnxruntime.InferenceSession(model.artifact.path, providers=["CPUExecutionProvider"])  # type: ignore[attr-defined]
    ids = torch.randint(3, 90, (2, 9))
    with torch.no_grad():
        expected = module(input_ids=ids).logits
    buffers = {
        port.name: onnxruntime.OrtValue.ortvalue_from_numpy(np.full((2, port.shape[1], 40, port.shape[3]), 7.0, np.float32))
        for port in model.artifact.inputs
        if port.role == PAST
    }
    rows = []
    for start, end in ((0, 6), (6, 7), (7, 8), (8, 9)):
        binding = session.io_binding()
        binding.bind_cpu_input("input_ids", ids[:, start:end].contiguous().numpy())
        binding.bind_cpu_input("attention_mask", np.ones((2, end), np.int64))
        binding.bind_cpu_input("position_ids", np.tile(np.arange(start, end), (2, 1)))
        for name, value in buffers.items():
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), value)
        binding.bind_output("logits")
        session.run_with_iobinding(binding)
        rows.append(torch.from_numpy(binding.get_outputs()[-1].numpy().copy()))
    found = torch.cat(rows, 1)
    assert float((found - expected).abs().max()) < 1e-4 * float(expected.abs().max())


def test_texts_longer_than_the_table_of_angles_are_refused() -> None:
    module = causal("qwen3", layers=1)
    model = compiled(module)
    longest = 256
    assert details(model)["operators"].get("RotaryEmbedding") is None
    ids = torch.randint(3, 90, (1, longest + 1))
    with pytest.raises(LowerError, match="cos_cache"):
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
    assert model(input_ids=ids[:, 1:], attention_mask=torch.ones_like(ids[:, 1:]))["logits"].shape[1] == longest


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("bloom", {}, "past_key_values.0.key, past_key_values.0.value: no attention of one kernel reads this cache"),
        ("gemma3n", {}, "its cache is read by attention_default_[0-9] too"),
        ("t5", {}, "an encoder-decoder"),
        ("llama", {"provider": "cuda"}, "caches: has no meaning with provider: cuda"),
    ],
)
def test_what_the_kernel_does_not_compute_is_refused(name: str, options: dict[str, Any], reason: str) -> None:
    layers = 4 if name == "gemma3n" else 1  # the last two read the caches of others
    module = causal(name, layers) if name in FAMILIES else conditional(name) if name == "t5" else tiny(name, layers=layers)[0]
    with pytest.raises((LowerError, RecipeError), match=reason):
        compiled(module, **options)


def test_odd_heads_and_tasks_are_refused() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 99}
    with pytest.raises(LowerError, match="heads have 12 numbers; the kernel needs a multiple of 8"):
        compiled(LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2)).eval())
    module, inputs = tiny("bert", layers=1)
    with pytest.raises(LowerError, match="traced without caches"):
        surgeon.compile(module, [], inputs=inputs, backend=SHARED, progress=False)


def test_a_mask_that_shows_later_positions_is_found_out() -> None:
    from surgeon.backends._onnx_shared import ATTENTION, refusals

    graph = surgeon.trace(tiny("llama")[0], task="text-generation")
    assert refusals(graph) == []
    for node in graph.module.graph.nodes:
        if node.target is torch.ops.aten.le.Tensor:  # later positions in place of earlier ones
            node.target = torch.ops.aten.ge.Tensor
    attentions = [node.name for node in graph.module.graph.nodes if node.target is ATTENTION]
    assert [refusal.node for refusal in refusals(graph)] == attentions


def test_genai_writes_in_place_too(shallow_llama: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_genai")
    model = surgeon.compile(
        shallow_llama, [DROP], output=tmp_path / "out", progress=False, calibration=TEXT,
        backend={"onnxruntime": {"genai": True, "caches": "shared"}},
    )  # fmt: skip
    assert details(model)["genai"] == "6 tokens generated and found equal"
    assert '"past_present_share_buffer": true' in (tmp_path / "out" / "genai_config.json").read_text()


# -- the file -----------------------------------------------------------------------------------------------------------


def test_residual_norms_and_projections_are_fused_in_every_model() -> None:
    module, _ = tiny("llama")
    model = surgeon.compile(module, [], task="text-generation", backend="onnxruntime", progress=False)
    counts = details(model)["operators"]
    assert counts["com.microsoft.SkipSimplifiedLayerNormalization"] == 6
    assert counts["RMSNormalization"] == 1  # behind the embedding
    assert counts["Split"] == 3
    assert details(model)["nodes"] / 3 <= 25


def small(*nodes: ir.Node, inputs: list[ir.Value], outputs: list[ir.Value], constants: dict[str, np.ndarray[Any, Any]]) -> Any:
    values = {name: next(v for node in nodes for v in node.inputs if v is not None and v.name == name) for name in constants}
    for name, value in values.items():
        value.const_value = ir.tensor(constants[name], name=name)
    graph = ir.Graph(inputs, outputs, nodes=nodes, initializers=list(values.values()), opset_imports={"": 23}, name="g")
    return ir.Model(graph, ir_version=10)


def run(model: ir.Model, **feed: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
    import onnxruntime

    data = ir.to_proto(model).SerializeToString()
    found: list[np.ndarray[Any, Any]] = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"]).run(None, feed)
    return found


def value(name: str, shape: list[int] | None = None, kind: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
    return ir.Value(name=name, shape=None if shape is None else ir.Shape(shape), type=ir.TensorType(kind))


def test_one_unsqueeze_for_two() -> None:
    generator = np.random.default_rng(0)
    for first, second in (([0], [3]), ([1], [1]), ([-1], [0]), ([0, 3], [2])):
        x = value("x", [2, 3])
        inner = ir.Node("", "Unsqueeze", [x, value("a", [len(first)], ir.DataType.INT64)], num_outputs=1)
        middle, end = inner.outputs[0], 2 + len(first) + len(second)
        middle.name, middle.shape, middle.type = "m", ir.Shape([1] * (2 + len(first))), x.type
        outer = ir.Node("", "Unsqueeze", [middle, value("b", [len(second)], ir.DataType.INT64)], num_outputs=1)
        out = outer.outputs[0]
        out.name, out.shape, out.type = "y", ir.Shape([None] * end), x.type
        constants = {"a": np.array(first), "b": np.array(second)}
        model = small(inner, outer, inputs=[x], outputs=[out], constants=constants)
        given = generator.standard_normal((2, 3)).astype(np.float32)
        expected = np.expand_dims(np.expand_dims(given, tuple(first)), tuple(second))
        fuse.merge_unsqueezes(model)
        assert [node.op_type for node in model.graph] == ["Unsqueeze"]
        found = run(model, x=given)[0]
        assert found.shape == expected.shape
        np.testing.assert_array_equal(found, expected)


def test_matrices_of_one_value_are_packed_unless_they_are_shared() -> None:
    generator = np.random.default_rng(1)
    widths = (5, 2, 3)
    weights = {f"w{i}": generator.standard_normal((4, n)).astype(np.float32) for i, n in enumerate(widths)}
    for shared in (False, True):
        x = value("x", [2, 4])
        sources = {name: value(name, list(array.shape)) for name, array in weights.items()}
        nodes = [ir.Node("", "MatMul", [x, sources[name]], num_outputs=1) for name in weights]
        if shared:  # one matrix is read twice: packing would store it twice
            nodes.append(ir.Node("", "MatMul", [x, sources["w0"]], num_outputs=1))
        for i, node in enumerate(nodes):
            node.outputs[0].name, node.outputs[0].type = f"y{i}", x.type
            node.outputs[0].shape = ir.Shape([2, widths[i % 3]])
        model = small(*nodes, inputs=[x], outputs=[node.outputs[0] for node in nodes], constants=weights)
        given = generator.standard_normal((2, 4)).astype(np.float32)
        expected = run(model, x=given)
        fuse.pack_projections(model)
        kinds = [node.op_type for node in model.graph]
        assert kinds == (["MatMul"] * 4 if shared else ["MatMul", "Split"])
        assert [output.name for output in model.graph.outputs] == [f"y{i}" for i in range(len(nodes))]
        for one, other in zip(run(model, x=given), expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-6)
