"""The command line, one verb a step; imported as ``sparsekit.cli``."""

from __future__ import annotations

import sys

import typer

from sparsekit.errors import SparsekitError

from . import catalogue, models, runs

app = typer.Typer(
    name="sparsekit",
    help="Transformers as a JSON file of named, interchangeable parts: train them, and see what every layer does.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command()(models.describe)
app.command()(models.validate)
app.command()(runs.train)
app.command()(runs.generate)
app.command("list")(catalogue.list_entries)
app.command()(catalogue.show)
app.command()(models.schema)


def main() -> None:
    """Runs a command; a user's mistake is told in one line each, with exit code 2 and no traceback."""
    try:
        app()
    except SparsekitError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        sys.exit(2)
