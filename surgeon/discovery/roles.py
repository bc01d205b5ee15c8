"""Roles of the tensors that belong to no linear, experts or look-up table.

    blocks.I.norm.J, final_norm.J ...   gains and offsets of a normalisation
    blocks.I.scale.J, blocks.I.bias.J   what activations are multiplied with element by element, or what is added to them
    position_embedding.J                added to the hidden state before the first block
    latent.J                            where a stream starts that no input leads to: latents, queries of a decoder
    token.J                             concatenated to activations: learned tokens
    patch_embedding.J, convolution.J    kernels, before the blocks and elsewhere
    blocks.I.mixer.J, blocks.I.other.J  matrices of a sublayer that no rule takes apart
    blocks.I.attention.position.J       further matrices that the scores of an attention are computed with
    recurrence.J.K                      the K-th weight of a recurrent layer outside of the sublayers, in the operator's order
    projection.J                        matrices in a product that is no linear, such as one with three dimensions, or one with
                                        what is computed from stored tensors alone
    constant.J                          what is no trained weight: tables, masks, positions; and trained scalars

A trained matrix that fits nowhere is *unrecognised*, with the operator that reads it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import fx

from surgeon.discovery import operators
from surgeon.discovery.flow import Flow
from surgeon.discovery.norms import is_affine, is_normalisation
from surgeon.discovery.sites import Naming
from surgeon.structure import Stream

_ELEMENTWISE = {
    "aten::mul": "scale",
    "aten::div": "scale",
    operators.ADD: "bias",
    "aten::sub": "bias",
    "aten::rsub": "bias",
    "aten::addcmul": "scale",
}
"""What a vector does in an operator; the first argument of ``addcmul(a, b, c) = a + b c`` is added."""


_OVER_FEATURES = frozenset({"aten::layer_norm", "aten::native_layer_norm", "aten::rms_norm"})
"""Norms of each position alone; others that read learned tensors alone may normalise kernels."""


def _effect(reader: fx.Node, operand: fx.Node) -> str:
    added = operators.kind(reader) == "aten::addcmul" and reader.args[0] is operand
    return "bias" if added else _ELEMENTWISE[operators.kind(reader)]


class Places:
    """Where in the model a node stands: a block, before the blocks of a stream, behind them, or beside (context)."""

    def __init__(self, flow: Flow, streams: Sequence[Stream]) -> None:
        self._flow = flow
        self._blocks = {node: block for stream in streams for block in stream.blocks for node in block.nodes}
        self._prefix = {node for stream in streams for node in stream.prefix}
        self._prefix |= {node for stream in streams for region in stream.transitions for node in region.nodes}
        regions = [region for stream in streams for block in stream.blocks for region in block.regions]
        self._regions = {node: region for region in regions for node in region.nodes}
        self._suffix = {node for stream in streams for node in stream.suffix}
        self._latents = {node for stream in streams if stream.blocks for node in self._learned(stream.blocks[0].entry)}

    def _learned(self, entry: fx.Node) -> set[fx.Node]:
        """The stored tensors that a constant entry is, apart from movement, sums and norms."""
        found: set[fx.Node] = set()
        stack = [entry] if entry in self._flow.constant else []
        while stack:
            node = stack.pop()
            if node.op == "get_attr":
                found.add(node)
            elif operators.is_movement(node) or operators.kind(node) == operators.ADD:
                stack.extend(node.all_input_nodes)
            elif operators.kind(node) in operators.NORMS or operators.kind(node) == operators.GETITEM:
                stack.extend(node.all_input_nodes[:1])
        return found

    def prefix(self, node: fx.Node) -> bool:
        """Whether the node stands before the first block of a stream, or in a transition between blocks."""
        return node in self._prefix

    def suffix(self, node: fx.Node) -> bool:
        """Whether the node stands behind the last block."""
        return node in self._suffix

    def latent(self, node: fx.Node) -> bool:
        """Whether a stored tensor is where a stream starts that no input of the graph leads to."""
        return node in self._latents

    def part(self, node: fx.Node) -> str | None:
        """What a further weight of the region is part of: a mixer whose parts are not known, or a complete attention."""
        region = self._regions.get(node)
        if region is None:
            return None
        if region.kind in ("mixer", "other"):
            return region.kind
        complete = all(a.q and a.k and a.v and a.o for a in region.attention)
        before = any(self._flow.depends(attention.node, node) for attention in region.attention)
        if not region.attention or not complete:
            return None
        return "attention.position" if before else "other"

    def name(self, node: fx.Node) -> str:
        """``blocks.3.`` inside of a block, otherwise nothing."""
        block = self._blocks.get(node)
        return f"{block.name}." if block is not None else ""


class Remaining:
    """Gives a role to every tensor that has none."""

    def __init__(self, flow: Flow, naming: Naming, places: Places) -> None:
        self.flow = flow
        self.naming = naming
        self.places = places
        self.unrecognised: dict[str, str] = {}
        self._counts: Counter[str] = Counter()
        self._norms: dict[fx.Node, str] = {}
        self._gains: set[str] = set()

    def assign(self) -> None:
        """Go through all tensors in the order in which activations meet them."""
        met = {name: self._reader(readers[0]) for name, readers in self.flow.readers.items() if name not in self.naming.roles}
        for name, (operand, reader) in met.items():
            first = self._learned_norm(self.flow.readers[name][0])
            met[name] = (operand, reader) if first is None else first
        for name in sorted(met, key=lambda name: self.flow.index[met[name][1]]):
            self._assign(name, self.flow.readers[name][0], *met[name])

    def _learned_norm(self, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
        """A gain or offset with the norm over features that reads it, where that normalises learned tensors alone."""
        for user in self.flow.ordered(node.users):
            if operators.kind(user) in _OVER_FEATURES and self.flow.inputs(user) and user in self.flow.constant:
                return node, user
        return None

    def _assign(self, name: str, node: fx.Node, operand: fx.Node, reader: fx.Node) -> None:
        tensor = self.flow.graph.tensor(name)
        place = self.places.name(node)
        kind = operators.kind(reader)
        part = self.places.part(reader)
        trained = isinstance(tensor, torch.nn.Parameter)
        norm = self._norm(reader) if trained or kind in operators.NORMS else None
        gain = f"{norm}.{self._gain_or_offset(reader, operand)}"
        if norm is not None and gain not in self._gains:  # a second vector behind it is no gain
            self._gains.add(gain)
            role = gain
        elif kind in operators.CONVOLUTIONS:
            label = "patch_embedding" if self.places.prefix(reader) else "convolution"
            part = "weight" if reader.args[1] is operand else "bias"
            role = f"{self._group(f'{place}{label}', reader)}.{part}"
        elif kind in operators.RECURRENCES and part is None:
            weights = reader.args[2] if isinstance(reader.args[2], list | tuple) else ()
            number = weights.index(operand) if operand in weights else "state"
            role = f"{self._group(f'{place}recurrence', reader)}.{number}"
        elif trained and tensor.dim() > 1 and self.places.latent(node):
            role = self._next("latent")
        elif trained and self.places.prefix(reader) and kind == operators.ADD and len(operators.shape(operand)) > 1:
            role = self._next("position_embedding")
        elif trained and tensor.dim() > 1 and kind == operators.CONCATENATE:
            role = self._next(f"{place}token")
        elif not trained or tensor.numel() == 1:
            role = self._next(f"{place}constant")
        elif sum(size != 1 for size in operators.shape(operand)) <= 1 and kind in _ELEMENTWISE:
            role = self._next(f"{place}{_effect(reader, operand)}")
        elif tensor.dim() <= 1:
            role = self._next(f"{place}constant")
        elif not place and self._meets_constants(node):
            role = self._next("projection")
        elif part is not None:
            role = self._next(f"{place}{part}")
        elif kind in _ELEMENTWISE:
            role = self._next(f"{place}{_effect(reader, operand)}")
        elif self._meets_constants(node):
            role = self._next(f"{place}projection")
        elif kind in operators.PRODUCTS and (place or not self._may_be_an_expert(name, operand)):
            role = self._next(f"{place}projection")
        else:
            where = f"in {place[:-1]}" if place else "outside of the blocks"
            shape = list(operators.shape(node))
            left = self.flow.graph.source.left.get(name)
            experts = f"; it is no weight of experts, because {left}" if left else ""
            self.unrecognised[name] = (
                f"{shape} is read {where} by {reader.name} = {kind}, and no rule gives that a part{experts}"
            )
            return
        self.naming.claim(name, role)

    def _meets_constants(self, node: fx.Node) -> bool:
        """Whether a weight is that of a linear whose input no input of the graph leads to."""
        return any(user in self.naming.linears.learned and user.args[1] is node for user in node.users)

    def _may_be_an_expert(self, name: str, operand: fx.Node) -> bool:
        """Whether a weight looked like one of experts; not where it meets another weight first, as learned queries do."""
        return name in self.flow.graph.source.left and len(self.flow.weights.get(operand, ())) <= 1

    def _reader(self, node: fx.Node) -> tuple[fx.Node, fx.Node]:
        """The tensor as the first computation with activations reads it, and that computation.

        What is computed from stored tensors alone may be returned too, such as the places where queries start: that says
        less of a tensor than a computation does.
        """
        ends: list[tuple[fx.Node, fx.Node]] = []
        stack, seen = [node], {node}
        while stack:
            here = stack.pop()
            users = self.flow.ordered(user for user in here.users if user in self.flow.index)
            active = [user for user in users if user not in self.flow.constant]
            if active and active[0].op != "output":
                return here, active[0]
            ends.extend([(here, active[0])] if active else [] if users else [(here, here)])
            onward = [user for user in users if user in self.flow.constant and user not in seen]
            seen.update(onward)
            stack.extend(reversed(onward))  # in graph order
        return ends[0]

    def _norm(self, reader: fx.Node) -> str | None:
        """Name of the normalisation that ``reader`` belongs to."""
        core = self.flow.strip(reader, lambda n: not is_normalisation(self.flow, n) and is_affine(n))
        if not is_normalisation(self.flow, core):
            return None
        if core not in self._norms:
            place = self.places.name(core)
            if place:
                label = self._next(f"{place}norm")
            elif self.places.suffix(core) and "final_norm" not in self._norms.values():
                label = "final_norm"
            elif self.places.prefix(core) and "embedding_norm" not in self._norms.values():
                label = "embedding_norm"
            else:
                label = self._next("norm")
            self._norms[core] = label
        return self._norms[core]

    def _gain_or_offset(self, reader: fx.Node, operand: fx.Node) -> str:
        kind = operators.kind(reader)
        if kind in operators.NORMS:
            schema = reader.target._schema.arguments  # type: ignore[union-attr]  # an operator overload
            names = [schema[i].name for i, argument in enumerate(reader.args) if argument is operand]
            names += [name for name, argument in reader.kwargs.items() if argument is operand]
            return names[0] if names else "weight"
        return "bias" if kind == operators.ADD else "weight"

    def _group(self, label: str, reader: fx.Node) -> str:
        if reader not in self._norms:
            self._norms[reader] = self._next(label)
        return self._norms[reader]

    def _next(self, label: str) -> str:
        self._counts[label] += 1
        return f"{label}.{self._counts[label] - 1}"
