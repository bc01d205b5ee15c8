"""Streams that start at learned tensors: decoders of queries, latents that read an input, and what only these are read by."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgeon.discovery import discover
from surgeon.structure import Attention, Block, Structure
from surgeon.tracing import trace

WIDTH, INNER, HEADS, TOKENS, QUERIES = 32, 48, 4, 6, 5
X = torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(3))


def found(module: nn.Module, x: Tensor = X) -> Structure:
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.1)
    return discover(trace(module.eval(), {"x": x}))


def described(block: Block) -> list[tuple[str, int] | str]:
    """The parts of a block: an attention by its query projection and heads, an FFN by its width."""
    parts: list[tuple[str, int] | str] = []
    for region in block.regions:
        parts += [(name(part), part.heads) for part in region.attention]
        parts += [f"ffn {part.width}" for part in region.ffn]
    return parts


def name(attention: Attention) -> str:
    """Of an attention, as the modules here name its projections; all four have to be there."""
    found = [part.weight.split(".") for part in (attention.q, attention.k, attention.v, attention.o) if part]
    assert [path[-2] for path in found] == ["q", "k", "v", "o"]
    (module,) = {".".join(path[:-2]) for path in found}
    return f"{'cross' if attention.cross else 'self'} {module}"


class Attend(nn.Module):
    """Attention of several heads with codes of positions, spelled out as products and a softmax, or as one operator."""

    def __init__(self, *, spelled: bool) -> None:
        super().__init__()
        self.spelled = spelled
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor, memory: Tensor, places: Tensor | None = None, memory_places: Tensor | None = None) -> Tensor:
        q = self.q(x if places is None else x + places)
        k = self.k(memory if memory_places is None else memory + memory_places)
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (q, k, self.v(memory)))
        if self.spelled:
            mixed = (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(-1) @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v)
        return self.o(mixed.transpose(1, 2).flatten(2))


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, INNER), nn.GELU(), nn.Linear(INNER, WIDTH))


class Decoder(nn.Module):
    """Three layers of self-attention among learned queries, attention to a memory, and a network.

    The queries start at zeros or at their positions; what the first self-attention computes, no input leads to.
    """

    def __init__(self, *, spelled: bool, norm_first: bool, zeros: bool) -> None:
        super().__init__()
        self.norm_first, self.zeros = norm_first, zeros
        self.queries = nn.Parameter(torch.zeros(QUERIES, WIDTH))
        self.start, self.end = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 7)
        self.own, self.cross = (nn.ModuleList(Attend(spelled=spelled) for _ in range(3)) for _ in range(2))
        self.networks = nn.ModuleList(network() for _ in range(3))
        self.norms = nn.ModuleList(nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        memory = self.start(x)
        places = self.queries.expand(memory.shape[0], -1, -1)
        x = torch.zeros_like(places) if self.zeros else places
        for own, cross, net, norms in zip(self.own, self.cross, self.networks, self.norms, strict=True):
            for sublayer, norm in zip((own, cross, net), norms, strict=True):
                h = norm(x) if self.norm_first else x
                read = {own: (h, h, places, places), cross: (h, memory, places), net: (h,)}[sublayer]
                x = x + sublayer(*read) if self.norm_first else norm(x + sublayer(*read))
        return self.end(x)


@pytest.mark.parametrize("spelled", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("zeros", [False, True])
def test_a_decoder_from_learned_queries_starts_with_cross_attention(spelled: bool, norm_first: bool, zeros: bool) -> None:
    module = Decoder(spelled=spelled, norm_first=norm_first, zeros=zeros)
    structure = found(module)
    assert len(structure.streams) == 1
    assert [described(block) for block in structure.blocks] == [
        [("cross cross.0", HEADS), f"ffn {INNER}"],
        [("self own.1", HEADS), ("cross cross.1", HEADS), f"ffn {INNER}"],
        [("self own.2", HEADS), ("cross cross.2", HEADS), f"ffn {INNER}"],
    ]
    assert structure.unrecognised == {}
    assert set(structure.roles) >= set(dict(module.named_parameters()))
    assert structure.roles["cross.0.q.weight"] == "blocks.0.attention.q.weight"
    assert {structure.roles[f"own.0.{key}.weight"].partition(".")[0] for key in "qkvo"} == {"projection"}
    assert structure.roles["queries"].partition(".")[0] == ("attention" if zeros else "latent")
    assert structure.roles["norms.0.0.weight"] == "embedding_norm.weight"  # in front of the blocks
    assert structure.roles["norms.0.1.weight"] == "blocks.0.norm.0.weight"


class Resampler(nn.Module):
    """Two layers in which latents attend to an input, alone or with the latents beside it, and a network."""

    def __init__(self, *, spelled: bool, joined: bool) -> None:
        super().__init__()
        self.joined = joined
        self.latents = nn.Parameter(torch.zeros(QUERIES, WIDTH))
        self.start, self.end = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 7)
        self.reads = nn.ModuleList(Attend(spelled=spelled) for _ in range(2))
        self.networks = nn.ModuleList(network() for _ in range(2))
        self.norms = nn.ModuleList(nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        memory = self.start(x)
        latents = self.latents.repeat(memory.shape[0], 1, 1)
        for read, net, (before, keys, between) in zip(self.reads, self.networks, self.norms, strict=True):
            h, m = before(latents), keys(memory)
            latents = latents + read(h, torch.cat((m, h), 1) if self.joined else m)
            latents = latents + net(between(latents))
        return self.end(latents)


@pytest.mark.parametrize("spelled", [False, True])
@pytest.mark.parametrize("joined", [False, True])
def test_latents_that_read_an_input_are_a_stream_of_attention(spelled: bool, joined: bool) -> None:
    module = Resampler(spelled=spelled, joined=joined)
    structure = found(module)
    kind = "self" if joined else "cross"  # keys of the latents among them are no longer those of another stream
    assert [described(block) for block in structure.blocks] == [
        [(f"{kind} reads.{n}", HEADS), f"ffn {INNER}"] for n in range(2)
    ]
    assert structure.unrecognised == {}
    assert set(structure.roles) >= set(dict(module.named_parameters()))
    assert structure.roles["latents"] == "latent.0"
    for n in range(2):
        held = {role.split(".")[2] for key, role in structure.roles.items() if key.startswith((f"norms.{n}.", f"reads.{n}."))}
        assert held == {"attention", "norm"}


class Tables(nn.Module):
    """Attention whose scores have a term of the keys and learned, projected positions: these are no queries of it."""

    def __init__(self) -> None:
        super().__init__()
        self.places, self.place_q = nn.Parameter(torch.zeros(TOKENS, WIDTH)), nn.Linear(WIDTH, WIDTH)
        self.attends = nn.ModuleList(Attend(spelled=True) for _ in range(2))
        self.networks = nn.ModuleList(network() for _ in range(2))
        self.start = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.start(x)
        for a, net in zip(self.attends, self.networks, strict=True):
            parts = (a.q(x), a.k(x), a.v(x), self.place_q(self.places)[None])
            q, k, v, r = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in parts)
            scores = r @ k.transpose(-1, -2) + q @ k.transpose(-1, -2)
            x = x + a.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
            x = x + net(x)
        return x


def test_learned_positions_beside_the_scores_are_no_queries() -> None:
    structure = found(Tables())
    assert [described(block) for block in structure.blocks] == [
        [(f"self attends.{n}", HEADS), f"ffn {INNER}"] for n in range(2)
    ]
    assert structure.unrecognised == {}


class Returned(nn.Module):
    """Learned queries that are also returned, sent through a projection: that reads them first."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder, self.points = Decoder(spelled=True, norm_first=False, zeros=True), nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.points(self.decoder.queries).sigmoid(), self.decoder(x)


def test_learned_tensors_that_are_returned_too_have_roles() -> None:
    structure = found(Returned())
    assert structure.unrecognised == {}
    assert structure.roles["points.weight"].startswith("projection.")


class Fresh(nn.Module):
    """Convolutions with a gain behind them that is zero, as many models start."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv1d(WIDTH, WIDTH, 3, padding=1) for _ in range(3))
        self.register_buffer("gain", torch.zeros(WIDTH, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        for convolution in self.convolutions:
            x = x + convolution(x).relu() * self.gain
        return x


def test_what_a_zero_gain_multiplies_mixes_positions_all_the_same() -> None:
    assert [block.kind for block in found(Fresh()).blocks] == ["mixer"] * 3
