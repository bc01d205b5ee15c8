"""ONNX Runtime's TensorRT provider: its options, and a model file that holds engines built once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgeon.backends import _trt_cache as trt_cache
from surgeon.backends import _trt_dialect as dialect
from surgeon.backends import _trt_profiles as profiles
from surgeon.graph import Graph

if TYPE_CHECKING:
    import onnx_ir as ir

    from surgeon.backends._onnx_artifact import OnnxRuntimeArtifact

CONTEXT = "model_ctx.onnx"
"""The model file with engines in it (EPContext nodes in place of the operators)."""

EMBED_LIMIT = 1 << 30
"""Bytes of weights up to which engines go into that file and not beside it."""

WHICH = ("min", "opt", "max")


def write(graph: Graph, shapes: Mapping[str, profiles.Sizes], path: Path) -> tuple[ir.Model, dict[str, Any]]:
    """Write the graph in operators that TensorRT parses.

    Returns:
        The model, and what :func:`providers` wants to know of it.
    """
    sizes = profiles.profile(shapes, graph)
    experts = dialect.spelling(graph, sizes)
    model = dialect.write(graph, experts, path)
    return model, {"experts": experts, "profiles": profiles.of_ports(sizes, graph)}


def providers(details: Mapping[str, Any]) -> list[Any]:
    """The provider with its profiles and caches, and CUDA for operators that it leaves.

    Args:
        details: what :func:`write` returned, as an artefact records it.
    """
    cache = trt_cache.default_folder()
    cache.mkdir(parents=True, exist_ok=True)
    folder = str(cache)
    options: dict[str, Any] = {
        "trt_engine_cache_enable": True,
        "trt_engine_cache_path": folder,
        "trt_timing_cache_enable": True,
        "trt_timing_cache_path": folder,
    }
    for index, which in enumerate(WHICH):
        options[f"trt_profile_{which}_shapes"] = ",".join(
            f"{name}:{_spelt(three[index])}" for name, three in details["profiles"].items()
        )
    return [("TensorrtExecutionProvider", options), "CUDAExecutionProvider"]


def build_context(artifact: OnnxRuntimeArtifact, weight_bytes: int) -> list[str]:
    """Build the engines of an artefact on this GPU and write :data:`CONTEXT`.

    Returns:
        Names of the files that were written.

    Raises:
        LowerError: the provider does not start, or refuses the model.
    """
    before = {path.name for path in artifact.folder.iterdir()}
    artifact.open(
        {
            "ep.context_enable": "1",
            "ep.context_file_path": str(artifact.folder / CONTEXT),
            "ep.context_embed_mode": "1" if weight_bytes <= EMBED_LIMIT else "0",
        }
    )
    return sorted({path.name for path in artifact.folder.iterdir()} - before)


def _spelt(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))
