"""Example inputs of transformers models, read from the forward signature and the configuration.

The kinds of input follow from the names of the forward arguments, which are the library's conventions: tokens, images,
videos, log-mel features, waveforms, series, boxes, hidden states, and the tokens of a decoder.  Where a configuration does not
say how a tensor is laid out, or the signature not which arguments go together, the model is tried on those in use, in order.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from surgeon.errors import TraceError
from surgeon.example_layouts import BATCH, LAYOUTS, SEQUENCE, is_sized, layouts, patches

Inputs = dict[str, Tensor]

_COMPARED = ("input_ids", "pixel_values", "input_features", "input_values")
"""What a model that compares texts with something else takes besides its main input."""
_COMPANIONS = (*_COMPARED, "pixel_values_videos", "bbox", "past_time_features", "past_observed_mask")
"""Arguments that some models do not run without although their signatures give them a default."""

_DECODED = ("decoder_input_ids", "decoder_input_values", "future_values", "future_time_features")
"""What the decoder of an encoder-decoder reads; without it some run on nothing."""


def default_inputs(module: nn.Module, path: Path | None = None) -> Inputs:
    """Example inputs of a transformers model.

    These sets of arguments are tried in this order, each in the layouts that the configuration leaves open; the first that the
    model runs on is taken.  Where there is only one, the model is not run.

    1. the main input and what has no default; for a model that compares texts with something, both of these;
    2. only the main input and what has no default;
    3. the same with images, for each of which the text holds the tokens that stand for it;
    4. every argument of a known kind.

    Args:
        module: the model, in evaluation mode.
        path: its checkpoint directory, whose tokenizer says whether it tells segments apart.

    Returns:
        By name, of what the model takes: ``input_ids``, ``attention_mask``, ``token_type_ids`` [batch, sequence] int64;
        ``pixel_values`` [batch, channels, height, width], ``input_features``, ``input_values`` (audio) and others of
        ``surgeon.example_layouts``, in the model's type; ``decoder_input_ids`` [batch, target] int64 of an encoder-decoder.
        A model that generates text from tokens and images gets tokens only; a model that compares them gets both.

    Raises:
        TraceError: the model is not of that library, or none of the known inputs is what it takes.
    """
    config, main = getattr(module, "config", None), getattr(module, "main_input_name", None)
    if config is None or main is None:
        raise TraceError(
            f"{type(module).__name__} is not a transformers model, so its inputs are not known: pass inputs={{name: tensor}}"
        )
    sets = _sets(module, _start(module), path)
    tried, reason = [], ""
    for made in sets:
        found = list(made())
        if len(sets) == len(found) == 1:
            return found[0]
        for inputs in found:
            failure = _failure(module, inputs)
            if failure is None:
                return inputs
            reason = reason or failure
            tried.append(", ".join(f"{name} {list(tensor.shape)}" for name, tensor in inputs.items()))
    raise TraceError(
        f"{type(module).__name__} runs on none of {'; '.join(dict.fromkeys(tried))} (the first: {reason}): "
        "pass inputs={name: tensor}"
    )


def default_dims(name: str, tensor: Tensor) -> dict[int, str]:
    """The dimensions of an input that vary by default: batch, and the sequence of two-dimensional integers.

    The sequence of a decoder's inputs has a name of its own, ``target``.
    """
    if tensor.dim() == 0:
        return {}
    if tensor.dim() == 2 and not tensor.is_floating_point():
        return {0: "batch", 1: "target" if name.startswith("decoder_") else "sequence"}
    return {0: "batch"}


def agreed_dims(inputs: Inputs) -> dict[str, dict[int, str]]:
    """The default dimensions of inputs that surgeon made, without those of one name whose sizes differ, which stay fixed.

    Ids of several codebooks have more rows than their mask; texts of two tokenizers are of two lengths.  Integers of three
    dimensions, boxes or codebooks, are several for each token.
    """
    found = {name: default_dims(name, tensor) for name, tensor in inputs.items()}
    for name, tensor in inputs.items():
        if tensor.dim() == 3 and not tensor.is_floating_point() and tensor.shape[1] == SEQUENCE:
            found[name] = {0: "batch", 1: "sequence"}
    sizes: dict[str, set[int]] = {}
    for name, dims in found.items():
        for dim, label in dims.items():
            sizes.setdefault(label, set()).add(inputs[name].shape[dim])
    return {name: {dim: label for dim, label in dims.items() if len(sizes[label]) == 1} for name, dims in found.items()}


def _has(config: Any, name: str) -> bool:
    return getattr(config, name, None) is not None


def _generates(module: nn.Module) -> bool:
    can: Callable[[], bool] | None = getattr(module, "can_generate", None)
    return can is not None and bool(can())


# -- which arguments --------------------------------------------------------------------------------------------------


def _start(module: nn.Module) -> list[str]:
    """The main input and what has no default; the encoder's main input where that of the whole is of no known kind.

    Raises:
        TraceError: one of them is of no known kind, or the configuration does not say of which size.
    """
    config: Any = module.config
    accepted = inspect.signature(module.forward).parameters
    main: Any = module.main_input_name
    mains = [main] if isinstance(main, str) else list(main)
    if not any(layouts(name, config) for name in mains if name in accepted):
        mains = [getattr(getattr(module, "encoder", None), "main_input_name", mains[0])]
    varied = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    needed = [name for name, p in accepted.items() if p.default is inspect.Parameter.empty and p.kind not in varied]
    start = list(dict.fromkeys(name for name in (*mains, *needed) if name in accepted))
    cut = patches(config) or {} if "spatial_shapes" in accepted else {}
    unknown = [name for name in start if not layouts(name, config) and name not in cut]
    if unknown or not start:
        raise TraceError(
            f"{type(module).__name__} starts from {', '.join(start or mains)}; surgeon makes example inputs for "
            f"{', '.join(LAYOUTS)} where the configuration gives their sizes, and not here for {', '.join(unknown or mains)}: "
            "pass inputs={name: tensor}"
        )
    return start


def _sets(module: nn.Module, start: list[str], path: Path | None) -> list[Callable[[], Iterator[Inputs]]]:
    """What makes the inputs of each set of arguments, in the order that ``default_inputs`` says."""
    config: Any = module.config
    accepted = inspect.signature(module.forward).parameters
    target = [name for name in _DECODED if name in accepted and getattr(config, "is_encoder_decoder", False)]
    compares = _has(config, "text_config") and ("pixel_values" in start or ("input_ids" in start and not _generates(module)))
    others = [name for name in _COMPARED if name in accepted and compares and layouts(name, config)]
    known = [name for name in accepted if (name in _COMPANIONS or is_sized(name, config)) and layouts(name, config)]
    first, second, last = (tuple(dict.fromkeys([*start, *more, *target])) for more in (others, [], known))
    found: dict[Any, Callable[[], Iterator[Inputs]]] = {
        frozenset(names): partial(_laid_out, module, names, path) for names in (first, second)
    }
    if {"input_ids", "pixel_values"} <= set(accepted) and getattr(module, "get_image_features", None) is not None:
        found["images"] = partial(_with_images, module, second, path)
    found.setdefault(frozenset(last), partial(_laid_out, module, last, path))
    return list(found.values())


def _failure(module: nn.Module, inputs: Inputs) -> str | None:
    """Why the model does not run; None where it does, or where only values that fake weights lack would tell."""
    try:
        with torch.no_grad():
            module(**inputs)
    except (DataDependentOutputException, DynamicOutputShapeException):
        return None
    except Exception as error:  # a model may raise anything on inputs that are not its own
        return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
    return None


# -- their values -----------------------------------------------------------------------------------------------------


def _laid_out(module: nn.Module, names: tuple[str, ...], path: Path | None) -> Iterator[Inputs]:
    """The arguments in each layout in use; images also in patches, where the model asks how many rows and columns of them."""
    config: Any = module.config
    choices = {name: tensors for name in names if (tensors := layouts(name, config))}
    cut = patches(config) if "spatial_shapes" in inspect.signature(module.forward).parameters else None
    for number in range(max(map(len, choices.values()), default=0)):
        inputs = {name: tensors[min(number, len(tensors) - 1)] for name, tensors in choices.items()}
        if "spatial_shapes" not in names:
            yield _completed(module, inputs, path)
        if cut is not None and "pixel_values" in names:
            yield _completed(module, {**inputs, **cut}, path)


def _with_images(module: nn.Module, names: tuple[str, ...], path: Path | None) -> Iterator[Inputs]:
    """Texts that begin with the tokens that stand for an image, as many as the model makes features of it."""
    config: Any = module.config
    token = getattr(config, "image_token_id", None) or getattr(config, "image_token_index", None)
    if not isinstance(token, int):
        return
    for inputs in _laid_out(module, tuple(dict.fromkeys(("input_ids", *names, "pixel_values"))), path):
        ids = inputs["input_ids"]
        try:
            with torch.no_grad():
                features: Any = module.get_image_features(inputs["pixel_values"])  # type: ignore[operator]
        except Exception:  # a model may raise anything on a layout that is not its own
            continue
        features = getattr(features, "pooler_output", features)
        features = features if isinstance(features, Tensor) else torch.cat(list(features))
        count = features.numel() // features.shape[-1] // BATCH
        ids = torch.where(ids == token, ids - 1, ids)
        ids = torch.cat([torch.full((BATCH, count), token, dtype=ids.dtype, device=ids.device), ids], dim=1)
        yield {name: torch.ones_like(ids) if name == "attention_mask" else tensor for name, tensor in inputs.items()} | {
            "input_ids": ids
        }


def _completed(module: nn.Module, inputs: Inputs, path: Path | None) -> Inputs:
    """The inputs with what goes with tokens beside them, on the model's device and in its type."""
    accepted = inspect.signature(module.forward).parameters
    found: Inputs = {}
    for name in sorted(inputs, key=lambda name: (name.startswith("decoder_"), name != "input_ids")):
        found[name] = inputs[name]
        if name != "input_ids":
            continue
        if "attention_mask" in accepted:
            found["attention_mask"] = torch.ones(BATCH, SEQUENCE, dtype=torch.int64)
        kinds = _segment_kinds(module.config)
        if "token_type_ids" in accepted and kinds > 1 and _segments(path):
            generator = torch.Generator().manual_seed(1)
            found["token_type_ids"] = torch.randint(0, kinds, (BATCH, SEQUENCE), generator=generator)
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    return {n: tensor.to(device, dtype if tensor.is_floating_point() else None) for n, tensor in found.items()}


def _segment_kinds(config: Any) -> int:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return int(getattr(text, "type_vocab_size", 0) or 0)


def _segments(path: Path | None) -> bool:
    """Whether the tokenizer may emit segment ids; only one that lists its outputs without them says no."""
    file = path / "tokenizer_config.json" if path else None
    if file is None or not file.is_file():
        return True
    listed = json.loads(file.read_text(encoding="utf-8")).get("model_input_names")
    return listed is None or "token_type_ids" in listed
