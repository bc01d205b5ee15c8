"""Is a region a mixture of experts?  Decided by running both on random inputs, weights and routings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from surgeon.activations import ACTIVATIONS
from surgeon.discovery import operators
from surgeon.errors import RewriteError
from surgeon.gates import Gate, gate, recognise_alone, recognise_gate
from surgeon.ops import moe
from surgeon.raising.cuts import Routing, parts, sample
from surgeon.raising.region import Region, is_size
from surgeon.raising.weights import Piece, Roles, find_roles, find_stacks

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest difference relative to the largest value, by the region's own type."""

LARGEST = 1 << 28
"""Weights of one region above which random ones are not made for a proof (a gibibyte in float32)."""


@dataclass(frozen=True)
class Mixture:
    """A region that equals ``surgeon::moe``.

    Attributes:
        region: the region.
        x: its input.
        routing: what its router hands over.
        bases: terms that are added to the experts' sum.
        roles: its weights.
        activation: name of the gate.
        scaled: the weights multiply the experts' inputs instead of their outputs.
        beyond: what a number beyond the experts does: ``error``, or it selects ``nothing``, or ``something``.
    """

    region: Region
    x: fx.Node
    routing: Routing
    bases: tuple[fx.Node, ...]
    roles: Roles
    activation: str
    scaled: bool
    beyond: str = "error"


@dataclass
class Trial:
    """One region with one cut.

    Attributes:
        region: the region; complete.
        x: input node.
        routing: the routing nodes of the cut.
        bases: nodes of the cut that are added; zeros in every run.
    """

    region: Region
    x: fx.Node
    routing: Routing
    bases: tuple[fx.Node, ...]

    def __post_init__(self) -> None:
        self.width = operators.shape(self.x)[-1]
        self.out_width = operators.shape(self.region.exit)[-1]
        self.tokens = _count(self.x) // self.width
        self.dtype = operators.value(self.region.exit).dtype

    @cached_property
    def like(self) -> dict[str, Tensor]:
        """The region's weights by name."""
        graph = self.region.flow.graph
        return {name: graph.tensor(name) for name in self.region.names}

    # -- weights ------------------------------------------------------------------------------------------------

    def roles(self) -> Iterator[Roles]:
        """Assignments of the region's weights that its shapes allow."""
        shapes = {name: tuple(int(size) for size in tensor.shape) for name, tensor in self.like.items()}
        flow = self.region.flow
        reads = [node for node in self.region.program if node.op == "get_attr"]
        tables = {str(node.target) for node in reads if any(flow.retrieves(user) for user in node.users)}
        for stacks in find_stacks(shapes, self._views(), tables):
            yield from find_roles(stacks, self.width, self.out_width)

    def _views(self) -> dict[str, tuple[int, ...]]:
        """Matrices that are first read as [E, A, B]."""
        found: dict[str, tuple[int, ...]] = {}
        for node in self.region.program:
            if node.op == "get_attr" and len(operators.shape(node)) == 2:
                shapes = {operators.shape(user) for user in node.users if operators.kind(user) == "aten::reshape"}
                if len(shapes) == 1 and len(node.users) == 1 and len(next(iter(shapes))) == 3:
                    found[str(node.target)] = next(iter(shapes))
                apart = parts(node)
                if apart is not None and len(shapes) == 0:
                    found[str(node.target)] = apart
        return found

    def random(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Random values for the stored weights."""
        return {
            name: (torch.randn(tensor.shape, generator=generator) / max(tensor.shape[-1], 1) ** 0.5).to(tensor.dtype)
            for name, tensor in self.like.items()
        }

    # -- runs ---------------------------------------------------------------------------------------------------

    def run(self, x: Tensor, values: dict[fx.Node, Tensor], tensors: dict[str, Tensor]) -> Tensor:
        """The region on x [T, H] -> [T, G] in float64."""
        given = {self.x: x.to(operators.value(self.x).dtype).reshape(operators.shape(self.x)), **values}
        for base in self.bases:
            given[base] = torch.zeros(operators.shape(base), dtype=operators.value(base).dtype)
        return self.region.run(given, tensors).reshape(self.tokens, self.out_width).double()

    def vanishes(self, experts: int) -> bool:
        """A cheap test in front: without weights the sum is nothing, with weights it is something."""
        node = self.routing.source if self.routing.kind in ("dense", "slots", "bound") else self.routing.weight
        if node is None:
            return True
        generator = torch.Generator().manual_seed(1)
        tensors = self.random(generator)
        values, _, _ = sample(self.routing, self.tokens, experts, generator)
        x = torch.randn(self.tokens, self.width, generator=generator, dtype=torch.float64)
        try:
            some = self.run(x, values, tensors)
            none = self.run(x, {**values, node: torch.zeros_like(values[node])}, tensors)
        except (RuntimeError, IndexError, RewriteError):  # an index of the wrong kind
            return False
        return float(none.abs().max()) <= 1e-6 * float(some.abs().max()) and float(some.abs().max()) > 0

    def solve(self) -> Mixture | str:
        """The roles and the activation under which the region is a mixture, or why there are none."""
        if sum(tensor.numel() for tensor in self.like.values()) > LARGEST:
            return f"its weights are too large for a proof on random ones ({self._shapes()})"
        limit = self._limit()
        if limit is not None:
            return f"{limit.name} = {operators.kind(limit)} holds tokens against a limit, which belongs to the routing"
        candidates = [r for r in self.roles() if self._fits(r.second.stack.shape[0])]
        if not candidates:
            return self.misfit()
        if not self.vanishes(candidates[0].second.stack.shape[0]):
            return "it is no sum over experts with the router's weights as factors"
        for roles in candidates:
            for scaled in (False, True):
                if scaled and self.routing.kind != "dense" and (self.routing.kind != "index" or self.routing.weight is None):
                    continue
                name = self._activation(roles, scaled)
                if name is None:
                    continue
                beyond = self._beyond(roles, scaled, name)
                return Mixture(self.region, self.x, self.routing, self.bases, roles, name, scaled, beyond)
        return "on random inputs it equals no sum of experts with a known activation"

    def _beyond(self, roles: Roles, scaled: bool, name: str) -> str:
        """What numbers beyond the experts do, see :class:`Mixture`."""
        if self.routing.kind != "index":
            return "error"
        generator = torch.Generator().manual_seed(5)
        tensors = self.random(generator)
        weights = tuple(None if t is None else t.double() for t in roles.load(tensors))
        experts = roles.second.stack.shape[0]
        values, index, weight = sample(self.routing, self.tokens, experts, generator)
        stray = torch.rand(index.shape, generator=generator) < 0.5
        x = torch.randn(self.tokens, self.width, generator=generator, dtype=torch.float64)
        x = x.to(operators.value(self.x).dtype).double()
        expected = _mixture(x, index, weight.masked_fill(stray, 0.0), weights, name, scaled)
        source = self.routing.source

        def outcome(number: Tensor) -> str:
            given = torch.where(stray, number, index).to(operators.value(source).dtype)
            try:
                found = self.run(x, {**values, source: given.reshape(operators.shape(source))}, tensors)
            except (RuntimeError, IndexError, RewriteError):
                return "error"
            return "nothing" if _equal(expected, found, self.dtype) else "something"

        every = outcome(index + experts * (1 + index % 2))  # E to 3 E - 1
        if every != "error":
            return every
        found = "error"
        for number in range(experts, 3 * experts):  # the router may know some numbers more than there are experts
            one = outcome(torch.full_like(index, number))
            if one == "error":
                return found
            found = one if found != "something" else found
        return found

    def _activation(self, roles: Roles, scaled: bool) -> str | None:
        generator = torch.Generator().manual_seed(2)
        tensors = self.random(generator)
        w_in, w_out, b_in, b_out = (None if t is None else t.double() for t in roles.load(tensors))
        assert w_in is not None
        assert w_out is not None
        experts = w_in.shape[0]
        values, index, weight = sample(self.routing, self.tokens, experts, generator)
        x = torch.randn(self.tokens, self.width, generator=generator, dtype=torch.float64)
        x = x.to(operators.value(self.x).dtype).double()
        try:
            expected = self.run(x, values, tensors)
        except (RuntimeError, IndexError, RewriteError):  # an index of the wrong kind
            return None
        second = _few(x[:4], index[:4], weight[:4], (w_in, w_out, b_in, b_out), scaled)
        for name in [*ACTIVATIONS, None]:
            if name is None:
                found = self._constants(roles, scaled)
                if found is None:
                    return None
                name = found.name
            weights = (w_in, w_out, b_in, b_out)
            if not _equal(second(name), expected[:4], self.dtype):
                continue
            if not _equal(_mixture(x, index, weight, weights, name, scaled), expected, self.dtype):
                continue
            values, index, weight = sample(self.routing, self.tokens, w_in.shape[0], generator, crowded=True)
            crowded = _mixture(x, index, weight, weights, name, scaled)
            return name if _equal(crowded, self.run(x, values, tensors), self.dtype) else None
        return None

    def fits(self, known: dict[Any, set[int]]) -> bool:
        """Whether the weights are matrices and biases of as many experts as the router knows, by their shapes.

        Args:
            known: numbers of experts that weights may belong to, which regions of the same weights share; filled in.
        """
        key = (self.region.names, self.width, self.out_width)
        if key not in known:
            known[key] = {roles.second.stack.shape[0] for roles in self.roles()}
        return any(self._fits(experts) for experts in known[key])

    def misfit(self) -> str:
        """Why the weights are none of experts."""
        return f"its weights are not matrices [E, ., .] of two or three kinds with biases: {self._shapes()}"

    def _shapes(self) -> str:
        return ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in list(self.like.items())[:6])

    def _limit(self) -> fx.Node | None:
        """Where a running count is compared with a number: tokens are dropped by something inside of the region."""
        counted: set[fx.Node] = set()
        for node in self.region.program:
            if operators.kind(node) == "aten::cumsum" and not operators.is_float(node):
                counted.add(node)
            elif any(source in counted for source in node.all_input_nodes):
                other = node.args[1] if len(node.args) > 1 else None
                number = isinstance(other, int | float) or (isinstance(other, fx.Node) and is_size(other))
                if operators.kind(node) in operators.COMPARISONS and number:
                    return node
                if operators.is_pointwise(node) or operators.is_movement(node):
                    counted.add(node)
        return None

    def holds_one_each(self) -> bool:
        """Whether places hold one token at most, those whose weights are not zero, shown on random and on equal inputs."""
        flow, source, ones = self.region.flow, self.routing.source, self.routing.weight
        regions = [Region(flow, node, (self.x,)) for node in self.routing.nodes]
        if not all(region.complete for region in regions):
            return False
        generator = torch.Generator().manual_seed(6)
        for crowded in (False, True):
            x = torch.randn(operators.shape(self.x), generator=generator).to(operators.value(self.x).dtype)
            x = x.flatten(0, -2)[:1].expand(self.tokens, -1).reshape(x.shape) if crowded else x
            tensors = self.random(generator) | {
                name: torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
                for region in regions
                for name, tensor in ((name, flow.graph.tensor(name)) for name in region.names)
            }
            values = [region.run({self.x: x}, tensors) for region in regions]
            held = values[0].reshape(operators.shape(source)).ne(0)
            if not bool((held.sum(-3) <= 1).all()) or not bool((held.sum(-1) <= 1).all()):
                return False
            if ones is not None and not torch.equal(values[1].reshape(held.shape).double(), held.double()):
                return False
        return True

    def _fits(self, experts: int) -> bool:
        """Whether the router can be one for so many experts."""
        if self.routing.kind in ("dense", "choice", "slots", "bound"):
            return self.routing.k == experts
        if self.routing.kind == "mask":
            return operators.shape(self.routing.source)[-1] == experts
        return self.routing.k <= experts

    def _constants(self, roles: Roles, scaled: bool) -> Gate | None:
        """The gate with constants, read off runs in which single neurons see chosen values."""
        rows, columns = min(self.tokens, self.width), min(_inner(roles, self.like), self.out_width)
        shapes = [None if t is None else t.shape for t in roles.load(self.like)]
        generator = torch.Generator().manual_seed(3)

        def function(g: Tensor, u: Tensor) -> Tensor:
            pieces = zip(torch.split(g, rows * columns), torch.split(u, rows * columns), strict=True)
            return torch.cat([part(a, b) for a, b in pieces])

        def part(g: Tensor, u: Tensor) -> Tensor:
            # Token t is the t-th unit vector, so that column t of the first matrix holds what its neurons see.
            canonical = [None if s is None else torch.zeros(s, dtype=torch.float64) for s in shapes]
            w_in, w_out = canonical[0], canonical[1]
            assert w_in is not None
            assert w_out is not None
            block = torch.zeros(2, rows * columns, dtype=torch.float64)
            block[0, : g.numel()], block[1, : u.numel()] = g, u
            inner = w_out.shape[2]
            w_in[:, :columns, :rows] = block[0].reshape(rows, columns).T
            if roles.gated:
                w_in[:, inner : inner + columns, :rows] = block[1].reshape(rows, columns).T
            w_out[:, torch.arange(columns), torch.arange(columns)] = 1.0
            tensors = {n: t.to(self.like[n].dtype) for n, t in roles.store(canonical, self.like).items()}
            values, _, weight = sample(self.routing, self.tokens, w_in.shape[0], generator)
            if self.routing.weight is not None:
                values[self.routing.weight] = torch.ones_like(values[self.routing.weight])
            if self.routing.kind in ("dense", "bound"):
                values[self.routing.source] = torch.ones_like(values[self.routing.source])
            x = torch.eye(self.tokens, self.width, dtype=torch.float64)
            weight = torch.ones_like(weight) if self.routing.kind == "bound" else weight
            share = weight.ne(0).sum(1, keepdim=True)  # all weights are one: each token sees as many equal experts
            found = self.run(x, values, tensors) / share.clamp(min=1)
            return found[:rows, :columns].reshape(-1)[: g.numel()]

        try:
            return recognise_gate(function) if roles.gated else recognise_alone(lambda g: function(g, g))
        except (RuntimeError, IndexError, RewriteError):
            return None


def transfer(known: Mixture, trial: Trial) -> Mixture:
    """The same mixture in a region of equal signature: a proof holds for all of them."""
    names = dict(zip(known.region.names, trial.region.names, strict=True))

    def renamed(piece: Piece) -> Piece:
        return replace(piece, stack=replace(piece.stack, names=tuple(names[n] for n in piece.stack.names)))

    roles = replace(
        known.roles,
        first=tuple(renamed(piece) for piece in known.roles.first),
        second=renamed(known.roles.second),
        first_bias=tuple(renamed(piece) for piece in known.roles.first_bias),
        second_bias=None if known.roles.second_bias is None else renamed(known.roles.second_bias),
    )
    return replace(known, region=trial.region, x=trial.x, routing=trial.routing, bases=trial.bases, roles=roles)


def _mixture(x: Tensor, index: Tensor, weight: Tensor, weights: tuple[Tensor | None, ...], name: str, scaled: bool) -> Tensor:
    """What ``surgeon::moe`` computes, [T, G]."""
    w_in, w_out, b_in, b_out = weights
    assert w_in is not None
    assert w_out is not None
    if not scaled:
        y: Tensor = moe(x, index, weight, w_in, w_out, b_in, b_out, name)
        return y
    rows = (x[:, None] * weight[..., None]).flatten(0, 1)
    each: Tensor = moe(rows, index.reshape(-1, 1), torch.ones(rows.shape[0], 1, dtype=x.dtype), w_in, w_out, b_in, b_out, name)
    return each.reshape(*index.shape, -1).sum(1)


def _few(
    x: Tensor, index: Tensor, weight: Tensor, weights: tuple[Tensor | None, ...], scaled: bool
) -> Callable[[str], Tensor]:
    """As :func:`_mixture` for few tokens, as a function of the activation: what comes before it is computed once."""
    w_in, w_out, b_in, b_out = weights
    assert w_in is not None
    assert w_out is not None
    rows = x[:, None] * weight[..., None] if scaled else x[:, None].expand(*index.shape, -1)
    pre = (w_in[index] @ rows[..., None]).squeeze(-1)  # [T, k, O]
    pre = pre if b_in is None else pre + b_in[index]
    matrix, inner = w_out[index], w_out.shape[2]
    share = torch.ones_like(weight) if scaled else weight

    def outputs(name: str) -> Tensor:
        found = gate(name)
        hidden = found.alone(pre) if pre.shape[-1] == inner else found.joined(*pre.chunk(2, dim=-1))
        each = (matrix @ hidden[..., None]).squeeze(-1)
        each = each if b_out is None else each + b_out[index]
        return (each * share[..., None]).sum(1)

    return outputs


def _equal(found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    scale = float(expected.abs().max())
    if not torch.isfinite(expected).all() or not torch.isfinite(found).all():
        return False
    return scale > 0 and float((found - expected).abs().max()) <= TOLERANCE.get(dtype, 1e-5) * scale


def _count(node: fx.Node) -> int:
    result = 1
    for size in operators.shape(node):
        result *= size
    return result


def _inner(roles: Roles, like: dict[str, Tensor]) -> int:
    piece = roles.second
    return piece.stack.shape[1] if piece.transposed else piece.stack.shape[2]
