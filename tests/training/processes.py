"""Runs in processes of their own, several together where asked, through the command line's own main().

They are forked from a server that has imported torch once, so that a start takes little; what they do is what
``torchrun … -m sparsekit.cli train`` does.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from sparsekit.model.targets import Run

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([
    "sparsekit.cli", "sparsekit.training.run", "torch.distributed.fsdp", "torch.distributed.checkpoint.hf_storage",
    "torch.distributed.checkpoint.state_dict_saver", "torch.distributed.checkpoint.state_dict_loader",
])  # fmt: skip
PATIENCE = 120.0  # seconds, on a machine that others use too

Prepare = Callable[[], None]  # called in each process before it trains


@dataclass(frozen=True)
class Crew:
    """Processes that train together.

    Attributes:
        out: the run folder.
        processes: by rank.
        logs: a file for each, with what it wrote to stderr.
    """

    out: Path
    processes: list[BaseProcess]
    logs: list[Path]

    def wait(self, timeout: float = PATIENCE) -> list[int | None]:
        """Every exit code, by rank; None for a process that still ran at the end, and was killed."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
            process.join()
        return codes

    @property
    def told(self) -> list[str]:
        """What each wrote to stderr."""
        return [log.read_text() for log in self.logs]

    def send(self, number: int, rank: int = 0) -> None:
        pid = self.processes[rank].pid
        assert pid is not None
        if self.processes[rank].is_alive():
            os.kill(pid, number)

    def until(self, holds: Callable[[], bool], timeout: float = PATIENCE) -> None:
        """Waits until something holds, or until any of the processes has ended."""
        deadline = time.monotonic() + timeout
        while not holds() and all(process.is_alive() for process in self.processes):
            assert time.monotonic() < deadline, self.told
            time.sleep(0.002)


def start(
    raw: dict[str, Any], out: Path, n: int = 1, prepare: Prepare | None = None, arguments: tuple[str, ...] = ()
) -> Crew:
    """Begins to train a spec in n processes, as ``sparsekit train`` under torchrun does."""
    out.parent.mkdir(parents=True, exist_ok=True)
    spec = out.with_name(f"{out.name}.spec.json")
    spec.write_text(json.dumps(raw))
    port = free_port()
    logs = [out.with_name(f"{out.name}.{rank}.log") for rank in range(n)]
    command = ["sparsekit", "train", str(spec), "--out", str(out), *arguments]
    processes = [
        FORKS.Process(target=_work, args=(command, rank, n, port, log, prepare), daemon=True)
        for rank, log in enumerate(logs)
    ]
    for process in processes:
        process.start()
    return Crew(out, list(processes), logs)


def finished(raw: dict[str, Any], out: Path, n: int = 1, prepare: Prepare | None = None) -> Crew:
    """Trains a spec to its end."""
    crew = start(raw, out, n, prepare)
    codes = crew.wait()
    assert codes == [0] * n, crew.told
    return crew


def _work(command: list[str], rank: int, n: int, port: int, log: Path, prepare: Prepare | None) -> None:
    with log.open("wb") as stream:
        os.dup2(stream.fileno(), 2)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    import torch
    from sparsekit.cli import main

    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    if prepare is not None:
        prepare()
    sys.argv = command
    main()


def reached(run: Run) -> int:
    """The last step that a run has logged; 0 where none is."""
    rows = run.metrics
    return int(rows[-1]["step"]) if rows else 0


def resumption(run: Run, step: int) -> str:
    """What a run says when it goes on from a step."""
    return f"{run.folder}: going on from step {step} ({run.folder}/checkpoints/step-{step:08d})"


def steps(run: Run) -> list[int]:
    """Of its checkpoints."""
    return [int(path.name.removeprefix("step-")) for path in run.checkpoints]


def leftovers(run: Run) -> list[str]:
    """What was never given its name."""
    return [path.name for path in run.folder.rglob("*") if path.name.endswith(".tmp")]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
