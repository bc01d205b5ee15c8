"""Narrower feed-forward networks: what is lost for every way to choose the neurons that go, and how much faster it is.

    python benchmarks/width.py [--seconds 4]

``drop_neurons`` removes 12.5, 25 and 50 % of the neurons of every network (of every expert) and nothing is trained
afterwards.  The models of ``examples/models`` are judged by their next-token cross entropy in nats on 64 held-out windows of
128 tokens, calibrated on 72 others; all-MiniLM-L6-v2 by 1 - cos between its embeddings and the source's (mean-pooled) on
``examples/sentences.txt``, calibrated on the lines of ``examples/calibration-sentences.txt``.  Random choices are means over
three lots.  Latency is of MiniLM at 50 %, on one thread: eager torch and the artefacts of ONNX Runtime run in turn, and the
median over the rounds of the ratio within a round is given.  Writes ``benchmarks/results/width.json`` and ``width.md``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from _rows import RESULTS
from _trained import Judge, changed_by, language_model, minilm, sentence_encoder

from surgeon.data import Data
from surgeon.environment import processor, versions_of
from surgeon.graph import Graph
from surgeon.latency import paired_ratio, rounds
from surgeon.registry import make_backend

TRAINED = ("tiny-llama", "tiny-mixtral", "tiny-upcycled")
MINILM = "all-MiniLM-L6-v2"
RATIOS = (0.125, 0.25, 0.5)
CRITERIA = ("reconstruction", "contribution", "leverage", "activation", "random")
LOTS = 3
SHAPES = ((1, 16), (8, 128))
"""Sequences and tokens of each, at which latency is measured."""


def subject(name: str) -> tuple[Graph, Data, Judge]:
    """A traced model, what it is calibrated on, and what it is judged by."""
    if name == MINILM:
        fields = {"samples": 285, "length": 128, "batch": 32}
        return sentence_encoder(fields, 64, 0, lambda found, wanted: 1 - float((found * wanted).sum(1).mean()))
    return language_model(name, samples=72, windows=64)


def narrowed(graph: Graph, data: Data, **fields: Any) -> Graph:
    """The model after one pass."""
    return changed_by({"drop_neurons": fields}, graph, data)


def measured(name: str) -> Iterator[dict[str, Any]]:
    """Rows of one model."""
    graph, data, judge = subject(name)
    tokens = sum(int(batch.get("attention_mask", batch["input_ids"] * 0 + 1).sum()) for batch in data.calibration)
    yield {"model": name, "ratio": 0.0, "criterion": "", "refit": False, "loss": judge(graph), "tokens": tokens}
    for ratio in RATIOS:
        for criterion in CRITERIA:
            for refit in (True, False):
                seeds = range(LOTS if criterion == "random" else 1)
                fields = {"ratio": ratio, "criterion": criterion, "refit": refit}
                losses = [judge(narrowed(graph, data, seed=seed, **fields)) for seed in seeds]
                yield {"model": name, **fields, "loss": statistics.mean(losses), "tokens": tokens}


def latencies(seconds: float) -> list[dict[str, Any]]:
    """MiniLM at half of its width, beside what it was and beside eager torch."""
    graph, data, _ = subject(MINILM)
    eager = transformers.AutoModel.from_pretrained(minilm()).eval()
    backend, found = make_backend("onnxruntime"), []
    half = narrowed(graph, data, ratio=0.5)
    low_bit = changed_by({"quantize": {"scheme": "int8_dynamic"}}, half, data)
    graphs = {"as it was": graph, "half as wide": half, "half as wide, int8_dynamic": low_bit}
    artifacts = {name: backend.lower(one, Path(tempfile.mkdtemp())) for name, one in graphs.items()}
    for artifact in artifacts.values():
        artifact.session_threads = 1  # type: ignore[attr-defined]  # of ONNX Runtime's artefact
    for batch, length in SHAPES:
        ids = torch.randint(1000, 20000, (batch, length), generator=torch.Generator().manual_seed(0))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}

        @torch.no_grad()
        def run_eager(inputs: dict[str, torch.Tensor] = inputs) -> object:
            return eager(**inputs)

        runs: dict[str, Callable[[], object]] = {"eager torch": run_eager}
        for name, artifact in artifacts.items():
            runs[name] = lambda artifact=artifact, inputs=inputs: artifact.run(inputs)  # type: ignore[misc]  # bound here
        times = rounds(runs, seconds=seconds, minimum=20)
        for name, own in times.items():
            ms = 1e3 * statistics.median(own)
            found.append({"what": name, "shape": [batch, length], "ms": ms, "ratio": paired_ratio(times["eager torch"], own)})
            print(f"{name:30}{batch} x {length:<5}{ms:9.2f} ms", flush=True)
    return found


def table(results: dict[str, Any]) -> str:
    """The page."""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    lines = [
        "# Narrower feed-forward networks",
        "",
        "Made by `python benchmarks/width.py`, which says what is measured: loss in nats of the trained models, 1 - cos of "
        f"{MINILM}; *r* with refit, *-* without. Least of each column in bold. {versions}; {results['processor']}.",
        "",
    ]
    rows = results["losses"]
    for model in (*TRAINED, MINILM):
        own = {(row["ratio"], row["criterion"], row["refit"]): row["loss"] for row in rows if row["model"] == model}
        if not own:
            continue
        tokens = next(row["tokens"] for row in rows if row["model"] == model)
        lines += [f"## {model}", "", f"Untouched {own.pop((0.0, '', False)):.4f}; {tokens:,} calibration tokens.", ""]
        columns = [(ratio, refit) for ratio in RATIOS for refit in (True, False)]
        heads = [f"{100 * ratio:g} % {'r' if refit else '-'}" for ratio, refit in columns]
        lines.append(f"| criterion | {' | '.join(heads)} |")
        lines.append("|---|" + "--:|" * len(columns))
        for criterion in CRITERIA:
            cells = []
            for ratio, refit in columns:
                loss = own[ratio, criterion, refit]
                least = loss == min(own[ratio, other, refit] for other in CRITERIA)
                cells.append(f"**{loss:.4f}**" if least else f"{loss:.4f}")
            lines.append(f"| `{criterion}` | {' | '.join(cells)} |")
        lines.append("")
    lines += [f"## Latency of {MINILM}", "", "One thread, ONNX Runtime; *times* is how many times faster than eager torch.", ""]
    lines += ["| sequences x tokens | what | ms | times |", "|---|---|--:|--:|"]
    for row in results["latency"]:
        shape = " x ".join(map(str, row["shape"]))
        lines.append(f"| {shape} | {row['what']} | {row['ms']:.2f} | {row['ratio']:.2f} |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4.0, help="of measuring latency per shape and candidate")
    options = parser.parse_args()
    torch.set_num_threads(1)
    losses = []
    for name in (*TRAINED, MINILM):
        for row in measured(name):
            losses.append(row)
            print(f"{name:18}{row['ratio']:7}{row['criterion']:>16}{row['refit']!s:>7}{row['loss']:10.4f}", flush=True)
    versions = versions_of("torch", "transformers", "onnxruntime")
    results = {"versions": versions, "processor": processor(), "losses": losses, "latency": latencies(options.seconds)}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "width.json").write_text(json.dumps(results, indent=1))
    (RESULTS / "width.md").write_text(table(results), encoding="utf-8")


if __name__ == "__main__":
    main()
