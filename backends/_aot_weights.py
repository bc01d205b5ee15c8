"""The weights of a package, written into its file once.

torch puts them together in memory, writes them behind the library that it compiled, reads that library, and copies it into the
package.  Here it compiles the library for no weights, and they follow in the package, where it expects them.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch
from zipfile import ZipFile, ZipInfo

import torch
from torch import Tensor

_CHUNK = 1 << 25
"""Bytes of weights that are copied from a device and written at a time."""
_PAGE = 1 << 14
"""Weights in a library start at a multiple of so many bytes: the largest page of memory that torch provides for."""
_NUMBER = struct.Struct("q")


@dataclass
class Apart:
    """Weights that the library was compiled without.

    Attributes:
        least: bytes from which on they are kept apart.
        storages: what is written, one flat tensor of bytes per weight, in the library's order.
        align: each is filled up to a multiple of so many bytes.
    """

    least: int
    storages: list[Tensor] = field(default_factory=list)
    align: int = 1

    def taken(self, tensors: list[Tensor]) -> bool:
        """Whether these weights are kept apart: a package has them once, in memory that can be read, and they are large."""
        if self.storages or sys.platform == "win32" or any(tensor.is_mkldnn for tensor in tensors):
            return False
        if sum(tensor.untyped_storage().nbytes() for tensor in tensors) < self.least:
            return False
        from torch._inductor.utils import ALIGN_BYTES

        self.align = 1 if all(tensor.is_cuda for tensor in tensors) else ALIGN_BYTES  # as torch does
        self.storages = [
            torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
            for tensor in tensors
            if tensor.numel()
        ]
        return True

    def _filling(self, storage: Tensor) -> int:
        return -storage.numel() % self.align

    @property
    def nbytes(self) -> int:
        """Bytes that are written."""
        return sum(storage.numel() + self._filling(storage) for storage in self.storages)

    def _chunks(self) -> Iterator[memoryview]:
        for storage in self.storages:
            for start in range(0, storage.numel(), _CHUNK):
                yield storage[start : start + _CHUNK].cpu().numpy().data
            yield memoryview(bytes(self._filling(storage)))

    def chunks(self) -> Iterator[memoryview]:
        """The bytes; the next ones are copied from the device while those before are used."""
        chunks = self._chunks()
        with ThreadPoolExecutor(1) as ahead:
            following = ahead.submit(next, chunks, None)
            while (chunk := following.result()) is not None:
                following = ahead.submit(next, chunks, None)
                yield chunk

    def fit(self, package: Path) -> bool:
        """Whether a package that was compiled without weights has one library that expects them behind its end."""
        with ZipFile(package) as source:
            libraries = (source.read(name) for name in source.namelist() if name.endswith(".so"))
            return sum(_with_room(library, self.nbytes) is not None for library in libraries) == 1

    def write(self, package: Path, target: Path) -> None:
        """Copy a package, with the weights where its library expects them.

        Args:
            package: compiled without weights; they :meth:`fit` it.
            target: written.
        """
        with ZipFile(package) as source, ZipFile(target, "w") as complete:
            for name in source.namelist():
                data = source.read(name)
                made = _with_room(data, self.nbytes) if name.endswith(".so") else None
                entry = ZipInfo(name)
                entry.file_size = len(data) + (self.nbytes if made is not None else 0)  # decides how its size is noted
                with complete.open(entry, "w") as stream:
                    if made is None:
                        stream.write(data)
                        continue
                    stream.write(made)
                    for chunk in self.chunks():
                        stream.write(chunk)
                    stream.write(data[-_NUMBER.size :])


_APART: ContextVar[Apart | None] = ContextVar("weights of the package that is compiled", default=None)


@contextmanager
def weights_apart(least: int) -> Iterator[Apart]:
    """Let a package be compiled without its weights.

    Args:
        least: bytes of weights from which on that is done.

    Yields:
        What has been kept apart once the package is compiled; without storages nothing was, and the package is complete.
    """
    from torch._inductor import config
    from torch._inductor.codecache import AotCodeCompiler

    before = AotCodeCompiler.compile
    apart = Apart(least)

    def without_weights(graph: Any, *arguments: Any, **named: Any) -> Any:
        current = _APART.get()
        value = graph.get_original_value_of_constant
        tensors = [value(name) for name in graph.constants if name not in graph.folded_constants]
        if current is None or not current.taken(tensors):
            return before(graph, *arguments, **named)
        with (
            patch.object(graph, "get_original_value_of_constant", lambda name: value(name).new_empty(0)),
            config.patch({"aot_inductor.force_mmap_weights": True}),  # read at the end of the library, not linked into it
        ):
            return before(graph, *arguments, **named)

    token = _APART.set(apart)
    try:
        with patch.object(AotCodeCompiler, "compile", without_weights):
            yield apart
    finally:
        _APART.reset(token)


def _with_room(library: bytes, count: int) -> bytes | None:
    """A library that was compiled for no weights, up to where ``count`` bytes of them start; None where it is another one.

    Such a library ends with a random number, which stands in its data again, after the bytes from the weights on to its end.
    """
    number = library[-_NUMBER.size :]
    head = library[: -_NUMBER.size]
    noted = _NUMBER.pack(_NUMBER.size) + number
    if len(head) % _PAGE or head.count(noted) != 1:
        return None
    return head.replace(noted, _NUMBER.pack(count + _NUMBER.size) + number)
