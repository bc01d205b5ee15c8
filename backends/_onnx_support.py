"""Which graphs can be lowered to ONNX Runtime, asked before any work is done."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx

import surgeon.ops  # noqa: F401  # registers torch.ops.surgeon
from surgeon.complex_numbers import without_rule
from surgeon.contract import Refusal
from surgeon.graph import Graph

OURS = frozenset({"surgeon::moe", "surgeon::attention", "surgeon::dequantize", "surgeon::fake_quantize_dynamic"})
"""Semantic operators that ``_onnx_lowering`` rewrites."""

DEQUANTIZE = torch.ops.surgeon.dequantize.default

NO_KERNELS = {
    "cpu": (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64, torch.complex128),
    "cuda": (torch.complex64, torch.complex128),
}
"""Types that a provider has (almost) no kernels for."""


def unsupported(graph: Graph, provider: str, opset: int) -> list[Refusal]:
    """Every reason why this graph cannot be lowered, one per operator and type."""
    found: dict[str, Refusal] = {}
    for node in graph.module.graph.nodes:
        if node.op == "call_function" and not _translates(node.target, opset):
            found.setdefault(
                str(node.target), Refusal(node.name, f"operator {node.target} has no ONNX translation at opset {opset}")
            )
    return [*without_kernels(graph, provider), *found.values()]


def without_kernels(graph: Graph, provider: str) -> list[Refusal]:
    """Types of this graph that the provider has no kernels for, one node of each."""
    found: dict[torch.dtype, Refusal] = {}
    for node in graph.module.graph.nodes:
        value = node.meta.get("val")
        for tensor in value if isinstance(value, tuple | list) else (value,):
            codes = node.op == "get_attr" and all(user.target is DEQUANTIZE for user in node.users)
            unknown = isinstance(tensor, torch.Tensor) and tensor.dtype in NO_KERNELS[provider] and not codes
            if unknown or _is_double_weight(graph, node):
                advice = (
                    f"write with pairs of real numbers what surgeon does not: {', '.join(without_rule(graph))}"
                    if tensor.is_complex()
                    else "trace the model in another type (model: {dtype: float32}, or dtype=\"float32\" from Python)"
                )
                reason = f"{tensor.dtype} has no kernels on provider {provider!r}; {advice}"
                found.setdefault(tensor.dtype, Refusal(node.name, reason, lasting=True))
    return list(found.values())


def _is_double_weight(graph: Graph, node: fx.Node) -> bool:
    """Whether a layer computes in float64: sums and products have kernels for it, and angles of positions may need it, but
    convolutions, activations, low-bit products and fused norms have none.
    """
    weight = node.op == "get_attr" and isinstance(graph.tensor(str(node.target)), torch.nn.Parameter)
    return (weight or node.target is DEQUANTIZE) and bool(node.meta["val"].dtype == torch.float64)


def _translates(target: Any, opset: int) -> bool:
    """Whether this backend or torch.onnx translates an operator, itself or after its decomposition."""
    if not isinstance(target, torch._ops.OpOverload):
        return is_of_python(target) or str(target) in _registered(opset)
    if target._schema.name in OURS:
        return True
    name = f"{target._schema.name}.{target._schema.overload_name}".rstrip(".")
    return name in _registered(opset) or target in _decomposed() or _is_composite(target)


def is_of_python(target: Any) -> bool:
    """Whether a node calls a function of Python on sizes."""
    return getattr(target, "__module__", "") in ("_operator", "math", "builtins")


@cache
def registry_of(opset: int) -> Any:
    """The exporter's registry of translations; there is no public one."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    with quiet():
        return ONNXRegistry.from_torchlib(max(opset, 18))


@cache
def _registered(opset: int) -> frozenset[str]:
    return frozenset(key if isinstance(key, str) else str(key) for key in registry_of(opset).functions)


@cache
def _decomposed() -> frozenset[Any]:
    return frozenset(torch.export.default_decompositions())


def _is_composite(target: torch._ops.OpOverload) -> bool:
    return target._can_decompose()


def rounding_response(graph: Graph) -> float:
    """Relative change of the outputs (Frobenius, the largest) when dynamically quantized values move by one rounding.

    Runs the graph as it is and with noise of 2^-23 of each such value, the size of a reordered sum; 0 where nothing is
    dynamically quantized.  The input is the example, repeated along its dynamic dimensions to 64 or what they allow:
    the more values there are, the more of them sit on a boundary.
    """
    from surgeon.source import size_of

    target = torch.ops.surgeon.fake_quantize_dynamic.default
    if not any(node.target == target for node in graph.module.graph.nodes):
        return 0.0
    generator = torch.Generator().manual_seed(0)

    class Noisy(fx.Interpreter):
        def call_function(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if function == target:
                noise = torch.randn(args[0].shape, generator=generator) * 2.0**-23
                args = ((args[0] * (1 + noise.to(args[0]))), *args[1:])
            return super().call_function(function, args, kwargs)

    sizes = {  # of a dimension that is a sum of others (past + sequence) those say the size
        name: max(graph.example[port.name].shape[axis], min(64, graph.dims[name].max or 64))
        for port in graph.inputs
        for axis, name in enumerate(port.shape)
        if isinstance(name, str) and name in graph.dims
    }
    inputs = []
    for port in graph.inputs:
        value = graph.example[port.name]
        for axis, name in enumerate(port.shape):
            if isinstance(name, str):
                rows = torch.arange(size_of(name, sizes, value.shape[axis])) % value.shape[axis]
                value = value.index_select(axis, rows)
        inputs.append(value)
    with torch.no_grad():
        plain: tuple[Tensor, ...] = graph.module(*inputs)
        moved: tuple[Tensor, ...] = Noisy(graph.module).run(*inputs)
    changes = [
        float((b - a).norm() / a.norm().clamp(min=torch.finfo(a.dtype).tiny))
        for a, b in zip(plain, moved, strict=True)
        if a.is_floating_point()
    ]
    return max(changes, default=0.0)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what the exporter says about itself and the caller can do nothing about; anything else comes through."""
    names = ("torch.onnx", "torch.onnx._internal.exporter._registration", "onnxscript", "onnx_ir")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\)", FutureWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"torch\.|onnxscript\.|copyreg")
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
