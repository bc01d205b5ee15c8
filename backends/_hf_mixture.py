"""Mixtures of experts that passes made, in the shape of a family of transformers whose arithmetic is the same.

The families compute ``y = sum_{e in top-k(z)} w_e E_e(x)`` with ``z = R x`` and

    softmax, normalised       w = softmax(z) / sum over the chosen, which is softmax over the chosen scores
    softmax, as it is         w = softmax(z) (where the family has a field for it)

and gated experts without biases.  A graph's mixture equals that exactly when its own weights are

    softmax of either kind times s     the down matrices times s
    s for each chosen expert, k = 1    normalised softmax of one score is 1: the down matrices times s
    s for each chosen expert, k = E    every expert runs: a router of zeros gives 1/E each, the down matrices times s E

and its experts are chosen by the k largest scores of a linear without bias (a bias that is equal for all experts cancels).
Chosen experts that are summed without softmax weights for 1 < k < E have no counterpart.

A shared expert without a gate, beside a family whose shared expert is multiplied with ``sigmoid(g x)``: g = 0 gives 1/2,
and the down matrix is doubled.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from surgeon.backends._hf_contents import CODES, ENGINES, Contents, Held, as_is
from surgeon.backends._hf_skeleton import Skeleton, known, values
from surgeon.contract import Refusal
from surgeon.graph import Graph
from surgeon.structure import FFN, Linear, MoE, Selection, Site, Structure

_TOP_K = ("num_experts_per_tok", "moe_top_k", "moe_topk", "num_selected_experts", "top_k_experts")
_SUFFIXES = ("ForCausalLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "Model")
_ORDERED = ("topk", "_softmax", "softmax", "sigmoid", "_to_copy", "to", "getitem", "reshape", "view")
"""Operators between scores and choice that leave the order of the scores alone."""
_EMPTY = 8
"""Width of a shared expert of zeros, for a family that always has one."""


@dataclass(frozen=True)
class Family:
    """A family of mixtures: names of its classes, fields and tensors.

    Attributes:
        prefix: what its class names start with.
        experts, width: the fields that count experts and their neurons.
        shared: the field of the shared expert's neurons, None where there is none.
        normalises: the field that divides the chosen weights by their sum, None where that is always done.
        dense: the field that lists the layers that keep a dense FFN, None where there is none.
        bias: the field that gives query, key and value biases, None where there are none.
    """

    prefix: str
    experts: str
    width: str
    shared: str | None = None
    normalises: str | None = None
    dense: str | None = None
    bias: str | None = None


FAMILIES = {
    "mixtral": Family("Mixtral", "num_local_experts", "intermediate_size"),
    "qwen3_moe": Family("Qwen3Moe", "num_experts", "moe_intermediate_size", None, "norm_topk_prob", "mlp_only_layers"),
    "qwen2_moe": Family(
        "Qwen2Moe", "num_experts", "moe_intermediate_size", "shared_expert_intermediate_size", "norm_topk_prob",
        "mlp_only_layers", "qkv_bias",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class _Layer:
    """One mixture in a family's terms.

    Attributes:
        layer: name of its layer, ``model.layers.3``.
        moe: the mixture.
        router: the router's matrix [E, H].
        factor: what the down matrices are multiplied with.
        normalised: whether the chosen softmax weights are divided by their sum, None where either is right.
    """

    layer: str
    moe: MoE
    router: Held
    factor: float
    normalised: bool | None


def reshaped(
    graph: Graph, structure: Structure, source: Skeleton, contents: Contents, architecture: str
) -> tuple[Skeleton, Contents] | list[Refusal]:
    """The class and the contents of a graph whose mixtures are those of a family.

    A graph without mixtures made by passes keeps its class; only the number of chosen experts may have changed.
    """
    sites = list(structure.select(Selection()).moes())
    own = [site for site in sites if CODES.sub("", site.part.w_in) in source.shapes]
    made = [site for site in sites if site not in own]
    if not made:
        return _chosen(own, source, contents)
    layers, refusals = [], []
    for site in made:
        found = _layer(graph, site)
        if isinstance(found, _Layer):
            layers.append(found)
        else:
            refusals.append(Refusal(site.part.w_in, f"{site.name}: {found}; {ENGINES} run it"))
    if refusals:
        return refusals
    tried: list[Refusal] = []
    for name in FAMILIES if architecture == "auto" else (architecture,):
        result = _as_family(graph, source, contents, layers, name)
        if not isinstance(result, list):
            return result
        tried += result
    return tried


def _chosen(own: list[Site[MoE]], source: Skeleton, contents: Contents) -> tuple[Skeleton, Contents] | list[Refusal]:
    """The source's own mixtures, with as many chosen experts as the graph chooses."""
    counts = {site.part.w_in: site.part.top_k for site in own}
    fields = [(path, value) for path, value in values(source.config, int) if path[-1] in _TOP_K]
    if not counts or not fields:
        return source, contents
    path, value = fields[0]
    usual = max(set(counts.values()), key=list(counts.values()).count)
    if len(set(counts.values())) > 1:
        reason = f"in other layers {usual} experts are chosen; the configuration has one {path[-1]} for all; {ENGINES} take any"
        return [Refusal(name, f"{count} experts are chosen here, {reason}") for name, count in counts.items() if count != usual]
    if usual == value:
        return source, contents
    return [Refusal(own[0].part.w_in, f"{usual} experts are chosen, {path[-1]} of the source is {value}; {ENGINES} take any")]


# -- one mixture --------------------------------------------------------------------------------------------------


def _layer(graph: Graph, site: Site[MoE]) -> _Layer | str:
    moe = site.part
    layer = _layer_name(moe.w_in)
    if layer is None:
        return "it lies in no numbered layer"
    if not graph.tensor(moe.w_in).is_floating_point():
        return "its experts are quantized; transformers loads no low-bit experts of this form"
    if not moe.gated:
        return "its experts are not gated (act(gate) * up), those of the families that transformers has are"
    if moe.b_in is not None or moe.b_out is not None:
        return "its experts have biases, those of the families do not"
    routed = _routing(graph, moe)
    if isinstance(routed, str):
        return routed
    router, factor, normalised = routed
    return _Layer(layer, moe, router, factor, normalised)


def _routing(graph: Graph, moe: MoE) -> tuple[Held, float, bool | None] | str:
    """Router, factor and kind of softmax, or why there are none."""
    hidden = int(graph.tensor(moe.w_in).shape[2])
    zeros = Held((moe.experts, hidden), lambda: torch.zeros(moe.experts, hidden, dtype=graph.tensor(moe.w_in).dtype))
    if moe.scoring == "uniform" and moe.top_k == moe.experts:
        return zeros, moe.scale * moe.experts, None
    if moe.router is None or moe.logits is None:
        return "its router is not one linear"
    if moe.router.out_features != moe.experts:
        return f"its router knows {moe.router.out_features} choices for {moe.experts} experts"
    if not _by_largest_scores(moe):
        return "its experts are not chosen by the largest scores of a linear router"
    if moe.router.bias is not None:
        bias = _rows(graph.tensor(moe.router.bias).detach(), moe.router)
        if float(bias.max() - bias.min()) > 0:
            return "its router has a bias per expert, routers of the families have none"
    weight, router = graph.tensor(moe.router.weight).detach(), moe.router
    if not weight.is_floating_point():
        return "its router is quantized"
    held = Held((moe.experts, hidden), lambda: _rows(weight.T if router.transposed else weight, router).contiguous())
    if moe.scoring == "topk_softmax" or (moe.scoring == "softmax" and moe.normalised):
        return held, moe.scale, True
    if moe.scoring == "softmax":
        return held, moe.scale, False
    if moe.scoring == "uniform" and moe.top_k == 1:
        return held, moe.scale, True
    how = f"{moe.scale:g} each" if moe.scoring == "uniform" else f"{moe.scoring} of the scores"
    return (
        f"the {moe.top_k} of {moe.experts} chosen experts are added with weights {how}, and transformers' families weigh them "
        "with a softmax of the scores: the same only for one chosen expert, or all"
    )


def _by_largest_scores(moe: MoE) -> bool:
    """Whether nothing but order-preserving operators and one top-k lies between the scores and the choice."""
    node, tops = moe.index, 0
    while node is not moe.logits:
        name = getattr(node.target, "__name__", str(node.target)).split(".")[0]
        if node.op != "call_function" or name not in _ORDERED or not isinstance(node.args[0], fx.Node):
            return False
        tops += name == "topk"
        node = node.args[0]
    return tops == 1


def _rows(tensor: Tensor, linear: Linear) -> Tensor:
    if linear.index is not None:
        return tensor[list(linear.index)]
    return tensor if linear.rows is None else tensor[linear.rows[0] : linear.rows[1]]


def _layer_name(weight: str) -> str | None:
    parts = weight.split(".")
    position = next((place for place, part in enumerate(parts) if part.isdigit()), None)
    return None if position is None else ".".join(parts[: position + 1])


# -- one family ---------------------------------------------------------------------------------------------------


def _as_family(
    graph: Graph, source: Skeleton, contents: Contents, layers: list[_Layer], name: str
) -> tuple[Skeleton, Contents] | list[Refusal]:
    """The source's class and contents as they are in a family, or why they are not."""
    family, first = FAMILIES[name], layers[0].moe
    suffix = next((suffix for suffix in _SUFFIXES if source.model_class.endswith(suffix)), "")
    if not suffix or not known(family.prefix + suffix):
        return [Refusal("model", f"{name} has no counterpart of {source.model_class}; {ENGINES} run it")]
    problems = list(_problems(family, name, layers))
    if problems:
        return problems
    normalised = next((layer.normalised for layer in layers if layer.normalised is not None), True)
    here = {layer.layer for layer in layers}
    root = layers[0].layer.rpartition(".")[0]
    dense = sorted(int(n) for n in _numbers(root, contents.held) if f"{root}.{n}" not in here)
    if dense and family.dense is None:
        return [Refusal(f"{root}.{dense[0]}", f"it has no experts, and every layer of {name} has; {ENGINES} run it")]
    shared = [layer.moe.shared[0].width for layer in layers if layer.moe.shared]
    changes: dict[str, Any] = {
        family.experts: first.experts,
        family.width: first.width,
        "num_experts_per_tok": first.top_k,
    }
    if family.shared is not None:
        changes[family.shared] = shared[0] if shared else _EMPTY
    if family.normalises is not None:
        changes[family.normalises] = normalised
    if family.dense is not None:
        changes[family.dense] = dense
    if family.bias is not None:
        changes[family.bias] = any(entry.endswith("q_proj.bias") for entry in contents.held)
    skeleton = Skeleton.build(family.prefix + suffix, _config(family.prefix + suffix, source, changes))
    if isinstance(skeleton, str):
        return [Refusal("model", f"{family.prefix + suffix} cannot be built: {skeleton}")]
    converted = _converted(graph, contents, layers, family)
    refusals = [
        Refusal(entry, f"it stays beside the experts, and {name} has no place for it; {ENGINES} run it")
        for entry in converted.held
        if entry not in skeleton.shapes
    ]
    lacking = [
        Refusal(entry, f"{name} has it in every layer, and the model does not; {ENGINES} run it")
        for entry in skeleton.shapes
        if entry not in converted.held and skeleton.twins.get(entry, entry) not in converted.held and "." in entry
        and any(entry.startswith(f"{layer}.") for layer in here)
    ]  # fmt: skip
    if refusals or lacking:
        return refusals + lacking
    note = f"written as {name}, {len(layers)} layers with {first.experts} experts"
    if family.shared is not None and not shared:
        note += f", beside them a shared expert of {_EMPTY} neurons and zeros, which {name} always has"
    converted.notes.append(note)
    return skeleton, converted


def _problems(family: Family, name: str, layers: list[_Layer]) -> Iterator[Refusal]:
    """What the family says once for all layers, or not at all."""
    first, kind = layers[0], next((layer.normalised for layer in layers if layer.normalised is not None), True)
    for layer in layers:
        moe = layer.moe
        for what, found, usual in (
            ("experts", moe.experts, first.moe.experts),
            ("neurons per expert", moe.width, first.moe.width),
            ("chosen experts", moe.top_k, first.moe.top_k),
            ("shared experts", len(moe.shared), len(first.moe.shared)),
        ):
            if found != usual:
                reason = f"{found} {what} here, {usual} in {first.layer}; {name} has one number for all layers"
                yield Refusal(moe.w_in, f"{reason}, {ENGINES} take one per layer")
        if layer.normalised not in (None, kind) or (layer.normalised is False and family.normalises is None):
            yield Refusal(moe.w_in, f"its weights are not divided by their sum; {name} does that; {ENGINES} run it")
        if moe.shared and family.shared is None:
            yield Refusal(moe.w_in, f"it has a shared expert, {name} has none; {ENGINES} run it")
        for ffn in moe.shared[1:]:
            yield Refusal(ffn.up.weight, f"{name} has one shared expert; {ENGINES} run several")
        for ffn in moe.shared[:1]:
            parts = (ffn.gate, ffn.up, ffn.down)
            if any(part is None or part.bias is not None or part.factors or part.rows or part.index for part in parts):
                yield Refusal(ffn.up.weight, f"the shared expert of {name} is three whole linears without biases")


def _numbers(root: str, held: Mapping[str, Held]) -> set[str]:
    """Numbers of the layers of which something is left."""
    return {name.removeprefix(f"{root}.").partition(".")[0] for name in held if name.startswith(f"{root}.")}


def _config(model_class: str, source: Skeleton, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The family's configuration with every field that the source has too."""
    import transformers

    config_class = getattr(transformers, model_class).config_class
    own = config_class().to_dict()
    never = {"model_type", "architectures", "transformers_version", "_name_or_path"}
    taken = {key: value for key, value in source.config.items() if key in own and key not in never}
    if source.config.get("head_dim"):  # not a declared field everywhere, but read everywhere
        taken["head_dim"] = source.config["head_dim"]
    result: dict[str, Any] = config_class.from_dict({**taken, **changes}).to_dict()
    return result


def _converted(graph: Graph, contents: Contents, layers: list[_Layer], family: Family) -> Contents:
    """The contents with experts, routers and shared experts under the family's names."""
    result = replace(contents, held=dict(contents.held), extra=set(contents.extra), notes=list(contents.notes))
    for layer in layers:
        moe, ffn = layer.moe, f"{layer.layer}.mlp"
        result.held[f"{ffn}.gate.weight"] = layer.router
        result.held[f"{ffn}.experts.gate_up_proj"] = as_is(graph.tensor(moe.w_in))
        result.held[f"{ffn}.experts.down_proj"] = _times(graph.tensor(moe.w_out), layer.factor)
        result.extra -= {moe.w_in, moe.w_out}
        if moe.router is not None:
            result.extra -= {moe.router.weight, moe.router.bias or ""}
        if family.shared is not None:
            hidden = int(graph.tensor(moe.w_in).shape[2])
            dtype = graph.tensor(moe.w_in).dtype
            result.held |= _shared(graph, f"{ffn}.shared_expert", moe.shared[0] if moe.shared else None, hidden, dtype)
            result.held[f"{ffn}.shared_expert_gate.weight"] = _zeros((1, hidden), dtype)
            for part in (moe.shared[0].gate, moe.shared[0].up, moe.shared[0].down) if moe.shared else ():
                if part is not None:
                    result.extra.discard(part.weight)
    return result


def _shared(graph: Graph, name: str, ffn: FFN | None, hidden: int, dtype: torch.dtype) -> dict[str, Held]:
    """The shared expert, its down matrix doubled against the sigmoid of zero."""
    if ffn is None or ffn.gate is None:
        shapes = {"gate_proj": (_EMPTY, hidden), "up_proj": (_EMPTY, hidden), "down_proj": (hidden, _EMPTY)}
        return {f"{name}.{part}.weight": _zeros(shape, dtype) for part, shape in shapes.items()}
    parts = (("gate_proj", ffn.gate, 1.0), ("up_proj", ffn.up, 1.0), ("down_proj", ffn.down, 2.0))
    return {f"{name}.{key}.weight": _times(_matrix(graph, part), factor) for key, part, factor in parts}


def _matrix(graph: Graph, linear: Linear) -> Tensor:
    weight = graph.tensor(linear.weight).detach()
    return weight.T if linear.transposed else weight


def _times(tensor: Tensor, factor: float) -> Held:
    if factor == 1.0:
        return as_is(tensor)
    return Held(tuple(tensor.shape), lambda: tensor.detach() * factor)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Held:
    return Held(shape, lambda: torch.zeros(shape, dtype=dtype))
