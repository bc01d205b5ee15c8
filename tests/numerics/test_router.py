"""Routers in closed form against scikit-learn and the definition."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LinearRegression, Ridge

from surgeon.numerics import NumericsError, centroid_router, ridge_regression, train_linear_router


def data(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 12, generator=generator).to(dtype) * torch.logspace(-2, 2, 12) + 3
    y = x @ torch.randn(12, 5, generator=generator).to(x) + torch.randn(300, 5, generator=generator).to(x) - 7
    return x.to(dtype), y.to(dtype)


@pytest.mark.parametrize("ridge", [1e-4, 1e-2, 1.0])
def test_ridge_equals_scikit_learn(ridge: float) -> None:
    x, y = data()
    weight, bias = train_linear_router(x, y, ridge=ridge)
    reference = Ridge(alpha=ridge * float(x.square().sum(0).mean()), solver="svd").fit(x.numpy(), y.numpy())
    np.testing.assert_allclose(weight.numpy(), reference.coef_, rtol=1e-7, atol=1e-10)
    np.testing.assert_allclose(bias.numpy(), reference.intercept_, rtol=1e-7)


def test_without_ridge_it_is_least_squares() -> None:
    x, y = data()
    weight, bias = train_linear_router(x, y, ridge=0.0)
    reference = LinearRegression().fit(x.numpy(), y.numpy())
    np.testing.assert_allclose(weight.numpy(), reference.coef_, rtol=1e-7)
    np.testing.assert_allclose(bias.numpy(), reference.intercept_, rtol=1e-7)


def test_moments_summed_over_batches_give_the_same_router() -> None:
    x, y = data()
    weight, bias = train_linear_router(x, y)
    z = torch.cat([x, torch.ones(300, 1).double()], 1)
    moments = [(a.T @ a, a.T @ b) for a, b in zip(z.split(70), y.split(70), strict=True)]
    solution = ridge_regression(sum(m[0] for m in moments), sum(m[1] for m in moments))
    torch.testing.assert_close(solution, torch.cat([weight.T, bias[None]]), rtol=1e-9, atol=1e-9)
    # The strength is relative: neither more of the same tokens nor another unit of x changes the predictions.
    tripled = ridge_regression(3 * sum(m[0] for m in moments), 3 * sum(m[1] for m in moments))
    torch.testing.assert_close(tripled, solution, rtol=1e-9, atol=1e-9)
    scaled_weight, scaled_bias = train_linear_router(1000 * x, y)
    torch.testing.assert_close(1000 * x @ scaled_weight.T + scaled_bias, x @ weight.T + bias)


def test_dead_features_are_no_obstacle_with_ridge() -> None:
    x, y = data(torch.float32)
    x[:, 3] = 0
    weight, bias = train_linear_router(x, y)
    assert weight.dtype == bias.dtype == torch.float32
    assert weight.shape == (5, 12)
    assert (weight[:, 3] == 0).all()
    with pytest.raises(NumericsError, match="raise ridge"):
        train_linear_router(x, y, ridge=0.0)


def test_centroid_router_is_the_mean_direction_of_each_expert() -> None:
    rows = torch.randn(24, 6, generator=torch.Generator().manual_seed(1))
    rows[5] = 0
    labels = torch.arange(24) % 4
    weight = centroid_router(rows, labels, 4)
    for expert in range(4):
        own = rows[labels == expert]
        lengths = own.norm(dim=1, keepdim=True)
        unit = torch.where(lengths > 0, own / lengths, 0.0)
        torch.testing.assert_close(weight[expert], unit.mean(0))


def test_what_cannot_be_fitted_is_refused() -> None:
    with pytest.raises(NumericsError, match=r"needed \[D \+ 1, D \+ 1\]"):
        ridge_regression(torch.eye(3), torch.zeros(4, 2))
    with pytest.raises(NumericsError, match="ridge = -1"):
        ridge_regression(torch.eye(3), torch.zeros(3, 2), -1)
    with pytest.raises(NumericsError, match="singular"):
        ridge_regression(torch.zeros(3, 3), torch.zeros(3, 2))
    with pytest.raises(NumericsError, match="second_moment: 9 of 9"):
        ridge_regression(torch.full((3, 3), float("nan")), torch.zeros(3, 2))
    with pytest.raises(NumericsError, match="needed \\[T, D\\]"):
        train_linear_router(torch.zeros(4, 2), torch.zeros(5, 2))
    with pytest.raises(NumericsError, match=r"experts \[1\] have no neuron"):
        centroid_router(torch.ones(4, 2), torch.tensor([0, 0, 2, 2]), 3)
    with pytest.raises(NumericsError, match=r"span \[0, 3\]"):
        centroid_router(torch.ones(4, 2), torch.tensor([0, 0, 3, 2]), 3)
