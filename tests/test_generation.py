"""Generating with graphs and artefacts, against ``generate`` of the transformers library."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import surgeon
from surgeon.caches import PAST, PRESENT, continued, masked_positions
from surgeon.cli import app
from surgeon.errors import GenerateError, LowerError, SurgeonWarning, TraceError, VerifyError
from surgeon.generation import AHEAD, decoder_of, generate
from surgeon.graph import Port
from surgeon.registry import make_backend, make_pass
from surgeon.rewrite import Editor
from surgeon.sampling import Sampling, Settings
from surgeon.verify import check_caches
from tests.causal import FAMILIES, causal, padded_prompts
from tests.conftest import MODELS
from tests.models import tiny, with_layer_deleted


def library(module: nn.Module, ids: torch.Tensor, mask: torch.Tensor, new: int, **options: Any) -> torch.Tensor:
    """What the library generates, never stopping early."""
    found: torch.Tensor = module.generate(  # type: ignore[operator]  # of the library's models
        input_ids=ids, attention_mask=mask, max_new_tokens=new, eos_token_id=None, **({"do_sample": False} | options)
    )
    return found


def assert_same(model: surgeon.Compiled, module: nn.Module, new: int = 20, batches: tuple[int, ...] = (1, 3)) -> None:
    for batch in batches:
        ids, mask = padded_prompts(batch)
        expected = library(module, ids, mask, new)
        assert torch.equal(model.generate(ids, mask, max_new_tokens=new, eos_token_id=()), expected)
        assert len(set(expected[0, ids.shape[1] :].tolist())) > 1  # the model says something


def source(name: str | Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    module: nn.Module = AutoModelForCausalLM.from_pretrained(MODELS / name)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("build") / "llama"
    surgeon.compile(MODELS / "tiny-llama", [], output=target, progress=False)
    return target


def test_the_trained_llama_generates_what_it_did_before(folder: Path) -> None:
    model, module = surgeon.load(folder), source("tiny-llama")
    assert_same(model, module, 40)
    prompts = ["def main(self):", "import os\n\nclass Foo:", "x ="]
    batch = model.tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    assert not bool(mask.all())
    expected = module.generate(**batch, max_new_tokens=24, do_sample=False)  # type: ignore[operator]  # of the library
    assert torch.equal(model.generate(ids, mask, max_new_tokens=24), expected)
    assert torch.equal(model.generate(ids, max_new_tokens=24), expected)  # the padding token says where the padding is


def test_draws_are_those_of_the_library(folder: Path) -> None:
    ids, mask = padded_prompts(3)
    options: dict[str, Any] = {"temperature": 0.7, "top_k": 30, "top_p": 0.9, "do_sample": True}
    torch.manual_seed(11)
    expected = library(source("tiny-llama"), ids, mask, 16, **options)
    model = surgeon.load(folder)
    found = model.generate(ids, mask, max_new_tokens=16, eos_token_id=(), seed=11, **options)
    assert torch.equal(found, expected)
    assert not torch.equal(model.generate(ids, mask, max_new_tokens=16, eos_token_id=(), seed=12, **options), expected)


def test_rows_end_at_stop_tokens_and_are_filled(folder: Path) -> None:
    model = surgeon.load(folder)
    ids, mask = padded_prompts(3)
    free = model.generate(ids, mask, max_new_tokens=12, eos_token_id=())
    new = free[:, ids.shape[1] :]
    stop = int(new[0, 3])
    found = model.generate(ids, mask, max_new_tokens=12, eos_token_id=stop, pad_token_id=7)[:, ids.shape[1] :]
    for row, before in zip(found, new, strict=True):
        end = next((i for i, token in enumerate(before.tolist()) if token == stop), len(row) - 1)
        assert torch.equal(row[: end + 1], before[: end + 1])
        assert set(row[end + 1 :].tolist()) <= {7}
    alone = model.generate(ids[:1], mask[:1], max_new_tokens=12, eos_token_id=stop)
    assert alone.shape[1] == ids.shape[1] + new[0].tolist().index(stop) + 1


class Heard:
    """A streamer that keeps what it gets, and how it was then."""

    def __init__(self) -> None:
        self.tensors: list[torch.Tensor] = []
        self.copies: list[torch.Tensor] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.tensors.append(value)
        self.copies.append(value.clone())

    def end(self) -> None:
        self.ended = True


def test_a_streamer_gets_every_token_as_it_comes(folder: Path) -> None:
    loaded = surgeon.load(folder)
    graph = surgeon.trace(source("tiny-llama"), task="text-generation")
    steps: list[tuple[Any, Any]] = [(loaded.artifact, loaded.ports), (None, graph.inputs)]
    for artifact, ports in steps:
        for batch in (1, 3):
            ids, mask = padded_prompts(batch)
            heard = Heard()
            found = generate(
                artifact.decoder() if artifact else decoder_of(graph), ports, {"input_ids": ids, "attention_mask": mask},
                max_new_tokens=AHEAD + 6, sampling=Sampling(), settings=Settings(), streamer=heard,
            )  # fmt: skip
            assert heard.ended
            assert torch.equal(heard.copies[0], ids)
            assert torch.equal(torch.stack(heard.copies[1:], 1), found[:, ids.shape[1] :])
            assert all(map(torch.equal, heard.tensors, heard.copies))  # nothing writes into what was handed out


def test_a_plain_call_gives_logits(folder: Path) -> None:
    model, module = surgeon.load(folder), source("tiny-llama")
    ids, mask = padded_prompts(2)
    for given in (mask, mask.flip(1)):
        found = model(input_ids=ids, attention_mask=given)
        assert list(found) == ["logits"]
        with torch.no_grad():
            expected = module(input_ids=ids, attention_mask=given).logits
        valid = given.bool()
        assert float((found["logits"] - expected)[valid].abs().max()) < 1e-4 * float(expected.abs().max())
    with pytest.raises(LowerError, match="past [+] sequence = 9 positions, found 5"):
        model(input_ids=ids, attention_mask=mask[:, :5])
    with pytest.raises(LowerError, match="missing: attention_mask"):
        model(input_ids=ids)


def test_dropping_a_block_drops_its_caches() -> None:
    module, _ = tiny("llama")
    graph = surgeon.trace(module, task="text-generation")
    assert graph.example["past_key_values.0.key"].shape == (2, 2, 5, 16)
    for gone in (0, 2):  # the first one's past is where lengths are read
        clone = graph.clone()
        block = surgeon.discover(clone).blocks[gone]
        editor = Editor(clone)
        editor.replace(block.exit, block.entry)
        editor.finish()
        names = [f"{number}.{half}" for number in (0, 1) for half in ("key", "value")]
        assert [port.name for port in clone.inputs if port.role == PAST] == [f"past_key_values.{n}" for n in names]
        assert [port.name for port in clone.outputs if port.role == PRESENT] == [f"present.{n}" for n in names]
        assert len(graph.inputs) == len(clone.inputs) + 2
        smaller = with_layer_deleted("llama", module, gone)
        for batch in (1, 3):
            ids, mask = padded_prompts(batch)
            found = generate(
                decoder_of(clone), clone.inputs, {"input_ids": ids, "attention_mask": mask}, max_new_tokens=20,
                sampling=Sampling(), settings=Settings(),
            )
            assert torch.equal(found, library(smaller, ids, mask, 20))


def plain_batch(graph: surgeon.Graph) -> dict[str, torch.Tensor]:
    """Plain inputs: no caches."""
    ids = graph.example["input_ids"]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("name", ["gemma2", "gpt2", "llama4", "bert", "deepseek_v3"])
def test_windows_chunks_and_learned_positions_are_kept(name: str) -> None:
    """On the graph in torch; behind 6 positions the window has moved.  Segments that surgeon makes up are left out."""
    module = causal(name, layers=2)
    model = surgeon.compile(module, [], task="text-generation", backend=None, progress=False)
    assert_same(model, module)


def alone(module: nn.Module, ids: torch.Tensor, mask: torch.Tensor, new: int) -> torch.Tensor:
    """What the library generates for every row without its padding."""
    rows = [(row[kept.bool()], int((kept == 0).sum())) for row, kept in zip(ids, mask, strict=True)]
    said = [library(module, row[None], torch.ones_like(row)[None], new) for row, _ in rows]
    return torch.cat([nn.functional.pad(row, (gap, 0)) for row, (_, gap) in zip(said, rows, strict=True)])


def test_rules_of_a_checkpoint_are_followed() -> None:
    """Penalties, bans, forced tokens and least lengths, each of which changes what is said."""
    module: Any = causal("gpt2", layers=1)
    ids, mask = padded_prompts(3)
    plain = library(module, ids, mask, 16)
    spoken = plain[0, ids.shape[1] :].tolist()
    rules: dict[str, Any] = {
        "repetition_penalty": 1.5,
        "no_repeat_ngram_size": 2,
        "bad_words_ids": [[spoken[0], spoken[1]]],
        "suppress_tokens": [spoken[2]],
        "begin_suppress_tokens": [spoken[0]],
        "forced_eos_token_id": 2,
    }
    graph = surgeon.trace(module, task="text-generation")
    for names in [*([name] for name in rules), list(rules)]:
        own = type(module.generation_config)(
            pad_token_id=0, eos_token_id=2, bos_token_id=1, **{name: rules[name] for name in names}
        )
        module.generation_config = own
        settings = Settings.of(Settings.of(own.to_dict()).to_data())  # as a manifest keeps them
        found = generate(
            decoder_of(graph), graph.inputs, {"input_ids": ids, "attention_mask": mask}, max_new_tokens=16,
            sampling=Sampling(), settings=replace(settings, eos_token_id=()),
        )  # fmt: skip
        # The library's penalty counts padding as text before version 5.23, its ban on repeated pairs in every version.
        reference = alone if names == ["repetition_penalty"] else library
        rows = 1 if names == list(rules) else len(ids)  # the first one has no padding
        assert torch.equal(found[:rows], reference(module, ids, mask, 16)[:rows]), names
        assert not torch.equal(found, plain), names


def test_a_cache_outlives_a_block_where_later_ones_read_it() -> None:
    """Two of four layers keep caches; whichever block goes, steps behind caches say what plain calls say."""
    module = causal("gemma4")
    graph = surgeon.trace(module, task="text-generation")
    names = [f"past_key_values.{number}.{half}" for number in (0, 1) for half in ("key", "value")]
    assert [port.name for port in graph.inputs if port.role == PAST] == names
    ids, mask = padded_prompts(3)
    options: Any = {"max_new_tokens": 10, "sampling": Sampling(), "settings": Settings()}
    texts = []
    for gone in (0, 3):  # one that others read from, one that reads
        clone = graph.clone()
        block = surgeon.discover(clone).blocks[gone]
        editor = Editor(clone)
        editor.replace(block.exit, block.entry)
        editor.finish()
        assert [port.name for port in clone.inputs if port.role == PAST] == names
        found = generate(decoder_of(clone), clone.inputs, {"input_ids": ids, "attention_mask": mask}, **options)
        tokens, seen = ids, mask
        for _ in range(10):
            logits = clone(input_ids=tokens, attention_mask=seen, position_ids=masked_positions(seen))["logits"]
            tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], 1)
            seen = torch.cat([seen, seen.new_ones(3, 1)], 1)
        assert torch.equal(found, tokens)
        texts.append(found)
    assert not torch.equal(*texts)


@pytest.mark.parametrize(
    ("name", "table", "trained"), [("gpt2", 256, 256), ("opt", 256, 256), ("mpt", None, None), ("mistral", None, 256)]
)
def test_tables_of_positions_are_found_by_what_reads_them(name: str, table: int | None, trained: int | None) -> None:
    """The table of the second has two rows more, in front, than it has positions; distances are no positions."""
    graph = surgeon.trace(causal(name, layers=2), task="text-generation")
    assert (graph.source.generation.get("table_length"), graph.source.generation.get("trained_length")) == (table, trained)


def test_a_text_is_as_long_as_the_table_of_positions(tmp_path: Path) -> None:
    module = causal("gpt2", layers=1)
    built = surgeon.compile(module, [], task="text-generation", output=tmp_path / "out", progress=False)
    ids, mask = padded_prompts(2, length=250)
    for model in (built, surgeon.load(tmp_path / "out")):
        found = model.generate(ids, mask, max_new_tokens=7, eos_token_id=())  # the last token is not read any more
        assert torch.equal(found, library(module, ids, mask, 7))
        with pytest.raises(GenerateError, match=r"250 tokens and 8 new ones needs 257 .* holds 256: .* at most 7 \(max_new"):
            model.generate(ids, mask, max_new_tokens=8)
        assert model.generate(ids[1:], mask[1:], max_new_tokens=9, eos_token_id=()).shape == (1, 259)  # two are padding
        with pytest.raises(GenerateError, match=r"needs 257 .* holds 256: shorten the prompt of 257 tokens$"):
            model.generate(padded_prompts(1, length=257)[0], max_new_tokens=1)


def test_computed_positions_go_on_with_one_warning() -> None:
    import warnings

    module = causal("mistral", layers=1)
    model = surgeon.compile(module, [], task="text-generation", backend=None, progress=False)
    ids, mask = padded_prompts(1, length=250)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("default")
        for new in (7, 8, 9):
            assert torch.equal(model.generate(ids, mask, max_new_tokens=new, eos_token_id=()), library(module, ids, mask, new))
    said = [str(warning.message) for warning in heard if warning.category is SurgeonWarning]
    assert len(said) == 1
    assert "beyond the 256 positions" in said[0]


def test_states_are_refused_by_layer_with_the_reason() -> None:
    import transformers as tf

    shape: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 160}
    config = tf.Lfm2Config(**shape, intermediate_size=96, num_hidden_layers=3, layer_types=["conv", "full_attention", "conv"])
    with pytest.raises(TraceError, match="layers 0, 2: a state that every token overwrites .* Trace it with task 'forward'"):
        surgeon.trace(tf.Lfm2ForCausalLM(config).eval(), task="text-generation")


def test_the_larger_of_two_sizes_is_written() -> None:
    """Biases by distance are cut out of a table at a position that must not be negative."""
    module = causal("mpt", layers=1)
    graph = surgeon.trace(module, task="text-generation")
    assert any(node.target is torch.sym_max for node in graph.module.graph.nodes)
    assert make_backend("onnxruntime").refuses(graph) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_families_generate_the_same_tokens(name: str) -> None:
    module = causal(name, layers=4 if name in ("gemma3n", "gemma4") else 2)  # half of theirs read the caches of the others
    model = surgeon.compile(module, [], task="text-generation", progress=False)
    assert model.artifact is not None
    assert_same(model, module)


@pytest.mark.slow
def test_a_compiled_package_generates_the_same_tokens() -> None:
    module, _ = tiny("llama", layers=2)
    model = surgeon.compile(module, [], task="text-generation", backend="aotinductor", progress=False)
    assert_same(model, module)
    ids, mask = padded_prompts(2)
    assert list(model(input_ids=ids, attention_mask=mask)) == ["logits"]


@pytest.mark.slow
def test_the_trained_mixtral_generates_what_it_did_before() -> None:
    model = surgeon.compile(MODELS / "tiny-mixtral", [], progress=False)
    assert_same(model, source("tiny-mixtral"), 40)


def test_wrong_caches_are_found() -> None:
    """A graph whose presents are not what its pasts must be is refused."""
    module, _ = tiny("llama", layers=2)
    graph = surgeon.trace(module, task="text-generation")
    batch = plain_batch(graph)
    step = make_pass({"drop_blocks": {"count": 1}})
    check_caches(step, graph, [batch])
    rest = continued(graph, batch)
    assert rest is not None
    assert rest["past_key_values.1.value"].shape[2] == 3
    wrong = graph.clone()
    output = wrong.module.graph.output_node()
    logits, *presents = output.args[0]
    output.args = ((logits, *reversed(presents)),)
    wrong.module.recompile()
    with pytest.raises(VerifyError, match="the caches are wrong: logits behind a cache of 3 positions"):
        check_caches(step, wrong, [batch])


def test_positions_count_what_the_mask_holds() -> None:
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])
    assert masked_positions(mask).tolist() == [[0, 0, 0, 1], [0, 1, 2, 0]]


def test_refusals(folder: Path) -> None:
    model = surgeon.load(folder)
    ids, mask = padded_prompts(2)
    for arguments, message in (
        ({"input_ids": ids, "attention_mask": mask.flip(1)}, "padded on the left"),
        ({"input_ids": ids, "attention_mask": mask[:, 1:]}, r"shape \[2, 9\] of input_ids, found \[2, 8\]"),
        ({"input_ids": ids.float()}, "int64 tensor .* found .2, 9. torch.float32"),
        ({"input_ids": ids, "max_new_tokens": 0}, "at least 1, found 0"),
        ({"input_ids": ids, "temperature": 0.5}, "do_sample=True"),
        ({"input_ids": ids, "do_sample": True, "temperature": 0.0}, "positive, found 0.0"),
        ({"input_ids": ids, "do_sample": True, "top_p": 1.5}, "at most 1, found 1.5"),
    ):
        with pytest.raises(GenerateError, match=message):
            model.generate(**arguments)  # type: ignore[arg-type]  # wrong on purpose
    bert, inputs = tiny("bert")
    forward = surgeon.compile(bert, [], inputs=inputs, backend=None, progress=False)
    with pytest.raises(GenerateError, match="traced without caches.*task: text-generation"):
        forward.generate(ids)
    with pytest.raises(TraceError, match="needs a causal language model or an encoder-decoder"):
        surgeon.trace(bert, inputs, task="text-generation")


def test_the_command_prints_prompt_and_continuation(folder: Path) -> None:
    run = CliRunner().invoke(app, ["generate", str(folder), "--prompt", "def main(", "--max-new-tokens", "12", "--quiet"])
    assert run.exit_code == 0, run.output
    model = surgeon.load(folder)
    ids = model.tokenizer("def main(", return_tensors="pt")["input_ids"]
    expected = model.tokenizer.decode(model.generate(ids, max_new_tokens=12)[0], skip_special_tokens=True)
    assert run.stdout.rstrip("\n") == expected.rstrip("\n")
    assert run.stdout.startswith("def main(")
    again = CliRunner().invoke(app, ["generate", str(folder), "--quiet", "--stop", ","], input="def main(")
    assert again.stdout.rstrip("\n") == expected.partition(",")[0] + ","
    drawn = ["generate", str(folder), "-p", "x", "-n", "8", "--temperature", "0.9", "--seed", "3", "-q"]
    assert CliRunner().invoke(app, drawn).stdout == CliRunner().invoke(app, drawn).stdout
    refused = CliRunner().invoke(app, ["generate", str(folder), "--prompt", "x", "--stop", "two words"])
    assert refused.exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "text", "words"),
    [
        (["--seed", "3"], "x", "seed 3: nothing is drawn; give temperature, top_k or top_p"),
        (["--temperature", "1", "--seed", str(2**64)], "x", f"seed must fit 64 bits, found {2**64}"),
        (["--temperature", "0"], "x", "leave it out to be greedy"),
        ([], b"def caf\xe9(", "the prompt is not UTF-8 text"),
        (["--prompt", "def caf\udce9("], "", "the prompt is not UTF-8 text at character 7, behind 'def caf'"),
    ],
)
def test_the_command_refuses(folder: Path, arguments: list[str], text: str | bytes, words: str) -> None:
    run = CliRunner().invoke(app, ["generate", str(folder), *arguments], input=text)
    assert run.exit_code == 2, run.output
    assert words in run.output.replace("\n", " ")


def test_a_tokenizer_that_is_not_the_recorded_one_is_refused(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert surgeon.load(copy).tokenizer("x")["input_ids"]
    (copy / "tokenizer.json").write_text((copy / "tokenizer.json").read_text().replace('"main"', '"niam"', 1))
    with pytest.raises(LowerError, match=r"tokenizer\.json is damaged"):
        surgeon.load(copy)


def test_a_folder_for_genai_generates_the_same_tokens(tmp_path: Path) -> None:
    """Of a model whose blocks differ: one is gone, one has experts, one is factored."""
    from surgeon.backends._onnx_genai import tokens

    text = {"text": MODELS / "calibration.txt", "samples": 8, "length": 64}
    steps = [
        {"drop_blocks": {"count": 1}},
        {"moefy_ffn": {"experts": 4, "top_k": 2, "blocks": [0, 3]}},
        {"low_rank": {"ratio": 0.6, "blocks": [1], "names": "*.ffn.*"}},
    ]
    model = surgeon.compile(
        MODELS / "tiny-llama", steps, calibration=text, backend={"onnxruntime": {"genai": True}},
        output=tmp_path / "out", progress=False,
    )  # fmt: skip
    assert model.folder is not None
    assert {"genai_config.json", "tokenizer.json", "model.onnx"} <= {path.name for path in model.folder.iterdir()}
    assert model.report.artifact is not None
    assert model.report.artifact["details"]["genai"] == "6 tokens generated and found equal"
    onnxruntime_genai = pytest.importorskip("onnxruntime_genai")
    tokenizer = onnxruntime_genai.Tokenizer(onnxruntime_genai.Model(str(model.folder)))
    text, without = "def main(self):", model.tokenizer("def main(self):", add_special_tokens=False)["input_ids"]
    assert tokenizer.encode(text).tolist() == without  # docs/generation.md says so, and how to get the others
    tokenizer.update_options(add_special_tokens="true")
    assert tokenizer.encode(text).tolist() == model.tokenizer(text)["input_ids"] != without
    prompts = torch.tensor([[0, 0, 1, 50, 60, 70], [1, 50, 60, 70, 80, 90]])
    for ids in (prompts, prompts[1:]):
        assert torch.equal(tokens(model.folder, ids, 30), model.generate(ids, max_new_tokens=24, eos_token_id=()))


def test_genai_is_refused_where_its_caches_do_not_fit() -> None:
    from surgeon.backends._onnx_genai import configuration, refusals

    module, inputs = tiny("llama", layers=2)
    plain = surgeon.trace(module, inputs)
    assert "traced without caches" in refusals(plain)[0].reason
    graph = surgeon.trace(module, task="text-generation")
    assert refusals(graph) == []
    decoder = configuration(graph, 3)["model"]["decoder"]
    assert (decoder["num_hidden_layers"], decoder["num_key_value_heads"], decoder["head_size"]) == (2, 2, 16)
    assert decoder["session_options"]["intra_op_num_threads"] == 3
    last = graph.inputs[-1]
    graph.inputs = (*graph.inputs[:-1], replace(last, shape=(*last.shape[:3], 8)))
    assert "(2 heads of 16, 2 heads of 8)" in refusals(graph)[0].reason


@pytest.mark.parametrize(
    ("known", "prompt", "behind_encoder", "added"),
    [(16, 4, False, 13), (16, 30, False, 1), (500, 4, False, 128), (None, 4, False, 128), (16, 30, True, 16)],
)
def test_the_command_adds_as_many_tokens_as_there_are_positions(
    known: int | None, prompt: int, behind_encoder: bool, added: int
) -> None:
    """Unless it is told how many; a prompt that is too long is for generation to refuse."""
    from types import SimpleNamespace

    from surgeon.text import continue_text

    asked: list[int] = []

    def tokenizer(text: str, **_: Any) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.zeros((1, len(text)), dtype=torch.int64)}

    def generated(ids: torch.Tensor, *, max_new_tokens: int, **_: Any) -> torch.Tensor:
        asked.append(max_new_tokens)
        return ids

    tokenizer.decode = lambda *_, **__: ""  # type: ignore[attr-defined]  # functions take attributes
    ports = [Port("decoder_input_ids", torch.int64, ("batch", "target")), Port("past", torch.float32, (), PAST)]
    ports = ports if behind_encoder else ports[1:]
    model: Any = SimpleNamespace(ports=ports, tokenizer=tokenizer, generation={"table_length": known}, generate=generated)
    for told in (None, 7):
        continue_text(
            model, "x" * prompt, max_new_tokens=told, temperature=None, top_k=None, top_p=None, seed=None, stop=(), write=print
        )
    assert asked == [added, 7]


def test_an_artefact_for_another_machine_is_refused_before_anything_is_moved(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = surgeon.load(folder)
    monkeypatch.setattr(type(model.artifact), "unavailable", "it runs on an NVIDIA GPU, and none is here")
    with pytest.raises(LowerError, match="llama: it runs on an NVIDIA GPU"):
        model.generate(torch.ones(1, 3, dtype=torch.int64), max_new_tokens=2)


def test_a_model_without_caches_is_not_asked_for_its_tokenizer(patient: Any) -> None:
    from surgeon.text import continue_text

    model = surgeon.compile(patient("llama").graph, [], backend=None, progress=False)
    with pytest.raises(GenerateError, match="traced without caches"):
        continue_text(
            model, "x", max_new_tokens=2, temperature=None, top_k=None, top_p=None, seed=None, stop=(), write=print
        )
    with pytest.raises(GenerateError, match="one is copied beside artefacts that generate text"):
        _ = model.tokenizer
