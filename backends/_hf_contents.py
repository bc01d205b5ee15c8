"""What a rewritten graph holds, in the terms of a checkpoint: weights under the source's names, and what stands for one."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, fx

import surgeon.ops  # noqa: F401  # registers torch.ops.surgeon
from surgeon.accounting import Key, memory
from surgeon.contract import Refusal
from surgeon.graph import Graph
from surgeon.numerics.quantization import FLOAT8

_MOE = torch.ops.surgeon.moe.default
_DEQUANTIZE = torch.ops.surgeon.dequantize.default
_DYNAMIC = torch.ops.surgeon.fake_quantize_dynamic.default
_LINEAR = torch.ops.aten.linear.default
_INDEX = torch.ops.aten.index.Tensor
CODES = re.compile(r"_codes(_\d+)?$")
ENGINES = "the engines (onnxruntime, aotinductor, tensorrt) can"


class Held(NamedTuple):
    """One tensor of the checkpoint, made when it is written.

    Attributes:
        shape: its shape.
        make: gives the tensor.
        key: identity of its memory, None where it is computed.
    """

    shape: tuple[int, ...]
    make: Callable[[], Tensor]
    key: Key | None = None


class LowBit(NamedTuple):
    """The codes of one weight, as ``surgeon::dequantize`` takes them."""

    packed: str
    scale: str
    zero_point: str | None
    bits: int
    group: int
    in_features: int


@dataclass
class Contents:
    """Tensors of a graph by the source's names.

    Attributes:
        held: weights and buffers by name; of a low-bit weight its shape.
        low_bit: codes by the name of the weight they stand for.
        extra: tensors that passes added and that no rule has explained yet.
        notes: what a reader of the report should know.
        refusals: what a checkpoint cannot say.
    """

    held: dict[str, Held] = field(default_factory=dict)
    low_bit: dict[str, LowBit] = field(default_factory=dict)
    extra: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)


def read(graph: Graph, known: Collection[str], *, repeat_merged: bool) -> Contents:
    """Sort the tensors of a graph.

    Args:
        graph: the graph.
        known: the names of the source model's own tensors.
        repeat_merged: write an expert that stands for several as often as it is chosen under another number.
    """
    contents = Contents()
    for name, tensor in graph.parameters().items():
        if name in known:
            contents.held[name] = as_is(tensor)
        elif "." in name:  # constants that tracing folded lie at the top
            contents.extra.add(name)
    for node in graph.module.graph.nodes:
        if node.target is _DEQUANTIZE:
            _low_bit(graph, node, contents)
        elif node.target is _MOE:
            _merged(graph, node, contents, repeat_merged)
        elif node.target is _DYNAMIC:
            reason = f"its input is rounded to 8 bits at run time, which transformers does not load; {ENGINES} run it"
            contents.refusals += [Refusal(_weight_name(reader), reason, lasting=True) for reader in node.users]
    return contents


def _weight_name(reader: fx.Node) -> str:
    """Name of the weight of a linear, its own where it has none."""
    weight = reader.args[1] if len(reader.args) > 1 else None
    while isinstance(weight, fx.Node) and weight.op != "get_attr":
        weight = weight.args[0]
    return CODES.sub("", str(weight.target)) if isinstance(weight, fx.Node) else reader.name


def as_is(tensor: Tensor) -> Held:
    """A tensor that is written as it is."""
    return Held(tuple(tensor.shape), tensor.detach, memory(tensor))


def _low_bit(graph: Graph, node: fx.Node, contents: Contents) -> None:
    packed, scale, zero_point, bits, group, in_features = cast("tuple[Any, ...]", node.args)
    assert isinstance(packed, fx.Node)
    assert isinstance(scale, fx.Node)
    zeros = str(zero_point.target) if isinstance(zero_point, fx.Node) else None
    codes = LowBit(str(packed.target), str(scale.target), zeros, bits, group, in_features)
    contents.extra.difference_update(name for name in (codes.packed, codes.scale, codes.zero_point) if name)
    name = CODES.sub("", codes.packed)
    shape = (*graph.tensor(codes.packed).shape[:-2], codes.in_features)
    if graph.tensor(codes.packed).dtype == FLOAT8:
        reason = f"it is in 8-bit floats, and low-bit integers are what is written; {ENGINES} run it"
        contents.refusals.append(Refusal(name, reason, lasting=True))
        return
    wrong = {str(user.target) for user in node.users if not _multiplies(user, node)}
    if wrong:
        reason = f"its low-bit codes are read by {', '.join(sorted(wrong))}; a checkpoint has low-bit linears and experts only"
        contents.refusals.append(Refusal(name, f"{reason}, {ENGINES} run these"))
        return
    contents.low_bit[name] = codes
    contents.held[name] = Held(shape, lambda: torch.empty(0))


def _multiplies(user: fx.Node, weight: fx.Node) -> bool:
    """Whether a node reads the weight as the matrix of a linear or of experts."""
    if user.target is _LINEAR:
        return user.args[1] is weight
    return user.target is _MOE and weight in user.args[3:5]


def _merged(graph: Graph, node: fx.Node, contents: Contents, repeat: bool) -> None:
    """Experts that stand for several: ``index = table[chosen]`` in front of the mixture."""
    index = node.args[1]
    if not isinstance(index, fx.Node) or index.target is not _INDEX:
        return
    table = index.args[0]
    if not isinstance(table, fx.Node) or table.op != "get_attr":
        return
    groups = graph.tensor(str(table.target)).detach()
    stacked = [argument for argument in node.args[3:7] if isinstance(argument, fx.Node)]
    names = [str(argument.target) for argument in stacked if argument.op == "get_attr"]
    contents.extra.discard(str(table.target))
    first = names[0] if names else node.name
    count = int(groups.max()) + 1
    if not repeat:
        reason = (
            f"{len(groups)} choices of its router share {count} merged experts; the format holds one expert per choice: "
            f"set merged_experts: repeat (copies of them), or lower to an engine"
        )
        contents.refusals.append(Refusal(first, reason))
        return
    for name in names:
        if name in contents.held:
            contents.held[name] = _picked(graph.tensor(name).detach(), groups)
    contents.notes.append(f"{first}: {count} merged experts are written as {len(groups)}, one per choice of the router")


def _picked(tensor: Tensor, groups: Tensor) -> Held:
    return Held((len(groups), *tensor.shape[1:]), lambda: tensor[groups])
