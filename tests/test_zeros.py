"""A report says where a pass fills in the zeros that one before it made, and is silent where they stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import surgeon
from surgeon.discovery import discover
from surgeon.zeros import count_zeros
from tests.conftest import Patient
from tests.models import inputs_for

MakePatient = Callable[[str], Patient]
SPARSE = {"sparsify": {"pattern": "2:4", "criterion": "magnitude"}}


def notes(
    subject: Patient, step: dict[str, Any], first: dict[str, Any] = SPARSE
) -> tuple[list[str], surgeon.Compiled]:
    """What the report of a second pass says of zeros, and what came of it."""
    batches = [inputs_for("llama", 4, 16, seed=seed) for seed in range(2)]
    built = surgeon.compile(subject.graph, [first, step], calibration=batches, backend=None, progress=False)
    return [note for note in built.report.passes[1].notes if note.startswith("zeros")], built


@pytest.mark.parametrize(
    ("model", "step"),
    [
        ("llama", {"low_rank": {"ratio": 0.7}}),
        ("llama", {"drop_channels": {"ratio": 0.25}}),
        ("llama", {"drop_neurons": {"ratio": 0.25}}),
        ("llama", {"moefy_ffn": {"experts": 4, "top_k": 2}}),
        ("mixtral", {"merge_experts": {"groups": 2}}),
        ("mixtral", {"densify_moe": {}}),
    ],
)
def test_a_pass_that_fills_zeros_in_says_so(model: str, step: dict[str, Any], patient: MakePatient) -> None:
    said, built = notes(patient(model), step)
    assert built.graph is not None
    matrices = count_zeros(built.graph, discover(built.graph)).matrices
    share = sum(matrix.zeros for matrix in matrices.values()) / sum(matrix.weights for matrix in matrices.values())
    (note,) = said
    assert f"{100 * share:.1f} % now" in note
    assert f"and {sum(matrix.two_of_four for matrix in matrices.values())} of {len(matrices)} now" in note
    assert "sparsify comes behind it" in note


@pytest.mark.parametrize(
    ("model", "step"),
    [
        ("llama", {"drop_blocks": {"count": 1}}),
        ("llama", {"drop_neurons": {"ratio": 0.25, "refit": False}}),
        ("llama", {"upcycle_ffn": {"experts": 4, "top_k": 2}}),
        ("llama", {"quantize": {"scheme": "int8", "names": "*.ffn.*"}}),
        ("llama", SPARSE),
        ("mixtral", {"drop_experts": {"keep": 2}}),
    ],
)
def test_a_pass_that_keeps_zeros_says_nothing(model: str, step: dict[str, Any], patient: MakePatient) -> None:
    first = {"sparsify": {"sparsity": 0.5, "criterion": "wanda"}}  # rows alike
    assert notes(patient(model), step, first)[0] == []


def test_dense_models_say_nothing(patient: MakePatient) -> None:
    assert notes(patient("llama"), {"low_rank": {"ratio": 0.7}}, {"drop_blocks": {"count": 1}})[0] == []
