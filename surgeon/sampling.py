"""How the next token is chosen, and what a checkpoint says about generating with it.

A checkpoint's generation configuration may change the scores before a token is taken: it suppresses tokens, forces the first
or the last one, penalises repetition.  These rules are applied by the library's own processors, in the library's order.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from surgeon.errors import GenerateError, SurgeonWarning

Processor = Callable[[Tensor, Tensor], Tensor]
"""Tokens so far [batch, length] and scores [batch, vocabulary] -> scores."""

RULES = (
    "repetition_penalty",
    "no_repeat_ngram_size",
    "bad_words_ids",
    "min_length",
    "min_new_tokens",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "suppress_tokens",
    "begin_suppress_tokens",
)
"""Fields of a generation configuration that change scores and are followed, in the order in which they do."""


@dataclass(frozen=True)
class Settings:
    """What a checkpoint says about generating with it.

    Attributes:
        eos_token_id: tokens that end a text.
        pad_token_id: what fills rows that have ended, None for the first token that ends a text.
        bos_token_id: token that starts a text.
        decoder_start_token_id: token that a decoder behind an encoder starts from.
        rules: what else changes the scores, by names of ``RULES``.
        table_length: tokens, prompt and new ones, for which the model's tables of positions have a row, None where it has
            no such table.
        trained_length: tokens for which its configuration says that it was made, where positions are computed.
    """

    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    decoder_start_token_id: int | None = None
    rules: Mapping[str, Any] = field(default_factory=dict)
    table_length: int | None = None
    trained_length: int | None = None

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Settings:
        """Read them from a generation or model configuration as plain data."""
        eos = data.get("eos_token_id")
        several = tuple(eos) if isinstance(eos, list | tuple) else () if eos is None else (eos,)
        rules = {name: data[name] for name in RULES if data.get(name) not in (None, [], ())}
        start = data.get("decoder_start_token_id")
        lengths = data.get("table_length"), data.get("trained_length")
        return cls(several, data.get("pad_token_id"), data.get("bos_token_id"), start, rules, *lengths)

    def to_data(self) -> dict[str, Any]:
        """As plain data, which :meth:`of` reads."""
        return {
            "eos_token_id": list(self.eos_token_id),
            "pad_token_id": self.pad_token_id,
            "bos_token_id": self.bos_token_id,
            "decoder_start_token_id": self.decoder_start_token_id,
            **self.rules,
            **{name: length for name in ("table_length", "trained_length") if (length := getattr(self, name)) is not None},
        }

    def check_length(self, tokens: int, *, what: str, advice: str) -> None:
        """Refuse what the tables of positions have no row for; warn of what the model was not made for.

        Args:
            tokens: that are run, cached and new ones.
            what: what has so many, for the message.
            advice: what to do.

        Raises:
            GenerateError: the tables end before.
        """
        if self.table_length is not None:
            if tokens > self.table_length:
                raise GenerateError(
                    f"{what} needs {tokens} positions, and the model's table of positions holds {self.table_length}: {advice}"
                )
        elif self.trained_length is not None and tokens > self.trained_length:
            # The same text at every call, so that Python says it once.
            warnings.warn(
                f"the text grows beyond the {self.trained_length} positions that the model's configuration says it was made "
                "for (max_position_embeddings); what it says behind them is often poor",
                SurgeonWarning,
                stacklevel=2,
            )

    def processor(self, length: int, max_new_tokens: int, padding: Tensor | None) -> Processor | None:
        """The rules as one function, or None where there are none.

        Args:
            length: tokens that a row starts with.
            max_new_tokens: tokens to add at most.
            padding: tokens on the left of every row that are none of its text, [batch]; None where nothing says so.
        """
        import transformers as tf

        def value(name: str) -> Any:
            return self.rules.get(name)

        found = tf.LogitsProcessorList()
        ends: Any = list(self.eos_token_id)
        if (penalty := value("repetition_penalty")) not in (None, 1.0):
            repeated = tf.RepetitionPenaltyLogitsProcessor(penalty)
            found.append(repeated if padding is None else _behind_padding(repeated, padding))
        if value("no_repeat_ngram_size"):
            found.append(tf.NoRepeatNGramLogitsProcessor(value("no_repeat_ngram_size")))
        if value("bad_words_ids"):
            found.append(tf.NoBadWordsLogitsProcessor(value("bad_words_ids"), ends or None))
        if value("min_length") and ends:
            found.append(tf.MinLengthLogitsProcessor(value("min_length"), ends))
        if value("min_new_tokens") and ends:
            found.append(tf.MinNewTokensLengthLogitsProcessor(length, value("min_new_tokens"), ends))
        if (first := value("forced_bos_token_id")) is not None:
            found.append(tf.ForcedBOSTokenLogitsProcessor(first))
        if (last := value("forced_eos_token_id")) is not None:
            found.append(tf.ForcedEOSTokenLogitsProcessor(length + max_new_tokens, last))
        if value("suppress_tokens"):
            found.append(tf.SuppressTokensLogitsProcessor(value("suppress_tokens")))
        if value("begin_suppress_tokens"):
            begin = length if length > 1 or first is None else length + 1
            found.append(tf.SuppressTokensAtBeginLogitsProcessor(value("begin_suppress_tokens"), begin))
        return found if found else None  # type: ignore[return-value]  # any integer tensor will do


def _behind_padding(rule: Processor, padding: Tensor) -> Processor:
    """A rule that asks only which tokens a row holds, made blind to the padding on the left of every row, [batch].

    The library's own rule takes the number of such tokens since transformers 5.23 and penalised them as text before.  Seeing
    the last token of the row in their place is the same in every version: it is text, and no token counts twice.
    """

    def apply(tokens: Tensor, scores: Tensor) -> Tensor:
        before = torch.arange(tokens.shape[1], device=tokens.device) < padding.unsqueeze(1)
        return rule(torch.where(before, tokens[:, -1:], tokens), scores)

    return apply


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
    _chosen: Processor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Refuse what cannot be.

        Raises:
            GenerateError: a number is out of range, or says something about draws where nothing is drawn.
        """
        if not self.do_sample and (self.temperature, self.top_k, self.top_p) != (1.0, None, None):
            raise GenerateError("temperature, top_k and top_p choose among tokens to draw from: give do_sample=True with them")
        if not self.temperature > 0:
            raise GenerateError(f"temperature must be positive, found {self.temperature}; leave it out to be greedy")
        if self.top_k is not None and self.top_k < 1:
            raise GenerateError(f"top_k must be at least 1, found {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise GenerateError(f"top_p must be above 0 and at most 1, found {self.top_p}")
        if self.seed is not None and not -(2**63) <= self.seed < 2**64:
            raise GenerateError(f"seed must fit 64 bits, found {self.seed}")
        object.__setattr__(self, "_chosen", self._make())

    def __call__(self, tokens: Tensor, logits: Tensor) -> Tensor:
        """The next token of every row.

        Args:
            tokens: so far, [batch, length].
            logits: of the last position, [batch, vocabulary].

        Returns:
            [batch] int64.
        """
        return self._chosen(tokens, logits)

    def _make(self) -> Processor:
        if not self.do_sample:
            return _most_likely
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
            scores: Tensor = warpers(tokens, logits.float())  # type: ignore[arg-type]  # any integer tensor will do
            probabilities = torch.softmax(scores, dim=-1)
            return torch.multinomial(probabilities.cpu(), 1, generator=generator)[:, 0].to(tokens.device)

        return draw


def _most_likely(tokens: Tensor, logits: Tensor) -> Tensor:
    """The largest of every row; NumPy's search on the CPU, which took a tenth of the time of torch's for one row."""
    if logits.device.type != "cpu" or logits.dtype != torch.float32:
        return logits.float().argmax(-1)
    return torch.from_numpy(logits.numpy(force=True).argmax(-1))
