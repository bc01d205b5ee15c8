"""Feed-forward networks and experts with fewer neurons: their own tensors, under their own names, with fewer rows and columns.

Shapes: H input width, G output width, I neurons of which K stay, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, fx

from surgeon.accounting import memory, nodes_of, stored_reads
from surgeon.discovery import operators
from surgeon.expert_stack import ExpertStack
from surgeon.gates import gate as lookup
from surgeon.graph import Graph
from surgeon.mixtures import add_function, put_in_place
from surgeon.rewrite import Editor
from surgeon.structure import FFN, Linear, MoE

aten = torch.ops.aten


def kept_width(width: int, ratio: float, multiple: int, *, least: int = 1) -> int:
    """How many of ``width`` stay where a share goes: rounded up, to a multiple where that is no more than there is."""
    # 1e-9: a ratio such as 0.3 is not exact in binary and must not keep one more by it
    wanted = max(least, math.ceil((1 - ratio) * width - 1e-9))
    return min(width, -(-wanted // multiple) * multiple)


def not_its_own(graph: Graph, ffn: FFN) -> str | None:
    """Why the tensors of an FFN cannot lose rows and columns in place, or None.

    Others may read them too (layers that share their weights, one matrix for projections of several parts), or gate and up
    rows alternate in a way that fewer of them would not.
    """
    for name in _inputs(ffn):
        parts = [part for part in _first(ffn) if part.weight == name]
        placed = sorted(row for part in parts for row in _rows(part))
        weight = graph.tensor(name)
        count = int(weight.shape[1 if parts[0].transposed else 0])
        if placed != list(range(count)):
            return f"{name} has {count} output features, and {len(placed)} are the FFN's; the others belong to another part"
        if any(_stride(_rows(part)) is None for part in parts):
            return f"gate and up rows alternate in {name} in groups, which fewer neurons would not"
    linears = [*_first(ffn), ffn.down]
    own = nodes_of(linears)
    return _also_read(graph, [name for part in linears for name in (part.weight, part.bias) if name is not None], own)


def experts_not_their_own(graph: Graph, moe: MoE) -> str | None:
    """Why the tensors of experts cannot lose rows and columns in place, or None."""
    names = ("w_in", "w_out", "b_in", "b_out")
    operands = [operators.argument(moe.node, position, name) for position, name in enumerate(names, start=3)]
    computed = [node.name for node in operands if node is not None and node.op != "get_attr"]
    if computed:
        return f"its experts' weights are computed from other tensors ({', '.join(computed)})"
    return _also_read(graph, [str(node.target) for node in operands if node is not None], {moe.node})


def _also_read(graph: Graph, names: Sequence[str], own: set[fx.Node]) -> str | None:
    keys = {memory(graph.tensor(name)): name for name in names}
    for key, reads in stored_reads(graph).items():
        name = keys.get(key)
        if name is not None and any(user not in own for read in reads for user in read.users):
            return f"{name} is read by other parts of the model too (layers that share their weights)"
    return None


def keep_neurons(editor: Editor, ffn: FFN, keep: Tensor, down: Tensor, bias: Tensor | None) -> None:
    """Keep some neurons of an FFN for which :func:`not_its_own` has no reason.

    Args:
        editor: of the graph that ``ffn`` was found in.
        ffn: the FFN.
        keep: their numbers, [K], ascending.
        down: their output columns, [G, K].
        bias: the output's bias [G], where it has one.
    """
    positions: dict[fx.Node, Tensor] = {}
    plain = _only_pointwise(ffn)
    for name in _inputs(ffn):
        parts = [part for part in _first(ffn) if part.weight == name]
        rows = torch.cat([torch.tensor(_rows(part))[keep] for part in parts]).sort().values
        weight = editor.tensor(name).detach()
        editor.set_tensor(name, weight.index_select(1 if parts[0].transposed else 0, rows.to(weight.device)))
        positions[parts[0].node] = rows
        if parts[0].bias is not None:
            offset = editor.tensor(parts[0].bias).detach()
            editor.set_tensor(parts[0].bias, offset.index_select(0, rows.to(offset.device)))
    old = editor.tensor(ffn.down.weight)
    editor.set_tensor(ffn.down.weight, (down.T if ffn.down.transposed else down).to(old).contiguous())
    if ffn.down.bias is not None and bias is not None:
        editor.set_tensor(ffn.down.bias, bias.to(editor.tensor(ffn.down.bias)))
    if not plain:  # sizes stand between the matrices: in reshapes, in the places where halves are cut
        _connect(editor, ffn, keep, positions)


def _only_pointwise(ffn: FFN) -> bool:
    """Whether nothing but element-wise operators and constants stands between an FFN's matrices."""
    ends = {part.node for part in _first(ffn)}
    if len(ends) < len(_first(ffn)):
        return False
    stack, seen = [ffn.hidden], set()
    while stack:
        node = stack.pop()
        if node in ends or node in seen:
            continue
        seen.add(node)
        if node.op != "call_function" or not (operators.is_pointwise(node) or operators.kind(node) in operators.CASTS):
            return False
        stack.extend(node.all_input_nodes)
    products = nodes_of([*_first(ffn), ffn.down])  # where a linear is several nodes, a size may stand among them
    return all(not any(isinstance(argument, list | tuple) for argument in node.args) for node in products)


def _connect(editor: Editor, ffn: FFN, keep: Tensor, positions: dict[fx.Node, Tensor]) -> None:
    """Compute the FFN anew from its tensors."""
    with editor.before(ffn.down.node):
        x = editor.current(ffn.input)
        outputs = {node: _linear(editor, x, part) for part in _first(ffn) for node in (part.node,)}
        values = []
        for part in _first(ffn):
            value, kept = outputs[part.node], positions[part.node]
            if kept.numel() > keep.numel():
                own = torch.searchsorted(kept, torch.tensor(_rows(part))[keep]).tolist()
                step = _stride(own)
                assert step is not None
                value = editor.call(aten.slice.Tensor, value, -1, own[0], own[-1] + 1, step)
            values.append(value)
        assert ffn.activation is not None
        entry = lookup(ffn.activation)
        inner = add_function(editor, entry.alone if ffn.gate is None else entry.joined, *values)
        put_in_place(editor, ffn, [_linear(editor, inner, ffn.down)], None)


def _linear(editor: Editor, x: fx.Node, part: Linear) -> fx.Node:
    weight = editor.read(part.weight)
    if part.transposed:
        weight = editor.call(aten.t.default, weight)
    bias = () if part.bias is None else (editor.read(part.bias),)
    return editor.call(aten.linear.default, x, weight, *bias)


def keep_expert_neurons(editor: Editor, moe: MoE, keep: Tensor, w_out: Tensor, b_out: Tensor | None) -> None:
    """Keep some neurons of every expert of a mixture for which :func:`experts_not_their_own` has no reason.

    Args:
        editor: of the graph that ``moe`` was found in.
        moe: the mixture.
        keep: their numbers, [E, K], ascending.
        w_out: their output columns, [E, G, K].
        b_out: the outputs' biases [E, G], where there are some.
    """
    stack = ExpertStack.of(editor.graph, moe)
    numbers, rows = torch.arange(stack.experts)[:, None], stack.rows(keep)
    editor.set_tensor(moe.w_in, stack.w_in[numbers, rows])
    editor.set_tensor(moe.w_out, w_out.to(stack.w_out).contiguous())
    if moe.b_in is not None and stack.b_in is not None:
        editor.set_tensor(moe.b_in, stack.b_in[numbers, rows])
    if moe.b_out is not None and b_out is not None:
        editor.set_tensor(moe.b_out, b_out.to(editor.tensor(moe.b_out)))


def neuron_parameters(graph: Graph, ffn: FFN) -> int:
    """Parameters that one neuron of an FFN has: its rows, their biases, its column."""
    total = 0
    for part in (*_first(ffn), ffn.down):
        if isinstance(graph.tensor(part.weight), torch.nn.Parameter):
            total += part.in_features if part is not ffn.down else part.out_features
        if part is not ffn.down and part.bias is not None and isinstance(graph.tensor(part.bias), torch.nn.Parameter):
            total += 1
    return total


def expert_neuron_parameters(graph: Graph, moe: MoE) -> int:
    """Parameters that one neuron of each of a mixture's experts has, of all experts together."""
    names = [name for name in (moe.w_in, moe.w_out, moe.b_in) if name is not None]
    return sum(t.numel() // moe.width for t in map(graph.tensor, names) if isinstance(t, torch.nn.Parameter))


def _first(ffn: FFN) -> list[Linear]:
    """The linears in front of the activation."""
    return [part for part in (ffn.gate, ffn.up) if part is not None]


def _inputs(ffn: FFN) -> list[str]:
    return list(dict.fromkeys(part.weight for part in _first(ffn)))


def _rows(part: Linear) -> list[int]:
    """The output features of its weight that a linear means."""
    if part.index is not None:
        return list(part.index)
    return list(range(*(part.rows or (0, part.out_features))))


def _stride(rows: list[int]) -> int | None:
    """The one distance of neighbours, or None."""
    steps = {b - a for a, b in zip(rows, rows[1:], strict=False)}
    return None if len(steps) > 1 or min(steps, default=1) < 1 else next(iter(steps), 1)
