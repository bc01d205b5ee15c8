"""Mixtures of experts of a graph as one kernel each where that computes exactly the same, else sorted by expert."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from surgeon.backends import _onnx_cuda_ops as cuda
from surgeon.backends import _onnx_ops as emit
from surgeon.backends import _onnx_routing as routing
from surgeon.backends import _onnx_weights as layout
from surgeon.backends._onnx_constants import DEQUANTIZE, DYNAMIC, Constants
from surgeon.gates import gate
from surgeon.graph import Graph

aten = torch.ops.aten

KERNEL_ACTIVATIONS = {"relu": "relu", "silu": "silu", "identity": "identity", "gelu_tanh": "gelu"}
"""What the expert kernels call the plain activations that they compute.  Their ``gelu`` is the tanh form: measured 2e-7
from it and 8e-5 from the exact one, so the exact gelu is not theirs."""

FLOAT_EXPERTS = {"cpu": (torch.float32,), "cuda": (torch.float32, torch.float16, torch.bfloat16)}
"""Types that MoE takes, by provider (measured on the CPU; in the kernels that the CUDA provider registers)."""

GATED_ALPHA = {"silu": 1.0, "quick_gelu": 1.702}
"""Gated activations that are gate * sigmoid(alpha * gate); ``swish`` brings its own alpha."""


def _swiglu(activation: str) -> dict[str, float] | None:
    """Attributes of the kernel's swiglu, g = min(gate, limit): g sigmoid(alpha g) (clamp(up, -limit, limit) + beta)."""
    form = gate(activation)
    alpha = GATED_ALPHA.get(form.base, form.alpha)
    if alpha is None or form.cap is not None or form.scale is not None or form.shift or form.gate_max != form.up_limit:
        return None
    found = {"activation_alpha": alpha}
    found.update({"activation_beta": form.offset} if form.offset else {})
    found.update({"swiglu_limit": form.up_limit} if form.up_limit is not None else {})
    return found


class Experts(Constants):
    """Lowers mixtures of one graph.

    Attributes:
        fused_experts: whether mixtures may become one kernel.
        provider: ``cpu`` or ``cuda``, whose expert kernels differ.
    """

    def __init__(self, graph: Graph, level: int, fused_experts: bool, provider: str) -> None:
        super().__init__(graph, level)
        self.fused_experts = fused_experts
        self.provider = provider

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
        # On CUDA the weights of an expert that is chosen twice are summed in front of the kernel.
        distinct = self.provider == "cuda" or routing.distinct_in_row(index, k)
        return attributes if distinct and routing.never_negative(self.graph, weight) else None

    def _routing(self, x: fx.Node, index: fx.Node, weight: fx.Node, experts: int) -> tuple[fx.Node, fx.Node | None]:
        """Logits for the CUDA kernels, and the weights whose sum scales their results where that is not 1."""
        dtype = x.meta["val"].dtype
        logits = routing.selected_logits(index, weight)
        if logits is not None and logits.meta["val"].dtype == dtype and logits.meta["val"].shape[1] == experts:
            return logits, None
        return self._nodes.call_function(cuda.routing_logits, (index, weight, experts, dtype)), weight

    def _float_moe(self, node: fx.Node, attributes: dict[str, Any]) -> bool:
        """Lower to MoE; False where a weight is low-bit, or of a type that the provider's kernel does not take."""
        args: tuple[Any, ...] = node.args
        _, _, _, w_in, w_out, b_in, b_out, _ = args
        if node.meta["val"].dtype not in FLOAT_EXPERTS[self.provider] or DEQUANTIZE in (w_in.target, w_out.target):
            return False
        gated = attributes["activation_type"] == "swiglu"
        matrices = (self._rows(w_in, gated), self._rows(b_in, gated), w_out, b_out)
        operators: Mapping[str, Any] = {"cpu": emit.fused_experts, "cuda": cuda.cuda_experts}
        self._fuse(node, operators, matrices, attributes)
        return True

    def _quantized_moe(self, node: fx.Node, attributes: dict[str, Any]) -> bool:
        """Lower to QMoE; False where its layout does not fit: equal bits, one block size that divides both widths."""
        args: tuple[Any, ...] = node.args
        x, _, _, w_in, w_out, b_in, b_out, _ = args
        first, second = self._low_bit(w_in), self._low_bit(w_out)
        on_cuda = self.provider == "cuda"
        if first is None or second is None or first.bits != second.bits or first.bits not in ((4, 8) if on_cuda else (2, 4, 8)):
            return False
        types = (torch.float16, torch.bfloat16) if on_cuda else (torch.float32, torch.float16)
        if first.scale.dtype != second.scale.dtype or first.scale.dtype not in types:
            return False
        if on_cuda and first.scale.dtype != x.meta["val"].dtype:
            return False
        if x.target == DYNAMIC and first.per_row and first.bits == 8:
            return False  # an integer matmul was asked for
        spans = [w.columns if w.per_row else w.group for w in (first, second)] + [first.columns, second.columns]
        block = max((b for b in layout.BLOCKS[:-1] if all(span % b == 0 for span in spans)), default=None)
        # On CUDA blocks of 64 and 128 have kernels for scales with and without zero points, over whole tiles of 64 columns.
        if block is None or (on_cuda and block not in (64, 128)):
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
        operators: Mapping[str, Any] = {"cpu": emit.fused_quantized_experts, "cuda": cuda.cuda_quantized_experts}
        self._fuse(node, operators, parts, every)
        return True

    def _fuse(
        self, node: fx.Node, operators: Mapping[str, Any], parts: Sequence[Any], attributes: Mapping[str, Any]
    ) -> None:
        """Replace a mixture by the provider's operator over these matrices and biases."""
        args: tuple[Any, ...] = node.args
        x, index, weight, w_in = args[:4]
        fixed = tuple(sorted(attributes.items()))
        if self.provider == "cuda":
            routes = self._routing(x, index, weight, w_in.meta["val"].shape[0])
            self._replace(node, operators["cuda"], (x, *routes, *parts, index.meta["val"].shape[1], fixed))
        else:
            self._replace(node, operators["cpu"], (x, index, weight, *parts, fixed))

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
