"""The recipe's ``evaluate`` section: the finished artefact against the source model, on text and on the clock."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from surgeon.bench import bench
from surgeon.caches import TOKENS
from surgeon.candidates import ArtifactCandidate, EagerCandidate
from surgeon.contract import Artifact
from surgeon.data import collate, tokenize_file, tokenizer_for
from surgeon.errors import ObserveError
from surgeon.evaluate import Reading, compare
from surgeon.export import first_lines
from surgeon.formatting import case_title
from surgeon.graph import Graph
from surgeon.progress import Progress
from surgeon.report import Latency, Report
from surgeon.sampling import Settings
from surgeon.source import calling

if TYPE_CHECKING:
    from surgeon.recipe import Evaluate
    from surgeon.source import LoadedSource

ROWS_PER_BATCH = 16


def text_rows(section: Evaluate, source: LoadedSource, graph: Graph, tokenizer: Any) -> list[dict[str, Any]]:
    """Read the section's text, and refuse one on which the source model cannot be run: its longest row is run.

    Args:
        section: as below, as are the others.
        source: the source model.
        graph: the graph whose inputs are filled.
        tokenizer: see ``surgeon.data.tokenizer_for``.

    Returns:
        Its rows; none where there is no text.

    Raises:
        ObserveError: the text is missing or empty, the model takes none, or fails on it.
    """
    if section.text is None:
        return []
    names = [port.name for port in graph.inputs]
    if TOKENS not in names:
        raise ObserveError(f"evaluate.text: this model takes no text, its inputs are {', '.join(names)}; leave text out")
    rows = tokenize_file(
        Path(section.text), graph, section.length, tokenizer, lines=section.unit == "line", limit=None, seed=None
    )
    longest = max(rows, key=lambda row: len(row[TOKENS]))
    pad = tokenizer_for(graph, tokenizer)
    try:
        with torch.no_grad():
            source.outputs(**collate([longest], graph, pad))
    except Exception as error:  # a model's forward may raise anything
        raise ObserveError(
            f"evaluate.text: the model fails on a row of {len(longest[TOKENS])} tokens: {type(error).__name__}: "
            f"{first_lines(error, 1)}; where its positions do not reach so far, give a smaller evaluate.length"
        ) from error
    return rows


def evaluate_section(
    section: Evaluate, source: LoadedSource, graph: Graph, artifact: Artifact, report: Report, tokenizer: Any,
    rows: Sequence[dict[str, Any]] = (), reading: Reading | None = None, bars: Progress | None = None,
) -> None:  # fmt: skip
    """Measure the artefact as the recipe asks and put the figures into the report.

    Args:
        section: what to measure.
        source: the source model, in eager torch.
        graph: the rewritten graph (names and dims of the inputs).
        artifact: what was built.
        report: filled in: ``quality`` gets ``artifact_*`` figures, ``latency`` one row per batch size and phase, and
            ``warnings`` the cases that could not be timed.
        tokenizer: see ``surgeon.data.tokenizer_for``.
        rows: of the section's text, from :func:`text_rows`.
        reading: what the source's outputs are; by default those of ``graph``, where it cannot be told if activations share
            one scale per tensor (``int8_dynamic``): every token moves every other then, as in no causal model.
        bars: where to show progress.
    """
    if rows:
        pad = tokenizer_for(graph, tokenizer)
        batches = [collate(rows[i : i + ROWS_PER_BATCH], graph, pad) for i in range(0, len(rows), ROWS_PER_BATCH)]
        shown = (bars or Progress(False)).track(batches, "evaluating: batches", len(batches))
        figures = compare(  # one batch at a time: logits of a long text over a large vocabulary fill any memory
            (source.outputs(**batch) for batch in shown), lambda **inputs: artifact.run_on_host(inputs), batches,
            reading=reading or Reading.of(graph), real=True,
        )  # fmt: skip
        report.quality |= {f"artifact_{name}": value for name, value in figures.items()}
    if section.latency:
        _time(section, source, graph, artifact, report)


def _time(section: Evaluate, source: LoadedSource, graph: Graph, artifact: Artifact, report: Report) -> None:
    """Time the artefact beside the source model, as ``surgeon bench`` does, on the example's values."""
    built = ArtifactCandidate("the artefact", artifact, graph.example, Settings.of(graph.source.generation))
    eager = EagerCandidate.beside(source, built)
    with calling(source.module):
        result = bench([eager, built], batches=section.latency, sequences=(section.length,), threads=section.threads)
    for rows in result.cases():
        found = {row.candidate: row.median_ms for row in rows}
        before, after = found.get(eager.name), found.get(built.name)
        if before is not None and after is not None:
            first = rows[0]
            report.latency.append(
                Latency(
                    phase=first.phase, batch=first.batch, length=first.sequence, eager_ms=before, artifact_ms=after,
                    threads=result.threads, device=str(artifact.device),
                )
            )  # fmt: skip
            continue
        problems: dict[str, list[str]] = {}
        for row in rows:
            if row.problem is not None:
                problems.setdefault(row.problem, []).append(row.candidate)
        reasons = [f"{' and '.join(names)}: {problem}" for problem, names in problems.items()]
        reason = "; ".join(reasons) or f"{eager.name} decodes without caches"
        report.warnings.append(f"not timed: {case_title(rows[0].phase, rows[0].batch, rows[0].sequence)}: {reason}")
