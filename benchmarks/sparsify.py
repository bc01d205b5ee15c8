"""How much zeros among the weights lose on trained models, by how they are chosen.

    python benchmarks/sparsify.py
    python benchmarks/sparsify.py --only "*2:4*" "*: dense"

Cross entropy of held-out text, nats per token: 64 windows of 128 tokens; 32 others to calibrate.  All linears and experts of
the blocks, routers apart, lose the same share unless an allocation is named, and nothing is trained afterwards; ``random`` is
the mean of three lots.
``int4`` rows go on with 4-bit weights in groups of 32, whose zeros stay zeros.  Writes ``benchmarks/results/sparsify.json``
(with the share of zeros that was reached) and ``sparsify.md``.
"""

from __future__ import annotations

import statistics
from typing import Any

from _trained import Judge, changed_by, tabulate_rises

from surgeon.data import Data
from surgeon.discovery import discover
from surgeon.graph import Graph

SHARES: dict[str, dict[str, Any]] = {
    "30 %": {"sparsity": 0.3},
    "50 %": {"sparsity": 0.5},
    "70 %": {"sparsity": 0.7},
    "4:8": {"pattern": "4:8"},
    "2:4": {"pattern": "2:4"},
}
CRITERIA: dict[str, dict[str, Any]] = {
    "sparsegpt": {},
    "sparsegpt, allocation: loss": {"allocation": "loss"},
    "sparsegpt, allocation: owl": {"allocation": "owl"},
    "wanda": {"criterion": "wanda"},
    "wanda, allocation: loss": {"criterion": "wanda", "allocation": "loss"},
    "wanda, allocation: owl": {"criterion": "wanda", "allocation": "owl"},
    "wanda, compare: matrix": {"criterion": "wanda", "compare": "matrix"},
    "magnitude": {"criterion": "magnitude"},
    "magnitude, compare: row": {"criterion": "magnitude", "compare": "row"},
    "random": {"criterion": "random"},
}
INT4 = {"scheme": "int4", "blocks": ":"}
QUANTIZED: dict[str, list[dict[str, Any]]] = {
    "nearest": [{"quantize": INT4}],
    "gptq": [{"quantize": {**INT4, "algorithm": "gptq"}}],
    "sparsegpt 2:4, nearest": [{"sparsify": {"pattern": "2:4"}}, {"quantize": INT4}],
    "sparsegpt 2:4, gptq": [{"sparsify": {"pattern": "2:4"}}, {"quantize": {**INT4, "algorithm": "gptq"}}],
}


def rows_of() -> dict[str, list[list[dict[str, Any]]]]:
    """Passes by row; of lots several, whose mean counts."""
    found: dict[str, list[list[dict[str, Any]]]] = {"dense": [[]]}
    for share, amount in SHARES.items():
        for name, fields in CRITERIA.items():
            if {"compare", "allocation"} & set(fields) and "pattern" in amount:
                continue
            seeds: list[dict[str, Any]] = [{"seed": seed} for seed in range(3)] if name == "random" else [{}]
            found[f"{share}: {name}"] = [[{"sparsify": {**amount, **fields, **seed}}] for seed in seeds]
    return found | {f"int4: {name}": [steps] for name, steps in QUANTIZED.items()}


def zeros(graph: Graph) -> float:
    """Share of zeros in the weights of linears and experts of the blocks, where they are stored as numbers."""
    structure = discover(graph)
    names = {site.part.weight for site in structure.linears if site.block is not None and not site.name.endswith(".router")}
    names |= {name for site in structure.moes() for name in (site.part.w_in, site.part.w_out)}
    tensors = [graph.tensor(name) for name in names]
    return sum(int((tensor == 0).sum()) for tensor in tensors) / sum(tensor.numel() for tensor in tensors)


def measured(row: str, source: Graph, data: Data, judge: Judge) -> dict[str, float]:
    losses, share = [], 0.0
    for steps in rows_of()[row]:
        graph = source
        for step in steps:
            graph = changed_by(step, graph, data)
            share = zeros(graph) if "sparsify" in step else share
        losses.append(judge(graph))
    return {"loss": statistics.mean(losses), "zeros": share}


if __name__ == "__main__":
    titles = ("What zeros among the weights lose", "and by how much it rises")
    tabulate_rises("sparsify", __doc__, titles, ("zeros", "criterion"), list(rows_of()), measured)
