"""Products with a stored tensor that is no matrix, as linears: weights per head, [heads, width, size] and the like.

Rules, with W the stored tensor, C its dimensions that are summed with x's, K the others (all of them in the result):

1. ``einsum("..c, W -> ..k")``: x with C last and flattened, times W as the matrix [K, C], the result with K apart again and
   its dimensions in the order of the result:  y[b, k] = sum_c x[b, c] W[k, c], for any number of dimensions in b, c and k.
2. ``matmul(x, W)`` with W [n, c, k] and x [..., 1, s, c]: every one of n reads the same x, so that n belongs to K.
3. ``linear`` or ``matmul`` with W through reshapes and permutations only: these become those of the matrix.
4. ``linear``, ``matmul`` ... with entries or rows W[i:j] of a tensor, all of which are read so, once each: tensors of their
   own, over the same memory (one projection for query and another for key and value out of one packed weight; layers whose
   weights are one stack).

Mixtures of experts may be spelled the same way: the rules come after these are raised, and leave alone a tensor whose product
another stack of weights reads entry by entry.
The matrix is over W's memory where its dimensions are stored in that order, otherwise a copy.  A tensor is rewritten where all
that reads it gives the same matrix.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from math import prod
from string import ascii_letters

import torch
from torch import Tensor, fx

from surgeon.discovery import operators
from surgeon.graph import Graph
from surgeon.rewrite import Editor

aten = torch.ops.aten
_CUTS = (aten.slice.Tensor, aten.select.int)
_SPLITS = (aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int)
_MOVEMENTS = (aten.reshape.default, aten.permute.default, aten.transpose.int, aten.t.default, aten.unsqueeze.default)


@dataclass(frozen=True)
class Projection:
    """One product with a tensor of three dimensions or more.

    Attributes:
        node: the product.
        x: its other operand.
        weight: the read of the stored tensor.
        free: dimensions of x that are kept.
        summed: dimensions of x that are summed over.
        dropped: dimensions of x of size 1 that the result has another size for.
        order: the weight's dimensions as [K ..., C ...]; C in the order of ``summed``.
        kept: how many of them are K.
        output: where the result's dimensions are among [free ..., K ...].
    """

    node: fx.Node
    x: fx.Node
    weight: fx.Node
    free: tuple[int, ...]
    summed: tuple[int, ...]
    dropped: tuple[int, ...]
    order: tuple[int, ...]
    kept: int
    output: tuple[int, ...]


def flatten_projections(graph: Graph, left: Collection[str] = ()) -> None:
    """Replace every such product; edits the graph in place.

    Args:
        graph: a canonical graph.
        left: names of tensors that look like those of experts; stacks among them are not taken apart.
    """
    editor = Editor(graph)
    changed = False
    for name in dict.fromkeys(str(node.target) for node in graph.module.graph.find_nodes(op="get_attr")):
        if name not in left or graph.tensor(name).dim() < 3:
            changed |= _take_apart(editor, name)
    if changed:
        editor.settle()
    reads: dict[str, list[fx.Node]] = {}
    for node in graph.module.graph.find_nodes(op="get_attr"):
        reads.setdefault(str(node.target), []).append(node)
    for name, nodes in reads.items():
        tensor = graph.tensor(name)
        if tensor.dim() < 3 or not tensor.is_floating_point():
            continue
        changed |= _flatten(editor, name, nodes)
    if changed:
        editor.finish()


def _flatten(editor: Editor, name: str, reads: list[fx.Node]) -> bool:
    users = list(dict.fromkeys(user for read in reads for user in read.users))
    if users and all(user.target in _MOVEMENTS for user in users):
        return _reshaped(editor, name, users)
    found = [_projection(user, read) for read in reads for user in read.users]
    projections = [projection for projection in found if projection is not None]
    if not projections or len(projections) < len(found) or any(_enters_a_stack(p.node) for p in projections):
        return False
    if len({(projection.order, projection.kept) for projection in projections}) > 1:
        return False
    tensor, first = editor.tensor(name), projections[0]
    moved = tensor.detach().permute(first.order)
    sizes = [int(size) for size in moved.shape]
    matrix = moved.reshape(prod(sizes[: first.kept]), prod(sizes[first.kept :]))
    editor.set_tensor(name, matrix)
    for projection in projections:
        _replace(editor, projection, sizes)
    return True


# -- Rule 4 -------------------------------------------------------------------------------------------------------


def _take_apart(editor: Editor, name: str) -> bool:
    """Entries of a tensor, each of them an operand of a product or the bias of one, as tensors of their own."""
    tensor = editor.tensor(name)
    reads = [node for node in editor.graph.module.graph.find_nodes(op="get_attr") if node.target == name]
    users = [user for read in reads for user in read.users]
    if not users or not tensor.is_floating_point() or not 0 < tensor.dim() < 4:
        return False
    splits = [user for user in users if user.target in _SPLITS]
    ends = [user for user in users if user not in splits] + [end for split in splits for end in split.users]
    if any(user.target not in _CUTS for user in users if user not in splits) or len(ends) < 2:
        return False
    rows = torch.arange(tensor.shape[0])
    parts: dict[fx.Node, Tensor] = {}
    for end in ends:
        source = end.args[0]
        assert isinstance(source, fx.Node)
        cut = source if source in splits else end
        if cut.args[1:2] and cut.target in (aten.slice.Tensor, aten.select.int, aten.unbind.int) and cut.args[1] != 0:
            return False
        if cut.target in (aten.split.Tensor, aten.split_with_sizes.default) and cut.args[2:] not in ((), (0,)):
            return False
        if cut.kwargs or any(isinstance(argument, fx.Node) for argument in cut.args[1:]) or not _multiplied(end):
            return False
        held = [cut.target(t, *cut.args[1:]) for t in (rows, tensor.detach())]  # type: ignore[operator]  # an operator
        if cut is source:
            held = [t[end.args[1]] for t in held]
        rows_read, parts[end] = held
        end.meta["rows"] = rows_read.reshape(-1)
    if torch.cat([end.meta.pop("rows") for end in parts]).sort().values.tolist() != rows.tolist():
        return False
    for number, (end, part) in enumerate(parts.items()):
        if isinstance(tensor, torch.nn.Parameter):
            part = torch.nn.Parameter(part, tensor.requires_grad)
        with editor.before(end):
            editor.replace(end, editor.add_tensor(f"{name}_{number}", part))
    return True


def _multiplied(node: fx.Node) -> bool:
    """Whether every reader of a part of a tensor is a product that takes it for a weight or a bias."""
    users = list(node.users)
    while len(users) == 1 and users[0].target in (aten.t.default, aten.transpose.int, aten.permute.default):
        users = list(users[0].users)
    return bool(users) and all(operators.kind(user) in operators.PRODUCTS for user in users)


# -- Rule 3 -------------------------------------------------------------------------------------------------------


def _reshaped(editor: Editor, name: str, users: list[fx.Node]) -> bool:
    """A tensor that is only read as one matrix, through movements."""
    ends: set[fx.Node] = set()
    for node in users:
        while len(node.users) == 1 and (user := next(iter(node.users))).target in _MOVEMENTS:
            node = user
        ends.add(node)
    if len(ends) != 1:
        return False
    (end,) = ends
    if end.meta["val"].dim() != 2:
        return False
    chain, node = [end], end
    while node.all_input_nodes and node.all_input_nodes[0].op != "get_attr":
        node = node.all_input_nodes[0]
        chain.append(node)
    if any(len(node.all_input_nodes) != 1 for node in chain):
        return False
    matrix: Tensor = editor.tensor(name).detach()
    for node in reversed(chain):
        matrix = node.target(matrix, *node.args[1:], **node.kwargs)  # type: ignore[operator]  # a movement
    editor.set_tensor(name, matrix)
    with editor.before(end):
        read = editor.read(name)
    editor.replace(end, read)
    return True


# -- Rules 1 and 2 ------------------------------------------------------------------------------------------------


def _projection(node: fx.Node, weight: fx.Node) -> Projection | None:
    if node.target == aten.einsum.default and isinstance(node.args[1], list | tuple) and len(node.args[1]) == 2:
        equation = str(node.args[0]).replace(" ", "")
        operands = tuple(node.args[1])
    elif node.target == aten.matmul.default:
        operands = node.args
        equation = _matmul(operands[0], operands[1])
    else:
        return None
    inputs, _, output = equation.partition("->")
    subscripts = inputs.split(",")
    if "." in equation or not output or sum(operand is weight for operand in operands) != 1:
        return None
    place = 0 if operands[0] is weight else 1
    x, own, other = operands[1 - place], subscripts[place], subscripts[1 - place]
    if not isinstance(x, fx.Node) or any(len(set(text)) < len(text) for text in (own, other, output)):
        return None
    summed = [letter for letter in other if letter in own and letter not in output]
    free = [letter for letter in other if letter not in own and letter in output]
    dropped = [letter for letter in other if letter not in own and letter not in output]
    kept = [letter for letter in output if letter in own]
    if not summed or not kept or set(kept) & set(other) or set(own) != {*summed, *kept}:
        return None
    if any(x.meta["val"].shape[other.index(letter)] != 1 for letter in dropped):
        return None
    return Projection(
        node, x, weight,
        tuple(other.index(letter) for letter in free),
        tuple(other.index(letter) for letter in summed),
        tuple(other.index(letter) for letter in dropped),
        tuple(own.index(letter) for letter in (*kept, *summed)),
        len(kept),
        tuple([*free, *kept].index(letter) for letter in output),
    )  # fmt: skip


def _enters_a_stack(start: fx.Node) -> bool:
    """Whether a product's result goes, by element-wise work and movement, into a product with a stack of matrices."""
    seen: set[fx.Node] = set()
    stack = [start]
    while stack:
        for user in stack.pop().users:
            if user in seen:
                continue
            seen.add(user)
            if operators.kind(user) in operators.PRODUCTS:
                reads = [n for n in user.all_input_nodes if n.op == "get_attr" and n.meta["val"].dim() > 2]
                if any(_projection(user, read) is None for read in reads):
                    return True
            elif operators.is_pointwise(user) or operators.is_movement(user):
                stack.append(user)
    return False


def _matmul(x: object, weight: object) -> str:
    """A matmul as an einsum, "" where it is none: the weight's leading dimensions meet dimensions of x of size 1, or none."""
    if not isinstance(x, fx.Node) or not isinstance(weight, fx.Node):
        return ""
    sizes, rank = x.meta["val"].shape, weight.meta["val"].dim()
    if len(sizes) < 2 or rank < 3 or weight.op != "get_attr":
        return ""
    letters = iter(ascii_letters)
    batch, position, inner, outer = ([next(letters) for _ in range(n)] for n in (len(sizes) - 2, 1, 1, 1))
    leading = [next(letters) for _ in range(rank - 2)]
    for i in range(1, min(len(batch), len(leading)) + 1):
        if sizes[-2 - i] != 1:
            return ""
    result = batch[: max(0, len(batch) - len(leading))] + leading + position + outer
    return f"{''.join(batch + position + inner)},{''.join(leading + inner + outer)}->{''.join(result)}"


def _replace(editor: Editor, projection: Projection, sizes: list[int]) -> None:
    """``sizes``: those of the weight as [K ..., C ...]."""
    node, kept, x = projection.node, sizes[: projection.kept], projection.x
    inner = prod(sizes[projection.kept :])
    order = (*projection.dropped, *projection.free, *projection.summed)
    with editor.before(node):
        if order != tuple(range(len(order))):
            x = editor.call(aten.permute.default, x, list(order))
        lead = editor.sizes(x)[len(projection.dropped) : len(projection.dropped) + len(projection.free)]
        if projection.dropped or len(projection.summed) > 1:
            x = editor.call(aten.reshape.default, x, [*lead, inner])
        y = editor.call(aten.linear.default, x, editor.read(str(projection.weight.target)))
        if len(kept) > 1:
            y = editor.call(aten.reshape.default, y, [*lead, *kept])
        if projection.output != tuple(range(len(projection.output))):
            y = editor.call(aten.permute.default, y, list(projection.output))
    editor.replace(node, y)
