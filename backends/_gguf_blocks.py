"""Tensors as GGUF holds them: floats, and low-bit codes in blocks of 32 with scales of float16.

    Q8_0    d q            q from -128 to 127                    34 bytes
    Q4_0    d (q - 8)      q from 0 to 15                        18 bytes
    Q4_1    d q + m        q from 0 to 15                        20 bytes

A group of 64 or 128 inputs, or a whole row, is as many blocks with its scale in each.  Codes are never rounded again; scales
are, to float16.  Codes of 2 bits are four of the sixteen of Q4_0 or Q4_1, exactly, in the room of 4 bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor

from surgeon.backends._gguf_parts import Matrix
from surgeon.numerics.quantization import FLOAT8, QuantizedTensor, unpack_codes

BLOCK = 32
ROUNDED = 1e-3
"""Largest relative change of a scale by its rounding; float16 has 11 bits, which is half of this, but few for tiny numbers."""
FLOATS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass(frozen=True)
class Form:
    """How one tensor is stored.

    Attributes:
        kind: name of a type of ``gguf.GGMLQuantizationType``.
        shape: of the numbers.
        nbytes: in the file.
    """

    kind: str
    shape: tuple[int, ...]
    nbytes: int


def form(kind: str, shape: tuple[int, ...]) -> Form:
    """A tensor of this type and shape."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    numbers, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    return Form(kind, shape, int(numpy.prod(shape, dtype=numpy.int64)) // numbers * nbytes)


def block_kind(codes: QuantizedTensor) -> str:
    """The type of blocks that codes are."""
    return "Q8_0" if codes.bits == 8 else "Q4_0" if codes.zero_point is None else "Q4_1"


def unspoken(matrix: Matrix) -> str | None:
    """Why codes cannot be written as they are, None where they can."""
    codes = matrix.codes
    if codes is None:
        return None
    if codes.packed.dtype == FLOAT8:
        return "it is in 8-bit floats (fp8), and the format's blocks hold integers"
    if codes.bits == 8 and codes.zero_point is not None:
        return "its 8-bit codes have zero points, and blocks of 8 bits (Q8_0) have none; quantize with symmetric: true"
    if codes.in_features % BLOCK or (codes.group % BLOCK and codes.packed.shape[-2] > 1):
        odd = codes.in_features % BLOCK
        what = f"its {codes.in_features} inputs" if odd else f"its groups of {codes.group}"
        advice = f"cut to a multiple of it (drop_neurons: {{multiple: {BLOCK}}})" if odd else "quantize with another group"
        return f"{what} are no multiple of {BLOCK}, the size of the format's blocks; {advice}"
    if matrix.columns is not None:
        return "a part of its inputs is read, and codes are written whole"
    moved = scale_rounding(codes, matrix.factor)
    if moved > ROUNDED:
        return f"float16, which the format stores scales in, moves one of its scales by {moved:.1e} (relative)"
    return None


def scale_rounding(codes: QuantizedTensor, factor: float = 1.0) -> float:
    """How far float16 moves a scale, relative, at most."""
    scale = codes.scale.float() * factor
    rounded = scale.half().float()
    if not bool(rounded.isfinite().all()):
        return float("inf")
    return float(((rounded - scale).abs() / scale.abs().clamp(min=1e-30)).max())


def encode(matrix: Matrix, kind: str) -> numpy.ndarray[Any, Any]:
    """The bytes, or numbers, of a matrix in a type."""
    if kind in FLOATS.values():
        return floats(matrix.dense(), kind)
    assert matrix.codes is not None
    parts = list(_blocks(matrix, kind))
    found = parts[0] if len(parts) == 1 else torch.cat(parts)
    return found.numpy()


def floats(tensor: Tensor, kind: str) -> numpy.ndarray[Any, Any]:
    """Numbers of a tensor in a floating-point type; those of bfloat16 as their bits."""
    if kind == "BF16":
        return tensor.detach().to(torch.bfloat16).contiguous().view(torch.int16).numpy().view(numpy.uint16)
    return tensor.detach().to(torch.float32 if kind == "F32" else torch.float16).contiguous().numpy()


def _blocks(matrix: Matrix, kind: str) -> Iterator[Tensor]:
    """Blocks [.., out, bytes] of the codes, one matrix of a stack at a time."""
    codes = matrix.codes
    assert codes is not None
    stacked = codes.packed.dim() == 4
    count = codes.packed.shape[0] if stacked else 1
    for place in range(count) if matrix.picked is None else matrix.picked.tolist():
        packed, scale, zero = (
            None if t is None else t[place] if stacked else t for t in (codes.packed, codes.scale, codes.zero_point)
        )
        assert packed is not None
        assert scale is not None
        if matrix.rows is not None:
            packed, scale, zero = (None if t is None else t[matrix.rows] for t in (packed, scale, zero))
        found = _matrix_blocks(packed, scale, zero, codes, kind, matrix.factor)  # type: ignore[arg-type]  # both are there
        yield found[None] if stacked else found


def _matrix_blocks(
    packed: Tensor, scale: Tensor, zero: Tensor | None, codes: QuantizedTensor, kind: str, factor: float
) -> Tensor:
    rows, columns = packed.shape[0], codes.in_features
    numbers = unpack_codes(packed, codes.bits).reshape(rows, -1)[:, :columns].reshape(rows, -1, BLOCK)
    group = torch.arange(columns // BLOCK) * BLOCK // codes.group
    step = (scale.float() * factor)[:, group]
    if kind == "Q8_0":
        body = (numbers.to(torch.int16) - 128).to(torch.int8).view(torch.uint8)
        return torch.cat([_half(step), body], -1).reshape(rows, -1)
    # Codes of 2 bits in symmetric groups stand around 2 and those of Q4_0 around 8.
    shift = 8 - 2 ** (codes.bits - 1) if zero is None else 0
    nibbles = numbers + shift
    body = nibbles[..., : BLOCK // 2] | nibbles[..., BLOCK // 2 :] << 4
    ends = [_half(step)]
    if zero is not None:
        rounded = step.half().float()  # the least is that of the scale as it is stored
        ends.append(_half(-rounded * zero[:, group].float()))
    return torch.cat([*ends, body], -1).reshape(rows, -1)


def _half(values: Tensor) -> Tensor:
    """Numbers [..] as the bytes of float16, [.., 2]."""
    return values.half().unsqueeze(-1).contiguous().view(torch.uint8)
