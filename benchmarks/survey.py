"""Discovery over models that no test holds: what is found, beside what the models' configurations say.

    python benchmarks/survey.py                             every model (an hour or two on one core)
    python benchmarks/survey.py --only 'transformers/b*'    some rows; the others keep what is there
    python benchmarks/survey.py --missing                   rows that were not looked at yet
    python benchmarks/survey.py --mixtures                  only the models whose configurations speak of experts
    python benchmarks/survey.py --dense                     only the others
    python benchmarks/survey.py --passes                    also run passes on what was discovered
    python benchmarks/survey.py --page                      write the page again from what is there

Models are built at tiny size with random weights from configurations that are shrunk by the names of their fields: all types
of models of transformers whose configuration no test names, one model of each family of timm, transformers of diffusers.
Each runs in a process of its own with a time limit.  Writes ``benchmarks/results/survey.json`` and ``survey.md``.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _survey_models
import torch
from _rows import RESULTS, arguments, earlier, is_wanted
from _survey_judge import describe, differences, opaque
from _survey_page import page
from _survey_passes import run_passes

import surgeon
from surgeon.errors import DiscoverError, TraceError
from surgeon.example_inputs import agreed_dims

SECONDS = 150
"""Processor seconds for one model; eight times as many by the clock, for what waits."""


class OutOfTimeError(BaseException):
    """A model took more processor seconds than it may; no :class:`Exception`, which what is run may catch."""


def survey(name: str, passes: bool, fixed: bool = False) -> dict[str, Any]:
    """One row: what was found, or where it ended; ``fixed`` where no size of the inputs is to vary."""
    library, _, model = name.partition("/")
    clock = time.perf_counter()
    try:
        built = _survey_models.BUILDERS[library](model)
    except _survey_models.NotBuilt as error:
        return {"status": "not built", "reason": str(error)}
    row: dict[str, Any] = {"class": type(built.module).__name__, "size": built.shape, "inputs": sorted(built.inputs)}
    row["said"] = [_plain(part) for part in built.parts]
    try:
        graph, row["fixed"] = _traced(built, fixed)
    except TraceError as error:
        return {**row, "status": "not traced", "reason": _line(error), "seconds": _since(clock)}
    try:
        structure = surgeon.discover(graph)
    except DiscoverError as error:
        return {**row, "status": "refused", "reason": _line(error), "seconds": _since(clock)}
    row["found"] = describe(structure)
    row["differs"] = differences(structure, built.parts, built.module, graph)
    row["opaque"] = opaque(structure)
    row["without_role"] = len(structure.unrecognised)
    row["status"] = "differs" if row["differs"] else "opaque" if row["opaque"] else "right"
    row["seconds"] = _since(clock)
    if passes:
        row["passes"] = run_passes(graph, structure)
    return row


def _traced(built: _survey_models.Built, fixed: bool) -> tuple[surgeon.Graph, bool]:
    """The graph, and whether sizes had to be fixed for it."""
    try:
        if not fixed:
            return surgeon.trace(built.module, built.inputs, dynamic=agreed_dims(built.inputs)), False
    except TraceError as error:
        if "dynamic" not in str(error) and "torch.export could not trace" not in str(error):
            raise
    return surgeon.trace(built.module, built.inputs, dynamic=dict.fromkeys(built.inputs)), True


def _plain(part: Any) -> dict[str, Any]:
    said = {key: value for key, value in vars(part).items() if key != "modules" and value not in (set(), True)}
    return {key: sorted(value) if isinstance(value, set) else value for key, value in said.items()}


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:400]


def _since(clock: float) -> float:
    return round(time.perf_counter() - clock, 1)


class _Small(torch.nn.Module):
    """A model that every step of the survey is run on once, so that the processes of the others find all code loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.attend, self.up, self.down = torch.nn.Linear(8, 24), torch.nn.Linear(8, 16), torch.nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(2):
            q, k, v = self.attend(x).chunk(3, dim=-1)
            x = x + torch.nn.functional.scaled_dot_product_attention(q, k, v)
            x = x + self.down(torch.nn.functional.gelu(self.up(x)))
        return x


def _load() -> None:
    import transformers.exporters.exporter_dynamo  # noqa: F401

    inputs = {"x": torch.randn(2, 5, 8)}
    graph = surgeon.trace(_Small().eval(), inputs)
    run_passes(graph, surgeon.discover(graph))


# -- processes ----------------------------------------------------------------------------------------------------


def _late(*_: Any) -> None:
    raise OutOfTimeError


def _place(error: BaseException) -> str:
    """The innermost place of surgeon that was at work, and of the library's model where that was called."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if Path(f.filename).parent.name in ("surgeon", "discovery", "raising", "canonical")]
    model = [f for f in frames if Path(f.filename).name.startswith("modeling_")]
    return ", ".join(f"{Path(f.filename).name}:{f.name}" for f in (*own[-1:], *model[-1:])) or "the model's construction"


def _child(name: str, passes: bool, seconds: int, fixed: bool, end: Any) -> None:
    signal.signal(signal.SIGXCPU, _late)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 20))
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 1)
        if not os.environ.get("SURVEY_SHOW"):
            os.dup2(nothing.fileno(), 2)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    try:
        end.send(survey(name, passes, fixed))
    except OutOfTimeError as error:
        why = f"over {seconds} processor seconds, the last of them in {_place(error)}"
        end.send({"status": "timed out", "reason": why})
    except BaseException as error:  # whatever escapes is a defect, and shown as one
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(where.filename).name}:{where.lineno}"
        end.send({"status": "crashed", "reason": f"{type(error).__name__} at {place}: {_line(error)}"})


def apart(name: str, passes: bool, seconds: int, fixed: bool = False) -> dict[str, Any]:
    """The row of one model, made in a process of its own."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(name, passes, seconds, fixed, sender))
    process.start()
    sender.close()
    late = {"status": "timed out", "reason": f"over {seconds} processor seconds"}
    try:
        row: dict[str, Any] = receiver.recv() if receiver.poll(8 * seconds) else late
    except EOFError:
        process.join()
        out_of_time = process.exitcode in (-signal.SIGXCPU, -signal.SIGKILL)
        row = late if out_of_time else {"status": "crashed", "reason": f"the process ended with {process.exitcode}"}
    process.kill()
    process.join()
    return row


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__, "library/model")
    parser.add_argument("--mixtures", action="store_true", help="only models whose configurations speak of experts")
    parser.add_argument("--dense", action="store_true", help="only the others")
    parser.add_argument("--passes", action="store_true", help="also run passes on every model that was discovered")
    parser.add_argument("--status", nargs="+", help="only rows that ended so before, such as 'differs'")
    parser.add_argument("--fixed", action="store_true", help="at fixed sizes of the inputs, as what times out is tried again")
    parser.add_argument("--page", action="store_true", help="only write the page")
    parser.add_argument("--show", action="store_true", help="print the rows, write nothing")
    parser.add_argument("--seconds", type=int, default=SECONDS, help="processor seconds for one model")
    parser.add_argument("--into", default="survey", help="name of the results' files")
    options = parser.parse_args(argv)
    rows = earlier(f"{options.into}.json")
    if not options.page:
        wanted = [name for name in _survey_models.names() if _is_asked_for(options, name, rows)]
        _load()
        for number, name in enumerate(wanted, 1):
            row = apart(name, options.passes, options.seconds, fixed=options.fixed)
            if row["status"] == "timed out" and not options.fixed:  # loops over chunks take longest where sizes vary
                row = apart(name, options.passes, options.seconds, fixed=True)
            why = row.get("differs") or row.get("opaque") or row.get("reason", "")
            print(f"{number}/{len(wanted)} {name}: {row['status']} {why}"[:300], flush=True)
            if options.show:
                print(json.dumps(row, indent=1))
                continue
            rows = {**earlier(f"{options.into}.json"), name: row}  # others may write other rows
            _write(options.into, rows)
    if not options.show:
        (RESULTS / f"{options.into}.md").write_text(page(rows), encoding="utf-8")


def _is_asked_for(options: argparse.Namespace, name: str, rows: dict[str, Any]) -> bool:
    if not is_wanted(options, name, name in rows):
        return False
    if options.status and rows.get(name, {}).get("status") not in options.status:
        return False
    if options.mixtures or options.dense:
        library, _, model = name.partition("/")
        return (library == "transformers" and _survey_models.is_mixture(model)) == options.mixtures
    return True


def _write(into: str, rows: dict[str, Any]) -> None:
    path = RESULTS / f"{into}.json"
    draft = path.with_suffix(".draft")
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(rows[key])}" for key in sorted(rows))
    draft.write_text("{\n" + lines + "\n}\n", encoding="utf-8")
    draft.replace(path)


if __name__ == "__main__":
    sys.setrecursionlimit(10_000)
    main()
