"""The huggingface backend: checkpoints that transformers loads and that compute what the graph does, or a refusal by name."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors import safe_open
from torch import nn

import surgeon
from surgeon.backends._hf_skeleton import auto_class
from surgeon.backends.huggingface import HuggingFace
from surgeon.contract import Refusal
from surgeon.data import load_data
from surgeon.errors import LowerError, RecipeError, TraceError
from surgeon.graph import Graph
from surgeon.plans import SavedPlan
from surgeon.registry import make_backend
from tests.conditional import conditional
from tests.conftest import MODELS, Patient
from tests.models import VOCABULARY, inputs_for, layer_list, minilm_path, tiny, with_layer_deleted

LIBRARY = importlib.util.find_spec("compressed_tensors") is not None and importlib.util.find_spec("loguru") is not None


def dropped(patient: Patient, *blocks: int) -> Patient:
    """The model without some blocks, whatever their scores."""
    from surgeon.passes.drop_blocks import DropBlock, DropBlocksPlan

    plan = DropBlocksPlan(decisions=tuple(DropBlock(site=f"blocks.{block}") for block in blocks))
    return patient.operate({"drop_blocks": {"count": len(blocks)}}, plan)


def lowered(graph: Graph, folder: Path, **options: Any) -> tuple[Any, dict[str, Any]]:
    """Write a checkpoint; the model that transformers loads from it, and the report's facts."""
    artifact = HuggingFace(**options).lower(graph, folder)
    loader = getattr(tf, artifact.details["loaded_by"])
    return loader.from_pretrained(folder, dtype="auto").eval(), artifact.details


def refused(graph: Graph, **options: Any) -> list[Refusal]:
    return HuggingFace(**options).refuses(graph)


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def difference(model: nn.Module, graph: Graph, inputs: dict[str, torch.Tensor]) -> float:
    """Largest relative error of the loaded model against the graph over all outputs."""
    with torch.no_grad():
        found, wanted = model(**inputs), graph(**inputs)
    return max(error(found[name], value) for name, value in wanted.items())


def family(name: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Further tiny models, whose formats nothing but the checkpoint's own configuration describes."""
    common: dict[str, Any] = {
        "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": VOCABULARY, "max_position_embeddings": 128, "intermediate_size": 112,
    }  # fmt: skip
    torch.manual_seed(0)
    module: nn.Module
    match name:
        case "qwen3":
            module = tf.Qwen3ForCausalLM(tf.Qwen3Config(**common, head_dim=32))
        case "qwen2":
            module = tf.Qwen2ForCausalLM(tf.Qwen2Config(**common, tie_word_embeddings=True))
        case _:
            mixture = {"moe_intermediate_size": 48, "shared_expert_intermediate_size": 32, "num_experts_per_tok": 2}
            module = tf.Qwen2MoeForCausalLM(tf.Qwen2MoeConfig(**common, **mixture, num_experts=6, mlp_only_layers=[1]))
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape)
            parameter.copy_(noise * 0.08) if parameter.dim() >= 2 else parameter.add_(noise * 0.1)
    return module.eval(), inputs_for("llama")


def operated(name: str) -> Patient:
    module, inputs = family(name)
    graph = surgeon.trace(module, inputs)
    return Patient(graph, surgeon.discover(graph), load_data([inputs], graph))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2", "bert", "vit"])
def test_a_dropped_block_is_a_checkpoint_with_one_layer_less(name: str, patient: Any, tmp_path: Path) -> None:
    model, details = lowered(dropped(patient(name), 1).graph, tmp_path)
    expected = with_layer_deleted(name, tiny(name)[0], 1)
    inputs = inputs_for(name, 3, 11)
    with torch.no_grad():
        assert torch.equal(model(**inputs)[0], expected(**inputs)[0])  # bit for bit
    assert len(layer_list(model)) == 2
    (change,) = details["configuration"].values()
    assert change == {"before": 3, "after": 2}
    state = expected.state_dict()
    assert {key: tuple(t.shape) for key, t in model.state_dict().items()} == {k: tuple(t.shape) for k, t in state.items()}


@pytest.mark.slow
def test_fields_of_single_layers_follow_the_layers_that_stay(tmp_path: Path) -> None:
    before = operated("qwen2_moe")  # layer 1 of 3 is dense, the others hold experts
    graph = dropped(before, 0).operate({"drop_experts": {"keep": 4}}).graph
    model, details = lowered(graph, tmp_path)
    assert model.config.mlp_only_layers == [0]
    assert (model.config.num_hidden_layers, model.config.num_experts, len(model.config.layer_types)) == (2, 4, 2)
    assert difference(model, graph, inputs_for("llama", 3, 11)) < 1e-6
    assert details["configuration"]["num_experts"] == {"before": 6, "after": 4}


@pytest.mark.slow
def test_experts_of_a_mixture(patient: Any, tmp_path: Path) -> None:
    mixtral = patient("mixtral")
    fewer = mixtral.operate({"drop_experts": {"keep": 4}}).graph
    model, details = lowered(fewer, tmp_path / "fewer")
    assert details["configuration"] == {"num_local_experts": {"before": 6, "after": 4}}
    assert difference(model, fewer, inputs_for("mixtral", 3, 11)) < 1e-6

    merged = mixtral.operate({"merge_experts": {"groups": 4}}).graph
    model, details = lowered(merged, tmp_path / "merged")
    assert model.config.num_local_experts == 6
    assert any("4 merged experts are written as 6" in note for note in details["notes"])
    assert difference(model, merged, inputs_for("mixtral", 3, 11)) < 1e-6
    assert all("6 choices of its router share 4" in r.reason for r in refused(merged, merged_experts="refuse"))

    uneven = mixtral.operate({"drop_experts": {"keep": 4, "blocks": 1}}).graph
    refusals = refused(uneven)
    assert {r.node for r in refusals} == {
        "model.layers.1.mlp.gate.weight", "model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj",
    }  # fmt: skip
    assert all("one number for all layers" in r.reason and "onnxruntime" in r.reason for r in refusals)
    with pytest.raises(LowerError, match=r"model\.layers\.1\.mlp"):
        HuggingFace().lower(uneven, tmp_path)


@pytest.mark.slow
def test_a_moefied_model_is_a_mixtral_where_the_arithmetic_is_the_same(patient: Any, tmp_path: Path) -> None:
    llama = patient("llama")

    def moefied(top_k: int, **where: Any) -> Graph:
        graph: Graph = llama.operate({"moefy_ffn": {"experts": 4, "top_k": top_k, "router": "centroid", **where}}).graph
        return graph

    one, inputs = moefied(1), inputs_for("llama", 3, 11)
    model, _ = lowered(one, tmp_path / "one")
    assert isinstance(model, tf.MixtralForCausalLM)
    assert (model.config.num_local_experts, model.config.num_experts_per_tok, model.config.intermediate_size) == (4, 1, 28)
    assert difference(model, one, inputs) < 1e-6
    every = moefied(4)
    model, _ = lowered(every, tmp_path / "every")
    assert difference(model, every, inputs) < 1e-5
    with torch.no_grad():
        assert error(model(**inputs).logits, tiny("llama")[0](**inputs).logits) < 1e-5  # it is the dense model

    refusals = refused(moefied(2))
    assert len(refusals) == 3
    assert "model.layers.0.mlp" in refusals[0].node
    assert "2 of 4 chosen experts are added with weights 1 each" in refusals[0].reason
    weighed = llama.operate({"moefy_ffn": {"experts": 4, "top_k": 2, "router": "centroid", "scaling": "softmax"}}).graph
    model, _ = lowered(weighed, tmp_path / "weighed")  # softmax over the chosen, times the number of experts
    assert difference(model, weighed, inputs) < 1e-5
    shared = llama.operate({"moefy_ffn": {"experts": 4, "top_k": 1, "router": "centroid", "shared": 1}}).graph
    model, details = lowered(shared, tmp_path / "shared")
    assert details["architecture"] == "Qwen2MoeForCausalLM"
    assert (model.config.num_experts, model.config.shared_expert_intermediate_size) == (3, 28)
    assert difference(model, shared, inputs) < 1e-5
    some = moefied(1, blocks="1:")
    assert [r.node for r in refused(some, architecture="mixtral")] == ["model.layers.0"]
    model, details = lowered(some, tmp_path / "some")
    assert details["architecture"] == "Qwen2MoeForCausalLM"  # which may have dense layers
    assert model.config.mlp_only_layers == [0]
    assert difference(model, some, inputs) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(("name", "becomes"), [("qwen3", "Qwen3MoeForCausalLM"), ("qwen2", "Qwen2MoeForCausalLM")])
def test_families_keep_what_their_sources_have(name: str, becomes: str, tmp_path: Path) -> None:
    graph = operated(name).operate({"moefy_ffn": {"experts": 4, "top_k": 1, "router": "centroid"}}).graph
    model, details = lowered(graph, tmp_path)  # norms of queries and keys; biases of queries, tied embeddings
    assert details["architecture"] == becomes
    assert difference(model, graph, inputs_for("llama", 3, 11)) < 1e-6


def test_what_a_checkpoint_cannot_say_is_refused_by_name(patient: Any) -> None:
    llama = patient("llama")
    factored = refused(llama.operate({"low_rank": {"ratio": 0.5, "method": "svd", "names": "*.2.*down"}}).graph)
    assert {r.node.rpartition("_")[0] for r in factored} == {"model.layers.2.mlp.down_proj.weight"}
    assert all("a part of model.layers.2.mlp.down_proj.weight" in r.reason for r in factored)
    rounded = refused(llama.operate({"quantize": {"scheme": "int8_dynamic", "names": "*.0.*gate"}}).graph)
    assert "model.layers.0.mlp.gate_proj.weight" in {r.node for r in rounded}
    smooth = {"alpha": 0.5, "names": "*.0.*"}
    multiplied = refused(llama.operate({"smooth": smooth}).graph)
    # down reads what up makes, and up can be divided; only the output of an attention's core is no weight's
    assert {r.node for r in multiplied} == {"model.layers.0.self_attn.o_proj.weight_smoothing"}
    assert all("a pass multiplies an activation by it" in r.reason and "insert: false" in r.reason for r in multiplied)
    assert refused(llama.operate({"smooth": {**smooth, "insert": False}}).graph) == []
    assert not any("insert" in r.reason for r in factored)
    plain = patient("gpt2").operate({"moefy_ffn": {"experts": 4, "top_k": 1, "router": "centroid", "blocks": 0}}).graph
    (refusal,) = refused(plain)
    assert "transformer.h.0" in refusal.node
    assert "not gated" in refusal.reason
    conv = refused(patient("gpt2").operate({"quantize": {"scheme": "int8", "blocks": 0}}).graph)
    assert all(r.node.startswith("transformer.h.0.") for r in conv)

    with pytest.raises(RecipeError, match="shard"):
        make_backend({"huggingface": {"shard": "big"}})


def test_a_number_that_the_class_makes_of_a_changed_size_is_refused() -> None:
    """Gemma multiplies embeddings by the root of its hidden size; it was compared after it had been written."""
    common: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16,
        "num_key_value_heads": 2, "intermediate_size": 96, "max_position_embeddings": 128,
    }  # fmt: skip
    torch.manual_seed(0)
    module, inputs = tf.GemmaForCausalLM(tf.GemmaConfig(**common)).eval(), inputs_for("llama")
    graph = surgeon.trace(module, inputs)
    before = Patient(graph, surgeon.discover(graph), load_data([inputs], graph))
    (refusal,) = refused(before.operate({"drop_channels": {"keep": 48, "criterion": "random"}}).graph)
    assert refusal.node == "model.embed_tokens.scalar_embed_scale"
    assert "GemmaForCausalLM makes it of its configuration: 6.9282 under hidden_size: 48" in refusal.reason
    assert "the graph computes with 8; the engines" in refusal.reason
    assert refused(before.operate({"drop_neurons": {"keep": 48, "criterion": "random", "refit": False}}).graph) == []
    assert refused(dropped(before, 1).graph) == []


def test_other_modules_are_refused() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    graph = surgeon.trace(module, {"input": torch.randn(2, 4)})
    assert [r.node for r in refused(graph)] == ["model"]


@pytest.mark.slow
def test_low_bit_weights_are_compressed_tensors(patient: Any, tmp_path: Path) -> None:
    """Exact where the library is installed; refused with the line that installs it where not."""
    mixed = patient("mixtral").operate({"quantize": {"scheme": "int4", "group": 16, "names": ["*.moe", "*.ffn.*"]}})
    graph = mixed.operate({"quantize": {"scheme": "int8", "group": 16, "names": "*.attention.[qo]"}}).graph
    if not LIBRARY:
        (refusal,) = refused(graph)
        assert "pip install 'surgeon[huggingface]'" in refusal.reason
        return
    model, details = lowered(graph, tmp_path)
    assert details["low_bit"] == 3 * 4
    groups = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["config_groups"]
    assert sorted(group["weights"]["num_bits"] for group in groups.values()) == [4, 8]
    assert difference(model, graph, inputs_for("mixtral", 3, 11)) < 1e-5
    with pytest.raises(TraceError, match="quantized already .compressed-tensors.*give the checkpoint that it was made from"):
        surgeon.trace(tmp_path)
    codes = sum(t.numel() for name, t in graph.parameters().items() if "_codes" in name)
    weights = (tmp_path / "model.safetensors").stat().st_size
    floats = sum(t.nbytes for name, t in graph.parameters().items() if "_codes" not in name and "inv_freq" not in name)
    assert codes + floats < weights < 1.35 * (codes + floats)  # names of single experts take the rest in a model this small
    zeros = patient("llama").operate({"quantize": {"scheme": "int8", "group": 16, "symmetric": False, "blocks": 0}})
    assert all("zero points" in r.reason for r in refused(zeros.graph))


@pytest.mark.slow
@pytest.mark.skipif(not LIBRARY, reason="needs compressed-tensors")
def test_a_class_that_reads_weights_as_it_is_loaded_gets_them_then(tmp_path: Path) -> None:
    """The T5 classes initialise by way of ``module.q.weight`` at every load, where packed linears have none."""
    module, folder = conditional("t5"), tmp_path / "t5"
    module.save_pretrained(folder)  # type: ignore[operator]  # of the library
    one = {"quantize": {"scheme": "int4", "group": 32}}
    compiled = surgeon.compile(str(folder), [one], backend="huggingface", output=tmp_path / "out", progress=False)
    assert compiled.report.artifact["details"]["low_bit"] == 2 * 7 + 2 * 11
    assert "encoder.block.0.layer.0.SelfAttention.q.weight itself" in str(compiled.report.artifact["details"]["notes"])
    assert all(value < 1e-4 for row in compiled.report.comparisons for value in row.relative_error.values())  # caches too
    assert any("past_key_values.0.key" in row.shapes for row in compiled.report.comparisons)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.get_tensor("decoder.block.1.layer.2.DenseReluDense.wo.weight_packed").dtype == torch.int32

    two = [{"quantize": {"scheme": scheme, "group": 32, "blocks": blocks}} for scheme, blocks in (("int4", ":3"), ("int8", 3))]
    with pytest.raises(LowerError, match=r"decoder\.block\.1.*it has 8 bits.* reads encoder.*q\.weight itself.*same scheme"):
        surgeon.compile(str(folder), two, backend="huggingface", output=tmp_path / "two", progress=False)


@pytest.mark.slow
def test_a_build_writes_tokenizer_and_settings_and_loads_again(tmp_path: Path) -> None:
    source = MODELS / "tiny-llama"
    compiled = surgeon.compile(
        str(source),
        [{"drop_blocks": {"count": 1}}],
        calibration={"text": MODELS / "calibration.txt", "samples": 4, "length": 32},
        backend={"huggingface": {"shard": "2MB"}},
        output=tmp_path / "out",
        progress=False,
    )
    out = tmp_path / "out"
    assert len(list(out.glob("model-*.safetensors"))) > 1
    assert len({path.stat().st_mode for path in out.iterdir()}) == 1  # whoever may read one may read all
    assert compiled.report.comparisons  # compared with the graph on held-back inputs
    assert all(value < 1e-6 for row in compiled.report.comparisons for value in row.relative_error.values())
    text = "def main():\n    return"
    tokens = tf.AutoTokenizer.from_pretrained(out)(text, return_tensors="pt")
    assert tokens["input_ids"].tolist() == [tf.AutoTokenizer.from_pretrained(source)(text)["input_ids"]]
    model = tf.AutoModelForCausalLM.from_pretrained(out)
    assert model.generation_config.eos_token_id == 2
    generated = model.generate(**{k: tokens[k] for k in ("input_ids", "attention_mask")}, max_new_tokens=4, do_sample=False)
    assert generated.shape[1] == tokens["input_ids"].shape[1] + 4
    again = surgeon.load(out)
    inputs = {k: tokens[k] for k in ("input_ids", "attention_mask")}
    assert torch.equal(again(**inputs)["logits"], compiled(**inputs)["logits"])
    SavedPlan.read(out / "plan.json")


@pytest.mark.slow
@pytest.mark.minilm
def test_a_call_on_caches_runs_the_model_once(tmp_path: Path) -> None:
    graph = surgeon.trace(tiny("llama")[0], task="text-generation")
    artifact: Any = HuggingFace().lower(graph, tmp_path)
    runs: list[int] = []
    artifact.model().register_forward_hook(lambda *_: runs.append(1))
    first = artifact.run(graph.example)  # finds out how the model is called
    runs.clear()
    again = artifact.run(graph.example)
    assert runs == [1]
    assert len(again) == len(graph.outputs)
    assert all(torch.equal(value, first[name]) for name, value in again.items())


def test_a_sentence_encoder_keeps_its_pooling(tmp_path: Path) -> None:
    graph = surgeon.trace(str(minilm_path()))
    artifact = HuggingFace().lower(graph, tmp_path)
    ids = torch.arange(1000, 1012).reshape(2, 6)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    with torch.no_grad():
        assert error(artifact.run(inputs)["last_hidden_state"], graph(**inputs)["last_hidden_state"]) < 1e-6
    assert (tmp_path / "1_Pooling" / "config.json").is_file()
    assert (tmp_path / "vocab.txt").is_file()


def test_a_damaged_checkpoint_does_not_load_in_part(patient: Any, tmp_path: Path) -> None:
    artifact = HuggingFace().lower(patient("llama").graph, tmp_path)
    from safetensors.torch import load_file, save_file

    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    artifact._model = None
    with pytest.raises(LowerError, match="missing_keys"):
        artifact.model()


def test_automatic_classes() -> None:
    wanted = {
        "LlamaForCausalLM": "AutoModelForCausalLM", "GPT2LMHeadModel": "AutoModelForCausalLM", "BertModel": "AutoModel",
        "T5ForConditionalGeneration": "AutoModelForSeq2SeqLM",
        "ViTForImageClassification": "AutoModelForImageClassification", "NoSuchModel": None,
    }  # fmt: skip
    assert {name: auto_class(name) for name in wanted} == wanted
