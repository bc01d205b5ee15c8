"""What every pass promises, whatever it does: the same tests over all that are registered."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

import surgeon
from surgeon import registry
from surgeon.data import Data
from surgeon.errors import PlanError, RecipeError
from surgeon.graph import Graph
from surgeon.observe import Execution
from surgeon.registry import make_pass
from surgeon.verify import check_parameters, check_structure
from tests.conftest import Patient
from tests.models import inputs_for, tiny

MakePatient = Callable[[str], Patient]

STEPS: dict[str, tuple[str, dict[str, Any]]] = {
    # pass: a model that it can act on, and fields with which it acts on every block
    "densify_moe": ("mixtral", {}),
    "drop_blocks": ("llama", {"count": 1}),
    "drop_experts": ("mixtral", {"keep": 4}),
    "drop_channels": ("llama", {"ratio": 0.25}),
    "drop_neurons": ("llama", {"ratio": 0.25}),
    "drop_heads": ("llama", {"ratio": 0.5}),
    "expose_routing": ("mixtral", {"replay": True}),
    "low_rank": ("gpt2", {"ratio": 0.5}),
    "merge_experts": ("mixtral", {"groups": 4, "grouping": "token_outputs", "combination": "zip", "refit": True}),
    "moefy_attention": ("llama", {"top_k": 1}),
    "moefy_ffn": ("llama", {"experts": 4, "top_k": 2}),
    "quantize": ("mixtral", {"scheme": "int4", "group": 16}),
    "rotate": ("llama", {}),
    "skip_experts": ("mixtral", {"beta": "median"}),
    "smooth": ("llama", {"alpha": 0.5}),
    "sparsify": ("mixtral", {"pattern": "2:4"}),
    "upcycle_ffn": ("llama", {"experts": 4, "top_k": 2}),
}
SHAPELESS = {"drop_blocks", "expose_routing", "skip_experts"}
"""Passes that read no weight, and so may follow quantization."""
WHOLE = {"drop_channels", "rotate"}
"""Passes that act on what all blocks share."""


@pytest.fixture(params=registry.passes())
def name(request: pytest.FixtureRequest) -> str:
    assert request.param in STEPS, "add the pass to STEPS, with a model and fields with which it acts"
    return str(request.param)


def test_the_plan_is_data_and_repeats_exactly(patient: MakePatient, name: str) -> None:
    subject = patient(STEPS[name][0])
    step = make_pass({name: STEPS[name][1]})
    before = subject.graph.fingerprint(weights=True)
    result = subject.operate(step)
    assert result.plan.decisions
    written = json.dumps(result.plan.model_dump(mode="json"))
    again = subject.operate(step, step.plan_type.model_validate_json(written))
    assert again.graph.fingerprint(weights=True) == result.graph.fingerprint(weights=True) != before
    assert subject.operate(step).plan == result.plan  # nothing is drawn afresh
    assert subject.graph.fingerprint(weights=True) == before


def test_the_promised_parameters_and_a_role_for_every_weight(patient: MakePatient, name: str) -> None:
    subject = patient(STEPS[name][0])
    step = make_pass({name: STEPS[name][1]})
    result = subject.operate(step)
    check_parameters(step, result.plan, subject.graph, subject.structure, result.graph)
    check_structure(step, subject.structure, result.structure)
    assert step.summary(result.plan)


def test_blocks_and_names_select_the_sites(patient: MakePatient, name: str) -> None:
    model, fields = STEPS[name]
    subject = patient(model)
    everywhere = {d.site for d in subject.operate({name: fields}).plan.decisions}
    assert everywhere
    for blocks in (1, [1], "1:2", "-2:-1"):
        if name in WHOLE:
            with pytest.raises(PlanError, match="all blocks share"):
                subject.operate({name: {**fields, "blocks": blocks}})
            continue
        sites = {d.site for d in subject.operate({name: {**fields, "blocks": blocks}}).plan.decisions}
        assert sites
        assert all(f"{site}.".startswith("blocks.1.") for site in sites)
    chosen = sorted(everywhere)[0]
    result = subject.operate({name: {**fields, "names": [chosen]}})
    assert [d.site for d in result.plan.decisions] == [chosen]
    if name in WHOLE:
        return
    # what was not selected is what it was
    touched = {block.index for block in subject.structure.blocks if f"{chosen}.".startswith(f"{block.name}.")}
    for block in subject.structure.blocks:
        if block.index not in touched:
            for weight in block.weights:
                assert torch.equal(result.graph.tensor(weight), subject.graph.tensor(weight))


@pytest.mark.parametrize("selection", [{"names": "*.fnn"}, {"blocks": "9:"}])
def test_nothing_to_do_is_an_error(patient: MakePatient, name: str, selection: dict[str, str]) -> None:
    model, fields = STEPS[name]
    with pytest.raises(PlanError):
        patient(model).operate({name: {**fields, **selection}})


def test_a_plan_for_a_site_that_is_not_there_is_refused(patient: MakePatient, name: str) -> None:
    model, fields = STEPS[name]
    subject = patient(model)
    plan = subject.operate({name: fields}).plan
    data = plan.model_dump(mode="json")
    data["decisions"][0]["site"] = "blocks.7.elsewhere"
    with pytest.raises(PlanError, match=r"blocks\.7\.elsewhere"):
        subject.operate({name: fields}, type(plan).model_validate(data))


def test_quantized_weights_are_refused_by_name(patient: MakePatient, name: str) -> None:
    model, fields = STEPS[name]
    packed = patient(model).operate({"quantize": {"scheme": "int8", "group": 16}})
    if name in SHAPELESS:
        assert packed.operate({name: fields}).plan.decisions
        return
    with pytest.raises(PlanError, match=r"blocks\.0\..*quantized already"):
        packed.operate({name: fields})


DATA_FREE = [
    {"quantize": {"scheme": "int8"}},
    {"low_rank": {"ratio": 0.5, "method": "svd"}},
    {"moefy_ffn": {"experts": 4, "top_k": 2, "router": "centroid"}},
]


def test_only_a_pass_that_observes_asks_for_data(patient: MakePatient, name: str) -> None:
    subject = patient(STEPS[name][0])
    step = make_pass({name: STEPS[name][1]})
    without = Patient(subject.graph, subject.structure, Data(held_back=subject.data.held_back))
    if step.observers(subject.structure):
        with pytest.raises(RecipeError, match="calibration"):
            without.operate(step)
    else:
        assert without.operate(step).plan == subject.operate(step).plan


def test_a_pass_that_needs_no_data_adds_no_forward_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibration batches are not run at all; the held-back one is, once, to say how far the model has moved."""
    module, inputs = tiny("bert")
    batches = [inputs_for("bert", 2, 9, seed=seed) for seed in range(5)]
    observed: list[Execution] = []
    forward: list[int] = []
    monkeypatch.setattr(Execution, "run", lambda self, stretch: observed.append(self))
    call = Graph.__call__
    monkeypatch.setattr(Graph, "__call__", lambda self, **given: (forward.append(1), call(self, **given))[1])

    def runs(passes: list[dict[str, Any]]) -> int:
        forward.clear()
        surgeon.compile(module, passes, inputs=inputs, calibration=batches, backend=None, progress=False)
        return len(forward)

    alone = runs([])
    for step in DATA_FREE:
        assert runs([step]) == alone + 1
    assert not observed
