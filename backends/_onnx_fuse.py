"""Fusions of an exported ONNX model for ONNX Runtime's own operators, and fewer nodes around them.

A decoding step of a small model is over in a millisecond or two, of which a node takes one to four microseconds beside its
arithmetic: what is done here leaves out nodes and changes no result but by rounding.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

DOMAIN = "com.microsoft"
"""ONNX Runtime's own operators."""

NORM, RUNTIME_NORM = "RMSNormalization", "SimplifiedLayerNormalization"
"""One operator under its name in ONNX (opset 23) and in ONNX Runtime."""


def fuse_residual_norms(model: ir.Model) -> None:
    """A sum of two values and its RMSNormalization become one ``SkipSimplifiedLayerNormalization``, by the library's rule.

    The library knows the norm under the runtime's name for it; what is not fused gets ONNX's name back.
    """
    from onnxscript.rewriter.ort_fusions.skip_normalization import fuse_skip_rms_normalization

    _rename(model, NORM, RUNTIME_NORM)
    fuse_skip_rms_normalization(model)
    _rename(model, RUNTIME_NORM, NORM)


def _rename(model: ir.Model, old: str, new: str) -> None:
    for node in model.graph:
        if node.op_type == old and node.domain == "":
            node.op_type = new


def merge_unsqueezes(model: ir.Model) -> None:
    """Unsqueeze of an Unsqueeze that nothing else reads becomes one with both axes."""
    for outer in list(model.graph):
        inner = outer.inputs[0].producer() if _is_unsqueeze(outer) and outer.inputs[0] is not None else None
        if inner is None or not _is_unsqueeze(inner) or len(inner.outputs[0].uses()) > 1 or inner.outputs[0].is_graph_output():
            continue
        rank = outer.outputs[0].shape.rank() if outer.outputs[0].shape is not None else None
        first, second = _axes(inner), _axes(outer)
        if rank is None or first is None or second is None:
            continue
        added = {axis % rank for axis in second}
        kept = [axis for axis in range(rank) if axis not in added]
        added |= {kept[axis % len(kept)] for axis in first}
        outer.replace_input_with(0, inner.inputs[0])
        outer.replace_input_with(1, _numbers(model.graph, f"{outer.outputs[0].name}_axes", sorted(added)))
        model.graph.remove(inner, safe=True)


def _numbers(graph: ir.Graph, name: str, numbers: Sequence[int]) -> ir.Value:
    """A constant of int64."""
    tensor = ir.tensor(np.array(numbers, np.int64), name=name)
    value = ir.Value(name=name, const_value=tensor, shape=ir.Shape([len(numbers)]), type=ir.TensorType(ir.DataType.INT64))
    graph.register_initializer(value)
    return value


def _is_unsqueeze(node: ir.Node) -> bool:
    return node.op_type == "Unsqueeze" and node.domain == ""


def _axes(node: ir.Node) -> list[int] | None:
    value = node.inputs[1]
    constant = None if value is None else ir.convenience.get_const_tensor(value)
    return None if constant is None else [int(axis) for axis in constant.numpy().flatten()]


def pack_projections(model: ir.Model) -> None:
    """Matrices that multiply one value become one matrix, whose product is split.

    float: MatMul(x, A), MatMul(x, B), ...       ->  Split(MatMul(x, [A | B | ...]))
    low-bit: MatMulNBits(x, A), ...              ->  Split(MatMulNBits(x, [A; B; ...])), of equal bits, blocks and level

    The joined weight is made when the file is written, one at a time.  One node is left out for each matrix but two; more
    is gained where matrices are narrow.
    """
    groups: dict[tuple[object, ...], list[ir.Node]] = defaultdict(list)
    for node in model.graph:
        key = _packing_key(node)
        if key is not None:
            groups[key].append(node)
    for nodes in groups.values():
        if len(nodes) > 2:
            _pack(model, nodes)
    _drop_unread(model.graph)


def _drop_unread(graph: ir.Graph) -> None:
    """Remove constants that nothing reads any more."""
    for value in list(graph.initializers.values()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[str(value.name)]


def _packing_key(node: ir.Node) -> tuple[object, ...] | None:
    """What nodes must have in common to be packed, or None: x, kind, attributes, which inputs there are, their types."""
    weights = [value for value in node.inputs[1:] if value is not None]
    if not weights or not all(_own_constant(value) for value in weights):
        return None
    if node.op_type == "MatMul" and node.domain == "":
        if weights[0].const_value.shape.rank() != 2:  # type: ignore[union-attr]  # a constant has a value
            return None
    elif not (node.op_type == "MatMulNBits" and node.domain == DOMAIN):
        return None
    attributes = tuple(sorted((a.name, a.as_int()) for a in node.attributes.values() if a.name != "N"))
    kinds = tuple(None if value is None else value.const_value.dtype for value in node.inputs[1:])  # type: ignore[union-attr]
    return (node.inputs[0], node.op_type, attributes, kinds)


def _own_constant(value: ir.Value) -> bool:
    """Whether a value is an initializer that one node reads."""
    return value.is_initializer() and value.const_value is not None and len(value.uses()) == 1


def _pack(model: ir.Model, nodes: Sequence[ir.Node]) -> None:
    graph, first = model.graph, nodes[0]
    low_bit = first.op_type == "MatMulNBits"
    # Rows of the low-bit layouts are outputs and lie in front, and their zero points are whole bytes per row.
    axis = 0 if low_bit else 1
    widths = [_sizes(node.inputs[1])[axis] for node in nodes]
    inputs: list[ir.Value | None] = [first.inputs[0]]
    for position in range(1, len(first.inputs)):
        parts = [node.inputs[position] for node in nodes]
        inputs.append(None if parts[0] is None else _joined(graph, parts, axis))  # type: ignore[arg-type]  # all are there
    attributes = dict(first.attributes)
    if low_bit:
        attributes["N"] = ir.AttrInt64("N", sum(widths))
    product = ir.Node(first.domain, first.op_type, inputs, attributes.values(), version=first.version)
    shape = list(first.outputs[0].shape or ())
    product.outputs[0].shape = ir.Shape([*shape[:-1], sum(widths)]) if shape else None
    product.outputs[0].type = first.outputs[0].type
    product.outputs[0].name = "+".join(str(node.outputs[0].name) for node in nodes)
    sizes = _numbers(graph, f"{product.outputs[0].name}_widths", widths)
    parted = ir.Node("", "Split", [product.outputs[0], sizes], [ir.AttrInt64("axis", -1)], num_outputs=len(nodes))
    graph.insert_before(first, [product, parted])
    for node, output in zip(nodes, parted.outputs, strict=True):
        old = node.outputs[0]
        output.shape, output.type = old.shape, old.type
        name, old.name = old.name, f"{old.name}_unpacked"
        output.name = name
        ir.convenience.replace_all_uses_with(old, output, replace_graph_outputs=True)
        graph.remove(node, safe=True)


def feed_packed_attention(model: ir.Model) -> None:
    """GroupQueryAttention reads packed queries, keys and values whole where they are the three parts of a Split."""
    for node in list(model.graph):
        if node.op_type != "GroupQueryAttention" or node.domain != DOMAIN:
            continue
        split = node.inputs[0].producer() if node.inputs[0] is not None else None
        if split is None or split.op_type != "Split" or list(split.outputs) != list(node.inputs[:3]):
            continue
        if all(len(value.uses()) == 1 and not value.is_graph_output() for value in split.outputs):
            for position, value in enumerate((split.inputs[0], None, None)):
                node.replace_input_with(position, value)
            model.graph.remove(split, safe=True)
    _drop_unread(model.graph)


def _joined(graph: ir.Graph, parts: Sequence[ir.Value], axis: int) -> ir.Value:
    """A constant that is made of others when it is written."""
    dims = _sizes(parts[0])
    dims[axis] = sum(_sizes(part)[axis] for part in parts)
    name = "+".join(str(part.name) for part in parts)

    def make() -> ir.TensorProtocol:
        arrays = [part.const_value.numpy() for part in parts if part.const_value is not None]
        return ir.tensor(np.concatenate(arrays, axis), name=name)

    assert parts[0].const_value is not None
    lazy = ir.LazyTensor(make, parts[0].const_value.dtype, ir.Shape(dims), name=name)
    value = ir.Value(name=name, const_value=lazy, shape=lazy.shape, type=ir.TensorType(lazy.dtype))
    graph.register_initializer(value)
    return value


def _sizes(value: ir.Value | None) -> list[int]:
    """Shape of a constant."""
    assert value is not None
    assert value.const_value is not None
    return list(value.const_value.shape.numpy())
