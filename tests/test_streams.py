"""Models of several residual streams, or of blocks that are not attention and FFN, against their configurations."""

from __future__ import annotations

import copy
import io
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from surgeon.accounting import memory
from surgeon.contract import Observer
from surgeon.data import load_data
from surgeon.discovery import discover
from surgeon.errors import DiscoverError, PlanError
from surgeon.graph import Graph
from surgeon.inspection import inspection
from surgeon.moments import SecondMoment
from surgeon.observe import observe
from surgeon.passes.drop_blocks import DropBlock, DropBlocksPlan
from surgeon.passes.low_rank import LowRank
from surgeon.progress import Progress
from surgeon.registry import make_backend
from surgeon.rewrite import Editor
from surgeon.source import load_source
from surgeon.structure import Block, Selection, Structure
from surgeon.sweep import run_pass
from surgeon.tracing import trace
from surgeon.verify import relative_error
from tests.conftest import Patient
from tests.families_streams import FAMILIES, MARKED, Family
from tests.families_streams import traced as found

NAMES = [pytest.param(name, marks=[getattr(pytest.mark, MARKED[name])] if name in MARKED else []) for name in FAMILIES]


def patient(name: str) -> Patient:
    """The family with its example, twice, as data."""
    _, graph, structure = found(name)
    return Patient(graph, structure, load_data([dict(graph.example)] * 2, graph))


def parts(block: Block) -> tuple[tuple[str, tuple[Any, ...]], ...]:
    """What was recognised in a block, as the families state it."""
    listed: list[tuple[str, tuple[Any, ...]]] = []
    for region in block.regions:
        for a in region.attention:
            listed.append(("cross" if a.cross else "self", (a.heads, a.kv_heads, a.head_dim)))
        listed.extend(("ffn", (ffn.width, ffn.activation)) for ffn in region.ffn)
    return tuple(listed)


# -- against the configuration ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_streams_and_blocks_are_what_the_configuration_says(name: str) -> None:
    family, _, structure = found(name)
    assert [stream.label for stream in structure.streams] == list(family.streams)
    for position, (stream, runs) in enumerate(zip(structure.streams, family.streams.values(), strict=True)):
        expected = [(run.kind, run.parts) for run in runs for _ in range(run.count)]
        assert [(block.kind, parts(block)) for block in stream.blocks] == expected
        assert {block.stream for block in stream.blocks} == {position}
    assert [block.index for block in structure.blocks] == list(range(len(structure.blocks)))
    assert len(structure.unrecognised) == family.opaque


@pytest.mark.parametrize("name", NAMES)
def test_blocks_of_a_stream_join_up(name: str) -> None:
    _, _, structure = found(name)
    for stream in structure.streams:
        assert stream.cuts[0] is stream.blocks[0].entry
        for block in stream.blocks:
            assert block.entry in stream.cuts
            assert block.exit in stream.cuts
            assert block.regions[0].entry is block.entry
            assert block.regions[-1].exit is block.exit
            for first, second in zip(block.regions, block.regions[1:], strict=False):
                assert first.exit is second.entry
        for before, after in zip(stream.blocks, stream.blocks[1:], strict=False):
            joined = [t for t in stream.transitions if t.entry is before.exit and t.exit is after.entry]
            assert before.exit is after.entry or len(joined) == 1


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_is_in_exactly_one_part(name: str) -> None:
    family, graph, structure = found(name)
    whole = {node for node in graph.module.graph.nodes if node.op == "get_attr"}
    read: list[set[Any]] = []
    for stream in structure.streams:
        read += [whole.intersection(nodes) for nodes in (stream.prefix, stream.suffix)]
        read += [whole.intersection(region.nodes) for region in stream.transitions]
        for block in stream.blocks:
            read.append(whole.intersection(block.nodes))
            assert set(block.nodes).issuperset(node for region in block.regions for node in region.nodes)
    placed = [node for part in read for node in part]
    if name != "mmdit":  # attention of both streams to both belongs to the layers of both
        assert len(placed) == len(set(placed))
    shown = inspection(graph, structure)
    ends = [part for stream in shown.streams for part in (stream.prefix, stream.between, stream.suffix)]
    total = sum(part.parameters for part in (*ends, *shown.blocks, shown.context))
    assert total - shown.shared_parameters == shown.parameters
    used = {memory(tensor)[0] for tensor in graph.parameters().values()}  # storages: a weight may be read in parts
    trained = {memory(p): p.numel() for p in family.module.parameters()}
    unread = {key: count for key, count in trained.items() if key[0] not in used}
    assert shown.parameters == sum(trained.values()) - sum(unread.values())
    assert not unread or name in UNREAD


UNREAD = {
    "detr", "flava", "hiera", "mmdit", "perceiver", "wav2vec2", "conformer", "albert", "llava", "bert_to_bert", "whisper",
}  # fmt: skip
"""Families with parameters that this call does not use, such as a pooler or mask embeddings."""


# -- deleting a layer ---------------------------------------------------------------------------------------------


def without(family: Family, index: int) -> nn.Module:
    """The source model without the layer of a block."""
    result = copy.deepcopy(family)
    for layers in result.layers:
        if index < len(layers):
            del layers[index]
            return result.module
        index -= len(layers)
    raise AssertionError(index)


def chosen(*names: str) -> list[Any]:
    return [parameter for parameter in NAMES if parameter.values[0] in names]


DELETED = chosen(
    "t5", "bart", "pegasus", "whisper", "clip", "siglip", "mamba2", "lfm2", "convnext", "swin", "timm_convnext",
    "wav2vec2", "conformer", "dit",
)  # fmt: skip


@pytest.mark.parametrize("name", DELETED)
def test_dropping_a_block_is_the_model_without_the_layer(name: str) -> None:
    family, graph, structure = found(name)
    assert sum(len(layers) for layers in family.layers) == len(structure.blocks)
    last = [stream.blocks[-1].index for stream in structure.streams]
    for index in {*last, 1}:
        plan = DropBlocksPlan(decisions=(DropBlock(site=f"blocks.{index}"),))
        result = patient(name).operate({"drop_blocks": {"count": 1}}, plan)
        loaded = load_source(without(family, index), dict(graph.example))
        expected = loaded.outputs(**graph.example)
        with torch.no_grad():
            for key, value in result.graph(**graph.example).items():
                torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-6)
        assert set(structure.blocks[index].weights).isdisjoint(result.graph.parameters())
        kept = [block for block in structure.blocks if block.index != index]
        assert [block.kind for block in result.structure.blocks] == [block.kind for block in kept]


def test_a_block_that_changes_the_size_of_its_stream_is_not_dropped() -> None:
    _, _, structure = found("hiera")
    first = next(block for block in structure.blocks if block.entry.meta["val"].shape != block.exit.meta["val"].shape)
    assert first.index == 1  # of the second stage
    plan = DropBlocksPlan(decisions=(DropBlock(site=first.name),))
    with pytest.raises(PlanError, match=rf"{first.name}.*another shape"):
        patient("hiera").operate({"drop_blocks": {"count": 1}}, plan)
    chosen = patient("hiera").operate({"drop_blocks": {"count": 2}})
    assert first.name not in {decision.site for decision in chosen.plan.decisions}


# -- passes on several streams ------------------------------------------------------------------------------------


class Watching(LowRank):
    """A block-scoped pass that changes nothing and keeps what it saw."""

    seen: ClassVar[dict[str, Any]] = {}

    def observers(self, structure: Structure) -> dict[str, Observer]:
        return {site.name: SecondMoment(site.part.input) for site in structure.selected_linears()}

    def plan(self, graph: Graph, structure: Structure, statistics: Any) -> Any:
        self.seen.update(statistics)
        nothing = super().plan(graph, structure.select(Selection(frozenset())), {})
        return nothing.model_copy(update={"notes": ("only watches",)})


SWEPT = chosen("t5", "clip", "llava", "detr", "mmdit", "swin", "jamba")


@pytest.mark.parametrize("name", SWEPT)
def test_a_sweep_sees_what_a_run_of_the_whole_model_sees(name: str) -> None:
    _, graph, structure = found(name)
    clone = graph.clone()
    view = discover(clone)
    step = Watching(ratio=0.5)
    step.seen.clear()
    batches = [dict(graph.example)]
    run_pass(step, Editor(clone), view, lambda: batches, None, Progress(False))
    expected = {site.name: SecondMoment(site.part.input) for site in structure.linears}
    observe(graph, batches, expected)
    assert set(step.seen) == set(expected)
    for site, observer in expected.items():
        assert observer.tokens == step.seen[site].tokens
        torch.testing.assert_close(step.seen[site].matrix, observer.matrix, rtol=0, atol=0)


@pytest.mark.parametrize("name", chosen("t5", "bart", "clip", "mmdit", "convnext"))
def test_factoring_at_full_rank_changes_nothing(name: str) -> None:
    subject = patient(name)
    result = subject.operate({"low_rank": {"ratio": 1.0}})
    assert len(result.plan.decisions) > len(subject.structure.blocks)
    compare(result.graph, subject.graph)
    assert [block.kind for block in result.structure.blocks] == [block.kind for block in subject.structure.blocks]


@pytest.mark.parametrize("name", chosen("t5", "t5_gated", "whisper", "clip", "conformer", "dit"))
def test_all_experts_active_is_the_dense_ffn(name: str) -> None:
    subject = patient(name)
    result = subject.operate({"moefy_ffn": {"experts": 4, "top_k": 4}})
    assert len(result.plan.decisions) == len(list(subject.structure.ffns()))
    compare(result.graph, subject.graph)
    assert [stream.label for stream in result.structure.streams] == [stream.label for stream in subject.structure.streams]


@pytest.mark.parametrize("name", chosen("t5", "clip", "jamba", "segformer"))
def test_quantized_linears_keep_the_streams(name: str) -> None:
    subject = patient(name)
    result = subject.operate({"quantize": {"scheme": "int8"}})
    assert [b.kind for b in result.structure.blocks] == [b.kind for b in subject.structure.blocks]
    assert result.graph.parameter_count() == subject.graph.parameter_count()
    with torch.no_grad():
        wanted, got = subject.graph(**subject.graph.example), result.graph(**subject.graph.example)
    for key, value in wanted.items():
        if value.is_floating_point():
            assert relative_error(got[key], value) < 0.1


def compare(found: Graph, wanted: Graph) -> None:
    with torch.no_grad():
        expected = wanted(**wanted.example)
        for key, value in found(**wanted.example).items():
            torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-5)


# -- views --------------------------------------------------------------------------------------------------------


def test_streams_are_shown_apart() -> None:
    _, graph, structure = found("t5")
    shown = inspection(graph, structure)
    assert [(stream.label, stream.blocks) for stream in shown.streams] == [("encoder", [0, 1, 2]), ("decoder", [3, 4])]
    text = io.StringIO()
    shown.render(Console(file=text, width=100))
    lines = [line.split("  ")[0].strip() for line in text.getvalue().splitlines()]
    order = [lines.index(word) for word in ("encoder", "blocks 0-2", "decoder", "blocks 3-4", "total")]
    assert order == sorted(order)
    page = shown.html()
    assert page.count('class="stream"') == 2
    assert all(word in page for word in ("encoder in", "decoder out", "blocks 3-4"))
    assert shown.to_dict()["streams"][1]["label"] == "decoder"


def test_what_stands_between_stages_is_shown() -> None:
    _, graph, structure = found("convnext")
    shown = inspection(graph, structure)
    widths = [16, 24, 32]
    downsampling = sum(4 * a * b + b + 2 * a for a, b in zip(widths, widths[1:], strict=False))
    assert shown.between.parameters == downsampling


# -- rules, on modules with no library behind them ----------------------------------------------------------------


def traced(module: nn.Module, **inputs: Tensor) -> Structure:
    return discover(trace(module.eval(), inputs, dynamic=dict.fromkeys(inputs)))


class Attend(nn.Module):
    """Attention of one tensor to another, with positions that are added to queries and keys."""

    def __init__(self, width: int = 32, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, source: Tensor | None = None, code: Tensor | None = None) -> Tensor:
        y = x if source is None else source
        q, k = (x, y) if code is None else (x + code, y + code)
        q, k, v = (p(t).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p, t in ((self.q, q), (self.k, k), (self.v, y)))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def ffn(width: int = 32) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 48), nn.ReLU(), nn.Linear(48, width))


class Layer(nn.Module):
    """``x + attention(norm(x))``, then ``x + ffn(norm(x))``; with ``post``, norms stand behind the sums."""

    def __init__(self, width: int = 32, *, post: bool = False) -> None:
        super().__init__()
        self.post = post
        self.attend, self.ffn = Attend(width), ffn(width)
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])

    def forward(self, x: Tensor, code: Tensor | None = None) -> Tensor:
        if self.post:
            x = self.norms[0](x + self.attend(x, code=code))
            return self.norms[1](x + self.ffn(x))
        x = x + self.attend(self.norms[0](x), code=code)
        return x + self.ffn(self.norms[1](x))


class Layers(nn.Module):
    """A stack of layers between two linears; subclasses say how it is run."""

    def __init__(self, depth: int = 3, **more: Any) -> None:
        super().__init__()
        self.start, self.end = nn.Linear(8, 32), nn.Linear(32, 5)
        self.layers = nn.ModuleList([Layer(**more) for _ in range(depth)])

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.run(self.start(x)))

    def run(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


X = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(3))


def test_a_skip_around_a_stack_is_no_sublayer() -> None:
    class Skip(Layers):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Conv1d(32, 32, 3, padding=1)

        def run(self, x: Tensor) -> Tensor:
            return x + self.last(super().run(x).transpose(1, 2)).transpose(1, 2)

    (stream,) = traced(Skip(), x=X).streams
    assert [block.kind for block in stream.blocks] == ["attention+ffn"] * 3


def test_skips_between_layers_stay_within_one_stream() -> None:
    class Horseshoe(Layers):
        def __init__(self) -> None:
            super().__init__(depth=5)
            self.joins = nn.ModuleList([nn.Linear(64, 32), nn.Linear(64, 32)])

        def run(self, x: Tensor) -> Tensor:
            first = self.layers[0](x)
            second = self.layers[1](first)
            x = self.layers[2](second)
            x = self.layers[3](self.joins[0](torch.cat([x, second], dim=-1)))
            return self.layers[4](self.joins[1](torch.cat([x, first], dim=-1)))

    (stream,) = traced(Horseshoe(), x=X).streams
    assert [block.kind for block in stream.blocks] == ["attention+ffn"] * 5
    assert [region.exit for region in stream.transitions] == [stream.blocks[3].entry, stream.blocks[4].entry]


def test_the_first_hidden_state_and_value_embeddings_enter_every_layer() -> None:
    class Mixed(Layers):
        """``x = a x + b x0`` before each layer, a skip over two layers, values with embeddings of their own."""

        def __init__(self) -> None:
            super().__init__(depth=4)
            self.scales = nn.Parameter(torch.rand(4, 2))
            self.values = nn.Embedding(9, 32)

        def forward(self, x: Tensor, ids: Tensor) -> Tensor:
            x = first = F.rms_norm(self.start(x), (32,))
            extra, skipped = self.values(ids), x
            for number, layer in enumerate(self.layers):
                if number == 3:
                    x = x + 0.5 * skipped
                x = self.scales[number, 0] * x + self.scales[number, 1] * first
                y = layer.norms[0](x)
                q, k = layer.attend.q(y), layer.attend.k(y)
                v = layer.attend.v(y) + 0.5 * extra
                x = x + layer.attend.o(F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0])
                x = x + layer.ffn(layer.norms[1](x))
                skipped = x if number == 0 else skipped
            return self.end(x)

    (stream,) = traced(Mixed(), x=X, ids=torch.tensor([[0, 1, 2, 3, 4, 5]] * 2)).streams
    assert [block.kind for block in stream.blocks] == ["attention+ffn"] * 4


@pytest.mark.parametrize("post", [False, True])
def test_positions_that_enter_every_layer_are_context(post: bool) -> None:
    class Coded(Layers):
        def forward(self, x: Tensor, code: Tensor) -> Tensor:
            x, code = self.start(x), torch.sin(code)
            for layer in self.layers:
                x = layer(x, code)
            return self.end(x)

    (stream,) = traced(Coded(post=post), x=X, code=torch.randn(2, 6, 32)).streams
    assert [block.kind for block in stream.blocks] == ["attention+norm+ffn+norm" if post else "attention+ffn"] * 3


def test_nested_residuals_around_one_layer_are_one_block() -> None:
    class Nested(Layers):
        """Every layer works on a narrow copy of the stream and adds the result to it."""

        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Layer(16) for _ in range(3)])
            self.down = nn.ModuleList([nn.Linear(32, 16) for _ in range(3)])
            self.up = nn.ModuleList([nn.Linear(16, 32) for _ in range(3)])

        def run(self, x: Tensor) -> Tensor:
            for down, layer, up in zip(self.down, self.layers, self.up, strict=True):
                x = x + up(layer(down(x)))
            return x

    (stream,) = traced(Nested(), x=X).streams
    assert [block.kind for block in stream.blocks] == ["parallel"] * 3


def test_sums_in_other_spellings() -> None:
    class Lerp(Layers):
        """``x + w (y - x)`` and ``x + w y`` in one operator each."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(2))

        def run(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = torch.lerp(x, layer.attend(x), self.weight[0])
                x = torch.addcmul(x, self.weight[1:], layer.ffn(x))
            return x

    (stream,) = traced(Lerp(), x=X).streams
    assert [block.kind for block in stream.blocks] == ["attention+ffn"] * 3


@pytest.mark.parametrize("complement", ["one minus", "negated"])
def test_gates_that_keep_a_part_of_the_state(complement: str) -> None:
    class Highway(Layers):
        """``(1 - g) x + g f(x)``, with a gate that is computed from x, as in highway networks."""

        def __init__(self) -> None:
            super().__init__()
            self.gates = nn.ModuleList([nn.Linear(32, 32) for _ in range(6)])

        def gated(self, gate: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            score = gate(x)
            taken = score.sigmoid()
            kept = 1 - taken if complement == "one minus" else (-score).sigmoid()
            return x * kept + taken * y

        def run(self, x: Tensor) -> Tensor:
            for i, layer in enumerate(self.layers):
                x = self.gated(self.gates[2 * i], x, layer.attend(layer.norms[0](x)))
                x = self.gated(self.gates[2 * i + 1], x, layer.ffn(layer.norms[1](x)))
            return x

    structure = traced(Highway(), x=X)
    (stream,) = structure.streams
    assert [block.kind for block in stream.blocks] == ["attention+ffn"] * 3
    assert not structure.unrecognised


def test_networks_for_marked_positions_are_those_of_one_sublayer() -> None:
    class Marked(Layers):
        """``x[m] += f(x[m])`` and ``x[~m] += g(x[~m])``, with marks of the positions that are given."""

        def __init__(self) -> None:
            super().__init__()
            self.others = nn.ModuleList([ffn() for _ in range(3)])

        def forward(self, x: Tensor, marks: Tensor) -> Tensor:
            x = self.start(x)
            for layer, other in zip(self.layers, self.others, strict=True):
                x = x + layer.attend(layer.norms[0](x))
                first, second = layer.ffn(layer.norms[1](x[marks])), other(layer.norms[1](x[~marks]))
                x = x.index_put((marks,), x[marks] + first)
                x = x.index_put((~marks,), second + x[~marks])
            return self.end(x)

    structure = traced(Marked(), x=X, marks=X[..., 0] > 0)
    (stream,) = structure.streams
    assert [block.kind for block in stream.blocks] == ["attention+ffn"] * 3
    assert [len(region.ffn) for block in stream.blocks for region in block.regions] == [0, 2] * 3
    assert not structure.unrecognised


def test_two_gates_that_do_not_add_up_to_one_keep_no_state() -> None:
    class Two(Layers):
        """``s(a) x + t(a) f(x)`` where s + t is not 1."""

        def __init__(self) -> None:
            super().__init__(depth=1)
            self.gate = nn.Linear(32, 32)

        def run(self, x: Tensor) -> Tensor:
            score = self.gate(x)
            return x * score.sigmoid() + score.tanh() * self.layers[0].ffn(x)

    with pytest.raises(DiscoverError, match="no residual stream"):
        traced(Two(), x=X)


def test_a_stream_into_which_another_is_put_is_another_stream() -> None:
    class Put(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen, self.read = Layers(2), Layers(3)
            self.table = nn.Embedding(9, 32)

        def forward(self, x: Tensor, ids: Tensor) -> Tensor:
            seen = self.seen.run(self.seen.start(x))
            return self.read.end(self.read.run(torch.where((ids == 0)[..., None], seen, self.table(ids))))

    structure = traced(Put(), x=X, ids=torch.tensor([[0, 0, 1, 2, 3, 4]] * 2))
    assert [(stream.label, len(stream.blocks)) for stream in structure.streams] == [("encoder", 2), ("decoder", 3)]
    assert structure.roles["table.weight"] == "embedding.0.weight"


def test_cross_attention_makes_encoder_and_decoder() -> None:
    class Translate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.read, self.write = Layers(2), Layers(1)
            self.cross = Attend()

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            memory = self.read.run(self.read.start(x))
            y = self.write.start(y)
            y = y + self.cross(F.layer_norm(y, (32,)), memory)
            return self.write.end(self.write.run(y))

    structure = traced(Translate(), x=X, y=X[:, :4])
    assert [stream.label for stream in structure.streams] == ["encoder", "decoder"]
    assert [block.kind for block in structure.streams[1].blocks] == ["attention+attention+ffn"]
    weights = {name for block in structure.blocks for name in block.weights}
    assert {name for name in weights if name.startswith("cross.")} == set(structure.blocks[2].weights) & {
        f"cross.{p}.{kind}" for p in "qkvo" for kind in ("weight", "bias")
    }


@pytest.mark.parametrize("constant", [False, True])
def test_positions_beside_the_features_of_a_query_add_no_heads(constant: bool) -> None:
    class Placed(Attend):
        """Every head of queries and keys has as many features of positions behind its own."""

        def __init__(self) -> None:
            super().__init__(heads=4)
            self.place = nn.Linear(8, 32)

        def forward(self, x: Tensor, source: Tensor | None = None, code: Tensor | None = None) -> Tensor:
            code = torch.arange(8.0).expand(2, 6, 8) if constant else code
            q, k, v, at = (p(t).unflatten(-1, (4, -1)) for p, t in ((self.q, x), (self.k, x), (self.v, x), (self.place, code)))
            q, k = torch.cat([q, at], dim=-1), torch.cat([k, at], dim=-1)
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    class Model(Layers):
        def __init__(self) -> None:
            super().__init__(2)
            self.attend = Placed()

        def forward(self, x: Tensor, code: Tensor) -> Tensor:
            x = self.start(x)
            return self.end(self.run(x + self.attend(F.layer_norm(x, (32,)), code=code)))

    structure = traced(Model(), x=X, code=X + 1)
    attention = structure.blocks[0].regions[0].attention[0]
    assert (attention.heads, attention.kv_heads, attention.head_dim) == (4, 4, 16)
    assert attention.q is not None
    assert attention.q.weight == "attend.q.weight"


def test_a_stream_without_any_residual_is_refused_with_the_nearest_part() -> None:
    class Gated(Layers):
        def run(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = torch.tanh(layer.attend(x)) * layer.ffn(x)
            return x

    with pytest.raises(DiscoverError, match=r"no residual stream: .* Nearest: the part from \S+ to mul\S*"):
        traced(Gated(), x=X)


def test_an_encoder_decoder_runs_in_onnx_runtime(tmp_path: Any) -> None:
    """Its attention reads a bias that can be trained."""
    _, graph, _ = found("t5")
    artifact = make_backend("onnxruntime").lower(graph, tmp_path)
    got = artifact.run(dict(graph.example))
    with torch.no_grad():
        for key, value in graph(**graph.example).items():
            assert relative_error(got[key], value) < 1e-5
