"""How long a text a model can hold that generates token by token: the length of the tables that it looks its positions up in.

A table of positions is told from other tables by what its index does: it depends on no token, and grows by one with every
token.  Behind the table's last row there is nothing to read.  Of an encoder-decoder it is the decoder's text that grows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from surgeon.caches import DECODER_TOKENS, PAST, SUM, TOKENS, ancestors, complete, has_caches
from surgeon.errors import SurgeonError
from surgeon.graph import Graph

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
    found = [_held(graph, index, rows) for index, rows in _tables(graph)]
    return min((length for length in found if length is not None), default=None)


def _tables(graph: Graph) -> Iterator[tuple[fx.Node, int]]:
    """Index and number of rows of each constant table that is read at places which depend on no token and no cache."""
    names = {node: port.name for node, port in zip(_placeholders(graph), graph.inputs, strict=True)}
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
        constant = not any(part.op == "placeholder" for part in ancestors([table]))
        read = {names[part] for part in ancestors([index]) if part.op == "placeholder"}
        rows = table.meta["val"].shape[axis]
        if constant and read <= {"attention_mask", "position_ids"} and isinstance(rows, int):
            yield index, rows


def _held(graph: Graph, index: fx.Node, rows: int) -> int | None:
    """Largest number of tokens at which the index stays within ``rows``; None where it does not grow with them."""
    try:
        length = rows - _largest(graph, index, 2) + 1
        # Distances in buckets grow too, at first.
        return length if length > 0 and _largest(graph, index, length + 1) == rows else None
    except (SurgeonError, RuntimeError, IndexError, TypeError):  # what an operator does not accept says nothing of positions
        return None


def _largest(graph: Graph, index: fx.Node, tokens: int) -> int:
    """Largest place that is read for the last of so many tokens, the others being in the caches."""

    def made(name: int | str) -> int:
        total = {PAST: tokens - 1, f"{PAST}{SUM}sequence": tokens}
        return name if isinstance(name, int) else total.get(name, 1)

    given = {
        port.name: torch.ones((), dtype=port.dtype).expand([made(name) for name in port.shape])  # of any size in no memory
        for port in graph.inputs
        if port.role in ("", PAST)
    }
    if any(port.name == "position_ids" for port in graph.inputs):
        given["position_ids"] = torch.full((1, 1), tokens - 1)
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
    assert isinstance(found, Tensor)
    return int(found.max())


def _run(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda part: values[part])
    return node.target(*args, **kwargs)  # type: ignore[operator]  # a call_function target


def _placeholders(graph: Graph) -> list[fx.Node]:
    return list(graph.module.graph.find_nodes(op="placeholder"))
