"""Numeric evaluation of parts of a graph, which tells what a part computes where its spelling does not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from surgeon.discovery import operators
from surgeon.discovery.flow import Flow

_DRAWN = 2**29
"""Largest number of weights that are drawn for one evaluation: 1 GiB in a type of 16 bits."""


def evaluate(flow: Flow, targets: Sequence[fx.Node], given: Mapping[fx.Node, Any]) -> list[Any]:
    """Values of ``targets`` when some nodes have the values ``given``.

    What does not depend on a given node is computed from the graph's weights and example inputs; symbolic sizes have the
    value they were traced with; a weight that is not in memory (a fake tensor) is drawn at random.

    Args:
        flow: the graph's data flow.
        targets: nodes to compute.
        given: values that replace nodes.

    Returns:
        One value per target.

    Raises:
        RuntimeError: an operator does not accept the given values, or too many weights would be drawn.
    """
    return _run(flow, targets, given)


def elementwise(flow: Flow, target: fx.Node, given: Mapping[fx.Node, Tensor]) -> Tensor:
    """Value of an element-wise subgraph on vectors of any length: reshapes, casts and repetitions count as identities.

    Args:
        flow: the graph's data flow.
        target: the node to compute.
        given: [N] for every node where the subgraph starts.

    Returns:
        [N].

    Raises:
        RuntimeError: an operand in between has a shape of its own (such as a learned vector).
    """
    (found,) = _run(flow, [target], given, elementwise=True)
    assert isinstance(found, Tensor)
    return found


def _run(
    flow: Flow,
    targets: Sequence[fx.Node],
    given: Mapping[fx.Node, Any],
    *,
    elementwise: bool = False,
    by_row: bool = False,
) -> list[Any]:
    values: dict[fx.Node, Any] = dict(given)
    needed = flow.ordered(_needed(targets, values, by_row))
    _refuse_large(flow, needed)
    with torch.no_grad():
        for node in needed:
            if by_row and (operators.kind(node) in operators.NORMS_OVER_POSITIONS or _keeps_rows(node)):
                values[node] = values[node.args[0]]  # type: ignore[index]  # the input of a normalisation, or of experts
            else:
                found = _value(flow, node, values, elementwise)
                values[node] = _once_trained(found, flow.index[node]) if by_row and node.op == "get_attr" else found
    return [values[target] for target in targets]


def _needed(targets: Sequence[fx.Node], given: Mapping[fx.Node, Any], by_row: bool) -> set[fx.Node]:
    needed: set[fx.Node] = set()
    stack = list(targets)
    while stack:
        node = stack.pop()
        if node in given or node in needed:
            continue
        needed.add(node)
        if not _is_size(node):
            stack.extend(rows(node) if by_row and _keeps_rows(node) else node.all_input_nodes)
    return needed


def rows(node: fx.Node) -> list[fx.Node]:
    """What the rows of a mixture's result are computed from, once it is decided which experts take them."""
    x = node.args[0]
    assert isinstance(x, fx.Node)
    return [x]


def _keeps_rows(node: fx.Node) -> bool:
    """Whether a node is a mixture whose result has the shape of its input, so that the input may stand for it."""
    return operators.kind(node) == operators.MOE and operators.shape(node) == operators.shape(rows(node)[0])


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), int | float | bool | torch.SymInt | torch.SymFloat | torch.SymBool)


def _value(flow: Flow, node: fx.Node, values: Mapping[fx.Node, Any], elementwise: bool) -> Any:
    if _is_size(node):
        found = node.meta["val"]
        return found if isinstance(found, int | float | bool) else operators.hint(found)
    if node.op == "get_attr":
        return _tensor(flow.graph.tensor(str(node.target)), flow.index[node])
    if node.op == "placeholder":
        names = [n for n in flow.nodes if n.op == "placeholder"]
        return flow.graph.example[flow.graph.inputs[names.index(node)].name]
    source = node.args[0] if node.args else None
    moves = operators.is_reshape(node) or operators.kind(node) in operators.REPETITIONS
    if elementwise and isinstance(source, fx.Node) and source not in flow.constant:
        if moves or operators.kind(node) == operators.FAKE_QUANTIZE:
            return values[source]
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: values[n])
    return node.target(*args, **kwargs)  # type: ignore[operator]  # a call_function target


def _refuse_large(flow: Flow, nodes: Sequence[fx.Node]) -> None:
    """Weights that are not in memory are not drawn where they would fill it."""
    names = dict.fromkeys(str(node.target) for node in nodes if node.op == "get_attr")
    missing = [tensor.numel() for tensor in map(flow.graph.tensor, names) if _is_fake(tensor)]
    if sum(missing) > _DRAWN:
        raise RuntimeError(f"it reads {sum(missing):,} weights that are not in memory, at most {_DRAWN:,} are drawn at random")


def _is_fake(tensor: Tensor) -> bool:
    return isinstance(tensor, FakeTensor) or tensor.device.type == "meta"


def _tensor(tensor: Tensor, seed: int) -> Tensor:
    if not _is_fake(tensor):
        return tensor.detach()
    shape = tuple(operators.hint(size) for size in tensor.shape)
    generator = torch.Generator().manual_seed(seed)
    if not tensor.is_floating_point():
        return torch.zeros(shape, dtype=tensor.dtype)
    return _draw(shape, tensor.dtype, generator)


def _draw(shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    fan_in = shape[-1] if len(shape) > 1 else 1
    return torch.randn(shape, generator=generator, dtype=dtype).div_(fan_in**0.5)


def _once_trained(tensor: Tensor, seed: int) -> Tensor:
    """The tensor, or one drawn at random for zeros only: with these a sublayer may start that adds nothing yet."""
    if not tensor.is_floating_point() or bool(tensor.any()):
        return tensor
    return _draw(tensor.shape, tensor.dtype, torch.Generator().manual_seed(seed))


def _noise(node: fx.Node, generator: torch.Generator) -> Tensor:
    return torch.randn(operators.shape(node), generator=generator).to(operators.value(node).dtype)


def mixes(
    flow: Flow,
    entry: fx.Node,
    exit: fx.Node,
    *,
    beside: fx.Node | None = None,
    channels_first: bool = False,
    streams: bool = False,
) -> bool:
    """Whether the value at one position depends on other positions, found by changing the input at one of them.

    The hidden state is [batch, positions ..., features] or [batch, features, positions ...]; a region mixes positions when
    a change leaks out of its place under both readings.  Statistics that a normalisation takes over positions do not count,
    nor does which experts a position is given to.  Weights that are all zero, as gains that a model starts with, are drawn at
    random: what they multiply is there.

    Args:
        flow: the graph's data flow.
        entry: node where the region starts.
        exit: node where it ends; of the same shape.
        beside: a node in front of ``entry`` that keeps its value while ``entry`` changes.
        channels_first: a hidden state of three dimensions is [batch, features, positions].
        streams: a hidden state is [batch, positions ..., streams, features].

    Returns:
        True where a change at one position of ``entry`` changes ``exit`` at another.
    """
    value = operators.value(entry)
    shape = operators.shape(entry)
    generator = torch.Generator().manual_seed(0)
    before = _noise(entry, generator)
    last = len(shape) - 1
    candidates = [{last}, {1}] if len(shape) > 3 else [{1 if channels_first and len(shape) == 3 else last}]
    candidates = [{last - 1, last}] if streams else candidates
    given = {} if beside is None else {beside: _noise(beside, generator)}
    (reference,) = _run(flow, [exit], {**given, entry: before}, by_row=True)
    for features in candidates:
        place = [slice(None) if d in features else 0 for d in range(len(shape))]
        changed = before.clone()
        changed[tuple(place)] += torch.randn(changed[tuple(place)].shape, generator=generator).to(value.dtype)
        (found,) = _run(flow, [exit], {**given, entry: changed}, by_row=True)
        difference = (found - reference).abs()
        if difference.shape != before.shape:
            return True
        difference[tuple(place)] = 0
        if not bool((difference > 1e-6 * (1 + reference.abs())).any()):
            return False
    return True
