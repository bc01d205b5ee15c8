"""What must hold after every pass, and the thresholds that a user sets on the result."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from surgeon.accounting import parameter_count
from surgeon.caches import MASK, continued, has_caches
from surgeon.contract import Artifact, Pass, Plan
from surgeon.errors import VerifyError
from surgeon.evaluate import Outputs
from surgeon.graph import Graph
from surgeon.observe import Batch
from surgeon.routes import RECORDED, ordered
from surgeon.structure import Structure

if TYPE_CHECKING:
    from surgeon.recipe import Verify

EXACT_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10, torch.float16: 5e-3, torch.bfloat16: 3e-2}


def check_structure(step: Pass[Any], before: Structure, after: Structure) -> None:
    """Every weight has a role after a pass if it had one before.

    Raises:
        VerifyError: lists the weights that the pass left without a role.
    """
    lost = {name: reason for name, reason in after.unrecognised.items() if name not in before.unrecognised}
    if lost:
        listing = "; ".join(f"{name}: {reason}" for name, reason in sorted(lost.items())[:5])
        raise VerifyError(f"after {step.name}, {len(lost)} weights have no role in the model any more: {listing}")


def check_parameters(
    step: Pass[Any], plan: Plan[Any], source: Graph, structure: Structure, result: Graph
) -> None:
    """The parameter count changed by exactly what the plan says (right outputs alone can hide dead weights).

    Raises:
        VerifyError: gives both numbers.
    """
    before, after = parameter_count(source), parameter_count(result)
    promised = step.parameter_delta(source, structure, plan)
    if after - before != promised:
        raise VerifyError(
            f"{step.name}: the plan changes the parameter count by {promised:+,}, "
            f"the rewritten graph differs by {after - before:+,} ({before:,} -> {after:,})"
        )


def check_exact(step: Pass[Any], before: Sequence[Outputs], after: Sequence[Outputs]) -> float:
    """An exact plan leaves every output as it was.

    Args:
        step: the pass.
        before: outputs of the graph before the pass, one per batch.
        after: outputs of the rewritten graph on the same batches.

    Returns:
        The largest relative error found.

    Raises:
        VerifyError: names the output and the error.
    """
    worst = 0.0
    for expected, found in zip(before, after, strict=True):
        for name, wanted in expected.items():
            error = relative_error(found[name], wanted)
            tolerance = EXACT_TOLERANCE.get(wanted.dtype, 0.0)
            if not error <= tolerance:
                raise VerifyError(
                    f"{step.name}: this plan must not change the outputs, but {name!r} differs by {error:.2e} "
                    f"(relative; at most {tolerance:.0e} is rounding)"
                )
            worst = max(worst, error)
    return worst


def check_finite(step: Pass[Any], before: Sequence[Outputs], after: Sequence[Outputs]) -> None:
    """No number overflows, or becomes NaN, that was finite before the pass; divergences of such outputs say nothing.

    Args:
        step: the pass.
        before: outputs of the graph before the pass, one per batch.
        after: outputs of the rewritten graph on the same batches.

    Raises:
        VerifyError: names the output and how many of its numbers.
    """
    for expected, found in zip(before, after, strict=True):
        for name, wanted in expected.items():
            value = found.get(name)
            if value is None or value.shape != wanted.shape or not value.is_floating_point():
                continue
            lost = int((wanted.isfinite() & ~value.isfinite()).sum())
            if lost:
                raise VerifyError(
                    f"{step.name}: {lost} of {value.numel()} numbers of output {name!r} are NaN or infinite ({value.dtype}) "
                    "that were finite before this pass; a plan holds such a number, or this type overflows: try dtype float32"
                )


def check_caches(step: Pass[Any], graph: Graph, batches: Sequence[Batch]) -> None:
    """A graph with caches computes the same whether a text is read at once or in two parts.

    Activations that are rounded over the whole input at run time make the parts differ; such graphs are left out.

    Raises:
        VerifyError: gives the error.
    """
    dynamic = any(str(node.target) == "surgeon.fake_quantize_dynamic.default" for node in graph.module.graph.nodes)
    if dynamic or not has_caches(graph.inputs):
        return
    batch = batches[0]
    rest = continued(graph, batch)
    if rest is None:
        return
    with torch.no_grad():
        whole, part = graph(**batch)["logits"], graph(**rest)["logits"]
    error = relative_error(part, whole[:, -part.shape[1] :])
    tolerance = 10 * EXACT_TOLERANCE.get(whole.dtype, 1e-2)
    if not error <= tolerance:
        raise VerifyError(
            f"{step.name}: after this pass the caches are wrong: logits behind a cache of {whole.shape[1] - part.shape[1]} "
            f"positions differ by {error:.2e} from those of one run (relative; at most {tolerance:.0e} is rounding)"
        )


def check_thresholds(limits: Verify, quality: Mapping[str, float]) -> None:
    """The recipe's ``verify`` section against the figures of the finished model.

    Raises:
        VerifyError: lists every threshold that is missed, and those whose figure this model does not have.
    """
    ratio = quality["perplexity"] / quality["perplexity_source"] if "perplexity" in quality else None
    rules = [
        ("max_kl", limits.max_kl, quality.get("kl"), 1),
        ("max_relative_error", limits.max_relative_error, quality.get("relative_error"), 1),
        ("min_cosine", limits.min_cosine, quality.get("cosine_similarity"), -1),
        ("max_perplexity_ratio", limits.max_perplexity_ratio, ratio, 1),
    ]
    problems = []
    for name, limit, found, sign in rules:
        if limit is None:
            continue
        if found is None:
            problems.append(f"{name}: this model has no such figure (it has {', '.join(sorted(quality)) or 'none'})")
        elif not sign * found <= sign * limit:
            problems.append(f"{name}: found {found:.4g}, needed {'at most' if sign > 0 else 'at least'} {limit:.4g}")
    if problems:
        raise VerifyError("verify: " + "; ".join(problems) + "; choose a milder recipe or other thresholds")


def compare_artifact(
    artifact: Artifact, graph: Graph, batches: Sequence[Batch], tolerance: float
) -> list[dict[str, Any]]:
    """Run the artefact beside the graph on inputs of several shapes, and on their second halves behind caches.

    Args:
        artifact: what was written.
        graph: what it must compute.
        batches: inputs of several shapes.
        tolerance: largest relative error (Frobenius) of an output.

    Returns:
        Per batch: input shapes, and per output the relative error and the mean cosine similarity of its rows.

    Raises:
        VerifyError: an output is missing, has another shape, or differs by more than ``tolerance``.
    """
    comparisons = []
    decisions = {port.name for port in graph.outputs if port.role == RECORDED}
    taken = has_caches(graph.inputs) and not artifact.own_caches
    behind = [continued(graph, batch) for batch in batches] if taken else []
    for batch in [*batches, *(batch for batch in behind if batch is not None)]:
        with torch.no_grad():
            expected = ordered(graph.outputs, graph(**batch))
        if artifact.skips_padding:
            expected = {name: _unpadded(value, batch.get(MASK)) for name, value in expected.items()}
        found = ordered(graph.outputs, artifact.run_on_host(batch))
        errors, cosines = {}, {}
        for name, wanted in expected.items():
            if name not in found or found[name].shape != wanted.shape:
                shape = list(found[name].shape) if name in found else "nothing"
                raise VerifyError(f"the artefact gives {shape} for output {name!r}, the graph {list(wanted.shape)}")
            errors[name] = relative_error(found[name], wanted)
            rows = [value.float().reshape(-1, value.shape[-1] if value.dim() else 1) for value in (found[name], wanted)]
            cosines[name] = float(torch.nn.functional.cosine_similarity(rows[0], rows[1], dim=-1).mean())
            # A rounding flips a decision between experts of nearly equal scores: a difference in the last place of a few
            # scores is a whole row of another expert, and the norm of s rows of unit size is the root of s.
            accepted = math.sqrt(tolerance) if name in decisions else tolerance
            if not errors[name] <= accepted:
                shapes = {key: list(value.shape) for key, value in batch.items()}
                raise VerifyError(
                    f"the {artifact.backend} artefact does not compute what the graph does: output {name!r} differs by "
                    f"{errors[name]:.2e} (relative), at most {accepted:.0e} is accepted, on inputs of shapes {shapes}"
                )
        comparisons.append(
            {
                "shapes": {name: list(value.shape) for name, value in batch.items()},
                "relative_error": errors,
                "cosine": cosines,
            }
        )
    return comparisons


def _unpadded(value: Tensor, mask: Tensor | None) -> Tensor:
    """An output with 0 at the positions that the mask leaves out."""
    if mask is None or value.shape[:2] != mask.shape:
        return value
    return value.masked_fill(~mask.bool().reshape(*mask.shape, *[1] * (value.dim() - 2)), 0)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """``||found - wanted|| / ||wanted||`` (Frobenius, float64); for integers the share of entries that differ."""
    if not wanted.is_floating_point():
        return float((found != wanted).double().mean())
    norm = float(wanted.double().norm())
    difference = float((found.double() - wanted.double()).norm())
    return difference / norm if norm > 0 else difference
