"""Lowering to ONNX Runtime: one ``model.onnx`` with fused operators where they compute exactly what the graph says.

Float models become standard ONNX (opset 23: Attention, RMSNormalization, RotaryEmbedding).  Low-bit weights stay packed
in the file and reach the blockwise kernels (``com.microsoft.MatMulNBits``, ``GatherBlockQuantized``), dynamically
quantized ones the integer kernels, experts ``com.microsoft.MoE`` and ``QMoE``.  With ``genai: true`` the folder is one
that ``onnxruntime-genai`` generates from.  An encoder-decoder that generates text becomes two files.  With ``provider:
tensorrt`` the file holds standard operators alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from surgeon.backends import _onnx_artifact as runtime
from surgeon.backends import _onnx_genai as genai
from surgeon.backends import _onnx_halves as both
from surgeon.backends import _onnx_shared as shared
from surgeon.backends import _onnx_tensorrt as tensorrt
from surgeon.backends import _trt_dialect as dialect
from surgeon.backends import _trt_profiles as profiles
from surgeon.backends._onnx_artifact import OnnxRuntimeArtifact
from surgeon.backends._onnx_halves import OnnxHalvesArtifact
from surgeon.backends._trt_profiles import Sizes
from surgeon.contract import ArtifactFile, Backend, Refusal
from surgeon.graph import Graph
from surgeon.halves import halves, has_halves
from surgeon.refusals import refuse

__all__ = ["OnnxRuntime", "OnnxRuntimeArtifact"]

FUSING = ("opset", "accuracy_level", "experts", "caches", "genai")
"""Options of the fused form, which TensorRT does not parse."""


class OnnxRuntime(Backend):
    """ONNX Runtime on the CPU or a CUDA device, there also through its TensorRT provider."""

    name: ClassVar[str] = "onnxruntime"

    provider: Literal["cpu", "cuda", "tensorrt"] = "cpu"
    """Where it runs; ``cuda`` needs onnxruntime-gpu, ``tensorrt`` (its TensorRT provider) the TensorRT libraries too."""
    opset: int = Field(23, ge=18, le=23)
    """Version of the ONNX operator set; below 23 attention, norms and rotary embedding become many small operators."""
    threads: int | None = Field(None, ge=1)
    """Intra-operator threads at run time; by default ONNX Runtime takes one per core."""
    accuracy_level: Literal[0, 1, 2, 3, 4] = 4
    """Arithmetic of low-bit matmuls: 4 quantizes activations to int8 blockwise (about 1e-2 relative error, several
    times faster at 4 bits, and the only level with fast kernels at 2 and 8 bits), 0 keeps them in the model's type."""

    experts: Literal["fused", "sorted"] = "fused"
    """Mixtures of experts: ``fused`` takes com.microsoft.MoE and QMoE where they compute exactly what the graph says,
    ``sorted`` always sorts the tokens by expert in standard operators.  On a CPU (version 1.32) sorted took 0.4 to 0.9 of
    the time of fused from 128 tokens on, fused as little as a quarter of sorted for one token and 64 experts."""

    caches: Literal["appended", "shared"] = "appended"
    """Caches of a model that generates text: ``appended`` returns each as a longer copy at every step, ``shared`` (on the
    CPU) takes com.microsoft.GroupQueryAttention, which writes into the buffers that it is given where past and present are
    bound to one.  That saves the copies, which matter for long texts, and takes a batch with a past one token at a time:
    ``surgeon.load`` runs longer continuations row by row."""

    genai: bool = False
    """Write genai_config.json too, so that onnxruntime-genai opens the folder; needs task text-generation."""

    shapes: dict[str, Sizes] = Field(default_factory=dict)
    """With provider tensorrt: smallest, most frequent and largest size of each dynamic dimension, e.g. {batch: [1, 4, 16]};
    batch [1, 1, 8], sequence [1, 128, 512] and past [0, 128, 1024] by default."""

    ep_context: bool = False
    """With provider tensorrt: build the engines now, on this GPU, and keep them in model_ctx.onnx, which opens at once."""

    @field_validator("shapes")
    @classmethod
    def _ordered(cls, value: dict[str, Sizes]) -> dict[str, Sizes]:
        return profiles.ordered(value)

    @classmethod
    def requirements(cls) -> tuple[str, ...]:
        """Import names of the libraries it needs."""
        return ("onnx", "onnxscript", "onnxruntime")

    @classmethod
    def install(cls) -> str:
        """The line that installs them."""
        return "pip install 'surgeon[cpu]' (or 'surgeon[cuda]')"

    @classmethod
    def devices(cls) -> tuple[str, ...]:
        """The execution providers that the installed ONNX Runtime brings."""
        try:
            import onnxruntime
        except ImportError:
            return ()
        here = (name.removesuffix("ExecutionProvider").lower() for name in onnxruntime.get_available_providers())
        return tuple(name for name in here if name != "azure")  # a remote service

    def refuses(self, graph: Graph) -> list[Refusal]:
        """Operators that neither torch.onnx nor this backend translates, and types the provider has no kernels for."""
        from surgeon.backends._onnx_support import unsupported

        found = self._misused()
        if self.provider == "tensorrt":
            return [*found, *dialect.refusals(graph), *profiles.refusals(self.shapes, graph)]
        found += unsupported(graph, self.provider, self.opset)
        found += shared.refusals(graph) if self.caches == "shared" and self.provider == "cpu" else []
        return [*found, *genai.refusals(graph)] if self.genai else found

    def _misused(self) -> list[Refusal]:
        gpu = ("shapes", "ep_context")
        elsewhere = {"cpu": gpu, "cuda": ("caches", *gpu), "tensorrt": FUSING}[self.provider]
        return [
            Refusal(name, f"has no meaning with provider: {self.provider}", lasting=True)
            for name in elsewhere
            if getattr(self, name) != type(self).model_fields[name].get_default(call_default_factory=True)
        ]

    def accepted_error(self, graph: Graph) -> float:
        """Largest relative error of an output that the build accepts.

        A dynamically quantized activation turns a difference of one rounding into one of a whole step wherever a value
        sits on a boundary, and deep models carry that on: the outputs of such a graph may move by more than
        ``low_bit_tolerance`` when nothing but the order of float additions changes.  How far is measured on the graph.
        """
        from surgeon.backends._onnx_support import rounding_response

        return max(super().accepted_error(graph), 2 * rounding_response(graph))

    def nearer(self, graph: Graph) -> tuple[OnnxRuntime | None, str]:
        """Activations that stay in the model's type, where low-bit products, and kernels of low-bit experts, round them."""
        codes = [node for node in graph.module.graph.nodes if str(node.target) == "surgeon.dequantize.default"]
        if not codes or self.provider == "tensorrt":
            return None, ""
        if self.accuracy_level != 4:
            experts = any(str(reader.target) == "surgeon.moe.default" for node in codes for reader in node.users)
            if self.experts != "fused" or not experts:
                return None, ""
            advice = (
                "experts: fused rounds the inputs of low-bit experts at every accuracy_level; experts: sorted keeps them in "
                "the model's type"
            )
            return (None if "experts" in self.model_fields_set else self.model_copy(update={"experts": "sorted"})), advice
        advice = (
            "accuracy_level: 4 rounds the inputs of low-bit products, which changes the choice where experts have nearly "
            "equal scores; accuracy_level: 0 keeps them in the model's type"
        )
        asked = "accuracy_level" in self.model_fields_set
        return (None if asked else self.model_copy(update={"accuracy_level": 0})), advice

    def lower(self, graph: Graph, folder: Path) -> OnnxRuntimeArtifact | OnnxHalvesArtifact:
        """Write ``model.onnx``, or one file for each half of an encoder-decoder with caches.

        Args:
            graph: stays as it is.
            folder: exists, empty.

        Raises:
            LowerError: the library is missing, the graph is refused (every reason is listed), or torch.onnx fails.
        """
        runtime.runtime(self.provider)
        refuse("onnxruntime cannot express this graph", graph, self.refuses(graph))
        if self.provider == "tensorrt":
            return self._lower_to_engines(graph, folder)
        whole = OnnxRuntimeArtifact(
            folder, self.name, self.model_dump(mode="json"), (), graph.inputs, graph.outputs, session_threads=self.threads
        )
        if has_halves(graph.inputs):
            parts = zip(both.FILES, halves(graph), strict=True)
            found = {name: self._lower(half, folder, both.FILES[name]) for name, half in parts}
            whole.files = tuple(file for half in found.values() for file in half.files)
            whole.details = both.details(found)
            return both.joined(found, whole)
        artifact = self._lower(graph, folder, runtime.MODEL)
        if self.genai:
            artifact.files += (ArtifactFile.of(folder, genai.write(graph, folder, self.threads, self.caches == "shared")),)
            artifact.details["genai"] = genai.check(artifact, graph)
        return artifact

    def _lower(self, graph: Graph, folder: Path, file: str) -> OnnxRuntimeArtifact:
        """Write one graph as one model."""
        from surgeon.backends import _onnx_export as onnx_export
        from surgeon.backends import _onnx_file as onnx_file
        from surgeon.backends._onnx_lowering import Lowering

        in_place = self.caches == "shared"
        appends = self.opset >= 23 or in_place
        lowering = Lowering(graph, self.accuracy_level, self.experts == "fused", appends, in_place, self.provider)
        model = onnx_export.export(graph, lowering.run(), self.opset, self.provider)
        onnx_export.annotate(model, graph, lowering.weights)
        details = {
            "opset": dict(model.opset_imports),
            "ir_version": model.ir_version,
            "nodes": len(model.graph),
            "operators": onnx_export.operators(model),
            "fused": dict(lowering.fused),
            "quantization": onnx_export.quantization_kinds(lowering.weights),
            "weight_bytes": onnx_file.weight_bytes(model),
        }
        files = tuple(ArtifactFile.of(folder, name) for name in onnx_file.save(model, folder, file))
        options = self.model_dump(mode="json")
        return OnnxRuntimeArtifact(
            folder, self.name, options, files, graph.inputs, graph.outputs, details, session_threads=self.threads, file=file
        )

    def _lower_to_engines(self, graph: Graph, folder: Path) -> OnnxRuntimeArtifact:
        """Standard operators, which the TensorRT provider makes engines of when the model opens, or now."""
        from surgeon.backends import _onnx_export as onnx_export
        from surgeon.backends import _onnx_file as onnx_file

        model, details = tensorrt.write(graph, self.shapes, folder / "model.onnx")
        details |= {
            "opset": dict(model.opset_imports),
            "ir_version": model.ir_version,
            "nodes": len(model.graph),
            "operators": onnx_export.operators(model),
            "weight_bytes": onnx_file.weight_bytes(model),
        }
        options = self.model_dump(mode="json")
        written = tuple(ArtifactFile.of(folder, path.name) for path in sorted(folder.iterdir()))
        artifact = OnnxRuntimeArtifact(
            folder, self.name, options, written, graph.inputs, graph.outputs, details, session_threads=self.threads
        )
        if self.ep_context:
            added = tensorrt.build_context(artifact, details["weight_bytes"])
            artifact.files = (*written, *(ArtifactFile.of(folder, name) for name in added))
        return artifact

    @classmethod
    def load(cls, folder: Path, manifest: Mapping[str, Any]) -> OnnxRuntimeArtifact | OnnxHalvesArtifact:
        """Open an artefact; the files are compared with their recorded sizes and digests.

        Raises:
            LowerError: a file is missing or damaged, or the library is not installed.
        """
        options = cls.model_validate(manifest["options"])
        runtime.runtime(options.provider)
        kept = options.model_dump(mode="json")
        whole = OnnxRuntimeArtifact.recorded(folder, cls.name, kept, manifest, session_threads=options.threads)
        return both.opened(whole) if "halves" in whole.details else whole
