"""An ONNX model on disk, run by ONNX Runtime."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surgeon.backends import _onnx_tensorrt as tensorrt
from surgeon.backends._onnx_decoding import BoundDecoder, HostDecoder, SharedDecoder, bind
from surgeon.caches import PAST, TOKENS, asked
from surgeon.contract import Artifact
from surgeon.errors import LowerError
from surgeon.generation import Decoder
from surgeon.graph import Port
from surgeon.halves import has_halves
from surgeon.huge_pages import Memory
from surgeon.ports import check_inputs

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
"""ONNX Runtime's names of the providers."""

OPTIONS = {"cuda": {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}}
"""Options of providers: float32 stays float32, and a new shape of a convolution is not measured with every algorithm."""

MODEL = "model.onnx"
"""Name of a model's file."""

EXTRAS = {"cpu": "cpu", "cuda": "cuda", "tensorrt": "cuda"}
"""The extra of this package that installs each provider."""


def runtime(provider: str) -> Any:
    """The onnxruntime library, with the provider in it.

    Raises:
        LowerError: it is not installed, or was built without that provider.
    """
    line = f"pip install 'surgeon[{EXTRAS[provider]}]'"
    if importlib.util.find_spec("onnxruntime") is None:
        raise LowerError(f"the onnxruntime backend needs the onnxruntime library, which is not installed: {line}")
    import onnxruntime

    available = onnxruntime.get_available_providers()
    if PROVIDERS[provider] not in available:
        raise LowerError(
            f"provider {provider!r} needs {PROVIDERS[provider]}; this onnxruntime ({onnxruntime.__version__}) has "
            f"{', '.join(available)}. Install the other build in its place: pip uninstall onnxruntime, then {line}"
        )
    return onnxruntime


@dataclass
class OnnxRuntimeArtifact(Artifact):
    """One ONNX file (and its external data), run by an ``InferenceSession`` that is made on first use.

    Attributes:
        session_threads: intra-operator threads of the session; None leaves the choice to ONNX Runtime.
        file: name of the model file.
        memory: what the session allocated; moved to huge pages when the session has run many times.
    """

    session_threads: int | None = None
    file: str = MODEL
    memory: Memory = field(default_factory=Memory, repr=False, compare=False)
    _session: Any = field(default=None, repr=False, compare=False)
    _opened: tuple[Path, int | None] | None = field(default=None, repr=False, compare=False)

    @property
    def path(self) -> Path:
        """The model file; the one that holds built engines where there is one."""
        return self.folder / (tensorrt.CONTEXT if tensorrt.CONTEXT in {file.path for file in self.files} else self.file)

    @property
    def device(self) -> torch.device:
        """Where it runs: the CPU, or CUDA for every other provider."""
        return torch.device("cpu" if self.options.get("provider", "cpu") == "cpu" else "cuda")

    def failed(self, inputs: Mapping[str, Tensor], error: Exception) -> LowerError:
        """What the runtime said, with the shapes that it was given."""
        shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in inputs.items())
        return LowerError(f"{self.path}: ONNX Runtime failed on inputs {shapes}: {error}")

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run on keyword inputs.

        Args:
            inputs: every input by name, of the dtype and rank recorded; any device and strides (contiguous tensors on
                the CPU are read in place).

        Returns:
            Tensors on the CPU by output name (on a CUDA device with the other providers).

        Raises:
            LowerError: an input is missing, unknown, of another dtype or shape than the model's, or the runtime fails.
        """
        wanted = asked(self.inputs, self.outputs, inputs)
        inputs = check_inputs(self.path, self.inputs, inputs)
        if self.options.get("caches") == "shared":
            self._check_positions(inputs)
            if self._continues_rows(inputs):
                return self._run_by_row(inputs)
        session = self.session()
        try:
            if self.device.type != "cpu":
                return self._run_on_device(session, inputs, wanted)
            feed = {port.name: inputs[port.name].detach().to("cpu").contiguous().numpy() for port in self.inputs}
            results = session.run([port.name for port in wanted], feed)
            self.memory.step()
        except Exception as error:  # onnxruntime's exceptions share no base class but Exception
            raise self.failed(inputs, error) from error
        return {port.name: torch.from_numpy(value) for port, value in zip(wanted, results, strict=True)}

    def decoder(self) -> Decoder:
        """Start generating a text; its caches stay in the runtime's own memory."""
        if has_halves(self.inputs):
            return super().decoder()
        if self.options.get("caches") == "shared":
            return SharedDecoder(self)
        return HostDecoder(self) if self.device.type == "cpu" else BoundDecoder(self)

    def session(self) -> Any:
        """The ``onnxruntime.InferenceSession``; made when first asked for, and again when folder or threads change.

        Raises:
            LowerError: the library is missing or refuses the file.
        """
        if self._session is not None and self._opened is not None and self._opened[1] == self.session_threads:
            return self._session
        self._session = self.open()
        self._opened = (self.path, self.session_threads)
        return self._session

    def open(self, entries: Mapping[str, str] | None = None) -> Any:
        """A new session.

        Args:
            entries: configuration entries of the session, by ONNX Runtime's names.

        Raises:
            LowerError: the library is missing or refuses the file, or its provider does not start (ONNX Runtime would go on
                with the CPU in its place).
        """
        provider = str(self.options.get("provider", "cpu"))
        library = runtime(provider)
        options = library.SessionOptions()
        options.log_severity_level = 3  # errors; warnings speak of node placement and unused initializers
        for key, value in (entries or {}).items():
            options.add_session_config_entry(key, value)
        if self.session_threads is not None:
            options.intra_op_num_threads = self.session_threads
        if provider != "cpu" and hasattr(library, "preload_dlls"):
            library.preload_dlls()  # of CUDA and cuDNN, from the packages that torch brings
        chosen: list[Any] = [(PROVIDERS[provider], OPTIONS.get(provider, {}))]
        if provider == "tensorrt":
            chosen = tensorrt.providers(self.details)
        try:
            self.memory = Memory()
            with self.memory.taken():
                session = library.InferenceSession(self.path, options, providers=chosen)
        except Exception as error:  # onnxruntime's exceptions share no base class but Exception
            raise LowerError(f"{self.path}: ONNX Runtime cannot open it: {error}") from error
        running = session.get_providers()
        if PROVIDERS[provider] not in running:
            raise LowerError(
                f"{self.path}: {PROVIDERS[provider]} did not start, ONNX Runtime would run on {', '.join(running)} in its "
                "place; the lines above, from ONNX Runtime, name the library of CUDA, cuDNN or TensorRT that is missing"
            )
        return session

    def values(self, inputs: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Any]:
        """Some of its outputs as values of the runtime (``OrtValue``), where they were computed.

        Args:
            inputs: every input by name.
            names: of outputs.

        Raises:
            LowerError: an input does not fit, or the runtime fails.
        """
        given = check_inputs(self.path, self.inputs, inputs)
        session = self.session()
        binding = session.io_binding()
        bind(binding, given)
        for name in names:
            binding.bind_output(name, self.device.type)
        try:
            session.run_with_iobinding(binding)
        except Exception as error:  # onnxruntime's exceptions share no base class but Exception
            raise self.failed(given, error) from error
        return dict(zip(names, binding.get_outputs(), strict=True))

    @contextmanager
    def threads(self, count: int) -> Iterator[None]:
        """Run on ``count`` intra-operator threads within the context, and as before after it."""
        if count < 1:
            raise LowerError(f"the number of threads must be at least 1, found {count}")
        before = self.session_threads, self._session, self._opened, self.memory
        self.session_threads = count
        try:
            yield
        finally:
            self.session_threads, self._session, self._opened, self.memory = before

    def _continues_rows(self, inputs: Mapping[str, Tensor]) -> bool:
        """Whether several rows with a past get several tokens each, which the attention over shared caches does not take."""
        past = next(inputs[port.name] for port in self.inputs if port.role == PAST)
        rows, new = inputs[TOKENS].shape
        return rows > 1 and new > 1 and past.shape[2] > 0

    def _check_positions(self, inputs: Mapping[str, Tensor]) -> None:
        """Refuse positions that do not count up by one, which the attention over shared caches does by itself."""
        positions = inputs.get("position_ids")
        if positions is None:
            return
        held = inputs["attention_mask"][:, -positions.shape[1] :] != 0
        starts = positions - torch.arange(positions.shape[1], device=positions.device)
        both = held[:, 1:] & held[:, :-1]
        if bool((both & (starts[:, 1:] != starts[:, :-1])).any()):
            raise LowerError(
                f"{self.path}: position_ids must count up by one along a row where attention_mask is 1, since the model was "
                "built with caches: shared; build it with caches: appended for other positions"
            )

    def _run_by_row(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        rows = [self.run({name: value[i : i + 1] for name, value in inputs.items()}) for i in range(len(inputs[TOKENS]))]
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    def _run_on_device(self, session: Any, inputs: Mapping[str, Tensor], wanted: Sequence[Port]) -> dict[str, Tensor]:
        """Bind tensors of the CUDA device by address, so that nothing passes through host memory."""
        from onnx_ir import tensor_adapters

        devices = {inputs[port.name].device for port in self.inputs}
        device = next((d for d in devices if d.type == "cuda"), torch.device("cuda", 0))
        index = device.index or 0
        binding = session.io_binding()
        held = []
        for port in self.inputs:
            value = inputs[port.name].detach().to(device).contiguous()
            held.append(value)  # lives until the run is over
            element = int(tensor_adapters.from_torch_dtype(value.dtype))
            binding.bind_input(port.name, "cuda", index, element, tuple(value.shape), value.data_ptr())
        for port in wanted:
            binding.bind_output(port.name, "cuda", index)
        # ONNX Runtime computes on a stream of its own, and waits for it before it returns.  This wait also keeps memory of
        # earlier results, which goes back to its arena with the last reference, from being written while torch reads it.
        torch.cuda.current_stream(device).synchronize()
        session.run_with_iobinding(binding)
        results = binding.get_outputs()
        tensors = (_as_tensor(value, port) for value, port in zip(results, wanted, strict=True))
        return {port.name: tensor for port, tensor in zip(wanted, tensors, strict=True)}


def _as_tensor(value: Any, port: Port) -> Tensor:
    """An output as a tensor over the same memory, which lives as long as the tensor."""
    tensor = torch.utils.dlpack.from_dlpack(value._ortvalue.to_dlpack())
    return tensor.view(torch.bool) if port.dtype == torch.bool and tensor.dtype == torch.uint8 else tensor
