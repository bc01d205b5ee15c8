"""Whether an exported graph is functional as it stands, so that the slow way of making it so can be skipped.

``ExportedProgram.run_decompositions({})`` runs the whole model a second time through autograd and functionalisation, which
takes longer than the export itself.  Canonical form needs of it only that nothing writes into a tensor and that operators
which are defined by others are replaced where they may return their input.  Both can be read off the graph:

1. An operator that neither writes, nor returns its input or a view of it under the name of another operator, stays.
2. One that does the latter (``chunk``, ``reshape``, ``to`` ...) stays where canonical form respells it itself.
3. ``y = op_(x, ...)`` is ``y = op(x, ...)``, and ``x`` is ``y`` from there on, where no view of x that was made before is read
   afterwards, and x is neither an input nor a weight.  Likewise ``op_(v, ...)`` of rows v of x (``select``, ``slice``): x is x
   with ``op(v, ...)`` scattered into these rows from there on.
4. Anything else, a nested graph or a mapped function (``vmap``) among them, needs the slow way.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch._decomp import _should_decompose_because_unsafe_op

from surgeon.canonical_rules import RULES

_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd
_aten = torch.ops.aten
SCATTERS = {_aten.select.int: _aten.select_scatter.default, _aten.slice.Tensor: _aten.slice_scatter.default}
"""What writes rows back into the tensor that an operator took them of: (tensor, rows, further arguments of the operator)."""


def is_functional(graph: fx.Graph) -> bool:
    """Whether canonical form can be made of an exported graph without ``run_decompositions``."""
    aliases = Aliases(graph)
    return all(_stays(node, aliases) for node in graph.nodes if node.op == "call_function")


def in_place_form(target: torch._ops.OpOverload) -> torch._ops.OpOverload | None:
    """The functional operator of an in-place one (``add`` of ``add_``); None where it is no such operator."""
    namespace, _, name = target._schema.name.partition("::")
    if not name.endswith("_") or name.endswith("__"):
        return None
    packet = getattr(getattr(torch.ops, namespace), name[:-1], None)
    found = getattr(packet, target._overloadname, None)
    if found is None or found._schema.is_mutable:
        return None
    names = [[argument.name for argument in schema.arguments] for schema in (target._schema, found._schema)]
    return found if names[0] == names[1] else None


def _stays(node: fx.Node, aliases: Aliases) -> bool:
    target = node.target
    if isinstance(target, torch._ops.HigherOrderOperator):
        return False  # Case 4
    if not isinstance(target, torch._ops.OpOverload):
        reads = (source.meta.get("val") for source in node.all_input_nodes)
        return target is operator.getitem or not any(isinstance(value, Tensor) for value in reads)  # Case 4: else of sizes
    if target._schema.is_mutable:
        return in_place_form(target) is not None and aliases.alone(node)  # Case 3
    name = str(target.name())  # type: ignore[no-untyped-call]  # torch
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(name, _COMPOSITE)
    return not composite or not may_alias(target) or target._schema.name in RULES  # Cases 1 and 2


def may_alias(target: torch._ops.OpOverload) -> bool:
    """Whether an operator may return an argument of its or a view of one."""
    if any(argument.alias_info is not None for argument in target._schema.arguments):
        return True
    unsafe: bool = _should_decompose_because_unsafe_op(target)
    return unsafe


def _converts(node: fx.Node, source: fx.Node) -> bool:
    """Whether a cast changes the type, and so makes a new tensor."""
    name = node.target._schema.name  # type: ignore[union-attr]  # the caller has looked
    dtypes = {n.meta["val"].dtype for n in (node, source) if isinstance(n.meta.get("val"), Tensor)}
    return name in ("aten::to", "aten::type_as") and len(dtypes) == 2


class Aliases:
    """Which values of a graph may share memory, by the schemas of the operators."""

    def __init__(self, graph: fx.Graph) -> None:
        self._order = {node: position for position, node in enumerate(graph.nodes)}
        self._owner: dict[fx.Node, fx.Node] = {}
        self._views: dict[fx.Node, list[fx.Node]] = {}
        self._items: dict[tuple[fx.Node, Any], fx.Node] = {}
        for node in graph.nodes:
            source = self._viewed(node)
            owner = node if source is None else self._owner[source]
            self._owner[node] = owner
            if owner is not node:
                self._views.setdefault(owner, []).append(node)

    def _viewed(self, node: fx.Node) -> fx.Node | None:
        """The argument that a node's value may be a view of."""
        if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
            return None
        target = node.target
        if target is operator.getitem:
            producer = node.args[0].target  # one of several results; only split and the like give views
            if not isinstance(producer, torch._ops.OpOverload) or may_alias(producer):
                return node.args[0]
            first = self._items.setdefault((node.args[0], node.args[1]), node)
            return None if first is node else first
        if not isinstance(target, torch._ops.OpOverload) or not may_alias(target) or _converts(node, node.args[0]):
            return None
        return node.args[0]

    def rows(self, write: fx.Node) -> tuple[fx.Node, ...]:
        """What a node writes into: a whole tensor, rows of it, rows of these ...; () where it is no such rows."""
        x = write.args[0]
        chain: list[fx.Node] = []
        while isinstance(x, fx.Node):
            chain.insert(0, x)
            if self._is_whole(x):
                return tuple(chain)
            x = x.args[0] if x.target in SCATTERS else None
        return ()

    def alone(self, write: fx.Node) -> bool:
        """Whether nothing but the written tensor itself is read after a write into it or into rows of it."""
        chain = self.rows(write)
        if not chain or self._owner[chain[0]].op != "call_function":
            return False
        x, here = chain[0], self._order[write]
        others = [view for view in self._views.get(self._owner[x], []) if not self._is_whole(view)]
        made_before = [view for view in others if self._order[view] < here]
        return all(self._order[user] <= here for view in made_before for user in view.users)

    def _is_whole(self, node: fx.Node) -> bool:
        """Whether a value is the owner itself, perhaps after writes into it."""
        while node is not self._owner[node]:
            target = node.target
            if not isinstance(target, torch._ops.OpOverload) or not target._schema.is_mutable:
                return False
            source = node.args[0]
            if not isinstance(source, fx.Node):
                return False
            node = source
        return True
