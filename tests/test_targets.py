"""``surgeon backends``: versions, devices, and what each backend refuses of a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import surgeon
from surgeon import cli, registry
from surgeon.backends.onnxruntime import OnnxRuntime
from surgeon.targets import verdicts

MODULE = """
import torch
def build():
    return torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU()), {"input": torch.randn(3, 6)}
"""


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stop:
        cli.main(list(arguments))
    return int(stop.value.code or 0), capsys.readouterr().out


def test_verdicts_are_the_backends_own(patient: Any) -> None:
    graph = patient("llama").operate({"quantize": {"scheme": "int8_dynamic", "blocks": 0}}).graph
    found = {verdict.backend: verdict for verdict in verdicts(graph)}
    assert set(found) == set(registry.backends())
    assert found["onnxruntime"].takes
    assert not found["huggingface"].takes
    assert {refusal.node for refusal in found["huggingface"].refusals} >= {"model.layers.0.mlp.down_proj.weight"}


def test_a_library_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OnnxRuntime, "requirements", classmethod(lambda cls: ("no_such_library",)))
    graph = surgeon.trace(nn.Sequential(nn.Linear(6, 5)), {"input": torch.randn(3, 6)})
    verdict = next(verdict for verdict in verdicts(graph) if verdict.backend == "onnxruntime")
    assert verdict.missing is not None
    assert "no_such_library not installed: pip install" in verdict.missing


def test_command_lists_devices_and_answers_for_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some_model.py").write_text(MODULE)
    code, out = printed(capsys, "backends", "--json")
    listed = {line["name"]: line for line in json.loads(out)}
    assert code == 0
    assert "cpu" in listed["aotinductor"]["devices"]
    assert torch.__version__ in listed["aotinductor"]["needs"]
    code, out = printed(capsys, "backends", "--for", "some_model:build", "--json", "-q")
    answers = {answer["backend"]: answer for answer in json.loads(out)}
    assert code == 0
    assert answers["onnxruntime"] == {"backend": "onnxruntime", "takes": True, "missing": None, "refusals": []}
    assert answers["huggingface"]["refusals"][0]["node"] == "model"
    assert printed(capsys, "backends", "onnxruntime", "--for", "some_model:build")[0] == 2
