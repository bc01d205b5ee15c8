"""What kind of operator a node is, as far as the discovery of structure needs to know."""

from __future__ import annotations

import operator
from typing import Any

import sympy  # type: ignore[import-untyped]  # ships no stubs
import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

_SOME = 2
_SHAPE = "traced_shape"
"""Where a node keeps the value whose shape was asked for, and that shape."""

RESHAPES = frozenset(
    f"aten::{name}"
    for name in (
        "view _unsafe_view reshape view_as reshape_as permute transpose swapaxes swapdims movedim t numpy_T mT "
        "unsqueeze squeeze flatten unflatten ravel clone contiguous alias detach lift_fresh_copy"
    ).split()
)
"""The same elements in another shape or order of dimensions."""

CASTS = frozenset({"aten::_to_copy", "aten::to", "aten::type_as", "prims::convert_element_type"})
"""The same values in another type."""

NARROWINGS = frozenset(
    f"aten::{name}"
    for name in "slice select split split_with_sizes chunk unbind narrow tensor_split unsafe_split unsafe_chunk".split()
)
"""Some of the elements."""

PADDINGS = frozenset({"aten::constant_pad_nd", "aten::pad"})
"""The same elements among others that are constant."""

REPETITIONS = frozenset(f"aten::{name}" for name in "expand expand_as repeat repeat_interleave tile broadcast_to".split())
"""The same elements several times."""

POINTWISE = frozenset(
    f"aten::{name}"
    for name in "where hardswish log_sigmoid prelu glu softsign rsub relu relu6 hardtanh masked_fill".split()
)
"""Element-wise operators that carry no ``pointwise`` tag in this version of torch."""

ATTENTIONS = frozenset(
    f"aten::{name}"
    for name in (
        "scaled_dot_product_attention _scaled_dot_product_flash_attention _scaled_dot_product_efficient_attention "
        "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_cudnn_attention"
    ).split()
) | {"surgeon::attention"}
"""Attention in one node, with query, key and value as its first three arguments."""

SOFTMAXES = frozenset({"aten::softmax", "aten::_softmax", "aten::_safe_softmax"})
NORMS = frozenset(
    f"aten::{name}"
    for name in (
        "layer_norm native_layer_norm rms_norm _fused_rms_norm group_norm native_group_norm batch_norm "
        "_native_batch_norm_legit_no_training instance_norm"
    ).split()
)
"""Normalisation in one node."""

BATCH_NORMS = frozenset({"aten::batch_norm", "aten::_native_batch_norm_legit_no_training"})
"""Those that are fixed functions of single features where nothing is trained."""

NORMS_OVER_POSITIONS = frozenset({"aten::group_norm", "aten::instance_norm"})
"""Those whose statistics run over positions too."""

SCANS = frozenset(
    f"aten::{name}" for name in "cumsum cumprod logcumsumexp cummax flip fft_fft fft_rfft _fft_r2c _fft_c2c".split()
)
"""What recurrences and spectral mixers are written with."""

RECURRENCES = frozenset({"aten::lstm", "aten::gru", "aten::rnn_tanh", "aten::rnn_relu"})
"""Whole recurrent layers, whose weights are a list."""

REDUCTIONS = frozenset(
    f"aten::{name}" for name in "mean sum var std var_mean std_mean amax amin norm linalg_vector_norm prod".split()
)
CONVOLUTIONS = frozenset(
    f"aten::{name}" for name in "convolution conv1d conv2d conv3d _convolution conv_transpose1d conv_transpose2d".split()
)
PRODUCTS = frozenset(f"aten::{name}" for name in "matmul mm bmm baddbmm addmm addbmm einsum linear mv dot".split())
LOOKUPS = frozenset({"aten::embedding", "aten::index", "aten::index_select"})
SAMPLERS = frozenset(f"aten::grid_sampler{suffix}" for suffix in ("", "_2d", "_3d"))
"""Values between the positions of the first argument, at places that the second one says."""

SELECTIONS = frozenset(f"aten::{name}" for name in "topk sort argsort argmax argmin kthvalue".split())
"""Operators that say which elements are largest or smallest."""

COMPARISONS = frozenset({"aten::le", "aten::lt", "aten::ge", "aten::gt"})

ADD = "aten::add"
CONCATENATE = "aten::cat"
INDEX = "aten::index"
PUT = "aten::index_put"
TOPK = "aten::topk"
MOE = "surgeon::moe"
DEQUANTIZE = "surgeon::dequantize"
FAKE_QUANTIZE = "surgeon::fake_quantize_dynamic"
GETITEM = "getitem"


def kind(node: fx.Node) -> str:
    """Name of the operator without its overload, ``aten::add``; ``getitem``; otherwise the node's own op."""
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target._schema.name)
    if target is operator.getitem:
        return GETITEM
    return node.op if node.op != "call_function" else str(getattr(target, "__name__", target))


def is_pointwise(node: fx.Node) -> bool:
    """Whether each output element depends on the input elements at the same place only (after broadcasting)."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    name = kind(node)
    if name in RESHAPES or name in CASTS:
        return False
    if name in ("aten::min", "aten::max"):  # of two tensors; of one it is a reduction
        return target._overloadname == "other"
    return name in POINTWISE or torch.Tag.pointwise in target.tags


def is_reshape(node: fx.Node) -> bool:
    """Whether the output holds exactly the input's values, once each (shape, order of dimensions and type may differ)."""
    return kind(node) in RESHAPES or kind(node) in CASTS


def is_narrowing(node: fx.Node) -> bool:
    """Whether the output holds some of the input's values; includes the ``getitem`` after a split."""
    return kind(node) in NARROWINGS or kind(node) == GETITEM or _is_fixed_index(node)


def _is_fixed_index(node: fx.Node) -> bool:
    """Whether a node selects by constant places, ``x[:, [-1]]``."""
    places = node.args[1] if kind(node) == "aten::index" else None
    if not isinstance(places, list | tuple):
        return False
    return all(n is None or (isinstance(n, fx.Node) and n.op == "get_attr") for n in places)


def is_movement(node: fx.Node) -> bool:
    """Whether values are only moved, selected or repeated."""
    name = kind(node)
    return name in RESHAPES or name in CASTS or name in REPETITIONS or is_narrowing(node)


def value(node: fx.Node) -> Any:
    """The node's fake value; the first one of several."""
    found = node.meta.get("val")
    if isinstance(found, list | tuple) and found:
        return found[0]
    return found


def is_float(node: fx.Node) -> bool:
    """Whether the node's value is a floating-point (or complex) tensor, or starts with one."""
    found = value(node)
    return isinstance(found, Tensor) and (found.is_floating_point() or found.is_complex())


def shape(node: fx.Node) -> tuple[int, ...]:
    """Shape of the node's value with every symbolic size replaced by the size it was traced with."""
    found = value(node)
    if not isinstance(found, Tensor):
        return ()
    known = node.meta.get(_SHAPE)  # sizes are expressions, which are slow to evaluate and asked for again and again
    if known is None or known[0] is not found:
        known = node.meta[_SHAPE] = (found, tuple(size if type(size) is int else hint(size) for size in found.shape))
    sizes: tuple[int, ...] = known[1]
    return sizes


def same_shape(a: fx.Node, b: fx.Node) -> bool:
    """Whether two values have the same shape, symbolically."""
    left, right = value(a), value(b)
    if not isinstance(left, Tensor) or not isinstance(right, Tensor) or left.dim() != right.dim():
        return False
    return all(str(x) == str(y) for x, y in zip(left.shape, right.shape, strict=True))


def hint(size: Any) -> int:
    """The number behind a symbolic size: the one the graph was traced with; for one that only data gives, some number."""
    node = getattr(size, "node", None)
    if node is None:
        return int(size)
    unknown = free_unbacked_symbols(size)
    if unknown:
        return int(node.expr.xreplace(dict.fromkeys(unknown, sympy.Integer(_SOME))).xreplace(traced_sizes(node.shape_env)))
    found = node.hint
    return int(found) if found is not None else int(node.expr.xreplace(traced_sizes(node.shape_env)))


def traced_sizes(shapes: Any) -> dict[Any, Any]:
    """The number behind every symbol of a shape environment that was traced with one."""
    found: dict[Any, Any] = shapes.backed_var_to_val if hasattr(shapes, "backed_var_to_val") else shapes.var_to_val
    return found


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of a call, whether it was given by position or by name."""
    if position < len(node.args):
        return node.args[position]
    return node.kwargs.get(name, default)
