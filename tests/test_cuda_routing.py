"""Routers as one kernel, under Triton's interpreter: against the spellings that they replace, in every float type."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgeon.backends._aot_routing import Form, route, routed
from surgeon.graph import Graph
from surgeon.tracing import trace
from tests import families_moe

kernels = pytest.importorskip("surgeon.backends._cuda_routing", reason="Triton is for Linux")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ROUNDING = {torch.float32: 2e-6, torch.float16: 2**-8, torch.bfloat16: 2**-5}
"""A few units in the last place: steps are rounded as in the graph, sums taken in another order."""
Routed = tuple[Tensor, Tensor]


class Router(nn.Module):
    """A router whose scores [T, E] are exact in every type and different by at least 1/64 within a row.

    Inputs are small whole numbers behind a 1, and scores (8 m + n) / 64 with whole m and another n for each of 8 experts.
    """

    def __init__(self, spelling: Callable[[Router, Tensor], Routed], width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.spelling = spelling
        generator = torch.Generator().manual_seed(0)
        weight = 8.0 * (torch.randint(0, 16, (8, width), generator=generator) < 1) / 64
        weight[:, 0] = torch.randperm(8, generator=generator) / 64
        self.weight = nn.Parameter(weight.to(dtype))
        self.wide = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.arange(0, 64, 8).flip(0).to(dtype) / 64)
        self.register_buffer("correction", torch.arange(8).flip(0) / 128.0)

    def forward(self, x: Tensor) -> Routed:
        return self.spelling(self, x)

    def inputs(self, *shape: int) -> Tensor:
        x = torch.randint(-1, 2, (*shape, self.weight.shape[1]), generator=torch.Generator().manual_seed(1))
        x[..., 0] = 1
        return x.to(self.weight.dtype)


def softmax_first(m: Router, x: Tensor) -> Routed:
    weight, index = F.linear(x, m.weight).softmax(-1, dtype=torch.float32).topk(3, -1)
    return (weight / weight.sum(-1, keepdim=True)).to(x.dtype), index


def softmax_in_halves(m: Router, x: Tensor) -> Routed:
    weight, index = F.linear(x, m.weight).softmax(-1).topk(2)
    return weight / weight.sum(-1, keepdim=True) * 2.5, index


def softmax_alone(m: Router, x: Tensor) -> Routed:
    weight, index = F.linear(x, m.weight, m.bias).float().softmax(-1).topk(8)
    return weight, index


def softmax_behind(m: Router, x: Tensor) -> Routed:
    weight, index = F.linear(x, m.weight, m.bias).topk(4, dim=-1)
    return weight.softmax(1, dtype=torch.float32).to(x.dtype), index


def sigmoid_corrected(m: Router, x: Tensor) -> Routed:
    scores = F.linear(x, m.weight).float().sigmoid()
    _, index = torch.topk(scores + m.correction, 3, dim=-1, sorted=True)
    weight = scores.gather(1, index)
    return weight / (weight.sum(-1, keepdim=True) + 1e-20) * 1.5, index


def sigmoid_behind(m: Router, x: Tensor) -> Routed:
    weight, index = F.linear(x, m.weight).topk(1, -1)
    return weight.float().sigmoid().to(x.dtype), index


def corrected_scores(m: Router, x: Tensor) -> Routed:
    z = F.linear(x, m.weight)
    index = (z.float() + m.correction).topk(2, -1)[1]
    return z.gather(-1, index).softmax(-1), index


def wide_router(m: Router, x: Tensor) -> Routed:
    weight, index = F.linear(x.float(), m.wide).softmax(-1).topk(2)
    return weight, index


def divided_later(m: Router, x: Tensor) -> Routed:
    weight, index = F.linear(x, m.weight).flatten(0, -2).softmax(-1).topk(2)
    return weight, index


SPELLINGS = (
    softmax_first, softmax_in_halves, softmax_alone, softmax_behind, sigmoid_corrected, sigmoid_behind, corrected_scores,
    wide_router, divided_later,
)  # fmt: skip


def replaced(module: nn.Module, x: Tensor) -> tuple[Graph, Graph, list[Form], list[bool]]:
    """The graph of a router, the same with kernels, their forms, and whether each holds the product."""
    graph = trace(module.eval(), {"x": x})
    fused = graph.clone()
    count = routed(fused)
    calls = [node for node in fused.module.graph.nodes if node.target is route]
    assert len(calls) == count
    return graph, fused, [Form(*node.args[4]) for node in calls], [node.args[1] is not None for node in calls]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda spelling: spelling.__name__)
def test_a_router_becomes_one_kernel(spelling: Callable[[Router, Tensor], Routed], dtype: torch.dtype) -> None:
    module = Router(spelling, 96, dtype)
    shape = (2, 3) if spelling is divided_later else (6,)
    graph, fused, forms, products = replaced(module, module.inputs(*shape))
    assert products == [True]
    left = [str(node.target) for node in fused.module.graph.nodes if node.op == "call_function"]
    assert not any(name in target for target in left for name in ("linear", "topk", "max", "sigmoid", "gather", "div"))
    for rows in (1, 16, kernels.TOKENS + 1):
        x = module.inputs(rows, *shape[1:])
        with torch.no_grad():
            (weight, index), (wanted, chosen) = fused.module(x), graph.module(x)
        assert weight.dtype == wanted.dtype
        assert torch.equal(index, chosen)
        torch.testing.assert_close(weight, wanted, rtol=ROUNDING[dtype], atol=0)
    assert forms[0].k == chosen.shape[1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("experts", "width", "k"), [(8, 4096, 2), (60, 160, 4), (128, 2048, 8), (1, 32, 1)])
@pytest.mark.parametrize("rows", [1, 16])
def test_products_are_summed_in_float32_and_rounded_once(
    dtype: torch.dtype, experts: int, width: int, k: int, rows: int
) -> None:
    generator = torch.Generator().manual_seed(2)
    large = 3 if dtype == torch.bfloat16 else 30  # the interpreter cuts bfloat16 off where a GPU rounds: exact scores there
    x = torch.randint(-large, large + 1, (rows, width), generator=generator).to(dtype)
    router = torch.randint(-3, 4, (experts, width), generator=generator).to(dtype) / 64
    router *= torch.rand(router.shape, generator=generator) < (64 / width if dtype == torch.bfloat16 else 1)
    z = (x.double() @ router.double().T).to(dtype)  # exact in float32 in any order
    order = torch.sort(z.double(), dim=-1, descending=True, stable=True)  # of equal ones the first
    kind = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}[dtype]
    for found in (
        kernels.route_rows(x, router, None, None, k, 0, 0, 2, False, 0.0, 1.0, [kind, 0, 0, 0, 0, 0], torch.float32),
        kernels.route_logits(z, None, k, 0, 0, 2, False, 0.0, 1.0, [0] * 6, torch.float32),
    ):
        assert torch.equal(found[1], order.indices[:, :k])
        assert torch.equal(found[0].double(), order.values[:, :k])


def test_a_slice_of_joined_products_is_read_where_it_lies() -> None:
    joined = torch.randn(5, 40, generator=torch.Generator().manual_seed(3))
    form = (2, 1, 0, 2, False, 0.0, 1.0)
    found = route(joined[:, 8:24], None, None, None, Form(*form, (0,) * 6, torch.float32))
    wanted = joined[:, 8:24].softmax(-1).topk(2)
    torch.testing.assert_close(found[0], wanted.values)
    assert torch.equal(found[1], wanted.indices)


def test_experts_of_a_row_are_different_whatever_the_scores() -> None:
    nan, inf = float("nan"), float("inf")
    rows = torch.tensor([[nan] * 4, [-inf] * 4, [0.0] * 4, [-inf, 1.0, -inf, -inf], [1.0, nan, inf, 2.0]])
    _, index = kernels.route_logits(rows, None, 3, 0, 0, 2, False, 0.0, 1.0, [0] * 6, torch.float32)
    assert index.tolist() == [[0, 1, 2], [0, 1, 2], [0, 1, 2], [1, 0, 2], [1, 2, 3]]


def scores_read(m: Router, x: Tensor) -> tuple[Tensor, ...]:
    scores = F.linear(x, m.weight).softmax(-1)
    return (*scores.topk(2), scores)


def weights_read(m: Router, x: Tensor) -> tuple[Tensor, ...]:
    weight, index = F.linear(x, m.weight).softmax(-1).topk(2)
    return weight / weight.sum(-1, keepdim=True), index, weight


def smallest(m: Router, x: Tensor) -> Routed:
    weight, index = F.linear(x, m.weight).softmax(-1).topk(2, -1, False)
    return weight, index


def softmax_of_columns(m: Router, x: Tensor) -> Routed:
    weight, index = F.linear(x, m.weight).softmax(0).topk(2, -1)
    return weight, index


def masked(m: Router, x: Tensor) -> Routed:
    weight, index = F.linear(x, m.weight).softmax(-1).topk(2)
    weight = torch.where(weight > 0.3 * weight[:, :1], weight, 0)
    return weight / weight.sum(-1, keepdim=True), index


def logits_read(m: Router, x: Tensor) -> tuple[Tensor, ...]:
    z = F.linear(x, m.weight)
    return (*z.softmax(-1).topk(2), z)


@pytest.mark.parametrize("spelling", [scores_read, smallest])
def test_what_is_read_elsewhere_or_chosen_otherwise_is_left(spelling: Callable[[Router, Tensor], Routed]) -> None:
    module = Router(spelling, 32, torch.float32)
    assert replaced(module, module.inputs(4))[2] == []


@pytest.mark.parametrize("spelling", [weights_read, softmax_of_columns, masked, logits_read])
def test_a_router_that_is_partly_read_elsewhere_is_partly_the_kernels(
    spelling: Callable[[Router, Tensor], Routed],
) -> None:
    module = Router(spelling, 32, torch.float32)
    graph, fused, forms, products = replaced(module, module.inputs(4))
    assert [form.normalised for form in forms] == [False]
    assert products == [spelling not in (softmax_of_columns, logits_read)]
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(5))
    for found, wanted in zip(fused.module(x), graph.module(x), strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    ("name", "count", "form"),
    [
        ("mixtral", 2, (2, 1, 0, 2, True, 0.0, 1.0)),
        ("qwen2_moe", 2, (2, 1, 0, 2, False, 0.0, 1.0)),
        ("gpt_oss", 2, (2, 0, 1, 2, False, 0.0, 1.0)),
        ("granitemoe", 2, (2, 0, 1, 2, False, 0.0, 1.0)),
        ("where_loop", 1, (2, 1, 0, 2, True, 0.0, 1.0)),
        ("deepseek_v3", 0, None),  # the best groups first
        ("phimoe", 0, None),  # another softmax for each of the chosen
    ],
)
def test_routers_of_families(name: str, count: int, form: tuple[object, ...] | None) -> None:
    _, graph, _ = families_moe.traced(name)
    fused = graph.clone()
    assert routed(fused) == count
    calls = [node for node in fused.module.graph.nodes if node.target is route]
    assert all(tuple(node.args[4])[:7] == form for node in calls)
    inputs = graph.bind(families_moe.inputs(name))
    with torch.no_grad():
        for found, wanted in zip(fused.module(*inputs), graph.module(*inputs), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
