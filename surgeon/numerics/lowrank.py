"""Low-rank factors of a weight: plain, and weighted by what the layer sees."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]  # public, but its stub does not re-export it

from surgeon.numerics.errors import NumericsError, require_finite


@dataclass(frozen=True)
class LowRank:
    """W ~ left @ right.

    Attributes:
        left: [out, r], of the weight's dtype.
        right: [r, in], of the weight's dtype.
        tail: what is lost, as a Frobenius norm: ||W - left @ right|| for the plain, ||(W - left @ right) X|| for the
            whitened form; equal to the root of the sum of the squared discarded singular values.
    """

    left: Tensor
    right: Tensor
    tail: float


_RESOLVED = 1e-7
"""Share of the largest singular value that eigenvalues in float64 tell from none: about the root of their precision."""


def truncated_svd(weight: Tensor, rank: int) -> LowRank:
    """Factor a weight with the least Frobenius error (Eckart-Young).

    Args:
        weight: [out, in].
        rank: r, within [1, min(out, in)].

    Returns:
        left = U sqrt(S), right = sqrt(S) V^T.  Computed in float64.

    Raises:
        NumericsError: the rank is out of range, an entry is not finite or the decomposition does not converge.
    """
    _check(weight, rank)
    w = weight.detach().double()
    u, s = _left_singular(w)
    left = u[:, :rank]
    root = s[:rank].sqrt()
    balance = torch.where(root > 0, root, torch.ones_like(root))
    right = (left.T @ w) / balance[:, None]
    return LowRank((left * balance).to(weight.dtype), right.to(weight.dtype), _norm(s[rank:]))


def whitened_svd(weight: Tensor, second_moment: Tensor, rank: int) -> LowRank:
    """Factor a weight with the least error on the inputs that it sees: min ||(W - W_r) X||_F.

    With C = X X^T = Q L Q^T and svd(W Q L^1/2) = U S V^T the optimum is W_r = U_r S_r V_r^T L^-1/2 Q^T (SVD-LLM, Wang
    et al., 2024, in the eigenvalue form of its second version).  That product equals U_r U_r^T W, which is how it is
    computed here: nothing is inverted, so C may be singular, and inputs of a direction that calibration never showed
    pass through the same projection of W.  Where the rank exceeds what calibration can tell apart, the remaining
    columns are the leading singular vectors of the remainder W - U U^T W, so at full rank W_r = W.

    Args:
        weight: [out, in].
        second_moment: [in, in], C = sum over calibration tokens of x x^T; may be singular, of any scale.
        rank: r, within [1, min(out, in)].

    Returns:
        Factors scaled so that column i of left and row i of right have the same norm.  Computed in float64; the tail is
        sqrt(sum_{i > r} S_i^2) and scales with the root of C.

    Raises:
        NumericsError: a shape or the rank does not fit, an entry is not finite, C is zero or has a clearly negative
            eigenvalue, or a decomposition does not converge.
    """
    _check(weight, rank)
    width = weight.shape[1]
    if second_moment.shape != (width, width):
        raise NumericsError(
            f"whitened_svd: second_moment has shape {list(second_moment.shape)}, needed [{width}, {width}] for a "
            f"weight of shape {list(weight.shape)}"
        )
    w = weight.detach().double()
    u, s = _left_singular(w @ _root(second_moment.to(weight.device)))
    seen = min(int((s > s.max() * _RESOLVED).sum()), rank)
    left = u[:, :seen]
    right = left.T @ w
    if seen < rank:
        remainder = w - left @ right
        extra = _left_singular(remainder)[0][:, : rank - seen]
        # The product is taken with the remainder, not with W: where that is zero, `extra` is an arbitrary basis.
        left, right = torch.cat([left, extra], 1), torch.cat([right, extra.T @ remainder], 0)
    balance = right.norm(dim=1).sqrt()
    balance = torch.where(balance > 0, balance, torch.ones_like(balance))
    return LowRank((left * balance).to(weight.dtype), (right / balance[:, None]).to(weight.dtype), _norm(s[rank:]))


def rank_losses(weight: Tensor, inputs: Tensor, outputs: Tensor) -> Tensor:
    """What every rank loses of a weight, errors weighted by row and column.

    ``sum_ij (W - W_r)_ij^2 C_j G_i`` of ``W_r = U_r U_r^T W`` with ``W diag(C)^1/2 = U S V^T``: the r-th and later directions
    lose ``S_k^2 sum_i G_i U_ik^2`` each, so one decomposition tells it of all ranks.

    Args:
        weight: [out, in].
        inputs: C, [in], not negative.
        outputs: G, [out], not negative.

    Returns:
        [min(out, in) + 1] in float64, of ranks from 0 on; the last is 0.

    Raises:
        NumericsError: a shape does not fit, an entry is not finite or the decomposition does not converge.
    """
    _check(weight, 1)
    if (len(outputs), len(inputs)) != weight.shape:
        raise NumericsError(
            f"rank_losses: {len(outputs)} outputs and {len(inputs)} inputs, needed as many as a weight {list(weight.shape)} has"
        )
    require_finite(inputs=inputs, outputs=outputs)
    u, s = _left_singular(weight.detach().double() * inputs.double().sqrt())
    full = min(weight.shape)
    each = s[:full].square() * (outputs.double() @ u[:, :full].square())
    return torch.cat([each.flip(0).cumsum(0).flip(0), each.new_zeros(1)])


def rank_for_ratio(out: int, in_: int, ratio: float) -> int:
    """Return the largest rank whose two factors hold at most ``ratio`` of the parameters of an [out, in] weight.

    floor(ratio * out * in / (out + in)), at least 1 and at most min(out, in).  A ratio of 1 or more means full rank:
    two exact factors, which hold more parameters than the weight.

    Raises:
        NumericsError: the ratio is not a positive number.
    """
    if not ratio > 0 or math.isinf(ratio):
        raise NumericsError(f"rank_for_ratio: ratio = {ratio}, needed a finite number above 0")
    full = min(out, in_)
    if ratio >= 1:
        return full
    # 1e-9: a ratio such as 0.3 is not exact in binary and must not lose a rank by it.
    return min(max(math.floor(ratio * out * in_ / (out + in_) + 1e-9), 1), full)


def saves(out: int, in_: int, rank: int) -> bool:
    """Whether factors of this rank hold fewer parameters than the [out, in] weight."""
    return rank * (out + in_) < out * in_


def _check(weight: Tensor, rank: int) -> None:
    if weight.ndim != 2:
        raise NumericsError(f"low rank: weight must be [out, in], got shape {list(weight.shape)}")
    if not 1 <= rank <= min(weight.shape):
        raise NumericsError(
            f"low rank: rank = {rank}, needed within [1, {min(weight.shape)}] for a weight of shape "
            f"{list(weight.shape)}"
        )
    require_finite(weight=weight)


def _root(second_moment: Tensor) -> Tensor:
    """A root R [in, k] with R R^T = C, of the k eigenvalues that stand above rounding."""
    require_finite(second_moment=second_moment)
    c = second_moment.detach().double()
    noise = c.shape[0] * torch.finfo(c.dtype).eps
    try:
        values, vectors = torch.linalg.eigh((c + c.T) / 2)
    except LinAlgError as error:
        raise NumericsError(f"whitened_svd: eigenvalues of the second moment do not converge: {error}") from error
    low, high = float(values[0]), float(values[-1])
    if high <= 0:
        raise NumericsError("whitened_svd: the second moment is zero: no calibration input reached this weight")
    if low < -1e-3 * high:
        raise NumericsError(
            f"whitened_svd: the second moment has eigenvalues from {low:.3g} to {high:.3g}; a sum of x x^T has none "
            "below 0"
        )
    # A negative eigenvalue shows how far the sum was rounded: positive ones of that size are as little known.  No
    # floor is put at the precision C was summed in: a few huge features must not hide all the others.
    kept = values > max(noise * high, -low)
    root: Tensor = vectors[:, kept] * values[kept].sqrt()
    return root


def _left_singular(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Left singular vectors [out, m], orthonormal, and singular values [m], largest first, of [out, in]; m = min(out, in).

    By the eigenvectors of the smaller of M M^T and M^T M, which takes a fifth to four fifths of the time of an SVD (one thread,
    1024 x 2816 and its transpose).
    Vectors of singular values below ``_RESOLVED`` of the largest are any basis of what is left.
    """
    out, width = matrix.shape
    try:
        gram = matrix @ matrix.T if out <= width else matrix.T @ matrix
        vectors = torch.linalg.eigh(gram).eigenvectors.flip(1)
    except LinAlgError as error:
        raise NumericsError(f"low rank: eigenvalues of a {list(gram.shape)} matrix do not converge: {error}") from error
    if out <= width:
        return vectors, (vectors.T @ matrix).norm(dim=1)
    images = matrix @ vectors
    # those of small singular values are orthogonal to the others only after this
    return torch.linalg.qr(images).Q, images.norm(dim=0)


def _norm(values: Tensor) -> float:
    return float(values.norm())
