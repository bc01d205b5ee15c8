"""Generating text with a graph or artefact that has caches: the prompt in one run, then one run per token.

What is generated is what ``generate`` of the transformers library generates: positions count the tokens that the mask
holds, the scores of the last position are changed and filtered in that library's order, a row that has ended is filled
with the padding token.  An encoder is run once; its decoder continues from a start token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from surgeon.caches import CROSS, DECODER_TOKENS, PAST, PRESENT, TOKENS, has_caches, masked_positions
from surgeon.errors import GenerateError
from surgeon.graph import Graph, Port
from surgeon.halves import halves, has_halves
from surgeon.sampling import Sampling, Settings

if TYPE_CHECKING:
    pass

Array = Tensor | np.ndarray[Any, Any]
"""A tensor of torch, or an array of NumPy in the host's memory."""


class Decoder(Protocol):
    """One text being generated: keeps the caches between its steps.

    Attributes:
        on_host: tokens and what goes with them are arrays of NumPy, and so are the logits; else all are tensors of torch.
            A run of a small model takes 3 ms and leaves nothing of Python in the processor's caches: each operation of torch
            on a few numbers then costs some 10 microseconds, one of NumPy a tenth of that.
    """

    on_host: bool

    @property
    def device(self) -> torch.device | None:
        """Where it wants tensors, and returns the logits; None where that is wherever its inputs are."""

    def __call__(self, inputs: Mapping[str, Array]) -> Array:
        """Run on the new tokens.

        Args:
            inputs: every input that is no cache, by name; the new tokens [batch, new].  Those of an encoder are tensors, the
                same at every step, and read at the first.

        Returns:
            Logits [batch, new, vocabulary], which the next step may overwrite.
        """


class GraphDecoder:
    """Steps of a graph in torch, or of anything that runs like one."""

    on_host = False

    def __init__(
        self, run: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]], inputs: Sequence[Port], outputs: Sequence[Port],
        device: torch.device | None = None,
    ) -> None:  # fmt: skip
        """Args:
        run: runs it.
        inputs: its ports.
        outputs: likewise.
        device: see :class:`Decoder`.
        """
        self._run = run
        self.device: torch.device | None = device
        self._pasts = [port for port in inputs if port.role == PAST]
        self._presents = [port.name for port in outputs if port.role == PRESENT]
        self._caches: dict[str, Tensor] = {}

    def __call__(self, inputs: Mapping[str, Any]) -> Tensor:
        """Run on the new tokens; see :class:`Decoder`."""
        if not self._caches:
            rows = next(iter(inputs.values()))
            self._caches = {port.name: empty_cache(port, len(rows), rows.device) for port in self._pasts}
        with torch.no_grad():
            results = self._run({**inputs, **self._caches})
        pairs = zip(self._pasts, self._presents, strict=True)
        self._caches = {past.name: results[present] for past, present in pairs}
        return results["logits"]


class ConditionalDecoder:
    """Steps of a decoder behind an encoder, which is run at the first of them."""

    def __init__(
        self,
        encode: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]],
        decoder: Decoder,
        encoder_inputs: Sequence[Port],
        decoder_inputs: Sequence[Port],
    ) -> None:
        """Args:
        encode: from the encoder's inputs to keys and values of the cross-attention by name, as far as the decoder does
            not get them in another way.
        decoder: the decoder's half.
        encoder_inputs: of the encoder's half.
        decoder_inputs: of the decoder's half.
        """
        self._encode, self._decoder = encode, decoder
        self.on_host, self.device = decoder.on_host, decoder.device
        self._first = [port.name for port in encoder_inputs]
        self._every = [port.name for port in decoder_inputs if port.role not in (PAST, CROSS)]
        self._fed: dict[str, Any] = {}

    def __call__(self, inputs: Mapping[str, Any]) -> Array:
        """Run on the new tokens; see :class:`Decoder`."""
        if not self._fed:
            crossing = self._encode({name: inputs[name] for name in self._first if name in inputs})
            fed = {name: inputs[name] for name in self._every if name in inputs}
            self._fed = {name: _own(value, self.on_host and isinstance(value, Tensor)) for name, value in fed.items()}
            self._fed.update(crossing)
        self._fed[DECODER_TOKENS] = inputs[DECODER_TOKENS]
        return self._decoder(self._fed)


def empty_cache(port: Port, rows: int, device: torch.device | str) -> Tensor:
    """A cache of no positions for as many rows."""
    sizes = [size if isinstance(size, int) else 0 for size in port.shape]
    return torch.zeros([rows, *sizes[1:]], dtype=port.dtype, device=device)


def decoder_of(graph: Graph) -> Decoder:
    """A decoder that runs the graph in torch."""
    if not has_halves(graph.inputs):
        return GraphDecoder(lambda inputs: graph(**inputs), graph.inputs, graph.outputs)
    encoder, decoder = halves(graph)
    crossing = [port.name for port in decoder.inputs if port.role == CROSS]

    def encode(inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        with torch.no_grad():
            results = encoder(**inputs)
        return {name: results[name] for name in crossing}

    steps = GraphDecoder(lambda inputs: decoder(**inputs), decoder.inputs, decoder.outputs)
    return ConditionalDecoder(encode, steps, encoder.inputs, decoder.inputs)


def require_caches(ports: Sequence[Port]) -> None:
    """Refuse a model that cannot generate.

    Raises:
        GenerateError: it was traced without caches.
    """
    if not has_caches(ports):
        raise GenerateError(
            "this model was traced without caches (task 'forward'), so it cannot generate; build it with task "
            "'text-generation' (task: text-generation under model: in a recipe)"
        )


def generate(
    decoder: Decoder,
    ports: Sequence[Port],
    inputs: Mapping[str, Tensor],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    settings: Settings,
    streamer: Any = None,
) -> Tensor:
    """Continue every row of ``input_ids``, or of what a decoder behind an encoder starts from.

    Args:
        decoder: fresh.
        ports: inputs of what the decoder runs.
        inputs: by name.  A causal model: ``input_ids`` [batch, length] int64, shorter rows padded on the left, and perhaps
            ``attention_mask`` [batch, length], 0 where padded; without it there is no padding, or what the padding token says
            where that is not one that ends a text.  An encoder-decoder: the encoder's inputs, where a mask means the same,
            and perhaps ``decoder_input_ids`` [batch, length] to continue from.
        max_new_tokens: tokens to add at most.
        sampling: how tokens are chosen.
        settings: tokens that start and end a text, what fills rows behind it, and further rules.
        streamer: gets the first tokens and every other one as they come, as the library's streamers do.

    Returns:
        First tokens and continuation, [batch, length + at most max_new_tokens].

    Raises:
        GenerateError: there is nothing to continue, or the model cannot be continued, or not so far.
    """
    require_caches(ports)
    if max_new_tokens < 1:
        raise GenerateError(f"max_new_tokens must be at least 1, found {max_new_tokens}")
    given_on = next((value.device for value in inputs.values() if isinstance(value, Tensor)), torch.device("cpu"))
    if decoder.device is not None:  # one token at a time would be carried there and back
        moved = {name: value.to(decoder.device) for name, value in inputs.items() if isinstance(value, Tensor)}
        inputs = {**inputs, **moved}
    if has_halves(ports):
        tokens, step, padding = _conditional(decoder, ports, inputs, settings, max_new_tokens)
    else:
        tokens, step, padding = _causal(decoder, ports, inputs, settings, max_new_tokens)
    rows, length = tokens.shape
    rules = settings.processor(length, max_new_tokens, padding)
    fill = settings.pad_token_id if settings.pad_token_id is not None else next(iter(settings.eos_token_id), 0)
    # What follows is arrays where the decoder takes them, else tensors, and reads the same for both.
    on_host = decoder.on_host
    text = torch.nn.functional.pad(tokens.cpu() if on_host else tokens, (0, max_new_tokens))
    written, going = (_own(value, on_host) for value in (text, text.new_ones(rows, dtype=torch.bool)))
    most_likely = on_host and rules is None and not sampling.do_sample

    def choose(scores: Any, end: int) -> Any:
        """The next token [batch] by the scores [batch, vocabulary] behind ``end`` positions."""
        found, before = torch.from_numpy(scores) if on_host else scores, text[:, :end]
        return _own(sampling(before, found if rules is None else rules(before, found.float())), on_host)

    new, end = _own(tokens, on_host), length
    pieces: list[Tensor] = []
    if streamer is not None:
        streamer.put(tokens.cpu())
    while end < length + max_new_tokens:
        scores = step(new)[:, -1]
        chosen = scores.argmax(-1) if most_likely else choose(scores, end)
        if settings.eos_token_id:
            chosen[~going] = fill
            for last in settings.eos_token_id:
                going &= chosen != last
        written[:, end] = chosen
        if streamer is not None:
            pieces = pieces or list(text[:, end : end + AHEAD].unbind(1))[::-1]
            piece = pieces.pop()
            streamer.put(piece if on_host else piece.cpu())
        new, end = chosen[:, None], end + 1
        if settings.eos_token_id and not going.any():
            break
    if streamer is not None:
        streamer.end()
    return text[:, :end].contiguous().to(given_on)


def _own(value: Tensor, on_host: bool) -> Any:
    """A tensor as the decoder takes it."""
    return value.numpy(force=True) if on_host else value


AHEAD = 64
"""Tokens of which the tensors that a streamer gets are made at once, before they are known."""

_Start = tuple[Tensor, Callable[[Any], Any], Tensor | None]
"""Tokens to start from, logits of new tokens (as the decoder takes them), and how many of the first tokens are padding."""


def _causal(
    decoder: Decoder, ports: Sequence[Port], inputs: Mapping[str, Tensor], settings: Settings, more: int
) -> _Start:
    """The prompt, and steps that lengthen its mask and count its positions."""
    names = {port.name for port in ports}
    unknown = sorted(set(inputs) - {TOKENS, "attention_mask"})
    if unknown:
        raise GenerateError(f"a causal language model continues input_ids alone, found {', '.join(unknown)} too")
    ids = _token_ids(TOKENS, inputs.get(TOKENS))
    given = inputs.get("attention_mask")
    if given is not None and given.shape != ids.shape:
        raise GenerateError(f"attention_mask must have the shape {list(ids.shape)} of input_ids, found {list(given.shape)}")
    if given is not None and not bool(given[:, -1].all()):
        raise GenerateError("a row ends in padding; what is continued must be padded on the left (padding_side='left')")
    mask = _mask(ids, given, settings)
    if "attention_mask" not in names and not bool(mask.all()):
        raise GenerateError("the model takes no attention_mask, so rows cannot be padded: give one at a time")
    # Padding has no position of its own.
    length = int((mask != 0).sum(1).max()) if "attention_mask" in names else ids.shape[1]
    _check_length(settings, length, more, f"shorten the prompt of {length} tokens")
    # Mask and positions of all steps are made at once, and read as far as there are tokens.
    whole = torch.cat([mask, mask.new_ones(len(mask), more)], 1)
    held, positions = (_own(value, decoder.on_host) for value in (whole, masked_positions(whole)))
    masked, counted = "attention_mask" in names, "position_ids" in names
    fed: dict[str, Any] = {}
    length = 0

    def step(new: Any) -> Any:
        nonlocal length
        start, length = length, length + new.shape[1]
        fed[TOKENS] = new
        if masked:
            fed["attention_mask"] = held[:, :length]
        if counted:
            fed["position_ids"] = positions[:, start:length]
        return decoder(fed)

    return ids, step, (mask != 0).int().argmax(1)


def _check_length(settings: Settings, length: int, more: int, shorter: str) -> None:
    """Refuse a text that the table of positions does not hold; the last of its tokens is not read any more."""
    known = settings.table_length
    fits = 0 if known is None else known - length + 1
    advice = ", or ".join(filter(None, [f"add at most {fits} (max_new_tokens)" if fits > 0 else "", shorter]))
    what = f"a text of {length} token{'' if length == 1 else 's'} and {more} new ones"
    settings.check_length(length + more - 1, what=what, advice=advice)


def _conditional(
    decoder: Decoder, ports: Sequence[Port], inputs: Mapping[str, Tensor], settings: Settings, more: int
) -> _Start:
    """What a decoder behind an encoder starts from, and steps over the encoder's inputs."""
    names = [port.name for port in ports if port.role == "" and port.name != DECODER_TOKENS]
    given = {name: value for name, value in inputs.items() if name != DECODER_TOKENS}
    if TOKENS in names and "attention_mask" in names:
        ids = _token_ids(TOKENS, given.get(TOKENS))
        given["attention_mask"] = _mask(ids, given.get("attention_mask"), settings)
    missing, unknown = [name for name in names if name not in given], sorted(set(given) - set(names))
    if missing or unknown:
        found = [f"missing: {', '.join(missing)}"] if missing else []
        found += [f"unknown: {', '.join(unknown)}"] if unknown else []
        raise GenerateError(f"the encoder's inputs are {', '.join(names)}; {'; '.join(found)}")
    rows = given[names[0]]
    start = inputs.get(DECODER_TOKENS)
    if start is None:
        first = settings.decoder_start_token_id if settings.decoder_start_token_id is not None else settings.bos_token_id
        if first is None:
            raise GenerateError(
                "the model names no token that its decoder starts from (decoder_start_token_id, bos_token_id): give "
                "decoder_input_ids [batch, length]"
            )
        start = torch.full((rows.shape[0], 1), first, dtype=torch.int64, device=rows.device)
    tokens = _token_ids(DECODER_TOKENS, start)
    if len(tokens) != rows.shape[0]:
        raise GenerateError(f"decoder_input_ids must have {rows.shape[0]} rows as {names[0]} has, found {len(tokens)}")
    begun = tokens.shape[1]
    _check_length(settings, begun, more, f"shorten decoder_input_ids of {begun} tokens" if begun > 1 else "")
    return tokens, lambda new: decoder({**given, DECODER_TOKENS: new}), None


def _token_ids(name: str, ids: Tensor | None) -> Tensor:
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.dtype != torch.int64 or ids.numel() == 0:
        found = f"{list(ids.shape)} {ids.dtype}" if isinstance(ids, Tensor) else type(ids).__name__
        raise GenerateError(f"{name} must be an int64 tensor [batch, length] of at least one token, found {found}")
    return ids


def _mask(ids: Tensor, mask: Tensor | None, settings: Settings) -> Tensor:
    if mask is not None:
        return mask.to(torch.int64)
    pad = settings.pad_token_id
    if pad is not None and pad not in settings.eos_token_id and bool((ids == pad).any()):
        return (ids != pad).to(torch.int64)
    return torch.ones_like(ids)
