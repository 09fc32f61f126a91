"""From runs to a page: what was trained, how it went, what probes and evaluations say, and on what it ran."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from sparsekit.reports.blocks import (
    Block,
    Cell,
    Figure,
    Figures,
    Fold,
    Section,
    Text,
    Written,
    number,
    short,
    table,
)  # fmt: skip
from sparsekit.reports.curves import Trained, at_the_end, by_layer, on_one_scale, training_figures
from sparsekit.reports.differences import differences
from sparsekit.reports.layers import not_measured, over_steps, probe_sections

SAMPLES = 3  # of a run's last texts
STATISTICS = (  # by layer, as logged last; variance is a heat map of its own
    ("density", "Active hidden units", "share"),
    ("load_max", "Load of the busiest expert", "times the mean"),
)


def sections(runs: Sequence[Trained]) -> list[Section]:
    """The sections of a page, in the order in which they are read."""
    found = [_what(runs), _curves(runs), *probe_sections(runs), _evaluations(runs), _samples(runs), _environment(runs)]
    absent = not_measured(runs)
    if absent:
        mend = "sparsekit probe RUN measures all that apply"
        found.insert(
            -3,
            Section(
                "probes-absent",
                "Not measured",
                [Text(f"{', '.join(absent)}: in none of these runs; {mend}.", "absent")],
            ),
        )
    return [section for section in found if section.blocks]


def _what(runs: Sequence[Trained]) -> Section:
    """The specs' differences first, then sizes and results, then the specs in full."""
    shown = [run.shown for run in runs]
    blocks: list[Block] = []
    with_spec = [run for run in runs if run.folder.spec]
    compared = _one_of_each(with_spec)
    found = differences([run.folder.spec for run in compared])
    if found:
        cells = {path: [Cell("–" if v is None else v) for v in values] for path, values in found.items()}
        heads = [
            replace(run.shown, label=run.shown.group) if len(compared) < len(with_spec) else run.shown
            for run in compared
        ]
        blocks.append(table("In what the specs differ (name and seed apart)", heads, cells))
    elif len(with_spec) > 1:
        blocks.append(Text("The specs are the same, name and seed apart.", "lead"))
    blocks.append(table("Size and result", shown, {
        name: cells for name, cells in _summary(runs).items() if any(cell.text != "–" for cell in cells)
    }))  # fmt: skip
    blocks.append(Fold("Specs in full", [
        Written(f"{r.shown.label}: spec.json", json.dumps(r.folder.spec, indent=2, ensure_ascii=False), r.shown.group)
        for r in with_spec
    ]))  # fmt: skip
    return Section("what", "What was trained", blocks)


def _one_of_each(runs: Sequence[Trained]) -> Sequence[Trained]:
    """The first run of each group, where those of a group differ in no more than their seeds; else all."""
    groups: dict[str, list[Trained]] = {}
    for run in runs:
        groups.setdefault(run.shown.group, []).append(run)
    alike = not any(differences([run.folder.spec for run in members]) for members in groups.values())
    return [members[0] for members in groups.values()] if alike else runs


def _summary(runs: Sequence[Trained]) -> dict[str, list[Cell]]:
    def each(told: Any) -> list[Cell]:
        return [told(run) for run in runs]

    def cost(name: str) -> list[Cell]:
        return each(lambda run: number(getattr(run.costs, name, None)))

    def tokens(run: Trained) -> float | None:
        return run.folder.last("tokens")

    def flops(run: Trained) -> Cell:
        seen = tokens(run)
        return number(seen * run.costs.training_flops_per_token if seen is not None and run.costs else None)

    def perplexity(run: Trained) -> Cell:
        loss = run.folder.last("val_loss")
        return number(math.exp(loss) if loss is not None and loss < 700 else None)

    def logged(name: str) -> list[Cell]:
        return each(lambda run: number(run.folder.last(name)))

    return {
        "layers": each(lambda run: number(run.folder.n_layers)),
        "d_model": each(lambda run: number(run.folder.spec.get("model", {}).get("d_model"))),
        "parameters": cost("parameters"),
        "active parameters": cost("active_parameters"),
        "seed": each(lambda run: number(run.folder.spec.get("train", {}).get("seed"))),
        "steps": each(lambda run: number(run.folder.rows[-1]["step"] if run.folder.rows else None)),
        "tokens": each(lambda run: number(_whole(tokens(run)))),
        "training FLOPs": each(flops),
        "training loss, last logged": logged("loss"),
        "validation loss": logged("val_loss"),
        "validation perplexity": each(perplexity),
        "validation bits per byte": logged("val_bits_per_byte"),
        **{name.replace("_", " "): logged(name) for name in _other_validations(runs)},
    }


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)


def _other_validations(runs: Sequence[Trained]) -> list[str]:
    """Losses on texts that the spec added to validate on."""
    names = dict.fromkeys(name for run in runs for row in run.folder.rows[-1:] for name in row)
    return [name for name in names if name.startswith("val") and name.endswith("_loss") and name != "val_loss"]


def _curves(runs: Sequence[Trained]) -> Section:
    if not any(run.folder.rows for run in runs):
        return Section("curves", "Training", [])
    figures = training_figures(runs)
    blocks: list[Block] = [Figures(figures["shown"])]
    maps = by_layer(runs, "variance/resid", "Variance of each layer's output")
    if maps:
        blocks.append(
            Figures(maps, strip=True, title=on_one_scale("Variance of each layer's output over training", runs))
        )
    ends = [at_the_end(runs, name, title, label) for name, title, label in STATISTICS]
    more = [*figures["folded"], *(Figure({"": plot}) for plot in ends if plot), *over_steps(runs).values()]
    if more:
        blocks.append(Fold("More of training: rates, norms, speed, statistics by layer", [Figures(more)]))
    without = [run.shown.label for run in runs if not run.folder.by_layer("variance/resid")[0].size]
    if without:
        mend = '"statistics": {"every": 100} in train logs them'
        blocks.append(Text(f"No statistics of layers were logged by {', '.join(without)}; {mend}.", "absent"))
    return Section("curves", "Training", blocks)


def _evaluations(runs: Sequence[Trained]) -> Section:
    """lm-eval's scores, a column for each task and metric."""
    columns: dict[str, dict[int, Cell]] = {}
    told: list[str] = []
    for place, run in enumerate(runs):
        for name, record in run.folder.evaluations.items():
            told.append(f"{run.shown.label}: {name}: {_how(record)}")
            for task, metrics in record.get("results", {}).items():
                for key, value in metrics.items():
                    metric, _, rule = key.partition(",")
                    if rule and not metric.endswith("_stderr") and isinstance(value, (int, float)):
                        error = metrics.get(f"{metric}_stderr,{rule}")
                        cell = number(float(value))
                        below = f"± {short(float(error))}" if isinstance(error, (int, float)) else ""
                        better = record.get("higher_is_better", {}).get(task, {}).get(metric)
                        arrow = {True: " ↑", False: " ↓"}.get(better, "")
                        within = f" under {record['within']['name']}" if "within" in record else ""
                        head = f"{task} {metric}{'' if rule == 'none' else f' ({rule})'}{arrow}{within}"
                        columns.setdefault(head, {})[place] = Cell(cell.text, below, cell.value)
    if not columns:
        return Section("evaluations", "Evaluations", [])
    cells = {head: [found.get(place, Cell("–")) for place in range(len(runs))] for head, found in columns.items()}
    blocks: list[Block] = [
        table("lm-eval's tasks, ± one standard error; ↑ more is better", [r.shown for r in runs], cells)
    ]
    return Section(
        "evaluations",
        "Evaluations",
        [*blocks, Fold("How they were evaluated", [Text(line, "remark") for line in told])],
    )


def _how(record: Mapping[str, Any]) -> str:
    parts = [f"limit {record['limit']}" if record.get("limit") else "all examples", str(record.get("bos", "")),
             f"{record.get('dtype', '')} on {record.get('device', '')}", f"seed {record.get('seed')}"]  # fmt: skip
    shots = sorted({str(n) for n in record.get("n_shot", {}).values()})
    return "; ".join([*(p for p in parts if p), f"shots {', '.join(shots)}"])


def _samples(runs: Sequence[Trained]) -> Section:
    found = [
        Written(f"{run.shown.label}, step {row['step']:,}", str(row.get("text", "")), run.shown.group)
        for run in runs for row in run.folder.samples[-SAMPLES:]
    ]  # fmt: skip
    return Section("samples", "What they write", [Fold("Samples", found)] if found else [])


def _environment(runs: Sequence[Trained]) -> Section:
    """Versions, device and speed, as the folders tell them."""
    columns: dict[str, list[Cell]] = {
        "folder": [Cell(run.folder.path.name) for run in runs],
        "last written": [Cell("–" if (at := run.folder.ended) is None else f"{at:%Y-%m-%d %H:%M} UTC") for run in runs],
        "training time": [Cell(_time(run)) for run in runs],
        "tokens a second (median)": [number(_median(run.folder.column("tokens_per_second")[1])) for run in runs],
        "memory, GiB": [number(_most(run)) for run in runs],
        "precision": [Cell(str(run.folder.spec.get("train", {}).get("precision", "–"))) for run in runs],
        "probed on": [Cell(", ".join(_of_meta(run, "device")) or "–") for run in runs],
    }
    versions = [_versions(run) for run in runs]
    for package in dict.fromkeys(name for each in versions for name in each):
        columns[package] = [Cell(each.get(package, "–")) for each in versions]
    for package in dict.fromkeys(p for run in runs for p in run.folder.spec.get("packages") or {}):
        columns[f"{package} (plug-in)"] = [
            Cell(str((run.folder.spec.get("packages") or {}).get(package, "–"))) for run in runs
        ]
    kept = {name: cells for name, cells in columns.items() if any(cell.text != "–" for cell in cells)}
    return Section("environment", "Environment", [table("Where and with what", [run.shown for run in runs], kept)])


def _time(run: Trained) -> str:
    """Of the steps that were logged, from the speed that was: h:mm:ss."""
    rows, speed = run.folder.column("tokens_per_second")
    tokens = run.along("tokens", rows)
    seconds = np.diff(tokens, prepend=0.0) / speed
    told = int(seconds[np.isfinite(seconds)].sum())
    return f"{told // 3600}:{told // 60 % 60:02}:{told % 60:02}" if rows.size else "–"


def _median(values: Any) -> float | None:
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if finite.size else None


def _most(run: Trained) -> float | None:
    names = {name for row in run.folder.rows[-1:] for name in row if name.startswith("memory")}
    found = [run.folder.last(name) for name in names]
    return max((value for value in found if value is not None), default=None)


def _of_meta(run: Trained, key: str) -> list[str]:
    metas = [result.meta for steps in run.folder.probes.values() for result in steps.values()]
    return list(dict.fromkeys(str(meta[key]) for meta in metas if key in meta))


def _versions(run: Trained) -> dict[str, str]:
    """Of packages, as probes and evaluations noted them."""
    found: dict[str, str] = {}
    metas = [result.meta for steps in run.folder.probes.values() for result in steps.values()]
    for told in [*metas, *run.folder.evaluations.values()]:
        for package, version in (told.get("versions") or {}).items():
            found.setdefault(str(package), str(version))
    return found
