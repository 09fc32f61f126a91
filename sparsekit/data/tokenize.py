"""Text to shards: many processes, one order, and a journal from which a killed job goes on.

The documents are read here, in order, and handed out in chunks; worker processes encode them; what comes back is
written in the order in which it was read. So the files depend on the source, the tokenizer and the sizes alone, not
on how many worked on them. A line of the journal is a finished shard: after a kill each split goes on behind its last.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsekit.data.paths import find_files
from sparsekit.data.shard_sources import TOKENIZER
from sparsekit.data.shards import FORMAT, Layout, ShardWriter, read_manifest
from sparsekit.data.sources import SPLITS, LocalFiles, Source, SplitSource
from sparsekit.data.tokenizers import Tokenizer
from sparsekit.data.workers import Item, encoding
from sparsekit.errors import DataError
from sparsekit.files import MANIFEST, write_json
from sparsekit.spec.slot import Choice

JOURNAL = "journal.jsonl"
SHARD_TOKENS = 1 << 26
LEARN_BYTES = 1 << 30  # what a vocabulary is learnt from at most: more changes little, and takes memory


@dataclass
class Progress:
    """How far a job is.

    Attributes:
        documents, tokens, bytes: written or waiting to be, of both splits; those of an earlier run included.
        seconds: since this run began.
        new_tokens: of this run, for its speed.
        removed: training documents left out, as validation holds them too.
        blank: documents without text left out.
        done: whether all is written.
    """

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    new_tokens: int = 0
    removed: int = 0
    blank: int = 0
    done: bool = False
    began: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.began


def tokenize(
    source: Choice,
    tokenizer: Choice,
    out: Path,
    *,
    workers: int | None = None,
    shard_tokens: int = SHARD_TOKENS,
    max_tokens: int | None = None,
    layout: Layout = "npy",
    progress: Callable[[Progress], None] = lambda _: None,
) -> dict[str, Any]:
    """Encodes both splits of a source into a folder of shards, and gives its manifest.

    A folder that the same job left unfinished is gone on with; one that it finished is left as it is.

    Args:
        source, tokenizer: fill the slots of these kinds. A tokenizer that learns does so from the first
            gigabyte of training documents.
        out: the folder.
        workers: processes that encode; None for one a core. The files do not depend on it.
        shard_tokens: most tokens of a shard, but for a document that is longer.
        max_tokens: stops after the document with which the training split reaches it; None for all.
        layout: ``"npy"``, or ``"raw"`` for tokens without a header, as OLMo reads them.
        progress: called now and then, and at the end.

    Raises:
        DataError: the text cannot be read, a split has none, or ``out`` holds something else.
    """
    reader: Source = source.cls(source.params)
    settings = {
        "source": source.dump(),
        "files": _files(reader),
        "tokenizer": tokenizer.dump(),
        "tokenizer_sha256": _sha256(getattr(tokenizer.params, "path", None)),
        "layout": layout,
        "shard_tokens": shard_tokens,
        "max_tokens": max_tokens,
    }
    journal = Journal(out, settings)
    finished = journal.finished()
    if finished is not None:
        return finished
    journal.begin()
    encoder = _prepare_tokenizer(tokenizer, reader, out / TOKENIZER)
    writers = {split: ShardWriter(out, split, layout, encoder.dtype, encoder.eos_id, shard_tokens) for split in SPLITS}
    state = Progress()
    for split, record in journal.records():
        writers[split].resume(record)
        state.documents += record["n_documents"]
        state.tokens += record["n_tokens"]
        state.bytes += record["n_bytes"]
    reading = Reading(reader, writers, max_tokens)
    with encoding(encoder, out / TOKENIZER, workers) as encode:
        for item, ids in encode(reading.items()):
            closed = writers[item.split].add(ids, len(item.data))
            if closed is not None:
                journal.add(item.split, closed)
            n_tokens = len(ids) // encoder.dtype.itemsize + 1
            state.documents, state.bytes = state.documents + 1, state.bytes + len(item.data)
            state.tokens, state.new_tokens = state.tokens + n_tokens, state.new_tokens + n_tokens
            state.removed, state.blank = item.removed, item.blank
            progress(state)
            if item.split == "train" and max_tokens is not None and writers["train"].n_tokens >= max_tokens:
                break
        else:
            state.removed, state.blank = reading.removed, reading.blank  # those after the last document too
    for split, writer in writers.items():
        closed = writer.close()
        if closed is not None:
            journal.add(split, closed)
        if not writer.records:
            raise DataError(f"{out}: the {split} split got no documents; {_mend(split, state, max_tokens)}")
    manifest = {
        "format": FORMAT,
        "layout": layout,
        "dtype": encoder.dtype.name,
        "vocab_size": encoder.vocab_size,
        "eos_id": encoder.eos_id,
        "eos": "end",  # one after each document, none before
        "tokenizer": {**tokenizer.dump(), "fingerprint": encoder.fingerprint},
        "validation_fraction": _fraction(reader),
        "documents_removed_from_train": state.removed,
        "blank_documents_skipped": state.blank,
        "settings": settings,
        "splits": {split: writer.totals() for split, writer in writers.items()},
    }
    write_json(out / MANIFEST, manifest)
    journal.end()
    state.done = True
    progress(state)
    return manifest


def _prepare_tokenizer(choice: Choice, source: Source, path: Path) -> Tokenizer:
    """The tokenizer that the folder holds, or else a new one, which is then kept there."""
    if path.exists():
        loaded: Tokenizer = choice.cls.load(choice.params, path)
        return loaded
    fitted: Tokenizer = choice.cls(choice.params)
    fitted.fit(_first_bytes(source.documents("train"), LEARN_BYTES))
    fitted.save(path)
    return fitted


def _first_bytes(documents: Iterable[str], limit: int) -> Iterator[str]:
    """Documents until they have so many characters together."""
    for text in documents:
        yield text
        limit -= len(text)
        if limit <= 0:
            return


def _fraction(source: Source) -> float | None:
    split_by_us = isinstance(source, SplitSource) and not source.is_split_by_user
    return float(source.params.validation_fraction) if split_by_us else None


def _mend(split: str, state: Progress, max_tokens: int | None) -> str:
    if split == "train" and state.removed:
        return f"all {state.removed} of them are validation documents too: give others"
    return "raise --max-tokens" if max_tokens is not None else "give text that has some"


def _sha256(path: str | None) -> str | None:
    """Of a tokenizer's file, so that a job does not go on with another; None where there is none to read."""
    file = Path(path or "").expanduser()
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None


def _files(source: Source) -> list[list[Any]]:
    """(file, bytes) of what local files are read, so that a job does not go on over other text."""
    if not isinstance(source, LocalFiles):
        return []
    names = ("path", "validation_path")
    given = [(getattr(source.params, name), name) for name in names if getattr(source.params, name) is not None]
    files = [file for paths, name in given for file in find_files(paths, name, source.suffix)]
    return [[str(file), file.stat().st_size] for file in files if file.exists()]


# ---- reading ----


class Reading:
    """What is still to be encoded, in the order in which it is written.

    Attributes:
        removed, blank: documents left out so far, see :class:`Progress`.
    """

    def __init__(self, source: Source, writers: dict[str, ShardWriter], max_tokens: int | None):
        self.source, self.removed = source, 0
        self._written = {split: writer.totals()["n_documents"] for split, writer in writers.items()}
        self._is_enough = max_tokens is not None and writers["train"].n_tokens >= max_tokens

    @property
    def blank(self) -> int:
        return self.source.n_blank if isinstance(self.source, SplitSource) else 0

    def items(self) -> Iterator[Item]:
        """The documents of both splits, without those that finished shards hold."""
        passed = dict.fromkeys(SPLITS, 0)
        for split, data in self._placed():
            passed[split] += 1
            if passed[split] > self._written[split]:
                yield Item(split, data, self.removed, self.blank)
            elif self._is_enough and split == "train" and passed[split] == self._written[split]:
                return  # the shards on the disk end where the job would have ended

    def _placed(self) -> Iterator[tuple[str, bytes]]:
        if isinstance(self.source, SplitSource) and not self.source.is_split_by_user:
            for split, text in self.source.placed():
                yield split, text.encode()
            return
        held_out = set()
        for text in self.source.documents("validation"):
            data = text.encode()
            held_out.add(_digest(data))
            yield "validation", data
        for text in self.source.documents("train"):
            data = text.encode()
            if _digest(data) in held_out:
                self.removed += 1
            else:
                yield "train", data


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


# ---- the journal ----


class Journal:
    """``journal.jsonl``: the job's settings, then a line for each finished shard; gone when the manifest is there."""

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self.folder, self.path = folder, folder / JOURNAL
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))

    def finished(self) -> dict[str, Any] | None:
        """The manifest, if this job is done.

        Raises:
            DataError: the folder is another job's.
        """
        if not (self.folder / MANIFEST).exists():
            return None
        manifest = read_manifest(self.folder)
        self._compare(manifest.get("settings", {}), "holds the shards of another job")
        self.path.unlink(missing_ok=True)  # a kill came between the two
        return manifest

    def begin(self) -> None:
        """Starts the journal, or checks that it is this job's; one of a job that wrote no shard is started over.

        Raises:
            DataError: it is another job's, or the folder holds other things.
        """
        lines = self._lines()
        if len(lines) > 1:
            self._compare(lines[0], "holds a part of another job")
        elif lines and lines[0] != self.settings:
            self.path.unlink()
            (self.folder / TOKENIZER).unlink(missing_ok=True)
            lines = []
        if lines:
            for file in self.folder.glob(".*.tmp"):  # what a killed process was writing
                file.unlink()
            return
        strangers = sorted(file.name for file in self.folder.iterdir()) if self.folder.is_dir() else []
        if strangers:
            raise DataError(f"{self.folder}: holds {strangers[0]} and no journal of a job; give a new folder as --out")
        self._append(self.settings)

    def records(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """(split, record) of the shards that are finished.

        Raises:
            DataError: a file of one is missing or changed in size.
        """
        for line in self._lines()[1:]:
            for file in line["record"]["files"]:
                path = self.folder / file["name"]
                if not path.is_file() or path.stat().st_size != file["bytes"]:
                    raise DataError(f"{path}: is not as the job wrote it; remove {self.folder} and start over")
            yield line["split"], line["record"]

    def add(self, split: str, record: dict[str, Any]) -> None:
        """Notes a shard whose files are on the disk."""
        self._append({"split": split, "record": record})

    def end(self) -> None:
        """Removes the journal, as the manifest tells all."""
        self.path.unlink()

    def _append(self, line: dict[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _lines(self) -> list[dict[str, Any]]:
        """What is noted; a last line that a kill cut short is removed from the file."""
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            os.truncate(self.path, len(whole))
        try:
            return [json.loads(line) for line in whole.splitlines()]
        except ValueError as error:
            raise DataError(f"{self.path}: is damaged ({error}); remove {self.folder} and start over") from None

    def _compare(self, theirs: dict[str, Any], what: str) -> None:
        for name, mine in self.settings.items():
            if mine != theirs.get(name):
                raise DataError(
                    f"{self.folder}: {what}: its {name} is {_short(theirs.get(name))}, and this one's {_short(mine)}; "
                    "give a new folder as --out, or the same settings"
                )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 200 else text[:200] + " …"
