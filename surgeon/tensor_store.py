"""Tensors on disk, each memory written once: what states of one model that follow each other have in common is not repeated.

What the source model holds is not written at all: it is there whenever the model is loaded.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from surgeon.graph_data import laid_out, layout

_SOURCE = "source"


class _Known(NamedTuple):
    """A memory that can be read again.

    Attributes:
        memory: it, without keeping it; as long as this lasts, no other memory has its address.
        place: ``FILE/NUMBER``, or ``source/NAME`` of a tensor of the source.
        bytes: its size.
    """

    memory: StorageWeakRef
    place: str
    bytes: int


class TensorStore:
    """Files in a folder.

    Attributes:
        folder: of the files; made by the first that is written.
    """

    def __init__(self, folder: Path, source: Mapping[str, Tensor]) -> None:
        """Args:
        folder: of the files.
        source: tensors that need no file, by name; they are not kept alive.
        """
        self.folder = folder
        self._known: dict[int, _Known] = {}
        self._waiting: dict[str, torch.UntypedStorage] = {}
        self._file = self._next_file()
        digest = hashlib.sha256()
        for name, tensor in source.items():
            self._add(tensor.untyped_storage(), f"{_SOURCE}/{name}")
            digest.update(f"{name} {layout(tensor)} {tensor.untyped_storage().nbytes()}\n".encode())
        self._source = digest.hexdigest()

    @property
    def source(self) -> str:
        """What has to be the same for places in the source to mean the same: how its tensors lie in memory."""
        return self._source

    # -- writing ------------------------------------------------------------------------------------------------

    def located(self, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
        """How to find tensors again, by name; what is new is on disk after :meth:`write`."""
        return {name: {"memory": self._place(tensor.untyped_storage()), **layout(tensor)} for name, tensor in tensors.items()}

    def write(self) -> None:
        """Write what is not on disk yet: it is there, also after a loss of power, when this returns."""
        waiting, self._waiting = self._waiting, {}
        name, self._file = self._file, self._next_file()
        if not waiting:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        flat = {place.rpartition("/")[2]: torch.empty(0, dtype=torch.uint8).set_(memory) for place, memory in waiting.items()}
        try:
            save_file(flat, self.folder / name)
            with (self.folder / name).open("rb") as written:
                os.fsync(written.fileno())
        except BaseException:
            self._forget({name})
            (self.folder / name).unlink(missing_ok=True)
            raise

    def keep_only(self, tables: Iterable[Mapping[str, Any]]) -> None:
        """Remove the files that none of these tables, from :meth:`located`, refers to."""
        named = {entry["memory"].partition("/")[0] for table in tables for entry in table.values()}
        gone = [key for key, known in self._known.items() if known.memory.expired()]  # type: ignore[no-untyped-call]  # of torch
        for key in gone:
            del self._known[key]
        for path in self.folder.glob("*.safetensors"):
            if path.name not in named:
                path.unlink(missing_ok=True)

    def rewrite_sparse(self, tensors: Iterable[Tensor]) -> None:
        """Take what lies in files of which these tensors need less than half for new, so that those files can go."""
        live: Counter[str] = Counter()
        for key in {tensor.untyped_storage()._cdata for tensor in tensors}:
            if key in self._known:
                live[self._known[key].place.partition("/")[0]] += self._known[key].bytes
        sizes = {path.name: path.stat().st_size for path in self.folder.glob("*.safetensors")}
        self._forget({name for name, size in sizes.items() if 2 * live[name] < size})

    def _place(self, memory: torch.UntypedStorage) -> str:
        known = self._known.get(memory._cdata)
        if known is None:
            known = self._add(memory, f"{self._file}/{len(self._waiting)}")
            self._waiting[known.place] = memory
        return known.place

    def _add(self, memory: torch.UntypedStorage, place: str) -> _Known:
        held = StorageWeakRef(memory)  # type: ignore[no-untyped-call]  # of torch
        return self._known.setdefault(memory._cdata, _Known(held, place, memory.nbytes()))

    def _forget(self, files: set[str]) -> None:
        self._known = {key: known for key, known in self._known.items() if known.place.partition("/")[0] not in files}

    @staticmethod
    def _next_file() -> str:
        return f"weights.{secrets.token_hex(4)}.safetensors"  # never a name that another build has in its records

    # -- reading ------------------------------------------------------------------------------------------------

    def read(self, tables: Iterable[Mapping[str, Any]], source: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """The tensors of several tables from :meth:`located`.

        Args:
            tables: by name, where each lies.
            source: the tensors of the source by name.

        Raises:
            OSError: a file is not there.
            ValueError: one is cut short or has other contents.
            KeyError: a tensor of the source is not there.
        """
        tables = list(tables)
        places = {entry["memory"] for table in tables for entry in table.values()}
        memory: dict[str, torch.UntypedStorage] = {}
        for name in {place.partition("/")[0] for place in places}:
            if name == _SOURCE:
                memory |= {f"{name}/{own}": source[own].untyped_storage() for own in _within(name, places)}
            else:
                memory |= {f"{name}/{number}": found for number, found in self._memories(name, _within(name, places))}
        for place, found in memory.items():
            self._add(found, place)
        return [{name: laid_out(memory[entry["memory"]], entry) for name, entry in table.items()} for table in tables]

    def _memories(self, name: str, numbers: list[str]) -> Iterable[tuple[str, torch.UntypedStorage]]:
        try:
            with safe_open(self.folder / name, framework="pt") as file:
                for number in numbers:
                    # a copy of its own: where a mapped file lies in memory could decide how a product is summed up
                    yield number, file.get_tensor(number).clone().untyped_storage()
        except OSError:
            raise
        except Exception as error:  # safetensors has a class of its own, which is no public name
            raise ValueError(f"{self.folder / name}: {error}") from error


def _within(name: str, places: Iterable[str]) -> list[str]:
    """The second parts of places in one file, or in the source."""
    return sorted(place.partition("/")[2] for place in places if place.partition("/")[0] == name)
