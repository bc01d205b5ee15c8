"""Which stored tensors are the experts' matrices and biases, and how they are laid out.

Every assignment that the shapes allow is a :class:`Roles`; evaluation decides between them.  The operator's own layout is
[gate | up] rows, w_in [E, O, H], w_out [E, G, I]; a model stores them as one tensor for all experts or one per expert,
input- or output-major, gate and up together (in a row, alternating, or the other way round) or apart.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CONCATENATED, SWAPPED, ALTERNATING, ALTERNATING_SWAPPED = "gate|up", "up|gate", "gate,up", "up,gate"
ORDERS = (CONCATENATED, ALTERNATING, SWAPPED, ALTERNATING_SWAPPED)
"""How the rows of gate and up stand in one stored matrix."""


@dataclass(frozen=True)
class Stack:
    """Equal tensors of all experts: [E, A, B], or [E, A] for biases.

    Attributes:
        names: the stored tensors: one for all experts, or one per expert.
        shape: the shape with the experts in front.
        columns: the one matrix holds the experts side by side, [A, E B], and not below each other.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    columns: bool = False

    def read(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The tensors of all experts as one of ``shape``; a view where they are stored as one."""
        if self.columns:
            experts, rows, columns = self.shape
            return tensors[self.names[0]].reshape(rows, experts, columns).movedim(1, 0)
        if len(self.names) == 1:
            stored = tensors[self.names[0]]
            return (stored[: self.shape[0]] if self._is_longer(stored) else stored).reshape(self.shape)
        return torch.stack([tensors[name] for name in self.names]).reshape(self.shape)

    def write(self, value: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The stored tensors that :meth:`read` turns into ``value``."""
        if self.columns:
            return {self.names[0]: value.movedim(0, 1).flatten(1, 2)}
        if len(self.names) == 1:
            stored = like[self.names[0]]
            if self._is_longer(stored):
                beyond = value.new_zeros(stored.shape[0] - self.shape[0], *stored.shape[1:])
                return {self.names[0]: torch.cat([value.reshape(-1, *stored.shape[1:]), beyond])}
            return {self.names[0]: value.reshape(stored.shape)}
        parts = value.unbind(0)
        return {name: part.reshape(like[name].shape) for name, part in zip(self.names, parts, strict=True)}

    def _is_longer(self, stored: Tensor) -> bool:
        """Whether a tensor has places for more experts than there are."""
        return stored.dim() >= 3 and stored.shape[0] > self.shape[0]


@dataclass(frozen=True)
class Piece:
    """A stack in its role.

    Attributes:
        stack: the stack.
        transposed: matrices are stored input-major.
        order: how rows of gate and up stand in it; None where it holds one of them only.
    """

    stack: Stack
    transposed: bool = False
    order: str | None = None

    def load(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """In the operator's layout."""
        value = self.stack.read(tensors)
        return _ordered(value.mT if self.transposed else value, self.order)

    def store(self, value: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the operator's layout to the stored tensors."""
        value = _stored(value, self.order)
        return self.stack.write(value.mT if self.transposed else value, like)


@dataclass(frozen=True)
class Roles:
    """Which stacks play which part; two first pieces are gate and up."""

    first: tuple[Piece, ...]
    second: Piece
    first_bias: tuple[Piece, ...]
    second_bias: Piece | None
    gated: bool

    def load(self, tensors: Mapping[str, Tensor]) -> list[Tensor | None]:
        """w_in, w_out, b_in and b_out in the operator's layout."""
        second_bias = None if self.second_bias is None else self.second_bias.load(tensors)
        return [_join(self.first, tensors), self.second.load(tensors), _join(self.first_bias, tensors), second_bias]

    def store(self, values: Sequence[Tensor | None], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The stored tensors that :meth:`load` turns into these."""
        w_in, w_out, b_in, b_out = values
        found: dict[str, Tensor] = {}
        for pieces, value in ((self.first, w_in), ((self.second,), w_out), (self.first_bias, b_in)):
            if value is not None and pieces:
                for piece, part in zip(pieces, value.chunk(len(pieces), dim=1), strict=True):
                    found.update(piece.store(part, like))
        if self.second_bias is not None and b_out is not None:
            found.update(self.second_bias.store(b_out, like))
        return found


def _join(pieces: tuple[Piece, ...], tensors: Mapping[str, Tensor]) -> Tensor | None:
    parts = [piece.load(tensors) for piece in pieces]
    return None if not parts else parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _ordered(value: Tensor, order: str | None) -> Tensor:
    """Rows [E, O, ...] as stored -> gate rows first, then up rows."""
    if order in (None, CONCATENATED):
        return value
    if order == SWAPPED:
        return torch.cat(value.chunk(2, dim=1)[::-1], dim=1)
    even, odd = value[:, 0::2], value[:, 1::2]
    return torch.cat([even, odd] if order == ALTERNATING else [odd, even], dim=1)


def _stored(value: Tensor, order: str | None) -> Tensor:
    """The inverse of :func:`_ordered`."""
    if order in (None, CONCATENATED, SWAPPED):
        return _ordered(value, order)
    gate, up = value.chunk(2, dim=1)
    return torch.stack([gate, up] if order == ALTERNATING else [up, gate], dim=2).flatten(1, 2)


def find_stacks(
    shapes: Mapping[str, tuple[int, ...]], views: Mapping[str, tuple[int, ...]], tables: Collection[str] = ()
) -> Iterator[list[Stack]]:
    """Every way in which the tensors of a region are stacks over experts.

    Args:
        shapes: shape by name, in the order in which they are read.
        views: tensors that the region first reads in another shape [E, A, B].
        tables: matrices [E, A] whose rows the region selects; where there is nothing else, every row is one neuron.
    """
    sizes = {name: views.get(name, shape) for name, shape in shapes.items()}
    deep = [shape for shape in sizes.values() if len(shape) >= 3]
    if deep:
        experts = min(shape[0] for shape in sizes.values())  # numbers beyond may have weights that nothing reads
        if all(shape[0] == experts or len(shapes[name]) >= 3 for name, shape in sizes.items()):
            sizes = {name: (experts, *shape[1:]) for name, shape in sizes.items()}
            yield [Stack((name,), _bare(shape), _stands_side_by_side(shapes[name], shape)) for name, shape in sizes.items()]
        return
    if tables and set(tables) == set(sizes):
        yield [Stack((name,), (shape[0], 1, shape[1])) for name, shape in sizes.items()]
        return
    matrices = [name for name, shape in sizes.items() if len(shape) == 2]
    for kinds in (2, 3):
        experts = len(matrices) // kinds
        if experts * kinds == len(matrices) and experts > 1:
            yield from _apart(sizes, experts)


def _stands_side_by_side(stored: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether a matrix [A, E B] is read as [E, A, B]."""
    return len(stored) == 2 and len(shape) == 3 and stored == (shape[1], shape[0] * shape[2]) != (shape[0] * shape[1], shape[2])


def _bare(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without dimensions of size 1 behind the experts: a bias may be [E, 1, A]."""
    kept = tuple(size for size in shape[1:] if size != 1)
    return (shape[0], *kept) if len(shape) == 3 and len(kept) == 1 else shape


def _apart(sizes: Mapping[str, tuple[int, ...]], experts: int) -> Iterator[list[Stack]]:
    """One tensor per expert: tensors of one shape are the same part of all experts, or several parts in turn or in line."""
    groups: dict[tuple[int, ...], list[str]] = {}
    for name, shape in sizes.items():
        groups.setdefault(shape, []).append(name)
    if any(len(names) % experts for names in groups.values()):
        return
    for in_turn in (True, False) if any(len(names) > experts for names in groups.values()) else (True,):
        stacks = []
        for shape, names in groups.items():
            parts = len(names) // experts
            for part in range(parts):
                chosen = names[part::parts] if in_turn else names[part * experts : (part + 1) * experts]
                stacks.append(Stack(tuple(chosen), (experts, *shape)))
        yield stacks


def find_roles(stacks: Sequence[Stack], width: int, out_width: int) -> Iterator[Roles]:
    """Every assignment of roles that the shapes allow.

    Args:
        stacks: the stacks of one region.
        width: H, features of the input.
        out_width: G, features of the output.
    """
    matrices = [stack for stack in stacks if len(stack.shape) == 3]
    biases = [stack for stack in stacks if len(stack.shape) == 2]
    if len(matrices) not in (2, 3) or len(matrices) + len(biases) != len(stacks):
        return
    for order in itertools.permutations(matrices):
        *first, second = order
        for second_piece in _pieces(second, out_width, out=True):
            inner = second.shape[1] if second_piece.transposed else second.shape[2]
            for pieces in itertools.product(*(_pieces(stack, width, out=False) for stack in first)):
                rows = [p.stack.shape[2] if p.transposed else p.stack.shape[1] for p in pieces]
                if len(pieces) == 2 and rows == [inner, inner]:
                    yield from _with_biases(pieces, second_piece, biases, inner, out_width, (None,))
                elif rows == [inner]:
                    yield from _with_biases(pieces, second_piece, biases, inner, out_width, (None,))
                elif rows == [2 * inner]:
                    yield from _with_biases(pieces, second_piece, biases, inner, out_width, ORDERS)


def _pieces(stack: Stack, features: int, *, out: bool) -> list[Piece]:
    """The stack output-major or input-major, as far as its sizes allow; ``features`` are the model's."""
    rows, columns = stack.shape[1:]
    plain, transposed = (rows, columns) if out else (columns, rows)
    return [Piece(stack, flag) for flag, size in ((False, plain), (True, transposed)) if size == features]


def _with_biases(
    pieces: tuple[Piece, ...],
    second: Piece,
    biases: list[Stack],
    inner: int,
    out_width: int,
    orders: Sequence[str | None],
) -> Iterator[Roles]:
    gated = len(pieces) == 2 or orders != (None,)
    for order in orders:
        firsts = tuple(Piece(piece.stack, piece.transposed, order) for piece in pieces)
        size = 2 * inner if order is not None else inner
        for with_first, with_second in ((len(pieces), 1), (len(pieces), 0), (0, 1), (0, 0)):
            if with_first + with_second != len(biases):
                continue
            for chosen in itertools.permutations(biases):
                first_bias, second_bias = chosen[:with_first], chosen[with_first:]
                if all(b.shape[1] == size for b in first_bias) and all(b.shape[1] == out_width for b in second_bias):
                    yield Roles(
                        firsts,
                        second,
                        tuple(Piece(b, False, order) for b in first_bias),
                        Piece(second_bias[0]) if second_bias else None,
                        gated,
                    )
