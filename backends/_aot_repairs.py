"""What makes a package that does not compile or does not open, put right while it is compiled."""

from __future__ import annotations

import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

_SHARED_LIBRARY = ":libstdc++.so.6"
"""The file of GNU's C++ library, as ``-l`` takes it."""


@contextmanager
def compilable(device: str = "cpu") -> Iterator[None]:
    """Let a package be compiled that opens: by what torch before 2.13 writes, and by compilers that link statically.

    Args:
        device: kind of device that the package is for.
    """
    with ExitStack() as stack:
        stack.enter_context(_one_standard_library())
        stack.enter_context(_sizes_of_branches_named_once())
        if device == "cuda":
            stack.enter_context(_no_vectors_on_the_cpu())
        else:
            stack.enter_context(vectors_found_quickly())
        if torch.__version__ < "2.13":  # compared as versions are
            for repair in (_bounds_behind_indices, _eight_bit_floats_declared, _grouped_products_called):
                stack.enter_context(repair())
        yield


@contextmanager
def _one_standard_library() -> Iterator[None]:
    """Link the shared C++ library that torch has loaded, where the compiler would put a copy of its own into the package.

    Two copies in one process take each other's locales: the package ends the process (or fails without a reason) where it
    is opened, in the regular expression that reads the name of its device.
    """
    from torch._inductor import config
    from torch._inductor.cpp_builder import get_cpp_compiler

    compiler = get_cpp_compiler()
    if not sys.platform.startswith("linux") or _links_shared(compiler) or not _links_shared(compiler, _SHARED_LIBRARY):
        yield
        return
    libraries = [*(config.aot_inductor.custom_op_libs or ()), _SHARED_LIBRARY]
    with config.patch({"aot_inductor.custom_op_libs": libraries}):
        yield


@lru_cache
def _links_shared(compiler: str, *libraries: str) -> bool:
    """Whether what this compiler links uses a shared C++ library; False too where it links nothing."""
    source = "#include <locale>\nstd::locale made() { return std::locale(); }\n"
    with tempfile.TemporaryDirectory(prefix="surgeon-link-") as folder:
        target = Path(folder) / "linked.so"
        command = [compiler, "-shared", "-fPIC", "-o", str(target), "-x", "c++", "-", *(f"-l{name}" for name in libraries)]
        if subprocess.run(command, input=source, capture_output=True, text=True, check=False).returncode != 0:
            return False
        linked = target.read_bytes()
    return any(name in linked for name in (b"libstdc++.so", b"libc++.so"))


@contextmanager
def _no_vectors_on_the_cpu() -> Iterator[None]:
    """Compile what little a package for CUDA computes on the CPU as for a processor without vector instructions.

    It is sizes, not tensors; but to find out what this processor and compiler can do together, torch compiles and loads up to
    ten libraries for every new cache, which takes longer than the package's own sources do.  Its settings
    (``cpp.vec_isa_ok``) would leave their answer in caches that a package for the CPU reads later in the same process.
    Nothing is said then of vector instructions in what the package tells of itself, so that torch compares nothing when it
    opens one.
    """
    from torch._inductor import codecache, cpu_vec_isa

    if platform.machine() not in ("x86_64", "AMD64") or not hasattr(cpu_vec_isa, "valid_vec_isa_list"):
        yield  # elsewhere torch knows without a trial
        return

    def silent(before: Callable[[str], dict[str, str]]) -> Callable[[str], dict[str, str]]:
        return lambda device: {name: value for name, value in before(device).items() if name != "AOTI_CPU_ISA"}

    with (
        _replaced(cpu_vec_isa, "valid_vec_isa_list", lambda _: list),
        _replaced(codecache, "get_device_information", silent),
    ):
        yield


@contextmanager
def vectors_found_quickly() -> Iterator[None]:
    """Load the libraries that try out vector instructions without importing torch for each, as newer versions do.

    Versions before 2.13 start up to ten programs one after the other, once per process that compiles or opens a package.
    """
    from torch._inductor.cpu_vec_isa import VecISA

    if torch.__version__ >= "2.13" or not sys.platform.startswith("linux"):
        yield
        return
    linked = Path(torch.__file__).parent / "lib" / "libtorch.so"

    def quick(before: str) -> str:
        loads = f"from ctypes import CDLL\ntry:\n    CDLL({str(linked)!r})\n    CDLL('__lib_path__')\nexcept OSError:\n"
        return loads + "".join(f"    {line}\n" for line in before.splitlines())  # what it does not load is tried as before

    with _replaced(VecISA, "_avx_py_load", quick):
        yield


@contextmanager
def _sizes_of_branches_named_once() -> Iterator[None]:
    """Let the branches of a condition name the sizes that they compute in one list with the graph around them.

    torch numbers them from 0 in every branch, and takes a name that the graph around has used to be computed already: kernels
    in the branch then get another size under that name, without a word, or compiling fails where nothing has it.
    """
    from torch._inductor.graph import SubgraphLowering

    def repaired(before: Callable[..., None]) -> Callable[..., None]:
        def initialize(self: Any, parent: Any, *arguments: Any, **named: Any) -> None:
            before(self, parent, *arguments, **named)
            self.sizevars.precomputed_replacements = parent.sizevars.precomputed_replacements
            self.sizevars.inv_precomputed_replacements = parent.sizevars.inv_precomputed_replacements

        return initialize

    with _replaced(SubgraphLowering, "__init__", repaired):
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
def _replaced(owner: Any, name: str, repaired: Callable[[Any], Any]) -> Iterator[None]:
    """What a class or a module has under a name is within the context what ``repaired`` makes of it."""
    before = getattr(owner, name)
    setattr(owner, name, repaired(before))
    try:
        yield
    finally:
        setattr(owner, name, before)
