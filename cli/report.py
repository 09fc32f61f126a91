"""``report``: one page of what runs were and what came of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


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
    if len(runs) == 1 and (Path(runs[0]) / "study.json").is_file():
        from sparsekit.studies.study import report_again

        print(report_again(runs[0], out))  # its figures are files anyway
        return
    from sparsekit.reports.build import report as write

    print(write(runs, out=out, figures=figures))
