"""Every recipe in examples/ is one that works, and does what its first lines say."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

import surgeon
from surgeon.building import compile_recipe
from surgeon.recipe import load_recipe

EXAMPLES = Path(__file__).parents[1] / "examples"
ELSEWHERE = {"minilm"}
"""Tested with the README's figures."""
RECIPES = sorted(path.stem for path in EXAMPLES.glob("*.yaml"))


def test_the_page_of_examples_names_all() -> None:
    page = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert [name for name in RECIPES if f"[{name}.yaml]({name}.yaml)" not in page] == []


@pytest.mark.slow
def test_fine_tuning_recovers_what_pruning_cost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert "[recover.py](recover.py)" in page
    spec = importlib.util.spec_from_file_location("recover", EXAMPLES / "recover.py")
    assert spec is not None
    assert spec.loader is not None
    recover = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recover)
    pruned, tuned, stored = recover.main(tmp_path / "recover", steps=20)
    assert tuned < 0.8 * pruned
    assert tuned < stored < pruned
    assert "in 4 bits" in capsys.readouterr().out
    assert surgeon.load(tmp_path / "recover").generate(torch.arange(3, 9).unsqueeze(0), max_new_tokens=4).shape == (1, 10)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in RECIPES if name not in ELSEWHERE])
def test_an_example_compiles_and_runs(name: str, tmp_path: Path) -> None:
    path = EXAMPLES / f"{name}.yaml"
    recipe = load_recipe(path, ["evaluate=null"])  # figures for people; the checks of the build stay
    assert recipe.output == EXAMPLES.parent / "build" / name
    compiled = compile_recipe(recipe, output=tmp_path / name, progress=False)
    assert compiled.plan is not None
    assert all(step.plan["decisions"] for step in compiled.plan.passes)
    artefact = surgeon.load(tmp_path / name)
    prompt = torch.arange(3, 9).unsqueeze(0)
    if name == "upcycle":
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert type(model).__name__ == "MixtralForCausalLM"
        return
    tokens = artefact.generate(prompt, max_new_tokens=4)
    assert tokens.shape == (1, 10)
    assert torch.equal(tokens[:, :6], prompt)
