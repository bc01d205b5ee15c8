"""Making one feed-forward network of several: by a joint factor, neuron by neuron, and by refitting its output.

Letters: n experts of I neurons, H input and G output features, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]  # public, but its stub does not re-export it

from surgeon.numerics.errors import NumericsError, require_finite


def joint_svd(stack: Tensor, weights: Tensor, rank: int) -> Tensor:
    """Merge matrices in the column space that they share (Sub-MoE, Li et al. 2025, arXiv:2506.23266).

    ``[W_1 .. W_n] = U S [V_1 .. V_n]^T``, merged: ``U_r S_r (sum_e a_e V_e,r)^T``, which is ``U_r U_r^T sum_e a_e W_e``
    and is computed so; U_r are the leading eigenvectors of ``sum_e W_e W_e^T``, or follow from the smaller Gram matrix of
    ``[W_1 .. W_n]``.  Where r reaches the number of rows the result is the weighted mean.

    Args:
        stack: W, [n, m, k], worked on in float64.
        weights: a, [n].
        rank: r, at least 1.

    Returns:
        [m, k] float64.

    Raises:
        NumericsError: the rank is below 1, an entry is not finite or the decomposition does not converge.
    """
    if rank < 1:
        raise NumericsError(f"joint_svd: rank {rank}, needed at least 1")
    require_finite(stack=stack)
    count, rows, columns = stack.shape
    mean = torch.zeros(rows, columns, dtype=torch.float64, device=stack.device)
    for share, matrix in zip(weights.tolist(), stack.detach(), strict=True):
        mean.add_(matrix, alpha=share)
    if rank >= min(rows, count * columns):
        return mean
    try:
        if rows <= count * columns:
            gram = torch.zeros(rows, rows, dtype=torch.float64, device=stack.device)
            for matrix in stack.detach():
                gram.addmm_(matrix.double(), matrix.double().T)
            basis = torch.linalg.eigh(gram).eigenvectors[:, -rank:]
        else:
            side = stack.detach().double().permute(1, 0, 2).reshape(rows, count * columns)
            basis = torch.linalg.qr(side @ torch.linalg.eigh(side.T @ side).eigenvectors[:, -rank:]).Q
    except LinAlgError as error:
        raise NumericsError(f"joint_svd: eigenvalues of {list(stack.shape)} matrices do not converge: {error}") from error
    merged: Tensor = basis @ (basis.T @ mean)
    return merged


def correlations(first: Tensor, second: Tensor) -> Tensor:
    """Pearson correlation over tokens of every neuron of one network with every neuron of another (ZipIt).

    Args:
        first: activations, [T, I].
        second: activations of the other network for the same tokens, [T, I].

    Returns:
        [I, I] in [-1, 1]; 0 where a neuron does not vary.
    """
    left, right = (part - part.mean(0) for part in (first, second))
    norms = [torch.where(part.norm(dim=0) > 0, part.norm(dim=0), 1.0) for part in (left, right)]
    return left.T @ right / torch.outer(*norms)


def zip_neurons(members: Iterable[tuple[Tensor, Tensor, Tensor]], weights: Tensor) -> tuple[Tensor, Tensor]:
    """Merge the neurons that share a home (ZipIt, Stoica et al. 2023, arXiv:2305.03053).

    With the neurons i of expert e whose home is j, and shares a_e: input rows are averaged,
    ``w_j = sum_e a_e sum_i w_ei / sum_e a_e n_ej`` (ZipIt's M), and output columns added up within an expert,
    ``v_j = sum_e a_e sum_i v_ei`` (its U): what an expert's i-th neuron sent out, neuron j sends in its place.

    Args:
        members: of every expert the homes [I] in 0 .. I-1, the inputs [I, F] (all that makes a neuron's activation) and
            the outputs [I, G]; first the dominant expert, whose homes are 0, 1, ... I-1.  Read once, one at a time.
        weights: a, one for each expert, adding up to 1.

    Returns:
        [I, F] and [I, G], of the inputs' dtype.
    """
    pairs = zip(weights.tolist(), members, strict=True)
    share, (_, first, outputs) = next(pairs)
    rows, columns = share * first, share * outputs
    total = first.new_full((first.shape[0], 1), share)
    for share, (homes, inputs, outputs) in pairs:
        total.index_add_(0, homes, torch.ones_like(total), alpha=share)
        rows.index_add_(0, homes, inputs, alpha=share)
        columns.index_add_(0, homes, outputs, alpha=share)
    # a home to which only experts of no share came: the dominant's neuron stays, and sends nothing
    return torch.where(total > 0, rows / total.clamp_min(torch.finfo(total.dtype).tiny), first), columns


def output_correction(hidden: Tensor, residual: Tensor, ridge: float) -> Tensor:
    """The least change D of an output matrix that explains what is missing: least squares with a penalty on D.

    Minimises ``sum_t |r_t - D h_t|^2 + lambda |D|^2`` with lambda = ridge times the mean over features of ``sum_t h^2``:
    ``D = (sum r h^T) (sum h h^T + lambda)^-1``.  What no token shows stays as it was, and nothing changes where nothing
    is missing.

    Args:
        hidden: h, [T, I].
        residual: r, [T, G].
        ridge: relative, above 0.

    Returns:
        D [G, I] in float64.

    Raises:
        NumericsError: shapes do not fit, an entry is not finite, or ``ridge`` is not positive.
    """
    if hidden.ndim != 2 or residual.ndim != 2 or hidden.shape[0] != residual.shape[0] or not ridge > 0:
        raise NumericsError(
            f"output_correction: hidden {list(hidden.shape)}, residual {list(residual.shape)}, ridge {ridge}; "
            "needed [T, I], [T, G] and a number above 0"
        )
    require_finite(hidden=hidden, residual=residual)
    h = hidden.detach().double()
    gram = h.T @ h
    size = float(gram.diagonal().mean())
    if size == 0:
        return h.new_zeros(residual.shape[1], h.shape[1])
    gram.diagonal().add_(ridge * size)
    cross = h.T @ residual.detach().double()
    return torch.cholesky_solve(cross, torch.linalg.cholesky(gram)).T.contiguous()
