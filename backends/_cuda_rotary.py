"""Triton kernel of packages for CUDA: the cosines and sines of rotary embedding."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from surgeon.backends._cuda_rows import wrapped


@triton.jit
def _cos_sin_kernel(x, cosines, sines, count, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    angle = tl.load(x + place, mask=place < count, other=0.0)
    tl.store(cosines + place, tl.cos(angle), mask=place < count)
    tl.store(sines + place, tl.sin(angle), mask=place < count)


@triton_op("surgeon::cos_sin", mutates_args={})
def cos_sin(x: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines.

    Args:
        x: contiguous float32, radians.

    Returns:
        Two tensors like x.
    """
    cosines, sines = torch.empty_like(x), torch.empty_like(x)
    count = x.numel()
    wrapped(_cos_sin_kernel)[(triton.cdiv(count, 256),)](x, cosines, sines, count, BLOCK=256, num_warps=4)
    return cosines, sines
