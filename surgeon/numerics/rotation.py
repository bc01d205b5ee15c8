"""Orthogonal matrices that spread what stands in few channels over all of them.

Sources: Hadamard matrices of Sylvester (1867) and Paley (1933); their randomisation QuIP# (Tseng et al. 2024,
arXiv:2402.04396) and QuaRot (Ashkboos et al. 2024, arXiv:2404.00456).
"""

from __future__ import annotations

from typing import Literal

import sympy  # type: ignore[import-untyped]  # ships no stubs
import torch
from torch import Tensor

from surgeon.numerics.errors import NumericsError

RotationBasis = Literal["hadamard", "random"]


def hadamard_core(order: int) -> int | None:
    """The smallest m with ``order = 2^k m`` of which a Hadamard matrix is known here; None where there is none.

    These are 1, q + 1 for primes q of the form 4n + 3 (12, 20, 24, 44 ...), and 2 (q + 1) for those of the form 4n + 1 (12, 28,
    36, 60 ...).
    """
    core = order & -order if order > 0 else 0
    core = order // core if core else 0
    while 0 < core <= order:
        if core == 1 or _first_paley(core) or _second_paley(core):
            return core
        core *= 2
    return None


def hadamard(order: int) -> Tensor:
    """A Hadamard matrix: of 1 and -1, with orthogonal rows, [n, n] in float64.

    Raises:
        NumericsError: none of this order is known here.
    """
    core = hadamard_core(order)
    if core is None:
        raise NumericsError(f"no Hadamard matrix of order {order} is known here")
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    if core == 1:
        matrix = torch.ones(1, 1, dtype=torch.float64)
    elif _first_paley(core):  # 1 + S with S skew, S S^T = q
        skew = _jacobsthal(core - 1)
        skew[1:, 0] = -1
        matrix = torch.eye(core, dtype=torch.float64) + skew
    else:  # C (x) [1 1; 1 -1] + 1 (x) [1 -1; -1 -1] with C symmetric, C C^T = q
        other = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        half = core // 2
        matrix = torch.kron(_jacobsthal(half - 1), two) + torch.kron(torch.eye(half, dtype=torch.float64), other)
    while len(matrix) < order:
        matrix = torch.kron(two, matrix)
    return matrix


def _first_paley(order: int) -> bool:
    return order % 4 == 0 and bool(sympy.isprime(order - 1))


def _second_paley(order: int) -> bool:
    return order % 4 == 0 and order // 2 % 4 == 2 and bool(sympy.isprime(order // 2 - 1))


def _jacobsthal(prime: int) -> Tensor:
    """``[0 1^T; 1 Q]`` with ``Q_ij`` 1 where i - j is a square modulo q, -1 where not, 0 on the diagonal, [q + 1, q + 1]."""
    numbers = torch.arange(prime)
    character = torch.full((prime,), -1.0, dtype=torch.float64)
    character[numbers.square() % prime] = 1
    character[0] = 0
    bordered = torch.ones(prime + 1, prime + 1, dtype=torch.float64)
    bordered[0, 0] = 0
    bordered[1:, 1:] = character[(numbers[:, None] - numbers) % prime]
    return bordered


def spreading_basis(width: int, kind: RotationBasis, generator: torch.Generator, *, centred: bool = False) -> Tensor:
    """An orthogonal matrix U that makes ``U^T x`` have nearly equal channels, whatever single ones x is large in.

    ``hadamard``: ``diag(s) Hd / sqrt(H)`` with signs s by lot, so that nothing that a model could have learnt is in line with a
    row.  ``random``: an orthogonal matrix, uniformly.  Of what is centred, ``1^T x = 0``, it is ``(1 - 1 1^T / H) R U``, with R
    the reflection that maps ``U 1`` to 1: then ``1^T U^T x = 0`` too.  Of a Hadamard matrix R changes one row, the others
    by O(1 / H).

    Args:
        width: H.
        kind: hadamard or random.
        generator: of the lot.
        centred: whether x is, and ``U^T x`` is to be.

    Returns:
        U [H, H] in float64.

    Raises:
        NumericsError: no Hadamard matrix of this order is known here.
    """
    if kind == "hadamard":
        signs: Tensor = torch.randint(0, 2, (width, 1), generator=generator).double() * 2 - 1
        basis: Tensor = signs * hadamard(width) / width**0.5
    else:
        orthogonal, triangular = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))
        basis = orthogonal * triangular.diagonal().sign()  # without the signs it would not be uniform
    if not centred:
        return basis
    ones = torch.full((width,), width**-0.5, dtype=torch.float64)
    across = basis @ ones - ones
    length = float(across.square().sum())
    if length > 1e-24:
        basis = basis - torch.outer(across, across @ basis) * (2 / length)
    return basis - basis.mean(0)
