"""Decoded tokens per second of an ONNX Runtime artefact against its peers, batch 1, one thread unless asked otherwise.

Peers, all on the same weights: eager transformers with its cache; the ONNX decoder that ``transformers.exporters`` writes with
its own fusions for ONNX Runtime; the model that the builder of onnxruntime-genai writes, run by that library.  Every side
continues one prompt greedily, in turn, round after round; the tokens must be equal (of float32 weights).  The artefact is
run as it is written by default, with shared caches (``caches: shared``), and with those by onnxruntime-genai (``genai:
true``), whose loop is not Python.  The clock runs from
the first new token to the last, so the prompt is not in it.  What is reported is the median over rounds of each round's
ratio, which a busy machine disturbs least.

Two shapes: that of SmolLM2-135M, a language model in use; and one of 15 million parameters, on which a tenth of the time is
not spent on weights.  The artefacts' weights lie on huge pages, where 500 tokens of warm-up would have moved them
(``surgeon.huge_pages``); one side shows what it is like before.

Targets: float32 (the fastest form of the artefact) at least as fast as the best peer, at most 25 ONNX nodes per block, int4
weights at least 3 times eager.

    python benchmarks/generate.py --threads 1 --rounds 11 --write
    python benchmarks/generate.py --shapes 15M
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import surgeon
from surgeon.huge_pages import Memory

PROMPT, NEW = 64, 64
SHARED, GENAI, SMALL = ", shared caches", ", shared caches, in onnxruntime-genai", ", small pages"
"""Forms of the artefact beside the one written by default."""
SHAPES: dict[str, dict[str, Any]] = {
    "135M": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152,
        "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
    },
    "15M": {
        "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4, "vocab_size": 8000,
        "num_attention_heads": 8, "num_key_value_heads": 2,
    },
}  # fmt: skip
"""Configurations by about how many parameters they have."""
HERE = Path(__file__).parent
Run = Callable[[], tuple[list[int], float]]
"""Generates once: the new tokens, and seconds from the first to the last."""


def model(shape: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPES[shape])).eval()


class Clock:
    """A streamer that notes when tokens come."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Note the time of one token, or of the prompt."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to note."""

    def seconds(self) -> float:
        """From the first new token to the last."""
        return self.times[-1] - self.times[1]  # the prompt comes first


def eager(module: LlamaForCausalLM, ids: torch.Tensor) -> Run:
    def run() -> tuple[list[int], float]:
        clock = Clock()
        found = module.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, eos_token_id=None, streamer=clock
        )
        return found[0, PROMPT:].tolist(), clock.seconds()

    return run


def artefact(compiled: surgeon.Compiled, ids: torch.Tensor) -> Run:
    def run() -> tuple[list[int], float]:
        clock = Clock()
        found = compiled.generate(ids, max_new_tokens=NEW, eos_token_id=(), streamer=clock)
        return found[0, PROMPT:].tolist(), clock.seconds()

    return run


def exported(module: LlamaForCausalLM, ids: torch.Tensor, folder: Path, threads: int) -> tuple[Run, int]:
    """The library's ONNX decoder, its caches kept in the runtime's memory; also its number of nodes."""
    import onnxruntime
    from transformers.exporters import OnnxConfig, OnnxExporter

    folder.mkdir()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    parts = OnnxExporter().export_for_generation(
        module, inputs, OnnxConfig(dynamic=True, ort_fusions="cpu"), multi_token_decode=True
    )
    path = folder / "decode.onnx"
    onnx_ir.save(parts.components["decode"].program, path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    pasts = [port for port in session.get_inputs() if len(port.shape) == 4]
    presents = [port.name for port in session.get_outputs() if len(port.shape) == 4]
    names = {port.name for port in session.get_inputs()}
    logits = next(port.name for port in session.get_outputs() if "logits" in port.name)

    def run() -> tuple[list[int], float]:
        heads, size = module.config.num_key_value_heads, module.config.head_dim
        empty = np.zeros((1, heads, 0, size), np.float32)
        caches = [onnxruntime.OrtValue.ortvalue_from_numpy(empty) for _ in pasts]
        tokens: list[int] = []
        new, total, start = ids.numpy(), PROMPT, 0.0
        while len(tokens) < NEW:
            given = {
                "input_ids": new,
                "attention_mask": np.ones((1, total), np.int64),
                "position_ids": np.arange(total - new.shape[1], total)[None],
            }
            binding = session.io_binding()
            for name, value in given.items():
                if name in names:
                    binding.bind_cpu_input(name, value)
            for port, value in zip(pasts, caches, strict=True):
                binding.bind_ortvalue_input(port.name, value)
            for name in (logits, *presents):
                binding.bind_output(name, "cpu")
            session.run_with_iobinding(binding)
            first, *caches = binding.get_outputs()
            tokens.append(int(first.numpy()[0, -1].argmax()))
            if len(tokens) == 1:
                start = time.perf_counter()
            new, total = np.array([[tokens[-1]]]), total + 1
        return tokens, time.perf_counter() - start

    return run, len(onnx.load(path, load_external_data=False).graph.node)


def built(checkpoint: Path, ids: torch.Tensor, folder: Path, threads: int, precision: str) -> tuple[Run, int]:
    """The model of onnxruntime-genai's builder, run by that library; also its number of nodes."""
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(checkpoint), "-o", str(folder)]
    command += ["-p", precision, "-e", "cpu", "-c", str(folder.parent / "cache")]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the builder failed: {done.stderr.strip().splitlines()[-1]}")
    return in_genai(folder, ids, threads)


def in_genai(folder: Path, ids: torch.Tensor, threads: int) -> tuple[Run, int]:
    """A folder run by onnxruntime-genai; also its number of nodes."""
    import onnxruntime_genai as genai

    file = folder / "genai_config.json"
    data = json.loads(file.read_text())
    data["model"]["decoder"]["session_options"]["intra_op_num_threads"] = threads
    file.write_text(json.dumps(data))
    loaded = genai.Model(str(folder))
    prompt = ids.to(torch.int32).numpy()

    def run() -> tuple[list[int], float]:
        parameters = genai.GeneratorParams(loaded)
        parameters.set_search_options(max_length=PROMPT + NEW, min_length=PROMPT + NEW, do_sample=False)
        generator = genai.Generator(loaded, parameters)
        generator.append_tokens(prompt)
        generator.generate_next_token()
        start = time.perf_counter()
        for _ in range(NEW - 1):
            generator.generate_next_token()
        seconds = time.perf_counter() - start
        return [int(token) for token in generator.get_sequence(0)[PROMPT:]], seconds

    return run, len(onnx.load(folder / "model.onnx", load_external_data=False).graph.node)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--write", action="store_true", help="write results/generate.json and .md")
    chosen = parser.parse_args()
    if chosen.write and set(chosen.shapes) != set(SHAPES):
        parser.error("--write keeps the results of all shapes: leave --shapes out")
    torch.set_num_threads(chosen.threads)
    results: dict[str, Any] = {
        "threads": chosen.threads,
        "rounds": chosen.rounds,
        "prompt": PROMPT,
        "new_tokens": NEW,
        "cores": os.cpu_count(),
        "versions": {name: importlib.metadata.version(name) for name in _LIBRARIES},
        "shapes": {shape: measured(shape, chosen.rounds, chosen.threads) for shape in chosen.shapes},
    }
    print(page(results))
    if chosen.write:
        (HERE / "results" / "generate.json").write_text(json.dumps(results, indent=2) + "\n")
        (HERE / "results" / "generate.md").write_text(page(results))


def measured(shape: str, rounds: int, threads: int) -> dict[str, Any]:
    """All sides of one shape."""
    module = model(shape)
    ids = torch.randint(3, 8000, (1, PROMPT), generator=torch.Generator().manual_seed(1))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = folder / "checkpoint"
        module.save_pretrained(checkpoint)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(HERE.parent / "examples" / "models" / "tiny-llama" / file, checkpoint / file)
        runs: dict[str, Run] = {"eager transformers": eager(module, ids)}
        nodes: dict[str, int] = {}
        precisions = {"float32": [], "int4": [{"quantize": {"scheme": "int4"}}]}
        if module.config.tie_word_embeddings:  # the output matrix is the embedding table, the largest matrix that is read
            precisions |= {"int4, embeddings too": [{"quantize": {"scheme": "int4", "embeddings": True}}]}
        for precision, steps in precisions.items():
            for form, options in (("", {}), (SHARED, {"caches": "shared", "genai": True})):
                label = f"surgeon {precision}{form}"
                compiled = surgeon.compile(
                    checkpoint, steps, task="text-generation", output=folder / label, progress=False,
                    backend={"onnxruntime": {"threads": threads, **options}},
                )  # fmt: skip
                nodes[label] = compiled.artifact.details["nodes"]
                runs[label] = artefact(compiled, ids)
                runs[label]()
                compiled.artifact.memory.move()
                if form == "" and precision == "float32":
                    before = surgeon.load(folder / label)
                    before.artifact.session()
                    before.artifact.memory = Memory()  # forgets what the session has taken, so it stays where it is
                    runs[label + SMALL] = artefact(before, ids)
            by_library = f"surgeon {precision}{GENAI}"
            runs[by_library], nodes[by_library] = in_genai(folder / label, ids, threads)
        exporters = "transformers.exporters float32"
        runs[exporters], nodes[exporters] = exported(module, ids, folder / "exported", threads)
        for precision, label in (("fp32", "genai builder float32"), ("int4", "genai builder int4")):
            runs[label], nodes[label] = built(checkpoint, ids, folder / precision, threads, precision)
        return in_turn(shape, runs, nodes, rounds)


def in_turn(shape: str, runs: dict[str, Run], nodes: dict[str, int], rounds: int) -> dict[str, Any]:
    """Run every side once to warm up and compare tokens, then in turn."""
    tokens = {label: run()[0] for label, run in runs.items()}
    wrong = [label for label, found in tokens.items() if "int4" not in label and found != tokens["eager transformers"]]
    if wrong:
        raise RuntimeError(f"other tokens than eager transformers: {', '.join(wrong)}")
    rates: dict[str, list[float]] = {label: [] for label in runs}
    for _ in range(rounds):
        for label, run in runs.items():
            rates[label].append((NEW - 1) / run()[1])
    peers = [label for label in runs if "int4" not in label and not label.startswith("surgeon")]
    best = [max(rates[label][i] for label in peers) for i in range(rounds)]
    blocks = SHAPES[shape]["num_hidden_layers"]

    def ratio(label: str, against: list[float]) -> float:
        return round(statistics.median(a / b for a, b in zip(rates[label], against, strict=True)), 3)

    return {
        "load": round(os.getloadavg()[0], 2),
        "sides": {
            label: {
                "tokens_per_second": round(statistics.median(rates[label]), 1),
                "against_eager": ratio(label, rates["eager transformers"]),
                "surgeon_float32_against_it": ratio("surgeon float32", rates[label]),
                "onnx_nodes_per_block": round(nodes[label] / blocks, 1) if label in nodes else None,
            }
            for label in runs
        },
        "targets": {
            "float32_against_best_peer": {form: ratio(form, best) for form in runs if form.startswith("surgeon float32")},
            "onnx_nodes_per_block": round(nodes["surgeon float32"] / blocks, 1),
            "int4_against_eager": ratio("surgeon int4", rates["eager transformers"]),
        },
    }


_LIBRARIES = ("torch", "transformers", "onnxruntime", "onnxruntime-genai", "onnxscript")


def page(results: dict[str, Any]) -> str:
    """The results of all shapes."""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    lines = [
        "# Decoding, batch 1",
        "",
        f"Llama-shaped models of random weights; {results['prompt']} tokens of prompt, {results['new_tokens']} new ones. "
        f"{results['threads']} thread(s) of {results['cores']} cores; medians over {results['rounds']} rounds, all sides in "
        f"turn. {versions}.",
        "",
    ]
    for shape, found in results["shapes"].items():
        lines += table(shape, found)
    return "\n".join(lines)


def table(shape: str, results: dict[str, Any]) -> list[str]:
    """The results of one shape."""
    config = SHAPES[shape]
    lines = [
        f"## {shape} parameters",
        "",
        f"{config['num_hidden_layers']} blocks, hidden {config['hidden_size']}, {config['num_attention_heads']} heads of which "
        f"{config['num_key_value_heads']} for keys and values, FFN {config['intermediate_size']}, vocabulary "
        f"{config['vocab_size']}. Load of the machine: {results['load']}.",
        "",
        "| side | tokens/s | against eager | surgeon float32 against it | ONNX nodes per block |",
        "|---|---|---|---|---|",
    ]
    for label, side in results["sides"].items():
        nodes = side["onnx_nodes_per_block"] if side["onnx_nodes_per_block"] is not None else ""
        figures = f"{side['tokens_per_second']} | {side['against_eager']}x | {side['surgeon_float32_against_it']}x | {nodes}"
        lines.append(f"| {label} | {figures} |")
    found = results["targets"]
    return [
        *lines,
        "",
        "| target | found | needed |",
        "|---|---|---|",
        *(
            f"| {form} against the best peer of each round | {ratio}x | at least 1x |"
            for form, ratio in found["float32_against_best_peer"].items()
        ),
        f"| ONNX nodes per block, the whole file divided by the blocks | {found['onnx_nodes_per_block']} | at most 25 |",
        f"| int4 against eager | {found['int4_against_eager']}x | at least 3x |",
        "",
    ]


if __name__ == "__main__":
    main()
