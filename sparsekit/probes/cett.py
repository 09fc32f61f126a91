"""CETT: what share of a feed-forward's output is lost with its weakest neurons, and how much of that perplexity bears.

A neuron i contributes n_i = r a_i W_down[:, i] to its token, a_i the input of the down projection and r the routing
weight (1 outside of mixtures); its size is c_i = ||n_i||. Shapes beside those of :mod:`sparsekit.probes.base`: P grid
points at which CETT is measured, Q points in all, C neurons of a layer, those of all its experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sparsekit.errors import DataError
from sparsekit.probes.anatomy import ExpertRows
from sparsekit.probes.base import Array, Observer, ProbeResult
from sparsekit.probes.layered import Pass
from sparsekit.probes.neurons import SITES, Active, Down, Downs, Seen, acts_of, as_rows, sizes

SAMPLE = 1 << 20  # sizes c that the grid's quantiles are taken of
MOST_TAILS = {"cuda": 1 << 26}  # numbers of tail vectors that exist at a time
MOST_TAILS_ELSEWHERE = 1 << 20  # a cache holds them
FINER = 16  # points of the grid for each at which CETT is measured
CLOSEST = 1e-6  # brackets of CETT are not divided further
Status = Literal["ok", "saturated", "step"]


class Curve:
    """CETT(t) of one layer: the mean over tokens of ||sum over c_i < t of n_i|| / ||sum over all of n_i||.

    The grid is fixed by the first batch that has a neuron of c > 0 (:func:`quantile_grid`). CETT is measured at
    ``points`` of it, evenly among its FINER times as many, and interpolated between. Beyond the grid stands one open
    bin, which the largest c of all batches closes: there CETT is 1. Tokens whose output is 0 are left out of the mean
    and counted. Neurons are sorted by c, token by token, so that each is multiplied with its column once, however many
    points there are.

    Args:
        seed: of the sample of c that quantiles are taken of.

    Attributes:
        grid_P: the points at which it is measured.
        finer_Q: the whole grid; ``places_P`` is where the former stand in it.
    """

    def __init__(self, points: int, seed: int = 0):
        self.points, self.seed = points, seed
        self.grid_P: Tensor | None = None
        self.largest = 0.0
        self.tokens = self.zero_tokens = 0
        self.finer_Q = torch.zeros(0)
        self.places_P = np.zeros(0, dtype=np.int64)
        self._dtype = torch.float32
        self._sum_P = torch.zeros(0)

    def add(self, parts: Sequence[tuple[Down, Seen]], n_tokens: int) -> None:
        """Adds a batch: the activations before each down projection of the layer."""
        c = [sizes(seen, down) for down, seen in parts]
        banks = [as_rows(seen) for _, seen in parts]
        largest = max((float(x.max()) for x in c if x.numel()), default=0.0)
        self.largest = max(self.largest, largest)
        self._dtype = parts[0][0].norm_EF.dtype
        if self.grid_P is None:
            if largest == 0.0:  # nothing to make a grid of, and no output
                self.zero_tokens += n_tokens
                return
            self.finer_Q = quantile_grid(c, FINER * self.points, self.seed)
            n = len(self.finer_Q)
            self.places_P = np.unique((np.arange(1, self.points + 1) * n // self.points - 1).clip(0))
            self.grid_P = self.finer_Q[torch.from_numpy(self.places_P).to(self.finer_Q.device)]
            self._sum_P = torch.zeros(len(self.grid_P), dtype=torch.float64, device=self.grid_P.device)
        tables = [down.weight_EDF.transpose(1, 2).flatten(0, 1).to(self._dtype).contiguous() for down, _ in parts]
        most = MOST_TAILS.get(c[0].device.type, MOST_TAILS_ELSEWHERE)
        step = max(1, most // ((len(self.grid_P) + 1) * tables[0].shape[1]))
        for first in range(0, n_tokens, step):
            last = min(first + step, n_tokens)
            bins_NPD = c[0].new_zeros(last - first, len(self.grid_P) + 1, tables[0].shape[1])
            for rows, table_CD, c_MF in zip(banks, tables, c, strict=True):
                here = ((rows.token_M >= first) & (rows.token_M < last)).nonzero()[:, 0]
                picked = ExpertRows(*(x[here] for x in rows))
                bins_NPD.index_add_(0, picked.token_M - first, binned(picked, c_MF[here], table_CD, self.grid_P))
            self._count(bins_NPD)

    def _count(self, bins_NPD: Tensor) -> None:
        """Adds up bins to tails, one after the other: the sum stays in the cache, as it does not in a cumsum."""
        tail_ND = torch.zeros_like(bins_NPD[:, 0])
        norms = [torch.linalg.vector_norm(tail_ND.add_(bin_ND), dim=-1) for bin_ND in bins_NPD.unbind(1)]
        norms_NP = torch.stack(norms, dim=1).double()
        alive_N = norms_NP[:, -1] > 0
        self._sum_P += (norms_NP[alive_N, :-1] / norms_NP[alive_N, -1:]).sum(0)
        n_alive = int(alive_N.sum())
        self.tokens += n_alive
        self.zero_tokens += len(alive_N) - n_alive

    def measured(self) -> tuple[Array, Array]:
        """(t, CETT(t)), from (0, 0) on; the last t is above every c, where CETT is 1. No more than (0, 0) of a layer
        whose output is always 0."""
        if self.grid_P is None or not self.tokens:
            return np.zeros(1), np.zeros(1)
        largest = torch.tensor(self.largest, dtype=self._dtype)
        above_all = float(torch.nextafter(largest, torch.full_like(largest, math.inf)))
        t = np.concatenate(([0.0], self.grid_P.double().cpu().numpy(), [above_all]))
        return t, np.concatenate(([0.0], (self._sum_P / self.tokens).cpu().numpy(), [1.0]))

    def grid(self) -> tuple[Array, Array]:
        """As :meth:`measured`, at every point of the grid: between measured ones, linear in the place in the grid."""
        t, cett = self.measured()
        if len(t) == 1:
            return t, cett
        finer = self.finer_Q.double().cpu().numpy()
        places = np.concatenate(([-1], self.places_P, [len(finer)]))
        return np.concatenate((t[:1], finer, t[-1:])), np.interp(np.arange(-1, len(finer) + 1), places, cett)

    def threshold(self, target: float) -> float:
        """The largest t of the grid such that CETT is at most the target at it and at all smaller ones."""
        t, cett = self.grid()
        over = np.flatnonzero(cett > target)
        return float(t[over[0] - 1] if len(over) else t[-1])


def quantile_grid(c: Sequence[Tensor], points: int, seed: int) -> Tensor:
    """Quantiles of the positive sizes, ascending and different, up to their maximum.

    Half of them at even shares of their number, half at even shares of the root of their summed squares, which is what
    CETT would be if neurons' outputs were orthogonal. They stand midway between sizes, so that rounding does not decide
    on which side of a threshold a neuron falls.
    """
    flat = torch.cat([x.flatten() for x in c])
    top = flat.max()
    if flat.numel() > SAMPLE:  # drawn, not strided: a stride that divides d_ff would see few neurons only
        generator = torch.Generator().manual_seed(seed)
        flat = flat[torch.randint(flat.numel(), (SAMPLE,), generator=generator).to(flat.device)]
    size_U, count_U = torch.cat((flat[flat > 0], top[None])).unique(return_counts=True)
    midway_U = torch.cat((size_U[:-1] + size_U.diff() / 2, top[None]))
    found = []
    for share_U, n in (
        (count_U.double().cumsum(0), points // 2),
        ((count_U * size_U.double().square()).cumsum(0).sqrt(), points - points // 2),
    ):
        levels = torch.arange(1, n + 1, device=top.device, dtype=torch.float64) / max(n, 1)
        found.append(torch.searchsorted(share_U / share_U[-1], levels).clamp(max=len(size_U) - 1))
    return midway_U[torch.cat(found).unique()].unique()


def binned(rows: ExpertRows, c_MF: Tensor, table_CD: Tensor, grid_P: Tensor) -> Tensor:
    """The sum of n_i over the neurons of each row whose c lies in [t_{p-1}, t_p): [M, P + 1, D], the last bin open."""
    n_rows, width = c_MF.shape
    if not n_rows:
        return table_CD.new_zeros(0, len(grid_P) + 1, table_CD.shape[1])
    sorted_MF, order_MF = c_MF.sort(-1)
    ends_MP = torch.searchsorted(sorted_MF, grid_P.expand(n_rows, -1).contiguous())  # how many c are below each t
    value_MF = (rows.act_MF.to(table_CD.dtype) * rows.weight_M[:, None].to(table_CD.dtype)).gather(1, order_MF)
    starts = F.pad(ends_MP, (1, 0)) + torch.arange(n_rows, device=c_MF.device)[:, None] * width
    index_MF = order_MF + (rows.expert_M * width)[:, None]
    bins: Tensor = F.embedding_bag(
        index_MF.flatten(), table_CD, starts.flatten(), mode="sum", per_sample_weights=value_MF.flatten()
    )
    return bins.view(n_rows, len(grid_P) + 1, -1)


class Calibration(Observer):
    """The curve of each layer and the loss of each sequence, of the dense model."""

    sites = SITES

    def __init__(self, banks: Downs, n_layers: int, points: int, seed: int = 0):
        self.banks, self.n_layers = banks, n_layers
        self.curves = {layer: Curve(points, seed) for layer in banks}
        self.losses: list[Array] = []

    def layer(self, batch: Pass, layer: int, h_BTD: Tensor, out_BTD: Tensor, seen: Mapping[str, Any]) -> None:
        if layer in self.curves:
            parts = [(down, seen[site]) for site, down in self.banks[layer].items()]
            self.curves[layer].add(parts, batch.ids_BT.numel())

    def end(self, batch: Pass, h_BTD: Tensor) -> None:
        self.losses.append(batch.losses(h_BTD).double().cpu().numpy())

    def thresholds(self, target: float) -> tuple[float, ...]:
        """Of every layer, 0 where it has no curve."""
        layers = range(self.n_layers)
        return tuple(self.curves[layer].threshold(target) if layer in self.curves else 0.0 for layer in layers)

    def result(self) -> ProbeResult:
        return ProbeResult()


def above(thresholds: Sequence[float], banks: Downs) -> Active:
    """c_i >= the layer's threshold, and a_i != 0."""

    def active(layer: int, seen: Mapping[str, Any]) -> dict[str, Tensor]:
        ours = {site: (seen[site], down) for site, down in banks[layer].items() if site in seen}
        return {site: (sizes(x, down) >= thresholds[layer]) & (acts_of(x) != 0) for site, (x, down) in ours.items()}

    return active


# --- the search


@dataclass(frozen=True)
class Found:
    """What a search for the largest bearable CETT came to.

    Attributes:
        cett: the largest that was found to be feasible.
        bracket: (it, the smallest that was found not to be; 1 where there is none).
        ratio: the perplexity with its thresholds over the dense one.
        status: ok; saturated, where a CETT of 1 is feasible; step, where the ratio jumps over 1 + p.
        runs: how often the model was run with thresholds.
    """

    cett: float
    bracket: tuple[float, float]
    thresholds: tuple[float, ...]
    ratio: float
    status: Status
    runs: int


def search(
    thresholds_at: Callable[[float], Sequence[float]],
    ratio_with: Callable[[Sequence[float]], float],
    p: float,
    tolerance: float = 0.02,
) -> Found:
    """Bisects CETT in (0, 1) for the largest whose thresholds raise perplexity by at most p; keeps the feasible side.

    It ends as soon as the feasible ratio is within ``tolerance`` p of 1 + p, and calls ok what is within
    min(p / 10, 0.001) when brackets are as narrow as CLOSEST. Thresholds that were tried are not run again.
    """
    tried: dict[tuple[float, ...], float] = {}

    def ratio_at(cett: float) -> float:
        thresholds = tuple(thresholds_at(cett))
        if thresholds not in tried:
            tried[thresholds] = ratio_with(thresholds)
        return tried[thresholds]

    low, high, best = 0.0, 1.0, 1.0
    while high - low > CLOSEST and not best >= 1 + p - min(tolerance * p, 1e-3):
        middle = (low + high) / 2
        ratio = ratio_at(middle)
        if ratio <= 1 + p:  # a nan is not
            low, best = middle, ratio
        else:
            high = middle
        if low == 0.5 and high == 1.0 and ratio_at(1.0) <= 1 + p:
            return Found(1.0, (1.0, 1.0), tuple(thresholds_at(1.0)), ratio_at(1.0), "saturated", len(tried))
    best = ratio_at(low)
    status: Status = "ok" if best >= 1 + p - min(p / 10, 1e-3) else "step"
    return Found(low, (low, high), tuple(thresholds_at(low)), best, status, len(tried))


# --- thresholds as text


def write_thresholds(thresholds: Sequence[float]) -> str:
    """Comma separated, one a layer, with the digits that give the same numbers back; Sparsing Law's code reads it."""
    return ",".join(repr(float(t)) for t in thresholds)


def read_thresholds(text: str, n_layers: int | None = None) -> tuple[float, ...]:
    """What :func:`write_thresholds` writes, and Sparsing Law's code with its ``thresholds=`` before them.

    Raises:
        DataError: a value is no number of at least 0, or there is not one a layer.
    """
    parts = [part.strip() for part in text.strip().removeprefix("thresholds=").split(",")]
    values = []
    for index, part in enumerate(parts):
        try:
            values.append(float(part))
        except ValueError:
            values.append(math.nan)
        if not values[-1] >= 0:
            raise DataError(f"thresholds: number {index + 1} is {part!r}; give one number >= 0 a layer")
    if n_layers is not None and len(values) != n_layers:
        raise DataError(f"thresholds: there are {len(values)} for {n_layers} layers; give one a layer")
    return tuple(values)
