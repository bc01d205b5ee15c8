"""Example inputs for a model of transformers: those that surgeon makes, the model's own, or by the names of its arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from surgeon.errors import TraceError
from surgeon.example_inputs import default_inputs
from surgeon.example_layouts import BATCH, SEQUENCE, TARGET
from surgeon.source import calling

Inputs = dict[str, Tensor]


def find_inputs(module: nn.Module) -> Inputs:
    """The first example inputs that the model runs on.

    Raises:
        TraceError: it runs on none; says what each failed with.
    """
    failures = []
    for make in (default_inputs, _own, _by_names, _by_names_without_optional):
        try:
            with torch.no_grad(), calling(module):
                inputs = make(module)
                module(**inputs)
                return _with_states(module, inputs)
        except Exception as error:  # a model may raise anything
            text = (str(error).splitlines() or [""])[0]
            failures.append(f"{type(error).__name__}: {text}"[:160])
    raise TraceError(" | ".join(dict.fromkeys(failures)))


def _with_states(module: nn.Module, inputs: Inputs) -> Inputs:
    """The inputs, and the states without which layers of cross-attention lie idle, or noise that would be drawn anew."""
    config: Any = getattr(module, "config", None)
    parts = (_get(config, "image_size", default=64) // _get(config, "patch_size", default=16)) ** 2
    made = {"cross_attention_states": lambda: _hidden(config), "noise": lambda: _noise(BATCH, parts)}
    accepted = inspect.signature(module.forward).parameters
    more = {**inputs, **{name: make() for name, make in made.items() if name in accepted}}
    if len(more) == len(inputs):
        return inputs
    try:
        with torch.no_grad():
            module(**more)
    except Exception:  # a model may raise anything
        return inputs
    return more


def _own(module: nn.Module) -> Inputs:
    accepted = inspect.signature(module.forward).parameters
    own: Any = getattr(module, "dummy_inputs", None) or {}
    found = {name: value for name, value in own.items() if name in accepted and isinstance(value, Tensor)}
    if not found:
        raise TraceError("no dummy inputs")
    return {name: value[:, :SEQUENCE] % 120 if not value.is_floating_point() else value for name, value in found.items()}


def _by_names(module: nn.Module) -> Inputs:
    return _named(module, optional=True)


def _by_names_without_optional(module: nn.Module) -> Inputs:
    return _named(module, optional=False)


def _named(module: nn.Module, optional: bool) -> Inputs:
    config: Any = getattr(module, "config", None)
    found = {}
    main = getattr(module, "main_input_name", None)
    for name, parameter in inspect.signature(module.forward).parameters.items():
        needed = parameter.default is inspect.Parameter.empty and parameter.kind is not inspect.Parameter.VAR_KEYWORD
        wanted = needed or name == main or (optional and name in _WELCOME)
        if not wanted:
            continue
        if name not in _MAKERS:
            raise TraceError(f"no rule for the argument {name}")
        found[name] = _MAKERS[name](config)
    return found


def _get(config: Any, *names: str, default: int) -> int:
    """The first of these fields, of the configuration or of a part of it."""
    for part in _configs(config):
        for name in names:
            value = getattr(part, name, None)
            if isinstance(value, list | tuple) and value and isinstance(value[0], int):
                return int(value[0])
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    return default


def _configs(config: Any) -> Iterator[Any]:
    yield config
    for value in list(vars(config).values()) if config is not None else []:
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            yield from _configs(value)


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _ids(config: Any, length: int = SEQUENCE) -> Tensor:
    high = min(_get(config, "vocab_size", default=100), 110)
    return torch.randint(0, high, (BATCH, length), generator=torch.Generator().manual_seed(0))


def _image(config: Any) -> Tensor:
    size = _get(config, "image_size", default=64)
    return _noise(BATCH, _get(config, "num_channels", "in_channels", default=3), size, size)


def _video(config: Any) -> Tensor:
    image = _image(config)
    return _noise(BATCH, _get(config, "num_frames", "frames_per_clip", default=4), *image.shape[1:])


def _hidden(config: Any) -> Tensor:
    return _noise(BATCH, SEQUENCE, _get(config, "hidden_size", "d_model", default=64))


def _past(config: Any) -> int:
    lags = getattr(config, "lags_sequence", None) or [0]
    return _get(config, "context_length", default=32) + max(lags)


def _features(count: str) -> Callable[[Any], Tensor]:
    return lambda config: _noise(BATCH, _past(config), _get(config, count, default=0))


def _ones(length: int = SEQUENCE) -> Callable[[Any], Tensor]:
    return lambda config: torch.ones(BATCH, length, dtype=torch.int64)


def _boxes(config: Any) -> Tensor:
    corner = torch.randint(0, 40, (BATCH, SEQUENCE, 2), generator=torch.Generator().manual_seed(0))
    return torch.cat([corner, corner + 9], dim=-1)


def _series(config: Any) -> Tensor:
    channels = _get(config, "num_input_channels", default=0)
    return _noise(BATCH, _past(config), *([channels] if channels else []))


_MAKERS: dict[str, Callable[[Any], Tensor]] = {
    "input_ids": _ids,
    "attention_mask": _ones(),
    "decoder_input_ids": lambda config: _ids(config, TARGET),
    "pixel_values": _image,
    "pixel_values_videos": _video,
    "pixel_values_images": _image,
    "input_features": lambda config: _noise(BATCH, 32, _get(config, "num_mel_bins", "input_dim", "feature_size", default=80)),
    "input_values": lambda config: _noise(BATCH, 1, 6400),
    "audio_values": lambda config: _noise(BATCH, 1, 6400),
    "bbox": _boxes,
    "inputs": lambda config: _ids(config, _get(config, "max_position_embeddings", default=64)),
    "inputs_embeds": _hidden,
    "hidden_states": _hidden,
    "encoder_hidden_states": _hidden,
    "past_values": _series,
    "past_time_features": _features("num_time_features"),
    "past_observed_mask": lambda config: torch.ones(BATCH, _past(config)),
    "static_categorical_features": lambda config: torch.zeros(BATCH, 1, dtype=torch.int64),
    "states": lambda config: _noise(BATCH, SEQUENCE, _get(config, "state_dim", default=17)),
    "actions": lambda config: _noise(BATCH, SEQUENCE, _get(config, "act_dim", default=4)),
    "rewards": lambda config: _noise(BATCH, SEQUENCE, 1),
    "returns_to_go": lambda config: _noise(BATCH, SEQUENCE, 1),
    "timesteps": lambda config: torch.arange(SEQUENCE).expand(BATCH, SEQUENCE).clone(),
    "task_inputs": lambda config: _ids(config, _get(config, "task_seq_len", default=77)),
    "past_values_padding": lambda config: torch.zeros(BATCH, _past(config)),
    "freq": lambda config: torch.zeros(BATCH, 1, dtype=torch.int64),
    "image_embeds_position_mask": lambda config: torch.tensor([[1, 1, 0, 0, 0, 0, 0]] * BATCH),
    "flattened_patches": lambda config: torch.cat(
        [torch.ones(BATCH, SEQUENCE, 2), _noise(BATCH, SEQUENCE, _get(config, "patch_embed_hidden_size", default=768))], -1
    ),
}
_WELCOME = frozenset({
    "input_ids", "attention_mask", "pixel_values", "decoder_input_ids", "past_observed_mask", "bbox", "states", "actions",
    "rewards", "returns_to_go", "timesteps",
})  # fmt: skip
