"""Sizes that TensorRT optimizes an engine for: a range and a most frequent size of every dynamic dimension."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field

from surgeon.caches import SUM
from surgeon.contract import Refusal
from surgeon.graph import Graph

Sizes = tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]]
"""Smallest, most frequent and largest size."""

DEFAULTS: dict[str, Sizes] = {"batch": (1, 1, 8), "sequence": (1, 128, 512), "past": (0, 128, 1024)}


def ordered(shapes: dict[str, Sizes]) -> dict[str, Sizes]:
    """The same sizes.

    Raises:
        ValueError: three sizes do not ascend.
    """
    for name, (low, best, high) in shapes.items():
        if not low <= best <= high:
            raise ValueError(f"{name}: needed [smallest, most frequent, largest], found {[low, best, high]}")
    return shapes


def refusals(shapes: Mapping[str, Sizes], graph: Graph) -> list[Refusal]:
    """Sizes of dimensions that the graph does not have, dimensions without sizes, and sizes beyond the graph's own limits."""
    found = []
    known = {size for port in graph.inputs for size in port.shape if isinstance(size, str)}
    for name in sorted(set(shapes) - known):
        listed = ", ".join(sorted(known))
        found.append(Refusal("shapes", f"the model has no dimension {name!r}; its dynamic ones are {listed}", lasting=True))
    for name in sorted(known):
        sizes = _sizes(shapes, name)
        limit = _limit(graph, name)
        if sizes is None:
            advice = f"give shapes: {{{name}: [1, 8, 64]}}"
            found.append(Refusal("shapes", f"no sizes for the dimension {name!r}; {advice}", lasting=True))
        elif name in shapes and limit is not None and sizes[2] > limit:
            found.append(Refusal("shapes", f"{name} up to {sizes[2]}; the model takes at most {limit}", lasting=True))
    return found


def profile(shapes: Mapping[str, Sizes], graph: Graph) -> dict[str, Sizes]:
    """Sizes of every dynamic dimension of a graph that :func:`refusals` has nothing against, defaults within its limits."""
    found = {}
    for name in {size for port in graph.inputs for size in port.shape if isinstance(size, str)}:
        sizes = _sizes(shapes, name)
        assert sizes is not None
        limit = _limit(graph, name)
        low, best, high = (size if limit is None else min(size, limit) for size in sizes)
        found[name] = (low, best, high)
    return found


def of_ports(sizes: Mapping[str, Sizes], graph: Graph) -> dict[str, list[list[int]]]:
    """Smallest, most frequent and largest shape of every input, by name."""
    return {
        port.name: [[size if isinstance(size, int) else sizes[size][which] for size in port.shape] for which in range(3)]
        for port in graph.inputs
    }


def _sizes(shapes: Mapping[str, Sizes], name: str) -> Sizes | None:
    if SUM in name and name not in shapes:  # past and new tokens together
        past, new = (_sizes(shapes, part) for part in name.split(SUM))
        return None if past is None or new is None else (past[0] + new[0], past[1] + new[1], past[2] + new[2])
    return shapes.get(name, DEFAULTS.get(name))


def _limit(graph: Graph, name: str) -> int | None:
    return graph.dims[name].max if name in graph.dims else None
