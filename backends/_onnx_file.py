"""Writing an ONNX model with one tensor in memory at a time."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import onnx
import onnx_ir as ir

SINGLE_FILE_LIMIT = 256 * 2**20
"""Bytes of weights above which they go to a file of their own: a protobuf holds at most 2 GiB, and a runtime parses it
whole into memory, whereas it maps an external file."""

_GRAPH = onnx.ModelProto.DESCRIPTOR.fields_by_name["graph"].number
_INITIALIZER = onnx.GraphProto.DESCRIPTOR.fields_by_name["initializer"].number
_RAW_DATA = onnx.TensorProto.DESCRIPTOR.fields_by_name["raw_data"].number


def weight_bytes(model: ir.Model) -> int:
    """Bytes of all initializers."""
    return sum(tensor.nbytes for tensor in _tensors(model).values())


def save(model: ir.Model, folder: Path, name: str = "model.onnx") -> list[str]:
    """Write the model under ``name``, and a file of that name with ``.data`` behind it where the weights are large.

    Returns:
        Names of the files written.
    """
    if weight_bytes(model) > SINGLE_FILE_LIMIT:
        ir.save(model, folder / name, external_data=f"{name}.data", size_threshold_bytes=1024)
        return [name, f"{name}.data"]
    with (folder / name).open("wb") as stream:
        _write_single(model, stream)
    return [name]


def _write_single(model: ir.Model, stream: BinaryIO) -> None:
    """Write the protobuf that ``ir.save`` would, tensor after tensor (that builds it all in memory, about three times).

    A message is its fields one after the other; a nested one is preceded by its length, which is known before the bytes
    are: the fields of the graph, then its initializers.
    """
    tensors = _tensors(model)
    held = dict(model.graph.initializers)
    model.graph.initializers.clear()
    try:
        proto = ir.to_proto(model)
    finally:
        model.graph.initializers.update(held)
    graph = proto.graph.SerializeToString()
    proto.ClearField("graph")
    heads = {name: _head(name, tensor) for name, tensor in tensors.items()}
    sizes = {name: len(head) + tensors[name].nbytes for name, head in heads.items()}
    fronts = {name: _prefix(_INITIALIZER, size) for name, size in sizes.items()}
    total = len(graph) + sum(sizes.values()) + sum(map(len, fronts.values()))
    stream.write(proto.SerializeToString() + _prefix(_GRAPH, total) + graph)
    for name, tensor in tensors.items():
        content = tensor.tobytes()
        assert len(content) == tensor.nbytes, f"{name}: {len(content)} bytes, {tensor.nbytes} announced"
        stream.write(fronts[name] + heads[name])
        stream.write(content)


def _tensors(model: ir.Model) -> dict[str, ir.TensorProtocol]:
    return {name: value.const_value for name, value in model.graph.initializers.items() if value.const_value is not None}


def _head(name: str, tensor: ir.TensorProtocol) -> bytes:
    """A TensorProto up to its raw data: the last field, since its number is the highest that is set."""
    proto = onnx.TensorProto(name=name, data_type=int(tensor.dtype), dims=tensor.shape.numpy())
    fields: bytes = proto.SerializeToString()
    return fields + _prefix(_RAW_DATA, tensor.nbytes)


def _prefix(field: int, size: int) -> bytes:
    """Key and length in front of a field of ``size`` bytes."""
    return _varint(field << 3 | 2) + _varint(size)


def _varint(value: int) -> bytes:
    """Seven bits per byte, the lowest first; the top bit says that more follow."""
    groups = []
    while value >= 0x80:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*groups, value))
