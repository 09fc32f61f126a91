"""``import`` and ``export``: from Hugging Face folders, and back."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import Target

Check = Annotated[bool, typer.Option(help="Compares the logits of both models, in float32.")]


def import_(
    source: Annotated[str, typer.Argument(metavar="hf:FOLDER_OR_NAME", show_default=False)],
    out: Annotated[Path, typer.Argument(help="A new folder.", show_default=False)],
    check: Check = True,
) -> None:
    """Turns a Hugging Face folder into a checkpoint that every command takes."""
    from sparsekit.interop.importing import import_folder

    _tell(import_folder(source, out, check=check))


def export(
    target: Target,
    out: Annotated[Path, typer.Argument(help="A new folder.", show_default=False)],
    family: Annotated[
        str | None, typer.Option(help="llama, qwen3 …; by default the first that says the same.", show_default=False)
    ] = None,
    check: Check = True,
) -> None:
    """Writes a model as a Hugging Face folder."""
    from sparsekit.errors import SparsekitError

    if target.startswith("hf:"):
        raise SparsekitError(f"{target}: is one already; export takes a run's folder or a checkpoint's")
    from sparsekit.interop.exporting import export as export_folder

    _tell(export_folder(target, out, family=family, check=check))


@contextmanager
def taken_in(target: str) -> Iterator[str]:
    """A target's path; that of ``hf:FOLDER_OR_NAME`` is a temporary folder, into which it is imported."""
    if not target.startswith("hf:"):
        yield target
        return
    from sparsekit.interop.importing import import_folder

    with tempfile.TemporaryDirectory() as folder:
        import_folder(target, Path(folder) / "model", check=False)
        yield str(Path(folder) / "model")


def _tell(found: Any) -> None:
    for remark in found.remarks:
        print(f"note: {remark}", file=sys.stderr)
    counts = ", ".join(f"{count:,} parameters in {kind}" for kind, count in found.parameters.items())
    print(f"{found.out}: {found.family}, {counts}")
    if found.difference is not None:
        print(found.difference)
