"""What is installed, and that the folders ``passes`` and ``backends`` have one name only."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
LINKED = ("passes", "backends")


def run(*command: str | Path, folder: Path, code: int = 0, **environment: str) -> str:
    """Run a command outside the checkout and return what it printed."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="session")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files a build reads, elsewhere, so that building leaves nothing in the tree and finds nothing stale there."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "tests", "surgeon", *LINKED):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy / name)
    return copy


@pytest.fixture(scope="session")
def distributions(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source distribution and the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, checkout, folder=folder)
    return folder


@pytest.fixture(scope="session")
def wheel(distributions: Path) -> Path:
    return next(distributions.glob("*.whl"))


def modules(folder: Path) -> set[str]:
    """Python files of a package's folder, links not followed."""
    return {
        str(Path(path, name).relative_to(folder))
        for path, _, names in os.walk(folder)
        for name in names
        if name.endswith(".py")
    }


def test_the_links_name_the_folders() -> None:
    for name in LINKED:
        assert (ROOT / "surgeon" / name).is_symlink()
        assert os.readlink(ROOT / "surgeon" / name) == f"../{name}"


@pytest.mark.parametrize("name", LINKED)
def test_the_folders_are_refused_under_their_own_name(name: str) -> None:
    printed = run(sys.executable, "-c", f"import {name}", folder=ROOT, code=1)
    assert f"ImportError: import this package as 'surgeon.{name}', not as '{name}'" in printed


def test_every_package_is_listed(project: dict[str, Any]) -> None:
    """setuptools would leave an unlisted package out of the wheel without a word."""
    found = {"surgeon" + str(path.parent)[len("surgeon") :].replace("/", ".") for path in _packages("surgeon")}
    found |= {"surgeon." + str(path.parent).replace("/", ".") for name in LINKED for path in _packages(name)}
    assert set(project["tool"]["setuptools"]["packages"]) == found


def _packages(top: str) -> list[Path]:
    return [Path(top) / name for name in modules(ROOT / top) if Path(name).name == "__init__.py"]


def test_every_import_is_a_declared_requirement(project: dict[str, Any]) -> None:
    """A library that only comes along with another one goes away with it."""
    owners = importlib.metadata.packages_distributions()
    needed = [Requirement(line).name for line in project["project"]["dependencies"]]
    optional = [
        Requirement(line).name
        for extra in ("cpu", "cuda", "genai", "gguf")
        for line in project["project"]["optional-dependencies"][extra]
    ]
    # Parts of a declared library that pin each other exactly.
    declared = {_plain(name) for name in (*needed, *optional, "markupsafe", "pydantic-core")}
    missing = {}
    for top in ("surgeon", *LINKED):
        for file in modules(ROOT / top):
            for imported in _imports(ROOT / top / file):
                if imported in sys.stdlib_module_names or imported == "surgeon":
                    continue
                if not declared & {_plain(name) for name in owners.get(imported, [])}:
                    missing[f"{top}/{file}"] = imported
    assert missing == {}


def _imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            found.add((node.module or "").partition(".")[0])
    return found


def _plain(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


def test_passes_and_backends_are_imported_by_nothing_in_surgeon() -> None:
    """Arrows point one way: surgeon finds passes and backends by their names only."""
    for file in modules(ROOT / "surgeon"):
        for node in ast.walk(ast.parse((ROOT / "surgeon" / file).read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not [name for name in names if name.startswith(("surgeon.passes", "surgeon.backends"))], file


@pytest.mark.slow
def test_wheel_contents(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert len(names) == len(set(names))
    wanted = {f"surgeon/{name}" for name in modules(ROOT / "surgeon")}
    wanted |= {f"surgeon/{top}/{name}" for top in LINKED for name in modules(ROOT / top)}
    wanted |= {f"surgeon/templates/{path.name}" for path in (ROOT / "surgeon" / "templates").glob("*.html")}
    wanted.add("surgeon/py.typed")
    found = {name for name in names if ".dist-info/" not in name}
    assert found == wanted
    assert [name for name in names if name.endswith(".dist-info/licenses/LICENSE")]


@pytest.mark.slow
def test_source_distribution_contents(distributions: Path) -> None:
    with tarfile.open(next(distributions.glob("*.tar.gz"))) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    assert len(names) == len(set(names))
    wanted = {f"{top}/{name}" for top in ("surgeon", *LINKED) for name in modules(ROOT / top)}
    assert {name for name in names if name.endswith(".py")} == wanted
    assert {"pyproject.toml", "README.md", "LICENSE", "surgeon/py.typed", "surgeon/templates/report.html"} < set(names)


@pytest.mark.slow
def test_wheel_metadata(wheel: Path, project: dict[str, Any]) -> None:
    with zipfile.ZipFile(wheel) as archive:
        folder = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA")).partition("/")[0]
        metadata = importlib.metadata.PathDistribution(zipfile.Path(archive, f"{folder}/"))
        assert metadata.metadata["License-Expression"] == "Apache-2.0"
        extras = metadata.metadata.get_all("Provides-Extra")
        assert extras is not None
        assert {"cpu", "cuda", "tensorrt", "tensorrt-rtx", "huggingface", "genai", "gguf", "dev"} == set(extras)
        assert metadata.version == project["project"]["version"]
        (script,) = metadata.entry_points.select(group="console_scripts")
        assert (script.name, script.value) == ("surgeon", "surgeon.cli:main")


@pytest.mark.slow
def test_installed_package(wheel: Path, tmp_path: Path) -> None:
    """``pip install`` without ``--editable``: imports come from there, in a folder that owns a ``backends/``."""
    target = tmp_path / "site"
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--target", target, wheel, folder=tmp_path)
    (tmp_path / "work" / "backends").mkdir(parents=True)
    (tmp_path / "work" / "backends" / "__init__.py").write_text("")
    show = "import surgeon.passes.drop_blocks as p, surgeon.backends as b; print(p.__file__, b.__file__)"
    printed = run(sys.executable, "-c", show, folder=tmp_path / "work", PYTHONPATH=str(target))
    assert printed.split() == [f"{target}/surgeon/passes/drop_blocks.py", f"{target}/surgeon/backends/__init__.py"]
    for name in LINKED:
        assert not (target / name).exists()


@pytest.mark.slow
def test_editable_install(checkout: Path, tmp_path: Path) -> None:
    """``pip install --editable``: the console script runs from any folder, on the checkout's files."""
    environment = tmp_path / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", environment, folder=tmp_path)
    python = environment / "bin" / "python"
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(run(python, "-c", where, folder=tmp_path).strip())
    # The libraries of this environment; its own .pth files, and so its own editable surgeon, are not read through one.
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-build-isolation")
    run(*pip, "--ignore-installed", "--editable", checkout, folder=tmp_path)
    show = "import surgeon.passes.quantize as p, surgeon.cli as c; print(p.__file__, c.__file__)"
    files = [Path(name).resolve() for name in run(python, "-c", show, folder=tmp_path).split()]
    assert files == [checkout / "passes" / "quantize.py", checkout / "surgeon" / "cli.py"]
    assert "drop_blocks" in run(environment / "bin" / "surgeon", "passes", folder=tmp_path)
