"""Routers of mixtures as one kernel each (``_cuda_routing``), found in the spelling that the graph has.

What a top-k along experts reads and what is made of what it gives, in ATen, in this order and each step but the top-k optional:

    z = linear(x, router[, bias])
    s = softmax(z) | sigmoid(z)
    c = s + correction                                  a stored vector
    chosen = topk(c, k)
    p = the chosen of c (the values of the top-k), or of z, s or c gathered
    p = softmax(p) | sigmoid(p)                         over the chosen
    p = p / (sum(p)[ + epsilon])
    p = p * scale

with casts between float types anywhere, by which the kernel rounds.  So softmax before or behind the top-k, sigmoid with a
correction that only selects, normalised or not, are one form.  The match ends where something else reads a step: what cannot
be the kernel's stays as it is.  Where the router's product is shared with other linears, low-bit or large, the kernel starts
from z.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from surgeon.backends._aot_cuda import either
from surgeon.graph import Graph

aten = torch.ops.aten
_KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""Numbers of types, as the kernel has them."""
_SCORINGS: dict[Any, int] = {aten.softmax.int: 1, aten.sigmoid.default: 2}
_MOST_CHOSEN, _MOST_EXPERTS = 16, 1024
"""What one program goes through in registers."""
_Z, _S, _C, _P, _N, _M = range(6)
"""Steps: places in ``kinds`` of ``_cuda_routing.route_rows``."""


class Form(NamedTuple):
    """What a router does behind its product; fields as arguments of ``_cuda_routing.route_rows``."""

    k: int
    scoring: int
    weighing: int
    source: int
    normalised: bool
    epsilon: float
    scale: float
    kinds: tuple[int, ...]
    dtype: torch.dtype


@dataclass
class _Match:
    """A router in a graph.

    Attributes:
        inside: nodes that the kernel replaces.
        x: what it reads: the router's input, or its output where ``router`` is None.
        router, bias, correction: stored tensors, or None.
        index: node of the chosen experts.
        weight: node of their weights.
        read: nodes in front of the choice, with the step whose result they are.
    """

    k: int
    inside: set[fx.Node] = field(default_factory=set)
    x: fx.Node | None = None
    router: fx.Node | None = None
    bias: fx.Node | None = None
    correction: fx.Node | None = None
    index: fx.Node | None = None
    weight: fx.Node | None = None
    scoring: int = 0
    weighing: int = 0
    source: int = _C
    normalised: bool = False
    epsilon: float = 0.0
    scale: float = 1.0
    kinds: list[int] = field(default_factory=lambda: [0] * 6)
    read: dict[fx.Node, int] = field(default_factory=dict)

    @property
    def form(self) -> Form:
        """What the kernel computes."""
        assert self.weight is not None
        return Form(
            self.k, self.scoring, self.weighing, self.source, self.normalised, self.epsilon, self.scale, tuple(self.kinds),
            self.weight.meta["val"].dtype,
        )  # fmt: skip

    def holds(self, node: fx.Node, step: int) -> bool:
        """Note in what type a step's result is held; False where its types are of two kinds that round differently."""
        kind = _KINDS.get(node.meta["val"].dtype, -1)
        if kind < 0 or (kind and self.kinds[step] not in (0, kind)):
            return False
        self.kinds[step] = kind or self.kinds[step]
        return True

    def back(self, node: Any, step: int) -> fx.Node | None:
        """The node in front of casts of a step's result, which are taken inside."""
        while isinstance(node, fx.Node):
            if not self.holds(node, step):
                return None
            self.read[node] = step
            if not _casts(node):
                return node
            self.inside.add(node)
            node = node.args[0]
        return None


def routed(graph: Graph) -> int:
    """Replace the routers of a graph that lowering made for itself by calls of :func:`route`, in place.

    Returns:
        How many there were.
    """
    nodes = graph.module.graph
    found = 0
    for top in list(nodes.find_nodes(op="call_function", target=aten.topk.default)):
        match = _match(top)
        if match is not None:
            _replace(nodes, top, match)
            found += 1
    if found:
        nodes.lint()
        graph.module.recompile()
    return found


def route(
    x: Tensor, router: Tensor | None, bias: Tensor | None, correction: Tensor | None, form: Form
) -> tuple[Tensor, Tensor]:
    """Weights [T, k] and experts [T, k]: of the router's input x [..., H], or without ``router`` of its output [T, E]."""
    from surgeon.backends._cuda_routing import TOKENS, route_logits, route_rows

    *rest, kinds, dtype = form
    if router is None:
        dense = x if x.stride(-1) == 1 else x.contiguous()
        found: tuple[Tensor, Tensor] = route_logits(dense, correction, *rest, list(kinds), dtype)
        return found

    def few(x: Tensor, router: Tensor, bias: Tensor | None, correction: Tensor | None) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = route_rows(x, router, bias, correction, *rest, list(kinds), dtype)
        return found

    def many(x: Tensor, router: Tensor, bias: Tensor | None, correction: Tensor | None) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = route_logits(F.linear(x, router, bias), correction, *rest, list(kinds), dtype)
        return found

    rows = x.reshape(-1, x.shape[-1]).contiguous()
    result: tuple[Tensor, Tensor] = either(rows.shape[0] <= TOKENS, few, many, [rows, router.contiguous(), bias, correction])
    return result


def _match(top: fx.Node) -> _Match | None:
    """The router around a top-k."""
    arguments: tuple[Any, ...] = top.args
    defaults: tuple[Any, ...] = (None, 0, -1, True, True)
    scores, k, dim, largest, _ = arguments + defaults[len(arguments) :]
    value = scores.meta["val"]
    experts = value.shape[-1]
    if value.dim() != 2 or dim not in (-1, 1) or not largest or top.kwargs or not isinstance(experts, int):
        return None
    if not isinstance(k, int) or not 0 < k <= min(_MOST_CHOSEN, experts) or experts > _MOST_EXPERTS:
        return None
    match = _Match(k, inside={top})
    if not _in_front(match, scores, experts) or not _behind(match, top):
        return None
    _product(match, experts)
    outer = match.inside | {match.index, match.weight}
    return match if all(user in outer for node in match.inside for user in node.users) else None


# -- in front of the choice ---------------------------------------------------------------------------------------------


def _in_front(match: _Match, scores: fx.Node, experts: int) -> bool:
    """Walk back from what the top-k reads to z; False where types do not fit."""
    end_of_s = end_of_z = scores
    vector = _corrected(_uncast(scores), experts)
    if vector is not None:
        node = match.back(scores, _C)
        if node is None:
            return False
        match.inside.add(node)
        match.correction, end_of_s = vector
        end_of_z = end_of_s
    scored = _uncast(end_of_s)
    if scored.target in _SCORINGS and _along_rows(scored):
        node = match.back(end_of_s, _S)
        if node is None:
            return False
        match.inside.add(node)
        match.scoring, end_of_z = _SCORINGS[node.target], node.all_input_nodes[0]
    match.x = match.back(end_of_z, _Z)
    return match.x is not None


def _uncast(node: fx.Node) -> fx.Node:
    return _uncast(node.all_input_nodes[0]) if _casts(node) else node


def _corrected(node: fx.Node, experts: int) -> tuple[fx.Node, fx.Node] | None:
    """A stored vector [E] and what it is added to."""
    if node.target is not aten.add.Tensor or node.kwargs:
        return None
    for vector, other in (node.args[::-1], node.args):
        if isinstance(vector, fx.Node) and vector.op == "get_attr" and isinstance(other, fx.Node):
            if tuple(vector.meta["val"].shape) in ((experts,), (1, experts)):
                return vector, other
    return None


def _product(match: _Match, experts: int) -> None:
    """Take the router's product inside where it is a small linear that nothing else reads."""
    from surgeon.backends._cuda_routing import NUMBERS

    linear: Any = match.x
    way = {linear}
    while linear.target in (aten.reshape.default, aten.view.default) and linear.args[0].meta["val"].shape[-1] == experts:
        linear = linear.args[0]
        way.add(linear)
    if linear.target is not aten.linear.default:
        return
    x, router, bias = (*linear.args, None)[:3]
    if any(part is not None and part.op != "get_attr" for part in (router, bias)):
        return
    alone = all(user in match.inside | way for node in way for user in node.users)
    if alone and router.meta["val"].numel() <= NUMBERS and router.meta["val"].dtype == x.meta["val"].dtype:
        match.inside |= way
        match.x, match.router, match.bias = x, router, bias


# -- behind it ----------------------------------------------------------------------------------------------------------


def _behind(match: _Match, top: fx.Node) -> bool:
    """Walk on from what the top-k gives; False where its parts are read in a way that is no router's."""
    parts = {user.args[1]: user for user in top.users if user.target is operator.getitem}
    match.index = parts.get(1)
    values = parts.get(0)
    if match.index is None or len(parts) != len(top.users):
        return False
    node = values
    gathers = [user for user in match.index.users if _gathers(match, user)]
    if node is None or not node.users:
        if len(gathers) != 1:
            return False
        node = gathers[0]
        match.source = match.read[node.all_input_nodes[0]]
        match.inside |= {values} if values is not None else set()
    if not match.holds(node, _P):
        return False
    step = _P
    while (found := _next(match, node, step)) is not None:
        match.inside.add(node)
        node, step = found
    match.weight = node
    match.inside.discard(node)
    return True


def _gathers(match: _Match, node: fx.Node) -> bool:
    """Whether a node reads what a step in front of the choice gives for the chosen, as the kernel holds it."""
    if node.target is not aten.gather.default or node.args[1] not in (-1, 1) or node.args[2] is not match.index:
        return False
    source = node.all_input_nodes[0]
    step = match.read.get(source)
    rounded = step is not None and all(not _casts(user) or _holds_all(user, source) for user in source.users)
    return rounded and source.meta["val"].dim() == 2


def _holds_all(wide: fx.Node, narrow: fx.Node) -> bool:
    """Whether a cast changes no number."""
    return _KINDS[wide.meta["val"].dtype] in (0, _KINDS[narrow.meta["val"].dtype])


def _next(match: _Match, node: fx.Node, step: int) -> tuple[fx.Node, int] | None:
    """The node that a step further makes of the weights, which nothing else reads; and that step."""
    users = list(node.users)
    if len(users) == 2 and step < _N:
        return _quotient(match, node)
    if len(users) != 1:
        return None
    (user,) = users
    following: int | None = None
    if _casts(user):
        following = step
    elif step == _P and not match.weighing and user.target in _SCORINGS and _along_rows(user):
        following = _P
    elif step < _M and user.target is aten.mul.Tensor and isinstance(user.args[1], int | float) and not user.kwargs:
        following = _M
    if following is None or not match.holds(user, following):
        return None
    if user.target in _SCORINGS:
        match.weighing = _SCORINGS[user.target]
    if following == _M and not _casts(user):
        match.scale = float(user.args[1])  # type: ignore[arg-type]  # a number
    return user, following


def _quotient(match: _Match, node: fx.Node) -> tuple[fx.Node, int] | None:
    """The quotient by the sum over the chosen, where nothing reads that sum or the weights in front of it."""
    total = next((user for user in node.users if user.target is aten.sum.dim_IntList), None)
    if total is None or total.args[1:] not in (([-1], True), ([1], True)) or total.kwargs:
        return None
    taken, epsilon, last = {total}, 0.0, total
    (user, *others) = total.users
    if user.target is aten.add.Tensor and isinstance(user.args[1], int | float) and not user.kwargs and not others:
        epsilon, last = float(user.args[1]), user
        taken.add(user)
        (user, *others) = user.users
    divides = user.target is aten.div.Tensor and tuple(user.args) == (node, last) and not others and user in node.users
    if not divides or len({each.meta["val"].dtype for each in (*taken, user)}) > 1 or not match.holds(user, _N):
        return None
    match.normalised, match.epsilon = True, epsilon
    match.inside |= taken
    return user, _N


def _casts(node: fx.Node) -> bool:
    return node.target is aten._to_copy.default and set(node.kwargs) == {"dtype"} and node.meta["val"].dtype in _KINDS


def _along_rows(node: fx.Node) -> bool:
    """Whether a scoring is one of rows of two dimensions: single scores, or a softmax of the last dimension."""
    return node.target is aten.sigmoid.default or (node.meta["val"].dim() == 2 and node.args[1] in (-1, 1))


def _replace(nodes: fx.Graph, top: fx.Node, match: _Match) -> None:
    assert match.index is not None
    assert match.weight is not None
    with nodes.inserting_before(top):
        called = nodes.call_function(route, (match.x, match.router, match.bias, match.correction, match.form))
        results = [nodes.call_function(operator.getitem, (called, place)) for place in range(2)]
    called.meta["val"] = tuple(node.meta["val"] for node in (match.weight, match.index))
    for node, result in zip((match.weight, match.index), results, strict=True):
        result.meta = dict(node.meta)
        node.replace_all_uses_with(result)
    for node in reversed([node for node in nodes.nodes if node in match.inside or node in (match.weight, match.index)]):
        if not node.users:
            nodes.erase_node(node)
