"""Forms of parts that one rule each finds: scaled neurons, learned queries, sampled positions, short convolutions, skips."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgeon.discovery import discover
from surgeon.errors import PlanError
from surgeon.mixtures import refuse_ffn
from surgeon.structure import Structure
from surgeon.tracing import trace

WIDTH, INNER, TOKENS = 32, 48, 6
IDS = torch.arange(12).reshape(2, TOKENS)
X = torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(3))


def found(module: nn.Module, **inputs: Tensor) -> Structure:
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.1)
    return discover(trace(module.eval(), inputs))


class Attend(nn.Module):
    """One head of attention, over ``memory`` where there is one."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        memory = x if memory is None else memory
        return self.o(F.scaled_dot_product_attention(self.q(x), self.k(memory), self.v(memory)))


class Gated(nn.Module):
    """silu(a g) * (b u) with learned vectors a and b, normalised or not, before the last matrix."""

    def __init__(self, *, normed: bool) -> None:
        super().__init__()
        self.normed = normed
        self.gate, self.up, self.down = nn.Linear(WIDTH, INNER), nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)
        self.a, self.b = nn.Parameter(torch.ones(INNER)), nn.Parameter(torch.ones(INNER))

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.silu(self.gate(x) * (self.a * 3.0)) * (self.up(x) * self.b)
        return self.down(F.normalize(hidden, dim=-1) if self.normed else hidden)


class Layers(nn.Module):
    """Blocks of an attention and a network over tokens."""

    def __init__(self, networks: list[nn.Module]) -> None:
        super().__init__()
        self.table, self.end = nn.Embedding(20, WIDTH), nn.Linear(WIDTH, 20)
        self.attend = nn.ModuleList(Attend() for _ in networks)
        self.networks = nn.ModuleList(networks)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        for attend, network in zip(self.attend, self.networks, strict=True):
            x = x + attend(F.rms_norm(x, (WIDTH,)))
            x = x + network(F.rms_norm(x, (WIDTH,)))
        return self.end(x)


@pytest.mark.parametrize("normed", [False, True])
def test_learned_vectors_scale_neurons(normed: bool) -> None:
    structure = found(Layers([Gated(normed=normed) for _ in range(2)]), ids=IDS)
    assert [block.kind for block in structure.blocks] == ["attention+ffn"] * 2
    for number, site in enumerate(structure.ffns()):
        ffn = site.part
        assert (ffn.activation, ffn.width, ffn.scaled, ffn.normed) == ("silu", INNER, True, normed)
        assert ffn.gate is not None
        assert ffn.gate.weight == f"networks.{number}.gate.weight"
    assert structure.unrecognised == {}


def test_neurons_that_something_else_scales_are_not_taken_apart() -> None:
    torch.manual_seed(0)
    graph = trace(Layers([Gated(normed=False)]).eval(), {"ids": IDS})
    (site,) = discover(graph).ffns()
    with pytest.raises(PlanError, match="learned vector"):
        refuse_ffn("moefy_ffn", graph, site.name, site.part)


class Star(nn.Module):
    """s max(x, 0)^2 + b with learned s and b between two matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)
        self.s, self.b = nn.Parameter(torch.tensor(0.9)), nn.Parameter(torch.tensor([-0.4]))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.s * F.relu(self.up(x)) ** 2 + self.b)


def test_learned_numbers_of_an_activation_are_part_of_its_name() -> None:
    torch.manual_seed(0)
    graph = trace(Layers([Star(), Star()]).eval(), {"ids": IDS})
    structure = discover(graph)
    assert [(f.part.activation, f.part.scaled) for f in structure.ffns()] == [("relu2(scale=0.9,shift=-0.4)", True)] * 2
    with pytest.raises(PlanError, match="learned numbers"):
        refuse_ffn("moefy_ffn", graph, "blocks.0.ffn", next(iter(structure.ffns())).part)


class PerLayer(Layers):
    """A third sublayer in each layer, whose neurons are multiplied by an embedding of the token for that layer."""

    def __init__(self) -> None:
        super().__init__([nn.Sequential(nn.Linear(WIDTH, INNER), nn.ReLU(), nn.Linear(INNER, WIDTH)) for _ in range(2)])
        self.own = nn.Embedding(20, 2 * 16)
        self.near = nn.Linear(WIDTH, 2 * 16)
        self.enter, self.leave = (nn.ModuleList(nn.Linear(*sizes) for _ in range(2)) for sizes in ((WIDTH, 16), (16, WIDTH)))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        own = (self.own(ids) + self.near(x)).unflatten(-1, (2, 16))
        for number, (attend, network) in enumerate(zip(self.attend, self.networks, strict=True)):
            x = x + attend(F.rms_norm(x, (WIDTH,)))
            x = x + network(F.rms_norm(x, (WIDTH,)))
            x = x + F.rms_norm(self.leave[number](F.gelu(self.enter[number](x)) * own[:, :, number]), (WIDTH,))
        return self.end(x)


def test_embeddings_for_each_layer_scale_neurons() -> None:
    structure = found(PerLayer(), ids=IDS)
    assert [block.kind for block in structure.blocks] == ["attention+ffn+ffn"] * 2
    assert [(f.part.width, f.part.activation, f.part.scaled) for f in structure.ffns()] == [
        (INNER, "relu", False), (16, "gelu", True)
    ] * 2  # fmt: skip
    assert structure.unrecognised == {}


class Queries(nn.Module):
    """A decoder from learned queries, or from tokens that are always the same, over a memory; the first layer has no input."""

    def __init__(self, *, attends_first: bool) -> None:
        super().__init__()
        self.attends_first = attends_first
        self.start, self.end = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 5)
        self.queries = nn.Parameter(torch.randn(4, WIDTH))
        self.own, self.cross = (nn.ModuleList(Attend() for _ in range(2)) for _ in range(2))
        self.networks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, INNER), nn.ReLU(), nn.Linear(INNER, WIDTH)) for _ in range(2)
        )

    def forward(self, memory: Tensor) -> Tensor:
        memory = self.start(memory)
        x = self.queries.expand(memory.shape[0], -1, -1)
        for number in range(2):
            if self.attends_first:
                x = x + self.own[number](x)
            x = x + self.cross[number](x, memory)
            x = x + self.networks[number](x)
        return self.end(x)


@pytest.mark.parametrize("attends_first", [False, True])
def test_queries_that_are_learned_have_a_projection(attends_first: bool) -> None:
    structure = found(Queries(attends_first=attends_first), memory=X)
    crossed = [site.part for site in structure.attentions() if site.part.cross]
    assert [part.q.weight if part.q else None for part in crossed] == [f"cross.{n}.q.weight" for n in range(2)]
    assert structure.unrecognised == {}


class Marked(Layers):
    """Tokens, or where a mark says so the projection of a value that is zero so far."""

    def __init__(self) -> None:
        super().__init__([nn.Sequential(nn.Linear(WIDTH, INNER), nn.ReLU(), nn.Linear(INNER, WIDTH)) for _ in range(2)])
        self.value = nn.Linear(7, WIDTH, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        given = self.value(torch.zeros(1, 1, 7))
        x = torch.where((ids == 3)[..., None], given, self.table(ids))
        for attend, network in zip(self.attend, self.networks, strict=True):
            x = x + attend(F.rms_norm(x, (WIDTH,)))
            x = x + network(F.rms_norm(x, (WIDTH,)))
        return self.end(x)


def test_a_projection_of_constants_has_a_role() -> None:
    structure = found(Marked(), ids=IDS)
    assert structure.roles["value.weight"].startswith("projection")
    assert structure.unrecognised == {}


class Sampling(nn.Module):
    """Queries look at few places of a map, which they compute: deformable attention."""

    def __init__(self) -> None:
        super().__init__()
        self.values, self.places, self.shares, self.out = (
            nn.Linear(WIDTH, size) for size in (WIDTH, 6, 3, WIDTH)
        )

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        image = self.values(memory).transpose(1, 2).unflatten(-1, (2, 3))
        grid = torch.tanh(self.places(x)).unflatten(-1, (3, 2))
        taken = F.grid_sample(image, grid, align_corners=False)
        return self.out((taken * self.shares(x).softmax(-1)[:, None]).sum(-1).transpose(1, 2))


class Detector(nn.Module):
    """Layers of self-attention among queries, sampling of a memory, and a network."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.end, self.ask = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 5), nn.Linear(WIDTH, WIDTH)
        self.own, self.sample = nn.ModuleList(Attend() for _ in range(3)), nn.ModuleList(Sampling() for _ in range(3))
        self.networks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, INNER), nn.ReLU(), nn.Linear(INNER, WIDTH)) for _ in range(3)
        )

    def forward(self, queries: Tensor, memory: Tensor) -> Tensor:
        x, memory = self.ask(queries), self.start(memory)
        for own, sample, network in zip(self.own, self.sample, self.networks, strict=True):
            x = x + own(x)
            x = x + sample(x, memory)
            x = x + network(x)
        return self.end(x)


def test_places_that_are_sampled_from_another_tensor_make_a_mixer() -> None:
    structure = found(Detector(), queries=X[:, :4], memory=X)
    assert [block.kind for block in structure.blocks] == ["attention+mixer+ffn"] * 3
    assert "places" in str(structure.blocks[0].regions[1].reason)


class Short(nn.Module):
    """``y = x + c(x)``, c a causal convolution of each feature."""

    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Conv1d(WIDTH, WIDTH, 3, groups=WIDTH, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.c(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)


class Smoothed(Layers):
    """Short convolutions with shortcuts of their own behind keys, values, the attention and the network."""

    def __init__(self) -> None:
        super().__init__([nn.Sequential(nn.Linear(WIDTH, INNER), nn.ReLU(), nn.Linear(INNER, WIDTH)) for _ in range(3)])
        self.short = nn.ModuleList(nn.ModuleList(Short() for _ in range(4)) for _ in range(3))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        for attend, network, (keys, values, one, two) in zip(self.attend, self.networks, self.short, strict=True):
            y = F.rms_norm(x, (WIDTH,))
            q, k, v = attend.q(y), keys(attend.k(y)), values(attend.v(y))
            x = x + one(attend.o(F.scaled_dot_product_attention(q, k, v)))
            x = x + two(network(F.rms_norm(x, (WIDTH,))))
        return self.end(x)


def test_shortcuts_around_convolutions_inside_of_a_layer_are_parts_of_it() -> None:
    (stream,) = found(Smoothed(), ids=IDS).streams
    assert len(stream.blocks) == 3
    assert [[len(region.attention) for region in block.regions] for block in stream.blocks] == [[1, 0]] * 3
    assert [[ffn.width for region in block.regions for ffn in region.ffn] for block in stream.blocks] == [[INNER]] * 3


class Skipping(nn.Module):
    """Four experts and a fifth choice that is none: a token that takes it passes by."""

    def __init__(self, top_k: int) -> None:
        super().__init__()
        self.top_k, self.router = top_k, nn.Linear(WIDTH, 5, bias=False)
        self.w_in, self.w_out = nn.Parameter(torch.randn(4, INNER, WIDTH)), nn.Parameter(torch.randn(4, WIDTH, INNER))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        weight, index = self.router(flat).softmax(-1).topk(self.top_k)
        skipped = index == 4
        weight, index = weight.masked_fill(skipped, 0.0), index.masked_fill(skipped, 0)
        hidden = torch.relu(torch.einsum("tkih,th->tki", self.w_in[index], flat))
        return torch.einsum("tkhi,tki,tk->th", self.w_out[index], hidden, weight).reshape(x.shape)


@pytest.mark.parametrize("top_k", [1, 2])
def test_a_router_may_know_a_choice_of_no_expert(top_k: int) -> None:
    structure = found(Layers([Skipping(top_k) for _ in range(2)]), ids=IDS)
    assert [block.kind for block in structure.blocks] == ["attention+moe"] * 2
    for number, site in enumerate(structure.moes()):
        moe = site.part
        assert moe.router is not None
        assert (moe.router.weight, moe.router.out_features) == (f"networks.{number}.router.weight", 5)
        assert (moe.experts, moe.top_k, moe.scoring, moe.normalised) == (4, top_k, "softmax", False)
    assert structure.unrecognised == {}


class Recurrent(Layers):
    """A recurrent layer in front of the head."""

    def __init__(self) -> None:
        super().__init__([nn.Sequential(nn.Linear(WIDTH, INNER), nn.ReLU(), nn.Linear(INNER, WIDTH)) for _ in range(2)])
        self.last = nn.LSTM(20, 7, num_layers=2, batch_first=True)

    def forward(self, ids: Tensor) -> Tensor:
        return self.last(super().forward(ids))[0]


def test_weights_of_a_recurrent_layer_behind_the_blocks_have_roles() -> None:
    structure = discover(trace(Recurrent().eval(), {"ids": IDS}, dynamic={"ids": None}))
    assert structure.roles["last.weight_hh_l1"] == "recurrence.0.5"
    assert structure.unrecognised == {}


class PerPosition(nn.Module):
    """A network whose neurons are multiplied by one learned number per position, of a length that is fixed."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)
        self.positions = nn.Parameter(torch.ones(TOKENS, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x) + self.positions))


def test_numbers_per_position_between_linears_leave_the_activation_open() -> None:
    torch.manual_seed(0)
    model = Layers([PerPosition(), PerPosition()]).eval()
    structure = discover(trace(model, {"ids": IDS}, dynamic={"ids": {0: "batch"}}))
    assert [site.part.activation for site in structure.ffns()] == [None, None]
