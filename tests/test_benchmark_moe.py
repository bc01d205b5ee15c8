"""``benchmarks/moe.py``: its committed figures are those of this code, and every method beats chance at its budgets."""

from __future__ import annotations

import json
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import moe  # noqa: E402  # a script beside the tests

RESULTS = json.loads((BENCHMARKS / "results" / "moe.json").read_text(encoding="utf-8"))


def test_the_page_is_that_of_the_figures_and_no_row_is_missing() -> None:
    assert (BENCHMARKS / "results" / "moe.md").read_text(encoding="utf-8") == moe.table(RESULTS)
    assert list(RESULTS) == [row.key for row in moe.ROWS]


def test_every_method_with_its_own_defaults_beats_chance_at_each_budget_of_each_model() -> None:
    """Of forms that leave a step out some do not: each has its reason on the page."""
    chances = moe._chances()
    worse = {key for key, lot in chances.items() if RESULTS[key]["loss"] >= RESULTS[lot]["loss"]}
    forms = {key for key in chances if any(word in RESULTS[key]["method"] for word in moe.OTHER_FORMS)}
    assert len(set(chances) - forms) > 400
    assert worse <= forms
    assert all(any(fnmatchcase(key, pattern) for pattern in moe.WHY) for key in worse)


@pytest.mark.slow
@pytest.mark.parametrize(
    "key",
    [
        "tiny-llama | 4 of 8 parts | kmeans, linear router",
        "tiny-llama | 1 of 2 key/value groups | attention: linear router",
        "tiny-upcycled | dense, 1 expert wide | densify: top_columns",
        "tiny-mixtral | merged to 4 of 8 experts | merge: outputs, hierarchical; frequency",
        "tiny-upcycled | merged to 8 of 16 experts | merge: router_logits; zip, refit",
        "tiny-mixtral | 4 of 8 experts | drop: reap, layer",
        "tiny-upcycled | 20% of pairs skipped | skip: ratio",
    ],
)
def test_a_figure_comes_out_again(key: str) -> None:
    row = next(row for row in moe.ROWS if row.key == key)
    loss = moe.loss(moe.operate(row, 0)[0], moe.bench(row.model).held_out)
    assert loss == pytest.approx(RESULTS[key]["loss"], abs=0.02)
