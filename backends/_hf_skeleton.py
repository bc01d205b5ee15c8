"""The tensors that a transformers class holds under a given configuration, found by building it without memory."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

Path = tuple[str | int, ...]
"""Where a value lies in a configuration: keys of nested mappings, positions in lists."""


@dataclass(frozen=True)
class Skeleton:
    """A class of the transformers library under one configuration.

    Attributes:
        model_class: name of the class.
        config: its configuration as plain data.
        shapes: every entry of its state dict, by name.
        twins: entries that are one tensor with an entry before them (tied), by name.
        buffers: tensors of the model that a checkpoint does not hold.
        linears: the entries that are weights of ``torch.nn.Linear``.
        numbers: floating-point numbers that its modules hold, by name; some are made of the configuration.
    """

    model_class: str
    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    twins: Mapping[str, str]
    buffers: frozenset[str]
    linears: frozenset[str]
    numbers: Mapping[str, float]

    @classmethod
    def build(cls, model_class: str, config: Mapping[str, Any]) -> Skeleton | str:
        """The skeleton, or why the class does not take this configuration."""
        return _built(model_class, json.dumps(config, sort_keys=True, default=str))

    def instance(self) -> Any:
        """The model on torch's ``meta`` device."""
        return _instance(self.model_class, self.config)


def known(model_class: str | None) -> bool:
    """Whether transformers has a model class of that name."""
    import transformers

    found = getattr(transformers, model_class or "", None)
    return isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)


def auto_class(model_class: str) -> str | None:
    """The automatic class of transformers that makes this one from a configuration, e.g. ``AutoModelForCausalLM``."""
    from transformers.models.auto import modeling_auto

    found = []
    for name, auto in vars(modeling_auto).items():
        mapping = getattr(getattr(auto, "_model_mapping", None), "_model_mapping", None)
        if name.startswith("AutoModel") and mapping is not None:
            made = [entry for value in mapping.values() for entry in ((value,) if isinstance(value, str) else value)]
            found += [name] if model_class in made else []
    usual = ("AutoModel", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForMaskedLM")  # several make some classes
    return next((name for name in (*usual, *sorted(found)) if name in found), None)


def values(config: Mapping[str, Any], kind: type) -> Iterator[tuple[Path, Any]]:
    """Every value of a type in a configuration, with its place; truth values are no integers here."""

    def visit(path: Path, value: Any) -> Iterator[tuple[Path, Any]]:
        if type(value) is kind:
            yield path, value
        entries: Any = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
        for key, item in entries:
            yield from visit((*path, key), item)

    yield from visit((), config)


def changed(config: Mapping[str, Any], changes: Mapping[Path, Any]) -> dict[str, Any]:
    """A copy of a configuration with some values replaced."""
    result: dict[str, Any] = copy.deepcopy(dict(config))
    for path, value in changes.items():
        owner: Any = result
        for key in path[:-1]:
            owner = owner[key]
        owner[path[-1]] = value
    return result


def field_name(path: Path) -> str:
    """A place in a configuration as text, ``text_config.num_hidden_layers``."""
    return ".".join(map(str, path))


def _instance(model_class: str, config: Mapping[str, Any]) -> Any:
    import transformers

    cls = getattr(transformers, model_class)
    with torch.device("meta"):
        return cls(cls.config_class.from_dict(copy.deepcopy(dict(config)))).eval()


@functools.lru_cache(maxsize=64)
def _built(model_class: str, config: str) -> Skeleton | str:
    data = json.loads(config)
    try:
        model = _instance(model_class, data)
    except Exception as error:  # a class may refuse a configuration in any way
        return f"{type(error).__name__}: {(str(error).strip() or ' ').splitlines()[0]}"
    state = model.state_dict(keep_vars=True)
    first: dict[int, str] = {}
    twins = {}
    for name, tensor in state.items():
        if first.setdefault(id(tensor), name) != name:
            twins[name] = first[id(tensor)]
    buffers = frozenset(name for name, _ in model.named_buffers() if name not in state)
    linears = frozenset(f"{name}.weight" for name, m in model.named_modules() if type(m) is torch.nn.Linear)
    fields = ((f"{name}.{key}", value) for name, module in model.named_modules() for key, value in vars(module).items())
    numbers = {name: value for name, value in fields if type(value) is float}
    return Skeleton(model_class, data, {n: tuple(t.shape) for n, t in state.items()}, twins, buffers, linears, numbers)
