"""From the canonical graph to one that traces to ONNX Runtime's operators.

A private copy is rewritten node by node, each semantic operator into a call of a function in ``_onnx_ops`` with weights
already in the kernel's layout:

=============================================  =========================================================================
linear with a float weight of one reader       MatMul with the weight stored transposed (+ Add)
linear with a low-bit weight                   ``com.microsoft.MatMulNBits`` where a block of 16 to 256 fits the group
... of 8 bits per row, dynamic input           DynamicQuantizeLinear (shared) + MatMulInteger + Mul (+ Add)
embedding of a low-bit table                   ``com.microsoft.GatherBlockQuantized``, or Gather and unpack
attention over a cache                         Attention, which appends the new keys and values (opset 23, CPU), or
                                               ``com.microsoft.GroupQueryAttention``, which writes them into the cache
moe                                            ``com.microsoft.MoE`` / ``QMoE`` where the kernel computes exactly this,
                                               else tokens sorted by expert, one small matmul per expert
anything else that reads a low-bit weight      unpacked in the graph; ONNX Runtime folds that when a session is created
=============================================  =========================================================================
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, overload

import torch
from torch import Tensor, fx

import surgeon.ops  # noqa: F401  # registers torch.ops.surgeon
from surgeon.backends import _onnx_attention_ops as attention
from surgeon.backends import _onnx_ops as emit
from surgeon.backends import _onnx_routing as routing
from surgeon.backends import _onnx_weights as layout
from surgeon.backends._onnx_attention import CachedAttention, spread_mask
from surgeon.backends._onnx_shared import SharedAttention
from surgeon.backends._onnx_weights import LowBit
from surgeon.gates import gate
from surgeon.graph import Graph, assign_tensor
from surgeon.numerics.quantization import FLOAT8
from surgeon.ops import attend

aten = torch.ops.aten
DEQUANTIZE = torch.ops.surgeon.dequantize.default
DYNAMIC = torch.ops.surgeon.fake_quantize_dynamic.default
MOE = torch.ops.surgeon.moe.default
ATTENTION = torch.ops.surgeon.attention.default

KERNEL_ACTIVATIONS = {"relu": "relu", "silu": "silu", "identity": "identity", "gelu_tanh": "gelu"}
"""What the expert kernels call the plain activations that they compute.  Their ``gelu`` is the tanh form: measured 2e-7
from it and 8e-5 from the exact one, so the exact gelu is not theirs."""

GATED_ALPHA = {"silu": 1.0, "quick_gelu": 1.702}
"""Gated activations that are gate * sigmoid(alpha * gate); ``swish`` brings its own alpha."""


def _swiglu(activation: str) -> dict[str, float] | None:
    """Attributes of the kernel's swiglu, g = min(gate, limit): g sigmoid(alpha g) (clamp(up, -limit, limit) + beta)."""
    form = gate(activation)
    alpha = GATED_ALPHA.get(form.base, form.alpha)
    if alpha is None or form.cap is not None or form.gate_max != form.up_limit:
        return None
    found = {"activation_alpha": alpha}
    found.update({"activation_beta": form.offset} if form.offset else {})
    found.update({"swiglu_limit": form.up_limit} if form.up_limit is not None else {})
    return found


class Lowering:
    """Rewrites a clone of one graph.

    Attributes:
        graph: the clone.
        level: accuracy level of low-bit matmuls.
        appends: whether the runtime's attention appends to caches.
        fused_experts: whether mixtures may become one kernel.
        weights: for the record, what became of every low-bit weight: operator, bits, block, symmetric, shape.
        fused: number of uses of each fused form.
    """

    def __init__(
        self, graph: Graph, level: int, fused_experts: bool, appends: bool = True, shared_caches: bool = False
    ) -> None:
        self.graph = graph.clone()
        self.level = level
        self.appends = appends
        self.fused_experts = fused_experts
        self.weights: dict[str, dict[str, Any]] = {}
        self.fused: Counter[str] = Counter()
        self._nodes = self.graph.module.graph
        self._made: dict[str, str | None] = {}
        self._taken = frozenset(self.graph.parameters())
        self._readers: Counter[tuple[Any, ...]] = Counter()
        self._codes: dict[fx.Node, tuple[fx.Node, fx.Node, fx.Node]] = {}
        self._caches = SharedAttention(self.graph, self._constant) if shared_caches else CachedAttention(self._nodes)

    def run(self) -> fx.GraphModule:
        """Rewrite everything and return the module to export; it holds only the tensors that it reads."""
        for node in self._nodes.nodes:
            if node.op == "get_attr":
                self._readers[_identity(self.graph.tensor(str(node.target)))] += len(node.users)
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
                name = first.setdefault(_identity(tensor), str(node.target))
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

    # -- mixture of experts -------------------------------------------------------------------------------------

    def _moe(self, node: fx.Node) -> None:
        # A fused kernel runs k experts per token whatever they weigh; where some are masked, sorting leaves them out.
        fused = self.fused_experts and not routing.may_be_zero(node.args[2])
        attributes = self._kernel(node) if fused else None
        if attributes is None or not (self._float_moe(node, attributes) or self._quantized_moe(node, attributes)):
            self._sorted_moe(node)

    def _kernel(self, node: fx.Node) -> dict[str, Any] | None:
        """Attributes under which the expert kernels compute this node exactly, or None.

        They need a known activation, an output as wide as the input, a fixed k, distinct experts in a row, and weights
        that are never negative (MoE takes their logarithms; QMoE was measured wrong for negative mixing weights).
        """
        args: tuple[Any, ...] = node.args
        _, index, weight, w_in, w_out, _, _, activation = args
        (experts, rows, width), (_, outer, inner) = (tuple(w.meta["val"].shape) for w in (w_in, w_out))
        k = index.meta["val"].shape[1]
        if width != outer or not isinstance(k, int) or k > experts:
            return None
        attributes: dict[str, Any]
        if rows == inner and activation in KERNEL_ACTIVATIONS:
            attributes = {"activation_type": KERNEL_ACTIVATIONS[activation]}
        elif rows == 2 * inner:
            swiglu = _swiglu(activation)
            if swiglu is None:
                return None
            attributes = {"activation_type": "swiglu", "swiglu_fusion": 1, **swiglu}
        else:
            return None
        if not routing.distinct_in_row(index, k) or not routing.never_negative(self.graph, weight):
            return None
        return attributes

    def _float_moe(self, node: fx.Node, attributes: dict[str, Any]) -> bool:
        """Lower to MoE; False where a weight is not float32 or is low-bit."""
        args: tuple[Any, ...] = node.args
        x, index, weight, w_in, w_out, b_in, b_out, _ = args
        if node.meta["val"].dtype != torch.float32 or DEQUANTIZE in (w_in.target, w_out.target):
            return False
        gated = attributes["activation_type"] == "swiglu"
        matrices = (self._rows(w_in, gated), self._rows(b_in, gated), w_out, b_out)
        self._replace(node, emit.fused_experts, (x, index, weight, *matrices, tuple(sorted(attributes.items()))))
        return True

    def _quantized_moe(self, node: fx.Node, attributes: dict[str, Any]) -> bool:
        """Lower to QMoE; False where its layout does not fit: equal bits, one block size that divides both widths."""
        args: tuple[Any, ...] = node.args
        x, index, weight, w_in, w_out, b_in, b_out, _ = args
        first, second = self._low_bit(w_in), self._low_bit(w_out)
        if first is None or second is None or first.bits != second.bits or first.bits not in (2, 4, 8):
            return False
        if first.scale.dtype != second.scale.dtype or first.scale.dtype not in (torch.float32, torch.float16):
            return False
        if x.target == DYNAMIC and first.per_row and first.bits == 8:
            return False  # an integer matmul was asked for
        spans = [w.columns if w.per_row else w.group for w in (first, second)] + [first.columns, second.columns]
        block = max((b for b in layout.BLOCKS[:-1] if all(span % b == 0 for span in spans)), default=None)
        if block is None:
            return False
        gated = attributes["activation_type"] == "swiglu"
        parts = []
        for low, rows, bias in ((first, gated, b_in), (second, False, b_out)):
            packed, scale, zero = layout.blockwise(low, block)
            tensors = {"": packed.flatten(-2), "_scale": scale, "_zero_point": zero}
            constants = [
                self._constant(f"{low.name}_experts{end}", layout.interleaved(t) if rows and t is not None else t)
                for end, t in tensors.items()
            ]
            parts.append((*constants, self._rows(bias, rows)))
            self._record("QMoE", low, block)
        # The CPU kernel wants weights as they are; the CUDA one would otherwise take them as packed for CUTLASS.
        more = {"expert_weight_bits": first.bits, "block_size": block, "accuracy_level": self.level}
        every = {**attributes, **more, "weights_prepacked": 0}
        self._replace(node, emit.fused_quantized_experts, (x, index, weight, *parts, tuple(sorted(every.items()))))
        return True

    def _rows(self, source: fx.Node | None, gated: bool) -> fx.Node | None:
        """A stack of matrices or biases in the kernel's row order: gate and up rows alternating."""
        if source is None or not gated:
            return source
        if source.op != "get_attr":
            return self._nodes.call_function(layout.interleaved, (source,))
        name = str(source.target)
        return self._constant(f"{name}_interleaved", lambda: layout.interleaved(self.graph.tensor(name).detach()))

    def _sorted_moe(self, node: fx.Node) -> None:
        """Lower to standard operators that run only the chosen experts."""
        args: tuple[Any, ...] = node.args
        x, index, weight, w_in, w_out, b_in, b_out, activation = args
        first = self._low_bit(w_in)
        integer = first is not None and self._is_integer(x, first)
        experts_in = self._expert_linears(w_in, b_in, integer)
        experts_out = self._expert_linears(w_out, b_out, False)
        codes = self._codes[x] if integer else None
        inner = w_out.meta["val"].shape[2]
        skips = routing.may_be_zero(weight)
        arguments = (x, codes, index, weight, experts_in, experts_out, inner, activation, skips)
        self._replace(node, emit.sorted_experts, arguments)

    def _expert_linears(self, source: fx.Node, bias: fx.Node | None, integer: bool) -> list[emit.Linear]:
        """The matrices of a stack [E, out, in] one by one, in the form in which each is applied."""
        stack = self._low_bit(source)
        value = source.meta["val"]
        found: list[emit.Linear] = []
        for e in range(value.shape[0]):
            b = self._select(bias, e)
            low = None if stack is None else stack.expert(e)
            block = None if low is None else layout.block_size(low)
            if low is not None and integer:
                found.append(("integer", *self._integer(low), b))
            elif low is not None and block is not None and low.scale.dtype == value.dtype:
                found.append(("nbits", *self._blockwise(low, block), b, low.bits, block, low.columns, self.level))
            else:
                found.append(("float", self._select(source, e, transposed=True), b))
        return found

    def _select(self, source: fx.Node | None, index: int, transposed: bool = False) -> fx.Node | None:
        """Entry ``index`` of a stack, transposed where asked: a constant of its own (a view) where the stack is one."""
        if source is None:
            return None
        if source.op == "get_attr":
            name = str(source.target)
            entry = self.graph.tensor(name).detach()[index]
            return self._constant(f"{name}_{index}", entry.t() if transposed else entry)
        part = self._nodes.call_function(aten.select.int, (source, 0, index))
        return self._nodes.call_function(aten.t.default, (part,)) if transposed else part

    def _cached_attention(self, node: fx.Node) -> None:
        """``Attention`` (opset 23), which appends new keys and values to a cache itself where they come as such; else ATen."""
        args: tuple[Any, ...] = node.args
        q, k, v, mask, is_causal, scale = args
        if self.appends and self._caches.lower(node):
            self.fused["grouped_attention" if self._caches.flat_output else "cached_attention"] += 1
        elif self.appends and not is_causal and (mask is None or _has_rows_of(mask, q)):
            self._replace(node, attention.attention, (q, k, v, mask, scale))
        else:
            self._replace(node, attend, node.args)

    def _attention(self, node: fx.Node) -> None:
        """Attention without a dimension of heads gets one: ONNX knows the four-dimensional form only."""
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

    # -- constants ----------------------------------------------------------------------------------------------

    def _low_bit(self, node: Any) -> LowBit | None:
        """What a dequantize node stores, where kernels take such codes, else None."""
        weight = self._stored(node)
        return None if weight is None or weight.packed.dtype == FLOAT8 else weight

    def _stored(self, node: Any) -> LowBit | None:
        """The arguments of a dequantize node whose tensors are constants, else None."""
        if not isinstance(node, fx.Node) or node.target != DEQUANTIZE:
            return None
        arguments: tuple[Any, ...] = node.args
        packed, scale, zero, bits, group, columns = arguments
        if any(source is not None and source.op != "get_attr" for source in (packed, scale, zero)):
            return None
        codes, scales, zeros = (
            None if source is None else self.graph.tensor(str(source.target)).detach() for source in (packed, scale, zero)
        )
        assert codes is not None
        assert scales is not None
        return LowBit(codes, scales, zeros, bits, group, columns, str(packed.target))

    def _is_integer(self, x: fx.Node, weight: LowBit) -> bool:
        """Whether x times this weight is an integer matmul: x dynamically quantized, the weight 8 bits per row."""
        return x.target == DYNAMIC and weight.bits == 8 and weight.per_row

    def _integer(self, weight: LowBit) -> tuple[fx.Node | None, ...]:
        self._record("MatMulInteger", weight, weight.columns)
        return self._constants(weight.name, "int8", lambda: layout.integer_columns(weight))

    def _blockwise(self, weight: LowBit, block: int) -> tuple[fx.Node | None, ...]:
        self._record("MatMulNBits", weight, block)
        return self._constants(weight.name, f"block{block}", lambda: layout.blockwise(weight, block))

    def _constants(
        self, name: str, form: str, make: Callable[[], tuple[Tensor, Tensor, Tensor | None]]
    ) -> tuple[fx.Node | None, ...]:
        """Read codes, scale and zero point in some form, made once however often the source weight is read."""
        names = [f"{name}_{form}{end}" for end in ("", "_scale", "_zero_point")]
        if names[0] not in self._made:
            for each, tensor in zip(names, make(), strict=True):
                self._keep(each, tensor)
        return tuple(self._read(each) for each in names)

    @overload
    def _constant(self, name: str, tensor: Tensor | Callable[[], Tensor]) -> fx.Node: ...

    @overload
    def _constant(self, name: str, tensor: None) -> None: ...

    def _constant(self, name: str, tensor: Tensor | Callable[[], Tensor] | None) -> fx.Node | None:
        """Read a new constant here; the name says what it is, so an equal name is an equal constant."""
        if name not in self._made:
            self._keep(name, tensor if tensor is None or isinstance(tensor, Tensor) else tensor())
        return self._read(name)

    def _keep(self, name: str, tensor: Tensor | None) -> None:
        """Hold a new constant under ``name``, or one like it where the model has a tensor of that name itself."""
        free = name
        while free in self._taken:
            free += "_"
        self._made[name] = None if tensor is None else free
        if tensor is not None:
            assign_tensor(self.graph.module, free, tensor.detach())

    def _read(self, name: str) -> fx.Node | None:
        made = self._made[name]
        return None if made is None else self._nodes.get_attr(made)

    def _alone(self, source: fx.Node) -> bool:
        """Whether one node of the source graph reads this tensor, under whatever name."""
        return self._readers[_identity(self.graph.tensor(str(source.target)))] == 1

    def _record(self, kind: str, weight: LowBit, block: int) -> None:
        self.weights[weight.name] = {
            "operator": kind,
            "bits": weight.bits,
            "group": weight.group,
            "block": block,
            "symmetric": weight.zero_point is None,
            "shape": [*weight.packed.shape[:-2], weight.columns],
        }

    def _replace(self, node: fx.Node, function: Callable[..., Any], arguments: Sequence[Any]) -> None:
        new = self._nodes.call_function(function, tuple(arguments))
        new.meta["val"] = node.meta.get("val")
        node.replace_all_uses_with(new)
        self._nodes.erase_node(node)
        self.fused[function.__name__] += 1


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    """What two names of one tensor have in common."""
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def _has_rows_of(mask: fx.Node, q: fx.Node) -> bool:
    """Whether a mask [B, N, S, T] has a row for every query: the kernel repeats batches and heads, rows not."""
    value = mask.meta["val"]
    return value.dim() == 4 and str(value.shape[2]) == str(q.meta["val"].shape[2])
