"""Reading ahead changes when a batch is read, and nothing else."""

from __future__ import annotations

import gc
import json
import threading
import time
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekit.data.loader import Loader
from sparsekit.data.packing import HostBatch, Windows
from sparsekit.data.prefetch import Prefetched
from sparsekit.data.token_set import TokenSet
from sparsekit.errors import DataError


def loader(cls: type[Loader] = Loader) -> Any:
    tokens = np.arange(200, dtype=np.uint16)
    return cls(Windows(TokenSet(tokens, np.array([0, 200]), 200), 4), 3, micro_batch_size=2)


def rows(batch: HostBatch) -> list[list[int]]:
    return batch.to("cpu").ids_BT.tolist()


@settings(max_examples=25, deadline=None)
@given(depth=st.integers(1, 5), before=st.integers(0, 12), after=st.integers(1, 12))
def test_the_same_batches_and_the_state_of_those_given(depth: int, before: int, after: int) -> None:
    plain, ahead = loader(), Prefetched(loader(), depth)
    assert ahead.elastic and ahead.n_windows == plain.n_windows
    for _ in range(before):
        assert rows(ahead.next()) == rows(plain.next())
        assert ahead.state() == plain.state()
    state = json.loads(json.dumps(ahead.state()))
    expected = [rows(plain.next()) for _ in range(after)]
    assert [rows(ahead.next()) for _ in range(after)] == expected
    ahead.restore(state)
    assert ahead.state() == state and [rows(ahead.next()) for _ in range(after)] == expected
    ahead.close()


def test_no_more_than_depth_is_read_ahead() -> None:
    inner = loader()
    ahead = Prefetched(inner, depth=3)
    ahead.next()
    deadline = time.monotonic() + 5
    while inner.position < 8 and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(0.05)
    assert inner.position == 8 and ahead.state() == {"position": 2}  # one given and three ready, two windows each
    ahead.close()


class Slow(Loader):
    def next(self) -> HostBatch:
        time.sleep(0.05)
        return super().next()


class Failing(Loader):
    def next(self) -> HostBatch:
        if self.position >= 4:
            raise DataError("the text is gone")
        return super().next()


def test_waiting_is_measured() -> None:
    slow = Prefetched(loader(Slow))
    for _ in range(4):
        slow.next()
    assert 0.15 < slow.wait_seconds < 2
    slow.close()
    ready = Prefetched(loader(Slow))
    ready.next()
    before = ready.wait_seconds
    time.sleep(0.3)  # as a step of training would
    ready.next()
    assert ready.wait_seconds - before < 0.04
    ready.close()


def test_an_error_comes_where_its_batch_would_and_stays() -> None:
    ahead = Prefetched(loader(Failing), depth=4)
    assert [len(ahead.next()) for _ in range(2)] == [2, 2]
    for _ in range(2):
        with pytest.raises(DataError, match="the text is gone"):
            ahead.next()
    assert ahead.state() == {"position": 4}
    ahead.restore({"position": 2})
    assert len(ahead.next()) == 2
    ahead.close()


def test_closing_ends_the_thread() -> None:
    others = set(threading.enumerate())

    def running() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name == "prefetch" and thread not in others]

    ahead = Prefetched(loader())
    ahead.close()  # never begun
    ahead.next()
    assert len(running()) == 1
    ahead.close()
    assert not running()

    ahead.next()
    (thread,) = running()
    del ahead
    gc.collect()
    thread.join(10)
    assert not running(), "one that is forgotten ends too"
    with pytest.raises(ValueError, match="depth is 0"):
        Prefetched(loader(), depth=0)


@pytest.mark.gpu
def test_pinned() -> None:
    plain, ahead = loader(), Prefetched(loader(), pin=True)
    for _ in range(40):
        batch = ahead.next()
        assert batch.tokens_BT1.is_pinned()
        moved = batch.to("cuda", non_blocking=True)
        assert torch.equal(moved.ids_BT.cpu(), plain.next().to("cpu").ids_BT)
    ahead.close()
