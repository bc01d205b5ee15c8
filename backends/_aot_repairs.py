"""What torch before 2.13 writes in C++ that does not compile, put right while a package is compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def compilable() -> Iterator[None]:
    """Let torch before 2.13 compile packages; later ones are left as they are."""
    if torch.__version__ >= "2.13":  # compared as versions are
        yield
        return
    with _bounds_behind_indices(), _eight_bit_floats_declared(), _grouped_products_called():
        yield


@contextmanager
def _bounds_behind_indices() -> Iterator[None]:
    """Check an index where it has been computed, not before.

    A kernel's loads stand before its computations.  An index that the computations hold already, such as a key's position
    within a mask, must be checked among them, as newer versions do.
    """
    from torch._inductor.codegen.cpp import CppKernel
    from torch._inductor.codegen.cpp_utils import cexpr

    def repaired(before: Callable[..., None]) -> Callable[..., None]:
        def check_bounds(self: Any, expr: Any, size: Any, lower: bool, upper: bool) -> None:
            loads = self.loads
            if self.cse.try_get(cexpr(self.rename_indexing(expr))) is not None:
                self.loads = self.compute
            try:
                before(self, expr, size, lower, upper)
            finally:
                self.loads = loads

        return check_bounds

    with _replaced(CppKernel, "check_bounds", repaired):
        yield


@contextmanager
def _eight_bit_floats_declared() -> Iterator[None]:
    """Include the header of 8-bit floats where kernels are called: their declarations name the type."""
    from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu

    def repaired(before: Callable[..., None]) -> Callable[..., None]:
        def write_header(self: Any) -> None:
            before(self)
            self.header.splice("#include <c10/util/Float8_e4m3fn.h>")

        return write_header

    with _replaced(CppWrapperCpu, "write_header", repaired):
        yield


@contextmanager
def _grouped_products_called() -> Iterator[None]:
    """Call the operator of grouped products: before 2.12 torch writes a call of a C function that it does not have."""
    from torch._inductor import lowering
    from torchgen.aoti.fallback_ops import inductor_fallback_ops

    operator = torch.ops.aten._grouped_mm.default
    if str(operator) in inductor_fallback_ops or operator not in lowering.lowerings:
        yield
        return
    before = lowering.lowerings[operator]
    lowering.lowerings[operator] = lowering.fallback_handler(operator, add_to_fallback_set=False)  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        lowering.lowerings[operator] = before


@contextmanager
def _replaced(owner: type, name: str, repaired: Callable[[Any], Any]) -> Iterator[None]:
    """A method of a class is within the context what ``repaired`` makes of it."""
    before = getattr(owner, name)
    setattr(owner, name, repaired(before))
    try:
        yield
    finally:
        setattr(owner, name, before)
