"""Kernels of AOTInductor packages for CUDA alone: microseconds, and bytes per second beside what the card reads.

``benchmarks/gpu.py`` times whole models, in minutes; this takes seconds, for work on one kernel.  Shapes are those of a
Mixtral-8x7B layer at batch 1 and 16: experts in bfloat16 and 4 bits, the linears in 4 bits, attention over a cache of 2048
positions that it copies to one of 2049, and matrices unpacked for many rows.  Every result is compared with float32.  Launches
are in a CUDA graph, so that Python is not timed, over as many copies as fill more than the card's cache.

What one kernel does in place of several is timed beside them, as torch compiles them: a router, turning queries and keys where
keys and values are written, and the gate of experts in their first product.  ``--fused`` times these alone.

    python benchmarks/gpu_kernels.py
    python benchmarks/gpu_kernels.py --fused

Without a GPU it says so and exits with 3.
"""

from __future__ import annotations

import argparse
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


def beside(
    name: str, fused: list[Callable[[], object]], apart: list[Callable[[], object]], read: float, errors: tuple[float, float]
) -> Iterator[Measured]:
    """One kernel, and what it replaces."""
    yield Measured(f"{name}, one kernel", timed(fused), read, errors[0])
    yield Measured(f"{name}, apart", timed(apart), read, errors[1])


def router(batch: int, experts: int, width: int, k: int) -> Iterator[Measured]:
    """Product, softmax, choice and normalised weights of a router in bfloat16."""
    from surgeon.backends._aot_cuda import top_k
    from surgeon.backends._cuda_routing import route_rows

    def spelt(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        values, index = top_k(F.linear(x, weight).softmax(-1, dtype=torch.float32), k)
        return values / values.sum(-1, keepdim=True), index

    def table(found: tuple[Tensor, Tensor]) -> Tensor:
        return torch.zeros(batch, experts, device="cuda").scatter(1, found[1], found[0])

    compiled = torch.compile(spelt, dynamic=False)
    read = 2.0 * experts * width
    x = torch.randn(batch, width, device="cuda").to(torch.bfloat16)
    copies = min(2048, -(-CACHE // int(read)))
    weights = [(torch.randn(experts, width, device="cuda") / width**0.5).to(torch.bfloat16) for _ in range(copies)]
    fused = [
        lambda w=w: route_rows(x, w, None, None, k, 1, 0, 2, True, 0.0, 1.0, [2, 0, 0, 0, 0, 0], torch.float32) for w in weights
    ]
    apart = [lambda w=w: compiled(x, w) for w in weights]
    wanted = table(spelt(x.float(), weights[0].float()))
    errors = (relative(table(fused[0]()), wanted), relative(table(apart[0]()), wanted))
    yield from beside(f"router of {experts} experts, batch {batch}", fused, apart, read, errors)


def turning(batch: int, positions: int = 2048, heads: int = 8, members: int = 4, size: int = 128) -> Iterator[Measured]:
    """Queries and keys of one new token turned, keys and values written into buffers."""
    from surgeon.backends._cuda_attention import append_in_place
    from surgeon.backends._cuda_rotary import turn_and_append

    def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        low, high = x.chunk(2, -1)
        return x * cos + torch.cat([-high, low], -1) * sin

    def both(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return turned(q, cos, sin), turned(k, cos, sin)

    compiled = torch.compile(both, dynamic=False)
    ends = (0, heads * members * size, heads * (members + 1) * size, heads * (members + 2) * size)
    joined = torch.randn(batch, 1, ends[-1], device="cuda").to(torch.bfloat16)
    q, k, v = (joined[..., a:b].unflatten(2, (-1, size)).transpose(1, 2) for a, b in zip(ends, ends[1:], strict=False))
    angles = torch.randn(batch, 1, 1, size, device="cuda")
    cos, sin = angles.cos().to(torch.bfloat16), angles.sin().to(torch.bfloat16)
    start = torch.tensor([positions], device="cuda")
    buffers = [torch.zeros(batch, heads, positions + 8, size, device="cuda", dtype=torch.bfloat16) for _ in range(2)]

    def fused() -> Tensor:
        return turn_and_append(q, k, v, cos, sin, *buffers, start, positions + 1)

    def apart() -> Tensor:
        queries, keys = compiled(q, k, cos, sin)
        append_in_place(*buffers, keys, v, start, positions + 1)
        return queries

    errors: list[float] = []
    for function in (fused, apart):
        found = torch.cat([function(), buffers[0][:, :, positions : positions + 1]], 1)
        wanted = torch.cat([turned(x.float(), cos.float(), sin.float()) for x in (q, k)], 1)
        assert torch.equal(buffers[1][:, :, positions : positions + 1], v)
        errors.append(relative(found, wanted))
    name, moved = f"turning and writing, batch {batch}", 2 * joined.nbytes
    yield from beside(name, [fused] * 64, [apart] * 64, moved, (errors[0], errors[1]))


def gated(bits: int, batch: int, experts: int = 8, inner: int = 14336, width: int = 4096) -> Iterator[Measured]:
    """The first product of experts and their gate, two experts a token."""
    from surgeon.backends._aot_tiles import TiledTensor
    from surgeon.backends._cuda_gates import gate_of
    from surgeon.backends._cuda_rows import few_rows, few_rows_gated
    from surgeon.ops.mixture import inner_activation

    index = torch.stack([torch.randperm(experts, device="cuda")[:2] for _ in range(batch)]).flatten()
    x = torch.randn(batch, width, device="cuda").to(torch.bfloat16)
    if bits == 0:
        dense = weight = 0.02 * torch.randn(experts, 2 * inner, width, device="cuda", dtype=torch.bfloat16)
        scale = None
    else:
        codes = random_codes(bits, experts, 2 * inner, width)
        dense, tiles = codes.dequantize(), TiledTensor.of(codes)
        weight, scale = tiles.packed, tiles.scale
    form = gate_of("silu")
    assert form is not None
    compiled = torch.compile(lambda pre: inner_activation(pre.sum(0), inner, "silu").to(torch.bfloat16), dynamic=False)
    group = GROUP if bits else 1

    def fused() -> Tensor:
        return few_rows_gated(x, index, weight, scale, None, None, bits, group, 2, *form)

    def apart() -> Tensor:
        found: Tensor = compiled(few_rows(x, index, weight, scale, None, bits, group, 2, 2))
        return found

    wanted = torch.stack([
        inner_activation(x[pair // 2].float() @ dense[expert].float().T, inner, "silu")
        for pair, expert in enumerate(index.tolist())
    ])  # fmt: skip
    read = int(index.unique().numel()) * 2 * inner * width * (2 if bits == 0 else bits / 8 + 2 / GROUP)
    errors = (relative(fused(), wanted), relative(apart(), wanted))
    name = f"gate and up with their gate, {f'{bits} bits' if bits else 'bfloat16'}, batch {batch}"
    yield from beside(name, [fused] * 8, [apart] * 8, read, errors)


def prompt(name: str, rows: int, experts: int, out: int, width: int) -> Iterator[Measured]:
    """Products of many rows with 4-bit matrices, equally many for each expert; and behind unpacking, as torch has them."""
    from surgeon.backends._aot_tiles import TiledTensor
    from surgeon.backends._cuda_many import many_rows
    from surgeon.backends._cuda_rows import unpack_tiles

    codes = random_codes(4, experts, out, width)
    tiles, dense = TiledTensor.of(codes), codes.dequantize()
    x = torch.randn(rows, width, device="cuda").to(torch.bfloat16)
    ends = torch.arange(1, experts + 1, device="cuda", dtype=torch.int32) * (rows // experts)

    def multiplied(weight: Tensor) -> Tensor:
        if experts == 1:
            return F.linear(x, weight[0])
        product: Tensor = torch._grouped_mm(x, weight.transpose(1, 2), offs=ends)
        return product

    def fused() -> Tensor:
        many = rows > 128 * experts
        return many_rows(x, ends if experts > 1 else None, tiles.packed, tiles.scale, None, None, 4, GROUP, many)

    def apart() -> Tensor:
        return multiplied(unpack_tiles(tiles.packed, tiles.scale, None, 4, GROUP))

    moved = float(tiles.packed.nbytes + tiles.scale.nbytes + 2 * rows * (width + out))
    each = rows // experts
    wanted = torch.cat([x[e * each :][:each].float() @ dense[e].float().T for e in range(experts)])
    errors = (relative(fused(), wanted), relative(apart(), wanted))
    yield from beside(f"{name}, {rows} rows, 4 bits", [fused] * 4, [apart] * 4, moved, errors)
    plain = timed([lambda: multiplied(dense)] * 4)
    yield Measured(f"{name}, {rows} rows, bfloat16", plain, moved, relative(multiplied(dense), wanted))


def fusions() -> Iterator[Measured]:
    """Kernels that do what several did, beside those."""
    for rows in (512, 4096):
        yield from prompt("experts, gate and up", rows, 8, 28672, 4096)
        yield from prompt("experts, down", rows, 8, 4096, 14336)
    yield from prompt("queries, keys and values", 2048, 1, 6144, 4096)
    for batch in (1, 16):
        yield from router(batch, 8, 4096, 2)
        yield from router(batch, 128, 2048, 8)
        yield from turning(batch)
        for bits in (0, 4):
            yield from gated(bits, batch)


def measured() -> Iterator[Measured]:
    for batch in (1, 16):
        for bits in (0, 4):
            yield rows("experts, gate and up", bits, 8, 28672, 4096, batch, 2)
            yield rows("experts, down", bits, 8, 4096, 14336, batch, 1)
        yield rows("queries, keys and values", 4, 1, 6144, 4096, batch, 1)
        yield rows("head", 4, 1, 32000, 4096, batch, 1)
        yield attention(batch)
    yield unpacked()
    yield from fusions()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fused", action="store_true", help="only what one kernel does in place of several")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks/gpu_kernels.py: no CUDA device is here; nothing was measured")
        return NO_GPU
    rate, known = bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: {rate / 1e12:.2f} TB/s ({known})")
    torch.manual_seed(0)
    with torch.no_grad():
        for row in fusions() if arguments.fused else measured():
            speed = row.read / row.microseconds * 1e6
            share = f"{speed / 1e12:.2f} TB/s, {speed / rate:.0%}"
            print(f"{row.name:60}{row.microseconds:9.1f} us  {share:18} relative error {row.error:.1e}", flush=True)
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
