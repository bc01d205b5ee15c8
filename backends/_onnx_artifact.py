"""An ONNX model on disk, run by ONNX Runtime."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surgeon.contract import Artifact
from surgeon.errors import LowerError

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
"""ONNX Runtime's names of the providers."""

EXTRAS = {"cpu": "cpu", "cuda": "cuda"}
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
    """``model.onnx`` (and its external data), run by an ``InferenceSession`` that is made on first use.

    Attributes:
        session_threads: intra-operator threads of the session; None leaves the choice to ONNX Runtime.
    """

    session_threads: int | None = None
    _session: Any = field(default=None, repr=False, compare=False)
    _opened: tuple[Path, int | None] | None = field(default=None, repr=False, compare=False)

    @property
    def path(self) -> Path:
        """The model file."""
        return self.folder / "model.onnx"

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run on keyword inputs.

        Args:
            inputs: every input by name, of the dtype and rank recorded; any device and strides (contiguous tensors on
                the CPU are read in place).

        Returns:
            Tensors on the CPU by output name (on the inputs' device with the CUDA provider).

        Raises:
            LowerError: an input is missing, unknown, of another dtype or shape than the model's, or the runtime fails.
        """
        self._check(inputs)
        session = self.session()
        try:
            if self.options.get("provider", "cpu") == "cuda":
                return self._run_on_device(session, inputs)
            feed = {port.name: inputs[port.name].detach().to("cpu").contiguous().numpy() for port in self.inputs}
            results = session.run([port.name for port in self.outputs], feed)
        except Exception as error:  # onnxruntime's exceptions share no base class but Exception
            shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in inputs.items())
            raise LowerError(f"{self.path}: ONNX Runtime failed on inputs {shapes}: {error}") from error
        return {port.name: torch.from_numpy(value) for port, value in zip(self.outputs, results, strict=True)}

    def session(self) -> Any:
        """The ``onnxruntime.InferenceSession``; made when first asked for, and again when folder or threads change.

        Raises:
            LowerError: the library is missing or refuses the file.
        """
        if self._session is not None and self._opened is not None and self._opened[1] == self.session_threads:
            return self._session
        provider = str(self.options.get("provider", "cpu"))
        library = runtime(provider)
        options = library.SessionOptions()
        options.log_severity_level = 3  # errors; warnings speak of node placement and unused initializers
        if self.session_threads is not None:
            options.intra_op_num_threads = self.session_threads
        try:
            self._session = library.InferenceSession(self.path, options, providers=[PROVIDERS[provider]])
        except Exception as error:  # onnxruntime's exceptions share no base class but Exception
            raise LowerError(f"{self.path}: ONNX Runtime cannot open it: {error}") from error
        self._opened = (self.path, self.session_threads)
        return self._session

    @contextmanager
    def threads(self, count: int) -> Iterator[None]:
        """Run on ``count`` intra-operator threads within the context, and as before after it."""
        if count < 1:
            raise LowerError(f"the number of threads must be at least 1, found {count}")
        before = self.session_threads, self._session, self._opened
        self.session_threads = count
        try:
            yield
        finally:
            self.session_threads, self._session, self._opened = before

    def _check(self, inputs: Mapping[str, Tensor]) -> None:
        names = [port.name for port in self.inputs]
        missing, unknown = [n for n in names if n not in inputs], sorted(set(inputs) - set(names))
        if missing or unknown:
            found = [f"missing: {', '.join(missing)}"] if missing else []
            found += [f"unknown: {', '.join(unknown)}"] if unknown else []
            raise LowerError(f"{self.path}: the model's inputs are {', '.join(names)}; {'; '.join(found)}")
        sizes: dict[str, tuple[int, str]] = {}
        for port in self.inputs:
            value = inputs[port.name]
            if not isinstance(value, Tensor):
                raise LowerError(f"input {port.name!r} must be a torch.Tensor, found {type(value).__name__}")
            if value.dtype != port.dtype:
                raise LowerError(f"input {port.name!r} must be {port.dtype}, found {value.dtype}")
            fits = value.dim() == len(port.shape) and all(
                isinstance(want, str) or want == have for want, have in zip(port.shape, value.shape, strict=True)
            )
            if not fits:
                raise LowerError(f"input {port.name!r} must have shape {list(port.shape)}, found {list(value.shape)}")
            for want, have in zip(port.shape, value.shape, strict=True):
                if isinstance(want, str) and want != "?" and sizes.setdefault(want, (have, port.name))[0] != have:
                    first, other = sizes[want]
                    raise LowerError(f"inputs {other!r} and {port.name!r} must have the same {want}, found {first} and {have}")

    def _run_on_device(self, session: Any, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
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
        for port in self.outputs:
            binding.bind_output(port.name, "cuda", index)
        torch.cuda.synchronize(device)  # ONNX Runtime computes on a stream of its own
        session.run_with_iobinding(binding)
        results = binding.get_outputs()
        tensors = (torch.utils.dlpack.from_dlpack(value._ortvalue).clone() for value in results)
        return {port.name: tensor for port, tensor in zip(self.outputs, tensors, strict=True)}
