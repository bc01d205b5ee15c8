"""How significant a token is to the others of its sequence: its size times the attention that they pay to it.

MC-MoE (Huang et al. 2024, arXiv:2410.06270): ``I_t = |x_t|_1 mean_s A_st``, A the attention weights of the same block, mean
over its heads, over the tokens s that see t (t itself and those behind it where attention is causal).  A mixture stands
behind the attention of its block, so that all of this is known when its tokens are routed, as far as the sequence has been
read: of a token that is generated alone, only the attention that it pays to itself.

The weights are computed a second time, from the queries, keys and mask of a fused attention, which does not give them out:
[batch, heads, tokens, tokens] numbers.  Written once for graphs and for tensors, as :mod:`surgeon.routers` is.

Letters in shapes: B sequences of S new tokens, P past ones, N query heads and K key heads of D features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
from torch import Tensor, fx

from surgeon.discovery import operators
from surgeon.rewrite import Editor
from surgeon.routers import Call, eager
from surgeon.structure import MoE, Site, Structure

aten = torch.ops.aten
_UNSEEN = -1e3
"""Scores that a mask adds to what is not seen lie below this, biases of what is seen do not."""


@dataclass(frozen=True)
class Scores:
    """What the weights of one attention are made of.

    Attributes:
        q: [B, N, S, D].
        k: [B, K, P + S, D].
        mask: broadcasts to [B, N, S, P + S], booleans or what is added to the scores; or None.
        causal: tokens see none behind them, mask or no mask.
        scale: factor of the scores.
    """

    q: fx.Node
    k: fx.Node
    mask: fx.Node | None
    causal: bool
    scale: float

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """q, k and, where there is one, the mask."""
        return (self.q, self.k) if self.mask is None else (self.q, self.k, self.mask)

    def paid(self, *values: Tensor) -> Tensor:
        """Mean attention that each new token is paid, of the values of :attr:`nodes`: [B S, 1]."""
        found: Tensor = _paid(eager, lambda value: list(value.shape), self, values)
        return found

    def add(self, editor: Editor) -> fx.Node:
        """Add the same at the insertion point."""
        found: fx.Node = _paid(editor.call, editor.sizes, self, [editor.current(node) for node in self.nodes])
        return found


def scores_before(structure: Structure, site: Site[MoE]) -> Scores | str:
    """The attention in front of a mixture, in its block; or why its weights are not to be had."""
    order = {node: number for number, node in enumerate(site.part.node.graph.nodes)}
    inside = [a.part for a in structure.attentions() if a.block == site.block and not a.part.cross]
    before = [attention for attention in inside if order[attention.node] < order[site.part.node]]
    if not before:
        return "its block has no attention in front of it"
    node = before[-1].node
    if operators.kind(node) not in operators.ATTENTIONS:
        return f"the weights of the attention in front of it are spelled out ({node.name}), not in one operator"
    q, k = node.args[:2]
    own = operators.kind(node) == "surgeon::attention"
    mask = operators.argument(node, 3, "mask" if own else "attn_mask")
    causal = operators.argument(node, 4 if own else 5, "is_causal", False)
    scale: Any = operators.argument(node, 5, "scale") if own else node.kwargs.get("scale")
    assert isinstance(q, fx.Node)
    assert isinstance(k, fx.Node)
    assert site.block is not None
    entry, shape = structure.blocks[site.block].entry.meta["val"], q.meta["val"].shape
    if entry.dim() != 3 or len(shape) != 4 or [str(shape[0]), str(shape[2])] != [str(size) for size in entry.shape[:2]]:
        return f"the attention in front of it ({node.name}) sees the tokens in another order than they are routed in"
    if isinstance(mask, fx.Node) and mask.meta["val"].dim() == 3 and mask.meta["val"].shape[0] != 1:
        return f"the mask of the attention in front of it ({mask.name}) has three dimensions"
    return Scores(q, k, mask if isinstance(mask, fx.Node) else None, bool(causal), float(scale or 1 / sqrt(shape[3])))


def _paid(call: Call, shape: Callable[[Any], Sequence[Any]], scores: Scores, values: Sequence[Any]) -> Any:
    """Values of q, k and the mask -> [B S, 1] float32."""
    q, k, *masks = values
    batch, heads, new, size = shape(q)
    groups = int(scores.k.meta["val"].shape[1])
    grouped = call(aten.reshape.default, q, [batch, groups, heads // groups, new, size])
    keys = call(aten.transpose.int, call(aten.unsqueeze.default, k, 2), -1, -2)
    logits = call(aten.mul.Scalar, call(aten.matmul.default, grouped, keys), scores.scale)
    logits = call(aten._to_copy.default, logits, dtype=torch.float32)  # [B, K, N / K, S, P + S]
    # positions counted from the end: 0 is the last token, as a query and as a key
    query, key = (_from_the_end(call, logits, axis) for axis in (-2, -1))
    seen = []
    if masks:
        mask = masks[0]
        if scores.mask is not None and scores.mask.meta["val"].dim() == 4:
            by_head = scores.mask.meta["val"].shape[1] != 1
            sizes = shape(mask)
            split = [sizes[0], groups, heads // groups, *sizes[2:]]
            mask = call(aten.reshape.default, mask, split) if by_head else call(aten.unsqueeze.default, mask, 2)
        if _dtype(mask) == torch.bool:
            seen.append(mask)
        else:
            bias = call(aten._to_copy.default, mask, dtype=torch.float32)
            seen.append(call(aten.gt.Scalar, bias, _UNSEEN))
            logits = call(aten.add.Tensor, logits, bias)
    if scores.causal:
        seen.append(call(aten.ge.Tensor, key, query))
    weights = _softmax(call, logits, seen)
    weights = call(aten.mean.dim, weights, [1, 2], True)  # [B, 1, 1, S, P + S]
    own = call(aten._to_copy.default, call(aten.eq.Tensor, query, key), dtype=torch.float32)
    # a query that does not see itself is padding, and what it looks at says nothing
    itself = call(aten.sum.dim_IntList, call(aten.mul.Tensor, weights, own), [-1], True)
    weights = call(aten.mul.Tensor, weights, _ones_where_positive(call, itself))
    received = call(aten.sum.dim_IntList, weights, [-2], True)
    askers = call(aten.sum.dim_IntList, _ones_where_positive(call, weights), [-2], True)
    mean = call(aten.div.Tensor, received, call(aten.clamp_min.default, askers, 1.0))
    of_new = call(aten.sum.dim_IntList, call(aten.mul.Tensor, own, mean), [-1], True)  # [B, 1, 1, S, 1]
    return call(aten.reshape.default, of_new, [-1, 1])


def _softmax(call: Call, logits: Any, seen: Sequence[Any]) -> Any:
    """Softmax over what is seen; 0 elsewhere, also in rows that see nothing."""
    for part in seen:
        logits = call(aten.masked_fill.Scalar, logits, call(aten.logical_not.default, part), torch.finfo(torch.float32).min)
    weights = call(aten.softmax.int, logits, -1)
    for part in seen:
        weights = call(aten.mul.Tensor, weights, call(aten._to_copy.default, part, dtype=torch.float32))
    return weights


def _from_the_end(call: Call, logits: Any, axis: int) -> Any:
    """0 for the last position along an axis, 1 for the one before it ...; 1 in all other dimensions."""
    line = logits
    for other in range(5):
        if other != 5 + axis:
            line = call(aten.slice.Tensor, line, other, 0, 1)
    counted = call(aten.cumsum.default, call(aten.ones_like.default, line), axis)
    return call(aten.sub.Tensor, call(aten.amax.default, counted, [axis], True), counted)


def _ones_where_positive(call: Call, value: Any) -> Any:
    return call(aten._to_copy.default, call(aten.gt.Scalar, value, 0.0), dtype=torch.float32)


def _dtype(value: Any) -> torch.dtype:
    dtype: torch.dtype = value.meta["val"].dtype if isinstance(value, fx.Node) else value.dtype
    return dtype
