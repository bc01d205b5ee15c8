"""Export of models that loop over the experts that were chosen, or skip an expert without tokens.

    for expert in (mask.sum((-1, -2)) > 0).nonzero(): ...        if mask.any(): ...        if tokens.numel() == 0: continue
    for expert in chosen.unique(): ...                           if mask.sum() == 0: continue        if len(rows) == 0: continue

Such code decides in Python about data, which a graph cannot.  Inside :func:`unrolled` it is traced as if every expert had
tokens: a loop over the places where a vector of fixed length is true visits all of them, and one over the different ones among
indices all that these may be (:class:`_Origins`), a condition on whether anything was selected holds, and a number of selected
things is not zero.  What is done for an expert without tokens changes nothing
in a mixture of experts; whether that is so in the model at hand is decided by comparing the graph with the model on other
inputs, as every trace is.

Conditions may be counted for more experts than there are, the last of them for tokens without one.  Where a loop fails
because it visits such a place (:func:`overrun`), it is traced again without.

Other code cannot be run with every condition true, such as a second kind of attention for tokens that the inputs may mark.
Then a condition on a tensor is taken as it is on the example (:func:`decisions`), and that is noted.
"""

from __future__ import annotations

import operator
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, free_unbacked_symbols
from torch.overrides import TorchFunctionMode

from surgeon.canonical_facts import is_unbacked
from surgeon.discovery.operators import traced_sizes

_SOME = 3
"""The number of selected things where Python asks for one: neither none nor one."""


class _Place(list[int]):
    """A row of ``nonzero`` as Python integers: indexes tensors like the row does, and is a number where one is needed."""

    def item(self) -> int:
        """The only entry."""
        (number,) = self
        return number

    def tolist(self) -> list[int]:
        """The entries."""
        return list(self)

    def squeeze(self, *_: int) -> int:
        """The only entry."""
        return self.item()

    def __int__(self) -> int:
        return self.item()

    def __index__(self) -> int:
        return self.item()


class _Number(int):
    """An entry of a vector of indices: a number where one is needed, and what a tensor of one entry is asked for."""

    def item(self) -> int:
        """The only entry."""
        return int(self)

    tolist = item


class _Origins(TorchFunctionMode):
    """Remembers what tensors are that Python may ask for: counts, conditions on counts, and indices below some number."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[int, tuple[Tensor, str, tuple[Any, ...]]] = {}
        self.bounds: dict[int, tuple[Tensor, int]] = {}  # tensors are held, so that their ids stay theirs

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "").strip("_")
        if name in _CHOOSING:
            indices = result if isinstance(result, Tensor) else result[1] if isinstance(result, tuple) else None
            dim = (kwargs or {}).get("dim", args[_CHOOSING[name]] if len(args) > _CHOOSING[name] else -1)
            if indices is not None and isinstance(dim, int) and isinstance(args[0].shape[dim], int):
                self.bounds[id(indices)] = (indices, args[0].shape[dim])
        elif isinstance(result, Tensor) and name in _SAME_ENTRIES and args and id(args[0]) in self.bounds:
            self.bounds[id(result)] = (result, self.bounds[id(args[0])][1])
        elif isinstance(result, Tensor) and (name in _COMPARISONS or name in _COUNTS or name in _NEGATIONS):
            self.calls[id(result)] = (result, name, args)
        return result

    def is_count(self, value: Tensor) -> bool:
        """Whether a tensor says of how many things something holds."""
        return id(value) in self.calls and self.calls[id(value)][1] in _COUNTS and not value.is_floating_point()

    def holds(self, value: Tensor) -> bool:
        """A condition, where every count is :data:`_SOME` and everything else holds."""
        _, name, args = self.calls.get(id(value), (value, "", ()))
        if name in _NEGATIONS:
            return not self.holds(args[0])
        if name in _COMPARISONS and self.is_count(args[0]) and isinstance(args[1], int):
            return bool(_COMPARISONS[name](_SOME, args[1]))
        return True


_CHOOSING = {"topk": 2, "sort": 1, "argsort": 1, "argmax": 1, "argmin": 1, "max": 1, "min": 1}
"""What gives indices into a dimension, and at which place of its arguments that dimension is."""
_SAME_ENTRIES = (
    "clone", "contiguous", "cpu", "detach", "flatten", "getitem", "int", "long", "permute", "ravel", "reshape", "squeeze", "t",
    "to", "transpose", "unsqueeze", "view",
)  # fmt: skip
_COUNTS = ("sum", "count_nonzero")
_COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")
}
_NEGATIONS = ("logical_not", "bitwise_not", "invert")

_OUT_OF_BOUNDS = re.compile(r"index (\d+) is out of bounds for dimension \d+ with size (\d+)")


def overrun(error: IndexError) -> dict[int, int] | None:
    """The length of a loop that went one place too far, and the length that it should have; None for other errors."""
    match = _OUT_OF_BOUNDS.search(str(error))
    if match is None or match[1] != match[2]:
        return None
    return {int(match[1]) + 1: int(match[2])}


Site = tuple[str, int]
"""File and line of the model's code."""


@contextmanager
def decisions() -> Iterator[dict[Site, list[bool]]]:
    """Inside, what a model that is run decides on the values of tensors is written down.

    Yields:
        For each place in the model's code the truth values that Python asked for there, in order.
    """
    found: dict[Site, list[bool]] = {}

    def written(original: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
        def patched(value: Tensor) -> Any:
            result = original(value)
            if isinstance(result, bool):
                found.setdefault(_site(), []).append(result)
            return result

        return patched

    with _patched(torch.Tensor, "__bool__", written), _patched(torch.Tensor, "item", written):
        yield found


def _site() -> Site:
    """The innermost place outside of torch and of this file."""
    frame = sys._getframe(1)
    own = (__file__, torch.__path__[0])
    while frame.f_back is not None and frame.f_code.co_filename.startswith(own):
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno


@contextmanager
def unrolled(
    lengths: Mapping[int, int] | None = None, taken: Mapping[Site, list[bool]] | None = None
) -> Iterator[list[str]]:
    """Trace decisions on data as the module's docstring says.

    Args:
        lengths: how many places are visited of a vector of that length, where that is not all of them.
        taken: what :func:`decisions` found, where conditions on tensors are taken so.

    Yields:
        What was decided so, in words, as it happens.
    """
    decided: list[str] = []
    places: dict[int, tuple[Tensor, int]] = {}
    indices: dict[int, tuple[Tensor, int]] = {}
    origins = _Origins()
    visited = dict(lengths or {})
    # an export runs the model more than once, each time from the start
    known = {site: cycle(values) for site, values in (taken or {}).items()}

    def as_taken(otherwise: bool) -> bool:
        site = _site()
        holds = next(known[site]) if site in known else otherwise
        where = f" at {Path(site[0]).name}:{site[1]}"
        decided.append(f"a condition on data{where if site in known else ''} is taken to be {holds}")
        return holds

    def item(original: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
        def patched(value: Tensor) -> Any:
            result = original(value)
            return as_taken(True) if isinstance(result, torch.SymBool) and _site() in known else result

        return patched

    def nonzero(original: Callable[..., Any]) -> Callable[..., Any]:
        def patched(value: Any, *args: Any, **kwargs: Any) -> Any:
            whole = not args and not kwargs.get("as_tuple") and isinstance(value, Tensor) and value.dim() == 1
            if not whole or not isinstance(value.shape[0], int):
                return original(value, *args, **kwargs)
            count = visited.get(value.shape[0], value.shape[0])
            decided.append(f"a vector of {value.shape[0]} conditions is taken to hold in its first {count} places")
            rows = torch.arange(count, device=value.device).unsqueeze(1)
            places[id(rows)] = (rows, count)  # held, so that its id stays its own
            return rows

        return patched

    def iterate(original: Callable[[Tensor], Iterator[Any]]) -> Callable[[Tensor], Iterator[Any]]:
        def patched(value: Tensor) -> Iterator[Any]:
            if id(value) in places:
                return iter([_Place([number]) for number in range(places[id(value)][1])])
            if id(value) in indices:
                return iter([_Number(number) for number in range(indices[id(value)][1])])
            return original(value)

        return patched

    def to_list(original: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
        def patched(value: Tensor) -> Any:
            if id(value) in places:
                return [[number] for number in range(places[id(value)][1])]
            if id(value) in indices:
                return list(range(indices[id(value)][1]))
            return original(value)

        return patched

    def truth(original: Callable[[Any], bool]) -> Callable[[Any], bool]:
        def patched(value: Any) -> bool:
            try:
                return original(value)
            except GuardOnDataDependentSymNode:
                return as_taken(origins.holds(value) if isinstance(value, Tensor) else _usual(value))

        return patched

    def length(original: Callable[[Tensor], int]) -> Callable[[Tensor], int]:
        def patched(value: Tensor) -> int:
            if value.dim() and is_unbacked(value.shape[0]):
                decided.append("a number of selected things is taken to be neither zero nor one")
                return _SOME
            return original(value)

        return patched

    def number(original: Callable[[Tensor], int]) -> Callable[[Tensor], int]:
        def patched(value: Tensor) -> int:
            if origins.is_count(value):
                decided.append("a number of selected things is taken to be neither zero nor one")
                return _SOME
            return original(value)

        return patched

    def unique(original: Callable[..., Any]) -> Callable[..., Any]:
        def patched(value: Tensor, *args: Any, **kwargs: Any) -> Any:
            if id(value) not in origins.bounds or any(args[1:]) or kwargs.keys() - {"sorted"}:
                return original(value, *args, **kwargs)
            count = origins.bounds[id(value)][1]
            decided.append(f"indices below {count} are taken to be all of them")
            every = torch.arange(count, device=value.device, dtype=value.dtype)
            indices[id(every)] = (every, count)
            return every

        return patched

    def bincount(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def patched(value: Tensor, weights: Tensor | None = None, minlength: int = 0) -> Tensor:
            if weights is not None or not isinstance(minlength, int) or minlength == 0:
                return original(value, weights, minlength)
            decided.append(f"numbers below {minlength} are counted")
            return (value.unsqueeze(-1) == torch.arange(minlength, device=value.device)).long().sum(0)

        return patched

    with ExitStack() as stack:
        for owner, name, make in (
            (torch, "nonzero", nonzero),
            (torch.Tensor, "nonzero", nonzero),
            (torch.Tensor, "__iter__", iterate),
            (torch.Tensor, "tolist", to_list),
            (torch.Tensor, "__bool__", truth),
            (torch.Tensor, "item", item),
            (torch.Tensor, "__len__", length),
            (torch.Tensor, "__int__", number),
            (torch.SymBool, "__bool__", truth),
            (torch, "unique", unique),
            (torch.Tensor, "unique", unique),
            (torch, "bincount", bincount),
            (torch.Tensor, "bincount", bincount),
        ):
            stack.enter_context(_patched(owner, name, make))
        stack.enter_context(origins)
        yield decided


def _usual(condition: Any) -> bool:
    """A condition on numbers that only data gives, where flags are set and counts are neither zero nor one."""
    node = condition.node
    ranges = node.shape_env.var_to_range
    numbers = {}
    for symbol in free_unbacked_symbols(condition):
        flag = symbol in ranges and ranges[symbol].upper == 1
        numbers[symbol] = 1 if flag else _SOME
    expression = node.expr.xreplace(numbers)
    return bool(expression.xreplace(traced_sizes(node.shape_env)))


@contextmanager
def _patched(owner: Any, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    own = owner.__dict__.get(name)
    setattr(owner, name, make(getattr(owner, name)))
    try:
        yield
    finally:
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)
