"""The vocabulary of a file (first form: none)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class Vocabulary:
    reason: str = "the source has no tokenizer"

    def write(self, writer: Any, size: int) -> None:
        writer.add_tokenizer_model("none")

    def checked(self, artifact: Any) -> dict[str, Any]:
        return {"model": "none", "reason": self.reason}


def vocabulary_of(graph: Any, size: int, *, wanted: str) -> Vocabulary:
    return Vocabulary()
