"""Causal language models of the transformers library, called with their caches as plain tensors.

The library hands keys and values around in cache objects.  Here the model is called with flat tensors instead, so that it
exports with its caches as inputs and outputs.  Every cache keeps all its positions: where a model looks back over a
window only, its mask says so.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from surgeon.caches import MASKED_POSITIONS, PAST, POSITIONS, PRESENT, SUM, cache_names, masked_positions
from surgeon.errors import TraceError

ARGUMENTS = ("cache", "past_key_values")
"""What the library calls the argument and the output, newest first."""
_EXAMPLE_PAST = 5
_TEXT = ("input_ids", "attention_mask")
"""Inputs that every new token has."""
TOTAL = f"{PAST}{SUM}sequence"


@dataclass(frozen=True)
class CachedCall:
    """How a model is called on flat caches.

    Attributes:
        argument: name of the argument and of the output that hold the cache object.
        layers: for each layer of the cache, whether it holds a pair (layers that share another's hold none).
    """

    argument: str
    layers: tuple[bool, ...]

    def names(self, role: str) -> list[str]:
        """Names of the cache tensors of a role, in order."""
        return cache_names(role, sum(self.layers))

    def __call__(self, forward: Callable[..., Any], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run ``forward`` on inputs that hold the pasts; returns its outputs with the presents."""
        from surgeon.source import flatten_outputs

        given = dict(inputs)
        flat = iter([given.pop(name) for name in self.names(PAST)])
        pairs = [(next(flat), next(flat)) if held else (None, None) for held in self.layers]
        result = dict(forward(**given, **{self.argument: cache_of(pairs)}, use_cache=True))
        cache = result.pop(self.argument)
        outputs = flatten_outputs(result)
        return outputs | dict(zip(self.names(PRESENT), cache_tensors(cache, self.layers), strict=True))


@dataclass(frozen=True)
class CausalInputs:
    """Example inputs of a model with caches, and what they are.

    Attributes:
        inputs: the tensors.
        dims: their dynamic dimensions.
        roles: roles of inputs and outputs that have one.
        call: how the model is run on them.
    """

    inputs: dict[str, Tensor]
    dims: dict[str, dict[int, str]]
    roles: dict[str, str]
    call: Callable[[Callable[..., Any], Mapping[str, Tensor]], dict[str, Tensor]]


def causal_inputs(module: nn.Module, inputs: Mapping[str, Tensor], *, fake: bool = False) -> CausalInputs:
    """Add caches, a mask over them and positions to a model's plain inputs.

    Args:
        module: in evaluation mode.
        inputs: ``input_ids`` [batch, sequence], perhaps with ``attention_mask``.
        fake: the model has no values of its weights; which positions it takes by itself is then not found out, and they are
            an input like any other.

    Raises:
        TraceError: the model keeps no caches, or caches of another kind than keys and values.
    """
    accepted = inspect.signature(module.forward).parameters
    argument = cache_argument(module)
    if "input_ids" not in inputs:
        raise refusal(module, f"it starts from {', '.join(inputs)}, needed input_ids")
    unknown = sorted(set(inputs) - set(_TEXT))
    if unknown:
        raise refusal(module, f"it is given {', '.join(unknown)}, which nothing continues from one new token to the next")
    ids = inputs["input_ids"]
    batch, sequence = ids.shape
    prefix = earlier_tokens(ids, _EXAMPLE_PAST)
    masked = {"attention_mask": torch.ones_like(prefix)} if "attention_mask" in accepted else {}
    call, pasts = _prefill(module, argument, {"input_ids": prefix, **masked}, fake=fake)
    found = {"input_ids": ids}
    dims: dict[str, dict[int, str]] = {"input_ids": {0: "batch", 1: "sequence"}}
    roles = dict.fromkeys(call.names(PAST), PAST) | dict.fromkeys(call.names(PRESENT), PRESENT)
    if "attention_mask" in accepted:
        found["attention_mask"] = torch.ones((batch, _EXAMPLE_PAST + sequence), dtype=torch.int64, device=ids.device)
        dims["attention_mask"] = {0: "batch", 1: TOTAL}
    if "position_ids" in accepted:
        steps = torch.arange(_EXAMPLE_PAST, _EXAMPLE_PAST + sequence, device=ids.device)
        found["position_ids"] = steps.expand(batch, -1).contiguous()
        dims["position_ids"] = {0: "batch", 1: "sequence"}
        roles["position_ids"] = "" if fake else _own_positions(module, ids)
    for name, tensor in zip(call.names(PAST), pasts, strict=True):
        found[name] = tensor
        dims[name] = {0: "batch", 2: PAST}
    return CausalInputs(found, dims, roles, call)


def of_text(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of inputs that were made up for a model, those that a generated token has too; all where it starts from no tokens."""
    return {name: tensor for name, tensor in inputs.items() if name in _TEXT or "input_ids" not in inputs}


def cached_call(module: nn.Module, ids: Tensor) -> CachedCall:
    """How a module is called on flat caches, found by running it on a few tokens.

    Args:
        module: in evaluation mode.
        ids: [batch, length] int64.

    Raises:
        TraceError: the model keeps no caches, or caches of another kind than keys and values.
    """
    accepted = inspect.signature(module.forward).parameters
    argument = cache_argument(module)
    masked = {"attention_mask": torch.ones_like(ids)} if "attention_mask" in accepted else {}
    return _prefill(module, argument, {"input_ids": ids, **masked})[0]


def cache_argument(module: nn.Module) -> str:
    """Name of the argument that takes a module's cache.

    Raises:
        TraceError: its forward takes none.
    """
    accepted = inspect.signature(module.forward).parameters
    argument = next((name for name in ARGUMENTS if name in accepted), None)
    if argument is None:
        raise refusal(module, f"its forward takes no {' or '.join(ARGUMENTS)}")
    return argument


def earlier_tokens(ids: Tensor, length: int) -> Tensor:
    """Tokens [batch, length] for an example's past: its own [batch, any], repeated, of the rows in reverse."""
    return ids.repeat(1, -(-length // ids.shape[1]))[:, :length].flip(0)


def cache_of(pairs: list[tuple[Tensor, Tensor]] | list[Any]) -> Any:
    """A cache whose layers keep every position."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    cache = DynamicCache()
    for keys, values in pairs:
        layer: Any = DynamicLayer()  # type: ignore[no-untyped-call]  # of the library
        if keys is not None:
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
        cache.layers.append(layer)
    return cache


def cache_tensors(cache: Any, layers: tuple[bool, ...]) -> list[Tensor]:
    """Keys and values of the layers that hold them, in order."""
    kept = [layer for layer, held in zip(cache.layers, layers, strict=False) if held]
    return [tensor for layer in kept for tensor in (layer.keys, layer.values)]


@torch.no_grad()
def empty_run(module: nn.Module, argument: str, inputs: Mapping[str, Tensor], *, fake: bool = False) -> Any:
    """The cache that a model returns when it is run once on an empty one.

    Args:
        module: in evaluation mode.
        argument: name of the argument and of the output that hold the cache.
        inputs: further inputs.
        fake: the model has fake weights; the cache then holds zeros.

    Raises:
        TraceError: the model fails, returns no cache, or one that holds something else than keys and values.
    """
    from transformers import EncoderDecoderCache
    from transformers.cache_utils import DynamicLayer

    refuse_states(module)
    several = bool(getattr(getattr(module, "config", None), "is_encoder_decoder", False))
    empty: Any = EncoderDecoderCache(cache_of([]), cache_of([])) if several else cache_of([])
    try:
        result = module(**inputs, use_cache=True, **{argument: empty})
    except Exception as error:  # a model may raise anything
        raise refusal(module, f"with a cache it fails: {type(error).__name__}: {str(error).strip()}") from error
    cache = result.get(argument) if isinstance(result, Mapping) else None
    parts = [cache.self_attention_cache, cache.cross_attention_cache] if isinstance(cache, EncoderDecoderCache) else [cache]
    layers = [layer for part in parts for layer in getattr(part, "layers", None) or ()]
    if not layers:
        raise refusal(module, f"it returns no {argument}")
    other = sorted({type(layer).__name__ for layer in layers if type(layer) is not DynamicLayer})
    if other:
        raise refusal(module, f"its cache holds {', '.join(other)}; only keys and values of attention are handled")
    for layer in layers if fake else ():
        if layer.is_initialized:
            halves = (torch.zeros(tuple(half.shape), dtype=half.dtype) for half in (layer.keys, layer.values))
            layer.keys, layer.values = halves
    return cache


def refuse_states(module: nn.Module) -> None:
    """Refuse a model some of whose layers keep something else than keys and values, as the library's own cache for it says.

    The state of a recurrence or convolution is overwritten by every token, and most of these models read a prompt by other
    code than the tokens behind it, so that no one graph does both.

    Raises:
        TraceError: which layers keep what.
    """
    from transformers import DynamicCache, cache_utils

    plain: list[Any] = [cache_utils.DynamicLayer, cache_utils.DynamicSlidingWindowLayer]
    plain += [cache_utils.DummyLayer] if hasattr(cache_utils, "DummyLayer") else []  # newer than the oldest version supported
    config: Any = getattr(module, "config", None)
    try:
        layers = DynamicCache(config=config).layers
    except Exception:  # a configuration may say nothing of its layers; what the model returns is looked at in any case
        return
    other: dict[tuple[str, bool], list[int]] = {}
    for number, layer in enumerate(layers):
        if type(layer) not in plain:
            kind = (type(layer).__name__, isinstance(layer, cache_utils.LinearAttentionCacheLayerMixin))
            other.setdefault(kind, []).append(number)
    if other:
        kept = "; ".join(
            f"{'layer' if len(which) == 1 else 'layers'} {', '.join(map(str, which))}: "
            f"{'a state that every token overwrites' if state else 'more than keys and values'} ({name})"
            for (name, state), which in other.items()
        )
        raise refusal(module, f"not only keys and values of attention are kept from token to token: {kept}")


def _prefill(
    module: nn.Module, argument: str, inputs: Mapping[str, Tensor], *, fake: bool = False
) -> tuple[CachedCall, list[Tensor]]:
    """Run the model once on an empty cache, to see what it keeps."""
    cache = empty_run(module, argument, inputs, fake=fake)
    held = tuple(bool(layer.is_initialized) for layer in cache.layers)
    tensors = [tensor.detach().contiguous() for tensor in cache_tensors(cache, held)]
    rows, length = inputs["input_ids"].shape
    odd = [list(t.shape) for t in tensors if t.dim() != 4 or t.shape[0] != rows or t.shape[2] != length]
    if odd or not tensors:
        needed = f"[batch, heads, positions, size] of {rows} rows and {length} positions"
        raise refusal(module, f"its caches have shapes {odd}, needed {needed}")
    return CachedCall(argument, held), tensors


@torch.no_grad()
def _own_positions(module: nn.Module, ids: Tensor) -> str:
    """The positions that a model takes where it is given none, found by comparing on a batch that is padded on the left."""
    mask = torch.ones_like(ids)
    mask[0, : ids.shape[1] // 2] = 0
    steps = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    if "attention_mask" not in inspect.signature(module.forward).parameters:
        del given["attention_mask"]
    wanted = module(**given)["logits"][mask.bool()]
    for role, positions in ((POSITIONS, steps), (MASKED_POSITIONS, masked_positions(mask))):
        found = module(**given, position_ids=positions)["logits"][mask.bool()]
        if torch.allclose(found, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max())):
            return role
    raise refusal(module, "the positions it takes by itself are neither consecutive nor those of its attention mask")


def refusal(module: nn.Module, reason: str) -> TraceError:
    """The error of a model that generates no text."""
    return TraceError(
        "task 'text-generation' needs a causal language model or an encoder-decoder that keeps keys and values; "
        f"{type(module).__name__}: {reason}. Trace it with task 'forward'"
    )
