"""Models whose arguments are more than tensors, and models within torch's wrappers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import surgeon
from surgeon.errors import ObserveError, SurgeonError, TraceError

IDS = torch.arange(12).reshape(2, 6) % 5


class Pair(NamedTuple):
    left: Tensor
    right: Tensor


class Nested(nn.Module):
    """Takes a mapping, a named tuple, a flag, a number and nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.linear = nn.Embedding(5, 8), nn.Linear(8, 8)

    def forward(
        self, batch: dict[str, Any], pair: Pair, *, scale: float = 1.0, start: int = 0, double: bool = False, bias: Any = None
    ) -> Tensor:
        x = self.table(batch["ids"]) + batch["more"][0][..., None]
        for _ in range(2):
            x = x + self.linear(torch.relu(self.linear(x)))
        x = x * scale + pair.left - 2 * pair.right
        x = x[:, start:] * (2 if double else 1)
        return x if bias is None else x + bias


def arguments() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(2, 1, generator=generator), *torch.randn(2, 2, 1, 8, generator=generator)]
    pair = Pair(drawn[1], drawn[2])
    return {
        "batch": {"ids": IDS, "more": [drawn[0]]}, "pair": pair, "scale": 0.5, "start": 1, "double": True, "bias": None,
    }  # fmt: skip


def test_nested_tensors_are_inputs_and_values_a_part_of_the_graph() -> None:
    torch.manual_seed(0)
    module, given = Nested().eval(), arguments()
    graph = surgeon.trace(module, given)
    assert [port.name for port in graph.inputs] == ["batch.ids", "batch.more.0", "pair.left", "pair.right"]
    assert graph.source.fixed == {"scale": 0.5, "start": 1, "double": True, "bias": None}
    tensors = {"batch.ids": IDS, "batch.more.0": given["batch"]["more"][0], "pair.left": given["pair"][0]}
    expected = module(**given)
    torch.testing.assert_close(graph(**given)["output"], expected)
    torch.testing.assert_close(graph(**tensors, **{"pair.right": given["pair"].right})["output"], expected)
    with pytest.raises(TraceError, match="input 'start' was 1 when the model was traced, .* found 2: leave it out, or trace"):
        graph(**{**given, "start": 2})


def test_such_a_model_is_calibrated_built_loaded_and_timed(tmp_path: Any) -> None:
    torch.manual_seed(0)
    module, given = Nested().eval(), arguments()
    built = surgeon.compile(
        module, [{"quantize": {"scheme": "int8"}}], inputs=given, calibration=[given, given], output=tmp_path / "out",
        evaluate={"latency": [2]}, progress=False,
    )  # fmt: skip
    assert any("start is 1 in every call" in note for note in built.report.warnings)
    nested = {name: given[name] for name in ("batch", "pair")}
    found, again = built(**nested)["output"], surgeon.load(tmp_path / "out")(**nested)["output"]
    assert torch.equal(found, again)
    assert (found - module(**given)).norm() < 0.05 * module(**given).norm()
    with pytest.raises(ObserveError, match="calibration batch 1: input 'double' was True"):
        surgeon.compile(module, [], inputs=given, calibration=[given, {**given, "double": False}], backend=None)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"pair": Pair(IDS, IDS), "batch": object()}, "input 'batch' must be a torch.Tensor, a mapping, .* found object"),
        ({"batch": {"ids": [1, 2]}, "pair": None}, "inputs holds no tensor: input 'batch' must be a torch.Tensor, found dict"),
        ({"batch": {"x.y": IDS, "x": {"y": IDS}}}, "two of them are called 'batch.x.y'"),
    ],
)
def test_what_no_graph_could_take_is_refused_by_name(given: dict[str, Any], message: str) -> None:
    with pytest.raises(SurgeonError, match=message):
        surgeon.trace(Nested(), given)


def _in_part(module: nn.Module) -> nn.Module:
    for part in module.modules():
        if isinstance(part, nn.Linear):
            part.compile(backend=_never)
    return module


def _never(*_: Any) -> Any:
    raise AssertionError("nothing is compiled")


@pytest.mark.parametrize(
    "wrapped",
    [lambda m: torch.compile(m, backend=_never), nn.DataParallel, lambda m: nn.DataParallel(torch.compile(m)), _in_part],
)
def test_wrappers_that_say_how_a_model_runs_are_looked_through(wrapped: Callable[[nn.Module], nn.Module]) -> None:
    torch.manual_seed(0)
    module = Nested().eval()
    expected = module(**arguments())
    graph = surgeon.trace(wrapped(module), arguments())
    assert set(graph.parameters()) == {"table.weight", "linear.weight", "linear.bias"}
    torch.testing.assert_close(graph(**arguments())["output"], expected)
