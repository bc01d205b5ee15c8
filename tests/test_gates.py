"""Gates with constants: recognised from values alone, named, and differentiated."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from surgeon.errors import RegistryError
from surgeon.gates import gate, recognise_alone, recognise_gate
from surgeon.ops import moe, moe_dense, moe_gathered

FORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": lambda g, u: g / (1 + torch.exp(-g)) * u,
    "gelu_tanh": lambda g, u: u * F.gelu(g, approximate="tanh"),
    "quick_gelu(gate_max=7,up_limit=7,offset=1)": lambda g, u: (
        (u.clamp(-7, 7) + 1) * g.clamp(max=7) * torch.sigmoid(1.702 * g.clamp(max=7))
    ),
    "silu(gate_max=10,up_limit=10)": lambda g, u: F.silu(g.clamp(max=10)) * u.clamp(-10, 10),
    "silu(cap=7,up_limit=7)": lambda g, u: F.silu(g).clamp(max=7) * u.clamp(-7, 7),
    "swish(alpha=1.3)": lambda g, u: g * torch.sigmoid(1.3 * g) * u,
    "relu(offset=0.5)": lambda g, u: F.relu(g) * (u + 0.5),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_gate_is_named_after_its_values(name: str) -> None:
    found = recognise_gate(FORMS[name])
    assert found is not None
    assert found.name == name
    assert gate(name) == found
    single = recognise_gate(lambda g, u: FORMS[name](g.float(), u.float()))
    assert single is not None
    assert single.name == name


@pytest.mark.parametrize("function", [lambda g, u: g + u, lambda g, u: torch.sin(g) * u, lambda g, u: g * u * u])
def test_other_functions_have_no_name(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert recognise_gate(function) is None


def test_a_plain_activation_may_be_clamped() -> None:
    found = recognise_alone(lambda x: F.silu(x).clamp(max=6))
    assert found is not None
    assert found.name == "silu(cap=6)"


def xielu(x: Tensor) -> Tensor:
    return torch.where(x > 0, 1.3 * x * x + 0.5 * x, (torch.expm1(x.clamp(max=-1e-6)) - x) * 0.9 + 0.5 * x)


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (xielu, "xielu(rise=1.3,fall=0.9,lift=0.5)"),
        (lambda x: 0.8944 * F.relu(x) ** 2 - 0.4472, "relu2(scale=0.8944,shift=-0.4472)"),
        (lambda x: 1.5 * F.silu(x), "silu(scale=1.5)"),
        (lambda x: torch.tanh(x) * 2 + 1, "tanh(scale=2,shift=1)"),
    ],
)
def test_a_plain_activation_may_have_learned_numbers(function: Callable[[Tensor], Tensor], name: str) -> None:
    found = recognise_alone(lambda x: function(x.float()))
    assert found is not None
    assert found.name == name
    assert gate(name) == found
    points = torch.linspace(-4, 4, 32, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(found.alone(points), function(points), rtol=1e-6, atol=1e-6)
    (slope,) = torch.autograd.grad(function(points).sum(), points)
    torch.testing.assert_close(found.slope(points.detach()), slope, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", FORMS)
def test_the_operator_and_its_forms_agree_and_differentiate(name: str) -> None:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).requires_grad_()

    x, weight = normal(6, 4, scale=6.0), normal(6, 2)
    index = torch.randint(0, 3, (6, 2), generator=generator)
    w_in, w_out, b_in, b_out = normal(3, 10, 4), normal(3, 4, 5), normal(3, 10), normal(3, 4)
    tensors = (x, weight, w_in, w_out, b_in, b_out)
    pre = torch.einsum("th,toh->to", x, w_in[index[:, 0]]) + b_in[index[:, 0]]
    hidden = FORMS[name](*pre.chunk(2, dim=-1))
    first = torch.einsum("ti,tgi->tg", hidden, w_out[index[:, 0]]) + b_out[index[:, 0]]
    torch.testing.assert_close(moe(x, index[:, :1], torch.ones_like(weight[:, :1]), *tensors[2:], name), first)
    results = [form(x, index, weight, w_in, w_out, b_in, b_out, name) for form in (moe, moe_dense, moe_gathered)]
    seed = torch.randn(results[0].shape, generator=generator, dtype=torch.float64)
    gradients = [torch.autograd.grad(result, tensors, seed) for result in results]
    for result, gradient in zip(results[1:], gradients[1:], strict=True):
        torch.testing.assert_close(result, results[0])
        for found, wanted in zip(gradients[0], gradient, strict=True):
            torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    ("name", "message"),
    [("silly", "unknown activation"), ("silu(limit=7)", "unknown constant 'limit'"), ("silu(cap=x)", "needed a number"),
     ("swish", "has a parameter alpha"), ("silu(alpha=2)", "only swish")],
)  # fmt: skip
def test_wrong_names_say_what_exists(name: str, message: str) -> None:
    with pytest.raises(RegistryError, match=message):
        gate(name)
