"""Recipes: what to do to a model, as YAML.  YAML to ``Recipe`` and back, the JSON schema, and the errors in between.

``load_recipe`` reports everything that is wrong with a file at once, each as ``file:line:column: message``.  A
``Recipe`` holds pass and backend objects; ``dump_recipe`` writes it with its defaults filled, and that text loads as an
equal recipe.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, field_validator, model_validator

from surgeon import registry
from surgeon.document import Document, dump, parse, read
from surgeon.errors import RecipeError, RegistryError
from surgeon.recipe_paths import locate, located_fields, package_folder
from surgeon.registry import Kind
from surgeon.validation import InvalidFields, Problem, fields_at, shown, validate
from surgeon.validation import Path as Steps

DEFAULT_BACKEND = "onnxruntime"

Unit = Literal["window", "line"]


def _as_pass(item: Any) -> Any:
    return registry.make_pass(item)


def _as_backend(item: Any) -> Any:
    return None if item is None else registry.make_backend(item)


def _as_entry(item: Any) -> Any:
    """A pass or backend as the one-key mapping that makes it again."""
    return None if item is None else {item.name: item.model_dump(mode="json")}


def _as_model(item: Any) -> Any:
    return {"path": item} if isinstance(item, str) else item


if TYPE_CHECKING:
    from surgeon.contract import Backend, Pass

    PassEntry: TypeAlias = Pass[Any]
    BackendEntry: TypeAlias = Backend | None
else:
    # The classes themselves import torch, which reading a module of settings should not.
    PassEntry = Annotated[Any, BeforeValidator(_as_pass), PlainSerializer(_as_entry)]
    BackendEntry = Annotated[Any, BeforeValidator(_as_backend), PlainSerializer(_as_entry)]


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class ModelSpec(_Settings):
    """The source model."""

    path: str
    """Directory of a checkpoint, hub id or "package.module:callable"; with ``package``, a folder inside it."""
    package: str | None = None
    """Installed Python package whose data holds the model."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Floating-point type to load the weights as; as stored by default."""
    task: str | None = None
    """What to trace: "forward" is the model as it is called, without caches, "text-generation" a causal language model or an
    encoder-decoder with them; by default what a checkpoint's architecture is for."""
    dynamic: dict[str, list[str | None]] | None = None
    """Names of all dimensions of each input named here, null where one is fixed: {input_ids: [batch, null]}; by default the
    batch varies, and the sequence of integer inputs."""
    trust_remote_code: bool = False
    """Run Python code that comes with the checkpoint."""

    @field_validator("package")
    @classmethod
    def _package_is_a_name(cls, value: str | None) -> str | None:
        if value is not None and not value.isidentifier():
            raise ValueError("not the import name of a top-level Python package")
        return value

    @model_validator(mode="after")
    def _stays_inside_package(self) -> ModelSpec:
        inner = PurePosixPath(self.path)
        if self.package is not None and (inner.is_absolute() or ".." in inner.parts):
            raise ValueError(f"path {self.path!r} must be a folder inside the package {self.package}")
        return self

    @property
    def source(self) -> str:
        """What to trace: a directory, a hub id or "package.module:callable".

        Raises:
            RecipeError: the package is not installed, or has no such folder.
        """
        return self.path if self.package is None else str(package_folder(self.package, self.path))


class Calibration(_Settings):
    """Data that passes may look at."""

    text: Path
    """Text file; relative paths start at the recipe's folder."""
    unit: Unit = "window"
    """What one sequence is: a window of the whole text, or one line of it."""
    samples: int = Field(128, ge=1)
    """Number of sequences to take."""
    length: int = Field(512, ge=1)
    """Tokens per sequence; longer lines are cut."""
    pad: Literal["batch", "length"] = "batch"
    """Shorter sequences are padded to the longest one of their batch, or all to ``length``."""
    batch: int = Field(8, ge=1)
    """Sequences per forward run."""
    seed: int = Field(0, ge=0, lt=2**64)
    """Seed of the choice of sequences, and of every pass that draws numbers."""


class Verify(_Settings):
    """Limits that the result must keep; a build that does not is refused."""

    max_kl: float | None = Field(None, ge=0, allow_inf_nan=False)
    """Largest mean Kullback-Leibler divergence of the output distributions from the original's, in nats per token."""
    max_relative_error: float | None = Field(None, ge=0, allow_inf_nan=False)
    """Largest relative error of the outputs against the original's (norm of the difference over norm)."""
    min_cosine: float | None = Field(None, ge=-1, le=1)
    """Smallest mean cosine similarity of the outputs to the original's."""
    max_perplexity_ratio: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Largest perplexity over the original's."""


class Evaluate(_Settings):
    """What the report measures beside the build's own checks."""

    text: Path | None = None
    """Text file on which the artefact is compared with the original; relative paths start at the recipe's folder."""
    unit: Unit = "line"
    """What one sequence is: a window of the whole text, or one line of it."""
    latency: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Batch sizes at which the original in torch and the artefact are timed, where the artefact runs."""
    length: int = Field(128, ge=1)
    """Tokens per sequence; longer lines are cut."""
    threads: int | None = Field(None, ge=1)
    """Threads for both sides when timing; all cores by default."""


class Recipe(_Settings):
    """A model, the passes to run on it in this order, and where the result goes."""

    model: Annotated[ModelSpec, BeforeValidator(_as_model)]
    """The source model: a path, hub id or "package.module:callable", or a mapping with more options."""
    calibration: Calibration | None = None
    """Data for passes that measure."""
    passes: tuple[PassEntry, ...] = ()
    """Passes in the order they run: names, or one-key mappings of a name to its fields."""
    verify: Verify | None = None
    """Limits that the result must keep."""
    evaluate: Evaluate | None = None
    """What the report measures."""
    device: str = "cpu"
    """Where the model runs on calibration data and what is fitted to them is computed: cpu, or an accelerator such as cuda or
    cuda:1, where weights visit block by block.  What the artefact runs on is its backend's to say."""
    backend: BackendEntry = Field(default=DEFAULT_BACKEND, validate_default=True)
    """What to lower to: a name, or a one-key mapping of a name to its options; null for no artefact."""
    output: Path | None = None
    """Folder of the result; relative paths start at the recipe's folder."""


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        path: the YAML file.
        overrides: changes such as ``passes.0.drop_blocks.count=2``, the values read as YAML; applied in order.

    Returns:
        The recipe with its passes and backend made and its paths absolute.

    Raises:
        RecipeError: everything that is wrong with the file, a line ``file:line:column: message`` each.
    """
    return _build(read(Path(path)), overrides, Path(path).absolute().parent)


def dynamic_options(options: Sequence[str]) -> dict[str, Any] | None:
    """Options such as ``input_ids=[batch, null]`` as ``model.dynamic`` of a recipe; validation is left to that.

    Args:
        options: the input's name, an equals sign, and what the recipe would say of it, read as YAML.

    Returns:
        The values by name, None where there are no options.

    Raises:
        RecipeError: one is not NAME=DIMENSIONS, is not YAML, or names an input for the second time.
    """
    found: dict[str, Any] = {}
    for option in options:
        said, (name, equals, text) = f"--dynamic {option}", option.partition("=")
        if not equals or not name or not text.strip():
            raise RecipeError(f"{said}: needed NAME=DIMENSIONS, such as input_ids=[batch,null]")
        if name in found:
            raise RecipeError(f"{said}: {name} was given before; name each input once")
        value = parse(text, said)
        value.refuse()
        found[name] = value.data
    return found or None


def parse_recipe(data: Mapping[str, Any], folder: str | Path = ".") -> Recipe:
    """Make a recipe from plain data, as ``load_recipe`` makes it from a file.

    Args:
        data: what the YAML would say.
        folder: where relative paths start.

    Raises:
        RecipeError: everything that is wrong, a line each.
    """
    return _build(Document("recipe", copy.deepcopy(dict(data))), (), Path(folder).absolute())


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML with every default filled in; loads again as an equal recipe."""
    return dump(recipe.model_dump(mode="json"))


def recipe_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of recipes, with the fields of every pass and backend that is installed."""
    schema = Recipe.model_json_schema()
    definitions = schema.pop("$defs")
    properties = schema["properties"]
    # The schema of a field with a union keeps its own title and description beside ``anyOf``.
    model = properties["model"]
    reference = model.pop("$ref")
    model["anyOf"] = [{"type": "string"}, {"$ref": reference}]
    properties["passes"]["items"] = _entry_schema("pass", definitions)
    properties["backend"] = {
        key: value for key, value in properties["backend"].items() if key in ("title", "description", "default")
    } | {"anyOf": [_entry_schema("backend", definitions), {"type": "null"}]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "$defs": definitions}


def _entry_schema(kind: Kind, definitions: dict[str, Any]) -> dict[str, Any]:
    """Schema of one pass or backend: a name where no field is required, or a one-key mapping."""
    entries: dict[str, Any] = {}
    bare = []
    broken = []
    for line in registry.listing(kind):
        if line.found is None:
            broken.append(line.problem)
            continue
        prefix = f"{kind}.{line.name}"
        one = line.found.model_json_schema(ref_template=f"#/$defs/{prefix}.{{model}}")
        definitions.update({f"{prefix}.{name}": inner for name, inner in one.pop("$defs", {}).items()})
        one.setdefault("description", line.summary)
        definitions[prefix] = one
        entries[line.name] = {"$ref": f"#/$defs/{prefix}"}
        if not one.get("required"):
            bare.append(line.name)
            entries[line.name] = {"anyOf": [entries[line.name], {"type": "null"}]}
    mapping = {
        "type": "object",
        "properties": entries,
        "additionalProperties": False,
        "minProperties": 1,
        "maxProperties": 1,
    }
    schema: dict[str, Any] = {"anyOf": [mapping, {"enum": bare}]} if bare else mapping
    return {"$comment": "left out: " + "; ".join(broken), **schema} if broken else schema


def _build(document: Document, overrides: Sequence[str], folder: Path) -> Recipe:
    data = document.data
    if not isinstance(data, dict):
        keys = ", ".join(Recipe.model_fields)
        document.add(Problem((), f"found {shown(data)}, needed a mapping with the keys {keys}"))
        document.refuse()
    data.setdefault("passes", [])
    data.setdefault("backend", DEFAULT_BACKEND)
    _spell_out(data)
    wrong = []
    for order, override in enumerate(overrides, 1):
        try:
            document.set(override, order, lambda path: _known(data, path))
        except RecipeError as error:
            wrong.append(str(error))
    if wrong:
        raise RecipeError("\n".join(wrong))
    _spell_out(data)

    passes = tuple(located_fields(step, folder) for step in _entries(document))
    backend = None if data["backend"] is None else _entry(document, "backend", ("backend",), data["backend"])
    try:
        recipe = validate(Recipe, {**data, "passes": [], "backend": None})
    except InvalidFields as error:
        for problem in error.problems:
            document.add(problem)
        document.refuse()
        raise  # document.refuse has raised already: there is at least one problem
    recipe = locate(document, recipe, folder)
    document.refuse()
    return recipe.model_copy(update={"passes": passes, "backend": backend})


def _spell_out(data: dict[str, Any]) -> None:
    """Replace shorthands by the mappings they stand for, so that overrides reach into them."""
    if isinstance(data.get("model"), str):
        data["model"] = {"path": data["model"]}
    if isinstance(data["passes"], list):
        data["passes"] = [_mapping_of(item) for item in data["passes"]]
    data["backend"] = _mapping_of(data["backend"])


def _mapping_of(item: Any) -> Any:
    if isinstance(item, str):
        return {item: {}}
    if isinstance(item, dict) and len(item) == 1 and list(item.values()) == [None]:
        return {key: {} for key in item}
    return item


def _known(data: dict[str, Any], path: Steps) -> Sequence[str]:
    """Keys that an override may name at ``path``; empty where anything goes and the validation decides."""
    match path:
        case ("passes", int() as index):
            item = data["passes"][index]
            return list(item) if isinstance(item, dict) else []
        case ("passes", int(), str() as name, *inner):
            return _fields_of("pass", name, tuple(inner))
        case ("backend",):
            return list(data["backend"]) if isinstance(data["backend"], dict) else []
        case ("backend", str() as name, *inner):
            return _fields_of("backend", name, tuple(inner))
    return fields_at(Recipe, path)


def _fields_of(kind: Kind, name: str, path: Steps) -> list[str]:
    try:
        found = registry.pass_class(name) if kind == "pass" else registry.backend_class(name)
    except RegistryError:
        return []  # the recipe's own validation reports it, with the line that names it
    return fields_at(found, path)


def _entries(document: Document) -> tuple[Pass[Any], ...]:
    items = document.data["passes"]
    if not isinstance(items, list):
        document.add(Problem(("passes",), f"found {shown(items)}, needed a list of passes, each on a line with a dash"))
        return ()
    made = [_entry(document, "pass", ("passes", index), item) for index, item in enumerate(items)]
    return tuple(one for one in made if one is not None)


def _entry(document: Document, kind: Kind, path: Steps, item: Any) -> Any:
    """Make one pass or backend; problems are noted in the document and give None."""
    try:
        name, _ = registry.one_key(kind, item)
    except RecipeError as error:
        document.add(Problem(path, str(error)))
        return None
    try:
        return registry.make_pass(item) if kind == "pass" else registry.make_backend(item)
    except RegistryError as error:
        named = (*path, name) in document.keys
        document.add(Problem((*path, name) if named else path, str(error), "key" if named else "value"))
    except InvalidFields as error:
        for problem in error.problems:
            document.add(problem.below(path))
    return None
