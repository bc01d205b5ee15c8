"""From a graph to a decoder in llama.cpp's terms (``_gguf_parts``), or everything that keeps it from being one.

The graph's structure says where attention, feed-forward networks and mixtures are; what they compute is found by running
their pieces (``_gguf_probe``), and each sublayer, read like this, is held against the graph on random hidden states.  So no
class and no spelling is known here, and what computes anything else is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, fx

import surgeon.ops  # noqa: F401  # registers torch.ops.surgeon
from surgeon.backends._gguf_attention import AttentionReader
from surgeon.backends._gguf_ffn import apply, read_ffn, read_mixture
from surgeon.backends._gguf_parts import Decoder, FeedForward, Layer, Matrix, Mixture, Norm
from surgeon.backends._gguf_probe import Evaluation, accuracy, dtype_of, read_norm, relative, unit
from surgeon.backends._gguf_weights import matrix, table
from surgeon.caches import MASK, OPTIONAL, PAST
from surgeon.contract import Refusal
from surgeon.discovery import discover
from surgeon.discovery.flow import Flow
from surgeon.discovery.linears import Linears
from surgeon.graph import Graph, Port
from surgeon.routes import RECORDED
from surgeon.structure import Block, Structure

Part = TypeVar("Part")
ENGINES = "the engines (onnxruntime, aotinductor, tensorrt) can"
_ROWS, _LENGTH = 2, 12
"""Sizes of the hidden states on which sublayers are compared."""
_DYNAMIC = torch.ops.surgeon.fake_quantize_dynamic.default


class Refused(Exception):
    """A part that the format cannot say: the node or site, and why."""

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(reason)
        self.refusal = Refusal(where, reason)


def read(graph: Graph, *, repeat_merged: bool) -> Decoder | list[Refusal]:
    """The decoder that a graph is, or why it is none that llama.cpp's formats can say.

    Args:
        graph: with the values of its weights; stays as it is.
        repeat_merged: an expert that stands for several is as many experts.
    """
    if graph.source.weights == "fake":
        return [Refusal("weights", "it was traced over fake weights, and what its parts compute is found by running them")]
    refusals = list(_ports(graph))
    if refusals:
        return refusals
    flow = Flow(graph)
    structure = discover(graph)
    refusals = list(_whole(graph, structure))
    if refusals:
        return refusals
    return _Reader(graph, flow, structure, repeat_merged=repeat_merged).read()


def tokens_of(graph: Graph) -> Port | None:
    """The input that holds the tokens: the one of integers [batch, length] that is no mask and no positions."""
    found = [
        port for port in graph.inputs
        if port.role == "" and port.name != MASK and len(port.shape) == 2 and not port.dtype.is_floating_point
        and port.dtype != torch.bool
    ]  # fmt: skip
    return found[0] if len(found) == 1 else None


def _ports(graph: Graph) -> Iterator[Refusal]:
    tokens = tokens_of(graph)
    if tokens is None or not all(isinstance(size, str) for size in tokens.shape):
        shapes = ", ".join(f"{port.name} {list(port.shape)}" for port in graph.inputs if port.role != PAST)
        yield Refusal(
            "inputs", f"llama.cpp is given one text of tokens, [batch, length] with both free; the model takes {shapes}; "
            f"{ENGINES} run it"
        )  # fmt: skip
        return
    for port in graph.inputs:
        if port.role not in OPTIONAL and port.name not in (tokens.name, MASK):
            yield Refusal(port.name, f"llama.cpp is given tokens alone and has no such input; {ENGINES} take it")
        elif port.role in OPTIONAL and port.role != PAST and "positions" not in port.role:
            yield Refusal(port.name, f"llama.cpp has no such input; leave out expose_routing, or {ENGINES} take it")
    shown = [port for port in graph.outputs if port.role == ""]
    for port in graph.outputs:
        if port.role == RECORDED:
            yield Refusal(port.name, f"llama.cpp has no such output; leave out expose_routing, or {ENGINES} give it")
    if len(shown) != 1 or len(shown[0].shape) != 3:
        given = ", ".join(f"{port.name} {list(port.shape)}" for port in shown)
        yield Refusal(
            "outputs", f"the model gives {given}; llama.cpp gives the logits of a causal language model, one output [batch, "
            f"length, vocabulary]; {ENGINES} give any"
        )  # fmt: skip


def _whole(graph: Graph, structure: Structure) -> Iterator[Refusal]:
    """What concerns the graph as a whole."""
    for node in graph.module.graph.find_nodes(op="call_function", target=_DYNAMIC):
        reader = next(iter(node.users), node)
        yield Refusal(
            reader.name, "its input is rounded to 8 bits by a range of the whole tensor (int8_dynamic), and llama.cpp rounds "
            f"blocks of 32 inside of its products; quantize with scheme int8, or {ENGINES} run it"
        )  # fmt: skip
        return
    if len(structure.streams) != 1:
        labels = ", ".join(stream.label for stream in structure.streams)
        streams = f"several residual streams ({labels})" if structure.streams else "no residual stream"
        yield Refusal("model", f"it has {streams}, and a decoder has one; {ENGINES} run it")


class _Reader:
    """Reads one graph.

    Attributes:
        run: evaluates it on a few tokens.
        noise: hidden states [rows, length, H].
    """

    def __init__(self, graph: Graph, flow: Flow, structure: Structure, *, repeat_merged: bool) -> None:
        self.graph, self.flow, self.structure = graph, flow, structure
        self.repeat_merged = repeat_merged
        self.stream = structure.streams[0]
        tokens = tokens_of(graph)
        assert tokens is not None
        self.tokens = tokens
        self.generator = torch.Generator().manual_seed(0)
        self.run = Evaluation(flow, self.inputs(_ROWS, _LENGTH))
        width = self.stream.blocks[0].entry.meta["val"].shape[-1]
        noise = torch.randn(_ROWS, _LENGTH, int(width), generator=self.generator)
        self.noise = noise.to(dtype_of(self.stream.blocks[0].entry)).float()  # as the graph reads it
        self.attentions = AttentionReader(graph, flow, Linears(flow), self.inputs)
        self.accuracy = accuracy(graph)

    def inputs(self, rows: int, length: int) -> dict[str, Tensor]:
        """Tokens of these sizes and what goes with them."""
        example = self.graph.example[self.tokens.name]
        low, high = int(example.min()), int(example.max())
        ids = torch.randint(low, high + 1, (rows, length), generator=self.generator).to(example.dtype)
        found = {self.tokens.name: ids}
        for port in self.graph.inputs:
            if port.name == MASK:
                found[MASK] = torch.ones(rows, length, dtype=port.dtype)
        return found

    def read(self) -> Decoder | list[Refusal]:
        refusals: list[Refusal] = []
        layers: list[Layer] = []
        for block in self.stream.blocks:
            try:
                layers.append(self.layer(block))
            except Refused as refused:
                refusals.append(refused.refusal)
        if refusals:
            return refusals
        try:
            return self.part("model", lambda _: self.around(tuple(layers)))
        except Refused as refused:
            return [refused.refusal]

    # -- one block --------------------------------------------------------------------------------------------------

    def layer(self, block: Block) -> Layer:
        """The parts of a block, each held against the graph."""
        kinds = [region.kind for region in block.regions]
        if self.stream.transitions or kinds not in (["attention", "ffn"], ["attention", "moe"]):
            reason = next((region.reason for region in block.regions if region.reason), "")
            what = f"{block.kind} ({reason})" if reason else block.kind
            raise Refused(
                block.name, f"it is {what}, and the formats that are written here have an attention and then a feed-forward "
                f"network or a mixture in every layer; {ENGINES} run it"
            )  # fmt: skip
        first, second = block.regions
        attention = self.part(
            f"{block.name}.attention",
            lambda site: self.attentions.read(first, site, self.noise, self.run),
        )
        self.same(f"{block.name}.attention", first.entry, first.exit, self.attentions.apply(attention, self.noise))
        given = (self.graph, self.flow, self.run, second)

        def read(site: str) -> FeedForward | Mixture:
            if second.kind == "moe":
                return read_mixture(*given, site, self.noise, repeat=self.repeat_merged)
            return read_ffn(*given, site, self.noise)

        ffn = self.part(f"{block.name}.{second.kind}", read)
        self.same(ffn.site, second.entry, second.exit, apply(ffn, self.noise))
        return Layer(attention, ffn)

    def part(self, site: str, reading: Callable[[str], Part]) -> Part:
        """What a reading gives, or its reason why not as a refusal."""
        try:
            return reading(site)
        except ValueError as error:
            raise Refused(site, f"{error}; {ENGINES} run it") from None
        except (RuntimeError, IndexError) as error:  # pieces of another shape than any that is known
            said = str(error).splitlines()[0]
            raise Refused(site, f"its pieces have other shapes than those of a decoder ({said}); {ENGINES} run it") from None

    def same(self, site: str, entry: fx.Node, exit: fx.Node, found: Tensor) -> None:
        """Hold what was read of a sublayer against the graph."""
        start = self.noise.reshape(self.run.sizes(entry)).to(dtype_of(entry))
        wanted = self.run.one(exit, {entry: start}).reshape(self.noise.shape)
        # The sublayer's own part, beside what adding it to the hidden state rounds.
        added = wanted - self.noise
        lost = float((found - wanted).norm()) - unit(dtype_of(exit)) * float(wanted.norm())
        error = lost / max(float(added.norm()), 1e-30)
        if not error <= 5 * self.accuracy:
            raise Refused(
                site, f"it computes something else than what was recognised in it: outputs differ by {error:.1e} (relative); "
                f"formats know projections, norms, rotary positions, causal softmax, gates and mixtures; {ENGINES} run it"
            )

    # -- before and behind the blocks -------------------------------------------------------------------------------

    def around(self, layers: tuple[Layer, ...]) -> Decoder:
        """Embedding, last norm and head."""
        notes: list[str] = []
        entry, last = self.stream.blocks[0].entry, self.stream.blocks[-1].exit
        embedding, positions, norm = self.start(entry, notes)
        head_site = next((site for site in self.structure.linears if site.name == "head"), None)
        output = self.flow.outputs[[port.role for port in self.graph.outputs].index("")]
        if head_site is None:
            raise Refused("head", f"behind the blocks is no single linear that gives the logits; {ENGINES} run it")
        head_linear = head_site.part
        head = matrix(self.graph, self.flow, head_linear, "head")
        final: Norm | None = None
        if head_linear.input is not last:
            found = read_norm(self.run, last, head_linear.input, {}, self.noise)
            if isinstance(found, str):
                raise Refused("final_norm", f"{found}; {ENGINES} run it")
            final = found
        hidden = self.noise if final is None else final.apply(self.noise)
        wanted = self.run.one(output, {last: self.noise.reshape(self.run.sizes(last)).to(dtype_of(last))})
        logits = head.apply(hidden)
        ratio = float((logits * wanted).sum() / (logits * logits).sum())
        error = relative(ratio * logits, wanted)
        if not error <= 10 * self.accuracy:
            raise Refused(
                "head", f"the logits are not the head's product alone (relative difference {error:.1e}), a soft cap or a norm "
                f"behind it is not written; {ENGINES} run it"
            )
        if abs(ratio - 1) > 1e-3:
            head = replace(head, factor=head.factor * ratio)
            notes.append(f"the factor {ratio:.6g} of the logits is in the weights of the head")
        tied = self.tied(embedding, head)
        logits_name = next(port.name for port in self.graph.outputs if port.role == "")
        return Decoder(
            self.tokens.name, logits_name, embedding, positions, norm, layers, final, head, tied, self.context(positions), notes
        )

    def start(self, entry: fx.Node, notes: list[str]) -> tuple[Matrix, Matrix | None, Norm | None]:
        """Tables that the first block's entry is made of."""
        sites = [site.part for site in self.structure.embeddings]
        ids = self.graph.module.graph.find_nodes(op="placeholder")[[p.name for p in self.graph.inputs].index(self.tokens.name)]
        words = [part for part in sites if ids in part.node.all_input_nodes]
        others = [part for part in sites if part not in words and self.flow.depends(entry, part.node)]
        if len(words) != 1 or len(others) > 1:
            raise Refused(
                "embedding", f"the hidden state starts from {len(words)} tables of tokens and {len(others)} others; formats "
                f"have one of tokens and at most one of positions; {ENGINES} run it"
            )
        embedding = table(self.graph, self.flow, words[0], "embedding.0")
        rows = self.run.one(words[0].node, {})
        wanted = self.run.one(entry, {})
        if not others:
            ratio = float((rows * wanted).sum() / (rows * rows).sum())
            if relative(ratio * rows, wanted) <= 10 * self.accuracy:
                if abs(ratio - 1) > 1e-6:
                    embedding = replace(embedding, factor=ratio)
                    notes.append(f"the factor {ratio:.6g} of the embedding is in its weights")
                return embedding, None, None
            norm = read_norm(self.run, words[0].node, entry, {}, torch.randn(rows.shape, generator=self.generator))
            if isinstance(norm, str):
                raise Refused("embedding", f"behind the table of tokens: {norm}; {ENGINES} run it")
            return embedding, None, norm
        positions = table(self.graph, self.flow, others[0], "position_embedding")
        seen = self.run.one(others[0].node, {})
        held = positions.dense().float()
        shift = self.shift(seen, held)
        if relative(rows + seen, wanted) > 10 * self.accuracy or shift is None:
            raise Refused(
                "embedding", "the hidden state does not start as the sum of an embedding of tokens and one row of a table per "
                f"position; {ENGINES} run it"
            )
        if shift:
            count, width = held.shape
            positions = replace(positions, rows=torch.arange(shift, count), shape=(count - shift, width))
            notes.append(f"the first {shift} rows of the table of positions, which no text reads, are left out")
        return embedding, positions, None

    def shift(self, seen: Tensor, held: Tensor) -> int | None:
        """The row of the table of positions that the first position reads; None where they do not count up from it."""
        seen = seen.reshape(-1, *seen.shape[-2:])
        for first in range(min(8, held.shape[0] - _LENGTH + 1)):
            if relative(seen[0], held[first : first + _LENGTH]) <= self.accuracy:
                return first
        return None

    def tied(self, embedding: Matrix, head: Matrix) -> bool:
        """Whether the head is the embedding itself."""
        if head.bias is not None or embedding.shape != head.shape:
            return False
        if embedding.codes is not None and head.codes is not None:
            return embedding.codes.packed.data_ptr() == head.codes.packed.data_ptr()
        if embedding.codes is not None or head.codes is not None:
            return False
        return embedding.make().data_ptr() == head.make().data_ptr()

    def context(self, positions: Matrix | None) -> int:
        """Tokens that the model was made for."""
        if positions is not None:
            return positions.shape[0]
        known = self.graph.source.generation or {}
        configured = self.graph.source.config.get("max_position_embeddings")
        lengths = [known.get("table_length"), known.get("trained_length"), configured]
        return next((int(length) for length in lengths if length), 2048)
