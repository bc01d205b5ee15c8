"""Puts a ``surgeon::moe`` node in the place of a proven region, over weights in the operator's layout."""

from __future__ import annotations

import itertools
import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from surgeon.discovery import operators
from surgeon.discovery.flow import Flow
from surgeon.raising.cuts import is_bounded
from surgeon.raising.match import Mixture
from surgeon.raising.region import Region, is_sized
from surgeon.raising.weights import Piece, Roles
from surgeon.rewrite import Editor

aten = torch.ops.aten
MOE = torch.ops.surgeon.moe.default
PARTS = ("w_in", "w_out", "b_in", "b_out")


def insert(editor: Editor, flow: Flow, mixture: Mixture, *, adopt: bool) -> None:
    """Replace one region; see the package."""
    exit = mixture.region.exit
    with editor.before(exit):
        weights = _weights(editor, mixture, adopt=adopt)
        x = _rows(editor, editor.current(mixture.x), operators.shape(mixture.x)[-1])
        x = _cast(editor, x, weights[0].meta["val"].dtype)
        index, weight = _routing(editor, flow, mixture)
        if mixture.scaled:
            new = _scaled(editor, x, index, weight, weights, mixture.activation)
        else:
            new = editor.call(MOE, x, index, weight, *weights, mixture.activation)
        new = _cast(editor, new, exit.meta["val"].dtype)
        if exit.meta["val"].dim() != 2:
            new = editor.call(aten.reshape.default, new, editor.sizes(exit))
        for base in mixture.bases:
            term = editor.current(base)
            if term.meta["val"].dim() != exit.meta["val"].dim():
                term = editor.call(aten.reshape.default, term, editor.sizes(exit))
            new = editor.call(aten.add.Tensor, new, term)
    editor.replace(exit, new)


def _scaled(editor: Editor, x: fx.Node, index: fx.Node, weight: fx.Node, weights: list[Any], activation: str) -> fx.Node:
    """Weights on the experts' inputs: every (token, expert) pair is a row of its own, with weight one."""
    k = int(index.meta["val"].shape[1])
    width = int(x.meta["val"].shape[1])
    inputs, factors = editor.call(aten.unsqueeze.default, x, 1), editor.call(aten.unsqueeze.default, weight, 2)
    rows = editor.call(aten.mul.Tensor, inputs, factors)
    rows = _cast(editor, editor.call(aten.reshape.default, rows, [-1, width]), x.meta["val"].dtype)
    pairs = editor.call(aten.reshape.default, index, [-1, 1])
    ones = editor.call(aten.ones_like.default, editor.call(aten.reshape.default, weight, [-1, 1]))
    each = editor.call(MOE, rows, pairs, ones, *weights, activation)
    out_width = int(each.meta["val"].shape[1])
    return editor.call(aten.sum.dim_IntList, editor.call(aten.reshape.default, each, [-1, k, out_width]), [1])


# -- routing ----------------------------------------------------------------------------------------------------------


def _routing(editor: Editor, flow: Flow, mixture: Mixture) -> tuple[fx.Node, fx.Node]:
    """Nodes of index [T, k] (int64) and weight [T, k]."""
    routing = mixture.routing
    source = editor.current(routing.source)
    if routing.kind == "choice":
        assert routing.weight is not None
        return _every(editor, _chosen(editor, mixture, source, editor.current(routing.weight)), routing.k)
    if routing.kind == "slots":
        source = editor.call(aten.sum.dim_IntList, source, [-1])
    weight = None
    if routing.weight is not None and routing.kind not in ("slots", "bound"):
        weight = _rows(editor, editor.current(routing.weight), routing.k)
    if routing.kind == "index":
        index = _cast(editor, _rows(editor, source, routing.k), torch.int64)
        if weight is None:
            weight = editor.call(aten.ones_like.default, index, dtype=operators.value(mixture.x).dtype)
        experts = mixture.roles.second.stack.shape[0]
        within = mixture.beyond == "error" or is_bounded(routing.source, experts)
        return (index, weight) if within else _within(editor, index, weight, experts)
    if routing.kind == "mask":
        assert weight is not None
        experts = operators.shape(routing.source)[-1]
        rows = editor.call(aten.reshape.default, source, [-1, routing.k, experts])
        rows = _cast(editor, rows, torch.int64)
        index = editor.call(aten.argmax.default, rows, -1)
        kept = _cast(editor, editor.call(aten.amax.default, rows, [-1]), weight.meta["val"].dtype)
        return index, editor.call(aten.mul.Tensor, weight, kept)
    dense = _rows(editor, source, routing.k)
    if routing.kind == "bound":
        assert routing.weight is not None
        reached = editor.call(aten.ge.Tensor, dense, _rows(editor, editor.current(routing.weight), 1))
        dense = editor.call(aten.mul.Tensor, dense, _cast(editor, reached, dense.meta["val"].dtype))
        return _every(editor, dense, routing.k)
    selected = _selection(flow, mixture)
    if selected is not None:
        node, k = selected
        index = _rows(editor, editor.current(node), k)
        return index, editor.call(aten.gather.default, dense, 1, index)
    return _every(editor, dense, routing.k)


def _within(editor: Editor, index: fx.Node, weight: fx.Node, experts: int) -> tuple[fx.Node, fx.Node]:
    """Weight nothing instead of selecting what does not exist."""
    exists = editor.call(aten.lt.Scalar, index, experts)
    blank = editor.call(aten.zeros_like.default, weight)
    weight = editor.call(aten.where.self, exists, weight, blank)
    return editor.call(aten.clamp.default, index, None, experts - 1), weight


def _every(editor: Editor, dense: fx.Node, experts: int) -> tuple[fx.Node, fx.Node]:
    """Every expert, the heaviest first: in the form of a selection, so that what reads routings need not know others."""
    both = editor.call(aten.topk.default, dense, experts)
    return editor.call(operator.getitem, both, 1), editor.call(operator.getitem, both, 0)


def _chosen(editor: Editor, mixture: Mixture, tokens: fx.Node, weight: fx.Node) -> fx.Node:
    """Weights [T, E] of experts that chose tokens [E, c]: zero for those that did not choose a token."""
    x = _rows(editor, editor.current(mixture.x), operators.shape(mixture.x)[-1])
    column = editor.call(aten.select.int, x, 1, 0)
    blank = editor.call(aten.zeros_like.default, column, dtype=weight.meta["val"].dtype)
    blank = editor.call(aten.expand.default, editor.call(aten.unsqueeze.default, blank, 0), [mixture.routing.k, -1])
    return editor.call(aten.t.default, editor.call(aten.scatter.src, blank, 1, tokens, weight))


def _selection(flow: Flow, mixture: Mixture) -> tuple[fx.Node, int] | None:
    """A selection behind dense weights: experts outside of which they are zero, shown on random inputs."""
    routing = mixture.routing
    if mixture.scaled and (mixture.roles.second_bias is not None or mixture.roles.first_bias):
        return None  # an expert with biases is not nothing for an input of zeros
    weights = Region(flow, routing.source, (mixture.x,))
    if not weights.complete:
        return None
    tokens = operators.shape(mixture.x)
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(tokens, generator=generator).to(operators.value(mixture.x).dtype)
    tensors = {
        name: torch.randn(t.shape, generator=generator).to(t.dtype)
        for name, t in ((name, flow.graph.tensor(name)) for name in weights.names)
    }
    for node in weights.program:
        shape = operators.shape(node)
        if not is_sized(node) or operators.value(node).dtype != torch.int64 or not shape or node in flow.constant:
            continue
        k = 1 if shape == tokens[:-1] else shape[-1]
        if k >= routing.k or _numel(shape) != _numel(tokens[:-1]) * k:
            continue
        try:
            dense = weights.run({mixture.x: x}, tensors)
            dense = (dense.sum(-1) if routing.kind == "slots" else dense).reshape(-1, routing.k)
            index = Region(flow, node, (mixture.x,)).run({mixture.x: x}, tensors).reshape(-1, k)
            outside = dense.scatter(1, index, 0.0)
        except (RuntimeError, IndexError):
            continue
        if not bool(outside.any()):
            return node, k
    return None


# -- weights ----------------------------------------------------------------------------------------------------------


def _weights(editor: Editor, mixture: Mixture, *, adopt: bool) -> list[Any]:
    """Nodes that read w_in, w_out, b_in and b_out (or None)."""
    roles = mixture.roles
    pieces: dict[str, tuple[Piece, ...]] = {
        "w_in": roles.first,
        "w_out": (roles.second,),
        "b_in": roles.first_bias,
        "b_out": () if roles.second_bias is None else (roles.second_bias,),
    }
    tensors = {name: editor.tensor(name) for name in mixture.region.names}
    prefix = _prefix([name for group in pieces.values() for piece in group for name in piece.stack.names])
    found: list[Any] = []
    values = dict(zip(PARTS, _load(roles, tensors), strict=True))
    for part in PARTS:
        group, value = pieces[part], values[part]
        if value is None:
            found.append(None)
            continue
        (first, *others) = group
        names = first.stack.names
        plain = not others and len(names) == 1 and not first.transposed and first.order in (None, "gate|up")
        if plain and tensors[names[0]].shape == value.shape:
            found.append(editor.read(names[0]))
            continue
        found.append(editor.add_tensor(f"{prefix}{part}", value))
        if adopt:
            _adopt(group, value, tensors)
    return found


def _load(roles: Roles, tensors: dict[str, Tensor]) -> list[Tensor | None]:
    with torch.no_grad():
        return [None if value is None else value.detach() for value in roles.load(tensors)]


def _adopt(group: tuple[Piece, ...], value: Tensor, tensors: dict[str, Tensor]) -> None:
    """Let the source's parameters be views of the new tensor, where they can be."""
    if isinstance(value, FakeTensor) or any(piece.order not in (None, "gate|up") for piece in group):
        return
    for piece, part in zip(group, value.chunk(len(group), dim=1), strict=True):
        part = part.mT if piece.transposed else part
        views = [part] if len(piece.stack.names) == 1 else list(part.unbind(0))
        for name, view in zip(piece.stack.names, views, strict=True):
            if tensors[name].shape == view.shape:
                tensors[name].data = view


def _prefix(names: list[str]) -> str:
    """What the names have in common, up to a dot."""
    split = [name.split(".")[:-1] for name in names]
    common = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*split, strict=False))
    return "".join(f"{parts[0]}." for parts in common)


def settle_layout(editor: Editor, *, adopt: bool) -> None:
    """Give every node whose weights are transposed, cut or joined in the graph weights in its own layout instead."""
    del adopt
    flow = Flow(editor.graph)
    for node in [n for n in flow.nodes if n.target == MOE]:
        for position, part in enumerate(PARTS, start=3):
            operand = node.args[position]
            if not isinstance(operand, fx.Node) or operand.op == "get_attr" or operand not in flow.constant:
                continue
            region = Region(flow, operand, ())
            if len(region.names) != 1 or any(operators.kind(n) == operators.DEQUANTIZE for n in region.program):
                continue
            prefix = region.names[0].rpartition(".")[0]
            with editor.before(node):
                new = editor.add_tensor(f"{prefix}.{part}" if prefix else part, region.run({}, {}))
            node.update_arg(position, new)


# -- small edits ------------------------------------------------------------------------------------------------------


def _rows(editor: Editor, node: fx.Node, columns: int) -> fx.Node:
    value = node.meta["val"]
    if value.dim() == 2 and value.shape[1] == columns:
        return node
    return editor.call(aten.reshape.default, node, [-1, columns])


def _cast(editor: Editor, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    if node.meta["val"].dtype == dtype:
        return node
    return editor.call(aten._to_copy.default, node, dtype=dtype)


def _numel(shape: tuple[int, ...]) -> int:
    result = 1
    for size in shape:
        result *= size
    return result
