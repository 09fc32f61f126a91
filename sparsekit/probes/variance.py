"""How large what every layer holds and adds is, and how it is spread over channels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsekit.probes.base import Array, DenseProbe, Observer, ProbeResult, Tokens, bootstrap
from sparsekit.probes.layered import LayeredModel, Pass
from sparsekit.probes.site_means import SITES, WITHOUT_MOMENTS, token_means

LAYER_SITES = SITES[1:]  # what is seen inside a layer; resid is its output


class SiteObserver(Observer):
    """Runs a function over the activations of resid, attn_out and ffn_out of every layer."""

    def __init__(self, view: LayeredModel, sites: Sequence[str] = LAYER_SITES):
        self.view, self.sites = view, sites

    def layer(self, batch: Pass, layer: int, h_BTD: Tensor, out_BTD: Tensor, seen: Mapping[str, Any]) -> None:
        self.see("resid", layer, out_BTD)
        for site in self.sites:
            if site in seen:
                self.see(site, layer, seen[site])

    def see(self, site: str, layer: int, x_BTD: Tensor) -> None:
        raise NotImplementedError

    def remark_missing(self, result: ProbeResult) -> None:
        """Says where a site could not be observed, and why."""
        for layer in range(self.view.n_layers):
            for site in self.sites:
                reason = self.view.sites(layer).get(site)
                if reason is not None:
                    result.remark(f"{site} of layer {layer}: {reason}")


class Variance(DenseProbe):
    """Var_l(X), the mean over tokens of the unbiased variance over channels, of the stream and of both sub-layers.

    Per layer at the sites ``resid`` (the stream after the layer), ``attn_out`` and ``ffn_out`` (what each sub-layer
    adds to it): the variance under the site's name, ``<site>_rms`` and ``<site>_frobenius``, the norm of all entries;
    and ``param_norm``. Scalars: the mean over layers and the last layer's, of each site.

    Source: arXiv 2603.15389, sec. 3.1
    """

    def observer(self, view: LayeredModel, tokens: Tokens) -> VarianceObserver:
        return VarianceObserver(view, self.seed)


class VarianceObserver(SiteObserver):
    """Keeps the variance and the mean square of each sequence, at each site and layer: [S] numbers each."""

    def __init__(self, view: LayeredModel, seed: int):
        super().__init__(view)
        self.seed = seed
        self.length = 0
        self._kept: dict[tuple[str, int], list[Tensor]] = {}

    def see(self, site: str, layer: int, x_BTD: Tensor) -> None:
        means_KN = token_means(x_BTD.flatten(0, 1), False, torch.float64)
        self.length = x_BTD.shape[1]
        self._kept.setdefault((site, layer), []).append(means_KN.unflatten(1, x_BTD.shape[:2]).mean(-1))

    def result(self) -> ProbeResult:
        result = ProbeResult()
        for site in SITES:
            of_KSL = self._stacked(site)
            if np.isnan(of_KSL).all():
                continue
            variance_SL, square_SL = of_KSL
            result.per_layer[site] = variance_SL.mean(0)
            result.per_layer[f"{site}_rms"] = np.sqrt(square_SL.mean(0))
            n_entries = square_SL.shape[0] * self.length * self.view.d_model
            result.per_layer[f"{site}_frobenius"] = result.per_layer[f"{site}_rms"] * np.sqrt(n_entries)
            for name, samples_S in ((f"{site}_mean", variance_SL.mean(1)), (f"{site}_last", variance_SL[:, -1])):
                if not np.isnan(samples_S).any():
                    result.scalars[name] = float(samples_S.mean())
                    result.intervals[name] = bootstrap(samples_S, seed=self.seed)
        norms = [
            float(torch.stack([p.detach().float().norm() for p in block.parameters()]).norm())
            for block in self.view.blocks
        ]
        result.per_layer["param_norm"] = np.array(norms)
        self.remark_missing(result)
        return result

    def _stacked(self, site: str) -> Array:
        """[K, S, L], nan where a layer lacks the site."""
        columns = []
        n_sequences = sum(part.shape[1] for part in self._kept["resid", 0])
        for layer in range(self.view.n_layers):
            parts = self._kept.get((site, layer))
            none = np.full((WITHOUT_MOMENTS, n_sequences), np.nan)
            columns.append(none if parts is None else torch.cat(parts, dim=1).cpu().numpy())
        return np.stack(columns, axis=2)
