"""Matching the neurons of two feed-forward networks."""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from surgeon.numerics.errors import NumericsError, require_finite


def align_neurons(reference: Tensor, other: Tensor) -> Tensor:
    """Find the order of ``other``'s neurons in which they best match ``reference``'s.

    Maximises sum_i <reference[i], other[p[i]]> over permutations p, which is the same as minimising
    ||reference - other[p]||_F (Li et al., "Merge, then compress" (M-SMoE), 2023; Git Re-Basin, Ainsworth et al., 2022).

    Args:
        reference: [I, F], row i = the concatenated weights of neuron i in every matrix that its index runs over.
        other: [I, F] likewise.

    Returns:
        p [I] int64 on the device of ``reference``; ``other[p]`` is aligned.

    Raises:
        NumericsError: the shapes differ or an entry is not finite.
    """
    if reference.ndim != 2 or reference.shape != other.shape:
        raise NumericsError(
            f"align_neurons: needs two [I, F] matrices of one shape, got {list(reference.shape)} and "
            f"{list(other.shape)}"
        )
    require_finite(reference=reference, other=other)
    dtype = torch.float64 if reference.dtype == torch.float64 else torch.float32
    return best_assignment(reference.detach().to(dtype) @ other.detach().to(reference.device, dtype).T)


def best_assignment(similarity: Tensor) -> Tensor:
    """The permutation p that maximises ``sum_i S[i, p[i]]`` (linear assignment, exact).

    Args:
        similarity: S, [I, I].

    Returns:
        p [I] int64 on the device of S.
    """
    require_finite(similarity=similarity)
    _, permutation = linear_sum_assignment(similarity.cpu().numpy(), maximize=True)
    return torch.from_numpy(permutation).to(similarity.device, torch.int64)
