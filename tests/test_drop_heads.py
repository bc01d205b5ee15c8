"""``drop_heads``: what goes is what was said, caches and engines included; criteria and refit against identities and chance."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

import surgeon
from surgeon.caches import PAST, PRESENT
from surgeon.data import load_data
from surgeon.discovery import discover
from surgeon.errors import PlanError
from surgeon.graph import Graph
from surgeon.moments import HalvedMoments
from surgeon.numerics import NumericsError, contributions, output_loss, refit_columns, remove_blocks
from surgeon.numerics.columns import RIDGES, best_ridge
from surgeon.observe import observe
from surgeon.passes.drop_heads import DropHeads, DropHeadsPlan, KeepHeads
from surgeon.recipe import Calibration
from surgeon.rewrite import Editor
from surgeon.samples import Sample
from surgeon.structure import Attention, Linear, Site
from surgeon.tracing import trace
from surgeon.verify import check_caches, relative_error
from tests.causal import causal
from tests.conditional import conditional, encoder_inputs
from tests.conftest import MODELS, Patient, Trained
from tests.models import minilm_path

MakePatient = Callable[[str], Patient]
LOSSLESS = 2e-6
"""Relative error of outputs that differ by the order in which float32 numbers are summed."""


def drop(subject: Patient, plan: Any = None, **fields: Any) -> Patient:
    return subject.checked({"drop_heads": fields}, plan)


def sites(subject: Patient) -> list[Site[Attention]]:
    return list(subject.structure.attentions())


def changed(subject: Patient, change: Callable[[Editor, Site[Attention]], None]) -> Patient:
    editor = Editor(subject.graph.clone())
    for site in sites(subject):
        change(editor, site)
    graph = editor.finish()
    return Patient(graph, discover(graph), subject.data)


def blocks_of(editor: Editor, linear: Linear | None, count: int, dim: int) -> list[Tensor]:
    """Views of parts of equal size of a fresh copy of a linear's weight; dim 0: output features, 1: input features."""
    assert linear is not None
    weight = editor.tensor(linear.weight).detach().clone()
    editor.set_tensor(linear.weight, weight)
    matrix = editor.tensor(linear.weight).detach()
    matrix = matrix.T if linear.transposed else matrix
    if linear.rows is not None and dim == 0:
        matrix = matrix[linear.rows[0] : linear.rows[1]]
    return list(matrix.chunk(count, dim))


def silenced(subject: Patient, plan: DropHeadsPlan) -> Patient:
    """The model whose output projections multiply by 0 what the heads give that a plan removes."""
    decisions = {decision.site: decision for decision in plan.decisions}

    def silence(editor: Editor, site: Site[Attention]) -> None:
        if (decision := decisions.get(site.name)) is not None:
            for unit, columns in enumerate(blocks_of(editor, site.part.o, decision.units, 1)):
                columns.mul_(float(unit in decision.keep))

    return changed(subject, silence)


@torch.no_grad()
def error(found: Graph, wanted: Graph, subject: Patient) -> float:
    worst = 0.0
    for batch in subject.data.calibration[:2]:
        results = found(**batch)
        worst = max([worst, *(relative_error(results[name], value) for name, value in wanted(**batch).items())])
    return worst


# -- what is removed ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "unit"), [("llama", "group"), ("llama", "query"), ("qwen3", "group"), ("gpt2", "group"), ("bert", "query")]
)
def test_without_a_refit_the_others_do_what_they_did(patient: MakePatient, name: str, unit: str) -> None:
    subject = patient(name)
    fewer = drop(subject, ratio=0.5, unit=unit, refit=False, criterion="random")
    assert len(fewer.plan.decisions) == 3
    assert error(fewer.graph, silenced(subject, fewer.plan).graph, subject) < LOSSLESS
    for old, new in zip(sites(subject), sites(fewer), strict=True):
        groups = old.part.kv_heads if unit == "query" and old.part.kv_heads < old.part.heads else old.part.kv_heads // 2
        assert (new.part.heads, new.part.kv_heads, new.part.head_dim) == (old.part.heads // 2, groups, old.part.head_dim)


@pytest.mark.parametrize("name", ["llama", "gpt2", "vit"])
def test_silent_heads_go_without_loss(patient: MakePatient, name: str) -> None:
    """They are found by every criterion that looks at data or weights; the refit has nothing to fit."""
    lot = drop(patient(name), ratio=0.5, refit=False, criterion="random", seed=3).plan
    subject = silenced(patient(name), lot)
    for criterion in ("reconstruction", "activation", "magnitude"):
        fewer = drop(subject, ratio=0.5, criterion=criterion)
        assert [decision.keep for decision in fewer.plan.decisions] == [decision.keep for decision in lot.decisions]
        assert all(decision.loss == pytest.approx(0, abs=1e-12) for decision in fewer.plan.decisions)
        assert error(fewer.graph, subject.graph, subject) < LOSSLESS


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_head_that_is_a_copy_goes_without_loss(patient: MakePatient, name: str) -> None:
    def copy(editor: Editor, site: Site[Attention]) -> None:
        part = site.part
        members = part.heads // part.kv_heads
        for linear, heads in ((part.q, part.heads), (part.k, part.kv_heads), (part.v, part.kv_heads)):
            rows = blocks_of(editor, linear, heads, 0)
            width = members if heads == part.heads else 1
            for member in range(width):
                rows[width + member].copy_(rows[member])
            if linear is not None and linear.bias is not None:
                bias = editor.tensor(linear.bias).detach().clone()
                parts = bias.chunk(heads)
                for member in range(width):
                    parts[width + member].copy_(parts[member])
                editor.set_tensor(linear.bias, bias)

    first = patient(name).data.calibration[0]
    ids = [torch.randint(0, 90, first["input_ids"].shape, generator=torch.Generator().manual_seed(i)) for i in range(24)]
    subject = changed(patient(name), copy)  # with more tokens than features, in either half of them
    subject.data = load_data([{**first, "input_ids": numbers} for numbers in ids], subject.graph)
    groups = sites(subject)[0].part.kv_heads
    fewer = drop(subject, keep=groups - 1)
    for decision in fewer.plan.decisions:
        assert len({0, 1} - set(decision.keep)) == 1
        assert decision.loss == pytest.approx(0, abs=1e-7)
        assert decision.ridge == RIDGES[0]
    assert error(fewer.graph, subject.graph, subject) < 1e-4  # which is that ridge
    assert error(drop(subject, fewer.plan, keep=groups - 1, refit=False).graph, subject.graph, subject) > 1e-2


def test_nothing_to_remove_changes_nothing(patient: MakePatient) -> None:
    subject = patient("llama")
    for fields in ({"ratio": 0.0}, {"ratio": 0.4}, {"keep": 2}, {"keep": 4, "unit": "query"}):
        whole = drop(subject, **fields)
        assert whole.plan.decisions == ()
        assert "all 2 key/value heads stay" in whole.plan.notes[0] or "all 4 query heads stay" in whole.plan.notes[0]
        assert whole.graph.fingerprint(weights=True) == subject.graph.fingerprint(weights=True)
    everyone = tuple(KeepHeads(site=site.name, unit="group", units=2, keep=(0, 1)) for site in sites(subject))
    plan = DropHeadsPlan(decisions=everyone)
    assert DropHeads(ratio=0.5).exact(plan)
    assert error(drop(subject, plan, ratio=0.5).graph, subject.graph, subject) == 0.0


def test_layers_may_differ(patient: MakePatient) -> None:
    subject = patient("bert")
    kept = [(0, 2, 3), (1,)]
    decisions = tuple(
        KeepHeads(site=site.name, unit="group", units=4, keep=keep) for site, keep in zip(sites(subject), kept, strict=False)
    )
    fewer = drop(subject, DropHeadsPlan(decisions=decisions), keep=2, refit=False)
    assert [site.part.heads for site in sites(fewer)] == [3, 1, 4]
    assert error(fewer.graph, silenced(subject, fewer.plan).graph, subject) < LOSSLESS


def test_heads_of_a_projection_that_norms_them_together_are_left_alone(patient: MakePatient) -> None:
    import transformers as tf

    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96, "vocab_size": 99}
    batch = {"input_ids": torch.randint(0, 99, (2, 7)), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    graph = trace(tf.Olmo2ForCausalLM(tf.Olmo2Config(**shape, pad_token_id=0)).eval(), batch)
    normed = Patient(graph, discover(graph), load_data([batch], graph))
    with pytest.raises(PlanError, match=r"blocks\.0\.attention: left alone: .* needed for all heads together by pow.*1 more"):
        drop(normed, ratio=0.5)
    graph = trace(tf.AlbertModel(tf.AlbertConfig(**shape, embedding_size=16)).eval(), batch)
    tied = Patient(graph, discover(graph), load_data([batch], graph))
    with pytest.raises(PlanError, match="its weight .* is read by other parts of the model too"):
        drop(tied, ratio=0.5)


def test_query_heads_of_one_key_head() -> None:
    import transformers as tf

    shape = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_inner": 96, "vocab_size": 99, "multi_query": True}
    batch = {"input_ids": torch.randint(0, 99, (2, 7)), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    graph = trace(tf.GPTBigCodeForCausalLM(tf.GPTBigCodeConfig(**shape)).eval(), batch)
    subject = Patient(graph, discover(graph), load_data([batch], graph))
    with pytest.raises(PlanError, match="it has one key/value head; its 4 query heads can be removed with unit: query"):
        drop(subject, ratio=0.5)
    fewer = drop(subject, keep=3, unit="query", refit=False)
    assert {(site.part.heads, site.part.kv_heads) for site in sites(fewer)} == {(3, 1)}
    assert error(fewer.graph, silenced(subject, fewer.plan).graph, subject) < LOSSLESS


# -- refusals -----------------------------------------------------------------------------------------------------


def test_fields() -> None:
    for fields in ({}, {"ratio": 0.5, "keep": 1}, {"ratio": 1.0}, {"keep": 0}, {"keep": 1, "unit": "head"}):
        with pytest.raises(ValidationError):
            DropHeads(**fields)  # type: ignore[arg-type]  # on purpose


def test_refusals(patient: MakePatient) -> None:
    subject = patient("llama")
    with pytest.raises(PlanError, match=r"blocks\.0\.attention: keep 3 asked, it has 2 key/value heads"):
        drop(subject, keep=3)
    with pytest.raises(PlanError, match="keep 3 query heads asked, which its 2 key/value heads do not divide"):
        drop(subject, keep=3, unit="query")
    packed = subject.operate({"quantize": {"scheme": "int8", "names": "*.attention.v"}})
    with pytest.raises(PlanError, match="its projection v is quantized already; put drop_heads before quantize"):
        drop(packed, ratio=0.5)
    factored = subject.operate({"low_rank": {"rank": 8, "method": "svd", "names": "*.attention.o"}})
    with pytest.raises(PlanError, match="its output projection was factored already; put drop_heads before low_rank"):
        drop(factored, ratio=0.5)


@pytest.mark.parametrize(
    ("decision", "message"),
    [
        ({"site": "blocks.9.attention", "unit": "group", "units": 2, "keep": (0,)}, "not an attention of this model"),
        ({"site": "blocks.0.attention", "unit": "group", "units": 4, "keep": (0,)}, "has 4 units, it has 2 key/value heads"),
        ({"site": "blocks.0.attention", "unit": "group", "units": 2, "keep": (2,)}, r"ascending units of 0 to 1"),
        ({"site": "blocks.0.attention", "unit": "query", "units": 4, "keep": (0, 1)}, "as many query heads of each of its 2"),
    ],
)
def test_plans_that_do_not_fit(patient: MakePatient, decision: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        drop(patient("llama"), DropHeadsPlan(decisions=(KeepHeads(**decision),)), ratio=0.5)


# -- numbers ------------------------------------------------------------------------------------------------------


def random_layer(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """W [5, 12], inputs [200, 12] that depend on each other, and their second moment."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(12, 12, generator=generator, dtype=torch.float64)
    inputs = torch.randn(200, 12, generator=generator, dtype=torch.float64) @ mixing
    return torch.randn(5, 12, generator=generator, dtype=torch.float64), inputs, inputs.T @ inputs


def test_the_refit_is_least_squares() -> None:
    weight, inputs, moment = random_layer()
    keep = torch.tensor([0, 1, 2, 6, 7, 8, 9, 10, 11])
    fitted = refit_columns(weight, moment, keep, ridge=0.0)
    wanted = torch.linalg.lstsq(inputs[:, keep], inputs @ weight.T).solution.T
    torch.testing.assert_close(fitted, wanted, rtol=1e-9, atol=1e-9)
    found = (inputs @ weight.T - inputs[:, keep] @ fitted.T).square().sum() / (inputs @ weight.T).square().sum()
    assert output_loss(weight, moment, keep, fitted) == pytest.approx(float(found))
    assert refit_columns(weight, moment, torch.arange(12)) is weight


@pytest.mark.parametrize("refit", [True, False])
def test_blocks_go_one_by_one_each_at_its_exact_cost(refit: bool) -> None:
    weight, _, moment = random_layer(1)

    def loss(gone: list[int]) -> float:
        keep = torch.tensor([c for c in range(12) if c // 3 not in gone])
        return output_loss(weight, moment, keep, refit_columns(weight, moment, keep, 0.0) if refit else weight[:, keep])

    removal = remove_blocks(weight, moment, [[0, 1, 2, 3]], 3, refit, ridge=0.0)
    for count in range(1, 4):
        assert removal.losses[count - 1] == pytest.approx(loss(removal.order[:count]), rel=1e-6)
        before = removal.order[: count - 1]
        best = min((block for block in range(4) if block not in before), key=lambda block: loss([*before, block]))
        assert removal.order[count - 1] == best
    assert removal.alone.tolist() == pytest.approx([loss([block]) for block in range(4)], rel=1e-6)
    of_each = remove_blocks(weight, moment, [[0, 1], [2, 3]], 1, refit)
    assert sorted(block // 2 for block in of_each.order) == [0, 1]


def test_the_ridge_is_that_which_holds_on_the_other_half() -> None:
    """Many tokens of exact copies need none; few tokens of noise need much."""
    weight, inputs, _ = random_layer(3)
    keep = torch.arange(9)
    copied = torch.cat([inputs[:, :9], inputs[:, :3]], 1)
    halves = [half.T @ half for half in copied.chunk(2)]
    assert best_ridge(weight, (halves[0], halves[1]), keep) == RIDGES[0]
    noise = torch.randn(20, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    halves = [half.T @ half for half in noise.chunk(2)]
    assert best_ridge(weight, (halves[0], halves[1]), keep) >= 0.1


def test_halved_moments_merge() -> None:
    rows = torch.randn(3, 10, 4, dtype=torch.float64)
    one, other, whole = (HalvedMoments(None) for _ in range(3))  # type: ignore[arg-type]  # no graph is observed
    one.update(rows[0])
    for part in rows[1:]:
        other.update(part)
    for part in rows:
        whole.update(part)
    one.merge(other)
    flat = rows.flatten(0, 1)
    assert (one.tokens, one.counts) == (30, [15, 15])
    torch.testing.assert_close(one.second(False), flat.T @ flat)
    torch.testing.assert_close(one.second(True), (flat - flat.mean(0)).T @ (flat - flat.mean(0)))
    torch.testing.assert_close(one.second(True, 0), whole.second(True, 0))
    torch.testing.assert_close(one.mean, flat.mean(0))


def test_contributions_add_up() -> None:
    weight, inputs, moment = random_layer(2)
    parts = torch.stack([inputs[:, 3 * i : 3 * i + 3] @ weight[:, 3 * i : 3 * i + 3].T for i in range(4)])
    torch.testing.assert_close(contributions(weight, moment, 4), torch.einsum("ito,jto->ij", parts, parts))
    with pytest.raises(NumericsError, match="12 columns do not stand in 5 blocks"):
        contributions(weight, moment, 5)
    with pytest.raises(NumericsError, match="needed"):
        refit_columns(weight, moment[:3], torch.arange(2))


def test_scores_and_biases_are_those_of_the_formula(patient: MakePatient) -> None:
    """Of one attention, observed whole: norms of what heads add, and weight and bias of the regression."""
    subject = patient("bert")
    (site, *_) = sites(subject)
    output = site.part.o
    assert output is not None
    assert output.bias is not None
    rows = [_value(subject.graph, output.input, batch) for batch in subject.data.calibration]
    a = torch.cat([row.flatten(0, 1) for row in rows]).double()
    weight, bias = (subject.graph.tensor(name).detach().double() for name in (output.weight, output.bias))
    fewer = drop(subject, keep=2, blocks=0, criterion="activation")
    parts = [(a[:, 16 * i : 16 * i + 16] @ weight[:, 16 * i : 16 * i + 16].T).norm(dim=1) for i in range(4)]
    wanted = [float(part.square().mean().sqrt()) for part in parts]
    (decision,) = fewer.plan.decisions
    assert decision.scores == pytest.approx(wanted)
    assert decision.keep == tuple(sorted(sorted(range(4), key=lambda i: -wanted[i])[:2]))
    columns = torch.cat([a[:, 16 * i : 16 * i + 16] for i in decision.keep], 1)
    columns = torch.cat([columns, torch.ones(len(a), 1, dtype=a.dtype)], 1)
    solution = torch.linalg.lstsq(columns, a @ weight.T + bias, driver="gelsd").solution
    found = [fewer.graph.tensor(name).detach().double() for name in (output.weight, output.bias)]
    y = columns @ solution
    mine = columns[:, :-1] @ found[0].T + found[1]
    wanted_output = a @ weight.T + bias
    plain = columns[:, :-1] @ torch.cat([weight[:, 16 * i : 16 * i + 16] for i in decision.keep], 1).T + bias
    errors = [float((value - wanted_output).norm()) for value in (y, mine, plain)]
    assert errors[0] <= errors[1] < errors[2]  # least squares, with a penalty on the change, unchanged
    torch.testing.assert_close(mine.mean(0), wanted_output.mean(0), rtol=1e-4, atol=1e-4)  # the bias takes up the mean
    magnitude = drop(subject, keep=2, blocks=0, criterion="magnitude", refit=False).plan.decisions[0]
    assert magnitude.scores == pytest.approx([float(part.norm()) for part in weight.chunk(4, 1)])
    assert magnitude.loss is None


def _value(graph: Graph, node: Any, batch: dict[str, Tensor]) -> Tensor:
    sample = Sample(node, limit=1 << 20)
    observe(graph, [batch], {"x": sample})
    return sample.values()[0][None]


# -- trained models -----------------------------------------------------------------------------------------------


def held_out_loss(subject: Trained, **fields: Any) -> float:
    assert subject.held_out is not None
    return subject.operate({"drop_heads": fields}).loss(subject.held_out)


@pytest.mark.parametrize(("name", "unit"), [("tiny_llama", "group"), ("tiny_llama", "query"), ("tiny_mixtral", "query")])
def test_the_default_beats_chance_and_the_refit_none(name: str, unit: str, request: pytest.FixtureRequest) -> None:
    subject: Trained = request.getfixturevalue(name)
    chosen = held_out_loss(subject, ratio=0.5, unit=unit)
    lots = [held_out_loss(subject, ratio=0.5, unit=unit, criterion="random", seed=seed) for seed in range(3)]
    assert chosen < statistics.mean(lots) - 0.05
    assert chosen < held_out_loss(subject, ratio=0.5, unit=unit, refit=False) - 0.05


def test_a_sentence_encoder_keeps_more_of_its_embeddings_than_by_lot() -> None:
    graph = trace(minilm_path(), dtype="float32")
    sentences = Path(__file__).parents[1] / "examples" / "calibration-sentences.txt"
    data = load_data(Calibration(text=sentences, unit="line", samples=64, length=32), graph)
    subject = Patient(graph, discover(graph), data)
    batch = data.held_back[0]

    @torch.no_grad()
    def distance(**fields: Any) -> float:
        found = subject.operate({"drop_heads": fields}).graph(**batch)["last_hidden_state"]
        wanted, mask = graph(**batch)["last_hidden_state"], batch["attention_mask"].bool()
        return relative_error(found[mask], wanted[mask])

    for ratio in (0.25, 0.5):
        chosen = distance(ratio=ratio)
        assert chosen < statistics.mean(distance(ratio=ratio, criterion="random", seed=seed) for seed in range(2)) - 0.02
        assert chosen < distance(ratio=ratio, refit=False) - 0.02


# -- caches and engines -------------------------------------------------------------------------------------------


def generating(module: Any, inputs: dict[str, Tensor] | None = None) -> Patient:
    graph = trace(module, task="text-generation")
    batch = inputs or {"input_ids": torch.randint(3, 90, (2, 12)), "attention_mask": torch.ones(2, 12, dtype=torch.long)}
    return Patient(graph, discover(graph), load_data([batch] * 2, graph))


@pytest.mark.parametrize("name", ["qwen3", "gpt2", "gemma3"])
def test_caches_have_the_heads_that_stay(name: str) -> None:
    subject = generating(causal(name))
    step = DropHeads(ratio=0.5, blocks="1:3", refit=False, criterion="random")
    fewer = drop(subject, ratio=0.5, blocks="1:3", refit=False, criterion="random")
    check_caches(step, fewer.graph, fewer.data.calibration)
    assert error(fewer.graph, silenced(subject, fewer.plan).graph, subject) < LOSSLESS
    for ports, role in ((fewer.graph.inputs, PAST), (fewer.graph.outputs, PRESENT)):
        heads = [port.shape[1] for port in ports if port.role == role]
        whole = sites(subject)[0].part.kv_heads
        assert heads == [whole] * 2 + [whole // 2] * 4 + [whole] * 2
    assert all(fewer.graph.example[port.name].shape[1] == port.shape[1] for port in fewer.graph.inputs if port.role == PAST)


def test_encoder_decoders_lose_heads_of_both_attentions() -> None:
    """T5: position biases are made in the first block and read by all, so that their heads are selected where they are read."""
    inputs = encoder_inputs("t5", 2) | {"decoder_input_ids": torch.randint(3, 90, (2, 6))}
    subject = generating(conditional("t5"), inputs)
    fewer = drop(subject, ratio=0.5, refit=False, criterion="random")
    assert len(fewer.plan.decisions) == 6
    assert error(fewer.graph, silenced(subject, fewer.plan).graph, subject) < LOSSLESS
    assert {port.shape[1] for port in (*fewer.graph.inputs, *fewer.graph.outputs) if port.role} == {2}
    check_caches(DropHeads(ratio=0.5), fewer.graph, fewer.data.calibration)


TEXT: dict[str, Any] = {"text": MODELS / "calibration.txt", "samples": 4, "length": 32}


@pytest.mark.parametrize(
    ("backend", "kernel"), [({}, "Attention"), ({"caches": "shared"}, "com.microsoft.GroupQueryAttention")]
)
def test_decoders_with_fewer_heads_compile_and_generate(backend: dict[str, Any], kernel: str, tmp_path: Path) -> None:
    """Layers differ, and weights of four bits lie behind."""
    module: Any = causal("qwen3", layers=3)
    batches = [{"input_ids": torch.randint(3, 90, (2, 16)), "attention_mask": torch.ones(2, 16, dtype=torch.long)}] * 2
    steps = [{"drop_heads": {"ratio": 0.5, "blocks": 1}}, {"quantize": {"scheme": "int4", "group": 16}}]
    model = surgeon.compile(
        module, steps, task="text-generation", calibration=batches, output=tmp_path / "out", progress=False,
        backend={"onnxruntime": {"accuracy_level": 0, **backend}},
    )  # fmt: skip
    assert model.artifact is not None
    assert model.artifact.details["operators"][kernel] == 3
    plain = surgeon.compile(module, steps, task="text-generation", calibration=batches, backend=None, progress=False)
    ids = torch.tensor([[5, 9, 20, 31]])
    found, wanted = model.generate(ids, max_new_tokens=8), plain.generate(ids, max_new_tokens=8)
    assert torch.equal(found, wanted)


def test_genai_takes_equal_layers_only() -> None:
    from surgeon.backends._onnx_genai import configuration, refusals

    subject = generating(causal("qwen3"))
    equal = drop(subject, ratio=0.5).graph
    assert refusals(equal) == []
    assert configuration(equal, 1)["model"]["decoder"]["num_key_value_heads"] == 1
    assert "(1 heads of 16, 2 heads of 16)" in refusals(drop(subject, ratio=0.5, blocks=1).graph)[0].reason


@pytest.mark.parametrize(
    ("family", "config"), [("Llama", {}), ("Qwen2", {}), ("Qwen3", {"head_dim": 16})]
)
def test_checkpoints_say_how_many_heads_there_are(family: str, config: dict[str, Any], tmp_path: Path) -> None:
    """Half of the heads, not heads of half the size: shapes alone would allow both."""
    import transformers as tf

    from surgeon.backends.huggingface import HuggingFace

    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 99}
    torch.manual_seed(0)
    made = getattr(tf, f"{family}Config")(**shape, intermediate_size=96, max_position_embeddings=64, pad_token_id=0, **config)
    batch = {"input_ids": torch.randint(0, 99, (2, 7)), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    graph = trace(getattr(tf, f"{family}ForCausalLM")(made).eval(), batch)
    subject = Patient(graph, discover(graph), load_data([batch], graph))
    for fields, heads in (({"keep": 2}, (4, 2)), ({"keep": 4, "unit": "query"}, (4, 4))):
        fewer = drop(subject, **fields)
        folder = tmp_path / str(heads[1])
        folder.mkdir()
        artifact: Any = HuggingFace().lower(fewer.graph, folder)
        model = artifact.model()
        assert (model.config.num_attention_heads, model.config.num_key_value_heads) == heads
        with torch.no_grad():
            assert relative_error(artifact.run(batch)["logits"], fewer.graph(**batch)["logits"]) < 1e-5
    (refusal, *_) = HuggingFace().refuses(drop(subject, keep=2, blocks=0).graph)
    assert refusal.node == "model.layers.0.self_attn.q_proj.weight"
    assert "one number for all layers" in refusal.reason


def test_checkpoints_without_a_size_of_heads_are_refused(patient: MakePatient) -> None:
    from surgeon.backends.huggingface import HuggingFace

    (refusal, *_) = HuggingFace().refuses(drop(patient("bert"), ratio=0.5).graph)
    assert refusal.node == "encoder.layer.0.attention.self.query.weight"
    assert "no field of the configuration of BertModel gives anything but [64, 64]" in refusal.reason


def test_a_saved_plan_is_repeated_with_its_refit(patient: MakePatient) -> None:
    subject = patient("gpt2")
    fewer = drop(subject, ratio=0.25)
    plan = DropHeadsPlan.model_validate_json(fewer.plan.model_dump_json())
    again = drop(subject, plan, ratio=0.25)
    assert again.graph.fingerprint(weights=True) == fewer.graph.fingerprint(weights=True)
    edited = plan.model_copy(update={"decisions": (replace_keep(plan.decisions[0], (1, 3)), *plan.decisions[1:])})
    assert [site.part.heads for site in sites(drop(subject, edited, ratio=0.25))] == [2, 3, 3]


def replace_keep(decision: KeepHeads, keep: tuple[int, ...]) -> KeepHeads:
    return decision.model_copy(update={"keep": keep})
