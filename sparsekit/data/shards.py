"""Tokens in files: what a folder of shards holds, how it is written, checked, and read without being loaded.

::

    manifest.json              what the tokens are: tokenizer, vocabulary, end of text, source, files and their hashes
    tokenizer.json             by which they were made
    train-00000.npy            tokens, document after document, each followed by its end of text; uint16 or uint32
    train-00000.starts.npy     where each document of the shard begins in it; uint64
    validation-00000.npy …

All numbers are little-endian. A document lies in one shard, whole. In the layout ``raw`` the tokens have no header
(``train-00000.bin``), as OLMo and others keep theirs, and where documents begin is told by the ends of text alone.
"""

from __future__ import annotations

import hashlib
import io
import json
import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sparsekit.data.token_set import rows_inside
from sparsekit.data.tokenizers import Ids
from sparsekit.errors import DataError, did_you_mean
from sparsekit.files import MANIFEST, written_whole

FORMAT = 1
Layout = Literal["npy", "raw"]
SUFFIXES = {"npy": ".npy", "raw": ".bin"}
NPY_MAGIC = b"\x93NUMPY"
DTYPES = ("uint16", "uint32")
Places = np.ndarray[Any, np.dtype[np.int64]]
MEND = "tokenize it anew, or restore the file"


# ---- reading ----


@dataclass(frozen=True)
class Shard:
    """One file of tokens, mapped into memory when it is first asked for.

    Attributes:
        path: the file.
        dtype: of its tokens.
        n_tokens: how many it holds.
        starts_path: where its documents' begins lie; None where only ends of text tell.
        eos_id: the id that ends a document.
    """

    path: Path
    dtype: np.dtype[Any]
    n_tokens: int
    starts_path: Path | None
    eos_id: int

    @cached_property
    def tokens(self) -> Ids:
        """[n_tokens], in the file; refused where they are not what the manifest says."""
        offset = 0 if self.starts_path is None else _header_bytes(self.path, self.dtype, self.n_tokens)
        # Windows lie anywhere, so that reading on around each would cost more than the window; a raw file, on the
        # other hand, is read through to find its documents.
        return _mapped(self.path, self.dtype, self.n_tokens, offset, anywhere=self.starts_path is not None)

    def starts(self, begins_document: bool) -> Places:
        """Where documents begin in the shard; the first token begins one if what precedes it ended one."""
        if self.starts_path is not None:
            return self._starts
        after_ends = self._ends + 1
        after_ends = after_ends[after_ends < self.n_tokens]
        return np.concatenate(([0], after_ends)) if begins_document else after_ends

    @cached_property
    def _starts(self) -> Places:
        assert self.starts_path is not None
        n_starts, offset = _read_header(self.starts_path, np.dtype("<u8"))
        return _mapped(self.starts_path, np.dtype("<i8"), n_starts, offset)  # far below 2^63

    @cached_property
    def _ends(self) -> Places:
        parts = [np.empty(0, np.int64)]
        for first in range(0, self.n_tokens, 1 << 24):  # a mask of the whole would be as large as half the tokens
            parts.append(np.flatnonzero(self.tokens[first : first + (1 << 24)] == self.eos_id) + first)
        return np.concatenate(parts)


class TokenFiles:
    """The tokens of several files as one stream; nothing is read but what is asked for.

    Args:
        shards: the files, in order.
        vocab_size: where it is given, rows with an id that is not below it are refused; on a GPU such a one would end
            the process without a word.
        mend: what to do then.
    """

    def __init__(self, shards: Sequence[Shard], vocab_size: int | None = None, mend: str = ""):
        self.shards, self.dtype, self.vocab_size, self.mend = list(shards), shards[0].dtype, vocab_size, mend
        self._bounds = np.concatenate(([0], np.cumsum([shard.n_tokens for shard in shards], dtype=np.int64)))

    def __len__(self) -> int:
        return int(self._bounds[-1])

    @property
    def n_documents(self) -> int:
        """How many documents begin in the stream."""
        return int(self._n_starts[-1])

    def rows(self, begins_B: np.ndarray[Any, Any], length: int) -> Ids:
        """[B, length] tokens from each begin on, a copy; past the stream's end its last token is repeated.

        Raises:
            DataError: one is outside the vocabulary.
        """
        begins_B = np.asarray(begins_B, dtype=np.int64)
        rows = self._rows(begins_B, length)
        if self.vocab_size is not None and rows.size and (highest := int(rows.max())) >= self.vocab_size:
            begin = begins_B[int(rows.max(axis=1).argmax())]
            path = self.shards[int(np.searchsorted(self._bounds, begin, side="right")) - 1].path
            told = f"{path}: it or the file after it holds token {highest}, and the tokenizer has {self.vocab_size}"
            raise DataError(f"{told}; {self.mend}")
        return rows

    def _rows(self, begins_B: Places, length: int) -> Ids:
        shards_B = np.searchsorted(self._bounds, begins_B, side="right") - 1
        locals_B = begins_B - self._bounds[np.minimum(shards_B, len(self.shards) - 1)]
        first, last = int(shards_B.min(initial=0)), int(shards_B.max(initial=0))
        if first == last < len(self.shards):
            tokens = self.shards[first].tokens
            if int(locals_B.max(initial=0)) + length <= len(tokens):
                return rows_inside(tokens, locals_B, length)
        rows = np.empty((len(begins_B), length), self.dtype)
        for row, shard, local in zip(rows, shards_B.tolist(), locals_B.tolist(), strict=True):
            filled = 0
            while filled < length and shard < len(self.shards):
                part = self.shards[shard].tokens[local : local + length - filled]
                row[filled : filled + len(part)] = part
                filled, shard, local = filled + len(part), shard + 1, 0
            if filled < length:
                row[filled:] = self.shards[-1].tokens[-1]
        return rows

    def documents(self, places: np.ndarray[Any, Any]) -> Places:
        """The number of the document at each place of the stream; n_documents for places past its end."""
        places = np.asarray(places, dtype=np.int64)
        shards = np.searchsorted(self._bounds, places, side="right") - 1
        numbers = np.full(places.shape, self.n_documents, np.int64)
        for shard in np.unique(shards[shards < len(self.shards)]).tolist():
            here = shards == shard
            local = places[here] - self._bounds[shard]
            numbers[here] = self._n_starts[shard] + np.searchsorted(self._starts(shard), local, side="right") - 1
        return numbers

    def document(self, number: int) -> Ids:
        """The tokens of a document, its end of text included."""
        if not 0 <= number < self.n_documents:
            raise IndexError(f"document {number} of {self.n_documents}")
        begin = self._begin(number)
        end = len(self) if number + 1 == self.n_documents else self._begin(number + 1)
        tokens: Ids = self.rows(np.array([begin]), end - begin)[0]
        return tokens

    def _begin(self, number: int) -> int:
        shard = int(np.searchsorted(self._n_starts, number, side="right")) - 1
        return int(self._bounds[shard] + self._starts(shard)[number - self._n_starts[shard]])

    def _starts(self, shard: int) -> Places:
        before = self.shards[shard - 1] if shard else None
        return self.shards[shard].starts(before is None or bool(before.tokens[-1] == before.eos_id))

    @cached_property
    def _n_starts(self) -> Places:
        """[n_shards + 1]: how many documents begin before each shard."""
        counts = [len(self._starts(shard)) for shard in range(len(self.shards))]
        return np.concatenate(([0], np.cumsum(counts, dtype=np.int64)))


class ShardedTokens(TokenFiles):
    """The tokens of a split of a folder that has a manifest; a :class:`~sparsekit.data.token_set.Tokens`.

    Attributes:
        fingerprint: SHA-256 of the hashes of the files: equal exactly where tokens and documents are, so that a copy
            of the folder elsewhere has the same.
        n_bytes: UTF-8 bytes of the text.
    """

    def __init__(
        self, shards: Sequence[Shard], n_documents: int, n_bytes: int, fingerprint: str, vocab_size: int | None = None
    ):
        super().__init__(shards, vocab_size, f"restore what sparsekit tokenize --verify {shards[0].path.parent} names")
        self._n_documents, self.n_bytes, self.fingerprint = n_documents, n_bytes, fingerprint

    @property
    def n_documents(self) -> int:
        return self._n_documents


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder of shards.

    Raises:
        DataError: there is none, it is damaged, or of a later format.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if (folder / "journal.jsonl").exists():
            raise DataError(f"{folder}: is not finished; run the same sparsekit tokenize again to go on") from None
        raise DataError(f"{path}: no such file; give a folder that sparsekit tokenize wrote") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); {MEND}") from None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("splits"), dict):
        raise DataError(f"{path}: is no manifest of shards; give a folder that sparsekit tokenize wrote")
    if manifest.get("format") != FORMAT:
        raise DataError(
            f"{path}: is of format {manifest.get('format')}, and this version of sparsekit reads {FORMAT}; "
            "use the version that wrote it"
        )
    try:
        sound = all(_signs(manifest))
    except (KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise DataError(f"{path}: is damaged; {MEND}")
    return manifest


def _signs(manifest: dict[str, Any]) -> Iterator[bool]:
    """Whether what is read later is there, and of its type."""
    yield manifest["layout"] in SUFFIXES and manifest["dtype"] in DTYPES and type(manifest["eos_id"]) is int
    for split in manifest["splits"].values():
        yield all(type(split[name]) is int for name in ("n_tokens", "n_documents", "n_bytes")) and bool(split["shards"])
        for record in split["shards"]:
            yield type(record["n_tokens"]) is int
            yield len(record["files"]) == (2 if manifest["layout"] == "npy" else 1)
            for file in record["files"]:
                yield type(file["bytes"]) is int and type(file["name"]) is str and type(file["sha256"]) is str


def open_shards(folder: Path | str, split: str, vocab_size: int | None = None) -> ShardedTokens:
    """The tokens of a split, from what the manifest says and the sizes of the files; their content is not read.

    Args:
        vocab_size: of the tokenizer that they must fit.

    Raises:
        DataError: a file is missing or of another size, the split is unknown, or the layout is raw.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if manifest["layout"] != "npy":
        raise DataError(f"{folder}: holds raw tokens; set data.source to {json.dumps(raw_source(folder, manifest))}")
    told = _split(manifest, split)
    shards = []
    for record in told["shards"]:
        for file in record["files"]:
            _check_size(folder, file)
        tokens, starts = (folder / file["name"] for file in record["files"])
        dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
        shards.append(Shard(tokens, dtype, record["n_tokens"], starts, manifest["eos_id"]))
    hashes = [file["sha256"] for record in told["shards"] for file in record["files"]]
    fingerprint = hashlib.sha256(json.dumps(hashes).encode()).hexdigest()
    return ShardedTokens(shards, told["n_documents"], told["n_bytes"], fingerprint, vocab_size)


def verify_shards(folder: Path | str) -> dict[str, Any]:
    """Holds every file of a folder against its manifest, byte for byte, and gives the manifest.

    Raises:
        DataError: a file is missing, cut short or changed.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    for told in manifest["splits"].values():
        for record in told["shards"]:
            for file in record["files"]:
                _check_size(folder, file)
                with (folder / file["name"]).open("rb") as stream:
                    if hashlib.file_digest(stream, "sha256").hexdigest() != file["sha256"]:
                        raise DataError(f"{folder / file['name']}: is not what was written (its hash differs); {MEND}")
    return manifest


def raw_source(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """The source by which a spec reads a folder of raw shards."""
    paths = {"path": f"{folder}/train-*.bin", "validation_path": f"{folder}/validation-*.bin"}
    return {"type": "raw_shards", **paths, "dtype": manifest["dtype"], "eos_id": manifest["eos_id"]}


def _split(manifest: dict[str, Any], split: str) -> dict[str, Any]:
    splits = manifest["splits"]
    if split not in splits:
        raise ValueError(f"unknown split {split!r}{did_you_mean(split, splits)}; splits: {', '.join(splits)}")
    told: dict[str, Any] = splits[split]
    return told


def _check_size(folder: Path, file: dict[str, Any]) -> None:
    path = folder / file["name"]
    try:
        size = path.stat().st_size
    except OSError:
        raise DataError(f"{path}: is missing from the shards; {MEND}") from None
    if size != file["bytes"]:
        what = "is cut short" if size < file["bytes"] else "has grown"
        raise DataError(f"{path}: {what}: it has {size} bytes where {file['bytes']} were written; {MEND}")


def _read_header(path: Path, dtype: np.dtype[Any]) -> tuple[int, int]:
    """(how many numbers a .npy file says it holds, how many bytes its header takes)."""
    try:
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, found = read(file)
            offset = file.tell()
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: has no .npy header ({error}); {MEND}") from None
    if len(shape) != 1 or found != dtype:
        raise DataError(f"{path}: holds {found} of shape {shape} where one row of {dtype} was written; {MEND}")
    return shape[0], offset


def _header_bytes(path: Path, dtype: np.dtype[Any], n_tokens: int) -> int:
    found, offset = _read_header(path, dtype)
    if found != n_tokens:
        raise DataError(f"{path}: its header tells of {found} tokens where {n_tokens} were written; {MEND}")
    return offset


def _mapped(path: Path, dtype: np.dtype[Any], count: int, offset: int, anywhere: bool = False) -> Any:
    try:
        mapped = np.memmap(path, dtype, "r", offset, (count,))
        if anywhere and hasattr(mmap, "MADV_RANDOM"):
            mapped._mmap.madvise(mmap.MADV_RANDOM)  # type: ignore[attr-defined]
        return np.asarray(mapped)  # as a plain array: every slice of a memmap object costs a microsecond more
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be mapped ({error}); {MEND}") from None


# ---- writing ----


class ShardWriter:
    """Fills the shards of one split, one after the other.

    A shard is closed before a document that would lead beyond ``shard_tokens``, so a document longer than that has a
    shard of its own. What is closed is on the disk; what is not is in memory only.
    """

    def __init__(self, folder: Path, split: str, layout: Layout, dtype: np.dtype[Any], eos_id: int, shard_tokens: int):
        self.folder, self.split, self.layout, self.shard_tokens = folder, split, layout, shard_tokens
        self.dtype = dtype.newbyteorder("<")
        self._end = np.array([eos_id], self.dtype).tobytes()
        self.records: list[dict[str, Any]] = []
        self.n_tokens = 0  # of all documents, those of closed shards included
        self._clear()

    def _clear(self) -> None:
        self._parts: list[bytes] = []
        self._lengths: list[int] = []
        self._n_tokens = self._n_bytes = 0

    def add(self, ids: bytes, n_bytes: int) -> dict[str, Any] | None:
        """Adds a document, and its end of text; gives the record of the shard that was closed before it, if any.

        Args:
            ids: the bytes of the document's ids, in the machine's order.
            n_bytes: of its text in UTF-8.
        """
        n_tokens = len(ids) // self.dtype.itemsize + 1
        full = self._n_tokens > 0 and self._n_tokens + n_tokens > self.shard_tokens
        closed = self.close() if full else None
        native = np.frombuffer(ids, self.dtype.newbyteorder("="))
        self._parts += (native.astype(self.dtype, copy=False).tobytes(), self._end)
        self._lengths.append(n_tokens)
        self._n_tokens, self._n_bytes = self._n_tokens + n_tokens, self._n_bytes + n_bytes
        self.n_tokens += n_tokens
        return closed

    def resume(self, record: dict[str, Any]) -> None:
        """Goes on behind a shard that an earlier writer closed."""
        self.records.append(record)
        self.n_tokens += record["n_tokens"]

    def close(self) -> dict[str, Any] | None:
        """Writes what there is as a shard, and gives its record; None if there is nothing."""
        if not self._parts:
            return None
        name = f"{self.split}-{len(self.records):05}"
        header = npy_header(self.dtype, self._n_tokens) if self.layout == "npy" else b""
        files = [self._write(name + SUFFIXES[self.layout], [header, *self._parts])]
        if self.layout == "npy":
            starts = np.concatenate(([0], np.cumsum(self._lengths[:-1], dtype="<u8"))).astype("<u8")
            parts = [npy_header(starts.dtype, len(starts)), starts.tobytes()]
            files.append(self._write(name + ".starts.npy", parts))
        counts = {"n_tokens": self._n_tokens, "n_documents": len(self._lengths), "n_bytes": self._n_bytes}
        record = {**counts, "files": files}
        self.records.append(record)
        self._clear()
        return record

    def _write(self, name: str, parts: Sequence[bytes]) -> dict[str, Any]:
        digest = hashlib.sha256()
        n_bytes = 0
        with written_whole(self.folder / name) as temporary, temporary.open("wb") as file:
            for part in parts:
                digest.update(part)
                n_bytes += file.write(part)
        return {"name": name, "bytes": n_bytes, "sha256": digest.hexdigest()}

    def totals(self) -> dict[str, Any]:
        """The split as the manifest tells it; of closed shards only."""
        names = ("n_tokens", "n_documents", "n_bytes")
        return {**{name: sum(record[name] for record in self.records) for name in names}, "shards": self.records}


def npy_header(dtype: np.dtype[Any], count: int) -> bytes:
    """What a .npy file of one row of numbers begins with."""
    header = io.BytesIO()
    told = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(header, told)
    return header.getvalue()
