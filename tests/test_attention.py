"""``surgeon::attention``: the operator, its gradient, and how attention over a cache becomes one."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import surgeon
from surgeon.errors import RewriteError
from surgeon.flops import flops_by_node
from surgeon.ops import attend, attention
from surgeon.raising import raise_attention
from surgeon.raising.attention import SDPA, _difference
from surgeon.rewrite import Editor
from tests.models import tiny

ATTENTION = torch.ops.surgeon.attention.default


def tensors(kv_heads: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, 4, 3, 5), (2, kv_heads, 7, 5), (2, kv_heads, 7, 6))
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)  # type: ignore[return-value]  # three


def masks() -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    seen = torch.rand(2, 1, 3, 7, generator=generator) > 0.4
    seen[..., 0] = True
    return {"none": None, "bool": seen, "float": torch.randn(1, 4, 3, 7, generator=generator, dtype=torch.float64)}


def by_hand(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float) -> Tensor:
    """Head by head, position by position."""
    result = torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype)
    group = q.shape[1] // k.shape[1]
    cover = None if mask is None else mask.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    for b, h, s in itertools.product(*(range(size) for size in q.shape[:3])):
        scores = torch.full((k.shape[2],), -torch.inf, dtype=q.dtype)
        for t in range(k.shape[2]):
            if is_causal and t > k.shape[2] - q.shape[2] + s:
                continue
            if cover is not None and cover.dtype == torch.bool and not cover[b, h, s, t]:
                continue
            bias = cover[b, h, s, t] if cover is not None and cover.dtype != torch.bool else 0.0
            scores[t] = scale * q[b, h, s] @ k[b, h // group, t] + bias
        result[b, h, s] = torch.softmax(scores, 0) @ v[b, h // group]
    return result


CASES = [(heads, name, causal) for heads in (1, 2, 4) for name in masks() for causal in (False, True)]


@pytest.mark.parametrize(("kv_heads", "name", "is_causal"), CASES)
def test_equals_the_definition_with_its_gradient(kv_heads: int, name: str, is_causal: bool) -> None:
    inputs = [t.requires_grad_() for t in tensors(kv_heads)]
    mask = masks()[name]
    if mask is not None and mask.is_floating_point():
        mask.requires_grad_()
    wanted = by_hand(*inputs, mask, is_causal, 0.3)
    found = attention(*inputs, mask, is_causal, 0.3)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    leaves = [*inputs, *([mask] if mask is not None and mask.requires_grad else [])]
    for mine, theirs in zip(
        torch.autograd.grad((found * weights).sum(), leaves), torch.autograd.grad((wanted * weights).sum(), leaves), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10)


def test_registration_and_refusals() -> None:
    q, k, v = tensors(2)
    torch.library.opcheck(attention, (q, k, v, masks()["bool"], False, 0.3))
    torch.library.opcheck(attention, (*(t.detach().requires_grad_() for t in (q, k, v)), None, True, 0.3))
    torch.testing.assert_close(attend(q, k, v, None, False, 0.3), attention(q, k, v, None, False, 0.3))
    for wrong in ((q, k[:, :, :, :4], v), (q, k[0], v), (q[:, :3], k, v), (q, k, v[:, :1])):
        with pytest.raises(RewriteError, match="surgeon::attention needs"):
            attention(*wrong, None, False, 0.3)


def test_attention_over_a_cache_is_one_node() -> None:
    module, inputs = tiny("llama", layers=2)
    graph = surgeon.trace(module, task="text-generation")
    nodes = graph.module.graph
    raised = nodes.find_nodes(op="call_function", target=ATTENTION)
    assert len(raised) == 2
    assert not nodes.find_nodes(op="call_function", target=SDPA)
    for node in raised:
        query, key, value = (tuple(map(str, node.args[i].meta["val"].shape)) for i in range(3))  # type: ignore[union-attr]  # nodes
        assert (query[1], key[1], value[1]) == ("4", "2", "2")  # nothing is repeated
    attentions = [a for block in surgeon.discover(graph).blocks for region in block.regions for a in region.attention]
    assert [(a.heads, a.kv_heads, a.head_dim) for a in attentions] == [(4, 2, 16)] * 2
    assert flops_by_node(graph, [raised[0]])[raised[0]] == 2 * (2 * 4 * 7) * 12 * (16 + 16)  # batch 2, 7 new, 12 in all
    plain = surgeon.trace(module, inputs)
    assert not plain.module.graph.find_nodes(op="call_function", target=ATTENTION)  # no cache
    assert len(plain.module.graph.find_nodes(op="call_function", target=SDPA)) == 2


def test_what_cannot_be_proven_stays() -> None:
    module, _ = tiny("llama", layers=1)
    graph = surgeon.trace(module, task="text-generation")
    (raised,) = graph.module.graph.find_nodes(op="call_function", target=ATTENTION)
    q, k, v, mask, _, scale = raised.args
    for options, reason in (
        ((mask, 0.5), "drops 0.5"),
        ((None, 0.0, True), "causal from its first key"),
    ):
        clone = graph.clone()
        (node,) = clone.module.graph.find_nodes(op="call_function", target=ATTENTION)
        editor = Editor(clone)
        with editor.before(node):
            own = [*node.args[:3], *(node.args[3] if option is mask else option for option in options)]
            spelled = editor.call(SDPA, *own, scale=scale, enable_gqa=True)
        editor.replace(node, spelled)
        editor.finish()
        assert reason in raise_attention(clone)[spelled.name]
        assert clone.module.graph.find_nodes(op="call_function", target=SDPA)
    assert _difference(raised, (q, k, v, mask, False, scale)) == 0.0
    assert _difference(raised, (q, k, v, mask, False, 1.5 * scale)) > 1e-3  # type: ignore[operator]  # a number
    assert _difference(raised, (q, v, k, mask, False, scale)) > 1e-3
