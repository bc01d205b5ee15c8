"""The data of an inspection: one view per kind of part, each able to describe itself in a line."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from rich.console import Console


class _View(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class ProjectionView(_View):
    """One linear."""

    name: str
    """Its role, e.g. ``q`` or ``up``, or its site name outside of the blocks."""
    weight: str
    """Name its weight is read under."""
    in_features: int
    """Input features."""
    out_features: int
    """Output features."""
    bias: bool
    """Whether it has a bias."""
    bits: int
    """Bits per weight as stored."""


class AttentionView(_View):
    """One attention; sizes as in ``surgeon.structure.Attention``."""

    kind: Literal["attention"] = "attention"
    heads: int
    kv_heads: int
    head_dim: int
    fused: bool
    """Query, key and value share one weight."""
    causal: bool | None
    cross: bool
    projections: list[ProjectionView]
    parameters: int
    """Weights of the projections."""

    def describe(self) -> str:
        """One line, e.g. ``32 heads x 128, 8 key/value, fused qkv, causal``."""
        text = [f"{self.heads} heads x {self.head_dim}"]
        text += [f"{self.kv_heads} key/value"] if self.kv_heads != self.heads else []
        text += ["fused qkv"] if self.fused else []
        text += ["causal"] if self.causal else []
        text += ["cross"] if self.cross else []
        return ", ".join(text) + _low_bits(self.projections)


class FFNView(_View):
    """One feed-forward network; sizes as in ``surgeon.structure.FFN``."""

    kind: Literal["ffn"] = "ffn"
    width: int
    gated: bool
    activation: str | None
    layout: str
    projections: list[ProjectionView]
    parameters: int
    """Weights of the projections."""

    def describe(self) -> str:
        """One line, e.g. ``384 > 1536 > 384, gated silu``."""
        first, last = self.projections[0], self.projections[-1]
        text = f"{first.in_features} > {self.width} > {last.out_features}, {'gated ' if self.gated else ''}"
        text += self.activation or "unknown activation"
        text += f", {self.layout}" if self.layout in ("concatenated", "interleaved") else ""
        return text + _low_bits(self.projections)


class MoEView(_View):
    """One mixture of experts; sizes as in ``surgeon.structure.MoE``."""

    kind: Literal["moe"] = "moe"
    experts: int
    top_k: int
    width: int
    gated: bool
    activation: str
    scoring: str
    normalised: bool
    scale: float
    selection_bias: str | None
    groups: int
    top_groups: int
    capacity: int | None
    input_scaled: bool
    masked: bool
    expert_scale: str | None
    router: ProjectionView | None
    shared: list[FFNView]
    shared_gate: ProjectionView | None
    bits: int
    parameters: int
    """Weights of router, experts, shared experts and their gate."""

    def describe(self) -> str:
        """One line, e.g. ``8 experts of 192, 2 per token, gated silu, softmax router``."""
        text = [
            f"{self.experts} experts of {self.width}",
            f"{self.top_k} per token" + (f" from {self.top_groups} of {self.groups} groups" if self.groups > 1 else ""),
            f"{'gated ' if self.gated else ''}{self.activation}",
            f"{self.scoring} router" if self.router else "router not recognised",
        ]
        text += ["biased selection"] if self.selection_bias else []
        text += ["normalised"] if self.normalised else []
        text += [f"times {self.scale:g}"] if self.scale != 1 else []
        text += [f"at most {self.capacity} tokens each"] if self.capacity is not None else []
        text += ["a factor per expert"] if self.expert_scale else []
        text += ["some skipped"] if self.masked else []
        text += ["weights on inputs"] if self.input_scaled else []
        text += [f"{len(self.shared)} shared{', gated' if self.shared_gate else ''}"] if self.shared else []
        return ", ".join(text) + (f", int{self.bits}" if self.bits < 16 else "")


Part = Annotated[AttentionView | FFNView | MoEView, Field(discriminator="kind")]


class RegionView(_View):
    """One sublayer, or whatever lies before, after or beside the blocks."""

    kind: str
    parameters: int
    """Weights it reads."""
    active_parameters: int
    """Weights of these that one token uses."""
    bytes: int
    """Bytes of the tensors it reads, as stored."""
    flops: int
    """FLOPs per token."""
    operators: int
    """Number of operators."""
    parts: list[Part] = []
    reason: str | None = None
    """Why it, or a part of it, was not recognised."""

    def describe(self) -> str:
        """One line for all its parts."""
        text = "; ".join(part.describe() for part in self.parts)
        return text or self.reason or f"{self.operators} operator{'' if self.operators == 1 else 's'}"


class BlockView(_View):
    """One layer."""

    index: int
    kind: str
    stream: str = "stream"
    """Label of its stream."""
    parameters: int
    active_parameters: int
    bytes: int
    flops: int
    regions: list[RegionView]


class StreamView(_View):
    """One residual stream: what stands before, between and behind its blocks."""

    label: str
    """``stream`` where the model has one; ``encoder``, ``decoder``, ``tower.0`` ... otherwise."""
    blocks: list[int]
    """Indices of its blocks."""
    prefix: RegionView
    """Before its first block."""
    between: RegionView
    """Between its blocks, such as a change of resolution."""
    suffix: RegionView
    """After its last block."""


class EmbeddingView(_View):
    """A look-up table [rows, width]."""

    name: str
    weight: str
    rows: int
    width: int
    bits: int
    parameters: int


class PortView(_View):
    """An input or output of the model."""

    name: str
    dtype: str
    shape: list[int | str]


class Inspection(_View):
    """Everything that ``surgeon inspect`` shows."""

    model: dict[str, Any]
    """``description``, ``task``, ``output_class`` and ``weights`` of the source."""
    inputs: list[PortView]
    outputs: list[PortView]
    sizes: dict[str, int]
    """Sizes of the dynamic dimensions at which operations were counted."""
    tokens: int
    """Tokens of one run at these sizes; FLOPs are given per token."""
    parameters: int
    active_parameters: int
    bytes: int
    flops: int
    """FLOPs per token of the whole model."""
    embeddings: list[EmbeddingView]
    prefix: RegionView
    """Before the first block, embeddings included."""
    blocks: list[BlockView]
    between: RegionView
    """Between blocks, such as a change of resolution."""
    suffix: RegionView
    """After the last block, head included."""
    streams: list[StreamView]
    """The streams; ``prefix``, ``between`` and ``suffix`` hold those of all of them."""
    linears: list[ProjectionView]
    """Linears outside of the blocks."""
    context: RegionView
    """Beside the stream: masks, rotary tables, positions."""
    shared_parameters: int
    """Weights that several of these parts read, counted in each of them but once in ``parameters``."""
    unrecognised: dict[str, str]
    """What has no role, with the reason."""

    @property
    def caution(self) -> str:
        """What the figures do not rest on, where they rest on less than usual."""
        if self.model.get("weights") != "fake":
            return ""
        return "traced over fake weights: not compared with the source model"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return self.model_dump(mode="json")

    def folded(self, stream: str | None = None) -> list[tuple[BlockView, int]]:
        """Runs of consecutive blocks that differ in index and names only: the first of each, and how many they are.

        Args:
            stream: label of the stream whose blocks are wanted, None for all.
        """
        runs: list[tuple[BlockView, int]] = []
        for block in self.blocks:
            if stream is not None and block.stream != stream:
                continue
            if runs and _shape(runs[-1][0]) == _shape(block):
                runs[-1] = (runs[-1][0], runs[-1][1] + 1)
            else:
                runs.append((block, 1))
        return runs

    def summary(self) -> dict[str, Any]:
        """What a report keeps of it: one entry per block and sublayer, with sizes and a line of text."""
        keep = ("kind", "parameters", "active_parameters", "bytes", "flops")
        return {
            "parameters": self.parameters,
            "active_parameters": self.active_parameters,
            "bytes": self.bytes,
            "flops": self.flops,
            "prefix": {key: getattr(self.prefix, key) for key in keep},
            "blocks": [
                {
                    "index": block.index,
                    "stream": block.stream,
                    **{key: getattr(block, key) for key in keep},
                    "regions": [
                        {**{key: getattr(region, key) for key in keep}, "text": region.describe()} for region in block.regions
                    ],
                }
                for block in self.blocks
            ],
            "between": {key: getattr(self.between, key) for key in keep},
            "suffix": {key: getattr(self.suffix, key) for key in keep},
            "unrecognised": dict(self.unrecognised),
        }

    def render(self, console: Console) -> None:
        """Print it."""
        from surgeon.terminal import render_inspection

        render_inspection(self, console)

    def html(self) -> str:
        """A self-contained HTML page with a picture of the model."""
        from surgeon.report_html import render_inspection_html

        return render_inspection_html(self)


def _low_bits(projections: list[ProjectionView]) -> str:
    """Bit widths below 16, which are worth a word."""
    widths = sorted({projection.bits for projection in projections if projection.bits < 16})
    return f", int{'/'.join(map(str, widths))}" if widths else ""


def _shape(value: Any) -> Any:
    """A view without the fields in which equal blocks differ."""
    data = value.model_dump() if isinstance(value, BaseModel) else value
    if isinstance(data, dict):
        data = {**data, **{key: data[key] is not None for key in ("selection_bias", "expert_scale") if key in data}}  # names
        return {key: _shape(item) for key, item in data.items() if key not in ("index", "weight")}
    return [_shape(item) for item in data] if isinstance(data, list) else data
