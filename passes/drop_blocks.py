"""Drop whole blocks (layers) whose output is most like their input.

Paper:
    ShortGPT (Men et al. 2024, arXiv:2403.03853): Block Influence; Unified MoE Compression (He et al. 2024,
    arXiv:2406.02500): Block Drop, the same ranking.
Formula:
    ``s_l = mean_t cos(h_l[t], h_{l+1}[t])`` over calibration tokens t; the blocks of highest s_l are dropped
    (Block Influence is 1 - s_l).
Shapes:
    h_l: [tokens, hidden], the residual stream before block l; positions of a map [batch, hidden, height, width] are tokens.
Units:
    s_l is dimensionless, in [-1, 1].
Reads:
    Hidden states at the entry and exit of every selected block.
Changes:
    Readers of a dropped block's exit read its entry; its weights go, and with them its caches and what
    ``expose_routing`` added for it.  Ports named after blocks that stay get their new numbers.
Errors:
    PlanError where more blocks are asked for than are selected, or none would remain.
Example:
    ``- drop_blocks: {count: 2}`` or ``- drop_blocks: {ratio: 0.25, blocks: "1:-1"}``
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, model_validator
from torch import fx

from surgeon.accounting import freed_parameter_count
from surgeon.caches import ASIDE
from surgeon.contract import Decision, Observer, Pass, Plan, Statistics
from surgeon.errors import PlanError
from surgeon.graph import Graph
from surgeon.observe import MeanCosine
from surgeon.rewrite import Editor
from surgeon.structure import Block, Structure


class DropBlock(Decision):
    """One block that goes.

    Attributes:
        site: ``blocks.I``.
        score: its similarity s_l.
    """

    score: float | None = None


class DropBlocksPlan(Plan[DropBlock]):
    """The blocks that go, and every block's score.

    Attributes:
        scores: s_l by block name.
    """

    scores: dict[str, float] = Field(default_factory=dict)


class DropBlocks(Pass[DropBlocksPlan]):
    """Drop the blocks whose output is most similar to their input."""

    name = "drop_blocks"
    plan_type = DropBlocksPlan

    count: Annotated[int, Field(ge=1)] | None = None
    """Number of blocks to drop; give this or ratio."""
    ratio: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of the selected blocks to drop, rounded to the nearest number of blocks; give this or count."""
    metric: Literal["cosine"] = "cosine"
    """How blocks are ranked: cosine similarity of input and output, highest dropped."""

    @model_validator(mode="after")
    def _one_budget(self) -> DropBlocks:
        if (self.count is None) == (self.ratio is None):
            raise ValueError("give either count or ratio")
        return self

    def observers(self, structure: Structure) -> Mapping[str, Observer]:
        """Similarity of input and output of every selected block."""
        return {block.name: MeanCosine(block.entry, block.exit, block.features) for block in _droppable(structure)}

    def plan(self, graph: Graph, structure: Structure, statistics: Statistics) -> DropBlocksPlan:
        """Choose the blocks of highest similarity."""
        blocks = _droppable(structure)
        count = self.count if self.count is not None else round((self.ratio or 0.0) * len(blocks))
        if count > len(blocks) or count >= len(structure.blocks):
            raise PlanError(
                f"count: {count} blocks asked, {len(blocks)} of the model's {len(structure.blocks)} are selected "
                "and leave the shape of the hidden state as it is, and at least one block must remain"
            )
        scores: dict[str, float] = {}
        for block in blocks:
            observer = statistics[block.name]
            assert isinstance(observer, MeanCosine)
            scores[block.name] = observer.mean
        chosen = sorted(blocks, key=lambda block: (-scores[block.name], block.index))[:count]
        return DropBlocksPlan(
            decisions=tuple(
                DropBlock(site=block.name, score=scores[block.name])
                for block in sorted(chosen, key=lambda block: block.index)
            ),
            notes=() if chosen else ("ratio is too small to drop a block",),
            scores=scores,
        )

    def check(self, graph: Graph, structure: Structure, plan: DropBlocksPlan) -> None:
        """Every block exists, once, and one remains."""
        names = [decision.site for decision in plan.decisions]
        known = [block.name for block in structure.blocks]
        wrong = sorted(set(names) - set(known))
        if wrong or len(set(names)) != len(names):
            raise PlanError(f"the plan drops {names}; the model's blocks are {known[0]} to {known[-1]}, each at most once")
        for block in _chosen(structure, plan):
            if not _keeps_shape(block):
                raise PlanError(f"{block.name} cannot be dropped: what leaves it has another shape than what enters it")
        if len(names) >= len(known):
            raise PlanError(f"the plan drops all {len(known)} blocks; at least one must remain")

    def apply(self, editor: Editor, structure: Structure, plan: DropBlocksPlan, statistics: Statistics) -> None:
        """Bypass the blocks, last first, so that neighbours that both go are bypassed together."""
        chosen = _chosen(structure, plan)
        for block in reversed(chosen):
            editor.replace(block.exit, block.entry)
        left = [block.index for block in structure.blocks if block not in chosen]
        editor.renumber({index: number for number, index in enumerate(left)})

    def exact(self, plan: DropBlocksPlan) -> bool:
        """Dropping a block changes the model."""
        return not plan.decisions

    def parameter_delta(self, graph: Graph, structure: Structure, plan: DropBlocksPlan) -> int:
        """All weights that nothing reads any more."""
        return -freed_parameter_count(graph, _unread(graph, _chosen(structure, plan)))

    def summary(self, plan: DropBlocksPlan) -> str:
        """The numbers of the blocks that went."""
        numbers = ", ".join(decision.site.removeprefix("blocks.") for decision in plan.decisions)
        return f"dropped block {numbers}" if plan.decisions else "dropped no block"


def _droppable(structure: Structure) -> list[Block]:
    return [block for block in structure.selected_blocks() if _keeps_shape(block)]


def _keeps_shape(block: Block) -> bool:
    entry, exit = (node.meta["val"] for node in (block.entry, block.exit))
    return [str(size) for size in entry.shape] == [str(size) for size in exit.shape]


def _chosen(structure: Structure, plan: DropBlocksPlan) -> list[Block]:
    names = {decision.site for decision in plan.decisions}
    return [block for block in structure.blocks if block.name in names]


def _unread(graph: Graph, blocks: list[Block]) -> list[fx.Node]:
    """What no output but caches and recorded routing is computed from any more once blocks are dropped.

    Not all nodes of the blocks, where streams side by side share some; and others, which were computed for them alone.
    """
    instead = {block.exit: block.entry for block in blocks}
    nodes = graph.module.graph
    shown = zip(nodes.output_node().args[0], graph.outputs, strict=True)  # type: ignore[arg-type]  # a tuple of nodes
    kept: set[fx.Node] = set()
    stack = [node for node, port in shown if port.role not in ASIDE]
    while stack:
        node = stack.pop()
        if node in instead:
            stack.append(instead[node])
        elif node not in kept:
            kept.add(node)
            stack.extend(node.all_input_nodes)
    return [node for node in nodes.nodes if node.op == "call_function" and node not in kept]
