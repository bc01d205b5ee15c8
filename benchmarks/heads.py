"""What attention loses with its heads: every criterion of ``drop_heads``, with and without the refit, at 25 and 50 %.

    python benchmarks/heads.py

The models are trained ones that come with this repository, two language models (loss on held-out text), and a sentence encoder
(squared distance of its normalised embeddings from the source's).  Of ``random`` the mean over three lots is given.  Writes
``benchmarks/results/heads.json`` and ``heads.md``.
"""

from __future__ import annotations

from typing import Any

import torch
from _rows import write
from _trained import Judge, changed_by, language_model, sentence_encoder

from surgeon.data import Data
from surgeon.discovery import discover
from surgeon.environment import versions_of
from surgeon.graph import Graph

CRITERIA = ("reconstruction", "activation", "magnitude", "random")
LOTS = (0, 1, 2)

def subject(name: str) -> tuple[Graph, Data, Judge]:
    """A model, calibration data, and its loss, or the mean squared distance of sentence embeddings from the source's."""
    if name != "MiniLM":
        return language_model(name, samples=32, windows=32)
    fields = {"samples": 256, "length": 64}
    return sentence_encoder(fields, 128, 1, lambda found, wanted: float((found - wanted).square().sum(-1).mean()))


def dropped(graph: Graph, data: Data, score: Judge, fields: dict[str, Any]) -> tuple[float, int]:
    """Score and parameters without some heads."""
    changed = changed_by({"drop_heads": fields}, graph, data)
    return score(changed), changed.parameter_count()


def measure(names: list[str]) -> dict[str, Any]:
    """Scores of all models, criteria and ratios."""
    found: dict[str, Any] = {}
    for name in names:
        graph, data, score = subject(name)
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
    write("heads", page(found, versions), versions, found)


if __name__ == "__main__":
    main()
