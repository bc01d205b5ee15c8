"""Tiny random encoder-decoders by name, for generation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.causal import VOCABULARY
from tests.models import randomised

FAMILIES = ("t5", "bart", "whisper")


def conditional(name: str, layers: int = 2, vocabulary: int = VOCABULARY) -> nn.Module:
    """A model of hidden size 64 with every parameter random, as many layers in its encoder as in its decoder."""
    import transformers as tf

    shape: dict[str, Any] = {"vocab_size": vocabulary, "d_model": 64}
    both: dict[str, Any] = {
        f"{half}_{what}": size
        for half in ("encoder", "decoder")
        for what, size in (("layers", layers), ("attention_heads", 4), ("ffn_dim", 96))
    }
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 3}
    torch.manual_seed(0)
    module: nn.Module
    match name:
        case "t5":
            sizes = {"d_kv": 16, "d_ff": 96, "num_layers": layers, "num_heads": 4, "feed_forward_proj": "gated-gelu"}
            module = tf.T5ForConditionalGeneration(tf.T5Config(**shape, **sizes, decoder_start_token_id=0))
        case "bart":
            module = tf.BartForConditionalGeneration(tf.BartConfig(**shape, **both, max_position_embeddings=128))
        case "whisper":
            sizes = {"max_source_positions": 16, "max_target_positions": 64, "num_mel_bins": 20}
            module = tf.WhisperForConditionalGeneration(tf.WhisperConfig(**shape, **both, **sizes, **special))
        case _:
            raise ValueError(f"unknown model {name!r}; known: {', '.join(FAMILIES)}")
    return randomised(module, 0.2)


def encoder_inputs(name: str, batch: int, seed: int = 3) -> dict[str, Tensor]:
    """Random inputs of the encoder; of text, row i is padded by 3 i tokens on the right."""
    generator = torch.Generator().manual_seed(seed)
    if name == "whisper":
        return {"input_features": torch.randn(batch, 20, 32, generator=generator)}
    ids = torch.randint(3, VOCABULARY, (batch, 11), generator=generator)
    mask = (torch.arange(11) < 11 - 3 * torch.arange(batch)[:, None]).long()
    return {"input_ids": torch.where(mask.bool(), ids, 1 if name == "bart" else 0), "attention_mask": mask}
