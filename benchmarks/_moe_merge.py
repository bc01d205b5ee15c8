"""Rows of ``moe.py`` for ``merge_experts``: every grouping and combination, and what its papers claim about their order."""

from __future__ import annotations

from typing import Any

from _moe_row import LOTS, MIXTURES, Claims, Mixtures, Row

GROUPINGS: dict[str, dict[str, Any]] = {
    "router_logits": {},
    "outputs": {"grouping": "outputs"},
    "outputs, kmeans": {"grouping": "outputs", "clustering": "kmeans"},
    "outputs, hierarchical": {"grouping": "outputs", "clustering": "hierarchical"},
    "token_outputs": {"grouping": "token_outputs"},
    "weights": {"grouping": "weights"},
}
COMBINATIONS: dict[str, dict[str, Any]] = {
    f"{combination}{', refit' if refit else ''}": {"combination": combination, "refit": refit}
    for combination in ("frequency", "mean", "zip", "svd")
    for refit in (False, True)
}
UNALIGNED: dict[str, Any] = {"align": False}
KMEANS: dict[str, Any] = {"clustering": "kmeans", "weighted": False}
HC_SMOE: dict[str, Any] = {"grouping": "outputs", "clustering": "hierarchical", "weighted": False}
SUB_MOE: dict[str, Any] = {"grouping": "output_cosines", **KMEANS}
LOTS_OF: dict[str, dict[str, Any]] = {
    **COMBINATIONS,
    "mean, not aligned": {"combination": "mean", **UNALIGNED},
    "frequency, not aligned": UNALIGNED,
    "svd, not aligned": {"combination": "svd", **UNALIGNED},
    "frequency, aligned by activations": {"align_by": "activations"},
    "zip by activations": {"combination": "zip", "align_by": "activations"},
    "search": {"combination": "search"},
    "search, refit": {"combination": "search", "refit": True},
}
"""Combinations that random groups are merged with."""
OTHERS: dict[str, dict[str, Any]] = {
    "outputs, hierarchical, not weighted; frequency, not aligned": {**HC_SMOE, **UNALIGNED},
    "outputs, hierarchical, not weighted; frequency": HC_SMOE,
    "weights, not weighted; frequency": {"grouping": "weights", "weighted": False},
    "outputs, kmeans, not weighted; frequency, not aligned": {"grouping": "outputs", **KMEANS, **UNALIGNED},
    "outputs, kmeans, not weighted; frequency": {"grouping": "outputs", **KMEANS},
    "output_cosines, kmeans, not weighted; svd, not aligned": {**SUB_MOE, "combination": "svd", **UNALIGNED},
    "output_cosines, kmeans, not weighted; frequency, not aligned": {**SUB_MOE, **UNALIGNED},
    "output_cosines, kmeans, not weighted; svd": {**SUB_MOE, "combination": "svd"},
    "output_cosines; frequency": {"grouping": "output_cosines"},
    "outputs; frequency, not aligned": {"grouping": "outputs", **UNALIGNED},
    "token_outputs; frequency, not aligned": {"grouping": "token_outputs", **UNALIGNED},
    "outputs, dominant; frequency": {"grouping": "outputs", "clustering": "dominant"},
    "weights, dominant; frequency": {"grouping": "weights", "clustering": "dominant"},
    "router_logits; frequency, not aligned": UNALIGNED,
    "router_logits; frequency, aligned by activations": {"align_by": "activations"},
    "router_logits; zip by activations": {"combination": "zip", "align_by": "activations"},
    "router_logits; search": {"combination": "search"},
    "outputs; search": {"grouping": "outputs", "combination": "search"},
    "router_logits; search, refit": {"combination": "search", "refit": True},
}


def rows() -> list[Row]:
    """Every grouping with every combination, and random groups with each."""
    return [row for mixtures in MIXTURES for row in _rows(mixtures)]


def _rows(mixtures: Mixtures) -> list[Row]:
    found: list[Row] = []
    for groups in mixtures.kept(3, 2, 1):
        budget = f"merged to {groups} of {mixtures.experts} experts"

        def row(method: str, chance: str, fields: dict[str, Any], groups: int = groups, budget: str = budget) -> Row:
            step = {"merge_experts": {"groups": groups, **fields}}
            return Row(mixtures.model, budget, f"merge: {method}", [step], chance=f"merge: random; {chance}")

        def lot(combination: str, fields: dict[str, Any], groups: int = groups, budget: str = budget) -> Row:
            step = {"merge_experts": {"groups": groups, "grouping": "random", "seed": "$seed", **fields}}
            return Row(mixtures.model, budget, f"merge: random; {combination}", [step], seeds=LOTS, random=True)

        found += [lot(combination, fields) for combination, fields in LOTS_OF.items()]
        for combination, fields in COMBINATIONS.items():
            found += [row(f"{grouping}; {combination}", combination, {**own, **fields}) for grouping, own in GROUPINGS.items()]
        for method, fields in OTHERS.items():
            found.append(row(method, method.split("; ")[1], fields))
        if groups > mixtures.top_k:
            found.append(row("router_logits, global; frequency", "frequency", {"budget": "global"}))
    return found


UNEVEN = (
    "Experts are strangers and unevenly used (above), and what they are compared by does not know how often they are chosen: "
    "it joins those that are in use all the time, so that more choices get another expert than by lot (above). Weighed by use "
    "(as by default) the same outputs beat chance with either linkage and k-means, and unweighted ones do on the other model."
)
WHY: dict[str, str] = {
    f"{MIXTURES[0].model} | * | merge: outputs, hierarchical, not weighted;*": UNEVEN,
    f"{MIXTURES[0].model} | * | merge: outputs, kmeans, not weighted;*": UNEVEN,
    f"{MIXTURES[0].model} | * | merge: output_cosines, kmeans, not weighted;*": UNEVEN,
    "* | merge: router_logits, global;*": "One budget by use takes most experts from the block that uses them least evenly: "
    "6, 13, 15 and 14 stay where 12 may on average. That is the first, which costs most to lose (README of the model).",
}

CLAIMS: Claims = [
    ("M-SMoE: frequency beats the mean", "merge: router_logits; frequency", "merge: router_logits; mean", "merged*"),
    ("M-SMoE: router logits group better than outputs", "merge: router_logits; frequency",
     "merge: outputs, dominant; frequency", "merged*"),
    ("M-SMoE: router logits group better than weights", "merge: router_logits; frequency",
     "merge: weights, dominant; frequency", "merged*"),
    ("M-SMoE: alignment helps", "merge: router_logits; frequency", "merge: router_logits; frequency, not aligned", "merged*"),
    ("M-SMoE: a budget over all layers helps", "merge: router_logits, global; frequency", "merge: router_logits; frequency",
     "merged*"),
    ("HC-SMoE: linkage of outputs beats M-SMoE", "merge: outputs, hierarchical, not weighted; frequency, not aligned",
     "merge: router_logits; frequency", "merged*"),
    ("HC-SMoE: linkage beats k-means", "merge: outputs, hierarchical, not weighted; frequency, not aligned",
     "merge: outputs, kmeans, not weighted; frequency, not aligned", "merged*"),
    ("Sub-MoE: joint factors beat frequency", "merge: output_cosines, kmeans, not weighted; svd, not aligned",
     "merge: output_cosines, kmeans, not weighted; frequency, not aligned", "merged*"),
    ("Sub-MoE: it beats HC-SMoE", "merge: output_cosines, kmeans, not weighted; svd, not aligned",
     "merge: outputs, hierarchical, not weighted; frequency, not aligned", "merged*"),
    ("EEP: searched shares beat shares by use", "merge: router_logits; search", "merge: router_logits; frequency", "merged*"),
    ("ZipIt: zipping beats matching one to one", "merge: router_logits; zip", "merge: router_logits; frequency", "merged*"),
    ("MergeMoE: least squares beat means", "merge: router_logits; frequency, refit", "merge: router_logits; frequency",
     "merged*"),
    ("Linkage groups outputs better where experts weigh as they are used", "merge: outputs, hierarchical; frequency",
     "merge: outputs, hierarchical, not weighted; frequency", "merged*"),
    ("Linkage groups weights better where experts weigh as they are used", "merge: weights; frequency",
     "merge: weights, not weighted; frequency", "merged*"),
    ("Ward's linkage of outputs groups better than average linkage", "merge: outputs; frequency",
     "merge: outputs, hierarchical; frequency", "merged*"),
    ("Outputs token by token group better than mean outputs", "merge: token_outputs; frequency",
     "merge: outputs; frequency", "merged*"),
    ("Outputs token by token group better than router logits", "merge: token_outputs; frequency",
     "merge: router_logits; frequency", "merged*"),
]  # fmt: skip
