"""The result of a build: callable, with its graph, artefact and report; and how it is written and read back."""

from __future__ import annotations

import json
import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from surgeon.contract import Artifact, ArtifactFile
from surgeon.errors import LowerError
from surgeon.graph import Graph, Port
from surgeon.output import check_free, staged
from surgeon.plans import SavedPlan
from surgeon.ports import port_data
from surgeon.report import Report
from surgeon.structure import Structure

if TYPE_CHECKING:
    from surgeon.recipe import Recipe
    from surgeon.views import Inspection

MANIFEST = "surgeon.json"


class Compiled:
    """A model that surgeon has operated on.

    Calling it runs the artefact where there is one, else the graph in torch (differentiable).

    Attributes:
        graph: the rewritten graph; None when the artefact was loaded from a directory.
        structure: its structure; None likewise.
        report: what was done and measured.
        plan: what every pass did, to save and repeat; None when loaded.
        recipe: the recipe it came from, if any.
        artifact: the lowered artefact, None with ``backend=None``.
        generation: tokens that end and fill generated text, and how long one may be, as the source has them.
    """

    def __init__(
        self,
        *,
        report: Report,
        graph: Graph | None = None,
        structure: Structure | None = None,
        plan: SavedPlan | None = None,
        recipe: Recipe | None = None,
        artifact: Artifact | None = None,
        generation: Mapping[str, Any] | None = None,
    ) -> None:
        self.graph = graph
        self.generation = dict(generation if generation is not None else graph.source.generation if graph else {})
        self.structure = structure
        self.report = report
        self.plan = plan
        self.recipe = recipe
        self.artifact = artifact
        self._temporary: Path | None = None

    @property
    def folder(self) -> Path | None:
        """Directory of the artefact."""
        return self.artifact.folder if self.artifact is not None else None

    def __call__(self, **inputs: Any) -> dict[str, Tensor]:
        """Run on the model's own keyword inputs.

        Args:
            **inputs: torch tensors; nested ones as the source model takes them, or flat.

        Returns:
            Torch tensors by the model's own output names.
        """
        if self.artifact is not None:
            return self.artifact.run(inputs)
        assert self.graph is not None
        return self.graph(**inputs)

    @property
    def ports(self) -> Sequence[Port]:
        """Its inputs."""
        if self.artifact is not None:
            return self.artifact.inputs
        assert self.graph is not None
        return self.graph.inputs

    def generate(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int = 20,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        streamer: Any = None,
        **inputs: Tensor,
    ) -> Tensor:
        """Continue texts with a model that was built with task ``text-generation``.

        Greedy by default: in float32 the tokens are those of the source model's own ``generate``.  An encoder-decoder runs
        its encoder once and continues from its start token.

        Args:
            input_ids: [batch, length] int64; a batch of unequal lengths is padded on the left (in front of an encoder as it
                was trained, on the right as a rule).
            attention_mask: [batch, length], 0 where padded; by default no padding, or wherever the padding token stands
                if that is not one that ends a text.
            max_new_tokens: tokens to add at most.
            do_sample: draw tokens instead of taking the most likely.
            temperature: the logits are divided by it before drawing.
            top_k: draw among so many of the most likely tokens.
            top_p: draw among the most likely tokens that together have this probability.
            seed: of the draws; by default torch's global generator.
            eos_token_id: tokens that end a row, the source's by default; ``()`` for none.
            pad_token_id: fills rows that have ended, the source's by default.
            streamer: a streamer of the transformers library, which gets tokens as they come.
            **inputs: of an encoder-decoder, further inputs of its encoder by name (``input_features`` ...), and
                ``decoder_input_ids`` [batch, length] to continue from in place of the start token.

        Returns:
            Prompt and continuation, [batch, at most length + max_new_tokens]; of an encoder-decoder what its decoder starts
            from and continues with.

        Raises:
            GenerateError: the model has no caches, an argument is out of range, or prompt and continuation are longer than
                the model's table of positions.
            LowerError: the artefact does not run on this machine.

        Warns:
            SurgeonWarning: they are longer than what the model's configuration says it was made for.

        Example:
            >>> compiled.generate(ids, max_new_tokens=32)
        """
        from surgeon.generation import decoder_of, generate
        from surgeon.sampling import Sampling, Settings

        own = Settings.of(self.generation)
        ends = own.eos_token_id if eos_token_id is None else eos_token_id
        settings = replace(
            own,
            eos_token_id=(ends,) if isinstance(ends, int) else tuple(ends),
            pad_token_id=own.pad_token_id if pad_token_id is None else pad_token_id,
        )
        sampling = Sampling(do_sample, temperature, top_k, top_p, seed)
        named = {"input_ids": input_ids, "attention_mask": attention_mask, **inputs}
        if self.artifact is not None:
            if self.artifact.unavailable:
                raise LowerError(f"{self.artifact.folder}: {self.artifact.unavailable}")
            decoder = self.artifact.decoder()
        else:
            assert self.graph is not None
            decoder = decoder_of(self.graph)
        return generate(
            decoder,
            self.ports,
            {name: value for name, value in named.items() if value is not None},
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            settings=settings,
            streamer=streamer,
        )

    @property
    def tokenizer(self) -> Any:
        """The source's tokenizer.

        Raises:
            GenerateError: the model did not come with one.
        """
        from surgeon.text import load_tokenizer

        path = self.folder if self.artifact is not None else Path(self.graph.source.path or "") if self.graph else None
        return load_tokenizer(path or Path())

    def save(self, folder: str | Path, *, force: bool = False) -> Path:
        """Copy the artefact with its recipe, plan and reports to a directory that ``surgeon.load`` opens.

        Args:
            folder: must not exist, unless ``force``.
            force: replace an output of surgeon that exists.

        Raises:
            LowerError: there is no artefact (``backend=None``).
            RecipeError: the directory exists.
        """
        if self.artifact is None:
            raise LowerError(
                "there is no artefact to save: compile with a backend, such as backend='onnxruntime', or save the graph: "
                "surgeon.save_graph(compiled.graph, folder)"
            )
        target = Path(folder)
        check_free(target, force)
        with staged(target, force) as staging:
            shutil.copytree(self.artifact.folder, staging, dirs_exist_ok=True)
        return target

    def temporary_folder(self) -> Path:
        """A directory that lives as long as this object."""
        if self._temporary is None:
            self._temporary = Path(tempfile.mkdtemp(prefix="surgeon-"))
            weakref.finalize(self, shutil.rmtree, self._temporary, ignore_errors=True)
        return self._temporary


def write_outputs(compiled: Compiled, view: Inspection, folder: Path, target: Path) -> None:
    """Write manifest, plan, recipe and reports beside the artefact's files.

    Args:
        compiled: the finished build.
        view: the rewritten model, drawn on the report's page.
        folder: where the artefact's files are now.
        target: where they will be; named in the report.
    """
    from surgeon.report_html import render_html

    artifact = compiled.artifact
    assert artifact is not None
    assert compiled.plan is not None
    compiled.report.artifact = {
        "folder": str(target),
        "backend": artifact.backend,
        "options": artifact.options,
        "files": [{"path": f.path, "bytes": f.bytes, "sha256": f.sha256} for f in artifact.files],
        "details": artifact.details,
    }
    manifest = {
        "surgeon": compiled.report.surgeon,
        "backend": artifact.backend,
        "options": artifact.options,
        "files": compiled.report.artifact["files"],
        "inputs": [port_data(port) for port in artifact.inputs],
        "outputs": [port_data(port) for port in artifact.outputs],
        "details": artifact.details,
        "ranges": _ranges(compiled.graph),
        "generation": compiled.generation,
        "tokenizer": [asdict(ArtifactFile.of(folder, name)) for name in _copy_tokenizer(compiled, folder)],
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    compiled.plan.write(folder / "plan.json")
    if compiled.recipe is not None:
        from surgeon.recipe import dump_recipe

        (folder / "recipe.yaml").write_text(dump_recipe(compiled.recipe), encoding="utf-8")
    (folder / "report.json").write_text(compiled.report.to_json(), encoding="utf-8")
    (folder / "report.html").write_text(render_html(compiled.report, view), encoding="utf-8")


def _ranges(graph: Graph | None) -> dict[str, list[int]]:
    """Smallest and largest value of every integer input of the example, from which inputs can be made up later."""
    example = graph.example if graph is not None else {}
    return {
        name: [int(value.min()), int(value.max())]
        for name, value in example.items()
        if value.numel() and not value.is_floating_point()
    }


def _copy_tokenizer(compiled: Compiled, folder: Path) -> list[str]:
    """Put the source's tokenizer beside an artefact that generates text; returns the names of its files."""
    from surgeon.text import TOKENIZER_FILES

    copied = []
    source = compiled.graph.source if compiled.graph is not None else None
    if source is not None and source.task == "text-generation" and source.path is not None:
        for name in TOKENIZER_FILES:
            if (Path(source.path) / name).is_file() and not (folder / name).exists():  # a backend may have written it
                shutil.copyfile(Path(source.path) / name, folder / name)
                copied.append(name)
    return copied


def load(folder: str | Path) -> Compiled:
    """Open an artefact that a build wrote.

    Args:
        folder: its directory.

    Returns:
        A callable result with ``artifact`` and ``report``; its graph is not kept in the directory.

    Raises:
        LowerError: the directory is not an artefact, or a file is missing or not the recorded one.
    """
    from surgeon.registry import backend_class

    path = Path(folder)
    manifest: Mapping[str, Any] = _read(path, MANIFEST, json.loads)
    if isinstance(manifest, dict) and "graph" in manifest:
        raise LowerError(f"{path}: holds a graph, which surgeon.load_graph reads, and no artefact; lower it: surgeon.compile")
    missing = {"backend", "options", "files", "inputs", "outputs"} - set(manifest if isinstance(manifest, dict) else ())
    if missing:
        raise LowerError(f"{path / MANIFEST}: not the manifest of an artefact; it lacks {', '.join(sorted(missing))}")
    report = _read(path, "report.json", Report.from_json)
    artifact = backend_class(manifest["backend"]).load(path, manifest)
    ArtifactFile.recorded(path, manifest.get("tokenizer", ()))
    return Compiled(report=report, artifact=artifact, generation=manifest.get("generation", {}))


def _read(folder: Path, name: str, parse: Callable[[str], Any]) -> Any:
    try:
        return parse((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LowerError(f"{folder}: no artefact here ({name} is missing)") from None
    except NotADirectoryError:
        raise LowerError(f"{folder}: a file, needed the folder that a build wrote") from None
    except (OSError, ValueError) as error:  # of JSON, of pydantic and of UTF-8 are ValueErrors
        raise LowerError(f"{folder / name}: cannot be read: {str(error).splitlines()[0]}") from error
