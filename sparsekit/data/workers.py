"""Documents to ids, in the order in which they come, by as many processes as there are cores."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from sparsekit.data import word_cache
from sparsekit.data.tokenizers import Tokenizer
from sparsekit.errors import DataError

CHUNK_BYTES = 1 << 20  # encoded at a time by a worker
AHEAD = 3  # chunks a worker, read before they are needed


class Item(NamedTuple):
    """A document on its way: its split, its text in UTF-8, and how many were left out before it (see Progress)."""

    split: str
    data: bytes
    removed: int
    blank: int


Encode = Callable[[Iterable[Item]], Iterator[tuple[Item, bytes]]]
_encode_texts: Callable[[list[str]], list[bytes]]  # a worker's own


@contextmanager
def encoding(tokenizer: Tokenizer, path: Path, count: int | None) -> Iterator[Encode]:
    """What encodes items in order: so many processes, or this one where one is enough."""
    count = count or _n_cores()
    if count == 1:
        encode_texts = word_cache.encoder(tokenizer)

        def encode_here(items: Iterable[Item]) -> Iterator[tuple[Item, bytes]]:
            for chunk in _chunks(items):
                yield from zip(chunk, encode_texts([item.data.decode() for item in chunk]), strict=True)

        yield encode_here
        return
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are as many as the cores; they inherit this
    pool = ProcessPoolExecutor(
        count,
        multiprocessing.get_context("spawn"),  # a forked process would share the locks of torch's and rust's threads
        initializer=_begin_worker,
        initargs=(type(tokenizer), tokenizer.params, path),
    )

    def encode(items: Iterable[Item]) -> Iterator[tuple[Item, bytes]]:
        chunks = _chunks(items)
        waiting: deque[tuple[list[Item], Future[list[bytes]]]] = deque()
        failed: DataError | None = None
        try:
            while True:
                try:
                    for chunk in islice(chunks, count * AHEAD - len(waiting)):
                        waiting.append((chunk, pool.submit(_encode_chunk, [item.data for item in chunk])))
                except DataError as error:  # of reading: what was read before it comes first
                    failed = error
                if not waiting and failed is not None:
                    raise failed
                if not waiting:
                    return
                chunk, future = waiting.popleft()
                yield from zip(chunk, future.result(), strict=True)
        except BrokenProcessPool:
            raise DataError(
                "a worker process died, perhaps for want of memory; run the same command again to go on, "
                "or with fewer --workers"
            ) from None

    try:
        yield encode
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def _n_cores() -> int:
    """Those that this process may use, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _begin_worker(cls: type[Tokenizer], params: Any, path: Path) -> None:
    global _encode_texts
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent tells when to stop
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _encode_texts = word_cache.encoder(cls.load(params, path))


def _end_with_parent() -> None:
    """A parent that is killed cannot tell its workers; they would wait for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _encode_chunk(chunk: list[bytes]) -> list[bytes]:
    return _encode_texts([data.decode() for data in chunk])


def _chunks(items: Iterable[Item]) -> Iterator[list[Item]]:
    """The items in lists of about CHUNK_BYTES; what is wrong with one is raised when those before it are out."""
    chunk: list[Item] = []
    size = 0
    failed: DataError | None = None
    try:
        for item in items:
            chunk.append(item)
            size += len(item.data)
            if size >= CHUNK_BYTES:
                yield chunk
                chunk, size = [], 0
    except DataError as error:
        failed = error
    if chunk:
        yield chunk
    if failed is not None:
        raise failed
