"""``surgeon::attention``: softmax attention over keys and values that may have fewer heads than the queries.

One node whatever spelling the source used: keys and values stay as the cache holds them, repeated for no head.  What a
position may see is said by a mask in front of it, or by ``is_causal``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from surgeon.errors import RewriteError


def with_causal(mask: Tensor | None, q: Tensor, columns: int) -> Tensor:
    """A mask of the kind of ``mask`` that also hides from query s of S the keys behind T - S + s; booleans [S, T] for none."""
    rows = q.shape[-2]
    seen = torch.arange(columns, device=q.device) <= torch.arange(rows, device=q.device)[:, None] + (columns - rows)
    if mask is None:
        return seen
    return mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, -torch.inf)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float) -> Tensor:
    """The operator in ATen; arguments as those of :func:`attention`."""
    if is_causal:
        mask = with_causal(mask, q, k.shape[-2])
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)


def flexible_attention(
    q: Tensor, k: Tensor, v: Tensor, score_mod: Callable[..., Tensor], block_mask: Sequence[Any], scale: float,
    kernel_options: Mapping[str, Any], score_buffers: Sequence[Any] = (), mask_buffers: Sequence[Any] = (),
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The operator behind ``flex_attention``, in ATen; its two functions are called once, on all places.

    They are functions of single scores and positions, and so broadcast over tensors of them.

    Args:
        q: [B, N, S, D].
        k: [B or 1, K, T, D].
        v: [B or 1, K, T, E].
        score_mod: new scores of scores [B, N, S, T] and of the numbers of batch, head, query and key.
        block_mask: its last entry says of these numbers which keys are seen.
        scale: factor of the scores.
        kernel_options: how a kernel computes it; nothing here.
        score_buffers: further arguments of ``score_mod``.
        mask_buffers: likewise of the mask.

    Returns:
        [B, N, S, E], and for each query the logarithm of the sum of exponentials and the largest score, in powers of 2.
    """
    group = q.shape[1] // k.shape[1]
    keys, values = (tensor.repeat_interleave(group, 1) if group > 1 else tensor for tensor in (k, v))
    scores = scale * (q @ keys.mT)
    sizes = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    places = [
        torch.arange(size, device=q.device).reshape([-1 if other == axis else 1 for other in range(4)])
        for axis, size in enumerate(sizes)
    ]
    scores = score_mod(scores, *places, *score_buffers)
    scores = torch.where(block_mask[-1](*places, *mask_buffers), scores, -torch.inf)
    weights = torch._safe_softmax(scores, -1)  # a row that sees nothing gives zeros
    return weights.to(q.dtype) @ values, scores.logsumexp(-1) / math.log(2), scores.amax(-1) / math.log(2)


def _check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
    def need(condition: bool | torch.SymBool, what: str) -> None:
        def message() -> str:
            covers = None if mask is None else (tuple(mask.shape), mask.dtype)
            shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, mask {covers}"
            return f"surgeon::attention needs {what}; found {shapes}"

        torch._check_with(RewriteError, condition, message)

    need(q.dim() == k.dim() == v.dim() == 4, "four dimensions: batch, heads, positions, size")
    need(q.shape[3] == k.shape[3], "queries and keys of one size")
    need(k.shape[1] == v.shape[1] and q.shape[1] % k.shape[1] == 0, "query heads that the key and value heads divide")
    need(mask is None or mask.dtype in (torch.bool, q.dtype), "a mask of booleans or of the queries' type")


@torch.library.custom_op("surgeon::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float) -> Tensor:
    """``softmax(scale q k^T + mask) v``, query head h reading key and value head ``h // (N / K)``.

    Args:
        q: [B, N, S, D].
        k: [B, K, T, D], past and new keys.
        v: [B, K, T, E].
        mask: broadcasts to [B, N, S, T]; True where a position is seen, or a float that is added.
        is_causal: query s sees keys up to T - S + s only.
        scale: factor of the scores.

    Returns:
        [B, N, S, E].  Differentiable in q, k, v and a float mask.

    Raises:
        RewriteError: shapes or types do not fit together.
    """
    _check(q, k, v, mask)
    return attend(q, k, v, mask, is_causal, scale).contiguous()


@attention.register_fake
def _attention_fake(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float
) -> Tensor:
    _check(q, k, v, mask)
    return q.new_empty((*q.shape[:3], v.shape[3]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, mask, ctx.is_causal, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, mask)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """With P = softmax(Z): dV = P^T dO, dZ = P * (dP - sum(dP * P)) where dP = dO V^T, dQ = scale dZ K, dK = scale dZ^T Q."""
    q, k, v, mask = ctx.saved_tensors
    group = q.shape[1] // k.shape[1]
    keys, values = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = ctx.scale * q @ keys.mT
    if ctx.is_causal:
        mask = with_causal(mask, q, k.shape[-2])
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    weights = torch.softmax(scores, -1).nan_to_num(0.0)  # a row that sees nothing gives zeros
    by_weight = grad @ values.mT
    by_score = weights * (by_weight - (by_weight * weights).sum(-1, keepdim=True))

    def joined(each: Tensor) -> Tensor:  # [B, N, T, size] -> [B, K, T, size]
        batch, _, rows, width = each.shape
        return each.reshape(batch, k.shape[1], group, rows, width).sum(2)

    by_mask = None
    if mask is not None and ctx.needs_input_grad[3]:
        by_mask = by_score.sum_to_size(mask.shape)
    return ctx.scale * by_score @ keys, joined(ctx.scale * by_score.mT @ q), joined(weights.mT @ grad), by_mask, None, None


attention.register_autograd(_autograd, setup_context=_setup_context)
