"""Example inputs of transformers models, read from the forward signature and the configuration.

The kinds of input follow from the names of the forward arguments, which are the library's conventions: tokens, images,
log-mel features, waveforms, and the tokens of a decoder.  Where a configuration does not say how a tensor is laid out, the
model is tried on the layouts in use, in order.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from surgeon.errors import TraceError

BATCH, SEQUENCE, TARGET = 2, 7, 5
"""Sizes of examples: rows, tokens, and tokens of a decoder that has an encoder before it; equal to no other size."""

_FRAMES, _IMAGE, _CHANNELS = 32, 224, 3
_MAKERS = ("input_ids", "pixel_values", "input_features", "input_values")
_MEL = ("num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim", "feature_size")


def default_inputs(module: nn.Module, path: Path | None = None) -> dict[str, Tensor]:
    """Example inputs of a transformers model.

    Args:
        module: the model.
        path: its checkpoint directory, whose tokenizer says whether it tells segments apart.

    Returns:
        By name, of what the model takes: ``input_ids``, ``attention_mask``, ``token_type_ids`` [batch, sequence] int64;
        ``pixel_values`` [batch, channels, height, width], ``input_features`` and ``input_values`` (audio) in the model's type;
        ``decoder_input_ids`` [batch, target] int64 of an encoder-decoder.  A model that generates text from tokens and images
        gets tokens only; a model that compares them gets both.

    Raises:
        TraceError: the model is not of that library, or none of the known inputs is what it takes.
    """
    config, main = getattr(module, "config", None), getattr(module, "main_input_name", None)
    if config is None or main is None:
        raise TraceError(
            f"{type(module).__name__} is not a transformers model, so its inputs are not known: pass inputs={{name: tensor}}"
        )
    accepted = inspect.signature(module.forward).parameters
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    compares = _has(config, "text_config") and (main == "pixel_values" or (main == "input_ids" and not _generates(module)))
    others = [name for name in _MAKERS if name != main and name in accepted and compares]
    if main not in _MAKERS:
        needed = ", ".join(n for n, p in accepted.items() if p.default is inspect.Parameter.empty) or main
        raise TraceError(
            f"{type(module).__name__} starts from {needed}; surgeon makes example inputs for {', '.join(_MAKERS)} only: "
            "pass inputs={name: tensor}"
        )
    found: dict[str, Tensor] = {}
    for name in sorted((main, *others), key=_MAKERS.index):
        found.update(_tokens(module, path) if name == "input_ids" else {})
        if name != "input_ids":
            found[name] = torch.empty(0)
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in accepted:
        found["decoder_input_ids"] = _ids(_vocabulary(config, "decoder"), (BATCH, TARGET))
    found = _laid_out(module, found)
    return {name: tensor.to(device) for name, tensor in found.items()}


def default_dims(name: str, tensor: Tensor) -> dict[int, str]:
    """The dimensions of an input that vary by default: batch, and the sequence of two-dimensional integers.

    The sequence of a decoder's inputs has a name of its own, ``target``.
    """
    if tensor.dim() == 0:
        return {}
    if tensor.dim() == 2 and not tensor.is_floating_point():
        return {0: "batch", 1: "target" if name.startswith("decoder_") else "sequence"}
    return {0: "batch"}


def _has(config: Any, name: str) -> bool:
    return getattr(config, name, None) is not None


def _generates(module: nn.Module) -> bool:
    can: Callable[[], bool] | None = getattr(module, "can_generate", None)
    return can is not None and bool(can())


# -- tokens -----------------------------------------------------------------------------------------------------------


def _tokens(module: nn.Module, path: Path | None) -> dict[str, Tensor]:
    config: Any = module.config
    accepted = inspect.signature(module.forward).parameters
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = {"input_ids": _ids(_vocabulary(config, "encoder"), (BATCH, SEQUENCE))}
    if "attention_mask" in accepted:
        found["attention_mask"] = torch.ones(BATCH, SEQUENCE, dtype=torch.int64)
    if "token_type_ids" in accepted and int(getattr(text, "type_vocab_size", 0) or 0) > 1 and _segments(path):
        generator = torch.Generator().manual_seed(1)
        found["token_type_ids"] = torch.randint(0, int(text.type_vocab_size), (BATCH, SEQUENCE), generator=generator)
    return found


def _ids(vocabulary: int, size: tuple[int, int]) -> Tensor:
    return torch.randint(0, vocabulary, size, generator=torch.Generator().manual_seed(0))


def _vocabulary(config: Any, part: str) -> int:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for holder in (getattr(config, part, None), text, config):
        size = getattr(holder, "vocab_size", None)
        if isinstance(size, int):
            return size
    raise TraceError(f"the configuration {type(config).__name__} names no vocab_size: pass inputs={{name: tensor}}")


def _segments(path: Path | None) -> bool:
    """Whether the tokenizer may emit segment ids; only one that lists its outputs without them says no."""
    file = path / "tokenizer_config.json" if path else None
    if file is None or not file.is_file():
        return True
    listed = json.loads(file.read_text(encoding="utf-8")).get("model_input_names")
    return listed is None or "token_type_ids" in listed


# -- images and audio -------------------------------------------------------------------------------------------------


def _laid_out(module: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inputs with images and audio filled in, in the first layout that the model accepts."""
    open_ = [name for name, tensor in inputs.items() if not tensor.numel()]
    layouts = {name: list(_LAYOUTS[name](module.config)) for name in open_}
    for name, shapes in layouts.items():
        if not shapes:
            raise TraceError(
                f"{type(module).__name__} takes {name}, but its configuration does not say of which size: pass "
                f"inputs={{{name!r}: tensor}}"
            )
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    tried = []
    for number in range(max((len(shapes) for shapes in layouts.values()), default=1)):
        for name, shapes in layouts.items():
            inputs[name] = _noise(shapes[min(number, len(shapes) - 1)], dtype)
        if all(len(shapes) == 1 for shapes in layouts.values()) or _runs(module, inputs):
            return inputs
        tried.append(", ".join(f"{name} {list(inputs[name].shape)}" for name in open_))
    raise TraceError(f"{type(module).__name__} runs on none of {'; '.join(tried)}: pass inputs={{name: tensor}}")


def _noise(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def _runs(module: nn.Module, inputs: dict[str, Tensor]) -> bool:
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    try:
        with torch.no_grad():
            module(**{name: tensor.to(device) for name, tensor in inputs.items()})
    except Exception:  # a model may raise anything on a layout that is not its own
        return False
    return True


def _parts(config: Any, *names: str) -> Iterator[Any]:
    """The configurations of the parts that may hold a size, the whole's last."""
    yield from (part for name in names if (part := getattr(config, name, None)) is not None)
    yield config


def _images(config: Any) -> Iterator[tuple[int, ...]]:
    for part in _parts(config, "vision_config", "image_config", "encoder", "backbone_config"):
        size, channels = getattr(part, "image_size", None), getattr(part, "num_channels", None)
        if size is not None or channels is not None:
            size, channels = size or _IMAGE, channels or _CHANNELS
            height, width = (size, size) if isinstance(size, int) else tuple(size)
            frames = getattr(part, "num_frames", None)
            yield (BATCH, *(() if frames is None else (int(frames),)), int(channels), height, width)
            return


def _features(config: Any) -> Iterator[tuple[int, ...]]:
    """Log-mel features: [batch, bins, frames], [batch, frames, bins], or with a channel."""
    for part in _parts(config, "audio_config", "encoder_config", "encoder"):
        bins = next((int(getattr(part, name)) for name in _MEL if isinstance(getattr(part, name, None), int)), None)
        if bins is None:
            continue
        positions = getattr(part, "max_source_positions", None)
        frames = [2 * positions] if isinstance(positions, int) else []
        square = getattr(part, "spec_size", None)
        frames += [int(square) * (int(square) // bins)] if isinstance(square, int) and square % bins == 0 else []
        for length in (_FRAMES, *frames):
            yield (BATCH, bins, length)
            yield (BATCH, length, bins)
            yield (BATCH, 1, length, bins)
        return


def _waves(config: Any) -> Iterator[tuple[int, ...]]:
    """Spectrograms where the configuration has one's size; else samples of a waveform, enough for a few frames."""
    for part in _parts(config, "encoder", "audio_config"):
        length, bins = getattr(part, "max_length", None), getattr(part, "num_mel_bins", None)
        if isinstance(length, int) and isinstance(bins, int) and length > 20:
            yield (BATCH, length, bins)
        strides = getattr(part, "conv_stride", None)
        if isinstance(strides, list | tuple):
            yield (BATCH, 16 * prod(int(stride) for stride in strides))
    yield (BATCH, 6400)


_LAYOUTS: dict[str, Callable[[Any], Iterator[tuple[int, ...]]]] = {
    "pixel_values": _images,
    "input_features": _features,
    "input_values": _waves,
}
