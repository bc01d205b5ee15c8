"""How much 4-bit weights and 8-bit activations lose on trained models; llm-compressor beside it where it is installed.

    python benchmarks/quantize.py
    pip install llmcompressor && python benchmarks/quantize.py

All weights of linears and experts in 4 bits, but for the output matrix and routers, and all linears in ``int8_dynamic``; 48
sequences of 256 tokens to calibrate, others to measure.  *kl* is the mean Kullback-Leibler divergence of the next token's
distribution from that of the model itself, in thousandths of a nat; *loss* what the cross entropy rises by; *seconds* what
the passes take, on one thread.  llm-compressor's modifiers quantize the model of transformers (of two orders of columns that
its GPTQ has, the better one is given), on the same sequences.  They see linears, not stacked experts, so they are beside the
dense model only.
Writes ``benchmarks/results/quantize.json`` and ``quantize.md``.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import surgeon
from surgeon.environment import versions_of

RESULTS = Path(__file__).parent / "results"
MODELS = Path(__file__).parent.parent / "examples" / "models"
NAMES = ("tiny-llama", "tiny-mixtral", "tiny-upcycled")
FOUR_BITS = {
    f"int4, group {group}{'' if symmetric else ', zero points'}": {
        "scheme": "int4", "group": group, "symmetric": symmetric, "blocks": ":"
    }
    for group in (32, 128) for symmetric in (True, False)
}  # fmt: skip
FOUR_BIT_METHODS: dict[str, dict[str, Any]] = {
    "nearest": {},
    "nearest, scales: search": {"scales": "search"},
    "gptq, scales: range": {"algorithm": "gptq", "scales": "range"},
    "gptq": {"algorithm": "gptq"},
}
EIGHT_BIT_METHODS: dict[str, list[dict[str, Any]]] = {
    "nearest": [],
    "smooth: {alpha: 0.5}": [{"smooth": {"alpha": 0.5}}],
    "smooth": [{"smooth": {}}],
    "smooth: {insert: false}": [{"smooth": {"insert": False}}],
}
SEQUENCES, LENGTH = 48, 256


def sequences(model: str, text: str) -> Tensor:
    """Token ids [sequences, length] of one of the texts beside the models."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODELS / model)
    ids = tokenizer((MODELS / text).read_text(), return_tensors="pt")["input_ids"][0]
    return ids[: SEQUENCES * LENGTH].reshape(SEQUENCES, LENGTH)


def source(model: str) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(MODELS / model, dtype=torch.float32).eval()


def measured(run: Any, ids: Tensor, want: Tensor) -> dict[str, float]:
    """Divergence and rise of the loss of what gives logits, beside those of the model itself."""
    with torch.no_grad():
        logits = torch.cat([run(input_ids=rows, attention_mask=torch.ones_like(rows))["logits"] for rows in ids.split(8)])
    losses = [
        float(torch.nn.functional.cross_entropy(each[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))
        for each in (want, logits)
    ]
    before, after = want.log_softmax(-1), logits.log_softmax(-1)
    return {"kl": float((before.exp() * (before - after)).sum(-1).mean()), "loss": losses[1] - losses[0]}


def ours(
    model: str, steps: list[dict[str, Any]], calibration: Tensor, held_out: Tensor, want: Tensor
) -> dict[str, float]:
    batches = [{"input_ids": rows, "attention_mask": torch.ones_like(rows)} for rows in calibration.split(8)]
    compiled = surgeon.compile(
        MODELS / model,
        steps,
        calibration=batches,
        dtype="float32",
        backend=None,
        progress=False,
    )
    return {**measured(compiled, held_out, want), "seconds": sum(each.seconds for each in compiled.report.passes)}


def peer(
    model: str, group: int, symmetric: bool, algorithm: str, calibration: Tensor, held_out: Tensor, want: Tensor
) -> dict[str, float] | None:
    """The same by llm-compressor, None where it is not installed."""
    try:
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
        from llmcompressor import oneshot
        from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
    except ImportError:
        return None
    found = []
    for order in (None, "static") if algorithm == "gptq" else (None,):
        extra = {} if algorithm == "nearest" else {"actorder": order}
        weights = QuantizationArgs(
            num_bits=4, type="int", symmetric=symmetric, strategy="group", group_size=group, **extra
        )
        scheme = {"group": QuantizationScheme(targets=["Linear"], weights=weights)}
        modifier = (GPTQModifier if algorithm == "gptq" else QuantizationModifier)(
            config_groups=scheme, ignore=["lm_head"], **extra
        )
        module = source(model)
        rows = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in calibration]
        start = time.perf_counter()
        oneshot(
            model=module,
            dataset=torch.utils.data.DataLoader(rows, batch_size=8),
            recipe=modifier,
            max_seq_length=LENGTH,
            num_calibration_samples=len(rows),
        )
        seconds = time.perf_counter() - start
        found.append({**measured(module, held_out, want), "seconds": seconds})
    return min(found, key=lambda row: row["kl"])


def rows_of(model: str) -> list[dict[str, Any]]:
    calibration, held_out = (sequences(model, text) for text in ("calibration.txt", "heldout.txt"))
    module = source(model)
    with torch.no_grad():
        want = torch.cat([module(input_ids=rows).logits for rows in held_out.split(8)])
    del module
    rows = []
    for label, form in FOUR_BITS.items():
        for name, fields in FOUR_BIT_METHODS.items():
            figures = ours(model, [{"quantize": {**form, **fields}}], calibration, held_out, want)
            rows.append({"model": model, "form": label, "method": name, **figures})
            print(rows[-1], flush=True)
        for algorithm in ("nearest", "gptq") if model == "tiny-llama" else ():
            other = peer(model, form["group"], form["symmetric"], algorithm, calibration, held_out, want)
            if other is not None:
                rows.append({"model": model, "form": label, "method": f"llm-compressor, {algorithm}", **other})
                print(rows[-1], flush=True)
    for name, steps in EIGHT_BIT_METHODS.items():
        figures = ours(model, [*steps, {"quantize": {"scheme": "int8_dynamic"}}], calibration, held_out, want)
        rows.append({"model": model, "form": "int8_dynamic", "method": name, **figures})
        print(rows[-1], flush=True)
    return rows


def table(results: dict[str, Any]) -> str:
    rows = results["rows"]
    lines = [
        "# What 4-bit weights and 8-bit activations lose",
        "",
        "Made by `python benchmarks/quantize.py`, which says what is measured. Thousandths of a nat per token; "
        "*of nearest* is the divergence over that of `nearest` in the same form. "
        + ", ".join(f"{name} {version}" for name, version in results["versions"].items() if version),
        "",
        "| model | form | method | kl | of nearest | loss | seconds |",
        "|---|---|---|--:|--:|--:|--:|",
    ]
    for row in rows:
        plain = next(
            other["kl"]
            for other in rows
            if other["method"] == "nearest" and all(other[key] == row[key] for key in ("model", "form"))
        )
        lines.append(
            f"| {row['model']} | {row['form']} | {row['method']} | {1e3 * row['kl']:.1f} | {row['kl'] / plain:.2f} "
            f"| {1e3 * row['loss']:.1f} | {row['seconds']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    torch.set_num_threads(1)
    rows = [row for model in NAMES for row in rows_of(model)]
    results = {
        "versions": versions_of("torch", "transformers", "llmcompressor", "compressed_tensors"),
        "sequences": SEQUENCES,
        "length": LENGTH,
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "quantize.json").write_text(json.dumps(results, indent=1) + "\n")
    (RESULTS / "quantize.md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
