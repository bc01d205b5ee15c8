"""Source model -> exported program: functional ATen with every named dimension symbolic.

``torch.export``, non-strict and without gradients, under the spellings that export well; the model is handed back as it was
found.  What the example's sizes became constants of is found out and said.
"""

from __future__ import annotations

import inspect
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, fx, nn
from torch._dynamo.exc import UserError
from torch.export import Dim as ExportDim
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from surgeon.caches import SUM
from surgeon.errors import TraceError
from surgeon.experts import use_semantic_experts
from surgeon.functional import is_functional
from surgeon.ops.attention import flexible_attention
from surgeon.source import LoadedSource, size_of
from surgeon.symbolic_sizes import symbolic_sizes
from surgeon.unrolling import Site, decisions, overrun, unrolled

Dims = Mapping[str, Mapping[int, str]]
"""For each input, its dimensions that vary and their names."""
Varying = Mapping[str, Mapping[int, str] | Sequence[str | None] | None]
"""The same as a caller may say it: ``{0: "batch"}``, or a name or None for every dimension, or None where all are fixed."""


def export(loaded: LoadedSource, example: Mapping[str, Tensor], dims: Dims, returned: list[Any]) -> ExportedProgram:
    """Export in functional ATen, every named dimension symbolic.

    Args:
        loaded: its module in evaluation mode.
        example: inputs by name, no dynamic dimension of size 0 or 1.
        dims: the dynamic dimensions.
        returned: what the model returns is appended, as ``loaded.call`` hands it out.

    Raises:
        TraceError: the model cannot be exported, or fixes a dimension that was to vary.
    """
    module = loaded.module
    try:
        with _exportable(module):
            return _export_unrolled(loaded, example, dims, returned)
    except TraceError:
        raise
    except Exception as error:  # torch.export raises many unrelated classes
        if dims and "specialized it to be a constant" in str(error):
            with _exportable(module):
                _explain_specialised(loaded, example, dims, error)
        raise TraceError(f"torch.export could not trace {type(module).__name__}: {first_lines(error)}") from error


def _export_unrolled(
    loaded: LoadedSource, example: Mapping[str, Tensor], dims: Dims, returned: list[Any]
) -> ExportedProgram:
    """Export as the model is; where Python asks for data, as if every expert had tokens."""
    try:
        return _export_with(loaded, example, dims, ExportDim.DYNAMIC, returned)
    except (GuardOnDataDependentSymNode, UserError) as error:
        if "data-dependent" not in str(error):
            raise
    lengths: dict[int, int] = {}
    try:
        with unrolled():
            return _export_with(loaded, example, dims, ExportDim.DYNAMIC, returned)
    except IndexError as error:
        lengths = overrun(error) or {}
        if not lengths:
            raise
    except Exception:  # what the model does where every condition holds may fail in any way
        taken = _decisions(loaded, example)
        if not taken:
            raise
        with unrolled(taken=taken) as decided:
            program = _export_with(loaded, example, dims, ExportDim.DYNAMIC, returned)
        loaded.notes += tuple(f"{text}, as on the example" for text in dict.fromkeys(decided))
        return program
    with unrolled(lengths):
        return _export_with(loaded, example, dims, ExportDim.DYNAMIC, returned)


def _decisions(loaded: LoadedSource, example: Mapping[str, Tensor]) -> Mapping[Site, list[bool]]:
    """What the model decides on data on the example; nothing where its weights have no values."""
    if loaded.source.weights == "fake":
        return {}
    with torch.no_grad(), decisions() as taken:
        loaded.call(loaded.module, example)
    return taken


def _export_with(
    loaded: LoadedSource, example: Mapping[str, Tensor], dims: Dims, hint: Any, returned: list[Any]
) -> ExportedProgram:
    module = loaded.module
    given = {identifier(name): tensor for name, tensor in example.items()}
    shapes = {identifier(name): dict.fromkeys(chosen, hint) for name, chosen in dims.items()}
    # torch prints what it had traced of a model that it cannot trace, hundreds of lines; another attempt may follow
    silent = patch("torch.export._trace.print", lambda *_, **__: None, create=True)
    with torch.no_grad(), silent, _flat_forward(loaded, example, dims, returned), warnings.catch_warnings():
        # torch copies its own deprecated tree leaves while it decomposes
        warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
        # what a model remembers in an attribute is put back by the export; that nothing depends on it is compared below
        warnings.filterwarnings("ignore", r"The tensor attributes? .* assigned during export", UserWarning)
        program = torch.export.export(module, (), given, strict=False, dynamic_shapes=shapes)
        return program if is_functional(program.graph) else program.run_decompositions({})


def _explain_specialised(loaded: LoadedSource, example: Mapping[str, Tensor], dims: Dims, error: Exception) -> None:
    """Find out, by an export that may choose, which dimensions the model fixes; raises where there are any."""
    try:
        program = _export_with(loaded, example, dims, ExportDim.AUTO, [])
    except Exception as second:
        raise TraceError(f"torch.export could not trace {type(loaded.module).__name__}: {first_lines(second)}") from second
    refuse_specialised(placeholders(program.module(check_guards=False)), dims, error)


def refuse_specialised(values: Mapping[str, Tensor], dims: Dims, error: Exception | None = None) -> None:
    """Raise where a dimension that was to vary is a number among the values of the inputs."""
    fixed = [
        (name, dim, label, int(values[identifier(name)].shape[dim]))
        for name, chosen in dims.items()
        for dim, label in chosen.items()
        if not is_symbol(values[identifier(name)].shape[dim])
    ]
    if fixed:
        which = "; ".join(f"dimension {d} ({label!r}) of input {n!r} is always {size}" for n, d, label, size in fixed)
        pins = {n: {d: label for d, label in dims[n].items() if (n, d) not in {f[:2] for f in fixed}} for n, *_ in fixed}
        raise TraceError(
            f"the model cannot vary a dimension that was to be dynamic: {which}. Fix it with "
            f"dynamic={ {n: chosen or None for n, chosen in pins.items()} }, or remove the constant from the model"
        ) from error


@contextmanager
def _flat_forward(
    loaded: LoadedSource, example: Mapping[str, Tensor], dims: Dims, returned: list[Any]
) -> Iterator[None]:
    """Give the module a forward with exactly these inputs that returns a flat tuple of tensors."""
    module = loaded.module
    original = module.forward
    names = {identifier(name): name for name in example}
    groups: dict[str, list[tuple[str, int]]] = {}
    for name, chosen in dims.items():
        for dim, label in chosen.items():
            groups.setdefault(label, []).append((name, dim))

    def forward(**given: Tensor) -> tuple[Tensor, ...]:
        inputs = {names[name]: tensor for name, tensor in given.items()}
        sizes = {label: inputs[group[0][0]].shape[group[0][1]] for label, group in groups.items()}
        for label, group in groups.items():
            for other, position in group[1:]:  # one name, one symbol
                torch._check(sizes[label] == inputs[other].shape[position])  # type: ignore[no-untyped-call]
            if SUM in label:
                torch._check(sizes[label] == size_of(label, sizes, sizes[label]))  # type: ignore[no-untyped-call]
        returned.append(loaded.call(original, inputs))
        return tuple(returned[-1][0].values())

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    signature = inspect.Signature([inspect.Parameter(name, kind) for name in names])
    forward.__signature__ = signature  # type: ignore[attr-defined]  # functions take attributes
    had = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if had is not None:
            module.__dict__["forward"] = had


@contextmanager
def _exportable(module: nn.Module) -> Iterator[None]:
    """Switch the model to the spellings that export well; everything is put back on leaving."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # a fused encoder layer would hide its parts
    with ExitStack() as stack:
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        if "transformers" in sys.modules:
            stack.enter_context(_library_patches())
            stack.enter_context(_sdpa(module))
        stack.enter_context(use_semantic_experts(module))
        stack.enter_context(_settled())
        stack.enter_context(_spelled_flex_attention())
        stack.enter_context(symbolic_sizes())
        yield


@contextmanager
def _settled() -> Iterator[None]:
    """A module that its owner's forward moves to the type and device it has already stays as it is.

    Moving it would replace its parameters, which an export cannot follow.
    """
    original = nn.Module.to

    def to(self: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        tensors = [*self.parameters(), *self.buffers()]
        types = {t.dtype for t in tensors if t.is_floating_point()}
        devices = {t.device.type for t in tensors}
        same = (dtype is None or types <= {dtype}) and (device is None or devices <= {device.type})
        return self if same else original(self, *args, **kwargs)

    nn.Module.to = to  # type: ignore[method-assign, assignment]  # put back below
    try:
        yield
    finally:
        nn.Module.to = original  # type: ignore[method-assign]  # the original


@contextmanager
def _spelled_flex_attention() -> Iterator[None]:
    """``flex_attention`` as the products, the mask and the softmax that it is (``surgeon.ops.attention``).

    Its functions of scores and positions are nested graphs otherwise, and a canonical graph is flat.
    """
    home = sys.modules.get("torch.nn.attention.flex_attention")
    if home is None:
        yield
        return
    with patch.object(home, "flex_attention_hop", flexible_attention):
        yield


@contextmanager
def _library_patches() -> Iterator[None]:
    """The library's own export patches, of those modules that are loaded (the others would only be imported)."""
    from transformers.exporters import exporter_dynamo, utils

    del exporter_dynamo  # imported for the patches it registers
    found: list[tuple[Any, str, Callable[..., Any]]] = []
    registered: list[tuple[Any, str, Callable[..., Any]]] = list(utils._PATCHES.get("dynamo", []))
    for owner, attribute, factory in registered:
        if not isinstance(owner, str):  # older versions of the library import all of them
            found.append((owner, attribute, factory))
            continue
        parts = owner.split(".")
        if any(".".join(parts[:n]) in sys.modules for n in range(len(parts), max(len(parts) - 2, 0), -1)):
            target = utils.import_dotted_path(owner, missing_ok=True)
            if target is not None and hasattr(target, attribute):
                found.append((target, attribute, factory))
    with utils.patch_attributes(found):
        yield


@contextmanager
def _sdpa(module: nn.Module) -> Iterator[None]:
    """Attention as one scaled-dot-product node, where the model has that form and returns no attention maps."""
    from transformers import PreTrainedModel

    models = [m for m in module.modules() if isinstance(m, PreTrainedModel)]
    before = [(m.config, m.config._attn_implementation) for m in models]
    # From the outside in, every one: what is set on a model's configuration is set on those of the models in it.
    for model, (config, implementation) in zip(models, before, strict=True):
        fits = model._supports_sdpa and not getattr(config, "output_attentions", False)
        config._attn_implementation = "sdpa" if fits else implementation
    try:
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation = implementation


def is_symbol(size: Any) -> bool:
    """Whether a size varies."""
    return isinstance(size, torch.SymInt) and not size.node.expr.is_Integer


def identifier(name: str) -> str:
    """A port's name as the name of an argument."""
    return name.replace(".", "_")


def placeholders(module: fx.GraphModule) -> dict[str, Tensor]:
    """Values of a graph's inputs, by identifier."""
    return {str(node.target): node.meta["val"] for node in module.graph.nodes if node.op == "placeholder"}


def first_lines(error: Exception, lines: int = 4) -> str:
    """Beginning of an error's message, or its place where it has none."""
    text = "\n".join([line for line in str(error).splitlines() if line.strip()][:lines])
    if text:
        return text
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/torch/" not in frame.filename]
    place = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}: {frames[-1].line}" if frames else ""
    return f"{type(error).__name__}{place}"
