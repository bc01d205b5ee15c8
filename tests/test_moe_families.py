"""Every mixture of experts is found, is one node, and is as its configuration says; its experts can be dropped and merged."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgeon.accounting import parameter_count
from surgeon.data import load_data
from surgeon.discovery import discover
from surgeon.graph import Graph
from surgeon.passes.drop_experts import DropExpertsPlan, KeepExperts
from surgeon.passes.merge_experts import MergeExpertsPlan, MergeGroups
from surgeon.rewrite import Editor
from surgeon.structure import MoE, Structure
from surgeon.tracing import trace
from surgeon.verify import relative_error
from tests.conftest import Patient
from tests.families_moe import EXPERTS, FAMILIES, HIDDEN, WRITTEN, Layers, inputs, library, traced, with_experts, written

MOE = torch.ops.surgeon.moe.default


def patient(name: str) -> Patient:
    _, graph, structure = traced(name)
    return Patient(graph, structure, load_data([inputs(name), inputs(name, 3)], graph))


def check_mixture(part: MoE, expected: Mapping[str, Any]) -> None:
    assert {key: getattr(part, key) for key in expected} == expected
    assert part.router is not None
    assert part.router.out_features == part.experts


def check_accounts(module: nn.Module, graph: Graph, structure: Structure) -> None:
    assert structure.unrecognised == {}
    assert parameter_count(graph) == sum(p.numel() for p in module.parameters())
    parameters = {name for name, tensor in graph.parameters().items() if isinstance(tensor, nn.Parameter)}
    assert parameters <= set(structure.roles)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_library_model_is_as_its_configuration_says(name: str) -> None:
    module, graph, structure = traced(name)
    family = FAMILIES[name]
    sites = list(structure.moes())
    sparse = [block.index for block in structure.blocks if block.index not in family.dense]
    assert len(structure.blocks) == 2
    assert [site.block for site in sites] == sparse
    assert sum(node.target is MOE for node in graph.module.graph.nodes) == len(sparse)
    for site in sites:
        check_mixture(site.part, family.expected)
        assert tuple(ffn.width for ffn in site.part.shared) == family.shared
        assert (site.part.shared_gate is not None) == family.gated_shared
        assert graph.tensor(site.part.w_out).shape == (site.part.experts, HIDDEN, site.part.width)
    check_accounts(module, graph, structure)


@pytest.mark.parametrize("name", WRITTEN)
def test_every_spelling_becomes_one_node(name: str) -> None:
    module, graph, structure = traced(name)
    (site,) = structure.moes()
    check_mixture(site.part, WRITTEN[name].expected)
    assert tuple(ffn.width for ffn in site.part.shared) == WRITTEN[name].shared
    assert [region.kind for block in structure.blocks for region in block.regions] == ["moe", "ffn"]
    # other sizes than any that tracing compared
    for batch, sequence in ((5, 3), (1, 11)):
        batch_inputs = inputs(name, batch, sequence)
        with torch.no_grad():
            expected = module(**batch_inputs)
            found = graph(**batch_inputs)
        assert relative_error(next(iter(found.values())), expected) < 1e-5
    check_accounts(module, graph, structure)


DROPPED = ("mixtral", "deepseek_v3", "gpt_oss", "granitemoe", "switch", "where_loop_shared", "dense_einsum", "corrected_groups",
           "scaled_inputs", "one_expert", "relu_routed", "loop_over_hits")  # fmt: skip


@pytest.mark.parametrize("name", DROPPED)
def test_dropping_experts_is_the_model_built_without_them(name: str) -> None:
    module, _, structure = traced(name)
    keep = FAMILIES[name].keep if name in FAMILIES else (0, 2, 3) if name != "corrected_groups" else (0, 2, 3, 4, 5, 7)
    small: nn.Module = library(name, len(keep)) if name in FAMILIES else written(name, len(keep))
    reference = with_experts(small, module, keep)
    plan = DropExpertsPlan(decisions=tuple(KeepExperts(site=site.name, keep=keep) for site in structure.moes()))
    dropped = patient(name).operate({"drop_experts": {"keep": len(keep)}}, plan)
    for batch in (inputs(name), inputs(name, 3, 9)):
        with torch.no_grad():
            expected = reference(**batch)
            found = dropped.graph(**batch)
        wanted = expected if isinstance(expected, Tensor) else expected[0]
        assert relative_error(next(iter(found.values())), wanted) < 1e-5
    for site, before in zip(dropped.structure.moes(), structure.moes(), strict=True):
        assert site.part.experts == len(keep)
        assert (site.part.scoring, site.part.groups) == (before.part.scoring, before.part.groups)
    assert parameter_count(dropped.graph) == sum(p.numel() for p in reference.parameters())


@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss", "switch", "scaled_inputs", "expert_choice", "where_loop"])
def test_merging_copies_of_an_expert_is_lossless(name: str) -> None:
    _, source, structure = traced(name)
    graph = source.clone()
    editor = Editor(graph)
    decisions = []
    for site in structure.moes():
        part = site.part
        for tensor in (part.w_in, part.w_out, part.b_in, part.b_out):
            if tensor is not None:
                copied = editor.tensor(tensor).detach().clone()
                copied[1] = copied[0]
                editor.set_tensor(tensor, copied)
        groups = ((0, 1), *((e,) for e in range(2, part.experts)))
        weights = tuple(tuple(1.0 / len(group) for _ in group) for group in groups)
        decisions.append(MergeGroups(site=site.name, groups=groups, weights=weights))
    graph = editor.finish()
    subject = Patient(graph, discover(graph), patient(name).data)
    plan = MergeExpertsPlan(decisions=tuple(decisions))
    merged = subject.operate({"merge_experts": {"groups": structure.blocks and EXPERTS - 1}}, plan)
    batch = inputs(name, 3, 9)
    with torch.no_grad():
        expected, found = graph(**batch), merged.graph(**batch)
    assert all(relative_error(found[key], expected[key]) < 1e-5 for key in expected)


@pytest.mark.parametrize("name", ["where_loop", "dense_loop", "where_loop_stacked"])
def test_every_layer_of_a_deep_model_is_raised(name: str) -> None:
    count = 6
    graph = trace(Layers(name, count).eval(), inputs(name), dynamic={"x": {0: "batch", 1: "sequence"}})
    assert sum(node.target is MOE for node in graph.module.graph.nodes) == count
    assert graph.source.left == {}


def test_groups_stay_equal() -> None:
    from surgeon.errors import PlanError

    subject = patient("corrected_groups")
    with pytest.raises(PlanError, match=r"moe: its router has 2 groups of equal size, 7 experts cannot be"):
        subject.operate({"drop_experts": {"keep": 7}})
    plan = subject.operate({"drop_experts": {"keep": 6}}).plan
    assert all(sum(e < 4 for e in decision.keep) == 3 for decision in plan.decisions)


def test_what_is_no_mixture_stays_as_it_was() -> None:
    from surgeon.raising import raise_mixtures

    class Normed(nn.Module):
        """Experts with a norm behind them are not the operator's."""

        def __init__(self) -> None:
            super().__init__()
            self.inside = copy.deepcopy(written("dense_einsum"))
            self.inside.w2.requires_grad_(True)

        def forward(self, x: Tensor) -> Tensor:
            weight, index = self.inside.route(x)
            combine = torch.zeros(*x.shape[:2], EXPERTS).scatter(-1, index, weight)
            hidden = self.inside.inner(torch.einsum("bsh,ehf->bsef", x, self.inside.w1))
            every = torch.nn.functional.normalize(torch.einsum("bsef,efh->bseh", hidden, self.inside.w2), dim=-1)
            return x + torch.einsum("bseh,bse->bsh", every, combine)

    graph = trace(Normed().eval(), {"x": torch.randn(2, 5, HIDDEN)}, dynamic={"x": {0: "batch", 1: "sequence"}})
    assert not any(node.target is MOE for node in graph.module.graph.nodes)
    before = graph.fingerprint()
    again, reasons = raise_mixtures(graph)
    assert again.fingerprint() == before
    assert "equals no sum of experts" in reasons["inside.w1"]
    assert graph.source.left == reasons
    (reason,) = (region.reason for block in discover(graph).blocks for region in block.regions)
    assert reason is not None
    assert "mixture of experts, but inside.w1: on random inputs it equals no sum of experts" in reason
