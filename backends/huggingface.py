"""Writing a checkpoint of the transformers library, where its format can say what the graph computes.

The graph keeps the source's own names of tensors, so a checkpoint is the source's configuration with changed numbers and
renumbered names.  Which numbers change is found by building the class under other configurations and looking at its tensors
(``_hf_fit.py``); families are known by name only for mixtures that their source does not have (``_hf_mixture.py``).  The
checkpoint is loaded back by ``AutoModel...from_pretrained`` and compared with the graph in the build, so that nothing rests
on these names meaning what they seem to.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import field_validator
from torch import Tensor

from surgeon.caches import TOKENS, is_plain_call
from surgeon.causal import cached_call
from surgeon.conditional import conditional_inputs, is_conditional
from surgeon.contract import Artifact, ArtifactFile, Backend, Refusal
from surgeon.errors import LowerError
from surgeon.graph import Graph
from surgeon.latency import pinned_threads
from surgeon.ports import check_inputs
from surgeon.refusals import refused


class HuggingFace(Backend):
    """A checkpoint that ``transformers`` loads: config.json, safetensors, tokenizer, generation settings."""

    name: ClassVar[str] = "huggingface"

    architecture: Literal["auto", "mixtral", "qwen3_moe", "qwen2_moe"] = "auto"
    """Family that a dense model with experts made by passes becomes: the first whose arithmetic is the same, or this one."""
    merged_experts: Literal["repeat", "refuse"] = "repeat"
    """Experts that were merged under a router with one score per former expert: repeat writes the merged expert once for
    each of them (exact, but not smaller), refuse does not write them."""
    shard: str = "5GB"
    """Largest size of one safetensors file, e.g. 500MB."""

    @field_validator("shard")
    @classmethod
    def _shard_is_a_size(cls, value: str) -> str:
        if not re.fullmatch(r"[1-9]\d*(KB|MB|GB)", value):
            raise ValueError(f"{value!r} is no size such as 500MB or 5GB")
        return value

    @classmethod
    def requirements(cls) -> tuple[str, ...]:
        """Import names of the libraries it needs."""
        return ("transformers", "safetensors")

    @classmethod
    def install(cls) -> str:
        """The line that installs them."""
        return "pip install 'surgeon[huggingface]'"

    @classmethod
    def devices(cls) -> tuple[str, ...]:
        """The CPU, and CUDA devices by name."""
        return ("cpu", *(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())))

    def refuses(self, graph: Graph) -> list[Refusal]:
        """What the format cannot say: layers that differ in size, factors, parts that are gone, routing of its own."""
        from surgeon.backends._hf_checkpoint import plan

        found = plan(graph, architecture=self.architecture, repeat_merged=self.merged_experts == "repeat")
        return found if isinstance(found, list) else []

    def lower(self, graph: Graph, folder: Path) -> HuggingFaceArtifact:
        """Write the checkpoint and load it back.

        Args:
            graph: stays as it is.
            folder: exists, empty.

        Raises:
            LowerError: the graph is refused (every reason is listed), or what was written does not load whole.
        """
        from surgeon.backends._hf_checkpoint import plan, write
        from surgeon.backends._hf_skeleton import auto_class

        found = plan(graph, architecture=self.architecture, repeat_merged=self.merged_experts == "repeat")
        if isinstance(found, list):
            raise refused("a checkpoint cannot express this graph", graph, found)
        details = write(found, graph, folder, self.shard)
        details["loaded_by"] = auto_class(details["architecture"]) or details["architecture"]
        files = tuple(
            ArtifactFile.of(folder, str(path.relative_to(folder))) for path in sorted(folder.rglob("*")) if path.is_file()
        )
        artifact = HuggingFaceArtifact(
            folder, self.name, self.model_dump(mode="json"), files, graph.inputs, graph.outputs, details
        )
        artifact.model()  # whole, or an error
        return artifact

    @classmethod
    def load(cls, folder: Path, manifest: Mapping[str, Any]) -> HuggingFaceArtifact:
        """Open a checkpoint that a build wrote; its weights are read on first use."""
        options = cls.model_validate(manifest["options"])
        return HuggingFaceArtifact.recorded(folder, cls.name, options.model_dump(mode="json"), manifest)


@dataclass
class HuggingFaceArtifact(Artifact):
    """A checkpoint directory, loaded on first use."""

    _model: Any = field(default=None, repr=False, compare=False)
    _cached: Callable[..., dict[str, Tensor]] | None = field(default=None, repr=False, compare=False)
    """How the model is called on caches; finding that out takes a run of it."""

    def model(self) -> Any:
        """The model as transformers loads it, in evaluation mode.

        Raises:
            LowerError: the library refuses the checkpoint, misses a tensor, or finds one it does not know.
        """
        if self._model is None:
            import transformers

            from surgeon.backends._hf_checkpoint import quiet

            loader = getattr(transformers, str(self.details["loaded_by"]))
            try:
                with quiet():
                    model, info = loader.from_pretrained(
                        str(self.folder), dtype="auto", output_loading_info=True, local_files_only=True
                    )
            except Exception as error:  # configuration and shapes can fail in any way
                raise LowerError(f"{self.folder}: transformers does not load the checkpoint: {error}") from error
            kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
            wrong = {kind: sorted(map(str, info[kind])) for kind in kinds if info[kind]}
            if wrong:
                raise LowerError(f"{self.folder}: transformers does not load the checkpoint whole: {wrong}")
            self._model = model.eval()
        return self._model

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run through transformers on keyword inputs.

        Args:
            inputs: every input by name, of the type and rank recorded.

        Returns:
            Tensors by output name.

        Raises:
            LowerError: an input does not fit.
        """
        from surgeon.source import flatten_outputs

        complete = check_inputs(self.folder, self.inputs, inputs)
        module = self.model()
        if not is_plain_call(self.inputs, inputs):
            with torch.no_grad():
                if self._cached is None:
                    plain = {port.name: complete[port.name] for port in self.inputs if not port.role}
                    conditional = is_conditional(module)
                    self._cached = conditional_inputs(module, plain).call if conditional else cached_call(module, plain[TOKENS])
                return self._cached(module, complete)
        taken = inspect.signature(module.forward).parameters
        settings = {key: value for key, value in (("use_cache", False), ("return_dict", True)) if key in taken}
        with torch.no_grad():
            found = flatten_outputs(module(**inputs, **settings))
        return {port.name: found[port.name] for port in self.outputs if port.name in found}

    @contextmanager
    def threads(self, count: int) -> Iterator[None]:
        """Run on ``count`` threads within the context."""
        with pinned_threads(count):
            yield
