"""``upcycle_ffn``: the mixture starts as the dense model, and what makes copies differ is what was asked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from surgeon.data import load_data
from surgeon.errors import PlanError
from surgeon.numerics import output_scale, redrawn, virtual_group_rows, weight_scale
from surgeon.passes.upcycle_ffn import UpcycleFFN
from surgeon.recipe import parse_recipe
from surgeon.registry import make_pass
from tests.conftest import Patient, Trained
from tests.models import tiny
from tests.test_passes import error

MakePatient = Callable[[str], Patient]


def upcycle(subject: Patient, plan: Any = None, **fields: Any) -> Patient:
    return subject.checked({"upcycle_ffn": fields}, plan)


EXACT = [
    {"experts": 4, "top_k": 2},
    {"experts": 4, "top_k": 1, "gate": "softmax_topk", "router": "clusters"},
    {"experts": 16, "top_k": 8, "granularity": 4},
    {"experts": 16, "top_k": 4, "granularity": 4, "gate": "softmax_topk"},
    {"experts": 3, "top_k": 2, "scaling": "published"},
]


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "bert", "vit"])
@pytest.mark.parametrize("fields", EXACT, ids=lambda fields: "-".join(str(v) for v in fields.values()))
def test_upcycled_is_dense_at_initialisation(patient: MakePatient, name: str, fields: dict[str, Any]) -> None:
    subject = patient(name)
    upcycled = upcycle(subject, **fields)
    assert error(upcycled, subject) < 4e-6
    assert make_pass({"upcycle_ffn": fields}).exact(upcycled.plan)
    moe = next(iter(upcycled.structure.moes())).part
    assert (moe.experts, moe.top_k, moe.normalised) == (fields["experts"], fields["top_k"], True)
    assert moe.scoring == ("softmax" if fields.get("gate") == "softmax_topk" else "topk_softmax")


@pytest.mark.parametrize("scale", ["topk_softmax", "softmax_topk", "down only"])
def test_scales_of_virtual_groups_in_numpy(scale: str) -> None:
    """The derivation, restated: E copies in G shards; relu neurons so that the published weight scale is exact too."""
    rng = np.random.default_rng(0)
    copies, shards, groups, h, inner = 4, 4, 2, 6, 16
    top = groups * shards
    up, down, x = rng.normal(size=(inner, h)), rng.normal(size=(h, inner)), rng.normal(size=h)
    dense = down @ np.maximum(up @ x, 0)
    row = np.zeros((copies, h)) if scale == "softmax_topk" else rng.normal(size=(copies, h))
    r = virtual_group_rows(torch.from_numpy(row), shards).numpy() @ x
    chosen = np.concatenate([np.arange(shards) + shards * c for c in np.argsort(-row @ x, kind="stable")[:groups]])
    if scale == "softmax_topk":
        p = np.exp(r) / np.exp(r).sum()
        weights = p[chosen]
    else:
        weights = np.exp(r[chosen]) / np.exp(r[chosen]).sum()
    s = output_scale(copies, shards, top, normalised=scale != "softmax_topk")
    first, second = (1.0, s) if scale == "down only" else (weight_scale(s, gated=False),) * 2
    cut = np.arange(inner).reshape(shards, -1)
    total = np.zeros(h)
    for i, w in zip(chosen, weights, strict=True):
        part = cut[i % shards]
        total += w * second * down[:, part] @ np.maximum(first * up[part] @ x, 0)
    np.testing.assert_allclose(total, dense, rtol=1e-12)


def test_the_published_scaling_is_near_and_not_said_to_be_exact(patient: MakePatient) -> None:
    """Silu is not homogeneous: every matrix scaled by s^(1/3) is off, the down projection alone is not."""
    subject = patient("llama")
    fields = {"experts": 8, "top_k": 4, "granularity": 4, "scaling": "published"}
    upcycled = upcycle(subject, **fields)
    assert not make_pass({"upcycle_ffn": fields}).exact(upcycled.plan)
    assert 1e-4 < error(upcycled, subject) < 1
    moe = next(iter(upcycled.structure.moes())).part
    dense = next(iter(subject.structure.ffns())).part
    assert dense.gate is not None
    expected = torch.cat([subject.graph.tensor(p.weight).detach()[:28] for p in (dense.gate, dense.up)]) * 4 ** (1 / 3)
    torch.testing.assert_close(upcycled.graph.tensor(moe.w_in).detach()[4], expected)


def test_noise_and_new_neurons(patient: MakePatient) -> None:
    subject = patient("gpt2")
    dense = next(iter(subject.structure.ffns())).part
    noisy = upcycle(subject, experts=3, top_k=1, noise=0.1)
    w_in = noisy.graph.tensor(next(iter(noisy.structure.moes())).part.w_in).detach()
    source = subject.graph.tensor(dense.up.weight).detach()
    source = source.T if dense.up.transposed else source
    assert torch.equal(w_in[0], source)
    for copy in w_in[1:]:
        assert float((copy - source).std()) == pytest.approx(0.1 * float(source.std()), rel=0.05)
    assert not torch.equal(w_in[1], w_in[2])
    anew = upcycle(subject, experts=3, top_k=1, reinitialise=0.25)
    moe = next(iter(anew.structure.moes())).part
    w_in, w_out = anew.graph.tensor(moe.w_in).detach(), anew.graph.tensor(moe.w_out).detach()
    for copy in (1, 2):
        rows = (w_in[copy] != w_in[0]).any(1)
        assert int(rows.sum()) == dense.width // 4
        assert torch.equal(rows, (w_out[copy] != w_out[0]).any(0))
    assert not make_pass({"upcycle_ffn": {"experts": 3, "top_k": 1, "noise": 0.1}}).exact(noisy.plan)


def test_new_neurons_keep_mean_and_spread() -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(400, 200, generator=generator) * 0.3 + 0.1
    changed = redrawn(matrix, torch.arange(100), generator)
    assert torch.equal(changed[100:], matrix[100:])
    assert float(changed[:100].mean()) == pytest.approx(float(matrix[:100].mean()), abs=0.01)
    assert float(changed[:100].std()) == pytest.approx(float(matrix[:100].std()), rel=0.02)


# -- several checkpoints ------------------------------------------------------------------------------------------


def saved(folder: Path, seed: int, **changes: Any) -> Path:
    module, _ = tiny("llama", seed=seed, **changes)
    path = folder / f"checkpoint-{seed}-{'-'.join(map(str, changes.values()))}"
    module.save_pretrained(path)
    return path


def test_experts_of_several_checkpoints(patient: MakePatient, tmp_path: Path) -> None:
    """Each expert is one checkpoint's FFN, everything else the mean."""
    subject, path = patient("llama"), saved(tmp_path, 1)
    joined = upcycle(subject, checkpoints=[str(path)], top_k=1)
    other, _ = tiny("llama", seed=1)
    theirs = dict(other.named_parameters())
    for site, dense in zip(joined.structure.moes(), subject.structure.ffns(), strict=True):
        w_out = joined.graph.tensor(site.part.w_out).detach()
        assert torch.equal(w_out[0], subject.graph.tensor(dense.part.down.weight).detach())
        assert torch.equal(w_out[1], theirs[dense.part.down.weight].detach())
    shared = [name for name in joined.graph.parameters() if name in theirs]
    assert len(shared) > 10
    for name in shared:
        mean = (subject.graph.tensor(name) + theirs[name]) / 2
        torch.testing.assert_close(joined.graph.tensor(name).detach(), mean.detach())


def test_checkpoints_start_at_the_recipes_folder(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    steps = [{"upcycle_ffn": {"checkpoints": ["other", "org/name"], "top_k": 1}}]
    (step,) = parse_recipe({"model": "org/model", "passes": steps}, tmp_path).passes
    assert isinstance(step, UpcycleFFN)
    assert step.checkpoints == (tmp_path / "other", Path("org/name"))


def test_checkpoints_of_another_shape_are_refused_by_site(patient: MakePatient, tmp_path: Path) -> None:
    subject = patient("llama")
    fewer = saved(tmp_path, 2, layers=2)
    with pytest.raises(PlanError, match=r"is of another shape: it lacks blocks\.2\."):
        upcycle(subject, checkpoints=[str(fewer)], top_k=1)
    import transformers as tf

    config = tf.LlamaConfig(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96, vocab_size=160,
        max_position_embeddings=128,
    )  # fmt: skip
    tf.LlamaForCausalLM(config).save_pretrained(tmp_path / "narrow")
    with pytest.raises(PlanError, match=r"blocks\.0\.ffn\.\w+\.weight: .* is \[112, 64\] here and \[96, 64\] in checkpoint"):
        upcycle(subject, checkpoints=[str(tmp_path / "narrow")], top_k=1)


def test_router_rows_from_texts(tiny_llama: Trained) -> None:
    """Unit mean of the layer's input over the positive texts, less that over the negative ones."""
    from surgeon.observe import MeanValue, observe

    texts = [
        {"positive": ["import os", "def f(x):\n    return x"]},
        {"positive": ["class A:"], "negative": ["# a comment"]},
    ]
    upcycled = upcycle(tiny_llama, experts=2, top_k=1, router="texts", texts=texts, blocks=[3])
    moe = next(iter(upcycled.structure.moes())).part
    assert moe.router is not None
    found = upcycled.graph.tensor(moe.router.weight).detach()
    from surgeon.data import tokenizer_for

    tokenizer = tokenizer_for(tiny_llama.graph)
    ffn = next(s for s in tiny_llama.structure.ffns() if s.block == 3).part

    def mean(text: str) -> torch.Tensor:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        observer = MeanValue(ffn.input)
        observe(tiny_llama.graph, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}], {"x": observer})
        return observer.mean

    first = (mean("import os") + mean("def f(x):\n    return x")) / 2
    second = mean("class A:") - mean("# a comment")
    expected = torch.stack([first / first.norm(), second / second.norm()]).float()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# -- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_k": 1}, "give experts or checkpoints"),
        ({"experts": 4, "top_k": 5}, "top_k 5 exceeds experts 4"),
        ({"experts": 8, "top_k": 3, "granularity": 2}, "top_k 3 is no multiple of granularity 2"),
        ({"experts": 9, "top_k": 2, "granularity": 2}, "experts 9 is no multiple of granularity 2"),
        ({"experts": 4, "top_k": 1, "checkpoints": ["a"]}, "make 2 experts, not 4"),
        ({"experts": 4, "top_k": 1, "router": "texts"}, "router texts needs texts"),
        ({"experts": 4, "top_k": 1, "router": "texts", "texts": [{"positive": ["a"]}]}, "one for each of 4 copies"),
    ],
)
def test_fields_that_do_not_fit(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        UpcycleFFN(**fields)


def test_refusals_by_site(patient: MakePatient) -> None:
    subject = patient("llama")
    with pytest.raises(PlanError, match=r"blocks\.0\.ffn: granularity 5 does not divide its width 112"):
        upcycle(subject, experts=10, top_k=5, granularity=5)
    batches = [{**batch, "attention_mask": torch.zeros_like(batch["attention_mask"])} for batch in subject.data.calibration]
    empty = Patient(subject.graph, subject.structure, load_data(batches, subject.graph))
    with pytest.raises(PlanError, match=r"blocks\.0\.ffn: calibration data never reached it"):
        upcycle(empty, experts=4, top_k=2, router="clusters")
    with pytest.raises(PlanError, match=r"blocks\.0\.ffn: .*put upcycle_ffn before quantize"):
        upcycle(subject.operate({"quantize": {"scheme": "int8"}}), experts=4, top_k=2)
