"""Group-wise and dynamic quantization against numpy and ONNX Runtime's own kernels."""

from collections.abc import Mapping

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from surgeon.numerics import (
    NumericsError,
    QuantizedTensor,
    dequantize,
    dynamic_quantize_linear,
    fake_quantize_dynamic,
    pack_codes,
    quantize_float8,
    quantize_groupwise,
    unpack_codes,
)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def session(
    nodes: list[onnx.NodeProto],
    inputs: dict[str, tuple[int, ...]],
    outputs: Mapping[str, int],
    constants: dict[str, np.ndarray],
) -> onnxruntime.InferenceSession:
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, kind, None) for name, kind in outputs.items()],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def matmul_nbits(x: Tensor, q: QuantizedTensor) -> Tensor:
    """x @ W^T by ``com.microsoft.MatMulNBits`` on the codes as they are."""
    constants = {"b": q.packed.numpy(), "scale": q.scale.numpy()}
    names = ["x", "b", "scale"]
    if q.zero_point is not None:
        # The operator packs zero points along the groups of a row, each row to whole bytes.
        pad = -q.zero_point.shape[-1] % (8 // q.bits)
        constants["zero"] = pack_codes(torch.nn.functional.pad(q.zero_point, (0, pad)), q.bits).numpy()
        names.append("zero")
    node = helper.make_node(
        "MatMulNBits",
        names,
        ["y"],
        domain="com.microsoft",
        K=q.in_features,
        N=q.packed.shape[0],
        bits=q.bits,
        block_size=q.group,
        accuracy_level=0,
    )
    run = session([node], {"x": tuple(x.shape)}, {"y": TensorProto.FLOAT}, constants)
    return torch.from_numpy(run.run(None, {"x": x.numpy()})[0])


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("in_features", "group"), [(128, 32), (96, 16), (100, 32), (48, 128)])
def test_packing_is_that_of_matmul_nbits(bits: int, symmetric: bool, in_features: int, group: int) -> None:
    q = quantize_groupwise(gaussian(24, in_features), bits=bits, group=group, symmetric=symmetric)
    assert (q.zero_point is None) == symmetric
    # The identity reads the dequantized weight out of the kernel.
    torch.testing.assert_close(matmul_nbits(torch.eye(in_features), q).T, q.dequantize(), rtol=1e-6, atol=1e-6)
    x = gaussian(5, in_features, seed=1)
    torch.testing.assert_close(matmul_nbits(x, q), x @ q.dequantize().T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_error_bounds_shapes_and_size(bits: int, dtype: torch.dtype) -> None:
    weight = gaussian(3, 20, 72).to(dtype)
    for symmetric in (True, False):
        q = quantize_groupwise(weight, bits=bits, group=32, symmetric=symmetric)
        assert q.packed.shape == (3, 20, 3, 32 * bits // 8)
        assert q.packed.dtype == torch.uint8
        assert q.scale.shape == (3, 20, 3)
        assert q.scale.dtype == dtype
        value = QuantizedTensor(q.packed, q.scale.double(), q.zero_point, bits, 32, 72).dequantize()
        assert value.shape == weight.shape
        error = torch.nn.functional.pad((value - weight.double()).abs(), (0, 24)).reshape(3, 20, 3, 32).amax(-1)
        step = q.scale.double().abs()
        # Rounding the scale itself to the dtype may move the far end of a range by half a unit of it.
        slack = 1 + 2**bits * torch.finfo(dtype).eps
        peak = torch.nn.functional.pad(weight.double().abs(), (0, 24)).reshape(3, 20, 3, 32).amax(-1)
        clips = step * (2 ** (bits - 1) - 0.75) < peak  # the finer of the symmetric scales
        assert (error <= step * slack * (torch.where(clips, 1.0, 0.5) if symmetric else 0.5)).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_symmetric_takes_the_better_of_two_scales(bits: int) -> None:
    weight = gaussian(40, 64).double()
    q = quantize_groupwise(weight, bits=bits, group=16, symmetric=True)
    blocks = weight.numpy().reshape(40, 4, 16)
    half = 2 ** (bits - 1)
    peak = np.take_along_axis(blocks, np.abs(blocks).argmax(-1)[..., None], -1)
    errors = []
    for scale in (np.abs(peak) / (half - 1), peak / -half):
        errors.append(((np.clip(np.rint(blocks / scale), -half, half - 1) * scale - blocks) ** 2).sum(-1))
    measured = (q.dequantize() - weight).square().reshape(40, 4, 16).sum(-1)
    np.testing.assert_allclose(measured.numpy(), np.minimum(*errors), rtol=1e-9)
    chosen = (q.scale < 0) | (q.scale < torch.from_numpy(np.abs(peak[..., 0]) / (half - 1)))
    assert 0 < int(chosen.sum()) < chosen.numel() or bits == 2


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_asymmetric_equals_the_onnx_definition(bits: int) -> None:
    weight = gaussian(30, 64, seed=2) + 0.5
    q = quantize_groupwise(weight, bits=bits, group=32, symmetric=False)
    assert q.zero_point is not None
    blocks = weight.numpy().reshape(30, 2, 32)
    low, high = np.minimum(blocks.min(-1), 0), np.maximum(blocks.max(-1), 0)
    scale = (high - low) / np.float32(2**bits - 1)
    zero = np.clip(np.rint(-low / scale), 0, 2**bits - 1)
    codes = np.clip(np.rint(blocks / scale[..., None]) + zero[..., None], 0, 2**bits - 1)
    assert np.array_equal(q.scale.numpy(), scale)
    assert np.array_equal(q.zero_point.numpy(), zero.astype(np.uint8))
    assert np.array_equal(unpack_codes(q.packed, bits).numpy(), codes.astype(np.uint8))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_values_on_the_grid_survive_and_quantizing_twice_changes_nothing(bits: int, symmetric: bool) -> None:
    once = quantize_groupwise(gaussian(16, 96), bits=bits, group=32, symmetric=symmetric).dequantize()
    twice = quantize_groupwise(once, bits=bits, group=32, symmetric=symmetric).dequantize()
    torch.testing.assert_close(twice, once, rtol=1e-5, atol=1e-6)


def test_ties_go_to_even() -> None:
    # Range 0..15 at 4 bits: scale 1, zero point 0.
    weight = torch.tensor([[0.5, 1.5, 2.5, 3.5, 0, 15, 14.5, 13.5]])
    q = quantize_groupwise(weight, bits=4, group=8, symmetric=False)
    assert unpack_codes(q.packed, 4).flatten().tolist() == [0, 2, 2, 4, 0, 15, 14, 14]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_zeros_stay_exactly_zero(symmetric: bool, dtype: torch.dtype) -> None:
    weight = gaussian(4, 70).to(dtype)
    weight[1] = 0
    weight[2, :32] = 0
    weight[3, 32:64] = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # its scale underflows
    q = quantize_groupwise(weight, bits=4, group=32, symmetric=symmetric)
    value = q.dequantize()
    assert q.scale.isfinite().all()
    assert (q.scale != 0).all()
    assert (value[1] == 0).all()
    assert (value[2, :32] == 0).all()
    assert (value[3, 32:64].abs() <= weight[3, 32:64].abs()).all()
    # The padding of the last group is the zero point, so it adds nothing to a product.
    codes = unpack_codes(q.packed, 4).flatten(1)[:, 70:]
    zero = torch.full((4, 1), 8, dtype=torch.uint8) if q.zero_point is None else q.zero_point[:, -1:]
    assert (codes == zero).all()


def test_group_of_a_whole_row_and_of_experts() -> None:
    weight = gaussian(4, 6, 50)
    row = quantize_groupwise(weight, bits=8, group=-1, symmetric=True)
    assert row.packed.shape == (4, 6, 1, 50)
    assert quantize_groupwise(weight[..., :49], bits=4, group=-1, symmetric=True).packed.shape == (4, 6, 1, 25)
    for expert in range(4):
        alone = quantize_groupwise(weight[expert], bits=8, group=-1, symmetric=True)
        assert torch.equal(alone.dequantize(), row.dequantize()[expert])


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_pack_and_unpack_are_inverse_with_the_first_code_lowest(bits: int) -> None:
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(0, 2**bits, (5, 3, 32), generator=generator, dtype=torch.uint8)
    packed = pack_codes(codes, bits)
    assert packed.shape == (5, 3, 32 * bits // 8)
    assert torch.equal(unpack_codes(packed, bits), codes)
    shifts = 2 ** (bits * np.arange(8 // bits))
    assert np.array_equal(packed.numpy(), (codes.numpy().reshape(5, 3, -1, 8 // bits) * shifts).sum(-1))


def dynamic_cases() -> dict[str, Tensor]:
    return {
        "both signs": gaussian(7, 33),
        "positive": gaussian(5, 9).abs() + 3,
        "negative": -gaussian(5, 9).abs() - 3,
        "zero": torch.zeros(4, 3),
        "one value": torch.full((2, 2), -1.7),
        "outlier": torch.cat([gaussian(64), torch.tensor([1e4])]),
        "large": gaussian(64, 1024, seed=4) * 3 + 0.3,
        "tiny": gaussian(40) * 1e-30,
        "halves": torch.arange(0, 256).float() / 2 - 0.25,
    }


@pytest.mark.parametrize("case", dynamic_cases())
def test_dynamic_quantization_equals_onnx_runtime(case: str) -> None:
    x = dynamic_cases()[case]
    node = helper.make_node("DynamicQuantizeLinear", ["x"], ["codes", "scale", "zero"])
    outputs = {"codes": TensorProto.UINT8, "scale": TensorProto.FLOAT, "zero": TensorProto.UINT8}
    codes, scale, zero = (
        torch.from_numpy(np.array(value))
        for value in session([node], {"x": tuple(x.shape)}, outputs, {}).run(None, {"x": x.numpy()})
    )
    ours = dynamic_quantize_linear(x)
    assert torch.equal(ours[1], scale)
    assert torch.equal(ours[2], zero)
    assert torch.equal(ours[0], codes)
    assert torch.equal(fake_quantize_dynamic(x), (codes.float() - zero.float()) * scale)


def test_fake_quantization_keeps_dtype_and_bounds_the_error() -> None:
    x = gaussian(64, 64)
    span = float(x.max().clamp(min=0) - x.min().clamp(max=0))
    assert float((fake_quantize_dynamic(x) - x).abs().max()) <= span / 255 / 2 * (1 + 1e-5)
    assert fake_quantize_dynamic(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("group", [-1, 16])
def test_float8_has_the_error_of_its_mantissa(group: int) -> None:
    weight = gaussian(6, 40) * torch.logspace(-6, 3, 6).unsqueeze(-1)
    weight[2] = 0
    q = quantize_float8(weight, group=group)
    assert q.packed.dtype == torch.float8_e4m3fn
    assert q.packed.shape == (6, 1, 40) if group == -1 else (6, 3, 16)
    step = q.scale.repeat_interleave(q.group, -1)[:, :40]
    bound = torch.maximum(weight.abs() * 2**-4, step * 2**-10)
    assert bool(((q.dequantize() - weight).abs() <= bound * (1 + 1e-5)).all())
    peak = weight.abs().amax(-1)
    torch.testing.assert_close(q.dequantize().abs().amax(-1), peak, rtol=1e-6, atol=0)  # the largest is not rounded
    again = quantize_float8(q.dequantize(), group=group)
    torch.testing.assert_close(again.dequantize(), q.dequantize(), rtol=1e-5, atol=0)
    assert bool(torch.isfinite(quantize_float8(weight.half(), group=group).dequantize()).all())


def test_what_cannot_be_quantized_is_refused() -> None:
    weight = gaussian(4, 8)
    with pytest.raises(NumericsError, match="bits = 3, needed one of 2, 4, 8"):
        quantize_groupwise(weight, bits=3, group=8, symmetric=True)
    with pytest.raises(NumericsError, match="group = 3, needed -1 or a positive multiple of 2 at 4 bits"):
        quantize_groupwise(weight, bits=4, group=3, symmetric=True)
    with pytest.raises(NumericsError, match="group = 0"):
        quantize_groupwise(weight, bits=8, group=0, symmetric=True)
    with pytest.raises(NumericsError, match="needed a non-empty floating"):
        quantize_groupwise(weight.int(), bits=8, group=8, symmetric=True)
    with pytest.raises(NumericsError, match="weight: 1 of 32"):
        quantize_groupwise(
            weight.index_fill(0, torch.tensor([0]), 0).put(torch.tensor([1]), torch.tensor([float("inf")])),
            bits=8,
            group=8,
            symmetric=True,
        )
    with pytest.raises(NumericsError, match="group = 0, needed -1 or at least 1"):
        quantize_float8(weight, group=0)
    q = quantize_groupwise(weight, bits=4, group=8, symmetric=True)
    with pytest.raises(NumericsError, match=r"needed \[..., out, 2, 4\]"):
        dequantize(q.packed, q.scale, None, 4, 8, 16)
    with pytest.raises(NumericsError, match="needed torch"):
        pack_codes(torch.zeros(4), 4)
