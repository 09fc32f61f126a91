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
SeqLen = Annotated[int | None, typer.Option(min=2, help="Tokens a window; by default up to 512.", show_default=False)]
Batch = Annotated[int, typer.Option(min=1, help="Sequences at a time.")]
DType = Annotated[
    str | None, typer.Option(help="float32, bfloat16 …; by default as the device likes.", show_default=False)
]
Plots = Annotated[bool, typer.Option(help="Draw pictures.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 …")]
