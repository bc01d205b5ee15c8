"""Linears of one input as one linear: decoding reads the same bytes with fewer, fuller kernels."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from torch import fx

from surgeon.graph import Graph
from surgeon.rewrite import Editor

aten = torch.ops.aten
_DEQUANTIZE = torch.ops.surgeon.dequantize.default


def joined_linears(graph: Graph) -> Graph:
    """Join linears without bias that read one input (queries, keys and values; gate and up) and slice what they give.

    Weights are joined by rows, low-bit ones packed as they are where bits and groups agree, so every result stays the same
    sum of the same products.

    Args:
        graph: stays as it is.
    """
    editor = Editor(graph.clone())
    kinds: dict[tuple[Any, ...], list[fx.Node]] = {}
    for node in editor.graph.module.graph.nodes:
        if node.target is aten.linear.default and (len(node.args) < 3 or node.args[2] is None):
            form = _form(node.args[1])
            if form is not None:
                kinds.setdefault((node.args[0], *form), []).append(node)
    for linears in kinds.values():
        if len(linears) > 1:
            _join(editor, linears)
    return editor.finish()


def _form(weight: Any) -> tuple[Any, ...] | None:
    """What weights must have in common to be joined; None for one that is not a constant of its own."""
    if weight.op == "get_attr" and weight.meta["val"].dim() == 2 and len(weight.users) == 1:
        return (weight.meta["val"].dtype,)
    if weight.target is not _DEQUANTIZE or len(weight.users) != 1:
        return None
    packed, scale, zero, *rest = weight.args
    parts = [part for part in (packed, scale, zero) if part is not None]
    if packed.meta["val"].dim() != 3 or any(part.op != "get_attr" or len(part.users) != 1 for part in parts):
        return None
    return (packed.meta["val"].dtype, scale.meta["val"].dtype, zero is None, *rest)


def _join(editor: Editor, linears: list[fx.Node]) -> None:
    first = linears[0]
    weights: list[Any] = [node.args[1] for node in linears]
    x: Any = first.args[0]

    def joined(nodes: list[fx.Node]) -> fx.Node:
        name = f"{nodes[0].target}_joined"
        return editor.add_tensor(name, torch.cat([editor.tensor(str(node.target)).detach() for node in nodes]))

    with editor.before(first):
        if weights[0].op == "get_attr":
            weight = joined(weights)
        else:
            _, _, zero, *rest = weights[0].args
            parts = [joined([w.args[place] for w in weights]) for place in (0, 1)]
            zeros = None if zero is None else joined([w.args[2] for w in weights])
            weight = editor.call(_DEQUANTIZE, *parts, zeros, *rest)
        whole = editor.call(aten.linear.default, x, weight)
        ends = list(accumulate(int(node.meta["val"].shape[-1]) for node in linears))
        pieces = [editor.call(aten.slice.Tensor, whole, -1, a, b) for a, b in zip([0, *ends], ends, strict=False)]
    for node, piece in zip(linears, pieces, strict=True):
        editor.replace(node, piece)
