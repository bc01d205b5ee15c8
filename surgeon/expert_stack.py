"""The experts of one mixture side by side: their neurons, what these do on tokens, and how alike the experts are.

Letters in shapes: E experts of I neurons, O rows of the input matrix (I, or 2 I with [gate | up]), H input and G output
width, T tokens.  Nothing here loops over tokens or over pairs of experts, and nothing holds a second copy of the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from surgeon.graph import Graph
from surgeon.numerics import best_assignment
from surgeon.ops.mixture import inner_activation
from surgeon.resizing import expert_operands
from surgeon.structure import MoE

_CHUNK = 1 << 22
"""Most float64 numbers of gathered weights held at once, 32 MB."""


@dataclass(frozen=True)
class ExpertStack:
    """Experts as the operator reads them.

    Attributes:
        w_in: [E, O, H].
        w_out: [E, G, I].
        b_in: [E, O] or None.
        b_out: [E, G] or None.
        activation: as ``surgeon::moe`` takes it.
    """

    w_in: Tensor
    w_out: Tensor
    b_in: Tensor | None
    b_out: Tensor | None
    activation: str

    @classmethod
    def of(cls, graph: Graph, moe: MoE) -> ExpertStack:
        """Read the weights of a mixture."""
        return cls(*expert_operands(graph, moe), moe.activation)

    @property
    def experts(self) -> int:
        """E."""
        return self.w_in.shape[0]

    @property
    def width(self) -> int:
        """I."""
        return self.w_out.shape[2]

    @property
    def parts(self) -> int:
        """Rows of the input matrix per neuron: 2 where experts are gated, else 1."""
        return self.w_in.shape[1] // self.width

    @property
    def dtype(self) -> torch.dtype:
        """Type to compute in: at least float32."""
        return torch.promote_types(self.w_in.dtype, torch.float32)

    def one(self, expert: int) -> ExpertStack:
        """A stack of one expert, sharing memory."""
        return self._each(lambda tensor: tensor[expert : expert + 1])

    def to(self, dtype: torch.dtype) -> ExpertStack:
        """The same in another type."""
        return self._each(lambda tensor: tensor.to(dtype))

    def _each(self, change: Callable[[Tensor], Tensor]) -> ExpertStack:
        b_in, b_out = (None if bias is None else change(bias) for bias in (self.b_in, self.b_out))
        return ExpertStack(change(self.w_in), change(self.w_out), b_in, b_out, self.activation)

    def in_order(self, order: Tensor) -> ExpertStack:
        """The same, neuron n of expert e what neuron ``order[e, n]`` was, order [E, I]."""
        numbers = torch.arange(self.experts)[:, None]
        inner = self.rows(order)
        b_in = None if self.b_in is None else self.b_in[numbers, inner]
        w_out = self.w_out.transpose(1, 2)[numbers, order].transpose(1, 2)
        return replace(self, w_in=self.w_in[numbers, inner], w_out=w_out, b_in=b_in)

    def rows(self, neurons: Tensor) -> Tensor:
        """Rows of the input matrix that belong to neurons [..., n]: all gate rows, then all up rows; [..., parts n]."""
        return torch.cat([neurons + part * self.width for part in range(self.parts)], dim=-1)

    def inputs(self, expert: int) -> Tensor:
        """All that makes each neuron's activation: its input rows (gate and up) and their biases, [I, F]."""
        parts = list(self.w_in[expert].to(self.dtype).chunk(self.parts))
        if self.b_in is not None:
            parts += [bias[:, None] for bias in self.b_in[expert].to(self.dtype).chunk(self.parts)]
        return torch.cat(parts, dim=1)

    def outputs(self, expert: int) -> Tensor:
        """The output column of each neuron, [I, G]."""
        return self.w_out[expert].to(self.dtype).T

    def products(self, first: int, second: int) -> Tensor:
        """``<n_i, n_j>`` over all weights of the neurons i of one expert and j of another, [I, I]."""
        total: Tensor = self.outputs(first) @ self.outputs(second).T
        both = [self.w_in[expert].to(self.dtype).chunk(self.parts) for expert in (first, second)]
        for mine, other in zip(*both, strict=True):
            total.addmm_(mine, other.T)
        if self.b_in is not None:
            both = [self.b_in[expert].to(self.dtype).chunk(self.parts) for expert in (first, second)]
            for mine, other in zip(*both, strict=True):
                total.addr_(mine, other)
        return total

    def cosines(self, first: int, second: int) -> Tensor:
        """:meth:`products` over the neurons' norms, [I, I]; 0 for a neuron without weights."""
        mine, other = self._norms(first), self._norms(second)
        return self.products(first, second) / mine[:, None] / other

    def _norms(self, expert: int) -> Tensor:
        square = self.outputs(expert).square().sum(1) + self.inputs(expert).square().sum(1)
        return torch.where(square > 0, square, torch.ones_like(square)).sqrt()

    def hidden(self, expert: int, x: Tensor) -> Tensor:
        """Activations of one expert's neurons, x [T, H] -> [T, I]."""
        bias = None if self.b_in is None else self.b_in[expert].to(self.dtype)
        pre = torch.nn.functional.linear(x.to(self.dtype), self.w_in[expert].to(self.dtype), bias)
        return inner_activation(pre, self.width, self.activation)

    def mean_outputs(self, x: Tensor) -> Tensor:
        """``mean_t E_e(x_t)`` of every expert over all tokens, whether routed to it or not, [T, H] -> [E, G] float64.

        The mean is taken before the output matrix, which is linear: two thirds of the work.
        """
        rows = []
        for expert in range(self.experts):
            mean = self.w_out[expert].double() @ self.hidden(expert, x).double().mean(0)
            rows.append(mean if self.b_out is None else mean + self.b_out[expert].double())
        return torch.stack(rows)

    def output_gram(self, x: Tensor, *, directions: bool = False) -> Tensor:
        """``mean_t <E_i(x_t), E_j(x_t)>`` of every two experts over all tokens, [T, H] -> [E, E] float64.

        Args:
            x: [T, H].
            directions: the mean of the cosines instead; an output of zero has cosine 0 with every other.
        """
        gram = torch.zeros(self.experts, self.experts, dtype=torch.float64, device=self.w_in.device)
        step = max(32, _CHUNK // (self.experts * self.w_out.shape[1]))
        for start in range(0, x.shape[0], step):
            rows = x[start : start + step]
            every = gram.new_empty(self.experts, rows.shape[0], self.w_out.shape[1])
            for expert in range(self.experts):
                output = self.hidden(expert, rows) @ self.outputs(expert)
                every[expert] = output if self.b_out is None else output + self.b_out[expert].to(self.dtype)
            if directions:
                every = torch.nn.functional.normalize(every, dim=-1, eps=torch.finfo(every.dtype).tiny)
            flat = every.flatten(1)
            gram.addmm_(flat, flat.T)
        return gram / max(x.shape[0], 1)

    def aligned(self, reference: int = 0) -> Tensor:
        """Orders [E, I] in which every expert's neurons match those of the reference best, on all weights."""
        return torch.stack([best_assignment(self.products(reference, expert)) for expert in range(self.experts)])

    def weight_gram(self, order: Tensor | None = None) -> Tensor:
        """``<w_i, w_j>`` of all weights of every two experts, their neurons in the given orders [E, I]; [E, E] float64."""
        gram = torch.zeros(self.experts, self.experts, dtype=torch.float64, device=self.w_in.device)
        step = max(1, _CHUNK // (self.experts * max(self.w_in.shape[2], self.w_out.shape[1])))
        numbers = torch.arange(self.experts)[:, None]
        every = torch.arange(self.width).expand(self.experts, -1) if order is None else order

        def add(values: Tensor) -> None:
            flat = values.flatten(1).double()
            gram.addmm_(flat, flat.T)

        for start in range(0, self.width, step):
            rows = every[:, start : start + step]
            for part in range(self.parts):
                add(self.w_in[numbers, rows + part * self.width])
                if self.b_in is not None:
                    add(self.b_in[numbers, rows + part * self.width])
            add(self.w_out.transpose(1, 2)[numbers, rows])
        if self.b_out is not None:
            add(self.b_out)
        return gram
