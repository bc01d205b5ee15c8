"""How long a text a model can hold: the length of the tables that it looks its positions up in.

A table of positions is told from other tables by what its index does: it depends on no token, and grows by one with every
token.  Behind the table's last row there is nothing to read.  Of a model with caches it is the text that grows token by token,
behind an encoder the decoder's; of others, and of an encoder, it is what they are called on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from surgeon.caches import DECODER_TOKENS, PAST, SUM, TOKENS, ancestors, complete, has_caches
from surgeon.errors import SurgeonError
from surgeon.graph import Graph
from surgeon.halves import has_halves

_aten = torch.ops.aten


def table_length(graph: Graph) -> int | None:
    """Tokens, cached and new ones, for which every table of positions that is read behind caches has a row.

    Args:
        graph: with caches and real weights.

    Returns:
        Their largest number, or None where no such table is read: rotary angles that are computed, distances.
    """
    if not has_caches(graph.inputs) or not any(port.name in (TOKENS, DECODER_TOKENS) for port in graph.inputs):
        return None
    names = {node: port.name for node, port in zip(_placeholders(graph), graph.inputs, strict=True)}
    found = []
    for index, rows in _tables(graph):
        if {names[part] for part in _inputs_of(index)} <= {"attention_mask", "position_ids"}:
            found.append(_held(partial(_largest_continued, graph, index), rows))
    return min((length for length in found if length is not None), default=None)


def bounded(graph: Graph) -> Graph:
    """A graph whose inputs say how many positions a table has for them (``Port.most``), the text behind caches aside.

    Only tables that are read at places which follow from sizes count: where a mask or tokens say the places, padding has none.

    Args:
        graph: with real weights.
    """
    behind = {size for port in graph.inputs if port.role or port.name == DECODER_TOKENS for size in port.shape}
    if has_caches(graph.inputs) and not has_halves(graph.inputs):
        return graph
    tables = [(index, rows) for index, rows in (*_tables(graph), *_cuts(graph)) if not _inputs_of(index)]
    longest: dict[str, int] = {}
    for name in graph.dims if tables else ():
        if name in behind or not any(name in port.shape[1:] for port in graph.inputs):
            continue
        lengths = [_held(partial(_largest_at, graph, index, name), rows) for index, rows in tables]
        if known := [length for length in lengths if length is not None]:
            longest[name] = min(known)
    if not longest:
        return graph
    clone = graph.clone()
    clone.inputs = tuple(
        replace(port, most=tuple(longest.get(str(size)) for size in port.shape)) if longest.keys() & set(port.shape) else port
        for port in graph.inputs
    )
    for name, length in longest.items():
        known_before = graph.dims[name].max
        clone.dims[name] = replace(graph.dims[name], max=length if known_before is None else min(length, known_before))
    return clone


def _inputs_of(index: fx.Node) -> list[fx.Node]:
    """Inputs whose values an index follows from."""
    return [part for part in ancestors([index]) if part.op == "placeholder"]


def _cuts(graph: Graph) -> Iterator[tuple[fx.Node, int]]:
    """Where each constant that is cut to the positions there are is cut, and how long it is."""
    for node in graph.module.graph.find_nodes(op="call_function", target=_aten.slice.Tensor):
        table, axis, _, end = (*node.args, 0, 0, None)[:4] if len(node.args) < 4 else node.args[:4]
        if isinstance(end, fx.Node) and isinstance(table, fx.Node) and not _inputs_of(table):
            rows = table.meta["val"].shape[axis]
            if isinstance(rows, int) and rows > 1:  # a single row stands for all positions
                yield end, rows


def _tables(graph: Graph) -> Iterator[tuple[fx.Node, int]]:
    """Index and number of rows of each constant table that is looked up in."""
    for node in graph.module.graph.nodes:
        if node.target == _aten.embedding.default:
            table, index, axis = node.args[0], node.args[1], 0
        elif node.target == _aten.index_select.default:
            table, axis, index = node.args
        elif node.target == _aten.index.Tensor and sum(item is not None for item in node.args[1]) == 1:
            table = node.args[0]
            axis, index = next((place, item) for place, item in enumerate(node.args[1]) if item is not None)
        else:
            continue
        rows = table.meta["val"].shape[axis]
        if not _inputs_of(table) and isinstance(rows, int):
            yield index, rows


def _held(largest: Callable[[int], int], rows: int) -> int | None:
    """Largest number of tokens at which an index stays within ``rows``; None where it does not grow with them.

    Args:
        largest: the index of the last of so many tokens.
        rows: of the table.
    """
    try:
        length = rows - largest(2) + 1
        # Distances in buckets grow too, at first.
        return length if length > 0 and largest(length + 1) == rows else None
    except (SurgeonError, RuntimeError, IndexError, TypeError):  # what an operator does not accept says nothing of positions
        return None


def _largest_continued(graph: Graph, index: fx.Node, tokens: int) -> int:
    """Largest place that is read for the last of so many tokens, the others being in the caches."""
    given = _inputs(graph, {PAST: tokens - 1, f"{PAST}{SUM}sequence": tokens})
    if any(port.name == "position_ids" for port in graph.inputs):
        given["position_ids"] = torch.full((1, 1), tokens - 1)
    return _largest(graph, index, given)


def _largest_at(graph: Graph, index: fx.Node, dimension: str, size: int) -> int:
    """Largest place that is read where a dimension of the inputs has this size."""
    return _largest(graph, index, _inputs(graph, {dimension: size}))


def _inputs(graph: Graph, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """Inputs of ones, of these sizes and 1 elsewhere, in no memory."""

    def made(name: int | str) -> int:
        return name if isinstance(name, int) else sizes.get(name, 1)

    return {
        port.name: torch.ones((), dtype=port.dtype).expand([made(name) for name in port.shape])
        for port in graph.inputs
        if port.role in ("", PAST)
    }


def _largest(graph: Graph, index: fx.Node, given: Mapping[str, Tensor]) -> int:
    """Largest place that is read; of a cut, the last one in front of it."""
    bound = graph.bind(complete(graph.inputs, given))
    values: dict[fx.Node, Any] = dict(zip(_placeholders(graph), bound, strict=True))
    needed, stack = set(), [index]
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            stack.extend(node.all_input_nodes)
    with torch.no_grad():
        for node in graph.module.graph.nodes:
            if node in needed and node not in values:
                values[node] = graph.tensor(str(node.target)) if node.op == "get_attr" else _run(node, values)
    found = values[index]
    return int(found.max()) if isinstance(found, Tensor) else int(found) - 1


def _run(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda part: values[part])
    return node.target(*args, **kwargs)  # type: ignore[operator]  # a call_function target


def _placeholders(graph: Graph) -> list[fx.Node]:
    return list(graph.module.graph.find_nodes(op="placeholder"))
