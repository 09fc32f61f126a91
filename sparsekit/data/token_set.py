"""The tokens of a split as one stream, document after document, each followed by its end of text."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from sparsekit.data.tokenizers import Ids, Tokenizer

CHUNK = 1 << 23  # characters encoded at a time: enough to keep every core busy, little enough to hold


class Tokens(Protocol):
    """What windows are cut from, wherever it lies: N tokens, of which every document's last is an end of text.

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
        places = begins_B[:, None] + np.arange(length)
        return self.tokens[np.minimum(places, len(self) - 1)]

    def documents(self, places: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.int64]]:
        """As :meth:`Tokens.documents`."""
        return np.searchsorted(self.starts, places, side="right") - 1

    @property
    def n_documents(self) -> int:
        return len(self.starts) - 1

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the tokens and of where documents begin: equal exactly where training would be."""
        digest = hashlib.sha256(self.tokens.astype("<u4").tobytes())
        digest.update(self.starts.astype("<i8").tobytes())
        return digest.hexdigest()

    @classmethod
    def from_documents(cls, documents: Iterable[str], tokenizer: Tokenizer) -> TokenSet:
        """Encodes every document whole; nothing is dropped or cut.

        Raises:
            DataError: as reading the documents and encoding them do.
        """
        parts: list[Ids] = []
        lengths: list[int] = []
        n_bytes = 0
        end = np.array([tokenizer.eos_id], dtype=tokenizer.dtype)
        for texts in _chunks(documents):
            n_bytes += sum(len(text.encode()) for text in texts)
            for ids in tokenizer.encode_batch(texts):
                parts += (ids, end)
                lengths.append(len(ids) + 1)
        tokens = np.concatenate(parts) if parts else end[:0]
        starts = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
        return cls(tokens, starts.astype(np.int64), n_bytes)


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
