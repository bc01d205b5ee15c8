"""Constants of a graph that is rewritten for ONNX Runtime: low-bit weights in the layouts of kernels, each made once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, overload

import torch
from torch import Tensor, fx

import surgeon.ops  # noqa: F401  # registers torch.ops.surgeon
from surgeon.backends import _onnx_weights as layout
from surgeon.backends._onnx_weights import LowBit
from surgeon.graph import Graph, assign_tensor
from surgeon.numerics.quantization import FLOAT8

DEQUANTIZE = torch.ops.surgeon.dequantize.default
DYNAMIC = torch.ops.surgeon.fake_quantize_dynamic.default


class Constants:
    """Nodes and new constants of a clone of one graph that is rewritten.

    Attributes:
        graph: the clone.
        level: accuracy level of low-bit matmuls.
        weights: for the record, what became of every low-bit weight: operator, bits, block, symmetric, shape.
        fused: number of uses of each fused form.
    """

    def __init__(self, graph: Graph, level: int) -> None:
        self.graph = graph.clone()
        self.level = level
        self.weights: dict[str, dict[str, Any]] = {}
        self.fused: Counter[str] = Counter()
        self._nodes = self.graph.module.graph
        self._made: dict[str, str | None] = {}
        self._taken = frozenset(self.graph.parameters())
        self._readers: Counter[tuple[Any, ...]] = Counter()
        self._codes: dict[fx.Node, tuple[fx.Node, fx.Node, fx.Node]] = {}

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
        return self._readers[identity(self.graph.tensor(str(source.target)))] == 1

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


def identity(tensor: Tensor) -> tuple[Any, ...]:
    """What two names of one tensor have in common."""
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype
