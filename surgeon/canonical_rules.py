"""What canonical form drops and respells, operator by operator; the numbers are those of :mod:`surgeon.canonical`.

A rule gets the arguments of one call by their schema name (already in the new graph) and the exported node; it returns
the node that stands for the result, or None to have the call appended as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import sympy  # type: ignore[import-untyped]  # ships no stubs
import torch
from torch import Tensor, fx
from torch._prims_common import compute_elementwise_output_logical_to_physical_perm

from surgeon.errors import TraceError

aten = torch.ops.aten


class Build(Protocol):
    """What rules need of the graph being built."""

    def emit(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        """Append a call, or find an equal one."""

    def sizes_of(self, value: Tensor) -> list[Any]:
        """The shape of a fake tensor as numbers and nodes."""

    def is_matrix(self, node: fx.Node) -> bool:
        """Whether the tensor that a node of the exported graph reads is kept as a matrix."""


Rule = Callable[[Build, dict[str, Any], fx.Node], Any]

_IDENTITIES = {
    "aten::clone",
    "aten::contiguous",
    "aten::detach",
    "aten::detach_",
    "aten::alias",
    "aten::lift",
    "aten::lift_fresh",
    "aten::lift_fresh_copy",
    "aten::positive",
}
_CASTS = {"aten::_to_copy", "aten::to", "aten::type_as"}
_DROPOUTS = {"aten::dropout", "aten::feature_dropout"}
_VIEWS = {f"aten::{name}" for name in "view _unsafe_view reshape view_as reshape_as flatten unflatten".split()}
_SAME_ORDER = {"aten::slice", "aten::expand", "aten::squeeze"}
_SWAPS = {f"aten::{name}" for name in "mT adjoint swapaxes swapdims".split()}
_PERMUTATIONS = {f"aten::{name}" for name in "numpy_T movedim moveaxis".split()}
_FILLS: dict[str, float | None] = {
    "aten::new_ones": 1,
    "aten::new_zeros": 0,
    "aten::new_full": None,
    "aten::ones_like": 1,
    "aten::zeros_like": 0,
    "aten::full_like": None,
    "aten::ones": 1,
    "aten::zeros": 0,
}
_NEUTRAL = {"aten::add": 0, "aten::sub": 0, "aten::mul": 1, "aten::div": 1}
_CONVOLUTIONS = {f"aten::{name}" for name in "conv1d conv2d conv3d convolution".split()}
_CONJUNCTIONS = {"aten::__and__", "aten::bitwise_and", "aten::logical_and"}
_INFINITY = 9223372036854775807
"""How export spells an open end of a slice."""


def _result(old: fx.Node) -> Tensor:
    value: Tensor = old.meta["val"]
    return value


def _same_shape(a: Tensor, b: Tensor) -> bool:
    return a.dim() == b.dim() and all(_expr(m) == _expr(n) for m, n in zip(a.shape, b.shape, strict=True))


def _expr(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


def _identity(build: Build, given: dict[str, Any], old: fx.Node) -> Any:
    return next(iter(given.values()))  # Rule 2


def _cast(build: Build, given: dict[str, Any], old: fx.Node) -> Any:
    x, result = given["self"], _result(old)
    source = x.meta["val"]
    if source.device != result.device:
        return build.emit(aten._to_copy.default, (x,), {"dtype": result.dtype, "device": result.device})
    if source.dtype == result.dtype:
        return x  # Rule 2
    return build.emit(aten._to_copy.default, (x,), {"dtype": result.dtype})


def _dropout(build: Build, given: dict[str, Any], old: fx.Node) -> Any:
    inactive = given["train"] is False or given["p"] == 0
    return given["input"] if inactive else None  # Rule 2


def _reshape(build: Build, given: dict[str, Any], old: fx.Node) -> Any:
    if "dtype" in given:
        return None  # a reinterpretation of bits
    x = given["self"]
    if x.target == aten.reshape.default:
        x = x.args[0]  # Rule 3
    if _same_shape(x.meta["val"], _result(old)):
        return x  # Rule 4
    sizes = given.get("size", given.get("shape"))
    if sizes is None:
        sizes = build.sizes_of(_result(old))
    return build.emit(aten.reshape.default, (x, sizes), {})  # Rule 3


def _same_order(build: Build, given: dict[str, Any], old: fx.Node) -> Any:
    x = given["self"]
    if _same_shape(x.meta["val"], _result(old)) and given.get("step", 1) == 1:
        return x  # Rule 4
    if given.get("end") == _INFINITY:
        given["end"] = None
    return None


def _permute(build: Build, given: dict[str, Any], old: fx.Node) -> Any:
    rank = given["self"].meta["val"].dim()
    return given["self"] if [d % rank for d in given["dims"]] == list(range(rank)) else None  # Rule 4


def _expand_as(build: Build, given: dict[str, Any], old: fx.Node) -> Any:
    if _same_shape(given["self"].meta["val"], _result(old)):
        return given["self"]  # Rule 4
    return build.emit(aten.expand.default, (given["self"], build.sizes_of(_result(old))), {})  # Rule 12


def _narrow(build: Build, given: dict[str, Any], old: fx.Node) -> Any:
    x, dim, start, length = (given[name] for name in ("self", "dim", "start", "length"))
    if _same_shape(x.meta["val"], _result(old)):
        return x  # Rule 4
    if not isinstance(start, int) or not isinstance(length, int):
        return None
    return build.emit(aten.slice.Tensor, (x, dim, start, start + length), {})  # Rule 12


def _chunk(build: Build, given: dict[str, Any], old: fx.Node) -> Any:
    x, dim = given["self"], given["dim"]
    pieces = _pieces(x, dim, [value.shape[dim] for value in old.meta["val"]])
    if pieces is not None:
        return pieces
    size = build.sizes_of(old.meta["val"][0])[dim]
    return build.emit(aten.split.Tensor, (x, size, dim) if dim else (x, size), {})  # Rule 12


def _split(build: Build, given: dict[str, Any], old: fx.Node) -> Any:
    sizes, dim = given["split_size"], given["dim"]
    pieces = _pieces(given["self"], dim, [value.shape[dim] for value in old.meta["val"]])
    if pieces is not None:
        return pieces
    if not isinstance(sizes, list | tuple):
        return None
    return build.emit(aten.split_with_sizes.default, (given["self"], sizes, dim) if dim else (given["self"], sizes), {})


def _pieces(x: fx.Node, dim: int, sizes: list[Any]) -> tuple[fx.Node, ...] | None:
    """The pieces of a concatenation that is split where they meet (Rule 15)."""
    if x.target != aten.cat.default or not isinstance(x.args[0], list | tuple):
        return None
    rank = x.meta["val"].dim()
    joined = x.args[1] if len(x.args) > 1 else 0
    pieces = tuple(piece for piece in x.args[0] if isinstance(piece, fx.Node))
    assert isinstance(joined, int)
    if joined % rank != dim % rank:
        return None
    return pieces if [piece.meta["val"].shape[dim] for piece in pieces] == sizes else None


def _swap(build: Build, given: dict[str, Any], old: fx.Node) -> Any:
    x, *dims = given.values()
    if not dims and (old.target._schema.name == "aten::adjoint" and x.meta["val"].is_complex()):  # type: ignore[union-attr]
        return None
    return build.emit(aten.transpose.int, (x, *(dims or (-2, -1))), {})  # Rule 12


def _movement(build: Build, given: dict[str, Any], old: fx.Node) -> Any:
    x, *dims = given.values()
    rank = x.meta["val"].dim()
    order = list(range(rank))[::-1]
    if dims:
        sources, targets = ([d % rank for d in ([given] if isinstance(given, int) else given)] for given in dims)
        moved = dict(zip(targets, sources, strict=True))
        rest = iter(d for d in range(rank) if d not in sources)
        order = [moved[d] if d in moved else next(rest) for d in range(rank)]
    if order == list(range(rank)):
        return x  # Rule 4
    return build.emit(aten.permute.default, (x, order), {})  # Rule 12


def _ravel(build: Build, given: dict[str, Any], old: fx.Node) -> Any:
    return build.emit(aten.reshape.default, (given["self"], [-1]), {})  # Rule 12


def _copy(build: Build, given: dict[str, Any], old: fx.Node) -> Any:
    target, source = given["self"].meta["val"], given["src"]
    if source.meta["val"].dtype != target.dtype:
        source = build.emit(aten._to_copy.default, (source,), {"dtype": target.dtype})
    if _same_shape(source.meta["val"], target):
        return source
    return build.emit(aten.expand.default, (source, build.sizes_of(target)), {})  # Rule 5


def _neutral(number: int) -> Rule:
    def rule(build: Build, given: dict[str, Any], old: fx.Node) -> Any:
        if "self" not in given or "other" not in given or not isinstance(given["self"], fx.Node):
            return None
        other, rounding = given["other"], given.get("rounding_mode")
        if isinstance(other, int | float) and other == number and rounding is None:
            x, result = given["self"].meta["val"], _result(old)
            if isinstance(x, Tensor) and x.dtype == result.dtype and _same_shape(x, result):
                return given["self"]  # Rule 6
        return None

    return rule


def _conjunction(build: Build, given: dict[str, Any], old: fx.Node) -> Any:
    result = _result(old)
    pair = (given["self"], given["other"])
    for true, x in (pair, pair[::-1]):
        if not isinstance(true, fx.Node) or not isinstance(x, fx.Node) or true.target != aten.full.default:
            continue
        value = x.meta["val"]
        if true.args[1] is True and value.dtype == torch.bool == result.dtype and _same_shape(value, result):
            return x  # Rule 6
    return None


def _fill(number: float | None) -> Rule:
    def rule(build: Build, given: dict[str, Any], old: fx.Node) -> Any:
        result = _result(old)
        value = given["fill_value"] if number is None else number
        if result.dtype == torch.bool and not isinstance(value, fx.Node):
            value = bool(value)
        elif result.dtype.is_floating_point and not isinstance(value, fx.Node):
            value = float(value)
        settings = {"dtype": result.dtype, "device": result.device}
        return build.emit(aten.full.default, (build.sizes_of(result), value), settings)  # Rule 7

    return rule


def _strided(build: Build, given: dict[str, Any], old: fx.Node) -> Any:
    """``as_strided`` counts elements in memory: make the memory what it was (an exception from rule 2)."""
    value = old.all_input_nodes[0].meta["val"]
    if not value.is_contiguous():
        order, _ = compute_elementwise_output_logical_to_physical_perm(value)
        if not value.permute(order).is_contiguous():
            raise TraceError("the model reads a part of a tensor's memory by as_strided; call contiguous() on it before")
        given["self"] = build.emit(aten.permute.default, (given["self"], list(order)), {})
    given["self"] = build.emit(aten.clone.default, (given["self"],), {"memory_format": torch.contiguous_format})
    return None


def kernel_of_one(old: fx.Node) -> fx.Node | None:
    """The weight of a convolution that looks at one position at a time: kernel 1, no padding, one group, read as stored."""
    target = old.target
    if not isinstance(target, torch._ops.OpOverload) or target._schema.name not in _CONVOLUTIONS:
        return None
    names = [argument.name for argument in target._schema.arguments]
    given: dict[str, Any] = {**dict(zip(names, old.args, strict=False)), **old.kwargs}
    weight, padding = given["weight"], given.get("padding", 0)
    sizes = [padding] if isinstance(padding, int) else padding
    padded = not isinstance(padding, str) and any(size != 0 for size in sizes)
    if padded or given.get("groups", 1) != 1 or given.get("transposed", False) or weight.op != "get_attr":
        return None
    kernel: fx.Node = weight
    return kernel if all(size == 1 for size in kernel.meta["val"].shape[2:]) else None


def _pointwise_convolution(build: Build, given: dict[str, Any], old: fx.Node) -> Any:
    """y[b, :, p] = W x[b, :, stride p] + bias for every position p: a linear over the channels."""
    kernel = kernel_of_one(old)
    if kernel is None or not build.is_matrix(kernel):
        return None
    x, positions = given["input"], kernel.meta["val"].dim() - 2
    rank = x.meta["val"].dim()
    channels = rank - positions - 1
    strides = given["stride"] if isinstance(given["stride"], list | tuple) else [given["stride"]]
    for i in range(positions):
        step = strides[i % len(strides)]
        if step != 1:
            x = build.emit(aten.slice.Tensor, (x, channels + 1 + i, 0, None, step), {})
    inward = [*range(channels), *range(channels + 1, rank), channels]
    outward = [*range(channels), rank - 1, *range(channels, rank - 1)]
    operands = (build.emit(aten.permute.default, (x, inward), {}), given["weight"])
    bias = given["bias"]
    y = build.emit(aten.linear.default, operands if bias is None else (*operands, bias), {})
    return build.emit(aten.permute.default, (y, outward), {})  # Rule 14


def _concatenate(build: Build, given: dict[str, Any], old: fx.Node) -> Any:
    return given["tensors"][0] if len(given["tensors"]) == 1 else None


def _gated_half(build: Build, given: dict[str, Any], old: fx.Node) -> Any:
    """``glu``: [a | b] -> a sigmoid(b), so that the two halves are seen apart."""
    x = given["self"]
    dim, value = given["dim"], x.meta["val"]
    size = value.shape[dim]
    if not isinstance(size, int):
        return None
    a, b = (build.emit(aten.slice.Tensor, (x, dim % value.dim(), i * size // 2, (i + 1) * size // 2), {}) for i in (0, 1))
    return build.emit(aten.mul.Tensor, (a, build.emit(aten.sigmoid.default, (b,), {})), {})  # Rule 11


RULES: dict[str, Rule] = {
    **dict.fromkeys(_IDENTITIES, _identity),
    **dict.fromkeys(_CASTS, _cast),
    **dict.fromkeys(_DROPOUTS, _dropout),
    **dict.fromkeys(_VIEWS, _reshape),
    **dict.fromkeys(_SAME_ORDER, _same_order),
    **{name: _neutral(number) for name, number in _NEUTRAL.items()},
    **{name: _fill(number) for name, number in _FILLS.items()},
    **dict.fromkeys(_CONJUNCTIONS, _conjunction),
    **dict.fromkeys(_SWAPS, _swap),
    **dict.fromkeys(_PERMUTATIONS, _movement),
    "aten::expand_as": _expand_as,
    "aten::narrow": _narrow,
    "aten::ravel": _ravel,
    "aten::chunk": _chunk,
    "aten::split": _split,
    "aten::permute": _permute,
    "aten::copy": _copy,
    "aten::cat": _concatenate,
    "aten::glu": _gated_half,
    **dict.fromkeys(_CONVOLUTIONS, _pointwise_convolution),
    "aten::as_strided": _strided,
}
