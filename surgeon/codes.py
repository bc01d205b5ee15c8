"""Low-bit codes in a graph that is being edited: each weight is quantized once, however often it is read."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch
from torch import Tensor, fx

import surgeon.ops  # noqa: F401  # registers torch.ops.surgeon
from surgeon.accounting import Key, memory
from surgeon.graph import Graph
from surgeon.numerics import QuantizedTensor
from surgeon.rewrite import Editor
from surgeon.structure import Selection, Structure


class _Stored(NamedTuple):
    """Names under which the codes of one weight are read, and what they are."""

    packed: str
    scale: str
    zero_point: str | None
    bits: int
    group: int
    in_features: int


class CodedWeights:
    """The codes that have been added to a graph, by the memory of the weights and their form."""

    def __init__(self, editor: Editor, hollow: bool = False) -> None:
        """Args:
        editor: of the graph.
        hollow: only what codes there are matters, not their numbers.
        """
        self._editor = editor
        self.hollow = hollow
        self._stored: dict[tuple[Key, Hashable], _Stored] = {}

    def read(self, name: str, form: Hashable, make: Callable[[Tensor], QuantizedTensor]) -> fx.Node:
        """Read the dequantized weight at the insertion point.

        Args:
            name: the name the weight is read under.
            form: what codes of one weight may differ in.
            make: quantizes the weight, where the graph is run (on the meta device where the codes are hollow); called where
                there are no such codes yet.
        """
        editor = self._editor
        weight = editor.tensor(name).detach()
        key = (memory(weight), form)
        have = self._stored.get(key)
        if have is None:
            codes = make(weight.to("meta") if self.hollow else editor.graph.placed(weight))
            packed = editor.add_tensor(f"{name}_codes", codes.packed)
            scale = editor.add_tensor(f"{name}_scale", codes.scale)
            zeros = None if codes.zero_point is None else editor.add_tensor(f"{name}_zero_point", codes.zero_point)
            names = (str(packed.target), str(scale.target), None if zeros is None else str(zeros.target))
            have = self._stored[key] = _Stored(*names, codes.bits, codes.group, codes.in_features)
        else:
            packed, scale = editor.read(have.packed), editor.read(have.scale)
            zeros = None if have.zero_point is None else editor.read(have.zero_point)
        return editor.call(
            torch.ops.surgeon.dequantize.default, packed, scale, zeros, have.bits, have.group, have.in_features
        )


def read_in_several_blocks(graph: Graph, structure: Structure) -> set[Key]:
    """Memories of weights that linears or mixtures of more than one block read."""
    everything = structure.select(Selection())
    read = [(site.part.weight, site.block) for site in everything.linears]
    read += [(moe.part.w_in, moe.block) for moe in everything.moes()]
    present = graph.parameters()  # those of blocks that the sweep is through with are gone
    readers: dict[Key, set[int | None]] = {}
    for name, block in read:
        if name in present:
            readers.setdefault(memory(present[name]), set()).add(block)
    return {key for key, blocks in readers.items() if len(blocks) > 1}
