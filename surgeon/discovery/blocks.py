"""From sublayers to blocks: the layers of a stream.

1. Between two residual sublayers, the stream may carry nodes of its own: norms (after a sublayer), reshapes, scales, a
   change of resolution.  Reshapes belong to the sublayer before them.  A sum of two branches that both start at one cut, with
   attention in it, is a sublayer whose shortcut is not the identity.
2. Sublayers are M (mix positions), X (read from outside of the stream) or F (position by position, or by convolution right
   behind an attention).  Where they repeat with a period, a block is one period; it ends earlier where an F is followed by
   an M or X, unless it starts with an F.  Where nothing repeats, a block starts at each M (but not right behind an X that
   starts one), and at an X behind an F.  A block never crosses a change of the hidden state's size, unless the sizes repeat
   with the sublayers (a class token that some of them are without).
3. A single convolution before blocks that have attention, and an F behind repeated blocks, stand outside of the blocks;
   so do Fs after a change of size at the end.
4. What stands between the last sublayer of one block and the first of the next belongs to the block before, as far as it is
   the same between all blocks, or all that are followed by one of their kind; the last block takes as much.  So the norm
   after the last layer of a pre-norm model is outside, and that of a post-norm model inside.  The rest is a *transition*.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

from torch import fx

from surgeon.discovery import operators
from surgeon.discovery.flow import Flow
from surgeon.discovery.regions import Classifier
from surgeon.discovery.residuals import is_sum
from surgeon.discovery.stream import Chain, Span
from surgeon.structure import Block, Region

Group = tuple[int, int]
"""Start and stop of the sublayers of a block."""


@dataclass(frozen=True)
class Sublayer:
    """A sublayer, and the reshapes and then the other spans that follow it on the stream before the next one."""

    region: Region
    reshapes: tuple[Span, ...]
    gap: tuple[Span, ...]

    def reshaped(self, like: fx.Node | None = None) -> tuple[Region, tuple[Span, ...]]:
        """The region with its reshapes, or with as many as it takes to the shape of a node; and the spans behind.

        Where no number of them leads to that shape, none belongs to the region.
        """
        if like is None:
            stop = len(self.reshapes)
        else:
            exits = [self.region.exit, *(span.exit for span in self.reshapes)]
            stop = next((i for i, exit in enumerate(exits) if operators.same_shape(exit, like)), 0)
        region = self.region
        for span in self.reshapes[:stop]:
            region = replace(region, exit=span.exit, nodes=(*region.nodes, span.exit))
        return region, (*self.reshapes[stop:], *self.gap)


@dataclass(frozen=True)
class Layers:
    """The blocks of a stream, numbered from 0, and what stands between them."""

    blocks: tuple[Block, ...]
    transitions: tuple[Region, ...]


def find_blocks(flow: Flow, classifier: Classifier, chain: Chain) -> Layers:
    """Blocks of a stream, in order."""
    flat = [span for span in chain.spans if span.residual and len(operators.shape(span.entry)) == 3]
    axes = [classifier.feature_axes(span.entry, span.path) for span in flat]
    classifier.channels_first = set().union(*axes) == {-2}
    sublayers = _sublayers(flow, classifier, chain)
    groups = group(sublayers, _letters(classifier, sublayers))
    layers = [sublayers[start:stop] for start, stop in groups]
    trail = _trail(layers, sublayers[groups[-1][1] :])
    blocks: list[Block] = []
    transitions: list[Region] = []
    for position, layer in enumerate(layers):
        block, rest = _block(flow, classifier, position, layer, trail)
        blocks.append(block)
        if rest and position < len(layers) - 1:
            transitions.extend(_between(classifier, rest))
    return Layers(tuple(blocks), tuple(transitions))


# -- Case 1 -------------------------------------------------------------------------------------------------------


def _sublayers(flow: Flow, classifier: Classifier, chain: Chain) -> list[Sublayer]:
    spans = list(chain.spans)
    last = max(i for i, span in enumerate(spans) if span.residual)
    regions = {
        i: region
        for i, span in enumerate(spans)
        if (region := _region(flow, classifier, span, i < last)) is not None
    }
    found = []
    for start, stop in zip(regions, [*list(regions)[1:], len(spans)], strict=True):
        gap = tuple(spans[start + 1 : stop])
        count = next((i for i, span in enumerate(gap) if not _is_reshape(span)), len(gap))
        found.append(Sublayer(regions[start], gap[:count], gap[count:]))
    return found


def _region(flow: Flow, classifier: Classifier, span: Span, between: bool) -> Region | None:
    if span.residual:
        return classifier.sublayer(span.entry, span.exit, span.path)
    if not between or not is_sum(flow, span.exit) or not all(n in span.path for n in flow.inputs(span.exit)):
        return None
    region = classifier.sublayer(span.entry, span.exit, span.path)
    return region if region.attention else None


def _is_reshape(span: Span) -> bool:
    return all(operators.is_reshape(node) for node in span.path)


# -- Cases 2 and 3 ------------------------------------------------------------------------------------------------


def _letters(classifier: Classifier, sublayers: list[Sublayer]) -> list[str]:
    """``M``, ``X`` or ``F`` for each sublayer."""
    found: list[str] = []
    behind_attention = False
    for region in (sublayer.region for sublayer in sublayers):
        if region.attention:
            found.append("X" if all(attention.cross for attention in region.attention) else "M")
        else:
            convolves = behind_attention and classifier.only_convolves(region)
            outside = region.kind == "other" and classifier.starts_without_input(region)
            outside |= region.kind == "mixer" and classifier.samples(region.entry, region.nodes)
            found.append("X" if outside else "M" if region.kind == "mixer" and not convolves else "F")
        behind_attention = bool(region.attention)
    return found


def group(sublayers: list[Sublayer], letters: list[str]) -> list[Group]:
    """The sublayers of each block."""
    changes = [i for i in range(1, len(sublayers)) if _resized(sublayers[i - 1], sublayers[i])]
    edges = [0, *([] if _recurs(sublayers, letters) else changes), len(sublayers)]
    stages = list(zip(edges, edges[1:], strict=False))
    if len(stages) > 1 and letters[stages[-1][0] :].count("F") == len(letters) - stages[-1][0] != len(letters):
        stages.pop()
    found: list[Group] = []
    for start, stop in stages:
        lead, tail = _irregular(sublayers[start:stop], letters[start:stop]) if len(stages) == 1 else (0, 0)
        if start and letters[0] != "F":  # what a change of size leaves in front of the next layer
            ahead = next((i for i in range(start, stop) if letters[i] != "F"), start) - start
            found.extend([(start, start + ahead)] if ahead else [])
            lead = ahead
        inner = letters[start + lead : stop - tail]
        found.extend((start + lead + a, start + lead + b) for a, b in _groups(inner))
    return found


def _resized(before: Sublayer, after: Sublayer) -> bool:
    """Whether the hidden state changes its number of elements, or attention without a residual around it lies in between."""
    sizes = {prod(operators.shape(n)) for n in (before.region.exit, after.region.entry, after.region.exit)}
    kinds = {operators.kind(node) for span in before.gap for node in span.path}
    return len(sizes) > 1 or bool(kinds & (operators.ATTENTIONS | operators.SOFTMAXES))


def _recurs(sublayers: list[Sublayer], letters: list[str]) -> bool:
    """Whether the sizes of the hidden state repeat with the sublayers, where values are only moved in between."""
    period = _period(letters)
    sizes = [prod(operators.shape(sublayer.region.entry)) for sublayer in sublayers]
    between = {node for sublayer in sublayers[:-1] for span in sublayer.gap for node in span.path}
    moved = all(operators.is_movement(node) for node in between)
    return 0 < period < len(sizes) and len(set(sizes)) > 1 and moved and sizes[period:] == sizes[:-period]


def _irregular(sublayers: list[Sublayer], letters: list[str]) -> tuple[int, int]:
    """Case 3: how many sublayers at either end are no part of a block."""
    attends = [bool(sublayer.region.attention) for sublayer in sublayers]
    projects = any(operators.kind(node) in operators.PRODUCTS for node in sublayers[0].region.nodes)
    leads = [0, 1] if letters[0] == "M" and not attends[0] and not projects and any(attends) else [0]
    tails = [0, 1] if letters[-1] == "F" else [0]
    for lead, tail in sorted(((a, b) for a in leads for b in tails), key=sum):
        inner = letters[lead : len(letters) - tail]
        period = _period(inner)
        if period and (period < len(inner) or not tail) and "F" in inner[:period]:
            return lead, tail
    return 0, 0


def _period(letters: list[str]) -> int:
    """Smallest period after which the letters repeat, holding an M or X; all of them where there is one M; otherwise 0."""
    count = len(letters)
    for period in range(1, count // 2 + 1):
        if count % period == 0 and all(letters[i] == letters[i - period] for i in range(period, count)):
            return period
    return count if count and letters.count("M") == 1 and letters[0] == "M" else 0


def _groups(letters: list[str]) -> list[Group]:
    """Case 2."""
    count, period = len(letters), _period(letters)
    if period:
        starts = [s for s in range(count) if s % period == 0 or (letters[0] != "F" and _begins(letters, s))]
    else:
        first = letters.index("M") if "M" in letters else 0
        starts = [0]
        for s in range(1, count):
            leading = s == first and not ("F" in letters[:s] and "X" in letters[:s])
            behind = letters[s - 1] == "X" and starts[-1] == s - 1
            if (letters[s] == "M" and not leading and not behind) or (letters[s] == "X" and letters[s - 1] == "F"):
                starts.append(s)
    return list(zip(starts, [*starts[1:], count], strict=True))


def _begins(letters: list[str], position: int) -> bool:
    return position > 0 and letters[position] != "F" and letters[position - 1] == "F"


# -- Case 4 -------------------------------------------------------------------------------------------------------


def _signature(gap: tuple[Span, ...]) -> list[str]:
    return [operators.kind(span.exit) for span in gap]


def _trail(layers: list[list[Sublayer]], behind: list[Sublayer]) -> list[str]:
    """The spans behind its last sublayer that belong to a block."""
    if len(layers) > 1 or behind:
        kinds = [[sublayer.region.kind for sublayer in layer] for layer in layers]
        alike = [layer[-1].gap for layer, *pair in zip(layers, kinds, kinds[1:], strict=False) if pair[0] == pair[1]]
        gaps = alike or [layer[-1].gap for layer in layers[: None if behind else -1]]
    else:  # one block: what stands between its own sublayers tells where its norms are
        gaps = [sublayer.gap for sublayer in layers[0][:-1]]
        if not gaps:
            return []
        gaps.append(layers[0][-1].gap)
    common = _signature(gaps[0])
    for gap in gaps[1:]:
        common = common[: _alike(common, _signature(gap))]
    return common


def _alike(first: list[str], second: list[str]) -> int:
    """How many entries two lists have in common at their start."""
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def _block(
    flow: Flow, classifier: Classifier, index: int, layer: list[Sublayer], trail: list[str]
) -> tuple[Block, tuple[Span, ...]]:
    """A block, and the spans behind it that do not belong to it."""
    entry = layer[0].region.entry
    regions: list[Region] = []
    for sublayer in layer[:-1]:
        region, gap = sublayer.reshaped()
        regions.append(region)
        regions.extend(_between(classifier, gap))
    region, behind = layer[-1].reshaped(entry)
    regions.append(region)
    reshaped = not layer[-1].reshapes or region.exit is layer[-1].reshapes[-1].exit
    gap = behind[: _alike(trail, _signature(behind))] if reshaped else ()
    while gap and not operators.same_shape(gap[-1].exit, region.exit):
        gap = gap[:-1]
    regions.extend(_between(classifier, gap))
    exit = regions[-1].exit
    path = flow.between(entry, exit)
    nodes = flow.ordered(flow.close(path, entry))
    inside = set(nodes)
    read = dict.fromkeys(str(node.target) for node in nodes if node.op == "get_attr")
    weights = tuple(name for name in read if all(reader in inside for reader in flow.readers[name]))
    axes: set[int] = set().union(*(classifier.feature_axes(part.entry, frozenset(part.nodes)) for part in regions))
    features = axes.pop() if len(axes) == 1 else -1
    return Block(index, entry, exit, tuple(regions), nodes, weights, features=features), behind[len(gap) :]


def _between(classifier: Classifier, gap: tuple[Span, ...]) -> list[Region]:
    if not gap:
        return []
    path = frozenset(node for span in gap for node in span.path)
    return [classifier.on_stream(gap[0].entry, gap[-1].exit, path)]
