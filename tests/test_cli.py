"""The command line as a user meets it: what it prints, its exit codes, and what a kill leaves behind."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import surgeon
from surgeon import cli
from surgeon.building import compile_recipe
from surgeon.recipe import load_recipe

ROOT = Path(__file__).parents[1]
MODELS = ROOT / "examples" / "models"
RECIPE = f"""\
model: MODEL
calibration: {{text: {MODELS / "calibration.txt"}, samples: 8, length: 64}}
passes:
  - drop_blocks: {{count: 1}}
  - low_rank: {{ratio: 0.5, method: svd, names: "*.ffn.*"}}
output: out
"""


@dataclass
class Result:
    code: int
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Run the command in this process."""
    monkeypatch.setenv("COLUMNS", "200")
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def call(*arguments: str | Path) -> Result:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return Result(int(stop.value.code or 0), printed.out, re.sub(r"\x1b\[[0-9;]*m", "", printed.err))

    yield call
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def recipe(tmp_path: Path, shallow_llama: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.replace("MODEL", str(shallow_llama)))
    return path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, shallow_llama: Path) -> Path:
    """A folder with a recipe and its output, built once."""
    folder = tmp_path_factory.mktemp("built")
    (folder / "recipe.yaml").write_text(RECIPE.replace("MODEL", str(shallow_llama)))
    compile_recipe(load_recipe(folder / "recipe.yaml"), progress=False)
    return folder


def digests(folder: Path) -> dict[str, str]:
    """Digest of every file below a folder."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def refused(result: Result) -> str:
    """The message of a refusal: exit code 2, one message on standard error, no traceback, nothing on standard output."""
    assert result.code == 2, result.err
    assert "Traceback" not in result.err
    assert result.out == ""
    return result.err


# -- help and listings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["", "compile", "plan", "inspect", "passes", "backends", "schema"])
def test_help_teaches_with_examples(run: Run, command: str) -> None:
    result = run(*command.split(), "--help")
    assert result.code == 0
    assert "surgeon" in result.out
    assert result.out.count("surgeon ") >= 2


def test_version(run: Run) -> None:
    assert run("--version").out.startswith("surgeon 0.")


def test_passes_are_listed_and_explained(run: Run) -> None:
    listing = run("passes").out
    for name in ("drop_blocks", "moefy_ffn", "drop_experts", "merge_experts", "low_rank", "quantize"):
        assert name in listing
        page = run("passes", name).out
        assert "blocks" in page
        assert "names" in page
    assert "did you mean 'drop_blocks'" in refused(run("passes", "drop_block"))


def test_backends_are_listed_and_explained(run: Run) -> None:
    assert "onnxruntime" in run("backends").out
    assert "provider" in run("backends", "onnxruntime").out
    assert "onnxruntime" in refused(run("backends", "onxruntime"))


def test_a_narrow_terminal_loses_no_words(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    for arguments in (["passes"], ["passes", "drop_experts"], ["backends"], ["backends", "onnxruntime"]):
        assert "…" not in run(*arguments).out


def test_schema_is_json(run: Run, tmp_path: Path) -> None:
    printed = json.loads(run("schema").out)
    assert run("schema", "-o", tmp_path / "schema.json").code == 0
    assert json.loads((tmp_path / "schema.json").read_text()) == printed
    assert "drop_blocks" in json.dumps(printed)


# -- inspect ------------------------------------------------------------------------------------------------------------


def test_inspect_prints_json_and_a_page(run: Run, tmp_path: Path, shallow_llama: Path) -> None:
    page = tmp_path / "model.html"
    text = run("inspect", shallow_llama, "--html", page)
    assert text.code == 0
    assert "attention" in text.out
    data = json.loads(run("inspect", shallow_llama, "--json").out)
    weights = load_file(shallow_llama / "model.safetensors")
    assert data["parameters"] == sum(tensor.numel() for tensor in weights.values())
    config = json.loads((shallow_llama / "config.json").read_text())
    assert len(data["blocks"]) == config["num_hidden_layers"]
    assert "<svg" in page.read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["inspect", "./no-such-model"], "no-such-model"),
        (["inspect", "nowhere.at_all:build"], "nowhere"),
        (["inspect", str(MODELS / "tiny-llama"), "--task", "dream"], "dream"),
        (["inspect", str(MODELS / "tiny-llama"), "--dtype", "float12"], "float12"),
        (["inspect", str(MODELS / "tiny-llama"), "--html", "/no/such/folder/x.html"], "/no/such/folder"),
        (["inspect", str(MODELS / "tiny-llama"), "--dynamic", "input_ids"], "needed NAME=DIMENSIONS"),
        (["inspect", str(MODELS / "tiny-llama"), "--dynamic", "input_ids=[batch"], "--dynamic input_ids=[batch:1:"),
        (["inspect", str(MODELS / "tiny-llama"), "--dynamic", "input_ids=[7]"], "dynamic.input_ids.0: found 7"),
        (
            ["inspect", str(MODELS / "tiny-llama"), "--dynamic", "input_ids=[b]", "--task", "forward"],
            "input 'input_ids' has the shape [2, 7], so that 2 names are needed",
        ),
        (["inspect", str(MODELS / "tiny-llama"), "--dynamic", "input_id=[b]", "--task", "forward"], "did you mean 'input_ids'"),
        (["inspect", str(MODELS / "tiny-llama"), "--dynamic", "x=[b]", "--dynamic", "x=[c]"], "x was given before"),
    ],
)
def test_inspect_refuses(run: Run, arguments: list[str], words: str) -> None:
    assert words in refused(run(*arguments))


def test_inspect_fixes_dimensions(run: Run, shallow_llama: Path) -> None:
    fixed = ["--dynamic", "input_ids=[rows,null]", "--dynamic", "attention_mask=[rows,null]"]
    data = json.loads(run("inspect", shallow_llama, "--task", "forward", "--json", *fixed).out)
    shapes = {port["name"]: port["shape"] for port in data["inputs"]}
    length = shapes["input_ids"][1]
    assert isinstance(length, int)
    assert shapes == {"input_ids": ["rows", length], "attention_mask": ["rows", length]}
    graph = surgeon.trace(shallow_llama, task="forward", dynamic={name: {0: "rows"} for name in shapes})
    assert shapes == {port.name: list(port.shape) for port in graph.inputs}


# -- plan and compile ---------------------------------------------------------------------------------------------------


def test_compile_reports_and_leaves_everything(run: Run, recipe: Path) -> None:
    result = run("compile", recipe)
    assert result.code == 0, result.err
    assert "drop_blocks" in result.out
    out = recipe.parent / "out"
    written = {"model.onnx", "surgeon.json", "plan.json", "recipe.yaml", "report.json", "report.html"}
    assert set(os.listdir(out)) == written | {"tokenizer.json", "tokenizer_config.json"}
    assert str(out) in result.out
    assert "exists already" in refused(run("compile", recipe))
    ids = torch.arange(12).reshape(2, 6)
    expected = surgeon.load(out)(input_ids=ids, attention_mask=torch.ones_like(ids))["logits"]
    # the recipe that was dumped builds the same artefact
    again = run("compile", out / "recipe.yaml", "--output", recipe.parent / "again", "--json")
    first, second = (json.loads(text)["passes"] for text in ((out / "report.json").read_text(), again.out))
    assert [step["plan"] for step in second] == [step["plan"] for step in first]
    found = surgeon.load(recipe.parent / "again")(input_ids=ids, attention_mask=torch.ones_like(ids))["logits"]
    assert torch.equal(found, expected)


def test_a_plan_is_written_repeated_edited_and_refused_elsewhere(run: Run, recipe: Path) -> None:
    plan = recipe.parent / "plan.json"
    before = set(os.listdir(recipe.parent))
    assert run("plan", recipe, "-o", plan).code == 0
    assert set(os.listdir(recipe.parent)) == {*before, "plan.json"}
    saved = json.loads(plan.read_text())
    assert run("compile", recipe, "--plan", plan, "--quiet").code == 0
    assert json.loads((recipe.parent / "out" / "plan.json").read_text())["passes"] == saved["passes"]

    saved["passes"][0]["plan"]["decisions"][0]["site"] = "blocks.0"
    plan.write_text(json.dumps(saved))
    assert run("compile", recipe, "--plan", plan, "--force", "--quiet").code == 0
    report = json.loads((recipe.parent / "out" / "report.json").read_text())
    assert report["passes"][0]["removed_blocks"] == [0]

    decisions = saved["passes"][1]["plan"]["decisions"]
    decisions[0]["site"] = decisions[1]["site"]
    plan.write_text(json.dumps(saved))
    message = refused(run("compile", recipe, "--plan", plan, "--force"))
    assert f"{decisions[1]['site']} decided more than once; needed one decision per site" in message
    message = refused(
        run("compile", recipe, "--plan", plan, "--force", "--set", f"model.path={MODELS / 'tiny-mixtral'}")
    )
    assert "plan" in message
    plan.write_text("{")
    assert "plan.json" in refused(run("compile", recipe, "--plan", plan, "--force"))


def test_a_plan_replaces_another_only_where_it_is_told_to(run: Run, recipe: Path) -> None:
    plan = recipe.parent / "plan.json"
    assert run("plan", recipe, "-o", plan).code == 0
    written = plan.read_bytes()
    assert run("plan", recipe, "-o", plan).code == 0  # says the same
    edited = written.replace(b'"site": "blocks.', b'"site": "blocks.9')
    assert edited != written
    plan.write_bytes(edited)
    assert "plan.json: holds other decisions than were made now" in refused(run("plan", recipe, "-o", plan))
    # known before anything is loaded: the model is not there either
    other = ("--set", "model.path=nobody/no-such-model", "--set", "passes.0.drop_blocks.count=2")
    message = refused(run("plan", recipe, "-o", plan, *other))
    assert "holds a plan of other passes or options than the recipe's; name another file, or pass --force" in message
    assert plan.read_bytes() == edited
    assert run("plan", recipe, "-o", plan, "--force").code == 0
    assert plan.read_bytes() == written
    plan.write_text("notes")
    assert "not a plan file" in refused(run("plan", recipe, "-o", plan, *other))
    assert plan.read_text() == "notes"


def test_set_changes_a_value(run: Run, recipe: Path) -> None:
    saved = json.loads(run("plan", recipe, "--set", "passes.0.drop_blocks.count=2", "--set", "passes.1.low_rank.ratio=0.3").out)
    assert saved["passes"][0]["fields"]["count"] == 2
    assert saved["passes"][1]["fields"]["ratio"] == 0.3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("- drop_blocks: {count: 1}", "- drop_block: {count: 1}"), ["recipe.yaml:4:5", "did you mean 'drop_blocks'"]),
        (("count: 1", "cuont: 1"), ["recipe.yaml:4:", "count"]),
        (("count: 1", "count: many"), ["recipe.yaml:4:", "count"]),
        (("count: 1", "count: 60"), ["drop_blocks", "60"]),
        (("calibration:", "calibratoin:"), ["recipe.yaml:2:1", "calibration"]),
        (("calibration.txt", "no-such.txt"), ["recipe.yaml:2:", "no-such.txt"]),
        (("passes:\n", "passes: [\n"), ["recipe.yaml:", "not YAML"]),
        (("output: out", "backend: onxruntime"), ["recipe.yaml:6:", "onnxruntime"]),
        (("output: out", "backend: {onnxruntime: {provider: tpu}}"), ["recipe.yaml:6:", "provider", "cuda"]),
        (("output: out", "verify: {max_kl: 0}\noutput: out"), ["max_kl"]),
        (("output: out\n", ""), ["output"]),
    ],
)
def test_a_wrong_recipe_is_one_clear_error(run: Run, recipe: Path, change: tuple[str, str], words: list[str]) -> None:
    text = recipe.read_text()
    assert change[0] in text
    recipe.write_text(text.replace(*change))
    message = refused(run("compile", recipe))
    for word in words:
        assert word in message
    assert os.listdir(recipe.parent) == ["recipe.yaml"]


def _without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _truncated(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def _pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("break_it", "words"), [(_without_weights, "safetensors"), (_truncated, "model.safetensors"), (_pickled, "pickle")]
)
def test_a_broken_checkpoint_is_one_clear_error(
    run: Run, recipe: Path, shallow_llama: Path, break_it: Callable[[Path], None], words: str
) -> None:
    folder = recipe.parent / "broken"
    shutil.copytree(shallow_llama, folder)
    break_it(folder)
    message = refused(run("compile", recipe, "--set", f"model.path={folder}"))
    assert words in message
    assert sorted(os.listdir(recipe.parent)) == ["broken", "recipe.yaml"]


def test_a_backend_that_is_not_installed_says_how_to_install_it(
    run: Run, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is loaded: the model is not there either."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "onnxruntime" else find(name, *rest))
    message = refused(run("compile", recipe, "--set", "model.path=nobody/no-such-model"))
    assert "onnxruntime" in message
    assert "pip install 'surgeon[cpu]'" in message
    assert os.listdir(recipe.parent) == ["recipe.yaml"]


def test_an_output_without_a_backend_is_refused(run: Run, recipe: Path) -> None:
    message = refused(run("compile", recipe, "--set", "backend=null", "--output", recipe.parent / "other"))
    assert "nothing is written with backend null" in message
    assert os.listdir(recipe.parent) == ["recipe.yaml"]


def test_rows_too_short_for_text_are_refused(run: Run, recipe: Path) -> None:
    """The tokenizer begins each row with a token of its own, and does not cut rows that it leaves no place in."""
    message = refused(run("compile", recipe, "--set", "calibration.length=1"))
    assert re.search(r"calibration.txt: the tokenizer does not cut rows to length 1, they have up to \d+ tokens", message)


def test_an_empty_calibration_file_is_refused(run: Run, recipe: Path) -> None:
    empty = recipe.parent / "empty.txt"
    empty.touch()
    assert "empty" in refused(run("compile", recipe, "--set", f"calibration.text={empty}"))
    assert sorted(os.listdir(recipe.parent)) == ["empty.txt", "recipe.yaml"]


# -- processes --------------------------------------------------------------------------------------------------------


def start(*arguments: str | Path, **options: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "surgeon", *map(str, arguments)], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options,
    )  # fmt: skip


def test_quiet_without_a_terminal(built: Path) -> None:
    """No bar, no colour and no library's chatter where nobody looks; standard output holds the plan alone."""
    process = start("plan", built / "recipe.yaml")
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0
    assert err == ""
    assert json.loads(out)["passes"]


def test_progress_is_shown_on_a_terminal(built: Path) -> None:
    ours, theirs = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TERM": "xterm", "COLUMNS": "100"}
    process = subprocess.Popen(
        [sys.executable, "-m", "surgeon", "plan", str(built / "recipe.yaml")],
        env=environment, stdout=subprocess.PIPE, stderr=theirs,
    )  # fmt: skip
    os.close(theirs)
    shown = b""
    with os.fdopen(ours, "rb", buffering=0) as terminal, contextlib.suppress(OSError):  # EIO: the other end has closed
        while part := terminal.read(65536):
            shown += part
    printed, _ = process.communicate()
    assert process.returncode == 0
    assert json.loads(printed)["passes"]  # what is for programs stays clean
    for step in (b"tracing", b"discovering the structure", b"drop_blocks"):
        assert step in shown


def test_a_reader_that_leaves_is_no_error() -> None:
    process = start("schema")
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    with process.stderr:
        assert process.stderr.read() == ""
    assert process.wait(60) == 128 + signal.SIGPIPE


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
@pytest.mark.parametrize("arguments", [["--help"], ["passes"], ["schema"]], ids=" ".join)
def test_a_full_disk_is_no_bug(arguments: list[str]) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with open("/dev/full", "w") as full:
        found = subprocess.run(
            [sys.executable, "-m", "surgeon", *arguments], env=environment, stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert found.returncode == 2
    assert found.stderr.startswith("error: ")
    assert found.stderr.endswith("No space left on device\n")
    assert "Traceback" not in found.stderr


def test_a_full_disk_is_no_bug_where_a_compiled_library_says_so(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors import SafetensorError

    def fill() -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(cli, "list_passes", fill)
    assert "No space left on device" in refused(run("passes"))


def test_a_closed_standard_output_is_no_bug() -> None:
    command = f"{shlex.quote(sys.executable)} -m surgeon passes >&-"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    found = subprocess.run(["sh", "-c", command], env=environment, stderr=subprocess.PIPE, text=True)
    assert (found.returncode, found.stderr) == (0, "")


def _staging(folder: Path) -> list[Path]:
    return list(folder.glob(".out.building-*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
@pytest.mark.parametrize("moment", ["early", "while writing"])
def test_a_kill_leaves_the_previous_output(built: Path, tmp_path: Path, number: signal.Signals, moment: str) -> None:
    shutil.copytree(built, tmp_path, dirs_exist_ok=True)
    before = digests(tmp_path / "out")
    process = start("compile", tmp_path / "recipe.yaml", "--force", "--set", "passes.0.drop_blocks.count=2")
    deadline = time.monotonic() + 240
    if moment == "early":
        time.sleep(1.5)
    else:
        while not _staging(tmp_path) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert _staging(tmp_path)
    process.send_signal(number)
    _, err = process.communicate(timeout=240)
    assert digests(tmp_path / "out") == before
    if number is signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode in (130, -number), err  # the latter: before the command listens
        assert not _staging(tmp_path)
        assert "this is a bug" not in err
    ids = torch.arange(12).reshape(2, 6)
    assert surgeon.load(tmp_path / "out")(input_ids=ids, attention_mask=torch.ones_like(ids))["logits"].isfinite().all()


_INTERRUPTED = """\
import os, signal
from surgeon import cli, process, registry

interrupt = "import os, signal; os.kill(os.getpid(), signal.SIGTERM); [None for _ in range(100)]"

class Finalised:
    def __del__(self):
        eval(compile(interrupt, "", "exec"))

def listing(kind):
    if kind == "pass":  # in source text that is run, as a dataclass is made
        process.say("beginning", "")
        exec(interrupt)
    else:  # where Python drops what is raised
        Finalised()
    signal.pause()

registry.listing = listing
"""


@pytest.mark.parametrize("command", ["passes", "backends"])
def test_an_interrupt_is_not_lost(tmp_path: Path, command: str) -> None:
    (tmp_path / "interrupted.py").write_text(f"{_INTERRUPTED}cli.main([{command!r}])\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(tmp_path)))}
    found = subprocess.run([sys.executable, "-m", "interrupted"], env=environment, capture_output=True, text=True, timeout=120)
    assert found.returncode == 130, found.stderr
    assert found.stderr.endswith("interrupted\n")


def test_the_next_build_clears_what_a_kill_left(built: Path, tmp_path: Path, run: Run) -> None:
    shutil.copytree(built, tmp_path, dirs_exist_ok=True)
    process = start("compile", tmp_path / "recipe.yaml", "--force")
    while not _staging(tmp_path) and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert _staging(tmp_path)
    assert run("compile", tmp_path / "recipe.yaml", "--force", "--quiet").code == 0
    assert not _staging(tmp_path)
