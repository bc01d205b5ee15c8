"""Saved plans: what every pass of a recipe will do to one model, as a file that can be read, edited and repeated."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from surgeon.contract import Pass, Plan
from surgeon.errors import PlanError
from surgeon.graph import Graph
from surgeon.output import write_file

FORMAT = 1
_ADVICE = "name another file, or pass --force to replace it"


class PlannedPass(BaseModel):
    """One pass with its fields and its plan.

    Attributes:
        name: registered name of the pass.
        fields: its fields as the recipe gave them, defaults filled in.
        plan: the plan as plain data.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    fields: dict[str, Any]
    plan: dict[str, Any]


class SavedPlan(BaseModel):
    """The plans of all passes of one recipe on one model.

    Attributes:
        format: version of this file's layout.
        surgeon: version of surgeon that wrote it.
        model: the model as the user named it.
        graph: fingerprint of the traced source graph; a plan only fits that graph.
        passes: the plans in the order of the recipe.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    format: int = FORMAT
    surgeon: str
    model: str
    graph: str
    passes: tuple[PlannedPass, ...]

    @classmethod
    def read(cls, path: str | Path) -> SavedPlan:
        """Read a plan file.

        Raises:
            PlanError: it is missing, not JSON, or not a plan.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise PlanError(f"{path}: no such plan file") from None
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise PlanError(f"{path}: not a plan file: {error}") from error
        try:
            plan = cls.model_validate(data)
        except ValidationError as error:
            raise PlanError(f"{path}: not a plan file: {first_problem(error)}") from error
        if plan.format != FORMAT:
            raise PlanError(f"{path}: plan format {plan.format} is not the one this version reads ({FORMAT}); plan again")
        return plan

    def to_json(self) -> str:
        """The file's text."""
        return json.dumps(self.model_dump(mode="json"), indent=2) + "\n"

    def write(self, path: str | Path, *, force: bool = True) -> None:
        """Write the file; it appears whole or not at all.

        Args:
            path: of the file.
            force: replace what is there; a plan that says the same is replaced in any case.

        Raises:
            PlanError: another plan is there, an edited one perhaps, and ``force`` is False.
        """
        if not force and Path(path).exists() and SavedPlan.read(path).model_copy(update={"surgeon": self.surgeon}) != self:
            raise PlanError(f"{path}: holds other decisions than were made now, edited ones perhaps; {_ADVICE}")
        write_file(Path(path), self.to_json())

    def matched(self, graph: Graph, passes: Sequence[Pass[Any]]) -> list[Plan[Any]]:
        """The plans as objects, after checking that they belong to this model and these passes.

        Raises:
            PlanError: another model, other passes, other fields, or a plan that its pass cannot read.
        """
        found = graph.fingerprint()
        if found != self.graph:
            raise PlanError(
                f"the plan was made for another model: it names {self.model!r} with graph {self.graph[:12]}, "
                f"this model ({graph.source.description!r}) traces to {found[:12]}; plan again with `surgeon plan`"
            )
        wanted, have = [step.name for step in passes], [planned.name for planned in self.passes]
        if wanted != have:
            raise PlanError(f"the plan holds passes {have}, the recipe asks for {wanted}; plan again with `surgeon plan`")
        plans = []
        for number, (step, planned) in enumerate(zip(passes, self.passes, strict=True)):
            fields = step.model_dump(mode="json")
            if fields != planned.fields:
                differing = sorted(k for k in {*fields, *planned.fields} if fields.get(k) != planned.fields.get(k))
                raise PlanError(
                    f"passes.{number} ({step.name}): the plan was made with other options "
                    f"({', '.join(f'{k}: {planned.fields.get(k)!r}, recipe {fields.get(k)!r}' for k in differing)}); "
                    "edit the plan's decisions, not the recipe, or plan again"
                )
            try:
                plans.append(step.plan_type.model_validate(planned.plan))
            except ValidationError as error:
                raise PlanError(f"passes.{number} ({step.name}): the plan cannot be read: {first_problem(error)}") from error
        return plans


def check_replaceable(path: Path, passes: Sequence[Pass[Any]]) -> None:
    """Refuse a file that a plan of these passes would replace by something else, as far as that is known before it is made.

    Raises:
        PlanError: the file holds no plan, or one of other passes or options.
    """
    if not path.exists():
        return
    try:
        planned = [(step.name, step.fields) for step in SavedPlan.read(path).passes]
    except PlanError as error:
        raise PlanError(f"{error}; {_ADVICE}") from error
    if planned != [(step.name, step.model_dump(mode="json")) for step in passes]:
        raise PlanError(f"{path}: holds a plan of other passes or options than the recipe's; {_ADVICE}")


def first_problem(error: ValidationError) -> str:
    """The first problem of a pydantic error as one line: where, what, and the value found."""
    problem = error.errors()[0]
    where = ".".join(str(part) for part in problem["loc"]) or "(top)"
    if problem["type"] == "value_error":  # a validator's own words
        return f"{where}: {problem['ctx']['error']}"
    return f"{where}: {problem['msg']} (found {problem['input']!r:.80})"
