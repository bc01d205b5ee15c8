"""A row of ``moe.py``: one method at one budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from surgeon.contract import Plan
from surgeon.graph import Graph
from surgeon.rewrite import Editor
from surgeon.structure import Structure

LOTS = tuple(range(6))
"""Seeds of what is left to chance."""
OTHER_FORMS = ("not aligned", "not weighted", "not refitted", "by norm", "uniform", "router_logits, global")
"""Parts of the names of methods that are not as surgeon has them by default."""
Edit = Callable[[Editor, Structure, int], None]
MakePlan = Callable[[Graph, Structure, int], Plan[Any]]
Claims = list[tuple[str, str, str, str]]
"""Source, better and worse methods, budgets at which they are compared (a pattern)."""


@dataclass(frozen=True)
class Mixtures:
    """A trained model of mixtures.

    Attributes:
        model: folder in ``examples/models``.
        experts: of every mixture.
        top_k: experts per token.
    """

    model: str
    experts: int
    top_k: int

    def kept(self, *parts: int) -> list[int]:
        """So many quarters of the experts."""
        return [part * self.experts // 4 for part in parts]


MIXTURES = (Mixtures("tiny-mixtral", 8, 2), Mixtures("tiny-upcycled", 16, 4))


@dataclass(frozen=True)
class Row:
    """One method at one budget.

    Attributes:
        model: folder in ``examples/models``.
        budget: what the rows that it is compared with share, e.g. ``4 of 8``.
        method: its name.
        steps: passes as in a recipe; ``"$seed"`` as a value stands for the seed.
        plan: makes the plan of the last step instead of planning (for random decisions).
        edit: changes the result (for random routers).
        seeds: the row is run once for each, and the losses averaged.
        random: it leaves to chance what the methods of its budget decide.
        chance: the random row that it must beat; None: the first one of its budget.
    """

    model: str
    budget: str
    method: str
    steps: Sequence[Mapping[str, Mapping[str, Any]]]
    plan: MakePlan | None = None
    edit: Edit | None = None
    seeds: tuple[int, ...] = (0,)
    random: bool = False
    chance: str | None = None

    @property
    def key(self) -> str:
        """Name in the results."""
        return f"{self.model} | {self.budget} | {self.method}"

    @property
    def adapts(self) -> bool:
        """How many experts a token uses follows from the token, so that latency depends on weights."""
        return any(fields.get("threshold") or name == "skip_experts" for step in self.steps for name, fields in step.items())


def random_routers(editor: Editor, structure: Structure, seed: int) -> None:
    """Give every router weights by lot, and no bias."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in editor.graph.parameters().items():
        if ".router." in name:
            value = torch.randn(tensor.shape, generator=generator) if tensor.dim() > 1 else torch.zeros(tensor.shape)
            editor.set_tensor(name, value)
