"""Telling rounding from error: whether two ways to compute one thing agree in float64 where they differ in float32."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, float32, float64, nn

LARGEST = 1 << 30
"""Most bytes of float32 weights that are held in float64 too for a comparison, 1 GiB."""


def fits_in_float64(*modules: nn.Module) -> bool:
    """Whether the modules' weights are few enough to be held in float64 for a while."""
    return sum(tensor.nbytes for tensor in _tensors(modules)) <= LARGEST


@contextmanager
def in_float64(*modules: nn.Module) -> Iterator[None]:
    """The modules' float32 parameters and buffers in float64 for a while; afterwards the same memory as before.

    What a module converts to float32 by itself stays float32, so that results may still be rounded in places.
    """
    tensors = _tensors(modules)
    data = [tensor.data for tensor in tensors]
    try:
        for tensor, value in zip(tensors, data, strict=True):
            tensor.data = value.to(float64)
        yield
    finally:
        for tensor, value in zip(tensors, data, strict=True):
            tensor.data = value


def widened(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inputs with float64 in place of float32."""
    return {name: tensor.to(float64) if tensor.dtype == float32 else tensor for name, tensor in inputs.items()}


def _tensors(modules: tuple[nn.Module, ...]) -> list[Tensor]:
    found = {id(t): t for module in modules for t in (*module.parameters(), *module.buffers()) if t.dtype == float32}
    return list(found.values())
