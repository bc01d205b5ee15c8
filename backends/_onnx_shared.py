"""Attention over caches that are written in place: ``com.microsoft.GroupQueryAttention``.

``Attention`` (opset 23) returns the past with the new keys and values appended, a copy of every cache at every step.
``GroupQueryAttention`` writes the new ones into the buffer that holds the past, where past and present are bound to one
buffer; bound to two it copies likewise, so the model answers a plain call as before.  A buffer may be longer than the past:
its length says nothing about positions, so all sizes of the past are taken from the attention mask, which covers past and
new positions.

The kernel is causal whatever it is told; the mask of the graph is added to the scores (0 where it allows a position, the
lowest number elsewhere), so it needs a mask that allows no later position.  Shown for ``a & b & ...`` where one part depends
on sizes alone and is the causal mask at several sizes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx

import surgeon.ops  # noqa: F401  # registers torch.ops.surgeon
from surgeon import routes
from surgeon.backends import _onnx_attention_ops as emit
from surgeon.backends._onnx_attention import CachedAttention, appended, swaps
from surgeon.caches import MASK, PAST, SUM, TOKENS, ancestors, has_caches
from surgeon.contract import Refusal
from surgeon.graph import Graph
from surgeon.halves import has_halves

aten = torch.ops.aten
ATTENTION = torch.ops.surgeon.attention.default
POSITION_IDS = "position_ids"
LARGEST_TABLE = 2**25
"""Bytes of a table of cosines or sines above which rotary embedding stays outside of the kernel."""

_SIZES = tuple({"batch": 2, "sequence": new, "past": past} for new, past in ((3, 4), (5, 0), (1, 6)))
"""Sizes at which a part of a mask is compared with the causal mask."""
_BOTH = frozenset({aten.__and__.Tensor, aten.bitwise_and.Tensor, aten.logical_and.default})
_SAME = frozenset({aten.expand.default, aten.clone.default, aten.alias.default, aten.contiguous.default})


def refusals(graph: Graph) -> list[Refusal]:
    """Why the caches of this graph cannot be written in place."""
    if not has_caches(graph.inputs):
        return [Refusal("caches", "the model was traced without caches; build it with task text-generation", lasting=True)]
    if has_halves(graph.inputs):
        reason = "an encoder-decoder: only decoders alone are written with shared caches"
        return [Refusal("caches", reason, lasting=True)]
    found = []
    names = {port.name for port in graph.inputs if port.role != PAST}
    if MASK not in names or TOKENS not in names:
        found.append(Refusal("caches", f"needs inputs {TOKENS} and {MASK}, found {', '.join(sorted(names))}", lasting=True))
    if any(port.role == routes.REPLAYED for port in graph.inputs):
        found.append(Refusal("caches", "routing is replayed: a batch is continued row by row, decisions are not divided"))
    causal: dict[fx.Node, bool] = {}
    written: set[fx.Node] = set()
    for node in graph.module.graph.nodes:
        if node.target is ATTENTION:
            reason = _reason(graph, node, causal)
            found += [Refusal(node.name, reason)] if reason else []
            written |= {part for source in node.args[1:3] for part in (appended(source) or ())}
    placeholders = [node for node in graph.module.graph.nodes if node.op == "placeholder"]
    found += [
        Refusal(port.name, "no attention of one kernel reads this cache")
        for port, node in zip(graph.inputs, placeholders, strict=True)
        if port.role == PAST and node not in written
    ]
    return found


def _reason(graph: Graph, node: fx.Node, causal: dict[fx.Node, bool]) -> str:
    """Why one attention cannot be the kernel's, or nothing."""
    args: tuple[Any, ...] = node.args
    q, k, v, mask, is_causal, _ = args
    halves = appended(k), appended(v)
    if is_causal or halves[0] is None or halves[1] is None:
        return "its keys and values are not a cache with new ones appended"
    others = [user for source in (k, v) for user in source.users if user is not node and user.op != "output"]
    for source, (past, _) in ((k, halves[0]), (v, halves[1])):
        others += [user for user in past.users if user is not source and user.target != aten.sym_size.int]
    if others:
        return f"its cache is read by {others[0].name} too"
    shapes = [tuple(source.meta["val"].shape) for source in (q, k, v)]
    if len({shape[3] for shape in shapes}) > 1:
        return f"heads of keys have {shapes[1][3]} numbers, of values {shapes[2][3]}; the kernel needs equal ones"
    if shapes[0][3] % 8:
        return f"heads have {shapes[0][3]} numbers; the kernel needs a multiple of 8"
    if q.meta["val"].dtype not in (torch.float32, torch.float16):
        return f"the kernel takes float32 and float16, found {q.meta['val'].dtype}"
    if not isinstance(mask, fx.Node) or mask.meta["val"].dtype != torch.bool:
        return "it has no mask of booleans"
    if mask not in causal:
        causal[mask] = _allows_nothing_later(graph, mask)
    return "" if causal[mask] else "its mask was not shown to hide every later position; the kernel always does"


def _allows_nothing_later(graph: Graph, mask: fx.Node) -> bool:
    if _reads_sizes_alone(mask):
        return _is_causal(graph, mask, exactly=False)
    if mask.target in _BOTH:
        return any(_allows_nothing_later(graph, part) for part in mask.all_input_nodes)
    return mask.target in _SAME and _allows_nothing_later(graph, mask.all_input_nodes[0])


def _read(node: fx.Node) -> set[fx.Node]:
    """Inputs of which the numbers, not the size alone, are read."""
    return {source for source in ancestors([node]) if source.op == "placeholder"}


def _reads_sizes_alone(node: fx.Node) -> bool:
    return not _read(node)


def _is_causal(
    graph: Graph, mask: fx.Node, *, exactly: bool, sizes: Iterable[Mapping[str, int]] = _SIZES
) -> bool:
    """Whether what depends on sizes alone is the causal mask, or at least true nowhere that it is not."""
    for each in sizes:
        past, new = each["past"], each["sequence"]
        allowed = torch.ones(new, past + new, dtype=torch.bool).tril(past)
        found = _evaluate(graph, mask, each, {})
        if found.shape[-2:] != allowed.shape or bool((found & ~allowed).any()):
            return False
        if exactly and not bool((found == allowed).all()):
            return False
    return True


_LONG = {"batch": 1, "sequence": 2, "past": 2**17}
"""Sizes at which a window that is wider than those of _SIZES shows."""


def is_causal_unpadded(graph: Graph, mask: Any) -> bool:
    """Whether a mask is the causal one wherever the attention mask is 1.

    Shown for ``a & b & ...`` with a part that is exactly causal by sizes alone and others [B or 1, 1, 1, T] that read the
    attention mask and are true where that is 1.
    """
    if not isinstance(mask, fx.Node) or mask.meta["val"].dtype != torch.bool:
        return False
    placeholders = [node for node in graph.module.graph.nodes if node.op == "placeholder"]
    padding = next((node for port, node in zip(graph.inputs, placeholders, strict=True) if port.name == MASK), None)
    causal: list[fx.Node] = []
    others: list[fx.Node] = []
    for part in _conjuncts(mask):
        (causal if _reads_sizes_alone(part) else others).append(part)
    if not causal or not all(_is_causal(graph, part, exactly=True, sizes=(*_SIZES, _LONG)) for part in causal):
        return False
    for part in others:
        shape = part.meta["val"].shape
        if padding is None or _read(part) != {padding} or len(shape) != 4 or shape[1] != 1 or shape[2] != 1:
            return False
        for sizes in _SIZES:
            ones = torch.ones(sizes["batch"], sizes["past"] + sizes["sequence"], dtype=padding.meta["val"].dtype)
            if not bool(_evaluate(graph, part, sizes, {MASK: ones}).all()):
                return False
    return True


def _evaluate(graph: Graph, target: fx.Node, sizes: Mapping[str, int], given: Mapping[str, Tensor]) -> Tensor:
    """A node's value where inputs have these sizes and, but for those ``given`` by name, no numbers of interest."""
    nodes, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    ports, inputs = iter(graph.inputs), []
    for node in target.graph.nodes:
        copies[node] = nodes.node_copy(node, copies.__getitem__)
        if node.op == "placeholder":
            port = next(ports)  # in the order of the ports
            shape = [_size(size, sizes) for size in port.shape]
            inputs.append(given.get(port.name, torch.zeros(shape, dtype=port.dtype)))
        if node is target:
            break
    nodes.output(copies[target])
    nodes.eliminate_dead_code()
    with torch.no_grad():
        found: Tensor = fx.GraphModule(graph.module, nodes)(*inputs)
    return found


def _size(size: int | str, sizes: Mapping[str, int]) -> int:
    return size if isinstance(size, int) else sum(sizes.get(part, 1) for part in size.split(SUM))


class SharedAttention(CachedAttention):
    """Lowers attention nodes of one graph that :func:`refusals` accepts.

    Rotary embedding is the kernel's where its angles grow by a step per position: rows of the table for every position that
    the source's configuration allows are computed now, the kernel refuses longer texts.  The kernel counts the positions of a
    row from its first column, padded or not, which makes no difference: scores depend on distances alone.
    """

    flat_output = True

    def __init__(self, graph: Graph, constant: Callable[[str, Tensor], fx.Node]) -> None:
        """Args:
        graph: to be rewritten.
        constant: makes a node that reads a new tensor, at the insertion point.
        """
        nodes = graph.module.graph
        super().__init__(nodes)
        self._graph, self._constant = graph, constant
        placeholders = [node for node in nodes.nodes if node.op == "placeholder"]
        self._inputs = {port.name: node for port, node in zip(graph.inputs, placeholders, strict=True)}
        self._biases: dict[fx.Node, fx.Node | None] = {}
        self._tables: dict[tuple[fx.Node, fx.Node], tuple[tuple[str, Any], ...]] = {}
        mask, self._new = self._inputs[MASK], self._inputs[TOKENS]
        with nodes.inserting_after(placeholders[-1]):
            lengths = nodes.call_function(emit.cache_lengths, (mask,))
        self._last, self._total = (self._after(lengths, operator.getitem, (lengths, index)) for index in range(2))
        total = self._after(lengths, aten.sym_size.int, (mask, 1))
        new = self._after(total, aten.sym_size.int, (self._new, 1))
        past = self._after(new, operator.sub, (total, new))
        for port in graph.inputs:
            # A buffer's length is not the past's: wherever the graph asks a cache, the mask answers.
            for user in list(self._inputs[port.name].users) if port.role == PAST else ():
                if user.target == aten.sym_size.int and user.args[1] == 2:
                    user.replace_all_uses_with(past)

    def _after(self, node: fx.Node, function: Callable[..., Any], arguments: tuple[Any, ...]) -> fx.Node:
        with self._nodes.inserting_after(node):
            return self._nodes.call_function(function, arguments)

    def attend(self, q: Any, k: Any, v: Any, mask: Any, past_k: Any, past_v: Any, scale: float, heads: Any) -> fx.Node:
        """The kernel's node; ``heads`` is None where queries, keys and values are divided into heads."""
        if heads is None:
            heads = (q.meta["val"].shape[1], k.meta["val"].shape[1])
            q, k, v = (self._joined(source) for source in (q, k, v))
        if mask not in self._biases:
            self._biases[mask] = self._bias(mask, past_k.meta["val"].dtype)
        tables = self._rotary(q, k)
        if tables is not None:
            q, k = q.args[0], k.args[0]
        caches = (past_k, past_v, self._last, self._total)
        return self._nodes.call_function(
            emit.grouped_attention, (q, k, v, *caches, tables, self._biases[mask], scale, heads)
        )

    def _joined(self, source: fx.Node) -> fx.Node:
        turned = source.args[0] if swaps(source) else self._nodes.call_function(aten.transpose.int, (source, 1, 2))
        return self._nodes.call_function(emit.join_heads, (turned,))

    def _bias(self, mask: fx.Node, dtype: torch.dtype) -> fx.Node | None:
        """What the mask adds to the scores beside what the kernel hides by itself."""
        parts = list(_conjuncts(mask))
        padding = [part for part in parts if not (_reads_sizes_alone(part) and _is_causal(self._graph, part, exactly=True))]
        if len(padding) == len(parts) or any(part.meta["val"].dim() != 4 or part.meta["val"].shape[2] != 1 for part in padding):
            return self._after(mask, emit.mask_bias, (mask, dtype))
        if not padding:
            return None
        both, *others = padding
        for part in others:
            both = self._after(mask, aten.__and__.Tensor, (both, part))
        return self._after(mask if others else padding[0], emit.padding_bias, (both, self._new, dtype))

    def _rotary(self, q: fx.Node, k: fx.Node) -> tuple[fx.Node, fx.Node] | None:
        """Tables of cos and sin [positions, D/2] where q and k are turned by angles that grow by a step per position."""
        turned = q.target is emit.rotary and k.target is emit.rotary
        if not turned or q.args[1:3] != k.args[1:3] or POSITION_IDS not in self._inputs:
            return None
        cos, sin = q.args[1:3]
        assert isinstance(cos, fx.Node)
        assert isinstance(sin, fx.Node)
        if (cos, sin) not in self._tables:
            found = self._rows(cos), self._rows(sin)
            fits = found[0] is not None and found[1] is not None and _turns_evenly(*found)
            number = len(self._tables)
            names = [f"rotary_{half}_{number}" for half in ("cos", "sin")]
            self._tables[cos, sin] = tuple(zip(names, found, strict=True)) if fits else ()
        read = [self._constant(name, rows) for name, rows in self._tables[cos, sin]]
        return (read[0], read[1]) if read else None

    def _rows(self, half: fx.Node) -> Tensor | None:
        """Every row that ``half`` [B or 1, S, D/2] can have, where a row depends on its position alone."""
        longest = self._graph.source.config.get("max_position_embeddings")
        size = half.meta["val"].shape[-1]
        if not isinstance(longest, int) or not isinstance(size, int) or longest * size * 4 > LARGEST_TABLE:
            return None
        if _read(half) != {self._inputs[POSITION_IDS]}:
            return None

        def at(positions: Tensor) -> Tensor:
            sizes = {"batch": 2, "sequence": len(positions), "past": 0}
            return _evaluate(self._graph, half, sizes, {POSITION_IDS: positions.expand(2, -1)})

        order = torch.randperm(longest, generator=torch.Generator().manual_seed(0))
        table = at(torch.arange(longest))
        rows = table[0].clone()
        alike = table.shape == (2, longest, size) and torch.equal(at(order)[1], rows[order])
        # Some scale their angles by the length of the text.
        return rows if alike and torch.equal(at(torch.arange(8))[0], rows[:8]) else None


def _turns_evenly(cos: Tensor | None, sin: Tensor | None) -> bool:
    """Whether rows p are c cos(p f) and c sin(p f): then scores depend on distances alone, and padding on none."""
    if cos is None or sin is None or len(cos) < 2:
        return False
    turns = torch.complex(cos.double(), sin.double())
    scale = turns[:1].abs()
    # Angles of long texts are rounded in the model itself: about 2e-3 at position 32768.
    return bool(((turns[:-1] * turns[1] / scale - turns[1:]).abs() < 1e-2 * scale).all())


def _conjuncts(mask: fx.Node) -> Iterator[fx.Node]:
    """The parts a, b, ... of ``a & b & ...``."""
    if mask.target in _BOTH:
        for part in mask.all_input_nodes:
            yield from _conjuncts(part)
    else:
        yield mask
