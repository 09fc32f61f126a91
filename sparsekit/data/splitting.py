"""On which side a document stands, training or validation, where the user did not say."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import NamedTuple

from sparsekit.errors import DataError


class Document(NamedTuple):
    """A text and where it begins, for errors."""

    text: str
    where: str


@dataclass
class Tally:
    """How many documents were placed, and between where."""

    n: int = 0
    lowest: float = 1.0
    highest: float = 0.0


def place(text: str) -> float:
    """Where a document stands between 0 and 1: 52 bits of its hash, so that the float is exact and below 1."""
    return (int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 12) / 2**52


def cut(document: Document, fraction: float, mend: str) -> tuple[str, str]:
    """A lone document as (training, validation), cut after the line end nearest to where the fraction begins."""
    text = document.text
    first = text.find("\n", len(text) - len(text.lstrip())) + 1  # cut earlier or later, one side would be blank
    last = text.rfind("\n", 0, len(text.rstrip())) + 1
    if not 0 < first <= last:
        raise DataError(
            f"{document.where}: no validation documents: the only document has no line boundary to be cut at; "
            f"give {mend}, or more documents"
        )
    goal = round(len(text) * (1 - fraction))
    near = min(max(goal, first), last)
    before, after = text.rfind("\n", 0, near) + 1, text.find("\n", near, last) + 1 or last
    best = min(before, after, key=lambda at: abs(at - goal))
    return text[:best], text[best:]
