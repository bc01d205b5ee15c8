"""``rotate``: nothing changes but where numbers stand, and rounding loses less."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from scipy.linalg import hadamard as sylvester
from torch import Tensor, nn

from surgeon.accounting import parameter_count
from surgeon.backends.huggingface import HuggingFace
from surgeon.channel_axes import Channels, find_channels
from surgeon.channel_bases import rotation
from surgeon.channels import rotate
from surgeon.data import load_data
from surgeon.discovery import discover
from surgeon.errors import PlanError
from surgeon.graph import Graph
from surgeon.numerics import NumericsError, hadamard, hadamard_core, spreading_basis
from surgeon.registry import make_pass
from surgeon.rewrite import Editor
from surgeon.tracing import trace
from surgeon.verify import check_caches, relative_error
from tests import families_moe
from tests.causal import causal
from tests.conftest import MODELS, Patient, Trained
from tests.test_drop_channels import Scaled, edited, family, outputs, traced
from tests.test_drop_heads import generating

MakePatient = Callable[[str], Patient]


def turned(subject: Patient, plan: Any = None, **fields: Any) -> Patient:
    return subject.checked({"rotate": fields}, plan)


# -- numerics -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [1, 2, 4, 12, 20, 24, 28, 36, 40, 44, 48, 60, 96, 100, 200, 768])
def test_hadamard_matrices_are_orthogonal_and_of_ones(order: int) -> None:
    if order == 100:  # of 49 = 7^2 there is one, which is not made here
        assert hadamard_core(order) is None
        with pytest.raises(NumericsError, match="no Hadamard matrix of order 100"):
            hadamard(order)
        return
    matrix = hadamard(order)
    assert torch.equal(matrix.abs(), torch.ones_like(matrix))
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.float64))


@pytest.mark.parametrize("order", [1, 2, 8, 64])
def test_hadamard_matrices_of_powers_of_two_are_those_of_scipy(order: int) -> None:
    assert torch.equal(hadamard(order), torch.from_numpy(sylvester(order)).double())


def test_widths_of_models_have_a_hadamard_matrix() -> None:
    widths = (128, 384, 576, 768, 896, 1024, 1152, 1280, 1536, 2048, 2304, 2560, 2880, 3072, 3584, 4096, 4608, 5120, 7168, 8192)
    assert [width for width in widths if hadamard_core(width) is None] == []
    assert [width for width in (0, 3, 6, 25, 33) if hadamard_core(width) is not None] == []


@pytest.mark.parametrize(("width", "kind"), [(2, "hadamard"), (16, "hadamard"), (96, "hadamard"), (7, "random")])
def test_bases_are_orthogonal_and_keep_what_is_centred_centred(width: int, kind: Any) -> None:
    for centred in (False, True):
        basis = spreading_basis(width, kind, torch.Generator().manual_seed(3), centred=centred)
        mean = torch.full((width, width), 1 / width if centred else 0.0, dtype=torch.float64)
        torch.testing.assert_close(basis @ basis.T, torch.eye(width, dtype=torch.float64) - mean, rtol=0, atol=1e-13)
        if centred:
            assert float(basis.sum(0).abs().max()) < 1e-13 * width
            assert float(basis.sum(1).abs().max()) < 1e-13 * width


def test_one_channel_is_spread_evenly() -> None:
    one = torch.zeros(96, dtype=torch.float64)
    one[17] = 1
    generator = torch.Generator().manual_seed(0)
    even = spreading_basis(96, "hadamard", generator).T @ one
    torch.testing.assert_close(even.abs(), torch.full_like(even, 96**-0.5))
    one = one - one.mean()
    assert float((spreading_basis(96, "hadamard", generator, centred=True).T @ one).abs().max()) < 2 * 96**-0.5


# -- nothing changes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("basis", ["hadamard", "random"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma", "olmo", "cohere", "gpt2", "phi", "falcon", "bitnet"])
def test_a_rotation_is_exact(name: str, basis: str) -> None:
    """In float64, to its rounding: RMS and layer norms, with 1 + w, without gain, with offsets, tied tables, fused weights."""
    subject, inputs = family(name)
    result = turned(subject, basis=basis)
    made = make_pass({"rotate": {"basis": basis}})
    assert made.exact(result.plan)
    assert made.summary(result.plan) == f"1 streams rotated: stream (32 channels, {basis})"
    wanted, found = outputs(subject, inputs), outputs(result, inputs)
    assert relative_error(found["logits"], wanted["logits"]) < 1e-13


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "gpt_oss"])
def test_mixtures_are_rotated_too(name: str) -> None:
    _, graph, structure = families_moe.traced(name, layers=1)
    inputs = families_moe.inputs(name)
    subject = Patient(graph, structure, load_data([inputs], graph))
    result = turned(subject)
    assert relative_error(outputs(result, inputs)["logits"], outputs(subject, inputs)["logits"]) < 1e-5


def test_the_weights_are_those_of_a_rotated_llama() -> None:
    """The library's own class with weights rotated by hand; the basis is that of scipy with the signs read from a table."""
    subject, _ = family("llama", torch.float32)
    result = turned(subject)
    state = {name: subject.graph.tensor(name).double() for name in subject.graph.parameters() if name.endswith("weight")}
    hd = torch.from_numpy(sylvester(32)).double() / 32**0.5
    table = "model.embed_tokens.weight"
    basis = torch.linalg.lstsq(state[table], result.graph.tensor(table).double()).solution
    signs = (basis @ hd.T).diagonal()
    torch.testing.assert_close(signs.abs(), torch.ones_like(signs), rtol=0, atol=1e-5)
    assert 4 < int((signs > 0).sum()) < 28
    basis = signs.sign()[:, None] * hd
    for name, weight in state.items():
        front = "model.norm" if name == "lm_head.weight" else name.split("self_attn")[0].split("mlp")[0] + (
            "input_layernorm" if "self_attn" in name else "post_attention_layernorm"
        )
        if "norm" in name:
            wanted = torch.ones_like(weight)
        elif name == table:
            wanted = weight @ basis
        elif "o_proj" in name or "down_proj" in name:
            wanted = basis.T @ weight
        else:
            wanted = weight * state[f"{front}.weight"] @ basis
        torch.testing.assert_close(result.graph.tensor(name).double(), wanted, rtol=0, atol=1e-6)


def test_rotating_back_gives_the_model_back() -> None:
    """Of a model whose gains are 1 already; a second rotation with the transposed matrix undoes the first."""
    subject, _ = family("llama")
    plain = turned(subject).graph
    basis = spreading_basis(32, "random", torch.Generator().manual_seed(0))
    there = by_hand(plain, basis)
    back = by_hand(there, basis.T.contiguous())
    for name in plain.parameters():
        torch.testing.assert_close(back.tensor(name), plain.tensor(name), rtol=0, atol=1e-13)
    assert not torch.allclose(there.tensor("lm_head.weight"), plain.tensor("lm_head.weight"))


def by_hand(graph: Graph, basis: Tensor) -> Graph:
    editor = Editor(graph.clone())
    ((_, channels),) = find_channels(discover(editor.graph))
    assert isinstance(channels, Channels)
    rotate(editor, channels, rotation(editor.graph, channels), basis, lambda _: basis)
    return editor.finish()


def test_a_tied_table_becomes_two(tiny_mixtral: Trained) -> None:
    result = turned(tiny_mixtral)
    assert parameter_count(result.graph) == parameter_count(tiny_mixtral.graph) + 1024 * 128
    assert result.plan.notes == (
        "stream: model.embed_tokens.weight both writes to the stream and reads it; it becomes two tensors",
    )


def test_seeds_and_bases_differ_and_need_no_data(patient: MakePatient) -> None:
    subject = patient("llama")
    assert not make_pass({"rotate": {}}).observers(subject.structure)
    ways = ({}, {"seed": 1}, {"basis": "random"}, {"basis": "random", "seed": 1})
    assert len({turned(subject, **fields).graph.fingerprint(weights=True) for fields in ways}) == 4


def test_a_width_without_a_hadamard_matrix_is_rotated_by_lot_and_said_so() -> None:
    ids = {"ids": torch.arange(10).reshape(2, 5)}
    torch.manual_seed(0)
    subject = traced(Odd().eval().double(), ids)
    result = turned(subject)
    assert [decision.basis for decision in result.plan.decisions] == ["random"]
    assert result.plan.notes == ("stream: no Hadamard matrix of order 18 is known here; an orthogonal one by lot instead",)
    (wanted,), (found,) = (outputs(each, ids).values() for each in (subject, result))
    assert relative_error(found, wanted) < 1e-13
    with pytest.raises(PlanError, match="stream: no Hadamard matrix of order 18 is known here; the plan's basis"):
        turned(subject, edited(result.plan, {"basis": "hadamard"}))


class Odd(nn.Module):
    """Three layers on a stream of 18 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 18)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"norm": nn.LayerNorm(18), "up": nn.Linear(18, 24), "down": nn.Linear(24, 18)}) for _ in range(3)
        )
        self.norm, self.head = nn.LayerNorm(18), nn.Linear(18, 11)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        for layer in self.layers:
            x = x + layer["down"](torch.nn.functional.gelu(layer["up"](layer["norm"](x))))  # type: ignore[index,operator]
        return self.head(self.norm(x))  # type: ignore[no-any-return]


# -- heads --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "phi3", "falcon", "gemma2", "bert"])
def test_heads_are_rotated_between_their_projections(name: str) -> None:
    """In float64: groups of queries, values within fused projections, biases, transposed weights, streams that are refused."""
    subject, inputs = family(name)
    result = turned(subject, heads=True, names="*attention*")
    attentions = [site.part for site in subject.structure.attentions()]
    assert [(d.site, d.width) for d in result.plan.decisions] == [
        (f"blocks.{index}.attention", part.head_dim) for index, part in enumerate(attentions)
    ]
    assert make_pass({"rotate": {"heads": True}}).summary(result.plan) == "0 streams rotated; heads of 2 attentions"
    changed = {n for n in subject.graph.parameters() if not torch.equal(subject.graph.tensor(n), result.graph.tensor(n))}
    weights = {part.v.weight for part in attentions if part.v} | {part.o.weight for part in attentions if part.o}
    assert changed - {part.v.bias for part in attentions if part.v} == weights
    for key, wanted in outputs(subject, inputs).items():
        assert relative_error(outputs(result, inputs)[key], wanted) < 1e-13


def test_the_products_of_heads_stay_and_queries_and_keys_too() -> None:
    """W_o W_v of every query head with its key/value head, of a model with two queries for each."""
    subject, _ = family("llama")
    result = turned(subject, heads=True, names="*attention*")
    for site in subject.structure.attentions():
        part = site.part
        assert part.o is not None
        assert part.v is not None
        assert part.heads == 2 * part.kv_heads
        (o, v), (new_o, new_v) = (
            (graph.tensor(part.o.weight).chunk(part.heads, 1), graph.tensor(part.v.weight).chunk(part.kv_heads))
            for graph in (subject.graph, result.graph)
        )
        for head in range(part.heads):
            torch.testing.assert_close(new_o[head] @ new_v[head // 2], o[head] @ v[head // 2], rtol=0, atol=1e-15)
        assert not torch.allclose(v[0], new_v[0])


def test_streams_and_heads_are_rotated_together(tiny_llama: Trained) -> None:
    result = turned(tiny_llama, heads=True)
    assert [d.site for d in result.plan.decisions] == ["stream", *(f"blocks.{index}.attention" for index in range(6))]
    assert tiny_llama.held_out is not None
    wanted = outputs(tiny_llama, tiny_llama.held_out)["logits"]
    assert relative_error(outputs(result, tiny_llama.held_out)["logits"], wanted) < 1e-5


@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
def test_caches_hold_rotated_values(name: str) -> None:
    subject = generating(causal(name))
    result = turned(subject, heads=True)
    assert any(decision.site.endswith("attention") for decision in result.plan.decisions)
    check_caches(make_pass({"rotate": {"heads": True}}), result.graph, result.data.calibration)


class Attending(nn.Module):
    """Two blocks of attention on a stream of layer norms, whose values something else has to do with too."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.table, self.head = nn.Embedding(11, 16), nn.Linear(16, 11)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"norm": nn.LayerNorm(16), **{key: nn.Linear(16, 16) for key in "qkvo"}}) for _ in range(2)
        )
        self.last = nn.LayerNorm(16)
        self.gates, self.perhead = nn.Parameter(torch.rand(2, 4)), nn.Parameter(torch.rand(2, 4, 1, 1))

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        x = self.table(ids)
        seen: tuple[Tensor, ...] = ()
        for index, block in enumerate(self.blocks):
            n = block["norm"](x)  # type: ignore[index]
            q, k, v = (block[key](n).unflatten(-1, (4, 4)).transpose(1, 2) for key in "qkv")  # type: ignore[index]
            if self.way == "power":
                v = v.square()
            a = (q @ k.transpose(2, 3) / 2).softmax(-1) @ v
            if self.way == "features":
                a = a * self.gates[index]
            if self.way == "heads":
                a = a * self.perhead[index] / 2
            if self.way == "returned":
                seen = (*seen, v)
            x = x + block["o"](a.transpose(1, 2).flatten(2))  # type: ignore[index]
        return (self.head(self.last(x)), *seen)


@pytest.mark.parametrize(
    ("way", "reason"),
    [
        ("features", r"\(aten::mul\), between the values and the output projection, is not the same for a head's"),
        ("power", r"between the values and the output projection, is not the same for a head's"),
        ("returned", r"output \(.*\) reads the heads' values too"),
    ],
)
def test_heads_whose_values_are_not_only_summed_are_left_alone(way: str, reason: str) -> None:
    subject, _ = attending(way)
    with pytest.raises(PlanError, match=rf"nothing can be rotated; blocks\.0\.attention: left alone: .*{reason}"):
        turned(subject, heads=True, names="*attention*")
    both = turned(subject, heads=True)  # the stream is rotated, and notes say why no heads are
    assert [decision.site for decision in both.plan.decisions] == ["stream"]
    assert [note.split(":")[0] for note in both.plan.notes if "left alone" in note] == [f"blocks.{i}.attention" for i in (0, 1)]


def test_factors_of_whole_heads_do_no_harm() -> None:
    subject, ids = attending("heads")
    result = turned(subject, heads=True)
    assert len(result.plan.decisions) == 3
    (wanted,), (found,) = (outputs(each, ids).values() for each in (subject, result))
    assert relative_error(found, wanted) < 1e-13
    decisions = tuple(d.model_copy(update={"width": 8}) if "attention" in d.site else d for d in result.plan.decisions)
    plan = result.plan.model_copy(update={"decisions": decisions})
    with pytest.raises(PlanError, match=r"blocks\.0\.attention: the plan rotates 8 features of each head, it has 4"):
        turned(subject, plan, heads=True)


def attending(way: str) -> tuple[Patient, dict[str, Tensor]]:
    ids = {"ids": torch.arange(10).reshape(2, 5)}
    torch.manual_seed(0)
    return traced(Attending(way).eval().double(), ids), ids


# -- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gemma2", r"no stream can be rotated; stream: left alone: add_tensor_\d+ .* takes the result of the norm"),
        ("bert", "cls.predictions.transform.dense.weight has the stream's channels along two"),
        ("dinov2", r"the model returns layer_norm_default_\d \(aten::layer_norm\), whose channels would change"),
        ("openai-gpt", "reads the stream without a norm in front"),
    ],
)
def test_what_cannot_be_rotated_is_refused_by_name(name: str, reason: str) -> None:
    subject, _ = family(name, torch.float32)
    with pytest.raises(PlanError, match=reason):
        turned(subject)


@pytest.mark.parametrize(
    ("way", "reason"),
    [("scale", "multiplies the stream channel by channel"), ("number", "adds a number to every channel")],
)
def test_what_works_on_single_channels_is_not_rotated(way: str, reason: str) -> None:
    torch.manual_seed(0)
    subject = traced(Scaled(way).eval(), {"ids": torch.arange(10).reshape(2, 5)})
    with pytest.raises(PlanError, match=reason):
        turned(subject)


def test_plans_that_do_not_fit_are_refused() -> None:
    subject, _ = family("llama", torch.float32)
    plan = turned(subject).plan
    with pytest.raises(PlanError, match="stream: the plan rotates 24 channels, it has 32"):
        turned(subject, edited(plan, {"width": 24}))
    other, _ = family("gemma2", torch.float32)
    with pytest.raises(PlanError, match="stream: the plan rotates it, but add_tensor"):
        turned(other, plan)


# -- what quantize loses behind it --------------------------------------------------------------------------------

FORMS = {
    "int8_dynamic": {"scheme": "int8_dynamic"},
    "int4, group 32": {"scheme": "int4", "group": 32, "blocks": ":"},
    "int4, group 128": {"scheme": "int4", "group": 128, "blocks": ":"},
}


def divergence(subject: Patient, form: str, want: Tensor, batch: dict[str, Tensor]) -> float:
    """Mean Kullback-Leibler divergence of the next token's distribution behind quantize from that of the model."""
    logits = outputs(subject.operate({"quantize": FORMS[form]}), batch)["logits"]
    before, after = want.log_softmax(-1), logits.log_softmax(-1)
    return float((before.exp() * (before - after)).sum(-1).mean())


@pytest.fixture(scope="module")
def hard(tiny_llama: Trained) -> tuple[Patient, Patient]:
    """The model with outliers, and the same rotated."""
    patient = with_outliers(tiny_llama)
    return patient, turned(patient)


def with_outliers(subject: Trained, factor: float = 30.0) -> Patient:
    """The trained llama with 4 channels of every norm's result, but for the last, larger and its readers' columns smaller."""
    module = tf.AutoModelForCausalLM.from_pretrained(MODELS / "tiny-llama", dtype=torch.float32).eval()
    with torch.no_grad():
        for layer in module.model.layers:
            attention, ffn = layer.self_attn, layer.mlp
            for norm, readers in (
                (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
                (layer.post_attention_layernorm, (ffn.gate_proj, ffn.up_proj)),
            ):
                norm.weight[[3, 40, 77, 101]] *= factor
                for reader in readers:
                    reader.weight[:, [3, 40, 77, 101]] /= factor
    graph = trace(module, subject.held_out)
    return Patient(graph, discover(graph), subject.data)


@pytest.mark.parametrize("form", FORMS)
def test_outliers_do_no_harm_once_they_are_rotated(tiny_llama: Trained, hard: tuple[Patient, Patient], form: str) -> None:
    assert tiny_llama.held_out is not None
    batch = tiny_llama.held_out
    want = outputs(tiny_llama, batch)["logits"]
    assert relative_error(outputs(hard[0], batch)["logits"], want) < 1e-5
    usual, alone, rotated = (divergence(each, form, want, batch) for each in (tiny_llama, *hard))
    assert alone > 2.5 * usual, (usual, alone)
    assert rotated < 1.1 * usual, (usual, rotated)


def test_a_stream_in_its_principal_axes_is_worse_and_one_rotated_by_lot_better(tiny_llama: Trained) -> None:
    """Few channels then have most of the energy, and groups of weights that are read with them most of theirs."""
    assert tiny_llama.held_out is not None
    batch = tiny_llama.held_out
    want = outputs(tiny_llama, batch)["logits"]
    axes = tiny_llama.operate({"drop_channels": {"ratio": 0}})
    form = "int4, group 128"
    assert divergence(turned(axes), form, want, batch) < 0.9 * divergence(axes, form, want, batch)


# -- backends -----------------------------------------------------------------------------------------------------


def test_a_checkpoint_of_a_rotated_llama_is_one_of_the_same_class(tiny_llama: Trained, tmp_path: Path) -> None:
    result = turned(tiny_llama, heads=True)
    HuggingFace().lower(result.graph, tmp_path)
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert tiny_llama.held_out is not None
    with torch.no_grad():
        logits = loaded(**tiny_llama.held_out, use_cache=False).logits
    assert relative_error(logits, outputs(tiny_llama, tiny_llama.held_out)["logits"]) < 1e-5
