"""The shape of activations' distribution: moments, quantiles and outliers, in one pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from sparsekit.components.contracts import wide
from sparsekit.probes.base import DenseProbe, ProbeResult, Tokens, bootstrap
from sparsekit.probes.layered import LayeredModel
from sparsekit.probes.site_means import SITES, SUMS, moments_of, token_means
from sparsekit.probes.sketch import Sketch, weighted_quantile
from sparsekit.probes.variance import SiteObserver


class Moments(DenseProbe):
    """Skewness, kurtosis, spread and outliers of the stream and of what both sub-layers add, per layer.

    By key ``<site>_<name>``, over all entries: skewness m3/m2^1.5, kurtosis m4/m2^2 and excess_kurtosis (less 3), cv =
    std/|mean|; iqr, mad = median |x - median| and quantile_high, the ``quantile`` of |x|, from a histogram with a
    relative error ``error`` of every entry; outliers = share with |x - mean| > 3 std (to within that error at the
    edge); norm_above = share of the squared norm in entries with |x| above quantile_high. Of tokens: token_skewness,
    token_kurtosis over channels and their ``_std`` over tokens; top_share = share of a token's squared norm in its
    ``top`` largest channels, mean over tokens.

    Source: arXiv 2603.15389 (moments, as its training option)
    """

    class Params(DenseProbe.Params):
        error: float = Field(default=0.005, gt=0, lt=0.5)
        quantile: float = Field(default=0.999, gt=0, lt=1)
        top: PositiveInt = 8

    def observer(self, view: LayeredModel, tokens: Tokens) -> MomentsObserver:
        return MomentsObserver(view, self.params, self.seed)


class MomentsObserver(SiteObserver):
    """Keeps, at each site and layer, sums for each sequence and one histogram."""

    def __init__(self, view: LayeredModel, params: Any, seed: int):
        super().__init__(view)
        self.params, self.seed = params, seed
        self.n_tokens = 0
        self._sums: dict[tuple[str, int], list[Tensor]] = {}
        self._tops: dict[tuple[str, int], list[Tensor]] = {}
        self._sketches: dict[tuple[str, int], Sketch] = {}

    def see(self, site: str, layer: int, x_BTD: Tensor) -> None:
        place = site, layer
        means_KN = token_means(x_BTD.flatten(0, 1), True, torch.float64)
        self._sums.setdefault(place, []).append(means_KN.unflatten(1, x_BTD.shape[:2]).mean(-1))
        if place not in self._sketches:
            self._sketches[place] = Sketch(self.params.error, x_BTD.device)
        self._sketches[place].add(x_BTD)
        square_BTD = x_BTD.to(wide(x_BTD.dtype)).square()
        top_BT = square_BTD.topk(min(self.params.top, x_BTD.shape[-1]), dim=-1).values.sum(-1)
        total_BT = square_BTD.sum(-1)
        self._tops.setdefault(place, []).append(torch.where(total_BT > 0, top_BT / total_BT, 0).double().mean(-1))
        if place == ("resid", 0):
            self.n_tokens += x_BTD.shape[0] * x_BTD.shape[1]

    def result(self) -> ProbeResult:
        result = ProbeResult()
        for site in SITES:
            found = [self._of(site, layer) for layer in range(self.view.n_layers)]
            names = next((list(told) for told in found if told), [])
            for name in names:
                result.per_layer[f"{site}_{name}"] = np.array([told.get(name, np.nan) for told in found])
        for site in SITES:
            last = site, self.view.n_layers - 1
            if last in self._sums:
                sums_SK = torch.cat(self._sums[last], dim=1).T.cpu().numpy()
                for name in ("kurtosis", "token_kurtosis"):
                    result.scalars[f"{site}_{name}_last"] = float(result.per_layer[f"{site}_{name}"][-1])
                    result.intervals[f"{site}_{name}_last"] = bootstrap(sums_SK, _from_sums(name), self.seed)
        result.remark(
            f"iqr, mad, quantile_high, outliers and norm_above come from a histogram whose entries are off by at most "
            f"{self.params.error:g} of their value"
        )
        self.remark_missing(result)
        return result

    def _of(self, site: str, layer: int) -> dict[str, float]:
        if (site, layer) not in self._sums:
            return {}
        sums_KS = torch.cat(self._sums[site, layer], dim=1).cpu()
        means = dict(zip(SUMS, sums_KS.mean(1), strict=True))
        n_entries = self.n_tokens * self.view.d_model
        told = {name: float(value) for name, value in moments_of(means, n_entries).items()}
        told["excess_kurtosis"] = told["kurtosis"] - 3
        for name in ("skewness", "kurtosis"):
            spread = max(0.0, float(means[f"{name}^2"] - means[name] ** 2))
            told[f"token_{name}"] = float(means[name])
            told[f"token_{name}_std"] = (spread * self.n_tokens / max(1, self.n_tokens - 1)) ** 0.5
        told["top_share"] = float(torch.cat(self._tops[site, layer]).mean())
        return told | self._from_sketch(self._sketches[site, layer], means)

    def _from_sketch(self, sketch: Sketch, means: dict[str, Tensor]) -> dict[str, float]:
        values, counts = sketch.values, sketch.counts.cpu()
        mean, std = means["x1"], (means["x2"] - means["x1"] ** 2).clamp(min=0).sqrt()
        sizes, order = values.abs().sort(stable=True)
        high = weighted_quantile(sizes, counts[order], self.params.quantile)
        squares = counts * values.square()
        total = float(squares.sum())
        return {
            "iqr": sketch.quantile(0.75) - sketch.quantile(0.25),
            "mad": sketch.mad(),
            "quantile_high": high,
            "outliers": sketch.share((values - mean).abs() > 3 * std),
            "norm_above": float(squares[values.abs() > high].sum()) / total if total else 0.0,
        }


def _from_sums(name: str) -> Callable[[Any], float]:
    """A moment from [S, K] sums of sequences."""

    def statistic(sums_SK: Any) -> float:
        means = dict(zip(SUMS, torch.from_numpy(sums_SK).mean(0), strict=True))
        return float(means["kurtosis"] if name == "token_kurtosis" else moments_of(means, 2)[name])

    return statistic
