"""Layouts of the arguments that transformers models take, from the names of the arguments and the fields of the configuration.

Formula: a name maps to the tensors that a model may want under it, in the order in which they are worth trying; none where the
configuration does not say of which size.  The names are conventions of the library, not those of one model; what is not named
here is made by the end of its name (``_ids``, ``_mask``, ``_embeds``, ``_hidden_states``), or from the field of the
configuration that gives its width (``state_dim`` for ``states``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from math import isqrt, prod
from typing import Any

import torch
from torch import Tensor

from surgeon.errors import TraceError

BATCH, SEQUENCE, TARGET = 2, 7, 5
"""Sizes of examples: rows, tokens, and tokens of a decoder that has an encoder before it; equal to no other size."""

_FRAMES, _IMAGE, _CHANNELS, _CONTEXT = 32, 224, 3, 32
_MEL = ("num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim", "feature_size", "input_dim")
_VISION = ("vision_config", "image_config", "encoder", "backbone_config")


def layouts(name: str, config: Any) -> list[Tensor]:
    """What a model may want under this name, in order.

    Args:
        name: of an argument of ``forward``.
        config: the model's configuration.

    Returns:
        Tensors of int64 or float32, each with ``BATCH`` rows in front unless several go with one row (codebooks); empty where
        the name is of no known kind, or the configuration gives no size.
    """
    return list(LAYOUTS.get(name, lambda config: _by_ending(name, config))(config))


def is_sized(name: str, config: Any) -> bool:
    """Whether a field of the configuration gives the width of an argument, as ``state_dim`` does that of ``states``."""
    return _width(name, config) is not None


def vocabulary(config: Any, part: str) -> int:
    """The number of tokens of a part (``encoder``, ``decoder``), of the text, or of the whole.

    Raises:
        TraceError: no field names it.
    """
    for holder in (getattr(config, part, None), getattr(config, f"{part}_config", None), _text(config), config):
        size = getattr(holder, "vocab_size", None)
        if isinstance(size, int):
            return size
    raise TraceError(f"the configuration {type(config).__name__} names no vocab_size: pass inputs={{name: tensor}}")


def _text(config: Any) -> Any:
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _parts(config: Any, *names: str) -> Iterator[Any]:
    """The configurations that may hold a size: those of the parts of these names, of the whole, of its other parts."""
    yield from (part for name in names if (part := getattr(config, name, None)) is not None)
    yield config
    yield from (part for part in vars(config).values() if hasattr(part, "to_dict") and hasattr(part, "model_type"))


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _ids(count: int, *shape: int) -> Tensor:
    return torch.randint(0, count, shape, generator=torch.Generator().manual_seed(0))


# -- tokens -----------------------------------------------------------------------------------------------------------


def _tokens(config: Any) -> Iterator[Tensor]:
    """[batch, sequence]; of several codebooks also [batch * books, sequence] and [batch, sequence, books], or books + 1."""
    count = vocabulary(config, "encoder")
    yield _ids(count, BATCH, SEQUENCE)
    books = getattr(_text(config), "num_codebooks", None)
    if isinstance(books, int):
        yield _ids(count, BATCH * books, SEQUENCE)
        yield _ids(count, BATCH, SEQUENCE, books)
        yield _ids(count, BATCH, SEQUENCE, books + 1)


def _targets(config: Any) -> Iterator[Tensor]:
    count = vocabulary(config, "decoder")
    yield _ids(count, BATCH, TARGET)
    books = getattr(getattr(config, "decoder", None), "num_codebooks", None)
    if isinstance(books, int):
        yield _ids(count, BATCH * books, TARGET)


def _boxes(config: Any) -> Iterator[Tensor]:
    """Boxes of tokens [batch, sequence, 4]: left, top, right, bottom."""
    corner = _ids(8, BATCH, SEQUENCE, 2)
    yield torch.cat([corner, corner + 1 + _ids(8, BATCH, SEQUENCE, 2)], dim=-1)


def _hidden(config: Any) -> Iterator[Tensor]:
    width = getattr(_text(config), "hidden_size", None)
    if isinstance(width, int):
        yield _noise(BATCH, SEQUENCE, width)


def _by_ending(name: str, config: Any) -> Iterator[Tensor]:
    """Arguments that have no entry of their own."""
    part, _, kind = name.rpartition("_")
    width = _width(name, config)
    if width is not None:
        yield _noise(BATCH, SEQUENCE, width)
    elif kind == "ids":
        yield _ids(vocabulary(config, part.removesuffix("_input")), BATCH, SEQUENCE)
    elif kind == "mask":
        yield torch.ones(BATCH, SEQUENCE, dtype=torch.int64)
    elif re.search(r"_(embeds|hidden_states)$", name):
        yield from _hidden(config)


def _width(name: str, config: Any) -> int | None:
    width = getattr(config, f"{name}_dim", getattr(config, f"{name.removesuffix('s')}_dim", None))
    return width if isinstance(width, int) and not isinstance(width, bool) else None


# -- images -----------------------------------------------------------------------------------------------------------


def _size(config: Any) -> tuple[int, int, int, int | None, int | None] | None:
    """Channels, height, width, frames and size of a patch, as far as a configuration says them."""
    for part in _parts(config, *_VISION):
        size, channels = getattr(part, "image_size", None), getattr(part, "num_channels", None)
        if size is not None or channels is not None:
            size, channels = size or _IMAGE, channels or _CHANNELS
            height, width = (size, size) if isinstance(size, int) else tuple(size)
            frames, patch = getattr(part, "num_frames", None), getattr(part, "patch_size", None)
            return int(channels), height, width, frames, patch if isinstance(patch, int) else None
    return None


def _images(config: Any) -> Iterator[Tensor]:
    """[batch, channels, height, width], after the batch with frames where there are any; beside a text also one of several.

    Where nothing is said of a size, images of a usual size, which a model without learned positions takes, or pairs of them.
    """
    size = _size(config)
    if size is None:
        yield _noise(BATCH, _CHANNELS, _IMAGE, _IMAGE)
        yield _noise(BATCH, 2, _CHANNELS, _IMAGE, _IMAGE)
        return
    channels, height, width, frames, _ = size
    yield _noise(BATCH, *(() if frames is None else (int(frames),)), channels, height, width)
    if frames is None and isinstance(getattr(_text(config), "vocab_size", None), int):
        yield _noise(BATCH, 1, channels, height, width)


def _videos(config: Any) -> Iterator[Tensor]:
    """[batch, frames, channels, height, width]."""
    channels, height, width, frames, _ = _size(config) or (_CHANNELS, _IMAGE, _IMAGE, None, None)
    yield _noise(BATCH, int(frames or 4), channels, height, width)


def patches(config: Any) -> dict[str, Tensor] | None:
    """Images that are cut in patches before the model, as ``spatial_shapes`` in a signature says; none without a patch size.

    ``pixel_values`` [batch, patches, channels * patch * patch], ``pixel_attention_mask`` [batch, patches] and
    ``spatial_shapes`` [batch, 2]: rows and columns of patches.
    """
    for part in _parts(config, *_VISION):
        patch, count = getattr(part, "patch_size", None), getattr(part, "num_patches", None)
        if isinstance(patch, int):
            side = isqrt(count) if isinstance(count, int) else 4
            channels = getattr(part, "num_channels", None) or _CHANNELS
            return {
                "pixel_values": _noise(BATCH, side * side, channels * patch * patch),
                "pixel_attention_mask": torch.ones(BATCH, side * side, dtype=torch.int64),
                "spatial_shapes": torch.full((BATCH, 2), side, dtype=torch.int64),
            }
    return None


# -- audio and series -------------------------------------------------------------------------------------------------


def _features(config: Any) -> Iterator[Tensor]:
    """Log-mel features: [batch, bins, frames], [batch, frames, bins], or with a channel."""
    for part in _parts(config, "audio_config", "encoder_config", "encoder"):
        widths = [bins for name in _MEL if isinstance(bins := getattr(part, name, None), int)]
        if not widths:
            continue
        positions = getattr(part, "max_source_positions", None)
        frames = [2 * positions] if isinstance(positions, int) else []
        square = getattr(part, "spec_size", None)
        for bins in dict.fromkeys(widths):
            filled = [square * (square // bins)] if isinstance(square, int) and square % bins == 0 else []
            for length in (_FRAMES, *frames, *filled):
                yield _noise(BATCH, bins, length)
                yield _noise(BATCH, length, bins)
                yield _noise(BATCH, 1, length, bins)
        return


def _waves(config: Any) -> Iterator[Tensor]:
    """Spectrograms where the configuration has one's size; else samples of a waveform, enough for a few frames."""
    for part in _parts(config, "encoder", "audio_config"):
        length, bins = getattr(part, "max_length", None), getattr(part, "num_mel_bins", None)
        if isinstance(length, int) and isinstance(bins, int) and length > 20:
            yield _noise(BATCH, length, bins)
        strides = getattr(part, "conv_stride", None)
        if isinstance(strides, list | tuple):
            yield _noise(BATCH, 16 * prod(int(stride) for stride in strides))
    yield _noise(BATCH, 6400)
    yield _noise(BATCH, 1, 6400)


def _past(config: Any) -> int:
    """Steps of a series: the context, and as many as the longest lag reaches behind it."""
    length, lags = getattr(config, "context_length", None), getattr(config, "lags_sequence", None)
    return int(length or _CONTEXT) + max(map(int, lags or [0]))


def _series(config: Any) -> Iterator[Tensor]:
    """[batch, steps, channels], or [batch, steps] of one channel."""
    channels = getattr(config, "num_input_channels", None) or getattr(config, "input_size", None)
    if isinstance(channels, int) and channels > 1:
        yield _noise(BATCH, _past(config), channels)
    else:
        yield _noise(BATCH, _past(config))
        yield _noise(BATCH, _past(config), 1)


def _observed(config: Any) -> Iterator[Tensor]:
    yield from (torch.ones_like(series) for series in _series(config))


def _times(config: Any) -> Iterator[Tensor]:
    count = getattr(config, "num_time_features", None)
    if isinstance(count, int):
        yield _noise(BATCH, _past(config), count)


def _ahead(config: Any, values: Iterator[Tensor]) -> Iterator[Tensor]:
    """As many steps of series as are predicted."""
    length = getattr(config, "prediction_length", None)
    if isinstance(length, int):
        yield from (series[:, :1].expand(-1, length, *series.shape[2:]).clone() for series in values)


def _frames(config: Any) -> Iterator[Tensor]:
    """Spectrograms that a decoder writes [batch, frames, bins]."""
    bins = getattr(config, "num_mel_bins", None)
    if isinstance(bins, int):
        yield _noise(BATCH, TARGET, bins)


LAYOUTS: dict[str, Callable[[Any], Iterator[Tensor]]] = {
    "input_ids": _tokens,
    "decoder_input_ids": _targets,
    "bbox": _boxes,
    "inputs_embeds": _hidden,
    "hidden_states": _hidden,
    "pixel_values": _images,
    "pixel_values_videos": _videos,
    "input_features": _features,
    "input_values": _waves,
    "past_values": _series,
    "past_observed_mask": _observed,
    "past_time_features": _times,
    "future_values": lambda config: _ahead(config, _series(config)),
    "future_time_features": lambda config: _ahead(config, _times(config)),
    "decoder_input_values": _frames,
}
