"""What TensorRT finds out once: timings of kernels (TensorRT, while building), compiled kernels (RTX, while running).

Entries are bytes of the library's own making, which it checks itself before it uses them; one that it rejects is replaced.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path


def default_folder() -> Path:
    """The user's cache folder (``XDG_CACHE_HOME``, else ``~/.cache``) and in it ``surgeon/tensorrt``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "surgeon" / "tensorrt"


class Entry:
    """One file of a cache folder.

    Attributes:
        path: the file.
        size: bytes last read or written, by which a cache that grew is told from one that did not.
    """

    def __init__(self, folder: Path | None, *key: str) -> None:
        """Name an entry.

        Args:
            folder: the cache folder; None takes :func:`default_folder`.
            key: what the entry depends on; any text.
        """
        name = "-".join(re.sub(r"[^\w.]+", "_", part) for part in key)
        self.path = (folder or default_folder()) / f"{name}.bin"
        self.size = 0

    def read(self) -> bytes:
        """What is kept; nothing yet is ``b""``."""
        with contextlib.suppress(OSError):
            content = self.path.read_bytes()
            self.size = len(content)
            return content
        return b""

    def write(self, serialize: Callable[[], bytes | None]) -> bool:
        """Keep what the library holds now; True where it was written.

        It is only a cache: a folder that cannot be written, or a library that gives nothing, leaves things as they were.
        The file appears whole or not at all, because two builds may end at the same time.
        """
        content = bytes(serialize() or b"")
        if not content or len(content) == self.size:
            return False
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle, scratch = tempfile.mkstemp(dir=self.path.parent, suffix=".part")
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            Path(scratch).replace(self.path)
        except OSError:
            return False
        self.size = len(content)
        return True
