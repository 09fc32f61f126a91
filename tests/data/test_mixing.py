"""The source ``mix``: whose streams, whose documents and which weights; and streams that are joined to one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from sparsekit.data.mixing import Joined, Mix, join, readers
from sparsekit.data.packing import Windows
from sparsekit.data.sources import Source
from sparsekit.data.token_set import TokenSet
from sparsekit.data.tokenizers import ByteTokenizer
from sparsekit.errors import DataError
from sparsekit.registry import registry

BYTE = ByteTokenizer(ByteTokenizer.Params())


class Letters(Source):
    """``n`` training documents of one letter, and one that is held out."""

    class Params(Source.Params):
        letter: str
        n: int = 1

    def documents(self, split: str) -> Iterator[str]:
        yield from [self.params.letter] * self.params.n if split == "train" else [self.params.letter.upper()]


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    registry("source").register("letters")(Letters)
    yield
    registry("source").unregister("letters")


def mix(*sources: Any, weights: list[float] | None = None) -> Mix:
    return Mix(Mix.Params.model_validate({"sources": list(sources), "weights": weights}))


def letters(letter: str, n: int = 1) -> dict[str, Any]:
    return {"type": "letters", "letter": letter, "n": n}


def told(source: Source, split: str = "train") -> list[tuple[str, float]]:
    return [(BYTE.decode(tokens.rows(np.array([0]), len(tokens))[0]), w) for tokens, w in source.streams(split, BYTE)]


def test_without_weights_sizes_count() -> None:
    """In tokens, ends of text included."""
    assert told(mix(letters("a", 3), letters("b", 1))) == [("aaa", 6), ("b", 2)]


def test_weights_are_as_given_and_need_not_sum_to_one() -> None:
    assert told(mix(letters("a", 3), letters("b", 1), weights=[1, 3])) == [("aaa", 1), ("b", 3)]


def test_mixtures_within_share_out_their_weight() -> None:
    inner = {"type": "mix", "sources": [letters("a", 3), letters("b", 1)]}
    assert told(mix(inner, letters("c"), weights=[2, 1])) == [("aaa", 1.5), ("b", 0.5), ("c", 1)]
    inner["weights"] = [1, 3]
    assert told(mix(inner, letters("c"))) == [("aaa", 2), ("b", 6), ("c", 2)]


def test_documents_are_everyones_once() -> None:
    source = mix(letters("a", 3), letters("b"), weights=[1, 50])
    assert list(source.documents("train")) == ["a", "a", "a", "b"]
    assert list(source.documents("validation")) == ["A", "B"]


def test_a_source_of_weight_0_is_validated_on_only() -> None:
    source = mix(letters("a"), letters("b"), weights=[1, 0])
    assert told(source) == [("a", 1)] and list(source.documents("train")) == ["a"]
    assert [text for text, _ in told(source, "validation")] == ["A", "B"]
    assert [(one.params.letter, weight) for one, weight in readers(source)] == [("a", 1)]


def test_readers_flatten_and_need_weights() -> None:
    inner = {"type": "mix", "sources": [letters("a"), letters("b")], "weights": [1, 3]}
    found = readers(mix(inner, letters("c"), weights=[2, 1]))
    assert [(one.params.letter, weight) for one, weight in found] == [("a", 0.5), ("b", 1.5), ("c", 1)]
    alone = Letters(Letters.Params(letter="a"))
    assert readers(alone) == [(alone, 1.0)]
    for source in (mix(letters("a")), mix({**inner, "weights": None}, letters("c"), weights=[2, 1])):
        with pytest.raises(DataError) as caught:
            readers(source)
        expected = "data.source.weights: a mix that is streamed needs them, as no source's size is known"
        assert str(caught.value) == expected


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"sources": []}, "at least 1 item"),
        ({"sources": ["embedded"], "weights": [1, 2]}, "2 weights for 1 sources; give one each"),
        ({"sources": ["embedded"], "weights": [0]}, "not all 0"),
        ({"sources": ["embedded"], "weights": [-1]}, "greater than or equal to 0"),
        ({"sources": ["embeded"]}, "did you mean 'embedded'"),
    ],
)
def test_mistakes(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Mix.Params.model_validate(fields)


# ---- joined ----


def streams(sizes: list[list[int]]) -> list[TokenSet]:
    """Streams of documents of these lengths; tokens count up through all, so that each can be told apart."""
    made, first = [], 0
    for lengths in sizes:
        ends = np.cumsum([0, *lengths])
        made.append(TokenSet((first + np.arange(ends[-1])).astype(np.uint16), ends.astype(np.int64), int(ends[-1])))
        first += int(ends[-1])
    return made


@settings(max_examples=150, deadline=None)
@given(
    sizes=st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=4), min_size=1, max_size=4),
    length=st.integers(1, 30),
    data=st.data(),
)
def test_joined_streams_are_as_one(sizes: list[list[int]], length: int, data: st.DataObject) -> None:
    """As the token set that holds all of it, rows across several parts and past the end included."""
    parts = streams(sizes)
    joined = Joined(parts)
    ends = np.cumsum([0, *(n for lengths in sizes for n in lengths)]).astype(np.int64)
    whole = TokenSet(np.concatenate([part.tokens for part in parts]), ends, int(ends[-1]))
    assert (len(joined), joined.n_documents, joined.n_bytes) == (len(whole), whole.n_documents, whole.n_bytes)
    begins = np.array(data.draw(st.lists(st.integers(0, len(whole) - 1), max_size=5)), dtype=np.int64)
    assert np.array_equal(joined.rows(begins, length), whole.rows(begins, length))
    assert joined.rows(begins, length).dtype == np.uint16
    places = np.arange(len(whole) + 3)
    assert np.array_equal(joined.documents(places), whole.documents(places))
    assert np.array_equal(joined.documents(places[:2, None]), whole.documents(places[:2, None]))


class Uncounted(TokenSet):
    """As raw shards, of which a count of documents reads all."""

    @property
    def n_documents(self) -> int:
        raise AssertionError("counted")


def test_joining_counts_no_documents() -> None:
    parts = [Uncounted(part.tokens, part.starts, part.n_bytes) for part in streams([[5, 4], [3]])]
    joined = Joined(parts)
    assert Windows(joined, 4, document_mask=True).gather(np.arange(3)).n_targets == 11
    assert len(joined) == 12 and joined.fingerprint
    with pytest.raises(AssertionError, match="counted"):
        joined.documents(np.arange(3))


def test_windows_of_joined_streams() -> None:
    joined = Joined(streams([[5, 4], [3]]))
    batch = Windows(joined, 4).gather(np.arange(3)).to("cpu")
    assert batch.ids_BT.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [7, 8, 9, 10]] and batch.n_targets == 11


def test_fingerprints_of_joined_streams() -> None:
    a, b = streams([[5], [4]])
    assert len({Joined(parts).fingerprint for parts in ([a, b], [b, a], [a], [a, b, b])}) == 4
    assert Joined([a, b]).fingerprint == Joined([a, b]).fingerprint
    assert join([(a, 0.5)]) is a and isinstance(join([(a, 1.0), (b, 1.0)]), Joined)
