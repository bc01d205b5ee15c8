"""What a rotation of a residual stream does to every tensor with a dimension of channels, or why it cannot be rotated.

    x' = P x with P = s U^T, s = sqrt(K / H); U [H, K] has orthonormal columns.

Every value with channels is one of two things, found operator by operator in the order in which they are computed:

    of the stream: x, sums of it, everything that writes to it.  The stored tensor that it is made with becomes P W.
    a norm's result: ``g n + b`` with n = x / rms(x), or (x - mean(x)) / std(x); g and b are stored vectors.  As
    rms(P x) = rms(x) where no energy is lost, n' = P n.  Its readers are products, ``W (g n + b)``, which become
    ``(W diag(g) U / s) n' + W b``: the gain becomes 1, the offset 0, and what the offset gave goes into the bias.

A norm without gain and offset is of the stream as well: n' = P n.  Everything else is refused: a gain cannot be rotated.
Where norms subtract the mean, U maps to channels that sum to 0 (:func:`surgeon.numerics.principal_basis`), and P leaves out the
mean of x: no norm sees it, and nothing else reads x.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, fx

from surgeon.channel_axes import PRODUCTS, Channels, Unfit, is_stored, named, operands
from surgeon.channel_norms import Norm
from surgeon.discovery import operators
from surgeon.graph import Graph
from surgeon.head_labels import FILLED
from surgeon.resizing import constant_value


@dataclass(frozen=True)
class Normed:
    """The result of a norm, ``gain n + offset``; None for 1 and for 0.  [H] in float64."""

    norm: Norm
    gain: Tensor | None = None
    offset: Tensor | None = None


@dataclass(frozen=True)
class Use:
    """One use of a stored tensor.

    Attributes:
        leaf: the ``get_attr`` node.
        reader: the node that reads it.
        axis: its dimension of channels, from the end.
        role: ``write`` (P W), ``read`` (W diag(g) U / s), ``gain`` (becomes 1) or ``offset`` (becomes 0).
        normed: what is read, of role ``read``; None for the others.
        plus: of role ``gain``, the number that the graph adds to the stored one.
    """

    leaf: fx.Node
    reader: fx.Node
    axis: int
    role: str
    normed: Normed | None = None
    plus: float = 0.0


@dataclass(frozen=True)
class Shift:
    """A constant that a product gives in place of the offset that its input loses.

    Attributes:
        product: a linear, a matrix product or experts.
        bias: its bias, or None.
        weight: its weight, as the product reads it.
        amount: [out], or [experts, out].
    """

    product: fx.Node
    bias: fx.Node | None
    weight: fx.Node
    amount: Tensor


@dataclass
class Rotation:
    """Everything that a rotation changes.

    Attributes:
        centred: the norms subtract the mean.
        uses: uses of stored tensors.
        shifts: biases that change.
        unscaled: norms whose result is of the stream as well, so that it has no factor of its own.
    """

    centred: bool
    uses: list[Use] = field(default_factory=list)
    shifts: list[Shift] = field(default_factory=list)
    unscaled: set[fx.Node] = field(default_factory=set)


def rotation(graph: Graph, channels: Channels) -> Rotation:
    """What a rotation of a stream changes.

    Raises:
        Unfit: it cannot be rotated; names the node.
    """
    kinds = {norm.centred for norm in channels.norms.values()}
    if len(kinds) > 1:
        centred = next(norm.node for norm in channels.norms.values() if norm.centred)
        raise Unfit(f"{named(centred)} subtracts the mean, and other norms of the stream do not")
    if not kinds:
        raise Unfit("no norm reads the stream")
    return _Bases(graph, channels, kinds == {True}).run()


_LINEAR = frozenset({operators.INDEX, "aten::index_select", "aten::mean"})
"""Linear in values with channels, and giving a constant where all of them are the same."""

Meaning = Normed | None
"""Of a value with channels that is not stored: a norm's result, or None for the stream."""


class _Bases:
    def __init__(self, graph: Graph, channels: Channels, centred: bool) -> None:
        self.graph = graph
        self.channels = channels
        self.found = Rotation(centred)
        self.meaning: dict[fx.Node, Meaning] = {}

    def run(self) -> Rotation:
        for node in self.graph.module.graph.nodes:
            touched = node in self.channels.axes or any(map(self.channels.has, node.all_input_nodes))
            if touched and node.op == "call_function" and not self._leaf_only(node):
                self._visit(node)
        covered = {(use.leaf, use.reader) for use in self.found.uses}
        for leaf in self.channels.stored:
            for reader in leaf.users:
                if (leaf, reader) not in covered and not self._to_nowhere(reader):
                    raise Unfit(f"{named(leaf)}, which {named(reader)} reads, is not known to be of the stream or a norm's")
        return self.found

    def _to_nowhere(self, node: fx.Node) -> bool:
        return operators.kind(node) == "aten::sym_size"

    def _leaf_only(self, node: fx.Node) -> bool:
        """Whether a node is a stored tensor in another shape, which has its meaning from what reads it."""
        return node in self.channels.axes and is_stored(node) and self._leaf(node) is not None

    # -- stored tensors -------------------------------------------------------------------------------------------

    def _leaf(self, node: Any) -> tuple[fx.Node, fx.Node | None, float] | None:
        """The stored tensor that a value is but for its shape, type and a number added; the node that reads it; the number."""
        reader, plus = None, 0.0
        while isinstance(node, fx.Node) and node.op != "get_attr":
            kind, source = operators.kind(node), node.args[0] if node.args else None
            if kind == operators.ADD and not node.kwargs and isinstance(node.args[1], int | float):
                plus += node.args[1]
            elif not operators.is_movement(node) or not self.channels.has(source):
                return None
            reader, node = node, source
        return (node, reader, plus) if self.channels.has(node) else None

    def _use(self, value: Any, consumer: fx.Node, role: str, normed: Normed | None = None) -> None:
        """Note what becomes of the stored tensor that an operand is."""
        if not isinstance(value, fx.Node):
            return
        leaf = self._leaf(value)
        if leaf is None:
            raise Unfit(f"{named(value)}, which {named(consumer)} reads, is computed from stored tensors in a way not known")
        node, reader, plus = leaf
        if plus and role != "gain":
            raise Unfit(f"{named(value)}, which {named(consumer)} reads, has a number added")
        self.found.uses.append(Use(node, reader or consumer, self.channels.axes[node], role, normed, plus))

    def _vector(self, value: fx.Node, consumer: fx.Node) -> Tensor:
        """A stored vector of channels, [H] in float64."""
        vector = constant_value(self.graph, value)
        if vector is None or vector.numel() != self.channels.width:
            raise Unfit(f"{named(value)}, which {named(consumer)} reads, is no vector of channels")
        return vector.detach().double().flatten()

    # -- calls ----------------------------------------------------------------------------------------------------

    def _visit(self, node: fx.Node) -> None:
        kind = operators.kind(node)
        if any(node in norm.inside for norm in self.channels.norms.values()) or kind == "aten::sym_size":
            return
        if node in self.channels.norms:
            self._norm(self.channels.norms[node])
        elif kind in PRODUCTS:
            x, weight, bias, axis = operands(node)
            self._product(node, x, weight, bias, weight, bias, axis)
        elif kind == operators.MOE:
            x, w_in, w_out, b_in, b_out = (
                operators.argument(node, i, key)
                for i, key in ((0, "x"), (3, "w_in"), (4, "w_out"), (5, "b_in"), (6, "b_out"))
            )
            self._product(node, x, w_in, b_in, w_out, b_out, -1)
        elif kind == "aten::embedding":
            self._writes(node, node.args[0], None)
        elif kind in operators.CONVOLUTIONS:
            self._writes(node, *(operators.argument(node, i, key) for i, key in ((1, "weight"), (2, "bias"))))
        elif kind in ("aten::add", "aten::sub"):
            self._sum(node)
        elif kind in ("aten::mul", "aten::div"):
            self._scaled(node)
        elif kind in (operators.CONCATENATE, operators.PUT):
            values: Any = node.args[0] if kind == operators.CONCATENATE else [node.args[0], node.args[2]]
            for value in values:
                self._into_stream(value, node)
            self.meaning[node] = None
        elif operators.is_movement(node) or kind in _LINEAR:
            self.meaning[node] = self._moved(node)
        elif kind in FILLED and not self._fills_with_other_than_zero(node):
            self.meaning[node] = None
        else:
            raise Unfit(f"{named(node)} works on single channels")

    def _of(self, value: Any) -> Meaning:
        return self.meaning[value]

    def _moved(self, node: fx.Node) -> Meaning:
        source = node.args[0]
        if isinstance(source, fx.Node) and self._leaf(source) is not None:  # rows of a table, chosen by the input
            self._use(source, node, "write")
            return None
        return self._of(source)

    def _norm(self, norm: Norm) -> None:
        self._into_stream(norm.input, norm.node)
        gain = offset = None
        if norm.gain is not None:
            gain = self._vector(norm.gain, norm.node)
            self._use(norm.gain, norm.node, "gain")
        if norm.offset is not None:
            offset = self._vector(norm.offset, norm.node)
            self._use(norm.offset, norm.node, "offset")
        self.meaning[norm.node] = Normed(norm, gain, offset)

    def _into_stream(self, value: Any, node: fx.Node) -> None:
        """Take an operand to be of the stream, or refuse it."""
        if self._leaf(value) is not None:
            self._use(value, node, "write")
            return
        normed = self._of(value)
        if normed is None:
            return
        if normed.gain is not None or normed.offset is not None:
            raise Unfit(
                f"{named(node)} takes the result of the norm {named(normed.norm.node)} into the stream, whose gain works on "
                "single channels (a norm behind a sublayer, or behind the embedding)"
            )
        self.found.unscaled.add(normed.norm.node)

    def _product(
        self, node: fx.Node, x: Any, weight: Any, bias: Any, w_out: Any, b_out: Any, axis: int
    ) -> None:
        if self.channels.has(x):
            if self._leaf(x) is not None:
                raise Unfit(f"{named(node)} reads {named(x)}, a stored tensor")
            normed = self._of(x)
            if normed is None:
                raise Unfit(f"{named(node)} reads the stream without a norm in front")
            self._use(weight, node, "read", normed)
            if normed is not None and normed.offset is not None and bool(normed.offset.any()):
                matrix = constant_value(self.graph, weight)
                assert matrix is not None
                amount = matrix.detach().double().movedim(axis, -1) @ normed.offset
                self.found.shifts.append(Shift(node, bias, weight, amount))
        if node in self.channels.axes:
            self._writes(node, w_out, b_out)

    def _writes(self, node: fx.Node, weight: Any, bias: Any) -> None:
        self._use(weight, node, "write")
        self._use(bias, node, "write")
        self.meaning[node] = None

    def _sum(self, node: fx.Node) -> None:
        first, second = node.args[:2]
        if not (self.channels.has(first) and self.channels.has(second)):
            raise Unfit(f"{named(node)} adds a number to every channel")
        stored = [value for value in (first, second) if self._leaf(value) is not None]
        others = [value for value in (first, second) if value not in stored]
        normed = self._of(others[0]) if others and len(stored) == 1 else None
        if normed is not None and operators.kind(node) == operators.ADD and not node.kwargs:
            (vector,) = stored
            shift = self._vector(vector, node)  # type: ignore[arg-type]  # a node
            self._use(vector, node, "offset")
            self.meaning[node] = replace(normed, offset=shift if normed.offset is None else normed.offset + shift)
            return
        for value in (first, second):
            self._into_stream(value, node)
        self.meaning[node] = None

    def _scaled(self, node: fx.Node) -> None:
        first, second = node.args[:2]
        factor, value = (first, second) if self.channels.has(second) and not self.channels.has(first) else (second, first)
        if not self.channels.has(factor):  # a number for all channels
            if self.channels.has(second) and operators.kind(node) == "aten::div":
                raise Unfit(f"{named(node)} divides by single channels")
            self.meaning[node] = self._times(node, value, factor)
            return
        stored = [value for value in (first, second) if self._leaf(value) is not None]
        (value, *more) = [value for value in (first, second) if value not in stored] or [None]
        normed = self.meaning.get(value) if not more and isinstance(value, fx.Node) else None
        if normed is None or len(stored) != 1 or operators.kind(node) != "aten::mul":
            raise Unfit(f"{named(node)} multiplies the stream channel by channel")
        gain = self._vector(stored[0], node)  # type: ignore[arg-type]  # a node
        self._use(stored[0], node, "gain")
        self.meaning[node] = Normed(
            normed.norm,
            gain if normed.gain is None else normed.gain * gain,
            None if normed.offset is None else normed.offset * gain,
        )

    def _times(self, node: fx.Node, value: Any, factor: Any) -> Meaning:
        """A value times what is the same for all channels."""
        if self._leaf(value) is not None:
            self._use(value, node, "write")
            return None
        normed = self._of(value)
        if normed is None or (normed.gain is None and normed.offset is None):
            return normed
        if normed.offset is None:
            return normed  # the factor stays in the graph, in front of the product that the gain goes into
        if not isinstance(factor, int | float):
            raise Unfit(f"{named(node)} multiplies the result of a norm with an offset by {named(factor)}")
        by = factor if operators.kind(node) == "aten::mul" else 1 / factor
        return replace(normed, offset=normed.offset * by)

    def _fills_with_other_than_zero(self, node: fx.Node) -> bool:
        kind = operators.kind(node)
        value: Any = node.args[2] if kind == "aten::new_full" else node.args[1] if kind == "aten::full" else 0
        return kind.endswith(("ones", "empty")) or value != 0

