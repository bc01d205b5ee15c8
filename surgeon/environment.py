"""What a result was made with: versions of libraries, and the processor."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path


def installed_version() -> str:
    """Version of surgeon."""
    return version_of("surgeon") or "(a checkout that is not installed)"


def version_of(distribution: str) -> str | None:
    """Version of an installed distribution, None where it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions_of(*distributions: str) -> dict[str, str]:
    """Versions of those that are installed."""
    return {name: version for name in distributions if (version := version_of(name)) is not None}


def processor() -> str:
    """Name of the processor's model."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()
