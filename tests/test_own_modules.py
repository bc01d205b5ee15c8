"""Modules as people write and wrap them: computed weights, loops over experts, modes of the caller, outputs in classes."""

from __future__ import annotations

import copy
import dataclasses
import errno
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import surgeon
from surgeon.errors import RecipeError
from surgeon.output import staged

WIDTH, INNER, EXPERTS, TOP_K = 32, 48, 4, 2
PASSES = [{"drop_neurons": {"ratio": 0.25, "criterion": "random", "refit": False}}]


class Network(nn.Module):
    """Two residual feed-forward networks behind norms."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.networks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, INNER), nn.GELU(), nn.Linear(INNER, WIDTH)) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        for norm, network in zip(self.norms, self.networks, strict=True):
            x = x + network(norm(x))
        return x


class Adapter(nn.Module):
    """W + B A / 2."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(4, columns)), nn.Parameter(torch.randn(rows, 4))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.b @ self.a / 2


def example() -> dict[str, Tensor]:
    return {"x": torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(1))}


def network(change: Callable[[nn.Module], Any] = lambda _: None) -> nn.Module:
    torch.manual_seed(0)
    module = Network().eval()
    for part in module.networks:
        change(part[0])  # type: ignore[index]  # a Sequential
    return module


REPARAMETRISED: dict[str, Callable[[nn.Module], Any]] = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "adapter": lambda layer: parametrize.register_parametrization(layer, "weight", Adapter(INNER, WIDTH)),
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
    "pruned bias": lambda layer: prune.l1_unstructured(layer, "bias", 0.3),
}


@pytest.mark.parametrize("kind", REPARAMETRISED)
def test_a_weight_that_is_computed_is_a_weight(kind: str) -> None:
    module = network(REPARAMETRISED[kind])
    before = copy.deepcopy(module.state_dict())
    graph = surgeon.trace(module, example())
    names = {f"networks.{n}.{layer}.{part}" for n in range(2) for layer in (0, 2) for part in ("weight", "bias")}
    assert {name for name in graph.parameters() if "networks" in name} == names  # as in the module without it
    with torch.no_grad():
        layer = module.networks[0][0]  # type: ignore[index]  # a Sequential
        layer(example()["x"])  # hooks compute the weight
        torch.testing.assert_close(graph.parameters()["networks.0.0.weight"], layer.weight, rtol=0, atol=1e-6)
    assert all(isinstance(tensor, nn.Parameter) and tensor.requires_grad for tensor in graph.parameters().values())
    assert [ffn.name for ffn in surgeon.discover(graph).ffns()] == ["blocks.0.ffn", "blocks.1.ffn"]
    result = surgeon.compile(module, PASSES, inputs=example(), backend=None, progress=False)
    assert result.report.parameters[0] - result.report.parameters[1] == 2 * 8 * (2 * WIDTH + 1)  # 48 -> 40, a multiple of 8
    assert all(torch.equal(module.state_dict()[name], tensor) for name, tensor in before.items())


def test_a_frozen_weight_stays_frozen_when_it_is_computed() -> None:
    module = network(parametrizations.weight_norm).requires_grad_(False)
    assert not any(tensor.requires_grad for tensor in surgeon.trace(module, example()).parameters().values())


def test_a_weight_that_is_computed_has_a_shape_without_values_too() -> None:
    with surgeon.fake_weights():
        module = network(parametrizations.weight_norm)
    graph = surgeon.trace(module, example())
    assert graph.parameters()["networks.0.0.weight"].shape == (INNER, WIDTH)
    assert len(list(surgeon.discover(graph).ffns())) == 2


def test_rows_of_one_weight_stay_one_weight() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ParameterList(torch.randn(WIDTH, WIDTH) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return x + F.linear(F.linear(x, torch.cat([*self.parts])).relu(), torch.cat([*self.parts], 0).T)

    assert set(surgeon.trace(Packed(), example()).parameters()) == {"parts.0", "parts.1"}  # nothing was computed


@pytest.mark.parametrize("kind", ["pruned", "pruned bias"])
def test_a_weight_that_a_hook_computes_can_be_converted(kind: str) -> None:
    module = network(REPARAMETRISED[kind])
    graph = surgeon.trace(module, example(), dtype="float64")
    expected = copy.deepcopy(network(REPARAMETRISED[kind]).state_dict())
    assert graph.parameters()["networks.0.0.weight"].dtype == torch.float64
    assert all(torch.equal(module.state_dict()[name], tensor) for name, tensor in expected.items())
    assert surgeon.trace(module, example(), weights="fake").source.weights == "fake"


# -- loops over experts -----------------------------------------------------------------------------------------------


def rows_of(kind: str, index: Tensor, expert: int) -> tuple[Tensor, Tensor] | None:
    """Tokens of an expert and which of their choices it is; None to leave it out."""
    hits = index == expert
    rows, places = torch.where(hits)
    empty = {
        "len": lambda: len(rows) == 0,
        "not len": lambda: not len(rows),
        "sum": lambda: hits.sum() == 0,
        "int of a sum": lambda: int(hits.sum()) == 0,
        "less": lambda: hits.count_nonzero() < 1,
        "logical not": lambda: torch.logical_not(hits.sum() > 0),
        "not any": lambda: not hits.any(),
    }[kind]()
    return None if empty else (rows, places)


class Experts(nn.Module):
    """A mixture that loops over its experts, and over those alone that have tokens where ``kind`` is a unique one."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, INNER), nn.ReLU(), nn.Linear(INNER, WIDTH)) for _ in range(EXPERTS)
        )

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        weight, index = self.router(tokens).softmax(-1).topk(TOP_K, -1)
        result = torch.zeros_like(tokens)
        every: Any = range(EXPERTS)
        if self.kind.startswith("unique"):
            every = index.unique() if self.kind == "unique" else torch.unique(index.flatten()).tolist()
        for expert in every:
            found = torch.where(index == expert) if self.kind.startswith("unique") else rows_of(self.kind, index, expert)
            if found is not None:
                rows, places = found
                result.index_add_(0, rows, self.experts[int(expert)](tokens[rows]) * weight[rows, places, None])
        return result.reshape(x.shape)


class Mixtures(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.mixtures = nn.ModuleList(Experts(kind) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for norm, mixture in zip(self.norms, self.mixtures, strict=True):
            x = x + mixture(norm(x))
        return x


@pytest.mark.parametrize(
    "kind", ["len", "not len", "sum", "int of a sum", "less", "logical not", "not any", "unique", "unique list"]
)
def test_loops_over_experts_that_ask_python_which_have_tokens(kind: str) -> None:
    torch.manual_seed(0)
    graph = surgeon.trace(Mixtures(kind).eval(), example())  # which compares it with the model at other sizes
    found = [moe.part for moe in surgeon.discover(graph).moes()]
    assert [(moe.experts, moe.top_k) for moe in found] == [(EXPERTS, TOP_K)] * 2


# -- what the caller has switched on, and what a model returns ---------------------------------------------------------


def test_a_module_made_in_inference_mode_is_taken_as_any_other() -> None:
    with torch.inference_mode():
        module, inputs = network(), example()
    result = surgeon.compile(module, PASSES, inputs=inputs, backend=None, progress=False)
    expected = surgeon.compile(network(), PASSES, inputs=example(), backend=None, progress=False)
    assert torch.equal(result(**example())["output"], expected(**example())["output"])
    result(**example())["output"].sum().backward()
    assert all(tensor.grad is not None for tensor in result.graph.parameters().values())  # type: ignore[union-attr]  # built


@pytest.mark.parametrize("mode", ["autocast", "inference_mode", "no_grad"])
def test_modes_of_the_caller_end_where_the_build_begins(mode: str) -> None:
    switched = {
        "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        "inference_mode": torch.inference_mode,
        "no_grad": torch.no_grad,
    }[mode]
    passes = [{"low_rank": {"ratio": 0.5}}, {"quantize": {"scheme": "mixed", "bits": 4}}]  # least squares and derivatives
    batches = [{"x": torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(n))} for n in range(4)]
    expected = surgeon.compile(network(), passes, inputs=example(), calibration=batches, backend=None, progress=False)
    with switched():
        result = surgeon.compile(network(), passes, inputs=example(), calibration=batches, backend=None, progress=False)
        graph = surgeon.trace(network(), example())
    assert result.plan == expected.plan
    assert torch.equal(result(**example())["output"], expected(**example())["output"])
    assert torch.equal(graph(**example())["output"], surgeon.trace(network(), example())(**example())["output"])


@dataclasses.dataclass
class Answer:
    """What a model may return."""

    hidden: Tensor
    pooled: Tensor
    loss: Tensor | None = None


def test_fields_of_a_dataclass_are_outputs() -> None:
    class Answering(Network):
        def forward(self, x: Tensor) -> Answer:  # type: ignore[override]  # another class of output
            hidden = super().forward(x)
            return Answer(hidden, hidden.mean(1))

    module = Answering().eval()
    found = surgeon.trace(module, example())(**example())
    expected = module(**example())
    assert list(found) == ["hidden", "pooled"]
    torch.testing.assert_close(found["pooled"], expected.pooled, rtol=0, atol=1e-6)


# -- refusals that name what is wrong ----------------------------------------------------------------------------------


@pytest.mark.parametrize("passes", [[], [{"quantize": {"scheme": "int8"}}]])
def test_a_model_in_double_precision_is_refused_by_name_before_it_is_lowered(passes: list[dict[str, Any]]) -> None:
    pytest.importorskip("onnxruntime")
    inputs = {name: tensor.double() for name, tensor in example().items()}
    with pytest.raises(surgeon.SurgeonError, match=r"refuses this model:\s.*torch.float64 has no kernels.*float32"):
        surgeon.compile(network().double(), passes, inputs=inputs, progress=False)
    assert surgeon.compile(network().double(), passes, inputs=inputs, dtype="float32", progress=False).artifact is not None


def test_an_empty_list_of_names_is_refused_and_not_taken_for_all() -> None:
    with pytest.raises(surgeon.SurgeonError, match="names: found .*no pattern selects nothing"):
        surgeon.compile(network(), [{"quantize": {"scheme": "int8", "names": []}}], inputs=example(), backend=None)


@pytest.mark.parametrize(
    "failure",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),  # of Python, once a file is open
        RuntimeError("I/O error: No space left on device (os error 28)"),  # of a library that writes by itself
    ],
)
def test_a_full_disk_is_named_with_the_output(tmp_path: Path, failure: Exception) -> None:
    target = tmp_path / "built"
    with pytest.raises(RecipeError, match=rf"output: no space is left on the disk of {re.escape(str(target))}"), staged(target):
        raise failure
    assert list(tmp_path.iterdir()) == []
