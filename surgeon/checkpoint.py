"""Checkpoint directories in the layout of the Hugging Face hub: safetensors only, checked before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from surgeon.errors import TraceError
from surgeon.fake import fake_weights

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")


def load_checkpoint(
    path: Path, *, dtype: torch.dtype | None, trust_remote_code: bool
) -> tuple[nn.Module, tuple[str, ...], tuple[str, ...]]:
    """Load the model of a checkpoint directory.

    Args:
        path: the directory.
        dtype: type of the weights, None for the type they are stored in.
        trust_remote_code: allow the checkpoint's own Python code.

    Returns:
        The model, the names of the weights that the checkpoint did not hold, and of those that the model has no place for.

    Raises:
        TraceError: no directory, no configuration, no readable safetensors, a class that cannot be built, or weights of
            other shapes than the configuration says.
    """
    if not path.is_dir():
        raise TraceError(f"{path} is a file; give the directory that holds config.json and *.safetensors{_advice(path)}")
    config = _config(path)
    check_weights(path)
    cls = _class(config, path, trust_remote_code)
    with _quiet():  # missing weights are reported by the caller, as an error
        try:
            model, info = cls.from_pretrained(
                str(path),
                dtype=dtype or "auto",
                output_loading_info=True,
                use_safetensors=True,
                local_files_only=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
                **({"trust_remote_code": True} if trust_remote_code else {}),
            )
        except Exception as error:  # configuration, shapes and code of a checkpoint can fail in any way
            raise TraceError(f"{path} could not be loaded: {type(error).__name__}: {error}") from error
    misfits = sorted((str(name), list(held), list(wanted)) for name, held, wanted in info["mismatched_keys"])
    if misfits:
        listed = ", ".join(f"{name} is {held}, needed {wanted}" for name, held, wanted in misfits[:5])
        raise TraceError(
            f"{path}: {len(misfits)} weights have other shapes than config.json says: {listed}"
            f"{' ...' if len(misfits) > 5 else ''}; give the config.json that they were saved with"
        )
    module: nn.Module = model
    return module, tuple(sorted(info["missing_keys"])), tuple(sorted(info["unexpected_keys"]))


def build_checkpoint(path: Path, *, dtype: torch.dtype | None, trust_remote_code: bool) -> nn.Module:
    """Build the model of a checkpoint directory with fake weights, from its configuration alone.

    Args:
        path: the directory; only its config.json is read.
        dtype: type of the weights, None for the one that the configuration names (float32 where it names none).
        trust_remote_code: allow the checkpoint's own Python code.

    Raises:
        TraceError: no directory, no configuration, or a class that cannot be built.
    """
    if not path.is_dir():
        raise TraceError(f"{path} is a file; give the directory that holds config.json")
    plain = _config(path)
    cls = _class(plain, path, trust_remote_code)
    from transformers import AutoConfig

    code = {"trust_remote_code": True} if trust_remote_code else {}
    with _quiet(), fake_weights():
        try:
            config: Any = getattr(cls, "config_class", None) or AutoConfig
            config = config.from_pretrained(str(path), local_files_only=True, **code)
            build = getattr(cls, "_from_config", None) or (lambda *a, **k: cls.from_config(*a, **k, **code))
            model: nn.Module = build(config, dtype=dtype or getattr(config, "dtype", None) or torch.float32)
        except Exception as error:  # configuration and code of a checkpoint can fail in any way
            raise TraceError(f"{path} could not be built from its config.json: {type(error).__name__}: {error}") from error
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the library from writing to the terminal."""
    from transformers.utils import logging

    report: Any = logging
    bars, verbosity = report.is_progress_bar_enabled(), report.get_verbosity()
    report.disable_progress_bar()
    report.set_verbosity_error()
    try:
        yield
    finally:
        report.set_verbosity(verbosity)
        if bars:
            report.enable_progress_bar()


def check_weights(path: Path) -> list[Path]:
    """Check, without reading weights, that every safetensors file of a checkpoint is there and whole.

    Args:
        path: the directory.

    Returns:
        The files.

    Raises:
        TraceError: names the file that is missing, truncated, corrupt or a pickle, and what to do.
    """
    index = path / "model.safetensors.index.json"
    single = path / "model.safetensors"
    if index.is_file():
        try:
            weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError) as error:
            raise TraceError(f"{index} is not an index of safetensors files ({error}); download it again") from error
        files: dict[Path, set[str]] = {}
        for tensor, name in weight_map.items():
            files.setdefault(path / name, set()).add(tensor)
    elif single.is_file():
        files = {single: set()}
    else:
        pickles = sorted(file for pattern in _PICKLES for file in path.glob(pattern))
        if pickles:
            raise TraceError(f"{path} holds no safetensors{_advice(pickles[0])}")
        raise TraceError(
            f"{path} holds no weights: neither {single.name} nor {index.name} is there; what the model is made of can be "
            "seen without them: trace it with weights='fake' (surgeon inspect --fake-weights)"
        )
    for file, expected in files.items():
        held = _names(file)
        absent = sorted(expected - held)
        if absent:
            raise TraceError(f"{file} lacks {', '.join(absent[:5])}, which {index.name} says it holds; download it again")
    return list(files)


def resolve_hub_id(name: str) -> Path:
    """The local snapshot of a hub id, downloaded if need be (configuration, tokenizer and safetensors only).

    Raises:
        TraceError: it is not a hub id, or it is neither cached nor reachable.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    forms = "a model is a directory, a hub id (owner/name), 'package.module:callable' or an nn.Module"
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise TraceError(f"there is no directory {name!r}, and it is not a hub id either; {forms}") from error
    patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.py"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, local_files_only=True))
    except Exception as first:  # not cached, or not completely
        try:
            return Path(snapshot_download(name, allow_patterns=patterns))
        except Exception as error:  # network, permission or name: the hub's client raises many classes
            raise TraceError(
                f"there is no directory {name!r}, and the hub id {name!r} is neither in the local cache "
                f"({_line(first)}) nor could it be downloaded: {type(error).__name__}: {_line(error)}; {forms}"
            ) from error


def _names(file: Path) -> set[str]:
    """The tensors a safetensors file holds; its header is checked against its length."""
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise TraceError(f"{file} is missing; the checkpoint is incomplete, download it again")
    try:
        with safe_open(str(file), framework="pt") as opened:
            return set(opened.keys())
    except (SafetensorError, OSError, ValueError) as error:
        size = file.stat().st_size
        with file.open("rb") as start:
            head = start.read(64)
        pointer = " (it is a git-lfs pointer: run git lfs pull)" if head.startswith(b"version https://git-lfs") else ""
        raise TraceError(
            f"{file} is truncated or not safetensors{pointer}: {error}; it has {size} bytes; download it again"
        ) from error


_INSTEAD = {
    "adapter_config.json": "it holds an adapter: merge it into its base model first",
    "graph.json": "it holds a saved graph: surgeon.load_graph reads it, and surgeon.compile takes what that returns",
    "surgeon.json": "it holds an artefact, whose graph is not kept: give the model that it was built from; "
    "surgeon.save_graph keeps a graph",
}
"""What a folder may hold in place of a checkpoint, by a file of it, and what to do then."""


def _config(path: Path) -> dict[str, Any]:
    file = path / "config.json"
    if not file.is_file():
        instead = ""
        for name, what in _INSTEAD.items():
            if (path / name).is_file():
                instead = f" ({what})"
                break
        raise TraceError(
            f"{path} holds no config.json{instead}; a checkpoint is a directory with config.json and *.safetensors"
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TraceError(f"{file} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise TraceError(f"{file} must hold one JSON object, found {type(config).__name__}")
    return config


def _class(config: dict[str, Any], path: Path, trust_remote_code: bool) -> Any:
    """The class named in ``architectures``, or the library's automatic choice."""
    import transformers

    own = config.get("auto_map") or {}
    for name in config.get("architectures") or ():
        found = getattr(transformers, name, None)
        if found is not None:
            return found
        if own and not trust_remote_code:
            raise TraceError(
                f"{path}: {name} is not in transformers {transformers.__version__}; the checkpoint brings its own "
                "Python code, which runs only when you ask for it: trust_remote_code"
            )
        if trust_remote_code:
            key = next((key for key, value in own.items() if str(value).endswith(f".{name}")), "AutoModel")
            return getattr(transformers, key)
        raise TraceError(f"{path}: {name}, named in config.json, is not in transformers {transformers.__version__}")
    return transformers.AutoModel


def _advice(file: Path) -> str:
    if not any(file.match(pattern) for pattern in _PICKLES):
        return ""
    return (
        f"; {file.name} is a pickle, which can run code when it is read, and is refused: convert it on a machine you "
        "trust with model = AutoModel.from_pretrained(...); model.save_pretrained(directory), which writes safetensors"
    )


def _line(error: Exception) -> str:
    """The first line of an error's text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
