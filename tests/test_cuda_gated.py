"""Gates behind the first product of experts, in its kernel: under Triton's interpreter, against the gates themselves."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor

from surgeon.backends import _aot_products as products
from surgeon.backends._aot_tiles import TiledTensor
from surgeon.gates import gate
from surgeon.numerics.quantization import QuantizedTensor, quantize_groupwise
from surgeon.ops import moe_dense
from tests.test_cuda_kernels import BOUND, randn, relative

gates = pytest.importorskip("surgeon.backends._cuda_gates", reason="Triton is for Linux")
kernels = pytest.importorskip("surgeon.backends._cuda_rows", reason="Triton is for Linux")

GATES = (
    "silu", "gelu", "gelu_tanh", "relu", "relu2", "identity", "sigmoid", "quick_gelu", "swish(alpha=1.25)",
    "quick_gelu(gate_max=7,up_limit=7,offset=1)", "silu(cap=0.5)", "relu2(scale=0.8944,shift=-0.4472)",
)  # fmt: skip


def hidden_of(x: Tensor, w: Tensor, bias: Tensor | None, index: Tensor, k: int, activation: str) -> Tensor:
    """[S, I] in float64."""
    pre = torch.einsum("sk,snk->sn", x.double().repeat_interleave(k, 0), w.double()[index])
    pre = pre if bias is None else pre + bias.double()[index]
    return gate(activation).joined(*pre.chunk(2, -1))


@pytest.mark.parametrize("activation", GATES)
def test_gates_are_computed_as_they_are_defined(activation: str) -> None:
    x, w, bias = randn(5, 64), 0.5 * randn(4, 2 * 40, 64, seed=1), randn(4, 80, seed=2)
    index = torch.randint(0, 4, (10,), generator=torch.Generator().manual_seed(3))
    form = gates.gate_of(activation)
    assert form is not None
    found = kernels.few_rows_gated(x, index, w, None, None, bias, 0, 1, 2, *form)
    torch.testing.assert_close(found.double(), hidden_of(x, w, bias, index, 2, activation), rtol=1e-5, atol=1e-5)


def test_gates_that_it_does_not_know() -> None:
    assert gates.gate_of("mish") is None
    assert gates.gate_of("xielu(rise=0.8,fall=0.8,lift=0.5)") is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize(("experts", "k", "inner"), [(8, 2, 96), (64, 8, 40), (3, 1, 31)])
def test_realistic_numbers_of_experts(dtype: torch.dtype, rows: int, experts: int, k: int, inner: int) -> None:
    x, w = randn(rows, 192, dtype=dtype), 0.1 * randn(experts, 2 * inner, 192, dtype=dtype, seed=1)
    scores = torch.rand(rows, experts, generator=torch.Generator().manual_seed(2))
    index = scores.topk(k).indices.flatten()
    form = gates.gate_of("silu")
    found = kernels.few_rows_gated(x, index, w, None, None, None, 0, 1, k, *form)
    assert found.shape == (rows * k, inner)
    assert found.dtype == dtype
    assert relative(found, hidden_of(x, w, None, index, k, "silu")) < BOUND[dtype]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("tiled", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group"), [(2, 64), (4, 32), (4, 128), (8, 32)])
def test_codes_and_tiles_of_them(dtype: torch.dtype, tiled: bool, symmetric: bool, bits: int, group: int) -> None:
    x, w = randn(3, 256, dtype=dtype), 0.1 * randn(4, 192, 256, dtype=dtype, seed=1)  # halves of one tile and a half
    codes = quantize_groupwise(w, bits=bits, group=group, symmetric=symmetric)
    exact = QuantizedTensor(codes.packed, codes.scale.double(), codes.zero_point, bits, group, 256).dequantize()
    held = TiledTensor.of(codes) if tiled else codes
    index, form = torch.tensor([3, 0, 3, 1, 3, 3]), gates.gate_of("silu")
    operands = (held.packed, held.scale, held.zero_point, None, bits, group)
    found = kernels.few_rows_gated(x, index, *operands, 2, *form)
    assert relative(found, hidden_of(x, exact, None, index, 2, "silu")) < BOUND[dtype]


@pytest.mark.parametrize(("inner", "width", "activation", "gated"), [
    (96, 64, "silu", True),
    (96, 64, "mish", False),
    (48, 1024, "silu", False),  # so few rows that the columns are cut in parts
])  # fmt: skip
def test_experts_use_it_where_products_come_in_one_part(
    inner: int, width: int, activation: str, gated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: Counter[str] = Counter()
    before = kernels.few_rows_gated

    def counted(*arguments: object) -> Tensor:
        calls["gated"] += 1
        found: Tensor = before(*arguments)
        return found

    monkeypatch.setattr(kernels, "few_rows_gated", counted)
    x, index = randn(4, width), torch.tensor([[0, 2], [1, 0], [2, 1], [0, 1]])
    weight, w_in, w_out = randn(4, 2, seed=1), 0.1 * randn(3, 2 * inner, width, seed=2), randn(3, width, inner, seed=3)
    b_in, b_out = randn(3, 2 * inner, seed=4), randn(3, width, seed=5)
    found = products.experts(Counter(), x, index, weight, w_in, w_out, b_in, b_out, activation)
    torch.testing.assert_close(
        found, moe_dense(x, index, weight, w_in, w_out, b_in, b_out, activation), rtol=1e-4, atol=1e-4
    )
    assert calls["gated"] == int(gated)
