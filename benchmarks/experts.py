"""Scoring, merging and dropping the experts of one large layer: seconds and memory of every form.

    python benchmarks/experts.py                       all rows, on two threads
    python benchmarks/experts.py --only '*refit*'      some rows; the others keep the figures that are there
    python benchmarks/experts.py --missing             rows that have no figures yet
    python benchmarks/experts.py --print --only ...    to standard output as JSON; nothing is written

The layer is like one of DeepSeek-V3: 256 experts of 256 neurons, hidden 1024, sigmoid scores in 8 groups, 8 experts per
token; 805 MB of float32 weights, random, of which 128 experts remain.

What merging does with groups does not depend on how they were found, so that ``merge_experts`` is measured in two halves:
every grouping with every clustering (*scoring*: plan), and every combination, alignment and refit (*merging*: apply), the
latter with the groups of the default, small ones, and with one group of 129 experts, the most unequal that there can be.
The form of any recipe takes the seconds of two rows, and the larger of their memory.  ``drop_experts`` is measured whole.

Each row runs in a process of its own, a fork of one that has traced the layer and observed %(tokens)d tokens, on two threads.
Seconds are processor seconds of both threads together: those that pass on two idle cores are no more.  Other work on the
machine still slows the cores: ``token_outputs, ward`` took 28 to 35 s by the clock on an idle one.  Memory is the
process's resident set at its peak, everything included: Python, torch, the traced layer before and after, the tokens.
Targets: %(seconds)d s and %(gib)d GiB.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from _rows import RESULTS, arguments, earlier, is_wanted
from torch import Tensor

from surgeon.contract import Observer, Plan
from surgeon.data import load_data
from surgeon.discovery import discover
from surgeon.graph import Graph
from surgeon.observe import observe
from surgeon.passes.merge_experts import MergeExpertsPlan, MergeGroups
from surgeon.registry import make_pass
from surgeon.rewrite import Editor
from surgeon.structure import Structure
from surgeon.tracing import trace

EXPERTS, HIDDEN, WIDTH, KEPT, TOKENS = 256, 1024, 256, 128, 4096
SECONDS, BYTES = 60, 2 << 30
Fields = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        section: of the page.
        step: the pass.
        plan: how to group, where only apply is measured.
    """

    section: str
    step: Mapping[str, Fields]
    plan: str | None = None


def _rows() -> dict[str, Row]:
    found: dict[str, Row] = {}
    for grouping in ("router_logits", "outputs", "token_outputs", "weights"):
        for clustering in ("dominant", "hierarchical", "ward", "kmeans"):
            fields = {"groups": KEPT, "tokens": TOKENS, "grouping": grouping, "clustering": clustering}
            found[f"score: {grouping}, {clustering}"] = Row("Scoring", {"merge_experts": fields})
    found["score: router_logits, dominant, search"] = Row(
        "Scoring", {"merge_experts": {"groups": KEPT, "tokens": TOKENS, "combination": "search"}}
    )
    found["score: random"] = Row("Scoring", {"merge_experts": {"groups": KEPT, "grouping": "random"}})
    for groups in ("small groups", "one group of 129"):
        for combination in ("frequency", "mean", "zip", "svd"):
            for align in ({}, {"align_by": "activations"}, {"align": False}):
                for refit in (False, True):
                    if combination == "zip" and "align" in align:
                        continue  # zip matches neurons by itself
                    fields = {"groups": KEPT, "tokens": TOKENS, "combination": combination, "refit": refit, **align}
                    how = {"align_by": "by activations", "align": "not aligned"}.get(next(iter(align), ""), "by weights")
                    name = f"merge: {combination}, {how}{', refit' if refit else ''}; {groups}"
                    found[name] = Row("Merging", {"merge_experts": fields}, groups)
    for criterion in (
        "frequency", "soft_frequency", "gate_mass", "activation_norm", "reap", "reconstruction", "random",
    ):  # fmt: skip
        for budget in ("layer", "global"):
            fields = {"keep": KEPT, "criterion": criterion, "budget": budget}
            found[f"drop: {criterion}, {budget}"] = Row("Dropping", {"drop_experts": fields})
    return found


ROWS = _rows()


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


@dataclass(frozen=True)
class Subject:
    """A traced layer that the passes of some rows have observed."""

    graph: Graph
    structure: Structure
    observers: dict[str, Observer]

    @classmethod
    def seen_by(cls, step: Mapping[str, Fields], graph: Graph, batches: list[dict[str, Tensor]]) -> Subject:
        """Run the calibration batches through a clone."""
        clone = graph.clone()
        structure = discover(clone)
        observers = dict(make_pass(step).observers(structure))
        observe(clone, load_data(batches, clone).calibration, observers)
        return cls(clone, structure, observers)


def measure(row: Row, subject: Subject) -> dict[str, float]:
    """Seconds and peak memory of scoring and of changing the layer."""
    torch.set_num_threads(2)
    step, seen = make_pass(row.step), (subject.structure, subject.observers)
    given = None if row.plan is None else grouped(row.plan, step.plan(subject.graph, *seen))
    gc.collect()
    with peak_memory() as peak:
        start = time.process_time()
        plan = step.plan(subject.graph, *seen) if given is None else given
        planned = time.process_time()
        if row.section != "Scoring":
            editor = Editor(subject.graph)
            step.apply(editor, subject.structure, plan, subject.observers)
            editor.finish()
        done = time.process_time()
    return {"scoring": planned - start, "changing": done - planned, "peak": peak[0]}


def grouped(kind: str, found: Plan[Any]) -> MergeExpertsPlan:
    """The plan's own groups, or those of the same number that are most unequal."""
    assert isinstance(found, MergeExpertsPlan)
    if kind == "small groups":
        return found
    size = EXPERTS - KEPT + 1
    groups = [tuple(range(size)), *((expert,) for expert in range(size, EXPERTS))]
    weights = [tuple(1 / len(group) for _ in group) for group in groups]
    return MergeExpertsPlan(decisions=(
        MergeGroups(site=found.decisions[0].site, groups=tuple(groups), weights=tuple(weights)),
    ))  # fmt: skip


def apart(row: Row, subject: Subject) -> dict[str, float]:
    """The same in a process of its own."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def work(end: Connection) -> None:
        end.send(measure(row, subject))

    child = context.Process(target=work, args=(sender,))
    child.start()
    sender.close()
    try:
        found: dict[str, float] = receiver.recv()
    except EOFError:
        raise SystemExit(f"a process ended with {child.exitcode}") from None
    child.join()
    return found


def table(results: Mapping[str, Mapping[str, float]]) -> str:
    lines = [
        "# Experts of one large layer",
        "",
        f"Made by `python benchmarks/experts.py`, which says what is measured; {EXPERTS} experts of {WIDTH} neurons, hidden "
        f"{HIDDEN}, of which {KEPT} remain, on 2 threads. Seconds are the processor's, of both threads "
        "together, in some rows while other work kept the machine busy; memory is what the whole process holds at its peak. "
        f"Targets: {SECONDS} s, {BYTES / 2**30:.0f} GiB.",
    ]
    for section in dict.fromkeys(ROWS[name].section for name in results):
        lines += ["", f"## {section}", "", "| form | processor s | peak GiB |", "|---|--:|--:|"]
        for name, found in results.items():
            if ROWS[name].section == section:
                seconds = found["scoring"] + found["changing"]
                lines.append(f"| {name.partition(': ')[2]} | {seconds:.1f} | {found['peak'] / 2**30:.2f} |")
    slowest = {
        section: max((found["scoring"] + found["changing"], name) for name, found in results.items() if name.startswith(start))
        for section, start in (("scoring", "score"), ("merging", "merge"))
        if any(name.startswith(start) for name in results)
    }
    over = [
        name for name, found in results.items() if found["scoring"] + found["changing"] > SECONDS or found["peak"] > BYTES
    ]  # fmt: skip
    if len(slowest) == 2:
        total = sum(seconds for seconds, _ in slowest.values())
        forms = " and ".join(name for _, name in slowest.values())
        lines += ["", f"The slowest form of merging that was measured, {forms}: {total:.1f} s."]
    lines += ["", f"Rows beyond a target: {', '.join(over) or 'none'}."]
    missing = [name for name in ROWS if name not in results]
    if missing:
        lines += ["", f"Not measured yet (`--missing` does): {'; '.join(missing)}."]
    lines.append("")
    return "\n".join(lines)


def main() -> None:
    figures = {"tokens": TOKENS, "seconds": SECONDS, "gib": BYTES >> 30}
    parser = arguments((__doc__ or "") % figures, "rows")
    parser.add_argument("--print", action="store_true", help="to standard output, as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)  # a pool of threads would not survive the fork
    before, path = {} if options.print else earlier("experts.json"), RESULTS / "experts.json"
    before = {name: row for name, row in before.items() if name in ROWS}
    graph, batches = layer(), tokens()
    # all that any form of merging observes; dropping observes what its criterion needs
    merging = {"merge_experts": {"groups": KEPT, "tokens": TOKENS, "refit": True}}
    subjects: dict[str, Subject] = {}
    for name, row in ROWS.items():
        if is_wanted(options, name, name in before):
            step = row.step if row.section == "Dropping" else merging
            key = str(step)
            if key not in subjects:
                subjects = {key: Subject.seen_by(step, graph, batches)}
                gc.collect()
            before[name] = apart(row, subjects[key])
            print(f"{name:60}", *(f"{key} {value:.4g}" for key, value in before[name].items()), file=sys.stderr, flush=True)
            if not options.print:
                path.write_text(json.dumps(before, indent=1) + "\n")
    results = {name: before[name] for name in ROWS if name in before}
    if options.print:
        print(json.dumps(results))
        return
    path.write_text(json.dumps(results, indent=1) + "\n")
    (RESULTS / "experts.md").write_text(table(results))


if __name__ == "__main__":
    main()
