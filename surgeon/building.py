"""What users call to build: every door makes a :class:`surgeon.pipeline.Request` and runs it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from surgeon.compiled import Compiled
from surgeon.contract import Backend, Pass
from surgeon.errors import PlanError, RecipeError
from surgeon.export import Varying
from surgeon.graph import Graph
from surgeon.observe import Batch
from surgeon.pipeline import Request, run
from surgeon.plans import SavedPlan
from surgeon.recipe import Calibration, Evaluate, Recipe, Verify, load_recipe
from surgeon.registry import make_backend, make_pass
from surgeon.validation import InvalidFields, validate


def compile(
    model: str | Path | nn.Module | Graph | Compiled,
    passes: Sequence[Pass[Any] | Mapping[str, Any] | str] | str | Path,
    *,
    inputs: Mapping[str, Any] | None = None,
    calibration: Calibration | Mapping[str, Any] | str | Path | Iterable[Batch] | None = None,
    backend: str | Mapping[str, Any] | Backend | None = "onnxruntime",
    output: str | Path | None = None,
    verify: Verify | Mapping[str, Any] | None = None,
    evaluate: Evaluate | Mapping[str, Any] | None = None,
    task: str | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    dynamic: Varying | None = None,
    trust_remote_code: bool = False,
    plan: SavedPlan | str | Path | None = None,
    force: bool = False,
    resume: bool = False,
    progress: bool = True,
) -> Compiled:
    """Operate on a model and lower it.

    Args:
        model: a checkpoint directory, a hub id, ``"package.module:callable"``, or a module; or the result of an earlier call
            with its graph, fine-tuned meanwhile, say, which is then what the result is compared with.
        passes: pass objects or one-key dicts in order, or the path of a recipe, whose passes are taken and whose
            calibration, verify, evaluate and device stand in where those arguments are None.
        inputs: example keyword inputs; needed for a module that is not a transformers model.  Nested tensors and
            values that are no tensors are taken as ``surgeon.trace`` says.
        calibration: an iterable of keyword-input dicts, a text file (tokenized with the model's tokenizer), or the
            recipe's mapping, to which ``tokenizer`` (an object or a path) may be added.
        backend: a name, a one-key dict with its options, or None for the rewritten graph itself.
        output: directory to write to; must not exist unless ``force``.  None keeps the artefact in a temporary
            directory that lives as long as the result.
        verify: thresholds such as ``{"max_kl": 0.1}``.
        evaluate: what to measure on the artefact, as in a recipe.
        task: ``"forward"``: the model as it is called; ``"text-generation"``: with caches, to :meth:`Compiled.generate`
            from; by default forward for a module with inputs, and for a checkpoint what its architecture is for.
        dtype: load the weights in this type; as stored by default.
        device: where the model runs on calibration data, and what is fitted to them is computed: ``"cpu"``, or an accelerator
            such as ``"cuda"``, where weights visit block by block.  Weights and results stay on the CPU.
        dynamic: dimensions that vary, by input, as in ``surgeon.trace``: ``{"input_ids": {0: "batch"}}``.
        trust_remote_code: run code that a checkpoint brings.
        plan: a saved plan to repeat instead of planning.
        force: replace an output of surgeon that exists.
        resume: keep what finished passes leave, and finished blocks of passes that go block by block, in a hidden folder
            beside ``output`` until that is there, and go on from what an interrupted build of the same model, data and passes
            kept; takes as much disk as the weights that change.
        progress: show progress bars on a terminal.

    Returns:
        The compiled model: callable, with ``graph``, ``artifact``, ``report`` and ``save``.

    Raises:
        SurgeonError: the model, a pass, the data or the backend refuses; says what and where.

    Example:
        >>> import surgeon
        >>> compiled = surgeon.compile("my-model", [{"drop_blocks": {"count": 2}}], calibration="text.txt")
        >>> compiled(input_ids=ids, attention_mask=mask)["logits"]
    """
    recipe = None
    if isinstance(passes, str | Path):
        recipe = load_recipe(passes)
        steps = recipe.passes
        calibration = calibration if calibration is not None else recipe.calibration
        verify = verify if verify is not None else recipe.verify
        evaluate = evaluate if evaluate is not None else recipe.evaluate
        device = device if device is not None else recipe.device
    else:
        steps = tuple(make_pass(item) for item in _listed(passes))
    spec, tokenizer = _calibration(calibration)
    if backend is None and output is not None:
        raise RecipeError("output: there is nothing to write without a backend; name one or leave output out")
    request = Request(
        model=model,
        steps=steps,
        inputs=inputs,
        calibration=spec,
        tokenizer=tokenizer,
        backend=None if backend is None else make_backend(backend),
        output=Path(output) if output is not None else None,
        verify=_section(Verify, verify, "verify") or Verify(),
        evaluate=_section(Evaluate, evaluate, "evaluate"),
        task=task,
        dtype=dtype,
        device="cpu" if device is None else str(device),
        dynamic=dynamic,
        trust_remote_code=trust_remote_code,
        saved=_saved(plan),
        force=force,
        resume=resume,
        recipe=recipe,
    )
    return run(request, progress=progress)


def compile_recipe(
    recipe: Recipe,
    *,
    plan: SavedPlan | None = None,
    output: Path | None = None,
    force: bool = False,
    resume: bool = False,
    progress: bool = True,
) -> Compiled:
    """Build what a recipe says.

    Raises:
        SurgeonError: see :func:`compile`.
    """
    return run(_from_recipe(recipe, plan, output, force, resume), progress=progress)


def plan_recipe(recipe: Recipe, *, progress: bool = True) -> SavedPlan:
    """Plan every pass of a recipe and write nothing.

    Each pass is planned on the model that the passes before it leave, so the passes do run, in memory.

    Raises:
        SurgeonError: see :func:`compile`.
    """
    plan = run(_from_recipe(recipe, None, None, True, False), progress=progress, lower=False).plan
    assert plan is not None
    return plan


def _from_recipe(recipe: Recipe, plan: SavedPlan | None, output: Path | None, force: bool, resume: bool) -> Request:
    target = output if output is not None else (Path(recipe.output) if recipe.output is not None else None)
    return Request(
        model=recipe.model.source,
        steps=recipe.passes,
        calibration=recipe.calibration,
        backend=recipe.backend,
        output=target if recipe.backend is not None else None,
        verify=recipe.verify or Verify(),
        evaluate=recipe.evaluate,
        task=recipe.model.task,
        dtype=recipe.model.dtype,
        device=recipe.device,
        dynamic=recipe.model.dynamic,
        trust_remote_code=recipe.model.trust_remote_code,
        saved=plan,
        force=force,
        resume=resume,
        recipe=recipe,
    )


def _listed(passes: Any) -> Sequence[Any]:
    """The passes as a list; a mapping of several would say nothing of their order, and iterates over bare names."""
    if isinstance(passes, Sequence):
        return passes
    found = f"a mapping of {', '.join(map(str, passes))}" if isinstance(passes, Mapping) else type(passes).__name__
    raise RecipeError(
        f"passes: found {found}, needed a list of passes in their order, such as [{{'drop_blocks': {{'count': 2}}}}], or "
        "the path of a recipe; an empty list changes nothing"
    )


def _saved(plan: Any) -> SavedPlan | None:
    """A saved plan, read where it is a path."""
    if plan is None or isinstance(plan, SavedPlan):
        return plan
    if isinstance(plan, str | Path):
        return SavedPlan.read(plan)
    raise PlanError(f"plan: found {type(plan).__name__}, needed the path of a plan file or a surgeon.SavedPlan")


def _calibration(given: Any) -> tuple[Calibration | tuple[Batch, ...] | None, Any]:
    """Calibration of the Python API in the pipeline's form, with the tokenizer that came with it."""
    if given is None or isinstance(given, Calibration):
        return given, None
    if isinstance(given, str | Path):
        return Calibration(text=Path(given)), None
    if isinstance(given, Mapping):
        fields = dict(given)
        tensors = [str(name) for name, value in fields.items() if isinstance(value, Tensor)]
        if tensors:
            raise RecipeError(
                f"calibration: found one mapping of tensors ({', '.join(tensors)}), needed several batches: an iterable of "
                "such mappings, [{...}, {...}]; the last one is held back for checks"
            )
        tokenizer = fields.pop("tokenizer", None)
        if isinstance(fields.get("text"), Path):
            fields["text"] = str(fields["text"])
        return _section(Calibration, fields, "calibration"), tokenizer
    if not isinstance(given, Iterable):
        raise RecipeError(
            f"calibration: found {type(given).__name__}, needed a text file, a mapping with the key text, or an iterable of "
            "batches (mappings of input names to tensors)"
        )
    return tuple(given), None


S = TypeVar("S", bound=BaseModel)


def _section(model: type[S], given: S | Mapping[str, Any] | None, name: str) -> S | None:
    """One section of a recipe given as an object or as plain data."""
    if given is None or isinstance(given, model):
        return given
    if not isinstance(given, Mapping):
        raise RecipeError(f"{name}: needed a mapping, found {type(given).__name__}")
    try:
        return validate(model, given)
    except InvalidFields as error:
        raise RecipeError(f"{name}: {error}") from None
