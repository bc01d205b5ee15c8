"""What the passes between dense networks and experts make lowers to ONNX and computes there what the graph computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from surgeon.backends.onnxruntime import OnnxRuntime
from surgeon.data import synthetic_batches
from surgeon.verify import relative_error
from tests.conftest import Patient

STEPS: dict[str, list[dict[str, Any]]] = {
    "attention and mlp router": [
        {"moefy_attention": {"top_k": 1, "shared": 2, "scaling": "softmax"}},
        {"moefy_ffn": {"experts": 4, "top_k": 2, "router": "mlp", "router_steps": 5, "router_width": 8, "scaling": "softmax"}},
    ],
    "similarity router and mean output": [
        {"moefy_ffn": {"experts": 4, "top_k": 1, "shared": 1, "router": "similarity", "scaling": "mean_output"}},
    ],
    "upcycled, one block dense again": [
        {"upcycle_ffn": {"experts": 8, "top_k": 4, "granularity": 2, "gate": "softmax_topk", "noise": 0.1}},
        {"densify_moe": {"method": "top_columns", "blocks": [1]}},
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS)
def test_the_artefact_computes_the_same(patient: Callable[[str], Patient], tmp_path: Path, name: str) -> None:
    subject = patient("gpt2")
    for step in STEPS[name]:
        subject = subject.operate(step)
    artifact = OnnxRuntime().lower(subject.graph, tmp_path)
    for batch in synthetic_batches(subject.graph):
        with torch.no_grad():
            wanted = subject.graph(**batch)
        for key, value in artifact.run(batch).items():
            assert relative_error(value, wanted[key]) < 1e-4
