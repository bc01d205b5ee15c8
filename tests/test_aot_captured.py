"""Steps that are captured: the launches of one, repeated for other tokens, positions and lengths.

There is no GPU here, so what a graph would launch is recorded as torch calls it, and called again over the same tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import surgeon
from surgeon.backends import _aot_captured as captured
from surgeon.backends import _aot_shared as shared
from surgeon.backends._aot_lowering import Decomposed
from surgeon.caches import PRESENT, complete, continued
from surgeon.generation import generate
from surgeon.graph import Graph
from surgeon.sampling import Sampling, Settings
from tests.causal import causal
from tests.test_generation import plain_batch

CPU = torch.device("cpu")


class Recorded(TorchDispatchMode):
    """Stands in for a CUDA graph: what is called within :meth:`capturing` is not done, but recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        self.replays = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, out in self.calls:
            found = func(*args, **kwargs)
            several = [value if isinstance(value, tuple | list) else (value,) for value in (out, found)]
            for old, new in zip(*several, strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.set_(new)  # whatever read the first result reads this one


@contextmanager
def capturing(graph: Recorded, **_: Any) -> Iterator[None]:
    changed = [(tensor, tensor.clone()) for tensor in graph.watched]  # type: ignore[attr-defined]
    with graph:
        yield
    for tensor, before in changed:
        tensor.copy_(before)


class Stream:
    """A stream of a device that is not here."""

    def __init__(self, device: Any = None) -> None: ...

    def wait_stream(self, other: Any) -> None: ...


class Driven:
    """A decoder over a graph that is written in place, and what it captured."""

    def __init__(self, graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
        lowered = graph.clone()
        shared.write_in_place(lowered, started=True)
        module = Decomposed(lowered, "dense").eval()
        self.graphs: list[Recorded] = []
        self.plain = 0

        def package(given: list[Tensor]) -> list[Tensor]:
            with torch.no_grad():
                return list(module(*given))

        def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
            self.plain += 1
            names = [port.name for port in graph.inputs]
            known = shared.Buffers("here", graph.inputs)
            given = known.given(inputs, known.as_pasts(inputs), CPU)
            results = package([*({**inputs, **given}[name] for name in names), shared.start_of(inputs, CPU)])
            presents = [port.name for port in graph.outputs if port.role == PRESENT]
            return {"logits": results[0], **dict(zip(presents, given.values(), strict=True))}

        def made() -> Recorded:
            self.graphs.append(Recorded())
            step = self.decoder
            self.graphs[-1].watched = list(step._caches.values())  # type: ignore[attr-defined]
            return self.graphs[-1]

        monkeypatch.setattr(torch.cuda, "CUDAGraph", made)
        monkeypatch.setattr(torch.cuda, "graph", lambda graph, **_: capturing(graph))
        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "stream", lambda _: torch.no_grad())
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Stream())
        self.decoder = captured.CapturedDecoder(run, package, graph.inputs, graph.outputs, CPU)


@pytest.fixture(scope="module", params=["qwen3", "gemma3", "bloom", "deepseek_v3"])
def graph(request: pytest.FixtureRequest) -> Graph:
    return surgeon.trace(causal(request.param, layers=2), task="text-generation")


def test_a_text_goes_on_as_it_does_in_the_graph(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through three sizes of buffers, a padded row beside another."""
    monkeypatch.setattr(shared, "room", lambda length, held: max(length, held + 6))
    ids = plain_batch(graph)["input_ids"][:2, :5]
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    settings, greedy = Settings((), 0), Sampling()
    driven = Driven(graph, monkeypatch)

    def text(decoder: Any) -> Tensor:
        inputs = {"input_ids": ids, "attention_mask": mask}
        return generate(decoder, graph.inputs, inputs, max_new_tokens=14, sampling=greedy, settings=settings)

    found = text(driven.decoder)
    from surgeon.generation import decoder_of

    assert torch.equal(found, text(decoder_of(graph)))
    assert len(driven.graphs) == 2
    assert driven.plain == 4  # the prompt, the first token, and the two for which buffers grew
    assert sum(each.replays for each in driven.graphs) == 14 - driven.plain


def test_a_step_may_be_another_than_the_next(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    """Repeated, as a benchmark does, and one of another length over the same buffers."""
    driven = Driven(graph, monkeypatch)
    call = continued(graph, {name: value[:, :6] for name, value in plain_batch(graph).items()})
    assert call is not None
    total = call["attention_mask"].shape[1]
    single = complete(graph.inputs, {name: value for name, value in call.items() if name != "position_ids"})
    single = {name: value[:, :1] if name in ("input_ids", "position_ids") else value for name, value in single.items()}
    single["attention_mask"] = single["attention_mask"][:, : total - call["input_ids"].shape[1] + 1]
    with torch.no_grad():
        wanted = graph(**single)["logits"]
    step = driven.decoder.resume(single)
    for _ in range(4):
        torch.testing.assert_close(driven.decoder(step), wanted, atol=1e-5, rtol=1e-5)
    (recorded,) = driven.graphs
    assert recorded.replays == 3
    second = call["input_ids"][:, 1:2]
    longer = torch.nn.functional.pad(step["attention_mask"], (0, 1), value=1)
    following = {**step, "input_ids": second, "attention_mask": longer}
    if "position_ids" in step:
        following["position_ids"] = step["position_ids"] + 1
    for _ in range(2):
        driven.decoder(following)
        driven.decoder(step)
    torch.testing.assert_close(driven.decoder(step), wanted, atol=1e-5, rtol=1e-5)


def test_what_depends_on_the_length_of_a_cache_is_refused() -> None:
    """A bias that is cut from the end of a table by the number of cached positions."""
    graph = surgeon.trace(causal("mpt", layers=2), task="text-generation")
    assert shared.refusals(graph) == []
    reasons = {refusal.reason for refusal in shared.refusals(graph, started=True)}
    assert reasons == {"aten.slice.Tensor depends on the number of cached positions by the size of a cache"}
