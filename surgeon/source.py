"""Loading of source models: a checkpoint directory or hub id, a module, or ``"package.module:callable"``."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._dynamo.eval_frame import OptimizedModule

from surgeon.arguments import Arguments, split
from surgeon.caches import SUM
from surgeon.causal import CausalInputs, causal_inputs, of_text
from surgeon.checkpoint import build_checkpoint, load_checkpoint, resolve_hub_id
from surgeon.conditional import conditional_inputs, is_conditional
from surgeon.copying import copied, writable
from surgeon.errors import TraceError, nearest
from surgeon.example_inputs import agreed_dims, default_inputs
from surgeon.fake import fake_weights, with_fake_weights, without_values
from surgeon.graph import Source
from surgeon.sampling import Settings

TASKS = ("forward", "text-generation")
WEIGHTS = ("real", "fake")
_WRAPPERS = (OptimizedModule, nn.DataParallel, nn.parallel.DistributedDataParallel)
_CALLABLE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


@dataclass
class LoadedSource:
    """A source model, ready to be called.

    Attributes:
        module: the model.
        inputs: example keyword inputs; where surgeon made them batch 2 and a sequence length no other size equals.
        source: where it came from.
        tokenizer_path: directory that holds a tokenizer, or None.
        missing: names of weights that the checkpoint did not hold.
        causal: how a model that generates text is called with caches (task ``text-generation``).
        notes: what a reader of the report should know.
        dims: names of the dimensions that vary where surgeon made the inputs, by input; else empty.
        arguments: how the model is called with the tensors, where it takes more than lone ones.
    """

    module: nn.Module
    inputs: dict[str, Tensor]
    source: Source
    tokenizer_path: str | None = None
    missing: tuple[str, ...] = ()
    causal: CausalInputs | None = None
    notes: tuple[str, ...] = ()
    dims: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    arguments: Arguments = field(default_factory=Arguments)

    def call(self, forward: Callable[..., Any], inputs: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
        """Call the model's forward, or what stands in for it, on the example's kind of inputs.

        Returns:
            Output tensors by name, and the name of the class that the model returned.
        """
        if self.causal is not None:
            return self.causal.call(forward, inputs), "dict"
        result = forward(**self.arguments(inputs))
        return flatten_outputs(result), type(result).__name__

    def outputs(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Run the source model in eager torch, without caches.

        Args:
            **inputs: its keyword inputs.

        Returns:
            Its output tensors by name.
        """
        with calling(self.module):
            return flatten_outputs(self.module(**self.arguments(inputs)))


def load_source(
    model: str | Path | nn.Module,
    inputs: Mapping[str, Any] | None = None,
    *,
    task: str | None = None,
    dtype: str | torch.dtype | None = None,
    weights: str = "real",
    trust_remote_code: bool = False,
) -> LoadedSource:
    """Load a source model and find example inputs for it.

    Args:
        model: a checkpoint directory, a hub id, ``"package.module:callable"`` (returning a module, or a module and its
            inputs; modules of the current directory are found), or a module.
        inputs: example keyword inputs: tensors, nested ones, and values that are the same in every call (see
            ``surgeon.trace``); None to let surgeon make them (models of transformers only).
        task: one of ``TASKS``; None for what a checkpoint's architecture is for, and for ``forward`` otherwise.
        dtype: floating-point type, e.g. ``"bfloat16"``; None keeps the model's own.  A module is copied, not changed.
        weights: ``"real"``, or ``"fake"`` for a model without the values of its weights: they are not loaded.
        trust_remote_code: allow a checkpoint to bring its own Python code.

    Raises:
        TraceError: what could not be found, read or used, and what to do.
    """
    if task not in (None, *TASKS):
        raise TraceError(f"unknown task {task!r}: {nearest(str(task), TASKS)}")
    if weights not in WEIGHTS:
        raise TraceError(f"unknown weights {weights!r}: {nearest(str(weights), WEIGHTS)}")
    wanted, fake = _dtype(dtype), weights == "fake"
    path: Path | None = None
    missing: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    if isinstance(model, nn.Module):
        module = _unwrapped(model)
        description = type(module).__name__
    elif isinstance(model, str) and _CALLABLE.fullmatch(model) and not Path(model).exists():
        description = model
        with fake_weights() if fake else nullcontext():
            module, own = _call(model)
        inputs = inputs if inputs is not None else own
    elif isinstance(model, str | Path):
        description = str(model)
        path = Path(model).expanduser()
        if not path.exists():
            path = resolve_hub_id(str(model))
        if fake:
            module = build_checkpoint(path, dtype=wanted, trust_remote_code=trust_remote_code)
        else:
            module, missing, unused = load_checkpoint(path, dtype=wanted, trust_remote_code=trust_remote_code)
            if unused:
                notes += (
                    f"{len(unused)} weights of the checkpoint have no place in the model that its config.json describes: "
                    f"{', '.join(unused[:5])}{' ...' if len(unused) > 5 else ''}",
                )
    else:
        raise TraceError(
            f"a model is a directory, a hub id, 'package.module:callable' or an nn.Module, found {type(model).__name__}"
        )
    fake = fake or without_values(module)
    if fake:
        module = with_fake_weights(module, wanted)
    elif wanted is not None and any(p.is_floating_point() and p.dtype != wanted for p in module.parameters()):
        module = _converted(module, wanted)
    else:
        module = writable(module)
    arguments = Arguments()
    with calling(module):  # which may run it
        if inputs is not None:
            example, arguments = _check_inputs(inputs, module, wanted)
        else:
            example = default_inputs(module, path)
    if arguments.forms and task == "text-generation":
        raise TraceError(
            f"task text-generation calls the model with caches of its own making, and inputs has {', '.join(arguments.forms)}, "
            "which is no tensor: leave it out, or trace with task forward"
        )
    fixed = arguments.fixed.items()
    notes += tuple(f"input {name} is {value!r} in every call: it is a part of the graph" for name, value in fixed)
    causal = None
    own_choice = task is None and path is not None and inputs is None and not fake
    if task == "text-generation" or (own_choice and _generates(module)):
        try:
            with calling(module):
                if is_conditional(module):
                    causal = conditional_inputs(module, example, fake=fake)
                else:
                    causal = causal_inputs(module, example if inputs is not None else of_text(example), fake=fake)
            example = causal.inputs
        except TraceError as error:
            if task is not None:
                raise
            notes += (str(error).replace("Trace it with", "It is traced with"),)
    task = "forward" if causal is None else "text-generation"
    config: Any = getattr(module, "config", None)
    plain = json.loads(json.dumps(config.to_dict(), default=str)) if hasattr(config, "to_dict") else {}
    source = Source(
        description,
        str(path.resolve()) if path else None,
        plain,
        task,
        weights="fake" if fake else "real",
        model_class=type(module).__name__,
        generation=_generation(module, plain),
        fixed=arguments.fixed,
    )
    dims = agreed_dims(example) if inputs is None and causal is None else {}
    return LoadedSource(module, example, source, _tokenizer(path), missing, causal, notes, dims, arguments)


# -- calling ----------------------------------------------------------------------------------------------------------


@contextmanager
def calling(module: nn.Module) -> Iterator[None]:
    """Inside, the model is in evaluation mode and returns named outputs without caches; it is put back on leaving.

    What is compiled in it (``torch.compile``, ``module.compile()``) runs as it was written: compiling it for each of the sizes
    that are compared takes minutes.
    """
    training = {m: m.training for m in module.modules()}
    configs = _configs(module)
    before = []
    for config in configs:
        for flag, value in (("use_cache", False), ("return_dict", True)):
            if isinstance(getattr(config, flag, None), bool):
                before.append((config, flag, getattr(config, flag)))
                setattr(config, flag, value)
    module.eval()
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for config, flag, value in before:
            setattr(config, flag, value)
        for m, mode in training.items():
            m.training = mode


def _configs(module: nn.Module) -> list[Any]:
    """The configurations that the parts of a transformers model read, each once."""
    if "transformers" not in sys.modules:
        return []
    from transformers import PretrainedConfig

    found = {id(c): c for m in module.modules() if isinstance(c := getattr(m, "config", None), PretrainedConfig)}
    return list(found.values())


def flatten_outputs(result: Any) -> dict[str, Tensor]:
    """What a model returns, as tensors by name.

    A mapping keeps its keys and a dataclass its fields, a tuple or list is numbered (``name.0``), a lone tensor is ``output``;
    None is left out.

    Raises:
        TraceError: something else than a tensor is returned.
    """
    found: dict[str, Tensor] = {}

    def visit(name: str, value: Any) -> None:
        if value is None:
            return
        if isinstance(value, Tensor):
            found[name or "output"] = value
        elif isinstance(value, Mapping):
            for key, item in value.items():
                visit(f"{name}.{key}" if name else str(key), item)
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            visit(name, {field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
        elif isinstance(value, tuple | list):
            fields = getattr(value, "_fields", range(len(value)))
            for key, item in zip(fields, value, strict=True):
                visit(f"{name or 'output'}.{key}" if isinstance(key, int) else key, item)
        else:
            raise TraceError(
                f"the model's output {name or 'output'!r} is of type {type(value).__name__}; outputs are tensors, or "
                "mappings, dataclasses, tuples and lists of tensors: wrap the model so that it returns those"
            )

    visit("", result)
    if not found:
        raise TraceError("the model returns no tensor")
    return found


# -- example inputs ---------------------------------------------------------------------------------------------------


def resized(
    inputs: Mapping[str, Tensor], dims: Mapping[str, Mapping[int, str]], sizes: Mapping[str, int], *, pad: bool = False
) -> dict[str, Tensor]:
    """The same inputs at other sizes, made of randomly repeated slices, so that every value stays a valid one.

    Args:
        inputs: tensors by name.
        dims: their dynamic dimensions.
        sizes: new size by dimension name.
        pad: let an ``attention_mask`` end in zeros, row i in i mod 3 + 1 of them, as padded batches have.
    """
    generator = torch.Generator().manual_seed(1)
    found = {}
    for name, tensor in inputs.items():
        for dim, label in dims[name].items():
            size = size_of(label, sizes, tensor.shape[dim])
            if size != tensor.shape[dim]:
                index = torch.randint(0, tensor.shape[dim], (size,), generator=generator)
                tensor = tensor.index_select(dim, index.to(tensor.device))
        if pad and name == "attention_mask" and tensor.dim() == 2 and tensor.shape[1] > 4:
            rows, length = tensor.shape
            kept = length - 1 - torch.arange(rows, device=tensor.device) % 3
            tensor = (torch.arange(length, device=tensor.device) < kept[:, None]).to(tensor.dtype)
        found[name] = tensor
    return found


def size_of(label: str, sizes: Mapping[str, int], otherwise: int) -> int:
    """Size of a dimension when those named in ``sizes`` have these sizes; ``otherwise`` where that says nothing.

    A label that is a sum of names (``past + sequence``) has the sum of their sizes.
    """
    parts = label.split(SUM)
    if all(part in sizes for part in parts):
        return sum(sizes[part] for part in parts)
    return otherwise


def _check_inputs(
    inputs: Mapping[str, Any], module: nn.Module, dtype: torch.dtype | None
) -> tuple[dict[str, Tensor], Arguments]:
    if not isinstance(inputs, Mapping):
        raise TraceError(f"inputs is a mapping of input name to tensor, found {type(inputs).__name__}")
    if not inputs:
        raise TraceError("inputs is empty; give one example tensor for each input of the model")
    accepted = inspect.signature(module.forward).parameters
    anything = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values())
    for name in inputs:
        if name not in accepted and not anything:
            raise TraceError(f"{type(module).__name__}.forward takes no {name!r}; {nearest(str(name), accepted)}")
    given, arguments = split(inputs)
    own = {name: tensor.clone() if tensor.is_inference() else tensor.detach() for name, tensor in given.items()}
    floats = {n: t.to(dtype) if dtype is not None and t.is_floating_point() else t for n, t in own.items()}
    return floats, arguments


# -- forms of a source ------------------------------------------------------------------------------------------------


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    known = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if dtype is None or dtype in known.values():
        return dtype  # type: ignore[return-value]  # a membership narrows nothing
    if dtype not in known:
        raise TraceError(f"unknown dtype {dtype!r}: {nearest(str(dtype), known)}")
    return known[dtype]


def _unwrapped(module: nn.Module) -> nn.Module:
    """The model within torch's wrappers that say how it runs, not what it computes: ``torch.compile``, data parallelism.

    Their prefix would stand in front of every weight's name.
    """
    while isinstance(module, _WRAPPERS):
        inner = module._orig_mod if isinstance(module, OptimizedModule) else module.module
        module = cast(nn.Module, inner)
    return module


def _converted(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    return copied(module).to(dtype)


def _call(description: str) -> tuple[nn.Module, Mapping[str, Tensor] | None]:
    """Import and call ``package.module:callable``."""
    name, _, attribute = description.partition(":")
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        owner: Any = importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise TraceError(
            f"{description!r}: there is no module {error.name!r} (looked in the environment and in {here})"
        ) from error
    except Exception as error:  # the user's module may raise anything
        raise TraceError(f"{description!r}: importing {name!r} failed: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(here)
    for part in attribute.split("."):
        if not hasattr(owner, part):
            public = [n for n, v in vars(owner).items() if callable(v) and not n.startswith("_")]
            raise TraceError(f"{description!r}: {name!r} has no {part!r}; {nearest(part, public)}")
        owner = getattr(owner, part)
    if isinstance(owner, nn.Module):
        return owner, None
    if not callable(owner):
        raise TraceError(f"{description!r} is a {type(owner).__name__}, not a callable that returns a module")
    try:
        result = owner()
    except Exception as error:  # the user's function may raise anything
        raise TraceError(f"{description!r} failed: {type(error).__name__}: {error}") from error
    if isinstance(result, nn.Module):
        return result, None
    if isinstance(result, tuple) and len(result) == 2:
        module, inputs = result
        if isinstance(module, nn.Module) and isinstance(inputs, Mapping):
            return module, inputs
    kinds = ", ".join(type(r).__name__ for r in result) if isinstance(result, tuple) else type(result).__name__
    raise TraceError(f"{description!r} must return an nn.Module, or (nn.Module, {{name: tensor}}); it returned {kinds}")


def _generates(module: nn.Module) -> bool:
    """Whether a checkpoint's architecture is one that text is generated with, from tokens alone or by an encoder-decoder."""
    can = getattr(module, "can_generate", None)
    if can is None or not can():
        return False
    return is_conditional(module) or getattr(module, "main_input_name", None) == "input_ids"


def _generation(module: nn.Module, config: Mapping[str, Any]) -> dict[str, Any]:
    """The generation configuration of a transformers model, or what its configuration says of special tokens."""
    own: Any = getattr(module, "generation_config", None)
    data = own.to_dict() if hasattr(own, "to_dict") else config
    said: Any = getattr(module, "config", None)
    text = said.get_text_config() if hasattr(said, "get_text_config") else said
    length = getattr(text, "max_position_embeddings", None)  # whatever it is called in the file
    trained = length if isinstance(length, int) and length > 0 else None
    return replace(Settings.of(data), table_length=None, trained_length=trained).to_data()


def _tokenizer(path: Path | None) -> str | None:
    files = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.txt", "vocab.json")
    return str(path.resolve()) if path and any((path / file).is_file() for file in files) else None
