"""Codes of low-bit weights in tiles: what one program of a kernel for CUDA reads lies in one piece.

Codes come by rows: a program that takes 64 rows of a matrix group by group would read 64 pieces of 64 bytes.  Tiles of 4 bits
are also read as 16-bit units of four codes, which lie in registers as a matrix multiplication wants them.  Of the columns that
are multiplied in one step (C, a group or 128 of it) a unit of n codes holds not n neighbours but every (C / n)th one: so what
shifts take apart are n runs of columns, which the other factor has in its natural order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from surgeon.graph import Graph, assign_tensor
from surgeon.numerics.quantization import FLOAT8, QuantizedTensor, dequantize, pack_codes, unpack_codes

aten = torch.ops.aten
_MARK = "surgeon_tiled"


@dataclass(frozen=True)
class TiledTensor(QuantizedTensor):
    """A low-bit weight in tiles, its codes in the order of the module's description.

    Attributes:
        packed: [..., out / 64, groups, 64, group * bits // 8] uint8, or int16 of half that.
        scale: [..., out / 64, groups, 64].
        zero_point: like the scale, or None.
    """

    @classmethod
    def of(cls, codes: QuantizedTensor) -> TiledTensor:
        """The same codes in tiles; their rows are a multiple of 64."""
        from surgeon.backends._cuda_codes import TILE

        def tiles(by_rows: Tensor) -> Tensor:
            axis = codes.scale.dim() - 2  # that of the rows, before the groups
            sizes = (*by_rows.shape[:axis], -1, TILE, *by_rows.shape[axis + 1 :])
            return by_rows.reshape(sizes).transpose(axis + 1, axis + 2).contiguous()

        unit, pieces = _units(codes.bits, codes.group)
        laid, zero = tiles(codes.packed), None if codes.zero_point is None else tiles(codes.zero_point)
        packed = torch.empty_like(laid)
        # piece by piece: codes that are not packed take much memory
        for target, part in zip(*(each.flatten(0, -4) for each in (packed, laid)), strict=True):
            target.copy_(_exchanged(part, codes.bits, unit, pieces))
        if unit * codes.bits == 16:
            packed = packed.view(torch.int16)
        return cls(packed, tiles(codes.scale), zero, codes.bits, codes.group, codes.in_features)

    def dequantize(self) -> Tensor:
        """Return the weight [..., out, in]."""
        packed = self.packed if self.packed.dtype == torch.uint8 else self.packed.view(torch.uint8)
        unit, pieces = _units(self.bits, self.group)
        packed = _exchanged(packed, self.bits, pieces, unit)
        scale, zero = _by_rows(self.scale), None if self.zero_point is None else _by_rows(self.zero_point)
        rows = packed.transpose(-2, -3).flatten(-4, -3)
        return dequantize(rows, scale, zero, self.bits, self.group, self.in_features)


def _units(bits: int, group: int) -> tuple[int, int]:
    """Codes of a unit, and units of the columns that are multiplied in one step."""
    from surgeon.backends._cuda_codes import columns_at_once

    unit = 4 if bits == 4 and group >= 64 else 8 // bits
    return unit, columns_at_once(group) // unit


def _exchanged(packed: Tensor, bits: int, first: int, second: int) -> Tensor:
    """Codes [..., first, second] of every so many columns packed anew as [..., second, first]."""
    codes = unpack_codes(packed, bits)
    exchanged = codes.reshape(*codes.shape[:-1], -1, first, second).transpose(-1, -2)
    return pack_codes(exchanged.reshape(codes.shape), bits)


def _by_rows(tiles: Tensor) -> Tensor:
    """[..., out / 64, groups, 64] -> [..., out, groups]."""
    return tiles.transpose(-1, -2).flatten(-3, -2)


def why_unpacked(node: fx.Node) -> str | None:
    """Why the weight that ``node`` (``surgeon::dequantize``) unpacks cannot stay packed up to the kernels; None if it can."""
    from surgeon.backends._cuda_rows import takes_codes

    packed, _, _, bits, group, width = node.args
    assert isinstance(packed, fx.Node)
    if packed.meta["val"].dtype == FLOAT8:
        return "no kernel of 8-bit float weights and wider inputs"
    if not takes_codes(bits, group, width):  # type: ignore[arg-type]
        return f"{bits} bits in groups of {group} over {width} columns; the kernel takes whole groups of 2^n from 32"
    for user in node.users:
        linear = user.target is aten.linear.default and user.args[1] is node and packed.meta["val"].dim() == 3
        experts = user.target is torch.ops.surgeon.moe.default and node in user.args[3:5] and user.args[0] is not node
        if not (linear or experts):
            return f"it is read by {user.target}, and the kernels are of linears and experts"
    return None


def tile_codes(graph: Graph) -> None:
    """Lay the codes that only kernels read out in tiles, in place; :func:`of_node` tells.

    Args:
        graph: a copy for CUDA, whose tensors are no longer the source's.
    """
    from surgeon.backends._cuda_codes import TILE

    nodes = list(graph.module.graph.nodes)
    reads: dict[str, list[fx.Node]] = {}
    for node in nodes:
        if node.op == "get_attr":
            reads.setdefault(str(node.target), []).extend(node.users)
    for node in nodes:
        if node.target is not torch.ops.surgeon.dequantize.default or why_unpacked(node) is not None:
            continue
        parts = [arg if isinstance(arg, fx.Node) else None for arg in node.args[:3]]
        if any(part is not None and (part.op != "get_attr" or reads[str(part.target)] != [node]) for part in parts):
            continue
        tensors: list[Any] = [None if part is None else graph.tensor(str(part.target)).detach() for part in parts]
        if tensors[0].shape[-3] % TILE:
            continue
        laid = TiledTensor.of(QuantizedTensor(*tensors, *node.args[3:]))
        for part, tensor in zip(parts, (laid.packed, laid.scale, laid.zero_point), strict=True):
            if part is not None and tensor is not None:
                assign_tensor(graph.module, str(part.target), tensor)
        node.meta[_MARK] = True


def of_node(node: fx.Node, arguments: tuple[Any, ...]) -> QuantizedTensor:
    """The codes of a ``surgeon::dequantize`` with these arguments."""
    return (TiledTensor if node.meta.get(_MARK) else QuantizedTensor)(*arguments)
