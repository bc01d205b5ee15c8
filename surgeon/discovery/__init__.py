"""Structure from the graph alone: the residual streams, their blocks, and what each of them is made of.

Nothing looks at the name of a parameter, module or class.  In order:

1. data flow between floating-point tensors (:mod:`surgeon.discovery.flow`), and every linear (``linears``);
2. residual sublayers (``residuals``) and the streams that they form (``stream``);
3. what each sublayer is (``regions``, ``attention``, ``ffn``, ``mixture``), the blocks (``blocks``), and what stands before,
   between and behind them (``outline``);
4. a name for every part and a role for every tensor (``sites``, ``roles``).

Example:
    >>> structure = discover(trace(module, inputs))
    >>> [block.kind for block in structure.blocks]
    ['attention+ffn', 'attention+ffn']
"""

from __future__ import annotations

from surgeon.discovery.flow import Flow
from surgeon.discovery.linears import Linears
from surgeon.discovery.outline import find_streams, tail
from surgeon.discovery.roles import Places, Remaining
from surgeon.discovery.sites import Naming
from surgeon.graph import Graph
from surgeon.structure import Structure

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
    streams = find_streams(flow, linears)
    blocks = [block for stream in streams for block in stream.blocks]

    naming = Naming(flow, linears)
    embeddings = naming.embeddings()
    for block in blocks:
        naming.block(block)
    naming.outside([tail(stream) for stream in streams])
    remaining = Remaining(flow, naming, Places(flow, streams))
    remaining.assign()
    return Structure(
        streams=streams,
        embeddings=embeddings,
        linears=naming.sites(),
        roles=naming.roles,
        unrecognised=remaining.unrecognised,
    )
