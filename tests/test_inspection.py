"""What inspection says about tiny models, against the source modules and closed forms."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from functools import cache

import pytest
import torch
from rich.console import Console
from torch import nn

from surgeon.discovery import discover
from surgeon.graph import Graph
from surgeon.inspection import inspection
from surgeon.structure import Structure
from surgeon.tracing import trace
from surgeon.views import AttentionView, FFNView, Inspection, MoEView
from tests import families_moe
from tests.models import NAMES, tiny
from tests.pages import Page


@cache
def found(name: str) -> tuple[nn.Module, Graph, Structure]:
    module, inputs = tiny(name)
    graph = trace(module, inputs)
    return module, graph, discover(graph)


def view(name: str) -> Inspection:
    return inspection(*found(name)[1:])


def printed(shown: Inspection, width: int = 80) -> str:
    text = io.StringIO()
    shown.render(Console(file=text, width=width))
    return text.getvalue()


def layers(module: nn.Module) -> nn.ModuleList:
    """The source's layers, whatever it calls them."""
    return next(m for m in module.modules() if isinstance(m, nn.ModuleList) and len(m) == 3)


@pytest.mark.parametrize("name", NAMES)
def test_blocks_have_the_parameters_of_the_source_layers(name: str) -> None:
    shown = view(name)
    expected = [sum(p.numel() for p in layer.parameters()) for layer in layers(found(name)[0])]
    assert [block.parameters for block in shown.blocks] == expected
    assert [sum(region.parameters for region in block.regions) for block in shown.blocks] == expected


@pytest.mark.parametrize("name", NAMES)
def test_parts_add_up_to_the_whole(name: str) -> None:
    shown = view(name)
    total = sum(p.numel() for p in found(name)[0].parameters())
    assert shown.parameters == total
    parts = [shown.prefix, *shown.blocks, shown.suffix, shown.context]
    assert sum(part.parameters for part in parts) == total + shown.shared_parameters
    assert shown.shared_parameters == (160 * 64 if name == "gpt2" else 0)  # its head is tied to the embedding
    assert sum(part.flops for part in parts) == pytest.approx(shown.flops, abs=len(parts))
    assert not shown.unrecognised


def test_what_the_parts_are() -> None:
    attention, ffn = (region.parts[0] for region in view("llama").blocks[1].regions)
    assert isinstance(attention, AttentionView)
    assert isinstance(ffn, FFNView)
    assert (attention.heads, attention.kv_heads, attention.head_dim, attention.fused) == (4, 2, 16, False)
    assert (ffn.width, ffn.gated, ffn.activation) == (112, True, "silu")
    assert attention.parameters == 64 * (64 + 32 + 32 + 64)
    assert ffn.parameters == 3 * 64 * 112
    assert [(p.name, p.in_features, p.out_features) for p in ffn.projections] == [
        ("up", 64, 112), ("gate", 64, 112), ("down", 112, 64),
    ]  # fmt: skip
    assert attention.describe() == "4 heads x 16, 2 key/value"
    assert ffn.describe() == "64 > 112 > 64, gated silu"
    fused = view("gpt2").blocks[0].regions[0].parts[0]
    assert isinstance(fused, AttentionView)
    assert fused.fused


def test_flops_of_the_parts() -> None:
    block = view("llama").blocks[0]
    scores_and_values = 2 * 7 * 4 * (16 + 16)  # 7 keys for each of 4 heads
    assert block.regions[0].flops == 2 * 64 * (64 + 32 + 32 + 64) + scores_and_values
    assert block.regions[1].flops == 2 * 3 * 64 * 112
    longer = inspection(*found("llama")[1:], sizes={"batch": 1, "sequence": 128})
    assert longer.blocks[0].regions[0].flops - block.regions[0].flops == 2 * (128 - 7) * 4 * 32
    assert longer.sizes == {"batch": 1, "sequence": 128}
    assert longer.tokens == 128


def test_a_mixture() -> None:
    shown = view("mixtral")
    moe = shown.blocks[0].regions[1]
    part = moe.parts[0]
    assert isinstance(part, MoEView)
    assert (part.experts, part.top_k, part.width, part.gated, part.normalised) == (6, 2, 48, True, True)
    assert part.router is not None
    assert part.parameters == 6 * 3 * 48 * 64 + 6 * 64
    assert moe.parameters - moe.active_parameters == 4 * 3 * 48 * 64
    assert moe.flops == 2 * (6 * 64 + 2 * 3 * 48 * 64)
    assert shown.parameters - shown.active_parameters == 3 * 4 * 3 * 48 * 64


@pytest.mark.parametrize("name", NAMES)
def test_equal_blocks_are_folded(name: str) -> None:
    shown = view(name)
    assert [(block.index, count) for block, count in shown.folded()] == [(0, 3)]
    text = printed(shown)
    assert "blocks 0-2" in text
    assert all(len(line) <= 80 for line in text.splitlines())


def test_blocks_that_differ_are_not_folded() -> None:
    shown = view("llama")
    odd = shown.blocks[1].model_copy(update={"parameters": 1})
    mixed = shown.model_copy(update={"blocks": [shown.blocks[0], odd, shown.blocks[2]]})
    assert [(block.index, count) for block, count in mixed.folded()] == [(0, 1), (1, 1), (2, 1)]


def test_what_is_not_recognised_is_said() -> None:
    _, graph, structure = found("bert")
    strange = replace(structure, unrecognised={"<b>table</b>": "read by [nothing] known"})
    shown = inspection(graph, strange)
    text = printed(shown)
    assert "<b>table</b>: read by [nothing] known" in text
    html = shown.html()
    assert "<b>table</b>" not in html
    assert "<b>table</b>" in Page(html).text


@pytest.mark.parametrize("name", NAMES)
def test_plain_data_and_page(name: str) -> None:
    shown = view(name)
    assert Inspection.model_validate_json(json.dumps(shown.to_dict())) == shown
    page = Page(shown.html())
    assert page.tags.count("svg") == 1
    assert sum(text.startswith("join") for text in page.classes) == 2  # two additions per block, drawn once
    json.dumps(shown.summary())


def test_summary_is_what_a_report_needs() -> None:
    summary = view("mixtral").summary()
    assert [block["index"] for block in summary["blocks"]] == [0, 1, 2]
    assert [region["kind"] for region in summary["blocks"][0]["regions"]] == ["attention", "moe"]
    assert summary["blocks"][0]["bytes"] == 4 * summary["blocks"][0]["parameters"]


def test_inspecting_changes_nothing_and_runs_nothing() -> None:
    _, graph, structure = found("vit")
    before = graph.fingerprint()
    with torch.inference_mode():
        inspection(graph, structure)
    assert graph.fingerprint() == before


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("corrected_groups", ["from 1 of 2 groups", "biased selection", "times 1.5"]),
        ("scaled_inputs", ["weights on inputs"]),
        ("qwen2_moe", ["1 shared, gated"]),
        ("switch", ["at most 3 tokens each"]),
    ],
)
def test_every_fact_of_a_router_is_shown(name: str, words: list[str]) -> None:
    _, graph, structure = families_moe.traced(name)
    shown, part = inspection(graph, structure), next(structure.moes()).part
    page, terminal = shown.html(), printed(shown, 240).replace(",", " ").split()  # whose lines break within a phrase
    assert all(phrase in page for phrase in words)
    assert all(word in terminal for phrase in words for word in phrase.replace(",", " ").split())
    (seen, *_) = (p for b in shown.to_dict()["blocks"] for r in b["regions"] for p in r["parts"] if p["kind"] == "moe")
    for field in ("scale", "selection_bias", "groups", "top_groups", "capacity", "input_scaled"):
        assert seen[field] == getattr(part, field), field
    gate = part.shared_gate
    assert (seen["shared_gate"] or {}).get("weight") == (None if gate is None else gate.weight)
