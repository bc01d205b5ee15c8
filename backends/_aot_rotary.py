"""Attention over buffers whose queries and keys are turned: turning and writing become one kernel (``_cuda_rotary``).

    q' = turned(q),  k' = written(keys, turned(k)),  v' = written(values, v),  attention(q', k', v', mask)

A head may be turned in its first R numbers alone: ``concat(turned(q[:R]), q[R:])``.  Casts from halves to float32 in front of
the turning and back behind it are left out: the kernel computes in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from surgeon.backends._aot_cuda import Buffered, attention, dense_last, has_kernel
from surgeon.backends._rotation import rotation, slice_of
from surgeon.graph import Graph

aten = torch.ops.aten
ATTENTION = torch.ops.surgeon.attention.default
_Turned = tuple[fx.Node, fx.Node, fx.Node]
"""What is turned [B, heads, S, D], and cosines and sines [B or 1, 1, S, R]."""


def turned_where_written(graph: Graph) -> int:
    """Let attention over buffers turn and write in one kernel, in place, in a graph that lowering made for itself.

    Args:
        graph: behind ``_aot_shared.write_in_place`` with the number of past positions as an input.

    Returns:
        How many attentions do.
    """
    nodes = graph.module.graph
    count = 0
    for node in list(nodes.find_nodes(op="call_function", target=ATTENTION)):
        arguments = _arguments(node)
        if arguments is None:
            continue
        with nodes.inserting_before(node):
            called = nodes.call_function(turned_attention, arguments)
        called.meta = dict(node.meta)
        node.replace_all_uses_with(called)
        _forget(nodes, node)
        count += 1
    if count:
        nodes.lint()
        graph.module.recompile()
    return count


def turned_attention(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, start: Tensor, total: int,
    mask: Tensor | None, scale: float,
) -> Tensor:  # fmt: skip
    """Attention [B, N, S, W] of queries that are turned here over buffers into which new keys, turned too, are written.

    Args:
        q: [B, N, S, D].
        k: new keys [B, H, S, D].
        v: new values [B, H, S, W].
        cos: [B or 1, 1, S, R].
        sin: likewise.
        keys: a buffer [B, H, at least total, D].
        values: a buffer [B, H, at least total, W].
        start: [1], how many positions are in the past.
        total: how many the mask covers.
        mask: as :func:`surgeon.ops.attend` takes it.
        scale: factor of the scores.
    """
    from surgeon.backends import _cuda_rotary

    for buffer in (keys, values):
        torch._check(total <= buffer.shape[2])  # type: ignore[no-untyped-call]
    q, k, v = (dense_last(tensor) for tensor in (q, k, v))
    cos, sin = (dense_last(table).expand(q.shape[0], 1, q.shape[2], table.shape[3]) for table in (cos, sin))
    turned = _cuda_rotary.turn_and_append(q, k, v, cos, sin, keys, values, start, total)
    return attention(turned, keys.narrow(2, 0, total), values.narrow(2, 0, total), mask, False, scale, start)


def _arguments(node: fx.Node) -> tuple[Any, ...] | None:
    """Those of :func:`turned_attention` where a node of attention can be one."""
    arguments: tuple[Any, ...] = node.args
    q, k, v, mask, is_causal, scale = arguments
    keys, values = Buffered.of(k), Buffered.of(v)
    if keys is None or values is None or is_causal or node.kwargs or not has_kernel(*(each.meta["val"] for each in (q, k, v))):
        return None
    (key_buffer, new_key, start, total), (value_buffer, new_value, *_) = keys, values
    queries, new = _turned(q), _turned(new_key)
    if queries is None or new is None or queries[1:] != new[1:] or not isinstance(start, fx.Node):
        return None
    held = (q, new_key, new_value, key_buffer, value_buffer)
    if len({each.meta["val"].dtype for each in held}) > 1:
        return None
    return queries[0], new[0], new_value, *queries[1:], key_buffer, value_buffer, start, total, mask, scale


def _turned(node: fx.Node) -> _Turned | None:
    """What a node is turned from, by which cosines and sines."""
    dtype = node.meta["val"].dtype
    whole, inner = _first_numbers(_cast_from(node, torch.float32))
    found = rotation(_cast_from(inner, torch.float32))
    if found is None:
        return None
    y, cos, sin = found
    size = y.meta["val"].shape[-1]
    y = _cast_from(y, dtype)
    if whole is not None and y is not whole:
        if slice_of(y, whole) != (0, size):
            return None
        y = _cast_from(whole, dtype)
    shapes = [tuple(table.meta["val"].shape) for table in (cos, sin)]
    fits = all(len(shape) == 4 and shape[1] == 1 and shape[3] == size for shape in shapes)
    return (y, cos, sin) if fits and y.meta["val"].dim() == 4 and y.meta["val"].dtype == dtype else None


def _first_numbers(node: fx.Node) -> tuple[fx.Node | None, fx.Node]:
    """Find x and f of a node that is ``concat(f, x[R:])`` along the last dimension, f of R numbers; else None, the node."""
    parts: Any = node.args[0] if node.target is aten.cat.default and node.args[1:] in ((-1,), (3,)) else ()
    if len(parts) != 2 or parts[1].target is not aten.slice.Tensor:
        return None, node
    first, rest = parts
    whole = rest.args[0]
    behind = (first.meta["val"].shape[-1], whole.meta["val"].shape[-1])
    return (whole, first) if slice_of(rest, whole) == behind else (None, node)


def _cast_from(node: fx.Node, dtype: torch.dtype) -> fx.Node:
    """What a node casts from that type to or from float32, or the node itself."""
    if node.target is aten._to_copy.default and set(node.kwargs) == {"dtype"}:
        source = node.all_input_nodes[0]
        if source.meta["val"].dtype == dtype and torch.float32 in (dtype, node.meta["val"].dtype):
            return source
    return node


def _forget(nodes: fx.Graph, node: fx.Node) -> None:
    """Erase a node that nothing reads any more, and what only it read."""
    if node.users or node.op != "call_function":
        return
    sources = node.all_input_nodes
    nodes.erase_node(node)
    for source in sources:
        _forget(nodes, source)
