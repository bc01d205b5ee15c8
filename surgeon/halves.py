"""An encoder-decoder graph as two: what is run once per text, and what is run per token.

The graph is cut at the keys and values of the cross-attention: the encoder's half computes them, the decoder's takes them as
inputs.  Both are graphs over the same weights, and every output of the whole is one of theirs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from surgeon.caches import CROSS, DECODER_TOKENS, PAST, SUM, ancestors, has_caches, reread_sizes
from surgeon.discovery import operators
from surgeon.errors import RewriteError
from surgeon.graph import Graph, Port

_COMPUTES = operators.PRODUCTS | operators.CONVOLUTIONS


def has_halves(ports: Iterable[Port]) -> bool:
    """Whether inputs are those of an encoder-decoder with caches."""
    ports = tuple(ports)
    return has_caches(ports) and any(port.name == DECODER_TOKENS for port in ports)


def halves(graph: Graph) -> tuple[Graph, Graph]:
    """The encoder's half and the decoder's half of an encoder-decoder with caches.

    Args:
        graph: stays as it is.

    Returns:
        The encoder: of its inputs, with the keys and values as outputs.  The decoder: of its tokens, its pasts, these keys and
        values and what else it reads (a mask over the encoder's positions).  Inputs and outputs keep names and order.

    Raises:
        RewriteError: the decoder reads its encoder in another way too.
    """
    results: Any = graph.module.graph.output_node().args[0]
    placeholders = graph.module.graph.find_nodes(op="placeholder")
    stepwise = {
        node for node, port in zip(placeholders, graph.inputs, strict=True) if port.role == PAST or port.name == DECODER_TOKENS
    }
    once = [i for i, node in enumerate(results) if not stepwise & ancestors([node])]
    encoder = _half(graph, once, [])
    crossing = [i for i, port in enumerate(graph.outputs) if port.role == CROSS]
    decoder = _half(graph, [i for i in range(len(results)) if i not in once], crossing)
    _refuse_shared(encoder, decoder)
    with torch.no_grad():
        filled = encoder(**{port.name: graph.example[port.name] for port in encoder.inputs})
    decoder.example |= {port.name: filled[port.name] for port in decoder.inputs if port.role == CROSS}
    return encoder, decoder


def _half(graph: Graph, outputs: Sequence[int], given: Sequence[int]) -> Graph:
    """The part of a graph that computes some of its outputs, where others are inputs."""
    half = graph.clone()
    nodes = half.module.graph
    output = nodes.output_node()
    results: Any = output.args[0]
    ports = dict(zip(nodes.find_nodes(op="placeholder"), half.inputs, strict=True))
    last = list(ports)[-1]
    for number in given:
        node, port = results[number], half.outputs[number]
        with nodes.inserting_after(last):
            last = nodes.placeholder(port.name.replace(".", "_"))
        last.meta["val"] = node.meta["val"]
        ports[last] = port
        node.replace_all_uses_with(last, delete_user_cb=lambda user: user is not output)
    output.args = (tuple(results[number] for number in outputs),)
    nodes.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    read = ancestors([results[number] for number in outputs])
    kept = [node for node in ports if node in read]
    for node in ports:
        if node not in read:
            reread_sizes(nodes, node, kept)
            nodes.erase_node(node)
    half.inputs = tuple(ports[node] for node in kept)
    half.outputs = tuple(half.outputs[number] for number in outputs)
    half.example = {port.name: half.example[port.name] for port in half.inputs if port.name in half.example}
    named = {str(size) for port in half.inputs for size in port.shape}
    half.dims = {name: dim for name, dim in half.dims.items() if any(name in size.split(SUM) for size in named)}
    nodes.lint()
    half.module.recompile()
    return half


def _refuse_shared(encoder: Graph, decoder: Graph) -> None:
    """Nothing that the encoder multiplies may be multiplied again at every token."""
    own = {node.name for node in encoder.module.graph.nodes if operators.kind(node) in _COMPUTES}
    again = [node.name for node in decoder.module.graph.nodes if node.name in own]
    if again:
        raise RewriteError(
            f"the decoder reads its encoder otherwise than by keys and values of cross-attention: {len(again)} products "
            f"would be computed again at every token, the last one {again[-1]}"
        )
