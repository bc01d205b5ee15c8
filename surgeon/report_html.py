"""HTML views of a report and of an inspection: one self-contained file each, without scripts or anything external."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from surgeon import formatting
from surgeon.formatting import figure, label, milliseconds, number, size
from surgeon.picture import KINDS, Bar, bars, blocks_picture, model_picture

if TYPE_CHECKING:
    from surgeon.report import Report
    from surgeon.views import Inspection


def render_html(report: Report, inspection: Inspection | None = None) -> str:
    """The report as one HTML page.

    Args:
        report: the report.
        inspection: the rewritten model, drawn along its residual stream; left out when None.
    """
    return _environment().get_template("report.html").render(
        report=report,
        totals=_totals(report),
        totals_chart=_totals_chart(report),
        latency_chart=_latency_chart(report),
        stages_chart=_stages_chart(report),
        divergence_charts=_divergence_charts(report),
        blocks=blocks_picture(report),
        kinds=_kinds(report),
        view=inspection,
        picture=model_picture(inspection) if inspection is not None else None,
    )  # fmt: skip


def render_inspection_html(inspection: Inspection) -> str:
    """An inspection as one HTML page."""
    return _environment().get_template("inspection.html").render(view=inspection, picture=model_picture(inspection))


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("surgeon", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for name in ("number", "size", "milliseconds", "seconds", "ratio", "percent", "figure", "label"):
        environment.filters[name] = getattr(formatting, name)
    environment.filters["heading"] = formatting.heading
    environment.filters["pretty"] = lambda value: json.dumps(value, indent=2, ensure_ascii=False, default=str)
    return environment


def _totals(report: Report) -> list[dict[str, str]]:
    """Figures at the top of the page."""
    tiles = [
        {"name": name, "value": form(after), "note": f"{formatting.percent(after, before)} of {form(before)}"}
        for name, (before, after), form in (
            ("size", report.bytes, size),
            ("parameters", report.parameters, number),
            ("active parameters", report.active_parameters, number),
        )
    ]
    for row in report.latency:
        tiles.append(
            {
                "name": row.title,
                "value": milliseconds(row.artifact_ms),
                "note": f"{formatting.ratio(row.ratio)} {'faster' if row.ratio >= 1 else 'as fast'}",
            }
        )
    quality = {name: artefact if artefact is not None else graph for name, graph, artefact in report.quality_table()}
    if "cosine_similarity" in quality:
        value = figure(quality["cosine_similarity"])
        tiles.append({"name": "cosine similarity", "value": value, "note": "to the source"})
    if "perplexity" in quality:
        note = f"source {figure(quality['perplexity_source'])}" if "perplexity_source" in quality else ""
        tiles.append({"name": "perplexity", "value": figure(quality["perplexity"]), "note": note})
    return tiles


def _totals_chart(report: Report) -> Any:
    rows = (
        ("size", report.bytes, size),
        ("parameters", report.parameters, number),
        ("active", report.active_parameters, number),
    )
    # each pair has its own unit, so each is drawn relative to its own source
    return bars(
        [
            [
                Bar(name, 1.0, form(before), "before", f"{name} before: {before:,}"),
                Bar("", after / before if before else 0.0, form(after), "after", f"{name} after: {after:,}"),
            ]
            for name, (before, after), form in rows
        ],
        "size and parameters before and after",
    )


def _latency_chart(report: Report) -> Any:
    if not report.latency:
        return None
    return bars(
        [
            [
                Bar(
                    row.title if row.length is None else row.title.rpartition(", ")[0],  # the heading names the lengths
                    row.eager_ms / row.eager_ms,
                    milliseconds(row.eager_ms),
                    "before",
                    "eager torch",
                ),
                Bar("", row.artifact_ms / row.eager_ms, milliseconds(row.artifact_ms), "after", "artefact"),
            ]
            for row in report.latency
        ],
        "latency of eager torch and of the artefact",
    )


def _stages_chart(report: Report) -> Any:
    """Bytes after each pass."""
    if not report.passes:
        return None
    stages = [Bar("source", report.bytes[0], size(report.bytes[0]), "before")]
    stages += [Bar(f"{index + 1} {step.name}", step.bytes[1], size(step.bytes[1])) for index, step in enumerate(report.passes)]
    if report.artifact is not None:
        stages.append(Bar("artefact", report.bytes[1], size(report.bytes[1])))
    return bars([stages], "bytes after each pass")


def _divergence_charts(report: Report) -> list[tuple[str, Any]]:
    """By measure: how far each pass leads from the source.  Similarities are drawn as their distance from one."""
    charts = []
    measures = dict.fromkeys(name for step in report.passes for name in step.divergence)
    for measure in (name for name in measures if not name.endswith("_source")):  # the source does not change
        similar = measure.startswith(("cosine", "top1"))
        rows = [
            Bar(
                f"{index + 1} {step.name}",
                1 - step.divergence[measure] if similar else step.divergence[measure],
                figure(1 - step.divergence[measure] if similar else step.divergence[measure]),
                "other" if step.exact else "after",
            )
            for index, step in enumerate(report.passes)
            if measure in step.divergence
        ]
        charts.append((f"1 - {label(measure)}" if similar else label(measure), bars([rows], label(measure))))
    return charts


def _kinds(report: Report) -> list[str]:
    """Kinds of sublayers that the picture of the blocks shows, for its legend."""
    sides = [report.structure.get(side) for side in ("before", "after")]
    found = {r["kind"] if r["kind"] in KINDS else "other" for s in sides if s for b in s["blocks"] for r in b["regions"]}
    return [kind for kind in KINDS if kind in found]
