"""Operating on a model on a GPU beside the same on the CPU: seconds of each pass, and how alike the results are.

A random Llama-shaped decoder in bfloat16; GPTQ, SparseGPT, factoring, pruning of neurons and heads and dropping of blocks
(budgets shared out by loss too), each alone on the same random tokens.  The CPU has all its cores.  ``same`` is the share of
tokens for which both results predict the same token, ``KL`` their divergence from the source, which must be alike: sums round
in another order there.

    python benchmarks/device.py
    python benchmarks/device.py --hidden 4096 --layers 2 --length 2048

Without a GPU it says so and exits with 3.
"""

from __future__ import annotations

import argparse
import sys

import torch
from gpu import NO_GPU
from transformers import LlamaConfig, LlamaForCausalLM

import surgeon
from surgeon.compiled import Compiled

STEPS = {
    "quantize int4": {"quantize": {"scheme": "int4", "algorithm": "gptq", "group": 128}},
    "quantize mixed": {"quantize": {"scheme": "mixed", "bits": 3, "of": [2, 4, 8], "algorithm": "gptq", "group": 128}},
    "sparsify 2:4": {"sparsify": {"pattern": "2:4"}},
    "sparsify loss": {"sparsify": {"sparsity": 0.5, "allocation": "loss"}},
    "low_rank": {"low_rank": {"ratio": 0.8}},
    "low_rank loss": {"low_rank": {"ratio": 0.8, "allocation": "loss"}},
    "drop_neurons": {"drop_neurons": {"ratio": 0.25, "multiple": 64}},
    "drop_heads": {"drop_heads": {"ratio": 0.5}},
    "drop_blocks": {"drop_blocks": {"count": 1}},
}


def model_of(hidden: int, layers: int) -> LlamaForCausalLM:
    """A decoder of random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=11 * hidden // 4, num_hidden_layers=layers, num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 256), vocab_size=32000, dtype="bfloat16",
    )  # fmt: skip
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def main(arguments: list[str]) -> int:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--device", default="cuda", help="beside the CPU")
    for name, value in (("hidden", 2048), ("layers", 4), ("batches", 8), ("batch", 4), ("length", 512)):
        options.add_argument(f"--{name}", type=int, default=value)
    options.add_argument("--steps", nargs="*", choices=list(STEPS), default=list(STEPS))
    given = options.parse_args(arguments)
    if given.device.startswith("cuda") and not torch.cuda.is_available():
        print("benchmarks/device.py: no CUDA device is here; nothing was measured")
        return NO_GPU
    generator = torch.Generator().manual_seed(0)
    shape = (given.batch, given.length)
    rows = [torch.randint(0, 32000, shape, generator=generator) for _ in range(given.batches + 1)]
    data = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in rows]
    card = torch.cuda.get_device_name() if given.device.startswith("cuda") else given.device
    print(f"torch {torch.__version__}, {card}, {torch.get_num_threads()} threads of the CPU, bfloat16, {given}")
    print(f"{'':16}{'CPU s':>9}{'device s':>10}{'faster':>9}{'KL CPU':>11}{'KL device':>11}{'same':>7}")
    for name in given.steps:
        built: list[Compiled] = [
            surgeon.compile(
                model_of(given.hidden, given.layers), [STEPS[name]], inputs=data[0], calibration=data, backend=None,
                device=device, progress=False,
            )
            for device in ("cpu", given.device)
        ]  # fmt: skip
        here, there = (one.report.passes[0].seconds for one in built)
        divergence = [one.report.quality["kl"] for one in built]
        with torch.no_grad():
            tokens = [one.graph(**data[-1])["logits"].argmax(-1) for one in built]
        same = float((tokens[0] == tokens[1]).double().mean())
        times = f"{here:9.1f}{there:10.1f}{here / there:8.2f}x"
        print(f"{name:16}{times}{divergence[0]:11.4f}{divergence[1]:11.4f}{same:7.1%}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
