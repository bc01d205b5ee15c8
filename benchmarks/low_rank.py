"""How much factoring linears loses on trained models, by method and by how parameters are shared out.

    python benchmarks/low_rank.py
    python benchmarks/low_rank.py --only "*: 60 %*"

Cross entropy of held-out text, nats per token: 64 windows of 128 tokens; 32 others to calibrate.  All linears of the blocks are
factored, experts and routers apart, and nothing is trained afterwards; the percentage is the share of their parameters that is
kept.  Writes ``benchmarks/results/low_rank.json`` (with the share of the model's parameters that is left) and ``low_rank.md``.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from _trained import Judge, changed_by, language_model, tabulate

from surgeon.accounting import parameter_count
from surgeon.data import Data
from surgeon.graph import Graph

MODELS = ("tiny-llama", "tiny-mixtral")
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


def table(models: dict[str, dict[str, dict[str, float]]]) -> str:
    head = " | ".join(f"{name} | rise | parameters" for name in MODELS)
    lines = [
        "# What factoring linears loses",
        "",
        "Made by `python benchmarks/low_rank.py`, which says what is measured: cross entropy of held-out text in nats per "
        "token, by how much it rises, and the share of the model's parameters that is left.",
        "",
        f"| linears | form | {head} |",
        "|---|---|" + "--:|--:|--:|" * len(MODELS),
    ]
    for row in rows_of():
        share, _, name = row.partition(": ")
        cells = []
        for model in MODELS:
            figures = models.get(model, {}).get(row)
            if figures is None:
                cells += ["", "", ""]
                continue
            rise = figures["loss"] - models[model]["dense"]["loss"]
            cells += [f"{figures['loss']:.3f}", f"{rise:.3f}" if name else "", f"{100 * figures['parameters']:.1f} %"]
        lines.append(f"| {share} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def measured(row: str, source: Graph, data: Data, judge: Judge) -> dict[str, float]:
    step = rows_of()[row]
    graph = source if step is None else changed_by(step, source, data)
    return {"loss": judge(graph), "parameters": parameter_count(graph) / parameter_count(source)}


if __name__ == "__main__":
    subjects = {model: partial(language_model, model, samples=32, windows=64) for model in MODELS}
    tabulate("low_rank", __doc__, subjects, list(rows_of()), measured, table)
