"""``report``: one self-contained HTML file of a run, of several side by side, or of a study."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsekit.errors import SparsekitError
from sparsekit.files import writable, written_whole
from sparsekit.reports.blocks import Block, Figure, Figures, Fold, Section, Shown
from sparsekit.reports.costs import Costs, costs_of
from sparsekit.reports.curves import Trained
from sparsekit.reports.folder import RunFolder, read
from sparsekit.reports.page import sections
from sparsekit.reports.plots import DASHES, DISTINCT, Line, LinesPicture, Plot, needed, palette_of
from sparsekit.reports.study_sections import groups_of_study, study_sections

if TYPE_CHECKING:
    from sparsekit.reports.study_summary import StudySummary

REPORT = "report.html"
LONG_PATH = 16  # letters


def report(
    runs: Any, *, out: str | Path | None = None, study: StudySummary | None = None, figures: bool = False
) -> Path:
    """Writes the report of a run's folder, or of several in one page, and says where.

    Args:
        runs: a run, its folder, or several.
        out: the file; by default ``report.html`` in the folder of a single run.
        study: what the runs are a study of; the page begins with it, and its variants are what has a colour.
        figures: writes each picture into ``figures/`` beside the page too, as SVG and PNG.

    Raises:
        SparsekitError: no runs, a folder that is none or is damaged, several runs without ``out``, or jinja2 or
            matplotlib is not installed.
    """
    paths = [_path(run) for run in (runs if isinstance(runs, (list, tuple)) else [runs])]
    if not paths:
        raise SparsekitError("report: no runs; give the folder of one, such as runs/tiny")
    if len({path.resolve() for path in paths}) < len(paths):
        raise SparsekitError("report: a run is named twice; name each once")
    if out is None and len(paths) > 1:
        raise SparsekitError("report: several runs; say where their report goes with --out FILE.html")
    target = paths[0] / REPORT if out is None else Path(out)
    if target.is_dir():
        target /= REPORT
    folders = [read(path) for path in paths]
    with writable(target.parent):
        html, plots, palette = page(folders, study)
        if figures:
            for plot in plots:
                plot.save(target.parent / "figures", palette)
        with written_whole(target) as temporary:
            temporary.write_text(html, encoding="utf-8")
    return target


def page(folders: Sequence[RunFolder], study: StudySummary | None = None) -> tuple[str, list[Plot], dict[str, str]]:
    """The page's HTML, its plots, and the colours of their groups."""
    environment = _environment()
    runs = trained(folders, study)
    parts = [*study_sections(study), *_behind(sections(runs))] if study is not None else sections(runs)
    figures = [figure for section in parts for figure in _figures(section.blocks)]
    legend = list({run.shown.group: replace(run.shown, label=run.shown.group) for run in runs}.values())
    pictures = Pictures(runs, figures)
    ended = sorted(at for folder in folders if (at := folder.ended) is not None)
    html = environment.get_template("page.html.j2").render(
        title=study.name if study is not None else _title(runs), sections=parts, legend=legend, pictures=pictures,
        sentence=_sentence(runs, study), dates=_dates(ended), css=_resource("page.css"), script=_resource("page.js"),
        axes=_axes(figures),
    )  # fmt: skip
    return html, pictures.drawn, pictures.palette


class Pictures:
    """Draws a page's figures, each under a name of its own, a group in one colour throughout.

    Attributes:
        palette: colours by group: of runs, and of what a study's figures show that is no run's group.
        drawn: the plots, in order.
    """

    def __init__(self, runs: Sequence[Trained], figures: Sequence[Figure]):
        self.palette = {run.shown.group: run.shown.colour for run in runs}
        self.drawn: list[Plot] = []
        self._told = {run.shown.label for run in runs} | self.palette.keys()
        self._names: dict[str, int] = {}
        self._values: dict[int, Any] = {}
        for plot in (plot for figure in figures for plot in figure.variants.values()):
            order = plot.picture.order if isinstance(plot.picture, LinesPicture) else ()
            own = palette_of([group for group in plot.groups if group not in self._told], order)
            self.palette |= {group: colour for group, colour in own.items() if group not in self.palette}

    def draw(self, plot: Plot, figure: Figure) -> dict[str, Any]:
        """A plot's id, ``<svg>`` and data; of a figure over several axes the values stand with the first plot only."""
        self._names[plot.name] = again = self._names.get(plot.name, 0) + 1
        plot_here = replace(plot, name=f"{plot.name}--{again}") if again > 1 else plot
        self.drawn.append(plot_here)
        svg, data = plot_here.drawn(self.palette)
        if plot is not figure.first and data.get("series") == self._values[id(figure)]:
            del data["series"]
        self._values.setdefault(id(figure), data.get("series"))
        return {"id": plot_here.name, "svg": svg, "data": data}

    def key(self, plot: Plot) -> list[Line]:
        """A plot's lines, where the legend of runs does not tell them all."""
        drawn = plot.picture.lines if isinstance(plot.picture, LinesPicture) else ()
        return [] if len(drawn) == 1 or {line.label for line in drawn} <= self._told else list(drawn)


def trained(folders: Sequence[RunFolder], study: StudySummary | None = None) -> list[Trained]:
    """Runs with their costs, labels and colours: a run's own, or of a study's variant."""
    if study is not None:
        labels, groups = groups_of_study(study, [folder.path.name for folder in folders])
    else:
        labels = groups = _labels(folders)
    named = list(dict.fromkeys(groups))
    order = _order(folders, groups, study)
    palette = palette_of(named, order)
    dashes = {group: DASHES[0 if order else place // len(DISTINCT) % len(DASHES)] for place, group in enumerate(named)}
    counted: dict[str, Costs | None] = {}
    runs = []
    for folder, label, group in zip(folders, labels, groups, strict=True):
        counted_by = json.dumps([folder.spec.get("model"), folder.spec.get("data")], sort_keys=True)
        if counted_by not in counted:
            counted[counted_by] = costs_of(folder.spec)
        runs.append(Trained(Shown(label, group, palette[group], dashes[group]), folder, counted[counted_by]))
    return runs


def _order(folders: Sequence[RunFolder], groups: Sequence[str], study: StudySummary | None) -> list[str]:
    """Groups along an axis, which get a scale of colours: as a study's figure orders them, or by depth."""
    for plot in study.figures if study is not None else ():
        if isinstance(plot.picture, LinesPicture) and set(groups) <= set(plot.picture.order):
            return list(plot.picture.order)
    return _by_depth(folders, groups)


def _path(run: Any) -> Path:
    return Path(getattr(run, "folder", run))


def _labels(folders: Sequence[RunFolder]) -> list[str]:
    """Folders' names, with as many of the folders above as tell them apart."""
    paths = [folder.path.resolve() for folder in folders]
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        found = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(found)) == len(found):
            return found
    raise SparsekitError("report: a run is named twice; name each once")


def _by_depth(folders: Sequence[RunFolder], groups: Sequence[str]) -> list[str]:
    """Groups from the shallowest to the deepest, where three or more have each a depth of their own."""
    depths: dict[str, set[int]] = {}
    for folder, group in zip(folders, groups, strict=True):
        depths.setdefault(group, set()).add(folder.n_layers or 0)
    single = {group: next(iter(found)) for group, found in depths.items() if len(found) == 1}
    apart = len(single) == len(depths) == len(set(single.values())) > 2
    return sorted(single, key=lambda group: single[group]) if apart else []


def _title(runs: Sequence[Trained]) -> str:
    return runs[0].shown.label if len(runs) == 1 else f"{len(runs)} runs side by side"


def _sentence(runs: Sequence[Trained], study: StudySummary | None) -> str:
    n = f"{len(runs)} run{'s' if len(runs) != 1 else ''}"
    if study is not None:
        variants = len({run.shown.group for run in runs})
        return f"A study of {variants} variants in {n}: its claims first, then figures, comparisons and each run."
    return f"What was trained, how it went, and what every layer does: {n}."


def _dates(ended: Sequence[datetime]) -> str:
    """From the first to the last day on which a run ended, as the folders say; never the day of the report."""
    if not ended:
        return ""
    first, last = f"{ended[0]:%Y-%m-%d}", f"{ended[-1]:%Y-%m-%d}"
    return first if first == last else f"{first} to {last}"


def _behind(found: Sequence[Section]) -> list[Section]:
    """What single runs did, folded away behind a study's own sections."""
    return [Section(s.id, s.title, s.blocks if s.id == "what" else [Fold("Run by run", s.blocks)]) for s in found]


def _figures(blocks: Sequence[Block]) -> Iterator[Figure]:
    for block in blocks:
        if isinstance(block, Figures):
            yield from block.figures
        elif isinstance(block, Fold):
            yield from _figures(block.blocks)


def _axes(figures: Sequence[Figure]) -> dict[str, list[str]]:
    """The switches that the page has: which x axes its figures can be shown over."""
    there = {axis for figure in figures if len(figure.variants) > 1 for axis in figure.variants}
    choices = {"curves over": ["tokens", "flops", "steps"], "layers by": ["layer", "depth"]}
    return {name: kept for name, all_ in choices.items() if len(kept := [a for a in all_ if a in there]) > 1}


def _resource(name: str) -> str:
    return (files("sparsekit.reports") / name).read_text(encoding="utf-8")


def _environment() -> Any:
    needed("jinja2", "matplotlib")
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("sparsekit.reports", "."), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["breakable"] = _breakable
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False, "ensure_ascii": False}
    return environment


def _breakable(text: str) -> Any:
    """Escaped text, of which a long path may be broken after its dots and underscores."""
    from markupsafe import Markup, escape

    if len(text) <= LONG_PATH:
        return text
    return Markup(re.sub(r"(?<=\w)([._])(?=[A-Za-z])", r"\1<wbr>", str(escape(text))))
