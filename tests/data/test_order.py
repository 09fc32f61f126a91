"""A permutation an epoch, and a source a position: bijections, exact proportions, and nothing to remember."""

from __future__ import annotations

import hashlib
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekit.data.order import BLOCK, Mixture, permute, quantise, subseed

seeds = st.integers(0, 2**63)
weight_lists = st.lists(st.one_of(st.just(0.0), st.floats(1e-6, 1e6)), min_size=1, max_size=12).filter(any)


def by_hand(index: int, n: int, seed: int, epoch: int) -> int:
    """The same permutation in Python's own integers, one index at a time."""
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


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 5000), seed=seeds, data=st.data())
def test_an_epoch_each_is_the_same_as_one_by_one(n: int, seed: int, data: st.DataObject) -> None:
    pairs = data.draw(st.lists(st.tuples(st.integers(0, n - 1), st.integers(0, 5)), max_size=20))
    indices, epochs = (np.array([pair[i] for pair in pairs], dtype=np.int64) for i in (0, 1))
    expected = [by_hand(index, n, seed, epoch) for index, epoch in pairs]
    assert permute(indices, n, seed, epochs).tolist() == expected


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


# ---- mixtures ----


@settings(max_examples=200, deadline=None)
@given(weights=weight_lists, total=st.integers(12, 5000))
def test_quantised_weights_are_whole_and_near(weights: list[float], total: int) -> None:
    counts = quantise(weights, total)
    assert counts.sum() == total and all(
        (count > 0) == (weight > 0) for count, weight in zip(counts, weights, strict=True)
    )
    # those raised to 1 aside, each is its share of the rest, to the next whole number below or above
    raised = [i for i, count in enumerate(counts) if count == 1]
    rest = [i for i in range(len(weights)) if i not in raised]
    left, sum_of_rest = total - sum(counts[i] for i in raised), math.fsum(weights[i] for i in rest)
    for i in rest:
        assert abs(counts[i] - weights[i] / sum_of_rest * left) < len(raised) + 1


def test_quantised_by_hand() -> None:
    assert quantise([1, 1, 1], 10).tolist() == [4, 3, 3]
    assert quantise([0.5, 0.3, 0.2], 10).tolist() == [5, 3, 2]
    assert quantise([2.6, 5.3, 2.1], 10).tolist() == [3, 5, 2]
    assert quantise([1e9, 1, 0], 10).tolist() == [9, 1, 0]
    assert quantise([1] * 10, 10).tolist() == [1] * 10
    assert quantise([1e308] * 3, 9).tolist() == [3, 3, 3]


@pytest.mark.parametrize(
    ("weights", "said"),
    [([], "not all 0"), ([0.0, 0.0], "not all 0"), ([1.0, -1.0], "not negative"), ([1.0, math.inf], "finite"),
     ([1.0] * 4097, "4097 weights that are not 0 cannot share 4096 positions")],
)  # fmt: skip
def test_weights_that_mean_nothing(weights: list[float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        quantise(weights)


@settings(max_examples=30, deadline=None)
@given(weights=weight_lists, seed=seeds, first_block=st.integers(0, 10**9))
def test_each_block_has_exact_proportions_and_each_own_position_comes_once(
    weights: list[float], seed: int, first_block: int
) -> None:
    mixture = Mixture(weights, seed)
    positions = np.arange(first_block * BLOCK, (first_block + 2) * BLOCK)
    sources, own = mixture.at(positions)
    for half in (slice(0, BLOCK), slice(BLOCK, 2 * BLOCK)):
        assert np.bincount(sources[half], minlength=len(weights)).tolist() == quantise(weights).tolist()
    for i, count in enumerate(quantise(weights).tolist()):
        assert sorted(own[sources == i].tolist()) == list(range(first_block * count, (first_block + 2) * count))


@settings(max_examples=30, deadline=None)
@given(seed=seeds, positions=st.lists(st.integers(0, 5 * BLOCK), max_size=30))
def test_a_mixture_is_a_function_of_the_position(seed: int, positions: list[int]) -> None:
    weights = [3.0, 1.0, 0.5]
    together = Mixture(weights, seed).at(np.array(positions, dtype=np.int64))
    alone = [Mixture(weights, seed).at(np.array([p])) for p in positions]
    assert together[0].tolist() == [int(source[0]) for source, _ in alone]
    assert together[1].tolist() == [int(own[0]) for _, own in alone]


def test_a_source_does_not_come_in_runs() -> None:
    sources, _ = Mixture([1.0, 1.0], 0).at(np.arange(50 * BLOCK))
    same = np.mean(sources[1:] == sources[:-1])
    assert abs(same - 0.5) < 0.01
    assert not np.array_equal(sources[:BLOCK], sources[BLOCK : 2 * BLOCK])


def test_named_seeds_differ() -> None:
    assert len({subseed(seed, name) for seed in range(50) for name in ("a", "b", "source 1")}) == 150
