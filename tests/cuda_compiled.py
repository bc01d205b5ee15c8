"""Compiles kernels of packages for CUDA without a GPU: run by ``test_cuda_compiled.py``, where nothing is interpreted.

For each launch a line of JSON: the kernel, the size of its program for compute capability 9.0, and what torch finds it writes.
"""

from __future__ import annotations

import json
from typing import Any

import torch
import triton
from torch import Tensor
from torch._higher_order_ops import triton_kernel_wrap as hop
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver

from surgeon.backends import _cuda_gates, _cuda_many, _cuda_rotary, _cuda_routing, _cuda_rows

TARGET = GPUTarget("cuda", 90, 32)
TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64", torch.int16: "i16",
    torch.uint8: "u8", torch.int32: "i32",
}  # fmt: skip


class NoDevice:
    """What torch and Triton ask of a device when they compile."""

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_current_device(self) -> int:
        return 0


class Compiled:
    """A kernel whose launches are compiled, and not run."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: Any) -> Any:
        return self.launch

    def launch(self, *arguments: Any, num_warps: int = 4, num_stages: int = 3, **named: Any) -> None:
        given = {**dict(zip(self.kernel.arg_names, arguments, strict=False)), **named}
        signature: dict[str, str] = {}
        constants: dict[tuple[int], Any] = {}
        aligned: dict[tuple[int], Any] = {}
        for place, parameter in enumerate(self.kernel.params):
            value = given[parameter.name]
            signature[parameter.name] = f"*{TYPES[value.dtype]}" if isinstance(value, Tensor) else "i32"
            if parameter.is_constexpr:
                signature[parameter.name], constants[place,] = "constexpr", value
            elif isinstance(value, Tensor) or value % 16 == 0:
                aligned[place,] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, signature, constants, aligned)
        made = triton.compile(source, target=TARGET, options={"num_warps": num_warps, "num_stages": num_stages})
        print(json.dumps([self.kernel.__name__, len(made.asm["cubin"]), sorted(written(self.kernel, given))]), flush=True)


def written(kernel: Any, given: dict[str, Any]) -> list[str]:
    """Which arguments torch finds that a kernel writes; all of them where it does not understand the kernel."""
    if hasattr(hop, "identify_mutated_tensors"):  # before torch 2.13
        return list(hop.identify_mutated_tensors(kernel, given, {}))
    return [each.name for each in hop.identify_accessed_tensors(kernel, given, {}).read_writes.writes]


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def routers() -> None:
    rest = (True, 0.0, 1.0, [2, 0, 0, 0, 0, 0], torch.float32)
    for experts, width, k in ((8, 4096, 2), (128, 2048, 8)):
        _cuda_routing._routed(empty(1, width), empty(experts, width), empty(experts), None, k, 1, 0, 2, *rest)
    corrected = empty(256, dtype=torch.float32)
    _cuda_routing._routed(empty(7, 256), None, None, corrected, 8, 2, 1, 1, *rest)


def turning() -> None:
    start = empty(1, dtype=torch.int64)
    for numbers in (128, 32):
        q, k = (empty(2, 1, heads, 128).transpose(1, 2) for heads in (32, 8))
        table, buffer = empty(2, 1, 1, numbers), empty(2, 8, 64, 128)
        _cuda_rotary.turn_and_append(q, k, k, table, table, buffer, buffer, start, 9)


def products() -> None:
    x, index = empty(1, 4096), empty(2, dtype=torch.int64)
    matrices = (empty(8, 28672, 4096), None, 0, 1)
    tiles = (empty(8, 448, 32, 64, 32, dtype=torch.int16), empty(8, 448, 32, 64), 4, 128)
    for weight, scale, bits, group in (matrices, tiles):
        out = empty(1, 2, 28672, dtype=torch.float32)
        _cuda_rows._launch(x, index, weight, scale, None, None, bits, group, 2, 1, out, None)
        for activation in ("silu", "gelu", "gelu_tanh", "quick_gelu(gate_max=7,up_limit=7,offset=1)"):
            form = _cuda_gates.gate_of(activation)
            assert form is not None
            gate = (form[0], *form[1])
            _cuda_rows._launch(x, index, weight, scale, None, empty(8, 28672), bits, group, 2, 1, empty(2, 14336), gate)


def many_products() -> None:
    tiles = (empty(8, 448, 32, 64, 32, dtype=torch.int16), empty(8, 448, 32, 64))
    bytewise = (empty(8, 448, 128, 64, 16, dtype=torch.uint8), empty(8, 448, 128, 64))
    form = _cuda_gates.gate_of("silu")
    assert form is not None
    for block in (_cuda_many.Form(128, 256, 8, 3), _cuda_many.Form(128, 64, 8, 4), _cuda_many.Form(128, 64, 8, 2)):
        _cuda_many.Form.of = lambda device, many, block=block: block  # type: ignore[method-assign,misc]
        for gate in (None, (form[0], *form[1])):
            for codes, group in ((tiles, 128), (bytewise, 32)):
                zero, bias = empty(8, 448, codes[1].shape[2], 64, dtype=torch.uint8), empty(8, 28672)
                for added in ((None, None), (zero, bias)):
                    _cuda_many._launch(empty(640, 4096), empty(8, dtype=torch.int32), *codes, *added, 4, group, True, gate)


if __name__ == "__main__":
    driver.set_active(NoDevice())
    for module in (_cuda_rotary, _cuda_routing, _cuda_rows, _cuda_many):
        module.wrapped = Compiled  # type: ignore[attr-defined]  # in place of what torch traces
    routers()
    turning()
    products()
    many_products()
