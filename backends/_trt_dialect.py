"""The graph as the ONNX that TensorRT parses: standard operators only, low-bit weights as blockwise DequantizeLinear.

Experts are spelt out (every expert dense, or the weights of each token's experts gathered), attention is single-output
Attention over a concatenated cache, and weights of 4 bits stay 4 bits in the engine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch

from surgeon.backends._aot_lowering import Decomposed, Experts
from surgeon.backends._trt_profiles import Sizes
from surgeon.contract import Refusal
from surgeon.errors import LowerError
from surgeon.graph import Graph
from surgeon.numerics.quantization import unpack_codes

OPSET = 23
_DOMAIN = "surgeon.marker"


_DYNAMIC = "activations rounded at run time (int8_dynamic) have no TensorRT form; use int4 or int8"
_ZEROS = "zero points: TensorRT's low-bit weights are symmetric (symmetric: true)"


def refusals(graph: Graph) -> list[Refusal]:
    """Low-bit forms that TensorRT has no constants for."""
    found = []
    for node in graph.module.graph.nodes:
        if node.target is torch.ops.surgeon.fake_quantize_dynamic.default:
            found.append(Refusal(node.name, _DYNAMIC, lasting=True))
        if node.target is torch.ops.surgeon.dequantize.default:
            packed, _, zero_point, bits, group, in_features = node.args
            groups = packed.meta["val"].shape[-2]
            if zero_point is not None:
                found.append(Refusal(node.name, _ZEROS, lasting=True))
            elif bits == 4 and in_features != groups * group:
                found.append(Refusal(node.name, _uneven(group, in_features)))
            elif bits == 8 and groups != 1:
                found.append(
                    Refusal(node.name, f"8 bits in groups of {group}: TensorRT has one scale per row (group: {in_features})")
                )
            elif bits not in (4, 8):
                found.append(Refusal(node.name, f"{bits} bits; TensorRT has 4 and 8", lasting=True))
    return found


def _uneven(group: int, in_features: int) -> str:
    """Why groups that the last of them does not fill are refused, and which would be taken."""
    others = [size for size in (16, 32, 64, 128) if in_features % size == 0]  # quantize has multiples of 16
    fitting = f"these do: {', '.join(map(str, others))} (group of quantize)" if others else "no usual group of quantize does"
    return (
        f"groups of {group} do not divide {in_features} columns; {fitting}. Where drop_neurons left so many, multiple: {group} "
        "makes widths that they divide"
    )


def spelling(graph: Graph, sizes: Mapping[str, Sizes]) -> Experts:
    """How experts are computed best: gathered where there are at most as many token-expert pairs as experts at the most
    frequent sizes, dense beyond.
    """
    tokens = math.prod(sizes[name][1] for name in {size for size in graph.inputs[0].shape if isinstance(size, str)})
    pairs = [
        (tokens * node.args[1].meta["val"].shape[1], node.args[3].meta["val"].shape[0])
        for node in graph.module.graph.nodes
        if node.target is torch.ops.surgeon.moe.default
    ]
    return "gathered" if all(count <= experts for count, experts in pairs) else "dense"


def write(graph: Graph, experts: Experts, path: Path) -> ir.Model:
    """Write the ONNX file, weights beside it where they are large.

    Args:
        graph: stays as it is.
        experts: how mixtures are spelt; not ``auto``.
        path: the file.

    Raises:
        LowerError: torch.onnx refuses.
    """
    from surgeon.backends._onnx_export import _name_axes, _strip
    from surgeon.backends._onnx_file import SINGLE_FILE_LIMIT, weight_bytes
    from surgeon.backends._onnx_program import export_module
    from surgeon.backends._onnx_support import quiet

    module = Decomposed(graph, experts, {torch.ops.surgeon.dequantize.default: _marker}).eval()
    # Several names may depend on each other (a mask is as long as past and new tokens), which export finds out itself.
    shapes = tuple(
        {axis: torch.export.Dim.AUTO for axis, size in enumerate(port.shape) if isinstance(size, str)} for port in graph.inputs
    )
    with quiet():
        try:
            model = export_module(module, graph, (shapes,), OPSET)
        except Exception as error:  # torch.export and torch.onnx raise many unrelated classes
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise LowerError(f"tensorrt: torch.onnx cannot export the graph: {reason}") from error
        _dequantize(model)
        _optimise(model)
    _name_axes(model, graph)
    _strip(model)
    model.opset_imports.pop(_DOMAIN, None)
    if weight_bytes(model) > SINGLE_FILE_LIMIT:
        ir.save(model, path, external_data=f"{path.name}.data", size_threshold_bytes=1024)
    else:
        ir.save(model, path)
    return model


def _marker(packed: Any, scale: Any, zero_point: Any, bits: int, group: int, in_features: int) -> Any:
    """A node that stands for the weight until its codes are made constants of ONNX's own low-bit types."""
    return torch.onnx.ops.symbolic(
        f"{_DOMAIN}::Dequantize",
        (packed, scale),
        {"bits": bits, "group": group, "in_features": in_features},
        dtype=scale.dtype,
        shape=(*packed.shape[:-2], in_features),
        version=1,
    )


def _optimise(model: ir.Model) -> None:
    from onnxscript import optimizer

    optimizer.optimize_ir(model, should_fold=lambda node: False if node.op_type == "DequantizeLinear" else None)


def _dequantize(model: ir.Model) -> None:
    """Replace every marker by DequantizeLinear, transposed beforehand where all that reads it is a transposition.

    TensorRT fuses the dequantization of a matrix [in, out] blocked along its first axis with the product that reads it.
    A stack of matrices with one scale per row is dequantized as the one matrix of all rows: scales along two axes, which
    are what it has, are no form of DequantizeLinear.
    """
    for node in list(model.graph):
        if node.domain != _DOMAIN:
            continue
        bits, group, in_features = (node.attributes[name].as_int() for name in ("bits", "group", "in_features"))
        packed, scale = (_constant(value, node) for value in node.inputs)
        floats = packed.dtype == ml_dtypes.float8_e4m3fn
        if floats:
            values = packed.reshape(*packed.shape[:-2], -1)
        else:
            codes = unpack_codes(torch.from_numpy(packed.copy()), bits).flatten(-2).to(torch.int16) - 2 ** (bits - 1)
            values = codes.numpy()
        readers = [usage.node for usage in node.outputs[0].uses()]
        if bits == 8:  # what fills the one group of a row up is no weight
            values = values[..., :in_features]
        stacked = bits == 8 and values.ndim > 2
        shape = values.shape
        steps = scale
        if stacked:
            values, steps = values.reshape(-1, shape[-1]), steps.reshape(-1, 1)
        swap = not stacked and bool(readers) and all(_swaps_last_two(reader) for reader in readers)
        if swap:
            values, steps = values.swapaxes(-1, -2), steps.swapaxes(-1, -2)
        axis = values.ndim - (2 if swap else 1)
        if bits == 4:
            weight = ir.Tensor(np.ascontiguousarray(values).astype(ml_dtypes.int4), dtype=ir.DataType.INT4)
            attributes: dict[str, Any] = {"axis": axis, "block_size": group}
        else:  # one scale per row: along the other axis
            values = np.ascontiguousarray(values)
            weight = ir.Tensor(values) if floats else ir.Tensor(values.astype(np.int8), dtype=ir.DataType.INT8)
            steps = steps.squeeze(axis)
            attributes = {"axis": values.ndim - (1 if swap else 2)}
        name = node.outputs[0].name
        constants = []
        for suffix, tensor in (("codes", weight), ("scale", ir.Tensor(np.ascontiguousarray(steps)))):
            value = ir.Value(name=f"{name}.{suffix}", const_value=tensor, type=ir.TensorType(tensor.dtype), shape=tensor.shape)
            model.graph.register_initializer(value)
            constants.append(value)
        new = ir.node("DequantizeLinear", constants, attributes=attributes, name=f"{name}.dequantize")
        new.outputs[0].type = node.outputs[0].type
        new.outputs[0].shape = ir.Shape(values.shape)
        model.graph.insert_before(node, new)
        weights = new.outputs[0]
        if stacked:
            sizes = ir.Tensor(np.array(shape, dtype=np.int64))
            size = ir.Value(name=f"{name}.shape", const_value=sizes, type=ir.TensorType(sizes.dtype), shape=sizes.shape)
            model.graph.register_initializer(size)
            stack = ir.node("Reshape", [weights, size], name=f"{name}.stack")
            stack.outputs[0].type, stack.outputs[0].shape = weights.type, ir.Shape(shape)
            model.graph.insert_before(node, stack)
            weights = stack.outputs[0]
        replaced = [reader.outputs[0] for reader in readers] if swap else [node.outputs[0]]
        for value in replaced:
            ir.convenience.replace_all_uses_with(value, weights)
        model.graph.remove([*(readers if swap else []), node], safe=True)
    _drop_unread(model)


def _constant(value: ir.Value | None, node: ir.Node) -> Any:
    if value is None or value.const_value is None:
        raise LowerError(f"tensorrt: the codes of {node.outputs[0].name} are not constants")
    return value.const_value.numpy()


def _swaps_last_two(node: ir.Node) -> bool:
    if node.op_type != "Transpose" or "perm" not in node.attributes:
        return False
    order = list(node.attributes["perm"].as_ints())
    rank = len(order)
    return order == [*range(rank - 2), rank - 1, rank - 2]


def _drop_unread(model: ir.Model) -> None:
    for name, value in list(model.graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del model.graph.initializers[name]
