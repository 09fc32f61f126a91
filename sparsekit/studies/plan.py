"""From a study to its runs: every setting of the axes with every seed, checked and counted before anything runs."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsekit.errors import SparsekitError, SpecError, did_you_mean
from sparsekit.spec.inline import chosen
from sparsekit.spec.load import dump, laid, read_raw, validate
from sparsekit.spec.run import RunSpec
from sparsekit.spec.typed import fields_at
from sparsekit.studies import remembered
from sparsekit.studies.spec import Study, StudySpec, from_folder, label

COLUMNS = (
    "run", "seed", "status", "step", "tokens", "parameters", "active_parameters", "measure", "layer", "value", "low",
    "high",
)  # fmt: skip
GPUS = Path("/proc/driver/nvidia/gpus")
LONGEST = 120  # characters of a run's name; file systems take 255 bytes
TOLD = 20  # mistakes, of which a study of a thousand runs can have thousands


@dataclass(frozen=True)
class Point:
    """One value of an axis: its label, and what stands at which paths of the run's spec."""

    label: str
    value: Any
    paths: Mapping[str, Any]


@dataclass(frozen=True)
class Axis:
    """What varies: its key in the study, a short name, and its values in their order."""

    key: str
    name: str
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Factor:
    """Axes that go together, most often one; factors are crossed."""

    axes: tuple[Axis, ...]

    @property
    def name(self) -> str:
        return "+".join(axis.name for axis in self.axes)

    @property
    def labels(self) -> list[str]:
        return [self.label(index) for index in range(len(self))]

    @property
    def numbers(self) -> list[float] | None:
        """The values of its first axis, where all are numbers."""
        values = [point.value for point in self.axes[0].points]
        plain = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
        return [float(value) for value in values] if plain else None

    def label(self, index: int) -> str:
        return "+".join(axis.points[index].label for axis in self.axes)

    def __len__(self) -> int:
        return len(self.axes[0].points)


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
        """The index of the factor of an axis, by its key or its short name.

        Raises:
            UnknownNameError: there is none.
        """
        for index, factor in enumerate(self.factors):
            if name == factor.name or any(name in (axis.key, axis.name) for axis in factor.axes):
                return index
        names = [name for axis in self.axes for name in dict.fromkeys((axis.key, axis.name))]
        raise KeyError(f"no axis {name!r}{did_you_mean(name, names)}; axes: {', '.join(a.key for a in self.axes)}")


def expand(study: Study) -> Plan:
    """Every run of a study, validated and counted.

    What was counted once is remembered, so that a study that has not changed is planned without importing torch.

    Raises:
        SpecError: one line for each mistake, with its path in the study, or the setting that has it.
    """
    factors = factors_of(study.spec)
    _demand_known_axes(study.spec, factors)
    counted = remembered.recall(study, gpu_name())
    if counted is None:
        counted = _count(study, factors)
        remembered.keep(study, gpu_name(), counted)
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
    return Plan(study, counted["base"], factors, tuple(runs), counted["probes"], gpu_name(), counted["peak_flops"])


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


def factors_of(spec: StudySpec) -> tuple[Factor, ...]:
    """The axes, those that are zipped as one factor at the place of the first of them.

    Raises:
        SpecError: ``zip`` names what is no axis, or axes of different lengths.
    """
    names = _short_names(list(spec.axes))
    axes = {key: Axis(key, names[key], _points(key, values)) for key, values in spec.axes.items()}
    problems, together = [], {}
    for number, group in enumerate(spec.zip):
        for key in group:
            if key not in axes:
                problems.append(f"zip.{number}: no axis {key!r}{did_you_mean(key, axes)}")
            elif key in together:
                problems.append(f"zip.{number}: {key} is zipped already")
            together[key] = number
        lengths = {key: len(axes[key].points) for key in group if key in axes}
        if len(set(lengths.values())) > 1:
            told = ", ".join(f"{key} {length}" for key, length in lengths.items())
            problems.append(f"zip.{number}: axes that go together have as many values as each other, not {told}")
    if problems:
        raise SpecError(problems)
    groups: dict[Any, list[Axis]] = {}
    for key, axis in axes.items():
        groups.setdefault(together.get(key, key), []).append(axis)
    return tuple(Factor(tuple(group)) for group in groups.values())


def _points(key: str, values: list[Any] | dict[str, dict[str, Any]]) -> tuple[Point, ...]:
    if isinstance(values, dict):
        return tuple(Point(name, name, paths) for name, paths in values.items())
    return tuple(Point(label(value), value, {key: value}) for value in values)


def _short_names(keys: Sequence[str]) -> dict[str, str]:
    """The last part of each path, or as many as it takes to tell them apart, from each other and from columns."""
    names = {}
    for key in keys:
        parts = key.split(".")
        tails = (".".join(parts[-n:]) for n in range(1, len(parts) + 1))
        others = [other for other in keys if other != key]
        free = (t for t in tails if t not in COLUMNS and not any(o == t or o.endswith(f".{t}") for o in others))
        names[key] = next(free, key)
    return names


def _demand_known_axes(spec: StudySpec, factors: Sequence[Factor]) -> None:
    """Refuses a seed as an axis, and claims, figures of axes or values that there are not."""
    problems = []
    for key in spec.axes:
        if key in COLUMNS:
            problems.append(f"axes.{key}: is the name of a column of the table; choose another")
    for axis in (axis for factor in factors for axis in factor.axes):
        if any("train.seed" in point.paths for point in axis.points):
            problems.append(f'axes.{axis.key}: seeds are no axis; give them as "seeds": [0, 1, 2]')
    known = Plan(None, {}, tuple(factors), (), {})  # type: ignore[arg-type]
    for number, claim in enumerate(spec.claims):
        problems += _unknown(known, f"claims.{number}.axis", claim.axis, claim.order or [])
        for name, value in claim.where.items():
            problems += _unknown(known, f"claims.{number}.where", name, [label(value)])
    for number, figure in enumerate(spec.figures):
        if figure.axis is not None:
            problems += _unknown(known, f"figures.{number}.axis", figure.axis, [])
    if problems:
        raise SpecError(problems)


def _unknown(plan: Plan, where: str, axis: str, values: Sequence[str]) -> Iterator[str]:
    try:
        labels = plan.factors[plan.factor(axis)].labels
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


# --- what is counted: needs every component that a spec names, and so torch


def _count(study: Study, factors: Sequence[Factor]) -> dict[str, Any]:
    """The base, the probes and every setting, as plain JSON values.

    Raises:
        SpecError: one line for each mistake.
    """
    base = _base(study)
    problems: dict[str, list[str]] = {}
    settings: list[dict[str, Any]] = []
    costs: dict[str, dict[str, Any]] = {}
    in_base: list[str] | None = None
    for place in itertools.product(*(range(len(factor)) for factor in factors)):
        points = [axis.points[i] for factor, i in zip(factors, place, strict=True) for axis in factor.axes]
        axes = [axis for factor in factors for axis in factor.axes]
        name = ",".join(f"{axis.name}={point.label}" for axis, point in zip(axes, points, strict=True))
        try:
            raw = _laid(base, axes, points, study.path.resolve().parent)
            spec = validate({**raw, "name": "run"})
            key = json.dumps([dump(spec.model), spec.seq_len, dump(spec.parallel)])
            costs[key] = costs[key] if key in costs else _costs(spec)
            _demand_divisible(spec, study.spec.launch.nproc)
        except SpecError as error:
            in_base = _mistakes(base) if in_base is None else in_base
            for line in error.problems:
                of_base, of_axis = line in in_base, line.startswith("axes.")
                told = line if of_axis else f"base.{line}" if of_base else line
                problems.setdefault(told, []).append("" if of_axis or of_base else name)
            continue
        settings.append({"place": list(place), "resolved": dump(spec), **costs[key], "tokens": _tokens(spec)})
    lines = [*_probe_mistakes(study.spec), *(_with_setting(line, names) for line, names in problems.items())]
    if lines:
        more = [f"… and {len(lines) - TOLD} more mistakes"] if len(lines) > TOLD else []
        raise SpecError(lines[:TOLD] + more)
    peak = _peak(gpu_name(), settings[0]["resolved"]["train"]["precision"])
    return {"base": base, "settings": settings, "probes": _probes(study.spec), "peak_flops": peak}


def _base(study: Study) -> dict[str, Any]:
    try:
        return read_raw(study.spec.base, study.base_overrides)
    except SpecError as error:
        raise SpecError([f"base.{line}" if not line.startswith("--set") else line for line in error.problems]) from None


def _mistakes(raw: Mapping[str, Any]) -> list[str]:
    try:
        validate({**raw, "name": "run"})
    except SpecError as error:
        return error.problems
    return []


def _laid(raw: Mapping[str, Any], axes: Sequence[Axis], points: Sequence[Point], folder: Path) -> dict[str, Any]:
    """The base with one setting laid over it.

    Raises:
        SpecError: a path leads to no field of what then stands there.
    """
    whole, problems = dict(raw), []
    for axis, point in zip(axes, points, strict=True):
        for path, value in point.paths.items():
            try:
                whole = laid(whole, path, _read(path, value, folder))
            except IndexError as error:
                problems.append(f"axes.{_place(axis, path, point)}: {error}")
    if problems:
        raise SpecError(problems)
    for axis, point in zip(axes, points, strict=True):
        for path in point.paths:
            parts = path.split(".")
            for depth, part in enumerate(parts):
                known = fields_at(RunSpec, parts[:depth], whole)
                if known and part not in known:
                    told = did_you_mean(part, known) or f"; fields: {', '.join(known)}"
                    problems.append(f"axes.{_place(axis, path, point)}: unknown field {part!r}{told}")
                    break
    if problems:
        raise SpecError(problems)
    return whole


def _read(path: str, value: Any, folder: Path) -> Any:
    """A value of an axis; where it ``extends`` a file, with that."""
    if '"extends"' not in json.dumps(value):
        return value
    nested: Any = from_folder(value, folder)
    parts = path.split(".")
    for part in reversed(parts):
        nested = {part: nested}
    found: Any = read_raw({"model": {}, **nested})
    for part in parts:
        found = found[part]
    return found


def _place(axis: Axis, path: str, point: Point) -> str:
    """Where in a study's axes a path stands."""
    return axis.key if path == axis.key else f"{axis.key}.{point.label}.{path}"


def _costs(spec: RunSpec) -> dict[str, Any]:
    """What a model has and takes; built on the meta device, where its parts check what only they know of each other."""
    from sparsekit.model.accounting import parameters_of_a_process
    from sparsekit.model.build import build_model, demand_causal

    model = build_model(spec.model, device="meta")
    demand_causal(model)
    parameters_of_a_process(model, spec.parallel)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "active_parameters": model.active_parameters(),
        "flops_per_token": 3 * model.flops_per_token(spec.seq_len),
    }


def _demand_divisible(spec: RunSpec, nproc: int) -> None:
    """Refuses, as training would, what so many processes cannot share.

    Raises:
        SpecError: the layout or the batch cannot be divided.
    """
    if nproc == 1:
        return
    from sparsekit.training.parallel import check_sizes
    from sparsekit.training.schedules import BatchRamp

    check_sizes(spec.parallel, nproc)
    BatchRamp(spec.train.batch_ramp, spec.global_batch_tokens, spec.micro_batch_tokens * nproc // spec.parallel.tensor)


def _peak(name: str, precision: str) -> float | None:
    import torch

    from sparsekit.training.hardware import peak_by_name

    return peak_by_name(name, torch.float32 if precision == "fp32" else torch.bfloat16) if name else None


def _tokens(spec: RunSpec) -> int | None:
    from sparsekit.model.accounting import training_tokens

    return training_tokens(spec)


def _with_setting(line: str, names: Sequence[str]) -> str:
    """A mistake and the settings that have it."""
    if not names[0]:
        return line
    more = f" (and {len(names) - 1} more setting{'s' * (len(names) > 2)})" if len(names) > 1 else ""
    return f"{names[0]}{more}: {line}"


def _probes(spec: StudySpec) -> dict[str, dict[str, Any]]:
    """By label: the second of a name is called name-2."""
    found: dict[str, dict[str, Any]] = {}
    for given in spec.probes:
        choice = chosen("probe", given)
        number = 1 + sum(other["type"] == choice.type for other in found.values())
        found[choice.type if number == 1 else f"{choice.type}-{number}"] = choice.dump()
    return found


def _probe_mistakes(spec: StudySpec) -> Iterator[str]:
    for number, given in enumerate(spec.probes):
        try:
            chosen("probe", given)
        except SparsekitError as error:
            for line in str(error).splitlines():
                told = line.removeprefix("probe: ")
                yield (
                    f"probes.{number}{told.removeprefix('probe')}"
                    if told.startswith("probe.")
                    else f"probes.{number}: {told}"
                )
