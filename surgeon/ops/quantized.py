"""``surgeon::dequantize`` and ``surgeon::fake_quantize_dynamic``: low-bit weights and activations.

The arithmetic is that of :mod:`surgeon.numerics.quantization`; here it becomes one node with a shape rule and a
gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from surgeon.errors import RewriteError
from surgeon.numerics import quantization


def _check_dequantize(
    packed: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, group: int, in_features: int
) -> None:
    def need(condition: bool | torch.SymBool, what: str) -> None:
        def message() -> str:
            zero = None if zero_point is None else (tuple(zero_point.shape), zero_point.dtype)
            return (
                f"surgeon::dequantize needs {what}; found packed {tuple(packed.shape)} {packed.dtype}, scale "
                f"{tuple(scale.shape)} {scale.dtype}, zero_point {zero}, bits {bits}, group {group}, "
                f"in_features {in_features}"
            )

        torch._check_with(RewriteError, condition, message)

    need(bits in quantization.BITS, f"bits to be one of {', '.join(map(str, quantization.BITS))}")
    need(group > 0 and group * bits % 8 == 0, "a group that fills whole bytes")
    floats = packed.dtype == quantization.FLOAT8
    need(floats or packed.dtype == torch.uint8, "packed of type uint8 or float8_e4m3fn")
    need(packed.dim() >= 3, "packed [..., out, groups, group * bits / 8]")
    need(not floats or (bits == 8 and zero_point is None), "8 bits and no zero_point for codes of float8_e4m3fn")
    need(packed.shape[-1] == group * bits // 8, "group * bits / 8 bytes per group")
    need(scale.is_floating_point() and tuple(scale.shape) == tuple(packed.shape[:-1]), "a scale [..., out, groups]")
    need(
        zero_point is None or (zero_point.dtype == torch.uint8 and tuple(zero_point.shape) == tuple(scale.shape)),
        "a uint8 zero_point [..., out, groups] or None",
    )
    need((packed.shape[-2] - 1) * group < in_features <= packed.shape[-2] * group, "in_features in the last group")


@torch.library.custom_op("surgeon::dequantize", mutates_args=())
def dequantize(
    packed: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, group: int, in_features: int
) -> Tensor:
    """Low-bit weight to float, feeding an ordinary linear: w = (q - z) * scale, or q * scale for 8-bit floats q.

    Args:
        packed: uint8 [..., out, groups, group * bits / 8], low bits first, or float8_e4m3fn with 8 bits.
        scale: float [..., out, groups].
        zero_point: uint8 [..., out, groups], one code per byte, or None for 2 ** (bits - 1).
        bits: 2, 4 or 8.
        group: columns that share a scale; a multiple of 8 / bits.
        in_features: columns of the result; the last group is truncated to it.

    Returns:
        [..., out, in_features] in the dtype of ``scale``.  Differentiable in ``scale``.

    Raises:
        RewriteError: shapes or types do not fit together.
    """
    _check_dequantize(packed, scale, zero_point, bits, group, in_features)
    return quantization.dequantize(packed, scale, zero_point, bits, group, in_features).contiguous()


@dequantize.register_fake
def _dequantize_fake(
    packed: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, group: int, in_features: int
) -> Tensor:
    _check_dequantize(packed, scale, zero_point, bits, group, in_features)
    return scale.new_empty(*scale.shape[:-1], in_features)


def _dequantize_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    packed, scale, zero_point, ctx.bits, ctx.group, ctx.in_features = inputs
    ctx.save_for_backward(packed, zero_point)
    ctx.dtype = scale.dtype


def _dequantize_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    # d loss / d scale = sum over the group of grad * (q - z); the truncated columns have no gradient
    scale_grad: Tensor | None = None
    if ctx.needs_input_grad[1]:
        packed, zero_point = ctx.saved_tensors
        zero = 2 ** (ctx.bits - 1) if zero_point is None else zero_point.to(ctx.dtype).unsqueeze(-1)
        steps = quantization.unpack_codes(packed, ctx.bits).to(ctx.dtype) - zero
        padded = F.pad(grad, (0, steps.shape[-2] * ctx.group - ctx.in_features))
        scale_grad = (padded.reshape(steps.shape) * steps).sum(-1)
    return None, scale_grad, None, None, None, None


dequantize.register_autograd(_dequantize_autograd, setup_context=_dequantize_setup_context)


@torch.library.custom_op("surgeon::fake_quantize_dynamic", mutates_args=())
def fake_quantize_dynamic(x: Tensor) -> Tensor:
    """What x becomes after ONNX DynamicQuantizeLinear (opset 11) and DequantizeLinear, computed in float32.

    Formula: :func:`surgeon.numerics.dynamic_quantize_linear`.  The gradient is passed straight through: the
    range covers every value, so nothing is clipped by more than the rounding of the zero point.

    Args:
        x: float tensor of any shape, possibly empty.

    Returns:
        The shape and dtype of x.
    """
    values = x.clone() if x.numel() == 0 else quantization.fake_quantize_dynamic(x)
    return values.contiguous()


@fake_quantize_dynamic.register_fake
def _fake_quantize_dynamic_fake(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _fake_quantize_dynamic_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Nothing to keep: the straight-through gradient does not depend on x."""


def _fake_quantize_dynamic_autograd(ctx: Any, grad: Tensor) -> Tensor:
    return grad.clone()


fake_quantize_dynamic.register_autograd(
    _fake_quantize_dynamic_autograd, setup_context=_fake_quantize_dynamic_setup_context
)
