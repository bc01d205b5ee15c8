"""Latency of one token against the number of experts: it follows the experts that run, not those that are there.

    python benchmarks/sparsity.py

One layer of a Mixtral-shaped model (hidden 1024, experts 768 wide) with random weights, lowered to ONNX Runtime in float32
and with 4-bit weights.  Every run feeds one token, another one each time, so that its experts have to come from memory as in
decoding (no key/value cache: attention is over that token alone).  All artefacts run in turn on one thread; a tenth of the
runs was faster than what is given (the median says more of what else the machine was doing).  ``skip_experts`` rows use the
form in which experts of weight 0 are left out; it is made of standard operators, a few for every expert there is.  Writes
``benchmarks/results/sparsity.json`` and ``sparsity.md``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from surgeon.accounting import active_parameter_count, parameter_count
from surgeon.building import compile as build
from surgeon.contract import Artifact
from surgeon.latency import rounds
from surgeon.registry import make_backend

RESULTS = Path(__file__).parent / "results"
HIDDEN, WIDTH, VOCABULARY, TOKENS = 1024, 768, 512, 64
FORMATS: dict[str, list[dict[str, Any]]] = {
    "float32": [],
    "int4": [{"quantize": {"scheme": "int4", "group": 32}}],
    "float32, skip_experts": [{"skip_experts": {"beta": 0.5}}],
    "int4, skip_experts": [{"skip_experts": {"beta": 0.5}}, {"quantize": {"scheme": "int4", "group": 32}}],
}
SHAPES = [(8, 1), (8, 2), (8, 4), (8, 8), (16, 2), (32, 2), (64, 2)]
"""Experts and experts per token."""


def model(experts: int, chosen: int) -> nn.Module:
    """One layer with random weights."""
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=WIDTH, num_hidden_layers=1, num_attention_heads=8,
        num_key_value_heads=2, num_local_experts=experts, num_experts_per_tok=chosen, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config).eval()


def artefact(experts: int, chosen: int, steps: list[dict[str, Any]]) -> tuple[Artifact, dict[str, Any]]:
    """The artefact, and the size of what it came from."""
    ids = torch.arange(12).reshape(2, 6)
    graph = build(model(experts, chosen), steps, inputs={"input_ids": ids}, backend=None, progress=False).graph
    assert graph is not None
    figures = {"parameters": parameter_count(graph), "active": active_parameter_count(graph)}
    return make_backend("onnxruntime").lower(graph, Path(tempfile.mkdtemp())), figures


def one_token(artifact: Artifact) -> Callable[[], object]:
    """A run on the next of some tokens."""
    tokens = itertools.cycle(torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(1))[:TOKENS].tolist())
    return lambda: artifact.run({"input_ids": torch.tensor([[next(tokens)]])})


def table(results: list[dict[str, Any]]) -> str:
    lines = [
        "# Latency of one token against the number of experts",
        "",
        f"Made by `python benchmarks/sparsity.py`, which says what is measured: one layer, hidden {HIDDEN}, experts {WIDTH} "
        "wide, one thread, milliseconds (first decile). *Times* is over the latency of 8 experts, top 2, in the same format.",
        "",
        "| format | experts | per token | parameters | active | ms | times |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in results:
        base = next(r["ms"] for r in results if (r["format"], r["experts"], r["chosen"]) == (row["format"], 8, 2))
        lines.append(
            f"| {row['format']} | {row['experts']} | {row['chosen']} | {row['parameters']:,} | {row['active']:,} | "
            f"{row['ms']:.2f} | {row['ms'] / base:.2f} |"
        )
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4.0, help="of measuring per artefact")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    for name, steps in FORMATS.items():
        artifacts, sizes = {}, {}
        for experts, chosen in SHAPES:
            artifacts[experts, chosen], sizes[experts, chosen] = artefact(experts, chosen, steps)
            artifacts[experts, chosen].session_threads = 1  # type: ignore[attr-defined]  # of ONNX Runtime's artefact
        runs = {f"{e} {k}": one_token(artifact) for (e, k), artifact in artifacts.items()}
        times = rounds(runs, seconds=options.seconds, minimum=50)
        for (experts, chosen), figures in sizes.items():
            ms = 1e3 * statistics.quantiles(times[f"{experts} {chosen}"], n=10)[0]
            results.append({"format": name, "experts": experts, "chosen": chosen, **figures, "ms": ms})
            print(f"{name:24}{experts:4}{chosen:4}{ms:10.3f} ms", flush=True)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "sparsity.json").write_text(json.dumps(results, indent=1))
    (RESULTS / "sparsity.md").write_text(table(results))


if __name__ == "__main__":
    main()
