"""Rows of ``moe.py``: the experts of a mixture joined to one dense network."""

from __future__ import annotations

from typing import Any

import torch
from _moe_row import LOTS, MIXTURES, Claims, Mixtures, Row

from surgeon.graph import Graph
from surgeon.passes.densify_moe import DensifyMoEPlan, DensifyOne
from surgeon.structure import Structure


def one_expert(graph: Graph, structure: Structure, seed: int) -> DensifyMoEPlan:
    """Keep one expert of each mixture, by lot."""
    generator = torch.Generator().manual_seed(seed)
    decisions = []
    for site in structure.moes():
        weights = [0.0] * site.part.experts
        weights[int(torch.randint(site.part.experts, (1,), generator=generator))] = 1.0
        decisions.append(DensifyOne(site=site.name, weights=tuple(weights), scale=1.0, width=site.part.width))
    return DensifyMoEPlan(decisions=tuple(decisions))


def weights_by_lot(graph: Graph, structure: Structure, seed: int) -> DensifyMoEPlan:
    """Put all experts of each mixture side by side, with weights that are any of those with sum 1."""
    generator = torch.Generator().manual_seed(seed)
    decisions = []
    for site in structure.moes():
        drawn = -torch.rand(site.part.experts, generator=generator, dtype=torch.float64).log()
        weights, width = tuple((drawn / drawn.sum()).tolist()), site.part.width * site.part.experts
        decisions.append(DensifyOne(site=site.name, weights=weights, scale=1.0, width=width))
    return DensifyMoEPlan(decisions=tuple(decisions))


def rows() -> list[Row]:
    """Every way to one network, with and without refit, and random ones."""
    return [*(row for mixtures in MIXTURES for row in (*_rows(mixtures), *_merged(mixtures))), *_copies()]


METHODS: dict[str, dict[str, Any]] = {
    "mean": {}, "mean, uniform": {"weights": "uniform"}, "mean, not aligned": {"align": False},
    "learned": {"method": "learned"}, "svd": {"method": "svd"}, "top_columns": {"method": "top_columns"},
    "top_columns by norm": {"method": "top_columns", "columns": "norm"},
}  # fmt: skip
"""From many experts to a network as wide as one."""


def _rows(mixtures: Mixtures) -> list[Row]:
    model, found = mixtures.model, []
    for budget, lot, chance, methods in (
        ("dense, 1 expert wide", "one expert by lot", one_expert, METHODS),
        (f"dense, {mixtures.experts} experts wide", "all experts, weighed by lot", weights_by_lot, {"sum": {"method": "sum"}}),
    ):  # fmt: skip
        common = {"method": "sum"} if "sum" in methods else {}
        for refit, suffix in ((True, ""), (False, ", not refitted")):
            steps = [{"densify_moe": {**common, "refit": refit}}]
            found.append(Row(model, budget, lot + suffix, steps, chance, None, LOTS, True))
            for method, fields in methods.items():
                step = {"densify_moe": {**fields, "refit": refit}}
                found.append(Row(model, budget, f"densify: {method}{suffix}", [step], chance=lot + suffix))
    return found


def _merged(mixtures: Mixtures) -> list[Row]:
    """As wide as the experts of one token: merged to so many, these side by side."""
    model, wide = mixtures.model, mixtures.top_k
    budget, found = f"dense, {wide} experts wide", []
    for refit, suffix in ((True, ""), (False, ", not refitted")):
        dense = {"densify_moe": {"method": "sum", "refit": refit}}
        for combination, fields in (
            ("", {}), (", not aligned", {"align": False}), (", mean", {"combination": "mean"}),
        ):  # fmt: skip
            lot, common = f"random groups{combination}, summed{suffix}", {"groups": wide, **fields}
            random = {"merge_experts": {**common, "grouping": "random", "seed": "$seed"}}
            found.append(Row(model, budget, lot, [random, dense], seeds=LOTS, random=True))
            for grouping, own in (
                ("router_logits", {}),
                ("outputs", {"grouping": "outputs"}),
                ("outputs, hierarchical", {"grouping": "outputs", "clustering": "hierarchical"}),
                ("token_outputs", {"grouping": "token_outputs"}),
            ):
                steps = [{"merge_experts": {**common, **own}}, dense]
                found.append(Row(model, budget, f"merge: {grouping}{combination}, summed{suffix}", steps, chance=lot))
    return found


def _copies() -> list[Row]:
    """Experts that are copies of one network but for noise, as an upcycled mixture starts, made one network again."""
    upcycle = {"upcycle_ffn": {"experts": 8, "top_k": 2, "noise": 0.5}}
    budget, lot = "8 noisy copies, made dense", "one expert by lot, not refitted"
    found = [Row("tiny-llama", budget, lot, [upcycle, {"densify_moe": {"refit": False}}], one_expert, None, LOTS, True)]
    for method, fields in METHODS.items():
        steps = [upcycle, {"densify_moe": {**fields, "refit": False}}]
        found.append(Row("tiny-llama", budget, f"densify: {method}, not refitted", steps, chance=lot))
    return found


CLAIMS: Claims = [
    ("OneS: svd beats the mean", "densify: svd", "densify: mean", "*"),
    ("OneS: svd beats the mean", "densify: svd, not refitted", "densify: mean, not refitted", "*"),
    ("OneS: top columns beat the mean", "densify: top_columns by norm", "densify: mean", "*"),
    ("OneS: top columns beat the mean of equal weights", "densify: top_columns by norm, not refitted",
     "densify: mean, uniform, not refitted", "*"),
    ("Top columns by contribution beat the mean", "densify: top_columns", "densify: mean", "*"),
    ("Top columns by contribution beat those by norm", "densify: top_columns", "densify: top_columns by norm", "*"),
    ("Top columns by contribution beat those by norm", "densify: top_columns, not refitted",
     "densify: top_columns by norm, not refitted", "*"),
    ("ExFusion: learned weights beat the mean", "densify: learned", "densify: mean", "*"),
    ("ExFusion: learned weights beat the mean", "densify: learned, not refitted", "densify: mean, not refitted", "*"),
]  # fmt: skip

WHY: dict[str, str] = {
    "tiny-llama | * | densify: svd, *": "Half of the rank goes, which one copy by lot keeps; the paper distils afterwards.",
    "tiny-llama | * | densify: top_columns*": "The largest columns of copies are the same neurons again: most of the network "
    "is missing. Experts that are strangers (tiny-mixtral) have others each, and it beats chance.",
    f"{MIXTURES[0].model} | * | merge: *, not aligned, summed*": "Neurons of strangers stand in no common order; the paper "
    "aligns them, and so it beats chance.",
    f"{MIXTURES[0].model} | * | densify: *": "The experts were trained from random weights, not copied from one network (see "
    "the cosine of weights); the paper distils afterwards, which the refit stands for. Of copies (tiny-llama) it beats chance.",
    f"{MIXTURES[1].model} | * | densify: *": "Four experts run for each token, each a part of the network that it was, and no "
    "part stands for another; what joins them to the width of one averages parts that are not alike. At the width of four, "
    "after like ones were merged, the same model beats chance.",
}
"""Why a method does not beat chance, by pattern."""
