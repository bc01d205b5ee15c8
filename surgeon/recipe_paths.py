"""Paths in a recipe: relative to the recipe's folder, to an installed package, or none of ours (hub ids, callables)."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgeon.document import Document
from surgeon.errors import RecipeError
from surgeon.validation import Problem

if TYPE_CHECKING:
    from surgeon.recipe import ModelSpec, Recipe


def locate(document: Document, recipe: Recipe, folder: Path) -> Recipe:
    """Make the paths of a recipe absolute, noting what does not exist."""
    changes: dict[str, Any] = {}
    if recipe.output is not None:
        changes["output"] = _absolute(folder, recipe.output)
    for name, part in (("calibration", recipe.calibration), ("evaluate", recipe.evaluate)):
        if part is None or part.text is None:
            continue
        text = _absolute(folder, part.text)
        if not text.is_file():
            document.add(Problem((name, "text"), f"no such file: {text}"))
        changes[name] = part.model_copy(update={"text": text})
    try:
        changes["model"] = _located_model(recipe.model, folder)
    except RecipeError as error:
        document.add(Problem(("model", "path") if recipe.model.package is None else ("model",), str(error)))
    return recipe.model_copy(update=changes)


def _located_model(model: ModelSpec, folder: Path) -> ModelSpec:
    """The model with an absolute path where it is a directory; hub ids and callables stay as they are."""
    if model.package is not None:
        package_folder(model.package, model.path)
        return model
    path = _absolute(folder, Path(model.path))
    explicit = Path(model.path).is_absolute() or model.path.split("/")[0] in (".", "..", "~")
    if path.exists():
        return model.model_copy(update={"path": str(path)})
    if explicit:
        raise RecipeError(f"no such directory: {path}")
    return model


def located_fields(step: Any, folder: Path) -> Any:
    """A pass whose fields of type ``Path`` are absolute where they name something that exists; hub ids stay as they are."""

    def located(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(located(item) for item in value)
        if isinstance(value, Path) and _absolute(folder, value).exists():
            return _absolute(folder, value)
        return value

    fields = {name: getattr(step, name) for name in type(step).model_fields}
    moved = {name: located(value) for name, value in fields.items()}
    return step.model_copy(update={name: value for name, value in moved.items() if value != fields[name]})


def _absolute(folder: Path, path: Path) -> Path:
    return Path(os.path.normpath(folder / path.expanduser()))


def package_folder(package: str, path: str) -> Path:
    """A folder among an installed package's files, without importing the package."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise RecipeError(
            f"the Python package {package!r} is not installed; install it: pip install {package.replace('_', '-')}"
        )
    roots = [Path(root) for root in spec.submodule_search_locations or ()]
    if not roots:
        raise RecipeError(f"{package!r} is a single module, which holds no folder {path!r}; name a package")
    for root in roots:
        if (root / path).is_dir():
            return root / path
    inside = sorted(child.name for root in roots for child in root.iterdir() if child.is_dir())
    raise RecipeError(f"the package {package!r} has no folder {path!r}; its folders are: {', '.join(inside) or 'none'}")
