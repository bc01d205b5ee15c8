"""Terminal views of a report and of an inspection: compact tables that fit 80 columns and read well without colour."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import PurePath
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from surgeon.formatting import figure, heading, label, milliseconds, number, percent, ratio, seconds, size

if TYPE_CHECKING:
    from surgeon.report import PassReport, Report
    from surgeon.views import Inspection, RegionView


_WIDEST = 100
"""Columns that a table takes at most: figures far from their names are hard to read."""


def render_terminal(report: Report, console: Console) -> None:
    """Print a report.

    Args:
        report: the report.
        console: where to; its width is respected, and colour is used where it is a terminal.
    """
    width = min(console.width, _WIDEST)
    backend = report.artifact["backend"] if report.artifact else "torch graph"
    first = Text.assemble(
        ("surgeon ", "bold"),
        (heading(str(report.model.get("description", "model"))), "bold cyan"),
        " to ",
        (backend, "bold cyan"),
    )
    console.print()
    console.print(first)
    facts = [f"{seconds(report.seconds['total'])} in all"] if "total" in report.seconds else []
    facts += [f"observed on {report.device}"] if report.device != "cpu" else []
    facts += [f"peak memory {size(report.peak_memory_bytes)}"] if report.peak_memory_bytes else []
    facts += [f"surgeon {report.surgeon}"]
    console.print(Text(", ".join(facts), "dim"))
    console.print()
    console.print(_totals(report), width=width)
    console.print()
    tables = [
        _latency(report) if report.latency else None,
        _quality(report) if report.quality else None,
        _passes(report.passes) if report.passes else None,
        _lowering(report) if report.artifact else None,
        _check(report) if report.comparisons else None,
    ]
    for table in filter(None, tables):
        console.print(table, width=width)
        console.print()
    _notes(report, console)
    _files(report, console)


def render_inspection(view: Inspection, console: Console) -> None:
    """Print an inspection; runs of equal blocks take one row.

    Args:
        view: what to print.
        console: where to.
    """
    console.print()
    console.print(
        Text.assemble(("surgeon inspect ", "bold"), (heading(str(view.model.get("description", "model"))), "bold cyan"))
    )
    sizes = ", ".join(f"{name} {value}" for name, value in view.sizes.items())
    for ports, direction in ((view.inputs, "in "), (view.outputs, "out")):
        for port in ports:
            shape = ", ".join(str(dim) for dim in port.shape)
            console.print(Text.assemble((f"{direction} ", "dim"), port.name, (f" {port.dtype}[{shape}]", "dim")))
    if view.caution:
        console.print(Text(view.caution, "yellow"))
    console.print()
    table = _table()
    table.add_column("where", no_wrap=True)
    table.add_column("what", ratio=1)
    table.add_column("parameters", justify="right", no_wrap=True)
    table.add_column("FLOPs", justify="right", no_wrap=True)
    lone = len(view.streams) == 1  # otherwise tables are counted with the streams that they stand before
    for embedding in view.embeddings:
        text = f"{embedding.rows} x {embedding.width}" + (f", int{embedding.bits}" if embedding.bits < 16 else "")
        table.add_row(embedding.name, text, number(embedding.parameters) if lone else "", "-" if lone else "")
    listed = sum(embedding.parameters for embedding in view.embeddings)
    if lone:
        _outside(table, "before", view.prefix, max(0, view.prefix.parameters - listed))
    table.add_section()
    for stream in view.streams:
        if not lone:
            table.add_row(f"[bold cyan]{escape(stream.label)}[/]", "", "", "")
            _outside(table, "before", stream.prefix, stream.prefix.parameters)
        _blocks(table, view, stream.label)
        _outside(table, "between", stream.between, stream.between.parameters)
        _outside(table, "after", stream.suffix, stream.suffix.parameters)
        if not lone:
            table.add_section()
    for linear in view.linears:
        text = f"{linear.in_features} > {linear.out_features}" + (f", int{linear.bits}" if linear.bits < 16 else "")
        table.add_row(f"  {escape(linear.name)}", text, "", "")
    _outside(table, "beside", view.context, view.context.parameters)
    if view.shared_parameters:
        table.add_row("tied", "read by several parts, counted once", f"-{number(view.shared_parameters)}", "")
    table.add_section()
    active = f", {number(view.active_parameters)} active" if view.active_parameters != view.parameters else ""
    table.add_row(
        "[bold]total[/]", f"{size(view.bytes)}{active}", f"[bold]{number(view.parameters)}[/]",
        f"[bold]{number(view.flops)}[/]",
    )  # fmt: skip
    console.print(table, width=min(console.width, _WIDEST))
    console.print()
    console.print(Text(f"FLOPs are per token, at {sizes or 'the fixed sizes'} ({view.tokens} tokens)", "dim"))
    if view.unrecognised:
        console.print(Text("not recognised", "bold yellow"))
        for name, reason in view.unrecognised.items():
            console.print(Text.assemble(f"  {name}: ", (reason, "dim")))
    reasons = {f"block {b.index} {r.kind}": r.reason for b, _ in view.folded() for r in b.regions if r.reason}
    for name, reason in reasons.items():
        console.print(Text.assemble((f"  {name}: ", "yellow"), (reason, "dim")))


def _blocks(table: Table, view: Inspection, stream: str) -> None:
    folded = view.folded(stream)
    for block, count in folded:
        where = f"block {block.index}" if count == 1 else f"blocks {block.index}-{block.index + count - 1}"
        each = "" if count == 1 else "each of them" if len(folded) == 1 else f"{count} alike, each"
        flops = number(block.flops) if block.flops else "-"
        table.add_row(f"[bold]{where}[/]", f"[dim]{each}[/]", f"[bold]{number(block.parameters)}[/]", f"[bold]{flops}[/]")
        for region in block.regions:
            table.add_row(f"  {region.kind}", escape(region.describe()), *_counts(region))
        table.add_section()


def _outside(table: Table, where: str, region: RegionView, parameters: int) -> None:
    if region.operators:
        flops = number(region.flops) if region.flops else "-"
        table.add_row(where, f"[dim]{escape(region.describe())}[/]", number(parameters) if parameters else "-", flops)


def _counts(region: RegionView) -> tuple[str, str]:
    text = number(region.parameters)
    if region.active_parameters != region.parameters:
        text += f"\n[dim]{number(region.active_parameters)} active[/]"
    return text, number(region.flops) if region.flops else "-"


def _table(title: str | None = None) -> Table:
    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        expand=True,
        padding=(0, 1),
        show_edge=False,
        pad_edge=False,
    )


def _totals(report: Report) -> Table:
    table = _table()
    table.add_column("", ratio=1)
    for name in ("before", "after", "after / before"):
        table.add_column(name, justify="right", no_wrap=True, min_width=12)
    rows = [
        ("size", report.bytes, size),
        ("parameters", report.parameters, number),
        ("active parameters", report.active_parameters, number),
    ]
    for name, (before, after), form in rows:
        table.add_row(name, form(before), f"[bold]{form(after)}[/]", percent(after, before))
    return table


def _latency(report: Report) -> Table:
    threads = sorted({row.threads for row in report.latency})
    used = f"{'/'.join(map(str, threads))} thread{'' if threads == [1] else 's'}"
    devices = sorted({row.device for row in report.latency} - {"cpu"})
    table = _table(f"latency ({', '.join(['median', *devices, used])})")
    table.add_column("", ratio=1)
    for name in ("eager torch", "artefact", "faster"):
        table.add_column(name, justify="right", no_wrap=True, min_width=12)
    for row in report.latency:
        times = milliseconds(row.eager_ms), f"[bold]{milliseconds(row.artifact_ms)}[/]"
        style = "green" if row.ratio > 1 else "red"
        table.add_row(row.title, *times, f"[bold {style}]{ratio(row.ratio)}[/]")
    return table


def _quality(report: Report) -> Table:
    rows = report.quality_table()
    table = _table("against the source model")
    table.add_column("", ratio=1)
    columns = [
        (title, position)
        for title, position in (("graph, held-back data", 1), ("artefact, evaluation text", 2))
        if any(row[position] is not None for row in rows)
    ]
    for title, _ in columns:
        table.add_column(title, justify="right", no_wrap=True, min_width=12)
    for row in rows:
        values = [row[position] for _, position in columns]
        table.add_row(label(row[0]), *("-" if value is None else figure(value) for value in values))
    return table


def _passes(passes: Iterable[PassReport]) -> Table:
    table = _table("passes")
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("pass", ratio=1)
    for name in ("parameters", "active", "size", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    for index, step in enumerate(passes):
        kind = ("exact", "green") if step.exact else ("lossy", "yellow")
        what = Text.assemble((step.name, "bold"), " ", kind)
        what.append(f"\n{step.summary}")
        if step.divergence:
            measures = "\n".join(f"{label(name)} {figure(value)}" for name, value in step.divergence.items())
            what.append(f"\n{measures}", "dim")
        for note in step.notes:
            what.append(f"\n{note}", "dim italic")
        sizes = number(step.parameters[1]), number(step.active_parameters[1]), size(step.bytes[1])
        table.add_row(str(index + 1), what, *sizes, seconds(step.seconds))
    return table


def _lowering(report: Report) -> Table:
    assert report.artifact is not None
    table = _table(f"lowered to {report.artifact['backend']}")
    table.add_column("", no_wrap=True)
    table.add_column("", ratio=1)
    for name, value in report.lowering_table():
        table.add_row(name, Text(value))
    return table


def _check(report: Report) -> Table:
    runs = len(report.comparisons)
    table = _table(f"artefact against graph ({runs} held-back input{'' if runs == 1 else 's'}, the worst of them)")
    table.add_column("output", ratio=1)
    for name in ("relative error", "cosine"):
        table.add_column(name, justify="right", no_wrap=True, min_width=12)
    for output, (error, cosine) in report.worst_errors().items():
        table.add_row(escape(output), f"{error:.2e}", f"{cosine:.6f}")
    return table


def _notes(report: Report, console: Console) -> None:
    for warning in report.warnings:
        console.print(Text.assemble(("note  ", "bold yellow"), warning))


def _files(report: Report, console: Console) -> None:
    if not report.artifact:
        return
    folder = str(report.artifact["folder"])
    console.print(Text.assemble(("artefact  ", "bold"), (folder, "cyan")), soft_wrap=True)  # a path is never broken
    for file in report.artifact["files"]:
        console.print(Text.assemble(f"          {file['path']} ", (size(file["bytes"]), "dim")), soft_wrap=True)
    page = str(PurePath(folder) / "report.html")
    console.print(Text.assemble(("report    ", "bold"), (page, "cyan")), soft_wrap=True)
