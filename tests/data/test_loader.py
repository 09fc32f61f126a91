"""The order of windows: nothing twice and nothing left out, across resumes and world sizes, mixed or not."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekit.data import loader as loader_module
from sparsekit.data.loader import Loader, validation_batches
from sparsekit.data.order import BLOCK, permute, quantise
from sparsekit.data.packing import IGNORE, HostBatch, Windows
from sparsekit.data.token_set import TokenSet
from sparsekit.errors import DataError

seeds = st.integers(0, 2**63)


def windows(n: int, seq_len: int = 2, first: int = 0) -> Windows:
    """n windows, where the first input of window w is its number and ``first``."""
    tokens = (first + np.arange(n * seq_len + 1) // seq_len).astype(np.uint32)
    return Windows(TokenSet(tokens, np.array([0, len(tokens)]), len(tokens)), seq_len)


def numbers(batch: HostBatch) -> list[int]:
    return [int(i) for i in batch.to("cpu").ids_BT[:, 0]]


def order(loader: Loader, position: int, count: int) -> list[int]:
    return numbers(loader.batch(position, count))


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


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 50),
    seed=seeds,
    size=st.integers(1, 5),
    phases=st.lists(st.tuples(st.sampled_from([1, 2, 3, 4]), st.integers(0, 8)), min_size=1, max_size=5),
)
def test_no_sample_is_repeated_or_skipped_across_resumes_and_world_sizes(
    n: int, seed: int, size: int, phases: list[tuple[int, int]]
) -> None:
    """Every phase resumes from the state, as JSON, of the one before, in a world of its own size."""
    state, seen = Loader(windows(n), seed).state(), []
    for world_size, steps in phases:
        ranks = [Loader(windows(n), seed, size, rank, world_size) for rank in range(world_size)]
        for loader in ranks:
            loader.restore(state)
        for _ in range(steps):
            seen += [i for loader in ranks for i in numbers(loader.next())]
            states = [loader.state() for loader in ranks]
            assert all(other == states[0] for other in states)
        state = json.loads(json.dumps(ranks[0].state()))
    assert seen == order(Loader(windows(n), seed), 0, len(seen))
    for epoch in range(len(seen) // n):
        assert sorted(seen[epoch * n : (epoch + 1) * n]) == list(range(n))
    assert max(Counter(seen[len(seen) // n * n :]).values(), default=1) == 1


def test_one_two_one() -> None:
    """Three epochs of 24 windows: the first on one rank, the second on two, the third on one again."""
    seen, state = [], {"position": 0}
    for world_size, steps in ((1, 6), (2, 3), (1, 6)):
        ranks = [Loader(windows(24), 7, 4, rank, world_size) for rank in range(world_size)]
        for loader in ranks:
            loader.restore(state)
        seen.append([i for _ in range(steps) for loader in ranks for i in numbers(loader.next())])
        state = ranks[0].state()
    assert state == {"position": 72} and all(sorted(epoch) == list(range(24)) for epoch in seen)
    assert len({tuple(epoch) for epoch in seen}) == 3


@pytest.mark.parametrize("size", [1, 7, 64, 80])
def test_next_gives_what_batch_gives(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the order worked out ahead runs out, and a batch is larger than it."""
    monkeypatch.setattr(loader_module, "AHEAD", 64)
    for rank in (0, 1):
        loader = Loader(windows(900), 5, size, rank, 2)
        for step in range(2 * 64 // size + 3):
            given, expected = loader.next(), loader.batch((2 * step + rank) * size, size)
            assert torch.equal(given.tokens_BT1, expected.tokens_BT1)


def test_a_batch_across_an_epochs_edge() -> None:
    loader = Loader(windows(10), 3)
    first, second = order(loader, 0, 10), order(loader, 10, 10)
    assert order(loader, 7, 6) == first[7:] + second[:3] and first != second


def test_positions_far_out_and_wrong_ones() -> None:
    loader = Loader(windows(10), 3, 10)
    far = 10 * 10**12
    assert sorted(order(loader, far, 10)) == list(range(10))
    loader.restore({"position": far})
    assert numbers(loader.next()) == order(loader, far, 10)
    with pytest.raises(ValueError, match="position -1 is negative"):
        loader.batch(-1, 2)
    for size, rank, world_size in ((0, 0, 1), (1, 1, 1), (1, -1, 1)):
        with pytest.raises(ValueError, match="out of range"):
            Loader(windows(3), 0, size, rank, world_size)


def test_another_loaders_state() -> None:
    message = (
        "the checkpoint's place in the data is none of tokens that lie ready; resume with the data section that it "
        "was trained with, or start over with --resume never"
    )
    for state in ({"snapshot": None, "since": 3}, {"position": -1}, {"position": None}):
        with pytest.raises(DataError) as caught:
            Loader(windows(3), 0).restore(state)
        assert str(caught.value) == message


# ---- several sources ----


def mixed(sizes: list[int], weights: list[float], seed: int = 0, **of_rank: int) -> Loader:
    """Sources whose windows are numbered on: those of the first from 0, of the second from 1000, and so on."""
    sources = [windows(n, first=1000 * i) for i, n in enumerate(sizes)]
    return Loader(list(zip(sources, weights, strict=True)), seed, **of_rank)


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 900), min_size=2, max_size=4),
    seed=seeds,
    first=st.integers(0, 3 * BLOCK),
    data=st.data(),
)
def test_each_source_is_read_through_in_its_proportion(
    sizes: list[int], seed: int, first: int, data: st.DataObject
) -> None:
    weights = data.draw(st.lists(st.floats(0.01, 10), min_size=len(sizes), max_size=len(sizes)))
    loader = mixed(sizes, weights, seed)
    assert loader.n_windows == sum(sizes)
    seen = np.array(order(loader, 0, 4 * BLOCK))
    counts = quantise(weights)
    starts = np.cumsum([0, *sizes])
    numbered = loader.indices(np.arange(4 * BLOCK))
    for i, n in enumerate(sizes):
        own = seen[seen // 1000 == i] % 1000
        assert len(own) == 4 * counts[i]
        # which windows a source gives first within a block is shuffled, so only whole blocks end where epochs may
        most, least = Counter(own.tolist()).most_common(1)[0][1], min(np.bincount(own, minlength=n))
        assert most <= -(-len(own) // n) and least >= len(own) // n
        assert sorted(numbered[seen // 1000 == i].tolist()) == sorted((starts[i] + own).tolist())
    loader.restore({"position": first})
    assert numbers(loader.next())[0] == order(loader, first, 1)[0]


def test_mixed_ranks_see_what_one_sees() -> None:
    sizes, weights = [30, 500, 7], [0.2, 0.5, 0.3]
    alone = order(mixed(sizes, weights), 0, 240)
    seen: list[int] = []
    state = {"position": 0}
    for world_size, steps in ((1, 20), (2, 10), (4, 5), (1, 20)):
        ranks = [mixed(sizes, weights, micro_batch_size=3, rank=r, world_size=world_size) for r in range(world_size)]
        for loader in ranks:
            loader.restore(state)
        seen += [i for _ in range(steps) for loader in ranks for i in numbers(loader.next())]
        state = ranks[-1].state()
    assert seen == alone


def test_equal_sources_are_read_in_different_orders() -> None:
    seen = np.array(order(mixed([256, 256], [1.0, 1.0]), 0, BLOCK))
    firsts = [(seen[seen // 1000 == i] % 1000)[:512].tolist() for i in (0, 1)]
    assert firsts[0] != firsts[1]


def test_a_source_alone_has_the_order_it_has_without_a_mixture() -> None:
    n, seed = 50, 9
    expected = [int(i) for epoch in (0, 1) for i in permute(np.arange(n), n, seed, epoch)]
    for loader in (Loader(windows(n), seed), Loader([(windows(n), 0.3)], seed)):
        assert order(loader, 0, 2 * n) == expected


# ---- validation ----


def test_validation_reads_the_text_in_order() -> None:
    batches = list(validation_batches(windows(10), 4))
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert torch.cat([batch.to("cpu").ids_BT for batch in batches])[:, 0].tolist() == list(range(10))
    assert sum(batch.n_targets for batch in batches) == 20


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 60), count=st.integers(1, 9), limit=st.integers(1, 80))
def test_a_limit_spreads_evenly(n: int, count: int, limit: int) -> None:
    batches = [batch.to("cpu") for batch in validation_batches(windows(n), count, limit)]
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
