"""Memory on huge pages: which memory is meant, when it moves, and that what lies in it stays as it was."""

from __future__ import annotations

import mmap
import platform
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import surgeon
from surgeon import huge_pages
from surgeon.huge_pages import WORTH, Memory


def taken(memory: Memory, size: int) -> np.ndarray[Any, Any]:
    """Numbers from 0 on in memory as a runtime allocates it (NumPy asks for huge pages by itself)."""
    with memory.taken():
        buffer = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        values = np.frombuffer(buffer, dtype=np.int64)
        values[:] = np.arange(len(values))
    return values


def on_huge(array: np.ndarray[Any, Any]) -> int:
    """Bytes on huge pages in the mappings that hold an array."""
    start, end = array.ctypes.data, array.ctypes.data + array.nbytes
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            low, high = (int(address, 16) for address in first.split("-"))
            inside = low < end and start < high
        elif inside and first == "AnonHugePages:":
            found += int(line.split()[1]) << 10
    return found


def movable() -> bool:
    release = tuple(int(part) for part in platform.release().split("-")[0].split(".")[:2]) if huge_pages.page_size() else (0,)
    return release >= (6, 1)


needs_kernel = pytest.mark.skipif(not movable(), reason="needs Linux 6.1 with transparent huge pages")


def test_difference_of_ranges() -> None:
    generator = np.random.default_rng(0)
    for _ in range(200):
        cuts = [sorted(generator.choice(60, 8, replace=False).tolist()) for _ in range(2)]
        ranges, others = ([(cut[i], cut[i + 1]) for i in range(0, 8, 2)] for cut in cuts)
        found = huge_pages._without(ranges, others)
        held = [{n for start, end in some for n in range(start, end)} for some in (ranges, others, found)]
        assert held[2] == held[0] - held[1]
        assert found == sorted(found)
        assert all(start < end for start, end in found)


@needs_kernel
def test_memory_moves_and_keeps_its_contents() -> None:
    memory = Memory()
    values = taken(memory, 2 * WORTH)
    assert on_huge(values) == 0
    memory.move()
    assert on_huge(values) >= values.nbytes - 2 * huge_pages.page_size()
    assert np.array_equal(values, np.arange(len(values)))
    del values
    memory.move()  # of memory that went back


@needs_kernel
def test_memory_moves_after_many_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_pages, "STEPS", 3)
    memory = Memory()
    values = taken(memory, 2 * WORTH)
    for _ in range(2):
        memory.step()
    memory.wait()
    assert on_huge(values) == 0
    memory.step()
    memory.wait()
    assert on_huge(values) > 0


def test_little_memory_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_pages, "STEPS", 1)
    monkeypatch.setattr(Memory, "move", lambda self: pytest.fail("moved"))
    memory = Memory()
    values = taken(memory, WORTH // 4)
    memory.step()
    memory.wait()
    assert values[-1] == len(values) - 1


def test_systems_without_huge_pages_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_pages, "page_size", lambda: 0)
    memory = Memory()
    values = taken(memory, 2 * WORTH)
    memory.move()
    assert on_huge(values) == 0


def test_errors_while_loading_pass() -> None:
    with pytest.raises(ValueError, match="broken"), Memory().taken():
        raise ValueError("broken")


@needs_kernel
def test_weights_of_a_session_move(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Blocks(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = torch.nn.ModuleList(torch.nn.Linear(1024, 4096) for _ in range(2))
            self.down = torch.nn.ModuleList(torch.nn.Linear(4096, 1024) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for up, down in zip(self.up, self.down, strict=True):
                x = x + down(torch.relu(up(x)))
            return x

    torch.manual_seed(0)
    model, inputs = Blocks().eval(), {"x": torch.randn(2, 1024)}
    compiled = surgeon.compile(model, [], inputs=inputs, backend="onnxruntime", output=tmp_path / "it", progress=False)
    artifact = surgeon.load(compiled.artifact.folder).artifact
    monkeypatch.setattr(huge_pages, "STEPS", 2)

    def huge() -> int:
        smaps = Path("/proc/self/smaps").read_text().splitlines()
        return sum(int(line.split()[1]) << 10 for line in smaps if line.startswith("AnonHugePages:"))

    first, before = artifact.run(inputs), huge()
    artifact.run(inputs)
    artifact.memory.wait()
    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert huge() - before > weights // 2
    again = artifact.run(inputs)
    assert all(torch.equal(first[name], again[name]) for name in first)
