"""Tiny random causal language models by name, for generation."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests.models import randomised

VOCABULARY = 160
FAMILIES = (
    "gpt2", "qwen3", "gemma2", "gemma3", "gpt_neox", "phi3", "olmo2", "mistral", "opt", "bloom", "falcon", "gemma3n", "gemma4",
    "llama4", "mpt", "deepseek_v3", "bert",
)  # fmt: skip


def causal(name: str, layers: int = 4) -> nn.Module:
    """A model of hidden size 64 with every parameter random; windows are 6 positions where there are any."""
    import transformers as tf

    common: dict[str, Any] = {
        "hidden_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    grouped = {**common, "num_key_value_heads": 2, "head_dim": 16}
    window = {"sliding_window": 6, "tie_word_embeddings": False}
    torch.manual_seed(0)
    module: nn.Module
    match name:
        case "gpt2":
            special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
            shape = {"n_embd": 64, "n_layer": layers, "n_head": 4, "n_positions": 256, "vocab_size": VOCABULARY}
            module = tf.GPT2LMHeadModel(tf.GPT2Config(**shape, **special))
        case "qwen3":
            module = tf.Qwen3ForCausalLM(tf.Qwen3Config(**grouped))
        case "gemma2":
            module = tf.Gemma2ForCausalLM(tf.Gemma2Config(**grouped, **window, query_pre_attn_scalar=16))
        case "gemma3":
            kinds = ["sliding_attention", "full_attention"] * (layers // 2)
            config = tf.Gemma3TextConfig(**grouped, **window, layer_types=kinds, query_pre_attn_scalar=16)
            module = tf.Gemma3ForCausalLM(config)
        case "gpt_neox":
            module = tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**common))
        case "phi3":
            module = tf.Phi3ForCausalLM(tf.Phi3Config(**common, num_key_value_heads=2))
        case "olmo2":
            module = tf.Olmo2ForCausalLM(tf.Olmo2Config(**common, num_key_value_heads=2))
        case "mistral":
            module = tf.MistralForCausalLM(tf.MistralConfig(**grouped, sliding_window=6))
        case "opt":
            module = tf.OPTForCausalLM(tf.OPTConfig(**common, ffn_dim=96, word_embed_proj_dim=64))
        case "bloom":
            shape = {"hidden_size": 64, "n_layer": layers, "n_head": 4, "vocab_size": VOCABULARY, "pad_token_id": 0}
            module = tf.BloomForCausalLM(tf.BloomConfig(**shape))
        case "falcon":
            module = tf.FalconForCausalLM(tf.FalconConfig(**common, multi_query=True))
        case "gemma3n":
            kinds = ["sliding_attention", "full_attention"] * (layers // 2)
            config = tf.Gemma3nTextConfig(
                **grouped, sliding_window=6, layer_types=kinds, num_kv_shared_layers=2, vocab_size_per_layer_input=VOCABULARY,
                hidden_size_per_layer_input=16, laurel_rank=8, activation_sparsity_pattern=[0.0] * layers,
            )  # fmt: skip
            module = tf.Gemma3nForCausalLM(config)
        case "gemma4":  # the last half of the layers reads the caches of the first
            kinds = ["sliding_attention", "full_attention"] * (layers // 2)
            config = tf.Gemma4TextConfig(
                **grouped, **window, layer_types=kinds, num_kv_shared_layers=layers // 2,
                vocab_size_per_layer_input=VOCABULARY, hidden_size_per_layer_input=16,
            )  # fmt: skip
            module = tf.Gemma4ForCausalLM(config)
        case "llama4":  # attention in chunks of 6 positions
            sizes = {"num_local_experts": 4, "intermediate_size_mlp": 96, "attention_chunk_size": 6}
            module = tf.Llama4ForCausalLM(tf.Llama4TextConfig(**grouped, **sizes))
        case "mpt":
            shape = {"d_model": 64, "n_layers": layers, "n_heads": 4, "vocab_size": VOCABULARY, "max_seq_len": 256}
            module = tf.MptForCausalLM(tf.MptConfig(**shape))
        case "deepseek_v3":  # latent attention: keys and values of different sizes
            sizes = {
                "q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
                "num_key_value_heads": 4,
                "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
                "moe_intermediate_size": 32,
            }  # fmt: skip
            module = tf.DeepseekV3ForCausalLM(tf.DeepseekV3Config(**common, **sizes))
        case "bert":  # an encoder used as a decoder
            module = tf.BertLMHeadModel(tf.BertConfig(**common, is_decoder=True))
        case _:
            raise ValueError(f"unknown model {name!r}; known: {', '.join(FAMILIES)}")
    return randomised(module, 0.2)


def padded_prompts(batch: int, length: int = 9, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random prompts [batch, length] without special tokens, row i padded by 2 i tokens on the left, and their mask."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (batch, length), generator=generator)
    mask = (torch.arange(length) >= 2 * torch.arange(batch)[:, None]).long()
    return ids * mask, mask
