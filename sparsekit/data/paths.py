"""Which files a path, a folder or a glob stands for, and their bytes, compressed or not."""

from __future__ import annotations

import bz2
import glob
import gzip
import io
import lzma
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from sparsekit.errors import DataError, did_you_mean

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")


def as_list(paths: str | list[str]) -> list[str]:
    """One path or several, as several."""
    return [paths] if isinstance(paths, str) else paths


def bare_name(path: Path) -> str:
    """The file's name without the suffix of its compression: ``a.jsonl.gz`` -> ``a.jsonl``."""
    return path.stem if path.suffix in COMPRESSED else path.name


def find_files(paths: str | list[str], name: str, suffix: str) -> list[Path]:
    """The files that paths, globs and folders stand for: in the order given, sorted within each, each file once.

    Args:
        paths: relative to the working directory; ``~`` is the home folder and ``**`` any depth.
        name: the parameter they come from, for errors.
        suffix: of the files that a folder stands for, with or without the suffix of a compression after it.

    Raises:
        DataError: one of them stands for no file.
    """
    found: dict[Path, Path] = {}
    for text in as_list(paths):
        path = Path(os.path.expanduser(text))
        if path.is_dir():
            # hidden files are no text of the user's: macOS leaves a binary ._name beside every file on foreign disks
            visible = (file for file in path.glob("[!.]*") if bare_name(file).endswith(suffix))
            files = sorted(file for file in visible if file.is_file())
            if not files:
                raise DataError(f"{path}: the folder has no *{suffix} file; name the files in data.source.{name}")
        elif path.exists() or not glob.has_magic(text):  # a name may hold brackets and be no glob
            files = [path]
        else:
            files = sorted(file for file in map(Path, glob.glob(str(path), recursive=True)) if file.is_file())
            if not files:
                raise DataError(f"{path}: matches no file (from {Path.cwd()}); mend data.source.{name}")
        for file in files:
            found.setdefault(file.resolve(), file)
    if not found:
        raise DataError(f"data.source.{name}: names no file; give at least one")
    return list(found.values())


@contextmanager
def open_bytes(path: Path) -> Iterator[BinaryIO]:
    """A file's content as a stream of bytes; what its suffix says is compressed is decompressed.

    Raises:
        DataError: it is missing, cannot be read, or its compression is damaged.
    """
    try:
        with path.open("rb") as file, _decompressed(file, path) as content:
            yield content
    except FileNotFoundError:
        siblings = [file.name for file in path.parent.glob("*")]
        near = did_you_mean(path.name, siblings)
        raise DataError(f"{path}: no such file{near}; paths are relative to {Path.cwd()}") from None
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
        raise DataError(f"{path}: cannot be read: {reason}; mend that, or leave it out") from None


def _decompressed(file: BinaryIO, path: Path) -> BinaryIO:
    if path.suffix == ".gz":
        return cast(BinaryIO, gzip.open(file))
    if path.suffix == ".bz2":
        return cast(BinaryIO, bz2.open(file))
    if path.suffix == ".xz":
        return cast(BinaryIO, lzma.open(file))
    if path.suffix == ".zst":  # the standard library has none yet
        from sparsekit.data.tables import import_pyarrow

        stream: Any = import_pyarrow(path).CompressedInputStream(file, "zstd")
        return cast(BinaryIO, io.BufferedReader(stream))
    return file
