"""What parts of a graph compute, found by running them: norms, rotations, and which number of a projection goes where.

The spelling does not matter then.  What is read here is held against the graph by ``_gguf_reading``, sublayer by sublayer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from surgeon.backends._gguf_parts import Kind, Norm, Rotation
from surgeon.caches import complete
from surgeon.discovery.flow import Flow
from surgeon.graph import Graph
from surgeon.verify import relative_error

UNITS = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""What rounding to a type of 16 bits changes, relative."""
_STILL = 1e-9
"""What reaches a number of a head from another where neither is turned: nothing, however small the smallest angles are."""
EXACT = 1e-4
"""The same in float32."""


def accuracy(graph: Graph) -> float:
    """How near a part must be to what it is taken for, relative."""
    types = {t.dtype for t in graph.parameters().values() if t.is_floating_point()}
    return max([EXACT, *(4 * UNITS[dtype] for dtype in types if dtype in UNITS)])


def unit(dtype: torch.dtype) -> float:
    """What rounding to a type changes, relative."""
    return UNITS.get(dtype, 2.0**-23)


class Evaluation:
    """Values of nodes on given inputs, where some nodes are given values.

    Attributes:
        graph: the graph.
        flow: its data flow.
        rows, length: sizes of the tokens.
    """

    def __init__(self, flow: Flow, inputs: Mapping[str, Tensor]) -> None:
        self.graph, self.flow = flow.graph, flow
        tokens = next(name for name, value in inputs.items() if value.dim() == 2)
        self.rows, self.length = inputs[tokens].shape
        bound = self.graph.bind(complete(self.graph.inputs, inputs))
        placeholders = self.graph.module.graph.find_nodes(op="placeholder")
        self._values: dict[fx.Node, Any] = dict(zip(placeholders, bound, strict=True))
        self._symbols = {
            size.node.expr: found
            for node, value in self._values.items()
            for size, found in zip(node.meta["val"].shape, value.shape, strict=True)
            if isinstance(size, torch.SymInt) and size.node.expr.is_symbol
        }

    def __call__(self, targets: Sequence[fx.Node], given: Mapping[fx.Node, Tensor]) -> list[Any]:
        """Values of the targets; nodes in ``given`` have these."""
        needed: set[fx.Node] = set()
        stack = [target for target in targets if target not in given]
        while stack:
            node = stack.pop()
            if node not in needed and node not in given and node not in self._values:
                needed.add(node)
                stack.extend(node.all_input_nodes)
        values: dict[fx.Node, Any] = {**self._values, **given}
        last: dict[fx.Node, fx.Node] = {}
        ordered = self.flow.ordered(needed)
        for node in ordered:
            for source in node.all_input_nodes:
                last[source] = node
        with torch.no_grad():
            for node in ordered:
                values[node] = self._value(node, values)
                for source in node.all_input_nodes:
                    if last[source] is node and source not in targets and source not in given:
                        values.pop(source, None)
        return [values[target] for target in targets]

    def one(self, target: fx.Node, given: Mapping[fx.Node, Tensor]) -> Tensor:
        """The value of one node, as float32."""
        (found,) = self([target], given)
        assert isinstance(found, Tensor)
        return found.float()

    def sizes(self, node: fx.Node) -> list[int]:
        """Sizes of a node's value on these inputs."""
        shape = node.meta["val"].shape
        return [size if isinstance(size, int) else int(size.node.expr.subs(self._symbols)) for size in shape]

    def spread(self, node: fx.Node, values: Tensor) -> Tensor:
        """A value of a node that is equal at all positions.

        Args:
            node: its first dimension counts rows, or rows and positions joined; those of fixed size are its features.
            values: [rows, features].
        """
        shape = self.sizes(node)
        if shape[0] == self.rows * self.length and self.length > 1:
            return values[:, None].expand(-1, self.length, -1).reshape(shape).to(dtype_of(node))
        fixed = [size if isinstance(size, int) else 1 for size in node.meta["val"].shape]
        return values.reshape(self.rows, *fixed[1:]).expand(shape).contiguous().to(dtype_of(node))

    def features(self, node: fx.Node) -> int:
        """How many numbers a node holds for each position."""
        return math.prod(size for size in node.meta["val"].shape if isinstance(size, int))

    def _value(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        if node.op == "get_attr":
            return self.graph.tensor(str(node.target)).detach()
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda part: values.get(part, self._values.get(part)))
        return node.target(*args, **kwargs)  # type: ignore[operator]  # a call_function target


def dtype_of(node: fx.Node) -> torch.dtype:
    """Type of a node's value."""
    value = node.meta["val"]
    assert isinstance(value, Tensor)
    return value.dtype


# -- norms ----------------------------------------------------------------------------------------------------------


def read_norm(run: Evaluation, source: fx.Node, result: fx.Node, given: Mapping[fx.Node, Tensor], x: Tensor) -> Norm | str:
    """The norm that ``result`` is of ``source``, or what is wrong.

    Args:
        run: evaluates the graph.
        source: what is normalised.
        result: the norm's value.
        given: values of further nodes.
        x: a value of ``source``, its features last.
    """
    between, numbers, vectors = _read(run.flow, source, result)
    width = x.shape[-1]
    sizes = [1.0, 1e-3]
    wanted = [run.one(result, {**given, source: (size * x).to(dtype_of(source))}).reshape(-1, width) for size in sizes]
    samples = [(size * x).to(dtype_of(source)).float().reshape(-1, width) for size in sizes]
    gains = [torch.ones(width), *(part.float() for part in vectors if part.numel() == width)]
    gains += [1 + gain for gain in gains[1:]]
    offsets: list[Tensor | None] = [None, *gains[1 : 1 + (len(gains) - 1) // 2]]
    best: tuple[float, Norm] | None = None
    kinds: tuple[Kind, ...] = ("rms", "layer")
    for kind in kinds:
        for eps in sorted({number for number in numbers if 0 <= number <= 0.1}):
            for gain in gains:
                for offset in offsets:
                    if offset is not None and offset is gain:
                        continue
                    norm = Norm(kind, eps, gain, offset)
                    error = max(
                        relative(norm.apply(sample), value) for sample, value in zip(samples, wanted, strict=True)
                    )
                    if best is None or error < best[0] * 0.5:
                        best = (error, norm)
    if best is None:
        return f"between {source.name} and {result.name} no norm was found ({between} operators)"
    if best[0] > accuracy(run.graph):
        return (
            f"what {result.name} is of {source.name} is neither an RMS norm nor a LayerNorm with a gain (nearest: "
            f"{best[1].kind}, relative difference {best[0]:.1e})"
        )
    return best[1]


def _read(flow: Flow, source: fx.Node, result: fx.Node) -> tuple[int, set[float], list[Tensor]]:
    """How many nodes are between two, the numbers that they are written with, and the vectors that they read."""
    seen: set[fx.Node] = set()
    stack = [result]
    numbers: set[float] = {0.0}
    vectors: list[Tensor] = []
    while stack:
        node = stack.pop()
        if node is source or node in seen:
            continue
        seen.add(node)
        if node.op == "get_attr":
            tensor = flow.graph.tensor(str(node.target)).detach()
            if tensor.is_floating_point() and tensor.numel() == tensor.shape[-1:].numel():
                vectors.append(tensor.reshape(-1))
            continue
        if node.op != "call_function":
            continue
        numbers |= {float(value) for value in (*node.args, *node.kwargs.values()) if isinstance(value, float)}
        if flow.depends(node, source) or node in flow.constant:
            stack.extend(node.all_input_nodes)
    return len(seen), numbers, vectors


def relative(found: Tensor, wanted: Tensor) -> float:
    """``||found - wanted|| / ||wanted||``, infinite where something is not finite."""
    error = relative_error(found, wanted)
    return error if math.isfinite(error) else math.inf


# -- where numbers go -----------------------------------------------------------------------------------------------


def places(run: Evaluation, source: fx.Node, result: fx.Node) -> tuple[Tensor, float] | None:
    """Which feature of ``source`` each feature of ``result`` is, at the position 0, and a factor that all have.

    Features are the dimensions of fixed size, flattened.  None where features are mixed.

    Args:
        run: of three rows; position 0 first.
        source: where numbers start.
        result: where they are wanted.
    """
    count = run.features(source)
    numbers = torch.arange(count)
    # Numbers up to 256 are exact in every type: a number is told in two digits, beside ones that tell the factor.
    digits = torch.stack([torch.ones(count), (numbers // 256).float(), (numbers % 256).float()])
    found = run.one(result, {source: run.spread(source, digits)})
    if found.shape[0] == run.rows * run.length:
        found = found.reshape(run.rows, run.length, *found.shape[1:])[:, 0].reshape(run.rows, -1)
    else:
        shape = result.meta["val"].shape
        for axis in reversed(range(1, found.dim())):
            if not isinstance(shape[axis], int):
                found = found.select(axis, 0)
        found = found.reshape(run.rows, -1)
    factor = float(found[0, 0])
    if factor == 0 or relative(found[0], torch.full_like(found[0], factor)) > 1e-2:
        return None
    high, low = (found[1:] / factor).round()
    index = (256 * high + low).long()
    if bool((index < 0).any()) or bool((index >= count).any()):
        return None
    return (index, factor) if relative(found, factor * digits[:, index]) < 1e-2 else None


# -- rotations ------------------------------------------------------------------------------------------------------


def read_rotation(turns: Tensor, positions: Sequence[int], rounding: float) -> Rotation | str | None:
    """The rotation that matrices are, None where they are all the identity, or what is wrong.

    Args:
        turns: [positions, D, D], what becomes of each basis vector (the last dimension).
        positions: the first is 0, the second 1, each of the others at most four times the one before.
        rounding: what the type that they are computed in changes, relative.
    """
    tolerance = max(EXACT, 4 * rounding)
    size = turns.shape[-1]
    if turns.shape != (len(positions), size, size):
        return f"what becomes of a head's numbers is {list(turns.shape)}, needed a matrix per position"
    strength = turns.abs().amax(0).fill_diagonal_(0)
    partner = strength.argmax(0)
    alone = strength.amax(0) < _STILL
    if bool(alone.all()) and relative(turns, torch.eye(size).expand_as(turns)) < tolerance:
        return None
    partner[alone] = torch.arange(size)[alone]
    if not torch.equal(partner[partner], torch.arange(size)):
        return "numbers of a head are mixed otherwise than in pairs"
    pairs, angles, untouched = [], [], []
    for first in range(size):
        second = int(partner[first])
        if second == first:
            untouched.append(first)
        elif first < second:
            angle = _angle(turns[:, first, first], turns[:, second, first], positions)
            pairs.append((first, second) if angle >= 0 else (second, first))
            angles.append(abs(angle))
    if len(untouched) % 2:
        return "an odd number of a head's numbers is not turned"
    half = len(untouched) // 2
    pairs += list(zip(untouched[:half], untouched[half:], strict=True))
    angles += [0.0] * half
    measured = torch.tensor(angles, dtype=torch.float64)
    # The sine of a small angle is as exact as its type, and of a large one as 1 is, at the largest position.
    doubt = 4 * rounding * measured.clamp(max=1 / positions[-1]) + 2e-6 * measured
    rotation = Rotation(torch.tensor(pairs), measured, doubt)
    basis = torch.eye(size)[:, None].expand(size, len(positions), size)
    if relative(rotation.apply(basis.clone(), torch.tensor(positions)).permute(1, 2, 0), turns) > 10 * tolerance:
        return "pairs of a head's numbers are not turned by an angle that grows with the position"
    return rotation


def named(rotation: Rotation, vectors: Iterable[Tensor]) -> Rotation:
    """The rotation with the angles of a stored vector, where one holds those that were measured; its own where none does.

    Args:
        rotation: as measured.
        vectors: stored numbers of any kind.
    """
    turned = rotation.angles != 0
    order = rotation.angles[turned].argsort()
    for vector in vectors:
        if vector.shape != order.shape or not vector.is_floating_point():
            continue
        found = vector.double().sort().values
        if bool(((found - rotation.angles[turned][order]).abs() <= rotation.doubt[turned][order]).all()):
            angles, exact = rotation.angles.clone(), torch.empty(len(order), dtype=torch.float64)
            exact[order] = found
            angles[turned] = exact
            return replace(rotation, angles=angles, doubt=2e-6 * angles)
    return rotation


def _angle(cos: Tensor, sin: Tensor, positions: Sequence[int]) -> float:
    """Angle per position, from small positions to large: each says it more exactly, up to whole turns."""
    angle = math.atan2(float(sin[1]), float(cos[1]))
    for place in range(2, len(positions)):
        position = positions[place]
        seen = math.atan2(float(sin[place]), float(cos[place]))
        angle = (seen + 2 * math.pi * round((position * angle - seen) / (2 * math.pi))) / position
    return angle
