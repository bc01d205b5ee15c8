"""Caches of a package that are written in place.

A graph returns each past with the new keys or values behind it: a package copies every cache at every step.  Here a past is a
buffer with room for more positions than there are; new ones are written behind the used ones, and whatever read the longer
cache reads the used part of the buffer, where it lies.  A buffer's length says nothing about positions, so all sizes of the
past are taken from the attention mask, which covers past and new ones.

torch compiles the write into the kernel that computes what is written, and does not copy the rest (seen in what versions 2.11
and 2.13 write for the CPU).

On CUDA the number of positions in the past is one more input, a number on the device: what a step launches is then the same for
every length of the text, and can be captured once and repeated.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from surgeon.caches import MASK, PAST, PRESENT, SUM, TOKENS, has_caches, room
from surgeon.contract import Refusal
from surgeon.errors import LowerError
from surgeon.generation import GraphDecoder, empty_cache
from surgeon.graph import Graph, Port
from surgeon.halves import has_halves
from surgeon.ports import InputCheck

aten = torch.ops.aten
ALIGNED = 16
"""Bytes to whose multiples packages for CUDA copy an input that lies elsewhere."""

START = "past_length"
"""Name of the input [1] int64 behind all others of a package for CUDA: how many positions are in the past."""


def refusals(graph: Graph, started: bool = False) -> list[Refusal]:
    """Why the caches of this graph cannot be written in place; ``started`` as in :func:`write_in_place`."""
    if not has_caches(graph.inputs):
        return [Refusal("caches", "the model was traced without caches; build it with task text-generation", lasting=True)]
    if has_halves(graph.inputs):
        reason = "an encoder-decoder: only decoders alone are written with shared caches"
        return [Refusal("caches", reason, lasting=True)]
    shapes = {port.name: port.shape for port in graph.inputs if port.role != PAST}
    found = []
    if len(shapes.get(TOKENS, ())) != 2 or shapes.get(MASK, ("",))[-1] != f"{PAST}{SUM}{shapes.get(TOKENS, ('',))[-1]}":
        listed = ", ".join(sorted(shapes))
        found.append(Refusal("caches", f"needs {TOKENS} and an {MASK} over past and new ones, found {listed}", True))
    found += [Refusal(port.name, reason) for port, _, _, reason in _caches(graph) if reason]
    return found + [Refusal(node.name, reason) for node, reason in _by_size(graph)] if started and not found else found


def _by_size(graph: Graph) -> list[tuple[fx.Node, str]]:
    """What depends on the number of past positions by the size of a cache, otherwise than adding it to positions."""
    nodes = graph.module.graph
    pasts = {past: port.shape.index(PAST) for port, past, _, _ in _caches(graph)}
    total = _expression(_placed(graph)[MASK].meta["val"].shape[1])
    sizes = [
        node for node in nodes.find_nodes(op="call_function", target=aten.sym_size.int)
        if node.args[0] in pasts and node.args[1] in (axis := pasts[node.args[0]], axis - node.args[0].meta["val"].dim())
    ]  # fmt: skip
    found, seen = [], set(sizes)
    while sizes:
        size = sizes.pop()
        for user in size.users:
            value = user.meta.get("val")
            if not isinstance(value, Tensor):
                if user not in seen and _expression(value) != total:
                    seen.add(user)
                    sizes.append(user)
            elif user.target is not aten.add.Tensor or user.args[1] is not size or user.kwargs:
                found.append((user, f"{user.target} depends on the number of cached positions by the size of a cache"))
    for node in nodes.find_nodes(op="call_function", target=torch.ops.surgeon.attention.default):
        if len(node.args) > 4 and node.args[4]:
            found.append((node, "it hides later positions by the sizes of its inputs; a buffer has another size"))
    return found


def _expression(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size


def _placed(graph: Graph) -> dict[str, fx.Node]:
    """Its inputs by name."""
    return dict(zip((port.name for port in graph.inputs), graph.module.graph.find_nodes(op="placeholder"), strict=True))


def _caches(graph: Graph) -> list[tuple[Port, fx.Node, fx.Node, str]]:
    """Each past with its node, that of its present, and why the latter is not the past with new positions behind it."""
    nodes = graph.module.graph
    results: Any = nodes.output_node().args[0]
    pasts = [pair for pair in zip(graph.inputs, nodes.find_nodes(op="placeholder"), strict=True) if pair[0].role == PAST]
    presents = [node for port, node in zip(graph.outputs, results, strict=True) if port.role == PRESENT]
    return [(port, past, present, _reason(port, past, present)) for (port, past), present in zip(pasts, presents, strict=True)]


def _reason(port: Port, past: fx.Node, present: fx.Node) -> str:
    axis = port.shape.index(PAST)
    parts: Any = present.args[0] if present.target is aten.cat.default else ()
    if len(parts) != 2 or parts[0] is not past or (*present.args[1:], 0)[0] not in (axis, axis - len(port.shape)):
        return "what is returned for this cache is not the cache with new positions behind it"
    others = [user for user in past.users if user is not present and user.target is not aten.sym_size.int]
    return f"it is read by {others[0].name} too, without the new positions" if others else ""


def write_in_place(graph: Graph, started: bool = False) -> None:
    """Let the graph write into its pasts, and return no presents; in place.

    Args:
        graph: one that lowering made for itself and :func:`refusals` accepts.  Its outputs stay listed as they were; its
            example gets buffers with room.
        started: the number of past positions is an input of its own, :data:`START`; the mask may cover more positions than
            past and new ones then, zeros, and all that computes depends on sizes of buffers alone.
    """
    nodes = graph.module.graph
    caches = _caches(graph)
    inputs = _placed(graph)
    with nodes.inserting_after(list(inputs.values())[-1]):
        total = nodes.call_function(aten.sym_size.int, (inputs[MASK], 1))
    with nodes.inserting_after(total):
        new = nodes.call_function(aten.sym_size.int, (inputs[TOKENS], 1))
    with nodes.inserting_after(new):
        length = nodes.call_function(operator.sub, (total, new))
    _hold(nodes, length, operator.ge, 0, f"{MASK} covers fewer positions than {TOKENS} has")
    begin: fx.Node = length
    if started:
        begin = _add_start(graph, inputs)
    for port, past, present, _ in caches:
        axis = port.shape.index(PAST)
        with nodes.inserting_after(length):
            capacity = nodes.call_function(aten.sym_size.int, (past, axis))
        _hold(nodes, capacity, operator.ge, total, f"{port.name} has no room for all positions of {MASK}")
        for user in [user for user in past.users if user is not capacity]:
            if user.target is aten.sym_size.int and user.args[1] in (axis, axis - len(port.shape)):
                for reader in list(user.users):
                    if started and isinstance(reader.meta.get("val"), Tensor):  # it counts positions
                        reader.args = (reader.args[0], begin)
                user.replace_all_uses_with(length)
                nodes.erase_node(user)
        with nodes.inserting_before(present):
            used = nodes.call_function(written, (past, present.args[0][1], begin, total, axis))  # type: ignore[index]
        used.meta = dict(present.meta)
        present.replace_all_uses_with(used)
        nodes.erase_node(present)
        example = graph.example[port.name]
        graph.example[port.name] = grown(example, axis, 2 * graph.example[MASK].shape[1] + 1, example.device)
    results: Any = nodes.output_node().args[0]
    kept = zip(graph.outputs, results, strict=True)
    nodes.output_node().args = (tuple(node for port, node in kept if port.role != PRESENT),)
    nodes.lint()
    graph.module.recompile()


def _add_start(graph: Graph, inputs: Mapping[str, fx.Node]) -> fx.Node:
    """The input that says how many positions are in the past, behind the others."""
    nodes = graph.module.graph
    with nodes.inserting_after(list(inputs.values())[-1]):
        node = nodes.placeholder(START)
    node.meta["val"] = inputs[TOKENS].meta["val"].new_empty((1,))
    graph.inputs = (*graph.inputs, Port(START, torch.int64, (1,)))
    mask, new = graph.example[MASK], graph.example[TOKENS].shape[1]
    graph.example[START] = torch.tensor([mask.shape[1] - new], device=mask.device)
    return node


def _hold(nodes: fx.Graph, size: fx.Node, comparison: Callable[..., Any], bound: fx.Node | int, message: str) -> None:
    """Let the package check a size whenever it is called: it would write beside the buffer otherwise."""
    with nodes.inserting_after(size):
        holds = nodes.call_function(comparison, (size, bound))
    with nodes.inserting_after(holds):
        nodes.call_function(aten._assert_scalar.default, (holds, message))


def written(buffer: Tensor, new: Tensor, past: int | Tensor, total: int, axis: int) -> Tensor:
    """Write new positions behind ``past`` of them into a buffer, and return the ``total`` that are used: a view of it."""
    if isinstance(past, Tensor):
        places = past + torch.arange(new.shape[axis], device=new.device)
        return buffer.index_copy_(axis, places, new).narrow(axis, 0, total)
    torch._check(past >= 0)  # type: ignore[no-untyped-call]
    torch._check(total <= buffer.shape[axis])  # type: ignore[no-untyped-call]
    buffer.narrow(axis, past, total - past).copy_(new)
    return buffer.narrow(axis, 0, total)


# -- running ------------------------------------------------------------------------------------------------------------


class Buffers:
    """The pasts of a package as the caller hands them in, and as the package takes them."""

    def __init__(self, where: object, ports: tuple[Port, ...]) -> None:
        """Args:
        where: what refuses, for the message: the artefact's file.
        ports: its inputs.
        """
        self._where = where
        self._pasts = [(port.name, port.shape.index(PAST)) for port in ports if port.role == PAST]
        renamed = (tuple("capacity" if size == PAST else size for size in port.shape) for port in ports)
        roomy = [replace(port, shape=shape) for port, shape in zip(ports, renamed, strict=True)]
        self._fit = InputCheck(where, roomy).fit

    def fit(self, inputs: Mapping[str, Tensor]) -> bool:
        """Whether all inputs are there, fit, and every past is a buffer with room: a step of a generation."""
        if not self._fit(inputs):
            return False
        total, (name, axis) = inputs[MASK].shape[1], self._pasts[0]
        return inputs[TOKENS].shape[1] <= total <= inputs[name].shape[axis]

    def as_pasts(self, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The inputs with each buffer that has room for the new positions cut to the past that it holds, a view.

        Whatever else does not fit stays as it is, for the check of all inputs to refuse.

        Raises:
            LowerError: a cache is neither as long as the past nor a buffer with room.
        """
        tokens, mask = inputs.get(TOKENS), inputs.get(MASK)
        if not isinstance(tokens, Tensor) or not isinstance(mask, Tensor) or tokens.dim() != 2 or mask.dim() != 2:
            return inputs
        total, new = mask.shape[1], tokens.shape[1]
        if new > total:
            return inputs
        found = dict(inputs)
        for name, axis in self._pasts:
            value = found.get(name)
            if not isinstance(value, Tensor) or value.dim() <= axis or value.shape[axis] == total - new:
                continue
            if value.shape[axis] < total:
                raise LowerError(
                    f"{self._where}: input {name!r} has {value.shape[axis]} positions; {MASK} covers {total}, of which "
                    f"{TOKENS} has {new}: needed the past of {total - new}, or a buffer with room for at least {total}"
                )
            found[name] = value.narrow(axis, 0, total - new)
        return found

    def given(self, inputs: Mapping[str, Tensor], checked: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        """What the package writes into: the caller's buffers themselves, and new ones that hold pasts without room.

        Args:
            inputs: what the caller gave.
            checked: the same behind :meth:`as_pasts` and the check, complete.
            device: the package's.

        Raises:
            LowerError: a buffer cannot be written where it is, or buffers differ in length.
        """
        total = checked[MASK].shape[1]
        found = {}
        for name, axis in self._pasts:
            value = inputs.get(name)
            if value is not None and value.shape[axis] >= total:
                _check_place(self._where, name, value, device)
                found[name] = value
            else:
                found[name] = grown(checked[name], axis, total, device)
        rooms = {found[name].shape[axis]: name for name, axis in self._pasts}
        if len(rooms) > 1:  # the package may have been compiled for buffers that are alike
            listed = ", ".join(f"{name} for {size}" for size, name in rooms.items())
            raise LowerError(f"{self._where}: buffers of caches must have room for one number of positions, found {listed}")
        return found

    def behind_a_past(self, inputs: Mapping[str, Tensor]) -> bool:
        """Whether these inputs hold pasts of at least one position."""
        return all(name in inputs and inputs[name].shape[axis] > 0 for name, axis in self._pasts)


def start_of(inputs: Mapping[str, Tensor], device: torch.device) -> Tensor:
    """What a package for CUDA takes as :data:`START`."""
    return torch.full((1,), inputs[MASK].shape[1] - inputs[TOKENS].shape[1], dtype=torch.int64, device=device)


def _check_place(where: object, name: str, buffer: Tensor, device: torch.device) -> None:
    """Refuse a buffer of which the package would write a copy."""
    if buffer.device != device:
        found = f"on {buffer.device}"
    elif not buffer.is_contiguous():
        found = "with gaps between its numbers"
    elif device.type == "cuda" and buffer.data_ptr() % ALIGNED:
        found = f"that does not begin at a multiple of {ALIGNED} bytes"
    else:
        return
    raise LowerError(
        f"{where}: input {name!r} has room for more positions than the past, so it is written in place, and must be a "
        f"contiguous tensor on {device}; found one {found}"
    )


def grown(past: Tensor, axis: int, capacity: int, device: torch.device) -> Tensor:
    """A buffer with room for so many positions that begins with the past."""
    shape = list(past.shape)
    shape[axis] = capacity
    # Zeros, where a mask may hide what nothing was written to: its weight is zero, and zero times what is no number is none.
    buffer = torch.zeros(shape, dtype=past.dtype, device=device)
    buffer.narrow(axis, 0, past.shape[axis]).copy_(past)
    return buffer


class BufferDecoder(GraphDecoder):
    """Steps of a package over buffers, which are replaced by longer ones when they are full."""

    def __init__(
        self, run: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]], inputs: tuple[Port, ...], outputs: tuple[Port, ...],
        device: torch.device,
    ) -> None:  # fmt: skip
        """Args:
        run: runs the package.
        inputs: its ports.
        outputs: likewise.
        device: where it runs.
        """
        super().__init__(run, inputs, outputs)
        self.device: torch.device = device
        self._capacity, self._length = 0, 0

    def __call__(self, inputs: Mapping[str, Any]) -> Tensor:
        """Run on the new tokens; see :class:`surgeon.generation.Decoder`."""
        length = inputs[MASK].shape[1]
        if length > self._capacity:
            self._capacity = room(length, self._capacity)
            for port in self._pasts:
                axis = port.shape.index(PAST)
                held = self._caches.get(port.name)
                if held is None:
                    held = empty_cache(port, len(inputs[TOKENS]), self.device)
                used = held.narrow(axis, 0, self._length)
                self._caches[port.name] = grown(used, axis, self._capacity, self.device)
        self._length = length
        return super().__call__(inputs)

    def resume(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Go on from a past that was computed elsewhere.

        Args:
            inputs: of a step, the pasts among them.

        Returns:
            Those that are no pasts, on the device: what the step is called with.
        """
        self._length = inputs[MASK].shape[1] - inputs[TOKENS].shape[1]
        self._capacity = room(inputs[MASK].shape[1], 0)
        for port in self._pasts:
            self._caches[port.name] = grown(inputs[port.name], port.shape.index(PAST), self._capacity, self.device)
        return {name: value.to(self.device) for name, value in inputs.items() if name not in self._caches}
