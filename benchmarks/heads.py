"""What attention loses with its heads: every criterion of ``drop_heads``, with and without the refit, at 25 and 50 %.

    python benchmarks/heads.py

The models are trained ones that come with this repository, two language models (loss on held-out text), and a sentence encoder
(squared distance of its normalised embeddings from the source's).  Of ``random`` the mean over three lots is given.  Writes
``benchmarks/results/heads.json`` and ``heads.md``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surgeon.data import Data, collate, load_data, tokenize_file, tokenizer_for
from surgeon.discovery import discover
from surgeon.environment import versions_of
from surgeon.graph import Graph
from surgeon.pipeline import operate
from surgeon.progress import Progress
from surgeon.recipe import Calibration
from surgeon.registry import make_pass
from surgeon.tracing import trace

ROOT = Path(__file__).parents[1]
MODELS = ROOT / "examples" / "models"
RESULTS = Path(__file__).parent / "results"
CRITERIA = ("reconstruction", "activation", "magnitude", "random")
LOTS = (0, 1, 2)

Score = Callable[[Graph], float]


def language(name: str) -> tuple[Graph, Data, Score]:
    """A language model, calibration text, and its loss on held-out text in nats per token."""
    graph = trace(MODELS / name, dtype="float32")
    data = load_data(Calibration(text=MODELS / "calibration.txt", samples=32, length=128), graph)
    rows = tokenize_file(MODELS / "heldout.txt", graph, 128, None, lines=False, limit=32, seed=1)
    held_out = collate(rows, graph, tokenizer_for(graph))

    @torch.no_grad()
    def loss(changed: Graph) -> float:
        logits = changed(**held_out)["logits"][:, :-1].flatten(0, 1)
        return float(torch.nn.functional.cross_entropy(logits, held_out["input_ids"][:, 1:].flatten()))

    return graph, data, loss


def encoder() -> tuple[Graph, Data, Score]:
    """MiniLM, calibration sentences, and the mean squared distance of sentence embeddings from the source's."""
    from tests.models import minilm_path

    graph = trace(minilm_path(), dtype="float32")
    sentences = Calibration(text=ROOT / "examples" / "calibration-sentences.txt", unit="line", samples=256, length=64)
    data = load_data(sentences, graph)
    rows = tokenize_file(ROOT / "examples" / "sentences.txt", graph, 64, None, lines=True, limit=128, seed=1)
    held_out = collate(rows, graph, tokenizer_for(graph))
    wanted = _embedded(graph, held_out)
    return graph, data, lambda changed: float((_embedded(changed, held_out) - wanted).square().sum(-1).mean())


@torch.no_grad()
def _embedded(graph: Graph, inputs: dict[str, Tensor]) -> Tensor:
    hidden, mask = graph(**inputs)["last_hidden_state"], inputs["attention_mask"][..., None]
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def dropped(graph: Graph, data: Data, score: Score, fields: dict[str, Any]) -> tuple[float, int]:
    """Score and parameters without some heads."""
    step = make_pass({"drop_heads": fields})
    changed, *_ = operate(step, graph, discover(graph), data, None, Progress(False))
    return score(changed), changed.parameter_count()


def measure(names: list[str]) -> dict[str, Any]:
    """Scores of all models, criteria and ratios."""
    found: dict[str, Any] = {}
    for name in names:
        graph, data, score = encoder() if name == "MiniLM" else language(name)
        attention = next(iter(discover(graph).attentions())).part
        rows: list[dict[str, Any]] = []
        for unit in ("group", "query") if attention.kv_heads < attention.heads else ("group",):
            for ratio in (0.25, 0.5):
                if int(ratio * (attention.kv_heads if unit == "group" else attention.heads // attention.kv_heads)) == 0:
                    continue  # rounded down, nothing goes
                for refit in (True, False):
                    for criterion in CRITERIA:
                        fields = {"ratio": ratio, "unit": unit, "criterion": criterion, "refit": refit}
                        lots = LOTS if criterion == "random" else LOTS[:1]
                        results = [dropped(graph, data, score, fields | {"seed": seed}) for seed in lots]
                        value = sum(result for result, _ in results) / len(results)
                        rows.append({**fields, "score": value, "parameters": results[0][1]})
                        print(name, rows[-1], flush=True)
        found[name] = {
            "heads": attention.heads,
            "kv_heads": attention.kv_heads,
            "source": score(graph),
            "parameters": graph.parameter_count(),
            "rows": rows,
        }
    return found


def page(found: dict[str, Any], versions: dict[str, str]) -> str:
    """The results as Markdown."""
    lines = ["# Dropping heads", ""]
    lines += [f"Made by `python benchmarks/heads.py`; {', '.join(f'{key} {value}' for key, value in versions.items())}.", ""]
    lines += ["Loss on held-out text in nats per token; of MiniLM the mean squared distance of sentence embeddings of norm 1."]
    lines += ["`refit` is the default; *none* leaves the output projection as it is. Of `random` the mean of three lots."]
    lines += ["Shares are rounded down to whole heads; combinations in which nothing would go are left out."]
    for name, model in found.items():
        lines += ["", f"## {name}", ""]
        lines += [
            f"{model['heads']} heads, {model['kv_heads']} key/value heads, {model['parameters']:,} parameters; "
            f"whole: {model['source']:.4f}.", "",
            "| unit | removed | parameters | refit | " + " | ".join(f"`{criterion}`" for criterion in CRITERIA) + " |",
            "|---|---:|---:|---|" + "---:|" * len(CRITERIA),
        ]  # fmt: skip
        table: dict[tuple[Any, ...], dict[str, float]] = {}
        for row in model["rows"]:
            key = (row["unit"], row["ratio"], row["parameters"], row["refit"])
            table.setdefault(key, {})[row["criterion"]] = row["score"]
        for (unit, ratio, parameters, refit), scores in table.items():
            cells = " | ".join(f"{scores[criterion]:.4f}" for criterion in CRITERIA)
            lines.append(f"| {unit} | {ratio:.0%} | {parameters:,} | {'yes' if refit else 'none'} | {cells} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    torch.manual_seed(0)
    found = measure(["tiny-llama", "tiny-mixtral", "MiniLM"])
    versions = versions_of("surgeon", "torch", "transformers")
    print(page(found, versions))
    (RESULTS / "heads.md").write_text(page(found, versions), encoding="utf-8")
    data = json.dumps({"versions": versions, "models": found}, indent=1)
    (RESULTS / "heads.json").write_text(data + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
