"""Every way between dense networks and experts on the trained models: held-out loss, size, latency, seconds.

    python benchmarks/moe.py                 all rows (about half an hour on one core)
    python benchmarks/moe.py --only 'kmeans*'  some rows; the others keep the figures that are there
    python benchmarks/moe.py --missing         rows that have no figures yet

Rows of merging experts are in ``_moe_merge.py``.
Rows of dropping and skipping experts are in ``_moe_drop.py``.
Writes ``benchmarks/results/moe.json`` and ``moe.md``.  A new method is one more ``Row`` in ``ROWS``; a claim of a paper
about the order of two of them is one more line in ``CLAIMS``.  All rows of one model see the same calibration windows and
are judged on the same held-out windows.  Nothing is trained after the surgery.  Latency is that of the onnxruntime
artefact on one thread, measured in turn with the untouched model's; graphs that differ in weights only share one figure.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import _moe_drop
import _moe_merge
import torch
from _moe_drop import drop_rows, skip_rows
from _rows import RESULTS, arguments, earlier, is_wanted
from torch import Tensor

from surgeon.accounting import active_parameter_count, parameter_count
from surgeon.contract import Artifact, Observer, Plan
from surgeon.data import collate, load_data, tokenize_file, tokenizer_for
from surgeon.discovery import discover
from surgeon.graph import Graph
from surgeon.latency import rounds
from surgeon.observe import observe
from surgeon.passes.densify_moe import DensifyMoEPlan, DensifyOne
from surgeon.progress import Progress
from surgeon.recipe import Calibration
from surgeon.registry import make_backend, make_pass
from surgeon.rewrite import Editor
from surgeon.structure import Structure
from surgeon.sweep import run_pass
from surgeon.tracing import trace

EXAMPLES = Path(__file__).parents[1] / "examples" / "models"
WINDOWS, LENGTH = 64, 128  # of held-out text; half as many windows of calibration text
MLP: dict[str, Any] = {"router": "mlp", "router_steps": 200}

Edit = Callable[[Editor, Structure, int], None]
MakePlan = Callable[[Graph, Structure, int], Plan[Any]]


@dataclass(frozen=True)
class Row:
    """One method at one budget.

    Attributes:
        model: folder in ``examples/models``.
        budget: what the rows that it is compared with share, e.g. ``4 of 8``.
        method: its name.
        steps: passes as in a recipe; ``"$seed"`` as a value stands for the seed.
        plan: makes the plan of the last step instead of planning (for random decisions).
        edit: changes the result (for random routers).
        seeds: the row is run once for each, and the losses averaged.
        random: it is the chance that the others of its budget must beat.
    """

    model: str
    budget: str
    method: str
    steps: Sequence[Mapping[str, Mapping[str, Any]]]
    plan: MakePlan | None = None
    edit: Edit | None = None
    seeds: tuple[int, ...] = (0,)
    random: bool = False

    @property
    def key(self) -> str:
        """Name in the results."""
        return f"{self.model} | {self.budget} | {self.method}"


def random_routers(editor: Editor, structure: Structure, seed: int) -> None:
    """Give every router weights by lot, and no bias."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in editor.graph.parameters().items():
        if ".router." in name:
            value = torch.randn(tensor.shape, generator=generator) if tensor.dim() > 1 else torch.zeros(tensor.shape)
            editor.set_tensor(name, value)


def one_expert(graph: Graph, structure: Structure, seed: int) -> DensifyMoEPlan:
    """Keep one expert of each mixture, by lot."""
    generator = torch.Generator().manual_seed(seed)
    decisions = []
    for site in structure.moes():
        weights = [0.0] * site.part.experts
        weights[int(torch.randint(site.part.experts, (1,), generator=generator))] = 1.0
        decisions.append(DensifyOne(site=site.name, weights=tuple(weights), scale=1.0, width=site.part.width))
    return DensifyMoEPlan(decisions=tuple(decisions))


def _moefy() -> list[Row]:
    rows = []
    for k in (4, 2):

        def row(method: str, k: int = k, **fields: Any) -> Row:
            shared = fields.get("shared", 0)
            step = {"experts": 8, "top_k": k - shared, **fields}
            return Row("tiny-llama", f"{k} of 8 parts", method, [{"moefy_ffn": step}])

        chance = {"experts": 8, "top_k": k, "split": "random", "seed": "$seed"}
        rows += [
            Row("tiny-llama", f"{k} of 8 parts", "random split and router", [{"moefy_ffn": chance}], None, random_routers,
                (0, 1, 2), True),
            row("random split, linear router", split="random"),
            row("kmeans, centroid router", router="centroid"),
            row("kmeans, similarity router", router="similarity"),
            row("kmeans, linear router"),
            row("kmeans, linear router to norm", target="norm"),
            row("kmeans, mlp router", **MLP),
            row("kmeans, mlp router to norm", **MLP, target="norm"),
            row("kmeans, mlp router, least_squares", **MLP, scaling="least_squares"),
            row("kmeans, linear router, mean_output", scaling="mean_output"),
            row("coactivation, linear router", split="coactivation"),
            row("coactivation, mlp router", split="coactivation", **MLP),
            row("importance, linear router", split="importance"),
            row("importance (activation), linear router", split="importance", importance="activation"),
            row("importance, mlp router", split="importance", **MLP),
        ]  # fmt: skip
        if k > 2:
            rows += [
                row("kmeans, 1 shared, linear router", shared=1),
                row("importance, 1 shared, linear router", shared=1, split="importance"),
                row("importance, overlap, least_squares", split="importance", overlap=True, scaling="least_squares"),
            ]
    for kind, thresholds in (("dynamic_k", (0.3, 0.5)), ("threshold", (0.08, 0.12))):
        for threshold in thresholds:
            fields = {"experts": 8, **MLP, "target": "norm", "select": kind, "threshold": threshold}
            rows.append(Row("tiny-llama", "as many as needed", f"{kind} {threshold}, kmeans, mlp", [{"moefy_ffn": fields}]))
    return rows


def _attention() -> list[Row]:
    budget, model = "1 of 2 key/value groups", "tiny-llama"
    base = {"top_k": 1}
    rows = [Row(model, budget, "attention: random router", [{"moefy_attention": base}], None, random_routers, (0, 1, 2), True)]
    for method, fields in {
        "attention: linear router": {}, "attention: mlp router": MLP,
        "attention: linear router, least_squares": {"scaling": "least_squares"},
        "attention: mlp router, least_squares": {**MLP, "scaling": "least_squares"},
    }.items():  # fmt: skip
        rows.append(Row(model, budget, method, [{"moefy_attention": {**base, **fields}}]))
    return rows


def _upcycle() -> list[Row]:
    return [
        Row("tiny-llama", "upcycled", method, [{"upcycle_ffn": fields}])
        for method, fields in {
            "8 copies, top 2": {"experts": 8, "top_k": 2},
            "8 copies in 4 shards, top 8, parity": {"experts": 32, "granularity": 4, "top_k": 8},
            "8 copies in 4 shards, top 8, published": {
                "experts": 32, "granularity": 4, "top_k": 8, "scaling": "published",
            },
            "8 copies in 4 shards, top 8, published, softmax first": {
                "experts": 32, "granularity": 4, "top_k": 8, "scaling": "published", "gate": "softmax_topk",
            },
            "8 copies, top 2, noise 0.1": {"experts": 8, "top_k": 2, "noise": 0.1},
            "8 copies, top 2, half redrawn": {"experts": 8, "top_k": 2, "reinitialise": 0.5},
        }.items()
    ]  # fmt: skip


def _densify() -> list[Row]:
    model, budget = "tiny-mixtral", "dense, 1 expert wide"
    rows = [Row(model, budget, "one expert by lot", [{"densify_moe": {}}], one_expert, None, (0, 1, 2), True)]
    for method, fields in {
        "mean": {}, "mean, uniform": {"weights": "uniform"}, "mean, not aligned": {"align": False},
        "learned": {"method": "learned"}, "svd": {"method": "svd"}, "top_columns": {"method": "top_columns"},
        "mean, refit": {"refit": True}, "learned, refit": {"method": "learned", "refit": True},
        "svd, refit": {"method": "svd", "refit": True}, "top_columns, refit": {"method": "top_columns", "refit": True},
    }.items():  # fmt: skip
        rows.append(Row(model, budget, f"densify: {method}", [{"densify_moe": fields}]))
    for method, fields in {"sum": {"method": "sum"}, "sum, refit": {"method": "sum", "refit": True}}.items():
        rows.append(Row(model, "dense, 8 experts wide", f"densify: {method}", [{"densify_moe": fields}]))
    return rows


def _merge() -> list[Row]:
    return [
        Row(model, budget, method, [{"merge_experts": fields}], None, None, seeds, random)
        for model, budget, method, fields, seeds, random in _moe_merge.rows()
    ]


ROWS: list[Row] = [
    Row("tiny-llama", "untouched", "dense", []),
    *_moefy(),
    *_attention(),
    *_upcycle(),
    Row("tiny-mixtral", "untouched", "mixture", []),
    *_densify(),
    *_merge(),
    *drop_rows(Row),
    *skip_rows(Row),
]

CLAIMS: list[tuple[str, str, str, str]] = [
    # source, better, worse (methods), budgets they are compared at (pattern)
    ("MoEfication: clustered parts beat random ones", "kmeans, linear router", "random split, linear router", "* of 8 parts"),
    ("MoEfication: co-activation beats parameter clustering", "coactivation, linear router", "kmeans, linear router", "*"),
    ("MoEfication: a trained router beats similarity", "kmeans, mlp router", "kmeans, similarity router", "*"),
    ("D2DMoE: predicting norms beats predicting mass", "kmeans, mlp router to norm", "kmeans, mlp router", "*"),
    ("LLaMA-MoE: gradients beat activations as importance", "importance, linear router",
     "importance (activation), linear router", "*"),
    ("LLaMA-MoE v2: shared neurons help", "importance, 1 shared, linear router", "importance, linear router", "*"),
    ("He et al.: virtual groups start as the dense model", "8 copies in 4 shards, top 8, parity",
     "8 copies in 4 shards, top 8, published", "*"),
    ("OneS: svd beats the mean", "densify: svd", "densify: mean", "*"),
    ("OneS: top columns beat the mean", "densify: top_columns", "densify: mean", "*"),
    ("ExFusion: learned weights beat the mean", "densify: learned", "densify: mean", "*"),
    *_moe_merge.CLAIMS,
    *_moe_drop.CLAIMS,
]  # fmt: skip


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
    graph = trace(EXAMPLES / model)
    spec = Calibration(text=EXAMPLES / "calibration.txt", samples=WINDOWS // 2, length=LENGTH)
    rows = tokenize_file(EXAMPLES / "heldout.txt", graph, LENGTH, None, lines=False, limit=WINDOWS, seed=1)
    held_out = collate(rows, graph, tokenizer_for(graph))
    return Bench(graph, discover(graph), load_data(spec, graph).calibration, held_out, lowered(graph))


def lowered(graph: Graph) -> Artifact:
    return make_backend("onnxruntime").lower(graph, Path(tempfile.mkdtemp()))


def operate(row: Row, seed: int) -> tuple[Graph, float]:
    """The model after the row's passes, and the seconds they took."""
    base = bench(row.model)
    graph, start = base.graph, time.perf_counter()
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
    seconds = time.perf_counter() - start
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
    # weights do not enter: but how many experts run does, where that is not fixed
    key = row.key if row.budget == "as many as needed" or "skipped" in row.budget else graph.fingerprint()
    if key not in base.latency:
        artifact = lowered(graph) if row.steps else base.artifact
        found: dict[str, float] = {}
        for name, (rows, length) in {"short": (1, 16), "long": (8, 128)}.items():
            batch = {key: value[:rows, :length].contiguous() for key, value in base.held_out.items()}
            with artifact.threads(1), base.artifact.threads(1):
                times = rounds(
                    {"untouched": lambda b=batch: base.artifact.run(b), "this": lambda b=batch: artifact.run(b)},
                    seconds=0.3, minimum=5,
                )  # fmt: skip
            found |= {f"{name}_ms": 1e3 * min(times["this"]), f"{name}_untouched_ms": 1e3 * min(times["untouched"])}
        base.latency[key] = found
    return base.latency[key]


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
    return found | (latency(row, graph) if with_latency else {})


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [
        "# Between dense networks and experts",
        "",
        "Made by `python benchmarks/moe.py`; every figure is explained there. Loss is next-token cross entropy in nats on "
        f"{WINDOWS} held-out windows of {LENGTH} tokens, after surgery alone, without any training. *Chance* is the mean of "
        "the random rows of the same budget. Latency is the artefact's (onnxruntime, float32, one thread, fastest run) for "
        "1 x 16 and 8 x 128 tokens, as a multiple of the untouched model's artefact measured in turn with it; on models as "
        "small as these it is mostly overhead of operators.",
    ]
    for model in dict.fromkeys(row["model"] for row in results.values()):
        lines += ["", f"## {model}", ""]
        lines.append("| budget | method | loss | over chance | parameters | active | 1 x 16 | 8 x 128 | seconds |")
        lines.append("|---|---|--:|--:|--:|--:|--:|--:|--:|")
        own = [row for row in results.values() if row["model"] == model]
        for budget in dict.fromkeys(row["budget"] for row in own):
            group = sorted((row for row in own if row["budget"] == budget), key=lambda row: row["loss"])
            chance = [row["loss"] for row in group if row["random"]]
            for row in group:
                gain = f"{row['loss'] - chance[0]:+.3f}" if chance and not row["random"] else ""
                times = [
                    f"{row[f'{n}_ms'] / row[f'{n}_untouched_ms']:.2f}" if f"{n}_ms" in row else "" for n in ("short", "long")
                ]
                figures = [f"{row['loss']:.4f}", gain, f"{row['parameters']:,}", f"{row['active']:,}", *times]
                lines.append(f"| {budget} | {row['method']} | {' | '.join(figures)} | {row['seconds']:.1f} |")
    lines += ["", "## Orders that papers claim", "", "| claim | budget | better | worse | holds |", "|---|---|--:|--:|---|"]
    for text, better, worse, pattern in CLAIMS:
        for row in results.values():
            other = results.get(f"{row['model']} | {row['budget']} | {worse}")
            if row["method"] == better and other is not None and fnmatchcase(row["budget"], pattern):
                holds = "yes" if row["loss"] < other["loss"] else "**no**"
                lines.append(f"| {text} | {row['budget']} | {row['loss']:.4f} | {other['loss']:.4f} | {holds} |")
    beaten = [
        f"{row['method']} ({row['budget']})"
        for row in results.values()
        for other in results.values()
        if other["random"] and (other["model"], other["budget"]) == (row["model"], row["budget"])
        and not row["random"] and row["loss"] >= other["loss"]
    ]  # fmt: skip
    lines += ["", f"Methods that do not beat chance at their budget: {', '.join(beaten) or 'none'}.", ""]
    return "\n".join(lines)


def main() -> None:
    parser = arguments(__doc__, "methods")
    parser.add_argument("--no-latency", action="store_true", help="skip lowering")
    options = parser.parse_args()
    torch.set_num_threads(1)
    before, path = earlier("moe.json"), RESULTS / "moe.json"
    results: dict[str, Any] = {}
    for row in ROWS:
        if is_wanted(options, row.method, row.key in before):
            found = measure(row, not options.no_latency)
            results[row.key] = {**before.get(row.key, {}), **found} if options.no_latency else found
            print(f"{row.key:90}{results[row.key]['loss']:9.4f}{results[row.key]['seconds']:8.1f} s", flush=True)
            path.write_text(json.dumps({**before, **results}, indent=1))
        elif row.key in before:
            results[row.key] = before[row.key]
    path.write_text(json.dumps(results, indent=1))
    (RESULTS / "moe.md").write_text(table(results))


if __name__ == "__main__":
    main()
