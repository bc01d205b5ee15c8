"""The flow from a source model to a checked artefact, as one straight function: read :func:`run` from top to bottom."""

from __future__ import annotations

import platform
import resource
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from surgeon.accounting import active_parameter_count, parameter_count
from surgeon.ambient import own_modes
from surgeon.compiled import Compiled, write_outputs
from surgeon.continued import graph_of, source_of
from surgeon.contract import Backend, Pass, Plan
from surgeon.data import Data, load_data
from surgeon.discovery import discover
from surgeon.environment import installed_version, versions_of
from surgeon.errors import LowerError, ObserveError, RecipeError, SurgeonError, TraceError
from surgeon.evaluate import Outputs, Reading, compare
from surgeon.export import Varying
from surgeon.final_check import evaluate_section, text_rows
from surgeon.graph import Graph
from surgeon.inspection import inspection
from surgeon.lowering import lower as lower_and_compare
from surgeon.observe import Batch
from surgeon.output import check_free, staged
from surgeon.placement import Placement, accelerator
from surgeon.plans import PlannedPass, SavedPlan
from surgeon.progress import Progress
from surgeon.recipe import Calibration, Evaluate, Recipe, Verify
from surgeon.refusals import foreseen, refuse
from surgeon.registry import versions
from surgeon.report import Comparison, PassReport, Report
from surgeon.resuming import Journal, Sweeping, require_output
from surgeon.rewrite import Editor
from surgeon.source import load_source
from surgeon.structure import Structure
from surgeon.sweep import run_pass
from surgeon.tracing import trace_source
from surgeon.verify import (
    check_caches,
    check_exact,
    check_finite,
    check_parameters,
    check_structure,
    check_thresholds,
)
from surgeon.zeros import count_zeros, filled_in

_LARGE = 100_000_000
"""Weights from which on running a model on the CPU takes so long that an idle accelerator is worth a word."""


@dataclass(frozen=True)
class Request:
    """Everything a build needs, whatever door it came through.

    Attributes:
        model: directory, hub id, ``"package.module:callable"``, a module, or a graph that was made before.
        steps: the passes in order.
        inputs: example inputs for a module.
        calibration: the recipe's mapping, batches, or None.
        tokenizer: for calibration text, where it is not beside the checkpoint.
        backend: where to lower to; None keeps the graph.
        output: directory for the artefact; None for a temporary one.
        verify: thresholds on the result.
        evaluate: what to measure on the finished artefact.
        task: see ``surgeon.trace``.
        dtype: see ``surgeon.trace``.
        device: where the model is observed and compared, and what is fitted to data computed; see ``surgeon.placement``.
        dynamic: see ``surgeon.trace``.
        trust_remote_code: see ``surgeon.trace``.
        saved: a plan to repeat.
        force: replace an existing output.
        resume: keep what finished passes and blocks leave beside the output, and go on from what an interrupted build kept.
        recipe: the recipe this came from, for the report.
    """

    model: str | Path | nn.Module | Graph | Compiled
    steps: tuple[Pass[Any], ...]
    inputs: Mapping[str, Any] | None = None
    calibration: Calibration | tuple[Batch, ...] | None = None
    tokenizer: Any = None
    backend: Backend | None = None
    output: Path | None = None
    verify: Verify = field(default_factory=Verify)
    evaluate: Evaluate | None = None
    task: str | None = None
    dtype: str | torch.dtype | None = None
    device: str = "cpu"
    dynamic: Varying | None = None
    trust_remote_code: bool = False
    saved: SavedPlan | None = None
    force: bool = False
    resume: bool = False
    recipe: Recipe | None = None


@own_modes()
def run(request: Request, *, progress: bool = True, lower: bool = True) -> Compiled:
    """Trace, discover, run the passes, lower, check and report.

    Args:
        request: what to build.
        progress: show progress on a terminal.
        lower: False stops after the passes (for planning).

    Raises:
        SurgeonError: whatever is wrong with the request, the model or the result; nothing is left half-written.
    """
    clock = _Clock()
    if request.output is not None and lower:
        check_free(request.output, request.force)
    if request.backend is not None and lower:
        _require_installed(request.backend)
    journal = Journal(request.output, request.resume) if request.output is not None and lower else None
    if request.resume and lower:
        require_output(request.output)
    elif journal is not None:
        journal.mention_leftover()
    placement = Placement.of(request.device)
    with Progress(progress) as bars, _rescued(journal), _enough_memory(request.device):
        # source -> canonical graph -> structure
        with bars.step("loading the model"), clock.phase("load"):
            given = graph_of(
                request.model, inputs=request.inputs, task=request.task, dtype=request.dtype, dynamic=request.dynamic,
                trust_remote_code=request.trust_remote_code,
            )  # fmt: skip
            source = source_of(given) if given is not None else load_source(
                request.model,  # type: ignore[arg-type]  # no graph
                request.inputs,
                task=request.task,
                dtype=request.dtype,
                trust_remote_code=request.trust_remote_code,
            )  # fmt: skip
        if source.source.weights == "fake":
            raise TraceError(
                f"{source.source.description} has fake weights: a pass reads weights, and its result is compared with the "
                "model by running both; give the model with its weights"
            )
        _require_host(source.module)
        with bars.step("tracing"), clock.phase("trace"):
            graph = trace_source(source, dynamic=request.dynamic) if given is None else given.clone()
        graph.placement = placement
        with bars.step("discovering the structure"), clock.phase("discover"):
            structure = discover(graph)
        plans = request.saved.matched(graph, request.steps) if request.saved is not None else None
        if request.backend is not None and lower:
            with bars.step(f"asking {request.backend.name}"), clock.phase("foresee"):
                rehearsed, refusals = foreseen(request.backend, graph, request.steps, plans)
                refuse(f"backend {request.backend.name} refuses this model", rehearsed, refusals)
                del rehearsed
        fingerprint = graph.fingerprint()

        # reference outputs, recorded once so that the source's weights can go as they are replaced
        with bars.step("reference outputs"), clock.phase("reference"):
            evaluated = request.evaluate if request.backend is not None and lower else None
            whole = graph.clone() if evaluated is not None and placement is not None else None  # runs the source on the device
            rows = text_rows(evaluated, whole or source.outputs, graph, request.tokenizer) if evaluated is not None else []
            data = load_data(request.calibration, graph, request.tokenizer)
            reading = Reading.of(graph)
            reference = _reference(graph, data)
            report = _new_report(request, graph, structure, data, (*source.notes, *_idle_accelerator(request, graph, data)))

        # the passes, but for those that an interrupted build finished
        applied: list[Plan[Any]] = []
        current = reference
        kept = journal.open(graph, data, request.saved, request.steps) if journal is not None else None
        if kept is not None:
            with bars.step("going on with an interrupted build"), clock.phase("resume"):
                report.warnings.append(kept.note)
                if kept.reports:
                    graph, applied, report.passes = kept.graph, list(kept.plans), list(kept.reports)
                    graph.placement = placement
                    structure, current = discover(graph), _outputs(graph, data.held_back)
        zeros = count_zeros(graph, structure)
        for number, step in enumerate(request.steps):
            if number < len(applied):
                continue
            under_way = kept.sweep if kept is not None and number == len(kept.plans) else None
            sweeping = journal.sweeping(step, under_way) if journal is not None else None
            with bars.step(step.name), clock.phase(f"passes.{number}.{step.name}"):
                before, structure_before = graph, structure
                try:
                    graph, structure, plan, tokens = operate(
                        step, before, structure, data, plans[number] if plans else None, bars, sweeping
                    )
                except SurgeonError as error:
                    done = ", ".join(s.name for s in request.steps[:number]) or "none"
                    raise type(error)(f"passes.{number} ({step.name}): {error} [passes before it: {done}]") from error
            seconds = clock.seconds[f"passes.{number}.{step.name}"] + (under_way.seconds if under_way is not None else 0.0)
            with bars.step(f"{step.name}: verifying"), clock.phase(f"passes.{number}.verify"):
                check_structure(step, structure_before, structure)
                check_parameters(step, plan, before, structure_before, graph)
                check_caches(step, graph, data.held_back)
                previous, current = current, _outputs(graph, data.held_back)
                check_finite(step, previous, current)
                exact = step.exact(plan)
                divergence = {"exact_error": check_exact(step, previous, current)} if exact else {}
                divergence |= compare(reference, _replay(current), data.held_back, reading=reading, real=data.real)
                zeros_before, zeros = zeros, count_zeros(graph, structure)
                lost = filled_in(zeros_before, zeros)
            applied.append(plan)
            report.passes.append(
                PassReport(
                    name=step.name,
                    fields=step.model_dump(mode="json"),
                    summary=step.summary(plan),
                    exact=exact,
                    seconds=seconds,
                    observed_tokens=tokens,
                    parameters=(parameter_count(before), parameter_count(graph)),
                    active_parameters=(active_parameter_count(before), active_parameter_count(graph)),
                    bytes=(before.nbytes(), graph.nbytes()),
                    divergence=divergence,
                    notes=[*plan.notes, *lost],
                    plan=plan.model_dump(mode="json"),
                    removed_blocks=_removed_blocks(structure_before, structure, graph),
                )
            )
            kept = under_way = sweeping = None
            del before, previous
            if journal is not None:
                with bars.step(f"{step.name}: keeping what it left"), clock.phase(f"passes.{number}.keep"):
                    journal.keep(graph, report.passes)

        # thresholds on the result
        quality = compare(reference, _replay(current), data.held_back, reading=reading, real=data.real)
        report.quality = quality
        check_thresholds(request.verify, quality)
        saved = SavedPlan(
            surgeon=report.surgeon,
            model=graph.source.description,
            graph=fingerprint,
            passes=tuple(
                PlannedPass(name=s.name, fields=s.model_dump(mode="json"), plan=p.model_dump(mode="json"))
                for s, p in zip(request.steps, applied, strict=True)
            ),
        )
        report.parameters = (report.parameters[0], parameter_count(graph))
        report.active_parameters = (report.active_parameters[0], active_parameter_count(graph))
        with bars.step("taking stock"):
            view = inspection(graph, structure)
        report.structure["after"] = view.summary()
        graph.placement = None  # what is handed out runs where its weights are
        compiled = Compiled(graph=graph, structure=structure, report=report, plan=saved, recipe=request.recipe)
        if request.backend is None or not lower:
            report.bytes = (report.bytes[0], graph.nbytes())
            if request.evaluate is not None and lower:
                report.warnings.append("evaluate: nothing was measured: it measures the artefact, which no backend has written")
            return _finish(compiled, clock)

        # lower, check the artefact against the graph, evaluate, write
        refuse(f"backend {request.backend.name} refuses this model", graph, request.backend.refuses(graph))
        target = request.output if request.output is not None else compiled.temporary_folder() / "artifact"
        with staged(target, request.force) as folder:
            lowered = lower_and_compare(request.backend, graph, folder, data.held_back, partial(_timed, bars, clock))
            artifact = lowered.artifact
            report.comparisons = [Comparison(**comparison) for comparison in lowered.comparisons]
            report.warnings += lowered.warnings
            if request.recipe is not None:  # says what was built, so that it builds the same again
                compiled.recipe = request.recipe.model_copy(update={"backend": lowered.backend})
                report.recipe = compiled.recipe.model_dump(mode="json")
            report.bytes = (report.bytes[0], artifact.nbytes)
            if request.evaluate is not None and not artifact.unavailable:
                with bars.step("evaluating"), clock.phase("evaluate"):
                    evaluate_section(
                        request.evaluate, source, graph, artifact, report, request.tokenizer, rows, reading, whole, bars
                    )
            report.warnings = [line.replace(str(folder), str(target)) for line in report.warnings]  # where it will lie
            compiled.artifact = artifact
            _finish(compiled, clock)
            with bars.step("writing"):
                write_outputs(compiled, view, folder, target)
        compiled.artifact.move(target)
        if journal is not None:
            journal.remove()
        return compiled


def operate(
    step: Pass[Any], graph: Graph, structure: Structure, data: Data, saved: Plan[Any] | None, bars: Progress,
    sweeping: Sweeping | None = None,
) -> tuple[Graph, Structure, Plan[Any], int]:
    """Run one pass on a clone; the graph handed in stays as it is.

    Args:
        step: the pass.
        graph: what it is applied to.
        structure: of the graph.
        data: what it may observe.
        saved: a plan to repeat instead of planning.
        bars: progress.
        sweeping: see :func:`surgeon.sweep.run_pass`.

    Returns:
        The graph and its structure afterwards, the plan, and how many tokens were observed.

    Raises:
        SurgeonError: the pass refuses, or needs data and there are none.
    """
    clone = graph.clone()
    view = discover(clone)
    view = view.select(step.selection(view))
    editor = Editor(clone)
    plan, tokens = run_pass(step, editor, view, lambda: _required(data, step), saved, bars, sweeping)
    editor.finish()
    return clone, discover(clone), plan, tokens


def _required(data: Data, step: Pass[Any]) -> Sequence[Batch]:
    if not data.calibration:
        raise RecipeError(
            "this pass observes the model on calibration data and none was given: add a calibration section "
            "(calibration: {text: FILE}) or calibration= with an iterable of input dicts"
        )
    return data.calibration


def _require_installed(backend: Backend) -> None:
    """Refuse a backend whose libraries are missing, before any work is done."""
    missing = [library for library, version in versions(type(backend)).items() if version is None]
    if missing:
        raise LowerError(f"backend {backend.name} needs {', '.join(missing)}, not installed: {backend.install()}")


def _idle_accelerator(request: Request, graph: Graph, data: Data) -> list[str]:
    """What there is to say where a large model is observed on the CPU beside an accelerator."""
    found = accelerator()
    if found is None or request.device != "cpu" or not data.calibration or parameter_count(graph) < _LARGE:
        return []
    return [f"the model was run on calibration data on the CPU; device: {found} does that on the accelerator that is here"]


def _require_host(module: nn.Module) -> None:
    """Refuse a model whose weights are on a device: graphs, edits and backends hold them on the host."""
    devices = {str(tensor.device) for tensor in (*module.parameters(), *module.buffers())} - {"cpu"}
    if devices:
        raise TraceError(
            f"the model is on {', '.join(sorted(devices))}, and surgeon holds its weights on the host: hand it over after "
            "model.cpu(), with device='cuda' to run it on calibration data on the GPU"
        )


@contextmanager
def _rescued(journal: Journal | None) -> Iterator[None]:
    """What ends the build says how to go on."""
    try:
        yield
    except BaseException as error:
        if journal is not None:
            journal.rescue(error)
        raise


@contextmanager
def _enough_memory(device: str) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ObserveError(
            f"device {device!r} has too little free memory ({str(error).splitlines()[0]}): give smaller batches "
            "(calibration: {batch: ...}), fewer or shorter samples, or device: cpu"
        ) from error


def _removed_blocks(before: Structure, after: Structure, graph: Graph) -> list[int]:
    """Blocks of which no weight is read any more."""
    if len(after.blocks) == len(before.blocks):
        return []
    alive = set(graph.parameters())
    return [block.index for block in before.blocks if block.weights and not alive.intersection(block.weights)]


def _reference(graph: Graph, data: Data) -> list[Outputs]:
    """Outputs of the source on held-back data; its longest calibration batch is run too, before any pass has worked for it."""
    for number, batch in enumerate((*data.calibration, *(data.held_back if data.real else ()))):
        mask = batch.get("attention_mask")
        if mask is not None and mask.dim() == 2 and not mask.any():
            raise ObserveError(
                f"calibration batch {number}: its attention_mask is 0 everywhere, so that no token counts; 1 marks a token, "
                "0 padding"
            )
    if data.calibration:
        longest = max(data.calibration, key=lambda batch: sum(value.numel() for value in batch.values()))
        try:
            _outputs(graph, [longest])
        except Exception as error:  # the graph ran at several sizes when it was traced: this is the data's doing
            shapes = ", ".join(f"{name} {list(value.shape)} {value.dtype}" for name, value in longest.items())
            raise ObserveError(
                f"the model fails on calibration data of {shapes}: {type(error).__name__}: {str(error).splitlines()[0]}; "
                "give shorter sequences, fewer at once, or values that the model takes"
            ) from error
    return _outputs(graph, data.held_back)


def _outputs(graph: Graph, batches: Sequence[Batch]) -> list[Outputs]:
    with torch.no_grad():
        return [graph(**batch) for batch in batches]


def _replay(recorded: Sequence[Outputs]) -> Any:
    """A callable that hands out recorded outputs in order, whatever its inputs."""
    iterator = iter(recorded)
    return lambda **_: next(iterator)


_LIBRARIES = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime")


def _new_report(request: Request, graph: Graph, structure: Structure, data: Data, notes: Sequence[str]) -> Report:
    return Report(
        surgeon=installed_version(),
        versions={"python": platform.python_version(), **versions_of(*_LIBRARIES)},
        model={
            "description": graph.source.description,
            "task": graph.source.task,
            "inputs": {port.name: [str(size) for size in port.shape] for port in graph.inputs},
            "outputs": {port.name: [str(size) for size in port.shape] for port in graph.outputs},
        },
        recipe=request.recipe.model_dump(mode="json") if request.recipe is not None else None,
        structure={"before": inspection(graph, structure).summary()},
        bytes=(graph.nbytes(), graph.nbytes()),
        device=request.device,
        parameters=(parameter_count(graph), parameter_count(graph)),
        active_parameters=(active_parameter_count(graph), active_parameter_count(graph)),
        warnings=[*notes, *data.notes],
    )


def _finish(compiled: Compiled, clock: _Clock) -> Compiled:
    compiled.report.seconds = clock.total()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    compiled.report.peak_memory_bytes = peak * (1 if platform.system() == "Darwin" else 1024)
    return compiled


@contextmanager
def _timed(bars: Progress, clock: _Clock, title: str, phase: str) -> Iterator[None]:
    with bars.step(title), clock.phase(phase):
        yield


class _Clock:
    """Seconds per phase.

    Attributes:
        seconds: by phase, in the order in which they ended.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._start = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def total(self) -> dict[str, float]:
        return {**self.seconds, "total": time.perf_counter() - self._start}
