"""Sections on probes: what each measures, scalars side by side, tables by layer in one picture, matrices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sparsekit.catalogue import BUILT_IN
from sparsekit.errors import SparsekitError
from sparsekit.registry import registry
from sparsekit.reports.blocks import Block, Figure, Figures, Section, Text, number, table, titled
from sparsekit.reports.curves import Trained, first_of_groups, on_one_scale
from sparsekit.reports.folder import Result
from sparsekit.reports.plots import Array, Line, Plot, lines, matrix, scale_of

MOST_TABLES, MOST_MATRICES = 4, 3
DECADES = 1.5  # over which an axis is logarithmic


@dataclass(frozen=True)
class Measured:
    """A probe's newest result on a run."""

    run: Trained
    step: int
    result: Result


def probe_sections(runs: Sequence[Trained]) -> list[Section]:
    """One for each probe that any of the runs has, in the catalogue's order, plug-ins' after them."""
    known = list(BUILT_IN["probe"])  # from what a layer adds to what happens without it
    there = dict.fromkeys(name for run in runs for name in run.folder.probes)
    order = sorted(there, key=lambda name: known.index(_bare(name)) if _bare(name) in known else len(known))
    return [_section(name, runs) for name in order]


def not_measured(runs: Sequence[Trained]) -> list[str]:
    """The built-in probes that none of the runs has."""
    there = {_bare(name) for run in runs for name in run.folder.probes}
    return [e.name for e in registry("probe").entries() if e.built_in and e.name not in there and e.name != "sparsity"]


def _bare(name: str) -> str:
    return name.partition("-")[0]


def _section(name: str, runs: Sequence[Trained]) -> Section:
    found = []
    for run in runs:
        steps = run.folder.probes.get(name, {})
        if steps:
            found.append(Measured(run, *next(reversed(steps.items()))))
    blocks: list[Block] = [Text(_summary(name), "lead"), Text(_measured_on(found), "remark")]
    scalars = list(dict.fromkeys(scalar for m in found for scalar in m.result.scalars))
    if scalars:
        columns = {
            scalar: [number(m.result.scalars.get(scalar), m.result.intervals.get(scalar)) for m in found]
            for scalar in scalars
        }
        intervals = any(pair for m in found for pair in m.result.intervals.values())
        caption = f"{name}: scalars" + (" with 95% intervals" if intervals else "")
        blocks.append(table(caption, [m.run.shown for m in found], columns))
    tables = _chosen(found)
    plots = [figure for table_ in tables[:MOST_TABLES] if (figure := _by_layer(name, table_, found)) is not None]
    blocks.append(Figures(plots))
    for matrix_name in _matrices(found)[:MOST_MATRICES]:
        blocks.append(
            Figures(
                _maps(name, matrix_name, found),
                strip=True,
                title=on_one_scale(titled(matrix_name), [m.run for m in found]),
            )
        )
    left_out = [*tables[MOST_TABLES:], *_matrices(found)[MOST_MATRICES:]]
    if left_out:
        told = ", ".join(left_out[:20]) + (f" and {len(left_out) - 20} more" if len(left_out) > 20 else "")
        blocks.append(Text(f"Also in the runs' probes/{name}-….csv and .json: {told}.", "remark"))
    blocks += [Text(remark, "remark") for remark in _remarks(found)]
    missing = [run.shown.label for run in runs if name not in run.folder.probes]
    if missing:
        blocks.append(Text(f"Not measured, or not applicable: {', '.join(missing)}.", "absent"))
    return Section(f"probe-{name}", titled(name), [b for b in blocks if not _empty(b)])


def _empty(block: Block) -> bool:
    return (isinstance(block, Figures) and not block.figures) or (isinstance(block, Text) and not block.text)


def _summary(name: str) -> str:
    try:
        entry = registry("probe").entry(_bare(name))
    except SparsekitError:
        return ""  # of a package that is not installed here
    source = f" ({entry.source})" if entry.source else ""
    return f"{entry.summary}{source}"


def _measured_on(found: Sequence[Measured]) -> str:
    """On how many tokens, in what precision, at which step; and whether all saw the same."""
    told = []
    for name, each in (("tokens", _tokens), ("precisions", lambda m: str(m.result.meta.get("dtype", "")))):
        values = list(dict.fromkeys(filter(None, map(each, found))))
        told.append(" / ".join(values) if len(values) <= 3 else f"{name} that differ")
    steps = sorted({m.step for m in found if m.step >= 0})
    if steps:
        told.append(f"at step {steps[0]:,}" if len(steps) == 1 else f"at steps {steps[0]:,} to {steps[-1]:,}")
    if len({m.result.meta.get("data_fingerprint") for m in found}) > 1:
        told.append("not all on the same tokens: compare with care")
    return "Measured on " + "; ".join(filter(None, told)) + "." if any(told) else ""


def _tokens(measured: Measured) -> str:
    meta = measured.result.meta
    return f"{meta['sequences']} x {meta['seq_len']} tokens" if "sequences" in meta else ""


def _chosen(found: Sequence[Measured]) -> list[str]:
    """The tables by layer, those first that scalars sum up; parts of them (``q/gini``) last."""
    tables = dict.fromkeys(name for m in found for name, v in m.result.per_layer.items() if np.isfinite(v).any())
    scalars = [name for m in found for name in m.result.scalars]
    return sorted(tables, key=lambda name: ("/" in name, not any(name in scalar for scalar in scalars)))


def _by_layer(probe: str, name: str, found: Sequence[Measured]) -> Figure | None:
    """All runs in one picture, over layers and, where their depths differ, over relative depth."""
    curves = [(m, m.result.per_layer[name]) for m in found if name in m.result.per_layer]
    curves = [(m, values) for m, values in curves if np.isfinite(values).any()]
    if not curves:
        return None
    log = _spans_decades(values for _, values in curves)
    variants: dict[str, Plot] = {}
    depths = {len(values) for _, values in curves}
    for axis, label in (("layer", "layer"), ("depth", "relative depth")):
        if axis == "depth" and len(depths) == 1:
            continue
        drawn = [
            Line(m.run.shown.label, _places(axis, len(values)), values, group=m.run.shown.group, dash=m.run.shown.dash)
            for m, values in curves
        ]
        variants[axis] = lines(f"{probe}-{name}-{axis}", titled(name), drawn, x_label=label, y_label="", log_y=log)
    return Figure(variants if len(variants) > 1 else {"": next(iter(variants.values()))})


def _places(axis: str, n: int) -> Array:
    return np.arange(n, dtype=np.float64) / (max(1, n - 1) if axis == "depth" else 1)


def _spans_decades(values: object) -> bool:
    together = np.concatenate([np.asarray(v)[np.isfinite(v)] for v in values])  # type: ignore[attr-defined]
    return bool(together.size and together.min() > 0 and np.log10(together.max() / together.min()) > DECADES)


def _matrices(found: Sequence[Measured]) -> list[str]:
    return list(dict.fromkeys(
        name for m in found for name, values in m.result.matrices.items()
        if values.ndim == 2 and min(values.shape) > 1 and np.isfinite(values).any()
    ))  # fmt: skip


def _maps(probe: str, name: str, found: Sequence[Measured]) -> list[Figure]:
    """A heat map for each run, all on one scale of colours."""
    one_each = {run.folder.path for run in first_of_groups([m.run for m in found])}
    there = [(m, m.result.matrices[name]) for m in found if name in m.result.matrices and m.run.folder.path in one_each]
    there = [(m, values) for m, values in there if values.ndim == 2 and np.isfinite(values).any()]
    low, high = scale_of([values for _, values in there])
    log = low > 0 and _spans_decades(values for _, values in there)
    figures = []
    for m, values in there:
        down, across = m.result.meta.get("axes", {}).get(name, ("layer", "layer"))
        plot = matrix(
            f"{probe}-{name}-{m.run.shown.label}", m.run.shown.label, values, x_label=str(across), y_label=str(down),
            low=low, high=high, log=log, caption=f"{probe}: {name.replace('_', ' ')}, {m.run.shown.label}",
        )  # fmt: skip
        figures.append(Figure({"": plot}, m.run.shown.group))
    return figures


def _remarks(found: Sequence[Measured]) -> list[str]:
    """What should be known of the numbers, each once, with the runs that it is said of where not of all."""
    said: dict[str, list[str]] = {}
    for m in found:
        for remark in m.result.meta.get("remarks", []):
            said.setdefault(str(remark), []).append(m.run.shown.label)
    return [
        remark if len(labels) == len(found) else f"{remark} ({', '.join(labels[:4])}{' …' if len(labels) > 4 else ''})"
        for remark, labels in said.items()
    ]


def over_steps(runs: Sequence[Trained]) -> Mapping[str, Figure]:
    """Probes that looked on while runs trained: their first scalars over tokens."""
    found: dict[str, Figure] = {}
    for name in dict.fromkeys(name for run in runs for name, steps in run.folder.probes.items() if len(steps) > 2):
        scalars = dict.fromkeys(
            s for run in runs for result in run.folder.probes.get(name, {}).values() for s in result.scalars
        )
        for scalar in list(scalars)[:2]:
            drawn = []
            for run in runs:
                steps = run.folder.probes.get(name, {})
                if len(steps) > 1:
                    y = [result.scalars.get(scalar, np.nan) for result in steps.values()]
                    drawn.append(Line(run.shown.label, list(steps), y, group=run.shown.group, dash=run.shown.dash))
            plot = lines(f"{name}-{scalar}-over-steps", f"{name}: {scalar}", drawn, x_label="steps", y_label="")
            found[f"{name}-{scalar}"] = Figure({"": plot})
    return found
