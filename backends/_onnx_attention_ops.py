"""What the rewritten graph calls for attention: functions that trace to ONNX operators, as those of ``_onnx_ops`` are.

Letters in shapes: B rows, S new positions, P past ones, T = P + S, N query heads and K key heads of D numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.onnx import ops as onnx_ops


def cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    past_k: Tensor,
    past_v: Tensor,
    scale: float,
    heads: tuple[int, int] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``Attention`` (opset 23): of q over the past with the new k and v appended.

    Args:
        q: queries [B, N, S, D], or with ``heads`` [B, S, N D].
        k: new keys [B, K, S, D], or [B, S, K D].
        v: new values likewise.
        mask: booleans or floats that broadcast to [B, N, S, P + S], or None.
        past_k: keys so far, [B, K, P, D].
        past_v: values so far.
        scale: factor of the scores.
        heads: N and K where the heads stand side by side, else None.

    Returns:
        [B, N, S, D] or [B, S, N D], and keys and values [B, K, P + S, D].
    """
    wide = past_v.shape[3]
    if heads is None:
        new, shape = k.shape[2], (*q.shape[:3], wide)
    else:
        new, shape = k.shape[1], (*q.shape[:2], heads[0] * wide)
    longer = past_k.shape[2] + new
    shapes = (shape, (*past_k.shape[:2], longer, past_k.shape[3]), (*past_v.shape[:2], longer, wide))
    counts = {} if heads is None else {"q_num_heads": heads[0], "kv_num_heads": heads[1]}
    output, keys, values = onnx_ops.symbolic_multi_out(
        "Attention",
        (q, k, v, mask, past_k, past_v),
        {"is_causal": 0, "scale": scale, **counts},
        dtypes=(q.dtype, k.dtype, v.dtype),
        shapes=shapes,
        version=23,
    )
    return output, keys, values


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """``Attention`` (opset 23) of q [B, N, S, D] over k and v [B, K, T, any], in one node; torch.onnx wants N = K.

    ``mask``: booleans or floats [B or 1, N or 1, S, T], or None.
    """
    shape = (*q.shape[:3], v.shape[3])
    return onnx_ops.symbolic(
        "Attention", (q, k, v, mask), {"is_causal": 0, "scale": scale}, dtype=q.dtype, shape=shape, version=23
    )


def cache_lengths(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Of an attention mask [B, P + S]: P + S - 1 for every row, int32 [B], and P + S, int32 [1]."""
    rows, total = (
        onnx_ops.symbolic("Shape", (mask,), {"start": axis, "end": axis + 1}, dtype=torch.int64, shape=(1,), version=23)
        for axis in range(2)
    )
    total = total.to(torch.int32)
    last = onnx_ops.symbolic("Expand", (total - 1, rows), dtype=torch.int32, shape=mask.shape[:1], version=13)
    return last, total


def mask_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to scores for a mask of booleans: 0, or the lowest number, which keeps a row of nothing finite."""
    return torch.where(mask, torch.zeros((), dtype=dtype), torch.full((), torch.finfo(dtype).min, dtype=dtype))


def padding_bias(mask: Tensor, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """:func:`mask_bias` of booleans [B, 1, 1, T] for every one of the new tokens [B, S]: [B, 1, S, T]."""
    bias = mask_bias(mask, dtype)
    new = onnx_ops.symbolic("Shape", (tokens,), {"start": 1, "end": 2}, dtype=torch.int64, shape=(1,), version=23)
    shape = torch.cat([torch.tensor([1, 1]), new, torch.tensor([1])])
    wide = (*mask.shape[:2], tokens.shape[1], mask.shape[3])
    return onnx_ops.symbolic("Expand", (bias, shape), dtype=dtype, shape=wide, version=13)


def grouped_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_k: Tensor,
    past_v: Tensor,
    last: Tensor,
    total: Tensor,
    tables: tuple[Tensor, Tensor] | None,
    bias: Tensor | None,
    scale: float,
    heads: tuple[int, int],
) -> tuple[Tensor, Tensor, Tensor]:
    """``com.microsoft.GroupQueryAttention``, causal, over a past that may be written in place.

    Args:
        q: queries [B, S, N D].
        k: new keys [B, S, K D].
        v: new values likewise.
        past_k: keys so far, [B, K, at least P, D].
        past_v: values so far.
        last: int32 [B], P + S - 1.
        total: int32 [1], P + S.
        tables: cos and sin [positions, D/2] by which queries and keys are turned, the first of a row by row 0, or None.
        bias: [B or 1, N or 1, S, P + S], added to the scores, or None.
        scale: factor of the scores.
        heads: N and K.

    Returns:
        [B, S, N D], and keys and values [B, K, P + S, D] (the past's own length where that is larger).
    """
    new, sizes = k.shape[1], past_k.shape
    longer = (*sizes[:2], sizes[2] + new, sizes[3])
    output, keys, values = onnx_ops.symbolic_multi_out(
        "com.microsoft::GroupQueryAttention",
        (q, k, v, past_k, past_v, last, total, *(tables or (None, None)), None, bias),
        {"num_heads": heads[0], "kv_num_heads": heads[1], "scale": scale, "do_rotary": int(tables is not None)},
        dtypes=(q.dtype, k.dtype, v.dtype),
        shapes=(q.shape, longer, longer),
        version=1,
    )
    return output, keys, values


def rotary(x: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    """``RotaryEmbedding`` (opset 23) of x [B, S, N D] with tables [B or 1, S, D/2]: halves of a head are turned together."""
    return onnx_ops.symbolic("RotaryEmbedding", (x, cos, sin), {"num_heads": heads}, dtype=x.dtype, shape=x.shape, version=23)


def join_heads(x: Tensor) -> Tensor:
    """[B, S, N, D] -> [B, S, N D], in one node (a 0 keeps a size)."""
    width = x.shape[2] * x.shape[3]
    shape = torch.tensor([0, 0, width])
    return onnx_ops.symbolic("Reshape", (x, shape), dtype=x.dtype, shape=(*x.shape[:2], width), version=23)


def divide_heads(x: Tensor, heads: int) -> Tensor:
    """[B, S, N D] -> [B, N, S, D]."""
    size = x.shape[2] // heads
    shape = torch.tensor([0, 0, heads, size])
    divided = onnx_ops.symbolic("Reshape", (x, shape), dtype=x.dtype, shape=(*x.shape[:2], heads, size), version=23)
    return divided.transpose(1, 2)
