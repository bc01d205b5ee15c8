"""Encoder-decoders of the transformers library, called with their caches as plain tensors.

The decoder keeps the keys and values of its own tokens, which grow, and those of its cross-attention, which follow from the
encoder alone.  The model is called on the encoder's inputs, new tokens of the decoder and the former; it hands out both.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from surgeon.caches import CROSS, DECODER_TOKENS, PAST, PRESENT, cache_names
from surgeon.causal import CausalInputs, cache_argument, cache_of, cache_tensors, earlier_tokens, empty_run, refusal
from surgeon.example_inputs import default_dims

_EXAMPLE_PAST = 3


@dataclass(frozen=True)
class ConditionalCall:
    """How an encoder-decoder is called on flat caches.

    Attributes:
        argument: name of the argument and of the output that hold the cache object.
        own: for each layer of the decoder, whether it holds a pair over its own tokens.
        cross: the same over the encoder's positions.
    """

    argument: str
    own: tuple[bool, ...]
    cross: tuple[bool, ...]

    def names(self, role: str) -> list[str]:
        """Names of the cache tensors of a role, in order."""
        return cache_names(role, sum(self.cross if role == CROSS else self.own))

    def __call__(self, forward: Callable[..., Any], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run ``forward`` on inputs that hold the pasts; returns its outputs with the presents and the cross-attention's."""
        from transformers import EncoderDecoderCache

        from surgeon.source import flatten_outputs

        given = dict(inputs)
        flat = iter([given.pop(name) for name in self.names(PAST)])
        own = cache_of([(next(flat), next(flat)) if held else (None, None) for held in self.own])
        cross = cache_of([(None, None)] * len(self.cross))
        for layer in cross.layers:
            layer.update = _keeping(layer)
        cache: Any = EncoderDecoderCache(own, cross)
        result = dict(forward(**given, **{self.argument: cache}, use_cache=True))
        cache = result.pop(self.argument)
        outputs = flatten_outputs(result)
        outputs |= dict(zip(self.names(PRESENT), cache_tensors(cache.self_attention_cache, self.own), strict=True))
        return outputs | dict(zip(self.names(CROSS), cache_tensors(cache.cross_attention_cache, self.cross), strict=True))


def _keeping(layer: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    """An update that keeps keys and values as they come, where the library appends them to nothing."""

    def update(keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        layer.keys, layer.values, layer.is_initialized = keys, values, True
        return keys, values

    return update


def is_conditional(module: nn.Module) -> bool:
    """Whether a module is an encoder-decoder of the library that decodes token by token."""
    config = getattr(module, "config", None)
    return bool(getattr(config, "is_encoder_decoder", False)) and DECODER_TOKENS in inspect.signature(module.forward).parameters


@torch.no_grad()
def conditional_inputs(module: nn.Module, inputs: Mapping[str, Tensor], *, fake: bool = False) -> CausalInputs:
    """Add the decoder's caches to a model's plain inputs.

    Args:
        module: in evaluation mode.
        inputs: of the encoder, and ``decoder_input_ids`` [batch, target].
        fake: the model has no values of its weights.

    Raises:
        TraceError: the model keeps no caches, or caches of another kind than keys and values.
    """
    argument = cache_argument(module)
    if DECODER_TOKENS not in inputs:
        raise refusal(module, f"it is given {', '.join(inputs)}, needed {DECODER_TOKENS} too")
    unknown = sorted(name for name in inputs if name.startswith("decoder_") and name != DECODER_TOKENS)
    if unknown:
        raise refusal(module, f"it is given {', '.join(unknown)}, which nothing continues from one new token to the next")
    ids = inputs[DECODER_TOKENS]
    batch = ids.shape[0]
    cache = empty_run(module, argument, {**inputs, DECODER_TOKENS: earlier_tokens(ids, _EXAMPLE_PAST)}, fake=fake)
    own, cross = getattr(cache, "self_attention_cache", None), getattr(cache, "cross_attention_cache", None)
    if own is None or cross is None:
        raise refusal(module, f"its cache is a {type(cache).__name__} without one for cross-attention")
    call = ConditionalCall(
        argument, *(tuple(bool(layer.is_initialized) for layer in each.layers) for each in (own, cross))
    )
    pasts = cache_tensors(own, call.own)
    shapes = [list(t.shape) for t in pasts if t.dim() != 4 or t.shape[0] != batch or t.shape[2] != _EXAMPLE_PAST]
    shapes += [list(t.shape) for t in cache_tensors(cross, call.cross) if t.dim() != 4 or t.shape[0] != batch]
    if shapes or not pasts or not any(call.cross):
        raise refusal(module, f"its caches have shapes {shapes}, needed [batch, heads, positions, size] of both attentions")
    found = {name: tensor for name, tensor in inputs.items() if name != DECODER_TOKENS} | {DECODER_TOKENS: ids}
    dims = {name: default_dims(name, tensor) for name, tensor in found.items()}
    roles = {name: role for role in (PAST, PRESENT, CROSS) for name in call.names(role)}
    for name, tensor in zip(call.names(PAST), pasts, strict=True):
        found[name] = tensor.detach().contiguous()
        dims[name] = {0: "batch", 2: PAST}
    return CausalInputs(found, dims, roles, call)
