"""What a model's configuration and modules say of its layers: the numbers that discovery should find."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from math import ceil
from typing import Any

import torch
from torch import nn


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


_LAYER_FIELDS = {
    "": ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth", "num_blocks", "layers"),
    "encoder": ("encoder_layers", "num_encoder_layers", "encoder_num_layers"),
    "decoder": ("decoder_layers", "num_decoder_layers", "decoder_num_layers", "decoder_num_hidden_layers"),
}
_MORE_LAYERS = re.compile(
    r"(?P<side>(?!encoder|decoder)[a-z]+)_num_hidden_layers|num_(spatial|temporal|auxiliary)_layers|prompt_layers"
)
"""Further stacks, such as that of a predictor; they may lie idle."""
HEADS = ("num_attention_heads", "num_heads", "n_head", "n_heads", "attention_heads", "num_attn_heads")
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


def first_field(config: Any, names: Iterable[str]) -> Any:
    """The first of some fields that is set to anything."""
    return next((v for n in names if (v := _value(config, n)) is not None and not isinstance(v, bool)), None)


def _numbers(value: Any) -> set[int]:
    items = value if isinstance(value, list | tuple) else [value]
    return {v for v in items if isinstance(v, int) and not isinstance(v, bool) and v > 0}


def _by_stage(value: Any) -> list[int]:
    """The layers of each stage, where a field lists them."""
    return [v for v in value if isinstance(v, int)] if isinstance(value, list | tuple) else []


def _stacks(config: Any, values: dict[str, Any], name: str) -> Iterator[Part]:
    depths = values.get("depths")
    sides = [side for side in ("encoder", "decoder") if _numbers(first_field(config, _LAYER_FIELDS[side]))]
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
        count = max(_numbers(first_field(config, _LAYER_FIELDS["encoder"])))
        yield replace(_part(config, values, f"{name}.global tokens".strip("."), {count, count - 1}, "encoder"), certain=False)
    for ratio in _numbers(values.get("channel_shrink_ratio")):  # a narrow stream beside; that of the last layer may not be read
        count = max(_numbers(first_field(config, _LAYER_FIELDS[""])))
        beside = _part(config, values, f"{name}.beside".strip("."), {count, count - 1}, "")
        yield replace(beside, widths={width // ratio for width in beside.widths}, certain=False)
    for side in sides:
        yield _part(config, values, f"{name}.{side}".strip("."), _numbers(first_field(config, _LAYER_FIELDS[side])), side)
    alone = _numbers(first_field(config, _LAYER_FIELDS[""]))
    stages = _by_stage(first_field(config, _LAYER_FIELDS[""]))
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
        return first_field(config, [f"{side}_{n}" for n in names] if side else []) or first_field(config, names)

    def every(pattern: str) -> set[int]:
        return set().union(*(_numbers(v) for k, v in values.items() if re.fullmatch(pattern, k)))

    heads = _numbers(own(HEADS)) or _numbers(values.get(f"{side}_attention_heads"))
    others = every(r"(\w+_)?num_heads|\w*attention_heads")
    for ratio in every("head_ratio"):  # of the heads that a convolution takes the place of
        heads, others = {h // ratio for h in heads}, {h // ratio for h in others}
    kv = _numbers(own(_KV)) | every(r"\w+_num_key_value_heads")
    widths = every(_WIDTH.pattern)
    hidden = _numbers(first_field(config, ("hidden_size", "d_model", "n_embd"))) | _numbers(values.get("hidden_sizes"))
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
