"""Kept tokens, and derivatives of the loss inside a graph, against torch's own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from surgeon.errors import ObserveError
from surgeon.gradients import observe_gradients
from surgeon.samples import GradientSample, Sample
from tests.conftest import Patient
from tests.models import inputs_for, layer_list, tiny

MakePatient = Callable[[str], Patient]


def numbered(count: int, start: int = 0) -> torch.Tensor:
    return torch.arange(start, start + count)[:, None].float()


def test_everything_is_kept_below_the_limit() -> None:
    sample = Sample(limit=10)
    sample.update(numbered(4), numbered(4) * 2)
    sample.update(numbered(3, 4), numbered(3, 4) * 2)
    first, second = sample.values()
    assert torch.equal(first, numbered(7))
    assert torch.equal(second, 2 * first)


def test_a_sample_is_uniform_over_batches_and_shards() -> None:
    total = torch.zeros(60)
    for seed in range(300):
        one, other = Sample(limit=12, seed=2 * seed), Sample(limit=12, seed=2 * seed + 1)
        for start in range(0, 40, 10):
            one.update(numbered(10, start))
        other.update(numbered(20, 40))
        one.merge(other)
        kept = one.values()[0].flatten().long()
        assert kept.unique().numel() == 12
        total[kept] += 1
    assert one.tokens == 60
    # 300 draws of 12 in 60: mean 60, standard deviation 6.9
    assert float((total - 60).abs().max()) < 28


def test_gradients_are_those_of_autograd(patient: MakePatient) -> None:
    """With padding: rows that are masked neither enter the loss nor the sample."""
    subject = patient("llama")
    batch = inputs_for("llama", batch=3, padded=True)
    site = list(subject.structure.ffns())[1].part
    observer = GradientSample(site.input, site.down.node, limit=100)
    observe_gradients(subject.graph, [batch], {"x": observer})
    x, y, gradient = observer.values()

    module, _ = tiny("llama")
    kept: list[torch.Tensor] = []
    layer = layer_list(module)[1]
    layer.mlp.register_forward_hook(lambda _, inputs, output: kept.extend([inputs[0], output]))
    output = module(**batch, use_cache=False)
    kept[1].retain_grad()
    mask = batch["attention_mask"].bool()
    predicts = mask[:, :-1] & mask[:, 1:]
    loss = torch.nn.functional.cross_entropy(
        output.logits[:, :-1][predicts], batch["input_ids"][:, 1:][predicts], reduction="sum"
    )
    loss.backward()
    assert kept[1].grad is not None
    torch.testing.assert_close(x, kept[0][mask])
    torch.testing.assert_close(y, kept[1][mask])
    torch.testing.assert_close(gradient, kept[1].grad[mask], rtol=1e-4, atol=1e-6)
    assert float(gradient.abs().max()) > 0


def test_without_a_loss_there_are_values_only(patient: MakePatient) -> None:
    subject = patient("bert")
    site = next(iter(subject.structure.ffns())).part
    observer = GradientSample(site.input, limit=100)
    observe_gradients(subject.graph, subject.data.calibration, {"x": observer})
    assert not observer.has_gradient
    assert len(observer.values()) == 1


def test_no_batch_is_refused(patient: MakePatient) -> None:
    subject = patient("llama")
    site = next(iter(subject.structure.ffns())).part
    with pytest.raises(ObserveError, match="no batch"):
        observe_gradients(subject.graph, [], {"x": GradientSample(site.input, limit=9)})


def test_a_random_direction_of_outputs_has_their_derivatives(patient: MakePatient) -> None:
    """Behind the last layer of BERT's FFN the norm alone is left, of which a Jacobian is made here; padding counts nowhere."""
    subject = patient("bert")
    batch = inputs_for("bert", batch=3, padded=True)
    site = list(subject.structure.ffns())[-1].part

    class Directed(GradientSample):
        directed = True

    observer, plain = Directed(site.down.node, limit=100), GradientSample(site.down.node, limit=100)
    observe_gradients(subject.graph, [batch], {"x": observer, "plain": plain})
    assert len(plain.values()) == 1
    y, gradient = observer.values()
    valid = int(batch["attention_mask"].sum())
    assert y.shape == gradient.shape == (valid, 64)
    assert valid < batch["attention_mask"].numel()

    module, _ = tiny("bert")
    kept: list[torch.Tensor] = []
    layer = module.encoder.layer[-1].output
    layer.dense.register_forward_hook(lambda _, inputs, output: kept.append(output.detach().requires_grad_()) or kept[-1])
    found = module(**batch)
    mask = batch["attention_mask"].bool()
    generator = torch.Generator().manual_seed(1)
    total = torch.zeros((), dtype=torch.float64)
    for rows in (found.last_hidden_state[mask], found.pooler_output):
        rows = rows.double()
        signs = torch.randint(0, 2, rows.shape, generator=generator) * 2 - 1
        total = total + (signs * rows).sum() / rows.detach().square().sum(-1).mean().sqrt()
    (want,) = torch.autograd.grad(total, kept)
    assert torch.allclose(gradient, want[mask], rtol=1e-4, atol=1e-6)
