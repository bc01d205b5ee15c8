"""Running the model on an accelerator while it is operated on.  There is none here: see ``tests/stand_in_device.py``."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import surgeon
from surgeon import pipeline
from surgeon.data import Data, load_data
from surgeon.discovery import discover
from surgeon.errors import ObserveError, RecipeError, TraceError
from surgeon.graph import Graph
from surgeon.moments import SecondMoment
from surgeon.observe import observe
from surgeon.pipeline import operate
from surgeon.placement import Placement, to_host
from surgeon.progress import Progress
from surgeon.recipe import Calibration, load_recipe
from surgeon.registry import make_pass
from surgeon.tracing import trace
from tests import stand_in_device
from tests.conftest import MODELS
from tests.family_table import SECTIONS

pytestmark = pytest.mark.skipif(not stand_in_device.available(), reason="this torch has no devices written in Python")

TEXT = MODELS / "calibration.txt"
LLAMA, MIXTRAL = "tiny-llama", "tiny-mixtral"

STEPS: dict[str, tuple[str, dict[str, Any]]] = {
    "densify_moe: mass": (MIXTRAL, {"densify_moe": {}}),
    "densify_moe: svd": (MIXTRAL, {"densify_moe": {"method": "svd"}}),
    "densify_moe: columns": (MIXTRAL, {"densify_moe": {"method": "top_columns"}}),
    "drop_blocks": (LLAMA, {"drop_blocks": {"count": 1}}),
    "drop_channels": (LLAMA, {"drop_channels": {"ratio": 0.25}}),
    "drop_channels: activation": (MIXTRAL, {"drop_channels": {"ratio": 0.25, "criterion": "activation"}}),
    "drop_experts": (MIXTRAL, {"drop_experts": {"keep": 4, "criterion": "reap"}}),
    "drop_experts: reconstruction": (MIXTRAL, {"drop_experts": {"keep": 4, "criterion": "reconstruction"}}),
    "drop_heads": (LLAMA, {"drop_heads": {"ratio": 0.5}}),
    "drop_neurons": (LLAMA, {"drop_neurons": {"ratio": 0.25}}),
    "drop_neurons: of experts": (MIXTRAL, {"drop_neurons": {"ratio": 0.25}}),
    "expose_routing": (MIXTRAL, {"expose_routing": {}}),
    "low_rank": (LLAMA, {"low_rank": {"ratio": 0.5}}),
    "low_rank: by loss": (LLAMA, {"low_rank": {"ratio": 0.7, "allocation": "loss", "names": "blocks.0.*"}}),
    "merge_experts: zip": (
        MIXTRAL, {"merge_experts": {"groups": 4, "grouping": "token_outputs", "combination": "zip", "refit": True}}
    ),
    "merge_experts: svd": (MIXTRAL, {"merge_experts": {"groups": 4, "grouping": "weights", "combination": "svd"}}),
    "merge_experts: search": (MIXTRAL, {"merge_experts": {"groups": 4, "combination": "search"}}),
    "moefy_attention": (LLAMA, {"moefy_attention": {"top_k": 1, "scaling": "least_squares"}}),
    "moefy_ffn": (LLAMA, {"moefy_ffn": {"experts": 4, "top_k": 2}}),
    "moefy_ffn: kmeans": (LLAMA, {"moefy_ffn": {"experts": 4, "top_k": 2, "split": "kmeans", "router": "centroid"}}),
    "moefy_ffn: gradients": (LLAMA, {"moefy_ffn": {"experts": 4, "top_k": 2, "split": "importance", "router": "centroid"}}),
    "moefy_ffn: means": (LLAMA, {"moefy_ffn": {"experts": 4, "top_k": 2, "scaling": "mean_output"}}),
    "quantize": (LLAMA, {"quantize": {"scheme": "int8_dynamic"}}),
    "quantize: gptq": (LLAMA, {"quantize": {"scheme": "int4", "algorithm": "gptq", "blocks": "1:3"}}),
    "quantize: gptq of experts": (MIXTRAL, {"quantize": {"scheme": "int4", "algorithm": "gptq", "names": "*.moe"}}),
    "quantize: mixed experts": (MIXTRAL, {"quantize": {"scheme": "mixed", "bits": 3, "names": ["*.moe", "*.o"]}}),
    "rotate": (LLAMA, {"rotate": {}}),
    "skip_experts": (MIXTRAL, {"skip_experts": {"beta": "median"}}),
    "smooth": (LLAMA, {"smooth": {"blocks": "0:2"}}),
    "sparsify": (LLAMA, {"sparsify": {"sparsity": 0.5, "blocks": "1:3"}}),
    "sparsify: by loss": (MIXTRAL, {"sparsify": {"sparsity": 0.5, "allocation": "loss", "names": ["*.moe", "*.o"]}}),
    "sparsify: owl": (MIXTRAL, {"sparsify": {"sparsity": 0.5, "allocation": "owl", "criterion": "wanda", "names": "*.moe"}}),
    "sparsify: random": (MIXTRAL, {"sparsify": {"sparsity": 0.5, "criterion": "random", "blocks": 0}}),
    "sparsify: wanda": (MIXTRAL, {"sparsify": {"pattern": "2:4", "criterion": "wanda", "blocks": 0}}),
    "sparsify: of experts": (MIXTRAL, {"sparsify": {"pattern": "2:4", "names": "blocks.0.moe"}}),
    "upcycle_ffn": (LLAMA, {"upcycle_ffn": {"experts": 4, "top_k": 2, "router": "clusters"}}),
}  # fmt: skip


# -- in the process that has the device ---------------------------------------------------------------------------


@cache
def _subject(model: str) -> tuple[Graph, Data]:
    graph = trace(MODELS / model)
    return graph, load_data(Calibration(text=TEXT, samples=12, length=48), graph)


def _placed(graph: Graph, room: int | None = None) -> Graph:
    other = graph.clone()
    other.placement = Placement(torch.device(stand_in_device.NAME), room)
    return other


def _operated(model: str, step: dict[str, Any]) -> tuple[bool, bool]:
    """Whether a pass plans the same and makes the same graph, to the last bit, as without a device."""
    graph, data = _subject(model)
    made = make_pass(step)
    results = [operate(made, one, discover(one), data, None, Progress(False)) for one in (graph, _placed(graph))]
    (here, _, plan, tokens), (away, _, other_plan, other_tokens) = results
    assert all(tensor.device.type == "cpu" for tensor in away.parameters().values())
    assert plan.decisions
    return (plan, tokens) == (other_plan, other_tokens), here.fingerprint(weights=True) == away.fingerprint(weights=True)


def _compiled(model: Any, folder: Path) -> dict[str, Any]:
    calibration = {"text": str(TEXT), "samples": 12, "length": 48}
    steps = [{"drop_blocks": {"count": 1}}, {"quantize": {"scheme": "int8"}}]
    few = folder / "few.txt"
    few.write_text(TEXT.read_text(encoding="utf-8")[:4000], encoding="utf-8")
    here, away = (
        surgeon.compile(
            model, steps, calibration=calibration, device=device, output=folder / device, progress=False,
            verify={"max_kl": 5.0}, backend="onnxruntime", evaluate={"text": str(few), "length": 48},
        )
        for device in ("cpu", stand_in_device.NAME)
    )  # fmt: skip
    ids = torch.arange(24).reshape(2, 12)
    graph, given = away.graph, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {
        "quality": (here.report.quality, away.report.quality),
        "device": away.report.device,
        "placement": graph.placement,
        "logits": torch.equal(here.graph(**given)["logits"], graph(**given)["logits"]),
    }


def _outputs(section: str, name: str) -> float:
    case = SECTIONS[section][name](name)
    with torch.no_grad():
        here, away = case.graph(**case.inputs), _placed(case.graph)(**case.inputs)
    assert all(value.device.type == "cpu" for value in away.values())
    return max(float((here[key].double() - away[key].double()).abs().max()) for key in here)


def _room() -> tuple[list[int], bool]:
    graph, data = _subject(LLAMA)
    sizes, same = [], []
    for room in (0, 300_000, 1 << 30):
        placed = _placed(graph, room)
        batch = data.held_back[0]
        with torch.no_grad():
            same.append(torch.equal(placed(**batch)["logits"], graph(**batch)["logits"]))
            placed(**batch)
        assert placed.placement is not None
        sizes.append(sum(copy.nbytes for copy in placed.placement._copies.values()))
    return sizes, all(same)


def _free() -> int:
    placement = Placement.of(stand_in_device.NAME)
    assert placement is not None
    return placement.room


def _replaced() -> tuple[bool, int]:
    """A weight that a pass has replaced is copied anew, and the copy of the old one goes with it."""
    graph, data = _subject(LLAMA)
    placed = _placed(graph)
    batch = data.held_back[0]
    with torch.no_grad():
        placed(**batch)
    changed, _, _, _ = operate(
        make_pass({"low_rank": {"ratio": 0.5, "method": "svd"}}), placed, discover(placed), data, None, Progress(False)
    )
    del placed
    assert changed.placement is not None
    with torch.no_grad():
        away = changed(**batch)["logits"]
        copies = len(changed.placement._copies)
        changed.placement = None
        return torch.equal(away, changed(**batch)["logits"]), copies


def _refused(kind: str, model: str = "") -> str:
    device = stand_in_device.NAME
    module, ids = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 4)), torch.arange(6).reshape(2, 3)
    try:
        if kind == "model":
            surgeon.compile(module.to(device), [], inputs={"input": ids.to(device)}, backend=None, progress=False)
        elif kind == "memory":
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(pipeline, "_outputs", _overflowing)
                surgeon.compile(model, [], backend=None, device=device, progress=False)
    except (TraceError, ObserveError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def _overflowing(*_: Any) -> None:
    raise torch.OutOfMemoryError("tried to allocate 2 GiB")


def _batches_from_there() -> list[str]:
    graph, _ = _subject(LLAMA)
    ids = torch.arange(24).reshape(2, 12).to(stand_in_device.NAME)
    data = load_data([{"input_ids": ids, "attention_mask": torch.ones_like(ids)}] * 2, graph)
    return [value.device.type for batch in (*data.calibration, *data.held_back) for value in batch.values()]


def _observed_there() -> tuple[str, str]:
    graph, data = _subject(LLAMA)
    placed = _placed(graph)
    site = discover(placed).linears[0]
    moment = SecondMoment(site.part.input)
    observe(placed, data.calibration, {"": moment})
    assert moment.matrix is not None
    there = moment.placed(placed)
    assert isinstance(there, SecondMoment)
    assert there.matrix is not None
    assert moment.placed(graph) is moment
    return moment.matrix.device.type, there.matrix.device.type


def _unlike() -> list[str]:
    """What the stand-in itself refuses: otherwise these tests would show nothing."""
    device, problems = stand_in_device.NAME, []
    here, away = torch.ones(3, 3), torch.ones(3, 3).to(device)
    for mixed in (lambda: here + away, lambda: away @ here, lambda: torch.cat([here, away]), lambda: here[away.long()]):
        try:
            mixed()
        except RuntimeError as error:
            problems.append(str(error))
    assert (away + torch.tensor(1.0)).device.type == device
    assert away[torch.tensor([0, 2])].shape == (2, 3)
    return problems


# -- tests --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STEPS)
def test_a_pass_does_there_what_it_does_here(name: str) -> None:
    assert stand_in_device.run(_operated, *STEPS[name]) == (True, True)


def test_the_stand_in_refuses_what_a_gpu_refuses() -> None:
    assert len(stand_in_device.run(_unlike)) == 4


def test_a_build_reports_where_it_observed_and_hands_out_a_graph_of_the_host(shallow_llama: Path, tmp_path: Path) -> None:
    found = stand_in_device.run(_compiled, str(shallow_llama), tmp_path)
    assert found["device"] == stand_in_device.NAME
    assert found["placement"] is None
    assert found["logits"]
    here, away = found["quality"]
    assert "artifact_kl" in away
    assert away == pytest.approx(here, rel=1e-5)  # of the text the source itself is run here, its graph there


@pytest.mark.parametrize(
    ("section", "name"),
    [
        ("One stream", "gpt2"),
        ("One stream", "bert"),
        ("Mixtures of experts", "deepseek_v3"),
        ("Several streams, hybrids, pyramids", "t5"),
        ("Several streams, hybrids, pyramids", "mamba"),
    ],
)
def test_other_graphs_compute_the_same_there(section: str, name: str) -> None:
    assert stand_in_device.run(_outputs, section, name) < 1e-5  # composite operators round in another order there


def test_copies_of_weights_stay_within_their_room() -> None:
    sizes, same = stand_in_device.run(_room)
    assert same
    assert sizes[0] == 0 < sizes[1] <= 300_000 < sizes[2]


def test_by_default_copies_take_half_of_what_is_free() -> None:
    assert stand_in_device.run(_free) == stand_in_device.FREE // 2


def test_a_replaced_weight_is_copied_anew() -> None:
    same, copies = stand_in_device.run(_replaced)
    assert same
    assert copies


def test_statistics_rest_on_the_host_and_go_where_work_on_them_is_done() -> None:
    assert stand_in_device.run(_observed_there) == ("cpu", stand_in_device.NAME)


def test_batches_from_a_device_are_taken() -> None:
    assert set(stand_in_device.run(_batches_from_there)) == {"cpu"}


def test_a_model_on_a_device_is_told_where_it_belongs() -> None:
    said = stand_in_device.run(_refused, "model")
    assert said.startswith("TraceError: the model is on away:0")
    assert "model.cpu()" in said


def test_a_large_model_on_the_cpu_is_told_of_an_idle_accelerator(
    shallow_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "accelerator", lambda: "cuda")

    def warnings() -> list[str]:
        calibration = {"text": str(TEXT), "samples": 4, "length": 16}
        built = surgeon.compile(str(shallow_llama), [], calibration=calibration, backend=None, progress=False)
        return [line for line in built.report.warnings if "device: cuda" in line]

    assert not warnings()
    monkeypatch.setattr(pipeline, "_LARGE", 1000)
    assert len(warnings()) == 1


def test_too_little_memory_there_is_no_traceback(shallow_llama: Path) -> None:
    said = stand_in_device.run(_refused, "memory", str(shallow_llama))
    assert said.startswith("ObserveError: device 'away' has too little free memory (tried to allocate 2 GiB)")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("gpu", r"torch knows no device 'gpu'"),
        ("meta", r"tensors on 'meta' have no values"),
        pytest.param(
            "cuda", r"'cuda' cannot be used here", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
        ),
    ],
)
def test_a_device_that_is_not_there_is_an_error(name: str, said: str) -> None:
    with pytest.raises(RecipeError, match=rf"device: {said}.*this machine has cpu"):
        Placement.of(name)


def test_what_torch_says_of_a_device_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*size: int, device: torch.device) -> torch.Tensor:
        raise NotImplementedError("Could not run it on 'MPS'. It is available for these: [CPU, Meta, and many more].")

    monkeypatch.setattr(torch, "ones", refuse)
    with pytest.raises(RecipeError, match=r"'mps' cannot be used here \(Could not run it on 'MPS'\); this machine has"):
        Placement.of("mps")


@pytest.mark.parametrize("device", [0, ""])
def test_only_none_is_the_default_device(device: Any) -> None:
    with pytest.raises(RecipeError, match=r"device: torch knows no device|device: .* cannot be used"):
        surgeon.compile(str(MODELS / LLAMA), [], backend=None, device=device, progress=False)


def test_the_host_needs_no_placement() -> None:
    assert Placement.of("cpu") is None
    values = {"x": torch.ones(2), "y": [torch.zeros(1), 3]}
    moved = to_host(values)
    assert moved["x"] is values["x"]
    assert moved["y"][1] == 3


def test_a_recipe_names_the_device(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("model: somewhere\ndevice: cuda:1\n")
    assert load_recipe(path).device == "cuda:1"
    assert load_recipe(path, ["device=cpu"]).device == "cpu"
