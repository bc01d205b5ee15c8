"""The gguf backend: files that llama.cpp loads and that compute what the graph does, or a refusal by name."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from torch import nn

import surgeon
from surgeon.backends import _gguf_runtime as runtime
from surgeon.backends._gguf_blocks import BLOCK
from surgeon.backends._gguf_probe import Evaluation
from surgeon.backends.gguf import Gguf, GgufArtifact
from surgeon.discovery.flow import Flow
from surgeon.errors import LowerError
from surgeon.generation import decoder_of, generate
from surgeon.graph import Graph
from surgeon.registry import make_backend
from surgeon.sampling import Sampling, Settings
from surgeon.tracing import trace
from surgeon.verify import compare_artifact
from tests.conftest import MODELS, Patient, Trained

gguf = pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

EXACT = 1e-5
"""Of float32: llama.cpp adds in another order."""
TABLES = 1e-3
"""Of GELU, which llama.cpp looks up in a table of float16."""
ROUNDED = 3e-2
"""Of low-bit products: llama.cpp rounds their inputs to 8 bits by blocks of 32."""


def lowered(graph: Graph, folder: Path, **options: Any) -> GgufArtifact:
    folder.mkdir(exist_ok=True)
    return Gguf(**options).lower(graph, folder)


def error(artifact: GgufArtifact, graph: Graph, batch: dict[str, torch.Tensor]) -> float:
    """Relative error of the logits on inputs of several lengths."""
    name = artifact.details["tokens"]
    cut = [{key: value[:2, :length] for key, value in batch.items()} for length in (1, 7, batch[name].shape[1])]
    return max(max(row["relative_error"].values()) for row in compare_artifact(artifact, graph, cut, 1.0))


def refused(graph: Graph, **options: Any) -> str:
    found = Gguf(**options).refuses(graph)
    assert found
    return "; ".join(f"{refusal.node}: {refusal.reason}" for refusal in found)


def tensors(artifact: GgufArtifact) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(artifact.path).tensors}


def batch_of(rows: int = 2, length: int = 19, top: int = 96) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, top, (rows, length), generator=torch.Generator().manual_seed(4))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


# -- trained models end to end -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> surgeon.Compiled:
    folder = tmp_path_factory.mktemp("gguf") / "tiny-llama"
    surgeon.compile(MODELS / "tiny-llama", [], backend="gguf", output=folder, progress=False)
    return surgeon.load(folder)


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_mixtral"])
def test_llama_cpp_gives_the_logits_of_the_graph(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    trained: Trained = request.getfixturevalue(name)
    assert trained.held_out is not None
    artifact = lowered(trained.graph, tmp_path)
    assert artifact.details["architecture"] == "llama"
    assert artifact.details["vocabulary"] == {"model": "gpt2", "pre": "gpt-2", "tokens": 1024, "samples": 7}
    assert error(artifact, trained.graph, {key: value[:4] for key, value in trained.held_out.items()}) < EXACT
    written = sum(tensor.n_bytes for tensor in tensors(artifact).values())
    assert written == trained.graph.nbytes() - 4 * 16  # the rotary angles, which are a number of the file
    assert artifact.nbytes < written + 64_000  # what the file says beside its tensors, the vocabulary above all


def test_an_artefact_generates_as_the_graph_does(built: surgeon.Compiled, tiny_llama: Trained) -> None:
    tokenizer = built.tokenizer
    prompts = tokenizer(["def main(self):\n", "x = [1, 2", "class"], return_tensors="pt", padding=True, padding_side="left")
    graph = tiny_llama.graph
    for inputs in (dict(prompts), {name: value[:1] for name, value in prompts.items()}):
        found = built.generate(**inputs, max_new_tokens=24)
        settings = Settings.of(built.generation)
        wanted = generate(
            decoder_of(graph), graph.inputs, inputs, max_new_tokens=24, sampling=Sampling(), settings=settings
        )
        assert torch.equal(found, wanted)


def test_any_program_of_llama_cpp_reads_text_with_it(built: surgeon.Compiled) -> None:
    """The server that xllamacpp brings takes text, splits it and continues it."""
    import xllamacpp

    assert built.folder is not None
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(built.folder / "model.gguf")
    parameters.n_ctx, parameters.n_parallel, parameters.warmup = 256, 1, False
    parameters.cpuparams.n_threads = 1
    parameters.verbosity = -1
    server = xllamacpp.Server(parameters)
    prompt = "def main(self):\n    return"
    answer = server.handle_completions({"prompt": prompt, "max_tokens": 16, "temperature": 0.0, "cache_prompt": False})
    ids = built.tokenizer(prompt, return_tensors="pt")["input_ids"]
    tokens = built.generate(ids, max_new_tokens=16)[0, ids.shape[1] :]
    assert answer["choices"][0]["text"] == built.tokenizer.decode(tokens, skip_special_tokens=True)


def test_padding_is_left_out(built: surgeon.Compiled, tiny_llama: Trained) -> None:
    ids = batch_of(top=1000)["input_ids"]
    for span in (slice(5, None), slice(None, 14)):
        mask = torch.zeros_like(ids)
        mask[0], mask[1, span] = 1, 1
        found = built(input_ids=ids, attention_mask=mask)["logits"]
        wanted = tiny_llama.graph(input_ids=ids, attention_mask=mask)["logits"].detach()
        assert float((found - wanted)[mask == 1].norm() / wanted[mask == 1].norm()) < EXACT
        assert not found[mask == 0].any()
    mask[0, 3] = 0
    with pytest.raises(LowerError, match="padding within a text"):
        built(input_ids=ids, attention_mask=mask)
    with pytest.raises(LowerError, match="a row has no token"):
        built(input_ids=ids, attention_mask=torch.zeros_like(ids))


def test_what_llama_cpp_does_not_take_is_refused(built: surgeon.Compiled, tiny_llama: Trained) -> None:
    inputs = batch_of(1, 4, 1000)
    pasts = {p.name: torch.zeros(1, 2, 3, 32) for p in tiny_llama.graph.inputs if p.role == "past"}
    inputs["attention_mask"] = torch.ones(1, 7, dtype=torch.int64)
    with pytest.raises(LowerError, match="keeps caches of its own and takes none"):
        built(**inputs, **pasts)
    with pytest.raises(LowerError, match="token 1024 is not in the vocabulary of 1024"):
        built(input_ids=torch.tensor([[1024]]), attention_mask=torch.ones(1, 1, dtype=torch.int64))


def test_a_step_behind_caches_can_be_timed(built: surgeon.Compiled) -> None:
    from surgeon.candidates import ArtifactCandidate, Case

    assert built.artifact is not None
    candidate = ArtifactCandidate("gguf", built.artifact, {"input_ids": [3, 1000]})
    assert candidate.has_caches
    step = candidate.prepare(Case("decode", 1, 9))
    with candidate.threads(1):
        step()
        step()
        candidate.prepare(Case("prefill", 2, 9))()
    with pytest.raises(LowerError, match="ask for batch 1"):
        candidate.prepare(Case("decode", 2, 9))


def test_a_damaged_file_is_named(built: surgeon.Compiled, tmp_path: Path) -> None:
    assert built.folder is not None
    path = tmp_path / "model.gguf"
    path.write_bytes((built.folder / "model.gguf").read_bytes()[:2000])
    with pytest.raises(LowerError, match=r"model\.gguf: llama\.cpp refuses the file: .+"):
        runtime.Runtime(path)


def test_without_llama_cpp_a_file_is_written_and_the_report_says_that_it_was_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_llama: Trained
) -> None:
    find = runtime.importlib.util.find_spec
    monkeypatch.setattr(runtime.importlib.util, "find_spec", lambda name: None if name == "xllamacpp" else find(name))
    compiled = surgeon.compile(tiny_llama.graph, [], backend="gguf", output=tmp_path / "out", progress=False)
    assert any("was not run in this build" in line and "surgeon[gguf]" in line for line in compiled.report.warnings)
    assert "samples" not in compiled.report.artifact["details"]["vocabulary"]
    with pytest.raises(LowerError, match=r"surgeon\[gguf\]"):
        compiled(**batch_of(1, 4))


# -- passes --------------------------------------------------------------------------------------------------------


CUT = {
    "blocks": ([{"drop_blocks": {"count": 2}}], "llama", EXACT),
    "heads": ([{"drop_heads": {"keep": 1}}], "llama", EXACT),
    "heads of some layers": ([{"drop_heads": {"keep": 1, "blocks": "2:4"}}], "deci", EXACT),
    "neurons of some layers": ([{"drop_neurons": {"ratio": 0.5, "blocks": "1:3"}}], "deci", EXACT),
    "4 bits": ([{"quantize": {"scheme": "int4", "embeddings": True}}], "llama", ROUNDED),
    "8 bits, layers that differ": (
        [{"drop_heads": {"keep": 1, "blocks": [0]}}, {"quantize": {"scheme": "int8"}}], "deci", ROUNDED,
    ),
    "one expert of four": ([{"moefy_ffn": {"experts": 4, "top_k": 1, "router": "centroid"}}], "llama", EXACT),
    "a shared expert": (
        [{"moefy_ffn": {"experts": 4, "top_k": 2, "router": "centroid", "scaling": "softmax", "shared": 1}}],
        "bailingmoe", EXACT,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CUT)
def test_what_passes_leave_is_written(name: str, tiny_llama: Trained, tmp_path: Path) -> None:
    steps, architecture, tolerance = CUT[name]
    patient: Patient = tiny_llama
    for step in steps:
        patient = patient.operate(step)
    artifact = lowered(patient.graph, tmp_path)
    assert artifact.details["architecture"] == architecture
    assert error(artifact, patient.graph, batch_of(top=1000)) < tolerance
    if architecture == "deci":
        fields = gguf.GGUFReader(artifact.path).fields
        heads = fields["deci.attention.head_count_kv"].contents(), fields["deci.feed_forward_length"].contents()
        assert any(len(set(numbers)) == 2 for numbers in heads)


MIXED = {
    "experts": ([{"drop_experts": {"keep": 6}}], EXACT),
    "experts per token": ([{"skip_experts": {"top_k": 1}}], EXACT),
    "4 bits": ([{"quantize": {"scheme": "int4", "symmetric": False}}], ROUNDED),
    "merged, 8 bits": ([{"merge_experts": {"groups": 4}}, {"quantize": {"scheme": "int8"}}], ROUNDED),
}


@pytest.mark.parametrize("name", MIXED)
def test_what_passes_leave_of_mixtures_is_written(name: str, tiny_mixtral: Trained, tmp_path: Path) -> None:
    steps, tolerance = MIXED[name]
    patient: Patient = tiny_mixtral
    for step in steps:
        patient = patient.operate(step)
    artifact = lowered(patient.graph, tmp_path)
    found = error(artifact, patient.graph, batch_of(length=9, top=1000))
    assert found < tolerance
    if "merged" in name:
        assert tensors(artifact)["blk.0.ffn_up_exps.weight"].shape[-1] == 8  # four experts, one for each choice
        with_refusal = refused(patient.graph, merged_experts="refuse")
        assert "8 choices of its router share 4 merged experts" in with_refusal
        assert "merged_experts: repeat" in with_refusal


@pytest.mark.parametrize(
    ("scheme", "options", "kind"),
    [
        ("int4", {}, "Q4_0"),
        ("int4", {"group": 64}, "Q4_0"),
        ("int4", {"group": -1}, "Q4_0"),
        ("int4", {"symmetric": False}, "Q4_1"),
        ("int8", {"group": 128}, "Q8_0"),
        ("int2", {}, "Q4_0"),
    ],
)
def test_low_bit_weights_are_written_as_the_codes_they_are(
    scheme: str, options: dict[str, Any], kind: str, tiny_mixtral: Trained, tmp_path: Path
) -> None:
    """Every weight is what the graph's codes stand for under scales of float16."""
    if options.get("group") == -1:
        with pytest.raises(surgeon.errors.SurgeonError):
            tiny_mixtral.operate({"quantize": {"scheme": scheme, **options}})
        options = {"group": 256}
    graph = tiny_mixtral.operate({"quantize": {"scheme": scheme, "names": ["*.o*", "*.moe"], **options}}).graph
    artifact = lowered(graph, tmp_path)
    assert artifact.details["types"][kind] == 4 * 4
    assert 0 < artifact.details["scale_rounding"] < 2**-10
    held = tensors(artifact)
    for name, ours in (("attn_output", "self_attn.o_proj.weight"), ("ffn_down_exps", "mlp.experts.down_proj")):
        stored = held[f"blk.1.{name}.weight"]
        assert stored.tensor_type.name == kind
        found = torch.from_numpy(gguf.quants.dequantize(stored.data, stored.tensor_type))
        codes, scale = (graph.tensor(f"model.layers.1.{ours}_{what}").detach() for what in ("codes", "scale"))
        zeros = graph.tensor(f"model.layers.1.{ours}_zero_point").float() if kind == "Q4_1" else None
        bits = {"int2": 2, "int4": 4, "int8": 8}[scheme]
        numbers = torch.stack([codes >> shift & (2**bits - 1) for shift in range(0, 8, bits)], -1).flatten(-2).float()
        step = scale.half().float().unsqueeze(-1)
        if zeros is None:
            wanted = (numbers - 2 ** (bits - 1)) * step
        else:
            wanted = numbers * step + (-step * zeros.unsqueeze(-1)).half().float()
        assert torch.equal(found, wanted.flatten(-2)[..., : found.shape[-1]])


def test_floats_are_written_in_the_type_asked_for(tiny_llama: Trained, tmp_path: Path) -> None:
    for dtype, kind in (("float16", "F16"), ("bfloat16", "BF16")):
        backend = Gguf(dtype=dtype)
        (tmp_path / dtype).mkdir()
        artifact = backend.lower(tiny_llama.graph, tmp_path / dtype)
        assert artifact.details["types"] == {kind: 44, "F32": 13}  # norms stay
        found = error(artifact, tiny_llama.graph, batch_of(top=1000))
        assert 1e-5 < found < backend.accepted_error(tiny_llama.graph)
        held = tensors(artifact)["blk.2.ffn_down.weight"]
        weight = tiny_llama.graph.tensor("model.layers.2.mlp.down_proj.weight").to(getattr(torch, dtype)).float()
        assert torch.equal(torch.from_numpy(gguf.quants.dequantize(held.data, held.tensor_type)), weight)


# -- structure, not classes ----------------------------------------------------------------------------------------


COMMON: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GPT2: dict[str, Any] = {
    "vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
RESCALED = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


def random(config: Any) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A tiny model with gains, offsets and biases that matter."""
    torch.manual_seed(0)
    module = tf.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape))
            else:
                parameter.mul_(3)  # so that attention is no mean
    return module, batch_of(2, 12)


WRITTEN: dict[str, tuple[Callable[[], Any], str, float]] = {
    "llama with biases": (lambda: tf.LlamaConfig(**COMMON, attention_bias=True, mlp_bias=True, head_dim=24), "llama", EXACT),
    "llama, rescaled angles": (lambda: tf.LlamaConfig(**COMMON, rope_parameters=RESCALED), "llama", EXACT),
    "phi3": (lambda: tf.Phi3Config(**COMMON), "llama", EXACT),
    "granite": (
        lambda: tf.GraniteConfig(
            **COMMON, residual_multiplier=0.22, embedding_multiplier=12.0, attention_multiplier=0.1, logits_scaling=4.0
        ),
        "llama", EXACT,
    ),
    "glm": (lambda: tf.GlmConfig(**COMMON, head_dim=16, partial_rotary_factor=0.5), "llama", EXACT),
    "qwen2": (lambda: tf.Qwen2Config(**COMMON, tie_word_embeddings=True), "qwen2", EXACT),
    "qwen3": (lambda: tf.Qwen3Config(**COMMON, head_dim=32), "qwen3", EXACT),
    "qwen2 mixture": (lambda: tf.Qwen2MoeConfig(**COMMON, **EXPERTS, shared_expert_intermediate_size=48), "qwen2moe", EXACT),
    "qwen3 mixture": (lambda: tf.Qwen3MoeConfig(**COMMON, **EXPERTS, head_dim=16, norm_topk_prob=True), "qwen3moe", EXACT),
    "olmo2": (lambda: tf.Olmo2Config(**COMMON), "olmo2", EXACT),
    "olmoe": (
        lambda: tf.OlmoeConfig(**{**COMMON, "num_key_value_heads": 4}, num_experts=4, num_experts_per_tok=2), "olmoe", EXACT,
    ),
    "gemma": (lambda: tf.GemmaConfig(**COMMON, head_dim=16), "gemma", TABLES),
    "gpt2": (lambda: tf.GPT2Config(**GPT2), "gpt2", TABLES),
    "starcoder2": (lambda: tf.Starcoder2Config(**COMMON, use_bias=True, sliding_window=None), "starcoder2", TABLES),
}  # fmt: skip


@pytest.mark.parametrize("name", WRITTEN)
def test_the_structure_decides_which_architecture_it_is(name: str, tmp_path: Path) -> None:
    make, architecture, tolerance = WRITTEN[name]
    module, inputs = random(make())
    graph = trace(module, inputs)
    artifact = lowered(graph, tmp_path)
    assert artifact.details["architecture"] == architecture
    assert artifact.details["vocabulary"] == {"model": "none", "reason": "the source has no tokenizer.json"}
    assert error(artifact, graph, batch_of()) < tolerance


@pytest.mark.parametrize(("config", "architecture"), [(tf.Qwen3Config, "qwen3"), (tf.GPT2Config, "gpt2")])
def test_a_model_with_caches_is_continued(config: Any, architecture: str, tmp_path: Path) -> None:
    module, inputs = random(config(**(GPT2 if architecture == "gpt2" else COMMON)))
    graph = trace(module, inputs, task="text-generation")
    artifact = lowered(graph, tmp_path)
    assert artifact.details["architecture"] == architecture
    prompt = batch_of(1, 9)
    found, wanted = (
        generate(decoder, graph.inputs, prompt, max_new_tokens=20, sampling=Sampling(), settings=Settings())
        for decoder in (artifact.decoder(), decoder_of(graph))
    )
    assert torch.equal(found, wanted)


HALVES = {
    "one base": (
        lambda: tf.Qwen3Config(**COMMON, head_dim=32, rope_parameters={"rope_type": "default", "rope_theta": 5e5}), "qwen3",
    ),
    "rescaled": (lambda: tf.LlamaConfig(**COMMON, rope_parameters=RESCALED), "llama"),
}  # fmt: skip


@pytest.mark.parametrize("name", HALVES)
def test_angles_are_exact_in_halves_too(name: str, tmp_path: Path) -> None:
    """A rounded sine does not tell an angle well enough for long texts: powers of one base do, or a stored vector."""
    make, architecture = HALVES[name]
    module, inputs = random(make())
    angles = module.get_submodule("model.rotary_emb").inv_freq.clone()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.data = parameter.to(torch.bfloat16)
    graph = trace(module, inputs, task="text-generation")
    artifact = lowered(graph, tmp_path)
    base = gguf.GGUFReader(artifact.path).fields[f"{architecture}.rope.freq_base"].contents()
    powers = base ** (-torch.arange(len(angles), dtype=torch.float64) / len(angles))
    factors = tensors(artifact).get("rope_freqs.weight")
    assert (factors is None) == (name == "one base")
    written = powers if factors is None else powers / torch.from_numpy(factors.data.copy())
    assert torch.allclose(written, angles.double(), rtol=1e-6)
    assert artifact.details["types"]["BF16"] == 16
    assert error(artifact, graph, batch_of()) < Gguf().accepted_error(graph)


class Spelled(nn.Module):
    """A Llama in a spelling of its own: neighbours of a head turned as complex numbers, softmax by hand, one matrix for all."""

    def __init__(self, window: int = 1 << 20) -> None:
        super().__init__()
        hidden, heads, width, layers, words = 64, 4, 96, 2, 96
        self.window = window
        self.heads, self.size = heads, hidden // heads
        self.words = nn.Embedding(words, hidden)
        self.gains = nn.ParameterList([nn.Parameter(1 + 0.2 * torch.randn(hidden)) for _ in range(2 * layers + 1)])
        self.mixing = nn.ModuleList([nn.Linear(hidden, 3 * hidden, bias=False) for _ in range(layers)])
        self.out = nn.ModuleList([nn.Linear(hidden, hidden, bias=False) for _ in range(layers)])
        self.inner = nn.ModuleList([nn.Linear(hidden, 2 * width, bias=False) for _ in range(layers)])
        self.outer = nn.ModuleList([nn.Linear(width, hidden, bias=False) for _ in range(layers)])
        self.head = nn.Linear(hidden, words, bias=False)
        angles = 500.0 ** (-torch.arange(self.size // 2) * 2 / self.size)
        self.register_buffer("angles", torch.outer(torch.arange(2048.0), angles))

    def norm(self, x: torch.Tensor, place: int) -> torch.Tensor:
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-4) * self.gains[place]

    def turn(self, x: torch.Tensor) -> torch.Tensor:
        angles = self.angles[: x.shape[1], None]
        even, odd = x[..., 0::2], x[..., 1::2]
        turned = (even * angles.cos() - odd * angles.sin(), even * angles.sin() + odd * angles.cos())
        return torch.stack(turned, -1).flatten(-2)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.words(tokens)
        batch, length, hidden = x.shape
        places = torch.arange(length)
        ago = places[:, None] - places
        unseen = torch.zeros(length, length).masked_fill((ago < 0) | (ago >= self.window), -math.inf)
        for place in range(len(self.mixing)):
            q, k, v = self.mixing[place](self.norm(x, 2 * place)).view(batch, length, 3, self.heads, self.size).unbind(2)
            q, k, v = self.turn(q).transpose(1, 2), self.turn(k).transpose(1, 2), v.transpose(1, 2)
            weights = ((q @ k.transpose(2, 3)) * 0.3 + unseen).softmax(-1)
            x = x + self.out[place]((weights @ v).transpose(1, 2).reshape(batch, length, hidden))
            up, gate = self.inner[place](self.norm(x, 2 * place + 1)).chunk(2, -1)
            x = x + self.outer[place](F.silu(gate) * up)
        return self.head(self.norm(x, -1))


def test_a_handwritten_llama_is_a_llama(tmp_path: Path) -> None:
    torch.manual_seed(0)
    ids = batch_of(2, 12)["input_ids"]
    graph = trace(Spelled().eval(), {"tokens": ids})
    artifact = lowered(graph, tmp_path)
    assert artifact.details["architecture"] == "llama"
    assert gguf.GGUFReader(artifact.path).fields["llama.rope.freq_base"].contents() == 500.0
    assert error(artifact, graph, {"tokens": batch_of()["input_ids"]}) < EXACT
    narrow = trace(Spelled(window=100).eval(), {"tokens": ids})
    assert "blocks.0.attention: its queries look back over 100 positions of the 2048" in refused(narrow)


# -- refusals ------------------------------------------------------------------------------------------------------


STRANGE: dict[str, tuple[Callable[[], Any], str]] = {
    "a window": (
        lambda: tf.MistralConfig(**COMMON, sliding_window=16),
        "blocks.0.attention: its queries look back over 16 positions of the 128 that the model was made for",
    ),
    "soft caps": (lambda: tf.Gemma2Config(**COMMON, head_dim=16), "a norm stands behind it"),
    "side by side": (
        lambda: tf.GPTNeoXConfig(**{k: v for k, v in COMMON.items() if k != "num_key_value_heads"}), "blocks.0: it is parallel",
    ),
    "slopes": (
        lambda: tf.BloomConfig(vocab_size=96, hidden_size=64, n_layer=2, n_head=4),
        "blocks.0.attention: blocks.0.attention.q: queries and keys are",
    ),
    "positions in some layers": (
        lambda: tf.SmolLM3Config(**COMMON, no_rope_layers=[1, 0]),
        "blocks.1.attention: positions turn queries and keys by other angles than in blocks.0.attention",
    ),
    "relu": (
        lambda: tf.OPTConfig(
            vocab_size=96, hidden_size=64, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=64,
            max_position_embeddings=128,
        ),
        "blocks.0.ffn: its activation is relu, gelu_tanh in gpt2",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STRANGE)
def test_what_no_architecture_computes_is_refused_by_name(name: str) -> None:
    make, reason = STRANGE[name]
    graph = trace(*random(make()))
    message = refused(graph)
    assert reason in message
    assert "the engines (onnxruntime, aotinductor, tensorrt) can run it" in message


UNSAID = {
    "int8_dynamic": ({"quantize": {"scheme": "int8_dynamic"}}, {}, "rounded to 8 bits by a range of the whole tensor"),
    "low_rank": (
        {"low_rank": {"ratio": 0.5, "method": "svd", "names": "*.o"}}, {},
        "is half of a factored matrix, and formats have one matrix: leave out low_rank here",
    ),
    "fp8": ({"quantize": {"scheme": "fp8"}}, {}, "it is in 8-bit floats (fp8)"),
    "groups of 16": ({"quantize": {"scheme": "int4", "group": 16}}, {}, "its groups of 16 are no multiple of 32"),
    "zero points": ({"quantize": {"scheme": "int8", "symmetric": False}}, {}, "quantize with symmetric: true"),
    "sums": (
        {"moefy_ffn": {"experts": 4, "top_k": 2, "router": "centroid"}}, {},
        "the 2 of 4 chosen experts are added with weights 1 each",
    ),
    "layers without experts": (
        {"moefy_ffn": {"experts": 4, "top_k": 1, "router": "centroid", "blocks": "3:"}}, {},
        "blocks.0.ffn: blocks.3.moe is a mixture, and llama has experts in every layer",
    ),
    "a router's bias": ({"moefy_ffn": {"experts": 4, "top_k": 1}}, {}, "moefy_ffn: {router: centroid} makes none"),
    "another architecture": ({"drop_blocks": {"count": 1}}, {"architecture": "qwen3"}, "queries and keys have no norms"),
    "recorded routing": (
        [{"moefy_ffn": {"experts": 4, "top_k": 1, "router": "centroid"}}, {"expose_routing": {}}], {},
        "leave out expose_routing",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNSAID)
def test_what_passes_leave_and_the_format_does_not_say_is_refused(name: str, tiny_llama: Trained) -> None:
    steps, options, reason = UNSAID[name]
    patient: Patient = tiny_llama
    for step in steps if isinstance(steps, list) else [steps]:
        patient = patient.operate(step)
    assert reason in refused(patient.graph, **options)


def test_widths_that_are_no_blocks_are_refused_or_floats(tiny_mixtral: Trained, tmp_path: Path) -> None:
    narrow = tiny_mixtral.operate({"drop_neurons": {"keep": 144}}).operate({"quantize": {"scheme": "int4"}})
    message = refused(narrow.graph)
    assert "blocks.0.moe.w_out" in message
    assert f"its 144 inputs are no multiple of {BLOCK}" in message
    assert "low_bit: dequantize" in message
    artifact = lowered(narrow.graph, tmp_path, low_bit="dequantize")
    assert artifact.details["types"] == {"F32": 13 + 1 + 4, "Q4_0": 24}
    assert sum("is written as F32" in note for note in artifact.details["notes"]) == 4
    assert error(artifact, narrow.graph, batch_of(length=9, top=1000)) < ROUNDED


def test_an_encoder_and_other_outputs_are_refused(patient: Callable[[str], Patient]) -> None:
    assert "llama.cpp" in refused(patient("bert").graph)
    assert make_backend({"gguf": {"dtype": "float16"}}).name == "gguf"
    with pytest.raises(surgeon.errors.SurgeonError, match="qwen2moe"):
        make_backend({"gguf": {"architecture": "mamba"}})


def test_a_sublayer_that_computes_more_than_was_recognised_is_refused(tiny_llama: Trained) -> None:
    """A factor on values that depends on the token is seen by nothing but the numbers."""
    graph = tiny_llama.graph.clone()
    node = next(n for n in graph.module.graph.nodes if str(n.target) == "surgeon.attention.default")
    with graph.module.graph.inserting_after(node):
        more = graph.module.graph.call_function(torch.ops.aten.mul.Tensor, (node, node))
        more.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(more, delete_user_cb=lambda user: user is not more)
    message = refused(graph)
    assert "blocks.0.attention: it computes something else than what was recognised in it" in message


def test_evaluation_of_a_part_holds_only_what_is_needed(tiny_llama: Trained) -> None:
    flow = Flow(tiny_llama.graph)
    batch = batch_of(1, 5, 1000)
    run = Evaluation(flow, batch)
    (found,) = run([flow.outputs[0]], {})
    assert torch.equal(found, tiny_llama.graph(**batch)["logits"])


# -- vocabularies --------------------------------------------------------------------------------------------------


def tokenizer(kind: str, folder: Path) -> None:
    """Train a tokenizer of a kind on the calibration text, for a model of 1024 tokens."""
    import tokenizers as tk
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

    words = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    own = tk.Tokenizer(models.BPE(byte_fallback=kind == "pieces", unk_token="<unk>" if kind == "pieces" else None))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<bos>", "<eos>"]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if kind == "pieces":
        own.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        own.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        special = ["<unk>", "<bos>", "<eos>", *(f"<0x{byte:02X}>" for byte in range(256))]
        alphabet = []
    elif kind == "qwen":
        own.normalizer = normalizers.NFC()
        split = pre_tokenizers.Split(tk.Regex(words % ""), "isolated")
        own.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    elif kind == "llama3":
        split = pre_tokenizers.Split(tk.Regex(words % "{1,3}"), "isolated")
        own.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    elif kind == "digits":
        steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        own.pre_tokenizer = pre_tokenizers.Sequence(steps)
    else:
        own.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), byte_level])
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=special, initial_alphabet=alphabet, show_progress=False,
        max_token_length=12 if kind == "pieces" else None,
    )  # fmt: skip
    text = (MODELS / "calibration.txt").read_text(encoding="utf-8")
    own.train_from_iterator(text.splitlines(keepends=True) if kind != "pieces" else text.split("\n"), trainer)
    folder.mkdir()
    own.save(str(folder / "tokenizer.json"))
    data = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    if kind == "pieces":  # bytes are no special tokens there
        data["added_tokens"] = data["added_tokens"][:3]
        (folder / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<bos>", "eos_token": "<eos>"}))


@pytest.mark.parametrize(
    ("kind", "model", "pre"),
    [("qwen", "gpt2", "qwen2"), ("llama3", "gpt2", "dbrx"), ("digits", "gpt2", "smollm"), ("pieces", "llama", "default")],
)
def test_a_vocabulary_is_split_as_the_tokenizer_does(
    kind: str, model: str, pre: str, tiny_llama: Trained, tmp_path: Path
) -> None:
    tokenizer(kind, tmp_path / "source")
    graph = tiny_llama.graph.with_source(path=str(tmp_path / "source"))
    artifact = lowered(graph, tmp_path / "out")
    facts = artifact.details["vocabulary"]
    assert (facts["model"], facts["pre"], facts["samples"]) == (model, pre, 7)
    fields = gguf.GGUFReader(artifact.path).fields
    assert fields["tokenizer.ggml.bos_token_id"].contents() == 1
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 2
    kinds = fields["tokenizer.ggml.token_type"].contents()
    assert kinds[1] == gguf.TokenType.CONTROL
    assert kinds[1023] == gguf.TokenType.UNUSED
    from tokenizers import Tokenizer

    own = Tokenizer.from_file(str(tmp_path / "source" / "tokenizer.json"))
    text = (MODELS / "heldout.txt").read_text(encoding="utf-8")[:20_000]
    assert artifact.runtime().tokenize(text, special=False) == own.encode(text, add_special_tokens=False).ids


def test_a_vocabulary_that_llama_cpp_does_not_know_is_left_out(tiny_llama: Trained, tmp_path: Path) -> None:
    tokenizer("words", tmp_path / "source")
    graph = tiny_llama.graph.with_source(path=str(tmp_path / "source"))
    artifact = lowered(graph, tmp_path / "out")
    facts = artifact.details["vocabulary"]
    assert facts["model"] == "none"
    assert "none of llama.cpp's ways" in facts["reason"]
    assert any("no vocabulary, so that it is given numbers" in line for line in artifact.details["warnings"])
    assert error(artifact, graph, batch_of(top=1000)) < EXACT


def test_a_vocabulary_that_is_split_otherwise_ends_the_build(
    tiny_llama: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Merges in another order than the tokenizer's: the samples tell."""
    tokenizer("qwen", tmp_path / "source")
    graph = tiny_llama.graph.with_source(path=str(tmp_path / "source"))
    (tmp_path / "out").mkdir()
    from surgeon.backends import _gguf_vocabulary

    found = _gguf_vocabulary.vocabulary_of(graph, 1024, wanted="auto")
    found.pre = "gpt-2"
    monkeypatch.setattr(_gguf_vocabulary, "vocabulary_of", lambda *args, **options: found)
    with pytest.raises(LowerError, match=r"llama.cpp \(patterns 'gpt-2'\) splits .* set tokenizer: none"):
        Gguf().lower(graph, tmp_path / "out")
    monkeypatch.undo()
    assert lowered(graph, tmp_path / "other", tokenizer="none").details["vocabulary"]["model"] == "none"
