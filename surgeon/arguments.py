"""How a model is called, where its arguments are more than tensors: nested ones, and values that are not tensors.

A graph takes tensors by name.  A model may take ``batch={"query": {"ids": ...}}``, a pair of tensors, a flag or a number.
Nested arguments are flattened to tensors whose names say where they stand (``batch.query.ids``, ``pair.0``) and put together
again before the model is called; anything else (None, a flag, a number, a word, a type) is the same in every call and so a part
of the graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from surgeon.errors import TraceError

_CONSTANTS = (bool, int, float, str, torch.dtype, torch.device, type(None))


@dataclass(frozen=True)
class Arguments:
    """The form of a call.

    Attributes:
        forms: by argument that is no lone tensor, how it is put together again: its tree, and for each leaf the name of its
            tensor and, where it is none, its value.
        fixed: what is no tensor, by name; as plain data (a type by its name).
    """

    forms: Mapping[str, tuple[Any, tuple[tuple[str, Any], ...]]] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
        """The keyword arguments of the model.

        Args:
            inputs: tensors by name; those that no form names are arguments themselves.
        """
        if not self.forms:
            return dict(inputs)
        left, found = dict(inputs), {}
        for argument, (tree, leaves) in self.forms.items():
            values = [left.pop(name) if name in inputs else value for name, value in leaves]
            found[argument] = pytree.tree_unflatten(values, tree)
        return {**left, **found}


def split(inputs: Mapping[str, Any]) -> tuple[dict[str, Tensor], Arguments]:
    """Example arguments as tensors by name, and the form of the call.

    Args:
        inputs: keyword arguments of a model: tensors, nested mappings, tuples and lists of tensors, or values.

    Raises:
        TraceError: something that is none of these, two tensors of one name, or no tensor at all.
    """
    tensors: dict[str, Tensor] = {}
    forms, fixed = {}, {}
    for argument, given in inputs.items():
        leaves, tree = _leaves(str(argument), given)
        for name, value in leaves:
            if name in tensors or name in fixed:
                raise TraceError(f"inputs: two of them are called {name!r}; rename the argument or its key")
            if isinstance(value, Tensor):
                tensors[name] = value
            elif isinstance(value, _CONSTANTS):
                fixed[name] = _plain(value)
            else:
                raise TraceError(
                    f"input {name!r} must be a torch.Tensor, a mapping, tuple or list of tensors, or a value that is the same "
                    f"in every call (None, bool, int, float, str, torch.dtype), found {type(value).__name__}"
                )
        if not isinstance(given, Tensor):
            forms[str(argument)] = (tree, tuple((n, None if isinstance(v, Tensor) else v) for n, v in leaves))
    if not tensors:
        found = "; ".join(f"input {name!r} must be a torch.Tensor, found {type(v).__name__}" for name, v in inputs.items())
        raise TraceError(f"inputs holds no tensor: {found}")
    return tensors, Arguments(forms, fixed)


def flat(inputs: Mapping[str, Any], names: Iterable[str], fixed: Mapping[str, Any]) -> Mapping[str, Any]:
    """A call's arguments as a graph takes them: nested ones flattened, values left out that the graph was traced with.

    Args:
        inputs: what the caller gave.
        names: the inputs of the graph; what has such a name, or is of no known kind, stays for the caller to look at.
        fixed: the values that are a part of the graph, see :class:`Arguments`.

    Raises:
        TraceError: a value is another than the graph was traced with.
    """
    if all(isinstance(value, Tensor) for value in inputs.values()):  # as every step of a generation has it
        return inputs
    names = frozenset(names)
    found: dict[str, Any] = {}
    for argument, given in inputs.items():
        for name, value in [(argument, given)] if argument in names else _leaves(str(argument), given)[0]:
            if isinstance(value, Tensor) or name in names:
                found[name] = value
            elif name in fixed:
                if _plain(value) != fixed[name]:
                    raise TraceError(
                        f"input {name!r} was {fixed[name]!r} when the model was traced, and so is a part of the graph; found "
                        f"{value!r}: leave it out, or trace the model with it"
                    )
            elif value is not None:
                found[name] = value
    return found


def _leaves(argument: str, given: Any) -> tuple[list[tuple[str, Any]], Any]:
    """What an argument holds, by name, and its tree."""
    paths, tree = pytree.tree_flatten_with_path(given)
    return [(".".join((argument, *map(_key, path))), value) for path, value in paths], tree


def _key(key: Any) -> str:
    """One step of a path: the key of a mapping, a field's name, a place in a sequence."""
    return str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key))))


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, torch.dtype | torch.device) else value
