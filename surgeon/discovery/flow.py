"""Data flow of a graph: which node depends on what, on floating-point tensors only.

Symbolic sizes, weights (``get_attr``) and integer tensors are no edges of this graph, so masks, positions and rotary tables
hang beside the hidden state instead of on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, fx

from surgeon.caches import KEPT
from surgeon.discovery import operators
from surgeon.graph import Graph


class Flow:
    """Reachability between the tensors of a graph.

    Ancestors are kept as bit sets over node positions (one Python integer per node), so that a question costs N / 64 words.

    Attributes:
        graph: the graph.
        nodes: its nodes in order.
        index: position of each node.
        constant: nodes that depend on no input tensor (weights, tables, and what is computed from them).
        weights: names of the tensors that a constant node is computed from.
        outputs: nodes that the graph returns, in order.
        kept: those of them that are returned as keys and values of an attention only, to be read by itself again.
        cuts: tensors of the streams, once these are known; no part takes them in because it alone reads them.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.nodes: list[fx.Node] = list(graph.module.graph.nodes)
        self.index = {node: position for position, node in enumerate(self.nodes)}
        self.constant: set[fx.Node] = set()
        self.weights: dict[fx.Node, tuple[str, ...]] = {}
        self.readers: dict[str, list[fx.Node]] = {}
        self._ancestors: dict[fx.Node, int] = {}
        self._inputs: dict[fx.Node, list[fx.Node]] = {}
        self._every: dict[fx.Node, int] = {}
        self.outputs: list[fx.Node] = []
        self.kept: set[fx.Node] = set()
        self.cuts: set[fx.Node] = set()
        for node in self.nodes:
            self._add(node)

    def _add(self, node: fx.Node) -> None:
        if node.op == "output":
            self.outputs = list(dict.fromkeys(node.all_input_nodes))
            results: Any = node.args[0]
            read = {result for result, port in zip(results, self.graph.outputs, strict=True) if port.role not in KEPT}
            self.kept = set(self.outputs) - read
            return
        if node.op == "get_attr":
            self.constant.add(node)
            self.weights[node] = (str(node.target),)
            self.readers.setdefault(str(node.target), []).append(node)
            return
        if node.op == "call_function":
            sources = [n for n in node.all_input_nodes if isinstance(operators.value(n), Tensor)]
            if all(n in self.constant for n in sources):
                self.constant.add(node)
                names = [name for source in sources for name in self.weights.get(source, ())]
                self.weights[node] = tuple(dict.fromkeys(names))
        if not operators.is_float(node):
            return
        inputs = [n for n in node.all_input_nodes if n in self._ancestors]
        self._inputs[node] = inputs
        mask = 0
        for source in inputs:
            mask |= self._ancestors[source] | (1 << self.index[source])
        self._ancestors[node] = mask

    def __contains__(self, node: object) -> bool:
        return node in self._ancestors

    def inputs(self, node: fx.Node) -> list[fx.Node]:
        """Floating-point tensors (weights excepted) that the node reads."""
        return self._inputs.get(node, [])

    def depends(self, node: fx.Node, source: fx.Node) -> bool:
        """Whether ``node`` is ``source`` or is computed from it."""
        return node is source or bool(self._ancestors.get(node, 0) >> self.index[source] & 1)

    def ancestors(self, node: fx.Node) -> int:
        """The node and the floating-point tensors that it is computed from, as bits at their positions."""
        return self._ancestors.get(node, 0) | 1 << self.index[node]

    def leads_to(self, source: fx.Node, node: fx.Node) -> bool:
        """Whether a node is computed from another one in any way, through numbers, marks and sizes too, or is it."""
        if not self._every:
            for here in self.nodes:
                mask = 1 << self.index[here]
                for one in here.all_input_nodes:
                    mask |= self._every[one]
                self._every[here] = mask
        return bool(self._every[node] >> self.index[source] & 1)

    def active(self, node: fx.Node) -> list[fx.Node]:
        """Tensors the node reads that depend on an input of the graph, integers included."""
        return [n for n in node.all_input_nodes if n not in self.constant and isinstance(operators.value(n), Tensor)]

    def retrieves(self, node: fx.Node) -> bool:
        """Whether a node reads rows of a stored table by numbers that are computed from activations, not given as inputs."""
        table, *numbers = node.all_input_nodes
        if operators.kind(node) not in operators.LOOKUPS or table not in self.constant:
            return False
        return any(self.follows(n) for n in numbers)

    def follows(self, node: fx.Node) -> bool:
        """Whether a tensor, of numbers or marks too, is computed from activations, not given as an input or by its tokens."""
        stack, seen = [node], set[fx.Node]()
        while stack:
            source = stack.pop()
            if source in self.constant or source in seen:
                continue
            if source in self:
                return True
            seen.add(source)
            if source.op == "call_function" and isinstance(operators.value(source), Tensor):
                stack.extend(source.all_input_nodes)
        return False

    def sources(self) -> list[fx.Node]:
        """Floating-point tensors that are computed from no other, where a stream may start."""
        return [node for node, inputs in self._inputs.items() if not inputs]

    def between(self, entry: fx.Node, exit: fx.Node) -> set[fx.Node]:
        """Nodes on paths from ``entry`` (without it) to ``exit`` (with it); walks back from the exit only."""
        found: set[fx.Node] = set()
        stack = [exit]
        while stack:
            node = stack.pop()
            if node is entry or node in found:
                continue
            found.add(node)
            stack.extend(source for source in self.inputs(node) if self.depends(source, entry))
        return found

    def close(self, nodes: Iterable[fx.Node], entry: fx.Node) -> set[fx.Node]:
        """The nodes, and every other node (``entry`` and cuts excepted) that only they use: weights, constants, indices.

        Keys and values that an attention hands out belong to it.
        """
        found = set(nodes)
        stack = [source for node in found for source in node.all_input_nodes]
        while stack:
            node = stack.pop()
            if node is entry or node in found or node in self.cuts or node.op in ("placeholder", "output"):
                continue
            if all(user in found or (user.op == "output" and node in self.kept) for user in node.users):
                found.add(node)
                stack.extend(node.all_input_nodes)
        return found

    def ordered(self, nodes: Iterable[fx.Node]) -> tuple[fx.Node, ...]:
        """In graph order."""
        return tuple(sorted(nodes, key=self.index.__getitem__))

    def strip(self, node: fx.Node, through: Callable[[fx.Node], bool]) -> fx.Node:
        """Walk back through nodes with one active input for which ``through`` holds."""
        while through(node):
            sources = [n for n in node.all_input_nodes if isinstance(operators.value(n), Tensor) and n not in self.constant]
            if len(sources) != 1:
                return node
            node = sources[0]
        return node

    def plain(self, node: fx.Node) -> fx.Node:
        """The tensor before reshapes, casts and fake quantisation."""
        return self.strip(node, lambda n: operators.is_reshape(n) or operators.kind(n) == operators.FAKE_QUANTIZE)
