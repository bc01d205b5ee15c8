"""Pairs of weight exactly 0: left out by the eager operator and by the sorted form, and nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from surgeon.backends.onnxruntime import OnnxRuntime
from surgeon.data import synthetic_batches
from surgeon.errors import RewriteError
from surgeon.ops import mixture, moe, moe_dense
from surgeon.verify import relative_error
from tests.test_moefy import MakePatient, moefy


def arguments(k: int = 3, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    index = torch.stack([torch.randperm(5, generator=generator)[:k] for _ in range(11)])
    weight = normal(11, k) * (torch.rand(11, k, generator=generator) < 0.6)
    weight[4] = 0  # a token that uses no expert
    return {
        "x": normal(11, 6), "index": index, "weight": weight, "w_in": normal(5, 8, 6), "w_out": normal(5, 6, 4),
        "b_in": normal(5, 8), "b_out": normal(5, 6), "activation": "silu",
    }  # fmt: skip


def test_skipping_changes_nothing() -> None:
    given = arguments()
    torch.testing.assert_close(moe(**given), moe_dense(**given))
    assert not moe(**given)[4].any()
    given["weight"] = torch.zeros_like(given["weight"])
    assert not moe(**given).any()


def test_skipped_pairs_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    given, rows = arguments(), []
    original = mixture.grouped_linear
    monkeypatch.setattr(mixture, "grouped_linear", lambda x, *rest: rows.append(x.shape[0]) or original(x, *rest))
    moe(**given)
    assert rows == [int((given["weight"] != 0).sum())] * 2


def test_gradients_of_skipped_weights_are_whole() -> None:
    """The derivative by a weight of 0 is the expert's output, which training needs to bring it back."""
    given = arguments()
    given["weight"].requires_grad_()
    (found,) = torch.autograd.grad(moe(**given).square().sum(), given["weight"])
    (wanted,) = torch.autograd.grad(moe_dense(**given).square().sum(), given["weight"])
    torch.testing.assert_close(found, wanted)


def test_wrong_experts_are_refused_whatever_they_weigh() -> None:
    given = arguments()
    given["index"][4, 0] = 7
    with pytest.raises(RewriteError, match="0 to 7, the weights hold 5"):
        moe(**given)


def test_the_artefact_skips(patient: MakePatient, tmp_path: Path) -> None:
    """Dynamic selection lowers to tokens sorted by expert, where those of weight 0 are in nobody's piece."""
    subject = patient("llama")
    split = moefy(subject, experts=8, select="dynamic_k", threshold=0.7, shared=2, target="norm")
    artifact = OnnxRuntime().lower(split.graph, tmp_path)
    for batch in synthetic_batches(split.graph):
        with torch.no_grad():
            wanted = split.graph(**batch)
        for name, value in artifact.run(batch).items():
            assert relative_error(value, wanted[name]) < 1e-5
    model = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    operators = [node.op_type for node in model.graph.node]
    assert "MoE" not in operators
    pieces = [len(node.output) for node in model.graph.node if node.op_type == "Split" and len(node.output) > 3]
    assert pieces == [6 + 1] * 3
