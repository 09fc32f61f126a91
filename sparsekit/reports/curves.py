"""Pictures of training: what was logged, over tokens, FLOPs or steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sparsekit.reports.axes import tick
from sparsekit.reports.blocks import Figure, Shown
from sparsekit.reports.costs import Costs
from sparsekit.reports.folder import RunFolder
from sparsekit.reports.plots import Array, Line, Plot, lines, matrix, scale_of

AXES = {"tokens": "tokens", "flops": "training FLOPs", "steps": "steps"}
COLUMNS = 80  # of a heat map over training
SMOOTHED = 100  # a mean is over one of so many parts of the rows
LONG = 40  # rows of a curve whose beginning may be cut off


@dataclass(frozen=True)
class Trained:
    """A run with what a picture of it needs."""

    shown: Shown
    folder: RunFolder
    costs: Costs | None

    def along(self, axis: str, rows: Array) -> Array:
        """Where rows lie on an axis; nan where that is not known."""
        if axis == "steps":
            return np.array([self.folder.rows[row]["step"] for row in rows], dtype=np.float64)
        tokens = np.array([self.folder.rows[row].get("tokens", np.nan) for row in rows], dtype=np.float64)
        if axis == "flops":
            return tokens * (self.costs.training_flops_per_token if self.costs else np.nan)
        return tokens


def logged(
    runs: Sequence[Trained], name: str, title: str, y_label: str, *, smooth: bool = False, log_y: bool = False,
    cut: bool = False, caption: str = "",
) -> Figure | None:  # fmt: skip
    """A number that runs logged, over each axis; None where none did."""
    return over_training(
        runs, f"train-{name}", title, y_label, lambda run: run.folder.column(name), smooth=smooth, log_y=log_y, cut=cut,
        caption=caption,
    )  # fmt: skip


def over_training(
    runs: Sequence[Trained], name: str, title: str, y_label: str, told: Callable[[Trained], tuple[Array, Array]], *,
    smooth: bool = False, log_y: bool = False, cut: bool = False, caption: str = "",
) -> Figure | None:  # fmt: skip
    """A figure of one value of a row, as ``told`` gives rows and values.

    Args:
        smooth: shows means over about a hundredth of the rows.
        cut: ends the y axis where a tenth of training is done, so that the rest can be told apart.
    """
    found = [(run, *told(run)) for run in runs]
    found = [(run, rows, values) for run, rows, values in found if np.isfinite(values).any()]
    if not found:
        return None
    said = [caption]
    span = max(_span(len(values)) for _, _, values in found)
    if smooth and span:
        said.append(f"Mean over up to {2 * span + 1} logged rows.")
        found = [(run, rows, _smooth(values)) for run, rows, values in found]
    y_most = _after_a_tenth([values for _, _, values in found]) if cut else None
    if y_most is not None:
        said.append("The first tenth, where it is higher, is cut off.")
    variants: dict[str, Plot] = {}
    for axis, label in AXES.items():
        drawn = [
            Line(run.shown.label, run.along(axis, rows), values, group=run.shown.group, dash=run.shown.dash)
            for run, rows, values in found
        ]
        drawn = [line for line in drawn if np.isfinite(np.asarray(line.x)).all()]
        if drawn:
            variants[axis] = lines(
                f"{name}-{axis}", title, drawn, x_label=label, y_label=y_label, log_y=log_y, y_most=y_most,
                caption=" ".join(filter(None, said)),
            )  # fmt: skip
    return Figure(variants) if variants else None


def _after_a_tenth(curves: Sequence[Array]) -> float | None:
    """The greatest value past the first tenth, and a little more, where that lies well below the greatest of all."""
    long = [values for values in curves if len(values) >= LONG]
    if not long:
        return None
    rest = np.concatenate([values[len(values) // 10 :] for values in long])
    rest, whole = rest[np.isfinite(rest)], np.concatenate(long)
    if not rest.size or np.nanmax(whole) - rest.min() < 1.5 * (rest.max() - rest.min()):
        return None
    return float(rest.max() + 0.05 * (rest.max() - rest.min()))


def by_layer(runs: Sequence[Trained], name: str, title: str) -> list[Figure]:
    """A heat map of a statistic, layers by tokens, for the first run of each group; all on one scale of colours."""
    found = [(run, *run.folder.by_layer(name)) for run in first_of_groups(runs)]
    found = [(run, rows, values) for run, rows, values in found if values.shape[1] > 1]
    low, high = scale_of([values[values > 0] for _, _, values in found])
    figures = []
    for run, rows, values in found:
        kept = np.unique(np.linspace(0, len(rows) - 1, min(COLUMNS, len(rows))).round().astype(int))
        tokens = run.along("tokens", rows[kept])
        marked = np.unique(np.linspace(0, len(kept) - 1, 5).round().astype(int))
        plot = matrix(
            f"train-{name}-{run.shown.label}", run.shown.label, values[:, kept], x_label="tokens", y_label="layer",
            low=low, high=high, log=True, x_ticks={float(at): tick(_rounded(tokens[at])) for at in marked},
            caption=f"{title}, {run.shown.label}",
        )  # fmt: skip
        figures.append(Figure({"": plot}, run.shown.group))
    return figures


def first_of_groups(runs: Sequence[Trained]) -> list[Trained]:
    """Of runs that share a group, as seeds of one variant do, the first."""
    found: dict[str, Trained] = {}
    for run in runs:
        found.setdefault(run.shown.group, run)
    return list(found.values())


def on_one_scale(title: str, runs: Sequence[Trained]) -> str:
    """The title of heat maps of several runs, which says what they have in common."""
    shown = first_of_groups(runs)
    which = ", the first run of each variant" if len(shown) < len(runs) else ""
    return f"{title}, all on one scale{which}" if len(shown) > 1 else title


def at_the_end(runs: Sequence[Trained], name: str, title: str, y_label: str, caption: str = "") -> Plot | None:
    """A statistic by layer as it was logged last."""
    drawn = []
    for run in runs:
        values = run.folder.by_layer(name)[1]
        if values.size and np.isfinite(values[:, -1]).any():
            drawn.append(
                Line(run.shown.label, range(len(values)), values[:, -1], group=run.shown.group, dash=run.shown.dash)
            )
    return lines(f"end-{name}", title, drawn, x_label="layer", y_label=y_label, caption=caption) if drawn else None


def training_figures(runs: Sequence[Trained]) -> Mapping[str, list[Figure]]:
    """What is shown at once, and what is folded away."""
    load = "1: every expert gets as much as any other."

    def last_layer(run: Trained) -> tuple[Array, Array]:
        rows, values = run.folder.by_layer("variance/resid")
        return rows, values[-1] if len(values) else np.array([])

    def mean_density(run: Trained) -> tuple[Array, Array]:
        rows, values = run.folder.by_layer("density")
        sparse = bool(np.any(values < 1))  # what is dense everywhere is no picture
        return rows, values.mean(0) if sparse else np.full(len(rows), np.nan)

    shown = [
        logged(runs, "loss", "Training loss", "nats a token", smooth=True, cut=True),
        logged(runs, "val_loss", "Validation loss", "nats a token", cut=True),
        over_training(runs, "train-last-variance", "Variance of the last layer's output", "variance", last_layer,
                      log_y=True),
        logged(runs, "load_max", "Load of the busiest expert", "times the mean", caption=load),
        logged(runs, "load_entropy", "Entropy of the experts' load", "of its maximum"),
        over_training(runs, "train-density", "Active hidden units, mean over layers", "share", mean_density),
    ]  # fmt: skip
    folded = [
        logged(runs, "lr", "Learning rate", "learning rate"),
        logged(runs, "grad_norm", "Gradient norm", "norm before clipping", log_y=True, smooth=True),
        logged(runs, "param_norm", "Parameter norm", "norm"),
        logged(runs, "tokens_per_second", "Speed", "tokens a second", smooth=True),
        *(logged(runs, name, name.replace("_", " ").capitalize(), "before its weight") for name in _auxiliary(runs)),
    ]
    return {"shown": [f for f in shown if f], "folded": [f for f in folded if f]}


def _auxiliary(runs: Sequence[Trained]) -> list[str]:
    """Losses beside the objective, as routers name them."""
    names = dict.fromkeys(name for run in runs for row in run.folder.rows[-1:] for name in row)
    return [name for name in names if name.endswith("_loss") and not name.startswith("val")]


def _span(n: int) -> int:
    return n // (2 * SMOOTHED)


def _smooth(values: Array) -> Array:
    """The mean over a hundredth of the rows around each, fewer at the ends, so that they are not bent."""
    span = _span(len(values))
    if not span:
        return values
    known = np.isfinite(values)
    sums = np.cumsum(np.concatenate([[0.0], np.where(known, values, 0.0)]))
    counts = np.cumsum(np.concatenate([[0], known]))
    at = np.arange(len(values))
    reach = np.minimum(span, np.minimum(at, len(values) - 1 - at))
    low, high = at - reach, at + reach + 1
    n = counts[high] - counts[low]
    return np.where(n > 0, (sums[high] - sums[low]) / np.maximum(n, 1), np.nan)


def _rounded(value: float) -> float:
    return float(f"{value:.2g}")
