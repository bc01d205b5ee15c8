"""What an FFN-shaped part of a sublayer is to it: the sublayer's own, a gate of what it reads, or an expert.

x + f(x)                                     the sublayer's own
n * sigmoid(f(n)), then the sublayer         a gate in front of it; so is what the experts or the attention follow from
w_1 f_1(x) + w_2 f_2(x) ...                  experts, w one number per token, or f_i on the rows that were selected for it
f_1 on text, f_2 on images                   the sublayer's own, where rows are selected by the inputs and not by activations
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from surgeon.discovery import operators
from surgeon.discovery.flow import Flow
from surgeon.structure import FFN

_SELECTIONS = operators.LOOKUPS | {
    f"aten::{name}" for name in "gather index_put index_add scatter scatter_add where masked_scatter masked_fill".split()
}


def gates_its_input(flow: Flow, path: frozenset[fx.Node], ffn: FFN) -> bool:
    """Whether what an FFN computes is multiplied with what it reads."""
    source = flow.plain(ffn.input)
    for node in path:
        if operators.kind(node) != "aten::mul" or not flow.depends(node, ffn.down.node):
            continue
        others = [n for n in flow.inputs(node) if not flow.depends(n, ffn.down.node)]
        if any(flow.plain(n) is source for n in others):
            return True
    return False


def is_in_front(flow: Flow, ffn: FFN, nodes: Sequence[fx.Node]) -> bool:
    """Whether one of the nodes is computed from what an FFN computes."""
    return any(flow.depends(node, ffn.down.node) for node in nodes)


def experts_among(flow: Flow, path: frozenset[fx.Node], ffns: Sequence[FFN]) -> list[FFN]:
    """FFNs that are weighted or selected token by token, where there are several."""
    found = [ffn for ffn in ffns if _is_routed(flow, path, ffn)]
    return found if len(found) > 1 else []


def _is_routed(flow: Flow, path: frozenset[fx.Node], ffn: FFN) -> bool:
    for node in path:
        if node is ffn.down.node or not flow.depends(node, ffn.down.node):
            continue
        name = operators.kind(node)
        others = [n for n in flow.inputs(node) if not flow.depends(n, ffn.down.node)]
        if name in _SELECTIONS and any(n not in flow and flow.follows(n) for n in flow.active(node)):
            return True
        if name == "aten::mul" and any(operators.shape(n)[-1:] == (1,) and n not in flow.constant for n in others):
            return True
        if name in operators.PRODUCTS and any(n not in flow.constant for n in others):
            return True
    return False
