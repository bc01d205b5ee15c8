"""How far a rewritten model is from its source: relative error, cosine similarity, KL divergence and perplexity."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from surgeon.caches import DECODER_TOKENS, MASK, TOKENS, tokens_name
from surgeon.graph import Graph
from surgeon.observe import Batch

Outputs = Mapping[str, Tensor]

DECODER_MASK = "decoder_attention_mask"
"""Name of the input that says which of a decoder's tokens are no padding, where it is behind an encoder and takes one."""


@dataclass(frozen=True)
class Reading:
    """How a graph's outputs are read: what they predict, and which of their rows are padding.

    Attributes:
        predicted: name of the input whose next tokens ``logits`` predict, None where the graph is no language model.
        decoded: outputs with one row per token of a decoder behind an encoder.
        padding: the token that fills up that decoder's rows, None where the source names none.
    """

    predicted: str | None = None
    decoded: frozenset[str] = frozenset()
    padding: int | None = None

    @classmethod
    def of(cls, graph: Graph) -> Reading:
        """Find it out; runs the graph on its example."""
        predicted = predicted_tokens(graph)
        shapes = {port.name: port.shape[:2] for port in graph.inputs}
        tokens = shapes.get(DECODER_TOKENS)
        # Fixed sizes of encoder and decoder may be equal, and then only logits are known to be the decoder's.
        decoded = {port.name for port in graph.outputs if port.shape[:2] == tokens != shapes.get(MASK)}
        if predicted == DECODER_TOKENS:
            decoded.add("logits")
        return cls(predicted, frozenset(decoded), graph.source.generation.get("pad_token_id"))

    def mask(self, output: str, batch: Batch) -> Tensor | None:
        """The rows of an output that count, [batch, sequence] bool; None for all of them.

        A decoder's tokens come without a mask, unless the model takes one.  Where they are the encoder's text, its mask says
        what is padding; otherwise padding tokens do, from the end of a row on: many a decoder starts from that same token.
        """
        mask = batch.get(MASK)
        mask = mask.bool() if mask is not None and mask.dim() == 2 else None
        ids = batch.get(DECODER_TOKENS)
        if output not in self.decoded or ids is None:
            return mask
        own, text = batch.get(DECODER_MASK), batch.get(TOKENS)
        if own is not None and own.shape == ids.shape:
            return own.bool()
        if mask is not None and text is not None and mask.shape == ids.shape and torch.equal(text, ids):
            return mask
        if self.padding is None:
            return None
        valid = (ids != self.padding).flip(1).cumsum(1).flip(1) > 0  # some token here or behind
        valid[:, :1] = True
        return valid


@dataclass
class Quality:
    """Sums of divergences over batches; ``summary`` gives the figures.

    Attributes:
        reading: what the outputs predict: KL makes sense of next-token ``logits``, perplexity of a decoder's alone.  What the
            decoder of an encoder-decoder reads may be the encoder's text, and its perplexity is then that of a copy.
        real: the batches are real text, so that perplexity means something.
    """

    reading: Reading
    real: bool
    squared_error: dict[str, float] = field(default_factory=dict)
    squared_norm: dict[str, float] = field(default_factory=dict)
    cosine: float = 0.0
    vectors: int = 0
    kl: float = 0.0
    nll: float = 0.0
    nll_source: float = 0.0
    agree: int = 0
    tokens: int = 0
    targets: int = 0

    def add(self, source: Outputs, candidate: Outputs, batch: Batch) -> None:
        """Add one batch.

        Args:
            source: outputs of the source model.
            candidate: outputs of the rewritten model, same names and shapes.
            batch: the inputs; see :meth:`Reading.mask` for padding; ``input_ids`` are the targets of a decoder alone.
        """
        for name, expected in source.items():
            if not expected.is_floating_point():
                continue
            mask = self.reading.mask(name, batch)
            found, wanted = _valid(candidate[name], mask), _valid(expected, mask)
            self.squared_error[name] = self.squared_error.get(name, 0.0) + float((found - wanted).square().sum())
            self.squared_norm[name] = self.squared_norm.get(name, 0.0) + float(wanted.square().sum())
        if self.reading.predicted is not None:
            self._add_language_model(source["logits"], candidate["logits"], batch)
        else:
            pooled_output = embedding_output(source)
            if pooled_output is not None:
                mask = self.reading.mask(pooled_output, batch)
                pooled = [pool(outputs[pooled_output], mask) for outputs in (source, candidate)]
                similarity = torch.nn.functional.cosine_similarity(pooled[0], pooled[1], dim=-1)
                self.cosine += float(similarity.double().sum())
                self.vectors += similarity.numel()

    def _add_language_model(self, source: Tensor, candidate: Tensor, batch: Batch) -> None:
        mask = self.reading.mask("logits", batch)
        p, q = (torch.log_softmax(_valid(logits, mask), dim=-1) for logits in (source, candidate))
        self.kl += float((p.exp() * (p - q)).sum())
        self.agree += int((p.argmax(-1) == q.argmax(-1)).sum())
        self.tokens += p.shape[0]
        if self.reading.predicted != TOKENS:
            return
        ids = batch[TOKENS]
        valid = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
        predicts = valid[:, :-1] & valid[:, 1:]
        for logits, slot in ((source, "nll_source"), (candidate, "nll")):
            scores = torch.log_softmax(logits[:, :-1][predicts].float(), dim=-1)
            loss = -scores.gather(1, ids[:, 1:][predicts][:, None]).double().sum()
            setattr(self, slot, getattr(self, slot) + float(loss))
        self.targets += int(predicts.sum())

    def summary(self) -> dict[str, float]:
        """The figures: ``relative_error`` (largest over outputs, Frobenius), and where they make sense
        ``cosine_similarity``, ``kl`` (nats per token), ``top1_agreement``, ``perplexity``, ``perplexity_source``.
        """
        ratios = [
            math.sqrt(error / max(self.squared_norm[name], 1e-300)) for name, error in self.squared_error.items()
        ]
        figures = {"relative_error": max(ratios)} if ratios else {}
        if self.vectors:
            figures["cosine_similarity"] = self.cosine / self.vectors
        if self.tokens:
            figures["kl"] = self.kl / self.tokens
            figures["top1_agreement"] = self.agree / self.tokens
        if self.targets and self.real:
            figures["perplexity_source"] = math.exp(min(self.nll_source / self.targets, 700.0))
            figures["perplexity"] = math.exp(min(self.nll / self.targets, 700.0))
        return figures


def compare(
    source: Iterable[Outputs],
    candidate: Callable[..., Outputs],
    batches: Sequence[Batch],
    *,
    reading: Reading,
    real: bool,
) -> dict[str, float]:
    """Divergence of ``candidate`` from outputs of the source, recorded or made one by one; see ``Quality.summary``."""
    quality = Quality(reading, real)
    with torch.no_grad():
        for expected, batch in zip(source, batches, strict=True):
            quality.add(expected, candidate(**batch), batch)
    return quality.summary()


def predicted_tokens(graph: Graph) -> str | None:
    """Name of the input whose next tokens the graph predicts, by ``logits`` [batch, sequence, vocabulary] that do not see them.

    That is ``decoder_input_ids`` of an encoder-decoder, ``input_ids`` of a decoder alone, and None where nothing is predicted.
    Decided by running: the last token is changed, and no earlier position may notice.
    """
    tokens = tokens_name(graph.inputs)
    ids = graph.example.get(tokens)
    if all(port.name != "logits" for port in graph.outputs) or ids is None or ids.dim() != 2 or ids.shape[1] < 2:
        return None
    changed = ids.clone()
    changed[:, -1] = torch.where(ids[:, -1] == int(ids.max()), int(ids.min()), int(ids.max()))
    with torch.no_grad():
        before = graph(**graph.example)["logits"]
        after = graph(**{**graph.example, tokens: changed})["logits"]
    if before.dim() != 3 or before.shape[1] != ids.shape[1]:
        return None
    tolerance = 1e-3 * float(before.abs().max())
    return tokens if bool((before[:, :-1] - after[:, :-1]).abs().max() <= tolerance) else None


def embedding_output(outputs: Outputs) -> str | None:
    """The output that stands for the input as a whole: ``last_hidden_state`` where there is one, else the first float."""
    if "last_hidden_state" in outputs:
        return "last_hidden_state"
    return next((name for name, value in outputs.items() if value.is_floating_point() and value.dim() >= 2), None)


def pool(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over valid positions, [batch, sequence, hidden] -> [batch, hidden]; two-dimensional values pass unchanged."""
    hidden = hidden.float()
    if hidden.dim() == 2:
        return hidden
    if hidden.dim() > 3:
        return hidden.flatten(1)
    if mask is None or mask.shape != hidden.shape[:2]:
        return hidden.mean(1)
    weight = mask.to(hidden.dtype)[:, :, None]
    return (hidden * weight).sum(1) / weight.sum(1).clamp_min(1.0)


def _valid(value: Tensor, mask: Tensor | None) -> Tensor:
    """Rows of valid tokens in float32, [tokens, ...]."""
    if mask is not None and value.dim() >= 2 and value.shape[:2] == mask.shape:
        return value[mask].float()
    return (value.flatten(0, -2) if value.dim() > 2 else value).float()
