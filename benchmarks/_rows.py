"""Tables that are measured row by row: which rows a run is asked for, and what earlier runs found."""

from __future__ import annotations

import argparse
import json
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def arguments(description: str | None, of: str) -> argparse.ArgumentParser:
    """``--only PATTERN ...`` over names of ``of``, and ``--missing``."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=["*"], help=f"shell patterns over {of}")
    parser.add_argument("--missing", action="store_true", help="only rows that have no figures yet")
    return parser


def earlier(name: str) -> dict[str, Any]:
    """Rows of earlier runs by key, from a file in the folder of results, which is made where it is not there."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / name
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def write(name: str, page: str, versions: dict[str, str], models: dict[str, Any]) -> None:
    """Print a page of results and put it into the folder, with what it was made of as JSON beside it."""
    print(page)
    (RESULTS / f"{name}.md").write_text(page, encoding="utf-8")
    data = json.dumps({"versions": versions, "models": models}, indent=1)
    (RESULTS / f"{name}.json").write_text(data + "\n", encoding="utf-8")


def is_wanted(options: argparse.Namespace, name: str, known: bool) -> bool:
    """Whether a row is measured in this run; known says that it has figures."""
    return any(fnmatchcase(name, pattern) for pattern in options.only) and not (options.missing and known)
