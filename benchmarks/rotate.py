"""What 4-bit weights and 8-bit activations lose behind ``rotate``, on trained models as they are and with outliers.

    python benchmarks/rotate.py
    python benchmarks/rotate.py --only "tiny-llama*: int8*"

The mean Kullback-Leibler divergence of the next token's distribution from that of the model itself, in nats, on 32 held-out
windows of 128 tokens; 32 others to calibrate what needs data.  Of rotations the mean over three lots is given, with the
smallest and the largest.  All weights of linears and experts in 4 bits, but for the output matrix and routers, or all linears
in ``int8_dynamic``.

Models as small as these have few outliers.  Two streams that have some compute the same as the model does, to rounding:

    gains: four channels of the result of every norm but the last are 30 times as large, and the columns that read them 30 times
        as small; large models come out of training with such channels (LLM.int8, Dettmers et al. 2022, arXiv:2208.07339).
    axes: the stream in its principal axes (``drop_channels: {ratio: 0}``), so that few channels have most of the energy, and
        their weights.

Writes ``benchmarks/results/rotate.json`` and ``rotate.md``.
"""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any

import torch
from _trained import EXAMPLES, Judge, changed_by, language_model, tabulate

from surgeon.channel_axes import Channels, find_channels
from surgeon.channel_bases import rotation
from surgeon.data import Data, collate, tokenize_file, tokenizer_for
from surgeon.discovery import discover
from surgeon.graph import Graph
from surgeon.rewrite import Editor

MODELS = ("tiny-llama", "tiny-mixtral")
STREAMS = ("as trained", "gains", "axes")
FORMS: dict[str, dict[str, Any]] = {
    "int8_dynamic": {"scheme": "int8_dynamic"},
    "int4, group 32": {"scheme": "int4", "group": 32, "blocks": ":"},
    "int4, group 128": {"scheme": "int4", "group": 128, "blocks": ":"},
    "int4, group 128, gptq": {"scheme": "int4", "group": 128, "blocks": ":", "algorithm": "gptq"},
}
METHODS: dict[str, dict[str, Any] | None] = {
    "alone": None,
    "smooth": {"smooth": {}},
    "rotate": {"rotate": {}},
    "rotate, heads": {"rotate": {"heads": True}},
    "rotate, random": {"rotate": {"basis": "random"}},
}
LOTS = 3
CHANNELS, FACTOR = 4, 30.0
ROWS = [f"{form}: {method}" for form in FORMS for method in METHODS if method != "smooth" or form == "int8_dynamic"]


def subject(name: str, stream: str) -> tuple[Graph, Data, Judge]:
    """A model with one of the streams, its data, and the divergence of what is left of it."""
    graph, data, _ = language_model(name, samples=32, windows=1)
    rows = tokenize_file(EXAMPLES / "models" / "heldout.txt", graph, 128, None, lines=False, limit=32, seed=1)
    batch = collate(rows, graph, tokenizer_for(graph))
    with torch.no_grad():
        before = graph(**batch)["logits"].log_softmax(-1)

    @torch.no_grad()
    def divergence(changed: Graph) -> float:
        after = changed(**batch)["logits"].log_softmax(-1)
        return float((before.exp() * (before - after)).sum(-1).mean())

    if stream == "axes":
        graph = changed_by({"drop_channels": {"ratio": 0}}, graph, data)
    return with_gains(graph) if stream == "gains" else graph, data, divergence


def with_gains(source: Graph) -> Graph:
    """Gains of some channels larger, columns of their readers smaller, but for the last norm and the head."""
    editor = Editor(source.clone())
    ((_, channels),) = find_channels(discover(editor.graph))
    assert isinstance(channels, Channels)
    scale = torch.ones(channels.width)
    scale[torch.randperm(channels.width, generator=torch.Generator().manual_seed(0))[:CHANNELS]] = FACTOR
    *_, last = channels.norms
    uses = rotation(editor.graph, channels).uses
    behind = {use.reader for use in uses if use.normed is not None and use.normed.norm.node is last}
    gains = {str(use.leaf.target): use.axis for use in uses if use.role == "gain" and not behind & set(use.reader.users)}
    readers = {str(use.leaf.target): use.axis for use in uses if use.role == "read" and use.reader not in behind}
    for names, by in ((gains, scale), (readers, 1 / scale)):
        for name, axis in names.items():
            tensor = editor.tensor(name).detach()
            editor.set_tensor(name, tensor * by.reshape([-1] + [1] * (-axis - 1)))
    return editor.finish()


def measured(row: str, source: Graph, data: Data, judge: Judge) -> dict[str, float]:
    form, method = row.split(": ")
    step = METHODS[method]
    found = []
    for seed in range(LOTS if method.startswith("rotate") else 1):
        steps = [] if step is None else [{key: {**fields, "seed": seed} for key, fields in step.items()}]
        changed = source
        for each in [*steps, {"quantize": FORMS[form]}]:
            changed = changed_by(each, changed, data)
        found.append(judge(changed))
    return {"kl": statistics.mean(found), "least": min(found), "most": max(found)}


def page(models: dict[str, dict[str, dict[str, float]]]) -> str:
    lines = [
        "# What quantize loses behind rotate",
        "",
        "Made by `python benchmarks/rotate.py`, which says what is measured. Divergence in thousandths of a nat per token; of "
        "rotations the mean of three lots, and between which values they are.",
    ]
    for name in MODELS:
        lines += ["", f"## {name}", "", f"| stream | form | {' | '.join(METHODS)} |", "|---|---|" + "--:|" * len(METHODS)]
        for stream in STREAMS:
            rows = models.get(f"{name}, {stream}", {})
            cells = {form: [cell(rows, form, method) for method in METHODS] for form in FORMS}
            lines += [f"| {stream} | {form} | {' | '.join(found)} |" for form, found in cells.items() if any(found)]
    return "\n".join(lines) + "\n"


def cell(rows: dict[str, dict[str, float]], form: str, method: str) -> str:
    figures = {key: f"{1e3 * value:.1f}" for key, value in rows.get(f"{form}: {method}", {}).items()}
    if not figures or not method.startswith("rotate"):
        return figures.get("kl", "")
    return f"{figures['kl']} ({figures['least']} - {figures['most']})"


if __name__ == "__main__":
    subjects = {f"{name}, {stream}": partial(subject, name, stream) for name in MODELS for stream in STREAMS}
    tabulate("rotate", __doc__, subjects, ROWS, measured, page)
