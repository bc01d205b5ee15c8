"""Derivatives of the loss with respect to values inside a graph, on calibration data.

The loss is the next-token cross entropy of a causal language model, summed over the tokens that are predicted.  Weights
get no gradient: differentiation starts at the first value that is asked for.

Of other models a random direction of the outputs can be differentiated in its place: ``sum_t s_t . o_t / r`` over rows o_t of
each output, r^2 the mean of ``|o_t|^2``, with signs s drawn at random.  The squares of its derivatives are, in the mean over s,
those of all outputs together (Hutchinson 1990): what they say of an error is by how much of their energy the outputs move.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, fx

from surgeon.caches import TOKENS
from surgeon.contract import Observer
from surgeon.errors import ObserveError
from surgeon.evaluate import predicted_tokens
from surgeon.graph import Graph
from surgeon.observe import Batch, Execution, observe, settle


def observe_gradients(graph: Graph, batches: Iterable[Batch], observers: Mapping[str, Observer]) -> None:
    """Run the graph forward and backward over all batches, feeding observers whose ``gradient`` is set.

    Each gets the values of its nodes and then the derivative of the loss with respect to the last of them.  Models that
    predict no next token, or a decoder's behind an encoder, have no loss here: observers that are ``directed`` get the
    derivative of a random direction of the outputs, others the values alone.

    Memory: every activation behind the first watched value, for one batch.

    Raises:
        ObserveError: there is no batch, or no output to go by.
    """
    has_loss = predicted_tokens(graph) == TOKENS
    if not has_loss:
        batches = list(batches)
        undirected = {key: observer for key, observer in observers.items() if not observer.directed}
        if undirected:
            observe(graph, batches, undirected)
        observers = {key: observer for key, observer in observers.items() if observer.directed}
        if not observers:
            return
    watched = {node for observer in observers.values() for node in observer.nodes}
    count = 0
    for batch in batches:
        count += 1
        run = _Backward(graph, batch, {observer.nodes[-1] for observer in observers.values()}, watched)
        gradients = run.gradients(None if has_loss else torch.Generator().manual_seed(count))
        for observer in observers.values():
            values = [(node, run.kept[node].detach()) for node in observer.nodes]
            last = observer.nodes[-1]
            every = [*values, (last, gradients[last])]
            observer.update(*(run.rows(node, value, observer.features) for node, value in every))
    if count == 0:
        raise ObserveError("the calibration data holds no batch")
    settle(observers.values())


class _Backward(Execution):
    """One forward run that autograd records from the first of ``wanted`` on.

    Attributes:
        kept: values of the watched nodes.
    """

    def __init__(self, graph: Graph, batch: Batch, wanted: set[fx.Node], watched: set[fx.Node]) -> None:
        super().__init__(graph, batch)
        self.batch = batch
        self.wanted = wanted
        self.kept: dict[fx.Node, Tensor] = {}
        self.watched = watched

    @torch.enable_grad()
    def gradients(self, signs: torch.Generator | None) -> dict[fx.Node, Tensor]:
        """Derivative of the loss, or of a random direction of the outputs, with respect to every wanted node."""
        for node in self.graph.module.graph.nodes:
            self._evaluate(node)
            if node.op == "get_attr":
                self.values[node] = self.values[node].detach()
                continue
            if node in self.wanted and not self.values[node].requires_grad:
                self.values[node] = self.values[node].detach().requires_grad_()
            if node in self.watched:
                self.kept[node] = self.values[node]
        order = list(self.wanted)
        found = torch.autograd.grad(
            self._loss() if signs is None else self._direction(signs),
            [self.kept[node] for node in order],
            allow_unused=True,
            materialize_grads=True,
        )
        return dict(zip(order, found, strict=True))

    def _outputs(self) -> dict[str, tuple[fx.Node, Tensor]]:
        """The nodes of the outputs, but for caches, and their values."""
        output = self.graph.module.graph.output_node()
        every = zip(self.graph.outputs, output.args[0], self.values[output], strict=True)  # type: ignore[arg-type]  # a tuple
        return {port.name: (node, value) for port, node, value in every if port.role == ""}

    def _direction(self, signs: torch.Generator) -> Tensor:
        total: Tensor | None = None
        for node, value in self._outputs().values():
            if value.requires_grad:
                rows = self.rows(node, value).double()
                drawn = torch.randint(0, 2, rows.shape, generator=signs).to(rows) * 2 - 1
                size = rows.detach().square().sum(-1).mean().sqrt().clamp_min(torch.finfo(rows.dtype).tiny)
                found = (drawn * rows).sum() / size
                total = found if total is None else total + found
        if total is None:
            names = ", ".join(self._outputs())
            raise ObserveError(f"no output ({names}) can be differentiated by the values that are looked at")
        return total

    def _loss(self) -> Tensor:
        logits = self._outputs()["logits"][1]
        ids = self.batch["input_ids"].to(logits.device)
        valid = torch.ones_like(ids, dtype=torch.bool) if self.mask is None else self.mask.view_as(ids)
        predicts = valid[:, :-1] & valid[:, 1:]
        return torch.nn.functional.cross_entropy(
            logits[:, :-1][predicts].float(), ids[:, 1:][predicts], reduction="sum"
        )
