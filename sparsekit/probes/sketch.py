"""Quantiles of a stream of numbers in fixed memory, with a stated relative error; sketches of parts add up."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparsekit.components.contracts import wide

LOWEST = 1e-12  # magnitudes below count as 0
HIGHEST = 1e12


class Sketch:
    """A histogram with bins that grow by gamma = (1 + a) / (1 - a), one for each sign, and one for 0.

    Every number x with 1e-12 <= |x| <= 1e12 is told as its bin's value, off by at most a |x|.

    Attributes:
        counts: int64 [2 n + 1], from the most negative bin over 0 to the most positive.

    Source: Masson, Rim & Lee 2019, arXiv 1908.10693, sec. 2
    """

    def __init__(self, error: float = 0.005, device: torch.device | str = "cpu"):
        self.error = error
        self._log_gamma = math.log((1 + error) / (1 - error))
        self._first = math.ceil(math.log(LOWEST) / self._log_gamma)
        self.n = math.ceil(math.log(HIGHEST) / self._log_gamma) - self._first + 1
        self.counts = torch.zeros(2 * self.n + 1, dtype=torch.int64, device=device)

    def add(self, x: Tensor) -> None:
        """Counts all entries."""
        x = x.flatten()
        x = x.to(wide(x.dtype))
        size = x.abs()
        bins = (size.clamp(min=LOWEST, max=HIGHEST).log() / self._log_gamma).ceil().long() - self._first
        bins = torch.where(size < LOWEST, 0, (bins.clamp(0, self.n - 1) + 1) * x.sign().long())
        self.counts += torch.bincount(bins + self.n, minlength=2 * self.n + 1)

    def merge(self, other: Sketch) -> None:
        """Adds what another of the same error has counted."""
        self.counts += other.counts

    @property
    def values(self) -> Tensor:
        """What each bin stands for, float64, ascending."""
        exponents = torch.arange(self.n, dtype=torch.float64) + self._first
        positive = (exponents * self._log_gamma).exp() * (1 - self.error)  # 2 gamma^i / (gamma + 1)
        return torch.cat((-positive.flip(0), torch.zeros(1, dtype=torch.float64), positive))

    def quantile(self, q: float) -> float:
        """The smallest bin's value that at least a share q of the entries does not exceed."""
        return weighted_quantile(self.values, self.counts.cpu(), q)

    def mad(self) -> float:
        """The median of |x - median|, off by at most a (|x| + 2 |median|)."""
        distance = (self.values - self.quantile(0.5)).abs()
        order = distance.argsort(stable=True)
        return weighted_quantile(distance[order], self.counts.cpu()[order], 0.5)

    def share(self, inside: Tensor) -> float:
        """The share of entries in some bins."""
        counts = self.counts.cpu()
        return float((counts * inside).sum() / counts.sum().clamp(min=1))


def weighted_quantile(values: Tensor, counts: Tensor, q: float) -> float:
    """Of values in ascending order, the first at which the counts reach a share q."""
    total = counts.cumsum(0)
    target = torch.tensor(max(1, math.ceil(q * int(total[-1]))), dtype=total.dtype)
    return float(values[torch.searchsorted(total, target)])
