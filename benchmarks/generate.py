"""Decoded tokens per second of an ONNX Runtime artefact against eager transformers (the peer), batch 1, one thread.

Both continue the same prompt greedily with their caches, in turn; the tokens must be equal.  Target: at least as fast.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import surgeon

PROMPT, NEW, ROUNDS = 64, 64, 5


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4, "vocab_size": 8000}
    return LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=8, num_key_value_heads=2)).eval()


def main() -> None:
    torch.set_num_threads(1)
    module = model()
    ids = torch.randint(3, 8000, (1, PROMPT), generator=torch.Generator().manual_seed(1))
    with tempfile.TemporaryDirectory() as folder:
        compiled = surgeon.compile(
            module, [], task="text-generation", backend={"onnxruntime": {"threads": 1}},
            output=Path(folder) / "out", progress=False,
        )  # fmt: skip
        candidates = {
            "eager": lambda: module.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, eos_token_id=None
            ),
            "artefact": lambda: compiled.generate(ids, max_new_tokens=NEW, eos_token_id=()),
        }
        first, second = (run() for run in candidates.values())
        assert torch.equal(first, second), "the artefact generates other tokens"
        rates: dict[str, list[float]] = {name: [] for name in candidates}
        for _ in range(ROUNDS):
            for name, run in candidates.items():
                start = time.perf_counter()
                run()
                rates[name].append(NEW / (time.perf_counter() - start))
        middle = {name: statistics.median(values) for name, values in rates.items()}
        for name, rate in middle.items():
            print(f"{name:10}{rate:8.1f} tokens/s{rate / middle['eager']:7.2f}x eager")
        details = compiled.artifact.details if compiled.artifact is not None else {}
        print(f"{details['nodes']} ONNX nodes, {details['nodes'] / 4:.1f} per block")


if __name__ == "__main__":
    main()
