"""Names for the parts of a model: sites where passes act, and one role for every tensor that the graph reads.

    blocks.I.attention.{q,k,v,o}    fused projections join their letters: qkv, kv; ``head.J.`` in front where each head
                                    has projections of its own
    blocks.I.ffn.{up,gate,down}     gate_up where one linear is both
    blocks.I.moe.router, blocks.I.moe.shared.{up,gate,down}, blocks.I.moe.shared_gate
    blocks.I.linear.J, linear.J     linears that no rule gave a part
    head                            the last linear on a stream behind its last block (head.0 ... where several have one)
    embedding.J                     look-up tables

A projection that was factored has two sites, ``.0`` (applied first) and ``.1``.  A tensor's role is the site's name with
``.weight``, ``.bias``, ``.weight_scale`` or ``.weight_zero_point``; the first site in this order claims a shared tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

from torch import fx

from surgeon.discovery import operators
from surgeon.discovery.flow import Flow
from surgeon.discovery.linears import Linears, stored
from surgeon.structure import FFN, Attention, Block, Embedding, Linear, Site

T = TypeVar("T")


class Naming:
    """Sites by node, in graph order.

    Attributes:
        roles: role by tensor name.
    """

    def __init__(self, flow: Flow, linears: Linears) -> None:
        self.flow = flow
        self.linears = linears
        self.roles: dict[str, str] = {}
        self._sites: dict[fx.Node, Site[Linear]] = {}

    # -- embeddings ---------------------------------------------------------------------------------------------

    def embeddings(self) -> tuple[Site[Embedding], ...]:
        """Look-up tables: rows of a stored matrix selected by integers that depend on an input, or on positions."""
        found: list[Site[Embedding]] = []
        for node in self.flow.nodes:
            if operators.kind(node) not in operators.LOOKUPS or not operators.is_float(node):
                continue
            table = node.args[0]
            held = stored(table, self.flow)
            if held is None or held.swapped or not isinstance(table, fx.Node) or len(operators.shape(table)) != 2:
                continue
            rows, width = operators.shape(table)
            name = f"embedding.{len(found)}"
            found.append(Site(name, None, Embedding(node, held.name, rows, width)))
            self.claim(held.name, f"{name}.weight")
            for part, tensor in held.parts:
                self.claim(tensor, f"{name}.weight_{part}")
        return tuple(found)

    # -- linears ------------------------------------------------------------------------------------------------

    def block(self, block: Block) -> None:
        """Name the linears and experts of a block."""
        attentions = [part for region in block.regions for part in region.attention]
        for name, attention in numbered(f"{block.name}.attention", attentions):
            self._attention(name, block.index, attention)
        for name, ffn in numbered(f"{block.name}.ffn", [part for region in block.regions for part in region.ffn]):
            self._ffn(name, block.index, ffn)
        for name, moe in numbered(f"{block.name}.moe", [part for region in block.regions for part in region.moe]):
            if moe.router is not None:
                self._linear(f"{name}.router", block.index, moe.router.node)
            experts = zip(("w_in", "w_out", "b_in", "b_out"), range(3, 7), strict=True)
            for key, position in experts:
                operand = operators.argument(moe.node, position, key)
                held = stored(operand, self.flow) if operand is not None else None
                if held is not None:
                    self.claim(held.name, f"{name}.{key}")
                    for part, tensor in held.parts:
                        self.claim(tensor, f"{name}.{key}_{part}")
            for shared_name, ffn in numbered(f"{name}.shared", list(moe.shared)):
                self._ffn(shared_name, block.index, ffn)
            if moe.shared_gate is not None:
                self._linear(f"{name}.shared_gate", block.index, moe.shared_gate.node)
            if moe.selection_bias is not None:
                self.claim(moe.selection_bias, f"{name}.selection_bias")
            if moe.expert_scale is not None:
                self.claim(moe.expert_scale, f"{name}.expert_scale")
        rest = (node for node in block.nodes if node in self.linears.whole and node not in self._sites)
        for number, node in enumerate(rest):
            self._linear(f"{block.name}.linear.{number}", block.index, node)

    def outside(self, behind: Sequence[Sequence[fx.Node]]) -> None:
        """Name the linears outside of the blocks, given the cuts of each stream behind its last block."""
        heads: list[fx.Node] = []
        for cuts in behind:
            ends = [self.flow.plain(node) for node in cuts]
            heads.extend(next(([n] for n in reversed(ends) if self._is_free(n) and n not in heads), []))
        for name, node in numbered("head", self.flow.ordered(heads)):
            self._linear(name, None, node)
        rest = (node for node in self.linears.whole if node not in self._sites)
        for number, node in enumerate(rest):
            self._linear(f"linear.{number}", None, node)

    def _is_free(self, node: fx.Node) -> bool:
        return node in self.linears.whole and node not in self._sites

    def sites(self) -> tuple[Site[Linear], ...]:
        """Every linear by name, in graph order."""
        return tuple(self._sites[node] for node in self.flow.ordered(self._sites))

    def claim(self, tensor: str, role: str) -> None:
        """Give a tensor its role, if it has none."""
        self.roles.setdefault(tensor, role)

    def _attention(self, name: str, block: int, attention: Attention) -> None:
        letters = {"q": attention.q, "k": attention.k, "v": attention.v, "o": attention.o}
        self._group(name, block, letters, "")
        for number, part in enumerate(attention.parts):
            self._attention(f"{name}.head.{number}", block, part)

    def _ffn(self, name: str, block: int, ffn: FFN) -> None:
        self._group(name, block, {"gate": ffn.gate, "up": ffn.up, "down": ffn.down}, "_")

    def _group(self, name: str, block: int, parts: dict[str, Linear | None], joint: str) -> None:
        by_node: dict[fx.Node, list[str]] = {}
        for key, linear in parts.items():
            if linear is not None:
                by_node.setdefault(linear.node, []).append(key)
        for node, keys in by_node.items():
            self._linear(f"{name}.{joint.join(keys)}", block, node)

    def _linear(self, name: str, block: int | None, node: fx.Node) -> None:
        if node in self._sites:  # one linear in two parts, such as layers that share their attention
            return
        whole = self.linears.whole[node]
        if whole.factors:
            for number, factor in enumerate(whole.factors):
                self._put(f"{name}.{number}", block, factor)
        else:
            self._put(name, block, whole)

    def _put(self, name: str, block: int | None, linear: Linear) -> None:
        self._sites[linear.node] = Site(name, block, linear)
        self.claim(linear.weight, f"{name}.weight")
        for part, tensor in self.linears.stored[linear.node].parts:
            self.claim(tensor, f"{name}.weight_{part}")
        if linear.bias is not None:
            self.claim(linear.bias, f"{name}.bias")


def numbered(name: str, parts: Sequence[T]) -> Iterator[tuple[str, T]]:
    """Names for the parts of one kind in a block: bare where there is one, numbered where there are several."""
    for index, part in enumerate(parts):
        yield (name if len(parts) == 1 else f"{name}.{index}"), part
