"""Pictures as data: lines and heat maps, which a page shows with hover and toggles, and which are saved as SVG and PNG.

Nothing is drawn before it is asked for; :mod:`sparsekit.reports.drawing` draws, with matplotlib.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from sparsekit.errors import SparsekitError

Array = np.ndarray[Any, Any]
Numbers = Sequence[float] | Sequence[float | None] | Array

MOST_POINTS = 400  # of a line that is drawn
MOST_TOGETHER = 6400  # of all lines of a plot, as long as each keeps a quarter of those
# Okabe and Ito's colours, of a lightness that stands out from white and from black
DISTINCT = ("#1a80bb", "#d55e00", "#009e73", "#c06597", "#b07d00", "#7f6bd1", "#7a7a7a")
SCALE = ("#5b7be0", "#9a6bd0", "#c4609f", "#d8662f")  # in order, and as well seen on both
DASHES = ("solid", "dashed", "dotted", "dashdot")


@dataclass(frozen=True)
class Line:
    """One line of a plot.

    Attributes:
        x, y: points; where y is nan or None the line is broken.
        low, high: an interval around each y.
        group: what a reader switches on and off, and what has a colour: a run, or a variant of several; the label
            where it is empty.
        marks: single points (x, y) of the same colour.
        dash: solid, dashed, dotted or dashdot.
    """

    label: str
    x: Numbers
    y: Numbers
    low: Numbers | None = None
    high: Numbers | None = None
    group: str = ""
    marks: Sequence[tuple[float, float]] = ()
    dash: str = "solid"


@dataclass(frozen=True)
class LinesPicture:
    lines: tuple[Line, ...]
    x_label: str
    y_label: str
    log_x: bool
    log_y: bool
    ticks: Mapping[float, str] | None
    order: tuple[str, ...]
    y_most: float | None = None


@dataclass(frozen=True)
class MatrixPicture:
    """Row 0 is at the top; ``low`` and ``high`` are where the colours begin and end."""

    values: Array
    x_label: str
    y_label: str
    low: float
    high: float
    log: bool
    x_ticks: Mapping[float, str] | None
    y_ticks: Mapping[float, str] | None


@dataclass(frozen=True)
class Plot:
    """A picture with its words; ``name`` is that of its files, and unique in a page."""

    name: str
    title: str
    caption: str
    picture: LinesPicture | MatrixPicture

    def svg(self, palette: Mapping[str, str] | None = None) -> str:
        """The picture as an ``<svg>`` to stand in a page, whose colour its text and axes take.

        Args:
            palette: colours by group; those not in it get others.
        """
        return self.drawn(palette)[0]

    def drawn(self, palette: Mapping[str, str] | None = None) -> tuple[str, dict[str, Any]]:
        """The ``<svg>``, and what a script needs to tell the values under a pointer."""
        from sparsekit.reports.drawing import inline

        return inline(self, palette or {})

    def save(self, folder: Path, palette: Mapping[str, str] | None = None) -> list[Path]:
        """Writes ``<name>.svg`` and ``<name>.png`` with title and legend, and says where."""
        from sparsekit.reports.drawing import save

        return save(self, folder, palette or {})

    @property
    def groups(self) -> list[str]:
        """The groups of its lines, each once."""
        return groups_of(self.picture.lines) if isinstance(self.picture, LinesPicture) else []


def lines(
    name: str,
    title: str,
    lines: Iterable[Line],
    *,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    log_y: bool = False,
    ticks: Mapping[float, str] | None = None,
    order: Sequence[str] = (),
    y_most: float | None = None,
    caption: str = "",
) -> Plot:
    """A plot of lines, thinned to what can be seen of them.

    Args:
        ticks: the x axis' ticks by place, where its numbers mean something of their own.
        y_most: where the y axis ends, if what lies above is to be cut off; the caption should say so.
        order: groups along an ordered axis, such as depth: they get a scale of colours in place of distinct ones.
    """
    named = [replace(line, group=line.group or line.label) for line in lines]
    most = min(MOST_POINTS, max(MOST_TOGETHER // max(1, len(named)), MOST_POINTS // 4))
    thin = tuple(thinned(line, most) for line in named)
    picture = LinesPicture(thin, x_label, y_label, log_x, log_y, ticks, tuple(order), y_most)
    return Plot(slug(name), title, caption, picture)


def matrix(
    name: str,
    title: str,
    values: Any,
    *,
    x_label: str,
    y_label: str,
    low: float | None = None,
    high: float | None = None,
    log: bool = False,
    x_ticks: Mapping[float, str] | None = None,
    y_ticks: Mapping[float, str] | None = None,
    caption: str = "",
) -> Plot:
    """A heat map of values [rows, columns], row 0 at the top; nan is left blank.

    Args:
        low, high: the scale of the colours, to be shared by maps that are compared; by default the values' own.
        log: colours by the logarithm; what is not positive is left blank.
        x_ticks, y_ticks: ticks by the number of the column or row, where it means something else.
    """
    values_RC = np.asarray(values, dtype=np.float64)
    if log:
        values_RC = np.where(values_RC > 0, values_RC, np.nan)
    own_low, own_high = scale_of([values_RC])
    low, high = own_low if low is None else low, own_high if high is None else high
    return Plot(
        slug(name), title, caption, MatrixPicture(values_RC, x_label, y_label, low, high, log, x_ticks, y_ticks)
    )


def scale_of(matrices: Iterable[Array]) -> tuple[float, float]:
    """The least and greatest finite value of several matrices; (0, 1) where there is none."""
    finite = [m[np.isfinite(m)] for m in matrices]
    together = np.concatenate([f for f in finite if f.size] or [np.array([0.0, 1.0])])
    return float(together.min()), float(together.max())


def thinned(line: Line, most: int = MOST_POINTS) -> Line:
    """A line of at most ``most`` points that looks the same: of each of most/2 stretches the least and greatest y.

    The first and the last point stay. A line that is short enough stays as it is.
    """
    x, y = numbers(line.x), numbers(line.y)
    if len(x) != len(y):
        raise ValueError(f"line {line.label!r}: {len(x)} x for {len(y)} y")
    kept = np.arange(len(y)) if len(y) <= most else _extremes(y, max(1, (most - 2) // 2))
    low = None if line.low is None else numbers(line.low)[kept].tolist()
    high = None if line.high is None else numbers(line.high)[kept].tolist()
    return replace(line, x=x[kept].tolist(), y=y[kept].tolist(), low=low, high=high)


def _extremes(y: Array, stretches: int) -> Array:
    """Indices of the first and last y, and of the least and greatest of each stretch; of one without any, its first."""
    width = -(-len(y) // stretches)
    padded = np.full(stretches * width, np.nan)
    padded[: len(y)] = y
    rows = padded.reshape(stretches, width)
    begins = np.arange(stretches) * width
    least = begins + np.where(np.isfinite(rows), rows, np.inf).argmin(1)
    greatest = begins + np.where(np.isfinite(rows), rows, -np.inf).argmax(1)
    found = np.unique(np.concatenate([[0, len(y) - 1], least, greatest]))
    return found[found < len(y)]


def palette_of(groups: Sequence[str], order: Sequence[str] = ()) -> dict[str, str]:
    """A colour for each group: distinct ones, or along an ``order`` of three or more a scale from cold to warm.

    More groups than there are distinct colours share them, told apart by dashes (:func:`dash_of`).
    """
    ordered = [group for group in order if group in groups]
    ordered = ordered if len(ordered) > 2 else []
    others = [group for group in groups if group not in ordered]
    found = {group: DISTINCT[place % len(DISTINCT)] for place, group in enumerate(others)}
    found |= {group: _on_scale(place / max(1, len(ordered) - 1)) for place, group in enumerate(ordered)}
    return {group: found[group] for group in groups}


def _on_scale(place: float) -> str:
    """The colour at a place from 0 to 1 of :data:`SCALE`."""
    at = place * (len(SCALE) - 1)
    index = min(int(at), len(SCALE) - 2)
    parts = [[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in SCALE[index : index + 2]]
    mixed = [round(low + (high - low) * (at - index)) for low, high in zip(*parts, strict=True)]
    return "#{:02x}{:02x}{:02x}".format(*mixed)


def needed(*packages: str) -> None:
    """Says which extra installs what is missing.

    Raises:
        SparsekitError: one of the packages is not installed.
    """
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise SparsekitError(f"report needs the package {package}: pip install 'sparsekit[report]'")


def numbers(values: Iterable[Any]) -> Array:
    """Floats, where None is nan."""
    if isinstance(values, np.ndarray):
        return values.astype(np.float64, copy=False)
    return np.array([np.nan if value is None else float(value) for value in values], dtype=np.float64)


def groups_of(lines: Iterable[Line]) -> list[str]:
    return list(dict.fromkeys(line.group for line in lines))


def slug(name: str) -> str:
    """A name that is a file's and an HTML id's too."""
    return re.sub(r"[^A-Za-z0-9_.]+", "-", name).strip("-.") or "plot"
