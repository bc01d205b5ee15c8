"""Lowering to AOTInductor: one ``model.pt2`` that torch loads and runs without surgeon, transformers or Python models.

Every semantic operator is spelt in ATen first, because a package cannot call operators that Python registered.
"""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from surgeon.backends import _aot_shared as shared
from surgeon.backends._aot_captured import CapturedDecoder
from surgeon.caches import PRESENT, asked
from surgeon.contract import Artifact, ArtifactFile, Backend, Refusal
from surgeon.errors import LowerError
from surgeon.generation import Decoder
from surgeon.graph import Graph, assign_tensor
from surgeon.latency import pinned_threads
from surgeon.ports import InputCheck
from surgeon.refusals import refuse

FILE = "model.pt2"
_LARGE = 1 << 24
"""Bytes from which on a file that inductor wrote for a package is not left in its cache: it holds the weights."""


class AotInductor(Backend):
    """Ahead-of-time compiled torch: a ``.pt2`` package for the CPU or a CUDA device."""

    name: ClassVar[str] = "aotinductor"

    device: Literal["cpu", "cuda"] = "cpu"
    """Where it runs; the package is compiled for this kind of device, and on one."""
    experts: Literal["auto", "grouped", "gathered", "dense"] = "auto"
    """Mixtures of experts: ``grouped`` matrix multiplication (CUDA in bfloat16), ``gathered`` expert weights per token,
    ``dense`` computation of every expert.  auto decides at run time: on the CPU gathered for few tokens and dense for many;
    on CUDA a kernel that reads each expert's weights once, packed where they are low-bit, for few tokens, and for many
    grouped where it exists and dense elsewhere."""
    low_bit: Literal["kernels", "dequantize", "refuse"] = "kernels"
    """Low-bit weights: in kernels where they exist (torch's low-bit linears on the CPU, this backend's for few rows on CUDA)
    and dequantized at run time elsewhere (``kernels``), dequantized everywhere, or refused where no kernel exists."""

    caches: Literal["appended", "shared"] = "appended"
    """Caches of a model that generates text: ``appended`` returns each as a longer copy at every step, ``shared`` takes
    buffers with room for more positions, writes the new ones in place and reads those that are used.  That saves the copies,
    which matter for long texts and batches; on CUDA a step is captured once and repeated then, which saves the host's work.
    ``surgeon.load`` keeps the buffers; other programs hand them in."""

    @classmethod
    def requirements(cls) -> tuple[str, ...]:
        """Import names of the libraries it needs."""
        return ("torch",)

    @classmethod
    def install(cls) -> str:
        """The line that installs them."""
        return "pip install torch; and a C++ compiler, such as g++"

    @classmethod
    def devices(cls) -> tuple[str, ...]:
        """The CPU, and CUDA devices by name."""
        return ("cpu", *(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())))

    def refuses(self, graph: Graph) -> list[Refusal]:
        """A device that is not here, no compiler, and caches and low-bit weights that cannot be handled as asked."""
        found = []
        if self.device == "cuda" and not torch.cuda.is_available():
            reason = "a package for CUDA is compiled on a machine with a CUDA device; none is here"
            found.append(Refusal("device", reason, lasting=True))
        if _compiler() is None:
            reason = "AOTInductor needs a C++ compiler (g++ or clang++, or the one CXX names)"
            found.append(Refusal("compiler", reason, lasting=True))
        if self.experts == "grouped" and self.device == "cpu" and _has_experts(graph):
            found.append(Refusal("experts", "torch has no grouped matrix multiplication to compile for the CPU; use auto"))
        if self.caches == "shared":
            found += shared.refusals(graph, self.device == "cuda")
        if self.low_bit == "refuse":
            from surgeon.backends._aot_lowering import low_bit_kernels

            left = low_bit_kernels(graph, self.device, convert=False).left
            found += [Refusal(node, f"no low-bit kernel: {reason}") for node, reason in left.items()]
        return found

    def lower(self, graph: Graph, folder: Path) -> AotInductorArtifact:
        """Write ``model.pt2``.

        Args:
            graph: stays as it is.
            folder: exists, empty.

        Raises:
            LowerError: the graph is refused (every reason is listed), torch cannot export or compile it, or the disk is full.
        """
        refuse("aotinductor cannot express this graph", graph, self.refuses(graph))
        from surgeon.backends._aot_joined import joined_linears
        from surgeon.backends._aot_lowering import Decomposed, low_bit_kernels, placed
        from surgeon.backends._aot_repairs import compilable
        from surgeon.backends._aot_rotary import turned_where_written
        from surgeon.backends._aot_routing import routed
        from surgeon.backends._aot_tiles import tile_codes

        lowered = low_bit_kernels(graph, self.device, convert=self.low_bit != "dequantize")
        here = placed(joined_linears(lowered.graph), self.device) if self.device != "cpu" else lowered.graph
        if self.caches == "shared":
            shared.write_in_place(here, self.device == "cuda")
        module = Decomposed(here, self.experts, device=self.device, packed=self.low_bit != "dequantize").eval()
        routers = routed(here) if module.kernels and self.experts == "auto" else 0
        turned = turned_where_written(here) if module.kernels and self.caches == "shared" else 0
        if module.packed:
            tile_codes(here)
        free, needed = shutil.disk_usage(folder).free, here.nbytes()
        if free < needed:  # torch ends the process where a disk fills up while it writes
            raise LowerError(f"aotinductor: {folder.parent} has {free} bytes free; the weights alone need {needed}")
        _hold_as_parameters(here)
        gc.collect()  # graphs are cycles: the joined weights stay on the CPU otherwise
        example = tuple(here.example[port.name].to(self.device) for port in here.inputs)
        shapes = tuple(
            {axis: torch.export.Dim.DYNAMIC for axis, size in enumerate(port.shape) if isinstance(size, str)}
            for port in here.inputs
        )
        try:
            with torch.no_grad(), compilable(self.device), _own_files() as own, warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch warns of its own deprecated parts while it compiles
                program = torch.export.export(module, example, dynamic_shapes=(shapes,), strict=False)
                program = program.run_decompositions({})
                calls = [node for node in program.graph.nodes if node.op == "call_function"]
                operators = Counter(str(getattr(node.target, "__name__", node.target)).split(".")[0] for node in calls)
                _write_package(program, own / FILE, folder / FILE)
        except Exception as error:  # export, inductor and the compiler raise many unrelated classes
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise LowerError(f"aotinductor: torch cannot compile the graph: {reason}") from error
        used = sum(lowered.kernels.values()) if self.low_bit != "dequantize" else 0
        details = {
            "nodes": len(calls),
            "operators": dict(operators.most_common()),
            "torch": torch.__version__,
            "device": self.device,
            "fused": dict(lowered.kernels) if used else {},
            "experts": dict(module.used),
            "routers_in_one_kernel": routers,
            "attentions_that_turn_and_write": turned,
            "dequantized_at_run_time": lowered.left,
        }
        files = (ArtifactFile.of(folder, FILE),)
        return AotInductorArtifact(folder, self.name, self.model_dump(mode="json"), files, graph.inputs, graph.outputs, details)

    @classmethod
    def load(cls, folder: Path, manifest: Mapping[str, Any]) -> AotInductorArtifact:
        """Open a package.

        Raises:
            LowerError: it was compiled by another torch, or for a device that is not here.
        """
        options = cls.model_validate(manifest["options"])
        built = manifest.get("details", {}).get("torch")
        if built != torch.__version__:
            raise LowerError(
                f"{folder / FILE} was compiled by torch {built} and runs with that version only; this is torch "
                f"{torch.__version__}: install that one, or build the artefact again"
            )
        if options.device == "cuda" and not torch.cuda.is_available():
            raise LowerError(f"{folder / FILE} was compiled for CUDA, and no CUDA device is here")
        return AotInductorArtifact.recorded(folder, cls.name, options.model_dump(mode="json"), manifest)


@dataclass
class AotInductorArtifact(Artifact):
    """``model.pt2``, loaded on first use."""

    _package: Any = field(default=None, repr=False, compare=False)
    _lock: Lock = field(default_factory=Lock, repr=False, compare=False)

    @property
    def path(self) -> Path:
        """The package."""
        return self.folder / FILE

    def move(self, folder: Path) -> None:
        """See :class:`Artifact`; what checks inputs names the file."""
        super().move(folder)
        vars(self).pop("_check", None)
        vars(self).pop("_buffers", None)

    @cached_property
    def _check(self) -> InputCheck:
        return InputCheck(self.path, self.inputs)

    @cached_property
    def device(self) -> torch.device:
        """The device that the package is opened on."""
        kind = str(self.options.get("device", "cpu"))
        return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)

    @cached_property
    def _buffers(self) -> shared.Buffers | None:
        """What knows of caches that are written in place, where they are."""
        return shared.Buffers(self.path, self.inputs) if self.options.get("caches") == "shared" else None

    def decoder(self) -> Decoder:
        """Start generating a text."""
        return super().decoder() if self._buffers is None else self._buffer_decoder()

    def _buffer_decoder(self) -> shared.BufferDecoder:
        if self.device.type == "cuda":
            return CapturedDecoder(self.run, self._call, self.inputs, self.outputs, self.device)
        return shared.BufferDecoder(self.run, self.inputs, self.outputs, self.device)

    def stepping(self, inputs: Mapping[str, Tensor]) -> Callable[[], object]:
        """What computes one step on these inputs whenever it is called, with pasts in buffers as a generation holds them."""
        if self._buffers is None or not self._buffers.behind_a_past(inputs):
            return super().stepping(inputs)
        decoder = self._buffer_decoder()
        rest = decoder.resume(inputs)
        return lambda: decoder(rest)

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run on keyword inputs, on the package's device; from several threads at once, one after the other on CUDA.

        On CUDA it can be captured in a ``torch.cuda.CUDAGraph``, after a run outside.

        Args:
            inputs: every input by name, of the type and rank recorded.  With ``caches: shared`` a past with room for as many
                positions as the attention mask covers, or more, is a buffer, whose first ones are the past: the new ones
                are written into it, and it is itself the present that is returned.

        Returns:
            Tensors by output name.

        Raises:
            LowerError: an input does not fit, or the package fails.
        """
        wanted = asked(self.inputs, self.outputs, inputs)
        buffers, device = self._buffers, self.device
        stepping = buffers is not None and buffers.fit(inputs)
        checked = inputs if stepping else self._check(inputs if buffers is None else buffers.as_pasts(inputs))
        held = {} if buffers is None else buffers.given(inputs, checked, device)
        # The package was compiled for tensors without gaps and would read others wrongly, without a word.
        given = [held[port.name] if port.name in held else _in_place(checked[port.name], device) for port in self.inputs]
        if buffers is not None and device.type == "cuda":
            given.append(shared.start_of(checked, device))
        results = self._call(given)
        computed = [port.name for port in self.outputs if buffers is None or port.role != PRESENT]
        found = dict(zip(computed, results, strict=True))
        if buffers is not None:  # what was written is what would be returned
            presents = (port.name for port in self.outputs if port.role == PRESENT)
            found.update(zip(presents, held.values(), strict=True))
        return {port.name: found[port.name] for port in wanted}

    def _call(self, given: list[Tensor]) -> list[Tensor]:
        """The package's outputs.

        Args:
            given: in the order of its inputs, contiguous and on its device.

        Raises:
            LowerError: the package fails.
        """
        package = self._opened()
        shapes = [tensor.shape for tensor in given]  # the package empties the list
        try:
            with torch.no_grad(), self._lock if self.device.type == "cuda" else nullcontext():
                # What calling the package does after it has read the structure of inputs and outputs, which are flat, anew.
                results: list[Tensor] = package.boxed_run(given)
        except RuntimeError as error:
            named = zip((port.name for port in self.inputs), shapes, strict=False)
            listed = ", ".join(f"{name} {list(shape)}" for name, shape in named)
            reason = next(iter(str(error).strip().splitlines()), "")
            raise LowerError(f"{self.path}: the package failed on inputs {listed}: {reason}") from error
        return results

    def _opened(self) -> Any:
        """What torch opens a package with, made by the first call.

        On CUDA it is made without torch's pool of models, which asks an event after each run whether it is done: that costs
        time, and is not permitted while a CUDA graph is captured.  Its one model runs once at a time, so ``run`` holds a lock.
        It is not asked for through Python there, which would first try out the vector instructions of the CPU, for a message.
        """
        with self._lock:
            if self._package is None and self.device.type == "cuda":
                self._package = torch._C._aoti.AOTIModelPackageLoader(str(self.path), "model", True, 1, -1)
            elif self._package is None:
                from surgeon.backends._aot_repairs import vectors_found_quickly

                with vectors_found_quickly():  # torch compares them with those that the package was compiled for
                    self._package = torch._inductor.aoti_load_package(str(self.path)).loader
            return self._package

    @contextmanager
    def threads(self, count: int) -> Iterator[None]:
        """Run on ``count`` threads within the context."""
        with pinned_threads(count):
            yield


def _write_package(program: Any, beside: Path, target: Path) -> None:
    """Compile a program into a package.

    Args:
        program: exported, decomposed.
        beside: where a file may lie meanwhile.
        target: the package.
    """
    from surgeon.backends._aot_weights import weights_apart

    with weights_apart(_LARGE) as apart:
        torch._inductor.aoti_compile_and_package(program, package_path=str(beside))
    if apart.storages and apart.fit(beside):
        apart.write(beside, target)
        beside.unlink()
        return
    if apart.storages:  # a library of another make: as torch writes it, then
        torch._inductor.aoti_compile_and_package(program, package_path=str(beside))
    shutil.move(beside, target)


@contextmanager
def _own_files() -> Iterator[Path]:
    """Let inductor put what it compiles for one package into a folder of its own in its cache, and take the weights out after.

    It names files by what they compute: of two builds at a time that differ in their weights only, one would read the weights
    that the other wrote.  The library with the weights is in the package then; small files stay, as other builds may use them.
    """
    from torch._inductor import config
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    Path(cache_dir()).mkdir(parents=True, exist_ok=True)
    own = Path(tempfile.mkdtemp(prefix="surgeon-", dir=cache_dir()))
    try:
        with config.patch({"aot_inductor.output_path": str(own)}):
            yield own
    finally:
        for file in own.rglob("*"):
            if file.is_file() and file.stat().st_size > _LARGE:
                file.unlink()


def _in_place(value: Tensor, device: torch.device) -> Tensor:
    """The tensor as a package reads it without a copy of its own, of which it would warn on CUDA."""
    found = value.to(device).contiguous()
    return found if device.type != "cuda" or found.data_ptr() % shared.ALIGNED == 0 else found.clone()


def _hold_as_parameters(graph: Graph) -> None:
    """Make every tensor of the graph a parameter that is all of its storage; in place.

    Inductor keeps a copy of every buffer while it compiles, as it was before the graph may have written to it (ours write to
    none), and a package holds all of a tensor's storage, even where the tensor is a part of it.

    Args:
        graph: one that lowering made for itself.
    """
    made: dict[tuple[Any, ...], nn.Parameter] = {}  # tensors under several names stay one
    named = (graph.module.named_parameters, graph.module.named_buffers)
    for name, tensor in [entry for each in named for entry in each(remove_duplicate=False)]:
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        if tensor.numel() == 0 or key not in made:
            part = tensor.untyped_storage().nbytes() > tensor.nbytes
            made[key] = nn.Parameter(tensor.detach().clone() if part else tensor.detach(), requires_grad=False)
        assign_tensor(graph.module, name, made[key])


def _compiler() -> str | None:
    """The C++ compiler that inductor would use, if it is there."""
    named = os.environ.get("CXX")
    return shutil.which(named) if named else shutil.which("g++") or shutil.which("clang++")


def _has_experts(graph: Graph) -> bool:
    return any(node.target is torch.ops.surgeon.moe.default for node in graph.module.graph.nodes)
