"""The ``surgeon`` command: arguments in, calls of the library, results on the terminal.  No logic of its own.

Everything heavy is imported inside the commands, so that help appears at once.  What surrounds them is in ``process``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from surgeon.environment import installed_version
from surgeon.errors import RecipeError
from surgeon.listings import list_backends, list_passes, list_refusals, show_options
from surgeon.output import check_writable, write_file
from surgeon.process import Guarded, Screen, run, say

app = typer.Typer(
    cls=Guarded,
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
        typer.echo(f"surgeon {installed_version()}")
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
  surgeon compile recipe.yaml --resume           (again after an interrupt: goes on with the next block)
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
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep what blocks and passes leave until the output is there, and go on with it.")
    ] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    from surgeon.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    if loaded.backend is not None and loaded.output is None and output is None:
        raise RecipeError(f"{recipe}: no output folder; give --output DIR, or output: DIR in the recipe")
    if loaded.backend is None and output is not None:
        raise RecipeError(f"--output {output}: nothing is written with backend null; name a backend, or leave --output out")

    from surgeon.building import compile_recipe
    from surgeon.plans import SavedPlan

    saved = SavedPlan.read(plan) if plan is not None else None
    compiled = compile_recipe(loaded, plan=saved, output=output, force=force, resume=resume, progress=not quiet)
    if as_json:
        typer.echo(compiled.report.to_json())
    elif not quiet:
        from surgeon.report import render_terminal

        render_terminal(compiled.report, Screen())


@app.command(
    help="""Decide what a recipe's passes will do to its model, write that down and change nothing.

A plan is a small JSON file of indices, ranks and scores. Edit it, then repeat it exactly with compile --plan.
A file that holds something else, an edited plan perhaps, is replaced with --force only.

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
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace a file that holds something else.")] = False,
    quiet: Quiet = False,
) -> None:
    """Decide and change nothing."""
    from surgeon.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or ())

    from surgeon.building import plan_recipe
    from surgeon.plans import check_replaceable

    if output is not None:
        check_writable(output)
        if not force:
            check_replaceable(output, loaded.passes)
    saved = plan_recipe(loaded, progress=not quiet)
    if output is None:
        typer.echo(saved.to_json().rstrip("\n"))
    else:
        saved.write(output, force=force)


@app.command(
    help="""Show what a model is made of: blocks, attention, FFNs, experts, and what was not recognised.

\b
Examples:
  surgeon inspect ./my-model
  surgeon inspect my_package.models:build --html model.html
  surgeon inspect org/name --json > structure.json
  surgeon inspect ./config-only --fake-weights
  surgeon inspect ./traced-at-one-length --dynamic 'input_ids=[batch,null]' --dynamic 'attention_mask=[batch,null]'
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
    dynamic: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=DIMENSIONS",
            help="Dimensions of one input that vary, as model.dynamic of a recipe; may be given again.",
            show_default=False,
        ),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Show a model's structure."""
    from surgeon.recipe import ModelSpec, dynamic_options
    from surgeon.validation import validate

    spec = validate(ModelSpec, {"path": model, "task": task, "dtype": dtype, "dynamic": dynamic_options(dynamic or ())})
    if html is not None:
        check_writable(html)

    from surgeon.discovery import discover
    from surgeon.inspection import inspection
    from surgeon.progress import Progress
    from surgeon.tracing import trace

    with Progress(not quiet) as bars:
        with bars.step("tracing"):
            weights = "fake" if fake_weights else "real"
            graph = trace(spec.path, task=spec.task, dtype=spec.dtype, weights=weights, dynamic=spec.dynamic)
        with bars.step("discovering the structure"):
            structure = discover(graph)
    found = inspection(graph, structure)
    if html is not None:
        write_file(html, found.html())
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2))
    elif not quiet:
        found.render(Screen())


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
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-new-tokens", "-n", show_default=False,
            help="Tokens to add at most; 128 by default, or as many as the model has positions for.",
        ),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Draw tokens, the logits divided by this; greedy by default.", show_default=False)
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Draw among so many of the most likely tokens.", show_default=False)
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Draw among the likeliest tokens of this probability.", show_default=False)
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of the draws that the three above ask for.", show_default=False)
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="Stop at this token too (one token of the vocabulary); may be given again.", show_default=False),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Continue a text."""
    from surgeon.compiled import load
    from surgeon.text import continue_text, read_text

    text = prompt if prompt is not None else read_text(sys.stdin)
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
        say("generated", f"{tokens} tokens in {seconds:.2f} s, {tokens / max(seconds, 1e-9):.1f} tokens/s")


@app.command(
    help="""List the passes, or show the options of one.

\b
Examples:
  surgeon passes
  surgeon passes drop_blocks
""",
)
def passes(
    name: Annotated[str | None, typer.Argument(metavar="NAME", show_default=False)] = None,
) -> None:
    """List passes or show one."""
    from surgeon import registry

    if name is not None:
        show_options(registry.pass_class(name))
    else:
        list_passes()


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
    name: Annotated[str | None, typer.Argument(metavar="NAME", show_default=False)] = None,
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
        show_options(registry.backend_class(name))
    elif model is not None:
        list_refusals(model, as_json, quiet)
    else:
        list_backends(as_json)


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
    artifacts: Annotated[list[Path], typer.Argument(metavar="ARTIFACT", help="Output folders.", show_default=False)],
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
            check_writable(file)

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
        write_file(json_file, result.to_json() + "\n")
    if plot is not None:
        write_file(plot, bench_html(result))
    if not quiet:
        render_bench(result, Screen())


@app.command(
    help="""Print the JSON schema of recipes, with every installed pass and backend.

\b
Examples:
  surgeon schema --output recipe.schema.json
  then, as the first line of a recipe, for completion in an editor:
  # yaml-language-server: $schema=recipe.schema.json
""",
)
def schema(output: OutputFile = None) -> None:
    """Print the JSON schema."""
    from surgeon.recipe import recipe_schema

    text = json.dumps(recipe_schema(), indent=2)
    if output is None:
        typer.echo(text)
    else:
        write_file(output, text + "\n")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit.

    Args:
        arguments: what follows the program's name; ``sys.argv`` by default.
    """
    run(app, arguments)
