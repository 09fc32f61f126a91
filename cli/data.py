"""``tokenize``: text to token shards, and the check of shards."""

from __future__ import annotations

import glob
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from sparsekit.errors import DataError, did_you_mean

from .options import Json

if TYPE_CHECKING:
    from collections.abc import Callable

    from sparsekit.data.tokenize import Progress

SECONDS = 10.0  # between lines of progress where there is no terminal
HUB = "hf:"
# what a source's fields are called here
OPTIONS = {
    "data.source.field": "--text-field", "data.source.path": "SOURCE", "data.source.validation_path": "--validation",
    "data.source.separator": "--separator", "data.tokenizer.path": "--tokenizer",
    "data.tokenizer.eos_token": "--eos-token",
}  # fmt: skip
# which source reads a file, by the suffix of its name
SUFFIXES = {".txt": "text", ".text": "text", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}


def tokenize(
    source: Annotated[
        str,
        typer.Argument(
            help="A file, folder or glob of .txt, .jsonl or .parquet (the first two also .gz .bz2 .xz .zst); "
            "hf:NAME_OR_FOLDER, read by the library datasets; or embedded.",
            show_default=False,
        ),
    ],
    out: Annotated[Path | None, typer.Option(help="The folder of shards.", show_default=False)] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="byte, a tokenizers JSON file, or a folder with a tokenizer.json.", show_default=False),
    ] = None,
    train_bpe: Annotated[
        int | None,
        typer.Option(min=257, metavar="N", help="Learns a BPE of N tokens from the text.", show_default=False),
    ] = None,
    eos_token: Annotated[
        str | None, typer.Option(help="The token that ends a document, if its file does not tell.", show_default=False)
    ] = None,
    text_field: Annotated[str, typer.Option(help="The field or column of the text.")] = "text",
    separator: Annotated[
        str | None, typer.Option(help="The line that divides documents in a .txt.", show_default=False)
    ] = None,
    config: Annotated[str | None, typer.Option(help="Of a data set (hf:).", show_default=False)] = None,
    split: Annotated[str, typer.Option(help="Of a data set (hf:).")] = "train",
    validation: Annotated[
        str | None,
        typer.Option(help="Files of its own for validation, or a split of the data set.", show_default=False),
    ] = None,
    validation_fraction: Annotated[
        float | None,
        typer.Option(
            min=1e-6, max=0.5, help="Of the documents, by a hash of their text; 0.05 unless given.", show_default=False
        ),
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Stops when training has so many.", show_default=False)
    ] = None,
    shard_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of a shard; documents stay whole.")] = 1 << 26,
    layout: Annotated[
        str, typer.Option("--format", help="npy, or raw: no header, as OLMo's (uint16 or uint32, little-endian).")
    ] = "npy",
    eos: Annotated[str, typer.Option(help="end: one end of text after each document, as training reads it.")] = "end",
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes; by default one a core.", show_default=False)
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Checks the shards in folder SOURCE instead.")] = False,
    as_json: Json = False,
) -> None:
    """Encodes text into token shards; goes on where a killed run stopped. Blank documents are skipped and counted."""
    if verify:
        from sparsekit.data.shards import verify_shards

        _tell(Path(source), verify_shards(Path(source)), as_json, "every file is what was written")
        return
    from sparsekit.data.tokenize import tokenize as tokenize_source
    from sparsekit.files import writable

    if out is None:
        raise DataError("sparsekit tokenize: --out is missing; give a folder for the shards")
    if (tokenizer is None) == (train_bpe is None):
        raise DataError("sparsekit tokenize: give either --tokenizer or --train-bpe")
    if eos != "end":
        raise DataError(f"--eos {eos}: not supported, as training expects an end of text after each document; use end")
    reader = _source(
        source, text_field, separator, config, split, validation=validation, validation_fraction=validation_fraction
    )
    with _progress() as show, writable(out), _in_words_of_options():
        manifest = tokenize_source(
            reader,
            _tokenizer(tokenizer, train_bpe, eos_token),
            out,
            workers=workers,
            shard_tokens=shard_tokens,
            max_tokens=max_tokens,
            layout=_layout(layout),
            progress=show,
        )
    _tell(out, manifest, as_json, "done")


# ---- from options to slots ----


@contextmanager
def _in_words_of_options() -> Iterator[None]:
    """A mistake told as this command's options have it, not as a spec's fields."""
    try:
        yield
    except DataError as error:
        raise DataError(re.sub(r"data\.\w+\.\w+", lambda found: OPTIONS.get(found[0], found[0]), str(error))) from None


def _source(source: str, field: str, separator: str | None, config: str | None, split: str, **validation: Any) -> Any:
    """What fills ``data.source``, from what stands on the command line."""
    fraction = validation.pop("validation_fraction")
    shared = {} if fraction is None else {"validation_fraction": fraction}
    if source == "embedded":
        return _slot("source", {"type": "embedded"})
    if source.startswith(HUB):
        named = {"path": source.removeprefix(HUB), "config": config, "split": split, "field": field}
        held_out = {"validation_split": validation["validation"], "skip_blank": True}
        return _slot("source", {"type": "datasets", **named, **held_out, **shared})
    kind = _kind(source)
    slot = {"type": kind, "path": source, "validation_path": validation["validation"], **shared}
    return _slot(
        "source", slot | ({"separator": separator} if kind == "text" else {"field": field, "skip_blank": True})
    )


def _kind(source: str) -> str:
    """The source that reads these files, told by their suffix; in a folder, by that of what lies in it."""
    from sparsekit.data.paths import bare_name

    path = Path(source).expanduser()
    names = [bare_name(path)]
    if path.is_dir():
        names = sorted(bare_name(file) for file in path.glob("[!.]*") if file.is_file())
    kinds = sorted({SUFFIXES[Path(name).suffix] for name in names if Path(name).suffix in SUFFIXES})
    known = ", ".join(SUFFIXES)
    if not path.exists() and not glob.has_magic(source):
        near = did_you_mean(path.name, [file.name for file in path.parent.glob("*")])
        raise DataError(f"{source}: no such file{near}; paths are relative to {Path.cwd()}")
    if not kinds:
        raise DataError(f"{source}: no file of a known suffix; known: {known}; or give hf:NAME, or embedded")
    if len(kinds) > 1:
        raise DataError(
            f"{source}: holds files of several kinds ({', '.join(kinds)}); give a glob, such as {path}/*.jsonl"
        )
    return kinds[0]


def _tokenizer(given: str | None, train_bpe: int | None, eos_token: str | None) -> Any:
    """What fills ``data.tokenizer``, from what stands on the command line."""
    eos = {} if eos_token is None else {"eos_token": eos_token}
    if given is None:
        return _slot("tokenizer", {"type": "bpe", "vocab_size": train_bpe, **eos})
    if given == "byte":
        return _slot("tokenizer", {"type": "byte"})
    path = Path(given).expanduser()
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        near = did_you_mean(given, ["byte", *(str(other) for other in path.parent.glob("*.json"))])
        raise DataError(f"{file}: no such tokenizer file{near}; give byte, a tokenizers JSON file or a folder with one")
    told = _eos_of_folder(file.parent) if eos_token is None else None
    return _slot("tokenizer", {"type": "bpe", "path": str(file), **({"eos_token": told} if told else eos)})


def _eos_of_folder(folder: Path) -> str | None:
    """The end of text that the files of a Hugging Face folder name, if they do."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        try:
            token = json.loads((folder / name).read_text(encoding="utf-8")).get("eos_token")
        except (OSError, ValueError, AttributeError):
            continue
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and token:
            return token
    return None


def _slot(kind: str, value: dict[str, Any]) -> Any:
    """A slot filled from options; what its parameters refuse is told in one line."""
    from pydantic import ValidationError

    from sparsekit.spec.slot import Slot

    try:
        return Slot(kind).validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise DataError(f"{value['type']} {where}: {first['msg'].removeprefix('Value error, ')}") from None


def _layout(name: str) -> Literal["npy", "raw"]:
    if name == "npy":
        return "npy"
    if name == "raw":
        return "raw"
    raise DataError(f"--format {name}: unknown{did_you_mean(name, ['npy', 'raw'])}; give npy or raw")


# ---- what is shown ----


@contextmanager
def _progress() -> Iterator[Callable[[Progress], None]]:
    """Shows how far the job is: one line that changes where there is a terminal, else a line now and then."""
    if not sys.stderr.isatty():
        yield _every(SECONDS, lambda text: print(text, file=sys.stderr, flush=True))
        return
    from rich.console import Console

    console = Console(stderr=True)
    last = ""

    def update(text: str) -> None:
        nonlocal last
        last = text
        status.update(text)

    with console.status("starting") as status:
        yield _every(0.2, update)
    if last:
        console.print(last, highlight=False)


def _every(seconds: float, show: Callable[[str], None]) -> Callable[[Progress], None]:
    shown = 0.0

    def update(progress: Progress) -> None:
        nonlocal shown
        if progress.done or progress.seconds - shown >= seconds:
            shown = progress.seconds
            show(_line(progress))

    return update


def _line(progress: Progress) -> str:
    speed = progress.new_tokens / max(progress.seconds, 1e-9)
    text = f"{progress.documents:,} documents  {progress.tokens:,} tokens  {speed:,.0f} tokens/s"
    if earlier := progress.tokens - progress.new_tokens:
        text += f"  ({earlier:,} tokens were there)"
    return text + (f"  {progress.seconds:.1f} s" if progress.done else "")


def _tell(folder: Path, manifest: dict[str, Any], as_json: bool, verdict: str) -> None:
    if as_json:
        print(json.dumps(manifest, indent=2))
        return
    from sparsekit.data.shard_sources import tokenizer_slot
    from sparsekit.data.shards import raw_source

    for name, split in manifest["splits"].items():
        counts = "".join(f"{split[f'n_{what}']:>16,} {what}" for what in ("tokens", "documents", "bytes"))
        print(f"{name:12}{counts}  in {len(split['shards'])} shards")
    if removed := manifest["documents_removed_from_train"]:
        print(f"left out    {removed:>16,} training documents that validation holds too")
    if blank := manifest["blank_documents_skipped"]:
        print(f"left out    {blank:>16,} documents without text")
    raw = manifest["layout"] == "raw"
    reader = raw_source(folder, manifest) if raw else {"type": "shards", "path": str(folder)}
    slots = {"source": reader, "tokenizer": tokenizer_slot(folder, manifest)}
    print(f'{folder}: {verdict}; train on it with "data": {json.dumps(slots)}')
