"""What holds exactly of fewer experts, on every kind of router."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from surgeon.data import load_data
from surgeon.discovery import discover
from surgeon.graph import Graph
from surgeon.observe import observe
from surgeon.passes.drop_experts import DropExpertsPlan
from surgeon.rewrite import Editor
from surgeon.samples import Sample
from surgeon.structure import MoE, Site
from surgeon.verify import relative_error
from tests.conftest import Patient
from tests.test_moe_families import inputs, traced

ROUTERS = ("mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss", "granitemoe", "switch")

Batch = dict[str, Tensor]


def batches(name: str) -> list[Batch]:
    """Few tokens: fewer than the width, so that a router can be told what to do on each, and than an expert's capacity."""
    return [inputs(name, 4, 3), inputs(name, 1, 2)]


def patient(name: str) -> Patient:
    _, graph, structure = traced(name)
    return Patient(graph, structure, load_data(batches(name), graph))


def observed(graph: Graph, given: list[Batch], *nodes: torch.fx.Node) -> list[Tensor]:
    sample = Sample(*nodes, limit=1 << 20)
    observe(graph, given, {"": sample})
    return sample.values()


def neglected(name: str, victims: tuple[int, ...]) -> Patient:
    """The model with routers that no token of the batches sends to some experts."""
    _, source, structure = traced(name)
    graph = source.clone()
    for number in range(len(list(structure.moes()))):
        part = list(discover(graph).moes())[number].part
        router = part.router
        assert router is not None
        assert not router.transposed
        (x,) = observed(graph, batches(name), router.input)
        editor = Editor(graph)
        weight = editor.tensor(router.weight).detach().clone()
        row = torch.linalg.lstsq(x.double(), torch.full((x.shape[0], 1), -60.0, dtype=torch.float64)).solution[:, 0]
        weight[list(victims)] = row.to(weight.dtype)
        editor.set_tensor(router.weight, weight)
        graph = editor.finish()
    return Patient(graph, discover(graph), load_data(batches(name), graph))


def difference(found: Graph, wanted: Graph, given: list[Batch]) -> float:
    with torch.no_grad():
        pairs = [(found(**batch), wanted(**batch)) for batch in given]
    return max(relative_error(one[key], two[key]) for one, two in pairs for key in two if two[key].is_floating_point())


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("criterion", ["frequency", "soft_frequency", "reap", "reconstruction"])
def test_experts_that_no_token_uses_go_without_loss(name: str, criterion: str) -> None:
    victims = (1, 6) if name == "deepseek_v3" else (1,)  # one of each group
    subject = neglected(name, victims)
    part = next(subject.structure.moes()).part
    dropped = subject.operate({"drop_experts": {"keep": part.experts - len(victims), "criterion": criterion}})
    for decision in dropped.plan.decisions:
        assert not set(victims) & set(decision.keep)
    assert difference(dropped.graph, subject.graph, batches(name)) < 1e-5


@pytest.mark.parametrize("name", ROUTERS)
def test_the_loss_of_a_set_is_that_of_the_model_without_the_others(name: str) -> None:
    """Computed without building that model; here it is built, and the mixtures' outputs are compared."""
    subject = patient(name)
    sites = list(subject.structure.moes())
    keep = sites[0].part.experts // 2
    plan = subject.operate({"drop_experts": {"keep": keep, "criterion": "reconstruction"}}).plan
    for number, decision in enumerate(plan.decisions):
        only = subject.operate({"drop_experts": {"keep": keep}}, DropExpertsPlan(decisions=(decision,)))

        def output(graph: Graph, site: Site[MoE]) -> Tensor:
            return observed(graph, batches(name)[:1], site.part.node)[0]  # what plans see: the last batch is held back

        wanted = output(subject.graph, sites[number])
        found = output(only.graph, list(only.structure.moes())[number])
        loss = float((found - wanted).square().sum() / wanted.square().sum())
        assert decision.loss == pytest.approx(loss, rel=1e-4, abs=1e-10)
        assert loss > 1e-6


def test_a_choice_that_cannot_be_repeated_is_refused_by_site() -> None:
    from surgeon.errors import PlanError

    for name, reason in (("phimoe", "sparsemixer"), ("expert_choice", "expert_choice"), ("scaled_inputs", "inputs")):
        _, graph, structure = traced(name)
        subject = Patient(graph, structure, load_data([inputs(name), inputs(name, 3)], graph))
        step: dict[str, Any] = {"drop_experts": {"keep": 3, "criterion": "reconstruction"}}
        with pytest.raises(PlanError, match=rf"blocks\.0\.moe: criterion reconstruction is not possible: .*{reason}"):
            subject.operate(step)


KINDS = (*ROUTERS, "phimoe", "corrected_groups", "one_expert", "soft_mixture", "relu_routed", "expert_choice")
STEPS = ("drop_experts", "drop_neurons", "merge_experts", "skip_experts", "expose_routing", "low_rank", "quantize")
FACTS = ("scoring", "normalised", "groups", "top_groups", "group_worth", "scale", "capacity", "input_scaled")


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("step", STEPS)
def test_every_pass_keeps_the_kind_of_the_router(name: str, step: str) -> None:
    """Scores, selection, groups, correction, scale and capacity are found behind the pass as in front of it."""
    _, graph, structure = traced(name)
    subject = Patient(graph, structure, load_data([inputs(name), inputs(name, 3, 9)], graph))
    part = next(structure.moes()).part
    fewer = part.experts - part.groups
    # The FFN in front of some mixtures has its family's own width, which may be thousands.
    factored = {"names": "*.attention.*"} if any(structure.attentions()) else {}
    fields: dict[str, Any] = {
        "drop_experts": {"keep": fewer}, "merge_experts": {"groups": fewer, "grouping": "outputs"},
        "skip_experts": {"beta": "median"}, "expose_routing": {"replay": True}, "low_rank": {"ratio": 0.9, **factored},
        "quantize": {"scheme": "int8"}, "drop_neurons": {"ratio": 0.25, "multiple": 1},
    }[step]  # fmt: skip
    after = subject.operate({step: fields}).structure
    assert len(list(after.moes())) == len(list(structure.moes()))
    for was, now in zip(structure.moes(), after.moes(), strict=True):
        expected = {key: getattr(was.part, key) for key in FACTS}
        if (step, name) == ("skip_experts", "expert_choice"):
            # What a token skips cannot be told from what its experts did not take: weights of a softmax, some of them 0.
            expected["scoring"] = "softmax"
        assert {key: getattr(now.part, key) for key in FACTS} == expected
        assert (now.part.selection_bias is None) == (was.part.selection_bias is None)
        assert now.part.experts == (fewer if step in ("drop_experts", "merge_experts") else was.part.experts)
        assert now.part.router is not None
