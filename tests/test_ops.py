"""The semantic operators against a loop over tokens, autograd through ATen, and themselves after export."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgeon.activations import ACTIVATIONS
from surgeon.errors import RegistryError, RewriteError
from surgeon.numerics import quantize_groupwise
from surgeon.ops import (
    DECOMPOSITIONS,
    dequantize,
    fake_quantize_dynamic,
    mixture,
    moe,
    moe_backward,
    moe_dense,
    moe_gathered,
)
from surgeon.ops.grouped import sort_by_expert

Arguments = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]
# torch's own deep copy of a pytree specification warns about itself
treespec_warning = pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.:FutureWarning")
FORMS = [(gated, bias) for gated in (False, True) for bias in (False, True)]


def arguments(
    tokens: int = 7,
    k: int = 2,
    experts: int = 4,
    width: int = 6,
    inner: int = 3,
    out: int = 5,
    *,
    gated: bool = True,
    bias: bool = True,
    dtype: torch.dtype = torch.float64,
    grad: bool = False,
    seed: int = 0,
) -> Arguments:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(grad)

    rows = 2 * inner if gated else inner
    index = torch.randint(0, experts, (tokens, k), generator=generator)
    x, weight, w_in, w_out = (
        normal(tokens, width),
        normal(tokens, k),
        normal(experts, rows, width),
        normal(experts, out, inner),
    )
    return (
        x,
        index,
        weight,
        w_in,
        w_out,
        (normal(experts, rows) if bias else None),
        (normal(experts, out) if bias else None),
    )


def one_at_a_time(
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    b_in: Tensor | None,
    b_out: Tensor | None,
    name: str,
) -> Tensor:
    """The definition, read aloud: every token, every expert it names."""
    function, inner = ACTIVATIONS[name].function, w_out.shape[2]
    rows = []
    for t in range(x.shape[0]):
        total = x.new_zeros(w_out.shape[1])
        for j in range(index.shape[1]):
            e = int(index[t, j])
            pre = F.linear(x[t], w_in[e], None if b_in is None else b_in[e])
            hidden = function(pre) if len(pre) == inner else function(pre[:inner]) * pre[inner:]
            total = total + weight[t, j] * F.linear(hidden, w_out[e], None if b_out is None else b_out[e])
        rows.append(total)
    return torch.stack(rows) if rows else x.new_zeros(0, w_out.shape[1])


# ---------------------------------------------------------------------------------------------------------------- moe


@pytest.mark.parametrize("form", [moe, moe_dense, moe_gathered])
@pytest.mark.parametrize(("gated", "bias"), FORMS)
def test_moe_equals_the_definition(form: Any, gated: bool, bias: bool) -> None:
    for name in ACTIVATIONS:
        a = arguments(gated=gated, bias=bias)
        torch.testing.assert_close(form(*a, name), one_at_a_time(*a, name), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", [moe, moe_dense, moe_gathered])
def test_moe_at_the_edges(form: Any) -> None:
    cases = {
        "no tokens": arguments(tokens=0),
        "one token": arguments(tokens=1),
        "k equals E": arguments(k=4),
        "one expert": arguments(k=1, experts=1),
        "more experts than pairs": arguments(tokens=2, experts=64),
        "k is 0": arguments(k=0),
    }
    for a in cases.values():
        torch.testing.assert_close(form(*a, "silu"), one_at_a_time(*a, "silu"), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", [moe, moe_dense, moe_gathered])
def test_moe_adds_duplicates_and_ignores_idle_experts(form: Any) -> None:
    x, _, weight, w_in, w_out, b_in, b_out = arguments()
    index = torch.full((7, 2), 2)
    single = moe(x, index[:, :1], weight.sum(1, keepdim=True), w_in, w_out, b_in, b_out, "gelu")
    torch.testing.assert_close(form(x, index, weight, w_in, w_out, b_in, b_out, "gelu"), single, rtol=1e-12, atol=1e-12)
    # linear in the routing weights, whatever their sign
    args = (w_in, w_out, b_in, b_out, "gelu")
    torch.testing.assert_close(form(x, index, -3 * weight, *args), -3 * form(x, index, weight, *args))


def test_moe_of_all_experts_with_one_ffn_cut_in_slices_is_the_ffn() -> None:
    # the identity behind MoE-fication: neurons dealt out to experts, every expert chosen with weight 1
    x, _, _, gate_up, down, _, _ = arguments(experts=1, inner=12)
    hidden = F.silu(x @ gate_up[0, :12].T) * (x @ gate_up[0, 12:].T)
    w_in = torch.cat([gate_up[0, :12].view(4, 3, -1), gate_up[0, 12:].view(4, 3, -1)], dim=1)
    w_out = down[0].view(-1, 4, 3).transpose(0, 1)  # not contiguous on purpose
    index = torch.arange(4).expand(len(x), 4)
    found = moe(x, index, torch.ones(len(x), 4, dtype=x.dtype), w_in, w_out, None, None, "silu")
    torch.testing.assert_close(found, hidden @ down[0].T)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3), (torch.float32, 2e-6)])
def test_moe_in_low_precision(dtype: torch.dtype, tolerance: float) -> None:
    a = arguments(tokens=40, width=32, inner=16, out=32, dtype=dtype)
    exact = one_at_a_time(*(t.double() if t is not None and t.is_floating_point() else t for t in a), "silu")  # type: ignore[arg-type]
    for form in (moe, moe_dense, moe_gathered):
        found = form(*a, "silu")
        assert found.dtype == dtype
        assert (found.double() - exact).norm() / exact.norm() < tolerance


def test_moe_keeps_a_wide_router_weight() -> None:
    x, index, weight, *rest = arguments(dtype=torch.bfloat16, grad=True)
    wide = weight.detach().float().requires_grad_()
    y = moe(x, index, wide, *rest, "silu")
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert wide.grad is not None
    assert wide.grad.dtype == torch.float32


def test_grouped_kernel_path_equals_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    # the path of CUDA, run on the CPU's implementation of the same kernel
    a = arguments(tokens=9, experts=5, width=16, inner=8, out=24, dtype=torch.float32)
    grad = torch.randn(9, 24, generator=torch.Generator().manual_seed(1))
    flags = [True] * 6
    forward, backward = moe(*a, "silu"), moe_backward(grad, *a, "silu", flags)
    monkeypatch.setattr(mixture, "has_grouped_kernel", lambda *_: True)
    torch.testing.assert_close(moe(*a, "silu"), forward)
    torch.testing.assert_close(moe_backward(grad, *a, "silu", flags), backward)


@pytest.mark.parametrize(("gated", "bias"), FORMS)
def test_moe_gradients(gated: bool, bias: bool) -> None:
    for name in ("silu", "gelu", "relu2") if gated else ("tanh", "gelu_tanh"):
        a = arguments(tokens=5, gated=gated, bias=bias, grad=True)
        assert torch.autograd.gradcheck(lambda *t: moe(*t, name), a)  # noqa: B023


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_moe_gradients_equal_autograd_through_aten(name: str) -> None:
    for gated, bias in FORMS:
        a = arguments(tokens=30, gated=gated, bias=bias, grad=True)
        leaves = [t for t in a if t is not None and t.requires_grad]
        seed = torch.randn(30, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        found = torch.autograd.grad((moe(*a, name) * seed).sum(), leaves)
        expected = torch.autograd.grad((moe_dense(*a, name) * seed).sum(), leaves)
        for f, e in zip(found, expected, strict=True):
            torch.testing.assert_close(f, e, rtol=1e-6, atol=1e-6)  # ATen's hardsigmoid holds 1 / 6 as a float32


def test_moe_backward_computes_only_what_is_needed() -> None:
    a = arguments()
    grad = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    everything = moe_backward(grad, *a, "silu", [True] * 6)
    for i in range(6):
        (alone,) = moe_backward(grad, *a, "silu", [j == i for j in range(6)])
        assert torch.equal(alone, everything[i])
    assert moe_backward(grad, *a, "silu", [False] * 6) == []
    frozen = arguments(tokens=0)
    assert [tuple(g.shape) for g in moe_backward(grad[:0], *frozen, "silu", [True] * 6)] == [
        (0, 6), (0, 2), (4, 6, 6), (4, 5, 3), (4, 6), (4, 5),
    ]  # fmt: skip


@pytest.mark.parametrize(("gated", "bias"), [(False, False), (True, True)])
def test_moe_is_a_proper_operator(gated: bool, bias: bool) -> None:
    for a in (arguments(gated=gated, bias=bias, grad=True), arguments(tokens=0, gated=gated, bias=bias)):
        torch.library.opcheck(torch.ops.surgeon.moe.default, (*a, "silu"))
    plain = arguments(gated=gated, bias=bias)
    grad = torch.randn(7, 5, dtype=torch.float64)
    torch.library.opcheck(torch.ops.surgeon.moe_backward.default, (grad, *plain, "silu", [True] * 4 + [bias] * 2))


def test_moe_refuses_what_does_not_fit() -> None:
    x, index, weight, w_in, w_out, b_in, b_out = arguments()
    with pytest.raises(RegistryError, match="swish"):
        moe(x, index, weight, w_in, w_out, b_in, b_out, "swish")
    wrong: list[tuple[Any, str]] = [
        ((x[:, :5], index, weight, w_in, w_out, b_in, b_out), "with the H of x"),
        ((x, index[:3], weight, w_in, w_out, b_in, b_out), "one row of index"),
        ((x, index[:, :1], weight, w_in, w_out, b_in, b_out), "same shape"),
        ((x, index, weight, w_in[:2], w_out, b_in, b_out), "same number of experts"),
        ((x, index, weight, w_in[:, :5], w_out, b_in, b_out), "O = I"),
        ((x, index, weight, w_in, w_out, b_in[:, :1], b_out), "rows of its matrix"),  # type: ignore[index]
        ((x, index, weight, w_in.float(), w_out, b_in, b_out), "dtype of x"),
        ((x, weight, weight, w_in, w_out, b_in, b_out), "integer index"),
        ((x, index + 1, weight, w_in, w_out, b_in, b_out), "0 to 3"),
        ((x, index - 1, weight, w_in, w_out, b_in, b_out), "0 to 3"),
    ]
    for a, message in wrong:
        with pytest.raises(RewriteError, match=message):
            moe(*a, "silu")


class _Layer(nn.Module):
    def __init__(self, gated: bool, bias: bool) -> None:
        super().__init__()
        _, _, _, w_in, w_out, b_in, b_out = arguments(gated=gated, bias=bias, out=6, dtype=torch.float32)
        self.w_in, self.w_out = nn.Parameter(w_in), nn.Parameter(w_out)
        self.b_in, self.b_out = (nn.Parameter(b_in), nn.Parameter(b_out)) if b_in is not None else (None, None)  # type: ignore[arg-type]
        self.router = nn.Parameter(torch.randn(4, 6, generator=torch.Generator().manual_seed(2)))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        weight, index = (flat @ self.router.T).softmax(-1).topk(2, dim=-1)
        return x + moe(flat, index, weight, self.w_in, self.w_out, self.b_in, self.b_out, "gelu").view(x.shape)


@treespec_warning
@pytest.mark.parametrize(("gated", "bias"), [(False, True), (True, False)])
def test_moe_exports_with_dynamic_tokens_and_decomposes_to_aten(gated: bool, bias: bool) -> None:
    layer = _Layer(gated, bias)
    dynamic = torch.export.Dim.DYNAMIC
    with torch.no_grad():
        exported = torch.export.export(layer, (torch.randn(2, 3, 6),), dynamic_shapes=({0: dynamic, 1: dynamic},))
    assert [n.target for n in exported.graph.nodes].count(torch.ops.surgeon.moe.default) == 1
    gathered = {**DECOMPOSITIONS, torch.ops.surgeon.moe.default: moe_gathered}
    for table in (DECOMPOSITIONS, gathered):
        aten = exported.run_decompositions(table)
        assert not any("surgeon" in str(n.target) for n in aten.graph.nodes)
        for batch, length in ((1, 1), (4, 5)):
            x = torch.randn(batch, length, 6)
            torch.testing.assert_close(aten.module()(x), layer(x), rtol=1e-5, atol=1e-5)
            assert torch.equal(exported.module()(x), layer(x))


# ------------------------------------------------------------------------------------------------- low-bit operators


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_dequantize(bits: int, symmetric: bool) -> None:
    weight = torch.randn(3, 5, 21, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    q = quantize_groupwise(weight, bits=bits, group=8, symmetric=symmetric)
    rest = (q.zero_point, bits, 8, 21)
    found = dequantize(q.packed, q.scale, *rest)
    # every code read bit by bit
    zero = torch.full_like(q.scale, 2 ** (bits - 1)) if q.zero_point is None else q.zero_point.double()
    for o, i in ((0, 0), (2, 7), (4, 8), (1, 20)):
        at = (i % 8) * bits
        code = (int(q.packed[1, o, i // 8, at // 8]) >> (at % 8)) & (2**bits - 1)
        assert float(found[1, o, i]) == (code - float(zero[1, o, i // 8])) * float(q.scale[1, o, i // 8])
    scale = q.scale.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: dequantize(q.packed, s, *rest), scale)
    torch.library.opcheck(torch.ops.surgeon.dequantize.default, (q.packed, scale, *rest))


def test_dequantize_gradient_is_autograds_and_ignores_the_padding() -> None:
    weight = torch.randn(5, 13, generator=torch.Generator().manual_seed(0))
    q = quantize_groupwise(weight, bits=4, group=8, symmetric=False)
    plain = DECOMPOSITIONS[torch.ops.surgeon.dequantize.default]
    seed = torch.randn(5, 13, generator=torch.Generator().manual_seed(1))
    scale = q.scale.clone().requires_grad_()
    grads = [
        torch.autograd.grad((form(q.packed, scale, q.zero_point, 4, 8, 13) * seed).sum(), scale)[0]
        for form in (dequantize, plain)
    ]
    torch.testing.assert_close(*grads)


def test_dequantize_refuses_what_does_not_fit() -> None:
    q = quantize_groupwise(torch.randn(5, 21), bits=4, group=8, symmetric=False)
    for a, message in (
        ((q.packed, q.scale, q.zero_point, 3, 8, 21), "bits"),
        ((q.packed, q.scale, q.zero_point, 4, 16, 21), "bytes per group"),
        ((q.packed, q.scale[:, :1], q.zero_point, 4, 8, 21), "scale"),
        ((q.packed, q.scale, q.scale, 4, 8, 21), "zero_point"),
        ((q.packed, q.scale, q.zero_point, 4, 8, 25), "last group"),
        ((q.packed, q.scale, q.zero_point, 4, 8, 16), "last group"),
    ):
        with pytest.raises(RewriteError, match=message):
            dequantize(*a)


def test_fake_quantize_dynamic_is_onnx_dynamic_quantize_linear() -> None:
    reference = pytest.importorskip("onnx.reference.ops.op_dynamic_quantize_linear").DynamicQuantizeLinear
    generator = torch.Generator().manual_seed(0)
    for x in (
        torch.randn(4, 33, generator=generator),
        torch.rand(4, 33, generator=generator) + 2,
        -torch.rand(4, 33, generator=generator) - 2,
        torch.zeros(3),
    ):
        codes, scale, zero = reference._run(None, x.numpy())
        expected = (codes.astype("float32") - float(zero)) * scale if x.any() else x.numpy()
        torch.testing.assert_close(fake_quantize_dynamic(x), torch.as_tensor(expected))


def test_fake_quantize_dynamic_gradient_and_operator() -> None:
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    seed = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    (grad,) = torch.autograd.grad((fake_quantize_dynamic(x) * seed).sum(), x)
    assert torch.equal(grad, seed)
    for case in (x, torch.zeros(0, 3), torch.randn(4, 6).t(), torch.randn(4, 6)[:, ::2], torch.randn(5).bfloat16()):
        torch.library.opcheck(torch.ops.surgeon.fake_quantize_dynamic.default, (case,))


class _LowBit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        q = quantize_groupwise(torch.randn(5, 21), bits=4, group=8, symmetric=True)
        self.scale = nn.Parameter(q.scale)
        self.register_buffer("packed", q.packed)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(fake_quantize_dynamic(x), dequantize(self.packed, self.scale, None, 4, 8, 21))


@treespec_warning
def test_low_bit_operators_export_and_decompose() -> None:
    torch.manual_seed(0)
    layer = _LowBit()
    exported = torch.export.export(layer, (torch.randn(3, 21),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    aten = exported.run_decompositions(DECOMPOSITIONS)
    assert sum("surgeon" in str(n.target) for n in exported.graph.nodes) == 2
    assert not any("surgeon" in str(n.target) for n in aten.graph.nodes)
    x = torch.randn(9, 21)
    assert torch.equal(exported.module()(x), layer(x))
    torch.testing.assert_close(aten.module()(x), layer(x))


@pytest.mark.parametrize("experts", [8, 256, 300, 40_000])
def test_pairs_are_sorted_alike_on_a_device_and_on_the_host(experts: int) -> None:
    """There in the smallest type that holds all experts."""
    index = torch.randint(0, experts, (500, 2), generator=torch.Generator().manual_seed(0))
    on_device, on_host = (sort_by_expert(index, experts, each) for each in (True, False))
    for found, wanted in zip(on_device[:4], on_host[:4], strict=True):
        assert found.dtype in (torch.int32, torch.int64)
        assert torch.equal(found.long(), wanted)
