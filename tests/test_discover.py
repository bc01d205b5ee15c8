"""Structure found from data flow, compared with what the configuration of the source model says.

Parameter names are the oracle here, in the test only.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from surgeon.discovery import discover
from surgeon.errors import DiscoverError
from surgeon.graph import Graph
from surgeon.rewrite import Editor
from surgeon.structure import Structure
from surgeon.tracing import trace
from tests.models import NAMES, inputs_for, tiny, with_layer_deleted

COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 160,
    "intermediate_size": 112,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclass(frozen=True)
class Expected:
    """What the configuration says about every block."""

    kind: str
    heads: int = 4
    kv_heads: int = 4
    head_dim: int = 16
    layout: str | None = None
    activation: str | None = None
    width: int = 112
    experts: int = 0
    top_k: int = 2
    scoring: str = "softmax"
    normalised: bool = True
    shared: int = 0


EXPECTED = {
    "llama": Expected("attention+ffn", kv_heads=2, layout="separate", activation="silu"),
    "mixtral": Expected("attention+moe", kv_heads=2, activation="silu", width=48, experts=6),
    "gpt2": Expected("attention+ffn", layout="plain", activation="gelu_tanh", width=256),
    "bert": Expected("attention+norm+ffn+norm", layout="plain", activation="gelu"),
    "vit": Expected("attention+ffn", layout="plain", activation="gelu"),
    "opt": Expected("attention+ffn", layout="plain", activation="relu"),
    "gpt_neox": Expected("parallel", layout="plain", activation="gelu"),
    "phi3": Expected("attention+ffn", kv_heads=2, layout="concatenated", activation="silu"),
    "gemma2": Expected("attention+ffn", kv_heads=2, head_dim=24, layout="separate", activation="gelu_tanh"),
    "qwen2_moe": Expected(
        "attention+moe", kv_heads=2, activation="silu", width=40, experts=6, normalised=False, shared=48
    ),
    "t5": Expected("attention+ffn", layout="plain", activation="relu"),
}


def build(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A tiny model of one of the families."""
    if name in NAMES:
        return tiny(name)
    import transformers as tf

    torch.manual_seed(0)
    module: nn.Module
    match name:
        case "opt":
            shape = {k: v for k, v in COMMON.items() if k != "intermediate_size"}
            module = tf.OPTForCausalLM(tf.OPTConfig(**shape, ffn_dim=112, word_embed_proj_dim=64))
        case "gpt_neox":
            module = tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**COMMON))
        case "phi3":
            module = tf.Phi3ForCausalLM(tf.Phi3Config(**COMMON, num_key_value_heads=2))
        case "gemma2":
            module = tf.Gemma2ForCausalLM(tf.Gemma2Config(**COMMON, num_key_value_heads=2, head_dim=24))
        case "qwen2_moe":
            experts = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
            module = tf.Qwen2MoeForCausalLM(
                tf.Qwen2MoeConfig(**COMMON, **experts, num_key_value_heads=2, shared_expert_intermediate_size=48)
            )
        case "t5":
            module = tf.T5EncoderModel(
                tf.T5Config(d_model=64, d_kv=16, d_ff=112, num_layers=3, num_heads=4, vocab_size=160)
            )
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.08 + (parameter.dim() == 1))
    return module.eval(), inputs_for("llama")


@pytest.fixture(scope="module")
def found() -> Any:
    """Module, inputs, graph and structure of a family, each made once."""
    made: dict[str, tuple[nn.Module, dict[str, Tensor], Graph, Structure]] = {}

    def make(name: str) -> tuple[nn.Module, dict[str, Tensor], Graph, Structure]:
        if name not in made:
            module, inputs = build(name)
            graph = trace(module, inputs)
            made[name] = (module, inputs, graph, discover(graph))
        return made[name]

    return make


def layer_of(tensor: str) -> str | None:
    """The layer that a parameter's name puts it in."""
    match = re.search(r"\.(?:layers?|h|block)\.(\d)\.", f".{tensor}")
    return match[1] if match else None


# -- against the configuration ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXPECTED)
def test_blocks_are_what_the_configuration_says(found: Any, name: str) -> None:
    _, _, _, structure = found(name)
    expected = EXPECTED[name]
    assert [block.kind for block in structure.blocks] == [expected.kind] * 3
    for block in structure.blocks:
        (attention,) = (part for region in block.regions for part in region.attention)
        assert (attention.heads, attention.kv_heads, attention.head_dim) == (
            expected.heads,
            expected.kv_heads,
            expected.head_dim,
        )
        assert not attention.cross
        for linear, rows in ((attention.q, expected.heads), (attention.k, expected.kv_heads), (attention.v, expected.kv_heads)):
            assert linear is not None
            assert linear.out_features == rows * expected.head_dim
        assert attention.o is not None
        assert attention.o.in_features == expected.heads * expected.head_dim
        ffns = [part for region in block.regions for part in region.ffn]
        mixtures = [part for region in block.regions for part in region.moe]
        if expected.experts:
            (moe,) = mixtures
            assert not ffns
            assert (moe.experts, moe.top_k, moe.width) == (expected.experts, expected.top_k, expected.width)
            assert (moe.scoring, moe.normalised, moe.scale) == (expected.scoring, expected.normalised, 1.0)
            assert moe.gated
            assert moe.activation == expected.activation
            assert moe.router is not None
            assert moe.router.out_features == expected.experts
            assert [ffn.width for ffn in moe.shared] == ([expected.shared] if expected.shared else [])
        else:
            (ffn,) = ffns
            assert not mixtures
            assert (ffn.activation, ffn.width, ffn.layout) == (expected.activation, expected.width, expected.layout)
            assert (ffn.gate is None) == (expected.layout == "plain")


@pytest.mark.parametrize("name", EXPECTED)
def test_a_block_owns_exactly_the_parameters_of_its_layer(found: Any, name: str) -> None:
    module, _, graph, structure = found(name)
    trained = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    for index, block in enumerate(structure.blocks):
        layer = {n for n in graph.parameters() if layer_of(n) == str(index)} & trained
        layer -= {n for n in layer if "relative_attention_bias" in n}  # read by all layers
        assert layer
        assert {n for n in block.weights if n in trained} == layer


@pytest.mark.parametrize("name", EXPECTED)
def test_every_tensor_has_a_role_and_the_right_one(found: Any, name: str) -> None:
    _, _, graph, structure = found(name)
    assert structure.unrecognised == {}
    assert set(structure.roles) == set(graph.parameters())
    assert len(set(structure.roles.values())) == len(structure.roles)
    oracle = {
        r"(q_proj|query|SelfAttention\.q)\.weight$": r"blocks\.\d\.attention\.q\.weight",
        r"(k_proj|key|SelfAttention\.k)\.weight$": r"blocks\.\d\.attention\.k\.weight",
        r"(v_proj|value|SelfAttention\.v)\.weight$": r"blocks\.\d\.attention\.v\.weight",
        r"(o_proj|out_proj|attention\.dense|attn\.c_proj|SelfAttention\.o)\.weight$": r"blocks\.\d\.attention\.o\.weight",
        r"(qkv_proj|query_key_value|c_attn)\.weight$": r"blocks\.\d\.attention\.qkv\.weight",
        r"mlp\.gate_proj\.weight$": r"blocks\.\d\.ffn\.gate\.weight",
        r"mlp\.gate_up_proj\.weight$": r"blocks\.\d\.ffn\.gate_up\.weight",
        r"(mlp\.up_proj|mlp\.c_fc|intermediate\.dense|fc1|dense_h_to_4h|wi)\.weight$": r"blocks\.\d\.ffn\.up\.weight",
        r"(mlp\.down_proj|mlp\.c_proj|\d\.output\.dense|fc2|dense_4h_to_h|wo)\.weight$": r"blocks\.\d\.ffn\.down\.weight",
        r"mlp\.gate\.weight$": r"blocks\.\d\.moe\.router\.weight",
        r"experts\.gate_up_proj$": r"blocks\.\d\.moe\.w_in",
        r"experts\.down_proj$": r"blocks\.\d\.moe\.w_out",
        r"shared_expert\.(gate|up|down)_proj\.weight$": r"blocks\.\d\.moe\.shared\.(gate|up|down)\.weight",
        r"(lm_head|embed_out)\.weight$": r"head\.weight",
        r"(embed_tokens|embed_in|wte|wpe|word_embeddings|token_type_embeddings|shared)\.weight$": r"embedding\.\d\.weight",
    }
    checked = 0
    for tensor, role in structure.roles.items():
        for pattern, expected in oracle.items():
            if re.search(rf"(?:^|\.)(?:{pattern})", tensor):
                tied = role.startswith("embedding.") and "lm_head" in tensor
                assert tied or re.fullmatch(expected, role), (tensor, role)
                checked += 1
        layer = layer_of(tensor)
        if layer and "relative_attention_bias" not in tensor:
            assert role.startswith(f"blocks.{layer}."), (tensor, role)
        if re.search(r"norm|ln_", tensor, re.IGNORECASE):
            assert "norm" in role, (tensor, role)
    assert checked >= 3 * 3


@pytest.mark.parametrize("name", EXPECTED)
def test_linears_read_the_weight_they_name(found: Any, name: str) -> None:
    """y = x W^T + b with the named tensors, evaluated in the running graph."""
    _, inputs, graph, structure = found(name)
    values: dict[fx.Node, Any] = {}

    class Keep(fx.Interpreter):
        def run_node(self, node: fx.Node) -> Any:
            values[node] = super().run_node(node)
            return values[node]

    with torch.no_grad():
        Keep(graph.module).run(*graph.bind(inputs))
    assert structure.linears
    for site in structure.linears:
        linear = site.part
        weight = graph.tensor(linear.weight)
        weight = weight.T if linear.transposed else weight
        bias = None if linear.bias is None else graph.tensor(linear.bias)
        assert tuple(weight.shape) == (linear.out_features, linear.in_features)
        torch.testing.assert_close(F.linear(values[linear.input], weight, bias), values[linear.node])


@pytest.mark.parametrize("name", EXPECTED)
def test_regions_and_blocks_join_up(found: Any, name: str) -> None:
    _, _, _, structure = found(name)
    for before, after in zip(structure.blocks, structure.blocks[1:], strict=False):
        assert before.exit is after.entry
    for block in structure.blocks:
        assert block.regions[0].entry is block.entry
        assert block.regions[-1].exit is block.exit
        for first, second in zip(block.regions, block.regions[1:], strict=False):
            assert first.exit is second.entry
        assert block.entry not in block.nodes
        assert block.exit in block.nodes
        assert set(structure.prefix).isdisjoint(block.nodes)
        assert set(structure.suffix).isdisjoint(block.nodes)
    assert structure.streams[0].cuts[0] is structure.blocks[0].entry


# -- deleting a block ---------------------------------------------------------------------------------------------


def without_block(graph: Graph, index: int) -> Graph:
    """Replace a block's exit by its entry and remove what is dead."""
    clone = graph.clone()
    block = discover(clone).blocks[index]
    editor = Editor(clone)
    editor.replace(block.exit, block.entry)
    return editor.finish()


@pytest.mark.parametrize("index", range(3))
@pytest.mark.parametrize("name", EXPECTED)
def test_deleting_a_block_leaves_one_fewer_and_the_others_as_they_were(found: Any, name: str, index: int) -> None:
    _, _, graph, structure = found(name)
    smaller = without_block(graph, index)
    again = discover(smaller)
    kept = [block for block in structure.blocks if block.index != index]
    assert [block.weights for block in again.blocks] == [block.weights for block in kept]
    assert [block.kind for block in again.blocks] == [block.kind for block in kept]
    gone = set(graph.parameters()) - set(smaller.parameters())
    assert gone == set(structure.blocks[index].weights)
    assert again.unrecognised == {}


@pytest.mark.parametrize("name", NAMES)
def test_deleting_a_block_equals_the_source_without_the_layer(found: Any, name: str) -> None:
    module, inputs, graph, _ = found(name)
    smaller = without_block(graph, 1)
    with torch.no_grad():
        expected = with_layer_deleted(name, module, 1)(**inputs)
        result = smaller(**inputs)
    for port, value in result.items():
        torch.testing.assert_close(value, expected[port], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit", "gpt_neox"])
def test_one_block_alone_is_found(found: Any, name: str) -> None:
    _, _, graph, structure = found(name)
    alone = discover(without_block(without_block(graph, 2), 0))
    (block,) = alone.blocks
    assert block.kind == EXPECTED[name].kind
    assert {w for w in block.weights if "." in w} >= set(structure.blocks[1].weights)
    if name != "bert":  # the norm behind the last block stays outside
        assert "final_norm.weight" in alone.roles.values()


# -- after other passes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_factored_projections_still_make_ffns_and_attentions(found: Any, name: str) -> None:
    _, _, graph, before = found(name)
    clone = graph.clone()
    structure = discover(clone)
    editor = Editor(clone)
    chosen = [site for site in structure.linears if re.search(r"(ffn\.(up|down)|attention\.(q|qkv|o))$", site.name)]
    for site in chosen:
        linear = site.part
        weight = clone.tensor(linear.weight).detach()
        weight = weight.T if linear.transposed else weight
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        with editor.before(linear.node):
            first = editor.add_tensor("factor.first", (s[:, None] * v).contiguous())
            inner = editor.call(torch.ops.aten.linear.default, linear.input, first)
            second = editor.add_tensor("factor.second", u.contiguous())
            bias = () if linear.bias is None else (editor.read(linear.bias),)
            new = editor.call(torch.ops.aten.linear.default, inner, second, *bias)
        editor.replace(linear.node, new)
    after = discover(editor.finish())
    assert [block.kind for block in after.blocks] == [block.kind for block in before.blocks]
    for old, new_ffn in zip(before.ffns(), after.ffns(), strict=True):
        assert (new_ffn.part.width, new_ffn.part.activation) == (old.part.width, old.part.activation)
        assert len(new_ffn.part.down.factors) == 2
        assert new_ffn.part.down.in_features == new_ffn.part.width
        assert new_ffn.part.down.input is new_ffn.part.hidden
    for was, now in zip(before.attentions(), after.attentions(), strict=True):
        assert (now.part.heads, now.part.kv_heads) == (was.part.heads, was.part.kv_heads)
        assert now.part.o is not None
        assert len(now.part.o.factors) == 2
    names = {site.name for site in after.linears}
    assert {f"{site.name}.{half}" for site in chosen for half in (0, 1)} <= names
    assert after.unrecognised == {}


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "bert"])
def test_low_bit_weights_and_quantized_activations_are_looked_through(found: Any, name: str) -> None:
    from surgeon.numerics.quantization import quantize_groupwise

    _, _, graph, before = found(name)
    clone = graph.clone()
    structure = discover(clone)
    editor = Editor(clone)
    for site in structure.linears:
        linear = site.part
        if site.block is None:
            continue
        weight = clone.tensor(linear.weight).detach()
        weight = weight.T if linear.transposed else weight
        codes = quantize_groupwise(weight.contiguous(), bits=8, group=16, symmetric=False)
        with editor.before(linear.node):
            packed, scale = editor.add_tensor("codes.packed", codes.packed), editor.add_tensor("codes.scale", codes.scale)
            zero = editor.add_tensor("codes.zero", codes.zero_point) if codes.zero_point is not None else None
            low = editor.call(torch.ops.surgeon.dequantize.default, packed, scale, zero, 8, 16, codes.in_features)
            x = editor.call(torch.ops.surgeon.fake_quantize_dynamic.default, linear.input)
            bias = () if linear.bias is None else (editor.read(linear.bias),)
            new = editor.call(torch.ops.aten.linear.default, x, low, *bias)
        editor.replace(linear.node, new)
    result = editor.finish()
    after = discover(result)
    assert [block.kind for block in after.blocks] == [block.kind for block in before.blocks]
    assert [site.name for site in after.linears] == [site.name for site in before.linears]
    assert set(after.roles) == set(result.parameters())
    for old, new_ffn in zip(before.ffns(), after.ffns(), strict=True):
        assert (new_ffn.part.activation, new_ffn.part.width) == (old.part.activation, old.part.width)
        assert new_ffn.part.down.input is new_ffn.part.hidden
        assert "fake_quantize" not in new_ffn.part.input.name + new_ffn.part.hidden.name
        assert result.tensor(new_ffn.part.down.weight).dtype is torch.uint8
        assert after.roles[new_ffn.part.down.weight].endswith("ffn.down.weight")


# -- hand-written modules -----------------------------------------------------------------------------------------


class Matmul(nn.Module):
    """Attention spelled with matmul and softmax."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.size = heads, width // heads
        self.a, self.b, self.c, self.d = (nn.Linear(width, width, bias=False) for _ in range(4))

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, self.size)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.a(x)), self.split(self.b(x)), self.split(self.c(x))
        scores = q @ k.transpose(-1, -2) / self.size**0.5
        length = x.shape[1]
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), float("-inf"))
        return self.d((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Repeated(Matmul):
    """Keys of two heads that are computed from two projections, and repeated for the four heads of queries."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__(width, heads)
        self.b, self.c, self.e = (nn.Linear(width, width // 2, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        keys = (self.b(x) + self.e(x).tanh()).unflatten(-1, (2, self.size)).transpose(1, 2)
        values = self.c(x).unflatten(-1, (2, self.size)).transpose(1, 2)
        k, v = (t.repeat_interleave(2, dim=1) for t in (keys, values))
        y = F.scaled_dot_product_attention(self.split(self.a(x)), k, v, is_causal=True)
        return self.d(y.transpose(1, 2).flatten(2))


class Einsum(Matmul):
    """The same with einsum, heads in the third place, no mask."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (self.heads, self.size)) for layer in (self.a, self.b, self.c))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / self.size**0.5
        return self.d(torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2))


class Fused(Matmul):
    """One tensor [3, heads, size] of projections, read by unbind, scaled-dot-product attention."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__(width, heads)
        self.all = nn.Linear(width, 3 * width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.all(x).unflatten(-1, (3, self.heads, self.size)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.d(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Interleaved(nn.Module):
    """A gated FFN whose one input projection holds up and gate in turns, up first, in plain matrix products."""

    def __init__(self, width: int = 32, inner: int = 48) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(width, 2 * inner) * 0.1)
        self.u = nn.Parameter(torch.randn(inner, width) * 0.1)
        self.b = nn.Parameter(torch.randn(width) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        both = x @ self.w
        up, gate = both[..., ::2], both[..., 1::2]
        return (up * (gate / (1 + torch.exp(-gate)))) @ self.u + self.b


class Squared(nn.Module):
    """A plain FFN with a squared rectifier."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.p, self.q = nn.Linear(width, 80), nn.Linear(80, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.q(self.p(x).clamp(min=0) ** 2)


class Stack(nn.Module):
    """Blocks of the given sublayers over a learned token table; pre-norm."""

    def __init__(self, *kinds: type[nn.Module], depth: int = 2) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(50, 32))
        self.parts = nn.ModuleList(kind() for _ in range(depth) for kind in kinds)
        self.norms = nn.ModuleList(nn.LayerNorm(32) for _ in self.parts)
        self.end = nn.LayerNorm(32)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table[ids]
        for norm, part in zip(self.norms, self.parts, strict=True):
            x = part(norm(x)) + x
        return self.end(x) @ self.table.T


IDS = {"ids": torch.arange(12).reshape(2, 6)}


def handmade(module: nn.Module, inputs: dict[str, Tensor] | None = None) -> tuple[Graph, Structure]:
    torch.manual_seed(0)
    graph = trace(module.eval(), inputs or IDS)
    return graph, discover(graph)


@pytest.mark.parametrize(("kind", "causal"), [(Matmul, None), (Einsum, False), (Fused, True)])
def test_three_spellings_of_attention(kind: type[nn.Module], causal: bool | None) -> None:
    _, structure = handmade(Stack(kind, Squared))
    assert [block.kind for block in structure.blocks] == ["attention+ffn"] * 2
    for site in structure.attentions():
        part = site.part
        assert (part.heads, part.kv_heads, part.head_dim, part.causal) == (4, 4, 8, causal)
        prefix = f"parts.{2 * (site.block or 0)}"
        if kind is Fused:
            assert [(p.weight, p.rows) for p in (part.q, part.k, part.v) if p] == [
                (f"{prefix}.all.weight", rows) for rows in ((0, 32), (32, 64), (64, 96))
            ]
        else:
            assert [p.weight for p in (part.q, part.k, part.v) if p] == [f"{prefix}.{n}.weight" for n in "abc"]
        assert part.o is not None
        assert part.o.weight == f"{prefix}.d.weight"
    assert {site.part.activation for site in structure.ffns()} == {"relu2"}
    assert structure.unrecognised == {}
    assert structure.roles["table"] == "embedding.0.weight"
    assert structure.linears[-1].name == "head"
    assert structure.linears[-1].part.weight == "table"


def test_heads_of_keys_from_two_projections_are_counted_without_repetitions() -> None:
    _, structure = handmade(Stack(Repeated, Squared))
    assert [block.kind for block in structure.blocks] == ["attention+ffn"] * 2
    (attention,) = structure.blocks[0].regions[0].attention
    assert (attention.heads, attention.kv_heads, attention.head_dim) == (4, 2, 8)
    assert attention.k is None
    assert "2 linears" in str(structure.blocks[0].regions[0].reason)


def test_interleaved_gate_and_up_in_plain_products() -> None:
    _, structure = handmade(Stack(Matmul, Interleaved))
    for site in structure.ffns():
        ffn = site.part
        assert (ffn.activation, ffn.width, ffn.layout) == ("silu", 48, "interleaved")
        assert ffn.gate is not None
        assert ffn.gate.index == tuple(range(1, 96, 2))
        assert ffn.up.index == tuple(range(0, 96, 2))
        assert ffn.up.transposed
        assert ffn.down.bias == f"parts.{2 * (site.block or 0) + 1}.b"


def test_blocks_without_a_mixer_and_blocks_without_an_ffn() -> None:
    _, only_ffn = handmade(Stack(Squared, depth=3))
    assert [block.kind for block in only_ffn.blocks] == ["ffn"] * 3
    _, only_attention = handmade(Stack(Fused, depth=3))
    assert [block.kind for block in only_attention.blocks] == ["attention"] * 3


class Convolution(nn.Module):
    """A depthwise convolution over positions."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.filter = nn.Conv1d(width, width, 3, padding=1, groups=width)

    def forward(self, x: Tensor) -> Tensor:
        return self.filter(x.transpose(1, 2)).transpose(1, 2)


class Running(nn.Module):
    """A running mean: a recurrence without weights of its own beside one projection."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.p = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.p(x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None])


class TokenMixing(nn.Module):
    """Two linears over positions: an FFN by its looks, a mixer by what it does."""

    def __init__(self) -> None:
        super().__init__()
        self.p, self.q = nn.Linear(6, 12), nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.q(F.gelu(self.p(x.transpose(1, 2)))).transpose(1, 2)


@pytest.mark.parametrize("kind", [Convolution, Running])
def test_other_mixers_start_blocks(kind: type[nn.Module]) -> None:
    _, structure = handmade(Stack(kind, Squared))
    assert [block.kind for block in structure.blocks] == ["mixer+ffn"] * 2
    assert "without softmax attention" in str(structure.blocks[0].regions[0].reason)


def test_linears_over_positions_are_a_mixer() -> None:
    module, inputs = Stack(TokenMixing, Squared).eval(), IDS
    structure = discover(trace(module, inputs, dynamic={"ids": {0: "batch"}}))
    assert [block.kind for block in structure.blocks] == ["mixer+ffn"] * 2


class Sum(nn.Module):
    """Loss-free parallel block with one norm for both halves and a scaled branch."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.left, self.right = nn.LayerNorm(32), Fused(), Squared()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return 0.5 * (self.left(y) + self.right(y))


def test_parallel_halves_behind_a_scale() -> None:
    _, structure = handmade(Stack(Sum, depth=3))
    assert [block.kind for block in structure.blocks] == ["parallel"] * 3
    assert all(len(block.regions[0].ffn) == len(block.regions[0].attention) == 1 for block in structure.blocks)


class Shared(Stack):
    """Every block is the same block."""

    def __init__(self) -> None:
        super().__init__(Fused, Squared, depth=1)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table[ids]
        for _ in range(3):
            for norm, part in zip(self.norms, self.parts, strict=True):
                x = part(norm(x)) + x
        return self.end(x) @ self.table.T


def test_blocks_that_share_their_weights() -> None:
    graph, structure = handmade(Shared())
    assert [block.kind for block in structure.blocks] == ["attention+ffn"] * 3
    assert all(block.weights == () for block in structure.blocks)
    assert set(structure.roles) == set(graph.parameters())


# -- no residual stream -------------------------------------------------------------------------------------------


def test_a_stack_of_linears_without_residuals_is_refused() -> None:
    module = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    with pytest.raises(DiscoverError, match=r"no residual stream.* no part of it is of the form y = x \+ f\(x\)") as error:
        discover(trace(module, {"input": torch.randn(2, 8)}))
    assert "Nearest: the part from" in str(error.value)
    assert "needed an addition" in str(error.value)


def test_a_convolutional_net_without_residuals_is_refused() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3),
        nn.ReLU(), nn.Flatten(), nn.Linear(200, 5),
    ).eval()
    with pytest.raises(DiscoverError, match="no residual stream"):
        discover(trace(net, {"input": torch.randn(2, 3, 14, 14)}, dynamic={"input": {0: "batch"}}))


class TwoPaths(nn.Module):
    """Two branches are added, neither is the input itself."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.a(x)) + torch.relu(self.b(x))


def test_the_error_says_which_term_was_missing() -> None:
    with pytest.raises(DiscoverError, match=r"the terms of the addition \S+ are .*, needed x among them"):
        discover(trace(TwoPaths().eval(), {"x": torch.randn(2, 8)}))


# -- cost ---------------------------------------------------------------------------------------------------------


def test_work_grows_linearly_with_depth() -> None:
    """Counted in visited nodes, not in time: the paths of all regions add up to at most the graph."""
    for depth in (2, 4, 8):
        graph, structure = handmade(Stack(Fused, Squared, depth=depth))
        visited = sum(len(region.nodes) for block in structure.blocks for region in block.regions)
        assert len(structure.blocks) == depth
        assert visited <= len(list(graph.module.graph.nodes))
