"""Source model -> canonical Graph.

``torch.export`` (non-strict, dynamic shapes, without gradients) -> functional ATen -> :func:`canonicalise` ->
comparison with the source model on inputs of other sizes.  The source model is handed back as it was found.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from surgeon.ambient import own_modes
from surgeon.caches import PAST, SUM
from surgeon.canonical import canonicalise
from surgeon.complex_numbers import spell_in_pairs
from surgeon.errors import TraceError, nearest
from surgeon.example_inputs import default_dims
from surgeon.export import Dims, Varying, export, first_lines, identifier, is_symbol, placeholders, refuse_specialised
from surgeon.graph import Dim, Graph, Port
from surgeon.positions import bounded, table_length
from surgeon.projections import flatten_projections
from surgeon.raising import raise_attention, raise_mixtures
from surgeon.rounding import fits_in_float64, in_float64, widened
from surgeon.source import LoadedSource, calling, load_source, resized

_ROUNDING = 100
"""Times the tolerance up to which a difference may turn out to be rounding."""
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest accepted max|graph - source| / max|source| by the coarsest floating-point type of the weights: about 80
units in the last place; reordered sums in attention kernels reach a tenth of it."""


@own_modes()
def trace(
    model: str | Path | nn.Module,
    inputs: Mapping[str, Any] | None = None,
    *,
    task: str | None = None,
    dtype: str | torch.dtype | None = None,
    weights: str = "real",
    dynamic: Varying | None = None,
    trust_remote_code: bool = False,
) -> Graph:
    """Trace a source model to its canonical graph.

    Args:
        model: a checkpoint directory, a hub id, ``"package.module:callable"``, or a module.
        inputs: example keyword inputs; optional for models of the transformers library.  Tensors in mappings, tuples and
            lists become inputs of their own, named by where they stand (``batch.query.ids``); what is no tensor (None, a flag,
            a number) is the same in every call and becomes a part of the graph.
        task: ``"forward"``: the model as it is called, without caches; ``"text-generation"``: a causal language model or an
            encoder-decoder with its key/value caches as inputs and outputs.  By default forward for a module, and for a
            checkpoint what its architecture is for.
        dtype: type of the floating-point weights, ``None`` for the model's own.
        weights: ``"fake"`` traces without the values of the weights, in the memory of the graph alone: a checkpoint is
            built from its config.json.  The graph can be discovered and inspected, not run, and is not compared with the
            source.
        dynamic: for each input named here, which of its dimensions vary and under which name (dimensions of one name
            have one size): ``{0: "batch"}``, or ``["batch", None]`` with one entry for every dimension, or None where all
            are fixed.  By default the first dimension of every input is ``batch`` and
            the second of two-dimensional integer inputs is ``sequence``.
        trust_remote_code: allow a checkpoint to bring its own Python code.

    Returns:
        The canonical graph: equal to the model within 1e-5 relative (float32), over the same weight tensors.  Over fake
        weights (also of a module that was built under ``surgeon.fake_weights`` or on the meta device) equality is not
        proven; ``graph.source.weights`` says so.

    Raises:
        TraceError: the model could not be loaded, run, exported or reproduced, or a dynamic dimension cannot vary.

    Example:
        >>> graph = trace("my-model")
        >>> graph(input_ids=ids, attention_mask=mask)["logits"]
    """
    loaded = load_source(
        model, inputs, task=task, dtype=dtype, weights=weights, trust_remote_code=trust_remote_code
    )
    return trace_source(loaded, dynamic=dynamic)


def trace_source(loaded: LoadedSource, *, dynamic: Varying | None = None) -> Graph:
    """Trace a source that is loaded already; see :func:`trace`."""
    _refuse_quantized(loaded)
    dims = _dims(loaded.inputs, dynamic, loaded.causal.dims if loaded.causal else loaded.dims)
    example = _at_least_two(loaded.inputs, dims)
    with calling(loaded.module):
        fake = loaded.source.weights == "fake"
        expected = {} if fake else _call(loaded, example, "its example inputs")
        returned: list[tuple[dict[str, Tensor], str]] = []
        program = export(loaded, example, dims, returned)
        outputs, output_class = returned.pop()
        loaded.source = replace(loaded.source, output_class=output_class)
        exported = program.module(check_guards=False)
        module = canonicalise(exported, [identifier(name) for name in example], _tensors(loaded.module))
        graph = _graph(module, program, example, dims, list(outputs), loaded)
        _refuse_missing(graph, loaded)
        graph = spell_in_pairs(graph)
        graph, left = raise_mixtures(graph, adopt=loaded.source.path is not None)
        graph = graph.with_source(left=left)
        flatten_projections(graph, left)
        spelled = raise_attention(graph)
        loaded.notes += tuple(f"{name}: attention over a cache stays as it is: {why}" for name, why in spelled.items())
        if fake:  # no numbers to compare
            return graph
        graph = bounded(graph)
        if (length := table_length(graph)) is not None:
            graph = graph.with_source(generation={**graph.source.generation, "table_length": length})
        _compare(graph, loaded, expected, example, "the example")
        for sizes in _other_sizes(graph, example, dims):
            other = resized(example, dims, sizes, pad=True)
            where = ", ".join(f"{name} {size}" for name, size in sizes.items())
            reference = _call(loaded, other, f"inputs of {where} (fix a dimension that cannot vary with dynamic=)")
            _compare(graph, loaded, reference, other, where)
    return graph


def _refuse_quantized(loaded: LoadedSource) -> None:
    """Raise where a checkpoint's weights are codes of few bits that its class unpacks as it runs."""
    quantizer = getattr(loaded.module, "hf_quantizer", None)  # gone where they were unpacked as they were loaded
    if quantizer is not None:
        method = getattr(quantizer.quantization_config, "quant_method", type(quantizer).__name__)
        raise TraceError(
            f"{loaded.source.description}: its weights are quantized already ({getattr(method, 'value', method)}, see "
            "quantization_config in config.json), and a pass works on floats: give the checkpoint that it was made from; where "
            "its library can unpack them, save the unpacked model first"
        )


# -- dimensions -------------------------------------------------------------------------------------------------------

def _dims(
    inputs: Mapping[str, Tensor], dynamic: Varying | None, own: Dims
) -> Dims:
    """The dynamic dimensions of every input: the task's own or the defaults, replaced input by input by the caller's."""
    dims = {name: own[name] if name in own else default_dims(name, tensor) for name, tensor in inputs.items()}
    for name, chosen in (dynamic or {}).items():
        if name not in inputs:
            raise TraceError(f"dynamic names an input {name!r} that the model does not take; {nearest(name, inputs)}")
        dims[name] = _chosen(name, list(inputs[name].shape), chosen)
    sizes: dict[str, tuple[str, int]] = {}
    for name, chosen in dims.items():
        for dim, label in chosen.items():
            other, size = sizes.setdefault(label, (name, inputs[name].shape[dim]))
            if inputs[name].shape[dim] != size:
                raise TraceError(
                    f"dimension {label!r} is {size} in input {other!r} and {inputs[name].shape[dim]} in input {name!r} "
                    f"(dimension {dim}); name it otherwise or fix it, e.g. dynamic={{{name!r}: None}}"
                )
    return dims


def _chosen(name: str, shape: Sequence[int], said: Any) -> dict[int, str]:
    """The dimensions of one input that a caller says vary."""
    rank = len(shape)
    if isinstance(said, Mapping):
        wrong = [dim for dim in said if dim not in range(rank)]
        if wrong:
            known = f"dimensions 0 to {rank - 1}" if rank else "no dimensions"
            raise TraceError(f"dynamic: input {name!r} of shape {shape} has {known}, found {wrong[0]!r}")
        return dict(said)
    labels = [None] * rank if said is None else said
    if isinstance(labels, str) or len(labels) != rank:
        raise TraceError(
            f"dynamic: input {name!r} has the shape {shape}, so that {rank} names are needed, one for every dimension, null "
            f"(None) where it is fixed; found {labels!r}"
        )
    return {dim: label for dim, label in enumerate(labels) if label is not None}


def _sizes(inputs: Mapping[str, Tensor], dims: Dims) -> dict[str, int]:
    return {label: inputs[name].shape[dim] for name, chosen in dims.items() for dim, label in chosen.items()}


def _at_least_two(inputs: Mapping[str, Tensor], dims: Dims) -> dict[str, Tensor]:
    """Example inputs without sizes 0 and 1 in dynamic dimensions, which export would take for constants."""
    small = {label: 2 for label, size in _sizes(inputs, dims).items() if size < 2}
    return resized(inputs, dims, small) if small else dict(inputs)


def _other_sizes(graph: Graph, example: Mapping[str, Tensor], dims: Dims) -> list[dict[str, int]]:
    """Further sets of sizes: a batch of 3 and of 1, other dimensions halved (or doubled, where odd); caches empty too."""
    first = {chosen[0] for chosen in dims.values() if 0 in chosen}
    found = []
    for batch in (3, 1):
        sizes = {}
        for label, size in _sizes(example, dims).items():
            if label not in graph.dims:
                continue  # a sum of others
            wanted = batch if label in first else size // 2 if size % 2 == 0 and size > 3 else 2 * size
            bounds = graph.dims[label]
            sizes[label] = max(bounds.min, min(wanted, bounds.max or wanted))
        found.append(sizes)
    if PAST in graph.dims:  # prefill, and one token behind a long past
        new = "target" if "target" in graph.dims else "sequence"
        found = [found[0] | {PAST: 0}, found[1] | {PAST: 0, new: 1}, found[0] | {new: 1}]
    return found if graph.dims else []


# -- result -----------------------------------------------------------------------------------------------------------


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _graph(
    module: fx.GraphModule,
    program: ExportedProgram,
    example: Mapping[str, Tensor],
    dims: Dims,
    outputs: list[str],
    loaded: LoadedSource,
) -> Graph:
    values = placeholders(module)
    refuse_specialised(values, dims)
    names: dict[Any, str] = {}
    ranges: dict[str, Dim] = {}
    for name, chosen in dims.items():
        for dim, label in chosen.items():
            size: Any = values[identifier(name)].shape[dim]
            symbol = size.node.expr
            names[symbol] = label
            if SUM not in label:
                ranges[label] = _range(label, program.range_constraints.get(symbol))
    roles = loaded.causal.roles if loaded.causal else {}
    ports_in = [
        Port(name, tensor.dtype, tuple(dims[name].get(d, size) for d, size in enumerate(tensor.shape)), roles.get(name, ""))
        for name, tensor in example.items()
    ]
    ports_out = []
    results = module.graph.output_node().args[0]
    for name, node in zip(outputs, results, strict=True):  # type: ignore[arg-type]  # canonicalise returns a tuple
        value = node.meta["val"]
        shape = tuple(_size(size, names) for size in value.shape)
        ports_out.append(Port(name, value.dtype, shape, roles.get(name, "")))
    return Graph(module, ports_in, ports_out, ranges, example, loaded.source)


def _range(label: str, found: Any) -> Dim:
    """Export never looks below 2; whether 1 is right too is compared with the source."""
    least = 0 if label == PAST else 1
    if found is None:
        return Dim(label, least)
    lower = int(found.lower)
    finite = getattr(found.upper, "is_Integer", False) and int(found.upper) < sys.maxsize - 1
    return Dim(label, least if lower <= 2 else lower, int(found.upper) if finite else None)


def _size(size: Any, names: Mapping[Any, str]) -> int | str:
    return names.get(size.node.expr, "?") if is_symbol(size) else int(size)


def _refuse_missing(graph: Graph, loaded: LoadedSource) -> None:
    needed = sorted(set(loaded.missing) & set(graph.parameters()))
    if needed:
        raise TraceError(
            f"the checkpoint {loaded.source.path} lacks {len(needed)} weights that the model reads (they would be "
            f"random): {', '.join(needed[:20])}{' ...' if len(needed) > 20 else ''}; is 'architectures' in its "
            "config.json the class it was saved from?"
        )


# -- comparison -------------------------------------------------------------------------------------------------------


def _call(loaded: LoadedSource, inputs: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    try:
        with torch.no_grad():
            return loaded.call(loaded.module, inputs)[0]
    except TraceError:
        raise  # says more
    except Exception as error:  # a model may raise anything
        shapes = ", ".join(f"{name} {list(tensor.shape)} {tensor.dtype}" for name, tensor in inputs.items())
        raise TraceError(
            f"{type(loaded.module).__name__} fails on {what} ({shapes}): {type(error).__name__}: {first_lines(error)}"
        ) from error


def _compare(
    graph: Graph, loaded: LoadedSource, expected: Mapping[str, Tensor], inputs: Mapping[str, Tensor], where: str
) -> None:
    """Refuse a graph that does not compute what the source computes."""
    try:
        with torch.no_grad():
            found = graph(**inputs)
    except (RuntimeError, IndexError) as failure:  # an operator does not accept what the example's took
        raise TraceError(
            f"the traced graph fails at {where}: {first_lines(failure)}. A size or a value of the example became a "
            "constant of the graph; fix the dimensions (dynamic={input: None}) or trace another part of the model"
        ) from failure
    types = [t.dtype for t in graph.parameters().values() if t.is_floating_point()]
    types += [t.dtype for t in expected.values() if t.is_floating_point()]
    tolerance = max((_TOLERANCE.get(dtype, 5e-2) for dtype in types), default=1e-5)
    errors = {name: relative_error(found[name], reference) for name, reference in expected.items()}
    off = {name: error for name, error in errors.items() if not error <= tolerance}
    rounded = _rounded(graph, loaded, inputs, {name: error for name, error in off.items() if error <= _ROUNDING * tolerance})
    for name, error in off.items():
        if name not in rounded:
            raise TraceError(
                f"the traced graph does not reproduce the source model at {where}: output {name!r} differs by "
                f"{error:.3g} relative, at most {tolerance:g} is accepted. The model's Python code takes another path "
                "at these sizes or values, or its result is random; fix the dimensions (dynamic={input: None}) or "
                "trace another part of it"
            )


def _rounded(
    graph: Graph, loaded: LoadedSource, inputs: Mapping[str, Tensor], errors: Mapping[str, float]
) -> frozenset[str]:
    """Outputs that differ by a tenth at most of what they did (``errors``), once graph and source compute in float64."""
    modules = (loaded.module, graph.module)
    if not errors or not fits_in_float64(*modules):
        return frozenset()
    with in_float64(*modules), torch.no_grad():
        wide = widened(inputs)
        try:
            expected = loaded.call(loaded.module, wide)[0]
            found = graph(**wide)
        except (RuntimeError, ValueError, TypeError, TraceError):  # types that are written down in the model do not fit
            return frozenset()
    limit = _TOLERANCE[torch.float32]
    return frozenset(n for n, e in errors.items() if relative_error(found[n], expected[n]) <= min(e, limit) / 10)


def relative_error(found: Tensor, reference: Tensor) -> float:
    """max|found - reference| / max|reference|; infinite where shapes, or the places of NaN and infinity, differ.

    Args:
        found: any shape and type.
        reference: the same shape.
    """
    if found.shape != reference.shape or found.dtype != reference.dtype:
        return float("inf")
    a, b = found.detach().to(torch.float64), reference.detach().to(torch.float64)
    finite = torch.isfinite(b)
    if not torch.equal(finite, torch.isfinite(a)) or not torch.equal(a[~finite].nan_to_num(), b[~finite].nan_to_num()):
        return float("inf")
    difference, scale = (a - b)[finite].abs(), b[finite].abs()
    if difference.numel() == 0:
        return 0.0
    return float(difference.max() / scale.max().clamp_min(torch.finfo(torch.float32).tiny))
