"""Runs several studies in one pool of processes, and packs what is to be brought back from the machine."""

from __future__ import annotations

import math
import multiprocessing
import os
import platform
import shutil
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from benchmarks.reproduction.protocol import SPECS, overrides
from sparsekit.files import write_json, written_whole
from sparsekit.studies import stages, study, work
from sparsekit.studies.conduct import PRELOAD, enter, visible_devices, why_failed
from sparsekit.studies.plan import Plan, PlannedRun, expand
from sparsekit.studies.spec import STUDY, load_study

NOTES = "reproduction.json"  # of a study's folder: minutes, device, commit of each call
GRACE = 15.0  # seconds in which what is stopped may save
# of a run that is packed; one that failed begins anew where it is unpacked, as its weights are not there
KEPT = {
    "done": ("spec.json", "metrics.jsonl", ".study/*.json", "probes/*.json", "probes/*.npz"),
    "failed": (".study/failed.json",),
}


def run(text: Path, out: Path, names: Sequence[str], jobs: int, minutes: float, sets: Sequence[str]) -> bool:
    """Does what is missing of some studies, and packs each when all or the time is at its end; whether a run failed."""
    began, at = time.monotonic(), time.time()
    # probes look at float32 weights: their products on tensor cores, as nothing they tell is finer than that
    os.environ.setdefault("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as many processes as cores work already
    forkserver.set_forkserver_preload(PRELOAD)
    forkserver.ensure_running()  # it imports torch while runs are planned here
    plans = {}
    for name in names:
        unpack(out, name)
        path = SPECS / f"{name}_small.json"
        plans[name] = expand(load_study(path, [*overrides(name, text), *sets], out / name))
        study.prepare(plans[name], plans[name].distinct)
    say(f"{sum(len(plan.distinct) for plan in plans.values())} runs planned in {time.monotonic() - began:.0f} s")
    seconds: dict[str, float] = dict.fromkeys(names, 0.0)
    try:
        conduct(plans, jobs, began + 60 * minutes - GRACE, seconds)
    finally:
        wall, whole = time.monotonic() - began, math.fsum(seconds.values())
        where = machine()
        for name, plan in plans.items():
            if whole:  # of the time in which all shared the GPU, by the time of their processes
                share = wall * seconds[name] / whole
                note(plan, {"began": at, "minutes": share / 60, "jobs": jobs, "together": sorted(names), **where})
            packed = pack(out, plan)
            done = sum(status(plan, run) == "done" for run in plan.distinct)
            size = f"{packed} {packed.stat().st_size / 2**20:.2f} MiB"
            say(f"{name:16}{done:3} of {len(plan.distinct)} runs done, {minutes_of(out / name):5.2f} minutes, {size}")
    return any(status(plan, run) == "failed" for plan in plans.values() for run in plan.distinct)


def conduct(plans: Mapping[str, Plan], jobs: int, until: float, seconds: dict[str, float]) -> None:
    """One pool for all studies, as :func:`sparsekit.studies.conduct.conduct` has one for each.

    Args:
        until: when to stop, by the monotonic clock.
        seconds: to which the time of each study's processes is added, by its name.
    """
    todo, devices = in_order(plans), visible_devices(jobs)
    total, slots = len(todo), list(range(jobs))
    context = multiprocessing.get_context("forkserver")
    at_work: dict[Any, tuple[Any, str, PlannedRun, int, float]] = {}
    try:
        while (todo or at_work) and time.monotonic() < until:
            while todo and slots:
                (name, run), slot = todo.pop(0), slots.pop(0)
                missing = stages.state(run, stages.stages(plans[name])).missing
                device = devices[slot % len(devices)] if devices else ""
                job = work.Job(run.folder, run.resolved, missing, device, 1, 1)
                process = context.Process(target=enter, args=(job,))
                process.start()
                at_work[process.sentinel] = process, name, run, slot, time.monotonic()
            for sentinel in wait(list(at_work), timeout=1.0):
                process, name, run, slot, since = at_work.pop(sentinel)
                process.join()
                slots.append(slot)
                seconds[name] += time.monotonic() - since
                done = process.exitcode == 0 and status(plans[name], run) == "done"
                took = f"{time.monotonic() - since:.0f} s"
                told = f"done in {took}" if done else f"failed after {took}: {why_failed(run, process.exitcode)}"
                say(f"[{total - len(todo) - len(at_work)}/{total}] {name} {run.id}: {told}")
    finally:
        for process, *_ in at_work.values():
            process.terminate()
        last = time.monotonic() + GRACE
        for process, name, _, _, since in at_work.values():
            process.join(max(0.0, last - time.monotonic()))
            if process.is_alive():
                process.kill()
            seconds[name] += time.monotonic() - since


def in_order(plans: Mapping[str, Plan]) -> list[tuple[str, PlannedRun]]:
    """What is missing: of every study the first seed first, so that whole seeds are missing where time is up.

    Of a seed the longest run is first.
    """
    missing = [
        (plan.study.spec.seeds.index(run.seed), -(run.flops or 0), name, run)
        for name, plan in plans.items()
        for run in plan.distinct
        if status(plan, run) != "done"
    ]
    return [(name, run) for *_, name, run in sorted(missing, key=lambda row: row[:2])]


def status(plan: Plan, run: PlannedRun) -> str:
    return stages.state(run, stages.stages(plan)).status


def say(line: str) -> None:
    print(line, flush=True)


def machine() -> dict[str, str]:
    """Where it ran, and which code: a copy of the tree without history is told by the variable COMMIT."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # no git
        found = ""
    return {"device": device, "torch": torch.__version__, "commit": os.environ.get("COMMIT", "") or found}


def note(plan: Plan, told: Mapping[str, Any]) -> None:
    path = plan.study.folder / NOTES
    write_json(path, {"calls": [*stages.read_small(path).get("calls", []), dict(told)]})


def minutes_of(folder: Path) -> float:
    """Of the GPU, as far as a study had it."""
    return math.fsum(call["minutes"] for call in stages.read_small(folder / NOTES).get("calls", []))


def pack(out: Path, plan: Plan) -> Path:
    """``<study>.tar.xz``: what tables and reports are made of, of every run that came to its end."""
    folder = plan.study.folder
    files = [folder / STUDY, folder / NOTES]
    for run in plan.distinct:
        files += sorted(path for pattern in KEPT.get(status(plan, run), ()) for path in run.folder.glob(pattern))
    target = out / f"{folder.name}.tar.xz"
    with written_whole(target) as temporary, tarfile.open(temporary, "w:xz") as archive:
        for path in filter(Path.exists, files):
            archive.add(path, path.relative_to(out))
    return target


def unpack(out: Path, name: str) -> Path | None:
    """A study's folder, out of its archive where it is not there; nothing where there is neither."""
    archive, folder = out / f"{name}.tar.xz", out / name
    if not (folder / STUDY).exists() and archive.exists():
        shutil.rmtree(folder, ignore_errors=True)  # without its study it holds nothing yet
        with tempfile.TemporaryDirectory(dir=out) as temporary, tarfile.open(archive) as packed:
            packed.extractall(temporary, filter="data")
            (Path(temporary) / name).rename(folder)
    return folder if (folder / STUDY).exists() else None
