"""Rows of ``moe.py``: fewer experts per layer, in all layers together, and per token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from _moe_row import LOTS, MIXTURES, Claims, Mixtures, Row
from torch import fx

from surgeon.rewrite import Editor
from surgeon.structure import Structure

CRITERIA = ("frequency", "soft_frequency", "gate_mass", "activation_norm", "reap", "reconstruction")
FRACTIONS = (0.1, 0.2, 0.3)

aten = torch.ops.aten


def rows() -> list[Row]:
    """Dropping and skipping."""
    return [row for mixtures in MIXTURES for row in (*_drop(mixtures), *_skip(mixtures))]


def _drop(mixtures: Mixtures) -> list[Row]:
    """Every criterion at three quarters and half of the experts, and random ones that they are compared with."""
    model, rows = mixtures.model, []
    for keep in mixtures.kept(3, 2):
        budget = f"{keep} of {mixtures.experts} experts"
        lot = {"keep": keep, "criterion": "random", "seed": "$seed"}
        rows.append(Row(model, budget, "drop: random", [{"drop_experts": lot}], None, None, LOTS, True))
        for criterion in CRITERIA:
            for scope in ("layer", "global"):
                fields = {"keep": keep, "criterion": criterion, "budget": scope}
                rows.append(Row(model, budget, f"drop: {criterion}, {scope}", [{"drop_experts": fields}]))
        greedy: dict[str, Any] = {"keep": keep, "criterion": "reconstruction", "exhaustive": 1, "beam": 1}
        rows.append(Row(model, budget, "drop: reconstruction (greedy), layer", [{"drop_experts": greedy}]))
    return rows


def _skip(mixtures: Mixtures) -> list[Row]:
    """Thresholds at several shares of skipped pairs, the published one, fewer experts per token, and skipping by lot."""
    model, k, rows = mixtures.model, mixtures.top_k, []

    def lot(budget: str, chance: Callable[[Editor, Structure, int], None]) -> None:
        # no threshold is met at beta 0: what is skipped is what the edit skips
        rows.append(Row(model, budget, "skip: random", [{"skip_experts": {"beta": 0.0}}], None, chance, LOTS, True))

    for fraction in FRACTIONS:
        budget = f"{fraction:.0%} of pairs skipped"
        lot(budget, by_lot(fraction))
        rows.append(Row(model, budget, "skip: ratio", [{"skip_experts": {"fraction": fraction}}]))
        for by, suffix in (("norm", ""), ("attention", " by attention")):
            fields = {"fraction": fraction, "protect": 0.02, "protect_by": by}
            rows.append(Row(model, budget, f"skip: ratio, 2% protected{suffix}", [{"skip_experts": fields}]))
    fraction = 0.5 * (k - 1) / k  # half of the pairs but each token's best one
    budget = f"{100 * fraction:g}% of pairs skipped"
    lot(budget, by_lot(fraction))
    rows.append(Row(model, budget, "skip: ratio below the median", [{"skip_experts": {"beta": "median"}}]))
    for left in sorted({1, k // 2}, reverse=True):
        budget = f"{left} expert{'s' if left > 1 else ''} per token"
        lot(budget, fewer_by_lot(left))
        rows.append(Row(model, budget, f"skip: top {left}", [{"skip_experts": {"top_k": left}}]))
    return rows


def by_lot(fraction: float) -> Callable[[Editor, Structure, int], None]:
    """An edit by which this share of all pairs is skipped, each token's best expert aside, whatever the others weigh."""

    def skipped(editor: Editor, weight: fx.Node, phase: fx.Node) -> fx.Node:
        k = weight.meta["val"].shape[-1]
        best = editor.call(aten.amax.default, weight, [-1], True)
        picked = editor.call(aten.lt.Scalar, phase, fraction * k / (k - 1))
        return editor.call(aten.logical_and.default, picked, editor.call(aten.lt.Tensor, weight, best))

    return _edit(skipped)


def fewer_by_lot(left: int) -> Callable[[Editor, Structure, int], None]:
    """An edit by which each token keeps so many of its experts, whatever they weigh."""

    def skipped(editor: Editor, weight: fx.Node, phase: fx.Node) -> fx.Node:
        pairs = [editor.call(aten.unsqueeze.default, phase, axis) for axis in (-2, -1)]
        before = editor.call(aten.sum.dim_IntList, editor.call(aten.gt.Tensor, *pairs), [-1])
        return editor.call(aten.ge.Scalar, before, left)

    return _edit(skipped)


def _edit(skipped: Callable[[Editor, fx.Node, fx.Node], fx.Node]) -> Callable[[Editor, Structure, int], None]:
    """An edit that skips what is drawn, by a hash of the mixture's input for every pair of a token and an expert."""

    def edit(editor: Editor, structure: Structure, seed: int) -> None:
        for site in structure.moes():
            moe, k = site.part, site.part.top_k
            with editor.before(moe.node):
                # the digits behind the fourth say nothing of the token
                columns = editor.call(aten.slice.Tensor, moe.input, 1, k * seed, k * (seed + 1))
                phase = editor.call(aten.mul.Scalar, columns, 1e4)
                phase = editor.call(aten.sub.Tensor, phase, editor.call(aten.floor.default, phase))
                kept = editor.call(aten.masked_fill.Scalar, moe.weight, skipped(editor, moe.weight, phase), 0.0)
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
