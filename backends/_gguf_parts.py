"""What a decoder is made of, as far as llama.cpp's formats tell decoders apart; read off a graph by ``_gguf_reading``.

H is the width of the residual stream, D the size of one head.  Matrices are [out, in] as ``y = x W^T``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from surgeon.numerics import QuantizedTensor


@dataclass(frozen=True)
class Matrix:
    """A weight that is written, made when it is.

    Attributes:
        label: where it stands and what it is called in the graph, for messages.
        shape: [out, in], or [experts, out, in].
        make: the floats, in the graph's type.
        codes: what they are codes of, None for floats.
        rows: which output rows are meant, in their order; None for all.
        columns: which inputs are meant, in their order; None for all.
        picked: which matrices of a stack are meant, one several times where experts were merged; None for all.
        factor: every weight is multiplied by it.
        bias: [out], behind the product.
    """

    label: str
    shape: tuple[int, ...]
    make: Callable[[], Tensor]
    codes: QuantizedTensor | None = None
    rows: Tensor | None = None
    columns: Tensor | None = None
    picked: Tensor | None = None
    factor: float = 1.0
    bias: Tensor | None = None

    def dense(self) -> Tensor:
        """The weight as floats."""
        found = self.make()
        found = found if self.picked is None else found[self.picked]
        found = found if self.rows is None else found[..., self.rows, :]
        found = found if self.columns is None else found[..., self.columns]
        return found if self.factor == 1 else found * self.factor

    def apply(self, x: Tensor) -> Tensor:
        """``x W^T + b`` in float32, for x [..., in]."""
        found = x @ self.dense().float().mT
        return found if self.bias is None else found + self.bias.float()


def times(matrix: Matrix, factor: float) -> Matrix:
    """A product that is multiplied by a number."""
    bias = None if matrix.bias is None or factor == 1 else matrix.bias * factor
    return matrix if factor == 1 else replace(matrix, factor=factor * matrix.factor, bias=bias)


Kind = Literal["rms", "layer"]


@dataclass(frozen=True)
class Norm:
    """A normalisation over the last dimension: by the root of the mean square (``rms``), or LayerNorm (``layer``)."""

    kind: Kind
    eps: float
    weight: Tensor
    bias: Tensor | None = None

    def apply(self, x: Tensor) -> Tensor:
        """The norm in float32."""
        if self.kind == "layer":
            bias = None if self.bias is None else self.bias.float()
            return torch.nn.functional.layer_norm(x, x.shape[-1:], self.weight.float(), bias, self.eps)
        found = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight.float()
        return found if self.bias is None else found + self.bias.float()


@dataclass(frozen=True)
class Rotation:
    """Rotary positions: ``pairs`` [D / 2, 2] of a head's numbers are turned by ``angles`` [D / 2] per position.

    Pairs that are not turned have the angle 0.  ``doubt`` [D / 2] is how far an angle may be from what was measured.
    """

    pairs: Tensor
    angles: Tensor
    doubt: Tensor

    @property
    def turned(self) -> int:
        """How many pairs are turned."""
        return int((self.angles != 0).sum())

    def apply(self, x: Tensor, positions: Tensor) -> Tensor:
        """Turn x [..., positions, D]."""
        phase = positions[:, None].double() * self.angles.double()
        cos, sin = phase.cos().float(), phase.sin().float()
        first, second = x[..., self.pairs[:, 0]], x[..., self.pairs[:, 1]]
        result = x.clone()
        result[..., self.pairs[:, 0]] = first * cos - second * sin
        result[..., self.pairs[:, 1]] = second * cos + first * sin
        return result


@dataclass(frozen=True)
class AttentionPart:
    """Attention of one block: ``o softmax(scale q k^T) v``, causal.

    Attributes:
        site: its name.
        q, k, v, o: projections; rows of q and k are in the order of the graph's heads.
        heads, kv_heads, head_dim: sizes.
        scale: factor of the scores.
        rotation: of queries and keys, None where positions do not turn them.
        q_norm, k_norm: norms of queries and keys in front of the rotation.
        whole: these norms are over all heads at once instead of over each.
        pre, post: norms in front of it and behind it, within the residual.
        window: positions that a query looks back over, itself included; None for all.
    """

    site: str
    q: Matrix
    k: Matrix
    v: Matrix
    o: Matrix
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    rotation: Rotation | None = None
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    whole: bool = False
    pre: Norm | None = None
    post: Norm | None = None
    window: int | None = None


@dataclass(frozen=True)
class FeedForward:
    """A feed-forward network ``down(act(gate x) * up x)``, or ``down(act(up x))`` without a gate."""

    site: str
    up: Matrix
    down: Matrix
    gate: Matrix | None
    activation: str
    width: int
    pre: Norm | None = None
    post: Norm | None = None


Weights = Literal["softmax", "softmax_all"]


@dataclass(frozen=True)
class Mixture:
    """A mixture of experts whose k largest scores choose.

    Attributes:
        site: its name.
        router: [experts, H].
        up, gate, down: stacks [experts, out, in]; gate is None for plain experts.
        weights: ``softmax`` over the chosen scores, or ``softmax_all`` over all of them.
        shared: the FFN that every token passes through, or None.
        shared_gate: [1, H]; its sigmoid scales the shared FFN.
    """

    site: str
    router: Matrix
    up: Matrix
    down: Matrix
    gate: Matrix | None
    activation: str
    width: int
    experts: int
    top_k: int
    weights: Weights
    shared: FeedForward | None = None
    shared_gate: Matrix | None = None
    pre: Norm | None = None
    post: Norm | None = None


@dataclass(frozen=True)
class Layer:
    """One block."""

    attention: AttentionPart
    ffn: FeedForward | Mixture


@dataclass(frozen=True)
class Decoder:
    """A causal language model.

    Attributes:
        tokens: name of the input that holds the tokens.
        logits: name of the output.
        embedding: [vocabulary, H].
        positions: [positions, H], added to the embedding; None where there is no such table.
        embedding_norm: behind them.
        layers: the blocks.
        norm: behind the last one.
        head: [vocabulary, H].
        tied: head and embedding are one tensor.
        context: tokens that the model was made for.
        notes: what a reader of the report should know.
    """

    tokens: str
    logits: str
    embedding: Matrix
    positions: Matrix | None
    embedding_norm: Norm | None
    layers: tuple[Layer, ...]
    norm: Norm | None
    head: Matrix
    tied: bool
    context: int
    notes: list[str] = field(default_factory=list)
