"""The demo's artefact against eager torch, and against plain dynamic int8 of the same model (the peer), in one run.

Everything is timed in turn on the same inputs and the same number of threads, once on one thread and once on all cores.
Targets of the demo: at least 2x faster than eager at batch 1 and 32 (length 128), cosine similarity of the sentence
embeddings at least 0.97, at most 35 % of the bytes.
"""

from __future__ import annotations

import os
import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch

import surgeon.building
from surgeon.final_check import latency_inputs
from surgeon.latency import compare, pinned_threads
from surgeon.recipe import load_recipe
from surgeon.source import load_source

RECIPE = Path(__file__).parents[1] / "examples" / "minilm.yaml"
VARIANTS = {
    "demo": [],
    "int8 alone": ["passes=[{quantize: {scheme: int8_dynamic, embeddings: true}}]"],
    "float32": ["passes=[]"],
}
BATCHES = (1, 32)


def main() -> None:
    eager = load_source(load_recipe(RECIPE).model.source)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        artifacts = {}
        print(f"{'':12}{'cosine':>10}{'bytes':>10}")
        for name, overrides in VARIANTS.items():
            recipe = load_recipe(RECIPE, [*overrides, "evaluate.latency=[]"])
            compiled = surgeon.building.compile_recipe(recipe, output=Path(folder) / name, progress=False)
            artifacts[name], report = compiled.artifact, compiled.report
            share, cosine = report.bytes[1] / report.bytes[0], report.quality["artifact_cosine_similarity"]
            print(f"{name:12}{cosine:10.4f}{share:10.1%}", flush=True)
        print(f"\nfaster than eager torch at length {load_recipe(RECIPE).evaluate.length}: by the median (by the minimum)")
        print(f"{'':12}" + "".join(f"{f'batch {size}, {threads} threads':>26}" for threads in _threads() for size in BATCHES))
        rows: dict[str, list[str]] = {name: [] for name in VARIANTS}
        for threads in _threads():
            for size in BATCHES:
                batch = latency_inputs(compiled.graph, size, 128)
                functions = {"eager": partial(eager.outputs, **batch)}
                with ExitStack() as stack:
                    stack.enter_context(pinned_threads(threads))
                    for name, artifact in artifacts.items():
                        stack.enter_context(artifact.threads(threads))
                        functions[name] = partial(artifact.run, batch)
                    times = compare(functions, minimum=9)
                for name in VARIANTS:
                    median, least = (
                        getattr(times["eager"], which) / getattr(times[name], which) for which in ("median_ms", "min_ms")
                    )
                    rows[name].append(f"{median:.2f}x ({least:.2f}x)")
        for name, cells in rows.items():
            print(f"{name:12}" + "".join(f"{cell:>26}" for cell in cells))


def _threads() -> list[int]:
    return sorted({1, os.cpu_count() or 1})


if __name__ == "__main__":
    main()
