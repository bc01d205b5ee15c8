"""The part of an attention that has no weights: values mixed by the similarity of queries and keys.

1. Fused: one scaled-dot-product node; query, key and value are its first three arguments.
2. Spelled out: ``product(f(product(q, k)), v)``, both products of two activations.  f is a softmax, in one node or as
   ``exp`` and a sum, or another function of single scores that is not linear, with scales, masks, soft caps, sinks and
   movement around it.  Without such a function the two products can be swapped, q (k v) = (q k) v, also where decays
   multiply the scores or their sums divide them: a linear attention or a state-space recurrence, another mixer.

The queries may be learned (latents, or the queries of a decoder's first layer): computed from stored tensors alone, by a
linear at least.  Such a product counts as the first one where no product of two activations is behind the weights; a constant
operand that has the keys, as the tables of relative positions beside them, is none.

Keys and values that are rows of stored tables, selected by numbers that the region computes, are no attention: they are
experts of single neurons, which are retrieved.

The dimension of the weights that the second product sums over are the keys.  Followed back through transpositions to the
first product, it tells keys from queries, whichever way round the products are written.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from torch import fx

from surgeon.discovery import operators
from surgeon.discovery.flow import Flow
from surgeon.discovery.linears import Linears


@dataclass(frozen=True)
class Core:
    """``node`` mixes the values of v by the similarity of q and k, which have ``head_dim`` features per head.

    ``heads``: as the dimensions of the scores beside batch, queries and keys say; 1 where there are none.
    """

    node: fx.Node
    q: fx.Node
    k: fx.Node
    v: fx.Node
    head_dim: int
    causal: bool | None
    heads: int


@dataclass(frozen=True)
class Product:
    """A product of two activations as matrices.

    Attributes:
        left, right: its operands.
        inner: the dimension of each that is summed over, counted from the end (-1 is the last).
        outer: the dimension of the result, counted from the end, that each operand alone has, None where there are several.
    """

    left: fx.Node
    right: fx.Node
    inner: tuple[int, int]
    outer: tuple[int | None, int | None]


_LINEAR = frozenset(f"aten::{name}" for name in "add sub mul div neg rsub where masked_fill maximum minimum".split())
"""Element-wise operators that a linear attention may have on its scores too: scales, masks, biases."""

_THROUGH = (
    operators.SOFTMAXES
    | operators.REDUCTIONS
    | {operators.CONCATENATE, "aten::constant_pad_nd", "aten::pad", "aten::as_strided", "aten::slice_scatter"}
)
"""What may stand between scores and weights beside element-wise work and movement."""


def find_cores(flow: Flow, linears: Linears, path: frozenset[fx.Node]) -> list[Core]:
    """The cores of a region, in graph order."""
    found = []
    for node in flow.ordered(path):
        core = _fused(node) if operators.kind(node) in operators.ATTENTIONS else _spelled(flow, linears, path, node)
        if core is not None:
            found.append(core)
    return found


def product(flow: Flow, node: fx.Node) -> Product | None:
    """The two activations that a node multiplies as matrices."""
    found = _matrices(node)
    return None if found is None or found.left in flow.constant or found.right in flow.constant else found


def _matrices(node: fx.Node) -> Product | None:
    """The two tensors, whatever they are computed from, that a node multiplies as matrices."""
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
    if not (isinstance(left, fx.Node) and isinstance(right, fx.Node)):
        return None
    if name == "aten::einsum":
        return _contraction(str(node.args[0]).replace(" ", ""), left, right)
    if min(len(operators.shape(left)), len(operators.shape(right))) < 2:
        return None
    return Product(left, right, (-1, -2), (-2, -1))


def _asked(flow: Flow, linears: Linears, node: fx.Node, axis: int) -> Product | None:
    """A product of an activation, which has the dimension ``axis`` of the result, and of learned queries."""
    found = _matrices(node)
    if found is None or axis not in found.outer:
        return None
    keys, queries = (found.left, found.right) if found.outer[0] == axis else (found.right, found.left)
    if keys in flow.constant or queries not in flow.constant or not any(flow.depends(queries, n) for n in linears.learned):
        return None
    return found


def _contraction(equation: str, left: fx.Node, right: fx.Node) -> Product | None:
    """An einsum of two tensors that sums over one letter of both."""
    inputs, _, output = equation.partition("->")
    first, _, second = inputs.partition(",")
    summed = [letter for letter in first if letter in second and letter not in output]
    if len(summed) != 1 or "." in first.split(summed[0])[1] or "." in second.split(summed[0])[1]:
        return None
    letter = summed[0]
    inner = (first.index(letter) - len(first), second.index(letter) - len(second))
    outer = []
    for own, other in ((first, second), (second, first)):
        alone = [x for x in own if x in output and x not in other]
        outer.append(output.index(alone[-1]) - len(output) if alone else None)
    return Product(left, right, inner, (outer[0], outer[1]))


def _fused(node: fx.Node) -> Core | None:
    """Case 1."""
    q, k, v = node.args[:3]
    if not (isinstance(q, fx.Node) and isinstance(k, fx.Node) and isinstance(v, fx.Node)):
        return None
    position = 5 if operators.kind(node) == "aten::scaled_dot_product_attention" else 4
    mask = operators.argument(node, 3, "attn_mask")
    causal: bool | None = bool(operators.argument(node, position, "is_causal", False))
    if not causal and isinstance(mask, fx.Node):
        causal = None
    return Core(node, q, k, v, operators.shape(q)[-1], causal, prod(operators.shape(q)[1:-2]))


def _spelled(flow: Flow, linears: Linears, path: frozenset[fx.Node], node: fx.Node) -> Core | None:
    """Case 2, from the second product back."""
    second = product(flow, node)
    if second is None:
        return None
    for weights, v, keys in ((second.left, second.right, second.inner[0]), (second.right, second.left, second.inner[1])):
        found = _scores(flow, linears, path, weights, keys)
        if found is None or _weighs(flow, path, v):
            continue
        scores, first, axis, masked = found
        swapped = first.outer[0] == axis  # the first operand has the keys
        q, k = (first.right, first.left) if swapped else (first.left, first.right)
        if _is_retrieved(flow, k) and _is_retrieved(flow, v):
            continue
        size = operators.shape(q)[first.inner[1] if swapped else first.inner[0]]
        return Core(node, q, k, v, size, None if masked else False, _heads(scores, first))
    return None


def _is_retrieved(flow: Flow, node: fx.Node) -> bool:
    """Whether a tensor is nothing but selected rows of a stored table."""
    while operators.is_movement(node) and len(flow.inputs(node)) == 1:
        (node,) = flow.inputs(node)
    return flow.retrieves(node)


def _heads(scores: fx.Node, first: Product) -> int:
    """Heads of scores: the product of their dimensions beside queries, keys and, in front, the batch."""
    sizes = operators.shape(scores)
    shared = [size for i, size in enumerate(sizes) if i - len(sizes) not in first.outer]
    return prod(shared[1:])


def _scores(
    flow: Flow, linears: Linears, path: frozenset[fx.Node], weights: fx.Node, keys: int
) -> tuple[fx.Node, Product, int, bool] | None:
    """The product behind the weights of an attention.

    Args:
        flow: the graph's data flow.
        linears: its linears.
        path: nodes of the region.
        weights: the operand that may be attention weights.
        keys: its dimension of keys, counted from the end.

    Returns:
        The node, the product that it is, its dimension of keys, and whether a mask or bias is added on the way; None where
        ``weights`` is no function of one that is other than linear.
    """
    products: dict[fx.Node, tuple[Product, int]] = {}
    asked: dict[fx.Node, tuple[Product, int]] = {}
    bends: list[fx.Node] = []
    masked = False
    for node, axis in _behind(flow, path, weights, keys):
        name = operators.kind(node)
        both, one = product(flow, node), _asked(flow, linears, node, axis)
        if both is not None or one is not None:
            products.update({node: (both, axis)} if both is not None else {})
            asked.update({node: (one, axis)} if one is not None else {})
            masked |= name in ("aten::baddbmm", "aten::addmm") and bool(node.kwargs.get("beta", 1) != 0)
        elif name in operators.SOFTMAXES:
            bends.append(node)
        elif operators.is_pointwise(node):
            bends.extend([node] if name not in _LINEAR else [])
            masked |= name in ("aten::where", "aten::masked_fill", operators.ADD) and len(node.all_input_nodes) > 1
    for candidates in (products, asked):
        bent = [node for node in candidates if any(_bends(flow, bend, node) for bend in bends)]
        if bent:
            first = min(bent, key=flow.index.__getitem__)
            return first, *candidates[first], masked
    return None


def _bends(flow: Flow, bend: fx.Node, scores: fx.Node) -> bool:
    """Whether a function is applied to scores one by one: not to decays beside them, nor to their sums alone."""
    stack, seen = [bend], set()
    while stack:
        node = stack.pop()
        if node is scores:
            return True
        if node in seen or operators.kind(node) in operators.REDUCTIONS:
            continue
        seen.add(node)
        stack.extend(source for source in flow.inputs(node) if flow.depends(source, scores))
    return False


def _behind(flow: Flow, path: frozenset[fx.Node], start: fx.Node, axis: int) -> Iterator[tuple[fx.Node, int]]:
    """Nodes that one is computed from by element-wise work, softmax, sums and movement, and where a dimension of it was."""
    seen: set[fx.Node] = set()
    stack = [(start, axis)]
    while stack:
        node, axis = stack.pop()
        if node in seen or node not in path:
            continue
        seen.add(node)
        yield node, axis
        name = operators.kind(node)
        through = name in _THROUGH or operators.is_pointwise(node) or operators.is_movement(node) or _blends(node)
        if through and product(flow, node) is None:
            stack.extend((source, _before(node, axis)) for source in flow.inputs(node))


def _blends(node: fx.Node) -> bool:
    """Whether a product with a weight may blend the scores of several heads: then it reads four dimensions or more."""
    return operators.kind(node) in operators.PRODUCTS and len(operators.shape(node)) > 3


def _before(node: fx.Node, axis: int) -> int:
    """Where a dimension of a node's result, counted from the end, is in its input."""
    name = operators.kind(node)
    rank = len(operators.shape(node))
    if name in ("aten::mT", "aten::t", "aten::numpy_T"):
        return {-1: -2, -2: -1}.get(axis, axis)
    if name in ("aten::transpose", "aten::swapaxes", "aten::swapdims"):
        a, b = (int(d) % rank - rank for d in node.args[1:3])  # type: ignore[arg-type]  # dimensions are integers
        return {a: b, b: a}.get(axis, axis)
    if name == "aten::permute":
        dims = [int(d) % rank for d in node.args[1]]  # type: ignore[union-attr, arg-type]  # likewise
        return dims[axis] - rank if -rank <= axis else axis
    return axis


def axis_before(flow: Flow, node: fx.Node, axis: int, entry: fx.Node) -> int | None:
    """Where a dimension of a node is in a tensor that it is computed from by norms, element-wise work and transpositions.

    Dimensions are counted from the end; None where something else lies in between.
    """
    while node is not entry:
        name = operators.kind(node)
        swaps = ("aten::mT", "aten::t", "aten::numpy_T", "aten::transpose", "aten::swapaxes", "aten::swapdims", "aten::permute")
        if not (operators.is_pointwise(node) or name in operators.NORMS | operators.CASTS or name in swaps):
            return None
        rank = len(operators.shape(node))
        sources = [n for n in flow.inputs(node) if flow.depends(n, entry) and len(operators.shape(n)) == rank]
        if not sources:
            return None
        node, axis = sources[0], _before(node, axis)
    return axis


def _weighs(flow: Flow, path: frozenset[fx.Node], v: fx.Node) -> bool:
    """Whether a tensor is itself made of attention weights: then it is no value."""
    return any(operators.kind(node) in operators.SOFTMAXES for node, _ in _behind(flow, path, v, -1))
