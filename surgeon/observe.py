"""Running a graph node by node, and the streaming statistics that are taken on the way.

Every statistic is a sum that merges, so calibration data can be observed in shards.  Padding never enters a statistic:
where the graph has a two-dimensional ``attention_mask`` input, the rows of masked positions are removed first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from surgeon.contract import Observer
from surgeon.errors import ObserveError
from surgeon.graph import Graph
from surgeon.placement import relocated, to_host

Batch = Mapping[str, Tensor]


class Stretch:
    """A consecutive run of a graph's nodes, with the moment at which each value is needed for the last time.

    Attributes:
        nodes: the nodes to evaluate.
        due: observers by the index in ``nodes`` after which all their values exist (-1: before the first).
        expiry: values by the index in ``nodes`` after which nothing needs them any more.
    """

    def __init__(self, graph: fx.Graph, nodes: Sequence[fx.Node], observers: Iterable[Observer] = ()) -> None:
        self.nodes = nodes
        self.due: dict[int, list[Observer]] = {}
        self.expiry: dict[int, list[fx.Node]] = {}
        position = {node: index for index, node in enumerate(nodes)}
        held: dict[fx.Node, int] = {}
        for observer in observers:
            last = max(position.get(node, -1) for node in observer.nodes)
            self.due.setdefault(last, []).append(observer)
            for node in observer.nodes:
                held[node] = max(held.get(node, -1), last)
        done: set[fx.Node] = set()
        first = nodes[0] if nodes else None
        for node in graph.nodes:
            if node is first:
                break
            done.add(node)
        for node in (*done, *nodes):
            if node.op in ("placeholder", "output"):
                continue  # a later edit may read an input's size; what the graph gives out is asked for behind its end
            # An output that no stretch reaches is nobody's: the caches of a block would be held until the last one.
            users = [user for user in node.users if user not in done and (user.op != "output" or user in position)]
            waiting = [position.get(user, len(nodes)) for user in users]
            last_use = max(*waiting, held.get(node, -1), position.get(node, -1), -1)
            if last_use < len(nodes):
                self.expiry.setdefault(max(last_use, 0), []).append(node)


class Execution:
    """Runs one graph over one batch, from any position to any later one, holding only values that are still needed.

    Values are where the graph is placed (see ``surgeon.placement``), on the host by default.

    Attributes:
        values: live values at the current position.
        mask: which rows of [batch * sequence] are no padding; None where the batch does not say.
    """

    def __init__(self, graph: Graph, batch: Batch) -> None:
        graph.require_weights("observing it")
        self.graph = graph
        self._batch = batch
        self.values: dict[fx.Node, Any] = {}
        self.rebind()
        mask = batch.get("attention_mask")
        self.mask = graph.placed(mask.bool().flatten()) if mask is not None and mask.dim() == 2 else None
        self._masked, self._unmasked = _sizes(graph, graph.module.graph.find_nodes(op="placeholder"))

    def fork(self) -> Execution:
        """An execution at the same position that can run on without moving this one."""
        other = object.__new__(Execution)
        other.graph, other.values, other.mask, other._batch = self.graph, dict(self.values), self.mask, self._batch
        other._masked, other._unmasked = self._masked, self._unmasked
        return other

    def rebind(self) -> None:
        """Hand the inputs in anew, after an edit changed their sizes: caches that were left out are made as they are now."""
        placeholders = self.graph.module.graph.find_nodes(op="placeholder")
        self.values.update(zip(placeholders, self.graph.placed(self.graph.bind(self._batch)), strict=True))

    @torch.no_grad()
    def run(self, stretch: Stretch) -> None:
        """Evaluate a stretch that starts at the current position, feeding its observers as soon as their values exist."""
        self._feed(stretch.due.get(-1, ()))
        for index, node in enumerate(stretch.nodes):
            self._evaluate(node)
            self._feed(stretch.due.get(index, ()))
            for dead in stretch.expiry.get(index, ()):
                self.values.pop(dead, None)

    def _evaluate(self, node: fx.Node) -> None:
        placement = self.graph.placement
        if node.op == "get_attr":
            weight = self.graph.tensor(str(node.target))
            self.values[node] = weight if placement is None else placement.weight(weight)
        elif node.op == "call_function":
            named = node.kwargs if placement is None else relocated(node, placement.device)
            args, kwargs = fx.node.map_arg((node.args, named), self.values.__getitem__)
            self.values[node] = node.target(*args, **kwargs)  # type: ignore[operator]  # call_function target
        elif node.op == "output":
            self.values[node] = fx.node.map_arg(node.args[0], self.values.__getitem__)

    def _feed(self, observers: Iterable[Observer]) -> None:
        for observer in observers:
            if observer.whole:
                first = observer.nodes[0]
                value = self.values[first].flatten(0, -2)
                every = torch.arange(value.shape[0], device=value.device)[:, None]
                observer.update(*map(self.values.__getitem__, observer.nodes), self.rows(first, every)[:, 0])
            else:
                observer.update(*(self.rows(node, self.values[node], observer.features) for node in observer.nodes))

    def rows(self, node: fx.Node, value: Tensor, features: int = -1) -> Tensor:
        """The value of a node, or something of its shape, [batch, sequence, ...] or [tokens, ...] -> [valid tokens, features].

        ``features`` is the dimension, from the end, that becomes the last one.  Rows that the mask says nothing of are all
        valid: those of a decoder where the mask is the encoder's, of equal number or not.
        """
        value = value.movedim(features, -1)
        rows = value.flatten(0, -2) if value.dim() > 2 else value
        symbols = _symbols(node)
        same = self._masked <= symbols and not self._unmasked & symbols
        if self.mask is not None and rows.shape[0] == self.mask.numel() and same:
            rows = rows[self.mask]
        return rows


def _sizes(graph: Graph, placeholders: Sequence[fx.Node]) -> tuple[set[Any], set[Any]]:
    """Symbols of the dynamic dimensions that the mask of the tokens has, and of those that it has not."""
    mask: set[Any] = set()
    others: set[Any] = set()
    for port, node in zip(graph.inputs, placeholders, strict=True):
        if port.name == "attention_mask":
            mask = _symbols(node)
        elif port.role == "":  # a mask covers the past too, which is empty here
            others |= _symbols(node)
    return mask & others, others - mask


def _symbols(node: fx.Node) -> set[Any]:
    shape = getattr(node.meta.get("val"), "shape", ())
    return {symbol for size in shape if isinstance(size, torch.SymInt) for symbol in size.node.expr.free_symbols}


def observe(graph: Graph, batches: Iterable[Batch], observers: Mapping[str, Observer]) -> None:
    """Run the graph over all batches, feeding the observers; stops after the last node that is observed.

    Raises:
        ObserveError: there is no batch.
    """
    nodes = list(graph.module.graph.nodes)
    watched = {node for observer in observers.values() for node in observer.nodes}
    stop = max((index for index, node in enumerate(nodes) if node in watched), default=-1)
    body = [node for node in nodes[: stop + 1] if node.op != "placeholder"]
    stretch = Stretch(graph.module.graph, body, observers.values())
    count = 0
    for batch in batches:
        count += 1
        Execution(graph, batch).run(stretch)
    if count == 0:
        raise ObserveError("the calibration data holds no batch")
    settle(observers.values())


def settle(observers: Iterable[Observer]) -> None:
    """Bring what observers hold to the host, where passes look at it."""
    for observer in observers:
        vars(observer).update(to_host(vars(observer)))


def outputs(graph: Graph, inputs: Batch) -> list[Tensor]:
    """Outputs of a placed graph, in the order of its ports, on the host; weights come and go on the way."""
    whole = Execution(graph, inputs)
    nodes = [node for node in graph.module.graph.nodes if node.op != "placeholder"]
    whole.run(Stretch(graph.module.graph, nodes))
    return list(to_host(whole.values[nodes[-1]]))


class MeanCosine(Observer):
    """Mean over tokens of the cosine similarity of two values, ``mean_t cos(a_t, b_t)``.

    Attributes:
        features: the dimension of both, from the end, along which they are compared.
        total: sum of similarities.
        tokens: number of tokens.
    """

    def __init__(self, first: fx.Node, second: fx.Node, features: int = -1) -> None:
        self.nodes = (first, second)
        self.features = features
        self.total = 0.0
        self.tokens = 0

    def update(self, *values: Tensor) -> None:
        """Add [tokens, hidden] twice."""
        first, second = (value.float() for value in values)
        self.total += float(torch.nn.functional.cosine_similarity(first, second, dim=-1).double().sum())
        self.tokens += first.shape[0]

    def merge(self, other: Observer) -> None:
        """Add another shard."""
        assert isinstance(other, MeanCosine)
        self.total += other.total
        self.tokens += other.tokens

    @property
    def mean(self) -> float:
        """The mean similarity, in [-1, 1]."""
        return self.total / max(self.tokens, 1)


class MeanValue(Observer):
    """``mean_t x_t`` of one value, in float64.

    Attributes:
        total: sum over tokens, [D].
        tokens: number of tokens.
    """

    def __init__(self, node: fx.Node) -> None:
        self.nodes = (node,)
        self.total = torch.zeros((), dtype=torch.float64)
        self.tokens = 0

    def update(self, *values: Tensor) -> None:
        """Add [tokens, D]."""
        self.total = self.total + values[0].double().sum(0).cpu()
        self.tokens += values[0].shape[0]

    def merge(self, other: Observer) -> None:
        """Add another shard."""
        assert isinstance(other, MeanValue)
        self.total = self.total + other.total
        self.tokens += other.tokens

    @property
    def mean(self) -> Tensor:
        """The mean, [D]."""
        return self.total / max(self.tokens, 1)


class Extremes(Observer):
    """Least and greatest value of every feature of one value over all positions, padding too: what a range at run time spans.

    Batches go to two halves in turn, so that what one says of the data to come can be tried on the other.

    Attributes:
        low: min_t x_t of each half, [2, D] float64.
        high: max_t x_t of each half, [2, D] float64.
        tokens: number of tokens, without padding.
    """

    whole: ClassVar[bool] = True

    def __init__(self, node: fx.Node) -> None:
        self.nodes = (node,)
        self.low = torch.full((2, 1), float("inf"), dtype=torch.float64)
        self.high = -self.low
        self.tokens = 0
        self._batches = 0

    def update(self, *values: Tensor) -> None:
        """Add [..., D], with the numbers of the rows that are no padding."""
        value, rows = values
        if value.numel():
            half = self._batches % 2
            low, high = (end.cpu() for end in value.flatten(0, -2).aminmax(dim=0))
            self.low, self.high = (kept.expand(2, low.numel()).clone() for kept in (self.low, self.high))
            self.low[half] = torch.minimum(self.low[half], low.double())
            self.high[half] = torch.maximum(self.high[half], high.double())
            self._batches += 1
        self.tokens += rows.numel()

    def merge(self, other: Observer) -> None:
        """Add another shard."""
        assert isinstance(other, Extremes)
        self.low, self.high = torch.minimum(self.low, other.low), torch.maximum(self.high, other.high)
        self.tokens += other.tokens
        self._batches += other._batches

    @property
    def peaks(self) -> Tensor:
        """Largest magnitudes in each half, or in all there was where one is empty, [2, D]."""
        found = torch.maximum(self.high, -self.low)
        return torch.where(found == -float("inf"), found.flip(0), found)  # NaN and infinity are what was seen

    @property
    def peak(self) -> Tensor:
        """Largest magnitude, [D]."""
        return self.peaks.amax(0)


class Routing(Observer):
    """How often and how strongly each expert is chosen, and how alike experts are in the router's eyes.

    Memory: 8 E^2 bytes.

    Attributes:
        counts: number of tokens routed to each expert, [E].
        mass: sum of their weights, [E].
        gram: ``sum_t l_t l_t^T`` of the router's scores l_t, [E, E]; its normalised entries are the cosine similarities of
            the experts' columns of scores over tokens.
        tokens: number of tokens.
    """

    def __init__(self, index: fx.Node, weight: fx.Node, logits: fx.Node | None, experts: int) -> None:
        self.nodes = (index, weight) if logits is None else (index, weight, logits)
        self.counts = torch.zeros(experts, dtype=torch.float64)
        self.mass = torch.zeros(experts, dtype=torch.float64)
        self.gram = torch.zeros(experts, experts, dtype=torch.float64)
        self.tokens = 0

    def update(self, *values: Tensor) -> None:
        """Add index [tokens, k], weight [tokens, k] and the scores [tokens, E]."""
        index, weight = values[0].cpu(), values[1].cpu().double()
        experts = self.counts.numel()
        self.counts += torch.bincount(index.flatten(), minlength=experts).double()
        self.mass += torch.bincount(index.flatten(), weights=weight.flatten(), minlength=experts)
        if len(values) == 3:
            scores = values[2].cpu().double()
            self.gram += scores.T @ scores
        self.tokens += index.shape[0]

    def merge(self, other: Observer) -> None:
        """Add another shard."""
        assert isinstance(other, Routing)
        self.counts = self.counts + other.counts
        self.mass = self.mass + other.mass
        self.gram = self.gram + other.gram
        self.tokens += other.tokens

    def similarity(self) -> Tensor:
        """Cosine similarities of the experts' score columns, [E, E] in [-1, 1]."""
        norm = self.gram.diagonal().clamp_min(torch.finfo(torch.float64).tiny).sqrt()
        return self.gram / torch.outer(norm, norm)
