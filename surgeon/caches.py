"""Key/value caches as inputs and outputs of a graph: what is filled in for a caller, and what goes with a removed block.

A graph that was traced for text generation takes, beside its tokens, a pair of ``past`` inputs for every attention that
keeps its keys and values, and returns as many ``present`` outputs; the n-th present is the n-th past with the new
positions appended.  Dimensions: ``past`` positions are in the caches, ``sequence`` positions are new, and an attention mask
covers ``past + sequence``.  With past = 0 the graph computes what the model computes without caches.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from surgeon import routes
from surgeon.errors import RewriteError

if TYPE_CHECKING:
    from surgeon.graph import Graph, Port

PAST, PRESENT = "past", "present"
POSITIONS, MASKED_POSITIONS = "positions", "masked_positions"
OPTIONAL = frozenset({PAST, POSITIONS, MASKED_POSITIONS, routes.REPLAYED})
"""Roles of inputs that a caller may leave out."""

NAMES = {PAST: "past_key_values.{}.{}", PRESENT: "present.{}.{}"}
"""Names of the ports by role, with the number of the cache and which half of it; the field's convention."""
HALVES = ("key", "value")
SUM = " + "
"""What stands between the names of two dimensions whose sum a dimension is."""


def has_caches(ports: Iterable[Port]) -> bool:
    """Whether any of the inputs is a cache."""
    return any(port.role == PAST for port in ports)


def is_plain_call(ports: Sequence[Port], inputs: Mapping[str, Any]) -> bool:
    """Whether a call hands in no cache; it then gets no cache back."""
    return not any(port.role == PAST and port.name in inputs for port in ports)


def asked(inputs: Sequence[Port], outputs: Sequence[Port], given: Mapping[str, Any]) -> list[Port]:
    """The outputs that a call is answered with: presents only where pasts were handed in."""
    plain = is_plain_call(inputs, given)
    return [port for port in outputs if not (plain and port.role == PRESENT)]


def complete(ports: Sequence[Port], inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs of a call with what may be left out filled in: empty caches, positions of the new tokens, routing.

    Args:
        ports: inputs of the graph or artefact.
        inputs: what the caller gave, by name.

    Returns:
        The same, and where every cache was left out, caches of length 0; where positions were, those that the source
        model takes by itself: consecutive ones, or (``masked_positions``) consecutive over the positions that the
        mask holds; where decisions to replay were, the model's own.  Anything else that is missing stays missing.
    """
    found = dict(inputs) | routes.complete(ports, inputs)
    missing = [port for port in ports if port.name not in found and port.role in OPTIONAL]
    ids = next((found[port.name] for port in ports if port.name in found and not port.role), None)
    if not missing or not isinstance(ids, Tensor) or ids.dim() < 1:
        return found
    if is_plain_call(ports, inputs):
        for port in missing:
            if port.role == PAST:
                shape = [size if isinstance(size, int) else 0 for size in port.shape]
                found[port.name] = torch.zeros([ids.shape[0], *shape[1:]], dtype=port.dtype, device=ids.device)
    past = next((port for port in ports if port.role == PAST and isinstance(found.get(port.name), Tensor)), None)
    length = found[past.name].shape[past.shape.index(PAST)] if past is not None else 0
    for port in missing:
        if port.role == POSITIONS:
            steps = torch.arange(length, length + ids.shape[1], device=ids.device)
            found[port.name] = steps.expand(ids.shape[0], -1).contiguous()
        elif port.role == MASKED_POSITIONS and isinstance(found.get("attention_mask"), Tensor):
            found[port.name] = masked_positions(found["attention_mask"])[:, -ids.shape[1] :].contiguous()
    return found


def masked_positions(mask: Tensor) -> Tensor:
    """Position of every token among those that the mask holds, and 0 where it holds none; [batch, length] both."""
    steps = mask.long().cumsum(-1) - 1
    return steps.masked_fill(mask == 0, 0)


def continued(graph: Graph, batch: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """The second half of a batch behind caches of its first half, which the graph fills.

    Args:
        graph: with caches.
        batch: ``input_ids`` [batch, length] and what else is no cache.

    Returns:
        Inputs with ``ceil(length / 2)`` new tokens, or None where there is but one token.
    """
    ids = batch["input_ids"]
    start = ids.shape[1] // 2
    if start == 0:
        return None
    first = {name: value[:, :start].contiguous() for name, value in batch.items()}
    with torch.no_grad():
        results = graph(**complete(graph.inputs, first))
    pairs = zip(
        (port.name for port in graph.inputs if port.role == PAST),
        (port.name for port in graph.outputs if port.role == PRESENT),
        strict=True,
    )
    totals = {port.name for port in graph.inputs if SUM in str(port.shape[-1])}
    rest = {name: value if name in totals else value[:, start:].contiguous() for name, value in batch.items()}
    return rest | {past: results[present] for past, present in pairs}


# -- what goes with a block ---------------------------------------------------------------------------------------------


def prune(graph: Graph) -> int:
    """Remove the caches that nothing but themselves depends on any more, and number the others anew.

    A pair of past and present goes where no other output is computed from its past: the attention that used it is gone.
    Sizes that were read off a removed input are read off another with the same dimension.  Edits the graph in place;
    dead code is left to the caller.

    Returns:
        Number of tensors removed.

    Raises:
        RewriteError: a size is needed and no input that stays has it.
    """
    nodes = graph.module.graph
    placeholders = nodes.find_nodes(op="placeholder")
    output = nodes.output_node()
    results: list[Any] = list(output.args[0])  # type: ignore[arg-type]  # a tuple of nodes
    pasts = [i for i, port in enumerate(graph.inputs) if port.role == PAST]
    presents = [i for i, port in enumerate(graph.outputs) if port.role == PRESENT]
    needed = _ancestors([results[i] for i, port in enumerate(graph.outputs) if port.role != PRESENT])
    pairs = list(zip(pasts, presents, strict=True))
    gone = [(past, present) for past, present in pairs if placeholders[past] not in needed]
    if not gone:
        return 0
    lost_inputs, lost_outputs = {past for past, _ in gone}, {present for _, present in gone}
    kept = [node for i, node in enumerate(placeholders) if i not in lost_inputs]
    output.args = (tuple(node for i, node in enumerate(results) if i not in lost_outputs),)
    nodes.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    for past in lost_inputs:
        _reread_sizes(nodes, placeholders[past], kept)
        nodes.erase_node(placeholders[past])
    names = _renamed([port for i, port in enumerate(graph.inputs) if i not in lost_inputs], PAST)
    example = {new.name: graph.example[old.name] for old, new in names}
    graph.inputs = tuple(new for _, new in names)
    graph.outputs = tuple(
        new for _, new in _renamed([p for i, p in enumerate(graph.outputs) if i not in lost_outputs], PRESENT)
    )
    graph.example = example
    return len(gone)


def _renamed(ports: Sequence[Port], role: str) -> list[tuple[Port, Port]]:
    """Each port with itself under its new number; pairs are consecutive."""
    found, number = [], 0
    for port in ports:
        new = port
        if port.role == role:
            new = replace(port, name=NAMES[role].format(number // 2, HALVES[number % 2]))
            number += 1
        found.append((port, new))
    return found


def _ancestors(targets: Iterable[fx.Node]) -> set[fx.Node]:
    """Nodes whose values enter the targets; the size of a tensor is not its value."""
    found: set[fx.Node] = set()
    stack = list(targets)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            if node.target != torch.ops.aten.sym_size.int:
                stack.extend(node.all_input_nodes)
    return found


def _reread_sizes(nodes: fx.Graph, lost: fx.Node, kept: Sequence[fx.Node]) -> None:
    for user in list(lost.users):
        if user.target != torch.ops.aten.sym_size.int:
            raise RewriteError(f"{user.name} = {user.target} still reads the removed cache {lost.name}")
        wanted = user.meta["val"].node.expr
        place = next(
            (
                (node, axis)
                for node in kept
                for axis, size in enumerate(node.meta["val"].shape)
                if isinstance(size, torch.SymInt) and size.node.expr == wanted
            ),
            None,
        )
        if place is None:
            raise RewriteError(
                f"{', '.join(reader.name for reader in user.users)} need the size {wanted} of the removed cache "
                f"{lost.name}, and no input that stays has it: at least one attention with a cache must remain"
            )
        user.args = place
