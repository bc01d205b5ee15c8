"""Rotate the residual stream, without changing what the model computes, so that no channel of it stands out when it is rounded.

Paper:
    QuaRot (Ashkboos et al. 2024, arXiv:2404.00456) and SpinQuant (Liu et al. 2024, arXiv:2405.16406), of which this is what weights
    can absorb (R1); SliceGPT (Ashkboos et al. 2024, arXiv:2401.15024) for why nothing changes.
Formula:
    ``x' = U^T x``, ``U = diag(s) Hd / sqrt(H)`` with Hd a Hadamard matrix and signs s by lot.  ``rms(x') = rms(x)``, so that norms
    mean what they did.  What writes to the stream becomes ``U^T W``, what reads it ``W diag(g) U``, g the gain of the norm in
    front, whose gain becomes 1; an offset b of a norm becomes a bias ``W b`` behind it.  A channel that is a times as large as
    the others becomes a / sqrt(H) in all channels, and columns of weights that were small where it was large are so no more:
    groups of weights and rows of activations have smaller ranges, for the same energy.
    Norms that subtract the mean: U is reflected so that the ones are mapped to themselves, and leaves out the mean, which no
    norm sees; a layer norm stays one.
Shapes:
    x [tokens, H]; U [H, H] in float64; weights [.., H] or [H, ..], and stay so.
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
    cannot be rotated (BERT, Gemma 2); factors for each channel.  PlanError for ``blocks`` and for quantized weights.
Example:
    ``- rotate: {}``, before quantize
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from surgeon.channel_axes import Channels, Unfit, find_channels
from surgeon.channel_bases import rotation
from surgeon.channels import refuse_packed, rotatable, rotate, rotated_parameters
from surgeon.contract import LEFT, Decision, Pass, Plan, Seed, Statistics, refuse_all_left
from surgeon.errors import PlanError
from surgeon.graph import Graph
from surgeon.numerics import RotationBasis, hadamard_core, spreading_basis
from surgeon.rewrite import Editor
from surgeon.samples import lot
from surgeon.structure import Selection, Structure


class RotateStream(Decision):
    """One stream that is rotated.

    Attributes:
        site: label of the stream.
        width: how many channels it has.
        basis: what it is rotated with.
    """

    width: Annotated[int, Field(ge=2)]
    basis: RotationBasis


class RotatePlan(Plan[RotateStream]):
    """What is rotated."""


class Rotate(Pass[RotatePlan]):
    """Rotate the residual stream, so that outliers are spread over all channels and quantize loses less."""

    name = "rotate"
    plan_type = RotatePlan
    heals = False

    basis: RotationBasis = "hadamard"
    """A Hadamard matrix with signs by lot, or an orthogonal matrix by lot; the latter also where no Hadamard matrix is known."""
    seed: Seed = 0
    """Seed of the lot."""

    def plan(self, graph: Graph, structure: Structure, statistics: Statistics) -> RotatePlan:
        """Find the streams that can be rotated, and what with."""
        if self.blocks is not None:
            raise PlanError(f"{self.name}: blocks: all blocks share the stream and its rotation; leave blocks out")
        refuse_packed(self.name, graph, structure)
        decisions, notes = [], []
        for label, channels in find_channels(structure):
            if not structure.selection.admits(label, None):
                continue
            try:
                if isinstance(channels, Unfit):
                    raise channels
                notes += rotatable(graph, label, channels)
            except Unfit as error:
                notes.append(f"{label}: {LEFT}: {error}")
                continue
            basis = self.basis
            if basis == "hadamard" and hadamard_core(channels.width) is None:
                notes.append(f"{label}: no Hadamard matrix of order {channels.width} is known here; an orthogonal one by lot instead")
                basis = "random"
            decisions.append(RotateStream(site=label, width=channels.width, basis=basis))
        return RotatePlan(decisions=tuple(decisions), notes=tuple(notes))

    def accept(self, plan: RotatePlan) -> None:
        """Something is rotated."""
        refuse_all_left(plan, "no stream can be rotated")

    def check(self, graph: Graph, structure: Structure, plan: RotatePlan) -> None:
        """Streams exist, have the channels, and can be rotated with what the plan says."""
        streams = dict(find_channels(structure))
        for decision in plan.decisions:
            channels = streams.get(decision.site)
            if channels is None:
                raise PlanError(f"the plan names {decision.site}; the model's streams are {', '.join(streams)}")
            try:
                if isinstance(channels, Unfit):
                    raise channels
                rotatable(graph, decision.site, channels)
            except Unfit as error:
                raise PlanError(f"{decision.site}: the plan rotates it, but {error}") from error
            if decision.width != channels.width:
                raise PlanError(f"{decision.site}: the plan rotates {decision.width} channels, it has {channels.width}")
            if decision.basis == "hadamard" and hadamard_core(decision.width) is None:
                raise PlanError(
                    f"{decision.site}: no Hadamard matrix of order {decision.width} is known here; the plan's basis must be random"
                )

    def apply(self, editor: Editor, structure: Structure, plan: RotatePlan, statistics: Statistics) -> None:
        """Rotate what writes to the streams and what reads them."""
        streams = dict(find_channels(structure.select(Selection())))
        for decision in plan.decisions:
            channels = streams[decision.site]
            assert isinstance(channels, Channels)
            change = rotation(editor.graph, channels)
            basis = spreading_basis(
                decision.width, decision.basis, lot(self.seed, decision.site), centred=change.centred
            )
            rotate(editor, channels, change, basis, lambda _, basis=basis: basis)

    def exact(self, plan: RotatePlan) -> bool:
        """A rotation changes nothing."""
        return True

    def parameter_delta(self, graph: Graph, structure: Structure, plan: RotatePlan) -> int:
        """What is untied, and biases that are added."""
        streams = dict(find_channels(structure.select(Selection())))
        delta = 0
        for decision in plan.decisions:
            channels = streams[decision.site]
            assert isinstance(channels, Channels)
            delta += rotated_parameters(graph, rotation(graph, channels), decision.width)
        return delta

    def summary(self, plan: RotatePlan) -> str:
        """The streams and their bases."""
        streams = ", ".join(f"{decision.site} ({decision.width} channels, {decision.basis})" for decision in plan.decisions)
        return f"{len(plan.decisions)} streams rotated{': ' if streams else ''}{streams}"
