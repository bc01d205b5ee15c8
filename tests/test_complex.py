"""Complex arithmetic as arithmetic of pairs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import surgeon
from surgeon.registry import make_backend
from tests.causal import causal


class Rotary(nn.Module):
    """Turns pairs of columns by an angle that grows with the position."""

    def __init__(self, last: str) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.last = last
        self.register_buffer("rates", torch.tensor([1.0, 0.5, 0.25, 0.125]))

    def forward(self, x: Tensor) -> Tensor:
        steps = torch.arange(x.shape[1] + 1, dtype=torch.float32)
        angles = torch.outer(steps, self.rates)  # type: ignore[arg-type]  # a buffer
        turns = torch.polar(torch.ones_like(angles), angles)[1:, None, :] * 0.5
        z = torch.view_as_complex(self.linear(x).reshape(*x.shape[:-1], 2, 2, 2)).reshape(*x.shape[:-1], 1, 4)
        z = z * turns * (1 + x[..., :1, None].abs())
        if self.last == "exp":
            z = z.exp()
        return torch.view_as_real(z).flatten(2)


def complex_nodes(graph: surgeon.Graph) -> list[Any]:
    values = [node.meta.get("val") for node in graph.module.graph.nodes]
    return [value for value in values if isinstance(value, Tensor) and value.is_complex()]


def test_no_complex_tensor_is_left_and_the_result_is_the_same() -> None:
    module = Rotary("").eval()
    inputs = {"x": torch.randn(2, 5, 8)}
    graph = surgeon.trace(module, inputs, dynamic={"x": {0: "batch", 1: "sequence"}})
    assert complex_nodes(graph) == []
    for x in (inputs["x"], torch.randn(3, 9, 8)):
        torch.testing.assert_close(graph(x=x)["output"], module(x), rtol=1e-5, atol=1e-6)


def test_an_operator_without_a_rule_leaves_the_graph_as_it_is() -> None:
    module = Rotary("exp").eval()
    x = torch.randn(2, 5, 8)
    graph = surgeon.trace(module, {"x": x})
    assert len(complex_nodes(graph)) > 5
    refusals = make_backend("onnxruntime").refuses(graph)
    assert any("write with pairs of real numbers what surgeon does not: aten.exp.default" in r.reason for r in refusals)
    torch.testing.assert_close(graph(x=x)["output"], module(x))


def test_attention_behind_such_rotary_positions_is_recognised() -> None:
    graph = surgeon.trace(causal("llama4", layers=2), task="text-generation")
    assert complex_nodes(graph) == []
    assert make_backend("onnxruntime").refuses(graph) == []
    attentions = [site.part for site in surgeon.discover(graph).attentions()]
    assert [(part.heads, part.kv_heads, part.head_dim) for part in attentions] == [(4, 2, 16)] * 2


class Tables(nn.Module):
    """Turns by a stored table of complex numbers, in many spellings."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("turns", torch.polar(torch.rand(32, 4), torch.rand(32, 4)))
        self.plain = torch.polar(torch.ones(32, 4), torch.rand(32, 4))  # not even a buffer

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        z = torch.view_as_complex(self.linear(x).reshape(*x.shape[:-1], 4, 2)) * self.turns[positions]
        plain = self.plain[: x.shape[1]].view(1, x.shape[1], 4)
        other = torch.complex(x[..., :1], x[..., 1:2]).permute(0, 2, 1)
        w = (z.transpose(1, -1) * other).transpose(-1, 1) * plain.conj()
        first = [w[..., 0:1].squeeze(-1).real, z.select(-1, -1).imag, self.turns.index_select(-1, positions[0, :1]).real[0]]
        return torch.cat([torch.view_as_real(w).flatten(2), torch.stack(torch.broadcast_tensors(*first), -1)], -1)


def test_a_stored_table_is_stored_in_pairs() -> None:
    torch.manual_seed(0)
    module = Tables().eval()
    inputs = {"x": torch.randn(2, 6, 8), "positions": torch.randint(0, 4, (2, 6))}
    graph = surgeon.trace(module, inputs, dynamic={"x": {0: "batch", 1: "sequence"}})
    assert complex_nodes(graph) == []
    assert make_backend("onnxruntime").refuses(graph) == []
    torch.testing.assert_close(graph.parameters()["turns_pairs"], torch.view_as_real(module.turns))
    other = {"x": torch.randn(3, 9, 8), "positions": torch.randint(0, 4, (3, 9))}
    for batch in (inputs, other):
        torch.testing.assert_close(graph(**batch)["output"], module(**batch), rtol=1e-5, atol=1e-6)
