"""``densify_moe``: identical experts lose nothing, each method is its formula, and fitted ones beat the plain mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from surgeon.activations import activation
from surgeon.data import load_data
from surgeon.discovery import discover
from surgeon.errors import PlanError
from surgeon.numerics import largest_neurons, learn_weights, sum_of_truncations
from surgeon.observe import observe
from surgeon.passes.densify_moe import DensifyMoE
from surgeon.registry import make_pass
from surgeon.rewrite import Editor
from surgeon.samples import Sample
from tests.conftest import Patient, Trained
from tests.test_passes import error

MakePatient = Callable[[str], Patient]


def densify(subject: Patient, plan: Any = None, **fields: Any) -> Patient:
    return subject.checked({"densify_moe": fields}, plan)


METHODS = [{"method": "mean"}, {"method": "sum"}, {"method": "learned", "steps": 5}, {"method": "mean", "weights": "uniform"}]


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "bert", "vit"])
def test_identical_experts_lose_nothing(patient: MakePatient, name: str) -> None:
    """An upcycled model made dense again is the model it was made from."""
    subject = patient(name)
    upcycled = subject.operate({"upcycle_ffn": {"experts": 4, "top_k": 2}})
    for fields in METHODS:
        dense = densify(upcycled, **fields)
        assert error(dense, subject) < 4e-6, fields
        assert make_pass({"densify_moe": fields}).exact(dense.plan)
        assert not list(dense.structure.moes())
        widths = {site.part.width for site in dense.structure.ffns()}
        width = next(iter(subject.structure.ffns())).part.width
        assert widths == {4 * width if fields["method"] == "sum" else width}


def test_identical_experts_in_another_order_lose_nothing_when_aligned(patient: MakePatient) -> None:
    upcycled = patient("llama").operate({"upcycle_ffn": {"experts": 4, "top_k": 2}})
    clone = upcycled.graph.clone()
    editor = Editor(clone)
    generator = torch.Generator().manual_seed(0)
    for site in discover(clone).moes():
        moe = site.part
        w_in, w_out = editor.tensor(moe.w_in).detach().clone(), editor.tensor(moe.w_out).detach().clone()
        for expert in range(1, 4):
            order = torch.randperm(moe.width, generator=generator)
            w_in[expert] = w_in[expert][torch.cat([order, order + moe.width])]
            w_out[expert] = w_out[expert][:, order]
        editor.set_tensor(moe.w_in, w_in)
        editor.set_tensor(moe.w_out, w_out)
    editor.finish()
    permuted = Patient(clone, discover(clone), upcycled.data)
    assert error(densify(permuted, method="mean"), permuted) < 4e-6
    assert error(densify(permuted, method="mean", align=False), permuted) > 1e-3


def experts_of(subject: Patient) -> tuple[np.ndarray, np.ndarray]:
    moe = next(iter(subject.structure.moes())).part
    return subject.graph.tensor(moe.w_in).detach().numpy(), subject.graph.tensor(moe.w_out).detach().numpy()


def dense_of(subject: Patient, x: np.ndarray) -> np.ndarray:
    """Output of the first dense FFN, from its weights."""
    ffn = next(iter(subject.structure.ffns())).part
    assert ffn.gate is not None
    gate, up, down = (subject.graph.tensor(p.weight).detach().numpy() for p in (ffn.gate, ffn.up, ffn.down))
    return down @ (silu(gate @ x) * (up @ x))


def silu(x: np.ndarray) -> np.ndarray:
    return activation("silu").function(torch.from_numpy(x)).numpy()


def test_each_method_is_its_formula(patient: MakePatient) -> None:
    """In NumPy, on the weights of the plan and a mixture whose experts differ."""
    subject = patient("mixtral")
    w_in, w_out = experts_of(subject)
    experts, width = w_out.shape[0], w_out.shape[2]
    x = np.random.default_rng(0).normal(size=w_in.shape[2]).astype(np.float32)

    def expert(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        gate, up = np.split(first @ x, 2)
        return second @ (silu(gate) * up)

    dense = densify(subject, refit=False, method="sum")
    plan = dense.plan.decisions[0]
    a, c = np.array(plan.weights), plan.scale
    assert a.sum() == pytest.approx(1)
    assert c == pytest.approx(1, rel=1e-5)
    total = c * sum(a[e] * expert(w_in[e], w_out[e]) for e in range(experts))
    np.testing.assert_allclose(dense_of(dense, x), total, rtol=1e-3, atol=1e-5)

    dense = densify(subject, refit=False, method="top_columns", columns="norm", width=experts * 5, weights="mass")
    total = np.zeros_like(total)
    for e in range(experts):
        norm = (w_in[e] ** 2).sum(1).reshape(2, width).sum(0) + (w_out[e] ** 2).sum(0)
        kept = np.sort(np.argsort(-norm)[:5])
        total += c * experts * a[e] * expert(w_in[e][np.concatenate([kept, kept + width])], w_out[e][:, kept])
    np.testing.assert_allclose(dense_of(dense, x), total, rtol=1e-3, atol=1e-5)

    dense = densify(subject, refit=False, method="mean", align=False)
    mean = expert(np.tensordot(a, w_in, 1), c * np.tensordot(a, w_out, 1))
    np.testing.assert_allclose(dense_of(dense, x), mean, rtol=1e-3, atol=1e-5)

    def truncated(matrix: np.ndarray, rank: int) -> np.ndarray:
        u, s, v = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
        return (u[:, :rank] * s[:rank]) @ v[:rank]

    dense = densify(subject, refit=False, method="svd", align=False, rank=7)
    first = sum(a[e] * np.concatenate([truncated(half, 7) for half in np.split(w_in[e], 2)]) for e in range(experts))
    second = c * sum(a[e] * truncated(w_out[e], 7) for e in range(experts))
    np.testing.assert_allclose(dense_of(dense, x), expert(first, second), rtol=1e-3, atol=1e-5)


def test_the_neurons_that_contribute_most_stay(patient: MakePatient) -> None:
    """In NumPy: each neuron's best constant weight, its size with it, and the sum of the largest ones."""
    subject = patient("mixtral")
    moe = next(iter(subject.structure.moes())).part
    sample = Sample(moe.input, moe.index, moe.weight, limit=1 << 20)
    observe(subject.graph, subject.data.calibration, {"": sample})
    x, index, weight = (value.numpy() for value in sample.values())
    w_in, w_out = experts_of(subject)
    experts, width = w_out.shape[0], w_out.shape[2]
    runs = np.zeros((len(x), experts))
    np.put_along_axis(runs, index, weight, axis=1)
    gate, up = np.split(w_in, 2, axis=1)
    h = silu(np.einsum("th,eih->tei", x, gate)) * np.einsum("th,eih->tei", x, up)
    factor = (runs[:, :, None] * h**2).sum(0) / (h**2).sum(0)
    size = factor * np.sqrt((h**2).mean(0)) * np.linalg.norm(w_out, axis=1)

    dense = densify(subject, refit=False, method="top_columns", width=width + 3)
    kept = np.sort(np.argsort(-size.flatten())[: width + 3])
    plan = dense.plan.decisions[0]
    assert [(e, n) for e, own in enumerate(plan.neurons) for n in own] == [divmod(int(each), width) for each in kept]
    wanted = sum(factor[e, n] * h[0, e, n] * w_out[e, :, n] for e, n in (divmod(each, width) for each in kept))
    np.testing.assert_allclose(dense_of(dense, x[0]), wanted, rtol=1e-3, atol=1e-5)

    lost = plan.model_copy(update={"neurons": (plan.neurons[0][:-1], *plan.neurons[1:])})
    twice = plan.model_copy(update={"neurons": ((*plan.neurons[0][:-1], plan.neurons[0][0]), *plan.neurons[1:])})
    for edited, message in ((lost, f"keeps {width + 2} neurons"), (twice, "of expert 0 must be different ones below")):
        changed = dense.plan.model_copy(update={"decisions": (edited, *dense.plan.decisions[1:])})
        with pytest.raises(PlanError, match=message):
            densify(subject, changed, refit=False, method="top_columns", width=width + 3)


def test_a_refit_is_least_squares_of_what_was_lost(patient: MakePatient) -> None:
    """The correction of the down projection, in NumPy: ridge regression of the mixture's output less the FFN's on h."""
    subject = patient("mixtral")
    sample = Sample(*((moe := next(iter(subject.structure.moes())).part).input, moe.node), limit=1 << 20)
    observe(subject.graph, subject.data.calibration, {"": sample})
    x, y = (value.double().numpy() for value in sample.values())
    weights = []
    for refit in (False, True):
        ffn = next(iter(densify(subject, refit=refit).structure.ffns())).part
        graph = densify(subject, refit=refit).graph
        assert ffn.gate is not None
        weights.append([graph.tensor(part.weight).detach().double().numpy() for part in (ffn.gate, ffn.up, ffn.down)])
        assert ffn.down.bias is None
    gate, up, down = weights[0]
    h = silu(x @ gate.T) * (x @ up.T)
    gram = h.T @ h
    ridge = 1e-2 * np.diag(gram).mean() * np.eye(len(gram))
    wanted = down + np.linalg.solve(gram + ridge, h.T @ (y - h @ down.T)).T
    np.testing.assert_allclose(weights[1][2], wanted, rtol=1e-3, atol=1e-5)
    np.testing.assert_array_equal(weights[1][0], gate)


def test_low_rank_parts_at_full_rank_are_the_mean() -> None:
    stack = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = torch.tensor([0.2, 0.5, 0.3])
    expected = (weights.double()[:, None, None] * stack).sum(0)
    torch.testing.assert_close(sum_of_truncations(stack, weights, 4), expected)
    assert largest_neurons(torch.eye(4)[None], torch.diag(torch.tensor([1.0, 3, 0, 2]))[None], 2).tolist() == [[1, 3]]


def test_weights_are_learnt() -> None:
    """Targets made with known weights give those weights back."""
    generator = torch.Generator().manual_seed(0)
    maps, x = torch.randn(4, 6, 5, generator=generator), torch.randn(300, 5, generator=generator)
    wanted = torch.tensor([0.1, 0.6, 0.25, 0.05])

    def output(a: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return rows @ torch.einsum("e,eij->ij", a.to(rows.dtype), maps).T

    found = learn_weights(output, x, output(wanted, x), torch.full((4,), 0.25), steps=400)
    torch.testing.assert_close(found.float(), wanted, atol=0.01, rtol=0)


def test_fitting_helps(tiny_mixtral: Trained) -> None:
    """Held-out loss of a trained mixture made dense: a refit is better than none, the mean better than one expert."""
    assert tiny_mixtral.held_out is not None
    losses = {}
    for method in ("mean", "top_columns", "svd", "sum"):
        for refit in (False, True):
            losses[method, refit] = densify(tiny_mixtral, method=method, refit=refit).loss(tiny_mixtral.held_out)
        assert losses[method, True] < losses[method, False] - 0.3, method
    assert losses["sum", True] < losses["top_columns", True] < losses["mean", True]


def test_contribution_chooses_better_than_norm(tiny_mixtral: Trained, tiny_upcycled: Trained) -> None:
    """Also where experts are parts of one network, where the neurons of largest norm are worse than those of one expert."""
    for model in (tiny_mixtral, tiny_upcycled):
        assert model.held_out is not None
        by_norm, by_contribution = (
            densify(model, method="top_columns", columns=columns, refit=refit).loss(model.held_out)
            for columns, refit in (("norm", True), ("contribution", False))
        )
        assert by_contribution < by_norm


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"width": 3}, "width is for method top_columns"),
        ({"columns": "norm"}, "columns is for method top_columns"),
        ({"method": "sum", "rank": 3}, "rank is for method svd"),
        ({"method": "top_columns", "weights": "mass"}, "weights is not for columns contribution"),
    ],
)
def test_fields_that_do_not_fit(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DensifyMoE(**fields)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"weights": (1.0,) * 6}, "weights add up to 6, needed 1"),
        ({"weights": (float("nan"),) * 6}, "weights add up to nan, needed 1"),
        ({"scale": float("nan")}, "scale nan, needed a finite number"),
    ],
)
def test_edited_plans_are_checked(patient: MakePatient, edit: dict[str, Any], message: str) -> None:
    subject = patient("mixtral")
    plan = densify(subject).plan
    edited = plan.model_copy(update={"decisions": (plan.decisions[0].model_copy(update=edit), *plan.decisions[1:])})
    with pytest.raises(PlanError, match=rf"blocks\.0\.moe: .*{message}"):
        subject.operate({"densify_moe": {}}, edited)


def test_refusals_by_site(patient: MakePatient) -> None:
    subject = patient("mixtral")
    with pytest.raises(PlanError, match="no mixture of experts"):
        densify(patient("llama"))
    with pytest.raises(PlanError, match=r"blocks\.0\.moe: width 50 must be a multiple of its 6 experts"):
        densify(subject, method="top_columns", columns="norm", width=50)
    with pytest.raises(PlanError, match=r"blocks\.0\.moe: width 289 must be 288 at most"):
        densify(subject, method="top_columns", width=289)
    with pytest.raises(PlanError, match=r"blocks\.0\.moe: rank 49 asked, its experts have rank 48 at most"):
        densify(subject, method="svd", rank=49)
    with pytest.raises(PlanError, match=r"blocks\.0\.moe: .*put densify_moe before quantize"):
        densify(subject.operate({"quantize": {"scheme": "int8"}}))
    batches = [{**batch, "attention_mask": torch.zeros_like(batch["attention_mask"])} for batch in subject.data.calibration]
    with pytest.raises(PlanError, match=r"blocks\.0\.moe: calibration data never reached it"):
        densify(Patient(subject.graph, subject.structure, load_data(batches, subject.graph)))
