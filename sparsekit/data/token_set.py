"""The tokens of a split as one stream, document after document, each followed by its end of text."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from sparsekit.data.tokenizers import Ids, Tokenizer

CHUNK = (
    1 << 23
)  # characters encoded, or tokens hashed, at a time: enough to keep every core busy, little enough to hold


class Tokens(Protocol):
    """What windows are cut from, wherever it lies: N tokens; every document's last is an end of text, and no other.

    Attributes:
        n_documents: how many documents.
        n_bytes: UTF-8 bytes of the text, by which losses in nats a token become bits a byte.
        fingerprint: equal exactly where training would be.
    """

    @property
    def n_documents(self) -> int: ...
    @property
    def n_bytes(self) -> int: ...
    @property
    def fingerprint(self) -> str: ...

    def __len__(self) -> int: ...

    def rows(self, begins_B: np.ndarray[Any, Any], length: int) -> Ids:
        """[B, length] tokens from each begin on, a copy; past the stream's end its last token is repeated."""
        ...

    def documents(self, places: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.int64]]:
        """The number of the document at each place of the stream; n_documents for places past its end."""
        ...


@dataclass(frozen=True)
class TokenSet:
    """The tokens of a split, document after document, each followed by its end of text.

    Attributes:
        tokens: [N], uint16 or uint32.
        starts: [n_documents + 1] int64: where each document begins, and at last N.
        n_bytes: UTF-8 bytes of the text, by which losses in nats a token become bits a byte.
    """

    tokens: Ids
    starts: np.ndarray[Any, np.dtype[np.int64]]
    n_bytes: int

    def __len__(self) -> int:
        return len(self.tokens)

    def rows(self, begins_B: np.ndarray[Any, Any], length: int) -> Ids:
        """As :meth:`Tokens.rows`."""
        if len(begins_B) and begins_B.max() <= len(self) - length:
            return rows_inside(self.tokens, begins_B, length)
        places = begins_B[:, None] + np.arange(length)
        return self.tokens[np.minimum(places, len(self) - 1)]

    def documents(self, places: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.int64]]:
        """As :meth:`Tokens.documents`."""
        return np.searchsorted(self.starts, places, side="right") - 1

    @property
    def n_documents(self) -> int:
        return len(self.starts) - 1

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the tokens and of where documents begin: equal exactly where training would be."""
        digest = hashlib.sha256()
        for first in range(0, len(self), CHUNK):  # the whole in four bytes a token would be a second copy, or a third
            digest.update(self.tokens[first : first + CHUNK].astype("<u4").tobytes())
        digest.update(self.starts.astype("<i8").tobytes())
        return digest.hexdigest()

    @classmethod
    def from_documents(cls, documents: Iterable[str], tokenizer: Tokenizer, enough: int | None = None) -> TokenSet:
        """Encodes every document whole; nothing is dropped or cut.

        Args:
            documents: the text.
            tokenizer: encodes it.
            enough: reads on only until there are so many tokens; null for all.

        Raises:
            DataError: as reading the documents and encoding them do.
        """
        parts: list[Ids] = []
        lengths: list[int] = []
        n_tokens = n_bytes = 0
        end = np.array([tokenizer.eos_id], dtype=tokenizer.dtype)
        for text, ids in _encoded(documents, tokenizer):
            n_bytes += len(text.encode())
            parts += (ids, end)
            lengths.append(len(ids) + 1)
            n_tokens += len(ids) + 1
            if enough is not None and n_tokens >= enough:
                break
        tokens = np.concatenate(parts) if parts else end[:0]
        starts = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
        return cls(tokens, starts.astype(np.int64), n_bytes)


def rows_inside(tokens: Ids, begins_B: np.ndarray[Any, Any], length: int) -> Ids:
    """[B, length] tokens from each begin on, a copy, all of them inside: a memcpy a row, not an index a token.

    Args:
        tokens: [N], contiguous, in memory or mapped into it.
        begins_B: integers in [0, N - length].
        length: of a row.
    """
    step = tokens.itemsize
    every = np.ndarray((len(tokens) - length + 1, length), tokens.dtype, tokens, strides=(step, step))  # overlapping
    rows: Ids = every[begins_B]
    return rows


def _encoded(documents: Iterable[str], tokenizer: Tokenizer) -> Iterator[tuple[str, Ids]]:
    for texts in _chunks(documents):
        yield from zip(texts, tokenizer.encode_batch(texts), strict=True)


def _chunks(documents: Iterable[str]) -> Iterator[list[str]]:
    """The documents in lists of about CHUNK characters."""
    texts: list[str] = []
    size = 0
    for text in documents:
        texts.append(text)
        size += len(text)
        if size >= CHUNK:
            yield texts
            texts, size = [], 0
    if texts:
        yield texts
