"""The sides of ``gpu.py``: artefacts of operated graphs, and the same shapes in transformers, ready to be run."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _gpu_floor import STEPS, Cell, Shape, cells, layers_and_experts

MERGE = {"merge_experts": {"groups": 4, "align": False}}
DROP = {"drop_blocks": {"ratio": 0.25}}
INT4 = {"quantize": {"scheme": "int4", "group": 128}}
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "whole": [],
    "dropped int4": [DROP, INT4],
    "dropped": [DROP],
    "int4": [INT4],
    "merged": [MERGE],
}


def model_of(shape: Shape, layers: int, experts: int, device: str) -> Any:
    """A random Mixtral of that shape, made on the device without a copy elsewhere."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        hidden_size=shape.hidden, intermediate_size=shape.width, num_hidden_layers=layers, vocab_size=shape.vocabulary,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, num_local_experts=experts,
        num_experts_per_tok=shape.top_k, max_position_embeddings=2 * shape.prefill, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, shape.dtype))
    try:
        with torch.device("meta"):
            model = MixtralForCausalLM(config)
        model = model.to_empty(device=device)
        noise = torch.randn(1 << 24, device=device).mul_(0.02)  # drawing them all would take minutes on a CPU
        with torch.no_grad():
            for number, (name, parameter) in enumerate(model.named_parameters()):
                flat, whole = parameter.view(-1), parameter.numel() // noise.numel() * noise.numel()
                rolled = noise.roll(7919 * number)
                flat[:whole].view(-1, noise.numel()).copy_(rolled)
                flat[whole:].copy_(rolled[: flat.numel() - whole])
                if "norm" in name:
                    parameter.fill_(1.0)
    finally:
        torch.set_default_dtype(default)
    rotary = model.model.rotary_emb  # its tables are computed, not stored
    for name, value in type(rotary)(config).named_buffers():
        setattr(rotary, name, value.to(device))
    return model.eval()


def prepared(shape: Shape, variant: str) -> Any:
    """The operated graph of a variant: traced, and the passes run as a build runs them.

    Without the comparisons of a build, which run the model a dozen times on the CPU.
    """
    import surgeon
    from surgeon.data import load_data
    from surgeon.pipeline import operate
    from surgeon.placement import Placement
    from surgeon.progress import Progress
    from surgeon.registry import make_pass

    module = model_of(shape, shape.layers, shape.experts, "cpu")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, shape.vocabulary, (2, 16), generator=generator)
    graph = surgeon.trace(module, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, task="text-generation")
    graph.placement = None if shape.device == "cpu" else Placement(torch.device(shape.device), room=0)
    data = load_data([{"input_ids": ids, "attention_mask": torch.ones_like(ids)}] * 2, graph)
    structure = surgeon.discover(graph)
    for step in VARIANTS[variant]:
        grouped = {"quantize": {**step["quantize"], "group": shape.group}} if "quantize" in step else step
        graph, structure, *_ = operate(make_pass(grouped), graph, structure, data, None, Progress(False))
    graph.placement = None
    if shape.device == "cuda":
        torch.cuda.empty_cache()  # several processes build on one card
    return graph


def probes(ports: Any, shape: Shape) -> list[dict[str, torch.Tensor]]:
    """Inputs that go through every branch of an artefact: one new token of each row behind a past, and many without one."""
    from surgeon.candidates import Case, inputs_for

    cases = (Case("decode", 16, shape.group + 1), Case("prefill", 1, 80))
    made = [inputs_for(ports, case, {"input_ids": [0, shape.vocabulary - 1]}) for case in cases]
    return [{name: value.to(shape.device) for name, value in inputs.items()} for inputs in made]


def reference(graph: Any, shape: Shape) -> list[torch.Tensor]:
    """What the graph itself gives for the probes, on the device."""
    from surgeon.backends._aot_lowering import placed

    here = placed(graph, shape.device)
    return [here.module(*here.bind(inputs))[0].float().cpu() for inputs in probes(graph.inputs, shape)]


def build(shape: Shape, variant: str, runtime: str, folder: Path) -> dict[str, Any]:
    """Trace, operate and lower; returns seconds and bytes."""
    from surgeon.registry import make_backend

    start = time.perf_counter()
    graph = prepared(shape, variant)
    ready = time.perf_counter()
    print(f"{variant} on {runtime}: prepared in {ready - start:.0f} s", file=sys.stderr, flush=True)
    wanted = reference(graph, shape)
    key = {"aotinductor": "device", "onnxruntime": "provider"}[runtime]
    folder.mkdir(parents=True, exist_ok=True)
    caches = {"caches": shape.caches} if runtime == "aotinductor" else {}
    artifact = make_backend({runtime: {key: shape.device, **caches}}).lower(graph, folder)
    manifest = {
        "options": artifact.options, "details": artifact.details, "files": [asdict(file) for file in artifact.files],
        "inputs": [_port(port) for port in artifact.inputs], "outputs": [_port(port) for port in artifact.outputs],
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest, default=str))
    print(f"{variant} on {runtime}: lowered in {time.perf_counter() - ready:.0f} s", file=sys.stderr, flush=True)
    return {
        "prepare_seconds": ready - start,
        "lower_seconds": time.perf_counter() - ready,
        "details": {name: artifact.details.get(name) for name in ("nodes", "fused", "experts")},
        "wanted": wanted,
    }


def _port(port: Any) -> dict[str, Any]:
    from surgeon.ports import port_data

    return port_data(port)


def artifact_runs(shape: Shape, runtime: str, folder: Path) -> tuple[dict[Cell, Any], int, Any]:
    """By cell what runs it (``cell.steps`` of decoding), bytes and the artefact."""
    from surgeon.candidates import Case, inputs_for
    from surgeon.registry import backend_class

    manifest = json.loads((folder / "manifest.json").read_text())
    artifact = backend_class(runtime).load(folder, manifest)
    runs = {}
    for cell in cells(shape):
        case = Case("decode" if cell.phase == "decode" else "prefill", cell.batch, cell.length)
        inputs = inputs_for(artifact.inputs, case, {"input_ids": [0, shape.vocabulary - 1]})
        placed = {name: value.to(shape.device) for name, value in inputs.items()}
        runs[cell] = _continuing(artifact, placed) if cell.phase == "decode" else artifact.stepping(placed)
    return runs, artifact.nbytes, artifact


def _continuing(artifact: Any, inputs: dict[str, torch.Tensor]) -> Any:
    """Steps of decoding behind one past, each a position further where the artefact keeps its caches in buffers."""
    from surgeon.caches import MASK, POSITIONS

    decoder = artifact.decoder()
    if not hasattr(decoder, "resume"):
        step = artifact.stepping(inputs)
        return lambda: [step() for _ in range(STEPS)]
    rest = decoder.resume(inputs)
    counted = [port.name for port in artifact.inputs if port.role == POSITIONS]
    steps = [
        {**rest, MASK: torch.nn.functional.pad(rest[MASK], (0, step), value=1), **{name: rest[name] + step for name in counted}}
        for step in range(STEPS)
    ]
    return lambda: [decoder(step) for step in steps]


def module_runs(shape: Shape, variant: str, compiled: bool) -> tuple[dict[Cell, Any], int]:
    """Eager transformers, or the same compiled as that library recommends: static caches, CUDA graphs for decode."""
    from transformers import DynamicCache, StaticCache

    model = model_of(shape, *layers_and_experts(shape, variant), shape.device)
    size = sum(parameter.nbytes for parameter in model.parameters())
    generator = torch.Generator().manual_seed(1)
    prefill = model.forward
    decode = model.forward
    if compiled:
        prefill = torch.compile(model.forward, dynamic=False)
        decode = torch.compile(model.forward, dynamic=False, mode="reduce-overhead" if shape.device == "cuda" else None)
    runs: dict[Cell, Any] = {}
    for cell in cells(shape):
        count = cell.length if cell.phase == "prefill" else 1
        ids = torch.randint(0, shape.vocabulary, (cell.batch, count), generator=generator).to(shape.device)
        if cell.phase == "prefill":
            runs[cell] = partial(prefill, input_ids=ids, use_cache=True)
            continue
        room = cell.length + STEPS
        cache = StaticCache(config=model.config, max_cache_len=room) if compiled else DynamicCache(config=model.config)
        filled = torch.randint(0, shape.vocabulary, (cell.batch, cell.length), generator=generator).to(shape.device)
        argument = "cache" if "cache" in _parameters(model) else "past_key_values"
        model(input_ids=filled, use_cache=True, **{argument: cache})
        runs[cell] = _step(decode, ids, cache, argument, cell.length, compiled)
    return runs, size


def _parameters(model: Any) -> Any:
    import inspect

    return inspect.signature(model.forward).parameters


def _step(forward: Any, ids: Any, cache: Any, argument: str, length: int, static: bool) -> Any:
    """Steps of decoding, each a position further; then the cache is as it was."""
    positions = [torch.full((ids.shape[0], 1), length + step, device=ids.device) for step in range(STEPS)]

    def steps() -> None:
        for position in positions:
            forward(input_ids=ids, position_ids=position, use_cache=True, **{argument: cache})
        if static:
            for layer in cache.layers:
                held = getattr(layer, "cumulative_length", None)
                if torch.is_tensor(held):
                    held.fill_(length)
                elif held is not None:
                    layer.cumulative_length = length
        else:
            cache.crop(-STEPS)

    return steps
