"""surgeon: a compiler for operating on trained models.

Trace a PyTorch model to a canonical graph, discover its structure from data flow, rewrite it with declarative passes, and
lower it to an engine that is checked against the graph it came from::

    compiled = surgeon.compile("my-model", [{"drop_blocks": {"count": 2}}], calibration="text.txt")

The names below are imported when they are first used, so that ``import surgeon`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from surgeon.building import compile as compile
    from surgeon.compiled import Compiled as Compiled
    from surgeon.compiled import load as load
    from surgeon.discovery import discover as discover
    from surgeon.errors import SurgeonError as SurgeonError
    from surgeon.fake import fake_weights as fake_weights
    from surgeon.graph import Graph as Graph
    from surgeon.graph_file import load_graph as load_graph
    from surgeon.graph_file import save_graph as save_graph
    from surgeon.plans import SavedPlan as SavedPlan
    from surgeon.structure import Structure as Structure
    from surgeon.tracing import trace as trace

_HOMES = {
    "Compiled": "compiled",
    "Graph": "graph",
    "SavedPlan": "plans",
    "Structure": "structure",
    "SurgeonError": "errors",
    "compile": "building",
    "discover": "discovery",
    "fake_weights": "fake",
    "load": "compiled",
    "load_graph": "graph_file",
    "save_graph": "graph_file",
    "trace": "tracing",
}

__all__ = [
    "Compiled",
    "Graph",
    "SavedPlan",
    "Structure",
    "SurgeonError",
    "compile",
    "discover",
    "fake_weights",
    "load",
    "load_graph",
    "save_graph",
    "trace",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'surgeon' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"surgeon.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
