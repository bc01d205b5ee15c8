"""Lowering to TensorRT: one ``model.engine``, built by TensorRT or by TensorRT for RTX from the same ONNX.

TensorRT builds on the GPU that is to run the engine; TensorRT for RTX builds anywhere, for named compute capabilities, and
compiles its kernels on the target.  Networks are strongly typed: the types are those of the graph, so ``model: {dtype:
float16}`` gives a half-precision engine.
"""

from __future__ import annotations

import importlib
import importlib.util
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from surgeon.backends import _trt_dialect as onnx_dialect
from surgeon.backends import _trt_profiles as profiles
from surgeon.backends._onnx_export import operators as operators_of
from surgeon.backends._trt_cache import Entry
from surgeon.backends._trt_profiles import Sizes
from surgeon.caches import asked
from surgeon.contract import Artifact, ArtifactFile, Backend, Refusal
from surgeon.discovery import discover
from surgeon.errors import LowerError
from surgeon.graph import Graph
from surgeon.ports import check_inputs
from surgeon.refusals import refuse
from surgeon.verify import relative_error
from surgeon.zeros import two_of_four

FILE = "model.engine"
FLAVOURS = {"tensorrt": "tensorrt", "rtx": "tensorrt_rtx"}


class TensorRT(Backend):
    """TensorRT or TensorRT for RTX: an engine for NVIDIA GPUs."""

    name: ClassVar[str] = "tensorrt"
    # kernels choose their own order of summation, in half precision too
    tolerance: ClassVar[float] = 2e-2

    flavour: Literal["auto", "tensorrt", "rtx"] = "auto"
    """``tensorrt`` builds for the GPU of this machine, ``rtx`` (TensorRT for RTX) on any machine for the compute capabilities
    named; auto takes the first of the two that is installed and can build here."""
    shapes: dict[str, Sizes] = Field(default_factory=dict)
    """Smallest, most frequent and largest size of each dynamic dimension, e.g. {batch: [1, 4, 16], sequence: [1, 128, 2048]};
    batch [1, 1, 8], sequence [1, 128, 512] and past [0, 128, 1024] by default."""
    compute_capability: tuple[Annotated[float, Field(gt=0)], ...] = ()
    """GPUs that an rtx engine is for, e.g. [8.6, 8.9, 12.0]; 8.9 by default."""
    experts: Literal["auto", "gathered", "dense"] = "auto"
    """Mixtures of experts: ``gathered`` reads the weights of each token's experts, ``dense`` computes every expert for every
    token; auto gathers where the most frequent shape has at most as many token-expert pairs as there are experts."""
    weight_streaming: bool = False
    """Let the engine keep weights in host memory and stream what does not fit."""
    sparse_weights: bool | None = None
    """Let the builder multiply weights whose every four consecutive inputs hold two zeros (sparsify: {pattern: 2:4}) on sparse
    tensor cores where that is faster; by default where there are such weights."""
    cache: Path | None = None
    """Folder of what need not be found twice: timings of kernels while building (TensorRT), compiled kernels while running
    (RTX); surgeon/tensorrt in the user's cache folder by default."""

    @field_validator("shapes")
    @classmethod
    def _ordered(cls, value: dict[str, Sizes]) -> dict[str, Sizes]:
        return profiles.ordered(value)

    @classmethod
    def requirements(cls) -> tuple[str, ...]:
        """Import names of the libraries it needs: whichever TensorRT is installed, or the one for RTX."""
        return ("onnx", "onnxscript", next(filter(_installed, FLAVOURS.values()), "tensorrt_rtx"))

    @classmethod
    def install(cls) -> str:
        """The lines that install them."""
        return "pip install 'surgeon[tensorrt-rtx]' (builds anywhere), or 'surgeon[tensorrt]' on a machine with the GPU"

    @classmethod
    def devices(cls) -> tuple[str, ...]:
        """CUDA devices by name; engines run on nothing else."""
        return tuple(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))

    def refuses(self, graph: Graph) -> list[Refusal]:
        """A flavour that is not installed or cannot build here, low-bit forms and dimensions it has no sizes for."""
        found = onnx_dialect.refusals(graph)
        chosen = self._flavour()
        if self.flavour != "auto" and not _installed(FLAVOURS[self.flavour]):
            found.append(Refusal("flavour", f"{FLAVOURS[self.flavour]} is not installed: {self.install()}", lasting=True))
        elif chosen == "tensorrt" and not torch.cuda.is_available():
            reason = "TensorRT builds on a GPU and none is here; flavour: rtx builds anywhere"
            found.append(Refusal("flavour", reason, lasting=True))
        if chosen == "tensorrt" and self.compute_capability:
            reason = "TensorRT builds for the GPU it runs on; only flavour: rtx takes these"
            found.append(Refusal("compute_capability", reason, lasting=True))
        found += profiles.refusals(self.shapes, graph)
        return found

    def lower(self, graph: Graph, folder: Path) -> TensorRTArtifact:
        """Write ``model.engine``.

        The ONNX form that TensorRT parses is run on ONNX Runtime, where that is installed, and compared with the graph.

        Args:
            graph: stays as it is.
            folder: exists, empty.

        Raises:
            LowerError: the graph is refused, or the parser or the builder refuse a node; names nodes and reasons.
        """
        refuse("tensorrt cannot express this graph", graph, self.refuses(graph))
        flavour = self._flavour()
        library = importlib.import_module(FLAVOURS[flavour])
        profile = profiles.profile(self.shapes, graph)
        experts = onnx_dialect.spelling(graph, profile) if self.experts == "auto" else self.experts
        with tempfile.TemporaryDirectory(prefix="surgeon-") as scratch:
            path = Path(scratch) / "model.onnx"
            model = onnx_dialect.write(graph, experts, path)
            checked = _check_onnx(graph, path, self.accepted_error(graph))
            sparse = sparse_linears(graph) if self.sparse_weights is not False else []
            engine, layers = self._build(library, flavour, graph, path, profile, self.sparse_weights or bool(sparse))
            (folder / FILE).write_bytes(engine)
            nodes, operators = len(model.graph), operators_of(model)
        details = {
            "flavour": flavour,
            "version": library.__version__,
            "compute_capability": [f"{value:.1f}" for value in self._capabilities(flavour)],
            "profile": {name: list(sizes) for name, sizes in profile.items()},
            "nodes": nodes,
            "operators": operators,
            "layers": layers,
            "experts": experts if _has_experts(graph) else None,
            "sparse_weights": len(sparse),
            "onnx_relative_error": checked,
        }
        files = (ArtifactFile.of(folder, FILE),)
        return TensorRTArtifact(folder, self.name, self.model_dump(mode="json"), files, graph.inputs, graph.outputs, details)

    @classmethod
    def load(cls, folder: Path, manifest: Mapping[str, Any]) -> TensorRTArtifact:
        """Open an engine; it is deserialised when it first runs.

        Raises:
            LowerError: the flavour it was built by is not installed, or is another version.
        """
        details = manifest.get("details", {})
        name = FLAVOURS[details["flavour"]]
        if not _installed(name):
            raise LowerError(f"{folder / FILE} needs {name}, which is not installed: {cls.install()}")
        version = importlib.import_module(name).__version__
        if version != details["version"]:
            raise LowerError(
                f"{folder / FILE} was built by {name} {details['version']} and runs with that version only; this is {version}: "
                "install that one, or build the artefact again"
            )
        return TensorRTArtifact.recorded(folder, cls.name, dict(manifest["options"]), manifest)

    # -- building -------------------------------------------------------------------------------------------------------

    def _flavour(self) -> str:
        if self.flavour != "auto":
            return self.flavour
        return "tensorrt" if _installed("tensorrt") and torch.cuda.is_available() else "rtx"

    def _capabilities(self, flavour: str) -> tuple[float, ...]:
        if flavour == "tensorrt":
            major, minor = torch.cuda.get_device_capability()
            return (major + minor / 10,)
        return self.compute_capability or (8.9,)

    def _build(
        self, library: Any, flavour: str, graph: Graph, path: Path, profile: Mapping[str, Sizes], sparse: bool
    ) -> tuple[bytes, int]:
        logger = _logger(library)
        builder = library.Builder(logger)
        flag = getattr(library.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        network = builder.create_network(0 if flag is None else 1 << int(flag))
        parser = library.OnnxParser(network, logger)
        if not parser.parse_from_file(str(path)):
            errors = [parser.get_error(i) for i in range(parser.num_errors)]
            listed = "\n".join(f"  {e.node_name() or 'node'} ({e.node_operator()}): {e.desc()}" for e in errors)
            raise LowerError(f"tensorrt: the parser refuses the model:\n{listed}")
        for index in range(network.num_layers):
            layer = network.get_layer(index)
            if layer.type == getattr(library.LayerType, "ATTENTION_INPUT", None):
                layer.__class__ = library.IAttentionInputLayer
                layer.attention.decomposable = True  # where no fused kernel takes its type or shape
        config = builder.create_builder_config()
        sizes = builder.create_optimization_profile()
        for name, shapes in profiles.of_ports(profile, graph).items():
            sizes.set_shape(name, *shapes)
        config.add_optimization_profile(sizes)
        if flavour == "rtx":
            wanted = self._capabilities(flavour)
            known = {
                int(name[2:]): value for name, value in library.ComputeCapability.__members__.items() if name[2:].isdecimal()
            }
            config.num_compute_capabilities = len(wanted)
            for index, value in enumerate(wanted):
                number = round(10 * value)
                if number not in known:
                    offered = ", ".join(f"{n / 10:.1f}" for n in sorted(known))
                    raise LowerError(
                        f"tensorrt: compute capability {value} is not offered by TensorRT for RTX {library.__version__}; "
                        f"it has {offered}"
                    )
                config.set_compute_capability(known[number], index)
        if self.weight_streaming:
            config.set_flag(library.BuilderFlag.WEIGHT_STREAMING)
        if sparse:
            config.set_flag(library.BuilderFlag.SPARSE_WEIGHTS)
        timings = self._timings(library, config) if flavour == "tensorrt" else None  # RTX times nothing while it builds
        engine = builder.build_serialized_network(network, config)
        if engine is None:
            said = "; ".join(logger.said[-3:]) or "it gives no reason"
            raise LowerError(f"tensorrt: the builder refuses the model: {said}")
        if timings is not None:
            timings.write(lambda: config.get_timing_cache().serialize())
        return bytes(engine), int(network.num_layers)

    def _timings(self, library: Any, config: Any) -> Entry:
        """Give the builder the timings of earlier builds on this GPU."""
        entry = Entry(self.cache, "timings", library.__version__, torch.cuda.get_device_name())
        held = config.create_timing_cache(entry.read())
        if held is None or not config.set_timing_cache(held, False):  # of another driver, say: start afresh
            config.set_timing_cache(config.create_timing_cache(b""), False)
        return entry


@dataclass
class TensorRTArtifact(Artifact):
    """``model.engine``, deserialised on first use, run on the current CUDA device and stream."""

    _held: tuple[Any, Any] | None = field(default=None, repr=False, compare=False)
    _kernels: tuple[Any, Entry] | None = field(default=None, repr=False, compare=False)
    _shapes: set[tuple[tuple[int, ...], ...]] = field(default_factory=set, repr=False, compare=False)

    @property
    def path(self) -> Path:
        """The engine."""
        return self.folder / FILE

    @property
    def device(self) -> torch.device:
        """The current CUDA device."""
        return torch.device("cuda")

    @property
    def unavailable(self) -> str | None:
        """Engines run on NVIDIA GPUs."""
        return None if torch.cuda.is_available() else "a TensorRT engine runs on an NVIDIA GPU, and none is here"

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run on keyword inputs, by address: nothing passes through host memory when they are on the GPU.

        Args:
            inputs: every input by name, of the type and rank recorded.

        Returns:
            CUDA tensors by output name.

        Raises:
            LowerError: there is no GPU, an input does not fit, or is outside the engine's profile.
        """
        if self.unavailable:
            raise LowerError(f"{self.path}: {self.unavailable}")
        wanted = asked(self.inputs, self.outputs, inputs)
        inputs = check_inputs(self.path, self.inputs, inputs)
        engine, context = self._open()
        held = {}
        for port in self.inputs:
            value = inputs[port.name].detach().to("cuda").contiguous()
            held[port.name] = value
            if not context.set_input_shape(port.name, tuple(value.shape)):
                allowed = engine.get_tensor_profile_shape(port.name, 0)
                raise LowerError(
                    f"{self.path}: input {port.name!r} of shape {list(value.shape)} is outside the engine's profile "
                    f"{[list(shape) for shape in allowed]}; build it with other shapes"
                )
        for port in self.outputs:
            held[port.name] = torch.empty(tuple(context.get_tensor_shape(port.name)), dtype=port.dtype, device="cuda")
        spare = torch.empty(1, dtype=torch.uint8, device="cuda")  # empty tensors have no address, and one is needed
        for name, value in held.items():
            context.set_tensor_address(name, value.data_ptr() or spare.data_ptr())
        if not context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise LowerError(f"{self.path}: TensorRT failed on inputs { ({n: list(v.shape) for n, v in held.items()}) }")
        self._keep_kernels(tuple(tuple(held[port.name].shape) for port in self.inputs))
        return {port.name: held[port.name] for port in wanted}

    def _open(self) -> tuple[Any, Any]:
        if self._held is None:
            library = importlib.import_module(FLAVOURS[self.details["flavour"]])
            runtime = library.Runtime(_logger(library))
            engine = runtime.deserialize_cuda_engine(self.path.read_bytes())
            if engine is None:
                name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
                raise LowerError(
                    f"{self.path} cannot be opened on {name} (compute capability {capability[0]}.{capability[1]}); "
                    f"it was built for {', '.join(self.details['compute_capability'])}"
                )
            if self.options.get("weight_streaming"):
                engine.weight_streaming_budget_v2 = engine.get_weight_streaming_automatic_budget()
            self._held = engine, self._context(library, engine)
        return self._held

    def _context(self, library: Any, engine: Any) -> Any:
        """An execution context; RTX's, which compiles kernels for the shapes it meets, with those of earlier runs."""
        if self.details["flavour"] != "rtx":
            return engine.create_execution_context()
        folder = self.options.get("cache")
        digest = self.files[0].sha256[:16]
        entry = Entry(folder and Path(folder), "kernels", library.__version__, torch.cuda.get_device_name(), digest)
        config = engine.create_runtime_config()
        cache = config.create_runtime_cache()
        kept = entry.read()
        if kept and not cache.deserialize(kept):
            entry.size = 0  # of another driver, say
        config.set_runtime_cache(cache)
        self._kernels = cache, entry
        return engine.create_execution_context(config)

    def _keep_kernels(self, shapes: tuple[tuple[int, ...], ...]) -> None:
        """Keep what RTX compiled for shapes that it met for the first time."""
        if self._kernels is not None and shapes not in self._shapes:
            self._shapes.add(shapes)
            cache, entry = self._kernels
            torch.cuda.current_stream().synchronize()
            entry.write(cache.serialize)

    @contextmanager
    def threads(self, count: int) -> Iterator[None]:
        """An engine uses no threads of the host."""
        yield


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _has_experts(graph: Graph) -> bool:
    return any(node.target is torch.ops.surgeon.moe.default for node in graph.module.graph.nodes)


def sparse_linears(graph: Graph) -> list[str]:
    """Names of the weights of linears of whose every four consecutive inputs two at least are zero."""
    found = []
    for site in discover(graph).linears:
        weight = graph.tensor(site.part.weight).detach()
        if weight.is_floating_point() and two_of_four(weight.T if site.part.transposed else weight):
            found.append(site.part.weight)
    return found


def _logger(library: Any) -> Any:
    """A logger that keeps errors and prints nothing."""

    class Logger(library.ILogger):  # type: ignore[misc]  # a class of a library without types
        def __init__(self) -> None:
            library.ILogger.__init__(self)
            self.said: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (library.ILogger.Severity.ERROR, library.ILogger.Severity.INTERNAL_ERROR):
                self.said.append(message)

    return Logger()


def _check_onnx(graph: Graph, path: Path, tolerance: float) -> float | None:
    """Largest relative error of the ONNX form on ONNX Runtime against the graph; None where that is not installed.

    Raises:
        LowerError: it computes something else.
    """
    if not _installed("onnxruntime"):
        return None
    from surgeon.backends._onnx_artifact import OnnxRuntimeArtifact

    artifact = OnnxRuntimeArtifact(path.parent, "onnxruntime", {}, (), graph.inputs, graph.outputs)
    with torch.no_grad():
        expected = graph(**graph.example)
    found = artifact.run(graph.example)
    worst = max(relative_error(found[name], value) for name, value in expected.items())
    if not worst <= tolerance:
        raise LowerError(f"tensorrt: the ONNX form differs from the graph by {worst:.2e} (relative), accepted {tolerance:.0e}")
    return worst
