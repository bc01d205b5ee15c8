"""What kernels of packages for CUDA share: low-bit codes unpacked in registers, and how a kernel is traced."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

TILE = 64
"""Rows of a matrix that one program takes: as many as a group of warps multiplies at a time."""

_NIBBLES = (
    "{ .reg .b32 a, b, c, d, one, less; mov.b32 one, ONE; mov.b32 less, LESS; "
    "shr.u32 b, $4, 4; shr.u32 c, $4, 8; shr.u32 d, $4, 12; "
    "lop3.b32 a, $4, 0x000f000f, BASE, 0xea; lop3.b32 b, b, 0x000f000f, BASE, 0xea; "
    "lop3.b32 c, c, 0x000f000f, BASE, 0xea; lop3.b32 d, d, 0x000f000f, BASE, 0xea; "
    "fma.rn.TYPE $0, a, one, less; fma.rn.TYPE $1, b, one, less; "
    "fma.rn.TYPE $2, c, one, less; fma.rn.TYPE $3, d, one, less; "
    "}"
)
"""Two units of four codes to their first, second, ... codes less 8: each is put below the exponent of BASE, which makes it
BASE + code.  Both units stay in their halves of a register, where a matrix multiplication wants neighbours of a row."""

_SCALED = (
    _NIBBLES.removesuffix("}") + "mov.b32 less, 0x80008000; "
    "fma.rn.TYPE $0, $0, $5, less; fma.rn.TYPE $1, $1, $5, less; fma.rn.TYPE $2, $2, $5, less; fma.rn.TYPE $3, $3, $5, less; }"
)
"""The same times a scale, with -0 added, which changes nothing: the product is rounded once."""


def _spelt(text: str, name: str, base: str, one: str, less: str) -> tl.constexpr:
    return tl.constexpr(text.replace("TYPE", name).replace("BASE", base).replace("ONE", one).replace("LESS", less))


_BFLOAT16 = ("bf16x2", "0x43004300", "0x3f803f80", "0xc308c308")  # 128, 1, -136
_FLOAT16 = ("f16x2", "0x64006400", "0x3c003c00", "0xe408e408")  # 1024, 1, -1032
_NIBBLES_BFLOAT16, _NIBBLES_FLOAT16 = _spelt(_NIBBLES, *_BFLOAT16), _spelt(_NIBBLES, *_FLOAT16)
_SCALED_BFLOAT16, _SCALED_FLOAT16 = _spelt(_SCALED, *_BFLOAT16), _spelt(_SCALED, *_FLOAT16)


@triton.jit
def code_of(packed, middle, j: tl.constexpr, BITS: tl.constexpr, dtype: tl.constexpr):
    """Code j of each unit less the middle of its row: [rows, units] of ``dtype``."""
    codes = (packed.to(tl.uint16) >> (BITS * j)) & (2**BITS - 1)
    if dtype == tl.bfloat16 and BITS < 8:  # the bits of 128 + code: no conversion from integers
        values = (codes | 0x4300).to(tl.bfloat16, bitcast=True) - (middle + 128.0).to(tl.bfloat16)[:, None]
    elif dtype == tl.float16:  # the bits of 1024 + code
        values = (codes | 0x6400).to(tl.float16, bitcast=True) - (middle + 1024.0).to(tl.float16)[:, None]
    else:
        values = (codes.to(tl.float32) - middle[:, None]).to(dtype)
    return values


@triton.jit
def four_codes(packed, middle, ZERO: tl.constexpr, dtype: tl.constexpr):
    """The four codes of each unit less the middle of its row, or less 8 without ZERO, two units an instruction.

    One by one their arithmetic takes longer than reading.
    """
    if dtype == tl.bfloat16:
        a, b, c, d = tl.inline_asm_elementwise(
            _NIBBLES_BFLOAT16, "=r,=r,=r,=r,r", [packed], (tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), True, 2
        )
    else:
        a, b, c, d = tl.inline_asm_elementwise(
            _NIBBLES_FLOAT16, "=r,=r,=r,=r,r", [packed], (tl.float16, tl.float16, tl.float16, tl.float16), True, 2
        )
    if ZERO:  # small whole numbers: exact
        further = (middle - 8.0).to(dtype)[:, None]
        a, b, c, d = a - further, b - further, c - further, d - further
    return a, b, c, d


@triton.jit
def weight_of(packed, size, middle, j: tl.constexpr, BITS: tl.constexpr, dtype: tl.constexpr):
    """Code j of each unit less the middle of its row, times its scale."""
    return code_of(packed, middle, j, BITS, dtype) * size[:, None]


@triton.jit
def four_weights(packed, size, middle, ZERO: tl.constexpr, dtype: tl.constexpr):
    """The four weights of each unit [rows, units] that codes stand for, of the type of the scales ``size`` [rows]."""
    if ZERO:
        a, b, c, d = four_codes(packed, middle, ZERO, dtype)
        a, b, c, d = a * size[:, None], b * size[:, None], c * size[:, None], d * size[:, None]
    else:
        each = tl.broadcast_to(size[:, None], packed.shape)
        if dtype == tl.bfloat16:
            a, b, c, d = tl.inline_asm_elementwise(
                _SCALED_BFLOAT16, "=&r,=&r,=&r,=&r,r,r", [packed, each],
                (tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), True, 2,
            )  # fmt: skip
        else:
            a, b, c, d = tl.inline_asm_elementwise(
                _SCALED_FLOAT16, "=&r,=&r,=&r,=&r,r,r", [packed, each],
                (tl.float16, tl.float16, tl.float16, tl.float16), True, 2,
            )  # fmt: skip
    return a, b, c, d


def columns_at_once(group: int) -> int:
    """Columns of codes that a program multiplies in one step."""
    return min(group, 128)


def by_position(x: Tensor, unit: int, columns: int) -> Tensor:
    """Rows [R, K], within every so many columns those first that the first codes of units stand for, then the second ones'.

    A unit of codes that lie by rows holds ``unit`` neighbours, which its shifts take apart.
    """
    return x.reshape(-1, x.shape[1] // columns, columns // unit, unit).transpose(2, 3).reshape(x.shape)


def compiles() -> bool:
    """Whether kernels are compiled; Triton's interpreter has no assembler."""
    return isinstance(code_of, triton.JITFunction)


def wrapped(kernel: Any) -> Any:
    """The kernel as torch traces it; an interpreted one, which torch before 2.13 does not take, as it is."""
    return wrap_triton(kernel) if isinstance(kernel, triton.JITFunction) else kernel
