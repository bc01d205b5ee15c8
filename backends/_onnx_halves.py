"""An encoder-decoder as two ONNX models: the encoder's runs once per text, the decoder's once per token.

The keys and values of the cross-attention go from one session to the other as values of the runtime.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from surgeon.backends._onnx_artifact import OnnxRuntimeArtifact
from surgeon.backends._onnx_decoding import BoundDecoder, HostDecoder
from surgeon.caches import CROSS, asked
from surgeon.contract import Artifact
from surgeon.errors import LowerError
from surgeon.generation import ConditionalDecoder, Decoder
from surgeon.ports import check_inputs, port_data, port_of

FILES = {"encoder": "encoder_model.onnx", "decoder": "decoder_model.onnx"}
"""Names of the two files, the field's convention."""


@dataclass
class OnnxHalvesArtifact(Artifact):
    """``encoder_model.onnx`` and ``decoder_model.onnx``; a plain call runs one after the other.

    Attributes:
        halves: the two, by the names of ``FILES``.
        session_threads: intra-operator threads of both sessions; None leaves the choice to ONNX Runtime.
    """

    halves: Mapping[str, OnnxRuntimeArtifact] = field(default_factory=dict)
    session_threads: int | None = None

    @property
    def path(self) -> Path:
        """The decoder's file."""
        return self.folder / FILES["decoder"]

    def half(self, name: str) -> OnnxRuntimeArtifact:
        """One of the two, where this artefact's files are now and with its threads."""
        found = self.halves[name]
        found.folder, found.session_threads = self.folder, self.session_threads
        return found

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run both on keyword inputs.

        Args:
            inputs: every input by name, of the dtype and rank recorded.

        Returns:
            Tensors by output name.

        Raises:
            LowerError: an input does not fit, or the runtime fails.
        """
        wanted = asked(self.inputs, self.outputs, inputs)
        given = check_inputs(self.folder, self.inputs, inputs)
        encoder, decoder = self.half("encoder"), self.half("decoder")
        found = encoder.run({port.name: given[port.name] for port in encoder.inputs})
        given = given | found
        found |= decoder.run({port.name: given[port.name] for port in decoder.inputs})
        return {port.name: found[port.name] for port in wanted}

    def decoder(self) -> Decoder:
        """Start generating a text: the encoder is run at the first step; all caches stay in the runtime's own memory."""
        encoder, decoder = self.half("encoder"), self.half("decoder")
        crossing: dict[str, Any] = {}
        names = [port.name for port in decoder.inputs if port.role == CROSS]

        on_host = decoder.device.type == "cpu"

        def encode(inputs: Mapping[str, Tensor]) -> Mapping[str, Any]:
            found = encoder.values(inputs, names)
            crossing.update({name: value.numpy() for name, value in found.items()} if on_host else found)
            return {}

        steps = (HostDecoder if on_host else BoundDecoder)(decoder, crossing)
        return ConditionalDecoder(encode, steps, encoder.inputs, decoder.inputs)

    @contextmanager
    def threads(self, count: int) -> Iterator[None]:
        """Run on ``count`` intra-operator threads within the context, and as before after it."""
        if count < 1:
            raise LowerError(f"the number of threads must be at least 1, found {count}")
        before = self.session_threads
        self.session_threads = count
        try:
            yield
        finally:
            self.session_threads = before


def details(halves: Mapping[str, OnnxRuntimeArtifact]) -> dict[str, Any]:
    """Facts about both together, and under ``halves`` the inputs, outputs and operators of each."""
    found: dict[str, Any] = dict(halves["decoder"].details)
    for key in ("operators", "fused"):
        counts = sum((Counter(half.details[key]) for half in halves.values()), Counter[str]())
        found[key] = dict(counts.most_common())
    for key in ("nodes", "weight_bytes"):
        found[key] = sum(half.details[key] for half in halves.values())
    found["quantization"] = [entry for half in halves.values() for entry in half.details["quantization"]]
    found["halves"] = {
        name: {
            "inputs": [port_data(port) for port in half.inputs],
            "outputs": [port_data(port) for port in half.outputs],
            "nodes": half.details["nodes"],
            "operators": half.details["operators"],
        }
        for name, half in halves.items()
    }
    return found


def opened(whole: OnnxRuntimeArtifact) -> OnnxHalvesArtifact:
    """Open both files.

    Args:
        whole: folder, options, files, details, inputs and outputs of both together.
    """
    halves = {}
    for name, entry in whole.details["halves"].items():
        inputs, outputs = (tuple(map(port_of, entry[key])) for key in ("inputs", "outputs"))
        halves[name] = OnnxRuntimeArtifact(
            whole.folder, whole.backend, whole.options, (), inputs, outputs, session_threads=whole.session_threads,
            file=FILES[name],
        )  # fmt: skip
    return joined(halves, whole)


def joined(halves: Mapping[str, OnnxRuntimeArtifact], whole: OnnxRuntimeArtifact) -> OnnxHalvesArtifact:
    """Two artefacts in one folder as one."""
    return OnnxHalvesArtifact(
        whole.folder, whole.backend, whole.options, whole.files, whole.inputs, whole.outputs, whole.details,
        halves=halves, session_threads=whole.session_threads,
    )  # fmt: skip
