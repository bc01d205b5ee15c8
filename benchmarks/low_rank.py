"""How much factoring linears loses on trained models, by method and by how parameters are shared out.

    python benchmarks/low_rank.py
    python benchmarks/low_rank.py --only "*: 60 %*"

Cross entropy of held-out text, nats per token: 64 windows of 128 tokens; 32 others to calibrate.  All linears of the blocks are
factored, experts and routers apart, and nothing is trained afterwards; the percentage is the share of their parameters that is
kept.  Writes ``benchmarks/results/low_rank.json`` (with the share of the model's parameters that is left) and ``low_rank.md``.
"""

from __future__ import annotations

from typing import Any

from _trained import Judge, changed_by, tabulate_rises

from surgeon.accounting import parameter_count
from surgeon.data import Data
from surgeon.graph import Graph

RATIOS = (0.9, 0.8, 0.6, 0.4)
FORMS: dict[str, dict[str, Any]] = {
    "svd": {"method": "svd"},
    "whitened": {},
    "whitened, allocation: loss": {"allocation": "loss"},
    "whitened, allocation: loss, multiple: 8": {"allocation": "loss", "multiple": 8},
}


def rows_of() -> dict[str, dict[str, Any] | None]:
    """The pass by row."""
    found: dict[str, dict[str, Any] | None] = {"dense": None}
    for ratio in RATIOS:
        for name, fields in FORMS.items():
            found[f"{100 * ratio:.0f} %: {name}"] = {"low_rank": {"ratio": ratio, **fields}}
    return found


def measured(row: str, source: Graph, data: Data, judge: Judge) -> dict[str, float]:
    step = rows_of()[row]
    graph = source if step is None else changed_by(step, source, data)
    return {"loss": judge(graph), "parameters": parameter_count(graph) / parameter_count(source)}


if __name__ == "__main__":
    said = "by how much it rises, and the share of the model's parameters that is left"
    titles = ("What factoring linears loses", said)
    tabulate_rises("low_rank", __doc__, titles, ("linears", "form"), list(rows_of()), measured, share="parameters")
