"""A picture's axes: where ticks stand, how they are written, and margins just wide enough for them.

matplotlib's own ticks take most of the time of a small picture; these are a few lines and words.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from sparsekit.reports.plots import needed

SIZE = (5.2, 3.2)  # inches, of 72 units each
POINT = 11  # the letters' size in those units


def blank() -> tuple[Any, Any]:
    """A figure with axes that draw nothing of themselves.

    Raises:
        SparsekitError: matplotlib is not installed.
    """
    needed("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, facecolor="none")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.1, 0.1, 0.8, 0.8))
    axes.set_axis_off()
    return figure, axes


def draw_axes(
    axes: Any, across: Mapping[float, str], up: Mapping[float, str], names: tuple[str, str], ink: str, top: float,
    right: float = 0.975, grid: bool = True,
) -> None:  # fmt: skip
    """Ticks, their labels and a light grid, with margins just wide enough."""
    from matplotlib.collections import LineCollection

    left, bottom = room(up, 25), 0.165
    axes.set_position((left, bottom, right - left, top - bottom))
    axes.set_xlim(axes.get_xlim())
    axes.set_ylim(axes.get_ylim())
    over_x, over_y = axes.get_xaxis_transform(), axes.get_yaxis_transform()
    unit_x, unit_y = 1 / (72 * SIZE[0] * (right - left)), 1 / (72 * SIZE[1] * (top - bottom))  # a unit's share
    frame = [[(0, 0), (1, 0)], [(0, 0), (0, 1)]]
    marks = [
        ([[(at, 0), (at, -3 * unit_y)] for at in across], over_x),
        ([[(0, at), (-3 * unit_x, at)] for at in up], over_y),
    ]
    rules: list[tuple[Any, Any]] = [
        ([[(at, 0), (at, 1)] for at in across], over_x),
        ([[(0, at), (1, at)] for at in up], over_y),
    ]
    solid: list[tuple[Any, Any]] = [(frame, axes.transAxes), *marks]
    for segments, transform in solid:
        drawn = LineCollection(segments, colors=ink, linewidths=0.8, transform=transform, clip_on=False)
        axes.add_collection(drawn, autolim=False)
    for segments, transform in rules if grid else []:
        drawn = LineCollection(segments, colors=ink, linewidths=0.7, alpha=0.13, transform=transform, zorder=0)
        axes.add_collection(drawn, autolim=False)
    small: dict[str, Any] = {"fontsize": POINT - 1, "color": ink}
    large: dict[str, Any] = {"fontsize": POINT, "color": ink}
    for at, name in across.items():
        axes.text(at, -5 * unit_y, name, transform=over_x, ha="center", va="top", **small)
    for at, name in up.items():
        axes.text(-5 * unit_x, at, name, transform=over_y, ha="right", va="center_baseline", **small)
    axes.text(0.5, -20 * unit_y, names[0], transform=axes.transAxes, ha="center", va="top", **large)
    far = (left * 72 * SIZE[0] - 5) * unit_x
    fits = 1 / unit_y / (0.57 * max(1, len(names[1])))  # the letters' size at which the name is as long as the axis
    upright = {**large, "fontsize": min(POINT, max(7.0, fits))}
    axes.text(-far, 0.5, names[1], transform=axes.transAxes, rotation=90, ha="left", va="center", **upright)


def room(labels: Mapping[float, str], more: float) -> float:
    """The share of the width that ticks' labels take, and some units more."""
    widest = max((len(name) for name in labels.values()), default=2)
    return float(more + 0.62 * (POINT - 1) * max(2, min(widest, 12))) / (72 * SIZE[0])


def ticks(ends: tuple[float, float], log: bool = False, whole: bool = False) -> dict[float, str]:
    """Round places between two ends, and how they are written; whole numbers only where the data have no others."""
    from matplotlib.ticker import MaxNLocator

    low, high = min(ends), max(ends)
    if log:
        begin, end = math.floor(math.log10(low)), math.ceil(math.log10(high))
        within = math.log10(high) - math.log10(low)
        digits = (1,) if within > 2 else (1, 2, 5) if within > 0.7 else tuple(1 + n / 10 for n in range(0, 90, 5))
        step = max(1, round(within / 6))
        places = [d * 10.0**power for power in range(begin, end + 1, step) for d in digits]
        places = [at for at in places if low <= at <= high]
        if len(places) > 1:
            return {at: tick(at) for at in places[:: max(1, len(places) // 6)]}
    steps = [1, 2, 5, 10] if whole else [1, 2, 2.5, 5, 10]
    found = MaxNLocator(6, integer=whole, steps=steps).tick_values(low, high)
    inside = [float(at) for at in found if low <= at <= high]
    integers = [at for at in inside if at.is_integer()]
    return {at: tick(at) for at in (integers if whole and integers else inside)}


def tick(value: float) -> str:
    """A number as briefly as it can be said: 0.001, 2.5k, 3M, 1B, 1e15."""
    size = abs(value)
    if size >= 1e12 or 0 < size < 1e-3:
        return re.sub(r"e([+-])0*", lambda found: "e" + found[1].strip("+"), f"{value:.4g}")
    for above, letter in ((1e9, "B"), (1e6, "M"), (1e4, "k")):
        if size >= above:
            return f"{value / (1e3 if letter == 'k' else above):.6g}{letter}"
    return f"{value:.6g}" if abs(value) > 1e-12 else "0"


def scales(axes: Any) -> dict[str, Any]:
    """Where the axes lie in the picture (left, top, right, bottom, from the top left), and what they run over."""
    width, height = 72 * SIZE[0], 72 * SIZE[1]
    box = axes.get_position()
    told = [box.x0 * width, (1 - box.y1) * height, box.x1 * width, (1 - box.y0) * height]
    scales = (("x", axes.get_xlim(), axes.get_xscale()), ("y", axes.get_ylim(), axes.get_yscale()))
    found: dict[str, Any] = {"box": [round(v, 2) for v in told]}
    return found | {name: [*(float(f"{v:.8g}") for v in ends), int(scale == "log")] for name, ends, scale in scales}
