"""Reading the attention of a block: projections, norms of queries and keys, rotary positions, scale and mask."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, fx

import surgeon.ops  # noqa: F401  # registers torch.ops.surgeon
from surgeon.backends._gguf_parts import AttentionPart, Matrix, Norm, Rotation, times
from surgeon.backends._gguf_probe import (
    Evaluation,
    accuracy,
    dtype_of,
    named,
    places,
    read_norm,
    read_rotation,
    relative,
    unit,
)
from surgeon.backends._gguf_weights import matrix, whole
from surgeon.caches import MASK, PAST
from surgeon.discovery.cores import Core, find_cores
from surgeon.discovery.flow import Flow
from surgeon.discovery.linears import Linears
from surgeon.discovery.norms import is_affine, normalised
from surgeon.graph import Graph
from surgeon.structure import Attention, Linear, Region

_FAR = 1 << 16
"""Positions behind which a mask is looked at, where the graph has caches."""
_LONG = 1 << 11
"""The same where it has none and all positions are computed."""
_SPELLED = 1 << 10
"""The same where scores are computed one by one."""
_FUSED = (torch.ops.surgeon.attention.default, torch.ops.aten.scaled_dot_product_attention.default)
_STEPS = (0, 1, 4, 16, 64, 256, 1024, 4096)
"""Positions at which rotations are looked at, where positions are an input; otherwise all up to the third of these."""


class AttentionReader:
    """Reads the attentions of one graph.

    Attributes:
        inputs: tokens and what goes with them, of so many rows and positions.
    """

    def __init__(self, graph: Graph, flow: Flow, linears: Linears, inputs: Callable[[int, int], dict[str, Tensor]]) -> None:
        self.graph, self.flow, self.linears, self.inputs = graph, flow, linears, inputs
        self._turns: dict[tuple[str, int], tuple[Evaluation, list[int]]] = {}
        self._windows: dict[fx.Node, int | None] = {}
        self._spelled_length: Evaluation | None = None

    def read(self, region: Region, site: str, noise: Tensor, run: Evaluation) -> AttentionPart:
        """The attention of a region.

        Args:
            region: of kind ``attention``.
            site: its name.
            noise: hidden states [rows, length, H].
            run: evaluates the graph on as many tokens.

        Raises:
            ValueError: it is none that is known; says what was found.
        """
        if len(region.attention) != 1 or region.ffn or region.moe:
            raise ValueError(f"it holds {len(region.attention)} attentions, needed one")
        part = region.attention[0]
        missing = [name for name in "qkvo" if getattr(part, name) is None]
        if part.cross or part.parts or missing:
            lacking = f"has no single projection for {', '.join(missing) or 'its heads'}"
            found = "reads another stream" if part.cross else lacking
            raise ValueError(f"it {found}; needed one each for queries, keys, values and outputs")
        assert part.q is not None
        assert part.k is not None
        assert part.v is not None
        assert part.o is not None
        cores = find_cores(self.flow, self.linears, frozenset(self.flow.between(region.entry, region.exit)))
        if len(cores) != 1:
            raise ValueError(f"its scores and values meet in {len(cores)} places, needed one")
        source = part.q.input
        if part.k.input is not source or part.v.input is not source:
            raise ValueError("queries, keys and values are projections of different tensors")
        core = cores[0]
        pre = in_front(self.flow, run, region.entry, source, noise)
        post, residual = behind(run, region, part.o.node, noise)
        queries, q_norm, q_wide, q_turn, q_factor = self._side(core.q, part.q, run, f"{site}.q", core.head_dim)
        keys, k_norm, k_wide, k_turn, k_factor = self._side(core.k, part.k, run, f"{site}.k", core.head_dim)
        values, v_factor = self._moved(core.v, part.v, f"{site}.v")
        size = core.head_dim
        heads, kv_heads, once, values = self._heads(part, queries, keys, values, core)
        if k_wide and k_norm is not None and len(once) < len(keys):
            k_norm = replace(k_norm, weight=k_norm.weight.reshape(kv_heads, -1, size)[:, 0].flatten())
        if (q_norm is None) != (k_norm is None) or q_wide != k_wide:
            raise ValueError("queries and keys are normalised in different ways")
        if not _same(q_turn, k_turn):
            raise ValueError("queries and keys are turned by different angles")
        scale = self._scale(core, part, run) * q_factor * k_factor
        read = AttentionPart(
            site=site,
            q=self._rows(part.q, queries, f"{site}.q"),
            k=self._rows(part.k, once, f"{site}.k"),
            v=self._rows(part.v, values, f"{site}.v"),
            o=times(matrix(self.graph, self.flow, part.o, f"{site}.o"), residual),
            heads=heads, kv_heads=kv_heads, head_dim=size, scale=scale, rotation=q_turn,
            q_norm=q_norm, k_norm=k_norm, whole=q_wide, pre=pre, post=post, window=self._window(core),
        )  # fmt: skip
        return read if v_factor == 1 else replace(read, v=times(read.v, v_factor))

    def apply(self, part: AttentionPart, x: Tensor) -> Tensor:
        """What the sublayer makes of hidden states [rows, length, H], in float32."""
        rows, length = x.shape[:2]
        normed = x if part.pre is None else part.pre.apply(x)
        q, k, v = (side.apply(normed) for side in (part.q, part.k, part.v))
        if part.q_norm is not None and part.k_norm is not None and part.whole:
            q, k = part.q_norm.apply(q), part.k_norm.apply(k)
        q, k, v = (t.reshape(rows, length, -1, part.head_dim if t is not v else v.shape[-1] // part.kv_heads).transpose(1, 2)
                   for t in (q, k, v))  # fmt: skip
        if part.q_norm is not None and part.k_norm is not None and not part.whole:
            q, k = part.q_norm.apply(q), part.k_norm.apply(k)
        if part.rotation is not None:
            positions = torch.arange(length)
            q, k = part.rotation.apply(q, positions), part.rotation.apply(k, positions)
        mixed = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=part.scale, enable_gqa=part.heads != part.kv_heads
        )
        found = part.o.apply(mixed.transpose(1, 2).reshape(rows, length, -1))
        return x + (found if part.post is None else part.post.apply(found))

    # -- pieces -----------------------------------------------------------------------------------------------------

    def _heads(
        self, part: Attention, queries: Tensor, keys: Tensor, values: Tensor, core: Core
    ) -> tuple[int, int, Tensor, Tensor]:
        """Numbers of heads, and the rows of keys and values once for the heads that share them."""
        size = core.head_dim
        heads, seen = len(queries) // size, len(keys) // size
        kv_heads = part.kv_heads
        if not heads or heads % kv_heads or part.heads != heads:
            raise ValueError(f"{heads} query heads of {size} numbers were found where {part.heads} were expected")
        if seen != kv_heads:  # keys are repeated for the heads that share them
            each = seen // kv_heads
            keys, values = (index.reshape(kv_heads, each, -1) for index in (keys, values))
            for name, grouped in (("keys", keys), ("values", values)):
                if not torch.equal(grouped, grouped[:, :1].expand_as(grouped)):
                    raise ValueError(f"heads share {name} otherwise than in groups of neighbours")
            keys, values = keys[:, 0].flatten(), values[:, 0].flatten()
        return heads, kv_heads, keys, values

    def _rows(self, linear: Linear, index: Tensor, label: str) -> Matrix:
        """The rows of a projection in the order in which the core has them."""
        found = whole(self.graph, self.flow, linear, label)
        bias = None if found.bias is None else found.bias[index]
        straight = torch.equal(index, torch.arange(found.shape[0]))
        return replace(found, shape=(len(index), found.shape[1]), rows=None if straight else index, bias=bias)

    def _evaluation(self, rows: int) -> tuple[Evaluation, list[int]]:
        """Evaluates the graph for so many rows at the positions of ``_STEPS``, as far as positions are an input."""
        key = ("steps", rows)
        if key not in self._turns:
            free = next((port for port in self.graph.inputs if "positions" in port.role), None)
            steps = list(_STEPS) if free is not None else list(range(_STEPS[2] + 1))
            given = self.inputs(rows, len(steps))
            if free is not None:
                given[free.name] = torch.tensor(steps, dtype=free.dtype).expand(rows, -1).contiguous()
            self._turns[key] = Evaluation(self.flow, given), steps
        return self._turns[key]

    def _moved(self, result: fx.Node, linear: Linear, label: str) -> tuple[Tensor, float]:
        found = places(self._evaluation(3)[0], linear.node, result)
        if found is None:
            raise ValueError(f"{label.rpartition('.')[2]}: between the projection and the scores is more than movement")
        return found

    def _side(
        self, argument: fx.Node, linear: Linear, run: Evaluation, label: str, size: int
    ) -> tuple[Tensor, Norm | None, bool, Rotation | None, float]:
        """Queries or keys: rows of the projection, norm, whether that is over all heads, rotation, and a factor."""
        between = self.flow.between(linear.node, argument)
        cores = [node for node in self.flow.ordered(between) if normalised(self.flow, node) is not None]
        if len(cores) > 1:
            raise ValueError(f"{label}: it is normalised {len(cores)} times, needed at most once")
        start, norm, wide, index = linear.node, None, False, None
        if cores:
            source = normalised(self.flow, cores[0])
            assert source is not None
            start = self._gained(cores[0], between)
            features = int(source.meta["val"].shape[-1])
            sample = torch.randn(run.sizes(source), generator=torch.Generator().manual_seed(1))
            found = read_norm(run, source, start, {}, sample)
            if isinstance(found, str):
                raise ValueError(f"{label}: {found}")
            norm, wide = found, features != size
            index = self._moved(source, linear, label)[0]
        moved = places(self._evaluation(3)[0], start, argument)
        if moved is None:
            raise ValueError(f"{label}: at position 0 its numbers are mixed, as no rotation does")
        order, factor = moved
        turns = self._rotation(start, argument, order, size)
        if isinstance(turns, str):
            raise ValueError(f"{label}: {turns}")
        if wide and not torch.equal(order, torch.arange(len(order))):
            assert norm is not None
            norm = replace(norm, weight=norm.weight[order], bias=None if norm.bias is None else norm.bias[order])
        rows = order if index is None else index[order]
        return rows, norm, wide, turns, factor

    def _gained(self, node: fx.Node, between: set[fx.Node]) -> fx.Node:
        """The last of gain and offset behind a norm."""
        last = here = node
        while True:
            users = [user for user in here.users if user in between]
            if len(users) != 1 or not is_affine(users[0]):
                return last
            active = [n for n in users[0].all_input_nodes if n in self.flow and n not in self.flow.constant]
            if len(active) != 1:
                return last
            here = users[0]
            if any(n in self.flow.constant for n in here.all_input_nodes):
                last = here

    def _rotation(self, start: fx.Node, argument: fx.Node, order: Tensor, size: int) -> Rotation | str | None:
        run, steps = self._evaluation(size)
        basis = torch.zeros(size, run.features(start))
        basis[torch.arange(len(order)) % size, order] = 1.0
        found = run.one(argument, {start: run.spread(start, basis)})
        if _is_transposed(argument):
            found = found.mT
        if found.dim() != 4 or found.shape[0] != size or found.shape[2:] != (len(steps), size):
            return f"queries and keys are {list(found.shape)} numbers where [batch, heads, positions, size] is known"
        spread_heads = found - found[:, :1]
        if float(spread_heads.abs().max()) > 10 * accuracy(self.graph) * float(found.abs().max()):
            return "heads are turned by different angles"
        matrices = found[:, 0].permute(1, 2, 0)  # [steps, out, in]
        matrices = matrices / matrices[0].diagonal().mean()
        rotation = read_rotation(matrices, steps, unit(dtype_of(argument)))
        return named(rotation, self.graph.parameters().values()) if isinstance(rotation, Rotation) else rotation

    def _scale(self, core: Core, part: Attention, run: Evaluation) -> float:
        """The factor of the scores: such that outputs are those of softmax attention."""
        node = core.node
        if node.target is torch.ops.surgeon.attention.default:
            return float(node.args[5])  # type: ignore[arg-type]  # the operator's scale
        if node.target is torch.ops.aten.scaled_dot_product_attention.default:
            scale = node.kwargs.get("scale")
            return float(scale) if isinstance(scale, int | float) else core.head_dim**-0.5
        return self._spelled(core, run)

    def _spelled(self, core: Core, run: Evaluation) -> float:
        """The scale of an attention that is spelled out, measured: with one key along the query, two positions see it."""
        q, k, v = (torch.zeros(run.sizes(node)) for node in (core.q, core.k, core.v))
        if any(t.dim() != 4 for t in (q, k, v)) or _is_transposed(core.q) or _is_transposed(core.v):
            raise ValueError("its queries, keys and values have other dimensions than batch, heads, positions and size")
        keys = k.mT if _is_transposed(core.k) else k
        q[..., 0], keys[..., 0, 0], v[..., 0, 0] = 1.0, 1.0, 1.0
        found = run.one(core.node, {node: t.to(dtype_of(node)) for node, t in ((core.q, q), (core.k, k), (core.v, v))})
        share = float(found[0, 0, 1, 0])  # at position 1 of two: exp(s) / (exp(s) + 1)
        if not 0 < share < 1:
            raise ValueError("its weights are no softmax of the scores over earlier positions")
        return math.log(share / (1 - share))

    def _window(self, core: Core) -> int | None:
        """Positions that a query far behind sees, None for all in front of it."""
        if core.node.target not in _FUSED:
            return self._spelled_window(core)
        mask = core.node.args[3] if len(core.node.args) > 3 else core.node.kwargs.get("attn_mask")
        if not isinstance(mask, fx.Node):
            return None
        if mask not in self._windows:
            self._windows[mask] = self._seen(mask)
        return self._windows[mask]

    def _spelled_window(self, core: Core) -> int | None:
        """The window of an attention that is spelled out: with equal scores a query's result is the mean of what it sees."""
        if self._spelled_length is None:
            self._spelled_length = Evaluation(self.flow, self.inputs(1, self._at_most(_SPELLED)))
        run = self._spelled_length
        q, k, v = (torch.zeros(run.sizes(node)) for node in (core.q, core.k, core.v))
        v[..., 0] = torch.arange(run.length)
        found = run.one(core.node, {node: t.to(dtype_of(node)) for node, t in ((core.q, q), (core.k, k), (core.v, v))})
        seen = 2 * (run.length - 1 - float(found[0, 0, -1, 0])) + 1  # of positions up to the last, whose mean this is
        return None if seen > 0.98 * run.length else round(seen)

    def _at_most(self, length: int) -> int:
        """That length, or the longest that the model's tables have rows for."""
        return min([length, *(size for port in self.graph.inputs for size in port.most if size is not None)])

    def _seen(self, mask: fx.Node) -> int | None:
        far = any(port.role == PAST for port in self.graph.inputs)
        length = 1 if far else self._at_most(_LONG)
        given = self.inputs(1, length)
        if far:
            for port in self.graph.inputs:
                if port.role == PAST:
                    shape = [_FAR if size == PAST else 1 if isinstance(size, str) else size for size in port.shape]
                    given[port.name] = torch.zeros((), dtype=port.dtype).expand(shape)
                elif port.name == MASK:
                    given[MASK] = torch.ones(1, _FAR + 1, dtype=port.dtype)
                elif "positions" in port.role:
                    given[port.name] = torch.full((1, 1), _FAR, dtype=port.dtype)
        try:
            found = Evaluation(self.flow, given)([mask], {})[0]
        except (RuntimeError, IndexError) as error:  # a table of masks or positions that ends
            if "index" in str(error) or "size" in str(error):
                return None
            raise
        last = found.reshape(-1, found.shape[-1])[-1]
        seen = last if last.dtype == torch.bool else last > -1e4
        count = int(seen.sum())
        return None if count == last.numel() else count


def in_front(flow: Flow, run: Evaluation, entry: fx.Node, source: fx.Node, noise: Tensor) -> Norm | None:
    """The norm between a block's entry and what a sublayer reads, None where there is none.

    Raises:
        ValueError: something else is there.
    """
    if flow.plain(source) is entry:
        return None
    found = read_norm(run, entry, source, {}, noise)
    if isinstance(found, str):
        raise ValueError(f"in front of it, {found}")
    return found


def behind(run: Evaluation, region: Region, node: fx.Node, noise: Tensor) -> tuple[Norm | None, float]:
    """The norm between a sublayer's last product and the residual addition, None where there is none, and a factor.

    Raises:
        ValueError: something else is there.
    """
    zero = torch.zeros(run.sizes(region.entry)).to(dtype_of(region.entry))
    shaped = noise.reshape(run.sizes(node))
    found = run.one(region.exit, {region.entry: zero, node: shaped.to(dtype_of(node))}).reshape(noise.shape)
    factor = float((found * noise).sum() / (noise * noise).sum())
    if relative(found, factor * noise) <= 10 * accuracy(run.graph):
        return None, factor if abs(factor - 1) > accuracy(run.graph) else 1.0
    norm = read_norm(run, node, region.exit, {region.entry: zero}, shaped)
    if isinstance(norm, str):
        raise ValueError(f"between its last product and the residual, {norm}")
    return norm, 1.0


def _is_transposed(node: fx.Node) -> bool:
    """Whether positions are the last dimension, as a product with queries wants keys."""
    return not isinstance(node.meta["val"].shape[-1], int)


def _same(one: Rotation | None, other: Rotation | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one.pairs, other.pairs) and relative(one.angles, other.angles) < 1e-5

