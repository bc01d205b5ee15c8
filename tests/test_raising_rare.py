"""Rare mixtures: rows as columns, mapped functions, two mixtures in one sum, single neurons, numbers without an expert; and
what is not raised, or is no mixture of networks, with its reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgeon.accounting import parameter_count
from surgeon.discovery import discover
from surgeon.structure import MoE, Structure
from tests.families_moe import CHOSEN, EXPERTS, HIDDEN, INNER, randomised
from tests.test_raising import traced

HEADS = 4


class Residual(nn.Module):
    """``x + inner(norm(x))``, then a dense network in the same form."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.norm, self.inner, self.norm_2 = nn.LayerNorm(HIDDEN), inner, nn.LayerNorm(HIDDEN)
        self.ffn = nn.Sequential(nn.Linear(HIDDEN, 40), nn.GELU(), nn.Linear(40, HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.inner(self.norm(x))
        return x + self.ffn(self.norm_2(x))  # type: ignore[no-any-return]  # a module's call


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape))


def network(width: int = INNER) -> nn.Sequential:
    return nn.Sequential(nn.Linear(HIDDEN, width), nn.GELU(), nn.Linear(width, HIDDEN))


class Columns(nn.Module):
    """Gated experts with biases; weights are selected for every pair, and their rows multiply columns."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, EXPERTS)
        self.gate, self.gate_bias = parameter(EXPERTS, INNER, HIDDEN), parameter(EXPERTS, INNER)
        self.up, self.up_bias = parameter(EXPERTS, INNER, HIDDEN), parameter(EXPERTS, INNER)
        self.down, self.down_bias = parameter(EXPERTS, HIDDEN, INNER), parameter(EXPERTS, HIDDEN)

    def forward(self, h: Tensor) -> Tensor:
        x = h.reshape(-1, HIDDEN)
        values, index = self.router(x).topk(CHOSEN, -1)
        chosen, rows = index.flatten(), x.repeat_interleave(CHOSEN, 0).unsqueeze(-1)
        gate = torch.bmm(self.gate.index_select(0, chosen), rows).squeeze(-1) + self.gate_bias[chosen]
        up = torch.bmm(self.up.index_select(0, chosen), rows).squeeze(-1) + self.up_bias[chosen]
        inner = (F.gelu(gate, approximate="tanh") * up).unsqueeze(-1)
        y = torch.bmm(self.down.index_select(0, chosen), inner).squeeze(-1) + self.down_bias[chosen]
        return (y.view(-1, CHOSEN, HIDDEN) * values.softmax(-1).unsqueeze(-1)).sum(1).view_as(h)


class Mapped(nn.Module):
    """One expert's function, mapped over stacked weights."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, EXPERTS)
        self.up, self.down = parameter(EXPERTS, INNER, HIDDEN), parameter(EXPERTS, HIDDEN, INNER)

    def forward(self, h: Tensor) -> Tensor:
        x = h.reshape(-1, HIDDEN)
        every = torch.vmap(lambda up, down: F.linear(F.silu(F.linear(x, up)), down))(self.up, self.down)
        weight, index = self.router(x).softmax(-1).topk(CHOSEN, -1)
        chosen = every.transpose(0, 1).gather(1, index[..., None].expand(-1, -1, HIDDEN))
        return (chosen * weight[..., None]).sum(1).view_as(h)


class Grouped(nn.Module):
    """Two groups of three experts; the weight of one is its share in the group times the group's."""

    def __init__(self) -> None:
        super().__init__()
        self.outer, self.inner = nn.Linear(HIDDEN, 2), nn.ModuleList(nn.Linear(HIDDEN, 3) for _ in range(2))
        self.experts = nn.ModuleList(nn.ModuleList(network() for _ in range(3)) for _ in range(2))

    def forward(self, h: Tensor) -> Tensor:
        outer, out = self.outer(h).softmax(-1), torch.zeros_like(h)
        for group, experts in enumerate(self.experts):
            weight = self.inner[group](h).softmax(-1) * outer[..., group : group + 1]
            out = out + sum(weight[..., e, None] * expert(h) for e, expert in enumerate(experts))
        return out


class Retrieved(nn.Module):
    """Experts of one neuron each, found by keys that are pairs of halves (He 2024, arXiv:2407.04153), with several heads."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads, self.side = heads, 4
        self.query, self.keys = nn.Linear(HIDDEN, heads * 16), parameter(heads, 2, self.side, 8)
        self.up, self.down = nn.Embedding(self.side**2, HIDDEN), nn.Embedding(self.side**2, HIDDEN)

    def forward(self, h: Tensor) -> Tensor:
        query = self.query(h).view(*h.shape[:2], self.heads, 2, 8)
        scores, places = torch.einsum("bthpf,hpnf->bthpn", query, self.keys).topk(CHOSEN, -1)
        both = (scores[..., 0, :, None] + scores[..., 1, None, :]).flatten(-2)
        numbers = (places[..., 0, :, None] * self.side + places[..., 1, None, :]).flatten(-2)
        best, place = both.topk(CHOSEN, -1)
        index = numbers.gather(-1, place)
        inner = F.gelu(torch.einsum("btd,bthkd->bthk", h, self.up(index))) * best.softmax(-1)
        return torch.einsum("bthk,bthkd->btd", inner, self.down(index))


class Idle(nn.Module):
    """A loop over six experts of which the last two hand on what they read; one of two weights has places for all six."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, 6)
        self.both, self.down = parameter(6, 2 * INNER, HIDDEN), parameter(4, HIDDEN, INNER)

    def forward(self, h: Tensor) -> Tensor:
        x = h.reshape(-1, HIDDEN)
        weight, index = self.router(x).softmax(-1).topk(CHOSEN, -1)
        out, mask = torch.zeros_like(x), F.one_hot(index, 6).permute(2, 1, 0)
        for hit in (mask.sum((-1, -2)) > 0).nonzero():
            e = int(hit.item())
            place, token = torch.where(mask[e])
            rows = x[token]
            if e < 4:
                gate, up = F.linear(rows, self.both[e]).chunk(2, -1)
                rows = F.linear(F.silu(gate) * up, self.down[e])
            out.index_add_(0, token, rows * weight[token, place, None])
        return out.view_as(h)


class Reaching(nn.Module):
    """Every expert on every token, blanked where its share is less than the least of the best ones'."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(HIDDEN, EXPERTS), nn.ModuleList(network() for _ in range(EXPERTS))

    def forward(self, h: Tensor) -> Tensor:
        shares, out = self.router(h).softmax(-1), torch.zeros_like(h)
        least = shares.topk(CHOSEN, -1).values[..., -1:]
        for e, expert in enumerate(self.experts):
            share = shares[..., e : e + 1]
            out = out + torch.where(share >= least, share * expert(h), torch.zeros_like(h))
        return out


FORMS: dict[str, tuple[Callable[[], nn.Module], list[dict[str, Any]]]] = {
    "columns": (
        Columns,
        [{"experts": EXPERTS, "top_k": CHOSEN, "scoring": "topk_softmax", "gated": True, "activation": "gelu_tanh"}],
    ),
    "mapped": (Mapped, [{"experts": EXPERTS, "top_k": CHOSEN, "scoring": "softmax", "activation": "silu"}]),
    "reaching": (Reaching, [{"experts": EXPERTS, "top_k": EXPERTS, "scoring": "softmax", "masked": True}]),
    "grouped": (Grouped, [{"experts": 3, "top_k": 3, "width": INNER, "shared": ()}] * 2),
    "retrieved": (lambda: Retrieved(1), [{"experts": 16, "top_k": CHOSEN, "width": 1, "router": None}]),
    "retrieved by two heads": (lambda: Retrieved(2), [{"experts": 16, "top_k": 2 * CHOSEN, "width": 1}]),
    "idle": (Idle, [{"experts": 4, "top_k": CHOSEN, "activation": "silu", "masked": True}]),
}


def structured(inner: nn.Module) -> tuple[Structure, int]:
    """The structure, and how many of the model's parameters the graph does not hold."""
    module = randomised(Residual(inner))
    graph = traced(module)
    return discover(graph), sum(p.numel() for p in module.parameters()) - parameter_count(graph)


@pytest.mark.parametrize("name", FORMS)
def test_form_is_raised(name: str) -> None:
    make, expected = FORMS[name]
    structure, missing = structured(make())
    found: list[MoE] = [site.part for site in structure.moes()]
    assert [{key: getattr(part, key) for key in wanted} for part, wanted in zip(found, expected, strict=True)] == expected
    assert [region.kind for block in structure.blocks for region in block.regions] == ["moe", "ffn"]
    assert structure.unrecognised == {}
    assert missing == (2 * 2 * INNER * HIDDEN if name == "idle" else 0)  # what the idle experts have and nothing reads


class Twice(nn.Module):
    """All experts are computed once, and two rounds choose one of them each."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(HIDDEN, EXPERTS), nn.ModuleList(network() for _ in range(EXPERTS))

    def forward(self, h: Tensor) -> Tensor:
        left, out = self.router(h).softmax(-1), torch.zeros_like(h)
        every = torch.stack([expert(h) for expert in self.experts])
        for _ in range(2):
            weight, index = left.max(-1)
            hot = F.one_hot(index, EXPERTS).to(h.dtype)
            out = out + weight.unsqueeze(-1) * torch.einsum("bte,ebtd->btd", hot, every)
            left = left.masked_fill(hot.bool(), 0.0)
        return out


def test_weights_that_are_read_elsewhere_are_not_held_twice() -> None:
    structure, missing = structured(Twice())
    assert list(structure.moes()) == []
    assert missing == 0
    region = structure.blocks[0].regions[0]
    assert region.kind == "other"
    assert "read by" in str(region.reason)
    assert "outside of the mixture" in str(region.reason)


class Attending(nn.Module):
    """Attention whose heads may be weighted for each token: by a gate, or by what is selected among them."""

    def __init__(self, weigh: Callable[[Tensor], Tensor] | None) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.router, self.weigh = nn.Linear(HIDDEN, HEADS), weigh

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        if self.weigh is not None:
            y = y * self.weigh(self.router(x)).unsqueeze(-1)
        return self.o(y.flatten(-2))  # type: ignore[no-any-return]  # a module's call


def best(scores: Tensor) -> Tensor:
    weight, index = scores.softmax(-1).topk(CHOSEN, -1)
    return torch.zeros_like(scores).scatter(-1, index, weight)


def first(scores: Tensor) -> Tensor:
    return F.one_hot(scores.argmax(-1), HEADS).to(scores.dtype)


@pytest.mark.parametrize(("weigh", "selection"), [(None, ""), (torch.sigmoid, ""), (best, "topk"), (first, "argmax")])
def test_routed_heads_are_said(weigh: Callable[[Tensor], Tensor] | None, selection: str) -> None:
    structure, _ = structured(Attending(weigh))
    region = structure.blocks[0].regions[0]
    (attention,) = region.attention
    assert (attention.heads, attention.head_dim) == (HEADS, HIDDEN // HEADS)
    if selection:
        assert "are routed" in str(region.reason)
        assert f"what {selection}" in str(region.reason)
    else:
        assert region.reason is None


class Selected(nn.Module):
    """Queries and outputs of experts (Zhang et al. 2022, arXiv:2210.05144) over keys and values that they share."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.kv = nn.Linear(HIDDEN, EXPERTS), nn.Linear(HIDDEN, 16)
        self.queries, self.outputs = parameter(EXPERTS, HIDDEN, 8), parameter(EXPERTS, 8, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        weight, index = self.router(x).softmax(-1).topk(CHOSEN, -1)
        q = torch.einsum("btd,btkdf->bktf", x, self.queries[index])
        k, v = (part.unsqueeze(1).expand(-1, CHOSEN, -1, -1) for part in self.kv(x).chunk(2, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return torch.einsum("bktf,btkfd,btk->btd", y, self.outputs[index], weight)


def test_projections_of_experts_are_said() -> None:
    structure, _ = structured(Selected())
    region = structure.blocks[0].regions[0]
    assert region.kind == "attention"
    assert "may be selected among those of experts" in str(region.reason)
    assert "inner.outputs [4, 8, 32]" in str(region.reason)


class Bounded(nn.Module):
    """Four heads over two of keys and values, out of one matrix whose outputs are bounded before they are taken apart."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(HIDDEN, 2 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).clamp(min=-1, max=1).split([HIDDEN, HIDDEN // 2, HIDDEN // 2], -1)
        q, k, v = (part.unflatten(-1, (-1, HIDDEN // HEADS)).transpose(1, 2) for part in parts)
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        return self.o(y.flatten(-2))  # type: ignore[no-any-return]  # a module's call


def test_bounds_leave_rows_of_a_packed_projection_apart() -> None:
    structure, _ = structured(Bounded())
    (attention,) = structure.blocks[0].regions[0].attention
    assert (attention.heads, attention.kv_heads, attention.head_dim) == (HEADS, 2, HIDDEN // HEADS)
    rows = [None if part is None else part.rows for part in (attention.q, attention.k, attention.v)]
    assert rows == [(0, HIDDEN), (HIDDEN, HIDDEN + HIDDEN // 2), (HIDDEN + HIDDEN // 2, 2 * HIDDEN)]
