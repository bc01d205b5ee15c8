"""Seconds and memory to trace and to discover models of real size on fake weights, by depth.

A decoder of width 4096 with 8, 16, 32 and 64 blocks, the 7B-shaped one of 32 blocks among them, and a mixture of 8 experts
of width 14336 in 32 blocks, all in bfloat16.  Each runs in a process of its own: its peak is its own, imports included.
Targets: trace and discover of either together in under 60 s and under 3 GiB on two cores, and work that grows linearly
with depth: seconds per block that do not grow.  On a busy machine, the processor's seconds tell more than the clock's.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "scale.json"
DEPTHS = (8, 16, 32, 64)
DENSE = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008,
    "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000, "dtype": "bfloat16",
}  # fmt: skip
EXPERTS = {
    "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336,
    "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2,
    "vocab_size": 32000, "dtype": "bfloat16",
}  # fmt: skip


def timed(function: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    clock, processor = time.perf_counter(), time.process_time()
    result = function()
    return result, {
        "seconds": round(time.perf_counter() - clock, 2),
        "cpu_seconds": round(time.process_time() - processor, 2),
    }


def measure(folder: str) -> None:
    """Child process: trace and discover, and print what it took."""
    import torch

    import surgeon

    torch.set_num_threads(2)
    graph, trace = timed(lambda: surgeon.trace(folder, weights="fake"))
    structure, discover = timed(lambda: surgeon.discover(graph))
    copy, clone = timed(graph.clone)
    print(
        json.dumps(
            {
                "blocks": len(structure.blocks),
                "kind": structure.blocks[-1].kind,
                "parameters": graph.parameter_count(),
                "unrecognised": len(structure.unrecognised),
                "nodes": len(copy.module.graph.nodes),
                "trace": trace,
                "discover": discover,
                "clone": clone,
                "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            }
        )
    )


def run(name: str, config: dict[str, Any], blocks: int, folder: Path) -> dict[str, Any]:
    target = folder / f"{name}-{blocks}"
    target.mkdir()
    (target / "config.json").write_text(json.dumps({**config, "num_hidden_layers": blocks}))
    child = subprocess.run([sys.executable, __file__, str(target)], check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    if found["blocks"] != blocks or found["unrecognised"]:
        raise SystemExit(f"{name}: found {found['blocks']} blocks of {blocks}, {found['unrecognised']} weights unrecognised")
    both = {key: found["trace"][key] + found["discover"][key] for key in ("seconds", "cpu_seconds")}
    print(
        f"{name:8}{blocks:7}{found['parameters'] / 1e9:9.1f} G{found['nodes']:8}{found['trace']['seconds']:10.1f}"
        f"{found['discover']['seconds']:10.2f}{both['cpu_seconds']:10.1f}{1000 * both['cpu_seconds'] / blocks:12.0f}"
        f"{found['peak_bytes'] / 2**30:10.2f}",
        flush=True,
    )
    return {"model": name, **found}


def main() -> None:
    if len(sys.argv) == 2:
        measure(sys.argv[1])
        return
    import tempfile

    print(f"{'model':8}{'blocks':>7}{'weights':>11}{'nodes':>8}{'trace s':>10}{'discover s':>10}{'cpu s':>10}", end="")
    print(f"{'cpu ms/block':>12}{'peak GiB':>10}")
    with tempfile.TemporaryDirectory() as name:
        rows = [run("dense", DENSE, blocks, Path(name)) for blocks in DEPTHS]
        rows.append(run("experts", EXPERTS, 32, Path(name)))
    versions = {library: importlib.metadata.version(library) for library in ("torch", "transformers")}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(
        json.dumps(
            {
                "python": platform.python_version(),
                **versions,
                "cores": os.cpu_count(),
                "load_average": round(os.getloadavg()[0], 1),
                "rows": rows,
            },
            indent=2,
        )
        + "\n"
    )


if __name__ == "__main__":
    main()
