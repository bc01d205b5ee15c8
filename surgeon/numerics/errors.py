"""What the mathematics raises, and the one check it shares."""

from __future__ import annotations

from torch import Tensor

from surgeon.errors import SurgeonError


class NumericsError(SurgeonError, ValueError):
    """Numbers that an algorithm cannot work on: wrong shape, not finite, singular, not divisible.

    Functions in ``surgeon.numerics`` know tensors, not models; a caller that knows the site adds its name.
    """


def require_finite(**tensors: Tensor) -> None:
    """Raise when a floating tensor holds NaN or infinity.

    Args:
        tensors: name -> tensor of any shape; the name is what the message calls it.

    Raises:
        NumericsError: names the tensor and counts the entries that are not finite.
    """
    for name, tensor in tensors.items():
        if bool(tensor.sum().isfinite()):  # one pass without a temporary; a sum of finite entries may overflow, hence the rest
            continue
        bad = int((~tensor.isfinite()).sum())
        if bad:
            raise NumericsError(f"{name}: {bad} of {tensor.numel()} entries are NaN or infinite, all must be finite")
