"""Plain data to frozen pydantic models, and pydantic's complaints as sentences a recipe's author can act on.

Values are validated as JSON in strict mode: YAML's own types are taken at their word, so that ``count: "2"``,
``count: 2.0`` and ``count: true`` are errors instead of silent conversions, while lists still fill tuples and text
still fills paths.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, PydanticSerializationError, to_json

from surgeon.errors import RecipeError, nearest

M = TypeVar("M", bound=BaseModel)

Path = tuple[str | int, ...]
"""Steps from the root of the data to a value: mapping keys and list indices."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with some data.

    Attributes:
        path: where in the data.
        message: what was found, what is needed, what to do.
        at: whether the key of the entry is to blame (an unknown key), its value, or that there is none.
    """

    path: Path
    message: str
    at: Literal["key", "value", "missing"] = "value"

    def below(self, prefix: Path) -> Problem:
        """The same problem seen from a place further out."""
        return replace(self, path=prefix + self.path)

    def __str__(self) -> str:
        return f"{dotted(self.path)}: {self.message}" if self.path else self.message


class InvalidFields(RecipeError):
    """Some fields are wrong.

    Attributes:
        problems: every one of them, at least one.
    """

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(map(str, self.problems)))


def dotted(path: Path) -> str:
    """``("passes", 0, "drop_blocks")`` as ``passes.0.drop_blocks``."""
    return ".".join(map(str, path))


def shown(value: Any) -> str:
    """A value as a recipe would spell it, shortened to about a line."""
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 80 else f"{text[:77]}..."


def validate(model: type[M], data: Any) -> M:
    """Make a ``model`` from plain data.

    Args:
        model: the pydantic class.
        data: mappings, sequences, text, numbers, booleans, None; paths count as text.

    Raises:
        InvalidFields: lists every field that is wrong, with paths relative to ``data``.
    """
    try:
        text = to_json(data, inf_nan_mode="constants")
    except PydanticSerializationError as error:
        raise InvalidFields([Problem((), f"not plain data: {error}")]) from error
    try:
        return model.model_validate_json(text, strict=True)
    except ValidationError as error:
        raise InvalidFields(_problems(error, model, data)) from None


def _problems(error: ValidationError, model: type[BaseModel], data: Any) -> list[Problem]:
    """Pydantic reports a value that fits no member of a union once per member; say it once."""
    groups: dict[Path, list[tuple[Path, ErrorDetails]]] = {}
    for details in error.errors(include_url=False):
        path, group = _locate(details, data)
        groups.setdefault(group, []).append((path, details))
    problems: list[Problem] = []
    for members in groups.values():
        # Of a union, the member that went furthest into the value is the one the author meant.
        depth = max(len(path) for path, _ in members)
        by_path: dict[Path, list[ErrorDetails]] = {}
        for path, details in members:
            if len(path) == depth:
                by_path.setdefault(path, []).append(details)
        problems.extend(_explain(path, alternatives, model) for path, alternatives in by_path.items())
    return problems


def _locate(details: ErrorDetails, data: Any) -> tuple[Path, Path]:
    """Path of an error in the data, and the path of the union it belongs to (or its own)."""
    path: list[str | int] = []
    union: Path | None = None
    here = data
    for position, step in enumerate(details["loc"]):
        missing = details["type"] == "missing" and position == len(details["loc"]) - 1
        if _has(here, step):
            path.append(step)
            here = here[step]
        elif missing:
            path.append(step)
        elif union is None:
            # A step that the data does not have is pydantic's label of a union's member.
            union = tuple(path)
    return tuple(path), tuple(path) if union is None else union


def _has(here: Any, step: str | int) -> bool:
    if isinstance(here, Mapping):
        return step in here
    return isinstance(here, Sequence) and not isinstance(here, str) and isinstance(step, int) and step < len(here)


def _explain(path: Path, alternatives: list[ErrorDetails], model: type[BaseModel]) -> Problem:
    first = alternatives[0]
    key = str(path[-1]) if path else ""
    if first["type"] == "extra_forbidden":
        return Problem(path, f"unknown key {key!r}; {nearest(key, fields_at(model, path[:-1]))}", "key")
    if first["type"] == "missing":
        owner = _model_at(model, path[:-1])
        description = owner.model_fields[key].description if owner and key in owner.model_fields else None
        needed = " ".join((description or "").split())  # a message is one line
        return Problem(path, "missing" + (f"; needed: {needed}" if needed else ""), "missing")
    needs = dict.fromkeys(_needed(details) for details in alternatives)
    found = first["input"]
    message = f"found {shown(found)}, needed {' or '.join(needs)}"
    if first["type"] == "value_error" and len(needs) == 1:
        # The model's own validator says it in its own words.
        message = next(iter(needs)) if isinstance(found, Mapping) else f"found {shown(found)}: {next(iter(needs))}"
    if isinstance(found, str) and first["type"] == "literal_error":
        known = [value for value in _literals(_annotation(model, path)) if isinstance(value, str)]
        if known:
            message = f"found {shown(found)}; {nearest(found, known)}"
    return Problem(path, message)


def _needed(details: ErrorDetails) -> str:
    """What pydantic wanted, without its preamble."""
    message = details["msg"]
    for preamble in ("Input should be ", "Value error, ", "Assertion failed, "):
        message = message.removeprefix(preamble)
    return _PLAINER.get(details["type"], message)


_PLAINER = {
    "bool_type": "true or false",
    "dict_type": "a mapping",
    "float_type": "a number",
    "int_from_float": "an integer",
    "int_type": "an integer",
    "list_type": "a list",
    "model_type": "a mapping of fields",
    "path_type": "text",
    "string_type": "text",
    "tuple_type": "a list",
}
"""Pydantic's kinds of type errors in a recipe's words."""


def _literals(annotation: Any) -> list[Any]:
    """Every value of every ``Literal`` inside an annotation."""
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [value for argument in get_args(annotation) for value in _literals(argument)]


def _annotation(model: type[BaseModel], path: Path) -> Any:
    """Annotation of the field that holds the value at ``path``."""
    depth = max((i for i, step in enumerate(path) if isinstance(step, str)), default=None)
    if depth is None:
        return None
    owner = _model_at(model, path[:depth])
    info = owner.model_fields.get(str(path[depth])) if owner else None
    return info.annotation if info else None


def _model_at(model: type[BaseModel], path: Path) -> type[BaseModel] | None:
    """The pydantic class that describes the mapping at ``path``, None where a field is not described by one."""
    here: type[BaseModel] | None = model
    for step in path:
        if isinstance(step, int):
            continue
        info = here.model_fields.get(step) if here else None
        here = _model_in(info.annotation) if info else None
    return here


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The first pydantic class inside an annotation such as ``Calibration | None`` or ``tuple[Part, ...]``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for argument in get_args(annotation) if (found := _model_in(argument))), None)


def fields_at(model: type[BaseModel], path: Path) -> list[str]:
    """Keys that the mapping at ``path`` may have; empty where no pydantic class describes it."""
    owner = _model_at(model, path)
    return list(owner.model_fields) if owner else []
