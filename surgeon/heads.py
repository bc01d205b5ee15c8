"""An attention with fewer heads: which tensors, constants and caches shrink, and how.

Heads stand in a graph in many spellings: projections of their own or rows of one, reshapes that divide and join them, repeated
keys, rotary tables, norms and gates per head, biases and caches with a dimension of heads.  No spelling is listed here.
Instead every element of every tensor in front of the output projection is asked which head needs it:

    the features that the output projection reads belong to one head each, as they stand side by side;
    an element is needed by those heads that need an element which is computed from it, walking back to the weights;
    what several heads need, or somebody else, stays; what only heads that go need, goes.

An operator whose elements are not known one by one needs all of its inputs, so that whatever is in front of it stays whole.
Where a tensor that stays whole is read by something that shrinks, the kept heads are selected in between; that is done for
masks and biases.  Where it would be queries, keys, values or their results, heads are not apart, and the attention is refused.

What is needed for what, operator by operator: :mod:`surgeon.head_labels`.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from surgeon.caches import KEPT
from surgeon.discovery import operators
from surgeon.errors import RewriteError
from surgeon.graph import Graph
from surgeon.head_parts import Places, Times, Trim, Unfit
from surgeon.head_survey import Survey
from surgeon.rewrite import Editor
from surgeon.structure import Attention, Linear, Site, Structure

aten = torch.ops.aten


def trim(graph: Graph, structure: Structure, site: Site[Attention], units: int, keep: Sequence[int]) -> Trim:
    """What has to change for an attention to have fewer heads; changes nothing.

    Args:
        graph: the graph.
        structure: its structure.
        site: the attention; its output projection is known and neither packed nor factored.
        units: into how many parts of equal size the features that the output projection reads are divided: key/value
            groups or query heads.
        keep: numbers of the units that stay.

    Raises:
        Unfit: says at which node the heads are not apart.
    """
    output = site.part.o
    assert output is not None
    assert site.block is not None
    block = structure.blocks[site.block]
    product, x, weight, axis = _product(output)
    if operators.shape(x)[-1] % units:
        raise Unfit(f"its output projection reads {operators.shape(x)[-1]} features, which {units} parts do not divide")
    labels = torch.arange(units).repeat_interleave(operators.shape(x)[-1] // units)
    survey = Survey(graph, block, site.part, torch.tensor(sorted(keep)), units)
    survey.need(x, product, labels.reshape([1] * (len(operators.shape(x)) - 1) + [-1]))
    survey.need(weight, product, labels.reshape([1, -1] if axis else [-1, 1]))
    return survey.run(product)


def keep_heads(editor: Editor, change: Trim) -> None:
    """Edit a graph as :func:`trim` found it.

    Raises:
        RewriteError: a shape does not come out as expected.
    """
    for (value, reader), (axis, places) in change.selections.items():
        with editor.before(reader):
            editor.redirect(reader, value, _selected(editor, value, axis, places))
    for node, (target, args) in change.arguments.items():
        with editor.before(node):
            node.args = tuple(_resolved(editor, argument) for argument in args)
        node.target = target
        editor.touch(node)
    for name, part in change.tensors.items():
        editor.set_tensor(name, part.of(editor.tensor(name).detach()))
    for placeholder, part in change.caches.items():
        for axis, (before, after) in enumerate(zip(part.shape, part.sizes, strict=True)):
            if before != after:
                editor.resize_input(placeholder, axis, part.mask.flatten().nonzero().flatten())
    editor.settle()
    nodes = set(editor.graph.module.graph.nodes)
    for node, part in change.parts.items():
        if node in nodes and not part.gone and isinstance(node.meta["val"], Tensor) and operators.shape(node) != part.sizes:
            found = list(operators.shape(node))
            raise RewriteError(f"{node.name} should have shape {list(part.sizes)} without the dropped heads, it has {found}")
    editor.resize_outputs(KEPT)


def _resolved(editor: Editor, argument: Any) -> Any:
    """An argument with what is in the making made, at the insertion point."""
    if isinstance(argument, list):
        return [_resolved(editor, entry) for entry in argument]
    if isinstance(argument, Times):
        return editor.call(operator.mul, argument.size, argument.factor)
    if isinstance(argument, Places):
        return editor.add_tensor(argument.name, argument.places)
    return argument


def _selected(editor: Editor, value: fx.Node, axis: int, places: Tensor) -> fx.Node:
    """Some places of one dimension of a value; of nothing in front of it, which is gone where blocks are run one by one."""
    source = value.args[0] if operators.kind(value) == "aten::expand" else None
    if isinstance(source, fx.Node):
        ahead = len(operators.shape(value)) - len(operators.shape(source))
        if axis < ahead or operators.shape(source)[axis - ahead] == 1:
            places = torch.arange(len(places))  # one place is as good as another
    first, last = int(places[0]), int(places[-1])
    if last - first == len(places) - 1:
        return editor.call(aten.slice.Tensor, value, axis, first, last + 1)
    return editor.call(aten.index_select.default, value, axis, editor.add_tensor(f"{value.name}_kept", places))


def _product(output: Linear) -> tuple[fx.Node, fx.Node, fx.Node, int]:
    """The product of an output projection: its node, x, the matrix, and which of the matrix's dimensions is x's.

    Raises:
        Unfit: it is spelled in another way.
    """
    stack, seen = [output.node], set()
    while stack:
        node = stack.pop()
        if node in seen or node is output.input or node.op != "call_function":
            continue
        seen.add(node)
        kind = operators.kind(node)
        first = 1 if kind == "aten::addmm" else 0
        if kind in ("aten::linear", "aten::addmm", "aten::mm", "aten::matmul"):
            x, weight = node.args[first], node.args[first + 1]
            if isinstance(x, fx.Node) and isinstance(weight, fx.Node) and len(operators.shape(weight)) == 2:
                return node, x, weight, 1 if kind == "aten::linear" else 0
        stack.extend(node.all_input_nodes)
    raise Unfit(f"its output projection {output.node.name} ({operators.kind(output.node)}) is no product with a matrix")
