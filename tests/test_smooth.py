"""Moving the range of activations into weights: nothing changes but what rounding loses afterwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import surgeon
from surgeon.accounting import parameter_count
from surgeon.errors import PlanError, RecipeError
from surgeon.numerics import quantize_groupwise
from surgeon.observe import Extremes, observe
from surgeon.passes.smooth import SmoothPlan
from surgeon.registry import make_pass
from surgeon.samples import Sample
from surgeon.verify import relative_error
from tests.conftest import Patient, Trained
from tests.models import minilm_path

MakePatient = Callable[[str], Patient]
EXAMPLES = Path(__file__).parent.parent / "examples"


def logits(subject: Patient, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return subject.graph(**batch)["logits"]


def test_outputs_stay_and_norms_and_up_projections_take_the_division(tiny_llama: Trained) -> None:
    assert tiny_llama.held_out is not None
    smoothed = tiny_llama.operate({"smooth": {"alpha": 0.5, "insert": False}})
    by_site = {decision.site: decision for decision in smoothed.plan.decisions}
    assert set(by_site) == {
        *(f"blocks.{block}.{site}" for block in range(6) for site in ("attention.q", "ffn.gate", "ffn.down")), "head"
    }  # fmt: skip
    assert by_site["blocks.2.attention.q"].readers == tuple(f"blocks.2.attention.{name}" for name in "qkv")
    assert all(decision.folded for decision in by_site.values())
    assert "blocks.0.attention.o: no weight in front divides" in "\n".join(smoothed.plan.notes)
    assert parameter_count(smoothed.graph) == parameter_count(tiny_llama.graph)
    kinds = [[str(node.target) for node in each.graph.module.graph.nodes] for each in (smoothed, tiny_llama)]
    assert kinds[0] == kinds[1]  # no operation more
    assert relative_error(logits(smoothed, tiny_llama.held_out), logits(tiny_llama, tiny_llama.held_out)) < 1e-5


def test_what_cannot_be_folded_is_multiplied(tiny_llama: Trained) -> None:
    assert tiny_llama.held_out is not None
    smoothed = tiny_llama.operate({"smooth": {"alpha": 0.5, "names": "*.attention.o"}})
    assert [decision.folded for decision in smoothed.plan.decisions] == [False] * 6
    assert parameter_count(smoothed.graph) == parameter_count(tiny_llama.graph) + 6 * 128
    assert relative_error(logits(smoothed, tiny_llama.held_out), logits(tiny_llama, tiny_llama.held_out)) < 1e-5
    roles = smoothed.structure
    assert {site.name for site in roles.linears} == {site.name for site in tiny_llama.structure.linears}
    assert not roles.unrecognised


def test_the_formula(tiny_llama: Trained) -> None:
    """Columns of W grow by s and rows of the norm's weight shrink by it, s as SmoothQuant has it but for one number."""
    site = next(site for site in tiny_llama.structure.linears if site.name == "blocks.1.ffn.down")
    seen = Extremes(site.part.input)
    observe(tiny_llama.graph, tiny_llama.data.calibration, {"x": seen})
    weight = tiny_llama.graph.tensor(site.part.weight).detach().double()
    want = seen.peak**0.7 / weight.abs().amax(0) ** 0.3
    smoothed = tiny_llama.operate({"smooth": {"alpha": 0.7, "names": "*.1.ffn.down"}})
    found = smoothed.graph.tensor(site.part.weight).detach().double() / weight
    factor = found[0] / want
    torch.testing.assert_close(factor, factor[:1].expand_as(factor), rtol=1e-4, atol=0)
    torch.testing.assert_close(found, found[:1].expand_as(found), rtol=1e-4, atol=0)
    assert float(found.max() * found.min()) == pytest.approx(1, rel=1e-4)


def test_the_formula_of_awq(tiny_llama: Trained) -> None:
    """Columns of W grow by the mean magnitude of their feature to the power of the exponent, but for one number."""
    site = next(site for site in tiny_llama.structure.linears if site.name == "blocks.1.ffn.down")
    seen = Sample(site.part.input, limit=1 << 20)
    observe(tiny_llama.graph, tiny_llama.data.calibration, {"x": seen})
    want = seen.values()[0].double().abs().mean(0) ** 0.7
    fields = {"method": "awq", "alpha": 0.7, "names": "*.1.ffn.down", "tokens": 1 << 20}
    smoothed = tiny_llama.operate({"smooth": fields})
    weight = tiny_llama.graph.tensor(site.part.weight).detach().double()
    found = smoothed.graph.tensor(site.part.weight).detach().double() / weight
    factor = found[0] / want
    torch.testing.assert_close(factor, factor[:1].expand_as(factor), rtol=1e-4, atol=0)
    assert float(found.max() * found.min()) == pytest.approx(1, rel=1e-4)


def test_the_search_of_awq_chooses_what_loses_least(tiny_llama: Trained) -> None:
    """Of the exponents tried none gives outputs of rounded weights that are nearer, on the tokens that it looked at."""
    site = next(site for site in tiny_llama.structure.linears if site.name == "blocks.0.ffn.down")
    weight = tiny_llama.graph.tensor(site.part.weight).detach().float()
    seen = Sample(site.part.input, limit=1 << 20)
    observe(tiny_llama.graph, tiny_llama.data.calibration, {"x": seen})
    x = seen.values()[0].float()
    form = {"bits": 2, "group": 64, "symmetric": False}

    def lost(alpha: float) -> float:
        scale = x.abs().mean(0) ** alpha
        codes = quantize_groupwise(weight * scale / (scale.max() * scale.min()).sqrt(), **form)
        scale = scale / (scale.max() * scale.min()).sqrt()
        return float((x @ (codes.dequantize() / scale - weight).T).square().sum())

    errors = {tenths / 10: lost(tenths / 10) for tenths in range(11)}
    fields = {"method": "awq", **form, "names": site.name, "tokens": 1 << 20}
    decisions = tiny_llama.operate({"smooth": fields}).plan.decisions
    chosen = decisions[0].alpha if decisions else 0.0
    assert errors[chosen] == pytest.approx(min(errors.values()), rel=1e-3)
    assert errors[0.0] > 1.001 * min(errors.values()) or chosen == 0


def test_awq_leaves_outputs_and_refuses_fields_of_the_other_method(tiny_llama: Trained) -> None:
    assert tiny_llama.held_out is not None
    smoothed = tiny_llama.operate({"smooth": {"method": "awq", "alpha": 0.5}})
    assert len(smoothed.plan.decisions) > 6
    assert relative_error(logits(smoothed, tiny_llama.held_out), logits(tiny_llama, tiny_llama.held_out)) < 1e-5
    with pytest.raises(RecipeError, match="group is for method awq; method is smoothquant"):
        make_pass({"smooth": {"group": 64}})


def divergence(before: Tensor, after: Tensor) -> float:
    before, after = before.log_softmax(-1), after.log_softmax(-1)
    return float((before.exp() * (before - after)).sum(-1).mean())


@pytest.mark.parametrize("fields", [{}, {"insert": False}, {"alpha": 0.5}])
def test_eight_bits_lose_much_less_behind_it(tiny_llama: Trained, fields: dict[str, Any]) -> None:
    assert tiny_llama.held_out is not None
    quantize = {"quantize": {"scheme": "int8_dynamic"}}
    want = logits(tiny_llama, tiny_llama.held_out)
    plain = divergence(want, logits(tiny_llama.operate(quantize), tiny_llama.held_out))
    smoothed = divergence(want, logits(tiny_llama.operate({"smooth": fields}).operate(quantize), tiny_llama.held_out))
    assert smoothed < 0.8 * plain


@pytest.mark.parametrize(
    ("step", "quantize", "share"),
    [
        ({"smooth": {}}, {"quantize": {"scheme": "int8_dynamic", "embeddings": True}}, 0.5),
        ({"smooth": {"method": "awq"}}, {"quantize": {"scheme": "int4"}}, 0.8),
        ({"smooth": {"method": "awq", "group": 128, "symmetric": False}},
         {"quantize": {"scheme": "int4", "group": 128, "symmetric": False}}, 0.85),
    ],
)  # fmt: skip
def test_a_pretrained_encoder_loses_less_whatever_the_padding(
    step: dict[str, Any], quantize: dict[str, Any], share: float
) -> None:
    """MiniLM normalises behind each sublayer, so the division is a multiplication; padding widens the range at run time."""
    calibration = {"text": EXAMPLES / "calibration-sentences.txt", "unit": "line", "samples": 64, "length": 64}
    lines = (EXAMPLES / "sentences.txt").read_text().splitlines()[:32]
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_path())
    batch = dict(tokenizer(lines, padding="max_length", max_length=64, truncation=True, return_tensors="pt"))

    def embeddings(steps: list[dict[str, Any]]) -> Tensor:
        compiled = surgeon.compile(
            minilm_path(), steps, calibration={**calibration, "pad": "length", "batch": 32}, backend=None, progress=False
        )
        with torch.no_grad():
            hidden = compiled(**batch)["last_hidden_state"]
        mask = batch["attention_mask"][..., None]
        return (hidden * mask).sum(1) / mask.sum(1)

    want = embeddings([])
    lost = [
        float(1 - torch.nn.functional.cosine_similarity(embeddings(steps), want).mean())
        for steps in ([quantize], [step, quantize])
    ]
    assert lost[1] < share * lost[0]


def test_ranges_count_padding_and_nothing_else_does(patient: MakePatient) -> None:
    subject = patient("bert")
    site = next(site for site in subject.structure.linears if site.name == "blocks.0.ffn.up")
    batch = dict(subject.data.calibration[0])
    mask = torch.ones_like(batch["input_ids"])
    mask[:, -2:] = 0
    batch["attention_mask"] = mask
    seen = Extremes(site.part.input)
    observe(subject.graph, [batch], {"x": seen})
    assert seen.tokens == int(mask.sum())
    every = Sample(site.part.input, limit=1 << 20)
    observe(subject.graph, [batch], {"x": every})
    assert bool((seen.peak >= every.values()[0].abs().amax(0)).all())
    other = Extremes(site.part.input)
    other.merge(seen)
    assert torch.equal(other.low, seen.low)
    assert torch.equal(other.high, seen.high)
    assert other.tokens == seen.tokens


def test_bfloat16_weights_lose_no_digit(patient: MakePatient) -> None:
    from tests.models import tiny

    module, inputs = tiny("llama")
    compiled = surgeon.compile(
        module.bfloat16(), [{"smooth": {"alpha": 0.5}}], inputs=inputs, calibration=[inputs], backend=None, progress=False
    )
    assert compiled.report.passes[0].divergence["exact_error"] < 1e-2
    source = surgeon.trace(module, inputs)
    name = "model.layers.0.mlp.down_proj.weight"
    ratio = compiled.graph.tensor(name).detach().double() / source.tensor(name).detach().double()
    powers = ratio[0].log2()
    assert torch.equal(powers, powers.round())
    assert torch.equal(ratio, ratio[:1].expand_as(ratio))
    assert bool((powers != 0).any())


class Offset(nn.Module):
    """A norm whose weight is stored less one, read by two linears, and a linear in front of another one."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(16) * 0.1)
        self.first, self.second = nn.Linear(16, 24), nn.Linear(16, 24)
        self.thin, self.wide = nn.Linear(24, 8, bias=False), nn.Linear(8, 16)

    def forward(self, x: Tensor) -> Tensor:
        h = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + self.scale)
        hidden: Tensor = torch.nn.functional.silu(self.first(h)) * self.second(h)
        return x + self.wide(self.thin(hidden))


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Offset() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def halfway(network: type[nn.Module]) -> tuple[Any, dict[str, Tensor], surgeon.Compiled]:
    """A module of this class, its inputs, and it with half of their ranges in its weights."""
    torch.manual_seed(0)
    module = network().eval()
    inputs = {"x": torch.randn(2, 5, 16) * torch.linspace(0.1, 4, 16)}
    compiled = surgeon.compile(
        module, [{"smooth": {"alpha": 0.5}}], inputs=inputs, calibration=[inputs], backend=None, progress=False
    )
    return module, inputs, compiled


def test_weights_that_the_graph_adds_a_number_to_and_chains_of_linears_are_divided() -> None:
    module, inputs, compiled = halfway(Stack)
    plan = SmoothPlan.model_validate(compiled.report.passes[0].plan)
    assert len(plan.decisions) == 9
    assert all(decision.folded for decision in plan.decisions)
    want = module(**inputs)
    got = next(iter(compiled(**inputs).values()))
    assert relative_error(got.detach(), want.detach()) < 1e-6
    assert not torch.equal(compiled.graph.tensor("layers.0.scale"), module.layers[0].scale)


def test_offsets_of_16_bits_are_not_divided() -> None:
    """(1 + w) / s - 1 would need digits of w that 16 bits do not have."""
    torch.manual_seed(0)
    module = Stack().eval().bfloat16()
    inputs = {"x": (torch.randn(2, 5, 16) * torch.logspace(-2, 2, 16)).bfloat16()}
    compiled = surgeon.compile(
        module, [{"smooth": {"alpha": 0.95}}], inputs=inputs, calibration=[inputs], backend=None, progress=False
    )
    (report,) = compiled.report.passes
    folded = {decision["site"]: decision["folded"] for decision in report.plan["decisions"]}
    assert [site for site, made in folded.items() if not made] == [f"blocks.{block}.ffn.gate" for block in range(3)]
    assert report.divergence["exact_error"] == 0


@pytest.mark.parametrize("alpha", [0.5, "search"])
def test_numbers_that_are_none_are_refused_with_their_site(alpha: float | str) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 16)

    def smoothed(module: nn.Module, batches: list[dict[str, Tensor]]) -> None:
        surgeon.compile(
            module, [{"smooth": {"alpha": alpha}}], inputs={"x": x}, calibration=batches, backend=None, progress=False
        )

    for bad in (float("nan"), float("inf")):
        holed = x.clone()
        holed[1, 2] = bad
        with pytest.raises(PlanError, match="blocks.0.ffn.gate, blocks.0.ffn.up: on calibration data 16 of 16 features"):
            smoothed(Stack().eval(), [{"x": holed}, {"x": x}, {"x": x}])
    module = Stack().eval()
    with torch.no_grad():
        module.layers[1].second.weight[3, 4] = float("nan")
    with pytest.raises(PlanError, match="blocks.1.ffn.up: weight: 1 of 384 entries are NaN or infinite"):
        smoothed(module, [{"x": x}, {"x": x}])


def test_shared_weights_and_edited_plans(patient: MakePatient) -> None:
    subject = patient("mixtral")
    smoothed = subject.operate({"smooth": {"alpha": 0.5}})
    again = subject.operate({"smooth": {"alpha": 0.5}}, SmoothPlan.model_validate_json(smoothed.plan.model_dump_json()))
    assert again.graph.fingerprint(weights=True) == smoothed.graph.fingerprint(weights=True)
    decision = smoothed.plan.decisions[0]
    for change, message in (
        ({"readers": ("blocks.9.ffn.up",), "site": "blocks.9.ffn.up"}, "which this model does not have"),
        ({"readers": (*decision.readers, "blocks.0.attention.o")}, "do not read the same value"),
        ({"site": "blocks.0.nothing"}, "readers do not name it"),
    ):
        plan = smoothed.plan.model_copy(update={"decisions": (decision.model_copy(update=change),)})
        with pytest.raises(PlanError, match=message):
            subject.operate({"smooth": {"alpha": 0.5}}, plan)
    o = next(each for each in smoothed.plan.decisions if each.site == "blocks.0.attention.o")
    plan = smoothed.plan.model_copy(update={"decisions": (o.model_copy(update={"folded": True}),)})
    with pytest.raises(PlanError, match="folded: true"):
        subject.operate({"smooth": {"alpha": 0.5}}, plan)
    quantized = subject.operate({"quantize": {"scheme": "int8"}})
    with pytest.raises(PlanError, match="put smooth before quantize"):
        quantized.operate({"smooth": {}})


class Squared(nn.Module):
    """A network whose activation is relu(x) relu(x), and whose input is a norm's added to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        active = torch.relu(self.up(h + h))
        down: Tensor = self.down(active * active)
        return x + down


def test_what_enters_an_operation_twice_is_not_divided_twice() -> None:
    _, _, compiled = halfway(Squared)
    assert [decision["folded"] for decision in compiled.report.passes[0].plan["decisions"]] == [False, False]
    assert compiled.report.passes[0].divergence["exact_error"] < 1e-6
