"""Going on with a build that was interrupted: what its finished passes left is kept beside the output until that is there."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from surgeon.contract import Pass, Plan
from surgeon.data import Data
from surgeon.environment import installed_version
from surgeon.errors import RecipeError, SurgeonError
from surgeon.graph import Graph, digest_tensor
from surgeon.graph_file import load_graph, save_graph
from surgeon.output import write_file
from surgeon.plans import SavedPlan
from surgeon.report import PassReport

_PASSES = "passes.json"
_SAMPLED = 1024
"""Numbers of each weight that tell one model from another of the same graph."""


@dataclass(frozen=True)
class Kept:
    """What was left by the passes that had finished.

    Attributes:
        graph: behind the last of them.
        plans: what each did.
        reports: on each.
    """

    graph: Graph
    plans: tuple[Plan[Any], ...]
    reports: tuple[PassReport, ...]

    @property
    def note(self) -> str:
        """What a reader of the report should know."""
        return f"taken from a build that was interrupted: {', '.join(report.name for report in self.reports)}"


class Journal:
    """A hidden folder beside the output, of one build at a time.

    Attributes:
        folder: of the journal.
    """

    def __init__(self, output: Path | None, source: Graph, data: Data, saved: SavedPlan | None) -> None:
        """Args:
            output: of the build.
            source: the source graph.
            data: what passes observe and results are compared on.
            saved: the plan that is repeated, if any.

        Raises:
            RecipeError: the build has no output folder.
        """
        if output is None:
            raise RecipeError("resume: what finished passes leave is kept beside the output, and there is none; name a folder")
        self.folder = output.absolute().with_name(f".{output.name}.resume")
        batches = (batch for part in (data.calibration, data.held_back) for batch in part)
        self._build = {
            "surgeon": installed_version(),
            "source": source.fingerprint(),
            "weights": _digest(_sample(tensor) for tensor in source.parameters().values()),
            "data": _digest(value for batch in batches for _, value in sorted(batch.items())),
            "plan": None if saved is None else hashlib.sha256(saved.to_json().encode()).hexdigest(),
        }

    def read(self, steps: Sequence[Pass[Any]]) -> Kept | None:
        """What an interrupted build of the same model on the same data kept of the first of these passes; None for nothing."""
        try:
            written = json.loads((self.folder / _PASSES).read_text(encoding="utf-8"))
            reports = tuple(PassReport.model_validate(entry) for entry in written["passes"])
            same = written["build"] == self._build and len(reports) <= len(steps) and all(
                (report.name, report.fields) == (step.name, step.model_dump(mode="json"))
                for report, step in zip(reports, steps, strict=False)
            )  # fmt: skip
            if not same:
                return None
            plans = tuple(step.plan_type.model_validate(report.plan) for report, step in zip(reports, steps, strict=False))
            return Kept(load_graph(self.folder / written["graph"]), plans, reports)
        except (OSError, ValueError, KeyError, TypeError, SurgeonError):
            return None  # nothing was kept, or half of it: the build starts from the beginning

    def keep(self, graph: Graph, reports: Sequence[PassReport]) -> None:
        """Keep the graph behind the passes reported on, in place of what was kept before."""
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"graph.{len(reports)}"
        save_graph(graph, self.folder / name, force=True)
        passes = [report.model_dump(mode="json") for report in reports]
        write_file(self.folder / _PASSES, json.dumps({"build": self._build, "graph": name, "passes": passes}) + "\n")
        for other in self.folder.glob("graph.*"):
            if other.name != name:
                shutil.rmtree(other, ignore_errors=True)

    def remove(self) -> None:
        """The output is there: nothing is to be gone on with."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // _SAMPLED)]


def _digest(tensors: Iterable[torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest_tensor(digest, tensor)
    return digest.hexdigest()
