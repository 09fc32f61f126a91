"""The packages of plugins/ that bring methods: installed beside the core, each keeps what its own tests say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from . import environments

PLUGINS = Path(__file__).parents[1] / "plugins"
BRINGS = {
    "sparsekit-routers": {
        ("router", "blockffn"), ("router", "sparse_mixer"), ("ffn", "smear"), ("ffn", "stratified"),
        ("ffn", "monet"), ("ffn", "monet_vertical"), ("residual", "momentum_residual"),
    },
    "sparsekit-sparse-attention": {("attention", "nsa"), ("attention", "mosa")},
}  # fmt: skip


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment that has them all, and beside it their copies."""
    folder = tmp_path_factory.mktemp("packages")
    python = environments.make(folder / "venv")
    copies = [folder / name for name in BRINGS]  # since building leaves files beside the source
    for copy in copies:
        shutil.copytree(PLUGINS / copy.name, copy, ignore=shutil.ignore_patterns("build", "*.egg-info"))
    environments.install(python, *copies)
    return python


def folder_of(environment: Path, package: str) -> Path:
    return environment.parents[2] / package


def test_what_they_bring(environment: Path) -> None:
    listed = json.loads(environments.sparsekit(environment, "list", "--json").stdout)
    for package, entries in BRINGS.items():
        assert {(e["kind"], e["name"]) for e in listed if e["owner"] == package} == entries
    done = environments.sparsekit(environment, "list", "--check")
    assert (done.returncode, done.stdout) == (0, "all 9 entries of 2 packages work\n")


@pytest.mark.parametrize("package", BRINGS)
def test_its_own_tests_pass(environment: Path, package: str) -> None:
    folder = folder_of(environment, package)
    done = environments.run(environment, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder), cwd=folder)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("package", BRINGS)
def test_compiled_too(environment: Path, package: str) -> None:
    folder = folder_of(environment, package)
    options = ["-q", "-p", "no:cacheprovider", "-m", "slow"]
    done = environments.run(environment, "-m", "pytest", *options, str(folder), cwd=folder)
    assert done.returncode == 0, done.stdout
