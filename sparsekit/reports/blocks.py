"""What a page is made of; ``page.html.j2`` shows each kind.

A page is sections of blocks: text, tables, rows of figures, and parts that are folded away.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from sparsekit.reports.plots import Plot

WIDE = 6  # runs whose words still stand beside each other in a table
ABBREVIATED = {"cka": "CKA", "kl": "KL", "cett": "CETT", "ffn": "FFN", "attn": "attention", "resid": "stream"}


@dataclass(frozen=True)
class Shown:
    """A run as the page shows it: its label, and the group that is switched on and off and has a colour."""

    label: str
    group: str
    colour: str
    dash: str = "solid"


@dataclass(frozen=True)
class Cell:
    """A table's cell: what it says, what stands below it, and the number as it was measured."""

    text: str
    below: str = ""
    value: float | int | None = None
    group: str = ""
    mark: str = ""  # a class: holds, fails, open


@dataclass(frozen=True)
class Table:
    caption: str
    head: list[Cell]
    rows: list[list[Cell]]  # the first cell of each names it

    kind: str = "table"

    @property
    def numeric(self) -> bool:
        """Whether most of what stands beside the rows' names is numbers."""
        told = [cell.value is not None for row in self.rows for cell in row[1:] if cell.text != "–"]
        return sum(told) > len(told) / 2


@dataclass(frozen=True)
class Figure:
    """A plot, or several of which the page shows the one whose x axis a reader chose."""

    variants: Mapping[str, Plot]
    group: str = ""  # of a picture that is one group's own

    @property
    def first(self) -> Plot:
        return next(iter(self.variants.values()))


@dataclass(frozen=True)
class Figures:
    """Figures that stand beside each other; a strip keeps to one row, which is moved sideways."""

    figures: Sequence[Figure]
    strip: bool = False
    title: str = ""

    kind: str = "figures"


@dataclass(frozen=True)
class Text:
    text: str
    mark: str = ""  # a class: lead, remark, absent

    kind: str = "text"


@dataclass(frozen=True)
class Written:
    """Text as it was written, such as a spec or a sample."""

    title: str
    text: str
    group: str = ""

    kind: str = "written"


@dataclass(frozen=True)
class Fold:
    title: str
    blocks: Sequence[Block]

    kind: str = "fold"


Block = Table | Figures | Text | Written | Fold


@dataclass(frozen=True)
class Section:
    id: str
    title: str
    blocks: Sequence[Block] = field(default_factory=list)


def table(caption: str, runs: Sequence[Shown], columns: Mapping[str, Sequence[Cell]]) -> Table:
    """Runs beside each other by what is told of them; below each other where they are many and words are told.

    Args:
        columns: by what is told, a cell for each run.
    """
    numeric = any(cell.value is not None for cells in columns.values() for cell in cells)
    names = [Cell(run.label, group=run.group) for run in runs]
    if numeric or len(runs) <= WIDE:
        return Table(caption, [Cell(""), *names], [[Cell(name), *_of(runs, cells)] for name, cells in columns.items()])
    rows = [
        [names[place], *(replace(c[place], group=run.group) for c in columns.values())]
        for place, run in enumerate(runs)
    ]
    return Table(caption, [Cell("run"), *(Cell(name) for name in columns)], rows)


def _of(runs: Sequence[Shown], cells: Sequence[Cell]) -> list[Cell]:
    return [replace(cell, group=run.group) for run, cell in zip(runs, cells, strict=True)]


def number(value: float | int | None, interval: tuple[float, float] | None = None) -> Cell:
    """A number as a cell, with its 95% interval below; a dash for what was not measured."""
    if value is None or not math.isfinite(value):
        return Cell("–")
    below = "" if interval is None else f"[{short(interval[0])}, {short(interval[1])}]"
    return Cell(short(value), below, value)


def titled(name: str) -> str:
    """A measure's name as a title: ``block_influence`` is ``Block influence``."""
    words = [ABBREVIATED.get(word, word) for word in name.split("_")]
    return " ".join([words[0][:1].upper() + words[0][1:], *words[1:]])


def short(value: float | int) -> str:
    """A number with four or five digits, large ones by thousands."""
    if not math.isfinite(value):
        return "–"
    if isinstance(value, int) or 1e4 <= abs(value) < 1e9:
        return f"{value:,.0f}"
    return f"{value:.5g}".replace("e+", "e").replace("e0", "e").replace("e-0", "e-")
