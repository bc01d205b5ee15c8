"""Spellings of dispatch beyond the common ones, each raised to one node with the routing that it has, or left with a reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgeon.discovery import discover
from surgeon.tracing import relative_error, trace
from tests.families_moe import CHOSEN, EXPERTS, HIDDEN, Mixture, Written, randomised

MOE = torch.ops.surgeon.moe.default


def places(m: Mixture, h: Tensor) -> Tensor:
    """Dispatch to places of limited number, by products with ones and zeros."""
    x, size = h.reshape(-1, HIDDEN), 4
    weight, index = m.router(x).softmax(-1).max(-1)
    mask = F.one_hot(index, m.count).to(x.dtype)
    place = mask.cumsum(0) * mask - 1
    mask = mask * (place < size)
    slot = F.one_hot((place * mask).sum(-1).long(), size).to(x.dtype)
    combine = weight[:, None, None] * mask[:, :, None] * slot[:, None, :]
    inputs = torch.einsum("tec,th->ech", (combine > 0).to(x.dtype), x)
    hidden = m.inner(torch.einsum("ech,ehf->ecf", inputs, m.w1))
    return torch.einsum("tec,ech->th", combine, torch.einsum("ecf,efh->ech", hidden, m.w2)).view(h.shape)


def chosen_by_products(m: Mixture, h: Tensor) -> Tensor:
    """Every expert takes its tokens, by a product with ones and zeros over all tokens."""
    x = h.reshape(-1, HIDDEN)
    weight, token = m.router(x).softmax(-1).t().topk(3, -1)
    ones = F.one_hot(token, x.shape[0]).to(x.dtype)
    hidden = m.inner(torch.einsum("ech,ehf->ecf", torch.einsum("ect,th->ech", ones, x), m.w1))
    return torch.einsum("ect,ec,ecf,efh->th", ones, weight, hidden, m.w2).view(h.shape)


def sorted_pairs(m: Mixture, h: Tensor) -> Tensor:
    """Pairs of a token and an expert are sorted, computed as rows of their own, and summed."""
    x = h.reshape(-1, HIDDEN)
    weight, index = m.route(x)
    flat = index.flatten()
    order = flat.argsort(stable=True)
    rows, expert = x[order // CHOSEN], flat[order]
    each = torch.bmm(m.inner(torch.bmm(rows.unsqueeze(1), m.w1[expert])), m.w2[expert]).squeeze(1)
    return torch.zeros_like(x).index_add(0, order // CHOSEN, each * weight.flatten()[order, None]).view(h.shape)


def overwritten(m: Mixture, h: Tensor) -> Tensor:
    """One expert's output takes the input's place; nobody keeps it, because there are no more experts."""
    x = h.reshape(-1, HIDDEN)
    weight, index = m.router(x).softmax(-1).max(-1)
    out = x.clone()
    for e in range(m.count):
        out[index == e] = m.expert(e, x[index == e])
    return (out * weight[:, None]).view(h.shape)


def capped_scores(m: Mixture, h: Tensor) -> Tensor:
    """A soft cap on the router's output, and a factor of every expert's own."""
    x = h.reshape(-1, HIDDEN)
    value, index = (3 * torch.tanh(m.router(x) / 3)).topk(CHOSEN, -1)
    weight = value.softmax(-1) * m.correction_bias[index]
    out = torch.zeros_like(x)
    for e in range(m.count):
        token, place = torch.where(index == e)
        out.index_add_(0, token, m.expert(e, x[token]) * weight[token, place, None])
    return out.view(h.shape)


def one_place_too_many(m: Mixture, h: Tensor) -> Tensor:
    """Hits are counted for one expert more than there are; nobody ever hits it."""
    x = h.reshape(-1, HIDDEN)
    weight, index = m.route(x)
    out = torch.zeros_like(x)
    mask = F.one_hot(index, m.count + 1).permute(2, 1, 0)
    for hit in (mask.sum((-1, -2)) > 0).nonzero():
        place, token = torch.where(mask[hit[0]])
        out.index_add_(0, token, m.inner(x[token] @ m.w1[hit[0]]) @ m.w2[hit[0]] * weight[token, place, None])
    return out.view(h.shape)


SOFTMAX = {"scoring": "softmax", "activation": "gelu"}
FORMS: dict[str, tuple[Written, dict[str, Any]]] = {
    "places": (Written(places, stacked=True), {**SOFTMAX, "normalised": False, "top_k": 1, "capacity": 4}),
    "chosen_by_products": (Written(chosen_by_products, stacked=True), {"scoring": "expert_choice", "top_k": EXPERTS}),
    "sorted_pairs": (Written(sorted_pairs, stacked=True), {**SOFTMAX, "normalised": True, "top_k": CHOSEN}),
    "overwritten": (Written(overwritten), {**SOFTMAX, "normalised": False, "top_k": 1}),
    "capped_scores": (Written(capped_scores), {"scoring": "topk_softmax", "expert_scale": "correction_bias"}),
    "one_place_too_many": (Written(one_place_too_many, stacked=True), {**SOFTMAX, "normalised": True, "top_k": CHOSEN}),
}


def check_equal(module: nn.Module, graph: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    for batch, sequence in ((5, 3), (1, 11), (4, 9)):
        x = torch.randn(batch, sequence, HIDDEN, generator=generator)
        with torch.no_grad():
            assert relative_error(next(iter(graph(x=x).values())), module(x)) < 1e-5


def traced(module: nn.Module) -> Any:
    x = torch.randn(2, 6, HIDDEN, generator=torch.Generator().manual_seed(2))
    graph = trace(module, {"x": x}, dynamic={"x": {0: "batch", 1: "sequence"}})
    check_equal(module, graph)
    return graph


@pytest.mark.parametrize("name", FORMS)
def test_spelling_is_raised(name: str) -> None:
    form, expected = FORMS[name]
    graph = traced(randomised(Mixture(form)))
    structure = discover(graph)
    (site,) = structure.moes()
    assert {key: getattr(site.part, key) for key in expected} == expected
    assert structure.unrecognised == {}
    assert site.part.experts == EXPERTS


class InOneMatrix(nn.Module):
    """Experts below each other in one matrix and side by side in another."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, EXPERTS)
        self.below = nn.Parameter(torch.empty(EXPERTS * 24, HIDDEN))
        self.beside = nn.Parameter(torch.empty(HIDDEN, EXPERTS * 24))

    def forward(self, x: Tensor) -> Tensor:
        rows = F.layer_norm(x, (HIDDEN,)).reshape(-1, HIDDEN)
        weight, index = self.router(rows).sigmoid().topk(CHOSEN, -1)
        out = torch.zeros_like(rows)
        for e in range(EXPERTS):
            token, place = torch.where(index == e)
            part = slice(24 * e, 24 * e + 24)
            hidden = F.relu(rows[token] @ self.below[part].T)
            out.index_add_(0, token, hidden @ self.beside[:, part].T * weight[token, place, None])
        return x + out.view(x.shape)


def test_experts_in_one_matrix_are_taken_apart() -> None:
    module = randomised(InOneMatrix())
    (site,) = discover(traced(module)).moes()
    assert (site.part.experts, site.part.width, site.part.scoring, site.part.normalised) == (EXPERTS, 24, "sigmoid", False)


class Numbered(nn.Module):
    """Experts that a number selects which no router has computed, or one of a router with more outputs than experts."""

    def __init__(self, select: Callable[[Numbered, Tensor], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.mixture = Mixture(Written(lambda m, h: h))
        self.router = nn.Linear(HIDDEN, EXPERTS + 2, bias=False)
        self.select = select

    def forward(self, x: Tensor) -> Tensor:
        rows = self.mixture.norm(x).reshape(-1, HIDDEN)
        weight, index = self.select(self, rows)
        out = torch.zeros_like(rows)
        for e in range(EXPERTS):
            token, place = torch.where(index == e)
            out.index_add_(0, token, self.mixture.expert(e, rows[token]) * weight[token, place, None])
        return x + out.view(x.shape)


def beyond(m: Numbered, x: Tensor) -> tuple[Tensor, Tensor]:
    weight, index = m.router(x).softmax(-1).topk(CHOSEN, -1)
    return weight, index


def hashed(m: Numbered, x: Tensor) -> tuple[Tensor, Tensor]:
    index = (x[:, :1].abs() * 50).long() * 7 % EXPERTS
    return torch.ones_like(x[:, :1]), index


def test_numbers_beyond_the_experts_select_nothing() -> None:
    graph = traced(randomised(Numbered(beyond)))
    (node,) = [node for node in graph.module.graph.nodes if node.target is MOE]
    assert node.args[1].target is torch.ops.aten.clamp.default  # the fifth and the sixth expert do not exist
    (site,) = discover(graph).moes()
    assert site.part.router is not None
    assert (site.part.router.out_features, site.part.scoring, site.part.masked) == (EXPERTS + 2, "softmax", True)


def test_numbers_that_need_no_router_stay_in_front_of_the_node() -> None:
    graph = traced(randomised(Numbered(hashed)))
    (node,) = [node for node in graph.module.graph.nodes if node.target is MOE]
    assert node.args[1].target is torch.ops.aten.remainder.Scalar  # behind the remainder, not in front of it


def test_a_size_of_the_input_stays_a_size() -> None:
    class Counted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            ones = F.one_hot(x.argmax(-1).flatten(), x.shape[0] * HIDDEN).to(x.dtype)
            return x + ones.sum(0)[:HIDDEN]

    module = Counted()
    graph = trace(module, {"x": torch.randn(2, 6, HIDDEN)}, dynamic={"x": {0: "batch", 1: "sequence"}})
    check_equal(module, graph)


class Weighted(nn.Module):
    """Experts of a form that the operator does not have, behind a norm with a gate of its own."""

    def __init__(self, make: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.norm, self.router = nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, EXPERTS)
        self.gate = nn.Sequential(nn.Linear(HIDDEN, 8), nn.SiLU(), nn.Linear(8, HIDDEN))
        self.experts = nn.ModuleList(make(e) for e in range(EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        y = y * self.gate(y).sigmoid()
        weight = self.router(y).softmax(-1)
        return x + sum(weight[..., e, None] * expert(y) for e, expert in enumerate(self.experts))


def normed(number: int) -> nn.Module:
    del number
    return nn.Sequential(nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, 24), nn.GELU(), nn.Linear(24, HIDDEN))


def of_own_width(number: int) -> nn.Module:
    return nn.Sequential(nn.Linear(HIDDEN, 8 + 8 * number), nn.GELU(), nn.Linear(8 + 8 * number, HIDDEN))


def deep(number: int) -> nn.Module:
    del number
    inner = [nn.Linear(HIDDEN, 24), nn.GELU(), nn.Linear(24, 24), nn.GELU()]
    return nn.Sequential(*inner, nn.Linear(24, HIDDEN))


@pytest.mark.parametrize("make", [normed, of_own_width, deep])
def test_experts_that_are_not_raised_are_no_networks_of_the_block(make: Callable[[int], nn.Module]) -> None:
    structure = discover(traced(randomised(Weighted(make))))
    assert list(structure.ffns()) == list(structure.moes()) == []
    (region,) = (region for block in structure.blocks for region in block.regions)
    assert region.kind == "other"
    assert region.reason is not None
    assert "nearest rule: mixture of experts" in region.reason
    assert "are weighted or selected token by token" in region.reason


def test_a_gate_in_front_of_the_experts_is_no_shared_expert() -> None:
    def plain(number: int) -> nn.Module:
        del number
        return nn.Sequential(nn.Linear(HIDDEN, 24), nn.GELU(), nn.Linear(24, HIDDEN))

    (site,) = discover(traced(randomised(Weighted(plain)))).moes()
    assert (site.part.experts, site.part.shared, site.part.scoring) == (EXPERTS, (), "softmax")
