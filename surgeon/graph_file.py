"""Graphs on disk: a folder with the nodes as JSON and the weights as safetensors, nothing that runs when it is read.

So a graph that was cut and fine-tuned outlives the process, and goes on later: ``surgeon.compile(load_graph(folder), ...)``.
Tensors that share memory (tied weights) share it when they are read again.
"""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, fx
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

import surgeon.ops  # noqa: F401  # registers torch.ops.surgeon
from surgeon.caches import SUM
from surgeon.compiled import MANIFEST
from surgeon.environment import installed_version
from surgeon.errors import TraceError
from surgeon.graph import Dim, Graph, Source, assign_tensor
from surgeon.output import check_free, staged
from surgeon.ports import port_data, port_of
from surgeon.rewrite import Editor

FORMAT = 1
NODES, WEIGHTS = "graph.json", "weights.safetensors"
_FUNCTIONS: dict[str, Any] = {"_operator": operator, "math": math, "torch": torch}
"""Modules of functions on sizes that graphs call beside operators; of torch only those named ``sym_...``."""


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
    for name, tensor in {**graph.parameters(), **{f"{_EXAMPLE}{key}": value for key, value in graph.example.items()}}.items():
        storage = tensor.untyped_storage()
        whole = torch.empty(0, dtype=tensor.dtype).set_(storage)
        number, _ = memory.setdefault(storage._cdata, (len(memory), whole))
        tensors[name] = {
            "memory": number,
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(tensor.shape),
            "stride": list(tensor.stride()),
            "offset": tensor.storage_offset(),
            "parameter": isinstance(tensor, torch.nn.Parameter),
        }
    written = {
        "format": FORMAT,
        "surgeon": installed_version(),
        "fingerprint": graph.fingerprint(),
        "source": asdict(graph.source),
        "dims": [asdict(dim) for dim in graph.dims.values()],
        "inputs": [port_data(port) for port in graph.inputs],
        "outputs": [port_data(port) for port in graph.outputs],
        "tensors": tensors,
        "nodes": [_node_data(node) for node in graph.module.graph.nodes],
    }
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
    except TraceError:
        raise
    except Exception as error:  # what was edited may fail anywhere
        raise TraceError(f"{path}: the saved graph cannot be read: {type(error).__name__}: {error}") from error
    if graph.fingerprint() != written["fingerprint"]:
        raise TraceError(f"{path}: the saved graph was changed, or is read otherwise by this version of torch; save it again")
    return graph


_EXAMPLE = "example:"
"""In front of the names of example inputs among tensors; no weight has a colon in its name."""


def _read(written: Mapping[str, Any], folder: Path) -> Graph:
    tensors: dict[str, Tensor] = {}
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        memory: dict[int, Tensor] = {}
        for name, entry in written["tensors"].items():
            number = entry["memory"]
            whole = memory[number] if number in memory else memory.setdefault(number, file.get_tensor(str(number)))
            flat = whole.view(getattr(torch, entry["dtype"]))
            tensor = flat.as_strided(entry["shape"], entry["stride"], entry["offset"])
            tensors[name] = torch.nn.Parameter(tensor, tensor.is_floating_point()) if entry["parameter"] else tensor
    root, nodes = torch.nn.Module(), fx.Graph()
    for name, tensor in tensors.items():
        if not name.startswith(_EXAMPLE):
            assign_tensor(root, name, tensor)
    known: dict[str, fx.Node] = {}
    for entry in written["nodes"]:
        target = _target(entry["target"]) if entry["op"] == "call_function" else entry["target"]
        args, kwargs = _value(entry["args"], known), _value(entry["kwargs"], known)
        known[entry["name"]] = nodes.create_node(entry["op"], target, args, kwargs, entry["name"])
    inputs = [port_of(entry) for entry in written["inputs"]]
    dims = {entry["name"]: Dim(**entry) for entry in written["dims"]}
    example = {port.name: tensors[f"{_EXAMPLE}{port.name}"] for port in inputs}
    module = fx.GraphModule(root, nodes)
    outputs = [port_of(entry) for entry in written["outputs"]]
    graph = Graph(module, inputs, outputs, dims, example, Source(**written["source"]))
    _give_values(graph)
    return graph


def _give_values(graph: Graph) -> None:
    """Give every node its fake value: sizes of inputs are symbols, one for each dynamic dimension."""
    environment = ShapeEnv()
    mode = FakeTensorMode(shape_env=environment, allow_non_fake_inputs=True)
    nodes = graph.module.graph
    sizes: dict[str, Any] = {}
    for port in graph.inputs:
        for label, size in zip(port.shape, graph.example[port.name].shape, strict=True):
            if isinstance(label, str) and SUM not in label and label not in sizes:
                source = ConstantSource(f"__{label}")
                symbol = environment.create_symbol(size, source, DimDynamic.DYNAMIC, constraint_dim=None)
                sizes[label] = environment.create_symintnode(symbol, hint=size, source=source)
    for node, port in zip(nodes.find_nodes(op="placeholder"), graph.inputs, strict=True):
        with mode:
            node.meta["val"] = torch.empty([_size(label, sizes) for label in port.shape], dtype=port.dtype)
    for node in nodes.find_nodes(op="get_attr"):
        tensor = graph.tensor(str(node.target))
        with mode:
            node.meta["val"] = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    editor = Editor(graph)
    for node in nodes.nodes:
        editor.touch(node)
    editor.settle()
    output = nodes.output_node()
    output.meta["val"] = fx.node.map_arg(output.args[0], lambda node: node.meta["val"])


def _size(label: int | str, sizes: Mapping[str, Any]) -> Any:
    """A size of a port; ``a + b`` for the sum of two dimensions."""
    if isinstance(label, int):
        return label
    first, *others = (sizes[part] for part in label.split(SUM))
    for other in others:
        first = first + other
    return first


# -- nodes ----------------------------------------------------------------------------------------------------------


def _node_data(node: fx.Node) -> dict[str, Any]:
    target = node.target if isinstance(node.target, str) else _named(node)
    return {
        "op": node.op, "name": node.name, "target": target, "args": _data(node, node.args),
        "kwargs": _data(node, dict(node.kwargs)),
    }  # fmt: skip


def _named(node: fx.Node) -> str:
    """An operator as ``namespace::name.overload``, a function on sizes as ``module:name``."""
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        return f"{target.namespace}::{target._schema.name.partition('::')[2]}.{target._overloadname}"
    name = f"{target.__module__}:{target.__name__}"
    if _target(name) is not target:
        raise TraceError(f"{node.name} calls {target}, which has no name to be saved by")
    return name


def _target(name: str) -> Any:
    """Undo :func:`_named`.

    Raises:
        TraceError: no such operator is registered, or the function is none on sizes.
    """
    namespace, found, operation = name.partition("::")
    if found:
        base, _, overload = operation.rpartition(".")
        try:
            return getattr(getattr(getattr(torch.ops, namespace), base), overload)
        except (AttributeError, RuntimeError):
            raise TraceError(
                f"the saved graph calls the operator {name}, which is not registered here; import the library that has it"
            ) from None
    home, _, function = name.partition(":")
    if home not in _FUNCTIONS or (home == "torch" and not function.startswith("sym_")) or function.startswith("__"):
        raise TraceError(f"the saved graph calls {name}, which is no function on sizes")
    return getattr(_FUNCTIONS[home], function)


_OF_TORCH: dict[str, type] = {
    "dtype": torch.dtype, "device": torch.device, "layout": torch.layout, "memory_format": torch.memory_format,
}  # fmt: skip


def _data(node: fx.Node, value: Any) -> Any:
    """An argument as JSON: numbers, text, null and truth values as they are, all else as a mapping of its kind."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, tuple):
        return {"tuple": [_data(node, item) for item in value]}
    if isinstance(value, list):
        return {"list": [_data(node, item) for item in value]}
    if isinstance(value, dict):
        return {"dict": {str(key): _data(node, item) for key, item in value.items()}}
    for kind, cls in _OF_TORCH.items():
        if isinstance(value, cls):
            return {kind: str(value).removeprefix("torch.")}
    raise TraceError(f"{node.name} has an argument of type {type(value).__name__}, which cannot be saved")


def _value(data: Any, known: Mapping[str, fx.Node]) -> Any:
    """Undo :func:`_data`."""
    if not isinstance(data, dict):
        return data
    ((kind, inner),) = data.items()
    if kind == "node":
        return known[inner]
    if kind == "tuple":
        return tuple(_value(item, known) for item in inner)
    if kind == "list":
        return [_value(item, known) for item in inner]
    if kind == "dict":
        return {key: _value(item, known) for key, item in inner.items()}
    found = torch.device(inner) if kind == "device" else getattr(torch, inner)
    if not isinstance(found, _OF_TORCH[kind]):
        raise TypeError(f"{inner!r} is no {kind} of torch")
    return found
