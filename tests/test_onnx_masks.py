"""Masks of attention with one row for all queries, as those of padding are, on ONNX Runtime."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import surgeon

pytest.importorskip("onnxruntime")


class Masked(nn.Module):
    """Attention whose mask has one row for all queries, as one of padding has."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.table, self.qkv, self.out = nn.Embedding(20, 16), nn.Linear(16, 48), nn.Linear(16, 16)
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x, seen = self.table(input_ids), attention_mask == 1
        if self.form == "encoder":
            return self.encoder(x, src_key_padding_mask=~seen)
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
        mask = seen[:, None, None]
        if self.form == "float":
            mask = torch.where(mask, 0.0, -1e4)
        if self.form == "shared":
            mask = seen.any(0, keepdim=True)  # [1, sequence]
        if self.form == "headless":
            q, k, v, mask = (tensor.flatten(0, 1) for tensor in (q, k, v, mask.expand(-1, 4, -1, -1)))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return x + self.out(mixed.reshape(*x.shape[:1], 4, -1, 4).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("form", ["encoder", "bool", "float", "shared", "headless"])
def test_a_mask_with_one_row_for_all_queries(form: str) -> None:
    torch.manual_seed(0)
    module = Masked(form).eval()
    mask = torch.ones(3, 8, dtype=torch.int64)
    mask[0, 5:] = mask[2, 2:] = 0
    inputs = {"input_ids": torch.randint(0, 20, (3, 8)), "attention_mask": mask}
    built = surgeon.compile(module, [], inputs=inputs, backend="onnxruntime", progress=False)
    torch.testing.assert_close(built(**inputs)["output"], module(**inputs), rtol=1e-4, atol=1e-5)
