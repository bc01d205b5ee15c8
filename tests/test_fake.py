"""Fake weights: the same graph and structure as with real ones, none of their memory, and no silent nonsense."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

import surgeon
from surgeon.errors import TraceError
from surgeon.fake import with_fake_weights
from surgeon.inspection import inspection
from tests.conditional import conditional
from tests.models import tiny

MODELS = Path(__file__).parents[1] / "examples" / "models"


class Residual(nn.Module):
    """x + f(x) with a tied pair of weights, a real buffer and a batch normalisation's statistics."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.up = nn.Linear(width, width, bias=False)
        self.again = nn.Linear(width, width, bias=False)
        self.again.weight = self.up.weight
        self.norm = nn.BatchNorm1d(width)
        self.register_buffer("table", torch.arange(float(width)))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.again(torch.relu(self.up(x))) * self.table)


def memory_of(weights: list[Tensor]) -> int:
    return sum(0 if isinstance(tensor, FakeTensor) else tensor.nbytes for tensor in weights)


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2", "vit"])
def test_the_graph_over_fake_weights_is_the_one_over_real_weights(name: str) -> None:
    module, inputs = tiny(name, layers=2)
    real, fake = surgeon.trace(module, inputs), surgeon.trace(module, inputs, weights="fake")
    assert fake.source.weights == "fake"
    assert real.source.weights == "real"
    assert fake.fingerprint() == real.fingerprint()
    assert fake.parameter_count() == real.parameter_count()
    shown = [inspection(graph, surgeon.discover(graph)).to_dict() for graph in (real, fake)]
    assert shown[0].pop("model") | {"weights": "fake"} == shown[1].pop("model")
    assert shown[0] == shown[1]
    assert memory_of(list(module.parameters())) > 0, "the source keeps its weights"
    assert memory_of([t for t in fake.parameters().values() if isinstance(t, nn.Parameter)]) == 0


def test_a_directory_that_holds_only_a_configuration(tmp_path: Path) -> None:
    for name in ("tiny-llama", "tiny-mixtral"):
        folder = tmp_path / name
        folder.mkdir()
        shutil.copy(MODELS / name / "config.json", folder)
        with pytest.raises(TraceError, match=r"holds no weights.*weights='fake' \(surgeon inspect --fake-weights\)"):
            surgeon.trace(folder)
        graph = surgeon.trace(folder, weights="fake", dtype="float32")
        assert graph.fingerprint() == surgeon.trace(MODELS / name, task="forward", dtype="float32").fingerprint()


def test_modules_built_under_fake_weights_keep_buffers_and_ties() -> None:
    with surgeon.fake_weights():
        module = Residual()
    assert memory_of(list(module.parameters())) == 0
    assert module.again.weight is module.up.weight
    assert torch.equal(module.get_buffer("table"), torch.arange(8.0))
    graph = surgeon.trace(module, {"x": torch.randn(3, 8)})
    assert graph.source.weights == "fake"
    real = surgeon.trace(Residual().eval(), {"x": torch.randn(3, 8)})
    assert graph.fingerprint() == real.fingerprint()
    assert not isinstance(nn.Linear(2, 2).weight, FakeTensor), "only inside"


def test_modules_on_the_meta_device_are_traced_as_fake_ones() -> None:
    with torch.device("meta"):
        module = Residual()
    graph = surgeon.trace(module, {"x": torch.randn(3, 8)})
    assert graph.source.weights == "fake"
    values = [node.meta.get("val") for node in graph.module.graph.nodes]
    assert {str(value.device) for value in values if isinstance(value, Tensor)} == {"cpu"}
    assert graph.fingerprint() == surgeon.trace(Residual(), {"x": torch.randn(3, 8)}).fingerprint()


def test_a_fake_copy_shares_buffers_and_takes_a_type() -> None:
    module = Residual()
    copy = with_fake_weights(module)
    assert copy.get_buffer("table").data_ptr() == module.get_buffer("table").data_ptr()
    assert copy.again.weight is copy.up.weight  # type: ignore[union-attr]  # submodules
    assert with_fake_weights(copy) is copy
    half = with_fake_weights(copy, torch.bfloat16)
    assert {t.dtype for t in [*half.parameters(), *half.buffers()]} == {torch.bfloat16, torch.int64}
    assert {t.dtype for t in module.parameters()} == {torch.float32}


def test_what_needs_values_is_refused_with_what_to_do() -> None:
    module, inputs = tiny("llama", layers=2)
    graph = surgeon.trace(module, inputs, weights="fake")
    reason = "LlamaForCausalLM was traced over fake weights.*needs the values.*weights='real'"
    with pytest.raises(TraceError, match=reason):
        graph(**inputs)
    with pytest.raises(TraceError, match=reason):
        graph.clone().fingerprint(weights=True)
    with pytest.raises(TraceError, match="has fake weights: a pass reads weights.*give the model with its weights"):
        surgeon.compile(with_fake_weights(module), [{"drop_blocks": {"count": 1}}], inputs=inputs)
    with pytest.raises(TraceError, match="unknown weights 'none'.*real"):
        surgeon.trace(module, inputs, weights="none")


@pytest.mark.parametrize("name", ["llama", "bart"])
def test_caches_of_a_model_without_values(name: str) -> None:
    """What is cached is found out on shapes alone; positions are an input then, since what they are by default is not."""
    module = tiny("llama", layers=2)[0] if name == "llama" else conditional(name)
    real = surgeon.trace(module, task="text-generation")
    fake = surgeon.trace(module, task="text-generation", weights="fake")
    assert fake.source.task == "text-generation"
    assert fake.fingerprint() == real.fingerprint()
    ports, wanted = ([(p.name, p.shape) for p in (*graph.inputs, *graph.outputs)] for graph in (fake, real))
    assert ports == wanted
    assert len(surgeon.discover(fake).blocks) == len(surgeon.discover(real).blocks)


class RunningSum(nn.Module):
    """Mixes positions without softmax attention, so that whether it does is measured."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(16, 8)
        self.spread = nn.Linear(8, width, dtype=torch.bfloat16)
        self.gather = nn.Linear(width, 8, dtype=torch.bfloat16)

    def forward(self, ids: Tensor) -> Tensor:
        x: Tensor = self.table(ids).bfloat16()
        return x + self.gather(self.spread(x).cumsum(1))


@pytest.mark.parametrize("width", [32, 2**26])
def test_weights_that_would_fill_the_memory_are_not_drawn(width: int) -> None:
    with surgeon.fake_weights():
        module = RunningSum(width)
    (block,) = surgeon.discover(surgeon.trace(module, {"ids": torch.randint(0, 16, (2, 5))})).blocks
    (region,) = block.regions
    assert region.reason is not None
    if width == 32:
        assert region.kind == "mixer"
    else:
        assert "could not be measured: it reads 1,140,850,696 weights that are not in memory" in region.reason


def test_inspect_says_that_nothing_was_compared(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from surgeon import cli

    shutil.copy(MODELS / "tiny-llama" / "config.json", tmp_path)
    page = tmp_path / "page.html"
    with pytest.raises(SystemExit) as stop:
        cli.main(["inspect", str(tmp_path), "--fake-weights", "--html", str(page)])
    assert not stop.value.code
    said = "traced over fake weights"
    assert said in capsys.readouterr().out
    assert said in page.read_text()
