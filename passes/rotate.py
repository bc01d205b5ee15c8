"""Rotate the residual stream, without changing what the model computes, so that no channel of it stands out when it is rounded.

Paper:
    QuaRot (Ashkboos et al. 2024, arXiv:2404.00456) and SpinQuant (Liu et al. 2024, arXiv:2405.16406, its rotations R1 and R2 by
    lot), of which this is what weights can absorb; SliceGPT (Ashkboos et al. 2024, arXiv:2401.15024) for why nothing changes.
Formula:
    ``x' = U^T x``, ``U = diag(s) Hd / sqrt(H)`` with Hd a Hadamard matrix and signs s by lot.  ``rms(x') = rms(x)``, so that
    norms mean what they did.  What writes to the stream becomes ``U^T W``, what reads it ``W diag(g) U``, g the gain of the
    norm in front, whose gain becomes 1; an offset b of a norm becomes a bias ``W b`` behind it.  A channel that is a times as
    large as the others becomes a / sqrt(H) in all channels, and columns of weights that were small where it was large are so no
    more: groups of weights and rows of activations have smaller ranges, for the same energy.
    Norms that subtract the mean: U is reflected so that the ones are mapped to themselves, and leaves out the mean, which no
    norm sees; a layer norm stays one.
    ``heads: true``: a head's results are sums of values, ``a = sum_s p_s v_s``, with one p_s for all features of the head.
    Every head's rows of the value projection (and bias) become ``R^T W``, its columns of the output projection ``W R``, R made
    as U is, one for each attention: what the output projection reads is rotated too, and so are caches of values.
Shapes:
    x [tokens, H]; U [H, H], R [c, c] of heads of c features, in float64; weights keep their shapes.
Units:
    None: a rotation has no parameter.
Reads:
    Nothing but weights: no data.
Changes:
    Every tensor that writes to the stream or reads it, under its own name.  A table that is embedding and head at once becomes
    two, since the head's rows take the gain of the last norm (a note says so); products behind an offset get a bias where they
    had none.  Weights are computed in float64 and stored in their own type, which rounds them once more.
Errors:
    PlanError where no stream can be rotated, with the node: one that the model returns or takes as an input; one that something
    other than a sum, a norm or a product with a weight reads; norms that stand on the stream or behind a sublayer, whose gain
    cannot be rotated (BERT, Gemma 2); factors for each channel.  Attentions are left alone by name (a note, an error where
    nothing else is rotated) where something else stands between values and output projection, such as a norm or a gate for each
    feature, or reads the values.  PlanError for ``blocks`` and for quantized weights.
Example:
    ``- rotate: {}`` or ``- rotate: {heads: true}``, before quantize
"""

from __future__ import annotations

from functools import partial
from typing import Annotated

from pydantic import Field
from torch import Tensor, fx

from surgeon.channel_axes import Channels, Unfit, find_channels
from surgeon.channel_bases import rotation
from surgeon.channels import rotatable, rotate, rotated_parameters, selected_streams
from surgeon.contract import LEFT, Decision, Pass, Plan, Seed, Statistics, refuse_all_left
from surgeon.errors import PlanError
from surgeon.graph import Graph
from surgeon.numerics import RotationBasis, hadamard_core, spreading_basis
from surgeon.rewrite import Editor
from surgeon.samples import lot
from surgeon.structure import Selection, Structure
from surgeon.value_paths import head_rotation, rotate_heads


class RotateSite(Decision):
    """One stream that is rotated, or one attention whose heads are.

    Attributes:
        site: label of the stream, or ``blocks.I.attention``.
        width: how many channels the stream has, or how many features of values a head.
        basis: what it is rotated with.
    """

    width: Annotated[int, Field(ge=2)]
    basis: RotationBasis


class RotatePlan(Plan[RotateSite]):
    """What is rotated."""


class Rotate(Pass[RotatePlan]):
    """Rotate the residual stream, so that outliers are spread over all channels and quantize loses less."""

    name = "rotate"
    plan_type = RotatePlan
    heals = False

    basis: RotationBasis = "hadamard"
    """A Hadamard matrix with signs by lot, or an orthogonal matrix by lot: that also where no Hadamard matrix is known."""
    heads: bool = False
    """Whether the values of attention heads are rotated too, between their projection and the output projection."""
    seed: Seed = 0
    """Seed of the lots."""

    def plan(self, graph: Graph, structure: Structure, statistics: Statistics) -> RotatePlan:
        """Find what can be rotated, and what with."""
        if self.blocks is not None:
            raise PlanError(f"{self.name}: blocks: all blocks share the stream and its rotation; leave blocks out")
        decisions, notes = [], []
        for label, channels in selected_streams(self.name, graph, structure):
            try:
                if isinstance(channels, Unfit):
                    raise channels
                notes += rotatable(graph, label, channels)
                decisions.append(self._decision(label, channels.width, notes))
            except Unfit as error:
                notes.append(f"{label}: {LEFT}: {error}")
        for site in structure.attentions() if self.heads else ():
            try:
                size, _ = head_rotation(graph, site.part)
                decisions.append(self._decision(site.name, size, notes))
            except Unfit as error:
                notes.append(f"{site.name}: {LEFT}: {error}")
        return RotatePlan(decisions=tuple(decisions), notes=tuple(notes))

    def _decision(self, site: str, width: int, notes: list[str]) -> RotateSite:
        basis = self.basis
        if basis == "hadamard" and hadamard_core(width) is None:
            notes.append(f"{site}: no Hadamard matrix of order {width} is known here; an orthogonal one by lot instead")
            basis = "random"
        return RotateSite(site=site, width=width, basis=basis)

    def accept(self, plan: RotatePlan) -> None:
        """Something is rotated."""
        refuse_all_left(plan, "nothing can be rotated" if self.heads else "no stream can be rotated")

    def check(self, graph: Graph, structure: Structure, plan: RotatePlan) -> None:
        """Streams and attentions exist, have the size, and can be rotated with what the plan says."""
        streams = dict(find_channels(structure))
        attentions = {site.name: site.part for site in structure.select(Selection()).attentions()}
        for decision in plan.decisions:
            site, channels = decision.site, streams.get(decision.site)
            if channels is None and site not in attentions:
                raise PlanError(f"the plan names {site}; the model's streams are {', '.join(streams)}, other sites attentions")
            try:
                if channels is None:
                    width, _ = head_rotation(graph, attentions[site])
                elif isinstance(channels, Unfit):
                    raise channels
                else:
                    width = channels.width
                    rotatable(graph, site, channels)
            except Unfit as error:
                raise PlanError(f"{site}: the plan rotates it, but {error}") from error
            if decision.width != width:
                what = "channels" if channels is not None else "features of each head"
                raise PlanError(f"{site}: the plan rotates {decision.width} {what}, it has {width}")
            if decision.basis == "hadamard" and hadamard_core(width) is None:
                raise PlanError(f"{site}: no Hadamard matrix of order {width} is known here; the plan's basis must be random")

    def apply(self, editor: Editor, structure: Structure, plan: RotatePlan, statistics: Statistics) -> None:
        """Rotate what writes to the streams and what reads them, and both ends of the heads."""
        streams = dict(find_channels(structure.select(Selection())))
        attentions = {site.name: site.part for site in structure.select(Selection()).attentions()}
        heads = {d.site: head_rotation(editor.graph, attentions[d.site])[1] for d in plan.decisions if d.site in attentions}
        for decision in sorted(plan.decisions, key=lambda decision: decision.site in streams):  # streams may add nodes
            lots = lot(self.seed, decision.site)
            if decision.site in heads:
                rotate_heads(editor, heads[decision.site], spreading_basis(decision.width, decision.basis, lots))
                continue
            channels = streams[decision.site]
            assert isinstance(channels, Channels)
            change = rotation(editor.graph, channels)
            basis = spreading_basis(decision.width, decision.basis, lots, centred=change.centred)
            rotate(editor, channels, change, basis, partial(_same, basis))

    def exact(self, plan: RotatePlan) -> bool:
        """A rotation changes nothing."""
        return True

    def parameter_delta(self, graph: Graph, structure: Structure, plan: RotatePlan) -> int:
        """What is untied, and biases that are added; heads change nothing."""
        streams = dict(find_channels(structure.select(Selection())))
        delta = 0
        for decision in plan.decisions:
            channels = streams.get(decision.site)
            if isinstance(channels, Channels):
                delta += rotated_parameters(graph, rotation(graph, channels), decision.width)
        return delta

    def summary(self, plan: RotatePlan) -> str:
        """The streams and their bases, and how many attentions."""
        heads = [decision for decision in plan.decisions if decision.site.startswith("blocks.")]
        streams = [f"{d.site} ({d.width} channels, {d.basis})" for d in plan.decisions if d not in heads]
        parts = [f"{len(streams)} streams rotated{': ' if streams else ''}{', '.join(streams)}"]
        return "; ".join([*parts, f"heads of {len(heads)} attentions"] if heads else parts)


def _same(basis: Tensor, _: fx.Node) -> Tensor:
    """What readers of any norm make of the rotated stream: no energy is lost."""
    return basis
