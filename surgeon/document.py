"""A YAML file as plain data that remembers where each value stands, and overrides of it from the command line.

YAML 1.2 core types only: text, integers, floats, booleans, null, lists and mappings with text keys.  Nothing that a tag
could construct is constructed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any

from yaml import MappingNode, Node, SafeDumper, SafeLoader, ScalarNode, SequenceNode
from yaml import dump as dump_yaml
from yaml.error import MarkedYAMLError, YAMLError
from yaml.reader import ReaderError

from surgeon.errors import RecipeError, nearest
from surgeon.validation import Path, Problem, dotted, shown

_CORE = "tag:yaml.org,2002:"
_CORE_SCHEMA = (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("null", r"~|null|Null|NULL|", "~nN"),
)
"""What plain text means in YAML 1.2 (section 10.3.2): type, its spellings, their first characters, tried in this order."""
_MOST_VALUES = 100_000
"""Aliases are expanded, so that a few lines could mean billions of values; no recipe comes near this many."""


@dataclass(frozen=True, order=True)
class Position:
    """A place to look at: ``file:line:column`` counted from 1, or the override that set the value.

    Attributes:
        order: places of the file come before overrides, these in the order given.
        line: line of the file, 0 for an override.
        column: column of the file, 0 for an override.
        source: name of the file, or the override as typed.
    """

    order: int
    line: int
    column: int
    source: str

    def __str__(self) -> str:
        return f"{self.source}:{self.line}:{self.column}" if self.line else self.source


@dataclass
class Document:
    """Plain data with positions.

    Attributes:
        source: name of the file, as the user gave it.
        data: the data.
        keys: position of each mapping key, by the path of its value.
        values: position of each value.
        problems: what is wrong already, such as a key given twice.
    """

    source: str
    data: Any = None
    keys: dict[Path, Position] = field(default_factory=dict)
    values: dict[Path, Position] = field(default_factory=dict)
    problems: list[tuple[Position, str]] = field(default_factory=list)

    def position(self, problem: Problem) -> Position:
        """Where a problem stands: its key or value, or the innermost place around it that the file has."""
        path = problem.path
        if problem.at == "key" and path in self.keys:
            return self.keys[path]
        if path in self.values:
            return self.values[path]
        # What is missing from a mapping is missed at the mapping's key, where the author's eye looks first.
        places = (self.keys, self.values) if problem.at == "missing" else (self.values, self.keys)
        while path:
            path = path[:-1]
            for marks in places:
                if path in marks:
                    return marks[path]
        return Position(0, *((1, 1) if self.values else (0, 0)), self.source)

    def add(self, problem: Problem) -> None:
        """Note a problem at its place."""
        self.problems.append((self.position(problem), str(problem)))

    def refuse(self) -> None:
        """Raise everything that was noted, in the file's order.

        Raises:
            RecipeError: one line ``file:line:column: message`` per problem; nothing is raised where there is none.
        """
        if self.problems:
            lines = dict.fromkeys(f"{position}: {message}" for position, message in sorted(self.problems))
            raise RecipeError("\n".join(lines))

    def set(self, override: str, order: int, known: Callable[[Path], Sequence[str]]) -> None:
        """Apply one override ``a.0.b=value``, the value read as YAML.

        Mappings that are not there yet are made; whether their keys are valid is left to the validation that follows.

        Args:
            override: the text behind ``--set``.
            order: its number among the overrides, from 1.
            known: the keys that may stand at a path, for the error message.

        Raises:
            RecipeError: it is not ``path=value``, the value is not YAML, or the path leads through a list item or a
                plain value that is not there.
        """
        name = f"--set {override}"
        target, equals, text = override.partition("=")
        if not equals or not target or "" in target.split("."):
            raise RecipeError(f"{name}: needed PATH=VALUE, such as passes.0.drop_blocks.count=2")
        value = parse(text, name)
        value.refuse()
        if not isinstance(self.data, dict):
            raise RecipeError(f"{name}: {self.source} is not a mapping")
        *parents, last = target.split(".")
        here: Any = self.data
        path: Path = ()
        for step in parents:
            key = _step(name, here, path, step, known)
            path = (*path, key)
            if isinstance(here, dict) and here.get(key) is None:
                here[key] = {}
                self.keys.setdefault(path, Position(order, 0, 0, name))
            here = here[key]
        key = _step(name, here, path, last, known)
        path = (*path, key)
        here[key] = value.data
        for places in (self.keys, self.values):
            for old in [old for old in places if old[: len(path)] == path]:
                del places[old]
        self.keys[path] = self.values[path] = Position(order, 0, 0, name)


def _step(name: str, here: Any, path: Path, step: str, known: Callable[[Path], Sequence[str]]) -> str | int:
    """One step of an override into ``here``."""
    place = dotted(path) or "the recipe"
    if isinstance(here, list):
        if step.isdecimal() and int(step) < len(here):
            return int(step)
        items = ", ".join(f"{i} {_summary(item)}" for i, item in enumerate(here)) or "none"
        raise RecipeError(f"{name}: {place} has no item {step!r}; its items are: {items}")
    if isinstance(here, dict):
        keys = known(path)
        if keys and step not in keys:
            raise RecipeError(f"{name}: {place} has no {step!r}; {nearest(step, keys)}")
        return step
    raise RecipeError(f"{name}: {place} is {shown(here)}, which has no {step!r} inside")


def _summary(item: Any) -> str:
    """An item of a list in a word: the key of a one-key mapping, or the value."""
    return ", ".join(map(str, item)) if isinstance(item, dict) else shown(item)


def read(path: FilePath) -> Document:
    """Read a YAML file.

    Raises:
        RecipeError: the file cannot be read, is not UTF-8, or is not YAML.
    """
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        folder = path.parent
        siblings = [file.name for file in folder.glob("*.y*ml")] if folder.is_dir() else []
        advice = f"in {folder}: {nearest(path.name, siblings)}" if siblings else "check the path"
        raise RecipeError(f"{path}: no such recipe; {advice}") from None
    except OSError as error:
        if path.is_dir():
            raise RecipeError(f"{path}: a folder; a recipe is a YAML file, which may name a model's folder as model:") from None
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = raw[: error.start]
        line, column = before.count(b"\n") + 1, error.start - (before.rfind(b"\n") + 1) + 1
        raise RecipeError(f"{path}:{line}:{column}: not UTF-8 text (byte {raw[error.start]:#04x})") from error
    return parse(text, str(path))


def parse(text: str, source: str) -> Document:
    """Read YAML text.

    Args:
        text: the YAML.
        source: what to call it in errors.

    Raises:
        RecipeError: it is not YAML; names line and column.
    """
    document = Document(source)
    try:
        root = _Loader(text).get_single_node()
        if root is None:
            document.values[()] = Position(0, 1, 1, source)
        else:
            document.data = _Reader(document).value(root, ())
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        context = f" ({error.context})" if error.context else ""
        place = f"{source}:{mark.line + 1}:{mark.column + 1}" if mark else source
        hint = "; text that starts with * or & needs quotes" if "alias" in context or "anchor" in context else ""
        raise RecipeError(f"{place}: not YAML: {error.problem}{context}{hint}") from None
    except ReaderError as error:
        before = text[: error.position]
        line, column = before.count("\n") + 1, error.position - (before.rfind("\n") + 1) + 1
        raise RecipeError(f"{source}:{line}:{column}: not YAML: {error.reason}") from None
    except YAMLError as error:
        raise RecipeError(f"{source}: not YAML: {error}") from None
    except RecursionError:
        raise RecipeError(f"{source}: nested too deeply") from None
    return document


class _Loader(SafeLoader):
    """Composes nodes by the core schema of YAML 1.2, where PyYAML's own reads 1.1: ``off`` is text, ``1e-3`` a number."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - PyYAML's own name


class _Dumper(SafeDumper):
    """Quotes text that readers of either version of YAML would take for something else."""


for _kind, _spellings, _starts in _CORE_SCHEMA:
    for _class in (_Loader, _Dumper):
        _first = [*_starts, *([""] if _kind == "null" else [])]
        _class.add_implicit_resolver(f"{_CORE}{_kind}", re.compile(rf"(?:{_spellings})\Z"), _first)


def dump(data: Any) -> str:
    """Plain data as YAML that ``parse`` reads back as the same data, keys in their order, no line folded."""
    return dump_yaml(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1 << 16)


def _plain(kind: str, text: str) -> bool | int | float | None:
    """A scalar of the core schema.

    Raises:
        ValueError: an explicit tag says one type, the text another.
    """
    if kind == "null":
        if text not in ("", "~", "null", "Null", "NULL"):
            raise ValueError(text)
        return None
    if kind == "bool":
        if text.lower() not in ("true", "false"):
            raise ValueError(text)
        return text.lower() == "true"
    if kind == "int":
        base = {"0o": 8, "0x": 16}.get(text[:2], 10)
        return int(text if base == 10 else text[2:], base)
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


class _Reader:
    """Turns composed nodes into data, noting positions and problems in a document."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.count = 0
        self.open: set[int] = set()

    def value(self, node: Node, path: Path) -> Any:
        self._expand()
        self.document.values[path] = self._position(node)
        if isinstance(node, ScalarNode):
            return self._scalar(node, path)
        if id(node) in self.open:
            self._problem(node, path, "an alias to a list or mapping that contains it")
            return None
        self.open.add(id(node))
        try:
            if node.tag not in (f"{_CORE}map", f"{_CORE}seq"):
                self._problem(node, path, f"unknown tag {_spelt(node.tag)}; plain YAML values only")
            if isinstance(node, MappingNode):
                return self._mapping(node, path)
            if not isinstance(node, SequenceNode):
                raise TypeError(f"YAML composes scalars, lists and mappings, not {type(node).__name__}")
            return [self.value(item, (*path, index)) for index, item in enumerate(node.value)]
        finally:
            self.open.discard(id(node))

    def _mapping(self, node: MappingNode, path: Path) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        for key, value in self._pairs(node, path):
            if not isinstance(key, ScalarNode) or str(key.tag) != f"{_CORE}str":
                found = shown(key.value) if isinstance(key, ScalarNode) else "a list or mapping"
                self._problem(key, path, f"found the key {found}, needed text")
                continue
            here = (*path, key.value)
            if key.value in mapping:
                first = self.document.keys[here]
                self._problem(key, here, f"given twice, first at line {first.line}, column {first.column}")
                continue
            self.document.keys[here] = self._position(key)
            mapping[key.value] = self.value(value, here)
            if isinstance(value, ScalarNode) and value.start_mark.index == value.end_mark.index:
                # Nothing stands behind the colon, and YAML puts that nothing wherever the next token is.
                mark = key.end_mark
                self.document.values[here] = Position(0, mark.line + 1, mark.column + 2, self.document.source)
        return mapping

    def _expand(self) -> None:
        self.count += 1
        if self.count > _MOST_VALUES:
            raise RecipeError(f"{self.document.source}: more than {_MOST_VALUES} values once its aliases are expanded")

    def _pairs(self, node: MappingNode, path: Path) -> list[tuple[Node, Node]]:
        """Keys and values of a mapping, and behind them what ``<<: *other`` brings: keys that are not given here."""
        self._expand()
        own = [(key, value) for key, value in node.value if not _merges(key)]
        given = {str(key.value) for key, _ in own}
        for key, value in node.value:
            if not _merges(key):
                continue
            for other in value.value if isinstance(value, SequenceNode) else [value]:
                if not isinstance(other, MappingNode) or id(other) in self.open:
                    self._problem(key, (*path, key.value), "needed behind it: an alias to another mapping, or a list of such")
                    continue
                self.open.add(id(other))  # one that takes itself in has no end
                brought = [pair for pair in self._pairs(other, path) if str(pair[0].value) not in given]
                self.open.discard(id(other))
                given |= {str(name.value) for name, _ in brought}
                own += brought
        return own

    def _scalar(self, node: ScalarNode, path: Path) -> Any:
        kind = str(node.tag).removeprefix(_CORE)
        if kind in ("str", "timestamp", "value", "merge"):
            return node.value  # a date is text here
        if kind not in ("int", "float", "bool", "null"):
            self._problem(node, path, f"unknown tag {_spelt(node.tag)}; plain YAML values only")
            return None
        try:
            return _plain(kind, node.value)
        except ValueError:
            self._problem(node, path, f"{shown(node.value)} is not of the type {_spelt(node.tag)}")
            return None

    def _position(self, node: Node) -> Position:
        return Position(0, node.start_mark.line + 1, node.start_mark.column + 1, self.document.source)

    def _problem(self, node: Node, path: Path, message: str) -> None:
        self.document.problems.append((self._position(node), str(Problem(path, message))))


def _merges(key: Node) -> bool:
    """Whether a key is the merge key of YAML 1.1, which 1.2 left out and people go on writing."""
    return isinstance(key, ScalarNode) and key.value == "<<" and key.style is None


def _spelt(tag: Any) -> str:
    text = str(tag)
    return f"!!{text.removeprefix(_CORE)}" if text.startswith(_CORE) else text
