"""Going on from a graph that surgeon made before: pruned and fine-tuned meanwhile, say, and now to be quantized and lowered."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from surgeon.compiled import Compiled
from surgeon.errors import RecipeError
from surgeon.graph import Graph, assign_tensor
from surgeon.placement import relocated
from surgeon.source import LoadedSource


def graph_of(model: Any, **given: Any) -> Graph | None:
    """The graph that a model is, or that a build holds; None where it is neither.

    Args:
        model: what :func:`surgeon.compile` was given.
        **given: its arguments that say how a source is loaded and traced, by name.

    Raises:
        RecipeError: a build that was loaded from a folder, or an argument that came too late.
    """
    if isinstance(model, Compiled):
        if model.graph is None:
            raise RecipeError(
                f"model: the artefact in {model.folder} holds no graph to operate on; give what surgeon.compile returned, or "
                "the source model"
            )
        model = model.graph
    if not isinstance(model, Graph):
        return None
    late = [name for name, value in given.items() if value is not None and value is not False]
    if late:
        raise RecipeError(f"{', '.join(late)}: a graph was traced before, so these are settled; leave them out")
    return model


def source_of(graph: Graph) -> LoadedSource:
    """A graph in the place of a source model: what the result is compared with and timed beside."""
    return LoadedSource(_Model(graph), dict(graph.example), graph.source, graph.source.path)


class _Model(nn.Module):
    """A graph as a module, over the same weights."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.module = graph.module
        self._graph = graph

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Run it."""
        return self._graph(**inputs)

    def __deepcopy__(self, copies: Mapping[int, Any]) -> _Model:
        """A graph whose weights are ``copies`` of this one's, by identity, wherever these are."""
        graph = self._graph.clone()
        graph.placement = None
        copied = {name: copies[id(tensor)] for name, tensor in self._graph.parameters().items()}
        for name, tensor in copied.items():
            assign_tensor(graph.module, name, tensor)
        device = next(iter(copied.values())).device
        for node in graph.module.graph.nodes:
            node.kwargs = relocated(node, device)
        graph.module.recompile()
        return _Model(graph)
