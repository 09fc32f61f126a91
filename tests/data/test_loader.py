"""The order of windows: a permutation an epoch, and a function of (seed, position) only."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekit.data.loader import Loader, permute, validation_batches
from sparsekit.data.packing import IGNORE, Windows
from sparsekit.data.token_set import TokenSet

seeds = st.integers(0, 2**63)


def windows(n: int, seq_len: int = 2) -> Windows:
    """n windows, where the first input of window w is its number."""
    tokens = np.arange(n * seq_len + 1, dtype=np.uint32) // seq_len
    return Windows(TokenSet(tokens, np.array([0, len(tokens)]), len(tokens)), seq_len)


def order(loader: Loader, position: int, count: int) -> list[int]:
    return [int(i) for i in loader.batch(position, count).ids_BT[:, 0]]


def by_hand(index: int, n: int, seed: int, epoch: int) -> int:
    """The same permutation in Python's own integers, one index at a time."""
    import hashlib

    half = max(1, ((n - 1).bit_length() + 1) // 2)
    digest = hashlib.blake2b(f"{seed}:{epoch}".encode(), digest_size=64).digest()
    wrap = (1 << 64) - 1
    while True:
        left, right = index >> half, index % (1 << half)
        for i in range(8):
            x = (right + int.from_bytes(digest[8 * i : 8 * i + 8], "little")) & wrap
            x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & wrap
            x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & wrap
            left, right = right, left ^ ((x ^ (x >> 31)) % (1 << half))
        index = (left << half) + right
        if index < n:
            return index


@settings(max_examples=80, deadline=None)
@given(n=st.integers(1, 3000), seed=seeds, epoch=st.integers(0, 10**6))
def test_permute_is_a_bijection(n: int, seed: int, epoch: int) -> None:
    assert sorted(permute(np.arange(n), n, seed, epoch).tolist()) == list(range(n))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 15, 16, 17, 63, 64, 65, 255, 256, 257, 4096, 4097])
def test_permute_is_a_bijection_at_every_edge(n: int) -> None:
    for seed in range(5):
        assert sorted(permute(np.arange(n), n, seed, 0).tolist()) == list(range(n))


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 2**62), seed=seeds, data=st.data())
def test_permute_equals_the_one_in_python_integers(n: int, seed: int, data: st.DataObject) -> None:
    """For every size; and the inputs, of any shape, are left as they were."""
    indices = data.draw(st.lists(st.integers(0, n - 1), min_size=4, max_size=4))
    given_array = np.array(indices).reshape(2, 2)
    found = permute(given_array, n, seed, 3)
    assert found.reshape(-1).tolist() == [by_hand(i, n, seed, 3) for i in indices]
    assert found.shape == (2, 2) and found.dtype == np.int64 and given_array.reshape(-1).tolist() == indices


def test_permute_refuses_what_is_outside() -> None:
    for wrong in (-1, 10):
        with pytest.raises(IndexError):
            permute(np.array([0, wrong]), 10, 0, 0)


def test_every_window_comes_first_about_equally_often() -> None:
    n, draws = 7, 7000
    firsts = Counter(int(permute(np.array([0]), n, 1, epoch)[0]) for epoch in range(draws))
    spread = sum((firsts[i] - draws / n) ** 2 / (draws / n) for i in range(n))
    assert spread < 22.5  # chi-square with 6 degrees of freedom: passed by chance 999 times in 1000


def test_neighbours_do_not_stay_neighbours() -> None:
    n = 10_000
    shuffled = permute(np.arange(n), n, 0, 0)
    assert abs(np.corrcoef(np.arange(n), shuffled)[0, 1]) < 0.04
    assert abs(np.corrcoef(shuffled[1:], shuffled[:-1])[0, 1]) < 0.04
    assert np.mean(np.abs(np.diff(shuffled)) == 1) < 0.002


def test_other_seeds_and_epochs_give_other_orders() -> None:
    orders = {tuple(permute(np.arange(50), 50, seed, epoch)) for seed in range(10) for epoch in range(10)}
    assert len(orders) == 100


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 60), seed=seeds)
def test_each_epoch_sees_each_window_once(n: int, seed: int) -> None:
    loader = Loader(windows(n), seed)
    for epoch in range(3):
        assert sorted(order(loader, epoch * n, n)) == list(range(n))


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 40), seed=seeds, position=st.integers(0, 200), sizes=st.lists(st.integers(0, 50), max_size=6))
def test_the_order_does_not_depend_on_batch_size_or_start(n: int, seed: int, position: int, sizes: list[int]) -> None:
    """Batches of any sizes, across epochs' edges too, from a loader that starts anywhere."""
    one_by_one = [order(Loader(windows(n), seed), p, 1)[0] for p in range(position, position + sum(sizes))]
    loader = Loader(windows(n), seed)
    found: list[int] = []
    for size in sizes:
        found += order(loader, position + len(found), size)
    assert found == one_by_one


def test_ranks_together_see_what_one_sees() -> None:
    loader = Loader(windows(23), 5)
    alone = [i for step in range(6) for i in order(loader, 12 * step, 12)]
    for world in (2, 3, 4):
        count = 12 // world
        together = [i for step in range(6) for r in range(world) for i in order(loader, 12 * step + r * count, count)]
        assert together == alone


def test_a_batch_across_an_epochs_edge() -> None:
    loader = Loader(windows(10), 3)
    first, second = order(loader, 0, 10), order(loader, 10, 10)
    assert order(loader, 7, 6) == first[7:] + second[:3] and first != second


def test_positions_far_out_and_wrong_ones() -> None:
    loader = Loader(windows(10), 3)
    far = 10 * 10**12
    assert sorted(order(loader, far, 10)) == list(range(10))
    for position, count in ((-1, 2), (0, -2)):
        with pytest.raises(ValueError, match="negative"):
            loader.batch(position, count)


# ---- validation ----


def test_validation_reads_the_text_in_order() -> None:
    batches = list(validation_batches(windows(10), 4))
    assert [len(batch.ids_BT) for batch in batches] == [4, 4, 2]
    assert torch.cat([batch.ids_BT for batch in batches])[:, 0].tolist() == list(range(10))
    assert sum(batch.n_targets for batch in batches) == 20


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 60), count=st.integers(1, 9), limit=st.integers(1, 80))
def test_a_limit_spreads_evenly(n: int, count: int, limit: int) -> None:
    batches = list(validation_batches(windows(n), count, limit))
    seen = [int(i) for batch in batches for i in batch.ids_BT[:, 0]]
    assert len(seen) == min(n, limit) and seen[0] == 0
    gaps = {after - before for before, after in zip(seen, [*seen[1:], n], strict=True)}
    assert min(gaps) >= 1 and max(gaps) - min(gaps) <= 1
    assert all(len(batch.ids_BT) == count for batch in batches[:-1]) and all(batch.n_targets for batch in batches)
    assert not any((batch.targets_BT == IGNORE).any() for batch in batches)


def test_validation_needs_something_to_take() -> None:
    for count, limit in ((0, None), (1, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            list(validation_batches(windows(3), count, limit))
