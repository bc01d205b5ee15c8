"""Trained routers: better than a line where the truth is no line, and reproducible."""

from __future__ import annotations

import pytest
import torch

from surgeon.numerics import NumericsError, train_linear_router, train_mlp_router


def bent() -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs [T, 6] far from standardised, and targets that no linear map gives, of different sizes."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1200, 6, generator=generator) * torch.tensor([0.1, 1, 1, 5, 1, 1]) + torch.tensor([3.0, 0, 0, 0, 0, -1])
    y = torch.stack([x[:, 1].abs() + 4, 10 * (x[:, 2] * x[:, 4]).abs(), (x[:, 3] / 5).square()], dim=1)
    return x, y


def error(scores: torch.Tensor, y: torch.Tensor) -> float:
    return float((scores - y).square().mean() / (y - y.mean(0)).square().mean())


def test_bends_are_learnt() -> None:
    x, y = bent()
    weight, bias = train_linear_router(x[:1000], y[:1000])
    w_in, b_in, w_out, b_out = train_mlp_router(x[:1000], y[:1000], width=64, steps=300)
    assert w_in.shape == (64, 6)
    assert w_out.shape == (3, 64)
    line = error(x[1000:] @ weight.T + bias, y[1000:])
    assert line > 0.9
    assert error(torch.relu(x[1000:] @ w_in.T + b_in) @ w_out.T + b_out, y[1000:]) < 0.3 * line


def test_same_seed_same_weights() -> None:
    x, y = bent()
    first, second = (train_mlp_router(x, y, width=8, steps=10, seed=4) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_works_where_gradients_are_off() -> None:
    x, y = bent()
    with torch.no_grad():
        trained = train_mlp_router(x, y, width=8, steps=10)
    assert not any(tensor.requires_grad for tensor in trained)


def test_refusals() -> None:
    with pytest.raises(NumericsError, match="at least 20 tokens"):
        train_mlp_router(torch.ones(19, 3), torch.ones(19, 2))
    with pytest.raises(NumericsError, match="needed"):
        train_mlp_router(torch.ones(30, 3), torch.ones(29, 2))
