"""The property of every pass that must hold exactly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from surgeon.accounting import active_parameter_count, parameter_count, weight_bytes
from surgeon.data import load_data, synthetic_batches
from surgeon.discovery import discover
from surgeon.errors import PlanError, RecipeError
from surgeon.graph import Graph
from surgeon.moments import SecondMoment
from surgeon.numerics import whitened_svd
from surgeon.observe import observe
from surgeon.passes.drop_blocks import DropBlock, DropBlocksPlan
from surgeon.passes.drop_experts import DropExpertsPlan, KeepExperts
from surgeon.registry import make_pass
from surgeon.rewrite import Editor
from surgeon.tracing import trace
from surgeon.verify import check_parameters, relative_error
from tests.conftest import Patient, Trained
from tests.models import NAMES, tiny, with_layer_deleted

MakePatient = Callable[[str], Patient]


def largest_error(found: Graph, wanted: Callable[..., dict[str, torch.Tensor]], batches: Any) -> float:
    worst = 0.0
    with torch.no_grad():
        for batch in batches:
            expected = wanted(**batch)
            for name, value in found(**batch).items():
                worst = max(worst, relative_error(value, expected[name]))
    return worst


def error(found: Patient, wanted: Patient) -> float:
    """Largest relative error of any output on inputs that no pass has seen."""
    return largest_error(found.graph, wanted.graph, synthetic_batches(wanted.graph))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("block", [0, 2])
def test_dropping_a_block_is_the_model_without_the_layer(patient: MakePatient, name: str, block: int) -> None:
    subject = patient(name)
    dropped = subject.operate(
        {"drop_blocks": {"count": 1}}, DropBlocksPlan(decisions=(DropBlock(site=f"blocks.{block}"),))
    )
    module, inputs = tiny(name)
    shorter = with_layer_deleted(name, module, block).eval()

    def source(**batch: torch.Tensor) -> dict[str, torch.Tensor]:
        outputs = shorter(**batch, **({"use_cache": False} if "logits" in {p.name for p in subject.graph.outputs} else {}))
        return {key: value for key, value in outputs.items() if isinstance(value, torch.Tensor)}

    for batch in [inputs, *synthetic_batches(subject.graph)]:
        with torch.no_grad():
            expected = source(**batch)
            for key, value in dropped.graph(**batch).items():
                assert torch.equal(value, expected[key])
    plan = DropBlocksPlan(decisions=(DropBlock(site=f"blocks.{block}"),))
    check_parameters(make_pass({"drop_blocks": {"count": 1}}), plan, subject.graph, subject.structure, dropped.graph)
    assert not [key for key in dropped.graph.parameters() if key in set(subject.structure.blocks[block].weights)]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_dropping_a_block_of_a_model_without_a_head(name: str) -> None:
    """The stack inside a causal language model, whose output is its last hidden state."""
    module, inputs = tiny(name)
    graph = trace(module.base_model, inputs)  # type: ignore[arg-type]  # a module
    subject = Patient(graph, discover(graph), load_data(None, graph))
    for block in (0, 2):
        dropped = subject.operate(
            {"drop_blocks": {"count": 1}}, DropBlocksPlan(decisions=(DropBlock(site=f"blocks.{block}"),))
        )
        shorter = with_layer_deleted(name, module, block).base_model
        for batch in [inputs, *synthetic_batches(graph)]:
            with torch.no_grad():
                wanted = shorter(**batch, use_cache=False).last_hidden_state  # type: ignore[operator]  # a module
                assert torch.equal(dropped.graph(**batch)["last_hidden_state"], wanted)


def test_neighbouring_blocks_drop_together(patient: MakePatient) -> None:
    subject = patient("llama")
    plan = DropBlocksPlan(decisions=(DropBlock(site="blocks.0"), DropBlock(site="blocks.1")))
    dropped = subject.operate({"drop_blocks": {"count": 2}}, plan)
    module, inputs = tiny("llama")
    shorter = with_layer_deleted("llama", with_layer_deleted("llama", module, 0), 0)
    with torch.no_grad():
        assert torch.equal(dropped.graph(**inputs)["logits"], shorter(**inputs, use_cache=False).logits)
    assert len(dropped.structure.blocks) == 1


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit"])
@pytest.mark.parametrize("router", ["linear", "centroid"])
def test_all_experts_active_is_the_dense_ffn(patient: MakePatient, name: str, router: str) -> None:
    subject = patient(name)
    step = {"moefy_ffn": {"experts": 4, "top_k": 4, "router": router}}
    split = subject.operate(step)
    assert largest_error(split.graph, subject.graph, synthetic_batches(subject.graph)) < 1e-5
    assert make_pass(step).exact(split.plan)
    assert [region.kind for region in split.structure.blocks[0].regions].count("moe") == 1


class Maps(torch.nn.Module):
    """Residual convolutions and networks over maps [batch, features, height, width] or [batch, height, width, features]."""

    def __init__(self, last: bool) -> None:
        super().__init__()
        self.last = last
        self.mix = torch.nn.ModuleList(torch.nn.Conv2d(12, 12, 3, padding=1) for _ in range(3))
        self.up = torch.nn.ModuleList(torch.nn.Conv2d(12, 24, 1) for _ in range(3))
        self.down = torch.nn.ModuleList(torch.nn.Conv2d(24, 12, 1) for _ in range(3))

    def hidden(self, x: torch.Tensor) -> list[torch.Tensor]:
        """The hidden state before every block and behind the last, features in front of height and width."""
        found = [x]
        for mix, up, down in zip(self.mix, self.up, self.down, strict=True):
            x = x + mix(x)
            x = x + down(torch.nn.functional.gelu(up(x)))
            found.append(x)
        return found

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.last:
            return self.hidden(x)[-1]
        for mix, up, down in zip(self.mix, self.up, self.down, strict=True):
            x = x + mix(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            inner = torch.nn.functional.linear(x, up.weight[:, :, 0, 0], up.bias)
            x = x + torch.nn.functional.linear(torch.nn.functional.gelu(inner), down.weight[:, :, 0, 0], down.bias)
        return x


@pytest.mark.parametrize("last", [False, True])
def test_blocks_over_maps_are_ranked_by_the_features_of_each_position(last: bool) -> None:
    """s_l = mean over positions of cos(h_l, h_{l+1}), whichever dimension holds the features."""
    torch.manual_seed(0)
    module = Maps(last).eval()
    x = torch.randn(2, 12, 5, 7)
    graph = trace(module, {"x": x.permute(0, 2, 3, 1) if last else x})
    structure = discover(graph)
    assert [block.features for block in structure.blocks] == [-1 if last else -3] * 3
    step = make_pass({"drop_blocks": {"count": 1}})
    observers = step.observers(structure)
    observe(graph, [dict(graph.example)], observers)
    plan = step.plan(graph, structure, observers)
    states = module.hidden(x)
    pairs = zip(states, states[1:], strict=False)
    wanted = [torch.nn.functional.cosine_similarity(a, b, dim=1).mean().item() for a, b in pairs]
    assert list(plan.scores.values()) == pytest.approx(wanted, rel=1e-5)  # type: ignore[attr-defined]  # the pass's own plan


class Feedforward(torch.nn.Module):
    """A residual stack of FFNs behind a mixer, gated or not, with biases or not."""

    def __init__(self, gated: bool, bias: bool) -> None:
        super().__init__()
        linear = torch.nn.Linear
        self.mix = torch.nn.ModuleList(linear(24, 24) for _ in range(2))
        self.up = torch.nn.ModuleList(linear(24, 48, bias=bias) for _ in range(2))
        self.gate = torch.nn.ModuleList(linear(24, 48, bias=bias) for _ in range(2) if gated)
        self.down = torch.nn.ModuleList(linear(48, 24, bias=bias) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        functional = torch.nn.functional
        for index in range(2):
            q = self.mix[index](x)
            x = x + functional.scaled_dot_product_attention(q, q, q)
            up = self.up[index](x)
            inner = functional.silu(self.gate[index](x)) * up if self.gate else functional.gelu(up)
            x = x + self.down[index](inner)
        return x


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_every_kind_of_ffn_splits(gated: bool, bias: bool) -> None:
    torch.manual_seed(0)
    module = Feedforward(gated, bias).eval()
    graph = trace(module, {"x": torch.randn(2, 5, 24)})
    batches = [{"x": torch.randn(2, 5, 24)} for _ in range(3)]
    subject = Patient(graph, discover(graph), load_data(batches, graph))
    assert len(list(subject.structure.ffns())) == 2
    whole = subject.operate({"moefy_ffn": {"experts": 6, "top_k": 6}})
    assert largest_error(whole.graph, subject.graph, batches) < 1e-5
    part = subject.operate({"moefy_ffn": {"experts": 6, "top_k": 2}})
    neurons = 48 * (24 * (2 if gated else 1) + 24 + (2 if gated else 1) * bias)
    assert active_parameter_count(part.graph) == parameter_count(part.graph) - 2 * neurons * 4 // 6
    assert parameter_count(part.graph) == parameter_count(graph) + 2 * 6 * (24 + 1)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_active_parameters_of_a_split_ffn(patient: MakePatient, name: str) -> None:
    subject = patient(name)
    split = subject.operate({"moefy_ffn": {"experts": 8, "top_k": 2, "router": "centroid"}})
    ffns = [site.part for site in subject.structure.ffns()]
    gated = 3 if ffns[0].gate is not None else 2
    expert_weights = sum(gated * f.width * 64 + (f.width if f.up.bias else 0) for f in ffns)
    routers = len(ffns) * 8 * 64
    assert parameter_count(split.graph) == parameter_count(subject.graph) + routers
    assert active_parameter_count(split.graph) == parameter_count(split.graph) - expert_weights * 6 // 8


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", ["svd", "whitened"])
def test_full_rank_is_the_original(patient: MakePatient, name: str, method: str) -> None:
    subject = patient(name)
    factored = subject.operate({"low_rank": {"ratio": 1.0, "method": method}})
    assert largest_error(factored.graph, subject.graph, synthetic_batches(subject.graph)) < 1e-5
    assert len(factored.plan.decisions) > 0


def test_whitened_loss_is_the_tail_of_the_spectrum(tiny_llama: Trained) -> None:
    site = next(site for site in tiny_llama.structure.linears if site.name == "blocks.2.ffn.down")
    observer = SecondMoment(site.part.input)
    observe(tiny_llama.graph, tiny_llama.data.calibration, {"x": observer})
    assert observer.matrix is not None
    weight = tiny_llama.graph.tensor(site.part.weight).detach().double()
    factors = whitened_svd(weight, observer.matrix, 40)
    difference = weight - factors.left.double() @ factors.right.double()
    measured = torch.trace(difference @ observer.matrix @ difference.T).sqrt()
    assert float(measured) == pytest.approx(factors.tail, rel=1e-5)


def duplicated(subject: Patient) -> Patient:
    """Every expert twice (the copy's neurons permuted), selected as pairs by a doubled router and top-k."""
    clone = subject.graph.clone()
    structure = discover(clone)
    editor = Editor(clone)
    generator = torch.Generator().manual_seed(0)
    for site in structure.moes():
        moe = site.part
        order = torch.randperm(moe.width, generator=generator)
        both = torch.cat([order, moe.width + order])
        w_in, w_out = editor.tensor(moe.w_in).detach(), editor.tensor(moe.w_out).detach()
        editor.set_tensor(moe.w_in, torch.cat([w_in, w_in[:, both]]))
        editor.set_tensor(moe.w_out, torch.cat([w_out, w_out[:, :, order]]))
        assert moe.router is not None
        router = editor.tensor(moe.router.weight).detach()
        editor.set_tensor(moe.router.weight, torch.cat([router, router]))
    editor.finish()
    return Patient(clone, discover(clone), subject.data)


def test_merging_duplicated_and_permuted_experts_is_lossless(patient: MakePatient) -> None:
    subject = duplicated(patient("mixtral"))
    experts = next(iter(subject.structure.moes())).part.experts
    merged = subject.operate({"merge_experts": {"groups": experts // 2}})
    for decision in merged.plan.decisions:
        pairs = sorted(tuple(sorted(group)) for group in decision.groups)
        assert pairs == [(e, e + experts // 2) for e in range(experts // 2)]
    assert largest_error(merged.graph, subject.graph, synthetic_batches(subject.graph)) < 1e-5
    unaligned = subject.operate({"merge_experts": {"groups": experts // 2, "align": False}})
    assert largest_error(unaligned.graph, subject.graph, synthetic_batches(subject.graph)) > 1e-3


def test_dropping_an_expert_that_is_never_chosen_is_lossless(patient: MakePatient) -> None:
    subject = patient("mixtral")
    clone = subject.graph.clone()
    structure = discover(clone)
    editor = Editor(clone)
    for site in structure.moes():
        router = site.part.router
        assert router is not None
        weight = editor.tensor(router.weight).detach().clone()
        # Expert 1 scores as expert 0 does, a little less whatever the sign: never before it, and both never at once.
        hidden = editor.call  # the router has no bias to push one down with: give it one
        with editor.after(router.node):
            bias = editor.add_tensor(f"{router.weight}_shift", torch.tensor([0.0, -1e4] + [0.0] * (weight.shape[0] - 2)))
            shifted = hidden(torch.ops.aten.add.Tensor, router.node, bias)
        editor.replace(router.node, shifted)
    editor.finish()
    silenced = Patient(clone, discover(clone), subject.data)
    keep = tuple(e for e in range(6) if e != 1)
    plan = DropExpertsPlan(decisions=tuple(KeepExperts(site=s.name, keep=keep) for s in silenced.structure.moes()))
    dropped = silenced.operate({"drop_experts": {"keep": 5}}, plan)
    assert largest_error(dropped.graph, silenced.graph, synthetic_batches(subject.graph)) < 1e-5
    chosen = silenced.operate({"drop_experts": {"keep": 5}})
    assert all(1 not in decision.keep for decision in chosen.plan.decisions)


@pytest.mark.parametrize(
    ("scheme", "bits"), [("int8", 8), ("int4", 4)]
)
def test_quantized_weights_are_the_nearest_codes(patient: MakePatient, scheme: str, bits: int) -> None:
    subject = patient("llama")
    quantized = subject.operate({"quantize": {"scheme": scheme, "group": 16, "symmetric": False}})
    site = next(s for s in subject.structure.linears if s.name == "blocks.1.ffn.up")
    weight = subject.graph.tensor(site.part.weight).detach()
    node = next(s for s in quantized.structure.linears if s.name == "blocks.1.ffn.up").part.node
    source = node.args[1]
    found = source.target(*[quantized.graph.tensor(str(a.target)) if hasattr(a, "target") else a for a in source.args])
    groups = weight.reshape(weight.shape[0], -1, 16)
    step = (groups.amax(-1).clamp_min(0) - groups.amin(-1).clamp_max(0)) / (2**bits - 1)
    error = (found - weight).abs().reshape(groups.shape).amax(-1)
    assert bool((error <= step * 0.5001 + 1e-7).all())
    assert parameter_count(quantized.graph) == parameter_count(subject.graph)


@pytest.mark.parametrize(("name", "bound"), [("llama", 0.1), ("mixtral", 0.2)])  # a token may go to another expert
def test_eight_bit_floats_take_a_byte_and_move_little(patient: MakePatient, name: str, bound: float) -> None:
    subject = patient(name)
    fields = {"embeddings": True, "symmetric": True}
    floats = subject.operate({"quantize": {"scheme": "fp8", **fields}})
    integers = subject.operate({"quantize": {"scheme": "int8", **fields}})
    assert parameter_count(floats.graph) == parameter_count(subject.graph)
    assert weight_bytes(floats.graph) < weight_bytes(integers.graph)  # one scale per row
    batches = synthetic_batches(subject.graph)
    assert 0 < largest_error(floats.graph, subject.graph, batches) < bound
    with pytest.raises(RecipeError, match="no zero point"):
        subject.operate({"quantize": {"scheme": "fp8", "symmetric": False}})


@pytest.mark.parametrize(
    ("name", "step", "message"),
    [
        ("llama", {"drop_blocks": {"count": 3}}, "at least one block must remain"),
        ("llama", {"drop_blocks": {"count": 2, "blocks": [1]}}, "2 blocks asked, 1 of"),
        ("llama", {"drop_blocks": {"count": 1, "blocks": [7]}}, "do not exist"),
        ("llama", {"moefy_ffn": {"experts": 9, "top_k": 2}}, r"blocks\.0\.ffn: 9 experts do not divide its width 112"),
        ("llama", {"low_rank": {"rank": 65}}, r"blocks\.0\.attention\.q: rank 65 asked"),
        ("mixtral", {"drop_experts": {"keep": 1}}, r"blocks\.0\.moe: 1 experts would remain, the router chooses 2"),
        ("mixtral", {"drop_experts": {"keep": 9}}, "keep 9 asked, the mixture has 6"),
        ("mixtral", {"merge_experts": {"groups": 9}}, "9 groups asked"),
        ("llama", {"drop_experts": {"keep": 2}}, "no mixture of experts"),
    ],
)
def test_refusals(patient: MakePatient, name: str, step: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        patient(name).operate(step)


def test_the_summary_counts_what_an_edited_plan_says(patient: MakePatient) -> None:
    step = make_pass({"quantize": {"scheme": "int8"}})
    plan = patient("bert").operate(step).plan
    count = len(plan.decisions)
    assert step.summary(plan) == f"{count} weights in int8"
    first = plan.decisions[0].model_copy(update={"bits": 4})
    edited = plan.model_copy(update={"decisions": (first, *plan.decisions[1:])})
    assert step.summary(edited) == f"1 weights in int4, {count - 1} weights in int8"


def test_quantizing_twice_is_refused(patient: MakePatient) -> None:
    once = patient("llama").operate({"quantize": {"scheme": "int8"}})
    with pytest.raises(PlanError, match="quantized already"):
        once.operate({"quantize": {"scheme": "int4"}})


def test_a_pass_leaves_the_graph_it_was_given_alone(patient: MakePatient) -> None:
    subject = patient("mixtral")
    before = subject.graph.fingerprint(weights=True)
    for step in ({"drop_blocks": {"count": 1}}, {"merge_experts": {"groups": 3}}, {"quantize": {"scheme": "int4"}}):
        subject.operate(step)
    assert subject.graph.fingerprint(weights=True) == before


def test_both_factors_are_quantized(patient: MakePatient) -> None:
    factored = patient("llama").operate({"low_rank": {"ratio": 0.5, "method": "svd"}})
    quantized = factored.operate({"quantize": {"scheme": "int8", "embeddings": True}})
    wide = [n for n, t in quantized.graph.parameters().items() if t.dim() == 2 and t.is_floating_point()]
    assert not [name for name in wide if "_scale" not in name]


def test_a_pattern_that_matches_nothing_is_noted(patient: MakePatient) -> None:
    subject = patient("llama")
    plan = subject.operate({"quantize": {"scheme": "int8", "names": ["*.attention.q", "*.ffn.dwon"]}}).plan
    assert plan.notes[-1] == "names: '*.ffn.dwon' matches nothing that quantize works on"
    step = {"low_rank": {"rank": 4, "method": "svd", "blocks": [0], "names": ["*.up", "blocks.2.*"]}}
    assert subject.operate(step).plan.notes[-1].endswith("'blocks.2.*' matches nothing that low_rank works on at blocks: [0]")
    fields = {"rank": 4, "method": "svd", "names": ["*.q", "model.layers.1.mlp.*", "blocks.0.*"]}
    plan = subject.operate({"low_rank": fields}).plan
    assert len(plan.decisions) > 7
    assert not any("names:" in note for note in plan.notes)


def test_seeds_that_no_generator_takes_are_refused(patient: MakePatient) -> None:
    for seed in (-1, 2**64):
        with pytest.raises(RecipeError, match="seed"):
            patient("llama").operate({"drop_neurons": {"ratio": 0.5, "criterion": "random", "refit": False, "seed": seed}})
