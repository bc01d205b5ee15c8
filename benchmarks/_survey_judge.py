"""What discovery found, beside what a model's configuration says, field by field where it says something."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from itertools import combinations
from math import ceil
from typing import Any

import torch
from torch import fx, nn

from surgeon.activations import ACTIVATIONS, probe_grid
from surgeon.discovery.operators import is_reshape, kind
from surgeon.gates import gate
from surgeon.graph import Graph
from surgeon.structure import Region, Stream, Structure


@dataclass
class Part:
    """One stack of layers; every field holds the values that are right for it, empty where nothing is said.

    Attributes:
        name: where it is said.
        layers: number of layers.
        heads, kv: heads of queries, and of keys and values.
        widths: intermediate neurons of networks and experts.
        activations: names of the library's activations.
        experts, top_k: of mixtures.
        normalised, scale, groups, shared: of their routing, and whether there are shared experts.
        limits: where networks clamp their neurons.
        certain: whether the model is known to hold it; others may lie idle for the inputs that were given.
        attends: whether attention is computed where the model runs; some have it in a kernel of a device only.
        modules: paths of the modules that are the layers, where modules say it.
    """

    name: str
    layers: set[int]
    heads: set[int] = field(default_factory=set)
    kv: set[int] = field(default_factory=set)
    widths: set[int] = field(default_factory=set)
    activations: set[str] = field(default_factory=set)
    experts: set[int] = field(default_factory=set)
    top_k: set[int] = field(default_factory=set)
    normalised: set[bool] = field(default_factory=set)
    scale: set[float] = field(default_factory=set)
    groups: set[int] = field(default_factory=set)
    shared: set[bool] = field(default_factory=set)
    limits: set[float] = field(default_factory=set)
    certain: bool = True
    attends: bool = True
    modules: tuple[str, ...] = ()


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


# -- what a configuration says ------------------------------------------------------------------------------------

_LAYER_FIELDS = {
    "": ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth", "num_blocks", "layers"),
    "encoder": ("encoder_layers", "num_encoder_layers", "encoder_num_layers"),
    "decoder": ("decoder_layers", "num_decoder_layers", "decoder_num_layers", "decoder_num_hidden_layers"),
}
_MORE_LAYERS = re.compile(
    r"(?P<side>(?!encoder|decoder)[a-z]+)_num_hidden_layers|num_(spatial|temporal|auxiliary)_layers|prompt_layers"
)
"""Further stacks, such as that of a predictor; they may lie idle."""
_HEADS = ("num_attention_heads", "num_heads", "n_head", "n_heads", "attention_heads", "num_attn_heads")
_KV = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "multi_query_group_num", "n_head_kv")
_WIDTH = re.compile(
    r"\w*intermediate_size\w*|\w*ffn\w*(size|dim)|d_ff|n_inner|mlp_dim|d_inner|\w*feedforward_dim|\w*linear_units|dim_feedforward"
    r"|\w*mlp_hidden\w*|hidden_size_per_layer_input"
)
_ACTIVATIONS = (
    "hidden_act", "activation_function", "hidden_activation", "activation", "dense_act_fn", "act_fn", "mlp_hidden_act",
    "encoder_activation_function", "decoder_activation_function", "ffn_act_fn",
)  # fmt: skip
_EXPERTS = re.compile(r"(num_|n_)?(local_|routed_)?experts|moe_num_experts|num_routed_experts|moe_num_primary_experts")
_TOP_K = re.compile(
    r"num_experts_per_(tok|token)|moe_k|moe_top_?k|n_experts_per_tok|experts_per_token|num_selected_experts|top_k_experts"
)
_NORMALISED = re.compile(r"norm_topk_prob|moe_renormalize|route_norm")
_SCALE = re.compile(r"(routed|router|moe_router|moe_routed)_scaling_factor|route_scale")
_MIXED = re.compile(r"is_moe|enable_moe_block")
_GROUPS = re.compile(r"n_group|num_expert_group|moe_n_group")
_SHARED = re.compile(r"(n|num|moe_num)_shared_experts?|(moe_)?shared_(expert_)?intermediate_size")


def said(config: Any, name: str = "") -> list[Part]:
    """The stacks of layers that a configuration of transformers and its parts name."""
    values = {k: v for k, v in vars(config).items() if not k.startswith("_")}
    values |= {k: _value(config, k) for k in _by_layer(config) if k in values}
    found = list(_stacks(config, values, name))
    for key, value in values.items():
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            found += said(value, f"{name}.{key}".strip("."))
    return found


def with_tables(parts: list[Part], module: nn.Module) -> list[Part]:
    """The parts, with a width of 1 where a table has a row for each expert: then an expert is one neuron."""
    rows = {m.num_embeddings for m in module.modules() if isinstance(m, nn.Embedding)}
    return [replace(part, widths=part.widths | {1}) if part.experts & rows else part for part in parts]


def _by_layer(config: Any) -> set[str]:
    """The fields that differ between the layers of a model."""
    return set(config._heterogeneity_spec.per_layer_attributes) if getattr(config, "is_heterogeneous", False) else set()


def _value(config: Any, name: str) -> Any:
    """A field; a list with that of each layer where they differ."""
    if name in _by_layer(config):
        return [getattr(layer, name, None) for layer in config.per_layer_config]
    return getattr(config, name, None)


def with_layers(parts: list[Part], module: nn.Module, inputs: dict[str, Any]) -> list[Part]:
    """The parts, with what their modules add to the fields: layers that run more than once, or in several lists, and widths.

    Layers count as often as they are called, with those of the same class in other lists of the same configuration.  A width
    is that of gate and up together where one linear makes that many numbers and one beside it reads half of them.

    Args:
        parts: what the fields say.
        module: the model.
        inputs: what it is run on, once.
    """
    groups: dict[tuple[type[nn.Module], str], list[nn.ModuleList]] = {}
    for path, part in module.named_modules():
        if isinstance(part, nn.ModuleList) and len(part) > 0:
            owners = [module.get_submodule(path.rsplit(".", n)[0]) for n in range(1, path.count(".") + 1)]
            config = next((owner.config for owner in (*owners, module) if hasattr(owner, "config")), None)
            groups.setdefault((type(part[0]), _but_depth(config)), []).append(part)
    calls: Counter[nn.Module] = Counter()
    layers = {layer for lists in groups.values() for entries in lists for layer in entries}
    hooks = [layer.register_forward_pre_hook(lambda layer, _: calls.update([layer])) for layer in layers]
    try:
        with torch.no_grad():
            module(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    found = []
    halves = _halves_of(module)
    for part in parts:
        counts = set(part.layers)
        for lists in groups.values():
            total = sum(calls[layer] for entries in lists for layer in entries)
            longest = max(len(entries) for entries in lists)
            counts |= {total} if longest in part.layers and total > longest else set()
        found.append(replace(part, layers=counts, widths=part.widths | {w // 2 for w in part.widths & halves}))
    return found


def _but_depth(config: Any) -> str:
    """A configuration as text, without how many layers there are."""
    fields = vars(config) if config is not None else {}
    names = {name for names in _LAYER_FIELDS.values() for name in names}
    return str(sorted((key, str(value)) for key, value in fields.items() if key not in names))


def _halves_of(module: nn.Module) -> set[int]:
    """Numbers of outputs of linears beside which another one reads half as many."""
    found = set()
    for part in module.modules():
        linears = [m for m in part.modules() if isinstance(m, nn.Linear)]
        if len(linears) == 2:
            found |= {a.out_features for a in linears for b in linears if a is not b and a.out_features == 2 * b.in_features}
    return found


def _first(config: Any, names: Iterable[str]) -> Any:
    return next((v for n in names if (v := _value(config, n)) is not None and not isinstance(v, bool)), None)


def _numbers(value: Any) -> set[int]:
    items = value if isinstance(value, list | tuple) else [value]
    return {v for v in items if isinstance(v, int) and not isinstance(v, bool) and v > 0}


def _by_stage(value: Any) -> list[int]:
    """The layers of each stage, where a field lists them."""
    return [v for v in value if isinstance(v, int)] if isinstance(value, list | tuple) else []


def _stacks(config: Any, values: dict[str, Any], name: str) -> Iterator[Part]:
    depths = values.get("depths")
    sides = [side for side in ("encoder", "decoder") if _numbers(_first(config, _LAYER_FIELDS[side]))]
    if isinstance(depths, list | tuple) and _numbers(depths):
        yield _part(config, values, name or "stages", {sum(depths)}, "")
        return
    for key, value in values.items():
        more = _MORE_LAYERS.fullmatch(key)
        if more and _numbers(value):
            stack = _part(config, values, f"{name}.{key}".strip("."), _numbers(value), more["side"] or "")
            yield replace(stack, certain=False)
    latents = _numbers(values.get("num_global_tokens"))
    if latents and "encoder" in sides:  # a stream of their own; that of the last layer is not read
        count = max(_numbers(_first(config, _LAYER_FIELDS["encoder"])))
        yield replace(_part(config, values, f"{name}.global tokens".strip("."), {count, count - 1}, "encoder"), certain=False)
    for ratio in _numbers(values.get("channel_shrink_ratio")):  # a narrow stream beside; that of the last layer may not be read
        count = max(_numbers(_first(config, _LAYER_FIELDS[""])))
        beside = _part(config, values, f"{name}.beside".strip("."), {count, count - 1}, "")
        yield replace(beside, widths={width // ratio for width in beside.widths}, certain=False)
    for side in sides:
        yield _part(config, values, f"{name}.{side}".strip("."), _numbers(_first(config, _LAYER_FIELDS[side])), side)
    alone = _numbers(_first(config, _LAYER_FIELDS[""]))
    stages = _by_stage(_first(config, _LAYER_FIELDS[""]))
    alone = {sum(stages)} if len(stages) > 1 else alone
    kinds = next((v for k in ("layers_block_type", "layer_types") if isinstance(v := values.get(k), list | tuple)), ())
    networks = sum(kind in ("mlp", "moe") for kind in kinds)
    if networks:  # layers of one sublayer each: a network belongs to the block of the mixer before it
        alone = {len(kinds) - networks}
    if alone and "encoder" in sides:
        return
    if alone and sides == ["decoder"]:
        yield _part(config, values, f"{name}.encoder".strip("."), alone, "encoder")
    elif alone:
        yield _part(config, values, name or "layers", alone, "")


def _part(config: Any, values: dict[str, Any], name: str, count: set[int], side: str) -> Part:
    def own(names: tuple[str, ...]) -> Any:
        return _first(config, [f"{side}_{n}" for n in names] if side else []) or _first(config, names)

    def every(pattern: str) -> set[int]:
        return set().union(*(_numbers(v) for k, v in values.items() if re.fullmatch(pattern, k)))

    heads = _numbers(own(_HEADS)) or _numbers(values.get(f"{side}_attention_heads"))
    others = every(r"(\w+_)?num_heads|\w*attention_heads")
    for ratio in every("head_ratio"):  # of the heads that a convolution takes the place of
        heads, others = {h // ratio for h in heads}, {h // ratio for h in others}
    kv = _numbers(own(_KV)) | every(r"\w+_num_key_value_heads")
    widths = every(_WIDTH.pattern)
    hidden = _numbers(_first(config, ("hidden_size", "d_model", "n_embd"))) | _numbers(values.get("hidden_sizes"))
    hidden |= _numbers(values.get(f"{side}_hidden_size"))
    stages, first = values.get("depths"), values.get("embed_dim")
    if isinstance(stages, list | tuple) and isinstance(first, int):  # every stage is twice as wide as the one before
        hidden |= {first * 2**stage for stage in range(len(stages))}
    ratio = own(("mlp_ratio", "mlp_ratios", "ffn_ratio", "mlp_expansion", "expansion_factor"))
    for factor in ratio if isinstance(ratio, list | tuple) else [ratio] if ratio is not None else []:
        widths |= {int(h * factor) for h in hidden if isinstance(factor, int | float)}
    for unit in every(r"\w*(ff|ffn|block)\w*multiple_of"):  # two thirds of them, rounded up, where a third matrix is a gate
        widths |= {unit * ceil(share * w / unit) for w in set(widths) for share in (1, 2 / 3)}
    widths |= {n * w for w in set(widths) for k, v in values.items() if "shared_expert" in k for n in _numbers(v) if n < 9}
    act = own(_ACTIVATIONS)
    if values.get("swiglu_alpha") == 1.702:  # x sigmoid(1.702 x), whatever the field says that the library reads elsewhere
        act = "quick_gelu"
    switched_off = any(v is False for k, v in values.items() if _MIXED.fullmatch(k))
    experts, top_k = (set(), set()) if switched_off else (every(_EXPERTS.pattern), every(_TOP_K.pattern))
    return Part(
        name, count, heads | (others if heads else set()), kv or heads | others, widths,
        {act} if isinstance(act, str) else set(), {e for e in experts if e > 1}, top_k,
        {v for k, v in values.items() if _NORMALISED.fullmatch(k) and isinstance(v, bool)},
        {float(v) for k, v in values.items() if _SCALE.fullmatch(k) and isinstance(v, int | float)},
        every(_GROUPS.pattern), {bool(v) for k, v in values.items() if _SHARED.fullmatch(k)},
        {float(v) for k, v in values.items() if re.fullmatch(r"\w*limit\w*", k) and isinstance(v, int | float)},
    )  # fmt: skip


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
    heads = {path for path, part in module.named_modules() if _first(part, _HEADS) and any(True for _ in part.parameters())}
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
