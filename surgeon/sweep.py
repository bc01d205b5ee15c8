"""The sweep: observing, planning and applying a block-scoped pass one block at a time.

Each block is observed on the activations that the already-changed model produces, so errors of earlier blocks are seen by
the later ones.  At any moment one set of hidden states per calibration batch is held: the values alive at the block's entry.
Several streams are swept in the order in which the graph computes them.

A sweep that was interrupted goes on with the first block that was not done: the graph is what it was behind the last one that
was, and the hidden states are computed again by running the blocks in front, once, as they are now.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import fx

from surgeon.contract import Observer, Pass, Plan
from surgeon.errors import ObserveError, PlanError
from surgeon.gradients import observe_gradients
from surgeon.observe import Batch, Execution, Stretch, observe, settle
from surgeon.progress import Progress
from surgeon.resuming import Sweeping
from surgeon.rewrite import Editor
from surgeon.structure import Block, Structure

Batches = Callable[[], Sequence[Batch]]


def run_pass(
    step: Pass[Any],
    editor: Editor,
    structure: Structure,
    batches: Batches,
    saved: Plan[Any] | None,
    progress: Progress,
    sweeping: Sweeping | None = None,
) -> tuple[Plan[Any], int]:
    """Observe, plan and apply one pass on the clone that the editor holds.

    Args:
        step: the pass.
        editor: editor of the clone.
        structure: structure of the clone, with the pass's selection.
        batches: gives the calibration batches; called only when something is observed.
        saved: a plan to repeat instead of planning.
        progress: where to show progress.
        sweeping: told of every block that is done, and where an interrupted sweep left off; None to go through all of them.

    Returns:
        The plan that was applied and the number of calibration tokens that were observed.

    Raises:
        ObserveError: the pass needs data and there is none.
        PlanError: the pass refuses, or finds nothing to do.
    """
    sweeping = sweeping or Sweeping(step, None)
    surveyed: Mapping[str, Observer] = step.survey(structure) if saved is None else {}
    whole: Plan[Any] | None = None
    if surveyed and sweeping.kept is not None:
        saved = whole = sweeping.kept.whole
    elif surveyed:
        _observe_backward(step, editor, batches, surveyed, progress)
        _observe_forward(step, editor, batches, surveyed, progress)
        saved = whole = _some(step, structure, step.plan_whole(editor.graph, structure, surveyed))
    tokens = _tokens(surveyed)
    del surveyed
    observers = step.observers(structure) if saved is None or step.apply_reads_statistics else {}
    backward = _observe_backward(step, editor, batches, observers, progress)
    if step.scope == "model" or not observers:
        _observe_forward(step, editor, batches, observers, progress)
        plan = saved if saved is not None else _some(step, structure, step.plan(editor.graph, structure, observers))
        step.check(editor.graph, structure, plan)
        step.apply(editor, structure, plan, observers)
        return plan, max(tokens, _tokens(observers))
    return _sweep(step, editor, structure, batches(), backward, saved, whole, sweeping, progress)


def _observe_backward(
    step: Pass[Any], editor: Editor, batches: Batches, observers: Mapping[str, Observer], progress: Progress
) -> dict[str, Observer]:
    """Feed the observers that want gradients, and return them."""
    backward = {key: observer for key, observer in observers.items() if observer.gradient}
    if backward:
        observe_gradients(
            editor.graph, progress.track(batches(), f"{step.name}: gradients", len(batches())), backward
        )
    return backward


def _observe_forward(
    step: Pass[Any], editor: Editor, batches: Batches, observers: Mapping[str, Observer], progress: Progress
) -> None:
    """Feed the other observers on the whole model."""
    forward = {key: observer for key, observer in observers.items() if not observer.gradient}
    if forward:
        observe(editor.graph, progress.track(batches(), f"{step.name}: observing", len(batches())), forward)


def _sweep(
    step: Pass[Any],
    editor: Editor,
    structure: Structure,
    batches: Sequence[Batch],
    backward: Mapping[str, Observer],
    saved: Plan[Any] | None,
    whole: Plan[Any] | None,
    sweeping: Sweeping,
    progress: Progress,
) -> tuple[Plan[Any], int]:
    if not batches:
        raise ObserveError(f"{step.name}: the calibration data holds no batch")
    if saved is not None:
        step.check(editor.graph, structure, saved)
    blocks = _in_order(editor.graph.module.graph, structure)
    plans: list[Plan[Any]] = []
    tokens = 0
    previous: fx.Node | None = None
    kept = sweeping.kept
    if kept is not None:
        plans, tokens = list(kept.plans), kept.tokens
        after = blocks[len(plans) - 1][0].exit.next if plans else None
        kept.restore(editor, structure)
        previous = after.prev if after is not None else None
    executions = [Execution(editor.graph, batch) for batch in batches]
    if previous is not None and len(plans) < len(blocks) and not blocks[len(plans)][1]:
        # what blocks that were done elsewhere hand on is what they compute as they are now
        nodes = list(_between(editor.graph.module.graph, None, previous.next))
        reaching = Stretch(editor.graph.module.graph, nodes)
        for execution in progress.track(executions, f"{step.name}: running the blocks that are done", len(executions)):
            execution.run(reaching)
    if kept is None and whole is not None:
        sweeping.passed(len(blocks), editor, structure, plans, whole, tokens)
    left = blocks[len(plans) :]
    for block, interleaved in progress.track(left, f"{step.name}: blocks", len(blocks), done=len(plans)):
        if interleaved:
            executions = [Execution(editor.graph, batch) for batch in batches]
            previous = None
        view = structure.select(replace(structure.selection, blocks=_only(structure, block.index)))
        observers = _observed(step.observers(view), backward)
        forward = [observer for observer in observers.values() if not observer.gradient]
        after = block.exit.next  # stays in place: a block-scoped pass edits nothing behind the block's exit
        if forward:
            nodes = list(_between(editor.graph.module.graph, previous, after))
            observing = Stretch(editor.graph.module.graph, nodes, forward)
            for execution in executions:
                execution.fork().run(observing)
            settle(forward)
        tokens = max(tokens, _tokens(observers))
        plan = _own(saved, block.index) if saved is not None else step.plan(editor.graph, view, observers)
        if plan.decisions:
            step.check(editor.graph, view, plan)
            ports = editor.graph.inputs
            step.apply(editor, view, plan, observers)
            editor.settle()
            if editor.graph.inputs != ports:
                for execution in executions:
                    execution.rebind()
        plans.append(plan)
        nodes = list(_between(editor.graph.module.graph, previous, after))
        propagating = Stretch(editor.graph.module.graph, nodes)
        for execution in executions:
            execution.run(propagating)
        previous = after.prev
        sweeping.passed(len(blocks), editor, structure, plans, whole, tokens)
    outside = structure.select(replace(structure.selection, blocks=_only(structure, None)))
    observers = _observed(step.observers(outside), backward)
    executions.clear()
    forward_outside = {key: observer for key, observer in observers.items() if not observer.gradient}
    if forward_outside:
        observe(editor.graph, batches, forward_outside)
    tokens = max(tokens, _tokens(observers))
    plan = _own(saved, None) if saved is not None else step.plan(editor.graph, outside, observers)
    if plan.decisions:
        step.check(editor.graph, outside, plan)
        step.apply(editor, outside, plan, observers)
    plans.append(plan)
    return (saved if saved is not None else _some(step, structure, plans[0].joined(plans[1:]))), tokens


def _some(step: Pass[Any], structure: Structure, plan: Plan[Any]) -> Plan[Any]:
    """The plan, refused where it neither does anything nor says why, or where its pass does."""
    step.accept(plan)
    selection = structure.selection
    missed = [repr(pattern) for pattern in selection.names if pattern not in selection.matched]
    if plan.decisions or plan.notes:
        if missed:  # of several patterns: a recipe for models of more than one kind has some that are for others
            there = "" if step.blocks is None else f" at blocks: {step.blocks!r}"
            note = f"names: {', '.join(missed)} matches nothing that {step.name} works on{there}"
            plan = plan.model_copy(update={"notes": (*plan.notes, note)})
        return plan
    asked = [f"{field}: {value!r}" for field in ("blocks", "names") if (value := getattr(step, field)) is not None]
    parts = dict.fromkeys(region.kind for block in structure.blocks for region in block.regions)
    sites = ", ".join(site.name for site in structure.linears[:4])
    raise PlanError(
        f"there is nothing to do{' at ' + ' and '.join(asked) if asked else ''}: the model has {len(structure.blocks)} "
        f"blocks of {', '.join(parts)}, and linears such as {sites}"
    )


def _in_order(graph: fx.Graph, structure: Structure) -> list[tuple[Block, bool]]:
    """The blocks of all streams by the position of their exits, and whether a part of one is computed before the last exit.

    Such a block (of streams that run side by side) is reached by running from the start once more.
    """
    position = {node: index for index, node in enumerate(graph.nodes)}
    found: list[tuple[Block, bool]] = []
    reached = -1
    for block in sorted(structure.blocks, key=lambda block: position[block.exit]):
        reads = [node for node in block.nodes if any(source.op == "get_attr" for source in node.all_input_nodes)]
        found.append((block, any(position[node] <= reached for node in reads)))
        reached = position[block.exit]
    return found


def _observed(observers: Mapping[str, Observer], backward: Mapping[str, Observer]) -> dict[str, Observer]:
    """The observers, those with gradients replaced by the ones that were fed before the sweep."""
    return {key: backward.get(key, observer) for key, observer in observers.items()}


def _only(structure: Structure, block: int | None) -> frozenset[int | None]:
    """The selection narrowed to one block (None: outside the blocks)."""
    chosen = structure.selection.blocks
    return frozenset({block} if chosen is None or block in chosen else ())


def _own(plan: Plan[Any], block: int | None) -> Plan[Any]:
    """The decisions of a plan that concern one block (None: outside the blocks)."""
    prefix = f"blocks.{block}."
    own = tuple(
        d
        for d in plan.decisions
        if (d.site.startswith(prefix) if block is not None else not d.site.startswith("blocks."))
    )
    return plan.model_copy(update={"decisions": own})


def _between(graph: fx.Graph, previous: fx.Node | None, after: fx.Node) -> Iterator[fx.Node]:
    """Nodes behind ``previous`` (None: from the start, without the placeholders) and before ``after``."""
    started = previous is None
    for node in graph.nodes:
        if node is after:
            return
        if started and node.op != "placeholder":
            yield node
        started = started or node is previous


def _tokens(observers: Mapping[str, Observer]) -> int:
    return max((int(getattr(observer, "tokens", 0)) for observer in observers.values()), default=0)
