"""What is missing of one run, done in a process of its own: training, probes, evaluations."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsekit.errors import DataError, SparsekitError
from sparsekit.files import sole, written_whole
from sparsekit.studies.stages import LOG, METRICS, OWN, TRAIN, Stage, missing_of, note_done, note_failed, rows

BUSY, STOPPED = 75, 76  # exit codes: another process has this run; a signal asked to stop


@dataclass(frozen=True)
class Job:
    """A run and what is to be done to it; plain values, to be handed to another process or another machine.

    Attributes:
        resolved: the run's spec.
        device: ``cuda:1``, ``cpu``; empty for what the spec says.
        threads: of torch on a CPU, and of its compiler.
        nproc: processes that train it together.
    """

    folder: Path
    resolved: Mapping[str, Any]
    missing: tuple[Stage, ...]
    device: str
    threads: int
    nproc: int


def begin(job: Job, parent: Any = None) -> None:
    """Does a job in this process and ends it: what a study's processes run.

    What is printed goes to the run's ``train.log``. If the parent dies, the run saves and ends.

    Args:
        parent: a sentinel that is ready when it has died.
    """
    os.setpgid(0, 0)  # a Ctrl-C of the terminal's is the parent's, which asks once
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    job.folder.mkdir(parents=True, exist_ok=True)
    with (job.folder / LOG).open("ab", buffering=0) as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    sys.exit(do(job))


def _end_with(parent: Any) -> None:
    from multiprocessing.connection import wait

    wait([parent])
    os.kill(os.getpid(), signal.SIGTERM)


def do(job: Job) -> int:
    """Does a job: 0, BUSY, STOPPED, or 1 with the reason in the run's folder."""
    import torch

    _choose_device(job.device)
    torch.set_num_threads(job.threads)
    if job.resolved["train"].get("compile"):
        torch._inductor.config.compile_threads = min(job.threads, 32)
    try:
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(sole(job.folder / OWN))
                with sole(job.folder):  # nor does anybody train into it
                    pass
            except SparsekitError:
                return BUSY
            with _signals() as heard:
                failures = _stages(job, heard)
                if heard():
                    return STOPPED
            note_failed(job.folder, "; ".join(failures))
            return 1 if failures else 0
    except Exception as error:
        traceback.print_exc()
        note_failed(job.folder, _reason(error))
        return 1


def _choose_device(device: str) -> None:
    """By what CUDA is let see, before it is asked: a device in the spec would be the run's."""
    if not device:
        return
    kind, _, index = device.partition(":")
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if kind == "cuda":
        names = seen.split(",") if seen else []
        index = index or "0"
        os.environ["CUDA_VISIBLE_DEVICES"] = names[int(index)] if int(index) < len(names) else index
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def _reason(error: Exception) -> str:
    """An error in a line."""
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory on the device; lower train.micro_batch_size, or let fewer runs share it (--jobs)"
    first = next(iter(str(error).splitlines()), "")
    return first if isinstance(error, SparsekitError) else f"{type(error).__name__}: {first}"


@contextlib.contextmanager
def _signals() -> Iterator[Any]:
    """Whether one has asked to stop, whoever handled it: training does, saves, and returns as if it were done."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    heard: list[int] = []

    def listen() -> bool:
        with contextlib.suppress(BlockingIOError):
            heard.extend(ours.recv(1024))
        return signal.SIGTERM in heard or signal.SIGINT in heard

    before = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield listen
    finally:
        signal.set_wakeup_fd(before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        ours.close()
        theirs.close()


def _stages(job: Job, heard: Any) -> list[str]:
    """Does what is missing, one after another; the reasons why some could not be done."""
    left = missing_of(job.folder, job.missing)  # another process may have been here since the job was made
    missing = {kind: [stage for stage in left if stage.kind == kind] for kind in (TRAIN, "probe", "eval")}
    for stage in missing[TRAIN]:
        _train(job)
        if heard():
            return []
        last = rows(job.folder)[-1]
        speeds = sorted(row["tokens_per_second"] for row in rows(job.folder) if row.get("tokens_per_second"))
        told = {"step": last["step"], "tokens": last["tokens"], "tokens_per_second": speeds[len(speeds) // 2]}
        note_done(job.folder, stage, job.folder / METRICS, **told)
    failures = []
    for group in _together(missing["probe"]):
        failures += _attempt(job, group, _probe)
    for stage in missing["eval"]:
        failures += _attempt(job, [stage], _evaluate)
    return failures


def _attempt(job: Job, group: Sequence[Stage], do: Any) -> list[str]:
    """Of several that fail together, each by itself, so that one takes no other with it."""
    try:
        do(job, group)
    except Exception as error:
        if len(group) > 1:
            return [line for stage in group for line in _attempt(job, [stage], do)]
        traceback.print_exc()
        return [f"{group[0].name}: {_reason(error)}"]
    return []


def _together(stages: Sequence[Stage]) -> list[list[Stage]]:
    """Probes that look at the same text, which then share a pass."""
    groups: dict[str, list[Stage]] = {}
    for stage in stages:
        groups.setdefault(json.dumps(stage.asked["on"]), []).append(stage)
    return list(groups.values())


def _train(job: Job) -> None:
    if job.nproc > 1:
        _train_together(job)
        return
    from sparsekit.spec.load import validate
    from sparsekit.training.run import train

    train(validate(job.resolved), out=job.folder)


def _train_together(job: Job) -> None:
    """As torchrun does it, by the command line.

    Raises:
        SparsekitError: it ended with an error.
    """
    spec = job.folder / OWN / "spec.json"
    with written_whole(spec) as temporary:
        temporary.write_text(json.dumps(job.resolved), encoding="utf-8")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(job.nproc),
        "-m", "sparsekit.cli", "train", str(spec), "--out", str(job.folder),
    ]  # fmt: skip
    threads = {"OMP_NUM_THREADS": str(max(1, job.threads // job.nproc))}
    process = subprocess.Popen(command, env=os.environ | threads)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: process.send_signal(signal.SIGTERM))
    if code := process.wait():
        log = (job.folder / LOG).read_text(encoding="utf-8", errors="replace") if (job.folder / LOG).exists() else ""
        told = [line.removeprefix("error: ") for line in log.splitlines() if line.startswith("error: ")]
        raise SparsekitError(
            told[-1]
            if told
            else f"training in {job.nproc} processes ended with exit code {code}; see {job.folder / LOG}"
        )


def _probe(job: Job, group: Sequence[Stage]) -> None:
    """Measures, and writes each result with what was asked; of what is not applicable, the reason."""
    from sparsekit.model.targets import Run
    from sparsekit.probes import results
    from sparsekit.probes.base import ProbeResult
    from sparsekit.probes.runner import choose, run_probes, stem_of
    from sparsekit.probes.targets import open_subject, tokens_of
    from sparsekit.training.distributed import usable

    on = group[0].asked["on"]
    subject = open_subject(Run(job.folder), usable(str(job.resolved["train"]["device"])))
    tokens = tokens_of(subject, on["data"], on["sequences"], on["seq_len"], on["seed"], on["batch_size"])
    probes = {stage.of: next(iter(choose([stage.asked["probe"]]).values())) for stage in group}
    refused: dict[str, str] = {}

    def report(name: str, share: float) -> None:
        label, found, reason = name.partition(": not applicable: ")
        if found:
            refused[label] = reason

    found = run_probes(subject.model, probes, tokens, seed=on["seed"], everything=True, report=report)
    for stage in group:
        result = found.get(stage.of, ProbeResult(meta={"not_applicable": refused.get(stage.of, "")}))
        result.meta |= {"target": subject.name, "step": subject.step}
        for text in subject.remarks:
            result.remark(text)
        written = results.save(result, job.folder / "probes", stem_of(stage.of, subject.step), plots=False)
        note_done(job.folder, stage, written[-1])


def _evaluate(job: Job, group: Sequence[Stage]) -> None:
    try:
        from sparsekit.interop.lm_eval import evaluate
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("sparsekit"):
            raise
        raise SparsekitError(f"evaluate needs the package {error.name}: pip install 'sparsekit[eval]'") from None
    from sparsekit.training.distributed import usable

    for stage in group:
        how = stage.asked
        device = str(usable(str(job.resolved["train"]["device"])))
        record = evaluate(
            str(job.folder), [stage.of], include_path=how["include_path"], limit=how["limit"],
            num_fewshot=how["num_fewshot"], device=device,
        )  # fmt: skip
        if "path" not in record:
            raise DataError(f"{stage.name}: no record was written")
        note_done(job.folder, stage, Path(record["path"]))
