"""How long commands take to start, beside Python's own start; medians of interleaved runs in fresh processes.

python benchmarks/startup.py
"""

from __future__ import annotations

import statistics
import subprocess
import sys
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
REPEATS = 7


def seconds(arguments: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
    return time.perf_counter() - began


def main() -> None:
    for arguments in COMMANDS.values():  # warm: files in the page cache, bytecode compiled
        seconds(arguments)
    taken: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(REPEATS):
        for name, arguments in COMMANDS.items():
            taken[name].append(seconds(arguments))
    bare = statistics.median(taken["python -c pass"])
    for name, values in taken.items():
        median = statistics.median(values)
        print(f"{name:26} {median:6.3f} s   {median - bare:6.3f} s beyond Python's start")


if __name__ == "__main__":
    main()
