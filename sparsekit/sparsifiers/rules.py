"""Which entries of a projection's input stay: those whose score is above a threshold, or among the k largest."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from sparsekit.components.contracts import wide
from sparsekit.probes.anatomy import ExpertRows

SAMPLE = 1 << 22  # scores that a quantile is taken of


class Limit(NamedTuple):
    """What calibration found for one site.

    Attributes:
        threshold: one number, or one an input [I], of experts [E, F]; None where ``k`` is given.
        k: how many entries of a token stay; of experts, for each that it visits.
    """

    threshold: Tensor | None = None
    k: int | None = None


@dataclass(frozen=True)
class Rule:
    """An entry x_i is put to 0 unless its score is above the limit; nan is never dropped.

    The score is |x_i| weight_i; or |g_i| weight_i with g what the feed-forward's gate lets through. In a ``basis`` V
    (orthogonal, [I, I]) entries are those of V^T x, and what the projection reads is turned back.

    Attributes:
        inclusive: a score equal to the threshold stays.
        by_routing: of experts: scores are multiplied by the size of the routing weight, too.
    """

    limit: Limit
    weight_I: Tensor | None = None
    by_gate: bool = False
    inclusive: bool = False
    basis_II: Tensor | None = None
    by_routing: bool = False

    def beside(self, weight: Tensor) -> Rule:
        """The same where a projection's weight is, so that no forward waits for a copy."""
        threshold, basis = self.limit.threshold, self.basis_II
        return replace(
            self,
            limit=Limit(None if threshold is None else threshold.to(weight.device, wide(weight.dtype)), self.limit.k),
            basis_II=None if basis is None else basis.to(weight.device, wide(weight.dtype)),
        )

    def of_rows(self, rows: ExpertRows) -> Rule:
        """The same for rows of experts, [M, F], where weights or thresholds are [E, F]: each row's are its expert's."""
        weight, threshold = self.weight_I, self.limit.threshold
        weight = None if weight is None else weight[rows.expert_M]
        if self.by_routing:
            size_M1 = rows.weight_M.abs()[:, None]
            weight = size_M1 if weight is None else weight * size_M1
        if threshold is not None and threshold.ndim == 2:
            threshold = threshold[rows.expert_M]
        return replace(self, limit=Limit(threshold, self.limit.k), weight_I=weight)

    def scores(self, x: Tensor) -> Tensor:
        """[..., I], in float32 or wider."""
        size = x.to(wide(x.dtype)).abs()
        return size if self.weight_I is None else size * self.weight_I

    def keep(self, x: Tensor) -> Tensor:
        """Whether each entry stays, [..., I] of bool, by x or, where ``by_gate``, by gates."""
        scores = self.scores(x)
        if self.limit.k is not None:
            return largest(scores, self.limit.k)
        threshold = self.limit.threshold
        assert threshold is not None
        return ~(scores < threshold) if self.inclusive else ~(scores <= threshold)

    def coordinates(self, x: Tensor) -> Tensor:
        """x in the basis that it is masked in, there in float32 or wider."""
        return x if self.basis_II is None else x.to(self.basis_II.dtype) @ self.basis_II

    def back(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`coordinates`."""
        return x if self.basis_II is None else x @ self.basis_II.T


def largest(scores: Tensor, k: int) -> Tensor:
    """True for the k largest of each row [..., I], exactly k."""
    kept = torch.zeros_like(scores, dtype=torch.bool)
    return kept.scatter(-1, scores.topk(min(k, scores.shape[-1]), dim=-1).indices, True)


def n_kept(share: float, width: int) -> int:
    """round(share width), at least one."""
    return max(1, round(share * width))


class Sample:
    """Scores seen so far, a fixed number of them drawn at random where there are more.

    Args:
        batches: how many will come; each gives as much.
    """

    def __init__(self, batches: int, seed: int):
        self.most = max(1, SAMPLE // batches)
        self._generator = torch.Generator().manual_seed(seed)
        self._parts: list[Tensor] = []

    def add(self, scores: Tensor) -> None:
        flat = scores.detach().flatten()
        if flat.numel() > self.most:
            chosen = torch.randint(flat.numel(), (self.most,), generator=self._generator)
            flat = flat[chosen.to(flat.device)]
        self._parts.append(flat.clone())

    def scores(self) -> Tensor:
        """All of them, in a row."""
        return torch.cat(self._parts)

    def quantile(self, share: float) -> Tensor:
        """As :func:`quantile` of the scores."""
        return quantile(self.scores(), share)


def quantile(scores: Tensor, share: float) -> Tensor:
    """A t such that a share of scores >= 0 is at most t, as nearly as equal scores allow; 0 for none.

    It stands midway between scores, so that rounding does not decide on which side of it one of them falls.
    """
    flat = scores.flatten()
    k = round(share * flat.numel())
    if not k:
        return flat.new_zeros(())
    at = flat.kthvalue(k).values
    n_below, n_up_to = int((flat < at).sum()), int((flat <= at).sum())
    low, high = (at, flat[flat > at]) if n_up_to - k <= k - n_below else (flat[flat < at], at)
    if not low.numel() or not high.numel():
        return low.max() if low.numel() else flat.new_zeros(())
    return low.max() + (high.min() - low.max()) / 2
