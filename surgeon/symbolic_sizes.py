"""Export of operators that take a plain number where a graph has a size.

    one_hot(index, tokens)          index.unsqueeze(-1) == arange(tokens)

Such an operator would take the size of the example for a constant, without saying so.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def symbolic_sizes() -> Iterator[None]:
    """Inside, sizes of the inputs stay sizes; as the module's docstring says."""
    original = torch.nn.functional.one_hot

    def one_hot(tensor: Tensor, num_classes: int | torch.SymInt = -1) -> Tensor:
        if isinstance(num_classes, int):
            return original(tensor, num_classes)
        numbers: Tensor = torch.arange(num_classes, device=tensor.device)  # type: ignore[call-overload]  # takes sizes too
        return (tensor.unsqueeze(-1) == numbers).to(torch.int64)

    torch.nn.functional.one_hot = one_hot  # put back below
    try:
        yield
    finally:
        torch.nn.functional.one_hot = original  # the original
