"""Attention over a cache on CUDA: flash attention for rows without padding, the general kernel for the others.

``com.microsoft.GroupQueryAttention`` is the CUDA provider's flash attention with a cache (ONNX Runtime 1.31).  It takes
float16 and bfloat16, is causal, adds nothing to the scores, and continues several rows by one token at a time only.
``Attention`` (opset 23) takes every mask, and turns a cache with a mask into a bias and small kernels without flash
attention.  So a node of the second becomes

    If(attention_mask is 1 everywhere, and one row, one new token or no past): GroupQueryAttention, else: Attention

where the mask of the graph was shown to be the causal one wherever the attention mask is 1.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from surgeon.backends._onnx_fuse import DOMAIN
from surgeon.backends._onnx_shared import is_causal_unpadded
from surgeon.caches import MASK, TOKENS
from surgeon.graph import Graph
from surgeon.halves import has_halves

ATTENTION = torch.ops.surgeon.attention.default

FLASH = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
"""Types of the flash kernels."""


def branch_attention(model: ir.Model, graph: Graph) -> int:
    """Rewrite ``Attention`` over caches as above; returns the number of nodes rewritten."""
    inputs = {value.name: value for value in model.graph.inputs}
    if has_halves(graph.inputs) or MASK not in inputs or TOKENS not in inputs:
        return 0
    sources = [node for node in graph.module.graph.nodes if node.target is ATTENTION]
    if not all(is_causal_unpadded(graph, node.args[3]) for node in sources):
        return 0
    nodes = [node for node in model.graph if _fits(node)]
    if not nodes:
        return 0
    facts = _facts(model, inputs[MASK], inputs[TOKENS])
    for node in nodes:
        _branch(model, node, *facts)
    return len(nodes)


def _fits(node: ir.Node) -> bool:
    """Whether a node is Attention of undivided queries, keys and values over a cache, in a type of flash attention."""
    if node.op_type != "Attention" or node.domain != "" or "q_num_heads" not in node.attributes:
        return False
    if len(node.inputs) != 6 or None in node.inputs or len(node.outputs) != 3:
        return False
    if "is_causal" in node.attributes and node.attributes["is_causal"].as_int() != 0:
        return False
    sizes = [value.shape[3] if value is not None and value.shape is not None else None for value in node.inputs[4:]]
    size = sizes[0]
    return isinstance(size, int) and size % 8 == 0 and size <= 256 and sizes[0] == sizes[1] and _type(node.inputs[0]) in FLASH


def _type(value: ir.Value | None) -> ir.DataType | None:
    return None if value is None or value.type is None else value.type.dtype


def _facts(model: ir.Model, mask: ir.Value, tokens: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Whether the flash kernel computes this call, bool [1], and its lengths: int32 [B] of P + S - 1, int32 [1] of P + S."""
    nodes: list[ir.Node] = []

    def make(kind: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        node = ir.node(kind, list(inputs), attributes=attributes)
        nodes.append(node)
        value = node.outputs[0]
        value.name = f"unpadded_{len(nodes)}_{kind.lower()}"
        return value

    one = _constant(model, "unpadded_one", np.array([1], np.int64))
    one_int32 = _constant(model, "unpadded_one_int32", np.array([1], np.int32))
    rows, total = (make("Shape", mask, start=axis, end=axis + 1) for axis in range(2))
    new = make("Shape", tokens, start=1, end=2)
    length = make("Cast", total, to=int(ir.DataType.INT32))
    last = make("Expand", make("Sub", length, one_int32), rows)
    simple = make("Or", make("Equal", rows, one), make("Or", make("Equal", new, one), make("Equal", new, total)))
    # Sums of floats over everything have a kernel of the provider's own; other types and minima go through cuDNN.
    padding = make("ReduceSum", make("Cast", make("Not", make("Equal", mask, one)), to=int(ir.DataType.FLOAT)), keepdims=0)
    unpadded = make("And", make("Not", make("Cast", padding, to=int(ir.DataType.BOOL))), simple)
    model.graph.insert_before(model.graph[0], nodes)
    return unpadded, last, length


def _constant(model: ir.Model, name: str, value: np.ndarray[Any, Any]) -> ir.Value:
    tensor = ir.tensor(value, name=name)
    found = ir.Value(name=name, const_value=tensor, shape=ir.Shape(value.shape), type=ir.TensorType(tensor.dtype))
    model.graph.register_initializer(found)
    return found


def _branch(model: ir.Model, node: ir.Node, unpadded: ir.Value, last: ir.Value, length: ir.Value) -> None:
    q, k, v, _, past_k, past_v = node.inputs
    kept = node.attributes
    attributes: list[ir.Attr] = [
        ir.AttrInt64("num_heads", kept["q_num_heads"].as_int()),
        ir.AttrInt64("kv_num_heads", kept["kv_num_heads"].as_int()),
        ir.AttrFloat32("scale", kept["scale"].as_float()),
    ]
    flash = ir.Node(
        DOMAIN, "GroupQueryAttention", [q, k, v, past_k, past_v, last, length], attributes, num_outputs=3, version=1
    )
    general = ir.Node("", "Attention", list(node.inputs), list(kept.values()), num_outputs=3)
    branches = []
    for inner, label in ((flash, "flash"), (general, "general")):
        for value, old in zip(inner.outputs, node.outputs, strict=True):
            value.name, value.type = f"{old.name}_{label}", old.type
            value.shape = None if old.shape is None else ir.Shape(list(old.shape))
        branches.append(ir.Graph([], inner.outputs, nodes=[inner], name=f"{node.outputs[0].name}_{label}"))
    choices = [ir.AttrGraph(f"{name}_branch", branch) for name, branch in zip(("then", "else"), branches, strict=True)]
    choice = ir.Node("", "If", [unpadded], choices, num_outputs=3)
    model.graph.insert_before(node, [choice])
    for value, old in zip(choice.outputs, node.outputs, strict=True):
        name, old.name = old.name, f"{old.name}_replaced"
        value.name, value.type, value.shape = name, old.type, old.shape
        ir.convenience.replace_all_uses_with(old, value, replace_graph_outputs=True)
    model.graph.remove(node, safe=True)
    model.graph.opset_imports.setdefault(DOMAIN, 1)
