"""Where the channels of a residual stream stand: which dimension of which value, found by walking along the graph.

From the tensors of the stream the walk goes on in both directions, through everything that keeps the channels apart: sums,
casts, reshapes of other dimensions, norms.  It ends at what reads them (``x W^T`` over the channels, experts) and at what
makes them (rows of a weight, look-up tables), whose stored tensors have a dimension of channels too.  Each operator has a
rule; one that touches the channels and has none is an error that names it, so nothing is cut that was not understood.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from surgeon.channel_norms import Norm, find_norms
from surgeon.discovery import operators
from surgeon.head_labels import FILLED
from surgeon.structure import Stream, Structure

_MOVES = operators.RESHAPES | operators.REPETITIONS | {f"aten::{name}" for name in "slice select narrow flip roll".split()}
PRODUCTS = frozenset({"aten::linear", "aten::addmm", "aten::mm", "aten::matmul"})
_PACKED = frozenset({operators.DEQUANTIZE, operators.FAKE_QUANTIZE})
_LIKE = frozenset(f"aten::{name}_like" for name in "full zeros ones empty".split())


class Unfit(Exception):
    """The channels of a stream cannot be removed, or not rotated; says at which node and why."""


@dataclass
class Channels:
    """The channels of one residual stream, or of several that share a weight.

    Attributes:
        label: the stream's.
        width: how many channels there are.
        axes: the dimension of channels of every value that has one, from its end.
        norms: the normalisations over channels, by the node that gives the normalised value.
        streams: labels of all streams that have these channels.
    """

    label: str
    width: int
    axes: dict[fx.Node, int] = field(default_factory=dict)
    norms: dict[fx.Node, Norm] = field(default_factory=dict)
    streams: tuple[str, ...] = ()

    @property
    def stored(self) -> list[fx.Node]:
        """Nodes that read a stored tensor with a dimension of channels."""
        return [node for node in self.axes if node.op == "get_attr"]

    def has(self, node: Any) -> bool:
        """Whether a node's value has a dimension of channels."""
        return isinstance(node, fx.Node) and node in self.axes


def find_channels(structure: Structure) -> Iterator[tuple[str, Channels | Unfit]]:
    """The channels of every stream; of streams that share theirs once, under the first one's label."""
    done: list[Channels] = []
    for stream in structure.streams:
        if any(found.has(stream.blocks[0].entry) for found in done):
            continue
        try:
            channels = _Walk(stream).run()
        except Unfit as error:
            yield stream.label, error
            continue
        channels.streams = tuple(other.label for other in structure.streams if channels.has(other.blocks[0].entry))
        done.append(channels)
        yield stream.label, channels


class _Walk:
    def __init__(self, stream: Stream) -> None:
        self.starts = [(cut, block.features) for block in stream.blocks for cut in (block.entry, block.exit)]
        first, axis = self.starts[0]
        self.found = Channels(stream.label, operators.shape(first)[axis])
        nodes = stream.cuts[0].graph
        norms = find_norms(nodes)
        self.norms = {norm.node: norm for norm in norms}
        self.inside = {part: norm for norm in norms for part in norm.inside}
        self.names: dict[str, list[fx.Node]] = {}
        for node in nodes.find_nodes(op="get_attr"):
            self.names.setdefault(str(node.target), []).append(node)
        self.waiting: list[fx.Node] = []

    def run(self) -> Channels:
        for cut, axis in self.starts:
            self.mark(cut, axis)
        while self.waiting:
            node = self.waiting.pop()
            self._relate(node)
            for user in node.users:
                self._relate(user)
        for node in self.found.axes:  # once more with all that is known
            for call in (node, *node.users):
                self._relate(call)
        self.found.norms = {node: norm for node, norm in self.norms.items() if node in self.found.axes}
        return self.found

    def mark(self, node: Any, axis: int) -> None:
        """Say that a value has the channels along a dimension, counted from its end."""
        if not isinstance(node, fx.Node):
            return
        shape, known = operators.shape(node), self.found.axes.get(node)
        if known == axis:
            return
        if known is not None:
            raise Unfit(f"{named(node)} has the stream's channels along two dimensions")
        if len(shape) < -axis or shape[axis] != self.found.width:
            raise Unfit(
                f"{named(node)} of shape {list(shape)} is of the stream, which has {self.found.width} channels elsewhere, in "
                f"its dimension {axis}"
            )
        self.found.axes[node] = axis
        self.waiting.append(node)
        for other in self.names.get(str(node.target), ()) if node.op == "get_attr" else ():
            self.mark(other, axis)

    def _relate(self, node: fx.Node) -> None:
        """Mark what a call that touches the channels has them in."""
        if node.op == "get_attr" or node in self.inside:
            norm = self.inside.get(node)
            if norm is not None and node in self.found.axes:
                raise Unfit(f"{named(node)} inside of a norm goes elsewhere too")
            if norm is not None and self.has(norm.input):
                self.mark(norm.node, -1)
            return
        if node.op == "output":
            read = next(source for source in node.all_input_nodes if self.has(source))
            raise Unfit(f"the model returns {named(read)}, whose channels would change")
        if node.op == "placeholder":
            raise Unfit(f"input {node.name} is added to the stream, and its channels would have to change too")
        rule = self._rule(node)
        if rule is None:
            raise self._unknown(node)
        rule(node)

    def has(self, node: Any) -> bool:
        return self.found.has(node)

    def _axis(self, node: Any) -> int | None:
        return self.found.axes.get(node) if isinstance(node, fx.Node) else None

    def _unknown(self, node: fx.Node) -> Unfit:
        kind = operators.kind(node)
        if kind in _PACKED:
            return Unfit(f"{named(node)}: weights or activations are quantized already; put this pass before quantize")
        read = ", ".join(source.name for source in node.all_input_nodes if self.has(source))
        does = f"reads the stream's channels ({read})" if read else "makes the stream's channels"
        return Unfit(f"{named(node)} {does}, and is no sum, norm or product with a weight")

    # -- rules ----------------------------------------------------------------------------------------------------

    def _rule(self, node: fx.Node) -> Callable[[fx.Node], None] | None:
        kind = operators.kind(node)
        if node in self.norms:
            return self._norm
        if kind in PRODUCTS:
            return self._product
        named = {
            operators.MOE: self._moe, "aten::embedding": self._embedding, operators.CONCATENATE: self._concatenate,
            operators.INDEX: self._index, operators.PUT: self._put, "aten::index_select": self._select,
            "aten::sym_size": self._size, "aten::mean": self._mean,
        }  # fmt: skip
        if kind in named:
            return named[kind]
        if kind in operators.CONVOLUTIONS and "transpose" not in kind:
            return self._convolution
        if kind in _MOVES:
            return self._move
        if kind in FILLED:
            return self._filled
        if operators.is_pointwise(node) or kind in operators.CASTS or kind in _LIKE:
            return self._pointwise
        return None

    def _pointwise(self, node: fx.Node) -> None:
        values = [v for v in (node, *node.all_input_nodes) if isinstance(v.meta.get("val"), Tensor)]
        axis = next(self.found.axes[value] for value in values if self.has(value))
        for value in values:
            shape = operators.shape(value)
            if self.has(value) or (len(shape) >= -axis and shape[axis] == self.found.width):
                self.mark(value, axis)
            elif len(shape) >= -axis and shape[axis] != 1:
                raise self._unknown(node)

    def _norm(self, node: fx.Node) -> None:
        norm = self.norms[node]
        touched = [value for value in (node, norm.input, norm.gain, norm.offset) if self.has(value)]
        if any(self._axis(value) != -1 for value in touched):
            raise Unfit(f"{named(node)} normalises over another dimension than that of the channels")
        for value in (node, norm.input, norm.gain, norm.offset) if touched else ():
            self.mark(value, -1)

    def _product(self, node: fx.Node) -> None:
        x, weight, bias, reads = operands(node)
        makes = -3 - reads
        assert isinstance(x, fx.Node)
        assert isinstance(weight, fx.Node)
        scaled = any(node.kwargs.get(name, 1) != 1 for name in ("alpha", "beta"))
        if not is_stored(weight) or len(operators.shape(weight)) != 2 or scaled:
            raise self._unknown(node)
        along = self._axis(weight)
        if self.has(x) or along == reads:
            self._last(x, node)
            self.mark(weight, reads)
        if self.has(node) or self.has(bias) or along == makes:
            self._last(node, node)
            self.mark(weight, makes)
            self.mark(bias, -1)

    def _last(self, value: fx.Node, node: fx.Node) -> None:
        if self._axis(value) not in (None, -1):
            raise self._unknown(node)
        self.mark(value, -1)

    def _moe(self, node: fx.Node) -> None:
        x, w_in, w_out = (operators.argument(node, i, key) for i, key in ((0, "x"), (3, "w_in"), (4, "w_out")))
        b_out = operators.argument(node, 6, "b_out")
        if not is_stored(w_in) or not is_stored(w_out) or any(self.has(node.args[i]) for i in (1, 2)):
            raise self._unknown(node)
        if self.has(x) or self._axis(w_in) == -1:
            self._last(x, node)
            self.mark(w_in, -1)
        if self.has(node) or self.has(b_out) or self._axis(w_out) == -2:
            self._last(node, node)
            self.mark(w_out, -2)
            self.mark(b_out, -1)

    def _embedding(self, node: fx.Node) -> None:
        table: Any = node.args[0]
        if not is_stored(table):
            raise self._unknown(node)
        self._last(node, node)
        self.mark(table, -1)

    def _convolution(self, node: fx.Node) -> None:
        x, weight, bias = (operators.argument(node, i, key) for i, key in enumerate(("input", "weight", "bias")))
        if self.has(x) or not is_stored(weight) or any(
            self._axis(value) not in (None, -len(operators.shape(value)) + place) for value, place in ((node, 1), (weight, 0))
        ):
            raise self._unknown(node)
        self.mark(node, 1 - len(operators.shape(node)))
        self.mark(weight, -len(operators.shape(weight)))
        self.mark(bias, -1)

    def _concatenate(self, node: fx.Node) -> None:
        values: Any = node.args[0]
        rank = len(operators.shape(node))
        axis = next(self.found.axes[value] for value in (node, *values) if self.has(value))
        if int(operators.argument(node, 1, "dim", 0)) % rank == rank + axis:
            raise self._unknown(node)
        for value in (node, *values):
            self.mark(value, axis)

    def _index(self, node: fx.Node) -> None:
        places: Any = node.args[1]
        source: Any = node.args[0]
        if any(self.has(place) for place in places) or len(places) >= len(operators.shape(source)):
            raise self._unknown(node)
        self._last(source, node)
        self._last(node, node)

    def _put(self, node: fx.Node) -> None:
        source, places, values = node.args[:3]
        assert isinstance(source, fx.Node)
        if len(places) >= len(operators.shape(source)) or not isinstance(values, fx.Node):  # type: ignore[arg-type]  # a list
            raise self._unknown(node)
        for value in (source, values, node):
            self._last(value, node)

    def _select(self, node: fx.Node) -> None:
        source, dim = node.args[:2]
        assert isinstance(source, fx.Node)
        rank = len(operators.shape(source))
        axis = next(self.found.axes[value] for value in (source, node) if self.has(value))
        if int(dim) % rank == rank + axis:  # type: ignore[arg-type]  # a number
            raise self._unknown(node)
        self.mark(source, axis)
        self.mark(node, axis)

    def _mean(self, node: fx.Node) -> None:
        """Over positions, which leaves the channels apart."""
        source, dims = node.args[:2] if len(node.args) > 1 else (node.args[0], None)
        assert isinstance(source, fx.Node)
        rank = len(operators.shape(source))
        if not isinstance(dims, list | tuple) or any(int(dim) % rank == rank - 1 for dim in dims):  # type: ignore[arg-type]
            raise self._unknown(node)
        self._last(source, node)
        self._last(node, node)

    def _size(self, node: fx.Node) -> None:
        source, dim = node.args[:2]
        axis = self._axis(source)
        if axis is not None and int(dim) % len(operators.shape(source)) == len(operators.shape(source)) + axis:  # type: ignore[arg-type]
            raise self._unknown(node)

    def _filled(self, node: fx.Node) -> None:
        if not self.has(node):  # it has the type of a value of the stream, not its channels
            return

    def _move(self, node: fx.Node) -> None:
        source: Any = node.args[0]
        if self.has(source):
            axis = self._moved(node, source, self.found.axes[source])
            if axis is None:
                raise self._unknown(node)
            self.mark(node, axis)
        elif self.has(node):
            shape = operators.shape(source)
            for before in range(-len(shape), 0):
                if shape[before] == self.found.width and self._moved(node, source, before) == self.found.axes[node]:
                    self.mark(source, before)
                    return
            raise self._unknown(node)

    def _moved(self, node: fx.Node, source: fx.Node, axis: int) -> int | None:
        """The dimension in which a node that moves values has the channels that its operand has in ``axis``."""
        shape, width = operators.shape(source), self.found.width
        numbers = torch.arange(width).reshape([-1] + [1] * (-axis - 1)).expand(shape).contiguous()

        def read(argument: fx.Node) -> Any:
            value = argument.meta["val"]
            if isinstance(value, Tensor):
                return torch.zeros(operators.shape(argument), dtype=value.dtype)
            return operators.hint(value)

        args, kwargs = fx.node.map_arg((node.args[1:], dict(node.kwargs)), read)
        try:
            moved = node.target(numbers, *args, **kwargs)  # type: ignore[operator]  # an operator
        except RuntimeError:
            return None
        for after in range(-moved.dim(), 0):
            wanted = torch.arange(width).reshape([-1] + [1] * (-after - 1))
            if moved.shape[after] == width and bool((moved == wanted).all()):
                return after
        return None


def operands(node: fx.Node) -> tuple[Any, Any, Any, int]:
    """x, weight and bias of a product with a matrix, and the dimension of the weight that is x's, from its end."""
    args: Any = node.args
    kind = operators.kind(node)
    if kind == "aten::linear":
        return args[0], args[1], operators.argument(node, 2, "bias"), -1
    return (args[1], args[2], args[0], -2) if kind == "aten::addmm" else (args[0], args[1], None, -2)


def is_stored(node: Any) -> bool:
    """Whether a value is computed from stored tensors alone."""
    if not isinstance(node, fx.Node) or node.op == "placeholder":
        return False
    if node.op == "get_attr":
        return True
    tensors = [value for value in node.all_input_nodes if isinstance(value.meta.get("val"), Tensor)]
    return bool(tensors) and all(map(is_stored, tensors))


def named(node: fx.Node) -> str:
    """What errors call a node."""
    return f"{node.target}" if node.op == "get_attr" else f"{node.name} ({operators.kind(node)})"
