"""Calibration and evaluation data: from text files through the model's tokenizer, or from the caller's own batches.

A few windows of the text are held back from calibration, so that what a build reports was not fitted to.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from surgeon.caches import OPTIONAL, SUM
from surgeon.errors import ObserveError, TraceError
from surgeon.graph import Graph
from surgeon.observe import Batch
from surgeon.placement import to_host

if TYPE_CHECKING:
    from surgeon.recipe import Calibration

HELD_BACK_ROWS = 8


@dataclass(frozen=True)
class Data:
    """Batches of keyword inputs.

    Attributes:
        calibration: what passes observe.
        held_back: what verification and reports look at; never observed.
        real: whether ``held_back`` is the user's data (otherwise random inputs).
        notes: what a reader of the report should know.
    """

    calibration: tuple[Batch, ...] = ()
    held_back: tuple[Batch, ...] = ()
    real: bool = False
    notes: tuple[str, ...] = field(default=())


def load_data(spec: Calibration | Iterable[Batch] | None, graph: Graph, tokenizer: Any | None = None) -> Data:
    """Read calibration data for a graph.

    Args:
        spec: the recipe's ``calibration`` mapping, an iterable of keyword-input dicts, or None.
        graph: the graph whose inputs are filled.
        tokenizer: a transformers tokenizer; by default the one beside the source checkpoint.

    Returns:
        Calibration batches and held-back ones.  Without data the held-back batches are random inputs of several shapes.

    Raises:
        ObserveError: the text is empty or missing, no tokenizer is known, or a batch does not fit the graph.
    """
    from surgeon.recipe import Calibration

    if spec is None:
        return Data(held_back=tuple(synthetic_batches(graph)))
    if not isinstance(spec, Calibration):
        return _from_batches(spec, graph)
    rows = tokenize_file(
        Path(spec.text), graph, spec.length, tokenizer, lines=spec.unit == "line", limit=spec.samples + HELD_BACK_ROWS,
        seed=spec.seed,
    )
    reserve = min(HELD_BACK_ROWS, len(rows) // 4)
    if reserve == 0:
        held_back: tuple[Batch, ...] = tuple(synthetic_batches(graph))
        notes: tuple[str, ...] = (f"{spec.text}: too little text to hold any back; checks used random inputs",)
    else:
        held_back = tuple(several_shapes(collate(rows[:reserve], graph, tokenizer_for(graph, tokenizer)), graph))
        notes = ()
    used = rows[reserve:]
    if len(used) < spec.samples:
        notes += (f"calibration: {spec.samples} samples asked, the text holds {len(used)} of length {spec.length}",)
    pad = tokenizer_for(graph, tokenizer)
    least = spec.length if spec.pad == "length" else 0
    batches = tuple(
        collate(used[start : start + spec.batch], graph, pad, least) for start in range(0, len(used), spec.batch)
    )
    _check_ids(graph, (*batches, *held_back), str(spec.text))
    return Data(batches, held_back, reserve > 0, notes)


def _from_batches(spec: Iterable[Batch], graph: Graph) -> Data:
    batches = []
    for number, batch in enumerate(spec):
        if not isinstance(batch, Mapping):
            raise ObserveError(
                f"calibration batch {number} must be a mapping of input names to tensors, found {type(batch).__name__}"
            )
        try:
            batch = graph.flat(batch)
            graph.bind(batch)
        except TraceError as error:
            raise ObserveError(f"calibration batch {number}: {error}") from error
        empty = [port.name for port in graph.inputs if port.role not in OPTIONAL and batch[port.name].numel() == 0]
        if empty:
            shape = list(batch[empty[0]].shape)
            raise ObserveError(f"calibration batch {number}: {empty[0]} {shape} holds nothing; leave the batch out")
        batches.append(to_host(dict(batch)))
    if not batches:
        raise ObserveError("calibration is empty: give at least one batch of the model's keyword inputs")
    _check_ids(graph, batches, "calibration")
    if len(batches) == 1:
        return Data(tuple(batches), tuple(synthetic_batches(graph)), False, ("one batch only: checks used random inputs",))
    return Data(tuple(batches[:-1]), (batches[-1],), True)


def _check_ids(graph: Graph, batches: Iterable[Batch], what: str) -> None:
    """Refuse numbers that a table of the model has no row for; torch would only say that an index is out of range."""
    ports = dict(zip((node for node in graph.module.graph.nodes if node.op == "placeholder"), graph.inputs, strict=True))
    rows: dict[str, int] = {}
    for node in graph.module.graph.nodes:
        if node.target is torch.ops.aten.embedding.default and node.args[1] in ports:
            name = ports[node.args[1]].name
            rows[name] = min(node.args[0].meta["val"].shape[0], rows.get(name, 1 << 62))
    for number, batch in enumerate(batches):
        for name, count in rows.items():
            if name not in batch or batch[name].is_floating_point():
                continue
            low, high = int(batch[name].min()), int(batch[name].max())
            if low < 0 or high >= count:
                raise ObserveError(
                    f"{what} batch {number}: {name} holds {low if low < 0 else high}, and the model's table has rows 0 to "
                    f"{count - 1}; is it the tokenizer of this model, and padding a token of it?"
                )


def tokenizer_for(graph: Graph, tokenizer: Any | None = None) -> Any:
    """The given tokenizer, or the one beside the source checkpoint.

    Raises:
        ObserveError: there is none.
    """
    if tokenizer is not None and not isinstance(tokenizer, str | Path):
        return tokenizer
    path = str(tokenizer) if tokenizer is not None else graph.source.path
    if path is None:
        raise ObserveError(
            "calibration text needs a tokenizer, and the model does not come from a checkpoint directory: "
            "give calibration={'text': ..., 'tokenizer': ...} or an iterable of input dicts"
        )
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ObserveError(
            f"no tokenizer could be loaded from {path}: {' '.join(str(error).split())[:200]}; put the tokenizer's files "
            "there, give calibration={'text': ..., 'tokenizer': ...}, or an iterable of input dicts"
        ) from error


def tokenize_file(
    path: Path, graph: Graph, length: int, tokenizer: Any | None, *, lines: bool, limit: int | None, seed: int | None
) -> list[dict[str, list[int]]]:
    """Tokenize a text file into rows of at most ``length`` tokens.

    Args:
        path: UTF-8 text.
        graph: says which of the tokenizer's outputs are wanted.
        length: tokens per row, special tokens included.
        tokenizer: see :func:`tokenizer_for`.
        lines: one row per line (shorter than ``length`` where the line is) instead of windows over the whole text.
        limit: number of rows to return at most, None for all.
        seed: rows are drawn in this random order; None keeps the order of the file.

    Raises:
        ObserveError: the file is missing, not text, or holds no tokens, or rows cannot be that short.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ObserveError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ObserveError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    if not text.strip():
        raise ObserveError(f"{path}: the file is empty; it must hold text to run the model on")
    wanted = {port.name for port in graph.inputs}
    if "input_ids" not in wanted:
        raise ObserveError(
            f"text cannot feed this model: its inputs are {', '.join(sorted(wanted))}; "
            "give calibration as an iterable of input dicts"
        )
    encode = tokenizer_for(graph, tokenizer)
    if lines:
        encoded = encode([line for line in text.splitlines() if line.strip()], truncation=True, max_length=length)
    else:
        encoded = encode(text, truncation=True, max_length=length, return_overflowing_tokens=True)
    columns = {name: encoded[name] for name in encoded if name in wanted}
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    if not lines and len(rows) > 1 and len(rows[-1]["input_ids"]) < length:
        rows.pop()
    if seed is not None:
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
        rows = [rows[index] for index in order]
    longest = max((len(row["input_ids"]) for row in rows), default=0)
    if longest > length:  # where special tokens leave no place for text, tokenizers do not cut at all
        raise ObserveError(
            f"{path}: the tokenizer does not cut rows to length {length}, they have up to {longest} tokens; give a greater "
            "length, which counts special tokens too, or batches of tensors"
        )
    return rows[:limit]


def collate(
    rows: Sequence[Mapping[str, list[int]]], graph: Graph, tokenizer: Any, least: int = 0
) -> dict[str, Tensor]:
    """Pad rows to the length of the longest, at least ``least``, and stack them, [rows, length] each.

    A decoder that has an encoder before it reads the same text.  Other inputs that the tokenizer does not make but the graph
    takes are refused by ``Graph.bind``.
    """
    longest = max(least, *(len(row["input_ids"]) for row in rows))
    if all(len(row["input_ids"]) == longest for row in rows):
        batch = {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}
    else:
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        padded = tokenizer.pad([dict(row) for row in rows], padding="max_length", max_length=longest, return_tensors="pt")
        batch = dict(padded)
    for port in graph.inputs:
        if port.name == "attention_mask" and port.name not in batch:
            batch[port.name] = torch.ones_like(batch["input_ids"])
        if port.name == "decoder_input_ids" and port.name not in batch:
            batch[port.name] = batch["input_ids"]
    graph.bind(batch)
    return batch


def several_shapes(batch: Batch, graph: Graph) -> list[Batch]:
    """The batch as it is and, where dimensions are dynamic, a single shorter row and an odd-sized part of it."""
    shapes = [batch]
    given = [port for port in graph.inputs if port.name in batch]
    sequence = [port for port in given if len(port.shape) == 2 and isinstance(port.shape[1], str)]
    dynamic_rows = all(isinstance(port.shape[0], str) for port in given)
    rows = next(iter(batch.values())).shape[0]
    if sequence and len(sequence) == len(given):
        total = next(iter(batch.values())).shape[1]
        for count, length in ((1, max(2, total // 3)), (min(3, rows), max(2, total - 5))):
            if dynamic_rows and length < total:
                shapes.append({name: value[:count, :length].contiguous() for name, value in batch.items()})
    elif dynamic_rows and rows > 1:
        shapes.append({name: value[:1].contiguous() for name, value in batch.items()})
    return shapes


def synthetic_batches(graph: Graph, seed: int = 0) -> list[Batch]:
    """Random inputs in three shapes other than the example's where dimensions are dynamic; caches are left out.

    Integers are drawn between the example's extremes, so that token ids stay in the vocabulary; floats keep the example's
    mean and standard deviation.
    """
    generator = torch.Generator().manual_seed(seed)
    batches: list[Batch] = []
    longest = (graph.source.generation or {}).get("table_length")
    for rows, wanted in ((2, 24), (1, 11), (3, 17)):
        length = wanted if longest is None else min(wanted, longest)
        batch: dict[str, Tensor] = {}
        for port in graph.inputs:
            if port.role in OPTIONAL:
                continue
            example = graph.example[port.name]
            shape = []
            for position, size in enumerate(port.shape):
                if isinstance(size, int):
                    shape.append(size)
                    continue
                dim = graph.dims[size.split(SUM)[-1]]  # a mask over empty caches is as long as the tokens
                target = rows if position == 0 else length
                shape.append(min(max(target, dim.min), dim.max if dim.max is not None else target))
            batch[port.name] = _like(example, shape, generator)
        if batches and all(a.shape == b.shape for a, b in zip(batches[0].values(), batch.values(), strict=True)):
            continue
        batches.append(batch)
    return batches


def _like(example: Tensor, shape: list[int], generator: torch.Generator) -> Tensor:
    if example.dtype == torch.bool:
        return torch.ones(shape, dtype=torch.bool) if bool(example.all()) else torch.rand(shape, generator=generator) < 0.5
    if example.is_floating_point():
        noise = torch.randn(shape, generator=generator)
        spread = example.float().std() if example.numel() > 1 else torch.tensor(1.0)
        return (noise * spread + example.float().mean()).to(example.dtype)
    low, high = int(example.min()), int(example.max())
    return torch.randint(low, high + 1, shape, generator=generator).to(example.dtype)
