"""Kernels for CUDA under Triton's interpreter, and graphs that are spelt with them, on the CPU.

The interpreter has no bfloat16 products, so types here are float16 and float32; ``benchmarks/gpu.py`` compares bfloat16 with
the graph on a GPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from surgeon.backends import _aot_cuda as on_cuda
from surgeon.backends._aot_joined import joined_linears
from surgeon.backends._aot_lowering import Decomposed, low_bit_kernels, placed
from surgeon.backends._aot_rotary import turned_where_written
from surgeon.backends._aot_routing import routed
from surgeon.backends._aot_shared import grown, refusals, write_in_place
from surgeon.backends._aot_tiles import TiledTensor, tile_codes
from surgeon.data import load_data
from surgeon.discovery import discover
from surgeon.graph import Graph
from surgeon.numerics.quantization import QuantizedTensor, quantize_groupwise
from surgeon.ops.attention import attend
from surgeon.pipeline import operate
from surgeon.progress import Progress
from surgeon.registry import make_pass
from tests.causal import causal

rows_of = pytest.importorskip("surgeon.backends._cuda_rows", reason="Triton is for Linux")
routing_of = pytest.importorskip("surgeon.backends._cuda_routing", reason="Triton is for Linux")
rotary_of = pytest.importorskip("surgeon.backends._cuda_rotary", reason="Triton is for Linux")
attention_of = pytest.importorskip("surgeon.backends._cuda_attention", reason="Triton is for Linux")

aten = torch.ops.aten
BOUND = {torch.float16: 2e-3, torch.float32: 1e-5}


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-30))


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("rows", [1, 7, 40])
def test_few_rows_are_products_with_the_matrices_of_their_experts(dtype: torch.dtype, rows: int) -> None:
    experts, width, k = 5, 192, 3
    x, w = randn(rows, width, dtype=dtype), randn(experts, 72, width, dtype=dtype, seed=1)
    index = torch.randint(0, experts, (rows * k,), generator=torch.Generator().manual_seed(2))
    wanted = torch.einsum("sk,snk->sn", x.double().repeat_interleave(k, 0), w.double()[index])
    found = rows_of.few_rows(x, index, w, None, None, 0, 1, k, 2).sum(0)
    assert relative(found, wanted) < BOUND[dtype]
    alone = rows_of.few_rows(x, None, w[:1], None, None, 0, 1, 1, 1).sum(0)
    assert relative(alone, x.double() @ w[0].double().T) < BOUND[dtype]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group"), [(2, 64), (4, 32), (4, 128), (4, 256), (8, 32)])
def test_few_rows_read_codes(dtype: torch.dtype, symmetric: bool, bits: int, group: int) -> None:
    width = 512
    assert rows_of.takes_codes(bits, group, width)
    x, w = randn(3, width, dtype=dtype), randn(4, 40, width, dtype=dtype, seed=1)
    codes = quantize_groupwise(w, bits=bits, group=group, symmetric=symmetric)
    exact = QuantizedTensor(codes.packed, codes.scale.double(), codes.zero_point, bits, group, width).dequantize()
    index = torch.tensor([3, 0, 3, 1, 3, 3])
    wanted = torch.einsum("sk,snk->sn", x.double().repeat_interleave(2, 0), exact[index])
    found = rows_of.few_rows(x, index, codes.packed, codes.scale, codes.zero_point, bits, group, 2, 2).sum(0)
    assert relative(found, wanted) < BOUND[dtype]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group"), [(2, 64), (4, 32), (4, 64), (4, 256), (8, 32)])
def test_tiles_hold_the_same_codes(dtype: torch.dtype, symmetric: bool, bits: int, group: int) -> None:
    width = 512
    x, w = randn(3, width, dtype=dtype), randn(4, 128, width, dtype=dtype, seed=1)
    codes = quantize_groupwise(w, bits=bits, group=group, symmetric=symmetric)
    packed, scale, zero = codes.packed, codes.scale, codes.zero_point
    before = packed.clone()
    tiled = TiledTensor.of(codes)
    assert torch.equal(packed, before)
    assert tiled.packed.dtype == (torch.int16 if bits == 4 and group >= 64 else torch.uint8)
    laid = [tiled.packed, tiled.scale, tiled.zero_point]
    index = torch.tensor([3, 0, 3, 1, 3, 3])
    found = rows_of.few_rows(x, index, *laid, bits, group, 2, 2).sum(0)
    assert relative(found, rows_of.few_rows(x, index, packed, scale, zero, bits, group, 2, 2).sum(0)) < 1e-6
    wanted = codes.dequantize()
    assert torch.equal(tiled.dequantize(), wanted)
    assert relative(rows_of.unpack_tiles(*laid, bits, group), wanted) < 1e-6


def test_codes_that_the_kernel_does_not_take() -> None:
    assert not rows_of.takes_codes(4, 16, 512)  # too few of each position in a byte
    assert not rows_of.takes_codes(4, 96, 480)  # not a power of two
    assert not rows_of.takes_codes(4, 128, 200)  # a group that is not whole


def masks(kind: str, queries: int, keys: int) -> Tensor | None:
    """[2, 1, Q, T]: none, causal with padding, windows, at random, or added to the scores."""
    place, own = torch.arange(keys), torch.arange(queries)[:, None] + keys - queries
    causal = (place <= own).expand(2, 1, queries, keys).clone()
    if kind == "causal":
        causal[0, :, :, :3] = keys <= 3
        return causal
    if kind == "window":
        return causal & (place > own - 9)
    if kind == "random":
        return torch.rand(2, 1, queries, keys, generator=torch.Generator().manual_seed(3)) > 0.4
    if kind == "added":
        return torch.where(causal, randn(2, 1, queries, keys), -torch.inf).half()
    return None


@pytest.mark.parametrize("kind", ["none", "causal", "window", "random", "added"])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 150), (5, 70), (90, 90), (40, 200)])
def test_attention_equals_its_reference(kind: str, queries: int, keys: int) -> None:
    heads, members, size = 2, 3, 40
    q = randn(2, queries, heads * members, size, dtype=torch.float16).transpose(1, 2)
    k, v = (randn(2, heads, keys, width, dtype=torch.float16, seed=width) for width in (size, 48))
    mask = masks(kind, queries, keys)
    wide = mask if mask is None or mask.dtype == torch.bool else mask.double()
    wanted = attend(q.double(), k.double(), v.double(), wide, False, 0.2).nan_to_num(0.0)
    found = on_cuda.attention(q, k, v, mask, False, 0.2)  # in parts for few queries, with bounds for many
    assert relative(found, wanted) < BOUND[torch.float16]
    unbounded = attention_of.attend_whole(q, k, v, mask, None, None, None, 0.2).transpose(1, 2)
    assert relative(unbounded, wanted) < BOUND[torch.float16]


@pytest.mark.parametrize("kind", ["none", "causal", "window", "random", "added"])
@pytest.mark.parametrize(("queries", "past"), [(1, 0), (1, 149), (5, 64), (5, 2100), (40, 30)])
def test_attention_that_appends_equals_the_reference_over_all_keys(kind: str, queries: int, past: int) -> None:
    heads, members, size = 2, 3, 40
    q = randn(2, queries, heads * members, size, dtype=torch.float16).transpose(1, 2)
    k, v = (randn(2, heads, past + queries, width, dtype=torch.float16, seed=width) for width in (size, 48))
    grown = [on_cuda.Appended(whole[:, :, :past].contiguous(), whole[:, :, past:]) for whole in (k, v)]
    mask = masks(kind, queries, past + queries)
    wide = mask if mask is None or mask.dtype == torch.bool else mask.double()
    wanted = attend(q.double(), k.double(), v.double(), wide, False, 0.2).nan_to_num(0.0)
    found, keys, values = on_cuda.attention_appending(q, *grown, mask, False, 0.2)
    assert relative(found, wanted) < BOUND[torch.float16]
    assert torch.equal(keys, k)
    assert torch.equal(values, v)
    causal = on_cuda.attention_appending(q, *grown, mask, True, 0.2)[0]
    assert relative(causal, attend(q.double(), k.double(), v.double(), wide, True, 0.2).nan_to_num(0.0)) < BOUND[torch.float16]


@pytest.mark.parametrize(("new", "past"), [(1, 0), (1, 37), (40, 5)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_new_rows_are_written_into_buffers_and_nothing_else(dtype: torch.dtype, new: int, past: int) -> None:
    total, room = past + new, past + new + 3
    k, v = (torch.full((2, 3, room, width), 7.0, dtype=dtype) for width in (40, 48))
    rows = [randn(2, new, 3, width, dtype=dtype, seed=width).transpose(1, 2) for width in (40, 48)]
    parts = [on_cuda.Buffered(buffer, each, torch.tensor([past]), total) for buffer, each in zip((k, v), rows, strict=True)]
    for used, buffer, each in zip(on_cuda.append_in_place(*parts), (k, v), rows, strict=True):
        assert used.data_ptr() == buffer.data_ptr()
        assert used.shape[2] == total
        assert torch.equal(buffer[:, :, past:total], each)
        assert bool((buffer[:, :, :past] == 7).all())
        assert bool((buffer[:, :, total:] == 7).all())
    on_cuda.append_in_place(*(part._replace(past=torch.tensor([total]), total=total) for part in parts))
    assert all(bool((part.buffer[:, :, total:] == 7).all()) for part in parts)  # behind what the mask covers


@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("kind", ["none", "causal", "added"])
def test_attention_over_a_buffer_stops_behind_the_new_positions(kind: str, queries: int) -> None:
    """What is captured for a whole buffer reads so much of it as a number on the device says."""
    used, room, heads = 70, 300, 2
    q = randn(2, heads * 2, queries, 40, dtype=torch.float16)
    k, v = (randn(2, heads, room, width, dtype=torch.float16, seed=width) for width in (40, 48))
    mask = masks(kind, queries, used)
    wide = mask if mask is None or mask.dtype == torch.bool else mask.double()
    wanted = attend(q.double(), k[:, :, :used].double(), v[:, :, :used].double(), wide, False, 0.2)
    for buffer in (k, v):
        buffer[:, :, used:] = torch.nan
    longer = None if mask is None else torch.nn.functional.pad(mask, (0, room - used), value=float(mask.dtype == torch.bool))
    found = on_cuda.attention(q, k, v, longer, False, 0.2, torch.tensor([used - queries]))
    assert relative(found, wanted) < BOUND[torch.float16]


def test_cosines_and_sines_of_all_sizes() -> None:
    for shape in ((1,), (3, 5, 64), (2, 300, 2)):
        x = 100 * randn(*shape)
        for found, wanted in zip(on_cuda.cos_sin(x.transpose(0, -1)), (x.cos(), x.sin()), strict=True):
            torch.testing.assert_close(found, wanted.transpose(0, -1))
    assert on_cuda.cos_sin(randn(3, dtype=torch.float16))[1].dtype == torch.float16


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 150), (40, 90)])
def test_attention_reads_the_used_part_of_buffers_where_it_lies(queries: int, keys: int) -> None:
    q = randn(2, 6, queries, 32, dtype=torch.float16)
    k, v = (randn(2, 3, keys + 37, 32, dtype=torch.float16, seed=seed)[:, :, :keys] for seed in (1, 2))
    mask = masks("causal", queries, keys)
    wanted = attend(q.double(), k.double(), v.double(), mask, False, 0.2).nan_to_num(0.0)
    assert relative(on_cuda.attention(q, k, v, mask, False, 0.2), wanted) < BOUND[torch.float16]


def test_attention_without_a_mask_can_be_causal() -> None:
    q, k, v = (randn(1, heads, 50, 32, dtype=torch.float16, seed=heads) for heads in (4, 2, 2))
    assert relative(on_cuda.attention(q, k, v, None, True, 0.3), attend(q, k, v, None, True, 0.3)) < BOUND[torch.float16]


@pytest.mark.parametrize("k", [1, 2, 8])
def test_the_largest_of_a_row_are_those_of_topk(k: int) -> None:
    values = randn(5, 64)
    assert on_cuda.few_of_row(values, k)
    found, wanted = on_cuda.top_k(values, k), torch.topk(values, k)
    assert torch.equal(found[0], wanted.values)
    assert torch.equal(found[1], wanted.indices)
    assert not on_cuda.few_of_row(values, 9)
    assert not on_cuda.few_of_row(values, 2, 0)
    assert not on_cuda.few_of_row(values, 2, -1, False)


@pytest.fixture(scope="module")
def mixture() -> Graph:
    return traced(torch.float16)


def traced(dtype: torch.dtype) -> Graph:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, vocab_size=160, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2, max_position_embeddings=256,
    )  # fmt: skip
    from surgeon.tracing import trace

    return trace(transformers.MixtralForCausalLM(config).to(dtype).eval(), task="text-generation")


def quantized(graph: Graph) -> Graph:
    step = make_pass({"quantize": {"scheme": "int4", "group": 32}})
    return operate(step, graph, discover(graph), load_data(None, graph), None, Progress(False))[0]


def inputs_of(graph: Graph, rows: int, new: int, past: int) -> list[Tensor]:
    sizes = {"batch": rows, "sequence": new, "past": past}
    made: dict[str, Any] = {}
    for port in graph.inputs:
        shape = [sizes.get(s, past + new) if isinstance(s, str) else s for s in port.shape]
        if port.dtype.is_floating_point:
            made[port.name] = randn(*shape, dtype=port.dtype)
        elif "mask" in port.name:
            made[port.name] = torch.ones(shape, dtype=port.dtype)
            made[port.name][0, : past // 2] = 0
        elif "position" in port.name:
            made[port.name] = torch.arange(past, past + new).expand(rows, -1).contiguous()
        else:
            made[port.name] = torch.randint(0, 160, shape, generator=torch.Generator().manual_seed(4))
    return graph.bind(made)


@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("sizes", [(2, 1, 9), (1, 3, 0), (1, 70, 5)])
def test_the_spelling_for_cuda_equals_the_graph(mixture: Graph, bits: int, sizes: tuple[int, int, int]) -> None:
    graph = mixture if bits == 16 else quantized(traced(torch.float32))  # exact: no token changes its expert for rounding
    lowered = low_bit_kernels(graph, "cuda", convert=True)
    assert lowered.left == {}
    assert lowered.kernels["few_rows"] == (0 if bits == 16 else 13)  # four of attention and two of experts a layer, the head
    joined = joined_linears(lowered.graph)
    assert sum(on_cuda.Appended.of(node) is not None for node in joined.module.graph.nodes) == 4  # keys, values of two layers
    laid = placed(joined, "cpu")
    assert routed(laid) == 2
    tile_codes(laid)
    spelt = Decomposed(laid, "auto", device="cuda").eval()
    tiles = [tensor for tensor in laid.module.state_dict().values() if tensor.dim() >= 4 and tensor.shape[-2] == 64]
    assert len(tiles) == (0 if bits == 16 else 8)  # two linears and two stacks of experts a layer; the head has 160 rows
    inputs = inputs_of(graph, *sizes)
    with torch.no_grad():
        pairs = list(zip(spelt(*inputs), graph.module(*inputs), strict=True))
    assert max(relative(found, wanted) for found, wanted in pairs) < (4e-3 if bits == 16 else 1e-5)
    assert dict(spelt.used) == {"experts few rows": 2, "experts dense": 2}  # no grouped product of halves


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("sizes", "further"), [((2, 1, 9), 0), ((2, 1, 9), 4), ((1, 3, 0), 6), ((1, 70, 5), 0)])
def test_the_spelling_for_cuda_writes_in_place(
    mixture: Graph, dtype: torch.dtype, sizes: tuple[int, int, int], further: int
) -> None:
    graph = mixture if dtype == torch.float16 else traced(dtype)
    joined = joined_linears(graph)
    write_in_place(joined, started=True)
    assert routed(joined) == 2
    assert turned_where_written(joined.clone()) == (2 if dtype == torch.float16 else 0)
    assert sum(on_cuda.Buffered.of(node) is not None for node in joined.module.graph.nodes) == 4
    inputs, total = inputs_of(graph, *sizes), sizes[1] + sizes[2]
    given = [
        grown(value, 2, total + 6, value.device) if port.role == "past"
        else torch.nn.functional.pad(value, (0, further)) if port.name == "attention_mask" else value
        for port, value in zip(graph.inputs, inputs, strict=True)
    ]  # fmt: skip
    given.append(torch.tensor([sizes[2]]))
    with torch.no_grad():
        (logits,), (wanted, *presents) = Decomposed(joined, "auto", device="cuda").eval()(*given), graph.module(*inputs)
    assert relative(logits, wanted) < (4e-3 if dtype == torch.float16 else 1e-5)
    held = [value for port, value in zip(joined.inputs, given, strict=True) if port.role == "past"]
    assert max(relative(one[:, :, :total], other) for one, other in zip(held, presents, strict=True)) < 4e-3


def test_linears_of_one_input_are_joined(mixture: Graph) -> None:
    joined = joined_linears(mixture)
    before, after = (sum(n.target is aten.linear.default for n in g.module.graph.nodes) for g in (mixture, joined))
    assert (before, after) == (11, 7)  # queries, keys and values become one in each layer
    inputs = inputs_of(mixture, 2, 3, 4)
    for found, wanted in zip(joined.module(*inputs), mixture.module(*inputs), strict=True):
        torch.testing.assert_close(found, wanted, atol=2e-3, rtol=2e-3)


@pytest.mark.filterwarnings("ignore")  # torch warns of its own parts
@pytest.mark.parametrize("caches", ["appended", "shared"])
def test_a_package_holds_both_forms_and_nothing_of_ours(
    mixture: Graph, caches: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What torch exports: branches that sizes decide, with the kernels' operators in one and torch's in the other."""
    joined = joined_linears(mixture)
    if caches == "shared":
        write_in_place(joined, started=True)
        assert turned_where_written(joined) == 2
    assert routed(joined) == 2
    spelt = Decomposed(joined, "auto", device="cuda").eval()
    shapes = tuple(
        {axis: torch.export.Dim.DYNAMIC for axis, size in enumerate(port.shape) if isinstance(size, str)}
        for port in joined.inputs
    )
    example = tuple(joined.example[port.name] for port in joined.inputs)

    def rows(x: Tensor, index: Tensor | None, weight: Tensor, *rest: Any) -> Tensor:
        return x.new_empty((1, x.shape[0] * rest[4], weight.shape[1]), dtype=torch.float32)

    def gated(x: Tensor, index: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        return x.new_empty((x.shape[0] * rest[5], weight.shape[1] // 2))

    def appending(q: Tensor, k: Tensor, v: Tensor, k_new: Tensor, v_new: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        grown = (torch.cat([old, new], 2) for old, new in ((k, k_new), (v, v_new)))
        return whole(q, k, v), *grown

    def append(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, *rest: Any) -> Tensor:
        for buffer, new in ((keys, k), (values, v)):
            buffer.index_copy_(2, rest[0] + torch.arange(new.shape[2]), new)
        return torch.empty_like(q)

    def turned(x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.empty_like(x), torch.empty_like(x)

    def whole(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
        return q.new_empty((q.shape[0], q.shape[2], q.shape[1], v.shape[3]))

    def routes(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        k, dtype = next(value for value in rest if isinstance(value, int)), rest[-1]
        return x.new_empty((x.shape[0], k), dtype=dtype), x.new_empty((x.shape[0], k), dtype=torch.int64)

    # interpreted kernels cannot be traced; compiled ones are traced by their shapes, like these
    monkeypatch.setattr(rows_of, "few_rows", rows)
    monkeypatch.setattr(rows_of, "few_rows_gated", gated)
    monkeypatch.setattr(routing_of, "route_rows", routes)
    monkeypatch.setattr(routing_of, "route_logits", routes)
    monkeypatch.setattr(attention_of, "attend_appending", appending)
    monkeypatch.setattr(attention_of, "attend_in_parts", whole)
    monkeypatch.setattr(rotary_of, "turn_and_append", append)
    monkeypatch.setattr(attention_of, "attend_whole", whole)
    monkeypatch.setattr(rotary_of, "cos_sin", turned)
    with torch.no_grad():
        program = torch.export.export(spelt, example, dynamic_shapes=(shapes,), strict=False)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets.count("cond") == 6  # attention, router and experts of two layers
    assert not any("surgeon" in target for target in targets)
    written = [spec for spec in program.run_decompositions({}).graph_signature.output_specs if "MUTATION" in str(spec.kind)]
    assert len(written) == (4 if caches == "shared" else 0)  # keys and values of two layers


def test_a_copy_for_a_device_leaves_the_graph_alone(mixture: Graph) -> None:
    copy = placed(mixture, "meta")
    assert {tensor.device.type for tensor in copy.module.state_dict().values()} == {"meta"}
    assert {tensor.device.type for tensor in mixture.module.state_dict().values()} == {"cpu"}
    made = [node for node in copy.module.graph.nodes if "device" in node.kwargs]
    assert made
    assert all(node.kwargs["device"] == torch.device("meta") for node in made)


@pytest.mark.parametrize(
    "name", ["gemma3", "gpt_neox", "phi3", "bloom", "falcon", "gemma3n", "gemma4", "llama4", "deepseek_v3", "bert", "mpt"]
)
def test_families_are_spelt_for_cuda(name: str) -> None:
    """Windows, ALiBi, joined projections, shared and latent caches, experts in transposed stacks."""
    from surgeon.tracing import trace

    graph = trace(causal(name), task="text-generation")
    lowered = placed(joined_linears(low_bit_kernels(graph, "cuda", convert=True).graph), "cpu")
    shared = not refusals(graph, started=True)
    assert shared == (name != "mpt")
    if shared:
        write_in_place(lowered, started=True)
    routed(lowered)
    spelt = Decomposed(lowered, "auto", device="cuda").eval()
    for rows, new, past in ((2, 1, 9), (1, 24, 5)):
        inputs = inputs_of(graph, rows, new, past)
        given = [
            grown(value, port.shape.index("past"), past + new + 3, value.device) if shared and port.role == "past" else value
            for port, value in zip(graph.inputs, inputs, strict=True)
        ]
        with torch.no_grad():
            found = spelt(*given, *([torch.tensor([past])] if shared else []))[0]
            assert relative(found, graph.module(*inputs)[0]) < 1e-5
