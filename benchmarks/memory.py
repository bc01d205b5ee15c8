"""Peak memory of a compile in units of the model's own bytes, above the runtime's floor.

The floor is the peak of the same build on a model of no size: what Python, torch, the exporter and ONNX Runtime take.
Each build runs in a process of its own, so that one peak does not hide another.  Target: at most 2.5.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

RECIPES = {
    "nothing": [],
    "quantize int8": [{"quantize": {"scheme": "int8"}}],
    "quantize int4": [{"quantize": {"scheme": "int4", "embeddings": True}}],
    "low_rank svd": [{"low_rank": {"ratio": 0.5, "method": "svd"}}],
    "drop_blocks": [{"drop_blocks": {"count": 2}}],
}


def write_model(folder: Path, hidden: int) -> int:
    """A random decoder, of about 0.5 GB at a hidden size of 1024; returns its bytes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=11 * hidden // 4, num_hidden_layers=8, num_attention_heads=16,
        num_key_value_heads=4, vocab_size=16 * hidden, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return sum(parameter.nbytes for parameter in model.parameters())


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def build(folder: str, passes: str) -> None:
    """Child process: build, and print the peak."""
    import torch

    import surgeon

    torch.set_num_threads(1)
    steps = json.loads(passes)
    data = None
    if any("drop_blocks" in step for step in steps):
        generator = torch.Generator().manual_seed(0)
        data = [
            {"input_ids": (ids := torch.randint(0, 1000, (4, 64), generator=generator)), "attention_mask": torch.ones_like(ids)}
            for _ in range(4)
        ]
    with tempfile.TemporaryDirectory() as target:
        surgeon.compile(folder, steps, calibration=data, output=Path(target) / "out", task="forward", progress=False)
    print(peak())


def main() -> None:
    if len(sys.argv) == 3:
        build(sys.argv[1], sys.argv[2])
        return
    with tempfile.TemporaryDirectory() as folder:
        small, large = Path(folder) / "small", Path(folder) / "large"
        write_model(small, 64)
        size = write_model(large, 1024)
        print(f"model {size / 1e6:.0f} MB in float32")
        print(f"{'passes':16}{'floor':>10}{'peak':>10}{'above the floor / model':>26}")
        for name, passes in RECIPES.items():
            floor, top = (
                int(
                    subprocess.run(
                        [sys.executable, __file__, str(model), json.dumps(passes)], check=True, capture_output=True, text=True
                    ).stdout.split()[-1]
                )
                for model in (small, large)
            )
            print(f"{name:16}{floor / 1e6:7.0f} MB{top / 1e6:7.0f} MB{(top - floor) / size:25.2f}x", flush=True)


if __name__ == "__main__":
    main()
