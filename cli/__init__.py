"""The command line, one verb a step; imported as ``sparsekit.cli``."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from sparsekit.errors import SparsekitError, SpecError, UnknownNameError
from sparsekit.registry import OURSELVES, own_version

from . import catalogue, data, eval, interop, models, new, probe, report, runs, sparsify, study

app = typer.Typer(
    name="sparsekit",
    help="Transformers as a JSON file of named, interchangeable parts: train them, and see what every layer does.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"{OURSELVES} {own_version()}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Prints the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    pass


app.command()(models.describe)
app.command()(models.validate)
app.command()(runs.train)
app.command()(probe.probe)
app.command()(sparsify.sparsify)
app.command()(runs.generate)
app.command("eval")(eval.evaluate)
app.command()(study.study)
app.command()(report.report)
app.command()(data.tokenize)
app.command("import")(interop.import_)
app.command()(interop.export)
app.command("list")(catalogue.list_entries)
app.command()(catalogue.show)
app.command()(models.schema)
app.add_typer(new.new, name="new")


def main() -> None:
    """Runs a command; a user's mistake is told in one line each, with exit code 2 and no traceback."""
    try:
        app()
    except SparsekitError as error:
        # under torchrun all processes read the same spec: a machine's first one tells what is wrong with it
        if not isinstance(error, (SpecError, UnknownNameError)) or os.environ.get("LOCAL_RANK", "0") == "0":
            for line in str(error).splitlines():
                print(f"error: {line}", file=sys.stderr)
        sys.exit(2)
