"""The semantic operators.

``surgeon::moe``, ``surgeon::attention``, ``surgeon::dequantize``, ``surgeon::fake_quantize_dynamic``.

Each is one node of a graph whatever spelling the source model used, with an eager reference that is fast (nothing loops
over tokens), a shape rule for symbolic shapes (``torch.export`` with dynamic dimensions), an explicit backward, and a
decomposition to ATen.  Importing this package registers them; a graph's node has the target
``torch.ops.surgeon.<name>.default``.

A decomposition is needed wherever Python is absent: a compiled package cannot call an operator registered from Python.

Example:
    >>> exported = exported.run_decompositions(DECOMPOSITIONS)  # only ATen is left
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from surgeon.numerics import quantization
from surgeon.ops.attention import attend, attention
from surgeon.ops.mixture import moe, moe_backward, moe_dense, moe_gathered, moe_grouped, moe_sorted
from surgeon.ops.quantized import dequantize, fake_quantize_dynamic

DECOMPOSITIONS: dict[torch._ops.OpOverload, Callable[..., Any]] = {
    torch.ops.surgeon.moe.default: moe_dense,
    torch.ops.surgeon.attention.default: attend,
    torch.ops.surgeon.dequantize.default: quantization.dequantize,
    torch.ops.surgeon.fake_quantize_dynamic.default: quantization.fake_quantize_dynamic,
}
"""ATen form of every operator, for ``ExportedProgram.run_decompositions``.  For decoding a token at a time,
``{**DECOMPOSITIONS, torch.ops.surgeon.moe.default: moe_gathered}`` reads only the selected experts."""

__all__ = [
    "DECOMPOSITIONS",
    "attend",
    "attention",
    "dequantize",
    "fake_quantize_dynamic",
    "moe",
    "moe_backward",
    "moe_dense",
    "moe_gathered",
    "moe_grouped",
    "moe_sorted",
]
