"""Other checkpoints of a model's own shape, read beside it.

Each is traced like the model itself, so that its weights come in the same form, and must give the same graph: the same
operators on tensors of the same names and shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from surgeon.accounting import Key, memory
from surgeon.discovery import discover
from surgeon.errors import PlanError
from surgeon.graph import Graph
from surgeon.rewrite import Editor
from surgeon.structure import FFN, Structure
from surgeon.tracing import trace


@dataclass(frozen=True)
class Companion:
    """A checkpoint beside the model.

    Attributes:
        path: where it came from.
        graph: its graph.
        ffns: its FFNs by site name.
    """

    path: Path
    graph: Graph
    ffns: dict[str, FFN]


def companions(graph: Graph, structure: Structure, paths: Sequence[Path]) -> list[Companion]:
    """Load checkpoints of the shape of ``graph``.

    Args:
        graph: the model.
        structure: its structure, which says at which site a shape differs.
        paths: directories of checkpoints (or hub ids).

    Raises:
        PlanError: a checkpoint has other tensors, or tensors of other shapes or types; names the site.
    """
    own = graph.parameters()
    dtype = next((tensor.dtype for tensor in own.values() if tensor.is_floating_point()), None)
    found = []
    for path in paths:
        other = trace(path, dtype=dtype, task=graph.source.task)
        theirs = other.parameters()
        if set(own) != set(theirs):
            missing, extra = sorted(set(own) - set(theirs)), sorted(set(theirs) - set(own))
            raise PlanError(
                f"checkpoint {path} is of another shape: it lacks {_listed(missing, structure)} and has besides "
                f"{', '.join(extra[:3]) or 'nothing'}"
            )
        for name, tensor in own.items():
            if tensor.shape != theirs[name].shape:
                raise PlanError(
                    f"{structure.roles.get(name, name)}: {name} is {list(tensor.shape)} here and "
                    f"{list(theirs[name].shape)} in checkpoint {path}; checkpoints must have the model's own shape"
                )
        if graph.fingerprint() != other.fingerprint():
            raise PlanError(f"checkpoint {path} computes something else with the same weights (its configuration differs)")
        found.append(Companion(path, other, {site.name: site.part for site in discover(other).ffns()}))
    return found


def average(editor: Editor, others: Sequence[Companion]) -> None:
    """Let every floating-point parameter become the mean over the model and the others; tied ones stay tied."""
    means: dict[tuple[Key, torch.Size], torch.nn.Parameter] = {}
    for name, tensor in editor.graph.parameters().items():
        if not isinstance(tensor, torch.nn.Parameter) or not tensor.is_floating_point():
            continue
        key = (memory(tensor), tensor.shape)
        if key not in means:
            total = tensor.detach().float()
            for other in others:
                total = total + other.graph.tensor(name).detach().float()
            means[key] = torch.nn.Parameter((total / (1 + len(others))).to(tensor.dtype))
        editor.set_tensor(name, means[key])


def _listed(names: Sequence[str], structure: Structure) -> str:
    return ", ".join(f"{structure.roles.get(name, name)} ({name})" for name in names[:3]) or "nothing"
