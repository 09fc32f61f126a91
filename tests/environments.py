"""Virtual environments that see this one's packages and have plug-ins beside them, for tests that install some."""

from __future__ import annotations

import os
import subprocess
import sysconfig
import venv
from pathlib import Path


def make(folder: Path) -> Path:
    """A new environment's Python."""
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    theirs = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
    # addsitedir, unlike a bare path, also follows the links of editable installs
    ours = sysconfig.get_path("purelib")
    (Path(theirs) / "shared.pth").write_text(f"import site; site.addsitedir({ours!r})\n")
    return python


def install(python: Path, *what: str | Path) -> None:
    """By pip, from folders alone: nothing is fetched."""
    pip = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = run(python, *pip, *map(str, what))
    assert done.returncode == 0, done.stderr


def run(python: Path | str, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [python, *arguments], capture_output=True, text=True, cwd=cwd, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )


def sparsekit(python: Path | str, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return run(python, "-m", "sparsekit.cli", *arguments, cwd=cwd)
