"""Attention over a cache as few ONNX nodes as it takes: heads stay side by side in the last dimension.

The graph divides [B, S, N D] into heads [B, N, S, D] in front of the attention and joins them behind it, and turns pairs of
queries and keys by their position in between.  ``Attention`` and ``RotaryEmbedding`` (opset 23) take the undivided form:

    transpose(reshape(x, [B, S, N, D]), 1, 2)                        ->  x
    y cos + concat(-y[D/2:], y[:D/2]) sin, y divided as above        ->  RotaryEmbedding(x, cos[:D/2], sin[:D/2]), N heads
    attention(q, concat(past, k), concat(past, v))                   ->  Attention(q, k, v, past k, past v), N and K heads
    reshape(transpose(attention, 1, 2), [B, S, N D])                 ->  attention

The two halves of cos and sin are equal where both come from ``concat(f, f)``; only then is an embedding rewritten.  What
fits none of these keeps its four dimensions.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from surgeon.backends import _onnx_attention_ops as emit
from surgeon.backends._rotation import rotation

aten = torch.ops.aten
_ELEMENTWISE = frozenset(
    {aten.cos.default, aten.sin.default, aten.mul.Tensor, aten._to_copy.default, aten.clone.default, aten.alias.default}
)
"""What may stand between ``concat(f, f)`` and the tables; a product has a constant as its other factor."""


class CachedAttention:
    """Lowers attention nodes of one graph."""

    flat_output = False
    """Whether the output has its heads side by side even where they come divided."""

    def __init__(self, nodes: fx.Graph) -> None:
        self._nodes = nodes
        self._half: dict[fx.Node, fx.Node] = {}

    def lower(self, node: fx.Node) -> bool:
        """Replace one node, at the insertion point before it; False where no cache is appended to right here."""
        args: tuple[Any, ...] = node.args
        q, k, v, mask, is_causal, scale = args
        halves = [appended(k), appended(v)]
        if is_causal or None in halves:
            return False
        (past_k, new_k), (past_v, new_v) = (half for half in halves if half is not None)
        flat = self._flattened(q, new_k, new_v)
        heads = (q.meta["val"].shape[1], new_k.meta["val"].shape[1]) if flat else None
        q, new_k, new_v = flat or (q, new_k, new_v)
        results = self.attend(q, new_k, new_v, mask, past_k, past_v, scale, heads)
        output, keys, values = (self._nodes.call_function(operator.getitem, (results, index)) for index in range(3))
        order = {n: i for i, n in enumerate(self._nodes.nodes)}
        for old, new in ((k, keys), (v, values)):
            new.meta["val"] = old.meta["val"]  # later layers may attend to it, too
            # What is read before this point stays the concatenation that it is.
            old.replace_all_uses_with(new, delete_user_cb=lambda user: order[user] > order[values])
        if flat is None and not self.flat_output:
            output.meta["val"] = node.meta["val"]
            node.replace_all_uses_with(output)
        else:
            self._join(node, output)
        return True

    def attend(self, q: Any, k: Any, v: Any, mask: Any, past_k: Any, past_v: Any, scale: float, heads: Any) -> fx.Node:
        """The runtime's attention: a node of output, keys and values; ``heads`` is None where q, k and v are divided."""
        return self._nodes.call_function(emit.cached_attention, (q, k, v, mask, past_k, past_v, scale, heads))

    # -- in front -----------------------------------------------------------------------------------------------

    def _flattened(self, *sources: fx.Node) -> tuple[Any, ...] | None:
        """Queries, keys and values [B, S, N D], or None where one of them is not made of that."""
        if not all(_is_divided(source) or _rotation(source) is not None for source in sources):
            return None
        return tuple(self._flat(source) for source in sources)

    def _flat(self, node: fx.Node) -> fx.Node:
        found = _rotation(node)
        if found is not None:
            x, cos, sin = found
            heads = node.meta["val"].shape[1]
            return self._nodes.call_function(emit.rotary, (self._flat(x), self._halved(cos), self._halved(sin), heads))
        divided: Any = node.args[0]
        source = divided.args[0] if divided.target == aten.reshape.default else None
        if source is not None and _same_rows(source, divided):
            return source  # type: ignore[no-any-return]  # a node
        return self._nodes.call_function(emit.join_heads, (divided,))

    def _halved(self, table: fx.Node) -> fx.Node:
        """The first half of a table's columns, made once: its own chain of operations on f instead of ``concat(f, f)``."""
        if table not in self._half:
            source: Any = table.args[0]
            if table.target == aten.cat.default:
                self._half[table] = source[0]
            else:
                half = self._halved(source)
                with self._nodes.inserting_after(table):
                    self._half[table] = self._nodes.node_copy(table, lambda node: half if node is source else node)
                whole = table.meta["val"]
                self._half[table].meta["val"] = whole[..., : whole.shape[-1] // 2]
        return self._half[table]

    # -- behind -------------------------------------------------------------------------------------------------

    def _join(self, node: fx.Node, output: fx.Node) -> None:
        """Let readers of the joined heads read ``output`` [B, S, N D], and others the heads divided anew."""
        for transposed in [user for user in node.users if swaps(user)]:
            for joined in [user for user in transposed.users if user.target == aten.reshape.default]:
                if _same_rows(joined, transposed):
                    joined.replace_all_uses_with(output)
                    self._nodes.erase_node(joined)
            if not transposed.users:
                self._nodes.erase_node(transposed)
        if node.users:
            heads = self._nodes.call_function(emit.divide_heads, (output, node.meta["val"].shape[1]))
            node.replace_all_uses_with(heads)


def appended(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(past, new) where a node is an input of the graph with new positions appended, [B, K, T, D]."""
    if node.target != aten.cat.default or node.args[1:] not in ((2,), (-2,)):
        return None
    parts: Any = node.args[0]
    return (parts[0], parts[1]) if len(parts) == 2 and parts[0].op == "placeholder" else None


def swaps(node: fx.Node) -> bool:
    """Whether a node exchanges heads and positions of a tensor of four dimensions."""
    if node.target == aten.transpose.int:
        return node.meta["val"].dim() == 4 and {axis % 4 for axis in node.args[1:]} == {1, 2}  # type: ignore[operator]  # ints
    return node.target == aten.permute.default and list(node.args[1]) == [0, 2, 1, 3]  # type: ignore[arg-type]  # ints


def _is_divided(node: fx.Node) -> bool:
    return node.op == "call_function" and swaps(node)


def _same_rows(flat: fx.Node, divided: fx.Node) -> bool:
    """Whether a tensor is [B, S, N D] where another is [B, S, N, D]."""
    a, b = flat.meta["val"].shape, divided.meta["val"].shape
    return len(a) == 3 and len(b) == 4 and a[:2] == b[:2] and a[2] == b[2] * b[3]


def _rotation(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """(y, cos, sin) of y that is turned, y divided into heads, cos and sin [B or 1, S, D]."""
    found = rotation(node)
    if found is None or not _is_divided(found[0]):
        return None
    y, *factors = found
    cos, sin = (_table(factor) for factor in factors)
    return None if cos is None or sin is None else (y, cos, sin)


def _table(node: fx.Node) -> fx.Node | None:
    """The table [B or 1, S, D] behind ``unsqueeze(table, 1)`` where its halves are equal."""
    if node.target != aten.unsqueeze.default or node.args[1] != 1:
        return None
    table = at = node.args[0]
    while isinstance(at, fx.Node) and at.target in _ELEMENTWISE:
        others = at.args[1:] if at.target == aten.mul.Tensor else ()
        if any(isinstance(other, fx.Node) and other.meta["val"].dim() > 0 for other in others):
            return None
        at = at.args[0]
    doubled = isinstance(at, fx.Node) and at.target == aten.cat.default and at.args[1:] in ((-1,), (2,))
    parts: Any = at.args[0] if doubled and isinstance(at, fx.Node) else ()
    alike = len(parts) == 2 and parts[0] is parts[1]
    return table if alike and isinstance(table, fx.Node) and table.meta["val"].dim() == 3 else None


def spread_mask(nodes: fx.Graph, node: fx.Node) -> bool:
    """``mask[rows, columns]`` is ``mask[:B, None, None, :T]`` where rows are 0 ... B - 1 and columns 0 ... T - 1.

    Rows are [B, 1, 1, 1] and columns [1, 1, 1, T].  Models look up a padding mask in that way; as a gather it takes a dozen
    nodes.  Replaces the node at the insertion point before it; False where it is none of this form.
    """
    source, indices, *_ = node.args
    if not isinstance(source, fx.Node) or source.meta["val"].dim() != 2 or not isinstance(indices, list | tuple):
        return False
    if len(indices) != 2 or node.meta["val"].dim() != 4:
        return False
    counts = [_counted(index, axis) for index, axis in zip(indices, (0, 3), strict=True)]
    if None in counts:
        return False
    rows, columns = source.meta["val"].shape
    new: fx.Node = source
    for axis, (have, count) in enumerate(zip((rows, columns), counts, strict=True)):
        size = count.meta["val"] if isinstance(count, fx.Node) else count
        if str(have) != str(size):
            new = nodes.call_function(aten.slice.Tensor, (new, axis, 0, count))
    for _ in range(2):
        new = nodes.call_function(aten.unsqueeze.default, (new, 1))
    new.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(new)
    return True


def _counted(index: Any, axis: int) -> Any:
    """The count n (a node or a number) where ``index`` is 0 ... n - 1 along ``axis`` of four dimensions, else None."""
    if not isinstance(index, fx.Node) or index.meta["val"].dim() != 4:
        return None
    if any(size != 1 for at, size in enumerate(index.meta["val"].shape) if at != axis):
        return None
    while index.target == aten.unsqueeze.default:
        index = index.args[0]
    whole = index.target == aten.arange.default and len(index.args) == 1 and index.meta["val"].dim() == 1
    return index.args[0] if whole else None
