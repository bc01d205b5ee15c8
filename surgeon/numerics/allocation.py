"""One choice for each of several parts, at least cost under a budget: the multiple-choice knapsack."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.optimize
import scipy.sparse

from surgeon.numerics.errors import NumericsError


def cheapest_choices(costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], budget: int) -> list[int]:
    """Which choice each part takes so that the costs add up to the least that the budget allows.

    ``min sum_ij c_ij x_ij`` with ``sum_j x_ij = 1`` for each part i and ``sum_ij s_ij x_ij <= budget``, x of zeros and ones:
    the program by which PMQ (Huang et al. 2024, arXiv:2410.06270) and HAWQ-V3 (Yao et al. 2021, arXiv:2011.10680) share out
    bits, solved to optimality by HiGHS.

    Args:
        costs: of every choice of every part, finite; parts may have different numbers of choices.
        sizes: what every choice takes of the budget, at least 0.
        budget: the most that all choices may take together.

    Returns:
        The number of the choice of every part.

    Raises:
        NumericsError: a cost is not finite, a size is negative, the numbers of costs and sizes differ, or the smallest choices
            together are above the budget.
    """
    counts = [len(part) for part in costs]
    if counts != [len(part) for part in sizes] or 0 in counts:
        raise NumericsError(
            f"cheapest_choices: {counts} costs and {[len(part) for part in sizes]} sizes, needed as many of both for every "
            "part, one at least"
        )
    if not counts:
        return []
    cost = np.concatenate([np.asarray(part, dtype=np.float64) for part in costs])
    size = np.concatenate([np.asarray(part, dtype=np.int64) for part in sizes])
    if not np.isfinite(cost).all() or (size < 0).any():
        raise NumericsError(f"cheapest_choices: costs {costs} and sizes {sizes}, needed finite costs and sizes of at least 0")
    least = sum(min(part) for part in sizes)
    if least > budget:
        raise NumericsError(f"cheapest_choices: the smallest choices take {least} together, the budget is {budget}")
    # What each choice costs and takes beyond the least of its part, in units that divide all sizes: small whole numbers and
    # costs up to 1 keep the solver's tolerances out of the answer.
    ends = np.cumsum(counts)
    owner = np.repeat(np.arange(len(counts)), counts)
    extra = size - np.array([min(part) for part in sizes])[owner]
    unit = max(int(np.gcd.reduce(extra)), 1)
    above = cost - np.array([min(part) for part in costs])[owner]
    one_each = scipy.sparse.csr_array((np.ones(len(cost)), (owner, np.arange(len(cost)))))
    found = scipy.optimize.milp(
        above / (above.max() or 1.0),
        integrality=np.ones(len(cost)),
        bounds=scipy.optimize.Bounds(0, 1),
        constraints=[
            scipy.optimize.LinearConstraint(one_each, 1, 1),
            scipy.optimize.LinearConstraint(extra[None, :] / unit, -np.inf, (budget - least) // unit),
        ],
        options={"mip_rel_gap": _GAP},
    )
    if not found.success:
        raise NumericsError(f"cheapest_choices: the solver found no answer to {len(counts)} parts: {found.message}")
    taken = [int(part.argmax()) for part in np.split(found.x, ends[:-1])]
    assert sum(part[choice] for part, choice in zip(sizes, taken, strict=True)) <= budget
    return taken


_GAP = 1e-6
"""The share of the least cost by which an answer may be above it."""
