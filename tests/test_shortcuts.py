"""What counts as the shortcut of a sublayer, on modules with no library behind them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgeon.building import compile as compile_model
from surgeon.discovery import discover
from surgeon.structure import Structure
from surgeon.tracing import trace

IDS = torch.randint(0, 30, (2, 5), generator=torch.Generator().manual_seed(0))


class Attend(nn.Module):
    """Self-attention, spelled out over a mask where one is given."""

    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.qkv, self.o = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        if mask is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            for _ in range(20):  # a way from the hidden state that is longer than the one from mask to mask
                v = v.tanh()
            y = (q @ k.transpose(2, 3) + mask).softmax(-1) @ v
        return self.o(y.transpose(1, 2).flatten(2))


def ffn(width: int = 16) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 40), nn.GELU(), nn.Linear(40, width))


def found(module: nn.Module, **inputs: Tensor) -> Structure:
    return discover(trace(module.eval(), inputs))


# -- masks --------------------------------------------------------------------------------------------------------


class Masked(nn.Module):
    """Layers of one stack that all add one floating-point mask of full size to their scores."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(30, 16), nn.Linear(16, 30)
        self.attend, self.ffn = (nn.ModuleList(make() for _ in range(3)) for make in (Attend, ffn))
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(6))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.embed(ids)
        full = ((1 - mask.float()) * -1e4)[:, None, None].expand(-1, 2, ids.shape[1], -1)
        for index in range(3):
            x = self.norms[2 * index](x + self.attend[index](x, full))
            x = self.norms[2 * index + 1](x + self.ffn[index](x))
        out: Tensor = self.head(x)
        return out


def test_a_mask_that_every_layer_adds_is_no_shortcut() -> None:
    """Scores of the second layer are computed from the mask, by way of the first; the hidden state passes by all the same."""
    torch.manual_seed(0)
    structure = found(Masked(), ids=IDS, mask=torch.ones_like(IDS))
    assert [block.kind for block in structure.blocks] == ["attention+norm+ffn+norm"] * 3


# -- streams that a matrix mixes ----------------------------------------------------------------------------------


class Connected(nn.Module):
    """Hyper-connections over streams [batch, positions, streams, width]: ``M x + b f(a x)``.

    a, b and M are computed from the position; M is a parameter where it is ``constant``, and the
    identity where that is None.
    """

    def __init__(self, inner: nn.Module, constant: bool | None, streams: int = 4, width: int = 16) -> None:
        super().__init__()
        self.inner, self.streams, self.constant = inner, streams, constant
        self.norm = nn.RMSNorm(width)
        self.maps = nn.Linear(streams * width, streams * (streams + 2))
        self.start = nn.Parameter(torch.eye(streams))

    def forward(self, x: Tensor) -> Tensor:
        n = self.streams
        a, b, m = self.maps(x.flatten(2)).split([n, n, n * n], -1)
        m = self.start if self.constant else (m.unflatten(-1, (n, n)) + self.start).softmax(-1)
        y = self.inner(self.norm((a.sigmoid()[..., None] * x).sum(2)))
        mixed: Tensor = (x if self.constant is None else m @ x) + b.sigmoid()[..., None] * y[:, :, None]
        return mixed


class Streams(nn.Module):
    """Layers over four streams that start alike and are averaged in the end."""

    def __init__(self, constant: bool | None, skip: int | None = None) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(30, 16), nn.Linear(16, 30)
        self.layers = nn.ModuleList(
            nn.Sequential(Connected(Attend(), constant), Connected(ffn(), constant)) for _ in range(3)
        )
        self.skip = skip

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)[:, :, None].expand(-1, -1, 4, -1)
        for index, layer in enumerate(self.layers):
            x = x if index == self.skip else layer(x)
        out: Tensor = self.head(x.mean(2))
        return out


@pytest.mark.parametrize("constant", [False, True, None])
def test_streams_that_a_matrix_mixes_are_one_stream(constant: bool | None) -> None:
    torch.manual_seed(0)
    module = Streams(constant)
    structure = found(module, ids=IDS)
    assert [block.kind for block in structure.blocks] == ["attention+ffn"] * 3
    assert [site.part.width for site in structure.ffns()] == [40] * 3
    assert not structure.unrecognised
    dropped = compile_model(module, [{"drop_blocks": {"count": 1, "blocks": "1:2"}}], inputs={"ids": IDS}, backend=None,
                            calibration=[{"ids": IDS}], progress=False)  # fmt: skip
    module.skip = 1
    with torch.no_grad():
        assert torch.equal(dropped(ids=IDS)["output"], module(IDS))


# -- parts of a sum that are no sublayer --------------------------------------------------------------------------


def test_vectors_of_a_fused_sum_have_roles() -> None:
    """``addcmul(b, a, x) = b + a x`` before each sublayer, as affine transformations instead of norms have it."""

    class Affine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(30, 16)
            self.layers = nn.ModuleList(make() for _ in range(2) for make in (Attend, ffn))
            self.a = nn.ParameterList(torch.ones(1, 1, 16) for _ in range(4))
            self.b = nn.ParameterList(torch.zeros(1, 1, 16) for _ in range(4))

        def forward(self, ids: Tensor) -> Tensor:
            x = self.embed(ids)
            for layer, a, b in zip(self.layers, self.a, self.b, strict=True):
                x = x + layer(torch.addcmul(b, a, x))
            return x

    torch.manual_seed(0)
    structure = found(Affine(), ids=IDS)
    assert [block.kind for block in structure.blocks] == ["attention+ffn"] * 2
    assert not structure.unrecognised
    roles = [structure.roles[f"{name}.{index}"].split(".")[-2] for name in ("a", "b") for index in range(4)]
    assert roles == ["scale"] * 4 + ["bias"] * 4


@pytest.mark.parametrize("norm", [False, True])
def test_heads_of_projections_that_are_scaled_together(norm: bool) -> None:
    """Gains, or batch norms, between one matrix for query, key and value and the place where they part."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.o = nn.Linear(16, 64), nn.Linear(32, 16)
            self.gain = nn.BatchNorm1d(64) if norm else nn.Parameter(torch.rand(64))

        def forward(self, x: Tensor) -> Tensor:
            y = self.qkv(x)
            y = self.gain(y.flatten(0, 1)).view_as(y) if norm else y * self.gain
            q, k, v = y.unflatten(-1, (4, 16)).split([4, 4, 8], -1)
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            return self.o(((q @ k.transpose(2, 3) / 2).softmax(-1) @ v).transpose(1, 2).flatten(2))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(30, 16)
            self.layers = nn.ModuleList(make() for _ in range(2) for make in (Scaled, ffn))

        def forward(self, ids: Tensor) -> Tensor:
            x = self.embed(ids)
            for layer in self.layers:
                x = x + layer(x)
            return x

    torch.manual_seed(0)
    structure = found(Model(), ids=IDS)
    for site in structure.attentions():
        assert (site.part.heads, site.part.kv_heads, site.part.head_dim) == (4, 4, 4)
        parts = [part for part in (site.part.q, site.part.k, site.part.v) if part is not None]
        assert [part.out_features for part in parts] == [16, 16, 32]
        assert parts[0].index == tuple(16 * head + i for head in range(4) for i in range(4))


# -- learned scales and shifts ------------------------------------------------------------------------------------------


class Affine(nn.Module):
    """y = scale (x + shift) + f(norm x), with a scale and a shift of the shortcut that every sublayer learns."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(30, 16), nn.Linear(16, 30)
        self.parts = nn.ModuleList(make() for _ in range(3) for make in (Attend, ffn))
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(6))
        self.scale, self.shift = (nn.ParameterList(nn.Parameter(torch.randn(16)) for _ in range(6)) for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for part, norm, scale, shift in zip(self.parts, self.norms, self.scale, self.shift, strict=True):
            x = part(norm(x)) + scale * (x + shift)
        return self.head(x)


def test_a_shortcut_with_a_learned_scale_and_shift() -> None:
    structure = found(Affine(), ids=IDS)
    assert [block.kind for block in structure.blocks] == ["attention+ffn"] * 3
    assert not structure.unrecognised


class Unnormalised(Affine):
    """A learned scale and shift where others have a norm behind every sublayer: y = scale (x + f(x)) + shift."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for part, scale, shift in zip(self.parts, self.scale, self.shift, strict=True):
            x = scale * (x + part(x)) + shift
        return self.head(x)


def test_a_scale_and_a_shift_in_place_of_a_norm() -> None:
    structure = found(Unnormalised(), ids=IDS)
    assert [block.kind for block in structure.blocks] == ["attention+norm+ffn+norm"] * 3
    assert not structure.unrecognised


# -- sublayers of several sizes -----------------------------------------------------------------------------------------


class Divided(nn.Module):
    """Layers of two attentions and a network; the first attention is without the class token, as in video models."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(30, 16), nn.Linear(16, 30)
        self.layers = nn.ModuleList(nn.ModuleList([Attend(), Attend(), ffn()]) for _ in range(3))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for one, two, network in self.layers:  # type: ignore[misc]  # lists of modules
            rest = x[:, 1:]
            rest = rest + one(rest)
            token = x[:, :1]
            x = torch.cat([token, rest], 1) + torch.cat([token, two(rest)], 1)
            x = x + network(x)
        return self.head(x)


def test_a_layer_goes_on_where_a_token_is_put_aside() -> None:
    structure = found(Divided(), ids=IDS)
    assert [block.kind for block in structure.blocks] == ["attention+attention+ffn"] * 3


class Messages(nn.Module):
    """A token that is computed from the first position stands beside the others in the attention of its layer only."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(30, 16), nn.Linear(16, 30)
        self.layers = nn.ModuleList(nn.ModuleList([nn.Linear(16, 16), Attend(), Attend(), ffn()]) for _ in range(3))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for write, among, attend, network in self.layers:  # type: ignore[misc]  # lists of modules
            message = write(x[:, 0]).unsqueeze(0)  # those of the samples attend to each other
            message = (message + among(message)).transpose(0, 1)
            both = torch.cat([x, message], 1)
            x = (both + attend(F.layer_norm(both, (16,))))[:, : ids.shape[1]]
            x = x + network(F.layer_norm(x, (16,)))
        return self.head(x)


def test_a_token_beside_the_stream_belongs_to_the_attention_that_reads_it() -> None:
    structure = found(Messages(), ids=IDS)
    assert [block.kind for block in structure.blocks] == ["attention+ffn"] * 3
    assert [len(region.attention) for block in structure.blocks for region in block.regions] == [2, 0] * 3
    assert not structure.unrecognised


class Funnel(nn.Module):
    """Half of the positions, and queries from these to all that there were, in the middle layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(30, 16), nn.Linear(16, 30)
        self.layers = nn.ModuleList(nn.ModuleList([Queries(), ffn()]) for _ in range(3))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for number, (attend, network) in enumerate(self.layers):  # type: ignore[misc]  # lists of modules
            fewer = F.avg_pool1d(x.transpose(1, 2), 2).transpose(1, 2) if number == 1 else x
            x = fewer + attend(F.layer_norm(fewer, (16,)), F.layer_norm(x, (16,)))
            x = x + network(x)
        return self.head(x)


class Queries(nn.Module):
    """Attention of one tensor to another."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor, source: Tensor) -> Tensor:
        q, k, v = (p(t).unflatten(-1, (2, 8)).transpose(1, 2) for p, t in ((self.q, x), (self.k, source), (self.v, source)))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_queries_that_are_pooled_are_of_the_same_stream() -> None:
    structure = found(Funnel(), ids=IDS)
    assert [block.kind for block in structure.blocks] == ["attention+ffn"] * 3
    assert not any(attention.cross for block in structure.blocks for r in block.regions for attention in r.attention)
