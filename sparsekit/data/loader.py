"""The order in which windows are read: a function of (seed, position) and of nothing else.

Since there is no other state, a run resumes from one integer, and any number of ranks, each asking for its own
positions, sees the same global order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from sparsekit.data.packing import Batch, Windows

ROUNDS = 8
Indices = np.ndarray[Any, np.dtype[np.int64]]


def permute(indices: np.ndarray[Any, Any], n: int, seed: int, epoch: int) -> Indices:
    """Where a pseudo-random permutation of 0 .. n-1 sends each index, without ever writing the permutation down.

    A Feistel network permutes the numbers of an even count of bits: (L, R) -> (R, L xor f(R)), whatever f is. Where
    that leads outside [0, n) it is applied again, until it leads inside ("cycle walking"), which is a permutation of
    [0, n) still; fewer than four numbers stand for each of the n, so a few times do.

    Args:
        indices: integers in [0, n), of any shape.
        n: how many are permuted, at least 1.
        seed, epoch: the key; each pair has a permutation of its own.

    Source: Black & Rogaway 2002, "Ciphers with arbitrary finite domains", secs. 3 and 4

    Raises:
        IndexError: an index is outside [0, n).
    """
    values = np.asarray(indices, dtype=np.int64)
    if values.size and (values.min() < 0 or values.max() >= n):
        raise IndexError(f"index {values.min()} to {values.max()} of {n}")
    half_bits = max(1, -(-(n - 1).bit_length() // 2))
    keys = np.frombuffer(hashlib.blake2b(f"{seed}:{epoch}".encode(), digest_size=8 * ROUNDS).digest(), "<u8")
    result = _feistel(values.astype(np.uint64), half_bits, keys)
    while (outside := result >= n).any():
        result[outside] = _feistel(result[outside], half_bits, keys)
    return result.astype(np.int64)


def _feistel(values: np.ndarray[Any, Any], half_bits: int, keys: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right + key) & mask)
    return (left << shift) | right


def _mix(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Every bit of the result depends on every bit given: SplitMix64's finaliser (arithmetic modulo 2^64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray[Any, Any] = values ^ (values >> np.uint64(31))
    return mixed


class Loader:
    """The windows in an endless order: epoch after epoch, each a permutation of all of them.

    Position p is in epoch p // len(windows). A rank of a world asks for its part of each micro-batch:
    ``batch(position + rank * count, count)``, and then moves position on by world size times count.
    """

    def __init__(self, windows: Windows, seed: int):
        self.windows, self.seed = windows, seed

    def indices(self, position: int, count: int) -> Indices:
        """The numbers of the windows at positions [position, position + count)."""
        if position < 0 or count < 0:
            raise ValueError(f"position {position} and count {count} must not be negative")
        n = len(self.windows)
        parts = [np.empty(0, np.int64)]
        while count:
            epoch, first = divmod(position, n)
            taken = min(count, n - first)
            parts.append(permute(np.arange(first, first + taken), n, self.seed, epoch))
            position, count = position + taken, count - taken
        return np.concatenate(parts)

    def batch(self, position: int, count: int) -> Batch:
        """The windows at positions [position, position + count), across epochs where they lead there."""
        return self.windows.gather(self.indices(position, count))


def validation_batches(windows: Windows, count: int, limit: int | None = None) -> Iterator[Batch]:
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
