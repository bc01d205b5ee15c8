"""How a package for CUDA computes what ATen has no fast form of: attention with a cache, and small things beside it.

Few queries (decoding) go through kernels of ``_cuda_attention`` that divide the cache among the multiprocessors, many through
one that leaves out what no query sees.  The package holds both and decides at run time, by sizes alone.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from surgeon.backends._aot_shared import written
from surgeon.ops import attend
from surgeon.ops.attention import with_causal

aten = torch.ops.aten
_FEW_QUERIES = 16
"""Largest number of queries times query heads per key head that one tile of the kernel takes."""


def has_kernels() -> bool:
    """Whether Triton is installed, as torch for CUDA brings it."""
    return find_spec("triton") is not None


def either(condition: Any, first: Callable[..., Any], second: Callable[..., Any], tensors: list[Tensor | None]) -> Any:
    """``first`` of the tensors or ``second`` of them, decided now where the sizes are known and at run time where not."""
    if condition is True or condition is False:
        return (first if condition else second)(*tensors)
    present = tuple(tensor for tensor in tensors if tensor is not None)

    def spelt(function: Callable[..., Any]) -> Callable[..., Any]:
        def branch(*values: Tensor) -> Any:
            given = iter(values)
            return function(*(None if tensor is None else next(given) for tensor in tensors))

        return branch

    return torch.cond(condition, spelt(first), spelt(second), present)


class Appended(NamedTuple):
    """Cached keys or values [B, H, T, D] and the new ones [B, H, N, D] behind them, not yet put together."""

    past: Tensor
    new: Tensor

    @classmethod
    def of(cls, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
        """The two parts of a concatenation along positions that one attention reads, and nothing else computes with."""
        parts: Any = node.args[0] if node.target is aten.cat.default else ()
        if len(parts) != 2 or node.meta["val"].dim() != 4 or (*node.args[1:], 0)[0] not in (2, -2):
            return None
        readers = [user for user in node.users if user.op != "output"]
        alone = len(readers) == 1 and readers[0].target is torch.ops.surgeon.attention.default
        return tuple(parts) if alone and node in readers[0].args[1:3] else None

    def whole(self) -> Tensor:
        """Both in one tensor [B, H, T + N, D]."""
        return torch.cat([self.past, self.new], 2)


class Buffered(NamedTuple):
    """Keys or values [B, H, at least past + N, D] with room for the new ones [B, H, N, D], not yet written.

    ``past`` is a number on the device, [1]; ``total`` positions are covered by the mask.
    """

    buffer: Tensor
    new: Tensor
    past: Tensor
    total: int

    @classmethod
    def of(cls, node: fx.Node) -> tuple[Any, ...] | None:
        """The parts of ``_aot_shared.written`` where one attention reads what it gives, and nothing else does."""
        if node.target is not written or node.meta["val"].dim() != 4 or node.args[4] != 2:
            return None
        alone = len(node.users) == 1 and next(iter(node.users)).target is torch.ops.surgeon.attention.default
        return node.args[:4] if alone else None

    def whole(self) -> Tensor:
        """What the mask covers, [B, H, total, D], in place."""
        return written(*self, 2)


def append_in_place(k: Buffered, v: Buffered) -> list[Tensor]:
    """Write new keys and values, and return what the mask covers [B, H, total, any], in place."""
    from surgeon.backends import _cuda_attention

    if k.buffer.dtype != v.buffer.dtype:
        return [k.whole(), v.whole()]
    for buffer in (k.buffer, v.buffer):
        torch._check(k.total <= buffer.shape[2])  # type: ignore[no-untyped-call]
    _cuda_attention.append_in_place(k.buffer, v.buffer, dense_last(k.new), dense_last(v.new), k.past, k.total)
    return [each.buffer.narrow(2, 0, each.total) for each in (k, v)]


def has_kernel(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the kernels take such queries, keys and values."""
    return q.dtype in (torch.bfloat16, torch.float16) and max(int(q.shape[3]), int(k.shape[3]), int(v.shape[3])) <= 128


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float, start: Tensor | None = None
) -> Tensor:
    """``surgeon::attention``: keys and values are read where they lie, once for all query heads that share them.

    ``start`` [1]: how many keys come before those of the queries, where others may lie behind both, which the mask hides.
    """
    from surgeon.backends._cuda_attention import attend_in_parts

    if not has_kernel(q, k, v):
        return attend(q, k, v, mask, is_causal, scale)
    mask = _four_axes(with_causal(mask, q, k.shape[2]) if is_causal else mask)
    q, k, v = (dense_last(tensor) for tensor in (q, k, v))

    def few(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, start: Tensor | None) -> Tensor:
        found: Tensor = attend_in_parts(q, k, v, mask, start, scale)
        return found

    def many(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, _: Tensor | None) -> Tensor:
        return _many(q, k, v, mask, scale)

    out: Tensor = either(_few_queries(q, k), few, many, [q, k, v, mask, start])
    return out.transpose(1, 2)


def attention_appending(
    q: Tensor, k: Appended, v: Appended, mask: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``surgeon::attention`` over a cache that grows: what it gives, and all keys and values."""
    from surgeon.backends._cuda_attention import attend_appending

    # sizes of two inputs are one symbol from here on, so that both branches give the same sizes
    torch._check(k.past.shape[2] == v.past.shape[2])  # type: ignore[no-untyped-call]
    mask = _four_axes(with_causal(mask, q, k.past.shape[2] + k.new.shape[2]) if is_causal else mask)
    tensors = [dense_last(tensor) for tensor in (q, k.past, v.past, k.new, v.new)]

    def few(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        found: tuple[Tensor, Tensor, Tensor] = attend_appending(q, *rest, scale)
        return found

    def many(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        k_new, v_new, mask = rest
        keys, values = Appended(k, k_new).whole(), Appended(v, v_new).whole()
        return _many(q, keys, values, mask, scale), keys, values

    out, keys, values = either(_few_queries(q, k.new), few, many, [*tensors, mask])
    return out.transpose(1, 2), keys, values


def _few_queries(q: Tensor, k: Tensor) -> Any:
    return q.shape[2] * (int(q.shape[1]) // int(k.shape[1])) <= _FEW_QUERIES


def _four_axes(mask: Tensor | None) -> Tensor | None:
    return mask[None, None] if mask is not None and mask.dim() == 2 else mask


def dense_last(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _many(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attention of many queries [B, Q, H G, W], which leaves out the keys before the first and behind the last seen."""
    from surgeon.backends._cuda_attention import attend_whole

    first = last = solid = None
    if mask is not None and mask.shape[1] == 1:
        positions = torch.arange(k.shape[2], device=q.device)
        seen = (mask if mask.dtype == torch.bool else mask > -torch.inf)[:, 0].expand(q.shape[0], q.shape[2], k.shape[2])
        last = torch.where(seen, positions + 1, 0).amax(-1).to(torch.int32)
        first = torch.where(seen, positions, k.shape[2]).amin(-1).to(torch.int32)
        if mask.dtype == torch.bool:
            solid = seen.sum(-1) == last - first
        else:  # where anything but 0 is added the mask has to be read
            solid = (mask == 0)[:, 0].expand(seen.shape).sum(-1) == last - first
    out: Tensor = attend_whole(q, k, v, mask, first, last, solid, scale)
    return out


def cos_sin(x: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of x, of its shape and type, stored where the compiler would compute them again for every reader."""
    from surgeon.backends import _cuda_rotary

    if x.dtype != torch.float32:
        return x.cos(), x.sin()
    found: tuple[Tensor, Tensor] = _cuda_rotary.cos_sin(x.contiguous())
    return found


def top_k(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row, largest first: as k maxima, which become one kernel with the router around them.

    Args:
        values: [..., E].
        k: a few.

    Returns:
        Values and positions [..., k].
    """
    places = torch.arange(values.shape[-1], device=values.device)
    left, found = values, []
    for _ in range(k):
        best = left.max(-1, keepdim=True)
        found.append(best)
        left = torch.where(places == best.indices, -torch.inf, left)
    return torch.cat([best.values for best in found], -1), torch.cat([best.indices for best in found], -1)


def is_outer(left: Tensor, right: Tensor) -> bool:
    """Whether a product sums one term each (positions times frequencies): multiplied, it joins the kernels around it."""
    if min(left.dim(), right.dim()) < 2:
        return False
    return all(isinstance(size, int) and size == 1 for size in (left.shape[-1], right.shape[-2]))


def few_of_row(values: Tensor, k: int, dim: int = -1, largest: bool = True, **_: bool) -> bool:
    """Whether :func:`top_k` computes this ``aten.topk``, and sooner."""
    last = dim in (-1, values.dim() - 1) and values.is_floating_point()
    return last and largest and 0 < k <= 8 and k < int(values.shape[-1]) <= 1024
