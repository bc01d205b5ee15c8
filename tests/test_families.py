"""Families of one stream: structure as the configuration says, parameters accounted for; and the passes on all families."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from surgeon.accounting import memory, parameter_count
from surgeon.structure import Structure
from tests.families import FAMILIES
from tests.families_streams import MARKED
from tests.family_passes import PASSES, Case, Entry, outcome
from tests.family_table import CASES, PAGE, SECTIONS, committed, line, one_stream, page


@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_are_what_the_configuration_says(name: str) -> None:
    case = one_stream(name)
    said, structure = FAMILIES[name].said(case.module), case.structure
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
def test_every_parameter_is_part_of_one_thing(name: str) -> None:
    case, family = one_stream(name), FAMILIES[name]
    graph, structure, module = case.graph, case.structure, case.module
    assert structure.unrecognised == {}
    read = {memory(graph.tensor(key)): key for key in graph.parameters()}
    assert set(structure.roles) == set(graph.parameters())
    assert sorted(set(structure.roles.values())) == sorted(structure.roles.values())
    left = {key: tensor.numel() for key, tensor in module.named_parameters() if memory(tensor) not in read}
    assert all(any(part in key for part in family.unread) for key in left), left
    assert parameter_count(graph) + sum(left.values()) == sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_block_has_the_parameters_of_its_layer(name: str) -> None:
    family = one_stream(name)
    if FAMILIES[name].shared:  # the first block has them all
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


# -- the table of passes ------------------------------------------------------------------------------------------

PARAMETERS = [
    pytest.param(section, name, marks=[getattr(pytest.mark, MARKED[name])] if name in MARKED else [], id=f"{section}-{name}")
    for section, name in CASES
]


@pytest.mark.parametrize(("section", "name"), PARAMETERS)
def test_the_page_shows_what_passes_do(section: str, name: str) -> None:
    """Outcomes are checked while the line is made."""
    assert line(SECTIONS[section][name](name)) == committed()[section, name], "run python -m tests.families --write"


def test_the_page_has_every_family_and_nothing_else() -> None:
    assert page(committed()) == PAGE.read_text(encoding="utf-8"), "run python -m tests.families --write"


def test_refusals_are_the_expected_ones() -> None:
    refused: dict[str, set[str]] = {}
    for (_, name), text in committed().items():
        for step, found in zip(PASSES, text.strip("| ").split(" | ")[2:], strict=True):
            if found.startswith("refused"):
                refused.setdefault(step, set()).add(name)
    channels = refused.pop("drop_channels")  # streams that are returned, or normed with a gain and go on
    assert refused.pop("rotate") == channels
    assert refused.pop("drop_heads")  # heads that are normed together, weights that blocks share
    assert refused.pop("moefy_attention")  # one key/value head, and projections that are no linears of their own
    assert refused == {
        "drop_blocks": {"hiera"},  # its last block pools
        "moefy_ffn": {"bitnet", "ffn: Normed", "ffn: Snake"},
        "upcycle_ffn": {"bitnet", "ffn: Normed", "ffn: Snake"},
        "drop_neurons": {"albert", "bitnet", "ffn: Normed", "ffn: Snake"},
        "sparsify": {"albert"},  # all of its blocks read the same weights, each on inputs of its own
        "expose_routing": {"scaled_inputs"},  # what would be replayed is multiplied into the experts' inputs too
    }


def test_neurons_are_found_wherever_the_pass_does_not_refuse() -> None:
    place = list(PASSES).index("drop_neurons") + 2
    cells = {name: text.strip("| ").split(" | ")[place] for (_, name), text in committed().items()}
    refused = {name for name, cell in cells.items() if cell.startswith("refused")}
    assert {cell for name, cell in cells.items() if name not in refused} == {"exact", "n/a (no feed-forward network)"}


def test_an_outcome_that_is_no_refusal_is_no_entry_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Case) -> str:
        assert torch.equal(torch.zeros(1), torch.ones(1)), "output: 1.0"
        return "exact"

    monkeypatch.setitem(PASSES, "quantize", Entry(broken, {}))
    with pytest.raises(AssertionError, match="output"):
        outcome(one_stream("attention: Apart"), "quantize")


def test_a_pass_that_acts_where_there_is_nothing_to_act_on_is_no_entry_either(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = replace(PASSES["quantize"], step={"scheme": "int8"}, parts=Structure.moes, missing="no experts")
    monkeypatch.setitem(PASSES, "quantize", entry)
    with pytest.raises(AssertionError, match="quantize plans something on a model with no experts"):
        outcome(one_stream("attention: Apart"), "quantize")
