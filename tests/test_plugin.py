"""The plug-in story: a package in an environment of its own is trained by name, with no edit in the core."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from sparsekit.registry import registry

from . import environments
from .environments import run

EXAMPLE = Path(__file__).parents[1] / "plugins" / "sparsekit-example"


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment that has the example plug-in."""
    folder = tmp_path_factory.mktemp("plugin")
    python = environments.make(folder / "venv")
    package = folder / EXAMPLE.name  # a copy, since building leaves files beside the source
    shutil.copytree(EXAMPLE, package)
    environments.install(python, package)
    return python


def test_not_in_our_own_environment() -> None:
    assert "maxout" not in registry("ffn").names(), "uninstall sparsekit-example: the core is tested without it"


def test_is_listed_without_being_imported(environment: Path) -> None:
    done = run(environment, "-c", "import sys; from sparsekit.cli import main\n"
               "sys.argv = ['sparsekit', 'list', '--json']\n"
               "try: main()\nfinally: assert 'sparsekit_example' not in sys.modules")  # fmt: skip
    assert done.returncode == 0, done.stderr
    ours = {(e["kind"], e["name"]) for e in json.loads(done.stdout) if e["owner"] == "sparsekit-example"}
    assert ours == {("ffn", "maxout"), ("norm", "scale_norm")}
    done = run(environment, "-m", "sparsekit.cli", "list", "norm")
    assert "[sparsekit-example 0.1.0] An example of a sparsekit plug-in: " in done.stdout
    done = run(environment, "-m", "sparsekit.cli", "list", "--check")
    assert (done.returncode, done.stdout) == (0, "all 2 entries of 1 package work\n")


def test_trains_by_name(environment: Path, tmp_path: Path) -> None:
    spec = json.loads((EXAMPLE / "spec.json").read_text())
    spec["model"]["layers"] = {"1": {"ffn": {"type": "moe", "n_experts": 4, "expert": {"type": "maxout", "d_ff": 32}}}}
    spec["train"] |= {"max_steps": 20, "callbacks": []}
    (tmp_path / "text.txt").write_text("What is it that you would tell me, and why not before now?\n" * 200)
    spec["data"] = {"source": {"type": "text", "path": "text.txt"}}
    path = tmp_path / "spec.json"
    path.write_text(json.dumps(spec))
    done = run(environment, "-m", "sparsekit.cli", "train", str(path), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "maxout"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    assert json.loads((folder / "spec.json").read_text())["packages"] == {"sparsekit-example": "0.1.0"}

    # here, where the package is not installed, the run says what is missing
    done = run(sys.executable, "-m", "sparsekit.cli", "generate", str(folder))
    assert done.returncode == 2
    missing = "packages: made with sparsekit-example 0.1.0, which is not installed; install that package"
    assert done.stderr == f"error: {missing}\n"


def test_its_own_tests_pass(environment: Path) -> None:
    done = run(environment, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull, str(EXAMPLE / "tests"))
    assert done.returncode == 0, done.stdout
    assert "2 passed" in done.stdout
