"""Arguments that several verbs share."""

from __future__ import annotations

from typing import Annotated

import typer

Target = Annotated[
    str, typer.Argument(help="A spec, a run folder, a checkpoint folder, or hf:FOLDER_OR_NAME.", show_default=False)
]
Overrides = Annotated[
    list[str],
    typer.Option("--set", metavar="PATH=VALUE", help="Changes a field of the spec, such as train.optimizer.lr=3e-4."),
]
Json = Annotated[bool, typer.Option("--json", help="Prints JSON.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 …")]
