"""What bits that are chosen for each weight are worth: trained models under an average, by how the bits are shared out.

    python benchmarks/mixed.py
    python benchmarks/mixed.py --only "*: 3 bits*"

Cross entropy of held-out text, nats per token: 64 windows of 128 tokens; 32 others to calibrate.  Of MiniLM the mean squared
distance of 200 sentences' embeddings, of norm 1, from those of the whole model; 64 others to calibrate.  All linears and
experts of the blocks, routers apart, in groups of 32; with ``nearest`` and with ``gptq``.  *model* and *site* are the metrics
of ``quantize: {scheme: mixed}``; *4 bits in the first blocks* has 2 in the last half of them, *in the last blocks* the other
way round; *by lot* is the mean of three draws of 2, 4 and 8 bits whose average is within 2 % of it.  *average* is what came
of it in bits per stored code (scales and zero points come on top), *estimated* what the plan says the loss rises by with
``nearest``.
Writes ``benchmarks/results/mixed.json`` and ``mixed.md``.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any

from _trained import Judge, language_model, sentence_encoder, tabulate
from torch import Tensor

from surgeon.data import Data
from surgeon.discovery import discover
from surgeon.graph import Graph
from surgeon.passes.quantize import QuantizePlan
from surgeon.pipeline import operate
from surgeon.progress import Progress
from surgeon.registry import make_pass

ENCODER = "all-MiniLM-L6-v2"
MODELS = ("tiny-llama", "tiny-mixtral", "tiny-upcycled", ENCODER)
ALGORITHMS = ("nearest", "gptq")
AVERAGES = (2.25, 2.5, 3, 3.5, 5)
ORDERS = ("4 bits in the first blocks", "4 bits in the last blocks", "by lot")
ROWS = (
    "whole model",
    *(f"{bits} bits: everywhere" for bits in (2, 4, 8)),
    *(f"{bits:g} bits: {metric}" for bits in AVERAGES for metric in ("model", "site")),
    *(f"3 bits: {order}" for order in ORDERS),
)


def squared_distance(changed: Tensor, source: Tensor) -> float:
    return float((changed - source).square().sum(-1).mean())


def average(plan: QuantizePlan) -> float:
    """Bits per stored code."""
    return sum((d.codes or 0) * d.bits for d in plan.decisions) / sum(d.codes or 0 for d in plan.decisions)


def with_bits(plan: QuantizePlan, bits: Sequence[int]) -> QuantizePlan:
    decisions = zip(plan.decisions, bits, strict=True)
    return plan.model_copy(update={"decisions": tuple(each.model_copy(update={"bits": n}) for each, n in decisions)})


def in_order(plan: QuantizePlan, order: str) -> list[QuantizePlan]:
    """Other plans of three bits on average."""
    blocks = [int(each.site.split(".")[1]) for each in plan.decisions]
    half = (max(blocks) + 1) / 2
    if order != "by lot":
        return [with_bits(plan, [4 if (block < half) == ("first" in order) else 2 for block in blocks])]
    found: list[QuantizePlan] = []
    generator = random.Random(0)
    while len(found) < 3:
        drawn = with_bits(plan, [generator.choice((2, 2, 2, 4, 4, 8)) for _ in plan.decisions])
        if abs(average(drawn) / 3 - 1) < 0.02:
            found.append(drawn)
    return found


def measured(key: str, graph: Graph, data: Data, judge: Judge) -> dict[str, float]:
    """Loss, average bits and estimate of one row with one algorithm."""
    algorithm, _, row = key.partition(": ")
    if row == "whole model":
        return {"loss": judge(graph)}
    bits, _, way = row.partition(" bits: ")
    fields: dict[str, Any] = {"algorithm": algorithm, "blocks": ":"}
    if way == "everywhere":
        fields |= {"scheme": f"int{bits}"}
    else:
        fields |= {"scheme": "mixed", "bits": float(bits), "metric": way if way in ("model", "site") else "model"}
    step = make_pass({"quantize": fields})
    structure = discover(graph)

    def run(plan: QuantizePlan | None) -> tuple[Graph, Any]:
        changed, _, made, _ = operate(step, graph, structure, data, plan, Progress(False))
        return changed, made

    changed, plan = run(None)
    if way in ORDERS:
        plans = in_order(plan, way)
        losses = [judge(run(each)[0]) for each in plans]
        return {"loss": statistics.mean(losses), "average": statistics.mean(map(average, plans))}
    if way == "everywhere":
        return {"loss": judge(changed), "average": float(bits)}
    estimate = {"estimated": sum((d.errors or {})[d.bits] for d in plan.decisions)} if way == "model" else {}
    return {"loss": judge(changed), "average": average(plan), **estimate}


def table(models: dict[str, dict[str, dict[str, float]]]) -> str:
    lines = [
        "# What bits that are chosen for each weight are worth",
        "",
        "Made by `python benchmarks/mixed.py`, which says what is measured: by how much the cross entropy of held-out text "
        f"rises, in nats per token; of {ENCODER} how far embeddings are from those of the whole model.",
    ]
    for model in MODELS:
        found = models.get(model, {})
        whole = found.get("nearest: whole model", {}).get("loss")
        if whole is None:
            continue
        lines += [
            "",
            f"## {model}" + (f" (whole model: {whole:.3f})" if model != ENCODER else ""),
            "",
            "| bits | shared out by | average | nearest | estimated | gptq |",
            "|--:|---|--:|--:|--:|--:|",
        ]
        for row in ROWS[1:]:
            nearest, gptq = (found.get(f"{algorithm}: {row}", {}) for algorithm in ALGORITHMS)
            bits, _, way = row.partition(" bits: ")
            cells = [f"{nearest['average']:.2f}" if nearest else ""]
            cells += [f"{nearest['loss'] - whole:.3f}" if nearest else ""]
            cells += [f"{nearest['estimated']:.3f}" if "estimated" in nearest and model != ENCODER else ""]
            cells += [f"{gptq['loss'] - whole:.3f}" if gptq else ""]
            lines.append(f"| {bits} | {way} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    subjects = {model: partial(language_model, model, samples=32, windows=64) for model in MODELS if model != ENCODER}
    encoder = partial(sentence_encoder, {"samples": 64, "length": 64}, 200, 1, squared_distance)
    rows = [f"{algorithm}: {row}" for algorithm in ALGORITHMS for row in ROWS]
    tabulate("mixed", __doc__, {**subjects, ENCODER: encoder}, rows, measured, table)


if __name__ == "__main__":
    main()
