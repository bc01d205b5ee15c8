"""Make feed-forward networks narrower: remove the neurons that matter least, and let the others make up for them.

Paper:
    MoDeGPT (Lin et al. 2024, arXiv:2408.09632), type I: ridge leverage scores and the refitted output columns.  Minitron
    (Muralidharan et al. 2024, arXiv:2407.14679): mean activations.  Optimal brain surgeon (Hassibi and Stork 1992), by
    columns as in ZipLM (Kurtic et al. 2023, arXiv:2302.04089): one neuron after the other.
Formula:
    With h_t the activations behind gate and up, ``y = W h + b``, ``C = sum_t h_t h_t^T`` (``sum_t w_t^2 h_t h_t^T`` over the
    tokens of an expert that weighs w_t), K the neurons that stay and R those that go:
    ``refit``: ``W' = W_K + W_R C_RK (C_KK + lambda)^-1``, the least squares of ``W h`` on ``h_K`` with a penalty on the
    change: lambda is I / 2 times the mean of ``h_i^2``, as if I / 2 further tokens had shown that nothing is to change.  b is
    fitted with it, as the column of one more neuron that always gives 1.  On 2 I tokens or more, neurons that are linear
    combinations of those that stay are not penalised: they go without loss.
    ``reconstruction``: the neuron that costs least goes first, ``|w_i|^2 / P_ii`` with ``P = (C + slight)^-1``, and W and P
    are brought up to date as if it had been refitted, before the next goes.  Without refit it costs what it adds to the
    loss, ``sum_{j in R} <w_i, w_j> C_ij``.
    ``contribution``: ``sqrt(C_ii) |w_i|``.  ``leverage``: the diagonal of ``C (C + lambda)^-1``.  ``activation``: the mean of
    ``|h_i|``.  ``random``: by lot, a baseline.  The neurons of least score go.
    benchmarks/results/width.md has what each loses on trained models.
Shapes:
    up (and gate) [I, H], down [G, I] -> [K, H], [G, K]; experts [E, O, H], [E, G, I] -> the same with K, every expert with
    neurons of its own but as many as the others.
Units:
    ratio is the share of neurons that go; keep and multiple are numbers of neurons; loss is a share of the output's energy.
Reads:
    The activations of every network, experts' on the tokens that they run for, on the already-changed model, block by block.
    Only sums are kept: 8 (I + 1)^2 bytes for each network and expert of one block, and about four times that while one
    network (all experts of one mixture) is worked on.  Nothing is read for ``random`` without refit.
Changes:
    The tensors of gate, up, down and their biases under their own names; nothing else of the graph but sizes.
Errors:
    PlanError where weights are quantized or factored, calibration data never reaches a network, or ``keep`` is more than it
    has.  Networks whose neurons cannot be told apart, or that share their weights with other layers, are left alone, with a
    note; PlanError where that is so for all.
Example:
    ``- drop_neurons: {ratio: 0.25}`` or ``- drop_neurons: {keep: 1024, criterion: contribution, names: "*.ffn"}``
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from surgeon.contract import LEFT, Decision, Observer, Pass, Plan, Seed, Statistics, refuse_all_left
from surgeon.errors import PlanError
from surgeon.expert_stack import ExpertStack
from surgeon.graph import Graph
from surgeon.mixtures import Neurons, not_of_neurons, refuse_rewritten
from surgeon.narrowing import (
    expert_neuron_parameters,
    experts_not_their_own,
    keep_expert_neurons,
    keep_neurons,
    kept_width,
    neuron_parameters,
    not_its_own,
)
from surgeon.neuron_moments import ExpertMoments, NeuronMoments
from surgeon.numerics import (
    NumericsError,
    eliminate,
    eliminate_unfitted,
    leverage_scores,
    lost_energy,
    refitted_outputs,
)
from surgeon.rewrite import Editor
from surgeon.samples import lot
from surgeon.structure import FFN, MoE, Selection, Site, Structure


class KeepNeurons(Decision):
    """The neurons of one network that stay.

    Attributes:
        site: ``blocks.I.ffn``, ``blocks.I.moe`` or ``blocks.I.moe.shared``.
        keep: their numbers, ascending: one list for a dense network, one for each expert of a mixture.
        width: how many neurons there were.
        loss: share of the energy of the network's output (of its experts' weighed outputs) that is lost on calibration data,
            where it was observed.
    """

    keep: tuple[tuple[int, ...], ...]
    width: int
    loss: float | None = None


class DropNeuronsPlan(Plan[KeepNeurons]):
    """Which neurons stay in every network."""


class DropNeurons(Pass[DropNeuronsPlan]):
    """Remove the neurons of feed-forward networks and experts that matter least."""

    name = "drop_neurons"
    scope: ClassVar[Literal["model", "block"]] = "block"
    plan_type = DropNeuronsPlan
    apply_reads_statistics = True

    ratio: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Share of every network's neurons to remove; give this or keep."""
    keep: Annotated[int, Field(ge=1)] | None = None
    """Neurons to keep in every network, of a mixture in every expert; give this or ratio."""
    multiple: Annotated[int, Field(ge=1)] = 8
    """With ratio: widths are rounded up to a multiple of this; kernels want rows of 16 bytes, 8 numbers of 16 bits, and
    quantize in groups of 32 is not padded where it is 32."""
    criterion: Literal["reconstruction", "contribution", "leverage", "activation", "random"] = "reconstruction"
    """How neurons are ranked: by what the output loses without them once the others make up for it, by the size of what
    they give, by how little the others can stand in for them, by how active they are, or by lot."""
    refit: bool = True
    """Fit the output columns (and bias) of those that stay to what the whole network gave on calibration data."""
    seed: Seed = 0
    """Seed of random."""

    @model_validator(mode="after")
    def _one_budget(self) -> DropNeurons:
        if (self.keep is None) == (self.ratio is None):
            raise ValueError("give either keep or ratio")
        return self

    @property
    def _observes(self) -> bool:
        return self.refit or self.criterion != "random"

    # -- observing ----------------------------------------------------------------------------------------------

    def observers(self, structure: Structure) -> Mapping[str, Observer]:
        """Second moments of the neurons of every network that can be made narrower."""
        found: dict[str, Observer] = {}
        for site in networks(structure) if self._observes else ():
            part = site.part
            if isinstance(part, MoE):
                found[site.name] = ExpertMoments(part.node, part.experts, part.width, part.activation)
            elif not_of_neurons(self.name, part) is None:
                found[site.name] = NeuronMoments(part.hidden, part.width)
        return found

    # -- planning -----------------------------------------------------------------------------------------------

    def plan(self, graph: Graph, structure: Structure, statistics: Statistics) -> DropNeuronsPlan:
        """Choose the neurons of every network that stay."""
        decisions, notes = [], []
        for site in networks(structure):
            reason = self._reason(graph, site)
            if reason is not None:
                notes.append(f"{site.name}: {LEFT}: {reason}")
                continue
            width = self._width(site)
            if width == site.part.width:
                notes.append(f"{site.name}: all {width} neurons stay")
                continue
            network = _Network.of(graph, site, statistics.get(site.name))
            try:
                kept = self._kept(network, site.name, width)
                loss = self._loss(network, kept)
            except NumericsError as error:
                raise PlanError(f"{site.name}: {error}") from error
            decisions.append(
                KeepNeurons(site=site.name, keep=tuple(map(tuple, kept.tolist())), width=site.part.width, loss=loss)
            )
        return DropNeuronsPlan(decisions=tuple(decisions), notes=tuple(notes))

    def _reason(self, graph: Graph, site: Site[FFN] | Site[MoE]) -> str | None:
        """Why a network is left alone, or None.

        Raises:
            PlanError: an earlier pass has packed or factored its weights.
        """
        part = site.part
        if isinstance(part, MoE):
            if not graph.tensor(part.w_in).is_floating_point() or not graph.tensor(part.w_out).is_floating_point():
                raise PlanError(f"{site.name}: its experts are quantized already; put {self.name} before quantize")
            return experts_not_their_own(graph, part)
        refuse_rewritten(self.name, graph, site.name, part)
        return not_of_neurons(self.name, part) or not_its_own(graph, part)

    def _width(self, site: Site[FFN] | Site[MoE]) -> int:
        width: int = site.part.width
        if self.keep is not None:
            if self.keep > width:
                raise PlanError(f"{site.name}: keep {self.keep} asked, it has {width} neurons")
            return self.keep
        return kept_width(width, self.ratio or 0.0, self.multiple)

    def _kept(self, network: _Network, site: str, width: int) -> Tensor:
        """The neurons of every network that stay, [B, width], ascending."""
        if self.criterion == "random":
            drawn = torch.rand(network.down.shape[::2], generator=lot(self.seed, site))
            return drawn.topk(width).indices.sort(1).values.to(network.down.device)
        if self.criterion == "reconstruction":
            gone = network.down.shape[2] - width
            if self.refit:
                return eliminate(network.moment, network.columns, gone, network.tokens, network.fixed)[:, :width]
            return eliminate_unfitted(network.second, network.down, gone)
        if self.criterion == "leverage":
            scores = leverage_scores(network.second, network.tokens)
        elif self.criterion == "contribution":
            scores = network.second.diagonal(dim1=1, dim2=2).sqrt() * network.down.double().norm(dim=1)
        else:
            scores = network.absolute
        return scores.topk(width).indices.sort(1).values

    def _loss(self, network: _Network, kept: Tensor) -> float | None:
        if not self._observes:
            return None
        columns = network.kept_columns(kept)
        lost, whole = lost_energy(network.moment, network.columns, columns, self._outputs(network, columns))
        return lost / whole if whole > 0 else 0.0

    def _outputs(self, network: _Network, columns: Tensor) -> Tensor:
        """Output columns of those that stay, the bias among them where it is fitted; [B, G, K] or [B, G, K + 1]."""
        if self.refit:
            return refitted_outputs(network.moment, network.columns, columns, network.tokens)
        return network.columns.gather(2, columns[:, None].expand(-1, network.columns.shape[1], -1))

    def accept(self, plan: DropNeuronsPlan) -> None:
        """Something is removed, or stays because so much was asked."""
        refuse_all_left(plan, "no network can be made narrower")

    # -- applying -----------------------------------------------------------------------------------------------

    def check(self, graph: Graph, structure: Structure, plan: DropNeuronsPlan) -> None:
        """Networks exist, can be made narrower, and have the neurons; every expert of a mixture keeps equally many."""
        sites = {site.name: site for site in networks(structure.select(Selection()))}
        for decision in plan.decisions:
            if decision.site not in sites:
                raise PlanError(f"the plan names {decision.site}, which is no feed-forward network or mixture of this model")
            site = sites[decision.site]
            reason = self._reason(graph, site)
            if reason is not None:
                raise PlanError(f"{decision.site}: the plan drops neurons here, but {reason}")
            part = site.part
            count = part.experts if isinstance(part, MoE) else 1
            sizes = {len(own) for own in decision.keep}
            if len(decision.keep) != count or len(sizes) != 1 or 0 in sizes:
                raise PlanError(
                    f"{decision.site}: the plan keeps {sorted(sizes)} neurons in {len(decision.keep)} networks; "
                    f"equally many are needed in each of {count}"
                )
            for own in decision.keep:
                wrong = [n for n, before in zip(own, (-1, *own), strict=False) if not before < n < part.width]
                if wrong:
                    raise PlanError(
                        f"{decision.site}: keep must be ascending neurons of 0 to {part.width - 1}, found {wrong[0]} at place "
                        f"{own.index(wrong[0])} of {len(own)}"
                    )
            if decision.width != part.width:
                raise PlanError(f"{decision.site}: the plan is for {decision.width} neurons, it has {part.width}")

    def apply(self, editor: Editor, structure: Structure, plan: DropNeuronsPlan, statistics: Statistics) -> None:
        """Slice the networks' tensors and fit what stays."""
        sites = {site.name: site for site in networks(structure.select(Selection()))}
        for decision in plan.decisions:
            site, keep = sites[decision.site], torch.tensor(decision.keep)
            network = _Network.of(editor.graph, site, statistics.get(site.name))
            try:
                outputs = self._outputs(network, network.kept_columns(keep.to(network.down.device)))
            except NumericsError as error:
                raise PlanError(f"{site.name}: {error}") from error
            columns, bias = outputs[:, :, : keep.shape[1]], outputs[:, :, -1] if network.fixed else None
            if isinstance(site.part, MoE):
                keep_expert_neurons(editor, site.part, keep, columns, bias)
            else:
                keep_neurons(editor, site.part, keep[0], columns[0], None if bias is None else bias[0])

    def parameter_delta(self, graph: Graph, structure: Structure, plan: DropNeuronsPlan) -> int:
        """The rows, biases and columns of the neurons that go."""
        sites = {site.name: site.part for site in networks(structure.select(Selection()))}
        delta = 0
        for decision in plan.decisions:
            part = sites[decision.site]
            each = expert_neuron_parameters(graph, part) if isinstance(part, MoE) else neuron_parameters(graph, part)
            delta -= (part.width - len(decision.keep[0])) * each
        return delta

    def summary(self, plan: DropNeuronsPlan) -> str:
        """How many networks, and their widths."""
        widths = sorted({(d.width, len(d.keep[0])) for d in plan.decisions})
        listing = ", ".join(f"{before} to {after}" for before, after in widths)
        return f"{len(plan.decisions)} networks made narrower{': ' if widths else ''}{listing} neurons ({self.criterion})"


@dataclass(frozen=True)
class _Network:
    """A dense network (B = 1) or the experts of a mixture (B = E), and what was seen of them.

    Attributes:
        down: output columns, [B, G, I].
        bias: of the output, [B, G] or None.
        seen: sums over calibration tokens, or None.
    """

    down: Tensor
    bias: Tensor | None
    seen: NeuronMoments | None

    @classmethod
    def of(cls, graph: Graph, site: Site[FFN] | Site[MoE], observer: Observer | None) -> _Network:
        """Read a network, to where the graph is run.

        Raises:
            PlanError: it was observed and calibration data never reached it.
        """
        assert observer is None or isinstance(observer, NeuronMoments)
        if observer is not None and observer.tokens == 0:
            raise PlanError(f"{site.name}: calibration data never reached it (no unmasked token), so there is nothing to go by")
        if isinstance(site.part, MoE):
            stack = ExpertStack.of(graph, site.part)
            down, bias = stack.w_out, stack.b_out
        else:
            neurons = Neurons.of(graph, site.part)
            down, bias = neurons.down[None], None if neurons.down_bias is None else neurons.down_bias[None]
        return cls(graph.placed(down), graph.placed(bias), None if observer is None else observer.placed(graph))

    @property
    def fixed(self) -> int:
        """Columns beside those of neurons: 1 for a bias that may be fitted."""
        return 0 if self.bias is None else 1

    @property
    def columns(self) -> Tensor:
        """Output columns and, behind them, the bias; [B, G, I + fixed]."""
        return self.down if self.bias is None else torch.cat([self.down, self.bias[:, :, None]], dim=2)

    @property
    def moment(self) -> Tensor:
        """Second moments that go with ``columns``."""
        assert self.seen is not None
        size = self.columns.shape[2]
        return self.seen.moment[:, :size, :size]

    @property
    def second(self) -> Tensor:
        """Second moments of the neurons alone, [B, I, I]."""
        assert self.seen is not None
        return self.seen.moment[:, :-1, :-1]

    @property
    def tokens(self) -> Tensor:
        """Tokens that were seen, [B]."""
        assert self.seen is not None
        return self.seen.seen

    @property
    def absolute(self) -> Tensor:
        """Mean |h| of every neuron, [B, I]."""
        assert self.seen is not None
        return self.seen.absolute / self.seen.seen.clamp_min(1)[:, None]

    def kept_columns(self, keep: Tensor) -> Tensor:
        """Numbers of the columns that stay with some neurons, [B, K] -> [B, K + fixed]."""
        if self.bias is None:
            return keep
        return torch.cat([keep, torch.full_like(keep[:, :1], self.down.shape[2])], dim=1)


def networks(structure: Structure) -> Iterator[Site[FFN] | Site[MoE]]:
    """Selected dense networks, mixtures, and the networks beside their experts (``blocks.I.moe.shared``)."""
    yield from structure.ffns()
    for site in structure.select(Selection()).moes():
        part, admits = site.part, structure.selection.admits
        if admits(site.name, site.block, (part.w_in, part.w_out)):
            yield site
        for number, ffn in enumerate(part.shared):
            name = f"{site.name}.shared" if len(part.shared) == 1 else f"{site.name}.shared.{number}"
            linears = [linear for linear in (ffn.gate, ffn.up, ffn.down) if linear is not None]
            if admits(name, site.block, tuple(linear.weight for linear in linears)):
                yield Site(name, site.block, ffn)
