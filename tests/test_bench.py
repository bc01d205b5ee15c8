"""``surgeon bench``: what is timed, what the figures mean, and what the command writes."""

from __future__ import annotations

import inspect
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import surgeon
from surgeon import cli
from surgeon.bench import BenchResult, bench, bench_artifacts, sizes
from surgeon.bench_views import bench_html, check_plot, render_bench
from surgeon.caches import PAST, POSITIONS
from surgeon.candidates import ArtifactCandidate, Case, EagerCandidate, inputs_for
from surgeon.compiled import MANIFEST
from surgeon.contract import Artifact
from surgeon.errors import LowerError, RecipeError
from surgeon.graph import Port
from surgeon.latency import paired_ratio, rounds
from surgeon.process import Screen
from surgeon.source import load_source
from tests.causal import causal
from tests.conftest import MODELS
from tests.models import tiny
from tests.pages import Page

CACHED = (
    Port("input_ids", torch.int64, ("batch", "sequence")),
    Port("attention_mask", torch.int64, ("batch", "past + sequence")),
    Port("past_key_values.0.key", torch.float32, ("batch", 2, "past", 16)),
    Port("past_key_values.0.value", torch.float32, ("batch", 2, "past", 16)),
)


class Sleeper(Artifact):
    """Takes a known time and remembers what it was given."""

    def __init__(self, seconds: float, inputs: tuple[Port, ...] = CACHED[:2], largest: int = 99) -> None:
        super().__init__(Path(), "sleeper", {}, (), inputs, ())
        self.seconds, self.largest = seconds, largest
        self.shapes: set[tuple[tuple[str, tuple[int, ...]], ...]] = set()
        self.pinned: list[int] = []

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if len(next(iter(inputs.values()))) > self.largest:
            raise LowerError(f"a batch of at most {self.largest}")
        self.shapes.add(tuple((name, tuple(value.shape)) for name, value in inputs.items()))
        time.sleep(self.seconds)
        return {}

    @contextmanager
    def threads(self, count: int) -> Iterator[None]:
        self.pinned.append(count)
        yield


def test_ratios_are_of_single_rounds() -> None:
    now = [0.0]

    def takes(seconds: float) -> Any:
        def run() -> None:
            now[0] += seconds * (1 + len(log) // 2)  # the machine slows down, for both alike
            log.append(seconds)

        return run

    log: list[float] = []
    times = rounds({"a": takes(3.0), "b": takes(1.0)}, warmup=0, seconds=0.0, minimum=5, clock=lambda: now[0])
    assert log == [3.0, 1.0] * 5
    assert times["a"] == [3.0, 6.0, 9.0, 12.0, 15.0]
    assert paired_ratio(times["a"], times["b"]) == 3.0


def test_sleeping_artifacts_are_measured_and_compared() -> None:
    slow, fast = Sleeper(0.02), Sleeper(0.005, largest=1)
    result = bench(
        [ArtifactCandidate("slow", slow, {}), ArtifactCandidate("fast", fast, {})],
        batches=(1, 4), sequences=(8,), threads=1, seconds=0.0, warmup=1,
    )  # fmt: skip
    (one_slow, one_fast), (four_slow, four_fast) = result.cases()
    assert one_slow.phase == "forward"
    assert one_slow.median_ms is not None
    assert one_slow.median_ms >= 20
    assert one_slow.tokens_per_second == pytest.approx(8 / one_slow.median_ms * 1e3)
    assert one_slow.ratio == 1.0
    assert one_fast.ratio is not None
    assert 2 < one_fast.ratio < 4.5  # 20 ms / 5 ms, sleeping takes a little longer
    assert four_slow.tokens_per_second is not None
    assert four_fast.problem == "a batch of at most 1"
    assert four_fast.median_ms is None
    assert slow.pinned == [1, 1]
    assert result.threads == 1
    assert BenchResult.model_validate_json(result.to_json()) == result
    page = Page(bench_html(result))
    assert "a batch of at most 1" in page.text
    assert page.tags.count("svg") == 2


@pytest.mark.parametrize("columns", ["40", "80"])
def test_the_table_names_every_candidate_however_narrow(
    columns: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    names = ["eager", "small[/red] model", "a-long-name-of-a-folder-in-which-an-artefact-lies"]
    result = bench(
        [ArtifactCandidate(name, Sleeper(0.0, CACHED), {}) for name in names],
        batches=(32,), sequences=(1024,), threads=1, seconds=0.0, warmup=0,
    )  # fmt: skip
    result.bytes["eager"] = 12_300_000_000
    render_bench(result, Screen())
    printed = capsys.readouterr().out
    assert "…" not in printed
    assert printed.count("12.3 GB") == 2  # prefill and decode
    for name in names[:2]:
        assert printed.count(f"  {name}") == 2
    assert printed.count("a-long-name") == 2
    assert max(map(len, printed.splitlines())) <= 80


def test_prefill_and_decode_are_apart_where_there_are_caches() -> None:
    cached, plain = Sleeper(0.0, CACHED), Sleeper(0.0)
    result = bench(
        [ArtifactCandidate("cached", cached, {}), ArtifactCandidate("plain", plain, {})],
        batches=(2,), sequences=(5,), threads=1, seconds=0.0, warmup=0,
    )  # fmt: skip
    assert [(row.phase, row.candidate) for row in result.rows] == [
        ("prefill", "cached"), ("prefill", "plain"), ("decode", "cached"),
    ]  # fmt: skip
    prefill = (("input_ids", (2, 5)), ("attention_mask", (2, 5)))
    assert plain.shapes == {prefill}
    caches = [tuple((f"past_key_values.0.{half}", (2, 2, length, 16)) for half in ("key", "value")) for length in (0, 5)]
    assert cached.shapes == {prefill + caches[0], (("input_ids", (2, 1)), ("attention_mask", (2, 6)), *caches[1])}
    assert Case("decode", 2, 5).tokens == 2
    assert Case("prefill", 2, 5).tokens == 10


def test_cases_behind_the_table_of_positions_are_left_out_with_the_reason(tmp_path: Path) -> None:
    module = causal("gpt2", layers=1)
    surgeon.compile(module, [], task="text-generation", output=tmp_path / "out", progress=False)
    artefact = ArtifactCandidate.open(tmp_path / "out", "artefact")
    eager = EagerCandidate.beside(load_source(module), artefact)
    result = bench([eager, artefact], sequences=(255, 256, 257), threads=1, seconds=0.0, warmup=0)
    left = {(row.phase, row.sequence): row.problem for row in result.rows if row.problem is not None}
    assert list(left) == [("prefill", 257), ("decode", 256), ("decode", 257)]
    assert left["decode", 256] == (
        "this case needs 257 positions, and the model's table of positions holds 256: give a shorter sequence"
    )
    assert len(result.rows) == 12
    assert all((row.median_ms is None) == ((row.phase, row.sequence) in left) for row in result.rows)


def test_cases_behind_the_table_of_an_encoder_are_left_out_too(tmp_path: Path) -> None:
    module, inputs = tiny("bert")
    surgeon.compile(module, [], inputs=inputs, output=tmp_path / "out", progress=False)
    artefact = ArtifactCandidate.open(tmp_path / "out", "artefact")
    eager = EagerCandidate.beside(load_source(module, inputs), artefact)
    result = bench([eager, artefact], sequences=(128, 129), threads=1, seconds=0.0, warmup=0)
    said = [row.problem for row in result.rows]
    words = "this case needs 129 positions, and the model's table of positions holds 128: give a shorter sequence"
    assert said == [None, None, words, words]


def test_each_candidate_is_bounded_by_its_own_table(tmp_path: Path) -> None:
    """The first artefact comes from another model, with a shorter table than the one in eager torch."""
    for name, positions in (("short", 64), ("long", 96)):
        model = GPT2LMHeadModel(GPT2Config(vocab_size=160, n_positions=positions, n_embd=16, n_layer=1, n_head=2)).eval()
        model.save_pretrained(tmp_path / f"{name}-model")
        surgeon.compile(model, [], task="text-generation", output=tmp_path / name, progress=False)
    result = bench_artifacts(
        [tmp_path / "short", tmp_path / "long"], against=str(tmp_path / "long-model"), batches=(2,), sequences=(64, 96, 97),
        threads=1, seconds=0.0,
    )  # fmt: skip
    said = {(row.phase, row.sequence, row.candidate): row.problem for row in result.rows}
    fits = {(phase, name) for (phase, length, name), problem in said.items() if length == 64 and problem is None}
    both = {(phase, name) for phase in ("prefill", "decode") for name in ("eager torch", "long")}
    assert fits == {*both, ("prefill", "short")}
    assert [name for name in ("eager torch", "short", "long") if said["prefill", 96, name]] == ["short"]
    assert said["prefill", 97, "eager torch"] == (
        "the model looks up row 96 of transformer.wpe, which has 96: give a shorter sequence"
    )
    assert said["decode", 96, "eager torch"] == said["prefill", 97, "eager torch"]
    assert "holds 96" in str(said["prefill", 97, "long"])
    assert "holds 64" in str(said["prefill", 97, "short"])


def test_sizes_that_are_fixed_are_not_timed_as_others() -> None:
    tokens = Port("input_ids", torch.int64, (1, 16))
    images = Port("pixel_values", torch.float32, ("batch", 3, 8, 8))
    fixed, varying = Sleeper(0.0, (tokens,)), Sleeper(0.0)
    result = bench(
        [ArtifactCandidate("varying", varying, {}), ArtifactCandidate("fixed", fixed, {})],
        batches=(1, 8), sequences=(16, 128), threads=1, seconds=0.0, warmup=0,
    )  # fmt: skip
    said = {(row.batch, row.sequence): row.problem for row in result.rows if row.candidate == "fixed"}
    assert said[1, 16] is None
    assert said[8, 16] == said[8, 128]
    advice = "(input_ids [1, 16]): ask for that, or trace the model with a"
    assert said[8, 16] == f"its batch is fixed at 1 {advice} batch that varies"
    assert said[1, 128] == f"its length is fixed at 16 {advice} length that varies"
    assert not any(row.problem for row in result.rows if row.candidate == "varying")
    seen = bench(
        [ArtifactCandidate("images", Sleeper(0.0, (images,)), {})],
        batches=(2,), sequences=(16, 128), threads=1, seconds=0.0, warmup=0,
    )  # fmt: skip
    (row,) = seen.rows  # once, not once per length
    assert (row.sequence, row.tokens_per_second, row.problem) == (None, None, None)
    page = Page(bench_html(seen)).text
    assert "batch 2" in page
    assert "length" not in page


def test_inputs_stay_in_the_range_of_the_example() -> None:
    ports = (*CACHED[:2], Port("token_type_ids", torch.int64, ("batch", "sequence")))
    found = inputs_for(ports, Case("forward", 8, 64), {"input_ids": [5, 9], "token_type_ids": [0, 1]})
    assert found["input_ids"].unique().tolist() == [5, 6, 7, 8, 9]
    assert found["token_type_ids"].unique().tolist() == [0, 1]
    assert found["attention_mask"].eq(1).all()


def test_inputs_repeat_an_example_and_positions_go_on() -> None:
    """Boxes must stay boxes: numbers drawn one by one would have their left edge right of their right one."""
    ports = (
        Port("input_ids", torch.int64, ("batch", "sequence")),
        Port("bbox", torch.int64, ("batch", "sequence", 4)),
        Port("mask", torch.bool, ("batch", "past + sequence")),
        Port("position_ids", torch.int64, ("batch", "sequence"), POSITIONS),
        Port("past_key_values.0.key", torch.float32, ("batch", 2, "past", 16), PAST),
    )
    ids = torch.arange(6).reshape(2, 3)
    example = {
        "input_ids": ids,
        "bbox": torch.stack([ids, ids, ids + 1, ids + 1], -1),
        "mask": torch.ones(2, 5, dtype=torch.bool),
        "position_ids": ids,
        "past_key_values.0.key": torch.zeros(2, 2, 2, 16),
    }
    found = inputs_for(ports, Case("prefill", 3, 7), example)
    rows = [[0, 1, 2, 0, 1, 2, 0], [3, 4, 5, 3, 4, 5, 3]]
    assert found["input_ids"].tolist() == [rows[0], rows[1], rows[0]]
    assert torch.equal(found["bbox"], torch.stack([found["input_ids"] + more for more in (0, 0, 1, 1)], -1))
    assert found["position_ids"].tolist() == [list(range(7))] * 3
    step = inputs_for(ports, Case("decode", 1, 7), example)
    assert step["position_ids"].tolist() == [[7]]
    assert {name: tuple(value.shape) for name, value in step.items()} == {
        "input_ids": (1, 1), "bbox": (1, 1, 4), "mask": (1, 8), "position_ids": (1, 1), "past_key_values.0.key": (1, 2, 7, 16),
    }  # fmt: skip
    assert all(value.is_contiguous() for value in (*found.values(), *step.values()))


def test_a_device_without_room_is_a_row_without_figures() -> None:
    class Full(Sleeper):
        def stepping(self, inputs: Mapping[str, Tensor]) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    candidates = [ArtifactCandidate("full", Full(0.0), {}), ArtifactCandidate("small", Sleeper(0.0), {})]
    full, small = bench(candidates, sequences=(8,), threads=1, seconds=0.0, warmup=0).rows
    assert full.problem == "CUDA out of memory. Tried to allocate 2.00 GiB."
    assert small.median_ms is not None
    assert small.ratio is None


def test_a_failing_model_says_so_in_its_row() -> None:
    class Short(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.positions = torch.nn.Embedding(8, 4)

        def forward(self, input_ids: Tensor, **options: Any) -> Tensor:
            assert "attention_mask" in options  # which its example names, and its signature does not
            return input_ids[..., None] + self.positions(torch.arange(input_ids.shape[1]))

    ids = torch.zeros(2, 5, dtype=torch.int64)
    source = load_source(Short(), {"input_ids": ids, "attention_mask": ids})
    other = ArtifactCandidate("other", Sleeper(0.0), {})
    result = bench([EagerCandidate.beside(source, other), other], sequences=(8, 9), threads=1, seconds=0.0, warmup=0)
    (fits, _), (fails, also) = result.cases()
    assert fits.problem is None
    assert fails.problem == (
        "the model fails on inputs input_ids [1, 9], attention_mask [1, 9]: IndexError: index out of range in self"
    )
    assert also.median_ms is not None


def test_eager_decoding_computes_one_token_behind_the_cache() -> None:
    module, _ = tiny("llama")
    candidate = EagerCandidate(load_source(module), CACHED, {"input_ids": [1, 150]})
    assert candidate.has_caches
    lengths: list[int] = []
    forward = module.forward

    def spy(**inputs: Any) -> Any:
        cache = inputs.get(candidate.cache)
        lengths.append(0 if cache is None else cache.get_seq_length())
        assert inputs["input_ids"].shape[1] == (1 if cache is not None else 11)
        return forward(**inputs)

    spy.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]  # functions take attributes
    module.forward = spy  # type: ignore[method-assign]  # to look at the calls
    with torch.no_grad():
        step = candidate.prepare(Case("decode", 2, 11))
        for _ in range(3):
            step()
    assert lengths == [0, 11, 11, 11]


def test_sizes_and_plots_are_checked_first(tmp_path: Path) -> None:
    assert sizes("1, 32,1", "batch") == (1, 32)
    for wrong in ("", "0", "1,x", "-2", "1.5"):
        with pytest.raises(RecipeError, match="--batch: found"):
            sizes(wrong, "batch")
    with pytest.raises(RecipeError, match=r"picture\.png must end in \.html"):
        check_plot(tmp_path / "picture.png")
    with pytest.raises(RecipeError, match="different names"):
        bench([ArtifactCandidate("one", Sleeper(0.0), {})] * 2)


def test_command_times_a_build_beside_its_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = MODELS / "tiny-llama"
    out = tmp_path / "whole"
    surgeon.compile(str(source), [], task="forward", backend="huggingface", output=out, progress=False)
    ranges = json.loads((out / MANIFEST).read_text())["ranges"]
    assert ranges["attention_mask"] == [1, 1]
    assert 0 <= ranges["input_ids"][0] < ranges["input_ids"][1] < 1024
    files = ["--json", str(tmp_path / "figures.json"), "--plot", str(tmp_path / "page.html")]
    sizes_ = ["--batch", "1,2", "--sequence", "8", "--threads", "1", "--seconds", "0"]
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", str(out), "--against", str(source), *sizes_, *files])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert "eager torch" in printed
    result = BenchResult.model_validate_json((tmp_path / "figures.json").read_text())
    assert [(row.candidate, row.batch) for row in result.rows] == [
        ("eager torch", 1), ("whole", 1), ("eager torch", 2), ("whole", 2),
    ]  # fmt: skip
    assert all(row.runs >= 5 and row.problem is None for row in result.rows)
    assert all(row.ratio is not None and row.ratio > 0 for row in result.rows)
    assert result.baseline == "eager torch"
    Page((tmp_path / "page.html").read_text())
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", str(tmp_path / "nothing")])
    assert stop.value.code == 2
