"""Tracing: the canonical graph equals its source, shares its weights, and refuses what it cannot reproduce."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgeon.errors import TraceError
from surgeon.graph import Graph
from surgeon.rewrite import Editor
from surgeon.source import flatten_outputs, load_source
from surgeon.tracing import relative_error, trace, trace_source
from tests.models import NAMES, inputs_for, layer_list, minilm_path, tiny, with_layer_deleted

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def traced() -> Callable[[str], tuple[nn.Module, Graph]]:
    """Tiny models and their graphs, each traced once."""
    made: dict[str, tuple[nn.Module, Graph]] = {}

    def make(name: str) -> tuple[nn.Module, Graph]:
        if name not in made:
            module, inputs = tiny(name)
            made[name] = module, trace(module, inputs)
        return made[name]

    return make


@pytest.fixture(scope="module")
def minilm() -> Graph:
    return trace(minilm_path())


def run(module: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The source model as its user calls it, without caches."""
    config: Any = module.config
    kwargs = {"use_cache": False} if "use_cache" in config.to_dict() and not config.is_encoder_decoder else {}
    with torch.no_grad():
        return flatten_outputs(module(**inputs, **kwargs))


# -- equality ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("batch", "sequence", "padded"), [(1, 1, False), (1, 13, True), (3, 5, True), (5, 40, False)])
def test_equals_the_source_at_other_sizes(
    traced: Callable[[str], tuple[nn.Module, Graph]], name: str, batch: int, sequence: int, padded: bool
) -> None:
    module, graph = traced(name)
    inputs = inputs_for(name, batch, sequence, padded=padded, seed=9)
    expected, found = run(module, inputs), graph(**inputs)
    assert list(found) == list(expected) == [port.name for port in graph.outputs]
    for key, value in expected.items():
        assert relative_error(found[key], value) < 1e-5


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_padding_does_not_reach_the_kept_positions(traced: Callable[[str], tuple[nn.Module, Graph]], name: str) -> None:
    """The mask is traced as an operation on the input, not as the constant it was in the example."""
    _, graph = traced(name)
    short = inputs_for(name, 2, 6)
    padded = {k: F.pad(v, (0, 4), value=0 if k == "attention_mask" else 1) for k, v in short.items()}
    output = graph.outputs[0].name
    assert relative_error(graph(**padded)[output][:, :6], graph(**short)[output]) < 1e-5


@pytest.mark.minilm
def test_minilm_equals_the_source(minilm: Graph) -> None:
    from transformers import AutoModel

    module = AutoModel.from_pretrained(minilm_path(), dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(0, 30522, (3, 33), generator=generator)
    mask = (torch.arange(33) < torch.tensor([[33], [20], [1]])).long()
    inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    assert [port.name for port in minilm.inputs] == list(inputs)
    for key, value in run(module, inputs).items():
        assert relative_error(minilm(**inputs)[key], value) < 1e-5
    assert minilm.parameter_count() == sum(p.numel() for p in module.parameters())
    assert minilm.dims["sequence"].max == 512  # its position table
    assert minilm.source.path == str(minilm_path().resolve())
    assert minilm.source.config["num_hidden_layers"] == 6


@pytest.mark.parametrize("name", NAMES)
def test_gradients_equal_the_source(traced: Callable[[str], tuple[nn.Module, Graph]], name: str) -> None:
    module, graph = traced(name)
    inputs = inputs_for(name, 2, 9, padded=True)
    output = graph.outputs[0].name
    parameters = dict(module.named_parameters())

    def gradients(result: Tensor) -> dict[str, Tensor | None]:
        weight = torch.randn(result.shape, generator=torch.Generator().manual_seed(5))
        found = torch.autograd.grad((result * weight).sum(), list(parameters.values()), allow_unused=True)
        return dict(zip(parameters, found, strict=True))

    kwargs = {} if name == "vit" else {"use_cache": False}
    expected = gradients(flatten_outputs(module(**inputs, **kwargs))[output])
    found = gradients(graph(**inputs)[output])
    unused = {key for key, value in expected.items() if value is None}
    assert unused == {key for key, value in found.items() if value is None}
    assert all("pooler" in key for key in unused)
    for key, value in expected.items():
        if value is not None:
            gradient = found[key]
            assert gradient is not None
            assert relative_error(gradient, value) < 1e-4, key


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit"])
def test_a_deleted_layer_is_traced_like_any_model(name: str) -> None:
    """The helper that other tests compare drop_blocks with: sound, and the original is untouched."""
    module, inputs = tiny(name, layers=2)
    before = run(module, inputs)
    shorter = with_layer_deleted(name, module, 0)
    assert len(layer_list(shorter)) == 1
    graph = trace(shorter, inputs)
    output = graph.outputs[0].name
    assert relative_error(graph(**inputs)[output], run(shorter, inputs)[output]) < 1e-5
    assert relative_error(before[output], run(shorter, inputs)[output]) > 1e-2
    assert torch.equal(before[output], run(module, inputs)[output])


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 5e-2), ("float64", 1e-12)])
def test_dtype_is_that_of_the_trace(dtype: str, tolerance: float) -> None:
    module, inputs = tiny("llama", layers=1)
    graph = trace(module, inputs, dtype=dtype)
    wanted = getattr(torch, dtype)
    assert {p.dtype for p in module.parameters()} == {torch.float32}  # the caller's module is untouched
    assert graph.outputs[0].dtype == wanted
    reference = copy.deepcopy(module).to(wanted)
    assert relative_error(graph(**inputs)["logits"], run(reference, inputs)["logits"]) < tolerance


# -- canonical form ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_canonical_form(traced: Callable[[str], tuple[nn.Module, Graph]], name: str) -> None:
    module, graph = traced(name)
    nodes = list(graph.module.graph.nodes)
    placeholders = [n for n in nodes if n.op == "placeholder"]
    assert [n.target for n in placeholders] == [port.name for port in graph.inputs]
    assert {n.op for n in nodes} <= {"placeholder", "get_attr", "call_function", "output"}
    modes = set()
    position = {n: i for i, n in enumerate(nodes)}
    forbidden = {"clone", "contiguous", "detach", "alias", "view", "_unsafe_view", "dropout", "_assert_tensor_metadata"}
    for node in nodes:
        if node.op == "output":
            continue
        value = node.meta["val"]
        if isinstance(value, Tensor):
            modes.add(id(value.fake_mode))  # type: ignore[attr-defined]
        if node.op == "get_attr":
            first = min(position[user] for user in node.users)
            assert all(nodes[i].op == "get_attr" for i in range(position[node], first))
        if isinstance(node.target, torch._ops.OpOverload):
            assert not node.target._schema.is_mutable
            assert node.target._schema.name.removeprefix("aten::") not in forbidden
            if node.target is torch.ops.aten.sym_size.int:
                assert node.args[0] in placeholders
    assert len(modes) == 1
    keys = [(n.target, str(n.args), str(n.kwargs)) for n in nodes if n.op == "call_function"]
    assert len(keys) == len(set(keys))
    assert all(n.users for n in nodes if n.op in ("call_function", "get_attr"))
    assert type(graph.module.graph._codegen) is torch.fx.graph.CodeGen
    assert not graph.module._forward_pre_hooks
    if name == "mixtral":
        moe = [n for n in nodes if n.target is torch.ops.surgeon.moe.default]
        assert len(moe) == len(layer_list(module))


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_the_source_model_s_own(traced: Callable[[str], tuple[nn.Module, Graph]], name: str) -> None:
    module, graph = traced(name)
    own = dict(module.named_parameters())  # a tied weight under its first name
    read = graph.parameters()
    for key, tensor in read.items():
        if isinstance(tensor, nn.Parameter):
            assert tensor.data_ptr() == own[key].data_ptr()
    assert set(own) == {key for key, tensor in read.items() if isinstance(tensor, nn.Parameter)}
    assert graph.parameter_count() == sum(p.numel() for p in own.values())


def test_clone_is_independent(traced: Callable[[str], tuple[nn.Module, Graph]]) -> None:
    _, graph = traced("llama")
    inputs = inputs_for("llama", 2, 8)
    before, print_before = graph(**inputs)["logits"], graph.fingerprint()
    clone = graph.clone()
    assert clone.fingerprint() == print_before
    assert all(clone.tensor(k).data_ptr() == t.data_ptr() for k, t in graph.parameters().items())
    name = next(key for key in clone.parameters() if key.endswith("down_proj.weight"))
    editor = Editor(clone)
    editor.set_tensor(name, torch.zeros_like(clone.tensor(name)))
    editor.finish()
    assert not torch.equal(clone(**inputs)["logits"], before)
    assert torch.equal(graph(**inputs)["logits"], before)
    assert graph.fingerprint() == print_before
    assert graph.fingerprint(weights=True) != clone.fingerprint(weights=True)


def test_the_editor_evaluates_new_nodes_in_the_graph_s_fake_mode(
    traced: Callable[[str], tuple[nn.Module, Graph]],
) -> None:
    _, graph = traced("bert")
    clone = graph.clone()
    editor = Editor(clone)
    node = next(n for n in clone.module.graph.nodes if n.target is torch.ops.aten.linear.default)
    with editor.after(node):
        doubled = editor.call(torch.ops.aten.mul.Tensor, node, 2.0)
    assert doubled.meta["val"].shape == node.meta["val"].shape
    editor.replace(node, doubled)
    inputs = inputs_for("bert", 3, 4)
    assert editor.finish()(**inputs)["last_hidden_state"].shape == (3, 4, 64)


def test_fingerprint_is_stable_across_processes_and_depends_on_shapes() -> None:
    code = (
        "import torch; from tests.models import tiny; from surgeon.tracing import trace\n"
        "print(trace(*tiny('gpt2', layers=1)).fingerprint())"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "77", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    other = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    here = trace(*tiny("gpt2", layers=1)).fingerprint()
    assert other.stdout.strip().splitlines()[-1] == here
    assert trace(*tiny("gpt2", layers=1, seed=3)).fingerprint() == here  # values do not enter
    assert trace(*tiny("gpt2", layers=2)).fingerprint() != here


# -- the source is handed back as it was ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mixtral", "bert"])
def test_the_source_model_is_left_as_it_was(name: str) -> None:
    module, inputs = tiny(name, layers=2)
    config: Any = module.config
    config.use_cache = True
    module.set_attn_implementation("eager")  # type: ignore[operator]
    module.train()
    layer_list(module)[1].eval()
    training = [m.training for m in module.modules()]
    settings = (config.to_dict(), config._attn_implementation, getattr(config, "_experts_implementation", None))
    attributes = {key: set(vars(m)) for key, m in module.named_modules()}
    trace(module, inputs)
    assert [m.training for m in module.modules()] == training
    after = (config.to_dict(), config._attn_implementation, getattr(config, "_experts_implementation", None))
    assert after == settings
    assert {key: set(vars(m)) for key, m in module.named_modules()} == attributes
    assert torch.backends.mha.get_fastpath_enabled()


# -- other modules ----------------------------------------------------------------------------------------------------


class Sizes(nn.Module):
    """Sizes that are expressions of the inputs' sizes: 2 s, s + 3, b s, and a strided (s - 1) // 2 + 1."""

    def forward(self, x: Tensor) -> dict[str, Any]:
        twice = torch.cat([x, x], dim=1)
        b, s, width = twice.shape
        flat = twice.reshape(b * s, width)
        ones = torch.arange(b * s, dtype=x.dtype)[:, None] + torch.zeros(s // 2 + 3).sum()
        return {
            "twice": (flat * ones).reshape(b, s, width),
            "padded": F.pad(x, (0, 0, 1, 2)),
            "pooled": F.avg_pool1d(x.transpose(1, 2), 1, stride=2),
            "nested": (x.sum(), None, [x.mean(1)]),
        }


def test_sizes_are_expressions_of_the_inputs_sizes() -> None:
    graph = trace(Sizes(), {"x": torch.randn(2, 5, 4)}, dynamic={"x": {0: "rows", 1: "steps"}})
    assert [p.name for p in graph.outputs] == ["twice", "padded", "pooled", "nested.0", "nested.2.0"]
    assert set(graph.dims) == {"rows", "steps"}
    for rows, steps in [(1, 1), (3, 8), (4, 3)]:
        x = torch.randn(rows, steps, 4, generator=torch.Generator().manual_seed(rows))
        for key, value in flatten_outputs(Sizes()(x)).items():
            assert relative_error(graph(x=x)[key], value) < 1e-6
    for node in graph.module.graph.nodes:
        if node.target is torch.ops.aten.sym_size.int:
            assert node.args[0].op == "placeholder"


def test_the_largest_of_several_sizes_is_written() -> None:
    """As the length of lists that are padded to the longest of them."""

    class Longest(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            length: Any = torch.sym_max(x.shape[1], y.shape[1])
            return x.new_zeros(x.shape[0], length) + x.sum() + y.sum()

    dynamic = {"x": {1: "first"}, "y": {1: "second"}}
    graph = trace(Longest(), {"x": torch.randn(2, 5), "y": torch.randn(2, 7)}, dynamic=dynamic)
    for first, second in [(3, 9), (9, 3)]:
        assert graph(x=torch.ones(2, first), y=torch.ones(2, second))["output"].shape == (2, 9)


class Folding(nn.Module):
    """A constant chain (2^-i), a dead input, an operation in place, a tied weight and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor, unused: Tensor) -> Tensor:
        slopes = torch.pow(torch.tensor(2.0), -torch.arange(4, dtype=torch.float32))
        y = self.dropout(self.second(self.first(x))) * slopes
        y = y.clone()
        y.add_(1.0)
        y[:, 0] = 0.0
        return y


def test_constants_are_folded_and_dead_inputs_kept() -> None:
    torch.manual_seed(0)
    module = Folding()
    graph = trace(module, {"x": torch.randn(3, 4), "unused": torch.randn(3, 2)})
    assert [p.name for p in graph.inputs] == ["x", "unused"]
    read = graph.parameters()
    constants = [t for key, t in read.items() if key.startswith("constant_")]
    assert any(torch.equal(t, torch.tensor([1.0, 0.5, 0.25, 0.125])) for t in constants)
    assert {key for key in read if isinstance(read[key], nn.Parameter)} == {"first.weight", "first.bias", "second.bias"}
    x = torch.randn(7, 4)
    with torch.no_grad():
        assert torch.equal(graph(x=x, unused=torch.zeros(7, 2))["output"], module.eval()(x, x))
    graph(x=x, unused=torch.zeros(7, 2))["output"].sum().backward()  # the in-place operations are functional now
    assert module.first.weight.grad is not None


def test_an_encoder_layer_of_torch_is_not_traced_as_one_fused_node() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval()
    graph = trace(layer, {"src": torch.randn(2, 5, 16)}, dynamic={"src": {0: "batch", 1: "sequence"}})
    assert not any("_transformer_encoder_layer_fwd" in str(n.target) for n in graph.module.graph.nodes)
    x = torch.randn(3, 9, 16)
    assert relative_error(graph(src=x)["output"], layer(x).detach()) < 1e-5


def test_an_example_of_batch_one_is_dynamic_all_the_same() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2))
    graph = trace(module, {"input": torch.randn(1, 4)})
    assert graph.inputs[0].shape == ("batch", 4)
    assert graph(input=torch.randn(6, 4))["output"].shape == (6, 2)


class Remembering(nn.Module):
    """Remembers its last hidden state, as recurrences and caches of the library do."""

    last: Tensor | None = None

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.linear(x)
        return x + self.last.relu()


def test_what_a_model_remembers_makes_no_noise(capfd: pytest.CaptureFixture[str]) -> None:
    """Nothing is printed, no warning raised (which is an error here), and no tensor of the export stays behind."""
    module, x = Remembering().eval(), torch.randn(4, 8)
    graph = trace(module, {"x": x})
    assert type(module.last) is Tensor
    with torch.no_grad():
        torch.testing.assert_close(graph(x=x)["output"], module(x))
    assert tuple(capfd.readouterr()) == ("", "")


def test_static_inputs() -> None:
    graph = trace(nn.Linear(4, 2), {"input": torch.randn(3, 4)}, dynamic={"input": None})
    assert graph.inputs[0].shape == (3, 4)
    assert not graph.dims


# -- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "model"
    module: Any = tiny("llama", layers=1)[0]
    module.save_pretrained(path)
    return path


@pytest.fixture
def copied(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "model"))


def test_a_directory(checkpoint: Path) -> None:
    module, inputs = tiny("llama", layers=1)
    graph = trace(str(checkpoint), task="forward")
    assert [p.name for p in graph.inputs] == ["input_ids", "attention_mask"]
    assert relative_error(graph(**inputs)["logits"], run(module, inputs)["logits"]) < 1e-5
    assert graph.fingerprint(weights=True) == trace(module, graph.example).fingerprint(weights=True)
    json.dumps(graph.source.config)
    assert graph.source.output_class == "CausalLMOutputWithPast"


def test_a_truncated_file(copied: Path) -> None:
    file = copied / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(TraceError, match=r"model\.safetensors is truncated"):
        trace(copied)


def _reconfigured(folder: Path, **changes: Any) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


def test_weights_of_other_shapes_are_named(copied: Path) -> None:
    with pytest.raises(TraceError, match=r"3 weights have other shapes .*down_proj\.weight is \[\d+, \d+\], needed \[\d+, 8\]"):
        trace(_reconfigured(copied, intermediate_size=8))


def test_weights_that_the_model_has_no_place_for_are_noted(copied: Path) -> None:
    module: Any = tiny("llama", layers=2)[0]
    module.save_pretrained(copied)
    loaded = load_source(_reconfigured(copied, num_hidden_layers=1))
    assert any("9 weights of the checkpoint have no place" in n and "layers.1.input_layernorm" in n for n in loaded.notes)


def test_a_corrupt_file(copied: Path) -> None:
    (copied / "model.safetensors").write_bytes(b"\x00" * 50)
    with pytest.raises(TraceError, match=r"model\.safetensors is truncated or not safetensors"):
        trace(copied)


def test_a_git_lfs_pointer(copied: Path) -> None:
    (copied / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(TraceError, match="git lfs pull"):
        trace(copied)


def test_no_weights_and_no_config(copied: Path, tmp_path: Path) -> None:
    (copied / "model.safetensors").unlink()
    with pytest.raises(TraceError, match="holds no weights"):
        trace(copied)
    (tmp_path / "empty").mkdir()
    with pytest.raises(TraceError, match=r"no config\.json"):
        trace(tmp_path / "empty")
    for name, reason in (("surgeon.json", "holds an artefact.*give the model"), ("graph.json", "surgeon.load_graph reads it")):
        (tmp_path / "empty" / name).write_text("{}")  # a saved graph has both
        with pytest.raises(TraceError, match=reason):
            trace(tmp_path / "empty")
    (copied / "config.json").write_text("{")
    with pytest.raises(TraceError, match=r"config\.json is not JSON"):
        trace(copied)


def test_a_missing_shard(copied: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(copied / "model.safetensors")
    names = sorted(tensors)
    shards = {"a.safetensors": names[:3], "b.safetensors": names[3:]}
    for shard, held in shards.items():
        save_file({name: tensors[name] for name in held}, copied / shard, metadata={"format": "pt"})
    weight_map = {name: shard for shard, held in shards.items() for name in held}
    (copied / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (copied / "model.safetensors").unlink()
    assert trace(copied).parameter_count() == sum(t.numel() for t in tensors.values())
    save_file({name: tensors[name] for name in names[3:-1]}, copied / "b.safetensors", metadata={"format": "pt"})
    with pytest.raises(TraceError, match=rf"b\.safetensors lacks {names[-1]}"):
        trace(copied)
    (copied / "b.safetensors").unlink()
    with pytest.raises(TraceError, match=r"b\.safetensors is missing"):
        trace(copied)


def test_a_pickle_is_refused(copied: Path) -> None:
    (copied / "model.safetensors").rename(copied / "pytorch_model.bin")
    with pytest.raises(TraceError, match=r"pytorch_model\.bin is a pickle.*save_pretrained"):
        trace(copied)
    with pytest.raises(TraceError, match=r"is a file.*pickle"):
        trace(copied / "pytorch_model.bin")


def test_missing_weights_are_listed_where_they_are_read(copied: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(copied / "model.safetensors")
    lost = "model.layers.0.mlp.down_proj.weight"
    save_file({k: v for k, v in tensors.items() if k != lost}, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TraceError, match=lost):
        trace(copied)


def test_missing_weights_that_no_output_reads_are_none_of_our_business(tmp_path: Path) -> None:
    """Without the head, a checkpoint of the body lacks nothing."""
    module: Any = tiny("llama", layers=1)[0]
    module.save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "architectures": ["LlamaModel"]}))
    assert [p.name for p in trace(tmp_path / "model").outputs] == ["last_hidden_state"]


def test_an_unknown_architecture(copied: Path) -> None:
    file = copied / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "architectures": ["NoSuchModel"]}))
    with pytest.raises(TraceError, match="NoSuchModel"):
        trace(copied)
    own = {"AutoModel": "modeling.NoSuchModel"}
    file.write_text(json.dumps({**config, "architectures": ["NoSuchModel"], "auto_map": own}))
    with pytest.raises(TraceError, match="trust_remote_code"):
        trace(copied)


@pytest.mark.parametrize("name", ["C:\\models\\mine", "https://example.com/model", "./no/such/place"])
def test_what_is_no_model_at_all(name: str) -> None:
    with pytest.raises(TraceError, match="there is no directory"):
        trace(name)


def test_a_hub_id_that_cannot_be_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(TraceError, match="neither in the local cache"):
        trace("nobody/no-such-model")


def test_a_hub_id_in_the_cache_is_found_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache's own layout: a reference names a commit, whose snapshot holds links to the files."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    commit, stored = "0" * 40, tmp_path / "models--owner--name"
    (stored / "refs").mkdir(parents=True)
    (stored / "refs" / "main").write_text(commit)
    module, inputs = tiny("gpt2", layers=1)
    module.save_pretrained(stored / "snapshots" / commit)  # type: ignore[operator]  # of the library's base class
    graph = trace("owner/name")
    assert graph.source.description == "owner/name"
    with torch.no_grad():
        torch.testing.assert_close(
            graph(**inputs)["logits"], module(**inputs, use_cache=False).logits, rtol=1e-5, atol=1e-5
        )


# -- callables --------------------------------------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module in the current directory; its name is unique, so that no test sees another's."""
    name = f"user_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(
        "import torch\n"
        "def pair():\n    return torch.nn.Linear(3, 2), {'input': torch.randn(4, 3)}\n"
        "def alone():\n    return torch.nn.Linear(3, 2)\n"
        "def number():\n    return 7\n"
        "def broken():\n    raise KeyError('oops')\n"
        "value = 3\n"
    )
    (tmp_path / f"{name}_broken.py").write_text("raise RuntimeError('at import')\n")
    monkeypatch.chdir(tmp_path)
    yield name
    for loaded in (name, f"{name}_broken"):
        sys.modules.pop(loaded, None)


def test_a_callable(package: str) -> None:
    path = list(sys.path)
    graph = trace(f"{package}:pair")
    assert graph.inputs[0].shape == ("batch", 3)
    assert graph.source.description == f"{package}:pair"
    assert trace(f"{package}:alone", {"input": torch.randn(2, 3)}).outputs[0].shape == ("batch", 2)
    assert sys.path == path


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("{0}:alone", "pass inputs="),
        ("{0}:number", "returned int"),
        ("{0}:broken", "KeyError"),
        ("{0}:value", "is a int, not a callable"),
        ("{0}:piar", "did you mean 'pair'"),
        ("{0}_none:pair", "there is no module"),
        ("{0}_broken:pair", "at import"),
    ],
)
def test_bad_callables(package: str, what: str, message: str) -> None:
    with pytest.raises(TraceError, match=message):
        trace(what.format(package))


# -- refusals ---------------------------------------------------------------------------------------------------------


class Branching(nn.Module):
    """Takes another path at long inputs, on a size that export cannot see."""

    def forward(self, x: Tensor) -> Tensor:
        return x * len(x.detach().numpy()) if not torch.compiler.is_exporting() else x * 2.0


class Fixed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.arange(6, dtype=x.dtype).reshape(3, 2)


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return x + 0 * self.calls


class Strange(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"x": x, "text": "hello"}


class Cancelling(nn.Module):
    """Loses digits where it is called, and none where it is exported; ``wrong`` is an error that no precision removes."""

    def __init__(self, wrong: float = 0.0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((4,), 1000.0))
        self.wrong = wrong

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_exporting():
            return x * (1 + self.wrong) + 0 * self.scale
        return (x + self.scale) - self.scale


def test_rounding_is_told_from_error() -> None:
    """Both differ by some 3e-5 in float32; in float64 only the error is left, and the weights are what they were."""
    inputs = {"x": torch.linspace(-1, 1, 12).reshape(3, 4)}
    model = Cancelling()
    graph = trace(model, inputs)
    assert 1e-5 < relative_error(graph(**inputs)["output"], model(**inputs).detach()) < 1e-4
    assert model.scale.dtype == torch.float32
    assert torch.equal(model.scale, torch.full((4,), 1000.0))
    assert graph.tensor("scale").data_ptr() == model.scale.data_ptr()
    with pytest.raises(TraceError, match="does not reproduce the source model at the example"):
        trace(Cancelling(5e-5), inputs)


@pytest.mark.parametrize(
    ("module", "inputs", "options", "message"),
    [
        (nn.Linear(4, 2), None, {}, "pass inputs="),
        (nn.Linear(4, 2), {}, {}, "inputs is empty"),
        (nn.Linear(4, 2), {"inptu": torch.ones(2, 4)}, {}, "did you mean 'input'"),
        (nn.Linear(4, 2), {"input": [1.0]}, {}, "must be a torch.Tensor"),
        (nn.Linear(4, 2), {"input": torch.ones(2, 5)}, {}, "fails on its example inputs"),
        (nn.Linear(4, 2), {"input": torch.ones(2, 4)}, {"task": "dream"}, "unknown task .* known: forward"),
        (nn.Linear(4, 2), {"input": torch.ones(2, 4)}, {"task": "text-generation"}, "forward takes no cache"),
        (nn.Linear(4, 2), {"input": torch.ones(2, 4)}, {"dtype": "float31"}, "did you mean 'float32'"),
        (nn.Linear(4, 2), {"input": torch.ones(2, 4)}, {"dynamic": {"x": None}}, "does not take"),
        (nn.Linear(4, 2), {"input": torch.ones(2, 4)}, {"dynamic": {"input": {2: "a"}}}, "dimensions 0 to 1, found 2"),
        (nn.Linear(4, 2), {"input": torch.ones(2, 4)}, {"dynamic": {"input": {"a": 0}}}, "dimensions 0 to 1, found 'a'"),
        (nn.Linear(4, 2), {"input": torch.ones(2, 4)}, {"dynamic": {"input": ["a"]}}, r"\[2, 4\], so that 2 names.*\['a'\]"),
        (nn.Linear(4, 2), {"input": torch.ones(2, 4)}, {"dynamic": {"input": "ab"}}, "2 names are needed.*found 'ab'"),
        (nn.Bilinear(4, 4, 2), {"input1": torch.ones(2, 4), "input2": torch.ones(3, 4)}, {}, "'batch' is 2"),
        (Fixed(), {"x": torch.ones(3, 2)}, {}, r"dimension 0 \('batch'\) of input 'x' is always 3.*dynamic="),
        (Counting(), {"x": torch.ones(3, 2)}, {}, "writes into a tensor"),
        (Strange(), {"x": torch.ones(3, 2)}, {}, "'text' is of type str"),
        (Branching(), {"x": torch.ones(2, 2)}, {}, "does not reproduce the source model at batch 3"),
        (object(), None, {}, "found object"),
    ],
)
def test_refusals(module: Any, inputs: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(TraceError, match=message):
        trace(module, inputs, **options)


def test_a_model_inside_another_keeps_its_own_form_of_attention() -> None:
    """The decoder has no fused attention; what is set on the outer configuration is set on its own too, and undone."""
    from transformers import PreTrainedModel, TrOCRConfig, VisionEncoderDecoderConfig, VisionEncoderDecoderModel, ViTConfig

    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    encoder = ViTConfig(image_size=16, patch_size=8, **size)
    decoder = TrOCRConfig(vocab_size=100, d_model=32, decoder_layers=1, decoder_attention_heads=4, decoder_ffn_dim=48)
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    torch.manual_seed(0)
    module = VisionEncoderDecoderModel(config).eval()
    inputs = {"pixel_values": torch.randn(2, 3, 16, 16), "decoder_input_ids": torch.randint(3, 90, (2, 7))}
    models = [m for m in module.modules() if isinstance(m, PreTrainedModel)]
    before = [m.config._attn_implementation for m in models]
    assert set(before) == {"eager", "sdpa"}
    expected = module(**inputs).logits.detach()
    graph = trace(module, inputs, task="forward")
    assert [m.config._attn_implementation for m in models] == before
    torch.testing.assert_close(graph(**inputs)["logits"], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(module(**inputs).logits.detach(), expected)


def test_sizes_that_torch_divides_stay_sizes() -> None:
    """A sequence padded to whole chunks, whose number is ``torch.div(length, 4, rounding_mode="trunc")``."""

    class Chunks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.up = nn.Embedding(30, 8), nn.Linear(8, 8)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.embed(F.pad(ids, (0, -ids.shape[1] % 4)))
            count: Any = torch.div(x.shape[1], 4, rounding_mode="trunc")
            chunks = self.up(x).view(x.shape[0], count, 4, 8)
            return (chunks - chunks.mean(2, keepdim=True)).flatten(1, 2)[:, : ids.shape[1]]

    torch.manual_seed(0)
    module = Chunks().eval()
    graph = trace(module, {"ids": torch.randint(0, 30, (2, 7))})
    for length in (4, 9, 17):
        ids = torch.randint(0, 30, (3, length))
        with torch.no_grad():
            assert relative_error(graph(ids=ids)["output"], module(ids)) < 1e-6
    assert torch.div(torch.tensor(7), 2, rounding_mode="trunc") == 3


def test_overlapping_chunks_of_a_tensor_that_lies_in_memory_otherwise() -> None:
    """``as_strided`` on a transposed tensor reads its memory: chunks of 4 positions that overlap by 2."""

    class Overlapping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.up(x).transpose(0, 1)  # [positions, batch, features], in memory [batch, positions, features]
            positions, batch, size = y.shape
            return y.as_strided((batch, (positions - 4) // 2 + 1, 4, size), (positions * size, 2 * size, size, 1))

    torch.manual_seed(0)
    module = Overlapping().eval()
    graph = trace(module, {"x": torch.randn(2, 8, 8)})
    x = torch.randn(3, 8, 8)
    with torch.no_grad():
        assert relative_error(graph(x=x)["output"], module(x)) < 1e-6
        assert relative_error(graph(x=x)["output"], module.up(x).unfold(1, 4, 2).transpose(2, 3)) < 1e-6


def test_a_condition_that_cannot_hold_at_these_sizes_is_taken_as_on_the_example() -> None:
    """Marked tokens have a branch that the example does not take, and that fails at its sizes; the graph says so."""

    class Marks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.up, self.extra = nn.Embedding(30, 8), nn.Linear(8, 8), nn.Linear(6, 8)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.embed(ids)
            marked = (ids > 29).flatten().any().item()
            for _ in range(2):
                x = x + self.up(x)
                if (ids >= 0).all():
                    x = x * 2
                if marked:
                    x = x + self.extra(x)
            return x

    torch.manual_seed(0)
    module = Marks().eval()
    loaded = load_source(module, {"ids": torch.randint(0, 30, (2, 7))})
    graph = trace_source(loaded)
    ids = torch.randint(0, 30, (3, 9))
    with torch.no_grad():
        assert relative_error(graph(ids=ids)["output"], module(ids)) < 1e-6
    assert sorted(note.rpartition(" is taken to be ")[2] for note in loaded.notes) == [
        "False, as on the example", "True, as on the example",
    ]  # fmt: skip
    assert all("test_trace.py:" in note for note in loaded.notes)


def test_what_torch_could_not_trace_is_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """It writes the half of a graph that it has to the standard error, also where another way of tracing follows."""
    from tests import families_moe

    trace(families_moe.library("switch"), families_moe.inputs("switch"))  # loops over the experts that have tokens
    assert "def forward" not in capsys.readouterr().err
