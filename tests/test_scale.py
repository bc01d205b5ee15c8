"""Work grows linearly with depth, counted in calls: what one more block costs does not depend on how many there are."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import surgeon
import surgeon.tracing
from surgeon.fake import with_fake_weights
from surgeon.inspection import inspection
from surgeon.rewrite import Editor
from tests.models import tiny

DEPTHS = (2, 4, 8)
HOME = str(Path(surgeon.__file__).parent)


class Calls:
    """Counts calls of surgeon's functions, and of what they call."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, frame: Any, event: str, _: Any) -> None:
        if event in ("call", "c_call") and frame.f_code.co_filename.startswith(HOME):
            self.count += 1

    def during(self, function: Callable[[], Any]) -> int:
        before, self.count = sys.getprofile(), 0
        sys.setprofile(self)
        try:
            function()
        finally:
            sys.setprofile(before)
        return self.count


STEPS: dict[str, Callable[[surgeon.Graph], Any]] = {
    "discover": surgeon.discover,
    "inspect": lambda graph: inspection(graph, surgeon.discover(graph)),
    "clone": lambda graph: graph.clone(),
    "edit": lambda graph: Editor(graph.clone()).finish(),
    "fingerprint": lambda graph: graph.fingerprint(),
    "count": lambda graph: graph.parameter_count(),
}


@pytest.fixture(scope="module", params=["llama", "mixtral"])
def counts(request: pytest.FixtureRequest) -> dict[str, list[int]]:
    """Calls by step, one number per depth."""
    found: dict[str, list[int]] = {"trace": []}
    patch = pytest.MonkeyPatch()
    canonicalise = surgeon.tracing.canonicalise
    calls = Calls()
    for depth in DEPTHS:
        module, inputs = tiny(request.param, layers=depth)

        def counted(*arguments: Any) -> Any:
            result: list[Any] = []
            found["trace"].append(calls.during(lambda: result.append(canonicalise(*arguments))))
            return result[0]

        patch.setattr("surgeon.tracing.canonicalise", counted)
        graph = surgeon.trace(with_fake_weights(module), inputs)
        patch.undo()
        for name, step in STEPS.items():
            found.setdefault(name, []).append(calls.during(lambda step=step, graph=graph: step(graph)))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("step", ["trace", *STEPS])
def test_one_more_block_costs_the_same_at_any_depth(counts: dict[str, list[int]], step: str) -> None:
    first, second, third = counts[step]
    shallow, deep = (second - first) / (DEPTHS[1] - DEPTHS[0]), (third - second) / (DEPTHS[2] - DEPTHS[1])
    assert shallow > 0
    assert deep <= 1.02 * shallow, f"{step}: {shallow:.0f} calls per block between 2 and 4, {deep:.0f} between 4 and 8"
