"""One tidy table of everything a study's runs say: a row for each run, measure and layer.

Only what is a function of the specs stands in it, no times and no paths, in a fixed order and every number in full: the
table of a study that was killed and went on is that of one that was not, byte for byte.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsekit.errors import SparsekitError
from sparsekit.files import written_whole
from sparsekit.studies.plan import Plan, PlannedRun
from sparsekit.studies.spec import MEASURE
from sparsekit.studies.stages import State, read_small, results, rows, stages

TIMES = ("tokens_per_second", "mfu", "data_wait", "memory_")  # in metrics.jsonl, and no function of the spec
LAYER = "/layer_"
NORMAL = 1.959963984540054  # 97.5% of a normal distribution lies below


@dataclass(frozen=True)
class Value:
    """One number: of a layer, or of the whole model where that is None; with its own 95% interval where it has one."""

    measure: str
    layer: int | None
    value: float
    low: float | None = None
    high: float | None = None


Values = Mapping[Path, Sequence[Value]]  # by a run's folder


def collect(plan: Plan, states: Mapping[Path, State]) -> dict[Path, list[Value]]:
    """What every run says, as far as it is trained."""
    wanted = {stage.name for stage in stages(plan)}
    found = {}
    for run in plan.distinct:
        told = states[run.folder]
        usable = told.trained and not told.differs
        found[run.folder] = list(_values(run, wanted, {s.name for s in told.missing})) if usable else []
    return found


def _values(run: PlannedRun, wanted: set[str], missing: set[str]) -> Iterator[Value]:
    yield from _of_training(rows(run.folder)[-1])
    done = {stage.name: (stage, file) for stage, file in results(run.folder)}
    for name in sorted(wanted & done.keys() - missing):
        stage, file = done[name]
        told = read_small(file)
        if stage.kind == "probe":
            yield from _of_probe(stage.of, told)
        elif stage.kind == "eval":
            yield from _of_evaluation(told)


def _of_training(row: Mapping[str, Any]) -> Iterator[Value]:
    """The last row that was logged: validation losses by their own names, all else below ``train/``."""
    for key, value in row.items():
        if key in ("step", "tokens") or key.startswith(TIMES) or not isinstance(value, (int, float)):
            continue
        if key.startswith("val_") or key.endswith(("_loss", "_bits_per_byte")):
            yield Value(key, None, float(value))
            if key.endswith("_loss"):
                yield Value(f"{key.removesuffix('loss')}perplexity", None, math.exp(min(value, 700.0)))
            continue
        name, found, layer = key.partition(LAYER)
        yield Value(f"train/{name}", int(layer) if found else None, float(value))


def _of_probe(label: str, told: Mapping[str, Any]) -> Iterator[Value]:
    for name, value in told.get("scalars", {}).items():
        low, high = told.get("intervals", {}).get(name) or (None, None)
        if value is not None:
            yield Value(f"{label}/{name}", None, value, low, high)
    for name, values in told.get("per_layer", {}).items():
        for layer, value in enumerate(values):
            if value is not None:
                yield Value(f"{label}/{name}", layer, value)


def _of_evaluation(told: Mapping[str, Any]) -> Iterator[Value]:
    """lm-eval's ``acc,none``; the interval is of the normal distribution of its standard error."""
    for task, found in told.get("results", {}).items():
        for key, value in found.items():
            metric, comma, filtered = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            error = found.get(f"{metric}_stderr,{filtered}")
            name = metric if filtered == "none" else f"{metric},{filtered}"
            margin = NORMAL * error if isinstance(error, (int, float)) else None
            bounds = (None, None) if margin is None else (value - margin, value + margin)
            yield Value(f"eval/{task}/{name}", None, value, *bounds)


def header(plan: Plan) -> list[str]:
    axes = [axis.name for axis in plan.axes]
    costs = ["step", "tokens", "parameters", "active_parameters"]
    return ["run", *axes, "seed", "status", *costs, "measure", "layer", "value", "low", "high"]


def table(plan: Plan, values: Values, states: Mapping[Path, State]) -> Iterator[list[Any]]:
    """The rows, in the order of the plan; a run that says nothing has one row without a measure."""
    for run in plan.runs:
        told = states[run.folder]
        status = "missing" if told.status in ("to run", "begun", "differs") else told.status
        place = [run.id, *run.labels.values(), run.seed, status, told.trained.get("step"), told.trained.get("tokens")]
        place += [run.parameters, run.active_parameters]
        if not values[run.folder]:
            yield [*place, *[None] * 5]
        for value in values[run.folder]:
            yield [*place, value.measure, value.layer, value.value, value.low, value.high]


def write(folder: Path, name: str, names: Sequence[str], lines: Sequence[Sequence[Any]]) -> Path:
    """``<name>.csv``: an empty cell for what there is not, numbers as Python writes them in full."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    writer.writerows([["" if cell is None else cell for cell in line] for line in lines])
    path = folder / f"{name}.csv"
    with written_whole(path) as temporary:
        temporary.write_text(text.getvalue(), encoding="utf-8")
    return path


def write_parquet(folder: Path, name: str, names: Sequence[str], lines: Sequence[Sequence[Any]]) -> Path:
    """The same as ``<name>.parquet``, with types: axes are text, as their labels are."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise SparsekitError(f"{name}.parquet: needs pyarrow: pip install 'sparsekit[studies]'") from None
    whole = {"seed", "step", "tokens", "parameters", "active_parameters", "layer"}
    types = {name: pyarrow.int64() if name in whole else pyarrow.string() for name in names}
    types |= {name: pyarrow.float64() for name in ("value", "low", "high")}
    columns = [list(column) for column in zip(*lines, strict=True)] or [[] for _ in names]
    arrays = [pyarrow.array(column, types[name]) for name, column in zip(names, columns, strict=True)]
    path = folder / f"{name}.parquet"
    with written_whole(path) as temporary:
        pyarrow.parquet.write_table(pyarrow.table(arrays, list(names)), temporary)
    return path


ByName = Mapping[str, Mapping[int | None, Value]]


def by_name(values: Sequence[Value]) -> ByName:
    """A run's numbers by measure and layer."""
    found: dict[str, dict[int | None, Value]] = {}
    for value in values:
        found.setdefault(value.measure, {})[value.layer] = value
    return found


def lookup(values: ByName, measure: str) -> Value | None:
    """One number of a run by the name of its measure, ``variance/resid[-1]`` of its last layer."""
    parts = MEASURE.fullmatch(measure)
    assert parts is not None, "specs hold names of measures only"
    found = values.get(parts["name"], {})
    if parts["layer"] is None:
        return found.get(None)
    layer, layers = int(parts["layer"]), [index for index in found if index is not None]
    return found.get(layer + 1 + max(layers) if layers and layer < 0 else layer)


def scalars(values: Values) -> list[str]:
    """The measures of whole models that any run has, in the order in which they are met."""
    return list(dict.fromkeys(v.measure for found in values.values() for v in found if v.layer is None))


def not_applicable(plan: Plan) -> list[str]:
    """A sentence for each probe that could not look at some runs."""
    told: dict[str, list[str]] = {}
    for run in plan.distinct:
        for stage, file in results(run.folder):
            if stage.kind == "probe" and stage.of in plan.probes:
                reason = read_small(file).get("meta", {}).get("not_applicable")
                if reason:
                    told.setdefault(f"{stage.of}: not applicable: {reason}", []).append(run.id)
    return [f"{line} ({named(ids)})" for line, ids in told.items()]


def named(ids: Sequence[str]) -> str:
    """The first of some runs, and how many there are beside it."""
    return ids[0] if len(ids) == 1 else f"{ids[0]} and {len(ids) - 1} more run{'s' * (len(ids) > 2)}"
