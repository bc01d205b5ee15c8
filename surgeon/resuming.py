"""Going on with a build that was interrupted: what it has done is kept beside the output until that is there.

Kept are the reports on the passes that have finished and the graph behind them, and of a sweep that is under way the graph
behind the blocks that it has been through.  All of that is one JSON file, written anew as a whole; tensors lie in files
beside it, each written once (:mod:`surgeon.tensor_store`) and before the JSON names it.  So a kill at any moment leaves what
was kept before or what is kept now.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surgeon.contract import Pass, Plan
from surgeon.data import Data
from surgeon.environment import installed_version
from surgeon.errors import RecipeError, SurgeonError, SurgeonWarning
from surgeon.graph import Graph, digest_tensor
from surgeon.graph_data import become, graph_data, graph_of, tensors_of
from surgeon.output import write_file
from surgeon.plans import SavedPlan
from surgeon.report import PassReport
from surgeon.rewrite import Editor
from surgeon.structure import Structure
from surgeon.tensor_store import TensorStore

_STATE = "kept.json"
_SAMPLED = 1024
"""Numbers of each weight that tell one model from another of the same graph."""
EVERY = 30.0
"""Seconds of a sweep after which the blocks that it has been through since are kept."""


@dataclass(frozen=True)
class KeptSweep:
    """What was left by a sweep that was under way.

    Attributes:
        blocks: how many blocks it had been through.
        of: how many there are.
        plans: one for each of them.
        whole: the plan that was made for all blocks before the sweep, if any.
        tokens: how many calibration tokens had been observed.
        matched: the patterns of ``names`` that had admitted something.
        seconds: how long it had taken.
        replaced: nodes that edits had replaced, by name, with what stands for them.
        graph: the graph behind those blocks, as :func:`surgeon.graph_data.graph_data` writes it.
        tensors: its tensors by name.
    """

    blocks: int
    of: int
    plans: tuple[Plan[Any], ...]
    whole: Plan[Any] | None
    tokens: int
    matched: tuple[str, ...]
    seconds: float
    replaced: Mapping[str, str]
    graph: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    def restore(self, editor: Editor, structure: Structure) -> None:
        """Put an editor of the graph as it was before the pass, and that graph's structure, where the sweep left them."""
        nodes = become(editor, self.graph, self.tensors)
        for old, new in self.replaced.items():
            if old in nodes and new in nodes:
                editor.stands_for(nodes[new], nodes[old])
        structure.selection.matched.update(self.matched)


@dataclass(frozen=True)
class Kept:
    """What was left by a build.

    Attributes:
        graph: behind the last pass that had finished.
        plans: what each of those did.
        reports: on each.
        sweep: of the pass behind them, where it was under way.
        note: what a reader of the report should know.
    """

    graph: Graph
    plans: tuple[Plan[Any], ...]
    reports: tuple[PassReport, ...]
    sweep: KeptSweep | None
    note: str


class Sweeping:
    """One pass as it goes through the blocks: where it starts, and how far it is.

    Attributes:
        kept: what an interrupted build left of it.
        blocks: how many blocks it has been through.
        of: how many there are; 0 before the first of them.
        name: of the pass.
    """

    def __init__(self, step: Pass[Any], kept: KeptSweep | None, journal: Journal | None = None) -> None:
        """Args:
        step: the pass.
        kept: what an interrupted build left of it.
        journal: where to keep what it does; None to count the blocks only.
        """
        self.kept = kept
        self.name = step.name
        self.blocks, self.of = (kept.blocks, kept.of) if kept is not None else (0, 0)
        self._fields = step.model_dump(mode="json")
        self._journal = journal
        self._started = self._written = time.monotonic()
        self._unwritten: dict[str, Any] | None = None

    @property
    def seconds(self) -> float:
        """How long it has taken, in this build and the interrupted one."""
        return time.monotonic() - self._started + (self.kept.seconds if self.kept is not None else 0.0)

    def passed(
        self, of: int, editor: Editor, structure: Structure, plans: Sequence[Plan[Any]], whole: Plan[Any] | None, tokens: int
    ) -> None:
        """Say that the sweep is behind a block: ``plans`` has one for each so far.

        Args:
            of: how many blocks there are.
            editor: of the graph, settled.
            structure: that the sweep goes by.
            plans: one for each block so far.
            whole: the plan that was made before the sweep for all blocks.
            tokens: how many calibration tokens have been observed.
        """
        self.blocks, self.of = len(plans), of
        if self._journal is None:
            return
        self._unwritten = {
            "name": self.name,
            "fields": self._fields,
            "blocks": len(plans),
            "of": of,
            "plans": [plan.model_dump(mode="json") for plan in plans],
            "whole": None if whole is None else whole.model_dump(mode="json"),
            "tokens": tokens,
            "matched": sorted(structure.selection.matched),
            "seconds": self.seconds,
            "replaced": editor.replaced(),
            "graph": graph_data(editor.graph),
            "tensors": tensors_of(editor.graph),  # shared, and held until the next block replaces them
        }
        if time.monotonic() - self._written >= EVERY:
            self.write()

    def write(self) -> None:
        """Keep the blocks since the last time."""
        if self._unwritten is not None and self._journal is not None:
            self._journal.keep_sweep(self._unwritten)
            self._unwritten = None
        self._written = time.monotonic()


class Journal:
    """A hidden folder beside the output, of one build at a time.

    Attributes:
        folder: of the journal.
    """

    def __init__(self, output: Path, keeps: bool) -> None:
        """Args:
        output: of the build.
        keeps: whether anything is to be kept; otherwise this only knows how far the build is.
        """
        self.folder = folder_of(output)
        self._keeps = keeps
        self._finished: list[str] = []
        self._sweeping: Sweeping | None = None
        self._on_disk = ""
        self._passes: list[dict[str, Any]] = []
        self._graph: dict[str, Any] | None = None

    def open(self, source: Graph, data: Data, saved: SavedPlan | None, steps: Sequence[Pass[Any]]) -> Kept | None:
        """What an interrupted build of the same model on the same data kept of these passes; None for nothing.

        Args:
            source: the source graph.
            data: what passes observe and results are compared on.
            saved: the plan that is repeated, if any.
            steps: the passes.

        Raises:
            TraceError: the graph has a node that cannot be written down.

        Warns:
            SurgeonWarning: something was kept, and it is another build's.
        """
        if not self._keeps:
            return None
        graph_data(source)  # fails now where it would fail behind hours of work
        tensors = tensors_of(source)
        self._store = TensorStore(self.folder, tensors)
        batches = (batch for part in (data.calibration, data.held_back) for batch in part)
        self._build = {
            "version of surgeon": installed_version(),
            "model": source.fingerprint(),
            "weights": _digest(_sample(tensor) for tensor in source.parameters().values()),
            "layout of the weights": self._store.source,
            "data": _digest(value for batch in batches for _, value in sorted(batch.items())),
            "plan": None if saved is None else hashlib.sha256(saved.to_json().encode()).hexdigest(),
        }
        if not (self.folder / _STATE).exists():
            return None
        try:
            kept = self._read(source, tensors, steps)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SurgeonError) as error:
            kept = f"it is not whole, or of another version ({type(error).__name__}: {error})"
        if isinstance(kept, str):
            said = f"resume: what {self.folder} holds is not taken: {kept}; the build begins anew"
            warnings.warn(said, SurgeonWarning, stacklevel=3)
            return None
        self._finished = [report.name for report in kept.reports]
        return kept

    def _read(self, source: Graph, tensors: Mapping[str, Tensor], steps: Sequence[Pass[Any]]) -> Kept | str:
        written = json.loads((self.folder / _STATE).read_text(encoding="utf-8"))
        differing = [name for name, value in self._build.items() if written["build"].get(name) != value]
        if differing:
            return f"it is of another build, whose {' and '.join(differing)} differed"
        reports = tuple(PassReport.model_validate(entry) for entry in written["passes"])
        asked = [(step.name, step.model_dump(mode="json")) for step in steps]
        done = [(report.name, report.fields) for report in reports]
        if done != asked[: len(done)]:
            return f"it is of a build whose first passes were others or had other options ({', '.join(dict(done))})"
        graph, sweep = written["graph"], written["sweep"]
        if sweep is not None and [(sweep["name"], sweep["fields"])] != asked[len(done) : len(done) + 1]:
            if not done:
                return "its first pass was another or had other options"
            self._warn_of(sweep, "the pass that is next here is another or has other options")
            sweep = None
        tables = [entry["tensors"] for entry in (graph, sweep and sweep["graph"]) if entry is not None]
        found = iter(self._store.read(tables, tensors))
        behind = source if graph is None else graph_of(graph, next(found))
        plans = tuple(step.plan_type.model_validate(report.plan) for report, step in zip(reports, steps, strict=False))
        under_way = None if sweep is None else _sweep(sweep, steps[len(done)].plan_type, next(found))
        if under_way is not None:  # once for trial, while there is a way back
            try:
                become(Editor(behind.clone()), under_way.graph, under_way.tensors)
            except SurgeonError as error:
                self._warn_of(sweep, str(error))
                sweep = under_way = None
        self._graph, self._passes = graph, written["passes"]
        self._on_disk = _so_far([name for name, _ in done], _progress(sweep))
        return Kept(behind, plans, reports, under_way, f"taken from a build that was interrupted: {self._on_disk}")

    def _warn_of(self, sweep: Mapping[str, Any], why: str) -> None:
        blocks = _so_far([], _progress(sweep))
        warnings.warn(f"resume: of what {self.folder} holds, {blocks} are not taken: {why}", SurgeonWarning, stacklevel=4)

    def mention_leftover(self) -> None:
        """Say what an interrupted build left, which this one is not to go on with.

        Warns:
            SurgeonWarning: there is something.
        """
        if self.folder.exists():
            size = sum(path.stat().st_size for path in self.folder.rglob("*"))
            warnings.warn(
                f"an interrupted build left {size / 1e6:,.1f} MB in {self.folder}: --resume (resume=True) goes on with it; "
                "this build begins anew, and removes that when its output is there",
                SurgeonWarning,
                stacklevel=3,
            )

    # -- keeping ------------------------------------------------------------------------------------------------

    def sweeping(self, step: Pass[Any], kept: KeptSweep | None = None) -> Sweeping:
        """The next pass begins.

        Args:
            step: the pass.
            kept: what an interrupted build left of it.
        """
        self._sweeping = Sweeping(step, kept, self if self._keeps else None)
        return self._sweeping

    def keep(self, graph: Graph, reports: Sequence[PassReport]) -> None:
        """Keep the graph behind the passes reported on, in place of what was kept before."""
        self._finished, self._sweeping = [report.name for report in reports], None
        if not self._keeps:
            return
        tensors = tensors_of(graph)
        if self.folder.exists():
            self._store.rewrite_sparse(tensors.values())
        self._passes = [report.model_dump(mode="json") for report in reports]
        self._graph = {**graph_data(graph), "tensors": self._store.located(tensors)}
        self._commit(None)

    def keep_sweep(self, state: Mapping[str, Any]) -> None:
        """Keep how far a sweep is, beside what finished passes have left."""
        located = self._store.located(state["tensors"])
        self._commit({name: value for name, value in state.items() if name != "tensors"}
                     | {"graph": {**state["graph"], "tensors": located}})  # fmt: skip

    def _commit(self, sweep: dict[str, Any] | None) -> None:
        self._store.write()
        state = {"build": self._build, "passes": self._passes, "graph": self._graph, "sweep": sweep}
        self.folder.mkdir(parents=True, exist_ok=True)
        write_file(self.folder / _STATE, json.dumps(state) + "\n", lasting=True)
        self._store.keep_only(entry["tensors"] for entry in (self._graph, sweep and sweep["graph"]) if entry is not None)
        self._on_disk = _so_far([report["name"] for report in self._passes], _progress(sweep))

    def rescue(self, error: BaseException) -> None:
        """The build ends here: keep the blocks that were done since the last time, and tell the error how to go on."""
        if self._keeps and self._sweeping is not None:
            try:
                self._sweeping.write()
            except (OSError, SurgeonError) as other:  # a full disk, say: what was kept before is there still
                error.add_note(f"the last blocks could not be kept: {other}")
        under_way = self._sweeping
        done = _so_far(self._finished, None if under_way is None else (under_way.name, under_way.blocks, under_way.of))
        if self._on_disk:
            error.add_note(
                f"kept in {self.folder}: {self._on_disk}; the same build with --resume (resume=True) goes on behind that"
            )
        elif done and not self._keeps:
            error.add_note(
                f"what was done is lost ({done}); with --resume (resume=True) it is kept, and the same build goes on behind it"
            )

    def remove(self) -> None:
        """The output is there: nothing is to be gone on with."""
        shutil.rmtree(self.folder, ignore_errors=True)


def folder_of(output: Path) -> Path:
    """Where a build to this output keeps what it has done."""
    return output.absolute().with_name(f".{output.name}.resume")


def require_output(output: Path | None) -> None:
    """Refuse to keep anything of a build that has no output.

    Raises:
        RecipeError: there is none.
    """
    if output is None:
        raise RecipeError("resume: what has been done is kept beside the output, and there is none; name a folder")


def _sweep(written: Mapping[str, Any], plan_type: type[Plan[Any]], tensors: Mapping[str, Tensor]) -> KeptSweep:
    return KeptSweep(
        blocks=written["blocks"],
        of=written["of"],
        plans=tuple(map(plan_type.model_validate, written["plans"])),
        whole=None if written["whole"] is None else plan_type.model_validate(written["whole"]),
        tokens=written["tokens"],
        matched=tuple(written["matched"]),
        seconds=written["seconds"],
        replaced=written["replaced"],
        graph=written["graph"],
        tensors=tensors,
    )


def _progress(sweep: Mapping[str, Any] | None) -> tuple[str, int, int] | None:
    return None if sweep is None else (sweep["name"], sweep["blocks"], sweep["of"])


def _so_far(passes: Sequence[str], sweep: tuple[str, int, int] | None) -> str:
    """Passes that have finished, and how many blocks of the next one are done; empty for nothing."""
    parts = list(passes)
    if sweep is not None and sweep[2]:
        name, blocks, of = sweep
        parts.append(f"{blocks} of {of} blocks of {name}" if blocks else f"the survey of {name}")
    return ", ".join(parts)


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // _SAMPLED)]


def _digest(tensors: Iterable[torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest_tensor(digest, tensor)
    return digest.hexdigest()
