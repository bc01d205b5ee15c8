"""Store weights in 8, 4 or 2 bits, in bits chosen per weight, or in 8-bit floats; optionally multiply in 8-bit integers.

Paper:
    ``nearest`` as in LLM.int8 (Dettmers et al. 2022, arXiv:2208.07339); ``gptq`` (Frantar et al. 2022, arXiv:2210.17323);
    the search for scales as AWQ's for clipping (Lin et al. 2023, arXiv:2306.00978); dynamic activation quantization as
    ONNX's DynamicQuantizeLinear; ``mixed`` as HAWQ-V2 (Dong et al. 2020, arXiv:1911.03852), and PMQ for mixtures (Huang et al.
    2024, arXiv:2410.06270).
Formula:
    ``w ~ (q - z) s`` per group of inputs, q = clamp(round(w / s) + z); symmetric: z = 2^(bits-1).
    ``int8_dynamic``: weights per output row; each activation tensor x is rounded at run time to
    ``(q_x - z_x) s_x``, s_x = (max(x, 0) - min(x, 0)) / 255, one scale for the whole tensor.
    ``fp8``: ``w ~ q s`` with q an 8-bit float (e4m3), s = max |w| / 448 per output row (Micikevicius et al. 2022,
    arXiv:2209.05433).
    ``gptq``: with ``C = sum_t x_t x_t^T``, inputs are rounded from the largest C_jj to the smallest, and the error of each
    is made up for by those that are left, so that ``||(W - Q) X||`` becomes small.  An expert's C counts its own tokens, by
    the square of their weights.
    ``mixed``: bits b_i of each weight i, of n_i codes, with ``sum_i n_i b_i <= bits sum_i n_i`` so that ``sum_i error_i(b_i)``
    is least; error: the second-order estimate of what the loss rises by (``surgeon/sensitivity.py``).
Shapes:
    W: [out, in] (experts [E, out, in]); codes [out, groups, group * bits / 8] bytes; scales [out, groups].
Units:
    group: inputs per scale.
Reads:
    ``nearest``: nothing.  ``gptq``: the input of each linear and mixture, on the already-changed model, block by block;
    8 in^2 bytes for each input, and ``tokens`` rows for each mixture.  ``mixed``: before that, once, on the model as it is,
    8 (in + out) bytes for each linear and 2048 tokens of each mixture, and unless ``metric: site``, gradients, which hold the
    activations of one batch.
Changes:
    A weight becomes ``dequantize(codes, scales)``; for ``int8_dynamic`` the input passes through
    ``fake_quantize_dynamic``.
Errors:
    PlanError for groups that are not a multiple of 16 (codes must fill whole bytes), or quantized sites.
Example:
    ``- quantize: {scheme: int4, algorithm: gptq, group: 128}`` or ``- quantize: {scheme: int8_dynamic, embeddings: true}`` or
    ``- quantize: {scheme: mixed, bits: 3, of: [2, 4, 8], algorithm: gptq}``
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import fx

from surgeon.accounting import Key, freed_parameter_count, memory, nodes_of
from surgeon.bit_budget import choices_of, share_out
from surgeon.codes import CodedWeights, read_in_several_blocks
from surgeon.contract import Decision, Observer, Pass, Plan, Seed, Statistics
from surgeon.errors import PlanError
from surgeon.expert_codes import quantize_experts
from surgeon.expert_stack import ExpertStack
from surgeon.graph import Graph
from surgeon.moments import SecondMoment, totals
from surgeon.numerics import (
    SEARCH,
    WHOLE_RANGE,
    WIDE_SEARCH,
    Levels,
    NumericsError,
    QuantizedTensor,
    fitting_group,
    quantize_compensated,
    quantize_float8,
    quantize_groupwise,
)
from surgeon.rewrite import Editor
from surgeon.samples import Sample
from surgeon.sensitivity import Metric, Squares, squares_of
from surgeon.structure import Embedding, Linear, MoE, Selection, Structure

PER_ROW = -1

_Part = Linear | Embedding | MoE

_SHARED = "other blocks read its weight too, on inputs of their own; left as it is (algorithm: nearest quantizes it)"


class QuantizeWeight(Decision):
    """One site whose weight is quantized.

    Attributes:
        site: name of the linear, embedding or mixture.
        bits: bits per weight.
        group: inputs per scale, -1 for one scale per row.
        dynamic: the input is quantized to 8 bits at run time too.
        float8: codes are 8-bit floats.
        compensated: the errors of inputs that are rounded are made up for by those that are not yet, on calibration data.
        codes: of ``mixed``: numbers that are stored at so many bits; 0 where another site's codes are read.
        errors: of ``mixed``: what each number of bits was estimated to cost, for who edits the plan.
    """

    bits: Literal[2, 4, 8]
    group: int
    dynamic: bool = False
    float8: bool = False
    compensated: bool = False
    codes: int | None = None
    errors: dict[int, float] | None = None


class QuantizePlan(Plan[QuantizeWeight]):
    """The sites that are quantized."""


class Quantize(Pass[QuantizePlan]):
    """Quantize weights to 8, 4 or 2 bits per group, to 8-bit floats, or to 8 bits with 8-bit activations."""

    name = "quantize"
    scope: ClassVar[Literal["model", "block"]] = "block"
    plan_type = QuantizePlan
    apply_reads_statistics = True
    heals = False

    scheme: Literal["int8", "int4", "int2", "mixed", "int8_dynamic", "fp8"]
    """int8, int4 and int2: weights only; mixed: likewise, each weight in bits that are chosen for it; int8_dynamic: 8-bit
    weights per row and 8-bit activations, for integer kernels; fp8: 8-bit floats (e4m3), weights only."""
    group: Annotated[int, Field(ge=16)] | None = None
    """Inputs per scale, a multiple of 16; 32 by default, and halved where half of it holds a whole row. Linears of
    int8_dynamic have one scale per row instead, and so has every weight of fp8 unless a group is given."""
    symmetric: bool = True
    """One fixed zero point (True), or one per group (False), which is better for skewed weights."""
    bits: float | None = None
    """For mixed: bits per weight on average over all weights that are quantized; scales and zero points come on top, as many
    bytes as they are at any one number of bits."""
    of: Annotated[list[Literal[2, 4, 8]], Field(min_length=2)] | None = None
    """For mixed: the bits to choose from; 2, 4 and 8 by default."""
    metric: Metric | None = None
    """For mixed: what errors are measured by. model (the default): what they do to the model, the rise of the next-token loss
    or, of other models, the change of the outputs, to second order; site: the share of its own output that each site loses,
    which says less, but needs no run backward."""
    embeddings: bool = False
    """Quantize embedding tables too (and heads tied to them), in groups along the row, to the nearest."""
    algorithm: Literal["nearest", "gptq"] = "nearest"
    """nearest needs no data; gptq lets the weights that are not rounded yet make up for the error of those that are, on
    calibration data: 0.6 to 0.7 of the loss of quality at 4 bits."""
    scales: Literal["range", "search"] | None = None
    """range: a scale covers every weight of its group; search: it may clip the largest ones where that makes the error
    smaller (for gptq the default, of inputs as large as they are)."""
    damp: Annotated[float, Field(gt=0, le=1)] | None = None
    """For gptq: what is added to the diagonal of the inputs' second moments, as a share of its mean; 0.01 by default."""
    tokens: Annotated[int, Field(ge=32)] | None = None
    """For gptq: calibration tokens that are kept for each mixture of experts; 16384 by default."""
    seed: Seed | None = None
    """For gptq and mixed: seed of the samples of tokens; 0 by default."""

    @model_validator(mode="after")
    def _group_fits(self) -> Quantize:
        if self.group is not None and self.group % 16:
            raise ValueError(f"group must be a multiple of 16, found {self.group}")
        if self.scheme == "fp8" and not self.symmetric:
            raise ValueError("8-bit floats have no zero point; leave out symmetric: false")
        if self.scheme == "fp8" and self.scales == "search":
            raise ValueError("8-bit floats lose nothing by a scale that covers all weights; leave out scales: search")
        if self.scheme == "mixed":
            choices_of(self.bits, self.of)
        for field in ("bits", "of", "metric"):
            if getattr(self, field) is not None and self.scheme != "mixed":
                raise ValueError(f"{field} is for scheme mixed; scheme is {self.scheme}")
        for field in ("damp", "tokens", *(() if self.scheme == "mixed" else ("seed",))):
            if getattr(self, field) is not None and self.algorithm != "gptq":
                raise ValueError(f"{field} is for algorithm gptq; algorithm is {self.algorithm}")
        return self

    def _shrink(self, bits: int) -> Sequence[float]:
        searched = self.scales == "search" or (self.scales is None and self.algorithm == "gptq")
        if not searched or self.scheme == "fp8":
            return WHOLE_RANGE
        return WIDE_SEARCH if bits == 2 and self.algorithm == "nearest" else SEARCH

    @property
    def _metric(self) -> Metric:
        return self.metric or "model"

    @property
    def _damping(self) -> float:
        return 0.01 if self.damp is None else self.damp

    def observers(self, structure: Structure) -> Mapping[str, Observer]:
        """For gptq: second moments of the inputs, shared by linears that read the same value, and tokens of mixtures."""
        if self.algorithm != "gptq":
            return {}
        found: dict[str, Observer] = {
            site.part.input.name: SecondMoment(site.part.input) for site in self.linears(structure)
        }
        for moe in structure.moes():
            found[moe.name] = Sample(*moe.part.routed, limit=self.tokens or 16384, seed=self.seed or 0)
        return found

    def survey(self, structure: Structure) -> Mapping[str, Observer]:
        """For mixed: sums of squares around each linear and table, and tokens of mixtures."""
        if self.scheme != "mixed":
            return {}
        tables = structure.selected_embeddings() if self.embeddings else ()
        return squares_of([*self.linears(structure), *structure.moes(), *tables], self._metric, self.seed or 0)

    def plan_whole(self, graph: Graph, structure: Structure, statistics: Statistics) -> QuantizePlan:
        """For mixed: list the sites and share out the bits."""
        plan = self.plan(graph, structure, statistics)
        parts = self._parts(structure)
        sites = {decision.site: parts[decision.site] for decision in plan.decisions}
        tables = {memory(graph.tensor(part.weight)) for part in sites.values() if isinstance(part, Embedding)}
        tied = {site.name: site.part for site in self.linears(structure) if memory(graph.tensor(site.part.weight)) in tables}
        group = self.group or 32

        def rounded(matrix: torch.Tensor, bits: int) -> QuantizedTensor:
            decision = QuantizeWeight(site="", bits=bits, group=group)
            return self._quantized(matrix, decision, None)

        choices = choices_of(self.bits, self.of)
        assert self.bits is not None
        shares, notes = share_out(
            graph, {**sites, **tied}, statistics, rounded, choices=choices, average=self.bits, metric=self._metric
        )
        decisions = tuple(each.model_copy(update=vars(shares[each.site])) for each in plan.decisions)
        return plan.model_copy(update={"decisions": decisions, "notes": (*plan.notes, *notes)})

    def plan(self, graph: Graph, structure: Structure, statistics: Statistics) -> QuantizePlan:
        """List the sites."""
        return self._listed(graph, structure, statistics)

    def _listed(self, graph: Graph, structure: Structure, statistics: Statistics | None) -> QuantizePlan:
        """The sites; without statistics none is fitted to data."""
        widths: dict[str, Literal[2, 4, 8]] = {"int4": 4, "int2": 2}
        bits = widths.get(self.scheme, 8)
        dynamic = self.scheme == "int8_dynamic"
        float8 = self.scheme == "fp8"
        group = self.group or (PER_ROW if float8 else 32)
        decisions, notes = [], []
        tables = {memory(graph.tensor(site.part.weight)) for site in structure.embeddings}
        shared = read_in_several_blocks(graph, structure) if self.algorithm == "gptq" else set()
        for site in self.linears(structure):
            weight = graph.tensor(site.part.weight)
            _refuse_quantized(site.name, weight)
            if memory(weight) in tables:
                done = "quantized with it" if self.embeddings else "left as it is (embeddings: true quantizes both)"
                notes.append(f"{site.name}: tied to an embedding table, {done}")
                continue
            if memory(weight) in shared:
                notes.append(f"{site.name}: {_SHARED}")
                continue
            decisions.append(
                QuantizeWeight(
                    site=site.name,
                    bits=bits,
                    group=PER_ROW if dynamic else group,
                    dynamic=dynamic,
                    float8=float8,
                    compensated=self._reached(site.name, site.part.input.name, statistics, notes),
                )
            )
        for moe in structure.moes():
            _refuse_quantized(moe.name, graph.tensor(moe.part.w_in))
            if memory(graph.tensor(moe.part.w_in)) in shared:
                notes.append(f"{moe.name}: {_SHARED}")
                continue
            compensated = self._reached(moe.name, moe.name, statistics, notes)
            decisions.append(
                QuantizeWeight(site=moe.name, bits=bits, group=group, float8=float8, compensated=compensated)
            )
        if self.embeddings:
            for table in structure.selected_embeddings():
                weight = graph.tensor(table.part.weight)
                _refuse_quantized(table.name, weight)
                if self.names is None and not isinstance(weight, torch.nn.Parameter):
                    notes.append(
                        f"{table.name}: {table.part.weight} is a fixed table, not learned; left as it is unless names has it"
                    )
                    continue
                decisions.append(QuantizeWeight(site=table.name, bits=bits, group=group, float8=float8))
        return QuantizePlan(decisions=tuple(decisions), notes=tuple(notes))

    def _reached(self, site: str, key: str, statistics: Statistics | None, notes: list[str]) -> bool:
        """Whether a site is fitted to data: calibration data reached it."""
        if self.algorithm != "gptq" or statistics is None:
            return False
        observer = statistics[site if self.scheme == "mixed" else key]
        assert isinstance(observer, SecondMoment | Sample | Squares)
        if observer.tokens == 0:
            notes.append(f"{site}: calibration data never reached it (no unmasked token); rounded to the nearest")
        return observer.tokens > 0

    def check(self, graph: Graph, structure: Structure, plan: QuantizePlan) -> None:
        """Every site exists and its group is possible."""
        known = self._parts(structure)
        for decision in plan.decisions:
            if decision.site not in known:
                raise PlanError(f"the plan quantizes {decision.site}, which this model does not have")
            if decision.group != PER_ROW and (decision.group < 16 or decision.group % 16):
                raise PlanError(f"{decision.site}: group {decision.group} must be a multiple of 16, or -1 for whole rows")
            if decision.float8 and (decision.bits != 8 or decision.dynamic):
                raise PlanError(f"{decision.site}: float8 has 8 bits and inputs as they are; found {decision}")
            if decision.dynamic and not isinstance(known[decision.site], Linear):
                raise PlanError(f"{decision.site}: only linears can quantize their input; set dynamic to false")
            if decision.compensated and (self.algorithm != "gptq" or isinstance(known[decision.site], Embedding)):
                raise PlanError(
                    f"{decision.site}: the plan says compensated, which is for linears and experts with algorithm gptq"
                )

    def apply(self, editor: Editor, structure: Structure, plan: QuantizePlan, statistics: Statistics) -> None:
        """Replace weights by codes; weights that several sites share keep one set of codes."""
        self._store(editor, structure, plan, statistics, CodedWeights(editor))

    def rehearse(self, editor: Editor, structure: Structure, plan: QuantizePlan | None) -> None:
        """The same codes without their numbers; of ``mixed`` one weight in the fewest bits where some weight must have them."""
        known = plan is not None
        if plan is None:
            plan = self._listed(editor.graph, structure, None)
        decisions = [decision.model_copy(update={"compensated": False}) for decision in plan.decisions]
        if self.scheme == "mixed" and not known:
            fewest, following, *_ = sorted(choices_of(self.bits, self.of))
            assert self.bits is not None
            if self.bits >= following:
                return
            sizes = {name: _weights(editor.graph, part) for name, part in self._parts(structure).items()}
            largest = max(decisions, key=lambda decision: sizes[decision.site], default=None)
            decisions = [] if largest is None else [largest.model_copy(update={"bits": fewest})]
        rehearsed = QuantizePlan(decisions=tuple(decisions))
        self.check(editor.graph, structure, rehearsed)
        self._store(editor, structure, rehearsed, {}, CodedWeights(editor, hollow=True))

    def _store(
        self, editor: Editor, structure: Structure, plan: QuantizePlan, statistics: Statistics, coded: CodedWeights
    ) -> None:
        parts = self._parts(structure)
        compensated = (parts[decision.site] for decision in plan.decisions if decision.compensated)
        moments = totals(editor.graph, (part for part in compensated if isinstance(part, Linear)), statistics)
        for decision in plan.decisions:
            part = parts[decision.site]
            try:
                if isinstance(part, Linear):
                    self._linear(editor, part, decision, coded, moments)
                elif isinstance(part, Embedding):
                    self._table(editor, part, decision, coded)
                else:
                    self._experts(editor, part, decision, coded, statistics)
            except NumericsError as error:
                raise PlanError(f"{decision.site}: {error}") from error

    def _codes(
        self,
        name: str,
        decision: QuantizeWeight,
        coded: CodedWeights,
        transposed: bool = False,
        moment: torch.Tensor | None = None,
        made: QuantizedTensor | None = None,
    ) -> fx.Node:
        """Read the dequantized weight at the insertion point, quantizing it where that has not been done yet."""

        def make(weight: torch.Tensor) -> QuantizedTensor:
            matrix = weight.transpose(-1, -2) if transposed else weight
            if coded.hollow:
                levels, columns = self._levels(decision), matrix.shape[-1]
                group = levels.group(name, fitting_group(decision.group, columns), columns)
                return QuantizedTensor.empty(matrix, levels, group)
            return made or self._quantized(matrix, decision, moment)

        return coded.read(name, (decision.bits, decision.group, decision.float8), make)

    def _quantized(
        self, matrix: torch.Tensor, decision: QuantizeWeight, moment: torch.Tensor | None
    ) -> QuantizedTensor:
        group = fitting_group(decision.group, matrix.shape[-1])
        if moment is not None:
            return quantize_compensated(
                matrix,
                moment.to(matrix.device),
                levels=self._levels(decision),
                group=group,
                damp=self._damping,
                shrink=self._shrink(decision.bits),
            )
        if decision.float8:
            return quantize_float8(matrix, group=group)
        return quantize_groupwise(
            matrix, bits=decision.bits, group=group, symmetric=self.symmetric, shrink=self._shrink(decision.bits)
        )

    def _levels(self, decision: QuantizeWeight) -> Levels:
        return Levels(decision.bits, self.symmetric, decision.float8)

    def _linear(
        self,
        editor: Editor,
        part: Linear,
        decision: QuantizeWeight,
        coded: CodedWeights,
        moments: Mapping[Key, torch.Tensor],
    ) -> None:
        moment = moments.get(memory(editor.tensor(part.weight)))
        with editor.before(part.node):
            x = editor.current(part.input)
            if decision.dynamic:
                operator = torch.ops.surgeon.fake_quantize_dynamic.default
                shared = [user for user in x.users if user.target is operator]
                x = shared[0] if shared else editor.call(operator, x)
            weight = self._codes(part.weight, decision, coded, part.transposed, moment)
            bias = (editor.read(part.bias),) if part.bias is not None else ()
            new = editor.call(torch.ops.aten.linear.default, x, weight, *bias)
        editor.replace(part.node, new)

    def _table(
        self, editor: Editor, part: Embedding, decision: QuantizeWeight, coded: CodedWeights
    ) -> None:
        """Every reader of the table, a tied head among them, reads one set of codes."""
        table = memory(editor.tensor(part.weight))
        graph = editor.graph
        for node in list(graph.module.graph.nodes):
            if node.op == "get_attr" and node.users and memory(graph.tensor(str(node.target))) == table:
                with editor.before(node):
                    weight = self._codes(part.weight, decision, coded)
                editor.replace(node, weight)

    def _experts(
        self,
        editor: Editor,
        part: MoE,
        decision: QuantizeWeight,
        coded: CodedWeights,
        statistics: Statistics,
    ) -> None:
        made: tuple[QuantizedTensor | None, QuantizedTensor | None] = (None, None)
        if decision.compensated:
            sample = statistics[decision.site]
            assert isinstance(sample, Sample)
            stack = editor.graph.placed(ExpertStack.of(editor.graph, part))
            widths = (stack.w_in.shape[2], stack.w_out.shape[2])
            made = quantize_experts(
                stack,
                *editor.graph.placed(sample.values()),
                levels=self._levels(decision),
                groups=(fitting_group(decision.group, widths[0]), fitting_group(decision.group, widths[1])),
                damp=self._damping,
                shrink=self._shrink(decision.bits),
            )
        for name, codes in zip((part.w_in, part.w_out), made, strict=True):
            readers = [node for node in part.node.all_input_nodes if node.op == "get_attr" and node.target == name]
            with editor.before(part.node):
                weight = self._codes(name, decision, coded, made=codes)
            for node in readers:
                part.node.replace_input_with(node, weight)

    def exact(self, plan: QuantizePlan) -> bool:
        """Rounding loses something."""
        return not plan.decisions

    def parameter_delta(self, graph: Graph, structure: Structure, plan: QuantizePlan) -> int:
        """Codes stand for as many weights as before; a tied weight in two forms and a fixed table count anew."""
        known = self._parts(structure)
        parts = [known[decision.site] for decision in plan.decisions]
        products = [part for part in parts if not isinstance(part, Embedding)]
        names = {
            name for part in products for name in ((part.weight,) if isinstance(part, Linear) else (part.w_in, part.w_out))
        }
        distinct = {memory(graph.tensor(name)): graph.tensor(name).numel() for name in names}
        readers = nodes_of(part for part in products if isinstance(part, Linear))
        readers |= {part.node for part in products}
        tables = {part.weight for part in parts if isinstance(part, Embedding)} - names
        fixed = {memory(t): t.numel() for t in map(graph.tensor, tables) if not isinstance(t, torch.nn.Parameter)}
        return sum(distinct.values()) - freed_parameter_count(graph, readers, names) + sum(fixed.values())

    def summary(self, plan: QuantizePlan) -> str:
        """Number of sites by scheme; an edited plan may give some of them another."""
        fitted = f" ({self.algorithm})" if self.algorithm != "nearest" else ""
        found = Counter(_scheme(decision, self.scheme) for decision in plan.decisions) or {self.scheme: 0}
        listed = ", ".join(f"{count} weights in {scheme}" for scheme, count in sorted(found.items()))
        codes = sum(decision.codes or 0 for decision in plan.decisions)
        spent = sum((decision.codes or 0) * decision.bits for decision in plan.decisions)
        return f"{listed}{f': {spent / codes:.2f} bits on average' if codes else ''}{fitted}"

    @staticmethod
    def _parts(structure: Structure) -> dict[str, _Part]:
        everything = structure.select(Selection())
        parts: dict[str, _Part] = {site.name: site.part for site in everything.linears}
        parts |= {site.name: site.part for site in everything.embeddings}
        parts |= {site.name: site.part for site in everything.moes()}
        return parts


def _scheme(decision: QuantizeWeight, scheme: str) -> str:
    if decision.float8:
        return "fp8"
    kind = f"int{decision.bits}{'_dynamic' if decision.dynamic else ''}"
    return scheme if scheme == f"{kind}_dynamic" else kind  # tables and experts of int8_dynamic keep their activations


def _weights(graph: Graph, part: _Part) -> int:
    names = (part.w_in, part.w_out) if isinstance(part, MoE) else (part.weight,)
    return sum(graph.tensor(name).numel() for name in names)


def _refuse_quantized(site: str, weight: torch.Tensor) -> None:
    if not weight.is_floating_point():
        raise PlanError(f"{site}: its weight is quantized already; a recipe quantizes each weight once")

