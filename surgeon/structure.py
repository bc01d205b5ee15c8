"""What the structure of a model is: frozen data that refers to the nodes of one graph.

``surgeon.discover`` makes it; it is never stored in the graph and is recomputed after every pass.

Vocabulary: a *residual stream* is a chain of tensors that every path from a hidden state to an output passes through; a model
has one, or several (encoder and decoder, towers).  A *cut* is one tensor of that chain.  A *region* lies between two
consecutive cuts (one sublayer: attention, FFN, MoE ..., with its norm and its residual addition).  A *block* is the repeated
group of regions, a layer in common speech.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Generic, Literal, TypeVar

from torch import fx

T = TypeVar("T")

RegionKind = Literal["attention", "ffn", "moe", "parallel", "mixer", "norm", "other"]


@dataclass(frozen=True)
class Linear:
    """A matrix multiplication with a weight: ``y = x W^T + b``.

    Attributes:
        node: the node that computes y (or, for a fused product, the whole of it).
        input: the node x.
        weight: name the weight is read under.
        bias: name of the bias, or None.
        transposed: True where the weight is stored [in, out] instead of [out, in].
        in_features: size of x's last dimension.
        out_features: number of output features that this linear means (fewer than the weight has where it is a part).
        rows: (start, stop) output features of the weight that belong to this linear, None for all.
        index: the output features where they are some but not contiguous (``rows`` is None then), otherwise None.
        factors: the two linears (applied first, applied second) that this projection was factored into, with nothing in
            between; ``input`` and ``in_features`` are then those of the first, everything else that of the second.
        columns: (start, stop) input features of the weight that this linear means, where its input is several values side
            by side and the part reads one of them; None for all.  ``in_features`` counts them.
    """

    node: fx.Node
    input: fx.Node
    weight: str
    bias: str | None
    transposed: bool
    in_features: int
    out_features: int
    rows: tuple[int, int] | None = None
    index: tuple[int, ...] | None = None
    factors: tuple[Linear, ...] = ()
    columns: tuple[int, int] | None = None


@dataclass(frozen=True)
class Attention:
    """Multi-head attention of one region.

    Attributes:
        node: the scaled-dot-product node, or the last node of an explicit softmax spelling.
        q, k, v: projections; fused projections share a node and differ in ``rows`` (None where rows interleave).
        o: output projection, or None.
        heads: number of query heads.
        kv_heads: number of key/value heads.
        head_dim: size of one query/key head.
        causal: whether the node masks the future by itself; None where a mask tensor decides.
        cross: keys and values come from outside the residual stream.
        parts: the single heads, where each has projections of its own; q, k or v of the whole are None then.
    """

    node: fx.Node
    q: Linear | None
    k: Linear | None
    v: Linear | None
    o: Linear | None
    heads: int
    kv_heads: int
    head_dim: int
    causal: bool | None
    cross: bool = False
    parts: tuple[Attention, ...] = ()


@dataclass(frozen=True)
class FFN:
    """A position-wise feed-forward network ``down(act(gate(x)) * up(x))`` or ``down(act(up(x)))``.

    Attributes:
        input: the node x that both up and gate read.
        up: up projection.
        gate: gate projection, None for a plain FFN.
        down: down projection.
        hidden: the node that ``down`` reads (the intermediate activation, last dimension = width).
        activation: name of a gate (:mod:`surgeon.gates`), such as ``silu``, or None where it was not recognised.
        width: number of intermediate neurons.
        layout: how gate and up are stored: ``separate``, ``concatenated`` ([gate | up]), ``interleaved``; ``plain``
            without gate.
        normed: a normalisation stands in front of ``down``, so that its neurons depend on each other.
        scaled: its neurons are multiplied by learned vectors, or by another input of the layer, or their activation has
            learned numbers, beside its own weights.
    """

    input: fx.Node
    up: Linear
    gate: Linear | None
    down: Linear
    hidden: fx.Node
    activation: str | None
    width: int
    layout: str = "plain"
    normed: bool = False
    scaled: bool = False


@dataclass(frozen=True)
class MoE:
    """A mixture of experts in the form of one ``surgeon::moe`` node.

    Attributes:
        node: the ``surgeon::moe`` node.
        input: its x, [tokens, hidden].
        router: the router's linear, None where it was not recognised (see ``reason``).
        logits: node of the router's scores before selection, [tokens, experts]; behind a soft cap or a temperature, which
            the routing is told without.  Of experts that were merged, or where no expert is a choice too, [tokens, choices]:
            the router has rows for more choices than there are experts, and groups, corrections and factors are those of
            choices.
        index: node of the selected experts, [tokens, top_k].
        weight: node of their weights, [tokens, top_k].
        experts: number of experts E.
        top_k: experts per token k.
        scoring: ``softmax``, ``sigmoid``, ``topk_softmax`` (softmax over the selected logits only), ``uniform`` (all
            weights equal), ``relu``, ``sparsemixer``, ``expert_choice`` ... (:mod:`surgeon.discovery.routing`) or
            ``other``.
        normalised: the selected weights are divided by their sum.
        width: intermediate neurons per expert.
        gated: experts are gated FFNs.
        activation: name of a gate (:mod:`surgeon.gates`).
        w_in: name of the stacked input weights [E, O, H].
        w_out: name of the stacked output weights [E, H, I].
        b_in: name of their biases [E, O] or None.
        b_out: name of their biases [E, H] or None.
        shared: FFNs that every token passes through beside the routed experts.
        scale: factor of all routing weights, beyond what ``scoring`` and ``normalised`` say.
        shared_gate: the linear with one output that scales the shared experts, or None.
        selection_bias: name of the vector that is added to the scores for the selection only, or None.
        groups: groups of equal size that the experts stand in; 1 for none.
        top_groups: groups that a token's experts are selected from.
        group_worth: members by whose summed scores a group is ranked, the best one or the best two.
        capacity: tokens that an expert takes (of one sequence, where tokens are counted per sequence), or None.
        masked: some selected experts weigh exactly 0, those that the router skips for a token.
        input_scaled: the weights multiply the experts' inputs instead of their outputs.
        expert_scale: name of the vector [E] whose entries multiply the weights of the experts in the end, or None.
    """

    node: fx.Node
    input: fx.Node
    router: Linear | None
    logits: fx.Node | None
    index: fx.Node
    weight: fx.Node
    experts: int
    top_k: int
    scoring: str
    normalised: bool
    width: int
    gated: bool
    activation: str
    w_in: str
    w_out: str
    b_in: str | None
    b_out: str | None
    shared: tuple[FFN, ...] = ()
    scale: float = 1.0
    shared_gate: Linear | None = None
    selection_bias: str | None = None
    groups: int = 1
    top_groups: int = 1
    group_worth: int = 1
    capacity: int | None = None
    masked: bool = False
    input_scaled: bool = False
    expert_scale: str | None = None

    @property
    def routed(self) -> tuple[fx.Node, ...]:
        """What its tokens come with: nodes of x [tokens, hidden], and of experts and weights, [tokens, top_k]."""
        return tuple(operand for operand in self.node.args[:3] if isinstance(operand, fx.Node))


@dataclass(frozen=True)
class Region:
    """One sublayer between two consecutive cuts.

    Attributes:
        kind: what the region is; ``parallel`` holds attention and FFN side by side; ``mixer`` mixes positions without
            softmax attention; ``norm`` is one on the stream, or a scale and shift; ``other`` is opaque.
        entry: the cut the region starts from.
        exit: the cut the region ends in (the residual addition).
        nodes: nodes between the two, without entry, with exit, in graph order.
        attention, ffn, moe: parts that were recognised.
        reason: for ``other`` and for missing parts: which rule came nearest, and where it broke.
    """

    kind: RegionKind
    entry: fx.Node
    exit: fx.Node
    nodes: tuple[fx.Node, ...]
    attention: tuple[Attention, ...] = ()
    ffn: tuple[FFN, ...] = ()
    moe: tuple[MoE, ...] = ()
    reason: str | None = None


@dataclass(frozen=True)
class Block:
    """One layer: the repeated group of regions.

    Attributes:
        index: position among the blocks of all streams, from 0.
        entry: hidden state that enters, [batch, sequence, hidden].
        exit: hidden state that leaves.
        regions: its sublayers in order.
        nodes: its nodes in graph order, without entry, with exit.
        weights: names of the tensors that only this block reads.
        stream: position of its stream in ``Structure.streams``.
        features: the dimension of entry and exit that holds the features, from the end: -3 of maps
            [batch, features, height, width].
    """

    index: int
    entry: fx.Node
    exit: fx.Node
    regions: tuple[Region, ...]
    nodes: tuple[fx.Node, ...]
    weights: tuple[str, ...]
    stream: int = 0
    features: int = -1

    @property
    def name(self) -> str:
        """Site name of the block, ``blocks.3``."""
        return f"blocks.{self.index}"

    @property
    def kind(self) -> str:
        """Kinds of the regions joined by ``+``, e.g. ``attention+ffn``."""
        return "+".join(region.kind for region in self.regions)


@dataclass(frozen=True)
class Stream:
    """One residual stream and what hangs on it.

    Attributes:
        label: ``stream`` where the model has one.  Of several, ``encoder`` (``encoder.0`` ...) is read by another stream and
            ``decoder`` reads another one, through cross-attention or as its input; ``tower.0`` ... do neither.
        cuts: the tensors that every path along it passes through, from the entry of its first block on.
        blocks: its layers in order.
        prefix: nodes that the first block's entry is computed from, in graph order.
        suffix: nodes behind its last block, in graph order.
        transitions: what stands between blocks, such as a change of resolution.
    """

    label: str
    cuts: tuple[fx.Node, ...]
    blocks: tuple[Block, ...]
    prefix: tuple[fx.Node, ...]
    suffix: tuple[fx.Node, ...]
    transitions: tuple[Region, ...] = ()


@dataclass(frozen=True)
class Site(Generic[T]):
    """A place where a pass may act.

    Attributes:
        name: stable name, e.g. ``blocks.3.ffn``, ``blocks.3.attention.q``, ``blocks.0.moe``, ``head``, ``embedding.0``.
        block: index of the block, None outside of the blocks.
        part: the structure found there.
    """

    name: str
    block: int | None
    part: T


@dataclass(frozen=True)
class Embedding:
    """A look-up table: ``node = weight[ids]``; ``weight`` is the name it is read under, [rows, width]."""

    node: fx.Node
    weight: str
    rows: int
    width: int


@dataclass(frozen=True)
class Selection:
    """Which sites a pass may act on: the blocks and name patterns of its ``blocks:`` and ``names:`` fields.

    Attributes:
        blocks: block indices (None among them: outside the blocks), or None for everywhere.
        names: shell patterns over site names and weight names, empty for all.
        matched: the patterns that have admitted something, of this selection and of those narrowed from it.
    """

    blocks: frozenset[int | None] | None = None
    names: tuple[str, ...] = ()
    matched: set[str] = field(default_factory=set, compare=False, repr=False)

    def admits(self, name: str, block: int | None, weights: tuple[str, ...] = ()) -> bool:
        """Whether a site of that name, block and weight names is selected."""
        if self.blocks is not None and block not in self.blocks:
            return False
        found = [pattern for pattern in self.names if any(fnmatchcase(text, pattern) for text in (name, *weights))]
        self.matched.update(found)
        return bool(found) or not self.names


@dataclass(frozen=True)
class Structure:
    """The discovered structure of one graph, and the part of it that a pass may act on.

    Attributes:
        streams: the residual streams, in the order in which they are computed.  A node is in the prefix, suffix,
            transitions or blocks of one of them at most.
        embeddings: look-up tables.
        linears: every linear of the graph by site name, in graph order, including those inside attention and FFNs,
            experts excluded; ``head`` is the last one on a stream behind its blocks (numbered where several have one).
        roles: role of every tensor the graph reads: ``blocks.0.ffn.up.weight`` ... by tensor name.
        unrecognised: what has no role, with the reason.
        selection: what the running pass may touch.
    """

    streams: tuple[Stream, ...]
    embeddings: tuple[Site[Embedding], ...]
    linears: tuple[Site[Linear], ...]
    roles: dict[str, str]
    unrecognised: dict[str, str]
    selection: Selection = field(default_factory=Selection)

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks of all streams, by index."""
        return tuple(block for stream in self.streams for block in stream.blocks)

    @property
    def prefix(self) -> tuple[fx.Node, ...]:
        """Nodes before the first block of a stream."""
        return tuple(node for stream in self.streams for node in stream.prefix)

    @property
    def suffix(self) -> tuple[fx.Node, ...]:
        """Nodes behind the last block of a stream."""
        return tuple(node for stream in self.streams for node in stream.suffix)

    def select(self, selection: Selection) -> Structure:
        """The same structure with another selection."""
        return replace(self, selection=selection)

    def selected_blocks(self) -> tuple[Block, ...]:
        """Blocks that the pass may act on."""
        return tuple(b for b in self.blocks if self.selection.admits(b.name, b.index, b.weights))

    def ffns(self) -> Iterator[Site[FFN]]:
        """Selected FFNs as ``blocks.I.ffn`` (``blocks.I.ffn.J`` where a block has several)."""
        for block in self.blocks:
            parts = [ffn for region in block.regions for ffn in region.ffn]
            for name, part in _numbered(f"{block.name}.ffn", parts):
                linears = (part.up, part.down) + ((part.gate,) if part.gate else ())
                if self.selection.admits(name, block.index, tuple(linear.weight for linear in linears)):
                    yield Site(name, block.index, part)

    def moes(self) -> Iterator[Site[MoE]]:
        """Selected mixtures of experts as ``blocks.I.moe``."""
        for block in self.blocks:
            parts = [moe for region in block.regions for moe in region.moe]
            for name, part in _numbered(f"{block.name}.moe", parts):
                if self.selection.admits(name, block.index, (part.w_in, part.w_out)):
                    yield Site(name, block.index, part)

    def attentions(self) -> Iterator[Site[Attention]]:
        """Selected attentions as ``blocks.I.attention``."""
        for block in self.blocks:
            parts = [attention for region in block.regions for attention in region.attention]
            for name, part in _numbered(f"{block.name}.attention", parts):
                weights = tuple(p.weight for p in (part.q, part.k, part.v, part.o) if p)
                if self.selection.admits(name, block.index, weights):
                    yield Site(name, block.index, part)

    def selected_linears(self) -> Iterator[Site[Linear]]:
        """Selected linears (routers included, experts excluded)."""
        for site in self.linears:
            if self.selection.admits(site.name, site.block, (site.part.weight,)):
                yield site

    def selected_embeddings(self) -> Iterator[Site[Embedding]]:
        """Selected embedding tables."""
        for site in self.embeddings:
            if self.selection.admits(site.name, site.block, (site.part.weight,)):
                yield site


def _numbered(name: str, parts: list[T]) -> Iterator[tuple[str, T]]:
    """Names for the parts of one kind in a block: bare where there is one, numbered where there are several."""
    for index, part in enumerate(parts):
        yield (name if len(parts) == 1 else f"{name}.{index}"), part
