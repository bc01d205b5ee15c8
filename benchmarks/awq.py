"""What scaling features by the size of their activations (AWQ) spares weights of 4 bits, on a pretrained encoder.

    python benchmarks/awq.py
    python benchmarks/awq.py --only "*awq*"

all-MiniLM-L6-v2, by 1 - cos between its embeddings and the source's (mean-pooled) on 128 sentences, in thousandths; 64 others
to calibrate.  The small language models of this repository have no outliers that it could spare anything.  Writes
``benchmarks/results/awq.json`` and ``awq.md``.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import torch
from _trained import Judge, changed_by, sentence_encoder, tabulate
from torch import Tensor

from surgeon.data import Data
from surgeon.graph import Graph

ENCODER = "all-MiniLM-L6-v2"
FORMS: dict[str, dict[str, Any]] = {
    "group 32": {"group": 32},
    "group 128": {"group": 128},
    "group 128, zero points": {"group": 128, "symmetric": False},
}
METHODS: dict[str, dict[str, Any]] = {
    "nearest": {},
    "nearest, scales: search": {"scales": "search"},
    "gptq": {"algorithm": "gptq"},
}
ROWS = tuple(f"{form}: {awq}{method}" for form in FORMS for awq in ("", "awq, ") for method in METHODS)


def distance(changed: Tensor, source: Tensor) -> float:
    return float((1 - torch.nn.functional.cosine_similarity(changed, source)).mean())


def measured(row: str, graph: Graph, data: Data, judge: Judge) -> dict[str, float]:
    form, _, method = row.partition(": ")
    start = time.perf_counter()
    if method.startswith("awq, "):
        graph = changed_by({"smooth": {"method": "awq", **FORMS[form]}}, graph, data)
    fields = {"scheme": "int4", **FORMS[form], **METHODS[method.removeprefix("awq, ")]}
    changed = changed_by({"quantize": fields}, graph, data)
    return {"loss": judge(changed), "seconds": time.perf_counter() - start}


def table(models: dict[str, dict[str, dict[str, float]]]) -> str:
    found = models[ENCODER]
    lines = [
        "# What AWQ spares weights of 4 bits",
        "",
        f"Made by `python benchmarks/awq.py`, which says what is measured: of {ENCODER} thousandths of 1 - cos, and in "
        "brackets the share of that of `nearest`.",
        "",
        "| form | method | alone | behind `smooth: {method: awq}` | seconds | with awq |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for form in FORMS:
        plain = found[f"{form}: nearest"]["loss"]
        for method in METHODS:
            pair = [found[f"{form}: {awq}{method}"] for awq in ("", "awq, ")]
            cells = [f"{1e3 * each['loss']:.1f} ({each['loss'] / plain:.2f})" for each in pair]
            cells += [f"{each['seconds']:.1f}" for each in pair]
            lines.append(f"| {form} | {method} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    encoder = partial(sentence_encoder, {"samples": 64, "length": 64}, 128, 1, distance)
    tabulate("awq", __doc__, {ENCODER: encoder}, ROWS, measured, table)


if __name__ == "__main__":
    main()
