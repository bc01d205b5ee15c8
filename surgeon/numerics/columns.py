"""Removing blocks of columns from a linear layer ``y = W a + b``, and fitting the others so that y stays as it was.

Letters: W [O, I]; its columns stand in U blocks of equal width; C = sum over tokens of ``a a^T``, [I, I] (of ``a - mean(a)``
where a bias takes up what is constant); K the columns that stay, R those that go.

    W_K' = W C[:, K] C_KK^-1 = W_K + W_R C_RK C_KK^-1      least squares, as MoDeGPT (arXiv:2408.09632) does for neurons
    loss   = tr(W_R (C_RR - C_RK C_KK^-1 C_KR) W_R^T)       what is lost of ``sum_t |W a_t|^2``

With P = C^-1 and W already fitted to the blocks removed before, removing block i costs ``tr(W_i (P_ii)^-1 W_i^T)``, and

    W <- W - W_i (P_ii)^-1 P_i: ,   P <- P - P_:i (P_ii)^-1 P_i:

(Hassibi and Stork 1993, Optimal Brain Surgeon, in blocks).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]  # public, but its stub does not re-export it

from surgeon.numerics.errors import NumericsError, require_finite
from surgeon.numerics.pruning import lost_energy

RIDGE = 1e-2
"""Share of the mean of C's diagonal that is added to it, where nothing says how much is best."""
RIDGES = (1e-6, 1e-4, 1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
"""Shares of which :func:`best_ridge` takes one: few tokens need more, exact copies of what is removed next to nothing."""


@dataclass(frozen=True)
class Removal:
    """Blocks that were removed one by one.

    Attributes:
        order: their numbers in the order in which they went.
        losses: the loss up to each of them as a share of ``sum_t |W a_t|^2``.
        alone: the loss without one block alone, of every block, [U], likewise a share.
    """

    order: list[int]
    losses: list[float]
    alone: Tensor


def refit_columns(weight: Tensor, second_moment: Tensor, keep: Tensor, ridge: float = RIDGE) -> Tensor:
    """The columns that stay, fitted so that the layer gives what it gave with all of them.

    ``W_K + W_R C_RK (C_KK + r I)^-1`` with r = ridge mean(diag C): the penalty is on the change, so that nothing changes where
    nothing is removed, or where the removed inputs are zero.

    Args:
        weight: W, [O, I].
        second_moment: C, [I, I].
        keep: K, ascending.
        ridge: relative to the mean of C's diagonal.

    Returns:
        [O, number of K], of the weight's type; computed in float64.

    Raises:
        NumericsError: shapes do not fit, or an entry is not finite.
    """
    w, c = _operands(weight, second_moment, ridge)
    gone = torch.ones(w.shape[1], dtype=torch.bool)
    gone[keep] = False
    if not bool(gone.any()):
        return weight
    factor = _cholesky(c[keep][:, keep])
    change = torch.cholesky_solve(c[keep][:, gone] @ w[:, gone].T, factor).T
    return (w[:, keep] + change).to(weight.dtype)


def best_ridge(weight: Tensor, halves: tuple[Tensor, Tensor], keep: Tensor) -> float:
    """The ridge of :data:`RIDGES` with which a fit to one half of the data loses least on the other.

    Args:
        weight: W, [O, I].
        halves: C of either half of the data, [I, I] each.
        keep: K, ascending.

    Raises:
        NumericsError: shapes do not fit, or an entry is not finite.
    """

    def lost(ridge: float) -> float:
        pairs = (halves, halves[::-1])
        return sum(output_loss(weight, other, keep, refit_columns(weight, one, keep, ridge)) for one, other in pairs)

    return min(RIDGES, key=lost)


def output_loss(weight: Tensor, second_moment: Tensor, keep: Tensor, fitted: Tensor) -> float:
    """``sum_t |W a_t - W' a_t[K]|^2 / sum_t |W a_t|^2`` of a layer with some columns, ``fitted`` [O, number of K]."""
    w, c = _operands(weight, second_moment, 0.0)
    lost, whole = lost_energy(c[None], w[None], keep[None].to(w.device), fitted.detach()[None].to(w.device))
    return lost / max(whole, torch.finfo(torch.float64).tiny)


def contributions(weight: Tensor, second_moment: Tensor, blocks: int) -> Tensor:
    """``sum_t (W_i a_i)^T (W_j a_j)`` of all pairs of blocks, [U, U]; the sum of all entries is ``sum_t |W a|^2``.

    Raises:
        NumericsError: shapes do not fit, or an entry is not finite.
    """
    w, c = _operands(weight, second_moment, 0.0)
    width = _width(w, blocks)
    found: Tensor = ((w.T @ w) * c).reshape(blocks, width, blocks, width).sum((1, 3))
    return found


def remove_blocks(
    weight: Tensor, second_moment: Tensor, groups: Sequence[Sequence[int]], count: int, refit: bool = True, ridge: float = RIDGE
) -> Removal:
    """Remove blocks of columns one by one, each time the one without which least is lost.

    Args:
        weight: W, [O, I].
        second_moment: C, [I, I].
        groups: the blocks' numbers 0 .. U-1, shared out among groups that lose equally many.
        count: how many each group loses, fewer than it has.
        refit: whether the columns that stay are fitted each time, or stay as they are.
        ridge: as in :func:`refit_columns`.

    Raises:
        NumericsError: shapes do not fit, or an entry is not finite.
    """
    blocks = sum(map(len, groups))
    worth = contributions(weight, second_moment, blocks)
    total = max(float(worth.sum()), torch.finfo(torch.float64).tiny)
    quota = [count] * len(groups)
    group_of = {block: number for number, group in enumerate(groups) for block in group}
    left, order, losses = list(range(blocks)), list[int](), list[float]()
    w, c = _operands(weight, second_moment, ridge)
    width = _width(w, blocks)
    inverse = torch.cholesky_inverse(_cholesky(c)) if refit else c
    alone = _costs(w, inverse, width, left) if refit else worth.diagonal().cpu()
    lost = 0.0
    while any(quota):
        allowed = [block for block in left if quota[group_of[block]]]
        costs = _costs(w, inverse, width, allowed) if refit else _plain_costs(worth, allowed, order)
        best = int(costs.argmin())
        block = allowed[best]
        if refit:
            columns = slice(block * width, (block + 1) * width)
            own = _solved(inverse[columns, columns], inverse[columns])
            w = w - w[:, columns] @ own
            inverse = inverse - inverse[:, columns] @ own
        lost += float(costs[best])
        left.remove(block)
        order.append(block)
        losses.append(max(lost, 0.0) / total)
        quota[group_of[block]] -= 1
    return Removal(order, losses, alone.clamp_min(0) / total)


def _plain_costs(worth: Tensor, blocks: Sequence[int], gone: Sequence[int]) -> Tensor:
    """What removing one more block costs where nothing is fitted: ``M_ii + 2 sum_(j gone) M_ij``."""
    return (worth.diagonal()[blocks] + 2 * worth[blocks][:, gone].sum(1)).cpu()


def _costs(w: Tensor, inverse: Tensor, width: int, blocks: Sequence[int]) -> Tensor:
    """``tr(W_i (P_ii)^-1 W_i^T)`` of some blocks."""
    places = (torch.tensor(blocks)[:, None] * width + torch.arange(width)).to(w.device)
    own = inverse[places[:, :, None], places[:, None, :]]
    columns = w[:, places].permute(1, 2, 0)
    found: Tensor = (columns * _solved(own, columns)).sum((1, 2))
    return found.cpu()


def _solved(matrix: Tensor, right: Tensor) -> Tensor:
    """``matrix^-1 right`` for positive matrices; LU of batches (``torch.linalg.solve``) never ends on several MKL threads."""
    factor = _cholesky((matrix + matrix.mT) / 2)
    found: Tensor = torch.cholesky_solve(right, factor)
    return found


def _operands(weight: Tensor, second_moment: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    if weight.dim() != 2 or second_moment.shape != (weight.shape[1], weight.shape[1]):
        raise NumericsError(
            f"columns: weight has shape {list(weight.shape)} and second_moment {list(second_moment.shape)}, "
            "needed [O, I] and [I, I]"
        )
    require_finite(weight=weight, second_moment=second_moment)
    c = second_moment.detach().double()
    level = float(c.diagonal().mean()) or 1.0
    return weight.detach().double().to(c.device), c + ridge * level * torch.eye(c.shape[0], dtype=c.dtype, device=c.device)


def _width(w: Tensor, blocks: int) -> int:
    if w.shape[1] % blocks:
        raise NumericsError(f"columns: {w.shape[1]} columns do not stand in {blocks} blocks of equal width")
    return w.shape[1] // blocks


def _cholesky(matrix: Tensor) -> Tensor:
    try:
        factor: Tensor = torch.linalg.cholesky(matrix)
    except LinAlgError as error:
        raise NumericsError(f"columns: the second moment is not positive: {error}; more ridge is needed") from error
    return factor
