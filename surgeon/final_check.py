"""The recipe's ``evaluate`` section: the finished artefact against the source model, on text and on the clock."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from surgeon.caches import OPTIONAL
from surgeon.contract import Artifact
from surgeon.data import collate, tokenize_file, tokenizer_for
from surgeon.evaluate import Reading, compare
from surgeon.graph import Graph
from surgeon.latency import compare as compare_latency
from surgeon.latency import pinned_threads
from surgeon.observe import Batch
from surgeon.report import Latency, Report

if TYPE_CHECKING:
    from surgeon.recipe import Evaluate
    from surgeon.source import LoadedSource

ROWS_PER_BATCH = 16


def evaluate_section(
    section: Evaluate, source: LoadedSource, graph: Graph, artifact: Artifact, report: Report, tokenizer: Any
) -> None:
    """Measure the artefact as the recipe asks and put the figures into the report.

    Args:
        section: what to measure.
        source: the source model, in eager torch.
        graph: the rewritten graph (names and dims of the inputs).
        artifact: what was built.
        report: filled in: ``quality`` gets ``artifact_*`` figures, ``latency`` one row per batch size.
        tokenizer: see ``surgeon.data.tokenizer_for``.

    Raises:
        ObserveError: the text is missing or empty.
    """
    if section.text is not None:
        rows = tokenize_file(
            Path(section.text), graph, section.length, tokenizer, lines=section.unit == "line", limit=None, seed=None
        )
        pad = tokenizer_for(graph, tokenizer)
        batches = [collate(rows[i : i + ROWS_PER_BATCH], graph, pad) for i in range(0, len(rows), ROWS_PER_BATCH)]
        with torch.no_grad():
            reference = [source.outputs(**batch) for batch in batches]
        figures = compare(
            reference, lambda **inputs: artifact.run_on_host(inputs), batches,
            reading=Reading.of(graph), real=True,
        )  # fmt: skip
        report.quality |= {f"artifact_{name}": value for name, value in figures.items()}
    for size in section.latency:
        batch = latency_inputs(graph, size, section.length)
        threads = section.threads or torch.get_num_threads()
        with pinned_threads(threads), artifact.threads(threads), torch.no_grad():
            timings = compare_latency(
                {"eager": partial(source.outputs, **batch), "artifact": partial(artifact.run, batch)}
            )
        report.latency.append(
            Latency(
                batch=size,
                length=section.length,
                eager_ms=timings["eager"].median_ms,
                artifact_ms=timings["artifact"].median_ms,
                threads=threads,
            )
        )


def latency_inputs(graph: Graph, batch: int, length: int) -> Batch:
    """Inputs of one batch size and length, by tiling the example's values (dynamic dimensions only)."""
    inputs = {}
    for port in graph.inputs:
        if port.role in OPTIONAL:
            continue
        value = graph.example[port.name]
        for axis, size in enumerate(port.shape):
            if isinstance(size, str):
                wanted = batch if axis == 0 else length
                repeats = [1] * value.dim()
                repeats[axis] = -(-wanted // value.shape[axis])
                value = value.repeat(repeats).narrow(axis, 0, wanted)
        inputs[port.name] = value.contiguous()
    return inputs
