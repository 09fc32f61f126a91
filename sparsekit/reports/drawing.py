"""Draws plots with matplotlib: as SVG that takes its colour and font from the page around it, and as files.

What is drawn for a page has matplotlib's ids, styles and digits taken out that the page would have twice over or has no
use for; the same picture is always the same bytes.
"""

from __future__ import annotations

import base64
import functools
import html
import io
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from sparsekit.files import written_whole
from sparsekit.reports.axes import POINT, blank, draw_axes, room, scales, ticks
from sparsekit.reports.plots import Array, LinesPicture, MatrixPicture, Plot, numbers, palette_of
from sparsekit.reports.svg import INK, for_page, own_ids

PAPER_INK = "#222222"
TOLD_CELLS = 6000  # of a map whose values are told under the pointer
ENDLESS = (math.inf, -math.inf)
DIGITS = 5  # of the numbers that hovering shows


def inline(plot: Plot, palette: Mapping[str, str]) -> tuple[str, dict[str, Any]]:
    """The ``<svg>`` for a page, and the values for its script: the axes' box and scales, and each line or row."""
    picture = plot.picture
    if isinstance(picture, MatrixPicture):
        frame, told = _map_frame(_Frame.of(picture))
        svg = frame.replace("<!--cells-->", _cells(picture, told["box"]))
        told = {**told, "shape": list(picture.values.shape)}
        if picture.values.size <= TOLD_CELLS:
            told["rows"] = [_short(row, 4) for row in picture.values]
        if picture.x_ticks:
            told["across"] = {f"{at:g}": name for at, name in picture.x_ticks.items()}
    else:
        figure, axes = _lines_figure(picture, palette, INK)
        svg = for_page(_svg_of(figure), [line.group for line in picture.lines])
        told = {"kind": "lines", **scales(axes), **_points(picture)}
    head = f'<svg class="plot" role="img" aria-label="{html.escape(_headline(plot))}"'
    return own_ids(svg, plot.name).replace("<svg", head, 1), told


def save(plot: Plot, folder: Path, palette: Mapping[str, str]) -> list[Path]:
    """Writes ``<name>.svg`` and ``<name>.png``."""
    picture = plot.picture
    if isinstance(picture, MatrixPicture):
        figure, axes = _map_figure(_Frame.of(picture), PAPER_INK, titled=True)
        axes.images[0].set_data(_positions(picture))
    else:
        figure, axes = _lines_figure(picture, palette, PAPER_INK, titled=True)
    axes.set_title(_headline(plot), fontsize=POINT, color=PAPER_INK, wrap=True)
    figure.patch.set_facecolor("white")
    written = []
    for kind in ("svg", "png"):
        written.append(folder / f"{plot.name}.{kind}")
        with written_whole(written[-1]) as temporary, _settings():
            figure.savefig(temporary, format=kind, dpi=160, metadata={"Date": None} if kind == "svg" else None)
    return written


def _headline(plot: Plot) -> str:
    """What a picture is called where it stands alone; in a page a map's title may be no more than its run."""
    return plot.caption or plot.title if isinstance(plot.picture, MatrixPicture) else plot.title


# ---------------------------------------------------------------------------------------------------------- lines


def _lines_figure(picture: LinesPicture, palette: Mapping[str, str], ink: str, titled: bool = False) -> tuple[Any, Any]:
    groups = list(dict.fromkeys(line.group for line in picture.lines))
    colours = {**palette_of(groups, picture.order), **palette}
    figure, axes = blank()
    axes.set_xscale("log" if picture.log_x else "linear")
    axes.set_yscale("log" if picture.log_y else "linear")
    few = sum(len(line.y) for line in picture.lines) <= 240
    for number, line in enumerate(picture.lines):
        colour, gid = colours[line.group], f"series-{number}"
        style: dict[str, Any] = {"color": colour, "linewidth": 1.6 if len(picture.lines) <= 8 else 1.2, "gid": gid}
        alone = len(line.y) == 1
        if few or alone:
            style |= {"marker": "o", "markersize": 5 if alone else 2.6}
        x, y = _drawable(line.x, picture.log_x), _drawable(line.y, picture.log_y)
        if line.low is not None and line.high is not None:
            low, high = _drawable(line.low, picture.log_y), _drawable(line.high, picture.log_y)
            axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0, gid=gid)
        axes.plot(x, y, linestyle=line.dash, label=line.label, **style)
        if line.marks:
            axes.plot(*zip(*line.marks, strict=True), "o", color=colour, markersize=3.5, alpha=0.6, gid=gid)
    if picture.y_most is not None:
        axes.set_ylim(top=picture.y_most)
    across = dict(picture.ticks or {})
    if not across:
        x = np.concatenate([numbers(line.x) for line in picture.lines] or [np.array([0.0])])
        across = ticks(axes.get_xlim(), picture.log_x, whole=bool((x == x.round())[np.isfinite(x)].all()))
    up = ticks(axes.get_ylim(), picture.log_y)
    draw_axes(axes, across, up, (picture.x_label, picture.y_label), ink, 0.88 if titled else 0.965)
    if titled and len(picture.lines) > 1:
        axes.legend(fontsize=7, framealpha=0.7, ncols=1 + (len(picture.lines) > 8))
    return figure, axes


def _points(picture: LinesPicture) -> dict[str, Any]:
    """Lines as numbers: what each shows, and by ``at`` which of the ``xs`` it stands over, as several share them."""
    shared: dict[tuple[Any, ...], int] = {}
    at, series = [], []
    for line in picture.lines:
        x = tuple(_short(line.x))
        at.append(shared.setdefault(x, len(shared)))
        told: dict[str, Any] = {"label": line.label, "group": line.group, "y": _short(line.y)}
        if line.low is not None and line.high is not None:
            told |= {"low": _short(line.low), "high": _short(line.high)}
        series.append(told)
    ticks = {f"{place:g}": name for place, name in (picture.ticks or {}).items()}
    return {
        "xs": list(shared), "at": at, "series": series, "names": [picture.x_label, picture.y_label], "ticks": ticks,
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------- heat maps


class _Frame(tuple[Any, ...]):
    """What heat maps of one scale have in common, to be drawn once: all but the cells."""

    @classmethod
    def of(cls, picture: MatrixPicture) -> _Frame:
        ticks = (tuple((t or {}).items()) for t in (picture.x_ticks, picture.y_ticks))
        scale = (picture.low, picture.high, picture.log)
        return cls((picture.values.shape, *scale, picture.x_label, picture.y_label, *ticks))


@functools.lru_cache(maxsize=64)
def _map_frame(frame: _Frame) -> tuple[str, dict[str, Any]]:
    figure, axes = _map_figure(frame, INK)
    svg = for_page(_svg_of(figure), ())
    names = {"kind": "map", "names": [frame[4], frame[5]], "down": {f"{at:g}": name for at, name in frame[7]}}
    cells, rest = re.split(r"<image [^>]*>", svg, maxsplit=1)
    return f"{cells}<!--cells-->{rest}", {**scales(axes), **names}


def _map_figure(frame: _Frame, ink: str, titled: bool = False) -> tuple[Any, Any]:
    shape, low, high, log, x_label, y_label, x_ticks, y_ticks = frame
    figure, axes = blank()
    cmap, (begin, end) = _colours(low, high, log), _ends(low, high, log)
    axes.imshow(np.zeros(shape), cmap=cmap, vmin=0, vmax=1, interpolation="none", aspect="auto")
    scale = (
        {math.log10(at): told for at, told in ticks((10**begin, 10**end), log).items()} if log else ticks((begin, end))
    )
    across = dict(x_ticks) or ticks((-0.5, shape[1] - 0.5), whole=True)
    down = dict(y_ticks) or ticks((-0.5, shape[0] - 0.5), whole=True)
    right = 1 - room(scale, 6)
    draw_axes(axes, across, down, (x_label, y_label), ink, 0.88 if titled else 0.965, right - 0.05, grid=False)
    box = axes.get_position()
    bar = figure.add_axes((right - 0.03, box.y0, 0.03, box.height))
    bar.set_axis_off()
    bar.imshow(
        np.linspace(1, 0, 128)[:, None], cmap=cmap, aspect="auto", extent=(0, 1, begin, end), interpolation="none"
    )
    for at, name in scale.items():
        bar.text(1.25, at, name, fontsize=POINT - 1, color=ink, va="center")
    return figure, axes


def _cells(picture: MatrixPicture, box: list[float]) -> str:
    """The cells as a picture of one pixel each, enlarged where it is shown."""
    from PIL import Image

    at = _positions(picture)
    cmap = _colours(picture.low, picture.high, picture.log)
    places = np.where(np.isfinite(at), 1 + np.clip(np.nan_to_num(at) * 254, 0, 254).round(), 0).astype(np.uint8)
    table = np.concatenate([[[255, 255, 255]], cmap(np.linspace(0, 1, 255), bytes=True)[:, :3]])
    image = Image.frombytes("P", places.shape[::-1], places.tobytes())
    image.putpalette(table.astype(np.uint8).tobytes())
    stream = io.BytesIO()
    blank = {} if np.isfinite(at).all() else {"transparency": 0}
    image.save(stream, format="png", optimize=True, **blank)
    left, top, right, bottom = box
    told = base64.b64encode(stream.getvalue()).decode()
    return (
        f'<image class="cells" x="{left}" y="{top}" width="{right - left:.2f}" height="{bottom - top:.2f}" '
        f'preserveAspectRatio="none" style="image-rendering: pixelated" href="data:image/png;base64,{told}"/>'
    )


def _positions(picture: MatrixPicture) -> Array:
    """Where on the scale from 0 to 1 each value lies."""
    begin, end = _ends(picture.low, picture.high, picture.log)
    values = np.log10(picture.values) if picture.log else picture.values
    return (values - begin) / (end - begin)


def _ends(low: float, high: float, log: bool) -> tuple[float, float]:
    """Of the scale: symmetric about 0 where values have both signs, never empty."""
    if log:
        high = high if high > 0 else 1.0  # of a map without positive values, which is blank
        low, high = math.log10(low if low > 0 else high / 10), math.log10(high)
    elif _signed(low, high):
        low, high = -max(-low, high), max(-low, high)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _signed(low: float, high: float) -> bool:
    """Whether 0 lies well inside: what dips below it by rounding is not signed."""
    return low < 0 < high and min(-low, high) > 0.02 * max(-low, high)


def _colours(low: float, high: float, log: bool) -> Any:
    from matplotlib import colormaps

    return colormaps["RdBu_r" if not log and _signed(low, high) else "viridis"]


# ------------------------------------------------------------------------------------------------------- figures


@contextmanager
def _settings() -> Iterator[None]:
    """Text as text; neither random ids nor a random order."""
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "sparsekit", "path.simplify": False}):
        yield


def _svg_of(figure: Any) -> str:
    stream = io.StringIO()
    with _settings():
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return stream.getvalue()


def _drawable(y: Any, log: bool) -> Array:
    values = numbers(y)
    return np.where(values > 0, values, np.nan) if log else values


def _short(values: Any, digits: int = DIGITS) -> list[float | int | None]:
    """Numbers with few digits, integers where they are; None for what JSON cannot say."""
    exact = numbers(values)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        behind = digits - 1 - np.floor(np.log10(np.abs(exact)))  # the point, of the last digit that stays
        behind = np.where(np.isfinite(behind), np.clip(behind, -300, 300), 0)
        up, down = 10.0 ** np.maximum(behind, 0), 10.0 ** np.maximum(-behind, 0)
        rounded = np.round(exact * up / down) / up * down
    return [
        None if v != v or v in ENDLESS else int(v) if v.is_integer() and abs(v) < 1e15 else v for v in rounded.tolist()
    ]
