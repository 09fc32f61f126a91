"""What varies in a study: axes with their values, and which of them go together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparsekit.errors import SpecError, did_you_mean
from sparsekit.studies.spec import StudySpec, label

COLUMNS = (
    "run", "seed", "status", "step", "tokens", "parameters", "active_parameters", "measure", "layer", "value", "low",
    "high",
)  # fmt: skip


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


def factors_of(spec: StudySpec) -> tuple[Factor, ...]:
    """The axes, those that are zipped as one factor at the place of the first of them.

    Raises:
        SpecError: ``zip`` names what is no axis, or axes of different lengths.
    """
    names = short_names(list(spec.axes))
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


def factor_at(factors: Sequence[Factor], name: str) -> int:
    """The index of the factor of an axis, by its key or its short name.

    Raises:
        KeyError: there is none.
    """
    for index, factor in enumerate(factors):
        if name == factor.name or any(name in (axis.key, axis.name) for axis in factor.axes):
            return index
    axes = [axis for factor in factors for axis in factor.axes]
    names = [name for axis in axes for name in dict.fromkeys((axis.key, axis.name))]
    raise KeyError(f"no axis {name!r}{did_you_mean(name, names)}; axes: {', '.join(axis.key for axis in axes)}")


def _points(key: str, values: list[Any] | dict[str, dict[str, Any]]) -> tuple[Point, ...]:
    if isinstance(values, dict):
        return tuple(Point(name, name, paths) for name, paths in values.items())
    return tuple(Point(label(value), value, {key: value}) for value in values)


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """The last part of each path, or as many as it takes to tell them apart, from each other and from columns."""
    names = {}
    for key in keys:
        parts = key.split(".")
        tails = (".".join(parts[-n:]) for n in range(1, len(parts) + 1))
        others = [other for other in keys if other != key]
        free = (t for t in tails if t not in COLUMNS and not any(o == t or o.endswith(f".{t}") for o in others))
        names[key] = next(free, key)
    return names
