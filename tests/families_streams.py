"""Tiny random models of architectures that are not one stream of attention and FFN, and what their configurations say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from surgeon.discovery import discover
from surgeon.graph import Graph
from surgeon.source import load_source
from surgeon.structure import Structure
from surgeon.tracing import trace_source
from tests.optional import timm

Parts = tuple[tuple[str, tuple[Any, ...]], ...]
"""Of one block, in order: ("self" | "cross", (heads, key/value heads, head size)) and ("ffn", (width, activation))."""


@dataclass(frozen=True)
class Blocks:
    """Consecutive blocks of one stream.

    Attributes:
        kind: kind of the block.
        count: how many.
        parts: what was recognised in each.
    """

    kind: str
    count: int
    parts: Parts = ()


@dataclass
class Family:
    """A model, its inputs, and what is to be found.

    Attributes:
        inputs: None where surgeon makes them.
        dynamic: as for ``trace``; ``STATIC`` fixes all dimensions.
        streams: by label.
        layers: the source's lists of layers in the order of the blocks; empty where they do not agree with the blocks.
        ends: for each stream, the path of the list that ends in its last layer; by default as ``layers`` says.
        idle: the last layers of the streams by path, where they cannot be deleted, with what makes them identities
            (arguments of ``tests.family_passes.bypassed``).
        opaque: tensors that no rule gives a part, though they are in one.
    """

    module: nn.Module
    inputs: dict[str, Tensor] | None
    streams: dict[str, list[Blocks]]
    layers: list[nn.ModuleList] = field(default_factory=list)
    dynamic: Mapping[str, Any] | None = None
    opaque: int = 0
    ends: tuple[str, ...] = ()
    idle: tuple[tuple[str, dict[str, Any]], ...] = ()

    def last_layers(self) -> list[nn.ModuleList]:
        """Of each stream, the list that ends in its last layer."""
        if self.ends:
            return [self.module.get_submodule(path) for path in self.ends]  # type: ignore[misc]  # lists of layers
        return self.layers if len(self.layers) == len(self.streams) else self.layers[-1:]


FAMILIES: dict[str, Callable[[], Family]] = {}
V = 160
TOKENS: dict[str, Any] = {"vocab_size": V, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def family(build: Callable[[], Family]) -> Callable[[], Family]:
    FAMILIES[build.__name__] = build
    return build


def make(name: str) -> Family:
    """The family's model with every parameter random, in evaluation mode."""
    torch.manual_seed(0)
    found = FAMILIES[name]()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in found.module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() >= 2:
                parameter.copy_(noise * 0.08)
            else:
                parameter.add_(noise * 0.1)
    found.module.eval()
    return found


def tokens(rows: int = 2, length: int = 7) -> dict[str, Tensor]:
    ids = torch.randint(3, V, (rows, length), generator=torch.Generator().manual_seed(2))
    return {"input_ids": ids, "attention_mask": torch.ones(rows, length, dtype=torch.int64)}


def images(size: int = 32, rows: int = 2) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(rows, 3, size, size, generator=torch.Generator().manual_seed(2))}


def static(inputs: Mapping[str, Tensor]) -> dict[str, None]:
    return dict.fromkeys(inputs)


# -- encoder and decoder ------------------------------------------------------------------------------------------


def _t5(**more: Any) -> Family:
    import transformers as tf

    c = tf.T5Config(
        d_model=64, d_kv=16, d_ff=112, num_layers=3, num_decoder_layers=2, num_heads=4, vocab_size=V,
        decoder_start_token_id=0, **more,
    )  # fmt: skip
    module = tf.T5ForConditionalGeneration(c)
    heads = (c.num_heads, c.num_heads, c.d_kv)
    ffn = ("ffn", (c.d_ff, "gelu_tanh" if c.is_gated_act else "relu"))
    streams = {
        "encoder": [Blocks("attention+ffn", c.num_layers, (("self", heads), ffn))],
        "decoder": [Blocks("attention+attention+ffn", c.num_decoder_layers, (("self", heads), ("cross", heads), ffn))],
    }
    return Family(module, None, streams, [module.encoder.block, module.decoder.block])


@family
def t5() -> Family:
    return _t5()


@family
def t5_gated() -> Family:
    return _t5(feed_forward_proj="gated-gelu", tie_word_embeddings=False)


SEQUENCE_TO_SEQUENCE: dict[str, Any] = {
    "d_model": 64, "encoder_layers": 3, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 112, "decoder_ffn_dim": 96, "decoder_start_token_id": 2, **TOKENS,
}  # fmt: skip


def _two(c: Any, between: str) -> dict[str, list[Blocks]]:
    """Encoder and decoder of a configuration with the library's usual names; ``between`` follows each sublayer."""
    activation = {"gelu": "gelu", "relu": "relu"}[c.activation_function]
    encoder = (c.encoder_attention_heads,) * 2 + (c.d_model // c.encoder_attention_heads,)
    decoder = (c.decoder_attention_heads,) * 2 + (c.d_model // c.decoder_attention_heads,)
    after = f"+{between}" if between else ""
    kind, cross_kind = (f"{after}+".join(parts) + after for parts in (("attention", "ffn"), ("attention", "attention", "ffn")))
    return {
        "encoder": [
            Blocks(kind, c.encoder_layers, (("self", encoder), ("ffn", (c.encoder_ffn_dim, activation)))),
        ],
        "decoder": [
            Blocks(
                cross_kind,
                c.decoder_layers,
                (("self", decoder), ("cross", decoder), ("ffn", (c.decoder_ffn_dim, activation))),
            )
        ],
    }


@family
def bart() -> Family:
    import transformers as tf

    c = tf.BartConfig(**SEQUENCE_TO_SEQUENCE, max_position_embeddings=64)
    module = tf.BartForConditionalGeneration(c)
    return Family(module, None, _two(c, "norm"), [module.model.encoder.layers, module.model.decoder.layers])


@family
def pegasus() -> Family:
    import transformers as tf

    c = tf.PegasusConfig(**SEQUENCE_TO_SEQUENCE, max_position_embeddings=64)
    module = tf.PegasusForConditionalGeneration(c)
    return Family(module, None, _two(c, ""), [module.model.encoder.layers, module.model.decoder.layers])


@family
def whisper() -> Family:
    import transformers as tf

    c = tf.WhisperConfig(**SEQUENCE_TO_SEQUENCE, num_mel_bins=8, max_source_positions=16, max_target_positions=32)
    module = tf.WhisperForConditionalGeneration(c)
    return Family(module, None, _two(c, ""), [module.model.encoder.layers, module.model.decoder.layers])


@family
def bert_to_bert() -> Family:
    import transformers as tf

    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 112, "vocab_size": V}
    c = tf.EncoderDecoderConfig.from_encoder_decoder_configs(
        tf.BertConfig(**shape), tf.BertConfig(**shape, is_decoder=True, add_cross_attention=True)
    )
    module = tf.EncoderDecoderModel(c)
    heads, ffn = (4, 4, 16), ("ffn", (112, "gelu"))
    streams = {
        "encoder": [Blocks("attention+norm+ffn+norm", 2, (("self", heads), ffn))],
        "decoder": [Blocks("attention+norm+attention+norm+ffn+norm", 2, (("self", heads), ("cross", heads), ffn))],
    }
    return Family(module, None, streams, ends=("encoder.encoder.layer", "decoder.bert.encoder.layer"))


@family
def detr() -> Family:
    """A convolutional backbone, an encoder and a decoder; positions enter every attention.

    The queries of the first decoder layer attend to each other before they have seen an image: that is a constant.
    """
    import transformers as tf

    backbone = tf.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], layer_type="basic", out_features=["stage4"]
    )
    c = tf.DetrConfig(
        use_timm_backbone=False, backbone=None, use_pretrained_backbone=False, backbone_config=backbone, d_model=64,
        encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=96,
        decoder_ffn_dim=96, num_queries=6,
    )  # fmt: skip
    module = tf.DetrForObjectDetection(c)
    inputs = {**images(64), "pixel_mask": torch.ones(2, 64, 64, dtype=torch.int64)}
    heads, ffn = (4, 4, 16), ("ffn", (96, "relu"))
    layer = "attention+norm+ffn"
    streams = {
        "encoder": [Blocks("mixer", 1), Blocks(f"{layer}+norm", c.encoder_layers, (("self", heads), ffn))],
        "decoder": [
            Blocks(f"{layer}+norm", 1, (("cross", heads), ffn)),
            Blocks(f"attention+norm+{layer}+norm", c.decoder_layers - 1, (("self", heads), ("cross", heads), ffn)),
        ],
    }
    ends = ("model.encoder.layers", "model.decoder.layers")
    return Family(module, inputs, streams, dynamic=static(inputs), ends=ends)


# -- towers -------------------------------------------------------------------------------------------------------

TOWER: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 112}
VISION: dict[str, Any] = {**TOWER, "num_hidden_layers": 3, "hidden_size": 48, "image_size": 32, "patch_size": 8}
TEXT: dict[str, Any] = {**TOWER, **TOKENS, "max_position_embeddings": 64}


def _tower(c: Any, activation: str) -> list[Blocks]:
    heads = (c.num_attention_heads,) * 2 + (c.hidden_size // c.num_attention_heads,)
    parts: Parts = (("self", heads), ("ffn", (c.intermediate_size, activation)))
    return [Blocks("attention+ffn", c.num_hidden_layers, parts)]


@family
def clip() -> Family:
    import transformers as tf

    c = tf.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=32)
    module = tf.CLIPModel(c)
    streams = {"tower.0": _tower(c.vision_config, "quick_gelu"), "tower.1": _tower(c.text_config, "quick_gelu")}
    return Family(module, None, streams, [module.vision_model.encoder.layers, module.text_model.encoder.layers])


@family
def siglip() -> Family:
    """The vision tower ends in attention pooling, which is no layer."""
    import transformers as tf

    c = tf.SiglipConfig(text_config=TEXT, vision_config={**VISION, "hidden_size": 64})
    module = tf.SiglipModel(c)
    streams = {"tower.0": _tower(c.vision_config, "gelu_tanh"), "tower.1": _tower(c.text_config, "gelu_tanh")}
    layers = [module.vision_model.encoder.layers, module.text_model.encoder.layers]
    return Family(module, None, streams, layers)


@family
def flava() -> Family:
    """Two encoders whose outputs are joined and read by a third."""
    import transformers as tf

    c = tf.FlavaConfig(
        text_config={**TOWER, **TOKENS}, image_config={**VISION, "hidden_size": 64}, multimodal_config=TOWER
    )
    streams = {
        "encoder.0": _tower(c.image_config, "gelu"),
        "encoder.1": _tower(c.text_config, "gelu"),
        "decoder": _tower(c.multimodal_config, "gelu"),
    }
    ends = ("image_model.encoder.layer", "text_model.encoder.layer", "multimodal_model.encoder.layer")
    return Family(tf.FlavaModel(c), None, streams, ends=ends)


@family
def llava() -> Family:
    """Image features take the place of tokens in the text's stream."""
    import transformers as tf

    text = tf.LlamaConfig(**TEXT, num_key_value_heads=2)
    vision = tf.CLIPVisionConfig(**{**VISION, "hidden_size": 64})
    c = tf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=150, vision_feature_layer=-1)
    module = tf.LlavaForConditionalGeneration(c)
    inputs = {**tokens(length=24), **images()}
    inputs["input_ids"] = inputs["input_ids"].clamp(max=149)
    inputs["input_ids"][:, 2:18] = c.image_token_index
    streams = {
        "encoder": _tower(vision, "quick_gelu"),
        "decoder": [Blocks("attention+ffn", 2, (("self", (4, 2, 16)), ("ffn", (112, "silu"))))],
    }
    idle: Any = (("model.vision_tower.encoder.layers.2", {}), ("model.language_model.layers.1", {}))
    return Family(module, inputs, streams, dynamic=static(inputs), idle=idle)


# -- recurrences and convolutions beside attention ----------------------------------------------------------------

HYBRID: dict[str, Any] = {**TEXT, "num_key_value_heads": 2, "num_hidden_layers": 3}
SELF, SILU = ("self", (4, 2, 16)), ("ffn", (112, "silu"))


@family
def mamba() -> Family:
    import transformers as tf

    module = tf.MambaForCausalLM(tf.MambaConfig(hidden_size=64, num_hidden_layers=3, state_size=8, **TOKENS))
    inputs = tokens()
    return Family(module, inputs, {"stream": [Blocks("mixer", 3)]}, [module.backbone.layers], static(inputs))


@family
def mamba2() -> Family:
    import transformers as tf

    c = tf.Mamba2Config(
        hidden_size=64, num_hidden_layers=3, state_size=8, num_heads=8, head_dim=16, n_groups=1, chunk_size=4, **TOKENS
    )
    module = tf.Mamba2ForCausalLM(c)
    inputs = tokens()
    return Family(module, inputs, {"stream": [Blocks("mixer", 3)]}, [module.backbone.layers], static(inputs))


@family
def jamba() -> Family:
    """Attention every second layer, experts every second layer."""
    import transformers as tf

    c = tf.JambaConfig(
        **{**HYBRID, "num_hidden_layers": 4}, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2,
        expert_layer_offset=1, num_experts=4, use_mamba_kernels=False, mamba_dt_rank=4, mamba_d_state=8,
    )  # fmt: skip
    inputs = tokens()
    streams = {"stream": [Blocks("mixer+ffn", 1, (SILU,)), Blocks("attention+moe", 1, (SELF,))] * 2}
    return Family(tf.JambaForCausalLM(c), inputs, streams, dynamic=static(inputs), ends=("model.layers",))


@family
def lfm2() -> Family:
    import transformers as tf

    kinds = ["conv", "conv", "full_attention"]
    module = tf.Lfm2ForCausalLM(tf.Lfm2Config(**{**HYBRID, "block_auto_adjust_ff_dim": False}, layer_types=kinds))
    streams = {"stream": [Blocks("mixer+ffn", 2, (SILU,)), Blocks("attention+ffn", 1, (SELF, SILU))]}
    return Family(module, tokens(), streams, [module.model.layers])


@family
def rwkv() -> Family:
    """The FFN reads the position before too."""
    import transformers as tf

    c = tf.RwkvConfig(hidden_size=64, attention_hidden_size=64, num_hidden_layers=2, intermediate_size=112, **TOKENS)
    inputs = tokens(length=5)
    streams = {"stream": [Blocks("mixer+ffn", 2, (("ffn", (112, "relu2")),))]}
    return Family(tf.RwkvForCausalLM(c), inputs, streams, dynamic=static(inputs), ends=("rwkv.blocks",))


@family
def falcon_h1() -> Family:
    """Attention and a state-space mixer side by side."""
    import transformers as tf

    c = tf.FalconH1Config(
        **{**HYBRID, "num_hidden_layers": 2}, mamba_n_heads=8, mamba_d_head=16, mamba_d_ssm=128, mamba_d_state=8,
        mamba_chunk_size=4,
    )  # fmt: skip
    inputs = tokens()
    streams = {"stream": [Blocks("attention+ffn", 2, (SELF, SILU))]}
    return Family(tf.FalconH1ForCausalLM(c), inputs, streams, dynamic=static(inputs), ends=("model.layers",))


# -- images: stages of different width ----------------------------------------------------------------------------


@family
def convnext() -> Family:
    import transformers as tf

    c = tf.ConvNextConfig(hidden_sizes=[16, 24, 32], depths=[1, 3, 2], num_stages=3, num_labels=10)
    module = tf.ConvNextForImageClassification(c)
    blocks = [
        Blocks("mixer", depth, (("ffn", (4 * width, "gelu")),))
        for width, depth in zip(c.hidden_sizes, c.depths, strict=True)
    ]
    inputs = images()
    return Family(
        module, inputs, {"stream": blocks}, [stage.layers for stage in module.convnext.encoder.stages], static(inputs)
    )


@family
def swin() -> Family:
    import transformers as tf

    c = tf.SwinConfig(image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4)
    module = tf.SwinForImageClassification(c)
    blocks = [
        Blocks(
            "attention+ffn", depth, (("self", (heads, heads, 8)), ("ffn", (int(c.mlp_ratio * c.embed_dim * 2**i), "gelu")))
        )
        for i, (depth, heads) in enumerate(zip(c.depths, c.num_heads, strict=True))
    ]
    inputs = images()
    return Family(
        module, inputs, {"stream": blocks}, [stage.blocks for stage in module.swin.encoder.layers], static(inputs)
    )


def _pyramid(c: Any, kind: str, ratios: list[int]) -> list[Blocks]:
    found = []
    for width, depth, heads, ratio in zip(c.hidden_sizes, c.depths, c.num_attention_heads, ratios, strict=True):
        parts: Parts = (("self", (heads, heads, width // heads)),)
        parts += (("ffn", (ratio * width, "gelu")),) if kind.endswith("ffn") else ()
        found.append(Blocks(kind, depth, parts))
    return found


@family
def pvt() -> Family:
    import transformers as tf

    c = tf.PvtConfig(
        image_size=64, hidden_sizes=[16, 24, 32, 40], depths=[1, 2, 1, 1], num_attention_heads=[1, 2, 2, 4], num_labels=10
    )
    inputs = images(64)
    streams = {"stream": _pyramid(c, "attention+ffn", c.mlp_ratios)}
    return Family(tf.PvtForImageClassification(c), inputs, streams, dynamic=static(inputs), ends=("pvt.encoder.block.3",))


@family
def segformer() -> Family:
    """The FFN holds a convolution: it mixes positions, and is still the second half of a layer."""
    import transformers as tf

    c = tf.SegformerConfig(
        hidden_sizes=[16, 24, 32, 40], depths=[1, 2, 1, 1], num_attention_heads=[1, 2, 2, 4], decoder_hidden_size=32
    )
    inputs = images(64)
    streams = {"stream": _pyramid(c, "attention+mixer", c.mlp_ratios)}
    ends = ("segformer.stages.3.blocks",)
    return Family(tf.SegformerForSemanticSegmentation(c), inputs, streams, dynamic=static(inputs), ends=ends)


@family
def hiera() -> Family:
    """The first attention of a stage pools; its shortcut is a projection."""
    import transformers as tf

    c = tf.HieraConfig(
        image_size=[64, 64], patch_size=[7, 7], patch_stride=[4, 4], patch_padding=[3, 3], embed_dim=16,
        depths=[1, 2, 1], num_heads=[1, 2, 4], num_query_pool=2, masked_unit_size=[4, 4],
    )  # fmt: skip
    blocks = [
        Blocks("attention+ffn", depth, (("self", (heads, heads, 16)), ("ffn", (int(c.mlp_ratio * 16 * heads), "gelu"))))
        for depth, heads in zip(c.depths, c.num_heads, strict=True)
    ]
    inputs = images(64)
    ends = ("hiera.encoder.stages.2.layers",)
    return Family(tf.HieraForImageClassification(c), inputs, {"stream": blocks}, dynamic=static(inputs), ends=ends)


@family
def poolformer() -> Family:
    """Pooling mixes positions; normalisation over positions does not.  The FFN is made of convolutions of one position."""
    import transformers as tf

    c = tf.PoolFormerConfig(hidden_sizes=[16, 24, 32], depths=[1, 2, 1], num_encoder_blocks=3)
    inputs = images(64)
    streams = {
        "stream": [
            Blocks("mixer+ffn", depth, (("ffn", (int(c.mlp_ratio * width), "gelu")),))
            for width, depth in zip(c.hidden_sizes, c.depths, strict=True)
        ]
    }
    ends = ("poolformer.encoder.block.2",)
    return Family(tf.PoolFormerForImageClassification(c), inputs, streams, dynamic=static(inputs), ends=ends)


@family
def timm_vit() -> Family:
    module = timm().create_model(
        "vit_tiny_patch16_224", pretrained=False, img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=4, num_classes=10
    )
    streams = {"stream": [Blocks("attention+ffn", 2, (("self", (4, 4, 12)), ("ffn", (192, "gelu"))))]}
    return Family(module, {"x": images()["pixel_values"]}, streams, [module.blocks])


@family
def timm_convnext() -> Family:
    depths, widths = [1, 2, 2, 1], [16, 24, 32, 40]
    module = timm().create_model("convnext_tiny", pretrained=False, depths=depths, dims=widths, num_classes=10)
    inputs = {"x": images(64)["pixel_values"]}
    blocks = [Blocks("mixer", d, (("ffn", (4 * w, "gelu")),)) for d, w in zip(depths, widths, strict=True)]
    return Family(module, inputs, {"stream": blocks}, [stage.blocks for stage in module.stages], static(inputs))


# -- audio, latents, adaptive norms, shared layers ----------------------------------------------------------------


@family
def wav2vec2() -> Family:
    """A convolution over positions stands in front of the layers, with a residual of its own."""
    import transformers as tf

    c = tf.Wav2Vec2Config(
        **{**TOWER, "vocab_size": 32}, conv_dim=[16, 16, 16], conv_stride=[5, 2, 2], conv_kernel=[10, 3, 3],
        num_feat_extract_layers=3, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4, mask_time_prob=0.0,
        layerdrop=0.0,
    )  # fmt: skip
    module = tf.Wav2Vec2ForCTC(c)
    streams = {"stream": [Blocks("attention+norm+ffn+norm", 2, (("self", (4, 4, 16)), ("ffn", (112, "gelu"))))]}
    return Family(module, None, streams, [module.wav2vec2.encoder.layers])


@family
def conformer() -> Family:
    """Half an FFN, attention, a convolution, half an FFN."""
    import transformers as tf

    c = tf.Wav2Vec2BertConfig(
        **{**TOWER, "num_hidden_layers": 3, "vocab_size": 32}, feature_projection_input_dim=20,
        conv_depthwise_kernel_size=5, mask_time_prob=0.0, layerdrop=0.0,
    )  # fmt: skip
    module = tf.Wav2Vec2BertForCTC(c)
    ffn = ("ffn", (112, "silu"))
    streams = {"stream": [Blocks("ffn+attention+mixer+ffn+norm", 3, (ffn, ("self", (4, 4, 16)), ffn))]}
    return Family(module, None, streams, [module.wav2vec2_bert.encoder.layers])


@family
def spectrogram() -> Family:
    import transformers as tf

    c = tf.ASTConfig(**TOWER, max_length=32, num_mel_bins=16, patch_size=8, frequency_stride=8, time_stride=8)
    ends = ("audio_spectrogram_transformer.layers",)
    return Family(tf.ASTForAudioClassification(c), None, {"stream": _tower(c, "gelu")}, ends=ends)


@family
def perceiver() -> Family:
    """Learned latents read the input once, then attend to each other."""
    import transformers as tf

    c = tf.PerceiverConfig(
        num_latents=8, d_latents=64, d_model=32, num_blocks=1, num_self_attends_per_block=2, num_self_attention_heads=4,
        num_cross_attention_heads=4, vocab_size=V, max_position_embeddings=16,
    )  # fmt: skip
    inputs = {"inputs": tokens(length=16)["input_ids"]}
    ffn = ("ffn", (64, "gelu"))
    first, then = (("cross", (4, 4, 8)), ffn), (("self", (4, 4, 16)), ffn)
    streams = {"stream": [Blocks("attention+ffn", 1, first), Blocks("attention+ffn", 2, then)]}
    ends = ("perceiver.encoder.self_attends",)
    return Family(tf.PerceiverForMaskedLM(c), inputs, streams, dynamic=static(inputs), ends=ends)


@family
def albert() -> Family:
    """One layer, three times."""
    import transformers as tf

    c = tf.AlbertConfig(**{**TOWER, "num_hidden_layers": 3}, embedding_size=32, vocab_size=V)
    parts: Parts = (("self", (4, 4, 16)), ("ffn", (112, "gelu_tanh")))
    idle = (("encoder.albert_layer_groups.0", {"call": 2}),)
    return Family(tf.AlbertModel(c), None, {"stream": [Blocks("attention+norm+ffn+norm", 3, parts)]}, idle=idle)


@family
def dit() -> Family:
    """``x + gate f(shift + scale norm(x))`` with shift, scale and gate computed from the time step and the class."""
    from diffusers import DiTTransformer2DModel

    module = DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=12, in_channels=4, num_layers=3, sample_size=8, patch_size=2,
        num_embeds_ada_norm=10,
    )  # fmt: skip
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    inputs = {"hidden_states": noise, "timestep": torch.tensor([1, 2]), "class_labels": torch.tensor([1, 2])}
    parts: Parts = (("self", (4, 4, 12)), ("ffn", (192, "gelu_tanh")))
    return Family(module, inputs, {"stream": [Blocks("attention+ffn", 3, parts)]}, [module.transformer_blocks])


@family
def mmdit() -> Family:
    """Two streams side by side that attend to each other in every layer; the last layer ends the second one."""
    from diffusers import SD3Transformer2DModel

    module = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=3, attention_head_dim=12, num_attention_heads=4,
        joint_attention_dim=32, caption_projection_dim=48, pooled_projection_dim=16, out_channels=4, pos_embed_max_size=16,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(2)
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8, generator=generator),
        "timestep": torch.tensor([1, 2]),
        "encoder_hidden_states": torch.randn(2, 6, 32, generator=generator),
        "pooled_projections": torch.randn(2, 16, generator=generator),
    }
    parts: Parts = (("self", (4, 4, 12)), ("ffn", (192, "gelu_tanh")))
    streams = {"tower.0": [Blocks("attention+ffn", 3, parts)], "tower.1": [Blocks("attention+ffn", 2, parts)]}
    idle = (
        ("transformer_blocks.2", {"output": 1, "argument": "hidden_states"}),
        ("transformer_blocks.1", {"output": 0, "argument": "encoder_hidden_states"}),
    )
    return Family(module, inputs, streams, dynamic=static(inputs), idle=idle)


@cache
def traced(name: str) -> tuple[Family, Graph, Structure]:
    """A family, its graph and structure, each made once."""
    made = make(name)
    loaded = load_source(made.module, made.inputs)
    graph = trace_source(loaded, dynamic=made.dynamic)
    return made, graph, discover(graph)


MARKED = {"timm_vit": "timm", "timm_convnext": "timm", "dit": "diffusers", "mmdit": "diffusers"}
"""Families that need a library that may be missing."""
