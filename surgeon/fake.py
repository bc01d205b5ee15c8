"""Weights without values: parameters with a shape, a type and a place, and no memory behind them.

A fake weight is a ``FakeTensor``.  Unlike a tensor on the meta device it says that it is on the device where the weight
would be, so that nothing but the weight itself differs from the model with its weights: what the model computes from its
buffers (rotary frequencies, position numbers, masks) keeps its values, and no ``meta`` enters the traced graph.  A model
of any size is built, traced and inspected in the memory of its graph; it cannot be run.

Example:
    >>> with surgeon.fake_weights():
    ...     model = MyTransformer(layers=80, width=8192)
    >>> structure = surgeon.discover(surgeon.trace(model, {"input_ids": ids}))
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from surgeon.copying import copied

_MODE = FakeTensorMode(allow_non_fake_inputs=True)
"""All fake weights of a process are of one mode: those of different modes do not compute with each other."""
_ALREADY = "_surgeon_fake"
"""Attribute of a parameter that was emptied, by which a second owner (tied weights) finds the empty one."""


@contextmanager
def fake_weights() -> Iterator[None]:
    """Inside, every parameter that a module registers loses its values, and is a fake weight on leaving; buffers stay.

    Until then it is on the meta device, which initialisers of weights know to leave alone.  A parameter is allocated by its
    module before it is registered and freed at once: memory that is not written to (``torch.empty``) is never taken from
    the system.
    """
    original = nn.Module.register_parameter
    places: list[tuple[weakref.ref[nn.Module], str]] = []

    def register_parameter(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        original(self, name, param)
        if param is None or _ours(param) or isinstance(param, nn.UninitializedParameter):
            return
        if _ALREADY not in param.__dict__:
            empty = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
            empty.__dict__[_ALREADY] = empty
            param.__dict__[_ALREADY] = empty
        self._parameters[name] = param.__dict__[_ALREADY]
        places.append((weakref.ref(self), name))

    nn.Module.register_parameter = register_parameter  # type: ignore[method-assign]  # put back below
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]
    fakes: dict[nn.Parameter, nn.Parameter] = {}
    for reference, name in places:
        module = reference()
        held = module._parameters.get(name) if module is not None else None
        if module is not None and held is not None and held.is_meta:
            if held not in fakes:
                fakes[held] = _parameter(held, held.dtype)
            module._parameters[name] = fakes[held]


def without_values(module: nn.Module) -> bool:
    """Whether a parameter of the module is fake or on the meta device."""
    return any(_valueless(parameter) for parameter in module.parameters())


def with_fake_weights(module: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """A copy of a module with fake weights that shares its buffers; the module itself where its weights are fake.

    Args:
        module: any module; buffers on the meta device become fake too (the values that they had are gone already).
        dtype: floating-point type of the copy's weights and buffers, None for their own.
    """
    parameters, buffers = list(module.parameters()), list(module.buffers())
    types = {tensor: _type(tensor, dtype) for tensor in [*parameters, *buffers]}
    fake = all(_ours(p) for p in parameters) and not any(_valueless(b) and not _ours(b) for b in buffers)
    if fake and all(tensor.dtype == wanted for tensor, wanted in types.items()):
        return module
    memo: dict[int, Any] = {}
    for parameter in parameters:
        memo[id(parameter)] = _parameter(parameter, types[parameter])
    for buffer in buffers:
        memo[id(buffer)] = _fake(buffer, types[buffer]) if _valueless(buffer) else buffer.to(types[buffer])
    return copied(module, memo)


def _parameter(parameter: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(_fake(parameter, dtype), requires_grad=parameter.requires_grad)


def _fake(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    device = "cpu" if tensor.device.type == "meta" else tensor.device
    with _MODE:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device=device)


def _type(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype


def _ours(tensor: Tensor) -> bool:
    return isinstance(tensor, FakeTensor) and tensor.fake_mode is _MODE


def _valueless(tensor: Tensor) -> bool:
    return isinstance(tensor, FakeTensor) or tensor.device.type == "meta"
