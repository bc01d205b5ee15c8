"""Linears that are written with something else than a matrix: convolutions of one position, weights per head, stacks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgeon.data import load_data
from surgeon.discovery import discover
from surgeon.errors import PlanError
from surgeon.graph import Graph
from surgeon.pipeline import operate
from surgeon.progress import Progress
from surgeon.registry import make_pass
from surgeon.structure import Structure
from surgeon.tracing import trace

WIDTH, HEADS, SIZE, INNER, BLOCKS = 24, 3, 8, 40, 2
X = torch.randn(2, 6, WIDTH, generator=torch.Generator().manual_seed(3))


class Channels(nn.Module):
    """[batch, channels, positions] throughout; every projection is a convolution of one position."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Conv1d(WIDTH, 3 * WIDTH, 1), nn.Conv1d(WIDTH, WIDTH, 1, bias=False)
        self.up, self.down = nn.Conv1d(WIDTH, INNER, 1), nn.Conv1d(INNER, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.mT
        q, k, v = self.qkv(x).unflatten(1, (3, HEADS, SIZE)).unbind(1)  # [B, HEADS, SIZE, S]
        x = x + self.out((v @ (q.mT @ k / SIZE**0.5).softmax(-1).mT).flatten(1, 2))
        return (x + self.down(F.gelu(self.up(x)))).mT


class Maps(Channels):
    """[batch, channels, height, width]."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Conv2d(WIDTH, 3 * WIDTH, 1), nn.Conv2d(WIDTH, WIDTH, (1, 1), bias=False)
        self.up, self.down = nn.Conv2d(WIDTH, INNER, 1), nn.Conv2d(INNER, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.mT.unflatten(-1, (2, 3))
        q, k, v = self.qkv(x).flatten(2).unflatten(1, (3, HEADS, SIZE)).unbind(1)
        attended = v @ (q.mT @ k / SIZE**0.5).softmax(-1).mT
        x = x + self.out(attended.flatten(1, 2).unflatten(-1, (2, 3)))
        return (x + self.down(F.gelu(self.up(x)))).flatten(2).mT


class PerHead(nn.Module):
    """Weights [heads, width, size] and [heads, size, width] in einsums; the FFN's as a stack of matrices that is reshaped."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Parameter(torch.randn(self.shape()) * 0.1) for _ in range(3))
        self.o = nn.Parameter(torch.randn(HEADS, SIZE, WIDTH) * 0.1)
        self.up = nn.Parameter(torch.randn(WIDTH, 4, INNER // 4) * 0.1)
        self.down = nn.Parameter(torch.randn(4, INNER // 4, WIDTH) * 0.1)

    def shape(self) -> tuple[int, ...]:
        return HEADS, WIDTH, SIZE

    def project(self, x: Tensor, weight: Tensor) -> Tensor:
        return torch.einsum("bsd,hde->bhse", x, weight)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.project(x, weight) for weight in (self.q, self.k, self.v))
        x = x + torch.einsum("bhse,hed->bsd", F.scaled_dot_product_attention(q, k, v), self.o)
        return x + F.gelu(x @ self.up.flatten(1)) @ self.down.flatten(0, 1)


class WidthFirst(PerHead):
    """[width, heads, size]: over the same memory as a matrix."""

    def shape(self) -> tuple[int, ...]:
        return WIDTH, HEADS, SIZE

    def project(self, x: Tensor, weight: Tensor) -> Tensor:
        return torch.einsum("bsd,dhe->bhse", x, weight)


class Broadcast(PerHead):
    """One product for all heads: [batch, 1, positions, width] times [heads, width, size]."""

    def project(self, x: Tensor, weight: Tensor) -> Tensor:
        return x[:, None] @ weight


class Model(nn.Module):
    def __init__(self, block: type[nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([block() for _ in range(BLOCKS)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


SPELLINGS = [Channels, Maps, PerHead, WidthFirst, Broadcast]


def found(block: type[nn.Module]) -> tuple[nn.Module, Graph, Structure]:
    module = Model(block).eval()
    graph = trace(module, {"x": X}, dynamic={"x": {0: "batch"}})
    return module, graph, discover(graph)


@pytest.mark.parametrize("block", SPELLINGS)
def test_projections_and_ffns_are_seen(block: type[nn.Module]) -> None:
    module, graph, structure = found(block)
    assert [b.kind for b in structure.blocks] == ["attention+ffn"] * BLOCKS
    for part in structure.blocks:
        (attention,), (ffn,) = part.regions[0].attention, part.regions[1].ffn
        assert (attention.heads, attention.kv_heads, attention.head_dim) == (HEADS, HEADS, SIZE)
        assert None not in (attention.q, attention.k, attention.v, attention.o)
        assert (ffn.width, ffn.activation) == (INNER, "gelu")
    assert not structure.unrecognised
    assert set(graph.parameters()) == {name for name, _ in module.named_parameters()}
    sizes = {name: tensor.numel() for name, tensor in module.named_parameters()}
    assert {name: tensor.numel() for name, tensor in graph.parameters().items()} == sizes


def test_the_matrix_of_a_convolution_is_the_source_s_memory() -> None:
    module, graph, _ = found(Channels)
    for name, tensor in module.named_parameters():
        assert graph.tensor(name).data_ptr() == tensor.data_ptr()
        assert graph.tensor(name).dim() <= 2


@pytest.mark.parametrize("block", SPELLINGS)
@pytest.mark.parametrize(
    "step",
    [
        {"moefy_ffn": {"experts": 4, "top_k": 4, "router": "centroid"}},
        {"low_rank": {"ratio": 1.0, "method": "svd"}},
        {"quantize": {"scheme": "int8"}},
    ],
    ids=lambda step: next(iter(step)),
)
def test_passes_run_on_them(block: type[nn.Module], step: dict[str, Any]) -> None:
    module, graph, structure = found(block)
    data = load_data([{"x": X}], graph)
    changed, _, plan, _ = operate(make_pass(step), graph, structure, data, None, Progress(False))
    assert len(plan.decisions) >= BLOCKS
    with torch.no_grad():
        wanted, got = module(X), next(iter(changed(x=X).values()))
    error = float((got - wanted).norm() / wanted.norm())
    assert error < (0.05 if "quantize" in step else 1e-5)


def test_a_convolution_that_sees_its_neighbours_is_no_linear() -> None:
    class Wide(Channels):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Conv1d(WIDTH, INNER, 3, padding=1)

    _, _, structure = found(Wide)
    assert all(not part.regions[1].ffn for part in structure.blocks)


def test_a_stride_skips_positions() -> None:
    class Halved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.start, self.blocks = nn.Conv1d(WIDTH, WIDTH, 1, stride=2), Model(Channels)

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks(self.start(x.mT).mT)

    module = Halved().eval()
    graph = trace(module, {"x": X}, dynamic={"x": {0: "batch"}})  # compared with its source while it is traced
    assert all(tensor.dim() <= 2 for tensor in graph.parameters().values())


class Joined(nn.Module):
    """Attention and FFN side by side; one matrix makes both of their inputs, one reads both of their outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.start, self.end = nn.Linear(WIDTH, 3 * WIDTH + INNER), nn.Linear(WIDTH + INNER, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, hidden = self.start(self.norm(x)).split([WIDTH, WIDTH, WIDTH, INNER], -1)
        q, k, v = (t.unflatten(-1, (HEADS, SIZE)).transpose(1, 2) for t in (q, k, v))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.end(torch.cat([attended, F.gelu(hidden)], -1))


def test_an_output_projection_that_reads_an_attention_and_an_ffn() -> None:
    module, graph, structure = found(Joined)
    for block in structure.blocks:
        assert block.kind == "parallel"
        (attention,), (ffn,) = block.regions[0].attention, block.regions[0].ffn
        assert attention.o is not None
        assert (attention.o.columns, ffn.down.columns) == ((0, WIDTH), (WIDTH, WIDTH + INNER))
        assert (attention.heads, ffn.width, ffn.activation) == (HEADS, INNER, "gelu")
    data = load_data([{"x": X}], graph)
    with pytest.raises(PlanError, match="is one matrix with that of another part"):
        operate(make_pass({"moefy_ffn": {"experts": 4, "top_k": 4}}), graph, structure, data, None, Progress(False))
    step = make_pass({"low_rank": {"ratio": 1.0, "method": "svd"}})
    changed, again, _, _ = operate(step, graph, structure, data, None, Progress(False))
    with torch.no_grad():
        assert torch.allclose(next(iter(changed(x=X).values())), module(X), atol=1e-4)
    assert [block.kind for block in again.blocks] == ["parallel"] * BLOCKS


class Adapted(nn.Module):
    """A weight with an adapter beside it: a sum of two linears is no gate of one by the other."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)
        self.a, self.b = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, INNER, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(x) + 0.5 * self.b(self.a(x))))


def test_a_sum_of_two_linears_is_no_gated_ffn() -> None:
    _, _, structure = found(Adapted)
    regions = [region for block in structure.blocks for region in block.regions]
    assert all(not region.ffn and "weighted sum" in (region.reason or "") for region in regions)


class Packed(nn.Module):
    """One tensor for all four projections, rows of it for each; their biases are split from a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4 * WIDTH, WIDTH) * 0.1)
        self.biases = nn.ParameterList([torch.randn(WIDTH) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        *first, out = self.weight.chunk(4)
        biases = torch.cat(list(self.biases)).chunk(3)
        q, k, v = (
            F.linear(x, w, b).unflatten(-1, (HEADS, SIZE)).transpose(1, 2)
            for w, b in zip(first, biases, strict=True)
        )
        return x + F.linear(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2), out)


def test_rows_of_a_packed_weight_are_weights_of_their_own() -> None:
    module, graph, structure = found(Packed)
    for block in structure.blocks:
        (attention,) = block.regions[0].attention
        assert None not in (attention.q, attention.k, attention.v, attention.o)
    assert not structure.unrecognised
    sizes = [sum(p.numel() for p in parameters) for parameters in (graph.parameters().values(), module.parameters())]
    assert sizes[0] == sizes[1]
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    assert {p.untyped_storage().data_ptr() for p in graph.parameters().values()} == own


def test_cross_attention_of_torch_s_own_decoder() -> None:
    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerDecoderLayer(WIDTH, HEADS, INNER, batch_first=True, norm_first=True)
            self.stack = nn.TransformerDecoder(layer, 2)

        def forward(self, x: Tensor, memory: Tensor) -> Tensor:
            return self.stack(x, memory)

    inputs = {"x": X, "memory": torch.randn(2, 5, WIDTH)}
    structure = discover(trace(Decoder().eval(), inputs, dynamic=dict.fromkeys(inputs)))
    assert [block.kind for block in structure.blocks] == ["attention+attention+ffn"] * 2
    for block in structure.blocks:
        for region in block.regions[:2]:
            (attention,) = region.attention
            assert None not in (attention.q, attention.k, attention.v, attention.o)
            assert (attention.heads, attention.head_dim) == (HEADS, SIZE)


class Piecewise(nn.Module):
    """An activation that is told apart by a comparison, with learned slopes."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)
        self.slope = nn.Parameter(torch.tensor([0.3]))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x)
        return x + self.down(torch.where(hidden > 0, hidden * hidden, self.slope * torch.expm1(hidden)))


def test_an_activation_with_a_comparison_in_it() -> None:
    _, _, structure = found(Piecewise)
    for block in structure.blocks:
        (ffn,) = block.regions[0].ffn
        assert (block.kind, ffn.width, ffn.activation) == ("ffn", INNER, None)
