"""How many directions the stream uses after each layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsekit.probes.base import DenseProbe, Observer, ProbeResult, Tokens
from sparsekit.probes.layered import LayeredModel, Pass


class EffectiveRank(DenseProbe):
    """exp(H(p)), p = s / sum(s), of the singular values s of the stream [tokens, channels] after each layer.

    Per layer: ``effective_rank``; ``stable_rank`` ||X||_F^2 / ||X||_2^2; ``participation`` (sum s^2)^2 / sum s^4.
    With ``centered`` the mean over tokens is taken off first. Scalars: means over layers and the last layer's. Streams
    second moments in float64 (1 / d of the tokens' memory for each layer); no intervals, as a rank is no function of
    per-sequence sums of fixed size that could be kept for each.

    Source: Roy & Vetterli 2007, EUSIPCO, eq. 2
    """

    class Params(DenseProbe.Params):
        centered: bool = True

    def observer(self, view: LayeredModel, tokens: Tokens) -> EffectiveRankObserver:
        return EffectiveRankObserver(view, self.params.centered)


class EffectiveRankObserver(Observer):
    """Keeps sum x and sum x x^T of every layer."""

    def __init__(self, view: LayeredModel, centered: bool):
        self.view, self.centered = view, centered
        shape = (view.n_layers, view.d_model)
        self._sum_LD = torch.zeros(shape, dtype=torch.float64, device=view.device)
        self._outer_LDD = torch.zeros((*shape, view.d_model), dtype=torch.float64, device=view.device)
        self._n = 0

    def layer(self, batch: Pass, layer: int, h_BTD: Tensor, out_BTD: Tensor, seen: Mapping[str, Any]) -> None:
        x_ND = out_BTD.flatten(0, 1).double()
        self._sum_LD[layer] += x_ND.sum(0)
        self._outer_LDD[layer].addmm_(x_ND.T, x_ND)
        if layer == 0:
            self._n += x_ND.shape[0]

    def result(self) -> ProbeResult:
        ranks = [self._ranks(layer) for layer in range(self.view.n_layers)]
        result = ProbeResult()
        for place, name in enumerate(("effective_rank", "stable_rank", "participation")):
            result.per_layer[name] = np.array([rank[place] for rank in ranks])
            result.scalars[f"{name}_mean"] = float(result.per_layer[name].mean())
            result.scalars[f"{name}_last"] = float(result.per_layer[name][-1])
            result.intervals |= {f"{name}_mean": None, f"{name}_last": None}
        result.remark("no intervals: a rank is no function of sums over each sequence that are small enough to keep")
        if self._n < 2 * self.view.d_model:
            result.remark(f"{self._n} tokens bound the rank of {self.view.d_model} channels; measure on more")
        return result

    def _ranks(self, layer: int) -> tuple[float, float, float]:
        second = self._outer_LDD[layer]
        if self.centered:
            second = second - torch.outer(self._sum_LD[layer], self._sum_LD[layer]) / self._n
        return ranks_of(torch.linalg.eigvalsh(second).clamp(min=0))


def ranks_of(squares: Tensor) -> tuple[float, float, float]:
    """Effective rank, stable rank and participation ratio of squared singular values; 0 where all are 0."""
    if float(squares.sum()) == 0:
        return 0.0, 0.0, 0.0
    squares = torch.where(squares > squares.max() * len(squares) * torch.finfo(squares.dtype).eps, squares, 0)
    p = squares.sqrt() / squares.sqrt().sum()
    entropy = -torch.special.xlogy(p, p).sum()
    return (
        float(entropy.exp()),
        float(squares.sum() / squares.max()),
        float(squares.sum().square() / squares.square().sum()),
    )
