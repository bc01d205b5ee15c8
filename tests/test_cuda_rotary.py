"""Turning queries and keys where the keys are written, under Triton's interpreter, and where graphs are spelt so."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from surgeon.backends._aot_joined import joined_linears
from surgeon.backends._aot_lowering import Decomposed, placed
from surgeon.backends._aot_rotary import turned_attention, turned_where_written
from surgeon.backends._aot_shared import grown, write_in_place
from surgeon.ops.attention import attend
from surgeon.tracing import trace
from tests.causal import causal
from tests.test_cuda_kernels import inputs_of, randn, relative

kernels = pytest.importorskip("surgeon.backends._cuda_rotary", reason="Triton is for Linux")

BOUND = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # the interpreter cuts bfloat16 off


def angles(rows: int, new: int, numbers: int) -> Tensor:
    """[rows, 1, new, numbers], other angles in each half."""
    return 3 * randn(rows, 1, new, numbers, seed=9)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The formula, in float64, in the first numbers of a head."""
    x, numbers = x.double(), cos.shape[3]
    first, rest = x[..., :numbers], x[..., numbers:]
    low, high = first.chunk(2, -1)
    return torch.cat([first * cos.double() + torch.cat([-high, low], -1) * sin.double(), rest], -1)


@pytest.mark.parametrize("dtype", list(BOUND), ids=str)
@pytest.mark.parametrize(("rows", "new", "past"), [(1, 1, 37), (16, 1, 0), (2, 13, 5)])
@pytest.mark.parametrize(("heads", "members", "size", "numbers"), [(8, 4, 128, 128), (2, 3, 40, 40), (1, 4, 64, 16)])
def test_queries_are_turned_and_keys_written_turned(
    dtype: torch.dtype, rows: int, new: int, past: int, heads: int, members: int, size: int, numbers: int
) -> None:
    q = randn(rows, new, heads * members, size, dtype=dtype).transpose(1, 2)
    k = randn(rows, new, heads, size, dtype=dtype, seed=1).transpose(1, 2)
    v = randn(rows, new, heads, 48, dtype=dtype, seed=2).transpose(1, 2)
    one = angles(1, new, numbers)  # the angles of one row are those of all, stride 0
    cos, sin = (table.to(dtype).expand(rows, 1, new, numbers) for table in (one.cos(), one.sin()))
    total, room = past + new, past + new + 3
    keys, values = (torch.full((rows, heads, room, width), 7.0, dtype=dtype) for width in (size, 48))
    found = kernels.turn_and_append(q, k, v, cos, sin, keys, values, torch.tensor([past]), total)
    assert found.dtype == dtype
    assert relative(found, turned(q, cos, sin)) < BOUND[dtype]
    assert relative(keys[:, :, past:total], turned(k, cos, sin)) < BOUND[dtype]
    assert torch.equal(values[:, :, past:total], v)
    for buffer in (keys, values):
        assert bool((buffer[:, :, :past] == 7).all())
        assert bool((buffer[:, :, total:] == 7).all())
    kernels.turn_and_append(q, k, v, cos, sin, keys, values, torch.tensor([total]), total)
    assert all(bool((buffer[:, :, total:] == 7).all()) for buffer in (keys, values))  # behind what the mask covers


@pytest.mark.parametrize(("rows", "new", "past"), [(1, 1, 70), (16, 1, 9), (2, 24, 5)])
def test_attention_of_turned_queries_over_what_is_written(rows: int, new: int, past: int) -> None:
    q, k, v = (randn(rows, heads, new, 64, dtype=torch.float16, seed=heads + seed) for heads, seed in ((8, 0), (2, 1), (2, 2)))
    own = angles(rows, new, 64)  # float32 tables beside halves
    keys, values = (randn(rows, 2, past + new + 5, 64, dtype=torch.float16, seed=seed) for seed in (3, 4))
    total = past + new + 2  # the mask may cover more than there is
    place = torch.arange(total)
    mask = (place <= torch.arange(past, past + new)[:, None]).expand(rows, 1, new, total).clone()
    mask[0, :, :, : past // 2] = False
    pasts = [buffer[:, :, :past].clone() for buffer in (keys, values)]
    found = turned_attention(q, k, v, own.cos(), own.sin(), keys, values, torch.tensor([past]), total, mask, 0.125)
    whole = torch.cat([pasts[0].double(), turned(k, own.cos(), own.sin())], 2), torch.cat([pasts[1], v], 2).double()
    wanted = attend(turned(q, own.cos(), own.sin()), *whole, mask[..., : past + new], False, 0.125)
    assert relative(found, wanted) < 2e-3


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("mistral", 2),
        ("qwen3", 2),  # norms in front of the turning
        ("gpt_neox", 2),  # a quarter of each head
        ("phi3", 2),  # an empty rest of each head
        ("olmo2", 2),  # turned in float32
        ("gemma3", 2),  # two tables, windows
        ("llama4", 0),  # pairs of neighbours, norms behind the turning
    ],
)
def test_spellings_of_families(name: str, count: int) -> None:
    graph = trace(causal(name, layers=2).half(), task="text-generation")
    lowered = placed(joined_linears(graph), "cpu")
    write_in_place(lowered, started=True)
    assert turned_where_written(lowered) == count
    left = [node.target for node in lowered.module.graph.nodes]
    assert left.count(turned_attention) == count
    assert left.count(torch.ops.surgeon.attention.default) == 2 - count
    if count:
        assert not {torch.ops.aten.neg.default, torch.ops.aten.cat.default} & set(left[left.index(turned_attention) :])
    for rows, new, past in ((2, 1, 9), (1, 24, 5)):
        inputs = inputs_of(graph, rows, new, past)
        given = [
            grown(value, port.shape.index("past"), past + new + 3, value.device) if port.role == "past" else value
            for port, value in zip(graph.inputs, inputs, strict=True)
        ]
        with torch.no_grad():
            (logits,), (wanted, *presents) = (
                Decomposed(lowered, "auto", device="cuda").eval()(*given, torch.tensor([past])), graph.module(*inputs)
            )  # fmt: skip
        assert relative(logits, wanted) < 6e-3
        held = [value for port, value in zip(graph.inputs, given, strict=True) if port.role == "past"]
        pairs = zip(held, presents, strict=True)
        assert max(relative(one[:, :, : past + new], other) for one, other in pairs) < 6e-3


def test_in_float32_nothing_is_replaced() -> None:
    """The kernels of attention are for halves."""
    lowered = placed(joined_linears(trace(causal("mistral", layers=2), task="text-generation")), "cpu")
    write_in_place(lowered, started=True)
    assert turned_where_written(lowered) == 0
