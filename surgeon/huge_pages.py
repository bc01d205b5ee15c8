"""Weights on huge pages: a matrix that is read once per token is read through fewer page tables.

A decoder reads all its weights for every token, in order, and the processor translates the address of every page of them.
On pages of 2 MiB (x86, Linux) there are 512 times fewer translations than on 4 KiB, each of which costs twice on a virtual
machine: decoding with 0.5 GB of weights takes 5 to 10 percent less time (``benchmarks/generate.py``).  Runtimes allocate on
small pages unless the whole system is set otherwise, and have no option for it.  So the memory that they took is moved
afterwards, by ``madvise(MADV_COLLAPSE)`` of Linux 6.1 and later, its contents as they are.  That takes about as long as 500
steps save, whatever the size of the weights, hence it is done behind the 500th step: who decodes less waits for nothing, and
who decodes for hours pays for it once.  Where the kernel cannot or may not (``never`` in
``/sys/kernel/mm/transparent_hugepage/enabled``), nothing happens.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

Range = tuple[int, int]
"""First address and the one behind the last."""

SETTINGS = Path("/sys/kernel/mm/transparent_hugepage")
STEPS = 500
"""Uses before memory is moved."""
WORTH = 32 << 20
"""Bytes below which it stays: there are few translations."""
AT_ONCE = 32 << 20
"""Bytes per call of the kernel."""
MADV_COLLAPSE = 25


@cache
def page_size() -> int:
    """Bytes of a huge page; 0 where this system has none or forbids them."""
    if not sys.platform.startswith("linux"):
        return 0
    try:
        forbidden = "[never]" in (SETTINGS / "enabled").read_text()
        return 0 if forbidden else int((SETTINGS / "hpage_pmd_size").read_text())
    except (OSError, ValueError):  # a kernel without them, or a sandbox that does not show them
        return 0


class Memory:
    """What was allocated while something was loaded, moved to huge pages once it has been used often enough."""

    def __init__(self) -> None:
        self._ranges: list[Range] = []
        self._steps = 0
        self._thread: threading.Thread | None = None

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Note what is allocated in the context and still held at its end.

        Memory that other threads allocate meanwhile is noted with it: moving it harms nobody.
        """
        if not page_size():
            yield
            return
        before = _allocated()
        yield
        new = _without(_allocated(), before)
        self._ranges = new if sum(end - start for start, end in new) >= WORTH else []

    def step(self) -> None:
        """Count one use; from the ``STEPS``-th on the memory is moved, in a thread of its own."""
        self._steps += 1
        if self._steps == STEPS and self._ranges:
            self._thread = threading.Thread(target=self.move, name="huge pages", daemon=True)
            self._thread.start()

    def move(self) -> None:
        """Move now, as far as the memory is still held."""
        page, madvise = page_size(), ctypes.CDLL(None).madvise
        madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        gone = _without(self._ranges, _allocated())
        for start, end in _without(self._ranges, gone):
            start, end = -(-start // page) * page, end // page * page  # whole pages within
            for address in range(start, end, AT_ONCE):
                # Errors are no failures: memory that went back since, a page that nobody has touched, an older kernel.
                madvise(address, min(AT_ONCE, end - address), MADV_COLLAPSE)

    def wait(self) -> None:
        """Return when nothing is being moved any more."""
        if self._thread is not None:
            self._thread.join()


def _allocated() -> list[Range]:
    """Private writable memory of the process that no file backs, in order of addresses, but for stacks."""
    found: list[Range] = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, rights, _, _, inode, *name = line.split(maxsplit=5)
        if rights == "rw-p" and inode == "0" and not (name and name[0].startswith("[stack")):
            start, end = (int(address, 16) for address in addresses.split("-"))
            if found and found[-1][1] == start:
                found[-1] = (found[-1][0], end)
            else:
                found.append((start, end))
    return found


def _without(ranges: list[Range], others: list[Range]) -> list[Range]:
    """What of some ranges is in none of the others; both in order."""
    found = []
    for start, end in ranges:
        for other_start, other_end in others:
            if other_end <= start:
                continue
            if other_start >= end:
                break
            if start < other_start:
                found.append((start, other_start))
            start = other_end
        if start < end:
            found.append((start, end))
    return found
