"""A study's figures: measures against an axis, along training, and over the layers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sparsekit.reports.plots import Line, Plot, lines
from sparsekit.studies.compare import Comparer
from sparsekit.studies.plan import Plan, PlannedRun
from sparsekit.studies.spec import MEASURE, FigureSpec
from sparsekit.studies.stages import read_small, rows
from sparsekit.studies.table import LAYER, Values

MOST_LINES = 8  # more than which no reader tells apart: then only the first axis is told, the others averaged
WIDE = 8.0  # an axis whose last value is so many times its first has a logarithmic scale
SPREAD = "The band reaches from the lowest seed to the highest."


@dataclass(frozen=True)
class Variant:
    """Runs that one line stands for: of one setting, or of one value of the first axis."""

    label: str
    runs: tuple[PlannedRun, ...]


def draw(plan: Plan, values: Values) -> tuple[list[Plot], list[str]]:
    """The figures that the study asks for, and a remark for each that has nothing to show."""
    comparer = Comparer(plan, values)
    plots: list[Plot] = []
    remarks: list[str] = []
    for number, figure in enumerate(plan.study.spec.figures):
        kinds = {"by_axis": _by_axis, "along_training": _along_training, "per_layer": _per_layer}
        found = list(kinds[figure.type](plan, values, comparer, figure, f"{number + 1}"))
        plots += [found_plot for found_plot in found if isinstance(found_plot, Plot)]
        remarks += [f"figures.{number}: {told}" for told in found if isinstance(told, str)]
    return plots, remarks


def variants(plan: Plan) -> list[Variant]:
    """What is told apart in a figure that has no axis of its own."""
    found: dict[str, list[PlannedRun]] = {}
    n_settings = math.prod(len(factor) for factor in plan.factors)
    for run in plan.runs:
        first = next(((f, i) for f, i in zip(plan.factors, run.place, strict=True) if len(f) > 1), None)
        one = {} if first is None else {first[0].name: first[0].label(first[1])}
        told = run.labels if n_settings <= MOST_LINES else one
        # as the report calls a variant, so that they share a colour
        found.setdefault(", ".join(f"{name} {value}" for name, value in told.items()) or "all seeds", []).append(run)
    return [Variant(name, tuple(runs)) for name, runs in found.items()]


def _order(plan: Plan) -> list[str]:
    """The variants' labels where they stand along one axis of numbers, else nothing."""
    many = [factor for factor in plan.factors if len(factor) > 1]
    return [v.label for v in variants(plan)] if len(many) == 1 and many[0].numbers is not None else []


def _by_axis(plan: Plan, values: Values, comparer: Comparer, figure: FigureSpec, number: str) -> Iterator[Plot | str]:
    """Each measure against the axis: the mean, the seed-paired interval against the first value, each seed a dot."""
    if not plan.factors:
        yield "the study has no axes; nothing to draw against"
        return
    factor = plan.factor(figure.axis) if figure.axis is not None else 0
    axis = plan.factors[factor]
    x = axis.numbers or [float(i) for i in range(len(axis))]
    log_x = axis.numbers is not None and _is_wide(x)
    ticks = dict(zip(x, axis.labels, strict=True))
    settings = _settings(plan, comparer, factor)
    for measure in figure.measures:
        drawn = [_line(plan, comparer, measure, factor, x, name, where) for name, where in settings]
        told = [line for line in drawn if len(line.x)]
        if not told:
            yield f"no run has the measure {measure}"
            continue
        caption = (
            f"The mean over seeds; the band is the 95% interval of the seed-paired difference against "
            f"{axis.name} {axis.label(0)}; each dot is a run."
        )
        name = f"{number}-{measure}-by-{axis.name}"
        yield lines(
            name, f"{measure} by {axis.name}", told, x_label=axis.name, y_label=measure, log_x=log_x, ticks=ticks,
            caption=caption,
        )  # fmt: skip
        yield from _beside_published(plan, comparer, measure, factor, x, name)


def _settings(plan: Plan, comparer: Comparer, factor: int) -> list[tuple[str, Mapping[int, int]]]:
    """The settings of the other axes, by label, each to be a line; one for their mean where they are too many."""
    free = [i for i, f in enumerate(plan.factors) if i != factor and len(f) > 1]
    others = comparer.others(factor)
    if not free or len(others) > MOST_LINES:
        return [("mean" if not free else "mean over the other axes", {})]
    found: list[tuple[str, Mapping[int, int]]] = []
    for other in others:
        told = ", ".join(f"{plan.factors[i].name} {plan.factors[i].label(other[i])}" for i in free)
        found.append((told, {i: other[i] for i in free}))
    return found


def _line(
    plan: Plan, comparer: Comparer, measure: str, factor: int, x: Sequence[float], name: str, where: Mapping[int, int]
) -> Line:  # fmt: skip
    at, seeds = comparer.at(measure), plan.study.spec.seeds
    others = comparer.others(factor, where)
    points: list[tuple[float, float, float, float]] = []
    marks: list[tuple[float, float]] = []
    for index in range(len(x)):
        keys = [((*o[:factor], index, *o[factor + 1 :]), s) for o in others for s in seeds]
        found = [at[key] for key in keys if key in at]
        if not found:
            continue
        mean = math.fsum(found) / len(found)
        marks += [(x[index], value) for value in found]
        pair = comparer.compare(measure, factor, 0, index, where) if index else None
        if pair is not None and pair.low is not None and pair.high is not None:
            points.append((x[index], mean, mean - pair.difference + pair.low, mean - pair.difference + pair.high))
        else:
            points.append((x[index], mean, mean, mean))
    points.sort()
    xs, ys, low, high = ([p[i] for p in points] for i in range(4))
    return Line(name, xs, ys, low, high, group=name, marks=marks)


def _beside_published(
    plan: Plan, comparer: Comparer, measure: str, factor: int, x: Sequence[float], name: str
) -> Iterator[Plot]:  # fmt: skip
    """Both as parts of their value at the first setting of each: a small model does not reach a large one's values."""
    axis = plan.factors[factor]
    for claim in plan.study.spec.claims:
        if claim.measure != measure or plan.factor(claim.axis) != factor or len(claim.published) < 2:
            continue
        ours = comparer.judge(claim).found
        places = dict(zip(axis.labels, x, strict=True))
        if axis.numbers is not None:
            places |= {text: float(text) for text in claim.published if _is_number(text)}
        drawn: list[Line] = []
        for label, found in (("here", ours), ("published", claim.published)):
            kept = [(places[key], value) for key, value in found.items() if key in places]
            if len(kept) > 1 and kept[0][1] != 0:
                pairs = sorted((place, value / kept[0][1]) for place, value in kept)
                dash = "dashed" if drawn else "solid"
                drawn.append(Line(label, [p for p, _ in pairs], [v for _, v in pairs], dash=dash))
        if len(drawn) == 2:
            caption = f"Each divided by its own first value. Published: {claim.source or 'see the claim'}."
            ticks = {places[key]: key for key in (*axis.labels, *claim.published) if key in places}
            log_x = axis.numbers is not None and _is_wide(list(ticks))
            yield lines(
                f"{name}-published", f"{measure}, here and published", drawn, x_label=axis.name,
                y_label=f"{measure}, relative", log_x=log_x, ticks=ticks, caption=caption,
            )  # fmt: skip
        return


def _is_wide(x: Sequence[float]) -> bool:
    return min(x) > 0 and max(x) / min(x) >= WIDE


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _along_training(
    plan: Plan, values: Values, comparer: Comparer, figure: FigureSpec, number: str
) -> Iterator[Plot | str]:
    """A metric by tokens: of each variant the mean over its runs, and their spread."""
    assert figure.metric is not None, "a spec that has none is refused"
    drawn = []
    for variant in variants(plan):
        tracks = [_track(run.folder, figure.metric, figure.layer) for run in variant.runs if run.folder.exists()]
        drawn.append(_mean_line(variant.label, [track for track in tracks if track]))
    told = [line for line in drawn if len(line.x)]
    place = "" if figure.layer is None else f", layer {figure.layer}"
    if told:
        name = f"{number}-{figure.metric}{place}-along-training"
        title = f"{figure.metric}{place} along training"
        yield lines(
            name, title, told, x_label="tokens", y_label=figure.metric, order=_order(plan),
            caption=f"The mean over seeds. {SPREAD}",
        )  # fmt: skip
    else:
        mend = "give its layer, set base.train.statistics, or a probe with 'every' in base.probes"
        yield f"no run logged {figure.metric}{place}; {mend}"


def _track(folder: Path, metric: str, layer: int | None) -> dict[float, float]:
    """A metric by tokens: from metrics.jsonl, else from what a probe wrote while training."""
    logged = rows(folder)
    found = {row["tokens"]: _pick(row, metric, layer) for row in logged}
    if all(value is None for value in found.values()) and logged:
        probe, _, name = metric.partition("/")
        each = logged[-1]["tokens"] / logged[-1]["step"]
        for path in sorted((folder / "probes").glob(f"{probe}-step-*.json")):
            told = read_small(path)
            step = int(path.stem.rpartition("-")[2])
            layers = told.get("per_layer", {}).get(name, [])
            if layer is None:
                found[step * each] = told.get("scalars", {}).get(name)
            elif -len(layers) <= layer < len(layers):
                found[step * each] = layers[layer]
    return {float(tokens): float(value) for tokens, value in found.items() if value is not None}


def _pick(row: Mapping[str, float], metric: str, layer: int | None) -> float | None:
    if layer is None:
        return row.get(metric)
    n = sum(key.startswith(metric + LAYER) for key in row)
    return row.get(f"{metric}{LAYER}{layer % n}") if -n <= layer < n else None


def _mean_line(label: str, tracks: Sequence[Mapping[float, float]]) -> Line:
    """Where all have a point."""
    x = sorted(set.intersection(*(set(track) for track in tracks))) if tracks else []
    columns = [[track[at] for track in tracks] for at in x]
    y = [math.fsum(column) / len(column) for column in columns]
    if len(tracks) < 2:
        return Line(label, x, y, group=label)
    return Line(label, x, y, list(map(min, columns)), list(map(max, columns)), group=label)


def _per_layer(plan: Plan, values: Values, comparer: Comparer, figure: FigureSpec, number: str) -> Iterator[Plot | str]:
    """A measure over the layers: of each variant the mean over its runs, and their spread."""
    for measure in figure.measures:
        parts = MEASURE.fullmatch(measure)
        name = parts["name"] if parts is not None else measure
        drawn = []
        for variant in variants(plan):
            tracks = [
                {float(v.layer): v.value for v in values[run.folder] if v.measure == name and v.layer is not None}
                for run in variant.runs
            ]
            drawn.append(_mean_line(variant.label, [track for track in tracks if track]))
        told = [line for line in drawn if len(line.x)]
        if told:
            yield lines(
                f"{number}-{name}-per-layer", f"{name} of each layer", told, x_label="layer", y_label=name,
                order=_order(plan), caption=f"The mean over seeds. {SPREAD}",
            )  # fmt: skip
        else:
            yield f"no run has the measure {name} by layers"
