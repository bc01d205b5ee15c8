"""Every way between dense networks and experts on the trained models: held-out loss, size, latency, seconds.

    python benchmarks/moe.py                 all rows (about an hour on one core)
    python benchmarks/moe.py --only 'kmeans*'  some rows, by method or by 'model | budget | method'; the others keep the
                                             figures that are there
    python benchmarks/moe.py --missing         rows that have no figures yet, or no latency (unless --no-latency)

The rows are in ``_moe_split.py``, ``_moe_densify.py``, ``_moe_merge.py`` and ``_moe_drop.py``.
Writes ``benchmarks/results/moe.json`` and ``moe.md``.  A new method is one more ``Row``; a claim of a paper about
the order of two of them is one more line in ``CLAIMS``.  All rows of one model see the same calibration windows and
are judged on the same held-out windows.  Nothing is trained after the surgery.  Latency is that of the onnxruntime
artefact on one thread, measured in turn with the untouched model's; graphs that differ in weights only share one figure,
where a token uses as many experts whatever the weights.
"""

from __future__ import annotations

import gc
import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import _moe_densify
import _moe_drop
import _moe_merge
import _moe_split
import torch
from _moe_facts import FACTS, facts
from _moe_row import MIXTURES, OTHER_FORMS, Row
from _rows import RESULTS, arguments, earlier, is_wanted
from torch import Tensor

from surgeon.accounting import active_parameter_count, parameter_count
from surgeon.contract import Artifact, Observer
from surgeon.data import collate, load_data, tokenize_file, tokenizer_for
from surgeon.discovery import discover
from surgeon.graph import Graph
from surgeon.latency import rounds
from surgeon.observe import observe
from surgeon.progress import Progress
from surgeon.recipe import Calibration
from surgeon.registry import make_backend, make_pass
from surgeon.rewrite import Editor
from surgeon.structure import Structure
from surgeon.sweep import run_pass
from surgeon.tracing import trace

EXAMPLES = Path(__file__).parents[1] / "examples" / "models"
WINDOWS, LENGTH = 64, 128  # of held-out text; half as many windows of calibration text
ROWS: list[Row] = [
    Row("tiny-llama", "untouched", "dense", []),
    *_moe_split.rows(),
    *(Row(mixtures.model, "untouched", "mixture", []) for mixtures in MIXTURES),
    *_moe_densify.rows(),
    *_moe_merge.rows(),
    *_moe_drop.rows(),
]

CLAIMS = [*_moe_split.CLAIMS, *_moe_densify.CLAIMS, *_moe_merge.CLAIMS, *_moe_drop.CLAIMS]
"""Source, better and worse methods, budgets at which they are compared (a pattern)."""

WHY = {**_moe_densify.WHY, **_moe_merge.WHY}
"""Why a method does not beat chance, by pattern over ``model | budget | method``."""


@dataclass
class Bench:
    """A traced model with data.

    Attributes:
        graph, structure: of the untouched model.
        calibration: batches that passes observe.
        held_out: windows of text that they do not.
        artifact: of the untouched model.
        latency: ratios by fingerprint.
    """

    graph: Graph
    structure: Structure
    calibration: Sequence[Mapping[str, Tensor]]
    held_out: dict[str, Tensor]
    artifact: Artifact
    latency: dict[str, dict[str, float]] = field(default_factory=dict)


@cache
def bench(model: str) -> Bench:
    graph = trace(EXAMPLES / model, dtype="float32")
    spec = Calibration(text=EXAMPLES / "calibration.txt", samples=WINDOWS // 2, length=LENGTH)
    rows = tokenize_file(EXAMPLES / "heldout.txt", graph, LENGTH, None, lines=False, limit=WINDOWS, seed=1)
    held_out = collate(rows, graph, tokenizer_for(graph))
    artifact = lowered(graph, Path(tempfile.mkdtemp()))
    return Bench(graph, discover(graph), load_data(spec, graph).calibration, held_out, artifact)


def lowered(graph: Graph, folder: Path) -> Artifact:
    return make_backend("onnxruntime").lower(graph, folder)


def operate(row: Row, seed: int) -> tuple[Graph, float]:
    """The model after the row's passes, and the seconds they took."""
    base = bench(row.model)
    graph, start = base.graph, time.process_time()  # one thread: seconds of a core, also where others use the machine
    for number, item in enumerate(row.steps):
        (name, fields), last = next(iter(item.items())), number == len(row.steps) - 1
        step = make_pass({name: {key: seed if value == "$seed" else value for key, value in fields.items()}})
        graph = graph.clone()
        structure = discover(graph)
        structure = structure.select(step.selection(structure))
        editor = Editor(graph)
        plan = row.plan(graph, structure, seed) if row.plan is not None and last else None
        run_pass(step, editor, structure, lambda: base.calibration, plan, Progress(False))
        editor.finish()
    seconds = time.process_time() - start
    if row.edit is not None:
        editor = Editor(graph)
        row.edit(editor, discover(graph), seed)
        editor.finish()
    return graph, seconds


def loss(graph: Graph, batch: Mapping[str, Tensor]) -> float:
    """Next-token cross entropy in nats."""
    total = 0.0
    for rows in range(0, WINDOWS, 16):
        part = {name: value[rows : rows + 16] for name, value in batch.items()}
        with torch.no_grad():
            logits = graph(**part)["logits"][:, :-1].flatten(0, 1)
        total += float(torch.nn.functional.cross_entropy(logits, part["input_ids"][:, 1:].flatten())) * len(part["input_ids"])
    return total / WINDOWS


class Used(Observer):
    """Token-expert pairs of non-zero weight."""

    def __init__(self, node: torch.fx.Node) -> None:
        self.nodes = (node,)
        self.pairs = self.tokens = 0

    def update(self, *values: Tensor) -> None:
        """Add [tokens, k]."""
        self.pairs += int((values[0] != 0).sum())
        self.tokens += values[0].shape[0]

    def merge(self, other: Observer) -> None:
        """Add another shard."""
        assert isinstance(other, Used)
        self.pairs, self.tokens = self.pairs + other.pairs, self.tokens + other.tokens


def active_parameters(graph: Graph, batch: Mapping[str, Tensor]) -> int:
    """Weights that a token uses on average: those of experts that are selected and do not weigh 0."""
    mixtures = list(discover(graph).moes())
    used = {site.name: Used(site.part.weight) for site in mixtures}
    if used:
        observe(graph, [batch], used)
    idle = 0.0
    for site in mixtures:
        moe = site.part
        names = [name for name in (moe.w_in, moe.w_out, moe.b_in, moe.b_out) if name is not None]
        each = sum(graph.tensor(name).numel() for name in names) / moe.experts
        idle += each * (moe.top_k - used[site.name].pairs / used[site.name].tokens)
    return round(active_parameter_count(graph) - idle)


def latency(row: Row, graph: Graph) -> dict[str, float]:
    """Milliseconds of the artefact and of the untouched model's, for 16 tokens and for 8 x 128."""
    base = bench(row.model)
    key = row.key if row.adapts else graph.fingerprint()
    if key not in base.latency:
        base.latency[key] = _timed(base, graph if row.steps else None)
    return base.latency[key]


def _timed(base: Bench, graph: Graph | None) -> dict[str, float]:
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        artifact = base.artifact if graph is None else lowered(graph, Path(folder))
        for name, (rows, length) in {"short": (1, 16), "long": (8, 128)}.items():
            batch = {key: value[:rows, :length].contiguous() for key, value in base.held_out.items()}
            with artifact.threads(1), base.artifact.threads(1):
                times = rounds(
                    {"untouched": lambda b=batch: base.artifact.run(b), "this": lambda b=batch: artifact.run(b)},
                    seconds=0.3, minimum=5,
                )  # fmt: skip
            found |= {f"{name}_ms": 1e3 * min(times["this"]), f"{name}_untouched_ms": 1e3 * min(times["untouched"])}
    return found


def measure(row: Row, with_latency: bool) -> dict[str, Any]:
    losses, seconds, graph = [], 0.0, None
    for seed in row.seeds:
        graph, took = operate(row, seed)
        losses.append(loss(graph, bench(row.model).held_out))
        seconds += took / len(row.seeds)
    assert graph is not None
    found: dict[str, Any] = {
        "model": row.model, "budget": row.budget, "method": row.method, "random": row.random,
        "loss": statistics.mean(losses), "losses": losses,
        "parameters": parameter_count(graph), "active": active_parameters(graph, bench(row.model).held_out),
        "seconds": seconds, "recipe": [dict(step) for step in row.steps],
    }  # fmt: skip
    if not row.steps:
        found["experts"] = facts(graph, bench(row.model).calibration)
    return found | (latency(row, graph) if with_latency else {})


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [
        "# Between dense networks and experts",
        "",
        "Made by `python benchmarks/moe.py`; every figure is explained there. Loss is next-token cross entropy in nats on "
        f"{WINDOWS} held-out windows of {LENGTH} tokens, after surgery alone, without any training. *Chance* is the row that "
        "leaves to a lot what the method decides, and is like it in all else: the mean of several lots, at the same budget, "
        "for `merge` with the same combination, for `densify` with or without refit alike. Latency is the artefact's "
        "(onnxruntime, float32, one thread, fastest run) for 1 x 16 and 8 x 128 tokens, as a multiple of the untouched "
        "model's artefact measured in turn with it; rows whose graphs differ in weights only share one measurement. On models "
        "as small as these it is mostly overhead of operators. Seconds are those that the passes keep one core busy.",
    ]
    chance = _chances()
    for model in dict.fromkeys(row["model"] for row in results.values()):
        lines += ["", f"## {model}", ""]
        lines.append("| budget | method | loss | over chance | parameters | active | 1 x 16 | 8 x 128 | seconds |")
        lines.append("|---|---|--:|--:|--:|--:|--:|--:|--:|")
        own = [row for row in results.values() if row["model"] == model]
        for budget in dict.fromkeys(row["budget"] for row in own):
            group = sorted((row for row in own if row["budget"] == budget), key=lambda row: row["loss"])
            for row in group:
                lot = results.get(chance.get(_key(row), ""))
                gain = f"{row['loss'] - lot['loss']:+.3f}" if lot is not None else ""
                times = [
                    f"{row[f'{n}_ms'] / row[f'{n}_untouched_ms']:.2f}" if f"{n}_ms" in row else "" for n in ("short", "long")
                ]
                figures = [f"{row['loss']:.4f}", gain, f"{row['parameters']:,}", f"{row['active']:,}", *times]
                lines.append(f"| {budget} | {row['method']} | {' | '.join(figures)} | {row['seconds']:.1f} |")
    lines += ["", "## What the experts are like", ""]
    lines.append("On calibration data, mean over the mixtures of a model (in brackets least and most).")
    lines += ["", f"| | {' | '.join(mixtures.model for mixtures in MIXTURES)} |", f"|---|{'--:|' * len(MIXTURES)}"]
    for name, title in FACTS.items():
        cells = []
        for mixtures in MIXTURES:
            own = [each[name] for each in results.get(f"{mixtures.model} | untouched | mixture", {}).get("experts", [])]
            cells.append(f"{statistics.mean(own):.2f} ({min(own):.2f} to {max(own):.2f})" if own else "")
        lines.append(f"| {title} | {' | '.join(cells)} |")
    lines += ["", "## Orders that papers claim", ""]
    lines += ["| claim | model | budget | better | worse | holds |", "|---|---|---|--:|--:|---|"]
    for text, better, worse, pattern in CLAIMS:
        for row in results.values():
            other = results.get(f"{row['model']} | {row['budget']} | {worse}")
            if row["method"] == better and other is not None and fnmatchcase(row["budget"], pattern):
                holds = "yes" if row["loss"] < other["loss"] else "**no**"
                where = f"{row['model']} | {row['budget']}"
                lines.append(f"| {text} | {where} | {row['loss']:.4f} | {other['loss']:.4f} | {holds} |")
    lines += ["", "## Methods and chance", ""]
    lines.append(
        "At how many budgets of each model a method beats chance: first the methods as surgeon has them by default, "
        "then forms that leave a step out, as some do that papers publish, and merging with one budget for all layers."
    )
    models = list(dict.fromkeys(row.model for row in ROWS))
    methods = list(dict.fromkeys(results[key]["method"] for key in results if key in chance))
    for title, wanted in (("method", False), ("form", True)):
        lines += ["", f"| {title} | {' | '.join(models)} |", f"|---|{'--:|' * len(models)}"]
        total: list[bool] = []
        for method in (name for name in methods if any(word in name for word in OTHER_FORMS) == wanted):
            cells = []
            for model in models:
                keys = [key for key in chance if key in results and results[key]["method"] == method]
                better = [results[key]["loss"] < results[chance[key]]["loss"] for key in keys if results[key]["model"] == model]
                total += better
                mark = "" if all(better) else "**"
                cells.append(f"{mark}{sum(better)} of {len(better)}{mark}" if better else "")
            lines.append(f"| {method} | {' | '.join(cells)} |")
        lines.append(f"| all together | {sum(total)} of {len(total)} |{' |' * (len(models) - 1)}")
    lines += ["", "## Methods that do not beat chance", ""]
    beaten = [row for key, row in results.items() if key in chance and row["loss"] >= results[chance[key]]["loss"]]
    lines += ["| model | method | budget | loss | chance | why |", "|---|---|---|--:|--:|---|"] if beaten else ["None."]
    reasons: list[str] = []
    for row in beaten:
        lot = results[chance[_key(row)]]
        why = next((text for pattern, text in WHY.items() if fnmatchcase(_key(row), pattern)), "")
        if why and why not in reasons:
            reasons.append(why)
        number = str(reasons.index(why) + 1) if why else ""
        spread = f"{lot['loss']:.4f} ({min(lot['losses']):.2f} to {max(lot['losses']):.2f})"
        lines.append(f"| {row['model']} | {row['method']} | {row['budget']} | {row['loss']:.4f} | {spread} | {number} |")
    lines += ["", *(f"{number}. {why}" for number, why in enumerate(reasons, 1))]
    return "\n".join([*lines, ""])


def _key(row: Mapping[str, Any]) -> str:
    return f"{row['model']} | {row['budget']} | {row['method']}"


def _chances() -> dict[str, str]:
    """The random row that each of the others must beat, by their keys."""
    first: dict[str, Row] = {}
    for row in ROWS:
        if row.random:
            first.setdefault(f"{row.model} | {row.budget}", row)
    found = {}
    for row in ROWS:
        lot = first.get(f"{row.model} | {row.budget}")
        if not row.random and lot is not None:
            found[row.key] = lot.key if row.chance is None else f"{row.model} | {row.budget} | {row.chance}"
    return found


def main() -> None:
    parser = arguments(__doc__, "methods")
    parser.add_argument("--no-latency", action="store_true", help="skip lowering")
    options = parser.parse_args()
    torch.set_num_threads(1)
    before, path = earlier("moe.json"), RESULTS / "moe.json"
    results: dict[str, Any] = {}
    for row in ROWS:
        known = row.key in before and (options.no_latency or "short_ms" in before[row.key])
        if any(is_wanted(options, name, known) for name in (row.method, row.key)):
            found = measure(row, not options.no_latency)
            results[row.key] = {**before.get(row.key, {}), **found} if options.no_latency else found
            print(f"{row.key:90}{results[row.key]['loss']:9.4f}{results[row.key]['seconds']:8.1f} s", flush=True)
            path.write_text(json.dumps({**before, **results}, indent=1))
            gc.collect()  # graphs hold themselves in cycles
        elif row.key in before:
            results[row.key] = before[row.key]
    path.write_text(json.dumps(results, indent=1))
    (RESULTS / "moe.md").write_text(table(results))


if __name__ == "__main__":
    main()
