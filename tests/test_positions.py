"""Tables of positions of models that are called on whole texts, found by what reads them, and texts that they do not hold."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn

import surgeon
from surgeon.data import synthetic_batches
from surgeon.errors import LowerError, TraceError
from surgeon.ports import InputCheck
from tests.conditional import conditional, encoder_inputs
from tests.models import inputs_for, tiny


class Positions(nn.Module):
    """One residual sublayer behind tokens with positions, in a spelling."""

    def __init__(self, spelled: Callable[[nn.Embedding, int], Tensor]) -> None:
        super().__init__()
        self.tokens, self.positions, self.up, self.spelled = nn.Embedding(20, 8), nn.Embedding(12, 8), nn.Linear(8, 8), spelled

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.tokens(input_ids) + self.spelled(self.positions, input_ids.shape[1])
        y: Tensor = x + self.up(x).tanh()
        return y


@pytest.mark.parametrize(
    ("spelled", "most"),
    [
        (lambda table, length: table(torch.arange(length)), 12),
        (lambda table, length: table(torch.arange(length) + 3), 9),
        (lambda table, length: table.weight[2 : length + 2], 10),
        (lambda table, length: table(torch.arange(length).clamp(max=5)), None),  # as many as there are
        (lambda table, length: table(torch.arange(length) % 4), None),
        (lambda table, length: table.weight[:1], None),
    ],
    ids=["looked up", "moved", "cut", "clamped", "repeated", "one for all"],
)
def test_tables_are_found_in_any_spelling(spelled: Callable[[nn.Embedding, int], Tensor], most: int | None) -> None:
    module = Positions(spelled).eval()
    graph = surgeon.trace(module, {"input_ids": torch.arange(8).reshape(2, 4)})
    (port,) = graph.inputs
    assert (port.most or (None, None))[1] == most
    if most is None:
        return
    ids = torch.ones((1, most + 1), dtype=torch.int64)
    assert torch.allclose(graph(input_ids=ids[:, 1:])[graph.outputs[0].name], module(ids[:, 1:]))
    with pytest.raises((IndexError, RuntimeError)):  # it is true
        module(ids)
    with pytest.raises(TraceError, match=rf"'input_ids' has {most + 1} positions, and .* holds {most}: give a shorter"):
        graph(input_ids=ids)


def test_an_artefact_of_an_encoder_refuses_a_longer_text_before_it_runs(tmp_path: Path) -> None:
    module, inputs = tiny("bert")
    compiled = surgeon.compile(module, [], inputs=inputs, output=tmp_path / "out", progress=False)
    for model in (compiled, surgeon.load(tmp_path / "out")):
        fits = inputs_for("bert", 1, 128)
        with torch.no_grad():
            assert torch.allclose(model(**fits)["last_hidden_state"], module(**fits)[0], atol=1e-4)
        with pytest.raises(LowerError, match=r"input 'input_ids' has 129 positions, and .* holds 128: give a shorter"):
            model(**inputs_for("bert", 1, 129))
        assert not InputCheck("here", model.ports).fit(inputs_for("bert", 1, 129))


def test_the_text_of_an_encoder_in_front_of_a_decoder(tmp_path: Path) -> None:
    module = conditional("bart")
    surgeon.compile(module, [], task="text-generation", output=tmp_path / "out", progress=False)
    model = surgeon.load(tmp_path / "out")
    text = encoder_inputs("bart", 1)
    fits = {name: value[:, :8].repeat(1, 16) for name, value in text.items()}
    assert model.generate(**fits, max_new_tokens=2).shape[1] == 3
    longer = {name: torch.cat([value, value[:, -1:]], 1) for name, value in fits.items()}
    with pytest.raises(LowerError, match=r"'input_ids' has 129 positions, and .* holds 128: give a shorter sequence"):
        model.generate(**longer, max_new_tokens=2)


def test_a_model_of_few_positions_is_built_with_data_that_fit_in_its_table(tmp_path: Path) -> None:
    """Random inputs of the checks, and the continuations of them, are no longer than the table."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_positions=16, n_embd=32, n_layer=2, n_head=4, vocab_size=100, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    built = surgeon.compile(
        model, [], task="text-generation", backend="onnxruntime", output=tmp_path / "out", progress=False
    )
    assert max(batch["input_ids"].shape[1] for batch in synthetic_batches(built.graph)) == 16
