"""``report``: one page of what runs were and what came of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsekit.errors import SparsekitError


def report(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN…|STUDY", help="Run folders, side by side in one page; or a study's folder.", show_default=False
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="The page; by default report.html in the run's folder, or the study's. Several runs need it.",
            show_default=False,
        ),
    ] = None,
    figures: Annotated[
        bool, typer.Option("--figures", help="Writes each picture into figures/ beside the page, as SVG and PNG.")
    ] = False,
) -> None:
    """Writes one self-contained HTML page: what was trained, curves, what every layer does, evaluations."""
    from sparsekit.reports.build import report as write

    if len(runs) == 1 and (Path(runs[0]) / "study.json").is_file():
        if out is not None:
            raise SparsekitError(f"{runs[0]}: is a study, whose report stands in its folder; leave --out away")
        print(_of_study(runs[0]))
        return
    print(write(runs, out=out, figures=figures))


def _of_study(folder: str) -> Path:
    """Collects what is there of a study and writes its report anew; its figures are files anyway."""
    from sparsekit.studies.plan import expand
    from sparsekit.studies.spec import load_study
    from sparsekit.studies.study import finish

    results = finish(expand(load_study(folder)))
    if "report" not in results.written:
        told = "; ".join(results.notes) or "none of its runs is trained yet"
        raise SparsekitError(f"{folder}: {told}")
    return results.written["report"]
