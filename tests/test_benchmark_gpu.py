"""``benchmarks/gpu.py``: says so without a GPU, and counts the bytes of its floor right."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


def module(name: str) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPT.parent))
        return importlib.import_module(name)


@pytest.fixture(scope="module")
def gpu() -> Any:
    return module("gpu")


@pytest.fixture(scope="module")
def floor() -> Any:
    return module("_gpu_floor")


@pytest.fixture(scope="module")
def models() -> Any:
    return module("_gpu_models")


@pytest.fixture(scope="module")
def report() -> Any:
    return module("_gpu_report")


@pytest.mark.parametrize("name", ["gpu.py", "gpu_kernels.py", "device.py"])
def test_without_a_gpu_it_says_so_and_exits_with_3(name: str) -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    script = SCRIPT.with_name(name)
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment)
    assert run.returncode == 3, run.stderr
    assert "no CUDA device is here; nothing was measured" in run.stdout


@pytest.mark.parametrize("script", sorted(SCRIPT.parent.glob("*.py")), ids=lambda script: script.stem)
def test_what_a_benchmark_imports_is_there(script: Path) -> None:
    """Within functions too, which run on other machines only."""
    imports = [node for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))) if isinstance(node, ast.ImportFrom)]
    for node in imports:
        if node.module is None or not node.module.startswith("surgeon"):
            continue
        if node.module.rpartition(".")[2].startswith("_cuda"):
            pytest.importorskip(node.module, reason="Triton is for Linux")
        source = importlib.import_module(node.module)
        for name in (alias.name for alias in node.names):
            package = hasattr(source, "__path__") and importlib.util.find_spec(f"{node.module}.{name}") is not None
            assert hasattr(source, name) or package, f"{script.name}:{node.lineno}: {node.module} has no {name}"


def test_all_weights_are_those_of_the_model(gpu: Any, models: Any, floor: Any) -> None:
    shape = gpu.TINY
    model = models.model_of(shape, shape.layers, shape.experts, "cpu")
    norms = sum(p.nbytes for name, p in model.named_parameters() if "norm" in name)
    held = sum(p.nbytes for p in model.parameters()) - model.model.embed_tokens.weight.nbytes - norms
    assert floor.weight_bytes(shape, "whole", shape.experts) == held
    ids = torch.arange(6)[None]
    with torch.no_grad():
        assert bool(model(input_ids=ids).logits.isfinite().all())  # nothing of it was left uninitialised


def test_wrong_logits_have_no_time(floor: Any, report: Any) -> None:
    assert report.wrong_cells(floor.Shape(), []) == {}
    assert report.wrong_cells(floor.Shape(), [0.0, 0.06]) == {}
    wrong = report.wrong_cells(floor.Shape(), [0.02, 0.4])
    assert [cell.phase for cell in wrong] == ["prefill"]
    assert "those of 40% of the tokens differ from the graph's" in next(iter(wrong.values()))
    assert [cell.batch for cell in report.wrong_cells(floor.Shape(), [1.0, 0.0])] == [1, 16]


def test_a_token_is_wrong_by_its_own_logits(report: Any) -> None:
    wanted = torch.randn(2, 8, 50, generator=torch.Generator().manual_seed(0))
    found = wanted + 0.01 * wanted.flip(-1)
    assert report.wrong_tokens(found, wanted) == 0.0
    found[0, :3] = wanted[1, :3]  # other tokens', as where another expert was chosen
    found[1, 0, 7] = torch.nan
    assert report.wrong_tokens(found, wanted) == pytest.approx(4 / 16)


def test_experts_hit_agree_with_drawing(floor: Any) -> None:
    shape = floor.Shape()
    assert floor.experts_hit(shape, "whole", 1) == pytest.approx(2)
    assert floor.experts_hit(shape, "whole", 16) == pytest.approx(8 * (1 - 0.75**16))
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([torch.randperm(8, generator=generator)[:2] for _ in range(3 * 2000)]).reshape(2000, 6)
    groups = torch.stack([torch.bincount(row // 2, minlength=4) > 0 for row in drawn]).sum(1).float().mean()
    assert floor.experts_hit(shape, "merged", 3) == pytest.approx(float(groups), rel=0.02)


def test_floor_of_one_layer_by_hand(floor: Any) -> None:
    shape = floor.Shape(layers=1)
    cell = floor.Cell("decode", 1, 2048)
    attention = 4096 * (4096 + 1024 + 1024 + 4096)
    weights = attention + 2 * 3 * 4096 * 14336 + 8 * 4096 + 4096 * 32000
    assert floor.floor_bytes(shape, "whole", cell) == 2 * weights + 2 * 2 * 2048 * 1024
    assert floor.layers_and_experts(floor.Shape(), "dropped int4") == (3, 8)
    assert floor.layers_and_experts(floor.Shape(), "merged") == (4, 4)


def test_a_figure_that_is_missing_meets_no_target(report: Any) -> None:
    fast, slow = [{"tokens_per_second": 9.0}] * 3, [{"tokens_per_second": 1.0}] * 3
    cells = {
        "whole": {"eager": {"cells": slow, "bytes": 100}, "torch.compile": {"cells": slow}, "aotinductor": {"cells": fast}},
        "dropped int4": {"onnxruntime": {"cells": fast, "bytes": 22}, "torch.compile": {"cells": []}},
    }
    text = "\n".join(report.judged({"cells": cells}))
    assert "whole, decode b1: 9.00x torch.compile, needed more than 1: met" in text
    assert "dropped int4, decode b1: not measured against torch.compile" in text
    assert "dropped int4 on onnxruntime: 9.00x eager, 22.0% of its bytes, needed 6.05x and 23%: met" in text
