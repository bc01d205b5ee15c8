"""Rows of ``moe.py``: fewer experts per layer, in all layers together, and per token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from _moe_row import LOTS, Claims, Row

from surgeon.rewrite import Editor
from surgeon.structure import Structure

MODEL, EXPERTS = "tiny-mixtral", 8
CRITERIA = ("frequency", "soft_frequency", "gate_mass", "activation_norm", "reap", "reconstruction")
FRACTIONS = (0.1, 0.2, 0.3)

aten = torch.ops.aten


def rows() -> list[Row]:
    """Dropping and skipping."""
    return [*_drop(), *_skip()]


def _drop() -> list[Row]:
    """Every criterion at 6 and 4 of 8 experts, and random ones that they are compared with."""
    rows = []
    for keep in (6, 4):
        budget = f"{keep} of {EXPERTS} experts"
        lot = {"keep": keep, "criterion": "random", "seed": "$seed"}
        rows.append(Row(MODEL, budget, "drop: random", [{"drop_experts": lot}], None, None, LOTS, True))
        for criterion in CRITERIA:
            for scope in ("layer", "global"):
                fields = {"keep": keep, "criterion": criterion, "budget": scope}
                rows.append(Row(MODEL, budget, f"drop: {criterion}, {scope}", [{"drop_experts": fields}]))
        greedy: dict[str, Any] = {"keep": keep, "criterion": "reconstruction", "exhaustive": 1, "beam": 1}
        rows.append(Row(MODEL, budget, "drop: reconstruction (greedy), layer", [{"drop_experts": greedy}]))
    return rows


def _skip() -> list[Row]:
    """Thresholds at several shares of skipped pairs, the published one, one expert per token, and skipping by lot."""
    rows = []
    for fraction in FRACTIONS:
        budget = f"{fraction:.0%} of pairs skipped"
        chance = by_lot(fraction)
        # no threshold is met at beta 0: what is skipped is what the edit skips
        rows.append(Row(MODEL, budget, "skip: random", [{"skip_experts": {"beta": 0.0}}], None, chance, LOTS, True))
        rows.append(Row(MODEL, budget, "skip: ratio", [{"skip_experts": {"fraction": fraction}}]))
        for by, suffix in (("norm", ""), ("attention", " by attention")):
            fields = {"fraction": fraction, "protect": 0.02, "protect_by": by}
            rows.append(Row(MODEL, budget, f"skip: ratio, 2% protected{suffix}", [{"skip_experts": fields}]))
    chance = by_lot(0.25)
    budget = "25% of pairs skipped"
    rows.append(Row(MODEL, budget, "skip: random", [{"skip_experts": {"beta": 0.0}}], None, chance, LOTS, True))
    rows.append(Row(MODEL, budget, "skip: ratio below the median", [{"skip_experts": {"beta": "median"}}]))
    budget = "1 expert per token"
    chance = by_lot(0.5, either=True)
    rows.append(Row(MODEL, budget, "skip: random", [{"skip_experts": {"beta": 0.0}}], None, chance, LOTS, True))
    rows.append(Row(MODEL, budget, "skip: top 1", [{"skip_experts": {"top_k": 1}}]))
    return rows


def by_lot(fraction: float, either: bool = False) -> Callable[[Editor, Structure, int], None]:
    """An edit by which tokens skip their second expert of two (or ``either``), whatever it weighs, by a hash of the input."""

    def edit(editor: Editor, structure: Structure, seed: int) -> None:
        for site in structure.moes():
            moe = site.part
            with editor.before(moe.node):
                # the digits behind the fourth say nothing of the token
                phase = editor.call(aten.mul.Scalar, editor.call(aten.slice.Tensor, moe.input, 1, seed, seed + 1), 1e4)
                phase = editor.call(aten.sub.Tensor, phase, editor.call(aten.floor.default, phase))
                picked = editor.call(aten.lt.Scalar, phase, 0.5 if either else 2 * fraction)
                second = editor.call(aten.lt.Tensor, moe.weight, editor.call(aten.amax.default, moe.weight, [-1], True))
                skipped = editor.call(aten.eq.Tensor if either else aten.logical_and.default, picked, second)
                kept = editor.call(aten.masked_fill.Scalar, moe.weight, skipped, 0.0)
                shared = editor.call(aten.div.Tensor, kept, editor.call(aten.sum.dim_IntList, kept, [-1], True))
            editor.redirect(moe.node, moe.weight, shared)

    return edit


CLAIMS: Claims = [
    ("SEER-MoE: soft counting beats hard counting", "drop: soft_frequency, layer", "drop: frequency, layer", "*"),
    ("SEER-MoE: one budget for all layers beats one per layer", "drop: frequency, global", "drop: frequency, layer", "*"),
    ("Lu et al.: the set of least loss beats the most used", "drop: reconstruction, layer", "drop: frequency, layer", "*"),
    ("REAP: router-weighted activation beats frequency", "drop: reap, layer", "drop: frequency, layer", "*"),
    ("REAP: router-weighted activation beats the activation's norm", "drop: reap, layer", "drop: activation_norm, layer", "*"),
    ("MoE-I2: unequal numbers per layer beat equal ones", "drop: reconstruction, global", "drop: reconstruction, layer", "*"),
    ("MC-MoE: protecting tokens helps", "skip: ratio, 2% protected by attention", "skip: ratio", "*"),
    ("MC-MoE: protecting tokens helps (by norm alone)", "skip: ratio, 2% protected", "skip: ratio", "*"),
]
