from __future__ import annotations

import json
import os
import re
import shutil

os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels for CUDA run on the CPU here; read when they are defined

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from surgeon.contract import Pass, Plan
from surgeon.data import Data, collate, load_data, tokenize_file, tokenizer_for
from surgeon.discovery import discover
from surgeon.graph import Graph
from surgeon.observe import observe
from surgeon.pipeline import operate
from surgeon.progress import Progress
from surgeon.recipe import Calibration
from surgeon.registry import make_pass
from surgeon.samples import Sample
from surgeon.structure import Structure
from surgeon.tracing import trace
from surgeon.verify import check_parameters, check_structure

OPTIONAL = ("timm", "diffusers")
"""Libraries with a marker of their name: where one is not installed, its tests are deselected."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    missing = [name for name in OPTIONAL if find_spec(name) is None]
    gone = [item for item in items if any(item.get_closest_marker(name) for name in missing)]
    if gone:
        config.hook.pytest_deselected(items=gone)
        items[:] = [item for item in items if item not in gone]


MODELS = Path(__file__).parent.parent / "examples" / "models"


@dataclass
class Patient:
    """A traced model with data to observe."""

    graph: Graph
    structure: Structure
    data: Data

    def operate(self, step: dict[str, Any] | Pass[Any], plan: Plan[Any] | None = None) -> Patient:
        """Run one pass, as the pipeline does, on a clone."""
        graph, structure, self.plan, _ = operate(
            make_pass(step), self.graph, self.structure, self.data, plan, Progress(False)
        )
        result = Patient(graph, structure, self.data)
        result.plan = self.plan
        return result

    plan: Any = None

    def checked(self, step: dict[str, Any], plan: Plan[Any] | None = None) -> Patient:
        """The same with the checks that the pipeline makes."""
        made = make_pass(step)
        result = self.operate(made, plan)
        check_structure(made, self.structure, result.structure)
        check_parameters(made, result.plan, self.graph, self.structure, result.graph)
        return result

    def loss(self, batch: dict[str, torch.Tensor]) -> float:
        """Next-token cross entropy in nats."""
        with torch.no_grad():
            logits = self.graph(**batch)["logits"][:, :-1]
        return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["input_ids"][:, 1:].flatten()))


@dataclass
class Trained(Patient):
    """A trained language model with held-out text."""

    held_out: dict[str, torch.Tensor] | None = None

    def routed_tokens(self) -> dict[str, tuple[torch.Tensor, ...]]:
        """Every calibration token's input, experts, weights and router scores, by mixture."""
        samples = {}
        for site in self.structure.moes():
            part = site.part
            assert part.logits is not None
            samples[site.name] = Sample(part.input, part.index, part.weight, part.logits, limit=1 << 20)
        observe(self.graph, self.data.calibration, samples)
        return {name: tuple(sample.values()) for name, sample in samples.items()}


def _trained(name: str) -> Trained:
    graph = trace(MODELS / name, dtype="float32")
    data = load_data(Calibration(text=MODELS / "calibration.txt", samples=32, length=128), graph)
    rows = tokenize_file(MODELS / "heldout.txt", graph, 128, None, lines=False, limit=32, seed=1)
    held_out = collate(rows, graph, tokenizer_for(graph))
    return Trained(graph, discover(graph), data, held_out=held_out)


@pytest.fixture(scope="session")
def shallow_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny-llama without its last three layers: half of the work, where neither depth nor what it has learnt matters."""
    folder, layers = tmp_path_factory.mktemp("models") / "shallow-llama", 3
    shutil.copytree(MODELS / "tiny-llama", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}))
    weights = load_file(folder / "model.safetensors")
    gone = [name for name in weights if (found := re.search(r"\.layers\.(\d+)\.", name)) and int(found[1]) >= layers]
    kept = {name: weight for name, weight in weights.items() if name not in gone}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def tiny_llama() -> Trained:
    return _trained("tiny-llama")


@pytest.fixture(scope="session")
def tiny_mixtral() -> Trained:
    return _trained("tiny-mixtral")


@pytest.fixture(scope="session")
def tiny_upcycled() -> Trained:
    """Sixteen experts that are four copies of four parts of one network, trained further and about equally used."""
    return _trained("tiny-upcycled")


@pytest.fixture(scope="session")
def patient() -> Callable[[str], Patient]:
    """Tiny random models by name, traced once, with random calibration data."""
    from tests.models import tiny

    made: dict[str, Patient] = {}

    def make(name: str) -> Patient:
        if name not in made:
            module, inputs = tiny(name)
            graph = trace(module, inputs)
            generator = torch.Generator().manual_seed(3)
            batches = []
            for _ in range(4):
                batch = {}
                for key, value in inputs.items():
                    if value.is_floating_point():
                        batch[key] = torch.randn(value.shape, generator=generator)
                    elif int(value.max()) > 1:
                        batch[key] = torch.randint(0, int(value.max()) + 1, value.shape, generator=generator)
                    else:
                        batch[key] = value
                batches.append(batch)
            made[name] = Patient(graph, discover(graph), load_data(batches, graph))
        return made[name]

    return make
