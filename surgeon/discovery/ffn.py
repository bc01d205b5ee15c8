"""Position-wise feed-forward networks: a linear that reads element-wise work on one or two linears of the same input.

    plain   down(act(up(x)))
    gated   down(act(gate(x)) * up(x))      stored apart, or one linear whose output is split

Which half is the gate is decided by evaluating the element-wise part h = f(a, b): it is linear and without offset in ``up``,
so with ``b`` as up, f(a, b) = b f(a, 1), and f(a, 1) is the activation.  Where constants were put into it, such as clamps, the
forms of ``surgeon.gates`` are tried both ways round.  A normalisation may stand in front of ``down``.

Two linears with nothing between them that is not linear (a latent, an adapter) are no FFN.  Nor is one whose neurons further
linears read, such as several gates.  ``down`` may read its neurons beside the output of an attention, as one matrix.

Neurons may be *scaled*: multiplied by a learned vector, or by a tensor that is not computed from what the sublayer starts
with (embeddings of the tokens for this layer).  The activation is then that at scales of 1.  So they are where the activation
has learned numbers; it is named with the values that these have.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from surgeon.activations import recognise
from surgeon.discovery import operators, probe
from surgeon.discovery.flow import Flow
from surgeon.discovery.linears import Linears
from surgeon.discovery.norms import is_affine, is_normalisation, normalised
from surgeon.gates import Gate, recognise_alone, recognise_gate
from surgeon.structure import FFN, Linear


@dataclass(frozen=True)
class Half:
    """What one of the two factors of the intermediate activation is computed from: part of a linear's output.

    Attributes:
        linear: the linear.
        numbers: the output features.
        nodes: the nodes that hold them when the first computation reads them.
    """

    linear: Linear
    numbers: tuple[int, ...]
    nodes: tuple[fx.Node, ...]


@dataclass(frozen=True)
class _Middle:
    """The element-wise work between the linears, up to what ``down`` reads.

    Attributes:
        flow: the graph's data flow.
        hidden: its result.
        scales: tensors that neurons are multiplied with, beside what the linears compute.
    """

    flow: Flow
    hidden: fx.Node
    scales: tuple[fx.Node, ...]

    def evaluate(self, given: Mapping[Half, Tensor]) -> Tensor:
        """H [N] at values [N] of the halves, all scales 1."""
        values = {node: x for half, x in given.items() for node in half.nodes}
        like = next(iter(given.values()))
        ones = {node: torch.ones_like(like) for node in self.scales}
        return probe.elementwise(self.flow, self.hidden, ones | values)


def find_ffns(flow: Flow, linears: Linears, path: frozenset[fx.Node], entry: fx.Node) -> tuple[list[FFN], list[str]]:
    """FFNs of a region, in graph order, and why further linears that follow others are the ``down`` of none.

    Args:
        flow: the graph's data flow.
        linears: its linears.
        path: nodes on paths through the region.
        entry: the cut where it starts.
    """
    found: list[FFN] = []
    reasons: list[str] = []
    for node in flow.ordered(path):
        down = linears.whole.get(node)
        if down is None:
            continue
        for part in [down, *(part for _, part in linears.sections(down))]:
            ffn = _match(flow, linears, path, entry, part)
            if isinstance(ffn, FFN):
                found.append(ffn)
            elif ffn:
                reasons.append(f"{node.name} is the down projection of no FFN: {ffn}")
    kept: list[FFN] = []
    for ffn in found:
        readers = [other.down.node.name for other in found if other.up.node is ffn.up.node and other.up.rows == ffn.up.rows]
        if len(readers) == 1:
            kept.append(ffn)
        else:
            reasons.append(f"{ffn.down.node.name} is the down projection of no FFN: {', '.join(readers)} read its neurons")
    return kept, reasons


def _match(flow: Flow, linears: Linears, path: frozenset[fx.Node], entry: fx.Node, down: Linear) -> FFN | str:
    ups: list[Linear] = []
    middle: set[fx.Node] = set()
    scales: dict[fx.Node, None] = {}
    learned = False
    stack = [down.input]
    while stack:
        node = stack.pop()
        if node in middle:
            continue
        if _scales(flow, node, entry, middle):
            scales[node] = None
            continue
        if node in linears.whole:
            if node not in path:
                return ""
            if linears.whole[node] not in ups:
                ups.append(linears.whole[node])
            continue
        if node not in path and node in flow:
            return ""  # it reads the stream itself: no FFN ends here
        name = operators.kind(node)
        inner = normalised(flow, node)
        if inner is not None and is_normalisation(flow, flow.strip(down.input, _is_gain(flow))):
            stack.append(inner)
            continue
        if not (operators.is_pointwise(node) or operators.is_movement(node) or name == operators.FAKE_QUANTIZE):
            return f"{node.name} = {name} lies in between, needed element-wise work" if ups else ""
        middle.add(node)
        stack.extend(flow.active(node))
        scales.update(dict.fromkeys(_vectors(flow, node, down.in_features)))
        learned = learned or _has_numbers(flow, node)
    ups.sort(key=lambda linear: flow.index[linear.node])
    if not any(_bends(flow, node, scales) for node in middle):
        return ""
    if len(ups) > 2:
        return f"it reads {len(ups)} linears ({', '.join(u.node.name for u in ups)}), needed one or two"
    if len({flow.plain(linear.input) for linear in ups}) > 1:
        return f"{ups[0].node.name} and {ups[1].node.name} read different inputs"
    halves = _halves(flow, linears, ups, down.input)
    if isinstance(halves, str):
        return halves
    widths = {len(half.numbers) for half in halves}
    if widths != {down.in_features}:
        return f"it reads {down.in_features} features and what it is computed from has {sorted(widths)}, needed the same"
    ffn = _assemble(flow, linears, halves, down, tuple(scales))
    return replace(ffn, scaled=learned or bool(scales)) if isinstance(ffn, FFN) else ffn


_LINEAR = frozenset(f"aten::{name}" for name in "add sub mul div neg rsub".split())


def _bends(flow: Flow, node: fx.Node, scales: Container[fx.Node]) -> bool:
    """Whether an element-wise node is not linear: another function than sums and products, or a product of activations."""
    if not operators.is_pointwise(node):
        return False
    if operators.kind(node) not in _LINEAR:
        return True
    return operators.kind(node) != operators.ADD and sum(n not in scales for n in flow.active(node)) > 1


def _scales(flow: Flow, node: fx.Node, entry: fx.Node, middle: Collection[fx.Node]) -> bool:
    """Whether a node only multiplies neurons, and is neither on the way to the sublayer nor computed from its entry."""
    if node not in flow or flow.depends(node, entry) or flow.depends(entry, node):
        return False
    readers = [user for user in node.users if user in middle]
    return bool(readers) and all(operators.kind(user) == "aten::mul" for user in readers)


def _vectors(flow: Flow, node: fx.Node, width: int) -> list[fx.Node]:
    """Learned vectors of as many numbers as there are neurons that a node multiplies by."""
    if operators.kind(node) != "aten::mul" or width == 1:
        return []
    constants = [n for n in node.all_input_nodes if n in flow.constant and flow.weights.get(n)]
    return [n for n in constants if [size for size in operators.shape(n) if size != 1] == [width]]


def _has_numbers(flow: Flow, node: fx.Node) -> bool:
    """Whether an element-wise node reads single numbers that are trained, such as a slope."""
    names = {name for n in node.all_input_nodes if n in flow.constant for name in flow.weights.get(n, ())}
    tensors = [flow.graph.tensor(name) for name in names] if operators.is_pointwise(node) else []
    return any(tensor.numel() == 1 and isinstance(tensor, torch.nn.Parameter) for tensor in tensors)


def _is_gain(flow: Flow) -> Callable[[fx.Node], bool]:
    return lambda node: not is_normalisation(flow, node) and is_affine(node)


def _halves(flow: Flow, linears: Linears, ups: list[Linear], hidden: fx.Node) -> list[Half] | str:
    halves: list[Half] = []
    for up in ups:
        groups: dict[tuple[int, ...], list[fx.Node]] = {}
        for node, numbers in linears.features(up, hidden).items():
            groups.setdefault(numbers, []).append(node)
        halves.extend(Half(up, numbers, tuple(nodes)) for numbers, nodes in groups.items())
    if len(halves) > 2:
        return f"{len(halves)} different parts of {', '.join(u.node.name for u in ups)} are multiplied, needed one or two"
    return halves


def _assemble(flow: Flow, linears: Linears, halves: list[Half], down: Linear, scales: tuple[fx.Node, ...]) -> FFN | str:
    width = down.in_features
    inner = normalised(flow, flow.strip(down.input, _is_gain(flow)))
    normed = inner is not None
    middle = _Middle(flow, inner or down.input, scales)
    if len(halves) == 1:
        (half,) = halves
        activation = _recognise(lambda x: middle.evaluate({half: x}), recognise, recognise_alone)
        return FFN(half.linear.input, half.linear, None, down, down.input, activation, width, "plain", normed)
    if _adds(middle, halves):
        names = " and ".join(half.linear.node.name for half in halves)
        return f"it reads a function of a weighted sum of {names}, needed one linear (an adapter beside a weight is another)"
    gate, up = _gate_and_up(middle, halves)
    activation = _recognise(lambda x: middle.evaluate({gate: x, up: torch.ones_like(x)}), recognise)
    for first, second in ((gate, up), (up, gate)):
        if activation is None:
            pair = (first, second)
            activation = _recognise(
                lambda g, u, pair=pair: middle.evaluate(dict(zip(pair, (g, u), strict=True))), recognise_gate
            )
            gate, up = pair if activation is not None else (gate, up)
    if gate.linear is not up.linear:
        return FFN(up.linear.input, up.linear, gate.linear, down, down.input, activation, width, "separate", normed)
    parts = [linears.take(half.linear, half.numbers) for half in (up, gate)]
    layout = "concatenated" if all(part.rows for part in parts) else "interleaved"
    return FFN(up.linear.input, parts[0], parts[1], down, down.input, activation, width, layout, normed)


def _gate_and_up(middle: _Middle, halves: list[Half]) -> tuple[Half, Half]:
    """Which half is the gate: h is linear in the other one; where that does not decide, the first is."""
    first, second = halves
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 64, generator=generator, dtype=torch.float64)
    ones = torch.ones_like(a)
    try:
        if _close(middle.evaluate({first: a, second: b}), b * middle.evaluate({first: a, second: ones})):
            return first, second
        if _close(middle.evaluate({first: a, second: b}), a * middle.evaluate({first: ones, second: b})):
            return second, first
    except RuntimeError:  # a learned vector in between: its size is not the probe's
        return first, second
    return first, second


def _adds(middle: _Middle, halves: list[Half]) -> bool:
    """Whether h = f(a, b) depends on a sum of multiples of a and b only: then its two derivatives are proportional."""
    first, second = halves
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 64, generator=generator, dtype=torch.float64)
    step = 1e-5
    try:
        by_a = middle.evaluate({first: a + step, second: b}) - middle.evaluate({first: a - step, second: b})
        by_b = middle.evaluate({first: a, second: b + step}) - middle.evaluate({first: a, second: b - step})
    except RuntimeError:  # a learned vector in between: its size is not the probe's
        return False
    ratio = (by_a * by_b).sum() / by_b.square().sum()
    slack = 1e-3 * float(by_a.abs().mean())
    return bool(ratio.isfinite()) and slack > 0 and torch.allclose(by_a, ratio * by_b, rtol=1e-3, atol=slack)


def _close(x: Tensor, y: Tensor) -> bool:
    return x.shape == y.shape and torch.allclose(x, y, rtol=1e-5, atol=1e-7)


def _recognise(function: Callable[..., Tensor], *rules: Callable[..., str | Gate | None]) -> str | None:
    """The name that the first rule gives that recognises the function."""

    def checked(*values: Tensor) -> Tensor:
        result = function(*values)
        if result.shape != values[0].shape:
            raise RuntimeError("a learned tensor, one number per position say, makes more numbers of one")
        return result

    try:
        for rule in rules:
            found = rule(checked)
            if found is not None:
                return found.name if isinstance(found, Gate) else found
    except RuntimeError:  # likewise
        return None
    return None
