"""What the small models are measured by, and the README that ``train.py`` writes from it.

Everything is measured on ``heldout.txt``, tokenised without special tokens and cut into windows of ``WINDOW`` tokens:
the loss itself, the loss with one block or one expert deleted (a test of a choice among blocks or experts needs them to
differ), and how often each expert is routed to.
"""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
WINDOW = 256
"""Tokens per training sequence and per window of the held-out evaluation."""

ORIGINS = {
    "tiny-upcycled": "It is `../tiny-llama` without the two blocks that matter least, every feed-forward network made sixteen\n"
    "experts by surgeon's `upcycle_ffn`: four copies cut into four parts each, half of the neurons of all copies\n"
    "but the first drawn anew. It was trained further with a balancing loss of weight 0.01 in every layer, so\n"
    "that experts i, i + 4, i + 8 and i + 12 have a common origin, and all are in use.",
}
"""Where a model comes from, by its name, as its README says it."""


def held_out_windows(tokenizer: PreTrainedTokenizerFast) -> tuple[torch.Tensor, float]:
    """``heldout.txt`` as non-overlapping windows, without special tokens, and its mean token length.

    Returns:
        Token ids, int64 [W, WINDOW] (a last, shorter window is left out), and bytes per token.
    """
    text = (HERE / "heldout.txt").read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    count = ids.numel() // WINDOW
    return ids[: count * WINDOW].view(count, WINDOW), len(text.encode()) / ids.numel()


@torch.inference_mode()
def evaluate(model: PreTrainedModel, windows: torch.Tensor) -> float:
    """Mean next-token cross entropy in nats over all predicted positions of windows [W, WINDOW], in float32."""
    training = model.training
    model.eval()
    total = 0.0
    for batch in windows.split(32):
        total += model(input_ids=batch, labels=batch, use_cache=False).loss.item() * len(batch)
    model.train(training)
    return total / len(windows)


def without_block(model: PreTrainedModel, index: int) -> PreTrainedModel:
    """A copy of the model with one decoder block deleted."""
    shorter = copy.deepcopy(model)
    del shorter.model.layers[index]
    shorter.config.num_hidden_layers -= 1
    return shorter


def without_expert(model: PreTrainedModel, block: int, expert: int) -> PreTrainedModel:
    """A copy of the sparse model with one expert and its router row deleted; the router chooses among the others."""
    smaller = copy.deepcopy(model)
    moe = smaller.model.layers[block].mlp
    kept = [index for index in range(moe.experts.num_experts) if index != expert]
    moe.gate.weight = torch.nn.Parameter(moe.gate.weight[kept])
    moe.experts.gate_up_proj = torch.nn.Parameter(moe.experts.gate_up_proj[kept])
    moe.experts.down_proj = torch.nn.Parameter(moe.experts.down_proj[kept])
    moe.experts.num_experts = moe.gate.num_experts = len(kept)
    return smaller


@torch.inference_mode()
def expert_usage(model: PreTrainedModel, windows: torch.Tensor) -> torch.Tensor:
    """Share of all routing choices that falls on each expert, [blocks, experts]; rows sum to one."""
    experts, chosen = model.config.num_local_experts, model.config.num_experts_per_tok
    counts = torch.zeros(model.config.num_hidden_layers, experts, dtype=torch.int64)
    for batch in windows.split(32):
        logits = model(input_ids=batch, use_cache=False, output_router_logits=True).router_logits
        for block, scores in enumerate(logits):
            counts[block] += torch.bincount(scores.topk(chosen, dim=-1).indices.flatten(), minlength=experts)
    return counts / counts.sum(dim=1, keepdim=True)


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, first column to the left, the others to the right."""
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, rule, *rows])


def describe(name: str) -> str:
    """Load a saved model as a user would, measure it on ``heldout.txt`` and write its ``README.md``.

    Args:
        name: directory below this file's.

    Returns:
        The text written.

    Raises:
        ValueError: the loss measured now differs from the last line of the training log by more than 1e-3.
    """
    directory = HERE / name
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    dtype = str(AutoConfig.from_pretrained(directory).dtype).removeprefix("torch.")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    windows, bytes_per_token = held_out_windows(tokenizer)
    log = [json.loads(line) for line in (directory / "training_log.jsonl").read_text(encoding="utf-8").splitlines()]
    corpus = json.loads((HERE / "corpus.json").read_text(encoding="utf-8"))
    config, last = model.config, log[-1]
    sparse = config.model_type == "mixtral"
    full = evaluate(model, windows)
    if abs(full - last["heldout_loss"]) > 1e-3:
        raise ValueError(
            f"{name}: held-out loss is {full:.5f} but the training log ends at {last['heldout_loss']:.5f}; "
            "weights, tokenizer, heldout.txt and log are not of one run; train again"
        )
    parameters = sum(p.numel() for p in model.parameters())
    width, minutes = config.intermediate_size, last["seconds"] / 60
    feed_forward = f"FFN of width {width}"
    if sparse:
        feed_forward = f"{config.num_local_experts} experts of width {width}, {config.num_experts_per_tok} active"
    lines = [
        f"# {name}",
        "",
        f"A small trained `{type(model).__name__}` on which the tests judge quality. It predicts Python source code",
        "and is of no other use.",
        "",
        *([ORIGINS[name], ""] if name in ORIGINS else []),
        table(
            ["", "value"],
            [
                ["shape", f"{config.num_hidden_layers} blocks, hidden {config.hidden_size}, {feed_forward}"],
                ["attention", f"{config.num_attention_heads} heads, {config.num_key_value_heads} key/value heads"],
                ["vocabulary", f"{config.vocab_size} (byte-level BPE, {bytes_per_token:.2f} bytes per token)"],
                ["embeddings", "tied" if config.tie_word_embeddings else "untied"],
                ["parameters", f"{parameters:,}"],
                ["weights file", f"{(directory / 'model.safetensors').stat().st_size:,} bytes, {dtype}"],
                ["trained on", f"{last['tokens']:,} tokens in {last['step']:,} steps, {minutes:.0f} minutes"],
                ["**held-out loss**", f"**{full:.4f} nats per token**"],
                ["in bits per byte", f"{full / math.log(2) / bytes_per_token:.4f}"],
            ],
        ),
        "",
        "The held-out loss is the mean next-token cross entropy over `../heldout.txt`, tokenised without special",
        f"tokens and cut into {len(windows)} windows of {WINDOW} tokens; its course is in `training_log.jsonl`.",
        "",
        "## Held-out loss without one block",
        "",
        table(
            ["block deleted", "loss", "increase"],
            [
                [str(index), f"{loss:.4f}", f"{loss - full:+.4f}"]
                for index in range(config.num_hidden_layers)
                for loss in [evaluate(without_block(model, index), windows)]
            ],
        ),
        "",
    ]
    if sparse:
        usage = expert_usage(model, windows)
        experts = range(config.num_local_experts)
        header = ["block", *(f"expert {expert}" for expert in experts)]
        lines += [
            "## Share of routing choices by expert (%)",
            "",
            table(header, [[str(b), *(f"{100 * share:.1f}" for share in row)] for b, row in enumerate(usage.tolist())]),
            "",
            f"Even use would be {100 / config.num_local_experts:.1f} % each.",
            "",
            "## Increase of the held-out loss without one expert",
            "",
            table(
                header,
                [
                    [str(b), *(f"{evaluate(without_expert(model, b, e), windows) - full:+.4f}" for e in experts)]
                    for b in range(config.num_hidden_layers)
                ],
            ),
            "",
        ]
    lines += [
        "## Made by",
        "",
        "```",
        f"python examples/models/train.py --models {name}",
        "```",
        "",
        f"with torch {torch.__version__.split('+')[0]} and transformers {transformers.__version__}; "
        f"`python examples/models/train.py --describe --models {name}`",
        "measures the numbers on this page again.",
        "",
        "## Text and licence",
        "",
        f"The text is the {corpus['source']}: {corpus['training_files']} files",
        f"({corpus['training_bytes']:,} bytes) to train on, {corpus['held_out_files']} files "
        f"({corpus['held_out_bytes']:,} bytes) held out, split by a hash of the path",
        "(`../corpus.json` lists them). It is copyright the Python Software Foundation and its contributors and used",
        "under the PSF License Version 2 (https://docs.python.org/3/license.html), which also covers the excerpts in",
        "`../heldout.txt` and `../calibration.txt`; single modules carry notices of their own authors.",
        "",
    ]
    (directory / "README.md").write_text("\n".join(lines), encoding="utf-8")
    return "\n".join(lines)
