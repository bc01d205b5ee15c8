"""Setting weights to zero: which ones go, and what the others make up for (SparseGPT).

Letters in shapes: B matrices side by side (experts), of ``out`` rows and ``in`` columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from surgeon.numerics.compensation import inverse_factor
from surgeon.numerics.errors import NumericsError, require_finite
from surgeon.numerics.quantization import check_weight, working_type

_BLOCK = 128
"""Columns whose zeros are chosen at once: SparseGPT's choice."""
_NEVER = -1.0
"""A score below all others, of weights that are 0 already."""


@dataclass(frozen=True)
class Zeros:
    """How many weights of a matrix are to be zero, and which compete for it.

    Attributes:
        share: zeros over weights; what is no whole number is rounded down.
        kept: weights of each group that stay, where groups of inputs compete (n of n:m).
        of: weights of such a group (m), None where there are no groups.
        rows: the weights of one output compete instead of all of the matrix.
    """

    share: float
    kept: int | None = None
    of: int | None = None
    rows: bool = False

    @classmethod
    def semi_structured(cls, kept: int, of: int) -> Zeros:
        """``kept`` of every ``of`` consecutive inputs stay."""
        return cls(1 - kept / of, kept, of)

    def runs(self, matrix: Tensor) -> Tensor:
        """A matrix [out, in] by what competes: [competitions, weights of each]."""
        width = self.of or (matrix.shape[1] if self.rows else matrix.numel())
        return matrix.reshape(-1, width)

    def number(self, weights: int) -> int:
        """Zeros among so many weights that compete."""
        if self.of is not None:
            return weights // self.of * (self.of - (self.kept or 0))
        return int(Fraction(self.share).limit_denominator(10**9) * weights)  # 0.3 of 10 is 3, whatever 0.3 is in binary

    def hold(self, matrix: Tensor) -> bool:
        """Whether a matrix [out, in] has them already."""
        runs = self.runs(matrix == 0)
        return bool((runs.sum(1) >= self.number(runs.shape[1])).all())

    def reached(self, weight: Tensor) -> int:
        """Zeros that a weight [..., out, in] has in the end: those that there are already count, and stay."""
        total = 0
        for matrix in weight.reshape(-1, *weight.shape[-2:]):
            runs = self.runs(matrix == 0)
            total += int(runs.sum(1).clamp_min(self.number(runs.shape[1])).sum())
        return total


def least(score: Tensor, weight: Tensor, zeros: Zeros) -> Tensor:
    """The weights that go: those of the lowest scores among those that compete, and those that are 0 already.

    Args:
        score: [..., out, in], nothing below 0; among equals the first go.
        weight: [..., out, in].
        zeros: how many.

    Returns:
        bool [..., out, in].

    Raises:
        NumericsError: rows are no whole number of groups, or a score is not finite.
    """
    check_groups("least", weight, zeros)
    require_finite(score=score)
    goes = weight == 0
    flat = goes.reshape(-1, *weight.shape[-2:])
    for own, ranks in zip(flat, score.reshape(flat.shape), strict=True):
        runs = zeros.runs(ranks.masked_fill(own, _NEVER))
        own |= lowest(runs, zeros.number(runs.shape[1])).reshape(own.shape)
    return goes


def lowest(score: Tensor, count: int) -> Tensor:
    """The ``count`` lowest of each row, the first among equals: bool, of the shape of score [rows, n]."""
    if count == 0:
        return torch.zeros_like(score, dtype=torch.bool)
    limit = score.kthvalue(count, dim=-1, keepdim=True).values
    below, equal = score < limit, score == limit
    missing = count - below.sum(-1, keepdim=True)
    return below | (equal & (equal.cumsum(-1, dtype=torch.int32) <= missing))


def check_groups(where: str, weight: Tensor, zeros: Zeros) -> None:
    """Raise NumericsError where the rows of a weight [..., out, in] are no whole number of groups."""
    check_weight(where, weight)
    if zeros.of is not None and weight.shape[-1] % zeros.of:
        raise NumericsError(f"{where}: rows of {weight.shape[-1]} weights are no whole number of groups of {zeros.of}")


def sparsify_compensated(weight: Tensor, second_moment: Tensor, zeros: Zeros, *, damp: float = 0.01) -> Tensor:
    """A weight with zeros, the others moved so that ``||(W - W') X||`` is near its least.

    SparseGPT (Frantar and Alistarh 2023, arXiv:2301.00774): with C = sum_t x_t x_t^T + damp mean(diag C) I and U the upper
    Cholesky factor of C^-1 = U^T U, columns are taken in their order; setting w_ij to zero costs w_ij^2 / U_jj^2 when the
    columns behind j make up for it, which take w_ij / U_jj times U_j,j+1:.  Of a run of 128 columns the same share of all
    weights goes; of groups along a row, each group loses its cheapest when the sweep has come to it.

    Weights that are 0 already stay 0 and count: what is as sparse as asked comes back to the last bit.  Of the others, the
    same share goes in every run.  Where all inputs were always zero, all count alike.
    Matrices side by side are worked on together.  Memory: 8 out in + 16 in^2 bytes each.

    Args:
        weight: [..., out, in], floating.
        second_moment: C, [..., in, in] with the same leading dimensions; may be singular, of any scale.
        zeros: how many; ``rows`` says nothing here.
        damp: what is added to the diagonal of C, over its mean; above 0.

    Returns:
        [..., out, in], of the type of ``weight``.

    Raises:
        NumericsError: shapes, groups or damp are not possible, an entry is not finite, or C has negative eigenvalues.
    """
    where = "sparsify_compensated"
    check_groups(where, weight, zeros)
    inputs = weight.shape[-1]
    if second_moment.shape != (*weight.shape[:-2], inputs, inputs):
        raise NumericsError(
            f"{where}: second_moment has shape {list(second_moment.shape)}, needed [..., {inputs}, {inputs}] with the "
            f"leading dimensions of a weight {list(weight.shape)}"
        )
    if not damp > 0:
        raise NumericsError(f"{where}: damp = {damp}, needed above 0")
    require_finite(second_moment=second_moment)
    moments = second_moment.detach().double().reshape(-1, inputs, inputs).clone()
    # a weight that only ever met zeros costs nothing; a matrix of which that is true of all has no data to go by
    silent = moments.diagonal(dim1=-2, dim2=-1) <= 0
    silent &= ~silent.all(-1, keepdim=True)
    factor = inverse_factor(where, moments, None, damp)
    work = weight.detach().to(working_type(weight.dtype)).reshape(-1, *weight.shape[-2:])
    cost = factor.diagonal(dim1=-2, dim2=-1).reciprocal().square().masked_fill(silent, 0).to(work.dtype)
    return _sweep(work, factor.to(work.dtype), cost, zeros).reshape(weight.shape).to(weight.dtype)


def _sweep(weight: Tensor, factor: Tensor, cost: Tensor, zeros: Zeros) -> Tensor:
    """Weights [B, out, in] with zeros; ``cost`` [B, in] is what the square of a weight in a column is multiplied by."""
    # columns come first, so that each is one run of memory; a copy also where they lie so already
    left = weight.transpose(-1, -2).clone(memory_format=torch.contiguous_format)
    gone = left == 0
    group = zeros.of or _BLOCK
    width = max(_BLOCK // group, 1) * group
    quota = None if zeros.of else _quotas(gone, zeros, width)
    for number, start in enumerate(range(0, left.shape[1], width)):
        stop = min(start + width, left.shape[1])
        errors = torch.empty_like(left[:, start:stop])
        for column in range(start, stop):
            if (column - start) % group == 0:  # once per run of columns, or per group
                some = slice(column, min(column + group, stop))
                score = (left[:, some].square() * cost[:, some, None]).masked_fill_(gone[:, some], _NEVER)
                if quota is None:
                    across = score.transpose(1, 2).reshape(-1, group)
                    chosen = lowest(across, group - (zeros.kept or 0))
                    gone[:, some] |= chosen.reshape(score.shape[0], score.shape[2], group).transpose(1, 2)
                else:
                    for own, ranks, count in zip(gone[:, some], score, quota[number], strict=True):
                        own |= lowest(ranks.reshape(1, -1), count).reshape(own.shape)
            error = left[:, column].where(gone[:, column], 0) / factor[:, column, column, None]
            errors[:, column - start] = error
            left[:, column + 1 : stop].baddbmm_(factor[:, column, column + 1 : stop, None], error.unsqueeze(1), alpha=-1)
        left[:, stop:].baddbmm_(factor[:, start:stop, stop:].transpose(-1, -2), errors, alpha=-1)
    return left.masked_fill_(gone, 0).transpose(-1, -2)


def _quotas(gone: Tensor, zeros: Zeros, width: int) -> list[list[int]]:
    """Zeros in each run of ``width`` columns of each matrix, those that there are already included: by run, by matrix.

    What is missing is shared out among the runs by the weights that they have left, and all together it is exact.
    """
    each = gone.shape[1] * gone.shape[2]
    found: list[list[int]] = []
    before = [0] * gone.shape[0]  # weights not yet zero in the runs so far
    totals = [int(own.sum()) for own in gone]
    missing = [max(zeros.number(each) - total, 0) for total in totals]
    for start in range(0, gone.shape[1], width):
        run = gone[:, start : start + width]
        quotas = []
        for index, own in enumerate(run):
            have = int(own.sum())
            after = before[index] + own.numel() - have
            alive = max(each - totals[index], 1)
            quotas.append(have + missing[index] * after // alive - missing[index] * before[index] // alive)
            before[index] = after
        found.append(quotas)
    return found
