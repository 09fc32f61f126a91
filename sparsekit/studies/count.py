"""What a study's runs have and cost: every setting laid over the base, validated and counted.

It needs every component that a spec names, and so torch.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sparsekit.errors import SparsekitError, SpecError, did_you_mean
from sparsekit.spec.inline import chosen
from sparsekit.spec.load import dump, laid, read_raw, validate
from sparsekit.spec.model import ModelSpec
from sparsekit.spec.run import RunSpec
from sparsekit.spec.typed import fields_at
from sparsekit.studies.axes import Axis, Point, factors_of
from sparsekit.studies.spec import Study, StudySpec, extends

TOLD = 20  # mistakes, of which a study of a thousand runs can have thousands


def count(study: Study, device: str) -> dict[str, Any]:
    """The base, the axes, the probes and every setting, as plain JSON values that name no other file.

    Args:
        device: the GPU here by name; nothing where there is none.

    Raises:
        SpecError: one line for each mistake.
    """
    base, axes_read = _base(study), _axes(study.spec)
    factors = factors_of(study.spec.model_copy(update={"axes": axes_read}))
    problems: dict[str, list[str]] = {}
    settings: list[dict[str, Any]] = []
    costs: dict[str, dict[str, Any]] = {}
    in_base: list[str] | None = None
    for place in itertools.product(*(range(len(factor)) for factor in factors)):
        points = [axis.points[i] for factor, i in zip(factors, place, strict=True) for axis in factor.axes]
        axes = [axis for factor in factors for axis in factor.axes]
        name = ",".join(f"{axis.name}={point.label}" for axis, point in zip(axes, points, strict=True))
        try:
            raw = _laid(base, axes, points)
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
    peak = _peak(device, settings[0]["resolved"]["train"]["precision"])
    probes = _probes(study.spec)
    return {"base": base, "axes": axes_read, "settings": settings, "probes": probes, "peak_flops": peak}


def _base(study: Study) -> dict[str, Any]:
    try:
        return read_raw(study.spec.base, study.base_overrides)
    except SpecError as error:
        raise SpecError([f"base.{line}" if not line.startswith("--set") else line for line in error.problems]) from None


def _axes(spec: StudySpec) -> dict[str, Any]:
    """The axes, with what is in every file that a variant extends.

    Raises:
        SpecError: a file cannot be read.
    """
    axes: dict[str, Any] = {}
    problems = []
    for key, values in spec.axes.items():
        if isinstance(values, list):
            axes[key] = values
            continue
        axes[key] = {}
        for name, paths in values.items():
            found: dict[str, Any] = {}
            for path, value in sorted(paths.items(), key=lambda item: item[0] != "extends"):
                try:
                    read = _read(path, value)
                except SpecError as error:
                    place = f"axes.{_place(key, name, path)}"
                    above = place.removesuffix(path)
                    problems += [f"{above if line.startswith(path) else f'{place}: '}{line}" for line in error.problems]
                    continue
                found |= {at: laid(found, at, over)[at] if at in found else over for at, over in read.items()}
            axes[key][name] = found
    if problems:
        raise SpecError(problems)
    return axes


def _read(path: str, value: Any) -> dict[str, Any]:
    """What stands at which paths where a value does at one: itself, with the files that it extends."""
    if path == "extends":  # a whole run's file, or a model's
        whole = read_raw({"model": {}, "extends": value})
        if whole.keys() & ModelSpec.model_fields.keys():
            whole = {"model": {key: item for key, item in whole.items() if key != "model"}}
        return {key: item for key, item in whole.items() if item != {}}
    if not extends(value):
        return {path: value}
    parts = path.split(".")
    nested: Any = value
    for part in reversed(parts):
        nested = {part: nested}
    found: Any = read_raw({"model": {}, **nested})
    for part in parts:
        found = found[part]
    return {path: found}


def _mistakes(raw: Mapping[str, Any]) -> list[str]:
    try:
        validate({**raw, "name": "run"})
    except SpecError as error:
        return error.problems
    return []


def _laid(raw: Mapping[str, Any], axes: Sequence[Axis], points: Sequence[Point]) -> dict[str, Any]:
    """The base with one setting laid over it.

    Raises:
        SpecError: a path leads to no field of what then stands there.
    """
    whole, problems = dict(raw), []
    for axis, point in zip(axes, points, strict=True):
        for path, value in point.paths.items():
            try:
                whole = laid(whole, path, value)
            except IndexError as error:
                problems.append(f"axes.{_place(axis.key, point.label, path)}: {error}")
    if problems:
        raise SpecError(problems)
    for axis, point in zip(axes, points, strict=True):
        for path in point.paths:
            parts = path.split(".")
            for depth, part in enumerate(parts):
                known = fields_at(RunSpec, parts[:depth], whole)
                if known and part not in known:
                    told = did_you_mean(part, known) or f"; fields: {', '.join(known)}"
                    problems.append(f"axes.{_place(axis.key, point.label, path)}: unknown field {part!r}{told}")
                    break
    if problems:
        raise SpecError(problems)
    return whole


def _place(key: str, label: str, path: str) -> str:
    """Where in a study's axes a path stands."""
    return key if path == key else f"{key}.{label}.{path}"


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
