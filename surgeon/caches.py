"""Key/value caches as inputs and outputs of a graph: what is filled in for a caller, and what goes with a removed part.

A graph that was traced for text generation takes, beside its tokens, a pair of ``past`` inputs for every attention that
keeps its keys and values, and returns as many ``present`` outputs; the n-th present is the n-th past with the new
positions appended.  Dimensions: ``past`` positions are in the caches, ``sequence`` positions are new, and an attention mask
covers ``past + sequence``.  With past = 0 the graph computes what the model computes without caches.

An encoder-decoder is one graph too: of the encoder's inputs, the decoder's new tokens (``decoder_input_ids``, dimension
``target``) and the pasts of its self-attention.  The keys and values of its cross-attention are outputs beside the presents;
where a text is generated they are computed once, and the graph is cut there in two (:mod:`surgeon.halves`).
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
CROSS = "cross"
"""Role of keys and values over the encoder's positions: an output of the whole, an input of the decoder's half."""
POSITIONS, MASKED_POSITIONS = "positions", "masked_positions"
OPTIONAL = frozenset({PAST, POSITIONS, MASKED_POSITIONS, routes.REPLAYED})
"""Roles of inputs that a caller may leave out."""

KEPT = frozenset({PRESENT, CROSS})
"""Roles of outputs that are keys and values."""

ASIDE = KEPT | {routes.RECORDED}
"""Roles of outputs that tell what a part did, and are not a reason for the part to stay."""

NAMES = {PAST: "past_key_values.{}.{}", PRESENT: "present.{}.{}", CROSS: "cross_key_values.{}.{}"}
"""Names of the ports by role, with the number of the cache and which half of it; the field's convention."""
HALVES = ("key", "value")
SUM = " + "
"""What stands between the names of two dimensions whose sum a dimension is."""
TOKENS, DECODER_TOKENS = "input_ids", "decoder_input_ids"
"""Names of the input that text is continued with, of a decoder alone and of one behind an encoder."""
MASK = "attention_mask"
"""Name of the input that says which positions, past and new ones, hold a token."""


def cache_names(role: str, count: int) -> list[str]:
    """Names of the tensors of so many caches of a role, in order."""
    return [NAMES[role].format(number, half) for number in range(count) for half in HALVES]


def has_caches(ports: Iterable[Port]) -> bool:
    """Whether any of the inputs is a cache."""
    return any(port.role == PAST for port in ports)


def tokens_name(ports: Iterable[Port]) -> str:
    """Name of the input that holds the new tokens."""
    return DECODER_TOKENS if any(port.name == DECODER_TOKENS for port in ports) else TOKENS


def room(length: int, before: int) -> int:
    """Positions for which a buffer is made that must hold ``length`` of them, in place of one that held ``before``.

    A text of N tokens costs copies of less than 3 N positions in all.
    """
    return max(length, 3 * before // 2, 128)


def is_plain_call(ports: Sequence[Port], inputs: Mapping[str, Any]) -> bool:
    """Whether a call hands in no cache; it then gets no cache back."""
    return not any(port.role == PAST and port.name in inputs for port in ports)


def asked(inputs: Sequence[Port], outputs: Sequence[Port], given: Mapping[str, Any]) -> list[Port]:
    """The outputs that a call is answered with: keys and values only where pasts were handed in."""
    plain = has_caches(inputs) and is_plain_call(inputs, given)
    return [port for port in outputs if not (plain and port.role in KEPT)]


def misfit(ports: Sequence[Port], inputs: Mapping[str, Any]) -> str:
    """What is wrong with an input that is given, before others are made from it; empty where type and rank are right.

    Args:
        ports: inputs of the graph or artefact.
        inputs: what the caller gave, by name.
    """
    for port in ports:
        value = inputs.get(port.name)
        if port.name in inputs and not isinstance(value, Tensor):
            return f"input {port.name!r} must be a torch.Tensor, found {type(value).__name__}"
        if isinstance(value, Tensor) and value.dim() != len(port.shape):
            return f"input {port.name!r} must have shape {list(port.shape)}, found {list(value.shape)}"
    return ""


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
        batch: the new tokens [batch, length] and what else is no cache; inputs of an encoder are the same for both halves.

    Returns:
        Inputs with ``ceil(length / 2)`` new tokens, or None where there is but one token.
    """
    tokens = next(port for port in graph.inputs if port.name == tokens_name(graph.inputs))
    step = str(tokens.shape[1])
    start = batch[tokens.name].shape[1] // 2
    if start == 0:
        return None
    along = {port.name for port in graph.inputs if len(port.shape) > 1 and step in str(port.shape[1]).split(SUM)}
    first = {name: value[:, :start].contiguous() if name in along else value for name, value in batch.items()}
    with torch.no_grad():
        results = graph(**complete(graph.inputs, first))
    pairs = zip(
        (port.name for port in graph.inputs if port.role == PAST),
        (port.name for port in graph.outputs if port.role == PRESENT),
        strict=True,
    )
    totals = {port.name for port in graph.inputs if SUM in str(port.shape[-1])}
    parted = along - totals
    rest = {name: value[:, start:].contiguous() if name in parted else value for name, value in batch.items()}
    return rest | {past: results[present] for past, present in pairs}


# -- what goes with a part ----------------------------------------------------------------------------------------------


def prune(graph: Graph) -> int:
    """Remove the caches that nothing but themselves depends on any more, and number the others anew.

    A pair of past and present goes where no other output is computed from its past: the attention that used it is gone;
    keys and values over an encoder's positions likewise.  Recorded decisions go where nothing else is computed from them,
    with the inputs that replayed them: their mixture is gone.  Sizes that were read off a removed input are read off
    another with the same dimension.  Edits the graph in place; dead code is left to the caller.

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
    needed = ancestors([results[i] for i, port in enumerate(graph.outputs) if port.role not in ASIDE])
    pairs = list(zip(pasts, presents, strict=True))
    gone = [(past, present) for past, present in pairs if placeholders[past] not in needed]
    crossing = [i for i, port in enumerate(graph.outputs) if port.role == CROSS and pairs and results[i] not in needed]
    recorded = [
        i for i, port in enumerate(graph.outputs)
        if port.role == routes.RECORDED and routes.decided(results[i]) not in needed
    ]  # fmt: skip
    replayed = [
        i for i, port in enumerate(graph.inputs) if port.role == routes.REPLAYED and placeholders[i] not in needed
    ]
    if not gone and not crossing and not recorded:
        return 0
    lost_inputs = {past for past, _ in gone} | set(replayed)
    lost_outputs = {present for _, present in gone} | set(crossing) | set(recorded)
    kept = [node for i, node in enumerate(placeholders) if i not in lost_inputs]
    output.args = (tuple(node for i, node in enumerate(results) if i not in lost_outputs),)
    nodes.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    for lost in lost_inputs:
        reread_sizes(nodes, placeholders[lost], kept)
        nodes.erase_node(placeholders[lost])
    names = _renamed([port for i, port in enumerate(graph.inputs) if i not in lost_inputs])
    example = {new.name: graph.example[old.name] for old, new in names}
    graph.inputs = tuple(new for _, new in names)
    graph.outputs = tuple(new for _, new in _renamed([p for i, p in enumerate(graph.outputs) if i not in lost_outputs]))
    graph.example = example
    return len(lost_outputs)


def _renamed(ports: Sequence[Port]) -> list[tuple[Port, Port]]:
    """Each port with itself under its new number; pairs are consecutive."""
    found, numbers = [], dict.fromkeys(NAMES, 0)
    for port in ports:
        new = port
        if port.role in NAMES:
            number = numbers[port.role]
            new = replace(port, name=NAMES[port.role].format(number // 2, HALVES[number % 2]))
            numbers[port.role] += 1
        found.append((port, new))
    return found


def ancestors(targets: Iterable[fx.Node]) -> set[fx.Node]:
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


def reread_sizes(nodes: fx.Graph, lost: fx.Node, kept: Sequence[fx.Node]) -> None:
    """Let sizes that are read off ``lost`` be read off an input of ``kept`` that has the same dimension.

    Raises:
        RewriteError: there is none, or more than sizes is read.
    """
    for user in list(lost.users):
        if user.target != torch.ops.aten.sym_size.int:
            raise RewriteError(f"{user.name} = {user.target} still reads the removed input {lost.name}")
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
                f"{', '.join(reader.name for reader in user.users)} need the size {wanted} of the removed input "
                f"{lost.name}, and no input that stays has it: at least one attention with a cache must remain"
            )
        user.args = place
