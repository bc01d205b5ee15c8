"""What every pass does to a family of models: the properties behind docs/families.md.

Each function of ``PASSES`` runs one pass with every check that the pipeline makes, checks the property that the pass promises,
and returns ``exact`` or ``lossy``.  A model without the part that a pass works on has ``n/a``; a refusal is the pass's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from surgeon.channel_axes import Channels, Unfit, find_channels
from surgeon.channel_bases import rotation
from surgeon.contract import Observer, Plan
from surgeon.data import Data
from surgeon.discovery import discover
from surgeon.errors import PlanError
from surgeon.graph import Graph
from surgeon.numerics import principal_basis
from surgeon.observe import observe
from surgeon.passes.drop_neurons import networks
from surgeon.pipeline import operate
from surgeon.progress import Progress
from surgeon.registry import make_pass
from surgeon.rewrite import Editor
from surgeon.routes import RECORDED, replay
from surgeon.source import calling, flatten_outputs
from surgeon.structure import MoE, Structure
from surgeon.verify import check_exact, check_parameters, check_structure, relative_error

Outputs = dict[str, Tensor]

NEVER = -60.0
"""Score of an expert that is not to be chosen: its softmax and its sigmoid are 0 beside any other's."""


@dataclass(frozen=True)
class Case:
    """A family, traced and looked at.

    Attributes:
        name: the family.
        module: its model.
        inputs: its inputs.
        graph: the traced graph.
        structure: what was found.
        data: the inputs as calibration data.
        dropped: the blocks that ``drop_blocks`` drops.
        without_them: what the source model returns when the layers of these blocks are deleted, or do nothing.
    """

    name: str
    module: nn.Module
    inputs: dict[str, Tensor]
    graph: Graph
    structure: Structure
    data: Data
    dropped: tuple[int, ...]
    without_them: Callable[[], Outputs]

    def operate(self, step: dict[str, Any], plan: Plan[Any] | None = None) -> tuple[Graph, Plan[Any]]:
        """One pass on a clone, with every check that the pipeline makes."""
        made = make_pass(step)
        graph, structure, plan, _ = operate(made, self.graph, self.structure, self.data, plan, Progress(False))
        check_structure(made, self.structure, structure)
        check_parameters(made, plan, self.graph, self.structure, graph)
        if made.exact(plan):
            check_exact(made, [outputs(self.graph, self.inputs)], [outputs(graph, self.inputs)])
        return graph, plan

    def edited(self, change: Callable[[Editor, MoE], None]) -> Case:
        """The same with every mixture changed, each in a model in which those before it are changed already."""
        graph = self.graph.clone()
        for index in range(len(list(self.structure.moes()))):
            editor = Editor(graph)
            change(editor, list(discover(graph).moes())[index].part)
            graph = editor.finish()
        return replace(self, graph=graph, structure=discover(graph))

    def silenced(self) -> Case:
        """The same, the output columns of the first quarter of every network's neurons zero."""
        graph = self.graph.clone()
        editor = Editor(graph)
        for site in networks(discover(graph)):
            name, axis = (site.part.w_out, 2) if isinstance(site.part, MoE) else (site.part.down.weight, 1)
            if not isinstance(site.part, MoE) and site.part.down.transposed:
                axis = 0
            weight = editor.tensor(name).detach().clone()
            weight.narrow(axis, 0, site.part.width // 4).zero_()
            editor.set_tensor(name, weight)
        graph = editor.finish()
        return replace(self, graph=graph, structure=discover(graph))


@torch.no_grad()
def outputs(graph: Graph, inputs: dict[str, Tensor]) -> Outputs:
    """What a graph returns."""
    return graph(**inputs)


@torch.no_grad()
def source_outputs(module: nn.Module, inputs: dict[str, Tensor]) -> Outputs:
    """What a source model returns, without caches, in the operators that are traced."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # a fused encoder layer of torch's rounds differently
    try:
        with calling(module):
            return flatten_outputs(module(**inputs))
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextmanager
def bypassed(
    layer: nn.Module, output: int | None = None, argument: str | None = None, call: int | None = None
) -> Iterator[None]:
    """Inside, a layer returns the hidden state that it is given: an identity of its stream.

    Args:
        layer: the layer.
        output: which of the tensors that it returns, where it returns several.
        argument: the name under which it is given the hidden state, where that is not its first argument.
        call: do so at one of its calls only.
    """
    seen = iter(range(1_000_000))

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
        if call is not None and next(seen) != call:
            return result
        given = args[0] if argument is None else kwargs[argument]
        return given if output is None else (*result[:output], given, *result[output + 1 :])

    handle = layer.register_forward_hook(hook, with_kwargs=True, prepend=True)  # before those that collect outputs
    try:
        yield
    finally:
        handle.remove()


# -- passes -------------------------------------------------------------------------------------------------------


def drop(case: Case) -> str:
    """The model without some blocks is the source without these layers, bit for bit where the trace is."""
    made = make_pass({"drop_blocks": {"count": 1}})
    decisions = [{"site": f"blocks.{index}", "score": 0.0} for index in case.dropped]
    graph, _ = case.operate({"drop_blocks": {"count": 1}}, made.plan_type.model_validate({"decisions": decisions}))
    wanted, found = case.without_them(), outputs(graph, case.inputs)
    traced, whole = outputs(case.graph, case.inputs), source_outputs(case.module, case.inputs)
    assert set(wanted) <= set(found)  # a graph has as many hidden states among its outputs as before
    rounded = any(not torch.equal(value, whole[name]) for name, value in traced.items())
    for name, value in wanted.items():
        error = relative_error(found[name], value)
        assert error <= (1e-5 if rounded else 0.0), f"{name}: {error}"
    return "exact"


def split_with_all_experts(case: Case) -> str:
    """FFNs split into experts that are all used compute what the FFNs did."""
    _, plan = case.operate({"moefy_ffn": {"experts": 4, "top_k": 4, "router": "centroid"}})
    assert len(plan.decisions) == len(list(case.structure.ffns()))
    return "exact"


def upcycle(case: Case) -> str:
    """Copies of an FFN, weighed so that they sum to one copy, compute what it did."""
    _, plan = case.operate({"upcycle_ffn": {"experts": 4, "top_k": 2}})
    assert len(plan.decisions) == len(list(case.structure.ffns()))
    return "exact"


def route_to_all_groups(case: Case) -> str:
    """Attention whose groups are all chosen computes what it did."""
    _, plan = case.operate({"moefy_attention": {"select": "threshold", "threshold": 0.0}})
    assert len(plan.decisions) == len(list(case.structure.attentions()))
    return "exact"


def drop_silent_neurons(case: Case) -> str:
    """The pass finds the neurons whose output columns are zero, and the model without them computes what it did."""
    sites = list(networks(case.structure))
    silent = case.silenced()
    graph, plan = silent.operate({"drop_neurons": {"ratio": 0.25, "multiple": 1}})
    assert len(plan.decisions) + len(plan.notes) == len(sites)
    assert all("share" in note for note in plan.notes), plan.notes
    for decision in plan.decisions:
        first = range(decision.width // 4)
        assert all(set(own).isdisjoint(first) for own in decision.keep)
    same(outputs(graph, case.inputs), outputs(silent.graph, case.inputs))
    return "exact"


def drop_silent_heads(case: Case) -> str:
    """The pass drops the heads whose results the output projection multiplies by 0, and the model computes what it did."""
    attentions = [site.part for site in case.structure.attentions()]
    one_key = all(part.kv_heads == 1 for part in attentions) and any(part.heads > 1 for part in attentions)
    fields = {"ratio": 0.5, "unit": "query" if one_key else "group"}
    _, lot = case.operate({"drop_heads": {**fields, "criterion": "random", "refit": False}})
    silent = replace(case, graph=silence(case, lot), data=case.data)
    silent = replace(silent, structure=discover(silent.graph))
    graph, plan = silent.operate({"drop_heads": fields})
    assert [decision.keep for decision in plan.decisions] == [decision.keep for decision in lot.decisions]
    same(outputs(graph, case.inputs), outputs(silent.graph, case.inputs))
    apart = len(plan.decisions)
    return "exact" if apart == len(attentions) else f"exact ({apart} of {len(attentions)} attentions)"


def narrow_stream(case: Case) -> str:
    """A rotation alone changes nothing, and the pass finds the half of all directions that a stream is confined to."""
    case.operate({"drop_channels": {"ratio": 0}})
    flat = replace(case, graph=flattened(case))
    flat = replace(flat, structure=discover(flat.graph))
    graph, plan = flat.operate({"drop_channels": {"ratio": 0.5, "multiple": 1}})
    assert all(decision.energy is not None and decision.energy > 1 - 1e-6 for decision in plan.decisions)
    same(outputs(graph, case.inputs), outputs(flat.graph, case.inputs))
    count = len(list(find_channels(case.structure)))
    return "exact" if len(plan.decisions) == count else f"exact ({len(plan.decisions)} of {count} streams)"


def rotate_stream(case: Case) -> str:
    """Whatever the stream is rotated with, the model computes what it did."""
    for fields in ({"heads": True}, {"basis": "random"}, {}):
        graph, plan = case.operate({"rotate": fields})
        same(outputs(graph, case.inputs), outputs(case.graph, case.inputs))
    count = len(list(find_channels(case.structure)))
    return "exact" if len(plan.decisions) == count else f"exact ({len(plan.decisions)} of {count} streams)"


def flattened(case: Case) -> Graph:
    """The graph with all that writes to a stream projected on half of its directions, drawn at random."""
    editor = Editor(case.graph.clone())
    generator = torch.Generator().manual_seed(2)
    for _, channels in find_channels(discover(editor.graph)):
        try:
            change = rotation(editor.graph, channels) if isinstance(channels, Channels) else None
        except Unfit:
            change = None
        if change is None or not isinstance(channels, Channels):
            continue
        sample = torch.randn(channels.width, channels.width, generator=generator, dtype=torch.float64)
        half = principal_basis(sample @ sample.T, -(-channels.width // 2), centred=change.centred)
        writers = {str(use.leaf.target): use.axis for use in change.uses if use.role == "write"}
        for name, axis in writers.items():
            tensor = editor.tensor(name).detach()
            flat = (tensor.double().movedim(axis, -1) @ half @ half.T).movedim(-1, axis).to(tensor.dtype)
            editor.set_tensor(name, flat)
    return editor.finish()


def silence(case: Case, plan: Plan[Any]) -> Graph:
    """The graph whose output projections multiply by 0 what the heads give that a plan of drop_heads removes."""
    editor = Editor(case.graph.clone())
    sites = {site.name: site.part for site in case.structure.attentions()}
    for decision in plan.decisions:
        output = sites[decision.site].o
        assert output is not None
        weight = editor.tensor(output.weight).detach().clone()
        for unit, columns in enumerate((weight.T if output.transposed else weight).chunk(decision.units, dim=1)):
            if unit not in decision.keep:
                columns.zero_()
        editor.set_tensor(output.weight, weight)
    return editor.finish()


def factor_at_full_rank(case: Case) -> str:
    """Every linear of the blocks as two factors of full rank computes what it did."""
    _, plan = case.operate({"low_rank": {"ratio": 1.0, "method": "svd"}})
    assert plan.decisions
    return "exact"


def leave_sparse_weights(case: Case) -> str:
    """Magnitude makes every weight 2:4, and SparseGPT leaves such a model as it is, to the last bit."""
    graph, plan = case.operate({"sparsify": {"pattern": "2:4", "criterion": "magnitude"}})
    assert all(decision.reached >= 0.5 for decision in plan.decisions)
    sparse = replace(case, graph=graph, structure=discover(graph))
    again, fitted = sparse.operate({"sparsify": {"pattern": "2:4"}})
    assert {decision.site for decision in fitted.decisions} == {decision.site for decision in plan.decisions}
    wanted, found = outputs(graph, case.inputs), outputs(again, case.inputs)
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    assert not plan.notes, plan.notes
    return "exact"


def smooth_inputs(case: Case) -> str:
    """The ranges of activations move into weights, and the model computes what it did."""
    graph, plan = case.operate({"smooth": {"alpha": 0.5}})
    assert plan.decisions
    same(outputs(graph, case.inputs), outputs(case.graph, case.inputs))
    return "exact"


def quantize_to_eight_bits(case: Case) -> str:
    """Eight bits per weight leave the outputs close to what they were."""
    graph, plan = case.operate({"quantize": {"scheme": "int8"}})
    assert plan.decisions
    wanted, found = outputs(case.graph, case.inputs), outputs(graph, case.inputs)
    errors = {name: relative_error(found[name], value) for name, value in wanted.items() if value.is_floating_point()}
    assert 0 < max(errors.values()) < 0.1, errors
    return "lossy"


def drop_idle_experts(case: Case) -> str:
    """The pass drops the experts that no token chooses, and the model computes what it did."""
    idle = case.edited(lambda editor, moe: make_idle(editor, moe, case.inputs))
    (experts, groups) = next((site.part.experts, site.part.groups) for site in idle.structure.moes())
    graph, plan = idle.operate({"drop_experts": {"keep": experts - groups}})
    assert len(plan.decisions) == len(list(case.structure.moes()))
    assert [site.part.experts for site in discover(graph).moes()] == [experts - groups] * len(plan.decisions)
    same(outputs(graph, case.inputs), outputs(idle.graph, case.inputs))
    return "exact"


def merge_copies(case: Case) -> str:
    """The pass merges two experts that are copies of each other, and the model computes what it did."""
    copied = case.edited(lambda editor, moe: copy_expert(editor, moe, range(1, 2)))
    experts = next(site.part.experts for site in copied.structure.moes())
    graph, plan = copied.operate({"merge_experts": {"groups": experts - 1}})
    assert len(plan.decisions) == len(list(case.structure.moes()))
    same(outputs(graph, case.inputs), outputs(copied.graph, case.inputs))
    return "exact"


def join_copies(case: Case) -> str:
    """Experts that are all alike become one FFN that computes what they did, where their weights have one sum."""
    alike = case.edited(lambda editor, moe: copy_expert(editor, moe, range(1, moe.experts)))
    graph, plan = alike.operate({"densify_moe": {}})
    assert len(plan.decisions) == len(list(case.structure.moes()))
    assert not list(discover(graph).moes())
    return "exact" if make_pass({"densify_moe": {}}).exact(plan) else "lossy"


def skip_and_replay(case: Case) -> str:
    """What the model that skips computes is what the whole one does where it replays the weights that were left."""
    skipped, plan = case.operate({"skip_experts": {"beta": 1.0}})
    several = [site.name for site in case.structure.moes() if site.part.top_k > 1]
    if not several:
        return "n/a (one expert per token)"
    assert [decision.site for decision in plan.decisions] == several
    recording, _ = replace(case, graph=skipped, structure=discover(skipped)).operate({"expose_routing": {}})
    replaying, _ = case.operate({"expose_routing": {"replay": True}})
    whole, found = outputs(replaying, case.inputs), outputs(recording, case.inputs)
    names = recorded(recording)
    if all(torch.equal(found[name], whole[name]) for name in names):
        return "n/a (a token's experts weigh the same)"
    same(outputs(replaying, case.inputs | replay({name: found[name] for name in names})), found)
    return "exact"


def record_and_replay(case: Case) -> str:
    """Exposing changes no bit of the other outputs, and neither does replaying what was recorded."""
    graph, plan = case.operate({"expose_routing": {"replay": True}})
    assert [decision.site for decision in plan.decisions] == [site.name for site in case.structure.moes()]
    plain, found = outputs(case.graph, case.inputs), outputs(graph, case.inputs)
    assert all(torch.equal(found[name], value) for name, value in plain.items())
    again = outputs(graph, case.inputs | replay({name: found[name] for name in recorded(graph)}))
    assert all(torch.equal(again[name], value) for name, value in found.items())
    return "exact"


def recorded(graph: Graph) -> list[str]:
    return [port.name for port in graph.outputs if port.role == RECORDED]


def same(found: Outputs, wanted: Outputs) -> None:
    for name, value in wanted.items():
        error = relative_error(found[name], value)
        assert error < 1e-5, f"{name}: {error}"


# -- mixtures -----------------------------------------------------------------------------------------------------


class Rows(Observer):
    """All rows of one value."""

    def __init__(self, node: fx.Node) -> None:
        self.nodes = (node,)
        self.seen: list[Tensor] = []

    def update(self, *values: Tensor) -> None:
        self.seen.append(values[0])

    def merge(self, other: Observer) -> None:
        raise NotImplementedError


def make_idle(editor: Editor, moe: MoE, inputs: dict[str, Tensor]) -> None:
    """Give the last expert of each group router weights w with ``x . w + b = NEVER`` for every x that reaches the router."""
    router = moe.router
    assert router is not None
    rows = Rows(router.input)
    observe(editor.graph, [inputs], {"router": rows})
    x = torch.cat(rows.seen).double()
    assert torch.linalg.matrix_rank(x) == len(x.unique(dim=0)), "more inputs than a linear can be told the results of"
    members = moe.experts // moe.groups
    weight = editor.tensor(router.weight).detach().clone()
    matrix = weight.T if router.transposed else weight
    bias = torch.zeros(moe.experts) if router.bias is None else editor.tensor(router.bias).detach()
    for expert in range(members - 1, moe.experts, members):
        wanted = torch.full((len(x), 1), NEVER - float(bias[expert]), dtype=x.dtype)
        matrix[expert] = torch.linalg.lstsq(x, wanted, driver="gelsd").solution[:, 0].to(matrix.dtype)
    editor.set_tensor(router.weight, weight)


def copy_expert(editor: Editor, moe: MoE, copies: Iterable[int]) -> None:
    """Make experts copies of the first one, in the router's eyes too."""
    assert moe.router is not None
    experts = [(name, 0) for name in (moe.w_in, moe.w_out, moe.b_in, moe.b_out) if name is not None]
    experts.append((moe.router.weight, 1 if moe.router.transposed else 0))
    experts += [(moe.router.bias, 0)] if moe.router.bias is not None else []
    for name, axis in experts:
        tensor = editor.tensor(name).detach().clone()
        for expert in copies:
            tensor.select(axis, expert).copy_(tensor.select(axis, 0))
        editor.set_tensor(name, tensor)


# -- outcomes -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """A column of the table.

    Attributes:
        run: the pass with its property.
        step: a step that the pass refuses where there is nothing to work on.
        parts: what it works on; None: on every model.
        missing: what a model without these lacks.
    """

    run: Callable[[Case], str]
    step: dict[str, Any]
    parts: Callable[[Structure], Iterable[Any]] | None = None
    missing: str = ""


PASSES: dict[str, Entry] = {
    "drop_blocks": Entry(drop, {}),
    "moefy_ffn": Entry(split_with_all_experts, {"experts": 2, "top_k": 1}, Structure.ffns, "no dense FFN"),
    "upcycle_ffn": Entry(upcycle, {"experts": 2, "top_k": 1}, Structure.ffns, "no dense FFN"),
    "moefy_attention": Entry(route_to_all_groups, {"top_k": 1}, Structure.attentions, "no attention"),
    "drop_channels": Entry(narrow_stream, {}),
    "rotate": Entry(rotate_stream, {}),
    "drop_neurons": Entry(drop_silent_neurons, {"ratio": 0.5}, networks, "no feed-forward network"),
    "drop_heads": Entry(drop_silent_heads, {"keep": 1}, Structure.attentions, "no attention"),
    "drop_experts": Entry(drop_idle_experts, {"keep": 1}, Structure.moes, "no experts"),
    "merge_experts": Entry(merge_copies, {"groups": 1}, Structure.moes, "no experts"),
    "densify_moe": Entry(join_copies, {}, Structure.moes, "no experts"),
    "skip_experts": Entry(skip_and_replay, {"beta": 0.5}, Structure.moes, "no experts"),
    "expose_routing": Entry(record_and_replay, {}, Structure.moes, "no experts"),
    "low_rank": Entry(factor_at_full_rank, {}),
    "sparsify": Entry(leave_sparse_weights, {}),
    "smooth": Entry(smooth_inputs, {}),
    "quantize": Entry(quantize_to_eight_bits, {}),
}


def outcome(case: Case, name: str) -> str:
    """``exact``, ``lossy``, ``n/a (what is missing)`` or ``refused (why)``; everything else raises."""
    entry = PASSES[name]
    if entry.parts is not None and not list(entry.parts(case.structure)):
        try:
            case.operate({name: entry.step})
        except PlanError:
            return f"n/a ({entry.missing})"
        raise AssertionError(f"{name} plans something on a model with {entry.missing}")
    try:
        return entry.run(case)
    except PlanError as error:
        return f"refused ({error})"
