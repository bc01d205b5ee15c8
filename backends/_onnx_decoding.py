"""Steps of an ONNX model with caches: what one returns as presents, the next takes as pasts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from surgeon import routes
from surgeon.caches import MASK, PAST, PRESENT, TOKENS, room
from surgeon.generation import empty_cache

if TYPE_CHECKING:
    from surgeon.backends._onnx_artifact import OnnxRuntimeArtifact
    from surgeon.graph import Port


def bind(binding: Any, inputs: Mapping[str, Tensor]) -> None:
    """Bind tensors of any device from the host's memory."""
    for name, tensor in inputs.items():
        binding.bind_cpu_input(name, tensor.detach().to("cpu").contiguous().numpy())


class HostDecoder:
    """Steps of an ONNX model on the CPU: what it returns as presents it gets as pasts, arrays that nothing copies.

    Plain ``run`` takes less time than IO binding here, where every port costs a call in Python at every step.
    """

    on_host = True
    device: torch.device | None = None

    def __init__(self, artifact: OnnxRuntimeArtifact, held: Mapping[str, Any] | None = None) -> None:
        """Args:
        artifact: has caches, runs on the CPU.
        held: arrays for inputs that stay the same at every step, filled in until the first step.
        """
        self._artifact = artifact
        self._session = artifact.session()
        self._pasts = [port for port in artifact.inputs if port.role == PAST]
        self._past_names = [port.name for port in self._pasts]
        self._names = ["logits", *(port.name for port in artifact.outputs if port.role == PRESENT)]
        self._held = held if held is not None else {}
        self._replays = any(port.role == routes.REPLAYED for port in artifact.inputs)
        self._feed: dict[str, Any] = {}

    def __call__(self, inputs: Mapping[str, Any]) -> Any:
        """Run on the new tokens; see :class:`surgeon.generation.Decoder`.

        Raises:
            LowerError: the runtime fails.
        """
        feed = self._feed
        if not feed:
            rows = len(next(iter(inputs.values())))
            feed.update({port.name: empty_cache(port, rows, "cpu").numpy() for port in self._pasts})
            feed.update(self._held)
        feed.update(inputs)
        if self._replays:
            given = {name: torch.from_numpy(value) for name, value in inputs.items()}
            own = routes.complete(self._artifact.inputs, given)
            feed.update({name: value.numpy() for name, value in own.items()})
        try:
            logits, *caches = self._session.run(self._names, feed)
        except Exception as error:  # onnxruntime's exceptions share no base class but Exception
            raise self._artifact.failed(inputs, error) from error
        self._artifact.memory.step()
        feed.update(zip(self._past_names, caches, strict=True))
        return logits


class SharedDecoder:
    """Steps of an ONNX model on the CPU that writes new keys and values into the buffers which hold the past.

    Past and present are bound to one buffer once, and so is whatever keeps its shape from step to step: a step then costs
    one call in Python beside the run, for the attention mask.  Buffers that are full are replaced by longer ones.
    """

    on_host = True
    device: torch.device | None = None

    def __init__(self, artifact: OnnxRuntimeArtifact) -> None:
        """Args:
        artifact: has shared caches, runs on the CPU.
        """
        self._artifact = artifact
        self._session = artifact.session()
        pasts = [port for port in artifact.inputs if port.role == PAST]
        presents = [port.name for port in artifact.outputs if port.role == PRESENT]
        self._pairs = list(zip(pasts, presents, strict=True))
        self._vocabulary = next((port.shape[-1], _numpy_type(port)) for port in artifact.outputs if port.name == "logits")
        self._buffers: list[np.ndarray[Any, Any]] = []
        self._bound: dict[str, np.ndarray[Any, Any]] = {}
        self._capacity = 0
        self._binding: Any = None

    def __call__(self, inputs: Mapping[str, Any]) -> Any:
        """Run on the new tokens; see :class:`surgeon.generation.Decoder`.

        Raises:
            LowerError: the runtime fails.
        """
        tokens, length = inputs[TOKENS], inputs[MASK].shape[1]
        if length > self._capacity:
            self._grow(tokens.shape[0], length)
        for name, value in inputs.items():
            held = self._bound.get(name)
            if held is not None and held.shape == value.shape:
                held[...] = value
            else:
                # What is bound is read at every later step and written to, but for the mask, which is longer at each.
                self._bound[name] = held = np.ascontiguousarray(value) if name == MASK else np.array(value)
                self._binding.bind_cpu_input(name, held)
        logits = self._bound.get("logits")
        if logits is None or logits.shape[:2] != tokens.shape:
            size, kind = self._vocabulary
            self._bound["logits"] = logits = np.empty((*tokens.shape, size), kind)
            _bind_memory(self._binding.bind_output, "logits", logits)
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:  # onnxruntime's exceptions share no base class but Exception
            raise self._artifact.failed(inputs, error) from error
        self._artifact.memory.step()
        return logits

    def _grow(self, rows: int, length: int) -> None:
        """Make room for ``length`` positions and more, and bind it."""
        used, self._capacity = self._capacity, room(length, self._capacity)
        full = self._buffers
        self._buffers, self._bound = [], {}
        self._binding = self._session.io_binding()
        for place, (port, present) in enumerate(self._pairs):
            buffer = np.zeros((rows, port.shape[1], self._capacity, port.shape[3]), _numpy_type(port))
            if full:
                buffer[:, :, :used] = full[place]
            self._buffers.append(buffer)
            _bind_memory(self._binding.bind_input, port.name, buffer)
            _bind_memory(self._binding.bind_output, present, buffer)


def _numpy_type(port: Port) -> Any:
    return torch.zeros((), dtype=port.dtype).numpy().dtype


def _bind_memory(to: Callable[..., None], name: str, array: np.ndarray[Any, Any]) -> None:
    to(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)


class BoundDecoder:
    """Steps of an ONNX model on a device; what it returns as presents is bound as pasts, so that no cache leaves it."""

    on_host = False
    device: torch.device | None = None

    def __init__(self, artifact: OnnxRuntimeArtifact, held: Mapping[str, Any] | None = None) -> None:
        """Args:
        artifact: has caches.
        held: values of the runtime (``OrtValue``) for inputs that stay the same at every step, filled in later perhaps.
        """
        self._artifact = artifact
        self._held = held if held is not None else {}
        self._session = artifact.session()
        self._device = artifact.device.type
        self._pasts = [port for port in artifact.inputs if port.role == PAST]
        self._presents = [port.name for port in artifact.outputs if port.role == PRESENT]
        self._caches: list[Any] = []

    def __call__(self, inputs: Mapping[str, Any]) -> Tensor:
        """Run on the new tokens; see :class:`surgeon.generation.Decoder`.

        Raises:
            LowerError: the runtime fails.
        """
        if not self._caches:
            rows = next(iter(inputs.values()))
            empty = [empty_cache(port, len(rows), rows.device) for port in self._pasts]
            self._caches = [self._value(tensor) for tensor in empty]
        inputs = {**inputs, **routes.complete(self._artifact.inputs, inputs)}
        binding = self._session.io_binding()
        bind(binding, inputs)
        for name, value in self._held.items():
            binding.bind_ortvalue_input(name, value)
        for port, value in zip(self._pasts, self._caches, strict=True):
            binding.bind_ortvalue_input(port.name, value)
        binding.bind_output("logits", "cpu")
        for name in self._presents:
            binding.bind_output(name, self._device)
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # onnxruntime's exceptions share no base class but Exception
            raise self._artifact.failed(inputs, error) from error
        logits, *self._caches = binding.get_outputs()
        found = torch.utils.dlpack.from_dlpack(logits._ortvalue.to_dlpack())  # NumPy has no bfloat16
        return found.to(next(iter(inputs.values())).device)

    def _value(self, tensor: Tensor) -> Any:
        import onnxruntime
        from onnx_ir import tensor_adapters

        element = int(tensor_adapters.from_torch_dtype(tensor.dtype))
        return onnxruntime.OrtValue.ortvalue_from_shape_and_type(list(tensor.shape), element, self._device)
