"""Routing decisions as inputs and outputs of a graph: recorded, and replayed in place of a router's.

A mixture has two ports of each kind, its experts (int64) and their weights, both [..., k] over the tokens.  A token whose
expert is -1 is routed by the model itself, and so is every token where the inputs are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from surgeon.errors import TraceError

if TYPE_CHECKING:
    from surgeon.graph import Graph, Port

RECORDED = "recorded"
"""Role of outputs that say how tokens were routed."""
REPLAYED = "replayed"
"""Role of inputs that say how tokens are to be routed; they may be left out."""
OWN = -1
"""An expert that means: as the model's own router says."""
EXPERTS, WEIGHTS = "experts", "weights"
PREFIX = "replay."


def recorded_names(site: str) -> tuple[str, str]:
    """Names of a mixture's outputs."""
    return f"{site}.{EXPERTS}", f"{site}.{WEIGHTS}"


def replayed_names(site: str) -> tuple[str, str]:
    """Names of a mixture's inputs: those of the outputs behind ``replay.``, since some formats know each name once."""
    experts, weights = recorded_names(site)
    return f"{PREFIX}{experts}", f"{PREFIX}{weights}"


def replay(outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What was recorded, as inputs: ``{"replay.SITE.experts": outputs["SITE.experts"], ...}``."""
    ends = (f".{EXPERTS}", f".{WEIGHTS}")
    return {f"{PREFIX}{name}": value for name, value in outputs.items() if name.endswith(ends)}


def decided(output: fx.Node) -> fx.Node:
    """The decision that a recorded output shows: the node itself, or what it is a reshape of."""
    if output.target != torch.ops.aten.reshape.default:
        return output
    source = output.args[0]
    assert isinstance(source, fx.Node)
    return source


def renumber(graph: Graph, blocks: Mapping[int, int]) -> None:
    """Name recorded and replayed decisions after their blocks' new numbers, given by the old ones; edits in place."""

    def named(port: Port) -> Port:
        if port.role not in (RECORDED, REPLAYED):
            return port
        prefix = PREFIX if port.role == REPLAYED else ""
        start, number, *rest = port.name.removeprefix(prefix).split(".")
        return replace(port, name=prefix + ".".join([start, str(blocks[int(number)]), *rest]))

    inputs = [named(port) for port in graph.inputs]
    graph.example = {new.name: graph.example[old.name] for old, new in zip(graph.inputs, inputs, strict=True)}
    graph.inputs, graph.outputs = tuple(inputs), tuple(map(named, graph.outputs))


def resize(graph: Graph, output: fx.Node) -> None:
    """Say in the ports of recorded decisions how many experts a token has now; edits in place."""
    values: Any = output.args[0]
    graph.outputs = tuple(
        replace(port, shape=(*port.shape[:-1], int(value.meta["val"].shape[-1]))) if port.role == RECORDED else port
        for port, value in zip(graph.outputs, values, strict=True)
    )


def ordered(ports: Sequence[Port], outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The outputs with every token's recorded experts in ascending order: runtimes need not agree on any other."""
    found = dict(outputs)
    for port in ports:
        site, _, kind = port.name.rpartition(".")
        if port.role == RECORDED and kind == EXPERTS and {port.name, f"{site}.{WEIGHTS}"} <= set(found):
            order = found[port.name].argsort(dim=-1)
            for name in recorded_names(site):
                found[name] = found[name].gather(-1, order)
    return found


def complete(ports: Sequence[Port], inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """What stands for replayed decisions that a call leaves out: every token is routed by the model.

    Args:
        ports: inputs of the graph or artefact.
        inputs: what the caller gave, by name.

    Returns:
        The missing ones, of the sizes that the other inputs have.

    Raises:
        TraceError: experts are given without their weights, or weights without their experts.
    """
    replayed = [port for port in ports if port.role == REPLAYED]
    missing = [port for port in replayed if port.name not in inputs]
    if not missing:
        return {}
    present = {port.name for port in replayed} - {port.name for port in missing}
    for port in missing:
        site, _, kind = port.name.rpartition(".")
        other = f"{site}.{WEIGHTS if kind == EXPERTS else EXPERTS}"
        if other in present:
            raise TraceError(f"input {other!r} is given without {port.name!r}: to replay a decision give both, or neither")
    given = [(port, inputs[port.name]) for port in ports if isinstance(inputs.get(port.name), Tensor)]
    sizes = {name: size for port, value in given for name, size in zip(port.shape, value.shape, strict=False)}
    device = given[0][1].device if given else torch.device("cpu")
    found = {}
    for port in missing:
        shape = [size if isinstance(size, int) else sizes.get(size) for size in port.shape]
        if None not in shape:  # without the other inputs the call is refused anyway
            value = 0.0 if port.dtype.is_floating_point else OWN
            found[port.name] = torch.full(shape, value, dtype=port.dtype, device=device)  # type: ignore[arg-type]  # no None
    return found
