"""Prune a model, fine-tune what is left, then store it in 4 bits and lower it: each step on the result of the one before.

    python examples/recover.py

The rewritten graph is a differentiable torch function over its own parameters, so any training loop works on it; here it learns
to predict what the source model predicts (distillation), on the text that calibrates the passes.  A minute on a laptop.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

import surgeon

HERE = Path(__file__).parent
MODEL, TEXT = HERE / "models" / "tiny-llama", HERE / "models" / "calibration.txt"
OUTPUT = HERE.parent / "build" / "recover"


def divergence(source: surgeon.Graph, graph: surgeon.Graph, ids: Tensor) -> Tensor:
    """Kullback-Leibler divergence of a graph's predictions from the source's, in nats per token."""
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        wanted = source(**given)["logits"].flatten(0, 1).log_softmax(-1)
    found = graph(**given)["logits"].flatten(0, 1).log_softmax(-1)
    return torch.nn.functional.kl_div(found, wanted, reduction="batchmean", log_target=True)


def main(output: Path = OUTPUT, steps: int = 60) -> list[float]:
    """Returns the divergence from the source after pruning, after fine-tuning and after quantizing, on text kept for this."""
    from transformers import AutoTokenizer

    calibration = {"text": str(TEXT), "samples": 64, "length": 128}
    source = surgeon.trace(MODEL)
    tokenizer, text = AutoTokenizer.from_pretrained(MODEL), TEXT.read_text(encoding="utf-8")
    tokens = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]
    windows = tokens[: len(tokens) // 128 * 128].reshape(-1, 128)
    training, held_back = windows[:-16], windows[-16:]

    pruned = surgeon.compile(
        MODEL, [{"drop_neurons": {"ratio": 0.5}}, {"drop_heads": {"ratio": 0.25, "unit": "query"}}], calibration=calibration,
        backend=None, progress=False,
    )  # fmt: skip
    graph = pruned.graph
    assert graph is not None
    figures = [divergence(source, graph, held_back).item()]

    optimizer = torch.optim.AdamW(graph.module.parameters(), lr=5e-4)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        rows = torch.randint(len(training), (8,), generator=generator)
        optimizer.zero_grad()
        divergence(source, graph, training[rows]).backward()
        optimizer.step()
    with torch.no_grad():
        figures.append(divergence(source, graph, held_back).item())

    stored = surgeon.compile(  # what was fine-tuned is what this is compared with
        pruned, [{"quantize": {"scheme": "int4", "algorithm": "gptq"}}], calibration=calibration, output=output, force=True,
        progress=False,
    )  # fmt: skip
    assert stored.graph is not None
    with torch.no_grad():
        figures.append(divergence(source, stored.graph, held_back).item())
    for name, figure in zip(("pruned", "fine-tuned", "in 4 bits"), figures, strict=True):
        print(f"{name:12}{figure:8.3f} nats per token from the source")
    print(f"{source.nbytes() / 1e6:.1f} MB -> {stored.report.bytes[1] / 1e6:.1f} MB in {stored.folder}")
    return figures


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
