"""What surgeon sees in a model: blocks, what their parts are, parameters and FLOPs, and what it did not recognise.

``inspection(graph, structure)`` makes plain data of a structure; the data has a terminal view, an HTML page and JSON.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping

from torch import fx

from surgeon.accounting import (
    active_parameter_count,
    expert_shares,
    memory,
    parameter_count,
    weight_bytes,
    weights,
)
from surgeon.flops import flops_by_node, token_count
from surgeon.graph import Graph, Port
from surgeon.structure import FFN, Attention, Block, Linear, MoE, Region, Stream, Structure
from surgeon.views import (
    AttentionView,
    BlockView,
    EmbeddingView,
    FFNView,
    Inspection,
    MoEView,
    Part,
    PortView,
    ProjectionView,
    RegionView,
    StreamView,
)

__all__ = ["Inspection", "inspection"]


def inspection(graph: Graph, structure: Structure, sizes: Mapping[str, int] | None = None) -> Inspection:
    """Describe a model.

    Args:
        graph: the graph.
        structure: its structure, from ``surgeon.discover``.
        sizes: sizes of dynamic dimensions to count operations at; the graph's example by default.

    Raises:
        RecipeError: ``sizes`` names a dimension that the graph does not have.
    """
    look = _Look(graph, sizes)
    transitions = [node for stream in structure.streams for region in stream.transitions for node in region.nodes]
    placed = {*structure.prefix, *structure.suffix, *transitions}.union(*(block.nodes for block in structure.blocks))
    beside = [node for node in graph.module.graph.nodes if node not in placed and node.op == "call_function"]
    prefix = look.outside("prefix", structure.prefix)
    blocks = [look.block(block, stream.label) for stream in structure.streams for block in stream.blocks]
    between = look.outside("between", transitions)
    streams = [look.stream(stream) for stream in structure.streams]
    suffix = look.outside("suffix", structure.suffix)
    context = look.outside("context", beside)
    parts: list[RegionView | BlockView] = [*blocks, context]
    parts += [part for stream in streams for part in (stream.prefix, stream.between, stream.suffix)]
    total = parameter_count(graph)
    source = graph.source
    return Inspection(
        model={
            "description": source.description,
            "task": source.task,
            "output_class": source.output_class,
            "weights": source.weights,
        },
        inputs=[_port(port) for port in graph.inputs],
        outputs=[_port(port) for port in graph.outputs],
        sizes=look.sizes,
        tokens=look.tokens,
        parameters=total,
        active_parameters=active_parameter_count(graph),
        bytes=weight_bytes(graph),
        flops=look.flops(graph.module.graph.nodes),
        embeddings=[
            EmbeddingView(
                name=site.name,
                weight=site.part.weight,
                rows=site.part.rows,
                width=site.part.width,
                bits=look.bits(site.part.weight),
                parameters=look.count([site.part.weight]),
            )
            for site in structure.embeddings
        ],
        prefix=prefix,
        blocks=blocks,
        between=between,
        suffix=suffix,
        streams=streams,
        linears=[look.projection(site.name, site.part) for site in structure.linears if site.block is None],
        context=context,
        shared_parameters=sum(part.parameters for part in parts) - total,
        unrecognised=dict(structure.unrecognised),
    )


class _Look:
    """Counts what parts of one graph read and do."""

    def __init__(self, graph: Graph, sizes: Mapping[str, int] | None) -> None:
        self.graph = graph
        self.tokens = token_count(graph, sizes)
        self._flops = flops_by_node(graph, graph.module.graph.nodes, sizes)
        self._weights = weights(graph)
        self._shares = expert_shares(graph)
        examples = {
            str(dim): int(size)
            for port in graph.inputs
            for dim, size in zip(port.shape, graph.example[port.name].shape, strict=True)
            if isinstance(dim, str)
        }
        self.sizes = {**examples, **(sizes or {})}

    def flops(self, nodes: Iterable[fx.Node]) -> int:
        return round(sum(self._flops.get(node, 0) for node in nodes) / self.tokens)

    def count(self, names: Iterable[str | None]) -> int:
        keys = {memory(self.graph.tensor(name)) for name in names if name is not None}
        return sum(self._weights[key].parameters for key in keys)

    def bits(self, name: str) -> int:
        return self._weights[memory(self.graph.tensor(name))].bits

    def outside(self, kind: str, nodes: Collection[fx.Node]) -> RegionView:
        read = weights(self.graph, nodes).values()
        return RegionView(
            kind=kind,
            parameters=sum(weight.parameters for weight in read),
            active_parameters=active_parameter_count(self.graph, nodes, self._shares),
            bytes=sum(weight.bytes for weight in read),
            flops=self.flops(nodes),
            operators=sum(node.op == "call_function" for node in nodes),
        )

    def stream(self, stream: Stream) -> StreamView:
        return StreamView(
            label=stream.label,
            blocks=[block.index for block in stream.blocks],
            prefix=self.outside("prefix", stream.prefix),
            between=self.outside("between", [node for region in stream.transitions for node in region.nodes]),
            suffix=self.outside("suffix", stream.suffix),
        )

    def block(self, block: Block, stream: str) -> BlockView:
        whole = self.outside(block.kind, block.nodes)
        return BlockView(
            index=block.index,
            kind=block.kind,
            stream=stream,
            parameters=whole.parameters,
            active_parameters=whole.active_parameters,
            bytes=whole.bytes,
            flops=whole.flops,
            regions=[self._region(region) for region in block.regions],
        )

    def _region(self, region: Region) -> RegionView:
        parts: list[Part] = [self._attention(attention) for attention in region.attention]
        parts += [self._ffn(ffn) for ffn in region.ffn]
        parts += [self._moe(moe) for moe in region.moe]
        plain = self.outside(region.kind, region.nodes)
        return plain.model_copy(update={"parts": parts, "reason": region.reason})

    def projection(self, name: str, linear: Linear) -> ProjectionView:
        return ProjectionView(
            name=name,
            weight=linear.weight,
            in_features=linear.in_features,
            out_features=linear.out_features,
            bias=linear.bias is not None,
            bits=self.bits(linear.weight),
        )

    def _attention(self, part: Attention) -> AttentionView:
        linears = [(name, getattr(part, name)) for name in ("q", "k", "v", "o")]
        qkv = [linear.weight for linear in (part.q, part.k, part.v) if linear is not None]
        return AttentionView(
            heads=part.heads,
            kv_heads=part.kv_heads,
            head_dim=part.head_dim,
            fused=len(qkv) > len(set(qkv)),
            causal=part.causal,
            cross=part.cross,
            projections=[self.projection(name, linear) for name, linear in linears if linear is not None],
            parameters=self.count(_names(linear for _, linear in linears)),
        )

    def _ffn(self, part: FFN) -> FFNView:
        linears = [("up", part.up), ("gate", part.gate), ("down", part.down)]
        return FFNView(
            width=part.width,
            gated=part.gate is not None,
            activation=part.activation,
            layout=part.layout,
            projections=[self.projection(name, linear) for name, linear in linears if linear is not None],
            parameters=self.count(_names(linear for _, linear in linears)),
        )

    def _moe(self, part: MoE) -> MoEView:
        shared = [linear for ffn in part.shared for linear in (ffn.up, ffn.gate, ffn.down)]
        experts = [part.w_in, part.w_out, part.b_in, part.b_out]
        return MoEView(
            experts=part.experts,
            top_k=part.top_k,
            width=part.width,
            gated=part.gated,
            activation=part.activation,
            scoring=part.scoring,
            normalised=part.normalised,
            scale=part.scale,
            selection_bias=part.selection_bias,
            groups=part.groups,
            top_groups=part.top_groups,
            capacity=part.capacity,
            input_scaled=part.input_scaled,
            masked=part.masked,
            expert_scale=part.expert_scale,
            router=None if part.router is None else self.projection("router", part.router),
            shared=[self._ffn(ffn) for ffn in part.shared],
            shared_gate=None if part.shared_gate is None else self.projection("gate", part.shared_gate),
            bits=self.bits(part.w_in),
            parameters=self.count([*experts, *_names([part.router, part.shared_gate, *shared])]),
        )


def _names(linears: Iterable[Linear | None]) -> Iterator[str | None]:
    for linear in linears:
        if linear is not None:
            yield linear.weight
            yield linear.bias


def _port(port: Port) -> PortView:
    return PortView(name=port.name, dtype=str(port.dtype).removeprefix("torch."), shape=list(port.shape))
