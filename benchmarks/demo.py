"""The demo's artefact against eager torch, and against plain dynamic int8 of the same model (the peer), in one run.

Everything is timed in turn on the same inputs and the same number of threads, once on one thread and once on all cores.
Targets of the demo: at least 2x faster than eager at batch 1 and 32 (length 128), cosine similarity of the sentence
embeddings at least 0.97, at most 35 % of the bytes.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import surgeon.building
from surgeon.bench import bench
from surgeon.candidates import ArtifactCandidate, Candidate, EagerCandidate
from surgeon.recipe import load_recipe
from surgeon.source import calling, load_source

RECIPE = Path(__file__).parents[1] / "examples" / "minilm.yaml"
VARIANTS = {
    "demo": [],
    "int8 alone": ["passes=[{quantize: {scheme: int8_dynamic, embeddings: true}}]"],
    "float32": ["passes=[]"],
}
BATCHES = (1, 32)


def main() -> None:
    eager = load_source(load_recipe(RECIPE).model.source)
    with tempfile.TemporaryDirectory() as folder, calling(eager.module):
        built = []
        print(f"{'':12}{'cosine':>10}{'bytes':>10}")
        for name, overrides in VARIANTS.items():
            recipe = load_recipe(RECIPE, [*overrides, "evaluate.latency=[]"])
            compiled = surgeon.building.compile_recipe(recipe, output=Path(folder) / name, progress=False)
            report = compiled.report
            built.append(ArtifactCandidate(name, compiled.artifact, compiled.graph.example))
            share, cosine = report.bytes[1] / report.bytes[0], report.quality["artifact_cosine_similarity"]
            print(f"{name:12}{cosine:10.4f}{share:10.1%}", flush=True)
        print(f"\nfaster than eager torch at length {load_recipe(RECIPE).evaluate.length}: by the median (by the minimum)")
        print(f"{'':12}" + "".join(f"{f'batch {size}, {threads} threads':>26}" for threads in _threads() for size in BATCHES))
        rows: dict[str, list[str]] = {name: [] for name in VARIANTS}
        candidates: list[Candidate] = [EagerCandidate.beside(eager, built[0]), *built]
        for threads in _threads():
            result = bench(candidates, batches=BATCHES, sequences=(128,), threads=threads, seconds=6.0)
            for base, *others in result.cases():
                for row in others:
                    median, least = base.median_ms / row.median_ms, base.min_ms / row.min_ms
                    rows[row.candidate].append(f"{median:.2f}x ({least:.2f}x)")
        for name, cells in rows.items():
            print(f"{name:12}" + "".join(f"{cell:>26}" for cell in cells))


def _threads() -> list[int]:
    return sorted({1, os.cpu_count() or 1})


if __name__ == "__main__":
    main()
