"""Feed-forward networks taken apart neuron by neuron and put together as experts.

Shapes: H input width, G output width, I neurons, E experts of m neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

import surgeon.ops  # noqa: F401  # registers torch.ops.surgeon
from surgeon.accounting import freed_parameter_count, nodes_of
from surgeon.errors import PlanError
from surgeon.gates import gate as lookup
from surgeon.graph import Graph
from surgeon.rewrite import Editor
from surgeon.routers import Choice, Router
from surgeon.structure import FFN, Linear

aten = torch.ops.aten


@dataclass(frozen=True)
class Neurons:
    """The weights of one FFN, ``y = down (act(gate x + b_gate) * (up x + b_up)) + b_down`` or ``down act(up x + b_up)``.

    Attributes:
        gate: [I, H], None for a plain FFN.
        up: [I, H].
        down: [G, I].
        gate_bias, up_bias: [I] or None.
        down_bias: [G] or None.
        activation: name of a gate (:mod:`surgeon.gates`).
    """

    gate: Tensor | None
    up: Tensor
    down: Tensor
    gate_bias: Tensor | None
    up_bias: Tensor | None
    down_bias: Tensor | None
    activation: str

    @classmethod
    def of(cls, graph: Graph, ffn: FFN) -> Neurons:
        """Read the weights of an FFN that :func:`refuse_ffn` lets pass."""
        assert ffn.activation is not None
        gate = ffn.gate
        return cls(
            gate=None if gate is None else rows(graph, gate),
            up=rows(graph, ffn.up),
            down=rows(graph, ffn.down),
            gate_bias=None if gate is None else bias(graph, gate),
            up_bias=bias(graph, ffn.up),
            down_bias=bias(graph, ffn.down),
            activation=ffn.activation,
        )

    @property
    def hollow(self) -> Neurons:
        """As many neurons without their numbers, on the meta device."""
        fields: dict[str, Any] = {
            key: value.to("meta") if isinstance(value, Tensor) else value for key, value in vars(self).items()
        }
        return Neurons(**fields)

    @property
    def keys(self) -> Tensor:
        """The rows [I, H] that decide whether a neuron is active: of the gate, or of up where there is none."""
        return self.up if self.gate is None else self.gate

    def hidden(self, x: Tensor) -> Tensor:
        """Intermediate activations, [T, H] -> [T, I]."""
        linear = torch.nn.functional.linear
        entry = lookup(self.activation)
        up = linear(x, self.up, self.up_bias)
        return entry.alone(up) if self.gate is None else entry.joined(linear(x, self.gate, self.gate_bias), up)

    def masses(self, hidden: Tensor, experts: Tensor) -> Tensor:
        """``sum_{i in e} |h_i|`` of every token and expert, hidden [T, I] and experts [E, m] -> [T, E]."""
        return torch.stack([hidden[:, expert].abs().sum(1) for expert in experts], dim=1)

    def norms(self, hidden: Tensor, experts: Tensor) -> Tensor:
        """``|E_e(x)|_2`` of every token and expert, hidden [T, I] and experts [E, m] -> [T, E]."""
        return torch.stack([(hidden[:, e] @ self.down[:, e].T).norm(dim=1) for e in experts], dim=1)

    def means_when_skipped(self, hidden: Tensor, experts: Tensor, runs: Tensor) -> Tensor:
        """Mean output of every expert over the tokens for which its weight is 0, [E, G]; 0 where there are none.

        Args:
            hidden: [T, I].
            experts: [E, m].
            runs: weights, [T, E].
        """
        skipped = (runs == 0).to(hidden.dtype)
        share = skipped / skipped.sum(0).clamp_min(1)
        return torch.stack([self.down[:, e] @ (share[:, n] @ hidden[:, e]) for n, e in enumerate(experts)])

    def mixed(self, hidden: Tensor, experts: Tensor, runs: Tensor) -> Tensor:
        """``sum_e w_e E_e(x)``, arguments as above, [T, G]."""
        taken = torch.zeros_like(hidden)
        for number, expert in enumerate(experts):
            taken[:, expert] += runs[:, number : number + 1] * hidden[:, expert]
        return taken @ self.down.T

    def experts(self, experts: Tensor) -> Experts:
        """Stacked weights of experts [E, m]; a neuron may be in several."""
        count, size = experts.shape
        order = experts.flatten()
        inputs = [part for part in (self.gate, self.up) if part is not None]
        w_in = torch.cat([part[order].reshape(count, size, -1) for part in inputs], dim=1)
        w_out = self.down[:, order].reshape(-1, count, size).transpose(0, 1).contiguous()
        biases = [self.up_bias] if self.gate is None else [self.gate_bias, self.up_bias]
        b_in = None
        if any(part is not None for part in biases):
            filled = [self.up.new_zeros(self.up.shape[0]) if part is None else part for part in biases]
            b_in = torch.cat([part[order].reshape(count, size) for part in filled], dim=1)
        return Experts(w_in, w_out, b_in, None)

    def part(self, neurons: Tensor) -> Neurons:
        """The FFN of some of the neurons, without the down bias."""
        pick = [None if t is None else t[neurons] for t in (self.gate, self.up, self.gate_bias, self.up_bias)]
        gate, up, gate_bias, up_bias = pick
        assert up is not None
        return Neurons(gate, up, self.down[:, neurons].contiguous(), gate_bias, up_bias, None, self.activation)


@dataclass(frozen=True)
class Experts:
    """Tensors of ``surgeon::moe``: w_in [E, m or 2 m, H], w_out [E, G, m], b_in [E, m or 2 m], b_out [E, G] or None."""

    w_in: Tensor
    w_out: Tensor
    b_in: Tensor | None
    b_out: Tensor | None

    def numel(self) -> int:
        """Number of weights."""
        return sum(t.numel() for t in (self.w_in, self.w_out, self.b_in, self.b_out) if t is not None)


def refuse_ffn(name: str, graph: Graph, site: str, ffn: FFN) -> None:
    """Refuse an FFN whose neurons cannot be told apart.

    Args:
        name: of the pass that asks.
        graph: the graph.
        site: of the FFN.
        ffn: the FFN.

    Raises:
        PlanError: its weights are quantized or factored, its activation was not recognised, its neurons are normalised or
            scaled by something beside its weights, or its down projection is one matrix with that of an attention beside it.
    """
    refuse_rewritten(name, graph, site, ffn)
    reason = not_of_neurons(name, ffn)
    if reason is not None:
        raise PlanError(f"{site}: {reason}")


def refuse_rewritten(name: str, graph: Graph, site: str, ffn: FFN) -> None:
    """Refuse an FFN that an earlier pass has made one of other weights; arguments and errors as above."""
    for part in (ffn.gate, ffn.up, ffn.down):
        if part is None:
            continue
        if not graph.tensor(part.weight).is_floating_point():
            raise PlanError(f"{site}: its weights are quantized already; put {name} before quantize")
        if part.factors:
            raise PlanError(f"{site}: its weights were factored already; put {name} before low_rank")


def not_of_neurons(name: str, ffn: FFN) -> str | None:
    """Why an FFN is no sum over neurons, each of its own rows and column, or None; ``name`` is the pass that asks."""
    if ffn.down.columns is not None:
        return (
            f"its down projection {ffn.down.weight} is one matrix with that of another part (input features "
            f"{ffn.down.columns[0]} to {ffn.down.columns[1]} are the FFN's), so it cannot be replaced alone"
        )
    if ffn.activation is None:
        return "its activation function was not recognised, so its neurons cannot be told apart"
    if ffn.normed:
        return "a normalisation over all neurons stands in front of down, so they cannot be told apart"
    if ffn.scaled:
        return (
            "its neurons are multiplied by a learned vector or by another input of the layer, or their activation has "
            f"learned numbers; {name} takes networks of two or three matrices and biases alone"
        )
    return None


def rows(graph: Graph, linear: Linear) -> Tensor:
    """Weight of a linear as [out, in], only the rows and columns that belong to it."""
    weight = graph.tensor(linear.weight).detach()
    matrix = _own(weight.T if linear.transposed else weight, linear)
    return matrix if linear.columns is None else matrix[:, linear.columns[0] : linear.columns[1]]


def bias(graph: Graph, linear: Linear) -> Tensor | None:
    """Bias of a linear, only the entries that belong to it."""
    return None if linear.bias is None else _own(graph.tensor(linear.bias).detach(), linear)


def _own(tensor: Tensor, linear: Linear) -> Tensor:
    if linear.index is not None:
        return tensor[list(linear.index)]
    return tensor if linear.rows is None else tensor[linear.rows[0] : linear.rows[1]]


def ffn_name(ffn: FFN) -> str:
    """Name of the module that holds an FFN's weights, under which new tensors are put."""
    return ffn.up.weight.rpartition(".")[0] or ffn.up.weight


def add_mixture(
    editor: Editor, name: str, flat: fx.Node, index: fx.Node, weight: fx.Node, experts: Experts, activation: str
) -> fx.Node:
    """Add ``surgeon::moe`` and its tensors at the insertion point: flat [T, H], index and weight [T, k] -> [T, G]."""
    optional: list[Any] = [
        None if tensor is None else editor.add_tensor(f"{name}.experts.{key}", tensor)
        for key, tensor in (("b_in", experts.b_in), ("b_out", experts.b_out))
    ]
    w_in = editor.add_tensor(f"{name}.experts.w_in", experts.w_in.contiguous())
    w_out = editor.add_tensor(f"{name}.experts.w_out", experts.w_out.contiguous())
    return editor.call(torch.ops.surgeon.moe.default, flat, index, weight, w_in, w_out, *optional, activation)


def add_ffn(editor: Editor, name: str, x: fx.Node, neurons: Neurons) -> fx.Node:
    """Add a dense FFN at the insertion point: x [..., H] -> [..., G]."""

    def linear(source: fx.Node, key: str, matrix: Tensor, offset: Tensor | None) -> fx.Node:
        weight = editor.add_tensor(f"{name}.{key}.weight", matrix.contiguous())
        if offset is None:
            return editor.call(aten.linear.default, source, weight)
        return editor.call(aten.linear.default, source, weight, editor.add_tensor(f"{name}.{key}.bias", offset.contiguous()))

    up = linear(x, "up", neurons.up, neurons.up_bias)
    entry = lookup(neurons.activation)
    if neurons.gate is None:
        inner = add_function(editor, entry.alone, up)
    else:
        inner = add_function(editor, entry.joined, linear(x, "gate", neurons.gate, neurons.gate_bias), up)
    return linear(inner, "down", neurons.down, neurons.down_bias)


def add_function(editor: Editor, function: Callable[..., Tensor], *inputs: fx.Node) -> fx.Node:
    """Add an element-wise function, as the operators it consists of."""
    small = [torch.empty(2, dtype=x.meta["val"].dtype) for x in inputs]
    traced = make_fx(lambda *values: function(*values))(*small)
    values: dict[fx.Node, Any] = {}
    given = iter(inputs)
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            values[node] = next(given)
        elif node.op == "output":
            result = values[node.args[0]]
        elif node.op == "call_function":
            values[node] = editor.call(node.target, *fx.node.map_arg(node.args, values.__getitem__), **node.kwargs)
        else:
            values[node] = editor.add_tensor("constant", getattr(traced, str(node.target)))
    assert isinstance(result, fx.Node)
    return result


def flattened(editor: Editor, ffn: FFN) -> fx.Node:
    """The FFN's input as rows [T, H], at the insertion point."""
    return editor.call(aten.reshape.default, editor.current(ffn.input), [-1, ffn.up.in_features])


def replace_by_experts(
    editor: Editor,
    ffn: FFN,
    neurons: Neurons,
    experts: Tensor,
    shared: Tensor,
    router: Router,
    choice: Choice,
    means: Tensor | None,
) -> None:
    """Let a router and experts of an FFN's own neurons take its place.

    Args:
        editor: of the graph.
        ffn: the FFN.
        neurons: its weights.
        experts: neurons of the routed experts, [E, m].
        shared: neurons that stay dense, [S].
        router: scores of the experts.
        choice: which run, and their weights.
        means: [E, G], what an expert gives where it does not run; None for nothing.
    """
    name, stacked = ffn_name(ffn), neurons.experts(experts)
    offset: Tensor | str | None = ffn.down.bias
    if means is not None:
        # a skipped expert e gives means[e]: all of them go into the offset, and a chosen one takes its own out again
        stacked = Experts(stacked.w_in, stacked.w_out, stacked.b_in, -means)
        offset = means.sum(0) if neurons.down_bias is None else neurons.down_bias + means.sum(0)
    with editor.before(ffn.down.node):
        flat = flattened(editor, ffn)
        index, weight = choice.add(editor, router.add(editor, f"{name}.router", flat))
        terms = [add_mixture(editor, name, flat, index, weight, stacked, neurons.activation)]
        if shared.numel():
            terms.append(add_ffn(editor, f"{name}.shared", editor.current(ffn.input), neurons.part(shared)))
        put_in_place(editor, ffn, terms, offset)


def put_in_place(editor: Editor, ffn: FFN, terms: Sequence[fx.Node], offset: Tensor | str | None) -> None:
    """Let the sum of the terms ([T, G] or of the output's shape) take the place of the FFN's output.

    Args:
        editor: inserting before the FFN's down projection.
        ffn: the FFN.
        terms: at least one.
        offset: added on top: [G], or the name of a tensor that is there already.
    """
    sizes = editor.sizes(ffn.down.node)
    rank = ffn.down.node.meta["val"].dim()
    shaped = [
        term if term.meta["val"].dim() == rank and rank > 2 else editor.call(aten.reshape.default, term, sizes)
        for term in terms
    ]
    out = shaped[0]
    for term in shaped[1:]:
        out = editor.call(aten.add.Tensor, out, term)
    if offset is not None:
        node = editor.read(offset) if isinstance(offset, str) else editor.add_tensor(f"{ffn_name(ffn)}.bias", offset)
        out = editor.call(aten.add.Tensor, out, node)
    editor.replace(ffn.down.node, out)


def freed_parameters(graph: Graph, ffns: Sequence[FFN], *, keep_down_bias: bool) -> int:
    """Weights that nothing reads any more once the linears of some FFNs are gone."""
    linears = [part for ffn in ffns for part in (ffn.gate, ffn.up, ffn.down) if part is not None]
    names = {part.weight for part in linears} | {part.bias for part in linears if part.bias is not None}
    if keep_down_bias:
        names -= {ffn.down.bias for ffn in ffns if ffn.down.bias is not None}
    return freed_parameter_count(graph, nodes_of(linears), names)


def only_for(node: fx.Node, keep: fx.Node) -> list[fx.Node]:
    """What goes when a node goes: itself and all that is computed for it alone, but not ``keep``, which is still read."""
    gone = {node}
    for candidate in reversed(list(node.graph.nodes)):
        alone = bool(candidate.users) and all(user in gone for user in candidate.users)
        if candidate.op == "call_function" and candidate is not keep and alone:
            gone.add(candidate)
    return list(gone)
