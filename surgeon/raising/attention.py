"""Attention over a cache as one ``surgeon::attention`` node, proven equal to the region it replaces.

Pattern: ``scaled_dot_product_attention(q, k, v, mask)`` whose keys are computed from a cache, k and v perhaps repeated for
the query heads: ``reshape(expand(unsqueeze(x, 2)))`` from [B, K, T, D] over [B, K, G, T, D] to [B, K G, T, D].  Query head h
then reads head ``h // G`` of x, which is what the operator does without repeating anything.

Check: the region and the node on the same random inputs, at the sizes the graph was traced with, within 1e-5.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

import surgeon.ops  # noqa: F401  # registers torch.ops.surgeon
from surgeon.caches import PAST
from surgeon.graph import Graph
from surgeon.rewrite import Editor

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}


def raise_attention(graph: Graph) -> dict[str, str]:
    """Replace every attention over a cache that the pattern fits; edits the graph in place.

    Returns:
        For each that was left as it is, by the name of its node, the reason.
    """
    editor, reasons = Editor(graph), dict[str, str]()
    nodes = graph.module.graph
    placeholders = nodes.find_nodes(op="placeholder")
    reached: set[fx.Node] = {n for n, port in zip(placeholders, graph.inputs, strict=True) if port.role == PAST}
    for node in nodes.nodes:
        if any(source in reached for source in node.all_input_nodes) and node.target != aten.sym_size.int:
            reached.add(node)
    changed = False
    for node in nodes.find_nodes(op="call_function", target=SDPA):
        if node.args[1] not in reached:
            continue
        reason = _raise(editor, node)
        changed |= reason is None
        if reason is not None:
            reasons[node.name] = reason
    if changed:
        editor.finish()
    return reasons


def _raise(editor: Editor, node: fx.Node) -> str | None:
    """Replace one; returns the reason where it is not replaced."""
    given = _arguments(node)
    q, mask = given["query"], given["attn_mask"]
    if given["dropout_p"] != 0.0:
        return f"it drops {given['dropout_p']} of its weights"
    if any(source.meta["val"].dim() != 4 for source in (q, given["key"], given["value"])):
        return "its queries, keys and values have no dimension of heads"
    if given["is_causal"] and mask is not None:
        return "it has a mask and is causal"
    if given["is_causal"]:
        return "it is causal from its first key on, and a cache stands before its first query"
    k, v = _unrepeated(given["key"]), _unrepeated(given["value"])
    if k.meta["val"].shape[1] != v.meta["val"].shape[1]:
        k, v = given["key"], given["value"]
    scale = given["scale"] if given["scale"] is not None else int(q.meta["val"].shape[-1]) ** -0.5
    arguments = (q, k, v, mask, False, float(scale))
    error = _difference(node, arguments)
    tolerance = _TOLERANCE.get(node.meta["val"].dtype, 0.0)
    if not error <= tolerance:
        return f"on random inputs the operator differs from it by {error:.2g} relative, at most {tolerance:g} is accepted"
    with editor.before(node):
        new = editor.call(torch.ops.surgeon.attention.default, *arguments)
    editor.replace(node, new)
    return None


def _arguments(node: fx.Node) -> dict[str, Any]:
    """All arguments by name, defaults filled in."""
    found = {}
    for position, argument in enumerate(SDPA._schema.arguments):
        value = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name, argument.default_value)
        found[argument.name] = value
    return found


def _unrepeated(node: fx.Node) -> fx.Node:
    """The tensor [B, K, T, D] behind ``reshape(expand(unsqueeze(x, 2)))``, or the node itself."""
    expand = node.args[0] if node.target == aten.reshape.default else None
    unsqueeze = expand.args[0] if isinstance(expand, fx.Node) and expand.target == aten.expand.default else None
    if not isinstance(unsqueeze, fx.Node) or unsqueeze.target != aten.unsqueeze.default or unsqueeze.args[1] != 2:
        return node
    source = unsqueeze.args[0]
    assert isinstance(source, fx.Node)
    return source if source.meta["val"].dim() == 4 else node


def _difference(node: fx.Node, arguments: tuple[Any, ...]) -> float:
    """max|operator - region| / max|region| on random inputs; repetitions are evaluated as the graph spells them."""
    generator = torch.Generator().manual_seed(0)
    values: dict[fx.Node, Any] = {}
    for source in arguments[:4]:
        if isinstance(source, fx.Node) and source not in values:
            fake = source.meta["val"]
            noise = torch.randn([_hint(size) for size in fake.shape], generator=generator)
            values[source] = noise > -0.5 if fake.dtype == torch.bool else noise.to(fake.dtype)
            if fake.dtype == torch.bool:
                values[source][..., 0] = True  # no row sees nothing

    def value(at: Any) -> Any:
        if not isinstance(at, fx.Node):
            return at
        if at not in values:
            fake = at.meta["val"]
            if not isinstance(fake, Tensor):
                return _hint(fake)
            args, kwargs = fx.node.map_arg((at.args, at.kwargs), value)
            values[at] = at.target(*args, **kwargs)  # type: ignore[operator]  # a call_function target
        return values[at]

    with torch.no_grad():
        expected = value(node).double()
        found = torch.ops.surgeon.attention.default(*(value(argument) for argument in arguments)).double()
    if found.shape != expected.shape:
        return float("inf")
    return float((found - expected).abs().max() / expected.abs().max())


def _hint(size: Any) -> int:
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)
