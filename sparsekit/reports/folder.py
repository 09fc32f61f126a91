"""What a run's folder holds, read without torch: spec, logged rows, probes' results, evaluations, samples.

A folder of probes' results alone, as ``sparsekit probe hf:… --out FOLDER`` leaves it, is read too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from sparsekit.errors import DataError
from sparsekit.reports.plots import Array, numbers

SPEC, METRICS, SAMPLES = "spec.json", "metrics.jsonl", "samples.jsonl"
PROBES, EVALUATIONS = "probes", "eval"


@dataclass(frozen=True)
class Result:
    """What a probe found at a step; nan where it found nothing."""

    scalars: dict[str, float]
    intervals: dict[str, tuple[float, float] | None]
    per_layer: dict[str, Array]
    matrices: dict[str, Array]
    meta: dict[str, Any]


@dataclass(frozen=True)
class RunFolder:
    """A run as its folder tells it.

    Attributes:
        spec: resolved, as plain JSON; empty where there is none.
        rows: what was logged, oldest first.
        probes: by a probe's name, its results by step, oldest first; -1 where it is of no step.
        evaluations: records of lm-eval by file name.
        ended: when the last row was logged, or the last result written.
    """

    path: Path
    spec: dict[str, Any]
    rows: list[dict[str, Any]]
    probes: dict[str, dict[int, Result]]
    evaluations: dict[str, dict[str, Any]]
    samples: list[dict[str, Any]] = field(default_factory=list)
    ended: datetime | None = None

    @property
    def n_layers(self) -> int | None:
        layers = self.spec.get("model", {}).get("n_layers")
        found = [next(reversed(steps.values())).meta.get("layers") for steps in self.probes.values()]
        return layers or next((n for n in found if n), None)

    def column(self, name: str) -> tuple[Array, Array]:
        """Where a number was logged: the indices of those rows, and its values."""
        rows = [index for index, row in enumerate(self.rows) if name in row]
        return np.array(rows, dtype=int), numbers(self.rows[row][name] for row in rows)

    def last(self, name: str) -> float | None:
        """The number as it was logged last."""
        values = self.column(name)[1]
        finite = values[np.isfinite(values)]
        return float(finite[-1]) if finite.size else None

    def by_layer(self, name: str) -> tuple[Array, Array]:
        """The rows that have ``<name>/layer_<l>``, and the values [layers, rows]; nan of a layer that lacks it."""
        layers = [f"{name}/layer_{layer}" for layer in range(self.n_layers or 0)]
        wanted = set(layers)
        rows = [index for index, row in enumerate(self.rows) if not row.keys().isdisjoint(wanted)]
        if not rows:
            return np.array([], dtype=int), np.zeros((0, 0))
        return np.array(rows, dtype=int), np.stack([numbers(self.rows[row].get(key) for row in rows) for key in layers])


def read(path: str | Path) -> RunFolder:
    """Everything a report tells of a run.

    Raises:
        DataError: there is no such folder, it holds nothing to report on, or a file in it is damaged.
    """
    folder = Path(path)
    if not folder.is_dir():
        told = "is no folder" if folder.exists() else "no such folder"
        raise DataError(f"{folder}: {told}; give that of a run, such as runs/tiny, or of a study that has begun")
    spec_path, log = folder / SPEC, folder / METRICS
    probes = _probes(folder / PROBES) or _probes(folder)
    if (folder / "study.json").is_file():
        raise DataError(f"{folder}: is a study, which has a page of its own: sparsekit report {folder}")
    if not spec_path.exists() and not probes:
        raise DataError(f"{folder}: holds neither a run ({SPEC}) nor results of probes; give a run's folder")
    dated = (
        [log] if log.exists() else sorted((folder / PROBES if (folder / PROBES).is_dir() else folder).glob("*.json"))
    )
    return RunFolder(
        path=folder,
        spec=_object(spec_path) if spec_path.exists() else {},
        rows=list(_rows(log)),
        probes=probes,
        evaluations={p.stem: _object(p) for p in sorted((folder / EVALUATIONS).glob("*.json"))},
        samples=list(_rows(folder / SAMPLES)),
        ended=max((datetime.fromtimestamp(p.stat().st_mtime, UTC) for p in dated), default=None),
    )


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of JSON; the last is left out where a kill cut it short."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    for number, line in enumerate(lines, start=1):
        if line.endswith(b"\n"):
            try:
                row = json.loads(line)
                yield {**row, "step": int(row["step"])}
            except (ValueError, TypeError, KeyError):
                raise DataError(f"{path}:{number}: is damaged; mend the line, or remove it") from None


def _object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: is damaged ({error}); mend or remove it") from None
    if not isinstance(found, dict):
        raise DataError(f"{path}: is damaged (no JSON object); mend or remove it")
    return found


def _probes(folder: Path) -> dict[str, dict[int, Result]]:
    found: dict[str, dict[int, Result]] = {}
    for path in sorted(folder.glob("*.json")):
        name, _, step = path.stem.partition("-step-")
        told = _object(path)
        if {"scalars", "per_layer", "matrices", "meta"} <= told.keys():
            found.setdefault(name, {})[int(step) if step.isdecimal() else -1] = _result(path, told)
    return {name: dict(sorted(steps.items())) for name, steps in found.items()}


def _result(path: Path, told: dict[str, Any]) -> Result:
    """As :func:`sparsekit.probes.results.save` wrote it; what was too large for the JSON stands beside it."""
    try:
        matrices = {name: m for name, m in told["matrices"].items() if isinstance(m, list)}
        missing = told["matrices"].keys() - matrices.keys()
        stored: dict[str, Array] = {}
        if missing:
            with np.load(path.with_suffix(".npz"), allow_pickle=False) as arrays:
                stored = {name: arrays[f"matrices/{name}"] for name in missing}
        intervals = {
            k: None if pair is None else (float(pair[0]), float(pair[1])) for k, pair in told["intervals"].items()
        }
        return Result(
            {name: float("nan") if value is None else float(value) for name, value in told["scalars"].items()},
            intervals,
            {name: numbers(values) for name, values in told["per_layer"].items()},
            {name: stored[name] if name in stored else _matrix(matrices[name]) for name in told["matrices"]},
            told["meta"],
        )
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise DataError(f"{path}: is not the result of a probe, or is damaged ({error})") from None


def _matrix(rows: list[Any]) -> Array:
    return np.array([numbers(row) if isinstance(row, list) else row for row in rows], dtype=np.float64)
