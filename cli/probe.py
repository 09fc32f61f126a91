"""``probe``: what every layer of a model does."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import Batch, Device, DType, Json, Plots, SeqLen
from .sparsify import CalibrationText, Sparsifier, under


def probe(
    targets: Annotated[
        list[str],
        typer.Argument(
            help="Specs (fresh weights), run folders, checkpoint folders, hf:PATH_OR_NAME.", show_default=False
        ),
    ],
    names: Annotated[
        list[str],
        typer.Option("--probe", metavar="NAME[:key=value,…]", help="One probe; repeats. By default all that apply."),
    ] = [],  # noqa: B006 (typer reads it)
    several: Annotated[
        str, typer.Option("--probes", metavar="NAME,NAME:key=value,…", help="Several probes at once.")
    ] = "",
    data: Annotated[
        str | None,
        typer.Option(help="A text, a data spec (.json) or a source's name; by default what the run validates on.",
                     show_default=False),
    ] = None,
    sequences: Annotated[int, typer.Option(min=1, help="How many windows of the text.")] = 100,
    seq_len: SeqLen = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the windows, and of what probes draw.")] = 0,
    batch: Batch = 8,
    sparsifier: Sparsifier = None,
    calibration: CalibrationText = None,
    device: Device = "cpu",
    dtype: DType = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Where results go; by default a run's own folder, or probes/NAME.", show_default=False),
    ] = None,
    plots: Plots = True,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Measures what every layer of a model does."""
    from sparsekit.model.targets import dtype_of
    from sparsekit.probes.results import comparison
    from sparsekit.probes.runner import probe as run

    chosen = [*names, *_listed(several)] or None
    found = {}
    for target in targets:
        folder = _folder(target, out, len(targets) > 1)
        sparse = under(sparsifier, calibration, target)
        within: Any = None if sparse is None else (lambda subject, sparse=sparse: sparse(subject.model))
        with _shown() as report:
            found[target] = run(
                target, chosen, data, sequences=sequences, seq_len=seq_len, seed=seed, batch_size=batch,
                device=device, dtype=None if dtype is None else dtype_of(dtype), out=folder, plots=plots, report=report,
                within=within,
            )  # fmt: skip
        where = folder or "the run's probes/"
        n = len(found[target])
        print(f"{target}: {n} result{'s' if n != 1 else ''} in {where}", file=sys.stderr)
    if as_json:
        told = {target: {name: _scalars(r) for name, r in results.items()} for target, results in found.items()}
        print(json.dumps(told if len(targets) > 1 else told[targets[0]], indent=2))
    elif len(targets) > 1:
        _print_table(comparison(found))
    else:
        _print_results(found[targets[0]])


def _listed(text: str) -> list[str]:
    """``a,b:key=value,other=value,c``: a part with "=" and no name before it belongs to the probe before."""
    found: list[str] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        if found and ":" in found[-1] and "=" in part and ":" not in part.partition("=")[0]:
            found[-1] += f",{part}"
        else:
            found.append(part)
    return found


def _folder(target: str, out: Path | None, several: bool) -> Path | None:
    """Where a target's results go; None for a run's own folder."""
    name = Path(target.removeprefix("hf:")).stem or "model"
    if out is not None:
        return out / name if several else out
    own = not target.startswith("hf:") and Path(target).is_dir()
    return None if own else Path("probes") / name


@contextmanager
def _shown() -> Iterator[Any]:
    """A bar with the time left for each probe where there is a terminal; else only what cannot be measured."""
    if not sys.stderr.isatty():
        yield lambda name, share: _tell(name)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("left"),
               TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as live:
        tasks: dict[str, Any] = {}

        def report(name: str, share: float) -> None:
            if "not applicable" in name:
                live.console.print(name)
                return
            if name not in tasks:
                tasks[name] = live.add_task(name, total=1.0)
            live.update(tasks[name], completed=share)

        yield report


def _tell(name: str) -> None:
    if "not applicable" in name:
        print(name, file=sys.stderr)


def _scalars(result: Any) -> dict[str, Any]:
    return {name: None if value != value else value for name, value in result.scalars.items()}


def _print_results(results: Any) -> None:
    width = max((len(name) for r in results.values() for name in r.scalars), default=0)
    for name, result in results.items():
        print(f"\n{name}")
        for scalar, value in result.scalars.items():
            interval = result.intervals.get(scalar)
            told = "" if interval is None else f"   95% [{interval[0]:.5g}, {interval[1]:.5g}]"
            print(f"  {scalar:{width}}  {value:<10.5g}{told}")
        for remark in result.meta.get("remarks", []):
            print(f"  note: {remark}")


def _print_table(rows: list[list[Any]]) -> None:
    """Targets side by side, a line for each scalar."""
    cells = [["" if v is None else v if isinstance(v, str) else f"{v:.5g}" for v in column] for column in rows]
    widths = [max(len(cell) for cell in column) for column in cells]
    for line in zip(*cells, strict=True):
        print("  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)))
