"""What is timed: an artefact, or the source model in eager torch, on equal inputs and on one device.

A candidate places the inputs of a case where it runs before anything is timed, and a run of it is over when its device
says so, so that neither copies nor launches pass for work.
"""

from __future__ import annotations

import abc
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from surgeon.caches import MASKED_POSITIONS, PAST, POSITIONS, SUM
from surgeon.contract import Artifact
from surgeon.copying import copied
from surgeon.errors import LowerError, SurgeonError
from surgeon.export import first_lines
from surgeon.graph import Port
from surgeon.halves import has_halves
from surgeon.latency import pinned_threads
from surgeon.sampling import Settings

if TYPE_CHECKING:
    from surgeon.source import LoadedSource

Phase = Literal["forward", "prefill", "decode"]
Values = Mapping[str, Tensor | Sequence[int]]
"""By input, what its values may be: an example, which is repeated, or the smallest and largest of an integer input."""
CACHE_ARGUMENTS = ("cache", "past_key_values")
"""What transformers calls the argument and the output that hold the caches, newest first."""
EAGER = "eager torch"
"""Name of the source model among candidates."""


@dataclass(frozen=True)
class Case:
    """What is run.

    Attributes:
        phase: see the module.
        batch: rows.
        sequence: positions of the text: computed in ``forward`` and ``prefill``, held in the caches in ``decode``.  None
            where nothing takes a text of one length or another, as a model of images of one size.
    """

    phase: Phase
    batch: int
    sequence: int | None

    @property
    def tokens(self) -> int | None:
        """Positions that one run computes; None where there is no text."""
        if self.sequence is None:
            return None
        return self.batch * (1 if self.phase == "decode" else self.sequence)


class Candidate(abc.ABC):
    """Something that can be timed.

    Attributes:
        name: shown in the table.
        nbytes: bytes of its files or weights.
        has_caches: it decodes behind key/value caches, without running an encoder again.
        has_length: an input has a length, which varies or is that of its tokens; images of one size have none.
    """

    name: str
    nbytes: int
    has_caches: bool
    has_length: bool

    @abc.abstractmethod
    def prepare(self, case: Case) -> Callable[[], object]:
        """A function that runs the case once and returns when it is done.

        Raises:
            SurgeonError: it cannot run the case.
        """

    @abc.abstractmethod
    def threads(self, count: int) -> AbstractContextManager[None]:
        """Run on ``count`` threads within the context."""


class ArtifactCandidate(Candidate):
    """An artefact in its directory.

    Attributes:
        device: where it runs; None where it cannot run on this machine.
    """

    def __init__(self, name: str, artifact: Artifact, values: Values, settings: Settings | None = None) -> None:
        self.name, self.artifact, self.nbytes, self.settings = name, artifact, artifact.nbytes, settings or Settings()
        self.values = dict(values)
        self.has_caches = any(PAST in port.shape for port in artifact.inputs) and not has_halves(artifact.inputs)
        self.has_length = any(map(_length, artifact.inputs))
        self.device = None if artifact.unavailable else artifact.device

    @classmethod
    def open(cls, folder: Path, name: str) -> ArtifactCandidate:
        """Open what a build wrote.

        Raises:
            LowerError: the directory is not an artefact.
        """
        from surgeon.compiled import MANIFEST, load

        loaded = load(folder)
        artifact = loaded.artifact
        assert artifact is not None
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return cls(name, artifact, manifest.get("ranges", {}), Settings.of(loaded.generation))

    def prepare(self, case: Case) -> Callable[[], object]:
        """See :class:`Candidate`."""
        if self.artifact.unavailable:
            raise LowerError(self.artifact.unavailable)
        _check_length(self.settings, self.artifact.inputs, case)
        _check_sizes(self.artifact.inputs, case)
        ports = [port for port in self.artifact.inputs if case.phase != "forward" or PAST not in port.shape]
        step = self.artifact.stepping(inputs_for(ports, case, self.values))
        device = self.artifact.device
        return lambda: _finished(step(), device)

    def threads(self, count: int) -> AbstractContextManager[None]:
        """See :class:`Candidate`."""
        return nullcontext() if self.artifact.unavailable else self.artifact.threads(count)


class EagerCandidate(Candidate):
    """The source model in eager torch, on the inputs of an artefact and where that runs.

    It is timed within ``surgeon.source.calling(source.module)``.

    Attributes:
        stands_alone: nothing says how long a text it holds, so that its tables are looked at before a case is timed.
    """

    stands_alone = False

    def __init__(
        self, source: LoadedSource, ports: Sequence[Port], values: Values,
        settings: Settings | None = None, device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        self.name, self.settings = EAGER, settings or Settings()
        self.source, self.device = source, torch.device(device)
        self.nbytes = sum({t.data_ptr(): t.nbytes for t in source.module.parameters()}.values())
        self.values = dict(values)
        # what the model can be given besides; a graph may have been traced with fewer inputs or more (positions)
        self.taken = inspect.signature(source.module.forward).parameters
        known = {*self.taken, *source.inputs}  # the latter where it takes **kwargs
        self.ports = [port for port in ports if port.name in known and PAST not in port.shape]
        self.has_length = any(map(_length, self.ports))
        self.cache = next((name for name in CACHE_ARGUMENTS if name in self.taken), "")
        self.has_caches = bool(self.cache) and "use_cache" in self.taken

    @classmethod
    def beside(cls, source: LoadedSource, other: ArtifactCandidate) -> EagerCandidate:
        """The source of an artefact, to be timed beside it."""
        return cls(source, other.artifact.inputs, other.values, other.settings, other.device or "cpu")

    @classmethod
    def against(cls, source: LoadedSource, other: ArtifactCandidate) -> EagerCandidate:
        """A model on the inputs and the device of an artefact that need not have come from it: how long a text it holds is its
        own matter.
        """
        ports = [replace(port, most=()) for port in other.artifact.inputs]
        found = cls(source, ports, other.values, None, other.device or "cpu")
        found.stands_alone = True
        return found

    @cached_property
    def module(self) -> nn.Module:
        """The model where it is timed."""
        return on_device(self.source.module, self.device)

    def prepare(self, case: Case) -> Callable[[], object]:
        """See :class:`Candidate`; a cache is cut back to its length after every step of decoding."""
        _check_length(self.settings, self.ports, case)
        _check_sizes(self.ports, case)
        inputs = self._inputs(case)
        plain = {key: value for key, value in (("use_cache", False), ("return_dict", True)) if key in self.taken}
        if self.stands_alone and case.sequence is not None:  # on CUDA the process loses the device behind a table
            whole = Case("forward", 1, case.sequence + (case.phase == "decode"))
            with _within_tables(self.module):
                self._run(self._inputs(whole), **plain)
        if case.phase == "prefill" and self.has_caches:
            return lambda: self._run(inputs, **{**plain, "use_cache": True})
        if case.phase != "decode":
            return lambda: self._run(inputs, **plain)
        start = self._inputs(Case("prefill", case.batch, case.sequence))
        cache = self._run(start, **{**plain, "use_cache": True})[self.cache]
        if not hasattr(cache, "crop"):
            raise LowerError(f"its cache, a {type(cache).__name__}, cannot be cut back to one length")

        def step() -> None:
            self._run(inputs, **{**plain, "use_cache": True, self.cache: cache})
            cache.crop(-1)

        return step

    def _inputs(self, case: Case) -> dict[str, Tensor]:
        return {name: value.to(self.device) for name, value in inputs_for(self.ports, case, self.values).items()}

    def _run(self, inputs: Mapping[str, Tensor], **options: Any) -> Any:
        try:
            return _finished(self.module(**{**self.source.arguments(inputs), **options}), self.device)
        except SurgeonError:
            raise
        except Exception as error:  # a model's forward may raise anything: another case may still run
            shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in inputs.items())
            raise LowerError(f"the model fails on inputs {shapes}: {type(error).__name__}: {first_lines(error, 1)}") from error

    @contextmanager
    def threads(self, count: int) -> Iterator[None]:
        """See :class:`Candidate`."""
        with pinned_threads(count):
            yield


def on_device(module: nn.Module, device: torch.device) -> nn.Module:
    """A module with its weights on a device: itself where they are there, else a copy.

    The module itself is never moved: graphs share its weights, and it may be the caller's.
    """
    tensors = [*module.parameters(), *module.buffers()]
    placed: dict[int, Tensor] = {}
    for tensor in tensors:
        there = tensor.detach().to(device)
        placed[id(tensor)] = nn.Parameter(there, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else there
    if all(tensor.device == placed[id(tensor)].device for tensor in tensors):
        return module
    return copied(module, placed)  # which takes these for copies made already, tied ones too


@contextmanager
def _within_tables(module: nn.Module) -> Iterator[None]:
    """Refuse a run that looks up what a table has no row for, by the table's name."""

    def checked(name: str, rows: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def check(table: nn.Module, given: tuple[Any, ...]) -> None:
            found = int(given[0].max()) if given and given[0].numel() else -1
            if found >= rows:
                raise LowerError(f"the model looks up row {found} of {name}, which has {rows}: give a shorter sequence")

        return check

    tables = [(name, part) for name, part in module.named_modules() if isinstance(part, nn.Embedding)]
    hooks = [part.register_forward_pre_hook(checked(name, part.num_embeddings)) for name, part in tables]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def inputs_for(ports: Sequence[Port], case: Case, values: Values) -> dict[str, Tensor]:
    """Inputs of a case, on the CPU.

    Args:
        ports: what is taken; a dimension ``past`` counts cached positions, ``past + ...`` those and the new ones, the first
            dimension of every port is the batch, any other that varies is the sequence.
        case: the sizes.
        values: by name; where it is silent, masks are ones and other integers zeros.  Caches and floating-point inputs
            without an example are random, positions that the model counts itself go on behind the past.
    """
    generator = torch.Generator().manual_seed(0)
    length = case.sequence or 1  # where there is none, no dimension asks for it
    past, new = (length, 1) if case.phase == "decode" else (0, length)

    def size(axis: int, name: int | str) -> int:
        if isinstance(name, int):
            return name
        if name == PAST:
            return past
        return case.batch if axis == 0 else past + new if PAST in name.split(SUM) else new

    found = {}
    for port in ports:
        shape = [size(axis, name) for axis, name in enumerate(port.shape)]
        known = values.get(port.name, (1, 1) if "mask" in port.name else (0, 0))
        if port.role in (POSITIONS, MASKED_POSITIONS):
            found[port.name] = torch.arange(past, past + new).expand(shape).to(port.dtype).contiguous()
        elif isinstance(known, Tensor) and PAST not in port.shape:
            repeats = [-(-wanted // there) for wanted, there in zip(shape, known.shape, strict=True)]
            found[port.name] = known.repeat(repeats)[tuple(map(slice, shape))].contiguous()
        elif port.dtype.is_floating_point:
            found[port.name] = torch.randn(shape, generator=generator).to(port.dtype)
        else:
            low, high = known
            found[port.name] = torch.randint(int(low), int(high) + 1, shape, generator=generator).to(port.dtype)
    return found


def _check_length(settings: Settings, ports: Sequence[Port], case: Case) -> None:
    """Refuse a case for which a table of positions is too short; any time is right where positions are computed."""
    if case.sequence is None:
        return
    behind = 1 if case.phase == "decode" else 0
    tables = [most for port in ports for most in port.most if most is not None] if case.phase == "forward" else []
    tables += [] if settings.table_length is None else [settings.table_length]
    settings = replace(settings, table_length=min(tables, default=None), trained_length=None)
    settings.check_length(case.sequence + behind, what="this case", advice="give a shorter sequence")


def _length(port: Port) -> int | str | None:
    """The dimension of an input that is the length of a text: one that varies, or the fixed one of tokens; None without."""
    behind = [size for size in port.shape[1:] if size != PAST]
    varying = next((size for size in behind if isinstance(size, str)), None)
    tokens = len(port.shape) == 2 and not port.dtype.is_floating_point
    return varying if varying is not None or not tokens else behind[0]


def _check_sizes(ports: Sequence[Port], case: Case) -> None:
    """Refuse a case of other sizes than the fixed ones of all inputs, which would be timed at those and called by others.

    Raises:
        LowerError: says which are fixed, and at what.
    """
    batches = [port.shape[0] for port in ports if port.shape]
    fixed = [size for size in batches if isinstance(size, int)]
    if fixed and len(fixed) == len(batches) and case.batch not in fixed:
        raise LowerError(_fixed("batch", max(fixed), ports))
    lengths = [length for length in map(_length, ports) if length is not None]
    fixed = [length for length in lengths if isinstance(length, int)]
    if fixed and len(fixed) == len(lengths) and case.sequence not in fixed:
        raise LowerError(_fixed("length", max(fixed), ports))


def _fixed(what: str, size: int, ports: Sequence[Port]) -> str:
    shapes = ", ".join(f"{port.name} [{', '.join(map(str, port.shape))}]" for port in ports)
    return f"its {what} is fixed at {size} ({shapes}): ask for that, or trace the model with a {what} that varies"


def _finished(result: Any, device: torch.device) -> Any:
    """Wait for the device, so that the time is that of the work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result
