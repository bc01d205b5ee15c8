"""Kernels for CUDA compiled for a GPU that is not here: what the interpreter takes, the compiler may not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is for Linux")


@pytest.mark.slow
def test_kernels_compile_and_write_what_they_should(tmp_path: Path) -> None:
    """A store that torch does not see is lost, and one that it sees where there is none copies a cache at every step."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment = {**kept, "TRITON_CACHE_DIR": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-m", "tests.cuda_compiled"], capture_output=True, text=True, env=environment,
        cwd=Path(__file__).parents[1], check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    written = defaultdict(list)
    for kernel, size, names in map(json.loads, run.stdout.splitlines()):
        assert size > 0
        written[kernel].append(names)
    assert written == {
        "_routing_kernel": [["index_out", "weight_out"]] * 3,
        "_turn_kernel": [["k_out", "q_out", "v_out"]] * 2,
        "_few_rows_kernel": [["out"]] * 10,
        "_many_rows_kernel": [["out"]] * 24,
    }
