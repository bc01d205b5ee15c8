"""The report of a build: what was done to the model, what it cost and what it gained, as plain data.

The data is complete: the terminal's and the HTML page's views are made of it and of nothing else.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from surgeon import formatting
from surgeon.terminal import render_terminal

__all__ = ["Comparison", "Latency", "PassReport", "Report", "render_terminal"]

Phase = Literal["forward", "prefill", "decode"]
Pair = tuple[int, int]
"""A count before and after."""


class _Data(BaseModel):
    """Strict about its fields, and able to carry infinities and NaN (as text) through JSON."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, ser_json_inf_nan="strings")


class PassReport(_Data):
    """What one pass did."""

    name: str
    """Registered name of the pass."""
    fields: dict[str, Any]
    """Its configuration, defaults filled in."""
    summary: str
    """What its plan does, in one line."""
    exact: bool
    """Whether the plan leaves the outputs as they are, which was then checked."""
    seconds: float
    """Wall time of observing, planning and applying."""
    observed_tokens: int
    """Calibration tokens it saw; 0 for a pass that needs no data."""
    parameters: Pair
    """Weights before and after, see ``surgeon.accounting``."""
    active_parameters: Pair
    """Weights that one token uses, before and after."""
    bytes: Pair
    """Bytes of the graph's tensors, before and after."""
    divergence: dict[str, float]
    """How far the model is from the source after this pass, by measure."""
    notes: list[str] = []
    """What the plan wants a reader to know."""
    plan: dict[str, Any] = Field(default_factory=dict)
    """The plan as data; ``decisions`` name the sites it changed."""
    removed_blocks: list[int] = []
    """Indices of the blocks that are gone, counted before this pass."""

    @property
    def sites(self) -> list[str]:
        """Names of the sites that the plan changed, as they were before this pass."""
        return [str(decision["site"]) for decision in self.plan.get("decisions", ()) if "site" in decision]


class Comparison(_Data):
    """The artefact beside the graph it was made from, on one held-back input."""

    shapes: dict[str, list[int]]
    """Shape of every input."""
    relative_error: dict[str, float]
    """By output: norm of the difference over the norm of the graph's output."""
    cosine: dict[str, float]
    """By output: mean cosine similarity of its rows."""


class Latency(_Data):
    """Median wall time of the source model in eager torch and of the artefact, measured in turn."""

    phase: Phase = "forward"
    """One forward without caches; ``prefill``, one into empty caches; ``decode``, one token behind caches of ``length``."""
    batch: int
    """Batch size."""
    length: int | None
    """Sequence length; None where the model has none, as one of images of one size."""
    eager_ms: float
    """Source model in eager torch, milliseconds."""
    artifact_ms: float
    """Artefact, milliseconds."""
    threads: int
    """Threads that either could use."""
    device: str = "cpu"
    """Where both ran, and where their inputs lay."""

    @property
    def ratio(self) -> float:
        """How many times faster the artefact is."""
        return self.eager_ms / self.artifact_ms

    @property
    def title(self) -> str:
        """The case in words; what has but one phase does not name it."""
        return formatting.case_title(self.phase, self.batch, self.length).removeprefix("forward, ")


class Report(_Data):
    """What a build did and measured."""

    surgeon: str
    """Version of surgeon."""
    versions: dict[str, str] = Field(default_factory=dict)
    """Versions of the libraries that took part."""
    model: dict[str, Any] = Field(default_factory=dict)
    """The source: ``description``, ``task``, ``inputs`` and ``outputs``."""
    recipe: dict[str, Any] | None = None
    """The recipe, defaults filled in."""
    structure: dict[str, Any] = Field(default_factory=dict)
    """What was discovered; ``before`` and ``after`` hold ``surgeon.inspection.Inspection.summary``."""
    passes: list[PassReport] = []
    """The passes in the order in which they ran."""
    quality: dict[str, float] = Field(default_factory=dict)
    """The final graph against the source by measure; ``artifact_*`` are the artefact's own figures."""
    bytes: Pair
    """Bytes of the source's tensors, and of the artefact's files."""
    parameters: Pair
    """Weights before and after."""
    active_parameters: Pair
    """Weights that one token uses, before and after."""
    artifact: dict[str, Any] | None = None
    """``folder``, ``backend``, ``options``, ``files`` and ``details``; None without a backend."""
    comparisons: list[Comparison] = []
    """The artefact checked against the graph."""
    latency: list[Latency] = []
    """Artefact against eager torch."""
    seconds: dict[str, float] = Field(default_factory=dict)
    """Wall time by phase; ``total`` is the whole build."""
    device: str = "cpu"
    """Where the model was observed and compared."""
    peak_memory_bytes: int | None = None
    """Largest resident size of the process."""
    warnings: list[str] = []
    """What a reader should know before trusting the figures."""

    def to_json(self) -> str:
        """The report as JSON text; ``from_json`` gives back an equal report."""
        return self.model_dump_json(indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Read what ``to_json`` wrote.

        Raises:
            pydantic.ValidationError: the text is not a report.
        """
        return cls.model_validate_json(text)

    def lowering_table(self) -> list[tuple[str, str]]:
        """What became of the graph in the artefact: nodes, fused ones, the others by kind, bytes, seconds.

        Node counts are those of the runtime's own operators where the backend knows them (``details`` of the artefact:
        ``nodes``, ``fused``, ``operators``); operators of a runtime's own domain (``domain.Name``) are fused kernels.
        """
        if self.artifact is None:
            return []
        details = self.artifact.get("details", {})
        rows = [("nodes", str(details["nodes"]))] if "nodes" in details else []
        for name in ("fused", "experts"):
            found = details.get(name)
            if isinstance(found, dict) and found:
                rows.append((name, _counts(found)))
        if isinstance(types := details.get("types"), dict):
            rows += [("architecture", str(details.get("architecture"))), ("tensors", _counts(types))]
        operators = details.get("operators", {})
        others = {kind: count for kind, count in operators.items() if "." not in kind and kind not in details.get("fused", {})}
        if others:
            rows.append((f"{sum(others.values())} other nodes", _counts(others)))
        left = details.get("dequantized_at_run_time")
        if left:
            rows.append(("dequantized at run time", f"{len(left)} weights"))
        rows.append(("size", formatting.size(sum(file["bytes"] for file in self.artifact["files"]))))
        for phase, name in (("lower", "lowered in"), ("check", "checked in")):
            if phase in self.seconds:
                rows.append((name, formatting.seconds(self.seconds[phase])))
        return rows

    def quality_table(self) -> list[tuple[str, float | None, float | None]]:
        """Quality by measure: name, the graph's figure, the artefact's figure."""
        names = dict.fromkeys(name.removeprefix("artifact_") for name in self.quality)
        return [(name, self.quality.get(name), self.quality.get(f"artifact_{name}")) for name in names]

    def worst_errors(self) -> dict[str, tuple[float, float]]:
        """By output of the artefact: largest relative error and smallest cosine similarity over all comparisons."""
        outputs = dict.fromkeys(name for comparison in self.comparisons for name in comparison.relative_error)
        return {
            name: (
                max(c.relative_error[name] for c in self.comparisons if name in c.relative_error),
                min((c.cosine[name] for c in self.comparisons if name in c.cosine), default=math.nan),
            )
            for name in outputs
        }


def _counts(found: dict[str, int], shown: int = 8) -> str:
    """The most frequent kinds with their counts: ``Reshape 28, Mul 17, 5 of 3 more kinds``."""
    ordered = sorted(found.items(), key=lambda item: -item[1])
    text = [f"{formatting.label(kind).strip()} {count}" for kind, count in ordered[:shown]]
    rest = ordered[shown:]
    return ", ".join(text + ([f"{sum(count for _, count in rest)} of {len(rest)} more kinds"] if rest else []))
