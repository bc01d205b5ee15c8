"""Round-to-nearest quantization in groups along the input dimension, and dynamic quantization of activations.

Layout of the codes (that of ONNX Runtime's ``MatMulNBits``): unsigned integers of 2, 4 or 8 bits, packed into bytes
with the earlier code in the lower bits; value = (code - zero point) * scale, with the zero point 2**(bits - 1) where
none is stored.  Codes may be 8-bit floats in their place, with value = code * scale and no zero point.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from surgeon.numerics.errors import NumericsError, require_finite

BITS = (2, 4, 8)
FLOAT8 = torch.float8_e4m3fn
"""The 8-bit float of weights: 4 bits of exponent, 3 of mantissa, no infinities; the largest is 448 (OCP FP8, Micikevicius et
al. 2022, arXiv:2209.05433)."""
_ELEMENTS_AT_ONCE = 2**20


@dataclass(frozen=True)
class QuantizedTensor:
    """A weight [..., out, in] in low-bit codes.

    Attributes:
        packed: uint8 [..., out, groups, group * bits // 8], or float8_e4m3fn [..., out, groups, group].
        scale: [..., out, groups], of the weight's dtype; may be negative where quantization is symmetric.
        zero_point: uint8 [..., out, groups], one per byte, or None for 2**(bits - 1) everywhere.
        bits: 2, 4 or 8.
        group: codes per scale; the last group of a row is padded with the zero point.
        in_features: true length of a row.
    """

    packed: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bits: int
    group: int
    in_features: int

    def dequantize(self) -> Tensor:
        """Return the weight [..., out, in] that these codes stand for."""
        return dequantize(self.packed, self.scale, self.zero_point, self.bits, self.group, self.in_features)


def quantize_groupwise(weight: Tensor, *, bits: int, group: int, symmetric: bool) -> QuantizedTensor:
    """Quantize each run of ``group`` inputs of a row to the nearest of 2**bits levels, ties to even.

    Symmetric (h = 2**(bits - 1), no zero point stored): two scales are tried for every group and the one of less
    squared error is kept: m / (h - 1) with m = max |w|, which reaches every weight, and -w_m / h with w_m the signed
    weight of largest magnitude, whose steps are finer but which clips weights of the other sign at (h - 1) / h of m.
    The error of an element is at most |scale| / 2 with the first and at most |scale| with the second.

    Asymmetric: scale = (max - min) / (2**bits - 1) over a range that includes 0, zero point = round(-min / scale); the
    error is at most scale / 2.  Zero is represented exactly in both forms.

    Args:
        weight: [..., out, in], floating.
        bits: 2, 4 or 8.
        group: inputs per scale, a whole number of bytes; -1 for one scale per row.
        symmetric: whether the zero point is fixed.

    Returns:
        The codes.  The scale is rounded to the weight's dtype first and the codes chosen for that rounded scale.

    Raises:
        NumericsError: bits or group is not possible, or an entry is not finite.
    """
    _check_bits(bits)
    _check_weight("quantize_groupwise", weight)
    per_byte = 8 // bits
    in_features = weight.shape[-1]
    if group == -1:
        group = -(-in_features // per_byte) * per_byte
    if group < 1 or group % per_byte:
        raise NumericsError(
            f"quantize_groupwise: group = {group}, needed -1 or a positive multiple of {per_byte} at {bits} bits"
        )
    require_finite(weight=weight)
    rows = weight.detach().reshape(-1, in_features)
    groups = -(-in_features // group)
    shape = (*weight.shape[:-1], groups)
    packed = torch.empty(rows.shape[0], groups, group // per_byte, dtype=torch.uint8)
    scale = torch.empty(rows.shape[0], groups, dtype=weight.dtype)
    zero_point = None if symmetric else torch.empty(rows.shape[0], groups, dtype=torch.uint8)
    # Some rows at a time: the working copies would otherwise take several times the weight's own memory.
    count = max(1, _ELEMENTS_AT_ONCE // in_features)
    for start in range(0, rows.shape[0], count):
        part = slice(start, start + count)
        work = rows[part].to(torch.float64 if weight.dtype == torch.float64 else torch.float32)
        blocks = torch.nn.functional.pad(work, (0, groups * group - in_features)).reshape(-1, groups, group)
        if zero_point is None:
            scale[part], codes = _symmetric(blocks, bits, weight.dtype)
        else:
            scale[part], zero_point[part], codes = _asymmetric(blocks, bits, weight.dtype)
        packed[part] = pack_codes(codes, bits)
    zeros = None if zero_point is None else zero_point.reshape(shape)
    return QuantizedTensor(packed.reshape(*shape, -1), scale.reshape(shape), zeros, bits, group, in_features)


def quantize_float8(weight: Tensor, *, group: int = -1) -> QuantizedTensor:
    """Round a weight to 8-bit floats under one scale per group: scale = max |w| / 448, so that the largest is the largest.

    The error of an element is at most 2^-4 of it, or half the smallest step (2^-10 scales) where it is small.

    Args:
        weight: [..., out, in], floating.
        group: inputs per scale; -1 for one scale per row.

    Raises:
        NumericsError: the shape or the group is not possible, or an entry is not finite.
    """
    _check_weight("quantize_float8", weight)
    in_features = weight.shape[-1]
    group = in_features if group == -1 else group
    if group < 1:
        raise NumericsError(f"quantize_float8: group = {group}, needed -1 or at least 1")
    require_finite(weight=weight)
    groups = -(-in_features // group)
    packed = torch.empty(*weight.shape[:-1], groups, group, dtype=FLOAT8)
    scale = torch.empty(*weight.shape[:-1], groups, dtype=weight.dtype)
    rows, flat_packed, flat_scale = weight.detach().flatten(0, -2), packed.flatten(0, -3), scale.flatten(0, -2)
    count = max(1, _ELEMENTS_AT_ONCE // in_features)
    for start in range(0, rows.shape[0], count):
        part = slice(start, start + count)
        work = rows[part].to(torch.float64 if weight.dtype == torch.float64 else torch.float32)
        blocks = torch.nn.functional.pad(work, (0, groups * group - in_features)).reshape(-1, groups, group)
        flat_scale[part] = _usable((blocks.abs().amax(-1) / torch.finfo(FLOAT8).max).to(weight.dtype))
        limit = torch.finfo(FLOAT8).max  # a scale that was rounded down would take the largest beyond it, to NaN
        flat_packed[part] = (blocks / flat_scale[part].to(work.dtype).unsqueeze(-1)).clamp(-limit, limit).to(FLOAT8)
    return QuantizedTensor(packed, scale, None, 8, group, in_features)


def dequantize(
    packed: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, group: int, in_features: int
) -> Tensor:
    """Return the weight that codes stand for: (code - zero point) * scale, or code * scale for 8-bit floats.

    Args:
        packed: uint8 [..., out, groups, group * bits // 8], or float8_e4m3fn [..., out, groups, group].
        scale: [..., out, groups].
        zero_point: uint8 [..., out, groups], or None for 2**(bits - 1).
        bits: 2, 4 or 8.
        group: codes per scale.
        in_features: length of a row without its padding.

    Returns:
        [..., out, in], of the dtype of ``scale``.

    Raises:
        NumericsError: the shapes do not fit each other.
    """
    _check_bits(bits)
    groups = -(-in_features // group)
    if packed.shape[-2:] != (groups, group * bits // 8) or scale.shape != packed.shape[:-1]:
        raise NumericsError(
            f"dequantize: packed {list(packed.shape)} and scale {list(scale.shape)}, needed "
            f"[..., out, {groups}, {group * bits // 8}] and [..., out, {groups}] for {in_features} inputs in groups of "
            f"{group} at {bits} bits"
        )
    if packed.dtype == FLOAT8:
        return (packed.to(scale.dtype) * scale.unsqueeze(-1)).flatten(-2)[..., :in_features]
    zero = float(2 ** (bits - 1)) if zero_point is None else zero_point.to(scale.dtype).unsqueeze(-1)
    values = (unpack_codes(packed, bits).to(scale.dtype) - zero) * scale.unsqueeze(-1)
    return values.flatten(-2)[..., :in_features]


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack codes into bytes, the earlier code in the lower bits.

    Args:
        codes: uint8 [..., n], each below 2**bits; n * bits is a whole number of bytes.
        bits: 2, 4 or 8.

    Returns:
        uint8 [..., n * bits // 8].
    """
    _check_bits(bits)
    per_byte = 8 // bits
    if codes.dtype != torch.uint8 or codes.shape[-1] % per_byte:
        raise NumericsError(
            f"pack_codes: codes are {codes.dtype} {list(codes.shape)}, needed torch.uint8 with a last dimension that "
            f"is a multiple of {per_byte}"
        )
    lanes = codes.reshape(*codes.shape[:-1], codes.shape[-1] // per_byte, per_byte)
    packed = lanes[..., 0].clone()
    for lane in range(1, per_byte):
        packed |= lanes[..., lane] << (lane * bits)
    return packed


def unpack_codes(packed: Tensor, bits: int) -> Tensor:
    """Undo :func:`pack_codes`: uint8 [..., m] -> uint8 [..., m * 8 // bits]."""
    _check_bits(bits)
    if bits == 8:
        return packed
    lanes = [packed >> shift & (2**bits - 1) for shift in range(0, 8, bits)]
    return torch.stack(lanes, -1).flatten(-2)


def dynamic_quantize_linear(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize a whole tensor to uint8 over its own range: ONNX ``DynamicQuantizeLinear``.

    The range includes 0; scale = (max - min) / 255 (1 where the tensor is zero); zero point = round(-min / scale);
    ties to even.

    Args:
        x: floating, of any shape with at least one entry; taken to float32.

    Returns:
        codes uint8 of the shape of ``x``, scale float32 [] and zero point uint8 [].
    """
    work = x.float()
    low, high = work.amin().clamp(max=0), work.amax().clamp(min=0)
    scale = (high - low) / 255
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    zero_point = (-low / scale).round().clamp(0, 255)
    codes = ((work / scale).round() + zero_point).clamp(0, 255)
    return codes.to(torch.uint8), scale, zero_point.to(torch.uint8)


def fake_quantize_dynamic(x: Tensor) -> Tensor:
    """Return ``x`` as it is after :func:`dynamic_quantize_linear` and back, in its own dtype.

    Data-dependent only through tensors, so it can stand inside a traced function.
    """
    codes, scale, zero_point = dynamic_quantize_linear(x)
    return ((codes.float() - zero_point.float()) * scale).to(x.dtype)


def _check_bits(bits: int) -> None:
    if bits not in BITS:
        raise NumericsError(f"bits = {bits}, needed one of {', '.join(map(str, BITS))}")


def _check_weight(where: str, weight: Tensor) -> None:
    if weight.ndim < 2 or not weight.dtype.is_floating_point or weight.numel() == 0:
        raise NumericsError(
            f"{where}: weight is {weight.dtype} {list(weight.shape)}, needed a non-empty floating [..., out, in]"
        )


def _symmetric(blocks: Tensor, bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale [..., groups] and codes [..., groups, group] of blocks [..., groups, group]."""
    half = 2 ** (bits - 1)
    peak = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True)).squeeze(-1)
    full = _usable((peak.abs() / (half - 1)).to(dtype))
    fine = _usable((peak / -half).to(dtype))
    candidates = []
    for scale in (full, fine):
        step = scale.to(blocks.dtype).unsqueeze(-1)
        levels = (blocks / step).round().clamp(-half, half - 1)
        candidates.append((levels, (levels * step - blocks).square().sum(-1)))
    (full_levels, full_error), (fine_levels, fine_error) = candidates
    finer = fine_error < full_error
    levels = torch.where(finer.unsqueeze(-1), fine_levels, full_levels)
    return torch.where(finer, fine, full), (levels + half).to(torch.uint8)


def _asymmetric(blocks: Tensor, bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Scale and zero point [..., groups] and codes [..., groups, group] of blocks [..., groups, group]."""
    top = 2**bits - 1
    low, high = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)
    scale = _usable(((high - low) / top).to(dtype))
    step = scale.to(blocks.dtype)
    zero_point = (-low / step).round().clamp(0, top)
    codes = ((blocks / step.unsqueeze(-1)).round() + zero_point.unsqueeze(-1)).clamp(0, top)
    return scale, zero_point.to(torch.uint8), codes.to(torch.uint8)


def _usable(scale: Tensor) -> Tensor:
    # A zero scale is a group of zeros, or of weights too small for the dtype; at scale 1 they round to exactly 0.
    return torch.where(scale != 0, scale, torch.ones_like(scale))
