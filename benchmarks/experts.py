"""Merging the experts of one large layer: seconds and memory of every grouping and combination.

    python benchmarks/experts.py             all rows, on two threads
    python benchmarks/experts.py --only 'token_outputs*'

The layer is like one of DeepSeek-V3: 256 experts of 256 neurons, hidden 1024, sigmoid scores in 8 groups, 8 experts per
token; 805 MB of float32 weights, random, merged to 128 experts.  Seconds are those of scoring and merging (plan and
apply), after 4096 tokens were observed.  Memory is the process's resident set at its peak while it does, everything
included: Python, torch, the layer before and after.  Targets: 60 s and 2 GiB.

Writes ``benchmarks/results/experts.json`` and ``experts.md``; rows that are not asked for keep the figures that are there.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from _rows import RESULTS, arguments, earlier, is_wanted
from torch import Tensor

from surgeon.data import load_data
from surgeon.discovery import discover
from surgeon.graph import Graph
from surgeon.observe import observe
from surgeon.registry import make_pass
from surgeon.rewrite import Editor
from surgeon.tracing import trace

EXPERTS, HIDDEN, WIDTH, KEPT, TOKENS = 256, 1024, 256, 128, 4096
SECONDS, BYTES = 60, 2 << 30
GROUPINGS: dict[str, dict[str, Any]] = {
    f"{grouping}, {clustering}": {"grouping": grouping, "clustering": clustering}
    for grouping, clustering in (
        ("router_logits", "dominant"), ("outputs", "hierarchical"), ("outputs", "kmeans"), ("token_outputs", "ward"),
        ("weights", "hierarchical"),
    )
}  # fmt: skip
COMBINATIONS: dict[str, dict[str, Any]] = {
    "frequency": {},
    "frequency, refit": {"refit": True},
    "frequency, aligned by activations": {"align_by": "activations"},
    "mean": {"combination": "mean"},
    "zip": {"combination": "zip"},
    "zip by activations": {"combination": "zip", "align_by": "activations"},
    "svd": {"combination": "svd"},
    "svd, refit": {"combination": "svd", "refit": True},
}
ROWS = {
    f"{grouping}; {combination}": {**first, **second}
    for grouping, first in GROUPINGS.items()
    for combination, second in COMBINATIONS.items()
}


def layer() -> Graph:
    """The layer as a model of one block."""
    import transformers

    torch.manual_seed(0)
    config = transformers.DeepseekV3Config(
        vocab_size=512, hidden_size=HIDDEN, num_hidden_layers=1, num_attention_heads=8, num_key_value_heads=8,
        q_lora_rank=64, kv_lora_rank=64, qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=16, first_k_dense_replace=0,
        moe_intermediate_size=WIDTH, n_routed_experts=EXPERTS, n_shared_experts=1, num_experts_per_tok=8, n_group=8,
        topk_group=4, max_position_embeddings=512,
    )  # fmt: skip
    model = transformers.DeepseekV3ForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.02)
    ids = torch.arange(12).reshape(2, 6)
    return trace(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def tokens() -> list[dict[str, Tensor]]:
    """Calibration batches of random tokens."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(TOKENS // 512):
        ids = torch.randint(0, 512, (2, 256), generator=generator)
        batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    return batches


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """Largest resident set in bytes within the context, looked at every few milliseconds."""
    page, found, over = os.sysconf("SC_PAGE_SIZE"), [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.005):
            found[0] = max(found[0], int(Path("/proc/self/statm").read_text().split()[1]) * page)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        over.set()
        watcher.join()


def merge(graph: Graph, batches: list[dict[str, Tensor]], options: dict[str, Any]) -> dict[str, float]:
    """Seconds and peak memory of scoring and merging."""
    step = make_pass({"merge_experts": {"groups": KEPT, "tokens": TOKENS, **options}})
    clone = graph.clone()
    structure = discover(clone)
    observers = dict(step.observers(structure))
    start = time.perf_counter()
    observe(clone, load_data(batches, clone).calibration, observers)
    observed = time.perf_counter()
    with peak_memory() as peak:
        plan = step.plan(clone, structure, observers)
        planned = time.perf_counter()
        editor = Editor(clone)
        step.apply(editor, structure, plan, observers)
        merged = time.perf_counter()
        editor.finish()
    return {
        "observing": observed - start, "scoring": planned - observed, "merging": merged - planned, "peak": peak[0],
    }  # fmt: skip


def table(results: dict[str, dict[str, float]]) -> str:
    lines = [
        "# Merging 256 experts of one layer",
        "",
        f"Made by `python benchmarks/experts.py`, which says what is measured; {EXPERTS} experts of {WIDTH} neurons, hidden "
        f"{HIDDEN}, merged to {KEPT}, on 2 threads of a shared machine. Targets: {SECONDS} s, {BYTES / 2**30:.0f} GiB.",
        "",
        "| grouping | combination | scoring s | merging s | together s | peak GiB |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for name, row in results.items():
        together = row["scoring"] + row["merging"]
        figures = [f"{row['scoring']:.1f}", f"{row['merging']:.1f}", f"{together:.1f}", f"{row['peak'] / 2**30:.2f}"]
        lines.append(f"| {' | '.join(name.split('; '))} | {' | '.join(figures)} |")
    over = [
        name for name, row in results.items() if row["scoring"] + row["merging"] > SECONDS or row["peak"] > BYTES
    ]  # fmt: skip
    lines += ["", f"Rows beyond a target: {', '.join(over) or 'none'}.", ""]
    return "\n".join(lines)


def main() -> None:
    options = arguments(__doc__, "rows").parse_args()
    torch.set_num_threads(2)
    before, path = earlier("experts.json"), RESULTS / "experts.json"
    graph, batches = layer(), tokens()
    for name, row in ROWS.items():
        if is_wanted(options, name, name in before):
            before[name] = merge(graph, batches, row)
            print(f"{name:60}", *(f"{key} {value:.4g}" for key, value in before[name].items()), flush=True)
            path.write_text(json.dumps(before, indent=1) + "\n")
    results = {name: before[name] for name in ROWS if name in before}
    path.write_text(json.dumps(results, indent=1) + "\n")
    (RESULTS / "experts.md").write_text(table(results))


if __name__ == "__main__":
    main()
