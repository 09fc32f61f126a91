"""From a study to its runs: every setting of the axes with every seed, checked and counted before anything runs."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sparsekit.errors import SpecError, did_you_mean
from sparsekit.spec.load import validate
from sparsekit.spec.run import RunSpec
from sparsekit.studies import remembered
from sparsekit.studies.axes import COLUMNS, Axis, Factor, factor_at, factors_of
from sparsekit.studies.count import count
from sparsekit.studies.spec import Study, StudySpec, label

GPUS = Path("/proc/driver/nvidia/gpus")
LONGEST = 120  # characters of a run's name; file systems take 255 bytes


@dataclass(frozen=True)
class PlannedRun:
    """One run of a study.

    Attributes:
        id: its name, by axes and seed.
        place: which value of each factor it has, by index.
        labels: what it is on each axis, by the axis' short name.
        resolved: its spec, every default filled in.
        folder: where it lies; two runs of one spec share it.
        flops_per_token: of training.
        tokens: None where that is known only when the text is read.
    """

    id: str
    place: tuple[int, ...]
    labels: Mapping[str, str]
    seed: int
    resolved: Mapping[str, Any]
    folder: Path
    parameters: int
    active_parameters: int
    flops_per_token: float
    tokens: int | None

    @property
    def spec(self) -> RunSpec:
        """Imports what the spec names, and so torch."""
        return validate(self.resolved)

    @property
    def flops(self) -> float | None:
        return None if self.tokens is None else self.tokens * self.flops_per_token


@dataclass(frozen=True)
class Plan:
    """A study's runs.

    Attributes:
        base: the base's JSON, with ``extends`` and overrides applied.
        runs: every setting with every seed, settings in the order of the axes, seeds fastest.
        probes: by label, every parameter filled in.
        device: the GPU here by name, with its peak for the base's precision where that is known; or nothing.
    """

    study: Study
    base: Mapping[str, Any]
    factors: tuple[Factor, ...]
    runs: tuple[PlannedRun, ...]
    probes: Mapping[str, Mapping[str, Any]]
    device: str = ""
    peak_flops: float | None = None

    @property
    def distinct(self) -> list[PlannedRun]:
        """The runs, of those that share a folder the first."""
        found: dict[Path, PlannedRun] = {}
        for run in self.runs:
            found.setdefault(run.folder, run)
        return list(found.values())

    @property
    def axes(self) -> list[Axis]:
        return [axis for factor in self.factors for axis in factor.axes]

    def factor(self, name: str) -> int:
        """See :func:`sparsekit.studies.axes.factor_at`."""
        return factor_at(self.factors, name)


def expand(study: Study) -> Plan:
    """Every run of a study, validated and counted.

    What was counted once is remembered, so that a study that has not changed is planned without importing torch.

    Raises:
        SpecError: one line for each mistake, with its path in the study, or the setting that has it.
    """
    _demand_known_axes(study.spec)
    device = gpu_name()
    counted = remembered.recall(study, device)
    if counted is None:
        counted = count(study, device)
        remembered.keep(study, device, counted)
    study = replace(study, spec=study.spec.model_copy(update={"axes": counted["axes"]}))
    factors = factors_of(study.spec)
    runs: list[PlannedRun] = []
    folders: dict[str, str] = {}  # one spec, one folder
    for setting in counted["settings"]:
        same = json.dumps({k: v for k, v in setting["resolved"].items() if k != "name"}, sort_keys=True)
        labels = {
            axis.name: axis.points[index].label
            for factor, index in zip(factors, setting["place"], strict=True)
            for axis in factor.axes
        }
        costs = {name: setting[name] for name in ("parameters", "active_parameters", "flops_per_token", "tokens")}
        for seed in study.spec.seeds:
            id = run_id({**labels, "seed": str(seed)})
            folder = study.folder / folders.setdefault(f"{same} {seed}", id)
            resolved = {**setting["resolved"], "name": id, "train": {**setting["resolved"]["train"], "seed": seed}}
            runs.append(PlannedRun(id, tuple(setting["place"]), labels, seed, resolved, folder, **costs))
    _demand_names(runs)
    return Plan(study, counted["base"], factors, tuple(runs), counted["probes"], device, counted["peak_flops"])


def gpu_name() -> str:
    """The first GPU of this machine, asked of its driver without importing torch; nothing where there is none."""
    for path in sorted(GPUS.glob("*/information")):
        for line in path.read_text().splitlines():
            key, _, name = line.partition(":")
            if key == "Model":
                return name.strip()
    return ""


def run_id(labels: Mapping[str, str]) -> str:
    """``n_layers=4,seed=0``, as a folder may be called."""
    whole = ",".join(f"{name}={value}" for name, value in labels.items())
    safe = re.sub(r"[^A-Za-z0-9._=,+-]", "_", whole)
    if safe == whole and len(safe) <= LONGEST:
        return safe
    return f"{safe[:LONGEST]}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}"


def _demand_known_axes(spec: StudySpec) -> None:
    """Refuses a seed as an axis, and claims, figures of axes or values that there are not."""
    factors, problems = factors_of(spec), []
    for key in spec.axes:
        if key in COLUMNS:
            problems.append(f"axes.{key}: is the name of a column of the table; choose another")
    for axis in (axis for factor in factors for axis in factor.axes):
        if any("train.seed" in point.paths for point in axis.points):
            problems.append(f'axes.{axis.key}: seeds are no axis; give them as "seeds": [0, 1, 2]')
    for number, claim in enumerate(spec.claims):
        problems += _unknown(factors, f"claims.{number}.axis", claim.axis, claim.order or [])
        for name, value in claim.where.items():
            problems += _unknown(factors, f"claims.{number}.where", name, [label(value)])
    for number, figure in enumerate(spec.figures):
        if figure.axis is not None:
            problems += _unknown(factors, f"figures.{number}.axis", figure.axis, [])
    if problems:
        raise SpecError(problems)


def _unknown(factors: Sequence[Factor], where: str, axis: str, values: Sequence[str]) -> Iterator[str]:
    try:
        labels = factors[factor_at(factors, axis)].labels
    except KeyError as error:
        yield f"{where}: {error.args[0]}"
        return
    for value in values:
        if value not in labels:
            yield f"{where}: {axis} has no value {value!r}{did_you_mean(value, labels)}; values: {', '.join(labels)}"


def _demand_names(runs: Sequence[PlannedRun]) -> None:
    seen: dict[str, PlannedRun] = {}
    for run in runs:
        if run.id in seen:
            raise SpecError([f"axes: two settings would be called {run.id}; name their values as variants"])
        seen[run.id] = run
