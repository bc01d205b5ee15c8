"""Tiny models of many architectures, what their configurations say, and the table of passes on each of them.

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
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from surgeon.contract import Plan
from surgeon.data import Data, load_data
from surgeon.discovery import discover
from surgeon.errors import SurgeonError
from surgeon.graph import Graph
from surgeon.pipeline import _operate
from surgeon.progress import Progress
from surgeon.registry import make_pass
from surgeon.source import calling, flatten_outputs
from surgeon.structure import Structure
from surgeon.tracing import trace
from surgeon.verify import check_exact, check_parameters, check_structure
from tests import handwritten
from tests.models import with_layer_deleted

PAGE = Path(__file__).parents[1] / "docs" / "families.md"
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
        shared: its blocks share their weights.
        layered: its source can be built with a layer less by deleting that layer.
    """

    name: str
    make: Callable[[], tuple[nn.Module, dict[str, Tensor]]]
    said: Callable[[nn.Module], Said]
    unread: tuple[str, ...] = ()
    shared: bool = False
    layered: bool = True

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
        layout: how gate and up are stored.
        kv, head_dim, width, activation: where the configuration says it: the name of an attribute, or a function of the
            configuration.
        unread, shared, layered: as in :class:`Family`.
    """

    cls: str
    config: Mapping[str, Any] = field(default_factory=dict)
    kind: str = "attention+ffn"
    layout: str = "plain"
    kv: Any = "num_attention_heads"
    head_dim: Any = lambda c: c.hidden_size // c.num_attention_heads  # a default that is a function
    width: Any = "intermediate_size"
    activation: Any = "hidden_act"
    unread: tuple[str, ...] = ()
    shared: bool = False
    layered: bool = True


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
    "albert": Line("AlbertForMaskedLM", kind=AFTER, shared=True, layered=False),
    "rembert": Line("RemBertForMaskedLM", {"input_embedding_size": 16, "output_embedding_size": 24}, kind=AFTER),
    "mpnet": Line("MPNetForMaskedLM", kind=AFTER),
    "deberta-v2": Line("DebertaV2ForMaskedLM", kind=AFTER),
    "deberta-v2-relative": Line(
        "DebertaV2ForMaskedLM",
        {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8, "share_att_key": True},
        kind=AFTER,
    ),
    "xlm": Line(
        "XLMWithLMHeadModel", {"pad_index": 0}, kind=AFTER, width=wide, activation=lambda c: "gelu", layered=False
    ),
    "modernbert": Line("ModernBertForMaskedLM", layout="concatenated", activation="hidden_activation"),
    "esm": Line("EsmForMaskedLM", {"mask_token_id": 3}, activation=lambda c: "gelu", unread=("contact_head", "position")),
    # -- images
    "vit": Line("ViTForImageClassification"),
    "deit": Line("DeiTForImageClassification"),
    "dinov2": Line("Dinov2Model", width=wide, unread=("mask_token",)),
    "dinov2-gated": Line(
        "Dinov2Model",
        {"use_swiglu_ffn": True},
        layout="separate",
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
        layout=line.layout,
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
        name: Family(name, partial(_from_library, line), partial(_said, line), line.unread, line.shared, line.layered)
        for name, line in LIBRARY.items()
    },
    **{name: Family(name, make, said) for name, (make, said) in HAND.items()},
}


# -- passes -------------------------------------------------------------------------------------------------------


@dataclass
class Case:
    """A family, traced and looked at.

    Attributes:
        family: the family.
        module: its model.
        inputs: its inputs.
        graph: the traced graph.
        structure: what was found.
        data: one batch.
    """

    family: Family
    module: nn.Module
    inputs: dict[str, Tensor]
    graph: Graph
    structure: Structure
    data: Data

    @classmethod
    def of(cls, family: Family) -> Case:
        """Build, trace and discover."""
        module, inputs = family.build()
        graph = trace(module, inputs)
        return cls(family, module, inputs, graph, discover(graph), load_data([inputs], graph))

    def operate(self, step: dict[str, Any], plan: Plan[Any] | None = None) -> tuple[Graph, Plan[Any]]:
        """One pass on a clone, with every check that the pipeline makes."""
        made = make_pass(step)
        graph, structure, plan, _ = _operate(made, self.graph, self.structure, self.data, plan, Progress(False))
        check_structure(made, self.structure, structure)
        check_parameters(made, plan, self.graph, self.structure, graph)
        if made.exact(plan):
            with torch.no_grad():
                check_exact(made, [self.graph(**self.inputs)], [graph(**self.inputs)])
        return graph, plan


def drop_first_block(case: Case) -> str:
    """The model without its first block is the source without its first layer, bit for bit."""
    made = make_pass({"drop_blocks": {"count": 1}})
    plan = made.plan_type.model_validate({"decisions": [{"site": "blocks.0", "score": 0.0}]})
    graph, _ = case.operate({"drop_blocks": {"count": 1}}, plan)
    if not case.family.layered:
        return "lossy (layers cannot be deleted from the source one by one: nothing to compare with)"
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # a fused encoder layer of torch's rounds differently
    with torch.no_grad():
        wanted = source_outputs(source_without_first_layer(case), case.inputs)
        found = graph(**case.inputs)
        traced, whole = case.graph(**case.inputs), source_outputs(case.module, case.inputs)
    torch.backends.mha.set_fastpath_enabled(fast)
    for name, value in found.items():
        error = (value - wanted[name]).abs().max()
        rounding = (traced[name] - whole[name]).abs().max()  # 0 for most: the graph computes what the source does, bit for bit
        assert error <= 2 * rounding, f"{name}: {error}, the whole model {rounding}"
    return "exact"


def source_outputs(module: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the source model returns, without caches."""
    with calling(module):
        return flatten_outputs(module(**inputs))


def source_without_first_layer(case: Case) -> nn.Module:
    """A copy of the source model without its first layer."""
    if hasattr(case.module, "config"):
        return with_layer_deleted(case.family.name, case.module, 0)
    import copy

    module: Any = copy.deepcopy(case.module)
    layers = module.blocks if hasattr(module, "blocks") else module.stack.layers
    del layers[0]
    if hasattr(module, "stack"):
        module.stack.num_layers -= 1
    return module


def split_with_all_experts(case: Case) -> str:
    """FFNs split into experts that are all used compute what the FFNs did."""
    _, plan = case.operate({"moefy_ffn": {"experts": 4, "top_k": 4, "router": "centroid"}})
    assert len(plan.decisions) == len(case.structure.blocks)
    return "exact"


def factor_at_full_rank(case: Case) -> str:
    """Every linear of the blocks as two factors of full rank computes what it did."""
    _, plan = case.operate({"low_rank": {"ratio": 1.0, "method": "svd"}})
    assert plan.decisions
    return "exact"


def quantize_to_eight_bits(case: Case) -> str:
    """Eight bits per weight leave the outputs close to what they were."""
    graph, plan = case.operate({"quantize": {"scheme": "int8"}})
    assert plan.decisions
    with torch.no_grad():
        wanted, found = case.graph(**case.inputs), graph(**case.inputs)
    for name, value in wanted.items():
        error = float((found[name] - value).norm() / value.norm())
        assert 0 < error < 0.05, f"{name}: {error}"
    return "lossy"


PASSES: dict[str, Callable[[Case], str]] = {
    "drop_blocks": drop_first_block,
    "moefy_ffn": split_with_all_experts,
    "low_rank": factor_at_full_rank,
    "quantize": quantize_to_eight_bits,
}


def outcome(case: Case, name: str) -> str:
    """``exact``, ``lossy`` or ``refused (why)``; everything else raises."""
    try:
        return PASSES[name](case)
    except SurgeonError as error:
        if type(error).__name__ != "PlanError":
            raise
        return f"refused ({error})"


def page(rows: Mapping[str, Mapping[str, str]]) -> str:
    """The table as a page of the documentation."""
    lines = [
        "# Families",
        "",
        "Every pass on every family, at tiny size and random weights. The test suite makes this page and compares it with",
        "what is committed here; `python -m tests.families --write` rewrites it.",
        "",
        "- `drop_blocks` is *exact* where dropping block 0 equals, bit for bit, the source model with that layer deleted",
        "  (to rounding where the traced graph itself equals its source to rounding only).",
        "- `moefy_ffn` is *exact* where the FFNs split into four experts, all of them used, equal the dense FFNs to 1e-5.",
        "- `low_rank` is *exact* where all linears as two factors of full rank give the same outputs to 1e-5.",
        "- `quantize` (eight bits) is *lossy*: outputs within 5 %.",
        "",
        f"| family | blocks | {' | '.join(f'`{name}`' for name in PASSES)} |",
        f"|---|---|{'---|' * len(PASSES)}",
    ]
    for family, row in rows.items():
        lines.append(f"| {family} | {row['blocks']} | {' | '.join(row[name] for name in PASSES)} |")
    return "\n".join(lines) + "\n"


def row(case: Case) -> dict[str, str]:
    """What stands in a family's line of the table."""
    kinds = dict.fromkeys(block.kind for block in case.structure.blocks)
    found = {"blocks": f"{len(case.structure.blocks)} x {' / '.join(kinds)}"}
    return {**found, **{name: outcome(case, name) for name in PASSES}}


if __name__ == "__main__":
    table = page({name: row(Case.of(family)) for name, family in FAMILIES.items()})
    if "--write" in sys.argv:
        PAGE.write_text(table, encoding="utf-8")
    else:
        print(table, end="")
