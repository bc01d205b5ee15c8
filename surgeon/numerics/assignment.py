"""Matching the neurons of two feed-forward networks."""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from surgeon.numerics.errors import NumericsError, require_finite


def best_assignment(similarity: Tensor) -> Tensor:
    """The permutation p that maximises ``sum_i S[i, p[i]]`` (linear assignment, exact).

    With S the inner products of two networks' neurons, ``other[p]`` is the order of the second's neurons that is nearest to
    the first's in the Frobenius norm (Li et al., "Merge, then compress" (M-SMoE), 2023; Git Re-Basin, Ainsworth et al., 2022).

    Args:
        similarity: S, [I, I].

    Returns:
        p [I] int64 on the device of S.

    Raises:
        NumericsError: S is not square, or an entry is not finite.
    """
    if similarity.ndim != 2 or similarity.shape[0] != similarity.shape[1]:
        raise NumericsError(f"best_assignment: needs a square matrix, got {list(similarity.shape)}")
    require_finite(similarity=similarity)
    _, permutation = linear_sum_assignment(similarity.cpu().numpy(), maximize=True)
    return torch.from_numpy(permutation).to(similarity.device, torch.int64)
