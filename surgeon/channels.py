"""A residual stream with fewer channels: the edits, and by how much they change the parameter count.

:mod:`surgeon.channel_axes` finds the channels, :mod:`surgeon.channel_bases` what a rotation does to each stored tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import networkx
import torch
from torch import Tensor, fx

from surgeon import channel_bases
from surgeon.accounting import memory, stored_reads
from surgeon.channel_axes import Channels, Unfit, find_channels, is_stored, named
from surgeon.channel_bases import Rotation, Shift, Use
from surgeon.channel_norms import LAYER_NORM, RMS_NORM, Norm
from surgeon.discovery import operators
from surgeon.errors import PlanError, RewriteError
from surgeon.graph import Graph
from surgeon.head_labels import FILLED
from surgeon.rewrite import Editor
from surgeon.structure import Selection, Structure

aten = torch.ops.aten
UNTIED = "_untied"
"""Behind the name of a tensor that two parts read: that of the copy which the second of them has."""
_SHAPED = FILLED | {f"aten::{name}" for name in "reshape view _unsafe_view expand broadcast_to".split()}


@dataclass(frozen=True)
class Alike:
    """Uses of one stored tensor that become the same.

    Attributes:
        uses: at least one.
        first: no other use of the tensor stands in front.
        copy: the tensor stays what another use needs under its name, so that these need one of their own.
    """

    uses: tuple[Use, ...]
    first: bool
    copy: bool


# -- a rotation ---------------------------------------------------------------------------------------------------


def alike(graph: Graph, rotation: Rotation) -> list[Alike]:
    """The uses of every stored tensor, those together that become the same; writers before others."""
    reads = stored_reads(graph)
    found: list[Alike] = []
    for nodes in reads.values():
        groups: dict[Any, list[Use]] = {}
        for use in rotation.uses:
            if use.leaf in nodes:
                gain = use.normed.gain if use.normed is not None else None
                by = None if gain is None else gain.numpy(force=True).tobytes()
                key = (use.role != "write", use.role, use.axis, use.plus, by)
                groups.setdefault(key, []).append(use)
        if groups and {use.leaf for uses in groups.values() for use in uses} != set(nodes):
            other = next(node for node in nodes if all(use.leaf is not node for uses in groups.values() for use in uses))
            raise Unfit(f"{named(other)} is read elsewhere too")
        taken: set[str] = set()
        readers: set[tuple[fx.Node, fx.Node]] = set()
        for key in sorted(groups, key=lambda key: key[:4]):
            names = {str(use.leaf.target) for use in groups[key]}
            here = {(use.leaf, use.reader) for use in groups[key]}
            if readers & here:
                raise Unfit(f"{named(groups[key][0].reader)} hands one tensor to parts that need different ones")
            if names & taken and not names <= taken:
                raise Unfit(f"{', '.join(sorted(names))} are one tensor that several parts read, and need different ones")
            found.append(Alike(tuple(groups[key]), not taken, bool(names & taken)))
            taken |= names
            readers |= here
    return found


def untied(groups: Sequence[Alike]) -> list[str]:
    """Names of stored tensors that are written with and read, so that each use has a tensor of its own afterwards."""
    return sorted({str(group.uses[0].leaf.target) for group in groups if not group.first})


def rotatable(graph: Graph, label: str, channels: Channels) -> list[str]:
    """Notes on what becomes of a stream that is rotated.

    Raises:
        Unfit: it cannot be rotated.
    """
    change = channel_bases.rotation(graph, channels)
    check_shifts(graph, change)
    names = untied(alike(graph, change))
    return [f"{label}: {name} both writes to the stream and reads it; it becomes two tensors" for name in names]


def selected_streams(step: str, graph: Graph, structure: Structure) -> list[tuple[str, Channels | Unfit]]:
    """The streams that a pass is to work on, by their labels.

    Raises:
        PlanError: a weight is packed; names the first one's site.
    """
    weights = [(site.name, site.part.weight) for site in structure.linears]
    weights += [(table.name, table.part.weight) for table in structure.embeddings]
    for moe in structure.select(Selection()).moes():
        weights += [(moe.name, moe.part.w_in), (moe.name, moe.part.w_out)]
    for site, name in weights:
        if not graph.tensor(name).is_floating_point():
            raise PlanError(f"{site}: its weight {name} is quantized already; put {step} before quantize")
    return [(label, found) for label, found in find_channels(structure) if structure.selection.admits(label, None)]


def joined_norms(graph: Graph, channels: Channels, rotation: Rotation) -> list[frozenset[fx.Node]]:
    """Norms whose readers share weights, which have one factor therefore."""
    together = networkx.Graph()
    together.add_nodes_from(channels.norms)
    for nodes in stored_reads(graph).values():
        norms = [use.normed.norm.node for use in rotation.uses if use.leaf in nodes and use.normed is not None]
        together.add_edges_from((norms[0], norm) for norm in norms[1:])
    return [frozenset(part) for part in networkx.connected_components(together)]


def rotate(
    editor: Editor, channels: Channels, rotation: Rotation, basis: Tensor, columns: Callable[[fx.Node], Tensor]
) -> None:
    """Rotate a stream and keep the first directions.

    Args:
        editor: of the graph that all of this was found in.
        channels: the stream's channels.
        rotation: what a rotation changes.
        basis: U [H, K], float64.
        columns: by norm, R [H, K] float64 with n ~ R n' for its result n' on the narrow stream, s = 1.
    """
    width, left = basis.shape
    scale = (left / width) ** 0.5
    original = {str(leaf.target): editor.tensor(str(leaf.target)).detach() for leaf in channels.stored}
    for group in alike(editor.graph, rotation):
        use = group.uses[0]
        tensor = original[str(use.leaf.target)]
        fresh = _rotated(tensor, use, basis, scale, _columns(use, rotation, basis, columns))
        if group.copy:
            with editor.after(use.leaf):
                node = editor.add_tensor(f"{use.leaf.target}{UNTIED}", fresh)
            for each in group.uses:
                editor.redirect(each.reader, each.leaf, node)
        else:
            for name in {str(each.leaf.target) for each in group.uses}:
                editor.set_tensor(name, fresh)
    for shift in rotation.shifts:
        _shift(editor, shift)
    _resize(editor, channels, left)


def _columns(use: Use, rotation: Rotation, basis: Tensor, columns: Callable[[fx.Node], Tensor]) -> Tensor:
    """What a reader's features are of those of the narrow stream, but for s; U itself for what is no reader."""
    normed = use.normed
    if normed is None:
        return basis
    found = basis if normed.norm.node in rotation.unscaled else columns(normed.norm.node)
    return found if normed.gain is None else normed.gain.to(found)[:, None] * found


def _rotated(tensor: Tensor, use: Use, basis: Tensor, scale: float, columns: Tensor) -> Tensor:
    basis = basis.to(tensor.device)
    rows = tensor.double().movedim(use.axis, -1)
    if use.role == "write":
        rows = rows @ basis * scale  # of a centred stream U^T 1 = 0: the mean goes with it
    elif use.role == "read":
        rows = rows @ columns.to(tensor.device) / scale
    else:
        value = 1.0 - use.plus if use.role == "gain" else 0.0
        rows = rows.new_full((*rows.shape[:-1], basis.shape[1]), value)
    return rows.movedim(-1, use.axis).to(tensor.dtype).contiguous()


def _shift(editor: Editor, shift: Shift) -> None:
    """Add a constant to what a product gives."""
    if shift.bias is not None:
        name = str(shift.bias.target)
        bias = editor.tensor(name).detach()
        editor.set_tensor(name, (bias.double() + shift.amount.to(bias.device)).to(bias.dtype))
        return
    product = shift.product
    dtype, device = product.meta["val"].dtype, editor.tensor(_leaf_name(shift.weight)).device
    name = _leaf_name(shift.weight).removesuffix(".weight")
    amount = shift.amount.to(device, dtype)
    kind = operators.kind(product)
    with editor.before(product):
        bias_node = editor.add_tensor(f"{name}.bias" if name != _leaf_name(shift.weight) else f"{name}_bias", amount)
    if kind == "aten::linear":
        product.args = (*product.args[:2], bias_node)
        product.kwargs = {}
        editor.touch(product)
    elif kind == operators.MOE:
        if len(product.args) > 5:
            product.update_arg(5, bias_node)
        else:
            product.update_kwarg("b_in", bias_node)
        editor.touch(product)
    else:
        with editor.after(product):
            editor.replace(product, editor.call(aten.add.Tensor, product, bias_node))


def _leaf_name(node: fx.Node) -> str:
    while node.op != "get_attr":
        node = node.all_input_nodes[0]
    return str(node.target)


def check_shifts(graph: Graph, rotation: Rotation) -> None:
    """Refuse a bias that is to change and has other readers.

    Raises:
        Unfit: names it.
    """
    products, stored = [shift.product for shift in rotation.shifts], stored_reads(graph)
    for shift in rotation.shifts:
        if shift.bias is None:
            continue
        key = memory(graph.tensor(str(shift.bias.target))) if shift.bias.op == "get_attr" else None
        reads = stored.get(key, []) if key is not None else []
        if sum(len(node.users) for node in reads) != 1 or products.count(shift.product) > 1:
            raise Unfit(f"{named(shift.bias)}, the bias of {named(shift.product)}, is read by other parts of the model too")


def rotated_parameters(graph: Graph, rotation: Rotation, left: int) -> int:
    """Change of the parameter count; a tensor that is written with and read counts twice afterwards."""
    delta = 0
    for group in alike(graph, rotation):
        tensor = graph.tensor(str(group.uses[0].leaf.target))
        if isinstance(tensor, torch.nn.Parameter) or group.copy:
            delta += tensor.numel() // tensor.shape[group.uses[0].axis] * left
        if isinstance(tensor, torch.nn.Parameter) and group.first:
            delta -= tensor.numel()
    return delta + sum(shift.amount.numel() for shift in rotation.shifts if shift.bias is None)


# -- some of the channels -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gain:
    """The stored gain of norms: the graph multiplies by the tensor at ``leaf`` plus a number."""

    leaf: fx.Node
    plus: float


def affine(channels: Channels, norm: Norm) -> tuple[fx.Node, Gain | None]:
    """The value that a norm gives with its gain and offset, and the gain, where that is a stored vector behind it."""
    if norm.gain is not None:
        return norm.node, _gain(norm.gain)
    node, gain = norm.node, None
    while len(node.users) == 1:
        (user,) = node.users
        kind = operators.kind(user)
        others = [value for value in user.all_input_nodes if value is not node]
        if kind in operators.CASTS:
            node = user
        elif kind in ("aten::mul", operators.ADD) and len(others) == 1 and channels.has(others[0]) and is_stored(others[0]):
            if kind == "aten::mul" and gain is None:
                gain = _gain(others[0])
            node = user
        else:
            break
    return node, gain


def _gain(node: fx.Node) -> Gain | None:
    plus = 0.0
    while node.op != "get_attr":
        if operators.kind(node) == operators.ADD and isinstance(node.args[1], int | float) and not node.kwargs:
            plus += node.args[1]
        elif operators.kind(node) not in operators.CASTS:
            return None
        (node,) = node.all_input_nodes
    return Gain(node, plus)


def cuttable(graph: Graph, channels: Channels) -> None:
    """Refuse to cut tensors that something else reads too.

    Raises:
        Unfit: names the tensor.
    """
    for nodes in stored_reads(graph).values():
        if any(channels.has(node) for node in nodes):
            for node in nodes:
                if channels.axes.get(node) != next(channels.axes[other] for other in nodes if channels.has(other)):
                    raise Unfit(f"{named(node)} is read by other parts of the model too")


def keep_channels(editor: Editor, channels: Channels, keep: Tensor, factors: Mapping[fx.Node, float]) -> None:
    """Keep some channels.

    Args:
        editor: of the graph that the channels were found in.
        channels: the stream's channels.
        keep: their numbers, ascending.
        factors: by norm, ``rms(x_K) / rms(x)``, by which its gain is multiplied.
    """
    gains: dict[str, tuple[float, list[float]]] = {}
    for node, factor in factors.items():
        gain = affine(channels, channels.norms[node])[1]
        if gain is not None:
            gains.setdefault(str(gain.leaf.target), (gain.plus, []))[1].append(factor)
    for nodes in stored_reads(editor.graph).values():
        names = {str(node.target) for node in nodes if channels.has(node)}
        for name in sorted(names)[:1]:
            tensor = editor.tensor(name).detach()
            cut = tensor.index_select(channels.axes[nodes[0]], keep.to(tensor.device))
            if name in gains:
                plus, own = gains[name]
                cut = ((cut.double() + plus) * (sum(own) / len(own)) - plus).to(cut.dtype)
            for other in names:
                editor.set_tensor(other, cut)
    _resize(editor, channels, len(keep))


def kept_parameters(graph: Graph, channels: Channels, left: int) -> int:
    """Change of the parameter count."""
    delta = 0
    for nodes in stored_reads(graph).values():
        node = next((node for node in nodes if channels.has(node)), None)
        tensor = None if node is None else graph.tensor(str(node.target))
        if node is not None and isinstance(tensor, torch.nn.Parameter):
            delta += (left - channels.width) * (tensor.numel() // channels.width)
    return delta


# -- sizes --------------------------------------------------------------------------------------------------------


def _resize(editor: Editor, channels: Channels, left: int) -> None:
    """Let the graph's constants say the new number of channels, and see that nothing else changed its shape.

    Raises:
        RewriteError: a shape does not come out as expected.
    """
    inside = {part for norm in channels.norms.values() for part in norm.inside}
    before = {
        node: [str(size) for size in node.meta["val"].shape]
        for node in editor.graph.module.graph.nodes
        if node not in inside and isinstance(node.meta.get("val"), Tensor)
    }
    for node, axis in channels.axes.items():
        kind = operators.kind(node)
        for position, argument in enumerate(node.args):
            if not isinstance(argument, list | tuple) or kind not in _SHAPED | {LAYER_NORM, RMS_NORM}:
                continue
            sizes = list(argument)
            if sizes and sizes[axis] == channels.width:
                sizes[axis] = left
                node.update_arg(position, sizes)
                editor.touch(node)
    editor.settle()
    for node in editor.graph.module.graph.nodes:
        if node in before:
            wanted = before[node]
            if node in channels.axes:
                wanted[channels.axes[node]] = str(left)
            found = [str(size) for size in node.meta["val"].shape]
            if found != wanted:
                raise RewriteError(f"{node.name} should have shape {wanted} with {left} channels, it has {found}")
