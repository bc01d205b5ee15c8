"""Products of many rows with low-bit matrices for CUDA, under Triton's interpreter on the CPU."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor

from surgeon.backends import _aot_products as products
from surgeon.backends._aot_tiles import TiledTensor
from surgeon.backends._cuda_gates import gate_of
from surgeon.numerics.quantization import quantize_groupwise
from surgeon.ops.mixture import inner_activation, moe_dense

kernels = pytest.importorskip("surgeon.backends._cuda_many", reason="Triton is for Linux")


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels.Form, "of", lambda device, many: kernels.Form(128, 32 if many else 16, 4, 2))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group"), [(2, 64), (4, 32), (4, 64), (4, 128), (4, 256), (8, 32)])
@pytest.mark.usefixtures("small_blocks")
def test_rows_are_multiplied_with_the_codes_of_their_experts(bits: int, group: int, symmetric: bool) -> None:
    counts = torch.tensor([3, 0, 40, 32, 1])  # half a block, nothing, one and a bit, one exactly
    experts, rows, width = len(counts), 192, 256
    codes = quantize_groupwise(randn(experts, rows, width, seed=1), bits=bits, group=group, symmetric=symmetric)
    tiles, dense = TiledTensor.of(codes), codes.dequantize().double()
    parts = (tiles.packed, tiles.scale, tiles.zero_point)
    x, bias, ends = randn(int(counts.sum()), width), randn(experts, rows, seed=2), counts.cumsum(0).to(torch.int32)
    expert = torch.repeat_interleave(torch.arange(experts), counts)
    wanted = torch.einsum("sk,snk->sn", x.double(), dense[expert])
    for many in (True, False):
        assert relative(kernels.many_rows(x, ends, *parts, None, bits, group, many), wanted) < 5e-4
    alone = [None if part is None else part[2:3] for part in (*parts, bias)]
    found = kernels.many_rows(x, None, *alone, bits, group, True)
    assert relative(found, x.double() @ dense[2].T + bias[2].double()) < 5e-4
    gate = gate_of("silu")
    assert gate is not None
    hidden = inner_activation(wanted + bias[expert].double(), rows // 2, "silu")
    assert relative(kernels.many_rows_gated(x, ends, *parts, bias, bits, group, True, *gate), hidden) < 5e-4


@pytest.mark.parametrize("activation", ["silu", "mish", "identity"])
@pytest.mark.parametrize("tokens", [10, 30, 70])
@pytest.mark.usefixtures("small_blocks")
def test_experts_of_any_number_of_rows(activation: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small and large blocks; ``mish`` is a gate that the kernel does not know, ``identity`` none."""
    monkeypatch.setattr("surgeon.backends._cuda_rows.PAIRS", 32)
    monkeypatch.setattr(products, "SMALL_BLOCKS", 16)  # 64 pairs of 4 experts
    experts, width, inner = 4, 128, 64
    rows = inner if activation == "identity" else 2 * inner
    w_in, w_out = (
        TiledTensor.of(quantize_groupwise(0.1 * randn(experts, *sizes, seed=seed), bits=4, group=64, symmetric=True))
        for seed, sizes in ((1, (rows, width)), (2, (width, inner)))
    )
    index = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(3)).topk(2).indices
    x, share = randn(tokens, width), randn(tokens, 2, seed=4).softmax(-1)
    b_in, b_out = randn(experts, rows, seed=5), randn(experts, width, seed=6)
    used: Counter[str] = Counter()
    found = products.experts(used, x, index, share, w_in, w_out, b_in, b_out, activation)
    exact = (part.double() for part in (x, share, w_in.dequantize(), w_out.dequantize(), b_in, b_out))
    x_, share_, in_, out_, bias_in, bias_out = exact
    assert relative(found, moe_dense(x_, index, share_, in_, out_, bias_in, bias_out, activation)) < 2e-3
    assert used == {"experts few rows": 1, "experts over codes": 1}


@pytest.mark.parametrize("rows", [20, 40, 60])
@pytest.mark.usefixtures("small_blocks")
def test_linears_of_any_number_of_rows(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("surgeon.backends._cuda_rows.PAIRS", 32)
    monkeypatch.setattr(products, "LINEAR_ROWS", 48)
    codes = TiledTensor.of(quantize_groupwise(randn(128, 128, seed=1), bits=4, group=32, symmetric=False))
    x, bias = randn(2, rows // 2, 128), randn(128, seed=2)
    wanted = x.double() @ codes.dequantize().double().T
    assert relative(products.linear(x, codes), wanted) < 1e-3
    assert relative(products.linear(x, codes, bias), wanted + bias.double()) < 1e-3
