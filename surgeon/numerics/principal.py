"""Directions of largest variance: the basis in which a residual stream is cut.

Source: SliceGPT (Ashkboos et al. 2024, arXiv:2401.15024), with one basis for the whole stream.  That of a layer-normed stream
keeps what is centred centred, so that the layer norm stays one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from surgeon.numerics.errors import require_finite


def principal_basis(moment: Tensor, width: int, *, centred: bool) -> Tensor:
    """The isometry from the directions of largest variance to ``width`` channels.

    ``U = V`` of the first ``width`` eigenvectors of C.  Of what is centred, ``1^T x = 0``, it is ``U = B_H V B_K^T``, with B_n
    [n, n - 1] an orthonormal basis of what is orthogonal to the ones, and V the first K - 1 eigenvectors of ``B_H^T C B_H``:
    then ``1^T U^T x = 0`` too.

    Args:
        moment: C = ``sum_t x_t x_t^T``, [H, H].
        width: K.
        centred: whether x is, and ``U^T x`` is to be.

    Returns:
        U [H, K] in float64; ``U U^T`` projects on the directions that stay.

    Raises:
        NumericsError: the moments hold NaN or infinity.
    """
    require_finite(moment=moment)
    moment = moment.double()
    if not centred:
        return _leading(moment)[:, :width].contiguous()
    before, after = (zero_sum_basis(size).to(moment.device) for size in (len(moment), width))
    return before @ _leading(before.T @ moment @ before)[:, : width - 1] @ after.T


def _leading(moment: Tensor) -> Tensor:
    """Eigenvectors, that of the largest eigenvalue first."""
    vectors: Tensor = torch.linalg.eigh(moment).eigenvectors
    return vectors.flip(1)


def zero_sum_basis(size: int) -> Tensor:
    """Orthonormal columns that each sum to 0 (Helmert's), [n, n - 1] in float64."""
    number = torch.arange(1, size, dtype=torch.float64)
    basis = torch.ones(size, size - 1, dtype=torch.float64).triu(0)
    basis[torch.arange(1, size), torch.arange(size - 1)] = -number
    return basis / (number * (number + 1)).sqrt()


def read_columns(moment: Tensor, basis: Tensor, tokens: int, *, refit: bool) -> Tensor:
    """What a reader of normalised x makes of the normalised ``z = U^T x``: R with ``x ~ R z``.

    ``R = sqrt(e) U``: of the energy of x only the share e is left in z, whose norm is made that of x again.  With ``refit``
    ``R = sqrt(e) (U + (1 - U U^T) C U (U^T C U + lambda)^-1)``, the least squares of x on ``U^T x`` with a penalty on the
    change, as if K / 2 further tokens of mean energy had shown that nothing is to change: what goes is guessed from what
    stays.  It is nothing where U are eigenvectors of C; but C is that of one reader, and U are those of all together.

    Args:
        moment: C = ``sum_t x_t x_t^T`` of one reader's x, [H, H].
        basis: U, [H, K].
        tokens: their number.
        refit: see above.

    Returns:
        R [H, K] in float64.

    Raises:
        NumericsError: the moments hold NaN or infinity.
    """
    require_finite(moment=moment)
    moment = moment.double()
    root = math.sqrt(kept_energy(moment, basis))
    if not refit or tokens == 0:
        return basis * root
    across = moment @ basis
    inner = basis.T @ across
    ridge = basis.shape[1] / 2 * float(moment.trace()) / (len(moment) * tokens)
    damped = inner + ridge * torch.eye(len(inner), dtype=inner.dtype, device=inner.device)
    change: Tensor = torch.linalg.solve(damped, (across - basis @ inner).T).T
    return (basis + change) * root


def kept_energy(moment: Tensor, basis: Tensor) -> float:
    """Share of the energy that stays, ``tr(U^T C U) / tr(C)``; 1 where there is none."""
    whole = float(moment.double().trace())
    return float(((moment.double() @ basis) * basis).sum()) / whole if whole > 0 else 1.0
