"""Which passes and backends there are, and how a name becomes a class and a class an instance.

A built-in is a module of ``surgeon.passes`` or ``surgeon.backends`` whose file name has no leading underscore; it holds
one class whose ``name`` is the file's name.  A stranger's pass or backend is an entry point of the group
``surgeon.passes`` or ``surgeon.backends`` whose name is the class's ``name`` and whose value is the class.  Both fulfil
the same contract, which is checked here when the class is asked for.  Listing names imports neither torch nor any pass.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
import pkgutil
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import ModuleType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, cast, get_args, get_origin

from pydantic import BaseModel

from surgeon.errors import RecipeError, RegistryError, nearest
from surgeon.validation import InvalidFields, shown, validate

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from surgeon.contract import Backend, Pass

Kind = Literal["pass", "backend"]

_GROUPS: dict[Kind, str] = {"pass": "surgeon.passes", "backend": "surgeon.backends"}
"""Package of the built-ins, and entry point group of the plugins, by kind."""


@dataclass(frozen=True)
class Listed:
    """One line of a listing.

    Attributes:
        name: registered name.
        origin: "surgeon" for a built-in, otherwise the distribution that brings it.
        found: the class, None where it cannot be loaded.
        problem: why it cannot be loaded, empty where it can.
    """

    name: str
    origin: str
    found: type[Pass[Any]] | type[Backend] | None
    problem: str = ""

    @property
    def summary(self) -> str:
        """First line of the class's docstring, or of its module's."""
        if self.found is None:
            return self.problem
        module = inspect.getmodule(self.found)
        documented = self.found.__doc__ or (module.__doc__ if module else None) or ""
        return inspect.cleandoc(documented).partition("\n")[0]


@dataclass(frozen=True)
class Field:
    """One option of a pass or backend: its name, its type and default as text, and its documentation."""

    name: str
    type: str
    default: str
    doc: str


def passes() -> list[str]:
    """Names of all passes, sorted.  Imports none of them."""
    return _names("pass")


def backends() -> list[str]:
    """Names of all backends, sorted.  Imports none of them."""
    return _names("backend")


def pass_class(name: str) -> type[Pass[Any]]:
    """The pass of that name.

    Raises:
        RegistryError: there is none, it is registered twice, it fails to import, or it breaks the contract.
    """
    return cast("type[Pass[Any]]", _load("pass", name))


def backend_class(name: str) -> type[Backend]:
    """The backend of that name.

    Raises:
        RegistryError: there is none, it is registered twice, it fails to import, or it breaks the contract.
    """
    return cast("type[Backend]", _load("backend", name))


def listing(kind: Kind) -> list[Listed]:
    """Every pass or backend with its class, or with the reason why it cannot be loaded.  Imports them all."""
    lines = []
    for name in _names(kind):
        origin = " and ".join(_origins(kind, name))
        try:
            lines.append(Listed(name, origin, _load(kind, name)))
        except RegistryError as error:
            lines.append(Listed(name, origin, None, str(error)))
    return lines


def make_pass(item: Pass[Any] | str | Mapping[str, Any]) -> Pass[Any]:
    """A pass from a recipe's spelling of it.

    Args:
        item: a pass, its name, or a one-key mapping of its name to its fields, e.g. ``{"drop_blocks": {"count": 2}}``.

    Raises:
        RegistryError: the name is not a pass's.
        RecipeError: a field is wrong; names the field, the value found, what is needed and the nearest valid key.

    Example:
        >>> make_pass({"drop_blocks": {"count": 2}}).count
        2
    """
    return cast("Pass[Any]", _make("pass", item))


def make_backend(item: Backend | str | Mapping[str, Any]) -> Backend:
    """A backend from a recipe's spelling of it: a backend, its name, or a one-key mapping of its name to its options.

    Raises:
        RegistryError: the name is not a backend's.
        RecipeError: an option is wrong; names the option, the value found, what is needed and the nearest valid key.
    """
    return cast("Backend", _make("backend", item))


def one_key(kind: Kind, item: Any) -> tuple[str, Any]:
    """Split a recipe's entry into the name and the fields; ``{"quantize": None}`` and ``"quantize"`` have no fields.

    Raises:
        RecipeError: the entry is neither a name nor a mapping with exactly one key.
    """
    if isinstance(item, str):
        return item, {}
    if isinstance(item, Mapping) and len(item) == 1:
        name, options = next(iter(item.items()))
        if isinstance(name, str):
            return name, {} if options is None else options
    if isinstance(item, Mapping) and len(item) > 1:
        keys = ", ".join(map(str, item))
        advice = "; give each pass its own dash, and indent its fields below it" if kind == "pass" else ""
        raise RecipeError(
            f"found a mapping with {len(item)} keys ({keys}), needed one {kind}: {{name: {{field: value}}}}{advice}"
        )
    raise RecipeError(f"found {shown(item)}, needed the name of a {kind}, or {{name: {{field: value}}}}")


def fields(model: type[BaseModel]) -> list[Field]:
    """The options of a pass or backend, in the order of their definition."""
    return [
        Field(
            name,
            _type_text(info),
            "required" if info.is_required() else shown(info.get_default(call_default_factory=True)),
            " ".join((info.description or "").split()),
        )
        for name, info in model.model_fields.items()
    ]


def installation(name: str) -> str:
    """What a backend needs, for a listing: ``onnxruntime 1.23.0``, or what is missing and the line that installs it.

    Raises:
        RegistryError: see :func:`backend_class`.
    """
    backend = backend_class(name)
    found = versions(backend)
    if missing := [module for module, version in found.items() if version is None]:
        return f"{', '.join(missing)} not installed: {backend.install()}"
    return ", ".join(f"{module} {version}" for module, version in found.items()) or "nothing more"


def versions(backend: type[Backend]) -> dict[str, str | None]:
    """Version of each library that a backend needs, by import name; None where it is not installed."""
    found: dict[str, str | None] = {}
    distributions: Mapping[str, list[str]] | None = None
    for module in backend.requirements():
        if not _importable(module):
            found[module] = None
            continue
        distributions = importlib.metadata.packages_distributions() if distributions is None else distributions
        owners = distributions.get(module.partition(".")[0], [])
        found[module] = importlib.metadata.version(owners[0]) if owners else "unknown"
    return found


def _importable(module: str) -> bool:
    """Whether a module can be found; parents of a dotted name are imported, as ``find_spec`` must."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _built_in(kind: Kind) -> list[str]:
    package = importlib.import_module(_GROUPS[kind])
    return [module.name for module in pkgutil.iter_modules(package.__path__) if not module.name.startswith("_")]


def _plugins(kind: Kind) -> dict[str, list[importlib.metadata.EntryPoint]]:
    found: dict[str, list[importlib.metadata.EntryPoint]] = {}
    for entry in importlib.metadata.entry_points(group=_GROUPS[kind]):
        found.setdefault(entry.name, []).append(entry)
    return found


def _names(kind: Kind) -> list[str]:
    return sorted({*_built_in(kind), *_plugins(kind)})


def _origins(kind: Kind, name: str) -> list[str]:
    built_in = ["surgeon"] if name in _built_in(kind) else []
    return built_in + [_origin(entry) for entry in _plugins(kind).get(name, [])]


def _origin(entry: importlib.metadata.EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else f"the entry point {entry.value!r}"


def _load(kind: Kind, name: str) -> type[Pass[Any]] | type[Backend]:
    origins = _origins(kind, name)
    if not origins:
        raise RegistryError(f"unknown {kind} {name!r}; {nearest(name, _names(kind))}")
    if len(origins) > 1:
        # Whichever were taken, somebody's recipe would mean something else than before.
        if "surgeon" in origins:
            others = " and ".join(origin for origin in origins if origin != "surgeon")
            advice = f"{others} may not replace surgeon's own {kind}: rename that entry point, or uninstall it"
        else:
            advice = "uninstall all but one"
        raise RegistryError(f"{kind} {name!r} is registered by {' and by '.join(origins)}; {advice}")
    plugins = _plugins(kind).get(name, [])
    where = f"{_GROUPS[kind]}.{name}" if not plugins else f"{origins[0]} ({plugins[0].value})"
    try:
        found = plugins[0].load() if plugins else importlib.import_module(f"{_GROUPS[kind]}.{name}")
    except Exception as error:  # a stranger's module may raise anything while it is imported
        if plugins:
            raise RegistryError(_not_imported(kind, plugins[0], error)) from error
        last = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"{type(error).__name__}: {error} ({last.filename}:{last.lineno})"
        raise RegistryError(f"{kind} {name!r} of {where} fails to import: {reason}") from error
    candidate = found if plugins else _only_class(kind, name, found)
    broken = _violations(kind, name, candidate)
    if broken:
        raise RegistryError(f"{kind} {name!r} of {where} breaks the contract: " + "; ".join(broken))
    return cast("type[Pass[Any]] | type[Backend]", candidate)


_ERROR = 160
"""Characters of a stranger's error that are repeated; libraries fail to load with pages of advice."""


def _not_imported(kind: Kind, entry: importlib.metadata.EntryPoint, error: Exception) -> str:
    """One line on a plugin that cannot be imported; the error it comes from is the cause of ours, and one import away."""
    text = " ".join(str(error).partition("\n")[0].split())
    said = f"{type(error).__name__}: {text[:_ERROR]}{'...' if len(text) > _ERROR else ''}" if text else type(error).__name__
    module, _, attribute = entry.value.partition(":")
    again = f"from {module.strip()} import {attribute.partition('.')[0].strip()}" if attribute else f"import {module.strip()}"
    package = entry.dist.name if entry.dist else "the package"
    return (
        f"{kind} {entry.name!r} of {_origin(entry)} fails to import (entry point {entry.value}): {said}; update or uninstall "
        f'{package}; its traceback: python -c "{again}"'
    )


def _base(kind: Kind) -> type[BaseModel]:
    from surgeon.contract import Backend, Pass  # imports torch: only when a class is asked for

    return Pass if kind == "pass" else Backend


def _only_class(kind: Kind, name: str, module: ModuleType) -> type[BaseModel]:
    """The one class of a built-in's file."""
    defined = [
        value
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, _base(kind)) and value.__module__ == module.__name__
    ]
    concrete = [value for value in defined if not inspect.isabstract(value)]
    if len(concrete) == 1:
        return concrete[0]
    if not concrete and len(defined) == 1:
        return defined[0]  # the contract check says which methods are missing
    names = ", ".join(value.__name__ for value in concrete) or "none"
    raise RegistryError(f"{module.__file__} must define exactly one {kind}, named {name!r}; it defines {names}")


def _violations(kind: Kind, name: str, found: Any) -> list[str]:
    """What a class lacks to be the pass or backend ``name``."""
    base = _base(kind)
    if not (inspect.isclass(found) and issubclass(found, base)):
        return [f"{found!r} is not a subclass of surgeon.contract.{base.__name__}"]
    broken = []
    declared = getattr(found, "name", None)
    if declared != name:
        broken.append(f"{found.__name__}.name is {declared!r}, needed {name!r}")
    built_in = found.__module__ == f"{_GROUPS[kind]}.{name}"
    if built_in and found.__name__.lower() != name.replace("_", ""):
        broken.append(f"the class is called {found.__name__}, needed the CamelCase of {name!r}")
    if missing := sorted(getattr(found, "__abstractmethods__", ())):
        broken.append(f"{found.__name__} does not define {', '.join(missing)}")
    if not found.model_config.get("frozen") or found.model_config.get("extra") != "forbid":
        broken.append(f"{found.__name__}.model_config must keep frozen=True and extra='forbid'")
    if undocumented := [field for field, info in found.model_fields.items() if not info.description]:
        broken.append(f"fields without a docstring: {', '.join(undocumented)}")
    if kind == "pass":
        broken.extend(_pass_violations(found))
    return broken


def _pass_violations(found: type[BaseModel]) -> list[str]:
    from surgeon.contract import Plan

    broken = []
    scope = getattr(found, "scope", None)
    if scope not in ("model", "block"):
        broken.append(f"{found.__name__}.scope is {scope!r}, needed 'model' or 'block'")
    plan_type = getattr(found, "plan_type", None)
    if not (inspect.isclass(plan_type) and issubclass(plan_type, Plan)):
        broken.append(f"{found.__name__}.plan_type is {plan_type!r}, needed a subclass of surgeon.contract.Plan")
    return broken


def _make(kind: Kind, item: Any) -> BaseModel:
    if isinstance(item, _base(kind)):
        return item
    name, options = one_key(kind, item)
    found = cast("type[BaseModel]", _load(kind, name))
    try:
        return validate(found, options)
    except InvalidFields as error:
        raise InvalidFields(problem.below((name,)) for problem in error.problems) from None


def _type_text(info: FieldInfo) -> str:
    """A field's type and bounds as its author would write them, e.g. ``int, >= 1``."""
    return _spelt(info.annotation) + _bounds(info.metadata)


def _spelt(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _spelt(arguments[0]) + _bounds(arguments[1:])
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin in (Union, UnionType):
        return " | ".join(map(_spelt, arguments))
    if origin is not None:
        return f"{_spelt(origin)}[{', '.join(map(_spelt, arguments))}]"
    if annotation is None or annotation is type(None):
        return "null"
    return "..." if annotation is ... else str(getattr(annotation, "__name__", annotation))


def _bounds(metadata: Iterable[Any]) -> str:
    """Limits such as ``Ge(ge=1)``, or pydantic's ``Field`` that holds them."""
    symbols = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<", "multiple_of": "multiple of"}
    limits = [limit for item in metadata for limit in (getattr(item, "metadata", None) or [item])]
    bounds = [
        f" {symbol} {bound}"
        for limit in limits
        for name, symbol in symbols.items()
        if (bound := getattr(limit, name, None)) is not None
    ]
    return ",".join(bounds)
