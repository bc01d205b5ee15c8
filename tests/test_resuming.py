"""Builds that are interrupted and gone on with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import surgeon
from surgeon import cli, pipeline
from surgeon.compiled import Compiled
from surgeon.errors import RecipeError, SurgeonWarning
from tests.conftest import MODELS

CALIBRATION = {"text": str(MODELS / "calibration.txt"), "samples": 12, "length": 48}
STEPS: list[dict[str, Any]] = [{"drop_blocks": {"count": 1}}, {"low_rank": {"ratio": 0.7}}, {"quantize": {"scheme": "int8"}}]


class Interrupted:
    """Counts the passes that are run, and ends the process' patience at one of them."""

    def __init__(self, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.model = model
        self.ran: list[str] = []
        self.at: str | None = None
        real = pipeline.operate

        def operate(step: Any, *args: Any) -> Any:
            if step.name == self.at:
                raise KeyboardInterrupt
            self.ran.append(step.name)
            return real(step, *args)

        monkeypatch.setattr(pipeline, "operate", operate)

    def build(self, output: Path, steps: list[dict[str, Any]] | None = None, at: str | None = None, **more: Any) -> list[str]:
        """The passes that a build ran, to the end or to the interrupt."""
        self.ran, self.at = [], at
        options = {"calibration": CALIBRATION, "resume": True, "progress": False, "output": output, **more}
        if at is None:
            self.built: Compiled = surgeon.compile(self.model, steps or STEPS, **options)
        else:
            with pytest.raises(KeyboardInterrupt):
                surgeon.compile(self.model, steps or STEPS, **options)
        return self.ran


@pytest.fixture
def process(shallow_llama: Path, monkeypatch: pytest.MonkeyPatch) -> Interrupted:
    return Interrupted(shallow_llama, monkeypatch)


@pytest.fixture(scope="module")
def left(shallow_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a build to ``out`` was interrupted at its last pass."""
    folder = tmp_path_factory.mktemp("left")
    with pytest.MonkeyPatch.context() as patch:
        process = Interrupted(shallow_llama, patch)
        assert process.build(folder / "out", at="quantize") == ["drop_blocks", "low_rank"]
    return folder


@pytest.fixture
def output(left: Path, tmp_path: Path) -> Path:
    """The output of that build, which is not there yet."""
    shutil.copytree(left, tmp_path, dirs_exist_ok=True)
    return tmp_path / "out"


def test_a_build_goes_on_where_it_was_interrupted(process: Interrupted, output: Path, tmp_path: Path) -> None:
    assert not output.exists()
    state = json.loads((tmp_path / ".out.resume" / "kept.json").read_text())
    assert [report["name"] for report in state["passes"]] == ["drop_blocks", "low_rank"]
    assert process.build(output) == ["quantize"]
    resumed = process.built
    assert not (tmp_path / ".out.resume").exists()
    assert "taken from a build that was interrupted: drop_blocks, low_rank" in resumed.report.warnings

    assert process.build(tmp_path / "whole", resume=False) == ["drop_blocks", "low_rank", "quantize"]
    whole = process.built
    assert resumed.plan == whole.plan
    assert resumed.graph is not None
    assert whole.graph is not None
    assert resumed.graph.fingerprint(weights=True) == whole.graph.fingerprint(weights=True)
    assert resumed.report.quality == whole.report.quality
    skipped = {"seconds"}
    assert [one.model_dump(exclude=skipped) for one in resumed.report.passes] == [
        one.model_dump(exclude=skipped) for one in whole.report.passes
    ]
    ids = torch.arange(12).reshape(2, 6)
    assert torch.equal(resumed.generate(ids, max_new_tokens=5), whole.generate(ids, max_new_tokens=5))


def test_it_goes_on_with_lowering_and_with_other_passes_behind(process: Interrupted, output: Path, tmp_path: Path) -> None:
    other = [*STEPS[:2], {"quantize": {"scheme": "int4"}}]
    assert process.build(output, other, verify={"max_kl": 50.0}) == ["quantize"]
    with pytest.raises(surgeon.SurgeonError, match="max_kl"):
        process.build(tmp_path / "second", STEPS[:1], verify={"max_kl": 1e-9})
    assert process.build(tmp_path / "second", STEPS[:1], verify={"max_kl": 50.0}) == []


@pytest.mark.parametrize(
    ("steps", "more", "why"),
    [
        ([{"drop_blocks": {"count": 2}}, *STEPS[1:]], {}, r"first passes were others or had other options \(drop_blocks"),
        (STEPS, {"calibration": {**CALIBRATION, "seed": 1}}, "another build, whose data differed"),
        (STEPS[:1], {}, r"first passes were others .*low_rank\)"),
    ],
    ids=["another pass", "other data", "fewer passes"],
)
def test_what_another_build_kept_is_not_taken(
    process: Interrupted, output: Path, steps: list[dict[str, Any]], more: dict[str, Any], why: str
) -> None:
    with pytest.warns(SurgeonWarning, match=why):
        assert process.build(output, steps, **more) == [next(iter(step)) for step in steps]
    assert not any("interrupted" in warning for warning in process.built.report.warnings)


def test_half_of_what_was_kept_is_not_taken(process: Interrupted, output: Path, tmp_path: Path) -> None:
    weights = next((tmp_path / ".out.resume").glob("weights.*"))
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.warns(SurgeonWarning, match="it is not whole"):
        assert len(process.build(output)) == 3


def test_without_an_output_there_is_nowhere_to_keep_it(shallow_llama: Path) -> None:
    with pytest.raises(RecipeError, match="resume: .* name a folder"):
        surgeon.compile(shallow_llama, [], calibration=CALIBRATION, resume=True, progress=False)


def test_nothing_is_kept_unless_asked(process: Interrupted, tmp_path: Path) -> None:
    process.build(tmp_path / "out", at="quantize", resume=False)
    assert list(tmp_path.iterdir()) == []


def test_what_is_left_is_mentioned_by_a_build_that_does_not_go_on_with_it(
    process: Interrupted, output: Path, tmp_path: Path
) -> None:
    with pytest.warns(SurgeonWarning, match=r"left \S+ MB in \S+\.out\.resume: --resume .*removes that when its output"):
        process.build(output, at="quantize", resume=False)
    assert (tmp_path / ".out.resume").exists()  # this build came to nothing either
    with pytest.warns(SurgeonWarning, match="left"):
        assert len(process.build(output, resume=False)) == 3
    assert not (tmp_path / ".out.resume").exists()


def test_the_command_line_goes_on_too(
    process: Interrupted, shallow_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {shallow_llama}\ncalibration: {{text: {CALIBRATION['text']}, samples: 8, length: 32}}\n"
        "passes:\n  - drop_blocks: {count: 1}\n  - quantize: {scheme: int8}\noutput: out\n"
    )

    def command(*options: str) -> list[str]:
        with pytest.raises(SystemExit):
            cli.main(["compile", str(recipe), "--quiet", *options])
        out, err = capsys.readouterr()
        assert out == ""
        return str(err).splitlines()

    process.at = "quantize"
    assert command() == [
        "interrupted",
        "what was done is lost (drop_blocks); with --resume (resume=True) it is kept, and the same build goes on behind it",
    ]
    assert command("--resume") == [
        "interrupted",
        f"kept in {tmp_path / '.out.resume'}: drop_blocks; the same build with --resume (resume=True) goes on behind that",
    ]
    process.at, process.ran = None, []
    assert command("--resume") == []
    assert process.ran == ["quantize"]
    assert (tmp_path / "out" / "surgeon.json").exists()
