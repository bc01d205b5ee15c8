"""What a sublayer is: attention, FFN, mixture of experts, several of them side by side, another mixer, or opaque.

A region is classified by its parts.  Where no attention was found, it is a *mixer* if the output at one position depends on
the input at another: ruled out by the operators where all of them work position by position, measured otherwise.  So it is
where it reads positions of another tensor, at places that it computes.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from surgeon.discovery import operators, probe
from surgeon.discovery.attention import find_attentions
from surgeon.discovery.beside import experts_among, gates_its_input, is_in_front
from surgeon.discovery.cores import axis_before
from surgeon.discovery.ffn import find_ffns
from surgeon.discovery.flow import Flow
from surgeon.discovery.linears import Linears
from surgeon.discovery.mixture import find_mixtures
from surgeon.discovery.norms import is_affine, is_normalisation
from surgeon.discovery.residuals import mixed_streams, reads_weights, works, writes_streams
from surgeon.structure import FFN, Attention, Region, RegionKind

_OF_ORDER = frozenset({"aten::linalg_vector_norm", "aten::norm"})
"""Reductions whose second argument is the order of the norm, and the third the dimensions."""


class Classifier:
    """Turns parts of the stream into regions; remembers what it measured, so that equal layers are measured once.

    Attributes:
        channels_first: features are the dimension in front of the last one on the stream that is being looked at.
    """

    def __init__(self, flow: Flow, linears: Linears) -> None:
        self.flow = flow
        self.linears = linears
        self._products = {self.linears.core[node] for node in linears.raw}
        self._measured: dict[object, bool | str] = {}
        self.channels_first = False

    def sublayer(self, entry: fx.Node, exit: fx.Node, path: frozenset[fx.Node]) -> Region:
        """Classify what lies between two cuts.

        Args:
            entry: first cut.
            exit: last cut.
            path: nodes on paths between them.
        """
        attentions, unattended = find_attentions(self.flow, self.linears, path, entry)
        ffns, unfed = find_ffns(self.flow, self.linears, path, entry)
        outputs = {attention.o.node for attention in attentions if attention.o}
        ffns = [ffn for ffn in ffns if ffn.up.node not in outputs]  # a gate on the output of an attention
        ffns = [ffn for ffn in ffns if not gates_its_input(self.flow, path, ffn)]
        nodes = [node for node in path if operators.kind(node) == operators.MOE]
        mixtures, unrouted = find_mixtures(
            self.flow, self.linears, path, tuple(ffn for ffn in ffns if not is_in_front(self.flow, ffn, nodes))
        )
        experts = [] if mixtures else experts_among(self.flow, path, ffns)
        ffns = [] if mixtures else [ffn for ffn in ffns if ffn not in experts]
        reasons = [*unattended, *unrouted]
        if experts:
            reasons.append(_not_raised(self.flow, path, experts))
        kind: RegionKind
        if attentions:
            cores = [attention.node for attention in attentions]
            ffns = [ffn for ffn in ffns if not is_in_front(self.flow, ffn, cores)]
            kind = "parallel" if ffns or mixtures else "attention"
            reasons.extend(self._beside(path, attentions))
        else:
            mixing = self._mixes(entry, exit, path)
            inputs = [*(ffn.input for ffn in ffns), *(mixture.input for mixture in mixtures)]
            if mixing is True and inputs and all(self._shifts(entry, exit, self.flow.plain(x)) for x in inputs):
                kind = "moe" if mixtures else "ffn"
                reasons.append("reads other positions too, moved to its own place")
            elif mixing is True:
                kind = "mixer"
                reasons.append("positions are mixed without softmax attention")
            elif mixtures or ffns:
                kind = "moe" if mixtures else "ffn"
                reasons.extend([] if mixtures or experts else _left_experts(self.flow, path))
            elif self.samples(entry, path):
                kind = "mixer"
                reasons.append("reads another tensor at places that it computes, without softmax attention over positions")
            else:
                kind = "other"
                reasons = reasons or [_opaque(self.flow, path, unfed)]
            if isinstance(mixing, str):
                reasons.append(mixing)
        return Region(
            kind=kind,
            entry=entry,
            exit=exit,
            nodes=self._nodes(entry, path),
            attention=tuple(attentions),
            ffn=tuple(ffns),
            moe=tuple(mixtures),
            reason="; ".join(reasons) or None,
        )

    def on_stream(self, entry: fx.Node, exit: fx.Node, path: frozenset[fx.Node]) -> Region:
        """A part of the stream itself, without a residual around it: a norm, what is left of one, or something else."""
        if any(is_normalisation(self.flow, node) for node in path) and not any(reads_weights(self.flow, n) for n in path):
            return Region("norm", entry, exit, self._nodes(entry, path))
        if all(is_affine(node) and len(self._computed(node)) == 1 for node in path):
            return Region("norm", entry, exit, self._nodes(entry, path), reason="a scale or a shift, without statistics")
        names = ", ".join(dict.fromkeys(operators.kind(node) for node in self.flow.ordered(path)))
        reason = f"stands on the stream without a residual around it: {names}"
        return Region("other", entry, exit, self._nodes(entry, path), reason=reason)

    def _computed(self, node: fx.Node) -> list[fx.Node]:
        return [source for source in self.flow.inputs(node) if source not in self.flow.constant]

    def only_convolves(self, region: Region) -> bool:
        """Whether convolutions are all that mixes positions: nothing multiplies activations with each other, or scans."""
        kinds = {operators.kind(node) for node in region.nodes}
        if not kinds & operators.CONVOLUTIONS or kinds & (operators.SCANS | {"aten::select"}):
            return False
        return all(node in self._products for node in region.nodes if operators.kind(node) in operators.PRODUCTS)

    def samples(self, entry: fx.Node, nodes: Iterable[fx.Node]) -> bool:
        """Whether a region reads positions of a tensor from elsewhere, at places that it computes (deformable attention)."""
        samplers = (node for node in nodes if operators.kind(node) in operators.SAMPLERS)
        return any(
            isinstance(source, fx.Node) and isinstance(places, fx.Node)
            and not self.flow.depends(source, entry) and self.flow.depends(places, entry)
            for source, places in (node.args[:2] for node in samplers)
        )

    def feature_axes(self, entry: fx.Node, path: frozenset[fx.Node]) -> set[int]:
        """Which dimensions of the hidden state the first products and convolutions in a region sum over.

        Args:
            entry: where the region starts, of three dimensions or more.
            path: nodes on paths through the region.

        Returns:
            Dimensions from the end: -1, or -2 of [batch, features, positions], -3 of [batch, features, height, width].
        """
        found: set[int] = set()
        for node in path:
            if node in self._products:
                axis, source = -1, node.args[1 if operators.kind(node) == "aten::addmm" else 0]
            elif operators.kind(node) in operators.CONVOLUTIONS:
                axis, source = 1 - len(operators.shape(node)), node.args[0]
            else:
                continue
            if isinstance(source, fx.Node) and self.flow.depends(source, entry):
                axis_on_stream = axis_before(self.flow, source, axis, entry)
                found |= {axis_on_stream} if axis_on_stream is not None else set()
        return found & set(range(1 - len(operators.shape(entry)), 0))

    def starts_without_input(self, region: Region) -> bool:
        """Whether a region's entry is computed from weights alone, such as latents or queries that are learned."""
        return region.entry in self.flow.constant

    def _beside(self, path: frozenset[fx.Node], attentions: list[Attention]) -> list[str]:
        """What else mixes positions in a region with attention: convolutions that lead to none of them."""
        ends = [attention.node for attention in attentions]
        found = [n for n in self.flow.ordered(path) if operators.kind(n) in operators.CONVOLUTIONS | operators.SCANS]
        found = [n for n in found if not any(self.flow.depends(end, n) for end in ends)]
        names = ", ".join(f"{n.name} = {operators.kind(n)}" for n in found[:3])
        return [f"beside the attention another mixer was found, and not what it is made of: {names}"] if found else []

    def _shifts(self, entry: fx.Node, exit: fx.Node, inner: fx.Node) -> bool:
        """Whether positions are mixed by moving values in front of the input of an FFN or of experts only."""
        if not self.flow.depends(inner, entry) or works(self.flow, self.flow.between(entry, inner)):
            return False
        try:
            return not probe.mixes(self.flow, inner, exit, beside=entry, channels_first=self.channels_first)
        except RuntimeError:
            return False

    def _nodes(self, entry: fx.Node, path: frozenset[fx.Node]) -> tuple[fx.Node, ...]:
        return self.flow.ordered(self.flow.close(path, entry))

    def _mixes(self, entry: fx.Node, exit: fx.Node, path: frozenset[fx.Node]) -> bool | str:
        """Whether positions are mixed; a reason where it could not be measured.

        Experts may choose tokens, or count them: routing is part of the mixture and does not count.
        """
        ordered = self.flow.ordered(self._without_routing(exit, path))
        if all(self._is_position_wise(node) for node in ordered):
            return False
        key = (self.channels_first, *((operators.kind(node), operators.shape(node)) for node in ordered))
        if key not in self._measured:
            try:
                self._measured[key] = probe.mixes(
                    self.flow, entry, exit, channels_first=self.channels_first, streams=self._holds_streams(entry, path)
                )
            except RuntimeError as error:
                self._measured[key] = f"whether it mixes positions could not be measured: {str(error).splitlines()[0]}"
        return self._measured[key]

    def _holds_streams(self, entry: fx.Node, path: frozenset[fx.Node]) -> bool:
        """Whether the hidden state is several streams, mixed by the shortcut, or written to by one number each."""
        return any(mixed_streams(self.flow, node) is entry or writes_streams(self.flow, node, entry) for node in path)

    def _without_routing(self, exit: fx.Node, path: frozenset[fx.Node]) -> set[fx.Node]:
        """The nodes of a path that lead to its exit otherwise than through the routing of a mixture."""
        found: set[fx.Node] = set()
        stack = [exit]
        while stack:
            node = stack.pop()
            if node in path and node not in found:
                found.add(node)
                stack.extend(probe.rows(node) if operators.kind(node) == operators.MOE else node.all_input_nodes)
        return found

    def _is_position_wise(self, node: fx.Node) -> bool:
        name = operators.kind(node)
        if operators.is_pointwise(node) or name in operators.CASTS or node in self._products:
            return True
        norms = ("aten::layer_norm", "aten::native_layer_norm", "aten::rms_norm")
        if name in (*norms, operators.FAKE_QUANTIZE, operators.GETITEM):
            return True
        if name == operators.MOE:
            return True
        rank = len(operators.shape(self.flow.inputs(node)[0])) if self.flow.inputs(node) else 0
        last = {-1, rank - 1}
        if name in ("aten::view", "aten::reshape", "aten::_unsafe_view"):  # batch and positions may be merged and split
            return operators.shape(node)[-1:] == operators.shape(self.flow.inputs(node)[0])[-1:]
        if name in operators.REDUCTIONS:
            dims = operators.argument(node, 2 if name in _OF_ORDER else 1, "dim")
            dims = [dims] if isinstance(dims, int) else dims
            return bool(dims) and all(dim in last for dim in dims)
        if name in operators.SOFTMAXES:
            return operators.argument(node, 1, "dim") in last
        if name in (operators.TOPK, *(n for n in operators.NARROWINGS if n not in ("aten::select", "aten::unbind"))):
            default = -1 if name == operators.TOPK else 0
            position = 1 if name in ("aten::slice", "aten::narrow") else 2
            return operators.argument(node, position, "dim", default) in last
        return False


def _not_raised(flow: Flow, path: frozenset[fx.Node], experts: list[FFN]) -> str:
    """Why FFNs that are weighted or selected token by token are no mixture of experts."""
    widths = sorted({ffn.width for ffn in experts})
    left = _left_experts(flow, path)
    what = "what they hold or read is not that of experts: two or three matrices and biases of equal shapes, on one token each"
    reason = left[0].partition("but ")[2] if left else what
    return (
        f"nearest rule: mixture of experts, {len(experts)} FFNs of width {', '.join(map(str, widths))} are weighted or "
        f"selected token by token, but {reason}"
    )


def _left_experts(flow: Flow, path: frozenset[fx.Node]) -> list[str]:
    """What the region reads of weights that are stacked over experts and were not raised."""
    read = {name for node in path for source in node.all_input_nodes for name in flow.weights.get(source, ())}
    for name, reason in flow.graph.source.left.items():
        if name in read and (flow.graph.tensor(name).dim() > 2 or len(read & set(flow.graph.source.left)) > 3):
            return [f"nearest rule: mixture of experts, but {name}: {reason}"]
    return []


def _opaque(flow: Flow, path: frozenset[fx.Node], unfed: list[str]) -> str:
    read = {name for node in path for source in node.all_input_nodes for name in flow.weights.get(source, ())}
    left = [f"{name}: {reason}" for name, reason in flow.graph.source.left.items() if name in read]
    if left:
        return f"nearest rule: mixture of experts, but {left[0]}"
    if unfed:
        return f"nearest rule: FFN, but {unfed[0]}"
    names = ", ".join(dict.fromkeys(operators.kind(node) for node in flow.ordered(path)))
    return f"holds no attention, no linear behind element-wise work on linears, and no experts; its operators: {names}"
