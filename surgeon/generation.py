"""Generating text with a graph or artefact that has caches: the prompt in one run, then one run per token.

What is generated is what ``generate`` of the transformers library generates: positions count the tokens that the mask
holds, the scores of the last position are filtered in that library's order (temperature, top-k, top-p), a row that has
ended is filled with the padding token.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from surgeon.caches import PAST, PRESENT, has_caches, masked_positions
from surgeon.errors import GenerateError
from surgeon.graph import Graph, Port

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


@dataclass(frozen=True)
class Settings:
    """What a checkpoint says about generating with it.

    Attributes:
        eos_token_id: tokens that end a text.
        pad_token_id: what fills rows that have ended, None for the first token that ends a text.
        bos_token_id: token that starts a text.
    """

    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None
    bos_token_id: int | None = None

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Settings:
        """Read them from a generation or model configuration as plain data."""
        eos = data.get("eos_token_id")
        several = tuple(eos) if isinstance(eos, list | tuple) else () if eos is None else (eos,)
        return cls(several, data.get("pad_token_id"), data.get("bos_token_id"))

    def to_data(self) -> dict[str, Any]:
        """As plain data, which :meth:`of` reads."""
        return {
            "eos_token_id": list(self.eos_token_id),
            "pad_token_id": self.pad_token_id,
            "bos_token_id": self.bos_token_id,
        }


class Decoder(Protocol):
    """One text being generated: keeps the caches between its steps."""

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Run on the new tokens.

        Args:
            inputs: every input that is no cache, by name; ``input_ids`` [batch, new].

        Returns:
            Logits [batch, new, vocabulary].
        """


class GraphDecoder:
    """Steps of a graph in torch, or of anything that runs like one."""

    def __init__(
        self, run: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]], inputs: Sequence[Port], outputs: Sequence[Port]
    ) -> None:
        self._run = run
        self._pasts = [port for port in inputs if port.role == PAST]
        self._presents = [port.name for port in outputs if port.role == PRESENT]
        self._caches: dict[str, Tensor] = {}

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Run on the new tokens; see :class:`Decoder`."""
        ids = inputs["input_ids"]
        if not self._caches:
            self._caches = {port.name: empty_cache(port, ids) for port in self._pasts}
        with torch.no_grad():
            results = self._run({**inputs, **self._caches})
        pairs = zip(self._pasts, self._presents, strict=True)
        self._caches = {past.name: results[present] for past, present in pairs}
        return results["logits"]


def empty_cache(port: Port, ids: Tensor) -> Tensor:
    """A cache of no positions for the rows of ``ids``."""
    sizes = [size if isinstance(size, int) else 0 for size in port.shape]
    return torch.zeros([ids.shape[0], *sizes[1:]], dtype=port.dtype, device=ids.device)


def decoder_of(graph: Graph) -> Decoder:
    """A decoder that runs the graph in torch."""
    return GraphDecoder(lambda inputs: graph(**inputs), graph.inputs, graph.outputs)


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        do_sample: draw from the distribution instead of taking the most likely token.
        temperature: the logits are divided by it.
        top_k: only so many of the most likely tokens are drawn from; None for all.
        top_p: only the most likely tokens that together have this probability; None for all.
        seed: of the draws; None for torch's global generator.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    _chosen: Callable[[Tensor, Tensor], Tensor] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Refuse what cannot be.

        Raises:
            GenerateError: a number is out of range, or says something about draws where nothing is drawn.
        """
        if not self.do_sample and (self.temperature, self.top_k, self.top_p) != (1.0, None, None):
            raise GenerateError("temperature, top_k and top_p choose among tokens to draw from: give do_sample=True with them")
        if not self.temperature > 0:
            raise GenerateError(f"temperature must be positive, found {self.temperature}; greedy is do_sample=False")
        if self.top_k is not None and self.top_k < 1:
            raise GenerateError(f"top_k must be at least 1, found {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise GenerateError(f"top_p must be above 0 and at most 1, found {self.top_p}")
        object.__setattr__(self, "_chosen", self._make())

    def __call__(self, tokens: Tensor, logits: Tensor) -> Tensor:
        """The next token of every row.

        Args:
            tokens: so far, [batch, length].
            logits: of the last position, [batch, vocabulary].

        Returns:
            [batch] int64.
        """
        return self._chosen(tokens, logits.float())

    def _make(self) -> Callable[[Tensor, Tensor], Tensor]:
        if not self.do_sample:
            return lambda tokens, logits: logits.argmax(-1)
        from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

        warpers = LogitsProcessorList()
        if self.temperature != 1.0:
            warpers.append(TemperatureLogitsWarper(float(self.temperature)))
        if self.top_k is not None:
            warpers.append(TopKLogitsWarper(self.top_k))
        if self.top_p is not None and self.top_p < 1:
            warpers.append(TopPLogitsWarper(float(self.top_p)))
        generator = None if self.seed is None else torch.Generator().manual_seed(self.seed)

        def draw(tokens: Tensor, logits: Tensor) -> Tensor:
            scores: Tensor = warpers(tokens, logits)  # type: ignore[arg-type]  # any integer tensor will do
            probabilities = torch.softmax(scores, dim=-1)
            return torch.multinomial(probabilities.cpu(), 1, generator=generator)[:, 0].to(tokens.device)

        return draw


def generate(
    decoder: Decoder,
    ports: Sequence[Port],
    input_ids: Tensor,
    attention_mask: Tensor | None,
    *,
    max_new_tokens: int,
    sampling: Sampling,
    settings: Settings,
    streamer: Any = None,
) -> Tensor:
    """Continue every row of ``input_ids``.

    Args:
        decoder: fresh.
        ports: inputs of what the decoder runs.
        input_ids: [batch, length] int64; shorter rows are padded on the left.
        attention_mask: [batch, length], 0 where padded; None for no padding, or for what the padding token says where
            that is not one that ends a text.
        max_new_tokens: tokens to add at most.
        sampling: how tokens are chosen.
        settings: tokens that end a text, and what fills rows behind it.
        streamer: gets the prompt and every token as they come, as the library's streamers do.

    Returns:
        Prompt and continuation, [batch, length + at most max_new_tokens].

    Raises:
        GenerateError: there is nothing to continue, or the model cannot be continued.
    """
    names = {port.name for port in ports}
    _check(ports, input_ids, attention_mask, max_new_tokens)
    mask = _mask(input_ids, attention_mask, settings)
    if "attention_mask" not in names and not bool(mask.all()):
        raise GenerateError("the model takes no attention_mask, so rows cannot be padded: give one at a time")
    ends = torch.tensor(settings.eos_token_id, dtype=torch.int64, device=input_ids.device)
    fill = settings.pad_token_id if settings.pad_token_id is not None else next(iter(settings.eos_token_id), 0)
    tokens, new = input_ids, input_ids
    positions = masked_positions(mask)
    going = torch.ones(len(tokens), dtype=torch.bool, device=tokens.device)
    if streamer is not None:
        streamer.put(tokens.cpu())
    for _ in range(max_new_tokens):
        given = {"input_ids": new, "attention_mask": mask, "position_ids": positions}
        logits = decoder({name: value for name, value in given.items() if name in names})
        chosen = torch.where(going, sampling(tokens, logits[:, -1]), fill)
        new = chosen[:, None]
        tokens = torch.cat([tokens, new], 1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        positions = positions[:, -1:] + 1
        going &= ~torch.isin(chosen, ends)
        if streamer is not None:
            streamer.put(chosen.cpu())
        if not bool(going.any()):
            break
    if streamer is not None:
        streamer.end()
    return tokens


def _check(ports: Sequence[Port], ids: Tensor, mask: Tensor | None, max_new_tokens: int) -> None:
    if not has_caches(ports):
        raise GenerateError(
            "this model was traced without caches (task 'forward'), so it cannot generate; build it with task "
            "'text-generation' (task: text-generation under model: in a recipe)"
        )
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.dtype != torch.int64 or ids.numel() == 0:
        found = f"{list(ids.shape)} {ids.dtype}" if isinstance(ids, Tensor) else type(ids).__name__
        raise GenerateError(f"input_ids must be an int64 tensor [batch, length] of at least one token, found {found}")
    if mask is not None and mask.shape != ids.shape:
        raise GenerateError(f"attention_mask must have the shape {list(ids.shape)} of input_ids, found {list(mask.shape)}")
    if mask is not None and not bool(mask[:, -1].all()):
        raise GenerateError("a row ends in padding; what is continued must be padded on the left (padding_side='left')")
    if max_new_tokens < 1:
        raise GenerateError(f"max_new_tokens must be at least 1, found {max_new_tokens}")


def _mask(ids: Tensor, mask: Tensor | None, settings: Settings) -> Tensor:
    if mask is not None:
        return mask.to(torch.int64)
    pad = settings.pad_token_id
    if pad is not None and pad not in settings.eos_token_id and bool((ids == pad).any()):
        return (ids != pad).to(torch.int64)
    return torch.ones_like(ids)


# -- text ---------------------------------------------------------------------------------------------------------------


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer beside an artefact.

    Raises:
        GenerateError: there is none, or it cannot be read.
    """
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise GenerateError(f"{folder}: no tokenizer here; the model was not built from a checkpoint that has one")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise GenerateError(f"{folder}: its tokenizer cannot be read: {str(error).splitlines()[0]}") from error


def continue_text(
    model: Compiled,
    text: str,
    *,
    max_new_tokens: int,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    seed: int | None,
    stop: Sequence[str],
    write: Callable[[str], None],
) -> tuple[int, float]:
    """Continue one text and write prompt and continuation piece by piece.

    Args:
        model: with caches and a tokenizer.
        text: the prompt.
        max_new_tokens: tokens to add at most.
        temperature: None, with top_k and top_p None too, is greedy.
        top_k: see :class:`Sampling`.
        top_p: see :class:`Sampling`.
        seed: see :class:`Sampling`.
        stop: further tokens that end the text, as the vocabulary spells them.
        write: gets the pieces of text.

    Returns:
        Number of new tokens and seconds.

    Raises:
        GenerateError: the text is empty, or a token to stop at is none.
    """
    tokenizer = model.tokenizer
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    if not text or ids.numel() == 0:
        raise GenerateError("the prompt is empty; give at least one token to continue")
    ends = [*Settings.of(model.generation).eos_token_id, *(_single_token(tokenizer, word) for word in stop)]
    drawn = (temperature, top_k, top_p) != (None, None, None)
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
    return tokens.shape[1] - ids.shape[1], time.perf_counter() - start


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
