"""The element-wise activations that the semantic operators know by name.

One table is the single source for three readers: the eager operators evaluate an entry, their backward formulas use its
derivative, and structure discovery recognises an unknown element-wise sub-graph by comparing it with every entry
*numerically*, so that any spelling of an activation is found.  Only functions without parameters are listed: a constant
such as a slope or a limit belongs to the function itself (``elu`` is the one with alpha 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from surgeon.errors import RegistryError, nearest

ElementWise = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Activation:
    """An element-wise function and its derivative.

    Attributes:
        name: the key in :data:`ACTIVATIONS`.
        formula: what it computes, for reports and error messages.
        function: maps a float tensor of any shape to one of the same shape and dtype.
        derivative: d function / dx, same shapes; at a kink the one-sided value that PyTorch's autograd uses.
    """

    name: str
    formula: str
    function: ElementWise
    derivative: ElementWise


def _step(x: Tensor) -> Tensor:
    return (x > 0).to(x.dtype)


def _between(x: Tensor, low: float, high: float) -> Tensor:
    return ((x > low) & (x < high)).to(x.dtype)


def _normal_density(x: Tensor) -> Tensor:
    return torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def _normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * torch.erfc(-x / math.sqrt(2))


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _quick_gelu_derivative(x: Tensor) -> Tensor:
    # (x s(ax))' = s + a x s (1 - s),  s = sigmoid(a x)
    s = torch.sigmoid(1.702 * x)
    return s + 1.702 * x * s * (1 - s)


def _gelu_tanh_derivative(x: Tensor) -> Tensor:
    # f = x/2 (1 + tanh u), u = c (x + a x^3):  f' = (1 + tanh u)/2 + x/2 (1 - tanh^2 u) c (1 + 3 a x^2)
    c, a = math.sqrt(2 / math.pi), 0.044715
    t = torch.tanh(c * (x + a * x * x * x))
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * c * (1 + 3 * a * x * x)


def _silu_derivative(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s + x * s * (1 - s)


def _sigmoid_derivative(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s * (1 - s)


def _tanh_derivative(x: Tensor) -> Tensor:
    t = torch.tanh(x)
    return 1 - t * t


def _mish_derivative(x: Tensor) -> Tensor:
    # f = x tanh(softplus x), softplus' = sigmoid:  f' = t + x (1 - t^2) sigmoid(x)
    t = torch.tanh(F.softplus(x))
    return t + x * (1 - t * t) * torch.sigmoid(x)


def _elu_derivative(x: Tensor) -> Tensor:
    # exp of the clamped value: exp(x) would overflow where it is not used
    return torch.exp(x.clamp(max=0))


_SELU_ALPHA, _SELU_SCALE = 1.6732632423543772, 1.0507009873554805  # Klambauer et al. 2017, eq. 14


def _selu_derivative(x: Tensor) -> Tensor:
    return _SELU_SCALE * torch.where(x > 0, torch.ones_like(x), _SELU_ALPHA * torch.exp(x.clamp(max=0)))


def _hardswish_derivative(x: Tensor) -> Tensor:
    return torch.where(x >= 3, torch.ones_like(x), torch.where(x <= -3, torch.zeros_like(x), x / 3 + 0.5))


_TABLE = (
    Activation("identity", "x", lambda x: x, torch.ones_like),
    Activation("relu", "max(x, 0)", torch.relu, _step),
    Activation("relu2", "max(x, 0)^2", lambda x: torch.relu(x).square(), lambda x: 2 * torch.relu(x)),
    Activation("relu6", "min(max(x, 0), 6)", F.relu6, lambda x: _between(x, 0, 6)),
    Activation("gelu", "x Phi(x)", F.gelu, lambda x: _normal_cdf(x) + x * _normal_density(x)),
    Activation(
        "gelu_tanh",
        "x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))",
        lambda x: F.gelu(x, approximate="tanh"),
        _gelu_tanh_derivative,
    ),
    Activation("quick_gelu", "x sigmoid(1.702 x)", _quick_gelu, _quick_gelu_derivative),
    Activation("silu", "x sigmoid(x)", F.silu, _silu_derivative),
    Activation("sigmoid", "1 / (1 + exp(-x))", torch.sigmoid, _sigmoid_derivative),
    Activation("tanh", "tanh(x)", torch.tanh, _tanh_derivative),
    Activation("softplus", "log(1 + exp(x))", F.softplus, torch.sigmoid),
    Activation("softsign", "x / (1 + |x|)", F.softsign, lambda x: 1 / (1 + x.abs()).square()),
    Activation("mish", "x tanh(log(1 + exp(x)))", F.mish, _mish_derivative),
    Activation("elu", "x if x > 0 else exp(x) - 1", F.elu, _elu_derivative),
    Activation("selu", "1.0507 (x if x > 0 else 1.6733 (exp(x) - 1))", F.selu, _selu_derivative),
    Activation("hardswish", "x min(max(x + 3, 0), 6) / 6", F.hardswish, _hardswish_derivative),
    Activation("hardsigmoid", "min(max(x + 3, 0), 6) / 6", F.hardsigmoid, lambda x: _between(x, -3, 3) / 6),
)

ACTIVATIONS: Mapping[str, Activation] = MappingProxyType({entry.name: entry for entry in _TABLE})
"""Every known activation by name."""


def activation(name: str) -> Activation:
    """Return the activation called ``name``.

    Raises:
        RegistryError: no such activation; the message lists what exists.
    """
    if name not in ACTIVATIONS:
        raise RegistryError(f"unknown activation {name!r}: {nearest(name, ACTIVATIONS)}")
    return ACTIVATIONS[name]


def probe_grid(dtype: torch.dtype = torch.float64) -> Tensor:
    """Return the points [275] at which functions are compared.

    257 points in [-6, 6], where activations bend, and a few out to +-40, where only a clamp (``relu6``, a limited gate)
    still tells two functions apart.  Beyond 40 a spelling through exp(2x) would overflow float32.
    """
    tail = torch.tensor([6.5, 7.5, 9.0, 12.0, 16.0, 20.0, 25.0, 32.0, 40.0], dtype=torch.float64)
    return torch.cat([-tail.flip(0), torch.linspace(-6, 6, 257, dtype=torch.float64), tail]).to(dtype)


def recognise(
    function: ElementWise, *, dtype: torch.dtype = torch.float64, tolerance: float = 1e-5, device: str = "cpu"
) -> str | None:
    """Name the activation that an unknown element-wise function computes.

    The function is evaluated on :func:`probe_grid` and compared with every entry of :data:`ACTIVATIONS`; two entries of
    the table differ by far more than the tolerance somewhere on the grid, so at most one can match.

    Args:
        function: maps a tensor [N] to a tensor of the same shape; an exception of its own is not caught.
        dtype: the type it is evaluated in; the comparison is made in float64.
        tolerance: largest ``|f - g| / (1 + |g|)`` that counts as equal; 1e-5 leaves room for float32 evaluation.
        device: where the grid is created.

    Returns:
        The name, or None where the shape changes, a value is not finite or nothing matches.

    Example:
        >>> recognise(lambda x: x / (1 + torch.exp(-x)))
        'silu'
    """
    grid = probe_grid(dtype).to(device)
    with torch.no_grad():
        found = function(grid)
    if found.shape != grid.shape or not bool(torch.isfinite(found).all()):
        return None
    found = found.detach().to("cpu", torch.float64)
    points = grid.to("cpu", torch.float64)
    matches = []
    for entry in _TABLE:
        value = entry.function(points)
        if bool(((found - value).abs() <= tolerance * (1 + value.abs())).all()):
            matches.append(entry.name)
    return matches[0] if len(matches) == 1 else None
