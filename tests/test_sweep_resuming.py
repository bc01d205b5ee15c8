"""Sweeps that are interrupted between two blocks or within one, and gone on with: to the last bit as if they had not been."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import surgeon
from surgeon import resuming
from surgeon.contract import Plan
from surgeon.discovery import discover
from surgeon.errors import PlanError, SurgeonWarning
from surgeon.graph import Graph
from surgeon.passes.quantize import Quantize
from surgeon.pipeline import operate
from surgeon.placement import Placement
from surgeon.progress import Progress
from surgeon.registry import make_pass
from surgeon.report import PassReport
from surgeon.resuming import Journal, Sweeping
from surgeon.tracing import trace
from tests import stand_in_device
from tests.conftest import MODELS, Patient
from tests.family_table import several_streams

CALIBRATION = {"text": str(MODELS / "calibration.txt"), "samples": 6, "length": 32}
GPTQ = {"quantize": {"scheme": "int4", "algorithm": "gptq", "tokens": 64}}


class Build:
    """One pass with a journal, as the pipeline runs it."""

    def __init__(self, patient: Patient, step: dict[str, Any], output: Path, saved: Plan[Any] | None = None) -> None:
        self.patient, self.step, self.journal, self.saved = patient, make_pass(step), Journal(output, True), saved
        self.kept = self.journal.open(patient.graph, patient.data, None, [self.step])
        self.sweeping = self.journal.sweeping(self.step, self.kept.sweep if self.kept is not None else None)

    def run(self, stop: BaseException | None = None) -> tuple[Graph, Plan[Any], int]:
        """Run it; what stops it is known to the journal."""
        patient = self.patient
        try:
            graph, _, plan, tokens = operate(
                self.step, patient.graph, patient.structure, patient.data, self.saved, Progress(False), self.sweeping
            )
            return graph, plan, tokens
        except KeyboardInterrupt as error:
            self.journal.rescue(error)
            raise

    @property
    def files(self) -> dict[str, int]:
        """Files of tensors with their sizes."""
        return {path.name: path.stat().st_size for path in self.journal.folder.glob("*.safetensors")}

    @property
    def state(self) -> dict[str, Any]:
        """What the journal holds."""
        found: dict[str, Any] = json.loads((self.journal.folder / "kept.json").read_text())
        return found


def stopped_behind(blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupt every sweep behind so many blocks."""
    real = Sweeping.passed

    def passed(self: Sweeping, of: int, editor: Any, structure: Any, plans: Any, whole: Any, tokens: int) -> None:
        real(self, of, editor, structure, plans, whole, tokens)
        if len(plans) == blocks:
            raise KeyboardInterrupt

    monkeypatch.setattr(Sweeping, "passed", passed)


def stopped_within(call: int, step: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupt a pass in the middle of its n-th edit: the graph is changed and not yet tidied up."""
    kind, calls = type(make_pass(step)), iter(range(1, 1000))
    real = kind.apply

    def apply(self: Any, *arguments: Any) -> None:
        real(self, *arguments)
        if next(calls) == call:
            raise KeyboardInterrupt

    monkeypatch.setattr(kind, "apply", apply)


def compare(patient: Patient, step: dict[str, Any], output: Path, stop: Callable[[pytest.MonkeyPatch], None]) -> Build:
    """Interrupt a pass and go on with it; the graph, the plan and the tokens are those of a pass without interrupt."""
    made = make_pass(step)
    graph, _, plan, tokens = operate(made, patient.graph, patient.structure, patient.data, None, Progress(False))
    with pytest.MonkeyPatch.context() as patch:
        stop(patch)
        with pytest.raises(KeyboardInterrupt):
            Build(patient, step, output).run()
    build = Build(patient, step, output)
    assert build.kept is not None
    assert build.kept.sweep is not None
    again, same, count = build.run()
    assert again.fingerprint(weights=True) == graph.fingerprint(weights=True)
    assert (again.inputs, again.outputs) == (graph.inputs, graph.outputs)
    assert list(map(str, again.module.graph.nodes)) == list(map(str, graph.module.graph.nodes))
    assert (same, count) == (plan, tokens)
    return build


@pytest.fixture(scope="session")
def llama(shallow_llama: Path) -> Patient:
    return _patient(shallow_llama)


@pytest.fixture(scope="session")
def mixtral() -> Patient:
    return _patient(MODELS / "tiny-mixtral")


def _patient(folder: Path) -> Patient:
    from surgeon.data import load_data
    from surgeon.recipe import Calibration

    graph = trace(folder, dtype="float32")
    return Patient(graph, discover(graph), load_data(Calibration(**CALIBRATION), graph))


@pytest.mark.parametrize(
    ("name", "step", "blocks"),
    [
        ("llama", GPTQ, 1),
        ("llama", {"sparsify": {"pattern": "2:4"}}, 2),
        ("llama", {"low_rank": {"ratio": 0.7}}, 1),
        ("llama", {"smooth": {"tokens": 32}}, 2),
        ("llama", {"drop_heads": {"keep": 2}}, 1),  # caches, which are inputs, become smaller
        ("llama", {"drop_neurons": {"keep": 128}}, 3),
        ("llama", {"moefy_ffn": {"experts": 4, "top_k": 2, "split": "importance", "tokens": 64}}, 1),  # gradients
        ("mixtral", GPTQ, 2),
        ("mixtral", {"sparsify": {"sparsity": 0.5, "tokens": 64}}, 1),
        ("mixtral", {"low_rank": {"ratio": 0.7, "names": ["*.attention.*", "*.ffn.*"]}}, 3),
        ("mixtral", {"quantize": {"scheme": "mixed", "bits": 3, "algorithm": "gptq", "tokens": 64, "embeddings": True}}, 0),
        ("mixtral", {"quantize": {"scheme": "mixed", "bits": 3, "algorithm": "gptq", "tokens": 64, "metric": "site"}}, 4),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else str(value),
)
def test_a_sweep_goes_on_behind_the_blocks_that_were_done(
    name: str, step: dict[str, Any], blocks: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    build = compare(request.getfixturevalue(name), step, tmp_path / "out", partial(stopped_behind, blocks))
    assert build.kept is not None
    assert build.kept.sweep is not None
    assert build.kept.sweep.blocks == blocks


@pytest.mark.parametrize(
    ("name", "stops"),
    [("t5", (2, 4)), ("albert", (1,)), pytest.param("mmdit", (1, 2, 4), marks=pytest.mark.diffusers)],
    ids=["t5", "albert", "mmdit"],
)
def test_streams_one_behind_the_other_and_side_by_side(name: str, stops: tuple[int, ...], tmp_path: Path) -> None:
    family, step = several_streams(name), {"low_rank": {"ratio": 0.7}}
    subject = Patient(family.graph, family.structure, family.data)
    for done in stops:
        compare(subject, step, tmp_path / f"out{done}", partial(stopped_behind, done))


@pytest.mark.slow
@pytest.mark.skipif(not stand_in_device.available(), reason="this torch has no devices written in Python")
def test_on_a_device(shallow_llama: Path, tmp_path: Path) -> None:
    assert stand_in_device.run(_on_a_device, shallow_llama, tmp_path / "out") == 2


def _on_a_device(folder: Path, output: Path) -> int:
    """In the process that has the device."""
    subject = _patient(folder)
    subject.graph.placement = Placement(torch.device(stand_in_device.NAME), None)
    build = compare(subject, GPTQ, output, partial(stopped_behind, 2))
    assert build.kept is not None
    assert build.kept.sweep is not None
    return build.kept.sweep.blocks


@pytest.mark.parametrize("step", [GPTQ, {"low_rank": {"ratio": 0.7}}], ids=lambda step: next(iter(step)))
def test_a_block_that_is_half_done_is_done_anew(step: dict[str, Any], mixtral: Patient, tmp_path: Path) -> None:
    build = compare(mixtral, step, tmp_path / "out", partial(stopped_within, 3, step))
    assert build.kept is not None
    assert build.kept.sweep is not None
    assert build.kept.sweep.blocks == 2


def test_only_what_has_changed_is_written_and_only_once(
    mixtral: Patient, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(resuming, "EVERY", 0.0)
    with pytest.MonkeyPatch.context() as patch:
        stopped_behind(3, patch)
        build = Build(mixtral, GPTQ, tmp_path / "out")
        with pytest.raises(KeyboardInterrupt):
            build.run()
    # int4 codes and a float32 scale for 32 of them, of all linears and experts of three of four blocks
    weights = {site.part.weight for site in mixtral.structure.linears if site.block in (0, 1, 2)}
    weights -= {site.part.weight for site in mixtral.structure.linears if site.name.endswith(".router")}
    weights |= {name for moe in mixtral.structure.moes() if moe.block != 3 for name in (moe.part.w_in, moe.part.w_out)}
    count = sum(mixtral.graph.tensor(name).numel() for name in weights)
    sizes = list(build.files.values())
    assert len(sizes) == 3
    assert count * (4 / 8 + 4 / 32) <= sum(sizes) < 1.05 * count * (4 / 8 + 4 / 32)
    build = Build(mixtral, GPTQ, tmp_path / "out")
    graph, plan, _ = build.run()
    files = build.files
    assert len(files) == 4
    build.journal.keep(graph, [report(plan, GPTQ)])
    assert build.files == files  # all of it was there before the pass had finished
    assert build.state["sweep"] is None


def report(plan: Plan[Any], step: dict[str, Any]) -> PassReport:
    """What the pipeline writes of a pass, as far as a journal reads it."""
    return PassReport(
        name=make_pass(step).name, fields=make_pass(step).model_dump(mode="json"), summary="", exact=False, seconds=0.0,
        observed_tokens=0, parameters=(0, 0), active_parameters=(0, 0), bytes=(0, 0), divergence={}, notes=[],
        plan=plan.model_dump(mode="json"), removed_blocks=[],
    )  # fmt: skip


def test_files_that_are_mostly_of_no_use_any_more_are_written_anew(mixtral: Patient, tmp_path: Path) -> None:
    first = {"sparsify": {"sparsity": 0.5, "criterion": "magnitude"}}
    second = {"quantize": {"scheme": "int4", "names": "*.moe"}}
    one = mixtral.operate(first)
    reports = [report(one.plan, first)]
    two = one.operate(second)
    reports.append(report(two.plan, second))
    build = Build(mixtral, first, tmp_path / "out")
    build.journal.keep(one.graph, reports[:1])
    (before,) = build.files.items()
    build.journal.keep(two.graph, reports)
    (after,) = build.files.items()  # attention's weights once more, beside the codes of experts
    assert after[0] != before[0]
    assert after[1] < before[1] / 2
    kept = Journal(tmp_path / "out", True).open(mixtral.graph, mixtral.data, None, [make_pass(first), make_pass(second)])
    assert kept is not None
    assert kept.graph.fingerprint(weights=True) == two.graph.fingerprint(weights=True)


def test_it_is_written_when_time_has_passed(mixtral: Patient, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    real, written = Journal.keep_sweep, []

    def keep_sweep(self: Journal, state: Any) -> None:
        written.append(state["blocks"])
        real(self, state)

    monkeypatch.setattr(Journal, "keep_sweep", keep_sweep)
    apply = Quantize.apply

    def slow(self: Any, *arguments: Any) -> None:
        now[0] += 0.6 * resuming.EVERY
        apply(self, *arguments)

    monkeypatch.setattr(Quantize, "apply", slow)
    Build(mixtral, GPTQ, tmp_path / "out").run()
    assert written == [2, 4]


@pytest.mark.parametrize("cut", ["weights", "state", "gone"])
def test_half_of_it_is_not_taken(cut: str, mixtral: Patient, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stopped_behind(2, monkeypatch)
    build = Build(mixtral, GPTQ, tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        build.run()
    (weights,) = build.journal.folder.glob("*.safetensors")
    path = build.journal.folder / "kept.json" if cut == "state" else weights
    if cut == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1000])
    with pytest.warns(SurgeonWarning, match="is not taken: it is not whole"):
        assert Build(mixtral, GPTQ, tmp_path / "out").kept is None


def test_an_interrupt_while_it_is_written_leaves_what_was_there(
    mixtral: Patient, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(resuming, "EVERY", 0.0)
    real, calls = resuming.write_file, iter(range(1, 100))

    def write_file(*arguments: Any, **options: Any) -> None:
        if next(calls) == 3:
            raise OSError(28, "No space left on device")
        real(*arguments, **options)

    monkeypatch.setattr(resuming, "write_file", write_file)
    with pytest.raises(OSError, match="No space"):
        Build(mixtral, GPTQ, tmp_path / "out").run()
    build = Build(mixtral, GPTQ, tmp_path / "out")
    assert build.kept is not None
    assert build.kept.sweep is not None
    assert build.kept.sweep.blocks == 2
    assert len(build.files) == 3  # the third is of no state and goes with the next one
    graph, _, _ = build.run()
    whole = mixtral.operate(GPTQ)
    assert graph.fingerprint(weights=True) == whole.graph.fingerprint(weights=True)
    assert len(build.files) == 4


def test_a_saved_plan_is_gone_on_with(mixtral: Patient, tmp_path: Path) -> None:
    whole = mixtral.operate(GPTQ)
    plan = whole.plan.model_copy(update={"decisions": whole.plan.decisions[3:]})
    expected = mixtral.operate(GPTQ, plan).graph
    with pytest.MonkeyPatch.context() as patch:
        stopped_behind(2, patch)
        with pytest.raises(KeyboardInterrupt):
            Build(mixtral, GPTQ, tmp_path / "out", plan).run()
    graph, same, _ = Build(mixtral, GPTQ, tmp_path / "out", plan).run()
    assert same == plan
    assert graph.fingerprint(weights=True) == expected.fingerprint(weights=True)


def test_another_pass_is_begun_anew(mixtral: Patient, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stopped_behind(2, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        Build(mixtral, GPTQ, tmp_path / "out").run()
    with pytest.warns(SurgeonWarning, match="its first pass was another or had other options"):
        assert Build(mixtral, {"quantize": {**GPTQ["quantize"], "scheme": "int8"}}, tmp_path / "out").kept is None


def test_another_pass_behind_those_that_finished_is_begun_anew(mixtral: Patient, tmp_path: Path) -> None:
    first = {"quantize": {"scheme": "int8", "names": "head"}}
    one = mixtral.operate(first)
    steps = [make_pass(first), make_pass(GPTQ)]
    journal = Journal(tmp_path / "out", True)
    journal.open(mixtral.graph, mixtral.data, None, steps)
    journal.keep(one.graph, [report(one.plan, first)])
    sweeping = journal.sweeping(steps[1])
    with pytest.MonkeyPatch.context() as patch:
        stopped_behind(2, patch)
        with pytest.raises(KeyboardInterrupt) as stop:
            operate(steps[1], one.graph, one.structure, one.data, None, Progress(False), sweeping)
    journal.rescue(stop.value)
    other = [steps[0], make_pass({"sparsify": {"pattern": "2:4"}})]
    with pytest.warns(SurgeonWarning, match="2 of 4 blocks of quantize are not taken: the pass that is next here is another"):
        kept = Journal(tmp_path / "out", True).open(mixtral.graph, mixtral.data, None, other)
    assert kept is not None
    assert kept.sweep is None
    assert kept.graph.fingerprint(weights=True) == one.graph.fingerprint(weights=True)
    again = Journal(tmp_path / "out", True).open(mixtral.graph, mixtral.data, None, steps)
    assert again is not None
    assert again.sweep is not None
    assert again.sweep.blocks == 2


@pytest.mark.slow
def test_a_build_goes_on_within_a_pass(tmp_path: Path) -> None:
    steps = [{"drop_experts": {"keep": 6}}, GPTQ]
    options: dict[str, Any] = {"calibration": CALIBRATION, "progress": False}
    whole = surgeon.compile(MODELS / "tiny-mixtral", steps, output=tmp_path / "whole", **options)
    with pytest.MonkeyPatch.context() as patch:
        stopped_behind(2, patch)
        with pytest.raises(KeyboardInterrupt) as stop:
            surgeon.compile(MODELS / "tiny-mixtral", steps, output=tmp_path / "out", resume=True, **options)
    (note,) = stop.value.__notes__
    assert note == (
        f"kept in {tmp_path / '.out.resume'}: drop_experts, 2 of 4 blocks of quantize; the same build with --resume "
        "(resume=True) goes on behind that"
    )
    resumed = surgeon.compile(MODELS / "tiny-mixtral", steps, output=tmp_path / "out", resume=True, **options)
    said = "taken from a build that was interrupted: drop_experts, 2 of 4 blocks of quantize"
    assert said in resumed.report.warnings
    assert resumed.plan == whole.plan
    assert [file.sha256 for file in resumed.artifact.files] == [file.sha256 for file in whole.artifact.files]
    seconds = {"seconds"}
    assert [one.model_dump(exclude=seconds) for one in resumed.report.passes] == [
        one.model_dump(exclude=seconds) for one in whole.report.passes
    ]
    assert not (tmp_path / ".out.resume").exists()


def test_a_failure_says_what_resume_would_have_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, real = iter(range(1, 100)), Quantize.apply

    def apply(self: Any, *arguments: Any) -> None:
        if next(calls) == 3:
            raise PlanError("a weight is not finite")
        real(self, *arguments)

    monkeypatch.setattr(Quantize, "apply", apply)
    with pytest.raises(PlanError, match="not finite") as failed:
        surgeon.compile(
            MODELS / "tiny-mixtral", [GPTQ], output=tmp_path / "out", calibration=CALIBRATION, progress=False
        )  # fmt: skip
    assert failed.value.__notes__ == [
        "what was done is lost (2 of 4 blocks of quantize); with --resume (resume=True) it is kept, and the same build goes on "
        "behind it"
    ]
    assert list(tmp_path.iterdir()) == []
