"""How long it takes to plan a thousand runs, and whether a study that is killed ends with the same table.

    python benchmarks/studies.py [--kills 10] [--runs 1000]

The plan is the whole command, `sparsekit study FILE --plan`: counted the first time, then remembered, then with every
run finished (their results are written by hand). The kill test runs a study of 8 tiny runs (2 layers of width 16) once
in one go; then again and again, each time killed with SIGKILL, runs and all, at a random moment, until it comes to its
end; and compares table.csv byte for byte.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BLOCK = {"attention": {"type": "gqa", "n_heads": 4, "n_kv_heads": 4}, "ffn": {"type": "swiglu", "d_ff": 32}}
TRAIN: dict[str, Any] = {
    "max_steps": 12, "global_batch_tokens": 256, "micro_batch_size": 8, "eval_tokens": 1024, "checkpoint_every": 3,
    "log_every": 2, "callbacks": [], "optimizer": {"type": "adamw", "lr": 1e-2},
}  # fmt: skip
TINY: dict[str, Any] = {
    "name": "tiny",
    "base": {
        "model": {"d_model": 16, "n_layers": 2, "vocab_size": 257, "max_seq_len": 32, "block": BLOCK},
        "data": {"source": "embedded"},
        "train": TRAIN,
    },
    "axes": {"model.block.attention.n_kv_heads": [4, 1], "model.n_layers": [2, 3]},
    "seeds": [0, 1],
    "probes": ["variance", {"type": "permutation", "pairs": "adjacent"}],
    "probe_on": {"sequences": 8, "seq_len": 32},
    "launch": {"threads": 1},
}


def large(runs: int) -> dict[str, Any]:
    """A study of so many runs: 20 sizes, 5 learning rates, and seeds."""
    axes = {"model.d_model": [64, 128, 192, 256], "model.n_layers": [2, 4, 8, 12, 16],
            "train.optimizer.lr": [1e-4, 3e-4, 1e-3, 3e-3, 1e-2]}  # fmt: skip
    return {**TINY, "name": "large", "axes": axes, "seeds": list(range(runs // 100))}


def command(path: Path, out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "sparsekit.cli", "study", str(path), "--out", str(out), *more]


def timed(words: list[str], home: Path) -> str:
    """Wall and CPU seconds of a command."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(words, check=True, capture_output=True, env=os.environ | {"XDG_CACHE_HOME": str(home)})
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return f"{wall:5.2f} s ({cpu:.2f} s of CPU)"


def plan(folder: Path, runs: int) -> None:
    path, out = folder / "large.json", folder / "large"
    path.write_text(json.dumps(large(runs)))
    words = command(path, out, "--plan")
    print(f"python -c 'import torch'            {timed([sys.executable, '-c', 'import torch'], folder)}")
    print(f"plan of {runs} runs, first            {timed(words, folder)}")
    for _ in range(3):
        print(f"plan of {runs} runs, remembered       {timed(words, folder)}")
    finished_by_hand(path, out)
    print(f"plan of {runs} runs, all finished     {timed(words, folder)}")
    print(f"collect, compare, write {runs} runs   {timed(command(path, out, '--collect', '--no-report'), folder)}")


def finished_by_hand(path: Path, out: Path) -> None:
    """As if every run had come to its end."""
    from sparsekit.studies.plan import expand
    from sparsekit.studies.spec import load_study
    from sparsekit.studies.stages import METRICS, TRAIN, Stage, note_done, stages

    planned = expand(load_study(path, out=out))
    for number, run in enumerate(planned.runs):
        (run.folder / "probes").mkdir(parents=True)
        (run.folder / "spec.json").write_text(json.dumps(run.resolved))
        row = {"step": 12, "tokens": 3072, "val_loss": 4 + number % 7 / 100, "tokens_per_second": 1e4}
        (run.folder / METRICS).write_text(json.dumps(row) + "\n")
        note_done(run.folder, Stage(TRAIN, {}), run.folder / METRICS, step=12, tokens=3072, tokens_per_second=1e4)
        for stage in stages(planned)[1:]:
            result = run.folder / "probes" / f"{stage.of}-step-00000012.json"
            result.write_text(json.dumps({"scalars": {"mean": number % 7}, "per_layer": {"resid": [1.0] * 16}}))
            note_done(run.folder, stage, result)


def killed(folder: Path, kills: int, seed: int = 0) -> None:
    path, whole, out = folder / "tiny.json", folder / "whole", folder / "killed"
    path.write_text(json.dumps(TINY))
    began = time.perf_counter()
    print(f"8 tiny runs in one go             {timed(command(path, whole, '--jobs', '2', '--no-report'), folder)}")
    took = time.perf_counter() - began
    draw, done = random.Random(seed), 0
    for _ in range(kills):  # early enough that most of them meet it at work
        done += _kill(command(path, out, "--jobs", "2", "--no-report"), draw.uniform(0.1, 0.6) * took)
    subprocess.run(command(path, out, "--jobs", "2", "--no-report"), check=True, capture_output=True)
    same = {name: (whole / name).read_bytes() == (out / name).read_bytes() for name in ("table.csv", "comparisons.csv")}
    print(f"killed {done} times, then ended: {', '.join(f'{n} is the same: {s}' for n, s in same.items())}")


def _kill(words: list[str], after: float) -> int:
    """Kills a command and the processes of its runs; whether it still ran."""
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(after)
    if process.poll() is not None:
        return 0
    children = _below(process.pid)
    for pid in (process.pid, *children):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()
    return 1


def _below(pid: int) -> list[int]:
    """The processes that a process has started, and theirs."""
    told = Path(f"/proc/{pid}/task/{pid}/children")
    own = [int(word) for word in told.read_text().split()] if told.exists() else []
    return [*own, *(other for child in own for other in _below(child))]


if __name__ == "__main__":
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--kills", type=int, default=10)
    arguments.add_argument("--runs", type=int, default=1000)
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory() as name:
        plan(Path(name), given.runs)
        killed(Path(name), given.kills)
