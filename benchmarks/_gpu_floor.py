"""Sizes of the GPU benchmark, and the bytes that a step of decoding cannot avoid to read."""

from __future__ import annotations

from dataclasses import dataclass

import torch

STEPS = 8
"""Steps of decoding that are timed together: a text goes on without waiting for each token to reach the host."""


@dataclass(frozen=True)
class Shape:
    """Sizes of the model and of the cells."""

    hidden: int = 4096
    width: int = 14336
    heads: int = 32
    kv_heads: int = 8
    experts: int = 8
    top_k: int = 2
    layers: int = 4
    vocabulary: int = 32000
    prefill: int = 2048
    batches: tuple[int, ...] = (1, 16)
    group: int = 128
    dtype: str = "bfloat16"
    device: str = "cuda"
    caches: str = "shared"  # of aotinductor

    @property
    def head_dim(self) -> int:
        """Size of one head."""
        return self.hidden // self.heads


@dataclass(frozen=True)
class Cell:
    """One figure."""

    phase: str
    batch: int
    length: int

    @property
    def steps(self) -> int:
        """Runs of the model in one that is timed."""
        return STEPS if self.phase == "decode" else 1


def cells(shape: Shape) -> list[Cell]:
    return [Cell("prefill", 1, shape.prefill), *(Cell("decode", batch, shape.prefill) for batch in shape.batches)]


def layers_and_experts(shape: Shape, variant: str) -> tuple[int, int]:
    layers = shape.layers - round(shape.layers * 0.25) if "dropped" in variant else shape.layers
    return layers, 4 if variant == "merged" else shape.experts


def weight_bytes(shape: Shape, variant: str, experts_read: float) -> float:
    """Bytes of the weights of one step that reads so many experts per layer; embedding rows are not counted."""
    layers, choices = layers_and_experts(shape, variant)[0], shape.experts
    element = getattr(torch, shape.dtype).itemsize
    linear = 0.5 + element / shape.group if "int4" in variant else float(element)  # bytes per weight, with its scale
    attention = shape.hidden * shape.head_dim * (2 * shape.heads + 2 * shape.kv_heads)
    expert = 3 * shape.hidden * shape.width
    router = shape.hidden * choices * element
    return layers * (linear * (attention + experts_read * expert) + router) + linear * shape.hidden * shape.vocabulary


def experts_hit(shape: Shape, variant: str, tokens: int) -> float:
    """Expected number of experts that some of ``tokens`` independent tokens choose, each top_k of all at random.

    Merged experts stand for two choices each: one is hit unless both of its choices are missed.
    """
    count, k = shape.experts, shape.top_k
    each = count // layers_and_experts(shape, variant)[1]
    missed = 1.0
    for drawn in range(k):  # k draws without repetition all miss these `each` choices
        missed *= (count - each - drawn) / (count - drawn)
    return count / each * (1 - missed**tokens)


def floor_bytes(shape: Shape, variant: str, cell: Cell) -> float:
    """Bytes that one decode step cannot avoid to read."""
    layers, _ = layers_and_experts(shape, variant)
    caches = 2 * layers * cell.batch * cell.length * shape.kv_heads * shape.head_dim * getattr(torch, shape.dtype).itemsize
    return weight_bytes(shape, variant, experts_hit(shape, variant, cell.batch)) + caches
