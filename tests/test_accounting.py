"""Counts against closed forms, the source modules and torch's own counter."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from surgeon.accounting import (
    active_parameter_count,
    memory,
    parameter_count,
    weight_bytes,
    weights,
)
from surgeon.errors import RecipeError
from surgeon.flops import flops, flops_by_node, flops_per_token, token_count
from surgeon.graph import Graph
from surgeon.numerics import quantize_groupwise
from surgeon.tracing import trace
from tests.models import NAMES, tiny

BATCH, LENGTH, HIDDEN = 2, 5, 16


def numbers(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(0)))


def traced(module: nn.Module, *shape: int) -> Graph:
    """The graph of a module of one input x [batch, sequence, ...]."""
    x = torch.randn(*(shape or (BATCH, LENGTH, HIDDEN)), generator=torch.Generator().manual_seed(1))
    return trace(module.eval(), {"x": x}, dynamic={"x": {0: "batch", 1: "sequence"}})


class Experts(nn.Module):
    """A router and E experts, optionally read twice, or stored as int8 codes."""

    def __init__(self, experts: int, k: int, *, twice: bool = False, packed: bool = False) -> None:
        super().__init__()
        self.k, self.twice = k, twice
        self.router = nn.Linear(HIDDEN, experts, bias=False)
        self.w_in, self.w_out = numbers(experts, 24, HIDDEN), numbers(experts, HIDDEN, 24)
        self.b_in = numbers(experts, 24)
        self.group = 16 if packed else None
        if packed:
            codes = quantize_groupwise(self.w_in.detach(), bits=8, group=16, symmetric=True)
            del self.w_in
            self.register_buffer("codes", codes.packed)
            self.scale = nn.Parameter(codes.scale)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, HIDDEN)
        weight, index = self.router(rows).softmax(-1).topk(self.k)
        w_in = self.w_in if self.group is None else torch.ops.surgeon.dequantize(
            self.codes, self.scale, None, 8, self.group, HIDDEN
        )  # fmt: skip
        for _ in range(1 + self.twice):
            rows = rows + torch.ops.surgeon.moe(rows, index, weight, w_in, self.w_out, self.b_in, None, "relu")
        return rows.reshape(x.shape)


EXPERT = 24 * HIDDEN * 2 + 24


# -- parameters ---------------------------------------------------------------------------------------------------


Model = tuple[nn.Module, dict[str, Tensor], Graph]


@cache
def model(name: str) -> Model:
    module, inputs = tiny(name)
    return module, inputs, trace(module, inputs)


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_those_of_the_source(name: str) -> None:
    module, _, graph = model(name)
    assert parameter_count(graph) == sum(p.numel() for p in module.parameters())  # parameters() yields tied ones once


@pytest.mark.parametrize("name", NAMES)
def test_bytes_are_parameters_and_buffers(name: str) -> None:
    graph = model(name)[-1]
    buffers = sum(w.bytes for w in weights(graph).values() if w.parameters == 0)
    assert weight_bytes(graph) == 4 * parameter_count(graph) + buffers
    assert weight_bytes(graph) == graph.nbytes()


@pytest.mark.parametrize("name", NAMES)
def test_only_mixtures_have_inactive_parameters(name: str) -> None:
    graph = model(name)[-1]
    idle = 0
    if name == "mixtral":  # of 6 experts, 2 are used; gate, up and down are [48, 64] each, in 3 layers
        idle = 3 * 4 * (3 * 48 * 64)
    assert active_parameter_count(graph) == parameter_count(graph) - idle


def test_parts_of_one_storage_are_different_weights() -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            whole = numbers(2, HIDDEN, HIDDEN).detach()
            self.first, self.second = nn.Parameter(whole[0]), nn.Parameter(whole[1])

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.first @ self.second

    module = Halves()
    assert memory(module.first) != memory(module.second)
    graph = traced(module)
    assert parameter_count(graph) == 2 * HIDDEN * HIDDEN
    assert weight_bytes(graph) == 4 * 2 * HIDDEN * HIDDEN


@pytest.mark.parametrize(("bits", "symmetric"), [(8, True), (8, False), (4, True), (4, False)])
def test_codes_count_as_the_weights_they_stand_for(bits: int, symmetric: bool) -> None:
    out, features = 24, 40  # 40 is not a multiple of the group: the last group is padded

    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            codes = quantize_groupwise(torch.randn(out, features), bits=bits, group=16, symmetric=symmetric)
            self.register_buffer("codes", codes.packed)
            self.scale = nn.Parameter(codes.scale)
            self.register_buffer("zero_point", codes.zero_point)
            self.bias = numbers(out)

        def forward(self, x: Tensor) -> Tensor:
            weight = torch.ops.surgeon.dequantize(self.codes, self.scale, self.zero_point, bits, 16, features)
            return nn.functional.linear(x, weight, self.bias)

    module = Packed()
    graph = traced(module, BATCH, LENGTH, features)
    assert parameter_count(graph) == out * features + out
    stored = [module.codes, module.scale, module.bias] + ([] if symmetric else [module.zero_point])
    assert weight_bytes(graph) == sum(tensor.numel() * tensor.element_size() for tensor in stored)
    assert {w.bits for w in weights(graph).values() if w.name == "codes"} == {bits}


def test_codes_that_are_gathered_before_they_are_unpacked() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            codes = quantize_groupwise(torch.randn(50, 32), bits=8, group=16, symmetric=True)
            self.register_buffer("codes", codes.packed)
            self.scale = nn.Parameter(codes.scale)

        def forward(self, input_ids: Tensor) -> Tensor:
            codes, scale = self.codes[input_ids], self.scale[input_ids]
            return torch.ops.surgeon.dequantize(codes, scale, None, 8, 16, 32) + 1

    graph = trace(Table().eval(), {"input_ids": torch.arange(6).reshape(2, 3)})
    assert parameter_count(graph) == 50 * 32


# -- active parameters --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("k", [1, 3, 8])
def test_active_share_of_experts(k: int, packed: bool) -> None:
    graph = traced(Experts(8, k, packed=packed))
    assert parameter_count(graph) == 8 * EXPERT + 8 * HIDDEN
    assert active_parameter_count(graph) == k * EXPERT + 8 * HIDDEN


@pytest.mark.parametrize(("k", "used"), [(3, 6), (5, 8)])
def test_experts_of_two_mixtures_add_up_to_all_at_most(k: int, used: int) -> None:
    graph = traced(Experts(8, k, twice=True))
    assert parameter_count(graph) == 8 * EXPERT + 8 * HIDDEN
    assert active_parameter_count(graph) == used * EXPERT + 8 * HIDDEN


# -- floating-point operations ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in NAMES if name != "mixtral"])
def test_flops_are_those_that_torch_counts(name: str) -> None:
    """All but the mixture: torch's counter does not know the library's grouped experts; see the closed form below."""
    module, inputs, graph = model(name)
    module.set_attn_implementation("eager")  # nor fused attention on the CPU
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(**inputs)
    module.set_attn_implementation("sdpa")
    assert flops(graph) == counter.get_total_flops()


def test_flops_of_a_mixture() -> None:
    tokens, experts, k = BATCH * LENGTH, 8, 3
    graph = traced(Experts(experts, k))
    assert flops(graph) == 2 * tokens * (experts * HIDDEN + k * 2 * 24 * HIDDEN)
    assert token_count(graph) == tokens


def test_attention_grows_with_the_sequence() -> None:
    graph = model("llama")[-1]
    heads, head, layers = 4, 16, 3
    per_position = layers * 2 * heads * (head + head)
    short = flops_per_token(graph, sizes={"sequence": 100})
    assert flops_per_token(graph, sizes={"sequence": 300}) - short == 200 * per_position
    assert flops_per_token(graph, sizes={"sequence": 100, "batch": 9}) == pytest.approx(short, rel=1e-3)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: torch.einsum("bsh,bth->bst", x, x), 2 * BATCH * LENGTH * LENGTH * HIDDEN),
        (lambda x: torch.bmm(x, x.transpose(1, 2)), 2 * BATCH * LENGTH * LENGTH * HIDDEN),
        (lambda x: torch.addmm(x[0, 0, :1], x[0], x[0].t()), 2 * LENGTH * LENGTH * HIDDEN),
        (lambda x: x @ x[0, 0], 2 * BATCH * LENGTH * HIDDEN),
        (lambda x: nn.functional.scaled_dot_product_attention(x, x, x), 4 * BATCH * LENGTH * LENGTH * HIDDEN),
        (lambda x: x.softmax(-1) * x.exp(), 0),
    ],
    ids=["einsum", "bmm", "addmm", "matmul", "attention", "element-wise"],
)
def test_flops_of_products(function: object, expected: int) -> None:
    class Product(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return function(x)  # type: ignore[operator]  # parametrised

    assert flops(traced(Product())) == expected


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(8, 12, 3, padding=1, groups=4),
        nn.Conv2d(8, 12, (3, 2), stride=2),
        nn.ConvTranspose1d(8, 12, 4, stride=2, groups=2),
    ],
    ids=["grouped", "strided", "transposed"],
)
def test_flops_of_convolutions(layer: nn.Module) -> None:
    x = torch.randn(3, 8, 20) if layer.weight.dim() == 3 else torch.randn(3, 8, 20, 11)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(x)
    expected = counter.get_total_flops()

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    assert expected > 0
    assert flops(trace(Layer().eval(), {"x": x})) == expected


def test_tokens_are_positions_not_inputs() -> None:
    assert token_count(model("vit")[-1]) == 2 * (9 + 1)  # 3 x 3 patches and the class token
    assert token_count(model("bert")[-1]) == 2 * 7  # the pooler sees 2 positions
    assert token_count(model("bert")[-1], {"batch": 3, "sequence": 11}) == 33


def test_parts_add_up() -> None:
    graph = model("gpt2")[-1]
    by_node = flops_by_node(graph, graph.module.graph.nodes)
    nodes = list(by_node)
    assert flops(graph, nodes[::2]) + flops(graph, nodes[1::2]) == sum(by_node.values()) == flops(graph)
    assert math.isclose(flops_per_token(graph), flops(graph) / 14, abs_tol=0.5)


def test_sizes_of_unknown_dimensions_are_refused() -> None:
    graph = model("llama")[-1]
    with pytest.raises(RecipeError, match="'sequnce'.*did you mean 'sequence'.*batch"):
        flops(graph, sizes={"sequnce": 128})
