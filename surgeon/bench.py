"""Latency and throughput of artefacts side by side, and beside the source model in eager torch.

All candidates of one case (phase, batch, sequence) run in turn, A B A B, on equally many threads, so that whatever drifts
hits all of them alike; a ratio is the median of the ratios of single rounds.

Phases: ``forward`` is one run of a model without caches.  Of a model with key/value caches ``prefill`` is one run over the
whole sequence with empty caches, and ``decode`` one run of one new token behind caches of that many positions.
"""

from __future__ import annotations

import abc
import inspect
import json
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from surgeon.contract import Artifact
from surgeon.environment import processor, version_of, versions_of
from surgeon.errors import LowerError, RecipeError, SurgeonError
from surgeon.graph import Port
from surgeon.halves import has_halves
from surgeon.latency import Timing, paired_ratio, pinned_threads, rounds
from surgeon.sampling import Settings

if TYPE_CHECKING:
    from surgeon.source import LoadedSource

Phase = Literal["forward", "prefill", "decode"]
CACHE_ARGUMENTS = ("cache", "past_key_values")
"""What transformers calls the argument and the output that hold the caches, newest first."""
_LIBRARIES = ("torch", "transformers", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx")
PAST = "past"
"""Name of the dimension that counts the positions in the caches."""


@dataclass(frozen=True)
class Case:
    """What is run.

    Attributes:
        phase: see the module.
        batch: rows.
        sequence: positions of the text: computed in ``forward`` and ``prefill``, held in the caches in ``decode``.
    """

    phase: Phase
    batch: int
    sequence: int

    @property
    def tokens(self) -> int:
        """Positions that one run computes."""
        return self.batch * (1 if self.phase == "decode" else self.sequence)


class Row(BaseModel):
    """One candidate in one case."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    candidate: str
    phase: Phase
    batch: int
    sequence: int
    median_ms: float | None = None
    min_ms: float | None = None
    p90_ms: float | None = None
    runs: int = 0
    tokens_per_second: float | None = None
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
        found: dict[tuple[str, int, int], list[Row]] = {}
        for row in self.rows:
            found.setdefault((row.phase, row.batch, row.sequence), []).append(row)
        return list(found.values())


class Candidate(abc.ABC):
    """Something that can be timed.

    Attributes:
        name: shown in the table.
        nbytes: bytes of its files or weights.
        has_caches: it decodes behind key/value caches, without running an encoder again.
    """

    name: str
    nbytes: int
    has_caches: bool

    @abc.abstractmethod
    def prepare(self, case: Case) -> Callable[[], object]:
        """A function that runs the case once and returns when it is done.

        Raises:
            SurgeonError: it cannot run the case.
        """

    @abc.abstractmethod
    def threads(self, count: int) -> AbstractContextManager[None]:
        """Run on ``count`` threads within the context."""


class ArtifactCandidate(Candidate):
    """An artefact in its directory."""

    def __init__(
        self, name: str, artifact: Artifact, ranges: Mapping[str, Sequence[int]], settings: Settings | None = None
    ) -> None:
        self.name, self.artifact, self.nbytes, self.settings = name, artifact, artifact.nbytes, settings or Settings()
        self.ranges = dict(ranges)
        self.has_caches = any(PAST in port.shape for port in artifact.inputs) and not has_halves(artifact.inputs)

    @classmethod
    def open(cls, folder: Path, name: str) -> ArtifactCandidate:
        """Open what a build wrote.

        Raises:
            LowerError: the directory is not an artefact.
        """
        from surgeon.compiled import MANIFEST, load

        loaded = load(folder)
        artifact = loaded.artifact
        assert artifact is not None
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return cls(name, artifact, manifest.get("ranges", {}), Settings.of(loaded.generation))

    def prepare(self, case: Case) -> Callable[[], object]:
        """See :class:`Candidate`."""
        if self.artifact.unavailable:
            raise LowerError(self.artifact.unavailable)
        _check_length(self.settings, case)
        step = self.artifact.stepping(inputs_for(self.artifact.inputs, case, self.ranges))
        return lambda: _finished(step())

    def threads(self, count: int) -> AbstractContextManager[None]:
        """See :class:`Candidate`."""
        return nullcontext() if self.artifact.unavailable else self.artifact.threads(count)


class EagerCandidate(Candidate):
    """The source model in eager torch, on the inputs of an artefact and where that runs."""

    def __init__(
        self, source: LoadedSource, ports: Sequence[Port], ranges: Mapping[str, Sequence[int]],
        settings: Settings | None = None, device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        self.name, self.settings = "eager torch", settings or Settings()
        self.device = device
        self.module: Any = source.module.to(device)
        self.nbytes = sum({t.data_ptr(): t.nbytes for t in source.module.parameters()}.values())
        self.ports = [port for port in ports if PAST not in port.shape]
        self.ranges = dict(ranges)
        # what the model can be given besides; a graph may have been traced with fewer inputs or more (positions)
        self.taken = inspect.signature(self.module.forward).parameters
        self.cache = next((name for name in CACHE_ARGUMENTS if name in self.taken), "")
        self.has_caches = bool(self.cache) and "use_cache" in self.taken

    def prepare(self, case: Case) -> Callable[[], object]:
        """See :class:`Candidate`; a cache is cut back to its length after every step of decoding."""
        _check_length(self.settings, case)
        inputs = self._inputs(case)
        plain = {key: value for key, value in (("use_cache", False), ("return_dict", True)) if key in self.taken}
        if case.phase == "prefill" and self.has_caches:
            return lambda: _finished(self.module(**inputs, **{**plain, "use_cache": True}))
        if case.phase != "decode":
            return lambda: _finished(self.module(**inputs, **plain))
        start = self._inputs(Case("prefill", case.batch, case.sequence))
        cache = self.module(**start, **{**plain, "use_cache": True})[self.cache]
        if not hasattr(cache, "crop"):
            raise LowerError(f"its cache, a {type(cache).__name__}, cannot be cut back to one length")

        def step() -> None:
            _finished(self.module(**inputs, **{**plain, "use_cache": True, self.cache: cache}))
            cache.crop(-1)

        return step

    def _inputs(self, case: Case) -> dict[str, Tensor]:
        found = inputs_for(self.ports, case, self.ranges)
        return {name: value.to(self.device) for name, value in found.items() if name in self.taken}

    def threads(self, count: int) -> AbstractContextManager[None]:
        """See :class:`Candidate`."""
        return _pinned(count)


@contextmanager
def _pinned(count: int) -> Iterator[None]:
    with pinned_threads(count):
        yield


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
        sequences: lengths.
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
            first = opened[0]
            device = "cpu" if first.artifact.unavailable else first.artifact.device
            candidates.insert(0, EagerCandidate(source, first.artifact.inputs, first.ranges, first.settings, device))
        return bench(
            candidates, batches=batches, sequences=sequences, threads=threads, seconds=seconds,
            progress=lambda case: step(f"{case.phase}, batch {case.batch}, length {case.sequence}"),
        )  # fmt: skip


def _cases(candidates: Sequence[Candidate], batches: Sequence[int], sequences: Sequence[int]) -> list[Case]:
    caches = any(isinstance(c, ArtifactCandidate) and c.has_caches for c in candidates)
    phases: tuple[Phase, ...] = ("prefill", "decode") if caches else ("forward",)
    return [Case(phase, batch, sequence) for phase in phases for sequence in sequences for batch in batches]


def _measured(candidates: Sequence[Candidate], case: Case, seconds: float, warmup: int) -> list[Row]:
    """Time those that can run the case; the others say why not."""
    functions: dict[str, Callable[[], object]] = {}
    problems: dict[str, str] = {}
    for candidate in candidates:
        try:
            function = candidate.prepare(case)
            function()
        except SurgeonError as error:
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
            "tokens_per_second": case.tokens / (timing.median_ms / 1e3),
            "ratio": paired_ratio(base, times[candidate.name]) if base is not None else None,
        }  # fmt: skip
        rows.append(row.model_copy(update=figures))
    return rows


def inputs_for(ports: Sequence[Port], case: Case, ranges: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Random inputs of a case.

    Args:
        ports: what is taken; a dimension ``past`` counts cached positions, ``past + ...`` those and the new ones, the first
            dimension of every port is the batch, any other that varies is the sequence.
        case: the sizes.
        ranges: smallest and largest value by name of the integer inputs; masks are ones, others zeros where it is silent.
    """
    generator = torch.Generator().manual_seed(0)
    past, new = (case.sequence, 1) if case.phase == "decode" else (0, case.sequence)

    def size(axis: int, name: int | str) -> int:
        if isinstance(name, int):
            return name
        if name == PAST:
            return past
        return case.batch if axis == 0 else past + new if PAST in name.split(" + ") else new

    found = {}
    for port in ports:
        shape = [size(axis, name) for axis, name in enumerate(port.shape)]
        if port.dtype.is_floating_point:
            found[port.name] = torch.randn(shape, generator=generator).to(port.dtype)
        else:
            low, high = ranges.get(port.name, (1, 1) if "mask" in port.name else (0, 0))
            found[port.name] = torch.randint(low, high + 1, shape, generator=generator).to(port.dtype)
    return found


def sizes(text: str, option: str) -> tuple[int, ...]:
    """Numbers of an option such as ``1,32``.

    Raises:
        RecipeError: something is not a positive whole number.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise RecipeError(f"--{option}: found {text!r}, needed positive whole numbers such as 1,32")
    return tuple(dict.fromkeys(int(part) for part in parts))


def _check_length(settings: Settings, case: Case) -> None:
    """Refuse a case for which the table of positions is too short; any time is right where positions are computed."""
    behind = 1 if case.phase == "decode" else 0
    settings = replace(settings, trained_length=None)
    settings.check_length(case.sequence + behind, what="this case", advice="give a shorter sequence")


def _finished(result: Any) -> Any:
    """Wait for the device, so that the time is that of the work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result
