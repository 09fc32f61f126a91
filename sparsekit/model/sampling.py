"""Which token comes next: the likeliest, or one drawn from what temperature and cuts leave of the distribution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsekit.components.contracts import wide


@dataclass(frozen=True)
class Sampling:
    """Draws from softmax(logits / temperature), cut and scaled to sum to 1 again; temperature 0 takes the likeliest.

    Cuts apply one after the other, each to what the one before left.

    Attributes:
        top_k: only the k likeliest tokens (and those as likely as the k-th).
        top_p: only the fewest tokens that have together at least this probability (Holtzman et al. 2019,
            arXiv 1904.09751, sec. 3.1).
        min_p: only tokens at least this times as likely as the likeliest (Nguyen et al. 2024, arXiv 2407.01082,
            sec. 3).

    Raises:
        ValueError: a number outside its range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self) -> None:
        if not self.temperature >= 0 or (self.top_k is not None and self.top_k < 1):
            raise ValueError(f"temperature must be >= 0 and top_k >= 1, got {self.temperature} and {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be in 0 .. 1, got {self.min_p}")

    def probabilities(self, logits_BV: Tensor) -> Tensor:
        """What is drawn from, [..., vocab], at a temperature above 0."""
        scaled = logits_BV / self.temperature
        if self.top_k is not None and self.top_k < scaled.shape[-1]:
            kth = scaled.topk(self.top_k).values[..., -1:]
            scaled = scaled.masked_fill(scaled < kth, float("-inf"))
        if self.top_p is not None and self.top_p < 1:
            p, order = scaled.softmax(-1).sort(dim=-1, descending=True, stable=True)
            before = p.cumsum(-1) - p
            cut = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= self.top_p)
            scaled = scaled.masked_fill(cut, float("-inf"))
        p = scaled.softmax(-1)
        if self.min_p is not None:
            p = p.masked_fill(p < self.min_p * p.amax(-1, keepdim=True), 0.0)
            p = p / p.sum(-1, keepdim=True)
        return p

    def pick(self, logits_BV: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """A token for each row, [batch]; a row draws from a generator of its own, whatever rows stand beside it."""
        logits_BV = logits_BV.to(wide(logits_BV.dtype))
        if self.temperature == 0:
            return logits_BV.argmax(-1)
        rows = zip(self.probabilities(logits_BV), generators, strict=True)
        return torch.cat([torch.multinomial(p, 1, generator=generator) for p, generator in rows])
