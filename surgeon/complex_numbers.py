"""Complex arithmetic as arithmetic of pairs: rotary positions that are spelled as products of complex numbers.

A complex tensor z [...] becomes the real tensor [..., 2] of its parts.  With a, b the parts of z and c, d those of w:

1. ``polar(r, t)``: (r cos t, r sin t)
2. ``view_as_complex(x)``, ``view_as_real(z)``: what is there already
3. ``z w``: (a c - b d, a d + b c);  ``z x`` with x real: (a x, b x)
4. ``unsqueeze``, ``slice``, ``expand``, ``reshape``: the same in front of the last dimension

Runtimes have kernels for real numbers.  A graph with another operator on complex tensors stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from surgeon.graph import Graph
from surgeon.rewrite import Editor

aten = torch.ops.aten


def spell_in_pairs(graph: Graph) -> Graph:
    """Rewrite all complex tensors of a graph, in place; none is an input, an output or a parameter where that is possible."""
    nodes = [node for node in graph.module.graph.nodes if node.op != "output" and _touches(node)]
    if not nodes or any(node.target not in _RULES for node in nodes):
        return graph
    editor = Editor(graph)
    pairs: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        with editor.before(node):
            new = _RULES[node.target](editor, pairs, *node.args, **node.kwargs)
        if _is_complex(node):
            pairs[node] = new
        else:
            editor.replace(node, new)
    return editor.finish()


def _is_complex(node: Any) -> bool:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return isinstance(value, Tensor) and value.is_complex()


def _touches(node: fx.Node) -> bool:
    return _is_complex(node) or any(map(_is_complex, node.all_input_nodes))


_Pairs = dict[fx.Node, fx.Node]


def _polar(editor: Editor, pairs: _Pairs, radius: fx.Node, angle: fx.Node) -> fx.Node:
    parts = [editor.call(aten.mul.Tensor, radius, editor.call(turn, angle)) for turn in (aten.cos.default, aten.sin.default)]
    return editor.call(aten.stack.default, parts, -1)


def _mul(editor: Editor, pairs: _Pairs, z: fx.Node, w: Any) -> fx.Node:
    if not _is_complex(z):
        z, w = w, z
    if not _is_complex(w):
        tensor = isinstance(w, fx.Node) and isinstance(w.meta["val"], Tensor)
        factor = editor.call(aten.unsqueeze.default, w, -1) if tensor else w
        return editor.call(aten.mul.Tensor, pairs[z], factor)
    (a, b), (c, d) = ([editor.call(aten.select.int, pairs[factor], -1, part) for part in (0, 1)] for factor in (z, w))
    ac, bd, ad, bc = (editor.call(aten.mul.Tensor, *factors) for factors in ((a, c), (b, d), (a, d), (b, c)))
    parts = [editor.call(aten.sub.Tensor, ac, bd), editor.call(aten.add.Tensor, ad, bc)]
    return editor.call(aten.stack.default, parts, -1)


def _unsqueeze(editor: Editor, pairs: _Pairs, z: fx.Node, dim: int) -> fx.Node:
    return editor.call(aten.unsqueeze.default, pairs[z], dim if dim >= 0 else dim - 1)


def _slice(editor: Editor, pairs: _Pairs, z: fx.Node, dim: int = 0, *rest: Any) -> fx.Node:
    return editor.call(aten.slice.Tensor, pairs[z], dim if dim >= 0 else dim - 1, *rest)


def _sized(operator: Any) -> Callable[..., fx.Node]:
    return lambda editor, pairs, z, shape: editor.call(operator, pairs[z], [*shape, 2])


_RULES: dict[Any, Callable[..., fx.Node]] = {
    aten.polar.default: _polar,
    aten.view_as_complex.default: lambda editor, pairs, x: x,
    aten.view_as_real.default: lambda editor, pairs, z: pairs[z],
    aten.mul.Tensor: _mul,
    aten.unsqueeze.default: _unsqueeze,
    aten.slice.Tensor: _slice,
    aten.expand.default: _sized(aten.expand.default),
    aten.reshape.default: _sized(aten.reshape.default),
}
