"""One factor for an approximation of some outputs."""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor

from surgeon.numerics.errors import NumericsError


def output_factor(found: Tensor, wanted: Tensor, preserve: Literal["norm", "least_squares"]) -> float:
    """Factor c for outputs ``found`` that stand for ``wanted``, both [T, G].

    ``norm``: ``|c found| = |wanted|``.  ``least_squares``: ``|wanted - c found|`` is least, ``c = <found, wanted> /
    <found, found>``; what is left is orthogonal to found.

    Returns:
        c, rounded to six decimals.

    Raises:
        NumericsError: found is zero.
    """
    energy = float(found.double().square().sum())
    if energy == 0:
        raise NumericsError("what is chosen gives 0 on all calibration data, so no scaling can be fitted")
    if preserve == "norm":
        return round(math.sqrt(float(wanted.double().square().sum()) / energy), 6)
    return round(float((wanted.double() * found.double()).sum()) / energy, 6)
