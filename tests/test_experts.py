"""Experts of transformers models traced as surgeon::moe: exact where it applies, left alone with a reason elsewhere."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.integrations.moe import use_experts_implementation

from surgeon.experts import use_semantic_experts

# torch's own deep copy of a pytree specification warns about itself
pytestmark = pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.:FutureWarning")

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
MODELS: dict[str, tuple[str, dict[str, Any], int]] = {
    # name: config class, its own fields, number of MoE layers
    "mixtral": ("MixtralConfig", {"intermediate_size": 48, "num_local_experts": 4, "num_experts_per_tok": 2}, 2),
    "qwen2-moe": (
        "Qwen2MoeConfig",
        {
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 40,
            "num_experts": 4,
            "num_experts_per_tok": 2,
        },
        2,
    ),
    "qwen3-moe": (
        "Qwen3MoeConfig",
        {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
        2,
    ),
    # 2 I = H: the shapes alone do not tell the two matrices' layouts apart
    "olmoe": ("OlmoeConfig", {"intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}, 2),
    "deepseek-v3": (
        "DeepseekV3Config",
        dict(
            num_key_value_heads=4,
            moe_intermediate_size=24,
            n_routed_experts=8,
            num_experts_per_tok=2,
            n_group=2,
            topk_group=1,
            first_k_dense_replace=1,
            n_shared_experts=1,
            **LATENT,
        ),
        1,
    ),
    "granite-moe": ("GraniteMoeConfig", {"intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2}, 2),
}


def tiny(config_class: str, **fields: Any) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**{**SMALL, **fields})
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.1)
    return model


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits


def ids(batch: int, length: int) -> Tensor:
    return torch.arange(3, 3 + batch * length).view(batch, length) * 7 % 97


def export(model: nn.Module) -> torch.export.ExportedProgram:
    dynamic = torch.export.Dim.DYNAMIC
    with torch.no_grad():
        return torch.export.export(model, (ids(2, 7),), dynamic_shapes=({0: dynamic, 1: dynamic},), strict=False)


def count(exported: torch.export.ExportedProgram) -> int:
    return [node.target for node in exported.graph.nodes].count(torch.ops.surgeon.moe.default)


@pytest.mark.parametrize("name", MODELS)
def test_models_export_with_one_operator_per_layer(name: str) -> None:
    config_class, fields, layers = MODELS[name]
    model = Logits(tiny(config_class, **fields))
    implementation = model.model.config._experts_implementation
    model.model.set_experts_implementation("eager")  # the model's own loop over experts is the reference
    with torch.no_grad():
        expected = {shape: model(ids(*shape)) for shape in ((2, 7), (3, 5), (1, 1))}
    with use_semantic_experts(model) as left_alone:
        exported = export(model)
    assert left_alone == []
    assert model.model.config._experts_implementation == "eager" != implementation
    assert count(exported) == layers
    for shape, logits in expected.items():
        torch.testing.assert_close(exported.module()(ids(*shape)), logits, rtol=1e-6, atol=1e-6)


def test_a_clamped_gate_is_one_operator_too() -> None:
    model = Logits(tiny("GptOssConfig", intermediate_size=48, num_local_experts=4, num_experts_per_tok=2, head_dim=8))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)  # far enough for the clamp
    model.model.set_experts_implementation("eager")
    with torch.no_grad():
        expected = model(ids(3, 5))
    with use_semantic_experts(model) as left_alone:
        exported = export(model)
    assert left_alone == []
    assert count(exported) == 2
    torch.testing.assert_close(exported.module()(ids(3, 5)), expected, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------- every layout of the interface, on a module of our own


class Config(SimpleNamespace):
    """The two members of a configuration that the interface uses; a mapping names the one to set, as in the library."""

    def __setattr__(self, key: str, value: Any) -> None:
        super().__setattr__(key, value[""] if isinstance(value, dict) else value)


def experts(
    *,
    activation: Any = nn.functional.silu,
    gate: Any = None,
    bias: bool = False,
    norm: bool = False,
    width: int = 8,
    inner: int = 6,
    **layout: bool,
) -> nn.Module:
    gated, transposed = layout.get("has_gate", True), layout.get("is_transposed", False)

    def shape(rows: int, columns: int) -> tuple[int, int, int]:
        return (4, columns, rows) if transposed else (4, rows, columns)

    class Own(nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            rows, prefix = (2 * inner, "gate_up_proj") if gated else (inner, "up_proj")
            self.num_experts = 4
            self.act_fn = activation
            # the order of definition must not matter
            self.down_proj = nn.Parameter(torch.randn(shape(width, inner)))
            setattr(self, prefix, nn.Parameter(torch.randn(shape(rows, width))))
            if bias:
                self.down_proj_bias = nn.Parameter(torch.randn(4, width))
                setattr(self, f"{prefix}_bias", nn.Parameter(torch.randn(4, rows)))
            if norm:
                self.post_expert_norm = nn.RMSNorm(width, elementwise_affine=False)

        def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            raise AssertionError("the interface dispatches every call of these tests")

    if gate is not None:
        Own._apply_gate = gate  # type: ignore[attr-defined]  # the interface's hook
    torch.manual_seed(0)
    wrapped = use_experts_implementation(Own, has_bias=bias, has_post_expert_norm=norm, **layout)
    module: nn.Module = wrapped(Config(_experts_implementation="batched_mm"))
    return module


def interleaved_gate(self: Any, gate_up: Tensor) -> Tensor:
    return self.act_fn(gate_up[..., ::2]) * gate_up[..., 1::2]  # type: ignore[no-any-return]


def limited_gate(self: Any, gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return self.act_fn(gate.clamp(max=20)) * up  # type: ignore[no-any-return]


def capped_gate(self: Any, gate_up: Tensor) -> Tensor:
    gate, up = gate_up[..., 1::2], gate_up[..., ::2]
    return self.act_fn(gate).clamp(max=5) * up.clamp(-6, 6)  # type: ignore[no-any-return]


def added_gate(self: Any, gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return self.act_fn(gate) + up  # type: ignore[no-any-return]


GENERATOR = torch.Generator().manual_seed(1)
ROUTED = (
    torch.randn(9, 8, generator=GENERATOR),
    torch.randint(0, 4, (9, 2), generator=GENERATOR),
    torch.randn(9, 2, generator=GENERATOR),
)


@pytest.mark.parametrize(
    "form",
    [
        {},
        {"bias": True},
        {"is_transposed": True},
        {"is_transposed": True, "bias": True, "gate": interleaved_gate, "is_concatenated": False},
        {"is_concatenated": False, "gate": interleaved_gate, "activation": torch.tanh},
        {"gate": limited_gate},
        {"gate": limited_gate, "bias": True, "is_transposed": True, "activation": lambda x: x * torch.sigmoid(1.3 * x)},
        {"has_gate": False, "activation": lambda x: nn.functional.relu(x).square()},
        {"has_gate": False, "activation": lambda x: nn.functional.silu(x).clamp(max=9)},
        {"has_gate": False, "bias": True, "is_transposed": True, "activation": nn.functional.mish},
        # square matrices and equal biases: only the arithmetic tells which is which
        {"has_gate": False, "bias": True, "width": 8, "inner": 8},
        {"has_gate": False, "is_transposed": True, "width": 8, "inner": 8},
        {"width": 8, "inner": 4, "is_transposed": True},
        {"width": 8, "inner": 4, "bias": True},
    ],
    ids=lambda options: "-".join(sorted(options)) or "plain",
)
def test_every_layout_is_reproduced(form: dict[str, Any]) -> None:
    module = experts(**form)
    expected = module(*ROUTED)
    with use_semantic_experts(module) as left_alone:
        exported = torch.export.export(module, ROUTED, strict=False)
        found = module(*ROUTED)
    assert left_alone == []
    assert count(exported) == 1
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert module.config._experts_implementation == "batched_mm"


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        ({"gate": capped_gate}, "its own"),  # up before gate is no layout of the interface
        ({"gate": added_gate}, "its own"),
        ({"activation": torch.sin}, "known activation"),
        ({"norm": True}, "normalized_shape"),
    ],
)
def test_other_arithmetic_is_left_alone_with_the_reason(form: dict[str, Any], reason: str) -> None:
    module = experts(**form)
    expected = module(*ROUTED)
    with use_semantic_experts(module) as left_alone:
        assert torch.equal(module(*ROUTED), expected)
    assert len(left_alone) == 1
    assert reason in left_alone[0]


def test_further_parameters_are_named() -> None:
    module = experts()
    module.register_parameter("smoothing", nn.Parameter(torch.ones(8)))
    with use_semantic_experts(module) as left_alone:
        pass
    assert "smoothing (8,)" in left_alone[0]


def test_weights_are_not_read_and_the_model_is_restored_after_an_error() -> None:
    with torch.device("meta"):
        module = experts()

    def interrupted() -> None:
        with use_semantic_experts(module) as left_alone:
            assert left_alone == []
            assert module.config._experts_implementation == "surgeon"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert module.config._experts_implementation == "batched_mm"


def test_a_model_without_experts_is_untouched() -> None:
    with use_semantic_experts(nn.Linear(2, 2)) as left_alone:
        assert left_alone == []
