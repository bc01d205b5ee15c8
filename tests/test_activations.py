"""The table of activations: derivatives against autograd, recognition of other spellings."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from surgeon.activations import ACTIVATIONS, Activation, activation, probe_grid, recognise
from surgeon.errors import RegistryError


@pytest.mark.parametrize("entry", ACTIVATIONS.values(), ids=ACTIVATIONS.keys())
def test_derivative_is_autograds(entry: Activation) -> None:
    kinks = torch.tensor([0.0, 3.0, -3.0, 6.0], dtype=torch.float64)
    x = torch.cat([probe_grid(), kinks]).requires_grad_()
    (slope,) = torch.autograd.grad(entry.function(x).sum(), x)
    # 1e-8: softplus is linear beyond 20 in ATen, and its hardsigmoid holds 1 / 6 as a float32
    torch.testing.assert_close(entry.derivative(x.detach()), slope, rtol=0, atol=1e-8)


@pytest.mark.parametrize("entry", ACTIVATIONS.values(), ids=ACTIVATIONS.keys())
def test_keeps_shape_and_dtype(entry: Activation) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        x = torch.randn(2, 0, 3, dtype=dtype)
        assert entry.function(x).dtype == entry.derivative(x).dtype == dtype
        assert entry.function(x).shape == entry.derivative(x).shape == x.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_recognises_itself(name: str, dtype: torch.dtype) -> None:
    assert recognise(ACTIVATIONS[name].function, dtype=dtype) == name


def _gelu_by_erf(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def _gelu_by_pow(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (_gelu_by_erf, "gelu"),
        (_gelu_by_pow, "gelu_tanh"),
        (lambda x: x / (1 + torch.exp(-x)), "silu"),
        (lambda x: x * 0.5 * (1 + torch.tanh(0.851 * x)), "quick_gelu"),
        (lambda x: torch.where(x > 0, x, torch.zeros_like(x)) ** 2, "relu2"),
        (lambda x: torch.clamp(x, 0, 6), "relu6"),
        (lambda x: x.clamp(min=0), "relu"),
        (lambda x: x * torch.clamp(x / 6 + 0.5, 0, 1), "hardswish"),
        (lambda x: (torch.exp(x) - torch.exp(-x)) / (torch.exp(x) + torch.exp(-x)), "tanh"),
    ],
)
def test_recognises_other_spellings(function: torch.nn.Module, name: str) -> None:
    assert recognise(function) == name
    assert recognise(function, dtype=torch.float32) == name


@pytest.mark.parametrize(
    "function",
    [
        torch.sin,
        lambda x: 1.001 * torch.relu(x),
        lambda x: torch.nn.functional.silu(x.clamp(max=7)),
        lambda x: torch.nn.functional.leaky_relu(x, 0.01),
        lambda x: x * torch.sigmoid(1.7 * x),
        torch.log,
        lambda x: torch.relu(x)[:-1],
    ],
)
def test_other_functions_are_not_in_the_table(function: torch.nn.Module) -> None:
    assert recognise(function) is None


def test_unknown_name_lists_what_exists() -> None:
    with pytest.raises(RegistryError, match=r"'gellu'.*did you mean 'gelu'.*silu"):
        activation("gellu")
