"""Batches of windows in an endless order that is a function of (seed, position) and of nothing else.

Since there is no other state, a run resumes from one integer, and any number of ranks, each taking its own
positions, sees the same global order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from sparsekit.data.order import Indices, Mixture, permute, subseed
from sparsekit.data.packing import HostBatch, Windows, interleave
from sparsekit.errors import DataError

AHEAD = 4096  # windows whose order is worked out at once: a batch at a time, numpy's calls would cost more than reading


class Batches(Protocol):
    """What a trainer reads from: one rank's share of an endless order of micro-batches.

    Attributes:
        elastic: whether a state can be gone on from under another world size.
        n_windows: how many windows an epoch has, on all ranks together.
    """

    @property
    def elastic(self) -> bool: ...
    @property
    def n_windows(self) -> int: ...

    def next(self) -> HostBatch:
        """This rank's next micro-batch."""
        ...

    def state(self) -> dict[str, Any]:
        """JSON values from which :meth:`restore` goes on after the batches taken so far."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes to where :meth:`state` was taken."""
        ...

    def close(self) -> None:
        """Ends what runs in the background."""
        ...


class Loader:
    """Windows in an endless order: epoch after epoch, each a permutation of all of them.

    Without a mixture position p is in epoch p // n of n windows. Of several sources each has epochs and permutations
    of its own, and :class:`~sparsekit.data.order.Mixture` says which source stands at which position.

    A micro-batch of rank r of w takes positions [p + r m, p + (r + 1) m), and then p moves on by w m.

    Args:
        windows: of one source, or of several, each with its weight.
        seed: determines the order.
        micro_batch_size: m, windows a batch.
        rank, world_size: whose share this is.

    Raises:
        ValueError: the weights cannot be shared out, or a number is out of range.
    """

    elastic = True

    def __init__(
        self,
        windows: Windows | Sequence[tuple[Windows, float]],
        seed: int,
        micro_batch_size: int = 1,
        rank: int = 0,
        world_size: int = 1,
    ):
        if micro_batch_size < 1 or not 0 <= rank < world_size:
            raise ValueError(f"micro_batch_size {micro_batch_size}, rank {rank} of {world_size}: out of range")
        weighted = [(windows, 1.0)] if isinstance(windows, Windows) else list(windows)
        self.sources = [one for one, _ in weighted]
        self.seed, self.micro_batch_size, self.rank, self.world_size = seed, micro_batch_size, rank, world_size
        self.position = 0
        self._ahead: list[Indices] = []  # of the coming batches, the next one last
        self._starts = np.cumsum([0, *map(len, self.sources)])
        self.mixture = Mixture([weight for _, weight in weighted], seed) if len(weighted) > 1 else None

    @property
    def n_windows(self) -> int:
        """How many windows there are, over all sources: one pass through each."""
        return int(self._starts[-1])

    def indices(self, positions: np.ndarray[Any, Any]) -> Indices:
        """The number of the window at each position, counted through the sources one after another.

        Raises:
            ValueError: a position is negative.
        """
        positions = np.asarray(positions, dtype=np.int64)
        if positions.size and positions.min() < 0:
            raise ValueError(f"position {positions.min()} is negative")
        if self.mixture is None:
            return self._permuted(positions, self.n_windows, self.seed)
        sources, own = self.mixture.at(positions)
        numbers = np.empty(positions.shape, np.int64)
        for i in np.unique(sources).tolist():
            here = sources == i
            in_source = self._permuted(own[here], len(self.sources[i]), subseed(self.seed, f"source {i}"))
            numbers[here] = self._starts[i] + in_source
        return numbers

    @staticmethod
    def _permuted(positions: Indices, n: int, seed: int) -> Indices:
        epochs, offsets = np.divmod(positions, n)
        return permute(offsets, n, seed, epochs)

    def batch(self, position: int, count: int) -> HostBatch:
        """The windows at positions [position, position + count), whatever rank this is."""
        return self._gather(self.indices(np.arange(position, position + count)))

    def next(self) -> HostBatch:
        """The windows of this rank's next micro-batch."""
        stride = self.world_size * self.micro_batch_size
        if not self._ahead:
            steps = np.arange(max(1, AHEAD // self.micro_batch_size))[::-1, None] * stride
            first = self.position + self.rank * self.micro_batch_size
            self._ahead = list(self.indices(first + steps + np.arange(self.micro_batch_size)))
        numbers = self._ahead.pop()
        self.position += stride
        return self._gather(numbers)

    def _gather(self, numbers: Indices) -> HostBatch:
        if self.mixture is None or not len(numbers):
            return self.sources[0].gather(numbers)
        order = np.argsort(numbers)  # by source, as they are counted through one after another
        ends = np.searchsorted(numbers[order], self._starts)
        parts, places = [], []
        for source, start, first, end in zip(self.sources, self._starts, ends, ends[1:], strict=False):
            if first < end:
                places.append(order[first:end])
                parts.append(source.gather(numbers[places[-1]] - start))
        return interleave(parts, places)

    def state(self) -> dict[str, Any]:
        """``{"position": p}``, the same on every rank."""
        return {"position": self.position}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from a position, under whatever world size.

        Raises:
            DataError: it is another loader's state.
        """
        position = state.get("position")
        if not isinstance(position, int) or position < 0:
            raise DataError(
                "the checkpoint's place in the data is none of tokens that lie ready; resume with the data section "
                "that it was trained with, or start over with --resume never"
            )
        self.position, self._ahead = position, []

    def close(self) -> None:
        """Nothing runs in the background."""


def validation_batches(windows: Windows, count: int, limit: int | None = None) -> Iterator[HostBatch]:
    """Windows in the order of the text, ``count`` a batch (the last may hold fewer).

    Args:
        windows: the validation split.
        count: windows a batch.
        limit: at most so many windows, evenly spread over the text and the same every time; None for all.
    """
    if count < 1 or (limit is not None and limit < 1):
        raise ValueError(f"count {count} and limit {limit} must be at least 1")
    n = len(windows)
    taken = n if limit is None else min(limit, n)
    chosen = np.arange(taken) * n // taken
    for first in range(0, taken, count):
        yield windows.gather(chosen[first : first + count])
