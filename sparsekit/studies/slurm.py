"""A study as one SLURM array, a task a run, through submitit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sparsekit.errors import SparsekitError
from sparsekit.studies import work
from sparsekit.studies.conduct import states_of, threads_of
from sparsekit.studies.plan import Plan, PlannedRun

LOGS = "slurm"
OWN_NAMES = {
    "time": "slurm_time",
    "gpus": "slurm_gpus_per_node",
    "cpus": "slurm_cpus_per_task",
    "at_once": "slurm_array_parallelism",
}


@dataclass(frozen=True)
class Task:
    """A run's job on another machine; when its time is over it is queued again, and goes on from its checkpoint."""

    job: work.Job

    def __call__(self) -> str:
        code = work.do(self.job)
        if code == 1:
            raise RuntimeError(f"{self.job.folder}: failed; its .study/failed.json says why")
        return {0: "done", work.BUSY: "another process has it", work.STOPPED: "stopped"}[code]

    def checkpoint(self) -> Any:
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def submit(plan: Plan, runs: Sequence[PlannedRun], options: str) -> list[Any]:
    """Queues what is missing; one task a run.

    Args:
        options: ``partition=a100,time=120,gpus=1,at_once=8``; names that are not ours are sbatch's own.
            ``cluster=local`` runs the tasks here, all at once.

    Raises:
        SparsekitError: an option is not understood, submitit is not installed, or there is no SLURM.
    """
    try:
        import submitit
    except ImportError:
        raise SparsekitError("--slurm needs submitit: pip install 'sparsekit[slurm]'") from None
    given = parsed(options)
    nproc = plan.study.spec.launch.nproc
    settings: dict[str, Any] = {"slurm_gpus_per_node": nproc} if nproc > 1 else {}
    settings |= {OWN_NAMES.get(name, f"slurm_{name}"): value for name, value in given.items() if name != "cluster"}
    cluster = str(given.get("cluster", "slurm"))
    try:
        executor = submitit.AutoExecutor(folder=plan.study.folder / LOGS / "%j", cluster=cluster)
        executor.update_parameters(name=plan.study.name, **settings)
    except (RuntimeError, ValueError, NameError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise SparsekitError(f"--slurm {options}: {reason}") from None
    states = states_of(plan)
    threads = plan.study.spec.launch.threads or int(given.get("cpus", threads_of(1)))
    jobs = [
        work.Job(run.folder.resolve(), run.resolved, states[run.folder].missing, "", threads, nproc)
        for run in runs
        if states[run.folder].missing
    ]
    return list(executor.submit_array([Task(job) for job in jobs])) if jobs else []


def parsed(options: str) -> dict[str, Any]:
    """``name=value,name=value``; whole numbers as such."""
    found: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in options.split(","))):
        name, equals, value = part.partition("=")
        if not equals or not name.isidentifier():
            raise SparsekitError(f"--slurm {options}: expected name=value,name=value, such as partition=a100,time=120")
        found[name] = int(value) if value.isdecimal() else value
    return found
