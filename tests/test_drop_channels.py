"""``drop_channels``: a rotation changes nothing, what is not used goes without loss, what varies least costs least."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from surgeon.accounting import parameter_count
from surgeon.backends.huggingface import HuggingFace
from surgeon.backends.onnxruntime import OnnxRuntime
from surgeon.channel_axes import Channels, find_channels
from surgeon.channel_moments import ChannelMoments
from surgeon.contract import Plan
from surgeon.data import load_data
from surgeon.discovery import discover
from surgeon.errors import LowerError, PlanError
from surgeon.numerics import NumericsError, kept_energy, principal_basis, read_columns, zero_sum_basis
from surgeon.observe import observe
from surgeon.registry import make_pass
from surgeon.rewrite import Editor
from surgeon.tracing import trace
from surgeon.verify import compare_artifact, relative_error
from tests import families
from tests.conftest import MODELS, Patient, Trained

MakePatient = Callable[[str], Patient]


def drop(subject: Patient, plan: Any = None, **fields: Any) -> Patient:
    return subject.checked({"drop_channels": fields}, plan)


def traced(module: nn.Module, inputs: dict[str, Tensor]) -> Patient:
    graph = trace(module, inputs)
    return Patient(graph, discover(graph), load_data([inputs], graph))


def family(name: str, dtype: torch.dtype = torch.float64) -> tuple[Patient, dict[str, Tensor]]:
    module, inputs = families.FAMILIES[name].build()
    inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}
    subject = traced(module.to(dtype), inputs)
    if dtype == torch.float64:  # norms of the library compute in float32
        editor = Editor(subject.graph)
        for node in subject.graph.module.graph.nodes:
            if node.kwargs.get("dtype") == torch.float32:
                node.update_kwarg("dtype", dtype)
                editor.touch(node)
        graph = editor.finish()
        subject = Patient(graph, discover(graph), subject.data)
    return subject, inputs


def outputs(subject: Patient, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    with torch.no_grad():
        return subject.graph(**inputs)


# -- numerics -----------------------------------------------------------------------------------------------------


def sample(tokens: int = 60, width: int = 12, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator, dtype=torch.float64)
    return torch.randn(tokens, width, generator=generator, dtype=torch.float64) @ mix


def test_the_basis_is_that_of_the_singular_vectors() -> None:
    x = sample()
    basis = principal_basis(x.T @ x, 5, centred=False)
    wanted = np.linalg.svd(x.numpy())[2][:5].T
    np.testing.assert_allclose(basis.numpy() @ basis.numpy().T, wanted @ wanted.T, atol=1e-10)
    singular = np.linalg.svd(x.numpy(), compute_uv=False)
    np.testing.assert_allclose(kept_energy(x.T @ x, basis), (singular[:5] ** 2).sum() / (singular**2).sum(), rtol=1e-12)


@pytest.mark.parametrize("width", [2, 5, 12])
def test_what_is_centred_stays_centred(width: int) -> None:
    x = sample()
    x = x - x.mean(1, keepdim=True)
    basis = principal_basis(x.T @ x, width, centred=True)
    narrow = x @ basis
    assert float(narrow.sum(1).abs().max()) < 1e-10
    singular = np.linalg.svd(x.numpy(), compute_uv=False)
    np.testing.assert_allclose(kept_energy(x.T @ x, basis), (singular[: width - 1] ** 2).sum() / (singular**2).sum())
    if width == 12:
        torch.testing.assert_close(narrow @ basis.T, x, rtol=0, atol=1e-10)


def test_the_zero_sum_basis_is_orthonormal() -> None:
    for size in (2, 3, 7):
        basis = zero_sum_basis(size)
        torch.testing.assert_close(basis.T @ basis, torch.eye(size - 1, dtype=torch.float64))
        assert float(basis.sum(0).abs().max()) < 1e-15 * size


def test_what_readers_guess_is_least_squares() -> None:
    """Of all rows stacked on the penalty's, by NumPy, times the root of the energy that stays."""
    x, other = sample(), sample(seed=1)
    basis = principal_basis(other.T @ other, 5, centred=False)
    found = read_columns(x.T @ x, basis, 60, refit=True).numpy() / kept_energy(x.T @ x, basis) ** 0.5
    z = (x @ basis).numpy()
    penalty = np.sqrt(5 / 2 * float(x.square().mean()))
    gone = x.numpy() - z @ basis.numpy().T
    change = np.linalg.lstsq(np.vstack([z, penalty * np.eye(5)]), np.vstack([gone, np.zeros((5, 12))]), rcond=None)[0]
    np.testing.assert_allclose(found, basis.numpy() + change.T, atol=1e-10)
    plain = read_columns(x.T @ x, basis, 60, refit=False)
    torch.testing.assert_close(plain, basis * kept_energy(x.T @ x, basis) ** 0.5)


def test_moments_that_are_no_numbers_are_refused() -> None:
    moment = torch.eye(4, dtype=torch.float64)
    moment[1, 1] = torch.nan
    for call in (
        lambda: principal_basis(moment, 2, centred=False),
        lambda: read_columns(moment, torch.eye(4, dtype=torch.float64)[:, :2], 3, refit=True),
    ):
        with pytest.raises(NumericsError, match="moment: 1 of 16"):
            call()


# -- a rotation changes nothing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma", "olmo", "cohere", "gpt2", "phi", "falcon", "nanochat", "bitnet"])
def test_a_rotation_alone_is_exact(name: str) -> None:
    """In float64, to its rounding: RMS and layer norms, with 1 + w, without gain, with offsets, tied tables, fused weights."""
    subject, inputs = family(name)
    result = drop(subject, ratio=0)
    made = make_pass({"drop_channels": {"ratio": 0}})
    assert made.exact(result.plan)
    assert made.summary(result.plan) == "stream rotated, and as wide as before"
    wanted, found = outputs(subject, inputs), outputs(result, inputs)
    assert relative_error(found["logits"], wanted["logits"]) < 1e-12
    assert found["logits"].dtype == torch.float64
    (channels,) = (entry for _, entry in find_channels(subject.structure))
    assert isinstance(channels, Channels)
    moved = [node for node in channels.stored if "norm" not in str(node.target) and "ln" not in str(node.target)]
    names = {str(node.target) for node in moved if len(subject.graph.tensor(str(node.target)).shape) > 1}
    assert names
    for key in names:  # every matrix did change
        assert not torch.allclose(subject.graph.tensor(key), result.graph.tensor(key), atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits_are_rotated_to_their_rounding(dtype: torch.dtype) -> None:
    subject, inputs = family("llama", dtype)
    result = drop(subject, ratio=0)
    assert result.graph.tensor("model.layers.0.mlp.up_proj.weight").dtype == dtype
    error = relative_error(outputs(result, inputs)["logits"], outputs(subject, inputs)["logits"])
    assert error < (2e-2 if dtype == torch.bfloat16 else 2e-3)


def test_a_narrow_model_is_the_one_written_out(tiny_llama: Trained) -> None:
    """A model of the library with the smaller hidden size, its weights computed by NumPy from the formulas."""
    subject = Trained(tiny_llama.graph, tiny_llama.structure, tiny_llama.data, held_out=tiny_llama.held_out)
    result = drop(subject, keep=96, refit=False)
    source = tf.AutoModelForCausalLM.from_pretrained(MODELS / "tiny-llama", dtype=torch.float32)
    streams: list[np.ndarray] = []
    hooks = [m.register_forward_hook(lambda _, args, __: streams.append(args[0].detach().double().numpy().reshape(-1, 128)))
             for n, m in source.named_modules() if n.endswith("norm")]  # fmt: skip
    with torch.no_grad():
        for batch in subject.data.calibration:
            source(**{**batch, "use_cache": False})
    for hook in hooks:
        hook.remove()
    assert all(bool(batch["attention_mask"].all()) for batch in subject.data.calibration)
    count = len(hooks)
    moments = []
    for place in range(count):
        x = np.concatenate(streams[place::count])
        n = x / np.sqrt((x**2).mean(1, keepdims=True))
        moments.append(n.T @ n)
    u = np.linalg.eigh(sum(moments))[1][:, ::-1][:, :96]
    s = np.sqrt(96 / 128)
    order = [n.removesuffix(".weight") for n, _ in source.named_parameters() if "norm" in n]
    shares = [np.trace(u.T @ m @ u) / np.trace(m) for m in moments]
    factor = dict(zip(sorted(order, key=place_of), np.sqrt(shares), strict=True))
    state = source.state_dict()
    narrow = tf.LlamaForCausalLM(
        tf.LlamaConfig(**{**source.config.to_dict(), "hidden_size": 96, "head_dim": source.config.hidden_size // 4})
    )
    made = {}
    for name, tensor in state.items():
        w = tensor.double().numpy()
        reads = next((front for front, readers in READERS.items() if any(r in name for r in readers)), None)
        if "norm" in name:
            new = np.ones(96)
        elif "embed_tokens" in name:
            new = s * w @ u
        elif reads is None:
            new = s * u.T @ w
        else:
            front = reads if reads == "model.norm" else name.split(".self_attn")[0].split(".mlp")[0] + f".{reads}"
            gain = state[f"{front}.weight"].double().numpy()
            new = w @ (gain[:, None] * u) / s * factor[front]
        made[name] = torch.from_numpy(new).float()
    narrow.load_state_dict(made)
    assert subject.held_out is not None
    with torch.no_grad():
        wanted = narrow.eval()(**subject.held_out, use_cache=False).logits
    assert relative_error(outputs(result, subject.held_out)["logits"], wanted) < 1e-4


READERS = {
    "input_layernorm": ("q_proj", "k_proj", "v_proj"),
    "post_attention_layernorm": ("gate_proj", "up_proj"),
    "model.norm": ("lm_head",),
}


def place_of(name: str) -> tuple[int, int]:
    """The order in which the norms of a llama are run."""
    parts = name.split(".")
    return (int(parts[2]), "post" in name) if len(parts) > 3 else (1000, 0)


# -- what is trained ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_mixtral"])
def test_directions_cost_less_than_channels_and_chance(request: pytest.FixtureRequest, name: str) -> None:
    subject: Trained = request.getfixturevalue(name)
    assert subject.held_out is not None
    whole = subject.loss(subject.held_out)
    for ratio in (0.1, 0.25):
        lost = {
            key: drop(subject, ratio=ratio, **fields).loss(subject.held_out) - whole
            for key, fields in {
                "refit": {}, "principal": {"refit": False}, "activation": {"criterion": "activation"},
                "random": {"criterion": "random"},
            }.items()
        }  # fmt: skip
        assert 0 < lost["refit"] < lost["principal"] < 0.5 * lost["activation"] < 0.5 * lost["random"], lost


def test_energy_is_what_is_kept(tiny_llama: Trained) -> None:
    energies = [drop(tiny_llama, keep=keep).plan.decisions[0].energy for keep in (64, 96, 120, 128)]
    assert energies == sorted(energies)
    assert energies[-1] == pytest.approx(1)
    assert energies[0] < 0.9


# -- channels -----------------------------------------------------------------------------------------------------


def test_the_most_active_channels_stay_and_gains_follow(tiny_llama: Trained) -> None:
    """Sums, choice and factor made anew from the values of the norms."""
    result = drop(tiny_llama, keep=96, criterion="activation")
    (channels,) = (entry for _, entry in find_channels(tiny_llama.structure))
    assert isinstance(channels, Channels)
    gained = {node: next(iter(node.users)) for node in channels.norms}
    watch = {node.name: ChannelMoments(norm, gained[node], second=False) for node, norm in channels.norms.items()}
    observe(tiny_llama.graph, tiny_llama.data.calibration, watch)
    names = {node.name: next(str(v.target) for v in gained[node].all_input_nodes if v.op == "get_attr") for node in gained}
    (decision,) = result.plan.decisions
    keep = list(decision.keep)
    scores = sum(w.absolute for w in watch.values())
    assert sorted(scores.argsort(descending=True)[:96].tolist()) == keep
    for key, moments in watch.items():
        factor = (moments.energy[keep].sum() / (96 * moments.tokens)).sqrt()
        wanted = tiny_llama.graph.tensor(names[key])[keep].double() * factor
        torch.testing.assert_close(result.graph.tensor(names[key]).double(), wanted, rtol=1e-6, atol=0)
    table = "model.embed_tokens.weight"
    assert torch.equal(result.graph.tensor(table), tiny_llama.graph.tensor(table)[:, keep])


def test_silent_channels_go_without_loss() -> None:
    """The norms' factor makes up for the smaller number of channels: those that nothing writes to, of sandwiched norms too."""
    module, inputs = families.FAMILIES["gemma2"].build()
    silent = [3, 4, 17, 30]
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "embed_tokens" in name:
                parameter[:, silent] = 0
            elif "o_proj" in name or "down_proj" in name:
                parameter[silent] = 0
    subject = traced(module, inputs)
    result = drop(subject, keep=28, criterion="activation")
    assert set(result.plan.decisions[0].keep) == set(range(32)) - set(silent)
    assert relative_error(outputs(result, inputs)["logits"], outputs(subject, inputs)["logits"]) < 2e-5


def test_norms_without_a_gain_are_named() -> None:
    subject, _ = family("olmo", torch.float32)
    (note,) = drop(subject, keep=16, criterion="activation").plan.notes
    assert note.startswith("stream: no gain stands behind layer_norm_default, ")
    assert not drop(subject, keep=16).plan.notes


def test_random_is_by_lot_and_needs_no_data(patient: MakePatient) -> None:
    subject = patient("llama")
    assert not make_pass({"drop_channels": {"keep": 8, "criterion": "random"}}).observers(subject.structure)
    kept = {drop(subject, keep=8, criterion="random", seed=seed).plan.decisions[0].keep for seed in range(4)}
    assert len(kept) == 4


# -- tables that are tied -----------------------------------------------------------------------------------------


def test_a_tie_is_kept_by_channels_and_undone_by_directions(tiny_mixtral: Trained) -> None:
    wide, table = parameter_count(tiny_mixtral.graph), 1024 * 96
    cut = drop(tiny_mixtral, keep=96, criterion="activation")
    turned = drop(tiny_mixtral, keep=96)
    assert parameter_count(cut.graph) == wide * 96 // 128  # every tensor has the width once
    assert parameter_count(turned.graph) == wide * 96 // 128 + table
    assert not cut.plan.notes
    assert turned.plan.notes == (
        "stream: model.embed_tokens.weight both writes to the stream and reads it; it becomes two tensors",
    )


# -- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "fields", "reason"),
    [
        ("gemma2", {}, r"stream: left alone: add_tensor_\d+ .* takes the result of the norm .*activation needs no rotation"),
        ("bloom", {}, "takes the result of the norm layer_norm_default "),
        ("openai-gpt", {}, "reads the stream without a norm in front"),
        ("bert", {"criterion": "activation"}, "cls.predictions.transform.dense.weight has the stream's channels along two"),
        ("dinov2", {"criterion": "activation"}, r"the model returns layer_norm_default_\d \(aten::layer_norm\)"),
    ],
)
def test_what_cannot_be_narrower_is_refused_by_name(name: str, fields: dict[str, Any], reason: str) -> None:
    subject, _ = family(name, torch.float32)
    with pytest.raises(PlanError, match=reason):
        drop(subject, ratio=0.5, **fields)


class Scaled(nn.Module):
    """A llama-like layer whose output is scaled channel by channel, or whose stream is read in another way."""

    def __init__(self, way: str) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.way = way
        self.table = nn.Embedding(11, 16)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"norm": nn.RMSNorm(16), "up": nn.Linear(16, 24), "down": nn.Linear(24, 16)}) for _ in range(3)
        )
        self.scales = nn.ParameterList(torch.rand(16, generator=generator) + 0.5 for _ in range(3))
        self.norm, self.head = nn.RMSNorm(16), nn.Linear(16, 11)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        for layer, scale in zip(self.layers, self.scales, strict=True):
            y = layer["down"](torch.nn.functional.gelu(layer["up"](layer["norm"](x))))  # type: ignore[index,operator]
            x = x + (y * scale if self.way == "scale" else y)
        x = self.norm(x)
        if self.way == "softmax":
            x = x.softmax(-1)
        if self.way == "number":
            x = x + 1.0
        if self.way == "halves":
            x = torch.cat([x[..., 8:], x[..., :8]], -1)
        return self.head(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("way", "reason", "channels"),
    [
        ("scale", "multiplies the stream channel by channel", True),
        ("softmax", "reads the stream's channels .*, and is no sum, norm or product", False),
        ("number", "adds a number to every channel", True),
        ("halves", "slice", False),
    ],
)
def test_what_works_on_single_channels_is_not_rotated(way: str, reason: str, channels: bool) -> None:
    ids = {"ids": torch.arange(10).reshape(2, 5)}
    torch.manual_seed(0)
    subject = traced(Scaled(way).eval(), ids)
    with pytest.raises(PlanError, match=reason):
        drop(subject, ratio=0.5)
    if channels:
        assert drop(subject, keep=8, criterion="activation").plan.decisions
    else:
        with pytest.raises(PlanError, match=reason):
            drop(subject, keep=8, criterion="activation")


def test_the_same_layer_without_any_of_it_is_rotated() -> None:
    ids = {"ids": torch.arange(10).reshape(2, 5)}
    torch.manual_seed(0)
    subject = traced(Scaled("").eval().double(), ids)
    (wanted,), (found,) = (outputs(each, ids).values() for each in (subject, drop(subject, ratio=0)))
    assert relative_error(found, wanted) < 1e-13


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"left": 20, "width": 24}, "keeps 20 of 24 channels, it has 32"),
        ({"left": 40}, "keeps 40 of 32 channels, it has 32"),
        ({"left": 1}, "left is 1, at least 2"),
        ({"keep": (0, 1)}, "lists channels; criterion principal keeps directions"),
    ],
)
def test_plans_that_do_not_fit_are_refused(change: dict[str, Any], reason: str) -> None:
    subject, _ = family("llama", torch.float32)
    with pytest.raises(PlanError, match=f"stream: .*{reason}"):
        drop(subject, edited(drop(subject, ratio=0.5).plan, change), ratio=0.5)


@pytest.mark.parametrize("keep", [(3, 1, 2), (0, 1, 32), (0, 1)])
def test_channels_of_a_plan_are_ascending_and_there(keep: tuple[int, ...]) -> None:
    subject, _ = family("llama", torch.float32)
    fields = {"keep": 3, "criterion": "random"}
    with pytest.raises(PlanError, match="stream: keep must be 3 ascending channels of 0 to 31"):
        drop(subject, edited(drop(subject, **fields).plan, {"keep": keep}), **fields)


def edited(plan: Plan[Any], change: dict[str, Any]) -> Plan[Any]:
    return plan.model_copy(update={"decisions": tuple(d.model_copy(update=change) for d in plan.decisions)})


def test_more_than_there_is_is_refused() -> None:
    subject, _ = family("llama", torch.float32)
    with pytest.raises(PlanError, match="keep 33 asked, it has 32 channels"):
        drop(subject, keep=33)
    result = drop(subject, keep=32, criterion="activation")
    assert result.plan.notes == ("stream: all 32 channels stay",)


# -- backends -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "tied"), [("tiny_llama", False), ("tiny_mixtral", True)])
@pytest.mark.parametrize("criterion", ["principal", "activation"])
def test_a_checkpoint_says_the_smaller_hidden_size(
    request: pytest.FixtureRequest, tmp_path: Path, name: str, tied: bool, criterion: str
) -> None:
    subject: Trained = request.getfixturevalue(name)
    result = drop(subject, ratio=0.25, criterion=criterion)
    artifact = HuggingFace().lower(result.graph, tmp_path)
    assert artifact.details["configuration"]["hidden_size"] == {"before": 128, "after": 96}
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert loaded.config.hidden_size == 96
    assert loaded.config.tie_word_embeddings is (tied and criterion == "activation")
    assert subject.held_out is not None
    with torch.no_grad():
        logits = loaded.eval()(**subject.held_out, use_cache=False).logits
    assert relative_error(logits, outputs(result, subject.held_out)["logits"]) < 1e-5


def test_a_checkpoint_that_a_new_bias_would_need_is_refused(tmp_path: Path) -> None:
    """The head of GPT-2 has no bias for the offset of the norm in front of it."""
    subject, _ = family("gpt2", torch.float32)
    with pytest.raises(LowerError, match=r"transformer\.wte\.bias: a pass added it"):
        HuggingFace().lower(drop(subject, ratio=0.25).graph, tmp_path)


def test_a_checkpoint_whose_class_scales_by_its_hidden_size_is_refused(tmp_path: Path) -> None:
    """Gemma multiplies its embeddings by the root of the hidden size, which a narrower one changes."""
    subject, _ = family("gemma", torch.float32)
    with pytest.raises(LowerError, match=r"embed_scale: GemmaForCausalLM makes it of its configuration: 4\.89898 under"):
        HuggingFace().lower(drop(subject, ratio=0.25).graph, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_mixtral"])
def test_onnx_runtime_runs_a_narrow_stream(request: pytest.FixtureRequest, tmp_path: Path, name: str) -> None:
    subject: Trained = request.getfixturevalue(name)
    result = drop(subject, ratio=0.25)
    batch = {key: value[:2] for key, value in (subject.held_out or {}).items()}
    compare_artifact(OnnxRuntime().lower(result.graph, tmp_path), result.graph, [batch], 1e-3)
