"""The way from the projections of an attention's values to its output projection: whether a rotation of each head passes it.

A head's results are sums of values, ``a_h = sum_s p_hs v_s``, with weights p that are the same for all of the head's features.
With R orthogonal, ``W_o a`` is therefore ``(W_o R) (R^T a)`` with ``R^T W_v`` for W_v.  That it is so is found by walking back
from what the output projection reads, its elements labelled with their number within the head (:mod:`surgeon.head_labels`):

    what moves elements, casts them or adds such values keeps labels; so does a product with what has no label, that is with
    weights that are the same for all features of a head;
    the walk ends at linears, whose output features have the labels;
    everything else, and every other reader of something labelled, is refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from surgeon.accounting import memory, stored_reads
from surgeon.caches import KEPT, PAST
from surgeon.channel_axes import PRODUCTS, Unfit, is_stored, named, operands
from surgeon.discovery import operators
from surgeon.graph import Graph
from surgeon.head_labels import SHARED, SPLITS, UNUSED, absorbed, both, compact, is_fixed_index, needs, same, shape_of
from surgeon.rewrite import Editor
from surgeon.structure import Attention

_ATTENTIONS = frozenset({"aten::scaled_dot_product_attention", "surgeon::attention"})
_PRODUCTS = frozenset({"aten::matmul", "aten::bmm", "aten::einsum", "aten::mul"})
_EXCHANGES = frozenset({"aten::t", "aten::numpy_T", "aten::mT"})
_SPREAD = operators.RESHAPES | operators.NARROWINGS | operators.REPETITIONS | SPLITS | operators.CASTS


@dataclass(frozen=True)
class Rotated:
    """Features of a stored tensor that are those of heads.

    Attributes:
        name: of the tensor.
        axis: its dimension of features.
        places: theirs, those of a head side by side and in order.
    """

    name: str
    axis: int
    places: Tensor


def head_rotation(graph: Graph, part: Attention) -> tuple[int, list[Rotated]]:
    """The size of the heads that an output projection reads, and all tensors that a rotation of each head changes.

    Raises:
        Unfit: it cannot be done; names the node.
    """
    if part.o is None:
        raise Unfit("it has no output projection")
    product = part.o.node
    if part.o.factors or operators.kind(product) not in PRODUCTS:
        raise Unfit(f"its output projection {named(product)} is no product with one weight")
    x, weight, _, axis = operands(product)
    width = operators.shape(x)[-1]
    size = width // part.heads
    if width % part.heads or size < 2:
        raise Unfit(f"its output projection reads {width} features of {part.heads} heads")
    labels = torch.arange(size).repeat(part.heads)
    found = [_stored(graph, weight, product, axis, torch.arange(width))]
    found += _Walk(graph, product, size).run(x, labels.reshape([1] * (len(operators.shape(x)) - 1) + [-1]))
    if len({memory(graph.tensor(each.name)) for each in found}) < len(found):
        raise Unfit("several projections are one tensor")
    return size, found


def rotate_heads(editor: Editor, tensors: list[Rotated], basis: Tensor) -> None:
    """Replace features f of every head by ``R^T f``, R [c, c] in float64."""
    for each in tensors:
        tensor = editor.tensor(each.name).detach()
        places = each.places.to(tensor.device)
        rows = tensor.double().movedim(each.axis, -1).clone()
        heads = rows[..., places]
        heads = heads.reshape(*heads.shape[:-1], -1, len(basis)) @ basis.to(tensor.device)
        rows[..., places] = heads.flatten(-2)
        editor.set_tensor(each.name, rows.movedim(-1, each.axis).to(tensor.dtype).contiguous())


def _stored(graph: Graph, node: Any, reader: fx.Node, axis: int, places: Tensor) -> Rotated:
    """A stored tensor that one node alone reads, a matrix perhaps with its dimensions exchanged."""
    while _exchanges(node) and len(node.users) == 1:
        node, axis = node.args[0], -3 - axis
    if node.op != "get_attr":
        raise Unfit(f"{named(reader)} computes its weight from stored tensors")
    name = str(node.target)
    reads = stored_reads(graph)[memory(graph.tensor(name))]
    if sum(len(each.users) for each in reads) != 1:
        raise Unfit(f"{name} is read by other parts of the model too")
    return Rotated(name, axis, places)


def _exchanges(node: fx.Node) -> bool:
    """Whether a node is a matrix with its dimensions exchanged."""
    kind = operators.kind(node)
    exchanged = kind in _EXCHANGES or (kind == "aten::permute" and list(node.args[1]) == [1, 0])  # type: ignore[arg-type]  # a list
    return exchanged and len(operators.shape(node)) == 2


class _Walk:
    def __init__(self, graph: Graph, product: fx.Node, size: int) -> None:
        self.graph = graph
        self.product = product
        self.size = size
        self.edges: dict[tuple[fx.Node, fx.Node], Tensor] = {}
        self.wanted: set[fx.Node] = set()
        (self.results,) = graph.module.graph.find_nodes(op="output")
        returned: Any = self.results.args[0]
        self.kept = {node for node, port in zip(returned, graph.outputs, strict=True) if port.role in KEPT}
        self.given_out: list[fx.Node] = []
        inputs = graph.module.graph.find_nodes(op="placeholder")
        self.pasts = {node for node, port in zip(inputs, graph.inputs, strict=True) if port.role == PAST}

    def run(self, x: fx.Node, labels: Tensor) -> list[Rotated]:
        self._need(x, self.product, labels)
        found: list[Rotated] = []
        past = False
        node = self.product
        while (node := node.prev).op != "root":
            if node not in self.wanted:
                continue
            own = self._settle(node)
            if operators.kind(node) in PRODUCTS and is_stored(operands(node)[1]):
                found += self._projection(node, own)
            elif node in self.pasts:
                past = True
            else:
                self._back(node, own)
        if not found:
            raise Unfit("no linear makes its values")
        if self.given_out and not past:
            raise Unfit(f"the model returns its values ({named(self.given_out[0])}) and takes none")
        return found

    def _need(self, value: fx.Node, reader: fx.Node, labels: Tensor) -> None:
        self.edges[value, reader] = compact(labels)
        self.wanted.add(value)

    def _settle(self, node: fx.Node) -> Tensor:
        """Labels of a value, once all of its readers are known."""
        labels = same(node, UNUSED)
        for user in node.users:
            if (node, user) in self.edges:
                own = self.edges[node, user]
            elif user is self.results and node in self.kept:
                self.given_out.append(node)  # a cache that holds what is rotated, and gives it back
                continue
            elif user.op == "call_function" and not isinstance(user.meta.get("val"), Tensor | list | tuple):
                continue  # a size
            else:
                read = needs(self.graph, user, same(user, SHARED)) if user.op == "call_function" else None
                own = same(node, SHARED) if read is None else read.get(node, same(node, UNUSED))
            joined = both(labels, own)
            if bool(((labels >= 0) | (own >= 0)).logical_and(joined < 0).any()):
                raise Unfit(f"{named(user)} reads the heads' values too ({named(node)}), or not head by head")
            labels = joined
        return absorbed(compact(labels))

    def _back(self, node: fx.Node, labels: Tensor) -> None:
        """Hand labels on to the operands of what computes the same of every feature of a head."""
        kind = operators.kind(node)
        found = needs(self.graph, node, labels) if node.op == "call_function" else None
        if found is None:
            raise Unfit(f"{named(node)} stands between the values and the output projection")
        marked = {value: own for value, own in found.items() if bool((own >= 0).any())}
        others = [value for value in node.all_input_nodes if isinstance(value.meta.get("val"), Tensor) and value not in marked]
        if not _keeps(node, kind, list(marked), others, labels):
            raise Unfit(f"{named(node)}, between the values and the output projection, is not the same for a head's features")
        for value, own in marked.items():
            self._need(value, node, own)

    def _projection(self, node: fx.Node, labels: Tensor) -> list[Rotated]:
        """The features of a linear that are values."""
        _, weight, bias, reads = operands(node)
        if len(operators.shape(weight)) != 2:
            raise Unfit(f"{named(node)}, which makes the values, is no product with a matrix")
        if sum(size > 1 for size in labels.shape[:-1]):
            raise Unfit(f"{named(node)} makes values whose numbers within their heads depend on more than the feature")
        flat = labels.reshape(-1).expand(shape_of(node)[-1])
        places = (flat >= 0).nonzero().flatten()
        if len(places) % self.size or not torch.equal(flat[places], torch.arange(self.size).repeat(len(places) // self.size)):
            raise Unfit(f"{named(node)} makes values whose heads do not stand side by side")
        found = [_stored(self.graph, weight, node, -3 - reads, places)]
        if isinstance(bias, fx.Node):
            found.append(_stored(self.graph, bias, node, -1, places))
        return found


def _keeps(node: fx.Node, kind: str, marked: list[fx.Node], others: list[fx.Node], labels: Tensor) -> bool:
    """Whether a call is linear in its marked operands, the factors being the same for all labels."""
    if kind == operators.GETITEM or kind in _SPREAD or is_fixed_index(node):
        return len(marked) == 1
    if kind == operators.CONCATENATE:
        return not others
    if kind in ("aten::add", "aten::sub"):
        return not others and len(node.all_input_nodes) == len({node.args[0], node.args[1]})
    # labels along one dimension, which the other operand has not (it would be labelled) or has with size 1
    if len(marked) != 1 or sum(size > 1 for size in labels.shape) != 1:
        return False
    if kind in _ATTENTIONS:
        return marked[0] is node.args[2]
    if kind in _PRODUCTS:
        return len(others) == 1 or any(isinstance(value, int | float) for value in node.args)
    return kind == "aten::div" and marked[0] is node.args[0]
