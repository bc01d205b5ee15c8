r"""The vocabulary of a file: tokens, how text is split into them, and which of them are special.

llama.cpp splits text in two steps as ``tokenizer.json`` does: patterns cut it into words, merges join their bytes.  Patterns
are part of llama.cpp and go by names; the name is found by the patterns that the tokenizer has, never by the model's.

    ``gpt2``     bytes spelled as characters, ranked merges           byte-level BPE
    ``llama``    pieces of text with scores, spaces as U+2581         BPE of SentencePiece, with bytes as a fallback
    ``none``     numbers alone

What was written is tried: llama.cpp and the tokenizer split the same samples, or the build ends.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgeon.errors import LowerError
from surgeon.graph import Graph
from surgeon.text import TOKENIZER_FILES

if TYPE_CHECKING:
    from surgeon.backends.gguf import GgufArtifact

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PATTERNS = {
    (_GPT2,): "gpt-2",
    ("digits", _GPT2): "smollm",
    (rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}",): "dbrx",
    (rf"{_WORDS}|\p{{N}}|{_REST}",): "qwen2",
    (_O200K,): "gpt-4o",
}
"""llama.cpp's name for each sequence of patterns; ``digits`` cuts digits apart."""
_WHOLE_WORDS = {"dbrx": "llama-bpe"}
"""The name of the same patterns where a word that is a token is not merged from its bytes (``ignore_merges``)."""
SAMPLES = (
    "def main(self):\n    return x[0]  # two spaces\n\n\ttab\n",
    "Hello, World! It's we're I'll they'd 'tis  a   b    c",
    "1234567890 3.14159 1,000,000 v2.0.1 0x1F",
    "naïve café Ünïcödé Ελληνικά русский 中文字符 日本語 한국어 😀🎉 \u200b…",
    "CamelCaseWord snake_case_word UPPER lower ()[]{}<>!@#$%^&*-_=+|\\/~`",
    "  leading and trailing  ",
    "\r\nwindows\r\nlines\n\n\n",
)
"""Texts that differ under every two of the patterns above."""


@dataclass
class Vocabulary:
    """What is written of a tokenizer.

    Attributes:
        model: ``gpt2``, ``llama`` or ``none``.
        reason: why it is ``none``.
        pre: llama.cpp's name of the patterns.
        tokens: every token by number.
        types: kind of each.
        merges: pairs in order.
        scores: of pieces.
        space: a space is put in front of a text.
        folder: where the tokenizer lies.
        missed: it is ``none`` although the source has a tokenizer, and one was asked for.
        notes: what a reader of the report should know.
    """

    model: str = "none"
    reason: str = ""
    pre: str = ""
    tokens: list[str] = field(default_factory=list)
    types: list[int] = field(default_factory=list)
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    space: bool = False
    folder: Path = field(default_factory=Path)
    missed: bool = False
    notes: list[str] = field(default_factory=list)

    def write(self, writer: Any) -> None:
        """Add the keys to a file."""
        import gguf

        writer.add_tokenizer_model(self.model)
        if self.model == "none":
            return
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.merges:
            writer.add_token_merges(self.merges)
        if self.scores:
            writer.add_token_scores(self.scores)
            writer.add_add_space_prefix(self.space)
        with _quiet("gguf.vocab"):  # it warns of templates for pairs of texts, which nothing here has
            gguf.SpecialVocab(self.folder, load_merges=False, n_vocab=len(self.tokens)).add_to_gguf(writer, quiet=True)

    def checked(self, artifact: GgufArtifact) -> dict[str, Any]:
        """Facts for the report, once llama.cpp has split the samples.

        Raises:
            LowerError: it splits one otherwise than the tokenizer.
        """
        facts: dict[str, Any] = {"model": self.model}
        facts |= {"pre": self.pre, "tokens": len(self.tokens)} if self.model != "none" else {"reason": self.reason}
        if self.notes:
            facts["notes"] = self.notes
        if self.model == "none" or artifact.unavailable:
            return facts
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer.json"))
        for text in SAMPLES:
            wanted = tokenizer.encode(text, add_special_tokens=False).ids
            found = artifact.runtime().tokenize(text, special=False)
            if found != wanted:
                pairs = enumerate(zip(found, wanted, strict=False))
                place = next((i for i, (one, other) in pairs if one != other), min(len(found), len(wanted)))
                words = [tokenizer.id_to_token(number) for number in wanted[place : place + 3]]
                raise LowerError(
                    f"llama.cpp (patterns {self.pre!r}) splits {text!r} otherwise than the tokenizer from token {place} on, "
                    f"where that has {words}: set tokenizer: none, which writes a file that is given numbers"
                )
        facts["samples"] = len(SAMPLES)
        return facts


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Only errors of a logger within the context."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def vocabulary_of(graph: Graph, size: int, *, wanted: str) -> Vocabulary:
    """The vocabulary of a graph's source.

    Args:
        graph: its source may have a tokenizer.
        size: tokens that the model has rows for.
        wanted: ``none`` for none.
    """
    if wanted == "none":
        return Vocabulary(reason="tokenizer: none was asked for")
    folder = Path(graph.source.path) if graph.source.path else None
    path = folder / "tokenizer.json" if folder is not None else None
    if folder is None or path is None or not path.is_file():
        return Vocabulary(reason="the source has no tokenizer.json", missed=folder is not None and _has_tokenizer(folder))
    data = json.loads(path.read_text(encoding="utf-8"))
    found = _read(data, size)
    if isinstance(found, str):
        return Vocabulary(reason=found, missed=True)
    found.folder = folder
    return found


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def _read(data: dict[str, Any], size: int) -> Vocabulary | str:
    """The vocabulary of a ``tokenizer.json``, or why llama.cpp does not split text like it."""
    model = data.get("model", {})
    if model.get("type") != "BPE" or not isinstance(model.get("vocab"), dict):
        return f"its tokenizer is {model.get('type')}, and BPE is what is written"
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            return f"its tokenizer has {option}, which llama.cpp has not"
    numbered = {number: token for token, number in model["vocab"].items()}
    added = {entry["id"]: entry for entry in data.get("added_tokens", ())}
    numbered |= {number: entry["content"] for number, entry in added.items()}
    if max(numbered) >= size:
        return f"its tokenizer has a token {max(numbered)}, and the model rows for {size}"
    tokens = [numbered.get(number, f"[PAD{number}]") for number in range(size)]
    pairs = [pair if isinstance(pair, list) else pair.split(" ", 1) for pair in model.get("merges", ())]
    if model.get("byte_fallback"):
        return _pieces(data, tokens, numbered, added, pairs)
    return _bytes(data, tokens, numbered, added, pairs)


def _bytes(
    data: dict[str, Any], tokens: list[str], numbered: dict[int, str], added: dict[int, Any], pairs: list[list[str]]
) -> Vocabulary | str:
    """Byte-level BPE."""
    steps = _listed(data.get("pre_tokenizer"), "pretokenizers")
    patterns = _patterns(steps)
    if patterns is None:
        cut = json.dumps(data.get("pre_tokenizer"))[:300]
        return f"its tokenizer cuts words by {cut}, which is none of llama.cpp's ways that are known here"
    normalizers = [step.get("type") for step in _listed(data.get("normalizer"), "normalizers")]
    if set(normalizers) - {"NFC"}:
        return f"its tokenizer changes text first ({', '.join(map(str, normalizers))}), which llama.cpp does not"
    pre = _PATTERNS[patterns]
    if data["model"].get("ignore_merges"):
        if pre not in _WHOLE_WORDS:
            return f"its tokenizer takes whole words without merging (ignore_merges), which llama.cpp does not under {pre!r}"
        pre = _WHOLE_WORDS[pre]
    notes = ["llama.cpp does not normalise text (NFC), so that text in another form is split otherwise"] if normalizers else []
    types = _types(tokens, numbered, added)
    return Vocabulary("gpt2", "", pre, tokens, types, [" ".join(pair) for pair in pairs], notes=notes)


def _patterns(steps: list[dict[str, Any]]) -> tuple[str, ...] | None:
    """The sequence of patterns of a byte-level tokenizer, None where it is none that llama.cpp has."""
    found: list[str] = []
    for step in steps:
        kind = step.get("type")
        pattern = step.get("pattern", {}).get("Regex")
        if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert") and pattern:
            found.append(pattern)
        elif kind == "Digits" and step.get("individual_digits"):
            found.append("digits")
        elif kind == "ByteLevel" and not step.get("add_prefix_space"):
            found += [_GPT2] if step.get("use_regex", True) else []
        else:
            return None
    if not steps or steps[-1].get("type") != "ByteLevel":
        return None
    return tuple(found) if tuple(found) in _PATTERNS else None


def _pieces(
    data: dict[str, Any], tokens: list[str], numbered: dict[int, str], added: dict[int, Any], pairs: list[list[str]]
) -> Vocabulary | str:
    """BPE of SentencePiece: a piece's score is the rank of the first merge that makes it, from above."""
    normalizers = _listed(data.get("normalizer"), "normalizers")
    steps = _listed(data.get("pre_tokenizer"), "pretokenizers")
    space, spelled = False, False
    for step in (*normalizers, *steps):
        kind = step.get("type")
        if kind == "Prepend" and step.get("prepend") == "▁":
            space = True
        elif kind == "Replace" and step.get("pattern") == {"String": " "} and step.get("content") == "▁":
            spelled = True
        elif kind == "Metaspace" and step.get("replacement") == "▁" and not step.get("split", True):
            spelled = True
            space = step.get("prepend_scheme") in ("first", "always")
        else:
            return f"its tokenizer changes text by {json.dumps(step)[:200]}, which llama.cpp does not"
    if not spelled:
        return "its tokenizer does not spell spaces as U+2581, as those of SentencePiece do"
    rank: dict[str, int] = {}
    for place, (left, right) in enumerate(pairs):
        rank.setdefault(left + right, place)
    least = -float(len(pairs) + 1)
    scores = [-float(rank[token]) if token in rank else least for token in tokens]
    types = _types(tokens, numbered, added, unknown=data["model"].get("unk_token"), fallback=True)
    return Vocabulary("llama", "", "default", tokens, types, scores=scores, space=space)


def _types(
    tokens: list[str], numbered: dict[int, str], added: dict[int, Any], *, unknown: str | None = None, fallback: bool = False
) -> list[int]:
    """Kinds of the tokens, as numbers of ``gguf.TokenType``."""
    from gguf import TokenType

    found = []
    for number, token in enumerate(tokens):
        if number not in numbered:
            kind = TokenType.UNUSED
        elif unknown is not None and token == unknown:
            kind = TokenType.UNKNOWN
        elif number in added:
            kind = TokenType.CONTROL if added[number].get("special") else TokenType.USER_DEFINED
        elif fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            kind = TokenType.BYTE
        else:
            kind = TokenType.NORMAL
        found.append(int(kind))
    return found


def _listed(step: Any, key: str) -> list[dict[str, Any]]:
    """A step of a tokenizer, or the steps of a sequence of them."""
    if not isinstance(step, dict):
        return []
    return [inner for each in step.get(key, ()) for inner in _listed(each, key)] if step.get("type") == "Sequence" else [step]
