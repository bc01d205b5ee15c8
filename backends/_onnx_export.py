"""From the rewritten module to an ONNX model: export, optimise, repair, name, save."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from surgeon.backends import _onnx_cuda as cuda
from surgeon.backends import _onnx_fuse as fuse
from surgeon.backends._onnx_program import export_module
from surgeon.backends._onnx_support import quiet
from surgeon.errors import LowerError
from surgeon.graph import Graph


def export(graph: Graph, module: fx.GraphModule, opset: int, provider: str) -> ir.Model:
    """Export a rewritten module under the graph's own input and output names and named dynamic axes.

    Args:
        graph: the graph the module was made from: ports, dimensions, example.
        module: what ``Lowering.run`` returned.
        opset: version of the default operator set.
        provider: ``cpu`` or ``cuda``.

    Returns:
        The model; its initializers share memory with the module's tensors.

    Raises:
        LowerError: torch.onnx refuses, or the result has another opset than asked for.
    """
    shapes = tuple(
        {axis: torch.export.Dim.DYNAMIC for axis, size in enumerate(port.shape) if isinstance(size, str)}
        for port in graph.inputs
    )
    with quiet():
        try:
            model = export_module(module, graph, shapes, opset)
        except Exception as error:  # torch.export and torch.onnx raise many unrelated classes
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise LowerError(f"onnxruntime: torch.onnx cannot export the graph: {reason}") from error
        _optimise(model)
    found = model.opset_imports.get("")
    if found != opset:
        raise LowerError(f"onnxruntime: opset {opset} was asked for, the graph could only be expressed in opset {found}")
    _expand_rotary_tables(model)
    fuse.fuse_residual_norms(model)
    fuse.merge_unsqueezes(model)
    if provider in ("cpu", "cuda"):
        fuse.pack_projections(model)
    if provider == "cuda":
        cuda.branch_attention(model, graph)
    if provider == "cpu":
        fuse.feed_packed_attention(model)
        _keep_residual_sums_apart(model)
    _name_axes(model, graph)
    _strip(model)
    return model


def annotate(model: ir.Model, graph: Graph, weights: Mapping[str, Mapping[str, Any]]) -> None:
    """Record names in order and quantization in the file itself, for readers without surgeon's manifest."""
    model.producer_name = "surgeon"
    model.metadata_props["surgeon.inputs"] = json.dumps([port.name for port in graph.inputs])
    model.metadata_props["surgeon.outputs"] = json.dumps([port.name for port in graph.outputs])
    model.metadata_props["surgeon.quantization"] = json.dumps(quantization_kinds(weights))


def quantization_kinds(weights: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Low-bit weights counted by kind: operator, bits, group, block, symmetric, how many matrices and parameters."""
    kinds: dict[tuple[Any, ...], dict[str, Any]] = {}
    for entry in weights.values():
        described = {key: entry[key] for key in ("operator", "bits", "group", "block", "symmetric")}
        kind = kinds.setdefault(tuple(described.values()), {**described, "weights": 0, "parameters": 0})
        kind["weights"] += 1
        kind["parameters"] += int(torch.Size(entry["shape"]).numel())
    return list(kinds.values())


def operators(model: ir.Model) -> dict[str, int]:
    """Number of nodes by operator, most frequent first; other domains than ONNX's own are written in front."""
    counts = Counter(f"{node.domain}.{node.op_type}" if node.domain else node.op_type for node in model.graph.all_nodes())
    return dict(counts.most_common())


def _optimise(model: ir.Model) -> None:
    """Fold small constants, drop what is redundant, and fuse norms, rotary embedding and attention (opset 23)."""
    from onnxscript import optimizer
    from onnxscript.rewriter import onnx_fusions

    def computes_with_weights(node: ir.Node) -> bool | None:
        return False if any(value is not None and value.is_initializer() for value in node.inputs) else None

    # A folded weight would be stored as its result: a low-bit one as floats.  The runtime folds it in memory.
    optimizer.optimize_ir(model, should_fold=computes_with_weights)
    onnx_fusions.fuse(model)


def _expand_rotary_tables(model: ir.Model) -> None:
    """Give RotaryEmbedding(23) tables of the input's batch size.

    The fusion takes cos and sin as the model computes them, [1, S, D/2] where positions do not depend on the batch; the
    operator has no broadcasting and ONNX Runtime refuses a batch above one.
    """
    for node in list(model.graph):
        if node.op_type != "RotaryEmbedding" or node.domain != "" or (len(node.inputs) > 3 and node.inputs[3] is not None):
            continue
        x = node.inputs[0]
        for position in (1, 2):
            table = node.inputs[position]
            assert table is not None
            if table.shape is not None and table.shape.rank() == 3 and table.shape[0] != 1:
                continue  # has its own batch
            batch = ir.node("Shape", [x], attributes={"start": 0, "end": 1})
            ones = ir.node("Constant", [], attributes={"value_ints": [1, 1]})
            target = ir.node("Concat", [batch.outputs[0], ones.outputs[0]], attributes={"axis": 0})
            expanded = ir.node("Expand", [table, target.outputs[0]])
            model.graph.insert_before(node, [batch, ones, target, expanded])
            node.replace_input_with(position, expanded.outputs[0])
    from onnx_ir.passes.common import CommonSubexpressionEliminationPass

    CommonSubexpressionEliminationPass()(model)


def _keep_residual_sums_apart(model: ir.Model) -> None:
    """Write the addition in front of a LayerNormalization as Sum, which means the same but is not fused with it.

    ONNX Runtime fuses Add and LayerNormalization into SkipLayerNormalization, whose CPU kernel was measured 3 to 4
    times slower than the two (version 1.32, width 384): a fifth of the time of a small int8 encoder.
    """
    for node in model.graph:
        if node.op_type == "LayerNormalization" and node.domain == "":
            producer = node.inputs[0].producer() if node.inputs[0] is not None else None
            if producer is not None and producer.op_type == "Add" and producer.domain == "":
                producer.op_type = "Sum"


def _name_axes(model: ir.Model, graph: Graph) -> None:
    """Rename the exporter's symbols (s77, ...) to the graph's dimension names, in every shape."""
    names: dict[str, str] = {}
    for value, port in zip(model.graph.inputs, graph.inputs, strict=True):
        assert value.shape is not None
        for found, wanted in zip(value.shape, port.shape, strict=True):
            if isinstance(found, ir.SymbolicDim) and isinstance(wanted, str) and found.value is not None:
                names[str(found.value)] = wanted
    token = re.compile(r"[A-Za-z_]\w*")
    for value in _values(model):
        if value.shape is None:
            continue
        for axis, found in enumerate(value.shape):
            if isinstance(found, ir.SymbolicDim) and found.value is not None:
                renamed = token.sub(lambda match: names.get(match[0], match[0]), str(found.value))
                value.shape[axis] = ir.SymbolicDim(renamed)


def _strip(model: ir.Model) -> None:
    """Remove the exporter's notes: source lines and paths of the machine that built it, as large as a small model."""
    model.graph.metadata_props.clear()
    for value in _values(model):
        value.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None


def _values(model: ir.Model) -> Iterator[ir.Value]:
    yield from model.graph.inputs
    for node in model.graph.all_nodes():
        yield from node.outputs
