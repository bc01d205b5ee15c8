"""The table of passes and families: which families, one line for each, and the page (docs/families.md)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import cache, partial
from importlib.util import find_spec
from operator import attrgetter
from pathlib import Path
from typing import Any

from torch import Tensor

from surgeon.data import load_data
from surgeon.discovery import discover
from surgeon.tracing import trace
from tests import families, families_moe, families_streams
from tests.family_passes import PASSES, Case, bypassed, outcome, source_outputs
from tests.models import layer_lists, with_layer_deleted

PAGE = Path(__file__).parents[1] / "docs" / "families.md"


# -- cases --------------------------------------------------------------------------------------------------------


@cache
def one_stream(name: str) -> Case:
    """A family of tests/families.py."""
    family = families.FAMILIES[name]
    module, inputs = family.build()
    graph = trace(module, inputs)
    reference = partial(_without_first_layer, family, module, inputs)
    return Case(name, module, inputs, graph, discover(graph), load_data([inputs], graph), (0,), reference)


def _without_first_layer(family: families.Family, module: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    if family.shared:  # one layer, called for every block
        with bypassed(module.get_submodule(family.shared), call=0):
            return source_outputs(module, inputs)
    lists = layer_lists(module)
    if len(lists) == 1 and hasattr(module, "config"):
        return source_outputs(with_layer_deleted(family.name, module, 0), inputs)
    small = copy.deepcopy(module)
    for parts in layer_lists(small):  # some keep their layers' parts in lists of their own
        del parts[0]
    for part in small.modules():
        for counter in ("n_layers", "num_layers"):
            if isinstance(getattr(part, counter, None), int):
                setattr(part, counter, len(lists[0]) - 1)
    return source_outputs(small, inputs)


@cache
def mixture(name: str) -> Case:
    """A library model of tests/families_moe.py, or two hand-written layers with one of its spellings."""
    written = name in families_moe.WRITTEN
    module, graph, structure = families_moe.traced(name, layers=2 if written else 1)
    inputs = families_moe.inputs(name)
    small = copy.deepcopy(module)
    del attrgetter("layers" if written else families_moe.FAMILIES[name].layers)(small)[-1]
    reference = partial(source_outputs, small, inputs)
    return Case(name, module, inputs, graph, structure, load_data([inputs], graph), (1,), reference)


@cache
def several_streams(name: str) -> Case:
    """A family of tests/families_streams.py; of every stream the last block is dropped."""
    family, graph, structure = families_streams.traced(name)
    inputs = dict(graph.example)
    dropped = tuple(stream.blocks[-1].index for stream in structure.streams)
    reference = partial(_without_last_layers, family, inputs)
    return Case(name, family.module, inputs, graph, structure, load_data([inputs] * 2, graph), dropped, reference)


def _without_last_layers(family: families_streams.Family, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    if family.idle:
        with ExitStack() as stack:
            for path, options in family.idle:
                stack.enter_context(bypassed(family.module.get_submodule(path), **options))
            return source_outputs(family.module, inputs)
    lists = family.last_layers()
    last = [layers.pop(-1) for layers in lists]  # put back: hooks that collect hidden states would not survive a copy
    try:
        return source_outputs(family.module, inputs)
    finally:
        for layers, layer in zip(lists, last, strict=True):
            layers.append(layer)


Cases = dict[str, Callable[[str], Case]]

SECTIONS: dict[str, Cases] = {
    "One stream": dict.fromkeys(families.LIBRARY, one_stream),
    "Mixtures of experts": dict.fromkeys(families_moe.FAMILIES, mixture),
    "Several streams, hybrids, pyramids": dict.fromkeys(families_streams.FAMILIES, several_streams),
    "Written by hand: attention, FFNs, blocks": dict.fromkeys(families.HAND, one_stream),
    "Written by hand: mixtures of experts": dict.fromkeys(families_moe.WRITTEN, mixture),
}
"""Functions that make the families' cases."""

CASES: list[tuple[str, str]] = [(section, name) for section, cases in SECTIONS.items() for name in cases]


def missing(name: str) -> bool:
    """Whether a family needs a library that is not installed."""
    library = families_streams.MARKED.get(name)
    return library is not None and find_spec(library) is None


# -- page ---------------------------------------------------------------------------------------------------------


def line(case: Case) -> str:
    """A family's line of the table."""
    runs: list[tuple[str, int]] = []
    for block in case.structure.blocks:
        last, count = runs[-1] if runs else ("", 0)
        runs[-1:] = [(last, count + 1)] if block.kind == last else [*runs[-1:], (block.kind, 1)]
    blocks = ", ".join(f"{count} x {kind}" for kind, count in runs)
    return f"| {case.name} | {blocks} | {' | '.join(outcome(case, name) for name in PASSES)} |"


INTRODUCTION = """\
# Families

Every pass on every family, at tiny size and random weights. The test suite makes these lines and compares them with
what is committed here; `python -m tests.families --write` rewrites them.

- `drop_blocks` is *exact* where the model without a block equals, bit for bit, the source model with that layer deleted (to
  1e-5 where the traced graph itself equals its source to rounding only). Of one stream the first block goes, of mixtures
  the second, of several streams the last of each. Where a layer cannot be deleted, it returns what it is given instead.
- `moefy_ffn` is *exact* where the FFNs split into four experts, all of them used, equal the dense FFNs to 1e-5;
  `upcycle_ffn` where four copies of which two are used do; `moefy_attention` where all key/value groups are used.
- `drop_neurons` is *exact* where it finds the neurons of a quarter of each network whose output columns are zero (the model
  is edited so that there are some), of experts too, and dropping them leaves the outputs as they were to 1e-5.
- `drop_channels` is *exact* where rotating the residual stream changes no output by more than 1e-5, and where the pass finds
  the half of all directions that the stream is confined to (what writes to it is projected on them first) and the model that
  is half as wide computes the same to 1e-5. In brackets, how many streams can be rotated, where not all can.
- `rotate` is *exact* where rotating the residual stream, with a Hadamard matrix, an orthogonal one by lot, and with the heads
  that can be rotated, changes no output by more than 1e-5. In brackets as for `drop_channels`.
- `drop_heads` is *exact* where it finds half of the heads of each attention, whose results its output projection multiplies
  by 0 (the model is edited so that it does), and dropping them leaves the outputs as they were to 1e-5. In brackets, how many
  attentions have heads that are apart, where not all have.
- `drop_experts` is *exact* where it finds the experts that no token chooses (the router of the model is edited so that
  there are some) and dropping them leaves the outputs as they were to 1e-5; `merge_experts` where it finds two experts
  that are copies and merging them does; `densify_moe` where joining experts that are all copies does: it is *lossy*
  where the weights of a token's experts do not always have one sum.
- `skip_experts` is *exact* where the model that skips what weighs less than a token's best expert equals, to 1e-5, the model
  that does not and replays the weights that were left; `expose_routing` where recording, and replaying what was recorded,
  change no bit.
- `low_rank` is *exact* where all linears as two factors of full rank give the same outputs to 1e-5.
- `sparsify` is *exact* where SparseGPT leaves a model whose weights are 2:4 already, by magnitude, as it is, to the last bit.
- `smooth` is *exact* where half of the range of activations moved into weights leaves the outputs as they were to 1e-5.
- `quantize` (eight bits) is *lossy*: outputs within 10 %.
- *refused*: the message of the pass. *n/a*: the model has no part that the pass works on; it refuses that too.
"""


def page(lines: Mapping[tuple[str, str], str]) -> str:
    """The page with these lines, by section and family."""
    head = f"| family | blocks | {' | '.join(f'`{name}`' for name in PASSES)} |\n|---|---|{'---|' * len(PASSES)}"
    parts = [INTRODUCTION]
    for section, cases in SECTIONS.items():
        parts.append("\n".join([f"## {section}\n", head, *(lines[section, name] for name in cases), ""]))
    return "\n".join(parts)


def committed() -> dict[tuple[str, str], str]:
    """The lines of the committed page, by section and family."""
    found: dict[tuple[str, str], str] = {}
    section = ""
    for text in PAGE.read_text(encoding="utf-8").splitlines():
        if text.startswith("## "):
            section = text.removeprefix("## ")
        elif text.startswith("| ") and not text.startswith("| family "):
            found[section, text.split(" | ")[0].removeprefix("| ")] = text
    return found


def main(write: bool) -> None:
    """Make every line; print the page, or write it."""
    lines = {(section, name): line(SECTIONS[section][name](name)) for section, name in CASES}
    if write:
        PAGE.write_text(page(lines), encoding="utf-8")
    else:
        print(page(lines), end="")
