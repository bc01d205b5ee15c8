"""Graphs as plain data: nodes, ports and how each tensor lies in memory; the memory itself is kept elsewhere.

Read back as a graph of its own, or by turning another graph into it node by node, for what refers to that one's nodes.
"""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

import surgeon.ops  # noqa: F401  # registers torch.ops.surgeon
from surgeon.caches import SUM
from surgeon.errors import TraceError
from surgeon.graph import Dim, Graph, Port, Source, assign_tensor
from surgeon.ports import port_data, port_of
from surgeon.rewrite import Editor, fake_mode

_FUNCTIONS: dict[str, Any] = {"_operator": operator, "math": math, "torch": torch}
"""Modules of functions on sizes that graphs call beside operators; of torch only those named ``sym_...``."""
_EXAMPLE = "example:"
"""In front of the names of example inputs among tensors; no weight has a colon in its name."""


def tensors_of(graph: Graph) -> dict[str, Tensor]:
    """Everything of a graph that has numbers: its weights and its example inputs."""
    return {**graph.parameters(), **{f"{_EXAMPLE}{name}": value for name, value in graph.example.items()}}


def layout(tensor: Tensor) -> dict[str, Any]:
    """How a tensor lies in its memory."""
    return {
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
        "stride": list(tensor.stride()),
        "offset": tensor.storage_offset(),
        "parameter": isinstance(tensor, torch.nn.Parameter),
    }


def laid_out(memory: torch.UntypedStorage, entry: Mapping[str, Any]) -> Tensor:
    """The tensor of a :func:`layout` in a memory."""
    flat = torch.empty(0, dtype=getattr(torch, entry["dtype"]))
    tensor = flat.set_(memory, entry["offset"], entry["shape"], entry["stride"])
    return torch.nn.Parameter(tensor, tensor.is_floating_point()) if entry["parameter"] else tensor


def graph_data(graph: Graph) -> dict[str, Any]:
    """A graph without its tensors.

    Raises:
        TraceError: a node has an argument that cannot be written down.
    """
    return {
        "fingerprint": graph.fingerprint(),
        "source": asdict(graph.source),
        "dims": [asdict(dim) for dim in graph.dims.values()],
        "inputs": [port_data(port) for port in graph.inputs],
        "outputs": [port_data(port) for port in graph.outputs],
        "nodes": [_node_data(node) for node in graph.module.graph.nodes],
    }


def graph_of(written: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Graph:
    """The graph of :func:`graph_data` with the tensors of :func:`tensors_of`.

    Raises:
        TraceError: an operator is not registered here, or the graph is not the one that was written.
    """
    root, nodes = torch.nn.Module(), fx.Graph()
    for name, tensor in tensors.items():
        if not name.startswith(_EXAMPLE):
            assign_tensor(root, name, tensor)
    known: dict[str, fx.Node] = {}
    for entry in written["nodes"]:
        target, args, kwargs = _call(entry, known)
        known[entry["name"]] = nodes.create_node(entry["op"], target, args, kwargs, entry["name"])
    inputs = [port_of(entry) for entry in written["inputs"]]
    dims = {entry["name"]: Dim(**entry) for entry in written["dims"]}
    outputs = [port_of(entry) for entry in written["outputs"]]
    example = _example(tensors)
    graph = Graph(fx.GraphModule(root, nodes), inputs, outputs, dims, example, Source(**written["source"]))
    _give_values(graph)
    _require_same(graph, written)
    return graph


def become(editor: Editor, written: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, fx.Node]:
    """Turn the graph that an editor holds into another one that was made of it by edits.

    Nodes of one name are one object before and after, so that a structure of the graph as it was says of the edited one
    what it would have said had the edits been made here; nodes that are gone are erased.

    Args:
        editor: of the graph as it was.
        written: the edited graph, from :func:`graph_data`.
        tensors: all of its tensors, from :func:`tensors_of`.

    Returns:
        The nodes by name, those that are gone among them.

    Raises:
        TraceError: it does not come out as the graph that was written.
    """
    graph, nodes = editor.graph, editor.graph.module.graph
    had, held = {node.name: node for node in nodes.nodes}, graph.parameters()
    known: dict[str, fx.Node] = {}
    place = nodes._root  # the node behind which the next one belongs
    for entry in written["nodes"]:
        target, args, kwargs = _call(entry, known)
        node = had.get(entry["name"])
        if node is None:
            with nodes.inserting_before(place.next):
                node = nodes.create_node(entry["op"], target, args, kwargs, entry["name"])
            if node.name != entry["name"]:
                raise TraceError(f"the node {entry['name']} of the saved graph has a name that is taken here")
            editor.touch(node)
        else:
            if place.next is not node:
                place.append(node)
            if json.dumps(_node_data(node)) != json.dumps(entry):
                node.target, node.args, node.kwargs = target, args, kwargs
                editor.touch(node)
        known[node.name] = place = node
    for name in reversed([name for name in had if name not in known]):
        nodes.erase_node(had[name])
    weights = {name: tensor for name, tensor in tensors.items() if not name.startswith(_EXAMPLE)}
    editor.hand_in({name: tensor for name, tensor in weights.items() if name not in held or not _same(held[name], tensor)})
    _hand_in_ports(editor, [port_of(entry) for entry in written["inputs"]], _example(tensors))
    graph.outputs = tuple(port_of(entry) for entry in written["outputs"])
    editor.settle()
    _require_same(graph, written)
    return {**had, **known}


def _hand_in_ports(editor: Editor, inputs: list[Port], example: Mapping[str, Tensor]) -> None:
    """Let the inputs be these, of dimensions that others have already."""
    graph = editor.graph
    before = {port.name: port for port in graph.inputs}
    placeholders = graph.module.graph.find_nodes(op="placeholder")
    same = [pair for pair in zip(placeholders, inputs, strict=True) if before.get(pair[1].name) == pair[1]]
    sizes: dict[int | str, Any] = {
        label: size
        for node, port in same
        for label, size in zip(port.shape, node.meta["val"].shape, strict=True)
    }
    for node, port in zip(placeholders, inputs, strict=True):
        if before.get(port.name) != port:
            with fake_mode(graph):
                node.meta["val"] = torch.empty([sizes.get(size, size) for size in port.shape], dtype=port.dtype)
            editor.touch(node)
    graph.inputs, graph.example = tuple(inputs), dict(example)


def _call(entry: Mapping[str, Any], known: Mapping[str, fx.Node]) -> tuple[Any, Any, Any]:
    """Target, arguments and keyword arguments of a node."""
    target = _target(entry["target"]) if entry["op"] == "call_function" else entry["target"]
    return target, _value(entry["args"], known), _value(entry["kwargs"], known)


def _example(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(_EXAMPLE): value for name, value in tensors.items() if name.startswith(_EXAMPLE)}


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are one memory, read in one way."""
    same = one.untyped_storage()._cdata == other.untyped_storage()._cdata
    return same and layout(one) == layout(other)


def _require_same(graph: Graph, written: Mapping[str, Any]) -> None:
    if graph.fingerprint() != written["fingerprint"]:
        raise TraceError("the saved graph was changed, or is read otherwise by this version of torch; save it again")


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
