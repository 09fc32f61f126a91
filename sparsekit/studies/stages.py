"""What of a run is done and what is missing, told by small files alone: neither torch nor a checkpoint is looked at.

A run is done in stages: it is trained, then each probe looks at it, then each task evaluates it. A stage is done if the
run's ``.study/done.json`` says that it was done as it is asked for now, and its file is there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsekit.errors import SparsekitError
from sparsekit.files import write_json
from sparsekit.spec.load import SAVED
from sparsekit.spec.merge import differences
from sparsekit.studies.plan import Plan, PlannedRun

OWN = ".study"  # of a run's folder; hidden, as training refuses a folder that holds what it does not know
DONE, FAILED, LOG = "done.json", "failed.json", "train.log"
METRICS, TRAIN = "metrics.jsonl", "train"
# what changes no number of a run: where it runs, what it tells and what it keeps
FREE = (
    "name", "packages", "train.device", "train.callbacks", "train.keep", "train.checkpoint_every", "train.peak_flops",
)  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """One thing to be done to a run.

    Attributes:
        name: ``train``, ``probe <label>`` or ``eval <task>``.
        asked: what exactly, in plain JSON values.
    """

    name: str
    asked: Mapping[str, Any]

    @property
    def kind(self) -> str:
        return self.name.partition(" ")[0]

    @property
    def of(self) -> str:
        return self.name.partition(" ")[2]


@dataclass(frozen=True)
class State:
    """How far a run is.

    Attributes:
        missing: the stages to do.
        failed: why it ended, if it did so at its last attempt.
        differs: what another run in its folder has that is not planned, or nothing.
        begun: there is something in its folder.
        trained: what was kept of its training: ``step``, ``tokens``, ``tokens_per_second``.
    """

    missing: tuple[Stage, ...]
    failed: str
    differs: str
    begun: bool
    trained: Mapping[str, Any]

    @property
    def status(self) -> str:
        if self.differs:
            return "differs"
        if not self.missing:
            return "done"
        if self.failed:
            return "failed"
        return "begun" if self.begun else "to run"


def stages(plan: Plan) -> list[Stage]:
    """What is to be done to each run, in this order."""
    spec = plan.study.spec
    found = [Stage(TRAIN, {})]
    on = spec.probe_on.model_dump(mode="json")
    found += [Stage(f"probe {name}", {"probe": probe, "on": on}) for name, probe in plan.probes.items()]
    if spec.evaluate is not None:
        how = spec.evaluate.model_dump(mode="json", exclude={"tasks"})
        found += [Stage(f"eval {task}", how) for task in spec.evaluate.tasks]
    return found


def state(run: PlannedRun, wanted: Sequence[Stage]) -> State:
    """How far a run is with the stages that are wanted."""
    done = read_small(run.folder / OWN / DONE)
    saved = read_small(run.folder / SAVED)
    failed = str(read_small(run.folder / OWN / FAILED).get("why", ""))
    missing = tuple(missing_of(run.folder, wanted, done))
    return State(missing, failed, _difference(run, saved), bool(saved), done.get(TRAIN, {}))


def missing_of(folder: Path, wanted: Sequence[Stage], done: Mapping[str, Any] | None = None) -> list[Stage]:
    """Of the stages that are wanted those that are not done."""
    done = read_small(folder / OWN / DONE) if done is None else done
    return [stage for stage in wanted if not _is_done(folder, stage, done)]


def _is_done(folder: Path, stage: Stage, done: Mapping[str, Any]) -> bool:
    kept = done.get(stage.name)
    return kept is not None and kept.get("asked", {}) == stage.asked and (folder / kept["file"]).exists()


def _difference(run: PlannedRun, saved: Mapping[str, Any]) -> str:
    """In words, where the spec in a run's folder is not the planned one."""
    if not saved or saved == run.resolved:
        return ""
    found = {
        path: pair
        for path, pair in differences(dict(saved), dict(run.resolved)).items()
        if not any(path == free or path.startswith(f"{free}.") for free in FREE)
    }
    told = (f"{path}: {json.dumps(there)} there, {json.dumps(here)} planned" for path, (there, here) in found.items())
    return ", ".join(told)


def demand_own_runs(runs: list[PlannedRun], states: Mapping[Path, State]) -> None:
    """Refuses to go on in folders that hold other runs.

    Raises:
        SparsekitError: one does.
    """
    for run in runs:
        told = states[run.folder].differs
        if told:
            others = sum(bool(state.differs) for state in states.values()) - 1
            more = f" (and {others} more)" if others else ""
            raise SparsekitError(f"{run.folder}: holds a run of another spec ({told}){more}; give another --out")


def note_done(folder: Path, stage: Stage, file: Path, **kept: Any) -> None:
    """Writes down that a stage was done, and what came of it into which file."""
    done = read_small(folder / OWN / DONE)
    done[stage.name] = {"asked": dict(stage.asked), "file": str(file.relative_to(folder)), **kept}
    write_json(folder / OWN / DONE, done)


def note_failed(folder: Path, why: str) -> None:
    """Writes down why a run ended; nothing, that it did not."""
    if why:
        write_json(folder / OWN / FAILED, {"why": why})
    else:
        (folder / OWN / FAILED).unlink(missing_ok=True)


def results(folder: Path) -> Iterator[tuple[Stage, Path]]:
    """The stages that were done in a run's folder, and the file of each."""
    for name, kept in read_small(folder / OWN / DONE).items():
        yield Stage(name, kept.get("asked", {})), folder / kept["file"]


def rows(folder: Path) -> list[dict[str, Any]]:
    """What a run logged, row by row; the last one is left out where a kill cut it short."""
    path = folder / METRICS
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    try:
        return [json.loads(line) for line in lines if line.endswith(b"\n")]
    except ValueError as error:
        raise SparsekitError(f"{path}: is damaged ({error}); mend or remove that line") from None


def read_small(path: Path) -> dict[str, Any]:
    """A JSON object of ours; of no file, or a damaged one, nothing: what it told is then done again."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
