"""Passes on a model of the survey, with every check of the pipeline and the property each promises where it is cheap."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surgeon.data import load_data
from surgeon.errors import SurgeonError
from surgeon.graph import Graph
from surgeon.pipeline import operate
from surgeon.progress import Progress
from surgeon.registry import make_pass
from surgeon.structure import Structure
from surgeon.verify import check_exact, check_parameters, check_structure, relative_error

CLOSE = 1e-4
"""Largest relative error of a pass that only rounds."""

PASSES: dict[str, tuple[dict[str, Any], Callable[[Structure], Iterable[Any]] | None, float | None]] = {
    "drop_blocks": ({"count": 1}, None, None),
    "low_rank": ({"ratio": 1.0, "method": "svd"}, None, CLOSE),
    "quantize": ({"scheme": "int8"}, None, 0.3),
    "moefy_ffn": ({"experts": 4, "top_k": 4, "router": "centroid"}, Structure.ffns, CLOSE),
    "drop_experts": ({"keep": 0.75}, Structure.moes, None),
    "merge_experts": ({"groups": 0.75}, Structure.moes, None),
    "skip_experts": ({"top_k": 1}, Structure.moes, None),
    "expose_routing": ({}, Structure.moes, CLOSE),
}
"""By name: the step, what it works on (None: on every model), and the largest relative error of the outputs."""


def run_passes(graph: Graph, structure: Structure) -> dict[str, str]:
    """By pass: ``exact``, ``lossy``, ``n/a``, ``refused: why`` or ``failed: why``."""
    data = load_data([dict(graph.example)], graph)
    with torch.no_grad():
        before = graph(**graph.example)
    found = {}
    for name, (step, parts, limit) in PASSES.items():
        if parts is not None and not list(parts(structure)):
            found[name] = "n/a"
            continue
        try:
            found[name] = _outcome({name: _counted(step, structure)}, limit, graph, structure, data, before)
        except SurgeonError as error:
            kind = "refused" if type(error).__name__ == "PlanError" else "failed"
            found[name] = f"{kind}: {type(error).__name__}: {' '.join(str(error).split())}"[:400]
        except Exception as error:  # a crash is a defect and is told as one
            where = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{Path(where.filename).name}:{where.lineno}"
            found[name] = f"failed: {type(error).__name__} at {place}: {' '.join(str(error).split())}"[:400]
    return found


def _counted(step: dict[str, Any], structure: Structure) -> dict[str, Any]:
    """Shares of the experts as numbers."""
    experts = min((site.part.experts for site in structure.moes()), default=0)
    return {key: max(2, round(experts * value)) if key in ("keep", "groups") else value for key, value in step.items()}


def _outcome(
    step: dict[str, Any], limit: float | None, graph: Graph, structure: Structure, data: Any, before: dict[str, Tensor]
) -> str:
    made = make_pass(step)
    after_graph, after, plan, _ = operate(made, graph, structure, data, None, Progress(False))
    check_structure(made, structure, after)
    check_parameters(made, plan, graph, structure, after_graph)
    with torch.no_grad():
        outputs = after_graph(**graph.example)
    if made.exact(plan):
        check_exact(made, [before], [outputs])
    broken = [key for key, value in outputs.items() if value.is_floating_point() and not torch.isfinite(value).all()]
    if broken and all(torch.isfinite(before[key]).all() for key in broken if key in before):
        return f"failed: the output {broken[0]} is not finite"
    if limit is None:
        return "lossy"
    floating = [key for key in outputs if key in before and outputs[key].is_floating_point()]
    error = max((relative_error(outputs[key], before[key]) for key in floating), default=0.0)
    if error > limit:
        return f"failed: the outputs differ by {error:.2g}, at most {limit:g} was expected"
    return "exact" if limit == CLOSE else "lossy"
