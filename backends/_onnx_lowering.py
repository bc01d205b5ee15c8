"""From the canonical graph to one that traces to ONNX Runtime's operators.

A private copy is rewritten node by node, each semantic operator into a call of a function in ``_onnx_ops`` with weights
already in the kernel's layout:

=============================================  =========================================================================
linear with a float weight of one reader       MatMul with the weight stored transposed (+ Add)
linear with a low-bit weight                   ``com.microsoft.MatMulNBits`` where a block of 16 to 256 fits the group
... of 8 bits per row, dynamic input           DynamicQuantizeLinear (shared) + MatMulInteger + Mul (+ Add)
embedding of a low-bit table                   ``com.microsoft.GatherBlockQuantized``, or Gather and unpack
attention over a cache                         Attention, which appends the new keys and values (opset 23), or
                                               ``com.microsoft.GroupQueryAttention``: with shared caches, which it writes
                                               into, and on CUDA for rows without padding (``_onnx_cuda``)
moe                                            ``com.microsoft.MoE`` / ``QMoE`` where the kernel computes exactly this,
                                               else tokens sorted by expert, one small matmul per expert
anything else that reads a low-bit weight      unpacked in the graph; ONNX Runtime folds that when a session is created
=============================================  =========================================================================
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

import surgeon.ops  # noqa: F401  # registers torch.ops.surgeon
from surgeon.backends import _onnx_attention_ops as attention
from surgeon.backends import _onnx_ops as emit
from surgeon.backends import _onnx_weights as layout
from surgeon.backends._onnx_attention import CachedAttention, spread_mask
from surgeon.backends._onnx_constants import DEQUANTIZE, DYNAMIC, identity
from surgeon.backends._onnx_experts import Experts
from surgeon.backends._onnx_shared import SharedAttention
from surgeon.graph import Graph, assign_tensor
from surgeon.numerics.quantization import FLOAT8
from surgeon.ops import attend

aten = torch.ops.aten
MOE = torch.ops.surgeon.moe.default
ATTENTION = torch.ops.surgeon.attention.default

class Lowering(Experts):
    """Rewrites a clone of one graph.

    Attributes:
        appends: whether the runtime's attention appends to caches.
    """

    def __init__(
        self,
        graph: Graph,
        level: int,
        fused_experts: bool,
        appends: bool = True,
        shared_caches: bool = False,
        provider: str = "cpu",
    ) -> None:
        super().__init__(graph, level, fused_experts, provider)
        self.appends = appends
        self._caches = SharedAttention(self.graph, self._constant) if shared_caches else CachedAttention(self._nodes)

    def run(self) -> fx.GraphModule:
        """Rewrite everything and return the module to export; it holds only the tensors that it reads."""
        for node in self._nodes.nodes:
            if node.op == "get_attr":
                self._readers[identity(self.graph.tensor(str(node.target)))] += len(node.users)
        rules: dict[Any, Callable[[fx.Node], object]] = {
            DYNAMIC: self._quantize_once,
            aten.scaled_dot_product_attention.default: self._attention,
            ATTENTION: self._cached_attention,
            aten.index.Tensor: lambda node: spread_mask(self._nodes, node),
            aten.linear.default: self._linear,
            aten.embedding.default: self._embedding,
            MOE: self._moe,
        }
        self._apply(rules)
        self._apply({DYNAMIC: self._dynamic_remainder, DEQUANTIZE: self._dequantize_remainder})
        self._nodes.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
        return self._module()

    def _apply(self, rules: Mapping[Any, Callable[[fx.Node], object]]) -> None:
        for node in list(self._nodes.nodes):
            rule = rules.get(node.target)
            if rule is not None and node.users:
                with self._nodes.inserting_before(node):
                    rule(node)

    def _module(self) -> fx.GraphModule:
        """The rewritten graph over fresh storage of names; a tensor read under two names is kept under the first."""
        root, first = torch.nn.Module(), dict[tuple[Any, ...], str]()
        for node in self._nodes.nodes:
            if node.op == "get_attr":
                tensor = self.graph.tensor(str(node.target))
                name = first.setdefault(identity(tensor), str(node.target))
                node.target = name
                assign_tensor(root, name, tensor)
        self._nodes.lint()
        return fx.GraphModule(root, self._nodes)

    # -- dense and low-bit matrices -----------------------------------------------------------------------------

    def _quantize_once(self, node: fx.Node) -> None:
        """Make the codes of a dynamically quantized value, once for all its readers (q, k and v read one value)."""
        twin = next((other for other in self._codes if other.args[0] is node.args[0]), None)
        if twin is None:
            codes = self._nodes.call_function(emit.dynamic_quantize, (node.args[0],))
            first, second, third = (self._nodes.call_function(operator.getitem, (codes, i)) for i in range(3))
            self._codes[node] = (first, second, third)
        else:
            self._codes[node] = self._codes[twin]

    def _dynamic_remainder(self, node: fx.Node) -> None:
        self._replace(node, emit.dequantize_codes, (*self._codes[node], node.meta["val"].dtype))

    def _dequantize_remainder(self, node: fx.Node) -> None:
        weight = self._stored(node)
        if weight is not None:
            self._record("unpacked" if weight.packed.dtype != FLOAT8 else "Cast of float8", weight, weight.group)
        self._replace(node, emit.unpack, node.args)

    def _linear(self, node: fx.Node) -> None:
        x, source, bias = (*node.args, None)[:3]
        assert isinstance(x, fx.Node)
        assert isinstance(source, fx.Node)
        weight = self._low_bit(source)
        if weight is None:
            if source.op == "get_attr" and self._alone(source) and source.meta["val"].dim() == 2:
                # Stored transposed (a view, no bytes are copied), so that nothing stands between the file and MatMul.
                name = str(source.target)
                transposed = self._constant(f"{name}_transposed", lambda: self.graph.tensor(name).detach().t())
                self._replace(node, emit.transposed_linear, (x, transposed, bias))
            return
        dtype = node.meta["val"].dtype
        if self._is_integer(x, weight):
            self._replace(node, emit.matmul_integer, (self._codes[x], *self._integer(weight), bias, dtype))
            return
        block = layout.block_size(weight)
        if block is not None and weight.packed.dim() == 3 and weight.scale.dtype == dtype:
            tensors = self._blockwise(weight, block)
            self._replace(node, emit.matmul_nbits, (x, *tensors, bias, weight.bits, block, weight.columns, self.level))

    def _embedding(self, node: fx.Node) -> None:
        table, index = node.args[:2]
        weight = self._low_bit(table)
        if weight is None or weight.packed.dim() != 3:
            return
        assert isinstance(table, fx.Node)
        packed, scale, zero = table.args[:3]
        assert isinstance(packed, fx.Node)
        # A table that a linear reads too stays in that kernel's layout, so that the file holds it once.
        fits = weight.bits in (4, 8) and weight.group in layout.BLOCKS and weight.columns % weight.group == 0
        if fits and self._alone(packed):
            rows = self._constant(f"{weight.name}_rows", weight.packed.flatten(-2))
            if weight.zero_point is not None:
                zero = self._constant(f"{weight.name}_zero_point", layout.pack_rows(weight.zero_point, weight.bits))
            self._replace(node, emit.gather_block_quantized, (rows, index, scale, zero, weight.bits, weight.group))
            self._record("GatherBlockQuantized", weight, weight.group)
            return
        arguments = (packed, index, scale, zero, weight.bits, weight.group, weight.columns)
        self._replace(node, emit.gather_dequantize, arguments)
        self._record("Gather", weight, weight.group)

    # -- attention ----------------------------------------------------------------------------------------------

    def _cached_attention(self, node: fx.Node) -> None:
        """``Attention`` (opset 23), which appends new keys and values to a cache itself where they come as such; else ATen."""
        args: tuple[Any, ...] = node.args
        q, k, v, mask, is_causal, scale = args
        if self.appends and self._caches.lower(node):
            self.fused["grouped_attention" if self._caches.flat_output else "cached_attention"] += 1
            return
        if mask is not None and not is_causal:
            mask = self._spread(mask, q, k)
        if self.appends and not is_causal and (mask is None or mask.meta["val"].dim() == 4):
            self._replace(node, attention.attention, (q, k, v, mask, scale))
        else:
            self._replace(node, attend, (q, k, v, mask, is_causal, scale))

    def _attention(self, node: fx.Node) -> None:
        """Attention without a dimension of heads gets one: ONNX knows the four-dimensional form only."""
        q, k, _, *masks = node.args
        if masks and isinstance(masks[0], fx.Node):
            node.update_arg(3, self._spread(masks[0], q, k))
        rank = node.meta["val"].dim()
        if rank == 4:
            return
        with self._nodes.inserting_before(node):
            for axis, source in enumerate(node.args[:4]):
                if isinstance(source, fx.Node) and source.meta["val"].dim() == 3:
                    node.update_arg(axis, self._nodes.call_function(aten.unsqueeze.default, (source, 1)))
        with self._nodes.inserting_after(node):
            squeezed = self._nodes.call_function(aten.squeeze.dim, (node, 1))
        node.replace_all_uses_with(squeezed, delete_user_cb=lambda user: user is not squeezed)

    def _spread(self, mask: fx.Node, q: Any, k: Any) -> fx.Node:
        """A mask with a row for every query and a column for every key: kernels repeat batches and heads alone.

        A mask of padding has one row for all queries.
        """
        value, needed = mask.meta["val"], (q.meta["val"].shape[-2], k.meta["val"].shape[-2])
        if list(map(str, value.shape[-2:])) == list(map(str, needed)):
            return mask
        spread = self._nodes.call_function(emit.spread_to_scores, (mask, q, k))
        spread.meta["val"] = value.expand(*value.shape[:-2], *needed)
        return spread
