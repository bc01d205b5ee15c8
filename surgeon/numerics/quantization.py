"""Low-bit codes in groups along the input dimension, rounding to the nearest, and dynamic quantization of activations.

Layout of the codes (that of ONNX Runtime's ``MatMulNBits``): unsigned integers of 2, 4 or 8 bits, packed into bytes
with the earlier code in the lower bits; value = (code - zero point) * scale, with the zero point 2**(bits - 1) where
none is stored.  Codes may be 8-bit floats in their place, with value = code * scale and no zero point.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from surgeon.numerics.errors import NumericsError, require_finite

BITS = (2, 4, 8)
FLOAT8 = torch.float8_e4m3fn
"""The 8-bit float of weights: 4 bits of exponent, 3 of mantissa, no infinities; the largest is 448 (OCP FP8, Micikevicius et
al. 2022, arXiv:2209.05433)."""
WHOLE_RANGE = (1.0,)
"""Factors of a group's range that are tried: the whole range alone."""
SEARCH = tuple(1 - step / 20 for step in range(6))
"""The factors that AWQ's search for clipping tries (Lin et al. 2023, arXiv:2306.00978), to 0.75: at 4 bits none below is
ever the best."""
WIDE_SEARCH = tuple(1 - step / 20 for step in range(15))
"""To 0.3, for 2 bits and rounding to the nearest.  Where others make up for the error (GPTQ), finer steps are not worth that
much clipping.  Steps of least squares for scale and zero point behind it, or those of HQQ (Badri and Shaji 2023,
https://mobiusml.github.io/hqq_blog/) for an lp norm below 1, gain nothing more that is clear on trained models, since zero
points are whole numbers here; with real ones and the scale of the whole range, HQQ loses more than this at 2 bits."""
_ELEMENTS_AT_ONCE = 2**20
_ELEMENTS_ON_DEVICE = 2**25
"""The same on a device, which is fast on much at a time: about 1 GiB of working copies."""


@dataclass(frozen=True)
class Levels:
    """The numbers that codes can stand for under one scale: (q - z) s for integers q of ``bits`` bits, q s for 8-bit floats.

    Attributes:
        bits: 2, 4 or 8.
        symmetric: the zero point z is 2**(bits - 1).
        float8: codes are 8-bit floats.
    """

    bits: int
    symmetric: bool = True
    float8: bool = False

    @property
    def has_zero_point(self) -> bool:
        """Whether a zero point is stored for every group."""
        return not (self.symmetric or self.float8)

    def group(self, where: str, group: int, in_features: int) -> int:
        """Inputs per scale, with -1 resolved.

        Raises:
            NumericsError: bits or group is not possible.
        """
        _check_bits(self.bits)
        per_byte = 8 // self.bits
        if group == -1:
            return -(-in_features // per_byte) * per_byte
        if group < 1 or group % per_byte:
            least = "at least 1" if per_byte == 1 else f"a positive multiple of {per_byte} at {self.bits} bits"
            raise NumericsError(f"{where}: group = {group}, needed -1 or {least}")
        return group

    def fit(
        self,
        blocks: Tensor,
        dtype: torch.dtype,
        *,
        importance: Tensor | None = None,
        shrink: Sequence[float] = WHOLE_RANGE,
    ) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point of least squared error among those that :func:`quantize_groupwise` tries.

        Args:
            blocks: groups of weights, [..., groups, group].
            dtype: the scale is rounded to it.
            importance: weights of the squared errors, of a shape that broadcasts to ``blocks``.
            shrink: factors of the range, the first of which is kept among equals.

        Returns:
            scale [..., groups] of ``dtype`` and zero point [..., groups] of the type of ``blocks``, or None.
        """
        best: tuple[Tensor, Tensor, Tensor | None] | None = None
        candidates = list(self._candidates(blocks, dtype, shrink))
        if len(candidates) == 1:
            return candidates[0]
        for scale, zero in candidates:
            step = scale.to(blocks.dtype).unsqueeze(-1)
            zeros = unsqueezed(zero)
            lost = (self.value(self.nearest(blocks, step, zeros), step, zeros) - blocks).square_()
            error = (lost if importance is None else lost.mul_(importance)).sum(-1)
            if best is None:
                best = error, scale, zero
            else:
                less = error < best[0]
                best = (
                    torch.where(less, error, best[0]),
                    torch.where(less, scale, best[1]),
                    None if zero is None or best[2] is None else torch.where(less, zero, best[2]),
                )
        assert best is not None
        return best[1], best[2]

    def _candidates(
        self, blocks: Tensor, dtype: torch.dtype, shrink: Sequence[float]
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        half, top = 2 ** (self.bits - 1), 2**self.bits - 1
        if self.has_zero_point:
            low, high = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)
            for factor in shrink:
                scale = _usable(((high - low) * factor / top).to(dtype))
                yield scale, (-low * factor / scale.to(blocks.dtype)).round().clamp(0, top)
            return
        peak = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True)).squeeze(-1)
        ends = [peak.abs() / torch.finfo(FLOAT8).max] if self.float8 else [peak.abs() / (half - 1), peak / -half]
        for factor in shrink:
            for end in ends:
                yield _usable((end * factor).to(dtype)), None

    def nearest(self, values: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """Codes nearest to values, ties to even, as floats (8-bit ones where the codes are); shapes broadcast."""
        if self.float8:
            # a scale that was rounded down would take the largest beyond it, to NaN
            limit = torch.finfo(FLOAT8).max
            return (values / scale).clamp_(-limit, limit).to(FLOAT8)
        offset = 2 ** (self.bits - 1) if zero is None else zero
        return (values / scale).round_().add_(offset).clamp_(0, 2**self.bits - 1)

    def value(self, codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """What codes stand for; shapes broadcast."""
        if self.float8:
            return codes.to(scale.dtype) * scale
        return (codes - (2 ** (self.bits - 1) if zero is None else zero)) * scale

    def pack(self, codes: Tensor) -> Tensor:
        """Codes [..., group] of :meth:`nearest` in the form in which they are stored."""
        return codes if self.float8 else pack_codes(codes.to(torch.uint8), self.bits)


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

    @classmethod
    def empty(cls, weight: Tensor, levels: Levels, group: int) -> QuantizedTensor:
        """Codes to be filled, for a weight [..., out, in], where it is."""
        columns = weight.shape[-1]
        inner = (*weight.shape[:-1], -(-columns // group))
        packed = weight.new_empty(*inner, group * levels.bits // 8, dtype=FLOAT8 if levels.float8 else torch.uint8)
        zero = weight.new_empty(inner, dtype=torch.uint8) if levels.has_zero_point else None
        return cls(packed, weight.new_empty(inner), zero, levels.bits, group, columns)

    @classmethod
    def joined(cls, parts: Sequence[QuantizedTensor]) -> QuantizedTensor:
        """Codes of several weights of one form, one behind the other in the first dimension."""
        if len(parts) == 1:
            return parts[0]
        packed, scale, zeros = zip(*(part.tensors for part in parts), strict=True)
        zero = None if zeros[0] is None else torch.cat(zeros)
        return cls(torch.cat(packed), torch.cat(scale), zero, parts[0].bits, parts[0].group, parts[0].in_features)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Codes, scales and zero points."""
        return self.packed, self.scale, self.zero_point

    def dequantize(self) -> Tensor:
        """Return the weight [..., out, in] that these codes stand for."""
        return dequantize(self.packed, self.scale, self.zero_point, self.bits, self.group, self.in_features)


def fitting_group(group: int, in_features: int) -> int:
    """A group that one row does not fill, halved as often as it still holds the row: the same codes with less padding."""
    while group // 2 >= in_features and group % 32 == 0:
        group //= 2
    return group


def quantize_groupwise(
    weight: Tensor, *, bits: int, group: int, symmetric: bool, shrink: Sequence[float] = WHOLE_RANGE
) -> QuantizedTensor:
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
        shrink: factors of the range that are tried too, keeping the one of least squared error: below 1 the steps are finer
            and the largest weights are clipped.

    Returns:
        The codes.  The scale is rounded to the weight's dtype first and the codes chosen for that rounded scale.

    Raises:
        NumericsError: bits or group is not possible, or an entry is not finite.
    """
    return _round_to_nearest("quantize_groupwise", weight, Levels(bits, symmetric), group, shrink)


def quantize_float8(weight: Tensor, *, group: int = -1) -> QuantizedTensor:
    """Round a weight to 8-bit floats under one scale per group: scale = max |w| / 448, so that the largest is the largest.

    The error of an element is at most 2^-4 of it, or half the smallest step (2^-10 scales) where it is small.

    Args:
        weight: [..., out, in], floating.
        group: inputs per scale; -1 for one scale per row.

    Raises:
        NumericsError: the shape or the group is not possible, or an entry is not finite.
    """
    return _round_to_nearest("quantize_float8", weight, Levels(8, float8=True), group, WHOLE_RANGE)


def _round_to_nearest(
    where: str, weight: Tensor, levels: Levels, group: int, shrink: Sequence[float]
) -> QuantizedTensor:
    check_weight(where, weight)
    in_features = weight.shape[-1]
    group = levels.group(where, group, in_features)
    rows = weight.detach().reshape(-1, in_features)
    groups = -(-in_features // group)
    codes = QuantizedTensor.empty(weight, levels, group)
    packed, scale, zero = (None if t is None else t.flatten(0, weight.ndim - 2) for t in codes.tensors)
    assert packed is not None
    assert scale is not None
    # Some rows at a time: the working copies would otherwise take several times the weight's own memory.
    count = max(1, (_ELEMENTS_AT_ONCE if weight.device.type == "cpu" else _ELEMENTS_ON_DEVICE) // in_features)
    for start in range(0, rows.shape[0], count):
        part = slice(start, start + count)
        work = rows[part].to(working_type(weight.dtype))
        blocks = torch.nn.functional.pad(work, (0, groups * group - in_features)).reshape(-1, groups, group)
        scale[part], zeros = levels.fit(blocks, weight.dtype, shrink=shrink)
        found = levels.nearest(blocks, scale[part].to(work.dtype).unsqueeze(-1), unsqueezed(zeros))
        packed[part] = levels.pack(found)
        if zero is not None and zeros is not None:
            zero[part] = zeros.to(torch.uint8)
    return codes


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


def check_weight(where: str, weight: Tensor) -> None:
    """Raise NumericsError for what is not a finite, floating [..., out, in] with entries."""
    if weight.ndim < 2 or not weight.dtype.is_floating_point or weight.numel() == 0:
        raise NumericsError(
            f"{where}: weight is {weight.dtype} {list(weight.shape)}, needed a non-empty floating [..., out, in]"
        )
    require_finite(weight=weight)


def unsqueezed(tensor: Tensor | None) -> Tensor | None:
    """With a last dimension of 1, where there is a tensor."""
    return None if tensor is None else tensor.unsqueeze(-1)


def working_type(dtype: torch.dtype) -> torch.dtype:
    """The type in which weights of ``dtype`` are rounded: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def _usable(scale: Tensor) -> Tensor:
    # A zero scale is a group of zeros, or of weights too small for the dtype; at scale 1 they round to exactly 0.
    return torch.where(scale != 0, scale, torch.ones_like(scale))
