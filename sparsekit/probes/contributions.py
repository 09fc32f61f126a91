"""How much each sub-layer adds, beside what is there already."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsekit.components.contracts import wide
from sparsekit.probes.base import DenseProbe, Observer, ProbeResult, Tokens, bootstrap
from sparsekit.probes.layered import LayeredModel, Pass

NAMES = ("attn_ratio", "ffn_ratio", "attn_cosine", "ffn_cosine")


class Contributions(DenseProbe):
    """Relative contributions ||attn|| / ||h|| and ||ffn|| / ||h + attn||, and the cosines with what they are added to.

    Per layer, means over tokens: ``attn_ratio``, ``ffn_ratio``, ``attn_cosine`` cos(attn, h), ``ffn_cosine`` cos(ffn,
    h + attn). Scalars: their means over layers. 0/0 is 0 and counted in ``zero_denominators``.

    Source: Csordas, Manning & Potts 2025, arXiv 2505.13898, sec. 3
    """

    def observer(self, view: LayeredModel, tokens: Tokens) -> ContributionsObserver:
        return ContributionsObserver(view, self.seed)


class ContributionsObserver(Observer):
    """Keeps the means of each sequence."""

    sites = ("attn_out", "ffn_out")

    def __init__(self, view: LayeredModel, seed: int):
        self.view, self.seed = view, seed
        self._kept: list[list[Tensor]] = [[] for _ in range(view.n_layers)]
        self._zeros = torch.zeros(view.n_layers, dtype=torch.int64, device=view.device)

    def layer(self, batch: Pass, layer: int, h_BTD: Tensor, out_BTD: Tensor, seen: Mapping[str, Any]) -> None:
        if not set(self.sites) <= set(seen):
            return
        full = wide(h_BTD.dtype)
        h, attn, ffn = (x.to(full) for x in (h_BTD, seen["attn_out"], seen["ffn_out"]))
        told = []
        for added, stream in ((attn, h), (ffn, h + attn)):
            size, whole = added.norm(dim=-1), stream.norm(dim=-1)
            dot = (added * stream).sum(-1)
            told.append(
                (torch.where(whole > 0, size / whole, 0), torch.where(size * whole > 0, dot / (size * whole), 0))
            )
            self._zeros[layer] += (whole == 0).sum()
        (attn_ratio, attn_cosine), (ffn_ratio, ffn_cosine) = told
        stacked = torch.stack((attn_ratio, ffn_ratio, attn_cosine, ffn_cosine))
        self._kept[layer].append(stacked.double().mean(-1).cpu())

    def result(self) -> ProbeResult:
        result = ProbeResult()
        kept = [torch.cat(parts, dim=1).numpy() if parts else None for parts in self._kept]
        for place, name in enumerate(NAMES):
            result.per_layer[name] = np.array([np.nan if of is None else of[place].mean() for of in kept])
            samples = [of[place] for of in kept if of is not None]
            if samples:
                samples_S = np.mean(samples, axis=0)
                result.scalars[name] = float(samples_S.mean())
                result.intervals[name] = bootstrap(samples_S, seed=self.seed)
        result.per_layer["zero_denominators"] = self._zeros.cpu().numpy()
        for layer, of in enumerate(kept):
            if of is None:
                reasons = (self.view.sites(layer)[site] for site in self.sites)
                result.remark(f"layer {layer}: {next(reason for reason in reasons if reason)}")
        return result
