"""A mixture of experts with fewer experts: which tensors and which constants of its router shrink, and how.

Between the router's scores and the choice, the number of experts E stands in the graph as a constant: in shapes that are
split into groups, in one-hot comparisons, in selections that take all experts.  Dropping experts has to change each of
them; a constant that is not understood makes the edited graph's shapes disagree, which the editor refuses.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from surgeon.discovery import operators
from surgeon.graph import Graph
from surgeon.rewrite import Editor
from surgeon.structure import MoE

_SHAPED = frozenset(
    f"aten::{name}" for name in "reshape view _unsafe_view expand full zeros ones new_full new_zeros new_ones".split()
)


def expert_tensors(graph: Graph, moe: MoE) -> list[tuple[str, int]]:
    """Names and expert dimensions of all tensors with one entry per expert: experts, router, corrections of its scores."""
    assert moe.router is not None
    found = [(name, 0) for name in (moe.w_in, moe.w_out, moe.b_in, moe.b_out) if name is not None]
    found.append((moe.router.weight, 1 if moe.router.transposed else 0))
    if moe.router.bias is not None:
        found.append((moe.router.bias, 0))
    known = {name for name, _ in found}
    for node in routing_nodes(moe):
        for source in _reads(node):
            name = str(source.target)
            tensor = graph.tensor(name)
            shape = list(tensor.shape)
            if name not in known and tensor.is_floating_point() and shape.count(moe.experts) == 1:
                known.add(name)
                found.append((name, shape.index(moe.experts)))
    return found


def keep_experts(editor: Editor, moe: MoE, keep: Tensor) -> None:
    """Keep only some experts of a mixture; the same number of each group, where its router has groups.

    Args:
        editor: of the graph that ``moe`` was found in.
        moe: a mixture with a recognised router.
        keep: their numbers, ascending.
    """
    for node in _selecting_nodes(moe):
        _resize(editor, node, moe, len(keep))
    for name, axis in expert_tensors(editor.graph, moe):
        editor.set_tensor(name, editor.tensor(name).detach().index_select(axis, keep))


def selecting_top_k(moe: MoE) -> fx.Node | None:
    """The one top-k of all experts' scores that gives the mixture's index, or None where it is chosen in another way."""
    if moe.logits is None or moe.input_scaled:
        return None
    node = moe.index
    while operators.is_reshape(node) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    if operators.kind(node) != operators.GETITEM or node.args[1] != 1:
        return None
    source = node.args[0]
    if not isinstance(source, fx.Node) or operators.kind(source) != operators.TOPK or source.args[1] != moe.top_k:
        return None
    scores = source.all_input_nodes[0]
    last = len(operators.shape(scores)) - 1
    along = source.args[2] if len(source.args) > 2 else -1
    return source if along in (-1, last) and operators.shape(scores)[-1] == moe.experts else None


def choose_fewer(editor: Editor, moe: MoE, count: int) -> None:
    """Let a mixture's router select ``count`` experts instead of k.

    Args:
        editor: of the graph that ``moe`` was found in.
        moe: a mixture for which :func:`selecting_top_k` is not None.
        count: at most k.
    """
    top = selecting_top_k(moe)
    assert top is not None
    top.update_arg(1, count)
    editor.touch(top)
    behind = {top}
    for node in moe.node.graph.nodes:  # in order
        if node not in routing_nodes(moe) or not any(source in behind for source in node.all_input_nodes):
            continue
        behind.add(node)
        if operators.kind(node) in _SHAPED:
            for position, argument in enumerate(node.args):
                if isinstance(argument, list | tuple) and argument and argument[-1] == moe.top_k:
                    node.update_arg(position, [*argument[:-1], count])
                    editor.touch(node)


def expert_operands(graph: Graph, moe: MoE) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The experts' weights as the operator reads them, whatever layout they are stored in.

    Returns:
        w_in [E, O, H], w_out [E, G, I], b_in [E, O] or None, b_out [E, G] or None.
    """
    w_in, w_out, b_in, b_out = (operators.argument(moe.node, i + 3, key) for i, key in enumerate(_OPERANDS))
    first, second = constant_value(graph, w_in), constant_value(graph, w_out)
    assert first is not None
    assert second is not None
    return first, second, constant_value(graph, b_in), constant_value(graph, b_out)


_OPERANDS = ("w_in", "w_out", "b_in", "b_out")


def constant_value(graph: Graph, node: fx.Node | None) -> Tensor | None:
    """The value of a node that is computed from stored tensors only."""
    if node is None:
        return None
    if node.op == "get_attr":
        return graph.tensor(str(node.target)).detach()
    with torch.no_grad():
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda source: constant_value(graph, source))
        value: Tensor = node.target(*args, **kwargs)  # type: ignore[operator]  # a call_function target
    return value


def routing_nodes(moe: MoE) -> set[fx.Node]:
    """Nodes between the router's scores and the choice."""
    assert moe.logits is not None
    after: set[fx.Node] = set()
    frontier = [moe.logits]
    while frontier:
        for user in frontier.pop().users:
            if user not in after and user is not moe.node:
                after.add(user)
                frontier.append(user)
    before: set[fx.Node] = set()
    frontier = [moe.index, moe.weight]
    while frontier:
        node = frontier.pop()
        if node in after and node not in before:
            before.add(node)
            frontier.extend(node.all_input_nodes)
    return before


def _reads(node: fx.Node) -> list[fx.Node]:
    """Stored tensors that a node reads, directly or through operators on stored tensors alone."""
    found: list[fx.Node] = []
    stack = list(node.all_input_nodes)
    while stack:
        source = stack.pop()
        if source.op == "get_attr":
            found.append(source)
        elif source.op == "call_function" and _is_constant(source):
            stack.extend(source.all_input_nodes)
    return found


def _is_constant(node: fx.Node) -> bool:
    return all(
        source.op == "get_attr" or (source.op == "call_function" and _is_constant(source)) for source in node.all_input_nodes
    )


def _selecting_nodes(moe: MoE) -> list[fx.Node]:
    """The routing with the constants that only it reads, in graph order."""
    found = routing_nodes(moe)
    stack = list(found)
    while stack:
        for source in stack.pop().all_input_nodes:
            tensor = isinstance(operators.value(source), Tensor) and source.op == "call_function"
            if source not in found and source is not moe.logits and tensor and all(user in found for user in source.users):
                found.add(source)
                stack.append(source)
    return [node for node in moe.node.graph.nodes if node in found]


def _resize(editor: Editor, node: fx.Node, moe: MoE, count: int) -> None:
    """Change the constants of one node from E experts to ``count``."""
    name = operators.kind(node)
    if name in _SHAPED:
        for position, argument in enumerate(node.args):
            if isinstance(argument, list | tuple):
                node.update_arg(position, _shape(list(argument), moe, count))
                editor.touch(node)
    elif name == "aten::arange":
        _replace_number(editor, node, moe.experts, count)
    elif name in (operators.TOPK, "aten::one_hot", "aten::histc", "aten::bincount"):
        # all experts, not k of them: a selection of k that is E takes all that are left
        if name != operators.TOPK or moe.top_k == moe.experts:
            _replace_number(editor, node, moe.experts, count)
    for source in list(node.all_input_nodes):
        if source.op == "get_attr" and _counts(editor.tensor(str(source.target)), moe.experts):
            value = editor.tensor(str(source.target))
            shape = [count if size == moe.experts else size for size in value.shape]
            with editor.before(node):
                fresh = editor.add_tensor(f"{source.target}_{count}", torch.arange(count, dtype=value.dtype).reshape(shape))
            node.replace_input_with(source, fresh)
            editor.touch(node)


def _shape(sizes: list[Any], moe: MoE, count: int) -> list[Any]:
    """A shape with E experts, or with their groups apart, for ``count`` experts."""
    members = moe.experts // moe.groups
    found = []
    for position, size in enumerate(sizes):
        grouped = moe.groups > 1 and position > 0 and sizes[position - 1] == moe.groups and size == members
        if grouped:
            found.append(count // moe.groups)
        else:
            found.append(count if size == moe.experts and isinstance(size, int) else size)
    return found


def _replace_number(editor: Editor, node: fx.Node, old: int, new: int) -> None:
    for position, argument in enumerate(node.args):
        if argument == old and isinstance(argument, int):
            node.update_arg(position, new)
            editor.touch(node)


def _counts(tensor: Tensor, experts: int) -> bool:
    """Whether a stored tensor is 0, 1, ... E-1, which a choice is compared with."""
    if tensor.is_floating_point() or tensor.numel() != experts:
        return False
    return torch.equal(tensor.flatten().long(), torch.arange(experts))
