"""Matrix multiplications with a weight, in every spelling, and which output features of one a tensor holds.

Spellings, with W the stored tensor:

1. ``linear(x, W, b)``: W is [out, in].
2. ``addmm(b, x, W)``, ``mm(x, W)``, ``matmul(x, W)``: W is [in, out].
3. ``einsum("...i,oi->...o", x, W)``: W has one dimension that is summed over and one that is kept.
4. any of them followed by ``+ b`` with b a vector of the output's size.

W may be read through transpositions, casts and ``surgeon::dequantize``; x through ``surgeon::fake_quantize_dynamic``.
Two linears with nothing in between (no bias, no other reader, an inner size that is at most the smaller outer one) are one
projection that was factored: W = W1 W0.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from surgeon.discovery import operators
from surgeon.discovery.flow import Flow
from surgeon.structure import Linear


@dataclass(frozen=True)
class Stored:
    """A stored tensor behind a weight operand.

    Attributes:
        name: name of the (packed) tensor.
        swapped: the operand is the transposed tensor.
        parts: further tensors that belong to it by what they are: ``scale``, ``zero_point``.
    """

    name: str
    swapped: bool
    parts: tuple[tuple[str, str], ...] = ()


def stored(node: Any, flow: Flow) -> Stored | None:
    """The one stored tensor that a weight operand is, apart from transpositions, casts and dequantisation."""
    swapped = False
    parts: tuple[tuple[str, str], ...] = ()
    while isinstance(node, fx.Node) and node in flow.constant:
        name = operators.kind(node)
        if node.op == "get_attr":
            return Stored(str(node.target), swapped, parts)
        if name == operators.DEQUANTIZE:
            extra = (("scale", operators.argument(node, 1, "scale")), ("zero_point", operators.argument(node, 2, "zero_point")))
            parts = tuple((key, str(n.target)) for key, n in extra if isinstance(n, fx.Node) and n.op == "get_attr")
        elif name in ("aten::t", "aten::numpy_T", "aten::mT"):
            swapped = not swapped
        elif name in ("aten::transpose", "aten::swapaxes", "aten::permute"):
            dims = node.args[1] if name == "aten::permute" else node.args[1:3]
            rank = len(operators.shape(node))
            order = [int(d) % rank for d in dims]  # type: ignore[union-attr, arg-type]  # dimensions are integers
            if name == "aten::permute" and order != list(range(rank)) and order != [*range(rank - 2), rank - 1, rank - 2]:
                return None
            if name != "aten::permute" and sorted(order) != [rank - 2, rank - 1]:
                return None
            swapped ^= name != "aten::permute" or order != list(range(rank))
        elif name not in operators.CASTS and name not in ("aten::clone", "aten::contiguous", "aten::alias", "aten::detach"):
            return None
        node = node.args[0]
    return None


class Linears:
    """Every linear of a graph.

    Attributes:
        raw: the linears by the node that computes them, in graph order, factored ones apart.
        whole: projections by node: the raw ones, with the two halves of a factored one joined under the outer node.
        inner: inner halves: inner node to outer node.
        stored: where the weight of a raw linear is stored.
        core: the matrix product of each raw linear (another node where the bias is added apart).
        learned: linears whose input is computed from stored tensors alone, such as queries that are learned, or the tokens
            that a decoder starts with.  They are none of the others until :meth:`adopt` finds one a part: what a table of
            positions or a packed weight is computed with is none.
    """

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self.raw: dict[fx.Node, Linear] = {}
        self.stored: dict[fx.Node, Stored] = {}
        self.core: dict[fx.Node, fx.Node] = {}
        self.learned: dict[fx.Node, tuple[Linear, Stored]] = {}
        for node in flow.nodes:
            if node.op == "call_function" and node in flow:
                self._match(node)
        self.whole = dict(self.raw)
        self.inner: dict[fx.Node, fx.Node] = {}
        for outer in list(self.raw.values()):
            self._join(outer)

    def _match(self, node: fx.Node) -> None:
        operands = _operands(node)
        if operands is None:
            return
        x, weight, bias, in_last = operands
        if not isinstance(x, fx.Node) or not isinstance(weight, fx.Node):
            return
        learned = x in self.flow.constant
        if learned and operators.kind(node) != "aten::linear":  # which of two stored matrices is the weight, it alone says
            return
        if weight not in self.flow.constant or len(operators.shape(weight)) != 2:
            return
        found = stored(weight, self.flow)
        if found is None:
            return
        rows, columns = operators.shape(weight)
        out_features, in_features = (rows, columns) if in_last else (columns, rows)
        bias_name = None
        if isinstance(bias, fx.Node):
            held = stored(bias, self.flow)
            if held is None:
                return
            bias_name = held.name
        transposed = found.swapped if in_last else not found.swapped
        source = x.args[0] if operators.kind(x) == operators.FAKE_QUANTIZE else x
        assert isinstance(source, fx.Node)
        linear = Linear(node, source, found.name, bias_name, transposed, in_features, out_features)
        if learned:
            self.learned[node] = linear, found
            return
        linear = self._with_bias(linear)
        self.raw[linear.node], self.stored[linear.node], self.core[linear.node] = linear, found, node

    def _with_bias(self, linear: Linear) -> Linear:
        """Case 4: a bias added by the only reader, perhaps behind a reshape."""
        node = linear.node
        if linear.bias is not None or len(node.users) != 1:
            return linear
        (user,) = node.users
        if operators.kind(user) in operators.RESHAPES and len(user.users) == 1 and _keeps_last(node, user):
            (user,) = user.users
        if operators.kind(user) != operators.ADD or user.kwargs.get("alpha", 1) != 1:
            return linear
        for other in user.all_input_nodes:
            held = stored(other, self.flow)
            if held is not None and operators.shape(other) == (linear.out_features,) and other in self.flow.constant:
                return replace(linear, node=user, bias=held.name)
        return linear

    def adopt(self, node: fx.Node) -> Linear:
        """Count one of the learned linears among the others from now on."""
        if node not in self.whole:
            linear, found = self.learned[node]
            self.raw[node], self.stored[node], self.core[node], self.whole[node] = linear, found, node, linear
        return self.whole[node]

    def _join(self, outer: Linear) -> None:
        inner = self.raw.get(self.flow.plain(outer.input))
        if inner is None or inner.bias is not None or inner.out_features > min(inner.in_features, outer.out_features):
            return
        reader: fx.Node = inner.node
        while reader is not self.core[outer.node]:  # the inner product has no other reader on the way
            if len(reader.users) != 1:
                return
            (reader,) = reader.users
        joined = replace(outer, input=inner.input, in_features=inner.in_features, factors=(inner, outer))
        self.whole[outer.node] = joined
        self.whole.pop(inner.node, None)
        self.inner[inner.node] = outer.node

    # -- features -----------------------------------------------------------------------------------------------

    def features(self, linear: Linear, target: fx.Node, *, scaled: bool = False) -> dict[fx.Node, tuple[int, ...]]:
        """Which output features of ``linear`` reach ``target``, as far as they are moved and not yet computed with.

        Feature numbers are pushed through reshapes, slices, splits and expansions (evaluated on integers, at the traced
        sizes) until something is computed with them.

        Args:
            linear: the linear.
            target: a node that is computed from it.
            scaled: push them through work on single features too: functions, gains, offsets and batch norms.

        Returns:
            Feature numbers, ascending, by the last node that holds them unchanged.
        """
        start = linear.node
        sizes = operators.shape(start)
        values: dict[fx.Node, Any] = {start: torch.arange(sizes[-1]).expand(sizes)}
        found: dict[fx.Node, tuple[int, ...]] = {}
        for node in self.flow.ordered(self.flow.between(start, target)):
            held = [n for n in self.flow.inputs(node) if n in values]
            if not held:
                continue
            if operators.is_movement(node) and len(self.flow.inputs(node)) == 1:
                values[node] = _move(self.flow, node, values)
            elif scaled and self._keeps_features(node):
                values[node] = (values[held[0]],) if _returns_several(node) else values[held[0]]
            else:
                found.update({n: _numbers(values[n]) for n in held if isinstance(values[n], Tensor)})
        if target in values:
            found[target] = _numbers(values[target])
        return found

    def _keeps_features(self, node: fx.Node) -> bool:
        """Whether each feature of a node is computed from the same one of the only activation that it reads."""
        inputs = [n for n in self.flow.inputs(node) if n not in self.flow.constant]
        if len(inputs) != 1:
            return False
        if operators.kind(node) in operators.BATCH_NORMS:
            return True
        return operators.is_pointwise(node) and operators.same_shape(node, inputs[0])

    def sections(self, linear: Linear) -> list[tuple[fx.Node, Linear]]:
        """The values that stand side by side in a linear's input, and the part of the linear that each is read by."""
        joined = linear.input
        while operators.is_reshape(joined) and _keeps_last(self.flow.inputs(joined)[0], joined):
            joined = self.flow.inputs(joined)[0]
        values = joined.args[0] if operators.kind(joined) == operators.CONCATENATE else None
        rank = len(operators.shape(joined))
        if not isinstance(values, list | tuple) or int(operators.argument(joined, 1, "dim", 0)) % rank != rank - 1:
            return []
        if linear.columns is not None:
            return []
        found: list[tuple[fx.Node, Linear]] = []
        start = 0
        for value in values:
            assert isinstance(value, fx.Node)
            stop = start + operators.shape(value)[-1]
            found.append((value, replace(linear, input=value, in_features=stop - start, columns=(start, stop))))
            start = stop
        return found

    def part(self, linear: Linear, target: fx.Node) -> Linear:
        """The linear cut down to the output features that reach ``target``."""
        numbers = sorted({number for held in self.features(linear, target, scaled=True).values() for number in held})
        return self.take(linear, tuple(numbers))

    def numbers(self, linear: Linear) -> tuple[int, ...]:
        """The output features of the stored weight that a (part of a) linear means."""
        if linear.index is not None:
            return linear.index
        return tuple(range(*(linear.rows or (0, linear.out_features))))

    def take(self, linear: Linear, numbers: tuple[int, ...]) -> Linear:
        """The linear cut down to some output features."""
        if not numbers or len(numbers) == linear.out_features:
            return linear
        start, stop = numbers[0], numbers[-1] + 1
        if stop - start == len(numbers):
            return replace(linear, rows=(start, stop), out_features=len(numbers))
        return replace(linear, index=numbers, out_features=len(numbers))


def _operands(node: fx.Node) -> tuple[Any, Any, Any, bool] | None:
    """(x, weight, bias, the weight's last dimension is the input's) of a product, None where it is none."""
    name = operators.kind(node)
    if name == "aten::linear":  # Case 1
        return node.args[0], node.args[1], operators.argument(node, 2, "bias"), True
    if name == "aten::addmm":  # Case 2
        if node.kwargs.get("beta", 1) != 1 or node.kwargs.get("alpha", 1) != 1:
            return None
        return node.args[1], node.args[2], node.args[0], False
    if name in ("aten::mm", "aten::matmul"):
        return node.args[0], node.args[1], None, False
    if name == "aten::einsum":  # Case 3
        tensors = node.args[1]
        if not isinstance(tensors, list | tuple) or len(tensors) != 2:
            return None
        in_last = _contraction(str(node.args[0]).replace(" ", ""))
        return None if in_last is None else (tensors[0], tensors[1], None, in_last)
    return None


def _contraction(equation: str) -> bool | None:
    """Whether ``x, W`` of an einsum sums over W's last dimension; None where it is not a linear in x's last dimension."""
    inputs, _, output = equation.partition("->")
    x, _, weight = inputs.partition(",")
    if len(weight) != 2 or not x or not output or x[-1] not in weight:
        return None
    kept = weight.replace(x[-1], "")
    if len(kept) != 1 or kept in x or output != x[:-1] + kept:
        return None
    return weight[-1] == x[-1]


def _returns_several(node: fx.Node) -> bool:
    return isinstance(node.meta["val"], list | tuple)


def _keeps_last(before: fx.Node, after: fx.Node) -> bool:
    return operators.kind(after) in ("aten::view", "aten::reshape", "aten::_unsafe_view") and (
        operators.shape(before)[-1:] == operators.shape(after)[-1:]
    )


def _numbers(held: Tensor) -> tuple[int, ...]:
    once = held[tuple(slice(1) if stride == 0 else slice(None) for stride in held.stride())]  # without what expand repeats
    return tuple(torch.unique(once).tolist())


def _move(flow: Flow, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    """Evaluate a node that only moves values, on integers."""
    if operators.kind(node) in operators.CASTS:
        return values[next(n for n in node.all_input_nodes if n in values)]

    def read(n: fx.Node) -> Any:
        if n in values:
            return values[n]
        if n.op == "get_attr" and not operators.is_float(n):  # places of an index
            return flow.graph.tensor(str(n.target))
        size = n.meta.get("val")
        return torch.empty(operators.shape(n)) if isinstance(size, Tensor) else operators.hint(size)

    args, kwargs = fx.node.map_arg((node.args, node.kwargs), read)
    name = operators.kind(node)
    if name in ("aten::view", "aten::_unsafe_view", "aten::view_as"):  # integers need not share the original's strides
        sizes = operators.shape(node)
        return values[next(n for n in node.all_input_nodes if n in values)].reshape(sizes)
    return node.target(*args, **kwargs)  # type: ignore[operator]  # a call_function target
