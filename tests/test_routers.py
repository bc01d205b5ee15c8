"""Routers and selections as graph code against NumPy, and the graph they add against what they compute."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from surgeon.rewrite import Editor
from surgeon.routers import Choice, Router
from surgeon.tracing import trace

D, E = 6, 8


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def shares(choice: Choice, scores: torch.Tensor) -> np.ndarray:
    """Weight of every expert, [T, E]."""
    index, weight = choice.choose(scores)
    assert index.shape == weight.shape == (scores.shape[0], choice.k)
    return torch.zeros_like(scores).scatter_add(1, index, weight).numpy()


@pytest.mark.parametrize("k", [1, 3, 8])
def test_top_k(k: int) -> None:
    scores = numbers(50, E)
    found = shares(Choice("top_k", k), scores)
    for row, weight in zip(scores.numpy(), found, strict=True):
        assert set(np.flatnonzero(weight)) == set(np.argsort(-row)[:k])
        assert set(weight[weight != 0]) == {1.0}


@pytest.mark.parametrize("tau", [0.0, 0.3, 0.7, 1.0])
def test_dynamic_k_is_the_rule_of_d2dmoe(tau: float) -> None:
    """Run expert i iff r_i >= (1 - tau) max r, for predictions that are never negative."""
    scores = numbers(50, E).abs()
    found = shares(Choice("dynamic_k", E, 1 - tau), scores)
    r = scores.numpy()
    expected = r >= np.float32(1 - tau) * r.max(1, keepdims=True)
    np.testing.assert_array_equal(found, expected.astype(np.float32))
    assert expected.sum(1).min() >= 1


@pytest.mark.parametrize("share", [0.0, 0.1, 0.2, 0.9])
def test_threshold_is_a_share_of_the_sum(share: float) -> None:
    scores = numbers(50, E)
    found = shares(Choice("threshold", E, share), scores)
    r = np.maximum(scores.numpy(), 0)
    expected = r >= np.minimum(np.float32(share) * r.sum(1, keepdims=True), r.max(1, keepdims=True))
    np.testing.assert_array_equal(found, expected.astype(np.float32))


def test_a_limit_on_experts_keeps_the_largest() -> None:
    scores = numbers(50, E).abs()
    found = shares(Choice("dynamic_k", 2, 0.1), scores)
    for row, weight in zip(scores.numpy(), found, strict=True):
        assert set(np.flatnonzero(weight)) <= set(np.argsort(-row)[:2])


@pytest.mark.parametrize("kind", ["top_k", "dynamic_k", "threshold"])
def test_weights_of_count_and_softmax_add_up_to_the_factor(kind: Any) -> None:
    scores = numbers(40, E).abs()
    ones = shares(Choice(kind, 5, 0.15), scores) != 0
    for weighting in ("count", "softmax"):
        found = shares(Choice(kind, 5, 0.15, weighting, 3.0), scores)
        np.testing.assert_allclose(found.sum(1), 3.0, rtol=1e-5)
        np.testing.assert_array_equal(found != 0, ones)
    for row, weight, on in zip(scores.numpy(), found, ones, strict=True):
        e = np.exp(row[on] - row[on].max())
        np.testing.assert_allclose(weight[on], 3 * e / e.sum(), rtol=1e-5)


def routers() -> dict[str, Router]:
    layers = {"hidden.weight": numbers(5, D, seed=1), "hidden.bias": numbers(5, seed=2)}
    out = {"weight": numbers(E, 5, seed=3), "bias": numbers(E, seed=4)}
    return {
        "linear": Router({"weight": numbers(E, D), "bias": numbers(E, seed=4)}),
        "bare": Router({"weight": numbers(E, D)}),
        "unit": Router({"weight": numbers(E, D)}, unit=True),
        "mlp": Router(layers | out),
    }


@pytest.mark.parametrize("name", routers())
def test_scores(name: str) -> None:
    router, x = routers()[name], numbers(20, D, seed=9)
    t = {key: tensor.numpy() for key, tensor in router.tensors.items()}
    source = x.numpy() / np.linalg.norm(x.numpy(), axis=1, keepdims=True) if router.unit else x.numpy()
    if "hidden.weight" in t:
        source = np.maximum(source @ t["hidden.weight"].T + t["hidden.bias"], 0)
    np.testing.assert_allclose(router.scores(x).numpy(), source @ t["weight"].T + t.get("bias", 0), rtol=1e-4, atol=1e-5)
    assert router.numel() == sum(tensor.size for tensor in t.values())


class Identity(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 0.5


@pytest.mark.parametrize("name", routers())
@pytest.mark.parametrize(
    "choice", [Choice("top_k", 2, 0, "softmax", 8.0), Choice("dynamic_k", E, 0.5, "count"), Choice("threshold", 5, 0.1)]
)
def test_the_graph_computes_the_same(name: str, choice: Choice) -> None:
    x = numbers(7, D, seed=5)
    graph = trace(Identity().eval(), {"x": x}, dynamic={"x": {0: "batch"}})
    editor, router = Editor(graph), routers()[name]
    node = next(n for n in graph.module.graph.nodes if n.op == "call_function")
    with editor.after(node):
        index, weight = choice.add(editor, router.add(editor, "router", node))
        blank = editor.call(torch.ops.aten.new_zeros.default, node, [7, E])
        spread = editor.call(torch.ops.aten.scatter.src, blank, 1, index, weight)
    output = next(n for n in graph.module.graph.nodes if n.op == "output")
    output.args = ((spread,),)
    editor.finish()
    (found,) = graph.module(x)
    np.testing.assert_allclose(found.detach().numpy(), shares(choice, router.scores(x + 0.5)), rtol=1e-5, atol=1e-6)
