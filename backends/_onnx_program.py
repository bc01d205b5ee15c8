"""From a module to an ONNX model with one trace of it where two would give the same.

``torch.onnx.export`` traces what ``torch.export`` has traced once more, to decompose what has no translation.  Few nodes of
a graph that is flat and functional already need that, if any: here they alone are traced again, each by itself, and the
second trace of everything, half of the time of an export, is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import onnx_ir as ir
import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from surgeon.backends._onnx_support import is_of_python, quiet, registry_of
from surgeon.graph import Graph

_ASSERTIONS = (torch.ops.aten._assert_tensor_metadata.default, torch.ops.aten._assert_scalar.default)
"""Operators that ``torch.export`` writes into what it traces and ``torch.onnx`` removes."""


def export_module(module: nn.Module, graph: Graph, dynamic_shapes: Any, opset: int) -> ir.Model:
    """Trace a module and translate it, neither optimised nor checked.

    Args:
        module: takes and returns what the graph does.
        graph: whose ports, with their names, and example are the module's.
        dynamic_shapes: of the inputs, as ``torch.export`` takes them.
        opset: version of the default operator set to ask for.

    Raises:
        Exception: torch refuses; of many classes.
    """
    example = tuple(graph.example[port.name] for port in graph.inputs)
    with torch.no_grad():  # a mask that can be trained has another attention kernel, with other strides
        program = torch.export.export(module, example, dynamic_shapes=dynamic_shapes, strict=False)
        if decompose(program, opset):
            program.run_decompositions = lambda *_: program
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=opset,
            input_names=[port.name for port in graph.inputs],
            output_names=[port.name for port in graph.outputs],
            verbose=False,
            optimize=False,
        )
    assert exported is not None
    model: ir.Model = exported.model
    return model


def decompose(program: ExportedProgram, opset: int) -> bool:
    """Decompose the nodes that torch.onnx has no translation for, in place.

    Returns:
        Whether all that is left has one.  Where not, the program computes what it did, and all of it has to be traced anew.
    """
    nodes = program.graph.nodes
    done = all(_translates(node, opset) or _expand(program, node, opset) for node in list(nodes))
    program.graph.lint()
    program.graph_module.recompile()
    return done and all(_translates(node, opset) for node in nodes)


def _expand(program: ExportedProgram, node: fx.Node, opset: int) -> bool:
    """Replace one node by its decomposition; whether that could be done."""
    graph, target = program.graph, node.target
    if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable:
        return False
    leaves, spec = pytree.tree_flatten((node.args, node.kwargs))
    operands = [leaf for leaf in leaves if isinstance(leaf, fx.Node)]

    def call(*values: Any) -> Any:
        given = iter(values)
        args, kwargs = pytree.tree_unflatten([next(given) if isinstance(leaf, fx.Node) else leaf for leaf in leaves], spec)
        return target(*args, **kwargs)

    try:
        trace = make_fx(call, dict(_registry(opset)[1]), tracing_mode="symbolic")
        traced = trace(*(operand.meta["val"] for operand in operands))
    except Exception:  # of many classes; tracing all of it says what is wrong, if anything is
        return False
    if any(inner.op not in ("placeholder", "call_function", "output") for inner in traced.graph.nodes):
        return False
    places = dict(zip(traced.graph.find_nodes(op="placeholder"), operands, strict=True))
    with graph.inserting_before(node):
        result = graph.graph_copy(traced.graph, places)
    if isinstance(result, fx.Node):
        if any(user.op == "output" for user in node.users):
            if result in operands:
                return False  # an input, or another output: programs name them otherwise
            program.graph_signature.replace_all_uses(node.name, result.name)
        node.replace_all_uses_with(result)
    else:
        assert isinstance(result, tuple | list)
        for user in list(node.users):  # of several results each is read by its own node
            part = result[int(str(user.args[1]))]
            if not isinstance(part, fx.Node) or any(reader.op == "output" for reader in user.users):
                return False
            user.replace_all_uses_with(part)
            graph.erase_node(user)
    graph.erase_node(node)
    return True


def _translates(node: fx.Node, opset: int) -> bool:
    """Whether torch.onnx takes a node as it is."""
    if node.op != "call_function":
        return node.op in ("placeholder", "output")
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        known = target in _registry(opset)[0] or target in _ASSERTIONS or target.namespace == "onnx_symbolic"
        return known and not target._schema.is_mutable
    return is_of_python(target)


@cache
def _registry(opset: int) -> tuple[frozenset[Any], Mapping[Any, Callable[..., Any]]]:
    """Operators that torch.onnx translates, and what it decomposes all others with."""
    from torch.onnx._internal.exporter import _decomp  # neither list is public

    translated = frozenset(_decomp.get_onnx_implemented_overloads(registry_of(opset)))
    with quiet():
        return translated, _decomp.create_onnx_friendly_decomposition_table(set(translated))
