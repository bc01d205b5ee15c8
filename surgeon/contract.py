"""The contracts that passes and backends fulfil.

A pass is its own configuration: a frozen pydantic model whose fields are its YAML schema.  It answers three questions and
does nothing else; the pipeline clones, cleans up, fingerprints, verifies, times and reports::

    observers(structure)                       what to measure on calibration data ({} = nothing, no forward run)
    plan(graph, structure, statistics)         what to do: a small, readable, editable piece of JSON; refuses here
    apply(editor, structure, plan, statistics) do it

A backend is a frozen pydantic model too: ``refuses`` says what it cannot express, ``lower`` writes files.
"""

from __future__ import annotations

import abc
import copy
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Generic, Literal, Self, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor, fx

from surgeon.errors import GenerateError, LowerError, PlanError
from surgeon.ports import port_of
from surgeon.structure import Linear, Selection, Site, Structure

if TYPE_CHECKING:
    from surgeon.generation import Decoder
    from surgeon.graph import Graph
    from surgeon.rewrite import Editor


class Observer(abc.ABC):
    """A streaming statistic over the values of some nodes.

    Class attributes:
        gradient: the derivative of the loss with respect to the last node is handed to ``update`` too, after the values.
            Such observers see the model as it is before the pass, once, also where the pass is driven block by block.
        directed: with ``gradient``: where the model has no loss, the derivative is that of a random direction of its outputs
            (see ``surgeon.gradients``); others get none there.
        whole: ``update`` is handed the values with all their dimensions, padding included, and behind them the numbers of
            the rows of the first one that are no padding, [tokens].

    Attributes:
        nodes: the nodes whose values are handed to ``update``, in that order.
        features: which of their dimensions holds the features, from the end: it becomes the last one of what is handed over.
    """

    gradient: ClassVar[bool] = False
    directed: ClassVar[bool] = False
    whole: ClassVar[bool] = False
    nodes: tuple[fx.Node, ...]
    features: int = -1

    @abc.abstractmethod
    def update(self, *values: Tensor) -> None:
        """Add one calibration batch.

        Args:
            *values: one tensor per node, each [tokens, ...]: batch and sequence are flattened and padding is removed.
        """

    @abc.abstractmethod
    def merge(self, other: Observer) -> None:
        """Add what another observer of the same kind saw on other data."""

    def placed(self, graph: Graph) -> Self:
        """The same statistic with its tensors where the graph is run, for work on it that is heavy; see ``Graph.placed``."""
        if graph.placement is None:
            return self
        other = copy.copy(self)
        vars(other).update(graph.placed(vars(self)))
        return other


LEFT = "left alone"
"""What a plan's note on a site says in front of the reason why nothing is done there."""


def refuse_all_left(plan: Plan[Any], nothing: str) -> None:
    """Refuse a plan that decides nothing because sites were left alone.

    Args:
        plan: its notes on them say ``SITE: left alone: REASON``.
        nothing: what the model has none of, as a sentence.

    Raises:
        PlanError: the sentence, the first reason, and how many more there are.
    """
    if not plan.decisions and (left := [note for note in plan.notes if f": {LEFT}: " in note]):
        more = f" (and {len(left) - 1} more)" if len(left) > 1 else ""
        raise PlanError(f"{nothing}; {left[0]}{more}")


Statistics = Mapping[str, Observer]
"""Observers by key after they have seen the calibration data."""


def placed(graph: Graph, statistics: Statistics) -> Statistics:
    """All statistics of a block where the graph is run; see :meth:`Observer.placed`."""
    return {key: observer.placed(graph) for key, observer in statistics.items()}


Seed = Annotated[int, Field(ge=0, lt=2**64)]
"""What a generator of random numbers can be started with."""


class Decision(BaseModel):
    """What a plan says about one site.

    Attributes:
        site: name of the site, e.g. ``blocks.3.ffn``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    site: str


D = TypeVar("D", bound=Decision)


class Plan(BaseModel, Generic[D]):
    """What a pass will do, as data: indices, ranks, scores.

    Attributes:
        decisions: one entry per site that is changed.
        notes: what a reader should know, e.g. sites left alone and why.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    decisions: tuple[D, ...] = ()
    notes: tuple[str, ...] = ()

    @field_validator("decisions")
    @classmethod
    def _sites_differ(cls, decisions: tuple[D, ...]) -> tuple[D, ...]:
        """Passes look decisions up by site, and apply each to what the site was before."""
        twice = [site for site, count in Counter(decision.site for decision in decisions).items() if count > 1]
        if twice:
            raise ValueError(f"{', '.join(twice)} decided more than once; needed one decision per site")
        return decisions

    def joined(self, others: Sequence[Plan[D]]) -> Plan[D]:
        """This plan with the decisions and notes of others appended (block-scoped passes plan block by block)."""
        decisions = [d for plan in (self, *others) for d in plan.decisions]
        notes = [n for plan in (self, *others) for n in plan.notes]
        return self.model_copy(update={"decisions": tuple(decisions), "notes": tuple(dict.fromkeys(notes))})


P = TypeVar("P", bound=Plan[Any])


class Pass(BaseModel, abc.ABC, Generic[P]):
    """A declarative rewrite.  Subclasses add fields; the field docstrings are their documentation in every place.

    Class attributes:
        name: registered name, equal to the file's name and the YAML key.
        scope: ``model`` passes see all statistics at once; ``block`` passes are driven block by block, each block being
            observed on the activations that the already-changed model produces.
        plan_type: the pydantic class of its plan.
        apply_reads_statistics: ``apply`` needs the statistics too, so that repeating a saved plan observes again.
        heals: a backend may take the graph behind the pass where it refuses the one in front of it, since operators, inputs
            or sizes are others; False lets a build be refused before the passes work for all that is refused of the source, or
            of what ``rehearse`` leaves of it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: ClassVar[str]
    scope: ClassVar[Literal["model", "block"]] = "model"
    plan_type: ClassVar[type[Plan[Any]]]
    apply_reads_statistics: ClassVar[bool] = False
    heals: ClassVar[bool] = True

    blocks: str | int | list[int] | None = None
    """Blocks to act on: an index, a list of them, or a Python slice as text such as "4:" or "::2"; all by default."""
    names: str | list[str] | None = None
    """Shell patterns over site names (blocks.3.ffn.up) and weight names; all by default."""

    @field_validator("blocks")
    @classmethod
    def _blocks_are_readable(cls, value: str | int | list[int] | None) -> str | int | list[int] | None:
        if isinstance(value, str):
            _slice(value)
        return value

    @field_validator("names")
    @classmethod
    def _names_name_something(cls, value: str | list[str] | None) -> str | list[str] | None:
        if value == []:
            raise ValueError("no pattern selects nothing; leave it out for everything")
        return value

    def selection(self, structure: Structure) -> Selection:
        """The sites that ``blocks:`` and ``names:`` admit on this model.

        Raises:
            PlanError: a block index that the model does not have.
        """
        patterns = (self.names,) if isinstance(self.names, str) else tuple(self.names or ())
        if self.blocks is None:
            return Selection(None, patterns)
        count = len(structure.blocks)
        if isinstance(self.blocks, str):
            chosen = list(range(count))[_slice(self.blocks)]
        else:
            wanted = [self.blocks] if isinstance(self.blocks, int) else self.blocks
            wrong = [index for index in wanted if not -count <= index < count]
            if wrong:
                raise PlanError(
                    f"{self.name}: blocks: {wrong} do not exist; the model has {count} blocks, numbered 0 to {count - 1}"
                )
            chosen = [index % count for index in wanted]
        return Selection(frozenset(chosen), patterns)

    def linears(self, structure: Structure) -> Iterator[Site[Linear]]:
        """Selected linears; routers only where ``names`` says which sites."""
        for site in structure.selected_linears():
            if self.names is not None or not site.name.endswith(".router"):
                yield site

    def observers(self, structure: Structure) -> Mapping[str, Observer]:
        """What to measure at the selected sites; nothing by default."""
        return {}

    def survey(self, structure: Structure) -> Mapping[str, Observer]:
        """What a pass of scope ``block`` measures once on the whole model as it is, to decide with ``plan_whole``; {} by
        default, and then each block is planned as the sweep reaches it.
        """
        return {}

    def plan_whole(self, graph: Graph, structure: Structure, statistics: Statistics) -> P:
        """Decide for all blocks at once, before the sweep, which then applies that plan as it does a saved one.

        Args:
            graph: the model as it is before the pass.
            structure: its structure.
            statistics: what ``survey`` asked for.

        Raises:
            PlanError: what was asked cannot be done on this model; names the site.
        """
        raise NotImplementedError(f"{self.name}: a pass that has a survey plans the whole model with it")

    @abc.abstractmethod
    def plan(self, graph: Graph, structure: Structure, statistics: Statistics) -> P:
        """Decide what to do at the selected sites.  Pure: reads weights, changes nothing.

        Raises:
            PlanError: what was asked cannot be done on this model; names the site.
        """

    def accept(self, plan: P) -> None:
        """Refuse a plan of the whole model that does nothing of what was asked, with the reasons that its notes give.

        Raises:
            PlanError: nothing can be done on this model.
        """

    def check(self, graph: Graph, structure: Structure, plan: P) -> None:
        """Refuse a plan (a saved or edited one) that does not fit this model.  Called before every ``apply``.

        Raises:
            PlanError: names the decision's site and what does not fit.
        """

    @abc.abstractmethod
    def apply(self, editor: Editor, structure: Structure, plan: P, statistics: Statistics) -> None:
        """Edit the clone that ``editor`` holds; replace tensors, never write into them."""

    def rehearse(self, editor: Editor, structure: Structure, plan: P | None) -> None:
        """Leave operators of the kinds and sizes that ``apply`` will certainly leave, on tensors of any numbers (those on the
        meta device): a backend is asked about them before hours of work are done.  Nothing by default; no heavy work, no
        data, little memory.

        Args:
            editor: of a copy of the graph.
            structure: its structure, with the pass's selection.
            plan: what will be done, where that is known already.

        Raises:
            PlanError: what was asked cannot be done on this model.
        """

    def exact(self, plan: P) -> bool:
        """Whether this plan must leave the outputs as they are (checked numerically by the pipeline)."""
        return not plan.decisions

    @abc.abstractmethod
    def parameter_delta(self, graph: Graph, structure: Structure, plan: P) -> int:
        """Change of the parameter count that this plan causes; checked against the rewritten graph.

        Args:
            graph: the graph before.
            structure: its structure.
            plan: the plan.
        """

    def summary(self, plan: P) -> str:
        """One line for the report: what the plan does."""
        return f"{len(plan.decisions)} sites"


_SLICE = re.compile(r"\s*(-?\d+)?\s*(:)?\s*(-?\d+)?\s*(?:(:)\s*(-?\d+)?)?\s*")


def _slice(text: str) -> slice:
    """Parse ``"4:"``, ``":-1"``, ``"::2"`` as Python would."""
    match = _SLICE.fullmatch(text)
    if match is None or (match[2] is None):
        raise ValueError(f"{text!r} is not a slice such as '4:', ':-2' or '1:8:2'")
    start, stop, step = (int(match[g]) if match[g] is not None else None for g in (1, 3, 5))
    if step == 0:
        raise ValueError(f"{text!r}: the step of a slice cannot be 0")
    return slice(start, stop, step)


@dataclass(frozen=True)
class Refusal:
    """Why a backend cannot express a graph.

    Attributes:
        node: name of the node, or of the input or option concerned.
        reason: what is not supported, and what is.
        lasting: no pass could take it away, such as one of a type, an input, an option or the bits of codes.
    """

    node: str
    reason: str
    lasting: bool = False


@dataclass(frozen=True)
class ArtifactFile:
    """One file of an artefact: path relative to the artefact's folder, size in bytes, sha256 in hex."""

    path: str
    bytes: int
    sha256: str

    @classmethod
    def of(cls, folder: Path, path: str) -> ArtifactFile:
        """Measure and hash ``folder / path``."""
        digest = hashlib.sha256()
        with (folder / path).open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
        return cls(path, (folder / path).stat().st_size, digest.hexdigest())

    @classmethod
    def recorded(cls, folder: Path, entries: Iterable[Mapping[str, Any]]) -> tuple[ArtifactFile, ...]:
        """The files of a manifest, compared with what is there.

        Raises:
            LowerError: one is missing or outside the folder, or its size or digest is not the recorded one.
        """
        files = tuple(cls(**entry) for entry in entries)
        for file in files:
            path = folder / file.path
            if not path.resolve().is_relative_to(folder.resolve()):
                raise LowerError(f"{folder}: its manifest names {file.path}, which is not in this folder")
            if not path.is_file():
                raise LowerError(f"{path}: the file is missing; build the artefact again")
            found = cls.of(folder, file.path)
            for what in ("bytes", "sha256"):
                have, want = getattr(found, what), getattr(file, what)
                if have != want:
                    raise LowerError(f"{path} is damaged: {what} is {have}, recorded {want}; build the artefact again")
        return files


@dataclass
class Artifact(abc.ABC):
    """Files that a backend wrote, and how to run them.

    Attributes:
        folder: where the files are.
        backend: name of the backend that wrote them.
        options: that backend's options.
        files: every file of the artefact.
        inputs: names, dtypes and shapes of the inputs, as in ``Graph.inputs``.
        outputs: likewise.
        details: facts for the report, such as node counts by operator, fused operators, quantization, opset; ``warnings``
            among them is a list of what the report warns of.

    Class attributes:
        own_caches: caches are the runtime's own: a call hands none in and gets none back, and ``decoder`` continues texts.
        skips_padding: outputs are 0 at positions that the mask leaves out, whatever the graph computes there.
    """

    own_caches: ClassVar[bool] = False
    skips_padding: ClassVar[bool] = False

    folder: Path
    backend: str
    options: dict[str, Any]
    files: tuple[ArtifactFile, ...]
    inputs: tuple[Any, ...]
    outputs: tuple[Any, ...]
    details: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def recorded(cls, folder: Path, backend: str, options: dict[str, Any], manifest: Mapping[str, Any], **own: Any) -> Self:
        """The artefact that a manifest describes, with its files as they were; ``own`` are fields of this class alone.

        Raises:
            LowerError: a file is missing or damaged.
        """
        files = ArtifactFile.recorded(folder, manifest["files"])
        inputs, outputs = (tuple(map(port_of, manifest[key])) for key in ("inputs", "outputs"))
        return cls(folder, backend, options, files, inputs, outputs, dict(manifest.get("details", {})), **own)

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(file.bytes for file in self.files)

    @property
    def unavailable(self) -> str | None:
        """Why it cannot run on this machine, or None where it can."""
        return None

    def move(self, folder: Path) -> None:
        """Say that the files lie in this folder now: a build renames the one it wrote them into."""
        self.folder = folder

    @abc.abstractmethod
    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run on keyword inputs (torch tensors), returning torch tensors by output name."""

    @property
    def device(self) -> torch.device:
        """Where the tensors are that it returns."""
        return torch.device("cpu")

    def run_on_host(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """:meth:`run`, with its results in the host's memory, beside those of graphs and source models."""
        return {name: value.cpu() for name, value in self.run(inputs).items()}

    def stepping(self, inputs: Mapping[str, Tensor]) -> Callable[[], object]:
        """What computes one step on these inputs whenever it is called, as a generation would: for timing."""
        given = {name: value.to(self.device) for name, value in inputs.items()}
        return lambda: self.run(given)

    def decoder(self) -> Decoder:
        """Start generating a text with an artefact that has caches; see :mod:`surgeon.generation`.

        Raises:
            GenerateError: it holds encoder and decoder as one, so that the encoder would be run for every token.
        """
        from surgeon.generation import GraphDecoder
        from surgeon.halves import has_halves

        if has_halves(self.inputs):
            raise GenerateError(
                f"an artefact of {self.backend} computes encoder and decoder in one, so every token would run the encoder "
                "again; generate with backend onnxruntime, or with the graph itself (backend=None)"
            )
        return GraphDecoder(self.run, self.inputs, self.outputs, self.device)

    @abc.abstractmethod
    def threads(self, count: int) -> AbstractContextManager[None]:
        """Run on ``count`` intra-operator threads within the context (for fair timing)."""


class Backend(BaseModel, abc.ABC):
    """A lowering target.  Subclasses add option fields.

    Class attributes:
        name: registered name, equal to the file's name and the YAML key.
        tolerance: largest relative error of the artefact against the graph that a build accepts.
        half_tolerance: the same where it computes in types of 16 bits, by type; tracing grants as much.
        low_bit_tolerance: the same where the graph holds low-bit weights, whose kernels may round activations too.
        dynamic_tolerance: the same where activations are rounded at run time.  Rounding is discontinuous: a difference in
            the last place flips a code, the flip moves later tensors' ranges, and so on through the layers; single layers
            agree to 1e-6, whole models to about the error that the rounding itself makes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: ClassVar[str]
    tolerance: ClassVar[float] = 1e-3
    half_tolerance: ClassVar[Mapping[torch.dtype, float]] = {torch.float16: 1e-2, torch.bfloat16: 5e-2}
    low_bit_tolerance: ClassVar[float] = 5e-2
    dynamic_tolerance: ClassVar[float] = 0.25

    def accepted_error(self, graph: Graph) -> float:
        """Largest relative error (Frobenius) of an output that the build accepts for this graph."""
        operators = {str(node.target) for node in graph.module.graph.nodes}
        if "surgeon.fake_quantize_dynamic.default" in operators:
            return self.dynamic_tolerance
        if "surgeon.dequantize.default" in operators:
            return self.low_bit_tolerance
        values = [node.meta.get("val") for node in graph.module.graph.nodes if node.op == "call_function"]
        types = {value.dtype for value in values if isinstance(value, Tensor)}
        return max([self.tolerance, *(self.half_tolerance.get(dtype, 0.0) for dtype in types)])

    @classmethod
    @abc.abstractmethod
    def requirements(cls) -> tuple[str, ...]:
        """Import names of the libraries it needs; missing ones are reported with ``install``."""

    @classmethod
    @abc.abstractmethod
    def install(cls) -> str:
        """The line that installs them, e.g. ``pip install 'surgeon[cpu]'``."""

    @classmethod
    def devices(cls) -> tuple[str, ...]:
        """Devices of this machine that its artefacts run on, e.g. ``cpu`` or the name of a GPU; for listings."""
        return ("cpu",)

    @abc.abstractmethod
    def refuses(self, graph: Graph) -> list[Refusal]:
        """What of this graph it cannot express, empty where it can all be."""

    def refuses_source(self, graph: Graph) -> list[Refusal]:
        """Those of its refusals that no pass could take away, such as a type or an option; asked before any pass works."""
        return [refusal for refusal in self.refuses(graph) if refusal.lasting]

    def nearer(self, graph: Graph) -> tuple[Backend | None, str]:
        """What is done where the artefact is too far from this graph.

        Returns:
            The same backend with other options whose artefact is nearer, None where there is none or the user chose these
            options; and what to change, for the warning or the error.
        """
        return None, ""

    @abc.abstractmethod
    def lower(self, graph: Graph, folder: Path) -> Artifact:
        """Write the artefact's files into ``folder`` (exists, empty).  Never modifies the graph.

        Raises:
            LowerError: names the node and the reason.
        """

    @classmethod
    @abc.abstractmethod
    def load(cls, folder: Path, manifest: Mapping[str, Any]) -> Artifact:
        """Open an artefact that ``lower`` wrote; ``manifest`` is what ``surgeon`` recorded beside it.

        Compares the files with their record (:meth:`ArtifactFile.recorded`), for nothing else does.

        Raises:
            LowerError: files are missing, damaged, or need hardware that is not there.
        """
