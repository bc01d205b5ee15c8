"""Low-bit weights from surgeon's layout into the layouts of ONNX Runtime's kernels.  All conversions are exact."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from surgeon.numerics.quantization import pack_codes

BLOCKS = (16, 32, 64, 128, 256)
"""Block sizes that every blockwise kernel takes at 2, 4 and 8 bits."""


@dataclass(frozen=True)
class LowBit:
    """The arguments of one ``surgeon::dequantize`` node.

    Attributes:
        packed: uint8 [..., out, groups, group * bits / 8].
        scale: [..., out, groups].
        zero_point: uint8 [..., out, groups] or None.
        bits: 1, 2, 4 or 8.
        group: codes per scale.
        columns: true length of a row.
        name: the name ``packed`` is read under.
    """

    packed: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bits: int
    group: int
    columns: int
    name: str

    @property
    def groups(self) -> int:
        """Scales per row."""
        return self.packed.shape[-2]

    @property
    def per_row(self) -> bool:
        """Whether a row has one scale."""
        return self.groups == 1

    def expert(self, index: int) -> LowBit:
        """One matrix [out, in] of a stack [E, out, in]; shares storage."""
        zero = None if self.zero_point is None else self.zero_point[index]
        return LowBit(self.packed[index], self.scale[index], zero, self.bits, self.group, self.columns, f"{self.name}_{index}")


def block_size(weight: LowBit) -> int | None:
    """The block under which a blockwise kernel reads these codes, or None where none fits.

    Case 1: the group is a block already.  Case 2: a row has one scale, so that any block does (its scale is repeated):
    the one of fewest bytes.  Case 3: the largest block that divides the group, its scale repeated.
    """
    if weight.bits not in (2, 4, 8):
        return None
    if weight.group in BLOCKS:  # Case 1
        return weight.group
    if weight.per_row:  # Case 2

        def size(block: int) -> int:
            return -(-weight.columns // block) * (block * weight.bits // 8 + weight.scale.element_size())

        return min(BLOCKS, key=size)
    return max((block for block in BLOCKS if weight.group % block == 0), default=None)  # Case 3


def blockwise(weight: LowBit, block: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, scales and zero points in blocks.

    Args:
        weight: [..., out, in].
        block: a size that :func:`block_size` allows.

    Returns:
        packed uint8 [..., out, B, block * bits / 8] and scale [..., out, B] with B = ceil(in / block); zero point uint8
        [..., out, ceil(B * bits / 8)] packed like codes, or None.  Views where the layout is the same already.
    """
    blocks = -(-weight.columns // block)
    zero = weight.zero_point
    if block == weight.group:
        packed, scale = weight.packed, weight.scale
    else:
        nbytes = block * weight.bits // 8
        row = weight.packed.flatten(-2)
        row = _resize(row, blocks * nbytes)
        packed = row.reshape(*row.shape[:-1], blocks, nbytes)
        repeats = blocks if weight.per_row else weight.group // block
        scale = weight.scale.repeat_interleave(repeats, -1)[..., :blocks].contiguous()
        zero = None if zero is None else zero.repeat_interleave(repeats, -1)[..., :blocks]
    return packed, scale, None if zero is None else pack_rows(zero, weight.bits)


def pack_rows(zero_point: Tensor, bits: int) -> Tensor:
    """Pack zero points uint8 [..., n], one per byte, into [..., ceil(n * bits / 8)], earlier ones in the lower bits."""
    per_byte = 8 // bits
    count = -(-zero_point.shape[-1] // per_byte) * per_byte
    return pack_codes(_resize(zero_point, count), bits)


def integer_columns(weight: LowBit) -> tuple[Tensor, Tensor, Tensor | None]:
    """An 8-bit weight with one scale per row as int8 columns: w [in, out], scale [out], zero point int8 [out] or None.

    The codes move from 0..255 to -128..127 together with the zero point, so that the usual one (128) becomes 0 and
    needs no correction term; signed weights beside unsigned activations are also what VNNI and AMX multiply directly.
    (On CPUs with AVX2 and without VNNI, ONNX Runtime adds pairs of such products in 16 bits, which may saturate.)
    """
    rows = weight.packed[:, 0, : weight.columns]
    codes = (rows ^ 0x80).view(torch.int8).t()
    zero = None if weight.zero_point is None else (weight.zero_point[:, 0] ^ 0x80).view(torch.int8).contiguous()
    return codes, weight.scale[:, 0].contiguous(), zero


def interleaved(rows: Tensor) -> Tensor:
    """[E, 2 I, ...] with rows [gate | up] to gate and up rows alternating."""
    gate, up = rows.chunk(2, dim=1)
    return torch.stack((gate, up), dim=2).flatten(1, 2)


def _resize(row: Tensor, length: int) -> Tensor:
    """Cut or zero-pad the last dimension; what is beyond the row's end is never multiplied with anything but zero."""
    if row.shape[-1] >= length:
        return row[..., :length]
    return torch.nn.functional.pad(row, (0, length - row.shape[-1]))
