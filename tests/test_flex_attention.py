"""Models with ``flex_attention``: traced flat, recognised, and equal to torch's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import flex_attention as flex

import surgeon

DOCUMENTS = torch.tensor([0, 0, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3])


class Flexible(nn.Module):
    """Two layers of attention with fewer key/value heads, and an FFN."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.q, self.kv, self.o = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.up, self.down, self.norm = nn.Linear(16, 40), nn.Linear(40, 16), nn.LayerNorm(16)
        self.slopes = nn.Parameter(torch.rand(4))
        self.register_buffer("documents", DOCUMENTS)
        self.attend = torch.compile(flex.flex_attention) if form == "compiled" else flex.flex_attention

    def mask(self, length: int) -> Any:
        documents: Any = self.documents
        if self.form == "documents":
            return lambda b, h, q, k: (documents[q] == documents[k]) & (q >= k)
        if self.form == "blind":  # the first query sees nothing
            return lambda b, h, q, k: q > k
        return None

    def score(self, score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        score = 5 * torch.tanh(score / 5) + self.slopes[h] * (k - q)
        return torch.where(q >= k, score, -torch.inf)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        for _ in range(2):
            y = self.norm(x)
            q = self.q(y).view(batch, length, 4, 4).transpose(1, 2)
            k, v = self.kv(y).view(batch, length, 2, 2, 4).permute(2, 0, 3, 1, 4)
            mask = self.mask(length)
            block = None if mask is None else flex.create_block_mask(mask, None, None, length, length, device="cpu")
            score = None if block is not None else self.score
            mixed = self.attend(q, k, v, score_mod=score, block_mask=block, enable_gqa=True)
            x = x + self.o(mixed.transpose(1, 2).reshape(batch, length, 16))
            x = x + self.down(torch.relu(self.up(self.norm(x))))
        return x


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("form", ["scores", "documents", "blind", "compiled"])
def test_flex_attention_is_attention(form: str) -> None:
    torch.manual_seed(0)
    module = Flexible(form).eval()
    x = torch.randn(2, 12, 16)
    graph = surgeon.trace(module, {"x": x}, dynamic={"x": {0: "batch", 1: "sequence"}})
    structure = surgeon.discover(graph)
    assert [[region.kind for region in block.regions] for block in structure.blocks] == [["attention", "ffn"]] * 2
    assert [(site.part.heads, site.part.kv_heads) for site in structure.attentions()] == [(4, 2)] * 2
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        for other in (x, torch.randn(3, 7, 16)):
            torch.testing.assert_close(graph(x=other)["output"], module(other), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("form", ["scores", "blind"])
def test_it_is_lowered(form: str) -> None:
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    module, x = Flexible(form).eval(), torch.randn(2, 12, 16)
    built = surgeon.compile(
        module, [], inputs={"x": x},
        dynamic={"x": {0: "batch", 1: "sequence"}}, progress=False,
    )  # fmt: skip
    assert built.graph is not None
    torch.testing.assert_close(built(x=x)["output"], built.graph(x=x)["output"], rtol=1e-4, atol=1e-5)
