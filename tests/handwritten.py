"""Transformers written by hand, without a library: spellings of attention, of feed-forward networks, and norm placements.

Every attention takes and returns [batch, sequence, WIDTH] and has HEADS heads; ``QUERY_GROUPS`` says how many key/value heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HEADS, SIZE, INNER, VOCABULARY = 32, 4, 8, 48, 50


def causal(scores: Tensor) -> Tensor:
    """Scores with the future masked out; the last two dimensions are queries and keys."""
    length = scores.shape[-1]
    return scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), float("-inf"))


class Apart(nn.Module):
    """Four projections, one scaled-dot-product attention."""

    kv_heads = HEADS

    def __init__(self) -> None:
        super().__init__()
        self.a, self.d = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)
        self.b, self.c = (nn.Linear(WIDTH, self.kv_heads * SIZE, bias=False) for _ in range(2))

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, HEADS, S, SIZE], k and v [B, kv_heads, S, SIZE]."""
        q, k, v = (layer(x).unflatten(-1, (-1, SIZE)).transpose(1, 2) for layer in (self.a, self.b, self.c))
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        return self.d(F.scaled_dot_product_attention(*self.heads(x), is_causal=True).transpose(1, 2).flatten(2))


class GroupedKernel(Apart):
    """Grouped queries by the kernel's own switch."""

    kv_heads = 2

    def forward(self, x: Tensor) -> Tensor:
        found = F.scaled_dot_product_attention(*self.heads(x), is_causal=True, enable_gqa=True)
        return self.d(found.transpose(1, 2).flatten(2))


class Repeated(Apart):
    """Grouped queries by repetition of keys and values."""

    kv_heads = 2

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        k, v = (t.repeat_interleave(HEADS // self.kv_heads, dim=1) for t in (k, v))
        return self.d((causal(q @ k.mT / math.sqrt(SIZE)).softmax(-1) @ v).transpose(1, 2).reshape(x.shape))


class OneKey(Apart):
    """All queries share one key/value head, by broadcasting."""

    kv_heads = 1

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        return self.d((causal(q @ k.mT * SIZE**-0.5).softmax(-1) @ v).transpose(1, 2).reshape(x.shape))


class GroupedEinsum(Apart):
    """Grouped queries in five dimensions, nothing repeated."""

    kv_heads = 2

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        q = q.unflatten(1, (self.kv_heads, -1))
        weights = causal(torch.einsum("bgrqd,bgkd->bgrqk", q, k) / math.sqrt(SIZE)).softmax(-1)
        return self.d(torch.einsum("bgrqk,bgkd->bqgrd", weights, v).flatten(2))


class Products(Apart):
    """Softmax between two four-dimensional products."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        scores = causal(torch.matmul(q, k.permute(0, 1, 3, 2)) / math.sqrt(SIZE))
        return self.d((F.softmax(scores, dim=-1) @ v).permute(0, 2, 1, 3).contiguous().view(x.shape))


class KeysFirst(Apart):
    """Products the other way round: scores [keys, queries], softmax over the first of them."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        weights = (k @ q.mT / math.sqrt(SIZE)).softmax(-2)
        return self.d((v.mT @ weights).permute(0, 3, 1, 2).flatten(2))


class BatchedHeads(Apart):
    """Batch and heads in one dimension, bmm and baddbmm with a positional bias."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.flatten(0, 1) for t in self.heads(x))
        length = x.shape[1]
        bias = -(torch.arange(length)[:, None] - torch.arange(length)).abs().to(x.dtype)
        scores = torch.baddbmm(bias.expand(q.shape[0], -1, -1), q, k.mT, alpha=1 / math.sqrt(SIZE))
        return self.d(torch.bmm(scores.softmax(-1), v).unflatten(0, (-1, HEADS)).transpose(1, 2).flatten(2))


class Einsum(Apart):
    """Einsums with the heads in the third place."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (HEADS, SIZE)) for layer in (self.a, self.b, self.c))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(SIZE)
        return self.d(torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2))


class OwnSoftmax(Apart):
    """The softmax written with exp and sum."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        scores = causal(q @ k.mT / math.sqrt(SIZE))
        weights = torch.exp(scores - scores.amax(-1, keepdim=True))
        weights = weights / weights.sum(-1, keepdim=True)
        return self.d((weights @ v).transpose(1, 2).flatten(2))


class Rectified(Apart):
    """Squared rectified scores over the length instead of a softmax."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        weights = torch.relu(q @ k.mT / math.sqrt(SIZE)).square() / x.shape[1]
        return self.d((weights @ v).transpose(1, 2).flatten(2))


class Rotary(Apart):
    """Rotary positions on complex numbers' halves, a norm on queries and keys, a soft cap on the scores."""

    def __init__(self) -> None:
        super().__init__()
        self.n, self.m = nn.RMSNorm(SIZE), nn.RMSNorm(SIZE)

    @staticmethod
    def rotate(x: Tensor) -> Tensor:
        angle = torch.arange(x.shape[-2])[:, None] * 0.1 ** torch.arange(SIZE // 2)
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1).flatten(-2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        q, k = self.rotate(self.n(q)), self.rotate(self.m(k))
        scores = 5 * torch.tanh(q @ k.mT / 5)
        return self.d((causal(scores).softmax(-1) @ v).transpose(1, 2).flatten(2))


class SlicedHeads(Apart):
    """A loop over the heads, each a slice of the projections."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.a(x), self.b(x), self.c(x)
        found = []
        for head in range(HEADS):
            part = slice(head * SIZE, (head + 1) * SIZE)
            scores = q[..., part] @ k[..., part].mT / math.sqrt(SIZE)
            found.append(causal(scores).softmax(-1) @ v[..., part])
        return self.d(torch.cat(found, -1))


class OwnHeads(nn.Module):
    """Every head is a module with projections of its own."""

    kv_heads = HEADS

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(
            nn.ModuleList(nn.Linear(WIDTH, SIZE, bias=False) for _ in range(3)) for _ in range(HEADS)
        )
        self.d = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        found = []
        for part in self.parts:
            q, k, v = (layer(x) for layer in part)  # type: ignore[operator, union-attr]  # a list of linears
            found.append(causal(q @ k.mT * SIZE**-0.5).softmax(-1) @ v)
        return self.d(torch.cat(found, -1))


class Chunked(nn.Module):
    """One projection [q | k | v]."""

    kv_heads = HEADS

    def __init__(self) -> None:
        super().__init__()
        self.all, self.d = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, SIZE)).transpose(1, 2) for t in self.all(x).chunk(3, dim=-1))
        return self.d(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Unbound(Chunked):
    """One projection [3, heads, size]."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.all(x).reshape(*x.shape[:2], 3, HEADS, SIZE).permute(2, 0, 3, 1, 4).unbind(0)
        return self.d((((q * SIZE**-0.5) @ k.mT).softmax(-1) @ v).transpose(1, 2).reshape(x.shape))


class PerHead(Chunked):
    """One projection [heads, 3, size]."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.all(x).view(*x.shape[:2], HEADS, 3, SIZE).transpose(1, 2).unbind(-2)
        return self.d(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class ThreeTensors(nn.Module):
    """One parameter [3, heads, width, size], read by einsum; the output is projected by einsum too."""

    kv_heads = HEADS

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.empty(3, HEADS, WIDTH, SIZE))
        self.o = nn.Parameter(torch.empty(HEADS, SIZE, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("bsw,hwd->bhsd", x, w) for w in self.w)
        weights = causal(q @ k.mT * SIZE**-0.5).softmax(-1)
        return torch.einsum("bhsd,hdw->bsw", weights @ v, self.o)


class Library(nn.Module):
    """torch's own multi-head attention."""

    kv_heads = HEADS

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x, x, need_weights=False)[0]


class LibraryWeights(Library):
    """The same where it computes its maps too, sequence first."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(WIDTH, HEADS)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        return self.inner(x, x, x, need_weights=True)[0].transpose(0, 1)


# -- feed-forward networks ----------------------------------------------------------------------------------------


class Plain(nn.Module):
    """down(act(up(x)))."""

    activation = "gelu"

    def __init__(self, function: Callable[[Tensor], Tensor] = F.gelu) -> None:
        super().__init__()
        self.p, self.q, self.function = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH), function

    def forward(self, x: Tensor) -> Tensor:
        return self.q(self.function(self.p(x)))


class Gated(nn.Module):
    """down(act(gate(x)) * up(x))."""

    def __init__(self, function: Callable[[Tensor], Tensor] = F.silu) -> None:
        super().__init__()
        self.p, self.g, self.q = nn.Linear(WIDTH, INNER), nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.q(self.p(x) * self.function(self.g(x)))


class Halves(nn.Module):
    """One projection [up | gate], split by torch's glu."""

    def __init__(self) -> None:
        super().__init__()
        self.p, self.q = nn.Linear(WIDTH, 2 * INNER, bias=False), nn.Linear(INNER, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.q(F.glu(self.p(x), -1))


class Alternating(nn.Module):
    """One projection with up and gate in turns, plain products."""

    def __init__(self) -> None:
        super().__init__()
        self.p, self.q = nn.Parameter(torch.empty(WIDTH, 2 * INNER)), nn.Parameter(torch.empty(INNER, WIDTH))
        self.b = nn.Parameter(torch.empty(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        both = x @ self.p
        up, gate = both[..., ::2], both[..., 1::2]
        return (up * gate * torch.sigmoid(gate)) @ self.q + self.b


class Snake(Plain):
    """An activation of nobody's table, with a learned frequency."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.empty(1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.p(x)
        return self.q(h + torch.sin(self.a * h).square() / self.a)


class Pointwise(nn.Module):
    """Convolutions of size one over the sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.p, self.q = nn.Conv1d(WIDTH, INNER, 1), nn.Conv1d(INNER, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.q(F.relu(self.p(x.mT))).mT


class Normed(Gated):
    """A norm in front of the last projection."""

    def __init__(self) -> None:
        super().__init__()
        self.n = nn.LayerNorm(INNER)

    def forward(self, x: Tensor) -> Tensor:
        return self.q(self.n(F.silu(self.g(x)) * self.p(x)))


# -- blocks -------------------------------------------------------------------------------------------------------


class OwnNorm(nn.Module):
    """Root-mean-square norm in single operations."""

    def __init__(self) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.empty(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6) * self.g


class Sublayers(nn.Module):
    """An attention and a feed-forward network with four norms and two scales, for the placements below."""

    def __init__(self, attention: nn.Module, ffn: nn.Module) -> None:
        super().__init__()
        self.attention, self.ffn = attention, ffn
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(self.norms_used))
        self.scales = nn.ParameterList(torch.empty(WIDTH) for _ in range(self.scales_used))

    norms_used, scales_used = 2, 0


class Before(Sublayers):
    """x + f(norm(x))."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norms[0](x))
        return x + self.ffn(self.norms[1](x))


class After(Sublayers):
    """norm(x + f(x))."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.norms[0](x + self.attention(x))
        return self.norms[1](x + self.ffn(x))


class InsideAfter(Sublayers):
    """x + norm(f(x))."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.norms[0](self.attention(x))
        return x + self.norms[1](self.ffn(x))


class Sandwich(Sublayers):
    """x + norm(f(norm(x)))."""

    norms_used = 4

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.norms[1](self.attention(self.norms[0](x)))
        return x + self.norms[3](self.ffn(self.norms[2](x)))


class Scaled(Sublayers):
    """x + scale * f(norm(x)) with learned vectors, written in the other order."""

    scales_used = 2

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention(self.norms[0](x)) * self.scales[0] + x
        return self.ffn(self.norms[1](x)) * self.scales[1] + x


class Weighted(Sublayers):
    """norm(2 x + f(x) / 2): residual scaling."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.norms[0](x * 2.0 + 0.5 * self.attention(x))
        return self.norms[1](torch.add(self.ffn(x), x, alpha=2))


class SideBySide(Sublayers):
    """x + attention(norm(x)) + ffn(norm(x))."""

    norms_used = 1

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[0](x)
        return x + self.attention(y) + self.ffn(y)


class SideBySideApart(Sublayers):
    """The same with a norm for each, summed the other way round."""

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(self.norms[0](x)) + self.ffn(self.norms[1](x)) + x


class Bare(Sublayers):
    """No norms at all; the sublayer's learned scalar starts it off."""

    norms_used, scales_used = 0, 2

    def __init__(self, attention: nn.Module, ffn: nn.Module) -> None:
        super().__init__(attention, ffn)
        self.scales = nn.ParameterList(torch.empty(()) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.scales[0] * self.attention(x)
        return x + self.scales[1] * self.ffn(x)


class Model(nn.Module):
    """Embeddings with learned positions, blocks, a norm and a tied head."""

    def __init__(
        self,
        block: type[Sublayers] = Before,
        attention: Callable[[], nn.Module] = Apart,
        ffn: Callable[[], nn.Module] = Plain,
        layers: int = 2,
    ) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Parameter(torch.empty(64, WIDTH))
        self.blocks = nn.ModuleList(block(attention(), ffn()) for _ in range(layers))
        self.end = OwnNorm()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.places[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.end(x) @ self.words.weight.T


class Torch(nn.Module):
    """torch's own encoder stack."""

    def __init__(self, *, before: bool, layers: int = 2) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, INNER, activation="gelu", batch_first=True, norm_first=before)
        self.stack = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        return self.head(self.stack(self.words(ids), mask=mask, is_causal=True))


ATTENTIONS = (
    Apart,
    GroupedKernel,
    Repeated,
    OneKey,
    GroupedEinsum,
    Products,
    KeysFirst,
    BatchedHeads,
    Einsum,
    OwnSoftmax,
    Rectified,
    Rotary,
    SlicedHeads,
    OwnHeads,
    Chunked,
    Unbound,
    PerHead,
    Library,
    LibraryWeights,
)
NETWORKS = (
    (Gated, "separate", "silu"),
    (Halves, "concatenated", "sigmoid"),
    (Alternating, "interleaved", "silu"),
    (Normed, "separate", "silu"),
    (Snake, "plain", None),
)
"""Classes with the layout and the activation that they have."""
PLACEMENTS = (
    (After, "attention+norm+ffn+norm"),
    (InsideAfter, "attention+ffn"),
    (Sandwich, "attention+ffn"),
    (Scaled, "attention+ffn"),
    (Weighted, "attention+norm+ffn+norm"),
    (SideBySide, "parallel"),
    (SideBySideApart, "parallel"),
    (Bare, "attention+ffn"),
)
"""Classes with the kind of their blocks."""
