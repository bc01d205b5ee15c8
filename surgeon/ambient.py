"""Modes of torch that the caller may have switched on, and that end where surgeon begins."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def own_modes() -> Iterator[None]:
    """Inside, and inside of a function decorated with it, torch computes as it does by default.

    Under ``torch.autocast`` products of the source model, of statistics and of least squares would be rounded to half
    precision, and the casts would become a part of the graph.  Under ``torch.inference_mode`` and ``torch.no_grad`` weights
    of the result could not be trained, and no derivative of a loss be taken.
    """
    with ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        yield
