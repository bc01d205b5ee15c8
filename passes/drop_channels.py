"""Make the residual stream narrower: rotate it, without changing what the model computes, and cut what varies least.

Paper:
    SliceGPT (Ashkboos et al. 2024, arXiv:2401.15024), with one rotation for the whole stream instead of one for each block, so
    that no matrix is added to the shortcuts and the model is an ordinary one of smaller hidden size.  Minitron (Muralidharan
    et al. 2024, arXiv:2407.14679): ``activation``.
Formula:
    ``principal``: n_t = x_t / rms(x_t), what the norms in front of the sublayers and of the head make of the stream, and
    ``C = sum n_t n_t^T`` over tokens and norms.  U [H, K] holds the first K eigenvectors of C, ``s = sqrt(K / H)``.
    What writes to the stream (embeddings, positions, output projections, biases) becomes ``s U^T W``, what reads it becomes
    ``W diag(g) U sqrt(e) / s``, with g the gain of the norm in front, whose gain becomes 1, and e the share of the energy of
    that norm's n that U keeps.  The stream is then ``x' = s U^T x``, and s keeps its root mean square, which is now one
    over K channels, so that norms and their eps mean what they did.  With ``refit`` readers have in place of U
    ``U + (1 - U U^T) C_l U (U^T C_l U + lambda)^-1``, C_l that of the norm in front: least squares of n on ``U^T n``, lambda as
    if K / 2 further tokens of mean energy had shown that nothing is to change.
    An offset b of a norm becomes a bias ``W b`` behind it.  At K = H nothing is lost: the outputs are as before.  Norms that
    subtract the mean: U has K - 1 directions, of those orthogonal to the ones, and maps them to channels that sum to 0, so that
    a layer norm stays one and is exact too.
    ``activation``: no rotation; the K channels of largest ``sum |g n_t + b|`` over tokens and norms stay, everywhere.  The
    norms' gains are multiplied by ``sqrt(sum_K n_tk^2 / (K T))``, since they now divide by the root mean square of K channels
    (a norm without gain has nothing to take the factor, and a note says so).
    ``random``: K channels by lot, a baseline.
Shapes:
    x [tokens, H] -> [tokens, K]; C [H, H] in float64; every weight [.., H] or [H, ..] -> K.
Units:
    ratio is the share of channels that go; keep and multiple are numbers of channels; energy is a share.
Reads:
    The input and the output of every norm on the stream, once, on the model as it is.  Sums are kept: ``principal`` 8 H^2 bytes
    for each norm, ``activation`` 16 H.  ``random`` reads nothing.
Changes:
    Every tensor that writes to the stream or reads it, under its own name; sizes that the graph states.  ``principal`` also:
    a table that is embedding and head at once becomes two, since the head's rows take the gain of the last norm (a note says
    so); products behind an offset get a bias where they had none.  ``principal`` at full width only rotates, which is exact.
Errors:
    PlanError where no stream can be made narrower, with the node: one that the model returns or takes as an input; one that
    something other than a sum, a norm or a product with a weight reads.  Also refused by ``principal`` alone: norms that stand
    on the stream or behind a sublayer, whose gain cannot be rotated (BERT, Gemma 2), and factors for each channel.
    PlanError for ``blocks``, where more is to be kept than there is, and where no token reaches a norm.
Example:
    ``- drop_channels: {ratio: 0.1}`` or ``- drop_channels: {keep: 1024, criterion: activation}``
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, fx

from surgeon.channel_axes import Channels, Unfit, find_channels
from surgeon.channel_bases import Rotation, rotation
from surgeon.channel_moments import ChannelMoments
from surgeon.channels import (
    affine,
    cuttable,
    joined_norms,
    keep_channels,
    kept_parameters,
    rotatable,
    rotate,
    rotated_parameters,
    selected_streams,
)
from surgeon.contract import LEFT, Decision, Observer, Pass, Plan, Seed, Statistics, refuse_all_left
from surgeon.errors import PlanError
from surgeon.graph import Graph
from surgeon.narrowing import kept_width
from surgeon.numerics import NumericsError, kept_energy, principal_basis, read_columns
from surgeon.rewrite import Editor
from surgeon.samples import lot
from surgeon.structure import Selection, Structure

Criterion = Literal["principal", "activation", "random"]


class KeepChannels(Decision):
    """How many channels of one stream stay, and which.

    Attributes:
        site: label of the stream.
        width: how many channels there were.
        left: how many stay.
        keep: the numbers of those that stay, ascending; of ``principal`` none: it keeps directions, not channels.
        energy: share of the energy of what the norms give that stays, where it was observed.
    """

    width: Annotated[int, Field(ge=2)]
    left: Annotated[int, Field(ge=1)]
    keep: tuple[int, ...] = ()
    energy: float | None = None


class DropChannelsPlan(Plan[KeepChannels]):
    """How narrow each stream becomes."""


class DropChannels(Pass[DropChannelsPlan]):
    """Make the residual stream narrower: keep the directions in which it varies most."""

    name = "drop_channels"
    plan_type = DropChannelsPlan
    apply_reads_statistics = True

    ratio: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Share of the channels to remove; give this or keep."""
    keep: Annotated[int, Field(ge=2)] | None = None
    """Channels to keep; give this or ratio."""
    multiple: Annotated[int, Field(ge=1)] = 8
    """With ratio: the width is rounded up to a multiple of this; kernels want rows of 16 bytes, 8 numbers of 16 bits, and
    quantize in groups of 32 is not padded where it is 32."""
    criterion: Criterion = "principal"
    """What stays: the directions of largest variance, the channels that are most active (which needs no rotation, and so
    fits more models), or channels by lot."""
    refit: bool = True
    """For principal: what reads the stream guesses what was cut from what stays, by least squares on calibration data."""
    seed: Seed = 0
    """Seed of random."""

    @model_validator(mode="after")
    def _one_budget(self) -> DropChannels:
        if (self.keep is None) == (self.ratio is None):
            raise ValueError("give either keep or ratio")
        return self

    # -- observing ----------------------------------------------------------------------------------------------

    def observers(self, structure: Structure) -> Mapping[str, Observer]:
        """What every norm on the streams makes of them."""
        found: dict[str, Observer] = {}
        for label, channels in find_channels(structure) if self.criterion != "random" else ():
            if isinstance(channels, Channels) and structure.selection.admits(label, None):
                for node, norm in channels.norms.items():
                    output, _ = affine(channels, norm)
                    second = self.criterion == "principal"
                    found[_key(label, node)] = ChannelMoments(norm, output, second=second)
        return found

    # -- planning -----------------------------------------------------------------------------------------------

    def plan(self, graph: Graph, structure: Structure, statistics: Statistics) -> DropChannelsPlan:
        """Choose how many channels of every stream stay, and which."""
        if self.blocks is not None:
            raise PlanError(f"{self.name}: blocks: all blocks share the stream and its width; leave blocks out")
        decisions, notes = [], []
        for label, channels in selected_streams(self.name, graph, structure):
            try:
                if isinstance(channels, Unfit):
                    raise channels
                notes += self._fits(graph, label, channels)
            except Unfit as error:
                notes.append(f"{label}: {LEFT}: {error}{self._instead(graph, channels)}")
                continue
            left = self._left(label, channels)
            if left == channels.width and self.criterion != "principal":
                notes.append(f"{label}: all {left} channels stay")
                continue
            try:
                decisions.append(self._decision(graph, label, channels, left, statistics))
            except NumericsError as error:
                raise PlanError(f"{label}: {error}") from error
        return DropChannelsPlan(decisions=tuple(decisions), notes=tuple(notes))

    def _fits(self, graph: Graph, label: str, channels: Channels) -> list[str]:
        """Notes on what becomes of a stream.

        Raises:
            Unfit: it cannot be made narrower in this way.
        """
        if self.criterion != "principal":
            cuttable(graph, channels)
            bare = [node.name for node, norm in channels.norms.items() if affine(channels, norm)[1] is None]
            note = f"{label}: no gain stands behind {', '.join(bare)} to take the factor of fewer channels"
            return [note] if bare and self.criterion == "activation" else []
        return rotatable(graph, label, channels)

    def _instead(self, graph: Graph, channels: Channels | Unfit) -> str:
        """What to try where a stream cannot be rotated."""
        if self.criterion != "principal" or isinstance(channels, Unfit):
            return ""
        try:
            cuttable(graph, channels)
        except Unfit:
            return ""
        return "; criterion: activation needs no rotation"

    def _left(self, label: str, channels: Channels) -> int:
        if self.keep is not None:
            if self.keep > channels.width:
                raise PlanError(f"{label}: keep {self.keep} asked, it has {channels.width} channels")
            return self.keep
        return kept_width(channels.width, self.ratio or 0.0, self.multiple, least=2)

    def _decision(
        self, graph: Graph, label: str, channels: Channels, left: int, statistics: Statistics
    ) -> KeepChannels:
        if self.criterion == "random":
            drawn = torch.rand(channels.width, generator=lot(self.seed, label))
            keep = tuple(drawn.topk(left).indices.sort().values.tolist())
            return KeepChannels(site=label, width=channels.width, left=left, keep=keep)
        seen = _seen(label, channels, statistics)
        if self.criterion == "activation":
            scores = torch.stack([moments.absolute for moments in seen.values()]).sum(0)
            kept = scores.topk(left).indices.sort().values
            energy = torch.stack([moments.energy for moments in seen.values()]).sum(0)
            share = float(energy[kept].sum() / energy.sum())
            return KeepChannels(site=label, width=channels.width, left=left, keep=tuple(kept.tolist()), energy=share)
        share = kept_energy(_pooled(seen), _basis(graph, channels, seen, left))
        return KeepChannels(site=label, width=channels.width, left=left, energy=min(share, 1.0))

    def accept(self, plan: DropChannelsPlan) -> None:
        """Something is removed, or stays because so much was asked."""
        refuse_all_left(plan, "no stream can be made narrower")

    # -- applying -----------------------------------------------------------------------------------------------

    def check(self, graph: Graph, structure: Structure, plan: DropChannelsPlan) -> None:
        """Streams exist, have the channels, and can be made narrower."""
        streams = dict(find_channels(structure))
        for decision in plan.decisions:
            channels = streams.get(decision.site)
            if channels is None:
                raise PlanError(f"the plan names {decision.site}; the model's streams are {', '.join(streams)}")
            try:
                if isinstance(channels, Unfit):
                    raise channels
                self._fits(graph, decision.site, channels)
            except Unfit as error:
                raise PlanError(f"{decision.site}: the plan drops channels here, but {error}") from error
            if decision.width != channels.width or decision.left > channels.width:
                raise PlanError(
                    f"{decision.site}: the plan keeps {decision.left} of {decision.width} channels, it has {channels.width}"
                )
            if self.criterion == "principal":
                if decision.keep:
                    raise PlanError(f"{decision.site}: the plan lists channels; criterion principal keeps directions: set left")
                if decision.left < 2:
                    raise PlanError(f"{decision.site}: left is {decision.left}, at least 2 channels must stay")
            elif len(decision.keep) != decision.left or sorted({*decision.keep} & {*range(channels.width)}) != [*decision.keep]:
                raise PlanError(
                    f"{decision.site}: keep must be {decision.left} ascending channels of 0 to {channels.width - 1}, found "
                    f"{len(decision.keep)}: {list(decision.keep)[:8]} ..."
                )

    def apply(self, editor: Editor, structure: Structure, plan: DropChannelsPlan, statistics: Statistics) -> None:
        """Rotate and cut, or only cut."""
        streams = dict(find_channels(structure.select(Selection())))
        for decision in plan.decisions:
            channels = streams[decision.site]
            assert isinstance(channels, Channels)
            seen = _seen(decision.site, channels, statistics) if self.criterion != "random" else {}
            if self.criterion != "principal":
                keep = torch.tensor(decision.keep)
                factors = {
                    node: math.sqrt(float(moments.energy[keep].sum()) / (len(keep) * moments.tokens))
                    for node, moments in seen.items()
                }
                keep_channels(editor, channels, keep, factors)
                continue
            change = rotation(editor.graph, channels)
            try:
                basis = _basis(editor.graph, channels, seen, decision.left)
                rotate(editor, channels, change, basis, _reading(editor.graph, channels, change, seen, basis, self.refit))
            except NumericsError as error:
                raise PlanError(f"{decision.site}: {error}") from error

    def exact(self, plan: DropChannelsPlan) -> bool:
        """A rotation alone changes nothing."""
        return all(decision.left == decision.width for decision in plan.decisions)

    def parameter_delta(self, graph: Graph, structure: Structure, plan: DropChannelsPlan) -> int:
        """What is cut off every tensor, and what is untied or added."""
        streams = dict(find_channels(structure.select(Selection())))
        delta = 0
        for decision in plan.decisions:
            channels = streams[decision.site]
            assert isinstance(channels, Channels)
            if self.criterion == "principal":
                delta += rotated_parameters(graph, rotation(graph, channels), decision.left)
            else:
                delta += kept_parameters(graph, channels, decision.left)
        return delta

    def summary(self, plan: DropChannelsPlan) -> str:
        """The widths of the streams."""
        if self.exact(plan) and plan.decisions:
            return f"{', '.join(decision.site for decision in plan.decisions)} rotated, and as wide as before"
        widths = ", ".join(f"{decision.site} {decision.width} to {decision.left}" for decision in plan.decisions)
        return f"{len(plan.decisions)} streams made narrower{': ' if widths else ''}{widths} channels ({self.criterion})"


def _key(label: str, node: fx.Node) -> str:
    return f"{label}.{node.name}"


def _seen(label: str, channels: Channels, statistics: Statistics) -> dict[fx.Node, ChannelMoments]:
    """What calibration data says, by norm.

    Raises:
        PlanError: no token reached one.
    """
    found: dict[fx.Node, ChannelMoments] = {}
    for node in channels.norms:
        moments = statistics[_key(label, node)]
        assert isinstance(moments, ChannelMoments)
        if moments.tokens == 0:
            raise PlanError(
                f"{label}: calibration data never reached its norm {node.name} (no unmasked token), so there is nothing to "
                "go by"
            )
        found[node] = moments
    return found


def _pooled(seen: Mapping[fx.Node, ChannelMoments]) -> Tensor:
    total = sum(moments.moment for moments in seen.values() if moments.moment is not None)
    assert isinstance(total, Tensor)
    return total


def _basis(graph: Graph, channels: Channels, seen: Mapping[fx.Node, ChannelMoments], left: int) -> Tensor:
    centred = any(norm.centred for norm in channels.norms.values())
    return principal_basis(graph.placed(_pooled(seen)), left, centred=centred).cpu()


def _reading(
    graph: Graph,
    channels: Channels,
    change: Rotation,
    seen: Mapping[fx.Node, ChannelMoments],
    basis: Tensor,
    refit: bool,
) -> Callable[[fx.Node], Tensor]:
    """By norm, what its readers make of the narrow stream; the same for norms whose readers share weights."""
    groups = {node: norms for norms in joined_norms(graph, channels, change) for node in norms}

    @lru_cache(maxsize=1)  # readers of one norm follow each other; all norms' would take as much memory as the moments
    def columns(norms: frozenset[fx.Node]) -> Tensor:
        tokens = sum(seen[node].tokens for node in norms)
        moment, there = graph.placed((_pooled({node: seen[node] for node in norms}), basis))
        return read_columns(moment, there, tokens, refit=refit).cpu()

    return lambda node: columns(groups[node])
