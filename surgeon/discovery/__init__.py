"""Structure from the graph alone: the residual stream, its blocks, and what each of them is made of.

Nothing looks at the name of a parameter, module or class.  In order:

1. data flow between floating-point tensors (:mod:`surgeon.discovery.flow`), and every linear (``linears``);
2. the residual stream, a chain of dominators (``stream``);
3. what each sublayer is (``regions``, ``attention``, ``ffn``, ``mixture``), and the blocks (``blocks``);
4. a name for every part and a role for every tensor (``sites``, ``roles``).

Example:
    >>> structure = discover(trace(module, inputs))
    >>> [block.kind for block in structure.blocks]
    ['attention+ffn', 'attention+ffn']
"""

from __future__ import annotations

from torch import fx

from surgeon.discovery.blocks import find_blocks, tail
from surgeon.discovery.flow import Flow
from surgeon.discovery.linears import Linears
from surgeon.discovery.regions import Classifier
from surgeon.discovery.roles import Places, Remaining
from surgeon.discovery.sites import Naming
from surgeon.discovery.stream import find_stream
from surgeon.graph import Graph
from surgeon.structure import Block, Structure

__all__ = ["discover"]


def discover(graph: Graph) -> Structure:
    """Find the structure of a model.

    Cost: a few passes over the nodes; no forward run of the model.

    Args:
        graph: a canonical graph.

    Returns:
        The structure.  Every tensor that the graph reads is either in ``roles`` or in ``unrecognised``.

    Raises:
        DiscoverError: the graph has no residual stream; says which part came nearest and where it broke.
    """
    flow = Flow(graph)
    linears = Linears(flow)
    chain = find_stream(flow)
    blocks = find_blocks(flow, Classifier(flow, linears), chain)
    behind = tail(chain, blocks[-1].exit)
    prefix, suffix = _outside(flow, blocks)

    naming = Naming(flow, linears)
    embeddings = naming.embeddings()
    for block in blocks:
        naming.block(block)
    naming.outside(behind)
    remaining = Remaining(flow, naming, Places(flow, blocks, prefix, suffix))
    remaining.assign()
    cuts = [span.exit for span in chain.spans]
    start = cuts.index(blocks[0].entry) if blocks[0].entry in cuts else -1
    return Structure(
        stream=(blocks[0].entry, *cuts[start + 1 :]),
        prefix=flow.ordered(prefix),
        blocks=blocks,
        suffix=flow.ordered(suffix),
        embeddings=embeddings,
        linears=naming.sites(),
        roles=naming.roles,
        unrecognised=remaining.unrecognised,
    )


def _outside(flow: Flow, blocks: tuple[Block, ...]) -> tuple[set[fx.Node], set[fx.Node]]:
    """Nodes that the first block's entry is computed from, and nodes computed from the last block's exit.

    Both with what only they read.
    """
    inside = {node for block in blocks for node in block.nodes}
    prefix: set[fx.Node] = set()
    stack = [blocks[0].entry]
    while stack:
        node = stack.pop()
        if node.op not in ("placeholder", "output") and node not in prefix:
            prefix.add(node)
            stack.extend(node.all_input_nodes)
    suffix: set[fx.Node] = set()
    stack = [user for user in blocks[-1].exit.users if user not in inside]
    while stack:
        node = stack.pop()
        if node.op != "output" and node not in suffix:
            suffix.add(node)
            stack.extend(node.users)
    suffix = flow.close(suffix, blocks[-1].exit) - prefix - inside
    return prefix, suffix
