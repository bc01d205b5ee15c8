"""Libraries that tests use where they are installed."""

from __future__ import annotations

import sys
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from typing import Any


def timm() -> Any:
    """timm without torchvision, of which its models only name classes, and whose wheels fit one build of torch each."""
    if "timm" in sys.modules:
        return sys.modules["timm"]
    with _stand_in("torchvision"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import timm
    return timm


class _Anything(type):
    """A class of which every attribute exists."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return f"{cls.__name__}.{name}"


class _Empty(types.ModuleType):
    """A package in which every class exists."""

    __path__: list[str] = []  # noqa: RUF012  # as modules have it

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (), {})


class _Finder:
    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.split(".")[0] == self.package else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        return _Empty(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


@contextmanager
def _stand_in(package: str) -> Iterator[None]:
    """Inside, ``package`` imports as an empty shell; afterwards nobody finds it."""
    from transformers.utils import import_utils

    import_utils.is_torchvision_available()  # asked, and remembered, before there is one
    finder = _Finder(package)
    sys.meta_path.insert(0, finder)  # type: ignore[arg-type]
    try:
        yield
    finally:
        sys.meta_path.remove(finder)  # type: ignore[arg-type]
        for name in [name for name in sys.modules if name.split(".")[0] == package]:
            del sys.modules[name]
