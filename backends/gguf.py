"""Lowering to ``model.gguf``, which llama.cpp and what is built on it (Ollama, LM Studio, ...) load and run.

llama.cpp has code for each architecture by name.  Which of these computes what a graph does is found by the graph's structure
(``_gguf_reading``), not by its class: a handwritten model that is a Llama is written as one, and a Qwen whose layers differ in
heads is written as the architecture that has one number per layer (``_gguf_formats``).  The file is run by llama.cpp itself and
compared with the graph in the build.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from surgeon.backends import _gguf_runtime as runtime
from surgeon.backends._gguf_formats import Format
from surgeon.caches import MASK, PAST, asked
from surgeon.contract import Artifact, ArtifactFile, Backend, Refusal
from surgeon.errors import LowerError
from surgeon.generation import Decoder
from surgeon.graph import Graph
from surgeon.ports import check_inputs
from surgeon.refusals import refused

FILE = "model.gguf"


class Gguf(Backend):
    """One model.gguf for llama.cpp and what is built on it: weights, what the architecture needs to know, vocabulary."""

    name: ClassVar[str] = "gguf"
    low_bit_tolerance: ClassVar[float] = 5e-2

    architecture: Literal[
        "auto", "llama", "deci", "qwen2", "qwen2moe", "qwen3", "qwen3moe", "olmo2", "olmoe", "bailingmoe", "gemma", "gpt2",
        "starcoder2",
    ] = "auto"
    """What the file says it is: the first architecture of llama.cpp that computes what the graph does, or this one."""
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """Type of the matrices that are floats, that of the graph by default; norms, biases and routers are float32."""
    low_bit: Literal["blocks", "dequantize"] = "blocks"
    """Low-bit weights are written as the codes they are, in blocks of 32; those that no block holds are refused (blocks), or
    written as floats (dequantize)."""
    merged_experts: Literal["repeat", "refuse"] = "repeat"
    """Experts that were merged under a router with one score per former expert: repeat writes the merged expert once for
    each of them (exact, but not smaller), refuse does not write them."""
    tokenizer: Literal["auto", "none"] = "auto"
    """auto writes the checkpoint's vocabulary where it is one that llama.cpp splits text by, none writes numbers alone."""

    @classmethod
    def requirements(cls) -> tuple[str, ...]:
        """Import names of the libraries it needs; without xllamacpp a file is written and not run."""
        return ("gguf",)

    @classmethod
    def install(cls) -> str:
        """The line that installs them."""
        return "pip install 'surgeon[gguf]'"

    def accepted_error(self, graph: Graph) -> float:
        """As for any backend, and that of the type of 16 bits which matrices are written in."""
        wanted = {"float16": torch.float16, "bfloat16": torch.bfloat16}.get(self.dtype)
        return max(super().accepted_error(graph), 0.0 if wanted is None else self.half_tolerance[wanted])

    def refuses(self, graph: Graph) -> list[Refusal]:
        """What no architecture of llama.cpp that is written here computes, and codes that its blocks do not hold."""
        found = self._planned(graph)
        return found if isinstance(found, list) else []

    def _planned(self, graph: Graph) -> tuple[Any, Format] | list[Refusal]:
        from surgeon.backends._gguf_file import entries, stored
        from surgeon.backends._gguf_formats import choose
        from surgeon.backends._gguf_reading import ENGINES, read

        decoder = read(graph, repeat_merged=self.merged_experts == "repeat")
        if isinstance(decoder, list):
            return decoder
        format = choose(decoder, self.architecture)
        if isinstance(format, list):
            return [Refusal(problem.site, f"{problem.reason}; {ENGINES} run it") for problem in format]
        refusals = []
        for entry in entries(decoder, format):
            found = stored(entry, self.dtype, self.low_bit)
            if isinstance(found, str):
                where = entry.value.label if not isinstance(entry.value, Tensor) else entry.name
                advice = f"low_bit: dequantize writes it as floats, and {ENGINES} run it"
                refusals.append(Refusal(where, f"{found}; {advice}"))
        return refusals or (decoder, format)

    def lower(self, graph: Graph, folder: Path) -> GgufArtifact:
        """Write ``model.gguf``.

        Args:
            graph: stays as it is.
            folder: exists, empty.

        Raises:
            LowerError: the graph is refused (every reason is listed), or llama.cpp refuses the file.
        """
        from surgeon.backends._gguf_file import write
        from surgeon.backends._gguf_vocabulary import vocabulary_of

        found = self._planned(graph)
        if isinstance(found, list):
            raise refused("no architecture of llama.cpp that is written here computes this graph", graph, found)
        decoder, format = found
        vocabulary = vocabulary_of(graph, decoder.embedding.shape[0], wanted=self.tokenizer)
        name = Path(graph.source.path).name if graph.source.path else graph.source.description
        details = write(
            decoder, format, folder / FILE, dtype=self.dtype, low_bit=self.low_bit, name=name, vocabulary=vocabulary
        )
        details |= {"tokens": decoder.tokens, "logits": decoder.logits}
        files = (ArtifactFile.of(folder, FILE),)
        artifact = GgufArtifact(
            folder, self.name, self.model_dump(mode="json"), files, graph.inputs, graph.outputs, details
        )
        details["vocabulary"] = vocabulary.checked(artifact)
        if vocabulary.missed:
            details["warnings"] = [f"the file has no vocabulary, so that it is given numbers: {vocabulary.reason}"]
        if not artifact.unavailable:
            details["run_by"] = f"{runtime.LIBRARY} {version(runtime.LIBRARY)}"
        return artifact

    @classmethod
    def load(cls, folder: Path, manifest: Mapping[str, Any]) -> GgufArtifact:
        """Open a file that a build wrote; llama.cpp maps it on first use."""
        options = cls.model_validate(manifest["options"])
        return GgufArtifact.recorded(folder, cls.name, options.model_dump(mode="json"), manifest)


@dataclass
class GgufArtifact(Artifact):
    """``model.gguf``, opened by llama.cpp on first use, on the CPU and with caches of float32.

    llama.cpp keeps the caches, none go in or out: :meth:`decoder` continues a text, :meth:`run` reads whole ones.
    """

    own_caches: ClassVar[bool] = True
    skips_padding: ClassVar[bool] = True

    _runtime: runtime.Runtime | None = field(default=None, repr=False, compare=False)

    @property
    def path(self) -> Path:
        """The file."""
        return self.folder / FILE

    @property
    def unavailable(self) -> str | None:
        """llama.cpp runs it, as the wheel xllamacpp brings it."""
        return runtime.unavailable()

    def runtime(self) -> runtime.Runtime:
        """The file in llama.cpp.

        Raises:
            LowerError: llama.cpp is not here, or refuses it.
        """
        if self._runtime is None:
            self._runtime = runtime.Runtime(self.path)
        return self._runtime

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Read texts, one row after the other.

        Args:
            inputs: tokens by name, and perhaps a mask that is 0 on padding in front or behind; no caches.

        Returns:
            The logits [batch, length, vocabulary], 0 where there is padding.

        Raises:
            LowerError: an input does not fit, caches are handed in, or a mask has padding within a text.
        """
        wanted = [port for port in asked(self.inputs, self.outputs, inputs) if not port.role]
        complete = check_inputs(self.path, self.inputs, inputs)
        if any(port.role == PAST and complete[port.name].shape[2] for port in self.inputs):
            raise LowerError(
                f"{self.path}: llama.cpp keeps caches of its own and takes none; leave them out and hand in the whole text, or "
                "continue it with generate"
            )
        tokens = complete[self.details["tokens"]]
        mask = complete.get(MASK)
        rows = [self._row(ids, None if mask is None else mask[place]) for place, ids in enumerate(tokens)]
        return {port.name: torch.stack(rows).to(port.dtype) for port in wanted}

    def _row(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Logits of one row [length, vocabulary]."""
        here = self.runtime()
        here.clear()
        start, stop = text_of(mask, len(ids), self.path)
        found = here.read(ids[start:stop].tolist(), 0)
        return torch.nn.functional.pad(found, (0, 0, start, len(ids) - stop))

    def stepping(self, inputs: Mapping[str, Tensor]) -> Callable[[], object]:
        """A step of timing: behind caches, as many tokens are kept as these hold, and the new ones computed again and again."""
        past = next((inputs[port.name].shape[2] for port in self.inputs if port.role == PAST and port.name in inputs), 0)
        tokens = inputs[self.details["tokens"]]
        if not past:
            given = {name: value for name, value in inputs.items() if PAST not in self._port(name).role}
            return lambda: self.run(given)
        if len(tokens) > 1:
            raise LowerError(f"{self.path}: rows are decoded one after the other here; ask for batch 1")
        here = self.runtime()
        here.clear()
        here.reserve(past + tokens.shape[1])
        here.read(tokens[0, :1].expand(past).tolist(), 0, last=True)

        def step() -> Tensor:
            here.cut(past)
            return here.read(tokens[0].tolist(), past, last=True)

        return step

    def _port(self, name: str) -> Any:
        return next(port for port in self.inputs if port.name == name)

    def decoder(self) -> Decoder:
        """Continues one text in llama.cpp's own caches; several rows are read anew at every step."""
        return _Continuing(self)

    @contextmanager
    def threads(self, count: int) -> Iterator[None]:
        """Run on ``count`` threads within the context."""
        with self.runtime().threads(count):
            yield


class _Continuing:
    """Steps of a generation; see :class:`surgeon.generation.Decoder`."""

    on_host = False
    device = None

    def __init__(self, artifact: GgufArtifact) -> None:
        self._artifact = artifact
        self._texts: list[list[int]] = []
        artifact.runtime().clear()

    def __call__(self, inputs: Mapping[str, Any]) -> Tensor:
        """Run on the new tokens [batch, new]; the logits of the last one [batch, 1, vocabulary]."""
        here, tokens = self._artifact.runtime(), inputs[self._artifact.details["tokens"]]
        mask = inputs.get(MASK)
        if not self._texts:
            masks = [None] * len(tokens) if mask is None else list(mask)
            spans = [text_of(row, tokens.shape[1], self._artifact.path) for row in masks]
            self._texts = [[] for _ in tokens]
        else:
            spans = [(0, tokens.shape[1])] * len(tokens)
        rows = []
        for text, ids, (start, stop) in zip(self._texts, tokens, spans, strict=True):
            new, kept = ids[start:stop].tolist(), len(text)
            text += new
            if len(self._texts) > 1:
                here.clear()
                new, kept = text, 0
            elif here.held < kept:  # a longer context was made, or another text was read in between
                here.clear()
                new, kept = text, 0
            rows.append(here.read(new, kept, last=True))
        return torch.stack(rows)


def text_of(mask: Tensor | None, length: int, where: object) -> tuple[int, int]:
    """Where a row's text starts and ends.

    Raises:
        LowerError: the mask has padding within it, or nothing else.
    """
    if mask is None:
        return 0, length
    held = mask.bool().nonzero().flatten().tolist()
    if not held:
        raise LowerError(f"{where}: a row has no token, its {MASK} is 0 everywhere")
    start, stop = held[0], held[-1] + 1
    if len(held) != stop - start:
        raise LowerError(f"{where}: {MASK} has padding within a text, llama.cpp takes texts without gaps")
    return start, stop
