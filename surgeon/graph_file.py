"""Graphs on disk: a folder with the nodes as JSON and the weights as safetensors, nothing that runs when it is read.

So a graph that was cut and fine-tuned outlives the process, and goes on later: ``surgeon.compile(load_graph(folder), ...)``.
Tensors that share memory (tied weights) share it when they are read again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from surgeon.compiled import MANIFEST
from surgeon.environment import installed_version
from surgeon.errors import TraceError
from surgeon.graph import Graph
from surgeon.graph_data import graph_data, graph_of, laid_out, layout, tensors_of
from surgeon.output import check_free, staged

FORMAT = 1
NODES, WEIGHTS = "graph.json", "weights.safetensors"


def save_graph(graph: Graph, folder: str | Path, *, force: bool = False) -> Path:
    """Write a graph to a folder that :func:`load_graph` reads; it appears whole or not at all.

    Args:
        graph: with the values of its weights.
        folder: must not exist, unless ``force``.
        force: replace an output of surgeon that exists.

    Returns:
        The folder.

    Raises:
        RecipeError: the folder exists, or cannot be written to.
        TraceError: the graph has fake weights, or a node with an argument that cannot be written down.
    """
    graph.require_weights("saving it")
    target = Path(folder)
    check_free(target, force)
    memory: dict[int, tuple[int, Tensor]] = {}
    tensors: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors_of(graph).items():
        storage = tensor.untyped_storage()
        whole = torch.empty(0, dtype=tensor.dtype).set_(storage)
        number, _ = memory.setdefault(storage._cdata, (len(memory), whole))
        tensors[name] = {"memory": number, **layout(tensor)}
    written = {"format": FORMAT, "surgeon": installed_version(), **graph_data(graph), "tensors": tensors}
    with staged(target, force) as staging:
        (staging / NODES).write_text(json.dumps(written), encoding="utf-8")
        save_file({str(number): whole.detach() for number, whole in memory.values()}, staging / WEIGHTS)
        (staging / MANIFEST).write_text(json.dumps({"surgeon": installed_version(), "graph": NODES}) + "\n", "utf-8")
    return target


def load_graph(folder: str | Path) -> Graph:
    """Read what :func:`save_graph` wrote.

    Raises:
        TraceError: it is not such a folder, is of a format that this version does not read, names an operator that is not
            registered here, or does not give the graph that was written.
    """
    path = Path(folder)
    try:
        written = json.loads((path / NODES).read_text(encoding="utf-8"))
        version = written["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TraceError(f"{path}: not a saved graph ({NODES}: {error})") from error
    if version != FORMAT:
        raise TraceError(f"{path}: saved graph of format {version}, this version reads {FORMAT}; save it again")
    try:
        graph = _read(written, path)
    except TraceError as error:
        raise TraceError(f"{path}: {error}") from error
    except Exception as error:  # what was edited may fail anywhere
        raise TraceError(f"{path}: the saved graph cannot be read: {type(error).__name__}: {error}") from error
    return graph


def _read(written: Mapping[str, Any], folder: Path) -> Graph:
    tensors: dict[str, Tensor] = {}
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        memory: dict[int, torch.UntypedStorage] = {}
        for name, entry in written["tensors"].items():
            number = entry["memory"]
            if number not in memory:
                memory[number] = file.get_tensor(str(number)).untyped_storage()
            tensors[name] = laid_out(memory[number], entry)
    return graph_of(written, tensors)
