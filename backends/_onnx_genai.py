"""What ``onnxruntime-genai`` needs beside a model: ``genai_config.json``, and a look whether it generates the same."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch

from surgeon.caches import PAST, PRESENT, has_caches
from surgeon.contract import Artifact, Refusal
from surgeon.errors import LowerError
from surgeon.generation import generate
from surgeon.graph import Graph
from surgeon.halves import has_halves
from surgeon.sampling import Sampling, Settings

CONFIG = "genai_config.json"
_CONTEXT = 32768
"""Longest text where the source's configuration does not say one; the caches grow as they are needed."""
_CHECKED_TOKENS = 6


def refusals(graph: Graph) -> list[Refusal]:
    """Why that library cannot generate with this graph.

    It makes the empty caches itself, all of one shape, and knows three inputs beside them.
    """
    if not has_caches(graph.inputs):
        return [Refusal("genai", "the model was traced without caches; build it with task text-generation", lasting=True)]
    if has_halves(graph.inputs):
        reason = "an encoder-decoder: only decoders alone are described to that library; use generate"
        return [Refusal("genai", reason, lasting=True)]
    found = []
    shapes = {port.shape[1::2] for port in graph.inputs if port.role == PAST}
    if len(shapes) > 1:
        listed = ", ".join(f"{heads} heads of {size}" for heads, size in sorted(shapes, key=str))
        found.append(Refusal("genai", f"its caches differ in shape ({listed}) and the library makes all of one; use generate"))
    names = {port.name for port in graph.inputs if port.role != PAST}
    missing, unknown = {"input_ids", "attention_mask"} - names, names - {"input_ids", "attention_mask", "position_ids"}
    if missing or unknown:
        reason = f"the library feeds input_ids, attention_mask and position_ids; the model's are {names}"
        found.append(Refusal("genai", reason, lasting=True))
    return found


def configuration(graph: Graph, threads: int | None, shared: bool = False) -> dict[str, Any]:
    """The configuration of a decoder; what is not said by the graph is taken from the source's configuration."""
    cache = next(port for port in graph.inputs if port.role == PAST)
    logits = next(port for port in graph.outputs if port.name == "logits")
    settings, source = Settings.of(graph.source.generation), graph.source.config
    ends = list(settings.eos_token_id) or [-1]
    context = source.get("max_position_embeddings") or _CONTEXT
    names = {port.name: port.name for port in graph.inputs if port.role != PAST}
    pasts = {f"past_{half}_names": f"past_key_values.%d.{half}" for half in ("key", "value")}
    presents = {f"present_{half}_names": f"present.%d.{half}" for half in ("key", "value")}
    return {
        "model": {
            "type": "decoder",
            "vocab_size": logits.shape[-1],
            "context_length": context,
            "bos_token_id": settings.bos_token_id if settings.bos_token_id is not None else ends[0],
            "eos_token_id": ends if len(ends) > 1 else ends[0],
            "pad_token_id": settings.pad_token_id if settings.pad_token_id is not None else ends[0],
            "decoder": {
                "session_options": {"provider_options": [], **({"intra_op_num_threads": threads} if threads else {})},
                "filename": "model.onnx",
                "num_hidden_layers": sum(port.role == PRESENT for port in graph.outputs) // 2,
                "num_key_value_heads": cache.shape[1],
                "head_size": cache.shape[3],
                "inputs": names | pasts,
                "outputs": {"logits": "logits", **presents},
            },
        },
        "search": {"do_sample": False, "max_length": context, "past_present_share_buffer": shared},
    }


def write(graph: Graph, folder: Path, threads: int | None, shared: bool) -> str:
    """Write the configuration beside the model; returns the file's name."""
    text = json.dumps(configuration(graph, threads, shared), indent=2) + "\n"
    (folder / CONFIG).write_text(text, encoding="utf-8")
    return CONFIG


def check(artifact: Artifact, graph: Graph) -> str:
    """Generate a few tokens with that library and compare.

    Returns:
        What was done, for the report.

    Raises:
        LowerError: the library cannot open the folder, or generates other tokens than the artefact.
    """
    if importlib.util.find_spec("onnxruntime_genai") is None:
        return "not run: onnxruntime-genai is not installed (pip install 'surgeon[genai]')"
    prompt = graph.example["input_ids"][:1]
    settings = Settings(pad_token_id=-1)
    ours = generate(
        artifact.decoder(), artifact.inputs, {"input_ids": prompt},
        max_new_tokens=_CHECKED_TOKENS, sampling=Sampling(), settings=settings,
    )  # fmt: skip
    theirs = tokens(artifact.folder, prompt, ours.shape[1])
    if not torch.equal(theirs, ours[:, : theirs.shape[1]]):
        raise LowerError(
            f"onnxruntime-genai generates {theirs[0].tolist()} from {artifact.folder / CONFIG}, "
            f"the model itself {ours[0].tolist()}"
        )
    return f"{theirs.shape[1] - prompt.shape[1]} tokens generated and found equal"


def tokens(folder: Path, prompt: torch.Tensor, length: int) -> torch.Tensor:
    """Greedy continuation by that library.

    Args:
        folder: of the artefact.
        prompt: [batch, prompt length] int64.
        length: of prompt and continuation.

    Returns:
        [batch, at most length] int64.

    Raises:
        LowerError: the library fails.
    """
    import onnxruntime_genai

    try:
        model = onnxruntime_genai.Model(str(folder))
        parameters = onnxruntime_genai.GeneratorParams(model)
        parameters.set_search_options(max_length=length, batch_size=len(prompt), do_sample=False)
        generator = onnxruntime_genai.Generator(model, parameters)
        generator.append_tokens(prompt.to(torch.int32).numpy())
        while not generator.is_done():
            generator.generate_next_token()
        rows = [torch.as_tensor(generator.get_sequence(row)).to(torch.int64) for row in range(len(prompt))]
    except Exception as error:  # the library's exceptions share no base class but Exception
        raise LowerError(f"{folder}: onnxruntime-genai cannot generate with it: {error}") from error
    return torch.stack(rows)
