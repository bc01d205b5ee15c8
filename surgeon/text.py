"""Text in and out: the tokenizer beside an artefact, and continuing a prompt piece by piece."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from surgeon.errors import GenerateError
from surgeon.generation import require_caches
from surgeon.halves import has_halves
from surgeon.sampling import Settings

if TYPE_CHECKING:
    from surgeon.compiled import Compiled

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
)
"""Files of a checkpoint that make up its tokenizer."""


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer beside an artefact.

    Raises:
        GenerateError: there is none, or it cannot be read.
    """
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise GenerateError(
            f"{folder}: no tokenizer here; one is copied beside artefacts that generate text, where the "
            "checkpoint that they were built from has one"
        )
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise GenerateError(f"{folder}: its tokenizer cannot be read: {str(error).splitlines()[0]}") from error


def continue_text(
    model: Compiled,
    text: str,
    *,
    max_new_tokens: int | None,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    seed: int | None,
    stop: Sequence[str],
    write: Callable[[str], None],
) -> tuple[int, float]:
    """Continue one text and write prompt and continuation piece by piece; of an encoder-decoder what its decoder says.

    Args:
        model: with caches and a tokenizer.
        text: the prompt.
        max_new_tokens: tokens to add at most; None for 128, or as many as the model has positions for.
        temperature: None, with top_k and top_p None too, is greedy.
        top_k: see :class:`Sampling`.
        top_p: see :class:`Sampling`.
        seed: see :class:`Sampling`.
        stop: further tokens that end the text, as the vocabulary spells them.
        write: gets the pieces of text.

    Returns:
        Number of new tokens and seconds.

    Raises:
        GenerateError: the text is empty or not UTF-8, a token to stop at is none, or there is a seed and nothing to draw.
    """
    drawn = (temperature, top_k, top_p) != (None, None, None)
    if seed is not None and not drawn:
        raise GenerateError(f"seed {seed}: nothing is drawn; give temperature, top_k or top_p too, or leave the seed out")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # what is no UTF-8 reaches us as surrogates
        before = text[: error.start][-20:]
        raise GenerateError(f"the prompt is not UTF-8 text at character {error.start}, behind {before!r}") from error
    require_caches(model.ports)
    tokenizer = model.tokenizer
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    if not text or ids.numel() == 0:
        raise GenerateError("the prompt is empty; give at least one token to continue")
    settings = Settings.of(model.generation)
    begun = 1 if has_halves(model.ports) else ids.shape[1]  # behind an encoder, a start token
    if max_new_tokens is None:
        known = settings.table_length
        max_new_tokens = 128 if known is None else max(1, min(128, known - begun + 1))  # the last one is not read
    ends = [*settings.eos_token_id, *(_single_token(tokenizer, word) for word in stop)]
    start = time.perf_counter()
    tokens = model.generate(
        ids,
        max_new_tokens=max_new_tokens,
        do_sample=drawn,
        temperature=1.0 if temperature is None else temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        eos_token_id=ends,
        streamer=_writer(tokenizer, write),
    )
    return tokens.shape[1] - begun, time.perf_counter() - start


def read_text(stream: TextIO) -> str:
    """A prompt from standard input.

    Raises:
        GenerateError: it is not UTF-8, or there is no standard input.
    """
    try:
        return stream.read()
    except UnicodeDecodeError as error:
        raise GenerateError(f"the prompt is not UTF-8 text: {error}") from error


def _single_token(tokenizer: Any, word: str) -> int:
    number = tokenizer.convert_tokens_to_ids(word)
    if number is None or tokenizer.convert_ids_to_tokens(number) != word:
        pieces = tokenizer.encode(word, add_special_tokens=False)
        if len(pieces) != 1:
            spelled = tokenizer.convert_ids_to_tokens(pieces)
            raise GenerateError(f"stop: {word!r} is {len(pieces)} tokens ({spelled}), needed one")
        number = pieces[0]
    return int(number)


def _writer(tokenizer: Any, write: Callable[[str], None]) -> Any:
    """The library's streamer, which holds back characters that are not complete yet, writing where we say."""
    from transformers import TextStreamer

    class Writer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            write(text)

    return Writer(tokenizer, skip_special_tokens=True)
