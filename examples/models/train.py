"""Train the three small language models that the tests and benchmarks judge quality on.

All are byte-level BPE language models of Python source code, small enough to sit in the repository as float32
safetensors and trained far enough that their blocks and experts carry real signal:

* ``tiny-llama``: a dense decoder (``LlamaForCausalLM``), untied embeddings, two key/value heads for four query heads;
* ``tiny-mixtral``: a sparse decoder (``MixtralForCausalLM``), eight experts of which two run, tied embeddings; trained from
  random weights with little balancing, so that its experts are strangers to each other and unequally used;
* ``tiny-upcycled``: a sparse decoder whose experts have a common origin and are about equally used, as in Qwen1.5-MoE and
  its like: ``tiny-llama`` less the two blocks that matter least, every feed-forward network made four copies of four parts
  each, sixteen experts of which four run, half of the neurons of all copies but the first drawn anew (Drop-Upcycling,
  arXiv:2502.19261), by surgeon's own passes; then trained further with the customary balancing loss.

The text is the Python standard library of the interpreter that runs this script, split by file into a training and a
held-out part by a hash of each file's relative path. Written beside this file::

    corpus.json          which files were read, which are held out, a digest of the whole
    heldout.txt          excerpts of held-out files: what every reported loss is measured on
    calibration.txt      excerpts of training files, for passes that look at data
    tiny-llama/ ...      config, weights, tokenizer, training_log.jsonl, README.md with measured numbers
    tiny-mixtral/ ...
    tiny-upcycled/ ...

Usage::

    python examples/models/train.py                          # everything, 40 minutes on two CPU cores
    python examples/models/train.py --models tiny-llama      # one model (tokenizer and texts are rebuilt, identically)
    python examples/models/train.py --describe               # measure the saved models again and rewrite their READMEs

The same interpreter version, library versions and thread count give the same texts and tokenizer byte for byte, and the
same weights up to the reduction order of the machine's kernels.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import sysconfig
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from measure import HERE, WINDOW, describe, evaluate, held_out_windows
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

import surgeon

BOS, EOS, PAD = "<bos>", "<eos>", "<pad>"
VOCABULARY = 1024
HELD_OUT_PERCENT = 10
EXCERPT_CHARACTERS = 8000
EXCERPTS_BYTES = 200_000
SEED = 20240607

# Left out: what is not the library itself (installed packages, tests, vendored wheels), tables that are data in Python
# syntax (character maps, the help texts of pydoc), and files that describe the machine Python was built on.
EXCLUDED_DIRECTORIES = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "lib2to3", "encodings", "pydoc_data"}
    | {"ensurepip", "turtledemo", "lib-dynload", "__pycache__", "__phello__"}
)
EXCLUDED_PREFIXES = ("_sysconfigdata", "config-")

console = Console()


@dataclass(frozen=True)
class Recipe:
    """How one model is built and trained.

    Attributes:
        build: the model before the first step.
        steps: optimiser steps.
        batch: sequences of ``WINDOW`` tokens per step.
        peak: learning rate after the warm-up; it falls to a twentieth of that along half a cosine.
        autocast: run the forward pass in bfloat16 where torch considers that safe. Measured on a CPU with AVX512-BF16
            it makes the dense model 1.6x faster and the sparse one 1.6x slower, because experts see few rows each.
        router_loss: weight of the load-balancing loss; 0 for a model without experts.
        each_layer: balance the use of experts in every layer, as the papers do; transformers balances the sum over layers,
            which lets single layers go uneven.
        dtype: of the saved weights; the last figures of the log are those of the weights rounded to it.
    """

    build: Callable[[], PreTrainedModel]
    steps: int
    batch: int = 16
    peak: float = 3e-3
    autocast: bool = False
    router_loss: float = 0.0
    each_layer: bool = False
    dtype: torch.dtype = torch.float32


def recipes(bos: int, eos: int, pad: int) -> dict[str, Recipe]:
    """The models by directory name, given the ids of the special tokens."""
    shared: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        # 0.02, the customary value, is meant for widths in the thousands; at width 128 training starts more slowly.
        "initializer_range": 0.04,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "pad_token_id": pad,
    }
    llama = LlamaConfig(**shared, num_hidden_layers=6, intermediate_size=384, tie_word_embeddings=False)
    mixtral = MixtralConfig(
        **shared,
        num_hidden_layers=4,
        intermediate_size=192,
        num_local_experts=8,
        num_experts_per_tok=2,
        router_aux_loss_coef=0.002,
        output_router_logits=False,
        tie_word_embeddings=True,
    )
    return {
        "tiny-llama": Recipe(lambda: LlamaForCausalLM(llama), steps=2200, autocast=True),
        # A small balancing loss, so that experts specialise and their use is uneven.
        "tiny-mixtral": Recipe(
            lambda: MixtralForCausalLM(mixtral), steps=1700, router_loss=mixtral.router_aux_loss_coef
        ),
        "tiny-upcycled": Recipe(
            lambda: upcycled(HERE / "tiny-llama"),
            steps=1000,
            batch=8,
            peak=2e-3,
            router_loss=0.01,  # of Switch Transformers, arXiv:2101.03961
            each_layer=True,
            dtype=torch.bfloat16,
        ),
    }


def upcycled(dense: Path) -> PreTrainedModel:
    """The two least needed blocks of a dense checkpoint dropped, the FFNs of the others made mixtures."""
    passes = [
        {"drop_blocks": {"count": 2}},
        {"upcycle_ffn": {"experts": 16, "granularity": 4, "top_k": 4, "reinitialise": 0.5}},
    ]
    data = {"text": HERE / "calibration.txt", "samples": 32, "length": 128}
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "model"
        surgeon.compile(dense, passes, calibration=data, backend="huggingface", output=output, progress=False)
        return AutoModelForCausalLM.from_pretrained(output)


def balancing_loss(logits: tuple[torch.Tensor, ...], config: MixtralConfig, each_layer: bool) -> torch.Tensor:
    """``E sum_e f_e p_e`` with shares f of choices and mean probabilities p: top-k at least, where all are used alike.

    Args:
        logits: router scores of every layer, [tokens, experts].
        config: of the model.
        each_layer: the mean over layers of their own losses; otherwise f and p are those of all layers together.
    """
    sizes = config.num_local_experts, config.num_experts_per_tok
    parts = [(layer,) for layer in logits] if each_layer else [logits]
    return torch.stack([load_balancing_loss_func(part, *sizes) for part in parts]).mean()


def progress() -> Progress:
    """A progress bar on a terminal, silence elsewhere (the training log tells the same story)."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        disable=not console.is_terminal,
    )


# ---------------------------------------------------------------------------------------------------------------- text


def read_library() -> dict[str, str]:
    """Source texts of the standard library by POSIX path relative to it, sorted by path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    texts = {}
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        relative = path.relative_to(root)
        if EXCLUDED_DIRECTORIES.intersection(relative.parts[:-1]):
            continue
        if any(part.startswith(EXCLUDED_PREFIXES) for part in relative.parts):
            continue
        texts[relative.as_posix()] = path.read_text(encoding="utf-8").replace("\r\n", "\n")
    return {name: text for name, text in texts.items() if text.strip()}


def path_hash(name: str) -> int:
    """A number that depends on nothing but the relative path, for splitting and for a stable shuffled order."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def is_held_out(name: str) -> bool:
    """Whether the file belongs to the held-out part."""
    return path_hash(name) % 100 < HELD_OUT_PERCENT


def excerpts(texts: dict[str, str]) -> str:
    """About ``EXCERPTS_BYTES`` of text: from each file some whole lines starting in its middle, in hashed order.

    The middle, because files begin with licences and imports, which resemble each other more than code does.
    """
    pieces: list[str] = []
    size = 0
    for name in sorted(texts, key=path_hash):
        if size >= EXCERPTS_BYTES:
            break
        text = texts[name]
        room = max(0, len(text) - EXCERPT_CHARACTERS)
        start = text.find("\n", min(len(text) // 2, room)) + 1 if room else 0
        end = text.rfind("\n", start, start + EXCERPT_CHARACTERS) + 1
        piece = text[start:end].strip("\n") + "\n\n"
        pieces.append(piece)
        size += len(piece.encode())
    return "".join(pieces)


def prepare_texts() -> dict[str, str]:
    """Write ``corpus.json``, ``heldout.txt`` and ``calibration.txt``; return the training files."""
    texts = read_library()
    training = {name: text for name, text in texts.items() if not is_held_out(name)}
    held_out = {name: text for name, text in texts.items() if is_held_out(name)}
    (HERE / "heldout.txt").write_text(excerpts(held_out), encoding="utf-8", newline="\n")
    (HERE / "calibration.txt").write_text(excerpts(training), encoding="utf-8", newline="\n")
    digest = hashlib.sha256()
    for name, text in texts.items():
        digest.update(name.encode() + b"\0" + text.encode() + b"\0")
    corpus = {
        "source": f"standard library of {platform.python_implementation()} {platform.python_version()}",
        "sha256": digest.hexdigest(),
        "training_files": len(training),
        "training_bytes": sum(len(text.encode()) for text in training.values()),
        "held_out_files": len(held_out),
        "held_out_bytes": sum(len(text.encode()) for text in held_out.values()),
        "held_out": sorted(held_out),
    }
    (HERE / "corpus.json").write_text(json.dumps(corpus, indent=1) + "\n", encoding="utf-8")
    console.print(f"{corpus['source']}: {len(training)} files to train on, {len(held_out)} held out")
    return training


def train_tokenizer(training: dict[str, str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of ``VOCABULARY`` entries: every text is representable, so there is no unknown token.

    ``tokenizer(text)`` puts ``<bos>`` in front, as training saw every file; padding goes to the left, as generation
    in batches needs.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(training.values(), trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bpe.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        model_max_length=512,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def token_stream(tokenizer: PreTrainedTokenizerFast, texts: dict[str, str]) -> torch.Tensor:
    """All files as one row of token ids, int64 [N], each file between ``<bos>`` and ``<eos>``, in hashed order."""
    names = sorted(texts, key=path_hash)
    encoded = tokenizer([texts[name] + EOS for name in names], verbose=False)["input_ids"]
    return torch.tensor([token for ids in encoded for token in ids])


# ------------------------------------------------------------------------------------------------------------ training


def learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up over the first 5 % of the steps, then half a cosine down to a twentieth of the peak."""
    warm_up = max(1, recipe.steps // 20)
    if step < warm_up:
        return recipe.peak * (step + 1) / warm_up
    done = (step - warm_up) / max(1, recipe.steps - warm_up)
    return recipe.peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))


def train(name: str, recipe: Recipe, tokenizer: PreTrainedTokenizerFast, stream: torch.Tensor) -> None:
    """Train one model and write its directory: config, weights, tokenizer and ``training_log.jsonl``.

    Args:
        name: directory below this file's.
        recipe: what to build and how to train it.
        tokenizer: saved beside the weights.
        stream: training tokens, int64 [N]; every sequence is a window at a random offset of it.
    """
    directory = HERE / name
    directory.mkdir(exist_ok=True)
    windows, _ = held_out_windows(tokenizer)
    torch.manual_seed(SEED)
    offsets_of = torch.Generator().manual_seed(SEED)
    model = recipe.build()
    sparse = isinstance(model.config, MixtralConfig)
    extra = {"output_router_logits": True} if sparse else {}
    # Of the implementations for CPU the plain loop over experts trains fastest (1.15x grouped_mm); the dense model
    # has none to choose.
    if sparse:
        model.set_experts_implementation("eager")
        model.config.router_aux_loss_coef = recipe.router_loss
        model.router_aux_loss_coef = 0.0  # the balancing loss is added below, so that output.loss is cross entropy
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimiser = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=recipe.peak,
        betas=(0.9, 0.95),
        fused=True,
    )
    model.train()
    span = torch.arange(WINDOW)
    started = time.perf_counter()
    interval = max(1, recipe.steps // 20)
    losses: list[float] = []
    with (directory / "training_log.jsonl").open("w", encoding="utf-8") as log, progress() as bar:
        task = bar.add_task(name, total=recipe.steps, note="")
        for step in range(recipe.steps):
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(step, recipe)
            offsets = torch.randint(stream.numel() - WINDOW, (recipe.batch, 1), generator=offsets_of)
            batch = stream[offsets + span]
            with torch.autocast("cpu", torch.bfloat16, enabled=recipe.autocast):
                output = model(input_ids=batch, labels=batch, use_cache=False, **extra)
            total = output.loss
            if sparse:
                balance = balancing_loss(output.router_logits, model.config, recipe.each_layer)
                total = total + recipe.router_loss * balance
            total.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad()
            loss = output.loss.item()
            if not math.isfinite(loss):
                raise FloatingPointError(f"{name}: training loss is {loss} at step {step + 1}; lower the learning rate")
            losses.append(loss)
            last = step + 1 == recipe.steps
            if last:
                model.to(recipe.dtype).float()  # judged as it is saved
            if (step + 1) % interval == 0 or last:
                held_out = evaluate(model, windows)
                row = {
                    "step": step + 1,
                    "tokens": (step + 1) * recipe.batch * WINDOW,
                    "train_loss": round(sum(losses) / len(losses), 5),
                    "heldout_loss": round(held_out, 5),
                    "learning_rate": round(learning_rate(step, recipe), 7),
                    "seconds": round(time.perf_counter() - started, 1),
                }
                log.write(json.dumps(row) + "\n")
                log.flush()
                losses.clear()
            bar.update(task, advance=1, note=f"loss {loss:.3f}")
    model.eval().to(recipe.dtype)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def main() -> None:
    names = ["tiny-llama", "tiny-mixtral", "tiny-upcycled"]
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--models", nargs="+", choices=names, default=names, help="which models (default: all)")
    parser.add_argument("--describe", action="store_true", help="only measure saved models and rewrite their READMEs")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if not console.is_terminal:
        transformers.logging.disable_progress_bar()
    if not arguments.describe:
        training = prepare_texts()
        tokenizer = train_tokenizer(training)
        stream = token_stream(tokenizer, training)
        console.print(f"{stream.numel():,} training tokens")
        chosen = recipes(tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
        for name in arguments.models:
            train(name, chosen[name], tokenizer, stream)
    for name in arguments.models:
        console.print(describe(name), markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
