"""``moefy_ffn``: all experts active is the dense FFN, decisions are those of the papers, methods beat chance."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from surgeon.data import load_data
from surgeon.errors import PlanError, SurgeonError
from surgeon.mixtures import Neurons
from surgeon.passes.moefy_ffn import MoefyFFN, MoefyFFNPlan, SplitFFN
from surgeon.registry import make_pass
from tests.conftest import Patient, Trained
from tests.test_passes import error

MakePatient = Callable[[str], Patient]
QUICK = {"router_steps": 20, "router_width": 16}


def moefy(subject: Patient, plan: Any = None, **fields: Any) -> Patient:
    return subject.checked({"moefy_ffn": fields}, plan)


EXACT = [
    {"split": "random", "router": "mlp", **QUICK},
    {"split": "kmeans", "router": "similarity", "scaling": "expectation"},
    {"split": "coactivation", "router": "linear", "target": "norm", "scaling": "mean_output"},
    {"split": "importance", "router": "centroid", "scaling": "least_squares"},
    {"split": "importance", "router": "linear", "shared": 1, "scaling": "norm"},
    {"split": "kmeans", "router": "mlp", "target": "norm", "select": "dynamic_k", "threshold": 0.0, **QUICK},
    {"split": "random", "shared": 2, "select": "threshold", "threshold": 0.0},
]


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "bert", "vit"])
@pytest.mark.parametrize("fields", EXACT, ids=lambda fields: "-".join(str(v) for v in fields.values()))
def test_all_experts_active_is_the_dense_ffn(patient: MakePatient, name: str, fields: dict[str, Any]) -> None:
    subject = patient(name)
    routed = 4 - fields.get("shared", 0)
    split = moefy(subject, experts=4, top_k=routed, **fields)
    assert error(split, subject) < 4e-6
    assert make_pass({"moefy_ffn": {"experts": 4, "top_k": routed, **fields}}).exact(split.plan)
    site = next(iter(split.structure.moes())).part
    assert site.experts == routed
    assert len(site.shared) == bool(fields.get("shared"))


@pytest.mark.parametrize(
    "fields",
    [{"top_k": 3}, {"top_k": 4, "scaling": "softmax"}, {"select": "dynamic_k", "threshold": 0.2},
     {"top_k": 4, "split": "importance", "overlap": True}],
    ids=str,
)  # fmt: skip
def test_other_plans_are_not_said_to_be_exact(patient: MakePatient, fields: dict[str, Any]) -> None:
    subject = patient("llama")
    split = moefy(subject, experts=4, **fields)
    assert not make_pass({"moefy_ffn": {"experts": 4, **fields}}).exact(split.plan)
    assert error(split, subject) > 1e-4


def test_a_plan_by_hand_gives_the_chosen_neurons(patient: MakePatient) -> None:
    """One expert of two, fixed by a plan, against the FFN with the other neurons cut out."""
    subject = patient("gpt2")
    width = next(iter(subject.structure.ffns())).part.width
    halves = (tuple(range(0, width, 2)), tuple(range(1, width, 2)))
    decisions = tuple(SplitFFN(site=s.name, experts=halves, top_k=1) for s in subject.structure.ffns())
    split = moefy(subject, MoefyFFNPlan(decisions=decisions), experts=2, top_k=1, router="centroid")
    site = next(iter(split.structure.moes())).part
    neurons = Neurons.of(subject.graph, next(iter(subject.structure.ffns())).part)
    x = torch.randn(5, neurons.up.shape[1], generator=torch.Generator().manual_seed(0))
    w_in, w_out = (split.graph.tensor(name).detach() for name in (site.w_in, site.w_out))
    hidden = neurons.hidden(x)
    assert site.b_in is not None
    for number, half in enumerate(halves):
        inner = torch.nn.functional.linear(x, w_in[number], split.graph.tensor(site.b_in)[number].detach())
        inner = torch.nn.functional.gelu(inner, approximate="tanh")
        expected = hidden[:, list(half)] @ neurons.down[:, list(half)].T
        torch.testing.assert_close(inner @ w_out[number].T, expected, rtol=1e-4, atol=1e-5)


def test_scalings_preserve_what_they_say(patient: MakePatient) -> None:
    """Of the mixture's output on the calibration tokens of one layer: its size, its projection, its mean."""
    subject = patient("llama")
    ffn = next(iter(subject.structure.ffns())).part
    tokens = _calibration_inputs(subject)
    dense = Neurons.of(subject.graph, ffn)
    wanted = dense.hidden(tokens) @ dense.down.T
    found = {}
    for scaling in ("sum", "norm", "least_squares", "mean_output"):
        split = moefy(subject, experts=4, top_k=2, split="random", scaling=scaling, blocks=[0])
        found[scaling] = _mixture_output(split, tokens)
    assert float(found["norm"].norm()) == pytest.approx(float(wanted.norm()), rel=1e-4)
    residual = wanted - found["least_squares"]
    assert abs(float((residual * found["least_squares"]).sum())) < 1e-4 * float(wanted.square().sum())
    assert float(residual.norm()) <= float((wanted - found["sum"]).norm())
    torch.testing.assert_close(found["mean_output"].mean(0), wanted.mean(0), rtol=1e-3, atol=1e-5)
    assert float((wanted - found["mean_output"]).norm()) < float((wanted - found["sum"]).norm())


def _calibration_inputs(subject: Patient) -> torch.Tensor:
    from surgeon.observe import observe
    from surgeon.samples import Sample

    sample = Sample(next(iter(subject.structure.ffns())).part.input, limit=10_000)
    observe(subject.graph, subject.data.calibration, {"x": sample})
    return sample.values()[0]


def _mixture_output(split: Patient, tokens: torch.Tensor) -> torch.Tensor:
    """The output of the first mixture and what is added to it, run alone on tokens in place of its input."""
    from surgeon.observe import Execution

    block = split.structure.blocks[0]
    moe = block.regions[-1].moe[0]
    run = Execution(split.graph, split.data.calibration[0])
    nodes = [n for n in split.graph.module.graph.nodes if n.op not in ("placeholder", "output")]
    taps = [block.regions[-1].entry, block.exit]
    with torch.no_grad():
        for node in nodes:
            run._evaluate(node)
            if node is moe.input:
                run.values[node] = tokens
            if node is moe.node:
                break
        mixed = run.values[moe.node]
        # behind the mixture: a reshape, and an addition of the offset where there is one, before the residual's
        user = next(iter(next(iter(moe.node.users)).users))
        other = [a for a in user.args if isinstance(a, torch.fx.Node) and a.op == "get_attr"]
        if user not in taps and other:
            mixed = mixed + split.graph.tensor(str(other[0].target))
    return mixed.detach()


def test_importance_is_that_of_the_paper(patient: MakePatient) -> None:
    """v_c in NumPy from what was kept, and the split that follows from it."""
    from surgeon import splits

    subject = patient("llama")
    step = make_pass({"moefy_ffn": {"experts": 4, "top_k": 2, "split": "importance", "shared": 1}})
    assert isinstance(step, MoefyFFN)
    from surgeon.gradients import observe_gradients

    observers = {k: o for k, o in step.observers(subject.structure).items() if o.gradient}
    observe_gradients(subject.graph, subject.data.calibration, observers)
    site = next(iter(subject.structure.ffns()))
    x, _, gradient = observers[f"{site.name}.clusters"].values()  # type: ignore[attr-defined]  # a sample
    neurons = Neurons.of(subject.graph, site.part)
    h, g = neurons.hidden(x).numpy(), gradient.numpy() @ neurons.down.numpy()
    centroids = splits.token_clusters(x, 3, 0).numpy()
    home = ((x.numpy()[:, None] - centroids[None]) ** 2).sum(-1).argmin(1)
    v = np.stack([np.abs(h * g)[home == c].mean(0) for c in range(3)])
    found = splits.importance_by_cluster(x, neurons.hidden(x), neurons.down, gradient, 3, 0)
    np.testing.assert_allclose(found.numpy(), v, rtol=1e-3, atol=1e-9)
    decision = moefy(subject, experts=4, top_k=2, split="importance", shared=1).plan.decisions[0]
    assert decision.shared == tuple(splits.widely_important(found, 28, 28).tolist())
    left = [i for i in range(112) if i not in decision.shared]
    best = max(
        (sum(v[order[c], list(decision.experts[c])].sum() for c in range(3)) for order in itertools.permutations(range(3))),
    )
    assert sorted(i for e in decision.experts for i in e) == left
    assert best == pytest.approx(sum(v[c, list(e)].sum() for c, e in enumerate(decision.experts)), rel=1e-3)


def test_routers_find_the_experts_that_matter(tiny_llama: Trained) -> None:
    """Share of the activation mass that the chosen half captures: lot < centroid < linear < mlp < knowing."""
    ffn = next(s for s in tiny_llama.structure.ffns() if s.block == 3)
    from surgeon.observe import observe
    from surgeon.samples import Sample

    assert tiny_llama.held_out is not None
    sample = Sample(ffn.part.input, limit=2000)
    observe(tiny_llama.graph, [tiny_llama.held_out], {"x": sample})
    (x,) = sample.values()
    neurons = Neurons.of(tiny_llama.graph, ffn.part)
    captured = {}
    for router in ("centroid", "linear", "mlp"):
        plan = moefy(tiny_llama, experts=8, top_k=4, router=router, blocks=[3])
        moe = next(s for s in plan.structure.moes() if s.block == 3).part
        experts = torch.tensor(plan.plan.decisions[0].experts)
        mass = neurons.hidden(x).abs()[:, experts].sum(-1)
        index = _run_to(plan, moe.input, x, moe.index)
        captured[router] = float(mass.gather(1, index).sum() / mass.sum())
        best = float(mass.topk(4, dim=1).values.sum() / mass.sum())
    assert 0.5 < captured["centroid"] < captured["linear"] < captured["mlp"] < best


def _run_to(subject: Patient, source: torch.fx.Node, x: torch.Tensor, wanted: torch.fx.Node) -> torch.Tensor:
    """Value of a node when another one has a given value."""
    from surgeon.observe import Execution

    run = Execution(subject.graph, subject.data.calibration[0])
    with torch.no_grad():
        for node in subject.graph.module.graph.nodes:
            if node.op != "placeholder":
                run._evaluate(node)
            if node is source:
                run.values[node] = x
            if node is wanted:
                break
    value: torch.Tensor = run.values[wanted]
    return value


@pytest.mark.slow
def test_splits_beat_chance(tiny_llama: Trained) -> None:
    """Held-out loss at half the neurons, the same router and calibration for all."""
    assert tiny_llama.held_out is not None

    def loss(**fields: Any) -> float:
        assert tiny_llama.held_out is not None
        return moefy(tiny_llama, experts=8, top_k=4, **fields).loss(tiny_llama.held_out)

    by_lot = statistics.mean(loss(split="random", seed=seed) for seed in range(3))
    losses = {split: loss(split=split) for split in ("kmeans", "coactivation", "importance")}
    for split, found in losses.items():
        assert found < by_lot - 0.05, (split, losses, by_lot)
    assert loss(split="kmeans", scaling="least_squares") < losses["kmeans"]
    assert loss(split="kmeans", target="norm") < by_lot


def test_dynamic_selection_runs_fewer_experts(tiny_llama: Trained) -> None:
    """More experts where the threshold is lower, and those that do not run weigh exactly nothing."""
    means = []
    for threshold in (0.3, 0.6, 0.9):
        split = moefy(
            tiny_llama, experts=8, select="dynamic_k", threshold=threshold, router="linear", target="norm", blocks=[2]
        )
        moe = next(s for s in split.structure.moes() if s.block == 2).part
        run = _weights(split, moe.weight)
        assert set(run.unique().tolist()) <= {0.0, 1.0}
        means.append(float(run.sum(1).mean()))
    assert 8 > means[0] > means[1] > means[2] >= 1


def _weights(subject: Patient, node: torch.fx.Node) -> torch.Tensor:
    from surgeon.observe import observe
    from surgeon.samples import Sample

    sample = Sample(node, limit=5000)
    observe(subject.graph, subject.data.calibration, {"w": sample})
    return sample.values()[0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"experts": 4}, "select top_k needs top_k"),
        ({"experts": 4, "top_k": 5}, "top_k 5 exceeds experts 4"),
        ({"experts": 4, "top_k": 4, "shared": 1}, "top_k 4 exceeds routed experts 3"),
        ({"experts": 4, "top_k": 1, "shared": 3}, "fewer than 2"),
        ({"experts": 4, "select": "dynamic_k"}, "needs threshold"),
        ({"experts": 4, "select": "threshold", "threshold": 0.1, "router": "centroid"}, "router linear or mlp, not centroid"),
        ({"experts": 4, "top_k": 2, "overlap": True}, "for split importance; split is kmeans"),
        ({"experts": 4, "top_k": 2, "split": "importance", "overlap": True, "scaling": "softmax"}, "share no neuron"),
        ({"experts": 4, "top_k": 2, "threshold": 0.5}, "select is top_k"),
    ],
)
def test_fields_that_do_not_fit(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        MoefyFFN(**fields)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("llama", {"experts": 9, "top_k": 2}, r"blocks\.0\.ffn: 9 experts do not divide its width 112; these do: 2, 4"),
        ("bert", {"experts": 4, "top_k": 2, "split": "importance", "importance": "gradient"}, r"blocks\.0\.ffn: .*no next tok"),
    ],
)
def test_refusals_by_site(patient: MakePatient, name: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        moefy(patient(name), **fields)


def test_order_of_passes_is_named(patient: MakePatient) -> None:
    for step, message in (({"quantize": {"scheme": "int8"}}, "put moefy_ffn before quantize"),
                          ({"low_rank": {"ratio": 0.5, "method": "svd"}}, "put moefy_ffn before low_rank")):  # fmt: skip
        with pytest.raises(PlanError, match=rf"blocks\.0\.ffn: .*{message}"):
            moefy(patient("llama").operate(step), experts=4, top_k=2)


@pytest.mark.parametrize("fields", [{}, {"router": "mlp"}, {"split": "importance"}], ids=str)
def test_calibration_that_reaches_no_token_is_refused(patient: MakePatient, fields: dict[str, Any]) -> None:
    subject = patient("llama")
    batches = [{**batch, "attention_mask": torch.zeros_like(batch["attention_mask"])} for batch in subject.data.calibration]
    empty = Patient(subject.graph, subject.structure, load_data(batches, subject.graph))
    with pytest.raises(SurgeonError, match=r"blocks\.0\.ffn: calibration data never reached it"):
        moefy(empty, experts=4, top_k=2, **fields)


def test_edited_plans_are_checked(patient: MakePatient) -> None:
    subject = patient("llama")
    plan = moefy(subject, experts=4, top_k=2, router="centroid").plan
    first = plan.decisions[0]
    twice = first.model_copy(update={"experts": (first.experts[1], *first.experts[1:])})
    with pytest.raises(PlanError, match="exactly one expert each"):
        moefy(subject, plan.model_copy(update={"decisions": (twice,)}), experts=4, top_k=2, router="centroid")
