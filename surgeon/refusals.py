"""What a backend refuses: what of it is known before the passes work, and how it is said in a few lines."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from torch import fx

from surgeon.contract import Backend, Pass, Plan, Refusal
from surgeon.discovery import discover
from surgeon.errors import LowerError, SurgeonError
from surgeon.graph import Graph
from surgeon.rewrite import Editor
from surgeon.structure import Structure

_LISTED = 8
"""Places that are listed one by one for one reason."""
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_IN_BLOCK = re.compile(r"blocks\.(\d+)(?:\.(.+))?")


def foreseen(
    backend: Backend, graph: Graph, steps: Sequence[Pass[Any]], plans: Sequence[Plan[Any]] | None = None
) -> tuple[Graph, list[Refusal]]:
    """What the backend will refuse of the result of these passes, as far as the source graph and the passes' options say.

    The passes are rehearsed: those that can say what operators and sizes they will leave edit a copy of the graph so,
    without the numbers.  Of what the backend refuses there, all counts where no pass of the recipe may take a refusal away,
    and otherwise what no pass could.

    Args:
        backend: where the result is lowered to.
        graph: the source graph; stays as it is.
        steps: the passes in order.
        plans: what each will do, where that is known already.

    Returns:
        The rehearsed graph, and what is refused of it.
    """
    own = type(backend).refuses_source is not Backend.refuses_source  # otherwise it says what is asked below
    found = list(backend.refuses_source(graph)) if own else []
    rehearsed = graph
    for number, step in enumerate(steps):
        if type(step).rehearse is not Pass.rehearse:
            rehearsed = _rehearsed(step, rehearsed, plans[number] if plans is not None else None)
    final = not any(step.heals for step in steps)
    found += [refusal for refusal in backend.refuses(rehearsed) if final or refusal.lasting]
    return rehearsed, list(dict.fromkeys(found))


def _rehearsed(step: Pass[Any], graph: Graph, plan: Plan[Any] | None) -> Graph:
    clone = graph.clone()
    structure = discover(clone)
    editor = Editor(clone)
    try:
        step.rehearse(editor, structure.select(step.selection(structure)), plan)
        editor.finish()
    except SurgeonError:  # passes in front may change what it finds: the pass itself will say
        return graph
    return clone


def refuse(who: str, graph: Graph, refusals: Sequence[Refusal]) -> None:
    """Refuse a graph where there are reasons to.

    Args:
        who: refuses what, the head of the message.
        graph: that is refused.
        refusals: the reasons.

    Raises:
        LowerError: lists them.
    """
    if refusals:
        raise refused(who, graph, refusals)


def refused(who: str, graph: Graph, refusals: Iterable[Refusal]) -> LowerError:
    """The error of :func:`refuse`."""
    return LowerError("\n  ".join([f"{who}:", *listed(refusals, graph)]))


def listed(refusals: Iterable[Refusal], graph: Graph) -> list[str]:
    """One line for each reason, ``WHERE: WHY``."""
    return [f"{where}: {reason}" for where, reason in grouped(refusals, graph)]


def grouped(refusals: Iterable[Refusal], graph: Graph) -> list[tuple[str, str]]:
    """Each reason once, behind the places that it is given for: ``attention.k, attention.q of blocks 0-31``.

    Args:
        refusals: of the graph.
        graph: for the sites that nodes and tensors belong to.
    """
    alike: dict[str, list[Refusal]] = {}
    for refusal in refusals:
        alike.setdefault(_NUMBER.sub("*", refusal.reason), []).append(refusal)
    reasons: dict[str, list[str]] = {}
    for pattern, found in alike.items():  # layers that a reason names are numbered there too
        same = len({refusal.reason for refusal in found}) == 1
        reasons[found[0].reason if same else pattern] = [refusal.node for refusal in found]
    if all(len(nodes) == 1 for nodes in reasons.values()):
        return [(node, reason) for reason, (node,) in reasons.items()]
    try:
        sites = _Sites(graph, discover(graph))
    except SurgeonError:  # a graph without structure
        return [(_few(list(dict.fromkeys(nodes))), reason) for reason, nodes in reasons.items()]
    return [
        (nodes[0] if len(nodes) == 1 else compact(map(sites.of, nodes)), reason) for reason, nodes in reasons.items()
    ]


def compact(places: Iterable[str]) -> str:
    """Places as a short text; those that only differ in the block are one.

    Example:
        >>> compact(["blocks.0.ffn.up", "blocks.1.ffn.up", "blocks.2.ffn.up", "head"])
        'ffn.up of blocks 0-2; head'
    """
    parts: dict[str, set[int]] = {}
    others: list[str] = []
    for place in dict.fromkeys(places):
        match = _IN_BLOCK.fullmatch(place)
        if match is None:
            others.append(place)
        else:
            parts.setdefault(match[2] or "", set()).add(int(match[1]))
    together: dict[frozenset[int], list[str]] = {}
    for part, blocks in parts.items():
        together.setdefault(frozenset(blocks), []).append(part)
    found = []
    for chosen, names in together.items():
        if len(chosen) == 1 and len(names) == 1:
            found.append(f"blocks.{min(chosen)}{'.' if names[0] else ''}{names[0]}")
        else:
            where = f"block {min(chosen)}" if len(chosen) == 1 else f"blocks {_ranges(sorted(chosen))}"
            named = [name for name in names if name]
            found.append(f"{_few(named)} of {where}" if named else where)
    return "; ".join([*found, *([_few(others)] if others else [])])


def _few(names: Sequence[str]) -> str:
    more = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {more} more" if more > 0 else "")


def _ranges(numbers: Sequence[int]) -> str:
    """``0-3, 5`` for ascending numbers."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


class _Sites:
    """Sites by the names of the nodes and tensors in them."""

    def __init__(self, graph: Graph, structure: Structure) -> None:
        self._roles = structure.roles
        self._nodes: dict[str, fx.Node] = {node.name: node for node in graph.module.graph.nodes}
        self._regions = {
            node: f"{block.name}.{region.kind}"
            for block in structure.blocks
            for region in block.regions
            for node in region.nodes
        }

    def of(self, name: str) -> str:
        """The site of a node or tensor, or its own name."""
        role = next((self._roles[tensor] for tensor in (name, f"{name}_codes") if tensor in self._roles), None)
        node = self._nodes.get(name)
        if role is None and node is not None:
            tensors = [str(source.target) for source in (node, *node.all_input_nodes) if source.op == "get_attr"]
            role = next((self._roles[tensor] for tensor in tensors if tensor in self._roles), None)
        if role is not None:
            return role.removesuffix(".weight")
        return name if node is None else self._regions.get(node, name)
