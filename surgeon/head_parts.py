"""What remains of values, tensors and constants where an attention loses heads."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

from surgeon.errors import RewriteError


class Unfit(RewriteError):
    """Heads of one attention that cannot be told apart; the message says where."""


@dataclass(frozen=True)
class Part:
    """What remains of one value.

    Attributes:
        shape: its shape before, symbolic sizes as they were traced.
        mask: which elements remain, broadcastable to ``shape``, size 1 where it does not vary.
        sizes: its shape afterwards.
    """

    shape: tuple[int, ...]
    mask: Tensor
    sizes: tuple[int, ...]

    @property
    def whole(self) -> bool:
        """Whether all of it remains."""
        return self.sizes == self.shape

    @property
    def gone(self) -> bool:
        """Whether nothing of it remains."""
        return 0 in self.sizes and 0 not in self.shape

    def before(self, axis: int, place: int) -> int:
        """How many places of one dimension remain in front of one.

        Raises:
            Unfit: it depends on the place along other dimensions.
        """
        if self.mask.shape[axis] == 1:
            return place if self.sizes[axis] == self.shape[axis] else 0
        counts = set(self.mask.narrow(axis, 0, place).sum(axis).flatten().tolist())
        if len(counts) > 1:
            raise Unfit("heads that go are at different places of different groups")
        return int(counts.pop())

    def of(self, tensor: Tensor) -> Tensor:
        """The elements of a tensor that remain, in order."""
        if self.whole:
            return tensor
        found = tensor
        for axis, size in enumerate(self.mask.shape):
            if size > 1 and self.mask.numel() == size:
                return found.index_select(axis, self.mask.flatten().nonzero().flatten()).contiguous()
        return found[self.mask.expand(self.shape)].reshape(self.sizes)


@dataclass
class Trim:
    """How one attention loses heads.

    Attributes:
        parts: what remains of every value in front of its output projection.
        tensors: the stored tensors that shrink, by name.
        lost: names of stored tensors of which nothing is read any more.
        caches: the inputs that shrink.
        arguments: new constants of nodes: node -> (operator, arguments).
        selections: (value, reader) between which the kept heads are selected, with the places along one dimension.
    """

    parts: dict[fx.Node, Part] = field(default_factory=dict)
    tensors: dict[str, Part] = field(default_factory=dict)
    lost: set[str] = field(default_factory=set)
    caches: dict[fx.Node, Part] = field(default_factory=dict)
    arguments: dict[fx.Node, tuple[Any, tuple[Any, ...]]] = field(default_factory=dict)
    selections: dict[tuple[fx.Node, fx.Node], tuple[int, Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class Times:
    """A size in the making: a symbolic one times a number."""

    size: fx.Node
    factor: int


@dataclass(frozen=True)
class Places:
    """A stored tensor of places in the making."""

    name: str
    places: Tensor
