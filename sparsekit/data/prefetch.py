"""Batches read ahead by a thread, so that a step waits only where reading is slower than training."""

from __future__ import annotations

import queue
import threading
import time
import weakref
from collections.abc import Mapping
from typing import Any

from sparsekit.data.loader import Batches
from sparsekit.data.packing import HostBatch

Item = tuple[HostBatch | None, dict[str, Any], BaseException | None]  # a batch, the state after it, or what failed


class Prefetched:
    """The same batches as a loader's, up to ``depth`` of them read ahead.

    Args:
        loader: what is read; nobody else may read from it meanwhile.
        depth: batches ready at most.
        pin: puts them in page-locked memory, for ``batch.to(device, non_blocking=True)``; needs a GPU.

    Attributes:
        wait_seconds: how long :meth:`next` has waited in all; what training lost to reading.
    """

    def __init__(self, loader: Batches, depth: int = 2, pin: bool = False):
        if depth < 1:
            raise ValueError(f"depth is {depth}, and at least one batch is read ahead")
        self.loader, self.depth, self.pin = loader, depth, pin
        self.wait_seconds = 0.0
        self._state = loader.state()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    @property
    def elastic(self) -> bool:
        return self.loader.elastic

    @property
    def n_windows(self) -> int:
        return self.loader.n_windows

    def next(self) -> HostBatch:
        """The next batch.

        Raises:
            Exception: whatever reading it raised, then and at every further call.
        """
        if self._failure is not None:
            raise self._failure
        if self._thread is None:
            self._start()
        began = time.perf_counter()
        batch, state, failure = self._ready.get()
        self.wait_seconds += time.perf_counter() - began
        if batch is None:
            assert failure is not None
            self._failure = failure
            raise failure
        self._free.release()
        self._state = state
        return batch

    def state(self) -> dict[str, Any]:
        """The loader's state after the batches that :meth:`next` gave, whatever was read ahead."""
        return self._state

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes to a state, as the loader does; what was read ahead is thrown away."""
        self._stop()
        self.loader.restore(state)
        self._state, self._failure = self.loader.state(), None

    def close(self) -> None:
        """Ends the thread, and what the loader itself runs."""
        self._stop()
        self.loader.close()

    def _start(self) -> None:
        self._ready: queue.SimpleQueue[Item] = queue.SimpleQueue()
        self._free = threading.Semaphore(self.depth)
        self._stopping = threading.Event()
        # the thread does not hold this object, so that one that nobody closes ends it when it is forgotten
        arguments = (self.loader, self.pin, self._ready, self._free, self._stopping)
        self._thread = threading.Thread(target=_read_ahead, args=arguments, name="prefetch", daemon=True)
        self._forgotten = weakref.finalize(self, _end, self._free, self._stopping)
        self._thread.start()

    def _stop(self) -> None:
        if self._thread is not None:
            self._forgotten()
            self._thread.join()
            self._thread = None


def _read_ahead(
    loader: Batches, pin: bool, ready: queue.SimpleQueue[Item], free: threading.Semaphore, stopping: threading.Event
) -> None:
    try:
        while True:
            free.acquire()
            if stopping.is_set():
                return
            batch = loader.next()
            ready.put((batch.pin() if pin else batch, loader.state(), None))
    except BaseException as error:
        ready.put((None, {}, error))


def _end(free: threading.Semaphore, stopping: threading.Event) -> None:
    stopping.set()
    free.release()
