"""Numbers as people read them, the same on the terminal and in HTML."""

from __future__ import annotations

import math
from pathlib import PurePath
from typing import Any


def number(value: float, unit: str = "") -> str:
    """Three significant digits with a decimal prefix: ``22.7 M``, ``1.32 G``, ``640``.

    Args:
        value: any number.
        unit: appended to the prefix, e.g. ``B`` for ``90.9 MB``.
    """
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    for exponent, prefix in ((12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if size >= 0.9995 * 10**exponent:  # 999.6 k would otherwise be shown as 1000 k
            return f"{_digits(value / 10**exponent)} {prefix}{unit}"
    text = str(int(value)) if float(value).is_integer() else f"{value:.3g}"
    return f"{text} {unit}".rstrip()


def size(value: float) -> str:
    """Bytes in decimal units: ``90.9 MB``."""
    return number(value, "B")


def milliseconds(value: float) -> str:
    """``8.31 ms``, ``1.20 s``."""
    return f"{_digits(value)} ms" if value < 999.5 else f"{_digits(value / 1e3)} s"


def seconds(value: float) -> str:
    """``0.42 s``, ``12.3 s``, ``3 min 05 s``."""
    if value < 99.95:
        return f"{_digits(value)} s" if value >= 0.01 else "0 s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def ratio(value: float) -> str:
    """``2.61x``."""
    return f"{_digits(value)}x"


def percent(part: float, whole: float) -> str:
    """``25.6 %``; a dash where there is no whole."""
    return f"{_digits(100 * part / whole)} %" if whole else "-"


def figure(value: Any) -> str:
    """A measured quantity with four significant digits; what is not a float as it is."""
    if isinstance(value, bool) or not isinstance(value, float):
        return str(value)
    return f"{value:.4g}"


def heading(description: str) -> str:
    """A model's description as a heading: the end of a path of the file system, anything else in full."""
    path = PurePath(description)
    return "/".join(path.parts[-2:]) if path.is_absolute() or description.startswith(".") else description


def case_title(phase: str, batch: int, length: int | None) -> str:
    """What is timed, in words: ``prefill, batch 4, length 128``, ``decode, batch 4, behind 128``, ``forward, batch 4``."""
    behind = "" if length is None else f", {'behind' if phase == 'decode' else 'length'} {length}"
    return f"{phase}, batch {batch}{behind}"


def label(name: str) -> str:
    """An identifier as words: ``relative_error`` -> ``relative error``."""
    return " ".join("KL" if word == "kl" else word for word in name.split("_"))


def _digits(value: float) -> str:
    """Three significant digits without an exponent, at most two decimals."""
    if not math.isfinite(value):
        return str(value)
    decimals = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:,.{decimals}f}"
