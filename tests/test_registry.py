"""The registry against real distributions: each stranger is a dist-info folder with entry points on ``sys.path``."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field

from surgeon import cli, registry
from surgeon.contract import Pass
from surgeon.errors import RecipeError, RegistryError

REPOSITORY = Path(__file__).parents[1]

GOOD = '''
"""Halve every weight."""
from typing import Annotated, Any, Literal
from pydantic import BaseModel, ConfigDict, Field
from surgeon.contract import Pass, Plan

class HalvePlan(Plan[Any]):
    """Nothing in particular."""

class Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
    size: int = 1
    """Size."""

class Halve(Pass[HalvePlan]):
    """Halve weights.

    More words.
    """
    name = "halve"
    plan_type = HalvePlan
    times: Annotated[int, Field(ge=1)]
    """How often."""
    mode: Literal["round", "floor"] = "round"
    """Rounding."""
    part: Part | None = None
    """A part."""
    parts: tuple[Part, ...] = ()
    """Parts."""
    share: float = 0.5
    """Share."""

    def plan(self, graph, structure, statistics):
        return HalvePlan()

    def apply(self, editor, structure, plan, statistics):
        pass

    def parameter_delta(self, graph, structure, plan):
        return 0
'''

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Install a distribution that registers ``value`` under ``name``; its module holds ``source``."""
    monkeypatch.syspath_prepend(tmp_path)

    def _install(name: str, value: str, source: str, *, kind: str = "passes", distribution: str = "stranger") -> None:
        module = value.partition(":")[0]
        (tmp_path / f"{module}.py").write_text(source)
        info = tmp_path / f"{distribution}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(f"[surgeon.{kind}]\n{name} = {value}\n")
        monkeypatch.delitem(sys.modules, module, raising=False)

    return _install


def test_built_in_names_are_the_files() -> None:
    files = {path.stem for path in (REPOSITORY / "passes").glob("*.py") if not path.stem.startswith("_")}
    assert files <= set(registry.passes())
    files = {path.stem for path in (REPOSITORY / "backends").glob("*.py") if not path.stem.startswith("_")}
    assert files <= set(registry.backends())


def test_every_built_in_keeps_the_contract() -> None:
    lines = [*registry.listing("pass"), *registry.listing("backend")]
    assert [line.problem for line in lines if line.origin == "surgeon" and line.problem] == []
    for line in lines:
        assert line.summary
        assert all(field.doc for field in registry.fields(line.found))  # type: ignore[arg-type]


def test_listing_imports_neither_torch_nor_passes() -> None:
    code = (
        "import sys; from surgeon import recipe, registry; registry.passes(); registry.backends();"
        "print([m for m in sys.modules if m == 'torch' or m.startswith(('surgeon.passes.', 'surgeon.backends.'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_strangers_pass_is_found(install: Install) -> None:
    install("halve", "halving:Halve", GOOD)
    assert "halve" in registry.passes()
    made: Any = registry.make_pass({"halve": {"times": 3, "parts": [{"size": 4}]}})
    assert made.times == 3
    assert made.parts[0].size == 4
    assert registry.make_pass(made) is made
    line = next(line for line in registry.listing("pass") if line.name == "halve")
    assert (line.origin, line.summary, line.problem) == ("stranger 1.2", "Halve weights.", "")


@pytest.mark.parametrize(
    ("name", "value", "source", "message"),
    [
        ("halve", "halving:Halve", "1 / 0\n", "(entry point halving:Halve): ZeroDivisionError: division by zero; "),
        ("halve", "halving:Halves", GOOD, "has no attribute 'Halves'"),
        ("third", "halving:Halve", GOOD, "Halve.name is 'halve', needed 'third'"),
        ("halve", "halving:HalvePlan", GOOD, "is not a subclass of surgeon.contract.Pass"),
        ("halve", "halving:Halve", GOOD.replace("def apply", "def applies"), "Halve does not define apply"),
        ("halve", "halving:Halve", GOOD.replace('    """How often."""\n', ""), "fields without a docstring: times"),
        ("halve", "halving:Halve", GOOD.replace('name = "halve"', ""), "Halve.name is None, needed 'halve'"),
        ("halve", "halving:Halve", GOOD.replace("plan_type = HalvePlan", "plan_type = int"), "plan_type is <class 'int'>"),
        ("halve", "halving:Halve", GOOD.replace('name = "halve"', 'name = "halve"; scope = "all"'), "scope is 'all'"),
        (
            "halve",
            "halving:Halve",
            GOOD.replace('name = "halve"', 'name = "halve"; model_config = ConfigDict(extra="allow")'),
            "must keep frozen=True and extra='forbid'",
        ),
    ],
)
def test_broken_plugin_is_an_error_when_asked_for(install: Install, name: str, value: str, source: str, message: str) -> None:
    install(name, value, source)
    assert name in registry.passes()
    line = next(line for line in registry.listing("pass") if line.name == name)
    assert message in line.problem
    assert line.summary == line.problem
    with pytest.raises(RegistryError) as caught:
        registry.pass_class(name)
    assert message in str(caught.value)
    assert "stranger 1.2" in str(caught.value)


def test_a_plugin_that_fails_to_import_is_one_line(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    install("halve", "halving:Halve", "raise ImportError('no libdream.so.1 ' + 'x' * 500 + '\\nmany\\nwords')\n")
    with pytest.raises(RegistryError) as caught:
        registry.pass_class("halve")
    said = str(caught.value)
    assert said == (
        "pass 'halve' of stranger 1.2 fails to import (entry point halving:Halve): ImportError: no libdream.so.1 "
        f"{'x' * 143}...; update or uninstall stranger; its traceback: python -c \"from halving import Halve\""
    )
    assert isinstance(caught.value.__cause__, ImportError)  # Python shows its traceback
    with pytest.raises(SystemExit) as stop:
        cli.main(["passes", "halve"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: {said}\n"


def test_plugin_may_not_replace_a_built_in(install: Install) -> None:
    install("drop_blocks", "halving:Halve", GOOD)
    with pytest.raises(RegistryError, match=r"registered by surgeon and by stranger 1\.2; stranger 1\.2 may not replace"):
        registry.pass_class("drop_blocks")
    assert registry.passes().count("drop_blocks") == 1


def test_two_strangers_of_one_name(install: Install) -> None:
    install("halve", "halving:Halve", GOOD)
    install("halve", "halving2:Halve", GOOD, distribution="another")
    with pytest.raises(RegistryError, match=r"registered by .* 1\.2 and by .* 1\.2; uninstall all but one"):
        registry.pass_class("halve")


def test_built_in_file_of_another_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import surgeon.passes

    monkeypatch.setattr(surgeon.passes, "__path__", [*surgeon.passes.__path__, str(tmp_path)])
    (tmp_path / "third.py").write_text(GOOD)
    (tmp_path / "both.py").write_text(GOOD + GOOD.replace("class Halve(", "class Halves("))
    (tmp_path / "_private.py").write_text("1 / 0")
    try:
        with pytest.raises(RegistryError, match="Halve.name is 'halve', needed 'third'; the class is called Halve"):
            registry.pass_class("third")
        with pytest.raises(RegistryError, match="must define exactly one pass, named 'both'; it defines Halve, Halves"):
            registry.pass_class("both")
        assert "_private" not in registry.passes()
    finally:
        for name in ("third", "both"):
            sys.modules.pop(f"surgeon.passes.{name}", None)


def test_unknown_names() -> None:
    with pytest.raises(RegistryError, match="unknown pass 'drop_block'; did you mean 'drop_blocks'"):
        registry.pass_class("drop_block")
    with pytest.raises(RegistryError, match="unknown backend 'nonesuch'; known: "):
        registry.backend_class("nonesuch")


@pytest.mark.parametrize(
    ("fields", "messages"),
    [
        ({}, ["halve.times: missing; needed: How often."]),
        ({"times": "2"}, ['halve.times: found "2", needed an integer']),
        ({"times": 2.0}, ["halve.times: found 2.0, needed an integer"]),
        ({"times": True}, ["halve.times: found true, needed an integer"]),
        ({"times": None}, ["halve.times: found null, needed an integer"]),
        ({"times": 0}, ["halve.times: found 0, needed greater than or equal to 1"]),
        ({"times": 1, "mode": "rund"}, ["halve.mode: found \"rund\"; did you mean 'round'? known: floor, round"]),
        ({"times": 1, "share": "half"}, ['halve.share: found "half", needed a number']),
        (
            {"times": 1, "mod": "round"},
            ["halve.mod: unknown key 'mod'; did you mean 'mode'? known: blocks, mode, names, part, parts, share, times"],
        ),
        ({"times": 1, "part": {"sise": 1}}, ["halve.part.sise: unknown key 'sise'; did you mean 'size'? known: size"]),
        ({"times": 1, "parts": [{}, {"size": "x"}]}, ['halve.parts.1.size: found "x", needed an integer']),
        ({"times": 1, "part": 3}, ["halve.part: found 3, needed a mapping of fields"]),
        ({"times": 1, "blocks": 1.5}, ["halve.blocks: found 1.5, needed text or an integer or a list"]),
        ({"times": 1, "blocks": [0, "x"]}, ['halve.blocks.1: found "x", needed an integer']),
        ({"times": 1, "blocks": "a"}, ["halve.blocks: found \"a\": 'a' is not a slice such as '4:', ':-2' or '1:8:2'"]),
        ({"times": 0, "mod": 1}, ["halve.times: found 0", "halve.mod: unknown key"]),
        (3, ["halve: found 3, needed a mapping of fields"]),
        ({"times": object()}, ["halve: not plain data: "]),
    ],
)
def test_wrong_fields_say_what_is_needed(install: Install, fields: Any, messages: list[str]) -> None:
    install("halve", "halving:Halve", GOOD)
    with pytest.raises(RecipeError) as caught:
        registry.make_pass({"halve": fields})
    lines = str(caught.value).splitlines()
    assert len(lines) == len(messages)
    for line, message in zip(lines, messages, strict=True):
        assert line.startswith(message)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({}, "found {}, needed the name of a pass"),
        (3, "found 3, needed the name of a pass"),
        ({"halve": {}, "drop_blocks": {}}, "found a mapping with 2 keys (halve, drop_blocks), needed one pass"),
        ({1: {}}, "needed the name of a pass"),
    ],
)
def test_wrong_entries(item: Any, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        registry.make_pass(item)
    assert message in str(caught.value)


def test_names_without_fields() -> None:
    quantize: Any = registry.make_pass({"quantize": {"scheme": "int8"}})
    assert quantize.scheme == "int8"
    # A bare name and a name with nothing behind it are the pass with its defaults, which lacks what is required.
    for item in ("quantize", {"quantize": None}):
        with pytest.raises(RecipeError, match=r"quantize\.scheme: missing"):
            registry.make_pass(item)


def test_fields_read_as_their_author_would_write_them() -> None:
    class Options(BaseModel):
        a: Annotated[int, Field(ge=1, lt=9)] | None = None
        b: Literal["x", "y"]
        c: list[int] | tuple[str, ...] = Field(default_factory=list, description="A  list\nof things.")
        d: float = Field(0.5, gt=0)
        e: dict[str, Any] = {}

    assert [(f.name, f.type, f.default, f.doc) for f in registry.fields(Options)] == [
        ("a", "int >= 1, < 9 | null", "null", ""),
        ("b", "x | y", "required", ""),
        ("c", "list[int] | tuple[str, ...]", "[]", "A list of things."),
        ("d", "float > 0", "0.5", ""),
        ("e", "dict[str, Any]", "{}", ""),
    ]


BACKEND = '''
"""A backend of paper."""
from surgeon.contract import Backend

class Paper(Backend):
    """Print it."""
    name = "paper"
    sheets: int = 1
    """Sheets."""

    @classmethod
    def requirements(cls):
        return REQUIRED

    @classmethod
    def install(cls):
        return "pip install a-printer"

    def refuses(self, graph):
        return []

    def lower(self, graph, folder):
        raise RuntimeError

    @classmethod
    def load(cls, folder, manifest):
        raise RuntimeError
'''


def test_backends_and_their_libraries(install: Install) -> None:
    install("paper", "papers:Paper", f"REQUIRED = ('pytest', 'no_such.part', 'json')\n{BACKEND}", kind="backends")
    backend: Any = registry.make_backend({"paper": {"sheets": 2}})
    assert backend.sheets == 2
    assert registry.make_backend("paper") == registry.make_backend({"paper": None})
    found = registry.versions(type(backend))
    assert found == {"pytest": pytest.__version__, "no_such.part": None, "json": "unknown"}
    assert registry.installation("paper") == "no_such.part not installed: pip install a-printer"
    with pytest.raises(RecipeError, match="needed one backend: {name: {field: value}}"):
        registry.make_backend({"paper": {}, "onnxruntime": {}})


def test_passes_do_not_lose_their_type() -> None:
    assert issubclass(registry.pass_class("drop_blocks"), Pass)
