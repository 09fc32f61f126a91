"""Runs what is missing of a study, each run in a process of its own, some at a time.

Also one at a time they have processes of their own: memory comes back between runs, and one that is killed for want of
it, or crashes, costs that run alone. They are forked from a server that imports torch once.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from multiprocessing.connection import wait
from pathlib import Path
from types import FrameType
from typing import Any

from sparsekit.errors import SparsekitError, did_you_mean
from sparsekit.studies import work
from sparsekit.studies.plan import GPUS, Plan, PlannedRun
from sparsekit.studies.stages import FAILED, LOG, OWN, Stage, State, note_failed, read_small, stages, state

# what every run imports sooner or later; none of it asks for a device
PRELOAD = [
    "sparsekit.training.run", "sparsekit.probes.runner", "sparsekit.data.sources", "sparsekit.data.tokenizers",
    "sparsekit.studies.work", "torch._dynamo", "torch.distributed.checkpoint.hf_storage",
    "torch.distributed.checkpoint.state_dict_saver", "torch.distributed.checkpoint.state_dict_loader",
]  # fmt: skip
PATIENCE = 1.0  # seconds between two looks at a run that another process has

Tell = Callable[[str], None]


@dataclass
class Outcome:
    """How it went: names of the runs that were done and that failed, and whether a signal stopped it."""

    done: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    stopped: bool = False


def chosen_runs(plan: Plan, only: str | None = None) -> list[PlannedRun]:
    """The distinct runs whose name fits a pattern (``*`` stands for anything), or holds it.

    Raises:
        SparsekitError: none does.
    """
    runs = plan.distinct
    if only is None:
        return runs
    found = [run for run in runs if fnmatchcase(run.id, only) or only in run.id]
    if not found:
        names = [run.id for run in runs]
        raise SparsekitError(f"--only {only}: no run is called so{did_you_mean(only, names)}; the first is {names[0]}")
    return found


def states_of(plan: Plan, wanted: Sequence[Stage] | None = None) -> dict[Path, State]:
    """How far each distinct run is, by its folder."""
    wanted = stages(plan) if wanted is None else list(wanted)
    return {run.folder: state(run, wanted) for run in plan.distinct}


def conduct(plan: Plan, runs: Sequence[PlannedRun], jobs: int, devices: Sequence[str], tell: Tell) -> Outcome:
    """Does what is missing of some runs, ``jobs`` at a time, and tells of each.

    A run that another process has is left to it, and looked at again when nothing else is left to do.
    """
    wanted = stages(plan)
    todo = deque(run for run in runs if state(run, wanted).missing)
    total, outcome = len(todo), Outcome()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    # runs of several processes each see every GPU, and share them
    devices = list(devices) or (visible_devices(jobs) if plan.study.spec.launch.nproc == 1 else [])
    threads = plan.study.spec.launch.threads or threads_of(jobs)
    slots = deque(range(jobs))
    at_work: dict[Any, tuple[Any, PlannedRun, int, float]] = {}
    elsewhere: deque[PlannedRun] = deque()

    def told(run: PlannedRun, text: str) -> None:
        tell(f"[{len(outcome.done) + len(outcome.failed)}/{total}] {run.id}: {text}")

    with _listening() as asked:
        while todo or at_work or elsewhere:
            if asked():
                break
            while todo and slots:
                run, slot = todo.popleft(), slots.popleft()
                now = state(run, wanted)
                device = devices[slot % len(devices)] if devices else ""
                job = work.Job(run.folder, run.resolved, now.missing, device, threads, plan.study.spec.launch.nproc)
                process = context.Process(target=enter, args=(job,))
                process.start()
                at_work[process.sentinel] = process, run, slot, time.monotonic()
            if not at_work:  # all that is left is with others
                time.sleep(PATIENCE)
                for _ in range(len(elsewhere)):
                    run = elsewhere.popleft()
                    if state(run, wanted).missing:
                        todo.append(run)
                    else:
                        outcome.done.append(run.id)
                        told(run, "done by another process")
                continue
            for sentinel in wait(list(at_work), timeout=0.5):
                process, run, slot, began = at_work.pop(sentinel)
                process.join()
                slots.append(slot)
                _hear(process.exitcode, run, time.monotonic() - began, outcome, told, elsewhere, wanted)
        if asked():
            outcome.stopped = True
            _stop(at_work, tell)
    return outcome


def enter(job: work.Job) -> None:
    """What a run's process begins with."""
    parent = multiprocessing.parent_process()
    work.begin(job, parent.sentinel if parent is not None else None)


def _hear(
    code: int | None, run: PlannedRun, seconds: float, outcome: Outcome, told: Callable[[PlannedRun, str], None],
    elsewhere: deque[PlannedRun], wanted: Sequence[Stage],
) -> None:  # fmt: skip
    """What became of a run whose process has ended."""
    if code == work.BUSY:
        if run not in elsewhere:
            elsewhere.append(run)
            told(run, "another process has it; looked at again later")
        return
    if code == 0 and not state(run, wanted).missing:
        outcome.done.append(run.id)
        told(run, f"done in {_time(seconds)}{_loss(run)}")
        return
    outcome.failed[run.id] = why_failed(run, code)
    told(run, f"failed after {_time(seconds)}: {outcome.failed[run.id]}")


def why_failed(run: PlannedRun, code: int | None) -> str:
    """Why a run is not done, by how its process ended; written down where the process could not."""
    if code == work.STOPPED:  # somebody stopped this one alone
        return "stopped by a signal"
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        hint = ", as the system does where memory is short" if name == "SIGKILL" else ""
        note_failed(run.folder, f"the process was ended by {name}{hint}; see {run.folder / LOG}")
    why = str(read_small(run.folder / OWN / FAILED).get("why", ""))
    return why or f"ended with exit code {code}; see {run.folder / LOG}"


def _loss(run: PlannedRun) -> str:
    from sparsekit.studies.stages import rows

    last = (rows(run.folder) or [{}])[-1]
    return f" (val_loss {last['val_loss']:.4f})" if isinstance(last.get("val_loss"), float) else ""


def _time(seconds: float) -> str:
    return in_words(seconds)


def in_words(seconds: float) -> str:
    """A time to be read: ``40 s``, ``12 min``, ``3.5 h``, ``2.1 days``, ``30 years``."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.1f} h"
    days = seconds / 86400
    return f"{days:.1f} days" if days < 730 else f"{days / 365.25:,.0f} years"


def _stop(at_work: Mapping[Any, tuple[Any, PlannedRun, int, float]], tell: Tell) -> None:
    """Asks the runs at work to save and end, and waits for them."""
    if at_work:
        names = ", ".join(run.id for _, run, _, _ in at_work.values())
        tell(f"stopping: {names} save{'s' if len(at_work) == 1 else ''} first (once more stops at once)")
    for process, *_ in at_work.values():
        process.terminate()
    for process, *_ in at_work.values():
        process.join()


@contextmanager
def _listening() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C or SIGTERM has asked to stop; a second one stops at once."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False  # Python allows handlers there alone
        return
    heard: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, frame: FrameType | None) -> None:
        heard.append(number)
        if len(heard) > 1:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    for number in before:
        signal.signal(number, handle)
    try:
        yield lambda: bool(heard)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def visible_devices(jobs: int) -> list[str]:
    """The GPUs that are there, for several runs at a time; for one nothing, as its spec says where it runs."""
    if jobs == 1:
        return []
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    n = len(list(filter(None, seen.split(",")))) if seen is not None else len(list(GPUS.glob("*")))
    return [f"cuda:{index}" for index in range(n)]


def threads_of(jobs: int) -> int:
    """Of torch in each run on a CPU: ``OMP_NUM_THREADS``, or the cores that this process may use, divided."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    if given.isdecimal() and int(given):
        return int(given)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // jobs)


def say(line: str) -> None:
    """To stderr, beside what a command prints."""
    print(line, file=sys.stderr, flush=True)
