"""How far the output of a mixture moves where experts are missing, and the sets of experts that move it least.

With the weights w of all experts and w' of those that remain, both zero where an expert is not chosen, the output of token t
moves by ``sum_e (w'_e - w_e) E_e(x_t)``, so that its squared norm is a quadratic form of the inner products
``G_t[e, f] = <E_e(x_t), E_f(x_t)>``.  These are computed once; a set of experts then costs a routing and that form, which are
computed for many sets and all tokens at once.

Letters in shapes: S sets of experts, T tokens, E experts, H input width.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from surgeon.expert_outputs import dense_weights
from surgeon.ops import moe as run_experts
from surgeon.rerouting import reroute
from surgeon.structure import MoE

_CHUNK = 1 << 22
"""Most numbers held at once for one intermediate value, 32 MB in float64."""

_OUTPUTS = 1 << 24
"""Most numbers of expert outputs held at once, 64 MB in float32: an expert of many should see more than a few tokens."""

PRODUCTS = 1 << 25
"""Most inner products that are kept, T E^2: 128 MB in float32, 8192 tokens of 64 experts or 512 of 256."""

Operands = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


@dataclass
class Reconstruction:
    """The tokens of one mixture, and what its output loses with any set of its experts.

    Attributes:
        moe: the mixture, for which ``surgeon.rerouting.refuses_rerouting`` is None.
        logits: [T, E].
        bias: correction of the selection, [E], or None.
        products: G, [T, E, E].
        losses: of the sets that were asked for: ``sum_t ||F(x_t) - F'(x_t)||^2 / sum_t ||F(x_t)||^2``.
    """

    moe: MoE
    logits: Tensor
    bias: Tensor | None
    products: Tensor
    losses: dict[frozenset[int], float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        everyone = torch.ones(1, self.moe.experts, dtype=torch.bool, device=self.logits.device)
        self._index, self._weight = (part[0] for part in reroute(self.moe, self.logits, self.bias, everyone))
        self._norm = float(_form(self._index[None], self._weight[None], self.products)[0])

    @classmethod
    def of(cls, moe: MoE, x: Tensor, logits: Tensor, bias: Tensor | None, operands: Operands) -> Reconstruction:
        """From tokens x [T, H] and the router's output on them; fewer are used where E^2 T would exceed ``PRODUCTS``."""
        limit = max(1, PRODUCTS // moe.experts**2)
        return cls(moe, logits[:limit], bias, output_products(x[:limit], operands, moe.activation))

    def repeats(self, index: Tensor, weight: Tensor, tolerance: float = 1e-3) -> bool:
        """Whether what was observed is what is computed here: index [n, k] and weight [n, k] of all tokens seen.

        Tokens that the mixture left out altogether (an expert was full) do not count.
        """
        rows = self._index.shape[0]
        seen = dense_weights(index[:rows], weight[:rows], self.moe.experts)
        found = dense_weights(self._index, self._weight, self.moe.experts)
        kept = seen.ne(0).any(1)
        return float((seen[kept] - found[kept]).norm()) <= tolerance * float(seen[kept].norm())

    def loss(self, sets: Sequence[frozenset[int]]) -> list[float]:
        """Share of the output's squared norm that is lost with only these experts, for every set (of one size)."""
        new = [kept for kept in dict.fromkeys(sets) if kept not in self.losses]
        tokens, k = self._index.shape
        step = max(1, _CHUNK // (tokens * max(self.moe.experts, 4 * k * k)))
        for start in range(0, len(new), step):
            part = new[start : start + step]
            present = torch.zeros(len(part), self.moe.experts, dtype=torch.bool)
            rows = torch.tensor([row for row, kept in enumerate(part) for _ in kept])
            present[rows, torch.tensor([expert for kept in part for expert in kept])] = True
            index, weight = reroute(self.moe, self.logits, self.bias, present.to(self.logits.device))
            before = (len(part), -1, -1)
            index = torch.cat([index, self._index.expand(before)], dim=2)
            weight = torch.cat([weight, -self._weight.expand(before)], dim=2)
            moved = _form(index, weight, self.products) / max(self._norm, 1e-300)
            self.losses.update(zip(part, moved.tolist(), strict=True))
        return [self.losses[kept] for kept in sets]


def output_products(x: Tensor, operands: Operands, activation: str) -> Tensor:
    """``<E_e(x_t), E_f(x_t)>`` of all experts' own outputs: x [T, H] -> [T, E, E] float32.

    Every pair of a token and an expert is a token of its own to the grouped operator, so that no loop runs over either.
    """
    experts, width = operands[0].shape[0], operands[1].shape[1]
    step = max(1, _OUTPUTS // (experts * width))
    parts = []
    for start in range(0, x.shape[0], step):
        rows = x[start : start + step].to(operands[0].dtype)
        chosen = torch.arange(experts, device=rows.device).repeat(rows.shape[0])[:, None]
        pairs = rows.repeat_interleave(experts, dim=0)
        out = run_experts(pairs, chosen, pairs.new_ones(chosen.shape), *operands, activation)
        each = out.float().reshape(-1, experts, width)
        parts.append(each @ each.transpose(1, 2))
    return torch.cat(parts)


def _form(index: Tensor, weight: Tensor, products: Tensor) -> Tensor:
    """``sum_t || sum_m weight_m E_index_m(x_t) ||^2``; an expert may be named twice.

    Args:
        index: [S, T, m].
        weight: [S, T, m].
        products: G, [T, E, E].

    Returns:
        [S] float64, never below 0.
    """
    tokens, experts = products.shape[:2]
    if 2 * index.shape[2] >= experts:  # few experts: as dense vectors
        dense = torch.zeros(*index.shape[:2], experts, dtype=weight.dtype, device=index.device).scatter_add(2, index, weight)
        by_token = dense.transpose(0, 1).to(products.dtype)  # [T, S, E]
        return (torch.bmm(by_token, products) * by_token).sum((0, 2), dtype=torch.float64).clamp_min(0)
    first = index + experts * torch.arange(tokens, device=index.device)[:, None]
    pairs = products.flatten()[first[..., :, None] * experts + index[..., None, :]]  # [S, T, m, m]
    part = weight.to(products.dtype)
    return (pairs * part[..., :, None] * part[..., None, :]).sum((1, 2, 3), dtype=torch.float64).clamp_min(0)


# -- searching --------------------------------------------------------------------------------------------------------


def best_sets(found: Reconstruction, least: int, exhaustive: int, beam: int) -> dict[int, frozenset[int]]:
    """The experts to keep for every number of them from E down to ``least``, in steps of one per group.

    All sets of a size are compared where there are at most ``exhaustive``.  Beyond that the ``beam`` best sets of one size
    (1: greedy) are taken further, each by every expert that it may lose, one group after the other.

    Args:
        found: what a set costs.
        least: a multiple of the number of groups.
        exhaustive: see above.
        beam: see above.

    Returns:
        The best set by size.
    """
    moe = found.moe
    members, groups = moe.experts // moe.groups, moe.groups
    everyone = frozenset(range(moe.experts))
    best = {moe.experts: everyone}
    front = [everyone]
    for left in range(members - 1, least // groups - 1, -1):
        if math.comb(members, left) ** groups <= exhaustive:
            each = [list(itertools.combinations(range(g * members, (g + 1) * members), left)) for g in range(groups)]
            front = [frozenset(itertools.chain(*choice)) for choice in itertools.product(*each)]
            front = _least(found, front, beam)
        else:
            for group in range(groups):
                inside = frozenset(range(group * members, (group + 1) * members))
                front = _least(found, [kept - {expert} for kept in front for expert in sorted(kept & inside)], beam)
        best[left * groups] = front[0]
    return best


def _least(found: Reconstruction, sets: Sequence[frozenset[int]], count: int) -> list[frozenset[int]]:
    """The sets of least loss, the first of equals first."""
    distinct = list(dict.fromkeys(sets))
    losses = found.loss(distinct)
    return [distinct[i] for i in sorted(range(len(distinct)), key=lambda i: (losses[i], i))[:count]]
