"""What language models lose with a narrower residual stream: every criterion of ``drop_channels`` at 10, 25 and 50 %.

    python benchmarks/channels.py

The models are the trained ones of ``examples/models``, calibrated on 32 windows of 128 tokens and judged by their next-token
cross entropy in nats on 32 held-out ones; nothing is trained afterwards.  Of ``random`` the mean over three lots is given.
Writes ``benchmarks/results/channels.json`` and ``channels.md``.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
from _rows import write
from _trained import changed_by, language_model

from surgeon.environment import versions_of

MODELS = ("tiny-llama", "tiny-mixtral", "tiny-upcycled")
RATIOS = (0.1, 0.25, 0.5)
WAYS: dict[str, dict[str, Any]] = {
    "`principal`": {},
    "`principal`, `refit: false`": {"refit": False},
    "`activation`": {"criterion": "activation"},
    "`random`": {"criterion": "random"},
}
LOTS = 3


def measured(name: str) -> dict[str, Any]:
    """Losses and parameters of one model."""
    graph, data, judge = language_model(name, samples=32, windows=32)
    rows = []
    for ratio in RATIOS:
        for way, fields in WAYS.items():
            seeds = range(LOTS if way == "`random`" else 1)
            changed = [changed_by({"drop_channels": {"ratio": ratio, "seed": seed, **fields}}, graph, data) for seed in seeds]
            loss = statistics.mean(map(judge, changed))
            rows.append({"ratio": ratio, "way": way, "loss": loss, "parameters": changed[0].parameter_count()})
            print(name, rows[-1], flush=True)
    return {"source": judge(graph), "parameters": graph.parameter_count(), "rows": rows}


def page(found: dict[str, Any], versions: dict[str, str]) -> str:
    """The results as Markdown."""
    lines = ["# Dropping channels", ""]
    lines += [f"Made by `python benchmarks/channels.py`; {', '.join(f'{key} {value}' for key, value in versions.items())}.", ""]
    lines += ["Loss on held-out text in nats per token, nothing trained afterwards. The streams have 128 channels, of which a"]
    lines += ["multiple of 8 stays: 120, 96 and 64. Of `random` the mean of three lots."]
    lines += ["tiny-mixtral has one table as embedding and head, of which `principal` makes two."]
    for name, model in found.items():
        lines += ["", f"## {name}", "", f"{model['parameters']:,} parameters; whole: {model['source']:.4f}.", ""]
        lines += ["| | " + " | ".join(f"{ratio:.0%} | parameters" for ratio in RATIOS) + " |"]
        lines += ["|---|" + "---:|---:|" * len(RATIOS)]
        for way in WAYS:
            cells = [f"{row['loss']:.4f} | {row['parameters']:,}" for row in model["rows"] if row["way"] == way]
            lines.append(f"| {way} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    torch.manual_seed(0)
    found = {name: measured(name) for name in MODELS}
    versions = versions_of("surgeon", "torch", "transformers")
    write("channels", page(found, versions), versions, found)


if __name__ == "__main__":
    main()
