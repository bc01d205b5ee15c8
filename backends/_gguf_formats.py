"""Architectures of llama.cpp, by what they compute, and which of them a decoder is.

llama.cpp has code for each architecture by its name; what that code computes, as of its build of 2026, is written down here.
Sources: ``src/models/*.cpp`` of https://github.com/ggml-org/llama.cpp, and the names of tensors in its ``gguf`` package.

Rotary positions turn neighbouring numbers of a head (``adjacent``) or numbers half a head apart (``halves``), by the angles
``base^(-2i/D) / factor_i``.  Which numbers of a head these are is a matter of order: queries and keys are written in the order
that the format wants, which leaves their products as they are.  A pair whose factor is 1e30 is not turned.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from surgeon.backends._gguf_parts import AttentionPart, Decoder, FeedForward, Matrix, Mixture, Norm, Rotation

STILL = 1e30
"""Factor of a pair that is not turned: float32 has no smaller angle that matters."""


@dataclass(frozen=True)
class Format:
    """One architecture.

    Attributes:
        name: what ``general.architecture`` says.
        norm: kind of its norms; LayerNorms have offsets.
        order: of the numbers that rotary positions turn, None where a table of positions is added instead.
        factors: rotary angles may be any, by ``rope_freqs.weight``.
        qk_norm: norms of queries and keys: over each ``head``, over all (``whole``), or none.
        placed: where norms are: in front of sublayers (``pre``) or behind them (``post``).
        activation: of feed-forward networks.
        gated: they have a gate.
        biases: what may have a bias.
        required: what must have one; zeros are written where it has none.
        experts: how experts are weighed, None for dense layers: ``softmax`` over the chosen, ``softmax_all`` over all, either.
        shared: the shared expert beside them: none, one behind a sigmoid (``gated``), or one without (``plain``).
        by_layer: heads and neurons may differ from layer to layer.
        grouped: query heads may share key/value heads.
        square: heads times their size are the hidden size.
        fused: queries, keys and values are one matrix.
        tied: the head may be left out where it is the embedding; ``must`` where it always is.
        scaled: the embedding is multiplied by the root of the hidden size.
        biased: queries, keys and values have biases; without any, another format is meant.
    """

    name: str
    norm: Literal["rms", "layer"] = "rms"
    order: Literal["adjacent", "halves"] | None = "halves"
    factors: bool = False
    qk_norm: Literal["head", "whole"] | None = None
    placed: Literal["pre", "post"] = "pre"
    activation: str = "silu"
    gated: bool = True
    biases: frozenset[str] = frozenset()
    required: frozenset[str] = frozenset()
    experts: Literal["softmax", "softmax_all", "either"] | None = None
    shared: Literal["gated", "plain"] | None = None
    by_layer: bool = False
    grouped: bool = True
    square: bool = False
    fused: bool = False
    tied: Literal["may", "never", "must"] = "may"
    scaled: bool = False
    biased: bool = False


_QKV = frozenset("qkv")
_ALL = frozenset({"q", "k", "v", "o", "gate", "up", "down"})
_PLAIN = frozenset({"q", "k", "v", "o", "up", "down"})

FORMATS = (
    Format("qwen2", biases=_QKV, required=_QKV, square=True, biased=True),
    Format("qwen3", qk_norm="head"),
    Format("qwen3moe", qk_norm="head", experts="softmax"),
    Format("olmo2", qk_norm="whole", placed="post", square=True, tied="never"),
    Format("olmoe", qk_norm="whole", experts="softmax_all", square=True, tied="never", grouped=False),
    Format("gemma", activation="gelu_tanh", tied="must", scaled=True),
    Format("llama", order="adjacent", factors=True, biases=_ALL),
    Format("llama", order="adjacent", factors=True, biases=_QKV | {"o"}, experts="softmax"),
    Format("deci", order="adjacent", factors=True, biases=_ALL, by_layer=True),
    Format("qwen2moe", biases=_QKV, experts="softmax_all", shared="gated", square=True, tied="never"),
    Format("bailingmoe", order="adjacent", factors=True, biases=_QKV, experts="either", shared="plain", tied="never"),
    Format("gpt2", norm="layer", order=None, activation="gelu_tanh", gated=False, biases=_PLAIN, required=_PLAIN, square=True,
           fused=True),
    Format("starcoder2", norm="layer", activation="gelu_tanh", gated=False, biases=_PLAIN, required=_PLAIN, square=True),
)  # fmt: skip
"""In the order in which they are tried: the first that fits is written."""


@dataclass(frozen=True)
class Problem:
    """Why a decoder is none of a format: the site, and what was found there."""

    site: str
    reason: str


@dataclass(frozen=True)
class Turning:
    """Rotary positions in a format's terms.

    Attributes:
        order: which number of a head comes at each place.
        base: the base of the angles.
        scale: factor of all angles.
        factors: what each angle is divided by, None where all are as the base says.
    """

    order: Tensor
    base: float = 10000.0
    scale: float = 1.0
    factors: Tensor | None = None


def turning(rotation: Rotation | None, size: int, format: Format) -> Turning | str:
    """Rotary positions of heads of ``size`` numbers in a format's terms, or what it cannot say of them."""
    if format.order is None:
        return Turning(torch.arange(size)) if rotation is None else "its queries and keys are turned by their positions"
    if size % 2:
        return f"its heads have {size} numbers, an odd one"
    if rotation is None:
        if not format.factors:
            return "its queries and keys are not turned by their positions"
        return Turning(torch.arange(size), factors=torch.full((size // 2,), STILL))
    by_angle = rotation.angles.argsort(descending=True, stable=True)
    pairs, angles, doubt = (each[by_angle] for each in (rotation.pairs, rotation.angles, rotation.doubt))
    order = pairs.flatten() if format.order == "adjacent" else pairs.T.flatten()
    found = _geometric(angles, doubt)
    if found is not None:
        return Turning(order, *found)
    if not format.factors:
        part = f"{rotation.turned} of {len(angles)} pairs of a head's numbers are turned"
        return part if not angles.all() else "positions turn queries and keys by angles that are no powers of one base"
    powers = 10000.0 ** (-torch.arange(len(angles), dtype=torch.float64) / len(angles))
    factors = torch.where(angles > 0, powers / angles.clamp(min=1e-300), STILL).clamp(max=STILL)
    return Turning(order, factors=factors.float())


def _geometric(angles: Tensor, doubt: Tensor) -> tuple[float, float] | None:
    """Base and scale of angles scale base^(-i / n) within what is doubtful, None where they are none."""
    count = len(angles)
    if not bool((angles > 0).all()):
        return None
    scale = 1.0 if abs(float(angles[0]) - 1) <= float(doubt[0]) else float(angles[0])
    if count == 1:
        return 10000.0, scale
    steps = torch.arange(count, dtype=torch.float64) / count
    sure = (doubt[1:] / angles[1:] / steps[1:]).argsort() + 1  # by how exactly each tells the base
    for place in sure[:8].tolist():
        base = (scale / float(angles[place])) ** float(1 / steps[place])
        for rounded in (float(f"{base:.2g}"), float(f"{base:.4g}"), base):
            if bool(((scale * rounded**-steps - angles).abs() <= doubt).all()):
                return rounded, scale
    return None


def choose(decoder: Decoder, architecture: str) -> Format | list[Problem]:
    """The first format that a decoder is of, or why it is of none: of the one that comes nearest.

    Args:
        decoder: what is written.
        architecture: name of the one that is wanted, or ``auto``.
    """
    mixed = any(isinstance(layer.ffn, Mixture) for layer in decoder.layers)
    tried: list[tuple[bool, int, list[Problem]]] = []
    for format in FORMATS:
        if architecture in ("auto", format.name):
            found = list(problems(decoder, format))
            if not found:
                return format
            tried.append((mixed != (format.experts is not None), len(found), found))
    return min(tried, key=lambda entry: entry[:2])[2]


def problems(decoder: Decoder, format: Format) -> Iterator[Problem]:
    """What keeps a decoder from being of a format."""
    first = decoder.layers[0].attention
    if (decoder.positions is None) != (format.order is not None):
        table = "a table of positions" if decoder.positions is not None else "no table of positions"
        yield Problem("embedding", f"it has {table}, {format.name} has {'none' if format.order is not None else 'one'}")
    if decoder.embedding_norm is not None:
        yield Problem("embedding", f"a norm stands behind the embedding, {format.name} has none there")
    if decoder.head.bias is not None:
        yield Problem("head", f"it has a bias, {format.name} has none there")
    if decoder.norm is None:
        yield Problem("final_norm", f"there is no norm in front of the head, {format.name} has one")
    root = math.sqrt(decoder.embedding.shape[1])
    if format.scaled and abs(decoder.embedding.factor / root - 1) > 1e-3:
        yield Problem("embedding", f"it is multiplied by {decoder.embedding.factor:g}, in {format.name} by {root:g}")
    if format.tied == "must" and (not decoder.tied or decoder.head.factor != 1):
        yield Problem("head", f"it is another matrix than the embedding, in {format.name} it is the same")
    yield from _norms(decoder, format)
    for layer in decoder.layers:
        yield from _attention(layer.attention, first, decoder.embedding.shape[1], decoder.context, format)
        if isinstance(layer.ffn, Mixture):
            yield from _mixture(layer.ffn, decoder, format)
        else:
            yield from _dense(layer.ffn, decoder, format)


def _norms(decoder: Decoder, format: Format) -> Iterator[Problem]:
    """Kinds, places and constants of norms: one constant for the whole model."""
    eps = None if decoder.norm is None else decoder.norm.eps
    named: list[tuple[str, Norm]] = [] if decoder.norm is None else [("final_norm", decoder.norm)]
    for layer in decoder.layers:
        attention = layer.attention
        for part in (attention, layer.ffn):
            for place, norm in (("pre", part.pre), ("post", part.post)):
                where = "in front of it" if place == "pre" else "behind it"
                if (norm is not None) != (place == format.placed):
                    stands = "a norm stands" if norm else "no norm stands"
                    yield Problem(part.site, f"{stands} {where}, otherwise in {format.name}")
                elif norm is not None:
                    named.append((part.site, norm))
        sides = (("q", attention.q_norm), ("k", attention.k_norm))
        named += [(f"{attention.site}.{side}", norm) for side, norm in sides if norm]
    for site, norm in named:
        if norm.kind != format.norm:
            yield Problem(site, f"its norm is {_KINDS[norm.kind]}, in {format.name} {_KINDS[format.norm]}")
        elif norm.kind == "rms" and norm.bias is not None:
            yield Problem(site, f"its norm has an offset, none has one in {format.name}")
        elif norm.eps != eps:
            yield Problem(site, f"its norm adds {norm.eps:g} to the mean square, the last one {eps:g}; {format.name} {_ONE}")


_ONE = "has one number for all layers"
_KINDS = {"rms": "an RMS norm", "layer": "a LayerNorm"}


def _attention(part: AttentionPart, first: AttentionPart, hidden: int, context: int, format: Format) -> Iterator[Problem]:
    for what in ("heads", "kv_heads"):
        found, usual = getattr(part, what), getattr(first, what)
        if found != usual and not format.by_layer:
            kind = "query heads" if what == "heads" else "key/value heads"
            yield Problem(part.site, f"it has {found} {kind}, {first.site} {usual}; {format.name} {_ONE}")
    if part.head_dim != first.head_dim:
        yield Problem(part.site, f"its heads have {part.head_dim} numbers, those of {first.site} {first.head_dim}")
    if part.v.shape[0] != part.kv_heads * part.head_dim:
        yield Problem(part.site, f"its values have other sizes than its keys ({part.v.shape[0] // part.kv_heads} a head)")
    if format.square and part.heads * part.head_dim != hidden:
        yield Problem(part.site, f"{part.heads} heads of {part.head_dim} are not the hidden size {hidden}, as in {format.name}")
    turned, usual_turn = (turning(each.rotation, each.head_dim, format) for each in (part, first))
    if isinstance(turned, str):
        yield Problem(part.site, f"{turned}, otherwise in {format.name}")
    elif isinstance(usual_turn, Turning) and not _equal(turned, usual_turn):
        yield Problem(part.site, f"positions turn queries and keys by other angles than in {first.site}; {format.name} {_ONE}")
    normed = None if part.q_norm is None else "whole" if part.whole else "head"
    if normed != format.qk_norm:
        yield Problem(part.site, f"queries and keys have {_QK[normed]}, in {format.name} {_QK[format.qk_norm]}")
    if part.heads != part.kv_heads and not format.grouped:
        yield Problem(part.site, f"{part.heads} query heads share {part.kv_heads} key/value heads, none do in {format.name}")
    if part.window is not None and part.window < context:
        yield Problem(
            part.site, f"its queries look back over {part.window} positions of the {context} that the model was made for, in "
            f"{format.name} over all"
        )  # fmt: skip
    for key in ("q", "k", "v", "o"):
        if getattr(part, key).bias is not None and key not in format.biases:
            yield Problem(f"{part.site}.{key}", f"it has a bias, none in {format.name}")
    if format.fused and len({_bits(getattr(part, key)) for key in "qkv"}) > 1:
        yield Problem(part.site, f"its projections have different bits, in {format.name} they are one matrix")
    if format.biased and all(getattr(part, key).bias is None for key in "qkv"):
        yield Problem(part.site, f"its projections have no biases, they have in {format.name}")


_QK: dict[str | None, str] = {None: "no norms", "head": "a norm over each head", "whole": "a norm over all heads"}


def _bits(matrix: Matrix) -> tuple[int, int, bool] | None:
    codes = matrix.codes
    return None if codes is None else (codes.bits, codes.group, codes.zero_point is None)


def _equal(one: Turning, other: Turning) -> bool:
    if not torch.equal(one.order, other.order):
        return False
    if (one.factors is None) != (other.factors is None):
        return False
    if one.factors is not None and other.factors is not None:
        return bool(torch.allclose(one.factors, other.factors, rtol=1e-5))
    return math.isclose(one.base, other.base, rel_tol=1e-6) and math.isclose(one.scale, other.scale, rel_tol=1e-5)


def _dense(part: FeedForward, decoder: Decoder, format: Format) -> Iterator[Problem]:
    if format.experts is not None:
        mixed = [layer.ffn.site for layer in decoder.layers if isinstance(layer.ffn, Mixture)]
        beside = f"{mixed[0]} is a mixture" if mixed else "it is no mixture"
        yield Problem(part.site, f"{beside}, and {format.name} has experts in every layer: put them into all layers, or none")
        return
    yield from _network(part, format)
    first = next(layer.ffn for layer in decoder.layers if isinstance(layer.ffn, FeedForward))
    if part.width != first.width and not format.by_layer:
        yield Problem(part.site, f"it has {part.width} neurons, {first.site} {first.width}; {format.name} {_ONE}")


def _network(part: FeedForward | Mixture, format: Format) -> Iterator[Problem]:
    if (part.gate is not None) != format.gated:
        yield Problem(part.site, f"it has {'a' if part.gate is not None else 'no'} gate, otherwise in {format.name}")
    if part.activation != format.activation:
        yield Problem(part.site, f"its activation is {part.activation}, {format.activation} in {format.name}")
    for key in ("up", "down", "gate"):
        found = getattr(part, key)
        if found is not None and found.bias is not None and key not in format.biases:
            yield Problem(f"{part.site}.{key}", f"it has a bias, none in {format.name}")


def _mixture(part: Mixture, decoder: Decoder, format: Format) -> Iterator[Problem]:
    if format.experts is None:
        yield Problem(part.site, f"it is a mixture of experts, {format.name} has none")
        return
    yield from _network(part, format)
    first = next(layer.ffn for layer in decoder.layers if isinstance(layer.ffn, Mixture))
    for what, found, usual in (
        ("experts", part.experts, first.experts),
        ("chosen experts", part.top_k, first.top_k),
        ("neurons per expert", part.width, first.width),
        ("neurons of a shared expert", 0 if part.shared is None else part.shared.width,
         0 if first.shared is None else first.shared.width),
    ):  # fmt: skip
        if found != usual:
            yield Problem(part.site, f"it has {found} {what}, {first.site} {usual}; {format.name} {_ONE}")
    free = part.top_k == part.experts and format.experts != "either"  # both softmaxes are the same over all
    if format.experts not in ("either", part.weights) and not free:
        how = {"softmax": "a softmax of the chosen scores", "softmax_all": "a softmax of all scores"}
        yield Problem(part.site, f"its experts are weighed by {how[part.weights]}, in {format.name} by {how[format.experts]}")
    kind = None if part.shared is None else "plain" if part.shared_gate is None else "gated"
    if kind is not None and kind != format.shared and not (kind == "plain" and format.shared == "gated"):
        behind = " behind a gate" if kind == "gated" else ""
        yield Problem(part.site, f"it has a shared expert{behind}, {format.name} has not")
    if part.shared is not None:
        yield from _network(part.shared, format)
        if part.shared.up.bias is not None or part.shared.down.bias is not None:
            yield Problem(part.site, f"its shared expert has biases, none in {format.name}")
