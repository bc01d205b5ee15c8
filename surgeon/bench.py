"""Latency and throughput of artefacts side by side, and beside the source model in eager torch.

All candidates of one case (phase, batch, sequence) run in turn, A B A B, on equally many threads, so that whatever drifts
hits all of them alike; a ratio is the median of the ratios of single rounds.

Phases: ``forward`` is one run of a model without caches.  Of a model with key/value caches ``prefill`` is one run over the
whole sequence with empty caches, and ``decode`` one run of one new token behind caches of that many positions.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict

from surgeon.candidates import ArtifactCandidate, Candidate, Case, EagerCandidate, Phase
from surgeon.environment import processor, version_of, versions_of
from surgeon.errors import RecipeError, SurgeonError
from surgeon.formatting import case_title
from surgeon.latency import Timing, paired_ratio, pinned_threads, rounds

_LIBRARIES = ("torch", "transformers", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx")


class Row(BaseModel):
    """One candidate in one case."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    candidate: str
    phase: Phase
    batch: int
    sequence: int | None
    """None where no candidate has a length, as with images of one size."""
    median_ms: float | None = None
    min_ms: float | None = None
    p90_ms: float | None = None
    runs: int = 0
    tokens_per_second: float | None = None
    """None without a length."""
    ratio: float | None = None
    """Times faster than the baseline: median over rounds."""
    problem: str | None = None
    """Why it did not run."""


class BenchResult(BaseModel):
    """Everything that was measured, and where."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    surgeon: str
    versions: dict[str, str]
    machine: dict[str, str]
    threads: int
    baseline: str
    bytes: dict[str, int]
    """Size of each candidate's files or weights."""
    rows: list[Row]

    def to_json(self) -> str:
        """As JSON text."""
        return self.model_dump_json(indent=2)

    def cases(self) -> list[list[Row]]:
        """Rows of one case together, in the order of measuring."""
        found: dict[tuple[str, int, int | None], list[Row]] = {}
        for row in self.rows:
            found.setdefault((row.phase, row.batch, row.sequence), []).append(row)
        return list(found.values())


def bench(
    candidates: Sequence[Candidate],
    *,
    batches: Sequence[int] = (1,),
    sequences: Sequence[int] = (128,),
    threads: int | None = None,
    seconds: float = 2.0,
    warmup: int = 3,
    progress: Callable[[Case], AbstractContextManager[Any]] | None = None,
) -> BenchResult:
    """Time candidates side by side.

    Args:
        candidates: what to time; the first is what the others are compared with.
        batches: numbers of rows.
        sequences: lengths; they say nothing where no candidate has one.
        threads: for every candidate; as many as torch uses by default.
        seconds: time to spend per candidate and case.
        warmup: rounds before the first that counts.
        progress: entered while a case is measured.

    Raises:
        RecipeError: there is nothing to time, or two candidates have one name.
    """
    names = [candidate.name for candidate in candidates]
    if not names or len(set(names)) != len(names):
        raise RecipeError(f"bench: needed candidates with different names, found {names}")
    count = torch.get_num_threads() if threads is None else threads
    rows: list[Row] = []
    for case in _cases(candidates, batches, sequences):
        taking = [c for c in candidates if c.has_caches or case.phase != "decode"]
        with torch.no_grad(), ExitStack() as stack, progress(case) if progress else nullcontext():
            stack.enter_context(pinned_threads(count))
            for candidate in taking:
                stack.enter_context(candidate.threads(count))
            rows += _measured(taking, case, seconds, warmup)
    machine = {"processor": processor(), "cores": str(os.cpu_count()), "system": platform.platform(terse=True)}
    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
    sizes = {candidate.name: candidate.nbytes for candidate in candidates}
    return BenchResult(
        surgeon=version_of("surgeon") or "", versions=versions_of(*_LIBRARIES), machine=machine, threads=count,
        baseline=names[0], bytes=sizes, rows=rows,
    )  # fmt: skip


def bench_artifacts(
    folders: Sequence[Path],
    *,
    against: str | None = None,
    batches: Sequence[int] = (1,),
    sequences: Sequence[int] = (128,),
    threads: int | None = None,
    seconds: float = 2.0,
    step: Callable[[str], AbstractContextManager[Any]] = nullcontext,
) -> BenchResult:
    """Time the artefacts of some folders; see :func:`bench`.

    Args:
        folders: outputs of builds; shown by their last names where these differ.
        against: a model to time in eager torch, the baseline then.
        batches: as in :func:`bench`, as are the next three.
        sequences: lengths.
        threads: for every candidate.
        seconds: per candidate and case.
        step: shows what is being done.

    Raises:
        SurgeonError: a folder is not an artefact, or the model could not be loaded.
    """
    short = [folder.resolve().name for folder in folders]
    names = short if len(set(short)) == len(short) else [str(folder) for folder in folders]
    with step("opening the artefacts"):
        opened = [ArtifactCandidate.open(folder, name) for folder, name in zip(folders, names, strict=True)]
    candidates: list[Candidate] = list(opened)
    with ExitStack() as stack:
        if against is not None:
            from surgeon.source import calling, load_source

            with step("loading the model"):
                source = load_source(against)
            stack.enter_context(calling(source.module))
            candidates.insert(0, EagerCandidate.against(source, opened[0]))
        return bench(
            candidates, batches=batches, sequences=sequences, threads=threads, seconds=seconds,
            progress=lambda case: step(case_title(case.phase, case.batch, case.sequence)),
        )  # fmt: skip


def _cases(candidates: Sequence[Candidate], batches: Sequence[int], sequences: Sequence[int]) -> list[Case]:
    caches = any(isinstance(c, ArtifactCandidate) and c.has_caches for c in candidates)
    phases: tuple[Phase, ...] = ("prefill", "decode") if caches else ("forward",)
    lengths = sequences if any(c.has_length for c in candidates) else (None,)
    return [Case(phase, batch, sequence) for phase in phases for sequence in lengths for batch in batches]


def _measured(candidates: Sequence[Candidate], case: Case, seconds: float, warmup: int) -> list[Row]:
    """Time those that can run the case; the others say why not."""
    functions: dict[str, Callable[[], object]] = {}
    problems: dict[str, str] = {}
    for candidate in candidates:
        try:
            function = candidate.prepare(case)
            function()
        except (SurgeonError, torch.OutOfMemoryError) as error:
            problems[candidate.name] = str(error)
        else:
            functions[candidate.name] = function
    times = rounds(functions, warmup=warmup, seconds=seconds) if functions else {}
    base = times.get(candidates[0].name)
    rows = []
    for candidate in candidates:
        row = Row(candidate=candidate.name, phase=case.phase, batch=case.batch, sequence=case.sequence)
        if candidate.name in problems:
            rows.append(row.model_copy(update={"problem": problems[candidate.name]}))
            continue
        timing = Timing.of(times[candidate.name])
        figures = {
            "median_ms": timing.median_ms, "min_ms": timing.min_ms, "p90_ms": timing.p90_ms, "runs": timing.runs,
            "tokens_per_second": None if case.tokens is None else case.tokens / (timing.median_ms / 1e3),
            "ratio": paired_ratio(base, times[candidate.name]) if base is not None else None,
        }  # fmt: skip
        rows.append(row.model_copy(update=figures))
    return rows


def sizes(text: str, option: str) -> tuple[int, ...]:
    """Numbers of an option such as ``1,32``.

    Raises:
        RecipeError: something is not a positive whole number.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise RecipeError(f"--{option}: found {text!r}, needed positive whole numbers such as 1,32")
    return tuple(dict.fromkeys(int(part) for part in parts))
