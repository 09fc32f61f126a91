"""Where text comes from: the documents of a training and of a validation split.

A source only reads; it knows nothing of tokens. Text is passed on as it stands, line ends included: what a model is
measured on is the user's bytes, not ours. (A byte-order mark is the one exception, since it is no text.)
"""

from __future__ import annotations

import glob
import hashlib
import importlib.resources
import itertools
import json
import lzma
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, BinaryIO, ClassVar, NamedTuple

from pydantic import Field, field_validator

from sparsekit import spec
from sparsekit.errors import DataError, did_you_mean

SPLITS = ("train", "validation")


class Source(ABC):
    """Base of every source: yields the documents of a split, the same ones in the same order each time."""

    class Params(spec.Params):
        pass

    def __init__(self, params: Any):
        self.params = params

    @abstractmethod
    def documents(self, split: str) -> Iterator[str]:
        """The documents of ``"train"`` or ``"validation"``, none of them empty, none of them in both.

        Raises:
            ValueError: there is no such split.
            DataError: the text cannot be read, or the split has none.
        """


def _known(split: str) -> str:
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}{did_you_mean(split, SPLITS)}; splits: {', '.join(SPLITS)}")
    return split


# ---- text that comes with the package ----

HELD_OUT = "persuasion"
NOVELS = ("emma", "mansfield_park", "northanger_abbey", "pride_and_prejudice", "sense_and_sensibility")


class Embedded(Source):
    """Jane Austen's six novels, which come with the package: Persuasion is held out as validation, the rest train.

    One document a novel, 4.0 MB in all and in the public domain. ``novels`` trains on some of the five only.
    """

    class Params(Source.Params):
        novels: list[str] | None = None

        @field_validator("novels")
        @classmethod
        def _are_ours(cls, novels: list[str] | None) -> list[str] | None:
            known = f"choose from {', '.join(NOVELS)}"
            if novels is not None and not novels:
                raise ValueError(f"names no novel; {known}, or null for all")
            for name in novels or ():
                if name == HELD_OUT:
                    raise ValueError(f"{HELD_OUT!r} is held out as validation; {known}")
                if name not in NOVELS:
                    raise ValueError(f"unknown novel {name!r}{did_you_mean(name, NOVELS)}; {known}")
            if novels is not None and len(set(novels)) < len(novels):
                raise ValueError("names a novel twice; use train.max_epochs to read it more than once")
            return novels

    def documents(self, split: str) -> Iterator[str]:
        train = NOVELS if self.params.novels is None else self.params.novels
        for name in train if _known(split) == "train" else (HELD_OUT,):
            packed = importlib.resources.files("sparsekit.data").joinpath("austen", f"{name}.txt.xz").read_bytes()
            yield lzma.decompress(packed).decode("utf-8")


# ---- local files ----


PathText = Annotated[str, Field(min_length=1)]


class Document(NamedTuple):
    """A text and where it begins, for errors."""

    text: str
    where: str


class LocalFiles(Source):
    """Base of the sources that read local files and split their documents into training and validation.

    Where no ``validation_path`` is given, a document is validation if a hash of its text, read as a number in [0, 1),
    is below ``validation_fraction``: so adding files moves no document from one side to the other, and equal
    documents stay together. A lone document gives its last fraction, cut at a line boundary.
    """

    class Params(Source.Params):
        path: PathText | list[PathText]
        validation_path: PathText | list[PathText] | None = None
        validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05

    suffix: ClassVar[str]  # of the files that a folder stands for

    @abstractmethod
    def read(self, path: Path) -> Iterator[Document]:
        """The documents of one file, in order."""

    def documents(self, split: str) -> Iterator[str]:
        _known(split)
        train_files = find_files(self.params.path, "path", self.suffix)
        if self.params.validation_path is None:
            yield from self._split(self._read_all(train_files), split)
            return
        validation_files = find_files(self.params.validation_path, "validation_path", self.suffix)
        both = {file.resolve() for file in train_files} & {file.resolve() for file in validation_files}
        if both:
            raise DataError(
                f"{min(both)}: is in both path and validation_path; take it out of one, "
                "or leave out validation_path to have a fraction held out"
            )
        for document in self._read_all(train_files if split == "train" else validation_files):
            yield document.text

    def _read_all(self, files: Iterable[Path]) -> Iterator[Document]:
        for file in files:
            n_documents = 0
            for document in self.read(file):
                n_documents += 1
                yield document
            if not n_documents:
                raise DataError(f"{file}: holds no text; fill it or leave it out")

    def _split(self, documents: Iterator[Document], split: str) -> Iterator[str]:
        first, second = next(documents), next(documents, None)  # there is a first: an empty file is an error
        if second is None:
            yield _cut(first, self.params.validation_fraction)[SPLITS.index(split)]
            return
        n_documents, n_taken, lowest, highest = 0, 0, 1.0, 0.0
        for document in itertools.chain((first, second), documents):
            place = _place(document.text)
            n_documents, lowest, highest = n_documents + 1, min(lowest, place), max(highest, place)
            if (place < self.params.validation_fraction) == (split == "validation"):
                n_taken += 1
                yield document.text
        if not n_taken:
            name, fraction = "training" if split == "train" else "validation", self.params.validation_fraction
            enough = (int(lowest * 1e4) + 1) / 1e4  # takes the lowest into validation, and leaves the highest
            mend = f"set validation_fraction to {enough}, or give" if enough <= highest else "give"
            raise DataError(
                f"{', '.join(_as_list(self.params.path))}: no {name} documents: validation_fraction {fraction} leaves "
                f"that part none of the {n_documents}; {mend} validation_path"
            )


def _place(text: str) -> float:
    """Where a document stands between 0 and 1: 52 bits of its hash, so that the float is exact and below 1."""
    return (int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 12) / 2**52


def _cut(document: Document, fraction: float) -> tuple[str, str]:
    """A lone document as (training, validation), cut after the line end nearest to where the fraction begins."""
    text = document.text
    first = text.find("\n", len(text) - len(text.lstrip())) + 1  # cut earlier or later, one side would be blank
    last = text.rfind("\n", 0, len(text.rstrip())) + 1
    if not 0 < first <= last:
        raise DataError(
            f"{document.where}: no validation documents: the only document has no line boundary to be cut at; "
            "give validation_path, or more documents"
        )
    goal = round(len(text) * (1 - fraction))
    near = min(max(goal, first), last)
    before, after = text.rfind("\n", 0, near) + 1, text.find("\n", near, last) + 1 or last
    cut = min(before, after, key=lambda place: abs(place - goal))
    return text[:cut], text[cut:]


class TextFiles(LocalFiles):
    """Plain UTF-8 text files, each one document, or several where a separator line divides them.

    ``path`` names files, globs, or folders (their *.txt). A line that holds only ``separator`` ends a document and
    belongs to none; what holds nothing but white space is no document. See :class:`LocalFiles` for the split.
    """

    class Params(LocalFiles.Params):
        separator: str | None = None

        @field_validator("separator")
        @classmethod
        def _is_a_line(cls, separator: str | None) -> str | None:
            if separator is not None and (not separator or "\n" in separator or "\r" in separator):
                raise ValueError(f'expected what one line holds, such as "\\u001e", got {json.dumps(separator)}')
            return separator

    suffix = ".txt"

    def read(self, path: Path) -> Iterator[Document]:
        if self.params.separator is None:
            with _open(path) as file:
                text = decode(file.read(), path)
            if text.strip():
                yield Document(text, str(path))
            return
        lines: list[str] = []
        begin = 1
        for number, _, line in read_lines(path):
            if line.rstrip("\r\n") != self.params.separator:
                lines.append(line)
                continue
            if (text := "".join(lines)).strip():
                yield Document(text, f"{path}:{begin}")
            lines, begin = [], number + 1
        if (text := "".join(lines)).strip():
            yield Document(text, f"{path}:{begin}")


class JSONLines(LocalFiles):
    """JSON Lines files: one object a line, whose text is in one field.

    ``path`` names files, globs, or folders (their *.jsonl). Blank lines are skipped. See :class:`LocalFiles` for the
    split.
    """

    class Params(LocalFiles.Params):
        field: str = "text"

    suffix = ".jsonl"

    def read(self, path: Path) -> Iterator[Document]:
        for number, offset, line in read_lines(path):
            if line.strip():
                yield Document(self._text(line, f"{path}:{number} (byte {offset})"), f"{path}:{number}")

    def _text(self, line: str, where: str) -> str:
        field = self.params.field
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: not JSON: {error.msg} at column {error.colno}; mend the line") from None
        except (ValueError, RecursionError) as error:  # an integer of thousands of digits; too deep
            raise DataError(f"{where}: JSON that cannot be read: {error}; mend the line") from None
        if not isinstance(row, dict):
            raise DataError(f"{where}: expected a JSON object with the field {field!r}, got {_kind(row)}")
        if field not in row:
            fields = f"fields: {', '.join(map(repr, row)) or 'none'}"
            raise DataError(f"{where}: no field {field!r}{did_you_mean(field, row)}; {fields}; set data.source.field")
        text = row[field]
        if not isinstance(text, str):
            raise DataError(f"{where}: field {field!r} is {_kind(text)}, not a string; set data.source.field")
        if not text.strip():
            raise DataError(f"{where}: field {field!r} holds no text; fill it or remove the line")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            lone = f"U+{ord(text[error.start]):04X}"
            raise DataError(f"{where}: field {field!r} holds half a surrogate pair ({lone}); mend the line") from None
        return text


def _kind(value: Any) -> str:
    """What JSON calls a value."""
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


# ---- files and bytes ----


def _as_list(paths: str | list[str]) -> list[str]:
    return [paths] if isinstance(paths, str) else paths


def find_files(paths: str | list[str], name: str, suffix: str) -> list[Path]:
    """The files that paths, globs and folders stand for: in the order given, sorted within each, each file once.

    Args:
        paths: relative to the working directory; ``~`` is the home folder and ``**`` any depth.
        name: the parameter they come from, for errors.
        suffix: of the files that a folder stands for.

    Raises:
        DataError: one of them stands for no file.
    """
    found: dict[Path, Path] = {}
    for text in _as_list(paths):
        path = Path(os.path.expanduser(text))
        if path.is_dir():
            # hidden files are no text of the user's: macOS leaves a binary ._name beside every file on foreign disks
            files = sorted(file for file in path.glob(f"[!.]*{suffix}") if file.is_file())
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


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except FileNotFoundError:
        siblings = [file.name for file in path.parent.glob("*")]
        near = did_you_mean(path.name, siblings)
        raise DataError(f"{path}: no such file{near}; paths are relative to {Path.cwd()}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; mend that, or leave it out") from None


def decode(data: bytes, path: Path, line: int = 1, offset: int = 0) -> str:
    """Bytes of a file as text, without a byte-order mark at its begin.

    Args:
        data: the bytes.
        path: the file, for errors.
        line: the number of the line that the bytes begin with.
        offset: how far into the file they begin.

    Raises:
        DataError: they are not UTF-8; says the line and the byte.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        raise DataError(
            f"{path}:{line}: not UTF-8 text (byte {offset + error.start}, 0x{data[error.start]:02x}: {error.reason}); "
            "convert the file, as with iconv -f LATIN1 -t UTF-8"
        ) from None
    return text if offset else text.removeprefix("\ufeff")


def read_lines(path: Path) -> Iterator[tuple[int, int, str]]:
    """(line number from 1, byte offset, text with its line end) of each line; only ``\\n`` ends one.

    Text mode and ``str.splitlines`` also break at U+2028, form feeds and others, which are part of the text.
    """
    offset = 0
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            yield number, offset, decode(line, path, number, offset)
            offset += len(line)
