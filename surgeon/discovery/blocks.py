"""From sublayers to blocks: the layers of the model.

1. Between two residual sublayers, the stream may carry nodes of its own: norms (after a sublayer), reshapes, scales.
   Reshapes belong to the sublayer before them.
2. The kinds of the sublayers, M (mixes positions), X (reads from outside of the stream) and F (position by position), repeat
   with a period that holds an M; a block is one period.  Where nothing repeats, a block starts at each M.
3. What stands between the last sublayer of one block and the first of the next belongs to the block before, as far as it is
   the same between all blocks; the last block takes as much.  So the norm after the last layer of a pre-norm model is outside,
   and that of a post-norm model inside.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import fx

from surgeon.discovery import operators
from surgeon.discovery.flow import Flow
from surgeon.discovery.regions import Classifier
from surgeon.discovery.stream import Chain, Span
from surgeon.structure import Block, Region


@dataclass(frozen=True)
class Sublayer:
    """A residual sublayer and the spans that follow it on the stream before the next one."""

    region: Region
    gap: tuple[Span, ...]


def find_blocks(flow: Flow, classifier: Classifier, chain: Chain) -> tuple[Block, ...]:
    """Blocks of a stream, in order."""
    sublayers = _sublayers(flow, classifier, chain)
    groups = _periods([_letter(sublayer.region) for sublayer in sublayers])
    layers = [sublayers[start:stop] for start, stop in groups]
    trail = _trail(layers)
    blocks = []
    for position, layer in enumerate(layers):
        last = position == len(layers) - 1
        blocks.append(_block(flow, classifier, position, layer, trail, last))
    return tuple(blocks)


def _sublayers(flow: Flow, classifier: Classifier, chain: Chain) -> list[Sublayer]:
    """Case 1."""
    starts = [i for i, span in enumerate(chain.spans) if span.residual]
    found = []
    for start, stop in zip(starts, [*starts[1:], len(chain.spans)], strict=True):
        span, gap = chain.spans[start], chain.spans[start + 1 : stop]
        region = classifier.sublayer(span.entry, span.exit, span.path)
        while gap and _is_reshape(gap[0]) and not operators.same_shape(region.exit, region.entry):
            region, gap = _extended(region, gap[0]), gap[1:]
        if stop != len(chain.spans):
            while gap and _is_reshape(gap[0]):
                region, gap = _extended(region, gap[0]), gap[1:]
        found.append(Sublayer(region, gap))
    return found


def _is_reshape(span: Span) -> bool:
    return all(operators.is_reshape(node) for node in span.path)


def _extended(region: Region, span: Span) -> Region:
    return replace(region, exit=span.exit, nodes=(*region.nodes, span.exit))


def _letter(region: Region) -> str:
    if region.attention and all(attention.cross for attention in region.attention):
        return "X"
    return "M" if region.kind in ("attention", "parallel", "mixer") else "F"


def _periods(letters: list[str]) -> list[tuple[int, int]]:
    """Case 2: (start, stop) of each block's sublayers."""
    count = len(letters)
    for period in range(1, count + 1):
        repeats = count % period == 0 and all(letters[i] == letters[i - period] for i in range(period, count))
        if repeats and (letters[:period].count("M") == 1 or ("M" not in letters and period == 1)):
            return [(start, start + period) for start in range(0, count, period)]
    starts = [i for i, letter in enumerate(letters) if letter == "M"] or [0]
    starts[0] = 0
    return list(zip(starts, [*starts[1:], count], strict=True))


def _signature(gap: tuple[Span, ...]) -> list[str]:
    return [operators.kind(span.exit) for span in gap]


def _trail(layers: list[list[Sublayer]]) -> int:
    """Case 3: how many spans behind its last sublayer belong to a block."""
    if len(layers) > 1:
        gaps = [layer[-1].gap for layer in layers[:-1]]
    else:  # one block: what stands between its own sublayers tells where its norms are
        gaps = [sublayer.gap for sublayer in layers[0][:-1]]
        if not gaps:
            return 0
        gaps.append(layers[0][-1].gap)
    common = _signature(gaps[0])
    for gap in gaps[1:]:
        other = _signature(gap)
        same = 0
        while same < min(len(common), len(other)) and common[same] == other[same]:
            same += 1
        common = common[:same]
    return len(common)


def _block(
    flow: Flow, classifier: Classifier, index: int, layer: list[Sublayer], trail: int, last: bool
) -> Block:
    entry = layer[0].region.entry
    regions: list[Region] = []
    for sublayer in layer[:-1]:
        regions.append(sublayer.region)
        regions.extend(_between(classifier, sublayer.gap))
    regions.append(layer[-1].region)
    gap = layer[-1].gap[:trail]
    while gap and not operators.same_shape(gap[-1].exit, entry):
        gap = gap[:-1]
    regions.extend(_between(classifier, gap))
    exit = regions[-1].exit
    path = flow.between(entry, exit)
    nodes = flow.ordered(flow.close(path, entry))
    inside = set(nodes)
    read = dict.fromkeys(str(node.target) for node in nodes if node.op == "get_attr")
    weights = tuple(name for name in read if all(reader in inside for reader in flow.readers[name]))
    return Block(index, entry, exit, tuple(regions), nodes, weights)


def _between(classifier: Classifier, gap: tuple[Span, ...]) -> list[Region]:
    if not gap:
        return []
    path = frozenset(node for span in gap for node in span.path)
    return [classifier.on_stream(gap[0].entry, gap[-1].exit, path)]


def tail(chain: Chain, exit: fx.Node) -> tuple[fx.Node, ...]:
    """Cuts of the stream behind a node."""
    cuts = [span.exit for span in chain.spans]
    return tuple(cuts[cuts.index(exit) + 1 :])
