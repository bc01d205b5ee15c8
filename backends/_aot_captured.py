"""Steps of a generation as captured CUDA graphs.

Launching the kernels of a step takes the host longer than a GPU takes to run them where a model is small or a batch short.  A
CUDA graph launches them all at once, the same ones on the same memory: so tokens, positions, mask and the number of past
positions are written where it reads them, and caches lie in buffers (``_aot_shared``).  A graph holds until a buffer is full.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from surgeon.backends._aot_shared import BufferDecoder
from surgeon.caches import MASK, MASKED_POSITIONS, PAST, POSITIONS, PRESENT, TOKENS
from surgeon.graph import Port

Package = Callable[[list[Tensor]], list[Tensor]]
"""From inputs in the package's order to its outputs."""


class CapturedDecoder(BufferDecoder):
    """Steps of a package on CUDA; those of one token are captured.

    The first such step runs as any other does, and loads the kernels; the second is captured.
    """

    def __init__(
        self, run: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]], package: Package, inputs: tuple[Port, ...],
        outputs: tuple[Port, ...], device: torch.device,
    ) -> None:  # fmt: skip
        """Args:
        run: runs a step by names.
        package: the same, by position.
        inputs: its ports.
        outputs: likewise.
        device: where it runs.
        """
        super().__init__(run, inputs, outputs, device)
        self._package, self._inputs = package, inputs
        self._logits = [port.name for port in outputs if port.role != PRESENT].index("logits")
        others = [port for port in inputs if port.role != PAST and port.name != MASK]
        self._fed = {port.name for port in others}
        self._fixed = not any(PAST in str(size) for port in others for size in port.shape)
        self._loaded = False
        self._step: CapturedStep | None = None

    def __call__(self, inputs: Mapping[str, Any]) -> Tensor:
        """Run on the new tokens; see :class:`surgeon.generation.Decoder`."""
        length = inputs[MASK].shape[1]
        single = inputs[TOKENS].shape[1] == 1 and self._fixed and self._fed | {MASK} == set(inputs)
        if length > self._capacity or not single or not self._loaded:
            self._step = self._step if length <= self._capacity else None  # it knows the buffers that are replaced now
            self._loaded = self._loaded or single
            return super().__call__(inputs)
        if self._step is None:
            self._step = CapturedStep(self._package, self._inputs, self._caches, inputs, self._capacity, self.device)
        self._length = length
        return self._step(inputs)[self._logits]


class CapturedStep:
    """The launches of one step over certain buffers, which end with those that make its inputs the next step's.

    A generation so copies new tokens alone: the host does little else between two steps, and the device waits for it.
    """

    def __init__(
        self, package: Package, ports: Sequence[Port], caches: Mapping[str, Tensor], inputs: Mapping[str, Tensor],
        capacity: int, device: torch.device,
    ) -> None:  # fmt: skip
        """Args:
        package: runs it; has run such a step before.
        ports: its inputs.
        caches: the buffers, by name.
        inputs: those of one step that are no caches.
        capacity: positions that the buffers have.
        device: where they are.
        """
        rows, kind = len(inputs[MASK]), inputs[MASK].dtype
        self._mask = torch.empty((rows, capacity), dtype=kind, device=device)
        self._start = torch.empty(1, dtype=torch.int64, device=device)
        self._held = {
            name: torch.empty(value.shape, dtype=value.dtype, device=device) for name, value in inputs.items() if name != MASK
        }
        counting = {port.name for port in ports if port.role in (POSITIONS, MASKED_POSITIONS)} & set(self._held)
        self._counted = [self._start, *(self._held[name] for name in counting)]
        self._given_anew = [(name, held) for name, held in self._held.items() if name not in counting]
        self._next: int | None = None
        """Length of the mask of the step whose inputs lie ready, but for what is given anew."""
        by_name = {**self._held, **caches, MASK: self._mask}
        given = [*(by_name[port.name] for port in ports), self._start]
        self._graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._write(inputs)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            package([*given])  # libraries make what they need on a stream; the step may be repeated, it writes the same
        # Other threads may go on allocating memory meanwhile.
        with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
            self._mask.scatter_(1, self._start.expand(rows, 1), 1)  # the new token
            self._results = package([*given])
            for each in self._counted:
                each.add_(1)
        torch.cuda.current_stream(device).wait_stream(stream)

    def __call__(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """Run the step on inputs like those that it was captured with; the next call overwrites what it returns.

        A text that goes on by a token has 1 in its mask there, and positions that count on.
        """
        length = inputs[MASK].shape[1]
        if length == self._next:
            for name, held in self._given_anew:
                held.copy_(inputs[name])
        else:
            self._write(inputs)
        self._graph.replay()
        self._next = length + 1
        return self._results

    def _write(self, inputs: Mapping[str, Tensor]) -> None:
        """Put the inputs of any step where it reads them."""
        mask = inputs[MASK]
        length = mask.shape[1]
        if self._next != length + 1:  # else the same step as before
            self._mask[:, :length] = mask
            self._mask[:, length:] = 0
        self._start.fill_(length - 1)
        for name, held in self._held.items():
            held.copy_(inputs[name])
