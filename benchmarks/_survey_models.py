"""The models of the survey, by library: how each is built at tiny size, on which inputs, and what its configuration says."""

from __future__ import annotations

import copy
import re
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from _survey_diffusers import DIFFUSERS
from _survey_inputs import find_inputs
from _survey_said import Part, said, with_layers, with_tables
from _survey_shrink import small
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # for what tests and benchmarks share

from tests.models import randomised  # noqa: E402
from tests.optional import timm as import_timm  # noqa: E402

RANDOM = 0.08
"""Standard deviation of the random matrices."""

LARGEST = 130_000_000
"""Parameters of the largest model that is looked at."""


class NotBuilt(Exception):
    """The rules of the survey make no model, or no inputs, of this configuration."""


@dataclass
class Built:
    """A model of the survey.

    Attributes:
        module: the model, in evaluation mode, every weight random.
        inputs: example inputs.
        parts: what its configuration says.
        shape: which of the ladder's sizes it has.
    """

    module: nn.Module
    inputs: dict[str, Tensor]
    parts: list[Part]
    shape: int = 0


# -- transformers -------------------------------------------------------------------------------------------------

_TASK = re.compile(r"MODEL_(FOR_\w+_)?MAPPING_NAMES")
_HEADS = ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "MODEL_MAPPING_NAMES")


@cache
def transformers_models() -> dict[str, str]:
    """Name of the class by type of model, one type for each of the library's model folders.

    The type is the one that the folder is named after, or its first; the class the one that predicts tokens, or the bare
    one, or else the first of any task.
    """
    from transformers.models.auto import modeling_auto as auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES, model_type_to_module_name

    tables = [getattr(auto, name) for name in _HEADS]
    tables += [value for name, value in sorted(vars(auto).items()) if _TASK.fullmatch(name) and name not in _HEADS]
    folders: dict[str, str] = {}
    found = {}
    for kind in sorted(CONFIG_MAPPING_NAMES, key=lambda kind: model_type_to_module_name(kind) != kind.replace("-", "_")):
        name = next((table[kind] for table in tables if kind in table), None)
        if name is not None and folders.setdefault(model_type_to_module_name(kind), kind) == kind:
            found[kind] = name if isinstance(name, str) else name[0]
    return found


@cache
def _tested() -> str:
    return "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py"))


def is_tested(kind: str) -> bool:
    """Whether a test names the configuration of this type of model."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return CONFIG_MAPPING_NAMES[kind] in _tested()


def is_mixture(kind: str) -> bool:
    """Whether a configuration speaks of experts."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        return any(part.experts for part in said(CONFIG_MAPPING[kind]()))
    except Exception:  # a configuration may demand more than its defaults
        return False


# What the rules of the shrinker cannot know: fields that depend on each other in one model's own way.
_FIELDS: dict[str, dict[str, Any]] = {
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 2, "state_size": 16},
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "attn_layer_indices": [1, 3]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba", "attention"]},
    "codegen": {"rotary_dim": 8},
    "gptj": {"rotary_dim": 8},
    "doge": {"is_moe": True, "num_experts": 16},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "zamba": {"num_hidden_layers": 6, "layers_block_type": ["linear_attention", "hybrid"] * 3},
    "reformer": {"is_decoder": True, "axial_pos_embds": False, "attn_layers": ["local", "lsh", "local"], "num_buckets": 4,
                 "local_attn_chunk_length": 8, "lsh_attn_chunk_length": 8},
    "xmod": {"default_language": "en_XX"},
    "chameleon": {"vocabulary_map": {"<image>": 100, "IMGIMGA": 101, "IMGIMGB": 102}},
    "cohere_compass": {"text_config": {"layer_types": ["sliding_attention", "full_attention"] * 2, "rope_parameters": {
        kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("sliding_attention", "full_attention")}}},
    "qwen4_exp": {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8,
                  "indexer_compress_ratio": 2, "ngram_vocab_size_base": 160},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "wavtokenizer": {"codebook_dim": 64},
    "mimi": {"upsample_groups": 64},
    "csm": {"codec_config": {"upsample_groups": 64}},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 16}},
    "gemma3n": {"text_config": {"num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2},
                "vision_config": {"architecture": "resnet10t"}},
    "gemma4_unified_assistant": {"text_config": {"num_kv_shared_layers": 0}},
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                                                            "mrope_section": [3, 3, 2]}}},
    "hunyuan_vl": {"text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                                                       "mrope_section": [2, 2, 2, 2]}}},
    "hy_v4_vl": {"text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}},
    "molmo2": {"adapter_config": {"vision_feature_layer": [-1, -2]}},
    "granite4_vision": {"deepstack_layer_map": [[0, 1]], "downsample_rate": "1/2"},
    "perception_lm": {"vision_config": {"architecture": "vit_tiny_patch16_224", "model_args": {"embed_dim": 192}}},
    "pe_video": {"video_config": {"vision_config": {"architecture": "vit_tiny_patch16_224"}}},
    "pe_audio_video": {"audio_video_config": {"video_config": {"vision_config": {"architecture": "vit_tiny_patch16_224"}}}},
    "edgetam": {"vision_config": {"backbone_config": {"architecture": "repvit_m1"}}},
    "seggpt": {"merge_index": 0, "intermediate_hidden_state_indices": [1, 2]},
    "qwen3_omni_moe": {"talker_config": {"spatial_merge_size": 2, "text_config": {"shared_expert_intermediate_size": 48}}},
    "vibevoice_acoustic_tokenizer": {"num_filters": 4},
    "qwen2_5_omni": {"thinker_config": {"text_config": {"rope_parameters": {
        "rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}}},
    "timm_backbone": {"backbone": "resnet18"},
    "vitmatte": {"convstream_hidden_sizes": [48, 96, 192], "fusion_hidden_sizes": [256, 128, 64, 32]},
    "step3p7": {"text_config": {"sliding_window": 8}},
    "shieldgemma2": {"yes_token_index": 10, "no_token_index": 11},
    "blip-2": {"image_token_index": 150},
    "instructblip": {"image_token_index": 150},
}


# What a model makes of its fields in its own code, where that is not what their names say.
_MADE: dict[str, dict[str, Any]] = {
    "mimo_v2_flash": {"kv": {2, 4}},  # layers with a window have twice as many heads of keys
    "recurrent_gemma": {"widths": {56}},  # intermediate_size is that of gate and up together
    "xmod": {"widths": {32, 112}},  # an adapter of half the model's width behind every network
    "kyutai_speech_to_text": {"widths": {56}},  # ffn_dim is that of gate and up together
    "align": {"vision_config": {"layers": {48}}},  # of the 55 layers the first of each of the 7 stages has no shortcut
    "efficientnet": {"layers": {48}},
    "clap": {"audio_config": {"widths": {384, 768, 1536, 3072}}},  # twice as wide from stage to stage
    **{kind: {"encoder": {"layers": {15}}} for kind in ("conditional_detr", "deformable_detr", "table-transformer")},
    "dab-detr": {"encoder": {"layers": {16}}},  # in the stream of the encoder lie 12 blocks of its backbone
    "mask2former": {"decoder": {"layers": {2}}},  # one less than the field says
    "oneformer": {"decoder": {"layers": {4}}},  # so here, and two layers on the queries in front of them
    "maskformer": {"layers": {"certain": False}, "decoder_config.encoder": {"certain": False}},  # read by nothing
    "swiftformer": {"layers": {12}},  # the last layer of each of the four stages has a second mixer, with a residual of its own
}


def build_transformers(kind: str) -> Built:
    """A small model of this type."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    _with_timm()
    cls: Any = getattr(transformers, transformers_models()[kind])
    failures = []
    for level, filled in ((0, False), (0, True), (1, True), (2, False), (2, True)):
        try:
            base = CONFIG_MAPPING[kind]
            if cls.config_class is not None and not issubclass(base, cls.config_class):
                base = cls.config_class  # that of the text model in a model of images and text
            config = base(**small(base(), level, filled, _FIELDS.get(kind)))
            module = _with_forward(_made(cls, config))
            inputs = find_inputs(module)
            parts = with_layers(with_tables(said(module.config), module), module, inputs)
            return Built(module, inputs, [_as_made(kind, part) for part in parts], level)
        except Exception as error:  # a class may raise anything on sizes that it was not made for
            failures.append(f"size {level}: {type(error).__name__}: {' '.join(str(error).split())}"[:300])
    raise NotBuilt(" || ".join(dict.fromkeys(failures)))


def _as_made(kind: str, part: Part) -> Part:
    made = _MADE.get(kind, {})
    return replace(part, **made.get(part.name, {key: value for key, value in made.items() if isinstance(value, set)}))


def _with_timm() -> None:
    """Lets transformers use timm, whose models need no torchvision."""
    from transformers import utils
    from transformers.utils import import_utils

    import_timm()
    utils.is_timm_available = import_utils.is_timm_available = lambda: True
    import_utils.BACKENDS_MAPPING["timm"] = (lambda: True, import_utils.BACKENDS_MAPPING["timm"][1])


def _with_forward(module: nn.Module) -> nn.Module:
    """The model, or where it only generates the first of its parts that is one."""
    if getattr(type(module), "forward", None) is not getattr(nn.Module, "forward", None):
        return module
    part = next((part for part in module.children() if hasattr(part, "main_input_name")), None)
    if part is None:
        raise NotBuilt(f"{type(module).__name__} has no forward")
    return _with_forward(part)


def _made(cls: Any, config: Any) -> nn.Module:
    with torch.device("meta"):
        try:
            count = sum(p.numel() for p in cls(copy.deepcopy(config)).parameters())
        except Exception:  # some compute values while they are built
            count = 0
    if count > LARGEST:
        raise NotBuilt(f"{count / 1e6:.0f} M parameters")
    torch.manual_seed(0)
    return randomised(cls(config), RANDOM)


# -- timm ---------------------------------------------------------------------------------------------------------

TIMM = (
    "vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "deit3_small_patch16_224", "swin_tiny_patch4_window7_224",
    "swinv2_tiny_window8_256", "swinv2_cr_tiny_ns_224", "convnext_atto", "convnextv2_atto", "cait_xxs24_224",
    "beit_base_patch16_224", "beitv2_base_patch16_224", "mixer_s32_224", "gmixer_24_224", "resmlp_12_224",
    "gmlp_ti16_224", "pvt_v2_b0", "twins_pcpvt_small", "twins_svt_small", "xcit_nano_12_p16_224", "maxvit_nano_rw_256",
    "coatnet_nano_rw_224", "levit_128s", "davit_tiny", "edgenext_xx_small", "efficientformer_l1", "efficientformerv2_s0",
    "eva02_tiny_patch14_224", "hiera_tiny_224", "volo_d1_224", "nest_tiny", "tnt_s_patch16_224", "pit_ti_224",
    "mvitv2_tiny", "gcvit_xxtiny", "crossvit_tiny_240", "convit_tiny", "coat_lite_tiny", "convmixer_768_32",
    "poolformer_s12", "poolformerv2_s12", "caformer_s18", "convformer_s18", "focalnet_tiny_srf", "visformer_tiny",
    "sequencer2d_s", "mobilevit_xxs", "mobilevitv2_050", "mobilenetv4_hybrid_medium", "tiny_vit_5m_224", "fastvit_t8",
    "repvit_m0_9", "efficientvit_b0", "efficientvit_m0", "nextvit_small", "inception_next_atto", "metaformer",
    "rdnet_tiny", "starnet_s1", "vitamin_small_224", "flexivit_small", "vit_base_patch16_rope_reg1_gap_256",
    "naflexvit_base_patch16_gap", "samvit_base_patch16_224", "vit_relpos_small_patch16_224", "resnet18", "regnety_002",
    "swiftformer_xs", "shvit_s1", "mambaout_femto", "hgnet_tiny", "csatv2", "test_vit",
)  # fmt: skip


def build_timm(name: str) -> Built:
    """A registered model, with two blocks in each stage where its constructor takes a depth."""
    timm = import_timm()
    if not timm.is_model(name):
        raise NotBuilt("not registered in this version")
    module = None
    for options in ({"depth": 3}, {"depths": (1, 1, 2, 1)}, {"num_classes": 10}, {}):
        try:
            module = timm.create_model(name, pretrained=False, **{"num_classes": 10, **options})
            break
        except Exception:  # a family takes other arguments
            continue
    if module is None:
        raise NotBuilt("no constructor of the ladder accepts it")
    if sum(p.numel() for p in module.parameters()) > 2 * LARGEST:
        raise NotBuilt("too large")
    size = module.default_cfg["input_size"]
    inputs = {"x": torch.randn(2, *size, generator=torch.Generator().manual_seed(0))}
    return Built(randomised(module, RANDOM), inputs, by_modules(module))


def by_modules(module: nn.Module) -> list[Part]:
    """What the modules of a model without a configuration say: its lists of blocks, and the heads and widths in them."""
    lists: dict[str, list[nn.Module]] = {}
    for path, part in module.named_modules():
        name = path.rpartition(".")[2]
        if re.fullmatch(r"\w*blocks\w*", name) and isinstance(part, nn.ModuleList | nn.Sequential):
            known = {id(m) for blocks in lists.values() for block in blocks for m in block.modules()}
            lists.setdefault(name, []).extend(block for block in _entries(part) if id(block) not in known)
    lists = lists or {"blocks": _alike(module)}
    paths = {part: path for path, part in module.named_modules()}
    return [
        Part(name, {len(blocks)}, *_sizes(blocks), modules=tuple(paths[block] for block in blocks))
        for name, blocks in lists.items()
        if blocks
    ]


def _entries(part: nn.Module) -> list[nn.Module]:
    """The members of a list, and of lists in it, that hold weights."""
    if not isinstance(part, nn.ModuleList | nn.Sequential):
        return [part] if any(True for _ in part.parameters()) else []
    return [entry for child in part.children() for entry in _entries(child)]


def _alike(module: nn.Module) -> list[nn.Module]:
    """Modules with a network and a mixer of positions in them, none inside another."""
    network, mixer = {"mlp", "ffn", "ff"}, {"attn", "attn1", "attention", "token_mixer", "mixer", "norm1", "self_attn"}
    names = {part: {name for name, _ in part.named_children()} for part in module.modules()}
    found = [part for part, own in names.items() if own & network and own & mixer]
    return [part for part in found if not any(part is not other and part in set(other.modules()) for other in found)]


def _sizes(blocks: list[nn.Module]) -> tuple[set[int], set[int], set[int]]:
    """Heads, key/value heads (not said), and widths of networks."""
    heads: set[int] = set()
    widths: set[int] = set()
    for part in (p for block in blocks for p in block.modules()):
        number = getattr(part, "num_heads", getattr(part, "heads", None))
        heads |= {number} if isinstance(number, int) else set()
        last = getattr(part, "fc2", None)
        width = getattr(last, "in_features", getattr(last, "in_channels", None))
        widths |= {width} if isinstance(width, int) else set()
    return heads, set(), widths


# -- diffusers ----------------------------------------------------------------------------------------------------


def build_diffusers(name: str) -> Built:
    """A small model of this class."""
    import diffusers

    if not hasattr(diffusers, name):
        raise NotBuilt("not in this version")
    options, inputs = DIFFUSERS[name]
    try:
        torch.manual_seed(0)
        module = randomised(getattr(diffusers, name)(**options), RANDOM)
    except Exception as error:  # a class may raise anything
        raise NotBuilt(f"{type(error).__name__}: {error}"[:300]) from error
    given = inputs()
    try:
        with torch.no_grad():
            module(**given)
    except Exception as error:
        raise NotBuilt(f"{type(error).__name__}: {error}"[:300]) from error
    return Built(module, given, by_modules(module))


BUILDERS: dict[str, Callable[[str], Built]] = {
    "transformers": build_transformers,
    "timm": build_timm,
    "diffusers": build_diffusers,
}


def names() -> list[str]:
    """Every row of the survey, ``library/name``; in an order by lot, so that a part of them stands for all."""
    found = [f"transformers/{kind}" for kind in transformers_models() if not is_tested(kind)]
    found += [*(f"timm/{name}" for name in TIMM), *(f"diffusers/{name}" for name in DIFFUSERS)]
    return sorted(found, key=lambda name: zlib.crc32(name.encode()))
