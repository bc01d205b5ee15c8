"""Routers of mixtures, and how their scores become experts and weights, as graph code.

Every function is written once for two uses: with ``call=editor.call`` it adds nodes to a graph, with :func:`eager` it
computes.  Letters: T tokens, D width, E experts, k experts that a token may use.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx

from surgeon.rewrite import Editor

aten = torch.ops.aten
Call = Callable[..., Any]


def eager(operation: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Compute instead of adding a node."""
    return operation(*args, **kwargs)


@dataclass(frozen=True)
class Router:
    """``scores(x) = linears, with relu between them, of x`` (of x / |x| where ``unit``).

    Attributes:
        tensors: ``weight`` [E, D] and optionally ``bias`` [E]; with a hidden layer before them ``hidden.weight`` [W, D]
            and ``hidden.bias`` [W].
        unit: the input is divided by its norm first.
    """

    tensors: Mapping[str, Tensor]
    unit: bool = False

    @classmethod
    def hollow(
        cls,
        inputs: int,
        experts: int,
        hidden: int | None = None,
        *,
        bias: bool = True,
        unit: bool = False,
        dtype: torch.dtype | None = None,
    ) -> Router:
        """A router without numbers, on the meta device; ``hidden``: width of its hidden layer."""
        shapes: dict[str, tuple[int, ...]] = {}
        if hidden is not None:
            shapes |= {"hidden.weight": (hidden, inputs), "hidden.bias": (hidden,)}
        shapes["weight"] = (experts, inputs if hidden is None else hidden)
        if bias:
            shapes["bias"] = (experts,)
        tensors = {key: torch.empty(shape, dtype=dtype, device="meta") for key, shape in shapes.items()}
        return cls(tensors, unit)

    def scores(self, x: Tensor) -> Tensor:
        """[T, D] -> [T, E]."""
        found: Tensor = self._scores(eager, x, self.tensors)
        return found

    def add(self, editor: Editor, name: str, x: fx.Node) -> fx.Node:
        """Add the router's nodes and tensors at the insertion point: x [T, D] -> scores [T, E]."""
        tensors = {key: editor.add_tensor(f"{name}.{key}", tensor.contiguous()) for key, tensor in self.tensors.items()}
        found: fx.Node = self._scores(editor.call, x, tensors)
        return found

    def numel(self) -> int:
        """Number of weights."""
        return sum(tensor.numel() for tensor in self.tensors.values())

    def _scores(self, call: Call, x: Any, tensors: Mapping[str, Any]) -> Any:
        if self.unit:
            square = call(aten.sum.dim_IntList, call(aten.mul.Tensor, x, x), [-1], True)
            x = call(aten.mul.Tensor, x, call(aten.rsqrt.default, call(aten.add.Scalar, square, 1e-12)))
        if "hidden.weight" in tensors:
            x = call(aten.relu.default, call(aten.linear.default, x, tensors["hidden.weight"], tensors["hidden.bias"]))
        bias = (tensors["bias"],) if "bias" in tensors else ()
        return call(aten.linear.default, x, tensors["weight"], *bias)


@dataclass(frozen=True)
class Choice:
    """Which experts run, and the weight of each.

    ``top_k``: the k experts of largest score.  ``dynamic_k``: of those, the ones whose score reaches ``threshold`` times
    the largest.  ``threshold``: of those, the ones whose share of the sum of all positive scores reaches ``threshold``.
    The largest always runs.  An expert that does not run has weight exactly 0, which tells kernels that they may leave
    it out.

    Attributes:
        kind: ``top_k``, ``dynamic_k`` or ``threshold``.
        k: most experts per token.
        threshold: see above; scores below 0 count as 0.
        weighting: ``one``: chosen experts weigh ``factor``.  ``count``: factor / number of chosen experts.  ``softmax``:
            factor times the softmax of the chosen scores.  ``score``: factor times the score; ``share``: factor times the
            score over the sum of the chosen ones (only with ``top_k``).
        factor: see ``weighting``.
    """

    kind: Literal["top_k", "dynamic_k", "threshold"]
    k: int
    threshold: float = 0.0
    weighting: Literal["one", "count", "softmax", "score", "share"] = "one"
    factor: float = 1.0

    def choose(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Scores [T, E] -> index [T, k], weight [T, k]."""
        index, weight = self._choose(eager, scores)
        return index, weight

    def add(self, editor: Editor, scores: fx.Node) -> tuple[fx.Node, fx.Node]:
        """Add the nodes of the choice at the insertion point."""
        index, weight = self._choose(editor.call, scores)
        return index, weight

    def _choose(self, call: Call, scores: Any) -> tuple[Any, Any]:
        top = call(aten.topk.default, scores, self.k)
        values, index = call(operator.getitem, top, 0), call(operator.getitem, top, 1)
        if self.kind == "top_k":
            if self.weighting == "softmax":
                weight = call(aten.softmax.int, values, -1)
            elif self.weighting == "score":
                weight = values
            elif self.weighting == "share":
                weight = call(aten.div.Tensor, values, call(aten.sum.dim_IntList, values, [-1], True))
            else:
                weight = call(aten.ones_like.default, values)
            factor = self.factor / self.k if self.weighting == "count" else self.factor
            return index, weight if factor == 1.0 else call(aten.mul.Scalar, weight, factor)
        weight = self._mask(call, scores, values)
        if self.weighting == "softmax":
            blocked = call(aten.masked_fill.Scalar, values, call(aten.eq.Scalar, weight, 0), float("-inf"))
            weight = call(aten.softmax.int, blocked, -1)
        elif self.weighting == "count":
            weight = call(aten.div.Tensor, weight, call(aten.sum.dim_IntList, weight, [-1], True))
        return index, weight if self.factor == 1.0 else call(aten.mul.Scalar, weight, self.factor)

    def _mask(self, call: Call, scores: Any, values: Any) -> Any:
        """One for experts that run, [T, k]."""
        positive = call(aten.relu.default, values)
        largest = call(aten.slice.Tensor, positive, 1, 0, 1)
        if self.kind == "dynamic_k":
            limit = call(aten.mul.Scalar, largest, self.threshold)
        else:
            total = call(aten.sum.dim_IntList, call(aten.relu.default, scores), [-1], True)
            limit = call(aten.minimum.default, call(aten.mul.Scalar, total, self.threshold), largest)
        runs = call(aten.ge.Tensor, positive, limit)
        return call(aten._to_copy.default, runs, dtype=_dtype(values))


def _dtype(value: Any) -> torch.dtype:
    dtype: torch.dtype = value.meta["val"].dtype if isinstance(value, fx.Node) else value.dtype
    return dtype
