"""Bits that are chosen for each weight: what errors are, that the choice is the best there is, and what it is worth."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from surgeon.bit_budget import share_out
from surgeon.contract import Observer
from surgeon.data import Data
from surgeon.errors import PlanError, RecipeError
from surgeon.gradients import observe_gradients
from surgeon.numerics import quantize_groupwise
from surgeon.observe import observe
from surgeon.passes.quantize import QuantizePlan
from surgeon.registry import make_backend, make_pass
from surgeon.samples import GradientSample, Sample
from surgeon.sensitivity import Squares
from tests.conftest import Patient, Trained

MakePatient = Callable[[str], Patient]


def mixed(bits: float, **fields: Any) -> dict[str, Any]:
    return {"quantize": {"scheme": "mixed", "bits": bits, "group": 16, **fields}}


def with_bits(plan: QuantizePlan, bits: list[int]) -> QuantizePlan:
    decisions = zip(plan.decisions, bits, strict=True)
    return plan.model_copy(update={"decisions": tuple(each.model_copy(update={"bits": n}) for each, n in decisions)})


def average(plan: QuantizePlan) -> float:
    """Bits per stored code."""
    return sum((d.codes or 0) * d.bits for d in plan.decisions) / sum(d.codes or 0 for d in plan.decisions)


# -- exact --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "fields"),
    [("gpt2", {}), ("gpt2", {"embeddings": True}), ("mixtral", {"algorithm": "gptq", "symmetric": False})],
)
def test_the_ends_of_the_range_are_the_plain_schemes(model: str, fields: dict[str, Any], patient: MakePatient) -> None:
    subject = patient(model)
    for bits in (2, 8):
        plain = subject.operate({"quantize": {"scheme": f"int{bits}", "group": 16, **fields}})
        chosen = subject.checked(mixed(bits, **fields))
        assert {d.site: d.bits for d in chosen.plan.decisions} == {d.site: d.bits for d in plain.plan.decisions}
        assert chosen.graph.fingerprint(weights=True) == plain.graph.fingerprint(weights=True)


def test_no_other_bits_of_as_many_bytes_cost_less(patient: MakePatient) -> None:
    """All 3^8 ways to give the linears of one block and one more their bits, by the errors that the plan states."""
    subject = patient("llama")
    names = ["blocks.1.*", "blocks.0.ffn.down"]
    for bits in (2.5, 3, 4, 6.1):
        found = subject.operate(mixed(bits, names=names)).plan.decisions
        assert len(found) == 8
        codes = [d.codes for d in found]
        assert all(d.errors[2] > d.errors[4] > d.errors[8] > 0 for d in found)

        def spent(each: tuple[int, ...], codes: list[int] = codes) -> int:
            return sum(n * code for n, code in zip(each, codes, strict=True))

        def cost(each: tuple[int, ...], found: Any = found) -> float:
            return sum(d.errors[n] for n, d in zip(each, found, strict=True))

        budget = bits * sum(codes)
        ways = [each for each in itertools.product((2, 4, 8), repeat=8) if spent(each) <= budget]
        chosen = tuple(d.bits for d in found)
        assert spent(chosen) <= budget
        assert cost(chosen) == pytest.approx(min(map(cost, ways)), rel=1e-3)
        assert len(set(chosen)) > 1


def test_bytes_are_those_that_the_average_allows(patient: MakePatient) -> None:
    for model, fields in (("mixtral", {}), ("llama", {"symmetric": False, "group": 32}), ("gpt2", {"embeddings": True})):
        subject = patient(model)
        four = subject.operate({"quantize": {"scheme": "int4", **({"group": 16} | fields)}}).graph.nbytes()
        for bits in (2.5, 3.5, 6):
            chosen = subject.operate(mixed(bits, **fields))
            codes = sum(d.codes for d in chosen.plan.decisions)
            assert chosen.graph.nbytes() - four == round(codes * (average(chosen.plan) - 4)) / 8
            assert bits - 1.5 < average(chosen.plan) <= bits
            assert f"{average(chosen.plan):.2f} bits on average" in make_pass(mixed(bits, **fields)).summary(chosen.plan)


def test_errors_of_linears_are_what_their_sums_of_squares_say(patient: MakePatient) -> None:
    """GPT-2 stores its weights [in, out]; its loss is differentiated by hand here."""
    subject = patient("gpt2")
    site = next(site for site in subject.structure.linears if site.name == "blocks.1.ffn.down")
    seen = GradientSample(site.part.input, site.part.node, limit=1 << 20)
    observe_gradients(subject.graph, subject.data.calibration, {"": seen})
    x, y, gradient = (rows.double() for rows in seen.values())
    weight = subject.graph.tensor(site.part.weight).detach().T
    for metric in ("model", "site"):
        (decision,) = subject.operate(mixed(3, names=site.name, metric=metric)).plan.decisions
        for bits in (2, 4, 8):
            lost = (weight - quantize_groupwise(weight, bits=bits, group=16, symmetric=True).dequantize()).double().square()
            if metric == "model":
                want = float(gradient.square().mean(0) @ lost @ x.square().mean(0)) / 2
            else:
                want = float((lost @ x.square().sum(0)).sum() / y.square().sum())
            assert decision.errors[bits] == pytest.approx(want, rel=1e-3)


def test_errors_of_mixtures_are_those_of_their_outputs(patient: MakePatient) -> None:
    subject = patient("mixtral")
    (moe,) = (site for site in subject.structure.moes() if site.name == "blocks.0.moe")
    (decision,) = subject.operate(mixed(3, names=moe.name, metric="site")).plan.decisions

    def outputs(graph: Any, node: Any) -> torch.Tensor:
        observe(graph, subject.data.calibration, {"": (sample := Sample(node, limit=1 << 20))})
        return sample.values()[0].double()

    before = outputs(subject.graph, moe.part.node)
    for bits in (2, 4, 8):
        rounded = subject.operate({"quantize": {"scheme": f"int{bits}", "group": 16, "names": moe.name}})
        (other,) = (site for site in rounded.structure.moes() if site.name == moe.name)
        lost = (outputs(rounded.graph, other.part.node) - before).square().sum()
        assert decision.errors[bits] == pytest.approx(float(lost / before.square().sum()), rel=1e-3)


def test_tied_weights_count_for_all_that_read_them(patient: MakePatient) -> None:
    """GPT-2's table is its head too, which costs it far more than the look-up alone."""
    subject = patient("gpt2")
    table = next(site for site in subject.structure.embeddings if site.part.rows > 128)
    both = subject.operate(mixed(3, embeddings=True)).plan.decisions
    alone = subject.operate(mixed(3, embeddings=True, names=table.name)).plan.decisions
    (mine,), (other,) = ([d for d in each if d.site == table.name] for each in (both, alone))
    assert "head" not in {d.site for d in both}
    assert mine.codes == other.codes == table.part.rows * table.part.width
    head = subject.operate(mixed(3, names=["head", table.name], embeddings=True)).plan.decisions[0]
    assert head.errors == pytest.approx(mine.errors, rel=1e-3)
    assert mine.errors[2] > 1.5 * other.errors[2] > 0


def test_what_data_say_nothing_of_has_the_most_bits_below_the_average(patient: MakePatient) -> None:
    subject = patient("llama")
    sites = {site.name: site.part for site in subject.structure.linears if site.name.startswith("blocks.0.attention")}
    statistics: dict[str, Observer] = {name: Squares(part.input, part.node) for name, part in sites.items()}
    unseen, *others = statistics
    observe(subject.graph, subject.data.calibration, {name: statistics[name] for name in others})

    def rounded(weight: torch.Tensor, bits: int) -> Any:
        return quantize_groupwise(weight, bits=bits, group=16, symmetric=True)

    for bits, own in ((2.5, 2), (5, 4), (8, 8)):
        shares, notes = share_out(
            subject.graph, sites, statistics, rounded, choices=(2, 4, 8), average=bits, metric="site"
        )
        assert shares[unseen].bits == own
        assert shares[unseen].errors is None
        assert notes == [f"{unseen}: calibration data say nothing of it; {own} bits"]
        assert all(shares[name].errors is not None for name in others)
    broken = statistics[others[0]]
    assert isinstance(broken, Squares)
    broken.energy = float("nan")
    broken.inputs = torch.full((64,), float("nan"), dtype=torch.float64)
    with pytest.raises(PlanError, match=rf"{others[0]}: in 2 bits it would cost nan.*calibration data"):
        share_out(subject.graph, sites, statistics, rounded, choices=(2, 4), average=3, metric="site")


# -- plans --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["nearest", "gptq"])
def test_plans_are_repeated_and_edited_as_any_other(patient: MakePatient, algorithm: str) -> None:
    subject = patient("mixtral")
    step = mixed(3, algorithm=algorithm)
    first = subject.checked(step)
    plan = QuantizePlan.model_validate_json(first.plan.model_dump_json())
    assert plan == first.plan
    again = subject.operate(step, plan)
    assert again.graph.fingerprint(weights=True) == first.graph.fingerprint(weights=True)
    edited = with_bits(plan, [8] * len(plan.decisions))
    whole = subject.operate({"quantize": {"scheme": "int8", "group": 16, "algorithm": algorithm}})
    assert subject.operate(step, edited).graph.fingerprint(weights=True) == whole.graph.fingerprint(weights=True)
    assert make_pass(step).summary(edited).startswith(f"{len(plan.decisions)} weights in int8: 8.00 bits on average")


def test_other_models_go_by_what_their_outputs_move_by(patient: MakePatient) -> None:
    """Half of the share of their energy, in the mean over signs: what small errors in BERT's last block do to both outputs."""
    subject = patient("bert")
    for name in ("blocks.2.ffn.up", "blocks.2.ffn.down"):
        (decision,) = subject.operate(mixed(3, names=name)).plan.decisions
        rounded = subject.operate({"quantize": {"scheme": "int8", "group": 16, "names": name}})
        share = 0.0
        for batch in subject.data.calibration:
            with torch.no_grad():
                before, after = (graph(**batch) for graph in (subject.graph, rounded.graph))
            assert bool(batch["attention_mask"].all())
            for key, value in before.items():
                lost = float((after[key] - value).square().sum() / value.square().sum())
                share += lost * value.shape[:-1].numel()
        tokens = sum(batch["input_ids"].numel() for batch in subject.data.calibration)
        assert 0.6 < decision.errors[8] / (share / 2 / tokens) < 1.7


def test_refusals(patient: MakePatient) -> None:
    for fields, message in (
        ({"bits": 1.5}, r"bits: 1.5 is out of reach: from 2 to 8 bits.*\[2, 4, 8\]"),
        ({"bits": 6, "of": [4, 2]}, r"bits: 6 is out of reach: from 2 to 4 bits"),
        ({}, "scheme mixed needs bits: from 2 to 8"),
        ({"bits": 4, "of": [4]}, "at least 2 items"),
        ({"bits": 4, "of": [4, 4]}, "names one number of bits twice"),
        ({"bits": 4, "of": [3, 4]}, "2, 4 or 8"),
        ({"bits": 3, "damp": 0.1}, "damp is for algorithm gptq"),
        ({"scheme": "int4", "bits": 4}, "bits is for scheme mixed; scheme is int4"),
        ({"scheme": "int4", "metric": "site"}, "metric is for scheme mixed"),
    ):
        with pytest.raises(RecipeError, match=message):
            make_pass({"quantize": {"scheme": "mixed", **fields}})
    subject = patient("llama")
    without = Patient(subject.graph, subject.structure, Data(held_back=subject.data.held_back))
    with pytest.raises(RecipeError, match="calibration"):
        without.operate(mixed(3))
    packed = subject.operate({"quantize": {"scheme": "int8"}})
    with pytest.raises(PlanError, match="quantized already"):
        packed.operate(mixed(3))


# -- on trained models --------------------------------------------------------------------------------------------


def by_blocks(plan: QuantizePlan, first: int, blocks: int) -> QuantizePlan:
    """4 bits in as many blocks from the first on (or, below 0, in the last ones), 2 bits in the others."""
    chosen = range(blocks)[:first] if first > 0 else range(blocks)[first:]
    return with_bits(plan, [4 if int(d.site.split(".")[1]) in chosen else 2 for d in plan.decisions])


def by_lot(plan: QuantizePlan, bits: float, seed: int) -> QuantizePlan:
    """The first of a row of random plans whose average is the one asked for, to 2 %."""
    generator = random.Random(seed)
    while True:
        found = with_bits(plan, [generator.choice((2, 2, 2, 4, 4, 8)) for _ in plan.decisions])
        if abs(average(found) / bits - 1) < 0.02:
            return found


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_mixtral"])
def test_three_bits_lose_less_than_in_any_other_order(name: str, request: pytest.FixtureRequest) -> None:
    subject: Trained = request.getfixturevalue(name)
    assert subject.held_out is not None
    step = mixed(3, group=32, blocks=":")
    chosen = subject.operate(step)
    blocks = len(subject.structure.blocks)
    assert average(chosen.plan) <= 3

    def loss(each: dict[str, Any], plan: QuantizePlan | None = None) -> float:
        return subject.operate(each, plan).loss(subject.held_out)  # type: ignore[arg-type]  # None: refused above

    mine = chosen.loss(subject.held_out)
    four, two = (loss({"quantize": {"scheme": scheme, "blocks": ":"}}) for scheme in ("int4", "int2"))
    assert four < mine < two
    whole = subject.loss(subject.held_out)
    others = [by_blocks(chosen.plan, sign * blocks // 2, blocks) for sign in (1, -1)]
    others.append(by_lot(chosen.plan, 3, 0))
    for plan in others:
        assert average(plan) >= average(chosen.plan) * 0.98
        assert mine - whole < 0.9 * (loss(step, plan) - whole)


def test_errors_say_about_what_the_loss_rises_by(tiny_llama: Trained) -> None:
    """Divergence from the model itself, to second order; the estimate holds where steps are small."""
    assert tiny_llama.held_out is not None
    rounded = tiny_llama.operate(mixed(4, group=32, blocks=":", of=[2, 4]))
    estimated = sum(d.errors[4] for d in rounded.plan.decisions)
    with torch.no_grad():
        before, after = (graph(**tiny_llama.held_out)["logits"].log_softmax(-1) for graph in (tiny_llama.graph, rounded.graph))
    divergence = float((before.exp() * (before - after)).sum(-1).mean())
    assert 0.6 < estimated / divergence < 1.7


def test_an_artefact_has_the_bytes_of_the_average_and_others_refuse_two_bits(patient: MakePatient, tmp_path: Path) -> None:
    subject = patient("llama").operate({"drop_blocks": {"count": 2}})
    chosen, four = subject.operate(mixed(3, group=32)), subject.operate({"quantize": {"scheme": "int4"}})
    engine, sizes = make_backend("onnxruntime"), []
    for name, graph in (("mixed", chosen.graph), ("int4", four.graph)):
        (tmp_path / name).mkdir()
        artifact = engine.lower(graph, tmp_path / name)
        sizes.append(artifact.nbytes)
        (batch,) = subject.data.held_back
        with torch.no_grad():
            want = graph(**batch)["logits"]
        assert float((artifact.run(batch)["logits"] - want).norm() / want.norm()) < 0.02  # inputs are rounded to 8 bits there
    less = sum(d.codes * (4 - d.bits) for d in chosen.plan.decisions) / 8
    assert less > 5_000
    assert sizes[1] - sizes[0] == pytest.approx(less, rel=0.05)
    assert any("2 bits" in refusal.reason for refusal in make_backend("tensorrt").refuses(chosen.graph))
