"""A source of text for sparsekit; in a spec ``"data": {"source": {"type": "new_part"}}``."""

from __future__ import annotations

import random
from collections.abc import Iterator

from pydantic import NonNegativeInt, PositiveInt
from sparsekit.data.sources import Source

HELD_OUT = 10  # of so many pairs of numbers one is for validation


class NewPart(Source):
    """Sums to learn addition from, such as "17+5=22", a line each and a hundred a document.

    ``n`` documents to train on, and a tenth as many to validate on with pairs of numbers that no training document has.
    Numbers are below ``below``. The same ``seed`` gives the same documents in the same order.
    """

    class Params(Source.Params):
        n: PositiveInt = 1000
        below: PositiveInt = 100
        seed: NonNegativeInt = 0

    def documents(self, split: str) -> Iterator[str]:
        if split not in ("train", "validation"):
            raise ValueError(f"unknown split {split!r}; splits: train, validation")
        held_out = split == "validation"
        draw = random.Random(f"{self.params.seed} {split}")
        for _ in range(max(1, self.params.n // 10) if held_out else self.params.n):
            yield "".join(self._sum(draw, held_out) for _ in range(100))

    def _sum(self, draw: random.Random, held_out: bool) -> str:
        while True:
            a, b = draw.randrange(self.params.below), draw.randrange(self.params.below)
            if ((31 * a + 17 * b) % HELD_OUT == 0) == held_out:
                return f"{a}+{b}={a + b}\n"
