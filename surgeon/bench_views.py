"""A benchmark on the terminal and as one self-contained HTML page or SVG picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from surgeon.bench import BenchResult, Row
from surgeon.errors import RecipeError
from surgeon.formatting import case_title, milliseconds, number, ratio, size
from surgeon.picture import Bar, bars

FORMATS = (".html",)


def render_bench(result: BenchResult, console: Console) -> None:
    """Print a benchmark; one group of rows per case."""
    console.print()
    threads = f"{result.threads} thread{'' if result.threads == 1 else 's'}"
    machine = ", ".join(result.machine[part] for part in ("gpu", "processor") if part in result.machine)
    console.print(Text.assemble(("surgeon bench ", "bold"), (f"{machine}, {threads}", "dim")))
    console.print(Text(f"medians; ratios to {result.baseline}, round by round", "dim"))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("case, candidate", overflow="fold")
    for name in ("latency", "fastest", "tokens/s", "faster", "size"):
        table.add_column(name, justify="right", no_wrap=True)
    for rows in result.cases():
        table.add_row(Text(title(rows[0]), "bold"))
        for row in rows:
            table.add_row(Text(f"  {row.candidate}"), *_figures(row), size(result.bytes[row.candidate]))
            if row.problem:
                table.add_row(Text(f"  {row.problem}", "yellow"))
        table.add_section()
    console.print(table)


def title(row: Row) -> str:
    """The row's case in words."""
    return case_title(row.phase, row.batch, row.sequence)


def check_plot(path: Path) -> None:
    """Refuse a kind of file that cannot be drawn.

    Raises:
        RecipeError: names the endings that can.
    """
    if path.suffix.lower() not in FORMATS:
        raise RecipeError(f"--plot: {path.name} must end in {' or '.join(FORMATS)}; a page with the picture as SVG is written")


def bench_html(result: BenchResult) -> str:
    """The benchmark as one HTML page."""
    from surgeon.report_html import _environment

    cases = [(title(rows[0]), _chart(rows, result.baseline), rows) for rows in result.cases()]
    page: str = _environment().get_template("bench.html").render(result=result, cases=cases)
    return page


def _chart(rows: Sequence[Row], baseline: str) -> Any:
    """Latencies of one case as bars."""
    measured = [row for row in rows if row.median_ms is not None]
    if not measured:
        return None
    drawn = []
    for row in measured:
        latency = row.median_ms or 0.0
        rate = "" if row.tokens_per_second is None else f", {number(row.tokens_per_second)} tokens/s"
        hover = f"{row.candidate}: median {milliseconds(latency)}{rate}"
        drawn.append(
            Bar(row.candidate, latency, milliseconds(latency), "before" if row.candidate == baseline else "after", hover)
        )
    return bars([drawn], f"latency, {title(measured[0])}")


def _figures(row: Row) -> tuple[str, str, str, Text]:
    if row.median_ms is None or row.min_ms is None:
        return "-", "-", "-", Text("-")
    faster = Text("-") if row.ratio is None else Text(ratio(row.ratio), "green" if row.ratio >= 1 else "red")
    rate = "-" if row.tokens_per_second is None else number(row.tokens_per_second)
    return milliseconds(row.median_ms), milliseconds(row.min_ms), rate, faster
