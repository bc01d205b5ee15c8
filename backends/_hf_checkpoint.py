"""From a rewritten graph to a checkpoint of the transformers library: planned without memory, then written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import isclose, prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surgeon.backends._hf_contents import ENGINES, Contents, Held, as_is, read
from surgeon.backends._hf_fit import Fitted, fit
from surgeon.backends._hf_low_bit import low_bit_refusals, quantization_config, read_at_loading, stored, whole_refusals
from surgeon.backends._hf_mixture import reshaped
from surgeon.backends._hf_skeleton import Skeleton, known
from surgeon.channels import UNTIED
from surgeon.contract import Refusal
from surgeon.discovery import discover
from surgeon.graph import Graph, Source
from surgeon.routes import RECORDED, REPLAYED
from surgeon.structure import Structure

_BESIDE = ("*.json", "*.txt", "*.model", "*.jinja")
"""What else lies in a checkpoint: tokenizer, processors, chat templates, pooling of sentence encoders."""
_OWN = ("config.json", "*.index.json", "plan.json", "report.json", "surgeon.json")
"""Files among these that belong to the weights, or to a build of surgeon."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that is still to be written.

    Attributes:
        fitted: class and configuration, and which tensor goes where.
        contents: the tensors.
        fill: entries of the state dict that the graph does not read, by where they are taken from: the source's own
            name for them.
        whole: low-bit linears are given their weights as the checkpoint is loaded, not at the first forward.
    """

    fitted: Fitted
    contents: Contents
    fill: Mapping[str, str]
    whole: bool = False


def plan(graph: Graph, *, architecture: str, repeat_merged: bool) -> Checkpoint | list[Refusal]:
    """The checkpoint that a graph is, or everything that keeps it from being one.

    Args:
        graph: the graph; stays as it is.
        architecture: family of a mixture that the source does not have, ``auto`` for the first that fits.
        repeat_merged: see :func:`surgeon.backends._hf_contents.read`.
    """
    source = graph.source
    if not source.config or not known(source.model_class):
        reason = f"the source is {source.description}, not a model of the transformers library; {ENGINES} take any model"
        return [Refusal("model", reason, lasting=True)]
    assert source.model_class is not None
    routed = [port.name for port in (*graph.inputs, *graph.outputs) if port.role in (RECORDED, REPLAYED)]
    if routed:
        return [Refusal(name, f"{source.model_class} has no such input or output; {ENGINES} have it") for name in routed]
    skeleton = Skeleton.build(source.model_class, source.config)
    if isinstance(skeleton, str):
        reason = f"{source.model_class} cannot be built from the source's configuration: {skeleton}"
        return [Refusal("model", reason, lasting=True)]
    structure = discover(graph)
    skipping = [site.name for site in structure.moes() if site.part.masked]
    if skipping:
        reason = f"it skips chosen experts at run time, which no configuration says; {ENGINES} run it"
        return [Refusal(name, reason) for name in skipping]
    contents = read(graph, {*skeleton.shapes, *skeleton.buffers}, repeat_merged=repeat_merged)
    for name in skeleton.buffers:
        contents.held.pop(name, None)  # made by the class, not stored
    for name, shape in skeleton.shapes.items():
        if name in contents.held and len(shape) > 2 and set(shape[2:]) == {1}:
            contents.held[name] = _as_kernel(contents.held[name], len(shape))
        elif name not in contents.held and f"{name}_0" in contents.extra:
            _join(graph, contents, name, shape)
    _name_untied(graph, contents, skeleton)
    whole = reshaped(graph, structure, skeleton, contents, architecture)
    if isinstance(whole, list):
        return whole
    skeleton, contents = whole
    refusals = list(contents.refusals)
    for name in sorted(contents.extra):
        whole_name = next((known for known in skeleton.shapes if name.startswith(known) and known not in contents.held), None)
        what = f"it stands for a part of {whole_name}, where the format has one matrix" if whole_name else "a pass added it"
        advice = ""
        if not whole_name and _multiplies_an_activation(graph, name):
            what = "a pass multiplies an activation by it, which no weight in front could take"
            advice = "; pass smooth leaves such inputs alone with insert: false"
        refusals.append(Refusal(name, f"{what}; {skeleton.model_class} has no such tensor, {ENGINES} run it{advice}"))
    refusals += low_bit_refusals(skeleton, contents)
    if refusals:
        return refusals
    fitted = fit(skeleton, contents, _head_sizes(structure))
    if isinstance(fitted, list):
        return fitted
    lost = sorted(set(contents.held) - set(fitted.origin.values()))
    if lost:
        reason = f"{skeleton.model_class} has no place for it under {_text(fitted.changes)}; {ENGINES} run it"
        return [Refusal(name, reason) for name in lost]
    if others := _other_numbers(graph, skeleton, fitted):
        return others
    fill = _unread(fitted, contents.held)
    if isinstance(fill, list):
        return fill
    own = read_at_loading(fitted, contents) if contents.low_bit else None
    if own is not None:
        if refusals := whole_refusals(fitted.skeleton, contents, own):
            return refusals
        contents.notes.append(
            f"{fitted.skeleton.model_class} reads {own} itself as it is loaded: low-bit linears become floats in memory then"
        )
    return Checkpoint(fitted, contents, fill, whole=own is not None)


def _multiplies_an_activation(graph: Graph, name: str) -> bool:
    """Whether a stored tensor is a factor of something computed, and nothing else."""
    users = [user for node in graph.module.graph.find_nodes(op="get_attr", target=name) for user in node.users]
    factors = [part for user in users if user.target is torch.ops.aten.mul.Tensor for part in user.all_input_nodes]
    return bool(users) and len(factors) == 2 * len(users) and sum(part.op == "get_attr" for part in factors) == len(users)


def _head_sizes(structure: Structure) -> dict[str, int]:
    """Size of one head by the name of every tensor of an attention's projections."""
    found = {}
    for site in structure.attentions():
        for part in (site.part, *site.part.parts):
            for linear in (part.q, part.k, part.v, part.o):
                if linear is not None:
                    found.update(dict.fromkeys((linear.weight, *([linear.bias] if linear.bias else [])), part.head_dim))
    return found


def _join(graph: Graph, contents: Contents, name: str, shape: tuple[int, ...]) -> None:
    """The parts of a tensor that the source has as one (surgeon.projections), side by side again, where they fit."""
    names = [part for part in (f"{name}_{i}" for i in range(len(contents.extra))) if part in contents.extra]
    tensors = [graph.tensor(part).detach() for part in names]
    if sum(tensor.numel() for tensor in tensors) == prod(shape):
        contents.extra.difference_update(names)
        contents.held[name] = Held(shape, lambda: torch.cat([t.reshape(-1, *shape[1:]) for t in tensors]))


def _name_untied(graph: Graph, contents: Contents, skeleton: Skeleton) -> None:
    """A tensor that a pass has made of one that two parts read goes under the name that the class has for the second."""
    for first in set(skeleton.twins.values()):
        twins = [name for name, other in skeleton.twins.items() if other == first and name not in contents.held]
        own = f"{first}{UNTIED}"
        if len(twins) == 1 and own in contents.extra:
            contents.extra.remove(own)
            contents.held[twins[0]] = as_is(graph.tensor(own))


def _as_kernel(held: Held, rank: int) -> Held:
    """A matrix [out, in] as the kernel of one position [out, in, 1 ...] that the source has; any other tensor as it is."""
    if len(held.shape) != 2 or held.key is None:
        return held
    shape = (*held.shape, *[1] * (rank - 2))
    return held._replace(shape=shape, make=lambda: held.make().reshape(shape))


def _other_numbers(graph: Graph, source: Skeleton, fitted: Fitted) -> list[Refusal]:
    """Numbers that the class makes of what has changed in its configuration, and that the graph has as they were before."""
    before: dict[str, set[float]] = {}
    for name, number in source.numbers.items():
        before.setdefault(_place(name), set()).add(number)
    refusals = []
    read: set[float] | None = None
    for name, number in fitted.skeleton.numbers.items():
        known = before.get(_place(name), {number})
        if number in known:
            continue
        read = _constants(graph) if read is None else read
        kept = [value for value in known if any(isclose(value, constant, rel_tol=1e-2) for constant in read)]  # of 8 bits
        if kept:
            reason = (
                f"{source.model_class} makes it of its configuration: {number:.6g} under {_text(fitted.changes)}, and the "
                f"graph computes with {kept[0]:.6g}; {ENGINES} run it"
            )
            refusals.append(Refusal(name, reason))
    return refusals


def _constants(graph: Graph) -> set[float]:
    """Floating-point numbers that the graph computes with, written down or stored."""
    tensors = graph.parameters().values()
    single = {tensor.item() for tensor in tensors if tensor.numel() == 1 and tensor.is_floating_point()}
    return single | {value for node in graph.module.graph.nodes for value in node.args if type(value) is float}


def _unread(fitted: Fitted, held: Mapping[str, Held]) -> dict[str, str] | list[Refusal]:
    """Tensors that the class holds and the graph does not read.

    The source may not read them either (a pooler whose output is not used): then it is so in every layer.  Where it is so
    in some layers only, a pass has taken a part of the layer away.
    """
    shapes, origin, twins = fitted.skeleton.shapes, fitted.origin, fitted.skeleton.twins
    read_somewhere = {_place(name) for name in shapes if origin[name] in held}
    present = {twins.get(name, name) for name in shapes if origin[name] in held}
    missing = [name for name in shapes if origin[name] not in held and twins.get(name, name) not in present]
    taken = [name for name in missing if _place(name) in read_somewhere]
    if taken:
        reason = f"nothing reads it any more, and {fitted.skeleton.model_class} has it in every layer; {ENGINES} leave it out"
        return [Refusal(origin[name], reason) for name in taken]
    return {name: origin[name] for name in missing if name not in twins}


def _place(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _text(changes: Mapping[str, tuple[object, object]]) -> str:
    return ", ".join(f"{name}: {after}" for name, (_, after) in changes.items()) or "the source's configuration"


# -- writing ------------------------------------------------------------------------------------------------------


def write(checkpoint: Checkpoint, graph: Graph, folder: Path, shard: str) -> dict[str, Any]:
    """Write configuration, weights, generation settings and what lies beside them.

    Args:
        checkpoint: what to write.
        graph: the graph it was planned for.
        folder: exists, empty.
        shard: largest size of one file, e.g. ``5GB``.

    Returns:
        Facts for the report.
    """
    fitted, contents = checkpoint.fitted, checkpoint.contents
    model = fitted.skeleton.instance()
    state: dict[str, Tensor] = {}
    for name in fitted.skeleton.shapes:
        own = fitted.origin[name]
        if own in contents.low_bit:
            state |= stored(graph, model, name, contents.low_bit[own])
        elif own in contents.held:
            state[name] = contents.held[own].make()
    filled = _filled(checkpoint.fill, fitted, graph.source, state)
    for name, first in fitted.skeleton.twins.items():
        if name in state and first not in state:
            state[first] = state[name]
        state.pop(name, None)  # the class ties it when it is loaded
    count = len(state)  # the library empties it as it writes
    types = [tensor.dtype for tensor in state.values() if tensor.is_floating_point()]
    dtype = max(set(types), key=types.count) if types else torch.float32
    with quiet():
        model.to(dtype)  # on the meta device: the type that the configuration names
        _generation(model, graph.source)
        if contents.low_bit:
            model.config.quantization_config = quantization_config(fitted, contents, checkpoint.whole)
        original = not contents.low_bit  # see _hf_low_bit: beside low-bit linears experts stay stacked
        model.save_pretrained(folder, state_dict=state, max_shard_size=shard, save_original_format=original)
    for weights in folder.glob("*.safetensors"):  # safetensors lets nobody but the owner read what it writes
        shutil.copymode(folder / "config.json", weights)
    beside = _beside(graph.source, folder)
    return {
        "architecture": fitted.skeleton.model_class,
        "model_type": str(fitted.skeleton.config.get("model_type")),
        "configuration": {name: {"before": a, "after": b} for name, (a, b) in fitted.changes.items()},
        "tensors": count,
        "low_bit": len(contents.low_bit),
        "unread": filled,
        "beside": beside,
        "notes": list(contents.notes),
    }


def _filled(fill: Mapping[str, str], fitted: Fitted, source: Source, state: dict[str, Tensor]) -> list[str]:
    """Add what no output depends on: from the source's files, else zeros."""
    if not fill:
        return []
    own: dict[str, Tensor] = {}
    if source.path is not None:
        from surgeon.checkpoint import load_checkpoint

        module = load_checkpoint(Path(source.path), dtype=None, trust_remote_code=False)[0]
        own = module.state_dict()
    for name, origin in fill.items():
        found = own.get(origin)
        shape = fitted.skeleton.shapes[name]
        state[name] = found if found is not None and tuple(found.shape) == shape else torch.zeros(shape)
    return sorted(fill)


def _generation(model: Any, source: Source) -> None:
    """The source's own generation settings, where it has a file of them."""
    if source.path is not None and (Path(source.path) / "generation_config.json").is_file() and model.can_generate():
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(source.path)


def _beside(source: Source, folder: Path) -> list[str]:
    """Copy tokenizer, processor and pooling files."""
    if source.path is None:
        return []
    root = Path(source.path)
    copied = []
    for file in sorted(file for pattern in _BESIDE for file in (*root.glob(pattern), *root.glob(f"[0-9]*/{pattern}"))):
        name = file.relative_to(root)
        own = len(name.parts) == 1 and any(name.match(pattern) for pattern in _OWN)
        if own or (folder / name).exists():
            continue
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(file, folder / name)
        copied.append(str(name))
    return copied


@contextmanager
def quiet() -> Iterator[None]:
    """The library without progress bars and warnings."""
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


def configuration(folder: Path) -> dict[str, Any]:
    """The configuration that was written."""
    data: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return data
