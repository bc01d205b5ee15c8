"""Every family of tests/families.py: structure as its configuration says, parameters accounted for, passes exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from surgeon.accounting import memory, parameter_count
from tests.families import FAMILIES, PAGE, PASSES, Case, outcome, page, row

CaseOf = Callable[[str], Case]


@pytest.fixture(scope="session")
def case() -> CaseOf:
    """Families by name, each traced once."""
    made: dict[str, Case] = {}

    def make(name: str) -> Case:
        if name not in made:
            made[name] = Case.of(FAMILIES[name])
        return made[name]

    return make


@pytest.fixture(scope="session")
def found(case: CaseOf) -> Callable[[str], dict[str, str]]:
    """Lines of the table by family, each made once."""
    made: dict[str, dict[str, str]] = {}

    def make(name: str) -> dict[str, str]:
        if name not in made:
            made[name] = row(case(name))
        return made[name]

    return make


@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_are_what_the_configuration_says(case: CaseOf, name: str) -> None:
    family = case(name)
    said, structure = family.family.said(family.module), family.structure
    assert [block.kind for block in structure.blocks] == [said.kind] * said.blocks
    for block in structure.blocks:
        assert [region.reason for region in block.regions] == [None] * len(block.regions)
        (attention,) = (part for region in block.regions for part in region.attention)
        assert (attention.heads, attention.kv_heads, attention.head_dim) == (said.heads, said.kv_heads, said.head_dim)
        assert not attention.cross
        assert attention.o is not None
        rows = {"q": said.heads, "k": said.kv_heads, "v": said.kv_heads}
        for part in attention.parts or (attention,):
            share = len(attention.parts) or 1
            for key, heads in rows.items():
                linear = getattr(part, key)
                assert linear is not None, key
                assert linear.out_features == heads * said.head_dim // share, key
        (ffn,) = (part for region in block.regions for part in region.ffn)
        assert (ffn.layout, ffn.width, ffn.activation) == (said.layout, said.width, said.activation)
        assert (ffn.gate is None) == (said.layout == "plain")


@pytest.mark.parametrize("name", FAMILIES)
def test_every_parameter_is_part_of_one_thing(case: CaseOf, name: str) -> None:
    family = case(name)
    graph, structure, module = family.graph, family.structure, family.module
    assert structure.unrecognised == {}
    read = {memory(graph.tensor(key)): key for key in graph.parameters()}
    assert set(structure.roles) == set(graph.parameters())
    assert sorted(set(structure.roles.values())) == sorted(structure.roles.values())
    left = {key: tensor.numel() for key, tensor in module.named_parameters() if memory(tensor) not in read}
    assert all(any(part in key for part in family.family.unread) for key in left), left
    assert parameter_count(graph) + sum(left.values()) == sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_block_has_the_parameters_of_its_layer(case: CaseOf, name: str) -> None:
    family = case(name)
    if family.family.shared:  # the first block has them all
        owners = {role.split(".")[1] for role in family.structure.roles.values() if role.startswith("blocks.")}
        assert owners == {"0"}
        return
    layers: Any = layers_of(family.module)
    where: dict[Any, set[int]] = {}
    for index, layer in enumerate(layers):
        for parameter in layer.parameters():
            where.setdefault(memory(parameter), set()).add(index)
    checked = 0
    for key, role in family.structure.roles.items():
        inside = where.get(memory(family.graph.tensor(key)))
        if inside is not None:
            assert role.startswith(f"blocks.{min(inside)}."), (key, role)
            checked += 1
        elif isinstance(family.graph.tensor(key), nn.Parameter):
            assert not role.startswith("blocks."), (key, role)
    assert checked


def layers_of(module: nn.Module) -> Any:
    """The list of layers."""
    if hasattr(module, "blocks"):
        return module.blocks
    if hasattr(module, "stack"):
        return module.stack.layers  # type: ignore[union-attr]  # torch's encoder
    count = module.config.num_hidden_layers  # type: ignore[union-attr]  # a configuration
    lists = [m for m in module.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    return [nn.ModuleList(parts) for parts in zip(*lists, strict=True)]  # some keep their layers' parts in lists of their own


@pytest.mark.parametrize("step", PASSES)
@pytest.mark.parametrize("name", FAMILIES)
def test_passes(found: Callable[[str], dict[str, str]], name: str, step: str) -> None:
    """Outcomes are checked while the line is made; a refusal says why."""
    result = found(name)[step]
    assert result in ("exact", "lossy") or "(" in result


def test_refusals_are_the_expected_ones(found: Callable[[str], dict[str, str]]) -> None:
    refused = {(name, step) for name in FAMILIES for step in PASSES if found(name)[step].startswith("refused")}
    assert refused == {(name, "moefy_ffn") for name in ("bitnet", "ffn: Normed", "ffn: Snake")}


def test_the_page_shows_this_run(found: Callable[[str], dict[str, str]]) -> None:
    made = page({name: found(name) for name in FAMILIES})
    assert made == PAGE.read_text(encoding="utf-8"), "run python -m tests.families --write"


def test_an_outcome_that_is_no_refusal_is_no_entry_of_the_table(case: CaseOf, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Case) -> str:
        assert torch.equal(torch.zeros(1), torch.ones(1)), "output: 1.0"
        return "exact"

    monkeypatch.setitem(PASSES, "quantize", broken)
    with pytest.raises(AssertionError, match="output"):
        outcome(case("attention: Apart"), "quantize")
