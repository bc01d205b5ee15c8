"""Generating with encoder-decoders, against ``generate`` of the transformers library."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import surgeon
from surgeon.caches import CROSS, PAST, PRESENT
from surgeon.cli import app
from surgeon.errors import GenerateError, RewriteError, VerifyError
from surgeon.evaluate import Reading
from surgeon.generation import decoder_of, generate
from surgeon.gradients import observe_gradients
from surgeon.halves import halves
from surgeon.observe import observe
from surgeon.rewrite import Editor
from surgeon.samples import GradientSample, Sample
from surgeon.sampling import Sampling, Settings
from tests.conditional import conditional, encoder_inputs
from tests.conftest import MODELS

WORDS = 1024
"""Words of the tokenizer."""


def library(module: nn.Module, inputs: dict[str, torch.Tensor], new: int, **options: Any) -> torch.Tensor:
    """What the library generates greedily; Whisper's own ``generate`` cuts its prompt off, the general one does not."""
    from transformers import GenerationMixin

    rows = len(next(iter(inputs.values())))
    first = module.config.decoder_start_token_id  # type: ignore[union-attr]  # of the library's models
    start = torch.full((rows, 1), first)
    options = {"eos_token_id": None, "decoder_input_ids": start} | options
    greedily: Any = GenerationMixin.generate
    found: torch.Tensor = greedily(module, **inputs, max_new_tokens=new, do_sample=False, **options)
    return found


def assert_same(model: surgeon.Compiled, module: nn.Module, name: str, new: int = 20) -> None:
    for batch in (1, 3):
        inputs = encoder_inputs(name, batch)
        expected = library(module, inputs, new)
        assert torch.equal(model.generate(**inputs, max_new_tokens=new, eos_token_id=()), expected)
        assert len(set(expected[0, 1:].tolist())) > 1  # the model says something


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5 with a tokenizer that pads on the right, as those of encoder-decoders do."""
    folder = tmp_path_factory.mktemp("model") / "t5"
    module: Any = conditional("t5", vocabulary=WORDS)
    module.save_pretrained(folder)
    shutil.copyfile(MODELS / "tiny-llama" / "tokenizer.json", folder / "tokenizer.json")
    settings = json.loads((MODELS / "tiny-llama" / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"padding_side": "right"}))
    return folder


@pytest.fixture(scope="module")
def built(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("build") / "t5"
    surgeon.compile(checkpoint, [], output=folder, progress=False)
    return folder


def test_a_checkpoint_is_built_for_generation(checkpoint: Path, built: Path) -> None:
    model, module = surgeon.load(built), conditional("t5", vocabulary=WORDS)
    assert_same(model, module, "t5")
    inputs = encoder_inputs("t5", 3)
    unmasked = model.generate(inputs["input_ids"], max_new_tokens=8, eos_token_id=())
    assert torch.equal(unmasked, library(module, inputs, 8))  # the padding token says where the padding is
    begun = torch.tensor([[0, 50, 60]] * 3)
    found = model.generate(**inputs, decoder_input_ids=begun, max_new_tokens=8, eos_token_id=())
    assert torch.equal(found, library(module, inputs, 8, decoder_input_ids=begun))
    plain = model(**inputs, decoder_input_ids=begun)
    with torch.no_grad():
        expected = module(**inputs, decoder_input_ids=begun)
    assert sorted(plain) == ["encoder_last_hidden_state", "logits"]
    assert float((plain["logits"] - expected.logits).abs().max()) < 1e-4 * float(expected.logits.abs().max())


@pytest.mark.parametrize("name", ["t5", "bart", "whisper"])
def test_a_graph_generates_the_same_tokens(name: str) -> None:
    module = conditional(name)
    model = surgeon.compile(module, [], task="text-generation", backend=None, progress=False)
    assert_same(model, module, name)


@pytest.mark.parametrize(("name", "table"), [("bart", 128), ("whisper", 64), ("t5", None)])
def test_a_text_is_as_long_as_the_table_of_the_decoder(name: str, table: int | None) -> None:
    """The first has two rows more, in front, than positions; the encoder's tables are other ones, buckets of distances none."""
    module = conditional(name)
    model = surgeon.compile(module, [], task="text-generation", backend=None, progress=False)
    assert model.generation.get("table_length") == table
    if table is None:
        return
    inputs = encoder_inputs(name, 1)
    begun = torch.randint(3, 60, (1, table - 4), generator=torch.Generator().manual_seed(5))
    begun[:, 0] = module.config.decoder_start_token_id  # type: ignore[union-attr]  # the library would put it in front
    found = model.generate(**inputs, decoder_input_ids=begun, max_new_tokens=5, eos_token_id=())
    assert torch.equal(found, library(module, inputs, 5, decoder_input_ids=begun))  # the last token is not read any more
    needs = rf"needs {table + 1} positions, and .* holds {table}"
    with pytest.raises(GenerateError, match=rf"{needs}: add at most 5 \(max_new_tokens\), or shorten decoder_input_ids of"):
        model.generate(**inputs, decoder_input_ids=begun, max_new_tokens=6)
    with pytest.raises(GenerateError, match=rf"a text of 1 token and .* {needs}: add at most {table} \(max_new_tokens\)$"):
        model.generate(**inputs, max_new_tokens=table + 1)
    behind = torch.zeros((1, table + 1), dtype=torch.int64)
    with pytest.raises(GenerateError, match=rf"holds {table}: shorten decoder_input_ids of {table + 1} tokens$"):
        model.generate(**inputs, decoder_input_ids=behind, max_new_tokens=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bart", "whisper"])
def test_an_artefact_generates_the_same_tokens(name: str, tmp_path: Path) -> None:
    module = conditional(name)
    surgeon.compile(module, [], task="text-generation", output=tmp_path / "out", progress=False)
    assert_same(surgeon.load(tmp_path / "out"), module, name)


def test_the_encoder_runs_once(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = surgeon.load(built)
    artifact: Any = model.artifact
    runs = {"encoder": 0, "decoder": 0}
    for name in runs:
        session = artifact.half(name).session()
        for way in ("run", "run_with_iobinding"):
            whole = getattr(session, way)

            def counted(*given: Any, name: str = name, whole: Any = whole) -> Any:
                runs[name] += 1
                return whole(*given)

            monkeypatch.setattr(session, way, counted)
    model.generate(**encoder_inputs("t5", 2), max_new_tokens=7, eos_token_id=())
    assert runs == {"encoder": 1, "decoder": 7}
    assert {file.path for file in artifact.files} == {"encoder_model.onnx", "decoder_model.onnx"}


def test_the_mask_of_the_encoder_removes_rows_of_the_encoder_alone() -> None:
    """Where there are as many tokens of the decoder too; with caches and without."""
    module: Any = conditional("bart")
    inputs = encoder_inputs("bart", 2)
    batch = {**inputs, "decoder_input_ids": torch.arange(22).reshape(2, 11)}
    for graph in (surgeon.trace(module, batch), surgeon.trace(module, task="text-generation")):
        ffns = [site.part for site in surgeon.discover(graph).ffns()]
        samples = {str(i): Sample(ffn.input, limit=100) for i, ffn in enumerate(ffns)}
        observe(graph, [batch], samples)
        assert [sample.tokens for sample in samples.values()] == [19, 19, 22, 22]
        observe_gradients(graph, [batch], gradients := {"0": GradientSample(ffns[0].input, ffns[0].down.node, limit=100)})
        assert gradients["0"].tokens == 19


def divergence(source: Any, found: Any, rows: list[dict[str, torch.Tensor]]) -> tuple[float, float]:
    """KL in nats and share of equal choices per token, each row run by itself and without padding."""
    nats, equal, tokens = 0.0, 0, 0
    for row in rows:
        with torch.no_grad():
            p, q = (model(**row)["logits"][0].double().softmax(-1) for model in (source, found))
        nats += float((p * (p / q).log()).sum())
        equal += int((p.argmax(-1) == q.argmax(-1)).sum())
        tokens += len(p)
    return nats / tokens, equal / tokens


LOSE_RANK: list[Any] = [{"low_rank": {"ratio": 0.5, "method": "svd", "names": "*.ffn.*"}}]


@pytest.mark.parametrize("task", ["text-generation", "forward"])
def test_divergence_counts_the_tokens_of_the_decoder(task: str) -> None:
    """Of rows whose encoder and decoder have texts of other lengths, in batches of equal size."""
    module: Any = conditional("t5")
    texts = torch.randint(3, 60, (4, 3, 11), generator=torch.Generator().manual_seed(1))
    texts[..., 0] = 0  # what the decoder starts from, and its padding
    texts[:, 0, 4:] = 0
    texts[:, 1, 9:] = 0
    batches = [{**encoder_inputs("t5", 3, seed), "decoder_input_ids": texts[seed]} for seed in range(4)]
    given: Any = {"inputs": batches[0], "task": task, "calibration": batches, "backend": None, "progress": False}
    model = surgeon.compile(module, LOSE_RANK, verify={"max_kl": 10.0}, **given)
    assert model.graph is not None
    last, rows = batches[-1], []
    for row, length in enumerate((4, 9, 11)):
        kept = 11 - 3 * row
        rows.append({name: last[name][row : row + 1, :kept] for name in ("input_ids", "attention_mask")})
        rows[-1]["decoder_input_ids"] = last["decoder_input_ids"][row : row + 1, :length]
    kl, agreement = divergence(module, model.graph, rows)
    quality = model.report.quality
    assert kl > 1e-3
    assert quality["kl"] == pytest.approx(kl, rel=1e-3)
    assert quality["top1_agreement"] == pytest.approx(agreement)
    assert {"perplexity", "cosine_similarity"}.isdisjoint(quality)
    limits = {"max_kl": kl / 2, "max_perplexity_ratio": 2.0}
    with pytest.raises(VerifyError, match="max_kl: found .*; max_perplexity_ratio: this model has no such figure"):
        surgeon.compile(module, LOSE_RANK, verify=limits, **given)


def test_which_rows_of_a_decoder_are_padding() -> None:
    ids = torch.tensor([[0, 5, 0, 6, 0, 0], [0, 0, 0, 0, 0, 0]])
    mask = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]])
    reading = Reading("decoder_input_ids", frozenset({"logits"}), 0)
    batch = {"input_ids": ids + 1, "attention_mask": mask, "decoder_input_ids": ids}
    ends = [[True] * 4 + [False] * 2, [True] + [False] * 5]

    def rows(output: str, batch: dict[str, torch.Tensor], reading: Reading = reading) -> Any:
        found = reading.mask(output, batch)
        return None if found is None else found.tolist()

    assert rows("logits", batch) == ends
    assert rows("encoder_last_hidden_state", batch) == mask.bool().tolist()
    assert rows("logits", {**batch, "input_ids": ids}) == mask.bool().tolist()  # the same text
    assert rows("logits", {**batch, "decoder_attention_mask": 1 - mask}) == (1 - mask).bool().tolist()
    assert rows("logits", batch, Reading("decoder_input_ids", frozenset({"logits"}))) is None


@pytest.mark.slow
def test_an_artefact_is_compared_with_its_source_on_text(checkpoint: Path, tmp_path: Path) -> None:
    lines = ["def main(self):", "return x", "for name in names: print(name, file=stream)"]
    (tmp_path / "text.txt").write_text("\n".join(lines))
    model = surgeon.compile(
        checkpoint, LOSE_RANK, output=tmp_path / "out", evaluate={"text": tmp_path / "text.txt", "latency": []}, progress=False
    )
    rows = []
    for line in lines:
        encoded = model.tokenizer(line, return_tensors="pt")
        rows.append({name: encoded[name] for name in ("input_ids", "attention_mask")})
        rows[-1]["decoder_input_ids"] = encoded["input_ids"]
    kl, agreement = divergence(conditional("t5", vocabulary=WORDS), model, rows)
    assert kl > 1e-3
    assert model.report.quality["artifact_kl"] == pytest.approx(kl, rel=1e-2)
    assert model.report.quality["artifact_top1_agreement"] == pytest.approx(agreement)
    assert "artifact_perplexity" not in model.report.quality


def test_dropping_a_block_drops_its_caches() -> None:
    module: Any = conditional("bart", layers=3)
    graph = surgeon.trace(module, task="text-generation")
    clone = graph.clone()
    blocks = surgeon.discover(clone).blocks
    assert len(blocks) == 6
    editor = Editor(clone)
    for block in (blocks[1], blocks[4]):  # the second of the encoder and of the decoder
        editor.replace(block.exit, block.entry)
    editor.finish()
    names = [f"{number}.{half}" for number in (0, 1) for half in ("key", "value")]
    for ports, role, form in (
        (clone.inputs, PAST, "past_key_values"),
        (clone.outputs, PRESENT, "present"),
        (clone.outputs, CROSS, "cross_key_values"),
    ):
        assert [port.name for port in ports if port.role == role] == [f"{form}.{n}" for n in names]
    for stack in (module.model.encoder, module.model.decoder):
        del stack.layers[1]
    for index, layer in enumerate(module.model.decoder.layers):
        layer.self_attn.layer_idx = layer.encoder_attn.layer_idx = index
    module.config.encoder_layers = module.config.decoder_layers = module.config.num_hidden_layers = 2
    inputs = encoder_inputs("bart", 3)
    settings = Settings(decoder_start_token_id=2, rules={"forced_eos_token_id": 2})
    found = generate(
        decoder_of(clone), clone.inputs, inputs, max_new_tokens=20, sampling=Sampling(), settings=settings
    )
    assert torch.equal(found, library(module, inputs, 20))


@pytest.mark.slow
def test_passes_on_both_stacks_survive_lowering(tmp_path: Path) -> None:
    module = conditional("t5", layers=3)
    begun = torch.tensor([[0, 20, 30], [0, 90, 30]])
    batches = [{**encoder_inputs("t5", 2, seed), "decoder_input_ids": begun + seed} for seed in range(4)]
    steps = [
        {"drop_blocks": {"blocks": [1, 4], "count": 2}},
        {"moefy_ffn": {"experts": 4, "top_k": 2, "blocks": [0, 3]}},
        {"low_rank": {"ratio": 0.6, "blocks": [1, 2], "names": "*.ffn.*"}},
        {"quantize": {"scheme": "int8"}},
    ]
    model = surgeon.compile(
        module, steps, task="text-generation", calibration=batches, output=tmp_path / "out", progress=False,
        backend={"onnxruntime": {"accuracy_level": 0}},
    )  # fmt: skip
    assert model.graph is not None
    inputs = encoder_inputs("t5", 3)
    for given in (inputs, {name: value[:1] for name, value in inputs.items()}):
        expected = generate(
            decoder_of(model.graph), model.graph.inputs, given, max_new_tokens=12, sampling=Sampling(),
            settings=Settings(decoder_start_token_id=0),
        )  # fmt: skip
        assert torch.equal(surgeon.load(tmp_path / "out").generate(**given, max_new_tokens=12, eos_token_id=()), expected)


def test_a_decoder_that_reads_its_encoder_otherwise_is_refused() -> None:
    from dataclasses import replace

    graph = surgeon.trace(conditional("bart"), task="text-generation")
    encoder, decoder = halves(graph)
    assert {port.name for port in encoder.inputs} == {"input_ids", "attention_mask"}
    assert "input_ids" not in {port.name for port in decoder.inputs}
    assert set(encoder.parameters()) | set(decoder.parameters()) == set(graph.parameters())
    graph.outputs = tuple(replace(p, role="") if p.name == "cross_key_values.1.value" else p for p in graph.outputs)
    with pytest.raises(RewriteError, match="otherwise than by keys and values of cross-attention"):
        halves(graph)


def test_refusals(built: Path) -> None:
    from surgeon.backends._onnx_genai import refusals
    from surgeon.contract import Artifact

    model = surgeon.load(built)
    inputs = encoder_inputs("t5", 2)
    for given, message in (
        ({"attention_mask": inputs["attention_mask"]}, "input_ids must be an int64 tensor .* found NoneType"),
        ({**inputs, "pixel_values": torch.zeros(2, 3)}, "inputs are input_ids, attention_mask; unknown: pixel_values"),
        ({**inputs, "decoder_input_ids": torch.zeros(1, 1, dtype=torch.int64)}, "must have 2 rows as input_ids has, found 1"),
    ):
        with pytest.raises(GenerateError, match=message):
            model.generate(**given)
    graph = surgeon.trace(conditional("bart"), task="text-generation")
    assert "an encoder-decoder" in refusals(graph)[0].reason
    assert model.artifact is not None
    with pytest.raises(GenerateError, match="every token would run the encoder again"):
        Artifact.decoder(model.artifact)  # what a backend without halves has
    silent = surgeon.Compiled(report=model.report, artifact=model.artifact, generation={})
    with pytest.raises(GenerateError, match="names no token that its decoder starts from"):
        silent.generate(**inputs)


def test_the_command_prints_what_the_decoder_says(built: Path) -> None:
    run = CliRunner().invoke(app, ["generate", str(built), "--prompt", "def main(", "--max-new-tokens", "6", "--quiet"])
    assert run.exit_code == 0, run.output
    model = surgeon.load(built)
    ids = model.tokenizer("def main(", return_tensors="pt")["input_ids"]
    expected = model.tokenizer.decode(model.generate(ids, max_new_tokens=6)[0], skip_special_tokens=True)
    assert run.stdout.rstrip("\n") == expected.rstrip("\n")
