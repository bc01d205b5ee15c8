"""Rows of ``moe.py`` for ``merge_experts``: every grouping and combination, and what its papers claim about their order."""

from __future__ import annotations

from typing import Any

MODEL = "tiny-mixtral"
GROUPINGS: dict[str, dict[str, Any]] = {
    "router_logits": {},
    "outputs": {"grouping": "outputs"},
    "outputs, kmeans": {"grouping": "outputs", "clustering": "kmeans"},
    "token_outputs": {"grouping": "token_outputs"},
    "weights": {"grouping": "weights"},
}
COMBINATIONS: dict[str, dict[str, Any]] = {
    f"{combination}{', refit' if refit else ''}": {"combination": combination, "refit": refit}
    for combination in ("frequency", "mean", "zip", "svd")
    for refit in (False, True)
}
OTHERS: dict[str, dict[str, Any]] = {
    "outputs, dominant; frequency": {"grouping": "outputs", "clustering": "dominant"},
    "weights, dominant; frequency": {"grouping": "weights", "clustering": "dominant"},
    "router_logits; frequency, not aligned": {"align": False},
    "router_logits; frequency, aligned by activations": {"align_by": "activations"},
    "router_logits; zip by activations": {"combination": "zip", "align_by": "activations"},
}


def rows() -> list[tuple[str, str, str, dict[str, Any], tuple[int, ...], bool]]:
    """Model, budget, method, fields of the pass, seeds and whether the row is the chance of its budget."""
    found: list[tuple[str, str, str, dict[str, Any], tuple[int, ...], bool]] = []
    for groups in (6, 4, 2):
        budget = f"merged to {groups} of 8 experts"
        lot = {"groups": groups, "grouping": "random", "seed": "$seed"}
        chance = {**lot, "combination": "mean", "align": False}
        found.append((MODEL, budget, "merge: random; mean, not aligned", chance, (0, 1, 2), True))
        for combination, fields in COMBINATIONS.items():
            found.append((MODEL, budget, f"merge: random; {combination}", {**lot, **fields}, (0, 1, 2), False))
            for grouping, own in GROUPINGS.items():
                method = f"merge: {grouping}; {combination}"
                found.append((MODEL, budget, method, {"groups": groups, **own, **fields}, (0,), False))
        for method, fields in OTHERS.items():
            found.append((MODEL, budget, f"merge: {method}", {"groups": groups, **fields}, (0,), False))
        if groups > 2:
            fields = {"groups": groups, "budget": "global"}
            found.append((MODEL, budget, "merge: router_logits, global; frequency", fields, (0,), False))
    return found


CLAIMS: list[tuple[str, str, str, str]] = [
    ("M-SMoE: frequency beats the mean", "merge: router_logits; frequency", "merge: router_logits; mean", "merged*"),
    ("M-SMoE: router logits group better than outputs", "merge: router_logits; frequency",
     "merge: outputs, dominant; frequency", "merged*"),
    ("M-SMoE: router logits group better than weights", "merge: router_logits; frequency",
     "merge: weights, dominant; frequency", "merged*"),
    ("M-SMoE: alignment helps", "merge: router_logits; frequency", "merge: router_logits; frequency, not aligned", "merged*"),
    ("M-SMoE: a budget over all layers helps", "merge: router_logits, global; frequency", "merge: router_logits; frequency",
     "merged*"),
    ("HC-SMoE: linkage of outputs beats M-SMoE", "merge: outputs; frequency", "merge: router_logits; frequency", "merged*"),
    ("HC-SMoE: linkage beats k-means", "merge: outputs; frequency", "merge: outputs, kmeans; frequency", "merged*"),
    ("Sub-MoE: joint factors beat frequency", "merge: outputs, kmeans; svd", "merge: outputs, kmeans; frequency", "merged*"),
    ("ZipIt: zipping beats matching one to one", "merge: router_logits; zip", "merge: router_logits; frequency", "merged*"),
    ("MergeMoE: least squares beat means", "merge: router_logits; frequency, refit", "merge: router_logits; frequency",
     "merged*"),
    ("Outputs token by token, weighted, group better than mean outputs", "merge: token_outputs; frequency",
     "merge: outputs; frequency", "merged*"),
    ("Outputs token by token, weighted, group better than router logits", "merge: token_outputs; frequency",
     "merge: router_logits; frequency", "merged*"),
]  # fmt: skip
"""Source, better and worse methods, budgets at which they are compared."""
