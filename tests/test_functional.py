"""The short way from an exported to a canonical graph gives the graph of the long way, or is not taken."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from surgeon.canonical import canonicalise
from surgeon.functional import in_place_form, is_functional
from surgeon.tracing import trace
from tests.models import tiny

aten = torch.ops.aten


class Function(nn.Module):
    """A function of x [batch, 4, 6] as a module."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def exported(function: Callable[[Tensor], Any]) -> ExportedProgram:
    with torch.no_grad():
        shapes = {"x": {0: Dim.DYNAMIC}}
        return torch.export.export(Function(function), (), {"x": torch.randn(3, 4, 6)}, strict=False, dynamic_shapes=shapes)


def decomposed(program: ExportedProgram) -> ExportedProgram:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
        return program.run_decompositions({})


def lines(program: ExportedProgram) -> list[str]:
    """A canonical graph as text, one line per node."""
    graph = canonicalise(program.module(check_guards=False), ["x"]).graph
    order = {node: index for index, node in enumerate(graph.nodes)}
    return [f"{n.target} {torch.fx.node.map_arg((n.args, n.kwargs), lambda m: order[m])}" for n in graph.nodes]


RESPELLED: dict[str, Callable[[Tensor], Any]] = {
    "chunk": lambda x: x.chunk(4, dim=-1),
    "split": lambda x: x.split([2, 4], dim=-1),
    "flatten": lambda x: x.flatten(1),
    "unflatten": lambda x: x.unflatten(-1, (2, 3)),
    "ravel": lambda x: x.ravel(),
    "mT": lambda x: x.mT,
    "T": lambda x: x[0].T,
    "swapaxes": lambda x: x.swapaxes(0, 2),
    "movedim": lambda x: x.movedim(0, -1),
    "narrow": lambda x: x.narrow(-1, 1, 3),
    "expand_as": lambda x: x[:, :1].expand_as(x),
    "reshape_as": lambda x: x.reshape_as(x.transpose(1, 2)),
    "type_as": lambda x: x.double().type_as(x) + x.to(torch.float64),
    "contiguous": lambda x: x.transpose(1, 2).contiguous().view(-1, 24),
}


@pytest.mark.parametrize("name", RESPELLED)
def test_operators_that_may_return_views_are_respelled_alike(name: str) -> None:
    program = exported(RESPELLED[name])
    assert is_functional(program.graph)
    assert lines(program) == lines(decomposed(program))


def _divided(x: Tensor) -> Tensor:
    total = x.exp()
    total /= total.sum(-1, keepdim=True)
    return total


def _twice(x: Tensor) -> Tensor:
    y = x + 1
    z = y.mul_(2)
    y.add_(z)
    return y + z


def _two_zeros(x: Tensor) -> Tensor:
    a, b = torch.zeros(6), torch.zeros(6)  # one node in canonical form
    a.add_(x[0, 0])
    return x + a + 3 * b


def _integers(x: Tensor) -> Tensor:
    y = (x > 0).long()
    y.mul_(x.shape[0])
    y.index_fill_(-1, torch.tensor([1]), 7)
    return y


def _selected(x: Tensor) -> Tensor:
    values, index = x.topk(2, dim=-1)
    values.div_(values.sum(-1, keepdim=True))
    return values + index


def _view_read_before(x: Tensor) -> Tensor:
    y = x * 2
    first = y[:, 0].sum()
    y.add_(first)
    return y


def _rows(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[:, 1:] = x[:, 1:]
    y[..., 2] += x[..., 0]
    return y


def _rows_of_rows(x: Tensor) -> Tensor:
    y = -x
    for i in range(1, 4):
        row = y[..., i, :i].clone()
        y[..., i, :i] = row + (row[..., None] * y[..., :i, :i].clone()).sum(-2)
    return y + 1


def _rows_by_broadcast(x: Tensor) -> Tensor:
    y = (x > 0).long()
    y[:, ::2] = x[:, :1] * 3
    y[0] = 7
    return y


def _result_read(x: Tensor) -> Tensor:
    y = x * 2
    z = y[:, 1:].mul_(3)
    return y.sum() + z


def _perhaps_a_view(x: Tensor) -> Tensor:
    y = x + 1
    z = y.reshape(x.shape[0], 24)
    z.mul_(2)
    return y.sum() + z


@pytest.mark.parametrize(
    "function",
    [_divided, _twice, _two_zeros, _integers, _selected, _view_read_before, _rows_of_rows, _rows_by_broadcast],
)
def test_writes_that_nothing_else_sees_become_functional(function: Callable[[Tensor], Tensor]) -> None:
    program = exported(function)
    assert any(isinstance(n.target, torch._ops.OpOverload) and n.target._schema.is_mutable for n in program.graph.nodes)
    assert is_functional(program.graph)
    assert lines(program) == lines(decomposed(program))
    trace(Function(function), {"x": torch.randn(3, 4, 6)})  # compares with the source


@pytest.mark.parametrize("function", [_rows, _result_read])
def test_rows_that_were_written_are_not_taken_again(function: Callable[[Tensor], Tensor]) -> None:
    program = exported(function)
    assert is_functional(program.graph)
    assert len(lines(program)) < len(lines(decomposed(program)))
    trace(Function(function), {"x": torch.randn(3, 4, 6)})  # compares with the source


def _view_read_after(x: Tensor) -> Tensor:
    y = x * 2
    row = y[:, 0]
    y.add_(1)
    return y + row[:, None]


def _through_a_view(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y.transpose(1, 2)[:, 1:] = x.transpose(1, 2)[:, 1:]
    return y


def _rows_read_after(x: Tensor) -> Tensor:
    y = x * 2
    rows = y[:, 1:]
    rows[:, 0] = x[:, 0]
    return y + rows.sum()


@pytest.mark.parametrize("function", [_view_read_after, _through_a_view, _rows_read_after, _perhaps_a_view])
def test_writes_that_something_else_sees_take_the_long_way(function: Callable[[Tensor], Tensor]) -> None:
    assert not is_functional(exported(function).graph)
    trace(Function(function), {"x": torch.randn(3, 4, 6)})  # compares with the source


def test_in_place_operators_have_functional_forms() -> None:
    assert in_place_form(aten.add_.Tensor) is aten.add.Tensor
    assert in_place_form(aten.copy_.default) is aten.copy.default
    assert in_place_form(aten.add.out) is None
    assert in_place_form(aten.__iand__.Tensor) is None


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2"])
def test_models_take_the_short_way_to_the_same_graph(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, inputs = tiny(name, layers=2)
    slow, decompose = [], ExportedProgram.run_decompositions
    monkeypatch.setattr(ExportedProgram, "run_decompositions", lambda self, table: slow.append(1) or decompose(self, table))
    short = trace(module, inputs).fingerprint()
    assert not slow
    monkeypatch.setattr("surgeon.export.is_functional", lambda graph: False)
    assert trace(module, inputs).fingerprint() == short
    assert slow
