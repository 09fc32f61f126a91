"""The order in which windows are read: pure functions of (seed, position), with nothing to remember.

A permutation that is never written down gives every epoch its own order; a mixture gives every position its source.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

ROUNDS = 8
BLOCK = 4096  # positions over which a mixture's proportions are exact
ROUNDING = 1e-9  # by which a share of BLOCK may be off, with room to spare
Indices = np.ndarray[Any, np.dtype[np.int64]]


def permute(indices: np.ndarray[Any, Any], n: int, seed: int, epoch: int | np.ndarray[Any, Any]) -> Indices:
    """Where a pseudo-random permutation of 0 .. n-1 sends each index, without ever writing the permutation down.

    A Feistel network permutes the numbers of an even count of bits: (L, R) -> (R, L xor f(R)), whatever f is. Where
    that leads outside [0, n) it is applied again, until it leads inside ("cycle walking"), which is a permutation of
    [0, n) still; fewer than four numbers stand for each of the n, so a few times do.

    Args:
        indices: integers in [0, n), of any shape.
        n: how many are permuted, at least 1.
        seed, epoch: the key; each pair has a permutation of its own. An array of epochs, of the indices' shape, gives
            each index its own.

    Source: Black & Rogaway 2002, "Ciphers with arbitrary finite domains", secs. 3 and 4

    Raises:
        IndexError: an index is outside [0, n).
    """
    values = np.asarray(indices, dtype=np.int64)
    if values.size and (values.min() < 0 or values.max() >= n):
        raise IndexError(f"index {values.min()} to {values.max()} of {n}")
    half_bits = max(1, -(-(n - 1).bit_length() // 2))
    epochs, which = np.unique(np.broadcast_to(epoch, values.shape).ravel(), return_inverse=True)
    keys = np.stack([_keys(seed, one) for one in epochs.tolist()], axis=1) if len(epochs) else np.empty((ROUNDS, 0))
    result = values.ravel().astype(np.uint64)
    walking = np.arange(len(result))
    while len(walking):
        key = keys if len(epochs) == 1 else keys[:, which[walking]]
        result[walking] = _feistel(result[walking], half_bits, key)
        walking = walking[result[walking] >= n]
    return result.astype(np.int64).reshape(values.shape)


def _keys(seed: int, epoch: int) -> np.ndarray[Any, Any]:
    return np.frombuffer(hashlib.blake2b(f"{seed}:{epoch}".encode(), digest_size=8 * ROUNDS).digest(), "<u8")


def _feistel(values: np.ndarray[Any, Any], half_bits: int, keys: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (mix(right + key) & mask)
    return (left << shift) | right


def mix(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Every bit of the result depends on every bit given: SplitMix64's finaliser (uint64, arithmetic modulo 2^64).

    Source: Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators", fig. 16 (Stafford's variant 13)
    """
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray[Any, Any] = values ^ (values >> np.uint64(31))
    return mixed


def subseed(seed: int, name: str) -> int:
    """A seed for a named part of what one seed determines."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest(), "little")


def quantise(weights: Sequence[float], total: int = BLOCK) -> Indices:
    """Integers in the proportion of the weights that sum to ``total``; none is 0 whose weight is not.

    Shares below 1 are raised to 1, at the expense of the others. Of those each gets the whole part of its share, and
    what is left goes to the largest remainders, one each.

    Raises:
        ValueError: a weight is negative or not finite, all are 0, or more of them than ``total`` are not.
    """
    given = np.asarray(weights, dtype=np.float64)
    if not (np.isfinite(given).all() and (given >= 0).all() and given.any()):
        raise ValueError(f"weights must be finite, not negative and not all 0, got {list(weights)}")
    if np.count_nonzero(given) > total:
        raise ValueError(f"{np.count_nonzero(given)} weights that are not 0 cannot share {total} positions")
    counts, large = (given > 0).astype(np.int64), given > 0
    small = large
    while small.any():
        left = total - counts[~large].sum()
        shares = np.where(large, given / given[large].max(), 0)  # divided first, as a sum of weights can overflow
        shares *= left / shares.sum()
        small = large & (shares < 1 - ROUNDING)
        large = large & ~small
    whole = np.floor(shares + ROUNDING).astype(np.int64)
    counts[large] = whole[large]
    remainders = np.where(large, shares - whole, -1)
    counts[np.argsort(-remainders, kind="stable")[: total - counts.sum()]] += 1
    return counts


class Mixture:
    """Which of several sources stands at each position, in exact proportions over every block of positions.

    Of each block of BLOCK positions source i has n_i, the quantised weight. Offset o of block b is slot
    s = permute(o); the sources own the slots in turn, n_0 of them, n_1 and so on, and slot s of source i, whose first
    is f_i, is the source's own position b n_i + (s - f_i). So each source's own positions come up once each.

    Raises:
        ValueError: as :func:`quantise`.
    """

    def __init__(self, weights: Sequence[float], seed: int):
        self.counts, self.seed = quantise(weights), subseed(seed, "mixture")
        self._ends = np.cumsum(self.counts)

    def at(self, positions: np.ndarray[Any, Any]) -> tuple[Indices, Indices]:
        """For each position the number of its source, and the source's own position."""
        blocks, offsets = np.divmod(np.asarray(positions, dtype=np.int64), BLOCK)
        slots = permute(offsets, BLOCK, self.seed, blocks)
        sources = np.searchsorted(self._ends, slots, side="right")
        counts = self.counts[sources]
        return sources, blocks * counts + slots - (self._ends[sources] - counts)
