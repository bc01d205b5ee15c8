"""The demo's artefact against eager torch, and against plain dynamic int8 of the same model (the peer), in one run.

Targets: at least 2x faster than eager at batch 1 and 32 (length 128), cosine similarity at least 0.97, at most 35 % of
the bytes.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

import surgeon.pipeline
from surgeon.recipe import load_recipe

RECIPE = Path(__file__).parents[1] / "examples" / "minilm.yaml"
VARIANTS = {
    "demo": [],
    "int8 alone": ["passes=[{quantize: {scheme: int8_dynamic, embeddings: true}}]"],
    "float32": ["passes=[]"],
}


def main() -> None:
    torch.set_num_threads(2)
    print(f"{'':12}{'batch 1':>10}{'batch 32':>10}{'cosine':>9}{'bytes':>9}   (faster than eager torch; length 128, 2 threads)")
    for name, overrides in VARIANTS.items():
        recipe = load_recipe(RECIPE, [*overrides, "evaluate.threads=2"])
        with tempfile.TemporaryDirectory() as folder:
            report = surgeon.pipeline.compile_recipe(recipe, output=Path(folder) / "out", progress=False).report
        speed = {row.batch: row.eager_ms / row.artifact_ms for row in report.latency}
        share = report.bytes[1] / report.bytes[0]
        cosine = report.quality["artifact_cosine_similarity"]
        print(f"{name:12}{speed[1]:9.2f}x{speed[32]:9.2f}x{cosine:9.4f}{share:9.1%}", flush=True)


if __name__ == "__main__":
    main()
