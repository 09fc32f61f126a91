"""Streams: every token once an epoch, shuffled; and a resume gives what would have come, bit for bit."""

from __future__ import annotations

import json
import multiprocessing
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekit.data import streaming
from sparsekit.data.order import BLOCK, quantise
from sparsekit.data.packing import IGNORE
from sparsekit.data.prefetch import Prefetched
from sparsekit.data.sources import JSONLines, Source
from sparsekit.data.streaming import Packer, Reader, StreamLoader, Text
from sparsekit.data.tokenizers import BPETokenizer, ByteTokenizer
from sparsekit.errors import DataError

BYTE = ByteTokenizer(ByteTokenizer.Params())
EOS = BYTE.eos_id


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "CHUNK", 300)  # so that a text of a few words is not read a thousand times ahead


class Listed(Source):
    """Documents that a test lists."""

    def __init__(self, texts: list[str]):
        self.texts = texts

    def documents(self, split: str) -> Iterator[str]:
        yield from self.texts


def text_of(texts: list[str] | Source, seq_len: int = 5, buffer: int = 4, **fields: Any) -> Text:
    source = Listed(texts) if isinstance(texts, list) else texts
    rest: dict[str, Any] = {"tokenizer": BYTE, "document_mask": False, "seed": 3, **fields}
    return Text([(source, 1.0)], seq_len=seq_len, buffer=buffer, **rest)


def stream(texts: list[str], reader: int, n_readers: int, n_tokens: int) -> list[int]:
    """What one reader packs, token by token from the definition."""
    mine = [i for n, text in enumerate(texts) if n % n_readers == reader for i in [*text.encode(), EOS]]
    return (mine * (n_tokens // len(mine) + 1))[:n_tokens]


def words(n: int) -> list[str]:
    """Documents of lengths 1 to 17, all different."""
    return [f"{i}:" + chr(97 + i % 26) * (i * 7 % 13) for i in range(n)]


# ---- packing ----

documents = st.lists(st.text("abé", max_size=12), min_size=1, max_size=9)


@settings(max_examples=100, deadline=None)
@given(texts=documents, seq_len=st.integers(1, 30), n=st.integers(1, 12), chunk=st.integers(1, 40), data=st.data())
def test_windows_follow_each_other_without_end(
    texts: list[str], seq_len: int, n: int, chunk: int, data: st.DataObject
) -> None:
    """Each begins with the last token of the one before; at any of them a packer can go on from its place alone."""
    n_readers = data.draw(st.integers(1, len(texts)))
    reader = data.draw(st.integers(0, n_readers - 1))
    expected = stream(texts, reader, n_readers, n * seq_len + 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming, "CHUNK", chunk)
        packer = Packer(Listed(texts), BYTE, reader, n_readers)
        rows = np.empty((n, seq_len + 1), np.uint16)
        for i, row in enumerate(rows):
            packer.fill(row)
            assert row.tolist() == expected[i * seq_len : (i + 1) * seq_len + 1]
            other = Packer(Listed(texts), BYTE, reader, n_readers)
            other.go_to(packer.place)
            if i + 1 < n:
                again = np.empty(seq_len + 1, np.uint16)
                other.fill(again)
                assert again.tolist() == expected[(i + 1) * seq_len : (i + 2) * seq_len + 1]


def test_nothing_is_held_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """A source without end, of which no more than a chunk is read."""
    read = 0

    class Endless(Source):
        def documents(self, split: str) -> Iterator[str]:
            nonlocal read
            while True:
                read += 1
                yield "ab" * 5

    monkeypatch.setattr(streaming, "CHUNK", 100)
    loader = StreamLoader(text_of(Endless({}), seq_len=10, buffer=2), 1)
    for i in range(20):
        loader.next()
        assert read * 11 < (i + 4) * 10 + 1 + 111


# ---- shuffling ----


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 20), seq_len=st.integers(1, 8), buffer=st.integers(1, 9), size=st.integers(1, 4))
def test_every_window_goes_out_once_or_waits_in_the_buffer(n: int, seq_len: int, buffer: int, size: int) -> None:
    texts = words(9)
    reader = Reader(text_of(texts, seq_len, buffer), size, 1, 2)
    given_out = [tuple(row) for _ in range(n) for row in reader._batch().tolist()]
    waiting = [tuple(row) for row in reader.buffer.tolist()]
    packed = stream(texts, 1, 2, (n * size + buffer) * seq_len + 1)
    windows = [tuple(packed[i * seq_len : (i + 1) * seq_len + 1]) for i in range(n * size + buffer)]
    assert Counter(given_out + waiting) == Counter(windows)


def test_a_larger_buffer_spreads_further() -> None:
    """In a source of single-letter windows, how far from its place in the text a window comes out."""
    texts = [f"{i:04d}" for i in range(5000)]  # five tokens with the end of text: a window a document
    spreads = []
    for buffer in (1, 10, 100):
        reader = Reader(text_of(texts, 5, buffer), 500, 0, 1)
        numbers = [int(bytes(row[:4])) for row in reader._batch().tolist()]
        spreads.append(np.abs(np.array(numbers) - np.arange(500)).mean())
    assert spreads[0] == 0 and 4 < spreads[1] < 20 and 40 < spreads[2] < 200  # a mean wait of buffer windows


def test_seeds_and_readers_shuffle_differently() -> None:
    texts = ["same text in every document"] * 8
    orders = set()
    for seed in (0, 1):
        for reader in (0, 1):
            made = Reader(text_of(texts, 7, 50, seed=seed), 40, reader, 2)
            orders.add(made._batch().tobytes())
    assert len(orders) == 4


# ---- the loader ----


def tokens(loader: StreamLoader | Prefetched, n: int = 1) -> list[list[list[int]]]:
    return [loader.next().tokens_BT1.tolist() for _ in range(n)]


@settings(max_examples=20, deadline=None)
@given(before=st.integers(0, 20), buffer=st.integers(1, 12), size=st.integers(1, 4), seq_len=st.integers(1, 20))
def test_a_resume_gives_what_would_have_come(before: int, buffer: int, size: int, seq_len: int) -> None:
    """Wherever between snapshots and epochs, through JSON, and resumed from a resumed one too."""
    texts = words(7)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming, "SNAPSHOT_EVERY", 6)
        undisturbed = StreamLoader(text_of(texts, seq_len, buffer), size)
        tokens(undisturbed, before)
        state = json.loads(json.dumps(undisturbed.state()))
        expected = tokens(undisturbed, 15)
        for loader in (undisturbed, StreamLoader(text_of(texts, seq_len, buffer), size)):
            loader.restore(state)
            assert tokens(loader, 8) == expected[:8]
            again = StreamLoader(text_of(texts, seq_len, buffer), size)
            again.restore(json.loads(json.dumps(loader.state())))
            assert tokens(again, 7) == expected[8:]


def test_ranks_share_the_documents() -> None:
    """Without shuffling: rank r reads documents r, r + 2, ... and both together every token of an epoch once."""
    texts = words(10)
    for rank in (0, 1):
        loader = StreamLoader(text_of(texts, 4, buffer=1), 2, 0, rank, 2)
        flat = [row for batch in tokens(loader, 9) for row in batch]
        packed = stream(texts, rank, 2, 18 * 4 + 1)
        assert flat == [packed[4 * i : 4 * i + 5] for i in range(18)]


def test_targets_under_a_document_mask() -> None:
    loader = StreamLoader(text_of(["ab", "c", "defg"], 6, buffer=1, document_mask=True), 2)
    batch = loader.next().to("cpu")
    a, b, c, d, e, f, g = b"abcdefg"
    assert batch.ids_BT.tolist() == [[a, b, EOS, c, EOS, d], [e, f, g, EOS, a, b]]
    assert batch.targets_BT.tolist() == [[b, EOS, IGNORE, EOS, IGNORE, e], [f, g, EOS, IGNORE, b, EOS]]
    assert batch.documents_BT is not None
    assert batch.documents_BT.tolist() == [[0, 0, 0, 1, 1, 2], [0, 0, 0, 0, 1, 1]] and batch.n_targets == 9


def test_several_sources_in_their_proportions() -> None:
    text = Text([(Listed(["a" * 9]), 3.0), (Listed(["b" * 9]), 1.0)], BYTE, 10, False, 8, 0)  # a window a document
    made = StreamLoader(text, 64)
    seen = np.array([row[0] for _ in range(2 * BLOCK // 64) for row in made.next().tokens_BT1.tolist()])
    counts = 2 * quantise([3.0, 1.0])
    assert abs((seen == ord("a")).sum() - counts[0]) <= 8 and set(seen.tolist()) == {ord("a"), ord("b")}
    made.restore(json.loads(json.dumps(made.state())))
    other = StreamLoader(text, 64)
    other.restore(made.state())
    assert tokens(other, 70) == tokens(made, 70)


def test_the_state_says_how_large_it_is() -> None:
    """4/3 x 2 bytes a token of the buffer, and little else."""
    loader = StreamLoader(text_of(words(40), 100, buffer=64), 1)
    tokens(loader, streaming.SNAPSHOT_EVERY)
    assert 64 * 101 * 2 * 4 / 3 <= len(json.dumps(loader.state())) < 64 * 101 * 2 * 4 / 3 + 1000


def test_global_random_numbers_are_left_alone() -> None:
    before = torch.get_rng_state()
    tokens(StreamLoader(text_of(words(5)), 1), 3)
    assert torch.equal(torch.get_rng_state(), before)


# ---- what is refused ----


def test_another_world_size_or_number_of_workers_is_refused() -> None:
    state = StreamLoader(text_of(words(9)), 2, 0, 0, 2).state()
    with pytest.raises(DataError) as caught:
        StreamLoader(text_of(words(9)), 2, 1, 0, 1).restore(state)
    assert str(caught.value) == (
        "data.streaming: the checkpoint's stream is of world_size 2, workers 0, micro_batch_size 2, rank 0, this one "
        "of world_size 1, workers 1, micro_batch_size 2, rank 0, and a stream goes on only under the same; go back to "
        "those, or `sparsekit tokenize` the text and train on its shards, from which any world size can go on"
    )
    for other in (StreamLoader(text_of(words(9)), 1, 0, 0, 2), StreamLoader(text_of(words(9)), 2, 0, 1, 2)):
        with pytest.raises(DataError, match="goes on only under the same"):
            other.restore(state)
    with pytest.raises(DataError, match="the checkpoint's place in the data is not a stream's"):
        StreamLoader(text_of(words(9)), 2).restore({"position": 8})
    assert not StreamLoader.elastic


def test_fewer_documents_than_readers() -> None:
    loader = StreamLoader(text_of(words(3)), 1, 0, 3, 4)
    with pytest.raises(DataError) as caught:
        loader.next()
    assert str(caught.value) == (
        "data.streaming: the source has 3 training documents for 4 readers (ranks times workers), and each needs one; "
        "use fewer, or `sparsekit tokenize` the text and train on its shards"
    )


def test_a_text_that_shrank_since_the_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "SNAPSHOT_EVERY", 1)
    loader = StreamLoader(text_of([f"{i:09d}" for i in range(30)], 10, buffer=2), 1)
    tokens(loader, 20)
    other = StreamLoader(text_of([f"{i:09d}" for i in range(5)], 10, buffer=2), 1)
    other.restore(loader.state())
    with pytest.raises(DataError, match="was reading document 2[0-9], and the source has only 5 by now; put the text"):
        other.next()


def test_how_long_an_epoch_is_is_not_known() -> None:
    with pytest.raises(DataError, match="set train.max_steps or train.max_tokens"):
        _ = StreamLoader(text_of(words(3)), 1).n_windows
    for size, workers, rank in ((0, 0, 0), (1, -1, 0), (1, 0, 1)):
        with pytest.raises(ValueError, match="micro_batch_size"):
            StreamLoader(text_of(words(3)), size, workers, rank)


@pytest.mark.parametrize("told", ["(pid(s) 12) exited unexpectedly", "(pid 12) is killed by signal: Killed. \nmore"])
def test_a_worker_that_died(told: str) -> None:
    loader = StreamLoader(text_of(words(3)), 1)

    def dying() -> Iterator[Any]:
        raise RuntimeError(f"DataLoader worker {told}")
        yield

    loader._iterator = dying()
    with pytest.raises(DataError) as caught:
        loader.next()
    assert str(caught.value) == (
        f"data.streaming: a worker process died (DataLoader worker {told.splitlines()[0]}), out of memory or because "
        "the script that trains lacks the guard if __name__ == '__main__'; data.streaming.workers 0 needs none"
    )


def test_without_torchdata(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchdata.stateful_dataloader", None)
    with pytest.raises(DataError) as caught:
        StreamLoader(text_of(words(3)), 1)
    assert str(caught.value) == "data.streaming needs torchdata; pip install 'sparsekit[streaming]'"


# ---- processes ----


@pytest.fixture
def rows(tmp_path: Path) -> JSONLines:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in words(60)))
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text('{"text": "held out"}\n')
    return JSONLines(JSONLines.Params(path=str(path), validation_path=str(held_out)))


def test_two_workers_resume_exactly(rows: JSONLines, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a tokenizer that learnt, read ahead; batches alternate between the workers, each with its own documents."""
    monkeypatch.setattr(streaming, "SNAPSHOT_EVERY", 10)
    bpe = BPETokenizer(BPETokenizer.Params(vocab_size=280))
    bpe.fit(rows.documents("train"))
    text = text_of(rows, 6, buffer=5, tokenizer=bpe)
    loader = Prefetched(StreamLoader(text, 2, workers=2))
    tokens(loader, 27)
    state = json.loads(json.dumps(loader.state()))
    expected = tokens(loader, 30)
    loader.close()
    alone = [Reader(text, 2, reader, 2) for reader in (0, 1)]
    batches = [next(alone[i % 2]).tolist() for i in range(57)]  # type: ignore[union-attr]
    assert expected == batches[27:]
    resumed = StreamLoader(text, 2, workers=2)
    resumed.restore(state)
    assert tokens(resumed, 30) == expected and len(multiprocessing.active_children()) == 2
    resumed.close()
    assert not multiprocessing.active_children()


def test_an_error_in_a_worker_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "good"}\n' * 40 + "{\n")
    source = JSONLines(JSONLines.Params(path=str(path)))
    loader = StreamLoader(text_of(source, 3, buffer=1), 1, workers=1)
    with pytest.raises(DataError) as caught:
        tokens(loader, 100)
    loader.close()
    assert "bad.jsonl:41" in str(caught.value) and "not JSON" in str(caught.value) and "\n" not in str(caught.value)
