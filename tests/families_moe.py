"""Tiny mixtures of experts for tests: library models by configuration, and hand-written modules in many spellings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgeon.discovery import discover
from surgeon.graph import Graph
from surgeon.structure import Structure
from surgeon.tracing import trace
from tests.handwritten import Apart

HIDDEN, INNER, EXPERTS, CHOSEN, VOCABULARY = 32, 24, 4, 2, 97


@dataclass(frozen=True)
class Family:
    """A library model and what its configuration says.

    Attributes:
        config: name of the configuration class.
        fields: its fields.
        count: name of the field that holds the number of experts.
        expected: fields of ``surgeon.structure.MoE`` by name.
        shared: widths of shared experts.
        gated_shared: shared experts have a gate of their own.
        dense: blocks without experts.
        keep: experts that remain when some are dropped.
        model: name of the automatic model class.
        layers: path of the list of layers.
    """

    config: str
    fields: dict[str, Any]
    count: str
    expected: dict[str, Any]
    shared: tuple[int, ...] = ()
    gated_shared: bool = False
    dense: tuple[int, ...] = ()
    keep: tuple[int, ...] = (0, 2, 3)
    model: str = "AutoModelForCausalLM"
    layers: str = "model.layers"


SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
LOCAL = {"intermediate_size": 40, "num_local_experts": EXPERTS, "num_experts_per_tok": CHOSEN}
NUMBERED = {"moe_intermediate_size": INNER, "num_experts": EXPERTS, "num_experts_per_tok": CHOSEN}
GROUPED = {
    **LATENT,
    "num_key_value_heads": 4,
    "intermediate_size": 40,
    "moe_intermediate_size": INNER,
    "n_routed_experts": 8,
    "num_experts_per_tok": CHOSEN,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "routed_scaling_factor": 2.5,
}
SOFTMAX = {"scoring": "softmax", "gated": True, "activation": "silu", "top_k": CHOSEN, "experts": EXPERTS}
LIMITED = "quick_gelu(gate_max=7,up_limit=7,offset=1)"

FAMILIES: dict[str, Family] = {
    "mixtral": Family(
        "MixtralConfig", LOCAL, "num_local_experts", {**SOFTMAX, "normalised": True, "width": 40}
    ),
    "qwen2_moe": Family(
        "Qwen2MoeConfig",
        {**NUMBERED, "shared_expert_intermediate_size": 48},
        "num_experts",
        {**SOFTMAX, "normalised": False, "width": INNER},
        shared=(48,),
        gated_shared=True,
    ),
    "qwen3_moe": Family(
        "Qwen3MoeConfig",
        {**NUMBERED, "head_dim": 8, "norm_topk_prob": True},
        "num_experts",
        {**SOFTMAX, "normalised": True, "width": INNER},
    ),
    "olmoe": Family(
        "OlmoeConfig",
        {"intermediate_size": 16, "num_experts": EXPERTS, "num_experts_per_tok": CHOSEN},
        "num_experts",
        {**SOFTMAX, "normalised": False, "width": 16},
    ),
    "deepseek_v3": Family(
        "DeepseekV3Config",
        GROUPED,
        "n_routed_experts",
        {
            "scoring": "sigmoid",
            "normalised": True,
            "scale": 2.5,
            "experts": 8,
            "groups": 2,
            "top_groups": 1,
            "width": INNER,
            "activation": "silu",
            "selection_bias": "model.layers.1.mlp.gate.e_score_correction_bias",
        },
        shared=(INNER,),
        dense=(0,),
        keep=(0, 1, 3, 4, 6, 7),
    ),
    "gpt_oss": Family(
        "GptOssConfig",
        {**LOCAL, "head_dim": 8},
        "num_local_experts",
        {**SOFTMAX, "scoring": "topk_softmax", "normalised": True, "activation": LIMITED, "width": 40},
    ),
    "granitemoe": Family(
        "GraniteMoeConfig", LOCAL, "num_local_experts", {**SOFTMAX, "scoring": "topk_softmax", "normalised": True, "width": 40}
    ),
    "granitemoeshared": Family(
        "GraniteMoeSharedConfig",
        {**LOCAL, "shared_intermediate_size": 48},
        "num_local_experts",
        {**SOFTMAX, "scoring": "topk_softmax", "normalised": True, "width": 40},
        shared=(48,),
    ),
    "phimoe": Family(
        "PhimoeConfig", LOCAL, "num_local_experts", {**SOFTMAX, "scoring": "sparsemixer", "width": 40}
    ),
    "switch": Family(
        "SwitchTransformersConfig",
        {
            "vocab_size": VOCABULARY,
            "d_model": HIDDEN,
            "d_kv": 8,
            "d_ff": 40,
            "num_layers": 2,
            "num_sparse_encoder_layers": 1,
            "num_heads": 4,
            "num_experts": EXPERTS,
            "expert_capacity": 3,
        },
        "num_experts",
        {"scoring": "softmax", "normalised": False, "capacity": 3, "top_k": 1, "activation": "relu", "width": 40},
        dense=(0,),
        model="SwitchTransformersEncoderModel",
        layers="encoder.block",
    ),
}


def library(name: str, experts: int | None = None) -> nn.Module:
    """A library model with random weights, optionally with another number of experts."""
    import transformers

    family = FAMILIES[name]
    fields = {**(SMALL if "d_model" not in family.fields else {}), **family.fields}
    if experts is not None:
        fields[family.count] = experts
    config = getattr(transformers, family.config)(**fields)
    model: nn.Module
    torch.manual_seed(0)
    if family.model.startswith("Auto"):
        model = getattr(transformers, family.model).from_config(config)
    else:
        model = getattr(transformers, family.model)(config)
    return randomised(model)


def randomised(model: nn.Module) -> nn.Module:
    """The model with every parameter and floating-point bias buffer random."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.1
            parameter.copy_(noise if parameter.dim() > 1 else parameter + noise)
        for name, buffer in model.named_buffers():
            if "bias" in name and buffer.is_floating_point():
                buffer.copy_(torch.rand(buffer.shape, generator=generator) * 0.2)
    return model.eval()


def with_experts(small: nn.Module, large: nn.Module, keep: tuple[int, ...]) -> nn.Module:
    """The small model with the large one's weights, of the experts in ``keep`` where sizes differ."""
    held = dict(large.named_parameters()) | dict(large.named_buffers())
    with torch.no_grad():
        for name, tensor in (*small.named_parameters(), *small.named_buffers()):
            parts = name.split(".")
            for position, part in enumerate(parts):
                if part.startswith("expert_"):  # experts as modules of their own
                    parts[position] = f"expert_{keep[int(part.removeprefix('expert_'))]}"
            source = held[".".join(parts)]
            for axis, (have, want) in enumerate(zip(source.shape, tensor.shape, strict=True)):
                if have != want:
                    source = source.index_select(axis, torch.tensor(keep))
            tensor.copy_(source)
    return small


# -- hand-written modules ---------------------------------------------------------------------------------------------


class Expert(nn.Module):
    """One expert as a module."""

    def __init__(self, gated: bool, bias: bool, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.up = nn.Linear(HIDDEN, INNER, bias=bias)
        self.gate = nn.Linear(HIDDEN, INNER, bias=bias) if gated else None
        self.down = nn.Linear(INNER, HIDDEN, bias=bias)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.act(self.up(x)) if self.gate is None else self.act(self.gate(x)) * self.up(x)
        y: Tensor = self.down(hidden)
        return y


@dataclass(frozen=True)
class Written:
    """A hand-written mixture.

    Attributes:
        forward: function of the module and x [B, S, H].
        stacked: one tensor for all experts (input-major), instead of a list of modules.
        gated: experts are gated.
        bias: experts have biases (lists only).
        act: their activation.
        expected: fields of ``surgeon.structure.MoE``.
        shared: widths of shared experts.
    """

    forward: Callable[[Any, Tensor], Tensor]
    stacked: bool = False
    gated: bool = False
    bias: bool = True
    act: Callable[[Tensor], Tensor] = F.gelu
    expected: dict[str, Any] = field(default_factory=dict)
    shared: tuple[int, ...] = ()


class Mixture(nn.Module):
    """``x + mixture(norm(x))``, then a dense network in the same form."""

    def __init__(self, form: Written, experts: int = EXPERTS) -> None:
        super().__init__()
        self.form, self.count = form, experts
        self.norm, self.norm_2 = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        self.router = nn.Linear(HIDDEN, experts, bias=False)
        self.correction_bias = nn.Buffer(torch.zeros(experts))
        if form.stacked:
            self.w1 = nn.Parameter(torch.empty(experts, HIDDEN, INNER * (2 if form.gated else 1)))
            self.w2 = nn.Parameter(torch.empty(experts, INNER, HIDDEN))
        else:
            self.experts = nn.ModuleDict({f"expert_{e}": Expert(form.gated, form.bias, form.act) for e in range(experts)})
        if form.shared:
            self.shared = Expert(form.gated, form.bias, form.act)
        self.ffn = Expert(True, True, F.silu)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.form.forward(self, self.norm(x))
        return x + self.ffn(self.norm_2(x))  # type: ignore[no-any-return]  # a module's call

    def expert(self, e: int, x: Tensor) -> Tensor:
        """Expert e on any rows."""
        if not self.form.stacked:
            return self.experts[f"expert_{e}"](x)  # type: ignore[no-any-return]  # a module's call
        return self.inner(x @ self.w1[e]) @ self.w2[e]

    def inner(self, pre: Tensor) -> Tensor:
        """Activation of pre-activations."""
        if not self.form.gated:
            return self.form.act(pre)
        gate, up = pre.chunk(2, dim=-1)
        return self.form.act(gate) * up

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and experts, [..., k]: softmax, then the best, normalised."""
        weight, index = self.router(x).softmax(-1).topk(CHOSEN, -1)
        return weight / weight.sum(-1, keepdim=True), index


def where_loop(m: Mixture, h: Tensor) -> Tensor:
    x = h.reshape(-1, HIDDEN)
    weight, index = m.route(x)
    out = torch.zeros_like(x)
    for e in range(m.count):
        token, place = torch.where(index == e)
        out.index_add_(0, token, m.expert(e, x[token]) * weight[token, place, None])
    out = out.view(h.shape)
    return out + m.shared(h) if m.form.shared else out


def masked_loop(m: Mixture, h: Tensor) -> Tensor:
    x = h.reshape(-1, HIDDEN)
    weight, index = m.route(x)
    out = torch.zeros_like(x)
    for e in range(m.count):
        chosen = index == e
        rows = chosen.any(-1)
        out[rows] += m.expert(e, x[rows]) * (weight * chosen).sum(-1)[rows].unsqueeze(-1)
    return out.view(h.shape)


def branching_loop(m: Mixture, h: Tensor) -> Tensor:
    x = h.reshape(-1, HIDDEN)
    weight, index = m.route(x)
    out = torch.zeros_like(x)
    for e in range(m.count):
        chosen = index == e
        if chosen.any():
            token, place = torch.where(chosen)
            if token.numel() == 0:
                continue
            out[token] += weight[token, place, None] * m.expert(e, x[token])
    return out.view(h.shape)


def loop_over_hits(m: Mixture, h: Tensor) -> Tensor:
    x = h.reshape(-1, HIDDEN)
    weight, index = m.route(x)
    out = torch.zeros_like(x)
    mask = F.one_hot(index, m.count).permute(2, 1, 0)
    for hit in (mask.sum((-1, -2)) > 0).nonzero():
        place, token = torch.where(mask[hit].squeeze(0))
        out.index_add_(0, token, m.expert(int(hit[0]), x[token]) * weight[token, place, None])
    return out.view(h.shape)


def shared_first(m: Mixture, h: Tensor) -> Tensor:
    x = h.reshape(-1, HIDDEN)
    weight, index = m.route(x)
    out = m.shared(x)
    for e in range(m.count):
        token, place = torch.where(index == e)
        out = out.index_add(0, token, m.expert(e, x[token]) * weight[token, place, None])
    return out.view(h.shape)  # type: ignore[no-any-return]  # a module's call


def sorted_pieces(m: Mixture, h: Tensor) -> Tensor:
    x = h.reshape(-1, HIDDEN)
    weight, index = m.route(x)
    flat = index.reshape(-1)
    order = flat.argsort()
    counts = torch.bincount(flat, minlength=m.count).tolist()
    pieces = x[order // CHOSEN].split(counts)
    each = torch.cat([m.expert(e, piece) for e, piece in enumerate(pieces)]) * weight.reshape(-1)[order][:, None]
    return torch.zeros_like(x).index_add(0, order // CHOSEN, each).view(h.shape)


def dense_loop(m: Mixture, h: Tensor) -> Tensor:
    weight, index = m.route(h)
    out = torch.zeros_like(h)
    for e in range(m.count):
        out = out + (weight * (index == e)).sum(-1, keepdim=True) * m.expert(e, h)
    return out


def soft_mixture(m: Mixture, h: Tensor) -> Tensor:
    weight = m.router(h).softmax(-1)
    return torch.stack([weight[..., e : e + 1] * m.expert(e, h) for e in range(m.count)]).sum(0)


def relu_routed(m: Mixture, h: Tensor) -> Tensor:
    weight = torch.relu(m.router(h))
    return torch.stack([weight[..., e : e + 1] * m.expert(e, h) for e in range(m.count)]).sum(0)


def gathered_outputs(m: Mixture, h: Tensor) -> Tensor:
    weight, index = m.route(h)
    every = torch.stack([m.expert(e, h) for e in range(m.count)], dim=2)
    return (every.gather(2, index[..., None].expand(*index.shape, HIDDEN)) * weight[..., None]).sum(2)


def dense_einsum(m: Mixture, h: Tensor) -> Tensor:
    weight, index = m.route(h)
    combine = torch.zeros(*h.shape[:2], m.count).scatter(-1, index, weight)
    hidden = m.inner(torch.einsum("bsh,ehf->bsef", h, m.w1))
    return torch.einsum("bseh,bse->bsh", torch.einsum("bsef,efh->bseh", hidden, m.w2), combine)


def dense_batched(m: Mixture, h: Tensor) -> Tensor:
    x = h.reshape(-1, HIDDEN)
    weight, index = m.route(x)
    combine = torch.zeros(x.shape[0], m.count).scatter(1, index, weight)
    every = torch.bmm(m.inner(torch.bmm(x.expand(m.count, -1, -1), m.w1)), m.w2)
    return (every * combine.t().unsqueeze(-1)).sum(0).view(h.shape)


def gathered_weights(m: Mixture, h: Tensor) -> Tensor:
    x = h.reshape(-1, HIDDEN)
    weight, index = m.route(x)
    hidden = m.inner(torch.einsum("th,tkhf->tkf", x, m.w1[index]))
    return (torch.einsum("tkf,tkfh->tkh", hidden, m.w2[index]) * weight[..., None]).sum(1).view(h.shape)


def corrected_groups(m: Mixture, h: Tensor) -> Tensor:
    x, groups = h.reshape(-1, HIDDEN), 2
    scores = m.router(x).sigmoid()
    choice = scores + m.correction_bias
    worth = choice.view(-1, groups, m.count // groups).topk(2, -1)[0].sum(-1)
    best = torch.zeros_like(worth).scatter(1, worth.topk(1)[1], 1.0)
    inside = best.unsqueeze(-1).expand(-1, groups, m.count // groups).reshape(-1, m.count)
    index = choice.masked_fill(inside == 0, 0.0).topk(CHOSEN, -1)[1]
    weight = scores.gather(1, index)
    weight = weight / (weight.sum(-1, keepdim=True) + 1e-20) * 1.5
    hidden = m.inner(torch.einsum("th,tkhf->tkf", x, m.w1[index]))
    return torch.einsum("tkh,tk->th", torch.einsum("tkf,tkfh->tkh", hidden, m.w2[index]), weight).view(h.shape)


def scaled_inputs(m: Mixture, h: Tensor) -> Tensor:
    x = h.reshape(-1, HIDDEN)
    logits = m.router(x)
    value, index = logits.topk(1, 1)
    scores = torch.full_like(logits, -torch.inf).scatter(1, index, value).sigmoid()
    rows = (x.repeat(m.count, 1) * scores.t().reshape(-1, 1)).view(m.count, -1, HIDDEN)
    return torch.bmm(m.inner(torch.bmm(rows, m.w1)), m.w2).sum(0).view(h.shape)


def one_expert(m: Mixture, h: Tensor) -> Tensor:
    x = h.reshape(-1, HIDDEN)
    weight, index = m.router(x).softmax(-1).max(-1)
    out = torch.zeros_like(x)
    for e in range(m.count):
        (token,) = torch.where(index == e)
        out[token] = m.expert(e, x[token]) * weight[token, None]
    return out.view(h.shape)


def expert_choice(m: Mixture, h: Tensor) -> Tensor:
    x = h.reshape(-1, HIDDEN)
    weight, token = m.router(x).softmax(-1).t().topk(3, -1)
    every = torch.bmm(m.inner(torch.bmm(x[token], m.w1)), m.w2) * weight[..., None]
    return torch.zeros_like(x).index_add(0, token.reshape(-1), every.reshape(-1, HIDDEN)).view(h.shape)


PLAIN = {"scoring": "softmax", "normalised": True, "top_k": CHOSEN, "activation": "gelu", "gated": False}
GATED = {**PLAIN, "gated": True, "activation": "silu"}

WRITTEN: dict[str, Written] = {
    "where_loop": Written(where_loop, expected=PLAIN),
    "where_loop_shared": Written(where_loop, gated=True, bias=False, act=F.silu, expected=GATED, shared=(INNER,)),
    "where_loop_stacked": Written(where_loop, stacked=True, gated=True, act=F.silu, expected=GATED),
    "masked_loop": Written(masked_loop, expected=PLAIN),
    "branching_loop": Written(branching_loop, expected=PLAIN),
    "loop_over_hits": Written(loop_over_hits, expected=PLAIN),
    "shared_first": Written(shared_first, gated=True, act=F.silu, expected=GATED, shared=(INNER,)),
    "sorted_pieces": Written(sorted_pieces, expected=PLAIN),
    "dense_loop": Written(dense_loop, expected=PLAIN),
    "soft_mixture": Written(soft_mixture, expected={"scoring": "softmax", "top_k": EXPERTS}),
    "relu_routed": Written(relu_routed, expected={"scoring": "relu", "top_k": EXPERTS}),
    "gathered_outputs": Written(gathered_outputs, expected=PLAIN),
    "dense_einsum": Written(dense_einsum, stacked=True, gated=True, act=F.silu, expected=GATED),
    "dense_batched": Written(dense_batched, stacked=True, act=F.relu, expected={**PLAIN, "activation": "relu"}),
    "gathered_weights": Written(gathered_weights, stacked=True, gated=True, act=F.silu, expected=GATED),
    "corrected_groups": Written(
        corrected_groups,
        stacked=True,
        gated=True,
        act=F.silu,
        expected={
            **GATED,
            "scoring": "sigmoid",
            "scale": 1.5,
            "experts": 8,
            "groups": 2,
            "top_groups": 1,
            "selection_bias": "correction_bias",
        },
    ),
    "scaled_inputs": Written(
        scaled_inputs,
        stacked=True,
        gated=True,
        act=F.silu,
        expected={"scoring": "sigmoid", "top_k": 1, "input_scaled": True, "activation": "silu"},
    ),
    "one_expert": Written(one_expert, expected={"scoring": "softmax", "normalised": False, "top_k": 1, "activation": "gelu"}),
    "expert_choice": Written(expert_choice, stacked=True, expected={"scoring": "expert_choice", "activation": "gelu"}),
}


def written(name: str, experts: int | None = None) -> Mixture:
    """A hand-written module with random weights."""
    form = WRITTEN[name]
    module = randomised(Mixture(form, experts or form.expected.get("experts", EXPERTS)))
    assert isinstance(module, Mixture)
    return module


class Layers(nn.Module):
    """Hand-written layers: attention (or none), a mixture, a dense network."""

    def __init__(self, name: str, count: int, *, attend: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(*([Attending()] if attend else []), written(name)) for _ in range(count)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Attending(nn.Module):
    """``x + attention(norm(x))``."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(HIDDEN), Apart()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(self.norm(x))  # type: ignore[no-any-return]  # a module's call


# -- traced -----------------------------------------------------------------------------------------------------------


def inputs(name: str, batch: int = 2, sequence: int = 6) -> dict[str, Tensor]:
    """Inputs of a model of either kind."""
    generator = torch.Generator().manual_seed(batch)
    if name in WRITTEN:
        return {"x": torch.randn(batch, sequence, HIDDEN, generator=generator)}
    ids = torch.randint(3, VOCABULARY, (batch, sequence), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@cache
def traced(name: str, layers: int = 1) -> tuple[nn.Module, Graph, Structure]:
    """The model, its graph and its structure; traced once.  Several hand-written layers have attention too."""
    if name in WRITTEN:
        module = written(name) if layers == 1 else randomised(Layers(name, layers, attend=True))
        graph = trace(module, inputs(name), dynamic={"x": {0: "batch", 1: "sequence"}})
    else:
        module = library(name)
        graph = trace(module, inputs(name))
    return module, graph, discover(graph)
