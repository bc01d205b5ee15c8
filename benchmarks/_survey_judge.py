"""What discovery found, beside what a model's configuration says, field by field where it says something."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import fields, replace
from itertools import combinations
from typing import Any

import torch
from _survey_said import HEADS, Part, first_field
from torch import fx, nn

from surgeon.activations import ACTIVATIONS, probe_grid
from surgeon.discovery.operators import is_reshape, kind
from surgeon.gates import gate
from surgeon.graph import Graph
from surgeon.structure import Region, Stream, Structure

# -- what was found -----------------------------------------------------------------------------------------------


def describe(structure: Structure) -> list[dict[str, Any]]:
    """Each stream as plain data."""
    return [_stream(stream) for stream in structure.streams]


def _stream(stream: Stream) -> dict[str, Any]:
    regions = [region for block in stream.blocks for region in block.regions]
    attentions = [a for r in regions for a in r.attention]
    ffns = [f for r in regions for f in r.ffn]
    every = [m for r in regions if len(r.moe) > 1 for m in r.moe if m.experts == m.top_k]  # shared experts as a stack
    moes = [m for r in regions for m in r.moe if m not in every]
    shared = [f for m in moes for f in m.shared]
    across = [  # networks over positions, whose widths no field says
        f for block in stream.blocks for r in block.regions for f in r.ffn
        if r.kind == "mixer" and f.up.in_features != r.entry.meta["val"].shape[block.features]
    ]  # fmt: skip
    return {
        "label": stream.label,
        "blocks": len(stream.blocks),
        "kinds": list(dict.fromkeys(block.kind for block in stream.blocks)),
        "attentions": len(attentions),
        "heads": _set(a.heads for a in attentions),
        "kv": _set(a.kv_heads for a in attentions),
        "ffns": len(ffns),
        "widths": _set([*(f.width for f in ffns if f not in across), *(m.width for m in moes), *(f.width for f in shared)]),
        "activations": _set(str(x.activation) for x in [*ffns, *moes, *shared]),
        "moes": len(moes),
        "experts": _set(m.experts for m in moes),
        "top_k": _set(m.top_k for m in moes),
        "scoring": _set(m.scoring for m in moes),
        "normalised": _set(m.normalised for m in moes),
        "scale": _set(m.scale * _behind(m.node) for m in moes),
        "groups": _set(m.groups for m in moes),
        "shared": _set(bool(m.shared or every) for m in moes),
    }


def _behind(node: fx.Node) -> float:
    """The number that the output of a mixture is multiplied by, which is a factor of every weight too."""
    readers = list(node.users)
    while len(readers) == 1 and is_reshape(readers[0]):
        readers = list(readers[0].users)
    if len(readers) != 1 or kind(readers[0]) != "aten::mul":
        return 1.0
    factor = readers[0].args[1]
    return float(factor) if isinstance(factor, int | float) else 1.0


def _set(values: Iterable[Any]) -> list[Any]:
    return sorted(set(values))


def opaque(structure: Structure) -> list[str]:
    """What was found and not understood, each with its reason."""
    found = []
    for block in structure.blocks:
        for region in block.regions:
            found += [f"{block.kind}: {region.kind}: {why}" for why in _reasons(region)]
    unread = [f"{name}: {why}" for name, why in structure.unrecognised.items()]
    return list(dict.fromkeys(found)) + unread


def _reasons(region: Region) -> Iterator[str]:
    if region.kind == "other":
        yield region.reason or "no reason"
    for part in region.ffn:
        if part.activation is None:
            yield "the activation of the network is none that is known"
    for moe in region.moe:
        if moe.router is None or moe.scoring == "other":
            yield f"the routing is {moe.scoring}: {region.reason}"


# -- comparison ---------------------------------------------------------------------------------------------------


def differences(structure: Structure, parts: list[Part], module: nn.Module, graph: Graph) -> list[str]:
    """What was found otherwise than it is said; empty where everything that is said is right."""
    named = [part for part in parts if part.modules]
    parts = _by_stream(structure, [replace(part, attends=_attends(module, graph)) for part in parts])
    open_ = list(parts)
    differing = []
    found = [(_stream(stream), stream) for stream in structure.streams]
    for stream, blocks in sorted(found, key=lambda s: -s[0]["blocks"]):
        candidates = [(part,) for part in open_]
        if not any(stream["blocks"] in part.layers for part in open_) and (len(found) > 1 or not _is_crossed(blocks)):
            candidates += [several for count in (2, 3) for several in combinations(open_, count) if _holds_all(stream, several)]
        joined = [(_joined(several), several) for several in candidates]
        judged = [(_unlike(stream, part, blocks), part, several) for part, several in joined]
        if not judged:
            if parts:
                differing.append(f"{stream['label']}: {stream['blocks']} blocks that no field speaks of")
            continue
        reasons, part, several = min(judged, key=lambda found: _distance(stream, *found[:2]))
        for taken in several:
            open_.remove(taken)
        differing += [f"{stream['label']} ({part.name}): {reason}" for reason in reasons]
    in_blocks = {name for stream in structure.streams for block in stream.blocks for name in block.weights}
    read = set(graph.parameters())
    for part in named:
        prefixes = [f"{path}." for path in part.modules]
        missed = [p for p in prefixes if _holds(p, read) and not _holds(p, in_blocks)]
        if missed:
            differing.append(f"{len(missed)} of {len(prefixes)} {part.name} are in no block")
    reached = _reached(module, graph)
    for part in open_:
        if part.modules:
            continue
        count = sum(length in part.layers for length in reached)
        matched = sum(bool(other.layers & part.layers) for other in parts if other not in open_)
        recurrent = sum(isinstance(m, nn.RNNBase) and m.num_layers in part.layers for m in module.modules())
        if part.certain and count > matched + recurrent:
            differing.append(f"no stream for {part.name} ({min(part.layers)} layers)")
    return differing


def _is_crossed(stream: Stream) -> bool:
    """Whether a stream reads another one by attention: what it reads must then be a stream of its own, not a part of it."""
    return any(a.cross for block in stream.blocks for region in block.regions for a in region.attention)


def _holds_all(stream: dict[str, Any], several: tuple[Part, ...]) -> bool:
    """Whether a stream has as many blocks as several stacks together that may follow one another, and an activation of each."""
    if any(part.modules for part in several) or stream["blocks"] != sum(max(part.layers) for part in several):
        return False
    return all(not part.activations or any(_is_said(name, part) for name in stream["activations"]) for part in several)


def _joined(several: tuple[Part, ...]) -> Part:
    """Stacks that follow one another, as one: what is right for either."""
    if len(several) == 1:
        return several[0]
    sets = {f.name: set().union(*(getattr(part, f.name) for part in several)) for f in fields(Part) if f.default_factory is set}
    for name in ("heads", "kv", "widths", "activations"):  # where one says nothing, nothing is said of both
        sets[name] = sets[name] if all(getattr(part, name) for part in several) else set()
    return replace(
        several[0], **sets, name=" and ".join(part.name for part in several), layers={sum(max(part.layers) for part in several)}
    )


def _holds(prefix: str, names: set[str]) -> bool:
    return any(name.startswith(prefix) for name in names)


def _by_stream(structure: Structure, parts: list[Part]) -> list[Part]:
    """The parts that modules name, joined or divided as the streams hold them: stages have a list each, branches share one."""
    named = [part for part in parts if part.modules]
    if not named or len(structure.streams) == len(named) == len(parts):
        return parts
    if len(structure.streams) == 1:  # the stages of one stream
        every = {key: set().union(*(getattr(part, key) for part in named)) for key in ("heads", "widths")}
        modules = tuple(path for part in named for path in part.modules)
        return [Part(" and ".join(part.name for part in named), {len(modules)}, **every, modules=modules)]
    found = []
    for stream in structure.streams:
        read = {name for block in stream.blocks for name in block.weights}
        for part in named:
            own = tuple(path for path in part.modules if _holds(f"{path}.", read))
            if own:
                found.append(replace(part, name=part.name, layers={len(own)}, modules=own))
    return found


def _distance(stream: dict[str, Any], reasons: list[str], part: Part) -> tuple[bool, int, bool, str]:
    """How far a part is from being what a stream is: of as many layers, alike in most, and of the same side."""
    side = stream["label"].partition(".")[0]
    return stream["blocks"] not in part.layers, len(reasons), side not in part.name.rpartition(".")[2], part.name


def _aligned(stream: Stream, part: Part) -> bool:
    """Whether every block found lies within one of the modules, or in none, and every module holds a block.

    A module with two sublayers that mix positions is two blocks by the definition of a block; what changes the resolution
    between stages, with a residual of its own, is a block in no module.
    """
    held = set()
    for block in stream.blocks:
        own = {path for name in block.weights for path in part.modules if name.startswith(f"{path}.")}
        if len(own) > 1:
            return False
        held |= own
    return held == set(part.modules)


def _attending(stream: Stream) -> int:
    """The number of blocks without those in front of the first attention that only convolve, behind a change of size."""
    first = next((i for i, block in enumerate(stream.blocks) if any(r.attention for r in block.regions)), 0)
    ends = {region.entry for region in stream.transitions}
    front = first and stream.blocks[first - 1].exit in ends and {block.kind for block in stream.blocks[:first]} == {"mixer"}
    return len(stream.blocks) - (first if front else 0)


def _unlike(stream: dict[str, Any], part: Part, found_in: Stream) -> list[str]:
    found = []
    if not {stream["blocks"], _attending(found_in)} & part.layers and not (part.modules and _aligned(found_in, part)):
        found.append(f"{stream['blocks']} blocks, said {_text(part.layers)} layers")
    for key, wanted in (("heads", part.heads), ("kv", part.kv), ("widths", part.widths)):
        wrong = [v for v in stream[key] if wanted and v not in wanted]
        if wrong:
            found.append(f"{key} {_text(wrong)}, said {_text(wanted)}")
    for key, wanted in (("experts", part.experts), ("top_k", part.top_k)):
        wrong = [v for v in stream[key] if wanted and v not in wanted]
        if wrong:
            found.append(f"{key} {_text(wrong)}, said {_text(wanted)}")
    known = [scoring for scoring in stream["scoring"] if scoring != "other"]  # of others nothing is told
    for key in ("normalised", "scale", "groups", "shared") if known else ("shared",):
        wanted = getattr(part, key)
        wrong = [v for v in stream[key] if wanted and not any(abs(v - w) <= 1e-3 * abs(w) for w in wanted)]
        if wrong:
            found.append(f"{key} {_text(wrong)}, said {_text(wanted)}")
    if part.heads and part.attends and not stream["attentions"] and not any("mixer" in kind for kind in stream["kinds"]):
        found.append(f"no attention, said {_text(part.heads)} heads")
    # A network with a convolution or a normalisation over positions in it is a mixer.
    if part.widths and not stream["ffns"] and not stream["moes"] and not any("mixer" in kind for kind in stream["kinds"]):
        found.append(f"no network, said widths {_text(part.widths)}")
    if part.experts and not stream["moes"]:
        found.append(f"no mixture, said {_text(part.experts)} experts")
    names = [name for name in stream["activations"] if name != "None"]
    if part.activations and names and not any(_is_said(name, part) for name in names):
        found.append(f"activations {', '.join(names)}, said {', '.join(part.activations)}")
    return found


def _attends(module: nn.Module, graph: Graph) -> bool:
    """Whether the graph reads a weight of a module that has heads, or there is no such module."""
    heads = {path for path, part in module.named_modules() if first_field(part, HEADS) and any(True for _ in part.parameters())}
    read = graph.parameters()
    return not heads or any(name.startswith(f"{path}.") for path in heads for name in read)


def _text(values: Iterable[Any]) -> str:
    return "/".join(str(v) for v in sorted(values))


def _is_said(name: str, part: Part) -> bool:
    return name != "None" and any(_same(name, library, part.limits) for library in part.activations)


def _same(name: str, library: str, limits: set[float]) -> bool:
    """Whether an activation of surgeon is the one of transformers with that name, by values, at these limits or none."""
    from transformers.activations import ACT2FN

    label = re.sub(r"^gated-", "", library)
    if label not in ACT2FN:
        return True
    grid = probe_grid().float()
    wanted = ACT2FN[label](grid)
    own = gate(name)
    if label not in ACTIVATIONS and own.base == label:  # its numbers are learned
        return True
    if limits and {limit for limit in (own.gate_max, own.cap, own.up_limit) if limit is not None} <= limits:
        own = replace(own, gate_max=None, cap=None, up_limit=None)
    value = own.alone(grid)
    return bool(torch.allclose(value, wanted, atol=2e-3))


def _reached(module: nn.Module, graph: Graph) -> list[int]:
    """Lengths of the lists of layers of which every entry has a weight that the graph reads."""
    read = set(graph.parameters())
    found = []
    for path, part in module.named_modules():
        if isinstance(part, nn.ModuleList | nn.Sequential) and len(part) > 1:
            prefixes = [f"{path}.{name}." for name, _ in part.named_children()]
            if all(any(name.startswith(prefix) for name in read) for prefix in prefixes):
                found.append(len(part))
    return found
