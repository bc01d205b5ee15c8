"""Kernels of AOTInductor packages for CUDA alone: microseconds, and bytes per second beside what the card reads.

``benchmarks/gpu.py`` times whole models, in minutes; this takes seconds, for work on one kernel.  Shapes are those of a
Mixtral-8x7B layer at batch 1 and 16: experts in bfloat16 and 4 bits, the linears in 4 bits, attention over a cache of 2048
positions that it copies to one of 2049, and matrices unpacked for many rows.  Every result is compared with float32.  Launches
are in a CUDA graph, so that Python is not timed, over as many copies as fill more than the card's cache.

    python benchmarks/gpu_kernels.py

Without a GPU it says so and exits with 3.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from gpu import NO_GPU, bandwidth
from torch import Tensor

from surgeon.numerics.quantization import QuantizedTensor

GROUP = 128
CACHE = 1 << 28
"""Bytes that copies of the operands take together, at least: more than the last cache of any card."""


class Measured(NamedTuple):
    """One kernel in one shape."""

    name: str
    microseconds: float
    read: float
    error: float


def timed(functions: list[Callable[[], object]]) -> float:
    """Microseconds of one of the functions, which run in turn: the best of five."""
    for function in functions:
        function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for function in functions:
            function()
    best = float("inf")
    for _ in range(5):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        best = min(best, start.elapsed_time(end))
    return 1e3 * best / len(functions)


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.float() - wanted).norm() / wanted.norm())


def random_codes(bits: int, experts: int, out: int, width: int) -> QuantizedTensor:
    """[experts, out, width] in groups of :data:`GROUP`, without zero points."""
    codes = torch.randint(0, 256, (experts, out, width // GROUP, GROUP * bits // 8), device="cuda", dtype=torch.uint8)
    steps = (0.01 * torch.rand(experts, out, width // GROUP, device="cuda")).to(torch.bfloat16)
    return QuantizedTensor(codes, steps, None, bits, GROUP, width)


def rows(name: str, bits: int, experts: int, out: int, width: int, batch: int, divisor: int) -> Measured:
    """``few_rows`` for a batch of tokens with two experts each, or for one matrix."""
    from surgeon.backends._aot_tiles import TiledTensor
    from surgeon.backends._cuda_rows import few_rows

    pairs = 2 * batch if experts > 1 else batch
    index = torch.stack([torch.randperm(experts, device="cuda")[:2] for _ in range(batch)]).flatten() if experts > 1 else None
    x = torch.randn(pairs // divisor, width, device="cuda", dtype=torch.bfloat16)
    chosen = torch.zeros(pairs, dtype=torch.int64, device="cuda") if index is None else index
    read = int(chosen.unique().numel()) * out * width * (2 if bits == 0 else bits / 8 + 2 / GROUP)
    copies = max(1, -(-CACHE // int(read)))
    runs, wanted = [], None
    for _ in range(copies):
        if bits == 0:
            weight, scale = 0.02 * torch.randn(experts, out, width, device="cuda", dtype=torch.bfloat16), None
            dense: Tensor | None = weight
        else:
            codes = random_codes(bits, experts, out, width)
            dense = codes.dequantize() if wanted is None else None
            tiles = TiledTensor.of(codes)
            weight, scale = tiles.packed, tiles.scale
        runs.append(lambda w=weight, s=scale: few_rows(x, index, w, s, None, bits, GROUP if bits else 1, divisor, 2).sum(0))
        if wanted is None:
            assert dense is not None
            each = x.float().repeat_interleave(divisor, 0)
            wanted = torch.stack([each[pair] @ dense[expert].float().T for pair, expert in enumerate(chosen.tolist())])
    assert wanted is not None
    error = relative(runs[0](), wanted)
    return Measured(f"{name}, {f'{bits} bits' if bits else 'bfloat16'}, batch {batch}", timed(runs), read, error)


def attention(batch: int, positions: int = 2048, heads: int = 8, members: int = 4, size: int = 128) -> Measured:
    """``attend_appending`` for one new token."""
    from surgeon.backends._cuda_attention import attend_appending

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda").to(torch.bfloat16)

    q, new = randn(batch, heads * members, 1, size), [randn(batch, heads, 1, size) for _ in range(2)]
    mask = torch.ones(batch, 1, 1, positions + 1, dtype=torch.bool, device="cuda")
    moved = 2 * 2 * 2 * batch * heads * positions * size  # keys and values, read and written, two bytes each
    caches = [[randn(batch, heads, positions, size) for _ in range(2)] for _ in range(max(1, -(-CACHE // moved)))]
    runs = [lambda old=old: attend_appending(q, *old, *new, mask, size**-0.5) for old in caches]
    found, keys, values = runs[0]()
    whole = [torch.cat(pair, 2) for pair in zip(caches[0], new, strict=True)]
    assert torch.equal(keys, whole[0])
    assert torch.equal(values, whole[1])
    wanted = F.scaled_dot_product_attention(q.float(), whole[0].float(), whole[1].float(), enable_gqa=True).transpose(1, 2)
    return Measured(f"attention that copies its cache, batch {batch}", timed(runs), moved, relative(found, wanted))


def unpacked(experts: int = 8, out: int = 28672, width: int = 4096) -> Measured:
    """``unpack_tiles`` of the first matrices of all experts."""
    from surgeon.backends._aot_tiles import TiledTensor
    from surgeon.backends._cuda_rows import unpack_tiles

    codes = random_codes(4, experts, out, width)
    tiles = TiledTensor.of(codes)

    def unpack() -> Tensor:
        return unpack_tiles(tiles.packed, tiles.scale, None, 4, GROUP)

    found = unpack()
    error = relative(found[:1], replace(codes, packed=codes.packed[:1], scale=codes.scale[:1]).dequantize().float())
    moved = sum(tensor.nbytes for tensor in (found, codes.packed, codes.scale))
    return Measured("matrices unpacked, 4 bits", timed([unpack]), moved, error)


def measured() -> Iterator[Measured]:
    for batch in (1, 16):
        for bits in (0, 4):
            yield rows("experts, gate and up", bits, 8, 28672, 4096, batch, 2)
            yield rows("experts, down", bits, 8, 4096, 14336, batch, 1)
        yield rows("queries, keys and values", 4, 1, 6144, 4096, batch, 1)
        yield rows("head", 4, 1, 32000, 4096, batch, 1)
        yield attention(batch)
    yield unpacked()


def main() -> int:
    if not torch.cuda.is_available():
        print("benchmarks/gpu_kernels.py: no CUDA device is here; nothing was measured")
        return NO_GPU
    rate, known = bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: {rate / 1e12:.2f} TB/s ({known})")
    torch.manual_seed(0)
    with torch.no_grad():
        for row in measured():
            speed = row.read / row.microseconds * 1e6
            share = f"{speed / 1e12:.2f} TB/s, {speed / rate:.0%}"
            print(f"{row.name:44}{row.microseconds:9.1f} us  {share:18} relative error {row.error:.1e}", flush=True)
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
