"""Store weights in 8 or 4 bits, or in 8-bit floats, and optionally multiply in 8-bit integers.

Paper:
    Round-to-nearest baseline as in GPTQ (Frantar et al. 2022, arXiv:2210.17323) and LLM.int8 (Dettmers et al. 2022,
    arXiv:2208.07339); dynamic activation quantization as ONNX's DynamicQuantizeLinear.
Formula:
    ``w ~ (q - z) s`` per group of inputs, q = clamp(round(w / s) + z); symmetric: z = 2^(bits-1).
    ``int8_dynamic``: weights per output row; each activation tensor x is rounded at run time to
    ``(q_x - z_x) s_x``, s_x = (max(x, 0) - min(x, 0)) / 255, one scale for the whole tensor.
    ``fp8``: ``w ~ q s`` with q an 8-bit float (e4m3), s = max |w| / 448 per output row (Micikevicius et al. 2022,
    arXiv:2209.05433).
Shapes:
    W: [out, in] (experts [E, out, in]); codes [out, groups, group * bits / 8] bytes; scales [out, groups].
Units:
    group: inputs per scale.
Reads:
    Nothing: round-to-nearest needs no data.
Changes:
    A weight becomes ``dequantize(codes, scales)``; for ``int8_dynamic`` the input passes through
    ``fake_quantize_dynamic``.
Errors:
    PlanError for groups that are not a multiple of 16 (codes must fill whole bytes) or quantized sites.
Example:
    ``- quantize: {scheme: int4, group: 32}`` or ``- quantize: {scheme: int8_dynamic, embeddings: true}``
"""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import fx

import surgeon.ops  # noqa: F401  # registers torch.ops.surgeon
from surgeon.accounting import Key, freed_parameter_count, memory, nodes_of
from surgeon.contract import Decision, Pass, Plan, Statistics
from surgeon.errors import PlanError
from surgeon.graph import Graph
from surgeon.numerics import quantize_float8, quantize_groupwise
from surgeon.rewrite import Editor
from surgeon.structure import Embedding, Linear, MoE, Selection, Structure

PER_ROW = -1

_Form = tuple[Key, int, int, bool]
"""A weight's memory, and bits, group and kind of its codes."""


class QuantizeWeight(Decision):
    """One site whose weight is quantized.

    Attributes:
        site: name of the linear, embedding or mixture.
        bits: bits per weight.
        group: inputs per scale, -1 for one scale per row.
        dynamic: the input is quantized to 8 bits at run time too.
        float8: codes are 8-bit floats.
    """

    bits: Literal[4, 8]
    group: int
    dynamic: bool = False
    float8: bool = False


class QuantizePlan(Plan[QuantizeWeight]):
    """The sites that are quantized."""


class Quantize(Pass[QuantizePlan]):
    """Quantize weights to 8 or 4 bits per group, to 8-bit floats, or to 8 bits with 8-bit activations."""

    name = "quantize"
    plan_type = QuantizePlan

    scheme: Literal["int8", "int4", "int8_dynamic", "fp8"]
    """int8 and int4: weights only; int8_dynamic: 8-bit weights per row and 8-bit activations, for integer kernels; fp8: 8-bit
    floats (e4m3), weights only."""
    group: Annotated[int, Field(ge=16)] | None = None
    """Inputs per scale, a multiple of 16; 32 by default. Linears of int8_dynamic have one scale per row instead, and so has
    every weight of fp8 unless a group is given."""
    symmetric: bool = True
    """One fixed zero point (True), or one per group (False), which is better for skewed weights."""
    embeddings: bool = False
    """Quantize embedding tables too (and heads tied to them), in groups along the row."""

    @model_validator(mode="after")
    def _group_fits(self) -> Quantize:
        if self.group is not None and self.group % 16:
            raise ValueError(f"group must be a multiple of 16, found {self.group}")
        if self.scheme == "fp8" and not self.symmetric:
            raise ValueError("8-bit floats have no zero point; leave out symmetric: false")
        return self

    def plan(self, graph: Graph, structure: Structure, statistics: Statistics) -> QuantizePlan:
        """List the sites; routers stay in floating point unless named."""
        bits: Literal[4, 8] = 4 if self.scheme == "int4" else 8
        dynamic = self.scheme == "int8_dynamic"
        float8 = self.scheme == "fp8"
        group = self.group or (PER_ROW if float8 else 32)
        decisions, notes = [], []
        tables = {memory(graph.tensor(site.part.weight)) for site in structure.embeddings}
        for site in structure.selected_linears():
            if self.names is None and site.name.endswith(".router"):
                continue
            weight = graph.tensor(site.part.weight)
            _refuse_quantized(site.name, weight)
            if memory(weight) in tables:
                done = "quantized with it" if self.embeddings else "left as it is (embeddings: true quantizes both)"
                notes.append(f"{site.name}: tied to an embedding table, {done}")
                continue
            decisions.append(
                QuantizeWeight(
                    site=site.name, bits=bits, group=PER_ROW if dynamic else group, dynamic=dynamic, float8=float8
                )
            )
        for moe in structure.moes():
            _refuse_quantized(moe.name, graph.tensor(moe.part.w_in))
            decisions.append(QuantizeWeight(site=moe.name, bits=bits, group=group, float8=float8))
        if self.embeddings:
            for table in structure.selected_embeddings():
                _refuse_quantized(table.name, graph.tensor(table.part.weight))
                decisions.append(QuantizeWeight(site=table.name, bits=bits, group=group, float8=float8))
        return QuantizePlan(decisions=tuple(decisions), notes=tuple(notes))

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

    def apply(self, editor: Editor, structure: Structure, plan: QuantizePlan, statistics: Statistics) -> None:
        """Replace weights by codes; weights that several sites share keep one set of codes."""
        parts = self._parts(structure)
        stored: dict[_Form, _Stored] = {}
        for decision in plan.decisions:
            part = parts[decision.site]
            if isinstance(part, Linear):
                self._linear(editor, part, decision, stored)
            elif isinstance(part, Embedding):
                self._table(editor, part, decision, stored)
            else:
                self._experts(editor, part, decision, stored)

    def _codes(
        self,
        editor: Editor,
        name: str,
        decision: QuantizeWeight,
        stored: dict[_Form, _Stored],
        transposed: bool = False,
    ) -> fx.Node:
        """Read the dequantized weight at the insertion point, quantizing it where that has not been done yet."""
        weight = editor.tensor(name).detach()
        key = (memory(weight), decision.bits, decision.group, decision.float8)
        if key in stored:
            have = stored[key]
            packed, scale = editor.read(have.packed), editor.read(have.scale)
            zeros = None if have.zero_point is None else editor.read(have.zero_point)
        else:
            matrix = weight.transpose(-1, -2) if transposed else weight
            group = matrix.shape[-1] if decision.group == PER_ROW else decision.group
            if decision.float8:
                codes = quantize_float8(matrix, group=group)
            else:
                codes = quantize_groupwise(matrix, bits=decision.bits, group=group, symmetric=self.symmetric)
            packed = editor.add_tensor(f"{name}_codes", codes.packed)
            scale = editor.add_tensor(f"{name}_scale", codes.scale)
            zeros = None if codes.zero_point is None else editor.add_tensor(f"{name}_zero_point", codes.zero_point)
            have = _Stored(
                str(packed.target), str(scale.target), None if zeros is None else str(zeros.target), group, codes.in_features
            )
            stored[key] = have
        return editor.call(
            torch.ops.surgeon.dequantize.default, packed, scale, zeros, decision.bits, have.group, have.in_features
        )

    def _linear(
        self, editor: Editor, part: Linear, decision: QuantizeWeight, stored: dict[_Form, _Stored]
    ) -> None:
        with editor.before(part.node):
            x = editor.current(part.input)
            if decision.dynamic:
                operator = torch.ops.surgeon.fake_quantize_dynamic.default
                shared = [user for user in x.users if user.target is operator]
                x = shared[0] if shared else editor.call(operator, x)
            weight = self._codes(editor, part.weight, decision, stored, part.transposed)
            bias = (editor.read(part.bias),) if part.bias is not None else ()
            new = editor.call(torch.ops.aten.linear.default, x, weight, *bias)
        editor.replace(part.node, new)

    def _table(
        self, editor: Editor, part: Embedding, decision: QuantizeWeight, stored: dict[_Form, _Stored]
    ) -> None:
        """Every reader of the table, a tied head among them, reads one set of codes."""
        table = memory(editor.tensor(part.weight))
        graph = editor.graph
        for node in list(graph.module.graph.nodes):
            if node.op == "get_attr" and node.users and memory(graph.tensor(str(node.target))) == table:
                with editor.before(node):
                    weight = self._codes(editor, part.weight, decision, stored)
                editor.replace(node, weight)

    def _experts(
        self, editor: Editor, part: MoE, decision: QuantizeWeight, stored: dict[_Form, _Stored]
    ) -> None:
        for name in (part.w_in, part.w_out):
            readers = [node for node in part.node.all_input_nodes if node.op == "get_attr" and node.target == name]
            with editor.before(part.node):
                weight = self._codes(editor, name, decision, stored)
            for node in readers:
                part.node.replace_input_with(node, weight)

    def exact(self, plan: QuantizePlan) -> bool:
        """Rounding loses something."""
        return not plan.decisions

    def parameter_delta(self, graph: Graph, structure: Structure, plan: QuantizePlan) -> int:
        """Codes stand for as many weights as before, except where a tied weight now exists in two forms."""
        known = self._parts(structure)
        parts = [known[decision.site] for decision in plan.decisions]
        products = [part for part in parts if not isinstance(part, Embedding)]
        names = {
            name for part in products for name in ((part.weight,) if isinstance(part, Linear) else (part.w_in, part.w_out))
        }
        distinct = {memory(graph.tensor(name)): graph.tensor(name).numel() for name in names}
        readers = nodes_of(part for part in products if isinstance(part, Linear))
        readers |= {part.node for part in products}
        return sum(distinct.values()) - freed_parameter_count(graph, readers, names)

    def summary(self, plan: QuantizePlan) -> str:
        """Scheme and number of sites."""
        return f"{len(plan.decisions)} weights in {self.scheme}"

    @staticmethod
    def _parts(structure: Structure) -> dict[str, Linear | Embedding | MoE]:
        everything = structure.select(Selection())
        parts: dict[str, Linear | Embedding | MoE] = {site.name: site.part for site in everything.linears}
        parts |= {site.name: site.part for site in everything.embeddings}
        parts |= {site.name: site.part for site in everything.moes()}
        return parts


class _Stored(NamedTuple):
    """Names under which the codes of one weight are read."""

    packed: str
    scale: str
    zero_point: str | None
    group: int
    in_features: int


def _refuse_quantized(site: str, weight: torch.Tensor) -> None:
    if not weight.is_floating_point():
        raise PlanError(f"{site}: its weight is quantized already; a recipe quantizes each weight once")

