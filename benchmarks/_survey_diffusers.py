"""Transformers of diffusers that the survey looks at: small configurations, and inputs for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _tensors(**shapes: tuple[int, ...]) -> Callable[[], dict[str, Tensor]]:
    def make() -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        found = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        return {k: torch.tensor([7, 400]) if k == "timestep" else v for k, v in found.items()}

    return make


_SMALL: dict[str, Any] = {"num_attention_heads": 4, "attention_head_dim": 16, "num_layers": 3}
DIFFUSERS: dict[str, tuple[dict[str, Any], Callable[[], dict[str, Tensor]]]] = {
    "DiTTransformer2DModel": (
        {**_SMALL, "in_channels": 4, "out_channels": 4, "sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": 10},
        lambda: {**_tensors(hidden_states=(2, 4, 8, 8), timestep=(2,))(), "class_labels": torch.tensor([1, 2])},
    ),
    "PixArtTransformer2DModel": (
        {**_SMALL, "in_channels": 4, "out_channels": 8, "sample_size": 8, "cross_attention_dim": 64, "caption_channels": 32,
         "use_additional_conditions": False},
        _tensors(hidden_states=(2, 4, 8, 8), encoder_hidden_states=(2, 5, 32), timestep=(2,)),
    ),
    "SanaTransformer2DModel": (
        {**_SMALL, "in_channels": 4, "out_channels": 4, "sample_size": 8, "cross_attention_dim": 64, "caption_channels": 32,
         "num_cross_attention_heads": 4, "cross_attention_head_dim": 16},
        _tensors(hidden_states=(2, 4, 8, 8), encoder_hidden_states=(2, 5, 32), timestep=(2,)),
    ),
    "SD3Transformer2DModel": (
        {**_SMALL, "sample_size": 8, "in_channels": 4, "out_channels": 4, "joint_attention_dim": 32,
         "caption_projection_dim": 64, "pooled_projection_dim": 32, "pos_embed_max_size": 8},
        _tensors(hidden_states=(2, 4, 8, 8), encoder_hidden_states=(2, 5, 32), pooled_projections=(2, 32), timestep=(2,)),
    ),
    "FluxTransformer2DModel": (
        {**_SMALL, "num_layers": 2, "num_single_layers": 3, "in_channels": 16, "joint_attention_dim": 32,
         "pooled_projection_dim": 32, "axes_dims_rope": (4, 6, 6)},
        lambda: {**_tensors(hidden_states=(2, 16, 16), encoder_hidden_states=(2, 5, 32), pooled_projections=(2, 32))(),
                 "timestep": torch.tensor([0.1, 0.7]), "img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(5, 3)},
    ),
    "HunyuanDiT2DModel": (
        {**_SMALL, "num_layers": 4, "in_channels": 4, "sample_size": 8, "hidden_size": 64, "patch_size": 2,
         "cross_attention_dim": 32, "cross_attention_dim_t5": 32, "pooled_projection_dim": 16, "text_len": 5, "text_len_t5": 5,
         "activation_fn": "gelu-approximate", "use_style_cond_and_image_meta_size": False},
        lambda: {**_tensors(hidden_states=(2, 4, 8, 8), encoder_hidden_states=(2, 5, 32), text_embedding_mask=(2, 5),
                            encoder_hidden_states_t5=(2, 5, 32), text_embedding_mask_t5=(2, 5),
                            image_rotary_emb=(2, 16, 16))(), "timestep": torch.tensor([7.0, 400.0])},
    ),
    "LTXVideoTransformer3DModel": (
        {**_SMALL, "in_channels": 8, "out_channels": 8, "cross_attention_dim": 64, "caption_channels": 32},
        lambda: {**_tensors(hidden_states=(2, 16, 8), encoder_hidden_states=(2, 5, 32), timestep=(2,),
                            video_coords=(2, 3, 16))(), "encoder_attention_mask": torch.ones(2, 5)},
    ),
    "AuraFlowTransformer2DModel": (
        {"sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_mmdit_layers": 2,
         "num_single_dit_layers": 3, "attention_head_dim": 16, "num_attention_heads": 4, "joint_attention_dim": 32,
         "caption_projection_dim": 64, "pos_embed_max_size": 16},
        lambda: {**_tensors(hidden_states=(2, 4, 8, 8), encoder_hidden_states=(2, 5, 32))(),
                 "timestep": torch.tensor([0.1, 0.7])},
    ),
    "CogVideoXTransformer3DModel": (
        {**_SMALL, "in_channels": 4, "out_channels": 4, "time_embed_dim": 8, "text_embed_dim": 32, "sample_width": 8,
         "sample_height": 8, "sample_frames": 9, "max_text_seq_length": 5},
        _tensors(hidden_states=(2, 3, 4, 8, 8), encoder_hidden_states=(2, 5, 32), timestep=(2,)),
    ),
    "WanTransformer3DModel": (
        {**_SMALL, "in_channels": 4, "out_channels": 4, "text_dim": 32, "freq_dim": 16, "ffn_dim": 112,
         "rope_max_seq_len": 32},
        _tensors(hidden_states=(2, 4, 2, 8, 8), encoder_hidden_states=(2, 5, 32), timestep=(2,)),
    ),
    "LatteTransformer3DModel": (
        {**_SMALL, "in_channels": 4, "out_channels": 8, "sample_size": 8, "patch_size": 2, "cross_attention_dim": 64,
         "caption_channels": 32, "video_length": 2},
        _tensors(hidden_states=(2, 4, 2, 8, 8), encoder_hidden_states=(2, 5, 32), timestep=(2,)),
    ),
    "Lumina2Transformer2DModel": (
        {"sample_size": 8, "patch_size": 2, "in_channels": 4, "hidden_size": 64, "num_layers": 3, "num_refiner_layers": 1,
         "num_attention_heads": 4, "num_kv_heads": 2, "axes_dim_rope": (4, 6, 6), "axes_lens": (32, 32, 32),
         "cap_feat_dim": 32},
        lambda: {**_tensors(hidden_states=(2, 4, 8, 8), encoder_hidden_states=(2, 5, 32), timestep=(2,))(),
                 "encoder_attention_mask": torch.ones(2, 5, dtype=torch.bool)},
    ),
    "MochiTransformer3DModel": (
        {**_SMALL, "patch_size": 2, "pooled_projection_dim": 16, "in_channels": 4, "text_embed_dim": 32,
         "time_embed_dim": 16, "max_sequence_length": 5},
        lambda: {**_tensors(hidden_states=(2, 4, 2, 8, 8), encoder_hidden_states=(2, 5, 32), timestep=(2,))(),
                 "encoder_attention_mask": torch.ones(2, 5, dtype=torch.bool)},
    ),
    "AllegroTransformer3DModel": (
        {**_SMALL, "attention_head_dim": 24, "in_channels": 4, "out_channels": 4, "sample_width": 8, "sample_height": 8,
         "sample_frames": 2, "cross_attention_dim": 96, "caption_channels": 32},
        _tensors(hidden_states=(2, 4, 2, 8, 8), encoder_hidden_states=(2, 5, 32), timestep=(2,)),
    ),
    "PriorTransformer": (
        {**_SMALL, "embedding_dim": 32, "num_embeddings": 5, "additional_embeddings": 4},
        _tensors(hidden_states=(2, 32), timestep=(2,), proj_embedding=(2, 32), encoder_hidden_states=(2, 5, 32)),
    ),
    "UNet2DConditionModel": (
        {"block_out_channels": (32, 64), "layers_per_block": 1, "sample_size": 16, "cross_attention_dim": 32,
         "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
         "attention_head_dim": 4, "norm_num_groups": 8},
        _tensors(sample=(2, 4, 16, 16), timestep=(2,), encoder_hidden_states=(2, 5, 32)),
    ),
}  # fmt: skip
