"""What the command line lists: passes and backends with their options, and what each backend refuses of a model."""

from __future__ import annotations

import inspect
import json
from typing import TYPE_CHECKING

import typer
from rich.table import Column, Table
from rich.text import Text

from surgeon.process import Screen

if TYPE_CHECKING:
    from pydantic import BaseModel


def list_passes() -> None:
    """Print every pass."""
    from surgeon import registry

    table = Table("pass", "from", "what it does", box=None, header_style="bold")
    for line in registry.listing("pass"):
        table.add_row(line.name, line.origin, Text(line.summary, style="red" if line.problem else ""))
    Screen().print(table)


def list_backends(as_json: bool) -> None:
    """Print every backend with what it needs and the devices that are here."""
    from surgeon import registry

    lines = registry.listing("backend")
    devices = {line.name: registry.backend_class(line.name).devices() if line.found is not None else () for line in lines}
    states = {line.name: registry.installation(line.name) if line.found is not None else "" for line in lines}
    if as_json:
        facts = [
            {"name": line.name, "from": line.origin, "needs": states[line.name], "devices": list(devices[line.name]),
             "summary": line.summary, "problem": line.problem}
            for line in lines
        ]  # fmt: skip
        typer.echo(json.dumps(facts, indent=2))
        return
    what = Column("what it is", overflow="fold")
    table = Table("backend", "from", "needs", "devices here", what, box=None, header_style="bold")
    for line in lines:
        summary = Text(line.summary, style="red" if line.problem else "")
        table.add_row(line.name, line.origin, Text(states[line.name]), Text(", ".join(devices[line.name]) or "-"), summary)
    Screen().print(table)


def list_refusals(model: str, as_json: bool, quiet: bool) -> None:
    """Print what every backend would refuse of a model."""
    from surgeon.progress import Progress
    from surgeon.recipe import ModelSpec
    from surgeon.validation import validate

    spec = validate(ModelSpec, {"path": model})

    from surgeon.refusals import grouped
    from surgeon.targets import verdicts
    from surgeon.tracing import trace

    with Progress(not quiet) as bars:
        with bars.step("tracing"):
            graph = trace(spec.source)
        with bars.step("asking the backends"):
            found = verdicts(graph)
    if as_json:
        facts = [
            {"backend": v.backend, "takes": v.takes, "missing": v.missing,
             "refusals": [{"node": r.node, "reason": r.reason} for r in v.refusals]}
            for v in found
        ]  # fmt: skip
        typer.echo(json.dumps(facts, indent=2))
        return
    where, why = Column("where", overflow="fold"), Column("why not", overflow="fold")
    table = Table("backend", "takes it", where, why, box=None, header_style="bold")
    for verdict in found:
        answer = Text("yes", style="green") if verdict.takes else Text("no", style="red")
        table.add_row(verdict.backend, answer, "", Text(verdict.missing or ""))
        for place, reason in grouped(verdict.refusals, graph):
            table.add_row("", "", Text(place), Text(reason))
    Screen().print(table)


def show_options(found: type[BaseModel]) -> None:
    """Documentation and options of a pass or backend."""
    from surgeon import registry

    console = Screen(highlight=False)
    module = inspect.getmodule(found)
    for text in dict.fromkeys((found.__doc__, module.__doc__ if module else None)):
        if text:
            console.print(Text(inspect.cleandoc(text) + "\n"), soft_wrap=True)
    table = Table("field", "type", "default", Column("meaning", overflow="fold"), box=None, header_style="bold")
    for field in registry.fields(found):
        table.add_row(*map(Text, (field.name, field.type, field.default, field.doc)))
    console.print(table)
