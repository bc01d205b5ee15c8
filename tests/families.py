"""Tiny models of many architectures of one stream, and what their configurations say.

    python -m tests.families --write      rewrites docs/families.md

One line of ``LIBRARY`` is one family: a class of transformers, what the tiny configuration sets beside the sizes that all
share, and under which names its configuration keeps the facts that discovery has to find.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tests import handwritten

LAYERS, WIDTH, HEADS, INNER, VOCABULARY = 2, 32, 4, 64, 96

SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embedding_size", "word_embed_proj_dim"), WIDTH),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads", "attention_heads"), HEADS),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "hidden_dim"), INNER),
    **dict.fromkeys(("vocab_size", "vocab_size_or_config_json_file"), VOCABULARY),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 32),
    **dict.fromkeys(("image_size",), 16),
    "patch_size": 8,
    "sliding_window": 16,
    "type_vocab_size": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "cls_token_id": 1,
    "sep_token_id": 2,
}
"""Sizes by every name that a configuration may use for them."""

ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "swish": "silu",
}
"""Names of activations in configurations where they are not those of surgeon's table."""


@dataclass(frozen=True)
class Said:
    """What is known of a model without looking at its graph.

    Attributes:
        blocks: number of blocks.
        kind: what each block is.
        heads, kv_heads, head_dim: of each attention.
        layout: of each FFN.
        width: of each FFN.
        activation: of each FFN.
    """

    blocks: int
    kind: str
    heads: int
    kv_heads: int
    head_dim: int
    layout: str
    width: int
    activation: str | None


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        name: its name in tests and in the table.
        make: builds the model (any weights) and its inputs.
        said: what its configuration says, read from the model.
        unread: parts of the names of parameters that the model's forward does not use.
        shared: path of the one layer that all blocks are, or nothing.
    """

    name: str
    make: Callable[[], tuple[nn.Module, dict[str, Tensor]]]
    said: Callable[[nn.Module], Said]
    unread: tuple[str, ...] = ()
    shared: str = ""

    def build(self) -> tuple[nn.Module, dict[str, Tensor]]:
        """The model with random weights, norms and biases included, so that nothing is accidentally neutral."""
        torch.manual_seed(0)
        module, inputs = self.make()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in module.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise * 0.1 + (parameter.dim() < 2))
        return module.eval(), inputs


# -- the table ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """A class of transformers.

    Attributes:
        cls: its name.
        config: settings of the tiny configuration beside the sizes.
        kind: what each block is.
        layout: how gate and up are stored, or a function of the model where that changed between versions of the library.
        kv, head_dim, width, activation: where the configuration says it: the name of an attribute, or a function of the
            configuration.
        unread, shared: as in :class:`Family`.
    """

    cls: str
    config: Mapping[str, Any] = field(default_factory=dict)
    kind: str = "attention+ffn"
    layout: str | Callable[[Any], str] = "plain"
    kv: Any = "num_attention_heads"
    head_dim: Any = lambda c: c.hidden_size // c.num_attention_heads  # a default that is a function
    width: Any = "intermediate_size"
    activation: Any = "hidden_act"
    unread: tuple[str, ...] = ()
    shared: str = ""


def gated(cls: str, layout: str = "separate", **more: Any) -> Line:
    """A decoder with grouped queries and a gated FFN."""
    config = {"num_key_value_heads": 2, **more.pop("config", {})}
    return Line(cls, config, layout=layout, kv=more.pop("kv", "num_key_value_heads"), **more)


def wide(config: Any) -> int:
    """Four times the hidden size, where the configuration has no name for it."""
    return 4 * int(config.hidden_size)


AFTER = "attention+norm+ffn+norm"

LIBRARY: dict[str, Line] = {
    # -- decoders
    "llama": gated("LlamaForCausalLM"),
    "mistral": gated("MistralForCausalLM"),
    "qwen2": gated("Qwen2ForCausalLM"),
    "qwen3": gated("Qwen3ForCausalLM", config={"head_dim": 16}, head_dim="head_dim"),
    "gemma": gated("GemmaForCausalLM", config={"head_dim": 16}, head_dim="head_dim"),
    "gemma2": gated("Gemma2ForCausalLM", config={"head_dim": 16}, head_dim="head_dim", activation="hidden_activation"),
    "gemma3": gated("Gemma3ForCausalLM", config={"head_dim": 16}, head_dim="head_dim", activation="hidden_activation"),
    "phi3": gated("Phi3ForCausalLM", "concatenated"),
    "olmo": gated("OlmoForCausalLM"),
    "olmo2": gated("Olmo2ForCausalLM"),
    "cohere": gated("CohereForCausalLM", kind="parallel"),
    "cohere2": gated("Cohere2ForCausalLM", kind="parallel"),
    "stablelm": gated("StableLmForCausalLM"),
    "glm": gated("GlmForCausalLM", "concatenated", config={"head_dim": 8}, head_dim="head_dim"),
    "glm4": gated("Glm4ForCausalLM", "concatenated", config={"head_dim": 8}, head_dim="head_dim"),
    "granite": gated("GraniteForCausalLM", config={"residual_multiplier": 0.5}),
    "smollm3": gated("SmolLM3ForCausalLM"),
    "helium": gated("HeliumForCausalLM", config={"head_dim": 8}, head_dim="head_dim"),
    "exaone4": gated("Exaone4ForCausalLM"),
    "bitnet": gated("BitNetForCausalLM"),
    "nanochat": gated("NanoChatForCausalLM", "plain"),
    "starcoder2": gated("Starcoder2ForCausalLM", "plain"),
    "nemotron": gated("NemotronForCausalLM", "plain", config={"head_dim": 8}),
    "persimmon": Line("PersimmonForCausalLM"),
    "phi": Line("PhiForCausalLM", kind="parallel"),
    "gpt2": Line("GPT2LMHeadModel", width="n_inner", activation="activation_function"),
    "openai-gpt": Line("OpenAIGPTLMHeadModel", kind=AFTER, width=wide, activation=lambda c: {"gelu": "gelu_tanh"}[c.afn]),
    "gpt_neo": Line(
        "GPTNeoForCausalLM", {"attention_types": [[["global", "local"], 1]]}, activation="activation_function"
    ),
    "gpt_neox": Line("GPTNeoXForCausalLM", kind="parallel"),
    "gptj": Line("GPTJForCausalLM", {"rotary_dim": 4}, kind="parallel", width="n_inner", activation="activation_function"),
    "codegen": Line(
        "CodeGenForCausalLM", {"rotary_dim": 4}, kind="parallel", width="n_inner", activation="activation_function"
    ),
    "gpt_bigcode": Line("GPTBigCodeForCausalLM", kv=lambda c: 1, width="n_inner", activation="activation_function"),
    "bloom": Line("BloomForCausalLM", width=wide, activation=lambda c: "gelu_tanh"),
    "mpt": Line("MptForCausalLM", width=wide, activation=lambda c: "gelu"),
    "falcon": Line("FalconForCausalLM", kind="parallel", kv=lambda c: 1, width="ffn_hidden_size", activation="activation"),
    "falcon-new": Line(
        "FalconForCausalLM",
        {"new_decoder_architecture": True, "num_kv_heads": 2},
        kind="parallel",
        kv="num_kv_heads",
        width="ffn_hidden_size",
        activation="activation",
    ),
    "falcon-alibi": Line(
        "FalconForCausalLM",
        {"alibi": True, "multi_query": False, "parallel_attn": False},
        width="ffn_hidden_size",
        activation="activation",
    ),
    "opt": Line("OPTForCausalLM", width="ffn_dim", activation="activation_function"),
    "opt-after": Line(
        "OPTForCausalLM", {"do_layer_norm_before": False}, kind=AFTER, width="ffn_dim", activation="activation_function"
    ),
    "xglm": Line("XGLMForCausalLM", width="ffn_dim", activation="activation_function"),
    "biogpt": Line("BioGptForCausalLM"),
    "ctrl": Line("CTRLLMHeadModel", {"dff": INNER}, width="dff", activation=lambda c: "relu"),
    # -- encoders
    "bert": Line("BertForMaskedLM", kind=AFTER),
    "roberta": Line("RobertaForMaskedLM", kind=AFTER),
    "camembert": Line("CamembertForMaskedLM", kind=AFTER),
    "electra": Line("ElectraForMaskedLM", kind=AFTER),
    "distilbert": Line("DistilBertForMaskedLM", kind=AFTER, width="hidden_dim", activation="activation"),
    "albert": Line("AlbertForMaskedLM", kind=AFTER, shared="albert.encoder.albert_layer_groups.0"),
    "rembert": Line("RemBertForMaskedLM", {"input_embedding_size": 16, "output_embedding_size": 24}, kind=AFTER),
    "mpnet": Line("MPNetForMaskedLM", kind=AFTER),
    "deberta-v2": Line("DebertaV2ForMaskedLM", kind=AFTER),
    "deberta-v2-relative": Line(
        "DebertaV2ForMaskedLM",
        {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8, "share_att_key": True},
        kind=AFTER,
    ),
    "xlm": Line("XLMWithLMHeadModel", {"pad_index": 0}, kind=AFTER, width=wide, activation=lambda c: "gelu"),
    "modernbert": Line("ModernBertForMaskedLM", layout="concatenated", activation="hidden_activation"),
    "esm": Line("EsmForMaskedLM", {"mask_token_id": 3}, activation=lambda c: "gelu", unread=("contact_head", "position")),
    # -- images
    "vit": Line("ViTForImageClassification"),
    "deit": Line("DeiTForImageClassification"),
    "dinov2": Line("Dinov2Model", width=wide, unread=("mask_token",)),
    "dinov2-gated": Line(
        "Dinov2Model",
        {"use_swiglu_ffn": True},
        layout=lambda module: "separate" if hasattr(module.encoder.layer[0].mlp, "gate_proj") else "concatenated",
        width=lambda c: (wide(c) * 2 // 3 + 7) // 8 * 8,
        activation=lambda c: "silu",
        unread=("mask_token",),
    ),
    "beit": Line("BeitForImageClassification", {"use_relative_position_bias": True}),
    "data2vec-vision": Line("Data2VecVisionForImageClassification"),
}


def _read(config: Any, name: Any) -> Any:
    return name(config) if callable(name) else getattr(config, name)


def _said(line: Line, module: nn.Module) -> Said:
    config: Any = module.config
    activation = _read(config, line.activation)
    return Said(
        blocks=config.num_hidden_layers,
        kind=line.kind,
        heads=config.num_attention_heads,
        kv_heads=_read(config, line.kv),
        head_dim=_read(config, line.head_dim),
        layout=line.layout(module) if callable(line.layout) else line.layout,
        width=_read(config, line.width),
        activation=ACTIVATIONS.get(activation, activation),
    )


def _from_library(line: Line) -> tuple[nn.Module, dict[str, Tensor]]:
    import transformers

    cls: Any = getattr(transformers, line.cls)
    accepted = set(inspect.signature(cls.config_class.__init__).parameters)
    renamed = getattr(cls.config_class, "attribute_map", {})
    sizes = {k: v for k, v in SIZES.items() if k in accepted and (k not in renamed or renamed[k] not in accepted)}
    module: nn.Module = cls(cls.config_class(**{**sizes, **line.config}))
    generator = torch.Generator().manual_seed(2)
    if module.main_input_name == "pixel_values":
        return module, {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
    ids = torch.randint(3, VOCABULARY, (2, 7), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "token_type_ids" in inspect.signature(cls.forward).parameters and getattr(module.config, "type_vocab_size", 0):
        inputs["token_type_ids"] = torch.randint(0, 2, (2, 7), generator=generator)
    return module, inputs


# -- without a library --------------------------------------------------------------------------------------------

_IDS = {"ids": torch.arange(14).reshape(2, 7)}


def _by_hand(
    block: type[handwritten.Sublayers] = handwritten.Before,
    attention: type[nn.Module] = handwritten.Apart,
    ffn: Callable[[], nn.Module] = handwritten.Plain,
    *,
    kind: str = "attention+ffn",
    layout: str = "plain",
    activation: str | None = "gelu",
) -> tuple[Callable[[], tuple[nn.Module, dict[str, Tensor]]], Callable[[nn.Module], Said]]:
    def make() -> tuple[nn.Module, dict[str, Tensor]]:
        return handwritten.Model(block, attention, ffn), dict(_IDS)

    def said(module: nn.Module) -> Said:
        keys: Any = attention.kv_heads
        size = handwritten.SIZE
        blocks = len(module.blocks)  # type: ignore[arg-type]  # a list of modules
        return Said(blocks, kind, handwritten.HEADS, keys, size, layout, handwritten.INNER, activation)

    return make, said


def _torch_stack(before: bool) -> tuple[Any, Callable[[nn.Module], Said]]:
    kind = "attention+ffn" if before else AFTER
    said = Said(2, kind, handwritten.HEADS, handwritten.HEADS, handwritten.SIZE, "plain", handwritten.INNER, "gelu")
    return (lambda: (handwritten.Torch(before=before), dict(_IDS))), (lambda module: said)


HAND = {
    **{f"attention: {cls.__name__}": _by_hand(attention=cls) for cls in handwritten.ATTENTIONS},
    **{
        f"ffn: {cls.__name__}": _by_hand(ffn=cls, layout=layout, activation=activation)
        for cls, layout, activation in handwritten.NETWORKS
    },
    **{f"block: {cls.__name__}": _by_hand(cls, kind=kind) for cls, kind in handwritten.PLACEMENTS},
    "torch: before": _torch_stack(True),
    "torch: after": _torch_stack(False),
}

FAMILIES: dict[str, Family] = {
    **{
        name: Family(name, partial(_from_library, line), partial(_said, line), line.unread, line.shared)
        for name, line in LIBRARY.items()
    },
    **{name: Family(name, make, said) for name, (make, said) in HAND.items()},
}

if __name__ == "__main__":
    from tests.family_table import main

    main("--write" in sys.argv)
