"""Complex arithmetic as arithmetic of pairs: rotary positions that are spelled as products of complex numbers.

A complex tensor z [...] becomes the real tensor [..., 2] of its parts.  With a, b the parts of z and c, d those of w:

1. ``polar(r, t)``: (r cos t, r sin t)
2. ``view_as_complex(x)``, ``view_as_real(z)``: what is there already
3. ``z w``: (a c - b d, a d + b c);  ``z x`` with x real: (a x, b x)
4. ``unsqueeze``, ``squeeze``, ``select``, ``slice``, ``index_select``, ``transpose``, ``permute``, ``expand``, ``reshape``,
   indexing by integers: the same in front of the last dimension
5. a stored table: its parts, stored
6. ``conj(z)``: (a, -b);  ``real(z)``, ``imag(z)``: a, b;  ``complex(x, y)``: (x, y)

Runtimes have kernels for real numbers.  A graph with another operator on complex tensors stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from surgeon.graph import Graph, assign_tensor
from surgeon.rewrite import Editor

aten = torch.ops.aten


def spell_in_pairs(graph: Graph) -> Graph:
    """Rewrite all complex tensors of a graph, in place; none is an input, an output or a parameter where that is possible."""
    nodes = [node for node in graph.module.graph.nodes if node.op != "output" and _touches(node)]
    if not nodes or not all(map(_is_ruled, nodes)):
        return graph
    editor = Editor(graph)
    pairs: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        with editor.before(node):
            if node.op == "get_attr":
                new = _table(editor, str(node.target))
            else:
                new = _RULES[node.target](editor, pairs, *node.args, **node.kwargs)
        if _is_complex(node):
            pairs[node] = new
        else:
            editor.replace(node, new)
    return editor.finish()


def without_rule(graph: Graph) -> list[str]:
    """Names of the operators on complex tensors, and of inputs of such a type, because of which a graph stays as it is."""
    nodes = [node for node in graph.module.graph.nodes if node.op != "output" and _touches(node)]
    return list(dict.fromkeys(str(node.target) for node in nodes if not _is_ruled(node)))


def _is_ruled(node: fx.Node) -> bool:
    return node.op == "get_attr" or node.target in _RULES


def _is_complex(node: Any) -> bool:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return isinstance(value, Tensor) and value.is_complex()


def _touches(node: fx.Node) -> bool:
    return _is_complex(node) or any(map(_is_complex, node.all_input_nodes))


_Pairs = dict[fx.Node, fx.Node]


def _polar(editor: Editor, pairs: _Pairs, radius: fx.Node, angle: fx.Node) -> fx.Node:
    parts = [editor.call(aten.mul.Tensor, radius, editor.call(turn, angle)) for turn in (aten.cos.default, aten.sin.default)]
    return editor.call(aten.stack.default, parts, -1)


def _table(editor: Editor, name: str) -> fx.Node:
    """A stored complex tensor as one of pairs; what was no parameter is none."""
    table = editor.tensor(name)
    pairs = torch.view_as_real(table.detach().resolve_conj()).clone()
    wanted = f"{name}_pairs"
    assign_tensor(editor.graph.module, wanted, nn.Parameter(pairs) if isinstance(table, nn.Parameter) else pairs)
    return editor.read(wanted)


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


def _along(operator: Any) -> Callable[..., fx.Node]:
    """An operator along one dimension, (z, dim, ...)."""
    return lambda editor, pairs, z, dim=0, *rest: editor.call(operator, pairs[z], _before_parts(dim), *rest)


def _transpose(editor: Editor, pairs: _Pairs, z: fx.Node, first: int, second: int) -> fx.Node:
    return editor.call(aten.transpose.int, pairs[z], _before_parts(first), _before_parts(second))


def _permute(editor: Editor, pairs: _Pairs, z: fx.Node, dims: list[int]) -> fx.Node:
    return editor.call(aten.permute.default, pairs[z], [*map(_before_parts, dims), -1])


def _before_parts(dim: int) -> int:
    """A dimension of a complex tensor among those of its parts."""
    return dim if dim >= 0 else dim - 1


def _conj(editor: Editor, pairs: _Pairs, z: fx.Node) -> fx.Node:
    real, imaginary = (editor.call(aten.select.int, pairs[z], -1, part) for part in (0, 1))
    return editor.call(aten.stack.default, [real, editor.call(aten.neg.default, imaginary)], -1)


def _part(number: int) -> Callable[..., fx.Node]:
    return lambda editor, pairs, z: editor.call(aten.select.int, pairs[z], -1, number)


def _sized(operator: Any) -> Callable[..., fx.Node]:
    return lambda editor, pairs, z, shape: editor.call(operator, pairs[z], [*shape, 2])


_RULES: dict[Any, Callable[..., fx.Node]] = {
    aten.polar.default: _polar,
    aten.view_as_complex.default: lambda editor, pairs, x: x,
    aten.view_as_real.default: lambda editor, pairs, z: pairs[z],
    aten.mul.Tensor: _mul,
    aten.unsqueeze.default: _along(aten.unsqueeze.default),
    aten.squeeze.dim: _along(aten.squeeze.dim),
    aten.select.int: _along(aten.select.int),
    aten.slice.Tensor: _along(aten.slice.Tensor),
    aten.index_select.default: _along(aten.index_select.default),
    aten.index.Tensor: lambda editor, pairs, z, index: editor.call(aten.index.Tensor, pairs[z], index),
    aten.transpose.int: _transpose,
    aten.permute.default: _permute,
    aten._conj.default: _conj,
    aten.real.default: _part(0),
    aten.imag.default: _part(1),
    aten.complex.default: lambda editor, pairs, x, y: editor.call(aten.stack.default, [x, y], -1),
    aten.expand.default: _sized(aten.expand.default),
    aten.reshape.default: _sized(aten.reshape.default),
}
