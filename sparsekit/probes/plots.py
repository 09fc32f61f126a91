"""Pictures of a probe's result: a line over layers for each table, a heat map for each matrix, as PNG and SVG."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

from sparsekit.files import written_whole
from sparsekit.probes.base import Array, ProbeResult
from sparsekit.probes.site_means import SITES

FORMATS = ("png", "svg")
MOST_PANELS = 24


def draw(result: ProbeResult, folder: Path, stem: str) -> list[Path]:
    """Writes ``<stem>.png`` and ``.svg``; nothing where there is nothing to draw or matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        result.remark("no pictures: matplotlib is not installed (pip install 'sparsekit[plots]')")
        return []
    lines = {name: values for name, values in result.per_layer.items() if np.isfinite(_floats(values)).any()}
    maps = {name: m for name, m in result.matrices.items() if m.ndim == 2 and min(m.shape) > 0}
    panels = [*_together(lines, stem.partition("-")[0]).items(), *maps.items()][:MOST_PANELS]
    if not panels:
        return []
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.4 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    for place, (name, values) in enumerate(panels):
        axes = figure.add_subplot(rows, columns, place + 1)
        axes.set_title(name, fontsize=10)
        if isinstance(values, dict):
            _lines(axes, values)
        else:
            _map(figure, axes, values, name in result.meta.get("axes", {}), result.meta.get("axes", {}).get(name))
    figure.suptitle(_title(result, stem), fontsize=11)
    written = []
    for kind in FORMATS:
        written.append(folder / f"{stem}.{kind}")
        with written_whole(written[-1]) as temporary:
            # neither date nor random ids: two runs with the same seed write the same files
            metadata = {"Date": None} if kind == "svg" else None
            import matplotlib

            with matplotlib.rc_context({"svg.hashsalt": "sparsekit"}):
                figure.savefig(temporary, format=kind, dpi=120, metadata=metadata)
    return written


def _together(lines: dict[str, Array], probe: str) -> dict[str, Any]:
    """The tables by what they tell, the probe itself where they do not say; those of the three sites in one picture."""
    panels: dict[str, Any] = {}
    for name, values in lines.items():
        site = next((site for site in SITES if name == site or name.startswith(f"{site}_")), "")
        told = name.removeprefix(site).removeprefix("_") if site else name
        panels.setdefault(told or probe, {})[site or name] = values
    return panels


def _lines(axes: Any, lines: dict[str, Array]) -> None:
    for name, values_L in lines.items():
        axes.plot(np.arange(len(values_L)), _floats(values_L), marker="o", markersize=3, linewidth=1.2, label=name)
    axes.set_xlabel("layer")
    axes.grid(alpha=0.3)
    axes.xaxis.get_major_locator().set_params(integer=True)
    if len(lines) > 1:
        axes.legend(fontsize=7)


def _map(figure: Any, axes: Any, matrix: Array, named: bool, names: Any) -> None:
    image = axes.imshow(_floats(matrix), cmap="viridis", interpolation="nearest", aspect="auto")
    figure.colorbar(image, ax=axes, shrink=0.85)
    down, across = names if named else ("layer", "layer")
    axes.set_ylabel(down)
    axes.set_xlabel(across)
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(integer=True)


def _title(result: ProbeResult, stem: str) -> str:
    meta = result.meta
    told = [str(meta.get("probe", stem)), str(meta.get("target", ""))]
    if "sequences" in meta:
        told.append(f"{meta['sequences']} x {meta['seq_len']} tokens, {meta.get('dtype', '')}")
    return "   ".join(part for part in told if part)


def _floats(values: Array) -> Array:
    return np.asarray(values, dtype=np.float64)
