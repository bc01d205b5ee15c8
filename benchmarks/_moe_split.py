"""Rows of ``moe.py``: dense networks and attention split into experts, and copied into experts."""

from __future__ import annotations

from typing import Any

from _moe_row import LOTS, Claims, Row, random_routers

MLP: dict[str, Any] = {"router": "mlp", "router_steps": 200}


def rows() -> list[Row]:
    """Every split, router and selection at several budgets, with random ones; attention; upcycling."""
    return [*_moefy(), *_attention(), *_upcycle()]


def _moefy() -> list[Row]:
    rows = []
    for k in (4, 2):

        def row(method: str, k: int = k, **fields: Any) -> Row:
            shared = fields.get("shared", 0)
            step = {"experts": 8, "top_k": k - shared, **fields}
            return Row("tiny-llama", f"{k} of 8 parts", method, [{"moefy_ffn": step}])

        rows += [
            _parts_by_lot(k),
            row("random split, linear router", split="random"),
            row("kmeans, centroid router", router="centroid"),
            row("kmeans, similarity router", router="similarity"),
            row("kmeans, linear router"),
            row("kmeans, linear router to norm", target="norm"),
            row("kmeans, mlp router", **MLP),
            row("kmeans, mlp router to norm", **MLP, target="norm"),
            row("kmeans, mlp router, least_squares", **MLP, scaling="least_squares"),
            row("kmeans, linear router, mean_output", scaling="mean_output"),
            row("coactivation, linear router", split="coactivation"),
            row("coactivation, mlp router", split="coactivation", **MLP),
            row("importance, linear router", split="importance"),
            row("importance (activation), linear router", split="importance", importance="activation"),
            row("importance, mlp router", split="importance", **MLP),
        ]  # fmt: skip
        if k > 2:
            rows += [
                row("kmeans, 1 shared, linear router", shared=1),
                row("importance, 1 shared, linear router", shared=1, split="importance"),
                row("importance, overlap, least_squares", split="importance", overlap=True, scaling="least_squares"),
            ]
    # at most so many on average: dynamic_k 0.3 runs 6.9, threshold 0.08 6.5, dynamic_k 0.5 5.1 and threshold 0.12 3.9
    for k, rules in {7: (("dynamic_k", 0.3), ("threshold", 0.08)), 6: (("dynamic_k", 0.5),), 4: (("threshold", 0.12),)}.items():
        if k > 4:
            rows.append(_parts_by_lot(k))
        for kind, threshold in rules:
            fields = {"experts": 8, **MLP, "target": "norm", "select": kind, "threshold": threshold}
            rows.append(Row("tiny-llama", f"{k} of 8 parts", f"{kind} {threshold}, kmeans, mlp", [{"moefy_ffn": fields}]))
    return rows


def _parts_by_lot(k: int) -> Row:
    steps = [{"moefy_ffn": {"experts": 8, "top_k": k, "split": "random", "seed": "$seed"}}]
    return Row("tiny-llama", f"{k} of 8 parts", "random split and router", steps, None, random_routers, LOTS[:4], True)


def _attention() -> list[Row]:
    budget, model = "1 of 2 key/value groups", "tiny-llama"
    base = {"top_k": 1}
    rows = [Row(model, budget, "attention: random router", [{"moefy_attention": base}], None, random_routers, LOTS[:4], True)]
    for method, fields in {
        "attention: linear router": {}, "attention: mlp router": MLP,
        "attention: linear router, least_squares": {"scaling": "least_squares"},
        "attention: mlp router, least_squares": {**MLP, "scaling": "least_squares"},
    }.items():  # fmt: skip
        rows.append(Row(model, budget, method, [{"moefy_attention": {**base, **fields}}]))
    return rows


def _upcycle() -> list[Row]:
    return [
        Row("tiny-llama", "upcycled", method, [{"upcycle_ffn": fields}])
        for method, fields in {
            "8 copies, top 2": {"experts": 8, "top_k": 2},
            "8 copies in 4 shards, top 8, parity": {"experts": 32, "granularity": 4, "top_k": 8},
            "8 copies in 4 shards, top 8, published": {
                "experts": 32, "granularity": 4, "top_k": 8, "scaling": "published",
            },
            "8 copies in 4 shards, top 8, published, softmax first": {
                "experts": 32, "granularity": 4, "top_k": 8, "scaling": "published", "gate": "softmax_topk",
            },
            "8 copies, top 2, noise 0.1": {"experts": 8, "top_k": 2, "noise": 0.1},
            "8 copies, top 2, half redrawn": {"experts": 8, "top_k": 2, "reinitialise": 0.5},
        }.items()
    ]  # fmt: skip


CLAIMS: Claims = [
    ("MoEfication: clustered parts beat random ones", "kmeans, linear router", "random split, linear router", "* of 8 parts"),
    ("MoEfication: co-activation beats parameter clustering", "coactivation, linear router", "kmeans, linear router", "*"),
    ("MoEfication: a trained router beats similarity", "kmeans, mlp router", "kmeans, similarity router", "*"),
    ("D2DMoE: predicting norms beats predicting mass", "kmeans, mlp router to norm", "kmeans, mlp router", "*"),
    ("LLaMA-MoE: gradients beat activations as importance", "importance, linear router",
     "importance (activation), linear router", "*"),
    ("LLaMA-MoE v2: shared neurons help", "importance, 1 shared, linear router", "importance, linear router", "*"),
    ("He et al.: virtual groups start as the dense model", "8 copies in 4 shards, top 8, parity",
     "8 copies in 4 shards, top 8, published", "*"),
]  # fmt: skip
