"""Kills a small run again and again, and holds what comes out in the end against a run that nothing befell.

python benchmarks/faults.py [--kills 50] [--processes 1 2] [--seed 0]

Each time the run is started again, let go on for a random while, and then SIGKILL or SIGTERM is sent: in training,
while a checkpoint is saved, in evaluation, or while it starts; of several processes (gloo) to one of them or to all.
After the last resume the weights, the optimizer's state, the random numbers and all that was logged must equal the
undisturbed run's bit for bit, and every window of the text must have been read exactly once in each epoch. Exits with
1 if not. Processes are forked from a server that has imported torch, so that a start takes no seconds.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

FORKS = multiprocessing.get_context("forkserver")
PRELOADED = ["sparsekit.cli", "sparsekit.training.run", "torch.distributed.fsdp", "torch.distributed.checkpoint"]
PLACES = {"training": 4, "save": 4, "evaluation": 2, "start-up": 1}  # how often each is aimed at
STEPS_A_KILL = 25  # so that there is something left to do after the last
GRACE = 30.0  # seconds in which all processes must have ended
SPEEDS = ("tokens_per_second", "data_wait", "memory", "mfu")  # what begins so is no part of the result


def spec_of(folder: Path, max_steps: int, seed: int) -> dict[str, Any]:
    """A run of two layers, one a mixture of experts that draws random numbers, on text with no window twice."""
    words = random.Random(seed)
    for name, n in (("train.txt", 30_000), ("validation.txt", 6_000)):
        (folder / name).write_text("".join(words.choices("abcdefghijklmnopqrstuvwxyz ", k=n)))
    return {
        "model": {
            "d_model": 16, "n_layers": 2, "vocab_size": 257, "max_seq_len": 16,
            "block": {"attention": {"type": "mha", "n_heads": 2}, "ffn": {"type": "swiglu", "d_ff": 24}},
            "layers": {"1": {"ffn": {
                "type": "moe", "n_experts": 4, "expert": {"type": "swiglu", "d_ff": 16},
                "router": {"type": "top_k", "k": 2, "jitter": 0.1},
            }}},
        },
        "data": {
            "source": {
                "type": "text",
                "path": str(folder / "train.txt"),
                "validation_path": str(folder / "validation.txt"),
            }
        },
        "train": {
            "max_steps": max_steps, "global_batch_tokens": 128, "micro_batch_size": 4, "seed": seed, "log_every": 1,
            "eval_every": 15, "checkpoint_every": 5, "callbacks": [],
        },
    }  # fmt: skip


# In a process that trains


def work(spec: Path, out: Path, notes: Path, leg: int, rank: int, n: int, port: int) -> None:
    """``sparsekit train``, which also notes down what it is at and which windows each update was made of."""
    with (notes / f"log-{rank}").open("ab") as stream:
        os.dup2(stream.fileno(), 2)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    import torch
    from sparsekit.cli import main

    from sparsekit.training.evaluation import Evaluation
    from sparsekit.training.trainer import Trainer

    torch.set_num_threads(1)
    samples = (notes / f"samples-{rank}.jsonl").open("a", buffering=1)
    place = notes / f"place-{rank}"
    place.write_text("start-up")
    step, evaluate = Trainer.step, Evaluation.__call__

    def noted_step(self: Trainer, *arguments: Any, **more: Any) -> Any:
        place.write_text("training")
        told = step(self, *arguments, **more)
        number, batches = self._recent[-1]
        windows = [sha256(row.numpy().tobytes()).hexdigest()[:16] for batch in batches for row in batch.tokens_BT1]
        samples.write(json.dumps({"leg": leg, "step": number, "windows": windows}) + "\n")
        return told

    def noted_evaluate(self: Evaluation, *arguments: Any) -> Any:
        place.write_text("evaluation")
        try:
            return evaluate(self, *arguments)
        finally:
            place.write_text("training")

    Trainer.step, Evaluation.__call__ = noted_step, noted_evaluate  # type: ignore[method-assign, assignment]
    here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in here.items()})
    sys.argv = ["sparsekit", "train", str(spec), "--out", str(out)]
    main()


# Outside


@dataclass
class Trial:
    """A run that is started again and again, and what was seen of it.

    Attributes:
        n: processes.
        out, notes: the run's folder, and one for what its processes note down.
        hits: how often each place was hit, by signal.
        slowest: seconds until all processes had ended, at most.
        faults: whatever was not as it should be.
    """

    spec: Path
    out: Path
    notes: Path
    n: int
    legs: int = 0
    hits: Counter[tuple[str, str]] = field(default_factory=Counter)
    slowest: float = 0.0
    faults: list[str] = field(default_factory=list)

    def start(self) -> list[BaseProcess]:
        self.notes.mkdir(exist_ok=True)
        for rank in range(self.n):
            (self.notes / f"place-{rank}").write_text("start-up")
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        self.legs += 1
        processes: list[BaseProcess] = [
            FORKS.Process(target=work, args=(self.spec, self.out, self.notes, self.legs, rank, self.n, port))
            for rank in range(self.n)
        ]
        for process in processes:
            process.start()
        return processes

    def finish(self) -> None:
        """Trains to the end."""
        processes = self.start()
        while any(process.is_alive() for process in processes) and not any(p.exitcode for p in processes):
            time.sleep(0.05)
        self.end(processes)
        if any(process.exitcode for process in processes):
            self.faults.append(f"leg {self.legs} ended with {[p.exitcode for p in processes]}: {self.told()}")

    def end(self, processes: list[BaseProcess]) -> bool:
        """Whether all end by themselves within GRACE; those that do not are killed."""
        began = time.monotonic()
        for process in processes:
            process.join(max(0.0, began + GRACE - time.monotonic()))
        well = not any(process.is_alive() for process in processes)
        for process in processes:
            process.kill()
            process.join()
        self.slowest = max(self.slowest, time.monotonic() - began)
        return well

    def told(self) -> str:
        return " | ".join((self.notes / f"log-{rank}").read_text()[-300:].strip() for rank in range(self.n))

    def place(self, rank: int) -> str:
        told = (self.notes / f"place-{rank}").read_text() or "training"
        # until it trains, what lies there was left by the leg before
        return "save" if told != "start-up" and any((self.out / "checkpoints").glob(".*.tmp")) else told

    def kill(self, choose: random.Random) -> None:
        """Starts the run, waits for a moment, and sends a signal to one process or to all."""
        processes = self.start()
        victims = choose.choice([[rank] for rank in range(self.n)] + ([list(range(self.n))] if self.n > 1 else []))
        aim = choose.choices(list(PLACES), list(PLACES.values()))[0]
        number = choose.choices([signal.SIGKILL, signal.SIGTERM], [2, 1])[0]

        def wait(holds: Callable[[], bool]) -> None:
            until = time.monotonic() + GRACE
            while not holds() and all(process.is_alive() for process in processes) and time.monotonic() < until:
                time.sleep(0.001)

        if aim != "start-up":
            wait(lambda: self.place(victims[0]) != "start-up")
            time.sleep(choose.uniform(0, 0.2))
            wait(lambda: self.place(victims[0]) == aim)
        time.sleep(choose.uniform(0, 0.3 if aim == "start-up" else 0.02))
        place = self.place(victims[0])
        if not all(process.is_alive() for process in processes):
            self.faults.append(f"leg {self.legs} ended by itself: {self.told()}")
        if place == "start-up":  # who waits for others to come cannot know that they never will: torchrun ends it
            victims = list(range(self.n))
        for rank in victims:
            pid = processes[rank].pid
            if pid is not None and processes[rank].is_alive():
                os.kill(pid, number)
        if not self.end(processes):
            self.faults.append(f"leg {self.legs}, {signal.Signals(number).name} in {place}: a process went on")
        self.hits[place, signal.Signals(number).name] += 1
        codes = [process.exitcode for process in processes]
        # before it listens, SIGTERM ends a process as it does any other
        if number == signal.SIGTERM and place != "start-up" and any(codes):
            self.faults.append(f"leg {self.legs}: SIGTERM in {place} ended with {codes}: {self.told()}")
        self.look()

    def look(self) -> None:
        """What bears a checkpoint's name must be whole, whatever happened."""
        from sparsekit.errors import CheckpointError
        from sparsekit.files import verify
        from sparsekit.model.targets import Run

        for folder in Run(self.out).checkpoints:
            try:
                verify(folder)
            except CheckpointError as error:
                self.faults.append(f"leg {self.legs}: {error}")

    def windows(self) -> tuple[dict[int, list[str]], int]:
        """The windows that each update was made of that came to stay, and how many updates were made in all."""
        last: dict[tuple[int, int], list[str]] = {}
        count = 0
        for rank in range(self.n):
            for line in (self.notes / f"samples-{rank}.jsonl").read_text().splitlines(keepends=True):
                if line.endswith("}\n") and line.startswith("{"):
                    row = json.loads(line)
                    last[row["step"], rank] = row["windows"]
                    count += rank == 0
        steps = sorted({step for step, _ in last})
        return {step: [w for rank in range(self.n) for w in last.get((step, rank), [])] for step in steps}, count


def contents(out: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """All tensors of the last checkpoint, and what was logged but for speeds."""
    import torch
    from safetensors.torch import load_file

    from sparsekit.model.targets import Run
    from sparsekit.model.weights import WEIGHTS, read, stored

    run = Run(out)
    folder = run.checkpoints[-1]
    tensors = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in stored(folder / WEIGHTS).items()}
    read(folder / WEIGHTS, tensors)
    rows = [{key: row[key] for key in row if not key.startswith(SPEEDS)} for row in run.metrics]
    return tensors | load_file(folder / "random.safetensors"), rows


def each_once(windows: dict[int, list[str]], max_steps: int) -> bool:
    """Whether every step was taken and every epoch has each window exactly once."""
    order = [window for step in sorted(windows) for window in windows[step]]
    n_windows = len(set(order))
    epochs = [order[begin : begin + n_windows] for begin in range(0, len(order), n_windows)]
    return sorted(windows) == list(range(1, max_steps + 1)) and all(len(set(epoch)) == len(epoch) for epoch in epochs)


def trial(folder: Path, n: int, kills: int, seed: int) -> bool:
    """Runs and prints one comparison."""
    import torch

    max_steps = STEPS_A_KILL * kills
    (spec := folder / "spec.json").write_text(json.dumps(spec_of(folder, max_steps, seed)))
    whole = Trial(spec, folder / f"whole-{n}", folder / f"whole-{n}-notes", n)
    part = Trial(spec, folder / f"part-{n}", folder / f"part-{n}-notes", n)
    began = time.monotonic()
    whole.finish()
    choose = random.Random(f"{seed} {n}")
    for _ in range(kills):
        part.kill(choose)
    part.finish()
    (left, left_rows), (right, right_rows) = contents(whole.out), contents(part.out)
    equal = left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
    logged = left_rows == right_rows
    wanted, _ = whole.windows()
    read, taken = part.windows()
    once = each_once(wanted, max_steps) and read == wanted
    hits = {place: sum(count for (where, _), count in part.hits.items() if where == place) for place in PLACES}
    signals = Counter(name for name, _ in (key[::-1] for key in part.hits.elements()))
    told = ", ".join(f"{place} {count}" for place, count in hits.items())
    yes = {True: "yes", False: "NO"}
    print(f"{n} process{'es' if n > 1 else ''}, {max_steps} steps, {time.monotonic() - began:.0f} s")
    print(f"  kills                  {sum(part.hits.values())} ({', '.join(f'{k} {v}' for k, v in signals.items())})")
    print(f"  where they hit         {told}")
    print(f"  resumes                {part.legs - 1}")
    print(f"  steps taken again      {taken - max_steps}")
    print(f"  all ended within       {part.slowest:.1f} s")
    print(f"  bitwise equal          {yes[equal]} ({len(left)} tensors)")
    print(f"  logged the same        {yes[logged]} ({len(left_rows)} rows)")
    print(f"  samples read once      {yes[once]} ({sum(map(len, wanted.values()))} windows)")
    for fault in whole.faults + part.faults:
        print(f"  FAULT                  {fault}")
    return equal and logged and once and not whole.faults and not part.faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    FORKS.set_forkserver_preload(PRELOADED)
    well = True
    for n in arguments.processes:
        with tempfile.TemporaryDirectory() as folder:
            well &= trial(Path(folder), n, arguments.kills, arguments.seed)
    sys.exit(0 if well else 1)


if __name__ == "__main__":
    main()
