"""Rotary embedding in the spelling that graphs have, where halves of a head are turned together.

``y cos + concat(-y[R/2:], y[:R/2]) sin`` of y [..., R].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

aten = torch.ops.aten


def rotation(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """(y, cos, sin) where a node is y turned; cos and sin are the factors as they stand."""
    if node.target != aten.add.Tensor or node.kwargs or len(node.args) != 2:
        return None
    for first, second in (node.args, node.args[::-1]):
        plain, turned = _product(first), _product(second)
        if plain is None or turned is None:
            continue
        for y, cos in (plain, plain[::-1]):
            for half, sin in (turned, turned[::-1]):
                if _turns(half, y):
                    return y, cos, sin
    return None


def slice_of(node: Any, y: fx.Node) -> tuple[int, int] | None:
    """Start and stop of a slice of the last dimension of y."""
    if not isinstance(node, fx.Node) or node.target != aten.slice.Tensor or node.args[0] is not y:
        return None
    defaults: tuple[Any, ...] = (None, 0, 0, None, 1)
    _, axis, start, stop, step = node.args + defaults[len(node.args) :]
    shape = y.meta["val"].shape
    if axis not in (len(shape) - 1, -1) or step not in (None, 1):
        return None
    return start or 0, shape[-1] if stop is None else min(stop, shape[-1])


def _product(node: Any) -> tuple[fx.Node, fx.Node] | None:
    if not isinstance(node, fx.Node) or node.target != aten.mul.Tensor:
        return None
    a, b = node.args
    return (a, b) if isinstance(a, fx.Node) and isinstance(b, fx.Node) else None


def _turns(half: fx.Node, y: fx.Node) -> bool:
    """Whether ``half`` is ``concat(-y[R/2:], y[:R/2])`` along the last dimension."""
    shape = y.meta["val"].shape
    if half.target != aten.cat.default or half.args[1:] not in ((len(shape) - 1,), (-1,)):
        return False
    parts: Any = half.args[0]
    middle, odd = divmod(shape[-1], 2)
    if odd or len(parts) != 2 or parts[0].target != aten.neg.default:
        return False
    return slice_of(parts[0].args[0], y) == (middle, 2 * middle) and slice_of(parts[1], y) == (0, middle)
