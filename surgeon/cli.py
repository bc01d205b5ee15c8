"""The ``surgeon`` command: arguments in, calls of the library, results on the terminal.  No logic of its own.

Exit codes: 0 done; 2 the user's or the model's doing (one message, no traceback); 130 interrupted; 1 a bug of surgeon.
Everything heavy is imported inside the commands, so that help appears at once.
"""

from __future__ import annotations

import errno
import importlib.metadata
import inspect as introspection
import json
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from threading import Timer
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from surgeon.errors import RecipeError, SurgeonError

if TYPE_CHECKING:
    from pydantic import BaseModel

_THE_MACHINES_DOING = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT}
"""System errors that say something about the user's disk, not about a bug."""

_STOPPING = (signal.SIGINT, signal.SIGTERM)
_signals: list[int] = []
"""Requests to stop that have arrived."""


class _Stop(KeyboardInterrupt):
    """A request to stop.

    A class of its own: where a plain ``KeyboardInterrupt`` leaves source text run by ``exec``, which dataclasses and named
    tuples are made of, ``python -m`` ends by SIGINT instead of its exit code, although the interrupt has been caught.
    """


class _Screen(Console):
    """Standard output; a closed pipe is left to the command group instead of ending the process here."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


class _Guarded(TyperGroup):
    """Turns what commands raise on purpose into a line on standard error and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise typer.Exit(_pipe_closed()) from None
        except Exception as error:
            if _signals:  # compiled modules turn an interrupt of their start into errors of their own
                raise _interrupted() from None
            if isinstance(error, SurgeonError):
                _say("error", str(error))
                raise typer.Exit(2) from None
            if isinstance(error, OSError) and error.errno in _THE_MACHINES_DOING:
                _say("error", f"{error.filename or 'a file'}: {error.strerror}")
                raise typer.Exit(2) from None
            raise
        except KeyboardInterrupt:
            raise _interrupted() from None


app = typer.Typer(
    cls=_Guarded,
    name="surgeon",
    rich_markup_mode="rich",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""A compiler for operating on trained models: trace, discover, rewrite, lower.

A recipe (YAML) names a model, the passes to run on it and a backend; a build leaves an artefact with its report.

\b
A first session:
  surgeon inspect ./my-model                what the model is made of
  surgeon passes                            what can be done to it
  surgeon passes quantize                   the options of one pass
  surgeon plan recipe.yaml -o plan.json     decide, and look before it is done
  surgeon compile recipe.yaml               do it
  surgeon generate build/my-model -p "..."  continue a text with it
""",
)

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="PATH=VALUE",
        help="Change one value of the recipe, e.g. passes.0.drop_blocks.count=2; may be given again.",
        show_default=False,
    ),
]
OutputFile = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="FILE", help="Write it here, don't print it.", show_default=False),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print data for programs instead.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"surgeon {_installed_version()}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command(
    "compile",
    help="""Build what a recipe says: run its passes, lower the result, check it and report.

The output folder appears whole or not at all.

\b
Examples:
  surgeon compile recipe.yaml
  surgeon compile recipe.yaml --output build/small --force
  surgeon compile recipe.yaml --set passes.0.drop_blocks.count=4
  surgeon compile recipe.yaml --plan plan.json   (repeat it exactly)
  surgeon compile recipe.yaml --json > report.json
""",
)
def _compile(
    recipe: RecipeFile,
    overrides: Overrides = None,
    plan: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Apply this plan instead of deciding.", show_default=False)
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="Instead of the recipe's.", show_default=False)
    ] = None,
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace an output that exists.")] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    from surgeon.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    if loaded.backend is not None and loaded.output is None and output is None:
        raise RecipeError(f"{recipe}: no output folder; give --output DIR, or output: DIR in the recipe")

    from surgeon.pipeline import compile_recipe
    from surgeon.plans import SavedPlan

    saved = SavedPlan.read(plan) if plan is not None else None
    compiled = compile_recipe(loaded, plan=saved, output=output, force=force, progress=not quiet)
    if as_json:
        typer.echo(compiled.report.to_json())
    elif not quiet:
        from surgeon.report import render_terminal

        render_terminal(compiled.report, _Screen())


@app.command(
    help="""Decide what a recipe's passes will do to its model, write that down and change nothing.

A plan is a small JSON file of indices, ranks and scores. Edit it, then repeat it exactly with compile --plan.

\b
Examples:
  surgeon plan recipe.yaml                      print it
  surgeon plan recipe.yaml --output plan.json
  surgeon compile recipe.yaml --plan plan.json
""",
)
def plan(
    recipe: RecipeFile,
    overrides: Overrides = None,
    output: OutputFile = None,
    quiet: Quiet = False,
) -> None:
    """Decide and change nothing."""
    from surgeon.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or ())

    from surgeon.pipeline import plan_recipe

    if output is not None:
        _check_writable(output)
    saved = plan_recipe(loaded, progress=not quiet)
    if output is None:
        typer.echo(saved.to_json().rstrip("\n"))
    else:
        saved.write(output)


@app.command(
    help="""Show what a model is made of: blocks, attention, FFNs, experts, and what was not recognised.

\b
Examples:
  surgeon inspect ./my-model
  surgeon inspect my_package.models:build --html model.html
  surgeon inspect org/name --json > structure.json
  surgeon inspect ./config-only --fake-weights
""",
)
def inspect(
    model: Annotated[
        str, typer.Argument(help="Directory, hub id or package.module:callable.", metavar="MODEL", show_default=False)
    ],
    as_json: AsJson = False,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a page with a picture of the model.", show_default=False)
    ] = None,
    task: Annotated[str | None, typer.Option(help="What to trace, as model.task of a recipe.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; as stored by default.")] = None,
    fake_weights: Annotated[
        bool, typer.Option("--fake-weights", help="Read no weights, only config.json: any size, no proof by numbers.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Show a model's structure."""
    from surgeon.recipe import ModelSpec
    from surgeon.validation import validate

    spec = validate(ModelSpec, {"path": model, "task": task, "dtype": dtype})
    if html is not None:
        _check_writable(html)

    from surgeon.discovery import discover
    from surgeon.inspection import inspection
    from surgeon.progress import Progress
    from surgeon.tracing import trace

    with Progress(not quiet) as bars:
        with bars.step("tracing"):
            graph = trace(spec.path, task=spec.task, dtype=spec.dtype, weights="fake" if fake_weights else "real")
        with bars.step("discovering the structure"):
            structure = discover(graph)
    found = inspection(graph, structure)
    if html is not None:
        _write(html, found.html())
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2))
    elif not quiet:
        found.render(_Screen())


@app.command(
    help="""Continue a text with an artefact that was built with task text-generation; printed as it comes.

\b
Examples:
  surgeon generate build/my-model --prompt "Once upon a time"
  surgeon generate build/my-model --prompt "def main(" --max-new-tokens 200 --temperature 0.8 --top-p 0.95 --seed 1
  surgeon generate build/my-model < prompt.txt
""",
)
def generate(
    artifact: Annotated[Path, typer.Argument(help="Folder that a build wrote.", metavar="ARTIFACT", show_default=False)],
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="What to continue; standard input by default.", show_default=False)
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="Tokens to add at most.")] = 128,
    temperature: Annotated[
        float | None, typer.Option(help="Draw tokens, the logits divided by this; greedy by default.", show_default=False)
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Draw among so many of the most likely tokens.", show_default=False)
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Draw among the likeliest tokens of this probability.", show_default=False)
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the draws.", show_default=False)] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="Stop at this token too (one token of the vocabulary); may be given again.", show_default=False),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Continue a text."""
    from surgeon.compiled import load
    from surgeon.generation import continue_text

    text = prompt if prompt is not None else sys.stdin.read()
    tokens, seconds = continue_text(
        load(artifact),
        text,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop=stop or (),
        write=lambda piece: typer.echo(piece, nl=False),
    )
    typer.echo()
    if not quiet:
        _say("generated", f"{tokens} tokens in {seconds:.2f} s, {tokens / max(seconds, 1e-9):.1f} tokens/s")


@app.command(
    help="""List the passes, or show the options of one.

\b
Examples:
  surgeon passes
  surgeon passes drop_blocks
""",
)
def passes(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", show_default=False)] = None,
) -> None:
    """List passes or show one."""
    from surgeon import registry

    if name is not None:
        _show_options(registry.pass_class(name))
        return
    table = Table("pass", "from", "what it does", box=None, header_style="bold")
    for line in registry.listing("pass"):
        table.add_row(line.name, line.origin, Text(line.summary, style="red" if line.problem else ""))
    _Screen().print(table)


@app.command(
    help="""List the backends with versions and devices, or show the options of one, or what each refuses of a model.

\b
Examples:
  surgeon backends
  surgeon backends onnxruntime
  surgeon backends --for ./my-model
""",
)
def backends(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", show_default=False)] = None,
    model: Annotated[
        str | None,
        typer.Option("--for", metavar="MODEL", help="What each would refuse of this model.", show_default=False),
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """List backends, show one, or ask them about a model."""
    from surgeon import registry

    if name is not None and model is not None:
        raise RecipeError(f"found the backend {name} and --for {model}; give one of them")
    if name is not None:
        _show_options(registry.backend_class(name))
    elif model is not None:
        _targets(model, as_json, quiet)
    else:
        _list_backends(as_json)


def _list_backends(as_json: bool) -> None:
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
    table = Table("backend", "from", "needs", "devices here", "what it is", box=None, header_style="bold")
    for line in lines:
        summary = Text(line.summary, style="red" if line.problem else "")
        table.add_row(line.name, line.origin, Text(states[line.name]), Text(", ".join(devices[line.name]) or "-"), summary)
    _Screen().print(table)


def _targets(model: str, as_json: bool, quiet: bool) -> None:
    from surgeon.progress import Progress
    from surgeon.recipe import ModelSpec
    from surgeon.validation import validate

    spec = validate(ModelSpec, {"path": model})

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
    table = Table("backend", "takes it", "where", "why not", box=None, header_style="bold")
    for verdict in found:
        answer = Text("yes", style="green") if verdict.takes else Text("no", style="red")
        table.add_row(verdict.backend, answer, "", Text(verdict.missing or ""))
        for refusal in verdict.refusals:
            table.add_row("", "", Text(refusal.node), Text(refusal.reason))
    _Screen().print(table)


@app.command(
    help="""Time artefacts side by side, and beside the source model in eager torch.

All run in turn on equally many threads; prefill and decode are timed apart where an artefact has key/value caches.

\b
Examples:
  surgeon bench build/minilm --against ./my-model --batch 1,32
  surgeon bench build/small build/large --sequence 128,512 --threads 2
  surgeon bench build/small --json bench.json --plot bench.html
""",
)
def bench(
    artifacts: Annotated[list[Path], typer.Argument(metavar="ARTIFACT...", help="Output folders.", show_default=False)],
    against: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Time this model in eager torch, as baseline.", show_default=False)
    ] = None,
    batch: Annotated[str, typer.Option(help="Numbers of rows.")] = "1,32",
    sequence: Annotated[str, typer.Option(help="Lengths.")] = "128",
    threads: Annotated[int | None, typer.Option(min=1, help="For each of them; torch's own by default.")] = None,
    seconds: Annotated[float, typer.Option(min=0.0, help="Time per candidate and case.")] = 2.0,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the figures here.", show_default=False)
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="Write a page with pictures.", show_default=False)
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Time artefacts."""
    from surgeon.bench import sizes

    batches, sequences = sizes(batch, "batch"), sizes(sequence, "sequence")
    for file in (json_file, plot):
        if file is not None:
            _check_writable(file)

    from surgeon.bench import bench_artifacts
    from surgeon.bench_views import bench_html, check_plot, render_bench
    from surgeon.progress import Progress

    if plot is not None:
        check_plot(plot)
    with Progress(not quiet) as bars:
        result = bench_artifacts(
            artifacts, against=against, batches=batches, sequences=sequences, threads=threads, seconds=seconds, step=bars.step
        )
    if json_file is not None:
        _write(json_file, result.to_json() + "\n")
    if plot is not None:
        _write(plot, bench_html(result))
    if not quiet:
        render_bench(result, _Screen())


@app.command(
    help="""Print the JSON schema of recipes, with every installed pass and backend.

\b
Examples:
  surgeon schema --output recipe.schema.json
  then, as the first line of a recipe, for completion in an editor:
  # yaml-language-server: $schema=recipe.schema.json
""",
)
def schema(
    output: OutputFile = None,
) -> None:
    """Print the JSON schema."""
    from surgeon.recipe import recipe_schema

    text = json.dumps(recipe_schema(), indent=2)
    if output is None:
        typer.echo(text)
    else:
        _write(output, text + "\n")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit.

    Args:
        arguments: what follows the program's name; ``sys.argv`` by default.
    """
    _signals.clear()
    code: Any
    hook = sys.unraisablehook
    try:
        for number in _STOPPING:
            signal.signal(number, _interrupt)
        sys.unraisablehook = _unraisable
        code = _run(arguments)
    except KeyboardInterrupt:  # before the command began, or behind it
        code = _interrupted().exit_code
    for number in _STOPPING:  # nothing is left that an interrupt could stop
        signal.signal(number, signal.SIG_IGN)
    sys.unraisablehook = hook
    sys.exit(code)


def _run(arguments: Sequence[str] | None) -> Any:
    """Run the command line; returns the exit code."""
    try:
        app(args=arguments, prog_name="surgeon")
        code: Any = 0
    except SystemExit as stop:
        code = stop.code
    except Exception:
        traceback.print_exc()
        _say("this is a bug in surgeon", f"{_installed_version()}; please report it with the lines above")
        code = 1
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        code = _pipe_closed()
    return code


def _interrupt(number: int, _frame: FrameType | None) -> NoReturn:
    """A polite kill cleans up as Ctrl-C does; repeating it does not cut the cleaning short."""
    for other in _STOPPING:
        signal.signal(other, signal.SIG_IGN)
    _signals.append(number)
    raise _Stop


def _unraisable(lost: Any) -> None:
    """A request to stop that arrives in a finaliser, where Python drops what is raised, is made again."""
    if isinstance(lost.exc_value, _Stop):
        signal.signal(_signals[-1], _interrupt)
        Timer(0.05, os.kill, (os.getpid(), _signals[-1])).start()  # when this function, which drops it too, has returned
    else:
        sys.__unraisablehook__(lost)


def _interrupted() -> typer.Exit:
    _say("interrupted", "")
    return typer.Exit(130)


def _pipe_closed() -> int:
    """The reader of our output has left (``surgeon passes | head -1``): stop as a process ended by SIGPIPE does."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains when it flushes
    return 128 + signal.SIGPIPE


def _say(what: str, message: str) -> None:
    line = Text(what, style="bold red")
    if message:
        line.append(": ").append(Text(message, style="default not bold"))
    Console(stderr=True, soft_wrap=True, highlight=False).print(line)


def _installed_version() -> str:
    try:
        return importlib.metadata.version("surgeon")
    except importlib.metadata.PackageNotFoundError:
        return "(a checkout that is not installed)"


def _show_options(found: type[BaseModel]) -> None:
    """Documentation and options of a pass or backend."""
    from surgeon import registry

    console = _Screen(highlight=False)
    module = introspection.getmodule(found)
    for text in dict.fromkeys((found.__doc__, module.__doc__ if module else None)):
        if text:
            console.print(Text(introspection.cleandoc(text) + "\n"), soft_wrap=True)
    table = Table("field", "type", "default", "meaning", box=None, header_style="bold")
    for field in registry.fields(found):
        table.add_row(*map(Text, (field.name, field.type, field.default, field.doc)))
    console.print(table)


def _check_writable(path: Path) -> None:
    """Refuse a file that cannot be written before minutes of work, not after."""
    if path.is_dir():
        raise RecipeError(f"{path}: is a folder, needed the name of a file")
    if not path.absolute().parent.is_dir():
        raise RecipeError(f"{path}: the folder {path.absolute().parent} does not exist")


def _write(path: Path, text: str) -> None:
    """Write a file that appears whole or not at all."""
    _check_writable(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
