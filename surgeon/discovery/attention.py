"""Softmax attention, fused or spelled out, and the projections around it.

1. Fused: one scaled-dot-product node; query, key, value are its first three arguments.
2. Spelled out: ``product(softmax(f(product(q, k))), v)`` where both products are of two activations and f is element-wise
   work (scale, mask, soft cap), movement, or concatenation (sinks).

Projections are found by walking back from query, key and value to the nearest linears: rotary arithmetic, norms and
movement lie in between.  A linear that feeds another one found this way (a latent that is expanded) is not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from surgeon.discovery import operators
from surgeon.discovery.flow import Flow
from surgeon.discovery.linears import Linears
from surgeon.structure import Attention, Linear


@dataclass(frozen=True)
class Core:
    """The part of an attention without weights: ``node`` mixes the values of v by the similarity of q and k."""

    node: fx.Node
    q: fx.Node
    k: fx.Node
    v: fx.Node
    head_dim: int
    causal: bool | None


def find_attentions(
    flow: Flow, linears: Linears, path: frozenset[fx.Node], entry: fx.Node
) -> tuple[list[Attention], list[str]]:
    """Attentions of a region.

    Args:
        flow: the graph's data flow.
        linears: its linears.
        path: nodes on paths through the region.
        entry: the cut where it starts.

    Returns:
        The attentions in graph order, and for each projection that was not found the reason.
    """
    found, reasons = [], []
    for node in flow.ordered(path):
        core = _fused(flow, node) if operators.kind(node) in operators.ATTENTIONS else _spelled(flow, node)
        if core is not None:
            attention, missing = _attention(flow, linears, path, entry, core)
            found.append(attention)
            reasons.extend(missing)
    return found, reasons


def _fused(flow: Flow, node: fx.Node) -> Core | None:
    q, k, v = node.args[:3]
    if not (isinstance(q, fx.Node) and isinstance(k, fx.Node) and isinstance(v, fx.Node)):
        return None
    position = 5 if operators.kind(node) == "aten::scaled_dot_product_attention" else 4
    mask = operators.argument(node, 3, "attn_mask")
    causal: bool | None = bool(operators.argument(node, position, "is_causal", False))
    if not causal and isinstance(mask, fx.Node):
        causal = None
    return Core(node, q, k, v, operators.shape(q)[-1], causal)


def _product(flow: Flow, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The two activations that a node multiplies as matrices."""
    name = operators.kind(node)
    if name in ("aten::matmul", "aten::bmm", "aten::mm"):
        operands = node.args[:2]
    elif name in ("aten::baddbmm", "aten::addmm"):
        operands = node.args[1:3]
    elif name == "aten::einsum" and isinstance(node.args[1], list | tuple) and len(node.args[1]) == 2:
        operands = tuple(node.args[1])
    else:
        return None
    left, right = operands
    if not (isinstance(left, fx.Node) and isinstance(right, fx.Node)) or left in flow.constant or right in flow.constant:
        return None
    return left, right


def _spelled(flow: Flow, node: fx.Node) -> Core | None:
    """Case 2, from the second product back."""
    operands = _product(flow, node)
    if operands is None:
        return None
    for weights, v in (operands, operands[::-1]):
        softmax = flow.strip(weights, lambda n: operators.is_movement(n) or _is_scaling(n))
        if operators.kind(softmax) not in operators.SOFTMAXES:
            continue
        scores, masked = _scores(flow, softmax)
        if scores is None:
            continue
        left, right = _product(flow, scores) or (scores, scores)
        q, k = (left, right) if _rows_are_queries(flow, scores, softmax) else (right, left)
        return Core(node, q, k, v, _contracted(scores, q), None if masked else False)
    return None


def _is_scaling(node: fx.Node) -> bool:
    return operators.kind(node) in ("aten::mul", "aten::div", "aten::where", "aten::masked_fill")


def _scores(flow: Flow, softmax: fx.Node) -> tuple[fx.Node | None, bool]:
    """The product behind a softmax, and whether a mask or bias was added on the way."""
    masked = False
    seen: set[fx.Node] = set()
    stack = [n for n in softmax.all_input_nodes if n in flow]
    products: list[fx.Node] = []
    while stack:
        node = stack.pop()
        if node in seen or node in flow.constant:
            continue
        seen.add(node)
        if _product(flow, node) is not None:
            masked |= operators.kind(node) in ("aten::baddbmm", "aten::addmm") and bool(node.kwargs.get("beta", 1))
            products.append(node)
        elif operators.is_pointwise(node) or operators.is_movement(node) or operators.kind(node) == operators.CONCATENATE:
            name = operators.kind(node)
            masked |= name in ("aten::where", "aten::masked_fill", operators.ADD) and len(node.all_input_nodes) > 1
            stack.extend(flow.inputs(node))
    return (products[0] if len(products) == 1 else None), masked


def _rows_are_queries(flow: Flow, scores: fx.Node, softmax: fx.Node) -> bool:
    """Whether the first operand of the scores is the query: the softmax runs over the keys, the last dimension then.

    In an einsum the query is the operand that carries the last letter of the output no more than the other does.
    """
    if operators.kind(scores) != "aten::einsum":
        return True
    equation = str(scores.args[0]).replace(" ", "")
    inputs, _, output = equation.partition("->")
    first, _, _ = inputs.partition(",")
    axis = int(operators.argument(softmax, 1, "dim", -1))
    return output[axis] not in first if abs(axis) <= len(output) else True


def _contracted(scores: fx.Node, q: fx.Node) -> int:
    """Size of the dimension that a product of queries and keys sums over."""
    if operators.kind(scores) != "aten::einsum":
        return operators.shape(q)[-1]
    inputs, _, output = str(scores.args[0]).replace(" ", "").partition("->")
    first, _, second = inputs.partition(",")
    tensors = scores.args[1]
    assert isinstance(tensors, list | tuple)
    letters = first if tensors[0] is q else second
    summed = [size for letter, size in zip(letters, operators.shape(q), strict=False) if letter not in output]
    return summed[-1] if summed else operators.shape(q)[-1]


def _attention(
    flow: Flow, linears: Linears, path: frozenset[fx.Node], entry: fx.Node, core: Core
) -> tuple[Attention, list[str]]:
    reasons: list[str] = []
    projections: list[Linear | None] = []
    for role, argument in (("query", core.q), ("key", core.k), ("value", core.v)):
        linear, reason = _projection(flow, linears, entry, argument)
        projections.append(linear)
        if linear is None:
            reasons.append(f"{role} of {core.node.name}: {reason}")
    q, k, v = projections
    outputs = _following(flow, linears, path, core.node)
    o = linears.whole[outputs[0]] if len(outputs) == 1 else None
    if o is None:
        reasons.append(
            f"output of {core.node.name}: {len(outputs)} linears follow it in the region, needed exactly one"
        )
    heads = _heads(core.q, q, core.head_dim)
    kv_heads = _heads(core.k, k, core.head_dim)
    cross = not flow.depends(core.k, entry) and flow.depends(core.q, entry)
    return Attention(core.node, q, k, v, o, heads, min(heads, kv_heads), core.head_dim, core.causal, cross), reasons


def _heads(argument: fx.Node, linear: Linear | None, head_dim: int) -> int:
    """Number of heads: features of the projection over the head's size; the tensor's own head dimension otherwise."""
    sizes = operators.shape(argument)
    if linear is not None and linear.out_features % head_dim == 0:
        return linear.out_features // head_dim
    return sizes[-3] if len(sizes) > 3 else 1


def _projection(flow: Flow, linears: Linears, entry: fx.Node, argument: fx.Node) -> tuple[Linear | None, str]:
    inside = flow.depends(argument, entry)
    found: set[fx.Node] = set()
    seen: set[fx.Node] = set()
    stack = [argument]
    blocked: fx.Node | None = None
    while stack:
        node = stack.pop()
        if node in seen or node is entry or (inside and not flow.depends(node, entry)):
            continue
        seen.add(node)
        if node in linears.whole:
            found.add(node)
        elif _product(flow, node) is not None or operators.kind(node) in operators.SOFTMAXES | operators.ATTENTIONS:
            blocked = node
        elif operators.kind(node) in operators.LOOKUPS and not flow.inputs(node):
            blocked = node
        else:
            stack.extend(flow.inputs(node))
    last = [n for n in found if not any(other is not n and flow.depends(other, n) for other in found)]
    if len(last) == 1:
        linear = linears.whole[last[0]]
        if len(found) > 1:  # part of it comes past the expansion, e.g. a rotary key shared by all heads
            return linear, ""
        return linears.part(linear, argument), ""
    if last:
        return None, f"it is computed from {len(last)} linears ({', '.join(sorted(n.name for n in last))}), needed one"
    return None, f"no linear lies between {entry.name} and {argument.name}" + (f"; {blocked.name} blocks" if blocked else "")


def _following(flow: Flow, linears: Linears, path: frozenset[fx.Node], node: fx.Node) -> list[fx.Node]:
    """The first linears that read a node, nothing but other linears stopping the search."""
    found: list[fx.Node] = []
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        here = stack.pop()
        for user in here.users:
            if user in seen or user not in path:
                continue
            seen.add(user)
            if user in linears.whole:
                found.append(user)
            else:
                stack.append(user)
    return found
