"""Zeros among the weights of linears and experts: a pass behind ``sparsify`` may fill in what that one emptied.

Which pass does follows from what it computes, so nothing is declared: weights are counted before and after each pass, and
where zeros have gone the report says how many.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from surgeon.graph import Graph
from surgeon.numerics import Zeros
from surgeon.structure import Selection, Structure

_PAIRS = Zeros.semi_structured(2, 4)
_ROWS = 64
"""Rows of a matrix that are looked at before all of it is: of dense ones no more are read."""
_SPARSE = 0.01
"""Share of zeros from which on a matrix counts as sparse."""
_LOST = 0.1
"""Share of zeros by which a matrix may fall without being filled in: what a pass removes because it matters little may hold
more of them than the rest."""
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Matrix:
    """What there is to count in one weight [..., out, in].

    Attributes:
        weights: how many there are.
        zeros: how many of them are zero; 0 where hardly any is.
        two_of_four: every four consecutive inputs hold two zeros.
    """

    weights: int
    zeros: int
    two_of_four: bool

    @property
    def share(self) -> float:
        """Zeros over weights."""
        return self.zeros / self.weights


def two_of_four(matrix: Tensor) -> bool:
    """Whether every four consecutive inputs of a matrix [out, in] hold two zeros at least."""
    return matrix.shape[-1] % 4 == 0 and _PAIRS.hold(matrix[:1]) and _PAIRS.hold(matrix)


@dataclass(frozen=True)
class Counted:
    """What there is to count in a graph.

    Attributes:
        matrices: weights of linears and experts, by the name they are read under.
        codes: how many others are codes of few bits, whose zeros are not looked for.
    """

    matrices: Mapping[str, Matrix]
    codes: int


def count_zeros(graph: Graph, structure: Structure) -> Counted:
    """Zeros of every weight of linears and experts."""
    everything = structure.select(Selection())
    found: dict[str, Matrix] = {}
    codes: set[str] = set()
    read = [(site.part.weight, site.part.transposed) for site in everything.linears]
    read += [(name, False) for site in everything.moes() for name in (site.part.w_in, site.part.w_out)]
    for name, transposed in read:
        weight = graph.tensor(name).detach()
        if weight.dtype not in _FLOATS:
            codes.add(name)
        elif name not in found and weight.numel():
            found[name] = _count(weight.T if transposed else weight)
    return Counted(found, len(codes))


def filled_in(counted: Counted, then: Counted) -> list[str]:
    """What a report says of a pass behind which sparse weights are less sparse; nothing where they are not.

    Args:
        counted: in front of the pass.
        then: behind it.
    """
    before, after = counted.matrices, then.matrices
    if then.codes > counted.codes:  # a quantizer touches nothing else
        before = {name: matrix for name, matrix in before.items() if name in after}
    if not any(_sparse(matrix) for matrix in before.values()) or not after:
        return []
    pairs = [(old, after[name]) for name, old in before.items() if name in after and _sparse(old)]
    gone = [old for name, old in before.items() if name not in after and _sparse(old)]
    made = [new for name, new in after.items() if name not in before]
    if gone and made:  # what is read under other names now is compared as a whole
        pairs.append((_joined(gone), _joined(made)))
    if all(new.share >= old.share - _LOST and new.two_of_four >= old.two_of_four for old, new in pairs):
        return []
    (share, patterned), (share_after, patterned_after) = _totals(before), _totals(after)
    pattern = f", 2:4 in {patterned} of {len(before)} before and {patterned_after} of {len(after)} now" if patterned else ""
    return [
        f"zeros among the weights of linears and experts: {100 * share:.1f} % before this pass, {100 * share_after:.1f} % "
        f"now{pattern}; weights that a pass computes anew or moves do not keep them, so sparsify comes behind it"
    ]


def _sparse(matrix: Matrix) -> bool:
    return _SPARSE <= matrix.share < 1  # a matrix of nothing but zeros was made by no sparsify


def _joined(matrices: Sequence[Matrix]) -> Matrix:
    return Matrix(
        sum(matrix.weights for matrix in matrices),
        sum(matrix.zeros for matrix in matrices),
        all(matrix.two_of_four for matrix in matrices),
    )


def _totals(matrices: Mapping[str, Matrix]) -> tuple[float, int]:
    """The share of zeros of all matrices, and how many of them are 2:4."""
    sparse = [matrix for matrix in matrices.values() if _sparse(matrix)]
    weights = sum(matrix.weights for matrix in matrices.values())
    return sum(matrix.zeros for matrix in sparse) / weights, sum(matrix.two_of_four for matrix in sparse)


def _count(weight: Tensor) -> Matrix:
    rows = weight.reshape(-1, weight.shape[-1])
    some = rows[:: max(1, len(rows) // _ROWS)]
    if int((some == 0).sum()) < _SPARSE * some.numel():
        return Matrix(weight.numel(), 0, False)
    return Matrix(weight.numel(), int((rows == 0).sum()), two_of_four(rows))
