"""Writing an artefact, and holding it to its graph."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

from surgeon.contract import Artifact, Backend
from surgeon.errors import VerifyError
from surgeon.graph import Graph
from surgeon.observe import Batch
from surgeon.verify import compare_artifact

Timed = Callable[[str, str], AbstractContextManager[Any]]
"""Shows a step by its title, and times it as a phase."""


class Lowered(NamedTuple):
    """What was written.

    Attributes:
        artifact: opened.
        backend: whose it is: the one that was asked for, or one with other options that comes nearer to the graph.
        comparisons: as :func:`surgeon.verify.compare_artifact` returns them.
        warnings: for the report.
    """

    artifact: Artifact
    backend: Backend
    comparisons: list[dict[str, Any]]
    warnings: list[str]


def lower(backend: Backend, graph: Graph, folder: Path, batches: Sequence[Batch], timed: Timed) -> Lowered:
    """Write the artefact and compare it with the graph; where defaults round too much for this graph, with less rounding.

    Args:
        backend: what writes.
        graph: what it must compute.
        folder: empty.
        batches: inputs of several shapes.
        timed: a context for each step.

    Raises:
        LowerError: the backend cannot express the graph.
        VerifyError: the artefact is too far from the graph.
    """
    with timed(f"lowering to {backend.name}", "lower"):
        artifact = backend.lower(graph, folder)
    said: list[str] = artifact.details.get("warnings", [])
    if artifact.unavailable:
        return Lowered(artifact, backend, [], [*said, f"the artefact was not run in this build: {artifact.unavailable}"])
    try:
        with timed("checking the artefact", "check"):
            comparisons = compare_artifact(artifact, graph, batches, backend.accepted_error(graph))
        return Lowered(artifact, backend, comparisons, list(said))
    except VerifyError as error:
        nearer, advice = backend.nearer(graph)
        if nearer is None:
            raise VerifyError(f"{error}{'; ' if advice else ''}{advice}") from None
        problem = f"{error}; {advice}, and was taken"
    del artifact  # closes its files
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    found = lower(nearer, graph, folder, batches, timed)
    return found._replace(warnings=[problem, *found.warnings])
