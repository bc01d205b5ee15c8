"""Progress on long work: bars on a terminal, nothing elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress

T = TypeVar("T")


class Progress:
    """Bars and spinners on standard error; silent where that is not a terminal or ``enabled`` is False."""

    def __init__(self, enabled: bool = True) -> None:
        self._bars: RichProgress | None = None
        if enabled and sys.stderr.isatty():
            self._bars = RichProgress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                console=Console(stderr=True),
                transient=True,
            )

    def __enter__(self) -> Progress:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    @contextmanager
    def step(self, description: str) -> Iterator[None]:
        """Show a spinner with the elapsed time while the body runs."""
        if self._bars is None:
            yield
            return
        task = self._bars.add_task(description, total=None)
        try:
            yield
        finally:
            self._bars.remove_task(task)

    def track(self, items: Iterable[T], description: str, total: int, done: int = 0) -> Iterator[T]:
        """Yield the items, moving a bar of ``total`` steps, of which some may be done."""
        if self._bars is None:
            yield from items
            return
        task = self._bars.add_task(description, total=total, completed=done)
        try:
            for item in items:
                yield item
                self._bars.advance(task)
        finally:
            self._bars.remove_task(task)
