"""What the rewritten graph calls for mixtures of experts on CUDA: functions that trace to ONNX operators.

The CUDA kernels of ``com.microsoft.MoE`` and ``QMoE`` (ONNX Runtime 1.31) take logits in the type of the activations, select
the k largest, and mix with the softmax of these.  QMoE there does not read the input of mixing weights that the CPU's has.

Letters in shapes: T tokens, E experts, k chosen, H width, I inner width, O rows of an expert's first matrix.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.onnx import ops as onnx_ops


def routing_logits(index: Tensor, weight: Tensor, experts: int, dtype: torch.dtype) -> Tensor:
    """Logits [T, E] whose softmax over the k largest is weight / sum(weight), summed where a row chooses an expert twice.

    They are logarithms of shares, near 0 for the large ones, which a narrow type holds best.  What a row does not choose
    gets e^-87, which vanishes in every sum, and stays finite, so that a kernel always finds k experts.

    Args:
        index: [T, k].
        weight: [T, k], none negative.
        experts: E.
        dtype: of the result.
    """
    blank = torch.zeros((index.shape[0], experts), dtype=torch.float32)
    least = torch.finfo(torch.float32).tiny
    wide = weight.to(torch.float32)
    shares = blank.scatter_add(1, index, wide) / wide.sum(1, keepdim=True).clamp(min=least)
    return shares.clamp(min=least).log().to(dtype)


def cuda_experts(
    x: Tensor,
    logits: Tensor,
    weight: Tensor | None,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    k: int,
    attributes: tuple[tuple[str, Any], ...],
) -> Tensor:
    """``com.microsoft.MoE``.

    Args:
        x: [T, H].
        logits: [T, E] in the dtype of x.
        weight: [T, k], whose sum of a row scales its result, or None where that is 1.
        w_in: [E, O, H], gate and up rows interleaved where gated.
        b_in: [E, O] or None, likewise.
        w_out: [E, H, I].
        b_out: [E, H] or None.
        k: experts of a token.
        attributes: of the node.
    """
    return _mixed("MoE", x, (logits, w_in, b_in, w_out, b_out), weight, k, attributes)


def cuda_quantized_experts(
    x: Tensor,
    logits: Tensor,
    weight: Tensor | None,
    first: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    second: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    k: int,
    attributes: tuple[tuple[str, Any], ...],
) -> Tensor:
    """``com.microsoft.QMoE``.

    Args:
        x: [T, H].
        logits: [T, E] in the dtype of x.
        weight: [T, k], whose sum of a row scales its result, or None where that is 1.
        first: packed uint8 [E, O, H * bits / 8], scale [E, O, H / block], packed zero point or None, bias or None; gate
            and up rows interleaved where gated.
        second: the same of w_out [E, H, I].
        k: experts of a token.
        attributes: of the node.
    """
    packed_in, scale_in, zero_in, b_in = first
    packed_out, scale_out, zero_out, b_out = second
    gap = (None, None, None)  # a third matrix, which the fused gate does not have
    inputs = (logits, packed_in, scale_in, b_in, packed_out, scale_out, b_out, *gap, zero_in, zero_out)
    return _mixed("QMoE", x, inputs, weight, k, attributes)


def _mixed(
    kind: str, x: Tensor, inputs: tuple[Tensor | None, ...], weight: Tensor | None, k: int,
    attributes: tuple[tuple[str, Any], ...],
) -> Tensor:  # fmt: skip
    """A kernel of experts, which mixes by weights that sum to 1, times the sum of the given ones."""
    y = onnx_ops.symbolic(
        f"com.microsoft::{kind}",
        (x, *inputs),
        {"k": k, "normalize_routing_weights": 1, **dict(attributes)},
        dtype=x.dtype,
        shape=x.shape,
        version=1,
    )
    return y if weight is None else y * weight.sum(1, keepdim=True).to(x.dtype)
