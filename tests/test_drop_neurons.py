"""``drop_neurons``: what depends on others goes without loss, choices and refits are their formulas, and beat chance."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from pydantic import ValidationError
from torch import Tensor

import surgeon
from surgeon.accounting import parameter_count
from surgeon.backends.huggingface import HuggingFace
from surgeon.backends.onnxruntime import OnnxRuntime
from surgeon.data import load_data, synthetic_batches
from surgeon.discovery import discover
from surgeon.errors import PlanError
from surgeon.mixtures import bias, rows
from surgeon.numerics import (
    NumericsError,
    eliminate,
    eliminate_unfitted,
    leverage_scores,
    lost_energy,
    pruning,
    refitted_outputs,
)
from surgeon.passes.drop_neurons import DropNeurons, DropNeuronsPlan, KeepNeurons, networks
from surgeon.registry import make_pass
from surgeon.rewrite import Editor
from surgeon.structure import FFN, MoE, Site
from surgeon.tracing import trace
from surgeon.verify import relative_error
from tests import families, families_moe
from tests.conftest import Patient, Trained
from tests.models import inputs_for, tiny
from tests.test_passes import error

MakePatient = Callable[[str], Patient]


def drop(subject: Patient, plan: Any = None, **fields: Any) -> Patient:
    return subject.checked({"drop_neurons": fields}, plan)


def widths(subject: Patient) -> list[int]:
    return [site.part.width for site in networks(subject.structure)]


# -- numerics ---------------------------------------------------------------------------------------------------------


def sample(tokens: int, width: int, outputs: int = 5, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Activations [T, I] of unequal size that depend on each other somewhat, their moment [1, I, I], columns [1, G, I]."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator, dtype=torch.float64)
    h = torch.randn(tokens, width, generator=generator, dtype=torch.float64).exp() @ mix
    return h, (h.T @ h)[None], torch.randn(1, outputs, width, generator=generator, dtype=torch.float64)


def test_the_refit_is_least_squares() -> None:
    """Of all rows stacked on the penalty's, by NumPy."""
    h, moment, down = sample(40, 12)
    keep = torch.tensor([[0, 2, 3, 7, 8, 11]])
    found = refitted_outputs(moment, down, keep, torch.tensor([40.0]))[0].numpy()
    penalty = np.sqrt(6 * float(h.square().mean()))  # I / 2 tokens of mean energy
    kept, w = h.numpy()[:, keep[0]], down[0].numpy()
    gone = np.delete(np.arange(12), keep[0])
    matrix = np.vstack([kept, penalty * np.eye(6)])
    target = np.vstack([h.numpy()[:, gone] @ w[:, gone].T, np.zeros((6, 5))])
    change = np.linalg.lstsq(matrix, target, rcond=None)[0].T
    np.testing.assert_allclose(found, w[:, keep[0]] + change, rtol=1e-9)
    lost, whole = lost_energy(moment, down, keep, torch.from_numpy(found)[None])
    np.testing.assert_allclose(whole, np.square(h.numpy() @ w.T).sum(), rtol=1e-9)
    np.testing.assert_allclose(lost, np.square(h.numpy() @ w.T - kept @ found.T).sum(), rtol=1e-9)


def greedy(h: np.ndarray, w: np.ndarray, count: int) -> list[int]:
    """The neurons that stay where each time the one goes without which least squares do best."""
    kept = list(range(h.shape[1]))
    target = h @ w.T

    def loss(columns: list[int]) -> float:
        solution = np.linalg.lstsq(h[:, columns], target, rcond=None)[0]
        return float(np.square(target - h[:, columns] @ solution).sum())

    for _ in range(count):
        kept.remove(min(kept, key=lambda i: loss([j for j in kept if j != i])))
    return kept


@pytest.mark.parametrize(("block", "candidates"), [(64, 256), (3, 256), (4, 9)])
def test_elimination_is_greedy(monkeypatch: pytest.MonkeyPatch, block: int, candidates: int) -> None:
    monkeypatch.setattr(pruning, "_BLOCK", block)
    monkeypatch.setattr(pruning, "_CANDIDATES", candidates)
    for seed in range(4):
        h, moment, down = sample(80, 20, seed=seed)
        found = eliminate(moment, down, 9, torch.tensor([80.0]))
        wanted = torch.tensor([greedy(h.numpy(), down[0].numpy(), 9)])
        if candidates > 20:
            assert torch.equal(found, wanted)
        else:  # who was not near at the beginning of a block is overlooked
            losses = [float(_free_loss(h, down[0], keep[0])) for keep in (found, wanted)]
            assert losses[0] < 1.3 * losses[1]


def _free_loss(h: Tensor, w: Tensor, keep: Tensor) -> Tensor:
    target = h @ w.T
    return (target - h[:, keep] @ torch.linalg.lstsq(h[:, keep], target).solution).square().sum()


def test_networks_side_by_side_are_those_alone() -> None:
    samples = [sample(60 + seed, 14, seed=seed) for seed in range(3)]
    moment, down = (torch.cat([s[part] for s in samples]) for part in (1, 2))
    tokens = torch.tensor([60.0, 61.0, 20.0])
    found = eliminate(moment, down, 6, tokens)
    outputs = refitted_outputs(moment, down, found, tokens)
    for number in range(3):
        one = (moment[number : number + 1], down[number : number + 1])
        alone = eliminate(*one, 6, tokens[number : number + 1])
        assert torch.equal(alone[0], found[number])
        assert torch.allclose(refitted_outputs(*one, alone, tokens[number : number + 1])[0], outputs[number], rtol=1e-9)


def test_unfitted_elimination_is_greedy() -> None:
    h, moment, down = sample(50, 11)

    def loss(gone: tuple[int, ...]) -> float:
        return float((h[:, list(gone)] @ down[0][:, list(gone)].T).square().sum())

    gone: list[int] = []
    for _ in range(4):
        gone.append(min((i for i in range(11) if i not in gone), key=lambda i: loss((*gone, i))))
    assert eliminate_unfitted(moment, down, 4)[0].tolist() == [i for i in range(11) if i not in gone]


def test_leverage_is_the_share_that_the_others_do_not_explain() -> None:
    h, moment, _ = sample(40, 6)
    found = leverage_scores(moment, torch.tensor([40.0]))[0]
    penalty = 3 * float(h.square().mean())
    wanted = np.diag(moment[0].numpy() @ np.linalg.inv(moment[0].numpy() + penalty * np.eye(6)))
    np.testing.assert_allclose(found, wanted, rtol=1e-9)


def test_of_neurons_that_stand_in_for_each_other_one_stays() -> None:
    """Copies, sums of others, and silent ones: half of all neurons, and nothing is lost."""
    h, _, down = sample(200, 6)
    h = torch.cat([h, h[:, :3] * 2, h[:, 3:4] + h[:, 4:5], h[:, 5:] * 0, h[:, 1:2]], 1)
    down = torch.cat([down, down.flip(2)], 2)
    moment, tokens = (h.T @ h)[None], torch.tensor([200.0])
    keep = eliminate(moment, down, 6, tokens)
    assert torch.linalg.matrix_rank(h[:, keep[0]]) == 6
    lost, whole = lost_energy(moment, down, keep, refitted_outputs(moment, down, keep, tokens))
    assert lost < 1e-12 * whole


@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_few_tokens_change_little(tokens: int) -> None:
    """No token: the columns stay as they were, and the smallest go; few tokens: no number is lost, and columns stay near."""
    h, _, down = sample(10, 8)
    h = h[:tokens]
    moment, seen = (h.T @ h)[None], torch.tensor([float(tokens)])
    keep = eliminate(moment, down, 4, seen)
    outputs = refitted_outputs(moment, down, keep, seen)
    kept = down.gather(2, keep[:, None].expand(-1, 5, -1))
    assert outputs.isfinite().all()
    if tokens == 0:
        assert torch.equal(outputs, kept)
        assert keep[0].tolist() == down[0].norm(dim=0).topk(4).indices.sort().values.tolist()
    else:
        free = torch.linalg.lstsq(h[:, keep[0]], h @ down[0].T, driver="gelsd").solution.T
        assert (outputs[0] - kept[0]).norm() < (free - kept[0]).norm()


def test_numbers_that_do_not_fit_are_refused() -> None:
    _, moment, down = sample(20, 6)
    with pytest.raises(NumericsError, match=r"moment \[1, 6, 6\], down \[1, 5, 5\]"):
        eliminate(moment, down[:, :, 1:], 1, torch.ones(1))
    with pytest.raises(NumericsError, match="6 of 6 neurons are to go; at least one must stay"):
        eliminate(moment, down, 6, torch.ones(1))
    with pytest.raises(NumericsError, match="6 of 6 neurons"):
        eliminate_unfitted(moment, down, 6)
    moment[0, 0, 0] = torch.nan
    with pytest.raises(NumericsError, match="moment: 1 of 36 entries are NaN"):
        leverage_scores(moment, torch.ones(1))


# -- exact ------------------------------------------------------------------------------------------------------------


@cache
def subject_of(name: str) -> Patient:
    """Tiny models, families by name, and hand-written FFNs, with more calibration tokens than twice their neurons."""
    if name in families_moe.FAMILIES or name in families_moe.WRITTEN:
        graph = families_moe.traced(name)[1]
    else:
        graph = trace(*(families.FAMILIES[name].build() if name in families.FAMILIES else tiny(name)))
    generator, batches = torch.Generator().manual_seed(0), []
    for _ in range(3):
        batch = {}
        for port in graph.inputs:
            example = graph.example[port.name]
            sizes = [size if isinstance(size, int) else 16 if axis == 0 else 31 for axis, size in enumerate(port.shape)]
            if example.is_floating_point():
                batch[port.name] = torch.randn(sizes, generator=generator)
            elif int(example.max()) < 2:  # a mask
                batch[port.name] = torch.ones(sizes, dtype=example.dtype)
            else:
                batch[port.name] = torch.randint(0, int(example.max()) + 1, sizes, generator=generator)
        batches.append(batch)
    return Patient(graph, discover(graph), load_data(batches, graph))


def tensors(graph: surgeon.Graph, site: Site[FFN] | Site[MoE]) -> Iterator[tuple[Tensor, Tensor]]:
    """Of every network of a site what is in front of each neuron, [I, F], and its output column, [I, G], to write into."""
    part = site.part
    if isinstance(part, MoE):
        w_in, w_out = graph.tensor(part.w_in).detach(), graph.tensor(part.w_out).detach()
        for expert in range(part.experts):
            for first in w_in[expert].chunk(2 if part.gated else 1):
                yield first, w_out[expert].T
            if part.b_in is not None:
                for offset in graph.tensor(part.b_in).detach()[expert].chunk(2 if part.gated else 1):
                    yield offset[:, None], w_out[expert].T
        return
    for linear in (part.gate, part.up):
        if linear is not None:
            yield _view(rows, graph, linear), rows(graph, part.down).T
            offset = bias(graph, linear)
            if offset is not None:
                yield _view(bias, graph, linear)[:, None], rows(graph, part.down).T


def _view(of: Callable[..., Any], graph: surgeon.Graph, linear: Any) -> Tensor:
    if linear.index is None:
        found: Tensor = of(graph, linear)
        return found
    step = linear.index[1] - linear.index[0]
    weight = graph.tensor(linear.weight if of is rows else linear.bias).detach()
    return (weight.T if linear.transposed and of is rows else weight)[linear.index[0] :: step]


def with_copies(subject: Patient, count: int) -> Patient:
    """Every network's last neurons become copies of its first ones, but for their output columns."""
    graph = subject.graph.clone()
    for name, tensor in list(graph.parameters().items()):
        editor = Editor(graph)
        editor.set_tensor(name, tensor.detach().clone())
        editor.settle()
    for site in networks(discover(graph)):
        for first, _ in tensors(graph, site):
            first[-count:] = first[:count]
    return Patient(graph, discover(graph), subject.data)


EXACT = ["llama", "gpt2", "bert", "vit", "mixtral", "phi3", "ffn: Alternating", "qwen2_moe", "gpt_oss", "dense_loop"]


@pytest.mark.parametrize("name", EXACT)
def test_copies_go_without_loss(name: str) -> None:
    """Gated and plain, with biases and without, stored either way, halves and in turns, experts and those beside them."""
    subject = narrowed = with_copies(subject_of(name), 4)
    before = widths(subject)
    for width in sorted(set(before)):
        names = [site.name for site in networks(subject.structure) if site.part.width == width]
        narrowed = drop(narrowed, keep=width - 4, names=names)
    assert widths(narrowed) == [width - 4 for width in before]
    assert error(narrowed, subject) < 2e-5


@pytest.mark.parametrize("name", EXACT)
def test_silent_neurons_go_without_loss(name: str) -> None:
    subject = with_copies(subject_of(name), 1)  # tensors of its own
    for site in networks(subject.structure):
        for _, columns in tensors(subject.graph, site):
            columns[1::3] = 0.0
    few = Patient(subject.graph, subject.structure, load_data(subject.data.calibration[:1] * 2, subject.graph))
    for data, fields in ((subject, {}), (few, {"criterion": "contribution", "refit": False}), (few, {"refit": False})):
        narrowed = drop(data, ratio=0.3, multiple=1, **fields)
        for decision in narrowed.plan.decisions:
            assert decision.loss == pytest.approx(0.0, abs=1e-9)
            gone = [set(range(decision.width)) - set(own) for own in decision.keep]
            assert all(number % 3 == 1 for own in gone for number in own)
        assert error(narrowed, subject) < 1e-5


# -- plans ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_nothing_to_remove_changes_nothing(patient: MakePatient, name: str) -> None:
    subject = patient(name)
    width = widths(subject)[0]
    for fields in ({"ratio": 0.0}, {"ratio": 0.001}, {"keep": width}, {"ratio": 0.5, "multiple": 2 * width}):
        result = drop(subject, **fields)
        assert result.graph.fingerprint(weights=True) == subject.graph.fingerprint(weights=True)
        assert result.plan.notes == tuple(f"{s.name}: all {width} neurons stay" for s in networks(subject.structure))
        assert make_pass({"drop_neurons": fields}).exact(result.plan)


def test_widths_are_multiples(patient: MakePatient) -> None:
    for ratio, multiple, wanted in ((0.25, 8, 88), (0.3, 8, 80), (0.3, 1, 79), (0.3, 32, 96), (0.01, 1, 111), (0.999, 1, 1)):
        result = drop(patient("llama"), ratio=ratio, multiple=multiple, criterion="random", refit=False, blocks=0)
        assert widths(result)[0] == wanted, (ratio, multiple)
    assert set(widths(drop(patient("llama"), keep=37))) == {37}  # as asked


def test_parameters_that_go_are_those_of_the_neurons(patient: MakePatient) -> None:
    for name, each in (("llama", 3 * 64), ("gpt2", 2 * 64 + 1), ("mixtral", 6 * 3 * 64), ("vit", 2 * 64 + 1)):
        subject = patient(name)
        gone = sum(widths(subject)) - 40 * len(widths(subject))
        assert parameter_count(subject.graph) - parameter_count(drop(subject, keep=40).graph) == gone * each


def test_fields_that_do_not_fit_are_refused() -> None:
    for fields in ({}, {"keep": 4, "ratio": 0.5}, {"ratio": 1.0}, {"ratio": -0.1}, {"keep": 0}, {"ratio": 0.5, "multiple": 0}):
        with pytest.raises(ValidationError):
            DropNeurons(**fields)


def test_plans_that_do_not_fit_are_refused(patient: MakePatient) -> None:
    for name, site, keep, message in (
        ("llama", "blocks.0.ffn", ((3, 2),), r"blocks\.0\.ffn: .* ascending neurons of 0 to 111, found 2 at place 1 of 2"),
        ("llama", "blocks.0.ffn", ((1, 112),), "ascending neurons of 0 to 111"),
        ("llama", "blocks.0.ffn", ((),), "equally many are needed in each of 1"),
        ("llama", "blocks.0.ffn", ((1,), (2,)), r"keeps \[1\] neurons in 2 networks"),
        ("mixtral", "blocks.0.moe", ((1,), (2,), (1,), (1,), (1,), (1, 2)), r"\[1, 2\] neurons in 6 networks; equally many"),
        ("mixtral", "blocks.0.moe", ((1,),) * 6, r"blocks\.0\.moe: the plan is for 112 neurons, it has 48"),
        ("mixtral", "blocks.0.ffn", ((1,),), "blocks.0.ffn, which is no feed-forward network or mixture"),
    ):
        plan = make_pass({"drop_neurons": {"keep": 1}}).plan_type(decisions=(KeepNeurons(site=site, keep=keep, width=112),))
        with pytest.raises(PlanError, match=message):
            drop(patient(name), plan, keep=1)
    with pytest.raises(PlanError, match=r"blocks\.0\.ffn: keep 113 asked, it has 112 neurons"):
        drop(patient("llama"), keep=113)


def test_later_networks_see_the_narrower_ones(patient: MakePatient) -> None:
    """What one run chooses and fits in block 1 is what a run on block 1 does after one on block 0."""
    subject = patient("bert")
    whole = drop(subject, keep=40)
    steps = drop(drop(drop(subject, keep=40, blocks=0), keep=40, blocks=1), keep=40, blocks=2)
    assert whole.graph.fingerprint(weights=True) == steps.graph.fingerprint(weights=True)
    assert drop(subject, keep=40, blocks=1).plan.decisions != whole.plan.decisions[1:2]


def test_networks_beside_the_experts_have_sites_of_their_own() -> None:
    subject = subject_of("qwen2_moe")
    sites = [(site.name, site.part.width) for site in networks(subject.structure)]
    assert sites == [(f"blocks.{i}.moe{part}", width) for i in range(2) for part, width in (("", 24), (".shared", 48))]
    assert widths(drop(subject, keep=16, names="*.shared")) == [24, 16] * 2
    assert widths(drop(subject, keep=16, names="*.moe")) == [16, 48] * 2


# -- what is left alone, and what is refused --------------------------------------------------------------------------


def test_a_model_whose_networks_all_share_weights_or_neurons_is_refused() -> None:
    for name, reason in (
        ("albert", "is read by other parts of the model too (layers that share their weights)"),
        ("ffn: Normed", "a normalisation over all neurons stands in front of down, so they cannot be told apart"),
        ("ffn: Snake", "its activation function was not recognised, so its neurons cannot be told apart"),
    ):
        subject = subject_of(name)
        others = len(list(networks(subject.structure))) - 1
        assert others > 0
        with pytest.raises(PlanError) as caught:
            drop(subject, ratio=0.5)
        head, first, left = str(caught.value).split("; ")[0], "blocks.0.ffn: left alone: ", f"{reason} (and {others} more)"
        assert head == "no network can be made narrower"
        assert first in str(caught.value)
        assert str(caught.value).endswith(left)
        plan = DropNeuronsPlan(decisions=(KeepNeurons(site="blocks.0.ffn", keep=((0, 1),), width=2),))
        with pytest.raises(PlanError, match=r"blocks\.0\.ffn: the plan drops neurons here, but"):
            drop(subject, plan, ratio=0.5)


def test_weights_that_are_no_longer_matrices_are_refused(patient: MakePatient) -> None:
    for name, site in (("llama", "ffn"), ("mixtral", "moe")):
        packed = patient(name).operate({"quantize": {"scheme": "int8"}})
        with pytest.raises(PlanError, match=rf"blocks\.0\.{site}: .*quantized already; put drop_neurons before quantize"):
            drop(packed, ratio=0.5)
    factored = patient("llama").operate({"low_rank": {"rank": 8, "method": "svd", "names": "*.ffn.up"}})
    with pytest.raises(PlanError, match=r"blocks\.0\.ffn: .*factored already; put drop_neurons before low_rank"):
        drop(factored, ratio=0.5)


def test_data_that_never_reach_a_network_are_refused(patient: MakePatient) -> None:
    subject = patient("bert")
    batches = [{**batch, "attention_mask": batch["attention_mask"] * 0} for batch in subject.data.calibration]
    with pytest.raises(PlanError, match=r"blocks\.0\.ffn: calibration data never reached it"):
        drop(Patient(subject.graph, subject.structure, load_data(batches * 2, subject.graph)), ratio=0.5)


def test_padding_is_not_seen(patient: MakePatient) -> None:
    subject = patient("mixtral")
    short = [inputs_for("llama", 1, 5, seed=seed) for seed in range(6)]
    padded = [
        {"input_ids": torch.nn.functional.pad(batch["input_ids"], (0, 3)),
         "attention_mask": torch.nn.functional.pad(batch["attention_mask"], (0, 3))}
        for batch in short
    ]  # fmt: skip
    both = [Patient(subject.graph, subject.structure, load_data(batches, subject.graph)) for batches in (short, padded)]
    for first, second in zip(*(drop(one, keep=24).plan.decisions for one in both), strict=True):
        assert first.keep == second.keep
        assert first.loss == pytest.approx(second.loss, rel=1e-4)


def test_experts_that_few_tokens_reach_keep_their_columns(patient: MakePatient) -> None:
    """One sequence of five tokens: most experts are reached by none or one."""
    subject = patient("mixtral")
    batches = [inputs_for("llama", 1, 5, seed=seed) for seed in range(2)]
    few = Patient(subject.graph, subject.structure, load_data(batches, subject.graph))
    result = drop(few, keep=16)
    chosen = few.graph  # nothing is NaN, and those that no token reached are slices
    untouched = 0
    for site, decision in zip(networks(subject.structure), result.plan.decisions, strict=True):
        assert isinstance(site.part, MoE)
        old, new = chosen.tensor(site.part.w_out), result.graph.tensor(site.part.w_out)
        assert new.isfinite().all()
        for expert, keep in enumerate(decision.keep):
            untouched += torch.equal(new[expert], old[expert][:, list(keep)])
    assert untouched
    assert all(value.isfinite().all() for value in result.graph(**batches[0]).values())


@torch.no_grad()
def test_a_graph_in_bfloat16_stays_one(patient: MakePatient) -> None:
    for name in ("llama", "mixtral"):
        module, inputs = tiny(name, layers=1)
        graph = trace(module.to(torch.bfloat16), inputs)
        subject = with_copies(Patient(graph, discover(graph), load_data([inputs] * 2, graph)), 8)
        half = drop(subject, keep=40)
        types = {key: tensor.dtype for key, tensor in half.graph.parameters().items()}
        assert types == {key: tensor.dtype for key, tensor in graph.parameters().items()}
        assert all(value.isfinite().all() for value in half.graph(**inputs).values())
        exact = drop(subject, keep=widths(subject)[0] - 8, criterion="contribution")
        assert relative_error(exact.graph(**inputs)["logits"], subject.graph(**inputs)["logits"]) < 0.2


# -- trained models ---------------------------------------------------------------------------------------------------

CRITERIA = ["reconstruction", "contribution", "leverage", "activation"]


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_mixtral", "tiny_upcycled"])
def test_choices_beat_chance_and_a_refit_beats_none(request: pytest.FixtureRequest, name: str) -> None:
    subject: Trained = request.getfixturevalue(name)
    assert subject.held_out is not None
    for ratio, criteria in ((0.25, CRITERIA[:1]), (0.5, CRITERIA if name == "tiny_llama" else CRITERIA[:1])):
        losses = {}
        for criterion, refit in itertools.product([*criteria, "random"], (True, False)):
            fields = {"ratio": ratio, "criterion": criterion, "refit": refit}
            losses[criterion, refit] = subject.operate({"drop_neurons": fields}).loss(subject.held_out)
        for criterion, refit in losses:
            assert losses[criterion, True] < losses[criterion, False], losses
            assert criterion == "random" or losses[criterion, refit] < losses["random", refit], losses
        assert losses["reconstruction", True] == min(losses.values())


# -- what it becomes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "field"),
    [("llama", "intermediate_size"), ("gpt2", "n_inner"), ("bert", "intermediate_size"), ("mixtral", "intermediate_size"),
     ("phi3", "intermediate_size"), ("qwen3_moe", "moe_intermediate_size")],
)  # fmt: skip
def test_the_checkpoint_has_a_smaller_width(tmp_path: Path, name: str, field: str) -> None:
    subject = subject_of(name)
    before = widths(subject)
    narrowed = drop(subject, keep=16)
    artifact = HuggingFace().lower(narrowed.graph, tmp_path)
    changes = artifact.details["configuration"]
    assert {key: change["after"] for key, change in changes.items()} == {field: 16}
    model = getattr(tf, artifact.details["loaded_by"]).from_pretrained(tmp_path, dtype="auto").eval()
    assert getattr(model.config, field) == 16 < before[0]
    batch = subject.data.calibration[0]
    with torch.no_grad():
        found, wanted = model(**batch), narrowed.graph(**batch)
    for key, value in wanted.items():
        assert relative_error(found[key], value) < 1e-5


def test_a_checkpoint_cannot_say_that_layers_differ(patient: MakePatient) -> None:
    for name, layer in (("llama", r"model\.layers\.1\.mlp\."), ("mixtral", r"model\.layers\.1\.mlp\.experts\.")):
        refusals = HuggingFace().refuses(drop(patient(name), keep=16, blocks=1).graph)
        assert refusals
        for refusal in refusals:
            assert re.match(layer, refusal.node), refusal
            assert "one number for all layers" in refusal.reason


QUANTIZED = {"quantize": {"scheme": "int4", "group": 16}}


@pytest.mark.parametrize(("name", "steps"), [("llama", []), ("mixtral", [QUANTIZED])])
def test_onnx_with_caches(tmp_path: Path, name: str, steps: list[dict[str, Any]]) -> None:
    """The build compares the artefact with the graph, caches included."""
    batches = [inputs_for("llama", 4, 12, seed=seed) for seed in range(3)]
    compiled = surgeon.compile(
        tiny(name, layers=1)[0], [{"drop_neurons": {"keep": 32}}, *steps], task="text-generation", calibration=batches,
        output=tmp_path / "build", progress=False,
    )  # fmt: skip
    assert compiled.artifact is not None
    assert len([port for port in compiled.artifact.inputs if port.role.startswith("past")]) == 2
    assert compiled.generate(batches[0]["input_ids"], max_new_tokens=4, eos_token_id=()).shape == (4, 16)


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt2", "phi3"])
def test_onnx(tmp_path: Path, name: str) -> None:
    graph = drop(subject_of(name), keep=16).graph
    artifact = OnnxRuntime().lower(graph, tmp_path)
    for batch in synthetic_batches(graph):
        for key, value in artifact.run(batch).items():
            assert relative_error(value, graph(**batch)[key]) < 1e-4
