"""Small configurations of transformers models, made by the names of their fields.

The names follow the library's conventions, so that one set of rules serves all models: widths, heads, layers, vocabularies,
positions, experts, images.  A rule maps the default value of a field to a small one and keeps what models demand: heads
divide widths, per-layer lists are as long as there are layers, ids are below the vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

HIDDEN, FFN, HEADS, HEAD, VOCABULARY, POSITIONS, EXPERTS = 64, 112, 4, 16, 160, 128, 8

Rule = Callable[[int], int]


def _at_most(limit: int) -> Rule:
    return lambda value: min(value, limit)


def _exactly(size: int) -> Rule:
    return lambda value: size if value > 0 else value


def _few(value: int) -> int:
    return min(value, 2) if value > 1 else value


_RULES: tuple[tuple[str, Rule], ...] = (
    (r"hidden_size|d_model|n_embd|embed_dim|embedding_size|emb_dim|model_dim|hidden_dim|word_embed_proj_dim", _exactly(HIDDEN)),
    (r"(out|output|text|encoder|decoder|vision|audio|projector|projection|image_text|cross|pooler|reassemble|backbone)_hidden_(size|dim)",
     _exactly(HIDDEN)),
    (r"projection_(dim|size)|output_dim|latent_dim|encoder_embed_dim|decoder_embed_dim|token_embedding_size|width",
     _exactly(HIDDEN)),
    (r"pooler_output_size|hidden_size_per_layer_input|lexical_size", _exactly(HIDDEN)),
    (r"(\w+_)?intermediate_size(_mlp)?|(\w+_)?ffn_(hidden_size|dim)|d_ff|n_inner|mlp_dim|d_inner|dim_feedforward"
     r"|\w*feedforward_dim|linear_units|(encoder|decoder)_linear_units", _exactly(FFN)),
    (r"moe_intermediate_size|expert_ffn_hidden_size|moe_ffn_hidden_size", _exactly(48)),
    (r"(\w+_)?attention_heads(_per_layer)?|num_heads|n_heads?|num_attn_heads|(\w+_)?num_heads", _exactly(HEADS)),
    (r"linear_num_value_heads", _exactly(HEADS)),
    (r"linear_num_key_heads", _exactly(2)),
    (r"mamba_n(um)?_heads|mamba_heads", _exactly(8)),
    (r"head_dim|d_kv|kv_channels|attention_head_size|global_head_dim|mamba_(d_head|head_dim)|linear_(key|value)_head_dim"
     r"|qk_nope_head_dim|v_head_dim|swa_head_dim|d_head|attention_head_dim", _exactly(HEAD)),
    (r"qk_rope_head_dim", _exactly(8)),
    (r"qk_head_dim", _exactly(24)),
    (r"kv_lora_rank", _exactly(32)),
    (r"q_lora_rank|o_lora_rank", _exactly(48)),
    (r"index_n_heads", _few),
    (r"index_head_dim", _exactly(16)),
    (r"(\w+_)?vocab_size(_per_layer_input)?", _at_most(VOCABULARY)),
    (r"max_position_embeddings|n_positions|max_seq_len|n_ctx|max_target_positions|model_max_length", _at_most(POSITIONS)),
    (r"max_source_positions", _at_most(16)),
    (r"(num_|n_)?(local_|routed_)?experts|moe_num_experts|num_routed_experts|moe_num_primary_experts", _at_most(EXPERTS)),
    (r"num_experts_per_(tok|token)|moe_k|moe_top_?k|n_experts_per_tok|experts_per_token|num_selected_experts", _few),
    (r"n_group|num_expert_group", _few),
    (r"topk_group", _at_most(1)),
    (r"n_shared_experts|num_shared_experts|moe_num_shared_experts", _few),
    (r"first_k_dense_replace|moe_layer_start_index|num_kv_shared_layers|num_dense_layers|num_first_dense_layers", _at_most(1)),
    (r"num_queries|num_query_tokens|resampler_n_latents|num_latents|query_length", _at_most(10)),
    (r"(\w+_)?codebook_size", _at_most(128)),
    (r"\w+_hash_\w*vocab\w*", _at_most(VOCABULARY)),
    (r"num_embeddings", _at_most(VOCABULARY)),
    (r"attention_window", _at_most(8)),
)  # fmt: skip

# What some configurations leave open and their models need; tried where a model could not be built without.
_OPEN: dict[str, Callable[[int], Any]] = {
    "layer_types": lambda count: ["full_attention"] * count,
    "mlp_layer_types": lambda count: ["dense"] + ["sparse"] * (count - 1),
    "num_experts": lambda _: EXPERTS,
    "n_routed_experts": lambda _: EXPERTS,
    "num_key_value_heads": lambda _: HEADS,
    "n_shared_experts": lambda _: 1,
    "vocab_size": lambda _: VOCABULARY,
    "pad_token_id": lambda _: 0,
    "top_k_experts": lambda _: 2,
    "num_experts_per_tok": lambda _: 2,
    "prediction_length": lambda _: 8,
    "moe_intermediate_size": lambda _: 48,
}

_LAYERS = re.compile(
    r"num_(hidden_|encoder_|decoder_)?layers|n_layers?|(\w+_)?(encoder|decoder|entity|text|speech)_layers|depth|layers"
    r"|num_(hidden|encoder|decoder|spatial|temporal|auxiliary|lstm)_layers|l_layers|x_layers|r_layers|num_blocks|conf_num_hidden_layers"
)
_INDICES = re.compile(r"\w*(_indexes|_indices|_idxs|_layers|_layer_ids?|_indexs|_layer_idx)|insert_layer_id")
_ID = re.compile(r"\w*(token|tok)_(id|index)|\w+_(start|end|begin)_id")
_KV = re.compile(r"(\w+_)?num_key_value_heads|num_kv_heads|n_kv_heads|n_head_kv|multi_query_group_num")
_KINDS = re.compile(r"layer_types|block_types?|layers_block_type|_period|_interval|_step|sparse_|pattern")


def small(config: Any, level: int = 0, filled: bool = False, own: dict[str, Any] | None = None) -> dict[str, Any]:
    """Keyword arguments of a small configuration of the same class.

    Args:
        config: the class's default configuration.
        level: 0 for the smallest; 1 leaves images, pyramids, kinds of layers and the size of a head; 2 shrinks only depth,
            vocabularies, positions and experts, and leaves the widths.
        filled: fill in what is left open.
        own: what fields are instead; a dictionary where a field is a configuration.
    """
    own = own or {}
    fields = {name: value for name, value in vars(config).items() if not name.startswith("_")}
    found: dict[str, Any] = {}
    depth = None if level > 0 and _counts_stages(fields) else _depth(fields)
    ids = _Ids(int(fields.get("vocab_size") or 0))
    for name, value in fields.items():
        if _is_config(value):
            fewer = {**_set(value), **small(value, level, filled, own.get(name))}
            found[name] = type(value)(**fewer, **_stages(value, fewer))
        elif name == "head_dim" and value is None and level == 0 and "qk_rope_head_dim" not in fields:
            found[name] = HEAD  # some models do not derive it
        elif value is None and filled and name in _OPEN:
            found[name] = _OPEN[name](layers(fields))
        elif isinstance(value, bool) or value is None:
            continue
        elif isinstance(value, int):
            changed = _integer(name, value, fields, level)
            changed = ids.below(changed) if _ID.fullmatch(name) else changed
            found |= {name: changed} if changed != value else {}
        elif isinstance(value, list | tuple) and value:
            changed = _sequence(name, list(value), fields, depth, level)
            changed = [ids.below(v) for v in changed] if _ID.fullmatch(name) and _integers(changed) else changed
            found |= {name: type(value)(changed)} if changed != list(value) else {}
        elif isinstance(value, dict) and level < 2:
            changed = _sections(value, fields) if level == 0 else _with_sections(name, value, fields)
            found |= {name: changed} if changed != value else {}
    return {**found, **{name: value for name, value in own.items() if not _is_config(fields.get(name))}}


def _set(config: Any) -> dict[str, Any]:
    """The fields of a part that the whole has set otherwise than the part's class does."""
    try:
        usual = vars(type(config)())
    except Exception:  # a class may demand more than its defaults
        return {}
    fields = {name: value for name, value in vars(config).items() if not name.startswith(("_", "out_", "stage_"))}
    return {name: v for name, v in fields.items() if name in usual and not _is_config(v) and v != usual[name]}


def _stages(config: Any, fewer: dict[str, Any]) -> dict[str, Any]:
    """Which stages a smaller backbone gives, as many as the whole takes, the last of these its last."""
    wanted = getattr(config, "out_indices", None)
    if not wanted or not getattr(config, "stage_names", None):
        return {}
    names, count = type(config)(**fewer).stage_names, len(config.stage_names)
    last = len(names) - 1
    places = [index % count for index in wanted]
    chosen = sorted({place * last // max(1, *places) for place in places})
    if len(chosen) < len(wanted):
        chosen = list(range(max(0, len(names) - len(wanted)), len(names)))
    return {"out_indices": list(wanted) if names == config.stage_names else chosen}


def _is_config(value: Any) -> bool:
    return hasattr(value, "to_dict") and hasattr(value, "model_type")


def _integers(values: list[Any]) -> bool:
    return all(isinstance(v, int) and not isinstance(v, bool) for v in values)


def _depth(fields: dict[str, Any]) -> int | None:
    return next((v for k, v in fields.items() if _LAYERS.fullmatch(k) and isinstance(v, int) and not isinstance(v, bool)), None)


def _counts_stages(fields: dict[str, Any]) -> bool:
    """Whether the number of layers is that of stages, each of which has a depth."""
    depths = fields.get("depths")
    return isinstance(depths, list | tuple) and len(depths) == _depth(fields)


def layers(fields: dict[str, Any]) -> int:
    """Few layers, four where their kinds may differ."""
    return 4 if any(_KINDS.search(name) for name in fields) else 3


def _integer(name: str, value: int, fields: dict[str, Any], level: int) -> int:
    if _LAYERS.fullmatch(name):
        if level > 0 and _counts_stages(fields):
            return value
        return min(value, layers(fields))
    if re.fullmatch(r"attn_layer_period|expert_layer_period", name):
        return min(value, 2)
    if re.fullmatch(r"attn_layer_offset", name):
        return min(value, 1)
    if level < 2 and _KV.fullmatch(name):
        heads = next((v for k, v in fields.items() if re.fullmatch(r"num_attention_heads|n_heads?|num_heads", k)), None)
        return value if value <= 1 else HEADS if value == heads else 2
    if level < 1 and name == "image_size":
        patch = fields.get("patch_size")
        return patch * 4 if isinstance(patch, int) and 8 <= patch <= 32 else min(value, 64)
    if name == "head_dim" and "qk_rope_head_dim" in fields:
        return 8 if level < 2 else value
    rule = next((rule for pattern, rule in reversed(_RULES) if re.fullmatch(pattern, name)), None)
    if rule is None:
        return value
    is_width = rule(10**6) in (HIDDEN, FFN, 48, HEADS, HEAD, 8, 24, 32) and rule(1) == rule(10**6)
    if is_width and level == 2:
        return value
    head = _head(fields) if level == 1 else HEAD
    if head != HEAD and rule(10**6) in (HIDDEN, HEAD):
        return HEADS * head if rule(10**6) == HIDDEN else value
    if is_width and any(_pyramid(fields)):  # one width beside lists of heads: the first stage's
        heads = next(_pyramid(fields))
        return 8 * heads[0] if re.fullmatch(r"embed_dim|hidden_size", name) else value
    return rule(value)


def _head(fields: dict[str, Any]) -> int:
    """The size of a head by default."""
    hidden, heads = fields.get("hidden_size"), fields.get("num_attention_heads")
    own = fields.get("head_dim")
    if isinstance(own, int):
        return own
    return hidden // heads if isinstance(hidden, int) and isinstance(heads, int) and hidden % heads == 0 else HEAD


def _pyramid(fields: dict[str, Any]) -> Any:
    """Lists of heads by stage."""
    for name in ("num_heads", "num_attention_heads"):
        value = fields.get(name)
        if isinstance(value, list | tuple) and value and _integers(list(value)):
            yield list(value)


def _sequence(name: str, value: list[Any], fields: dict[str, Any], depth: int | None, level: int) -> list[Any]:
    count = layers(fields)
    if name == "attention_window" and _integers(value):
        return [min(v, 8) for v in value[:count]]
    if name == "num_attention_heads_per_layer" and _integers(value) and level < 2:
        return [HEADS for _ in value[:count]]
    if depth is not None and depth > count and len(value) == depth and level < 3:
        if level > 0 or not isinstance(value[0], str):
            return value[:count]
        kinds = list(dict.fromkeys(value))[:count]  # every kind of layer once, the rest as at the bottom
        rest = value[: count - len(kinds)]
        return [*rest, *kinds] if len(kinds) > 1 else value[:count]
    if re.fullmatch(r"depths|num_blocks|depth", name) and _integers(value):
        return [min(v, 2) for v in value] if level < 2 else value
    if depth is not None and depth > count and _integers(value) and max(value) >= count and _INDICES.fullmatch(name):
        fewer = sorted({v * count // depth for v in value}) if max(value) < depth else value
        kind = name.endswith("_layers") and len(fewer) == count  # of layers of two kinds, one of the other stays
        return fewer[1:] if kind else fewer
    if level < 1 and name in ("hidden_sizes", "embed_dims", "embed_dim") and _integers(value):
        heads = next(_pyramid(fields), None)
        if heads and len(heads) == len(value) and all(v % h == 0 for v, h in zip(value, heads, strict=True)):
            return [h * 8 for h in heads]
    if level < 1 and name == "image_size" and _integers(value):
        return [min(v, 64) for v in value]
    return value


def _sections(value: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """Dictionaries of the rotary embedding, whose sections add up to half a head."""
    found = {}
    for key, item in value.items():
        if isinstance(item, dict):
            found[key] = _sections(item, fields)
        elif key == "mrope_section" and isinstance(item, list) and sum(item):
            half = HEAD // 2
            parts = [max(1, v * half // sum(item)) for v in item]
            found[key] = [*parts[:-1], half - sum(parts[:-1])]
        else:
            found[key] = item
    return found


def _with_sections(name: str, value: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """Sections where a model takes ones that fit another size of head."""
    if name != "rope_parameters" or "rope_type" not in value or "mrope_section" in value:
        return value
    half = int(_head(fields) * value.get("partial_rotary_factor", 1)) // 2
    return {**value, "mrope_section": [half - 2 * (half // 3), half // 3, half // 3]}


class _Ids:
    """Ids below a vocabulary that shrinks, each its own."""

    def __init__(self, vocabulary: int) -> None:
        self._next = min(vocabulary, VOCABULARY) - 1 if vocabulary else VOCABULARY - 1
        self._known: dict[int, int] = {}

    def below(self, value: int) -> int:
        """The id itself, or one from the end of the vocabulary."""
        if value < VOCABULARY - 40:
            return value
        if value not in self._known:
            self._known[value] = self._next
            self._next -= 1
        return self._known[value]
