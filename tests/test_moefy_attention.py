"""``moefy_attention``: all groups chosen changes nothing, one group alone is that group, routed groups beat chance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from surgeon.data import load_data
from surgeon.errors import PlanError
from surgeon.passes.moefy_attention import MoefyAttention, MoefyAttentionPlan, RouteGroups
from surgeon.registry import make_pass
from surgeon.rewrite import Editor
from tests.conftest import Patient, Trained
from tests.test_passes import error

MakePatient = Callable[[str], Patient]


def moefy(subject: Patient, plan: Any = None, **fields: Any) -> Patient:
    return subject.checked({"moefy_attention": fields}, plan)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "bert", "vit"])
def test_all_groups_chosen_changes_nothing(patient: MakePatient, name: str) -> None:
    subject = patient(name)
    groups = next(iter(subject.structure.attentions())).part.kv_heads
    for fields in (
        {"top_k": groups},
        {"top_k": groups - 1, "shared": 1, "scaling": "least_squares"},
        {"select": "dynamic_k", "threshold": 0.0, "scaling": "expectation"},
    ):
        routed = moefy(subject, **fields)
        assert error(routed, subject) < 4e-6, fields
        assert make_pass({"moefy_attention": fields}).exact(routed.plan)
        found = next(iter(routed.structure.attentions())).part
        assert found.o is not None
        assert found.kv_heads == groups


@pytest.mark.parametrize("shared", [0, 1])
def test_a_shared_group_alone_is_the_output_projection_without_the_other(patient: MakePatient, shared: int) -> None:
    """Two groups of which one is shared; the routed one is silenced by columns of zeros, in both models."""
    subject = patient("llama")
    clone = subject.graph.clone()
    from surgeon.discovery import discover

    editor, structure = Editor(clone), discover(clone)
    for site in structure.attentions():
        assert site.part.o is not None
        weight = editor.tensor(site.part.o.weight).detach().clone()
        half = weight.shape[1] // 2
        weight[:, half * (1 - shared) : half * (2 - shared)] = 0
        editor.set_tensor(site.part.o.weight, weight)
    editor.finish()
    silenced = Patient(clone, discover(clone), subject.data)
    decisions = tuple(
        RouteGroups(site=s.name, groups=2, shared=(shared,), top_k=1) for s in silenced.structure.attentions()
    )
    routed = moefy(silenced, MoefyAttentionPlan(decisions=decisions), top_k=1, shared=1, scaling="softmax")
    assert error(routed, silenced) < 4e-6


def test_chosen_groups_are_those_of_largest_contribution(tiny_llama: Trained) -> None:
    """The router picks the larger of the groups clearly more often than not, and the plan's norms are those of NumPy."""
    from surgeon.observe import observe
    from surgeon.samples import Sample

    assert tiny_llama.held_out is not None
    site = next(s for s in tiny_llama.structure.attentions() if s.block == 2)
    assert site.part.q is not None
    assert site.part.o is not None
    routed = moefy(tiny_llama, top_k=1, blocks=[2])
    sample = Sample(site.part.o.input, limit=2000)
    observe(tiny_llama.graph, tiny_llama.data.calibration, {"a": sample})
    (a,) = sample.values()
    o = tiny_llama.graph.tensor(site.part.o.weight).detach()
    groups = site.part.kv_heads
    norms = torch.stack([(p @ w.T).norm(dim=1) for p, w in zip(a.chunk(groups, 1), o.chunk(groups, 1), strict=True)], dim=1)
    assert routed.plan.decisions[0].norms == pytest.approx(norms.mean(0).tolist(), rel=0.05)


def test_routing_beats_chance(tiny_llama: Trained) -> None:
    """Held-out loss: a predicted group per token, against one fixed group and against the other way round."""
    assert tiny_llama.held_out is not None
    routed = moefy(tiny_llama, top_k=1, blocks="2:4", scaling="least_squares")
    clone = routed.graph.clone()
    editor = Editor(clone)
    for node in clone.module.graph.nodes:
        if node.op == "get_attr" and "router" in str(node.target):
            editor.set_tensor(str(node.target), -editor.tensor(str(node.target)).detach())
    editor.finish()
    inverted = Patient(clone, routed.structure, routed.data)
    dense, found = tiny_llama.loss(tiny_llama.held_out), routed.loss(tiny_llama.held_out)
    assert dense < found < inverted.loss(tiny_llama.held_out)
    mlp = moefy(tiny_llama, top_k=1, blocks="2:4", scaling="least_squares", router="mlp", router_steps=100)
    assert mlp.loss(tiny_llama.held_out) < inverted.loss(tiny_llama.held_out)


@pytest.mark.parametrize(
    ("fields", "message"),
    [({}, "select top_k needs top_k"), ({"select": "threshold"}, "needs threshold"), ({"top_k": 1, "threshold": 0.1}, "top_k")],
)
def test_fields_that_do_not_fit(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        MoefyAttention(**fields)


def test_refusals_by_site(patient: MakePatient) -> None:
    subject = patient("llama")
    with pytest.raises(PlanError, match=r"blocks\.0\.attention: top_k 2 and shared 1 asked, it has 2 key/value groups"):
        moefy(subject, top_k=2, shared=1)
    with pytest.raises(PlanError, match=r"blocks\.0\.attention: .*put moefy_attention before quantize"):
        moefy(subject.operate({"quantize": {"scheme": "int8"}}), top_k=1)
    batches = [{**batch, "attention_mask": torch.zeros_like(batch["attention_mask"])} for batch in subject.data.calibration]
    with pytest.raises(PlanError, match=r"blocks\.0\.attention: calibration data never reached it"):
        moefy(Patient(subject.graph, subject.structure, load_data(batches, subject.graph)), top_k=1)
