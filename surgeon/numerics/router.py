"""Routers in closed form: ridge regression on streamed moments, and centroids."""

from __future__ import annotations

import torch
from torch import Tensor

from surgeon.numerics.errors import NumericsError, require_finite


def ridge_regression(second_moment: Tensor, cross_moment: Tensor, ridge: float = 1e-3) -> Tensor:
    """Solve least squares with an intercept from sums over tokens, so that no token need be kept.

    With z = [x, 1] (the last coordinate is the intercept), A = sum z z^T and B = sum z y^T, minimises
    sum |y - S^T z|^2 + lambda |S[:-1]|^2: S = (A + lambda diag(1, ..., 1, 0))^-1 B.  lambda = ridge * mean of the
    diagonal of A over the D features, so ``ridge`` depends neither on the number of tokens nor on the scale of x.
    The intercept is not shrunk.

    Args:
        second_moment: A, [D + 1, D + 1].
        cross_moment: B, [D + 1, E].
        ridge: relative, at least 0.

    Returns:
        S [D + 1, E] in float64: rows 0..D-1 the weights, row D the intercept.

    Raises:
        NumericsError: shapes do not fit, an entry is not finite, ``ridge`` is negative or the system is singular.
    """
    size = second_moment.shape[0]
    if second_moment.shape != (size, size) or cross_moment.ndim != 2 or cross_moment.shape[0] != size or size < 2:
        raise NumericsError(
            f"ridge_regression: second_moment {list(second_moment.shape)} and cross_moment {list(cross_moment.shape)}, "
            "needed [D + 1, D + 1] and [D + 1, E]"
        )
    if not ridge >= 0:
        raise NumericsError(f"ridge_regression: ridge = {ridge}, needed a number of at least 0")
    require_finite(second_moment=second_moment, cross_moment=cross_moment)
    a, b = second_moment.detach().double(), cross_moment.detach().double()
    penalty = a.diagonal().clone()
    penalty[:-1] = ridge * penalty[:-1].mean()
    penalty[-1] = 0
    system = a + penalty.diag()
    # Unit diagonal: features of very different scale would spoil the condition, and the intercept's entry is a count.
    scale = system.diagonal().clamp(min=0).sqrt()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    factor, failed = torch.linalg.cholesky_ex(system / scale[:, None] / scale)
    if int(failed) or float(factor.diagonal().min()) < size * torch.finfo(torch.float64).eps:
        raise NumericsError(
            f"ridge_regression: the system is singular at ridge = {ridge} (a feature that is zero or a combination of "
            "others, or no tokens); raise ridge or calibrate on more tokens"
        )
    return torch.cholesky_solve(b / scale[:, None], factor) / scale[:, None]


def train_linear_router(inputs: Tensor, targets: Tensor, *, ridge: float = 1e-3) -> tuple[Tensor, Tensor]:
    """Fit router logits = weight @ x + bias to targets by ridge regression.

    For data that does not fit in memory, sum the moments of [x, 1] over batches and call :func:`ridge_regression`.

    Args:
        inputs: [T, D].
        targets: [T, E], e.g. the norm of each expert's output.
        ridge: relative strength, see :func:`ridge_regression`.

    Returns:
        weight [E, D] and bias [E], of the dtype of ``inputs``.

    Raises:
        NumericsError: as :func:`ridge_regression`.
    """
    if inputs.ndim != 2 or targets.ndim != 2 or inputs.shape[0] != targets.shape[0]:
        raise NumericsError(
            f"train_linear_router: inputs {list(inputs.shape)} and targets {list(targets.shape)}, "
            "needed [T, D] and [T, E]"
        )
    x = torch.nn.functional.pad(inputs.detach().double(), (0, 1), value=1.0)
    solution = ridge_regression(x.T @ x, x.T @ targets.detach().double(), ridge)
    return solution[:-1].T.contiguous().to(inputs.dtype), solution[-1].to(inputs.dtype)


def centroid_router(rows: Tensor, labels: Tensor, clusters: int) -> Tensor:
    """Build a router whose row e is the mean direction of the neurons of expert e.

    The router by similarity of MoEfication (Zhang et al., 2022): rows are L2-normalised, then averaged per expert.
    A zero row stays zero.

    Args:
        rows: [N, D], one input weight row per neuron.
        labels: [N], the expert of each neuron.
        clusters: E.

    Returns:
        weight [E, D], of the dtype of ``rows``; logits are ``x @ weight.T``.

    Raises:
        NumericsError: shapes do not fit, a label is out of range or an expert has no neuron.
    """
    if rows.ndim != 2 or labels.shape != rows.shape[:1]:
        raise NumericsError(
            f"centroid_router: rows {list(rows.shape)} and labels {list(labels.shape)}, needed [N, D] and [N]"
        )
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < clusters:
        raise NumericsError(
            f"centroid_router: labels span [{int(labels.min())}, {int(labels.max())}], "
            f"needed within [0, {clusters - 1}]"
        )
    require_finite(rows=rows)
    sizes = torch.bincount(labels, minlength=clusters)
    if bool((sizes == 0).any()):
        raise NumericsError(f"centroid_router: experts {(sizes == 0).nonzero().flatten().tolist()} have no neuron")
    unit = torch.nn.functional.normalize(rows.detach().double(), dim=1)
    one_hot = torch.nn.functional.one_hot(labels, clusters).double()
    return (one_hot.T @ unit / sizes[:, None]).to(rows.dtype)
