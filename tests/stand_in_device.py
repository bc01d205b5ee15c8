"""A device that is not the CPU, on a machine that has no other: tensors that live ``away`` compute on the CPU.

It holds code to what a GPU holds it to: tensors of two devices do not meet in one operation, but for numbers without
dimensions, copies, and indices of the CPU.  It is torch's hook for accelerators that are written in Python; what it sets up
holds for the whole process, so tests run in one of their own (:func:`run`).
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from surgeon.ops.attention import attention
from surgeon.ops.mixture import moe, moe_backward
from surgeon.ops.quantized import dequantize, fake_quantize_dynamic

NAME = "away"
FREE = 1 << 30
"""Bytes that the device says are free."""

_ACROSS = ("_to_copy", "copy_", "_copy_from", "set_", "_has_compatible_shallow_copy_type")
_INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")


_OPERATORS = {
    "attention": attention,
    "moe": moe,
    "moe_backward": moe_backward,
    "dequantize": dequantize,
    "fake_quantize_dynamic": fake_quantize_dynamic,
}


class Away(Tensor):
    """A tensor that says it is away; its numbers are in a tensor of the CPU."""

    _here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> Away:
        made: Away = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, here.size(), strides=here.stride(), storage_offset=here.storage_offset(), dtype=here.dtype, device=f"{NAME}:0"
        )
        made._here = here
        return made

    def tolist(self) -> Any:
        """As torch has it for every tensor but those of subclasses."""
        return self._here.tolist()

    def __matmul__(self, other: Tensor) -> Any:
        """A row times a matrix as torch does it, but for dropping the dimension in place."""
        return (self[None] @ other)[0] if self.dim() == 1 and other.dim() == 2 else super().__matmul__(other)

    def __getitem__(self, key: Any) -> Any:
        """Lists as indices by way of the CPU: making them here fails within torch."""
        parts = key if isinstance(key, tuple) else (key,)
        return super().__getitem__(tuple(torch.tensor(part) if isinstance(part, list) else part for part in parts))

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "surgeon":  # the operator's own Python, on tensors that are away
            return _OPERATORS[function._opname]._init_fn(*args, **(kwargs or {}))
        return _compute(function, args, kwargs or {})


def _compute(function: Any, args: Any, kwargs: Any) -> Any:
    name = function._schema.name.partition("::")[2]
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if name not in _ACROSS:
        met = tensors
        if name in _INDEXED:  # indices may be of the CPU
            met = [tensor for place, tensor in enumerate(tensors) if place == 0 or isinstance(tensor, Away)]
        met = [tensor for tensor in met if tensor.dim() > 0]
        if len({tensor.device for tensor in met}) > 1:
            places = ", ".join(f"{tensor.device} {list(tensor.shape)}" for tensor in tensors)
            raise RuntimeError(f"{function}: expected all tensors to be on the same device, found {places}")
    away = any(isinstance(tensor, Away) for tensor in (tensors[:1] if name in _INDEXED else tensors))
    if kwargs.get("device") is not None:
        away = torch.device(kwargs["device"]).type == NAME
        kwargs = {**kwargs, "device": torch.device("cpu")}
    elif name == "copy_" and not isinstance(args[0], Away):
        away = False
    found = function(*tree_map_only(Away, lambda x: x._here, args), **tree_map_only(Away, lambda x: x._here, kwargs))
    written = function._schema.arguments[0].alias_info if args else None
    if written is not None and written.is_write and isinstance(args[0], Away):
        assert args[0].shape == found.shape, f"{function} changes a shape in place, which the stand-in cannot"
        return args[0]  # the same tensor, not another of its numbers
    return tree_map_only(Tensor, Away, found) if away else found


class _Runtime:
    """What torch asks of the module of a device."""

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        return FREE, 2 * FREE


@cache
def install() -> None:
    """Let torch know the device, in this process."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend(NAME, _Runtime())
    library = torch.library.Library("_", "IMPL")
    library.fallback(lambda function, *args, **kwargs: _compute(function, args, kwargs), "PrivateUse1")
    ranges = torch.library.Library("aten", "IMPL")  # torch's own resizes its result in place
    for overload in ("arange", "arange.start", "arange.start_step"):
        ranges.impl(overload, lambda *args, device=None, **kwargs: Away(torch.arange(*args, **kwargs)), "PrivateUse1")
    install.libraries = (library, ranges)  # type: ignore[attr-defined]  # what they registered lives as long as they


def available() -> bool:
    """Whether this torch has the hook."""
    import torch.utils.backend_registration as registration

    return hasattr(registration, "_setup_privateuseone_for_python_backend")


@cache
def _process() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=install)


def run(function: Callable[..., Any], *args: Any) -> Any:
    """What a function of a module gives in a process that has the device."""
    return _process().submit(function, *args).result()
