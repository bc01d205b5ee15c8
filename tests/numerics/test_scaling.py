"""The one factor, by what it preserves."""

from __future__ import annotations

import pytest
import torch

from surgeon.numerics import NumericsError, output_factor


def test_what_is_preserved() -> None:
    generator = torch.Generator().manual_seed(0)
    wanted = torch.randn(50, 7, generator=generator)
    found = 0.4 * wanted + 0.1 * torch.randn(50, 7, generator=generator)
    size = output_factor(found, wanted, "norm")
    assert float((size * found).norm()) == pytest.approx(float(wanted.norm()), rel=1e-5)
    best = output_factor(found, wanted, "least_squares")
    expected = torch.linalg.lstsq(found.reshape(-1, 1).double(), wanted.reshape(-1, 1).double()).solution
    assert best == pytest.approx(float(expected), rel=1e-5)
    assert output_factor(wanted, wanted, "norm") == output_factor(wanted, wanted, "least_squares") == 1.0


def test_nothing_cannot_be_scaled() -> None:
    with pytest.raises(NumericsError, match="gives 0"):
        output_factor(torch.zeros(3, 2), torch.ones(3, 2), "norm")
