"""How long commands take to start, beside Python's own start; medians of interleaved runs in fresh processes.

The last lines are of an environment with 100 plug-ins more, packages of ten entries of which one raises on import, one
hangs for 5 s, and one claims a built-in's name.

python benchmarks/startup.py
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SPEC = Path(__file__).parents[1] / "specs" / "runs" / "tiny.json"
COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "sparsekit --help": ["-m", "sparsekit.cli", "--help"],
    "sparsekit list": ["-m", "sparsekit.cli", "list"],
    "sparsekit validate": ["-m", "sparsekit.cli", "validate", str(SPEC)],
    "python -c 'import torch'": ["-c", "import torch"],
}
WITH_PLUGINS = {
    "python -c pass": ["-c", "pass"],
    "sparsekit list": ["-m", "sparsekit.cli", "list"],
    "sparsekit list --json": ["-m", "sparsekit.cli", "list", "--json"],
    "sparsekit validate": ["-m", "sparsekit.cli", "validate", str(SPEC)],
    "sparsekit list --check": ["-m", "sparsekit.cli", "list", "--check"],
}
REPEATS = 7
PLUGINS, ENTRIES = 100, 10

WORKS = "from sparsekit.components.feedforward import MLP\n\n\nclass Part(MLP):\n    '''A dummy.'''\n"
RAISES = "raise RuntimeError('no luck')\n"
HANGS = "import time\n\ntime.sleep(5)\n" + WORKS


def write_plugin(folder: Path, name: str, points: dict[str, list[str]], source: str, version: str = "1.0") -> None:
    """A package as pip leaves it on a path: its metadata, and a module ``name`` with a class ``Part``."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    about = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nSummary: What {name} is.\n"
    (info / "METADATA").write_text(about + "\nA description.\n" * 200)
    lines = []
    for kind, entries in points.items():
        lines += [f"[sparsekit.{kind}]", *(f"{entry} = {name}:Part" for entry in entries), ""]
    (info / "entry_points.txt").write_text("\n".join(lines))
    (folder / f"{name}.py").write_text(source)


def write_plugins(folder: Path) -> None:
    """100 of them, three of which are bad neighbours."""
    sources = {0: RAISES, 1: HANGS}
    for i in range(PLUGINS):
        names = [f"dummy_{i}_{j}" for j in range(ENTRIES)] if i != 2 else ["swiglu"]
        write_plugin(folder, f"dummy{i}", {"ffn": names}, sources.get(i, WORKS))


def seconds(arguments: list[str], path: str = "") -> tuple[float, float]:
    """(on the clock, of processor time)."""
    environment = {**os.environ, "PYTHONPATH": path} if path else None
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)
    took, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode and "--check" not in arguments:
        raise RuntimeError(done.stderr)
    return took, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure(commands: dict[str, list[str]], path: str = "", repeats: int = REPEATS) -> None:
    for arguments in commands.values():  # warm: files in the page cache, bytecode compiled
        seconds(arguments, path)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for _ in range(repeats):
        for name, arguments in commands.items():
            taken[name].append(seconds(arguments, path))
    bare = statistics.median(clock for clock, _ in taken["python -c pass"])
    for name, values in taken.items():
        clock, busy = (statistics.median(column) for column in zip(*values, strict=True))
        print(
            f"{name:26} {clock:6.3f} s   {clock - bare:6.3f} s beyond Python's start   {busy:6.3f} s of processor time"
        )


def main() -> None:
    measure(COMMANDS)
    with tempfile.TemporaryDirectory() as folder:
        write_plugins(Path(folder))
        print(f"\nwith {PLUGINS} plug-ins of {ENTRIES} entries")
        *quick, check = WITH_PLUGINS.items()
        measure(dict(quick), folder)
        took, busy = seconds(check[1], folder)
        print(f"{check[0]:26} {took:6.3f} s   once, {busy:.3f} s of processor time; of it 5 s for the one that hangs")


if __name__ == "__main__":
    main()
