"""Windows against a naive loop that reads the stream token by token."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekit.data import token_set as stream_module
from sparsekit.data.packing import IGNORE, Batch, Windows, interleave
from sparsekit.data.token_set import TokenSet
from sparsekit.data.tokenizers import ByteTokenizer
from sparsekit.errors import DataError

EOS = 256
lengths = st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(lambda sizes: sizes != [0])


def token_set(sizes: list[int], dtype: Any = np.uint16) -> TokenSet:
    """Documents of these lengths before their end of text; tokens count up so that each can be told apart."""
    tokens: list[int] = []
    starts = [0]
    for size in sizes:
        tokens += [(len(tokens) + i) % 250 for i in range(size)] + [EOS]
        starts.append(len(tokens))
    return TokenSet(np.array(tokens, dtype=dtype), np.array(starts, dtype=np.int64), sum(sizes))


def naive(tokens: list[int], starts: list[int], seq_len: int, masked: bool) -> list[Any]:
    """(inputs, targets, documents) of each window, position by position."""
    n = len(tokens)
    document = [sum(start <= place for start in starts[1:]) for place in range(n)]
    seen: set[int] = set()  # places that were a target already
    windows = []
    begin = 0
    while len(seen) < n - 1:
        if begin + seq_len > n - 1:
            begin = max(0, n - 1 - seq_len)
        inputs, targets, documents = [], [], []
        for place in range(begin, begin + seq_len):
            inputs.append(tokens[place] if place < n else EOS)
            number = document[place] if place < n else len(starts) - 1 + place - n  # padding: a document a token
            documents.append(number - document[begin])
            following = place + 1
            if following >= n or following in seen:
                targets.append(IGNORE)
                continue
            seen.add(following)
            across = document[following] != document[place]
            targets.append(IGNORE if masked and across else tokens[following])
        windows.append((inputs, targets, documents))
        begin += seq_len
    return windows


@settings(max_examples=150, deadline=None)
@given(sizes=lengths, seq_len=st.integers(1, 40), masked=st.booleans(), wide=st.booleans())
def test_windows_equal_the_naive_loop(sizes: list[int], seq_len: int, masked: bool, wide: bool) -> None:
    stream = token_set(sizes, np.uint32 if wide else np.uint16)
    windows = Windows(stream, seq_len, masked)
    expected = naive(stream.tokens.tolist(), stream.starts.tolist(), seq_len, masked)
    assert len(windows) == len(expected)
    host = windows.gather(np.arange(len(windows)))
    assert host.tokens_BT1.dtype == (torch.int32 if wide else torch.uint16)
    batch = host.to("cpu")
    assert batch.ids_BT.tolist() == [inputs for inputs, _, _ in expected]
    assert batch.targets_BT.tolist() == [targets for _, targets, _ in expected]
    if masked:
        assert batch.documents_BT is not None and batch.documents_BT.dtype == torch.int64
        assert batch.documents_BT.tolist() == [documents for _, _, documents in expected]
    else:
        assert batch.documents_BT is None
    assert batch.ids_BT.dtype == batch.targets_BT.dtype == torch.int64
    assert batch.n_targets == int((batch.targets_BT != IGNORE).sum())


@settings(max_examples=80, deadline=None)
@given(sizes=lengths, seq_len=st.integers(1, 40))
def test_every_token_but_the_first_is_a_target_once(sizes: list[int], seq_len: int) -> None:
    stream = token_set(sizes)
    for masked in (False, True):
        windows = Windows(stream, seq_len, masked)
        batch = windows.gather(np.arange(len(windows))).to("cpu")
        targets = batch.targets_BT.flatten()
        boundaries = stream.n_documents - 1 if masked else 0
        assert batch.n_targets == len(stream) - 1 - boundaries
        firsts = set(stream.starts[:-1].tolist()) if masked else {0}
        expected = [token for place, token in enumerate(stream.tokens.tolist()) if place not in firsts]
        assert targets[targets != IGNORE].tolist() == expected  # in the order of the text, none twice
    assert Windows(stream, seq_len).n_targets == len(stream) - 1


def test_gather_takes_any_order_and_repetition() -> None:
    windows = Windows(token_set([7, 0, 20, 3]), 4, True)
    whole = windows.gather(np.arange(len(windows))).to("cpu")
    order = np.array([3, 0, 3, len(windows) - 1])
    batch = windows.gather(order).to("cpu")
    assert torch.equal(batch.ids_BT, whole.ids_BT[order]) and torch.equal(batch.targets_BT, whole.targets_BT[order])
    assert windows.gather(np.array([], dtype=np.int64)).to("cpu").ids_BT.shape == (0, 4)


def test_nothing_is_marked_where_every_target_counts() -> None:
    """Only the last window, moved back, has targets that earlier ones had."""
    windows = Windows(token_set([21]), 4)  # 22 tokens, 21 targets: the last window has one of its own
    assert windows.gather(np.array([0, 4])).ignored_BT is None
    marked = windows.gather(np.array([5, 0])).ignored_BT
    assert marked is not None and marked.tolist() == [[True, True, True, False], [False] * 4]
    exact = Windows(token_set([20]), 4)
    assert exact.gather(np.arange(5)).ignored_BT is None


def test_a_batch_does_not_share_memory_with_the_stream() -> None:
    for sizes in ([20], [2]):
        stream = token_set(sizes)
        before = stream.tokens.copy()
        Windows(stream, 4).gather(np.array([0])).tokens_BT1.view(torch.int16).zero_()
        assert np.array_equal(stream.tokens, before)


@settings(max_examples=80, deadline=None)
@given(sizes=lengths, length=st.integers(1, 30), data=st.data())
def test_rows_repeat_the_last_token_past_the_end(sizes: list[int], length: int, data: st.DataObject) -> None:
    stream = token_set(sizes)
    begins = data.draw(st.lists(st.integers(0, len(stream) - 1), max_size=5))
    tokens = stream.tokens.tolist() + [EOS] * length
    rows = stream.rows(np.array(begins, dtype=np.int64), length)
    assert rows.tolist() == [tokens[begin : begin + length] for begin in begins] and rows.dtype == np.uint16
    assert rows.flags.owndata and rows.shape == (len(begins), length)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), masked=st.lists(st.booleans(), min_size=1, max_size=3))
def test_interleaved_batches_keep_their_rows(data: st.DataObject, masked: list[bool]) -> None:
    """Batches with and without marks and document numbers."""
    streams = [Windows(token_set([9, 5 + i]), 4, mask) for i, mask in enumerate(masked)]
    parts = [s.gather(np.array(data.draw(st.lists(st.integers(0, len(s) - 1), min_size=1)))) for s in streams]
    order = np.array(data.draw(st.permutations(range(sum(map(len, parts))))))
    places = np.split(order, np.cumsum([len(part) for part in parts])[:-1])
    whole, alone = interleave(parts, places).to("cpu"), [part.to("cpu") for part in parts]
    for rows, part in zip(places, alone, strict=True):
        assert torch.equal(whole.ids_BT[rows], part.ids_BT) and torch.equal(whole.targets_BT[rows], part.targets_BT)
        if part.documents_BT is not None:
            assert whole.documents_BT is not None and torch.equal(whole.documents_BT[rows], part.documents_BT)
    assert whole.n_targets == sum(part.n_targets for part in parts) == int((whole.targets_BT != IGNORE).sum())


def test_gather_refuses_what_is_no_window() -> None:
    windows = Windows(token_set([20]), 4)
    for wrong in (-1, len(windows)):
        with pytest.raises(IndexError):
            windows.gather(np.array([0, wrong]))


def test_a_stream_without_a_target() -> None:
    for sizes, said in (([], "has 0 tokens"), ([0], "has 1 tokens")):
        with pytest.raises(DataError, match=f"{said}.*give more text"):
            Windows(token_set(sizes), 4)
    with pytest.raises(ValueError, match="seq_len is 0"):
        Windows(token_set([5]), 0)


def test_a_short_stream_is_one_filled_window() -> None:
    batch = Windows(token_set([2]), 5, True).gather(np.array([0])).to("cpu")
    assert batch.ids_BT.tolist() == [[0, 1, EOS, EOS, EOS]]
    assert batch.targets_BT.tolist() == [[1, EOS, IGNORE, IGNORE, IGNORE]]
    assert batch.documents_BT is not None and batch.documents_BT.tolist() == [[0, 0, 0, 1, 2]]
    assert batch.n_targets == 2


def test_a_batch_moves_whole() -> None:
    host = Windows(token_set([9, 9]), 4, True).gather(np.array([0, 1]))
    moved = host.to("meta", non_blocking=True)
    assert isinstance(moved, Batch) and moved.n_targets == host.n_targets
    assert moved.documents_BT is not None
    for tensor in (moved.ids_BT, moved.targets_BT, moved.documents_BT):
        assert tensor.device.type == "meta" and tensor.dtype == torch.int64 and tensor.is_contiguous()
    assert Windows(token_set([9, 9]), 4).gather(np.array([0])).to("meta").documents_BT is None


@pytest.mark.gpu
def test_a_pinned_batch_arrives_on_the_gpu() -> None:
    for wide in (np.uint16, np.uint32):
        host = Windows(token_set([9, 9], wide), 4, True).gather(np.arange(5))
        pinned = host.pin()
        assert pinned.tokens_BT1.is_pinned()
        moved, here = pinned.to("cuda", non_blocking=True), host.to("cpu")
        torch.cuda.synchronize()
        assert torch.equal(moved.ids_BT.cpu(), here.ids_BT) and torch.equal(moved.targets_BT.cpu(), here.targets_BT)


@settings(max_examples=50, deadline=None)
@given(texts=st.lists(st.text("aé\U0001f600\n", max_size=8), max_size=10), chunk=st.integers(1, 30))
def test_from_documents_keeps_everything(texts: list[str], chunk: int) -> None:
    tokenizer = ByteTokenizer(ByteTokenizer.Params())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream_module, "CHUNK", chunk)
        stream = TokenSet.from_documents(iter(texts), tokenizer)
    assert stream.tokens.tolist() == [i for text in texts for i in (*text.encode(), EOS)]
    assert stream.tokens.dtype == np.uint16 and stream.starts.dtype == np.int64
    assert stream.n_bytes == sum(len(text.encode()) for text in texts)
    assert stream.starts[0] == 0 and stream.starts[-1] == len(stream) and stream.n_documents == len(texts)
    for text, begin, end in zip(texts, stream.starts, stream.starts[1:], strict=False):
        assert tokenizer.decode(stream.tokens[begin:end]) == text


@settings(max_examples=50, deadline=None)
@given(texts=st.lists(st.text("ab", max_size=5), min_size=1, max_size=10), enough=st.integers(1, 40))
def test_from_documents_stops_at_the_document_with_which_it_has_enough(texts: list[str], enough: int) -> None:
    tokenizer = ByteTokenizer(ByteTokenizer.Params())
    ends = np.cumsum([len(text) + 1 for text in texts])
    n_documents = min(int(np.searchsorted(ends, enough)) + 1, len(texts))
    stream = TokenSet.from_documents(iter(texts), tokenizer, enough)
    assert stream.starts.tolist() == [0, *ends[:n_documents]] and len(stream) == ends[n_documents - 1]
    assert stream.n_bytes == sum(map(len, texts[:n_documents]))


def test_the_fingerprint_tells_tokens_and_boundaries_apart() -> None:
    def with_starts(*starts: int) -> TokenSet:
        return TokenSet(np.array([1, EOS, EOS], np.uint16), np.array(starts), 1)

    prints = [token_set([3, 4]), token_set([4, 3]), token_set([3]), with_starts(0, 2, 3), with_starts(0, 3)]
    assert len({stream.fingerprint for stream in prints}) == len(prints)
    assert token_set([3, 4], np.uint32).fingerprint == token_set([3, 4]).fingerprint
