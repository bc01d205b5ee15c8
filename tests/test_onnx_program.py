"""What torch.onnx has no translation for is decomposed node by node, with the second trace of everything left out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgeon.backends import _onnx_program as onnx_program

X = torch.linspace(-2, 3, 24).reshape(4, 6)


class Calls(nn.Module):
    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def _exported(function: Callable[[Tensor], Any]) -> torch.export.ExportedProgram:
    return torch.export.export(Calls(function), (X,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), strict=False)


DECOMPOSED: dict[str, Callable[[Tensor], Any]] = {
    "an alias": lambda x: ((x > 0) & (x < 2)).float() * 2,
    "a composite": lambda x: torch.diff(x, dim=1) + 1,
    "a cast that changes nothing": lambda x: x.to(torch.float32) + 1,
    "the last node": lambda x: torch.nn.functional.softshrink(x),
    "several results": lambda x: torch.std_mean(x, 1, correction=0)[0] + 1,
    "sizes among its operands": lambda x: (x + 1).sum_to_size((x.shape[0], 1)) * 2,
}


@pytest.mark.parametrize("function", DECOMPOSED.values(), ids=DECOMPOSED.keys())
def test_nodes_are_decomposed_in_place(function: Callable[[Tensor], Any]) -> None:
    program = _exported(function)
    assert not all(onnx_program._translates(node, 23) for node in program.graph.nodes)
    assert onnx_program.decompose(program, 23)
    assert all(onnx_program._translates(node, 23) for node in program.graph.nodes)
    for x in (X, X[:3] * 1.5):
        torch.testing.assert_close(program.module()(x), function(x))
    names = [str(spec.arg.name) for spec in program.graph_signature.output_specs]  # type: ignore[union-attr]
    assert [node.name for node in program.graph.output_node().args[0]] == names  # type: ignore[union-attr]


REFUSED: dict[str, Callable[[Tensor], Any]] = {
    "an output that is an operand": lambda x: (x + 1).to(torch.float32),
    "a decomposition that writes in place": lambda x: torch.cosine_similarity(x, x.flip(1)) + 1,
    "control flow": lambda x: torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,)),
}


@pytest.mark.parametrize("function", REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_decomposed_alone_stays_what_it_computes(function: Callable[[Tensor], Any]) -> None:
    program = _exported(function)
    assert not onnx_program.decompose(program, 23)
    for x in (X, -X[:3]):
        torch.testing.assert_close(program.module()(x), function(x))
