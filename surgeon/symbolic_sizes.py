"""Export of operators that take a plain number where a graph has a size.

    one_hot(index, tokens)          index.unsqueeze(-1) == arange(tokens)
    div(tokens, 4, rounding_mode=...)    tokens // 4

Such an operator would take the size of the example for a constant, without saying so, or make a tensor of it, whose value no
later size can be compared with.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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

    divide = torch.div

    def div(input: Any, other: Any, **options: Any) -> Any:
        rounds = options.get("rounding_mode") in ("trunc", "floor")
        if rounds and isinstance(input, torch.SymInt) and isinstance(other, int) and other > 0:
            return input // other  # sizes are not negative, so that both ways of rounding are one
        return divide(input, other, **options)

    torch.nn.functional.one_hot = one_hot  # put back below
    torch.div = div  # likewise
    try:
        yield
    finally:
        torch.nn.functional.one_hot = original  # the original
        torch.div = divide
