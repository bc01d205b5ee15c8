"""Remove the attention heads that matter least.

Paper:
    Are Sixteen Heads Really Better than One? (Michel et al. 2019, arXiv:1905.10650), removing heads; Minitron
    (Muralidharan et al. 2024, arXiv:2407.14679), ``activation``; MoDeGPT (Lin et al. 2024, arXiv:2408.09632), the refit, which
    is there one of neurons; Optimal Brain Surgeon (Hassibi and Stork 1993), ``reconstruction``.
Formula:
    Unit i is a key/value group: one key/value head with the query heads that read it (of multi-head attention one head); with
    ``unit: query`` one query head, of which every group loses equally many.  a_i are its results, W_i its columns of the
    output projection ``y = sum_i W_i a_i + b``, and C = sum over tokens of ``a a^T`` of all results, joined.
    ``reconstruction``: units go one by one, each time the one without which ``sum_t |y_t - y'_t|^2`` is least, y' the output
    after the refit (without ``refit`` the output as it is then).
    ``activation``: the units of smallest ``sqrt(mean_t |W_i a_i|^2)``.
    ``magnitude``: the units of smallest ``|W_i|_F``.
    ``random``: by lot, a baseline.
    refit: ``W_K' = W_K + W_R C_RK (C_KK + r I)^-1``, K the columns that stay and R the others, the least squared error of the
    output with a penalty on the change; r is the one with which a fit to half of the data loses least on the other half.  With
    a bias both are fitted: C is then that of ``a - mean(a)``, and ``b' = b + W mean(a) - W_K' mean(a_K)``.
Shapes:
    a [T, U c] of U units; W [H, U c]; C [U c, U c] in float64.
Units:
    Scores: ``reconstruction`` the share of ``sum_t |W a_t|^2`` that is lost without the unit alone; ``activation`` as the
    attention's output, ``magnitude`` as its weights.  loss: the share that is lost without all units that go.
Reads:
    What the output projection reads, on the already-changed model, block by block; nothing where neither the criterion nor
    the refit needs data.
Changes:
    Projections, biases, norms, gates, position biases and caches of the units that go are sliced, the output projection too.
    Layers may differ from each other; key/value caches then differ in their number of heads.  ``unit: query`` leaves keys,
    values and caches as they are.
Errors:
    PlanError where nothing can be removed, more is to be kept than there is, weights are packed or factored, or calibration
    data never reaches an attention.  Of attentions whose heads cannot be told apart (one key/value head, heads normalised
    together, weights that other blocks read too) the plan's notes say that they are left alone, and why.
Example:
    ``- drop_heads: {ratio: 0.25}`` or ``- drop_heads: {keep: 4, unit: query, criterion: activation}``
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from surgeon.contract import LEFT, Decision, Observer, Pass, Plan, Seed, Statistics, refuse_all_left
from surgeon.errors import PlanError
from surgeon.graph import Graph
from surgeon.head_parts import Trim, Unfit
from surgeon.heads import keep_heads, trim
from surgeon.mixtures import bias, rows
from surgeon.moments import HalvedMoments
from surgeon.numerics import NumericsError, best_ridge, contributions, output_loss, refit_columns, remove_blocks
from surgeon.numerics.columns import RIDGE
from surgeon.rewrite import Editor
from surgeon.samples import lot
from surgeon.structure import Attention, Linear, Selection, Site, Structure


class KeepHeads(Decision):
    """The heads of one attention that stay.

    Attributes:
        site: ``blocks.I.attention``.
        unit: ``group`` or ``query``.
        units: how many of them there are.
        keep: the numbers of those that stay, ascending.
        scores: the score of every unit.
        loss: share of the output's energy that is lost, where calibration data told it.
        ridge: r of the refit, as a share of the mean of C's diagonal.
    """

    unit: Literal["group", "query"]
    units: Annotated[int, Field(ge=2)]
    keep: Annotated[tuple[int, ...], Field(min_length=1)]
    scores: tuple[float, ...] = ()
    loss: float | None = None
    ridge: Annotated[float, Field(gt=0)] | None = None


class DropHeadsPlan(Plan[KeepHeads]):
    """Which heads stay in each attention."""


class DropHeads(Pass[DropHeadsPlan]):
    """Remove the attention heads that matter least, and fit the output projection to those that stay."""

    name = "drop_heads"
    scope: ClassVar[Literal["model", "block"]] = "block"
    plan_type = DropHeadsPlan
    apply_reads_statistics = True

    ratio: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Share of the units to remove from each attention (with unit query: of each group), rounded down; give this or keep."""
    keep: Annotated[int, Field(ge=1)] | None = None
    """Units to keep in each attention (with unit query: a multiple of its key/value heads); give this or ratio."""
    unit: Literal["group", "query"] = "group"
    """What is removed: a key/value head with the query heads that read it, which makes caches smaller too; or query heads
    alone, equally many of each group, for attention with few key/value heads."""
    criterion: Literal["reconstruction", "activation", "magnitude", "random"] = "reconstruction"
    """How units are ranked: by what the attention's output loses without them, by the norm of what they add to it, by the
    norm of their columns of the output projection, or by lot."""
    refit: bool = True
    """Whether the output projection is fitted to the units that stay, on calibration data."""
    seed: Seed = 0
    """Seed of criterion random."""

    @model_validator(mode="after")
    def _one_budget(self) -> DropHeads:
        if (self.keep is None) == (self.ratio is None):
            raise ValueError("give either keep or ratio")
        return self

    # -- observing ----------------------------------------------------------------------------------------------

    def observers(self, structure: Structure) -> Mapping[str, Observer]:
        """Second moments and means of what the output projections read."""
        found: dict[str, Observer] = {}
        if not self.refit and self.criterion in ("magnitude", "random"):
            return found
        for site in structure.attentions():
            output = site.part.o
            if output is not None:
                found[site.name] = HalvedMoments(output.input)
        return found

    # -- planning -----------------------------------------------------------------------------------------------

    def plan(self, graph: Graph, structure: Structure, statistics: Statistics) -> DropHeadsPlan:
        """Choose the units that stay in every selected attention."""
        decisions, notes = [], []
        for site in structure.attentions():
            _refuse_packed(graph, site)
            units = _units(site, self.unit)
            keep = self._count(site, units)
            reason = _apart(graph, structure, site, self.unit, keep)
            if reason is not None:
                notes.append(f"{site.name}: {LEFT}: {reason}")
            elif keep == units:
                notes.append(f"{site.name}: all {units} {_called(site, self.unit)} stay")
            else:
                try:
                    decisions.append(self._decision(graph, site, units, keep, statistics))
                except NumericsError as error:
                    raise PlanError(f"{site.name}: {error}") from error
        return DropHeadsPlan(decisions=tuple(decisions), notes=tuple(notes))

    def _count(self, site: Site[Attention], units: int) -> int:
        """How many units an attention keeps.

        Raises:
            PlanError: it has fewer, or they are not equally many of each group.
        """
        groups = len(_groups(site, units))
        if self.keep is None:
            return groups * (units // groups - int((self.ratio or 0.0) * (units // groups)))
        if self.keep > units:
            raise PlanError(f"{site.name}: keep {self.keep} asked, it has {units} {_called(site, self.unit)}")
        if self.keep % groups:
            raise PlanError(
                f"{site.name}: keep {self.keep} query heads asked, which its {groups} key/value heads do not divide; "
                f"keep a multiple of {groups}"
            )
        return self.keep

    def _decision(
        self, graph: Graph, site: Site[Attention], units: int, keep: int, statistics: Statistics
    ) -> KeepHeads:
        output = _output(site)
        weight = graph.placed(rows(graph, output))
        groups = _groups(site, units)
        lost = (units - keep) // len(groups)
        moments = _moments(graph, site, statistics) if site.name in statistics else None
        centred = self.refit and output.bias is not None
        if self.criterion == "reconstruction":
            assert moments is not None
            removal = remove_blocks(weight, moments.second(centred), groups, lost, self.refit)
            gone, scores = removal.order, removal.alone
        else:
            scores = self._scores(site, weight, units, moments)
            gone = [group[i] for group in groups for i in scores[group].argsort(stable=True)[:lost].tolist()]
        left = [unit for unit in range(units) if unit not in gone]
        loss, ridge = None, None
        if moments is not None:
            places = _places(output, units, left)
            ridge = _ridge(weight, moments, centred, places) if self.refit else None
            fitted = weight[:, places] if ridge is None else refit_columns(weight, moments.second(centred), places, ridge)
            loss = output_loss(weight, moments.second(centred), places, fitted)
        return KeepHeads(
            site=site.name, unit=self.unit, units=units, keep=tuple(left), scores=tuple(scores.tolist()), loss=loss, ridge=ridge
        )

    def _scores(self, site: Site[Attention], weight: Tensor, units: int, moments: HalvedMoments | None) -> Tensor:
        if self.criterion == "activation":
            assert moments is not None
            energy = contributions(weight, moments.second(False), units).diagonal() / moments.tokens
            return energy.clamp_min(0).sqrt().cpu()
        if self.criterion == "magnitude":
            norms: Tensor = torch.linalg.vector_norm(weight.double().reshape(weight.shape[0], units, -1), dim=(0, 2))
            return norms.cpu()
        return torch.rand(units, generator=lot(self.seed, site.name), dtype=torch.float64)

    def accept(self, plan: DropHeadsPlan) -> None:
        """Something is removed, or stays because so much was asked."""
        refuse_all_left(plan, "no attention can lose heads")

    # -- applying -----------------------------------------------------------------------------------------------

    def check(self, graph: Graph, structure: Structure, plan: DropHeadsPlan) -> None:
        """Attentions and units exist, and their heads are apart."""
        sites = {site.name: site for site in structure.select(Selection()).attentions()}
        for decision in plan.decisions:
            if decision.site not in sites:
                raise PlanError(f"the plan drops heads of {decision.site}, which is not an attention of this model")
            site = sites[decision.site]
            _refuse_packed(graph, site)
            units = _units(site, decision.unit)
            if decision.units != units:
                raise PlanError(
                    f"{site.name}: the plan has {decision.units} units, it has {units} {_called(site, decision.unit)}"
                )
            if sorted(set(decision.keep) & set(range(units))) != list(decision.keep):
                raise PlanError(f"{site.name}: keep {list(decision.keep)} must be ascending units of 0 to {units - 1}")
            groups = _groups(site, units) if decision.unit == "query" else []
            if len({len(set(group) & set(decision.keep)) for group in groups}) > 1:
                raise PlanError(
                    f"{site.name}: keep {list(decision.keep)} must hold as many query heads of each of its "
                    f"{site.part.kv_heads} key/value heads"
                )
            _trim(graph, structure, site, decision)

    def apply(self, editor: Editor, structure: Structure, plan: DropHeadsPlan, statistics: Statistics) -> None:
        """Slice what the heads are made of, and fit the output projections."""
        sites = {site.name: site for site in structure.select(Selection()).attentions()}
        for decision in plan.decisions:
            site = sites[decision.site]
            output = _output(site)
            change = _trim(editor.graph, structure, site, decision)
            weight, shift = editor.graph.placed((rows(editor.graph, output), bias(editor.graph, output)))
            keep_heads(editor, change)
            if not self.refit:
                continue
            moments, centred = _moments(editor.graph, site, statistics), output.bias is not None
            places = _places(output, decision.units, decision.keep)
            try:
                ridge = decision.ridge or _ridge(weight, moments, centred, places)
                fitted = refit_columns(weight, moments.second(centred), places, ridge)
            except NumericsError as error:
                raise PlanError(f"{site.name}: {error}") from error
            editor.set_tensor(output.weight, (fitted.T if output.transposed else fitted).contiguous())
            if output.bias is not None and shift is not None:
                mean = moments.mean.to(weight.device)
                constant = weight.double() @ mean - fitted.double() @ mean[places]
                editor.set_tensor(output.bias, (shift.double() + constant).to(shift.dtype))

    def exact(self, plan: DropHeadsPlan) -> bool:
        """Removing heads changes the model, unless none is removed."""
        return all(len(decision.keep) == decision.units for decision in plan.decisions)

    def parameter_delta(self, graph: Graph, structure: Structure, plan: DropHeadsPlan) -> int:
        """What is sliced off every tensor."""
        sites = {site.name: site for site in structure.select(Selection()).attentions()}
        delta = 0
        for decision in plan.decisions:
            change = _trim(graph, structure, sites[decision.site], decision)
            left = dict.fromkeys(change.lost, 0) | {
                name: part.of(graph.tensor(name).detach()).numel() for name, part in change.tensors.items()
            }
            for name, count in left.items():
                tensor = graph.tensor(name)
                if isinstance(tensor, torch.nn.Parameter):
                    delta += count - tensor.numel()
        return delta

    def summary(self, plan: DropHeadsPlan) -> str:
        """How many heads went."""
        kinds = {"group": "key/value heads with their queries", "query": "query heads"}
        gone = {unit: sum(d.units - len(d.keep) for d in plan.decisions if d.unit == unit) for unit in kinds}
        listing = " and ".join(f"{count} {kinds[unit]}" for unit, count in gone.items() if count) or "no heads"
        return f"{listing} removed from {len(plan.decisions)} attentions"


def _moments(graph: Graph, site: Site[Attention], statistics: Statistics) -> HalvedMoments:
    """What calibration data says of an attention's results, where the graph is run.

    Raises:
        PlanError: no token reached it.
    """
    moments = statistics[site.name]
    assert isinstance(moments, HalvedMoments)
    if moments.tokens == 0:
        raise PlanError(f"{site.name}: calibration data never reached it (no unmasked token), so there is nothing to go by")
    return moments.placed(graph)


def _ridge(weight: Tensor, moments: HalvedMoments, centred: bool, places: Tensor) -> float:
    if min(moments.counts) == 0 or len(places) == weight.shape[1]:
        return RIDGE
    return best_ridge(weight, (moments.second(centred, 0), moments.second(centred, 1)), places)


def _output(site: Site[Attention]) -> Linear:
    assert site.part.o is not None  # attentions without are left alone
    return site.part.o


def _units(site: Site[Attention], unit: str) -> int:
    return site.part.kv_heads if unit == "group" else site.part.heads


def _called(site: Site[Attention], unit: str) -> str:
    return "query heads" if unit == "query" else "key/value heads" if site.part.kv_heads < site.part.heads else "heads"


def _groups(site: Site[Attention], units: int) -> list[list[int]]:
    """Units that lose equally many: all of them, or the query heads of each key/value head."""
    groups = 1 if units == site.part.kv_heads else site.part.kv_heads
    members = units // groups
    return [list(range(first, first + members)) for first in range(0, units, members)]


def _places(output: Linear, units: int, keep: list[int] | tuple[int, ...]) -> Tensor:
    """The features of some units among those that the output projection reads."""
    width = output.in_features // units
    return (torch.tensor(keep)[:, None] * width + torch.arange(width)).flatten()


def _refuse_packed(graph: Graph, site: Site[Attention]) -> None:
    """Refuse projections that are packed, or factored where they would be fitted.

    Raises:
        PlanError: names the site and the projection.
    """
    for key in ("q", "k", "v", "o"):
        linear: Linear | None = getattr(site.part, key)
        if linear is not None and not graph.tensor(linear.weight).is_floating_point():
            raise PlanError(f"{site.name}: its projection {key} is quantized already; put drop_heads before quantize")
    if site.part.o is not None and site.part.o.factors:
        raise PlanError(f"{site.name}: its output projection was factored already; put drop_heads before low_rank")


def _apart(graph: Graph, structure: Structure, site: Site[Attention], unit: Literal["group", "query"], keep: int) -> str | None:
    """Why heads of an attention cannot be removed, None where they can."""
    units = _units(site, unit)
    if units < 2:
        more = site.part.heads > 1
        hint = f"; its {site.part.heads} query heads can be removed with unit: query" if more else ""
        return f"it has one {'key/value ' if more else ''}head{hint}"
    groups = _groups(site, units)
    first = [head for group in groups for head in group[: max(1, min(keep // len(groups), len(group) - 1))]]
    try:
        _trim(graph, structure, site, KeepHeads(site=site.name, unit=unit, units=units, keep=tuple(first)))
    except PlanError as error:
        return str(error).removeprefix(f"{site.name}: ")
    return None


def _trim(graph: Graph, structure: Structure, site: Site[Attention], decision: KeepHeads) -> Trim:
    """What changes without some units.

    Raises:
        PlanError: names the site and where its heads are not apart.
    """
    output = site.part.o
    if output is None:
        raise PlanError(f"{site.name}: its output projection was not recognised")
    if output.columns is not None:
        raise PlanError(f"{site.name}: its output projection {output.weight} is one matrix with that of another part beside it")
    try:
        return trim(graph, structure, site, decision.units, decision.keep)
    except Unfit as error:
        raise PlanError(f"{site.name}: {error}") from error
