"""Documents read, encoded, packed and shuffled while training, for text too large to be encoded before.

torchdata's StatefulDataLoader brings the processes and gathers their states; what a reader does is here. Nothing is
held whole: a reader keeps one chunk of documents and a buffer of windows.

Shapes: B windows a batch, T1 = T + 1 tokens a window.
"""

from __future__ import annotations

import base64
import os
import warnings
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from torch import Generator
from torch.utils.data import IterableDataset, get_worker_info

from sparsekit.data.order import Mixture, mix, subseed
from sparsekit.data.packing import HostBatch, pack
from sparsekit.data.sources import Source
from sparsekit.data.tokenizers import Ids, Tokenizer
from sparsekit.errors import DataError

CHUNK = 1 << 18  # characters encoded at a time
SNAPSHOT_EVERY = 64  # batches: a state is the last snapshot and how many batches to read on from it
GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # SplitMix64's step
TOKENIZE = "`sparsekit tokenize` the text and train on its shards"


@dataclass(frozen=True)
class Text:
    """What to stream.

    Attributes:
        sources: with their weights over windows.
        tokenizer: fitted.
        seq_len: T, inputs a window.
        document_mask: whether batches tell documents apart.
        buffer: how many windows a reader shuffles among.
        seed: determines the order.
    """

    sources: list[tuple[Source, float]]
    tokenizer: Tokenizer
    seq_len: int
    document_mask: bool
    buffer: int
    seed: int

    def __reduce__(self) -> tuple[Any, ...]:
        # a tokenizer travels to a worker as it does to a file: the library's own pickle forgets its settings
        learnt = (type(self.tokenizer), self.tokenizer.params, self.tokenizer.state())
        return _text, (learnt, {f.name: getattr(self, f.name) for f in fields(self) if f.name != "tokenizer"})


def _text(learnt: tuple[type[Tokenizer], Any, dict[str, Any]], rest: dict[str, Any]) -> Text:
    cls, params, state = learnt
    tokenizer = cls(params)
    tokenizer.restore(state)
    return Text(tokenizer=tokenizer, **rest)


class Packer:
    """One reader's documents of one source as windows without end, epoch after epoch.

    Documents i of the source with i % n_readers == reader are one stream, each followed by its end of text; a window
    begins with the last token of the one before, so that every token but the very first is a target once.

    Attributes:
        place: (epoch, document, token in it) that the next window begins with; all that a resume needs.
    """

    def __init__(self, source: Source, tokenizer: Tokenizer, reader: int, n_readers: int):
        self.source, self.tokenizer, self.reader, self.n_readers = source, tokenizer, reader, n_readers
        self.go_to((0, 0, 0))

    def go_to(self, place: tuple[int, int, int]) -> None:
        """Goes on from a place; the documents before it are read over when the next window is asked for."""
        epoch, document, self._offset = place
        self._first = (epoch, document)
        self._texts = self._read(epoch, document)
        self._pending: deque[tuple[int, int, Ids]] = deque()  # epoch, document, its tokens

    @property
    def place(self) -> tuple[int, int, int]:
        epoch, document = self._pending[0][:2] if self._pending else self._first
        return epoch, document, self._offset

    def fill(self, row_T1: Ids) -> None:
        """Writes the next window."""
        filled = number = 0
        while filled < len(row_T1):
            if number == len(self._pending):
                self._encode()
            begin = self._offset if number == 0 else 0
            tokens = self._pending[number][2][begin : begin + len(row_T1) - filled]
            row_T1[filled : filled + len(tokens)] = tokens
            filled, number = filled + len(tokens), number + 1
        self._offset += len(row_T1) - 1
        while self._offset >= len(self._pending[0][2]):
            self._offset -= len(self._pending.popleft()[2])

    def _encode(self) -> None:
        chunk, size = [], 0
        while size < CHUNK:
            chunk.append(next(self._texts))
            size += len(chunk[-1][2]) + 1
        end = np.array([self.tokenizer.eos_id], self.tokenizer.dtype)
        encoded = self.tokenizer.encode_batch([text for _, _, text in chunk])
        for (epoch, document, _), ids in zip(chunk, encoded, strict=True):
            self._pending.append((epoch, document, np.concatenate((ids, end))))

    def _read(self, epoch: int, first: int) -> Iterator[tuple[int, int, str]]:
        while True:
            count = mine = 0
            for document, text in enumerate(self.source.documents("train")):
                count += 1
                if document % self.n_readers == self.reader:
                    mine += 1
                    if document >= first:
                        yield epoch, document, text
            if not mine:
                raise DataError(
                    f"data.streaming: the source has {count} training documents for {self.n_readers} readers (ranks "
                    f"times workers), and each needs one; use fewer, or {TOKENIZE}"
                )
            if first >= count:
                raise DataError(
                    f"data.streaming: the checkpoint was reading document {first}, and the source has only {count} by "
                    "now; put the text back, or start over with --resume never"
                )
            epoch, first = epoch + 1, 0


class Reader:
    """One reader's batches: a buffer of windows, of which one at random goes out and the next comes in.

    The random numbers are a function of a counter, the windows given so far; several sources take turns as
    :class:`~sparsekit.data.order.Mixture` says. An iterator as torchdata wants it, with a state of JSON values.
    """

    def __init__(self, text: Text, batch_size: int, reader: int, n_readers: int):
        self.batch_size = batch_size
        self.packers = [Packer(source, text.tokenizer, reader, n_readers) for source, _ in text.sources]
        weights = [weight for _, weight in text.sources]
        self.mixture = Mixture(weights, subseed(text.seed, f"mixture {reader}")) if len(weights) > 1 else None
        self.key = np.uint64(subseed(text.seed, f"shuffle {reader}"))
        self.buffer = np.zeros((text.buffer, text.seq_len + 1), text.tokenizer.dtype)
        self.given = 0
        self.full = False

    def __iter__(self) -> Reader:
        return self

    def __next__(self) -> Ids | DataError:
        try:
            return self._batch()
        except DataError as error:  # handed on and raised there, as torch would wrap it in a traceback
            return error

    def _batch(self) -> Ids:
        size = len(self.buffer)
        if not self.full:
            for row, packer in zip(self.buffer, self._packers(0, size), strict=True):
                packer.fill(row)
            self.full = True
        numbers = np.arange(self.given, self.given + self.batch_size)
        chosen = mix(self.key + numbers.astype(np.uint64) * GOLDEN) % np.uint64(size)
        batch = np.empty((self.batch_size, self.buffer.shape[1]), self.buffer.dtype)
        coming = self._packers(size + self.given, self.batch_size)
        for row, place, packer in zip(batch, chosen.tolist(), coming, strict=True):
            row[:] = self.buffer[place]
            packer.fill(self.buffer[place])
        self.given += self.batch_size
        return batch

    def _packers(self, first: int, count: int) -> list[Packer]:
        """Whose windows come in as number [first, first + count)."""
        if self.mixture is None:
            return self.packers * count
        return [self.packers[i] for i in self.mixture.at(np.arange(first, first + count))[0].tolist()]

    def state_dict(self) -> dict[str, Any]:
        buffer = base64.b64encode(self.buffer.tobytes()).decode() if self.full else None
        return {"given": self.given, "places": [list(packer.place) for packer in self.packers], "buffer": buffer}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.given, self.full = state["given"], state["buffer"] is not None
        for packer, place in zip(self.packers, state["places"], strict=True):
            packer.go_to(tuple(place))
        if self.full:
            stored = np.frombuffer(base64.b64decode(state["buffer"]), self.buffer.dtype)
            self.buffer[:] = stored.reshape(self.buffer.shape)


class _Readers(IterableDataset[Any]):
    """Makes the reader of whichever worker it finds itself in."""

    def __init__(self, text: Text, batch_size: int, rank: int, world_size: int):
        self.text, self.batch_size, self.rank, self.world_size = text, batch_size, rank, world_size

    def __iter__(self) -> Reader:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        return Reader(self.text, self.batch_size, self.rank * workers + number, self.world_size * workers)


def _unchanged(batch: Any) -> Any:
    return batch


def _one_thread(worker: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism


class StreamLoader:
    """A rank's micro-batches from its readers in turn; goes on exactly, under the same ranks and workers only.

    Its state holds every reader's buffer, 4/3 x 2 bytes a token of it as text: buffer 2048 x T 1024 is 5.6 MB a reader.
    With workers a script that trains needs the guard ``if __name__ == "__main__":``, as they import it.

    Args:
        text: what to stream.
        micro_batch_size: windows a batch.
        workers: processes that read for this rank; 0 to read in its own.
        rank, world_size: whose share this is.

    Raises:
        DataError: torchdata is not installed.
    """

    elastic = False

    def __init__(self, text: Text, micro_batch_size: int, workers: int = 0, rank: int = 0, world_size: int = 1):
        if micro_batch_size < 1 or not 0 <= rank < world_size or workers < 0:
            raise ValueError(f"micro_batch_size {micro_batch_size}, rank {rank} of {world_size}, {workers} workers")
        self.text, self.workers = text, workers
        self._readers = {"world_size": world_size, "workers": workers, "micro_batch_size": micro_batch_size}
        self._rank = rank
        self._eos_id = text.tokenizer.eos_id if text.document_mask else None
        dataset = _Readers(text, micro_batch_size, rank, world_size)
        self._loader = _stateful_loader(dataset, workers)
        self._iterator: Iterator[Any] | None = None
        self._snapshot: dict[str, Any] | None = None
        self._since = 0  # batches given after the snapshot

    @property
    def n_windows(self) -> int:
        """Not known.

        Raises:
            DataError: always.
        """
        raise DataError(
            "data.streaming: how long an epoch is shows only when it was read; set train.max_steps or train.max_tokens"
        )

    def next(self) -> HostBatch:
        """The next micro-batch.

        Raises:
            DataError: the text cannot be read, or is too little for its readers; or a worker process ended.
        """
        batch = pack(self._read(), self._eos_id)
        self._since += 1
        if self._since == SNAPSHOT_EVERY:
            self._snapshot, self._since = self._loader.state_dict(), 0
        return batch

    def _read(self) -> Ids:
        if self._iterator is None:
            self._iterator = iter(self._loader)
        try:
            batch: Ids | DataError = next(self._iterator)
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker (pid"):  # how torch tells that one died
                raise
            raise DataError(
                f"data.streaming: a worker process died ({str(error).splitlines()[0]}), out of memory or because the "
                "script that trains lacks the guard if __name__ == '__main__'; data.streaming.workers 0 needs none"
            ) from error
        if isinstance(batch, DataError):
            raise batch
        return batch

    def state(self) -> dict[str, Any]:
        """JSON values, this rank's own: the last snapshot of its readers, and how many batches were read since."""
        return {**self._readers, "rank": self._rank, "snapshot": self._snapshot, "since": self._since}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state of the same rank, world size and workers.

        Raises:
            DataError: it is of others; says both.
        """
        if "snapshot" not in state:
            raise DataError(
                "the checkpoint's place in the data is not a stream's; resume with the data section that it was "
                "trained with, or start over with --resume never"
            )
        mine = {**self._readers, "rank": self._rank}
        theirs = {name: state[name] for name in mine}
        if theirs != mine:
            told = [", ".join(f"{name} {value}" for name, value in one.items()) for one in (theirs, mine)]
            raise DataError(
                f"data.streaming: the checkpoint's stream is of {told[0]}, this one of {told[1]}, and a stream goes on "
                f"only under the same; go back to those, or {TOKENIZE}, from which any world size can go on"
            )
        self.close()
        self._loader.load_state_dict(state["snapshot"] or {})
        self._snapshot, self._since = state["snapshot"], state["since"]
        for _ in range(self._since):
            self._read()

    def close(self) -> None:
        """Ends the worker processes."""
        self._iterator = None
        self._loader.load_state_dict({})  # drops its iterator, and with it the processes


def _stateful_loader(dataset: _Readers, workers: int) -> Any:
    try:
        from torchdata.stateful_dataloader import StatefulDataLoader
    except ImportError:
        raise DataError("data.streaming needs torchdata; pip install 'sparsekit[streaming]'") from None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "'set_vital' is deprecated")  # which torchdata calls
        return StatefulDataLoader(
            dataset,
            batch_size=None,
            num_workers=workers,
            collate_fn=_unchanged,
            worker_init_fn=_one_thread if workers else None,
            # a fork of a process whose threads hold locks can hang: there are torch's, the tokenizer's, prefetching's
            multiprocessing_context="spawn" if workers else None,
            generator=Generator(),  # else it draws from the global one, and training would go on with other numbers
            snapshot_every_n_steps=SNAPSHOT_EVERY,
        )
