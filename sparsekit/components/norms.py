"""Normalisation of the last dimension."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat
from torch import Tensor, nn

from sparsekit.components.contracts import Build, Norm


class RMSNorm(Norm):
    """y = x / sqrt(mean(x^2) + eps) * weight.

    Source: Zhang & Sennrich 2019, arXiv 1910.07467, eq. 4
    """

    class Params(Norm.Params):
        eps: PositiveFloat = 1e-6

    def __init__(self, params: Params, build: Build):
        super().__init__(params, build)
        self.weight = nn.Parameter(torch.empty(self.width))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (self.width,), self.weight, self.params.eps)


class LayerNorm(Norm):
    """y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias, the variance biased.

    Source: Ba, Kiros & Hinton 2016, arXiv 1607.06450, eq. 4
    """

    class Params(Norm.Params):
        eps: PositiveFloat = 1e-5
        bias: bool = True

    def __init__(self, params: Params, build: Build):
        super().__init__(params, build)
        self.weight = nn.Parameter(torch.empty(self.width))
        self.bias = nn.Parameter(torch.empty(self.width)) if params.bias else None

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (self.width,), self.weight, self.bias, self.params.eps)


class NoNorm(Norm):
    """y = x, for ablations."""

    def forward(self, x: Any) -> Any:
        return x
