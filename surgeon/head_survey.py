"""The walk from an output projection back to the weights that says what an attention with fewer heads is made of.

:mod:`surgeon.heads` explains it and does what is found here.
"""

from __future__ import annotations

import itertools
import operator
from typing import Any

import torch
from torch import Tensor, fx

from surgeon.accounting import stored_reads
from surgeon.caches import KEPT, PAST
from surgeon.discovery import operators
from surgeon.graph import Graph
from surgeon.head_labels import FILLED, SHARED, SPLITS, UNUSED, absorbed, both, compact, cut, needs, same, shape_of, tensors
from surgeon.head_parts import Part, Places, Times, Trim, Unfit
from surgeon.structure import Attention, Block

aten = torch.ops.aten

_RESHAPED = frozenset({"aten::reshape", "aten::view", "aten::_unsafe_view"})
_SHAPED = FILLED | _RESHAPED | {"aten::expand"}


class Survey:
    """One walk from an output projection back to the weights.

    Attributes:
        edges: labels of a value's elements for the sake of one reader, by (value, reader).
        wanted: values that have such labels.
        parts: what remains of each value that was reached.
        kept: whether what has a label stays, by label.
        active: values that are made from the hidden state or the attention's projections.
        public: values that the graph returns, caches apart.
    """

    def __init__(self, graph: Graph, block: Block, part: Attention, keep: Tensor, units: int) -> None:
        self.graph = graph
        self.inside = set(block.nodes)
        self.edges: dict[tuple[fx.Node, fx.Node], Tensor] = {}
        self.wanted: set[fx.Node] = set()
        self.parts: dict[fx.Node, Part] = {}
        self.kept = torch.zeros(units + 2, dtype=torch.bool)
        self.kept[keep] = True
        self.kept[[SHARED, UNUSED]] = True  # the last two, as Python counts
        self.active = _active(block, part)
        (self.results,) = graph.module.graph.find_nodes(op="output")
        returned: Any = self.results.args[0]
        self.public = {node for node, port in zip(returned, graph.outputs, strict=True) if port.role not in KEPT}

    def need(self, value: fx.Node, reader: fx.Node, labels: Tensor) -> None:
        """Say which heads need the elements of a value for the sake of one reader."""
        known = self.edges.get((value, reader))
        self.edges[value, reader] = compact(labels if known is None else both(known, labels))
        self.wanted.add(value)

    def run(self, product: fx.Node) -> Trim:
        """Walk, and say what changes."""
        node = product
        while (node := node.prev).op != "root":
            if node not in self.wanted:
                continue
            labels = self._settle(node)
            if node in self.inside and node.op == "call_function":
                self._back(node, labels)
        self._join_tensors()
        return self._changes(product)

    # -- one node -------------------------------------------------------------------------------------------------

    def _settle(self, node: fx.Node) -> Tensor:
        """What remains of a value, once all of its readers are known; its labels."""
        shape = shape_of(node)
        shared = torch.full([1] * len(shape), SHARED)
        labels = torch.full([1] * len(shape), UNUSED)
        for user in node.users:
            if (node, user) in self.edges:
                labels = both(labels, self.edges[node, user])
            elif user.op == "call_function" and not isinstance(user.meta.get("val"), Tensor | list | tuple):
                continue  # a size, which is not the number of heads: that is a constant
            elif user is not self.results or node in self.public:
                labels = shared
                break
        outside = node.op == "call_function" and node not in self.inside
        if outside or (node.op == "placeholder" and self._role(node) != PAST):
            labels = shared
        labels = absorbed(compact(labels))
        part = self._part(shape, labels)
        if part is None:
            labels, part = shared, Part(shape, shared == SHARED, shape)
        self.parts[node] = part
        return labels

    def _role(self, node: fx.Node) -> str:
        placeholders = self.graph.module.graph.find_nodes(op="placeholder")
        return self.graph.inputs[placeholders.index(node)].role

    def _part(self, shape: tuple[int, ...], labels: Tensor) -> Part | None:
        """What remains of a value with these labels; None where that is no tensor."""
        mask = compact(self.kept[labels])
        axes = [axis for axis, size in enumerate(mask.shape) if size > 1]
        sizes = list(shape)
        if not axes:
            if not bool(mask):
                if not sizes:
                    return None
                sizes[0] = 0
            return Part(shape, mask, tuple(sizes))
        if len(axes) == 1:  # of a dimension of heads times batches, whose labels repeat, likewise
            sizes[axes[0]] = int(mask.sum())
        elif len(axes) == 2:
            last = axes[1]
            counts = set(mask.sum(last).flatten().tolist())
            if len(counts) > 1:
                return None
            sizes[last] = int(counts.pop())  # as many of each group, perhaps at different places
        else:
            return None
        return Part(shape, mask, tuple(sizes))

    def _back(self, node: fx.Node, labels: Tensor) -> None:
        """Which elements of its operands a node needs; where that is not known it needs all there is, and gives all."""
        found = needs(self.graph, node, labels)
        if found is None:
            values = [value for value in node.all_input_nodes if isinstance(value.meta.get("val"), Tensor | list | tuple)]
            found = {value: same(value, SHARED) for value in values}
            self.parts[node] = _all_of(shape_of(node))
        for value, own in found.items():
            self.need(value, node, own)

    # -- all of them ----------------------------------------------------------------------------------------------

    def _join_tensors(self) -> None:
        """Stored tensors that others read too stay whole."""
        for nodes in stored_reads(self.graph).values():
            parts = [self.parts.get(node) for node in nodes]
            if all(part is None or part.whole for part in parts):
                continue
            masks = [part.mask for part in parts if part is not None]
            same = len({str(node.target) for node in nodes}) == 1 and len(masks) == len(parts)
            if same and all(torch.equal(mask, masks[0]) for mask in masks):
                continue
            for node in nodes:
                shape = operators.shape(node)
                self.parts[node] = Part(shape, torch.ones([1] * len(shape), dtype=torch.bool), shape)

    def _changes(self, product: fx.Node) -> Trim:
        change = Trim(parts={node: part for node, part in self.parts.items() if operators.kind(node) not in SPLITS})
        for (value, reader), labels in self.edges.items():
            if reader is not product and self.parts[reader].gone:
                continue
            self._check_edge(change, value, reader, labels)
        for node, part in self.parts.items():
            if part.gone and node.op == "get_attr":
                change.lost.add(str(node.target))
            if part.gone or (part.whole and not any(self._shrinks(source) for source in node.all_input_nodes)):
                continue
            if node.op == "get_attr":
                change.tensors[str(node.target)] = part
            elif node.op == "placeholder":
                change.caches[node] = part
            else:
                try:
                    new = self._arguments(change, node, part)
                except Unfit as error:
                    raise Unfit(f"{error} ({node.name}, {operators.kind(node)})") from None
                if new is not None:
                    change.arguments[node] = new
        return change

    def _shrinks(self, node: fx.Node) -> bool:
        return node in self.parts and not self.parts[node].whole

    def _check_edge(self, change: Trim, value: fx.Node, reader: fx.Node, labels: Tensor) -> None:
        """Select the kept heads where a value stays whole for others, or refuse."""
        part = self.parts[value]
        needed = torch.where(labels == UNUSED, part.mask, self.kept[labels])
        if bool((needed == part.mask).all()):
            return
        needed = compact(needed)
        axes = [axis for axis, size in enumerate(needed.shape) if size > 1]
        if operators.kind(reader) == operators.CONCATENATE and not axes:
            return  # heads that go are left out of it
        cache = value.op == "placeholder" and self._role(value) == PAST
        if cache or value in self.active or (value.op == "get_attr" and self._is_matrix(value, reader)):
            raise Unfit(self._mixed(value, reader))
        if not part.whole or len(axes) != 1:
            raise Unfit(f"{value.name}, which {reader.name} reads, has no dimension of heads")
        change.selections[value, reader] = (axes[0], needed.flatten().nonzero().flatten())

    def _mixed(self, value: fx.Node, reader: fx.Node) -> str:
        if value.op == "get_attr":
            return f"its weight {value.target} is read by other parts of the model too"
        if any(operators.kind(source) == operators.DEQUANTIZE for source in (value, *value.all_input_nodes)):
            return f"a weight is quantized ({value.name})"
        others = [
            user for user in value.users
            if (value, user) not in self.edges or bool((self.edges[value, user] == SHARED).all())
        ]  # fmt: skip
        if others:
            listed = ", ".join(f"{user.name} ({operators.kind(user)})" for user in others[:3])
            return f"{value.name}, which {reader.name} reads, is needed for all heads together by {listed}"
        return f"{value.name} ({operators.kind(value)}), which {reader.name} reads, is not made head by head"

    def _is_matrix(self, value: fx.Node, reader: fx.Node) -> bool:
        """Whether a stored tensor is the weight or bias of a product."""
        return operators.kind(reader) in operators.PRODUCTS or any(
            operators.kind(user) in operators.PRODUCTS for user in reader.users
        )

    # -- constants ------------------------------------------------------------------------------------------------

    def _arguments(self, change: Trim, node: fx.Node, part: Part) -> tuple[Any, tuple[Any, ...]] | None:
        """Operator and arguments of a node between trimmed values, None where they stay."""
        kind = operators.kind(node)
        args: list[Any] = list(node.args)
        source = args[0] if args and isinstance(args[0], fx.Node) else None
        before = self._read(change, source, node) if source is not None else None
        if kind in _SHAPED:
            position = next(i for i, argument in enumerate(args) if isinstance(argument, list | tuple))
            args[position] = self._sizes(args[position], part, kind in _RESHAPED)
        elif kind == "aten::repeat" and before is not None:
            ahead = len(part.sizes) - len(before.sizes)
            args[1] = [size // (before.sizes[i - ahead] if i >= ahead else 1) for i, size in enumerate(part.sizes)]
        elif kind == "aten::repeat_interleave" and before is not None:
            axis = int(operators.argument(node, 2, "dim")) % len(part.sizes)
            if not isinstance(args[1], int) or node.kwargs.get("output_size") is not None:
                raise Unfit("how often it repeats is no number")
            args[1] = part.sizes[axis] // before.sizes[axis]
        elif kind == "aten::slice" and before is not None:
            self._slice(node, args, before)
        elif kind == "aten::select" and before is not None:
            axis = args[1] % len(before.shape)
            if before.sizes[axis] != before.shape[axis]:
                args[2] = before.before(axis, args[2] % before.shape[axis])
        elif kind == operators.GETITEM and before is not None and operators.kind(args[0]) == "aten::unbind":
            args[1] = before.before(cut(args[0])[0], args[1])
        elif kind == operators.INDEX and before is not None:
            args[1] = [self._moved(node, before, axis, place) for axis, place in enumerate(args[1])]
        elif kind == "aten::slice_scatter" and before is not None:
            axis = int(operators.argument(node, 2, "dim", 0)) % len(before.shape)
            if before.sizes[axis] != before.shape[axis]:
                raise Unfit("heads are put beside others")
        elif kind in SPLITS:
            return self._split(node, part)
        elif kind == operators.CONCATENATE:
            args[0] = [value for value in args[0] if not (value in self.parts and self.parts[value].gone)]
        elif kind in ("aten::roll", "aten::flip") and before is not None:
            if any(size > 1 for size in before.mask.shape):
                raise Unfit("heads change places")
        elif operators.is_pointwise(node):
            self._fits(change, node, part)
        if any(value in self.parts and self.parts[value].gone for value in _nodes(args)):
            raise Unfit("it reads a head that goes")
        return None if tuple(args) == node.args else (node.target, tuple(args))

    def _sizes(self, sizes: Any, part: Part, reshaped: bool) -> list[Any]:
        ahead = len(sizes) - len(part.shape)
        found = list(sizes)
        for axis, (old, new) in enumerate(zip(part.shape, part.sizes, strict=True), ahead):
            if old == new or (isinstance(found[axis], int) and found[axis] == -1):
                continue
            if isinstance(found[axis], int):
                found[axis] = new
            elif reshaped and not any(isinstance(size, int) and size == -1 for size in found):
                found[axis] = -1  # of heads and of batches, which are no constant
            elif (factor := _factor(found[axis])) is not None and factor[1] * new % old == 0:
                found[axis] = Times(factor[0], factor[1] * new // old)
            else:
                raise Unfit(f"the number of heads is {found[axis]}, which is no constant")
        return found

    def _slice(self, node: fx.Node, args: list[Any], before: Part) -> None:
        axis = int(operators.argument(node, 1, "dim", 0)) % len(before.shape)
        if before.sizes[axis] == before.shape[axis]:
            return
        start, end = operators.argument(node, 2, "start"), operators.argument(node, 3, "end")
        if operators.argument(node, 4, "step", 1) != 1 or isinstance(start, fx.Node) or isinstance(end, fx.Node) or node.kwargs:
            raise Unfit("some heads are cut out by places that are no constants")
        first, last, _ = slice(start, end).indices(before.shape[axis])
        args[1:] = [axis, before.before(axis, first), before.before(axis, last)]

    def _moved(self, node: fx.Node, before: Part, axis: int, place: fx.Node | None) -> Any:
        """Stored places along a dimension, as they are numbered without those that go."""
        if place is None or before.sizes[axis] == before.shape[axis]:
            return place
        numbers = self.graph.tensor(str(place.target)) % before.shape[axis]
        moved = torch.tensor([before.before(axis, number) for number in numbers.flatten().tolist()], dtype=numbers.dtype)
        return Places(f"{node.name}_places", moved.reshape(numbers.shape))

    def _split(self, node: fx.Node, part: Part) -> tuple[Any, tuple[Any, ...]] | None:
        axis, widths = cut(node)
        if part.sizes[axis] == part.shape[axis]:
            return None
        if operators.kind(node) == "aten::unbind":
            return None  # its results are numbered anew
        ends = [part.before(axis, sum(widths[:number])) for number in range(len(widths) + 1)]
        sizes = [end - start for start, end in itertools.pairwise(ends)]
        return aten.split_with_sizes.default, (node.args[0], sizes, axis)

    def _read(self, change: Trim, value: fx.Node, node: fx.Node) -> Part:
        """What a node reads of a value."""
        shape = shape_of(value)
        part = self.parts.get(value)
        if part is None or (value, node) not in self.edges:
            return Part(shape, torch.ones([1] * len(shape), dtype=torch.bool), shape)
        if (value, node) in change.selections:
            axis, places = change.selections[value, node]
            mask = torch.zeros(shape[axis], dtype=torch.bool)
            mask[places] = True
            sizes = (*shape[:axis], len(places), *shape[axis + 1 :])
            return Part(shape, mask.reshape([-1 if i == axis else 1 for i in range(len(shape))]), sizes)
        return part

    def _fits(self, change: Trim, node: fx.Node, part: Part) -> None:
        """Operands still broadcast: none has a dimension that shrinks in the result and not in itself."""
        for value in tensors(node):
            sizes = self._read(change, value, node).sizes
            ahead = len(part.sizes) - len(sizes)
            if any(size not in (1, part.sizes[axis + ahead]) for axis, size in enumerate(sizes)):
                raise Unfit(f"{value.name}, which it reads, says something for each member of every group alike")


def _active(block: Block, part: Attention) -> set[fx.Node]:
    """Nodes of a block that are computed from its hidden state, or from projections of the attention."""
    found = {linear.node for linear in (part.q, part.k, part.v) if linear is not None}
    for node in block.nodes:
        if node.op == "call_function" and isinstance(operators.value(node), Tensor):
            if any(source is block.entry or source in found for source in node.all_input_nodes):
                found.add(node)
    return found


def _nodes(arguments: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg(arguments, found.append)
    return found


def _factor(size: fx.Node) -> tuple[fx.Node, int] | None:
    """A symbolic size and the number that it is multiplied by."""
    if size.target is not operator.mul:
        return None
    symbols = [argument for argument in size.args if isinstance(argument, fx.Node)]
    numbers = [argument for argument in size.args if isinstance(argument, int)]
    return (symbols[0], numbers[0]) if len(symbols) == len(numbers) == 1 else None


def _all_of(shape: tuple[int, ...]) -> Part:
    return Part(shape, torch.ones([1] * len(shape), dtype=torch.bool), shape)
