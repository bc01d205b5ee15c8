"""Set weights to zero, anywhere or a fixed number in every few inputs.

Paper:
    SparseGPT (Frantar and Alistarh 2023, arXiv:2301.00774), ``sparsegpt``; Wanda (Sun et al. 2023, arXiv:2306.11695),
    ``wanda``, of experts with the router's weights as in MoE-Pruner (Xie et al. 2024, arXiv:2410.12013); magnitude pruning
    (Han et al. 2015, arXiv:1506.02626), ``magnitude``; n:m patterns (Mishra et al. 2021, arXiv:2104.08378).
Formula:
    The weights of the lowest scores go: of each row or of the whole matrix, or of every m consecutive inputs all but n.
    ``magnitude``: |w_ij|.  ``wanda``: ``|w_ij| sqrt(sum_t x_tj^2)``.  ``random``: by lot, a baseline.
    ``sparsegpt``: with ``C = sum_t x_t x_t^T``, damped, and ``C^-1 = U^T U``, column by column: ``w_ij^2 / U_jj^2``, chosen
    among 128 columns or m; what goes is made up for by the columns behind, ``w_i,j+1: -= w_ij / U_jj U_j,j+1:``.
    An expert's sums count its own tokens, by the square of their weights.
    ``allocation``: how many go of each weight. ``uniform``: the same share. ``owl``: fewer in blocks with more outliers (Yin et
    al. 2024, arXiv:2310.05175). ``loss``: shares of which the loss is estimated to rise least, ``1/2 sum_ij (W - W')_ij^2 C_j
    G_i`` of the zeros of ``wanda`` (``surgeon/sensitivity.py``), by integer programming.
Shapes:
    W: [out, in] (experts [E, out, in], each a matrix of its own); x_t: [in].
Units:
    sparsity: zeros / weights.
Reads:
    ``wanda``, ``sparsegpt``: the input of each linear and mixture, on the already-changed model, block by block; for
    ``sparsegpt`` 8 in^2 bytes for each input, for either ``tokens`` rows for each mixture. Before that, ``allocation: loss``
    runs the model forward and backward, and ``owl`` forward, with 8 (in + out) bytes for each linear.
Changes:
    Values of weights; no shape, and no parameter count: the zeros stay stored.  Weights that are zero already stay so.
Errors:
    PlanError for quantized weights and where a plan's sites or patterns do not fit the model.  Of rows that are no whole number
    of groups, weights tied to an embedding table and, with data, weights that other blocks read too, the plan's notes say
    that they are left alone.
Example:
    ``- sparsify: {sparsity: 0.5, allocation: loss}`` or ``- sparsify: {pattern: "2:4", criterion: wanda, names: "*.ffn.*"}``
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from surgeon.accounting import Key, memory, stored_reads
from surgeon.codes import read_in_several_blocks
from surgeon.contract import LEFT, Decision, Observer, Pass, Plan, Seed, Statistics, refuse_all_left
from surgeon.errors import PlanError
from surgeon.expert_moments import energies, moments_of_some
from surgeon.expert_stack import ExpertStack
from surgeon.graph import Graph
from surgeon.moments import Energy, SecondMoment, totals
from surgeon.numerics import NumericsError, Zeros, least, sparsify_compensated
from surgeon.rewrite import Editor
from surgeon.samples import Sample, lot
from surgeon.sensitivity import Metric, Squares, names_of, squares_of
from surgeon.structure import Linear, MoE, Selection, Site, Structure
from surgeon.zero_budget import by_loss, by_outliers

_Part = Linear | MoE
_SLACK = 1e-3
"""What a plan's share of zeros may be off by: weights that a pass before computed are zero by chance here and not there."""


class ZeroWeights(Decision):
    """One site whose weights become sparse.

    Attributes:
        site: name of the linear or mixture.
        sparsity: share of each of its matrices that is to be zero; None where a pattern says it.
        pattern: n:m, at most n of m consecutive inputs are not zero; None where zeros may be anywhere.
        reached: zeros over weights in the end, those that there were before included.
        weights: how many weights that is of.
        fitted: zeros are chosen by calibration data, which reached it; otherwise by the weights alone.
        errors: of ``allocation: loss``: what each share was estimated to raise the loss by, in nats per token (of models
            without a next-token loss, to lose of the outputs), for who edits the plan.
    """

    sparsity: Annotated[float, Field(ge=0, lt=1)] | None = None
    pattern: str | None = None
    reached: Annotated[float, Field(ge=0, le=1)]
    weights: Annotated[int, Field(ge=1)]
    fitted: bool = False
    errors: dict[float, float] | None = None


class SparsifyPlan(Plan[ZeroWeights]):
    """The sites that become sparse, and how sparse."""


class Sparsify(Pass[SparsifyPlan]):
    """Set the weights of linears and experts that matter least to zero, in no pattern or in n:m."""

    name = "sparsify"
    scope: ClassVar[Literal["model", "block"]] = "block"
    plan_type = SparsifyPlan
    apply_reads_statistics = True
    heals = False

    sparsity: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Share of the weights to set to zero, of each matrix alike unless allocation says otherwise; give this or pattern."""
    pattern: str | None = None
    """n:m, such as 2:4, which sparse tensor cores multiply: of every m consecutive inputs of a row n stay."""
    criterion: Literal["sparsegpt", "wanda", "magnitude", "random"] = "sparsegpt"
    """sparsegpt also changes the weights that stay, so that they make up for those that go; wanda compares weights times the
    norm of their inputs; magnitude and random need no data."""
    allocation: Literal["uniform", "loss", "owl"] = "uniform"
    """Where the zeros go, for sparsegpt and wanda. uniform: the same share everywhere; loss: each linear and mixture has a
    share of its own, so that the loss is estimated to rise least; owl: each block has, by its outliers."""
    spread: Annotated[float, Field(gt=0, le=1)] | None = None
    """For allocation: the most by which a share differs from sparsity: 0.15 by default for loss, in steps of 0.05, and 0.08 for
    owl (its lambda)."""
    compare: Literal["row", "matrix"] | None = None
    """Which weights compete without a pattern: those of one output, or all of a matrix; row for wanda and matrix for the others
    by default. sparsegpt has its own way."""
    damp: Annotated[float, Field(gt=0, le=1)] | None = None
    """For sparsegpt: what is added to the diagonal of the inputs' second moments, as a share of its mean; 0.01 by default."""
    tokens: Annotated[int, Field(ge=32)] | None = None
    """For sparsegpt and wanda: calibration tokens that are kept for each mixture of experts; 16384 by default."""
    seed: Seed | None = None
    """Seed of that sample, and of criterion random; 0 by default."""

    @field_validator("pattern")
    @classmethod
    def _pattern_is_readable(cls, value: str | None) -> str | None:
        if value is not None:
            _read(value)
        return value

    @model_validator(mode="after")
    def _fields_fit(self) -> Sparsify:
        if (self.sparsity is None) == (self.pattern is None):
            raise ValueError("give either sparsity or pattern")
        if self.compare is not None and (self.criterion == "sparsegpt" or self.pattern is not None):
            why = "the weights of a group compete" if self.pattern is not None else "sparsegpt compares runs of 128 columns"
            raise ValueError(f"compare says nothing here: {why}; leave it out")
        if self.damp is not None and self.criterion != "sparsegpt":
            raise ValueError(f"damp is for criterion sparsegpt; criterion is {self.criterion}")
        if self.tokens is not None and not self._reads_data:
            raise ValueError(f"tokens is for criteria that read data; criterion is {self.criterion}")
        if self.allocation != "uniform" and (self.pattern is not None or not self._reads_data):
            why = "a pattern is the same share everywhere" if self.pattern is not None else f"{self.criterion} reads no data"
            raise ValueError(f"allocation: {self.allocation} shares out zeros by data, with sparsegpt or wanda; {why}")
        if self.spread is not None and self.allocation == "uniform":
            raise ValueError("spread is for allocation: loss and owl; allocation is uniform")
        if self.seed is not None and self.criterion == "magnitude":
            raise ValueError("seed says nothing for criterion magnitude, which draws nothing; leave it out")
        return self

    @property
    def _reads_data(self) -> bool:
        return self.criterion in ("sparsegpt", "wanda")

    def observers(self, structure: Structure) -> Mapping[str, Observer]:
        """Second moments of the inputs or their diagonals, and tokens of mixtures."""
        if not self._reads_data:
            return {}
        kind = SecondMoment if self.criterion == "sparsegpt" else Energy
        found: dict[str, Observer] = {site.part.input.name: kind(site.part.input) for site in self._linears(structure)}
        for moe in structure.moes():
            found[moe.name] = Sample(*moe.part.routed, limit=self.tokens or 16384, seed=self.seed or 0)
        return found

    def survey(self, structure: Structure) -> Mapping[str, Observer]:
        """For an allocation: sums of squares around each linear, and tokens of mixtures; for ``loss`` with derivatives."""
        if self.allocation == "uniform":
            return {}
        metric: Metric = "model" if self.allocation == "loss" else "site"
        return squares_of([*self._linears(structure), *structure.moes()], metric, self.seed or 0)

    def plan_whole(self, graph: Graph, structure: Structure, statistics: Statistics) -> SparsifyPlan:
        """List the sites, and share the zeros out among them."""
        plan = self.plan(graph, structure, statistics)
        if not plan.decisions:
            return plan
        assert self.sparsity is not None
        parts = _parts(structure)
        sites = {decision.site: parts[decision.site] for decision in plan.decisions}
        notes: list[str] = []
        if self.allocation == "loss":
            shares, notes = by_loss(
                graph, sites, statistics, _by_squares, lambda share: self._zeros(share, None),
                average=self.sparsity, spread=0.15 if self.spread is None else self.spread,
            )  # fmt: skip
        else:
            everything: list[Site[Any]] = [*self._linears(structure), *structure.moes()]
            blocks = {site.name: str(site.block) for site in everything}
            shares = by_outliers(
                graph, sites, blocks, statistics, average=self.sparsity, spread=0.08 if self.spread is None else self.spread
            )
        decisions = []
        for decision in plan.decisions:
            share = shares[decision.site]
            reached, _ = _reached(graph, sites[decision.site], self._zeros(share.sparsity, None))
            decisions.append(decision.model_copy(update={**vars(share), "reached": reached}))
        return plan.model_copy(update={"decisions": tuple(decisions), "notes": (*plan.notes, *notes)})

    def plan(self, graph: Graph, structure: Structure, statistics: Statistics) -> SparsifyPlan:
        """List the sites, with the share of zeros that each has in the end."""
        decisions, notes = [], []
        zeros = self._zeros(self.sparsity, self.pattern)
        shared = read_in_several_blocks(graph, structure) if self._reads_data else set()
        tables = {memory(graph.tensor(site.part.weight)) for site in structure.embeddings}
        sites: list[Site[Any]] = [*self._linears(structure), *structure.moes()]
        for site in sites:
            weights = [graph.tensor(name) for name in names_of(site.part)]
            if not all(weight.is_floating_point() for weight in weights):
                raise PlanError(f"{site.name}: its weight is quantized already; put sparsify before quantize")
            reason = _misfit(graph, site.part, zeros)
            if any(memory(weight) in tables for weight in weights):
                reason = "tied to an embedding table, whose rows are looked up too"
            if any(memory(weight) in shared for weight in weights):
                reason = "other blocks read its weight too, on inputs of their own (criterion: magnitude needs no inputs)"
            if reason is not None:
                notes.append(f"{site.name}: {LEFT}: {reason}")
                continue
            fitted = self._reads_data and _tokens(statistics, site) > 0
            if self._reads_data and not fitted:
                notes.append(f"{site.name}: calibration data never reached it (no unmasked token); zeros by magnitude")
            reached, count = _reached(graph, site.part, zeros)
            decisions.append(
                ZeroWeights(
                    site=site.name,
                    sparsity=self.sparsity,
                    pattern=self.pattern,
                    reached=reached,
                    weights=count,
                    fitted=fitted,
                )
            )
        return SparsifyPlan(decisions=tuple(decisions), notes=tuple(notes))

    def accept(self, plan: SparsifyPlan) -> None:
        """Refuse what finds nothing but sites that it has to leave alone."""
        refuse_all_left(plan, "no weight can be made sparse")

    def check(self, graph: Graph, structure: Structure, plan: SparsifyPlan) -> None:
        """Every site exists, its pattern fits its rows, and the zeros are as many as the plan says."""
        known = _parts(structure)
        asked: dict[Key, ZeroWeights] = {}
        for decision in plan.decisions:
            if decision.site not in known:
                raise PlanError(f"the plan makes {decision.site} sparse, which this model does not have")
            if (decision.sparsity is None) == (decision.pattern is None):
                raise PlanError(f"{decision.site}: needed is either sparsity or pattern; found {decision}")
            if decision.fitted and not self._reads_data:
                raise PlanError(
                    f"{decision.site}: the plan says fitted, which is for sparsegpt and wanda; criterion is {self.criterion}"
                )
            try:
                zeros = self._zeros(decision.sparsity, decision.pattern)
            except ValueError as error:
                raise PlanError(f"{decision.site}: {error}") from error
            part = known[decision.site]
            if reason := _misfit(graph, part, zeros):
                raise PlanError(f"{decision.site}: {reason}")
            found = _reached(graph, part, zeros)
            if found[1] != decision.weights or abs(found[0] - decision.reached) > _SLACK:
                raise PlanError(
                    f"{decision.site}: {_asked(decision)} makes the share {found[0]} of {found[1]} weights zero; the plan says "
                    f"reached: {decision.reached} of weights: {decision.weights}. Where that is what was asked for, write "
                    f"reached: {round(found[0], 4)}, weights: {found[1]}"
                )
            for name in names_of(part):
                other = asked.setdefault(memory(graph.tensor(name)), decision)
                if _asked(other) != _asked(decision):
                    raise PlanError(
                        f"{decision.site} reads the weight of {other.site}, so both need the same: found "
                        f"{_asked(decision)} and {_asked(other)}"
                    )

    def apply(self, editor: Editor, structure: Structure, plan: SparsifyPlan, statistics: Statistics) -> None:
        """Replace weights by sparse ones; one that several sites read is made so once, for all that it is multiplied with."""
        parts = _parts(structure)
        fitted = [parts[decision.site] for decision in plan.decisions if decision.fitted]
        sums = totals(editor.graph, (part for part in fitted if isinstance(part, Linear)), statistics)
        done: set[Key] = set()
        for decision in plan.decisions:
            part = parts[decision.site]
            zeros = self._zeros(decision.sparsity, decision.pattern)
            try:
                if isinstance(part, MoE):
                    self._experts(editor, decision, part, zeros, statistics, done)
                else:
                    self._linear(editor, part, zeros, sums, done)
            except NumericsError as error:
                raise PlanError(f"{decision.site}: {error}") from error

    def _linear(
        self, editor: Editor, part: Linear, zeros: Zeros, sums: Mapping[Key, Tensor], done: set[Key]
    ) -> None:
        key = memory(editor.tensor(part.weight))
        if key in done:
            return
        weight = editor.graph.placed(editor.tensor(part.weight).detach())
        matrix = weight.T if part.transposed else weight
        moments = None if key not in sums else sums[key].to(matrix.device)
        sparse = self._sparse(part.weight, matrix, moments, zeros)
        done.add(_store(editor, part.weight, sparse.T if part.transposed else sparse))

    def _experts(
        self,
        editor: Editor,
        decision: ZeroWeights,
        part: MoE,
        zeros: Zeros,
        statistics: Statistics,
        done: set[Key],
    ) -> None:
        if memory(editor.tensor(part.w_in)) in done:
            return
        stack = editor.graph.placed(ExpertStack.of(editor.graph, part))
        if not decision.fitted:
            made = [self._sparse(part.w_in, stack.w_in, None, zeros), self._sparse(part.w_out, stack.w_out, None, zeros)]
        else:
            sample = statistics[decision.site]
            assert isinstance(sample, Sample)
            x, index, weight = editor.graph.placed(sample.values())
            if self.criterion == "wanda":
                read, inner = energies(stack, x, index, weight)
                made = [
                    self._sparse(part.w_in, stack.w_in, read, zeros),
                    self._sparse(part.w_out, stack.w_out, inner, zeros),
                ]
            else:
                some = [
                    (
                        self._sparse(part.w_in, stack.w_in[few], read, zeros),
                        self._sparse(part.w_out, stack.w_out[few], inner, zeros),
                    )
                    for few, read, inner in moments_of_some(stack, x, index, weight)
                ]
                made = [torch.cat(side) for side in zip(*some, strict=True)]
        for name, sparse in zip((part.w_in, part.w_out), made, strict=True):
            done.add(_store(editor, name, sparse))

    def _sparse(self, name: str, weight: Tensor, sums: Tensor | None, zeros: Zeros) -> Tensor:
        """A weight [..., out, in] with zeros.

        Args:
            name: what it is read under, for the lot.
            weight: the weight.
            sums: second moments of its inputs [..., in, in], or their diagonals [..., in]; None: there is no data.
            zeros: how many.
        """
        if sums is not None and self.criterion == "sparsegpt":
            return sparsify_compensated(weight, sums, zeros, damp=0.01 if self.damp is None else self.damp)
        if self.criterion == "random":
            score = torch.rand(weight.shape, generator=lot(self.seed or 0, name)).to(weight.device)
            return weight.masked_fill(least(score, weight, zeros), 0)
        return _by_squares(weight, sums, zeros)

    def exact(self, plan: SparsifyPlan) -> bool:
        """Zeros change the outputs."""
        return all(decision.sparsity == 0 for decision in plan.decisions)

    def parameter_delta(self, graph: Graph, structure: Structure, plan: SparsifyPlan) -> int:
        """Zeros are still stored."""
        return 0

    def summary(self, plan: SparsifyPlan) -> str:
        """How many sites, in what pattern, and the share of zeros."""
        total = sum(decision.weights for decision in plan.decisions)
        zeros = sum(decision.reached * decision.weights for decision in plan.decisions)
        patterns = ", ".join(dict.fromkeys(decision.pattern for decision in plan.decisions if decision.pattern))
        share = f": {100 * zeros / total:.1f} % of {total:,} weights are zero" if total else ""
        if self.allocation != "uniform" and plan.decisions:
            least, most = (100 * bound(each.reached for each in plan.decisions) for bound in (min, max))
            share += f", {least:.0f} to {most:.0f} % of each"
        return f"{len(plan.decisions)} sites{f' {patterns}' if patterns else ''} ({self.criterion}){share}"

    def _zeros(self, sparsity: float | None, pattern: str | None) -> Zeros:
        if pattern is not None:
            return Zeros.semi_structured(*_read(pattern))
        compare = self.compare or ("row" if self.criterion == "wanda" else "matrix")
        return Zeros(sparsity or 0.0, rows=compare == "row")

    def _linears(self, structure: Structure) -> Iterator[Site[Linear]]:
        """Linears inside the blocks except routers and gates of shared experts; with ``names:`` whatever matches."""
        for site in self.linears(structure):
            if self.names is not None or (site.block is not None and not site.name.endswith(".shared_gate")):
                yield site


def _by_squares(weight: Tensor, sums: Tensor | None, zeros: Zeros) -> Tensor:
    """A weight [..., out, in] whose least go, each times the norm of what it is multiplied with.

    Args:
        weight: the weight.
        sums: sums of squares of its inputs [..., in]; None: they count alike.
        zeros: how many.
    """
    score = weight.abs().to(torch.promote_types(weight.dtype, torch.float32))
    if sums is not None:
        # an expert that no token reached has no data to go by
        norms = sums.sqrt().masked_fill(sums.sum(-1, keepdim=True) == 0, 1.0)
        score = score * norms.unsqueeze(-2).to(score.dtype)
    return weight.masked_fill(least(score, weight, zeros), 0)


def _read(pattern: str) -> tuple[int, int]:
    """The numbers of a pattern n:m."""
    match = re.fullmatch(r"(\d+):(\d+)", pattern)
    kept, of = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 0 < kept < of <= 128:
        raise ValueError(f'pattern {pattern!r} is not "n:m" with 0 < n < m <= 128, such as "2:4"')
    return kept, of


def _asked(decision: ZeroWeights) -> str:
    return f"sparsity {decision.sparsity}" if decision.pattern is None else f"pattern {decision.pattern}"


def _tokens(statistics: Statistics, site: Site[Any]) -> int:
    """Tokens that reached a site: a survey has it under its own name, a linear in a block is under that of its input."""
    observer = statistics.get(site.name) or statistics[site.part.input.name]
    assert isinstance(observer, SecondMoment | Energy | Sample | Squares)
    return observer.tokens


def _matrices(graph: Graph, part: _Part) -> Iterator[Tensor]:
    """The weights of a site, [..., out, in]."""
    for name in names_of(part):
        weight = graph.tensor(name).detach()
        yield weight.T if isinstance(part, Linear) and part.transposed else weight


def _misfit(graph: Graph, part: _Part, zeros: Zeros) -> str | None:
    """Why the rows of a site cannot have a pattern."""
    for matrix in _matrices(graph, part):
        if zeros.of is not None and matrix.shape[-1] % zeros.of:
            return f"rows of {matrix.shape[-1]} weights are no whole number of groups of {zeros.of}"
    return None


def _reached(graph: Graph, part: _Part, zeros: Zeros) -> tuple[float, int]:
    """The share of zeros that a site has in the end, and of how many weights."""
    matrices = list(_matrices(graph, part))
    count = sum(matrix.numel() for matrix in matrices)
    return sum(map(zeros.reached, matrices)) / count, count


def _parts(structure: Structure) -> dict[str, _Part]:
    everything = structure.select(Selection())
    parts: dict[str, _Part] = {site.name: site.part for site in everything.linears}
    return parts | {site.name: site.part for site in everything.moes()}


def _store(editor: Editor, name: str, weight: Tensor) -> Key:
    """Put a weight wherever the memory of ``name`` is read, under whatever name and view; the new one's memory."""
    old = editor.tensor(name)
    readers = {str(node.target) for node in stored_reads(editor.graph)[memory(old)]}
    fresh = torch.empty_like(old.detach()).copy_(weight)
    for reader in readers:
        seen = editor.tensor(reader)
        same = (seen.shape, seen.stride()) == (old.shape, old.stride())
        editor.set_tensor(reader, fresh if same else fresh.as_strided(seen.shape, seen.stride()))
    return memory(editor.tensor(name))
