"""Where text comes from: the documents of a training and of a validation split.

A source only reads; it knows nothing of tokens. Text is passed on as it stands, line ends included: what a model is
measured on is the user's bytes, not ours. (A byte-order mark is the one exception, since it is no text.)
"""

from __future__ import annotations

import importlib.resources
import itertools
import json
import lzma
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field, field_validator

from sparsekit import spec
from sparsekit.data.paths import as_list, find_files, open_bytes
from sparsekit.data.splitting import Document, Tally, cut, place
from sparsekit.data.token_set import Tokens, TokenSet
from sparsekit.data.tokenizers import Tokenizer
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

    def learning_text(self) -> Iterator[str]:
        """What a tokenizer that has to learn learns from.

        Raises:
            DataError: when read, as :meth:`documents`; or the tokens lie ready, made with another.
        """
        return self.documents("train")

    def streams(self, split: str, tokenizer: Tokenizer) -> list[tuple[Tokens, float]]:
        """The split as tokens, with weights; here one stream, encoded now and held in memory.

        A source whose tokens lie ready overrides this.

        Raises:
            DataError: as :meth:`documents`, or the tokens are not this tokenizer's.
        """
        return [(TokenSet.from_documents(self.documents(split), tokenizer), 1.0)]


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


# ---- documents that are split by us ----


PathText = Annotated[str, Field(min_length=1)]


class SplitSource(Source):
    """Base of the sources that split their documents into training and validation, unless the user did.

    Where the user did not, a document is validation if a hash of its text, read as a number in [0, 1), is below
    ``validation_fraction``: so adding documents moves none from one side to the other, and equal documents stay
    together. A lone document gives its last fraction, cut at a line boundary.

    Attributes:
        n_blank: documents without text that were skipped, of all that were read so far.
    """

    class Params(Source.Params):
        validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05

    mend: ClassVar[str]  # the parameter by which the user names validation documents

    def __init__(self, params: Any):
        super().__init__(params)
        self.n_blank = 0

    @property
    @abstractmethod
    def origin(self) -> str:
        """What the documents are read from, for errors."""

    @property
    def is_split_by_user(self) -> bool:
        """Whether validation documents are named, and none taken from the training documents."""
        return getattr(self.params, self.mend) is not None

    @abstractmethod
    def read_split(self, split: str) -> Iterator[Document]:
        """The documents of a split as the user named it; where they named one only, ``"train"`` is all there is."""

    def documents(self, split: str) -> Iterator[str]:
        _known(split)
        if self.is_split_by_user:
            for document in self.read_split(split):
                yield document.text
            return
        n_taken = 0
        tally = Tally()
        for side, text in self._placed(tally):
            if side == split:
                n_taken += 1
                yield text
        if not n_taken:
            raise self._none_left(split, tally)

    def placed(self) -> Iterator[tuple[str, str]]:
        """(split, text) of the documents of both splits in one pass, for a source that the user did not split.

        Raises:
            DataError: as :meth:`documents`, for either split.
        """
        tally = Tally()
        missing = set(SPLITS)
        for side, text in self._placed(tally):
            missing.discard(side)
            yield side, text
        if missing:
            raise self._none_left(min(missing), tally)

    def _placed(self, tally: Tally) -> Iterator[tuple[str, str]]:
        documents, fraction = self.read_split("train"), self.params.validation_fraction
        first, second = next(documents, None), next(documents, None)
        if first is None:
            raise DataError(f"{self.origin}: holds no text; fill it or leave it out")
        if second is None:
            yield from zip(SPLITS, cut(first, fraction, self.mend), strict=True)
            return
        for document in itertools.chain((first, second), documents):
            at = place(document.text)
            tally.n, tally.lowest, tally.highest = tally.n + 1, min(tally.lowest, at), max(tally.highest, at)
            yield SPLITS[at < fraction], document.text

    def _none_left(self, split: str, tally: Tally) -> DataError:
        name, fraction = "training" if split == "train" else "validation", self.params.validation_fraction
        enough = (int(tally.lowest * 1e4) + 1) / 1e4  # takes the lowest into validation, and leaves the highest
        mend = f"set validation_fraction to {enough}, or give" if enough <= tally.highest else "give"
        return DataError(
            f"{self.origin}: no {name} documents: validation_fraction {fraction} leaves that part none of the "
            f"{tally.n}; {mend} {self.mend}"
        )

    def keeps(self, text: str, what: str) -> bool:
        """Whether a document has text; one that has none is counted, or else an error.

        Raises:
            DataError: it has none, and the user did not say to skip such.
        """
        if text.strip():
            return True
        if not self.params.skip_blank:
            raise DataError(f"{what} holds no text; fill it or remove the line, or set data.source.skip_blank")
        self.n_blank += 1
        return False


class LocalFiles(SplitSource):
    """Base of the sources that read local files: see :class:`SplitSource` for the split."""

    class Params(SplitSource.Params):
        path: PathText | list[PathText]
        validation_path: PathText | list[PathText] | None = None

    suffix: ClassVar[str]  # of the files that a folder stands for
    mend = "validation_path"

    @abstractmethod
    def read(self, path: Path) -> Iterator[Document]:
        """The documents of one file, in order."""

    @property
    def origin(self) -> str:
        return ", ".join(as_list(self.params.path))

    def read_split(self, split: str) -> Iterator[Document]:
        train_files = find_files(self.params.path, "path", self.suffix)
        if self.params.validation_path is None:
            return self._read_all(train_files)
        validation_files = find_files(self.params.validation_path, "validation_path", self.suffix)
        both = {file.resolve() for file in train_files} & {file.resolve() for file in validation_files}
        if both:
            raise DataError(
                f"{min(both)}: is in both path and validation_path; take it out of one, "
                "or leave out validation_path to have a fraction held out"
            )
        return self._read_all(train_files if split == "train" else validation_files)

    def _read_all(self, files: Iterable[Path]) -> Iterator[Document]:
        for file in files:
            n_documents = 0
            for document in self.read(file):
                n_documents += 1
                yield document
            if not n_documents:
                raise DataError(f"{file}: holds no text; fill it or leave it out")


class TextFiles(LocalFiles):
    """Plain UTF-8 text files, each one document, or several where a separator line divides them.

    ``path`` names files, globs, or folders (their *.txt), compressed or not (.gz, .bz2, .xz, .zst). A line that holds
    only ``separator`` ends a document and belongs to none; what holds nothing but white space is no document. See
    :class:`SplitSource` for the split.
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
            with open_bytes(path) as file:
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

    ``path`` names files, globs, or folders (their *.jsonl), compressed or not (.gz, .bz2, .xz, .zst). Blank lines are
    skipped; a row without text is an error, or with ``skip_blank`` skipped and counted. See :class:`SplitSource` for
    the split.
    """

    class Params(LocalFiles.Params):
        field: str = "text"
        skip_blank: bool = False

    suffix = ".jsonl"

    def read(self, path: Path) -> Iterator[Document]:
        for number, offset, line in read_lines(path):
            if not line.strip():
                continue
            where = f"{path}:{number} (byte {offset})"
            text = self._text(line, where)
            if self.keeps(text, f"{where}: field {self.params.field!r}"):
                yield Document(text, f"{path}:{number}")

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


# ---- bytes to text ----


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
    with open_bytes(path) as file:
        for number, line in enumerate(file, 1):
            yield number, offset, decode(line, path, number, offset)
            offset += len(line)
