"""The streams of a model with what hangs on each: the nodes before, between and behind its blocks, and its label."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import fx

from surgeon.discovery.blocks import Layers, find_blocks
from surgeon.discovery.flow import Flow
from surgeon.discovery.linears import Linears
from surgeon.discovery.regions import Classifier
from surgeon.discovery.residuals import Residual, find_residuals
from surgeon.discovery.stream import Chain, find_chains
from surgeon.structure import Block, Stream


@dataclass(frozen=True)
class Trunk:
    """A stream before it has a place among others."""

    chain: Chain
    layers: Layers


def find_streams(flow: Flow, linears: Linears) -> tuple[Stream, ...]:
    """The streams of a model, their blocks numbered through.

    Args:
        flow: the graph's data flow; its ``cuts`` are set.
        linears: its linears.

    Raises:
        DiscoverError: there is no residual stream.
    """
    classifier = Classifier(flow, linears)

    def mixes(residual: Residual) -> bool:
        region = classifier.sublayer(residual.entry, residual.exit, residual.path)
        return bool(region.attention) or region.kind == "mixer"

    chains = find_chains(flow, find_residuals(flow, mixes))
    flow.cuts.update(node for chain in chains for node in _kept(flow, linears, chain))
    trunks = _worthwhile([Trunk(chain, find_blocks(flow, classifier, chain)) for chain in chains])
    numbered: list[tuple[Block, ...]] = []
    for position, trunk in enumerate(trunks):
        first = sum(len(blocks) for blocks in numbered)
        own = trunk.layers.blocks
        numbered.append(tuple(replace(block, index=first + i, stream=position) for i, block in enumerate(own)))
    prefixes, suffixes = _outside(flow, trunks)
    labels = _labels(flow, numbered)
    return tuple(
        Stream(
            label=labels[position],
            cuts=_cuts(trunk.chain, blocks[0]),
            blocks=blocks,
            prefix=flow.ordered(prefixes[position]),
            suffix=flow.ordered(suffixes[position]),
            transitions=trunk.layers.transitions,
        )
        for position, (trunk, blocks) in enumerate(zip(trunks, numbered, strict=True))
    )


def tail(stream: Stream) -> tuple[fx.Node, ...]:
    """Cuts of a stream behind its last block."""
    exit = stream.blocks[-1].exit
    return stream.cuts[stream.cuts.index(exit) + 1 :]


def _kept(flow: Flow, linears: Linears, chain: Chain) -> list[fx.Node]:
    """Cuts up to the first linear behind the last sublayer: what reads them alone does not own them."""
    last = chain.cuts.index(chain.exit)
    behind: list[fx.Node] = []
    for cut in chain.cuts[last + 1 :]:
        if flow.plain(cut) in linears.whole or cut in linears.inner:
            break
        behind.append(cut)
    return [*chain.cuts[: last + 1], *behind]


def _worthwhile(trunks: list[Trunk]) -> list[Trunk]:
    """Streams of more than one sublayer, or with attention; the longest one where there is no such."""

    def size(trunk: Trunk) -> int:
        return sum(span.residual for span in trunk.chain.spans)

    def counts(trunk: Trunk) -> bool:
        return size(trunk) > 1 or any(region.attention for block in trunk.layers.blocks for region in block.regions)

    return [trunk for trunk in trunks if counts(trunk)] or [max(trunks, key=size)]


def _cuts(chain: Chain, first: Block) -> tuple[fx.Node, ...]:
    cuts = chain.cuts
    return cuts[cuts.index(first.entry) :] if first.entry in cuts else (first.entry, *cuts[1:])


# -- nodes outside of the blocks ----------------------------------------------------------------------------------


def _outside(flow: Flow, trunks: Sequence[Trunk]) -> tuple[list[set[fx.Node]], list[set[fx.Node]]]:
    """For each stream the nodes that its first block's entry is computed from, and those computed from its last exit.

    Both without blocks and transitions, and with what only they read.  What a stream's input is computed from belongs to
    that stream, also where it comes from another one; of what follows several streams, the last one has it.
    """
    taken = {n for trunk in trunks for block in trunk.layers.blocks for n in block.nodes}
    taken |= {n for trunk in trunks for region in trunk.layers.transitions for n in region.nodes}
    prefixes: list[set[fx.Node]] = []
    for trunk in trunks:
        found: set[fx.Node] = set()
        stack = [trunk.layers.blocks[0].entry]
        while stack:
            node = stack.pop()
            if node.op not in ("placeholder", "output") and node not in found and node not in taken:
                found.add(node)
                stack.extend(node.all_input_nodes)
        prefixes.append(found)
        taken |= found
    suffixes: list[set[fx.Node]] = [set() for _ in trunks]
    for position in reversed(range(len(trunks))):
        exit = trunks[position].layers.blocks[-1].exit
        found, seen, stack = set(), {exit}, [exit]
        while stack:
            for user in stack.pop().users:
                if user.op != "output" and user not in seen:
                    seen.add(user)
                    stack.append(user)
                    if user not in taken:
                        found.add(user)
        suffixes[position] = flow.close(found, exit) - taken
        taken |= suffixes[position]
    return prefixes, suffixes


# -- labels -------------------------------------------------------------------------------------------------------


def _labels(flow: Flow, streams: Sequence[tuple[Block, ...]]) -> list[str]:
    if len(streams) == 1:
        return ["stream"]
    reads = [[i != j and _reads(flow, a, b) for j, b in enumerate(streams)] for i, a in enumerate(streams)]
    kinds = []
    for i in range(len(streams)):
        if any(row[i] for row in reads):
            kinds.append("encoder")
        else:
            kinds.append("decoder" if any(reads[i]) else "tower")
    return [
        kind if kinds.count(kind) == 1 else f"{kind}.{kinds[:position].count(kind)}" for position, kind in enumerate(kinds)
    ]


def _reads(flow: Flow, stream: tuple[Block, ...], other: tuple[Block, ...]) -> bool:
    """Whether a stream is computed from another one, and not the other way round too."""
    return flow.depends(stream[-1].exit, other[0].exit) and not flow.depends(other[-1].exit, stream[0].exit)
