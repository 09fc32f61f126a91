"""Several sources as one: trained on in given proportions, validated on one after another."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Annotated, Any, TypeVar

import numpy as np
from pydantic import Field, NonNegativeFloat, model_validator

from sparsekit.data.order import quantise
from sparsekit.data.sources import Source
from sparsekit.data.token_set import Tokens
from sparsekit.data.tokenizers import Ids, Tokenizer
from sparsekit.errors import DataError
from sparsekit.spec.slot import Choice, Slot

Part = TypeVar("Part")


class Mix(Source):
    """Several sources, mixed in proportion to weights over tokens, or to their sizes where no weights are given.

    Weights need not sum to 1. Of every 4096 sequences each source gives the same number, so a weight is rounded to
    a part in 4096, one that is not 0 to at least one; a small source is read again, each time in another order.
    Validation is every source's, one after another, whatever the weights; a source of weight 0 serves for it alone.
    """

    class Params(Source.Params):
        sources: Annotated[list[Annotated[Choice, Slot("source")]], Field(min_length=1)]
        weights: list[NonNegativeFloat] | None = None

        @model_validator(mode="after")
        def _a_weight_each(self) -> Mix.Params:
            if self.weights is not None:
                if len(self.weights) != len(self.sources):
                    raise ValueError(f"{len(self.weights)} weights for {len(self.sources)} sources; give one each")
                quantise(self.weights)
            return self

    def __init__(self, params: Any):
        super().__init__(params)
        self.sources: list[Source] = [choice.cls(choice.params) for choice in params.sources]

    def _of(self, split: str) -> list[tuple[Source, float | None]]:
        """The sources that a split takes part of, with the weights given, if any."""
        weights = self.params.weights or [None] * len(self.sources)
        pairs = zip(self.sources, weights, strict=True)
        return [(source, weight) for source, weight in pairs if split == "validation" or weight != 0]

    def documents(self, split: str) -> Iterator[str]:
        """Every source's documents once, source after source: weights say how often windows are drawn, not texts."""
        for source, _ in self._of(split):
            yield from source.documents(split)

    def learning_text(self) -> Iterator[str]:
        for source, _ in self._of("train"):
            yield from source.learning_text()

    def streams(self, split: str, tokenizer: Tokenizer) -> list[tuple[Tokens, float]]:
        """All the sources' streams; each source's weight is shared out over its own as that source has them."""
        mixed: list[tuple[Tokens, float]] = []
        for source, weight in self._of(split):
            streams = source.streams(split, tokenizer)
            mixed += _shared(streams, sum(len(tokens) for tokens, _ in streams) if weight is None else weight)
        return mixed

    def readers(self) -> list[tuple[Source, float]]:
        """The training sources that are no mixtures, with their weights: for reading them before sizes are known.

        Raises:
            DataError: no weights are given, here or in a mixture within.
        """
        mixed: list[tuple[Source, float]] = []
        for source, weight in self._of("train"):
            if weight is None:
                raise DataError("data.source.weights: a mix that is streamed needs them, as no source's size is known")
            mixed += _shared(readers(source), weight)
        return mixed


def _shared(parts: Sequence[tuple[Part, float]], weight: float) -> list[tuple[Part, float]]:
    """The parts with their weights scaled to sum to ``weight``."""
    total = sum(share for _, share in parts)
    return [(part, weight * share / total) for part, share in parts]


def readers(source: Source) -> list[tuple[Source, float]]:
    """The sources that a source is made of, with their weights: of one that is no :class:`Mix`, itself."""
    return source.readers() if isinstance(source, Mix) else [(source, 1.0)]


class Joined:
    """Several streams of tokens read as one, the first to the last.

    Satisfies :class:`~sparsekit.data.token_set.Tokens`.
    """

    def __init__(self, parts: Sequence[Tokens]):
        self.parts = list(parts)
        self._begins = np.cumsum([0, *map(len, self.parts)])

    @cached_property
    def _documents(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        return np.cumsum([0, *(part.n_documents for part in self.parts)])  # of raw shards a count reads all

    def __len__(self) -> int:
        return int(self._begins[-1])

    @property
    def n_documents(self) -> int:
        return int(self._documents[-1])

    @property
    def n_bytes(self) -> int:
        return sum(part.n_bytes for part in self.parts)

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(" ".join(part.fingerprint for part in self.parts).encode()).hexdigest()

    def _part_at(self, places: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.int64]]:
        found = np.searchsorted(self._begins, places, side="right") - 1
        return np.minimum(found, len(self.parts) - 1)  # places past the end are the last one's matter

    def rows(self, begins_B: np.ndarray[Any, Any], length: int) -> Ids:
        """As :meth:`Tokens.rows`."""
        firsts_B = self._part_at(begins_B)
        pieces = []
        for begin, first in zip(begins_B.tolist(), firsts_B.tolist(), strict=True):
            row, part = [], first
            here, left = begin - int(self._begins[part]), length
            while part < len(self.parts) - 1 and here + left > len(self.parts[part]):
                taken = len(self.parts[part]) - here
                row.append(self.parts[part].rows(np.array([here]), taken)[0])
                part, here, left = part + 1, 0, left - taken
            row.append(self.parts[part].rows(np.array([here]), left)[0])
            pieces.append(np.concatenate(row))
        return np.stack(pieces) if pieces else self.parts[0].rows(begins_B, length)

    def documents(self, places: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.int64]]:
        """As :meth:`Tokens.documents`."""
        part = self._part_at(places)
        numbers = np.empty(np.shape(places), np.int64)
        for i in np.unique(part).tolist():
            here = part == i
            numbers[here] = self._documents[i] + self.parts[i].documents(np.asarray(places)[here] - self._begins[i])
        return numbers


def join(streams: Sequence[tuple[Tokens, float]]) -> Tokens:
    """The streams as one, without regard to their weights."""
    return streams[0][0] if len(streams) == 1 else Joined([tokens for tokens, _ in streams])
