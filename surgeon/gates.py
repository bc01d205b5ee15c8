"""Gates: how a gated feed-forward network joins its two halves, with the constants that some models put into it.

    h(g, u) = (scale min(act(min(g, gate_max)), cap) + shift) * (clamp(u, -up_limit, up_limit) + offset)

Every constant is optional; without any, h = act(g) * u.  A gate has a name that says all of it, which is what the
operators take and what plans and reports show: ``silu``, ``quick_gelu(gate_max=7,up_limit=7,offset=1)``,
``swish(alpha=1.25)``, ``relu2(scale=0.8944,shift=-0.4472)``.  Two activations have parameters of their own:

    swish    x sigmoid(alpha x)
    xielu    rise x^2 + lift x where x > 0, fall (exp(x) - 1 - x) + lift x elsewhere        (Huang 2024, arXiv:2411.13010)
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cache

import torch
from torch import Tensor

from surgeon.activations import ACTIVATIONS, activation, probe_grid
from surgeon.errors import RegistryError

TwoHalves = Callable[[Tensor, Tensor], Tensor]

_NAME = re.compile(r"(\w+)(?:\(([^()]*)\))?")
_FAR = 60.0
"""Beyond every clamp that models use (7 to 20)."""


@dataclass(frozen=True)
class Gate:
    """A gate h(g, u), or, for a plain network, the activation h(g) with the same constants and without the last factor.

    Attributes:
        base: a name in :data:`surgeon.activations.ACTIVATIONS`, or ``swish`` or ``xielu``.
        alpha: of ``swish`` only.
        rise, fall, lift: of ``xielu`` only.
        gate_max: upper clamp of g before the activation.
        cap: upper clamp of the activation's value.
        scale: factor of the activation's value, behind its clamp.
        shift: added behind that.
        up_limit: symmetric clamp of u.
        offset: added to u after its clamp.
    """

    base: str
    alpha: float | None = None
    rise: float | None = None
    fall: float | None = None
    lift: float | None = None
    gate_max: float | None = None
    cap: float | None = None
    scale: float | None = None
    shift: float = 0.0
    up_limit: float | None = None
    offset: float = 0.0

    @property
    def name(self) -> str:
        """The name that :func:`gate` reads back."""
        given = [(f.name, getattr(self, f.name)) for f in fields(self) if f.name != "base"]
        text = ",".join(f"{key}={value:g}" for key, value in given if value not in (None, 0.0))
        return f"{self.base}({text})" if text else self.base

    def alone(self, g: Tensor) -> Tensor:
        """Compute scale min(act(min(g, gate_max)), cap) + shift, element by element."""
        value = self._function(g if self.gate_max is None else g.clamp(max=self.gate_max))
        value = value if self.cap is None else value.clamp(max=self.cap)
        value = value if self.scale is None else self.scale * value
        return value + self.shift if self.shift else value

    def slope(self, g: Tensor) -> Tensor:
        """Derivative of :meth:`alone`; 1 at the edge of a clamp, as PyTorch's autograd has it."""
        inner = g if self.gate_max is None else g.clamp(max=self.gate_max)
        value = self._derivative(inner)
        if self.gate_max is not None:
            value = value * (g <= self.gate_max)
        value = value if self.scale is None else self.scale * value
        return value if self.cap is None else value * (self._function(inner) <= self.cap)

    def factor(self, u: Tensor) -> Tensor:
        """clamp(u, -up_limit, up_limit) + offset."""
        value = u if self.up_limit is None else u.clamp(-self.up_limit, self.up_limit)
        return value + self.offset if self.offset else value

    def factor_slope(self, u: Tensor) -> Tensor | None:
        """Derivative of :meth:`factor`; None where it is 1 everywhere."""
        return None if self.up_limit is None else (u.abs() <= self.up_limit).to(u.dtype)

    def joined(self, g: Tensor, u: Tensor) -> Tensor:
        """h(g, u)."""
        return self.alone(g) * self.factor(u)

    def _function(self, x: Tensor) -> Tensor:
        if self.base == "xielu":
            rise, fall, lift = self._bends()
            below = x.clamp(max=0)  # expm1 of large numbers would overflow where it is not used
            return torch.where(x > 0, rise * x * x, fall * (torch.expm1(below) - below)) + lift * x
        return activation(self.base).function(x) if self.alpha is None else x * torch.sigmoid(self.alpha * x)

    def _derivative(self, x: Tensor) -> Tensor:
        if self.base == "xielu":
            rise, fall, lift = self._bends()
            return torch.where(x > 0, 2 * rise * x, fall * torch.expm1(x.clamp(max=0))) + lift
        if self.alpha is None:
            return activation(self.base).derivative(x)
        s = torch.sigmoid(self.alpha * x)
        return s + self.alpha * x * s * (1 - s)

    def _bends(self) -> tuple[float, float, float]:
        return self.rise or 0.0, self.fall or 0.0, self.lift or 0.0


_CONSTANTS = tuple(f.name for f in fields(Gate) if f.name != "base")
"""Found here once: a branch of ``torch.cond``, where a name is read too, can not ask a class for its fields."""


@cache
def gate(name: str) -> Gate:
    """The gate of that name.

    Raises:
        RegistryError: no such activation or constant; says what exists.
    """
    match = _NAME.fullmatch(name)
    base = match[1] if match else name
    constants: dict[str, float] = {}
    for part in filter(None, ((match[2] or "") if match else "").split(",")):
        key, _, value = part.partition("=")
        if key not in _CONSTANTS:
            raise RegistryError(f"unknown constant {key!r} in the activation {name!r}; known: {', '.join(_CONSTANTS)}")
        try:
            constants[key] = float(value)
        except ValueError as error:
            raise RegistryError(f"the activation {name!r} gives {value!r} for {key}, needed a number") from error
    if (base == "swish") != ("alpha" in constants):
        raise RegistryError(f"the activation {name!r}: swish, and only swish, has a parameter alpha")
    if (base == "xielu") != bool(constants.keys() & {"rise", "fall", "lift"}):
        raise RegistryError(f"the activation {name!r}: xielu, and only xielu, has parameters rise, fall and lift")
    if base not in ("swish", "xielu"):
        activation(base)
    return Gate(base, **constants)


def recognise_gate(function: TwoHalves, *, tolerance: float = 1e-5) -> Gate | None:
    """Name the gate that an unknown function of two halves computes.

    The constants are read off its values: the factor of u at g = 1, which is affine between its clamps, and then the
    activation at a fixed u, whose value far out gives ``cap`` or ``gate_max`` and whose value at 1 gives ``alpha``.
    A gate counts only if it equals the function on a plane of points that reaches beyond every clamp.

    Args:
        function: maps float64 tensors g [N] and u [N] to h [N]; an exception of its own is not caught.
        tolerance: largest ``|f - h| / (1 + |h|)`` that counts as equal.

    Returns:
        The gate, or None where none matches.
    """
    numbers = torch.tensor([-_FAR, -0.01, 0.0, 0.01, _FAR], dtype=torch.float64)
    low, before, middle, after, high = function(torch.ones_like(numbers), numbers).double().tolist()
    slope = (after - before) / 0.02
    if not math.isfinite(slope) or abs(slope) < 1e-6:
        return None
    offset = _neat(middle / slope)
    reach = (high - middle) / slope
    up_limit = None if reach > _FAR * (1 - 1e-4) else _neat(reach)
    if abs((middle - low) / slope - reach) > 1e-3 * abs(reach) or reach <= 0 or abs(offset + 1) < 1e-3:
        return None
    line = probe_grid()
    grid = torch.cat([line, torch.tensor([-_FAR, _FAR], dtype=torch.float64)])
    level = min(1.0, 0.5 * (up_limit or 2.0))
    values = function(grid, torch.full_like(grid, level)).double() / (level + offset)
    g = torch.cat([grid, grid, grid])
    u = torch.cat([torch.full_like(grid, level), grid.flip(0), grid.roll(17)])
    wanted = function(g, u).double()
    for found in _shapes(grid, values):
        candidate = replace(found, up_limit=up_limit, offset=offset)
        value = candidate.joined(g, u)
        if bool(((value - wanted).abs() <= tolerance * (1 + wanted.abs())).all()):
            return candidate
    return None


def recognise_alone(function: Callable[[Tensor], Tensor], *, tolerance: float = 1e-5) -> Gate | None:
    """As :func:`recognise_gate`, for a plain network: a function of one tensor [N]."""
    grid = torch.cat([probe_grid(), torch.tensor([-_FAR, _FAR], dtype=torch.float64)])
    values = function(grid).double()
    for found in [*_shapes(grid, values), *_moved(grid, values)]:
        if bool(((found.alone(grid) - values).abs() <= tolerance * (1 + values.abs())).all()):
            return found
    return None


def _moved(grid: Tensor, values: Tensor) -> list[Gate]:
    """``xielu`` and activations with a factor and an offset, such as learned ones, that fit an unknown one's values best."""
    near = [int((grid - point).abs().argmin()) for point in (-1.0, 1.0, 3.0)]
    (a, low), (b, one), (c, high) = zip(grid[near].tolist(), values[near].tolist(), strict=True)
    rise = (high / c - one / b) / (c - b)
    lift = one / b - rise * b
    found = [Gate("xielu", rise=_neat(rise), fall=_neat((low - lift * a) / (math.exp(a) - 1 - a)), lift=_neat(lift))]
    within = grid.abs() <= 6
    for name, entry in ACTIVATIONS.items():
        x, y = entry.function(grid[within]), values[within]
        spread = float((x - x.mean()).square().sum())
        if name == "identity" or spread == 0:
            continue
        scale = float(((x - x.mean()) * (y - y.mean())).sum()) / spread
        found.append(Gate(name, scale=_neat(scale), shift=_neat(float(y.mean()) - scale * float(x.mean()))))
    return found


def _shapes(grid: Tensor, values: Tensor) -> list[Gate]:
    """Activations, bare and clamped, whose constants follow from an unknown one's values on the grid."""
    far = float(values[-1])
    at_one = float(values[(grid - 1).abs().argmin()])
    point = float(grid[(grid - 1).abs().argmin()])
    bases = [Gate(name) for name in ACTIVATIONS]
    share = at_one / point
    if 0 < share < 1:
        bases.append(Gate("swish", alpha=_neat(math.log(share / (1 - share)) / point)))
    found = list(bases)
    for base in bases:
        edge = torch.tensor([_FAR], dtype=torch.float64)
        if float(base.alone(edge)) > far * (1 + 1e-6) + 1e-9 > 0:
            clamped = [replace(base, cap=_neat(far)), replace(base, gate_max=_neat(_inverse(base, far)))]
            # min(act(g), act(m)) = act(min(g, m)) where act grows: the model's own constant is the rounder one
            found.extend(sorted(clamped, key=lambda gate: len(gate.name.partition("=")[2])))
    return found


def _inverse(base: Gate, value: float) -> float:
    """The point in (0, 60) where a growing activation has a value, by bisection."""
    low, high = 0.0, _FAR
    for _ in range(80):
        middle = (low + high) / 2
        below = float(base.alone(torch.tensor([middle], dtype=torch.float64))) < value
        low, high = (middle, high) if below else (low, middle)
    return high


def _neat(number: float) -> float:
    """Six significant digits, which is what float32 arithmetic leaves; exact zeros for rounding errors."""
    return 0.0 if abs(number) < 1e-6 else float(f"{number:.6g}")
