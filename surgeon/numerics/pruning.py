"""Which neurons of a feed-forward network can go, and what the others then have to give.

Letters: B networks side by side (experts of one mixture; 1 for a dense network), I neurons of which K stay and R go, G output
features.  ``C = sum_t h_t h_t^T`` over tokens is all that is known of the activations h; a column of ones may be appended to
them, whose output column is the bias: J = I + 1 then, else J = I.  Everything is computed in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]  # public, but its stub does not re-export it

from surgeon.numerics.errors import NumericsError, require_finite

_SLIGHT = 1e-8
"""Penalty that makes a singular moment regular, over the mean of its diagonal."""
_EXACT = 1e-6
"""Share of a neuron's energy that may be left of it behind the others, for it to count as a linear combination of them."""
_BLOCK = 64
"""Neurons that go before the inverse is brought up to date."""
_CANDIDATES = 256
"""Neurons among which these are looked for: those that would cost least."""


def refitted_outputs(moment: Tensor, down: Tensor, keep: Tensor, tokens: Tensor) -> Tensor:
    """Output columns of the neurons that stay, with the least squares of what the others gave.

    Minimises ``sum_t |W h_t - W' h_t,K|^2 + lambda |W' - W_K|^2`` (MoDeGPT, Lin et al. 2024, arXiv:2408.09632, type I, with
    the penalty on the change): ``W' = W_K + W_R C_RK (C_KK + lambda)^-1``.  lambda is J / 2 times the mean energy of a neuron
    at a token: as if J / 2 more tokens, in every direction, had shown that nothing is to change.  So many tokens fit freely,
    few hardly do, and a network that no token reached keeps its columns.
    A neuron that is a linear combination of those that stay (on at least 2 J tokens) is not penalised, so that nothing is lost.

    Args:
        moment: C, [B, J, J].
        down: W, [B, G, J].
        keep: numbers of the columns that stay, [B, K], ascending.
        tokens: how many C is of, [B].

    Returns:
        W', [B, G, K] float64.

    Raises:
        NumericsError: shapes do not fit, or an entry is not finite.
    """
    _check(moment, down)
    c, w = moment.double(), down.double()
    gone = others(keep, c.shape[-1])
    kept = _columns(w, keep)
    if gone.shape[1] == 0:
        return kept
    stay, known = _square(c, keep), _is_known(c, tokens)
    cross = _columns(c.gather(1, keep[:, :, None].expand(-1, -1, c.shape[2])), gone)
    alone = w.new_zeros(gone.shape, dtype=torch.bool)
    shares = torch.zeros_like(cross)
    if bool(known.any()):
        shares = torch.cholesky_solve(cross, _factor(stay, _slight(c)))
        energy = c.diagonal(dim1=1, dim2=2).gather(1, gone)
        alone = known[:, None] & (energy - (cross * shares).sum(1) <= _EXACT * energy)
    if not bool(alone.all()):
        shares = torch.where(alone[:, None], shares, torch.cholesky_solve(cross, _factor(stay, _penalty(c, tokens))))
    return kept + _columns(w, gone) @ shares.mT


def lost_energy(moment: Tensor, down: Tensor, keep: Tensor, outputs: Tensor) -> tuple[float, float]:
    """``sum_t |W h_t - W' h_t,K|^2`` over all B networks, and the same of ``W h_t``.

    Args:
        moment: C, [B, J, J].
        down: W, [B, G, J].
        keep: [B, K].
        outputs: W', [B, G, K].
    """
    c, w = moment.double(), down.double()
    change = w.scatter_add(2, keep[:, None].expand(-1, w.shape[1], -1), -outputs.double())
    return float(((change @ c) * change).sum().clamp_min(0)), float(((w @ c) * w).sum())


def leverage_scores(moment: Tensor, tokens: Tensor) -> Tensor:
    """Ridge leverage scores ``diag(C (C + lambda)^-1)`` (MoDeGPT, algorithm 1), lambda as above; [B, I, I], [B] -> [B, I].

    Raises:
        NumericsError: an entry is not finite.
    """
    _check(moment, moment)
    c = moment.double()
    penalty = _penalty(c, tokens)
    inverse = torch.cholesky_inverse(_factor(c, penalty))
    return 1 - penalty[:, None] * inverse.diagonal(dim1=1, dim2=2)


def eliminate(moment: Tensor, down: Tensor, count: int, tokens: Tensor, fixed: int = 0) -> Tensor:
    """Take neurons away one by one, each time the one that costs least once the others make up for it.

    Optimal brain surgeon (Hassibi and Stork 1992) for columns: with ``P = (C + lambda)^-1`` the loss grows by
    ``|w_i|^2 / P_ii`` where i goes, then ``w_j -= w_i P_ij / P_ii`` and ``P -= P_:i P_i: / P_ii`` for those that stay.
    Neurons go in blocks of 64, found one by one among the 256 that cost least when the block begins; everything else sees a
    block when it is complete.  Up to 256 neurons this is the greedy order itself.  Two neurons that stand in for each other
    are never both taken for free.

    Args:
        moment: C, [B, J, J].
        down: W, [B, G, J].
        count: how many go, R.
        tokens: how many C is of, [B]; lambda is slight where these are 2 J at least, and as above where they are fewer.
        fixed: that many last columns stay (the bias).

    Returns:
        Those that stay, [B, J - R], ascending, the fixed ones among them.

    Raises:
        NumericsError: shapes do not fit, an entry is not finite, or fewer than 1 would stay.
    """
    _check(moment, down)
    if not 0 <= count < moment.shape[-1] - fixed:
        raise NumericsError(f"eliminate: {count} of {moment.shape[-1] - fixed} neurons are to go; at least one must stay")
    c, w = moment.double(), down.double().clone()
    p = torch.cholesky_inverse(_factor(c, torch.where(_is_known(c, tokens), _slight(c), _penalty(c, tokens))))
    alive = torch.arange(c.shape[-1], device=c.device).expand(c.shape[0], -1)
    while count:
        size = min(_BLOCK, count)
        cost = w.square().sum(1) / p.diagonal(dim1=1, dim2=2)
        cost[:, cost.shape[1] - fixed :] = torch.inf
        near = cost.topk(min(max(_CANDIDATES, size), cost.shape[1] - fixed), largest=False).indices
        chosen = near.gather(1, _one_by_one(_square(p, near), _columns(w, near), size))
        stay = others(chosen.sort(1).values, alive.shape[1])
        # P_RR^-1 P_RK: what each of those that stay takes over from those that go
        rows = p.gather(1, chosen[:, :, None].expand(-1, -1, p.shape[2]))
        between = rows.gather(2, stay[:, None].expand(-1, size, -1))
        own = rows.gather(2, chosen[:, None].expand(-1, size, -1))
        share = torch.cholesky_solve(between, torch.linalg.cholesky((own + own.mT) / 2))
        w = _columns(w, stay) - _columns(w, chosen) @ share
        p = _square(p, stay) - between.mT @ share
        alive = alive.gather(1, stay)
        count -= size
    return alive


def _one_by_one(p: Tensor, w: Tensor, count: int) -> Tensor:
    """The ``count`` of n candidates that go one after the other; P [B, n, n] and W [B, G, n] of these -> [B, count]."""
    p, w = p.clone(), w.clone()
    found = []
    left = torch.ones(p.shape[0], p.shape[1], dtype=torch.bool, device=p.device)
    for _ in range(count):
        cost = w.square().sum(1) / p.diagonal(dim1=1, dim2=2)
        cost = torch.where(left, cost, torch.inf)
        chosen = cost.argmin(1, keepdim=True)
        found.append(chosen)
        left.scatter_(1, chosen, False)
        row = p.gather(1, chosen[:, :, None].expand(-1, -1, p.shape[2]))
        share = row / row.gather(2, chosen[:, None])
        w -= _columns(w, chosen) * share
        p -= row.mT * share
        # what is gone keeps no tie to the others; its own entry is only divided by
        p.diagonal(dim1=1, dim2=2).masked_fill_(~left, 1.0)
    return torch.cat(found, 1)


def eliminate_unfitted(moment: Tensor, down: Tensor, count: int) -> Tensor:
    """Take neurons away one by one where the others stay as they are, each time the one that then adds least to the loss.

    With ``M = (W^T W) * C`` (element by element) the loss of a set R is the sum of M over R x R.

    Args:
        moment: C, [B, I, I].
        down: W, [B, G, I].
        count: how many go.

    Returns:
        Those that stay, [B, I - count], ascending.

    Raises:
        NumericsError: shapes do not fit, an entry is not finite, or fewer than 1 would stay.
    """
    _check(moment, down)
    if not 0 <= count < moment.shape[-1]:
        raise NumericsError(f"eliminate_unfitted: {count} of {moment.shape[-1]} neurons are to go; at least one must stay")
    w = down.double()
    m = (w.mT @ w) * moment.double()
    cost = m.diagonal(dim1=1, dim2=2).clone()
    gone = torch.zeros(cost.shape, dtype=torch.bool, device=cost.device)
    for _ in range(count):
        chosen = torch.where(gone, torch.inf, cost).argmin(1, keepdim=True)
        gone.scatter_(1, chosen, True)
        cost += 2 * m.gather(1, chosen[:, :, None].expand(-1, -1, m.shape[2]))[:, 0]
    return (~gone).nonzero()[:, 1].reshape(cost.shape[0], -1)


def others(chosen: Tensor, width: int) -> Tensor:
    """The numbers below ``width`` that are not chosen, [B, n] -> [B, width - n], ascending."""
    left = torch.ones(chosen.shape[0], width, dtype=torch.bool, device=chosen.device).scatter(1, chosen, False)
    return left.nonzero()[:, 1].reshape(chosen.shape[0], width - chosen.shape[1])


def _columns(matrix: Tensor, chosen: Tensor) -> Tensor:
    return matrix.gather(2, chosen[:, None].expand(-1, matrix.shape[1], -1))


def _square(matrix: Tensor, chosen: Tensor) -> Tensor:
    """Rows and columns of symmetric matrices, [B, n, n] and [B, m] -> [B, m, m]."""
    return _columns(matrix.gather(1, chosen[:, :, None].expand(-1, -1, matrix.shape[2])), chosen)


def _is_known(c: Tensor, tokens: Tensor) -> Tensor:
    """Whether there are tokens enough to tell what depends on what, [B]."""
    return tokens.to(c.device) >= 2 * c.shape[-1]


def _slight(c: Tensor) -> Tensor:
    """A lambda that changes nothing but lets C be inverted, [B]."""
    mean = c.diagonal(dim1=1, dim2=2).mean(1)
    return torch.where(mean > 0, _SLIGHT * mean, torch.ones_like(mean))


def _penalty(c: Tensor, tokens: Tensor) -> Tensor:
    """The lambda of J / 2 tokens, [B]; 1 for a network that no token reached, whose neurons are told apart by their weights."""
    mean = c.diagonal(dim1=1, dim2=2).mean(1) / tokens.to(c.device).clamp_min(1)
    return torch.where(mean > 0, mean * c.shape[-1] / 2, torch.ones_like(mean))


def _factor(c: Tensor, penalty: Tensor) -> Tensor:
    """Cholesky factor of C + lambda, [B, n, n]."""
    matrix = (c + c.mT) / 2
    matrix.diagonal(dim1=1, dim2=2).add_(penalty[:, None])
    try:
        factor: Tensor = torch.linalg.cholesky(matrix)
    except LinAlgError as error:
        raise NumericsError(f"the activations' second moment is not positive with this penalty: {error}") from error
    return factor


def _check(moment: Tensor, down: Tensor) -> None:
    square = moment.ndim == 3 and moment.shape[1] == moment.shape[2]
    if not square or down.ndim != 3 or down.shape[0] != moment.shape[0] or down.shape[2] != moment.shape[2]:
        raise NumericsError(
            f"pruning: moment {list(moment.shape)}, down {list(down.shape)}; needed [B, J, J] and [B, G, J]"
        )
    require_finite(moment=moment, down=down)
